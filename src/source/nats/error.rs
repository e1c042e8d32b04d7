//! What can go wrong with NATS.

use std::io;
use std::path::Path;
use std::time::Duration;

/// Why the bridge cannot hear NATS. One line each, with what to change.
#[derive(Debug, thiserror::Error)]
pub enum NatsError {
    /// An option is malformed; checked at start already.
    #[error("{0}")]
    Option(String),
    /// Nobody answered in time.
    #[error("NATS at {servers} could not be reached within {}: {last}; check --nats-server [NATS_SERVER], or wait longer with --nats-connect-timeout{elsewhere}", humantime::format_duration(*.timeout))]
    Unreachable {
        /// Without credentials.
        servers: String,
        /// How long it was tried.
        timeout: Duration,
        /// What the last attempt met.
        last: String,
        /// The other ways to find workers, where NATS was only the last resort.
        elsewhere: &'static str,
    },
    /// The server does not know the user, or wants one.
    #[error("NATS at {servers} refused the credentials: {detail}; check {option}")]
    Refused {
        /// Without credentials.
        servers: String,
        /// The server's words.
        detail: String,
        /// Where they came from, or could come from.
        option: &'static str,
    },
    /// A file is missing, or is not what it should be.
    #[error("cannot use {path}: {source}; check {option}")]
    File {
        /// Which option named it.
        option: &'static str,
        /// As given.
        path: String,
        /// From the file system.
        source: io::Error,
    },
    /// Certificate and key are readable, and of no use.
    #[error("the certificates for NATS cannot be used: {detail}; check {option}")]
    Certificates {
        /// What TLS says of them.
        detail: String,
        /// Which options named them.
        option: &'static str,
    },
    /// One side does not take the other's certificate.
    #[error("NATS at {servers} refused TLS, or was refused: {detail}; check {option}")]
    Tls {
        /// Without credentials.
        servers: String,
        /// What TLS says.
        detail: String,
        /// What to change.
        option: &'static str,
    },
    /// The server did not accept a subscription.
    #[error("cannot subscribe on NATS: {0}")]
    Subscribe(String),
    /// The client ended, though it was to reconnect for ever.
    #[error("the NATS client ended")]
    Ended,
}

impl NatsError {
    pub(super) fn file(option: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File { option, path: path.display().to_string(), source }
    }
}
