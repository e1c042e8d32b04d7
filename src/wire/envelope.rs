//! The envelope round every event of Dynamo 0.9 and later, over whatever transport.

use super::Malformed;
use super::msgpack::{Reader, Writer, found, put};

const WHAT: &str = "event envelope";

/// An event in its envelope. The payload is another MessagePack map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope<'a> {
    /// Dynamo's id of the publisher.
    pub publisher: u64,
    /// The event's number, one more than that of the publisher's event before on this topic.
    pub sequence: u64,
    /// Milliseconds since the Unix epoch, by the publisher's clock.
    pub published_at: u64,
    /// Dynamo's name of the topic.
    pub topic: &'a str,
    /// The event itself.
    pub payload: &'a [u8],
}

/// Decodes an envelope in place.
///
/// # Errors
/// No such map, or anything after it.
pub fn decode_envelope(bytes: &[u8]) -> Result<Envelope<'_>, Malformed> {
    let (mut publisher, mut sequence, mut published_at, mut topic, mut payload) = (None, None, None, None, None);
    Reader::new(WHAT, bytes)?.only_map(|value, name| match name {
        "publisher_id" => put(WHAT, name, &mut publisher, value.unsigned(name)?),
        "sequence" => put(WHAT, name, &mut sequence, value.unsigned(name)?),
        "published_at" => put(WHAT, name, &mut published_at, value.unsigned(name)?),
        "topic" => put(WHAT, name, &mut topic, value.string(name)?),
        "payload" => put(WHAT, name, &mut payload, value.bytes(name)?),
        _ => Ok(false),
    })?;
    Ok(Envelope {
        publisher: found(WHAT, "publisher_id", publisher)?,
        sequence: found(WHAT, "sequence", sequence)?,
        published_at: found(WHAT, "published_at", published_at)?,
        topic: found(WHAT, "topic", topic)?,
        payload: found(WHAT, "payload", payload)?,
    })
}

/// Encodes an envelope as Dynamo does, to the byte.
#[must_use]
pub fn encode_envelope(envelope: &Envelope<'_>) -> Vec<u8> {
    Writer::map(5)
        .unsigned("publisher_id", envelope.publisher)
        .unsigned("sequence", envelope.sequence)
        .unsigned("published_at", envelope.published_at)
        .string("topic", envelope.topic)
        .bytes("payload", envelope.payload)
        .0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fleet::Reason;

    const ENVELOPE: Envelope<'static> = Envelope {
        publisher: u64::MAX,
        sequence: 3,
        published_at: 1_795_560_000_000,
        topic: "kv_metrics",
        payload: b"\x80",
    };

    #[test]
    fn fields_of_later_releases_are_passed_over() {
        let mut bytes = encode_envelope(&ENVELOPE);
        bytes[0] += 1;
        bytes.extend(b"\xa3new\x92\x81\x01\x02\xc0");
        assert_eq!(decode_envelope(&bytes), Ok(ENVELOPE));
    }

    #[test]
    fn every_part_of_an_envelope_is_refused_as_truncated() {
        let bytes = encode_envelope(&ENVELOPE);
        for length in 0..bytes.len() {
            assert_eq!(decode_envelope(&bytes[..length]).unwrap_err().reason, Reason::Truncated, "{length}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_reason() {
        let envelope = encode_envelope(&ENVELOPE);
        let twice = [b"\x86", &envelope[1..], b"\xa8sequence\x01"].concat();
        let negative = Writer::map(1).0.into_iter().chain(*b"\xa8sequence\xff").collect::<Vec<_>>();
        let large = Writer::map(1).unsigned("sequence", 1).0;
        for (bytes, reason, detail) in [
            (&twice[..], Reason::WrongShape, "two values for sequence"),
            (&negative, Reason::OutOfRange, "sequence is -1"),
            (&large, Reason::WrongShape, "no publisher_id"),
            (&Writer::map(1).string("payload", "text").0, Reason::WrongShape, "payload is not bytes"),
            (&Writer::map(1).bytes("topic", b"bytes").0, Reason::WrongShape, "topic is not text"),
            (&[&envelope[..], b"\xc0"].concat(), Reason::Malformed, "1 bytes after its end"),
        ] {
            let error = decode_envelope(bytes).unwrap_err();
            assert_eq!(error.reason, reason, "{error}");
            assert!(error.detail.contains(detail), "{error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_alike(
            publisher: u64, sequence: u64, published_at: u64, topic: String,
            payload in proptest::collection::vec(any::<u8>(), 0..70_000),
        ) {
            let envelope = Envelope { publisher, sequence, published_at, topic: &topic, payload: &payload };
            let bytes = encode_envelope(&envelope);
            prop_assert_eq!(decode_envelope(&bytes), Ok(envelope));
        }

        #[test]
        fn no_changed_byte_makes_it_panic(at: prop::sample::Index, byte: u8) {
            let mut bytes = encode_envelope(&ENVELOPE);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = decode_envelope(&bytes);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_envelope(&bytes);
        }
    }
}
