//! The real OpenTelemetry Collector, with the configuration that this project ships.

use crate::support::{Bridge, Collector, FakeService, Nats, Via, endpoint, mock_worker, worker};

const NO_TRACES: (&str, &str) = ("OTEL_TRACES_EXPORTER", "none");

async fn pull_and_collector_agree(via: Via) {
    let Some(collector) = Collector::start(&[("METRIC_EXPIRATION", "5s")]).await else {
        return;
    };
    let nats = Nats::start().await;
    let client = nats.client().await;
    let fixed = ["--passes-per-second", "0", "--kv-active", "77", "--active-slots", "58", "--waiting", "3"];
    let _stays = mock_worker(nats.url(), &[&fixed[..], &["--hit-rate", "0.25"]].concat()).await;
    let load = r#"{"kv_active_blocks":29,"kv_total_blocks":100,"gpu_cache_usage_perc":0.29}"#;
    let leaves = FakeService::start(&client, "one", &[endpoint("dynamo_backend.generate-1f", load)]).await;
    let bridge = Bridge::pushing(nats.url(), &collector.url(via), via, &[NO_TRACES]).await;
    bridge.shows("llm_workers", &[("state", "reporting")], 2.0).await;
    for event in [
        r#"{"worker_id":31,"isl_blocks":40,"overlap_blocks":8}"#,
        r#"{"worker_id":31,"isl_blocks":3,"overlap_blocks":3}"#,
    ] {
        client.publish("namespace.dynamo.kv-hit-rate", event.into()).await.unwrap();
    }
    bridge.shows("llm_kv_hit_rate_isl_blocks", &worker("31"), 43.0).await;
    collector.agrees_with(&bridge).await;
    let collected = collector.metrics().await;
    assert_eq!(collected.label_values("job"), ["dynamo-metrics"]);
    assert_eq!(collected.label_values("instance").len(), 1);

    drop(leaves);
    bridge.loses("llm_kv_blocks_active", &worker("31")).await;
    bridge.shows("llm_load_avg", &[], 77.0).await;
    collector.agrees_with(&bridge).await;
}

#[tokio::test]
async fn the_collector_shows_over_grpc_what_the_pull_shows() {
    pull_and_collector_agree(Via::Grpc).await;
}

#[tokio::test]
async fn the_collector_shows_over_http_what_the_pull_shows() {
    pull_and_collector_agree(Via::Http).await;
}

#[tokio::test]
async fn the_collector_accepts_its_configuration_and_names_what_is_wrong_with_another() {
    for (from, to, named) in [
        ("", "", None),
        ("\nexporters:", "\nexporter:", Some("invalid keys: exporter")),
        ("limit_mib:", "limit_mb:", Some("invalid keys: limit_mb")),
        ("  batch:", "  bach:", Some("unknown type: \"bach\" for id: \"bach\" (valid values: [")),
        ("prometheus, debug]", "prometheus, debugg]", Some("references exporter \"debugg\" which is not configured")),
        ("180s", "180 sec", Some("'metric_expiration' time: unknown unit")),
    ] {
        let Some(output) = Collector::validate(from, to).await else {
            return;
        };
        let written = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), named.is_none(), "{to}: {written}");
        assert!(written.contains(named.unwrap_or_default()), "{to}: {written}");
    }
}
