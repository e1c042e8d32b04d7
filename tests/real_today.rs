//! Real Dynamo workers on today's planes: registered in etcd, heard over ZMQ, no NATS anywhere.

use tokio::process::Command;

use crate::support::dynamo::{self, DynamoWorker};
use crate::support::{Bridge, Etcd, Exposition, Nats, Program, mock_worker, peers, serving, worker};

/// Each release with numbers of its own.
const WORKERS: [Expected; 4] = [
    ("1.0.2", 10.0, 100.0, 4.0),
    ("1.3.1", 20.0, 200.0, 5.0),
    ("1.4.2", 30.0, 300.0, 6.0),
    ("1.6.1", 40.0, 400.0, 7.0),
];

type Expected = (&'static str, f64, f64, f64);

/// Releases that tell by event tell a change alone: up and down by one.
fn options((_, active, total, slots): Expected) -> Vec<String> {
    let load = [("--kv-active", active), ("--kv-total", total), ("--total-slots", slots)];
    let load = load.into_iter().flat_map(|(option, number)| [option.to_owned(), number.to_string()]);
    load.chain(["--flip", "--model", "tiny/model", "--block-size", "32"].map(str::to_owned)).collect()
}

fn strs(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}

/// Waits until every worker is shown exactly.
async fn all_shown(bridge: &Bridge, workers: &[(DynamoWorker, Expected)]) -> Exposition {
    let is_shown = |metrics: &Exposition, (worker, (_, active, total, slots)): &(DynamoWorker, Expected)| {
        worker.is_shown(metrics, (*active, *total, *slots))
    };
    bridge
        .eventually("every worker, exactly", |metrics| {
            workers.iter().all(|worker| is_shown(metrics, worker)).then(|| metrics.clone())
        })
        .await
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
        workers.push((dynamo::today(expected.0, &etcd.url(), &strs(&options(expected))).await, expected));
    }
    for bridge in [&named, &open] {
        let metrics = all_shown(bridge, &workers).await;
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

#[tokio::test]
async fn a_real_worker_of_0_9_in_a_key_value_store_that_is_a_folder_is_heard() {
    const WORKER: Expected = ("0.9.1", 20.0, 200.0, 5.0);
    if !peers::can_run_dynamo(&[WORKER.0]).await {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let store = dynamo::key_value_store(folder.path().to_str().unwrap());
    let bridge = Bridge::finding(&[], &store).await;
    let worker = dynamo::registered_there(WORKER.0, &store, &strs(&options(WORKER))).await;
    all_shown(&bridge, &[(worker, WORKER)]).await;
}

#[tokio::test]
async fn real_workers_that_publish_on_nats_are_found_in_etcd_and_heard() {
    const WORKERS: [Expected; 3] =
        [("0.8.1", 10.0, 100.0, 4.0), ("0.9.1", 20.0, 200.0, 5.0), ("1.2.1", 30.0, 300.0, 6.0)];
    if !peers::can_run_dynamo(&dynamo::EVENT_RELEASES).await {
        return;
    }
    let streams = tempfile::tempdir().unwrap();
    let nats = Nats::with_options(&["-js", "-sd", streams.path().to_str().unwrap()]).await;
    let etcd = Etcd::start().await;
    let bridge = Bridge::watching(nats.url(), &["--etcd-endpoints", &etcd.url()], &[]).await;
    let mut workers = Vec::new();
    for expected in WORKERS {
        let options = options(expected);
        let worker = dynamo::of_its_time(expected.0, &etcd.url(), nats.url(), &strs(&options)).await;
        workers.push((worker, expected));
    }
    let metrics = all_shown(&bridge, &workers).await;
    assert_eq!(metrics.label_values("endpoint"), ["generate"], "no helper is shown");
    assert_eq!(metrics.value("llm_workers", &[("state", "reporting")]), Some(3.0));
    for (worker, _) in workers {
        let id = worker.id.clone();
        worker.program.kill().await;
        bridge.loses("llm_kv_blocks_total", &[("worker_id", &id)]).await;
    }
}

#[tokio::test]
async fn without_discovery_real_workers_live_by_their_events() {
    // Those that answer no scrape, since requests reach them by TCP.
    const WORKERS: [Expected; 2] = [("0.9.1", 20.0, 200.0, 5.0), ("1.2.1", 30.0, 300.0, 6.0)];
    if !peers::can_run_dynamo(&dynamo::EVENT_RELEASES).await {
        return;
    }
    let streams = tempfile::tempdir().unwrap();
    let nats = Nats::with_options(&["-js", "-sd", streams.path().to_str().unwrap()]).await;
    let etcd = Etcd::start().await;
    let bridge = Bridge::start(nats.url(), &["--idle-ttl", "5s"]).await;
    let mut workers = Vec::new();
    for expected in WORKERS {
        let worker = dynamo::of_its_time(expected.0, &etcd.url(), nats.url(), &strs(&options(expected))).await;
        workers.push((worker, expected.1));
    }
    bridge
        .eventually("the used blocks of both, and no limits", |metrics| {
            let used = |(found, active): &(DynamoWorker, f64)| {
                let used = metrics.value("llm_kv_blocks_active", &worker(&found.id));
                [Some(*active), Some(active + 1.0)].contains(&used)
            };
            let is_shown = metrics.value("dynamo_bridge_workers_by_events_alone", &[]) == Some(2.0)
                && metrics.value("llm_workers", &[("state", "reporting")]) == Some(2.0)
                && metrics.values("llm_kv_blocks_total", &[]).is_empty();
            (is_shown && workers.iter().all(used)).then_some(())
        })
        .await;
    for (found, _) in workers {
        let id = found.id.clone();
        found.program.kill().await;
        bridge.loses("llm_kv_blocks_active", &worker(&id)).await;
    }
    bridge.shows("dynamo_bridge_workers_by_events_alone", &[], 0.0).await;
}

/// A broker, and its addresses in Dynamo's spelling.
async fn broker() -> (Program, String) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/zmq_broker.py");
    let mut broker = Program::start(Command::new(peers::python()).arg(script));
    let addresses = broker.line("its addresses", |line| line.starts_with("xsub=").then(|| line.to_owned())).await;
    (broker, addresses)
}

/// The records of a broker in the namespace `dynamo`: as 1.0 - 1.3 look for it, and as 1.4 - 1.6 do.
fn broker_records(id: u64, addresses: &str) -> [(String, String); 2] {
    let (publishers, listeners) = addresses.strip_prefix("xsub=").unwrap().split_once(",xpub=").unwrap();
    let config = format!(r#"{{"xsub_endpoints":["{publishers}"],"xpub_endpoints":["{listeners}"]}}"#);
    let record = |place: &str| {
        let transport = format!(r#"{{"kind":"ZmqBroker","config":{config}}}"#);
        format!(r#"{{"type":"EventChannel",{place},"topic":"broker","instance_id":{id},"transport":{transport}}}"#)
    };
    [
        (
            format!("v1/event_channels/dynamo/zmq_broker/broker/{id:x}"),
            record(r#""namespace":"dynamo","component":"zmq_broker""#),
        ),
        (
            format!("v1/event_channels/namespace/dynamo/component/zmq_broker/topic/broker/{id:x}"),
            record(r#""scope":{"kind":"component","namespace":"dynamo","component":"zmq_broker"}"#),
        ),
    ]
}

#[tokio::test]
async fn real_workers_and_the_bridge_find_their_brokers_in_discovery() {
    if !peers::can_run_dynamo(&dynamo::TODAYS_RELEASES).await {
        return;
    }
    let etcd = Etcd::start().await;
    let ((first, first_at), (_second, second_at)) = (broker().await, broker().await);
    for (key, value) in broker_records(1, &first_at).into_iter().chain(broker_records(2, &second_at)) {
        etcd.put(&key, &value).await;
    }
    let bridge = Bridge::finding(&["--etcd-endpoints", &etcd.url()], &[]).await;
    let mut workers = Vec::new();
    for expected in WORKERS {
        let options = options(expected);
        workers.push((dynamo::behind_announced_broker(expected.0, &etcd.url(), &strs(&options)).await, expected));
    }
    let metrics = all_shown(&bridge, &workers).await;
    // Each worker sends each message to both.
    for series in ["dynamo_bridge_events_missed_total", "dynamo_bridge_messages_rejected_total"] {
        assert!(metrics.values(series, &[]).iter().all(|count| *count < 1.0), "{}", metrics.text);
    }
    // The other brings the same.
    first.kill().await;
    all_shown(&bridge, &workers).await;
    assert_eq!(bridge.metrics().await.value("llm_load_known_ratio", &[]), Some(1.0));
    for (key, _) in broker_records(2, &second_at) {
        etcd.delete(&key).await;
    }
    bridge.shows("llm_load_known_ratio", &[], 0.0).await;
    bridge.shows("llm_workers", &[("state", "reporting")], 4.0).await;
    for (key, value) in broker_records(2, &second_at) {
        etcd.put(&key, &value).await;
    }
    all_shown(&bridge, &workers).await;
}

#[tokio::test]
async fn real_workers_behind_a_broker_are_heard() {
    if !peers::can_run_dynamo(&dynamo::TODAYS_RELEASES).await {
        return;
    }
    let etcd = Etcd::start().await;
    let (broker, addresses) = broker().await;
    let bridge = Bridge::finding(&["--etcd-endpoints", &etcd.url(), "--zmq-broker", &addresses], &[]).await;
    let mut workers = Vec::new();
    for expected in WORKERS {
        let options = options(expected);
        workers.push((dynamo::behind_broker(expected.0, &etcd.url(), &addresses, &strs(&options)).await, expected));
    }
    all_shown(&bridge, &workers).await;
    // What was heard is no longer known; the workers live on.
    broker.kill().await;
    bridge.shows("llm_load_known_ratio", &[], 0.0).await;
    bridge.shows("llm_workers", &[("state", "reporting")], 4.0).await;
}

#[tokio::test]
async fn a_fleet_half_on_nats_and_half_on_zmq_is_one_fleet() {
    let nats = Nats::start().await;
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().to_str().unwrap();
    let options = ["--namespace", "dynamo", "--component", "backend", "--endpoint", "generate", "--file-kv", folder];
    let bridge = Bridge::watching(nats.url(), &options, &[]).await;
    let mut old = mock_worker(nats.url(), &["--workers", "2", "--kv-active", "10"]).await;
    let zmq =
        ["--plane", "zmq", "--file-kv", folder, "--workers", "2", "--kv-active", "30", "--passes-per-second", "20"];
    let mut new = serving(&zmq).await;
    let metrics = bridge.shows("llm_load_avg", &[], 20.0).await;
    assert_eq!(metrics.value("llm_workers", &[("state", "reporting")]), Some(4.0));
    assert_eq!(metrics.value("llm_load_known_ratio", &[]), Some(1.0));
    assert_eq!(metrics.values("dynamo_bridge_source_connected", &[]), [1.0, 1.0]);
    assert!(old.interrupt().await.success());
    bridge.shows("llm_load_avg", &[], 30.0).await;
    assert!(new.interrupt().await.success());
    bridge.shows("llm_workers", &[("state", "reporting")], 0.0).await;
}

#[tokio::test]
async fn mock_workers_register_in_etcd_too_and_leave_it_cleanly() {
    let etcd = Etcd::start().await;
    let bridge = Bridge::finding(&["--etcd-endpoints", &etcd.url()], &[]).await;
    let options = ["--plane", "zmq", "--etcd-endpoints", &etcd.url(), "--ranks", "2", "--kv-active", "30"];
    let mut mock = serving(&options).await;
    let metrics = bridge.shows("llm_load_known_ratio", &[], 1.0).await;
    assert_eq!(metrics.values("llm_kv_blocks_active", &[]), [30.0, 30.0]);
    assert_eq!(metrics.label_values("dp_rank"), ["0", "1"]);
    assert!(mock.interrupt().await.success());
    bridge.loses("llm_worker_info", &[]).await;
}
