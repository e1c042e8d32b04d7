//! Entries of discovery: key paths and values.

#![no_main]

use dynamo_metrics::wire::{REGISTRATION_PREFIXES, decode_registration};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &str, &[u8])| {
    let (kind, name, value) = input;
    let prefix = REGISTRATION_PREFIXES[usize::from(kind) % REGISTRATION_PREFIXES.len()];
    decode_registration(&[prefix, name].concat(), value).ok();
    decode_registration(name, value).ok();
});
