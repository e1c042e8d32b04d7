//! What sinks read: the fleet at one moment.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::observation::{Lost, Reason, Rejection, Scrape, Source, Topic};
use super::{
    Card, EndpointCounts, Estimate, Group, HitTotals, Load, Pass, PassTotals, Pod, Rank, SpecDecodeCounts, Unnamed,
    WorkerKey,
};

/// The fleet at one moment, sorted by worker.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Grows with every snapshot.
    pub generation: u64,
    /// When it was taken; `None` of what stands in before the first.
    pub at: Option<Instant>,
    /// Whether namespaces are told apart: every one is watched.
    pub every_namespace: bool,
    /// Known loads of living workers.
    pub loads: Vec<WorkerLoad>,
    /// Forward passes of living workers.
    pub passes: Vec<RankPasses>,
    /// Speculative decoding of living workers, since the bridge first saw them.
    pub spec_decode: Vec<(Arc<WorkerKey>, SpecDecodeCounts)>,
    /// What is known of living workers beside their load.
    pub infos: Vec<WorkerInfo>,
    /// Workers that events alone keep alive.
    pub by_events_alone: u64,
    /// Component / endpoint pairs, those that lost their workers lately included.
    pub groups: Vec<GroupView>,
    /// Placements counted by worker, of those that departed lately too.
    pub hits: Vec<(Arc<WorkerKey>, HitTotals)>,
    /// Requests in flight on living workers, where routers tell of them.
    pub in_flight: Vec<(Arc<WorkerKey>, u64)>,
    /// What endpoints counted since each was first seen, where that is wanted.
    pub served: Vec<(WorkerKey, EndpointCounts)>,
    /// What routers believe of living workers, where that is wanted.
    pub estimates: Vec<RouterEstimate>,
    /// Of the ids whose events were given up since the last snapshot, that with most of them, unless those are not missed: of
    /// places that are not watched, or of a worker that has left.
    pub unnamed: Option<Unnamed>,
    /// The bridge's own health.
    pub health: Health,
}

/// The load of one rank of one worker.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerLoad {
    /// The worker.
    pub key: Arc<WorkerKey>,
    /// The rank.
    pub rank: Rank,
    /// Whether the rank is told: it is not 0, or one of several.
    pub is_labelled: bool,
    /// Its load; something in it is known.
    pub load: Load,
}

/// What one router believes of one rank of one worker.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterEstimate {
    /// The worker.
    pub key: Arc<WorkerKey>,
    /// The rank.
    pub rank: Rank,
    /// Whether the rank is told: it is not 0, or one of several.
    pub is_labelled: bool,
    /// Dynamo's id of the router as a publisher of events; 0.8 has none.
    pub publisher: Option<u64>,
    /// What it believes.
    pub estimate: Estimate,
}

/// The forward passes of one rank of one worker.
#[derive(Debug, Clone, PartialEq)]
pub struct RankPasses {
    /// The worker.
    pub key: Arc<WorkerKey>,
    /// The rank.
    pub rank: Rank,
    /// The last one, while it is known; a heartbeat where the engine is idle.
    pub last: Option<Pass>,
    /// What all add up to.
    pub totals: PassTotals,
}

/// What is known of a worker beside its load.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerInfo {
    /// The worker.
    pub key: Arc<WorkerKey>,
    /// Its Dynamo release, where STATS tells it.
    pub release: Option<Arc<str>>,
    /// Its model card.
    pub card: Option<Card>,
    /// `LoRA` adapters that it has loaded.
    pub adapters: usize,
    /// The pod that it runs in.
    pub pod: Option<Pod>,
}

/// How a living worker stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WorkerState {
    /// Load was heard since it was discovered.
    Reporting,
    /// Alive, and nothing heard yet.
    Silent,
    /// Registered, and requests do not reach it.
    NotReady,
    /// Deregistered, and still computing what it has.
    Draining,
}

impl WorkerState {
    /// Every state.
    pub const ALL: [Self; 4] = [Self::Reporting, Self::Silent, Self::NotReady, Self::Draining];

    /// The value of the label `state`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reporting => "reporting",
            Self::Silent => "silent",
            Self::NotReady => "not_ready",
            Self::Draining => "draining",
        }
    }
}

/// One component / endpoint pair.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupView {
    /// Which.
    pub group: Group,
    /// Over the workers whose active blocks are known; `None` where there is none.
    pub load: Option<LoadStatistics>,
    /// Living workers by state, zeros included.
    pub workers: [(WorkerState, u64); 4],
    /// Of how many the active blocks are known.
    pub coverage: Coverage,
}

/// Of how many ranks the load is known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Ranks whose active blocks are known.
    pub known: u64,
    /// All ranks of the workers that take requests or drain.
    pub ranks: u64,
}

/// Mean and deviation of the active KV blocks of a group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadStatistics {
    /// Arithmetic mean, in blocks.
    pub average: f64,
    /// Population standard deviation, in blocks.
    pub deviation: f64,
}

impl LoadStatistics {
    /// `None` of nothing: a mean of no workers is not zero.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "block counts are far below 2^53")]
    pub fn of(values: &[u64]) -> Option<Self> {
        if values.is_empty() {
            return None;
        }
        let mean_of = |sum: f64| sum / values.len() as f64;
        let average = mean_of(values.iter().map(|value| *value as f64).sum());
        let variance = mean_of(values.iter().map(|value| (*value as f64 - average).powi(2)).sum());
        Some(Self { average, deviation: variance.sqrt() })
    }
}

/// The bridge's own health.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Health {
    /// Sources that are configured.
    pub connections: BTreeMap<Source, ConnectionView>,
    /// Whether events are heard over ZMQ: its publishers are many, and none of them is a source that is connected or not.
    pub zmq: bool,
    /// What they do not let the bridge do.
    pub denied: BTreeMap<Source, Vec<Arc<str>>>,
    /// The last scrape, if there was one.
    pub last_scrape: Option<Scrape>,
    /// End of the last scrape that reached the fleet.
    pub last_success: Option<SystemTime>,
    /// Replies to scrapes.
    pub replies: u64,
    /// Events decoded, by topic.
    pub events: BTreeMap<Topic, u64>,
    /// Events given up because nothing named their worker in time.
    pub unnamed_events: BTreeMap<Topic, u64>,
    /// Messages lost before they were read, by source; a lower bound.
    pub lost: BTreeMap<Source, u64>,
    /// Events that did not come, by the gaps in their numbers.
    pub missed: BTreeMap<(Source, Topic), u64>,
    /// Share of the events of the last minute that were heard.
    pub complete: BTreeMap<Topic, f64>,
    /// Messages not used.
    pub rejected: BTreeMap<(Source, Topic, Reason), u64>,
    /// What the program counts of itself; whoever publishes the snapshot fills it in.
    pub own: OwnCounts,
}

/// What no source says: how the program itself is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnCounts {
    /// Connections to the web server.
    pub http_connections: u64,
    /// Those that were closed because a newcomer needed their place.
    pub http_connections_evicted: u64,
    /// Lines that were left out of the log, since it was not read fast enough.
    pub log_lines_dropped: u64,
    /// Of every signal that is pushed.
    pub pushes: Vec<PushCounts>,
}

/// The OTLP pushes of one signal since the process started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PushCounts {
    /// OpenTelemetry's name of it.
    pub signal: &'static str,
    /// Pushes that did not arrive, or were refused.
    pub failed: u64,
    /// Data points or spans that arrived and were not taken.
    pub rejected_items: u64,
}

/// One source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConnectionView {
    /// Whether it is connected.
    pub connected: bool,
    /// Whether it ever was.
    pub was_connected: bool,
    /// Connections made after the first one.
    pub reconnects: u64,
}

impl Health {
    pub(super) fn scraped(&mut self, scrape: Scrape) {
        self.replies = self.replies.saturating_add(scrape.replies);
        if scrape.outcome.is_success() {
            self.last_success = Some(scrape.at);
        }
        self.last_scrape = Some(scrape);
    }

    pub(super) fn connection(&mut self, source: Source, connected: bool) {
        let view = self.connections.entry(source).or_default();
        if connected && !view.connected && view.was_connected {
            view.reconnects += 1;
        }
        view.connected = connected;
        view.was_connected |= connected;
    }

    /// Whether that source is configured.
    #[must_use]
    pub fn hears(&self, source: Source) -> bool {
        self.connections.contains_key(&source) || (source == Source::Zmq && self.zmq)
    }

    /// The sources that are connected now.
    pub(super) fn connected(&self) -> BTreeSet<Source> {
        self.connections.iter().filter(|(_, view)| view.connected).map(|(source, _)| *source).collect()
    }

    pub(super) fn missed(&mut self, source: Source, topic: Topic, events: u64) {
        let missed = self.missed.entry((source, topic)).or_default();
        *missed = missed.saturating_add(events);
    }

    pub(super) fn heard(&mut self, topic: Topic) {
        *self.events.entry(topic).or_default() += 1;
    }

    pub(super) fn lost(&mut self, lost: Lost) {
        *self.lost.entry(lost.source).or_default() += lost.messages;
    }

    pub(super) fn rejected(&mut self, rejection: &Rejection) {
        *self.rejected.entry((rejection.source, rejection.topic, rejection.reason)).or_default() += 1;
    }
}
