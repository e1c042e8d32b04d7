//! `active_sequences_events`: a KV router's book-keeping of its own requests, for the other routers (Dynamo 0.4 and later).

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::json;

use super::msgpack::{Reader, Writer, found, put};
use super::{Malformed, from_json, out_of_range};
use crate::fleet::{AdapterId, Cached, Prompt, Rank, Reason, RequestId, Routing, Step, WorkerId};

const WHAT: &str = "active_sequences_events event";

/// Steps that one message may tell of.
const MAX_STEPS: u64 = 10_000;

/// Decodes the payload of a numbered event (0.9 and later): one step up to 1.3, a list of them from 1.4 on.
///
/// The hashes of a prompt's blocks are counted and passed over. Up to 0.9, which is known by its missing `lora_name`,
/// routers say the hit rate in an event of its own too: it is to be counted from there. From 1.4 on one router has a model and
/// its adapters, and counts in the model's blocks: the adapter makes no difference then, and is left out.
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
            fields.adapter = None;
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
    let worker = WorkerId(found(WHAT, "worker_id", worker)?);
    Ok(Routing { request, router: None, adapter: None, worker, step })
}

/// The fields of one step.
#[derive(Default)]
struct Fields<'a> {
    request: Option<&'a str>,
    router: Option<u64>,
    worker: Option<u64>,
    step: Option<Wire>,
    tells_adapter: bool,
    adapter: Option<&'a str>,
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
                self.adapter = value.string_if_any(name)?;
                Ok(self.adapter.is_some())
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
        let worker = WorkerId(found(WHAT, "worker", self.worker)?);
        Ok(Routing { request, router: Some(WorkerId(router)), adapter: self.adapter.map(AdapterId::of), worker, step })
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

/// A step of one request, as a router writes it down.
#[derive(Debug, Clone, Copy)]
pub struct SequenceStep<'a> {
    /// Name of the request.
    pub request: &'a str,
    /// The worker that has it.
    pub worker: WorkerId,
    /// The rank of the worker.
    pub rank: Rank,
    /// What happened.
    pub change: SequenceChange<'a>,
}

/// What happened to a request.
#[derive(Debug, Clone, Copy)]
pub enum SequenceChange<'a> {
    /// The router placed it.
    Added(PlacedPrompt<'a>),
    /// Its prompt is computed.
    Prefilled,
    /// It ended.
    Freed,
}

/// What a router knows of a prompt that it places.
#[derive(Debug, Clone, Copy)]
pub struct PlacedPrompt<'a> {
    /// A hash for each full block.
    pub hashes: &'a [u64],
    /// Length in tokens.
    pub isl_tokens: u64,
    /// Blocks that the worker has in its cache.
    pub overlap_blocks: u64,
    /// Tokens that are left to be computed.
    pub effective_tokens: u64,
}

/// How a release writes a step down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SequencesForm {
    /// 0.4 and 0.5: JSON with `worker_id`.
    WorkerId,
    /// 0.6 - 0.8: JSON with `worker`.
    Worker,
    /// 0.9: MessagePack with `isl` and `overlap`, one step a message.
    Overlap,
    /// 1.4 - 1.6: a list of steps, with a hint of the tokens that are left to be computed.
    Hints,
}

/// Encodes the JSON events of a router up to 0.8, which is known by a UUID, or else the payloads of numbered ones.
#[must_use]
pub fn encode_sequences(router: u64, steps: &[SequenceStep<'_>], form: SequencesForm) -> Vec<Vec<u8>> {
    match form {
        SequencesForm::WorkerId | SequencesForm::Worker => {
            steps.iter().map(|step| json_of(router, step, form)).collect()
        }
        SequencesForm::Overlap => steps.iter().map(|step| written(Writer(Vec::new()), router, step, form).0).collect(),
        SequencesForm::Hints if steps.is_empty() => Vec::new(),
        SequencesForm::Hints => {
            let list = Writer::map(1).key("events").open_array(steps.len());
            vec![steps.iter().fold(list, |list, step| written(list, router, step, form)).0]
        }
    }
}

/// A UUID in its usual spelling.
#[must_use]
pub fn uuid(bits: u128) -> String {
    let hex = format!("{bits:032x}");
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

fn json_of(router: u64, step: &SequenceStep<'_>, form: SequencesForm) -> Vec<u8> {
    let worker = step.worker.0;
    let worker = match form {
        SequencesForm::WorkerId => ("worker_id", json!(worker)),
        _ => ("worker", json!({ "worker_id": worker, "dp_rank": step.rank.0 })),
    };
    let data = match step.change {
        SequenceChange::Added(PlacedPrompt { hashes, isl_tokens, overlap_blocks, .. }) => {
            json!({ "AddRequest": { "token_sequence": hashes, "isl": isl_tokens, "overlap": overlap_blocks } })
        }
        SequenceChange::Prefilled => json!("MarkPrefillCompleted"),
        SequenceChange::Freed => json!("Free"),
    };
    json!({ "request_id": step.request, (worker.0): worker.1, "data": data, "router_id": uuid(router.into()) })
        .to_string()
        .into_bytes()
}

fn written(writer: Writer, router: u64, step: &SequenceStep<'_>, form: SequencesForm) -> Writer {
    let tells_adapter = form == SequencesForm::Hints;
    let writer = writer
        .open_map(if tells_adapter { 5 } else { 4 })
        .string("request_id", step.request)
        .key("worker")
        .open_map(2)
        .unsigned("worker_id", step.worker.0)
        .unsigned("dp_rank", step.rank.0.into())
        .key("data");
    let writer = match step.change {
        SequenceChange::Added(placement) => added(writer.open_map(1).key("AddRequest"), placement, form),
        SequenceChange::Prefilled => writer.text("MarkPrefillCompleted"),
        SequenceChange::Freed => writer.text("Free"),
    };
    let writer = writer.unsigned("router_id", router);
    if tells_adapter { writer.key("lora_name").nil() } else { writer }
}

fn added(writer: Writer, placement: PlacedPrompt<'_>, form: SequencesForm) -> Writer {
    let PlacedPrompt { hashes, isl_tokens, overlap_blocks, effective_tokens } = placement;
    let writer = writer.open_map(4).key("token_sequence").open_array(hashes.len());
    let writer = hashes.iter().fold(writer, |writer, hash| writer.number(*hash));
    if form == SequencesForm::Overlap {
        return writer
            .unsigned("isl", isl_tokens)
            .unsigned("overlap", overlap_blocks)
            .key("expected_output_tokens")
            .nil();
    }
    let writer = writer.boolean("track_prefill_tokens", true).key("expected_output_tokens").nil();
    let writer = writer.key("prefill_load_hint");
    if effective_tokens == 0 {
        return writer.nil();
    }
    writer
        .open_map(2)
        .unsigned("initial_effective_prefill_tokens", effective_tokens)
        .key("expected_prefill_duration")
        .nil()
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

    #[derive(Debug, Clone)]
    struct Told {
        request: String,
        worker: u64,
        kind: u8,
        hashes: Vec<u64>,
        cached: u32,
    }

    impl Told {
        fn written(&self) -> SequenceStep<'_> {
            let placement = PlacedPrompt {
                hashes: &self.hashes,
                isl_tokens: 16 * self.hashes.len() as u64 + 3,
                overlap_blocks: self.cached.into(),
                effective_tokens: 7 * u64::from(self.cached),
            };
            let change = [SequenceChange::Added(placement), SequenceChange::Prefilled, SequenceChange::Freed]
                [usize::from(self.kind)];
            SequenceStep { request: &self.request, worker: WorkerId(self.worker), rank: Rank(1), change }
        }

        fn routing(&self, router: &[u8], prompt: Prompt) -> Routing {
            let step = [Step::Placed(prompt), Step::Prefilled, Step::Freed][usize::from(self.kind)];
            let (request, worker) = (RequestId::of(router, &self.request), WorkerId(self.worker));
            let router = router.try_into().ok().map(|bytes| WorkerId(u64::from_be_bytes(bytes)));
            Routing { request, router, adapter: None, worker, step }
        }

        fn hinted(&self) -> Prompt {
            let cached = Cached::Effective { tokens: 7 * u64::from(self.cached) };
            Prompt { full_blocks: u32::try_from(self.hashes.len()).ok(), cached }
        }
    }

    fn any_told() -> impl Strategy<Value = Told> {
        let hashes = proptest::collection::vec(any::<u64>(), 0..40);
        (any::<String>(), 0..=i64::MAX as u64, 0..3_u8, hashes, any::<u32>())
            .prop_map(|(request, worker, kind, hashes, cached)| Told { request, worker, kind, hashes, cached })
    }

    const TOLD_ELSEWHERE: Prompt = Prompt { full_blocks: None, cached: Cached::InEventOfItsOwn };

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_alike_in_every_form(
            router: u64, told in proptest::collection::vec(any_told(), 1..20),
        ) {
            let steps: Vec<_> = told.iter().map(Told::written).collect();
            let expected = |router: &[u8], prompt: fn(&Told) -> Prompt| {
                told.iter().map(|told| told.routing(router, prompt(told))).collect::<Vec<_>>()
            };
            for form in [SequencesForm::WorkerId, SequencesForm::Worker] {
                let messages = encode_sequences(router, &steps, form);
                let decoded = messages.iter().map(|json| decode_sequences_json(json).unwrap()).collect::<Vec<_>>();
                prop_assert_eq!(decoded, expected(uuid(router.into()).as_bytes(), |_| TOLD_ELSEWHERE));
            }
            for (form, prompt) in
                [(SequencesForm::Overlap, (|_| TOLD_ELSEWHERE) as fn(&Told) -> Prompt), (SequencesForm::Hints, Told::hinted)]
            {
                let messages = encode_sequences(router, &steps, form);
                let decoded = messages.iter().flat_map(|payload| decode_sequences(payload).unwrap()).collect::<Vec<_>>();
                prop_assert_eq!(decoded, expected(&router.to_be_bytes(), prompt));
            }
        }

        #[test]
        fn no_changed_byte_makes_it_panic(at: prop::sample::Index, byte: u8) {
            let mut bytes = captured();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = decode_sequences(&bytes);
        }
    }
}
