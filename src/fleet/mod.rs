//! The live picture of the fleet: what all sources said, folded in one order into one state.
//!
//! Pure: time is an argument, there is no I/O, and nothing here knows NATS' bytes or OpenTelemetry. Sources make
//! [`Observation`]s, [`Fleet::apply`] folds them, [`Fleet::snapshot`] is what sinks read. The rules:
//!
//! - **Alive** is what a scrape says: a worker whose answer is older than the worker TTL is gone, with all its load. An
//!   event never makes a worker alive.
//! - **A worker** is an endpoint that has reported load or is exactly the explicit target; any other is nobody, and is
//!   not remembered.
//! - **Known** is what the last answer said. What it left out is unknown and has no series.
//! - **Counts** never fall and never move to another worker ([`hits`], [`recount`]).
//! - **Bounds**: at most [`Rules::max_workers`] workers in at most [`MAX_GROUPS`] groups.

mod card;
mod hits;
mod load;
mod observation;
mod recount;
mod snapshot;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use card::{Card, Limits, MAX_RANKS, Ranks, Role};
pub use hits::{HitBlocks, HitRate, HitTotals};
pub use load::{Load, MAX_POSITIONS, Rank, SpecDecode, SpecDecodeCounts};
pub use observation::{
    Answer, Channel, Entry, LoadEvent, Lost, Numbered, Observation, Pod, Process, Reason, Registration, Rejection,
    Report, Scrape, ScrapeOutcome, Source, Standing, Topic,
};
pub use recount::Recount;
pub use snapshot::{ConnectionView, GroupView, Health, LoadStatistics, Snapshot, WorkerLoad, WorkerState};

pub use crate::target::WorkerId;
use crate::target::{NamespaceFilter, Target};
use hits::Hits;
use recount::SpecDecodeRecount;

/// Component / endpoint pairs remembered at most. Each costs two series of `llm_workers` for [`GROUP_MEMORY`], and each
/// histogram one set of buckets for the life of the process.
pub const MAX_GROUPS: usize = 500;

/// How long a group without workers is still shown with zeros: a series that vanishes cannot fire an alert.
pub const GROUP_MEMORY: Duration = Duration::from_secs(60 * 60);

/// Namespace, component, endpoint and id: what a worker is known by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerKey {
    /// Dynamo namespace, generation included.
    pub namespace: Arc<str>,
    /// Component.
    pub component: Arc<str>,
    /// Endpoint served.
    pub endpoint: Arc<str>,
    /// Dynamo's id; two endpoints of one process share it.
    pub id: WorkerId,
}

/// The workers over which statistics are made and for which histograms are kept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Group {
    /// Set only where every namespace is watched.
    pub namespace: Option<Arc<str>>,
    /// Component.
    pub component: Arc<str>,
    /// Endpoint.
    pub endpoint: Arc<str>,
}

/// A value for a histogram. OpenTelemetry has no observable histogram, so these leave the fold at once.
#[derive(Debug, Clone, PartialEq)]
pub enum Measurement {
    /// A request was placed on a worker of the group.
    HitRate(Group, HitBlocks),
    /// A scrape ended after this time.
    ScrapeDuration(Duration),
}

/// What became final with one observation.
#[derive(Debug, Default, PartialEq)]
pub struct Applied {
    /// To be recorded, in this order.
    pub measurements: Vec<Measurement>,
    /// The observation, or the bytes behind it, was rejected. Counted already; here to be logged.
    pub rejection: Option<Rejection>,
}

/// What the fleet needs to know of the configuration.
#[derive(Debug, Clone)]
pub struct Rules {
    /// What is watched.
    pub target: Target,
    /// A worker whose last answer is older is gone.
    pub worker_ttl: Duration,
    /// Event counts outlive their worker this long, and events wait this long for theirs to be named.
    pub event_ttl: Duration,
    /// Workers remembered at most.
    pub max_workers: usize,
}

#[derive(Debug)]
struct Worker {
    process: Process,
    answered: Instant,
    /// Any load was heard since this process was discovered.
    reported: bool,
    load: Option<Report>,
    spec_decode: SpecDecodeRecount,
}

/// The fold's state. One writer owns it.
#[derive(Debug)]
pub struct Fleet {
    rules: Rules,
    workers: BTreeMap<Arc<WorkerKey>, Worker>,
    /// When each group last had a worker.
    groups: BTreeMap<Group, Instant>,
    hits: Hits,
    health: Health,
    generation: u64,
}

impl Fleet {
    /// A fleet of which nothing is known.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        // Counts of departed workers may outnumber the living ones after a rollout of the whole fleet.
        let hits = Hits::new(rules.event_ttl, rules.max_workers.saturating_mul(2));
        let health = Health::default();
        Self { rules, workers: BTreeMap::new(), groups: BTreeMap::new(), hits, health, generation: 0 }
    }

    /// Folds one observation. `now` must not go back from call to call.
    pub fn apply(&mut self, observation: Observation, now: Instant) -> Applied {
        let mut applied = Applied::default();
        match observation {
            Observation::Answered(answer) => match self.answered(answer, now) {
                Ok(measurements) => applied.measurements = measurements,
                Err(rejection) => applied.rejection = Some(rejection),
            },
            Observation::HitRate(event) => applied.measurements.extend(self.placed(event, now)),
            Observation::Registered(_)
            | Observation::Deregistered(_)
            | Observation::Load(_)
            | Observation::Heard(_)
            | Observation::ChannelLost(_) => {}
            Observation::Rejected(rejection) => applied.rejection = Some(rejection),
            Observation::Scraped(scrape) => {
                applied.measurements.push(Measurement::ScrapeDuration(scrape.took));
                self.health.scraped(scrape);
            }
            Observation::Connection { source, connected } => self.health.connection(source, connected),
            Observation::Lost(lost) => self.health.lost(lost),
        }
        if let Some(rejection) = &applied.rejection {
            self.health.rejected(rejection);
        }
        applied
    }

    fn answered(&mut self, answer: Answer, now: Instant) -> Result<Vec<Measurement>, Rejection> {
        let Answer { key, process, report } = answer;
        let known = self.workers.get_key_value(&key).map(|(key, _)| Arc::clone(key));
        if known.is_none() && report.is_none() && !is_explicit(&self.rules.target, &key) {
            return Ok(Vec::new());
        }
        self.admit(&key, &process, now)?;
        let key = known.unwrap_or_else(|| Arc::new(key));
        let worker = self.workers.entry(Arc::clone(&key)).or_insert_with(|| Worker {
            process: process.clone(),
            answered: now,
            reported: false,
            load: None,
            spec_decode: SpecDecodeRecount::default(),
        });
        if worker.process != process {
            worker.process = process;
            worker.reported = false;
        }
        worker.answered = now;
        worker.reported |= report.is_some();
        if let Some(spec_decode) = report.as_ref().and_then(|report| report.load.spec_decode.as_ref()) {
            worker.spec_decode.see(&spec_decode.counts);
        }
        worker.load = report;
        Ok(self.welcome(&key, now))
    }

    /// Whether this answer may stand for the worker of that key.
    ///
    /// Where two processes claim one key, the one that started later has it, so that a restarted worker takes over at
    /// once and two living ones do not alternate.
    fn admit(&self, key: &WorkerKey, process: &Process, now: Instant) -> Result<(), Rejection> {
        let reject = |reason, detail| Err(Rejection { source: Source::Nats, topic: Topic::Stats, reason, detail });
        if let Some(worker) = self.workers.get(key) {
            let superseded = process.order() > worker.process.order() || self.is_gone(worker, now);
            if worker.process != *process && !superseded {
                return reject(Reason::DuplicateWorker, format!("worker {} answers from two processes", key.id));
            }
            return Ok(());
        }
        if self.workers.len() >= self.rules.max_workers {
            return reject(Reason::TooManyWorkers, format!("worker {} is beyond --max-workers", key.id));
        }
        if self.groups.len() >= MAX_GROUPS && !self.groups.contains_key(&self.group(key)) {
            return reject(
                Reason::TooManyGroups,
                format!("{}/{} is beyond {MAX_GROUPS} groups", key.component, key.endpoint),
            );
        }
        Ok(())
    }

    /// The key is that of a worker: its group is seen, and its events count.
    fn welcome(&mut self, key: &Arc<WorkerKey>, now: Instant) -> Vec<Measurement> {
        let group = self.group(key);
        let measurements = self.hits.name(key).into_iter().map(|blocks| Measurement::HitRate(group.clone(), blocks));
        let measurements = measurements.collect();
        self.groups.insert(group, now);
        measurements
    }

    fn placed(&mut self, event: HitRate, now: Instant) -> Option<Measurement> {
        self.health.heard(Topic::KvHitRate);
        let blocks = event.blocks;
        let key = self.hits.count(event, now)?;
        Some(Measurement::HitRate(self.group(&key), blocks))
    }

    fn group(&self, key: &WorkerKey) -> Group {
        Group {
            namespace: self.every_namespace().then(|| Arc::clone(&key.namespace)),
            component: Arc::clone(&key.component),
            endpoint: Arc::clone(&key.endpoint),
        }
    }

    fn every_namespace(&self) -> bool {
        self.rules.target.namespace == NamespaceFilter::All
    }

    fn is_gone(&self, worker: &Worker, now: Instant) -> bool {
        now.saturating_duration_since(worker.answered) >= self.rules.worker_ttl
    }

    /// Forgets what has been silent for too long, and publishes the rest as it is at `now`.
    pub fn snapshot(&mut self, now: Instant) -> Snapshot {
        self.expire(now);
        self.generation += 1;
        let groups = self.group_views();
        let loads = self.workers.iter().filter_map(|(key, worker)| {
            let Report { rank, load } = worker.load.clone()?;
            Some(WorkerLoad { key: Arc::clone(key), rank, load })
        });
        let spec_decode = self.workers.iter().filter_map(|(key, worker)| {
            let totals = worker.spec_decode.totals();
            (totals != SpecDecodeCounts::default()).then(|| (Arc::clone(key), totals))
        });
        let mut hits: Vec<_> = self.hits.totals().map(|(key, totals)| (Arc::clone(key), totals)).collect();
        hits.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        Snapshot {
            generation: self.generation,
            every_namespace: self.every_namespace(),
            loads: loads.collect(),
            spec_decode: spec_decode.collect(),
            groups,
            hits,
            health: self.health.clone(),
        }
    }

    fn expire(&mut self, now: Instant) {
        let is_gone = |(key, worker): (&Arc<WorkerKey>, &Worker)| self.is_gone(worker, now).then(|| Arc::clone(key));
        let gone: Vec<_> = self.workers.iter().filter_map(is_gone).collect();
        for key in gone {
            self.workers.remove(&key);
            self.hits.depart(&key, now);
        }
        self.hits.expire(now);
        self.health.unnamed_events = self.hits.dropped();
        let living: BTreeSet<Group> = self.workers.keys().map(|key| self.group(key)).collect();
        self.groups.retain(|group, seen| living.contains(group) || now.saturating_duration_since(*seen) < GROUP_MEMORY);
    }

    fn group_views(&self) -> Vec<GroupView> {
        let mut members: BTreeMap<Group, Vec<&Worker>> =
            self.groups.keys().map(|group| (group.clone(), vec![])).collect();
        if let Some((component, endpoint)) = self.rules.target.explicit().filter(|_| !self.every_namespace()) {
            members
                .entry(Group { namespace: None, component: component.into(), endpoint: endpoint.into() })
                .or_default();
        }
        for (key, worker) in &self.workers {
            members.entry(self.group(key)).or_default().push(worker);
        }
        members.into_iter().map(|(group, workers)| group_view(group, &workers)).collect()
    }
}

fn is_explicit(target: &Target, key: &WorkerKey) -> bool {
    target.explicit().is_some_and(|(component, endpoint)| *component == *key.component && *endpoint == *key.endpoint)
}

fn group_view(group: Group, workers: &[&Worker]) -> GroupView {
    let active_blocks: Vec<u64> = workers.iter().filter_map(|w| w.load.as_ref()?.load.active_blocks).collect();
    let count = |state| workers.iter().filter(|worker| state_of(worker) == state).count() as u64;
    GroupView {
        group,
        load: LoadStatistics::of(&active_blocks),
        workers: WorkerState::ALL.map(|state| (state, count(state))),
    }
}

fn state_of(worker: &Worker) -> WorkerState {
    if worker.reported { WorkerState::Reporting } else { WorkerState::Silent }
}

#[cfg(test)]
mod tests;
