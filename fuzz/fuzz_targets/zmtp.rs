//! Frames of ZMTP.

#![no_main]

use bytes::BytesMut;
use dynamo_metrics::zmtp::Decoder;
use libfuzzer_sys::fuzz_target;

/// As little as fits, so that messages are passed over too.
const KEPT: u32 = 64;

// A stream that comes in two pieces.
fuzz_target!(|pieces: (&[u8], &[u8])| {
    let (mut decoder, mut buffer) = (Decoder::new(KEPT), BytesMut::new());
    for piece in [pieces.0, pieces.1] {
        buffer.extend_from_slice(piece);
        while let Ok(Some(_)) = decoder.next(&mut buffer) {}
    }
});
