//! Workers that register in Kubernetes, and an API server that fails.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::Uri;
use dynamo_metrics::fleet::{Rank, WorkerId};
use dynamo_metrics::wire::{self, ActiveBlocks, ActiveLoad};
use futures_util::{StreamExt, stream};
use serde_json::{Map, Value, json};

use crate::support::dynamo::{self, DynamoWorker};
use crate::support::registered::{card, instance};
use crate::support::{
    Authority, Bridge, Exposition, Kube, NAMESPACE, Nats, Port, lines_allowed, mock_worker, peers, refusal, within,
    worker,
};

const RESOURCES: (&str, &str) = ("dynamoworkermetadatas", "nvidia.com");
const SLICES: (&str, &str) = ("endpointslices", "discovery.k8s.io");

impl Bridge {
    /// With no more rights than it needs.
    pub async fn in_cluster(kube: &Kube, options: &[&str]) -> Self {
        kube.allow_enough().await;
        Self::with_kubeconfig(&kube.bridge(), options).await
    }

    async fn with_kubeconfig(kubeconfig: &str, options: &[&str]) -> Self {
        let environment = [("KUBECONFIG", kubeconfig), ("DYN_LOG", "debug")];
        Self::finding(&[&["--discovery", "kubernetes"], options].concat(), &environment).await
    }

    async fn counts(&self, state: &str, workers: f64) {
        self.shows("llm_workers", &[("component", "backend"), ("state", state)], workers).await;
    }

    async fn hears_kubernetes(&self, connected: bool) {
        let value = f64::from(u8::from(connected));
        self.shows("dynamo_bridge_source_connected", &[("source", "kubernetes")], value).await;
    }
}

impl Kube {
    async fn allow_enough(&self) {
        let verbs: &[&str] = &["list", "watch"];
        self.allow(&[(RESOURCES.0, RESOURCES.1, verbs), (SLICES.0, SLICES.1, verbs), ("pods", "", verbs)]).await;
    }

    /// A ready pod with its worker; returns its uid.
    async fn worker(&self, name: &str, id: u64) -> String {
        let uid = self.pod(name).await;
        self.register(name, (name, &uid), data(id)).await;
        self.slice(name, &uid, true).await;
        uid
    }
}

/// What a worker and a helper beside it write into their resource.
fn data(id: u64) -> Value {
    let map = |prefix: &str, (key, value): (String, String)| {
        let key = key.strip_prefix(prefix).unwrap().to_owned();
        Map::from_iter([(key, serde_json::from_str(&value).unwrap())])
    };
    let mut endpoints = map("v1/instances/", instance(id));
    let helper = "worker_kv_query_source_1";
    endpoints.insert(
        format!("dynamo/backend/{helper}/{id:x}"),
        json!({"type": "Endpoint", "component": "backend", "endpoint": helper, "namespace": "dynamo", "instance_id": id}),
    );
    json!({"endpoints": endpoints, "model_cards": map("v1/mdc/", card(id, 4096, 64)), "event_channels": null})
}

/// What the bridge says before it gives up.
async fn refused_in_kubernetes(options: &[&str], environment: &[(&str, &str)]) -> String {
    refusal(&[&["--discovery", "kubernetes"], options].concat(), environment).await
}

#[tokio::test]
async fn a_worker_is_there_while_its_own_pod_is_an_endpoint() {
    let Some(kube) = Kube::start().await else { return };
    let uid = kube.worker("w0", 31).await;
    let bridge = Bridge::in_cluster(&kube, &[]).await;
    bridge.counts("silent", 1.0).await;
    bridge.hears_kubernetes(true).await;
    let metrics = bridge.metrics().await;
    let pod = [("k8s_pod_name", "w0"), ("k8s_namespace_name", NAMESPACE), ("model", "tiny/model"), ("worker_id", "31")];
    assert_eq!(metrics.values("llm_worker_info", &pod), [1.0], "{}", metrics.text);
    assert_eq!(metrics.value("llm_kv_blocks_total", &worker("31")), Some(4096.0));
    assert_eq!(metrics.value("llm_requests_total_slots", &worker("31")), Some(64.0));
    assert_eq!(metrics.label_values("endpoint"), ["generate"], "a helper is nobody");

    // Not ready: registered, and nothing more.
    kube.slice("w0", &uid, false).await;
    bridge.counts("not_ready", 1.0).await;
    let metrics = bridge.metrics().await;
    assert_eq!(metrics.values("llm_kv_blocks_total", &[]), [] as [f64; 0]);
    assert_eq!(metrics.value("llm_workers", &[("state", "silent")]), Some(0.0));
    kube.slice("w0", &uid, true).await;
    bridge.counts("silent", 1.0).await;

    // A pod of that name which is not the one that wrote the resource.
    kube.slice("w0", "11111111-2222-3333-4444-555555555555", true).await;
    bridge.loses("llm_worker_info", &[]).await;
    kube.slice("w0", &uid, true).await;
    bridge.counts("silent", 1.0).await;

    kube.delete_slice("w0").await;
    bridge.loses("llm_worker_info", &[]).await;
    kube.slice("w0", &uid, true).await;
    bridge.counts("silent", 1.0).await;
    kube.deregister("w0").await;
    bridge.loses("llm_worker_info", &[]).await;
}

#[tokio::test]
async fn a_worker_that_takes_no_more_requests_drains() {
    let Some(kube) = Kube::start().await else { return };
    let uid = kube.worker("w0", 1).await;
    let bridge = Bridge::in_cluster(&kube, &[]).await;
    bridge.counts("silent", 1.0).await;
    let mut draining = data(1);
    draining["endpoints"] = Value::Null;
    kube.register("w0", ("w0", &uid), draining).await;
    bridge.counts("draining", 1.0).await;
    assert_eq!(bridge.metrics().await.value("llm_kv_blocks_total", &worker("1")), Some(4096.0));
    kube.delete_slice("w0").await;
    bridge.loses("llm_worker_info", &[]).await;
}

/// At once: with a timeout of a day the test would not end.
#[tokio::test]
async fn a_server_of_an_unknown_issuer_ends_the_start_at_once() {
    let Some(kube) = Kube::start().await else { return };
    let (kubeconfig, stranger) = (kube.bridge(), Authority::new());
    let mut entries: Value = serde_json::from_slice(&std::fs::read(&kubeconfig).unwrap()).unwrap();
    entries["clusters"][0]["cluster"]["certificate-authority"] = stranger.certificate().into();
    std::fs::write(&kubeconfig, entries.to_string()).unwrap();
    let refused = refused_in_kubernetes(&["--kube-connect-timeout", "24h"], &[("KUBECONFIG", &kubeconfig)]).await;
    assert!(refused.contains("; check certificate-authority"), "{refused}");
}

#[tokio::test]
async fn in_container_mode_each_container_is_a_worker() {
    let Some(kube) = Kube::start().await else { return };
    let uid = kube.pod("w0").await;
    kube.register("w0", ("w0", &uid), data(1)).await;
    kube.register("w0-engine-1", ("w0", &uid), data(2)).await;
    kube.containers("w0", &[("main", true), ("engine-1", false)]).await;
    let bridge = Bridge::in_cluster(&kube, &["--kube-discovery-mode", "container"]).await;
    bridge.counts("silent", 1.0).await;
    bridge.counts("not_ready", 1.0).await;
    kube.containers("w0", &[("main", true), ("engine-1", true)]).await;
    bridge.counts("silent", 2.0).await;
    let metrics = bridge.metrics().await;
    assert_eq!(metrics.values("llm_worker_info", &[("k8s_pod_name", "w0")]), [1.0, 1.0]);
}

#[tokio::test]
async fn a_bad_resource_costs_itself() {
    let Some(kube) = Kube::start().await else { return };
    kube.worker("good", 1).await;
    let uid = kube.pod("bad").await;
    kube.slice("bad", &uid, true).await;
    let (card, _) = card(2, 0, 0);
    let card = card.strip_prefix("v1/mdc/").unwrap();
    let garbage = json!({"endpoints": "x", "model_cards": {card: {"card_json": 7}, "": null}, "event_channels": ["x"], "other": 1});
    kube.register("bad", ("bad", &uid), garbage).await;
    let bridge = Bridge::in_cluster(&kube, &[]).await;
    bridge.counts("silent", 1.0).await;
    let rejected = [("source", "kubernetes"), ("topic", "discovery"), ("reason", "wrong_shape")];
    // Two maps that are none, and two cards.
    bridge.shows("dynamo_bridge_messages_rejected_total", &rejected, 4.0).await;
    kube.register("bad", ("bad", &uid), data(2)).await;
    bridge.counts("silent", 2.0).await;
    bridge.shows("dynamo_bridge_messages_rejected_total", &rejected, 4.0).await;
}

#[tokio::test]
async fn a_killed_api_server_costs_nobody_and_is_heard_again() {
    let Some(mut kube) = Kube::start().await else { return };
    let uid = kube.worker("w0", 1).await;
    kube.worker("w1", 2).await;
    let bridge = Bridge::in_cluster(&kube, &[]).await;
    bridge.counts("silent", 2.0).await;
    kube.kill().await;
    bridge.hears_kubernetes(false).await;
    bridge.counts("silent", 2.0).await;
    kube.resume().await;
    bridge.hears_kubernetes(true).await;
    bridge.counts("silent", 2.0).await;
    kube.slice("w0", &uid, false).await;
    bridge.counts("not_ready", 1.0).await;
    kube.deregister("w1").await;
    bridge.loses("llm_worker_info", &[]).await;
}

#[tokio::test]
async fn what_happened_while_the_bridge_heard_nothing_is_made_up_for() {
    let Some(kube) = Kube::start().await else { return };
    let uid = kube.worker("w0", 1).await;
    kube.worker("w1", 2).await;
    let bridge = Bridge::in_cluster(&kube, &[]).await;
    bridge.counts("silent", 2.0).await;
    bridge.program.signal("-STOP").await;
    kube.deregister("w1").await;
    kube.worker("w2", 3).await;
    kube.slice("w0", &uid, false).await;
    bridge.program.signal("-CONT").await;
    bridge.counts("not_ready", 1.0).await;
    bridge.shows("llm_worker_info", &[("k8s_pod_name", "w2")], 1.0).await;
    bridge.loses("llm_worker_info", &[("k8s_pod_name", "w1")]).await;
}

#[tokio::test]
async fn a_mute_api_server_is_noticed_and_heard_again() {
    let Some(kube) = Kube::start().await else { return };
    kube.worker("w0", 1).await;
    let bridge = Bridge::in_cluster(&kube, &[]).await;
    bridge.counts("silent", 1.0).await;
    kube.signal("-STOP").await;
    bridge.hears_kubernetes(false).await;
    bridge.counts("silent", 1.0).await;
    kube.signal("-CONT").await;
    bridge.hears_kubernetes(true).await;
    kube.deregister("w0").await;
    bridge.loses("llm_worker_info", &[]).await;
}

#[tokio::test]
async fn rights_that_are_taken_away_later_are_waited_for() {
    let Some(kube) = Kube::start().await else { return };
    kube.worker("w0", 1).await;
    let mut bridge = Bridge::in_cluster(&kube, &[]).await;
    bridge.counts("silent", 1.0).await;
    kube.allow(&[]).await;
    // Those who watch already go on until their watch is renewed.
    bridge.program.says("is forbidden").await;
    bridge.hears_kubernetes(false).await;
    bridge.counts("silent", 1.0).await;
    kube.allow_enough().await;
    bridge.hears_kubernetes(true).await;
}

#[tokio::test]
async fn a_token_that_was_replaced_is_read_again() {
    let Some(mut kube) = Kube::start().await else { return };
    kube.worker("w0", 1).await;
    kube.allow_enough().await;
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "bridge-token").unwrap();
    let kubeconfig = kube.kubeconfig("file.yaml", &json!({"tokenFile": token}));
    let mut bridge = Bridge::with_kubeconfig(&kubeconfig, &[]).await;
    bridge.counts("silent", 1.0).await;
    kube.kill().await;
    kube.rotate("another-token");
    kube.resume().await;
    bridge.program.says("Unauthorized").await;
    std::fs::write(&token, "another-token").unwrap();
    // The client itself reads it once a minute.
    within(Duration::from_secs(90), "the bridge is known again", || async {
        let metrics = bridge.metrics().await;
        let connected = metrics.value("dynamo_bridge_source_connected", &[("source", "kubernetes")]);
        if connected == Some(1.0) { Ok(()) } else { Err(bridge.program.lines().join("\n")) }
    })
    .await;
    kube.worker("w1", 2).await;
    bridge.counts("silent", 2.0).await;
}

#[tokio::test]
async fn more_workers_than_fit_into_one_answer_are_all_there() {
    const WORKERS: u64 = 520;
    let Some(kube) = Kube::start().await else { return };
    let names: Vec<_> = (1..=WORKERS).map(|id| (format!("w{id}"), format!("uid-{id}"), id)).collect();
    stream::iter(&names).for_each_concurrent(16, |(name, uid, id)| kube.register(name, (name, uid), data(*id))).await;
    let pods: Vec<_> = names.iter().map(|(name, uid, _)| (&**name, &**uid, true)).collect();
    kube.slice_of("all", &pods).await;
    let bridge = Bridge::in_cluster(&kube, &[]).await;
    bridge.counts("silent", 520.0).await;
    kube.slice_of("all", &pods[..3]).await;
    bridge.counts("silent", 3.0).await;
}

#[tokio::test]
async fn a_flood_of_bad_resources_takes_a_few_lines() {
    const RESOURCES: u32 = 300;
    let Some(kube) = Kube::start().await else { return };
    let start = Instant::now();
    kube.worker("good", 1).await;
    let names: Vec<_> = (0..RESOURCES).map(|bad| (format!("bad{bad}"), format!("uid-{bad}"))).collect();
    let cards = json!({"dynamo/backend/generate/2": {"card_json": 7}, "x": null});
    let garbage = json!({"endpoints": "x", "model_cards": cards, "event_channels": {"a": {"topic": "kv_metrics"}}});
    stream::iter(&names).for_each_concurrent(16, |(name, uid)| kube.register(name, (name, uid), garbage.clone())).await;
    let pods: Vec<_> = names.iter().map(|(name, uid)| (&**name, &**uid, true)).collect();
    kube.slice_of("all", &pods).await;
    kube.allow_enough().await;
    let bridge = Bridge::finding(&["--discovery", "kubernetes"], &[("KUBECONFIG", &kube.bridge())]).await;
    bridge.counts("silent", 1.0).await;
    let rejected = [("source", "kubernetes"), ("topic", "discovery"), ("reason", "wrong_shape")];
    bridge.shows("dynamo_bridge_messages_rejected_total", &rejected, f64::from(4 * RESOURCES)).await;
    let count = bridge.program.count("Rejected");
    assert!((1..=lines_allowed(start)).contains(&count), "{count}");
}

/// A server that says in the middle of the first watches of resources that their version is too old: `410 Gone`.
async fn forgetful_server(watches: usize) -> SocketAddr {
    const TOO_OLD: &str = r#"{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"too old resource version: 1 (2)","reason":"Expired","code":410}}"#;
    let lists = Arc::new(AtomicUsize::new(0));
    let target = json!({"kind": "Pod", "name": "w0", "uid": "uid-0"});
    let slice = json!({
        "metadata": {"name": "s", "resourceVersion": "1"},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.244.0.9"], "conditions": {"ready": true}, "targetRef": target}],
    });
    let owner = json!({"apiVersion": "v1", "kind": "Pod", "name": "w0", "uid": "uid-0"});
    let resource = json!({
        "apiVersion": "nvidia.com/v1alpha1",
        "kind": "DynamoWorkerMetadata",
        "metadata": {"name": "w0", "resourceVersion": "2", "ownerReferences": [owner]},
        "spec": {"data": data(1)},
    });
    let answer = move |uri: Uri| {
        let is_slices = uri.path().ends_with("endpointslices");
        let is_watch = uri.query().is_some_and(|query| query.contains("watch=true"));
        let seen = if is_slices { 1 } else { lists.fetch_add(usize::from(!is_watch), Ordering::Relaxed) };
        let list = |items: &[&Value]| {
            json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items})
                .to_string()
        };
        let body = match (is_watch, seen) {
            (false, 0) => Body::from(list(&[])),
            (false, _) => Body::from(list(&[if is_slices { &slice } else { &resource }])),
            (true, seen) if !is_slices && seen <= watches => Body::from(TOO_OLD),
            (true, _) => Body::from_stream(stream::pending::<Result<Vec<u8>, std::io::Error>>()),
        };
        async { body }
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await });
    address
}

#[tokio::test]
async fn a_version_that_is_too_old_is_made_up_for_by_a_new_list() {
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = plain_kubeconfig(&folder, &format!("http://{}", forgetful_server(1).await));
    let bridge = Bridge::with_kubeconfig(&kubeconfig, &[]).await;
    bridge.counts("silent", 1.0).await;
    bridge.hears_kubernetes(true).await;
}

#[tokio::test]
async fn an_api_server_that_comes_and_goes_takes_a_few_lines() {
    const WATCHES: usize = 6;
    let start = Instant::now();
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = plain_kubeconfig(&folder, &format!("http://{}", forgetful_server(WATCHES).await));
    let bridge = Bridge::with_kubeconfig(&kubeconfig, &[]).await;
    let reconnects = [("source", "kubernetes")];
    bridge.shows("dynamo_bridge_source_reconnects_total", &reconnects, 6.0).await;
    bridge.hears_kubernetes(true).await;
    for line in ["Connected to Kubernetes", "cannot watch"] {
        let count = bridge.program.count(line);
        assert!((1..=lines_allowed(start)).contains(&count), "{line}: {count}");
    }
}

#[tokio::test]
async fn a_bridge_that_has_another_voice_goes_on_without_rights() {
    let Some(kube) = Kube::start().await else { return };
    let nats = Nats::start().await;
    let _mock = mock_worker(nats.url(), &[]).await;
    let kubeconfig = kube.bridge();
    let options = ["--kube-namespace", "default", "--component", "backend", "--endpoint", "generate"];
    let mut bridge = Bridge::watching(nats.url(), &options, &[("KUBECONFIG", &kubeconfig)]).await;
    bridge.program.says("does not let the bridge list").await;
    bridge.counts("reporting", 1.0).await;
    // What could not be looked at names nobody, so that events do.
    let blocks = ActiveBlocks::Used(Some(7));
    let load = wire::encode_active_load_json(&ActiveLoad { worker: WorkerId(31), rank: Rank(0), blocks });
    let client = nats.client().await;
    client.publish("namespace.dynamo.kv_metrics", load.into()).await.unwrap();
    client.flush().await.unwrap();
    bridge.shows("llm_kv_blocks_active", &worker("31"), 7.0).await;
    bridge.shows("dynamo_bridge_workers_by_events_alone", &[], 1.0).await;
}

#[tokio::test]
async fn the_namespace_is_that_of_the_option_else_of_the_kubeconfigs_context() {
    let Some(kube) = Kube::start().await else { return };
    let file = kube.bridge();
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    config["contexts"][0]["context"]["namespace"] = json!("of-the-context");
    std::fs::write(&file, config.to_string()).unwrap();
    for (options, namespace) in [(&[][..], "of-the-context"), (&["--kube-namespace", "of-the-option"], "of-the-option")]
    {
        // It has no rights anywhere.
        let refused = refused_in_kubernetes(options, &[("KUBECONFIG", &file)]).await;
        assert!(refused.contains(&format!(" in namespace {namespace}: ")), "{refused}");
    }
}

#[tokio::test]
async fn a_role_that_lacks_a_verb_ends_the_start_with_that_verb() {
    let Some(kube) = Kube::start().await else { return };
    let kubeconfig = kube.bridge();
    let both: &[&str] = &["list", "watch"];
    for (verbs, of_slices, missing) in [
        (&["watch"][..], both, "list dynamoworkermetadatas.nvidia.com"),
        (&["list"], both, "watch dynamoworkermetadatas.nvidia.com"),
        (both, &["watch"], "list endpointslices.discovery.k8s.io"),
        (both, &["list"], "watch endpointslices.discovery.k8s.io"),
    ] {
        kube.allow(&[(RESOURCES.0, RESOURCES.1, verbs), (SLICES.0, SLICES.1, of_slices)]).await;
        let refused = refused_in_kubernetes(&[], &[("KUBECONFIG", &kubeconfig)]).await;
        assert!(refused.contains(&format!("let the bridge {missing} in namespace default")), "{refused}");
        let needed = "a Role with the verbs list and watch on dynamoworkermetadatas.nvidia.com and endpointslices.discovery.k8s.io";
        assert!(refused.contains(needed), "{refused}");
    }
    let of_its_pod = [("KUBECONFIG", &*kubeconfig), ("POD_NAMESPACE", "elsewhere")];
    let refused = refused_in_kubernetes(&[], &of_its_pod).await;
    assert!(refused.contains(" in namespace elsewhere"), "{refused}");
}

/// Of a server that wants no credentials.
fn plain_kubeconfig(folder: &tempfile::TempDir, server: &str) -> String {
    let config = json!({
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
        "users": [{"name": "u", "user": {}}],
        "current-context": "c",
    });
    let file = folder.path().join("plain.yaml");
    std::fs::write(&file, config.to_string()).unwrap();
    file.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn without_a_cluster_the_start_ends_with_what_to_change() {
    let change = "; set KUBECONFIG to a kubeconfig, or run the bridge in a pod";
    let refused = refused_in_kubernetes(&[], &[]).await;
    assert!(refused.contains("KUBECONFIG is not set: ") && refused.ends_with(change), "{refused}");
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(file("broken.yaml"), "users: [{name: u, user: {token: geheim}}\nclusters: {").unwrap();
    std::fs::write(file("empty.yaml"), "").unwrap();
    // No file at all, and one that cannot be read by anybody: a folder.
    for name in ["broken.yaml", "empty.yaml", "absent.yaml", ""] {
        let refused = refused_in_kubernetes(&[], &[("KUBECONFIG", &file(name))]).await;
        assert!(refused.contains(&format!("KUBECONFIG={}: failed to ", file(name))), "{refused}");
        assert!(!refused.contains("geheim") && refused.ends_with(change), "{refused}");
    }

    let nobody = Port::reserve();
    let file = plain_kubeconfig(&folder, &nobody.url());
    let refused = refused_in_kubernetes(&["--kube-connect-timeout", "1s"], &[("KUBECONFIG", &file)]).await;
    let expected = format!("Kubernetes at {} could not be reached within 1s", nobody.url());
    assert!(refused.contains(&expected) && refused.contains("Connection refused"), "{refused}");
}

#[tokio::test]
async fn a_token_that_nobody_knows_ends_the_start() {
    let Some(kube) = Kube::start().await else { return };
    let kubeconfig = kube.kubeconfig("unknown.yaml", &json!({"token": "geheim"}));
    let refused = refused_in_kubernetes(&[], &[("KUBECONFIG", &kubeconfig)]).await;
    assert!(refused.contains("refused the credentials: Unauthorized") && !refused.contains("geheim"), "{refused}");
}

#[tokio::test]
async fn dynamos_operator_may_come_later() {
    let Some(kube) = Kube::without_dynamo().await else { return };
    let mut bridge = Bridge::in_cluster(&kube, &[]).await;
    bridge.program.says("knows no dynamoworkermetadatas.nvidia.com").await;
    kube.define().await;
    kube.worker("w0", 1).await;
    bridge.counts("silent", 1.0).await;
    bridge.hears_kubernetes(true).await;
}

#[tokio::test]
async fn real_workers_of_two_releases_are_found_measured_and_followed() {
    let Some(kube) = Kube::start().await else { return };
    if !peers::can_run_dynamo(&["1.4.2", "1.6.1"]).await {
        return;
    }
    let bridge = Bridge::in_cluster(&kube, &[]).await;
    let start = async |pod: &str, release: &str, namespace: &str, numbers: (f64, f64, f64)| {
        let [active, total, slots] = [numbers.0, numbers.1, numbers.2].map(|number| number.to_string());
        let load = ["--kv-active", &active, "--kv-total", &total, "--total-slots", &slots];
        let options = [&load[..], &["--namespace", namespace, "--flip", "--model", "tiny/model"]].concat();
        let uid = kube.pod(pod).await;
        (dynamo::in_pod(release, &kube, (pod, &uid), &options).await, uid)
    };
    let shown = async |pod: &str, found: &DynamoWorker, numbers| {
        let what = format!("{pod} with {numbers:?}");
        let labels = [("k8s_pod_name", pod), ("worker_id", &found.id)];
        let in_pod = |metrics: &Exposition| metrics.value("llm_worker_info", &labels) == Some(1.0);
        let is_shown = |metrics: &Exposition| found.is_shown(metrics, numbers) && in_pod(metrics);
        bridge.eventually(&what, |metrics| is_shown(metrics).then_some(())).await;
    };
    let (old_numbers, new_numbers) = ((30.0, 300.0, 6.0), (40.0, 400.0, 7.0));
    let ((old, old_uid), (new, new_uid)) =
        tokio::join!(start("old", "1.4.2", "dynamo", old_numbers), start("new", "1.6.1", "dynamo", new_numbers));
    // Registered, but nobody has said that requests reach them.
    assert_eq!(bridge.metrics().await.values("llm_worker_info", &[]), [] as [f64; 0]);
    kube.slice("old", &old_uid, true).await;
    kube.slice("new", &new_uid, true).await;
    shown("old", &old, old_numbers).await;
    shown("new", &new, new_numbers).await;
    assert_eq!(bridge.metrics().await.label_values("endpoint"), ["generate"], "helpers are nobody");

    kube.slice("new", &new_uid, false).await;
    bridge.counts("not_ready", 1.0).await;
    bridge.loses("llm_kv_blocks_active", &[("worker_id", &new.id)]).await;
    kube.slice("new", &new_uid, true).await;
    shown("new", &new, new_numbers).await;

    // A rollout: the operator's next generation of the namespace, in pods of their own.
    let next_numbers = (50.0, 500.0, 8.0);
    let (next, next_uid) = start("next", "1.6.1", "dynamo-1a2b3c4d", next_numbers).await;
    kube.slice("next", &next_uid, true).await;
    shown("next", &next, next_numbers).await;
    for (pod, worker) in [("old", old), ("new", new)] {
        worker.program.kill().await;
        kube.delete_slice(pod).await;
        kube.deregister(pod).await;
        bridge.loses("llm_kv_blocks_total", &[("worker_id", &worker.id)]).await;
        bridge.loses("llm_worker_info", &[("worker_id", &worker.id)]).await;
    }
    shown("next", &next, next_numbers).await;
    bridge.counts("reporting", 1.0).await;
}
