//! The envelope of numbered events.

#![no_main]

use dynamo_metrics::wire;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // By NATS as it is, and with what is in it.
    if let Ok(envelope) = wire::decode_envelope(bytes) {
        wire::decode_active_load(envelope.publisher, envelope.payload).ok();
        wire::decode_forward_pass(None, envelope.payload).ok();
        wire::decode_sequences(envelope.payload).ok();
    }
    // By ZMQ in parts: the first bytes say where they end.
    let Some((ends, rest)) = bytes.split_first_chunk::<3>() else { return };
    let mut parts = Vec::new();
    let mut left = rest;
    for end in ends {
        let (part, tail) = left.split_at(usize::from(*end).min(left.len()));
        parts.push(part);
        left = tail;
    }
    parts.push(left);
    wire::decode_frames(&parts).ok();
});
