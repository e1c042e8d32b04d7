//! Several voices about one worker, cards, events and their gaps, on a hand-made clock.

use super::{Clocked, TTL, answer};
use crate::fleet::*;

pub(super) fn key(endpoint: &str, id: u64) -> WorkerKey {
    WorkerKey { namespace: "dynamo".into(), component: "backend".into(), endpoint: endpoint.into(), id: WorkerId(id) }
}

pub(super) fn card(ranks: u32) -> Entry {
    Entry::Card(Card {
        model: "m".into(),
        role: Some(Role::Decode),
        block_size: Some(16),
        limits: Limits { blocks: Some(100), slots: Some(8), ..Limits::default() },
        ranks: Ranks { first: Some(0), count: ranks },
    })
}

pub(super) fn instance() -> Entry {
    Entry::Instance(Standing::default())
}

fn unready() -> Entry {
    Entry::Instance(Standing { ready: false, pod: None })
}

impl Clocked {
    pub(super) fn connected(&mut self, source: Source, connected: bool) {
        self.apply(Observation::Connection { source, connected });
    }

    fn put(&mut self, source: Source, id: u64, entry: Entry) {
        self.apply(Observation::Registered(Registration { source, key: key("generate", id), entry }));
    }

    fn delete(&mut self, source: Source, id: u64, entry: Entry) {
        self.apply(Observation::Deregistered(Registration { source, key: key("generate", id), entry }));
    }

    /// A scrape that took no time.
    pub(super) fn scraped(&mut self, outcome: ScrapeOutcome) {
        let (took, at) = (Duration::ZERO, std::time::SystemTime::UNIX_EPOCH);
        self.apply(Observation::Scraped(Scrape { outcome, replies: 0, took, at }));
    }

    /// An event of publisher 7.
    pub(super) fn load(&mut self, id: u64, rank: u32, sequence: u64, active_blocks: u64) {
        let channel = Channel { source: Source::Zmq, publisher: 7, topic: Topic::KvMetrics };
        let event = LoadEvent {
            message: Numbered { channel, sequence },
            namespace: "dynamo".into(),
            scope: None,
            worker: WorkerId(id),
            rank: Rank(rank),
            load: Load { active_blocks: Some(active_blocks), ..Load::default() },
        };
        self.apply(Observation::Load(event));
    }

    /// A pass of rank 0 with a prefill of 100 tokens and three requests that decode, from publisher 8; a heartbeat where
    /// the time is 0.
    fn forward(&mut self, id: u64, number: u64, wall_time: f64) -> Applied {
        let busy = Scheduled { prefill_requests: 1, prefill_tokens: 100, decode_requests: 3, ..Scheduled::default() };
        let scheduled = if wall_time > 0.0 { busy } else { Scheduled::default() };
        let queued = Queued { prefill_requests: u64::from(wall_time > 0.0) * 2, ..Queued::default() };
        let channel = Channel { source: Source::Zmq, publisher: 8, topic: Topic::ForwardPassMetrics };
        self.apply(Observation::Passed(PassEvent {
            message: Numbered { channel, sequence: number },
            namespace: "dynamo".into(),
            scope: None,
            worker: WorkerId(id),
            rank: Rank(0),
            pass: Pass { counter: number, wall_time, scheduled, queued },
        }))
    }

    /// What a router believes of rank 0; one of 0.8 is none but the worker's id.
    fn estimated(&mut self, router: u64, id: u64, sequence: u64, decode_blocks: u64) -> Applied {
        let channel = Channel { source: Source::Nats, publisher: router, topic: Topic::KvMetrics };
        self.apply(Observation::Estimated(EstimateEvent {
            message: Numbered { channel, sequence },
            namespace: "dynamo".into(),
            worker: WorkerId(id),
            rank: Rank(0),
            estimate: Estimate { decode_blocks: Some(decode_blocks), prefill_tokens: Some(100) },
        }))
    }

    /// Worker, router and blocks of every estimate shown.
    fn estimates(&mut self) -> Vec<(u64, Option<u64>, u64)> {
        let row = |view: RouterEstimate| (view.key.id.0, view.publisher, view.estimate.decode_blocks.unwrap());
        self.snapshot().estimates.into_iter().map(row).collect()
    }

    /// Workers by state, of the one group that there is.
    pub(super) fn counts(&mut self) -> Vec<(&'static str, u64)> {
        let groups = self.snapshot().groups;
        let counts = groups.first().map(|group| group.workers).into_iter().flatten();
        counts.filter(|(_, count)| *count > 0).map(|(state, count)| (state.as_str(), count)).collect()
    }
}

#[test]
fn a_card_makes_a_worker_and_gives_it_its_limits() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    fleet.put(Source::Etcd, 1, instance());
    assert_eq!(fleet.counts(), [], "an instance alone is nobody yet");
    fleet.put(Source::Etcd, 1, card(1));
    assert_eq!(fleet.counts(), [("silent", 1)]);
    fleet.load(1, 0, 1, 25);
    assert_eq!(fleet.counts(), [("reporting", 1)]);
    let worker = fleet.snapshot().loads[0].clone();
    assert!(!worker.is_labelled);
    let expected = Load { active_blocks: Some(25), total_blocks: Some(100), total_slots: Some(8), ..Load::default() };
    assert_eq!(worker.load, expected);
    assert_eq!(worker.load.usage(), Some(0.25));
}

#[test]
fn a_card_without_limits_makes_no_worker_and_the_first_load_does() {
    let says_nothing = || {
        let Entry::Card(card) = card(1) else { unreachable!() };
        Entry::Card(Card { limits: Limits::default(), role: Some(Role::Aggregated), ..card })
    };
    let put = |fleet: &mut Clocked, endpoint: &str, entry| {
        let registration = Registration { source: Source::Etcd, key: key(endpoint, 1), entry };
        fleet.apply(Observation::Registered(registration));
    };
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    for (endpoint, entry) in [("engine", instance()), ("engine", says_nothing()), ("helper", instance())] {
        put(&mut fleet, endpoint, entry);
    }
    assert_eq!(fleet.counts(), [], "a router, for all that is known");
    fleet.load(1, 0, 1, 25);
    assert_eq!(fleet.states(), [("backend/engine".to_owned(), 1, 0)]);
    let mut explicit = Clocked::watching(Some("backend"), Some("engine"));
    explicit.connected(Source::Etcd, true);
    put(&mut explicit, "engine", instance());
    put(&mut explicit, "engine", says_nothing());
    assert_eq!(explicit.counts(), [("silent", 1)], "it was asked for");
}

#[test]
fn a_card_without_limits_is_an_engines_where_it_says_which_half_of_a_request_it_computes() {
    for (role, workers) in [(None, 0), (Some(Role::Aggregated), 0), (Some(Role::Prefill), 1), (Some(Role::Encode), 1)] {
        let Entry::Card(card) = card(1) else { unreachable!() };
        let mut fleet = Clocked::watching(None, None);
        fleet.connected(Source::Etcd, true);
        fleet.put(Source::Etcd, 1, instance());
        fleet.put(Source::Etcd, 1, Entry::Card(Card { limits: Limits::default(), role, ..card }));
        assert_eq!(fleet.counts().iter().map(|(_, count)| count).sum::<u64>(), workers, "{role:?}");
    }
}

#[test]
fn helpers_are_nobody_and_the_load_of_their_id_is_the_served_endpoints() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    for endpoint in ["worker_kv_query_source_7", "generate", "router-discovery"] {
        let registration = Registration { source: Source::Etcd, key: key(endpoint, 1), entry: instance() };
        fleet.apply(Observation::Registered(registration));
    }
    fleet.load(1, 0, 1, 25);
    let snapshot = fleet.snapshot();
    let endpoints: Vec<_> = snapshot.loads.iter().map(|worker| &*worker.key.endpoint).collect();
    assert_eq!(endpoints, ["generate"]);
    assert_eq!(snapshot.groups.len(), 1);
}

#[test]
fn each_rank_has_its_limits_and_rank_0_of_several_is_told() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    fleet.put(Source::Etcd, 1, instance());
    fleet.put(Source::Etcd, 1, card(2));
    fleet.load(1, 1, 1, 30);
    let snapshot = fleet.snapshot();
    let ranks: Vec<_> =
        snapshot.loads.iter().map(|w| (w.rank.0, w.is_labelled, w.load.active_blocks, w.load.total_blocks)).collect();
    assert_eq!(ranks, [(0, true, None, Some(100)), (1, true, Some(30), Some(100))]);
    assert_eq!(snapshot.groups[0].coverage, Coverage { known: 1, ranks: 2 });
}

#[test]
fn load_heard_before_its_worker_is_named_is_known_once_it_is() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    fleet.load(1, 0, 1, 25);
    assert_eq!(fleet.active_blocks(), []);
    fleet.put(Source::Etcd, 1, instance());
    fleet.put(Source::Etcd, 1, card(1));
    assert_eq!(fleet.active_blocks(), [(1, Some(25))]);
}

#[test]
fn after_a_lost_event_the_value_is_unknown_until_the_next() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    fleet.put(Source::Etcd, 1, instance());
    fleet.put(Source::Etcd, 1, card(2));
    fleet.load(1, 0, 1, 25);
    fleet.load(1, 1, 2, 30);
    fleet.load(1, 1, 4, 31);
    assert_eq!(fleet.active_blocks(), [(1, None), (1, Some(31))], "what rank 0 said before the gap may be wrong");
    assert_eq!(fleet.snapshot().health.missed[&(Source::Zmq, Topic::KvMetrics)], 1);
    fleet.apply(Observation::ChannelLost(Channel { source: Source::Zmq, publisher: 7, topic: Topic::KvMetrics }));
    assert_eq!(fleet.active_blocks(), [(1, None), (1, None)]);
    assert_eq!(fleet.counts(), [("reporting", 1)], "it is alive all the same");
    fleet.load(1, 0, 7, 32);
    assert_eq!(
        fleet.snapshot().health.missed[&(Source::Zmq, Topic::KvMetrics)],
        3,
        "and what it said meanwhile was missed"
    );
}

/// The JSON event of 0.4 - 0.7, which has no number.
fn whole(id: u64, load: Load) -> Observation {
    let channel = Channel { source: Source::Nats, publisher: id, topic: Topic::KvMetrics };
    Observation::Load(LoadEvent {
        message: Numbered { channel, sequence: 0 },
        namespace: "dynamo".into(),
        scope: None,
        worker: WorkerId(id),
        rank: Rank(0),
        load,
    })
}

#[test]
fn an_event_states_a_whole_load_and_an_idle_worker_that_only_answers_keeps_it() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Nats, true);
    fleet.apply(answer(1, "process", None));
    assert_eq!(fleet.counts(), [], "nobody yet");
    let load = Load { active_slots: Some(5), active_blocks: Some(7), cache_usage: Some(0.07), ..Load::default() };
    fleet.apply(whole(1, load.clone()));
    for _ in 0..100 {
        fleet.pass(TTL / 2);
        fleet.apply(answer(1, "process", None));
    }
    assert_eq!(fleet.counts(), [("reporting", 1)]);
    assert_eq!(fleet.snapshot().loads[0].load, load);
    let load = Load { active_slots: Some(6), ..Load::default() };
    fleet.apply(whole(1, load.clone()));
    assert_eq!(fleet.snapshot().loads[0].load, load, "what it leaves out is unknown");
    fleet.pass(TTL);
    assert_eq!(fleet.counts(), []);
}

#[test]
fn a_worker_that_says_its_load_in_answers_and_in_events_is_read_from_its_answers() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Nats, true);
    let load = |blocks| Load { active_blocks: Some(blocks), ..Load::default() };
    fleet.apply(whole(1, load(4)));
    for blocks in [5, 6] {
        fleet.apply(answer(1, "process", Some(blocks)));
        fleet.apply(whole(1, load(9)));
        assert_eq!(fleet.active_blocks(), [(1, Some(blocks))]);
    }
    fleet.apply(answer(1, "process", None));
    assert_eq!(fleet.active_blocks(), [(1, Some(9))], "its answers say none any more");
}

#[test]
fn a_worker_that_is_deregistered_is_gone_whatever_its_events_do() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    fleet.put(Source::Etcd, 1, instance());
    fleet.put(Source::Etcd, 1, card(1));
    fleet.load(1, 0, 1, 25);
    fleet.delete(Source::Etcd, 1, card(1));
    fleet.delete(Source::Etcd, 1, instance());
    fleet.load(1, 0, 2, 26);
    assert_eq!(fleet.counts(), []);
    assert_eq!(fleet.active_blocks(), []);
}

#[test]
fn a_worker_whose_card_outlives_its_instance_drains() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    fleet.put(Source::Etcd, 1, instance());
    fleet.put(Source::Etcd, 1, card(1));
    fleet.load(1, 0, 1, 25);
    fleet.delete(Source::Etcd, 1, instance());
    assert_eq!(fleet.counts(), [("draining", 1)]);
    assert_eq!(fleet.active_blocks(), [(1, Some(25))]);
    fleet.delete(Source::Etcd, 1, card(1));
    assert_eq!(fleet.counts(), []);
}

#[test]
fn one_that_is_not_ready_is_counted_and_shows_nothing_else() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    fleet.put(Source::Etcd, 1, card(1));
    fleet.put(Source::Etcd, 1, unready());
    fleet.load(1, 0, 1, 25);
    assert_eq!(fleet.counts(), [("not_ready", 1)]);
    assert_eq!(fleet.active_blocks(), []);
    fleet.put(Source::Etcd, 1, instance());
    assert_eq!(fleet.active_blocks(), [(1, Some(25))]);
}

#[test]
fn of_voices_that_disagree_a_connected_one_that_lost_the_worker_wins() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Nats, true);
    fleet.connected(Source::Etcd, true);
    fleet.put(Source::Etcd, 1, instance());
    fleet.put(Source::Etcd, 1, card(1));
    fleet.apply(answer(1, "process", Some(5)));
    assert_eq!(fleet.counts(), [("reporting", 1)], "two voices, one worker");
    fleet.pass(TTL);
    assert_eq!(fleet.counts(), [], "NATS lost it, though its lease runs on");
    fleet.connected(Source::Nats, false);
    assert_eq!(fleet.counts(), [("reporting", 1)], "a voice that is not connected abstains");
    fleet.connected(Source::Nats, true);
    fleet.apply(answer(1, "process", Some(5)));
    assert_eq!(fleet.counts(), [("reporting", 1)]);
}

#[test]
fn a_voice_that_lost_its_server_keeps_what_it_knew() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    fleet.put(Source::Etcd, 1, instance());
    fleet.put(Source::Etcd, 1, card(1));
    fleet.connected(Source::Etcd, false);
    fleet.pass(Duration::from_secs(3600));
    assert_eq!(fleet.counts(), [("silent", 1)]);
}

#[test]
fn without_any_discovery_events_alone_keep_a_worker_for_the_idle_ttl() {
    let mut fleet = Clocked::watching(Some("backend"), Some("generate"));
    fleet.load(1, 0, 1, 25);
    assert_eq!(fleet.active_blocks(), [], "discovery is configured, and has not named it");
    fleet.apply(Observation::Abandoned(Source::Kubernetes));
    fleet.load(1, 0, 1, 25);
    fleet.scraped(ScrapeOutcome::NoResponders);
    assert_eq!(fleet.active_blocks(), [], "there is another one");
    fleet.apply(Observation::Abandoned(Source::Etcd));
    fleet.load(1, 0, 2, 26);
    assert_eq!(fleet.active_blocks(), [], "nobody was asked yet");
    fleet.scraped(ScrapeOutcome::Disconnected);
    assert_eq!(fleet.active_blocks(), [], "nobody could be asked");
    fleet.scraped(ScrapeOutcome::NoResponders);
    fleet.load(1, 0, 3, 27);
    fleet.pass(Duration::from_secs(59));
    assert_eq!(fleet.active_blocks(), [(1, Some(27))]);
    assert_eq!(fleet.snapshot().by_events_alone, 1);
    fleet.pass(Duration::from_secs(1));
    assert_eq!(fleet.counts(), []);
}

#[test]
fn passes_alone_keep_a_worker_likewise() {
    let mut fleet = Clocked::watching(Some("backend"), Some("generate"));
    fleet.fleet.rules.registries.clear();
    fleet.forward(1, 1, 0.25);
    fleet.scraped(ScrapeOutcome::NoResponders);
    assert_eq!(fleet.counts(), [("reporting", 1)]);
    assert_eq!(fleet.snapshot().passes[0].totals.passes, 1);
}

fn elsewhere(id: u64) -> Observation {
    Observation::Elsewhere { namespace: "dynamo".into(), worker: WorkerId(id) }
}

#[test]
fn the_events_of_a_worker_that_answers_elsewhere_are_not_the_targets() {
    let mut fleet = Clocked::watching(Some("backend"), Some("generate"));
    fleet.fleet.rules.registries.clear();
    fleet.load(1, 0, 1, 25);
    fleet.apply(elsewhere(1));
    for sequence in 2..5 {
        fleet.load(1, 0, sequence, 26);
        fleet.scraped(ScrapeOutcome::TimedOut);
        assert_eq!(fleet.active_blocks(), []);
        // Its answers stop for longer than any is believed.
        fleet.pass(TTL * 2);
    }
    fleet.load(2, 0, 5, 27);
    fleet.scraped(ScrapeOutcome::TimedOut);
    assert_eq!(fleet.active_blocks(), [(2, Some(27))], "one that answers nowhere is the target's");
    fleet.apply(elsewhere(2));
    assert_eq!(fleet.active_blocks(), [], "unless its answer was only late");
    fleet.load(2, 0, 6, 28);
    fleet.scraped(ScrapeOutcome::TimedOut);
    assert_eq!(fleet.active_blocks(), []);
}

#[test]
fn a_worker_that_answers_for_the_target_is_the_targets_whatever_else_it_answers_for() {
    let mut fleet = Clocked::watching(Some("backend"), Some("generate"));
    fleet.fleet.rules.registries.clear();
    fleet.load(1, 0, 1, 25);
    fleet.apply(elsewhere(1));
    fleet.answer(1, None);
    fleet.load(1, 0, 2, 26);
    fleet.apply(elsewhere(1));
    assert_eq!(fleet.active_blocks(), [(1, Some(26))]);
}

#[test]
fn an_event_that_names_its_place_is_believed() {
    let mut fleet = Clocked::watching(Some("backend"), Some("generate"));
    fleet.fleet.rules.registries.clear();
    fleet.apply(elsewhere(1));
    for (id, component) in [(1, "backend"), (2, "prefill")] {
        let Observation::Load(mut event) = whole(id, Load { active_blocks: Some(25), ..Load::default() }) else {
            unreachable!()
        };
        event.scope = Some(Scope { component: component.into(), endpoint: "generate".into() });
        fleet.apply(Observation::Load(event));
    }
    fleet.scraped(ScrapeOutcome::TimedOut);
    fleet.apply(elsewhere(1));
    assert_eq!(fleet.active_blocks(), [(1, Some(25))]);
}

#[test]
fn adapters_are_counted_and_are_no_workers() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    fleet.put(Source::Etcd, 1, instance());
    fleet.put(Source::Etcd, 1, card(1));
    for source in [Source::Etcd, Source::Files] {
        for name in ["a", "b"] {
            fleet.put(source, 1, Entry::Adapter(Adapter { name: name.into(), block_size: None }));
        }
    }
    assert_eq!(fleet.snapshot().infos[0].adapters, 2);
    assert_eq!(fleet.counts(), [("silent", 1)]);
}

#[test]
fn routers_estimates_are_told_apart_and_are_not_the_workers_load() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    fleet.estimated(8, 1, 1, 10);
    assert_eq!(fleet.estimates(), [], "an event makes nobody alive");
    fleet.put(Source::Etcd, 1, instance());
    fleet.put(Source::Etcd, 1, card(1));
    fleet.load(1, 0, 1, 25);
    fleet.estimated(9, 1, 1, 11);
    let mut both = fleet.estimates();
    both.sort_unstable();
    assert_eq!(both, [(1, Some(8), 10), (1, Some(9), 11)]);
    assert_eq!(fleet.active_blocks(), [(1, Some(25))]);
    fleet.estimated(9, 2, 3, 12);
    assert_eq!(fleet.estimates(), [(1, Some(8), 10)], "what 9 said before the gap may be wrong");
    fleet.pass(Duration::from_secs(600));
    assert_eq!(fleet.estimates(), [], "8 is silent");
    fleet.estimated(1, 1, 0, 13);
    assert_eq!(fleet.estimates(), [(1, None, 13)], "0.8 does not say which router");
    fleet.delete(Source::Etcd, 1, card(1));
    fleet.delete(Source::Etcd, 1, instance());
    assert_eq!(fleet.estimates(), [], "the worker is gone");
}

#[test]
fn routers_estimates_are_bounded_and_those_beyond_are_rejected() {
    let mut fleet = Clocked::watching(None, None);
    let rejected: Vec<_> = (0..81).map(|router| fleet.estimated(100 + router, 1, 1, 10).rejection).collect();
    let reasons: Vec<_> = rejected.iter().flatten().map(|rejection| rejection.reason).collect();
    assert_eq!(reasons, [Reason::TooManyEntries], "eight for each of ten workers");
}

#[test]
fn routers_estimates_that_are_not_wanted_are_only_counted() {
    let mut fleet = Clocked::watching(None, None);
    fleet.fleet.estimates = None;
    fleet.answer(1, Some(5));
    fleet.estimated(8, 1, 1, 10);
    assert_eq!(fleet.estimates(), []);
    assert_eq!(fleet.snapshot().health.events[&Topic::KvMetrics], 1);
}

/// Active slots and waiting requests of the only rank.
fn classics(snapshot: &Snapshot) -> Vec<(Option<u64>, Option<u64>)> {
    snapshot.loads.iter().map(|worker| (worker.load.active_slots, worker.load.waiting)).collect()
}

#[test]
fn passes_add_up_and_give_slots_and_waiting_where_no_report_does() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    fleet.put(Source::Etcd, 1, instance());
    let measured = fleet.forward(1, 5, 0.25).measurements;
    assert!(matches!(&measured[..], [Measurement::WallTime(group, 0.25)] if &*group.endpoint == "generate"));
    assert_eq!(classics(&fleet.snapshot()), [(Some(4), Some(2))]);
    assert_eq!(fleet.forward(1, 6, 0.0).measurements, [], "a heartbeat is no pass");
    assert_eq!(classics(&fleet.snapshot()), [(Some(0), Some(0))]);
    fleet.forward(1, 9, 0.5);
    let snapshot = fleet.snapshot();
    let totals = PassTotals { passes: 2, prefill_tokens: 200, decode_tokens: 6, lost: 2 };
    assert_eq!(snapshot.passes[0].totals, totals);
    assert_eq!(snapshot.health.missed[&(Source::Zmq, Topic::ForwardPassMetrics)], 2);
}

#[test]
fn passes_leave_with_their_worker_and_placements_outlive_it() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    fleet.put(Source::Etcd, 1, instance());
    fleet.forward(1, 1, 0.25);
    fleet.hit(1);
    let counted = |fleet: &mut Clocked| (fleet.snapshot().passes.len(), fleet.snapshot().hits.len());
    assert_eq!(counted(&mut fleet), (1, 1));
    fleet.delete(Source::Etcd, 1, instance());
    assert_eq!(counted(&mut fleet), (0, 1));
    fleet.pass(Duration::from_secs(300));
    assert_eq!(counted(&mut fleet), (0, 0));
}

#[test]
fn passes_of_an_id_that_nothing_names_are_held_and_counted_once() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    for number in 1..=400 {
        assert_eq!(fleet.forward(1, number, 0.25).measurements, []);
    }
    assert_eq!(fleet.counts(), [], "an event makes nobody alive");
    fleet.put(Source::Etcd, 1, instance());
    assert_eq!(fleet.counts(), [("reporting", 1)]);
    fleet.put(Source::Etcd, 1, card(1));
    let totals = fleet.snapshot().passes[0].totals;
    assert_eq!((totals.passes, totals.prefill_tokens, totals.lost), (400, 40_000, 0));
    fleet.forward(1, 401, 0.25);
    assert_eq!(fleet.snapshot().passes[0].totals.passes, 401);
}

#[test]
fn after_a_lost_connection_the_totals_stay_and_the_last_pass_is_unknown() {
    let mut fleet = Clocked::watching(None, None);
    fleet.connected(Source::Etcd, true);
    fleet.put(Source::Etcd, 1, instance());
    fleet.forward(1, 5, 0.25);
    let channel = Channel { source: Source::Zmq, publisher: 8, topic: Topic::ForwardPassMetrics };
    fleet.apply(Observation::ChannelLost(channel));
    let passes = fleet.snapshot().passes[0].clone();
    assert_eq!((passes.last, passes.totals.passes), (None, 1));
    fleet.forward(1, 8, 0.25);
    assert_eq!(
        fleet.snapshot().passes[0].totals.lost,
        2,
        "what was missed meanwhile is counted by the engine's number"
    );
}
