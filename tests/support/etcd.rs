//! A real etcd of a test's own: Dynamo's workers register in it, and those of old releases do not start without.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Stdio;

use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::program::told;
use super::{Port, Program, eventually, peers};

/// Stopped when dropped.
pub struct Etcd {
    program: Option<Program>,
    folder: TempDir,
    clients: Port,
    /// Where the tests themselves ask, whatever is done to the other port.
    control: Port,
    peers: Port,
    scheme: &'static str,
    options: Vec<String>,
}

impl Etcd {
    pub async fn start() -> Self {
        Self::with_options(&[]).await
    }

    pub async fn with_options(options: &[&str]) -> Self {
        let mut etcd = Self::prepare("http", options);
        etcd.resume().await;
        etcd
    }

    /// For clients that show a certificate of the authority. The tests themselves need none.
    pub async fn secured(authority: &str, (certificate, key): (&str, &str)) -> Self {
        let files = ["--cert-file", certificate, "--key-file", key, "--trusted-ca-file", authority];
        let mut etcd = Self::prepare("https", &[&files[..], &["--client-cert-auth"]].concat());
        etcd.resume().await;
        etcd
    }

    /// Two members, neither of which has a say alone.
    pub async fn pair() -> [Self; 2] {
        let mut members = ["one", "other"].map(|name| Self::prepare("http", &["--name", name]));
        let [one, other] = &members;
        let cluster = format!("one={},other={}", one.peers.url(), other.peers.url());
        for member in &mut members {
            member.options.extend(["--initial-cluster".to_owned(), cluster.clone()]);
            member.launch();
        }
        for member in &members {
            member.is_healthy().await;
        }
        members
    }

    fn prepare(scheme: &'static str, options: &[&str]) -> Self {
        let [clients, control, peers] = [(); 3].map(|()| Port::reserve());
        let options = options.iter().map(|&option| option.to_owned()).collect();
        Self { program: None, folder: tempfile::tempdir().unwrap(), clients, control, peers, scheme, options }
    }

    fn launch(&mut self) {
        let mut command = Command::new(peers::program("etcd"));
        let (clients, control, of_peers) = (self.url(), self.control.url(), self.peers.url());
        let listen = format!("{clients},{control}");
        command.arg("--data-dir").arg(self.folder.path());
        for (option, value) in [
            ("--listen-client-urls", &listen),
            ("--advertise-client-urls", &clients),
            ("--listen-peer-urls", &of_peers),
            ("--initial-advertise-peer-urls", &of_peers),
        ] {
            command.args([option, value]);
        }
        if !self.options.iter().any(|option| option == "--initial-cluster") {
            command.args(["--initial-cluster", &format!("default={of_peers}")]);
        }
        command.args(["--max-txn-ops", "100000"]).args(&self.options);
        self.program = Some(Program::start(&mut command));
    }

    /// Starts it again where it was: the same ports, the same data.
    pub async fn resume(&mut self) {
        self.launch();
        self.is_healthy().await;
    }

    async fn is_healthy(&self) {
        dynamo_metrics::process::install_crypto();
        let health = format!("{}/health", self.control.url());
        eventually("etcd is healthy", || async {
            let written = || told(&self.program().lines());
            let response = reqwest::get(&health).await.map_err(|error| format!("{error}\n{}", written()))?;
            let text = response.text().await.map_err(|error| error.to_string())?;
            if text.contains("true") { Ok(()) } else { Err(text) }
        })
        .await;
    }

    pub fn program(&self) -> &Program {
        self.program.as_ref().expect("it runs")
    }

    /// At once, as `kill -9` does.
    pub async fn kill(&mut self) {
        self.program.take().expect("it runs").kill().await;
    }

    /// Host and port of [`Etcd::url`].
    pub fn address(&self) -> String {
        self.clients.address()
    }

    /// Where programs under test connect.
    pub fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.clients.address())
    }

    /// Lets nobody but the test itself connect: what listened for others listens elsewhere.
    pub async fn resume_unreachable(&mut self) {
        let elsewhere = Port::reserve();
        let clients = std::mem::replace(&mut self.clients, elsewhere);
        self.resume().await;
        self.clients = clients;
    }

    pub async fn put(&self, key: &str, value: &str) {
        self.control(&["put", "--", key, value]).await;
    }

    /// All at one revision.
    pub async fn put_all(&self, entries: &BTreeMap<String, String>) {
        let mut transaction = String::from("\n");
        for (key, value) in entries {
            writeln!(transaction, "put {key:?} {value:?}").unwrap();
        }
        transaction.push_str("\n\n");
        self.control_with(&["txn"], &transaction).await;
    }

    pub async fn delete(&self, key: &str) {
        assert_eq!(self.control(&["del", key]).await.trim(), "1", "{key} was there");
    }

    /// Forgets every revision but the last.
    pub async fn compact(&self) {
        let status = self.control(&["endpoint", "status", "--write-out", "json"]).await;
        let (_, revision) = status.split_once("\"revision\":").unwrap();
        let revision: String = revision.chars().take_while(char::is_ascii_digit).collect();
        self.control(&["compact", &revision]).await;
    }

    /// Runs etcdctl and returns what it says.
    pub async fn control(&self, arguments: &[&str]) -> String {
        self.control_with(arguments, "").await
    }

    async fn control_with(&self, arguments: &[&str], input: &str) -> String {
        let mut command = Command::new(peers::program("etcdctl"));
        command.env_clear().env("ETCDCTL_API", "3").args(["--endpoints", &self.control.url()]).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().expect("piped");
        stdin.write_all(input.as_bytes()).await.unwrap();
        drop(stdin);
        let output = child.wait_with_output().await.unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "etcdctl {arguments:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
        said
    }
}
