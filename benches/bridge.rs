//! What the bridge costs: `cargo bench`. Compare rows of one run with each other, not runs with each other.

#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use divan::Bencher;
use dynamo_metrics::exposition::Exposition;
use dynamo_metrics::fleet::{
    Answer, Channel, Fleet, HitBlocks, HitRate, Load, Numbered, Observation, Process, Rank, Report, Rules, Snapshot,
    Source, Topic, WorkerId, WorkerKey,
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
        idle_ttl: Duration::from_secs(300),
        router_estimates: false,
        max_workers: 10_000,
    }
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
        key: WorkerKey {
            namespace: "dynamo".into(),
            component: "backend".into(),
            endpoint: "generate".into(),
            id: WorkerId(7_587_884_888_253_033_398 + id),
        },
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
    let hit = HitRate {
        namespace: "dynamo".into(),
        worker: WorkerId(7_587_884_888_253_033_398),
        blocks: HitBlocks { isl: 40, overlap: 8 },
    };
    let channel = Channel { source: Source::Nats, publisher: 0, topic: Topic::KvHitRate };
    let event = Observation::HitRate { message: Numbered { channel, sequence: 0 }, hit };
    bencher.with_inputs(|| event.clone()).bench_local_values(|event| fleet.apply(event, now));
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
