//! A publisher, as Dynamo's workers are: for mock workers.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

use super::{Connection, Ended, Item, SocketType, encode_message};

/// Messages kept for a subscriber that reads slowly; it misses those beyond, as is ZMQ's way.
const QUEUE: usize = 1024;
const SUBSCRIPTIONS: usize = 64;
const MAX_SUBSCRIPTION: u32 = 4096;
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves subscribers until it is dropped.
#[derive(Debug)]
pub(crate) struct Publisher {
    address: SocketAddr,
    messages: broadcast::Sender<Message>,
    subscriptions: watch::Receiver<u64>,
    _serving: AbortOnDropHandle<()>,
}

#[derive(Debug, Clone)]
struct Message {
    encoded: Bytes,
    topic: Bytes,
}

impl Publisher {
    /// Listens; port 0 lets the system choose.
    ///
    /// # Errors
    /// The address cannot be had.
    pub(crate) async fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let (messages, _) = broadcast::channel(QUEUE);
        let (counter, subscriptions) = watch::channel(0);
        let serving = tokio::spawn(serve(listener, messages.clone(), counter));
        Ok(Self { address, messages, subscriptions, _serving: AbortOnDropHandle::new(serving) })
    }

    /// Where it listens, in ZMQ's spelling.
    pub(crate) fn endpoint(&self) -> String {
        format!("tcp://{}", self.address)
    }

    /// Subscriptions received since it listens.
    pub(crate) fn subscriptions(&self) -> watch::Receiver<u64> {
        self.subscriptions.clone()
    }

    /// Hands a message to every subscriber there is.
    pub(crate) fn publish(&self, parts: &[Vec<u8>]) {
        let topic = parts.first().cloned().unwrap_or_default().into();
        // Nobody may be subscribed.
        self.messages.send(Message { encoded: encode_message(parts).into(), topic }).ok();
    }
}

async fn serve(listener: TcpListener, messages: broadcast::Sender<Message>, counter: watch::Sender<u64>) {
    let mut subscribers = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let subscriber = subscriber(stream, messages.subscribe(), counter.clone());
                    subscribers.spawn(subscriber);
                }
                Err(error) => {
                    debug!("A subscriber was not accepted: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = subscribers.join_next() => {}
        }
    }
}

async fn subscriber(stream: TcpStream, mut messages: broadcast::Receiver<Message>, counter: watch::Sender<u64>) {
    let ended = async {
        let opening = Connection::open(stream, SocketType::Publisher, SocketType::Subscriber, MAX_SUBSCRIPTION);
        let mut connection = tokio::time::timeout(OPEN_TIMEOUT, opening).await.map_err(|_| Ended::Stalled)??;
        let mut prefixes: Vec<Bytes> = Vec::new();
        loop {
            tokio::select! {
                item = connection.next() => {
                    let Item::Message(parts) = item? else { continue };
                    match parts.first().and_then(|part| part.split_first()) {
                        Some((1, prefix)) if prefixes.len() < SUBSCRIPTIONS => {
                            prefixes.push(Bytes::copy_from_slice(prefix));
                            counter.send_modify(|count| *count += 1);
                        }
                        Some((0, prefix)) => prefixes.retain(|known| known != prefix),
                        _ => {}
                    }
                }
                message = messages.recv() => match message {
                    Ok(message) if prefixes.iter().any(|prefix| message.topic.starts_with(prefix)) => {
                        connection.send(&message.encoded).await?;
                    }
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return Ok::<(), Ended>(()),
                },
            }
        }
    };
    if let Err(error) = ended.await {
        debug!("A subscriber left: {error}");
    }
}
