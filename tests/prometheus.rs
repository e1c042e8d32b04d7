//! A real Prometheus, and what its own tool thinks of the exposition.

use std::collections::BTreeSet;
use std::process::Stdio;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::support::{Bridge, FakeService, Nats, Prometheus, endpoint, eventually, mock_worker, peers, same, worker};

#[tokio::test]
async fn prometheus_knows_what_the_pull_shows() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let bridge = Bridge::start(nats.url(), &[]).await;
    let Some(prometheus) = Prometheus::pulling(&bridge.url).await else {
        return;
    };
    let fixed = ["--passes-per-second", "0", "--kv-active", "77", "--active-slots", "58", "--waiting", "3"];
    let _stays = mock_worker(nats.url(), &[&fixed[..], &["--hit-rate", "0.25"]].concat()).await;
    let load = r#"{"kv_active_blocks":29,"kv_total_blocks":100,"gpu_cache_usage_perc":0.29}"#;
    let leaves = FakeService::start(&client, "one", &[endpoint("dynamo_backend.generate-1f", load)]).await;
    bridge.shows("llm_workers", &[("state", "reporting")], 2.0).await;
    let event = r#"{"worker_id":31,"isl_blocks":40,"overlap_blocks":8}"#;
    client.publish("namespace.dynamo.kv-hit-rate", event.into()).await.unwrap();
    bridge.shows("llm_kv_hit_rate_isl_blocks", &worker("31"), 40.0).await;
    agree(&prometheus, &bridge).await;

    drop(leaves);
    bridge.loses("llm_kv_blocks_active", &worker("31")).await;
    bridge.shows("llm_load_avg", &[], 77.0).await;
    agree(&prometheus, &bridge).await;
}

async fn agree(prometheus: &Prometheus, bridge: &Bridge) {
    eventually("Prometheus knows what the pull shows", || async {
        let pulled = bridge.metrics().await.sorted("llm_");
        same(&prometheus.metrics().await.sorted("llm_"), &pulled)
    })
    .await;
}

#[tokio::test]
async fn promtool_minds_nothing_but_the_names_that_are_kept() {
    let Some(promtool) = peers::built("promtool") else {
        return;
    };
    let nats = Nats::start().await;
    let _mock = mock_worker(nats.url(), &["--passes-per-second", "50"]).await;
    let client = nats.client().await;
    let load = r#"{"kv_stats":{"kv_active_blocks":1},"spec_decode_stats":{"num_spec_tokens":4,"num_drafts":1,"num_draft_tokens":4,"num_accepted_tokens":3,"num_accepted_tokens_per_pos":[2,1]}}"#;
    let _speculates = FakeService::start(&client, "one", &[endpoint("dynamo_backend.generate-1f", load)]).await;
    let bridge = Bridge::start(nats.url(), &[]).await;
    bridge.shows("llm_workers", &[("state", "reporting")], 2.0).await;
    bridge.shows("llm_spec_decode_drafts_total", &worker("31"), 0.0).await;
    let metrics = bridge
        .eventually("events", |metrics| {
            (!metrics.values("llm_kv_hit_rate_isl_blocks", &[]).is_empty()).then(|| metrics.clone())
        })
        .await;

    let mut checked = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    checked.stdin.take().unwrap().write_all(metrics.text.as_bytes()).await.unwrap();
    let output = checked.wait_with_output().await.unwrap();
    let written = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    let minded: BTreeSet<_> = written.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let kept = ["llm_kv_blocks_total", "llm_kv_hit_rate_isl_blocks", "llm_kv_hit_rate_overlap_blocks"];
    assert_eq!(minded, BTreeSet::from(kept), "{written}");
    // 3: it can be read, and could be better.
    assert_eq!(output.status.code(), Some(3), "{written}");
}

#[tokio::test]
async fn promtool_accepts_the_configuration_of_prometheus() {
    let Some(promtool) = peers::built("promtool") else {
        return;
    };
    let configuration = concat!(env!("CARGO_MANIFEST_DIR"), "/otel-config/prometheus.yaml");
    let output =
        Command::new(promtool).args(["check", "config", configuration]).kill_on_drop(true).output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
