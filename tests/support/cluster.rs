//! Whole real Dynamo clusters: a frontend with its KV router, and workers around a simulated engine. No NATS.

use std::ffi::OsStr;

use tempfile::TempDir;
use tokio::process::Command;

use super::{Bridge, Etcd, Exposition, Port, Program, eventually, peers};

/// The release that the tests run.
pub const RELEASE: &str = "1.6.1";

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/cluster");

/// Where a cluster registers. Its end is the end of what is registered.
pub enum Place {
    Etcd(Box<Etcd>),
    Folder(TempDir),
}

/// A cluster that serves. What runs of it is killed when dropped.
pub struct Cluster {
    place: Place,
    frontend: Program,
    port: Port,
}

impl Place {
    pub async fn etcd() -> Self {
        Self::Etcd(Box::new(Etcd::start().await))
    }

    pub fn folder() -> Self {
        Self::Folder(tempfile::tempdir().unwrap())
    }

    /// A bridge that is told the place, and nothing else.
    async fn bridge(&self) -> Bridge {
        match self {
            Self::Etcd(etcd) => Bridge::finding(&["--etcd-endpoints", &etcd.url()], &[]).await,
            Self::Folder(folder) => {
                let folder = folder.path().to_str().unwrap();
                Bridge::finding(&["--discovery", "file", "--file-kv", folder], &[]).await
            }
        }
    }

    /// One of Dynamo's programs.
    fn program(&self, arguments: &[&str]) -> Program {
        let mut command = script(arguments);
        match self {
            Self::Etcd(etcd) => command.env("ETCD_ENDPOINTS", etcd.url()),
            Self::Folder(folder) => command.env("DYN_FILE_KV", folder.path()).args(["--discovery-backend", "file"]),
        };
        Program::start(&mut command)
    }
}

impl Cluster {
    /// A frontend, and no worker yet.
    pub fn start(place: Place) -> Self {
        let port = Port::reserve();
        let (_, number) =
            port.address().rsplit_once(':').map(|(host, port)| (host.to_owned(), port.to_owned())).unwrap();
        let frontend = place.program(&["frontend", RELEASE, "--http-port", &number, "--router-replica-sync"]);
        Self { place, frontend, port }
    }

    /// A bridge that is told where the cluster registers, and nothing else.
    pub async fn bridge(&self) -> Bridge {
        self.place.bridge().await
    }

    pub fn registers_in_etcd(&self) -> bool {
        matches!(self.place, Place::Etcd(_))
    }

    /// Two workers of one process, with further options.
    pub fn workers(&self, options: &[&str]) -> Program {
        self.place.program(&[&["mocker", RELEASE], options].concat())
    }

    /// Waits until a chat request is answered.
    pub async fn answers(&self) {
        eventually("the frontend answers", || async {
            let answered = self.ask("16", "4", 0).ended_well().await;
            answered.map_err(|written| format!("{written}\n{}", super::program::told(&self.frontend.lines())))
        })
        .await;
    }

    /// A chat request whose prompt has so many words, from that one on, and its answer so many tokens.
    pub fn ask(&self, words: &str, tokens: &str, first: usize) -> Chat {
        let url = self.port.url();
        Chat(Program::start(&mut script(&["chat", &url, words, tokens, &first.to_string()])))
    }

    /// What the frontend says of itself and its router.
    pub async fn frontend_metrics(&self) -> Exposition {
        let response = reqwest::get(format!("{}/metrics", self.port.url())).await.unwrap();
        Exposition::parse(response.text().await.unwrap())
    }

    /// At once, and nobody sweeps up after others any more.
    pub async fn kill_frontend(self) -> Place {
        self.frontend.kill().await;
        self.place
    }
}

/// A request on its way. Broken off when dropped.
pub struct Chat(Program);

impl Chat {
    /// Waits for the whole answer, and returns what was billed; or what went wrong.
    pub async fn ended_well(mut self) -> Result<String, String> {
        let status = self.0.ended().await;
        let written = self.0.lines().join("\n");
        if status.success() && written.contains("completion_tokens") { Ok(written) } else { Err(written) }
    }
}

/// With as much of the developer's own environment as finds Python and the peers.
pub(super) fn script(arguments: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new(SCRIPT);
    peers::keep_environment(&mut command);
    command.args(arguments);
    command
}
