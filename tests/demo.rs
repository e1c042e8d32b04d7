//! The demo, as a user runs it.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command as Blocking;

use tempfile::TempDir;
use tokio::process::Command;

use crate::support::{Exposition, Program, eventually, peers};

/// A process group of its own, as a terminal gives to each command. Killed when dropped.
struct Demo {
    program: Program,
    group: String,
    folder: TempDir,
}

impl Demo {
    fn start(program: &str, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let target = stand_in(folder.path());
        let mut command = Command::new(program);
        command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).process_group(0);
        peers::keep_environment(&mut command);
        let path = std::env::var("PATH").unwrap();
        command
            .env("PATH", format!("{}:{path}", folder.path().display()))
            .env("CARGO_TARGET_DIR", target)
            .env("TMPDIR", folder.path())
            .envs([("PORT", "0"), ("NATS_PORT", "0")]);
        let program = Program::start(&mut command);
        let group = format!("-{}", program.id());
        Self { program, group, folder }
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

    /// As Ctrl-C in a terminal: every process of the group gets it.
    async fn interrupt(&mut self) -> std::process::ExitStatus {
        let sent = Command::new("kill").args(["-INT", "--", &self.group]).status().await;
        assert!(sent.unwrap().success());
        self.program.ended().await
    }

    fn is_alive(&self) -> bool {
        let asked = Blocking::new("kill").args(["-0", "--", &self.group]).output();
        asked.unwrap().status.success()
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        if self.is_alive() {
            Blocking::new("kill").args(["-KILL", "--", &self.group]).status().ok();
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

async fn shows_four_workers_until_it_is_interrupted(demo: &mut Demo) -> std::process::ExitStatus {
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

    let status = demo.interrupt().await;
    eventually("all that it started is gone", || async {
        if demo.is_alive() { Err(format!("the group {} is alive", demo.group)) } else { Ok(()) }
    })
    .await;
    let left = std::fs::read_dir(demo.folder.path()).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(left.len(), 2, "its logs are gone: {left:?}");
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
