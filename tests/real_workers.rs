//! Real Dynamo workers, of each generation that reports over NATS STATS.

use crate::support::{Bridge, Dynamo, Exposition, worker};

/// Release, options of the worker, and what comes out: in slots, slots, blocks in use, blocks, waiting, cache usage, hit rate.
const WORKERS: [(&str, &[&str], [f64; 7]); 3] = [
    ("0.1.1", &[], [58.0, 100.0, 77.0, 100.0, 3.0, 0.77, 0.25]),
    (
        "0.3.2",
        &[
            "--active-slots",
            "71",
            "--total-slots",
            "128",
            "--kv-active",
            "29",
            "--kv-total",
            "200",
            "--waiting",
            "0",
            "--cache-usage",
            "0.145",
            "--hit-rate",
            "0.1",
        ],
        [71.0, 128.0, 29.0, 200.0, 0.0, 0.145, 0.1],
    ),
    (
        "0.5.1",
        &[
            "--active-slots",
            "1",
            "--total-slots",
            "2",
            "--kv-active",
            "53",
            "--kv-total",
            "54",
            "--waiting",
            "1000",
            "--cache-usage",
            "1",
            "--hit-rate",
            "0",
        ],
        [1.0, 2.0, 53.0, 54.0, 1000.0, 1.0, 0.0],
    ),
];

const NAMES: [&str; 7] = [
    "llm_requests_active_slots",
    "llm_requests_total_slots",
    "llm_kv_blocks_active",
    "llm_kv_blocks_total",
    "llm_requests_waiting",
    "llm_kv_cache_usage_ratio",
    "llm_kv_hit_rate_percent",
];

fn of_worker(metrics: &Exposition, id: &str) -> [Option<f64>; 7] {
    NAMES.map(|name| metrics.value(name, &worker(id)))
}

#[tokio::test]
async fn real_workers_of_three_releases_are_reported_exactly_and_forgotten_when_killed() {
    let Some(dynamo) = Dynamo::start().await else { return };
    let mut workers = Vec::new();
    for (release, options, _) in WORKERS {
        workers.push(dynamo.worker(release, options).await);
    }
    // With the endpoint, and with everything left out but the namespace.
    let bridges = [
        Bridge::start(dynamo.nats.url(), &[]).await,
        Bridge::watching(dynamo.nats.url(), &["--namespace", "dynamo"], &[]).await,
    ];
    for bridge in &bridges {
        let metrics = bridge.shows("llm_workers", &[("state", "reporting")], 3.0).await;
        for (worker, (release, _, expected)) in workers.iter().zip(WORKERS) {
            assert_eq!(of_worker(&metrics, &worker.id), expected.map(Some), "{release} {}", metrics.text);
        }
        assert_eq!(metrics.label_values("endpoint"), ["generate"], "load_metrics is none");
        assert_eq!(metrics.label_values("worker_id").len(), 3);
        assert_eq!(metrics.values("llm_kv_blocks_active", &[]).len(), 3);
        assert_eq!(metrics.value("llm_load_avg", &[]), Some(53.0));
        let deviation = metrics.value("llm_load_std", &[]).unwrap();
        // 77, 29 and 53: the root of (24 * 24 + 24 * 24 + 0) / 3.
        assert!((deviation - 384_f64.sqrt()).abs() < 1e-12, "{deviation}");
    }

    // The mean of those that are left.
    for (average, worker) in [41.0, 53.0].into_iter().zip(workers) {
        worker.program.kill().await;
        for bridge in &bridges {
            bridge
                .eventually("nothing of the worker", |metrics| {
                    let is_gone = of_worker(metrics, &worker.id) == [None; 7];
                    (is_gone && metrics.value("llm_load_avg", &[]) == Some(average)).then_some(())
                })
                .await;
        }
    }
}

/// One release of each generation on NATS, and its blocks in use, which go up and down by one: from 0.6 on a worker speaks
/// on a change alone.
const EVERY_GENERATION: [(&str, f64); 7] = [
    ("0.1.1", 10.0),
    ("0.5.1", 20.0),
    ("0.7.1", 30.0),
    ("0.8.1", 40.0),
    ("0.9.1", 50.0),
    ("1.2.1", 60.0),
    ("1.6.1", 70.0),
];

/// What is exact of such a worker. From 0.8 on it says its blocks in use and nothing else.
fn is_exact(metrics: &Exposition, id: &str, release: &str, active: f64) -> bool {
    let [slots, all_slots, blocks, all_blocks, waiting, usage, hit_rate] = of_worker(metrics, id);
    let told = [slots, all_slots, all_blocks, waiting, usage, hit_rate];
    let whole = [58.0, 100.0, 100.0, 3.0, 0.77, 0.25].map(Some);
    let is_whole = ["0.1.1", "0.5.1", "0.7.1"].contains(&release);
    let says = metrics.value("llm_worker_info", &[("worker_id", id), ("release", release)]);
    told == if is_whole { whole } else { [None; 6] }
        && [Some(active), Some(active + 1.0)].contains(&blocks)
        && says == (release > "0.6").then_some(1.0)
}

#[tokio::test]
async fn real_workers_of_every_generation_on_one_nats_are_one_fleet() {
    let Some(dynamo) = Dynamo::with(&EVERY_GENERATION.map(|(release, _)| release)).await else { return };
    let bridges = [
        Bridge::start(dynamo.nats.url(), &[]).await,
        Bridge::watching(dynamo.nats.url(), &["--namespace", "dynamo"], &[]).await,
    ];
    let mut workers = Vec::new();
    for (release, active) in EVERY_GENERATION {
        let worker = dynamo.worker(release, &["--flip", "--kv-active", &active.to_string()]).await;
        workers.push((worker, release, active));
    }
    for bridge in &bridges {
        let metrics = bridge
            .eventually("every worker, exactly", |metrics| {
                let all =
                    workers.iter().all(|(worker, release, active)| is_exact(metrics, &worker.id, release, *active));
                all.then(|| metrics.clone())
            })
            .await;
        assert_eq!(metrics.label_values("endpoint"), ["generate"], "no helper is shown");
        assert_eq!(metrics.value("llm_workers", &[("state", "reporting")]), Some(7.0));
        assert_eq!(metrics.value("llm_load_known_ratio", &[]), Some(1.0));
        let rejected = metrics.values("dynamo_bridge_messages_rejected_total", &[]);
        assert!(rejected.iter().all(|rejected| *rejected == 0.0), "{}", metrics.text);
    }
    let mut left = 7.0;
    for (worker, ..) in workers {
        let id = worker.id.clone();
        worker.program.kill().await;
        left -= 1.0;
        for bridge in &bridges {
            bridge.loses("llm_kv_blocks_active", &[("worker_id", &id)]).await;
            bridge.shows("llm_workers", &[("state", "reporting")], left).await;
        }
    }
}

#[tokio::test]
async fn a_real_worker_that_falls_idle_stays_with_what_it_said_last() {
    let Some(dynamo) = Dynamo::with(&["0.7.1"]).await else { return };
    let bridge = Bridge::start(dynamo.nats.url(), &[]).await;
    bridge.shows("dynamo_bridge_source_connected", &[("source", "nats")], 1.0).await;
    bridge.shows("dynamo_bridge_scrape_success", &[], 1.0).await;
    // It speaks once, at its start.
    let idle = dynamo.worker("0.7.1", &["--kv-active", "42"]).await;
    bridge.shows("llm_kv_blocks_active", &worker(&idle.id), 42.0).await;
    let replies = |metrics: &Exposition| metrics.value("dynamo_bridge_replies_total", &[]);
    let before = replies(&bridge.metrics().await).unwrap();
    // Ten times its time to live.
    let metrics = bridge
        .eventually("two hundred more answers", |metrics| (replies(metrics)? > before + 200.0).then(|| metrics.clone()))
        .await;
    assert_eq!(of_worker(&metrics, &idle.id), [58.0, 100.0, 42.0, 100.0, 3.0, 0.77, 0.25].map(Some));
    idle.program.kill().await;
    bridge.loses("llm_kv_blocks_active", &[]).await;
}

#[tokio::test]
async fn a_real_old_worker_is_found_in_etcd_with_its_model() {
    let Some(dynamo) = Dynamo::start().await else { return };
    let options = dynamo.both();
    let bridge = Bridge::finding(&options.each_ref().map(String::as_str), &[]).await;
    let in_etcd = Bridge::finding(&options[2..].iter().map(String::as_str).collect::<Vec<_>>(), &[]).await;
    let old = dynamo.worker("0.5.1", &["--model", "tiny/model", "--kv-total", "300", "--total-slots", "70"]).await;
    let metrics = bridge.shows("llm_worker_info", &[("worker_id", &old.id), ("model", "tiny/model")], 1.0).await;
    assert_eq!(metrics.label_values("endpoint"), ["generate"], "load_metrics is none");
    let expected = [58.0, 70.0, 77.0, 300.0, 3.0, 0.77, 0.25].map(Some);
    bridge.eventually("its load", |metrics| (of_worker(metrics, &old.id) == expected).then_some(())).await;
    // Without NATS nobody hears its load, but its limits are known.
    in_etcd.shows("llm_kv_blocks_total", &worker(&old.id), 300.0).await;
    let metrics = in_etcd.shows("llm_requests_total_slots", &worker(&old.id), 70.0).await;
    assert_eq!(metrics.value("llm_workers", &[("state", "silent")]), Some(1.0));
    old.program.kill().await;
    for bridge in [&bridge, &in_etcd] {
        bridge.loses("llm_worker_info", &[]).await;
        bridge.loses("llm_kv_blocks_total", &[]).await;
    }
}

#[tokio::test]
async fn what_the_endpoints_of_a_real_worker_count_is_counted_again() {
    let Some(dynamo) = Dynamo::start().await else { return };
    let served = dynamo.worker("0.5.1", &[]).await;
    let subject = format!("dynamo_backend.generate-{:x}", served.id.parse::<u64>().unwrap());
    let client = dynamo.nats.client().await;
    // No request of Dynamo's; the worker counts it all the same.
    let ask = async || client.request(subject.clone(), "hello".into()).await.map(|_| ());
    let spent = async || {
        let stats = client.request("$SRV.STATS.dynamo_backend", "".into()).await.unwrap().payload;
        let stats: serde_json::Value = serde_json::from_slice(&stats).unwrap();
        let endpoints = stats["endpoints"].as_array().unwrap();
        let generate = endpoints.iter().find(|endpoint| endpoint["subject"] == *subject).unwrap();
        (generate["num_requests"].as_u64().unwrap(), generate["processing_time"].as_u64().unwrap())
    };
    ask().await.ok();
    let before = spent().await;
    assert_eq!(before.0, 1);
    let bridge = Bridge::watching(dynamo.nats.url(), &["--endpoint-stats"], &[]).await;
    let requests = "llm_endpoint_requests_total";
    let metrics = bridge.shows(requests, &worker(&served.id), 0.0).await;
    let helper = [("component", "backend"), ("endpoint", "load_metrics")];
    assert_eq!(metrics.value(requests, &helper), Some(0.0), "helpers have endpoints too");
    for _ in 0..3 {
        ask().await.ok();
    }
    let metrics = bridge.shows(requests, &worker(&served.id), 3.0).await;
    let nanoseconds = u32::try_from(spent().await.1 - before.1).unwrap();
    let seconds = metrics.value("llm_endpoint_processing_seconds_total", &worker(&served.id));
    assert_eq!(seconds, Some(f64::from(nanoseconds) / 1e9));
    assert_eq!(metrics.value("llm_endpoint_errors_total", &worker(&served.id)), Some(0.0));
    served.program.kill().await;
    bridge.loses(requests, &worker(&served.id)).await;
}

#[tokio::test]
async fn the_events_of_a_real_router_are_counted_on_the_worker() {
    let Some(dynamo) = Dynamo::start().await else { return };
    let bridge = Bridge::start(dynamo.nats.url(), &[]).await;
    let placed = dynamo.worker("0.5.1", &[]).await;
    bridge.shows("llm_workers", &[("state", "reporting")], 1.0).await;
    let mut router = dynamo.router("0.5.1", "5");
    // Its own exit code says how its interpreter ended, not whether it routed.
    router.ended().await;
    // A request that came before the router knew the worker made no event. 640 tokens are 40 blocks, and a worker that
    // announces none is believed to hold none.
    let metrics = bridge
        .eventually("placed requests", |metrics| {
            let events = metrics.value("dynamo_bridge_events_total", &[("topic", "kv-hit-rate")]);
            let events = events.filter(|events| *events > 0.0)?;
            let is_whole = metrics.value("llm_kv_hit_rate_isl_blocks", &worker(&placed.id)) == Some(40.0 * events)
                && metrics.value("llm_kv_hit_rate_ratio_count", &[]) == Some(events);
            is_whole.then(|| metrics.clone())
        })
        .await;
    let overlap = metrics.value("llm_kv_hit_rate_overlap_blocks", &worker(&placed.id));
    assert_eq!(overlap, Some(0.0));
    assert_eq!(metrics.value("llm_workers", &[("state", "reporting")]), Some(1.0), "a router is no worker");
    assert_eq!(metrics.value("llm_workers", &[("state", "silent")]), Some(0.0), "a router is no worker");
}
