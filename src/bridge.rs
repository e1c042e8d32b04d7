//! The hall where all meet: sources speak, one loop folds, sinks read.

use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::config::Config;
use crate::exposition::Exposition;
use crate::fleet::{Applied, Fleet, Observation, OwnCounts, Snapshot, Source};
use crate::http::{self, Connections};
use crate::instruments::Recorder;
use crate::journal::Journal;
use crate::readiness::Readiness;
use crate::source::etcd::{self, EtcdError};
use crate::source::files::{self, FilesError};
use crate::source::kubernetes::{self, KubernetesError};
use crate::source::nats::{self, NatsError};
use crate::source::owners::Owners;
use crate::source::registry::Registry;
use crate::source::zmq;
use crate::telemetry::{MetricPush, TelemetryError};
use crate::{log, otlp, process};

/// Observations on their way to the fold. A source that finds it full waits, and its transport sees the pressure.
const OBSERVATIONS: usize = 8192;
/// Changes of channels on their way to those who listen to them.
const CHANNEL_CHANGES: usize = 1024;
/// Descriptors beside those of ZMQ publishers: clients, servers, files.
const OTHER_DESCRIPTORS: u64 = 1024;
/// Observations folded between two looks at the clock.
const BATCH: usize = 512;
/// How long tasks may take to end once they are told to.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the bridge ended, other than being told to.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// A source cannot be heard.
    #[error(transparent)]
    Nats(#[from] NatsError),
    /// A source cannot be heard.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// A source cannot be heard.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// A source cannot be heard.
    #[error(transparent)]
    Kubernetes(#[from] KubernetesError),
    /// An exporter cannot be made.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// A defect of the bridge itself.
    #[error("a task of the bridge ended unexpectedly: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// Runs the bridge until `shutdown` completes: serves on `listener`, which the caller has bound, and joins every task
/// that it started before it returns.
///
/// # Errors
/// NATS cannot be reached at start, or an exporter cannot be made. What goes wrong later is counted and survived.
pub async fn run(config: Config, listener: TcpListener, shutdown: impl Future<Output = ()>) -> Result<(), BridgeError> {
    process::install_crypto();
    let rules = config.rules();
    let (published, fleet) = watch::channel(Arc::new(Snapshot::default()));
    let (exposition, recorder) = Exposition::new(fleet.clone(), rules.max_workers)?;
    let push = MetricPush::start(&config.otlp, &fleet, rules.max_workers)?;
    let mut recorders = vec![recorder];
    let push = push.map(|(push, recorder)| {
        recorders.push(recorder);
        push
    });
    let (sender, observations) = mpsc::channel(OBSERVATIONS);
    let journal = Journal::open(&rules.target, &config.events.topics);
    let connections = Arc::<Connections>::default();
    let fold = Fold {
        fleet: Fleet::new(rules),
        connections: Arc::clone(&connections),
        observations,
        published,
        recorders,
        journal,
        interval: config.scrape.poll_interval,
    };

    let pages = http::Pages { exposition, fleet, readiness: Readiness::of(&config), trouble: Mutex::default() };
    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    tasks.spawn(done(fold.run(stop.clone())));
    tasks.spawn(done(http::serve(listener, pages, connections, stop.clone())));
    start_sources(&mut tasks, config, &sender, &stop);
    drop(sender);
    let result = tokio::select! {
        () = shutdown => Ok(()),
        Some(ended) = tasks.join_next() => ended.map_err(BridgeError::from).flatten(),
    };
    stop.cancel();
    let ending = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(STOP_TIMEOUT, ending).await.is_err() {
        warn!("Some tasks did not end in time");
        tasks.abort_all();
    }
    if let Some(push) = push {
        push.shutdown().await;
    }
    result
}

type Ended = Result<(), BridgeError>;

/// A task that has no error of its own.
async fn done(task: impl Future<Output = ()>) -> Ended {
    task.await;
    Ok(())
}

/// One task for each voice that is configured, and one for the channels that they find.
fn start_sources(
    tasks: &mut JoinSet<Ended>,
    config: Config,
    observations: &mpsc::Sender<Observation>,
    stop: &CancellationToken,
) {
    let voices = config.voices().unwrap_or_default();
    let (channels, changes) = mpsc::channel(CHANNEL_CHANGES);
    let (owners, namespace) = (Owners::default(), config.watched.namespace.clone());
    let registry =
        |source| Registry::new(source, namespace.clone(), owners.clone(), observations.clone(), channels.clone());
    if voices.etcd {
        let (options, registry, stop) = (config.etcd.clone(), registry(Source::Etcd), stop.clone());
        tasks.spawn(async move { Ok(etcd::run(options, registry, stop).await?) });
    }
    if voices.files {
        let (options, registry, stop) = (config.files.clone(), registry(Source::Files), stop.clone());
        tasks.spawn(async move { Ok(files::run(options, registry, stop).await?) });
    }
    if voices.kubernetes {
        let (options, registry, stop) = (config.kubernetes.clone(), registry(Source::Kubernetes), stop.clone());
        let (needed, observations) = (config.needs_kubernetes(), observations.clone());
        tasks.spawn(async move {
            match Box::pin(kubernetes::run(options, registry, stop.clone())).await {
                // A pod that has another voice need not have rights in its cluster.
                Err(error) if !needed => {
                    warn!("{error}");
                    observations.send(Observation::Abandoned(Source::Kubernetes)).await.ok();
                    stop.cancelled().await;
                    Ok(())
                }
                ended => Ok(ended?),
            }
        });
    }
    if config.hears_zmq() {
        // A publisher for each topic of each worker.
        let connections = config.scrape.max_workers as usize * config.events.topics.len();
        if let Err(shortage) = process::descriptors_suffice(connections as u64 + OTHER_DESCRIPTORS) {
            warn!("{shortage}");
        }
        let shared = zmq::Shared::new(connections, config.events.topics.clone(), owners.clone(), observations.clone());
        let listening = zmq::run(config.zmq.clone(), namespace.clone(), shared, changes, stop.clone());
        tasks.spawn(done(listening));
    }
    if voices.nats {
        let (sender, stop) = (observations.clone(), stop.clone());
        tasks.spawn(async move { Ok(Box::pin(nats::run(config, owners, sender, stop)).await?) });
    }
}

/// The one writer of the fleet.
struct Fold {
    fleet: Fleet,
    /// Whose counts are published with the fleet.
    connections: Arc<Connections>,
    observations: mpsc::Receiver<Observation>,
    published: watch::Sender<Arc<Snapshot>>,
    /// One for each meter provider.
    recorders: Vec<Recorder>,
    journal: Journal,
    /// The fleet is published at least this often, so that a worker leaves in time whatever the sources do.
    interval: Duration,
}

impl Fold {
    async fn run(mut self, stop: CancellationToken) {
        stop.run_until_cancelled(async {
            let mut batch = Vec::with_capacity(BATCH);
            let mut published = self.publish();
            loop {
                let mut due = tokio::select! {
                    _ = self.observations.recv_many(&mut batch, BATCH), if !self.observations.is_closed() => false,
                    () = tokio::time::sleep_until((published + self.interval).into()) => true,
                };
                for observation in batch.drain(..) {
                    due |= self.apply(observation);
                }
                if due {
                    published = self.publish();
                    self.journal.published(&self.published.borrow(), published);
                }
            }
        })
        .await;
    }

    /// Whether a scrape that reached the fleet ended with this observation: the best moment to publish.
    fn apply(&mut self, observation: Observation) -> bool {
        let scraped = matches!(&observation, Observation::Scraped(scrape) if scrape.outcome.is_success());
        let now = Instant::now();
        let Applied { measurements, rejection } = self.fleet.apply(observation, now);
        for recorder in &self.recorders {
            for measurement in &measurements {
                recorder.record(measurement);
            }
        }
        if let Some(rejection) = rejection {
            self.journal.rejected(&rejection, now);
        }
        scraped
    }

    fn publish(&mut self) -> Instant {
        let now = Instant::now();
        let mut fleet = self.fleet.snapshot(now);
        fleet.health.own = OwnCounts {
            http_connections: self.connections.open(),
            http_connections_evicted: self.connections.evicted(),
            log_lines_dropped: log::lines_dropped(),
            pushes: otlp::push_counts(),
        };
        self.published.send_replace(Arc::new(fleet));
        now
    }
}
