//! A real etcd of a test's own: Dynamo's workers do not start without.

use tempfile::TempDir;
use tokio::process::Command;

use super::program::told;
use super::{Port, Program, eventually, peers};

/// Stopped when dropped.
pub struct Etcd {
    _program: Program,
    _folder: TempDir,
    clients: Port,
    _peers: Port,
}

impl Etcd {
    pub async fn start() -> Self {
        let (clients, of_peers, folder) = (Port::reserve(), Port::reserve(), tempfile::tempdir().unwrap());
        let mut command = Command::new(peers::program("etcd"));
        command.arg("--data-dir").arg(folder.path());
        for (option, url) in [
            ("--listen-client-urls", clients.url()),
            ("--advertise-client-urls", clients.url()),
            ("--listen-peer-urls", of_peers.url()),
            ("--initial-advertise-peer-urls", of_peers.url()),
            ("--initial-cluster", format!("default={}", of_peers.url())),
        ] {
            command.args([option, &url]);
        }
        let program = Program::start(&mut command);
        let health = format!("{}/health", clients.url());
        eventually("etcd is healthy", || async {
            let written = || told(&program.lines());
            let response = reqwest::get(&health).await.map_err(|error| format!("{error}\n{}", written()))?;
            let text = response.text().await.map_err(|error| error.to_string())?;
            if text.contains("true") { Ok(()) } else { Err(text) }
        })
        .await;
        Self { _program: program, _folder: folder, clients, _peers: of_peers }
    }

    pub fn url(&self) -> String {
        self.clients.url()
    }
}
