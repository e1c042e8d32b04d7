//! ZMTP 3.0, the protocol of ZMQ over TCP: one publisher, one subscriber, no security.
//!
//! Why not a ZMQ library: libzmq is C, and the `zeromq` crate believes any frame length up to 2^63 and reserves it before
//! a byte of it came, so that one hostile publisher would end the process; it keeps any number of parts, waits for ever on
//! a peer that accepts and stays mute, and reconnects in tasks of its own. Here a message is bounded before it is kept, and
//! a connection belongs to whoever made it.
//!
//! ```text
//!  both: greeting (64 bytes)      both: command READY (Socket-Type)
//!  subscriber: message 1, topic   publisher: messages, whose first part starts with the topic
//! ```

mod connection;
mod publisher;

use bytes::{Buf, Bytes, BytesMut};

pub(crate) use connection::{Connection, Ended, SocketType};
pub(crate) use publisher::Publisher;

/// A message that is too long to keep is passed over as it comes, up to this size. Beyond, the peer speaks something else.
const MAX_PASSED: u64 = 64 * 1024 * 1024;
/// Dynamo's messages have four parts.
const MAX_PARTS: usize = 8;
/// READY with its metadata is the longest.
const MAX_COMMAND: u64 = 4096;

/// Signature, version 3.0, mechanism NULL, and zeros.
const GREETING: [u8; 64] = {
    let mut greeting = [0; 64];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    let mechanism = b"NULL";
    let mut at = 0;
    while at < mechanism.len() {
        greeting[12 + at] = mechanism[at];
        at += 1;
    }
    greeting
};

/// What a peer may not say. It ends the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The first 64 bytes are something else's.
    #[error("the greeting is not that of ZMTP 3")]
    Greeting,
    /// Dynamo uses none.
    #[error("the peer wants a security mechanism")]
    Mechanism,
    /// Sockets that do not fit.
    #[error("the peer is no publisher, or no subscriber")]
    SocketType,
    /// The command ERROR.
    #[error("the peer refuses the connection")]
    Refused,
    /// Reserved bits, or a command where it may not be.
    #[error("a malformed frame")]
    Frame,
    /// Its lengths do not fit.
    #[error("a malformed command")]
    Command,
    /// More parts than any of Dynamo's messages has.
    #[error("a message of more than {MAX_PARTS} parts")]
    Parts,
    /// Too long even to be passed over.
    #[error("a message of more than {MAX_PASSED} bytes")]
    Length,
}

fn check_greeting(greeting: &[u8; 64]) -> Result<(), Violation> {
    let mut mechanism = [0; 20];
    mechanism[..4].copy_from_slice(b"NULL");
    if greeting[0] != 0xff || greeting[9] & 1 != 1 || greeting[10] < 3 {
        Err(Violation::Greeting)
    } else if greeting[12..32] != mechanism {
        Err(Violation::Mechanism)
    } else {
        Ok(())
    }
}

/// What a peer said.
#[derive(Debug, PartialEq, Eq)]
pub enum Item {
    /// A command's body: its name with a length before it, then its data.
    Command(Bytes),
    /// A message's parts, one at least.
    Message(Vec<Bytes>),
    /// A message that was too long to keep, with its first part where that came whole.
    TooLong(Option<Bytes>),
}

/// Makes items of bytes.
#[derive(Debug)]
pub struct Decoder {
    /// A message and its frame headers are kept up to this size.
    keep: u64,
    passing: Option<Passing>,
}

/// A message that is passed over.
#[derive(Debug)]
struct Passing {
    first: Option<Bytes>,
    /// Bytes of the current frame still to come.
    left: u64,
    /// Whether another frame follows.
    more: bool,
    /// Bytes of the message so far, and of the current frame.
    total: u64,
}

#[derive(Debug, Clone, Copy)]
struct Frame {
    header: usize,
    length: u64,
    command: bool,
    more: bool,
}

impl Frame {
    /// `None` until its header is whole.
    fn read(bytes: &[u8]) -> Result<Option<Self>, Violation> {
        let Some((&flags, rest)) = bytes.split_first() else {
            return Ok(None);
        };
        // Bits: 1 more frames follow, 2 a length of 8 bytes, 4 a command, which is one frame. The others are reserved.
        let (more, long, command) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
        if flags > 7 || (command && more) {
            return Err(Violation::Frame);
        }
        let (header, length) = if long {
            (9, rest.first_chunk().map(|length| u64::from_be_bytes(*length)))
        } else {
            (2, rest.first().map(|length| u64::from(*length)))
        };
        let Some(length) = length else { return Ok(None) };
        let limit = if command { MAX_COMMAND } else { MAX_PASSED };
        if length > limit { Err(Violation::Length) } else { Ok(Some(Self { header, length, command, more })) }
    }
}

impl Decoder {
    /// For the start of a stream, after the greeting; longer messages than `keep` bytes are passed over.
    #[must_use]
    pub fn new(keep: u32) -> Self {
        Self { keep: keep.into(), passing: None }
    }

    /// Whether the next byte begins a message or command.
    fn is_between(&self) -> bool {
        self.passing.is_none()
    }

    /// Takes the next item from the front of `buffer`; `None` where more bytes are needed. What stays in `buffer` is less
    /// than what may be kept, or a frame's header.
    ///
    /// # Errors
    /// What ends the connection.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Item>, Violation> {
        let mut parts = Vec::new();
        let mut at = 0;
        while self.passing.is_none() {
            let Some(frame) = Frame::read(&buffer[at..])? else {
                return Ok(None);
            };
            if frame.command && !parts.is_empty() {
                return Err(Violation::Frame);
            }
            if parts.len() == MAX_PARTS {
                return Err(Violation::Parts);
            }
            let start = at + frame.header;
            let total = start as u64 + frame.length;
            if total > self.keep && !frame.command {
                let first =
                    parts.first().map(|part: &std::ops::Range<usize>| Bytes::copy_from_slice(&buffer[part.clone()]));
                buffer.advance(start);
                self.passing = Some(Passing { first, left: frame.length, more: frame.more, total });
                break;
            }
            // A usize holds what may be kept.
            let end = start + usize::try_from(frame.length).unwrap_or(usize::MAX);
            if buffer.len() < end {
                return Ok(None);
            }
            if frame.command {
                buffer.advance(start);
                return Ok(Some(Item::Command(buffer.split_to(end - start).freeze())));
            }
            parts.push(start..end);
            at = end;
            if !frame.more {
                let whole = buffer.split_to(end).freeze();
                return Ok(Some(Item::Message(parts.into_iter().map(|part| whole.slice(part)).collect())));
            }
        }
        self.pass(buffer)
    }

    fn pass(&mut self, buffer: &mut BytesMut) -> Result<Option<Item>, Violation> {
        while let Some(passing) = &mut self.passing {
            let here = usize::try_from(passing.left).unwrap_or(usize::MAX).min(buffer.len());
            buffer.advance(here);
            passing.left -= here as u64;
            if passing.left > 0 {
                break;
            }
            if !passing.more {
                let first = passing.first.take();
                self.passing = None;
                return Ok(Some(Item::TooLong(first)));
            }
            let Some(frame) = Frame::read(buffer)? else { break };
            passing.total += frame.header as u64 + frame.length;
            if frame.command {
                return Err(Violation::Frame);
            }
            if passing.total > MAX_PASSED {
                return Err(Violation::Length);
            }
            buffer.advance(frame.header);
            (passing.left, passing.more) = (frame.length, frame.more);
        }
        Ok(None)
    }
}

/// Splits a command's body into its name and data.
fn command(body: &Bytes) -> Result<(&[u8], &[u8]), Violation> {
    let (&length, rest) = body.split_first().ok_or(Violation::Command)?;
    rest.split_at_checked(length.into()).ok_or(Violation::Command)
}

/// The property `Socket-Type` of a READY command's data.
fn socket_type(mut data: &[u8]) -> Result<&[u8], Violation> {
    while let Some((&length, rest)) = data.split_first() {
        let (name, rest) = rest.split_at_checked(length.into()).ok_or(Violation::Command)?;
        let (length, rest) = rest.split_first_chunk().ok_or(Violation::Command)?;
        let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| Violation::Command)?;
        let (value, rest) = rest.split_at_checked(length).ok_or(Violation::Command)?;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return Ok(value);
        }
        data = rest;
    }
    Err(Violation::SocketType)
}

/// Encodes a command of less than 256 bytes.
fn encode_command(name: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![4, short(1 + name.len() + data.len()), short(name.len())];
    bytes.extend(name.as_bytes());
    bytes.extend(data);
    bytes
}

fn short(length: usize) -> u8 {
    debug_assert!(length < 256, "commands are short");
    length.to_be_bytes()[size_of::<usize>() - 1]
}

/// Encodes a message.
pub(crate) fn encode_message(parts: &[impl AsRef<[u8]>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, part) in parts.iter().enumerate() {
        let part = part.as_ref();
        let more = u8::from(number + 1 < parts.len());
        if let Ok(length) = u8::try_from(part.len()) {
            bytes.extend([more, length]);
        } else {
            bytes.push(more | 2);
            bytes.extend((part.len() as u64).to_be_bytes());
        }
        bytes.extend(part);
    }
    bytes
}

#[cfg(test)]
mod tests;
