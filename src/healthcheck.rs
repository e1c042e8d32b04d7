//! Asks a running bridge how it is: for a container's health check, in an image that has no other program.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use clap::Args;

use crate::config::WebOptions;

const TIMEOUT: Duration = Duration::from_secs(3);
/// An answer is a few lines.
const LONGEST_ANSWER: u64 = 64 * 1024;

/// What is asked, and of whom.
#[derive(Debug, Clone, Args)]
pub struct HealthcheckOptions {
    /// Ask whether it is alive (/livez) instead of ready (/readyz)
    #[arg(long)]
    live: bool,
    #[command(flatten)]
    web: WebOptions,
}

/// Why the bridge is not well. One line each, with what to change.
#[derive(Debug, thiserror::Error)]
pub enum HealthcheckError {
    /// Nobody answers, or not in time.
    #[error("no bridge answers on {address}: {source}; check --host and --port")]
    Silent {
        /// Who was asked.
        address: SocketAddr,
        /// From the network.
        source: io::Error,
    },
    /// It says so itself.
    #[error("{0}")]
    Unwell(String),
}

/// Asks the bridge that listens with the same `--host` and `--port`, over loopback where it listens everywhere.
///
/// # Errors
/// It does not answer, or not with success.
pub fn run(options: &HealthcheckOptions) -> Result<(), HealthcheckError> {
    let path = if options.live { "/livez" } else { "/readyz" };
    let asked = |host: IpAddr| {
        let address = SocketAddr::new(host, options.web.port);
        ask(address, path).map_err(|source| HealthcheckError::Silent { address, source })
    };
    let answer = match options.web.host {
        // By IPv4 it listens in any case, but a machine may have none.
        None => asked(Ipv4Addr::LOCALHOST.into()).or_else(|error| asked(Ipv6Addr::LOCALHOST.into()).map_err(|_| error)),
        Some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)) => asked(Ipv4Addr::LOCALHOST.into()),
        Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED)) => asked(Ipv6Addr::LOCALHOST.into()),
        Some(host) => asked(host),
    }?;
    let (head, reasons) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status == "200" { Ok(()) } else { Err(HealthcheckError::Unwell(one_line(status, reasons))) }
}

fn one_line(status: &str, reasons: &str) -> String {
    let reasons: Vec<_> = reasons.lines().collect();
    if reasons.is_empty() { format!("the answer is {status:?}") } else { reasons.join("; ") }
}

fn ask(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(LONGEST_ANSWER).read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
