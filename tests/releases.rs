//! Every Dynamo release on every plane that it has: what docs/compatibility.md says was tested live.

use crate::support::{Bridge, Dynamo, Etcd, Exposition, Kube, Nats, documents, dynamo, peers, worker};

/// Where a worker registers, and what carries its load.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Plane {
    /// NATS alone: scrapes, or events from 0.6 on.
    Nats,
    /// Registered in etcd, events by NATS.
    EtcdNats,
    /// Registered in etcd, events by ZMQ.
    EtcdZmq,
    /// Registered in a folder, events by ZMQ.
    FilesZmq,
    /// Registered in Kubernetes, events by ZMQ.
    KubernetesZmq,
}

use Plane::{EtcdNats, EtcdZmq, FilesZmq, KubernetesZmq, Nats as OnNats};

const PLANES: [(Plane, &str); 5] = [
    (OnNats, "NATS"),
    (EtcdNats, "etcd, NATS"),
    (EtcdZmq, "etcd, ZMQ"),
    (FilesZmq, "folder, ZMQ"),
    (KubernetesZmq, "Kubernetes, ZMQ"),
];

/// The last of each minor release.
const RELEASES: [(&str, &[Plane]); 16] = [
    ("0.1.1", &[OnNats]),
    ("0.2.1", &[OnNats]),
    ("0.3.2", &[OnNats]),
    ("0.4.1", &[OnNats]),
    ("0.5.1", &[OnNats]),
    ("0.6.1", &[OnNats]),
    ("0.7.1", &[OnNats]),
    ("0.8.1", &[OnNats, EtcdNats]),
    ("0.9.1", &[OnNats, EtcdNats, EtcdZmq, FilesZmq]),
    ("1.0.2", &[OnNats, EtcdNats, EtcdZmq, FilesZmq, KubernetesZmq]),
    ("1.1.1", &[OnNats, EtcdNats, EtcdZmq, FilesZmq, KubernetesZmq]),
    ("1.2.1", &[OnNats, EtcdNats, EtcdZmq, FilesZmq, KubernetesZmq]),
    ("1.3.1", &[OnNats, EtcdNats, EtcdZmq, FilesZmq, KubernetesZmq]),
    ("1.4.2", &[OnNats, EtcdNats, EtcdZmq, FilesZmq, KubernetesZmq]),
    ("1.5.1", &[OnNats, EtcdNats, EtcdZmq, FilesZmq, KubernetesZmq]),
    ("1.6.1", &[OnNats, EtcdNats, EtcdZmq, FilesZmq, KubernetesZmq]),
];

const ACTIVE: f64 = 30.0;
const BLOCKS: f64 = 300.0;
const SLOTS: f64 = 6.0;
/// From 0.6 on a worker speaks on a change alone: up and down by one.
const LOAD: &[&str] = &["--kv-active", "30", "--kv-total", "300", "--total-slots", "6", "--flip"];

/// Whether the worker says its limits in its load; if not, they are on its model card, of which NATS alone knows nothing.
fn says_limits(release: &str) -> bool {
    release < "0.8"
}

fn is_exact(metrics: &Exposition, id: &str, limits: Option<(f64, f64)>) -> bool {
    let value = |name| metrics.value(name, &worker(id));
    [Some(ACTIVE), Some(ACTIVE + 1.0)].contains(&value("llm_kv_blocks_active"))
        && value("llm_kv_blocks_total") == limits.map(|(blocks, _)| blocks)
        && value("llm_requests_total_slots") == limits.map(|(_, slots)| slots)
        && metrics.value("llm_workers", &[("state", "reporting")]) == Some(1.0)
        && metrics.label_values("endpoint") == ["generate"]
}

/// A worker is seen exactly and, killed, no more.
async fn followed(release: &'static str, plane: Plane) {
    let card: &[&str] = if says_limits(release) { &[] } else { &["--model", "tiny/model"] };
    let options = [LOAD, card].concat();
    let target = ["--component", "backend", "--endpoint", "generate"];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    match plane {
        OnNats => {
            let dynamo = Dynamo::with(&[release]).await.unwrap();
            let bridge = Bridge::start(dynamo.nats.url(), &[]).await;
            let worker = dynamo.worker(release, LOAD).await;
            is_followed(&bridge, worker, says_limits(release)).await;
        }
        EtcdNats => {
            let (nats, etcd) = (Nats::with_options(&["-js", "-sd", path]).await, Etcd::start().await);
            let address = etcd.url();
            let places = [&["--etcd-endpoints", &address], &target[..]].concat();
            let bridge = Bridge::watching(nats.url(), &places, &[]).await;
            is_followed(&bridge, dynamo::of_its_time(release, &etcd.url(), nats.url(), &options).await, true).await;
        }
        EtcdZmq => {
            let etcd = Etcd::start().await;
            let bridge = Bridge::finding(&["--etcd-endpoints", &etcd.url()], &[]).await;
            is_followed(&bridge, dynamo::today(release, &etcd.url(), &options).await, true).await;
        }
        FilesZmq => {
            let bridge = Bridge::finding(&["--file-kv", path], &[]).await;
            is_followed(&bridge, dynamo::in_folder(release, path, &options).await, true).await;
        }
        KubernetesZmq => {
            let kube = Kube::start().await.unwrap();
            let bridge = Bridge::in_cluster(&kube, &[]).await;
            let uid = kube.pod("w").await;
            let worker = dynamo::in_pod(release, &kube, ("w", &uid), &options).await;
            kube.slice("w", &uid, true).await;
            is_seen(&bridge, &worker.id, true).await;
            worker.program.kill().await;
            // What its kubelet would tell.
            kube.slice("w", &uid, false).await;
            bridge.loses("llm_kv_blocks_active", &[]).await;
        }
    }
}

async fn is_seen(bridge: &Bridge, id: &str, with_limits: bool) {
    let limits = with_limits.then_some((BLOCKS, SLOTS));
    bridge.eventually("the worker, exactly", |metrics| is_exact(metrics, id, limits).then_some(())).await;
}

async fn is_followed(bridge: &Bridge, worker: dynamo::DynamoWorker, with_limits: bool) {
    is_seen(bridge, &worker.id, with_limits).await;
    worker.program.kill().await;
    bridge.loses("llm_kv_blocks_active", &[]).await;
}

#[tokio::test]
#[ignore = "minutes, and a runtime of each release: make test-releases"]
async fn every_release_is_followed_on_every_plane() {
    let mut failures = Vec::new();
    for (release, planes) in RELEASES {
        if !peers::can_run_dynamo(&[release]).await {
            return;
        }
        for plane in planes {
            let ended = tokio::spawn(followed(release, *plane)).await;
            println!("{release} {plane:?}: {}", if ended.is_ok() { "ok" } else { "FAILED" });
            failures.extend(ended.err().map(|error| format!("{release} {plane:?}: {error}")));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn what_is_tested_live_is_documented() {
    let names = PLANES.map(|(_, name)| format!(" {name} |")).concat();
    let mut table = vec![format!("| Dynamo |{names}"), format!("|---|{}", ":---:|".repeat(PLANES.len()))];
    for (release, planes) in RELEASES {
        let tested = PLANES.map(|(plane, _)| if planes.contains(&plane) { " yes |" } else { " |" });
        table.push(format!("| {release} |{}", tested.concat()));
    }
    let (start, end) = ("as each release has it:\n\n", "\n\n");
    documents::generated("docs/compatibility.md", start, end, &table.join("\n"));
}
