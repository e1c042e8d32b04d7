//! Whatever is said in whatever order: no series is there twice, no count falls, no dead worker is shown, and a living one
//! has its series and its placements.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::Clocked;
use super::bounds::whatever_is_said::{load, passes, rank};
use crate::fleet::*;
use crate::instruments::{CATALOGUE, Kind};

const NAMESPACES: [&str; 2] = ["dynamo", "dynamo-1a2b3c4d"];

/// A worker, or a helper beside it: of two ids in two namespaces, each of which may have four endpoints.
fn key() -> impl Strategy<Value = WorkerKey> {
    let component = prop_oneof![3 => Just("backend"), 1 => Just("prefill")];
    let endpoint = prop_oneof![3 => Just("generate"), 1 => Just("helper")];
    (proptest::sample::select(&NAMESPACES[..]), component, endpoint, 1..3_u64).prop_map(
        |(namespace, component, endpoint, id)| {
            let [namespace, component, endpoint] = [namespace, component, endpoint].map(Into::into);
            WorkerKey { namespace, component, endpoint, id: WorkerId(id) }
        },
    )
}

fn message(topic: Topic) -> impl Strategy<Value = Numbered> {
    let sources = topic.sources();
    (proptest::sample::select(sources), 0..4_u64, 0..40_u64).prop_map(move |(source, publisher, sequence)| Numbered {
        channel: Channel { source, publisher, topic },
        sequence,
    })
}

fn discovery() -> impl Strategy<Value = Source> {
    prop_oneof![2 => Just(Source::Etcd), 1 => Just(Source::Kubernetes)]
}

fn card() -> impl Strategy<Value = Card> {
    let limit = || option::of(prop_oneof![Just(10_u64), Just(100), Just(1000)]);
    let size = option::of(prop_oneof![Just(8_u64), Just(16), Just(32)]);
    let role = option::of(prop_oneof![Just(Role::Aggregated), Just(Role::Prefill), Just(Role::Decode)]);
    let ranks = (option::of(0..2_u32), prop_oneof![12 => Just(1_u32), 4 => Just(2), 4 => Just(4), 1 => Just(2000)]);
    (role, size, limit(), limit(), limit(), ranks).prop_map(
        |(role, block_size, blocks, slots, batch_tokens, (first, count))| Card {
            model: "m".into(),
            role,
            block_size,
            limits: Limits { blocks, slots, batch_tokens },
            ranks: Ranks { first, count },
        },
    )
}

fn entry() -> impl Strategy<Value = Entry> {
    let pod = || Some(Pod { name: "pod".into(), namespace: "default".into() });
    let standing = (proptest::bool::weighted(0.9), any::<bool>())
        .prop_map(move |(ready, has_pod)| Standing { ready, pod: pod().filter(|_| has_pod) });
    let adapter = (prop_oneof![Just("a"), Just("b")], option::of(prop_oneof![Just(8_u64), Just(16)]));
    prop_oneof![
        standing.prop_map(Entry::Instance),
        card().prop_map(Entry::Card),
        adapter.prop_map(|(name, block_size)| Entry::Adapter(Adapter { name: name.into(), block_size })),
    ]
}

fn process() -> impl Strategy<Value = Process> {
    (0..3_u64, any::<bool>()).prop_map(|(number, has_start)| {
        let started = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(number);
        Process { instance: format!("process {number}").into(), started: has_start.then_some(started) }
    })
}

fn scope(key: &WorkerKey) -> Scope {
    Scope { component: Arc::clone(&key.component), endpoint: Arc::clone(&key.endpoint) }
}

fn said_by_workers() -> impl Strategy<Value = Observation> {
    let loaded = (message(Topic::KvMetrics), key(), any::<bool>(), rank(), load()).prop_map(
        |(message, key, has_scope, rank, load)| {
            let scope = has_scope.then(|| scope(&key));
            Observation::Load(LoadEvent { message, namespace: key.namespace, scope, worker: key.id, rank, load })
        },
    );
    let passed = (message(Topic::ForwardPassMetrics), key(), any::<bool>(), rank(), passes()).prop_map(
        |(message, key, has_scope, rank, pass)| {
            let scope = has_scope.then(|| scope(&key));
            Observation::Passed(PassEvent { message, namespace: key.namespace, scope, worker: key.id, rank, pass })
        },
    );
    let report = option::of((rank(), load()).prop_map(|(rank, load)| Report { rank, load }));
    let answered = (key(), process(), report)
        .prop_map(|(key, process, report)| Observation::Answered(Answer { key, process, report, release: None }));
    let count = || option::of(0..1000_u64);
    let served =
        (key(), process(), count(), count(), count()).prop_map(|(key, process, requests, errors, processing)| {
            Observation::Served { key, process, counts: EndpointCounts { requests, errors, processing } }
        });
    let elsewhere = key().prop_map(|key| Observation::Elsewhere { namespace: key.namespace, worker: key.id });
    prop_oneof![
        4 => loaded.boxed(),
        4 => passed.boxed(),
        4 => answered.boxed(),
        2 => served.boxed(),
        1 => elsewhere.boxed(),
    ]
}

fn said_by_routers() -> impl Strategy<Value = Observation> {
    let hit = (message(Topic::KvHitRate), key(), 0..40_u32, 0..40_u32).prop_map(|(message, key, one, other)| {
        let blocks = HitBlocks { isl: one.max(other), overlap: one.min(other) };
        Observation::HitRate { message, hit: HitRate { namespace: key.namespace, worker: key.id, blocks } }
    });
    let cached = prop_oneof![
        (0..200_u64, 0..20_u32).prop_map(|(isl_tokens, blocks)| Cached::Overlap { isl_tokens, blocks }),
        (0..200_u64).prop_map(|tokens| Cached::Effective { tokens }),
        Just(Cached::Untracked),
        Just(Cached::InEventOfItsOwn),
    ];
    let placed =
        (option::of(0..20_u32), cached).prop_map(|(full_blocks, cached)| Step::Placed(Prompt { full_blocks, cached }));
    let step = prop_oneof![4 => placed, 1 => Just(Step::Prefilled), 1 => Just(Step::Freed)];
    let adapter = option::weighted(0.3, prop_oneof![Just("a"), Just("b"), Just("c")]);
    let router = option::of((1..4_u64).prop_map(WorkerId));
    let steps = (message(Topic::ActiveSequences), key(), 0..4_u8, router, adapter, step).prop_map(
        |(message, key, request, router, adapter, step)| {
            let request = RequestId::of(b"router", &request.to_string());
            let adapter = adapter.map(AdapterId::of);
            let steps = vec![Routing { request, router, adapter, worker: key.id, step }];
            Observation::Routed(RoutingEvent { message, namespace: key.namespace, steps })
        },
    );
    let count = || option::of(0..2000_u64);
    let estimated = (message(Topic::KvMetrics), key(), rank(), count(), count()).prop_map(
        |(message, key, rank, decode_blocks, prefill_tokens)| {
            let estimate = Estimate { decode_blocks, prefill_tokens };
            Observation::Estimated(EstimateEvent { message, namespace: key.namespace, worker: key.id, rank, estimate })
        },
    );
    prop_oneof![hit.boxed(), steps.boxed(), estimated.boxed()]
}

fn said_by_discovery() -> impl Strategy<Value = Observation> {
    let registration =
        || (discovery(), key(), entry()).prop_map(|(source, key, entry)| Registration { source, key, entry });
    prop_oneof![
        2 => registration().prop_map(Observation::Registered),
        1 => registration().prop_map(Observation::Deregistered),
    ]
}

fn happens_to_sources() -> impl Strategy<Value = Observation> {
    use ScrapeOutcome::{Complete, Denied, Disconnected, NoResponders, TimedOut};
    let source = || proptest::sample::select(&Source::ALL[..]);
    let connection = (source(), proptest::bool::weighted(0.7))
        .prop_map(|(source, connected)| Observation::Connection { source, connected });
    let outcome = proptest::sample::select(&[Complete, TimedOut, NoResponders, Disconnected, Denied][..]);
    let scraped = (outcome, 0..3_u64, 0..2_u64).prop_map(|(outcome, replies, seconds)| {
        let (took, at) = (Duration::from_secs(seconds), std::time::SystemTime::UNIX_EPOCH);
        Observation::Scraped(Scrape { outcome, replies, took, at })
    });
    let numbered = || proptest::sample::select(&Topic::NUMBERED[..]).prop_flat_map(message);
    prop_oneof![
        4 => connection,
        4 => scraped,
        2 => numbered().prop_map(Observation::Heard),
        2 => numbered().prop_map(|message| Observation::ChannelLost(message.channel)),
        1 => source().prop_map(|source| Observation::Lost(Lost { source, messages: 3 })),
    ]
}

fn observation() -> impl Strategy<Value = Observation> {
    prop_oneof![
        6 => said_by_discovery().boxed(),
        6 => said_by_workers().boxed(),
        4 => said_by_routers().boxed(),
        2 => happens_to_sources().boxed(),
    ]
}

/// Nothing, less and more than each time to live.
fn seconds() -> impl Strategy<Value = u64> {
    prop_oneof![12 => Just(0_u64), 4 => Just(1), 2 => Just(3), 1 => Just(61), 1 => Just(301)]
}

fn rules() -> impl Strategy<Value = Rules> {
    let names = prop_oneof![
        4 => Just(("dynamo", None, None)),
        2 => Just(("dynamo", Some("backend"), Some("generate"))),
        1 => Just(("*", None, None)),
    ];
    let max_workers = prop_oneof![1 => Just(2_usize), 3 => Just(100)];
    (names, any::<bool>(), max_workers).prop_map(|((namespace, component, endpoint), registers, max_workers)| {
        let mut rules = Clocked::with_target(namespace, component, endpoint).fleet.rules;
        rules.max_workers = max_workers;
        if !registers {
            rules.registries.clear();
        }
        rules
    })
}

/// Every series by the name of its metric and its labels, with its value, and whether that is a count; `Err` of one that
/// is there twice.
type Series = BTreeMap<(&'static str, Vec<(String, String)>), (f64, bool)>;

fn series(snapshot: &Snapshot) -> Result<Series, TestCaseError> {
    let mut all = Vec::new();
    for metric in CATALOGUE {
        let name = metric.prometheus;
        let labels = |attributes: &[opentelemetry::KeyValue]| {
            attributes.iter().map(|pair| (pair.key.to_string(), pair.value.to_string())).collect::<Vec<_>>()
        };
        match metric.kind {
            Kind::Gauge(observe) => {
                observe(snapshot, &mut |value, attributes| all.push((name, labels(attributes), value, false)));
            }
            Kind::Counter(observe) => observe(snapshot, &mut |value, attributes| {
                #[expect(clippy::cast_precision_loss, reason = "compared with itself")]
                all.push((name, labels(attributes), value as f64, true));
            }),
            Kind::FractionCounter(observe) => {
                observe(snapshot, &mut |value, attributes| all.push((name, labels(attributes), value, true)));
            }
            Kind::Histogram(_) => {}
        }
    }
    let mut series = Series::new();
    for (name, labels, value, is_count) in all {
        let keys: BTreeSet<_> = labels.iter().map(|(key, _)| key).collect();
        prop_assert!(labels.iter().map(|(key, _)| key).eq(keys), "{name} {labels:?} are not in order");
        let twice = series.insert((name, labels.clone()), (value, is_count));
        prop_assert!(twice.is_none(), "{name} {labels:?} is there twice");
    }
    Ok(series)
}

/// What has series as a gauge only while its worker lives.
fn shown(snapshot: &Snapshot) -> BTreeSet<Arc<WorkerKey>> {
    let loads = snapshot.loads.iter().map(|view| &view.key);
    let passes = snapshot.passes.iter().map(|view| &view.key);
    let estimates = snapshot.estimates.iter().map(|view| &view.key);
    let infos = snapshot.infos.iter().map(|view| &view.key);
    let in_flight = snapshot.in_flight.iter().map(|(key, _)| key);
    let spec_decode = snapshot.spec_decode.iter().map(|(key, _)| key);
    loads.chain(passes).chain(estimates).chain(infos).chain(in_flight).chain(spec_decode).cloned().collect()
}

impl Clocked {
    fn check(&mut self, before: &Series) -> Result<Series, TestCaseError> {
        let snapshot = self.snapshot();
        let series = series(&snapshot)?;
        for (name, (value, is_count)) in &series {
            let last = before.get(name).map_or(0.0, |(last, _)| *last);
            prop_assert!(!is_count || *value >= last, "{name:?} fell from {last} to {value}");
            let is_share = name.0.ends_with("_ratio") || name.0 == "llm_kv_hit_rate_percent";
            prop_assert!(!is_share || (0.0..=1.0).contains(value), "{name:?} is {value}");
        }
        for (_, hits) in &snapshot.hits {
            prop_assert!(hits.overlap <= hits.isl, "{hits:?}");
        }
        for key in shown(&snapshot) {
            prop_assert!(self.fleet.is_living(&key, self.now), "{key:?} is gone");
        }
        let health = &snapshot.health;
        for (source, topic, reason) in health.rejected.keys() {
            prop_assert!(
                reason.applies_to(*topic) && topic.sources().contains(source),
                "{source:?} {topic:?} {reason:?}"
            );
        }
        for (topic, dropped) in &health.unnamed_events {
            let heard = health.events.get(topic).copied().unwrap_or_default();
            prop_assert!(*dropped <= heard, "{dropped} of {heard} {topic:?} dropped");
        }
        let fleet = &self.fleet;
        let ranks: usize = fleet.workers.values().map(Worker::rank_count).sum();
        prop_assert!(ranks == fleet.ranks, "{ranks} ranks, {} counted", fleet.ranks);
        prop_assert!(ranks <= max_ranks(fleet.rules.max_workers) + fleet.workers.len());
        for (key, worker) in fleet.workers.iter().filter(|(_, worker)| worker.welcomed) {
            let has_both = worker.claim == Claim::Settled;
            prop_assert!(
                !has_both || (fleet.hits.has_labels(key) && fleet.hits.rival(key).is_none()),
                "{key:?} {worker:?}"
            );
        }
        let welcomed = fleet.workers.values().filter(|worker| worker.welcomed).count();
        prop_assert!(welcomed == fleet.welcomed && welcomed <= fleet.rules.max_workers);
        Ok(series)
    }

    fn placed_by_labels(&mut self) -> BTreeMap<WorkerKey, u64> {
        let hits = self.snapshot().hits;
        hits.into_iter().map(|(key, totals)| (self.fleet.hits.labels(&key), totals.placed)).collect()
    }

    /// A prompt of 96 tokens is placed on an id, by a router of which nothing is known.
    fn place(&mut self, (namespace, worker): &Id) -> Applied {
        let channel = Channel { source: Source::Zmq, publisher: 1_000, topic: Topic::ActiveSequences };
        let prompt = Prompt { full_blocks: None, cached: Cached::Overlap { isl_tokens: 96, blocks: 1 } };
        let request = RequestId::of(b"another router", &worker.to_string());
        let routing = Routing { request, router: None, adapter: None, worker: *worker, step: Step::Placed(prompt) };
        let message = Numbered { channel, sequence: 0 };
        self.apply(Observation::Routed(RoutingEvent {
            message,
            namespace: Arc::clone(namespace),
            steps: vec![routing],
        }))
    }

    /// Once nothing happens any more: each living worker is shown unless another one with its labels is, and is counted for.
    fn check_settled(&mut self) -> Result<(), TestCaseError> {
        let living = |fleet: &Self| -> Vec<Arc<WorkerKey>> {
            let workers = fleet.fleet.workers.iter().filter(|(_, worker)| worker.welcomed);
            let living = workers.filter(|(key, _)| fleet.fleet.is_living(key, fleet.now));
            living.map(|(key, _)| Arc::clone(key)).collect()
        };
        let is_ready = |fleet: &Self, key: &Arc<WorkerKey>| {
            let connected = fleet.fleet.health.connected();
            let worker = &fleet.fleet.workers[key];
            worker.presence(fleet.fleet.hearing(&connected, fleet.now)) != Presence::NotReady
        };
        let groups: u64 = self.snapshot().groups.iter().flat_map(|view| view.workers).map(|(_, count)| count).sum();
        let labels: BTreeSet<_> = living(self).iter().map(|key| self.fleet.hits.labels(key)).collect();
        prop_assert_eq!(groups, labels.len() as u64, "workers by state, {:?}", living(self));
        let infos: BTreeSet<_> = self.snapshot().infos.iter().map(|info| Arc::clone(&info.key)).collect();
        for key in living(self).iter().filter(|key| is_ready(self, key)) {
            let labels = self.fleet.hits.labels(key);
            let here = living(self).into_iter().filter(|other| self.fleet.hits.labels(other) == labels);
            let here: Vec<_> = here.collect();
            let shown = here.iter().filter(|other| infos.contains(*other)).count();
            let hidden_by_unready = here.iter().any(|other| !is_ready(self, other));
            prop_assert!(shown == 1 || (shown == 0 && hidden_by_unready), "{shown} of {key:?} shown");
        }
        for key in &infos {
            let id = id_of(key);
            let before = self.snapshot().hits;
            self.place(&id);
            let after = self.snapshot().hits;
            let of = |hits: &[(Arc<WorkerKey>, HitTotals)], key: &Arc<WorkerKey>| {
                hits.iter().find(|(other, _)| other == key).map(|(_, totals)| *totals).unwrap_or_default()
            };
            let risen: Vec<_> = after.iter().filter(|(key, totals)| totals.placed > of(&before, key).placed).collect();
            prop_assert_eq!(risen.len(), 1, "placed on {:?}: {:?}", key, risen);
            let counted = Arc::clone(&risen[0].0);
            prop_assert!(id_of(&counted) == id && living(self).contains(&counted), "{:?} for {:?}", counted, key);
            // What a card said is kept after its end until something else is said.
            prop_assert!(self.fleet.consider(&counted, self.now).is_ok());
            let size = self.fleet.workers[&counted].card().and_then(|card| card.block_size);
            let rated = self.place(&id).measurements.into_iter().find_map(|measurement| match measurement {
                Measurement::HitRate(_, blocks) => Some(u64::from(blocks.isl)),
                _ => None,
            });
            prop_assert_eq!(rated, size.map(|size| 96_u64.div_ceil(size)), "of {:?}", counted);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::default())]

    #[test]
    fn every_snapshot_holds_together(rules in rules(), said in vec((observation(), seconds()), 1..60)) {
        let mut fleet = Clocked { fleet: Fleet::new(rules), now: Instant::now() };
        for source in Source::ALL {
            fleet.connected(source, true);
        }
        let (mut before, mut counts, mut placed) = (Series::new(), BTreeMap::new(), 0);
        for (observation, seconds) in said {
            fleet.pass(Duration::from_secs(seconds)).apply(observation);
            before = fleet.check(&before)?;
            let now = fleet.placed_by_labels();
            let more = |(labels, count): (&WorkerKey, &u64)| count.saturating_sub(counts.get(labels).copied().unwrap_or_default());
            placed += now.iter().map(more).sum::<u64>();
            counts = now;
            let Health { events, unnamed_events, .. } = fleet.snapshot().health;
            let of_placements = |events: &BTreeMap<Topic, u64>| events.get(&Topic::ActiveSequences).copied().unwrap_or_default();
            let (heard, dropped) = (of_placements(&events), of_placements(&unnamed_events));
            prop_assert!(placed + dropped <= heard, "{placed} counted and {dropped} dropped of {heard}");
        }
        for _ in 0..3 {
            before = fleet.check(&before)?;
        }
        fleet.check_settled()?;
    }
}
