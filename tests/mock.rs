//! Mock workers: what they say adds up, and is what the releases say.

#![expect(clippy::float_cmp, reason = "whole numbers")]

use std::collections::BTreeMap;
use std::fs;

use crate::support::{Bridge, Exposition, Nats, Program, eventually, mock_worker, serving, worker};

/// What the mock worker itself says that its requests added up to.
async fn ledger(mock: &mut Program) -> BTreeMap<String, f64> {
    let line = mock.says("All requests have ended: ").await;
    let (_, counts) = line.split_once("ended: ").unwrap();
    let count = |count: &str| {
        let (name, value) = count.split_once('=').unwrap();
        (name.to_owned(), value.parse().unwrap())
    };
    counts.split_whitespace().map(count).collect()
}

/// The same by the bridge, of workers with these labels; without what no such series tells.
fn counted(metrics: &Exposition, labels: &[(&str, &str)]) -> BTreeMap<String, f64> {
    let counters = [
        ("requests", "llm_requests_placed_total"),
        ("isl_blocks", "llm_kv_hit_rate_isl_blocks"),
        ("overlap_blocks", "llm_kv_hit_rate_overlap_blocks"),
        ("prefill_tokens", "llm_forward_pass_prefill_tokens_total"),
        ("decode_tokens", "llm_forward_pass_decode_tokens_total"),
    ];
    let sum = |(name, counter): (&str, &str)| {
        let values = metrics.values(counter, labels);
        (!values.is_empty()).then(|| (name.to_owned(), values.iter().sum()))
    };
    counters.into_iter().filter_map(sum).collect()
}

/// Two workers of two ranks; every engine's last word is a heartbeat.
const FLEET: [&str; 14] = [
    "--workers",
    "2",
    "--ranks",
    "2",
    "--requests",
    "120",
    "--passes-per-second",
    "200",
    "--seed",
    "5",
    "--block-size",
    "8",
    "--model",
    "some/model",
];

async fn the_bridge_counts_what_is_in_the_ledger(bridge: &Bridge, mock: &mut Program) {
    let ledger = ledger(mock).await;
    assert_eq!(ledger["requests"], 120.0);
    assert!(ledger.values().all(|count| *count > 0.0), "{ledger:?}");
    let agrees = |metrics: &Exposition| (counted(metrics, &[]) == ledger).then_some(());
    bridge.eventually(&format!("it adds up to {ledger:?}"), agrees).await;
    let metrics = bridge
        .eventually("all is at rest", |metrics| {
            let scheduled = metrics.values("llm_forward_pass_scheduled_requests", &[]);
            (scheduled == [0.0; 8]).then(|| metrics.clone())
        })
        .await;
    assert_eq!(counted(&metrics, &[]), ledger, "and no more comes");
    assert_eq!(metrics.values("llm_forward_passes_lost_total", &[]), [0.0; 4]);
    assert_eq!(metrics.values("llm_kv_blocks_active", &[]), [0.0; 4]);
    assert_eq!(metrics.values("llm_kv_blocks_total", &[]), [100.0; 4]);
    assert_eq!(metrics.values("llm_requests_in_flight", &[]), [0.0; 2]);
    assert_eq!(metrics.value("llm_workers", &[("state", "reporting")]), Some(2.0));
    let card = [("block_size", "8"), ("model", "some/model"), ("ranks", "2"), ("role", "aggregated")];
    let namespace = [("dynamo_namespace", "dynamo")];
    assert_eq!(metrics.values("llm_worker_info", &[&card[..], &namespace].concat()), [1.0; 2]);
    assert_eq!(metrics.values("llm_kv_blocks_total", &namespace), [] as [f64; 0], "only where every one is watched");
    assert_eq!(metrics.values("llm_kv_blocks_total", &[("dp_rank", "0")]), [100.0; 2], "one of several");
    for topic in ["kv_metrics", "forward-pass-metrics", "active_sequences_events"] {
        assert_eq!(metrics.value("dynamo_bridge_events_complete_ratio", &[("topic", topic)]), Some(1.0), "{topic}");
    }
}

#[tokio::test]
async fn the_bridge_counts_to_the_token_what_mock_workers_say_on_nats() {
    let nats = Nats::start().await;
    let folder = tempfile::tempdir().unwrap();
    let folder = ["--file-kv", folder.path().to_str().unwrap()];
    let mut mock = mock_worker(nats.url(), &[&FLEET[..], &folder, &["--release", "1.6"]].concat()).await;
    let bridge = Bridge::watching(nats.url(), &folder, &[]).await;
    the_bridge_counts_what_is_in_the_ledger(&bridge, &mut mock).await;
    let asked = mock.lines().into_iter().find(|line| line.contains("Somebody listens")).unwrap();
    assert!(asked.contains("$SRV.STATS"), "{asked}");
    assert!(mock.interrupt().await.success());
    mock.says("requests that have ended: requests=120 ").await;
}

#[tokio::test]
async fn the_bridge_counts_to_the_token_what_mock_workers_say_over_zmq() {
    let folder = tempfile::tempdir().unwrap();
    let folder = ["--file-kv", folder.path().to_str().unwrap()];
    let mut mock = serving(&[&FLEET[..], &folder, &["--plane", "zmq"]].concat()).await;
    let bridge = Bridge::finding(&folder, &[]).await;
    the_bridge_counts_what_is_in_the_ledger(&bridge, &mut mock).await;
    mock.says("Somebody listens: 5 publishers have a subscriber").await;
    assert!(mock.interrupt().await.success());
    bridge.shows("llm_workers", &[("state", "reporting")], 0.0).await;
}

#[tokio::test]
async fn without_options_it_is_one_worker_of_0_5_of_the_default_target() {
    let nats = Nats::start().await;
    let _mock = serving(&["--nats-server", nats.url()]).await;
    let bridge = Bridge::start(nats.url(), &[]).await;
    let metrics = bridge
        .eventually("load, limits and placements", |metrics| {
            let told = ["llm_kv_blocks_active", "llm_requests_waiting", "llm_requests_placed_total"];
            told.iter().all(|name| metrics.value(name, &[]).is_some()).then(|| metrics.clone())
        })
        .await;
    assert_eq!(metrics.value("llm_kv_blocks_total", &[]), Some(100.0));
    assert_eq!(metrics.value("llm_requests_total_slots", &[]), Some(100.0));
    assert_eq!(metrics.value("llm_workers", &[("state", "reporting")]), Some(1.0));
    assert_eq!(metrics.label_values("release"), [] as [&str; 0], "which it says from 0.6 on");
}

#[tokio::test]
async fn publishers_listen_and_register_where_they_are_told_to() {
    let folder = tempfile::tempdir().unwrap();
    let place = ["--file-kv", folder.path().to_str().unwrap()];
    let zmq = ["--plane", "zmq", "--zmq-host", "127.0.0.2", "--passes-per-second", "50"];
    let _mock = serving(&[&zmq[..], &place].concat()).await;
    let channels = fs::read_dir(folder.path().join("v1/event_channels")).unwrap();
    let channels: Vec<_> = channels.map(|file| fs::read_to_string(file.unwrap().path()).unwrap()).collect();
    assert!(channels.len() == 3 && channels.iter().all(|it| it.contains("tcp://127.0.0.2:")), "{channels:?}");
    let bridge = Bridge::finding(&place, &[]).await;
    bridge.shows("llm_load_known_ratio", &[], 1.0).await;
}

const RELEASES: [&str; 8] = ["0.0", "0.1", "0.3", "0.5", "0.7", "0.8", "0.9", "1.6"];

#[tokio::test]
async fn mocks_of_every_generation_are_one_fleet_of_which_each_value_is_known() {
    let nats = Nats::start().await;
    let folder = tempfile::tempdir().unwrap();
    let folder = ["--file-kv", folder.path().to_str().unwrap()];
    let bridge = Bridge::watching(nats.url(), &[&folder[..], &["--endpoint", "generate"]].concat(), &[]).await;
    bridge.shows("dynamo_bridge_scrape_success", &[], 1.0).await;
    let fixed = ["--active-slots", "58", "--waiting", "3", "--hit-rate", "0.25", "--kv-total", "200"];
    let pace = ["--requests", "20", "--passes-per-second", "100"];
    let mut mocks = Vec::new();
    for (blocks, release) in (101..).zip(RELEASES) {
        let blocks = f64::from(blocks);
        let own = ["--release", release, "--kv-active", &blocks.to_string()];
        mocks.push((release, blocks, mock_worker(nats.url(), &[&own[..], &fixed, &pace, &folder].concat()).await));
    }
    for (release, blocks, mut mock) in mocks {
        let ledger = ledger(&mut mock).await;
        let shows = |name: &'static str| {
            move |metrics: &Exposition| {
                let of = |id: &String| metrics.value(name, &worker(id)) == Some(blocks);
                metrics.label_values("worker_id").into_iter().find(of)
            }
        };
        let id = bridge.eventually(&format!("the load of {release}"), shows("llm_kv_blocks_active")).await;
        let id = worker(&id);
        let wanted = told(release, &ledger);
        let metrics = bridge
            .eventually(&format!("{wanted:?} of {release}"), |metrics| {
                (counted(metrics, &id) == wanted).then(|| metrics.clone())
            })
            .await;
        assert_eq!(metrics.value("llm_kv_blocks_total", &id), Some(200.0), "{release}");
        assert_eq!(metrics.value("llm_requests_total_slots", &id), Some(100.0), "{release}");
        assert_eq!(metrics.value("llm_kv_cache_usage_ratio", &id), Some(blocks / 200.0), "{release}");
        let all_load = ("0.1"..="0.7").contains(&release);
        let waiting = [metrics.value("llm_requests_waiting", &id), metrics.value("llm_kv_hit_rate_percent", &id)];
        let slots = metrics.value("llm_requests_active_slots", &id);
        match release {
            "0.0" => assert_eq!((slots, waiting), (Some(58.0), [None; 2])),
            _ if all_load => assert_eq!((slots, waiting), (Some(58.0), [Some(3.0), Some(0.25)]), "{release}"),
            "1.6" => assert_eq!(waiting[1], None, "its slots are those of its passes"),
            _ => assert_eq!((slots, waiting), (None, [None; 2]), "{release}"),
        }
    }
    let metrics = bridge.metrics().await;
    assert_eq!(metrics.value("llm_workers", &[("state", "reporting")]), Some(8.0));
    assert!(metrics.values("dynamo_bridge_rejected_messages_total", &[]).iter().all(|rejected| *rejected == 0.0));
}

/// As much of a ledger as a release tells.
fn told(release: &str, ledger: &BTreeMap<String, f64>) -> BTreeMap<String, f64> {
    let tells = |name: &str| match name {
        "requests" => release >= "0.5",
        "prefill_tokens" | "decode_tokens" => release == "1.6",
        _ => true,
    };
    ledger.iter().filter(|(name, _)| tells(name)).map(|(name, count)| (name.clone(), *count)).collect()
}

#[tokio::test]
async fn replies_of_mock_workers_are_to_the_byte_those_of_their_releases() {
    let fixed = ["--active-slots", "58", "--kv-active", "77", "--waiting", "3", "--hit-rate", "0.25"];
    let releases = [
        ("0.1", "0.1.1"),
        ("0.3", "0.3.2"),
        ("0.5", "0.5.1"),
        ("0.7", "0.7.1"),
        ("0.8", "0.8.1"),
        ("0.9", "0.8.1"),
        ("1.6", "0.8.1"),
    ];
    for (release, captured) in releases {
        let nats = Nats::start().await;
        let options = [&fixed[..], &["--release", release, "--passes-per-second", "0"]].concat();
        let _mock = mock_worker(nats.url(), &options).await;
        let client = nats.client().await;
        for (verb, file) in [("STATS", "stats.1.json"), ("INFO", "info.1.json")] {
            let path = format!("{}/tests/fixtures/{captured}/{file}", env!("CARGO_MANIFEST_DIR"));
            let reply = eventually("a reply", || async {
                let subject = format!("$SRV.{verb}");
                client.request(subject, "".into()).await.map_err(|error| error.to_string())
            })
            .await;
            let reply = String::from_utf8(reply.payload.to_vec()).unwrap();
            // From 0.8 on they differ by the version alone.
            let version = if captured == "0.8.1" { format!("{release}.1") } else { captured.to_owned() };
            let expected = std::fs::read_to_string(path).unwrap().replace(captured, &version);
            assert_eq!(reply, as_if_of_the_same(&reply, &expected), "{release}");
        }
    }
}

/// The captured reply with what differs from process to process as it is in ours: ids, its start and the order of endpoints,
/// which is none in any release. The load was captured with another number of blocks.
fn as_if_of_the_same(reply: &str, captured: &str) -> String {
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let ours = json(reply);
    let worker = |json: &serde_json::Value| {
        json["endpoints"][0]["name"].as_str().unwrap().rsplit_once('-').unwrap().1.to_owned()
    };
    let captured = captured.replace(&worker(&json(captured)), &worker(&ours));
    let mut captured = json(&captured.replace(r#""kv_active_blocks":78"#, r#""kv_active_blocks":77"#));
    for field in ["id", "started"] {
        if let Some(value) = captured.get_mut(field) {
            *value = ours[field].clone();
        }
    }
    let order: Vec<_> = ours["endpoints"].as_array().unwrap().iter().map(|endpoint| &endpoint["name"]).collect();
    let position = |endpoint: &serde_json::Value| order.iter().position(|name| **name == endpoint["name"]);
    captured["endpoints"].as_array_mut().unwrap().sort_by_key(position);
    captured.to_string()
}
