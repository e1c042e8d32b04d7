//! Real Dynamo workers and routers, of any release.

use std::ffi::OsStr;

use tokio::process::Command;

use super::{Etcd, Exposition, Kube, NAMESPACE, Nats, Program, peers, worker};

/// One for each payload generation that reports over NATS STATS.
pub const STATS_RELEASES: [&str; 3] = ["0.1.1", "0.3.2", "0.5.1"];
/// One for each form of load event that is heard over NATS.
pub const EVENT_RELEASES: [&str; 3] = ["0.8.1", "0.9.1", "1.2.1"];
/// One for each layout of discovery and events that is heard over ZMQ.
pub const TODAYS_RELEASES: [&str; 4] = ["1.0.2", "1.3.1", "1.4.2", "1.6.1"];

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/dynamo");

/// What a Dynamo cluster needs: NATS with streams, and etcd. Stopped when dropped.
pub struct Dynamo {
    pub nats: Nats,
    etcd: Etcd,
}

/// Killed when dropped.
pub struct DynamoWorker {
    pub program: Program,
    /// As it printed it.
    pub id: String,
}

impl Dynamo {
    /// For the releases that report over STATS.
    pub async fn start() -> Option<Self> {
        Self::with(&STATS_RELEASES).await
    }

    /// `None` where no such Dynamo runs: see [`peers::can_run_dynamo`].
    pub async fn with(releases: &[&str]) -> Option<Self> {
        if !peers::can_run_dynamo(releases).await {
            return None;
        }
        dynamo_metrics::process::install_crypto();
        Some(Self { nats: Nats::with_streams().await, etcd: Etcd::start().await })
    }

    /// Options of a bridge that is told of both servers.
    pub fn both(&self) -> [String; 4] {
        ["--nats-server".to_owned(), self.nats.url().to_owned(), "--etcd-endpoints".to_owned(), self.etcd.url()]
    }

    /// A worker whose numbers are out.
    pub async fn worker(&self, release: &str, options: &[&str]) -> DynamoWorker {
        DynamoWorker::ready(self.program(&[&["worker", release], options].concat())).await
    }

    /// A KV router that sends the workers of `dynamo.backend.generate` a few requests.
    pub fn router(&self, release: &str, requests: &str) -> Program {
        self.program(&["router", release, "dynamo", requests])
    }

    fn program(&self, arguments: &[&str]) -> Program {
        let mut command = script(arguments);
        command.env("NATS_SERVER", self.nats.url());
        command.env("ETCD_ENDPOINTS", self.etcd.url());
        Program::start(&mut command)
    }
}

/// Requests by TCP and events by ZMQ, as today.
const ZMQ: [(&str, &str); 2] = [("DYN_REQUEST_PLANE", "tcp"), ("DYN_EVENT_PLANE", "zmq")];

/// A worker on today's planes: registered in etcd, TCP requests, ZMQ events. Its numbers are out.
pub async fn today(release: &str, etcd: &str, options: &[&str]) -> DynamoWorker {
    DynamoWorker::start(release, &[&ZMQ[..], &[("ETCD_ENDPOINTS", etcd)]].concat(), options).await
}

/// The same, but publishing to a broker.
pub async fn behind_broker(release: &str, etcd: &str, broker: &str, options: &[&str]) -> DynamoWorker {
    let places = [("ETCD_ENDPOINTS", etcd), ("DYN_ZMQ_BROKER_URL", broker)];
    DynamoWorker::start(release, &[&ZMQ[..], &places].concat(), options).await
}

/// The same, but publishing to the brokers that it finds in discovery.
pub async fn behind_announced_broker(release: &str, etcd: &str, options: &[&str]) -> DynamoWorker {
    let places = [("ETCD_ENDPOINTS", etcd), ("DYN_ZMQ_BROKER_ENABLED", "true")];
    DynamoWorker::start(release, &[&ZMQ[..], &places].concat(), options).await
}

/// The same, but registered in a folder.
pub async fn in_folder(release: &str, folder: &str, options: &[&str]) -> DynamoWorker {
    registered_there(release, &[("DYN_DISCOVERY_BACKEND", "file"), ("DYN_FILE_KV", folder)], options).await
}

/// What names a folder to 0.7 - 0.9.
pub fn key_value_store(folder: &str) -> [(&str, &str); 3] {
    [("DYN_DISCOVERY_BACKEND", "kv_store"), ("DYN_STORE_KV", "file"), ("DYN_FILE_KV", folder)]
}

/// A worker on today's planes that is told by its environment where to register.
pub async fn registered_there(release: &str, places: &[(&str, &str)], options: &[&str]) -> DynamoWorker {
    DynamoWorker::start(release, &[&ZMQ[..], places].concat(), options).await
}

/// The same, but registered in Kubernetes: pod and its uid.
pub async fn in_pod(release: &str, kube: &Kube, (pod, uid): (&str, &str), options: &[&str]) -> DynamoWorker {
    let kubeconfig = kube.admin();
    let places = [
        ("DYN_DISCOVERY_BACKEND", "kubernetes"),
        ("KUBECONFIG", &kubeconfig),
        ("POD_NAME", pod),
        ("POD_NAMESPACE", NAMESPACE),
        ("POD_UID", uid),
    ];
    DynamoWorker::start(release, &[&ZMQ[..], &places].concat(), options).await
}

/// A worker of 0.8 - 1.2 on the planes of its time: registered in etcd, TCP requests, NATS events.
pub async fn of_its_time(release: &str, etcd: &str, nats: &str, options: &[&str]) -> DynamoWorker {
    let places = [("ETCD_ENDPOINTS", etcd), ("NATS_SERVER", nats), ("DYN_REQUEST_PLANE", "tcp")];
    DynamoWorker::start(release, &places, options).await
}

/// A worker whose requests and events go over NATS with TLS, registered in etcd.
pub async fn over_tls(release: &str, etcd: &str, nats: &str, ca: &str, options: &[&str]) -> DynamoWorker {
    let places = [("ETCD_ENDPOINTS", etcd), ("NATS_SERVER", nats), ("NATS_TLS_CA_CERT_PATH", ca)];
    let on_nats = [("DYN_REQUEST_PLANE", "nats"), ("DYN_EVENT_PLANE", "nats")];
    DynamoWorker::start(release, &[&places[..], &on_nats].concat(), options).await
}

impl DynamoWorker {
    /// Whether what is shown of a worker with `--flip` is exact: blocks in use, which go up and down by one, blocks, slots.
    pub fn is_shown(&self, metrics: &Exposition, (active, total, slots): (f64, f64, f64)) -> bool {
        let value = |name| metrics.value(name, &worker(&self.id));
        let used = value("llm_kv_blocks_active");
        [Some(active), Some(active + 1.0)].contains(&used)
            && value("llm_kv_blocks_total") == Some(total)
            && value("llm_requests_total_slots") == Some(slots)
            && value("llm_kv_cache_usage_ratio") == used.map(|used| used / total)
    }

    async fn start(release: &str, environment: &[(&str, &str)], options: &[&str]) -> Self {
        let mut command = script(&[&["worker", release], options].concat());
        command.envs(environment.iter().copied());
        Self::ready(Program::start(&mut command)).await
    }

    async fn ready(mut program: Program) -> Self {
        let id = program.line("its id", |line| Some(line.strip_prefix("ready worker_id=")?.to_owned())).await;
        Self { program, id }
    }
}

/// With as much of the developer's own environment as finds Python and the peers.
pub(super) fn script(arguments: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new(SCRIPT);
    peers::keep_environment(&mut command);
    command.args(arguments);
    command
}
