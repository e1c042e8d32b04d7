//! Whole real Dynamo clusters: a frontend with its KV router, and workers around a simulated engine.

use std::ffi::OsStr;

use tempfile::TempDir;
use tokio::process::Command;

use super::{Bridge, Etcd, Exposition, Nats, Port, Program, eventually, peers};

/// The release that the tests run, where they do not say which.
pub const RELEASE: &str = "1.6.1";

/// Words of the prompt by which [`Cluster::answers`] tries it.
pub const FIRST_PROMPT: usize = 16;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/cluster");

/// Where a cluster registers, and what else it needs. Its end is the end of what is registered.
pub enum Place {
    Etcd(Box<Etcd>),
    Folder(TempDir),
    /// Up to 1.2, which publish their events there.
    EtcdAndNats(Box<(Etcd, Nats)>),
}

/// A cluster that serves. What runs of it is killed when dropped.
pub struct Cluster {
    release: &'static str,
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

    pub async fn etcd_and_nats() -> Self {
        Self::EtcdAndNats(Box::new((Etcd::start().await, Nats::with_streams().await)))
    }

    /// What a bridge is told.
    fn options(&self) -> Vec<String> {
        match self {
            Self::Etcd(etcd) => vec!["--etcd-endpoints".to_owned(), etcd.url()],
            Self::Folder(folder) => {
                ["--discovery", "file", "--file-kv", folder.path().to_str().unwrap()].map(str::to_owned).into()
            }
            Self::EtcdAndNats(servers) => {
                let (etcd, nats) = &**servers;
                ["--etcd-endpoints", &etcd.url(), "--nats-server", nats.url()].map(str::to_owned).into()
            }
        }
    }

    /// One of Dynamo's programs.
    fn program(&self, arguments: &[&str]) -> Program {
        let mut command = script(arguments);
        match self {
            Self::Etcd(etcd) => command.env("ETCD_ENDPOINTS", etcd.url()),
            Self::Folder(folder) => command.env("DYN_FILE_KV", folder.path()).args(["--discovery-backend", "file"]),
            Self::EtcdAndNats(servers) => {
                let (etcd, nats) = &**servers;
                command.env("ETCD_ENDPOINTS", etcd.url()).env("NATS_SERVER", nats.url())
            }
        };
        Program::start(&mut command)
    }
}

impl Cluster {
    /// A frontend, and no worker yet.
    pub fn start(place: Place) -> Self {
        Self::of(RELEASE, place)
    }

    /// The same of another release.
    pub fn of(release: &'static str, place: Place) -> Self {
        let port = Port::reserve();
        let (_, number) =
            port.address().rsplit_once(':').map(|(host, port)| (host.to_owned(), port.to_owned())).unwrap();
        let frontend = place.program(&["frontend", release, "--http-port", &number, "--router-replica-sync"]);
        Self { release, place, frontend, port }
    }

    /// A bridge that is told where the cluster registers, and nothing else.
    pub async fn bridge(&self) -> Bridge {
        self.bridge_with(&[], &[]).await
    }

    /// The same with further options, and an environment.
    pub async fn bridge_with(&self, options: &[&str], environment: &[(&str, &str)]) -> Bridge {
        let place = self.place.options();
        let place: Vec<_> = place.iter().map(String::as_str).collect();
        Bridge::finding(&[&place, options].concat(), environment).await
    }

    pub fn registers_in_etcd(&self) -> bool {
        matches!(self.place, Place::Etcd(_))
    }

    /// Two workers of one process, with further options.
    pub fn workers(&self, options: &[&str]) -> Program {
        self.run("mocker", options)
    }

    /// Another of its programs.
    pub fn run(&self, program: &str, options: &[&str]) -> Program {
        self.place.program(&[&[program, self.release], options].concat())
    }

    /// Registers a LoRA adapter of the only worker, as one that has loaded it does: beside the card of its model.
    pub async fn add_adapter(&self, name: &str, slug: &str, block_size: usize) {
        let of_cards = |form| ["get", "--prefix", "v1/mdc/", form];
        let key = self.etcd().control(&of_cards("--keys-only")).await.trim().to_owned();
        let mut card: serde_json::Value =
            serde_json::from_str(&self.etcd().control(&of_cards("--print-value-only")).await).unwrap();
        card["model_suffix"] = slug.into();
        let fields = &mut card["card_json"];
        (fields["display_name"], fields["slug"], fields["kv_cache_block_size"]) =
            (name.into(), slug.into(), block_size.into());
        fields["lora"] = serde_json::json!({ "name": name });
        self.etcd().put(&format!("{key}/{slug}"), &card.to_string()).await;
    }

    /// The etcd that it registers in.
    pub fn etcd(&self) -> &Etcd {
        match &self.place {
            Place::Etcd(etcd) => etcd,
            Place::EtcdAndNats(servers) => &servers.0,
            Place::Folder(_) => panic!("it registers in a folder"),
        }
    }

    /// Waits until a chat request is answered.
    pub async fn answers(&self) {
        eventually("the frontend answers", || async {
            let answered = self.ask(&FIRST_PROMPT.to_string(), "4", 0).ended_well().await;
            answered.map_err(|written| format!("{written}\n{}", super::program::told(&self.frontend.lines())))
        })
        .await;
    }

    /// A chat request whose prompt has so many words, from that one on, and its answer so many tokens.
    pub fn ask(&self, words: &str, tokens: &str, first: usize) -> Chat {
        self.ask_model("m", words, tokens, first)
    }

    /// The same of another model.
    pub fn ask_model(&self, model: &str, words: &str, tokens: &str, first: usize) -> Chat {
        let url = self.port.url();
        Chat(Program::start(&mut script(&["chat", &url, words, tokens, &first.to_string(), model])))
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
