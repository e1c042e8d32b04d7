//! What the bridge costs: `cargo bench`. Compare rows of one run with each other, not runs with each other.

#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use divan::Bencher;
use dynamo_metrics::exposition::Exposition;
use dynamo_metrics::fleet::{
    Answer, Cached, Card, Channel, Entry, Fleet, HitBlocks, HitRate, Limits, Load, Numbered, Observation, Pass,
    PassEvent, Process, Prompt, Rank, Ranks, Registration, Report, RequestId, Routing, RoutingEvent, Rules, Scheduled,
    Snapshot, Source, Step, Topic, WorkerId, WorkerKey,
};
use dynamo_metrics::target::Target;
use dynamo_metrics::wire;
use tokio::runtime::Runtime;
use tokio::sync::watch;

const FLEETS: [u64; 3] = [100, 1_000, 10_000];

fn main() {
    divan::main();
}

const REPLY: &[u8] = include_bytes!("../tests/fixtures/0.5.1/stats.1.json");
const EVENT: &[u8] = include_bytes!("../tests/fixtures/0.5.1/event.namespace.dynamo.kv-hit-rate.1.json");

#[divan::bench]
fn decode_stats_reply() -> usize {
    let reply = wire::decode_stats(divan::black_box(REPLY)).unwrap();
    let loads = reply.endpoints.iter().filter_map(|endpoint| endpoint.data);
    loads.filter_map(|data| wire::decode_load(data.get().as_bytes()).unwrap()).count()
}

#[divan::bench]
fn decode_hit_rate_event() -> HitRate {
    wire::decode_hit_rate("dynamo".into(), divan::black_box(EVENT)).unwrap()
}

const PASS: &[u8] = include_bytes!(
    "../tests/fixtures/1.1.1-cluster/event.namespace.dynamo.component.backend.forward-pass-metrics.2.bin"
);
/// A prompt of 100 tokens, which is six hashes.
const PLACEMENT: &[u8] = include_bytes!(
    "../tests/fixtures/1.1.1-cluster/event.namespace.dynamo.component.backend.active_sequences_events.1.bin"
);

#[divan::bench]
fn decode_forward_pass() -> wire::ForwardPass {
    let envelope = wire::decode_envelope(divan::black_box(PASS)).unwrap();
    wire::decode_forward_pass(None, envelope.payload).unwrap()
}

#[divan::bench]
fn decode_placement() -> Vec<Routing> {
    let envelope = wire::decode_envelope(divan::black_box(PLACEMENT)).unwrap();
    wire::decode_sequences(envelope.payload).unwrap()
}

fn rules() -> Rules {
    let target = Target {
        namespace: "dynamo".parse().unwrap(),
        component: Some("backend".to_owned()),
        endpoint: Some("generate".to_owned()),
    };
    let minute = Duration::from_secs(60);
    Rules {
        target,
        worker_ttl: minute,
        event_ttl: minute,
        request_ttl: Duration::from_secs(600),
        registries: [Source::Etcd].into(),
        zmq: true,
        idle_ttl: Duration::from_secs(300),
        router_estimates: false,
        max_workers: 10_000,
    }
}

fn worker(id: u64) -> WorkerId {
    WorkerId(7_587_884_888_253_033_398 + id)
}

fn key(id: u64) -> WorkerKey {
    WorkerKey { namespace: "dynamo".into(), component: "backend".into(), endpoint: "generate".into(), id: worker(id) }
}

fn answer(id: u64) -> Observation {
    let load = Load {
        active_slots: Some(id % 100),
        total_slots: Some(100),
        active_blocks: Some(id % 1000),
        total_blocks: Some(1000),
        waiting: Some(id % 7),
        cache_usage: Some(0.5),
        prefix_hit_rate: Some(0.25),
        spec_decode: None,
    };
    Observation::Answered(Answer {
        key: key(id),
        process: Process { instance: "ZEryjxSpoPduxFXBBSWqXO".into(), started: None },
        release: None,
        report: Some(Report { rank: Rank(0), load }),
    })
}

fn fleet(workers: u64, now: Instant) -> Fleet {
    let mut fleet = Fleet::new(rules());
    for id in 0..workers {
        fleet.apply(answer(id), now);
    }
    fleet
}

#[divan::bench]
fn fold_an_answer(bencher: Bencher) {
    let now = Instant::now();
    let mut fleet = fleet(10_000, now);
    bencher.with_inputs(|| answer(5_000)).bench_local_values(|answer| fleet.apply(answer, now));
}

#[divan::bench]
fn fold_an_event(bencher: Bencher) {
    let now = Instant::now();
    let mut fleet = fleet(10_000, now);
    let hit = HitRate { namespace: "dynamo".into(), worker: worker(0), blocks: HitBlocks { isl: 40, overlap: 8 } };
    let event = Observation::HitRate { message: message(Topic::KvHitRate, 0), hit };
    bencher.with_inputs(|| event.clone()).bench_local_values(|event| fleet.apply(event, now));
}

fn message(topic: Topic, sequence: u64) -> Numbered {
    Numbered { channel: Channel { source: Source::Zmq, publisher: 7, topic }, sequence }
}

#[divan::bench]
fn fold_a_forward_pass(bencher: Bencher) {
    let now = Instant::now();
    let mut fleet = fleet(10_000, now);
    let scheduled = Scheduled { prefill_requests: 1, prefill_tokens: 100, decode_requests: 30, ..Scheduled::default() };
    let mut counter = 0;
    let passed = || {
        counter += 1;
        Observation::Passed(PassEvent {
            message: message(Topic::ForwardPassMetrics, counter),
            namespace: "dynamo".into(),
            scope: None,
            worker: worker(5_000),
            rank: Rank(0),
            pass: Pass { counter, wall_time: 0.02, scheduled, ..Pass::default() },
        })
    };
    bencher.with_inputs(passed).bench_local_values(|pass| fleet.apply(pass, now));
}

/// A request from its placement to its end, in one event; 1,000 others are in flight.
#[divan::bench]
fn fold_a_request(bencher: Bencher) {
    let now = Instant::now();
    let mut fleet = fleet(10_000, now);
    let card = Card {
        model: "m".into(),
        role: None,
        block_size: Some(16),
        limits: Limits::default(),
        ranks: Ranks { first: Some(0), count: 1 },
    };
    fleet.apply(
        Observation::Registered(Registration { source: Source::Etcd, key: key(5_000), entry: Entry::Card(card) }),
        now,
    );
    let placed = Step::Placed(Prompt { full_blocks: Some(6), cached: Cached::Effective { tokens: 4 } });
    let mut number = 0;
    let mut routed = |steps: &[Step]| {
        number += 1;
        let request = RequestId::of(b"router", &number.to_string());
        let steps = steps.iter().map(|step| Routing {
            request,
            router: None,
            adapter: None,
            worker: worker(5_000),
            step: *step,
        });
        Observation::Routed(RoutingEvent {
            message: message(Topic::ActiveSequences, number),
            namespace: "dynamo".into(),
            steps: steps.collect(),
        })
    };
    for _ in 0..1_000 {
        fleet.apply(routed(&[placed]), now);
    }
    bencher
        .with_inputs(|| routed(&[placed, Step::Prefilled, Step::Freed]))
        .bench_local_values(|request| fleet.apply(request, now));
}

#[divan::bench(args = FLEETS)]
fn publish(bencher: Bencher, workers: u64) {
    let now = Instant::now();
    let mut fleet = fleet(workers, now);
    bencher.bench_local(|| fleet.snapshot(now));
}

/// A pull that finds a refreshed fleet: collect and encode.
#[divan::bench(args = FLEETS)]
fn first_pull(bencher: Bencher, workers: u64) {
    let (runtime, exposition, mut refresh) = pulled(workers);
    bencher.with_inputs(&mut refresh).bench_local_values(|()| runtime.block_on(exposition.current(false)).unwrap());
}

/// A pull of what was encoded before.
#[divan::bench(args = FLEETS)]
fn later_pull(bencher: Bencher, workers: u64) {
    let (runtime, exposition, mut refresh) = pulled(workers);
    refresh();
    bencher.bench_local(|| runtime.block_on(exposition.current(false)).unwrap());
}

fn pulled(workers: u64) -> (Runtime, Exposition, impl FnMut()) {
    let now = Instant::now();
    let mut fleet = fleet(workers, now);
    let (published, snapshots) = watch::channel(Arc::new(Snapshot::default()));
    let (exposition, _) = Exposition::new(snapshots, 10_000).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    (runtime, exposition, move || {
        published.send_replace(Arc::new(fleet.snapshot(now)));
    })
}
