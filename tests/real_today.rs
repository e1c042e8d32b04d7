//! Real Dynamo workers on today's planes: registered in etcd, heard over ZMQ, no NATS anywhere.

use crate::support::{Bridge, DynamoWorker, Etcd, Exposition, dynamo, peers, worker};

/// Each release with numbers of its own.
const WORKERS: [(&str, f64, f64, f64); 4] = [
    ("1.0.2", 10.0, 100.0, 4.0),
    ("1.3.1", 20.0, 200.0, 5.0),
    ("1.4.2", 30.0, 300.0, 6.0),
    ("1.6.1", 40.0, 400.0, 7.0),
];

async fn start(etcd: &Etcd, (release, active, total, slots): (&str, f64, f64, f64)) -> DynamoWorker {
    let [active, total, slots] = [active, total, slots].map(|number| number.to_string());
    let load = ["--kv-active", &active, "--kv-total", &total, "--total-slots", &slots];
    // Releases that tell by event tell a change alone: up and down by one.
    let options = [&load[..], &["--flip", "--model", "tiny/model", "--block-size", "32"]].concat();
    dynamo::today(release, &etcd.url(), &options).await
}

/// What is exact of a worker whose used blocks go up and down by one.
fn is_shown(metrics: &Exposition, id: &str, (_, active, total, slots): (&str, f64, f64, f64)) -> bool {
    let value = |name| metrics.value(name, &worker(id));
    let used = value("llm_kv_blocks_active");
    used.is_some_and(|used| used == active || used == active + 1.0)
        && value("llm_kv_blocks_total") == Some(total)
        && value("llm_requests_total_slots") == Some(slots)
        && value("llm_kv_cache_usage_ratio") == used.map(|used| used / total)
}

#[tokio::test]
async fn real_workers_without_nats_are_found_heard_measured_and_forgotten() {
    if !peers::can_run_dynamo(&dynamo::TODAYS_RELEASES).await {
        return;
    }
    let etcd = Etcd::start().await;
    // With the target named, and with everything left out but the namespace.
    let target = ["--component", "backend", "--endpoint", "generate"];
    let named = Bridge::finding(&[&["--etcd-endpoints", &etcd.url()], &target[..]].concat(), &[]).await;
    let open = Bridge::finding(&["--etcd-endpoints", &etcd.url()], &[]).await;
    let mut workers = Vec::new();
    for expected in WORKERS {
        workers.push((start(&etcd, expected).await, expected));
    }
    for bridge in [&named, &open] {
        let metrics = bridge
            .eventually("every worker, exactly", |metrics| {
                let all = workers.iter().all(|(worker, expected)| is_shown(metrics, &worker.id, *expected));
                all.then(|| metrics.clone())
            })
            .await;
        assert_eq!(metrics.label_values("endpoint"), ["generate"], "no helper is shown");
        assert_eq!(metrics.value("llm_workers", &[("state", "reporting")]), Some(4.0));
        assert_eq!(metrics.value("llm_load_known_ratio", &[]), Some(1.0));
        for (found, _) in &workers {
            let card = [("worker_id", &*found.id), ("model", "tiny/model"), ("block_size", "32"), ("ranks", "1")];
            assert_eq!(metrics.value("llm_worker_info", &card), Some(1.0), "{}", metrics.text);
        }
    }
    for (worker, _) in workers {
        let id = worker.id.clone();
        worker.program.kill().await;
        // Its lease runs out.
        for bridge in [&named, &open] {
            bridge.loses("llm_kv_blocks_total", &[("worker_id", &id)]).await;
            bridge.loses("llm_worker_info", &[("worker_id", &id)]).await;
        }
    }
    named.shows("llm_workers", &[("state", "reporting")], 0.0).await;
}
