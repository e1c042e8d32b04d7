//! The live picture of the fleet: what all sources said, folded in one order into one state.
//!
//! Pure: time is an argument, there is no I/O, and nothing here knows NATS' bytes or OpenTelemetry. Sources make
//! [`Observation`]s, [`Fleet::apply`] folds them, [`Fleet::snapshot`] is what sinks read. The rules:
//!
//! - **Alive** is what discovery says: a scrape's answer, younger than the worker TTL, or an entry of etcd or a folder.
//!   A connected voice that named a worker and lost it wins. An event never makes a worker alive, except where no
//!   discovery registers workers: there it does, once a scrape has shown that nobody answers for its id, unless somebody did
//!   and has left.
//! - **A worker** is an endpoint that has reported load, has a model card of its own that says what its engine holds, or is
//!   exactly the explicit target; any other is nobody yet.
//! - **Known** is what the last answer said, and what was heard in events since their channel last lost one. What was
//!   left out is unknown and has no series.
//! - **Limits** come from the load report where it has them, else from the card.
//! - **Counts** never fall and never move to another worker ([`hits`], [`recount`]), and take in nothing that cannot be
//!   ([`bounds`]).
//! - **Labels** are one worker's at a time: where they do not tell namespaces apart, the first has them while it lives.
//! - **Bounds**: at most [`Rules::max_workers`] workers in at most [`MAX_GROUPS`] groups, with at most [`max_ranks`] ranks.

mod bounds;
mod card;
mod channels;
mod completeness;
mod estimates;
mod hits;
mod load;
mod observation;
mod passes;
mod pending;
mod placements;
mod recount;
mod router_blocks;
mod served;
mod snapshot;
mod worker;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use card::{Adapter, AdapterId, Card, Limits, MAX_RANKS, Ranks, Role, max_ranks};
pub use estimates::Estimate;
pub use hits::{HitBlocks, HitRate, HitTotals};
pub use load::{Load, MAX_POSITIONS, Rank, SpecDecode, SpecDecodeCounts};
pub use observation::{
    Answer, Channel, Entry, EstimateEvent, LoadEvent, Lost, Numbered, Observation, PassEvent, Pod, Process, Reason,
    Registration, Rejection, Report, RoutingEvent, Scope, Scrape, ScrapeOutcome, Source, Standing, Topic,
};
pub use passes::{Pass, PassTotals, Queued, Scheduled};
pub use pending::Unnamed;
pub use placements::{Cached, Prompt, RequestId, Routing, Step};
pub use served::EndpointCounts;
pub use snapshot::{
    ConnectionView, Coverage, GroupView, Health, LoadStatistics, OwnCounts, PushCounts, RankPasses, RouterEstimate,
    Snapshot, WorkerInfo, WorkerLoad, WorkerState,
};

pub use crate::target::WorkerId;
use crate::target::{NamespaceFilter, Target};
use bounds::Refusal;
use channels::Channels;
use completeness::Completeness;
use estimates::Estimates;
use hits::{Counted, Hits, Rival};
use pending::{Held, Pending};
use placements::Placements;
use router_blocks::PlacedBy;
use served::Served;
use worker::{Claim, Hearing, Presence, Worker};

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
    /// An engine of the group made a pass, in so many seconds.
    WallTime(Group, f64),
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
    /// A request of which its router said nothing for so long is no longer in flight.
    pub request_ttl: Duration,
    /// Where workers register. Where that is nowhere, one that no scrape ever found is alive for `idle_ttl`.
    pub registries: BTreeSet<Source>,
    /// Whether events are heard over ZMQ, from publishers that discovery names or from a broker.
    pub zmq: bool,
    /// How long a load event alone keeps a worker, if it does.
    pub idle_ttl: Duration,
    /// Whether routers' estimates of workers are kept.
    pub router_estimates: bool,
    /// Workers remembered at most.
    pub max_workers: usize,
}

/// Candidates remembered for each worker allowed: a process registers helpers beside its endpoint.
const CANDIDATES_PER_WORKER: usize = 8;

/// Routers' estimates kept for each worker allowed: one a router and rank.
const ESTIMATES_PER_WORKER: usize = 8;

/// The endpoint by which Dynamo's own workers and routers take requests.
const SERVED: &str = "generate";

type Id = (Arc<str>, WorkerId);

/// The fold's state. One writer owns it.
#[derive(Debug)]
pub struct Fleet {
    rules: Rules,
    /// Workers and candidates.
    workers: BTreeMap<Arc<WorkerKey>, Worker>,
    welcomed: usize,
    /// Everything that has an id, workers first.
    by_id: HashMap<Id, BTreeSet<Arc<WorkerKey>>>,
    /// Loads and passes of ids that nothing has named.
    pending: Pending,
    /// Ids that answer scrapes and are not watched, and when each did last.
    elsewhere: HashMap<Id, Instant>,
    /// Ids that something else than events named and that are gone, and when they left or were last heard: their events do
    /// not bring them back.
    departed: HashMap<Id, Instant>,
    /// When each group last had a worker.
    groups: BTreeMap<Group, Instant>,
    /// Ranks of workers for which room was needed at the last snapshot, and those that came since.
    ranks: usize,
    channels: Channels,
    hits: Hits,
    placements: Placements,
    /// Who takes requests as an endpoint, watched or not: a router among them is no frontend's.
    serving: HashSet<(Source, WorkerId)>,
    /// Where they are wanted.
    estimates: Option<Estimates>,
    served: Served,
    completeness: Completeness,
    health: Health,
    /// The first of what could not be used of the observation that is being folded.
    refused: Option<Rejection>,
    /// What became final while a snapshot was taken.
    late: Vec<Measurement>,
    generation: u64,
}

impl Fleet {
    /// A fleet of which nothing is known.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        // Counts of departed workers may outnumber the living ones after a rollout of the whole fleet.
        let mut hits = Hits::new(rules.event_ttl, rules.max_workers.saturating_mul(2));
        if let NamespaceFilter::Named(name) = &rules.target.namespace {
            hits.one_namespace = Some(name.as_str().into());
        }
        Self {
            hits,
            placements: Placements::new(rules.request_ttl),
            serving: HashSet::new(),
            estimates: rules
                .router_estimates
                .then(|| Estimates::new(rules.request_ttl, rules.max_workers.saturating_mul(ESTIMATES_PER_WORKER))),
            served: Served::new(rules.max_workers.saturating_mul(CANDIDATES_PER_WORKER)),
            completeness: Completeness::default(),
            // Workers and routers publish on several topics each.
            channels: Channels::new(rules.max_workers.saturating_mul(CANDIDATES_PER_WORKER)),
            pending: Pending::new(max_ranks(rules.max_workers)),
            health: Health { zmq: rules.zmq, ..Health::default() },
            rules,
            workers: BTreeMap::new(),
            welcomed: 0,
            by_id: HashMap::new(),
            elsewhere: HashMap::new(),
            departed: HashMap::new(),
            groups: BTreeMap::new(),
            ranks: 0,
            refused: None,
            late: Vec::new(),
            generation: 0,
        }
    }

    /// Folds one observation. `now` must not go back from call to call.
    pub fn apply(&mut self, observation: Observation, now: Instant) -> Applied {
        let folded = match observation {
            Observation::Answered(answer) => self.answered(answer, now),
            Observation::Elsewhere { namespace, worker } => {
                self.elsewhere((namespace, worker), now);
                Ok(Vec::new())
            }
            Observation::Served { key, process, counts } => self.served(&key, process, counts, now),
            Observation::Registered(registration) => self.registered(registration, now),
            Observation::Deregistered(registration) => self.deregistered(registration, now),
            Observation::Load(event) => self.loaded(event, now),
            Observation::Estimated(event) => self.estimated(event, now),
            Observation::Passed(event) => self.passed(&event, now),
            Observation::Heard(message) => {
                self.numbered(message, now);
                Ok(Vec::new())
            }
            Observation::ChannelLost(channel) => {
                self.lose(channel);
                Ok(Vec::new())
            }
            Observation::HitRate { message, hit } => Ok(self.placed(message, hit, now).into_iter().collect()),
            Observation::Routed(event) => Ok(self.routed(event, now)),
            Observation::Rejected(rejection) => Err(rejection),
            Observation::Scraped(scrape) => Ok(self.scraped(scrape, now)),
            Observation::Connection { source, connected } => {
                self.connection(source, connected);
                Ok(Vec::new())
            }
            Observation::Denied { source, actions } => {
                self.health.denied.insert(source, actions);
                Ok(Vec::new())
            }
            Observation::Abandoned(source) => {
                self.rules.registries.remove(&source);
                Ok(Vec::new())
            }
            Observation::Lost(lost) => {
                self.health.lost(lost);
                Ok(Vec::new())
            }
        };
        let mut measurements = std::mem::take(&mut self.late);
        match folded {
            Ok(folded) => measurements.extend(folded),
            Err(rejection) => self.refuse(rejection),
        }
        Applied { measurements, rejection: self.refused.take() }
    }

    fn refuse(&mut self, rejection: Rejection) {
        self.health.rejected(&rejection);
        self.refused.get_or_insert(rejection);
    }

    fn answered(&mut self, answer: Answer, now: Instant) -> Result<Vec<Measurement>, Rejection> {
        let Answer { key, process, mut report, release } = answer;
        let reject = |reason, detail| Rejection { source: Source::Nats, topic: Topic::Stats, reason, detail };
        let refused = self.workers.get(&key).is_some_and(|worker| !self.may_answer(worker, &process, now));
        if refused {
            let detail = format!("worker {} answers from two processes", key.id);
            return Err(reject(Reason::DuplicateWorker, detail));
        }
        let key = self.remember(key).map_err(|(reason, detail)| reject(reason, detail))?;
        let more_room = self.has_room();
        let Some(worker) = self.workers.get_mut(&key) else { return Ok(Vec::new()) };
        let mut refusals = Vec::new();
        if let Some(Report { rank, load }) = &report {
            refusals.extend(worker.judge(&mut load.clone()));
            refusals.extend(worker.admits(*rank, more_room).inspect_err(|_| report = None).err());
        }
        if !worker.answered(process, report, now) {
            refusals.push(leap());
        }
        worker.release = release;
        for (reason, detail) in refusals {
            self.refuse(reject(reason, format!("worker {}: {detail}", key.id)));
        }
        self.consider(&key, now).map_err(|(reason, detail)| reject(reason, detail))
    }

    /// Whether this process may answer for the worker.
    ///
    /// Where two processes claim one key, the one that started later has it, so that a restarted worker takes over at
    /// once and two living ones do not alternate.
    fn may_answer(&self, worker: &Worker, process: &Process, now: Instant) -> bool {
        let connected = self.health.connected();
        let answers = worker.answers(self.hearing(&connected, now));
        worker.process().is_none_or(|known| known == process || process.order() > known.order() || !answers)
    }

    fn registered(&mut self, registration: Registration, now: Instant) -> Result<Vec<Measurement>, Rejection> {
        let Registration { source, key, mut entry } = registration;
        if serves(&key, &entry) && self.serving.len() < self.max_candidates() {
            self.serving.insert((source, key.id));
        }
        let target = &self.rules.target;
        if !target.watches(&key.component, &key.endpoint) {
            return Ok(Vec::new());
        }
        let reject = |(reason, detail)| Rejection { source, topic: Topic::Discovery, reason, detail };
        let key = self.remember(key).map_err(reject)?;
        let impossible = if let Entry::Card(card) = &mut entry { bounds::judge_card(card) } else { None };
        let is_card = matches!(entry, Entry::Card(_));
        let beyond = self.enter(&key, |worker| worker.registered(source, entry)).filter(|_| is_card);
        for (reason, detail) in impossible.into_iter().chain(beyond) {
            self.refuse(reject((reason, format!("worker {}: {detail}", key.id))));
        }
        self.consider(&key, now).map_err(reject)
    }

    /// Changes the entries of a worker, and finds room for the ranks that it has then; says for how many there was none.
    fn enter(&mut self, key: &WorkerKey, change: impl FnOnce(&mut Worker)) -> Option<Refusal> {
        let others = self.workers.get(key).map_or(0, |worker| self.ranks.saturating_sub(worker.rank_count()));
        let worker = self.workers.get_mut(key)?;
        change(worker);
        let beyond = worker.list_ranks(max_ranks(self.rules.max_workers).saturating_sub(others));
        self.ranks = others + worker.rank_count();
        (beyond > 0).then(|| (Reason::TooManyRanks, format!("{beyond} of its ranks")))
    }

    /// Counts the ranks that are left, and gives their room to workers that lacked it.
    fn count_ranks(&mut self) {
        self.ranks = self.workers.values().map(Worker::rank_count).sum();
        if self.has_room() {
            let waiting = self.workers.iter().filter(|(_, worker)| worker.lacks_room());
            for key in waiting.map(|(key, _)| Arc::clone(key)).collect::<Vec<_>>() {
                self.enter(&key, |_| ());
            }
        }
    }

    /// Whether there is room for a rank that is new.
    fn has_room(&self) -> bool {
        self.ranks < max_ranks(self.rules.max_workers)
    }

    /// What it had may be another's now: the endpoint that has its id, where one process moved from one to the other.
    fn deregistered(&mut self, registration: Registration, now: Instant) -> Result<Vec<Measurement>, Rejection> {
        let Registration { source, key, entry } = registration;
        if serves(&key, &entry) {
            self.serving.remove(&(source, key.id));
        }
        self.enter(&key, |worker| worker.deregistered(source, entry));
        let same_id = self.by_id.get(&id_of(&key)).into_iter().flatten();
        let waits = |other: &&Arc<WorkerKey>| {
            self.workers.get(*other).is_some_and(|worker| matches!(worker.claim, Claim::Lost(_)))
        };
        let waiting = same_id.filter(waits).cloned().collect::<Vec<_>>();
        let mut measurements = Vec::new();
        for key in waiting {
            let reject = |(reason, detail)| Rejection { source, topic: Topic::Discovery, reason, detail };
            measurements.extend(self.consider(&key, now).map_err(reject)?);
        }
        Ok(measurements)
    }

    fn loaded(&mut self, event: LoadEvent, now: Instant) -> Result<Vec<Measurement>, Rejection> {
        self.numbered(event.message, now);
        let id = (Arc::clone(&event.namespace), event.worker);
        let Some(key) = self.reporter(&id, now) else {
            let (channel, worker) = (event.message.channel, event.worker);
            if self.may_be_watched(&id, event.scope.as_ref(), now) {
                self.pending.load(id, event, now).map_err(|refusal| refused(channel, worker, refusal))?;
            } else {
                self.pending.drop(Topic::KvMetrics, 1);
            }
            return Ok(Vec::new());
        };
        self.spoken(&key, event.message.channel, now, |fleet, key| fleet.load(key, &event, now))
    }

    fn passed(&mut self, event: &PassEvent, now: Instant) -> Result<Vec<Measurement>, Rejection> {
        self.numbered(event.message, now);
        let PassEvent { pass, .. } = *event;
        let id = (Arc::clone(&event.namespace), event.worker);
        let channel = event.message.channel;
        let Some(key) = self.reporter(&id, now) else {
            bounds::judge_pass(&pass, None).map_err(|refusal| refused(channel, event.worker, refusal))?;
            if self.may_be_watched(&id, event.scope.as_ref(), now) {
                self.pending.pass(id, event, now).map_err(|refusal| refused(channel, event.worker, refusal))?;
            } else {
                self.pending.drop(Topic::ForwardPassMetrics, 1);
            }
            return Ok(Vec::new());
        };
        let mut taken = false;
        let mut measurements = self.spoken(&key, channel, now, |fleet, key| taken = fleet.pass(key, event, now))?;
        if taken && pass.wall_time > 0.0 {
            measurements.push(Measurement::WallTime(self.group(&key), pass.wall_time));
        }
        Ok(measurements)
    }

    fn estimated(&mut self, event: EstimateEvent, now: Instant) -> Result<Vec<Measurement>, Rejection> {
        let EstimateEvent { message: Numbered { channel, .. }, namespace, worker, rank, mut estimate } = event;
        self.numbered(event.message, now);
        let id = (namespace, worker);
        let known = self.reporter(&id, now).and_then(|key| self.workers.get(&key));
        let admitted = known.map_or(Ok(()), |worker| worker.admits(rank, true));
        let Some(estimates) = &mut self.estimates else { return Ok(Vec::new()) };
        admitted.map_err(|refusal| refused(channel, worker, refusal))?;
        let impossible = bounds::judge_estimate(&mut estimate);
        if !estimates.take(channel, (id, rank), estimate, now) {
            let detail = "no room for another router's estimate".to_owned();
            return Err(refused(channel, worker, (Reason::TooManyEntries, detail)));
        }
        impossible.map_or(Ok(Vec::new()), |refusal| Err(refused(channel, worker, refusal)))
    }

    /// Counts a pass of a worker, unless it cannot be. Whether it was counted.
    fn pass(&mut self, key: &Arc<WorkerKey>, event: &PassEvent, now: Instant) -> bool {
        let PassEvent { rank, pass, message: Numbered { channel, .. }, .. } = *event;
        let more_room = self.has_room();
        let Some(worker) = self.workers.get_mut(key) else { return false };
        let admitted = worker.admits(rank, more_room).and_then(|()| bounds::judge_pass(&pass, worker.card()));
        if let Err(refusal) = admitted {
            self.refuse(refused(channel, key.id, refusal));
            return false;
        }
        let before = worker.rank_count();
        worker.passed(channel, rank, pass, now);
        self.ranks += worker.rank_count() - before;
        self.channels.carries(channel, key);
        true
    }

    /// Takes what an event says of a worker that is known, after what was held of it.
    fn spoken(
        &mut self,
        key: &Arc<WorkerKey>,
        channel: Channel,
        now: Instant,
        take: impl FnOnce(&mut Self, &Arc<WorkerKey>),
    ) -> Result<Vec<Measurement>, Rejection> {
        let Channel { source, topic, .. } = channel;
        let reject = |(reason, detail)| Rejection { source, topic, reason, detail };
        let key = self.remember(WorkerKey::clone(key)).map_err(reject)?;
        let mut measurements = self.catch_up(&key, now);
        take(self, &key);
        measurements.extend(self.consider(&key, now).map_err(reject)?);
        Ok(measurements)
    }

    /// How long an event alone keeps a worker: only where no discovery is configured that could name it.
    fn idle_ttl(&self) -> Option<Duration> {
        self.rules.registries.is_empty().then_some(self.rules.idle_ttl)
    }

    fn served(
        &mut self,
        key: &WorkerKey,
        process: Process,
        counts: EndpointCounts,
        now: Instant,
    ) -> Result<Vec<Measurement>, Rejection> {
        let taken = self.served.take(self.hits.labels(key), process, counts, now, self.rules.worker_ttl);
        let reject = |(reason, detail)| Rejection { source: Source::Nats, topic: Topic::Stats, reason, detail };
        taken.map(|()| Vec::new()).map_err(reject)
    }

    /// A worker that is not watched answers under that id: an event that names no place is not the target's.
    fn elsewhere(&mut self, id: Id, now: Instant) {
        if self.idle_ttl().is_none() {
            return;
        }
        self.pending.give_up_unplaced(&id);
        let keys = self.by_id.get(&id).into_iter().flatten();
        let is_wrong = |key: &&Arc<WorkerKey>| self.workers.get(*key).is_some_and(Worker::is_guessed);
        for key in keys.filter(is_wrong).cloned().collect::<Vec<_>>() {
            self.depart(&key, now);
            self.drop_worker(&key, now);
        }
        if self.elsewhere.len() < self.max_candidates() || self.elsewhere.contains_key(&id) {
            self.elsewhere.insert(id, now);
        }
    }

    /// A scrape ended: whoever was heard before it began and did not answer is known by events alone, where no discovery
    /// is configured that could name them.
    fn scraped(&mut self, scrape: Scrape, now: Instant) -> Vec<Measurement> {
        let (took, asked) = (scrape.took, scrape.outcome.is_success());
        self.health.scraped(scrape);
        let mut measurements = vec![Measurement::ScrapeDuration(took)];
        let unanswered = self.pending.all().filter(|(_, held)| asked && held.since + took <= now);
        let named = unanswered.filter_map(|(id, held)| self.named_by_event(id, held)).collect::<Vec<_>>();
        for (key, guessed) in named {
            match self.welcome_by_events(key, guessed, now) {
                Ok(welcomed) => measurements.extend(welcomed),
                Err((reason, detail)) => {
                    self.refuse(Rejection { source: Source::Nats, topic: Topic::Stats, reason, detail });
                }
            }
        }
        measurements
    }

    /// Whose events they are, and whether that is a guess: they named no place, and are taken for the target's.
    fn named_by_event(&self, id: &Id, held: &Held) -> Option<(WorkerKey, bool)> {
        self.idle_ttl()?;
        if self.departed.contains_key(id) {
            return None;
        }
        let target = &self.rules.target;
        let explicit = || target.explicit().map(|(c, e)| Scope { component: c.into(), endpoint: e.into() });
        let Scope { component, endpoint } = held.scope.clone().or_else(explicit)?;
        let watched = target.watches(&component, &endpoint);
        let key = WorkerKey { namespace: Arc::clone(&id.0), component, endpoint, id: id.1 };
        (watched && !self.by_id.contains_key(id)).then_some((key, held.scope.is_none()))
    }

    fn welcome_by_events(
        &mut self,
        key: WorkerKey,
        guessed: bool,
        now: Instant,
    ) -> Result<Vec<Measurement>, (Reason, String)> {
        let key = self.remember(key)?;
        if let Some(worker) = self.workers.get_mut(&key) {
            worker.guessed = guessed;
        }
        self.consider(&key, now)
    }

    /// Whether an id that nothing names may be that of a watched worker. One that has departed stays so while it is heard.
    fn may_be_watched(&mut self, id: &Id, scope: Option<&Scope>, now: Instant) -> bool {
        if let Some(at) = self.departed.get_mut(id) {
            *at = now;
        }
        scope.is_some() || !self.elsewhere.contains_key(id)
    }

    /// Applies what was heard of an id before its worker was known.
    fn catch_up(&mut self, key: &Arc<WorkerKey>, now: Instant) -> Vec<Measurement> {
        let id = id_of(key);
        if self.reporter(&id, now).is_none_or(|reporter| reporter != *key) {
            return Vec::new();
        }
        let Some(mut held) = self.pending.take(&id) else { return Vec::new() };
        for event in held.ranks.values() {
            self.load(key, event, now);
        }
        let before = self.workers.get(key).map_or(0, Worker::rank_count);
        let most = before + max_ranks(self.rules.max_workers).saturating_sub(self.ranks);
        let mut admitted = 0;
        for (rank, channel) in held.passes.channels().collect::<Vec<_>>() {
            match self.workers.get(key).map_or(Ok(()), |worker| worker.admits(rank, admitted < most)) {
                Ok(()) => {
                    admitted += 1;
                    self.channels.carries(channel, key);
                }
                Err(refusal) => {
                    held.passes.remove(rank);
                    self.refuse(refused(channel, key.id, refusal));
                }
            }
        }
        held.wall_times.retain(|(rank, _)| held.passes.has(*rank));
        if let Some(worker) = self.workers.get_mut(key) {
            worker.caught_up(held.passes, now);
            self.ranks = self.ranks.saturating_sub(before) + worker.rank_count();
        }
        let group = self.group(key);
        held.wall_times.into_iter().map(|(_, time)| Measurement::WallTime(group.clone(), time)).collect()
    }

    fn load(&mut self, key: &Arc<WorkerKey>, event: &LoadEvent, now: Instant) {
        let (channel, more_room) = (event.message.channel, self.has_room());
        let Some(worker) = self.workers.get_mut(key).filter(|_| !event.load.is_unknown()) else { return };
        if let Err(refusal) = worker.admits(event.rank, more_room) {
            return self.refuse(refused(channel, key.id, refusal));
        }
        // It is kept as it was said: the card may be late.
        let impossible = worker.judge(&mut event.load.clone());
        let before = worker.rank_count();
        let leap = (!worker.heard(channel, event.rank, &event.load, now)).then(leap);
        self.ranks += worker.rank_count() - before;
        self.channels.carries(channel, key);
        for refusal in impossible.into_iter().chain(leap) {
            self.refuse(refused(channel, key.id, refusal));
        }
    }

    /// Who reports under an id: the living worker that has it, else one that is gone, else the one with a card, else the only
    /// candidate, else the one that serves requests.
    fn reporter(&self, id: &Id, now: Instant) -> Option<Arc<WorkerKey>> {
        let keys = self.by_id.get(id)?;
        if keys.len() == 1 {
            return keys.first().cloned();
        }
        let is_worker = |key: &&Arc<WorkerKey>| self.workers.get(*key).is_some_and(|worker| worker.welcomed);
        let is_living = |key: &&Arc<WorkerKey>| is_worker(key) && self.is_living(key, now);
        let has_card = |key: &&Arc<WorkerKey>| self.workers.get(*key).is_some_and(Worker::has_card);
        let serves = |key: &&Arc<WorkerKey>| &*key.endpoint == SERVED;
        keys.iter()
            .find(is_living)
            .or_else(|| keys.iter().find(is_worker))
            .or_else(|| keys.iter().find(has_card))
            .or_else(|| keys.iter().find(serves))
            .cloned()
    }

    /// Judges the number of a message.
    fn numbered(&mut self, message: Numbered, now: Instant) {
        let Channel { source, topic, .. } = message.channel;
        self.health.heard(topic);
        if let Some(gap) = self.channels.see(message, now) {
            self.health.missed(source, topic, gap.lost);
            self.forget(message.channel, &gap.workers);
        }
    }

    fn lose(&mut self, channel: Channel) {
        let workers = self.channels.lose(channel);
        self.forget(channel, &workers);
    }

    /// What came over that channel, of those workers too, is no longer known.
    fn forget(&mut self, channel: Channel, workers: &BTreeSet<Arc<WorkerKey>>) {
        self.placements.lose(channel);
        self.estimates.iter_mut().for_each(|estimates| estimates.lose(channel));
        for key in workers {
            if let Some(worker) = self.workers.get_mut(key) {
                worker.forget(channel);
            }
        }
    }

    fn connection(&mut self, source: Source, connected: bool) {
        self.health.connection(source, connected);
        // What was published while the connection is down is missed.
        if !connected {
            for channel in self.channels.of(source) {
                self.lose(channel);
            }
        }
    }

    /// The entry of a key, made if there is room.
    fn remember(&mut self, key: WorkerKey) -> Result<Arc<WorkerKey>, (Reason, String)> {
        if let Some((known, _)) = self.workers.get_key_value(&key) {
            return Ok(Arc::clone(known));
        }
        if self.workers.len() >= self.max_candidates() {
            return Err((Reason::TooManyWorkers, format!("{} is beyond what is remembered", key.id)));
        }
        let key = Arc::new(key);
        self.workers.insert(Arc::clone(&key), Worker::default());
        self.departed.remove(&id_of(&key));
        self.by_id.entry(id_of(&key)).or_default().insert(Arc::clone(&key));
        Ok(key)
    }

    fn max_candidates(&self) -> usize {
        self.rules.max_workers.saturating_mul(CANDIDATES_PER_WORKER)
    }

    /// Welcomes an entry as a worker, if it is one now, and applies what was heard of its id before.
    fn consider(&mut self, key: &Arc<WorkerKey>, now: Instant) -> Result<Vec<Measurement>, (Reason, String)> {
        let mut measurements = self.catch_up(key, now);
        let explicit = is_explicit(&self.rules.target, key);
        let Some(worker) = self.workers.get(key) else { return Ok(measurements) };
        if !(worker.welcomed || worker.reported || worker.is_an_engine() || explicit) {
            return Ok(measurements);
        }
        let group = self.group(key);
        if !worker.welcomed {
            self.admit(key, &group)?;
        }
        let block_sizes = self.workers.get(key).map(Worker::block_sizes).unwrap_or_default();
        if !self.hits.is_settled(key, &block_sizes) {
            self.settle_rivalry(key, now);
            for hit in self.hits.name(key, block_sizes, now) {
                match hit {
                    Ok(blocks) => measurements.push(Measurement::HitRate(group.clone(), blocks)),
                    Err(rejection) => self.refuse(rejection),
                }
            }
        }
        self.groups.insert(group, now);
        Ok(measurements)
    }

    /// Finds out whether another worker has what this one needs. An id goes over at once where its worker is gone. Labels wait
    /// for the next snapshot, in which nobody has them: the series ends before it begins anew.
    fn settle_rivalry(&mut self, key: &Arc<WorkerKey>, now: Instant) {
        let mut rival = self.hits.rival(key);
        if let Some(Rival::Id(other)) = &rival
            && !self.is_living(other, now)
        {
            let other = Arc::clone(other);
            self.depart(&other, now);
            rival = self.hits.rival(key);
        }
        let Some(worker) = self.workers.get_mut(key) else { return };
        let was_hidden = worker.is_hidden();
        worker.claim = rival.map_or(Claim::Settled, Claim::Lost);
        if let (Claim::Lost(Rival::Labels(other)), false) = (&worker.claim, was_hidden) {
            let source = worker.named_by();
            let topic = if source == Source::Nats { Topic::Stats } else { Topic::Discovery };
            let WorkerKey { namespace, component, endpoint, id } = &**key;
            let detail = format!(
                "worker {id} of {component}/{endpoint} is there in {} and in {namespace}, which the labels do not tell apart",
                other.namespace
            );
            self.refuse(Rejection { source, topic, reason: Reason::DuplicateWorker, detail });
        }
    }

    /// What it counts is the last that it had, and others may have its labels and its id.
    fn depart(&mut self, key: &WorkerKey, now: Instant) {
        self.hits.depart(key, now);
        if let Some(worker) = self.workers.get_mut(key) {
            worker.claim = Claim::Open;
        }
    }

    fn is_living(&self, key: &WorkerKey, now: Instant) -> bool {
        let connected = self.health.connected();
        let hearing = self.hearing(&connected, now);
        self.workers.get(key).is_some_and(|worker| worker.presence(hearing) != Presence::Gone)
    }

    fn admit(&mut self, key: &Arc<WorkerKey>, group: &Group) -> Result<(), (Reason, String)> {
        if self.welcomed >= self.rules.max_workers {
            return Err((Reason::TooManyWorkers, format!("worker {} is beyond --max-workers", key.id)));
        }
        if self.groups.len() >= MAX_GROUPS && !self.groups.contains_key(group) {
            let detail = format!("{}/{} is beyond {MAX_GROUPS} groups", key.component, key.endpoint);
            return Err((Reason::TooManyGroups, detail));
        }
        if let Some(worker) = self.workers.get_mut(key) {
            worker.welcomed = true;
            self.welcomed += 1;
        }
        Ok(())
    }

    fn placed(&mut self, message: Numbered, hit: HitRate, now: Instant) -> Option<Measurement> {
        self.numbered(message, now);
        if let Err(refusal) = bounds::judge_blocks(hit.blocks.isl) {
            self.refuse(refused(message.channel, hit.worker, refusal));
            return None;
        }
        let (by, counted) = (PlacedBy::over(message.channel, hit.worker), Counted::Blocks(hit.blocks));
        let (key, blocks) = self.hits.count((hit.namespace, hit.worker), by, counted, now).ok().flatten()?;
        Some(Measurement::HitRate(self.group(&key), blocks))
    }

    fn routed(&mut self, event: RoutingEvent, now: Instant) -> Vec<Measurement> {
        self.numbered(event.message, now);
        let channel = event.message.channel;
        let mut measurements = Vec::new();
        for mut routing in event.steps {
            if let Step::Placed(prompt) = &mut routing.step
                && let Err(refusal) = bounds::judge_prompt(prompt)
            {
                *prompt = Prompt { full_blocks: None, cached: Cached::Untracked };
                self.refuse(refused(channel, routing.worker, refusal));
            }
            let Routing { router, adapter, worker, .. } = routing;
            let is_placed = matches!(routing.step, Step::Placed(_));
            let apart = is_placed && router.is_some_and(|router| self.is_apart(router));
            let by = PlacedBy { channel, router, apart, adapter, on: worker };
            let on = (Arc::clone(&event.namespace), worker);
            for (id, by, counted) in self.placements.take(by, &routing, on, now) {
                match self.hits.count(id, by, counted, now) {
                    Ok(None) => {}
                    Ok(Some((key, blocks))) => measurements.push(Measurement::HitRate(self.group(&key), blocks)),
                    Err(rejection) => self.refuse(rejection),
                }
            }
        }
        measurements
    }

    /// Whether a router runs apart from every frontend.
    fn is_apart(&self, router: WorkerId) -> bool {
        Source::ALL.into_iter().any(|source| self.serving.contains(&(source, router)))
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

    fn hearing<'a>(&self, connected: &'a BTreeSet<Source>, now: Instant) -> Hearing<'a> {
        Hearing { now, worker_ttl: self.rules.worker_ttl, idle_ttl: self.idle_ttl(), connected }
    }

    /// Forgets what is gone, and publishes the rest as it is at `now`.
    pub fn snapshot(&mut self, now: Instant) -> Snapshot {
        let connected = self.health.connected();
        let hearing = self.hearing(&connected, now);
        let unnamed = self.expire(hearing);
        self.health.complete = self.completeness.look(&self.health, now);
        self.generation += 1;
        let mut hits: Vec<_> = self.hits.totals().map(|(key, totals)| (Arc::clone(key), totals)).collect();
        hits.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        let mut snapshot = Snapshot {
            generation: self.generation,
            at: Some(now),
            every_namespace: self.every_namespace(),
            hits,
            unnamed,
            health: self.health.clone(),
            ..Snapshot::default()
        };
        let in_flight = self.placements.in_flight();
        let placed_on = self.hits.placed_on();
        snapshot.in_flight =
            placed_on.map(|key| (Arc::clone(key), in_flight.get(&id_of(key)).copied().unwrap_or_default())).collect();
        snapshot.in_flight.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        snapshot.estimates = self.router_estimates(hearing);
        let served = self.served.totals(now, self.rules.worker_ttl);
        snapshot.served = served.map(|(key, counts)| (key.clone(), counts)).collect();
        snapshot.served.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        let mut groups = self.remembered_groups();
        let members = self.workers.iter().filter(|(_, worker)| worker.welcomed && !worker.is_hidden());
        for (key, worker) in members {
            let presence = worker.presence(hearing);
            if presence != Presence::Gone {
                let tally = groups.entry(self.group(key)).or_default();
                add_member(&mut snapshot, tally, key, worker, presence);
            }
        }
        snapshot.groups = groups.into_iter().map(|(group, tally)| tally.view(group)).collect();
        snapshot
    }

    /// What routers believe of living workers.
    fn router_estimates(&self, hearing: Hearing<'_>) -> Vec<RouterEstimate> {
        let is_shown = |worker: &&Worker| {
            let is_here = matches!(worker.presence(hearing), Presence::Ready | Presence::Draining);
            worker.welcomed && !worker.is_hidden() && is_here
        };
        let view = |(channel, id, rank, estimate): (Channel, &Id, Rank, Estimate)| {
            let key = self.reporter(id, hearing.now)?;
            let worker = self.workers.get(&key).filter(is_shown).filter(|worker| worker.has(rank))?;
            // JSON has no envelope to say whose it is, and stands under its worker's own id.
            let publisher = Some(channel.publisher).filter(|publisher| *publisher != key.id.0);
            Some(RouterEstimate { is_labelled: worker.is_labelled(rank), key, rank, publisher, estimate })
        };
        let mut estimates: Vec<_> = self.estimates.iter().flat_map(Estimates::all).filter_map(view).collect();
        let labels = |view: &RouterEstimate| (Arc::clone(&view.key), view.rank, view.publisher);
        estimates.sort_by_cached_key(labels);
        estimates.dedup_by_key(|view| labels(view));
        estimates
    }

    /// Gives labels and ids whose worker had departed by the last snapshot to those that wait for them.
    fn look_for_heirs(&mut self, hearing: Hearing<'_>) {
        let waits = |(_, worker): &(&Arc<WorkerKey>, &Worker)| {
            worker.welcomed && worker.claim != Claim::Settled && worker.presence(hearing) != Presence::Gone
        };
        let waiting: Vec<_> = self.workers.iter().filter(waits).map(|(key, _)| Arc::clone(key)).collect();
        for key in waiting {
            // One that was welcomed is within every bound.
            let measurements = self.consider(&key, hearing.now).unwrap_or_default();
            self.late.extend(measurements);
        }
    }

    /// Forgets what is gone; the id of which most events were given up with it.
    fn expire(&mut self, hearing: Hearing<'_>) -> Option<Unnamed> {
        self.look_for_heirs(hearing);
        let (mut gone, mut forgotten) = (Vec::new(), Vec::new());
        for (key, worker) in &self.workers {
            if worker.welcomed && worker.presence(hearing) == Presence::Gone {
                gone.push(Arc::clone(key));
            } else if worker.welcomed {
                self.groups.insert(self.group(key), hearing.now);
            }
            if worker.is_forgotten(hearing) {
                forgotten.push(Arc::clone(key));
            }
        }
        for key in gone {
            self.depart(&key, hearing.now);
        }
        for key in forgotten {
            self.drop_worker(&key, hearing.now);
        }
        let (event_ttl, idle_ttl) = (self.rules.event_ttl, self.rules.idle_ttl);
        let unnamed = self.pending.expire(hearing.now, event_ttl);
        self.count_ranks();
        let unnamed = unnamed.into_iter().filter(|unnamed| self.is_missed(unnamed)).max_by_key(Unnamed::events);
        self.elsewhere.retain(|_, seen| hearing.now.saturating_duration_since(*seen) < idle_ttl);
        // An event that comes at the end of it is held, and is not to name anybody either.
        let memory = idle_ttl.saturating_add(event_ttl);
        self.departed.retain(|_, seen| hearing.now.saturating_duration_since(*seen) < memory);
        self.served.expire(hearing.now, event_ttl.max(hearing.worker_ttl));
        self.hits.expire(hearing.now);
        self.placements.expire(hearing.now);
        if let Some(estimates) = &mut self.estimates {
            estimates.expire(hearing.now, |id| self.by_id.contains_key(id));
        }
        let dropped = self.hits.dropped();
        self.health.unnamed_events = BTreeMap::from([
            (Topic::KvHitRate, dropped.hit_rates),
            (Topic::ActiveSequences, dropped.placements),
            (Topic::KvMetrics, self.pending.dropped(Topic::KvMetrics)),
            (Topic::ForwardPassMetrics, self.pending.dropped(Topic::ForwardPassMetrics)),
        ]);
        self.groups.retain(|_, seen| hearing.now.saturating_duration_since(*seen) < GROUP_MEMORY);
        unnamed
    }

    fn drop_worker(&mut self, key: &Arc<WorkerKey>, now: Instant) {
        let Some(worker) = self.workers.remove(key) else { return };
        self.welcomed -= usize::from(worker.welcomed);
        let id = id_of(key);
        if let Some(keys) = self.by_id.get_mut(&id) {
            keys.remove(key);
            if keys.is_empty() {
                self.by_id.remove(&id);
            }
        }
        let is_gone = !worker.is_kept_by_events() && !self.by_id.contains_key(&id);
        if is_gone && self.departed.len() < self.max_candidates() {
            self.departed.insert(id, now);
        }
    }

    /// Whether it is to be said that events of an id were given up: they may be a watched worker's, and it has not just left.
    fn is_missed(&self, unnamed: &Unnamed) -> bool {
        let Unnamed { namespace, scope, worker, .. } = unnamed;
        let target = &self.rules.target;
        let watched = match scope {
            Some(Scope { component, endpoint }) => target.watches(component, endpoint),
            None => target.component.is_none() && target.endpoint.is_none(),
        };
        watched && unnamed.events() > 0 && !self.departed.contains_key(&(Arc::clone(namespace), *worker))
    }

    /// Groups to be shown though they have no workers.
    fn remembered_groups(&self) -> BTreeMap<Group, Tally> {
        let mut groups: BTreeMap<Group, Tally> =
            self.groups.keys().map(|group| (group.clone(), Tally::default())).collect();
        if let Some((component, endpoint)) = self.rules.target.explicit().filter(|_| !self.every_namespace()) {
            groups
                .entry(Group { namespace: None, component: component.into(), endpoint: endpoint.into() })
                .or_default();
        }
        groups
    }
}

fn id_of(key: &WorkerKey) -> Id {
    (Arc::clone(&key.namespace), key.id)
}

/// An event of that worker that is not used, or a part of one.
fn refused(channel: Channel, worker: WorkerId, (reason, detail): Refusal) -> Rejection {
    let detail = format!("worker {worker}: {detail}");
    Rejection { source: channel.source, topic: channel.topic, reason, detail }
}

fn leap() -> Refusal {
    (Reason::OutOfRange, "the counts of speculative decoding leap".to_owned())
}

fn serves(key: &WorkerKey, entry: &Entry) -> bool {
    matches!(entry, Entry::Instance(_)) && &*key.endpoint == SERVED
}

fn is_explicit(target: &Target, key: &WorkerKey) -> bool {
    target.explicit().is_some_and(|(component, endpoint)| *component == *key.component && *endpoint == *key.endpoint)
}

/// What a group's members add up to.
#[derive(Debug, Default)]
struct Tally {
    states: BTreeMap<WorkerState, u64>,
    active_blocks: Vec<u64>,
    ranks: u64,
}

impl Tally {
    fn view(self, group: Group) -> GroupView {
        let known = self.active_blocks.len() as u64;
        GroupView {
            group,
            load: LoadStatistics::of(&self.active_blocks),
            coverage: Coverage { known, ranks: self.ranks },
            workers: WorkerState::ALL.map(|state| (state, self.states.get(&state).copied().unwrap_or_default())),
        }
    }
}

/// One that is not ready is counted, and shows nothing else.
fn add_member(snapshot: &mut Snapshot, tally: &mut Tally, key: &Arc<WorkerKey>, worker: &Worker, presence: Presence) {
    *tally.states.entry(worker.state(presence)).or_default() += 1;
    if presence == Presence::NotReady {
        return;
    }
    snapshot.by_events_alone += u64::from(worker.is_kept_by_events());
    let ranks = worker.ranks();
    tally.ranks += worker.all_ranks(ranks.len());
    tally.active_blocks.extend(ranks.values().filter_map(|load| load.active_blocks));
    for (rank, load) in ranks.into_iter().filter(|(_, load)| !load.is_unknown()) {
        let is_labelled = worker.is_labelled(rank);
        snapshot.loads.push(WorkerLoad { key: Arc::clone(key), rank, is_labelled, load });
    }
    for (rank, last, totals) in worker.passes.ranks().filter(|(rank, ..)| worker.has(*rank)) {
        snapshot.passes.push(RankPasses { key: Arc::clone(key), rank, last, totals });
    }
    let spec_decode = worker.spec_decode.totals();
    if spec_decode != SpecDecodeCounts::default() {
        snapshot.spec_decode.push((Arc::clone(key), spec_decode));
    }
    snapshot.infos.push(WorkerInfo {
        key: Arc::clone(key),
        release: worker.release.clone(),
        card: worker.card().cloned(),
        adapters: worker.adapters(),
        pod: worker.pod().cloned(),
    });
}

#[cfg(test)]
mod tests;
