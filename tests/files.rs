//! Workers that register in a folder, as on a developer's machine.

use std::fs;
use std::time::{Duration, Instant, SystemTime};

use crate::support::dynamo::key_value_store;
use crate::support::registered::{card, instance};
use crate::support::{Bridge, Exposition, Program, Store, command, lines_allowed, worker};

const SILENT: [(&str, &str); 3] = [("component", "backend"), ("endpoint", "generate"), ("state", "silent")];

#[tokio::test]
async fn a_whole_dynamo_is_found_and_its_helpers_are_nobody() {
    let mut store = Store::new();
    store.of_a_release();
    store.resume();
    let bridge = store.bridge("2s").await;
    let metrics = bridge.shows("llm_workers", &SILENT, 2.0).await;
    assert_eq!(metrics.label_values("endpoint"), ["generate"]);
    let ids = [0xb485_352a_ea89_91a1_u64, 0xc2a6_8884_286f_88a2].map(|id| id.to_string());
    assert_eq!(metrics.label_values("worker_id"), ids);
    for id in &ids {
        assert!(metrics.value("llm_kv_blocks_total", &worker(id)).is_some_and(|blocks| blocks > 0.0), "{id}");
    }
}

#[tokio::test]
async fn routers_with_a_model_card_are_no_workers_unless_they_were_asked_for() {
    let mut store = Store::new();
    store.of_a_release();
    store.of_its_routers();
    store.resume();
    let bridge = store.bridge("20s").await;
    // It is, once everything in it was read.
    let metrics = bridge.shows("dynamo_bridge_source_connected", &[("source", "files")], 1.0).await;
    assert_eq!(metrics.value("llm_workers", &SILENT), Some(2.0), "{}", metrics.text);
    assert_eq!(metrics.label_values("component"), ["backend"], "{}", metrics.text);
    let (folder, component) = (store.path.to_str().unwrap(), "global_router");
    let options = ["--file-kv", folder, "--component", component, "--endpoint", "generate"];
    let asked = Bridge::finding(&options, &[]).await;
    asked.shows("llm_workers", &[("component", component), ("state", "silent")], 1.0).await;
}

#[tokio::test]
async fn a_worker_whose_files_are_no_longer_touched_is_gone_and_may_come_back() {
    let mut store = Store::new();
    let files = [instance(1), card(1, 4096, 64)].map(|entry| store.register(entry));
    store.resume();
    let bridge = store.bridge("2s").await;
    bridge.shows("llm_kv_blocks_total", &worker("1"), 4096.0).await;
    store.abandon();
    bridge.loses("llm_kv_blocks_total", &worker("1")).await;
    bridge.shows("llm_workers", &SILENT, 0.0).await;
    store.resume();
    bridge.shows("llm_workers", &SILENT, 1.0).await;
    for file in files {
        fs::remove_file(store.path.join(file)).unwrap();
    }
    bridge.shows("llm_workers", &SILENT, 0.0).await;
}

const HOUR: Duration = Duration::from_secs(3600);

/// Where the clocks of two machines do not agree. After their end its owners leave files of an hour's age, or of the future.
async fn who_is_touched_is_alive(clock: fn() -> SystemTime, skew: &str) {
    let mut store = Store::new();
    for id in 1..=2 {
        store.register(instance(id));
        store.register(card(id, 4096, 64));
    }
    store.resume_by(clock);
    let mut bridge = store.bridge("5s").await;
    bridge.shows("llm_workers", &SILENT, 2.0).await;
    let line = bridge.program.says("do the clocks agree?").await;
    assert!(line.contains(" WARN ") && line.contains(skew), "{line}");
    store.abandon();
    bridge.shows("llm_workers", &SILENT, 0.0).await;
    // Nobody takes them for alive who sees them for the first time, beside one that is.
    let other = store.bridge("1h").await;
    store.register(instance(3));
    store.register(card(3, 4096, 64));
    for bridge in [&bridge, &other] {
        bridge.shows("llm_kv_blocks_total", &worker("3"), 4096.0).await;
        bridge.shows("llm_workers", &SILENT, 1.0).await;
    }
    assert_eq!(other.program.count("do the clocks agree?"), 0);
}

#[tokio::test]
async fn who_is_touched_by_a_clock_that_is_behind_is_alive() {
    who_is_touched_is_alive(|| SystemTime::now() - HOUR * 2, " behind ").await;
}

#[tokio::test]
async fn who_is_touched_by_a_clock_that_is_ahead_is_alive() {
    who_is_touched_is_alive(|| SystemTime::now() + HOUR * 2, " ahead of ").await;
}

#[tokio::test]
async fn the_key_value_store_of_0_9_may_be_a_folder() {
    let mut store = Store::new();
    store.register(instance(1));
    store.register(card(1, 4096, 64));
    store.resume();
    let folder = store.path.to_str().unwrap();
    let bridge = Bridge::finding(&[], &key_value_store(folder)).await;
    bridge.shows("llm_workers", &SILENT, 1.0).await;
    let connections = bridge.metrics().await.values("dynamo_bridge_source_connected", &[]);
    assert_eq!(connections, [1.0], "nobody else is asked");
}

#[tokio::test]
async fn a_frontends_word_for_its_namespace_is_heard_where_there_is_no_other() {
    let mut store = Store::new();
    store.register(instance(1));
    store.register(card(1, 4096, 64));
    store.resume();
    let folder = ("DYN_FILE_KV", store.path.to_str().unwrap());
    for (environment, watched) in [
        (vec![folder, ("DYN_NAMESPACE_PREFIX", "other")], "other_backend"),
        (vec![folder, ("DYN_NAMESPACE_PREFIX", "other"), ("DYN_NAMESPACE", "dynamo")], "dynamo_backend"),
    ] {
        let options = ["--component", "backend", "--endpoint", "generate"];
        let mut bridge = Bridge::finding(&options, &environment).await;
        bridge.program.says(&format!("Scraping service {watched}")).await;
        if watched == "dynamo_backend" {
            bridge.shows("llm_workers", &SILENT, 1.0).await;
        }
    }
}

#[tokio::test]
async fn nats_is_heard_where_a_plane_is_said_to_be_there() {
    let mut store = Store::new();
    store.register(instance(1));
    store.resume();
    let folder = ("DYN_FILE_KV", store.path.to_str().unwrap());
    // Whether or not one runs at its default address.
    let patience = ("NATS_STARTUP_CONNECT_TIMEOUT_SECONDS", "3600");
    for plane in ["DYN_EVENT_PLANE", "DYN_REQUEST_PLANE"] {
        let bridge = Bridge::finding(&[], &[folder, patience, (plane, "nats")]).await;
        let heard = |metrics: &Exposition| metrics.value("dynamo_bridge_source_connected", &[("source", "nats")]);
        bridge.eventually("NATS is one of the sources", heard).await;
    }
}

#[tokio::test]
async fn a_flood_of_bad_files_in_a_folder_that_comes_and_goes_takes_a_few_lines() {
    const FILES: u32 = 5000;
    let start = Instant::now();
    let mut store = Store::new();
    let (long, key) = ("x".repeat(100_000), "dynamo%2Fbackend%2Fgenerate%2F");
    store.register(instance(1));
    for file in 0..FILES {
        let (name, content) = match file % 4 {
            0 => (format!("v1/instances/{key}{file:x}"), "{"),
            1 => (format!("v1/mdc/{key}{file:x}"), r#"{"card_json":7}"#),
            2 => (format!("v1/mdc/%zz%0A{file:x}"), "{}"),
            _ => (format!("v1/event_channels/{file:x}"), &*long),
        };
        store.write(&name, content.as_bytes());
    }
    store.resume();
    let bridge = store.bridge("1h").await;
    let all = f64::from(FILES);
    bridge
        .eventually("all are rejected", |metrics| {
            let rejected = metrics.values("dynamo_bridge_messages_rejected_total", &[("source", "files")]);
            (rejected.iter().sum::<f64>() >= all).then_some(())
        })
        .await;
    let away = store.path.with_extension("away");
    for _ in 0..5 {
        for (from, to, connected) in [(&store.path, &away, 0.0), (&away, &store.path, 1.0)] {
            fs::rename(from, to).unwrap();
            bridge.shows("dynamo_bridge_source_connected", &[("source", "files")], connected).await;
        }
    }
    for line in
        ["Rejected (discovery truncated)", "Rejected (discovery malformed)", "Cannot read the folder", "Reading"]
    {
        let count = bridge.program.count(line);
        assert!((1..=lines_allowed(start)).contains(&count), "{line}: {count}");
    }
    let longest = bridge.program.lines().iter().map(String::len).max();
    assert!(longest.is_some_and(|length| length < 2000), "{longest:?}");
}

#[tokio::test]
async fn the_folder_may_be_made_later() {
    let mut store = Store::new();
    let bridge = store.bridge("2s").await;
    let connected = ("dynamo_bridge_source_connected", [("source", "files")]);
    bridge.shows(connected.0, &connected.1, 0.0).await;
    store.register(instance(1));
    store.register(card(1, 4096, 64));
    store.resume();
    bridge.shows(connected.0, &connected.1, 1.0).await;
    bridge.shows("llm_workers", &SILENT, 1.0).await;
    store.abandon();
    fs::remove_dir_all(&store.path).unwrap();
    bridge.shows(connected.0, &connected.1, 0.0).await;
    bridge.shows("llm_workers", &SILENT, 0.0).await;
}

#[tokio::test]
async fn both_programs_take_dynamos_own_folder_where_none_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let temporary = [("TMPDIR", folder.path().to_str().unwrap())];
    let mut mock = Program::start(&mut command(env!("CARGO_BIN_EXE_mock_worker"), &["--plane", "zmq"], &temporary));
    mock.says("Serving ").await;
    assert!(folder.path().join("dynamo_store_kv/v1/instances").is_dir());
    let bridge = Bridge::finding(&["--discovery", "file"], &temporary).await;
    bridge.shows("llm_workers", &[("state", "reporting")], 1.0).await;
}

#[tokio::test]
async fn garbage_is_counted_once_and_costs_nobody_else() {
    let mut store = Store::new();
    let cases: [(&str, &[u8], &str); 5] = [
        ("v1/instances/dynamo%2Fbackend%2Fgenerate%2Fa", b"{", "truncated"),
        ("v1/mdc/dynamo%2Fbackend%2Fgenerate%2Fa", b"\"text\"", "wrong_shape"),
        ("v1/event_channels/a", b"\xff\xfe", "malformed"),
        ("v1/mdc/dynamo%2Fbackend%2Fgenerate%2Fb", &vec![b' '; 300 * 1024], "too_large"),
        ("v1/mdc/%zz", b"{}", "malformed"),
    ];
    for (file, content, _) in cases {
        store.write(file, content);
    }
    fs::create_dir(store.path.join("v1/mdc/folder")).unwrap();
    store.register(instance(1));
    store.register(card(1, 4096, 64));
    store.resume();
    let bridge = store.bridge("2s").await;
    bridge.shows("llm_workers", &SILENT, 1.0).await;
    for (_, _, reason) in cases {
        let labels = [("source", "files"), ("topic", "discovery"), ("reason", reason)];
        let count = cases.iter().filter(|(_, _, other)| *other == reason).count();
        bridge.shows("dynamo_bridge_messages_rejected_total", &labels, f64::from(u8::try_from(count).unwrap())).await;
    }
}

#[tokio::test]
async fn what_is_no_folder_ends_the_start_with_a_hint() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let mut program = Program::start(&mut command(
        env!("CARGO_BIN_EXE_metrics"),
        &["--discovery", "file", "--file-kv", path, "--host", "127.0.0.1", "--port", "0"],
        &[],
    ));
    assert_eq!(program.ended().await.code(), Some(1));
    let lines = program.lines();
    assert!(lines.iter().any(|line| line.starts_with(&format!("error: cannot read the folder {path}: "))), "{lines:?}");
}
