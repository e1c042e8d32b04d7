//! Load events: JSON of 0.4 to 0.8, MessagePack of 0.9 on.

#![no_main]

use dynamo_metrics::wire;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    wire::decode_load_event(bytes).ok();
    wire::decode_active_load_json(bytes).ok();
    wire::decode_active_load(7, bytes).ok();
});
