//! Ids that nothing names, that two workers have, that are gone, and that move.

use super::voices::{card, instance};
use super::{Clocked, TTL, answer};
use crate::fleet::*;

/// Of a worker of `component` in a namespace.
fn key(namespace: &str, component: &str, id: u64) -> WorkerKey {
    let [namespace, component, endpoint] = [namespace, component, "generate"].map(Into::into);
    WorkerKey { namespace, component, endpoint, id: WorkerId(id) }
}

/// A pass of the worker of that key, whose channel says where it is.
fn pass(key: &WorkerKey, counter: u64) -> Observation {
    let channel = Channel { source: Source::Zmq, publisher: key.id.0, topic: Topic::ForwardPassMetrics };
    let scheduled = Scheduled { prefill_requests: 1, prefill_tokens: 100, ..Scheduled::default() };
    let (component, endpoint) = (Arc::clone(&key.component), Arc::clone(&key.endpoint));
    Observation::Passed(PassEvent {
        message: Numbered { channel, sequence: counter },
        namespace: Arc::clone(&key.namespace),
        scope: Some(Scope { component, endpoint }),
        worker: key.id,
        rank: Rank(0),
        pass: Pass { counter, wall_time: 0.5, scheduled, queued: Queued::default() },
    })
}

/// A request placed on that id; its prompt had six blocks, and two of them were cached.
fn placed(namespace: &str, id: u64, request: &str) -> Observation {
    let channel = Channel { source: Source::Zmq, publisher: 9, topic: Topic::ActiveSequences };
    let prompt = Prompt { full_blocks: Some(6), cached: Cached::Effective { tokens: 64 } };
    let request = RequestId::of(b"router", request);
    Observation::Routed(RoutingEvent {
        message: Numbered { channel, sequence: 0 },
        namespace: namespace.into(),
        steps: vec![Routing { request, router: None, adapter: None, worker: WorkerId(id), step: Step::Placed(prompt) }],
    })
}

impl Clocked {
    /// A worker is there, with its card.
    fn joins(&mut self, key: &WorkerKey) -> Vec<Rejection> {
        let register = |entry| Observation::Registered(Registration { source: Source::Etcd, key: key.clone(), entry });
        [instance(), card(1)].into_iter().filter_map(|entry| self.apply(register(entry)).rejection).collect()
    }

    /// It leaves, card first.
    fn leaves(&mut self, key: &WorkerKey) {
        for entry in [card(1), instance()] {
            self.apply(Observation::Deregistered(Registration { source: Source::Etcd, key: key.clone(), entry }));
        }
    }

    fn dropped(&mut self) -> [u64; 4] {
        let health = self.snapshot().health;
        Topic::EVENTS.map(|topic| health.unnamed_events.get(&topic).copied().unwrap_or_default())
    }

    /// Component, namespace and count of placed requests of each series.
    fn placements(&mut self) -> Vec<(String, String, u64)> {
        let row = |(key, totals): &(Arc<WorkerKey>, HitTotals)| {
            (key.component.to_string(), key.namespace.to_string(), totals.placed)
        };
        self.snapshot().hits.iter().map(row).collect()
    }

    /// Namespace of each worker that has series, by what they come from.
    fn shown(&mut self) -> [Vec<String>; 3] {
        let snapshot = self.snapshot();
        let namespaces = |keys: Vec<&Arc<WorkerKey>>| keys.iter().map(|key| key.namespace.to_string()).collect();
        [
            namespaces(snapshot.loads.iter().map(|view| &view.key).collect()),
            namespaces(snapshot.passes.iter().map(|view| &view.key).collect()),
            namespaces(snapshot.infos.iter().map(|view| &view.key).collect()),
        ]
    }
}

fn etcd() -> Clocked {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    fleet
}

#[test]
fn what_nothing_ever_names_is_counted_as_dropped_whatever_its_topic() {
    let mut fleet = etcd();
    let node = key("dynamo", "backend", 2);
    for counter in 1..=5 {
        fleet.apply(pass(&node, counter));
    }
    fleet.load(2, 0, 1, 25);
    fleet.load(2, 1, 2, 26);
    fleet.hit(2);
    fleet.apply(placed("dynamo", 2, "one"));
    assert_eq!(fleet.dropped(), [0, 0, 0, 0], "it may be named yet");
    let snapshot = fleet.pass(Duration::from_secs(300)).snapshot();
    let unnamed = snapshot.unnamed.unwrap();
    assert_eq!((unnamed.worker, unnamed.loads, unnamed.passes), (WorkerId(2), 2, 5));
    let scope = Scope { component: "backend".into(), endpoint: "generate".into() };
    assert_eq!(unnamed.scope, Some(scope), "the channel says where it belongs");
    assert_eq!(fleet.dropped(), [1, 2, 5, 1], "kv-hit-rate, kv_metrics, forward-pass-metrics, active_sequences_events");
    assert_eq!(fleet.snapshot().unnamed, None, "said once");
}

#[test]
fn a_load_that_the_next_one_replaces_is_dropped_and_what_is_applied_later_is_not() {
    let mut fleet = etcd();
    let worker = key("dynamo", "backend", 1);
    for sequence in 1..=3 {
        fleet.load(1, 0, sequence, sequence);
        fleet.apply(pass(&worker, sequence));
    }
    fleet.joins(&worker);
    fleet.pass(Duration::from_secs(300));
    assert_eq!(fleet.dropped(), [0, 2, 0, 0]);
    assert_eq!(fleet.active_blocks(), [(1, Some(3))]);
    assert_eq!(fleet.snapshot().passes[0].totals.passes, 3);
}

#[test]
fn what_is_beyond_the_bounds_of_what_is_held_is_dropped() {
    let mut fleet = etcd();
    fleet.fleet.pending = Pending::new(usize::MAX);
    for id in 0..10_002 {
        fleet.apply(pass(&key("dynamo", "backend", id), 1));
    }
    assert_eq!(fleet.dropped(), [0, 0, 2, 0]);
    for id in 10_000..10_003 {
        fleet.load(id, 0, id, 25);
    }
    assert_eq!(fleet.dropped(), [0, 3, 2, 0]);
}

#[test]
fn events_of_places_that_are_not_watched_and_of_a_worker_that_has_left_are_dropped_without_a_word() {
    let mut fleet = Clocked::watching(Some("backend"), None);
    fleet.connected(Source::Etcd, true);
    let (here, elsewhere) = (key("dynamo", "backend", 1), key("dynamo", "prefill", 2));
    fleet.joins(&here);
    fleet.leaves(&here);
    fleet.snapshot();
    fleet.apply(pass(&here, 1));
    fleet.apply(pass(&elsewhere, 1));
    fleet.load(3, 0, 1, 25);
    assert_eq!(fleet.pass(Duration::from_secs(300)).snapshot().unnamed, None);
    assert_eq!(fleet.dropped(), [0, 1, 2, 0]);
}

#[test]
fn passes_of_an_id_that_registers_no_endpoint_are_nobody_elses() {
    let mut fleet = etcd();
    let (leader, node) = (key("dynamo", "backend", 1), key("dynamo", "backend", 2));
    fleet.joins(&leader);
    fleet.apply(pass(&leader, 1));
    for counter in 1..=5 {
        fleet.apply(pass(&node, counter));
    }
    fleet.pass(Duration::from_secs(300));
    let passes: Vec<_> = fleet.snapshot().passes.iter().map(|view| (view.key.id.0, view.totals.passes)).collect();
    assert_eq!(passes, [(1, 1)], "only one is registered there, and it may be another engine's");
}

fn named_by_nats_alone() -> Clocked {
    let mut fleet = Clocked::watching(Some("backend"), Some("generate"));
    fleet.fleet.rules.registries.clear();
    fleet.connected(Source::Nats, true);
    fleet
}

#[test]
fn an_event_does_not_bring_back_a_worker_that_answered_scrapes_and_left() {
    let mut fleet = named_by_nats_alone();
    fleet.answer(1, Some(5));
    fleet.pass(TTL).snapshot();
    for sequence in 0..20 {
        fleet.load(1, 0, sequence, 25);
        fleet.apply(pass(&key("dynamo", "backend", 1), sequence));
        fleet.scraped(ScrapeOutcome::NoResponders);
        assert_eq!((fleet.counts(), fleet.active_blocks()), (vec![], vec![]), "{sequence}");
        fleet.pass(Duration::from_secs(30));
    }
    fleet.answer(1, None);
    assert_eq!(fleet.counts(), [("reporting", 1)], "a restart under the same id");
    assert_eq!(fleet.active_blocks(), [(1, Some(25))], "what it said before its first answer is known");
}

#[test]
fn who_has_left_is_remembered_for_longer_than_an_event_keeps_a_worker_and_not_for_ever() {
    let mut fleet = named_by_nats_alone();
    fleet.answer(1, Some(5));
    fleet.pass(TTL).snapshot();
    fleet.pass(Duration::from_secs(300)).snapshot();
    fleet.load(1, 0, 1, 25);
    fleet.scraped(ScrapeOutcome::NoResponders);
    assert_eq!(fleet.counts(), []);
    fleet.pass(Duration::from_secs(360)).snapshot();
    fleet.load(1, 0, 2, 25);
    fleet.scraped(ScrapeOutcome::NoResponders);
    assert_eq!(fleet.counts(), [("reporting", 1)]);
}

#[test]
fn who_has_left_is_remembered_within_bounds() {
    let mut fleet = named_by_nats_alone();
    for id in 0..100 {
        fleet.answer(id, Some(5));
        fleet.pass(TTL).snapshot();
    }
    assert_eq!(fleet.fleet.departed.len(), 80);
}

#[test]
fn of_two_namespaces_with_one_id_the_first_has_the_labels_until_it_leaves() {
    let mut fleet = etcd();
    let (old, new) = (key("dynamo-1a2b3c4d", "backend", 1), key("dynamo", "backend", 1));
    assert_eq!(fleet.joins(&old), []);
    fleet.apply(pass(&old, 1));
    fleet.apply(placed("dynamo-1a2b3c4d", 1, "one"));
    let rejections = fleet.joins(&new);
    let reasons: Vec<_> = rejections.iter().map(|rejection| (rejection.topic, rejection.reason)).collect();
    assert_eq!(reasons, [(Topic::Discovery, Reason::DuplicateWorker)], "once");
    for name in ["dynamo", "dynamo-1a2b3c4d"] {
        assert!(rejections[0].detail.contains(name), "{rejections:?}");
    }
    fleet.apply(pass(&new, 1));
    fleet.apply(placed("dynamo", 1, "two"));
    for _ in 0..3 {
        let one = vec!["dynamo-1a2b3c4d".to_owned()];
        assert_eq!(fleet.shown(), [one.clone(), one.clone(), one]);
    }
    assert_eq!(fleet.counts(), [("reporting", 1)]);
    assert_eq!(fleet.placements(), [("backend".to_owned(), "dynamo-1a2b3c4d".to_owned(), 1)]);

    fleet.leaves(&old);
    assert_eq!(fleet.shown().concat(), [] as [&str; 0], "the series end before they begin anew");
    let one = vec!["dynamo".to_owned()];
    assert_eq!(fleet.shown(), [one.clone(), one.clone(), one]);
    assert_eq!(fleet.placements(), [("backend".to_owned(), "dynamo".to_owned(), 2)], "the count goes on");
    assert_eq!(fleet.snapshot().in_flight.iter().map(|(_, requests)| *requests).collect::<Vec<_>>(), [1]);
    fleet.pass(Duration::from_secs(300)).snapshot();
    assert_eq!(fleet.placements(), [("backend".to_owned(), "dynamo".to_owned(), 2)], "and does not fall");
    assert_eq!(fleet.snapshot().health.rejected.len(), 1);
}

#[test]
fn a_count_that_outlives_its_worker_goes_on_with_the_one_that_has_its_labels_next() {
    let mut fleet = etcd();
    let (old, new) = (key("dynamo", "backend", 1), key("dynamo-1a2b3c4d", "backend", 1));
    fleet.joins(&old);
    fleet.apply(placed("dynamo", 1, "one"));
    fleet.leaves(&old);
    fleet.snapshot();
    assert_eq!(fleet.joins(&new), [], "nobody has them now");
    fleet.apply(placed("dynamo-1a2b3c4d", 1, "two"));
    fleet.apply(placed("dynamo", 1, "late"));
    assert_eq!(fleet.placements(), [("backend".to_owned(), "dynamo-1a2b3c4d".to_owned(), 2)]);
}

#[test]
fn labels_that_go_to_another_namespace_leave_alone_what_their_last_id_has_become() {
    let mut fleet = etcd();
    let (moved, other) = (key("dynamo", "backend", 1), key("dynamo-1a2b3c4d", "backend", 1));
    fleet.joins(&moved);
    fleet.leaves(&moved);
    fleet.snapshot();
    fleet.joins(&key("dynamo", "prefill", 1));
    fleet.joins(&other);
    fleet.apply(placed("dynamo", 1, "one"));
    assert_eq!(fleet.placements(), [("prefill".to_owned(), "dynamo".to_owned(), 1)]);
}

#[test]
fn where_labels_tell_namespaces_apart_both_are_shown() {
    let mut fleet = Clocked::with_target("*", None, None);
    fleet.connected(Source::Etcd, true);
    for namespace in ["one", "other"] {
        assert_eq!(fleet.joins(&key(namespace, "backend", 1)), []);
        fleet.apply(placed(namespace, 1, namespace));
    }
    assert_eq!(fleet.snapshot().infos.len(), 2);
    assert_eq!(fleet.placements().len(), 2);
}

#[test]
fn a_worker_that_comes_back_by_a_connection_alone_does_not_take_labels_that_another_has() {
    let mut fleet = etcd();
    fleet.connected(Source::Nats, true);
    let (first, second) = (key("dynamo", "backend", 1), key("dynamo-1a2b3c4d", "backend", 1));
    fleet.joins(&first);
    fleet.apply(answer(1, "process", Some(5)));
    fleet.joins(&second);
    fleet.pass(TTL).snapshot();
    assert_eq!(fleet.shown()[2], ["dynamo-1a2b3c4d"], "NATS lost the first, which etcd still has");
    fleet.connected(Source::Nats, false);
    assert_eq!(fleet.shown()[2], ["dynamo-1a2b3c4d"]);
}

#[test]
fn a_worker_that_starts_anew_and_has_not_reported_does_not_take_labels_that_another_has() {
    let mut fleet = etcd();
    fleet.connected(Source::Nats, true);
    let (first, second) = (key("dynamo", "backend", 1), key("dynamo-1a2b3c4d", "backend", 1));
    fleet.apply(Observation::Registered(Registration { source: Source::Etcd, key: first, entry: instance() }));
    fleet.apply(answer(1, "process", Some(5)));
    fleet.load(1, 1, 1, 25);
    fleet.pass(TTL).snapshot();
    fleet.joins(&second);
    fleet.apply(answer(1, "another process", None));
    for _ in 0..2 {
        assert_eq!((fleet.counts(), fleet.active_blocks()), (vec![("silent", 1)], vec![(1, None)]));
        assert_eq!(fleet.shown()[2], ["dynamo-1a2b3c4d"]);
    }
}

#[test]
fn what_endpoints_of_one_id_in_two_namespaces_count_is_one_series() {
    let mut fleet = Clocked::watching(None, None);
    for (namespace, started, requests) in [("dynamo", 1, 50), ("dynamo-1a2b3c4d", 2, 7), ("dynamo", 1, 51)] {
        let started = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(started);
        let process = Process { instance: namespace.into(), started: Some(started) };
        let counts = EndpointCounts { requests: Some(requests), ..EndpointCounts::default() };
        fleet.apply(Observation::Served { key: key(namespace, "backend", 1), process, counts });
        assert_eq!(fleet.snapshot().served.len(), 1);
    }
}

#[test]
fn an_id_that_moves_to_another_component_takes_its_placements_along_and_leaves_its_counts() {
    let mut fleet = etcd();
    let (before, after) = (key("dynamo", "backend", 1), key("dynamo", "prefill", 1));
    fleet.joins(&before);
    fleet.apply(placed("dynamo", 1, "one"));
    fleet.leaves(&before);
    fleet.joins(&after);
    fleet.apply(placed("dynamo", 1, "two"));
    fleet.apply(placed("dynamo", 1, "three"));
    let row = |component: &str, placed| (component.to_owned(), "dynamo".to_owned(), placed);
    assert_eq!(fleet.placements(), [row("backend", 1), row("prefill", 2)]);
    fleet.load(1, 0, 1, 25);
    let loads = fleet.snapshot().loads;
    assert_eq!(loads.iter().map(|view| &*view.key.component).collect::<Vec<_>>(), ["prefill"]);
    fleet.pass(Duration::from_secs(300)).snapshot();
    assert_eq!(fleet.placements(), [row("prefill", 2)]);
    fleet.leaves(&after);
    fleet.joins(&before);
    fleet.apply(placed("dynamo", 1, "four"));
    assert_eq!(fleet.placements(), [row("backend", 1), row("prefill", 2)]);
}

#[test]
fn an_id_that_is_registered_anew_before_it_leaves_its_place_moves_when_it_does() {
    let mut fleet = etcd();
    let (before, after) = (key("dynamo", "backend", 1), key("dynamo", "prefill", 1));
    fleet.joins(&before);
    fleet.joins(&after);
    fleet.apply(placed("dynamo", 1, "one"));
    fleet.snapshot();
    fleet.leaves(&before);
    fleet.apply(placed("dynamo", 1, "two"));
    let row = |component: &str, placed| (component.to_owned(), "dynamo".to_owned(), placed);
    assert_eq!(fleet.placements(), [row("backend", 1), row("prefill", 1)]);
}
