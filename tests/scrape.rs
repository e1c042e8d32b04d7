//! What a scrape finds, and how it loses it again.

use futures_util::StreamExt;
use tokio::sync::Mutex;

use crate::support::{Bridge, Exposition, FakeService, Nats, endpoint, eventually, mock_worker, reply, worker};

const LOAD: &str =
    r#"{"request_active_slots":58,"request_total_slots":100,"kv_active_blocks":77,"kv_total_blocks":100}"#;

#[tokio::test]
async fn mock_workers_are_found_reported_and_forgotten() {
    let nats = Nats::start().await;
    let mut bridge = Bridge::start(nats.url(), &[]).await;
    bridge.program.says("No endpoints found matching subject dynamo_backend.generate").await;
    bridge.shows("llm_workers", &[("state", "reporting")], 0.0).await;

    let fixed = ["--kv-active", "77", "--active-slots", "58", "--waiting", "3", "--hit-rate", "0.25", "--workers", "3"];
    let mut mock = mock_worker(nats.url(), &[&fixed[..], &["--seed", "1"]].concat()).await;
    let metrics = bridge.shows("llm_workers", &[("state", "reporting")], 3.0).await;
    bridge.program.says("Endpoints found matching subject dynamo_backend.generate").await;
    bridge.program.says("Aggregated metrics: ProcessedEndpoints { endpoints: [Endpoint { name: \"worker-").await;
    for (name, value) in [
        ("llm_kv_blocks_active", 77.0),
        ("llm_kv_blocks_total", 100.0),
        ("llm_requests_active_slots", 58.0),
        ("llm_requests_total_slots", 100.0),
        ("llm_requests_waiting", 3.0),
        ("llm_kv_cache_usage_ratio", 0.77),
        ("llm_kv_hit_rate_percent", 0.25),
    ] {
        assert_eq!(metrics.values(name, &[]), [value; 3], "{name}");
    }
    assert_eq!(metrics.value("llm_load_avg", &[]), Some(77.0));
    assert_eq!(metrics.value("llm_load_std", &[]), Some(0.0));
    assert!(!metrics.text.contains("otel_scope"));

    assert!(mock.interrupt().await.success());
    let metrics = bridge.shows("llm_workers", &[("state", "reporting")], 0.0).await;
    for gone in ["llm_kv_blocks_active", "llm_requests_active_slots", "llm_load_avg", "llm_load_std"] {
        assert!(metrics.values(gone, &[]).is_empty(), "{gone}");
    }
    assert!(bridge.program.interrupt().await.success());
}

#[tokio::test]
async fn every_form_of_service_name_is_found_at_once() {
    let nats = Nats::start().await;
    let mut mocks = Vec::new();
    for (release, active) in [("0.0", "1"), ("0.1", "2"), ("0.3", "3")] {
        mocks.push(mock_worker(nats.url(), &["--release", release, "--kv-active", active]).await);
    }
    let bridge = Bridge::start(nats.url(), &[]).await;
    let metrics = bridge.shows("llm_workers", &[("state", "reporting")], 3.0).await;
    let mut active = metrics.values("llm_kv_blocks_active", &[("endpoint", "generate")]);
    active.sort_by(f64::total_cmp);
    assert_eq!(active, [1.0, 2.0, 3.0]);
}

#[tokio::test]
async fn left_out_parts_of_the_target_show_everything_that_reports_under_its_own_name() {
    let nats = Nats::start().await;
    let _backend = mock_worker(nats.url(), &["--kv-active", "1"]).await;
    let _prefill =
        mock_worker(nats.url(), &["--component", "backend_prefill", "--endpoint", "embed", "--kv-active", "2"]).await;
    let _other =
        mock_worker(nats.url(), &["--namespace", "dynamo_backend", "--component", "prefill", "--kv-active", "3"]).await;
    let _generation = mock_worker(nats.url(), &["--namespace", "dynamo-1a2b3c4d", "--kv-active", "4"]).await;

    let bridge = Bridge::watching(nats.url(), &["--namespace", "dynamo"], &[]).await;
    let metrics = bridge
        .eventually("three workers", |metrics| {
            (metrics.values("llm_kv_blocks_active", &[]).len() == 3).then(|| metrics.clone())
        })
        .await;
    assert_eq!(metrics.label_values("endpoint"), ["embed", "generate"], "load_metrics is none");
    assert_eq!(
        metrics.value("llm_kv_blocks_active", &[("component", "backend_prefill"), ("endpoint", "embed")]),
        Some(2.0)
    );
    let mut backend = metrics.values("llm_kv_blocks_active", &[("component", "backend")]);
    backend.sort_by(f64::total_cmp);
    assert_eq!(backend, [1.0, 4.0], "the generation of the namespace belongs to it");
    assert!(metrics.values("llm_kv_blocks_active", &[("dynamo_namespace", "dynamo")]).is_empty());

    let all = Bridge::watching(nats.url(), &["--namespace", "*"], &[]).await;
    let metrics = all
        .eventually("four workers", |metrics| {
            (metrics.values("llm_kv_blocks_active", &[]).len() == 4).then(|| metrics.clone())
        })
        .await;
    let prefill = [("component", "prefill"), ("dynamo_namespace", "dynamo_backend"), ("endpoint", "generate")];
    assert_eq!(metrics.value("llm_kv_blocks_active", &prefill), Some(3.0));
    assert_eq!(metrics.label_values("dynamo_namespace"), ["dynamo", "dynamo-1a2b3c4d", "dynamo_backend"]);
}

#[tokio::test]
async fn a_worker_without_load_is_silent_where_it_was_asked_for() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let service = FakeService::start(&client, "one", &[endpoint("dynamo_backend.generate-1f", "null")]).await;
    let bridge = Bridge::start(nats.url(), &[]).await;
    bridge.shows("llm_workers", &[("state", "silent")], 1.0).await;

    service.say(&[reply("dynamo_backend", "one", &[endpoint("dynamo_backend.generate-1f", LOAD)])]);
    let metrics = bridge.shows("llm_workers", &[("state", "reporting")], 1.0).await;
    assert_eq!(metrics.value("llm_workers", &[("state", "silent")]), Some(0.0));
    assert_eq!(metrics.value("llm_kv_blocks_active", &worker("31")), Some(77.0));
    assert_eq!(metrics.value("llm_requests_waiting", &worker("31")), None, "what it does not say has no series");
}

#[tokio::test]
async fn a_service_that_does_not_describe_itself_is_known_by_its_name() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let stats = reply("dynamo_backend_9ce3f3b7", "one", &[endpoint("dynamo_backend_9ce3f3b7.generate-1f", LOAD)]);
    let _service = FakeService::saying(&client, "dynamo_backend_9ce3f3b7", "one", None, &[stats]).await;
    let bridge = Bridge::start(nats.url(), &[]).await;
    bridge.shows("llm_kv_blocks_active", &worker("31"), 77.0).await;
}

#[tokio::test]
async fn a_service_that_nothing_says_the_component_of_is_counted_and_said_once() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let stats = reply("dynamo_backend", "mute", &[endpoint("dynamo_backend.generate-1f", LOAD)]);
    let _mute = FakeService::saying(&client, "dynamo_backend", "mute", None, &[stats]).await;
    let _good = FakeService::start(&client, "good", &[endpoint("dynamo_backend.generate-20", LOAD)]).await;
    let mut bridge = Bridge::watching(nats.url(), &[], &[]).await;
    let labels = [("source", "nats"), ("topic", "stats"), ("reason", "no_info")];
    let counted = |metrics: &Exposition| {
        metrics.value("dynamo_bridge_messages_rejected_total", &labels).filter(|count| *count >= 3.0)
    };
    bridge.eventually("it is counted", counted).await;
    let metrics = bridge.shows("llm_kv_blocks_active", &worker("32"), 77.0).await;
    assert_eq!(metrics.values("llm_kv_blocks_active", &[]).len(), 1);
    bridge.program.says("Rejected (stats no_info): service dynamo_backend instance mute: it does not answer").await;
    let said = bridge.program.lines().iter().filter(|line| line.contains("no_info")).count();
    assert_eq!(said, 1, "{:?}", bridge.program.lines());
}

#[tokio::test]
async fn speculative_decoding_counts_from_the_first_sight_of_a_worker() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let stats = |drafts: u64, accepted: u64| {
        let spec = format!(
            r#"{{"num_spec_tokens":4,"num_drafts":{drafts},"num_draft_tokens":null,"num_accepted_tokens":{accepted},"num_accepted_tokens_per_pos":[{accepted},0]}}"#
        );
        let load = format!(r#"{{"worker_stats":{{}},"kv_stats":{{}},"spec_decode_stats":{spec}}}"#);
        [reply("dynamo_backend", "one", &[endpoint("dynamo_backend.generate-1f", &load)])]
    };
    let service = FakeService::start(&client, "one", &[]).await;
    service.say(&stats(1000, 500));
    let bridge = Bridge::start(nats.url(), &[]).await;
    let metrics = bridge.shows("llm_spec_decode_drafts_total", &worker("31"), 0.0).await;
    assert_eq!(metrics.value("llm_spec_decode_draft_length_tokens", &worker("31")), Some(4.0));
    assert_eq!(metrics.value("llm_spec_decode_draft_tokens_total", &worker("31")), None);

    service.say(&stats(1010, 507));
    bridge.shows("llm_spec_decode_drafts_total", &worker("31"), 10.0).await;
    service.say(&stats(3, 1));
    let metrics = bridge.shows("llm_spec_decode_drafts_total", &worker("31"), 13.0).await;
    assert_eq!(metrics.value("llm_spec_decode_accepted_tokens_total", &worker("31")), Some(8.0));
    let position =
        |position| metrics.value("llm_spec_decode_accepted_tokens_per_position_total", &[("position", position)]);
    assert_eq!((position("0"), position("1")), (Some(8.0), Some(0.0)));
}

#[tokio::test]
async fn endpoints_are_counted_from_their_first_sight_where_that_is_wanted() {
    const NAMES: [&str; 3] =
        ["llm_endpoint_requests_total", "llm_endpoint_errors_total", "llm_endpoint_processing_seconds_total"];
    let nats = Nats::start().await;
    let client = nats.client().await;
    let service = FakeService::start(&client, "one", &[]).await;
    let say = |requests: u64, errors: u64, nanoseconds: u64| {
        let counts = format!(
            r#""num_requests":{requests},"num_errors":{errors},"processing_time":{nanoseconds},"average_processing_time":1"#
        );
        let idle = r#""num_requests":0,"num_errors":0"#;
        let [generate, helper] = ["generate", "clear_kv_blocks"]
            .map(|name| endpoint(&format!("dynamo_backend.{name}-1f"), "null").replace(idle, &counts));
        service.say(&[reply("dynamo_backend", "one", &[generate, helper])]);
    };
    say(1000, 10, 5_000_000_000);
    let bridges = [
        Bridge::start(nats.url(), &["--endpoint-stats"]).await,
        Bridge::watching(nats.url(), &["--endpoint-stats"], &[]).await,
        Bridge::start(nats.url(), &[]).await,
    ];
    let of_worker = |metrics: &Exposition| NAMES.map(|name| metrics.value(name, &worker("31")));
    let shows = async |expected: [f64; 3]| {
        for bridge in &bridges[..2] {
            let what = format!("{expected:?}");
            bridge.eventually(&what, |metrics| (of_worker(metrics) == expected.map(Some)).then_some(())).await;
        }
    };
    shows([0.0; 3]).await;
    say(1007, 11, 6_500_000_000);
    shows([7.0, 1.0, 1.5]).await;
    say(2, 0, 250_000_000);
    shows([9.0, 1.0, 1.75]).await;
    let [named, open, unasked] = [bridges[0].metrics().await, bridges[1].metrics().await, bridges[2].metrics().await];
    assert_eq!(NAMES.map(|name| named.values(name, &[]).len()), [1; 3], "the endpoint that was named");
    assert_eq!(NAMES.map(|name| open.values(name, &[("endpoint", "clear_kv_blocks")]).len()), [1; 3], "and every one");
    assert_eq!(NAMES.map(|name| unasked.values(name, &[]).len()), [0; 3]);
    drop(service);
    for bridge in &bridges[..2] {
        bridge.loses(NAMES[0], &[]).await;
    }
}

#[tokio::test]
async fn a_scrape_ends_at_its_timeout_where_more_answers_might_come() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let stats = reply("dynamo_other", "one", &[endpoint("dynamo_other.generate-1f", LOAD)]);
    let other = Some("Dynamo component other in namespace dynamo");
    let _other = FakeService::saying(&client, "dynamo_other", "one", other, &[stats]).await;
    let options = ["--poll-interval", "1h", "--worker-ttl", "3h", "--scrape-timeout", "200ms"];
    let bridge = Bridge::start(nats.url(), &options).await;
    let metrics = bridge.shows("dynamo_bridge_scrape_success", &[], 1.0).await;
    assert_eq!(metrics.value("dynamo_bridge_replies_total", &[]), Some(1.0));
}

#[tokio::test]
async fn a_reply_counts_though_its_scrape_has_ended() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let asked = Mutex::new(client.subscribe("$SRV.STATS").await.unwrap());
    let request = async || asked.lock().await.next().await.unwrap();
    // Tells where it belongs, and leaves its statistics to the test.
    let described = Some("Dynamo component backend in namespace dynamo");
    let _service = FakeService::saying(&client, "dynamo_backend", "one", described, &[]).await;
    let bridge = Bridge::start(nats.url(), &["--worker-ttl", "1h"]).await;
    let say = async |request: &async_nats::Message, blocks: u32| {
        let load = format!(r#"{{"kv_active_blocks":{blocks}}}"#);
        let stats = reply("dynamo_backend", "one", &[endpoint("dynamo_backend.generate-1f", &load)]);
        client.publish(request.reply.clone().unwrap(), stats.into()).await.unwrap();
    };
    eventually("its first reply", || async {
        say(&request().await, 1).await;
        let metrics = bridge.metrics().await;
        metrics.value("llm_kv_blocks_active", &worker("31")).ok_or(metrics.text)
    })
    .await;
    let late = request().await;
    // The next scrape begins once the one before has ended.
    request().await;
    say(&late, 2).await;
    bridge.shows("llm_kv_blocks_active", &worker("31"), 2.0).await;
}

#[tokio::test]
async fn ranks_other_than_zero_carry_a_label() {
    let nats = Nats::start().await;
    let _first = mock_worker(nats.url(), &["--kv-active", "10"]).await;
    let _second = mock_worker(nats.url(), &["--kv-active", "20", "--dp-rank", "1"]).await;
    let bridge = Bridge::start(nats.url(), &[]).await;
    let metrics = bridge.shows("llm_load_avg", &[], 15.0).await;
    assert_eq!(metrics.value("llm_kv_blocks_active", &[("dp_rank", "1")]), Some(20.0));
    assert_eq!(metrics.label_values("dp_rank"), ["1"]);
}

#[tokio::test]
async fn the_bridge_survives_its_nats_server() {
    let mut nats = Nats::start().await;
    let _mock = mock_worker(nats.url(), &["--kv-active", "5"]).await;
    let mut bridge = Bridge::start(nats.url(), &["--worker-ttl", "500ms"]).await;
    bridge.shows("llm_load_avg", &[], 5.0).await;

    nats.kill().await;
    bridge.program.says("The connection to NATS was lost").await;
    bridge.shows("dynamo_bridge_source_connected", &[("source", "nats")], 0.0).await;
    let metrics = bridge.loses("llm_kv_blocks_active", &[]).await;
    assert_eq!(metrics.value("llm_workers", &[("state", "reporting")]), Some(0.0));
    bridge.shows("dynamo_bridge_scrape_success", &[], 0.0).await;

    nats.restart().await;
    bridge.shows("llm_load_avg", &[], 5.0).await;
    let metrics = bridge.shows("dynamo_bridge_source_connected", &[("source", "nats")], 1.0).await;
    assert!(metrics.value("dynamo_bridge_source_reconnects_total", &[("source", "nats")]) >= Some(1.0));
}

#[tokio::test]
async fn mock_workers_stop_though_their_nats_server_is_gone() {
    let mut nats = Nats::start().await;
    let mut mock = mock_worker(nats.url(), &["--workers", "2"]).await;
    nats.kill().await;
    mock.says("The connection to NATS was lost").await;
    assert!(mock.interrupt().await.success());
}
