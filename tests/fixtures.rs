//! Bytes captured from real Dynamo releases talking to a real nats-server, decoded. Each folder is a release.

use std::fs;
use std::path::Path;

use dynamo_metrics::fleet::{
    Cached, Card, Estimate, HitBlocks, Limits, Load, Prompt, Rank, Ranks, Step, WorkerId, WorkerKey,
};
use dynamo_metrics::target::{Target, parse_endpoint_subject};
use dynamo_metrics::wire::{
    self, ActiveBlocks, ActiveLoad, ActiveLoadForm, Envelope, LoadForm, PlacedPrompt, Registered, SequenceChange,
    SequenceStep, SequencesForm,
};

use crate::support::captured;

/// An endpoint, its worker id in hex, and its rank and load if it says any.
type Endpoint = (String, String, Option<(Rank, Load)>);

/// Every endpoint in a STATS reply.
fn stats(release: &str, file: &str) -> Vec<Endpoint> {
    let bytes = captured(release, file);
    let reply = wire::decode_stats(&bytes).unwrap();
    assert!(reply.process.started.is_some(), "every release says when it started");
    let read = |endpoint: &wire::Endpoint<'_>| {
        let (name, worker) = parse_endpoint_subject(&reply.service, &endpoint.subject).unwrap();
        let report = endpoint.data.and_then(|data| wire::decode_load(data.get().as_bytes()).unwrap());
        (name.to_owned(), format!("{worker:x}"), report.map(|report| (report.rank, report.load)))
    };
    reply.endpoints.iter().map(read).collect()
}

fn load(active_slots: u64, total_slots: u64, blocks: (u64, u64), waiting: u64, shares: (f64, f64)) -> Load {
    Load {
        active_slots: Some(active_slots),
        total_slots: Some(total_slots),
        active_blocks: Some(blocks.0),
        total_blocks: Some(blocks.1),
        waiting: Some(waiting),
        cache_usage: Some(shares.0),
        prefix_hit_rate: Some(shares.1),
        spec_decode: None,
    }
}

#[test]
fn stats_replies_of_every_release_that_reports_in_them_are_read_to_the_digit() {
    for (release, id, active_blocks) in
        [("0.1.1", "6d8ea20d960536f0", 78), ("0.3.2", "6d8ea20d960536fe", 78), ("0.5.1", "6d8ea20d96053709", 77)]
    {
        let expected = load(58, 100, (active_blocks, 100), 3, (0.77, 0.25));
        assert_eq!(
            stats(release, "stats.1.json"),
            [
                ("load_metrics".to_owned(), id.to_owned(), Some((Rank(0), expected))),
                ("generate".to_owned(), id.to_owned(), None)
            ],
            "{release}"
        );
    }
    let simulated = stats("0.5.1-cluster", "stats.1.json");
    assert_eq!(simulated[0], ("generate".to_owned(), "3ceea2102d70ec0d".to_owned(), None));
    assert_eq!(simulated[1].2, Some((Rank(0), load(1, 1024, (0, 2000), 0, (0.0, 0.286_149_05)))));
}

#[test]
fn the_load_in_stats_is_encoded_as_the_releases_do() {
    for (release, form) in [("0.1.1", LoadForm::Flat), ("0.3.2", LoadForm::Sorted), ("0.5.1", LoadForm::Nested)] {
        let bytes = captured(release, "stats.1.json");
        let reply = wire::decode_stats(&bytes).unwrap();
        let data = reply.endpoints[0].data.unwrap().get();
        let report = wire::decode_load(data.as_bytes()).unwrap().unwrap();
        assert_eq!(wire::encode_load(&report, form).to_string(), data, "{release}");
    }
}

#[test]
fn releases_that_report_by_event_alone_still_say_that_they_are_there() {
    for (release, id) in [("0.7.1", "6d8ea20d96053724"), ("0.8.1", "6d8ea20d96053734")] {
        assert_eq!(stats(release, "stats.1.json"), [("generate".to_owned(), id.to_owned(), None)], "{release}");
    }
}

#[test]
fn the_info_reply_of_every_release_names_namespace_and_component() {
    let target = Target { namespace: "dynamo".parse().unwrap(), component: None, endpoint: None };
    for release in ["0.1.1", "0.3.2", "0.5.1", "0.7.1", "0.5.1-cluster"] {
        let info = wire::decode_info(&captured(release, "info.1.json")).unwrap();
        let place = target.place(&info.service, &info.description).unwrap();
        assert_eq!((&*place.namespace, &*place.component), ("dynamo", "backend"), "{release}");
    }
}

#[test]
fn hit_rate_events_of_every_json_release_are_read_and_encoded_as_it_does() {
    let event = |release: &str, number: u32| {
        let file = format!("event.namespace.dynamo.kv-hit-rate.{number}.json");
        let json = captured(release, &file);
        let event = wire::decode_hit_rate("dynamo".into(), &json).unwrap();
        let rank = (release == "0.7.1").then_some(Rank(0));
        assert_eq!(wire::encode_hit_rate(event.worker, rank, event.blocks), json, "{release}");
        (format!("{:x}", event.worker), event.blocks)
    };
    assert_eq!(event("0.1.1", 1), ("6d8ea20d960536f0".to_owned(), HitBlocks { isl: 1, overlap: 0 }));
    assert_eq!(event("0.5.1", 1), ("6d8ea20d96053709".to_owned(), HitBlocks { isl: 40, overlap: 0 }));
    assert_eq!(event("0.7.1", 1), ("6d8ea20d96053724".to_owned(), HitBlocks { isl: 40, overlap: 0 }));
    let routed = (1..=5).map(|number| event("0.5.1-cluster", number).1);
    let blocks = [(7, 0), (7, 6), (6, 6), (1, 0), (32, 15)].map(|(isl, overlap)| HitBlocks { isl, overlap });
    assert_eq!(routed.collect::<Vec<_>>(), blocks);
}

#[test]
fn hit_rate_events_of_0_9_are_read_and_encoded_as_it_does() {
    let event = |number: u32| {
        let bytes = captured("0.9.1-cluster", &format!("event.namespace.dynamo.kv-hit-rate.{number}.bin"));
        let envelope = wire::decode_envelope(&bytes).unwrap();
        let event = wire::decode_hit_rate_msgpack("dynamo".into(), envelope.payload).unwrap();
        assert_eq!(wire::encode_hit_rate_msgpack(event.worker, Rank(0), event.blocks), envelope.payload);
        (event.blocks.isl, event.blocks.overlap)
    };
    assert_eq!((1..=5).map(event).collect::<Vec<_>>(), [(7, 0), (7, 6), (6, 6), (1, 0), (32, 15)]);
}

#[test]
fn json_load_events_are_read_to_the_digit_and_encoded_as_the_releases_do() {
    for (release, id, active_blocks) in [("0.5.1", "6d8ea20d96053709", 77), ("0.7.1", "6d8ea20d96053724", 78)] {
        let json = captured(release, "event.namespace.dynamo.kv_metrics.1.json");
        let (worker, report) = wire::decode_load_event(&json).unwrap();
        let report = report.unwrap();
        assert_eq!(format!("{worker:x}"), id, "{release}");
        assert_eq!(report.load, load(58, 100, (active_blocks, 100), 3, (0.77, 0.25)), "{release}");
        assert_eq!(wire::encode_load_event(worker, &report), json, "{release}");
    }
    let json = captured("0.8.1", "event.namespace.dynamo.kv_metrics.1.json");
    let event = wire::decode_active_load_json(&json).unwrap().unwrap();
    assert_eq!(event.blocks, ActiveBlocks::Used(Some(77)));
    assert_eq!(wire::encode_active_load_json(&event), json);
}

/// A captured load event: its sequence, whether worker and publisher are one, and what is said.
type Said = (u64, bool, ActiveBlocks);

/// Reads a captured envelope, and sees that encoding it again gives the captured bytes.
fn load_event(release: &str, bytes: &[u8]) -> Said {
    let envelope = wire::decode_envelope(bytes).unwrap();
    assert_eq!(wire::encode_envelope(&envelope), bytes, "{release}");
    said(release, &envelope)
}

fn said(release: &str, envelope: &Envelope<'_>) -> Said {
    assert_eq!(envelope.topic, "kv_metrics", "{release}");
    assert!((1_795_000_000_000..1_796_000_000_000).contains(&envelope.published_at), "{release}: {envelope:?}");
    let ActiveLoad { worker: WorkerId(worker), rank, blocks } =
        wire::decode_active_load(envelope.publisher, envelope.payload).unwrap();
    assert_eq!(rank, Rank(0), "{release}");
    (envelope.sequence, worker == envelope.publisher, blocks)
}

#[test]
fn load_events_of_every_release_over_nats_are_read_to_the_digit() {
    let events = |release: &str, subject: &str, count: u32| {
        let event =
            |number| load_event(release, &captured(release, &format!("event.{subject}.kv_metrics.{number}.bin")));
        (1..=count).map(event).collect::<Vec<_>>()
    };
    let used = |blocks| ActiveBlocks::Used(Some(blocks));
    let estimated = |blocks, tokens| {
        ActiveBlocks::Estimated(Estimate { decode_blocks: Some(blocks), prefill_tokens: Some(tokens) })
    };
    assert_eq!(events("0.9.1", "namespace.dynamo", 2), [(6, true, used(77)), (7, true, used(78))]);
    for release in ["0.9.1-cluster", "1.0.2-cluster", "1.1.1-cluster"] {
        let routed =
            [(0, false, estimated(6, 100)), (0, true, used(7)), (2, false, estimated(0, 0)), (1, true, used(0))];
        assert_eq!(events(release, "namespace.dynamo", 4), routed, "{release}");
    }
    let subject = "namespace.dynamo.component.backend.endpoint.generate";
    assert_eq!(events("1.6.1-fpm", subject, 2), [(9, false, used(210)), (10, false, used(211))]);
}

#[test]
fn load_events_of_every_release_over_zmq_are_read_to_the_digit() {
    let events = |release: &str, count: u32| {
        let event = |number| {
            let part = |part| captured(release, &format!("zmq.kv_metrics.{number}.part{part}.bin"));
            let parts = [0, 1, 2, 3].map(part);
            let envelope = wire::decode_frames(&parts.each_ref().map(Vec::as_slice)).unwrap();
            assert_eq!(wire::encode_frames(&envelope), parts, "{release}");
            said(release, &envelope)
        };
        (1..=count).map(event).collect::<Vec<_>>()
    };
    let used = |blocks| ActiveBlocks::Used(Some(blocks));
    let estimated = |blocks, tokens| {
        ActiveBlocks::Estimated(Estimate { decode_blocks: Some(blocks), prefill_tokens: Some(tokens) })
    };
    assert_eq!(events("1.2.1-zmq", 1), [(5, true, used(78))]);
    let routed = [(0, false, estimated(6, 100)), (0, false, used(7)), (2, false, estimated(0, 0)), (1, false, used(0))];
    assert_eq!(events("1.3.1-cluster", 4), routed);
    assert_eq!(events("1.6.1-cluster", 2), [(0, false, used(0)), (1, false, used(7))]);
    assert_eq!(events("1.6.1-zmq", 1), [(6, false, used(77))]);
}

#[test]
fn payloads_are_encoded_as_the_releases_do() {
    let of_clusters = [
        ("0.9.1-cluster", ActiveLoadForm::Decode),
        ("1.0.2-cluster", ActiveLoadForm::Decode),
        ("1.1.1-cluster", ActiveLoadForm::Used),
    ];
    let of_clusters =
        of_clusters.into_iter().flat_map(|(release, form)| (1..=4).map(move |number| (release, number, form)));
    for (release, number, form) in of_clusters.chain([("0.9.1", 1, ActiveLoadForm::Decode)]) {
        let envelope = captured(release, &format!("event.namespace.dynamo.kv_metrics.{number}.bin"));
        let Envelope { publisher, payload, .. } = wire::decode_envelope(&envelope).unwrap();
        let load = wire::decode_active_load(publisher, payload).unwrap();
        assert_eq!(wire::encode_active_load(&load, form), payload, "{release}");
    }
    let parts = [0, 1, 2, 3].map(|part| captured("1.6.1-cluster", &format!("zmq.kv_metrics.2.part{part}.bin")));
    let envelope = wire::decode_frames(&parts.each_ref().map(Vec::as_slice)).unwrap();
    let load = wire::decode_active_load(envelope.publisher, envelope.payload).unwrap();
    assert_eq!(wire::encode_active_load(&load, ActiveLoadForm::Used), envelope.payload);
}

/// Count, whether it is a heartbeat, prefill tokens, decode requests and their tokens in the cache.
type PassSaid = (u64, bool, u64, u64, u64);

fn pass_said(release: &str, envelope: &Envelope<'_>) -> PassSaid {
    assert_eq!(envelope.topic, "forward-pass-metrics", "{release}");
    let event = wire::decode_forward_pass(None, envelope.payload).unwrap();
    assert_eq!(wire::encode_forward_pass(&event), envelope.payload, "{release}");
    let pass = event.pass;
    let scheduled = pass.scheduled;
    let tokens = (scheduled.prefill_tokens, scheduled.decode_requests, scheduled.decode_kv_tokens);
    (pass.counter, pass.wall_time == 0.0, tokens.0, tokens.1, tokens.2)
}

#[test]
fn forward_passes_of_both_transports_are_read_to_the_digit() {
    let nats = (1..=3).map(|number| {
        let file = format!("event.namespace.dynamo.component.backend.forward-pass-metrics.{number}.bin");
        let bytes = captured("1.1.1-cluster", &file);
        pass_said("1.1.1", &wire::decode_envelope(&bytes).unwrap())
    });
    let passes = [(1, true, 0, 0, 0), (3, false, 100, 0, 0), (4, false, 0, 1, 101)];
    assert_eq!(nats.collect::<Vec<_>>(), passes);
    for release in ["1.3.1-cluster", "1.6.1-cluster"] {
        let zmq = (1..=3).map(|number| {
            let part = |part| captured(release, &format!("zmq.forward-pass-metrics.{number}.part{part}.bin"));
            let parts = [0, 1, 2, 3].map(part);
            pass_said(release, &wire::decode_frames(&parts.each_ref().map(Vec::as_slice)).unwrap())
        });
        assert_eq!(zmq.collect::<Vec<_>>(), passes, "{release}");
    }
}

/// The payload of a captured event of a router.
fn sequences(release: &str, number: u32) -> Vec<u8> {
    let over_zmq = ["1.3.1-cluster", "1.6.1-cluster", "1.6.1-cluster-disagg"].contains(&release);
    if over_zmq {
        let part = |part| captured(release, &format!("zmq.active_sequences_events.{number}.part{part}.bin"));
        let parts = [0, 1, 2, 3].map(part);
        wire::decode_frames(&parts.each_ref().map(Vec::as_slice)).unwrap().payload.to_vec()
    } else {
        let file = format!("event.namespace.dynamo.component.backend.active_sequences_events.{number}.bin");
        wire::decode_envelope(&captured(release, &file)).unwrap().payload.to_vec()
    }
}

fn steps(release: &str, number: u32) -> Vec<Step> {
    let payload = sequences(release, number);
    wire::decode_sequences(&payload).unwrap().into_iter().map(|routing| routing.step).collect()
}

/// The hashes of the prompt of 100 tokens that every release was asked first.
const HASHES: [u64; 6] = [
    16_296_688_345_549_491_209,
    17_954_117_704_268_810_723,
    509_843_240_101_680_469,
    8_169_839_437_751_795_074,
    6_937_544_043_670_825_564,
    13_191_782_228_492_439_024,
];
const FIRST: SequenceChange<'_> =
    SequenceChange::Added(PlacedPrompt { hashes: &HASHES, isl_tokens: 100, overlap_blocks: 0, effective_tokens: 100 });

fn encoded(router: u64, request: &str, worker: u64, changes: &[SequenceChange<'_>], form: SequencesForm) -> Vec<u8> {
    let (worker, rank) = (WorkerId(worker), Rank(0));
    let steps: Vec<_> = changes.iter().map(|change| SequenceStep { request, worker, rank, change: *change }).collect();
    let mut messages = wire::encode_sequences(router, &steps, form);
    assert_eq!(messages.len(), 1);
    messages.remove(0)
}

#[test]
fn the_book_keeping_of_routers_is_encoded_as_the_releases_do() {
    let request = "4d5bbd12-6c0c-4712-9c64-ad8f1dd8297f";
    let (worker, form) = (4_390_624_877_098_363_917, SequencesForm::WorkerId);
    for (number, change) in [(1, FIRST), (2, SequenceChange::Prefilled), (3, SequenceChange::Freed)] {
        let file = format!("event.namespace.dynamo.component.backend.active_sequences_events.{number}.json");
        let json = String::from_utf8(captured("0.5.1-cluster", &file)).unwrap();
        let ours = String::from_utf8(encoded(7, request, worker, &[change], form)).unwrap();
        assert_eq!(ours.replace(&wire::uuid(7), "2fa80213-b18a-4738-a245-cb374f10a158"), json);
    }
    let json = captured("0.7.1-cluster", "event.namespace.dynamo.component.backend.active_sequences_events.1.json");
    let request = "4143107c-a73a-49a1-ba1f-733583b41e9f";
    let ours = encoded(7, request, 4_390_624_876_968_567_817, &[FIRST], SequencesForm::Worker);
    let ours = String::from_utf8(ours).unwrap().replace(&wire::uuid(7), "1d88fe24-8606-4a9f-8700-707e5476bf81");
    assert_eq!(ours, String::from_utf8(json).unwrap());

    let bytes = captured("0.9.1-cluster", "event.namespace.dynamo.component.backend.active_sequences_events.1.bin");
    let (router, worker) = (4_390_624_876_396_408_331, 4_390_624_876_396_408_339);
    let ours = encoded(router, "4a4f99cd-43fa-4b98-a376-377928819d87", worker, &[FIRST], SequencesForm::Overlap);
    assert_eq!(ours, wire::decode_envelope(&bytes).unwrap().payload);

    let (router, form) = (4_390_624_876_405_855_243, SequencesForm::Hints);
    let ours = encoded(router, "adf3b952-570d-4588-b685-cfceccc07732", 4_390_624_876_405_855_249, &[FIRST], form);
    assert_eq!(ours, sequences("1.6.1-cluster", 1));
    let ended = [SequenceChange::Prefilled, SequenceChange::Freed];
    let ours = encoded(router, "2422b319-2f2b-4e2c-85de-e32f0694097b", 4_390_624_876_405_855_249, &ended, form);
    assert_eq!(ours, sequences("1.6.1-cluster", 9));
    // A prompt that is cached altogether.
    let hashes = [
        3_528_189_302_795_743_834,
        10_043_067_394_374_648_011,
        9_478_739_974_067_796_281,
        7_201_119_248_650_779_048,
        18_135_947_097_353_319_340,
        14_047_707_395_004_723_369,
    ];
    let cached =
        SequenceChange::Added(PlacedPrompt { hashes: &hashes, isl_tokens: 96, overlap_blocks: 6, effective_tokens: 0 });
    let ours = encoded(router, "1d6b0a92-3db4-4872-b4ec-943186157458", 4_390_624_876_405_855_246, &[cached], form);
    assert_eq!(ours, sequences("1.6.1-cluster", 6));
}

fn placed(full_blocks: Option<u32>, cached: Cached) -> Vec<Step> {
    vec![Step::Placed(Prompt { full_blocks, cached })]
}

#[test]
fn the_book_keeping_of_routers_is_read_to_the_digit() {
    let effective = |tokens| Cached::Effective { tokens };
    let overlap = |isl_tokens, blocks| Cached::Overlap { isl_tokens, blocks };
    // Prompts of 100, 100, 96, 10 and 500 tokens, of which 0, 6, 6, 0 and 15 blocks of 16 are cached.
    let today = [(1, 6, 100), (5, 6, 4), (6, 6, 0), (7, 0, 10), (8, 31, 260)];
    for (number, full_blocks, tokens) in today {
        assert_eq!(steps("1.6.1-cluster", number), placed(Some(full_blocks), effective(tokens)), "{number}");
    }
    for number in [2, 3] {
        assert_eq!(steps("1.6.1-cluster", number), [Step::Prefilled], "{number}");
        assert_eq!(steps("1.3.1-cluster", 2), [Step::Prefilled]);
    }
    assert_eq!(steps("1.6.1-cluster", 9), [Step::Prefilled, Step::Freed]);
    assert_eq!(steps("1.6.1-cluster", 10).len(), 4);
    assert_eq!(steps("1.3.1-cluster", 1), placed(Some(6), effective(100)));
    assert_eq!(steps("1.3.1-cluster", 3), [Step::Freed]);
    for (number, full_blocks, isl, cached) in [(1, 6, 100, 0), (4, 6, 100, 6), (5, 6, 96, 6), (6, 0, 10, 0)] {
        assert_eq!(steps("1.1.1-cluster", number), placed(Some(full_blocks), overlap(isl, cached)), "{number}");
    }
    assert_eq!(steps("0.9.1-cluster", 1), placed(None, Cached::InEventOfItsOwn));
}

#[test]
fn the_two_halves_of_a_disaggregated_placement_are_read() {
    let half = |number| steps("1.6.1-cluster-disagg", number);
    assert_eq!(half(1), placed(None, Cached::Effective { tokens: 4 }));
    assert_eq!(half(2), [Step::Prefilled, Step::Freed]);
    assert_eq!(half(3), placed(Some(6), Cached::Untracked));
    assert_eq!(half(6), placed(None, Cached::Effective { tokens: 0 }), "fully cached");
    let request = |number: u32| {
        let part =
            |part| captured("1.6.1-cluster-disagg", &format!("zmq.active_sequences_events.{number}.part{part}.bin"));
        let parts = [0, 1, 2, 3].map(part);
        let envelope = wire::decode_frames(&parts.each_ref().map(Vec::as_slice)).unwrap();
        wire::decode_sequences(envelope.payload).unwrap()[0].request
    };
    assert_eq!(request(1), request(3), "one request");
    assert_ne!(request(1), request(6));
}

#[test]
fn what_a_worker_of_0_4_registers_is_read() {
    let keys: serde_json::Value = serde_json::from_slice(&captured("0.4.1-etcd", "keys.json")).unwrap();
    let lease: u64 = keys["worker_id"].as_str().unwrap().parse().unwrap();
    let read = |entry: &serde_json::Value| {
        assert_eq!(entry["lease_is_worker_id"], true);
        let path = format!("{}/{lease:x}", entry["key"].as_str().unwrap());
        wire::decode_registration(&path, entry["value"].as_str().unwrap().as_bytes()).unwrap().unwrap()
    };
    let worker = |endpoint: &str| WorkerKey {
        namespace: "dynamo".into(),
        component: "backend".into(),
        endpoint: endpoint.into(),
        id: WorkerId(lease),
    };
    let card = Card {
        model: "tiny/model".into(),
        role: None,
        block_size: None,
        limits: Limits { blocks: Some(4096), slots: Some(64), batch_tokens: Some(8192) },
        ranks: Ranks { first: None, count: 1 },
    };
    let registered: Vec<_> = keys["keys"].as_array().unwrap().iter().map(read).collect();
    let expected = [
        Registered::Card(worker("generate"), Box::new(card)),
        Registered::Instance(worker("generate")),
        Registered::Instance(worker("load_metrics")),
    ];
    assert_eq!(registered, expected);
}

#[test]
fn the_json_of_old_routers_is_read() {
    let step = |release: &str, number: u32| {
        let file = format!("event.namespace.dynamo.component.backend.active_sequences_events.{number}.json");
        wire::decode_sequences_json(&captured(release, &file)).unwrap().step
    };
    let told_elsewhere = Step::Placed(Prompt { full_blocks: None, cached: Cached::InEventOfItsOwn });
    assert_eq!([1, 2, 3].map(|number| step("0.5.1-cluster", number)), [told_elsewhere, Step::Prefilled, Step::Freed]);
    assert_eq!(step("0.7.1-cluster", 1), told_elsewhere);
}

/// What an envelope carries, by its topic.
fn read_payload(envelope: &Envelope<'_>) -> Result<(), wire::Malformed> {
    match envelope.topic {
        "kv_metrics" => wire::decode_active_load(envelope.publisher, envelope.payload).map(drop),
        "forward-pass-metrics" => wire::decode_forward_pass(None, envelope.payload).map(drop),
        "active_sequences_events" => wire::decode_sequences(envelope.payload).map(drop),
        "kv-hit-rate" => wire::decode_hit_rate_msgpack("dynamo".into(), envelope.payload).map(drop),
        other => panic!("topic {other}"),
    }
}

fn read_json_event(topic: &str, json: &[u8]) -> Result<(), wire::Malformed> {
    match topic {
        "kv_metrics" if wire::decode_active_load_json(json)?.is_some() => Ok(()),
        "kv_metrics" => wire::decode_load_event(json).map(drop),
        "active_sequences_events" => wire::decode_sequences_json(json).map(drop),
        "kv-hit-rate" => wire::decode_hit_rate("dynamo".into(), json).map(drop),
        other => panic!("topic {other}"),
    }
}

fn read_stats(json: &[u8]) -> Result<(), wire::Malformed> {
    for data in wire::decode_stats(json)?.endpoints.iter().filter_map(|endpoint| endpoint.data) {
        wire::decode_load(data.get().as_bytes())?;
    }
    Ok(())
}

/// Every key of an etcd. Those of 0.4 and 0.5 do not say whose they are; their lease does.
fn read_keys(json: &[u8]) -> Result<(), wire::Malformed> {
    let keys: serde_json::Value = serde_json::from_slice(json).unwrap();
    for entry in keys["keys"].as_array().unwrap() {
        let [key, value] = ["key", "value"].map(|field| entry[field].as_str().unwrap());
        let path = if key.starts_with("v1/") { key.to_owned() } else { format!("{key}/1f") };
        wire::decode_registration(&path, value.as_bytes())?;
    }
    Ok(())
}

/// Reads a file by its name; `None` of the later parts of a message, which are read with its first, and of what is read
/// elsewhere.
fn read(release: &str, file: &str) -> Option<Result<(), wire::Malformed>> {
    let bytes = captured(release, file);
    let parts: Vec<_> = file.split('.').collect();
    match parts[..] {
        ["stats", _, "json"] => Some(read_stats(&bytes)),
        ["info", _, "json"] => Some(wire::decode_info(&bytes).map(drop)),
        ["keys", "json"] => Some(read_keys(&bytes)),
        ["event", .., topic, _, "json"] => Some(read_json_event(topic, &bytes)),
        ["event", .., "bin"] => Some(wire::decode_envelope(&bytes).and_then(|envelope| read_payload(&envelope))),
        ["zmq", topic, number, "part0", "bin"] => {
            let parts = [0, 1, 2, 3].map(|part| captured(release, &format!("zmq.{topic}.{number}.part{part}.bin")));
            let envelope = wire::decode_frames(&parts.each_ref().map(Vec::as_slice));
            Some(envelope.and_then(|envelope| read_payload(&envelope)))
        }
        ["zmq", ..] | ["files", "json"] => None,
        _ => panic!("what is {file}?"),
    }
}

#[test]
fn nothing_that_was_captured_is_refused() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut messages = 0;
    for release in fs::read_dir(fixtures).unwrap().map(Result::unwrap) {
        let name = release.file_name().into_string().unwrap();
        if !name.starts_with(|first: char| first.is_ascii_digit()) {
            continue;
        }
        for file in fs::read_dir(release.path()).unwrap() {
            let file = file.unwrap().file_name().into_string().unwrap();
            if let Some(read) = read(&name, &file) {
                read.unwrap_or_else(|error| panic!("{name}/{file}: {error}"));
                messages += 1;
            }
        }
    }
    assert!(messages > 150, "{messages}");
}
