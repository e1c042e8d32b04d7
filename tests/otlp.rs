//! The push side, against a receiver that shares no code with the bridge.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::sync::Arc;

use dynamo_metrics::instruments::{CATALOGUE, Kind};

use crate::support::{
    Authority, Bridge, Exposition, FakeService, FreezingGate, Nats, Port, Program, Receiver, Request, Via, attribute,
    catalogued, command, endpoint, eventually, mock_worker, reply, worker,
};

/// A worker that stands still.
const FIXED: [&str; 10] =
    ["--passes-per-second", "0", "--kv-active", "77", "--active-slots", "58", "--waiting", "3", "--hit-rate", "0.25"];
const NO_TRACES: (&str, &str) = ("OTEL_TRACES_EXPORTER", "none");
/// Longer than any test: what arrives was pushed for another reason.
const NEVER: (&str, &str) = ("OTEL_METRIC_EXPORT_INTERVAL", "3600000");

async fn publish(client: &async_nats::Client, worker_id: &str, isl: u32, overlap: u32) {
    let event = format!(r#"{{"worker_id":{worker_id},"isl_blocks":{isl},"overlap_blocks":{overlap}}}"#);
    client.publish("namespace.dynamo.kv-hit-rate", event.into()).await.unwrap();
    client.flush().await.unwrap();
}

/// What a worker that decodes speculatively reports.
fn speculating(drafts: u32) -> String {
    let load = format!(
        r#"{{"worker_stats":{{"request_active_slots":1}},"kv_stats":{{"kv_active_blocks":5}},"spec_decode_stats":{{"num_spec_tokens":4,"num_drafts":{drafts},"num_draft_tokens":{},"num_accepted_tokens":{},"num_accepted_tokens_per_pos":[{},{drafts}]}}}}"#,
        4 * drafts,
        3 * drafts,
        2 * drafts
    );
    reply("dynamo_backend", "one", &[endpoint("dynamo_backend.generate-1f", &load)])
}

/// The lines in which the bridge complains about its pushes.
fn complaints(bridge: &Bridge, what: &str) -> usize {
    let complaint = format!("Pushing {what} to ");
    let lines = bridge.program.lines().into_iter();
    lines.filter(|line| line.contains(&complaint) && line.contains(" fails: ")).count()
}

#[tokio::test]
async fn pull_and_push_show_the_same_values_over_grpc_and_http() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let _first = mock_worker(nats.url(), &FIXED).await;
    let other = ["--passes-per-second", "0", "--kv-active", "29", "--active-slots", "71", "--waiting", "0"];
    let other = [&other[..], &["--hit-rate", "0.5", "--dp-rank", "1", "--release", "0.1"]].concat();
    let _second = mock_worker(nats.url(), &other).await;
    let service = FakeService::saying(
        &client,
        "dynamo_backend",
        "one",
        Some("Dynamo component backend in namespace dynamo"),
        &[speculating(1)],
    )
    .await;
    let receiver = Receiver::start(&[]).await;
    for (via, drafts) in Via::BOTH.into_iter().zip([10, 100]) {
        let bridge = Bridge::pushing(nats.url(), &receiver.url(via), via, &[NO_TRACES]).await;
        bridge.shows("llm_workers", &[("state", "reporting")], 3.0).await;
        bridge.shows("llm_spec_decode_drafts_total", &worker("31"), 0.0).await;
        service.say(&[speculating(drafts)]);
        publish(&client, "31", 40, 8).await;
        publish(&client, "31", 10, 10).await;
        publish(&client, "31", 0, 0).await;
        bridge.shows("llm_kv_hit_rate_request_isl_blocks_count", &[], 3.0).await;
        let increase = if via == Via::Grpc { 9.0 } else { 90.0 };
        let pulled = bridge.shows("llm_spec_decode_drafts_total", &worker("31"), increase).await;
        receiver.agrees_with(&bridge, via).await;
        assert_eq!(pulled.value("llm_load_avg", &[]), Some(37.0), "{}", pulled.text);
    }
}

#[tokio::test]
async fn a_push_carries_dotted_names_units_descriptions_and_the_bridges_scope() {
    let nats = Nats::start().await;
    let _mock = mock_worker(nats.url(), &FIXED).await;
    let receiver = Receiver::start(&[]).await;
    let bridge = Bridge::pushing(nats.url(), &receiver.url(Via::Grpc), Via::Grpc, &[NO_TRACES]).await;
    bridge.shows("llm_workers", &[("state", "reporting")], 1.0).await;
    let metrics = receiver
        .last(Via::Grpc, "a worker", |push| {
            let shown = !push.metrics().values("llm_kv_blocks_active", &[]).is_empty();
            shown.then(|| push.raw_metrics())
        })
        .await;
    for (scope, metric) in &metrics {
        assert_eq!(scope, "dynamo-metrics");
        let entry = catalogued(metric);
        assert_eq!(metric["unit"].as_str().unwrap_or_default(), entry.unit, "{}", entry.otlp);
        assert_eq!(metric["description"], entry.help, "{}", entry.otlp);
        match entry.kind {
            Kind::Gauge(_) => assert!(metric["gauge"].is_object(), "{metric}"),
            Kind::Counter(_) | Kind::FractionCounter(_) => {
                assert_eq!(metric["sum"]["isMonotonic"], true, "{metric}");
                assert_eq!(metric["sum"]["aggregationTemporality"], "AGGREGATION_TEMPORALITY_CUMULATIVE");
            }
            Kind::Histogram(bounds) => {
                let point = &metric["histogram"]["dataPoints"][0];
                let given: Vec<f64> = serde_json::from_value(point["explicitBounds"].clone()).unwrap();
                assert_eq!(given, bounds, "{metric}");
            }
        }
    }
    let names: BTreeSet<_> = metrics.iter().map(|(_, metric)| catalogued(metric).otlp).collect();
    assert_eq!(names.len(), metrics.len(), "each once");
    // Of passes, speculative decoding, placements and model cards these workers say nothing, and the rest is not asked for.
    let not_here = |name: &str| {
        [
            "llm.spec_decode",
            "llm.kv.hit_rate.",
            "llm.worker.lora",
            "llm.forward_pass",
            "llm.endpoint.",
            "llm.router.",
            "llm.requests.placed",
            "llm.requests.in_flight",
            "dynamo.bridge.events.missed",
            "dynamo.bridge.events.complete",
        ]
        .iter()
        .any(|start| name.starts_with(start))
    };
    for entry in CATALOGUE.iter().filter(|entry| !not_here(entry.otlp)) {
        assert!(names.contains(entry.otlp), "{} is missing", entry.otlp);
    }
}

#[tokio::test]
async fn metrics_and_traces_say_who_pushes() {
    let nats = Nats::start().await;
    let receiver = Receiver::start(&[]).await;
    let both = |requests: &[Arc<Request>], via| {
        let of = |signal| requests.iter().find(|request| request.via() == via && request.is(signal));
        Some((of("metrics")?.resource(), of("traces")?.resource()))
    };
    let plain = Bridge::pushing(nats.url(), &receiver.url(Via::Grpc), Via::Grpc, &[]).await;
    let (of_metrics, of_traces) = receiver.eventually("metrics and traces", |requests| both(requests, Via::Grpc)).await;
    assert_eq!(of_metrics, of_traces);
    assert_eq!(of_metrics["service.name"], "dynamo-metrics");
    assert_eq!(of_metrics["service.version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(of_metrics["service.instance.id"].len(), 36);
    drop(plain);

    let environment = [
        (
            "OTEL_RESOURCE_ATTRIBUTES",
            "deployment.environment.name=Prod%20EU,service.name=hidden,service.instance.id=here",
        ),
        ("OTEL_SERVICE_NAME", "bridge-of-team-a"),
    ];
    let _named = Bridge::pushing(nats.url(), &receiver.url(Via::Http), Via::Http, &environment).await;
    let (of_metrics, of_traces) = receiver.eventually("metrics and traces", |requests| both(requests, Via::Http)).await;
    assert_eq!(of_metrics, of_traces);
    assert_eq!(of_metrics["service.name"], "bridge-of-team-a");
    assert_eq!(of_metrics["service.instance.id"], "here");
    assert_eq!(of_metrics["deployment.environment.name"], "Prod EU");
}

#[tokio::test]
async fn the_standard_variables_alone_make_it_push_with_headers_gzip_and_interval() {
    let nats = Nats::start().await;
    let receiver = Receiver::start(&[]).await;
    for via in Via::BOTH {
        let url = receiver.url(via);
        let environment = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &*url),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", via.protocol()),
            ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20geheim,x-tenant=blue"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "100"),
            ("OTEL_BSP_SCHEDULE_DELAY", "100"),
        ];
        let bridge = Bridge::watching(nats.url(), &[], &environment).await;
        let requests = receiver
            .eventually("five pushes in less than the default interval, and traces", |requests| {
                let of = |signal| requests.iter().filter(move |request| request.via() == via && request.is(signal));
                (of("metrics").count() >= 5 && of("traces").count() > 0)
                    .then(|| of("metrics").chain(of("traces")).cloned().collect::<Vec<_>>())
            })
            .await;
        for request in requests {
            assert_eq!(request.header("authorization"), Some("Bearer geheim"), "{via:?}");
            assert_eq!(request.header("x-tenant"), Some("blue"), "{via:?}");
            if via == Via::Http {
                assert_eq!(request.header("content-encoding"), Some("gzip"));
                assert_eq!(request.header("content-type"), Some("application/x-protobuf"));
            }
        }
        assert!(!bridge.program.lines().join("\n").contains("geheim"));
    }
}

#[tokio::test]
async fn each_signal_can_go_its_own_way() {
    let nats = Nats::start().await;
    let (to_metrics, to_traces) = (Receiver::start(&[]).await, Receiver::start(&[]).await);
    let metrics_url = format!("{}/v1/metrics", to_metrics.url(Via::Http));
    let traces_url = to_traces.url(Via::Grpc);
    let environment = [
        ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", &*metrics_url),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "x-signal=metrics"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &*traces_url),
        ("OTEL_METRIC_EXPORT_INTERVAL", "100"),
        ("OTEL_BSP_SCHEDULE_DELAY", "100"),
    ];
    let _bridge = Bridge::watching(nats.url(), &[], &environment).await;
    let three = |requests: &[Arc<Request>]| (requests.len() >= 3).then(|| requests.to_vec());
    for request in to_metrics.eventually("metrics", three).await {
        assert!(request.via() == Via::Http && request.is("metrics"));
        assert_eq!(request.header("x-signal"), Some("metrics"));
    }
    for request in to_traces.eventually("traces", three).await {
        assert!(request.via() == Via::Grpc && request.is("traces"));
        assert_eq!(request.header("x-signal"), None);
    }
}

#[tokio::test]
async fn deltas_sum_up_to_what_the_pull_shows_even_when_a_worker_comes_back() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let receiver = Receiver::start(&[]).await;
    let delta = ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "delta");
    let bridge = Bridge::pushing(nats.url(), &receiver.url(Via::Grpc), Via::Grpc, &[delta, NO_TRACES]).await;
    let fixed = [&FIXED[..], &["--seed", "1"]].concat();
    let mut mock = mock_worker(nats.url(), &fixed).await;
    let id = bridge.eventually("the worker", |metrics| metrics.label_values("worker_id").pop()).await;
    let sum = |name: &str| {
        let pushes = receiver.pushes(Via::Grpc);
        pushes.iter().filter_map(|push| push.metrics().value(name, &[])).sum::<f64>()
    };
    for round in 1..=4_u32 {
        publish(&client, &id, 10, 3).await;
        let total = f64::from(round);
        let pulled = bridge.shows("llm_kv_hit_rate_isl_blocks", &worker(&id), 10.0 * total).await;
        assert_eq!(pulled.value("llm_kv_hit_rate_overlap_blocks", &[]), Some(3.0 * total));
        eventually("the sums of the deltas are the pull's totals", || async {
            let names = ["llm_kv_hit_rate_isl_blocks", "llm_kv_hit_rate_overlap_blocks", "llm_kv_hit_rate_ratio_count"];
            let sums = Vec::from(names.map(sum));
            if sums == [10.0 * total, 3.0 * total, total] { Ok(()) } else { Err(format!("{sums:?}")) }
        })
        .await;
        if round == 2 {
            assert!(mock.interrupt().await.success());
            bridge.loses("llm_kv_blocks_active", &[]).await;
            mock = mock_worker(nats.url(), &fixed).await;
            bridge.shows("llm_kv_blocks_active", &worker(&id), 77.0).await;
        }
    }
    for push in receiver.pushes(Via::Grpc) {
        for (_, metric) in push.raw_metrics() {
            for kind in ["sum", "histogram"] {
                let temporality = &metric[kind]["aggregationTemporality"];
                assert!(temporality.is_null() || temporality == "AGGREGATION_TEMPORALITY_DELTA", "{metric}");
            }
        }
    }
}

#[tokio::test]
async fn a_departed_worker_leaves_pull_and_push_for_good() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let _stays = mock_worker(nats.url(), &[&FIXED[..], &["--seed", "1"]].concat()).await;
    let receiver = Receiver::start(&[]).await;
    for via in Via::BOTH {
        let options = [
            "--endpoint",
            "generate",
            "--component",
            "backend",
            "--worker-ttl",
            "1s",
            "--event-ttl",
            "1s",
            "--otlp-protocol",
            via.protocol(),
            "--otlp-endpoint",
            &receiver.url(via),
        ];
        let environment = [NO_TRACES, ("OTEL_METRIC_EXPORT_INTERVAL", "100")];
        let bridge = Bridge::watching(nats.url(), &options, &environment).await;
        let leaves =
            FakeService::start(&client, "one", &[endpoint("dynamo_backend.generate-1f", r#"{"kv_active_blocks":7}"#)])
                .await;
        bridge.shows("llm_workers", &[("state", "reporting")], 2.0).await;
        publish(&client, "31", 4, 2).await;
        bridge.shows("llm_kv_hit_rate_isl_blocks", &worker("31"), 4.0).await;
        let of_the_departed = |push: &Request| {
            let metrics = push.metrics();
            let names = ["llm_kv_blocks_active", "llm_kv_hit_rate_isl_blocks"];
            names.map(|name| metrics.values(name, &worker("31")).len())
        };
        receiver.last(via, "the worker and its hits", |push| (of_the_departed(push) == [1, 1]).then_some(())).await;

        drop(leaves);
        bridge.loses("llm_kv_blocks_active", &worker("31")).await;
        bridge.loses("llm_kv_hit_rate_isl_blocks", &worker("31")).await;
        receiver.agrees_with(&bridge, via).await;
        let so_far = receiver.pushes(via).len();
        receiver.eventually("three more pushes", |_| (receiver.pushes(via).len() >= so_far + 3).then_some(())).await;
        for push in &receiver.pushes(via)[so_far..] {
            assert_eq!(of_the_departed(push), [0, 0], "{via:?}");
        }
    }
}

#[tokio::test]
async fn every_scrape_is_one_span_and_nothing_else_is() {
    let nats = Nats::start().await;
    let _mock = mock_worker(nats.url(), &[&FIXED[..], &["--workers", "2"]].concat()).await;
    let receiver = Receiver::start(&[]).await;
    for via in Via::BOTH {
        let environment = [NEVER, ("DYN_LOG", "trace")];
        let mut bridge = Bridge::pushing(nats.url(), &receiver.url(via), via, &environment).await;
        bridge.shows("llm_workers", &[("state", "reporting")], 2.0).await;
        bridge
            .eventually("twenty scrapes", |metrics| {
                let scrapes = metrics.value("dynamo_bridge_scrape_duration_seconds_count", &[]);
                scrapes.filter(|scrapes| *scrapes >= 20.0)
            })
            .await;
        bridge.program.signal("-TERM").await;
        assert!(bridge.program.ended().await.success());

        let last = receiver.pushes(via).pop().expect("the last push").metrics();
        let scrapes = last.value("dynamo_bridge_scrape_duration_seconds_count", &[]).unwrap();
        let mut requests = receiver.requests();
        requests.retain(|request| request.via() == via && request.is("traces"));
        let spans: Vec<_> = requests.iter().flat_map(|request| request.spans()).collect();
        let (mut ended, mut complete, mut interrupted) = (0.0, 0, 0);
        for (scope, span) in &spans {
            assert_eq!((&**scope, &span["name"]), ("dynamo-metrics", &"scrape".into()), "{span}");
            assert!(span["parentSpanId"].is_null(), "{span}");
            // The end of the bridge may interrupt a scrape.
            let Some(outcome) = attribute(span, "outcome") else {
                interrupted += 1;
                continue;
            };
            ended += 1.0;
            let names: BTreeSet<_> = span["attributes"]
                .as_array()
                .unwrap()
                .iter()
                .map(|given| &given["key"])
                .map(|key| key.as_str().unwrap())
                .collect();
            assert_eq!(names, BTreeSet::from(["outcome", "replies", "workers"]), "{span}");
            if outcome["stringValue"] == "complete" {
                complete += 1;
                for name in ["replies", "workers"] {
                    assert_eq!(attribute(span, name).unwrap()["intValue"], "2", "{span}");
                }
            }
        }
        assert!(complete > 0, "{via:?}");
        // The last scrape may have ended while nobody counted any more.
        assert!([scrapes, scrapes + 1.0].contains(&ended), "{ended} spans of {scrapes} scrapes");
        assert!(interrupted <= 1, "{interrupted} spans without an outcome");
    }
}

#[tokio::test]
async fn a_receiver_that_refuses_at_first_is_survived_and_each_refusal_is_counted() {
    let nats = Nats::start().await;
    let _mock = mock_worker(nats.url(), &FIXED).await;
    for via in Via::BOTH {
        let refusal = ["--fail", "6", "--status", "INVALID_ARGUMENT", "--http-status", "400"];
        let receiver = Receiver::start(&refusal).await;
        let mut bridge = Bridge::pushing(nats.url(), &receiver.url(via), via, &[NO_TRACES]).await;
        let complaint = bridge.program.says(" fails: ").await;
        let cause = if via == Via::Grpc { "gRPC status InvalidArgument" } else { "HTTP status 400 Bad Request" };
        assert!(complaint.contains(cause), "{complaint}");
        bridge.program.says(" works again").await;
        receiver
            .last(via, "the worker", |push| {
                (push.metrics().values("llm_kv_blocks_active", &[]) == [77.0]).then_some(())
            })
            .await;
        assert_eq!(complaints(&bridge, "metrics"), 1, "{via:?}");
        assert_eq!(receiver.requests().iter().filter(|request| request.failed()).count(), 6);
        let metrics = bridge.shows("dynamo_bridge_pushes_failed_total", &[("signal", "metrics")], 6.0).await;
        assert_eq!(metrics.value("dynamo_bridge_pushes_failed_total", &[("signal", "traces")]), None, "not pushed");
    }
}

#[tokio::test]
async fn a_receiver_that_restarts_costs_no_push() {
    let nats = Nats::start().await;
    for via in Via::BOTH {
        let receiver = Receiver::start(&["--fail", "4", "--retry-after", "0"]).await;
        let patient = ("OTEL_EXPORTER_OTLP_TIMEOUT", "60000");
        let bridge = Bridge::pushing(nats.url(), &receiver.url(via), via, &[NO_TRACES, patient]).await;
        receiver.last(via, "a push", |_| Some(())).await;
        bridge.shows("dynamo_bridge_pushes_failed_total", &[("signal", "metrics")], 0.0).await;
        assert_eq!(receiver.requests().iter().filter(|request| request.failed()).count(), 4);
    }
}

#[tokio::test]
async fn a_receiver_that_asks_to_wait_is_left_alone_over_all_pushes() {
    let nats = Nats::start().await;
    for (via, http_status) in [(Via::Grpc, "503"), (Via::Http, "429"), (Via::Http, "503")] {
        let wish =
            ["--fail", "1", "--retry-after", "5", "--status", "RESOURCE_EXHAUSTED", "--http-status", http_status];
        let receiver = Receiver::start(&wish).await;
        // Less than what is asked for, so that every push gives up before.
        let hasty = ("OTEL_EXPORTER_OTLP_TIMEOUT", "2000");
        let bridge = Bridge::pushing(nats.url(), &receiver.url(via), via, &[NO_TRACES, hasty]).await;
        receiver.last(via, "a push", |_| Some(())).await;
        let times: Vec<_> = receiver.requests().iter().map(|request| request.time()).collect();
        assert!(times[1] - times[0] >= 4.9, "{via:?} {http_status}: {times:?}");
        let failed = bridge.metrics().await.value("dynamo_bridge_pushes_failed_total", &[]);
        assert!(failed >= Some(2.0), "{failed:?}");
    }
}

#[tokio::test]
async fn what_is_no_answer_of_a_receiver_is_a_failure() {
    let nats = Nats::start().await;
    let stranger = Receiver::start(&[]).await;
    let elsewhere = format!("{}/login?token=geheim", stranger.url(Via::Http));
    let origin = format!("it redirects to {}, which is not followed", stranger.url(Via::Http));
    for (options, cause) in [
        (&["--answer", "html"][..], "HTTP status 200 OK, but with no answer of an OTLP receiver"),
        (&["--answer", "redirect", "--http-status", "301"], &*origin),
        (&["--answer", "redirect", "--http-status", "302"], &origin),
        (&["--answer", "redirect", "--http-status", "307"], &origin),
        (&["--answer", "redirect", "--http-status", "308"], &origin),
    ] {
        let options = [&["--fail", "1000000", "--location", &elsewhere], options].concat();
        let receiver = Receiver::start(&options).await;
        let key = ("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key=geheim");
        let url = receiver.url(Via::Http);
        let mut bridge = Bridge::pushing(nats.url(), &url, Via::Http, &[key, NO_TRACES]).await;
        let complaint = bridge.program.says("Pushing metrics to ").await;
        assert!(complaint.contains(" fails: ") && complaint.contains(cause), "{complaint}");
        bridge
            .eventually("failures", |metrics| {
                metrics.value("dynamo_bridge_pushes_failed_total", &[]).filter(|failed| *failed >= 3.0)
            })
            .await;
        assert!(!bridge.program.lines().join("\n").contains("geheim"));
        assert!(receiver.requests().iter().all(|request| request.header("x-api-key") == Some("geheim")));
    }
    assert!(stranger.requests().is_empty(), "nobody follows");
}

#[tokio::test]
async fn what_a_receiver_rejects_is_counted_and_said_once() {
    let nats = Nats::start().await;
    for via in Via::BOTH {
        let receiver = Receiver::start(&["--reject", "3"]).await;
        let mut bridge = Bridge::pushing(nats.url(), &receiver.url(via), via, &[]).await;
        for what in ["metrics", "traces"] {
            let path = if via == Via::Http { format!("/v1/{what}") } else { String::new() };
            let receiver = format!("The receiver of {what} at {}{path}", receiver.url(via));
            let said = format!(r#"{receiver} rejected 3 of them: "asked to reject""#);
            let line = bridge.program.says(&said).await;
            assert!(line.contains("WARN"), "{line}");
            let signal = [("signal", what)];
            let rejected = |metrics: &Exposition| metrics.value("dynamo_bridge_pushes_rejected_items_total", &signal);
            let many = bridge.eventually("rejections", |metrics| rejected(metrics).filter(|items| *items >= 9.0)).await;
            assert!(many % 3.0 < 0.5, "three a push: {many}");
            assert_eq!(bridge.program.lines().iter().filter(|line| line.contains(&said)).count(), 1);
            assert_eq!(bridge.metrics().await.value("dynamo_bridge_pushes_failed_total", &signal), Some(0.0));
        }
    }
}

#[tokio::test]
async fn pushes_arrive_again_where_the_connections_that_there_were_lead_nowhere() {
    let nats = Nats::start().await;
    for via in Via::BOTH {
        let receiver = Receiver::start(&[]).await;
        let gate = FreezingGate::before(&receiver.address(via)).await;
        let hasty = ("OTEL_EXPORTER_OTLP_TIMEOUT", "2000");
        let _bridge = Bridge::pushing(nats.url(), &format!("http://{}", gate.address()), via, &[hasty]).await;
        let of = |what: &str| receiver.requests().iter().filter(|request| request.is(what)).count();
        for round in 0..3 {
            let before = ["metrics", "traces"].map(of);
            let arrived = |_: &[Arc<Request>]| {
                ["metrics", "traces"].iter().zip(before).all(|(what, before)| of(what) >= before + 3).then_some(())
            };
            receiver.eventually(&format!("{via:?} in round {round}"), arrived).await;
            gate.freeze();
        }
        assert!(gate.connections() >= 6, "{via:?}: two signals, three rounds");
    }
}

#[tokio::test]
async fn spans_that_find_no_room_are_said_in_the_log_and_failures_once() {
    let nats = Nats::start().await;
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let mute = format!("http://{}", mute.local_addr().unwrap());
    let full = ("OTEL_BSP_MAX_QUEUE_SIZE", "1");
    let hasty = ("OTEL_EXPORTER_OTLP_TIMEOUT", "500");
    let mut bridge = Bridge::pushing(nats.url(), &mute, Via::Grpc, &[full, hasty]).await;
    let line = bridge.program.says("BatchSpanProcessor.SpanDroppingStarted").await;
    assert!(line.contains("WARN opentelemetry_sdk"), "{line}");
    for signal in ["metrics", "traces"] {
        bridge
            .eventually("failures", |metrics| {
                let failed = metrics.value("dynamo_bridge_pushes_failed_total", &[("signal", signal)]);
                failed.filter(|failed| *failed >= 3.0)
            })
            .await;
    }
    let troubles: Vec<_> = bridge.program.lines().into_iter().filter(|line| line.contains("ExportError")).collect();
    assert!(troubles.is_empty(), "{troubles:?}");
}

#[tokio::test]
async fn a_push_that_is_larger_than_the_receiver_takes_is_named_by_its_status() {
    let nats = Nats::start().await;
    let _mock = mock_worker(nats.url(), &[&FIXED[..], &["--workers", "100"]].concat()).await;
    // A push is some 1 KB a worker.
    let receiver = Receiver::start(&["--max-recv-bytes", "65536"]).await;
    let mut bridge = Bridge::pushing(nats.url(), &receiver.url(Via::Grpc), Via::Grpc, &[NO_TRACES]).await;
    bridge.program.says("ResourceExhausted").await;
}

#[tokio::test]
async fn an_absent_receiver_costs_one_warning_and_its_return_is_noticed() {
    let nats = Nats::start().await;
    let _mock = mock_worker(nats.url(), &FIXED).await;
    for via in Via::BOTH {
        let port = Port::reserve();
        let mut bridge = Bridge::pushing(nats.url(), &port.url(), via, &[]).await;
        for what in ["metrics", "traces"] {
            let warning = bridge.program.says(&format!("Pushing {what} to {}", port.url())).await;
            assert!(warning.contains("WARN") && warning.contains(" fails: "), "{warning}");
        }
        // Time for several more exports to fail.
        bridge
            .eventually("thirty scrapes", |metrics| {
                let scrapes = metrics.value("dynamo_bridge_scrape_duration_seconds_count", &[]);
                scrapes.filter(|scrapes| *scrapes >= 30.0)
            })
            .await;
        bridge.shows("llm_kv_blocks_active", &[], 77.0).await;

        let option = if via == Via::Grpc { "--grpc" } else { "--http" };
        let receiver = Receiver::start(&[option, &port.address()]).await;
        receiver
            .last(via, "the worker", |push| {
                (push.metrics().values("llm_kv_blocks_active", &[]) == [77.0]).then_some(())
            })
            .await;
        for what in ["metrics", "traces"] {
            bridge
                .program
                .line(&format!("that {what} arrive"), |line| {
                    (line.contains(&format!("Pushing {what}")) && line.contains(" works again")).then_some(())
                })
                .await;
            assert_eq!(complaints(&bridge, what), 1, "{via:?} {what}");
        }
    }
}

#[tokio::test]
async fn tls_trusts_the_authority_that_is_named_and_no_other() {
    let nats = Nats::start().await;
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (certificate, key) = authority.server();
    for via in Via::BOTH {
        let receiver = Receiver::start(&["--cert", &certificate, "--key", &key]).await;
        let url = receiver.tls_url(via);
        let trusted = ("OTEL_EXPORTER_OTLP_CERTIFICATE", &*stranger.certificate());
        let mut bridge = Bridge::pushing(nats.url(), &url, via, &[trusted]).await;
        for what in ["metrics", "traces"] {
            let warning = bridge.program.says(&format!("Pushing {what} to {url}")).await;
            assert!(warning.contains("WARN") && warning.contains(" fails: "), "{warning}");
            assert!(warning.contains("; check OTEL_EXPORTER_OTLP_CERTIFICATE"), "{warning}");
        }
        bridge.shows("dynamo_bridge_source_connected", &[("source", "nats")], 1.0).await;
        assert!(bridge.program.interrupt().await.success());
        assert!(receiver.requests().is_empty(), "{via:?}");

        let trusted = ("OTEL_EXPORTER_OTLP_CERTIFICATE", &*authority.certificate());
        let bridge = Bridge::pushing(nats.url(), &url, via, &[trusted]).await;
        let requests = receiver
            .eventually("metrics and traces", |requests| {
                let all = ["metrics", "traces"].map(|what| requests.iter().any(|request| request.is(what)));
                all.iter().all(|one| *one).then(|| requests.to_vec())
            })
            .await;
        assert!(requests.iter().all(|request| request.tls() && request.via() == via));
        assert_eq!(["metrics", "traces"].map(|what| complaints(&bridge, what)), [0, 0]);
    }
}

#[tokio::test]
async fn a_receiver_that_asks_for_a_certificate_gets_the_one_that_is_named() {
    let nats = Nats::start().await;
    let authority = Authority::new();
    let (certificate, key) = authority.server();
    let (client_certificate, client_key) = authority.client();
    let named = authority.certificate();
    for via in Via::BOTH {
        let options = ["--cert", &*certificate, "--key", &*key, "--client-ca", &*named];
        let receiver = Receiver::start(&options).await;
        let url = receiver.tls_url(via);
        let trusted = ("OTEL_EXPORTER_OTLP_CERTIFICATE", &*named);
        let mut anonymous = Bridge::pushing(nats.url(), &url, via, &[trusted, NO_TRACES]).await;
        anonymous.program.says(&format!("Pushing metrics to {url}")).await;
        drop(anonymous);
        assert!(receiver.requests().is_empty(), "{via:?}");

        let identity = [
            trusted,
            ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", &*client_certificate),
            ("OTEL_EXPORTER_OTLP_CLIENT_KEY", &*client_key),
        ];
        let _known = Bridge::pushing(nats.url(), &url, via, &identity).await;
        receiver
            .eventually("metrics and traces", |requests| {
                let all = ["metrics", "traces"].map(|what| requests.iter().any(|request| request.is(what)));
                all.iter().all(|one| *one).then_some(())
            })
            .await;
    }
}

#[tokio::test]
async fn a_file_that_is_no_certificate_ends_the_process_with_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let garbage = folder.path().join("garbage.pem");
    std::fs::write(&garbage, "garbage").unwrap();
    let (garbage, missing) = (garbage.to_str().unwrap(), "/nowhere/at/all");
    let (of_authority, of_client) = ("OTEL_EXPORTER_OTLP_CERTIFICATE", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE");
    let key = "OTEL_EXPORTER_OTLP_CLIENT_KEY";
    for via in Via::BOTH {
        let options = ["--port", "0", "--otlp-endpoint", "https://127.0.0.1:1", "--otlp-protocol", via.protocol()];
        for environment in [
            &[(of_authority, garbage)][..],
            &[(of_authority, missing)],
            &[(of_client, garbage), (key, garbage)],
            &[(of_client, garbage)],
        ] {
            let mut program = command(env!("CARGO_BIN_EXE_metrics"), &options, environment);
            let output = program.kill_on_drop(true).output().await.unwrap();
            let written = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(1), "{via:?} {environment:?}: {written}");
            assert_eq!(written.lines().count(), 1, "{written}");
            assert!(written.contains("OTEL_EXPORTER_OTLP_"), "{written}");
            assert!(written.matches("No such file").count() <= 1, "told once: {written}");
        }
    }
}

/// The variables of OpenTelemetry that the documentation calls checked.
fn checked_variables() -> Vec<String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/environment.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (_, table) = text.split_once("## OpenTelemetry").expect("its heading");
    let rows = table.lines().take_while(|line| !line.starts_with("## ")).filter(|line| line.contains(" | checked | "));
    let names = rows.flat_map(|row| row.split(" | ").next().unwrap().trim_start_matches('|').split(','));
    names.map(|name| name.trim().trim_matches('`').to_owned()).collect()
}

#[tokio::test]
async fn a_malformed_variable_ends_the_start_with_its_name_and_without_its_value() {
    let names = checked_variables();
    assert!(names.len() > 30 && names.iter().all(|name| name.starts_with("OTEL_")), "{names:?}");
    let bad = names.iter().map(|name| (&**name, "geheim"));
    let more = [
        ("OTEL_TRACES_SAMPLER", "parentbased_jaeger_remote"),
        ("OTEL_TRACES_SAMPLER_ARG", "ten percent geheim"),
        ("OTEL_TRACES_SAMPLER_ARG", "7"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x key=geheim"),
        ("OTEL_RESOURCE_ATTRIBUTES", "a=geheim%2"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "-1"),
        ("OTEL_SDK_DISABLED", "yes geheim"),
    ];
    for (name, value) in bad.chain(more) {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1");
        let mut program = command(env!("CARGO_BIN_EXE_metrics"), &["--port", "0"], &[endpoint, (name, value)]);
        let output = program.kill_on_drop(true).output().await.unwrap();
        let written = String::from_utf8(output.stderr).unwrap();
        assert!([Some(1), Some(2)].contains(&output.status.code()), "{name}={value}: {written}");
        assert!(written.contains(name) && !written.contains("geheim"), "{name}={value}: {written}");
    }
}

#[tokio::test]
async fn the_last_values_and_spans_are_pushed_at_the_end() {
    let nats = Nats::start().await;
    let _mock = mock_worker(nats.url(), &FIXED).await;
    let receiver = Receiver::start(&[]).await;
    for via in Via::BOTH {
        let environment = [NEVER, ("OTEL_BSP_SCHEDULE_DELAY", "3600000")];
        let mut bridge = Bridge::pushing(nats.url(), &receiver.url(via), via, &environment).await;
        let pulled = bridge.shows("llm_kv_blocks_active", &[], 77.0).await;
        assert!(receiver.pushes(via).is_empty());
        bridge.program.signal("-TERM").await;
        assert!(bridge.program.ended().await.success());
        let pushes = receiver.pushes(via);
        assert_eq!(pushes.len(), 1, "{via:?}");
        assert_eq!(pushes[0].metrics().sorted("llm_"), pulled.sorted("llm_"));
        let traces = |request: &Arc<Request>| request.via() == via && request.is("traces");
        assert!(receiver.requests().iter().any(traces), "{via:?}");
    }
}

#[tokio::test]
async fn it_ends_cleanly_without_the_collector_and_beside_one_that_is_mute() {
    let nats = Nats::start().await;
    // Connections to it succeed, and nobody ever answers.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let mute = format!("http://{}", mute.local_addr().unwrap());
    let patient = ("OTEL_EXPORTER_OTLP_TIMEOUT", "3600000");
    for via in Via::BOTH {
        let receiver = Receiver::start(&[]).await;
        let mut left_alone = Bridge::pushing(nats.url(), &receiver.url(via), via, &[]).await;
        receiver.last(via, "a push", |_| Some(())).await;
        stop(receiver.program).await;
        left_alone.program.signal("-TERM").await;
        assert!(left_alone.program.ended().await.success(), "{via:?}");

        let mut ignored = Bridge::pushing(nats.url(), &mute, via, &[patient]).await;
        ignored.shows("dynamo_bridge_source_connected", &[("source", "nats")], 1.0).await;
        ignored.program.signal("-TERM").await;
        assert!(ignored.program.ended().await.success(), "{via:?}");
        let lines = ignored.program.lines().join("\n");
        for what in ["metrics", "traces"] {
            assert!(lines.contains(&format!("The last {what} were not pushed")), "{via:?}: {lines}");
        }
    }
}

async fn stop(mut program: Program) {
    program.signal("-TERM").await;
    assert!(program.ended().await.success());
}
