//! Real Dynamo workers and routers, of any release.

use std::ffi::OsStr;

use tempfile::TempDir;
use tokio::process::Command;

use super::{Etcd, Kube, NAMESPACE, Nats, Program, peers};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/dynamo");

/// What a Dynamo cluster needs: NATS with streams, and etcd. Stopped when dropped.
pub struct Dynamo {
    pub nats: Nats,
    etcd: Etcd,
    _streams: TempDir,
}

/// Killed when dropped.
pub struct DynamoWorker {
    pub program: Program,
    /// As it printed it.
    pub id: String,
}

impl Dynamo {
    /// `None` where no real Dynamo runs: see [`peers::can_run_dynamo`].
    pub async fn start() -> Option<Self> {
        if !peers::can_run_dynamo().await {
            return None;
        }
        dynamo_metrics::process::install_crypto();
        let streams = tempfile::tempdir().unwrap();
        let folder = streams.path().to_str().unwrap().to_owned();
        Some(Self {
            nats: Nats::with_options(&["-js", "-sd", &folder]).await,
            etcd: Etcd::start().await,
            _streams: streams,
        })
    }

    /// A worker whose numbers are out.
    pub async fn worker(&self, release: &str, options: &[&str]) -> DynamoWorker {
        DynamoWorker::started(self.program(&[&["worker", release], options].concat())).await
    }

    /// A worker in a pod, of a cluster that has neither NATS nor etcd.
    pub async fn in_pod(kube: &Kube, (pod, uid): (&str, &str), release: &str, options: &[&str]) -> DynamoWorker {
        let mut command = script(&[&["worker", release, "--flip"], options].concat());
        let kubeconfig = kube.admin();
        for (name, value) in [
            ("DYN_DISCOVERY_BACKEND", "kubernetes"),
            ("DYN_REQUEST_PLANE", "tcp"),
            ("DYN_EVENT_PLANE", "zmq"),
            ("KUBECONFIG", &kubeconfig),
            ("POD_NAME", pod),
            ("POD_NAMESPACE", NAMESPACE),
            ("POD_UID", uid),
        ] {
            command.env(name, value);
        }
        DynamoWorker::started(Program::start(&mut command)).await
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

impl DynamoWorker {
    async fn started(mut program: Program) -> Self {
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
