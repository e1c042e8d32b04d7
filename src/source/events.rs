//! What an event says, whichever transport carried it.

use std::fmt;
use std::sync::Arc;

use super::owners::Owners;
use crate::fleet::{
    Channel, EstimateEvent, Load, LoadEvent, Numbered, Observation, PassEvent, Rejection, Report, RoutingEvent, Scope,
    Source, Topic,
};
use crate::target::EventSubject;
use crate::wire::{self, ActiveBlocks, ActiveLoad, Envelope, Malformed};

/// Where a numbered event came from, as far as its transport tells.
#[derive(Debug)]
pub(super) struct Origin<'a, A> {
    pub(super) source: Source,
    pub(super) topic: Topic,
    pub(super) namespace: Arc<str>,
    /// Whom it is about.
    pub(super) scope: Option<Scope>,
    pub(super) owners: &'a Owners,
    /// A ZMQ endpoint or a NATS subject, for the log.
    pub(super) address: A,
}

/// Component and endpoint of a subject that names both.
pub(super) fn scope(subject: &EventSubject<'_>) -> Option<Scope> {
    let (component, endpoint) = subject.component.as_deref().zip(subject.endpoint.as_deref())?;
    Some(Scope { component: component.into(), endpoint: endpoint.into() })
}

/// Reads a numbered event about a worker. One that cannot be read counts as lost, by the gap that it leaves in the numbers.
pub(super) fn numbered(origin: Origin<'_, impl fmt::Display>, envelope: &Envelope<'_>) -> Observation {
    let Origin { source, topic, namespace, scope, owners, address } = origin;
    let message = message(source, topic, envelope);
    let read = if topic == Topic::ForwardPassMetrics {
        wire::decode_forward_pass(owners.of(envelope.publisher), envelope.payload).map(
            |wire::ForwardPass { worker, rank, pass }| {
                Observation::Passed(PassEvent { message, namespace, scope, worker, rank, pass })
            },
        )
    } else if topic == Topic::ActiveSequences {
        wire::decode_sequences(envelope.payload)
            .map(|steps| Observation::Routed(RoutingEvent { message, namespace, steps }))
    } else {
        wire::decode_active_load(envelope.publisher, envelope.payload).map(|load| told(message, namespace, scope, load))
    };
    let publisher = || format!("publisher {:x} at {address}", envelope.publisher);
    read.unwrap_or_else(|error| rejected(source, topic, &error, publisher()))
}

/// Reads the JSON of a router of 0.4 - 0.8, which has no number either.
pub(super) fn routing_json(source: Source, namespace: Arc<str>, subject: &str, json: &[u8]) -> Observation {
    let topic = Topic::ActiveSequences;
    match wire::decode_sequences_json(json) {
        Ok(routing) => {
            let message = unnumbered(source, topic, 0);
            Observation::Routed(RoutingEvent { message, namespace, steps: vec![routing] })
        }
        Err(error) => rejected(source, topic, &error, subject),
    }
}

/// Reads a JSON event of 0.4 - 0.8.
pub(super) fn load_json(source: Source, namespace: Arc<str>, subject: &str, json: &[u8]) -> Observation {
    let event = match wire::decode_active_load_json(json) {
        Ok(Some(load)) => Ok(told(unnumbered(source, Topic::KvMetrics, load.worker.0), namespace, None, load)),
        Ok(None) => wire::decode_load_event(json).map(|(worker, report)| {
            let message = unnumbered(source, Topic::KvMetrics, worker.0);
            let Some(Report { rank, load }) = report else { return Observation::Heard(message) };
            Observation::Load(LoadEvent { message, namespace, scope: None, worker, rank, load })
        }),
        Err(error) => Err(error),
    };
    event.unwrap_or_else(|error| rejected(source, Topic::KvMetrics, &error, subject))
}

/// Reads the payload of a hit rate of 0.9.
pub(super) fn hit_rate(namespace: Arc<str>, envelope: &Envelope<'_>) -> Result<Observation, Malformed> {
    let hit = wire::decode_hit_rate_msgpack(namespace, envelope.payload)?;
    Ok(Observation::HitRate { message: message(Source::Nats, Topic::KvHitRate, envelope), hit })
}

fn message(source: Source, topic: Topic, envelope: &Envelope<'_>) -> Numbered {
    Numbered { channel: Channel { source, publisher: envelope.publisher, topic }, sequence: envelope.sequence }
}

/// JSON events have no number: each one has the same here, which is never a gap.
pub(super) fn unnumbered(source: Source, topic: Topic, publisher: u64) -> Numbered {
    Numbered { channel: Channel { source, publisher, topic }, sequence: 0 }
}

fn told(message: Numbered, namespace: Arc<str>, scope: Option<Scope>, load: ActiveLoad) -> Observation {
    match load.blocks {
        ActiveBlocks::Used(active_blocks) => Observation::Load(LoadEvent {
            message,
            namespace,
            scope,
            worker: load.worker,
            rank: load.rank,
            load: Load { active_blocks, ..Load::default() },
        }),
        ActiveBlocks::Estimated(estimate) => {
            Observation::Estimated(EstimateEvent { message, namespace, worker: load.worker, rank: load.rank, estimate })
        }
    }
}

/// An event that could not be read, and where it came from.
pub(super) fn rejected(source: Source, topic: Topic, error: &Malformed, from: impl fmt::Display) -> Observation {
    Observation::Rejected(Rejection { source, topic, reason: error.reason, detail: format!("{error} ({from})") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{Estimate, Rank, Reason, WorkerId};

    fn heard(publisher: u64, payload: &[u8]) -> Observation {
        let envelope = Envelope { publisher, sequence: 3, published_at: 0, topic: "kv_metrics", payload };
        let (source, topic) = (Source::Zmq, Topic::KvMetrics);
        let address = "tcp://10.0.0.1:5556";
        numbered(
            Origin { source, topic, namespace: "dynamo".into(), scope: None, owners: &Owners::default(), address },
            &envelope,
        )
    }

    #[test]
    fn a_workers_own_load_and_a_routers_estimate_are_told_apart() {
        let load = |blocks| {
            let load = wire::ActiveLoad { worker: WorkerId(31), rank: Rank(1), blocks };
            wire::encode_active_load(&load, wire::ActiveLoadForm::Used)
        };
        let own = heard(7, &load(ActiveBlocks::Used(Some(25))));
        assert!(
            matches!(own, Observation::Load(event) if event.load.active_blocks == Some(25) && event.rank == Rank(1))
        );
        let said = Estimate { decode_blocks: Some(25), prefill_tokens: Some(100) };
        let Observation::Estimated(event) = heard(7, &load(ActiveBlocks::Estimated(said))) else {
            panic!("an estimate")
        };
        assert_eq!((event.message.sequence, event.worker, event.estimate), (3, WorkerId(31), said));
    }

    #[test]
    fn one_that_cannot_be_read_is_rejected_with_publisher_and_address() {
        let Observation::Rejected(rejection) = heard(7, b"\xc1") else { panic!("rejected") };
        assert!(matches!(rejection.reason, Reason::Malformed | Reason::WrongShape), "{rejection:?}");
        assert!(rejection.detail.ends_with("(publisher 7 at tcp://10.0.0.1:5556)"), "{rejection:?}");
    }
}
