//! The metric catalogue, and its registration on an OpenTelemetry meter.
//!
//! One entry a metric, with two names. The Prometheus name is API: Dynamo's old dashboards know it, and `opentelemetry-prometheus`
//! prints it as it stands. The OTLP name is dotted and has a unit; a test translates it by OpenTelemetry's own rules and
//! finds the first. Values are read from the last [`Snapshot`]: what is not in it has no series.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Histogram, Meter};
use opentelemetry_sdk::metrics::{Instrument, Stream};
use tokio::sync::watch;

use crate::fleet::{
    EndpointCounts, Estimate, Group, HitTotals, Load, MAX_POSITIONS, Measurement, Pass, PassTotals, PushCounts, Rank,
    RankPasses, Reason, Snapshot, Source, SpecDecodeCounts, Topic, WorkerKey, max_ranks,
};

/// Which of a metric's two names is registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// The literal name of the pull endpoint; units are part of it.
    Prometheus,
    /// The dotted name with its unit apart.
    Otlp,
}

/// One metric.
#[derive(Debug)]
pub struct Metric {
    /// Name in the Prometheus exposition.
    pub prometheus: &'static str,
    /// Name in OTLP.
    pub otlp: &'static str,
    /// UCUM unit in OTLP; `{...}` is an annotation without a meaning of its own.
    pub unit: &'static str,
    /// HELP text and OTLP description.
    pub help: &'static str,
    /// Labels, for the documentation; those in brackets only where they say something.
    pub labels: &'static str,
    /// Instrument, and how it gets its values.
    pub kind: Kind,
}

/// Reads one metric's values from the fleet.
type Observe<T> = fn(&Snapshot, &mut dyn FnMut(T, &[KeyValue]));

/// The OpenTelemetry instrument of a metric.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// Observable gauge.
    Gauge(Observe<f64>),
    /// Observable counter, monotonic.
    Counter(Observe<u64>),
    /// Observable counter of fractions, monotonic.
    FractionCounter(Observe<f64>),
    /// Histogram with these upper bounds, recorded as things happen.
    Histogram(&'static [f64]),
}

const WORKER: &str = "component, endpoint, worker_id, [dp_rank], [dynamo_namespace]";
const ROUTER: &str = "component, endpoint, worker_id, [dp_rank], [dynamo_namespace], [publisher_id]";
const RANK: &str = "component, dp_rank, endpoint, worker_id, [dynamo_namespace]";
const RANK_PHASE: &str = "component, dp_rank, endpoint, phase, worker_id, [dynamo_namespace]";
const WORKER_COUNT: &str = "component, endpoint, worker_id, [dynamo_namespace]";
const GROUP: &str = "component, endpoint, [dynamo_namespace]";

/// Steps of 0.05, as Dynamo's own router has them for its hit rate.
const RATIO_BOUNDS: &[f64] = &[
    0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0,
];
/// Powers of two: a prompt of 16 to a million tokens at 16 tokens a block.
const BLOCK_BOUNDS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0,
    65536.0,
];
/// From one worker on loopback to the default timeout of a slow poll.
const SCRAPE_BOUNDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// From a decode pass of a small model to a chunk of prefill on a large one.
const WALL_TIME_BOUNDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

const WALL_TIME: &str = "llm_forward_pass_wall_time_seconds";
const HIT_RATE_RATIO: &str = "llm_kv_hit_rate_ratio";
const HIT_RATE_ISL: &str = "llm_kv_hit_rate_request_isl_blocks";
const SCRAPE_DURATION: &str = "dynamo_bridge_scrape_duration_seconds";
const ACCEPTED_PER_POSITION: &str = "llm_spec_decode_accepted_tokens_per_position_total";

/// Every metric, in the order of the tables in docs/metrics.md.
pub const CATALOGUE: &[Metric] = &[
    Metric {
        prometheus: "llm_kv_blocks_active",
        otlp: "llm.kv.blocks.active",
        unit: "{block}",
        help: "Active KV cache blocks",
        labels: WORKER,
        kind: Kind::Gauge(|fleet, emit| each_load(fleet, emit, |load| load.active_blocks.map(float))),
    },
    Metric {
        prometheus: "llm_kv_blocks_total",
        otlp: "llm.kv.blocks.total",
        unit: "{block}",
        help: "Total KV cache blocks",
        labels: WORKER,
        kind: Kind::Gauge(|fleet, emit| each_load(fleet, emit, |load| load.total_blocks.map(float))),
    },
    Metric {
        prometheus: "llm_requests_active_slots",
        otlp: "llm.requests.active_slots",
        unit: "{request}",
        help: "Active request slots",
        labels: WORKER,
        kind: Kind::Gauge(|fleet, emit| each_load(fleet, emit, |load| load.active_slots.map(float))),
    },
    Metric {
        prometheus: "llm_requests_total_slots",
        otlp: "llm.requests.total_slots",
        unit: "{request}",
        help: "Total request slots",
        labels: WORKER,
        kind: Kind::Gauge(|fleet, emit| each_load(fleet, emit, |load| load.total_slots.map(float))),
    },
    Metric {
        prometheus: "llm_requests_waiting",
        otlp: "llm.requests.waiting",
        unit: "{request}",
        help: "Requests that wait for a slot",
        labels: WORKER,
        kind: Kind::Gauge(|fleet, emit| each_load(fleet, emit, |load| load.waiting.map(float))),
    },
    Metric {
        prometheus: "llm_kv_cache_usage_ratio",
        otlp: "llm.kv.cache.usage",
        unit: "1",
        help: "Share of the KV cache in use, from 0 to 1: as the engine reports it, else active by total blocks",
        labels: WORKER,
        kind: Kind::Gauge(|fleet, emit| each_load(fleet, emit, Load::usage)),
    },
    Metric {
        prometheus: "llm_kv_hit_rate_percent",
        otlp: "llm.kv.hit_rate.percent",
        unit: "",
        help: "Hit rate of the engine's prefix cache, from 0 to 1 in spite of its name",
        labels: WORKER,
        kind: Kind::Gauge(|fleet, emit| each_load(fleet, emit, |load| load.prefix_hit_rate)),
    },
    Metric {
        prometheus: "llm_load_avg",
        otlp: "llm.load.avg",
        unit: "{block}",
        help: "Mean of the active KV cache blocks, over the workers (each data-parallel rank as one) whose value is known",
        labels: GROUP,
        kind: Kind::Gauge(|fleet, emit| each_group_load(fleet, emit, |load| load.average)),
    },
    Metric {
        prometheus: "llm_load_std",
        otlp: "llm.load.std",
        unit: "{block}",
        help: "Population standard deviation of the active KV cache blocks, over the workers whose value is known",
        labels: GROUP,
        kind: Kind::Gauge(|fleet, emit| each_group_load(fleet, emit, |load| load.deviation)),
    },
    Metric {
        prometheus: "llm_workers",
        otlp: "llm.workers",
        unit: "{worker}",
        help: "Workers by state: reporting, once any load was heard since the worker was discovered; silent; not_ready, registered but not reached by requests; draining, deregistered but still computing",
        labels: "component, endpoint, state, [dynamo_namespace]",
        kind: Kind::Gauge(workers),
    },
    Metric {
        prometheus: "llm_load_known_ratio",
        otlp: "llm.load.known",
        unit: "1",
        help: "Share of the workers (each data-parallel rank as one) whose active KV cache blocks are known, from 0 to 1: after a start or a lost event an idle worker has said nothing yet",
        labels: GROUP,
        kind: Kind::Gauge(known),
    },
    Metric {
        prometheus: "llm_worker_info",
        otlp: "llm.worker.info",
        unit: "",
        help: "1, with what is known of a living worker beside its load: from its model card, its pod, and its release where STATS tells it",
        labels: "[block_size], component, dynamo_namespace, endpoint, [k8s_namespace_name], [k8s_pod_name], [model], [ranks], [release], [role], worker_id, worker_id_hex",
        kind: Kind::Gauge(infos),
    },
    Metric {
        prometheus: "llm_worker_lora_adapters",
        otlp: "llm.worker.lora_adapters",
        unit: "{adapter}",
        help: "LoRA adapters that a worker with a model card has loaded",
        labels: WORKER_COUNT,
        kind: Kind::Gauge(adapters),
    },
    Metric {
        prometheus: "llm_kv_hit_rate_isl_blocks",
        otlp: "llm.kv.hit_rate.isl_blocks",
        unit: "{block}",
        help: "KV cache blocks of the prompts that KV routers placed on the worker",
        labels: WORKER_COUNT,
        kind: Kind::Counter(|fleet, emit| each_hits(fleet, emit, |totals| some(totals.events, totals.isl))),
    },
    Metric {
        prometheus: "llm_kv_hit_rate_overlap_blocks",
        otlp: "llm.kv.hit_rate.overlap_blocks",
        unit: "{block}",
        help: "Those of llm_kv_hit_rate_isl_blocks that the worker was believed to hold already",
        labels: WORKER_COUNT,
        kind: Kind::Counter(|fleet, emit| each_hits(fleet, emit, |totals| some(totals.events, totals.overlap))),
    },
    Metric {
        prometheus: "llm_requests_placed_total",
        otlp: "llm.requests.placed",
        unit: "{request}",
        help: "Requests that KV routers placed on the worker; one that is prefilled elsewhere is placed once for each role",
        labels: WORKER_COUNT,
        kind: Kind::Counter(|fleet, emit| each_hits(fleet, emit, |totals| some(totals.placed, totals.placed))),
    },
    Metric {
        prometheus: "llm_requests_in_flight",
        otlp: "llm.requests.in_flight",
        unit: "{request}",
        help: "Requests that KV routers have placed on the worker and not freed yet",
        labels: WORKER_COUNT,
        kind: Kind::Gauge(|fleet, emit| {
            for (key, requests) in &fleet.in_flight {
                emit(float(*requests), &worker_attributes(fleet, key));
            }
        }),
    },
    Metric {
        prometheus: "llm_router_estimated_decode_blocks",
        otlp: "llm.router.estimated_decode_blocks",
        unit: "{block}",
        help: "KV cache blocks that a KV router believes in use on the worker for what it placed there, with --router-estimates; never what the worker says itself. Up to 0.8 routers have no publisher_id and are not told apart",
        labels: ROUTER,
        kind: Kind::Gauge(|fleet, emit| each_estimate(fleet, emit, |estimate| estimate.decode_blocks)),
    },
    Metric {
        prometheus: "llm_router_estimated_prefill_tokens",
        otlp: "llm.router.estimated_prefill_tokens",
        unit: "{token}",
        help: "Prompt tokens that a KV router believes still to be computed on the worker, with --router-estimates",
        labels: ROUTER,
        kind: Kind::Gauge(|fleet, emit| each_estimate(fleet, emit, |estimate| estimate.prefill_tokens)),
    },
    Metric {
        prometheus: HIT_RATE_RATIO,
        otlp: "llm.kv.hit_rate.ratio",
        unit: "1",
        help: "Overlap blocks by isl blocks of each placed request that has any, from 0 to 1",
        labels: GROUP,
        kind: Kind::Histogram(RATIO_BOUNDS),
    },
    Metric {
        prometheus: HIT_RATE_ISL,
        otlp: "llm.kv.hit_rate.request.isl_blocks",
        unit: "{block}",
        help: "KV cache blocks of the prompt of each placed request",
        labels: GROUP,
        kind: Kind::Histogram(BLOCK_BOUNDS),
    },
    Metric {
        prometheus: "llm_forward_pass_scheduled_requests",
        otlp: "llm.forward_pass.scheduled_requests",
        unit: "{request}",
        help: "Requests that the last forward pass computed, by phase (prefill, decode); 0 while the engine is idle",
        labels: RANK_PHASE,
        kind: Kind::Gauge(|fleet, emit| {
            each_phase(fleet, emit, |pass| [pass.scheduled.prefill_requests, pass.scheduled.decode_requests]);
        }),
    },
    Metric {
        prometheus: "llm_forward_pass_queued_requests",
        otlp: "llm.forward_pass.queued_requests",
        unit: "{request}",
        help: "Requests that waited during the last forward pass, by phase (prefill; decode: those preempted). Some engines say it of rank 0 alone",
        labels: RANK_PHASE,
        kind: Kind::Gauge(|fleet, emit| {
            each_phase(fleet, emit, |pass| [pass.queued.prefill_requests, pass.queued.decode_requests]);
        }),
    },
    Metric {
        prometheus: "llm_forward_pass_kv_tokens",
        otlp: "llm.forward_pass.kv_tokens",
        unit: "{token}",
        help: "Tokens that the KV cache held for the requests of the last forward pass, by phase (prefill, decode)",
        labels: RANK_PHASE,
        kind: Kind::Gauge(|fleet, emit| {
            each_phase(fleet, emit, |pass| [pass.scheduled.prefill_kv_tokens, pass.scheduled.decode_kv_tokens]);
        }),
    },
    Metric {
        prometheus: "llm_forward_pass_scheduled_prefill_tokens",
        otlp: "llm.forward_pass.scheduled_prefill_tokens",
        unit: "{token}",
        help: "Prompt tokens that the last forward pass computed",
        labels: RANK,
        kind: Kind::Gauge(|fleet, emit| each_pass(fleet, emit, |pass| pass.scheduled.prefill_tokens)),
    },
    Metric {
        prometheus: "llm_forward_pass_queued_prefill_tokens",
        otlp: "llm.forward_pass.queued_prefill_tokens",
        unit: "{token}",
        help: "Prompt tokens that waited during the last forward pass",
        labels: RANK,
        kind: Kind::Gauge(|fleet, emit| each_pass(fleet, emit, |pass| pass.queued.prefill_tokens)),
    },
    Metric {
        prometheus: "llm_forward_pass_queued_decode_kv_tokens",
        otlp: "llm.forward_pass.queued_decode_kv_tokens",
        unit: "{token}",
        help: "Tokens that the KV cache held for preempted requests during the last forward pass",
        labels: RANK,
        kind: Kind::Gauge(|fleet, emit| each_pass(fleet, emit, |pass| pass.queued.decode_kv_tokens)),
    },
    Metric {
        prometheus: "llm_forward_passes_total",
        otlp: "llm.forward_passes",
        unit: "{pass}",
        help: "Forward passes heard",
        labels: RANK,
        kind: Kind::Counter(|fleet, emit| each_total(fleet, emit, |totals| totals.passes)),
    },
    Metric {
        prometheus: "llm_forward_pass_prefill_tokens_total",
        otlp: "llm.forward_pass.prefill_tokens",
        unit: "{token}",
        help: "Prompt tokens computed; those that the KV cache held already are not among them. Never sum it over roles: decode workers count the prompts that they received again",
        labels: RANK,
        kind: Kind::Counter(|fleet, emit| each_total(fleet, emit, |totals| totals.prefill_tokens)),
    },
    Metric {
        prometheus: "llm_forward_pass_decode_tokens_total",
        otlp: "llm.forward_pass.decode_tokens",
        unit: "{token}",
        help: "Tokens generated by decoding, one a request and pass: without each request's first token, which its prefill makes, and without what speculative decoding adds",
        labels: RANK,
        kind: Kind::Counter(|fleet, emit| each_total(fleet, emit, |totals| totals.decode_tokens)),
    },
    Metric {
        prometheus: WALL_TIME,
        otlp: "llm.forward_pass.wall_time",
        unit: "s",
        help: "Time that each forward pass took; some engines repeat one time for each of their ranks",
        labels: GROUP,
        kind: Kind::Histogram(WALL_TIME_BOUNDS),
    },
    Metric {
        prometheus: "llm_forward_passes_lost_total",
        otlp: "llm.forward_passes.lost",
        unit: "{pass}",
        help: "Forward passes and heartbeats that were not heard, by the gaps in the engine's own count",
        labels: RANK,
        kind: Kind::Counter(|fleet, emit| each_total(fleet, emit, |totals| totals.lost)),
    },
    Metric {
        prometheus: "llm_spec_decode_draft_length_tokens",
        otlp: "llm.spec_decode.draft_length_tokens",
        unit: "{token}",
        help: "Tokens that a draft of speculative decoding proposes",
        labels: WORKER,
        kind: Kind::Gauge(|fleet, emit| {
            each_load(fleet, emit, |load| load.spec_decode.as_ref()?.spec_tokens.map(float));
        }),
    },
    Metric {
        prometheus: "llm_spec_decode_drafts_total",
        otlp: "llm.spec_decode.drafts",
        unit: "{draft}",
        help: "Drafts of speculative decoding, since the bridge first saw the worker",
        labels: WORKER_COUNT,
        kind: Kind::Counter(|fleet, emit| each_spec_decode(fleet, emit, |counts| counts.drafts)),
    },
    Metric {
        prometheus: "llm_spec_decode_draft_tokens_total",
        otlp: "llm.spec_decode.draft_tokens",
        unit: "{token}",
        help: "Tokens drafted, since the bridge first saw the worker",
        labels: WORKER_COUNT,
        kind: Kind::Counter(|fleet, emit| each_spec_decode(fleet, emit, |counts| counts.draft_tokens)),
    },
    Metric {
        prometheus: "llm_spec_decode_accepted_tokens_total",
        otlp: "llm.spec_decode.accepted_tokens",
        unit: "{token}",
        help: "Drafted tokens that were accepted, since the bridge first saw the worker",
        labels: WORKER_COUNT,
        kind: Kind::Counter(|fleet, emit| each_spec_decode(fleet, emit, |counts| counts.accepted_tokens)),
    },
    Metric {
        prometheus: ACCEPTED_PER_POSITION,
        otlp: "llm.spec_decode.accepted_tokens_per_position",
        unit: "{token}",
        help: "Accepted tokens by their position in the draft, the first 16, since the bridge first saw the worker",
        labels: "component, endpoint, position, worker_id, [dynamo_namespace]",
        kind: Kind::Counter(accepted_per_position),
    },
    Metric {
        prometheus: "llm_endpoint_requests_total",
        otlp: "llm.endpoint.requests",
        unit: "{request}",
        help: "Requests that the endpoint took over NATS since the bridge first saw it, with --endpoint-stats",
        labels: WORKER_COUNT,
        kind: Kind::Counter(|fleet, emit| each_served(fleet, emit, |counts| counts.requests)),
    },
    Metric {
        prometheus: "llm_endpoint_errors_total",
        otlp: "llm.endpoint.errors",
        unit: "{error}",
        help: "Those of llm_endpoint_requests_total that failed",
        labels: WORKER_COUNT,
        kind: Kind::Counter(|fleet, emit| each_served(fleet, emit, |counts| counts.errors)),
    },
    Metric {
        prometheus: "llm_endpoint_processing_seconds_total",
        otlp: "llm.endpoint.processing",
        unit: "s",
        help: "Time that the endpoint spent on the requests of llm_endpoint_requests_total, as its NATS service counts it",
        labels: WORKER_COUNT,
        kind: Kind::FractionCounter(|fleet, emit| {
            each_served(fleet, &mut |nanoseconds, attributes| emit(seconds(nanoseconds), attributes), |counts| {
                counts.processing
            });
        }),
    },
    Metric {
        prometheus: SCRAPE_DURATION,
        otlp: "dynamo.bridge.scrape.duration",
        unit: "s",
        help: "Time that each scrape of the workers took",
        labels: "",
        kind: Kind::Histogram(SCRAPE_BOUNDS),
    },
    Metric {
        prometheus: "dynamo_bridge_scrape_success",
        otlp: "dynamo.bridge.scrape.success",
        unit: "",
        help: "Whether the last scrape could ask the workers: 1, or 0",
        labels: "",
        kind: Kind::Gauge(|fleet, emit| {
            if let Some(scrape) = &fleet.health.last_scrape {
                emit(flag(scrape.outcome.is_success()), &[]);
            }
        }),
    },
    Metric {
        prometheus: "dynamo_bridge_last_scrape_timestamp_seconds",
        otlp: "dynamo.bridge.last_scrape.timestamp",
        unit: "s",
        help: "End of the last scrape that could ask the workers, in seconds since 1970",
        labels: "",
        kind: Kind::Gauge(|fleet, emit| {
            if let Some(at) = fleet.health.last_success {
                emit(seconds_since_epoch(at), &[]);
            }
        }),
    },
    Metric {
        prometheus: "dynamo_bridge_replies_total",
        otlp: "dynamo.bridge.replies",
        unit: "{reply}",
        help: "Replies to scrapes, those included that could not be used",
        labels: "",
        kind: Kind::Counter(|fleet, emit| emit(fleet.health.replies, &[])),
    },
    Metric {
        prometheus: "dynamo_bridge_events_total",
        otlp: "dynamo.bridge.events",
        unit: "{event}",
        help: "Events heard and decoded, by topic",
        labels: "topic",
        kind: Kind::Counter(|fleet, emit| {
            for of in Topic::EVENTS {
                emit(fleet.health.events.get(&of).copied().unwrap_or_default(), &[topic(of)]);
            }
        }),
    },
    Metric {
        prometheus: "dynamo_bridge_events_dropped_total",
        otlp: "dynamo.bridge.events.dropped",
        unit: "{event}",
        help: "Events decoded but not counted, since no worker that is watched had their id in time (other components' events are among them); loads too that a later one replaced meanwhile",
        labels: "topic",
        kind: Kind::Counter(|fleet, emit| {
            for (of, events) in &fleet.health.unnamed_events {
                emit(*events, &[topic(*of)]);
            }
        }),
    },
    Metric {
        prometheus: "dynamo_bridge_events_missed_total",
        otlp: "dynamo.bridge.events.missed",
        unit: "{event}",
        help: "Events that did not come, by the gaps in their publishers' numbers",
        labels: "source, topic",
        kind: Kind::Counter(|fleet, emit| {
            for of in Topic::EVENTS {
                for source in of.sources().iter().copied().filter(|source| fleet.health.hears(*source)) {
                    let missed = fleet.health.missed.get(&(source, of)).copied().unwrap_or_default();
                    emit(missed, &[source_attribute(source), topic(of)]);
                }
            }
        }),
    },
    Metric {
        prometheus: "dynamo_bridge_events_complete_ratio",
        otlp: "dynamo.bridge.events.complete",
        unit: "1",
        help: "Events heard by events heard and missed, of the last minute, from 0 to 1",
        labels: "topic",
        kind: Kind::Gauge(|fleet, emit| {
            for (of, share) in &fleet.health.complete {
                emit(*share, &[topic(*of)]);
            }
        }),
    },
    Metric {
        prometheus: "dynamo_bridge_messages_lost_total",
        otlp: "dynamo.bridge.messages.lost",
        unit: "{message}",
        help: "Messages lost because the bridge read too slowly, at least",
        labels: "source",
        kind: Kind::Counter(|fleet, emit| {
            for source in Source::ALL.into_iter().filter(|source| fleet.health.hears(*source)) {
                emit(fleet.health.lost.get(&source).copied().unwrap_or_default(), &[source_attribute(source)]);
            }
        }),
    },
    Metric {
        prometheus: "dynamo_bridge_messages_rejected_total",
        otlp: "dynamo.bridge.messages.rejected",
        unit: "{message}",
        help: "Messages, or parts of them, that could not be used",
        labels: "reason, source, topic",
        kind: Kind::Counter(rejected),
    },
    Metric {
        prometheus: "dynamo_bridge_source_connected",
        otlp: "dynamo.bridge.source.connected",
        unit: "",
        help: "Whether a configured source is connected: 1, or 0",
        labels: "source",
        kind: Kind::Gauge(|fleet, emit| {
            for (source, connection) in &fleet.health.connections {
                emit(flag(connection.connected), &[source_attribute(*source)]);
            }
        }),
    },
    Metric {
        prometheus: "dynamo_bridge_source_reconnects_total",
        otlp: "dynamo.bridge.source.reconnects",
        unit: "{connection}",
        help: "Connections to a source after the first one",
        labels: "source",
        kind: Kind::Counter(|fleet, emit| {
            for (source, connection) in &fleet.health.connections {
                emit(connection.reconnects, &[source_attribute(*source)]);
            }
        }),
    },
    Metric {
        prometheus: "dynamo_bridge_pushes_failed_total",
        otlp: "dynamo.bridge.pushes.failed",
        unit: "{push}",
        help: "OTLP pushes that did not arrive, or were refused, by signal (metrics, traces)",
        labels: "signal",
        kind: Kind::Counter(|fleet, emit| each_signal(fleet, emit, |pushes| pushes.failed)),
    },
    Metric {
        prometheus: "dynamo_bridge_pushes_rejected_items_total",
        otlp: "dynamo.bridge.pushes.rejected_items",
        unit: "{item}",
        help: "Data points and spans of OTLP pushes that arrived which the receiver did not take, by signal",
        labels: "signal",
        kind: Kind::Counter(|fleet, emit| each_signal(fleet, emit, |pushes| pushes.rejected_items)),
    },
    Metric {
        prometheus: "dynamo_bridge_workers_by_events_alone",
        otlp: "dynamo.bridge.workers_by_events_alone",
        unit: "{worker}",
        help: "Workers that no discovery names: their last load event keeps them for --idle-ttl, though they may be gone",
        labels: "",
        kind: Kind::Gauge(|fleet, emit| emit(float(fleet.by_events_alone), &[])),
    },
    Metric {
        prometheus: "dynamo_bridge_http_connections",
        otlp: "dynamo.bridge.http.connections",
        unit: "{connection}",
        help: "Connections to the web server, of 256 that it takes",
        labels: "",
        kind: Kind::Gauge(|fleet, emit| emit(float(fleet.health.own.http_connections), &[])),
    },
    Metric {
        prometheus: "dynamo_bridge_http_connections_evicted_total",
        otlp: "dynamo.bridge.http.connections.evicted",
        unit: "{connection}",
        help: "Connections to the web server that were closed for a newcomer, since all were taken or no file could be opened: each time the one that was idle longest",
        labels: "",
        kind: Kind::Counter(|fleet, emit| emit(fleet.health.own.http_connections_evicted, &[])),
    },
    Metric {
        prometheus: "dynamo_bridge_log_lines_dropped_total",
        otlp: "dynamo.bridge.log.lines.dropped",
        unit: "{line}",
        help: "Lines left out of the log, since it was not read fast enough",
        labels: "",
        kind: Kind::Counter(|fleet, emit| emit(fleet.health.own.log_lines_dropped, &[])),
    },
    Metric {
        prometheus: "dynamo_bridge_build_info",
        otlp: "dynamo.bridge.build_info",
        unit: "",
        help: "1, with the version of the bridge",
        labels: "version",
        kind: Kind::Gauge(|_, emit| emit(1.0, &[KeyValue::new("version", env!("CARGO_PKG_VERSION"))])),
    },
];

/// The histograms of one provider.
#[derive(Debug)]
pub struct Recorder {
    hit_rate: Option<Histogram<f64>>,
    isl: Option<Histogram<f64>>,
    wall_time: Option<Histogram<f64>>,
    scrape: Option<Histogram<f64>>,
}

/// Registers the whole catalogue on a meter. Callbacks read the last snapshot, and never fail.
#[must_use]
pub fn register(meter: &Meter, naming: Naming, fleet: &watch::Receiver<Arc<Snapshot>>) -> Recorder {
    let mut recorder = Recorder { hit_rate: None, isl: None, wall_time: None, scrape: None };
    for metric in CATALOGUE {
        let (name, unit) = metric.registered(naming);
        let fleet = fleet.clone();
        match metric.kind {
            Kind::Gauge(observe) => {
                let builder = meter.f64_observable_gauge(name).with_unit(unit).with_description(metric.help);
                let callback = move |observer: &dyn opentelemetry::metrics::AsyncInstrument<f64>| {
                    let fleet = Arc::clone(&fleet.borrow());
                    observe(&fleet, &mut |value, attributes| observer.observe(value, attributes));
                };
                builder.with_callback(callback).build();
            }
            Kind::Counter(observe) => {
                let builder = meter.u64_observable_counter(name).with_unit(unit).with_description(metric.help);
                let callback = move |observer: &dyn opentelemetry::metrics::AsyncInstrument<u64>| {
                    let fleet = Arc::clone(&fleet.borrow());
                    observe(&fleet, &mut |value, attributes| observer.observe(value, attributes));
                };
                builder.with_callback(callback).build();
            }
            Kind::FractionCounter(observe) => {
                let builder = meter.f64_observable_counter(name).with_unit(unit).with_description(metric.help);
                let callback = move |observer: &dyn opentelemetry::metrics::AsyncInstrument<f64>| {
                    let fleet = Arc::clone(&fleet.borrow());
                    observe(&fleet, &mut |value, attributes| observer.observe(value, attributes));
                };
                builder.with_callback(callback).build();
            }
            Kind::Histogram(bounds) => {
                let builder = meter.f64_histogram(name).with_unit(unit).with_description(metric.help);
                let histogram = builder.with_boundaries(bounds.to_vec()).build();
                match metric.prometheus {
                    HIT_RATE_RATIO => recorder.hit_rate = Some(histogram),
                    HIT_RATE_ISL => recorder.isl = Some(histogram),
                    WALL_TIME => recorder.wall_time = Some(histogram),
                    _ => recorder.scrape = Some(histogram),
                }
            }
        }
    }
    recorder
}

impl Metric {
    /// Name and unit to register. In Prometheus the unit is in the name already.
    #[must_use]
    pub fn registered(&self, naming: Naming) -> (&'static str, &'static str) {
        match naming {
            Naming::Prometheus => (self.prometheus, ""),
            Naming::Otlp => (self.otlp, self.unit),
        }
    }
}

/// A view that gives each observable instrument room for a whole fleet.
///
/// The SDK's default is 2,000 attribute sets, beyond which all of them silently become one. Its map is allocated for the
/// limit at once, but untouched memory costs nothing.
pub fn room_for(max_workers: usize) -> impl Fn(&Instrument) -> Option<Stream> + Send + Sync + 'static {
    // Counts of departed workers stand beside those of the living for a while: the fleet keeps twice as many.
    let limit = max_workers.saturating_mul(2).max(2000);
    // A worker has a rank even where there is no room for more.
    let ranks = max_ranks(max_workers).saturating_add(max_workers);
    move |instrument| {
        let metric = CATALOGUE.iter().find(|metric| [metric.prometheus, metric.otlp].contains(&instrument.name()))?;
        let series = match metric.kind {
            // By group, and there are fewer groups than the default allows.
            Kind::Histogram(_) => return None,
            // Helpers' too: the fleet keeps eight endpoints a worker.
            _ if metric.prometheus.starts_with("llm_endpoint_") => limit.saturating_mul(4),
            _ if metric.prometheus == ACCEPTED_PER_POSITION => limit.saturating_mul(MAX_POSITIONS),
            _ if [WORKER, RANK, ROUTER].contains(&metric.labels) => ranks,
            _ if metric.labels == RANK_PHASE => ranks.saturating_mul(2),
            _ => limit,
        };
        Stream::builder().with_cardinality_limit(series).build().ok()
    }
}

impl Recorder {
    /// Records one measurement.
    pub fn record(&self, measurement: &Measurement) {
        match measurement {
            Measurement::HitRate(group, blocks) => {
                let attributes = group_attributes(group);
                if blocks.isl > 0 {
                    let ratio = f64::from(blocks.overlap) / f64::from(blocks.isl);
                    self.hit_rate.iter().for_each(|histogram| histogram.record(ratio, &attributes));
                }
                self.isl.iter().for_each(|histogram| histogram.record(blocks.isl.into(), &attributes));
            }
            Measurement::WallTime(group, seconds) => {
                self.wall_time.iter().for_each(|histogram| histogram.record(*seconds, &group_attributes(group)));
            }
            Measurement::ScrapeDuration(took) => {
                self.scrape.iter().for_each(|histogram| histogram.record(took.as_secs_f64(), &[]));
            }
        }
    }
}

type Emit<'a, T> = &'a mut dyn FnMut(T, &[KeyValue]);

fn each_load(fleet: &Snapshot, emit: Emit<'_, f64>, value: fn(&Load) -> Option<f64>) {
    for worker in &fleet.loads {
        if let Some(value) = value(&worker.load) {
            emit(value, &rank_attributes(fleet, &worker.key, worker.is_labelled.then_some(worker.rank)));
        }
    }
}

fn each_estimate(fleet: &Snapshot, emit: Emit<'_, f64>, value: fn(&Estimate) -> Option<u64>) {
    for router in &fleet.estimates {
        if let Some(value) = value(&router.estimate) {
            let mut attributes = rank_attributes(fleet, &router.key, router.is_labelled.then_some(router.rank));
            let publisher = router.publisher.map(|id| KeyValue::new("publisher_id", id.to_string()));
            let before_worker = attributes.len() - 1;
            attributes.splice(before_worker..before_worker, publisher);
            emit(float(value), &attributes);
        }
    }
}

fn each_pass(fleet: &Snapshot, emit: Emit<'_, f64>, value: fn(&Pass) -> u64) {
    for (passes, last) in fleet.passes.iter().filter_map(|passes| Some((passes, passes.last.as_ref()?))) {
        emit(float(value(last)), &pass_attributes(fleet, passes));
    }
}

fn each_phase(fleet: &Snapshot, emit: Emit<'_, f64>, values: fn(&Pass) -> [u64; 2]) {
    for (passes, last) in fleet.passes.iter().filter_map(|passes| Some((passes, passes.last.as_ref()?))) {
        for (phase, value) in ["prefill", "decode"].into_iter().zip(values(last)) {
            let mut attributes = pass_attributes(fleet, passes);
            attributes.insert(attributes.len() - 1, KeyValue::new("phase", phase));
            emit(float(value), &attributes);
        }
    }
}

fn each_total(fleet: &Snapshot, emit: Emit<'_, u64>, value: fn(&PassTotals) -> u64) {
    for passes in &fleet.passes {
        emit(value(&passes.totals), &pass_attributes(fleet, passes));
    }
}

fn each_group_load(fleet: &Snapshot, emit: Emit<'_, f64>, value: fn(&crate::fleet::LoadStatistics) -> f64) {
    for view in &fleet.groups {
        if let Some(load) = &view.load {
            emit(value(load), &group_attributes(&view.group));
        }
    }
}

fn workers(fleet: &Snapshot, emit: Emit<'_, f64>) {
    for view in &fleet.groups {
        for (state, count) in view.workers {
            let mut attributes = group_attributes(&view.group);
            attributes.push(KeyValue::new("state", state.as_str()));
            emit(float(count), &attributes);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a share of at most some million ranks")]
fn known(fleet: &Snapshot, emit: Emit<'_, f64>) {
    for view in fleet.groups.iter().filter(|view| view.coverage.ranks > 0) {
        let share = view.coverage.known as f64 / view.coverage.ranks as f64;
        emit(share, &group_attributes(&view.group));
    }
}

/// The namespace is always told here: the other series of the worker are joined to it.
fn infos(fleet: &Snapshot, emit: Emit<'_, f64>) {
    for info in &fleet.infos {
        let (key, card) = (&info.key, info.card.as_ref());
        let optional = [
            ("block_size", card.and_then(|card| card.block_size).map(|size| size.to_string())),
            ("component", Some(key.component.to_string())),
            ("dynamo_namespace", Some(key.namespace.to_string())),
            ("endpoint", Some(key.endpoint.to_string())),
            ("k8s_namespace_name", info.pod.as_ref().map(|pod| pod.namespace.to_string())),
            ("k8s_pod_name", info.pod.as_ref().map(|pod| pod.name.to_string())),
            ("model", card.map(|card| card.model.to_string())),
            ("ranks", card.map(|card| card.ranks.count.to_string())),
            ("release", info.release.as_ref().map(ToString::to_string)),
            ("role", card.and_then(|card| card.role).map(|role| role.as_str().to_owned())),
            ("worker_id", Some(key.id.to_string())),
            ("worker_id_hex", Some(format!("{:x}", key.id))),
        ];
        let attributes: Vec<_> =
            optional.into_iter().filter_map(|(key, value)| Some(KeyValue::new(key, value?))).collect();
        emit(1.0, &attributes);
    }
}

fn adapters(fleet: &Snapshot, emit: Emit<'_, f64>) {
    for info in fleet.infos.iter().filter(|info| info.card.is_some()) {
        emit(float(info.adapters as u64), &worker_attributes(fleet, &info.key));
    }
}

fn each_hits(fleet: &Snapshot, emit: Emit<'_, u64>, value: fn(&HitTotals) -> Option<u64>) {
    for (key, totals) in &fleet.hits {
        if let Some(value) = value(totals) {
            emit(value, &worker_attributes(fleet, key));
        }
    }
}

fn each_served(fleet: &Snapshot, emit: Emit<'_, u64>, value: fn(&EndpointCounts) -> Option<u64>) {
    for (key, counts) in &fleet.served {
        if let Some(value) = value(counts) {
            emit(value, &worker_attributes(fleet, key));
        }
    }
}

/// The value, where anything was counted.
fn some(events: u64, value: u64) -> Option<u64> {
    (events > 0).then_some(value)
}

fn each_spec_decode(fleet: &Snapshot, emit: Emit<'_, u64>, value: fn(&SpecDecodeCounts) -> Option<u64>) {
    for (key, counts) in &fleet.spec_decode {
        if let Some(value) = value(counts) {
            emit(value, &worker_attributes(fleet, key));
        }
    }
}

fn accepted_per_position(fleet: &Snapshot, emit: Emit<'_, u64>) {
    for (key, counts) in &fleet.spec_decode {
        for (position, count) in counts.accepted_per_position.iter().enumerate() {
            let mut attributes = worker_attributes(fleet, key);
            attributes.insert(attributes.len() - 1, KeyValue::new("position", position.to_string()));
            emit(*count, &attributes);
        }
    }
}

/// Every pair that can occur, from the start: the first increase of a series that was not there is not seen by `rate()`.
fn rejected(fleet: &Snapshot, emit: Emit<'_, u64>) {
    for of in Topic::ALL {
        for reason in Reason::ALL.into_iter().filter(|reason| reason.applies_to(of)) {
            for source in of.sources().iter().copied().filter(|source| fleet.health.hears(*source)) {
                let count = fleet.health.rejected.get(&(source, of, reason)).copied().unwrap_or_default();
                emit(count, &[KeyValue::new("reason", reason.as_str()), source_attribute(source), topic(of)]);
            }
        }
    }
}

/// The order of the keys is alphabetical everywhere: the SDK looks attributes up as they come before it sorts them.
fn worker_attributes(fleet: &Snapshot, key: &WorkerKey) -> Vec<KeyValue> {
    let mut attributes = vec![KeyValue::new("component", Arc::clone(&key.component))];
    if fleet.every_namespace {
        attributes.push(KeyValue::new("dynamo_namespace", Arc::clone(&key.namespace)));
    }
    attributes.push(KeyValue::new("endpoint", Arc::clone(&key.endpoint)));
    attributes.push(KeyValue::new("worker_id", key.id.to_string()));
    attributes
}

fn rank_attributes(fleet: &Snapshot, key: &WorkerKey, told: Option<Rank>) -> Vec<KeyValue> {
    let mut attributes = worker_attributes(fleet, key);
    if let Some(rank) = told {
        attributes.insert(1, KeyValue::new("dp_rank", rank.0.to_string()));
    }
    attributes
}

fn pass_attributes(fleet: &Snapshot, passes: &RankPasses) -> Vec<KeyValue> {
    rank_attributes(fleet, &passes.key, Some(passes.rank))
}

fn group_attributes(group: &Group) -> Vec<KeyValue> {
    let mut attributes = vec![KeyValue::new("component", Arc::clone(&group.component))];
    attributes.extend(group.namespace.iter().map(|namespace| KeyValue::new("dynamo_namespace", Arc::clone(namespace))));
    attributes.push(KeyValue::new("endpoint", Arc::clone(&group.endpoint)));
    attributes
}

fn each_signal(fleet: &Snapshot, emit: &mut dyn FnMut(u64, &[KeyValue]), count: fn(&PushCounts) -> u64) {
    for pushes in &fleet.health.own.pushes {
        emit(count(pushes), &[KeyValue::new("signal", pushes.signal)]);
    }
}

fn source_attribute(source: Source) -> KeyValue {
    KeyValue::new("source", source.as_str())
}

fn topic(topic: Topic) -> KeyValue {
    KeyValue::new("topic", topic.as_str())
}

fn flag(set: bool) -> f64 {
    if set { 1.0 } else { 0.0 }
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus has no other numbers, and counts are far below 2^53")]
fn float(count: u64) -> f64 {
    count as f64
}

#[expect(clippy::cast_precision_loss, reason = "right to the nanosecond for 104 days, to the microsecond for ever")]
fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

fn seconds_since_epoch(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH).map(|since| since.as_secs_f64()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::fleet::WorkerLoad;

    /// Names that OpenTelemetry's translation would give another form, kept because Dynamo's dashboards know them so.
    const KEPT: [&str; 2] = ["llm_kv_hit_rate_isl_blocks", "llm_kv_hit_rate_overlap_blocks"];

    fn is_counter(metric: &Metric) -> bool {
        matches!(metric.kind, Kind::Counter(_) | Kind::FractionCounter(_))
    }

    /// The rules of OpenTelemetry's compatibility with Prometheus, as far as the catalogue's units need.
    fn translated(metric: &Metric) -> String {
        let mut name = metric.otlp.replace('.', "_");
        let unit = match (metric.unit, metric.kind) {
            ("s", _) => Some("seconds"),
            ("1", Kind::Gauge(_)) => Some("ratio"),
            _ => None,
        };
        if let Some(unit) = unit.filter(|unit| !name.split('_').any(|token| token == *unit)) {
            name = format!("{name}_{unit}");
        }
        if is_counter(metric) && !name.ends_with("_total") {
            name.push_str("_total");
        }
        name
    }

    #[test]
    fn the_otlp_name_translates_to_the_prometheus_name() {
        for metric in CATALOGUE {
            let name = translated(metric);
            let expected = if KEPT.contains(&metric.prometheus) { name.trim_end_matches("_total") } else { &name };
            assert_eq!(metric.prometheus, expected, "{}", metric.otlp);
        }
    }

    #[test]
    fn counters_and_only_counters_end_in_total_but_for_the_names_that_are_kept() {
        for metric in CATALOGUE.iter().filter(|metric| !KEPT.contains(&metric.prometheus)) {
            let is_counter = is_counter(metric) || metric.prometheus == "llm_kv_blocks_total";
            assert_eq!(metric.prometheus.ends_with("_total"), is_counter, "{}", metric.prometheus);
        }
    }

    #[test]
    fn a_fleet_of_workers_with_ranks_folds_into_no_overflow() {
        use opentelemetry::metrics::MeterProvider;

        const WORKERS: usize = 1000;
        let ranks = max_ranks(WORKERS) / WORKERS + 1;
        let registry = prometheus::Registry::new();
        let exporter = opentelemetry_prometheus::exporter().with_registry(registry.clone()).build().unwrap();
        let provider = opentelemetry_sdk::metrics::SdkMeterProvider::builder()
            .with_reader(exporter)
            .with_view(room_for(WORKERS))
            .build();
        let loads = (0..WORKERS * ranks).map(|number| WorkerLoad {
            key: Arc::new(WorkerKey {
                namespace: "dynamo".into(),
                component: "backend".into(),
                endpoint: "generate".into(),
                id: crate::fleet::WorkerId((number / ranks) as u64),
            }),
            rank: crate::fleet::Rank(u32::try_from(number % ranks).unwrap()),
            is_labelled: true,
            load: Load { active_blocks: Some(number as u64), ..Load::default() },
        });
        let fleet = Snapshot { loads: loads.collect(), ..Snapshot::default() };
        let (_published, fleet) = watch::channel(Arc::new(fleet));
        let _recorder = register(&provider.meter("test"), Naming::Prometheus, &fleet);
        let families = registry.gather();
        let family = families.iter().find(|family| family.name().starts_with("llm_kv_blocks_active")).unwrap();
        assert_eq!(family.get_metric().len(), WORKERS * ranks);
    }

    #[test]
    fn no_name_is_given_twice() {
        let names = |of: fn(&Metric) -> &'static str| CATALOGUE.iter().map(of).collect::<BTreeSet<_>>().len();
        assert_eq!(names(|metric| metric.prometheus), CATALOGUE.len());
        assert_eq!(names(|metric| metric.otlp), CATALOGUE.len());
    }
}
