//! The load in a `kv_metrics` event of Dynamo 0.9 and later.
//!
//! Workers and routers publish under one name. A worker says what it has; a router says what it believes of a worker, and
//! each router believes something else.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Number;

use super::msgpack::{Reader, Writer, found, put};
use super::{Malformed, count, count_of, from_json, out_of_range, worker_id};
use crate::fleet::{Estimate, Rank, WorkerId};

const WHAT: &str = "kv_metrics event";

/// The load of one rank of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ActiveLoad {
    /// The worker.
    pub worker: WorkerId,
    /// The rank; 0 where the worker has none.
    pub rank: Rank,
    /// Who says it, and what.
    pub blocks: ActiveBlocks,
}

/// KV-cache blocks in use. `None` where the message leaves it open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActiveBlocks {
    /// By the worker itself.
    Used(Option<u64>),
    /// By a router's book-keeping of what it sent there: nothing that the worker says of itself.
    Estimated(Estimate),
}

/// Decodes the JSON event of 0.8, which no envelope numbers. `None` for the other JSON event on its subject (0.4 - 0.7).
///
/// A worker leaves `active_prefill_tokens` open, a router does not.
///
/// # Errors
/// No such JSON, or a number that its quantity cannot have.
pub fn decode_active_load_json(json: &[u8]) -> Result<Option<ActiveLoad>, Malformed> {
    #[derive(Deserialize)]
    struct Wire {
        worker_id: Option<Number>,
        data: Option<IgnoredAny>,
        dp_rank: Option<u32>,
        active_decode_blocks: Option<Number>,
        active_prefill_tokens: Option<Number>,
    }
    let wire: Wire = from_json(WHAT, json)?;
    if wire.data.is_some() {
        return Ok(None);
    }
    let worker = worker_id(WHAT, &found(WHAT, "worker_id", wire.worker_id)?)?;
    let optional = |field, number: Option<Number>| number.map(|number| count(WHAT, field, &number)).transpose();
    let decode_blocks = optional("active_decode_blocks", wire.active_decode_blocks)?;
    let prefill_tokens = optional("active_prefill_tokens", wire.active_prefill_tokens)?;
    let blocks = match prefill_tokens {
        None => ActiveBlocks::Used(decode_blocks),
        Some(_) => ActiveBlocks::Estimated(Estimate { decode_blocks, prefill_tokens }),
    };
    Ok(Some(ActiveLoad { worker, rank: Rank(wire.dp_rank.unwrap_or_default()), blocks }))
}

/// Encodes an event as 0.8 does, to the byte.
#[must_use]
pub fn encode_active_load_json(load: &ActiveLoad) -> Vec<u8> {
    let (blocks, prefill) = match load.blocks {
        ActiveBlocks::Used(blocks) => (blocks, None),
        ActiveBlocks::Estimated(estimate) => (estimate.decode_blocks, estimate.prefill_tokens),
    };
    let number = |number: Option<u64>| number.map_or_else(|| "null".to_owned(), |number| number.to_string());
    format!(
        r#"{{"worker_id":{},"dp_rank":{},"active_decode_blocks":{},"active_prefill_tokens":{}}}"#,
        load.worker,
        load.rank.0,
        number(blocks),
        number(prefill)
    )
    .into_bytes()
}

/// What a release writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActiveLoadForm {
    /// 0.9 and 1.0: `active_decode_blocks` is the worker's own.
    Decode,
    /// 1.1 and later: `kv_used_blocks` is.
    Used,
}

/// Decodes the payload of an event that `publisher` published.
///
/// The message is the worker's own where it has `kv_used_blocks`, which only workers send (1.1 on), or where the publisher
/// is the worker (up to 1.2; later its id is random). Releases without either say nothing of the worker.
///
/// # Errors
/// No such map, or a number that its quantity cannot have.
pub fn decode_active_load(publisher: u64, payload: &[u8]) -> Result<ActiveLoad, Malformed> {
    let (mut worker, mut rank) = (None, None);
    let (mut decode_blocks, mut prefill_tokens, mut used_blocks) = (None, None, None);
    Reader::new(WHAT, payload)?.only_map(|value, name| match name {
        "worker_id" => put(WHAT, name, &mut worker, value.unsigned(name)?),
        "dp_rank" => {
            let number = value.unsigned(name)?;
            let number = u32::try_from(number).map_err(|_| out_of_range(WHAT, name, &number))?;
            put(WHAT, name, &mut rank, number)
        }
        "active_decode_blocks" => put(WHAT, name, &mut decode_blocks, value.optional_unsigned(name)?),
        "active_prefill_tokens" => put(WHAT, name, &mut prefill_tokens, value.optional_unsigned(name)?),
        "kv_used_blocks" => put(WHAT, name, &mut used_blocks, value.optional_unsigned(name)?),
        _ => Ok(false),
    })?;
    let worker = found(WHAT, "worker_id", worker)?;
    let rank = found(WHAT, "dp_rank", rank)?;
    let optional =
        |field, number: Option<Option<u64>>| number.flatten().map(|number| count_of(WHAT, field, number)).transpose();
    let decode_blocks = optional("active_decode_blocks", decode_blocks)?;
    let prefill_tokens = optional("active_prefill_tokens", prefill_tokens)?;
    let used_blocks = optional("kv_used_blocks", used_blocks)?;
    let blocks = if used_blocks.is_some() || publisher == worker {
        ActiveBlocks::Used(used_blocks.or(decode_blocks))
    } else {
        ActiveBlocks::Estimated(Estimate { decode_blocks, prefill_tokens })
    };
    Ok(ActiveLoad { worker: WorkerId(worker), rank: Rank(rank), blocks })
}

/// Encodes a payload as the releases of that form do, to the byte.
#[must_use]
pub fn encode_active_load(load: &ActiveLoad, form: ActiveLoadForm) -> Vec<u8> {
    let (decode, prefill, used) = match (form, load.blocks) {
        (ActiveLoadForm::Used, ActiveBlocks::Used(blocks)) => (None, None, blocks),
        (ActiveLoadForm::Decode, ActiveBlocks::Used(blocks)) => (blocks, None, None),
        (_, ActiveBlocks::Estimated(estimate)) => (estimate.decode_blocks, estimate.prefill_tokens, None),
    };
    let payload = Writer::map(if form == ActiveLoadForm::Used { 5 } else { 4 })
        .unsigned("worker_id", load.worker.0)
        .unsigned("dp_rank", load.rank.0.into())
        .optional_unsigned("active_decode_blocks", decode)
        .optional_unsigned("active_prefill_tokens", prefill);
    match form {
        ActiveLoadForm::Decode => payload.0,
        ActiveLoadForm::Used => payload.optional_unsigned("kv_used_blocks", used).0,
    }
}

#[cfg(test)]
mod json_tests {
    use super::*;

    #[test]
    fn the_json_of_0_8_is_the_workers_own_where_it_leaves_the_prefill_open() {
        let decode = |json: &str| decode_active_load_json(json.as_bytes());
        // Captured from 0.8.1.
        let own =
            r#"{"worker_id":7894425376062256948,"dp_rank":0,"active_decode_blocks":77,"active_prefill_tokens":null}"#;
        let load = decode(own).unwrap().unwrap();
        assert_eq!((load.worker.0, load.blocks), (7_894_425_376_062_256_948, ActiveBlocks::Used(Some(77))));
        let router = own.replace("null", "512");
        let estimate = Estimate { decode_blocks: Some(77), prefill_tokens: Some(512) };
        assert_eq!(decode(&router).unwrap().unwrap().blocks, ActiveBlocks::Estimated(estimate));
        assert_eq!(decode(r#"{"worker_id":1,"data":{"kv_stats":{}}}"#), Ok(None), "0.4 - 0.7");
        assert!(decode(r#"{"dp_rank":0}"#).is_err());
        assert!(decode(&own.replace("77", "-1")).is_err());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fleet::Reason;

    const WORKER: u64 = 7;

    fn load(blocks: ActiveBlocks) -> ActiveLoad {
        ActiveLoad { worker: WorkerId(WORKER), rank: Rank(1), blocks }
    }

    #[test]
    fn a_routers_estimate_is_never_the_workers_own() {
        let estimate = Estimate { decode_blocks: Some(6), prefill_tokens: Some(100) };
        let estimate = load(ActiveBlocks::Estimated(estimate));
        for form in [ActiveLoadForm::Decode, ActiveLoadForm::Used] {
            assert_eq!(decode_active_load(8, &encode_active_load(&estimate, form)), Ok(estimate));
        }
    }

    #[test]
    fn used_blocks_win_over_decode_blocks() {
        let payload = Writer::map(4)
            .unsigned("worker_id", WORKER)
            .unsigned("dp_rank", 1)
            .unsigned("active_decode_blocks", 110)
            .unsigned("kv_used_blocks", 210)
            .0;
        for publisher in [WORKER, 8] {
            assert_eq!(decode_active_load(publisher, &payload), Ok(load(ActiveBlocks::Used(Some(210)))));
        }
    }

    #[test]
    fn a_worker_that_says_nothing_of_its_blocks_is_heard_all_the_same() {
        let silent = load(ActiveBlocks::Used(None));
        assert_eq!(decode_active_load(WORKER, &encode_active_load(&silent, ActiveLoadForm::Decode)), Ok(silent));
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_reason() {
        let worker = || Writer::map(3).unsigned("worker_id", WORKER);
        for (payload, reason) in [
            (worker().unsigned("dp_rank", 1 << 32).0, Reason::OutOfRange),
            (worker().unsigned("dp_rank", 0).unsigned("kv_used_blocks", 1 << 63).0, Reason::OutOfRange),
            (worker().unsigned("dp_rank", 0).unsigned("active_decode_blocks", u64::MAX).0, Reason::OutOfRange),
            (worker().unsigned("dp_rank", 0).string("kv_used_blocks", "7").0, Reason::WrongShape),
            (worker().unsigned("dp_rank", 0).unsigned("dp_rank", 0).0, Reason::WrongShape),
            (Writer::map(1).unsigned("worker_id", WORKER).0, Reason::WrongShape),
            (Writer::map(1).unsigned("dp_rank", 0).0, Reason::WrongShape),
            (Writer::map(0).0, Reason::WrongShape),
        ] {
            let error = decode_active_load(WORKER, &payload).unwrap_err();
            assert_eq!(error.reason, reason, "{error}");
        }
    }

    #[test]
    fn every_part_of_a_payload_is_refused_as_truncated() {
        let bytes = encode_active_load(&load(ActiveBlocks::Used(Some(300))), ActiveLoadForm::Used);
        for length in 0..bytes.len() {
            let error = decode_active_load(WORKER, &bytes[..length]).unwrap_err();
            assert_eq!(error.reason, Reason::Truncated, "{length}");
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_alike(
            worker: u64, rank: u32, blocks in proptest::option::of(0..=i64::MAX as u64),
            prefill_tokens in proptest::option::of(0..=i64::MAX as u64), used: bool,
        ) {
            let form = if used { ActiveLoadForm::Used } else { ActiveLoadForm::Decode };
            let own = ActiveLoad { worker: WorkerId(worker), rank: Rank(rank), blocks: ActiveBlocks::Used(blocks) };
            prop_assert_eq!(decode_active_load(worker, &encode_active_load(&own, form)), Ok(own));
            let estimate = Estimate { decode_blocks: blocks, prefill_tokens };
            let estimate = ActiveLoad { blocks: ActiveBlocks::Estimated(estimate), ..own };
            let router = worker.wrapping_add(1);
            prop_assert_eq!(decode_active_load(router, &encode_active_load(&estimate, form)), Ok(estimate));
            // JSON tells a router by its prefill tokens.
            for load in [Some(own), prefill_tokens.map(|_| estimate)].into_iter().flatten() {
                prop_assert_eq!(decode_active_load_json(&encode_active_load_json(&load)), Ok(Some(load)));
            }
        }

        #[test]
        fn no_changed_byte_makes_it_panic(at: prop::sample::Index, byte: u8) {
            let mut bytes = encode_active_load(&load(ActiveBlocks::Used(Some(300))), ActiveLoadForm::Used);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = decode_active_load(WORKER, &bytes);
        }
    }
}
