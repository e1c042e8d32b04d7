//! Events on NATS.

use std::sync::Arc;

use async_nats::{Client, Message, Subscriber};
use futures_util::StreamExt;
use futures_util::stream::SelectAll;
use tokio::sync::mpsc;

use super::NatsError;
use crate::fleet::{Observation, Rejection, Scope, Source, Topic};
use crate::source::events;
use crate::target::{self, EventSubject, NamespaceFilter};
use crate::wire;

/// Hears the events of the watched namespaces: `kv-hit-rate` of KV routers, `kv_metrics`, `forward-pass-metrics` and
/// `active_sequences_events`, as far as they are wanted.
pub(super) struct Listener {
    events: SelectAll<Subscriber>,
    namespace: NamespaceFilter,
    observations: mpsc::Sender<Observation>,
}

impl Listener {
    pub(super) async fn subscribe(
        client: &Client,
        namespace: NamespaceFilter,
        topics: &[Topic],
        observations: mpsc::Sender<Observation>,
    ) -> Result<Self, NatsError> {
        let mut events = SelectAll::new();
        let topics: Vec<_> = topics.iter().map(|topic| topic.as_str()).collect();
        for subject in target::event_subscriptions(&namespace, &topics) {
            events.push(client.subscribe(subject).await.map_err(|error| NatsError::Subscribe(error.to_string()))?);
        }
        Ok(Self { events, namespace, observations })
    }

    /// Runs until the client ends, or quietly until nobody folds any more.
    pub(super) async fn run(mut self) -> Result<(), NatsError> {
        while let Some(message) = self.events.next().await {
            let Some(observation) = heard(&message, &self.namespace) else { continue };
            if self.observations.send(observation).await.is_err() {
                return Ok(());
            }
        }
        Err(NatsError::Ended)
    }
}

/// `None` for a namespace that is not watched.
fn heard(message: &Message, watched: &NamespaceFilter) -> Option<Observation> {
    let subject =
        target::parse_event_subject(&message.subject).filter(|subject| watched.matches(&subject.namespace))?;
    if subject.topic == Topic::KvHitRate.as_str() {
        return Some(hit_rate(&subject.namespace, message));
    }
    Some(numbered(Topic::numbered(subject.topic)?, &subject, &message.payload))
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
    event.unwrap_or_else(|error| {
        let detail = format!("{error} (subject {})", message.subject);
        let (source, topic) = (Source::Nats, Topic::KvHitRate);
        Observation::Rejected(Rejection { source, topic, reason: error.reason, detail })
    })
}

/// Whether the first byte opens a map of MessagePack. None of those can begin JSON.
fn is_msgpack_map(payload: &[u8]) -> bool {
    matches!(payload.first(), Some(0x80..=0x8f | 0xde | 0xdf))
}

/// Releases up to 0.8 publish JSON, later ones msgpack: the first byte tells.
fn numbered(topic: Topic, subject: &EventSubject<'_>, payload: &[u8]) -> Observation {
    let namespace = Arc::from(&*subject.namespace);
    match topic {
        Topic::KvMetrics if !is_msgpack_map(payload) => return events::load_json(Source::Nats, namespace, payload),
        Topic::ActiveSequences if !is_msgpack_map(payload) => {
            return events::routing_json(Source::Nats, namespace, payload);
        }
        _ => {}
    }
    let scope = subject.endpoint.as_ref().zip(subject.component.as_ref());
    let scope =
        scope.map(|(endpoint, component)| Scope { component: (**component).into(), endpoint: (**endpoint).into() });
    match wire::decode_envelope(payload) {
        Ok(envelope) => events::numbered(Source::Nats, topic, namespace, scope, &envelope),
        Err(error) => events::rejected(Source::Nats, topic, &error),
    }
}
