//! Mock workers of Dynamo 1.6: registered in etcd, or in a folder on a machine without any server, and heard over ZMQ.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::RngExt;
use rand::rngs::StdRng;
use tokio::net::lookup_host;
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::{MockConfig, MockError};
use crate::fleet::{Card, Limits, Rank, Ranks, Role, WorkerId, WorkerKey};
use crate::source::etcd;
use crate::wire::{self, ActiveBlocks, ActiveLoad, ActiveLoadForm, Envelope};
use crate::zmtp::Publisher;

const TOPIC: &str = "kv_metrics";
/// As often as Dynamo does.
const TOUCH_INTERVAL: Duration = Duration::from_secs(3);

/// Serves until `shutdown`, then takes its entries out of etcd or the folder.
pub(super) async fn serve(
    config: &MockConfig,
    workers: Vec<(WorkerId, StdRng)>,
    shutdown: Pin<&mut impl Future<Output = ()>>,
) -> Result<(), MockError> {
    let mut entries = Vec::new();
    let mut tasks = JoinSet::new();
    let count = workers.len();
    let host = address_of(&config.zmq.zmq_host).await?;
    for (id, mut random) in workers {
        let publisher = Publisher::bind(host).await.map_err(|source| unusable(&config.zmq.zmq_host, source))?;
        let worker = Worker { config: config.clone(), key: key(config, id), number: random.random::<u64>() >> 8 };
        entries.extend(worker.registration(&publisher.endpoint()));
        tasks.spawn(worker.publish(publisher, random));
    }
    let registered = || info!("Serving {} as {count} worker(s)", config.target);
    if config.etcd.is_given() {
        etcd::hold(&config.etcd, &entries, registered, shutdown).await?;
    } else {
        let folder = config.zmq.file_kv.clone().unwrap_or_else(|| std::env::temp_dir().join("dynamo_store_kv"));
        let refused = |source| MockError::Folder { folder: folder.display().to_string(), source };
        let files = Files::write(&folder, &entries).map_err(refused)?;
        registered();
        files.touch_until(shutdown).await;
    }
    tasks.shutdown().await;
    Ok(())
}

/// Its address, with any port.
async fn address_of(host: &str) -> Result<SocketAddr, MockError> {
    let mut addresses = lookup_host((host, 0)).await.map_err(|source| unusable(host, source))?;
    addresses.next().ok_or_else(|| unusable(host, io::Error::other("it has no address")))
}

fn unusable(host: &str, source: io::Error) -> MockError {
    MockError::Publish { host: host.to_owned(), source }
}

fn key(config: &MockConfig, id: WorkerId) -> WorkerKey {
    let target = &config.target;
    WorkerKey {
        namespace: target.namespace.as_str().into(),
        component: target.component.as_str().into(),
        endpoint: target.endpoint.as_str().into(),
        id,
    }
}

struct Worker {
    config: MockConfig,
    key: WorkerKey,
    /// Its id as a publisher, which is random from 1.3 on.
    number: u64,
}

impl Worker {
    fn registration(&self, address: &str) -> [(String, String); 3] {
        let card = Card {
            model: self.config.zmq.model.as_str().into(),
            role: Some(Role::Aggregated),
            block_size: Some(self.config.zmq.block_size),
            limits: Limits { blocks: Some(self.config.load.kv_total), slots: Some(self.config.load.total_slots) },
            ranks: Ranks { first: 0, count: self.config.zmq.ranks },
        };
        [
            wire::encode_instance(&self.key),
            wire::encode_card(&self.key, &card),
            wire::encode_channel(&self.key, TOPIC, self.number, address),
        ]
    }

    /// Says the load of each rank in turn.
    async fn publish(self, publisher: Publisher, mut random: StdRng) {
        if self.config.target.events_per_second <= 0.0 {
            return std::future::pending().await;
        }
        let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / self.config.target.events_per_second));
        for sequence in 0.. {
            ticks.tick().await;
            #[expect(clippy::cast_possible_truncation, reason = "the remainder is a rank")]
            let rank = Rank((sequence % u64::from(self.config.zmq.ranks)) as u32);
            let total = self.config.load.kv_total;
            let used = self.config.load.kv_active.unwrap_or_else(|| random.random_range(0..=total));
            let load = ActiveLoad { worker: self.key.id, rank, blocks: ActiveBlocks::Used(Some(used)) };
            publisher.publish(&self.message(sequence, &load));
        }
    }

    fn message(&self, sequence: u64, load: &ActiveLoad) -> [Vec<u8>; 4] {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        wire::encode_frames(&Envelope {
            publisher: self.number,
            sequence,
            published_at: u64::try_from(since.as_millis()).unwrap_or_default(),
            topic: TOPIC,
            payload: &wire::encode_active_load(load, ActiveLoadForm::Used),
        })
    }
}

/// Files in the folder. They are removed when this is dropped.
struct Files(Vec<PathBuf>);

impl Files {
    /// A file is whole from the moment that it has its name.
    fn write(folder: &Path, entries: &[(String, String)]) -> io::Result<Self> {
        let mut files = Self(Vec::new());
        for (path, value) in entries {
            let (kind, name) = split(path);
            let folder = folder.join(kind);
            std::fs::create_dir_all(&folder)?;
            let (unfinished, file) = (folder.join(format!(".tmp_{name}")), folder.join(&name));
            std::fs::write(&unfinished, value)?;
            std::fs::rename(&unfinished, &file)?;
            files.0.push(file);
        }
        Ok(files)
    }

    async fn touch_until(&self, shutdown: Pin<&mut impl Future<Output = ()>>) {
        let touch = async {
            let mut ticks = tokio::time::interval(TOUCH_INTERVAL);
            loop {
                ticks.tick().await;
                self.touch();
            }
        };
        tokio::select! {
            () = shutdown => {}
            () = touch => {}
        }
    }

    fn touch(&self) {
        for path in &self.0 {
            let file = std::fs::File::options().append(true).open(path);
            if let Err(error) = file.and_then(|file| file.set_modified(SystemTime::now())) {
                warn!("{} was not touched: {error}", path.display());
            }
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(error) = std::fs::remove_file(path) {
                warn!("{} was not removed: {error}", path.display());
            }
        }
    }
}

/// Sub-folder and file name of a key: `v1/instances` and the rest, percent-encoded as 1.6 does.
fn split(path: &str) -> (&str, String) {
    let end = path.match_indices('/').nth(1).map_or(path.len(), |(end, _)| end);
    let rest = path[end..].trim_start_matches('/');
    let encoded = rest.bytes().map(|byte| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' => char::from(byte).to_string(),
        byte => format!("%{byte:02X}"),
    });
    (&path[..end], encoded.collect())
}
