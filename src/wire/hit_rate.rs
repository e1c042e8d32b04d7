//! `KvHitRateEvent`, published by KV routers for each routed request (JSON in Dynamo 0.1 - 0.8, in the
//! envelope in 0.9).

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Number;

use super::msgpack::{Reader, Writer, found, put};
use super::{Malformed, from_json, out_of_range, worker_id};
use crate::fleet::{HitBlocks, HitRate, Rank, Reason, WorkerId};

const WHAT: &str = "KvHitRateEvent";

/// Decodes an event heard in `namespace`. The rank that 0.6 - 0.8 add is not kept: the counters are by worker.
///
/// # Errors
/// No such JSON, a number that its quantity cannot have, or more overlap than prompt.
pub fn decode_hit_rate(namespace: Arc<str>, json: &[u8]) -> Result<HitRate, Malformed> {
    #[derive(Deserialize)]
    struct Wire {
        worker_id: Number,
        isl_blocks: Number,
        overlap_blocks: Number,
    }
    let wire: Wire = from_json(WHAT, json)?;
    let blocks = |field, number: &Number| {
        number.as_u64().ok_or_else(|| out_of_range(WHAT, field, number)).and_then(|number| blocks(field, number))
    };
    let (isl, overlap) = (blocks("isl_blocks", &wire.isl_blocks)?, blocks("overlap_blocks", &wire.overlap_blocks)?);
    placed(namespace, worker_id(WHAT, &wire.worker_id)?, isl, overlap)
}

/// Decodes the payload of an event in its envelope, heard in `namespace`.
///
/// # Errors
/// No such map, a number that its quantity cannot have, or more overlap than prompt.
pub fn decode_hit_rate_msgpack(namespace: Arc<str>, payload: &[u8]) -> Result<HitRate, Malformed> {
    let (mut worker, mut isl, mut overlap) = (None, None, None);
    Reader::new(WHAT, payload)?.only_map(|value, name| match name {
        "worker_id" => put(WHAT, name, &mut worker, value.unsigned(name)?),
        "isl_blocks" => put(WHAT, name, &mut isl, blocks(name, value.unsigned(name)?)?),
        "overlap_blocks" => put(WHAT, name, &mut overlap, blocks(name, value.unsigned(name)?)?),
        _ => Ok(false),
    })?;
    let worker = WorkerId(found(WHAT, "worker_id", worker)?);
    placed(namespace, worker, found(WHAT, "isl_blocks", isl)?, found(WHAT, "overlap_blocks", overlap)?)
}

fn placed(namespace: Arc<str>, worker: WorkerId, isl: u32, overlap: u32) -> Result<HitRate, Malformed> {
    if overlap > isl {
        let detail = format!("overlap_blocks is {overlap}, isl_blocks {isl}");
        return Err(Malformed { what: WHAT, reason: Reason::OverlapExceedsIsl, detail });
    }
    Ok(HitRate { namespace, worker, blocks: HitBlocks { isl, overlap } })
}

/// A prompt of 2^32 blocks does not exist.
fn blocks(field: &str, number: u64) -> Result<u32, Malformed> {
    u32::try_from(number).map_err(|_| out_of_range(WHAT, field, &number))
}

/// Encodes an event as 0.1 - 0.5 do, or with a rank as 0.6 - 0.8 do, to the byte.
#[must_use]
pub fn encode_hit_rate(worker: WorkerId, rank: Option<Rank>, blocks: HitBlocks) -> Vec<u8> {
    let HitBlocks { isl, overlap } = blocks;
    let rank = rank.map(|rank| format!(r#""dp_rank":{},"#, rank.0)).unwrap_or_default();
    format!(r#"{{"worker_id":{worker},{rank}"isl_blocks":{isl},"overlap_blocks":{overlap}}}"#).into_bytes()
}

/// Encodes the payload of an event as 0.9 does, to the byte.
#[must_use]
pub fn encode_hit_rate_msgpack(worker: WorkerId, rank: Rank, blocks: HitBlocks) -> Vec<u8> {
    Writer::map(4)
        .unsigned("worker_id", worker.0)
        .unsigned("dp_rank", rank.0.into())
        .unsigned("isl_blocks", blocks.isl.into())
        .unsigned("overlap_blocks", blocks.overlap.into())
        .0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(json: &[u8]) -> Result<HitRate, Malformed> {
        decode_hit_rate("dynamo".into(), json)
    }

    #[test]
    fn events_of_every_json_release_are_read() {
        for json in [
            r#"{"worker_id":7894425376062256880,"isl_blocks":40,"overlap_blocks":8}"#,
            r#"{"worker_id":7894425376062256880,"dp_rank":1,"isl_blocks":40,"overlap_blocks":8,"new":{}}"#,
        ] {
            let event = decode(json.as_bytes()).unwrap();
            assert_eq!(event.worker, WorkerId(7_894_425_376_062_256_880));
            assert_eq!(event.blocks, HitBlocks { isl: 40, overlap: 8 });
        }
    }

    #[test]
    fn a_negative_worker_id_is_the_same_bits_unsigned() {
        assert_eq!(
            decode(br#"{"worker_id":-1,"isl_blocks":0,"overlap_blocks":0}"#).unwrap().worker,
            WorkerId(u64::MAX)
        );
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_reason() {
        for (json, reason) in [
            (r#"{"worker_id":1,"isl_blocks":1,"overlap_blocks":2}"#, Reason::OverlapExceedsIsl),
            (r#"{"worker_id":1,"isl_blocks":-1,"overlap_blocks":0}"#, Reason::OutOfRange),
            (r#"{"worker_id":1,"isl_blocks":4294967296,"overlap_blocks":0}"#, Reason::OutOfRange),
            (r#"{"worker_id":1.5,"isl_blocks":1,"overlap_blocks":0}"#, Reason::OutOfRange),
            (r#"{"worker_id":1,"overlap_blocks":0}"#, Reason::WrongShape),
            (r#"{"worker_id":1,"#, Reason::Truncated),
            ("", Reason::Truncated),
            ("?", Reason::Malformed),
        ] {
            assert_eq!(decode(json.as_bytes()).unwrap_err().reason, reason, "{json}");
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_alike(
            worker: u64, rank in proptest::option::of(any::<u32>().prop_map(Rank)), isl: u32, overlap: u32,
        ) {
            let blocks = HitBlocks { isl: isl.max(overlap), overlap: isl.min(overlap) };
            let event = decode(&encode_hit_rate(WorkerId(worker), rank, blocks)).unwrap();
            prop_assert_eq!((event.worker, event.blocks), (WorkerId(worker), blocks));
            let payload = encode_hit_rate_msgpack(WorkerId(worker), rank.unwrap_or_default(), blocks);
            prop_assert_eq!(decode_hit_rate_msgpack("dynamo".into(), &payload), Ok(event));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
            let _ = decode_hit_rate_msgpack("dynamo".into(), &bytes);
        }
    }
}
