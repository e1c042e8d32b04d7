//! What each metric shows, of a fleet that is made by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use dynamo_metrics::exposition;
use dynamo_metrics::fleet::{
    Card, ConnectionView, Coverage, EndpointCounts, Estimate, Group, GroupView, Health, HitBlocks, HitTotals, Limits,
    Load, LoadStatistics, Measurement, Pass, PassTotals, Queued, Rank, RankPasses, Ranks, Reason, RouterEstimate,
    Scheduled, Scrape, ScrapeOutcome, Snapshot, Source, SpecDecode, SpecDecodeCounts, Topic, WorkerId, WorkerInfo,
    WorkerKey, WorkerLoad, WorkerState,
};
use dynamo_metrics::instruments::CATALOGUE;
use tokio::sync::watch;

use crate::support::Exposition;

/// A fleet of one worker in which no two numbers are alike.
fn distinct() -> Snapshot {
    let key = WorkerKey {
        namespace: "dynamo".into(),
        component: "backend".into(),
        endpoint: "generate".into(),
        id: WorkerId(31),
    };
    let (shared, rank) = (Arc::new(key.clone()), Rank(0));
    let group = Group { namespace: None, component: "backend".into(), endpoint: "generate".into() };
    let counts = |from: u64| SpecDecodeCounts {
        drafts: Some(from),
        draft_tokens: Some(from + 1),
        accepted_tokens: Some(from + 2),
        accepted_per_position: vec![from + 3],
    };
    let load = Load {
        active_slots: Some(1),
        total_slots: Some(2),
        active_blocks: Some(3),
        total_blocks: Some(4),
        waiting: Some(5),
        cache_usage: Some(0.06),
        prefix_hit_rate: Some(0.07),
        spec_decode: Some(SpecDecode { spec_tokens: Some(8), counts: counts(9) }),
    };
    let scheduled = Scheduled {
        prefill_requests: 20,
        prefill_tokens: 21,
        prefill_kv_tokens: 22,
        decode_requests: 23,
        decode_kv_tokens: 24,
    };
    let queued = Queued { prefill_requests: 25, prefill_tokens: 26, decode_requests: 27, decode_kv_tokens: 28 };
    let last = Some(Pass { counter: 29, wall_time: 0.3, scheduled, queued });
    let totals = PassTotals { passes: 31, prefill_tokens: 32, decode_tokens: 33, lost: 34 };
    let topic = Topic::KvMetrics;
    let scrape = |outcome| Scrape { outcome, replies: 0, took: Duration::ZERO, at: UNIX_EPOCH };
    let mut health = Health {
        connections: BTreeMap::from([(
            Source::Nats,
            ConnectionView { connected: true, was_connected: true, reconnects: 70 },
        )]),
        last_scrape: Some(scrape(ScrapeOutcome::Disconnected)),
        last_success: UNIX_EPOCH.checked_add(Duration::from_secs(71)),
        replies: 72,
        events: BTreeMap::from([(topic, 73)]),
        unnamed_events: BTreeMap::from([(topic, 74)]),
        lost: BTreeMap::from([(Source::Nats, 75)]),
        missed: BTreeMap::from([((Source::Nats, topic), 76)]),
        complete: BTreeMap::from([(topic, 0.77)]),
        ..Health::default()
    };
    health.rejected.insert((Source::Nats, topic, Reason::Malformed), 78);
    health.own.http_connections = 83;
    health.own.http_connections_evicted = 84;
    health.own.log_lines_dropped = 85;
    let states = [(WorkerState::Reporting, 50), (WorkerState::Silent, 51)];
    let [draining, not_ready] = [(WorkerState::Draining, 52), (WorkerState::NotReady, 53)];
    let view = GroupView {
        group,
        load: Some(LoadStatistics { average: 54.0, deviation: 55.0 }),
        workers: [states[0], states[1], not_ready, draining],
        coverage: Coverage { known: 56, ranks: 64 },
    };
    let card = Card {
        model: "m".into(),
        role: None,
        block_size: None,
        limits: Limits::default(),
        ranks: Ranks { first: Some(0), count: 1 },
    };
    let info = WorkerInfo { key: Arc::clone(&shared), release: None, card: Some(card), adapters: 57, pod: None };
    let estimate = Estimate { decode_blocks: Some(58), prefill_tokens: Some(59) };
    Snapshot {
        generation: 1,
        loads: vec![WorkerLoad { key: Arc::clone(&shared), rank, is_labelled: false, load }],
        passes: vec![RankPasses { key: Arc::clone(&shared), rank, last, totals }],
        spec_decode: vec![(Arc::clone(&shared), counts(40))],
        infos: vec![info],
        by_events_alone: 60,
        groups: vec![view],
        hits: vec![(Arc::clone(&shared), HitTotals { placed: 61, events: 62, isl: 63, overlap: 64 })],
        in_flight: vec![(Arc::clone(&shared), 65)],
        served: vec![(key, EndpointCounts { requests: Some(66), errors: Some(67), processing: Some(68_000_000_000) })],
        estimates: vec![RouterEstimate { key: shared, rank, is_labelled: false, publisher: Some(1), estimate }],
        health,
        ..Snapshot::default()
    }
}

type Shown = (&'static str, &'static [(&'static str, &'static str)], f64);

/// Every gauge and counter, with what tells its series of the fleet above from its others.
const SHOWN: &[Shown] = &[
    ("llm_requests_active_slots", &[], 1.0),
    ("llm_requests_total_slots", &[], 2.0),
    ("llm_kv_blocks_active", &[], 3.0),
    ("llm_kv_blocks_total", &[], 4.0),
    ("llm_requests_waiting", &[], 5.0),
    ("llm_kv_cache_usage_ratio", &[], 0.06),
    ("llm_kv_hit_rate_percent", &[], 0.07),
    ("llm_spec_decode_draft_length_tokens", &[], 8.0),
    ("llm_forward_pass_scheduled_requests", &[("phase", "prefill")], 20.0),
    ("llm_forward_pass_scheduled_requests", &[("phase", "decode")], 23.0),
    ("llm_forward_pass_scheduled_prefill_tokens", &[], 21.0),
    ("llm_forward_pass_kv_tokens", &[("phase", "prefill")], 22.0),
    ("llm_forward_pass_kv_tokens", &[("phase", "decode")], 24.0),
    ("llm_forward_pass_queued_requests", &[("phase", "prefill")], 25.0),
    ("llm_forward_pass_queued_requests", &[("phase", "decode")], 27.0),
    ("llm_forward_pass_queued_prefill_tokens", &[], 26.0),
    ("llm_forward_pass_queued_decode_kv_tokens", &[], 28.0),
    ("llm_forward_passes_total", &[], 31.0),
    ("llm_forward_pass_prefill_tokens_total", &[], 32.0),
    ("llm_forward_pass_decode_tokens_total", &[], 33.0),
    ("llm_forward_passes_lost_total", &[], 34.0),
    ("llm_spec_decode_drafts_total", &[], 40.0),
    ("llm_spec_decode_draft_tokens_total", &[], 41.0),
    ("llm_spec_decode_accepted_tokens_total", &[], 42.0),
    ("llm_spec_decode_accepted_tokens_per_position_total", &[("position", "0")], 43.0),
    ("llm_workers", &[("state", "reporting")], 50.0),
    ("llm_workers", &[("state", "silent")], 51.0),
    ("llm_workers", &[("state", "draining")], 52.0),
    ("llm_workers", &[("state", "not_ready")], 53.0),
    ("llm_load_avg", &[], 54.0),
    ("llm_load_std", &[], 55.0),
    ("llm_load_known_ratio", &[], 0.875),
    ("llm_worker_info", &[("worker_id", "31"), ("worker_id_hex", "1f")], 1.0),
    ("llm_worker_lora_adapters", &[], 57.0),
    ("llm_router_estimated_decode_blocks", &[], 58.0),
    ("llm_router_estimated_prefill_tokens", &[], 59.0),
    ("llm_requests_placed_total", &[], 61.0),
    ("llm_kv_hit_rate_isl_blocks", &[], 63.0),
    ("llm_kv_hit_rate_overlap_blocks", &[], 64.0),
    ("llm_requests_in_flight", &[], 65.0),
    ("llm_endpoint_requests_total", &[], 66.0),
    ("llm_endpoint_errors_total", &[], 67.0),
    ("llm_endpoint_processing_seconds_total", &[], 68.0),
    ("dynamo_bridge_workers_by_events_alone", &[], 60.0),
    ("dynamo_bridge_source_connected", &[("source", "nats")], 1.0),
    ("dynamo_bridge_source_reconnects_total", &[("source", "nats")], 70.0),
    ("dynamo_bridge_scrape_success", &[], 0.0),
    ("dynamo_bridge_last_scrape_timestamp_seconds", &[], 71.0),
    ("dynamo_bridge_replies_total", &[], 72.0),
    ("dynamo_bridge_events_total", &[("topic", "kv_metrics")], 73.0),
    ("dynamo_bridge_events_dropped_total", &[("topic", "kv_metrics")], 74.0),
    ("dynamo_bridge_messages_lost_total", &[("source", "nats")], 75.0),
    ("dynamo_bridge_events_missed_total", &[("source", "nats"), ("topic", "kv_metrics")], 76.0),
    ("dynamo_bridge_events_complete_ratio", &[("topic", "kv_metrics")], 0.77),
    ("dynamo_bridge_messages_rejected_total", &[("topic", "kv_metrics"), ("reason", "malformed")], 78.0),
    ("dynamo_bridge_http_connections", &[], 83.0),
    ("dynamo_bridge_http_connections_evicted_total", &[], 84.0),
    ("dynamo_bridge_log_lines_dropped_total", &[], 85.0),
    ("dynamo_bridge_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1.0),
];

/// And every histogram, with the sum of what is recorded of it.
const RECORDED: &[(&str, f64)] = &[
    ("llm_kv_hit_rate_ratio", 0.25),
    ("llm_kv_hit_rate_request_isl_blocks", 80.0),
    ("llm_forward_pass_wall_time_seconds", 81.0),
    ("dynamo_bridge_scrape_duration_seconds", 82.0),
];

/// Of the process, which pushes nothing here.
const PUSHES: [&str; 2] = ["dynamo_bridge_pushes_failed_total", "dynamo_bridge_pushes_rejected_items_total"];

#[tokio::test]
async fn each_metric_shows_the_number_that_its_help_names() {
    let (_published, fleet) = watch::channel(Arc::new(distinct()));
    let (exposition, recorder) = exposition::Exposition::new(fleet, 10).unwrap();
    let group = Group { namespace: None, component: "backend".into(), endpoint: "generate".into() };
    recorder.record(&Measurement::HitRate(group.clone(), HitBlocks { isl: 80, overlap: 20 }));
    recorder.record(&Measurement::WallTime(group, 81.0));
    recorder.record(&Measurement::ScrapeDuration(Duration::from_secs(82)));
    let text = exposition.current(false).await.unwrap();
    let metrics = Exposition::parse(String::from_utf8(text.to_vec()).unwrap());
    for (name, labels, value) in SHOWN {
        assert_eq!(metrics.value(name, labels), Some(*value), "{name} {labels:?}");
    }
    for (name, sum) in RECORDED {
        assert_eq!(metrics.value(&format!("{name}_sum"), &[]), Some(*sum), "{name}");
    }
    let shown = SHOWN.iter().map(|(name, ..)| *name).chain(RECORDED.iter().map(|(name, _)| *name));
    let tested: BTreeSet<_> = shown.chain(PUSHES).collect();
    assert_eq!(tested, CATALOGUE.iter().map(|metric| metric.prometheus).collect());
}
