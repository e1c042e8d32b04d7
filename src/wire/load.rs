//! `ForwardPassMetrics`, the load in a STATS reply's `data` (Dynamo 0.1 - 0.5) and in a `kv_metrics` event (0.4 - 0.7).

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Number, Value};

use super::{Malformed, count, from_json, ratio, worker_id};
use crate::fleet::{Load, MAX_POSITIONS, Rank, Report, SpecDecode, SpecDecodeCounts, WorkerId};

const WHAT: &str = "ForwardPassMetrics";
const WHAT_EVENT: &str = "kv_metrics event";

/// How a release lays out the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadForm {
    /// Up to 0.2: all known fields in one object, by name.
    Flat,
    /// 0.3: `kv_stats`, `spec_decode_stats`, `worker_stats`, all fields by name.
    Sorted,
    /// 0.4 and later: `worker_stats`, `kv_stats`, `spec_decode_stats`.
    Nested,
}

#[derive(Deserialize, Serialize)]
struct WorkerStats {
    data_parallel_rank: Option<u32>,
    request_active_slots: Option<Number>,
    request_total_slots: Option<Number>,
    num_requests_waiting: Option<Number>,
}

#[derive(Deserialize, Serialize)]
struct KvStats {
    kv_active_blocks: Option<Number>,
    kv_total_blocks: Option<Number>,
    gpu_cache_usage_perc: Option<Number>,
    gpu_prefix_cache_hit_rate: Option<Number>,
}

#[derive(Deserialize, Serialize)]
struct SpecDecodeStats {
    num_spec_tokens: Option<Number>,
    num_drafts: Option<Number>,
    num_draft_tokens: Option<Number>,
    num_accepted_tokens: Option<Number>,
    num_accepted_tokens_per_pos: Option<Vec<Number>>,
}

#[derive(Deserialize, Serialize)]
struct Nested {
    worker_stats: Option<WorkerStats>,
    kv_stats: Option<KvStats>,
    spec_decode_stats: Option<SpecDecodeStats>,
}

/// Decodes either form. `None` where the object holds nothing of a load: a stats handler of Dynamo may answer with
/// whatever it likes.
///
/// # Errors
/// No object, a field of another type, or a number that its quantity cannot have.
pub fn decode_load(json: &[u8]) -> Result<Option<Report>, Malformed> {
    let Nested { worker_stats, kv_stats, spec_decode_stats } = from_json(WHAT, json)?;
    let (worker, kv) = if worker_stats.is_none() && kv_stats.is_none() {
        (from_json(WHAT, json).map(Some)?, from_json(WHAT, json).map(Some)?)
    } else {
        (worker_stats, kv_stats)
    };
    let mut load = Load { spec_decode: spec_decode_stats.map(spec_decode).transpose()?, ..Load::default() };
    let mut rank = Rank::default();
    if let Some(worker) = worker {
        rank = Rank(worker.data_parallel_rank.unwrap_or_default());
        load.active_slots = optional(count, "request_active_slots", worker.request_active_slots)?;
        load.total_slots = optional(count, "request_total_slots", worker.request_total_slots)?;
        load.waiting = optional(count, "num_requests_waiting", worker.num_requests_waiting)?;
    }
    if let Some(kv) = kv {
        load.active_blocks = optional(count, "kv_active_blocks", kv.kv_active_blocks)?;
        load.total_blocks = optional(count, "kv_total_blocks", kv.kv_total_blocks)?;
        load.cache_usage = optional(ratio, "gpu_cache_usage_perc", kv.gpu_cache_usage_perc)?;
        load.prefix_hit_rate = optional(ratio, "gpu_prefix_cache_hit_rate", kv.gpu_prefix_cache_hit_rate)?;
    }
    Ok((!load.is_unknown()).then_some(Report { rank, load }))
}

/// Decodes a `LoadEvent` of 0.4 - 0.7: a worker, and its load if it says any.
///
/// # Errors
/// No such JSON, or a number that its quantity cannot have.
pub fn decode_load_event(json: &[u8]) -> Result<(WorkerId, Option<Report>), Malformed> {
    #[derive(Deserialize)]
    struct Wire<'a> {
        worker_id: Number,
        #[serde(borrow)]
        data: &'a RawValue,
    }
    let wire: Wire<'_> = from_json(WHAT_EVENT, json)?;
    Ok((worker_id(WHAT_EVENT, &wire.worker_id)?, decode_load(wire.data.get().as_bytes())?))
}

fn spec_decode(stats: SpecDecodeStats) -> Result<SpecDecode, Malformed> {
    let positions = stats.num_accepted_tokens_per_pos.unwrap_or_default();
    let position = |number: &Number| count(WHAT, "num_accepted_tokens_per_pos", number);
    Ok(SpecDecode {
        spec_tokens: optional(count, "num_spec_tokens", stats.num_spec_tokens)?,
        counts: SpecDecodeCounts {
            drafts: optional(count, "num_drafts", stats.num_drafts)?,
            draft_tokens: optional(count, "num_draft_tokens", stats.num_draft_tokens)?,
            accepted_tokens: optional(count, "num_accepted_tokens", stats.num_accepted_tokens)?,
            accepted_per_position: positions.iter().take(MAX_POSITIONS).map(position).collect::<Result<_, _>>()?,
        },
    })
}

type Read<T> = fn(&'static str, &str, &Number) -> Result<T, Malformed>;

fn optional<T>(read: Read<T>, field: &str, number: Option<Number>) -> Result<Option<T>, Malformed> {
    number.map(|number| read(WHAT, field, &number)).transpose()
}

/// Encodes a load in STATS as the releases of that form do, to the byte of its JSON. Before 0.1 a load had fewer fields:
/// the flat form has those that are known.
#[must_use]
pub fn encode_load(report: &Report, form: LoadForm) -> Value {
    // STATS shows an `f32` widened to `f64`.
    let nested = nested(report, f64::from);
    let value = match form {
        LoadForm::Flat => [to_value(&nested.worker_stats), to_value(&nested.kv_stats)]
            .into_iter()
            .filter_map(|part| part.as_object().cloned())
            .flatten()
            .filter(|(_, value)| !value.is_null())
            .collect(),
        LoadForm::Sorted | LoadForm::Nested => to_value(&nested),
    };
    if form == LoadForm::Nested { value } else { sorted(value) }
}

/// Encodes an event as 0.4 - 0.7 do, to the byte.
#[must_use]
pub fn encode_load_event(worker: WorkerId, report: &Report) -> Vec<u8> {
    #[derive(Serialize)]
    struct Wire {
        worker_id: u64,
        data: Nested,
    }
    let data = nested(report, |single| single.to_string().parse().unwrap_or_default());
    // Numbers, text and nothing that could refuse.
    serde_json::to_vec(&Wire { worker_id: worker.0, data }).unwrap_or_default()
}

fn nested(report: &Report, share: fn(f32) -> f64) -> Nested {
    let Report { rank, load } = report;
    #[expect(clippy::cast_possible_truncation, reason = "an f32 is what a worker has")]
    let share = |value: f64| Number::from_f64(share(value as f32));
    Nested {
        worker_stats: Some(WorkerStats {
            data_parallel_rank: Some(rank.0).filter(|rank| *rank != 0),
            request_active_slots: load.active_slots.map(Number::from),
            request_total_slots: load.total_slots.map(Number::from),
            num_requests_waiting: load.waiting.map(Number::from),
        }),
        kv_stats: Some(KvStats {
            kv_active_blocks: load.active_blocks.map(Number::from),
            kv_total_blocks: load.total_blocks.map(Number::from),
            gpu_cache_usage_perc: load.cache_usage.and_then(share),
            gpu_prefix_cache_hit_rate: load.prefix_hit_rate.and_then(share),
        }),
        spec_decode_stats: load.spec_decode.as_ref().map(|stats| SpecDecodeStats {
            num_spec_tokens: stats.spec_tokens.map(Number::from),
            num_drafts: stats.counts.drafts.map(Number::from),
            num_draft_tokens: stats.counts.draft_tokens.map(Number::from),
            num_accepted_tokens: stats.counts.accepted_tokens.map(Number::from),
            num_accepted_tokens_per_pos: Some(
                stats.counts.accepted_per_position.iter().copied().map(Number::from).collect(),
            ),
        }),
    }
}

/// Numbers, text and nothing that could refuse.
fn to_value(part: &impl Serialize) -> Value {
    serde_json::to_value(part).unwrap_or_default()
}

fn sorted(mut value: Value) -> Value {
    value.sort_all_objects();
    value
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fleet::Reason;

    fn decode(json: &str) -> Result<Option<Report>, Malformed> {
        decode_load(json.as_bytes())
    }

    #[test]
    fn the_four_fields_of_the_first_workers_are_known_and_the_others_are_not() {
        let report = decode(
            r#"{"request_active_slots":58,"request_total_slots":100,"kv_active_blocks":77,"kv_total_blocks":100}"#,
        );
        let load = Load {
            active_slots: Some(58),
            total_slots: Some(100),
            active_blocks: Some(77),
            total_blocks: Some(100),
            ..Load::default()
        };
        assert_eq!(report.unwrap().unwrap(), Report { rank: Rank(0), load });
    }

    #[test]
    fn a_single_precision_share_is_its_shortest_decimal() {
        for written in ["0.7699999809265137", "0.77"] {
            let report = decode(&format!(r#"{{"gpu_cache_usage_perc":{written}}}"#)).unwrap().unwrap();
            assert_eq!(report.load.cache_usage, Some(0.77));
        }
    }

    #[test]
    fn unknown_and_null_fields_are_tolerated() {
        let report = decode(
            r#"{"worker_stats":{"data_parallel_rank":3,"request_active_slots":null,"new":[{}]},"kv_stats":{"kv_active_blocks":5},"more":1}"#,
        );
        let load = Load { active_blocks: Some(5), ..Load::default() };
        assert_eq!(report.unwrap().unwrap(), Report { rank: Rank(3), load });
    }

    #[test]
    fn an_object_that_is_no_load_is_none() {
        for other in ["{}", r#"{"custom":1}"#, r#"{"worker_stats":null,"kv_stats":null}"#] {
            assert_eq!(decode(other), Ok(None), "{other}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_reason() {
        for (json, reason) in [
            (r#"{"kv_active_blocks":-1}"#, Reason::OutOfRange),
            (r#"{"kv_active_blocks":1.5}"#, Reason::OutOfRange),
            (r#"{"kv_active_blocks":9223372036854775808}"#, Reason::OutOfRange),
            (r#"{"kv_active_blocks":99999999999999999999999}"#, Reason::OutOfRange),
            (r#"{"gpu_cache_usage_perc":-0.5}"#, Reason::OutOfRange),
            (r#"{"gpu_cache_usage_perc":1e300}"#, Reason::OutOfRange),
            (r#"{"kv_active_blocks":"77"}"#, Reason::WrongShape),
            (r#"{"worker_stats":[]}"#, Reason::WrongShape),
            (r#"{"worker_stats":{"data_parallel_rank":-1}}"#, Reason::WrongShape),
            ("[1,2]", Reason::WrongShape),
            ("7", Reason::WrongShape),
            (r#"{"kv_active_blocks":"#, Reason::Truncated),
            ("nonsense", Reason::Malformed),
        ] {
            assert_eq!(decode(json).unwrap_err().reason, reason, "{json}");
        }
    }

    #[test]
    fn an_event_that_cannot_be_is_refused_with_its_reason() {
        for (json, reason) in [
            (r#"{"worker_id":1}"#, Reason::WrongShape),
            (r#"{"data":{}}"#, Reason::WrongShape),
            (r#"{"worker_id":1.5,"data":{}}"#, Reason::OutOfRange),
            (r#"{"worker_id":1,"data":[]}"#, Reason::WrongShape),
            (r#"{"worker_id":1,"data":{"kv_stats":{"kv_active_blocks":-1}}}"#, Reason::OutOfRange),
            (r#"{"worker_id":1,"data":{"#, Reason::Truncated),
        ] {
            assert_eq!(decode_load_event(json.as_bytes()).unwrap_err().reason, reason, "{json}");
        }
        assert_eq!(decode_load_event(br#"{"worker_id":-1,"data":{}}"#), Ok((WorkerId(u64::MAX), None)));
    }

    #[test]
    fn an_event_of_nothing_but_openings_costs_no_stack() {
        let deep = format!(r#"{{"worker_id":1,"data":{}"#, r#"{"kv_stats":"#.repeat(10_000));
        assert_eq!(decode_load_event(deep.as_bytes()).unwrap_err().reason, Reason::Truncated);
    }

    #[test]
    fn positions_of_a_draft_are_bounded() {
        let many = vec!["1"; 1000].join(",");
        let json = format!(r#"{{"kv_stats":{{}},"spec_decode_stats":{{"num_accepted_tokens_per_pos":[{many}]}}}}"#);
        let spec = decode(&json).unwrap().unwrap().load.spec_decode.unwrap();
        assert_eq!(spec.counts.accepted_per_position.len(), MAX_POSITIONS);
    }

    fn any_load() -> impl Strategy<Value = Load> {
        let count = || proptest::option::of(0..=i64::MAX as u64);
        let share = || proptest::option::of((0_u16..=1000).prop_map(|permille| f64::from(permille) / 1000.0));
        let positions = proptest::collection::vec(0..=i64::MAX as u64, 0..MAX_POSITIONS);
        let spec_decode = (count(), (count(), count(), count()), positions).prop_map(
            |(spec_tokens, (drafts, draft_tokens, accepted_tokens), accepted_per_position)| SpecDecode {
                spec_tokens,
                counts: SpecDecodeCounts { drafts, draft_tokens, accepted_tokens, accepted_per_position },
            },
        );
        let spec_decode = proptest::option::of(spec_decode);
        ((count(), count(), count()), (count(), count()), (share(), share()), spec_decode).prop_map(
            |(slots, (active_blocks, total_blocks), (cache_usage, prefix_hit_rate), spec_decode)| {
                let (active_slots, total_slots, waiting) = slots;
                Load {
                    active_slots,
                    total_slots,
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

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_alike_in_every_form(load in any_load(), rank in 0..100_u32) {
            let report = Report { rank: Rank(rank), load };
            for form in [LoadForm::Flat, LoadForm::Sorted, LoadForm::Nested] {
                let json = encode_load(&report, form).to_string();
                let mut told = report.clone();
                if form == LoadForm::Flat {
                    told.load.spec_decode = None;
                }
                let expected = (!told.load.is_unknown()).then_some(told);
                prop_assert_eq!(decode(&json), Ok(expected));
            }
            let event = decode_load_event(&encode_load_event(WorkerId(7), &report));
            let expected = (!report.load.is_unknown()).then_some(report);
            prop_assert_eq!(event, Ok((WorkerId(7), expected)));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_load(&bytes);
            let _ = decode_load_event(&bytes);
        }
    }
}
