//! What the bridge watches, and the names that Dynamo gives to it on NATS.
//!
//! A worker process registers each of its components as a NATS micro service and each endpoint of it under a subject
//! that carries the worker id. How both are spelled has changed twice; every spelling is here and nowhere else.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use percent_encoding::percent_decode_str;

/// Endpoint on which Dynamo 0.1 - 0.5 answers with the load of the worker that serves its sibling endpoints.
pub const LOAD_ENDPOINT: &str = "load_metrics";

/// Why a name cannot be watched. The text says what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Nothing was given, or white space alone.
    #[error("the name is empty")]
    Empty,
    /// A NATS subject could not hold it.
    #[error("{0:?} holds white space, a control character, or one of * and >")]
    Character(String),
    /// `.` separates the tokens of a NATS subject: `a..b` and `.a` have an empty one.
    #[error("{0:?} has an empty part between its dots")]
    EmptyPart(String),
}

/// Dynamo's id of a worker: its etcd lease (0.1 - 0.5, there an `i64`) or instance id (0.6 on, `u64`).
///
/// Displayed in decimal, as in the label `worker_id`; `{:x}` gives the hex of subjects and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u64);

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::LowerHex for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// Which Dynamo namespaces are watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamespaceFilter {
    /// `*`: every one. Series then carry the label `dynamo_namespace`.
    All,
    /// One namespace and the worker generations that the Kubernetes operator makes of it: `dynamo`,
    /// `dynamo-1a2b3c4d`, `dynamo-legacy`.
    Named(String),
}

impl NamespaceFilter {
    /// Whether `namespace`, in Dynamo's own spelling, is watched.
    #[must_use]
    pub fn matches(&self, namespace: &str) -> bool {
        match self {
            Self::All => true,
            Self::Named(base) => namespace.strip_prefix(base.as_str()).is_some_and(is_empty_or_generation),
        }
    }
}

/// The operator appends `-` and 8 lower-case hex digits for each rollout of the workers, or `-legacy`.
fn is_empty_or_generation(suffix: &str) -> bool {
    let generation = |name: &str| name.len() == 8 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    suffix.is_empty() || suffix.strip_prefix('-').is_some_and(|name| name == "legacy" || generation(name))
}

impl FromStr for NamespaceFilter {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "*" { Ok(Self::All) } else { name(text).map(Self::Named) }
    }
}

impl fmt::Display for NamespaceFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::All => "*",
            Self::Named(base) => base,
        })
    }
}

/// Checks the name of a namespace, component or endpoint.
///
/// # Errors
/// A name that is empty or that no NATS subject can hold.
pub fn name(text: &str) -> Result<String, TargetError> {
    if text.trim().is_empty() {
        return Err(TargetError::Empty);
    }
    if text.chars().any(|c| c.is_whitespace() || c.is_control() || c == '*' || c == '>') {
        return Err(TargetError::Character(text.to_owned()));
    }
    if text.split('.').any(str::is_empty) {
        return Err(TargetError::EmptyPart(text.to_owned()));
    }
    Ok(text.to_owned())
}

/// Namespace and component that a NATS micro service stands for, in Dynamo's own spelling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Dynamo namespace, generation included.
    pub namespace: String,
    /// Component within the namespace.
    pub component: String,
}

/// The namespace, component and endpoint whose workers are reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Namespaces watched.
    pub namespace: NamespaceFilter,
    /// One component, or every one that reports.
    pub component: Option<String>,
    /// One endpoint, or every one that reports.
    pub endpoint: Option<String>,
}

impl Target {
    /// Component and endpoint, if both were named: such a target is shown, with zeros, before its first worker.
    #[must_use]
    pub fn explicit(&self) -> Option<(&str, &str)> {
        Some((self.component.as_deref()?, self.endpoint.as_deref()?))
    }

    /// Whether a component of this name is watched.
    #[must_use]
    pub fn watches_component(&self, component: &str) -> bool {
        self.component.as_deref().is_none_or(|watched| watched == component)
    }

    /// Whether an endpoint of this name is watched. Whole names: `gen` is not `generate`.
    #[must_use]
    pub fn watches_endpoint(&self, endpoint: &str) -> bool {
        self.endpoint.as_deref().is_none_or(|watched| watched == endpoint)
    }

    /// Whether that endpoint of that component is watched.
    #[must_use]
    pub fn watches(&self, component: &str, endpoint: &str) -> bool {
        self.watches_component(component) && self.watches_endpoint(endpoint)
    }

    /// The place that a service stands for, if its namespace is watched.
    ///
    /// The INFO `description` names both in their original spelling. A service that has none can still be known by its
    /// name, where namespace and component are both given: the way back from a name alone is ambiguous (`a_b` + `c` and
    /// `a` + `b_c` are one name).
    #[must_use]
    pub fn place(&self, service: &str, description: &str) -> Option<Place> {
        let place = described(description).or_else(|| self.place_by_name(service))?;
        self.namespace.matches(&place.namespace).then_some(place)
    }

    fn place_by_name(&self, service: &str) -> Option<Place> {
        let (NamespaceFilter::Named(namespace), Some(component)) = (&self.namespace, &self.component) else {
            return None;
        };
        let named = service_names(namespace, component).iter().any(|name| name == service);
        named.then(|| Place { namespace: namespace.clone(), component: component.clone() })
    }

    /// The service names and subjects of an explicit target, newest spelling first, else a pattern: for the log.
    #[must_use]
    pub fn subjects(&self) -> Vec<(String, String)> {
        let endpoint = self.endpoint.as_deref().unwrap_or("*");
        let services = match (&self.namespace, &self.component) {
            (NamespaceFilter::Named(namespace), Some(component)) => service_names(namespace, component).to_vec(),
            (NamespaceFilter::Named(namespace), None) => vec![format!("{}_*", slug(namespace, Form::Plain))],
            (NamespaceFilter::All, Some(component)) => vec![format!("*_{}", slug(component, Form::Plain))],
            (NamespaceFilter::All, None) => vec!["*".to_owned()],
        };
        services
            .into_iter()
            .map(|service| {
                let subject = format!("{service}.{endpoint}");
                (service, subject)
            })
            .collect()
    }
}

/// Reads the INFO description of Dynamo, `Dynamo component <component> in namespace <namespace>`. The first word is the
/// project's name, which was another one before 0.1.
fn described(description: &str) -> Option<Place> {
    let (project, rest) = description.split_once(" component ")?;
    let (component, namespace) = rest.rsplit_once(" in namespace ")?;
    let named = !project.contains(' ') && !component.is_empty() && !namespace.is_empty();
    named.then(|| Place { namespace: namespace.to_owned(), component: component.to_owned() })
}

/// The INFO description under which every Dynamo release registers a component.
#[must_use]
pub fn description(namespace: &str, component: &str) -> String {
    format!("Dynamo component {component} in namespace {namespace}")
}

/// How a service name is spelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// 0.3 and later: the slug of `<namespace>_<component>`.
    Plain,
    /// 0.1 and 0.2: the slug and 8 hex digits of the hash of `<namespace>_<component>`.
    Hashed,
    /// Before 0.1.0: as hashed, but the hash is of `<namespace>|<component>`.
    HashedBar,
}

/// The NATS service name of a component in one spelling.
#[must_use]
pub fn service_name(namespace: &str, component: &str, form: Form) -> String {
    let stem = slug(&format!("{namespace}_{component}"), form);
    let hashed = match form {
        Form::Plain => return stem,
        Form::Hashed => format!("{namespace}_{component}"),
        Form::HashedBar => format!("{namespace}|{component}"),
    };
    let hex = blake3::hash(hashed.as_bytes()).to_hex();
    format!("{stem}_{}", &hex[hex.len() - 8..])
}

/// Every name under which a component may be registered, newest spelling first.
#[must_use]
pub fn service_names(namespace: &str, component: &str) -> [String; 3] {
    [Form::Plain, Form::Hashed, Form::HashedBar].map(|form| service_name(namespace, component, form))
}

fn slug(text: &str, form: Form) -> String {
    let kept = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '_') || (c == '-' && form == Form::Plain);
    let slug: String = text.to_lowercase().chars().map(|c| if kept(c) { c } else { '_' }).collect();
    slug.trim_start_matches('_').to_owned()
}

/// The subject under which a worker answers requests to one of its endpoints.
#[must_use]
pub fn endpoint_subject(service: &str, endpoint: &str, worker: WorkerId) -> String {
    format!("{service}.{endpoint}-{worker:x}")
}

/// Endpoint and worker id in a subject `<service>.<endpoint>-<worker id in hex>` of the named service.
///
/// Split at the last `-`, since endpoint names may hold one. `None` where a part is missing or the id is not hex of at
/// most 64 bits.
#[must_use]
pub fn parse_endpoint_subject<'a>(service: &str, subject: &'a str) -> Option<(&'a str, WorkerId)> {
    let (endpoint, id) = subject.strip_prefix(service)?.strip_prefix('.')?.rsplit_once('-')?;
    // from_str_radix would take a sign.
    let hex = !id.is_empty() && id.bytes().all(|b| b.is_ascii_hexdigit());
    let id = u64::from_str_radix(id, 16).ok().filter(|_| hex && !endpoint.is_empty())?;
    Some((endpoint, WorkerId(id)))
}

/// Subject of the events that Dynamo's KV routers of 0.1 - 0.9 publish for each routed request.
#[must_use]
pub fn kv_hit_rate_subject(namespace: &str) -> String {
    format!("namespace.{namespace}.kv-hit-rate")
}

/// What a subject of an event says. Parts are percent-encoded in 1.4 and later, and decoded here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventSubject<'a> {
    /// Namespace.
    pub namespace: Cow<'a, str>,
    /// Component, where the topic is one of components or endpoints.
    pub component: Option<Cow<'a, str>>,
    /// Endpoint, where the topic is one of endpoints.
    pub endpoint: Option<Cow<'a, str>>,
    /// Dynamo's name of the topic.
    pub topic: &'a str,
}

/// Reads `namespace.<namespace>[.component.<component>[.endpoint.<endpoint>]].<topic>`.
#[must_use]
pub fn parse_event_subject(subject: &str) -> Option<EventSubject<'_>> {
    let (scope, topic) = subject.strip_prefix(NAMESPACE)?.rsplit_once('.')?;
    let (namespace, scope) = match scope.split_once(".component.") {
        Some((namespace, scope)) => (namespace, Some(scope)),
        None => (scope, None),
    };
    let (component, endpoint) = match scope.map(|scope| (scope, scope.split_once(".endpoint."))) {
        Some((_, Some((component, endpoint)))) => (Some(component), Some(endpoint)),
        Some((component, None)) => (Some(component), None),
        None => (None, None),
    };
    let plain = |part| percent_decode_str(part).decode_utf8().ok();
    Some(EventSubject {
        namespace: plain(namespace).filter(|namespace| !namespace.is_empty())?,
        component: component.and_then(plain),
        endpoint: endpoint.and_then(plain),
        topic,
    })
}

/// What every subject of an event starts with.
pub const NAMESPACE: &str = "namespace.";

/// NATS subscriptions that cover `kv-hit-rate` and the given topics of every namespace that `filter` matches, and others:
/// check each message. A wildcard stands for a whole token, so a generation's suffix can only be asked for that way, and
/// the dots of a nested namespace are tokens up to 1.3 and encoded later.
#[must_use]
pub fn event_subscriptions(filter: &NamespaceFilter, topics: &[&str]) -> Vec<String> {
    let nested = match filter {
        NamespaceFilter::Named(base) => base.rsplit_once('.').map(|(parents, _)| format!("{parents}.*")),
        NamespaceFilter::All => None,
    };
    let namespaces: Vec<_> = nested.into_iter().chain(["*".to_owned()]).collect();
    let mut subjects = vec![kv_hit_rate_subject(&namespaces[0])];
    for topic in topics {
        for namespace in &namespaces {
            for scope in ["", ".component.*", ".component.*.endpoint.*"] {
                subjects.push(format!("{NAMESPACE}{namespace}{scope}.{topic}"));
            }
        }
    }
    subjects
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(namespace: &str, component: Option<&str>, endpoint: Option<&str>) -> Target {
        Target {
            namespace: namespace.parse().unwrap(),
            component: component.map(str::to_owned),
            endpoint: endpoint.map(str::to_owned),
        }
    }

    #[test]
    fn service_names_are_those_that_real_releases_register() {
        assert_eq!(service_name("dynamo", "backend", Form::Hashed), "dynamo_backend_9ce3f3b7", "0.1.1, captured");
        assert_eq!(service_name("dynamo", "backend", Form::Plain), "dynamo_backend", "0.3.2, captured");
        assert_eq!(
            service_name("triton-init", "backend", Form::HashedBar),
            "triton_init_backend_720278f8",
            "the hash that the old component's README prints"
        );
    }

    #[test]
    fn a_slug_keeps_a_dash_only_in_the_plain_form() {
        assert_eq!(service_name("_My-NS", "Back.End", Form::Plain), "my-ns_back_end");
        assert!(service_name("_My-NS", "Back.End", Form::Hashed).starts_with("my_ns_back_end_"));
    }

    #[test]
    fn a_namespace_means_itself_and_its_worker_generations() {
        let filter: NamespaceFilter = "dynamo".parse().unwrap();
        for watched in ["dynamo", "dynamo-1a2b3c4d", "dynamo-legacy"] {
            assert!(filter.matches(watched), "{watched}");
        }
        for other in ["dynam", "dynamo2", "dynamo-1a2b3c4", "dynamo-1A2B3C4D", "dynamo-1a2b3c4d5", "dynamo-x", ""] {
            assert!(!filter.matches(other), "{other}");
        }
        assert!("*".parse::<NamespaceFilter>().unwrap().matches("anything"));
    }

    #[test]
    fn names_that_no_subject_can_hold_are_refused() {
        for bad in ["", "  ", "a b", "a*", ">", "a..b", ".a", "a.", "a\n"] {
            assert!(name(bad).is_err(), "{bad:?}");
        }
        assert_eq!(name("ns.child-1_x"), Ok("ns.child-1_x".to_owned()));
    }

    #[test]
    fn the_description_tells_apart_what_the_service_name_does_not() {
        let wanted = target("a", Some("b_c"), None);
        assert!(wanted.place("a_b_c", &description("a", "b_c")).is_some());
        assert!(wanted.place("a_b_c", &description("a_b", "c")).is_none(), "another namespace");
        let other = wanted.place("a_b", &description("a", "b")).unwrap();
        assert!(!wanted.watches(&other.component, "generate"));
    }

    #[test]
    fn a_service_without_a_description_is_known_by_any_spelling_of_its_name() {
        let wanted = target("dynamo", Some("backend"), None);
        for service in service_names("dynamo", "backend") {
            assert_eq!(wanted.place(&service, "").unwrap().component, "backend", "{service}");
        }
        for other in ["dynamo_backend_prefill", "dynamo_backend_00000000", "dynamo"] {
            assert!(wanted.place(other, "").is_none(), "{other}");
        }
        assert!(target("dynamo", None, None).place("dynamo_backend", "an unrelated service").is_none());
    }

    #[test]
    fn endpoint_subjects_are_split_at_the_last_dash_and_matched_whole() {
        let parse = |subject| parse_endpoint_subject("dynamo_backend", subject);
        assert_eq!(
            parse("dynamo_backend.generate-694d951a80e06bb6"),
            Some(("generate", WorkerId(7_587_884_888_253_033_398)))
        );
        assert_eq!(parse("dynamo_backend.my-gen-1f"), Some(("my-gen", WorkerId(31))));
        assert_eq!(parse("dynamo_backend.generate-ffffffffffffffff"), Some(("generate", WorkerId(u64::MAX))));
        for bad in [
            "dynamo_backend.generate",
            "dynamo_backend.generate-",
            "dynamo_backend.generate-xyz",
            "dynamo_backend.generate-+1",
            "dynamo_backend.generate-1ffffffffffffffff",
            "dynamo_backend.-1",
            "dynamo_backend_prefill.generate-1",
            "other.generate-1",
            "",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn subscriptions_cover_the_generations_of_a_nested_namespace() {
        let subjects = |namespace: &str| event_subscriptions(&namespace.parse().unwrap(), &["kv_metrics"]);
        assert_eq!(
            subjects("dynamo"),
            [
                "namespace.*.kv-hit-rate",
                "namespace.*.kv_metrics",
                "namespace.*.component.*.kv_metrics",
                "namespace.*.component.*.endpoint.*.kv_metrics"
            ]
        );
        let nested = subjects("team.dynamo");
        assert_eq!(nested[..2], ["namespace.team.*.kv-hit-rate", "namespace.team.*.kv_metrics"]);
        assert!(nested.contains(&"namespace.*.component.*.endpoint.*.kv_metrics".to_owned()), "encoded, as one token");
        assert_eq!(event_subscriptions(&NamespaceFilter::All, &[]), ["namespace.*.kv-hit-rate"]);
    }

    #[test]
    fn a_subject_tells_topic_and_names() {
        let read = |subject| {
            let EventSubject { namespace, component, endpoint, topic } = parse_event_subject(subject)?;
            let name = |name: Option<Cow<'_, str>>| name.map(Cow::into_owned).unwrap_or_default();
            Some([namespace.into_owned(), name(component), name(endpoint), topic.to_owned()])
        };
        let some = |names: [&str; 4]| Some(names.map(str::to_owned));
        assert_eq!(read("namespace.a.b.kv-hit-rate"), some(["a.b", "", "", "kv-hit-rate"]));
        let scoped = "namespace.a%2Eb.component.backend.endpoint.gen%20erate.kv_metrics";
        assert_eq!(read(scoped), some(["a.b", "backend", "gen erate", "kv_metrics"]));
        let component = "namespace.dynamo.component.backend.forward-pass-metrics";
        assert_eq!(read(component), some(["dynamo", "backend", "", "forward-pass-metrics"]));
        for other in ["namespace.", "namespace.kv_metrics", "other.a.kv_metrics", ""] {
            assert_eq!(read(other), None, "{other}");
        }
    }
}
