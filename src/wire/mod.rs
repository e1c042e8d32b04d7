//! The bytes of every Dynamo release. Nothing outside this module knows Dynamo's JSON and MessagePack.
//!
//! Decoding never panics, never allocates more than its input's size, and says why it refused. Unknown fields are
//! tolerated everywhere: releases add some.

mod active_load;
mod envelope;
mod forward_pass;
mod frames;
mod hit_rate;
mod load;
mod msgpack;
mod registration;
mod sequences;
mod stats;

pub use active_load::{
    ActiveBlocks, ActiveLoad, ActiveLoadForm, decode_active_load, decode_active_load_json, encode_active_load,
    encode_active_load_json,
};
pub use envelope::{Envelope, decode_envelope, encode_envelope};
pub use forward_pass::{ForwardPass, decode_forward_pass, encode_forward_pass};
pub use frames::{decode_frames, encode_frames};
pub use hit_rate::{decode_hit_rate, decode_hit_rate_msgpack, encode_hit_rate, encode_hit_rate_msgpack};
pub use load::{LoadForm, decode_load, decode_load_event, encode_load, encode_load_event};
pub use registration::{
    EventChannel, OLD_PREFIXES, REGISTRATION_PREFIXES, Registered, Transport, decode_registration, encode_card,
    encode_channel, encode_instance,
};
pub use sequences::{
    PlacedPrompt, SequenceChange, SequenceStep, SequencesForm, decode_sequences, decode_sequences_json,
    encode_sequences, uuid,
};
pub use stats::{Endpoint, Info, Reply, VERSION_BEFORE_0_6, decode_info, decode_stats};

use std::fmt;

use serde_json::Number;

use crate::fleet::{Reason, WorkerId};

/// Longer JSON is refused unread. A STATS reply of a real worker with 20 endpoints takes some 10 KB.
pub const MAX_MESSAGE: usize = 256 * 1024;

/// The same of MessagePack; NATS takes no longer messages by default. The placement of a prompt of 100,000 tokens is 60 KB.
pub const MAX_EVENT: usize = 1024 * 1024;

/// Bytes that are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {detail}")]
pub struct Malformed {
    /// What was expected.
    pub what: &'static str,
    /// The kind of fault.
    pub reason: Reason,
    /// The fault itself.
    pub detail: String,
}

/// Decodes JSON of a bounded size.
fn from_json<'a, T: serde::Deserialize<'a>>(what: &'static str, bytes: &'a [u8]) -> Result<T, Malformed> {
    if bytes.len() > MAX_MESSAGE {
        let detail = format!("{} bytes, more than {MAX_MESSAGE}", bytes.len());
        return Err(Malformed { what, reason: Reason::TooLarge, detail });
    }
    serde_json::from_slice(bytes).map_err(|error| {
        let reason = match error.classify() {
            serde_json::error::Category::Eof => Reason::Truncated,
            serde_json::error::Category::Data => Reason::WrongShape,
            serde_json::error::Category::Syntax | serde_json::error::Category::Io => Reason::Malformed,
        };
        Malformed { what, reason, detail: error.to_string() }
    })
}

/// A count: a whole number that OTLP's signed integers can hold.
fn count(what: &'static str, field: &str, number: &Number) -> Result<u64, Malformed> {
    number.as_u64().filter(|count| is_count(*count)).ok_or_else(|| out_of_range(what, field, number))
}

/// The same of MessagePack's whole number.
fn count_of(what: &'static str, field: &str, number: u64) -> Result<u64, Malformed> {
    Some(number).filter(|count| is_count(*count)).ok_or_else(|| out_of_range(what, field, &number))
}

/// An `i64` until 0.5, a `u64` later: the same 64 bits.
fn worker_id(what: &'static str, number: &Number) -> Result<WorkerId, Malformed> {
    let signed = || number.as_i64().map(i64::cast_unsigned);
    number.as_u64().or_else(signed).map(WorkerId).ok_or_else(|| out_of_range(what, "worker_id", number))
}

fn is_count(number: u64) -> bool {
    i64::try_from(number).is_ok()
}

/// A share that Dynamo computes as `f32`, 0..1. JSON shows it with the rounding of some release or other
/// (0.7699999809265137, 0.77): the shortest decimal of the `f32` is what was meant.
fn ratio(what: &'static str, field: &str, number: &Number) -> Result<f64, Malformed> {
    #[expect(clippy::cast_possible_truncation, reason = "an f32 is what the worker had")]
    let meant = number.as_f64().map(|value| value as f32).filter(|value| value.is_finite() && *value >= 0.0);
    meant.and_then(|value| value.to_string().parse().ok()).ok_or_else(|| out_of_range(what, field, number))
}

fn out_of_range(what: &'static str, field: &str, number: &dyn fmt::Display) -> Malformed {
    Malformed { what, reason: Reason::OutOfRange, detail: format!("{field} is {number}") }
}
