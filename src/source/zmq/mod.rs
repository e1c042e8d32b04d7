//! Events straight from their publishers, over ZMQ.
//!
//! Every publisher of a wanted topic has a socket of its own, which discovery names ([`ChannelChange`]), and gets a
//! connection and a task of its own here ([`listener`]). It may be gone, mute, behind a cut network, or say anything: that
//! costs this one connection, which is tried again after a pause. What a publisher said over a connection that has ended
//! is no longer known, and the fleet is told so.

mod broker;
mod endpoint;
mod listener;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::registry::ChannelChange;
use crate::fleet::{Channel, Observation, Reason, Rejection, Source, Topic};
use crate::target::NamespaceFilter;
use crate::wire::{EventChannel, Transport};
use broker::Broker;
use endpoint::Endpoint;
use listener::{Hearing, Listener};

pub(crate) use listener::Shared;

/// Addresses at which one publisher may be said to be: the voices of discovery do not change at the same moment.
const MAX_ENDPOINTS: usize = 8;

/// Events over ZMQ.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "ZMQ")]
pub(crate) struct ZmqOptions {
    /// Event broker in Dynamo's spelling, xsub=tcp://host:port,xpub=tcp://host:port, of which the xpub address is used.
    /// Without a broker, every publisher is listened to at the address that discovery names
    #[arg(long, env = "DYN_ZMQ_BROKER_URL", value_name = "ADDRESSES")]
    pub zmq_broker: Option<Broker>,
}

/// How long things may take.
#[derive(Debug, Clone, Copy)]
struct Timing {
    /// From the first packet to the subscription.
    connect: Duration,
    /// The pause after the first failure, and the longest after later ones.
    pause: (Duration, Duration),
    /// How long a message waits for the fold before messages are given up.
    patience: Duration,
    /// Over which messages are counted.
    rate: Duration,
}

impl Timing {
    const DEFAULT: Self = Self {
        connect: Duration::from_secs(5),
        pause: (Duration::from_millis(250), Duration::from_secs(10)),
        patience: Duration::from_millis(250),
        rate: Duration::from_secs(1),
    };
}

/// Listens to every publisher of a wanted topic until `stop`.
///
/// No task of it is left when it returns.
pub(crate) async fn run(
    options: ZmqOptions,
    namespace: NamespaceFilter,
    shared: Arc<Shared>,
    changes: mpsc::Receiver<ChannelChange>,
    stop: CancellationToken,
) {
    let broker = options.zmq_broker.map(|broker| (broker, namespace));
    listen(broker, shared, changes, stop).await;
}

async fn listen(
    broker: Option<(Broker, NamespaceFilter)>,
    shared: Arc<Shared>,
    changes: mpsc::Receiver<ChannelChange>,
    stop: CancellationToken,
) {
    let broker = broker.map(|(broker, namespace)| broker.listen(namespace, Arc::clone(&shared), stop.clone()));
    Channels { shared, open: HashMap::new(), stop }.run(changes).await;
    if let Some(broker) = broker {
        broker.ended().await;
    }
}

/// The publishers that are listened to.
struct Channels {
    shared: Arc<Shared>,
    open: HashMap<Channel, Open>,
    stop: CancellationToken,
}

struct Open {
    /// The newest first, each with the number of voices that name it.
    endpoints: Vec<(Endpoint, usize)>,
    listening: Listening,
}

/// A listener's task, told where to listen.
struct Listening {
    endpoints: watch::Sender<Vec<Endpoint>>,
    task: AbortOnDropHandle<()>,
}

impl Listening {
    fn start(listener: Listener, endpoints: Vec<Endpoint>, stop: CancellationToken) -> Self {
        let (endpoints, told) = watch::channel(endpoints);
        let task = tokio::spawn(async move {
            stop.run_until_cancelled(listener.run(told)).await;
        });
        Self { endpoints, task: AbortOnDropHandle::new(task) }
    }

    /// Ends it, once it has said what is no longer known.
    async fn ended(self) {
        drop(self.endpoints);
        // A panic is a defect; the others go on.
        if let Err(error) = self.task.await {
            tracing::error!("A ZMQ listener ended unexpectedly: {error}");
        }
    }
}

impl Channels {
    async fn run(mut self, mut changes: mpsc::Receiver<ChannelChange>) {
        let stop = self.stop.clone();
        stop.run_until_cancelled(async {
            while let Some(change) = changes.recv().await {
                match change {
                    ChannelChange::Opened(channel) => self.opened(&channel).await,
                    ChannelChange::Closed(channel) => self.closed(&channel).await,
                }
            }
            // No voice changes anything any more.
            std::future::pending::<()>().await;
        })
        .await;
        for open in self.open.into_values() {
            open.listening.ended().await;
        }
    }

    async fn opened(&mut self, announced: &EventChannel) {
        let Some((channel, endpoint)) = self.wanted(announced) else { return };
        let endpoint = match endpoint.parse::<Endpoint>() {
            Ok(endpoint) => endpoint,
            Err(error) => return self.reject(Reason::Malformed, channel, &error).await,
        };
        let Some(open) = self.open.get_mut(&channel) else {
            let Channel { publisher: id, topic, .. } = channel;
            let (namespace, scope) = (announced.namespace.as_str().into(), announced.scope.clone());
            let hearing = Hearing::Publisher { id, namespace, scope, topic };
            let listener = Listener::new(hearing, vec![announced.topic.clone()], Arc::clone(&self.shared));
            let listening = Listening::start(listener, vec![endpoint.clone()], self.stop.clone());
            self.open.insert(channel, Open { endpoints: vec![(endpoint, 1)], listening });
            return;
        };
        if let Some((_, voices)) = open.endpoints.iter_mut().find(|(known, _)| *known == endpoint) {
            *voices += 1;
        } else if open.endpoints.len() < MAX_ENDPOINTS {
            open.endpoints.insert(0, (endpoint, 1));
            open.tell();
        } else {
            let detail = format!("more than {MAX_ENDPOINTS} endpoints");
            self.reject(Reason::TooManyEntries, channel, &detail).await;
        }
    }

    async fn closed(&mut self, announced: &EventChannel) {
        let Some((channel, endpoint)) = self.wanted(announced) else { return };
        let Ok(endpoint) = endpoint.parse::<Endpoint>() else { return };
        let Some(open) = self.open.get_mut(&channel) else { return };
        let Some(at) = open.endpoints.iter().position(|(known, _)| *known == endpoint) else { return };
        open.endpoints[at].1 -= 1;
        if open.endpoints[at].1 > 0 {
            return;
        }
        open.endpoints.remove(at);
        if !open.endpoints.is_empty() {
            open.tell();
        } else if let Some(open) = self.open.remove(&channel) {
            // Whoever opens it next begins after this one's last word.
            open.listening.ended().await;
        }
    }

    /// The channel and its endpoint, where it is to be listened to.
    fn wanted<'a>(&self, announced: &'a EventChannel) -> Option<(Channel, &'a str)> {
        let Transport::Zmq { endpoint } = &announced.transport else { return None };
        let topic = Topic::numbered(&announced.topic).filter(|topic| self.shared.topics.contains(topic))?;
        Some((Channel { source: Source::Zmq, publisher: announced.publisher, topic }, endpoint.as_str()))
    }

    async fn reject(&self, reason: Reason, channel: Channel, detail: &str) {
        let detail = format!("publisher {:x}: {detail}", channel.publisher);
        let rejection = Rejection { source: Source::Zmq, topic: channel.topic, reason, detail };
        self.shared.observations.send(Observation::Rejected(rejection)).await.ok();
    }
}

impl Open {
    fn tell(&self) {
        let endpoints = self.endpoints.iter().map(|(endpoint, _)| endpoint.clone()).collect();
        self.listening.endpoints.send_replace(endpoints);
    }
}

#[cfg(test)]
mod tests;
