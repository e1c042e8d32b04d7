//! KV hit rate events.

use crate::support::{Bridge, Exposition, FakeService, Nats, captured, endpoint, mock_worker, reply, worker};

const LOAD: &str = r#"{"kv_active_blocks":77}"#;

async fn publish(client: &async_nats::Client, namespace: &str, event: &str) {
    client.publish(format!("namespace.{namespace}.kv-hit-rate"), event.to_owned().into()).await.unwrap();
    client.flush().await.unwrap();
}

#[tokio::test]
async fn events_are_held_until_their_worker_is_named_and_outlive_it() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let bridge = Bridge::start(nats.url(), &["--worker-ttl", "500ms"]).await;
    bridge.shows("dynamo_bridge_source_connected", &[("source", "nats")], 1.0).await;
    bridge.shows("dynamo_bridge_scrape_success", &[], 1.0).await;
    publish(&client, "dynamo", r#"{"worker_id":31,"isl_blocks":40,"overlap_blocks":8}"#).await;
    publish(&client, "dynamo", r#"{"worker_id":32,"isl_blocks":1,"overlap_blocks":1}"#).await;
    let metrics = bridge.shows("dynamo_bridge_events_total", &[("topic", "kv-hit-rate")], 2.0).await;
    assert_eq!(metrics.value("llm_kv_hit_rate_isl_blocks", &[]), None, "nobody has named the id yet");

    let service = FakeService::start(&client, "one", &[endpoint("dynamo_backend.generate-1f", LOAD)]).await;
    let metrics = bridge.shows("llm_kv_hit_rate_isl_blocks", &worker("31"), 40.0).await;
    assert_eq!(metrics.value("llm_kv_hit_rate_overlap_blocks", &worker("31")), Some(8.0));
    assert_eq!(metrics.value("llm_kv_hit_rate_ratio_bucket", &[("le", "0.15")]), Some(0.0));
    assert_eq!(metrics.value("llm_kv_hit_rate_ratio_bucket", &[("le", "0.2")]), Some(1.0));
    assert_eq!(metrics.value("llm_kv_hit_rate_request_isl_blocks_sum", &[]), Some(40.0));

    publish(&client, "dynamo", r#"{"worker_id":31,"dp_rank":1,"isl_blocks":10,"overlap_blocks":10}"#).await;
    bridge.shows("llm_kv_hit_rate_isl_blocks", &worker("31"), 50.0).await;

    drop(service);
    bridge.loses("llm_kv_blocks_active", &[]).await;
    publish(&client, "dynamo", r#"{"worker_id":31,"isl_blocks":5,"overlap_blocks":0}"#).await;
    let metrics = bridge.shows("llm_kv_hit_rate_isl_blocks", &worker("31"), 55.0).await;
    assert_eq!(metrics.value("llm_workers", &[("state", "reporting")]), Some(0.0), "an event makes nobody alive");
    assert_eq!(metrics.value("llm_kv_blocks_active", &[]), None);
}

#[tokio::test]
async fn what_nobody_names_and_what_outlived_its_worker_goes_after_the_ttl() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let bridge = Bridge::start(nats.url(), &["--worker-ttl", "500ms", "--event-ttl", "1s"]).await;
    let service = FakeService::start(&client, "one", &[endpoint("dynamo_backend.generate-1f", LOAD)]).await;
    bridge.shows("llm_workers", &[("state", "reporting")], 1.0).await;
    publish(&client, "dynamo", r#"{"worker_id":31,"isl_blocks":40,"overlap_blocks":8}"#).await;
    publish(&client, "dynamo", r#"{"worker_id":99,"isl_blocks":40,"overlap_blocks":8}"#).await;
    bridge.shows("llm_kv_hit_rate_isl_blocks", &worker("31"), 40.0).await;
    bridge.shows("dynamo_bridge_events_dropped_total", &[("topic", "kv-hit-rate")], 1.0).await;
    drop(service);
    let metrics = bridge.loses("llm_kv_hit_rate_isl_blocks", &[]).await;
    assert_eq!(metrics.value("llm_kv_hit_rate_ratio_count", &[]), Some(1.0), "histograms are not by worker, and stay");
}

#[tokio::test]
async fn an_event_belongs_to_the_worker_of_its_own_namespace() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let _mock = mock_worker(nats.url(), &["--passes-per-second", "0", "--seed", "7"]).await;
    let bridge = Bridge::start(nats.url(), &[]).await;
    let id = bridge.eventually("the worker", |metrics| metrics.label_values("worker_id").pop()).await;
    let event = format!(r#"{{"worker_id":{id},"isl_blocks":4,"overlap_blocks":2}}"#);
    publish(&client, "another", &event).await;
    publish(&client, "dynamo-legacy", &event).await;
    publish(&client, "dynamo", &event).await;
    let metrics = bridge.shows("llm_kv_hit_rate_isl_blocks", &worker(&id), 4.0).await;
    let heard = metrics.value("dynamo_bridge_events_total", &[("topic", "kv-hit-rate")]);
    assert_eq!(heard, Some(2.0), "another namespace's is not even counted");
}

#[tokio::test]
async fn a_load_event_belongs_to_the_component_whose_statistics_have_its_worker() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let description = Some("Dynamo component prefill in namespace dynamo");
    let stats = reply("dynamo_prefill", "one", &[endpoint("dynamo_prefill.generate-1f", "null")]);
    let _prefill = FakeService::saying(&client, "dynamo_prefill", "one", description, &[stats]).await;
    let of_target = [endpoint("dynamo_backend.generate-20", "null")];
    let _backend = FakeService::start(&client, "two", &of_target).await;
    let bridge = Bridge::start(nats.url(), &[]).await;
    bridge.shows("llm_workers", &[("state", "silent")], 1.0).await;
    // Of the prefill worker, of the target's, and of one that answers nowhere.
    for (id, blocks) in [(31, 1), (32, 2), (33, 3)] {
        let event = format!(r#"{{"worker_id":{id},"data":{{"kv_stats":{{"kv_active_blocks":{blocks}}}}}}}"#);
        client.publish("namespace.dynamo.kv_metrics", event.into()).await.unwrap();
    }
    let metrics = bridge.shows("llm_kv_blocks_active", &worker("33"), 3.0).await;
    assert_eq!(metrics.values("llm_kv_blocks_active", &[]).len(), 2, "{}", metrics.text);
    assert_eq!(metrics.value("llm_kv_blocks_active", &worker("32")), Some(2.0));
    assert_eq!(metrics.value("dynamo_bridge_workers_by_events_alone", &[]), Some(1.0));
}

#[tokio::test]
async fn hit_rates_of_0_9_that_did_not_come_are_counted_as_missed() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let bridge = Bridge::start(nats.url(), &[]).await;
    bridge.shows("dynamo_bridge_scrape_success", &[], 1.0).await;
    let labels = [("source", "nats"), ("topic", "kv-hit-rate")];
    bridge.shows("dynamo_bridge_events_missed_total", &labels, 0.0).await;
    for number in [1, 2, 5] {
        let file = format!("event.namespace.dynamo.kv-hit-rate.{number}.bin");
        client.publish("namespace.dynamo.kv-hit-rate", captured("0.9.1-cluster", &file).into()).await.unwrap();
    }
    // Their numbers are 0, 1 and 7.
    let metrics = bridge.shows("dynamo_bridge_events_missed_total", &labels, 5.0).await;
    assert_eq!(metrics.value("dynamo_bridge_events_total", &[("topic", "kv-hit-rate")]), Some(3.0));
    assert_eq!(metrics.value("dynamo_bridge_events_complete_ratio", &[("topic", "kv-hit-rate")]), Some(0.375));
}

#[tokio::test]
async fn what_routers_believe_of_a_worker_is_shown_beside_what_it_says_itself_where_that_is_wanted() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    // The worker and the router of the captured events.
    let (id, router) = ("4390624876468394526", "4390624876468394508");
    let _worker =
        FakeService::start(&client, "one", &[endpoint("dynamo_backend.generate-3ceea21007e45a1e", "null")]).await;
    let bridges = [
        Bridge::start(nats.url(), &["--router-estimates", "--request-ttl", "3s"]).await,
        Bridge::start(nats.url(), &[]).await,
    ];
    for bridge in &bridges {
        bridge.shows("llm_workers", &[("state", "silent")], 1.0).await;
    }
    for number in [1, 2] {
        let event = captured("1.1.1-cluster", &format!("event.namespace.dynamo.kv_metrics.{number}.bin"));
        client.publish("namespace.dynamo.kv_metrics", event.into()).await.unwrap();
    }
    for bridge in &bridges {
        bridge.shows("llm_kv_blocks_active", &worker(id), 7.0).await;
    }
    let estimates = ["llm_router_estimated_decode_blocks", "llm_router_estimated_prefill_tokens"];
    let metrics = bridges[0].metrics().await;
    let labels = [&worker(id)[..], &[("publisher_id", router)]].concat();
    assert_eq!(estimates.map(|name| metrics.value(name, &labels)), [Some(6.0), Some(100.0)], "{}", metrics.text);
    let metrics = bridges[1].metrics().await;
    assert_eq!(estimates.map(|name| metrics.values(name, &[]).len()), [0, 0], "not wanted");
    let metrics = bridges[0].loses(estimates[0], &[]).await;
    assert_eq!(metrics.value("llm_kv_blocks_active", &worker(id)), Some(7.0), "only the router is silent");
}

#[tokio::test]
async fn a_topic_that_is_left_out_is_not_heard() {
    let nats = Nats::start().await;
    let _mock = mock_worker(nats.url(), &["--release", "1.6", "--passes-per-second", "50"]).await;
    let bridge = Bridge::start(nats.url(), &["--topics", "kv_metrics"]).await;
    let heard = |topic| move |metrics: &Exposition| metrics.value("dynamo_bridge_events_total", &[("topic", topic)]);
    let metrics = bridge
        .eventually("twenty loads", |metrics| {
            heard("kv_metrics")(metrics).filter(|loads| *loads >= 20.0).map(|_| metrics.clone())
        })
        .await;
    let others = ["forward-pass-metrics", "active_sequences_events"].map(|topic| heard(topic)(&metrics));
    assert_eq!(others, [Some(0.0); 2], "of which as many were published");
}

#[tokio::test]
async fn mock_workers_publish_events_about_themselves() {
    let nats = Nats::start().await;
    let _mock = mock_worker(nats.url(), &["--passes-per-second", "50", "--workers", "2"]).await;
    let bridge = Bridge::start(nats.url(), &[]).await;
    bridge
        .eventually("hits of both workers", |metrics| {
            (metrics.values("llm_kv_hit_rate_isl_blocks", &[]).iter().filter(|blocks| **blocks > 0.0).count() == 2)
                .then_some(())
        })
        .await;
}

#[tokio::test]
async fn what_a_broker_brings_is_counted_where_everybody_sees_it_though_no_discovery_names_it() {
    let nats = Nats::start().await;
    let broker = ["--zmq-broker", "xsub=tcp://127.0.0.1:1,xpub=tcp://127.0.0.1:1"];
    let of_zmq = [("source", "zmq"), ("topic", "forward-pass-metrics")];
    let bridge = Bridge::start(nats.url(), &broker).await;
    bridge.shows("dynamo_bridge_events_missed_total", &of_zmq, 0.0).await;
    let without = Bridge::start(nats.url(), &[]).await;
    let metrics = without.shows("dynamo_bridge_source_connected", &[("source", "nats")], 1.0).await;
    assert_eq!(metrics.value("dynamo_bridge_events_missed_total", &of_zmq), None);
}
