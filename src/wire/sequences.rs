//! `active_sequences_events`: a KV router's book-keeping of its own requests, for the other routers (Dynamo 0.4 and later).

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::msgpack::{Reader, found, put};
use super::{Malformed, from_json, out_of_range};
use crate::fleet::{Cached, Prompt, Reason, RequestId, Routing, Step, WorkerId};

const WHAT: &str = "active_sequences_events event";

/// Steps that one message may tell of.
const MAX_STEPS: u64 = 10_000;

/// Decodes the payload of a numbered event (0.9 and later): one step up to 1.3, a list of them from 1.4 on.
///
/// The hashes of a prompt's blocks are counted and passed over. Up to 0.9, which is known by its missing `lora_name`,
/// routers say the hit rate in an event of its own too: it is to be counted from there.
///
/// # Errors
/// No such map, a step that is not known, or a number that its quantity cannot have.
pub fn decode_sequences(payload: &[u8]) -> Result<Vec<Routing>, Malformed> {
    let mut steps = Vec::new();
    let mut only = Fields::default();
    let mut has_list = false;
    Reader::new(WHAT, payload)?.only_map(|value, name| {
        if name != "events" {
            return only.read(value, name);
        }
        has_list = true;
        let count = value.array(name)?;
        if u64::from(count) > MAX_STEPS {
            let detail = format!("{count} events, more than {MAX_STEPS}");
            return Err(Malformed { what: WHAT, reason: Reason::TooManyEntries, detail });
        }
        for _ in 0..count {
            let mut fields = Fields::default();
            value.map("an event", |value, name| fields.read(value, name))?;
            steps.push(fields.routing()?);
        }
        Ok(true)
    })?;
    if !has_list {
        steps.push(only.routing()?);
    }
    Ok(steps)
}

/// Decodes the JSON event of 0.4 - 0.8, which has no number.
///
/// # Errors
/// No such JSON, or a step that is not known.
pub fn decode_sequences_json(json: &[u8]) -> Result<Routing, Malformed> {
    #[derive(Deserialize)]
    struct Wire<'a> {
        request_id: std::borrow::Cow<'a, str>,
        router_id: std::borrow::Cow<'a, str>,
        worker: Option<Worker>,
        /// 0.4 and 0.5.
        worker_id: Option<i64>,
        data: Data,
    }
    #[derive(Deserialize)]
    struct Worker {
        worker_id: u64,
    }
    #[derive(Deserialize)]
    enum Data {
        AddRequest(IgnoredAny),
        MarkPrefillCompleted,
        Free,
    }
    let wire: Wire<'_> = from_json(WHAT, json)?;
    let worker = wire.worker.map(|worker| worker.worker_id).or(wire.worker_id.map(i64::cast_unsigned));
    let step = match wire.data {
        Data::AddRequest(_) => Step::Placed(Prompt { full_blocks: None, cached: Cached::InEventOfItsOwn }),
        Data::MarkPrefillCompleted => Step::Prefilled,
        Data::Free => Step::Freed,
    };
    let request = RequestId::of(wire.router_id.as_bytes(), &wire.request_id);
    Ok(Routing { request, worker: WorkerId(found(WHAT, "worker_id", worker)?), step })
}

/// The fields of one step.
#[derive(Default)]
struct Fields<'a> {
    request: Option<&'a str>,
    router: Option<u64>,
    worker: Option<u64>,
    step: Option<Wire>,
    tells_adapter: bool,
}

/// A step as it stands in the message.
#[derive(Clone, Copy)]
enum Wire {
    Add(Added),
    Prefilled,
    Freed,
}

/// Fields of `AddRequest`; each release has some of them.
#[derive(Default, Clone, Copy)]
struct Added {
    full_blocks: Option<u32>,
    isl: Option<u64>,
    overlap: Option<u64>,
    tracks: Option<bool>,
    effective: Option<u64>,
}

impl<'a> Fields<'a> {
    fn read(&mut self, value: &mut Reader<'a>, name: &'a str) -> Result<bool, Malformed> {
        match name {
            "request_id" => put(WHAT, name, &mut self.request, value.string(name)?),
            "router_id" => put(WHAT, name, &mut self.router, value.unsigned(name)?),
            "worker" => {
                let mut worker = None;
                value.map(name, |value, name| match name {
                    "worker_id" => put(WHAT, name, &mut worker, value.unsigned(name)?),
                    _ => Ok(false),
                })?;
                put(WHAT, name, &mut self.worker, found(WHAT, "worker_id", worker)?)
            }
            "data" => put(WHAT, name, &mut self.step, step(value)?),
            "lora_name" => {
                self.tells_adapter = true;
                Ok(false)
            }
            _ => Ok(false),
        }
    }

    fn routing(self) -> Result<Routing, Malformed> {
        let request = found(WHAT, "request_id", self.request)?;
        let router = found(WHAT, "router_id", self.router)?;
        let step = match found(WHAT, "data", self.step)? {
            Wire::Add(_) if !self.tells_adapter => {
                Step::Placed(Prompt { full_blocks: None, cached: Cached::InEventOfItsOwn })
            }
            Wire::Add(added) => Step::Placed(added.prompt()?),
            Wire::Prefilled => Step::Prefilled,
            Wire::Freed => Step::Freed,
        };
        let request = RequestId::of(&router.to_be_bytes(), request);
        Ok(Routing { request, worker: WorkerId(found(WHAT, "worker", self.worker)?), step })
    }
}

/// `"MarkPrefillCompleted"`, `"Free"`, or a map with `AddRequest` alone.
fn step(value: &mut Reader<'_>) -> Result<Wire, Malformed> {
    if let Some(word) = value.string_if_any("data")? {
        return match word {
            "MarkPrefillCompleted" => Ok(Wire::Prefilled),
            "Free" => Ok(Wire::Freed),
            other => Err(unknown(other)),
        };
    }
    let mut added = None;
    value.map("data", |value, name| match name {
        "AddRequest" => put(WHAT, name, &mut added, add_request(value)?),
        other => Err(unknown(other)),
    })?;
    Ok(Wire::Add(found(WHAT, "AddRequest", added)?))
}

fn unknown(variant: &str) -> Malformed {
    let detail = format!("data is {:?}", variant.chars().take(40).collect::<String>());
    Malformed { what: WHAT, reason: Reason::WrongShape, detail }
}

fn add_request(value: &mut Reader<'_>) -> Result<Added, Malformed> {
    let mut added = Added::default();
    value.map("AddRequest", |value, name| {
        match name {
            "token_sequence" => added.full_blocks = value.optional_elements(name)?,
            "isl" => added.isl = value.optional_unsigned(name)?,
            "overlap" => added.overlap = value.optional_unsigned(name)?,
            "track_prefill_tokens" => added.tracks = Some(value.boolean(name)?),
            "prefill_load_hint" => added.effective = hint(value)?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(added)
}

/// The tokens that the prefill has to compute; nil where it is none.
fn hint(value: &mut Reader<'_>) -> Result<Option<u64>, Malformed> {
    if value.is_nil()? {
        return Ok(None);
    }
    let mut effective = None;
    value.map("prefill_load_hint", |value, name| match name {
        "initial_effective_prefill_tokens" => put(WHAT, name, &mut effective, value.count(name)?),
        _ => Ok(false),
    })?;
    found(WHAT, "initial_effective_prefill_tokens", effective).map(Some)
}

impl Added {
    /// Up to 1.1 `isl` and `overlap` say it; later the hint does, where the router tracks prefill at all.
    fn prompt(self) -> Result<Prompt, Malformed> {
        let blocks = |overlap: u64| u32::try_from(overlap).map_err(|_| out_of_range(WHAT, "overlap", &overlap));
        let cached = match (self.isl, self.overlap) {
            _ if self.tracks == Some(false) => Cached::Untracked,
            (Some(isl), Some(overlap)) => Cached::Overlap { isl_tokens: isl, blocks: blocks(overlap)? },
            _ => Cached::Effective { tokens: self.effective.unwrap_or_default() },
        };
        Ok(Prompt { full_blocks: self.full_blocks, cached })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::msgpack::replaced;
    use super::super::{MAX_EVENT, decode_frames};
    use super::*;

    /// An `AddRequest` of six blocks in a list of events, captured from 1.6.1.
    fn captured() -> Vec<u8> {
        const PARTS: [&[u8]; 4] = [
            include_bytes!("../../tests/fixtures/1.6.1-cluster/zmq.active_sequences_events.1.part0.bin"),
            include_bytes!("../../tests/fixtures/1.6.1-cluster/zmq.active_sequences_events.1.part1.bin"),
            include_bytes!("../../tests/fixtures/1.6.1-cluster/zmq.active_sequences_events.1.part2.bin"),
            include_bytes!("../../tests/fixtures/1.6.1-cluster/zmq.active_sequences_events.1.part3.bin"),
        ];
        decode_frames(&PARTS).unwrap().payload.to_vec()
    }

    fn with(name: &str, old: &[u8], new: &[u8]) -> Vec<u8> {
        replaced(&captured(), name, old, new)
    }

    fn prompt(payload: &[u8]) -> Prompt {
        match decode_sequences(payload).unwrap()[..] {
            [Routing { step: Step::Placed(prompt), .. }] => prompt,
            ref other => panic!("{other:?}"),
        }
    }

    const SIX: [u8; 1 + 6 * 9] = {
        let mut bytes = [0; 1 + 6 * 9];
        bytes[0] = 0x96;
        let mut at = 1;
        while at < bytes.len() {
            bytes[at] = 0xcf;
            at += 9;
        }
        bytes
    };

    #[test]
    fn hashes_are_counted_and_not_kept() {
        assert_eq!(prompt(&captured()), Prompt { full_blocks: Some(6), cached: Cached::Effective { tokens: 100 } });
        let before = captured();
        let at = before.windows(14).position(|window| window == b"token_sequence").unwrap() + 14;
        let (head, tail) = (&before[..at], &before[at + SIX.len()..]);
        let none = [head, &[0xc0], tail].concat();
        assert_eq!(prompt(&none).full_blocks, None);
        let many = [head, &[0xdd], &100_000_u32.to_be_bytes()[..], &vec![1; 100_000], tail].concat();
        assert_eq!(prompt(&many).full_blocks, Some(100_000));
        let too_many = [head, &[0xdd], &1_000_000_u32.to_be_bytes()[..], &SIX[1..10].repeat(1_000_000), tail].concat();
        assert!(too_many.len() > MAX_EVENT);
        assert_eq!(decode_sequences(&too_many).unwrap_err().reason, Reason::TooLarge);
        let lying = [head, &[0xdd, 0xff, 0xff, 0xff, 0xff], tail].concat();
        assert!(decode_sequences(&lying).is_err());
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_reason() {
        let reason = |payload: &[u8]| decode_sequences(payload).unwrap_err().reason;
        assert_eq!(reason(&with("data", b"\x81\xaaAddRequest", b"\x81\xaaTakeNothin")), Reason::WrongShape, "unknown");
        assert_eq!(reason(&with("initial_effective_prefill_tokens", &[100], &[0xff])), Reason::OutOfRange, "negative");
        assert_eq!(reason(b"\x80"), Reason::WrongShape);
        assert_eq!(reason(b"\x81\xa6events\xdd\xff\xff\xff\xff"), Reason::TooManyEntries);
        for json in ["{}", "[]", r#"{"request_id":"a","router_id":"b","worker_id":1,"data":"Nothing"}"#] {
            assert!(decode_sequences_json(json.as_bytes()).is_err(), "{json}");
        }
    }

    #[test]
    fn two_routers_may_have_requests_of_one_name() {
        assert_ne!(RequestId::of(b"one", "request"), RequestId::of(b"other", "request"));
        assert_ne!(RequestId::of(b"a", "bc"), RequestId::of(b"ab", "c"));
    }

    #[test]
    fn every_part_of_a_payload_is_refused_as_truncated() {
        let payload = captured();
        for length in 0..payload.len() {
            assert_eq!(decode_sequences(&payload[..length]).unwrap_err().reason, Reason::Truncated, "{length}");
        }
    }

    proptest! {
        #[test]
        fn no_changed_byte_makes_it_panic(at: prop::sample::Index, byte: u8) {
            let mut bytes = captured();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = decode_sequences(&bytes);
        }
    }
}
