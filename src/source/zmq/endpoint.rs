//! Where a publisher listens.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::str::FromStr;

use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::process;

/// Names looked up at a time. Dynamo announces addresses; and a resolver that is slow with one name is asked for others beside.
static LOOKUPS: Semaphore = Semaphore::const_new(16);
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
        let (name, port) = (name.clone(), self.port);
        let addresses = looked_up(&LOOKUPS, move || Ok((name.as_str(), port).to_socket_addrs()?.collect())).await?;
        TcpStream::connect(&*addresses).await
    }
}

/// What the system's resolver says: it alone knows every way in which a cluster or a machine names its hosts. It cannot be
/// interrupted, so that a turn is over when it has answered, however long ago the caller gave up.
async fn looked_up(
    turns: &'static Semaphore,
    look: impl FnOnce() -> io::Result<Vec<SocketAddr>> + Send + 'static,
) -> io::Result<Vec<SocketAddr>> {
    let turn = turns.acquire().await.map_err(io::Error::other)?;
    process::apart("lookup", move || {
        let _turn = turn;
        look()
    })
    .await?
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::sync::mpsc;
    use tokio::task::JoinSet;

    use super::*;

    #[tokio::test]
    async fn names_that_nobody_answers_take_a_few_threads_whoever_gives_up() {
        static TURNS: Semaphore = Semaphore::const_new(3);
        let (started, mut looking) = mpsc::unbounded_channel();
        let (answer, answers) = std::sync::mpsc::channel::<()>();
        let answers = Arc::new(Mutex::new(answers));
        let mut waiting = JoinSet::new();
        for number in 0..600 {
            let (started, answers) = (started.clone(), Arc::clone(&answers));
            waiting.spawn(looked_up(&TURNS, move || {
                started.send(number).unwrap();
                answers.lock().unwrap().recv().ok();
                Ok(Vec::new())
            }));
        }
        for _ in 0..3 {
            looking.recv().await.unwrap();
        }
        waiting.shutdown().await;
        let known = SocketAddr::from(([127, 0, 0, 1], 1));
        let late = tokio::spawn(looked_up(&TURNS, move || Ok(vec![known])));
        tokio::task::yield_now().await;
        assert!(looking.try_recv().is_err() && TURNS.available_permits() == 0 && !late.is_finished());
        drop(answer);
        assert_eq!(late.await.unwrap().unwrap(), [known]);
        assert!(looking.try_recv().is_err(), "those who had given up are not looked up any more");
    }

    #[tokio::test]
    async fn a_name_is_looked_up() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("tcp://localhost:{}", listener.local_addr().unwrap().port());
        endpoint.parse::<Endpoint>().unwrap().connect().await.unwrap();
    }

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
