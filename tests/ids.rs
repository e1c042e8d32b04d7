//! Ids that nothing names, that two workers have, that are gone, and that move; and events that name none.

#![expect(clippy::float_cmp, reason = "whole numbers")]

use dynamo_metrics::fleet::{Card, Limits, Ranks, Role, WorkerId, WorkerKey};
use dynamo_metrics::wire;
use serde_json::{Value, json};

use crate::support::dynamo;
use crate::support::event::{PASSES, Publisher, SEQUENCES, add_request, pass, step};
use crate::support::{Bridge, Etcd, Exposition, FakeService, Kube, Nats, Store, endpoint, peers, worker};

const DROPPED: &str = "dynamo_bridge_events_dropped_total";
const REJECTED: &str = "dynamo_bridge_messages_rejected_total";
const RELEASE: &str = "1.6.1";

fn key(namespace: &str, component: &str, id: u64) -> WorkerKey {
    let [namespace, component, endpoint] = [namespace, component, "generate"].map(Into::into);
    WorkerKey { namespace, component, endpoint, id: WorkerId(id) }
}

/// Instance and card of a worker with so many blocks.
fn entries(key: &WorkerKey, blocks: u64) -> [(String, String); 2] {
    let card = Card {
        model: "m".into(),
        role: Some(Role::Aggregated),
        block_size: Some(16),
        limits: Limits { blocks: Some(blocks), slots: Some(8), ..Limits::default() },
        ranks: Ranks { first: Some(0), count: 1 },
    };
    [wire::encode_instance(key), wire::encode_card(key, &card)]
}

impl Etcd {
    async fn join(&self, key: &WorkerKey, blocks: u64) {
        for (path, value) in entries(key, blocks) {
            self.put(&path, &value).await;
        }
    }

    async fn leave(&self, key: &WorkerKey) {
        for (path, _) in entries(key, 1).iter().rev() {
            self.delete(path).await;
        }
    }
}

/// The events of each topic that were given up: `kv_metrics`, passes, routers' words.
fn dropped(metrics: &Exposition) -> [Option<f64>; 3] {
    ["kv_metrics", PASSES, SEQUENCES].map(|topic| metrics.value(DROPPED, &[("topic", topic)]))
}

fn load(worker: u64, blocks: u64) -> Value {
    json!({
        "worker_id": worker, "dp_rank": 0, "active_decode_blocks": null, "active_prefill_tokens": null,
        "kv_used_blocks": blocks,
    })
}

/// A request placed on that worker.
fn placed(worker: u64, request: &str) -> Value {
    step(9, request, worker, &add_request(&json!([1, 2]), &json!(4)))
}

#[tokio::test]
async fn events_of_an_id_that_nothing_registers_are_counted_and_their_place_is_said() {
    let (nats, etcd) = (Nats::start().await, Etcd::start().await);
    let options = ["--etcd-endpoints", &etcd.url(), "--nats-server", nats.url(), "--event-ttl", "1s"];
    let mut bridge = Bridge::finding(&options, &[]).await;
    let leader = key("dynamo", "backend", 31);
    etcd.join(&leader, 100).await;
    bridge.shows("llm_kv_blocks_total", &worker("31"), 100.0).await;
    let client = nats.client().await;
    let (mut loads, mut passes) = (Publisher::new(&client, 7, "kv_metrics"), Publisher::new(&client, 8, PASSES));
    let mut router = Publisher::new(&client, 9, SEQUENCES);
    for counter in 1..=5 {
        passes.publish(&pass(99, counter, 100)).await;
    }
    loads.publish(&load(99, 1)).await;
    loads.publish(&load(99, 2)).await;
    router.publish(&placed(99, "one")).await;
    let metrics = bridge
        .eventually("all of them", |metrics| (dropped(metrics) == [2.0, 5.0, 1.0].map(Some)).then(|| metrics.clone()))
        .await;
    assert_eq!(metrics.values("llm_forward_passes_total", &[]), [] as [f64; 0], "they are not the only worker's");
    bridge.program.says("under worker id 99, which publishes for dynamo/backend/generate (5 of forward-pass-metrics, 1 of kv_metrics)").await;
}

#[tokio::test]
async fn a_real_node_that_registers_no_endpoint_is_named_in_the_log_and_its_passes_are_not_the_leaders() {
    if !peers::can_run_dynamo(&[RELEASE]).await {
        return;
    }
    let etcd = Etcd::start().await;
    let mut bridge = Bridge::finding(&["--etcd-endpoints", &etcd.url(), "--event-ttl", "2s"], &[]).await;
    let leader = dynamo::today(RELEASE, &etcd.url(), &["--model", "m", "--fpm"]).await;
    let node = dynamo::today(RELEASE, &etcd.url(), &["--publish-only"]).await;
    bridge
        .eventually("the leader's passes, and the node's", |metrics| {
            let [_, passes, _] = dropped(metrics);
            (!metrics.values("llm_forward_passes_total", &worker(&leader.id)).is_empty() && passes > Some(0.0))
                .then_some(())
        })
        .await;
    bridge.program.says(&format!("under worker id {}, which publishes for dynamo/backend/generate", node.id)).await;
    let metrics = bridge.metrics().await;
    assert_eq!(metrics.label_values("worker_id"), [&*leader.id], "{}", metrics.text);
}

#[tokio::test]
async fn a_real_engine_that_publishes_under_an_empty_id_is_the_worker_that_has_its_channel() {
    if !peers::can_run_dynamo(&[RELEASE]).await {
        return;
    }
    let etcd = Etcd::start().await;
    let bridge = Bridge::finding(&["--etcd-endpoints", &etcd.url()], &[]).await;
    let restored = dynamo::today(RELEASE, &etcd.url(), &["--model", "m", "--fpm", "--fpm-id", ""]).await;
    let metrics = bridge
        .eventually("its passes", |metrics| {
            let passes = metrics.value("llm_forward_passes_total", &worker(&restored.id));
            (passes > Some(0.0)).then(|| metrics.clone())
        })
        .await;
    assert_eq!(metrics.values(REJECTED, &[("topic", PASSES)]).iter().sum::<f64>(), 0.0);
}

#[tokio::test]
async fn a_real_engine_of_an_empty_id_in_a_folder_is_rejected_with_its_address() {
    if !peers::can_run_dynamo(&[RELEASE]).await {
        return;
    }
    let store = Store::new();
    let mut bridge = store.bridge("20s").await;
    let options = ["--model", "m", "--fpm", "--fpm-id", ""];
    let _restored = dynamo::in_folder(RELEASE, store.path.to_str().unwrap(), &options).await;
    let rejected = "worker_id is empty, and discovery does not tell whose channel it is (publisher ";
    let line = bridge.program.says(rejected).await;
    assert!(line.contains(" at tcp://127.0.0.1:"), "{line}");
    bridge
        .eventually("the rejections", |metrics| {
            let labels = [("reason", "out_of_range"), ("source", "zmq"), ("topic", PASSES)];
            (metrics.value(REJECTED, &labels) > Some(0.0)).then_some(())
        })
        .await;
}

#[tokio::test]
async fn in_kubernetes_the_channel_is_that_of_the_worker_in_whose_resource_it_stands() {
    const PUBLISHER: u64 = 0x51;
    let Some(kube) = Kube::start().await else { return };
    let nats = Nats::start().await;
    let mut bridge = Bridge::in_cluster(&kube, &["--nats-server", nats.url()]).await;
    let worker_key = key("dynamo", "backend", 31);
    let [instance, card] = entries(&worker_key, 100);
    let channel = wire::encode_channel(&worker_key, PASSES, PUBLISHER, "tcp://127.0.0.1:1");
    let map = |prefix: &str, (path, value): (String, String)| {
        let value: Value = serde_json::from_str(&value).unwrap();
        json!({ path.strip_prefix(prefix).unwrap(): value })
    };
    let data = json!({
        "endpoints": map("v1/instances/", instance), "model_cards": map("v1/mdc/", card),
        "event_channels": map("v1/event_channels/", channel),
    });
    let uid = kube.pod("w0").await;
    kube.register("w0", ("w0", &uid), data).await;
    kube.slice("w0", &uid, true).await;
    bridge.shows("llm_kv_blocks_total", &worker("31"), 100.0).await;
    bridge.shows("dynamo_bridge_scrape_success", &[], 1.0).await;
    // Nobody listens there, and it is tried once the channel is known.
    bridge.program.says("ZMQ tcp://127.0.0.1:1").await;
    let mut unnamed = pass(31, 1, 100);
    unnamed["worker_id"] = json!("");
    Publisher::new(&nats.client().await, PUBLISHER, PASSES).publish(&unnamed).await;
    bridge.shows("llm_forward_passes_total", &worker("31"), 1.0).await;
}

/// A lease, and the id of the worker that has it.
async fn lease(etcd: &Etcd) -> (String, u64) {
    let granted = etcd.control(&["lease", "grant", "600"]).await;
    let lease = granted.split_whitespace().nth(1).unwrap().to_owned();
    let id = u64::from_str_radix(&lease, 16).unwrap();
    (lease, id)
}

#[tokio::test]
async fn passes_of_no_id_on_nats_are_those_of_the_lease_and_a_bad_one_names_its_publisher() {
    const PUBLISHER: u64 = 0x51;
    let (nats, etcd) = (Nats::start().await, Etcd::start().await);
    let options = ["--etcd-endpoints", &etcd.url(), "--nats-server", nats.url()];
    let mut bridge = Bridge::finding(&options, &[]).await;
    let mut passes = Publisher::new(&nats.client().await, PUBLISHER, PASSES);
    let mut unnamed = pass(31, 1, 100);
    unnamed["worker_id"] = json!("");
    bridge.shows("dynamo_bridge_scrape_success", &[], 1.0).await;
    passes.publish(&unnamed).await;
    let labels = [("reason", "out_of_range"), ("source", "nats"), ("topic", PASSES)];
    bridge.shows(REJECTED, &labels, 1.0).await;
    let place = "(publisher 51 at namespace.dynamo.component.backend.endpoint.generate.forward-pass-metrics)";
    bridge.program.says(&format!("does not tell whose channel it is {place}")).await;

    let (lease, id) = lease(&etcd).await;
    let worker_key = key("dynamo", "backend", id);
    let (channel, value) = wire::encode_channel(&worker_key, PASSES, PUBLISHER, "tcp://127.0.0.1:1");
    let value = value.replace("\"Zmq\"", "\"Nats\"");
    for (path, value) in [(channel, value)].into_iter().chain(entries(&worker_key, 100)) {
        etcd.control(&["put", "--lease", &lease, "--", &path, &value]).await;
    }
    let id = id.to_string();
    bridge.shows("llm_kv_blocks_total", &worker(&id), 100.0).await;
    passes.publish(&unnamed).await;
    bridge.shows("llm_forward_passes_total", &worker(&id), 1.0).await;
    unnamed["worker_id"] = json!("thirty-one");
    passes.publish(&unnamed).await;
    let metrics = bridge.shows(REJECTED, &labels, 2.0).await;
    assert_eq!(metrics.value("llm_forward_passes_total", &worker(&id)), Some(1.0), "it costs itself alone");
}

#[tokio::test]
async fn with_nats_alone_an_event_does_not_bring_back_a_worker_that_has_left() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let bridge = Bridge::start(nats.url(), &["--worker-ttl", "500ms"]).await;
    let endpoints = [endpoint("dynamo_backend.generate-1f", "null")];
    let service = FakeService::start(&client, "one", &endpoints).await;
    bridge.shows("llm_workers", &[("state", "silent")], 1.0).await;
    drop(service);
    bridge.shows("llm_workers", &[("state", "silent")], 0.0).await;
    let event = |blocks: u64| format!(r#"{{"worker_id":31,"data":{{"kv_stats":{{"kv_active_blocks":{blocks}}}}}}}"#);
    let publish = async |blocks| {
        client.publish("namespace.dynamo.kv_metrics", event(blocks).into()).await.unwrap();
        client.flush().await.unwrap();
    };
    publish(7).await;
    let scrapes = |metrics: &Exposition| metrics.value("dynamo_bridge_scrape_duration_seconds_count", &[]).unwrap();
    let heard = bridge.shows("dynamo_bridge_events_total", &[("topic", "kv_metrics")], 1.0).await;
    // Those that began before it was heard prove nothing.
    let metrics = bridge
        .eventually("more scrapes", |metrics| (scrapes(metrics) >= scrapes(&heard) + 5.0).then(|| metrics.clone()))
        .await;
    assert_eq!(metrics.values("llm_kv_blocks_active", &[]), [] as [f64; 0], "{}", metrics.text);
    assert_eq!(metrics.value("dynamo_bridge_workers_by_events_alone", &[]), Some(0.0));

    let _service = FakeService::start(&client, "two", &endpoints).await;
    publish(8).await;
    bridge.shows("llm_kv_blocks_active", &worker("31"), 8.0).await;
}

#[tokio::test]
async fn one_id_in_two_namespaces_is_one_series_and_the_other_is_rejected() {
    let (nats, etcd) = (Nats::start().await, Etcd::start().await);
    let options = ["--etcd-endpoints", &etcd.url(), "--nats-server", nats.url()];
    let mut bridge = Bridge::finding(&options, &[]).await;
    let (old, new) = (key("dynamo-1a2b3c4d", "backend", 31), key("dynamo", "backend", 31));
    etcd.join(&old, 100).await;
    bridge.shows("llm_kv_blocks_total", &worker("31"), 100.0).await;
    etcd.join(&new, 200).await;
    let rejected = [("reason", "duplicate_worker"), ("source", "etcd"), ("topic", "discovery")];
    let metrics = bridge.shows(REJECTED, &rejected, 1.0).await;
    bridge.program.says("is there in dynamo-1a2b3c4d and in dynamo, which the labels do not tell apart").await;
    assert_eq!(metrics.value("llm_kv_blocks_total", &worker("31")), Some(100.0), "the first has the labels");
    assert_eq!(metrics.value("llm_workers", &[("state", "silent")]), Some(1.0));

    let client = nats.client().await;
    let publish = async |namespace: &str, request: &str| {
        let payload = crate::support::event::packed(&placed(31, request));
        let envelope =
            wire::Envelope { publisher: 9, sequence: 0, published_at: 0, topic: SEQUENCES, payload: &payload };
        let subject = format!("namespace.{namespace}.component.backend.endpoint.generate.{SEQUENCES}");
        client.publish(subject, wire::encode_envelope(&envelope).into()).await.unwrap();
        client.flush().await.unwrap();
    };
    bridge.shows("dynamo_bridge_scrape_success", &[], 1.0).await;
    publish("dynamo-1a2b3c4d", "one").await;
    bridge.shows("llm_requests_placed_total", &worker("31"), 1.0).await;
    etcd.leave(&old).await;
    let metrics = bridge.shows("llm_kv_blocks_total", &worker("31"), 200.0).await;
    assert_eq!(metrics.value("llm_requests_placed_total", &worker("31")), Some(1.0), "no count falls");
    publish("dynamo", "two").await;
    bridge.shows("llm_requests_placed_total", &worker("31"), 2.0).await;
}

#[tokio::test]
async fn the_placements_of_an_id_that_changes_its_component_are_counted_where_it_is() {
    let (nats, etcd) = (Nats::start().await, Etcd::start().await);
    let options = ["--etcd-endpoints", &etcd.url(), "--nats-server", nats.url()];
    let bridge = Bridge::finding(&options, &[]).await;
    let (before, after) = (key("dynamo", "backend", 31), key("dynamo", "prefill", 31));
    let at = |component| [("component", component), ("worker_id", "31")];
    let mut router = Publisher::new(&nats.client().await, 9, SEQUENCES);
    etcd.join(&before, 100).await;
    bridge.shows("llm_kv_blocks_total", &at("backend"), 100.0).await;
    bridge.shows("dynamo_bridge_scrape_success", &[], 1.0).await;
    router.publish(&placed(31, "one")).await;
    bridge.shows("llm_requests_placed_total", &at("backend"), 1.0).await;
    etcd.leave(&before).await;
    etcd.join(&after, 200).await;
    bridge.shows("llm_kv_blocks_total", &at("prefill"), 200.0).await;
    router.publish(&placed(31, "two")).await;
    let metrics = bridge.shows("llm_requests_placed_total", &at("prefill"), 1.0).await;
    assert_eq!(metrics.value("llm_requests_placed_total", &at("backend")), Some(1.0), "a count never moves");
}
