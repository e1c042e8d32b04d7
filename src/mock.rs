//! Mock workers: NATS micro services that answer STATS as real Dynamo workers do, and routers' events about them.
//!
//! Load and events are random and, as in Dynamo's own old mock worker, do not correlate.

use std::collections::BTreeSet;
use std::future::Future;
use std::time::Duration;

use async_nats::Client;
use async_nats::service::endpoint::Endpoint;
use async_nats::service::{Service, ServiceExt};
use clap::{Args, FromArgMatches, Parser, ValueEnum};
use clap::{CommandFactory, error::ErrorKind};
use futures_util::StreamExt;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::config::{self, NatsOptions};
use crate::fleet::{HitBlocks, Load, Rank, Report, WorkerId};
use crate::source::{NatsError, nats};
use crate::target::{self, Form, LOAD_ENDPOINT};
use crate::wire::{self, LoadForm};

/// A server that is gone cannot be told goodbye.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest prompt of a mock event, in blocks.
const MAX_ISL_BLOCKS: u32 = 64;

/// Mock Dynamo workers on NATS, with KV hit rate events about them. Without flags: one worker, just the one that
/// `metrics --namespace dynamo --component backend --endpoint generate` looks for.
#[derive(Debug, Clone, Parser)]
#[command(name = "mock_worker", version, about, long_about = None, max_term_width = 120)]
pub struct MockConfig {
    #[command(flatten)]
    target: MockTarget,
    #[command(flatten)]
    load: FixedLoad,
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
    /// Release whose payloads are sent
    #[arg(long, default_value = "0.3", value_name = "RELEASE")]
    release: Release,
    /// KV hit rate events a second and worker; 0 for none
    #[arg(long, default_value_t = 1.0, value_name = "RATE", value_parser = rate)]
    events_per_second: f64,
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
    /// Before 0.1: hashed service name, flat load of four fields on the served endpoint itself.
    #[value(name = "0.0")]
    V0_0,
    /// 0.1 and 0.2: hashed service name, flat load on `load_metrics`.
    #[value(name = "0.1")]
    V0_1,
    /// 0.3: plain service name, nested load on `load_metrics`.
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
        config.nats.check().map_err(|message| command.error(ErrorKind::ValueValidation, message))?;
        Ok(config)
    }
}

/// Serves until `shutdown`, then takes its services off the bus.
///
/// # Errors
/// NATS cannot be reached at start, or does not take the services.
pub async fn run(config: MockConfig, shutdown: impl Future<Output = ()>) -> Result<(), MockError> {
    let mut shutdown = std::pin::pin!(shutdown);
    let client = tokio::select! {
        client = nats::connect(&config.nats, None) => client?,
        () = shutdown.as_mut() => return Ok(()),
    };
    let mut random = config.target.seed.map_or_else(rand::make_rng::<StdRng>, StdRng::seed_from_u64);
    let mut tasks = JoinSet::new();
    let mut services = Vec::new();
    let mut ids = BTreeSet::new();
    while ids.len() < config.target.workers.into() {
        // A lease id of etcd is a positive i64.
        let id = WorkerId(random.random::<u64>() >> 1);
        if ids.insert(id) {
            let worker = Worker { config: config.clone(), id, random: StdRng::from_rng(&mut random) };
            services.push(worker.start(&client, &mut tasks).await.map_err(MockError::Register)?);
        }
    }
    let MockTarget { namespace, component, endpoint, .. } = &config.target;
    info!("Serving {namespace}/{component}/{endpoint} as {} worker(s)", ids.len());
    shutdown.await;
    tasks.shutdown().await;
    if tokio::time::timeout(LEAVE_TIMEOUT, leave(services, &client)).await.is_err() {
        warn!("NATS did not take the services off in time");
    }
    Ok(())
}

async fn leave(services: Vec<Service>, client: &Client) {
    for service in services {
        if let Err(error) = service.stop().await {
            warn!("A service did not stop cleanly: {error}");
        }
    }
    if let Err(error) = client.drain().await {
        warn!("The connection did not close cleanly: {error}");
    }
}

struct Worker {
    config: MockConfig,
    id: WorkerId,
    random: StdRng,
}

impl Worker {
    async fn start(mut self, client: &Client, tasks: &mut JoinSet<()>) -> Result<Service, async_nats::Error> {
        let MockTarget { namespace, component, endpoint, release, .. } = self.config.target.clone();
        let name = target::service_name(&namespace, &component, release.name_form());
        let reporter = if release == Release::V0_0 { endpoint.clone() } else { LOAD_ENDPOINT.to_owned() };
        let reports_as = format!("{name}-{reporter}-{:x}", self.id);
        let (id, load, mut random) = (self.id, self.config.load.clone(), StdRng::from_rng(&mut self.random));
        let service = client
            .service_builder()
            .description(target::description(&namespace, &component))
            .stats_handler(
                move |endpoint, _| {
                    if endpoint == reports_as { load.report(release, &mut random) } else { Value::Null }
                },
            )
            .start(&name, wire::VERSION_BEFORE_0_6)
            .await?;
        for endpoint in BTreeSet::from([endpoint, reporter]) {
            let registered = service.endpoint_builder().name(format!("{name}-{endpoint}-{id:x}"));
            let requests = registered.add(target::endpoint_subject(&name, &endpoint, id)).await?;
            tasks.spawn(answer(requests));
        }
        if self.config.target.events_per_second > 0.0 {
            tasks.spawn(self.publish(client.clone()));
        }
        Ok(service)
    }

    /// Publishes events about this worker, as a router would that sends it requests.
    async fn publish(mut self, client: Client) {
        let subject = target::kv_hit_rate_subject(&self.config.target.namespace);
        let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / self.config.target.events_per_second));
        loop {
            ticks.tick().await;
            let isl = self.random.random_range(1..=MAX_ISL_BLOCKS);
            let blocks = HitBlocks { isl, overlap: self.random.random_range(0..=isl) };
            let event = wire::encode_hit_rate(self.id, blocks);
            if let Err(error) = client.publish(subject.clone(), event.into()).await {
                warn!("An event was not published: {error}");
            }
        }
    }
}

/// Answers requests to the endpoint with nothing: a mock serves no model.
async fn answer(mut requests: Endpoint) {
    while let Some(request) = requests.next().await {
        if let Err(error) = request.respond(Ok("".into())).await {
            warn!("A request was not answered: {error}");
        }
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
