//! The log, in the words of the old component.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::process::Stdio;
use std::time::Duration;

use reqwest::Client;
use rustix::io::ioctl_fionbio;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr};

use crate::support::event::{self, PASSES, Publisher};
use crate::support::{Bridge, Exposition, Nats, Port, command, eventually, mock_worker};

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
    for yes in ["1", "TRUE"] {
        let environment = [("DYN_LOG", "metrics=warn,dynamo_metrics=info"), ("DYN_LOGGING_JSONL", yes)];
        let mut bridge = Bridge::watching(nats.url(), &[], &environment).await;
        bridge.program.says("No endpoints found").await;
        for line in bridge.program.lines() {
            let entry: serde_json::Value =
                serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
            let kept = entry["target"] != "metrics" || entry["level"] == "WARN";
            assert!(kept && entry["message"].is_string(), "{line}");
        }
    }
}

#[tokio::test]
async fn the_log_goes_to_standard_error() {
    let nobody = Port::reserve();
    let address = nobody.address();
    let options = ["--host", "127.0.0.1", "--port", "0", "--nats-server", &address, "--nats-connect-timeout", "500ms"];
    let output = command(env!("CARGO_BIN_EXE_metrics"), &options, &[]).output().await.unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|written| String::from_utf8(written).unwrap());
    assert!(stderr.contains(" INFO ") && stderr.contains(" WARN ") && stderr.contains("error: "), "{stderr}");
    assert_eq!(stdout, "");
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

/// The longest that a program may take to answer or to end which nothing holds up.
const DEADLINE: Duration = Duration::from_secs(60);

/// A bridge that writes every line there is to a pipe that is read no further than where it says its address.
async fn unread(nats: &Nats) -> (Child, BufReader<ChildStderr>, String) {
    dynamo_metrics::process::install_crypto();
    // Each scrape makes lines.
    let options = ["--nats-server", nats.url(), "--host", "127.0.0.1", "--port", "0", "--poll-interval", "5ms"];
    let mut command = command(env!("CARGO_BIN_EXE_metrics"), &options, &[("DYN_LOG", "trace")]);
    let mut bridge = command.stderr(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut log = BufReader::new(bridge.stderr.take().unwrap());
    let line = line(&mut log, "Listening on ").await;
    let (_, url) = line.split_once("Listening on ").unwrap();
    (bridge, log, url.to_owned())
}

/// The next line that holds `text`.
async fn line(log: &mut BufReader<ChildStderr>, text: &str) -> String {
    let mut line = String::new();
    while !line.contains(text) {
        line.clear();
        let read = tokio::time::timeout(DEADLINE, log.read_line(&mut line)).await;
        assert!(read.expect("a line").unwrap() > 0, "the log ends without {text}");
    }
    line.trim_end().to_owned()
}

/// Waits until the bridge has left lines out; it answers all the while.
async fn overflow(url: &str) {
    let client = Client::builder().timeout(DEADLINE).build().unwrap();
    let ask = async |path| {
        let answer = client.get(format!("{url}{path}")).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
        answer.text().await.unwrap()
    };
    eventually("lines are left out", || async {
        ask("/livez").await;
        let metrics = Exposition::parse(ask("/metrics").await);
        let dropped = metrics.value("dynamo_bridge_log_lines_dropped_total", &[]);
        if dropped > Some(0.0) { Ok(()) } else { Err(format!("{dropped:?}")) }
    })
    .await;
}

#[tokio::test]
async fn a_log_that_is_not_read_holds_up_nothing_and_says_later_what_it_left_out() {
    let nats = Nats::start().await;
    let (mut bridge, mut log, url) = unread(&nats).await;
    overflow(&url).await;
    let line = line(&mut log, "log lines were left out").await;
    let number = line.split_whitespace().find_map(|word| word.parse::<u64>().ok());
    assert!(line.contains("WARN") && number > Some(0), "{line}");
    bridge.kill().await.unwrap();
}

#[tokio::test]
async fn a_bridge_whose_log_is_not_read_ends_all_the_same() {
    let nats = Nats::start().await;
    let (mut bridge, _log, url) = unread(&nats).await;
    overflow(&url).await;
    let id = bridge.id().unwrap().to_string();
    assert!(tokio::process::Command::new("kill").args(["-TERM", &id]).status().await.unwrap().success());
    assert!(tokio::time::timeout(DEADLINE, bridge.wait()).await.expect("it ends").unwrap().success());
}

#[tokio::test]
async fn a_filter_that_is_no_text_is_refused() {
    let filter = OsStr::from_bytes(b"info,\xff=debug");
    let output = command(env!("CARGO_BIN_EXE_metrics"), &[], &[]).env("DYN_LOG", filter).output().await.unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && said.starts_with("error: DYN_LOG must be"), "{said}");
}

#[tokio::test]
async fn a_failed_start_ends_though_nobody_reads_why() {
    for (options, environment, code) in
        [(&["--port", "nonsense"][..], ("DYN_LOG", "info"), 2), (&[], ("DYN_LOG", "verbose"), 1)]
    {
        let (_reader, mut pipe) = std::io::pipe().unwrap();
        ioctl_fionbio(&pipe, true).unwrap();
        while pipe.write(&[b'.'; 512]).is_ok() {}
        ioctl_fionbio(&pipe, false).unwrap();
        let mut command = command(env!("CARGO_BIN_EXE_metrics"), options, &[environment]);
        let mut bridge = command.stderr(pipe).kill_on_drop(true).spawn().unwrap();
        let ended = tokio::time::timeout(DEADLINE, bridge.wait()).await.expect("it ends").unwrap();
        assert_eq!(ended.code(), Some(code), "{options:?}");
    }
}
