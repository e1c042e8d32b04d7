//! Mock workers of every Dynamo release, on the planes of old ones and of today's.
//!
//! What they say is invented, and adds up: one stream of requests ([`requests`]), said as a release says it ([`voice`]),
//! over NATS ([`nats`]) or ZMQ ([`zmq`]), a pass at each tick of a clock ([`play`]).

#![expect(clippy::doc_markdown, reason = "doc comments of options are their help texts")]

mod nats;
mod play;
mod registration;
mod requests;
mod voice;
mod zmq;

use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;

use clap::{Args, Parser, ValueEnum};
use clap::{CommandFactory, error::ErrorKind};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use tracing::info;

use crate::config;
use crate::fleet::{Card, Limits, Load, MAX_RANKS, Ranks, Report, Role, WorkerId, WorkerKey};
use crate::source::etcd::{EtcdError, EtcdOptions};
use crate::source::nats::{NatsError, NatsOptions};
use crate::target::{self, Form, LOAD_ENDPOINT};
use crate::wire::{self, LoadForm};
use play::{Loads, Outlet, Play};
use requests::{Shape, Stream, share};
use voice::{Lane, Voice};

/// Mock Dynamo workers and the KV router that sends them requests, none of which is real. Without flags: one worker of
/// 0.5, whose load and limits are all on NATS, just the one that `metrics --namespace dynamo --component backend
/// --endpoint generate` looks for. What passes compute, blocks and hit rates are those of one invented stream of requests:
/// they add up, and the log says to what.
#[derive(Debug, Clone, Parser)]
#[command(name = "mock_worker", version, about, long_about = None, max_term_width = 120)]
pub struct MockConfig {
    #[command(flatten)]
    target: MockTarget,
    #[command(flatten)]
    engines: Engines,
    #[command(flatten)]
    load: FixedLoad,
    #[command(flatten)]
    places: Places,
    #[command(flatten)]
    etcd: EtcdOptions,
    #[command(flatten)]
    nats: NatsOptions,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Workers")]
struct MockTarget {
    /// Dynamo namespace
    #[arg(long, env = "DYN_NAMESPACE", default_value = "dynamo", value_name = "NAME", value_parser = target::name)]
    namespace: String,
    /// Component
    #[arg(long, default_value = "backend", value_name = "NAME", value_parser = target::name)]
    component: String,
    /// Endpoint
    #[arg(long, default_value = "generate", value_name = "NAME", value_parser = target::name)]
    endpoint: String,
    /// How many workers
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    workers: u16,
    /// Same seed, same ids and requests [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Plane of events: NATS, on which every release is found too, or ZMQ, for 1.6
    #[arg(long, default_value = "nats", value_name = "PLANE")]
    plane: Plane,
    /// Release that is spoken [default: 0.5 on NATS, whose workers say everything there; 1.6 with ZMQ]
    #[arg(long, value_name = "RELEASE")]
    release: Option<Release>,
    /// Forward passes a second that each worker makes, which is the pace of everything; 0: idle, and no event
    #[arg(long, default_value_t = 10.0, value_name = "RATE", value_parser = rate)]
    passes_per_second: f64,
    /// Requests in all, then idle; the first when somebody is there to hear of it: a subscriber of every ZMQ publisher, or
    /// on NATS somebody who asks for STATS [default: without end, from the start]
    #[arg(long, value_name = "N")]
    requests: Option<u64>,
}

impl MockTarget {
    fn release(&self) -> Release {
        let of_plane = match self.plane {
            Plane::Nats => Release::V0_5,
            Plane::Zmq => Release::V1_6,
        };
        self.release.unwrap_or(of_plane)
    }
}

impl fmt::Display for MockTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.namespace, self.component, self.endpoint)
    }
}

/// How events travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Plane {
    Nats,
    Zmq,
}

/// What the engines are like.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Engines")]
struct Engines {
    #[arg(long, value_name = "N", help = "Request slots of each rank", default_value_t = 100)]
    total_slots: u64,
    #[arg(long, value_name = "N", help = "KV blocks of each rank", default_value_t = 100)]
    kv_total: u64,
    /// Tokens a KV block
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    block_size: u32,
    /// Data-parallel ranks of each worker; more than one from release 0.7 on
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_RANKS)))]
    ranks: u32,
    #[arg(long, value_name = "N", help = "The first of them", default_value_t = 0)]
    dp_rank: u32,
    /// Name of the model on the card
    #[arg(long, default_value = "mock-model", value_name = "NAME")]
    model: String,
}

/// What is told instead of what the requests make.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Fixed values, in place of those that the requests make")]
struct FixedLoad {
    #[arg(long, value_name = "N", help = "Requests in slots")]
    active_slots: Option<u64>,
    #[arg(long, value_name = "N", help = "KV blocks in use")]
    kv_active: Option<u64>,
    #[arg(long, value_name = "N", help = "Requests that wait")]
    waiting: Option<u64>,
    #[arg(long, value_name = "0..1", help = "Hit rate of the engine's prefix cache")]
    hit_rate: Option<f64>,
}

/// Where workers are found and heard, beside NATS.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Registration and ZMQ, from release 0.7 on")]
struct Places {
    /// Folder to register in, where no etcd is configured [default: with ZMQ dynamo_store_kv in the temporary folder]
    #[arg(long, env = "DYN_FILE_KV", value_name = "FOLDER")]
    file_kv: Option<PathBuf>,
    /// Name or address of this machine that publishers listen on and register
    #[arg(long, default_value = "127.0.0.1", value_name = "HOST")]
    zmq_host: String,
}

/// A generation of payloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Release {
    // Before 0.1: hashed service name, flat load of four fields on the served endpoint itself.
    #[value(name = "0.0")]
    V0_0,
    // 0.1 and 0.2: hashed service name, flat load on `load_metrics`.
    #[value(name = "0.1")]
    V0_1,
    // 0.3: plain service name, nested load on `load_metrics`.
    #[value(name = "0.3")]
    V0_3,
    // 0.4 and 0.5: the same in an event too, and the router's book-keeping.
    #[value(name = "0.5")]
    V0_5,
    // 0.6 and 0.7: in events alone.
    #[value(name = "0.7")]
    V0_7,
    // 0.8: blocks in use are all that is left of the load.
    #[value(name = "0.8")]
    V0_8,
    // 0.9: the same in MessagePack, numbered.
    #[value(name = "0.9")]
    V0_9,
    // 1.4 - 1.6: no hit rates any more, but forward passes.
    #[value(name = "1.6")]
    V1_6,
}

impl Release {
    /// What its micro services call their version.
    fn version(self) -> &'static str {
        match self {
            Self::V0_0 | Self::V0_1 | Self::V0_3 | Self::V0_5 => wire::VERSION_BEFORE_0_6,
            Self::V0_7 => "0.7.1",
            Self::V0_8 => "0.8.1",
            Self::V0_9 => "0.9.1",
            Self::V1_6 => "1.6.1",
        }
    }

    fn name_form(self) -> Form {
        match self {
            Self::V0_0 => Form::HashedBar,
            Self::V0_1 => Form::Hashed,
            _ => Form::Plain,
        }
    }

    /// The endpoint whose STATS hold the load.
    fn reporter(self, endpoint: &str) -> &str {
        if matches!(self, Self::V0_1 | Self::V0_3 | Self::V0_5) { LOAD_ENDPOINT } else { endpoint }
    }

    /// The data of its reporter in a STATS reply; `None` where STATS have no data at all.
    fn stats(self, report: &Report) -> Option<Value> {
        let form = match self {
            Self::V0_0 | Self::V0_1 => LoadForm::Flat,
            Self::V0_3 => LoadForm::Sorted,
            Self::V0_5 => LoadForm::Nested,
            Self::V0_7 => return Some(Value::Null),
            Self::V0_8 | Self::V0_9 | Self::V1_6 => return None,
        };
        Some(wire::encode_load(report, form))
    }

    /// Whether it has such events.
    fn tells(self, lane: Lane) -> bool {
        match lane {
            Lane::Load(_) | Lane::Sequences => self >= Self::V0_5,
            Lane::Passes(_) => self == Self::V1_6,
            Lane::HitRates => self < Self::V1_6,
        }
    }

    /// Whether its events are numbered, in MessagePack.
    fn has_envelope(self) -> bool {
        self >= Self::V0_9
    }

    /// Whether its workers register, with a card, as the bridge finds them.
    fn registers(self) -> bool {
        self >= Self::V0_7
    }
}

/// Why the mock workers cannot run.
#[derive(Debug, thiserror::Error)]
pub enum MockError {
    /// NATS cannot be reached, or refuses.
    #[error(transparent)]
    Nats(#[from] NatsError),
    /// NATS does not take the service.
    #[error("cannot register on NATS: {0}")]
    Register(async_nats::Error),
    /// etcd does not take the registrations.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// It cannot be listened on.
    #[error("cannot publish over ZMQ on {host}: {source}; check --zmq-host")]
    Publish {
        /// As given.
        host: String,
        /// From the network.
        source: std::io::Error,
    },
    /// The folder cannot be written to.
    #[error("cannot register in {folder}: {source}; check --file-kv [DYN_FILE_KV]")]
    Folder {
        /// As given.
        folder: String,
        /// From the file system.
        source: std::io::Error,
    },
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse::<f64>().ok().filter(|rate| (0.0..=100_000.0).contains(rate));
    rate.ok_or_else(|| "must be a number from 0 to 100000".to_owned())
}

impl MockConfig {
    /// Reads command line and environment; an empty variable counts as unset.
    ///
    /// # Errors
    /// What clap reports: its exit code is 2, or 0 for `--help` and `--version`.
    pub fn from_args(args: impl IntoIterator<Item = String>) -> Result<Self, clap::Error> {
        let mut command = config::with_environment(Self::command());
        let config: Self = config::parsed(&mut command, args)?;
        config.check().map_err(|message| command.error(ErrorKind::ValueValidation, message))?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        self.nats.check()?;
        self.etcd.check()?;
        let release = self.target.release();
        if self.target.plane == Plane::Zmq && release != Release::V1_6 {
            return Err("--plane zmq needs --release 1.6".to_owned());
        }
        if self.engines.ranks > 1 && release < Release::V0_7 {
            return Err("--ranks needs --release 0.7 or later: STATS have one load a worker".to_owned());
        }
        Ok(())
    }

    fn shape(&self) -> Shape {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a checked rate")]
        let a_second = self.target.passes_per_second.ceil() as u64;
        Shape {
            engines: usize::from(self.target.workers) * self.engines.ranks as usize,
            block_size: self.engines.block_size,
            total_blocks: self.engines.kv_total,
            slots: self.engines.total_slots,
            heartbeat: a_second.max(1),
            requests: self.target.requests,
        }
    }

    fn key(&self, id: WorkerId) -> WorkerKey {
        let target = &self.target;
        WorkerKey {
            namespace: target.namespace.as_str().into(),
            component: target.component.as_str().into(),
            endpoint: target.endpoint.as_str().into(),
            id,
        }
    }

    /// The entries by which a worker is found; none where it is found on NATS alone.
    fn registration(&self, id: WorkerId) -> Vec<(String, String)> {
        let somewhere = self.target.plane == Plane::Zmq || self.etcd.is_given() || self.places.file_kv.is_some();
        if !somewhere || !self.target.release().registers() {
            return Vec::new();
        }
        let engines = &self.engines;
        let card = Card {
            model: engines.model.as_str().into(),
            role: Some(Role::Aggregated),
            block_size: Some(engines.block_size.into()),
            limits: Limits { blocks: Some(engines.kv_total), slots: Some(engines.total_slots), ..Limits::default() },
            ranks: Ranks { first: Some(engines.dp_rank), count: engines.ranks },
        };
        let key = self.key(id);
        vec![wire::encode_instance(&key), wire::encode_card(&key, &card)]
    }
}

/// Serves until `shutdown`, then takes its workers off.
///
/// # Errors
/// NATS cannot be reached at start, or does not take the services; or etcd or the folder does not take the registrations.
pub async fn run(config: MockConfig, shutdown: impl Future<Output = ()>) -> Result<(), MockError> {
    let mut random = config.target.seed.map_or_else(rand::make_rng::<StdRng>, StdRng::seed_from_u64);
    let mut ids = BTreeSet::new();
    while ids.len() < config.target.workers.into() {
        // A lease id of etcd is a positive i64.
        ids.insert(WorkerId(random.random::<u64>() >> 1));
    }
    let workers: Vec<_> = ids.into_iter().collect();
    let mut entries: Vec<_> = workers.iter().flat_map(|id| config.registration(*id)).collect();
    let voice = Voice::new(&config, &workers, &mut random);
    let stream = Stream::new(config.shape(), random);
    let mut shutdown = pin!(shutdown);
    let (outlet, loads) = match config.target.plane {
        Plane::Nats => {
            let loads = Loads::new(&voice, &stream, workers.len());
            let Some(outlet) = nats::open(&config, &workers, &loads, shutdown.as_mut()).await? else { return Ok(()) };
            (Outlet::Nats(outlet), loads)
        }
        Plane::Zmq => {
            let outlet = zmq::open(&config, &workers, &voice).await?;
            entries.extend(outlet.entries());
            (Outlet::Zmq(outlet), Loads::default())
        }
    };
    let serving = || info!("Serving {} as {} worker(s)", config.target, workers.len());
    let mut play = Play { stream, voice, loads, outlet };
    let held = tokio::select! {
        held = registration::hold(&config, &entries, serving, shutdown) => held,
        () = play.run(&config) => Ok(()),
    };
    play.end().await;
    held
}

impl FixedLoad {
    /// A load with the fixed values in it, as far as workers of the release have them.
    fn over(&self, made: Load, release: Release) -> Load {
        let active_blocks = self.kv_active.or(made.active_blocks);
        let load = Load {
            active_slots: self.active_slots.or(made.active_slots),
            active_blocks,
            cache_usage: active_blocks.zip(made.total_blocks).map(|(active, total)| share(active, total)),
            waiting: self.waiting.or(made.waiting),
            prefix_hit_rate: self.hit_rate.or(made.prefix_hit_rate),
            ..made
        };
        if release == Release::V0_0 {
            return Load { waiting: None, cache_usage: None, prefix_hit_rate: None, ..load };
        }
        load
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_release_does_not_have_is_refused_with_a_hint() {
        MockConfig::command().debug_assert();
        for (options, hint) in [
            (["--plane", "zmq", "--release", "0.9"], "--plane zmq needs --release 1.6"),
            (["--ranks", "2", "--release", "0.5"], "--ranks needs --release 0.7"),
        ] {
            let options = ["mock_worker"].into_iter().chain(options).map(str::to_owned);
            let error = MockConfig::from_args(options).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(hint), "{error}");
        }
    }
}
