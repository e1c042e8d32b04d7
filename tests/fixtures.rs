//! Bytes captured from real Dynamo releases talking to a real nats-server, decoded. Each folder is a release.

use std::path::PathBuf;

use dynamo_metrics::fleet::{HitBlocks, Load, Rank};
use dynamo_metrics::target::{Target, parse_endpoint_subject};
use dynamo_metrics::wire;

fn captured(release: &str, file: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(release).join(file);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

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
fn releases_that_report_by_event_alone_still_say_that_they_are_there() {
    assert_eq!(stats("0.7.1", "stats.1.json"), [("generate".to_owned(), "6d8ea20d96053724".to_owned(), None)]);
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
fn hit_rate_events_of_every_json_release_are_read() {
    let event = |release: &str, number: u32| {
        let file = format!("event.namespace.dynamo.kv-hit-rate.{number}.json");
        let event = wire::decode_hit_rate("dynamo".into(), &captured(release, &file)).unwrap();
        (format!("{:x}", event.worker), event.blocks)
    };
    assert_eq!(event("0.1.1", 1), ("6d8ea20d960536f0".to_owned(), HitBlocks { isl: 1, overlap: 0 }));
    assert_eq!(event("0.5.1", 1), ("6d8ea20d96053709".to_owned(), HitBlocks { isl: 40, overlap: 0 }));
    assert_eq!(event("0.7.1", 1), ("6d8ea20d96053724".to_owned(), HitBlocks { isl: 40, overlap: 0 }));
    let routed = (1..=5).map(|number| event("0.5.1-cluster", number).1);
    let blocks = [(7, 0), (7, 6), (6, 6), (1, 0), (32, 15)].map(|(isl, overlap)| HitBlocks { isl, overlap });
    assert_eq!(routed.collect::<Vec<_>>(), blocks);
}
