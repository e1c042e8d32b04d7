//! Events on NATS.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use async_nats::{Message, Subscriber};
use futures_util::stream::SelectAll;
use futures_util::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use super::permissions::Action;
use super::{Connection, NatsError, RETRY_DENIED};
use crate::config::Config;
use crate::fleet::{Observation, Source, Topic};
use crate::source::events::{self, Origin};
use crate::source::owners::Owners;
use crate::target::{self, EventSubject, NamespaceFilter};
use crate::wire;

/// Hears the events of the watched namespaces: `kv-hit-rate` of KV routers, `kv_metrics`, `forward-pass-metrics` and
/// `active_sequences_events`, as far as they are wanted.
pub(super) struct Listener {
    connection: Connection,
    events: SelectAll<Subscription>,
    /// When what was denied was last subscribed to.
    tried: Instant,
    namespace: NamespaceFilter,
    owners: Owners,
    observations: mpsc::Sender<Observation>,
}

struct Subscription {
    subject: String,
    messages: Subscriber,
}

impl Subscription {
    async fn to(subject: String, connection: &Connection) -> Result<Self, NatsError> {
        let messages = connection.client.subscribe(subject.clone()).await;
        messages.map(|messages| Self { subject, messages }).map_err(|error| NatsError::Subscribe(error.to_string()))
    }
}

impl Stream for Subscription {
    type Item = Message;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Message>> {
        self.messages.poll_next_unpin(context)
    }
}

impl Listener {
    pub(super) async fn subscribe(
        connection: Connection,
        config: &Config,
        owners: Owners,
        observations: mpsc::Sender<Observation>,
    ) -> Result<Self, NatsError> {
        let namespace = config.watched.namespace.clone();
        let topics: Vec<_> = config.events.topics.iter().map(|topic| topic.as_str()).collect();
        let (mut events, tried) = (SelectAll::new(), Instant::now());
        for subject in target::event_subscriptions(&namespace, &topics) {
            events.push(Subscription::to(subject, &connection).await?);
        }
        Ok(Self { connection, events, tried, namespace, owners, observations })
    }

    /// Runs until the client ends, or quietly until nobody folds any more.
    pub(super) async fn run(mut self) -> Result<(), NatsError> {
        let mut retries = tokio::time::interval_at(self.tried + RETRY_DENIED, RETRY_DENIED);
        retries.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let message = tokio::select! {
                message = self.events.next() => message.ok_or(NatsError::Ended)?,
                _ = retries.tick() => {
                    self.retry().await?;
                    continue;
                }
            };
            let Some(observation) = heard(&message, &self.namespace, &self.owners) else { continue };
            if self.observations.send(observation).await.is_err() {
                return Ok(());
            }
        }
    }

    /// Subscribes once more to what is denied: a server whose permissions were changed lets the connection be.
    async fn retry(&mut self) -> Result<(), NatsError> {
        let last = std::mem::replace(&mut self.tried, Instant::now());
        for subscription in std::mem::take(&mut self.events) {
            let action = Action::Subscribe(subscription.subject.clone());
            self.connection.watch.tried(&action, last.into_std());
            let subscription = if self.connection.watch.denies(&action) {
                Subscription::to(subscription.subject, &self.connection).await?
            } else {
                subscription
            };
            self.events.push(subscription);
        }
        Ok(())
    }
}

/// `None` for a namespace that is not watched.
fn heard(message: &Message, watched: &NamespaceFilter, owners: &Owners) -> Option<Observation> {
    let subject =
        target::parse_event_subject(&message.subject).filter(|subject| watched.matches(&subject.namespace))?;
    if subject.topic == Topic::KvHitRate.as_str() {
        return Some(hit_rate(&subject.namespace, message));
    }
    Some(numbered(Topic::numbered(subject.topic)?, &subject, message, owners))
}

/// JSON up to 0.8, msgpack in 0.9: the first byte tells.
fn hit_rate(namespace: &str, message: &Message) -> Observation {
    let (namespace, payload) = (Arc::from(namespace), &message.payload);
    let event = if is_msgpack_map(payload) {
        wire::decode_envelope(payload).and_then(|envelope| events::hit_rate(namespace, &envelope))
    } else {
        wire::decode_hit_rate(namespace, payload)
            .map(|hit| Observation::HitRate { message: events::unnumbered(Source::Nats, Topic::KvHitRate, 0), hit })
    };
    event.unwrap_or_else(|error| events::rejected(Source::Nats, Topic::KvHitRate, &error, &message.subject))
}

/// Whether the first byte opens a map of MessagePack. None of those can begin JSON.
fn is_msgpack_map(payload: &[u8]) -> bool {
    matches!(payload.first(), Some(0x80..=0x8f | 0xde | 0xdf))
}

/// Releases up to 0.8 publish JSON, later ones msgpack: the first byte tells.
fn numbered(topic: Topic, subject: &EventSubject<'_>, message: &Message, owners: &Owners) -> Observation {
    let payload = &*message.payload;
    let namespace = Arc::from(&*subject.namespace);
    match topic {
        Topic::KvMetrics if !is_msgpack_map(payload) => {
            return events::load_json(Source::Nats, namespace, &message.subject, payload);
        }
        Topic::ActiveSequences if !is_msgpack_map(payload) => {
            return events::routing_json(Source::Nats, namespace, &message.subject, payload);
        }
        _ => {}
    }
    let (source, scope) = (Source::Nats, events::scope(subject));
    match wire::decode_envelope(payload) {
        Ok(envelope) => {
            let address = &message.subject;
            events::numbered(Origin { source, topic, namespace, scope, owners, address }, &envelope)
        }
        Err(error) => events::rejected(source, topic, &error, &message.subject),
    }
}
