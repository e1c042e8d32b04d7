//! What comes from outside is hostile or broken sooner or later.

use std::process::Stdio;

use crate::support::{Bridge, FakeService, Nats, Program, command, endpoint, reply, worker};

const LOAD: &str = r#"{"kv_active_blocks":77}"#;

/// Runs a program of this package that is expected to end by itself: its exit code, and what it wrote.
async fn run(program: &str, options: &[&str], environment: &[(&str, &str)]) -> (i32, String) {
    let output = command(program, options, environment).stdin(Stdio::null()).output().await.unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(text).unwrap())
}

async fn metrics(options: &[&str], environment: &[(&str, &str)]) -> (i32, String) {
    run(env!("CARGO_BIN_EXE_metrics"), options, environment).await
}

#[tokio::test]
async fn each_bad_reply_costs_itself_alone() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let describe = Some("Dynamo component backend in namespace dynamo");
    let good = reply("dynamo_backend", "good", &[endpoint("dynamo_backend.generate-1", LOAD)]);
    let long = format!(r#"{{"name":"dynamo_backend","id":"long","endpoints":[],"x":"{}"}}"#, "x".repeat(1_000_000));
    let stats = [
        "no JSON".to_owned(),
        good[..good.len() / 2].to_owned(),
        long,
        r#"{"name":"dynamo_backend","id":"shape","endpoints":7}"#.to_owned(),
        good.clone(),
        good,
    ];
    let _service = FakeService::saying(&client, "dynamo_backend", "good", describe, &stats).await;
    let endpoints = [
        endpoint("dynamo_backend.generate", LOAD),
        endpoint("dynamo_backend.generate-xyz", LOAD),
        endpoint("dynamo_backend.generate-ffffffffffffffff", LOAD),
        endpoint("dynamo_backend.generate-2", r#"{"kv_active_blocks":-1}"#),
        endpoint("dynamo_backend.generate-3", r#"{"kv_active_blocks":99999999999999999999}"#),
        endpoint("dynamo_backend.gen-4", LOAD),
    ];
    let _odd = FakeService::start(&client, "odd", &endpoints).await;
    let mut bridge = Bridge::start(nats.url(), &[]).await;
    for reason in
        ["malformed", "truncated", "too_large", "wrong_shape", "duplicate_reply", "bad_subject", "out_of_range"]
    {
        let labels = [("topic", "stats"), ("reason", reason)];
        bridge
            .eventually(reason, |metrics| {
                metrics.value("dynamo_bridge_messages_rejected_total", &labels).filter(|count| *count >= 2.0)
            })
            .await;
        bridge.program.says(&format!("Rejected (stats {reason})")).await;
    }
    let metrics = bridge.shows("llm_kv_blocks_active", &worker("1"), 77.0).await;
    assert_eq!(metrics.value("llm_kv_blocks_active", &worker("18446744073709551615")), Some(77.0), "all 64 bits");
    assert_eq!(metrics.values("llm_kv_blocks_active", &[]).len(), 2);
    assert_eq!(metrics.value("llm_workers", &[("state", "silent")]), Some(2.0), "alive, whatever their numbers");
    let complaints = bridge.program.lines().iter().filter(|line| line.contains("Rejected (stats malformed)")).count();
    assert_eq!(complaints, 1, "at most one a minute");
}

#[tokio::test]
async fn of_two_processes_with_one_worker_id_one_is_shown_and_the_other_counted() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let old = reply("dynamo_backend", "old", &[endpoint("dynamo_backend.generate-1", r#"{"kv_active_blocks":1}"#)]);
    let old = old.replace("2026-01-01", "2025-01-01");
    let describe = Some("Dynamo component backend in namespace dynamo");
    let _old = FakeService::saying(&client, "dynamo_backend", "old", describe, &[old]).await;
    let _new =
        FakeService::start(&client, "new", &[endpoint("dynamo_backend.generate-1", r#"{"kv_active_blocks":2}"#)]).await;
    let bridge = Bridge::start(nats.url(), &[]).await;
    bridge
        .eventually("duplicates", |metrics| {
            let labels = [("reason", "duplicate_worker")];
            metrics.value("dynamo_bridge_messages_rejected_total", &labels).filter(|count| *count >= 3.0)
        })
        .await;
    assert_eq!(bridge.metrics().await.values("llm_kv_blocks_active", &[]), [2.0]);
}

#[tokio::test]
async fn each_bad_event_costs_itself_alone() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let _service = FakeService::start(&client, "one", &[endpoint("dynamo_backend.generate-1f", LOAD)]).await;
    let bridge = Bridge::start(nats.url(), &[]).await;
    bridge.shows("llm_workers", &[("state", "reporting")], 1.0).await;
    for event in [
        "?",
        r#"{"worker_id":31"#,
        r#"{"worker_id":31,"isl_blocks":[],"overlap_blocks":0}"#,
        r#"{"worker_id":31,"isl_blocks":-1,"overlap_blocks":0}"#,
        r#"{"worker_id":31,"isl_blocks":1,"overlap_blocks":2}"#,
        r#"{"worker_id":31,"isl_blocks":0,"overlap_blocks":0}"#,
        r#"{"worker_id":31,"isl_blocks":3,"overlap_blocks":0}"#,
    ] {
        client.publish("namespace.dynamo.kv-hit-rate", event.into()).await.unwrap();
    }
    let metrics = bridge.shows("llm_kv_hit_rate_isl_blocks", &worker("31"), 3.0).await;
    for reason in ["malformed", "truncated", "wrong_shape", "out_of_range", "overlap_exceeds_isl"] {
        let labels = [("topic", "kv-hit-rate"), ("reason", reason)];
        assert_eq!(metrics.value("dynamo_bridge_messages_rejected_total", &labels), Some(1.0), "{reason}");
    }
    assert_eq!(metrics.value("llm_kv_hit_rate_request_isl_blocks_count", &[]), Some(2.0));
    assert_eq!(metrics.value("llm_kv_hit_rate_ratio_count", &[]), Some(1.0), "an empty prompt has no ratio");
}

#[tokio::test]
async fn an_unreachable_nats_is_retried_and_then_named_with_what_to_change() {
    let options = ["--nats-server", "nats://user:geheim@127.0.0.1:1", "--nats-connect-timeout", "1s", "--port", "0"];
    let (code, text) = metrics(&options, &[]).await;
    assert_eq!(code, 1);
    assert!(text.contains("NATS at nats://127.0.0.1:1 cannot be reached"), "{text}");
    let last = text.lines().last().unwrap();
    assert!(last.starts_with("error: NATS at nats://127.0.0.1:1 could not be reached within 1s"), "{last}");
    assert!(last.contains("--nats-server [NATS_SERVER]"), "{last}");
    assert!(!text.contains("geheim"), "{text}");
}

#[tokio::test]
async fn wrong_credentials_end_the_process_with_the_names_of_the_variables() {
    let nats = Nats::with_options(&["--user", "u", "--pass", "p"]).await;
    let environment = [("NATS_SERVER", nats.url()), ("NATS_AUTH_USERNAME", "u"), ("NATS_AUTH_PASSWORD", "geheim")];
    let (code, text) = metrics(&["--port", "0"], &environment).await;
    assert_eq!(code, 1);
    let last = text.lines().last().unwrap();
    assert!(last.contains("refused the credentials") && last.contains("NATS_AUTH_PASSWORD"), "{last}");
    assert!(!text.contains("geheim"), "{text}");
    let environment = [("NATS_AUTH_USERNAME", "u"), ("NATS_AUTH_PASSWORD", "p")];
    let bridge = Bridge::watching(nats.url(), &[], &environment).await;
    bridge.shows("dynamo_bridge_source_connected", &[("source", "nats")], 1.0).await;
}

#[tokio::test]
async fn a_port_in_use_is_named_with_the_option_to_change() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (code, text) = metrics(&["--host", "127.0.0.1", "--port", &port], &[]).await;
    assert_eq!(code, 1);
    let last = text.lines().last().unwrap();
    assert!(last.contains(&format!("cannot listen on 127.0.0.1:{port}")) && last.contains("--port"), "{last}");
}

#[tokio::test]
async fn malformed_options_and_variables_are_refused_with_a_hint() {
    for (options, environment, hint) in [
        (&["--poll-interval", "soon"][..], &[][..], "write it like 2, 1s, 500ms"),
        (&["--component", ""], &[], "the name is empty"),
        (&["--endpoint", "a b"], &[], "white space"),
        (&["--poll-intervall", "1s"], &[], "--poll-interval"),
        (&["--port", "99999"], &[], "99999"),
        (&[], &[("DYN_NAMESPACE", " ")], "the name is empty"),
        (&[], &[("NATS_SERVER", ",")], "nats://host:4222"),
        (&["--nats-server", "nats://u:geheim@h:x"], &[], "nats://host:4222"),
    ] {
        let (code, text) = metrics(options, environment).await;
        assert_eq!(code, 2, "{options:?} {environment:?}: {text}");
        assert!(text.contains(hint) && !text.contains("geheim"), "{options:?} {environment:?}: {text}");
    }
    for (variable, value) in [
        ("DYN_LOG", "=nonsense="),
        ("DYN_LOG", "verbose"),
        ("DYN_LOG", "info,async_nats=warning"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "soon"),
        ("NATS_AUTH_CREDENTIALS_FILE", "/nowhere"),
    ] {
        let endpoint = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://127.0.0.1:1");
        let (code, text) = metrics(&["--port", "0", "--host", "127.0.0.1"], &[endpoint, (variable, value)]).await;
        assert_eq!(code, 1, "{variable}: {text}");
        assert!(text.lines().last().unwrap().contains(variable), "{text}");
    }
}

#[tokio::test]
async fn an_empty_variable_is_an_unset_one() {
    let nats = Nats::start().await;
    let environment =
        [("DYN_NAMESPACE", ""), ("NATS_AUTH_TOKEN", ""), ("OTEL_EXPORTER_OTLP_ENDPOINT", ""), ("DYN_LOG", "")];
    let bridge = Bridge::watching(nats.url(), &[], &environment).await;
    bridge.shows("dynamo_bridge_source_connected", &[("source", "nats")], 1.0).await;
}

#[tokio::test]
async fn it_stops_while_it_still_tries_to_connect() {
    let options = ["--nats-server", "nats://127.0.0.1:1", "--port", "0", "--host", "127.0.0.1"];
    let mut program = Program::start(&mut command(env!("CARGO_BIN_EXE_metrics"), &options, &[]));
    program.says("cannot be reached").await;
    assert!(program.interrupt().await.success());
}
