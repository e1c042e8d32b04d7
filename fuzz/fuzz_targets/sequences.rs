//! What routers tell each other of their requests.

#![no_main]

use dynamo_metrics::wire;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    wire::decode_sequences(bytes).ok();
    wire::decode_sequences_json(bytes).ok();
});
