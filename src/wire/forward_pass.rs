//! `ForwardPassMetrics` of Dynamo 1.1 and later: what one pass of an engine computed, and what waited meanwhile.

use super::msgpack::{Reader, Writer, found, put};
use super::{Malformed, out_of_range};
use crate::fleet::{Pass, Queued, Rank, Reason, Scheduled, WorkerId};

const WHAT: &str = "forward-pass-metrics event";
const VERSION: u64 = 1;

/// One pass of one rank of a worker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ForwardPass {
    /// The worker.
    pub worker: WorkerId,
    /// The rank; 0 where the worker has none.
    pub rank: Rank,
    /// The pass.
    pub pass: Pass,
}

/// Decodes the payload of an event. The variances in it are passed over.
///
/// An engine of vLLM that was restored from a snapshot has an empty `worker_id` (1.6): its passes are those of `owner`, the
/// worker whose channel discovery says it is.
///
/// # Errors
/// No such map, another version of it, or a number that its quantity cannot have: counts are not negative, and a time is
/// a finite one. An empty `worker_id` where the owner is not known.
pub fn decode_forward_pass(owner: Option<WorkerId>, payload: &[u8]) -> Result<ForwardPass, Malformed> {
    let (mut version, mut worker, mut rank, mut counter, mut wall_time) = (None, None, None, None, None);
    let (mut scheduled, mut queued) = (None, None);
    Reader::new(WHAT, payload)?.only_map(|value, name| match name {
        "version" => put(WHAT, name, &mut version, value.unsigned(name)?),
        "worker_id" => put(WHAT, name, &mut worker, worker_id(owner, value.string(name)?)?),
        "dp_rank" => {
            let number = value.unsigned(name)?;
            put(WHAT, name, &mut rank, u32::try_from(number).map_err(|_| out_of_range(WHAT, name, &number))?)
        }
        "counter_id" => put(WHAT, name, &mut counter, value.count(name)?),
        "wall_time" => put(WHAT, name, &mut wall_time, seconds(value.float(name)?)?),
        "scheduled_requests" => put(WHAT, name, &mut scheduled, read_scheduled(value)?),
        "queued_requests" => put(WHAT, name, &mut queued, read_queued(value)?),
        _ => Ok(false),
    })?;
    match found(WHAT, "version", version)? {
        VERSION => {}
        other => {
            let detail = format!("version {other}, not {VERSION}");
            return Err(Malformed { what: WHAT, reason: Reason::UnknownVersion, detail });
        }
    }
    Ok(ForwardPass {
        worker: found(WHAT, "worker_id", worker)?,
        rank: Rank(found(WHAT, "dp_rank", rank)?),
        pass: Pass {
            counter: found(WHAT, "counter_id", counter)?,
            wall_time: found(WHAT, "wall_time", wall_time)?,
            scheduled: found(WHAT, "scheduled_requests", scheduled)?,
            queued: found(WHAT, "queued_requests", queued)?,
        },
    })
}

/// In decimal, though every other event has it as a number.
fn worker_id(owner: Option<WorkerId>, text: &str) -> Result<WorkerId, Malformed> {
    if text.is_empty() {
        let detail = "worker_id is empty, and discovery does not tell whose channel it is".to_owned();
        return owner.ok_or(Malformed { what: WHAT, reason: Reason::OutOfRange, detail });
    }
    let shown = || text.chars().take(40).collect::<String>();
    text.parse().map(WorkerId).map_err(|_| out_of_range(WHAT, "worker_id", &format_args!("{:?}", shown())))
}

fn seconds(time: f64) -> Result<f64, Malformed> {
    if time.is_finite() && time >= 0.0 { Ok(time) } else { Err(out_of_range(WHAT, "wall_time", &time)) }
}

fn read_scheduled(value: &mut Reader<'_>) -> Result<Scheduled, Malformed> {
    let (mut prefill, mut tokens, mut prefill_kv, mut decode, mut decode_kv) = (None, None, None, None, None);
    value.map("scheduled_requests", |value, name| match name {
        "num_prefill_requests" => put(WHAT, name, &mut prefill, value.count(name)?),
        "sum_prefill_tokens" => put(WHAT, name, &mut tokens, value.count(name)?),
        "sum_prefill_kv_tokens" => put(WHAT, name, &mut prefill_kv, value.count(name)?),
        "num_decode_requests" => put(WHAT, name, &mut decode, value.count(name)?),
        "sum_decode_kv_tokens" => put(WHAT, name, &mut decode_kv, value.count(name)?),
        _ => Ok(false),
    })?;
    Ok(Scheduled {
        prefill_requests: found(WHAT, "num_prefill_requests", prefill)?,
        prefill_tokens: found(WHAT, "sum_prefill_tokens", tokens)?,
        prefill_kv_tokens: found(WHAT, "sum_prefill_kv_tokens", prefill_kv)?,
        decode_requests: found(WHAT, "num_decode_requests", decode)?,
        decode_kv_tokens: found(WHAT, "sum_decode_kv_tokens", decode_kv)?,
    })
}

fn read_queued(value: &mut Reader<'_>) -> Result<Queued, Malformed> {
    let (mut prefill, mut tokens, mut decode, mut decode_kv) = (None, None, None, None);
    value.map("queued_requests", |value, name| match name {
        "num_prefill_requests" => put(WHAT, name, &mut prefill, value.count(name)?),
        "sum_prefill_tokens" => put(WHAT, name, &mut tokens, value.count(name)?),
        "num_decode_requests" => put(WHAT, name, &mut decode, value.count(name)?),
        "sum_decode_kv_tokens" => put(WHAT, name, &mut decode_kv, value.count(name)?),
        _ => Ok(false),
    })?;
    Ok(Queued {
        prefill_requests: found(WHAT, "num_prefill_requests", prefill)?,
        prefill_tokens: found(WHAT, "sum_prefill_tokens", tokens)?,
        decode_requests: found(WHAT, "num_decode_requests", decode)?,
        decode_kv_tokens: found(WHAT, "sum_decode_kv_tokens", decode_kv)?,
    })
}

/// Encodes the payload of an event as 1.1 - 1.6 do, to the byte, where the requests of a pass are of one length: every
/// variance is 0.
#[must_use]
pub fn encode_forward_pass(event: &ForwardPass) -> Vec<u8> {
    let Pass { counter, wall_time, scheduled, queued } = event.pass;
    Writer::map(7)
        .unsigned("version", VERSION)
        .string("worker_id", &event.worker.to_string())
        .unsigned("dp_rank", event.rank.0.into())
        .unsigned("counter_id", counter)
        .float("wall_time", wall_time)
        .key("scheduled_requests")
        .open_map(7)
        .unsigned("num_prefill_requests", scheduled.prefill_requests)
        .unsigned("sum_prefill_tokens", scheduled.prefill_tokens)
        .float("var_prefill_length", 0.0)
        .unsigned("sum_prefill_kv_tokens", scheduled.prefill_kv_tokens)
        .unsigned("num_decode_requests", scheduled.decode_requests)
        .unsigned("sum_decode_kv_tokens", scheduled.decode_kv_tokens)
        .float("var_decode_kv_tokens", 0.0)
        .key("queued_requests")
        .open_map(6)
        .unsigned("num_prefill_requests", queued.prefill_requests)
        .unsigned("sum_prefill_tokens", queued.prefill_tokens)
        .float("var_prefill_length", 0.0)
        .unsigned("num_decode_requests", queued.decode_requests)
        .unsigned("sum_decode_kv_tokens", queued.decode_kv_tokens)
        .float("var_decode_kv_tokens", 0.0)
        .0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::decode_envelope;
    use super::super::msgpack::replaced;
    use super::*;

    /// A pass with a prefill of 100 tokens, captured from 1.1.1.
    const CAPTURED: &[u8] = include_bytes!(
        "../../tests/fixtures/1.1.1-cluster/event.namespace.dynamo.component.backend.forward-pass-metrics.2.bin"
    );

    fn payload() -> Vec<u8> {
        decode_envelope(CAPTURED).unwrap().payload.to_vec()
    }

    fn with(name: &str, old: &[u8], new: &[u8]) -> Vec<u8> {
        replaced(&payload(), name, old, new)
    }

    fn reason(payload: &[u8]) -> Reason {
        decode_forward_pass(None, payload).unwrap_err().reason
    }

    #[test]
    fn a_captured_pass_is_read() {
        let ForwardPass { worker, rank, pass } = decode_forward_pass(None, &payload()).unwrap();
        assert_eq!((worker.0, rank, pass.counter), (4_390_624_876_468_394_526, Rank(0), 3));
        assert!((pass.wall_time - 0.023_952_694).abs() < 1e-12);
        let scheduled = Scheduled { prefill_requests: 1, prefill_tokens: 100, ..Scheduled::default() };
        assert_eq!((pass.scheduled, pass.queued), (scheduled, Queued::default()));
    }

    #[test]
    fn an_empty_worker_id_is_that_of_the_channels_owner() {
        let captured = b"4390624876468394526";
        let length = 0xa0 | u8::try_from(captured.len()).unwrap();
        let id = |text: &[u8]| {
            let length_of = |text: &[u8]| 0xa0 | u8::try_from(text.len()).unwrap();
            with("worker_id", &[&[length][..], captured].concat(), &[&[length_of(text)][..], text].concat())
        };
        let owner = Some(WorkerId(31));
        assert_eq!(decode_forward_pass(owner, &id(b"")).unwrap().worker, WorkerId(31));
        assert_eq!(decode_forward_pass(owner, &id(b"32")).unwrap().worker, WorkerId(32), "it names itself");
        let error = decode_forward_pass(None, &id(b"")).unwrap_err();
        assert!(error.reason == Reason::OutOfRange && error.detail.contains("worker_id is empty"), "{error}");
        let error = decode_forward_pass(owner, &id(b"thirty-one")).unwrap_err();
        assert!(error.reason == Reason::OutOfRange && error.detail.contains("\"thirty-one\""), "{error}");
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_reason() {
        assert_eq!(reason(&with("version", &[1], &[2])), Reason::UnknownVersion);
        assert_eq!(reason(&with("num_prefill_requests", &[1], &[0xff])), Reason::OutOfRange, "-1");
        assert_eq!(reason(&with("sum_prefill_tokens", &[100], &[0xc0])), Reason::WrongShape, "nil");
        let most = [&[0xcf][..], &u64::MAX.to_be_bytes()].concat();
        assert_eq!(reason(&with("counter_id", &[3], &most)), Reason::OutOfRange);
        let captured = 0.023_952_694_f64.to_be_bytes();
        for time in [f64::NAN, f64::INFINITY, -1.0] {
            let spoilt =
                with("wall_time", &[&[0xcb][..], &captured].concat(), &[&[0xcb][..], &time.to_be_bytes()].concat());
            assert_eq!(reason(&spoilt), Reason::OutOfRange, "{time}");
        }
        assert_eq!(reason(b"\x80"), Reason::WrongShape);
        assert_eq!(reason(b"\xc1"), Reason::Malformed);
    }

    #[test]
    fn every_part_of_a_payload_is_refused_as_truncated() {
        let payload = payload();
        for length in 0..payload.len() {
            assert_eq!(reason(&payload[..length]), Reason::Truncated, "{length}");
        }
    }

    fn any_pass() -> impl Strategy<Value = Pass> {
        let counts = || proptest::array::uniform5(0..=i64::MAX as u64);
        (0..=i64::MAX as u64, 0.0..1e9, counts(), counts()).prop_map(|(counter, wall_time, computed, waits)| Pass {
            counter,
            wall_time,
            scheduled: Scheduled {
                prefill_requests: computed[0],
                prefill_tokens: computed[1],
                prefill_kv_tokens: computed[2],
                decode_requests: computed[3],
                decode_kv_tokens: computed[4],
            },
            queued: Queued {
                prefill_requests: waits[0],
                prefill_tokens: waits[1],
                decode_requests: waits[2],
                decode_kv_tokens: waits[3],
            },
        })
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_alike(worker: u64, rank: u32, pass in any_pass()) {
            let event = ForwardPass { worker: WorkerId(worker), rank: Rank(rank), pass };
            prop_assert_eq!(decode_forward_pass(None, &encode_forward_pass(&event)), Ok(event));
        }

        #[test]
        fn no_changed_byte_makes_it_panic(at: prop::sample::Index, byte: u8) {
            let mut bytes = payload();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = decode_forward_pass(None, &bytes);
        }
    }
}
