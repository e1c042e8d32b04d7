//! Real Dynamo workers and routers, of any release.

use std::ffi::OsStr;

use tempfile::TempDir;
use tokio::process::Command;

use super::{Etcd, Nats, Program, peers};

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
        let mut program = self.program(&[&["worker", release], options].concat());
        let id = program.line("its id", |line| Some(line.strip_prefix("ready worker_id=")?.to_owned())).await;
        DynamoWorker { program, id }
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

/// With as much of the developer's own environment as finds Python and the peers.
pub(super) fn script(arguments: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new(SCRIPT);
    peers::keep_environment(&mut command);
    command.args(arguments);
    command
}
