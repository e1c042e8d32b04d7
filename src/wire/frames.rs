//! An event as the parts of a ZMQ message (0.9 and later): topic, publisher, sequence, body.

use super::Malformed;
use super::envelope::{Envelope, decode_envelope, encode_envelope};
use crate::fleet::Reason;

const WHAT: &str = "ZMQ event";
const VERSION: u8 = 1;

/// Decodes the parts of one message in place. The first, by which it was subscribed to, is the topic; through a broker it
/// is the whole subject, which ends with the topic.
///
/// # Errors
/// Not four parts, parts of other lengths than they must have, another version, a length that is not that of the
/// envelope, no envelope, or one that says another publisher, sequence or topic than the parts round it.
pub fn decode_frames<'a>(parts: &[&'a [u8]]) -> Result<Envelope<'a>, Malformed> {
    let &[topic, publisher, sequence, body] = parts else {
        return Err(wrong_shape(format!("{} parts, not 4", parts.len())));
    };
    let publisher = number("publisher", publisher)?;
    let sequence = number("sequence", sequence)?;
    let envelope = decode_envelope(unframed(body)?)?;
    if (envelope.publisher, envelope.sequence) != (publisher, sequence) {
        let Envelope { publisher: inner, sequence: number, .. } = envelope;
        return Err(wrong_shape(format!(
            "publisher {publisher} sequence {sequence} outside, publisher {inner} sequence {number} inside"
        )));
    }
    let before = topic.strip_suffix(envelope.topic.as_bytes());
    if !before.is_some_and(|before| before.is_empty() || before.ends_with(b".")) {
        return Err(wrong_shape("one topic outside, another inside".to_owned()));
    }
    Ok(envelope)
}

fn number(name: &str, part: &[u8]) -> Result<u64, Malformed> {
    let bytes = part.try_into().map_err(|_| wrong_shape(format!("{name} has {} bytes, not 8", part.len())))?;
    Ok(u64::from_be_bytes(bytes))
}

/// The envelope within a body.
fn unframed(body: &[u8]) -> Result<&[u8], Malformed> {
    let refuse = |reason, detail| Err(Malformed { what: WHAT, reason, detail });
    let Some((&[version, a, b, c, d], envelope)) = body.split_first_chunk() else {
        return refuse(Reason::Truncated, format!("a body of {} bytes", body.len()));
    };
    if version != VERSION {
        return refuse(Reason::UnknownVersion, format!("version {version}, not {VERSION}"));
    }
    let length = u32::from_be_bytes([a, b, c, d]);
    match u64::from(length).cmp(&(envelope.len() as u64)) {
        std::cmp::Ordering::Equal => Ok(envelope),
        std::cmp::Ordering::Greater => {
            refuse(Reason::Truncated, format!("{} bytes of an envelope of {length}", envelope.len()))
        }
        std::cmp::Ordering::Less => {
            refuse(Reason::Malformed, format!("an envelope of {length} bytes in {}", envelope.len()))
        }
    }
}

fn wrong_shape(detail: String) -> Malformed {
    Malformed { what: WHAT, reason: Reason::WrongShape, detail }
}

/// Encodes the parts of a message that comes straight from its publisher, as Dynamo does, to the byte.
#[must_use]
pub fn encode_frames(envelope: &Envelope<'_>) -> [Vec<u8>; 4] {
    let inner = encode_envelope(envelope);
    // What does not fit in the length is more than any receiver takes.
    let length = u32::try_from(inner.len()).unwrap_or(u32::MAX);
    let body = [&[VERSION], &length.to_be_bytes()[..], &inner].concat();
    let topic = envelope.topic.as_bytes().to_vec();
    [topic, envelope.publisher.to_be_bytes().to_vec(), envelope.sequence.to_be_bytes().to_vec(), body]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ENVELOPE: Envelope<'static> =
        Envelope { publisher: 7, sequence: 3, published_at: 1, topic: "kv_metrics", payload: b"\x80" };

    fn decode(parts: &[Vec<u8>]) -> Result<Envelope<'_>, Malformed> {
        decode_frames(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }

    #[test]
    fn parts_are_decoded_straight_or_through_a_broker() {
        let mut parts = encode_frames(&ENVELOPE);
        assert_eq!(decode(&parts), Ok(ENVELOPE));
        parts[0] = b"namespace.dynamo.kv_metrics".to_vec();
        assert_eq!(decode(&parts), Ok(ENVELOPE));
    }

    #[test]
    fn parts_that_do_not_fit_together_are_refused_with_their_reason() {
        type Spoil = fn(&mut Vec<Vec<u8>>);
        let spoils: [(Spoil, Reason); 12] = [
            (|parts| parts.clear(), Reason::WrongShape),
            (|parts| parts.truncate(3), Reason::WrongShape),
            (|parts| parts.push(Vec::new()), Reason::WrongShape),
            (|parts| parts[0] = b"other".to_vec(), Reason::WrongShape),
            (|parts| parts[0] = b"mykv_metrics".to_vec(), Reason::WrongShape),
            (|parts| parts[1][7] = 8, Reason::WrongShape),
            (|parts| parts[2].truncate(7), Reason::WrongShape),
            (|parts| parts[2][7] = 4, Reason::WrongShape),
            (|parts| parts[3][0] = 2, Reason::UnknownVersion),
            (|parts| parts[3][1] = 0xff, Reason::Truncated),
            (|parts| parts[3].push(0), Reason::Malformed),
            (|parts| parts[3].truncate(4), Reason::Truncated),
        ];
        for (number, (spoil, reason)) in spoils.into_iter().enumerate() {
            let mut parts = encode_frames(&ENVELOPE).to_vec();
            spoil(&mut parts);
            assert_eq!(decode(&parts).unwrap_err().reason, reason, "{number}");
        }
    }

    #[test]
    fn every_part_of_a_body_is_refused_as_truncated() {
        let mut parts = encode_frames(&ENVELOPE);
        while parts[3].pop().is_some() {
            assert_eq!(decode(&parts).unwrap_err().reason, Reason::Truncated);
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_alike(
            publisher: u64, sequence: u64, published_at: u64, topic: String,
            payload in proptest::collection::vec(any::<u8>(), 0..1000),
        ) {
            let envelope = Envelope { publisher, sequence, published_at, topic: &topic, payload: &payload };
            let parts = encode_frames(&envelope);
            prop_assert_eq!(decode(&parts), Ok(envelope));
        }

        #[test]
        fn no_parts_make_it_panic(parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..6)) {
            let _ = decode(&parts);
        }
    }
}
