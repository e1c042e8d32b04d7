//! Workers that register in a folder, as on a developer's machine.

use std::fs;

use crate::support::registered::{card, instance};
use crate::support::{Bridge, Program, Store, command, worker};

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
