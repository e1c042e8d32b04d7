//! Very many publishers on one bridge.

#![expect(clippy::float_cmp, clippy::cast_precision_loss, reason = "small whole numbers")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dynamo_metrics::fleet::{Rank, WorkerId, WorkerKey};
use dynamo_metrics::process::descriptors_suffice;
use dynamo_metrics::wire::{self, ActiveBlocks, ActiveLoad, ActiveLoadForm, Envelope};
use tokio::net::TcpListener;
use tokio::sync::Mutex;
use tokio::time::interval;
use zeromq::{PubSocket, Socket, SocketSend, ZmqMessage};

use crate::support::registered::{card, instance};
use crate::support::{Bridge, Exposition, Program, Store, command, eventually, lines_allowed};

const PUBLISHERS: u64 = 1000;
/// Ten a second of each.
const PACE: Duration = Duration::from_millis(100);
const ROUNDS: u64 = 30;
const TOPIC: &str = "kv_metrics";
/// How often is looked whether a round was heard, before another one.
const LOOKS_PER_ROUND: u32 = 40;

/// Workers whose used blocks are the number of their message.
struct Publishers {
    sockets: Vec<PubSocket>,
    round: u64,
}

/// How it stands once the messages of a round have been heard of every publisher.
struct Account {
    round: u64,
    heard: f64,
    missed: f64,
}

/// A worker, and its publisher's address.
fn register(store: &Store, id: u64, address: &str) {
    let [namespace, component, endpoint] = ["dynamo", "backend", "generate"].map(Into::into);
    let key = WorkerKey { namespace, component, endpoint, id: WorkerId(id) };
    for entry in [instance(id), card(id, 4096, 64), wire::encode_channel(&key, TOPIC, id, address)] {
        store.register(entry);
    }
}

impl Publishers {
    async fn registered(store: &Store) -> Self {
        let mut sockets = Vec::new();
        for id in 0..PUBLISHERS {
            let mut socket = PubSocket::new();
            let address = socket.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
            register(store, id, &address);
            sockets.push(socket);
        }
        Self { sockets, round: 0 }
    }

    /// Every worker numbers a message; one of them keeps it to itself.
    async fn publish(&mut self, silent: Option<u64>) {
        self.round += 1;
        for (id, socket) in (0..).zip(&mut self.sockets) {
            if silent == Some(id) {
                continue;
            }
            let blocks = ActiveBlocks::Used(Some(self.round));
            let payload = wire::encode_active_load(
                &ActiveLoad { worker: WorkerId(id), rank: Rank(0), blocks },
                ActiveLoadForm::Used,
            );
            let envelope =
                Envelope { publisher: id, sequence: self.round, published_at: 1, topic: TOPIC, payload: &payload };
            let parts = wire::encode_frames(&envelope).into_iter().map(Bytes::from).collect::<Vec<_>>();
            socket.send(ZmqMessage::try_from(parts).unwrap()).await.unwrap();
        }
    }

    /// Publishes until the bridge has heard the last message of each. A message that a publisher dropped, or sent before
    /// anybody listened, is made up for by another round.
    async fn account(&mut self, bridge: &Bridge) -> Account {
        let publishers = Mutex::new((self, 0));
        eventually("the last message of each is heard", || async {
            let (publishers, looks) = &mut *publishers.lock().await;
            if *looks % LOOKS_PER_ROUND == 0 {
                publishers.publish(None).await;
            }
            *looks += 1;
            let metrics = bridge.metrics().await;
            publishers.settled(&metrics).ok_or(metrics.text)
        })
        .await
    }

    fn settled(&self, metrics: &Exposition) -> Option<Account> {
        let blocks = metrics.values("llm_kv_blocks_active", &[]);
        (blocks == vec![self.round as f64; self.sockets.len()]).then(|| Account {
            round: self.round,
            heard: metrics.value("dynamo_bridge_events_total", &[("topic", TOPIC)]).unwrap(),
            missed: metrics.value("dynamo_bridge_events_missed_total", &[("topic", TOPIC)]).unwrap(),
        })
    }
}

#[tokio::test]
async fn too_few_files_for_the_workers_allowed_are_told_at_start() {
    let folder = tempfile::tempdir().unwrap();
    // Three connections a worker, and 1,024 files beside them.
    for (limit, is_short) in [("1300", true), ("1400", false)] {
        let limited = format!("ulimit -n {limit} && exec \"$0\" \"$@\"");
        let program = ["-c", &limited, env!("CARGO_BIN_EXE_metrics"), "--host", "127.0.0.1", "--port", "0"];
        let options = ["--file-kv", folder.path().to_str().unwrap(), "--max-workers", "100"];
        let mut bridge = Program::start(&mut command("/bin/sh", &[&program[..], &options].concat(), &[]));
        bridge.says("Reading registrations in ").await;
        assert!(bridge.interrupt().await.success());
        let is_told = |line: &&String| line.contains(" WARN ") && line.contains(&format!("only {limit} may be open"));
        assert_eq!(bridge.lines().iter().filter(is_told).count(), usize::from(is_short), "{:?}", bridge.lines());
    }
}

#[tokio::test]
async fn nothing_of_a_thousand_publishers_is_lost_unseen() {
    descriptors_suffice(4 * PUBLISHERS).unwrap();
    let store = Store::new();
    let mut publishers = Publishers::registered(&store).await;
    let bridge = store.bridge("1h").await;
    let before = publishers.account(&bridge).await;
    let mut pace = interval(PACE);
    for round in 0..ROUNDS {
        pace.tick().await;
        publishers.publish(Some(round)).await;
    }
    let after = publishers.account(&bridge).await;
    let [heard, missed] = [after.heard - before.heard, after.missed - before.missed];
    assert!(missed >= ROUNDS as f64, "{missed}");
    let published = (after.round - before.round) * PUBLISHERS;
    assert_eq!([heard + missed], [published as f64], "{heard} heard and {missed} missed");
    assert_eq!(bridge.metrics().await.value("llm_load_known_ratio", &[]), Some(1.0));
}

#[tokio::test]
async fn publishers_of_garbage_take_a_few_lines() {
    const MESSAGES: f64 = 100_000.0;
    let start = Instant::now();
    let store = Store::new();
    let mut sockets = Vec::new();
    for id in 0..20 {
        let mut socket = PubSocket::new();
        register(&store, id, &socket.bind("tcp://127.0.0.1:0").await.unwrap().to_string());
        sockets.push(socket);
    }
    let bridge = store.bridge("1h").await;
    let too_long = vec![0; 20_000];
    let garbage: [&[&[u8]]; 3] = [&[b"kv_metrics"], &[b"kv_metrics", b"\n", b"", b"\xff"], &[b"kv_metrics", &too_long]];
    let rejected = || async {
        let metrics = bridge.metrics().await;
        metrics.values("dynamo_bridge_messages_rejected_total", &[("source", "zmq")]).iter().sum::<f64>()
    };
    while rejected().await < MESSAGES {
        assert!(start.elapsed() < Duration::from_secs(300), "{}", rejected().await);
        for round in 0..500 {
            for socket in &mut sockets {
                let parts = garbage[round % garbage.len()].iter().map(|part| Bytes::copy_from_slice(part));
                socket.send(ZmqMessage::try_from(parts.collect::<Vec<_>>()).unwrap()).await.unwrap();
            }
        }
    }
    let (rejections, lines) = (bridge.program.count("Rejected (kv_metrics"), bridge.program.lines().len() as u64);
    assert!(rejections >= 1 && lines <= 20 * lines_allowed(start), "{rejections} of {lines}");
}

#[tokio::test]
async fn publishers_that_drop_whoever_listens_take_a_few_lines() {
    const DROPS: u64 = 300;
    let start = Instant::now();
    let store = Store::new();
    let drops = Arc::new(AtomicU64::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for id in 0..50 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        register(&store, id, &format!("tcp://{}", listener.local_addr().unwrap()));
        let drops = Arc::clone(&drops);
        tasks.spawn(async move {
            while listener.accept().await.is_ok() {
                drops.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let mut bridge = store.bridge("1h").await;
    bridge.program.says("cannot be heard").await;
    eventually("every publisher has dropped several connections", || async {
        let drops = drops.load(Ordering::Relaxed);
        if drops >= DROPS { Ok(()) } else { Err(drops.to_string()) }
    })
    .await;
    let lines = bridge.program.lines().len() as u64;
    assert!(lines <= 20 * lines_allowed(start), "{lines}");
}
