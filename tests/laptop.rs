//! What the documents tell to try on a laptop, tried as it stands there.

use std::process::Command as Blocking;
use std::time::Duration;

use tempfile::TempDir;
use tokio::process::Command;

use crate::support::{Port, Program, cluster, peers, within};

/// Two Python programs that import much, on a loaded machine.
const START: Duration = Duration::from_secs(600);
const DOCUMENT: &str = include_str!("../docs/try-with-dynamo.md");

/// The first block of code behind a text.
fn block(behind: &str) -> &'static str {
    let (_, rest) = DOCUMENT.split_once(behind).unwrap();
    let (_, block) = rest.split_once("```").unwrap();
    let (block, _) = block.split_once("\n```").unwrap();
    block.split_once('\n').unwrap().1
}

/// A process group of its own. Killed when dropped.
struct Session {
    program: Program,
    group: String,
    _folder: TempDir,
}

impl Session {
    fn start(script: &str, folder: TempDir) -> Self {
        let mut bash = Command::new("bash");
        peers::keep_environment(&mut bash);
        let installed = peers::folder().join("cluster");
        let path = format!("{}:{}", installed.join("venv/bin").display(), std::env::var("PATH").unwrap());
        bash.args(["-c", script]).current_dir(folder.path()).process_group(0);
        bash.env("PATH", path).env("PYTHONPATH", installed.join(cluster::RELEASE));
        // Addresses of this machine alone, whatever its interfaces.
        for host in ["DYN_EVENT_PLANE_HOST", "DYN_TCP_RPC_HOST", "DYN_HTTP_HOST"] {
            bash.env(host, "127.0.0.1");
        }
        bash.env("DYN_TCP_RESPONSE_STREAM_HOST", "lo");
        let program = Program::start(&mut bash);
        let group = format!("-{}", program.id());
        Self { program, group, _folder: folder }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // In vain, unless the script did not come to its end.
        Blocking::new("kill").args(["-KILL", "--", &self.group]).output().ok();
    }
}

/// Without what differs from one run to the next: ids, and how far a request has come.
fn alike(line: &str) -> String {
    let (series, value) = line.rsplit_once(' ').unwrap();
    let id = series.split("worker_id=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or_default();
    let series = if id.is_empty() { series.to_owned() } else { series.replace(id, "ID") };
    let value = if series.starts_with("llm_kv_blocks_active") && value != "0" { "SOME" } else { value };
    format!("{series} {value}")
}

#[tokio::test]
async fn a_real_dynamo_on_a_laptop_is_shown_as_its_document_says() {
    let installed = format!("ai-dynamo=={0} ai-dynamo-runtime=={0}", cluster::RELEASE);
    assert!(DOCUMENT.contains(&installed), "{installed}");
    if !peers::can_run_cluster().await {
        return;
    }
    let (folder, frontend, bridge) = (tempfile::tempdir().unwrap(), Port::reserve(), Port::reserve());
    let run = "cargo run --quiet --bin metrics";
    let program = format!("{} --host 127.0.0.1 --port {}", env!("CARGO_BIN_EXE_metrics"), bridge.number());
    let pulls = |line: &str| format!("curl -s localhost:{}/metrics | grep -q '{line}$'", bridge.number());
    let [used, idle] = [pulls("^llm_kv_blocks_active.* [1-9][0-9]*"), pulls("^llm_kv_blocks_active.* 0")];
    let both_report = pulls("^llm_workers.*reporting.* 2");
    let script = block("# Try it with a real Dynamo");
    let installs = |line: &&str| line.starts_with("pip install") || line.starts_with("python3 -m venv");
    assert_eq!(script.lines().filter(installs).count(), 3, "{script}");
    // Installed already; on ports of its own; and however long it takes.
    let script = script.lines().filter(|line| !installs(line)).collect::<Vec<_>>().join("\n");
    let mut changed = script.clone();
    for (from, to) in [
        ("/tmp/dynamo", folder.path().to_str().unwrap()),
        ("localhost:8000", &frontend.address()),
        ("--http-port 8000", &format!("--http-port {}", frontend.number())),
        (run, &program),
        ("localhost:9091", &format!("localhost:{}", bridge.number())),
        ("\nsleep 4\n", &format!("\nuntil {both_report} && {used}; do sleep 0.1; done\n")),
        ("\nsleep 2\n", &format!("\nuntil {idle}; do sleep 0.1; done\n")),
    ] {
        assert!(changed.contains(from), "{from} is not in:\n{script}");
        changed = changed.replace(from, to);
    }
    let mut session = Session::start(&changed, folder);
    let expected: Vec<_> = block("It ends with this").lines().map(alike).collect();
    within(START, "as many lines as the document has", || async {
        let lines = session.program.lines();
        let shown = lines.iter().filter(|line| line.starts_with("llm_")).count();
        if shown >= expected.len() { Ok(()) } else { Err(lines.join("\n")) }
    })
    .await;
    session.program.ended().await;
    let lines = session.program.lines();
    let shown: Vec<_> = lines.iter().filter(|line| line.starts_with("llm_")).map(|line| alike(line)).collect();
    assert_eq!(shown, expected, "{lines:?}");
}
