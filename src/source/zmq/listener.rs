//! One connection after the other to one publisher, or to a broker.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, warn};

use super::super::events::{self, Origin};
use super::super::owners::Owners;
use super::Timing;
use super::copies::{Copies, MAX_CHANNELS};
use super::endpoint::Endpoint;
use crate::fleet::{
    Channel, LoadEvent, Lost, Numbered, Observation, PassEvent, Reason, Rejection, RoutingEvent, Scope, Source, Topic,
};
use crate::target::{self, NamespaceFilter};
use crate::throttle::Throttle;
use crate::wire;
use crate::zmtp::{self, Connection, Item, SocketType, Violation};

/// A load event takes some 250 bytes, a pass some 600.
const MAX_EVENT: u32 = 16 * 1024;
/// A placement has nine bytes for each block of its prompt.
const MAX_PLACEMENT: u32 = 1024 * 1024;
/// How long one that sends too much is left alone; then its messages are counted anew.
const FLOOD_PAUSE: Duration = Duration::from_secs(1);
/// Messages of one publisher in a second; an honest one sends some hundred at most. One that sends more is left for a
/// while, so that its messages do not stand in the way of everybody's.
const MAX_RATE: u32 = 10_000;
/// The same of a broker, which speaks for all.
const MAX_BROKER_RATE: u32 = 1_000_000;

/// What all listeners have in common.
pub(crate) struct Shared {
    pub(super) observations: mpsc::Sender<Observation>,
    /// What is listened to.
    pub(super) topics: Vec<Topic>,
    owners: Owners,
    connections: Semaphore,
    timing: Timing,
    /// Of the warning that a publisher cannot be heard: they often go by the hundred.
    unheard: Mutex<Throttle>,
    /// What brokers bring.
    copies: Mutex<Copies>,
}

impl Shared {
    /// To listen over at most so many connections at a time: where there are more publishers, some wait for their turn.
    pub(crate) fn new(
        connections: usize,
        topics: Vec<Topic>,
        owners: Owners,
        observations: mpsc::Sender<Observation>,
    ) -> Arc<Self> {
        Self::timed(connections, topics, owners, Timing::DEFAULT, observations)
    }

    pub(super) fn timed(
        connections: usize,
        topics: Vec<Topic>,
        owners: Owners,
        timing: Timing,
        observations: mpsc::Sender<Observation>,
    ) -> Arc<Self> {
        let connections = Semaphore::new(connections.clamp(1, Semaphore::MAX_PERMITS));
        Arc::new(Self {
            observations,
            topics,
            owners,
            connections,
            timing,
            unheard: Mutex::default(),
            copies: Mutex::default(),
        })
    }

    pub(super) fn copies(&self) -> MutexGuard<'_, Copies> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn warn(&self, endpoint: &Endpoint, ended: &Ended) {
        let mut unheard = self.unheard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(more_since_last) = unheard.due(Instant::now().into_std()) {
            warn!(
                more_since_last,
                "The ZMQ publisher at {endpoint} cannot be heard: {ended}; trying again for as long as it is announced"
            );
        }
    }
}

/// Whose messages a listener hears.
pub(super) enum Hearing {
    /// One publisher's.
    Publisher {
        /// Who it must be.
        id: u64,
        /// The namespace of its workers.
        namespace: Arc<str>,
        /// Their component and endpoint, which 1.4 and later announce.
        scope: Option<Scope>,
        /// What it publishes.
        topic: Topic,
    },
    /// Those of every publisher that has this broker.
    Broker {
        /// What tells it from other brokers.
        number: u64,
        /// Namespaces.
        watched: NamespaceFilter,
        /// The namespace of messages that name none; `None`: such messages are not wanted.
        unnamed: Option<Arc<str>>,
    },
}

/// Why a connection ended, or was not made.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Connection(#[from] zmtp::Ended),
    #[error("no answer within {}", humantime::format_duration(*.0))]
    Mute(Duration),
    #[error("publisher {found:x} speaks where {announced:x} was announced")]
    Foreign { announced: u64, found: u64 },
    #[error("more than {0} messages in a second")]
    Flood(u32),
    /// Nobody folds any more.
    #[error("the bridge stops")]
    Stopping,
}

impl From<Violation> for Ended {
    fn from(violation: Violation) -> Self {
        Self::Connection(violation.into())
    }
}

impl Ended {
    /// Whether it can happen to the best of publishers, so that it is worth trying again at once.
    fn is_honest(&self) -> bool {
        self.reason().is_none() && !matches!(self, Self::Flood(_))
    }

    /// Whether the peer is to blame, and for what.
    fn reason(&self) -> Option<Reason> {
        match self {
            Self::Connection(zmtp::Ended::Violation(Violation::Length | Violation::Parts)) => Some(Reason::TooLarge),
            Self::Connection(zmtp::Ended::Violation(_)) => Some(Reason::Malformed),
            Self::Foreign { .. } => Some(Reason::WrongShape),
            Self::Connection(_) | Self::Mute(_) | Self::Flood(_) | Self::Stopping => None,
        }
    }
}

/// Listens for as long as there is somewhere to listen.
pub(super) struct Listener {
    hearing: Hearing,
    /// First parts of the messages subscribed to start with one of these.
    prefixes: Vec<String>,
    shared: Arc<Shared>,
    /// Channels that said something since what they said was last lost.
    heard: BTreeSet<Channel>,
    /// Messages that were given up since; the fleet does not know it yet.
    given_up: u64,
    /// This connection brought an event.
    proven: bool,
    rate: Rate,
}

impl Listener {
    pub(super) fn new(hearing: Hearing, prefixes: Vec<String>, shared: Arc<Shared>) -> Self {
        let limit = match hearing {
            Hearing::Publisher { .. } => MAX_RATE,
            Hearing::Broker { .. } => MAX_BROKER_RATE,
        };
        let rate = Rate::new(limit, shared.timing.rate);
        Self { hearing, prefixes, shared, heard: BTreeSet::new(), given_up: 0, proven: false, rate }
    }

    /// Listens at the first of the endpoints that can be heard, and at others when they change; until nobody changes
    /// them any more.
    pub(super) async fn run(mut self, mut endpoints: watch::Receiver<Vec<Endpoint>>) {
        let mut attempt = 0;
        let mut pause = self.shared.timing.pause.0;
        loop {
            let Some(endpoint) = nth(&endpoints.borrow_and_update(), attempt) else { return };
            let ended = {
                let mut session = pin!(self.session(&endpoint));
                loop {
                    tokio::select! {
                        ended = &mut session => break Some(ended),
                        changed = endpoints.changed() => {
                            let first = changed.ok().map(|()| nth(&endpoints.borrow_and_update(), 0));
                            if first != Some(Some(endpoint.clone())) {
                                break None;
                            }
                        }
                    }
                }
            };
            self.lost().await;
            let Some(ended) = ended else {
                if endpoints.has_changed().is_err() {
                    return;
                }
                (attempt, pause) = (0, self.shared.timing.pause.0);
                continue;
            };
            debug!("ZMQ {endpoint}: {ended}");
            if self.proven && ended.is_honest() {
                pause = self.shared.timing.pause.0;
            } else if pause == self.shared.timing.pause.1 {
                self.shared.warn(&endpoint, &ended);
            }
            if self.complain(&endpoint, &ended).await.is_err() {
                return;
            }
            if matches!(ended, Ended::Flood(_)) {
                pause = pause.max(FLOOD_PAUSE);
                self.rate = Rate::new(self.rate.limit, self.rate.interval);
            }
            // Publishers that went together are not tried again together.
            tokio::select! {
                () = sleep(pause.mul_f64(rand::random_range(1.0..=1.5))) => attempt += 1,
                changed = endpoints.changed() => if changed.is_err() { return },
            }
            pause = (pause * 2).min(self.shared.timing.pause.1);
        }
    }

    async fn session(&mut self, endpoint: &Endpoint) -> Ended {
        let listening = self.listen(endpoint);
        match listening.await {
            Ok(never) => match never {},
            Err(ended) => ended,
        }
    }

    async fn listen(&mut self, endpoint: &Endpoint) -> Result<std::convert::Infallible, Ended> {
        self.proven = false;
        let shared = Arc::clone(&self.shared);
        let _turn = shared.connections.acquire().await.map_err(|_| Ended::Stopping)?;
        let opening = timeout(shared.timing.connect, self.open(endpoint));
        let mut connection = opening.await.map_err(|_| Ended::Mute(shared.timing.connect))??;
        debug!("ZMQ {endpoint}: subscribed");
        loop {
            tokio::select! {
                item = connection.next() => self.hear(item?, endpoint).await?,
                room = shared.observations.reserve(), if self.given_up > 0 => {
                    drop(room.map_err(|_| Ended::Stopping)?);
                    self.lost().await;
                }
            }
        }
    }

    async fn open(&self, endpoint: &Endpoint) -> Result<Connection, Ended> {
        let stream = endpoint.connect().await.map_err(zmtp::Ended::Io)?;
        let mut connection =
            Connection::open(stream, SocketType::Subscriber, SocketType::Publisher, self.longest()).await?;
        for prefix in &self.prefixes {
            connection.subscribe(prefix).await?;
        }
        Ok(connection)
    }

    async fn hear(&mut self, item: Item, endpoint: &Endpoint) -> Result<(), Ended> {
        if !self.rate.allows() {
            return Err(Ended::Flood(self.rate.limit));
        }
        let observation = match item {
            Item::TooLong(first) => {
                let topic = first.map_or_else(|| Some(self.topic()), |first| Some(self.subject(&first)?.0));
                topic.map(|topic| rejected(topic, Reason::TooLarge, "a message that is too long".to_owned()))
            }
            Item::Command(_) => None,
            Item::Message(parts) => self.read(&parts, endpoint)?,
        };
        match observation {
            Some(observation) => self.tell(observation).await,
            None => Ok(()),
        }
    }

    /// What a message says; `None` for one that the subscription brought along, and for a copy.
    fn read(&mut self, parts: &[Bytes], endpoint: &Endpoint) -> Result<Option<Observation>, Ended> {
        let first = parts.first().map(Bytes::as_ref).unwrap_or_default();
        let Some((topic, namespace, scope)) = self.subject(first) else {
            let subscribed = self.prefixes.iter().any(|prefix| first.starts_with(prefix.as_bytes()));
            let detail =
                || rejected(self.topic(), Reason::WrongShape, "a message that was not subscribed to".to_owned());
            return Ok((!subscribed).then(detail));
        };
        let parts: Vec<_> = parts.iter().map(Bytes::as_ref).collect();
        let envelope = match wire::decode_frames(&parts) {
            Ok(envelope) => envelope,
            Err(error) => return Ok(Some(events::rejected(Source::Zmq, topic, &error, endpoint))),
        };
        match self.hearing {
            Hearing::Publisher { id: announced, .. } if announced != envelope.publisher => {
                return Err(Ended::Foreign { announced, found: envelope.publisher });
            }
            Hearing::Publisher { .. } => {}
            Hearing::Broker { number, .. } => {
                let channel = Channel { source: Source::Zmq, publisher: envelope.publisher, topic };
                let message = Numbered { channel, sequence: envelope.sequence };
                match self.shared.copies().is_first(number, message, Instant::now().into_std()) {
                    Some(true) => {}
                    Some(false) => {
                        self.heard.insert(channel);
                        self.proven = true;
                        return Ok(None);
                    }
                    None => {
                        let detail =
                            format!("publisher {:x} is beyond {MAX_CHANNELS} behind brokers", envelope.publisher);
                        return Ok(Some(rejected(topic, Reason::TooManyEntries, detail)));
                    }
                }
            }
        }
        let (source, owners) = (Source::Zmq, &self.shared.owners);
        let origin = Origin { source, topic, namespace, scope, owners, address: endpoint };
        Ok(Some(events::numbered(origin, &envelope)))
    }

    /// Topic, namespace and, where it is told, place of a message by its first part; `None` for one that is not wanted.
    fn subject(&self, first: &[u8]) -> Option<(Topic, Arc<str>, Option<Scope>)> {
        match &self.hearing {
            Hearing::Publisher { namespace, scope, topic, .. } => {
                (first == topic.as_str().as_bytes()).then(|| (*topic, Arc::clone(namespace), scope.clone()))
            }
            Hearing::Broker { watched, unnamed, .. } => {
                let first = std::str::from_utf8(first).ok()?;
                if let Some((topic, namespace)) = Topic::numbered(first).zip(unnamed.as_ref()) {
                    return self.shared.topics.contains(&topic).then(|| (topic, Arc::clone(namespace), None));
                }
                let subject = target::parse_event_subject(first)?;
                let topic = Topic::numbered(subject.topic).filter(|topic| self.shared.topics.contains(topic))?;
                watched
                    .matches(&subject.namespace)
                    .then(|| (topic, Arc::from(&*subject.namespace), events::scope(&subject)))
            }
        }
    }

    fn longest(&self) -> u32 {
        match &self.hearing {
            Hearing::Publisher { topic, .. } if *topic != Topic::ActiveSequences => MAX_EVENT,
            _ => MAX_PLACEMENT,
        }
    }

    /// What a complaint about the whole connection is about.
    fn topic(&self) -> Topic {
        match &self.hearing {
            Hearing::Publisher { topic, .. } => *topic,
            Hearing::Broker { .. } => Topic::KvMetrics,
        }
    }

    /// Tells the fleet, or gives the message up where the fold does not keep up: the socket is read all the same, lest
    /// the worker keeps for us what we do not read.
    async fn tell(&mut self, observation: Observation) -> Result<(), Ended> {
        let heard = match &observation {
            Observation::Load(LoadEvent { message, .. })
            | Observation::Passed(PassEvent { message, .. })
            | Observation::Routed(RoutingEvent { message, .. })
            | Observation::Heard(message) => Some(message.channel),
            _ => None,
        };
        self.proven |= heard.is_some();
        self.heard.extend(heard);
        if self.given_up > 0 {
            self.given_up += 1;
            return Ok(());
        }
        match self.shared.observations.try_send(observation) {
            Ok(()) => Ok(()),
            Err(TrySendError::Closed(_)) => Err(Ended::Stopping),
            Err(TrySendError::Full(observation)) => {
                match timeout(self.shared.timing.patience, self.shared.observations.send(observation)).await {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(_)) => Err(Ended::Stopping),
                    Err(_) => {
                        self.given_up = 1;
                        Ok(())
                    }
                }
            }
        }
    }

    /// What was heard is no longer known, unless another broker brings all of it; what was given up is counted.
    async fn lost(&mut self) {
        let (messages, mut heard) = (std::mem::take(&mut self.given_up), std::mem::take(&mut self.heard));
        if let Hearing::Broker { number, .. } = self.hearing {
            let others = self.shared.copies().leave(number);
            heard.retain(|channel| messages > 0 || !others.contains(channel));
        }
        let given_up = (messages > 0).then_some(Observation::Lost(Lost { source: Source::Zmq, messages }));
        for observation in given_up.into_iter().chain(heard.into_iter().map(Observation::ChannelLost)) {
            self.shared.observations.send(observation).await.ok();
        }
    }

    async fn complain(&self, endpoint: &Endpoint, ended: &Ended) -> Result<(), mpsc::error::SendError<Observation>> {
        let observation = match (ended, ended.reason()) {
            (Ended::Flood(_), _) => Observation::Lost(Lost { source: Source::Zmq, messages: 1 }),
            (_, Some(reason)) => rejected(self.topic(), reason, format!("{ended} ({endpoint})")),
            (_, None) => return Ok(()),
        };
        self.shared.observations.send(observation).await
    }
}

fn rejected(topic: Topic, reason: Reason, detail: String) -> Observation {
    Observation::Rejected(Rejection { source: Source::Zmq, topic, reason, detail })
}

/// Of several endpoints, that of the n-th attempt.
fn nth(endpoints: &[Endpoint], attempt: usize) -> Option<Endpoint> {
    endpoints.get(attempt.checked_rem(endpoints.len())?).cloned()
}

/// Counts messages of an interval.
struct Rate {
    limit: u32,
    interval: Duration,
    count: u32,
    since: Instant,
}

impl Rate {
    fn new(limit: u32, interval: Duration) -> Self {
        Self { limit, interval, count: 0, since: Instant::now() }
    }

    fn allows(&mut self) -> bool {
        self.count += 1;
        if self.count > self.limit && self.since.elapsed() >= self.interval {
            (self.count, self.since) = (1, Instant::now());
        }
        self.count <= self.limit
    }
}
