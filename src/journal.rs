//! What the bridge writes to its log about the fleet, in the words of Dynamo's old `metrics` component.

use std::collections::HashMap;
use std::fmt;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::fleet::{Load, Reason, Rejection, Scope, Snapshot, Source, Topic, Unnamed, WorkerLoad};
use crate::target::{self, Form, Target};
use crate::throttle::Throttle;

/// Target of these lines: the program's name, under which operators know them.
const TARGET: &str = "metrics";
/// How often it is repeated that nobody answers.
const NOBODY_PAUSE: Duration = Duration::from_secs(10);
/// Refreshes that brought computed prompts and no word of a router, before it is said what to switch on. A request that was
/// placed before the bridge came is computed in less.
const PROMPTS_UNPLACED: u32 = 30;
/// Workers written out; a larger fleet's line ends in their number.
const WORKERS_WRITTEN: usize = 8;

/// Writes on change, and complains in moderation.
#[derive(Debug)]
pub(crate) struct Journal {
    subject: String,
    last_loads: Vec<WorkerLoad>,
    nobody_since: Option<Instant>,
    complaints: HashMap<(Source, Topic, Reason), Throttle>,
    unnamed: Throttle,
    /// Nothing where nobody listens to routers, or there is nothing more to say.
    unplaced: Option<Unplaced>,
}

/// What engines computed while no router was heard.
#[derive(Debug, Default)]
struct Unplaced {
    prefill_tokens: u64,
    refreshes: u32,
}

impl Journal {
    /// Says what will be watched. `topics` are those that are listened to.
    pub(crate) fn open(target: &Target, topics: &[Topic]) -> Self {
        info!(target: TARGET, "Creating unique instance of Metrics at {}/components/metrics/instance", target.namespace);
        let subjects = target.subjects();
        for (service, subject) in &subjects {
            info!(target: TARGET, "Scraping service {service} and filtering on subject {subject}");
        }
        let subject = subjects.into_iter().next().map(|(_, subject)| subject).unwrap_or_default();
        let unplaced = topics.contains(&Topic::ActiveSequences).then(Unplaced::default);
        Self {
            subject,
            last_loads: Vec::new(),
            nobody_since: None,
            complaints: HashMap::new(),
            unnamed: Throttle::default(),
            unplaced,
        }
    }

    /// The fleet was refreshed.
    pub(crate) fn published(&mut self, fleet: &Snapshot, now: Instant) {
        match self.looks_for_workers(fleet, now) {
            Some(false) => warn!(target: TARGET, "No endpoints found matching subject {}", self.subject),
            Some(true) => info!(target: TARGET, "Endpoints found matching subject {}", self.subject),
            None => {}
        }
        if fleet.loads != self.last_loads {
            info!(target: TARGET, "Aggregated metrics: {:?}", ProcessedEndpoints(fleet));
            self.last_loads.clone_from(&fleet.loads);
        }
        if let Some(unnamed) = &fleet.unnamed
            && let Some(more_since_last) = self.unnamed.due(now)
        {
            warn!(target: TARGET, more_since_last, "Events are not counted: {}", Unregistered(unnamed));
        }
        if self.misses_routers(fleet) {
            info!(
                target: TARGET,
                "Engines compute prompts, and no KV router says what it places: there are no hit rates, and no requests \
                 placed or in flight by worker; start frontends and routers with --router-mode kv and --router-replica-sync"
            );
        }
    }

    /// Whether there are workers, where that is to be said: that there are none again and again, that there are some once.
    fn looks_for_workers(&mut self, fleet: &Snapshot, now: Instant) -> Option<bool> {
        let is_empty = fleet.groups.iter().all(|group| group.workers.iter().all(|(_, count)| *count == 0));
        if !is_empty {
            return self.nobody_since.take().map(|_| true);
        }
        let due = self.nobody_since.is_none_or(|since| now.saturating_duration_since(since) >= NOBODY_PAUSE);
        due.then(|| {
            self.nobody_since = Some(now);
            false
        })
    }

    /// Whether it is time to say, once, that engines compute prompts which no router ever told of.
    fn misses_routers(&mut self, fleet: &Snapshot) -> bool {
        let Some(unplaced) = &mut self.unplaced else { return false };
        let prefill_tokens =
            fleet.passes.iter().map(|passes| passes.totals.prefill_tokens).fold(0, u64::saturating_add);
        unplaced.refreshes += u32::from(prefill_tokens > unplaced.prefill_tokens);
        unplaced.prefill_tokens = prefill_tokens;
        let (due, placed) = (unplaced.refreshes >= PROMPTS_UNPLACED, !fleet.hits.is_empty());
        if due || placed {
            self.unplaced = None;
        }
        due && !placed
    }

    /// Something from outside was not used.
    pub(crate) fn rejected(&mut self, rejection: &Rejection, now: Instant) {
        let Rejection { source, topic, reason, detail } = rejection;
        let complaints = self.complaints.entry((*source, *topic, *reason)).or_default();
        if let Some(more_since_last) = complaints.due(now) {
            warn!(target: TARGET, more_since_last, "Rejected ({} {}): {detail}", topic.as_str(), reason.as_str());
        }
    }
}

/// Says what nothing is registered for.
struct Unregistered<'a>(&'a Unnamed);

impl fmt::Display for Unregistered<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Unnamed { namespace, scope, worker, loads, passes } = self.0;
        write!(f, "no endpoint is registered under worker id {worker}, which publishes for {namespace}")?;
        if let Some(Scope { component, endpoint }) = scope {
            write!(f, "/{component}/{endpoint}")?;
        }
        let [loads_topic, passes_topic] = [Topic::KvMetrics, Topic::ForwardPassMetrics].map(Topic::as_str);
        write!(
            f,
            " ({passes} of {passes_topic}, {loads} of {loads_topic}); an engine's nodes beside its first one do so"
        )
    }
}

/// Debug form of the old component's structure of that name.
struct ProcessedEndpoints<'a>(&'a Snapshot);

struct Endpoint<'a>(&'a WorkerLoad);

struct ForwardPassMetrics<'a>(&'a Load);

/// Stands in a list for the workers that are not written out.
struct More(usize);

impl fmt::Debug for ProcessedEndpoints<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let loads = &self.0.loads;
        let written = &loads[..loads.len().min(WORKERS_WRITTEN)];
        let more = loads.len() - written.len();
        let more = (more > 0).then_some(More(more));
        let mut structure = f.debug_struct("ProcessedEndpoints");
        structure.field(
            "endpoints",
            &List(|list: &mut fmt::DebugList<'_, '_>| {
                list.entries(written.iter().map(Endpoint)).entries(&more);
            }),
        );
        structure.field(
            "worker_ids",
            &List(|list: &mut fmt::DebugList<'_, '_>| {
                list.entries(written.iter().map(|worker| worker.key.id.0)).entries(&more);
            }),
        );
        for view in &self.0.groups {
            let Some(load) = &view.load else { continue };
            structure.field("load_avg", &load.average).field("load_std", &load.deviation);
        }
        structure.finish()
    }
}

/// A list of entries of several types.
struct List<F>(F);

impl<F: Fn(&mut fmt::DebugList<'_, '_>)> fmt::Debug for List<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut list = f.debug_list();
        (self.0)(&mut list);
        list.finish()
    }
}

impl fmt::Debug for Endpoint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = &self.0.key;
        let service = target::service_name(&key.namespace, &key.component, Form::Plain);
        f.debug_struct("Endpoint")
            .field("name", &format_args!("\"worker-{}\"", key.id))
            .field("subject", &target::endpoint_subject(&service, &key.endpoint, key.id))
            .field("data", &ForwardPassMetrics(&self.0.load))
            .finish()
    }
}

impl fmt::Debug for ForwardPassMetrics<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let load = self.0;
        let mut structure = f.debug_struct("ForwardPassMetrics");
        let counts = [
            ("request_active_slots", load.active_slots),
            ("request_total_slots", load.total_slots),
            ("kv_active_blocks", load.active_blocks),
            ("kv_total_blocks", load.total_blocks),
            ("num_requests_waiting", load.waiting),
        ];
        for (name, count) in counts {
            if let Some(count) = count {
                structure.field(name, &count);
            }
        }
        let shares = [("gpu_cache_usage_perc", load.cache_usage), ("gpu_prefix_cache_hit_rate", load.prefix_hit_rate)];
        for (name, share) in shares {
            if let Some(share) = share {
                structure.field(name, &share);
            }
        }
        structure.finish()
    }
}

impl fmt::Debug for More {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "and {} more", self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::fleet::{
        Coverage, Group, GroupView, HitTotals, LoadStatistics, PassTotals, Rank, RankPasses, WorkerId, WorkerKey,
        WorkerState,
    };
    use crate::target::NamespaceFilter;

    fn fleet(workers: &[(u64, u64, u64)]) -> Snapshot {
        let load = |&(id, active_slots, active_blocks): &(u64, u64, u64)| WorkerLoad {
            key: Arc::new(WorkerKey {
                namespace: "dynamo".into(),
                component: "backend".into(),
                endpoint: "generate".into(),
                id: WorkerId(id),
            }),
            rank: Rank(0),
            is_labelled: false,
            load: Load {
                active_slots: Some(active_slots),
                total_slots: Some(100),
                active_blocks: Some(active_blocks),
                total_blocks: Some(100),
                ..Load::default()
            },
        };
        let blocks: Vec<u64> = workers.iter().map(|worker| worker.2).collect();
        let group = Group { namespace: None, component: "backend".into(), endpoint: "generate".into() };
        let states = WorkerState::ALL
            .map(|state| (state, if state == WorkerState::Reporting { workers.len() as u64 } else { 0 }));
        Snapshot {
            loads: workers.iter().map(load).collect(),
            groups: vec![GroupView {
                group,
                load: LoadStatistics::of(&blocks),
                coverage: Coverage::default(),
                workers: states,
            }],
            ..Snapshot::default()
        }
    }

    #[test]
    fn a_fleet_is_written_as_the_missions_readme_shows_it() {
        let fleet = fleet(&[(7_587_884_888_253_033_398, 58, 77), (7_587_884_888_253_033_401, 71, 29)]);
        assert_eq!(
            format!("{:?}", ProcessedEndpoints(&fleet)),
            "ProcessedEndpoints { endpoints: [\
             Endpoint { name: \"worker-7587884888253033398\", subject: \"dynamo_backend.generate-694d951a80e06bb6\", \
             data: ForwardPassMetrics { request_active_slots: 58, request_total_slots: 100, kv_active_blocks: 77, kv_total_blocks: 100 } }, \
             Endpoint { name: \"worker-7587884888253033401\", subject: \"dynamo_backend.generate-694d951a80e06bb9\", \
             data: ForwardPassMetrics { request_active_slots: 71, request_total_slots: 100, kv_active_blocks: 29, kv_total_blocks: 100 } }], \
             worker_ids: [7587884888253033398, 7587884888253033401], load_avg: 53.0, load_std: 24.0 }"
        );
    }

    #[test]
    fn a_large_fleet_is_abbreviated() {
        let workers: Vec<_> = (0..1000).map(|id| (id, 1, 1)).collect();
        let line = format!("{:?}", ProcessedEndpoints(&fleet(&workers)));
        assert_eq!(line.matches("Endpoint {").count(), WORKERS_WRITTEN);
        assert_eq!(line.matches("and 992 more").count(), 2);
    }

    fn journal(topics: &[Topic]) -> Journal {
        let namespace = NamespaceFilter::Named("dynamo".to_owned());
        Journal::open(&Target { namespace, component: None, endpoint: None }, topics)
    }

    #[test]
    fn that_nobody_answers_is_repeated_until_somebody_does() {
        let (mut journal, start) = (journal(&Topic::NUMBERED), Instant::now());
        let (nobody, one) = (fleet(&[]), fleet(&[(1, 1, 1)]));
        let mut at = |fleet: &Snapshot, second| journal.looks_for_workers(fleet, start + Duration::from_secs(second));
        let said = [0, 1, 9, 10, 11, 20].map(|second| at(&nobody, second));
        assert_eq!(said, [Some(false), None, None, Some(false), None, Some(false)]);
        assert_eq!([21, 22].map(|second| at(&one, second)), [Some(true), None]);
        assert_eq!(at(&nobody, 23), Some(false), "all have left");
    }

    /// One worker, that has computed so much.
    fn computed(prefill_tokens: u64) -> Snapshot {
        let mut fleet = fleet(&[(1, 1, 1)]);
        let totals = PassTotals { prefill_tokens, ..PassTotals::default() };
        fleet.passes = vec![RankPasses { key: Arc::clone(&fleet.loads[0].key), rank: Rank(0), last: None, totals }];
        fleet
    }

    #[test]
    fn that_no_router_is_heard_is_said_once_when_prompts_were_computed_for_a_while() {
        let mut journal = journal(&Topic::NUMBERED);
        assert!((0..100).all(|_| !journal.misses_routers(&computed(7))), "no more prompts than the first");
        let said = (0..100).filter(|prompt| journal.misses_routers(&computed(100 + prompt))).count();
        assert_eq!(said, 1);
    }

    #[test]
    fn nothing_is_said_of_routers_that_were_heard_or_are_not_listened_to() {
        let mut heard = journal(&Topic::NUMBERED);
        let mut placed = computed(1);
        placed.hits = vec![(Arc::clone(&placed.loads[0].key), HitTotals { placed: 1, ..HitTotals::default() })];
        assert!(!heard.misses_routers(&placed));
        let mut unwanted = journal(&[Topic::ForwardPassMetrics]);
        for journal in [&mut heard, &mut unwanted] {
            assert!((0..100).all(|prompt| !journal.misses_routers(&computed(100 + prompt))));
        }
    }
}
