//! The fleet's rules, each shown on a hand-made clock.

mod bounds;
mod ids;
mod random;
mod voices;

use super::*;

const TTL: Duration = Duration::from_secs(3);

struct Clocked {
    fleet: Fleet,
    now: Instant,
}

impl Clocked {
    fn watching(component: Option<&str>, endpoint: Option<&str>) -> Self {
        Self::with_target("dynamo", component, endpoint)
    }

    fn with_target(namespace: &str, component: Option<&str>, endpoint: Option<&str>) -> Self {
        let target = Target {
            namespace: namespace.parse().unwrap(),
            component: component.map(str::to_owned),
            endpoint: endpoint.map(str::to_owned),
        };
        let rules = Rules {
            target,
            worker_ttl: TTL,
            event_ttl: Duration::from_secs(300),
            request_ttl: Duration::from_secs(600),
            registries: [Source::Etcd, Source::Kubernetes].into(),
            zmq: true,
            idle_ttl: Duration::from_secs(60),
            router_estimates: true,
            max_workers: 10,
        };
        Self { fleet: Fleet::new(rules), now: Instant::now() }
    }

    fn pass(&mut self, time: Duration) -> &mut Self {
        self.now += time;
        self
    }

    /// What is rejected has a series, which was there with zero before.
    fn apply(&mut self, observation: Observation) -> Applied {
        let applied = self.fleet.apply(observation, self.now);
        if let Some(Rejection { topic, reason, .. }) = &applied.rejection {
            assert!(reason.applies_to(*topic), "{topic:?} {reason:?}");
        }
        applied
    }

    fn answer(&mut self, id: u64, active_blocks: Option<u64>) -> Applied {
        self.apply(answer(id, "process", active_blocks))
    }

    fn hit(&mut self, id: u64) -> Applied {
        let blocks = HitBlocks { isl: 10, overlap: 4 };
        self.apply(hit_rate(0, HitRate { namespace: "dynamo".into(), worker: WorkerId(id), blocks }))
    }

    fn snapshot(&mut self) -> Snapshot {
        self.fleet.snapshot(self.now)
    }

    fn active_blocks(&mut self) -> Vec<(u64, Option<u64>)> {
        self.snapshot().loads.iter().map(|worker| (worker.key.id.0, worker.load.active_blocks)).collect()
    }

    fn states(&mut self) -> Vec<(String, u64, u64)> {
        let view = |group: GroupView| {
            let [(WorkerState::Reporting, reporting), (WorkerState::Silent, silent), ..] = group.workers else {
                panic!("the states are in order")
            };
            (format!("{}/{}", group.group.component, group.group.endpoint), reporting, silent)
        };
        self.snapshot().groups.into_iter().map(view).collect()
    }
}

/// Of the only router there is; JSON has no number but this.
fn hit_rate(sequence: u64, hit: HitRate) -> Observation {
    let channel = Channel { source: Source::Nats, publisher: 0, topic: Topic::KvHitRate };
    Observation::HitRate { message: Numbered { channel, sequence }, hit }
}

fn answer_at(endpoint: &str, id: u64, instance: &str, started: u64, active_blocks: Option<u64>) -> Observation {
    let load = Load { active_blocks, ..Load::default() };
    Observation::Answered(Answer {
        key: WorkerKey {
            namespace: "dynamo".into(),
            component: "backend".into(),
            endpoint: endpoint.into(),
            id: WorkerId(id),
        },
        process: Process {
            instance: instance.into(),
            started: Some(std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(started)),
        },
        report: active_blocks.map(|_| Report { rank: Rank(0), load }),
        release: None,
    })
}

fn answer(id: u64, instance: &str, active_blocks: Option<u64>) -> Observation {
    answer_at("generate", id, instance, 0, active_blocks)
}

fn row(group: &str, reporting: u64, silent: u64) -> (String, u64, u64) {
    (group.to_owned(), reporting, silent)
}

#[test]
fn load_average_and_deviation_are_those_of_the_missions_readme() {
    let mut fleet = Clocked::watching(Some("backend"), Some("generate"));
    fleet.answer(1, Some(77));
    fleet.answer(2, Some(29));
    fleet.answer(3, None);
    let load = fleet.snapshot().groups[0].load;
    assert_eq!(load, Some(LoadStatistics { average: 53.0, deviation: 24.0 }), "the silent one does not count");
}

#[test]
fn without_workers_there_is_no_average_and_an_explicit_target_has_its_zeros() {
    let mut fleet = Clocked::watching(Some("backend"), Some("generate"));
    assert_eq!(fleet.snapshot().groups[0].load, None);
    assert_eq!(fleet.states(), [row("backend/generate", 0, 0)]);
    assert_eq!(Clocked::watching(Some("backend"), None).states(), []);
}

#[test]
fn a_worker_that_stops_answering_leaves_with_all_its_load() {
    let mut fleet = Clocked::watching(None, None);
    fleet.answer(1, Some(5));
    fleet.answer(2, Some(6));
    fleet.pass(TTL / 2).answer(2, Some(7));
    fleet.pass(TTL / 2);
    assert_eq!(fleet.active_blocks(), [(2, Some(7))]);
}

#[test]
fn a_late_event_does_not_make_a_worker_alive() {
    let mut fleet = Clocked::watching(Some("backend"), Some("generate"));
    fleet.answer(1, Some(5));
    fleet.hit(1);
    fleet.pass(TTL).snapshot();
    fleet.hit(1);
    assert_eq!(fleet.active_blocks(), []);
    assert_eq!(fleet.states(), [row("backend/generate", 0, 0)]);
    assert_eq!(fleet.snapshot().hits[0].1.events, 2, "but it counts");
    fleet.pass(Duration::from_secs(300));
    assert_eq!(fleet.snapshot().hits, []);
}

#[test]
fn what_an_answer_leaves_out_is_unknown_from_then_on() {
    let mut fleet = Clocked::watching(Some("backend"), Some("generate"));
    fleet.answer(1, Some(5));
    fleet.answer(1, None);
    assert_eq!(fleet.active_blocks(), []);
    assert_eq!(fleet.states(), [row("backend/generate", 1, 0)], "it has reported");
}

#[test]
fn an_endpoint_without_load_is_a_worker_only_where_it_was_asked_for() {
    let mut explicit = Clocked::watching(Some("backend"), Some("generate"));
    explicit.answer(1, None);
    assert_eq!(explicit.states(), [row("backend/generate", 0, 1)]);

    let mut all = Clocked::watching(None, None);
    all.answer(1, None);
    assert_eq!(all.states(), []);
    all.answer(1, Some(1));
    assert_eq!(all.states(), [row("backend/generate", 1, 0)]);
}

#[test]
fn a_group_that_lost_its_workers_shows_zeros_for_an_hour() {
    let mut fleet = Clocked::watching(None, None);
    fleet.answer(1, Some(1));
    fleet.pass(GROUP_MEMORY.checked_sub(Duration::from_secs(1)).unwrap());
    assert_eq!(fleet.states(), [row("backend/generate", 0, 0)]);
    fleet.pass(Duration::from_secs(1));
    assert_eq!(fleet.states(), []);
}

#[test]
fn an_event_before_the_first_answer_is_measured_and_counted_when_the_worker_is_named() {
    let mut fleet = Clocked::watching(None, None);
    assert_eq!(fleet.hit(1).measurements, []);
    assert_eq!(fleet.snapshot().hits, []);
    let applied = fleet.answer(1, Some(5));
    assert_eq!(applied.measurements.len(), 1);
    assert_eq!(fleet.hit(1).measurements.len(), 1);
    let (_, totals) = fleet.snapshot().hits[0].clone();
    assert_eq!(totals, HitTotals { placed: 0, events: 2, isl: 20, overlap: 8 });
}

#[test]
fn hit_rates_that_did_not_come_are_counted_by_the_gap_in_their_numbers() {
    let mut fleet = Clocked::watching(None, None);
    let blocks = HitBlocks { isl: 1, overlap: 0 };
    for sequence in [4, 5, 8] {
        fleet.apply(hit_rate(sequence, HitRate { namespace: "dynamo".into(), worker: WorkerId(1), blocks }));
    }
    let health = fleet.snapshot().health;
    assert_eq!((health.missed[&(Source::Nats, Topic::KvHitRate)], health.events[&Topic::KvHitRate]), (2, 3));
    assert_eq!(health.complete.get(&Topic::KvHitRate), Some(&0.6));
}

#[test]
fn events_of_another_namespace_are_another_workers() {
    let mut fleet = Clocked::watching(None, None);
    fleet.answer(1, Some(5));
    let blocks = HitBlocks { isl: 1, overlap: 0 };
    let event = HitRate { namespace: "dynamo-legacy".into(), worker: WorkerId(1), blocks };
    fleet.apply(hit_rate(0, event));
    assert_eq!(fleet.snapshot().hits, []);
}

#[test]
fn of_two_living_processes_with_one_id_the_one_that_started_later_is_shown() {
    let mut fleet = Clocked::watching(None, None);
    for _ in 0..2 {
        fleet.apply(answer_at("generate", 1, "new", 20, Some(2)));
        let rejection = fleet.apply(answer_at("generate", 1, "old", 10, Some(1))).rejection.unwrap();
        assert_eq!(rejection.reason, Reason::DuplicateWorker);
    }
    assert_eq!(fleet.active_blocks(), [(1, Some(2))]);
    fleet.pass(TTL);
    fleet.apply(answer_at("generate", 1, "old", 10, Some(1)));
    assert_eq!(fleet.active_blocks(), [(1, Some(1))], "once the newer one is gone the other is the worker");
}

#[test]
fn a_restarted_process_is_silent_until_it_reports() {
    let mut fleet = Clocked::watching(Some("backend"), Some("generate"));
    fleet.apply(answer_at("generate", 1, "old", 10, Some(1)));
    fleet.apply(answer_at("generate", 1, "new", 20, None));
    assert_eq!(fleet.states(), [row("backend/generate", 0, 1)]);
}

#[test]
fn workers_and_groups_are_bounded() {
    let mut fleet = Clocked::watching(None, None);
    for id in 0..10 {
        assert!(fleet.answer(id, Some(1)).rejection.is_none());
    }
    assert_eq!(fleet.answer(10, Some(1)).rejection.unwrap().reason, Reason::TooManyWorkers);
    assert!(fleet.answer(9, Some(2)).rejection.is_none(), "a known one is not affected");

    let mut fleet = Clocked::watching(None, None);
    for endpoint in 0..MAX_GROUPS {
        fleet.apply(answer_at(&endpoint.to_string(), 1, "process", 0, Some(1)));
        fleet.pass(TTL).snapshot();
    }
    let rejection = fleet.apply(answer_at("one more", 1, "process", 0, Some(1))).rejection;
    assert_eq!(rejection.unwrap().reason, Reason::TooManyGroups);
    assert!(fleet.apply(answer_at("0", 1, "process", 0, Some(1))).rejection.is_none());
}

#[test]
fn a_candidate_that_speaks_up_beyond_the_limit_is_rejected_under_the_topic_of_its_event() {
    let mut fleet = Clocked::watching(None, None);
    fleet.answer(11, None);
    for id in 0..10 {
        fleet.answer(id, Some(1));
    }
    let channel = |topic| Channel { source: Source::Nats, publisher: 7, topic };
    let message = |topic| Numbered { channel: channel(topic), sequence: 1 };
    let (namespace, scope, worker, rank): (Arc<str>, _, _, _) = ("dynamo".into(), None, WorkerId(11), Rank(0));
    let load = Observation::Load(LoadEvent {
        message: message(Topic::KvMetrics),
        namespace: Arc::clone(&namespace),
        scope: scope.clone(),
        worker,
        rank,
        load: Load { active_blocks: Some(1), ..Load::default() },
    });
    let message = message(Topic::ForwardPassMetrics);
    let pass = Observation::Passed(PassEvent { message, namespace, scope, worker, rank, pass: Pass::default() });
    for (event, topic) in [(load, Topic::KvMetrics), (pass, Topic::ForwardPassMetrics)] {
        let rejection = fleet.apply(event).rejection.unwrap();
        assert_eq!((rejection.topic, rejection.reason), (topic, Reason::TooManyWorkers));
    }
}

#[test]
fn every_namespace_watched_keeps_namespaces_apart() {
    let mut fleet = Clocked::with_target("*", Some("backend"), Some("generate"));
    assert_eq!(fleet.states(), [], "no namespace is known yet, so no zeros either");
    fleet.answer(1, Some(4));
    assert_eq!(fleet.snapshot().groups[0].group.namespace.as_deref(), Some("dynamo"));
}

#[test]
fn speculative_decoding_is_counted_from_the_first_sight_of_a_worker() {
    let mut fleet = Clocked::watching(None, None);
    let mut totals = Vec::new();
    for drafts in [1000, 1005, 2] {
        let counts = SpecDecodeCounts { drafts: Some(drafts), ..SpecDecodeCounts::default() };
        let spec_decode = Some(SpecDecode { spec_tokens: Some(4), counts });
        let Observation::Answered(mut worker) = answer(1, "process", Some(1)) else { unreachable!() };
        worker.report = Some(Report { rank: Rank(0), load: Load { spec_decode, ..Load::default() } });
        fleet.apply(Observation::Answered(worker));
        totals.push(fleet.snapshot().spec_decode[0].1.drafts.unwrap());
    }
    assert_eq!(totals, [0, 5, 7]);
}

#[test]
fn a_reconnection_is_counted_from_the_second_connection_on() {
    let mut fleet = Clocked::watching(None, None);
    for connected in [false, true, true, false, true] {
        fleet.apply(Observation::Connection { source: Source::Nats, connected });
    }
    let view = fleet.snapshot().health.connections[&Source::Nats];
    assert_eq!((view.connected, view.reconnects), (true, 1));
}

#[test]
fn rejections_are_counted_by_topic_and_reason() {
    let mut fleet = Clocked::watching(None, None);
    let rejection =
        Rejection { source: Source::Nats, topic: Topic::Stats, reason: Reason::Malformed, detail: String::new() };
    for _ in 0..2 {
        assert_eq!(fleet.apply(Observation::Rejected(rejection.clone())).rejection, Some(rejection.clone()));
    }
    assert_eq!(fleet.snapshot().health.rejected[&(Source::Nats, Topic::Stats, Reason::Malformed)], 2);
}
