//! Where the real servers are: put there by `tests/peers/fetch` and `tests/peers/build`.

use std::path::PathBuf;

use tokio::process::Command;

use super::{cluster, dynamo};

const KEPT: [&str; 6] = ["PATH", "HOME", "TMPDIR", "XDG_CACHE_HOME", "DYNAMO_METRICS_PEERS", "PYTHON"];

/// Where all of them are.
pub fn folder() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("DYNAMO_METRICS_PEERS").unwrap_or_else(|| {
        let cache = from("XDG_CACHE_HOME").or_else(|| from("HOME").map(|home| home.join(".cache")));
        cache.expect("HOME is set").join("dynamo-metrics/peers")
    })
}

/// A program that `make test` always provides.
pub fn program(name: &str) -> PathBuf {
    let path = folder().join("bin").join(name);
    assert!(path.exists(), "{} is missing: run tests/peers/fetch", path.display());
    path
}

/// The Python interpreter that speaks OTLP and ZMQ.
pub fn python() -> PathBuf {
    let path = folder().join("venv/bin/python");
    assert!(path.exists(), "{} is missing: run tests/peers/fetch", path.display());
    path
}

/// A program that takes minutes to build, so that a developer may lack it: then the test says so and passes, unless
/// `DYNAMO_METRICS_REQUIRE_PEERS` is set, as it is in CI.
pub fn built(name: &str) -> Option<PathBuf> {
    let path = folder().join("bin").join(name);
    assert!(path.exists() || !required(), "{} is missing: run make peers", path.display());
    if path.exists() {
        return Some(path);
    }
    println!("left out: no {name} ({}); make peers builds it", path.display());
    None
}

/// The Kubernetes command line, with the same exception.
pub fn kubectl() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join("kubectl")).find(|path| path.exists());
    assert!(found.is_some() || !required(), "kubectl is missing");
    if found.is_none() {
        println!("left out: no kubectl on PATH");
    }
    found
}

/// Whether this machine can run real Dynamo workers, which takes a certain Python on Linux and x86-64. Where it cannot, the
/// test says so and passes, with the same exception.
pub async fn can_run_dynamo(releases: &[&str]) -> bool {
    for release in releases {
        if !can_run(dynamo::script(&["prepare", release]), release).await {
            return false;
        }
    }
    true
}

/// The same of a whole cluster.
pub async fn can_run_cluster() -> bool {
    can_run_cluster_of(cluster::RELEASE).await
}

/// The same of a whole cluster of that release.
pub async fn can_run_cluster_of(release: &str) -> bool {
    can_run(cluster::script(&["prepare", release]), release).await
}

async fn can_run(mut prepare: Command, release: &str) -> bool {
    let prepared = prepare.output().await.unwrap();
    let written = String::from_utf8_lossy(&prepared.stderr).into_owned();
    match prepared.status.code() {
        Some(0) => true,
        Some(3) if !required() => {
            println!("left out: {written}");
            false
        }
        _ => panic!("Dynamo {release} cannot be had: {written}"),
    }
}

/// Clears the environment but for what finds programs, toolchains and peers.
pub fn keep_environment(command: &mut Command) {
    let kept = std::env::vars_os().filter(|(name, _)| KEPT.iter().any(|kept| name == kept));
    command.env_clear().envs(kept);
}

fn required() -> bool {
    std::env::var_os("DYNAMO_METRICS_REQUIRE_PEERS").is_some_and(|value| !value.is_empty())
}
