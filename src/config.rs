//! Command line and environment, checked before anything starts.

#![expect(clippy::doc_markdown, reason = "doc comments of options are their help texts")]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use axum::http::uri::Authority;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

use crate::fleet::{Rules, Source, Topic};
use crate::healthcheck::HealthcheckOptions;
use crate::source::etcd::EtcdOptions;
use crate::source::files::FileOptions;
use crate::source::kubernetes::KubernetesOptions;
use crate::source::nats::NatsOptions;
use crate::source::zmq::ZmqOptions;
use crate::target::{self, NamespaceFilter, Target};

/// Telemetry bridge for NVIDIA Dynamo: hears every worker and hands what it says to Prometheus and OTLP.
#[derive(Debug, Clone, Parser)]
#[command(name = "metrics", version, about, long_about = None, max_term_width = 120)]
#[command(args_conflicts_with_subcommands = true, disable_help_subcommand = true)]
pub struct Config {
    #[command(subcommand)]
    asked: Option<Asked>,
    #[command(flatten)]
    pub(crate) watched: TargetOptions,
    #[command(flatten)]
    pub(crate) scrape: ScrapeOptions,
    #[command(flatten)]
    pub(crate) discovery: DiscoveryOptions,
    #[command(flatten)]
    pub(crate) events: EventOptions,
    #[command(flatten)]
    pub(crate) nats: NatsOptions,
    #[command(flatten)]
    pub(crate) etcd: EtcdOptions,
    #[command(flatten)]
    pub(crate) files: FileOptions,
    #[command(flatten)]
    pub(crate) kubernetes: KubernetesOptions,
    #[command(flatten)]
    pub(crate) zmq: ZmqOptions,
    #[command(flatten)]
    pub(crate) web: WebOptions,
    #[command(flatten)]
    pub(crate) otlp: OtlpOptions,
}

/// What a program that does not run the bridge does.
#[derive(Debug, Clone, Subcommand)]
enum Asked {
    /// Asks the bridge that runs on this machine whether it is ready: exit code 0, or 1 with the reasons
    Healthcheck(HealthcheckOptions),
}

/// What is watched.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Target")]
pub(crate) struct TargetOptions {
    /// Dynamo namespace, with the worker generations that the Kubernetes operator makes of it (NAME-1a2b3c4d,
    /// NAME-legacy). '*' watches all of them and adds the label dynamo_namespace
    #[arg(long, env = "DYN_NAMESPACE", default_value = "dynamo", value_name = "NAME")]
    pub namespace: NamespaceFilter,
    /// Component; left out: every one that reports
    #[arg(long, value_name = "NAME", value_parser = target::name)]
    pub component: Option<String>,
    /// Endpoint; left out: every one that reports
    #[arg(long, value_name = "NAME", value_parser = target::name)]
    pub endpoint: Option<String>,
}

/// How often workers are asked, and when they are forgotten.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Scrape")]
pub(crate) struct ScrapeOptions {
    /// Time between two scrapes of the workers: 2, 1s, 500ms
    #[arg(long, default_value = "1s", value_name = "DURATION", value_parser = duration)]
    pub poll_interval: Duration,
    /// How long a scrape may take [default: 80 % of the poll interval]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub scrape_timeout: Option<Duration>,
    /// A worker that has not answered for this long is gone [default: three poll intervals]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub worker_ttl: Option<Duration>,
    /// How long counts of placed requests outlive their worker, and events wait for theirs to be named
    #[arg(long, default_value = "5m", value_name = "DURATION", value_parser = duration)]
    pub event_ttl: Duration,
    /// A request of which its KV router said nothing for so long is no longer in flight
    #[arg(long, default_value = "10m", value_name = "DURATION", value_parser = duration)]
    pub request_ttl: Duration,
    /// Where no discovery beside NATS is configured: how long a load event alone keeps a worker
    #[arg(long, default_value = "5m", value_name = "DURATION", value_parser = duration)]
    pub idle_ttl: Duration,
    /// Workers reported at most; more are rejected and counted
    #[arg(long, default_value_t = 10_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_workers: u32,
    /// Count requests, errors and processing time of every watched endpoint that answers on NATS, whether it is a worker's
    /// or a helper's: three series each
    #[arg(long)]
    pub endpoint_stats: bool,
}

/// Where workers register, beside NATS.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Discovery")]
pub(crate) struct DiscoveryOptions {
    /// Where workers register; may be repeated. Left out: wherever an option or variable of it is set
    #[arg(long, env = "DYN_DISCOVERY_BACKEND", value_name = "BACKEND", value_delimiter = ',')]
    pub discovery: Vec<Backend>,
    /// What the backend kv_store of 0.7 - 0.9 is; named alone it is that backend [default: etcd]
    #[arg(long, env = "DYN_STORE_KV", value_name = "STORE")]
    pub store_kv: Option<Store>,
}

/// What is heard of workers, over whatever transport.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Events")]
pub(crate) struct EventOptions {
    /// Topics to listen to, with commas between; nothing connects for one that is left out
    #[arg(long, default_value = "kv_metrics,forward-pass-metrics,active_sequences_events", value_name = "TOPICS", value_delimiter = ',',
        value_parser = topic)]
    pub topics: Vec<Topic>,
    /// Show what each KV router of 0.8 - 1.4 believes of each worker: two series a router, worker and rank, until the
    /// router has said nothing for --request-ttl
    #[arg(long)]
    pub router_estimates: bool,
}

fn topic(name: &str) -> Result<Topic, String> {
    let known = || Topic::NUMBERED.map(Topic::as_str).join(", ");
    Topic::numbered(name).ok_or_else(|| format!("no topic of this name; there are {}", known()))
}

/// A place where workers register, by Dynamo's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Backend {
    Etcd,
    File,
    Kubernetes,
    // Another one, but Kubernetes, as --store-kv has it: the name that 0.7 - 0.9 have for all of them.
    #[value(name = "kv_store")]
    KvStore,
    // Inside one Dynamo process: nothing that another one could find.
    Mem,
}

/// A key-value store, by the names of Dynamo 0.7 - 0.9.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Store {
    Etcd,
    File,
    Mem,
}

impl DiscoveryOptions {
    /// The backends that are asked for, none of them by another's name; empty where none is.
    fn backends(&self) -> Vec<Backend> {
        let store = match self.store_kv {
            None | Some(Store::Etcd) => Backend::Etcd,
            Some(Store::File) => Backend::File,
            Some(Store::Mem) => Backend::Mem,
        };
        if self.discovery.is_empty() && self.store_kv.is_some() {
            return vec![store];
        }
        let named = |backend: &Backend| if *backend == Backend::KvStore { store } else { *backend };
        self.discovery.iter().map(named).collect()
    }
}

/// The voices that are listened to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each voice may be there without the others")]
pub(crate) struct Voices {
    pub nats: bool,
    pub etcd: bool,
    pub files: bool,
    pub kubernetes: bool,
}

/// The Prometheus endpoint.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Web")]
pub(crate) struct WebOptions {
    /// Address to listen on [default: every one of this machine, [::], or 0.0.0.0 where there is no IPv6]
    #[arg(long, value_name = "ADDRESS")]
    pub host: Option<IpAddr>,
    /// Port to listen on
    #[arg(long, alias = "metrics-port", default_value_t = 9091, value_name = "PORT")]
    pub port: u16,
}

/// Where to push, if anywhere.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "OTLP")]
pub(crate) struct OtlpOptions {
    /// Collector to push metrics and traces to, such as http://localhost:4317. The other standard
    /// OTEL_EXPORTER_OTLP_* variables are read too
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<Secret>,
    /// Protocol: grpc, http/protobuf [default: http/protobuf where the endpoint's port is 4318, else grpc]
    #[arg(long, env = "OTEL_EXPORTER_OTLP_PROTOCOL", value_name = "PROTOCOL")]
    pub otlp_protocol: Option<String>,
}

/// Transport of OTLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OtlpProtocol {
    Grpc,
    HttpProtobuf,
}

impl OtlpOptions {
    pub(crate) const ENDPOINT: &str = "--otlp-endpoint [OTEL_EXPORTER_OTLP_ENDPOINT]";

    /// Left to the bridge, since clap would repeat the value of a variable and not name it.
    fn check(&self) -> Result<(), String> {
        match (&self.otlp_protocol, self.protocol()) {
            (Some(_), None) => {
                Err(format!("--otlp-protocol [OTEL_EXPORTER_OTLP_PROTOCOL] must be {}", OtlpProtocol::EXPECTED))
            }
            _ => Ok(()),
        }
    }

    /// The protocol that was asked for.
    pub(crate) fn protocol(&self) -> Option<OtlpProtocol> {
        self.otlp_protocol.as_deref().and_then(OtlpProtocol::named)
    }
}

impl OtlpProtocol {
    /// The names that there are.
    pub(crate) const EXPECTED: &str = "grpc or http/protobuf";

    pub(crate) fn named(name: &str) -> Option<Self> {
        match name {
            "grpc" => Some(Self::Grpc),
            "http/protobuf" => Some(Self::HttpProtobuf),
            _ => None,
        }
    }
}

/// A value that is never printed.
#[derive(Clone)]
pub(crate) struct Secret(pub String);

impl From<&str> for Secret {
    fn from(value: &str) -> Self {
        Self(value.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[hidden]")
    }
}

impl Config {
    /// Reads command line and environment; an empty variable counts as unset.
    ///
    /// # Errors
    /// What clap reports for a malformed or contradictory option: its exit code is 2, or 0 for `--help` and `--version`.
    pub fn from_args(args: impl IntoIterator<Item = String>) -> Result<Self, clap::Error> {
        let mut command = with_environment(Self::command().mut_arg("namespace", as_frontends_name_it));
        let config: Self = parsed(&mut command, args)?;
        config.check().map_err(|message| command.error(ErrorKind::ValueValidation, message))?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let interval = self.scrape.poll_interval;
        if self.scrape_timeout() > interval {
            return Err(
                "--scrape-timeout is longer than --poll-interval: one scrape would run into the next".to_owned()
            );
        }
        if self.rules().worker_ttl < interval {
            return Err("--worker-ttl is shorter than --poll-interval: every worker would vanish between two scrapes"
                .to_owned());
        }
        if self.events.router_estimates && !self.events.topics.contains(&Topic::KvMetrics) {
            return Err("--router-estimates needs the topic kv_metrics, which --topics leaves out".to_owned());
        }
        self.voices()?;
        self.otlp.check()?;
        self.nats.check()?;
        self.etcd.check()
    }

    /// The voices to listen to: those that were asked for, else those that something is configured for; NATS where it is
    /// configured or a plane of Dynamo's, or nothing else is.
    pub(crate) fn voices(&self) -> Result<Voices, String> {
        let asked = self.discovery.backends();
        if asked.contains(&Backend::Mem) {
            let (mem, others) = if self.discovery.discovery.contains(&Backend::Mem) {
                ("--discovery mem [DYN_DISCOVERY_BACKEND]", "etcd, file or kubernetes")
            } else {
                ("--store-kv mem [DYN_STORE_KV]", "etcd or file")
            };
            let reason = "lives inside one Dynamo process, and nobody else can find anything there";
            return Err(format!("{mem} {reason}; use {others}"));
        }
        let wanted = |backend, configured: bool| asked.contains(&backend) || (asked.is_empty() && configured);
        let etcd = wanted(Backend::Etcd, self.etcd.is_given());
        let files = wanted(Backend::File, self.files.is_given());
        let kubernetes = wanted(Backend::Kubernetes, self.kubernetes.is_given());
        let nats = self.nats.is_given() || nats_is_a_plane() || !(etcd || files || kubernetes);
        Ok(Voices { nats, etcd, files, kubernetes })
    }

    /// Whether there is no point in going on without Kubernetes: it was asked for, or nothing else is listened to.
    pub(crate) fn needs_kubernetes(&self) -> bool {
        let others = self.voices().is_ok_and(|voices| voices.nats || voices.etcd || voices.files);
        self.discovery.discovery.contains(&Backend::Kubernetes) || !others
    }

    /// The question to ask a running bridge, where that is all that is wanted.
    #[must_use]
    pub fn healthcheck(&self) -> Option<&HealthcheckOptions> {
        self.asked.as_ref().map(|Asked::Healthcheck(options)| options)
    }

    /// Address and port to listen on; without an address every one of this machine.
    #[must_use]
    pub fn listen_address(&self) -> (Option<IpAddr>, u16) {
        (self.web.host, self.web.port)
    }

    pub(crate) fn scrape_timeout(&self) -> Duration {
        self.scrape.scrape_timeout.unwrap_or(self.scrape.poll_interval.mul_f64(0.8))
    }

    /// Whether there is anything to hear over ZMQ: publishers that discovery may name, or a broker.
    pub(crate) fn hears_zmq(&self) -> bool {
        !self.voices().unwrap_or_default().registries().is_empty() || self.zmq.zmq_broker.is_some()
    }

    pub(crate) fn rules(&self) -> Rules {
        Rules {
            target: Target {
                namespace: self.watched.namespace.clone(),
                component: self.watched.component.clone(),
                endpoint: self.watched.endpoint.clone(),
            },
            worker_ttl: self.scrape.worker_ttl.unwrap_or(self.scrape.poll_interval * 3),
            event_ttl: self.scrape.event_ttl,
            request_ttl: self.scrape.request_ttl,
            registries: self.voices().unwrap_or_default().registries(),
            zmq: self.hears_zmq(),
            idle_ttl: self.scrape.idle_ttl,
            router_estimates: self.events.router_estimates,
            max_workers: self.scrape.max_workers as usize,
        }
    }
}

impl Voices {
    /// The places among them where workers register.
    pub(crate) fn registries(self) -> BTreeSet<Source> {
        let registries =
            [(Source::Etcd, self.etcd), (Source::Files, self.files), (Source::Kubernetes, self.kubernetes)];
        registries.into_iter().filter_map(|(source, wanted)| wanted.then_some(source)).collect()
    }
}

/// Whether Dynamo itself would look for NATS at its default address, since requests or events are to go there.
fn nats_is_a_plane() -> bool {
    ["DYN_REQUEST_PLANE", "DYN_EVENT_PLANE"]
        .into_iter()
        .any(|plane| std::env::var(plane).is_ok_and(|name| name.eq_ignore_ascii_case("nats")))
}

/// A frontend is told by another variable which namespace it serves, with the generations that the operator makes of it.
fn as_frontends_name_it(namespace: clap::Arg) -> clap::Arg {
    const PREFIX: &str = "DYN_NAMESPACE_PREFIX";
    let is_set = |name: &OsStr| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    if !namespace.get_env().is_some_and(is_set) && is_set(PREFIX.as_ref()) { namespace.env(PREFIX) } else { namespace }
}

/// Takes away the variables that are set to nothing, as the OpenTelemetry specification asks for its own, and as a
/// Compose file or a Helm chart leaves them. The help shows names and no values, which may be secret.
pub(crate) fn with_environment(command: clap::Command) -> clap::Command {
    let is_empty = |name: &OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
    command.mut_args(|arg| {
        if arg.get_env().is_some_and(is_empty) { arg.env(None::<&str>) } else { arg.hide_env_values(true) }
    })
}

/// What command line and environment say. A refusal of a value names the variable too that it may come from.
///
/// # Errors
/// What clap reports.
pub(crate) fn parsed<T: FromArgMatches>(
    command: &mut clap::Command,
    args: impl IntoIterator<Item = String>,
) -> Result<T, clap::Error> {
    command.try_get_matches_from_mut(args).and_then(|matches| T::from_arg_matches(&matches)).map_err(|mut error| {
        let is_of_value = matches!(error.kind(), ErrorKind::InvalidValue | ErrorKind::ValueValidation);
        let option = match error.get(ContextKind::InvalidArg) {
            Some(ContextValue::String(shown)) if is_of_value => {
                command.get_arguments().find(|option| option.to_string() == *shown)
            }
            _ => None,
        };
        if let Some((option, variable)) = option.and_then(|option| Some((option, option.get_env()?))) {
            let named = format!("{option} [{}]", variable.display());
            error.insert(ContextKind::InvalidArg, ContextValue::String(named));
        }
        error
    })
}

/// Refuses one of two options without the other. Each comes with whether it is given.
///
/// # Errors
/// One line that names both.
pub(crate) fn belong_together(one: (bool, &str), other: (bool, &str)) -> Result<(), String> {
    let [given, missing] = match (one.0, other.0) {
        (true, false) => [one.1, other.1],
        (false, true) => [other.1, one.1],
        _ => return Ok(()),
    };
    Err(format!("{given} needs {missing}"))
}

/// Whether the authority of a URL, without a user, is a host, with a port or without. The parser takes any text for a port,
/// and clients ask the default one then.
pub(crate) fn names_a_server(authority: &Authority) -> bool {
    let port = authority.as_str().strip_prefix(authority.host());
    !authority.host().is_empty() && port.is_some_and(|port| matches!(port, "" | ":") || authority.port_u16().is_some())
}

/// Reads `2`, `0.5` (seconds), `500ms`, `1m 30s`.
///
/// # Errors
/// Anything else, and zero.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let hint = || format!("{text:?} is no duration; write it like 2, 1s, 500ms or 5m");
    let parsed = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).map_err(|_| hint())?,
        Err(_) => humantime::parse_duration(text).map_err(|_| hint())?,
    };
    match parsed {
        Duration::ZERO => Err("must be longer than zero".to_owned()),
        parsed if parsed > LONGEST => Err("must be at most 24h".to_owned()),
        parsed => Ok(parsed),
    }
}

/// No interval or time to live of a monitoring tool is longer, and sums with it cannot overflow a clock.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Config, clap::Error> {
        Config::from_args(["metrics"].into_iter().chain(args.iter().copied()).map(str::to_owned))
    }

    fn refusal(args: &[&str]) -> String {
        let error = parse(args).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{args:?}");
        error.to_string()
    }

    #[test]
    fn the_command_is_consistent() {
        Config::command().debug_assert();
    }

    #[test]
    fn durations_are_seconds_or_carry_their_unit() {
        assert_eq!(duration("2"), Ok(Duration::from_secs(2)));
        assert_eq!(duration("0.5"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("1s"), Ok(Duration::from_secs(1)));
        assert_eq!(duration("1m 30s"), Ok(Duration::from_secs(90)));
        for bad in ["", "0", "0s", "-1", "soon", "nan", "inf", "1e300", "25h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn timeout_and_ttl_follow_the_interval() {
        let config = parse(&["--poll-interval", "2"]).unwrap();
        assert_eq!(config.scrape_timeout(), Duration::from_millis(1600));
        assert_eq!(config.rules().worker_ttl, Duration::from_secs(6));
    }

    #[test]
    fn every_time_to_live_and_limit_has_an_option_of_its_own() {
        let given = ["--scrape-timeout=0.5", "--worker-ttl=11", "--event-ttl=12", "--request-ttl=13", "--idle-ttl=14"];
        let config = parse(&[&given[..], &["--max-workers=15", "--router-estimates"]].concat()).unwrap();
        let rules = config.rules();
        assert_eq!(config.scrape_timeout(), Duration::from_millis(500));
        let ttls = [rules.worker_ttl, rules.event_ttl, rules.request_ttl, rules.idle_ttl];
        assert_eq!(ttls, [11, 12, 13, 14].map(Duration::from_secs));
        assert_eq!((rules.max_workers, rules.router_estimates), (15, true));
    }

    #[test]
    fn contradictions_are_refused_with_a_hint() {
        assert!(refusal(&["--poll-interval", "1", "--scrape-timeout", "2"]).contains("--scrape-timeout is longer"));
        assert!(refusal(&["--poll-interval", "5", "--worker-ttl", "1"]).contains("--worker-ttl is shorter"));
        assert!(refusal(&["--router-estimates", "--topics", "forward-pass-metrics"]).contains("--topics leaves out"));
        assert!(refusal(&["--nats-username", "u"]).contains("NATS_AUTH_PASSWORD"));
        assert!(refusal(&["--nats-client-key", "k"]).contains("needs --nats-client-cert [NATS_TLS_CLIENT_CERT_PATH]"));
        assert!(refusal(&["--component", ""]).contains("the name is empty"));
        assert!(refusal(&["--discovery", "mem"]).contains("--discovery mem [DYN_DISCOVERY_BACKEND] lives inside one"));
        assert!(refusal(&["--store-kv", "mem"]).contains("--store-kv mem [DYN_STORE_KV] lives inside one"));
        assert!(refusal(&["--discovery", "kv_store", "--store-kv", "mem"]).contains("[DYN_STORE_KV]"));
        assert!(refusal(&["--store-kv", "nats"]).contains("[possible values: etcd, file, mem]"));
        assert!(refusal(&["--discovery", "consul"]).contains("kv_store"));
        let timeout = refusal(&["--nats-connect-timeout", "soon"]);
        assert!(timeout.contains("[NATS_STARTUP_CONNECT_TIMEOUT_SECONDS]"), "{timeout}");
        assert!(refusal(&["--discovery", "consul"]).contains("[DYN_DISCOVERY_BACKEND]"));
        assert!(refusal(&["--namespace", "a b"]).contains("white space"));
        let refused = refusal(&["--nats-server", "nats://user:geheim@:x:y"]);
        assert!(refused.contains("nats://host:4222") && !refused.contains("geheim"), "{refused}");
        assert!(refusal(&["--otlp-protocol", "carrier-pigeon"]).contains("http/protobuf"));
        assert!(refusal(&["--max-workers", "0"]).contains("--max-workers"));
    }

    #[test]
    fn what_is_configured_is_listened_to_and_nats_on_localhost_only_where_nothing_is() {
        let heard = |args: &[&str]| {
            let voices = parse(args).unwrap().voices().unwrap();
            [voices.nats, voices.etcd, voices.files, voices.kubernetes]
        };
        assert_eq!(heard(&[]), [true, false, false, false]);
        assert_eq!(heard(&["--etcd-endpoints", "http://h:1"]), [false, true, false, false]);
        assert_eq!(heard(&["--etcd-endpoints", "http://h:1", "--nats-server", "h"]), [true, true, false, false]);
        assert_eq!(heard(&["--discovery", "file", "--discovery", "etcd"]), [false, true, true, false]);
        assert_eq!(heard(&["--discovery", "kubernetes"]), [false, false, false, true]);
        assert_eq!(heard(&["--discovery", "kv_store"]), [false, true, false, false]);
        assert_eq!(heard(&["--discovery", "kv_store", "--store-kv", "file"]), [false, false, true, false]);
        assert_eq!(heard(&["--store-kv", "file"]), [false, false, true, false]);
        assert_eq!(heard(&["--discovery", "kubernetes", "--store-kv", "mem"]), [false, false, false, true]);
        assert_eq!(heard(&["--discovery", "file", "--etcd-endpoints", "http://h:1"]), [false, false, true, false]);
    }

    #[test]
    fn the_old_name_of_the_port_still_works() {
        assert_eq!(parse(&["--metrics-port", "1234"]).unwrap().listen_address().1, 1234);
    }

    #[test]
    fn no_secret_is_printed() {
        let config = parse(&[
            "--nats-server",
            "nats://user:geheim@localhost:4222,tls://other",
            "--nats-username",
            "user",
            "--nats-password",
            "geheim",
            "--nats-token",
            "geheim",
            "--nats-nkey",
            "geheim",
        ])
        .unwrap();
        assert!(!format!("{config:?}").contains("geheim"));
    }
}
