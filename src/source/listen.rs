//! Events that KV routers publish on NATS.

use std::sync::Arc;

use async_nats::{Client, Message, Subscriber};
use futures_util::StreamExt;
use tokio::sync::mpsc;

use super::NatsError;
use crate::fleet::{Observation, Rejection, Source, Topic};
use crate::target::{self, NamespaceFilter};
use crate::wire;

/// Hears the `kv-hit-rate` events of the watched namespaces.
pub(super) struct Listener {
    events: Subscriber,
    namespace: NamespaceFilter,
    observations: mpsc::Sender<Observation>,
}

impl Listener {
    pub(super) async fn subscribe(
        client: &Client,
        namespace: NamespaceFilter,
        observations: mpsc::Sender<Observation>,
    ) -> Result<Self, NatsError> {
        let subject = target::kv_hit_rate_subscription(&namespace);
        let events = client.subscribe(subject).await.map_err(|error| NatsError::Subscribe(error.to_string()))?;
        Ok(Self { events, namespace, observations })
    }

    /// Runs until the client ends, or quietly until nobody folds any more.
    pub(super) async fn run(mut self) -> Result<(), NatsError> {
        while let Some(message) = self.events.next().await {
            let Some(observation) = observation(&message, &self.namespace) else {
                continue;
            };
            if self.observations.send(observation).await.is_err() {
                return Ok(());
            }
        }
        Err(NatsError::Ended)
    }
}

/// `None` for a namespace that is not watched.
fn observation(message: &Message, watched: &NamespaceFilter) -> Option<Observation> {
    let namespace =
        target::parse_kv_hit_rate_subject(&message.subject).filter(|namespace| watched.matches(namespace))?;
    let event = wire::decode_hit_rate(Arc::from(namespace), &message.payload);
    Some(event.map_or_else(
        |error| {
            let detail = format!("{error} (subject {})", message.subject);
            Observation::Rejected(Rejection {
                source: Source::Nats,
                topic: Topic::KvHitRate,
                reason: error.reason,
                detail,
            })
        },
        Observation::HitRate,
    ))
}
