//! NATS subjects.

#![no_main]

use dynamo_metrics::target;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|subject: &str| {
    target::parse_event_subject(subject);
    target::parse_endpoint_subject("dynamo_backend", subject);
});
