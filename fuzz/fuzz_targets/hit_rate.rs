//! KV hit rate events.

#![no_main]

use dynamo_metrics::wire;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    wire::decode_hit_rate("dynamo".into(), bytes).ok();
    wire::decode_hit_rate_msgpack("dynamo".into(), bytes).ok();
});
