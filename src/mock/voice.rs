//! What mocks of a release say of their requests: which events, in which bytes, by whom and where.

use std::collections::BTreeMap;
use std::sync::Arc;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use rand::RngExt;
use rand::rngs::StdRng;

use super::requests::{Request, Said, Step};
use super::{MockConfig, Release};
use crate::fleet::{Load, Pass, Rank, Report, WorkerId};
use crate::target::{self, NAMESPACE};
use crate::wire::{
    self, ActiveBlocks, ActiveLoad, ActiveLoadForm, Envelope, ForwardPass, PlacedPrompt, SequenceChange, SequenceStep,
    SequencesForm,
};

/// What 1.4 and later leave as it is in a part of a subject.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_');

/// Whose events they are, and of which topic. Workers are known by their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Lane {
    /// A worker's load.
    Load(usize),
    /// Passes of a worker.
    Passes(usize),
    /// The router's book-keeping.
    Sequences,
    /// The router's hit rates.
    HitRates,
}

impl Lane {
    pub(super) fn topic(self) -> &'static str {
        match self {
            Self::Load(_) => "kv_metrics",
            Self::Passes(_) => "forward-pass-metrics",
            Self::Sequences => "active_sequences_events",
            Self::HitRates => "kv-hit-rate",
        }
    }
}

/// One event.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) lane: Lane,
    payload: Vec<u8>,
    /// Publisher and sequence, from 0.9 on.
    number: Option<(u64, u64)>,
}

impl Message {
    /// In its envelope, if its release has one. `published_at` are milliseconds since the epoch.
    pub(super) fn envelope(&self, published_at: u64) -> Option<Envelope<'_>> {
        let (publisher, sequence) = self.number?;
        Some(Envelope { publisher, sequence, published_at, topic: self.lane.topic(), payload: &self.payload })
    }

    /// As bytes of NATS.
    pub(super) fn bytes(&self, published_at: u64) -> Vec<u8> {
        self.envelope(published_at).map_or_else(|| self.payload.clone(), |envelope| wire::encode_envelope(&envelope))
    }
}

/// An id as a publisher, and the number of the next event.
#[derive(Debug)]
struct Publisher {
    id: u64,
    next: u64,
}

/// All workers and their router.
#[derive(Debug)]
pub(super) struct Voice {
    config: MockConfig,
    workers: Vec<WorkerId>,
    /// The router's own id.
    router: u64,
    publishers: BTreeMap<Lane, Publisher>,
}

impl Voice {
    pub(super) fn new(config: &MockConfig, workers: &[WorkerId], random: &mut StdRng) -> Self {
        let release = config.target.release();
        let router = random.random::<u64>() >> 1;
        let lanes = (0..workers.len()).flat_map(|worker| [Lane::Load(worker), Lane::Passes(worker)]);
        let publishers = lanes
            .chain([Lane::Sequences, Lane::HitRates])
            .filter(|lane| release.tells(*lane))
            .map(|lane| {
                let id = match lane {
                    // Random from 1.3 on, another one for each topic.
                    _ if release == Release::V1_6 => random.random::<u64>() >> 8,
                    Lane::Load(worker) | Lane::Passes(worker) => workers[worker].0,
                    Lane::Sequences | Lane::HitRates => router,
                };
                (lane, Publisher { id, next: 0 })
            })
            .collect();
        Self { config: config.clone(), workers: workers.to_vec(), router, publishers }
    }

    /// Who publishes what: lanes and ids.
    pub(super) fn publishers(&self) -> impl Iterator<Item = (Lane, u64)> {
        self.publishers.iter().map(|(lane, publisher)| (*lane, publisher.id))
    }

    /// Subject of a lane's events on NATS.
    pub(super) fn subject(&self, lane: Lane) -> String {
        let target = &self.config.target;
        let (namespace, component, topic) = (&target.namespace, &target.component, lane.topic());
        if target.release() == Release::V1_6 {
            let [namespace, component, endpoint] =
                [namespace, component, &target.endpoint].map(|part| utf8_percent_encode(part, PLAIN));
            return format!("{NAMESPACE}{namespace}.component.{component}.endpoint.{endpoint}.{topic}");
        }
        match lane {
            Lane::HitRates => target::kv_hit_rate_subject(namespace),
            Lane::Sequences => format!("{NAMESPACE}{namespace}.component.{component}.{topic}"),
            Lane::Load(_) | Lane::Passes(_) => format!("{NAMESPACE}{namespace}.{topic}"),
        }
    }

    /// The load that an engine tells, and the worker that has it. The fixed values are told in place of those that the
    /// requests make.
    pub(super) fn load(&self, engine: usize, load: Load) -> (usize, Report) {
        let (worker, rank) = self.place(engine);
        (worker, Report { rank, load: self.config.load.over(load, self.config.target.release()) })
    }

    /// The events of a tick.
    pub(super) fn messages(&mut self, said: Vec<Said>) -> Vec<Message> {
        let mut messages = Vec::new();
        let mut steps = Vec::new();
        for said in said {
            match said {
                Said::Step(engine, request, step) => steps.push((engine, request, step)),
                Said::Pass(engine, pass) => messages.push(self.pass(engine, pass)),
                Said::Load(engine, load) => messages.push(self.load_event(engine, load)),
            }
        }
        let routing = self.hit_rates(&steps).into_iter().chain(self.sequences(&steps));
        routing.chain(messages).filter_map(|(lane, payload)| self.numbered(lane, payload)).collect()
    }

    /// `None` where the release has no such event.
    fn numbered(&mut self, lane: Lane, payload: Vec<u8>) -> Option<Message> {
        let publisher = self.publishers.get_mut(&lane)?;
        let number = self.config.target.release().has_envelope().then_some((publisher.id, publisher.next));
        publisher.next += 1;
        Some(Message { lane, payload, number })
    }

    /// Worker and rank of an engine.
    fn place(&self, engine: usize) -> (usize, Rank) {
        let ranks = self.config.engines.ranks;
        let (worker, rank) = (engine / ranks as usize, engine % ranks as usize);
        (worker, Rank(self.config.engines.dp_rank.saturating_add(u32::try_from(rank).unwrap_or(u32::MAX))))
    }

    fn pass(&self, engine: usize, pass: Pass) -> (Lane, Vec<u8>) {
        let (worker, rank) = self.place(engine);
        let event = ForwardPass { worker: self.workers[worker], rank, pass };
        (Lane::Passes(worker), wire::encode_forward_pass(&event))
    }

    fn load_event(&self, engine: usize, load: Load) -> (Lane, Vec<u8>) {
        let (worker, report) = self.load(engine, load);
        let id = self.workers[worker];
        let active =
            ActiveLoad { worker: id, rank: report.rank, blocks: ActiveBlocks::Used(report.load.active_blocks) };
        let payload = match self.config.target.release() {
            Release::V1_6 => wire::encode_active_load(&active, ActiveLoadForm::Used),
            Release::V0_9 => wire::encode_active_load(&active, ActiveLoadForm::Decode),
            Release::V0_8 => wire::encode_active_load_json(&active),
            _ => wire::encode_load_event(id, &report),
        };
        (Lane::Load(worker), payload)
    }

    /// `kv-hit-rate` events, one for each request that is placed.
    fn hit_rates(&self, steps: &[(usize, Arc<Request>, Step)]) -> Vec<(Lane, Vec<u8>)> {
        let placed = steps.iter().filter(|(.., step)| *step == Step::Placed);
        let event = |(engine, request, _): &(usize, Arc<Request>, Step)| {
            let (worker, rank) = self.place(*engine);
            let (id, blocks) = (self.workers[worker], request.blocks);
            let payload = match self.config.target.release() {
                Release::V0_9 => wire::encode_hit_rate_msgpack(id, rank, blocks),
                Release::V0_7 | Release::V0_8 => wire::encode_hit_rate(id, Some(rank), blocks),
                _ => wire::encode_hit_rate(id, None, blocks),
            };
            (Lane::HitRates, payload)
        };
        placed.map(event).collect()
    }

    fn sequences(&self, steps: &[(usize, Arc<Request>, Step)]) -> Vec<(Lane, Vec<u8>)> {
        let form = match self.config.target.release() {
            Release::V1_6 => SequencesForm::Hints,
            Release::V0_9 => SequencesForm::Overlap,
            Release::V0_7 | Release::V0_8 => SequencesForm::Worker,
            _ => SequencesForm::WorkerId,
        };
        let names: Vec<_> = steps.iter().map(|(_, request, _)| wire::uuid(request.id)).collect();
        let written = steps.iter().zip(&names).map(|((engine, request, step), name)| {
            let (worker, rank) = self.place(*engine);
            let change = match step {
                Step::Placed => SequenceChange::Added(PlacedPrompt {
                    hashes: &request.hashes,
                    isl_tokens: request.prompt.into(),
                    overlap_blocks: request.blocks.overlap.into(),
                    effective_tokens: request.effective.into(),
                }),
                Step::Prefilled => SequenceChange::Prefilled,
                Step::Freed => SequenceChange::Freed,
            };
            SequenceStep { request: name, worker: self.workers[worker], rank, change }
        });
        let payloads = wire::encode_sequences(self.router, &written.collect::<Vec<_>>(), form);
        payloads.into_iter().map(|payload| (Lane::Sequences, payload)).collect()
    }
}
