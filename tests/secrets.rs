//! Nothing secret is in the log, at any level and whoever writes it.

use serde_json::json;

use crate::support::{Bridge, Etcd, Kube, Nats, Port, Receiver, Via, command};

const TRACE: (&str, &str) = ("DYN_LOG", "trace");

/// In every line so far, libraries' own ones included.
fn holds_none(bridge: &Bridge, secrets: &[&str]) {
    let lines = bridge.program.lines();
    assert!(lines.iter().any(|line| line.contains("TRACE")), "the libraries write too");
    for line in lines {
        for secret in secrets {
            assert!(!line.contains(secret), "{secret} is in: {line}");
        }
    }
}

#[tokio::test]
async fn of_otlp_whether_pushes_arrive_or_not() {
    let nats = Nats::start().await;
    for via in Via::BOTH {
        let port = Port::reserve();
        let receiver = Receiver::start(&["--fail", "2", "--http-status", "401", "--status", "UNAUTHENTICATED"]).await;
        for address in [receiver.address(via), port.address()] {
            let url = format!("http://geheim-user:geheim-word@{address}/?Api-Key=geheim-key#geheim-end");
            let headers = ("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key=geheim-header");
            let hasty = ("OTEL_EXPORTER_OTLP_TIMEOUT", "2000");
            let environment = [TRACE, headers, hasty];
            let mut bridge = Bridge::pushing(nats.url(), &url, via, &environment).await;
            for what in ["metrics", "traces"] {
                let shown = bridge.program.says(&format!("Pushing {what} to http://{address}")).await;
                assert!(shown.contains(" fails: "), "{shown}");
            }
            if address == receiver.address(via) {
                bridge.program.says(" works again").await;
                let pushed = receiver.last(via, "a push", |push| Some(push.header("authorization")?.to_owned())).await;
                // geheim-user:geheim-word
                assert_eq!(pushed, "Basic Z2VoZWltLXVzZXI6Z2VoZWltLXdvcmQ=");
                let key = receiver.last(via, "a push", |push| Some(push.header("x-api-key")?.to_owned())).await;
                assert_eq!(key, "geheim-header");
            }
            assert!(bridge.program.interrupt().await.success());
            holds_none(&bridge, &["geheim", "Z2VoZWlt"]);
        }
    }
}

#[tokio::test]
async fn of_etcd_whether_it_lets_the_bridge_in_or_not() {
    let etcd = Etcd::start().await;
    for arguments in ["user add root:geheim", "user grant-role root root", "auth enable"] {
        etcd.control(&arguments.split(' ').collect::<Vec<_>>()).await;
    }
    let url = etcd.url();
    let environment = [TRACE, ("ETCD_AUTH_USERNAME", "root"), ("ETCD_AUTH_PASSWORD", "geheim")];
    let mut bridge = Bridge::finding(&["--etcd-endpoints", &url], &environment).await;
    bridge.shows("dynamo_bridge_source_connected", &[("source", "etcd")], 1.0).await;
    assert!(bridge.program.interrupt().await.success());
    holds_none(&bridge, &["geheim"]);
}

#[tokio::test]
async fn of_kubernetes_whether_the_server_knows_the_token_or_not() {
    let Some(kube) = Kube::start().await else { return };
    let kubeconfig = kube.kubeconfig("secret.yaml", &json!({"token": "admin-token"}));
    let environment = [TRACE, ("KUBECONFIG", &*kubeconfig)];
    let mut bridge = Bridge::finding(&["--kube-namespace", "default"], &environment).await;
    bridge.shows("dynamo_bridge_source_connected", &[("source", "kubernetes")], 1.0).await;
    assert!(bridge.program.interrupt().await.success());
    holds_none(&bridge, &["admin-token"]);
}

/// Its arguments and variables may be keys; what it complains of is for whoever runs the bridge.
#[tokio::test]
async fn of_a_kubeconfigs_command_that_fails() {
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = folder.path().join("kubeconfig.json");
    let exec = json!({
        "apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never", "command": "sh",
        "args": ["-c", "echo geheim; echo log in first >&2; exit 3", "geheim"],
        "env": [{"name": "KEY", "value": "geheim"}],
    });
    let cluster = json!({"name": "c", "cluster": {"server": "https://127.0.0.1:1"}});
    let context = json!({"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "default"}});
    let user = json!({"name": "u", "user": {"exec": exec}});
    let entries = json!({"current-context": "c", "clusters": [cluster], "contexts": [context], "users": [user]});
    std::fs::write(&kubeconfig, entries.to_string()).unwrap();
    let environment = [TRACE, ("KUBECONFIG", kubeconfig.to_str().unwrap())];
    let options = ["--port", "0", "--discovery", "kubernetes"];
    let mut program = command(env!("CARGO_BIN_EXE_metrics"), &options, &environment);
    let output = program.kill_on_drop(true).output().await.unwrap();
    let written = String::from_utf8(output.stderr).unwrap();
    assert!(written.contains("exit status: 3: log in first") && !written.contains("geheim"), "{written}");
}

#[tokio::test]
async fn of_urls_that_lead_to_nobody() {
    let (folder, port) = (tempfile::tempdir().unwrap(), Port::reserve());
    let url = format!("http://geheim-user:geheim-word@{}", port.address());
    let kubeconfig = folder.path().join("kubeconfig.json");
    let cluster = json!({"name": "c", "cluster": {"server": url}});
    let context = json!({"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "default"}});
    let user = json!({"name": "u", "user": {"username": "u", "password": "geheim"}});
    let entries = json!({"current-context": "c", "clusters": [cluster], "contexts": [context], "users": [user]});
    std::fs::write(&kubeconfig, entries.to_string()).unwrap();
    for options in [
        &["--discovery", "kubernetes", "--kube-connect-timeout", "1s"][..],
        &["--etcd-endpoints", &url],
        &[
            "--etcd-endpoints",
            &port.url(),
            "--etcd-username",
            "u",
            "--etcd-password",
            "geheim",
            "--etcd-connect-timeout",
            "1s",
        ],
        &["--discovery", "file", "--otlp-endpoint", "http://geheim:geheim:1"],
    ] {
        let options = [&["--port", "0"], options].concat();
        let environment = [TRACE, ("KUBECONFIG", kubeconfig.to_str().unwrap())];
        let mut program = command(env!("CARGO_BIN_EXE_metrics"), &options, &environment);
        let output = program.kill_on_drop(true).output().await.unwrap();
        let written = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && !written.is_empty(), "{options:?}: {written}");
        assert!(!written.contains("geheim"), "{options:?}: {written}");
    }
}
