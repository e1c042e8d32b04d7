//! Events straight from their publishers, over ZMQ.
//!
//! Every publisher of a wanted topic has a socket of its own, which discovery names ([`ChannelChange`]), and gets a
//! connection and a task of its own here ([`listener`]); or all send to a broker, which has one for all of them. It may be gone, mute, behind a cut network, or say anything: that
//! costs this one connection, which is tried again after a pause. What a publisher said over a connection that has ended
//! is no longer known, and the fleet is told so.

mod broker;
mod copies;
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

/// Addresses at which one publisher may be said to be, as the voices of discovery do not change at the same moment; those
/// of one broker likewise.
const MAX_ENDPOINTS: usize = 8;
/// Brokers that discovery may name at a time. A namespace has one, or a few where one is not to be missed.
const MAX_BROKERS: usize = 16;

/// Events over ZMQ.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "ZMQ")]
pub(crate) struct ZmqOptions {
    /// Event broker in Dynamo's spelling, xsub=tcp://host:port,xpub=tcp://host:port, of which the xpub address is used.
    /// Publishers and brokers that discovery names are listened to without being named here
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
    listen(options.zmq_broker, namespace, shared, changes, stop).await;
}

async fn listen(
    broker: Option<Broker>,
    watched: NamespaceFilter,
    shared: Arc<Shared>,
    changes: mpsc::Receiver<ChannelChange>,
    stop: CancellationToken,
) {
    let mut channels = Channels { shared, watched, open: HashMap::new(), brokers: HashMap::new(), stop };
    if let Some(broker) = broker {
        let unnamed = match &channels.watched {
            NamespaceFilter::Named(name) => Some(name.as_str().into()),
            NamespaceFilter::All => None,
        };
        channels.listen_to(&broker, unnamed);
    }
    channels.run(changes).await;
}

/// The publishers and brokers that are listened to.
struct Channels {
    shared: Arc<Shared>,
    watched: NamespaceFilter,
    open: HashMap<Channel, Open>,
    /// Each with the number of times that it is named: by the option, or by a record of discovery.
    brokers: HashMap<Broker, (Listening, usize)>,
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
                    ChannelChange::Opened(source, channel) => self.opened(source, &channel).await,
                    ChannelChange::Closed(channel) => self.closed(&channel).await,
                }
            }
            // No voice changes anything any more.
            std::future::pending::<()>().await;
        })
        .await;
        let publishers = self.open.into_values().map(|open| open.listening);
        for listening in publishers.chain(self.brokers.into_values().map(|(listening, _)| listening)) {
            listening.ended().await;
        }
    }

    async fn opened(&mut self, source: Source, announced: &EventChannel) {
        match &announced.transport {
            Transport::Zmq { endpoint } => self.publisher_opened(announced, endpoint).await,
            Transport::ZmqBroker { xpub_endpoints } => self.broker_opened(source, announced, xpub_endpoints).await,
            Transport::Other => {}
        }
    }

    async fn closed(&mut self, announced: &EventChannel) {
        match &announced.transport {
            Transport::Zmq { endpoint } => self.publisher_closed(announced, endpoint).await,
            Transport::ZmqBroker { xpub_endpoints } => self.broker_closed(xpub_endpoints).await,
            Transport::Other => {}
        }
    }

    async fn broker_opened(&mut self, source: Source, announced: &EventChannel, xpub_endpoints: &[String]) {
        let refusal = match Broker::announced(xpub_endpoints) {
            Ok(broker) if self.brokers.len() < MAX_BROKERS || self.brokers.contains_key(&broker) => {
                return self.listen_to(&broker, Some(announced.namespace.as_str().into()));
            }
            Ok(_) => (Reason::TooManyEntries, format!("more than {MAX_BROKERS} brokers")),
            Err(refusal) => refusal,
        };
        let detail = format!("broker {:x}: {}", announced.publisher, refusal.1);
        self.reject(Rejection { source, topic: Topic::Discovery, reason: refusal.0, detail }).await;
    }

    /// Where two namespaces share a broker, messages that name none are taken for those of the first.
    fn listen_to(&mut self, broker: &Broker, unnamed: Option<Arc<str>>) {
        let Self { shared, watched, stop, .. } = self;
        let listen = || (broker.listen(watched.clone(), unnamed, Arc::clone(shared), stop.clone()), 0);
        self.brokers.entry(broker.clone()).or_insert_with(listen).1 += 1;
    }

    async fn broker_closed(&mut self, xpub_endpoints: &[String]) {
        let Ok(broker) = Broker::announced(xpub_endpoints) else { return };
        let Some((_, named)) = self.brokers.get_mut(&broker) else { return };
        *named -= 1;
        if *named == 0
            && let Some((listening, _)) = self.brokers.remove(&broker)
        {
            listening.ended().await;
        }
    }

    async fn publisher_opened(&mut self, announced: &EventChannel, endpoint: &str) {
        let Some(channel) = self.wanted(announced) else { return };
        let endpoint = match endpoint.parse::<Endpoint>() {
            Ok(endpoint) => endpoint,
            Err(error) => return self.reject_publisher(Reason::Malformed, channel, &error).await,
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
            self.reject_publisher(Reason::TooManyEntries, channel, &detail).await;
        }
    }

    async fn publisher_closed(&mut self, announced: &EventChannel, endpoint: &str) {
        let Some(channel) = self.wanted(announced) else { return };
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

    /// The channel, where its topic is to be listened to.
    fn wanted(&self, announced: &EventChannel) -> Option<Channel> {
        let topic = Topic::numbered(&announced.topic).filter(|topic| self.shared.topics.contains(topic))?;
        Some(Channel { source: Source::Zmq, publisher: announced.publisher, topic })
    }

    async fn reject_publisher(&self, reason: Reason, channel: Channel, detail: &str) {
        let detail = format!("publisher {:x}: {detail}", channel.publisher);
        self.reject(Rejection { source: Source::Zmq, topic: channel.topic, reason, detail }).await;
    }

    async fn reject(&self, rejection: Rejection) {
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
