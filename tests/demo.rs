//! The demo, as a user runs it.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command as Blocking, ExitStatus, Stdio};

use tempfile::TempDir;
use tokio::process::Command;

use crate::support::{Exposition, Program, eventually, peers};

/// In a process group of its own, as a terminal gives to each command. What it started is killed when dropped.
struct Demo {
    program: Program,
    id: u32,
    /// Servers and programs that it started, once they are known.
    started: Vec<Process>,
    folder: TempDir,
}

#[derive(Debug, Clone, PartialEq)]
struct Process {
    id: u32,
    parent: u32,
    group: u32,
    name: String,
}

impl Process {
    /// Every process of this machine.
    fn all() -> Vec<Self> {
        let listed = Blocking::new("ps").args(["-A", "-o", "pid=,ppid=,pgid=,comm="]).output().unwrap();
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        listed.lines().filter_map(Self::parse).collect()
    }

    fn parse(line: &str) -> Option<Self> {
        let mut columns = line.split_whitespace();
        let mut number = || columns.next()?.parse().ok();
        let (id, parent, group) = (number()?, number()?, number()?);
        Some(Self { id, parent, group, name: columns.next()?.to_owned() })
    }
}

impl Demo {
    fn start(program: &str, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let target = stand_in(folder.path());
        let mut command = with_default_signals(program);
        command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).process_group(0);
        peers::keep_environment(&mut command);
        let path = std::env::var("PATH").unwrap();
        command
            .env("PATH", format!("{}:{path}", folder.path().display()))
            .env("CARGO_TARGET_DIR", target)
            .env("TMPDIR", folder.path())
            .envs([("PORT", "0"), ("NATS_PORT", "0")]);
        let program = Program::start(&mut command);
        Self { id: program.id(), program, started: Vec::new(), folder }
    }

    /// Where it says that the metrics are.
    async fn url(&mut self) -> String {
        self.program
            .line("where the metrics are", |line| {
                let (_, url) = line.split_once("metrics   ")?;
                Some(url.to_owned())
            })
            .await
    }

    /// Remembers the servers and programs below it; the rest is `make`, the script and its shell commands.
    fn look(&mut self) {
        let (all, mut family) = (Process::all(), vec![self.id]);
        let mut next = 0;
        while let Some(parent) = family.get(next).copied() {
            family.extend(all.iter().filter(|process| process.parent == parent).map(|process| process.id));
            next += 1;
        }
        let is_started = |name: &str| ["nats-server", "mock_worker", "metrics"].contains(&name);
        self.started.extend(all.into_iter().filter(|it| family.contains(&it.id) && is_started(&it.name)));
    }

    /// As Ctrl-C in a terminal does: every process of the group gets the signal.
    async fn interrupt(&mut self) -> ExitStatus {
        signal("-INT", &format!("-{}", self.id));
        self.program.ended().await
    }

    /// Waits until nothing that it started is left, and none of its files.
    async fn leaves_nothing(&mut self) {
        assert!(self.started.len() >= 2, "{:?}", self.started);
        eventually("all that it started is gone", || async {
            let is_left = |it: &Process| self.started.iter().any(|old| old.id == it.id && old.name == it.name);
            let left: Vec<_> = Process::all().into_iter().filter(is_left).collect();
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
        let left = std::fs::read_dir(self.folder.path()).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert_eq!(left.len(), 2, "its logs are gone: {left:?}");
    }
}

/// A signal that whoever runs the tests ignores, as `nohup` and a shell's background jobs do, no shell below can trap.
fn with_default_signals(program: &str) -> Command {
    let mut env = Blocking::new("env");
    let resets = env.args(["--default-signal", "true"]).stderr(Stdio::null()).status().is_ok_and(|it| it.success());
    let mut command = Command::new(if resets { "env" } else { program });
    if resets {
        command.args(["--default-signal", program]);
    }
    command
}

fn signal(signal: &str, whom: &str) {
    let sent = Blocking::new("kill").args([signal, "--", whom]).status().unwrap();
    assert!(sent.success(), "{signal} {whom}");
}

impl Drop for Demo {
    fn drop(&mut self) {
        self.look();
        let ids = self.started.iter().map(|process| process.id.to_string()).chain([format!("-{}", self.id)]);
        for id in ids {
            Blocking::new("kill").args(["-KILL", "--", &id]).stderr(Stdio::null()).status().ok();
        }
    }
}

/// Puts a `cargo` that only writes down how it was called into the folder, and what it would have built beside it.
///
/// The real one would, with other features than the tests have, replace the very programs that other tests run.
fn stand_in(folder: &Path) -> std::path::PathBuf {
    let cargo = folder.join("cargo");
    std::fs::write(&cargo, "#!/bin/sh\necho \"cargo $*\"\n").unwrap();
    std::fs::set_permissions(&cargo, std::fs::Permissions::from_mode(0o755)).unwrap();
    let built = Path::new(env!("CARGO_BIN_EXE_metrics")).parent().unwrap();
    symlink(built, folder.join("debug")).unwrap();
    folder.to_owned()
}

async fn shows_four_workers_until_it_is_interrupted(demo: &mut Demo) -> ExitStatus {
    dynamo_metrics::process::install_crypto();
    let url = demo.url().await;
    let text = reqwest::get(url).await.unwrap().text().await.unwrap();
    let metrics = Exposition::parse(text);
    assert_eq!(metrics.values("llm_kv_blocks_active", &[]).len(), 4);
    assert_eq!(metrics.value("llm_workers", &[("state", "reporting")]), Some(4.0));
    let written = demo.program.lines().join("\n");
    assert!(written.contains("cargo build --locked --bins"), "{written}");
    for name in ["llm_load_avg", "llm_forward_pass_decode_tokens_total", "llm_kv_hit_rate_isl_blocks"] {
        assert!(written.contains(&format!("{name}{{")), "{written}");
    }

    demo.look();
    let reached: Vec<_> = demo.started.iter().filter(|process| process.group == demo.id).collect();
    assert!(reached.is_empty(), "Ctrl-C is for the script alone, which ends the others in order: {reached:?}");
    let status = demo.interrupt().await;
    demo.leaves_nothing().await;
    status
}

#[tokio::test]
async fn the_demo_shows_four_workers_and_stops_all_that_it_started() {
    let mut demo = Demo::start("otel-config/demo", &[]);
    let status = shows_four_workers_until_it_is_interrupted(&mut demo).await;
    assert!(status.success(), "{status}: {}", demo.program.lines().join("\n"));
}

#[tokio::test]
async fn make_demo_does_the_same() {
    let mut demo = Demo::start("make", &["demo"]);
    shows_four_workers_until_it_is_interrupted(&mut demo).await;
}

#[tokio::test]
async fn the_demo_of_todays_plane_needs_no_server() {
    let mut demo = Demo::start("make", &["demo", "PLANE=zmq"]);
    shows_four_workers_until_it_is_interrupted(&mut demo).await;
    assert!(!demo.program.lines().join("\n").contains("nats"), "{:?}", demo.program.lines());
}

#[tokio::test]
async fn the_demo_leaves_nothing_however_it_ends() {
    for (name, code) in [("-TERM", 0), ("-HUP", 0), ("one of its programs ends", 1)] {
        let mut demo = Demo::start("otel-config/demo", &[]);
        demo.url().await;
        demo.look();
        let whom = if code == 0 { demo.id } else { demo.started[0].id };
        signal(if code == 0 { name } else { "-KILL" }, &whom.to_string());
        assert_eq!(demo.program.ended().await.code(), Some(code), "{name}");
        demo.leaves_nothing().await;
    }
}
