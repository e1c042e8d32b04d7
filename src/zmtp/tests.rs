use proptest::prelude::*;

use super::*;

const KEEP: u32 = 100_000;
const LONG: usize = KEEP as usize;

/// Decodes bytes that come in pieces of these sizes, again and again.
fn decode(bytes: &[u8], pieces: &[usize]) -> (Vec<Item>, Option<Violation>) {
    let (mut decoder, mut buffer, mut items) = (Decoder::new(KEEP), BytesMut::new(), Vec::new());
    let mut rest = bytes;
    for piece in pieces.iter().cycle() {
        let (now, later) = rest.split_at((*piece).clamp(1, rest.len().max(1)).min(rest.len()));
        buffer.extend_from_slice(now);
        rest = later;
        loop {
            match decoder.next(&mut buffer) {
                Ok(Some(item)) => items.push(item),
                Ok(None) => break,
                Err(violation) => return (items, Some(violation)),
            }
        }
        assert!(buffer.len() < LONG, "what is kept is bounded");
        if rest.is_empty() {
            return (items, None);
        }
    }
    (items, None)
}

fn message(parts: &[&[u8]]) -> Item {
    Item::Message(parts.iter().map(|part| Bytes::copy_from_slice(part)).collect())
}

#[test]
fn a_frame_without_an_end_costs_nothing() {
    for flags in [2, 3] {
        for length in [u64::MAX, 1 << 63, (1 << 63) - 1, 1 << 40, MAX_PASSED + 1] {
            let bytes = [&[flags], &length.to_be_bytes()[..]].concat();
            assert_eq!(decode(&bytes, &[100]), (vec![], Some(Violation::Length)), "{length:x}");
        }
    }
    let command = [&[6], &(MAX_COMMAND + 1).to_be_bytes()[..]].concat();
    assert_eq!(decode(&command, &[100]).1, Some(Violation::Length));
}

#[test]
fn a_message_without_an_end_costs_nothing() {
    let endless = [1, 0].repeat(MAX_PARTS + 1);
    assert_eq!(decode(&endless, &[1]), (vec![], Some(Violation::Parts)));
    let long = vec![0; LONG];
    let mut parts = encode_message(&[&b"topic"[..], &long, &long]);
    parts.extend(encode_message(&[b"next"]));
    for piece in [1000, 16_384, usize::MAX] {
        let (items, violation) = decode(&parts, &[piece]);
        assert_eq!(items, [Item::TooLong(Some(Bytes::from_static(b"topic"))), message(&[b"next"])]);
        assert_eq!(violation, None);
    }
    let more = [&[3], &(LONG as u64).to_be_bytes()[..], &vec![0; LONG]].concat();
    let (items, violation) = decode(&more.repeat(700), &[1 << 20]);
    assert_eq!((items, violation), (vec![], Some(Violation::Length)));
}

#[test]
fn what_is_no_frame_is_a_violation() {
    for flags in [5, 7, 8, 0x80, b'H'] {
        assert_eq!(decode(&[flags, 0], &[2]).1, Some(Violation::Frame), "{flags}");
    }
    let within = [&[1, 1, b'a'][..], &encode_command("PING", b"")].concat();
    assert_eq!(decode(&within, &[1]).1, Some(Violation::Frame));
}

#[test]
fn a_greeting_is_that_of_version_3_without_security() {
    assert_eq!(check_greeting(&GREETING), Ok(()));
    let changed = |at: usize, byte| {
        let mut greeting = GREETING;
        greeting[at] = byte;
        check_greeting(&greeting)
    };
    assert_eq!(changed(11, 1), Ok(()));
    assert_eq!(changed(10, 1), Err(Violation::Greeting));
    assert_eq!(changed(0, b'H'), Err(Violation::Greeting));
    assert_eq!(changed(9, 0), Err(Violation::Greeting));
    assert_eq!(changed(12, b'C'), Err(Violation::Mechanism));
    assert_eq!(changed(16, b'S'), Err(Violation::Mechanism));
}

#[test]
fn the_socket_type_is_found_among_the_other_properties() {
    let ready = b"\x08Identity\0\0\0\x02ab\x0bsocket-type\0\0\0\x03PUB";
    assert_eq!(socket_type(ready), Ok(&b"PUB"[..]));
    for length in 0..ready.len() {
        assert!(socket_type(&ready[..length]).is_err(), "{length}");
    }
    assert_eq!(socket_type(b"\x01a\xff\xff\xff\xff"), Err(Violation::Command));
}

fn parts() -> impl Strategy<Value = Vec<Vec<u8>>> {
    proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..600), 1..=MAX_PARTS)
}

proptest! {
    #[test]
    fn messages_are_decoded_alike_however_they_come(
        messages in proptest::collection::vec(parts(), 1..5),
        pieces in proptest::collection::vec(1_usize..700, 1..5),
    ) {
        let mut bytes = encode_command("PING", b"\0\0");
        bytes.extend(messages.iter().flat_map(|parts| encode_message(parts)));
        let (items, violation) = decode(&bytes, &pieces);
        prop_assert_eq!(violation, None);
        prop_assert!(matches!(&items[0], Item::Command(body) if command(body) == Ok((&b"PING"[..], &b"\0\0"[..]))));
        let expected = messages.into_iter().map(|parts| Item::Message(parts.into_iter().map(Bytes::from).collect()));
        prop_assert_eq!(&items[1..], expected.collect::<Vec<_>>());
    }

    #[test]
    fn no_bytes_make_it_panic(
        bytes in proptest::collection::vec(prop_oneof![0_u8..8, any::<u8>()], 0..300),
        pieces in proptest::collection::vec(1_usize..50, 1..5),
    ) {
        let (items, _) = decode(&bytes, &pieces);
        for item in items {
            if let Item::Command(body) = item {
                let _ = command(&body).and_then(|(_, data)| socket_type(data));
            }
        }
    }
}
