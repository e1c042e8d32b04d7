//! Where a publisher listens.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use tokio::net::{TcpStream, lookup_host};
use tokio::sync::Semaphore;

/// Names looked up at a time: each takes a thread until it is answered, whoever waits. Dynamo announces addresses.
static LOOKUPS: Semaphore = Semaphore::const_new(4);
/// A name has this many characters at most.
const MAX_NAME: usize = 253;

/// `tcp://host:port`, the one transport between machines.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Endpoint {
    host: Host,
    port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Host {
    Address(IpAddr),
    Name(String),
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (host, port) = text.strip_prefix("tcp://")?.rsplit_once(':')?;
            let port =
                port.parse().ok().filter(|number: &u16| *number != 0 && port.bytes().all(|b| b.is_ascii_digit()))?;
            Some(Self { host: Host::parse(host)?, port })
        };
        parse().ok_or_else(|| {
            let shown: String = text.chars().take(MAX_NAME).collect();
            format!("{shown:?} is no endpoint; it is written like tcp://10.0.0.1:5556")
        })
    }
}

impl Host {
    fn parse(text: &str) -> Option<Self> {
        if let Some(address) = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
            return address.parse().ok().map(|address| Self::Address(IpAddr::V6(address)));
        }
        if let Ok(address) = text.parse() {
            return Some(Self::Address(IpAddr::V4(address)));
        }
        let is_name = (1..=MAX_NAME).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
        is_name.then(|| Self::Name(text.to_owned()))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Address(address) => write!(f, "tcp://{}", SocketAddr::new(*address, self.port)),
            Host::Name(name) => write!(f, "tcp://{name}:{}", self.port),
        }
    }
}

impl Endpoint {
    /// Connects, without a limit of time.
    pub(super) async fn connect(&self) -> io::Result<TcpStream> {
        let name = match &self.host {
            Host::Address(address) => return TcpStream::connect((*address, self.port)).await,
            Host::Name(name) => name,
        };
        let addresses: Vec<SocketAddr> = {
            let _turn = LOOKUPS.acquire().await.map_err(io::Error::other)?;
            lookup_host((name.as_str(), self.port)).await?.collect()
        };
        TcpStream::connect(&*addresses).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_names_are_endpoints() {
        for text in ["tcp://10.0.0.1:5556", "tcp://[fd00::1]:1", "tcp://worker-0.svc.cluster.local:65535"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let long = format!("tcp://{}:1", "a".repeat(254));
        for text in [
            "",
            "tcp://",
            "tcp://:1",
            "tcp://a",
            "tcp://a:",
            "tcp://a:0",
            "tcp://a:65536",
            "tcp://a:+1",
            "tcp://a:1/b",
            "ipc:///tmp/a",
            "inproc://a",
            "udp://a:1",
            "tcp://*:1",
            "tcp://fd00::1:1",
            "tcp://[a]:1",
            "tcp://a b:1",
            "tcp://eth0;10.0.0.1:1",
            "10.0.0.1:1",
            "TCP://a:1",
            &long,
        ] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }
}
