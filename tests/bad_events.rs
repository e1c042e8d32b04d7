//! Events of engines and routers that are broken, hostile or of a release that does not exist, beside good ones.

#![expect(clippy::float_cmp, reason = "whole numbers")]

use serde_json::{Value, json};

use crate::support::event::{self, PASSES, Publisher, SEQUENCES, add_request, pass, step};
use crate::support::{Bridge, Etcd, Exposition, Nats, registered, worker};

const GOOD: u64 = 31;
const UNNAMED: u64 = 99;

/// A bridge that hears NATS, and etcd, where one worker is registered.
struct Fleet {
    nats: Nats,
    etcd: Etcd,
    bridge: Bridge,
}

impl Fleet {
    async fn start() -> Self {
        let (nats, etcd) = (Nats::start().await, Etcd::start().await);
        let options = ["--etcd-endpoints", &etcd.url(), "--nats-server", nats.url()];
        let bridge = Bridge::finding(&options, &[]).await;
        let fleet = Self { nats, etcd, bridge };
        fleet.register(GOOD).await;
        fleet.bridge.shows("dynamo_bridge_scrape_success", &[], 1.0).await;
        fleet.bridge.shows("llm_kv_blocks_total", &worker(&GOOD.to_string()), 100.0).await;
        fleet
    }

    async fn register(&self, id: u64) {
        for (key, value) in [registered::instance(id), registered::card(id, 100, 10)] {
            self.etcd.put(&key, &value).await;
        }
    }

    async fn publisher(&self, id: u64, topic: &'static str) -> Publisher {
        Publisher::new(&self.nats.client().await, id, topic)
    }

    /// Waits until so many messages of a topic were rejected for each reason, and not one for any other.
    async fn rejects(&self, topic: &str, expected: &[(&str, f64)]) -> Exposition {
        self.bridge
            .eventually(&format!("rejections of {topic}: {expected:?}"), |metrics| {
                let labels = [("source", "nats"), ("topic", topic)];
                let of = |reason| metrics.value(REJECTED, &[&labels[..], &[("reason", reason)]].concat());
                let all: f64 = metrics.values(REJECTED, &labels).iter().sum();
                let each = expected.iter().all(|(reason, count)| of(*reason) == Some(*count));
                let sum: f64 = expected.iter().map(|(_, count)| count).sum();
                (each && all == sum).then(|| metrics.clone())
            })
            .await
    }
}

const REJECTED: &str = "dynamo_bridge_messages_rejected_total";

/// The event with another value at a place.
fn with(event: &Value, pointer: &str, value: Value) -> Value {
    let mut event = event.clone();
    *event.pointer_mut(pointer).unwrap() = value;
    event
}

/// The event in bytes, and not a number where `marked` was.
fn not_a_number(event: &Value, pointer: &str) -> Vec<u8> {
    const MARK: f64 = 0.125;
    let mut bytes = event::packed(&with(event, pointer, json!(MARK)));
    let at = bytes.windows(8).position(|window| window == MARK.to_be_bytes()).unwrap();
    bytes[at..at + 8].copy_from_slice(&f64::NAN.to_be_bytes());
    bytes
}

/// Passes, their tokens of prompts and answers, and how many were lost.
fn passes(metrics: &Exposition, id: u64) -> [Option<f64>; 4] {
    [
        "llm_forward_passes_total",
        "llm_forward_pass_prefill_tokens_total",
        "llm_forward_pass_decode_tokens_total",
        "llm_forward_passes_lost_total",
    ]
    .map(|name| metrics.value(name, &worker(&id.to_string())))
}

#[tokio::test]
async fn each_bad_pass_costs_itself_alone() {
    let fleet = Fleet::start().await;
    let (mut engine, mut liar) = (fleet.publisher(7, PASSES).await, fleet.publisher(666, PASSES).await);
    let good = pass(GOOD, 1, 100);
    engine.publish(&good).await;
    liar.publish_raw(b"\xc1".to_vec()).await;
    liar.publish_raw(b"\xdf\x00".to_vec()).await;
    for payload in [
        json!([]),
        json!({}),
        with(&good, "/worker_id", json!(GOOD)),
        with(&good, "/scheduled_requests/sum_prefill_tokens", json!(0.5)),
        with(&good, "/scheduled_requests/sum_prefill_tokens", json!(-1)),
        with(&good, "/queued_requests/num_prefill_requests", json!(-1)),
        with(&good, "/counter_id", json!(u64::MAX)),
        with(&good, "/worker_id", json!("thirty-one")),
        with(&good, "/wall_time", json!(-0.5)),
        with(&good, "/version", json!(2)),
    ] {
        liar.publish(&payload).await;
    }
    liar.publish_bytes(&not_a_number(&good, "/scheduled_requests/sum_prefill_tokens")).await;
    liar.publish_bytes(&not_a_number(&good, "/wall_time")).await;
    let mut more = good.clone();
    more["counter_id"] = json!(2);
    more["of_a_later_release"] = json!({ "nested": [[], {}, null, "x"] });
    engine.publish(&more).await;
    let reasons =
        [("malformed", 1.0), ("truncated", 1.0), ("wrong_shape", 5.0), ("out_of_range", 6.0), ("unknown_version", 1.0)];
    fleet.rejects(PASSES, &reasons).await;
    let metrics = fleet.bridge.shows("llm_forward_passes_total", &[], 2.0).await;
    assert_eq!(passes(&metrics, GOOD), [2.0, 200.0, 6.0, 0.0].map(Some), "{}", metrics.text);
    assert_eq!(metrics.value("llm_forward_pass_wall_time_seconds_sum", &[]), Some(1.0));
}

/// A worker's own load: it has so many blocks in use.
fn used(worker: u64, rank: u32, blocks: u64) -> Value {
    json!({
        "worker_id": worker, "dp_rank": rank, "active_decode_blocks": null, "active_prefill_tokens": null,
        "kv_used_blocks": blocks,
    })
}

/// Greater than any honest number, and one that a message may have.
const LIE: u64 = i64::MAX as u64;

#[tokio::test]
async fn a_lying_pass_costs_itself_and_what_follows_adds_up() {
    let fleet = Fleet::start().await;
    let mut engine = fleet.publisher(7, PASSES).await;
    engine.publish(&pass(GOOD, 1, 100)).await;
    for pointer in ["/scheduled_requests/sum_prefill_tokens", "/scheduled_requests/num_decode_requests"] {
        engine.publish(&with(&pass(GOOD, 2, 100), pointer, json!(LIE))).await;
    }
    engine.publish(&with(&pass(GOOD, 2, 100), "/wall_time", json!(1e300))).await;
    engine.publish(&pass(GOOD, LIE, 100)).await;
    engine.sequence = 1 << 63;
    engine.publish(&pass(GOOD, 2, 100)).await;
    engine.sequence = 100;
    engine.publish(&pass(GOOD, 4, 100)).await;
    fleet.rejects(PASSES, &[("out_of_range", 3.0)]).await;
    let metrics = fleet.bridge.shows("llm_forward_passes_total", &worker(&GOOD.to_string()), 4.0).await;
    assert_eq!(passes(&metrics, GOOD), [4.0, 400.0, 12.0, 1.0].map(Some), "{}", metrics.text);
    assert_eq!(metrics.value("llm_forward_pass_wall_time_seconds_sum", &[]), Some(2.0));
    assert_eq!(metrics.value("dynamo_bridge_events_missed_total", &[("source", "nats"), ("topic", PASSES)]), Some(0.0));
}

#[tokio::test]
async fn blocks_beyond_the_card_are_unknown_until_the_next_load() {
    let fleet = Fleet::start().await;
    let mut engine = fleet.publisher(7, "kv_metrics").await;
    let good = GOOD.to_string();
    let good = worker(&good);
    engine.publish(&used(GOOD, 0, 50)).await;
    fleet.bridge.shows("llm_kv_cache_usage_ratio", &good, 0.5).await;
    engine.publish(&used(GOOD, 0, 99_999)).await;
    let metrics = fleet.rejects("kv_metrics", &[("out_of_range", 1.0)]).await;
    let known = |metrics: &Exposition| {
        ["llm_kv_blocks_active", "llm_kv_cache_usage_ratio", "llm_load_avg"].map(|name| metrics.value(name, &[]))
    };
    assert_eq!(known(&metrics), [None; 3], "{}", metrics.text);
    engine.publish(&used(GOOD, 0, 101)).await;
    let metrics = fleet.bridge.shows("llm_kv_blocks_active", &good, 101.0).await;
    assert_eq!(known(&metrics), [101.0, 1.0, 101.0].map(Some), "a little over is full");
}

#[tokio::test]
async fn ranks_go_with_the_card_and_those_beyond_are_counted() {
    let fleet = Fleet::start().await;
    let good = GOOD.to_string();
    let ranks = |count: u32| {
        let (key, card) = registered::card(GOOD, 100, 10);
        (key, card.replace(r#""data_parallel_size":1"#, &format!(r#""data_parallel_size":{count}"#)))
    };
    let register = async |count| {
        let (key, card) = ranks(count);
        fleet.etcd.put(&key, &card).await;
        fleet.bridge.shows("llm_worker_info", &[("ranks", &count.to_string()), ("worker_id", &good)], 1.0).await
    };
    let mut engine = fleet.publisher(7, "kv_metrics").await;
    register(320).await;
    engine.publish(&used(GOOD, 319, 50)).await;
    fleet.bridge.shows("llm_kv_blocks_active", &[("dp_rank", "319")], 50.0).await;
    let metrics = register(2).await;
    assert_eq!(metrics.values("llm_kv_blocks_total", &[]).len(), 2, "{}", metrics.text);
    engine.publish(&used(GOOD, 319, 50)).await;
    let metrics = fleet.rejects("kv_metrics", &[("unknown_rank", 1.0)]).await;
    assert!(metrics.values("llm_kv_blocks_active", &[]).is_empty(), "{}", metrics.text);
    let metrics = register(2000).await;
    assert_eq!(metrics.values("llm_kv_blocks_total", &[]).len(), 1024);
    engine.publish(&used(GOOD, 1000, 50)).await;
    engine.publish(&used(GOOD, 1999, 50)).await;
    let metrics = fleet.rejects("kv_metrics", &[("unknown_rank", 1.0), ("too_many_ranks", 1.0)]).await;
    assert_eq!(metrics.value("llm_load_known_ratio", &[]), Some(1.0 / 2000.0), "{}", metrics.text);
}

#[tokio::test]
async fn passes_of_a_worker_that_nobody_names_are_held_and_counted_once_when_it_is_named() {
    let fleet = Fleet::start().await;
    let mut engine = fleet.publisher(7, PASSES).await;
    for counter in [1, 2, 4] {
        engine.publish(&pass(UNNAMED, counter, 100)).await;
    }
    let metrics = fleet.bridge.shows("dynamo_bridge_events_total", &[("topic", PASSES)], 3.0).await;
    assert_eq!(passes(&metrics, UNNAMED), [None; 4]);
    fleet.register(UNNAMED).await;
    let id = UNNAMED.to_string();
    let metrics = fleet.bridge.shows("llm_forward_passes_total", &worker(&id), 3.0).await;
    assert_eq!(passes(&metrics, UNNAMED), [3.0, 300.0, 9.0, 1.0].map(Some), "{}", metrics.text);
    assert_eq!(metrics.value("llm_forward_pass_wall_time_seconds_count", &[]), Some(3.0));
    engine.publish(&pass(UNNAMED, 5, 100)).await;
    let metrics = fleet.bridge.shows("llm_forward_passes_total", &worker(&id), 4.0).await;
    assert_eq!(passes(&metrics, UNNAMED), [4.0, 400.0, 12.0, 1.0].map(Some), "{}", metrics.text);
}

/// Requests placed and in flight, and blocks of their prompts and of what was cached of these.
fn placements(metrics: &Exposition, id: u64) -> [Option<f64>; 4] {
    [
        "llm_requests_placed_total",
        "llm_requests_in_flight",
        "llm_kv_hit_rate_isl_blocks",
        "llm_kv_hit_rate_overlap_blocks",
    ]
    .map(|name| metrics.value(name, &worker(&id.to_string())))
}

/// A prompt of six full blocks and a bit, of which two blocks are cached.
fn prompt() -> Value {
    add_request(&json!([1, 2, 3, 4, 5, 6]), &json!(4 * 16 + 4))
}

#[tokio::test]
async fn each_bad_word_of_a_router_costs_itself_alone() {
    const LONG: u64 = 32;
    let fleet = Fleet::start().await;
    fleet.register(LONG).await;
    let (mut router, mut liar) = (fleet.publisher(1, SEQUENCES).await, fleet.publisher(666, SEQUENCES).await);
    router.publish(&step(1, "good", GOOD, &prompt())).await;
    liar.publish_raw(b"\xc1".to_vec()).await;
    for payload in [
        json!([]),
        json!({}),
        step(2, "unknown word", GOOD, &json!("Vanish")),
        step(2, "unknown variant", GOOD, &json!({ "TakeRequest": {} })),
        step(2, "negative", GOOD, &add_request(&json!([1, 2]), &json!(-1))),
        step(2, "not whole", GOOD, &add_request(&json!([1, 2]), &json!(0.5))),
        with(&step(2, "nobody's", GOOD, &prompt()), "/events/0/worker", Value::Null),
        json!({ "events": vec![Value::Null; 10_001] }),
    ] {
        liar.publish(&payload).await;
    }
    // Half of a placement, whose other half never comes.
    liar.publish(&step(2, "half", LONG, &add_request(&Value::Null, &json!(10)))).await;
    liar.publish(&step(2, "half", LONG, &json!("Free"))).await;
    // A prompt of a million blocks is counted, and its hashes are not kept.
    liar.publish(&step(2, "long", LONG, &add_request(&json!([]), &json!(0)))).await;
    let event = event::packed(&step(2, "million", LONG, &add_request(&json!(["here"]), &json!(0))));
    let mark = event::packed(&json!(["here"]));
    let at = event.windows(mark.len()).position(|window| window == mark).unwrap();
    let million = [&[0xdd][..], &1_000_000_u32.to_be_bytes(), &vec![1; 1_000_000]].concat();
    liar.publish_bytes(&[&event[..at], &million, &event[at + mark.len()..]].concat()).await;
    // The hint is larger than the prompt: the request was placed, and has no rate.
    liar.publish(&step(2, "hint", LONG, &add_request(&json!([1, 2]), &json!(1000)))).await;
    liar.publish(&step(2, "hint", LONG, &json!("Free"))).await;
    router.publish(&step(1, "good", GOOD, &json!("Free"))).await;
    router.publish(&step(1, "more", GOOD, &prompt())).await;
    let reasons = [
        ("malformed", 1.0),
        ("wrong_shape", 6.0),
        ("out_of_range", 1.0),
        ("too_many_entries", 1.0),
        ("other_block_size", 1.0),
    ];
    fleet.rejects(SEQUENCES, &reasons).await;
    let metrics = fleet.bridge.shows("llm_requests_placed_total", &worker(&GOOD.to_string()), 2.0).await;
    assert_eq!(placements(&metrics, GOOD), [2.0, 1.0, 14.0, 4.0].map(Some), "{}", metrics.text);
    assert_eq!(placements(&metrics, LONG), [4.0, 2.0, 1e6, 1e6].map(Some), "{}", metrics.text);
}

#[tokio::test]
async fn requests_of_one_name_from_two_routers_are_two_requests() {
    let fleet = Fleet::start().await;
    let (mut one, mut other) = (fleet.publisher(1, SEQUENCES).await, fleet.publisher(2, SEQUENCES).await);
    one.publish(&step(1, "chat", GOOD, &prompt())).await;
    other.publish(&step(2, "chat", GOOD, &prompt())).await;
    let good = GOOD.to_string();
    let metrics = fleet.bridge.shows("llm_requests_placed_total", &worker(&good), 2.0).await;
    assert_eq!(placements(&metrics, GOOD), [2.0, 2.0, 14.0, 4.0].map(Some), "{}", metrics.text);
    one.publish(&step(1, "chat", GOOD, &json!("Free"))).await;
    fleet.bridge.shows("llm_requests_in_flight", &worker(&good), 1.0).await;
    other.publish(&step(2, "chat", GOOD, &json!("Free"))).await;
    fleet.bridge.shows("llm_requests_in_flight", &worker(&good), 0.0).await;
}

#[tokio::test]
async fn placements_on_a_worker_that_nobody_names_are_held_and_judged_once_when_it_is_named() {
    let mut fleet = Fleet::start().await;
    let mut router = fleet.publisher(1, SEQUENCES).await;
    router.publish(&step(1, "good", UNNAMED, &prompt())).await;
    router.publish(&step(1, "hint", UNNAMED, &add_request(&json!([1, 2]), &json!(1000)))).await;
    router.publish(&step(1, "hint", UNNAMED, &json!("Free"))).await;
    let metrics = fleet.bridge.shows("dynamo_bridge_events_total", &[("topic", SEQUENCES)], 3.0).await;
    assert_eq!(placements(&metrics, UNNAMED), [None; 4]);
    fleet.rejects(SEQUENCES, &[]).await;
    fleet.register(UNNAMED).await;
    let metrics = fleet.rejects(SEQUENCES, &[("other_block_size", 1.0)]).await;
    fleet.bridge.program.says("Rejected (active_sequences_events other_block_size)").await;
    assert_eq!(placements(&metrics, UNNAMED), [2.0, 1.0, 7.0, 2.0].map(Some), "{}", metrics.text);
    let mut other = fleet.publisher(2, SEQUENCES).await;
    other.publish(&step(2, "more", UNNAMED, &prompt())).await;
    let metrics = fleet.bridge.shows("llm_requests_placed_total", &worker(&UNNAMED.to_string()), 3.0).await;
    assert_eq!(placements(&metrics, UNNAMED), [3.0, 2.0, 14.0, 4.0].map(Some), "{}", metrics.text);
}

/// A prompt of so many tokens, as a router with blocks of `size` tells of it that believes `cached` blocks of it in the cache.
fn prompt_in(size: usize, tokens: usize, cached: usize) -> Value {
    add_request(&json!(vec![1; tokens / size]), &json!(tokens - cached * size))
}

/// How often the bridge's log says so.
fn lines(fleet: &Fleet, text: &str) -> usize {
    fleet.bridge.program.lines().iter().filter(|line| line.contains(text)).count()
}

#[tokio::test]
async fn a_router_with_larger_blocks_has_no_more_rates_once_a_prompt_shows_it() {
    let mut fleet = Fleet::start().await;
    let (mut larger, mut router) = (fleet.publisher(2, SEQUENCES).await, fleet.publisher(1, SEQUENCES).await);
    // Two of its blocks of 128 are cached, which tells nothing of their size; then none is.
    for (request, cached) in [("warm", 2), ("cold", 0), ("warm again", 2)] {
        larger.publish(&step(2, request, GOOD, &prompt_in(128, 300, cached))).await;
    }
    fleet.rejects(SEQUENCES, &[("other_block_size", 2.0)]).await;
    let metrics = fleet.bridge.shows("llm_requests_placed_total", &worker(&GOOD.to_string()), 3.0).await;
    assert_eq!(placements(&metrics, GOOD), [3.0, 3.0, 3.0, 0.0].map(Some), "the first stays\n{}", metrics.text);
    router.publish(&step(1, "good", GOOD, &prompt())).await;
    let metrics = fleet.bridge.shows("llm_requests_placed_total", &worker(&GOOD.to_string()), 4.0).await;
    assert_eq!(placements(&metrics, GOOD), [4.0, 4.0, 10.0, 2.0].map(Some), "{}", metrics.text);
    assert_eq!(metrics.value("llm_kv_hit_rate_ratio_count", &[]), Some(2.0), "{}", metrics.text);
    let said = fleet.bridge.program.says("router 2 counts in blocks of 100 tokens or more").await;
    assert!(said.contains("worker 31 has blocks of 16") && said.contains("--router-block-size 16"), "{said}");
    assert_eq!(lines(&fleet, "other_block_size"), 1, "once a minute");
}

#[tokio::test]
async fn a_router_apart_has_no_rates_until_a_prompt_shows_that_its_blocks_are_no_smaller() {
    let mut fleet = Fleet::start().await;
    for id in [2, 3] {
        let (key, value) = registered::instance(id);
        let [key, value] = [key, value].map(|text| text.replace("backend", "router"));
        fleet.etcd.put(&key, &value).await;
    }
    // In order with the routers.
    fleet.register(UNNAMED).await;
    fleet.bridge.shows("llm_kv_blocks_total", &worker(&UNNAMED.to_string()), 100.0).await;
    let mut routers = Vec::new();
    for id in [1, 2, 3] {
        routers.push(fleet.publisher(id, SEQUENCES).await);
    }
    let [frontend, smaller, apart] = &mut routers[..] else { unreachable!() };
    // By blocks of 16 half of these prompts would be cached.
    for request in ["a", "b"] {
        smaller.publish(&step(2, request, GOOD, &prompt_in(8, 160, 0))).await;
    }
    let metrics = fleet.rejects(SEQUENCES, &[("other_block_size", 2.0)]).await;
    assert_eq!(placements(&metrics, GOOD), [Some(2.0), Some(2.0), None, None], "{}", metrics.text);
    // Of these too, but a frontend's router has its blocks from the card.
    frontend.publish(&step(1, "a", GOOD, &prompt_in(16, 160, 6))).await;
    apart.publish(&step(3, "warm", GOOD, &prompt_in(16, 160, 6))).await;
    apart.publish(&step(3, "cold", GOOD, &prompt_in(16, 160, 0))).await;
    apart.publish(&step(3, "warm again", GOOD, &prompt_in(16, 160, 6))).await;
    fleet.rejects(SEQUENCES, &[("other_block_size", 3.0)]).await;
    let metrics = fleet.bridge.shows("llm_requests_placed_total", &worker(&GOOD.to_string()), 6.0).await;
    assert_eq!(placements(&metrics, GOOD), [6.0, 6.0, 30.0, 12.0].map(Some), "{}", metrics.text);
    let said = fleet.bridge.program.says("router 2 runs apart from the frontend").await;
    assert!(said.contains("worker 31 has blocks of 16") && said.contains("--router-block-size 16"), "{said}");
}

#[tokio::test]
async fn what_is_published_while_the_connection_is_down_is_missed_and_counted() {
    let mut nats = Nats::start().await;
    let bridge = Bridge::watching(nats.url(), &[], &[]).await;
    bridge.shows("dynamo_bridge_scrape_success", &[], 1.0).await;
    let mut engine = Publisher::new(&nats.client().await, 7, PASSES);
    engine.publish(&pass(GOOD, 1, 100)).await;
    bridge.shows("llm_forward_passes_total", &[], 1.0).await;
    nats.kill().await;
    bridge.shows("dynamo_bridge_source_connected", &[("source", "nats")], 0.0).await;
    nats.restart().await;
    let metrics = bridge.shows("dynamo_bridge_source_reconnects_total", &[("source", "nats")], 1.0).await;
    let scraped = |metrics: &Exposition| metrics.value("dynamo_bridge_last_scrape_timestamp_seconds", &[]);
    bridge.eventually("a scrape", |later| (scraped(later) > scraped(&metrics)).then_some(())).await;
    let mut engine = Publisher::new(&nats.client().await, 7, PASSES);
    engine.sequence = 4;
    engine.publish(&pass(GOOD, 5, 100)).await;
    let metrics = bridge.shows("llm_forward_passes_total", &[], 2.0).await;
    let topic = [("topic", PASSES)];
    let missed = [("source", "nats"), topic[0]];
    assert_eq!(metrics.value("dynamo_bridge_events_missed_total", &missed), Some(3.0));
    assert_eq!(metrics.value("dynamo_bridge_events_complete_ratio", &topic), Some(0.4));
    assert_eq!(metrics.value("llm_forward_passes_lost_total", &[]), Some(3.0), "by the engine's own count too");
}
