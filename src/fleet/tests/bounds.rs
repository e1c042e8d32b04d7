//! Ranks beyond what is reported, and numbers that cannot be: each costs itself, and what follows is right.

use super::voices::key;
use super::{Clocked, answer, hit_rate};
use crate::fleet::*;

const LIE: u64 = i64::MAX as u64;

fn card(first: u32, count: u32, blocks: u64) -> Card {
    Card {
        model: "m".into(),
        role: None,
        block_size: Some(16),
        limits: Limits { blocks: Some(blocks), slots: Some(8), batch_tokens: Some(512) },
        ranks: Ranks { first: Some(first), count },
    }
}

fn numbered(topic: Topic, sequence: u64) -> Numbered {
    Numbered { channel: Channel { source: Source::Zmq, publisher: 7, topic }, sequence }
}

fn pass(counter: u64) -> Pass {
    let scheduled = Scheduled { prefill_requests: 1, prefill_tokens: 100, decode_requests: 3, ..Scheduled::default() };
    Pass { counter, wall_time: 0.5, scheduled, queued: Queued::default() }
}

impl Clocked {
    /// What of it was rejected.
    fn register(&mut self, id: u64, card: Card) -> Option<Reason> {
        let key = key("generate", id);
        self.reason(Observation::Registered(Registration { source: Source::Etcd, key, entry: Entry::Card(card) }))
    }

    /// Etcd names worker 1.
    fn named(&mut self) {
        self.apply(Observation::Connection { source: Source::Etcd, connected: true });
        let entry = Entry::Instance(Standing::default());
        self.apply(Observation::Registered(Registration { source: Source::Etcd, key: key("generate", 1), entry }));
    }

    fn with_card(card: Card) -> Self {
        let mut fleet = Self::watching(None, None);
        fleet.named();
        fleet.register(1, card);
        fleet
    }

    fn reason(&mut self, observation: Observation) -> Option<Reason> {
        self.apply(observation).rejection.map(|rejection| rejection.reason)
    }

    fn says(&mut self, rank: u32, load: Load) -> Option<Reason> {
        self.reason(Observation::Load(LoadEvent {
            message: numbered(Topic::KvMetrics, 0),
            namespace: "dynamo".into(),
            scope: None,
            worker: WorkerId(1),
            rank: Rank(rank),
            load,
        }))
    }

    fn uses(&mut self, rank: u32, blocks: u64) -> Option<Reason> {
        self.says(rank, Load { active_blocks: Some(blocks), ..Load::default() })
    }

    fn passes(&mut self, rank: u32, pass: Pass) -> Option<Reason> {
        self.passes_of(1, rank, pass)
    }

    fn passes_of(&mut self, id: u64, rank: u32, pass: Pass) -> Option<Reason> {
        self.reason(Observation::Passed(PassEvent {
            message: numbered(Topic::ForwardPassMetrics, 0),
            namespace: "dynamo".into(),
            scope: None,
            worker: WorkerId(id),
            rank: Rank(rank),
            pass,
        }))
    }

    fn believes(&mut self, rank: u32, estimate: Estimate) -> Option<Reason> {
        self.reason(Observation::Estimated(EstimateEvent {
            message: numbered(Topic::KvMetrics, 0),
            namespace: "dynamo".into(),
            worker: WorkerId(1),
            rank: Rank(rank),
            estimate,
        }))
    }

    /// The ranks whose load, passes and estimates are shown.
    fn shown_ranks(&mut self) -> [Vec<u32>; 3] {
        let Snapshot { loads, passes, estimates, .. } = self.snapshot();
        [
            loads.iter().map(|load| load.rank.0).collect(),
            passes.iter().map(|passes| passes.rank.0).collect(),
            estimates.iter().map(|estimate| estimate.rank.0).collect(),
        ]
    }

    /// Active blocks and usage of rank 0.
    fn used(&mut self) -> (Option<u64>, Option<f64>) {
        let load = self.snapshot().loads[0].load.clone();
        (load.active_blocks, load.usage())
    }

    fn totals(&mut self) -> PassTotals {
        self.snapshot().passes[0].totals
    }
}

#[test]
fn a_card_of_320_ranks_shows_each() {
    let mut fleet = Clocked::with_card(card(0, 320, 100));
    assert_eq!((fleet.uses(319, 5), fleet.passes(319, pass(1))), (None, None));
    let [loads, passes, _] = fleet.shown_ranks();
    assert_eq!((loads.len(), passes), (320, vec![319]));
    assert_eq!(fleet.snapshot().groups[0].coverage, Coverage { known: 1, ranks: 320 });
}

#[test]
fn ranks_beyond_those_reported_are_counted_and_the_coverage_knows_of_them() {
    let mut fleet = Clocked::with_card(card(0, 1, 100));
    assert_eq!(fleet.register(1, card(0, 2000, 100)), Some(Reason::TooManyRanks));
    assert_eq!((fleet.uses(MAX_RANKS - 1, 5), fleet.uses(MAX_RANKS, 5)), (None, Some(Reason::TooManyRanks)));
    assert_eq!(fleet.passes(1999, pass(1)), Some(Reason::TooManyRanks));
    assert_eq!(fleet.uses(2000, 5), Some(Reason::UnknownRank));
    let snapshot = fleet.snapshot();
    assert_eq!(snapshot.groups[0].coverage, Coverage { known: 1, ranks: 2000 });
    assert_eq!(snapshot.infos[0].card.as_ref().unwrap().ranks.count, 2000);
    assert_eq!(fleet.shown_ranks().map(|ranks| ranks.len()), [MAX_RANKS as usize, 0, 0]);
    let of = |topic, reason| snapshot.health.rejected[&(Source::Zmq, topic, reason)];
    assert_eq!(of(Topic::KvMetrics, Reason::TooManyRanks), 1);
    assert_eq!(of(Topic::ForwardPassMetrics, Reason::TooManyRanks), 1);
}

#[test]
fn ranks_that_a_card_no_longer_has_go_and_their_late_events_are_rejected() {
    let estimate = Estimate { decode_blocks: Some(1), prefill_tokens: None };
    let mut fleet = Clocked::with_card(card(0, 8, 100));
    for rank in 0..8 {
        let reasons = [fleet.uses(rank, 5), fleet.passes(rank, pass(1)), fleet.believes(rank, estimate)];
        assert_eq!(reasons, [None; 3]);
    }
    for (first, left) in [(0, vec![0, 1, 2, 3, 4, 5]), (1, vec![1, 2, 3, 4, 5, 6])] {
        assert_eq!(fleet.register(1, card(first, 6, 100)), None);
        assert_eq!(fleet.shown_ranks(), [left.clone(), left.clone(), left]);
        let reasons = [fleet.uses(7, 5), fleet.passes(7, pass(2)), fleet.believes(7, estimate)];
        assert_eq!(reasons, [Some(Reason::UnknownRank); 3]);
    }
    assert_eq!(fleet.snapshot().groups[0].coverage, Coverage { known: 5, ranks: 6 }, "rank 6 came back and is silent");
    assert_eq!(fleet.register(1, card(0, 8, 100)), None);
    let passes = fleet.snapshot().passes;
    assert_eq!(passes.iter().map(|passes| passes.totals.passes).collect::<Vec<_>>(), [1; 8], "no count went back");
    assert!(passes[7].last.is_none(), "and nothing is known of it now");
}

#[test]
fn a_worker_without_a_card_keeps_the_ranks_that_it_speaks_of() {
    let mut fleet = Clocked::watching(None, None);
    fleet.apply(answer(1, "process", Some(1)));
    for rank in 0..MAX_RANKS {
        assert_eq!(fleet.uses(rank, 5), None);
    }
    assert_eq!(fleet.uses(MAX_RANKS, 5), Some(Reason::TooManyRanks));
    assert_eq!(fleet.passes(0, pass(1)), None);
    assert_eq!(fleet.uses(u32::MAX, 5), Some(Reason::OutOfRange));
    assert_eq!(fleet.shown_ranks()[0].len(), MAX_RANKS as usize);
}

#[test]
fn ranks_of_an_unnamed_id_are_bounded_counted_and_judged_when_its_card_comes() {
    let mut fleet = Clocked::watching(None, None);
    for rank in 0..MAX_RANKS {
        assert_eq!((fleet.uses(rank, 5), fleet.passes(rank, pass(1))), (None, None));
    }
    assert_eq!(fleet.uses(MAX_RANKS, 5), Some(Reason::TooManyRanks));
    assert_eq!(fleet.passes(MAX_RANKS, pass(1)), Some(Reason::TooManyRanks));
    assert_eq!(fleet.register(1, card(0, 2, 100)), Some(Reason::UnknownRank));
    fleet.named();
    assert_eq!(fleet.shown_ranks(), [vec![0, 1], vec![0, 1], vec![]]);
}

#[test]
fn ranks_of_all_workers_are_bounded_as_the_series_are() {
    let rules = Rules { max_workers: 100, ..Clocked::watching(None, None).fleet.rules };
    let mut fleet = Clocked { fleet: Fleet::new(rules), now: Instant::now() };
    let wide = || card(0, MAX_RANKS, 100);
    let refused: Vec<_> = (0..20).map(|id| fleet.register(id, wide())).collect();
    assert_eq!(refused.iter().filter(|reason| reason.is_none()).count(), 15);
    assert_eq!(fleet.fleet.ranks, max_ranks(100) + 4, "each worker has a rank");
    for id in 0..5 {
        fleet.register(id, card(0, 1, 100));
    }
    assert_eq!(fleet.fleet.workers.values().filter(|worker| worker.lacks_room()).count(), 5);
    fleet.snapshot();
    assert_eq!(fleet.fleet.workers.values().filter(|worker| worker.lacks_room()).count(), 0, "there is room again");
    assert_eq!(fleet.fleet.ranks, 15 * MAX_RANKS as usize + 5);
}

#[test]
fn passes_of_ranks_that_the_card_does_not_have_are_not_measured_either() {
    let mut fleet = Clocked::watching(None, None);
    for rank in 0..4 {
        assert_eq!(fleet.passes(rank, pass(1)), None);
    }
    let entry = Entry::Card(card(0, 2, 100));
    let registration = Registration { source: Source::Etcd, key: key("generate", 1), entry };
    assert_eq!(fleet.apply(Observation::Registered(registration)).measurements.len(), 2);
}

#[test]
fn an_id_of_which_nothing_was_held_is_not_missed() {
    let mut fleet = Clocked::watching(None, None);
    fleet.fleet.pending = Pending::new(0);
    assert_eq!(fleet.passes(0, pass(1)), Some(Reason::TooManyRanks));
    assert_eq!(fleet.pass(Duration::from_secs(300)).snapshot().unnamed, None);
}

#[test]
fn ranks_that_were_heard_before_their_worker_was_named_need_room_too() {
    let rules = Rules { max_workers: 100, ..Clocked::watching(None, None).fleet.rules };
    let mut fleet = Clocked { fleet: Fleet::new(rules), now: Instant::now() };
    let mut refused = Vec::new();
    for id in 0..32 {
        let named = id < 16;
        if named {
            fleet.answer(id, None);
        }
        for rank in 0..1000 {
            assert_eq!(fleet.passes_of(id, rank, pass(1)), None, "{id} {rank}");
        }
        refused.extend(fleet.answer(id, None).rejection.filter(|_| !named).map(|rejection| rejection.reason));
    }
    assert_eq!(refused, [Reason::TooManyRanks; 16]);
    assert_eq!((fleet.snapshot().passes.len(), fleet.fleet.ranks), (16_000, max_ranks(100)));
}

#[test]
fn a_pass_that_no_engine_makes_is_rejected_and_the_next_one_counts() {
    let lies: [fn(&mut Pass); 12] = [
        |pass| pass.scheduled.prefill_tokens = LIE,
        |pass| pass.scheduled.prefill_tokens = (1 << 24) + 1,
        |pass| pass.scheduled.prefill_requests = LIE,
        |pass| pass.scheduled.prefill_kv_tokens = LIE,
        |pass| pass.scheduled.decode_requests = LIE,
        |pass| pass.scheduled.decode_kv_tokens = LIE,
        |pass| pass.queued.prefill_requests = LIE,
        |pass| pass.queued.prefill_tokens = LIE,
        |pass| pass.queued.decode_requests = LIE,
        |pass| pass.queued.decode_kv_tokens = LIE,
        |pass| pass.wall_time = 3601.0,
        |pass| pass.wall_time = f64::MAX,
    ];
    let mut fleet = Clocked::watching(None, None);
    fleet.apply(answer(1, "process", Some(1)));
    fleet.passes(0, pass(1));
    for lie in lies {
        let mut lying = pass(2);
        lie(&mut lying);
        assert_eq!(fleet.passes(0, lying), Some(Reason::OutOfRange), "{lying:?}");
    }
    assert_eq!(fleet.passes(0, pass(2)), None);
    assert_eq!(fleet.totals(), PassTotals { passes: 2, prefill_tokens: 200, decode_tokens: 6, lost: 0 });
    assert_eq!(fleet.snapshot().passes[0].last, Some(pass(2)));
}

#[test]
fn a_pass_is_judged_by_the_card_with_room() {
    // 100 blocks of 16 tokens; 8 slots.
    let mut fleet = Clocked::with_card(card(0, 1, 100));
    let mut computes = |prefill_tokens, decode_requests| {
        let scheduled = Scheduled { prefill_tokens, decode_requests, ..Scheduled::default() };
        fleet.passes(0, Pass { scheduled, ..pass(1) })
    };
    assert_eq!([computes(3200, 16), computes(3201, 1)], [None, Some(Reason::OutOfRange)]);
    assert_eq!(computes(1, 17), Some(Reason::OutOfRange));
    assert_eq!(fleet.register(1, card(0, 1, 1)), None);
    let scheduled = Scheduled { prefill_tokens: 1024, ..Scheduled::default() };
    assert_eq!(fleet.passes(0, Pass { scheduled, ..pass(2) }), None, "an engine without a cache computes a batch");
}

#[test]
fn a_counter_that_leaps_is_another_count() {
    let mut fleet = Clocked::watching(None, None);
    fleet.apply(answer(1, "process", Some(1)));
    for counter in [1, LIE, 2, 3, 5] {
        fleet.passes(0, pass(counter));
    }
    assert_eq!(fleet.totals(), PassTotals { passes: 5, prefill_tokens: 500, decode_tokens: 15, lost: 1 });
}

#[test]
fn blocks_in_use_are_judged_by_the_card_with_room() {
    let mut fleet = Clocked::with_card(card(0, 1, 100));
    let mut used = |blocks| (fleet.uses(0, blocks), fleet.used());
    assert_eq!(used(100), (None, (Some(100), Some(1.0))));
    assert_eq!(used(101), (None, (Some(101), Some(1.0))), "a little over is full");
    assert_eq!(used(150), (None, (Some(150), None)), "one of the two is wrong");
    assert_eq!(used(99_999), (Some(Reason::OutOfRange), (None, None)));
    assert_eq!(used(50), (None, (Some(50), Some(0.5))));
    assert_eq!(fleet.snapshot().groups[0].load.unwrap().average.to_bits(), 50_f64.to_bits());
}

#[test]
fn a_card_may_be_late() {
    let mut fleet = Clocked::with_card(card(0, 1, 100));
    assert_eq!(fleet.uses(0, 300), Some(Reason::OutOfRange));
    assert_eq!(fleet.used(), (None, None));
    assert_eq!(fleet.register(1, card(0, 1, 400)), None);
    assert_eq!(fleet.used(), (Some(300), Some(0.75)));
}

#[test]
fn what_is_impossible_on_a_card_is_unknown_and_the_rest_counts() {
    let mut fleet = Clocked::watching(None, None);
    fleet.apply(answer(1, "process", Some(1)));
    let lie = Some(u64::MAX);
    let lying = Card {
        block_size: lie,
        limits: Limits { blocks: lie, slots: lie, batch_tokens: lie },
        ranks: Ranks { first: Some(0), count: u32::MAX },
        ..card(0, 1, 100)
    };
    assert_eq!(fleet.register(1, lying), Some(Reason::OutOfRange));
    let info = fleet.snapshot().infos[0].card.clone().unwrap();
    let ranks = Ranks { first: None, count: 1 };
    assert_eq!(info, Card { block_size: None, limits: Limits::default(), ranks, ..card(0, 1, 100) });
    assert_eq!(fleet.snapshot().groups[0].coverage, Coverage { known: 1, ranks: 1 });
    assert_eq!(fleet.register(1, card(0, 1, 100)), None);
    assert_eq!(fleet.used(), (Some(1), Some(0.01)));
}

#[test]
fn shares_are_shares() {
    let mut fleet = Clocked::with_card(card(0, 1, 100));
    let mut shares = |share| {
        let load = Load { cache_usage: Some(share), prefix_hit_rate: Some(share), ..Load::default() };
        let reason = fleet.says(0, load);
        let load = fleet.snapshot().loads[0].load.clone();
        (reason, load.usage(), load.prefix_hit_rate)
    };
    assert_eq!(shares(0.5), (None, Some(0.5), Some(0.5)));
    assert_eq!(shares(1.05), (None, Some(1.0), Some(1.0)));
    assert_eq!(shares(77.0), (Some(Reason::OutOfRange), None, None));
    assert_eq!(shares(0.25), (None, Some(0.25), Some(0.25)));
}

#[test]
fn counts_of_speculative_decoding_that_leap_are_passed_over() {
    let mut fleet = Clocked::with_card(card(0, 1, 100));
    let mut drafted = |drafts| {
        let counts = SpecDecodeCounts { drafts: Some(drafts), ..SpecDecodeCounts::default() };
        let reason =
            fleet.says(0, Load { spec_decode: Some(SpecDecode { spec_tokens: Some(4), counts }), ..Load::default() });
        (reason, fleet.snapshot().spec_decode[0].1.drafts.unwrap())
    };
    let seen = [drafted(1000), drafted(LIE), drafted(1005)];
    assert_eq!(seen, [(None, 0), (Some(Reason::OutOfRange), 0), (None, 5)]);
}

#[test]
fn an_impossible_load_in_an_answer_costs_itself() {
    let mut fleet = Clocked::watching(None, None);
    let mut answers = |active_blocks, cache_usage| {
        let Observation::Answered(mut said) = answer(1, "process", None) else { unreachable!() };
        let load = Load { active_blocks: Some(active_blocks), total_blocks: Some(100), cache_usage, ..Load::default() };
        said.report = Some(Report { rank: Rank(0), load });
        (fleet.reason(Observation::Answered(said)), fleet.used())
    };
    assert_eq!(answers(LIE, None), (Some(Reason::OutOfRange), (None, None)));
    assert_eq!(answers(50, Some(4.0)), (Some(Reason::OutOfRange), (Some(50), Some(0.5))), "what it computes to");
    assert_eq!(answers(50, None), (None, (Some(50), Some(0.5))));
}

#[test]
fn a_limit_that_cannot_be_leaves_that_of_the_card() {
    let mut fleet = Clocked::with_card(card(0, 1, 100));
    let load = Load { active_blocks: Some(50), total_blocks: Some(LIE), ..Load::default() };
    assert_eq!(fleet.says(0, load), Some(Reason::OutOfRange));
    assert_eq!(fleet.used(), (Some(50), Some(0.5)));
}

#[test]
fn what_no_router_believes_is_rejected_and_the_rest_is_kept() {
    let mut fleet = Clocked::with_card(card(0, 1, 100));
    let lying = Estimate { decode_blocks: Some(LIE), prefill_tokens: Some(100) };
    assert_eq!(fleet.believes(0, lying), Some(Reason::OutOfRange));
    assert_eq!(fleet.snapshot().estimates[0].estimate, Estimate { decode_blocks: None, ..lying });
    let lying = Estimate { decode_blocks: Some(300), prefill_tokens: Some(LIE) };
    assert_eq!(fleet.believes(0, lying), Some(Reason::OutOfRange));
    assert_eq!(fleet.snapshot().estimates[0].estimate, Estimate { prefill_tokens: None, ..lying }, "more than fits");
}

#[test]
fn a_prompt_that_no_request_has_is_placed_and_has_no_rate() {
    let mut fleet = Clocked::with_card(card(0, 1, 100));
    let mut place = |full_blocks, cached| {
        let step = Step::Placed(Prompt { full_blocks, cached });
        let request = RequestId::of(b"router", "request");
        let routing = Routing { request, router: None, adapter: None, worker: WorkerId(1), step };
        fleet.reason(Observation::Routed(RoutingEvent {
            message: numbered(Topic::ActiveSequences, 0),
            namespace: "dynamo".into(),
            steps: vec![routing],
        }))
    };
    let tokens = |tokens| Cached::Effective { tokens };
    assert_eq!(place(Some(6), tokens(LIE)), Some(Reason::OutOfRange));
    assert_eq!(place(Some(u32::MAX), tokens(0)), Some(Reason::OutOfRange));
    assert_eq!(place(None, Cached::Overlap { isl_tokens: LIE, blocks: 1 }), Some(Reason::OutOfRange));
    assert_eq!(place(Some(6), tokens(4)), None);
    let blocks = HitBlocks { isl: u32::MAX, overlap: u32::MAX };
    let lie = hit_rate(0, HitRate { namespace: "dynamo".into(), worker: WorkerId(1), blocks });
    assert_eq!(fleet.reason(lie), Some(Reason::OutOfRange));
    assert_eq!(fleet.snapshot().hits[0].1, HitTotals { placed: 4, events: 1, isl: 7, overlap: 6 });
}

#[test]
fn a_number_that_leaps_is_no_loss() {
    let mut fleet = Clocked::watching(None, None);
    for sequence in [1, u64::MAX, 2, 4] {
        fleet.apply(Observation::Heard(numbered(Topic::KvMetrics, sequence)));
    }
    let health = fleet.snapshot().health;
    assert_eq!(health.missed[&(Source::Zmq, Topic::KvMetrics)], 1);
    assert_eq!(health.complete[&Topic::KvMetrics].to_bits(), 0.8_f64.to_bits());
}

pub(super) mod whatever_is_said {
    use proptest::prelude::*;

    use super::*;

    /// Honest, at a bound, or a lie.
    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![0..200_u64, Just(1 << 20), Just(1 << 24), Just(1 << 32), Just(LIE), any::<u64>()]
    }

    pub(in super::super) fn rank() -> impl Strategy<Value = Rank> {
        prop_oneof![0..4_u32, any::<u32>()].prop_map(Rank)
    }

    pub(in super::super) fn load() -> impl Strategy<Value = Load> {
        let count = || proptest::option::of(number());
        let share = || proptest::option::of(prop_oneof![0.0..2.0, Just(f64::MAX)]);
        let spec_decode = (count(), count(), proptest::collection::vec(number(), 0..3));
        (count(), count(), count(), count(), share(), share(), spec_decode).prop_map(
            |(active_slots, active_blocks, total_blocks, waiting, cache_usage, prefix_hit_rate, spec_decode)| {
                let (drafts, draft_tokens, accepted_per_position) = spec_decode;
                let counts = SpecDecodeCounts { drafts, draft_tokens, accepted_tokens: drafts, accepted_per_position };
                let spec_decode = Some(SpecDecode { spec_tokens: drafts, counts });
                Load {
                    active_slots,
                    total_slots: total_blocks,
                    active_blocks,
                    total_blocks,
                    waiting,
                    cache_usage,
                    prefix_hit_rate,
                    spec_decode,
                }
            },
        )
    }

    pub(in super::super) fn passes() -> impl Strategy<Value = Pass> {
        let wall_time = prop_oneof![Just(0.0), 0.0..1.0, Just(f64::MAX)];
        (number(), wall_time, proptest::array::uniform9(number())).prop_map(|(counter, wall_time, said)| {
            let [prefill_requests, prefill_tokens, prefill_kv_tokens, decode_requests, decode_kv_tokens, queued @ ..] =
                said;
            let scheduled =
                Scheduled { prefill_requests, prefill_tokens, prefill_kv_tokens, decode_requests, decode_kv_tokens };
            let [prefill_requests, prefill_tokens, decode_requests, decode_kv_tokens] = queued;
            let queued = Queued { prefill_requests, prefill_tokens, decode_requests, decode_kv_tokens };
            Pass { counter, wall_time, scheduled, queued }
        })
    }

    fn process() -> Process {
        Process { instance: "process".into(), started: None }
    }

    fn observation() -> impl Strategy<Value = Observation> {
        let (namespace, worker, scope) = (Arc::<str>::from("dynamo"), WorkerId(1), None);
        let name = Arc::clone(&namespace);
        let loaded = (number(), rank(), load()).prop_map(move |(sequence, rank, load)| {
            let (message, namespace, scope) = (numbered(Topic::KvMetrics, sequence), Arc::clone(&name), scope.clone());
            Observation::Load(LoadEvent { message, namespace, scope, worker, rank, load })
        });
        let name = Arc::clone(&namespace);
        let passed = (number(), rank(), passes()).prop_map(move |(sequence, rank, pass)| {
            let message = numbered(Topic::ForwardPassMetrics, sequence);
            Observation::Passed(PassEvent { message, namespace: Arc::clone(&name), scope: None, worker, rank, pass })
        });
        let answered =
            proptest::option::of((rank(), load()).prop_map(|(rank, load)| Report { rank, load })).prop_map(|report| {
                let key = key("generate", 1);
                Observation::Answered(Answer { key, process: process(), report, release: None })
            });
        let served = proptest::array::uniform3(number()).prop_map(|[requests, errors, processing]| {
            let (requests, errors, processing) = (Some(requests), Some(errors), Some(processing));
            let counts = EndpointCounts { requests, errors, processing };
            Observation::Served { key: key("generate", 1), process: process(), counts }
        });
        let placed = (number(), any::<u32>(), any::<u32>()).prop_map(move |(sequence, one, other)| {
            let blocks = HitBlocks { isl: one.max(other), overlap: one.min(other) };
            hit_rate(sequence, HitRate { namespace: Arc::clone(&namespace), worker, blocks })
        });
        let registered = (number(), number(), any::<u32>(), any::<u32>()).prop_map(|(blocks, slots, first, count)| {
            let limits = Limits { blocks: Some(blocks), slots: Some(slots), batch_tokens: Some(slots) };
            let ranks = Ranks { first: Some(first % 4), count: count.max(1) };
            let card = Card { block_size: Some(slots.max(1)), limits, ranks, ..card(0, 1, 100) };
            let entry = Entry::Card(card);
            Observation::Registered(Registration { source: Source::Etcd, key: key("generate", 1), entry })
        });
        prop_oneof![
            loaded.boxed(),
            passed.boxed(),
            answered.boxed(),
            served.boxed(),
            placed.boxed(),
            registered.boxed()
        ]
    }

    /// Every counter of a snapshot by its name, and rank.
    fn counters(snapshot: &Snapshot) -> BTreeMap<(&'static str, u32), u64> {
        let passes = snapshot.passes.iter().flat_map(|RankPasses { rank, totals, .. }| {
            let PassTotals { passes, prefill_tokens, decode_tokens, lost } = *totals;
            let named = [("passes", passes), ("prefill", prefill_tokens), ("decode", decode_tokens), ("lost", lost)];
            named.map(|(name, count)| ((name, rank.0), count))
        });
        let drafts = snapshot.spec_decode.iter().flat_map(|(_, counts)| {
            [("drafts", counts.drafts), ("drafted", counts.draft_tokens), ("accepted", counts.accepted_tokens)]
        });
        let served = snapshot.served.iter().flat_map(|(_, counts)| {
            [("requests", counts.requests), ("errors", counts.errors), ("processing", counts.processing)]
        });
        let hits =
            snapshot.hits.iter().flat_map(|(_, hits)| [("isl", Some(hits.isl)), ("overlap", Some(hits.overlap))]);
        let missed = [("missed", Some(snapshot.health.missed.values().sum()))];
        let others = drafts.chain(served).chain(hits).chain(missed);
        passes.chain(others.filter_map(|(name, count)| Some(((name, 0), count?)))).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn no_count_leaps_or_falls_and_every_share_is_one(
            said in proptest::collection::vec((observation(), 0..3_u64), 1..40),
        ) {
            let mut fleet = Clocked::with_card(card(0, 4, 100));
            let mut before = BTreeMap::new();
            for (observation, seconds) in said {
                fleet.pass(Duration::from_secs(seconds)).apply(observation);
                let snapshot = fleet.snapshot();
                let now = counters(&snapshot);
                for (name, count) in &now {
                    let last = before.get(name).copied().unwrap_or_default();
                    prop_assert!(*count >= last, "{name:?} fell from {last} to {count}");
                    let most = if name.0 == "processing" { 1_u64 << 56 } else { 1_u64 << 26 };
                    prop_assert!(count - last <= most, "{name:?} leapt from {last} to {count}");
                }
                before.extend(now);
                for load in snapshot.loads.iter().map(|worker| &worker.load) {
                    let shares = [load.usage(), load.prefix_hit_rate];
                    prop_assert!(shares.iter().flatten().all(|share| (0.0..=1.0).contains(share)), "{load:?}");
                }
                for view in &snapshot.groups {
                    prop_assert!(view.coverage.known <= view.coverage.ranks && view.coverage.ranks <= 1 << 16);
                    prop_assert!(view.load.is_none_or(|load| load.average <= 2_f64.powi(32)));
                }
            }
        }
    }
}
