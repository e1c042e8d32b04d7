//! Events on NATS.

use std::sync::Arc;

use async_nats::{Client, Message, Subscriber};
use futures_util::StreamExt;
use futures_util::stream::SelectAll;
use tokio::sync::mpsc;

use super::{NatsError, events};
use crate::fleet::{Observation, Rejection, Scope, Source, Topic};
use crate::target::{self, EventSubject, NamespaceFilter};
use crate::wire;

/// Hears the events of the watched namespaces: `kv-hit-rate` of KV routers, `kv_metrics` of workers.
pub(super) struct Listener {
    events: SelectAll<Subscriber>,
    namespace: NamespaceFilter,
    observations: mpsc::Sender<Observation>,
}

impl Listener {
    pub(super) async fn subscribe(
        client: &Client,
        namespace: NamespaceFilter,
        observations: mpsc::Sender<Observation>,
    ) -> Result<Self, NatsError> {
        let mut events = SelectAll::new();
        for subject in target::event_subscriptions(&namespace) {
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
    match target::parse_event_subject(&message.subject) {
        Some(EventSubject::KvHitRate { namespace }) if watched.matches(namespace) => Some(hit_rate(namespace, message)),
        Some(EventSubject::KvMetrics { namespace, scope }) if watched.matches(namespace) => {
            Some(load(namespace, scope, &message.payload))
        }
        _ => None,
    }
}

/// JSON up to 0.8, msgpack in 0.9: the first byte tells.
fn hit_rate(namespace: &str, message: &Message) -> Observation {
    let (namespace, payload) = (Arc::from(namespace), &message.payload);
    let event = if is_msgpack_map(payload) {
        wire::decode_envelope(payload).and_then(|envelope| wire::decode_hit_rate_msgpack(namespace, envelope.payload))
    } else {
        wire::decode_hit_rate(namespace, payload)
    };
    event.map_or_else(
        |error| {
            let detail = format!("{error} (subject {})", message.subject);
            let (source, topic) = (Source::Nats, Topic::KvHitRate);
            Observation::Rejected(Rejection { source, topic, reason: error.reason, detail })
        },
        Observation::HitRate,
    )
}

/// Whether the first byte opens a map of MessagePack. None of those can begin JSON.
fn is_msgpack_map(payload: &[u8]) -> bool {
    matches!(payload.first(), Some(0x80..=0x8f | 0xde | 0xdf))
}

/// Releases up to 0.8 publish JSON, later ones msgpack: the first byte tells.
fn load(namespace: &str, scope: Option<(&str, &str)>, payload: &[u8]) -> Observation {
    let namespace = Arc::from(namespace);
    if !is_msgpack_map(payload) {
        return events::load_json(Source::Nats, namespace, payload);
    }
    let scope = scope.map(|(component, endpoint)| Scope { component: component.into(), endpoint: endpoint.into() });
    match wire::decode_envelope(payload) {
        Ok(envelope) => events::load(Source::Nats, namespace, scope, &envelope),
        Err(error) => events::rejected(Source::Nats, &error),
    }
}
