use super::*;

fn target(component: Option<&str>, endpoint: Option<&str>) -> Target {
    Target {
        namespace: "dynamo".parse().unwrap(),
        component: component.map(str::to_owned),
        endpoint: endpoint.map(str::to_owned),
    }
}

fn observed(endpoints: &str, target: &Target) -> Vec<Observation> {
    let json = format!(r#"{{"name":"dynamo_backend","id":"i","endpoints":[{endpoints}]}}"#);
    let place = Place { namespace: "dynamo".to_owned(), component: "backend".to_owned() };
    observations(&wire::decode_stats(json.as_bytes()).unwrap(), &place, target)
}

/// The endpoints reported, with the active blocks of each.
fn reported(endpoints: &str, target: &Target) -> Vec<(String, Option<u64>)> {
    let answers = observed(endpoints, target).into_iter().filter_map(|observation| match observation {
        Observation::Answered(answer) => {
            Some((answer.key.endpoint.to_string(), answer.report.and_then(|report| report.load.active_blocks)))
        }
        _ => None,
    });
    answers.collect()
}

/// Whether the only worker of the reply is said to be one that is not watched.
fn is_said_elsewhere(endpoints: &str, target: &Target) -> bool {
    let elsewhere = Observation::Elsewhere { namespace: "dynamo".into(), worker: WorkerId(31) };
    observed(endpoints, target) == [elsewhere]
}

fn endpoint(name: &str, data: &str) -> String {
    format!(r#"{{"subject":"dynamo_backend.{name}-1f","data":{data}}}"#)
}

fn row(endpoint: &str, active_blocks: Option<u64>) -> (String, Option<u64>) {
    (endpoint.to_owned(), active_blocks)
}

const LOAD: &str = r#"{"kv_active_blocks":5}"#;

#[test]
fn load_on_load_metrics_is_the_served_endpoints() {
    let reply =
        [endpoint("clear_kv_blocks", "null"), endpoint("load_metrics", LOAD), endpoint("generate", "null")].join(",");
    assert_eq!(reported(&reply, &target(None, Some("generate"))), [row("generate", Some(5))]);
    assert_eq!(
        reported(&reply, &target(None, None)),
        [row("clear_kv_blocks", None), row("generate", Some(5))],
        "generate takes it, and load_metrics is none of its own beside a sibling"
    );
}

#[test]
fn load_metrics_is_shown_under_its_own_name_where_it_is_alone_or_asked_for() {
    let alone = endpoint("load_metrics", LOAD);
    assert_eq!(reported(&alone, &target(None, None)), [row("load_metrics", Some(5))]);
    let beside = [alone, endpoint("generate", "null")].join(",");
    assert_eq!(reported(&beside, &target(None, Some("load_metrics"))), [row("load_metrics", Some(5))]);
}

#[test]
fn an_endpoint_of_another_name_takes_the_load_where_there_is_no_generate() {
    let reply = [endpoint("load_metrics", LOAD), endpoint("embed", "null")].join(",");
    assert_eq!(reported(&reply, &target(None, None)), [row("embed", Some(5))]);
}

#[test]
fn an_endpoint_is_matched_whole_and_its_own_data_wins() {
    let reply =
        [endpoint("gen", LOAD), endpoint("generate", r#"{"kv_active_blocks":6}"#), endpoint("load_metrics", LOAD)];
    assert_eq!(reported(&reply.join(","), &target(None, Some("generate"))), [row("generate", Some(6))]);
}

#[test]
fn a_worker_of_another_component_or_endpoint_is_said_to_be_elsewhere() {
    let reply = [endpoint("load_metrics", LOAD), endpoint("generate", "null")].join(",");
    assert!(is_said_elsewhere(&reply, &target(Some("prefill"), Some("generate"))));
    assert!(is_said_elsewhere(&reply, &target(Some("backend"), Some("embed"))));
    assert!(!is_said_elsewhere(&reply, &target(Some("backend"), None)));
    let alone = endpoint("load_metrics", "null");
    assert_eq!(
        observed(&alone, &target(Some("backend"), Some("generate"))),
        [],
        "it may serve the target all the same"
    );
    assert!(is_said_elsewhere(&alone, &target(Some("prefill"), Some("generate"))));
}

#[test]
fn every_watched_endpoint_tells_what_it_counts() {
    let told = |target: &Target| {
        let endpoints =
            [endpoint("load_metrics", LOAD), endpoint("generate", "null"), endpoint("bad", "null")].join(",");
        let endpoints = endpoints.replace("bad-1f\"", "bad-1f\",\"num_requests\":\"many\"");
        let json = format!(r#"{{"name":"dynamo_backend","id":"i","endpoints":[{endpoints}]}}"#);
        let place = Place { namespace: "dynamo".to_owned(), component: "backend".to_owned() };
        let observations = counted(&wire::decode_stats(json.as_bytes()).unwrap(), &place, target).into_iter();
        let name = |observation| match observation {
            Observation::Served { key, .. } => key.endpoint.to_string(),
            Observation::Rejected(rejection) => rejection.reason.as_str().to_owned(),
            other => panic!("{other:?}"),
        };
        observations.map(name).collect::<Vec<_>>()
    };
    assert_eq!(told(&target(None, None)), ["load_metrics", "generate", "wrong_shape"]);
    assert_eq!(told(&target(Some("backend"), Some("generate"))), ["generate"]);
    assert_eq!(told(&target(Some("prefill"), None)), Vec::<String>::new());
}

#[test]
fn one_bad_endpoint_costs_itself_alone() {
    let reply = [
        r#"{"subject":"dynamo_backend.generate-zz","data":null}"#.to_owned(),
        r#"{"subject":"dynamo_backend.generate","data":null}"#.to_owned(),
        endpoint("broken", r#"{"kv_active_blocks":-5}"#),
        endpoint("generate", LOAD),
    ]
    .join(",");
    let target = target(None, None);
    assert_eq!(reported(&reply, &target), [row("broken", None), row("generate", Some(5))]);
    let reasons: Vec<_> = observed(&reply, &target)
        .into_iter()
        .filter_map(|observation| match observation {
            Observation::Rejected(rejection) => Some(rejection.reason),
            _ => None,
        })
        .collect();
    assert_eq!(reasons, [Reason::BadSubject, Reason::BadSubject, Reason::OutOfRange]);
}

#[test]
fn a_scrape_ends_once_everyone_of_the_last_one_has_answered_and_it_is_quiet() {
    let timeout = Duration::from_secs(1);
    let mut round = Round::new();
    let expected: HashSet<Arc<str>> = [Arc::from("a"), Arc::from("b")].into();
    round.answered.insert("a".into());
    assert_eq!(round.end(&expected, timeout), (round.started + timeout, ScrapeOutcome::TimedOut));
    round.answered.insert("b".into());
    assert_eq!(round.end(&expected, timeout), (round.last_reply + QUIET, ScrapeOutcome::Complete));
    assert_eq!(round.end(&HashSet::new(), timeout).1, ScrapeOutcome::TimedOut, "the first one waits for whoever comes");
}

#[test]
fn an_instance_is_remembered_as_long_as_it_replies() {
    let mut directory = Directory::new(1);
    assert!(matches!(directory.find("a", 1), Found::Unknown));
    directory.write("a".into(), None, 1);
    assert!(matches!(directory.find("a", 50), Found::Elsewhere));
    assert!(matches!(directory.find("b", 50), Found::Full));
    directory.forget(50 + DIRECTORY_MEMORY);
    assert!(matches!(directory.find("a", 50 + DIRECTORY_MEMORY), Found::Elsewhere));
    directory.forget(51 + 2 * DIRECTORY_MEMORY);
    assert!(matches!(directory.find("a", 200), Found::Unknown));
}

#[test]
fn a_reply_says_which_request_it_answers() {
    for asked in [Asked::Stats { number: 7 }, Asked::Info] {
        assert_eq!(Asked::parse(&asked.token()), Some(asked));
    }
    assert_eq!(Asked::parse("else"), None);
}
