//! The log, in the words of the old component.

use crate::support::event::{self, PASSES, Publisher};
use crate::support::{Bridge, Nats, mock_worker};

#[tokio::test]
async fn the_log_has_the_lines_that_operators_know() {
    let nats = Nats::start().await;
    let mut bridge = Bridge::start(nats.url(), &[]).await;
    for line in [
        "INFO metrics: Creating unique instance of Metrics at dynamo/components/metrics/instance",
        "INFO metrics: Scraping service dynamo_backend and filtering on subject dynamo_backend.generate",
        "INFO metrics: Scraping service dynamo_backend_9ce3f3b7 and filtering on subject dynamo_backend_9ce3f3b7.generate",
        "WARN metrics: No endpoints found matching subject dynamo_backend.generate",
    ] {
        bridge.program.says(line).await;
    }
    let fixed = ["--release", "0.0", "--kv-active", "77", "--active-slots", "58", "--seed", "5"];
    let _mock = mock_worker(nats.url(), &fixed).await;
    bridge.program.says("INFO metrics: Endpoints found matching subject dynamo_backend.generate").await;
    let line = bridge.program.says("Aggregated metrics: ").await;
    let data = "data: ForwardPassMetrics { request_active_slots: 58, request_total_slots: 100, kv_active_blocks: 77, kv_total_blocks: 100 }";
    assert!(line.contains(data) && line.ends_with("load_avg: 77.0, load_std: 0.0 }"), "{line}");
    bridge
        .eventually("ten scrapes more", |metrics| {
            metrics.value("dynamo_bridge_replies_total", &[]).filter(|replies| *replies >= 10.0)
        })
        .await;
    let written = |text: &str| bridge.program.lines().iter().filter(|line| line.contains(text)).count();
    assert_eq!(written("Aggregated metrics: "), 1, "only on change");
    assert_eq!(written("Endpoints found"), 1);
}

#[tokio::test]
async fn dyn_log_filters_and_jsonl_is_one_object_a_line() {
    let nats = Nats::start().await;
    let environment = [("DYN_LOG", "metrics=warn,dynamo_metrics=info"), ("DYN_LOGGING_JSONL", "TRUE")];
    let mut bridge = Bridge::watching(nats.url(), &[], &environment).await;
    bridge.program.says("No endpoints found").await;
    for line in bridge.program.lines() {
        let entry: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let kept = entry["target"] != "metrics" || entry["level"] == "WARN";
        assert!(kept && entry["message"].is_string(), "{line}");
    }
}

#[tokio::test]
async fn it_is_said_once_what_to_switch_on_where_prompts_are_computed_and_no_router_is_heard() {
    const HINT: &str = "--router-replica-sync";
    let nats = Nats::start().await;
    let mut bridge = Bridge::watching(nats.url(), &[], &[]).await;
    let unwanted = Bridge::watching(nats.url(), &["--topics", PASSES], &[]).await;
    for bridge in [&bridge, &unwanted] {
        bridge.shows("dynamo_bridge_source_connected", &[("source", "nats")], 1.0).await;
        bridge.shows("dynamo_bridge_scrape_success", &[], 1.0).await;
    }
    let mut engine = Publisher::new(&nats.client().await, 7, PASSES);
    // Each is a refresh with more prompts, or several.
    for counter in 1..=40_u32 {
        engine.publish(&event::pass(31, counter.into(), 100)).await;
        for bridge in [&bridge, &unwanted] {
            bridge.shows("llm_forward_passes_total", &[], counter.into()).await;
        }
    }
    bridge.program.says(HINT).await;
    let said = |bridge: &Bridge| bridge.program.lines().iter().filter(|line| line.contains(HINT)).count();
    assert_eq!((said(&bridge), said(&unwanted)), (1, 0));
}
