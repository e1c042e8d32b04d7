//! The hall where all meet: sources speak, one loop folds, sinks read.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::config::Config;
use crate::exposition::Exposition;
use crate::fleet::{Applied, Fleet, Observation, Snapshot};
use crate::http;
use crate::instruments::Recorder;
use crate::journal::Journal;
use crate::process;
use crate::source::{NatsError, nats};
use crate::telemetry::{MetricPush, TelemetryError};

/// Observations on their way to the fold. A source that finds it full waits, and its transport sees the pressure.
const OBSERVATIONS: usize = 8192;
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
    let journal = Journal::open(&rules.target);
    let fold = Fold {
        fleet: Fleet::new(rules),
        observations,
        published,
        recorders,
        journal,
        interval: config.scrape.poll_interval,
    };

    let stop = CancellationToken::new();
    let mut folding = tokio::spawn(fold.run(stop.clone()));
    let serving = tokio::spawn(http::serve(listener, Arc::new(exposition), stop.clone()));
    let mut hearing = tokio::spawn(nats::run(config, sender, stop.clone()));
    let result = tokio::select! {
        () = shutdown => Ok(()),
        ended = &mut hearing => ended.map_err(BridgeError::from).and_then(|ended| ended.map_err(BridgeError::from)),
        ended = &mut folding => ended.map_err(BridgeError::from),
    };
    stop.cancel();
    let unfinished = [hearing.abort_handle(), folding.abort_handle(), serving.abort_handle()];
    let ending = async {
        if !hearing.is_finished() {
            hearing.await.ok();
        }
        if !folding.is_finished() {
            folding.await.ok();
        }
        serving.await.ok();
    };
    if tokio::time::timeout(STOP_TIMEOUT, ending).await.is_err() {
        warn!("Some tasks did not end in time");
        unfinished.iter().for_each(tokio::task::AbortHandle::abort);
    }
    if let Some(push) = push {
        push.shutdown().await;
    }
    result
}

/// The one writer of the fleet.
struct Fold {
    fleet: Fleet,
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
                tokio::select! {
                    _ = self.observations.recv_many(&mut batch, BATCH), if !self.observations.is_closed() => {}
                    () = tokio::time::sleep_until((published + self.interval).into()) => published = self.publish(),
                }
                for observation in batch.drain(..) {
                    if self.apply(observation) {
                        published = self.publish();
                        self.journal.scraped(&self.published.borrow(), published);
                    }
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
        self.published.send_replace(Arc::new(self.fleet.snapshot(now)));
        now
    }
}
