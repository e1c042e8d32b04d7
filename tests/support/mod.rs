//! What the tests run against: real servers, this package's programs, and an expectation that is waited for.

mod bridge;
mod certificates;
pub mod cluster;
mod collector;
pub mod documents;
pub mod dynamo;
mod etcd;
pub mod event;
mod fake;
mod gate;
pub mod grafana;
mod kube;
mod nats;
mod otlp;
pub mod peers;
mod port;
mod program;
mod prometheus;
pub mod registered;
mod series;
mod store;

pub use bridge::{Bridge, command, mock_worker, refusal, serving};
pub use certificates::Authority;
pub use cluster::{Chat, Cluster, Place};
pub use collector::Collector;
pub use dynamo::Dynamo;
pub use etcd::Etcd;
pub use fake::{FakeService, endpoint, reply};
pub use gate::{FreezingGate, Gate};
pub use kube::{Kube, NAMESPACE};
pub use nats::Nats;
pub use otlp::{Receiver, Request, Via, attribute, catalogued};
pub use port::Port;
pub use program::Program;
pub use prometheus::{Found, Prometheus};
pub use series::{Exposition, Row, same, worker};
pub use store::Store;

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Bytes captured from a release.
pub fn captured(release: &str, file: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(release).join(file);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Long enough for a loaded machine: a test that waits for a state fails by what it sees, not by the clock.
const DEADLINE: Duration = Duration::from_secs(120);
const BETWEEN_LOOKS: Duration = Duration::from_millis(25);

/// How often a line may have been written since `start` that is written at most once a minute, and once more where it ends
/// a time of trouble.
pub fn lines_allowed(start: std::time::Instant) -> u64 {
    2 + start.elapsed().as_secs() / 60
}

/// Looks again and again until there is something to see.
///
/// Panics after [`DEADLINE`] with `what` was waited for and what was last seen instead.
pub async fn eventually<T, F: Future<Output = Result<T, String>>>(what: &str, look: impl FnMut() -> F) -> T {
    within(DEADLINE, what, look).await
}

/// The same, where it is known to take longer.
pub async fn within<T, F>(deadline: Duration, what: &str, mut look: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, String>>,
{
    let start = Instant::now();
    loop {
        match look().await {
            Ok(seen) => return seen,
            Err(instead) if start.elapsed() > deadline => {
                panic!("not within {deadline:?}: {what}; instead:\n{instead}")
            }
            Err(_) => sleep(BETWEEN_LOOKS).await,
        }
    }
}
