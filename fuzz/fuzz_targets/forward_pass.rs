//! Passes of engines.

#![no_main]

use dynamo_metrics::wire;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    wire::decode_forward_pass(None, bytes).ok();
});
