//! Mock workers, on the planes of old releases and of today's.
//!
//! Load and events are random and, as in Dynamo's own old mock worker, do not correlate.

#![expect(clippy::doc_markdown, reason = "doc comments of options are their help texts")]

mod nats;
mod zmq;

use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;

use clap::{Args, FromArgMatches, Parser, ValueEnum};
use clap::{CommandFactory, error::ErrorKind};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use crate::config::{self, NatsOptions};
use crate::fleet::{Load, MAX_RANKS, Rank, Report, WorkerId};
use crate::source::NatsError;
use crate::source::etcd::{EtcdError, EtcdOptions};
use crate::target::{self, Form};
use crate::wire::{self, LoadForm};

/// Mock Dynamo workers with random load. Without flags: one worker on NATS, just the one that `metrics --namespace dynamo
/// --component backend --endpoint generate` looks for, and KV hit rate events about it.
#[derive(Debug, Clone, Parser)]
#[command(name = "mock_worker", version, about, long_about = None, max_term_width = 120)]
pub struct MockConfig {
    #[command(flatten)]
    target: MockTarget,
    #[command(flatten)]
    load: FixedLoad,
    #[command(flatten)]
    zmq: ZmqPlane,
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
    /// Same seed, same ids, loads and events [default: random]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Plane that load is told over: STATS on NATS, or events over ZMQ with registration in etcd or in a folder
    #[arg(long, default_value = "nats", value_name = "PLANE")]
    plane: Plane,
    /// Release whose payloads are sent on the NATS plane
    #[arg(long, default_value = "0.3", value_name = "RELEASE")]
    release: Release,
    /// Events a second and worker, 0 for none: KV hit rates on NATS, loads on ZMQ
    #[arg(long, default_value_t = 1.0, value_name = "RATE", value_parser = rate)]
    events_per_second: f64,
}

impl fmt::Display for MockTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.namespace, self.component, self.endpoint)
    }
}

/// How workers tell their load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Plane {
    // STATS of NATS micro services, as up to 0.5.
    Nats,
    // Events over ZMQ, found through a folder, as 1.6 does with file discovery.
    Zmq,
}

/// What only the ZMQ plane needs.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "ZMQ plane")]
struct ZmqPlane {
    /// Folder to register in, where no etcd is configured [default: dynamo_store_kv in the temporary folder]
    #[arg(long, env = "DYN_FILE_KV", value_name = "FOLDER")]
    file_kv: Option<PathBuf>,
    /// Name or address of this machine that publishers listen on and register
    #[arg(long, default_value = "127.0.0.1", value_name = "HOST")]
    zmq_host: String,
    /// Name of the model on the card
    #[arg(long, default_value = "mock-model", value_name = "NAME")]
    model: String,
    /// Tokens a KV block
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    block_size: u64,
    /// Data-parallel ranks of each worker
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_RANKS)))]
    ranks: u32,
}

/// Values that every worker reports; those left out are random.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Fixed values")]
struct FixedLoad {
    #[arg(long, value_name = "N", help = "Requests in slots")]
    active_slots: Option<u64>,
    #[arg(long, value_name = "N", help = "Slots", default_value_t = 100)]
    total_slots: u64,
    #[arg(long, value_name = "N", help = "KV blocks in use")]
    kv_active: Option<u64>,
    #[arg(long, value_name = "N", help = "KV blocks", default_value_t = 100)]
    kv_total: u64,
    #[arg(long, value_name = "N", help = "Requests that wait")]
    waiting: Option<u64>,
    #[arg(long, value_name = "0..1", help = "Hit rate of the engine's prefix cache")]
    hit_rate: Option<f64>,
    #[arg(long, value_name = "N", help = "Data-parallel rank", default_value_t = 0)]
    dp_rank: u32,
}

/// A generation of payloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
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
}

impl Release {
    fn name_form(self) -> Form {
        match self {
            Self::V0_0 => Form::HashedBar,
            Self::V0_1 => Form::Hashed,
            Self::V0_3 => Form::Plain,
        }
    }

    fn load_form(self) -> LoadForm {
        match self {
            Self::V0_0 | Self::V0_1 => LoadForm::Flat,
            Self::V0_3 => LoadForm::Nested,
        }
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
        let config = Self::from_arg_matches(&command.try_get_matches_from_mut(args)?)?;
        config
            .nats
            .check()
            .and_then(|()| config.etcd.check())
            .map_err(|message| command.error(ErrorKind::ValueValidation, message))?;
        Ok(config)
    }
}

/// Serves until `shutdown`, then takes its workers off.
///
/// # Errors
/// NATS cannot be reached at start, or does not take the services; or the folder does not take the registrations.
pub async fn run(config: MockConfig, shutdown: impl Future<Output = ()>) -> Result<(), MockError> {
    let mut random = config.target.seed.map_or_else(rand::make_rng::<StdRng>, StdRng::seed_from_u64);
    let mut ids = BTreeSet::new();
    while ids.len() < config.target.workers.into() {
        // A lease id of etcd is a positive i64.
        ids.insert(WorkerId(random.random::<u64>() >> 1));
    }
    let workers = ids.into_iter().map(|id| (id, StdRng::from_rng(&mut random))).collect();
    let shutdown = pin!(shutdown);
    match config.target.plane {
        Plane::Nats => nats::serve(&config, workers, shutdown).await,
        Plane::Zmq => zmq::serve(&config, workers, shutdown).await,
    }
}

impl FixedLoad {
    fn report(&self, release: Release, random: &mut StdRng) -> Value {
        let mut within = |total: u64| random.random_range(0..=total);
        let active_slots = self.active_slots.unwrap_or_else(|| within(self.total_slots));
        let active_blocks = self.kv_active.unwrap_or_else(|| within(self.kv_total));
        let mut load = Load {
            active_slots: Some(active_slots),
            total_slots: Some(self.total_slots),
            active_blocks: Some(active_blocks),
            total_blocks: Some(self.kv_total),
            ..Load::default()
        };
        if release != Release::V0_0 {
            load.waiting = Some(self.waiting.unwrap_or_else(|| within(10)));
            load.cache_usage = Some(share(active_blocks, self.kv_total));
            load.prefix_hit_rate = Some(self.hit_rate.unwrap_or_else(|| share(within(100), 100)));
        }
        wire::encode_load(&Report { rank: Rank(self.dp_rank), load }, release.load_form())
    }
}

#[expect(clippy::cast_precision_loss, reason = "mock values are small")]
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}
