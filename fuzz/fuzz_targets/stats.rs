//! Replies to a scrape.

#![no_main]

use dynamo_metrics::wire;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(reply) = wire::decode_stats(bytes) {
        for data in reply.endpoints.iter().filter_map(|endpoint| endpoint.data) {
            wire::decode_load(data.get().as_bytes()).ok();
        }
    }
    wire::decode_info(bytes).ok();
});
