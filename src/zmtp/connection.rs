//! A connection to one peer, either way round.

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::coop;

use super::{Decoder, GREETING, Item, Violation, check_greeting, command, encode_command, encode_message, socket_type};

/// Asked of the kernel at a time. Nothing is held while a peer is silent.
const CHUNK: usize = 16 * 1024;
/// A peer that stops in the middle of a message for so long is gone.
const STALL: Duration = Duration::from_secs(30);
/// A peer whose network is cut is noticed after 10 s of silence and 3 unanswered probes.
const KEEPALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(5)).with_retries(3);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    #[error("the peer closed the connection")]
    Closed,
    #[error("the peer stopped in the middle of a message")]
    Stalled,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Violation(#[from] Violation),
}

/// What a peer must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SocketType {
    Publisher,
    Subscriber,
}

impl SocketType {
    fn says(self) -> &'static [u8] {
        match self {
            Self::Publisher => b"PUB",
            Self::Subscriber => b"SUB",
        }
    }

    fn is_said_by(self, name: &[u8]) -> bool {
        match self {
            Self::Publisher => matches!(name, b"PUB" | b"XPUB"),
            Self::Subscriber => matches!(name, b"SUB" | b"XSUB"),
        }
    }
}

/// A peer that has introduced itself.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    buffer: BytesMut,
    decoder: Decoder,
}

impl Connection {
    /// Exchanges introductions over a new connection, as `own` with a peer that must be `peer`, and of which messages of
    /// so many bytes are kept. A mute peer makes it wait for ever: the caller has the clock.
    pub(crate) async fn open(stream: TcpStream, own: SocketType, peer: SocketType, keep: u32) -> Result<Self, Ended> {
        stream.set_nodelay(true)?;
        SockRef::from(&stream).set_tcp_keepalive(&KEEPALIVE)?;
        let mut connection = Self { stream, buffer: BytesMut::new(), decoder: Decoder::new(keep) };
        connection.stream.write_all(&GREETING).await?;
        while connection.buffer.len() < GREETING.len() {
            connection.fill().await?;
        }
        let greeting = connection.buffer.split_to(GREETING.len());
        check_greeting(greeting.first_chunk().ok_or(Violation::Greeting)?)?;
        let name = own.says();
        let data = [&[11], &b"Socket-Type"[..], &[0, 0, 0, super::short(name.len())], name].concat();
        connection.stream.write_all(&encode_command("READY", &data)).await?;
        let Item::Command(body) = connection.item().await? else {
            return Err(Violation::Frame.into());
        };
        match command(&body)? {
            (b"READY", data) if peer.is_said_by(socket_type(data)?) => Ok(connection),
            (b"READY", _) => Err(Violation::SocketType.into()),
            (b"ERROR", _) => Err(Violation::Refused.into()),
            _ => Err(Violation::Command.into()),
        }
    }

    /// Subscribes to messages whose first part starts with `prefix`.
    pub(crate) async fn subscribe(&mut self, prefix: &str) -> Result<(), Ended> {
        let message = encode_message(&[[b"\x01", prefix.as_bytes()].concat()]);
        Ok(self.stream.write_all(&message).await?)
    }

    pub(crate) async fn send(&mut self, encoded: &[u8]) -> Result<(), Ended> {
        Ok(self.stream.write_all(encoded).await?)
    }

    /// The next message, or that one was too long. Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<Item, Ended> {
        loop {
            match self.item().await? {
                Item::Command(body) => self.obey(&body)?,
                message => return Ok(message),
            }
        }
    }

    fn obey(&mut self, body: &Bytes) -> Result<(), Ended> {
        match command(body)? {
            // Two bytes say how long the peer will wait; the rest is to be sent back.
            (b"PING", data) => {
                let context = data.get(2..18.min(data.len())).ok_or(Violation::Command)?;
                let pong = encode_command("PONG", context);
                // It fits in the socket's buffer, where nothing else ever is, unless the peer does not read.
                if self.stream.try_write(&pong)? == pong.len() { Ok(()) } else { Err(Ended::Stalled) }
            }
            (b"ERROR", _) => Err(Violation::Refused.into()),
            // Those of later versions are none of a subscriber's business.
            _ => Ok(()),
        }
    }

    /// Cancel safe.
    async fn item(&mut self) -> Result<Item, Ended> {
        loop {
            if let Some(item) = self.decoder.next(&mut self.buffer)? {
                return Ok(item);
            }
            self.fill().await?;
        }
    }

    /// Reads something. Cancel safe.
    async fn fill(&mut self) -> Result<(), Ended> {
        // However fast the peer sends, others have their turn.
        coop::consume_budget().await;
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
        if self.buffer.is_empty() && self.decoder.is_between() {
            self.stream.readable().await?;
        } else {
            tokio::time::timeout(STALL, self.stream.readable()).await.map_err(|_| Ended::Stalled)??;
        }
        self.buffer.reserve(CHUNK);
        match self.stream.try_read_buf(&mut self.buffer) {
            Ok(0) => Err(Ended::Closed),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
