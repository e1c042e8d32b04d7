use std::collections::HashMap as Map;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use zeromq::{PubSocket, Socket, SocketSend, ZmqMessage};

use super::*;
use crate::fleet::{Estimate, Load, LoadEvent, Lost, Numbered, Rank, Scope, WorkerId};
use crate::process;
use crate::source::owners::Owners;
use crate::wire::{self, ActiveBlocks, ActiveLoad, ActiveLoadForm, Envelope};
use crate::zmtp::{Connection, Item, Publisher, SocketType, encode_message};

const DEADLINE: Duration = Duration::from_secs(60);
/// As short as a loaded machine allows, for tests that wait for one of them to pass.
const BRIEF: Timing = Timing {
    connect: Duration::from_secs(2),
    pause: (Duration::from_millis(10), Duration::from_millis(50)),
    patience: Duration::from_millis(20),
    // However slow the machine is.
    rate: Duration::from_secs(3600),
};

/// The source, with everything that it is told and says.
struct Ears {
    changes: mpsc::Sender<ChannelChange>,
    observations: mpsc::Receiver<Observation>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Ears {
    fn new() -> Self {
        Self::with(100, 10_000, None)
    }

    fn with(connections: usize, capacity: usize, broker: Option<(Broker, NamespaceFilter)>) -> Self {
        Self::of_topics(&Topic::NUMBERED, connections, capacity, broker)
    }

    fn of_topics(
        topics: &[Topic],
        connections: usize,
        capacity: usize,
        broker: Option<(Broker, NamespaceFilter)>,
    ) -> Self {
        let (changes, told) = mpsc::channel(10);
        let (sender, observations) = mpsc::channel(capacity);
        let stop = CancellationToken::new();
        let shared = Shared::timed(connections, topics.to_vec(), Owners::default(), BRIEF, sender);
        let (broker, watched) = broker.unzip();
        let watched = watched.unwrap_or(NamespaceFilter::All);
        let task = tokio::spawn(listen(broker, watched, shared, told, stop.clone()));
        Self { changes, observations, stop, task }
    }

    async fn open(&self, publisher: u64, endpoint: &str) {
        self.changes.send(ChannelChange::Opened(Source::Etcd, announced(publisher, endpoint))).await.unwrap();
    }

    async fn close(&self, publisher: u64, endpoint: &str) {
        self.changes.send(ChannelChange::Closed(announced(publisher, endpoint))).await.unwrap();
    }

    async fn next(&mut self) -> Observation {
        within(self.observations.recv()).await.unwrap()
    }

    async fn expect(&mut self, expected: Observation) {
        assert_eq!(self.next().await, expected);
    }

    async fn expect_rejection(&mut self, expected: Reason) {
        match self.next().await {
            Observation::Rejected(Rejection { source: Source::Zmq, topic: Topic::KvMetrics, reason, .. }) => {
                assert_eq!(reason, expected);
            }
            other => panic!("{expected:?} was to be rejected, instead: {other:?}"),
        }
    }

    async fn stop(self) {
        self.stop.cancel();
        within(self.task).await.unwrap();
    }
}

/// The most that anything may take on a loaded machine.
async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("nothing happened")
}

fn announced(publisher: u64, endpoint: &str) -> Arc<EventChannel> {
    announced_of("kv_metrics", publisher, endpoint)
}

fn announced_of(topic: &str, publisher: u64, endpoint: &str) -> Arc<EventChannel> {
    Arc::new(EventChannel {
        publisher,
        topic: topic.to_owned(),
        namespace: "dynamo".to_owned(),
        scope: None,
        transport: Transport::Zmq { endpoint: endpoint.to_owned() },
    })
}

const WORKER: WorkerId = WorkerId(1000);

fn channel(publisher: u64) -> Channel {
    Channel { source: Source::Zmq, publisher, topic: Topic::KvMetrics }
}

fn event(publisher: u64, sequence: u64, blocks: ActiveBlocks) -> [Vec<u8>; 4] {
    let load = ActiveLoad { worker: WORKER, rank: Rank(1), blocks };
    let payload = wire::encode_active_load(&load, ActiveLoadForm::Used);
    wire::encode_frames(&Envelope { publisher, sequence, published_at: 1, topic: "kv_metrics", payload: &payload })
}

/// The parts of a worker's message whose blocks are its number.
fn own(publisher: u64, sequence: u64) -> [Vec<u8>; 4] {
    event(publisher, sequence, ActiveBlocks::Used(Some(sequence)))
}

fn heard(publisher: u64, sequence: u64) -> Observation {
    Observation::Load(LoadEvent {
        message: Numbered { channel: channel(publisher), sequence },
        namespace: "dynamo".into(),
        scope: None,
        worker: WORKER,
        rank: Rank(1),
        load: Load { active_blocks: Some(sequence), ..Load::default() },
    })
}

fn lost(publisher: u64) -> Observation {
    Observation::ChannelLost(channel(publisher))
}

/// A publisher of the test's own, one connection at a time.
struct Peer {
    listener: TcpListener,
}

impl Peer {
    async fn new() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").await.unwrap() }
    }

    fn endpoint(&self) -> String {
        format!("tcp://{}", self.listener.local_addr().unwrap())
    }

    /// Waits for a subscription.
    async fn accept(&self) -> Connection {
        let (stream, _) = within(self.listener.accept()).await.unwrap();
        let opening = Connection::open(stream, SocketType::Publisher, SocketType::Subscriber, 1000);
        let mut connection = within(opening).await.unwrap();
        let subscription = within(connection.next()).await.unwrap();
        assert_eq!(subscription, Item::Message(vec![Bytes::from_static(b"\x01kv_metrics")]));
        connection
    }
}

async fn say(connection: &mut Connection, parts: &[impl AsRef<[u8]>]) {
    connection.send(&encode_message(parts)).await.unwrap();
}

/// Waits until the other side has closed.
async fn closed(connection: &mut Connection) {
    assert!(within(connection.next()).await.is_err());
}

#[tokio::test]
async fn a_publisher_of_another_make_is_heard() {
    let mut ears = Ears::new();
    let mut publisher = PubSocket::new();
    let endpoint = publisher.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    ears.open(7, &endpoint).await;
    // It does not say when somebody has subscribed.
    let mut sequence = 0;
    let first = loop {
        publish(&mut publisher, own(7, sequence)).await;
        sequence += 1;
        if let Ok(first) = tokio::time::timeout(Duration::from_millis(10), ears.observations.recv()).await {
            break first.unwrap();
        }
    };
    let Observation::Load(LoadEvent { message: Numbered { sequence: first, .. }, .. }) = first else {
        panic!("{first:?}");
    };
    for sequence in first + 1..sequence {
        ears.expect(heard(7, sequence)).await;
    }
    let estimate = Estimate { decode_blocks: Some(5), prefill_tokens: Some(80) };
    publish(&mut publisher, event(7, 100, ActiveBlocks::Estimated(estimate))).await;
    let told = ears.next().await;
    assert!(matches!(&told, Observation::Estimated(event) if event.estimate == estimate), "{told:?}");
    publish(&mut publisher, event(7, 101, ActiveBlocks::Used(Some(101)))).await;
    ears.expect(heard(7, 101)).await;
    drop(publisher);
    ears.expect(lost(7)).await;
    ears.stop().await;
}

async fn publish(publisher: &mut PubSocket, parts: [Vec<u8>; 4]) {
    let parts: Vec<_> = parts.into_iter().map(Bytes::from).collect();
    publisher.send(ZmqMessage::try_from(parts).unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_topic_that_is_not_wanted_is_not_even_looked_at() {
    let mut ears = Ears::of_topics(&[Topic::KvMetrics], 100, 10_000, None);
    // Whoever looks at one of these endpoints complains about it.
    let announced = ["forward-pass-metrics", "active_sequences_events", "kv-events", "kv_metrics"];
    for (publisher, topic) in (1..).zip(announced) {
        let opened = ChannelChange::Opened(Source::Etcd, announced_of(topic, publisher, "no endpoint"));
        ears.changes.send(opened).await.unwrap();
    }
    let Observation::Rejected(rejection) = ears.next().await else { panic!("nobody complained") };
    assert!(rejection.detail.starts_with("publisher 4:"), "{rejection:?}");
    ears.stop().await;
}

#[tokio::test]
async fn a_publisher_with_too_many_addresses_is_rejected_whatever_it_publishes() {
    let mut ears = Ears::new();
    for topic in Topic::NUMBERED {
        for port in 1..=9 {
            let opened = announced_of(topic.as_str(), 7, &format!("tcp://127.0.0.1:{port}"));
            ears.changes.send(ChannelChange::Opened(Source::Etcd, opened)).await.unwrap();
        }
        let Observation::Rejected(rejection) = ears.next().await else { panic!("the ninth") };
        assert_eq!((rejection.topic, rejection.reason), (topic, Reason::TooManyEntries));
        assert!(rejection.reason.applies_to(topic), "{topic:?}");
    }
    ears.stop().await;
}

#[tokio::test]
async fn a_broken_connection_is_told_and_made_again() {
    let mut ears = Ears::new();
    let peer = Peer::new().await;
    ears.open(7, &peer.endpoint()).await;
    for sequence in 0..3 {
        let mut connection = peer.accept().await;
        say(&mut connection, &own(7, sequence)).await;
        ears.expect(heard(7, sequence)).await;
        drop(connection);
        ears.expect(lost(7)).await;
    }
    ears.stop().await;
}

#[tokio::test]
async fn a_publisher_that_restarts_elsewhere_is_followed() {
    let mut ears = Ears::new();
    let (before, after) = (Peer::new().await, Peer::new().await);
    ears.open(7, &before.endpoint()).await;
    let mut old = before.accept().await;
    say(&mut old, &own(7, 9)).await;
    ears.expect(heard(7, 9)).await;
    // One voice is earlier than the other.
    ears.open(7, &after.endpoint()).await;
    closed(&mut old).await;
    let mut new = after.accept().await;
    say(&mut new, &own(7, 0)).await;
    ears.expect(lost(7)).await;
    ears.expect(heard(7, 0)).await;
    ears.close(7, &before.endpoint()).await;
    say(&mut new, &own(7, 1)).await;
    ears.expect(heard(7, 1)).await;
    ears.stop().await;
}

#[tokio::test]
async fn a_channel_is_open_while_any_voice_names_it() {
    let mut ears = Ears::new();
    let peer = Peer::new().await;
    let endpoint = peer.endpoint();
    ears.open(7, &endpoint).await;
    ears.open(7, &endpoint).await;
    let mut connection = peer.accept().await;
    ears.close(7, &endpoint).await;
    ears.close(7, "tcp://127.0.0.1:1").await;
    say(&mut connection, &own(7, 0)).await;
    ears.expect(heard(7, 0)).await;
    ears.close(7, &endpoint).await;
    ears.expect(lost(7)).await;
    closed(&mut connection).await;
    ears.open(7, &endpoint).await;
    let mut connection = peer.accept().await;
    say(&mut connection, &own(7, 1)).await;
    ears.expect(heard(7, 1)).await;
    ears.stop().await;
}

#[tokio::test]
async fn what_is_not_wanted_is_not_connected_to() {
    let mut ears = Ears::new();
    let peer = Peer::new().await;
    let other = |topic: &str, transport| {
        let channel = EventChannel {
            publisher: 1,
            topic: topic.to_owned(),
            namespace: "dynamo".to_owned(),
            scope: None,
            transport,
        };
        ChannelChange::Opened(Source::Etcd, Arc::new(channel))
    };
    let zmq = Transport::Zmq { endpoint: peer.endpoint() };
    ears.changes.send(other("kv-events", zmq)).await.unwrap();
    ears.changes.send(other("kv_metrics", Transport::Other)).await.unwrap();
    ears.open(2, "ipc:///tmp/socket").await;
    ears.expect_rejection(Reason::Malformed).await;
    ears.close(2, "ipc:///tmp/socket").await;
    ears.open(3, &peer.endpoint()).await;
    // The first to connect is the one that is wanted.
    say(&mut peer.accept().await, &own(3, 0)).await;
    ears.expect(heard(3, 0)).await;
    ears.stop().await;
}

#[tokio::test]
async fn garbage_costs_the_message_that_it_is() {
    let mut ears = Ears::new();
    let peer = Peer::new().await;
    ears.open(7, &peer.endpoint()).await;
    let mut connection = peer.accept().await;
    let mut version = own(7, 0);
    version[3][0] = 2;
    let mut length = own(7, 0);
    length[3][4] += 1;
    let mut payload = own(7, 0);
    payload[3].pop();
    payload[3][4] -= 1;
    for (message, reason) in [
        (&version[..], Reason::UnknownVersion),
        (&length, Reason::Truncated),
        (&payload, Reason::Truncated),
        (&own(7, 0)[..3], Reason::WrongShape),
        (&[b"other".to_vec()], Reason::WrongShape),
        // With their headers, of twelve and nine bytes: 16 KiB, and one byte more.
        (&[b"kv_metrics".to_vec(), vec![0; 16 * 1024 - 21]], Reason::WrongShape),
        (&[b"kv_metrics".to_vec(), vec![0; 16 * 1024 - 20]], Reason::TooLarge),
    ] {
        say(&mut connection, message).await;
        ears.expect_rejection(reason).await;
    }
    // Its subscription brings along what starts alike.
    say(&mut connection, &[b"kv_metrics_of_another_kind"]).await;
    say(&mut connection, &own(7, 1)).await;
    ears.expect(heard(7, 1)).await;
    ears.stop().await;
}

#[tokio::test]
async fn a_peer_that_breaks_the_protocol_is_left_for_a_while() {
    let mut ears = Ears::new();
    let peer = Peer::new().await;
    ears.open(7, &peer.endpoint()).await;
    let endless = [&[2][..], &u64::MAX.to_be_bytes()].concat();
    let many = [1, 0].repeat(100);
    let foreign = encode_message(&own(8, 0));
    for (bytes, reason) in [
        (&endless[..], Reason::TooLarge),
        (&many, Reason::TooLarge),
        (b"\xff\xff", Reason::Malformed),
        (b"\x04\x00", Reason::Malformed),
        (&foreign, Reason::WrongShape),
    ] {
        let mut connection = peer.accept().await;
        connection.send(bytes).await.unwrap();
        ears.expect_rejection(reason).await;
        closed(&mut connection).await;
    }
    say(&mut peer.accept().await, &own(7, 1)).await;
    ears.expect(heard(7, 1)).await;
    ears.stop().await;
}

#[tokio::test]
async fn a_peer_that_speaks_something_else_is_rejected() {
    let mut ears = Ears::new();
    let peer = Peer::new().await;
    ears.open(7, &peer.endpoint()).await;
    let (mut stream, _) = within(peer.listener.accept()).await.unwrap();
    stream.write_all(&b"HTTP/1.1 400 Bad Request\r\n".repeat(3)).await.unwrap();
    ears.expect_rejection(Reason::Malformed).await;
    // A subscriber where a publisher should be.
    let (stream, _) = within(peer.listener.accept()).await.unwrap();
    Connection::open(stream, SocketType::Subscriber, SocketType::Subscriber, 1000).await.unwrap();
    ears.expect_rejection(Reason::Malformed).await;
    ears.stop().await;
}

#[tokio::test]
async fn mute_peers_cost_only_themselves() {
    let mut ears = Ears::new();
    let (mute, half) = (Peer::new().await, Peer::new().await);
    let honest = Peer::new().await;
    ears.open(1, &mute.endpoint()).await;
    ears.open(2, &half.endpoint()).await;
    ears.open(3, &honest.endpoint()).await;
    let mut connection = honest.accept().await;
    let (mut held, mut streams) = (within(mute.listener.accept()).await.unwrap().0, Vec::new());
    let (mut stream, _) = within(half.listener.accept()).await.unwrap();
    stream.write_all(b"\xff\0\0\0").await.unwrap();
    streams.push(stream);
    say(&mut connection, &own(3, 0)).await;
    ears.expect(heard(3, 0)).await;
    // Each is left after a while, and tried again.
    let mut greeting = Vec::new();
    within(held.read_to_end(&mut greeting)).await.unwrap();
    assert_eq!(greeting.len(), 64);
    within(mute.listener.accept()).await.unwrap();
    within(half.listener.accept()).await.unwrap();
    say(&mut connection, &own(3, 1)).await;
    ears.expect(heard(3, 1)).await;
    ears.stop().await;
}

#[tokio::test]
async fn a_ping_is_answered() {
    let ears = Ears::new();
    let peer = Peer::new().await;
    ears.open(7, &peer.endpoint()).await;
    let (mut stream, _) = within(peer.listener.accept()).await.unwrap();
    let mut greeting = [0; 64];
    stream.read_exact(&mut greeting).await.unwrap();
    stream.write_all(&greeting).await.unwrap();
    let mut ready = [0; 27];
    within(stream.read_exact(&mut ready)).await.unwrap();
    assert_eq!(&ready, b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03SUB");
    stream.write_all(b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03PUB").await.unwrap();
    let mut subscription = [0; 13];
    within(stream.read_exact(&mut subscription)).await.unwrap();
    assert_eq!(&subscription, b"\x00\x0b\x01kv_metrics");
    stream.write_all(b"\x04\x09\x04PING\0\x01hi").await.unwrap();
    let mut pong = [0; 9];
    within(stream.read_exact(&mut pong)).await.unwrap();
    assert_eq!(&pong, b"\x04\x07\x04PONGhi");
    ears.stop().await;
}

#[tokio::test]
async fn a_worker_never_waits_for_a_bridge_that_falls_behind() {
    let mut ears = Ears::with(10, 1, None);
    let peer = Peer::new().await;
    ears.open(7, &peer.endpoint()).await;
    let mut connection = peer.accept().await;
    // More than all the buffers between here and there hold, in messages that are not folded.
    let padding = vec![0; 15_000];
    let estimate = |sequence| {
        let mut parts = own(7, sequence);
        let payload = [&parts[3][5..], b"\xa1x\xc5\x3a\x98", &padding].concat();
        let payload = [&[payload[0] + 1], &payload[1..]].concat();
        parts[3] = [&[1], &u32::try_from(payload.len()).unwrap().to_be_bytes()[..], &payload].concat();
        parts
    };
    for sequence in 0..4_000 {
        within(connection.send(&encode_message(&estimate(sequence)))).await.unwrap();
    }
    ears.expect(heard(7, 0)).await;
    // What was given up is counted, what was heard is no longer known, and what comes then is heard.
    let mut sequence = 4_000;
    let mut told = Vec::new();
    while told.last() != Some(&heard(7, sequence)) {
        if told.last() == Some(&lost(7)) {
            sequence += 1;
            say(&mut connection, &own(7, sequence)).await;
        }
        told.push(ears.next().await);
    }
    let (mut given_up, mut loads) = (0, 1);
    for observation in &told {
        match observation {
            Observation::Lost(Lost { source: Source::Zmq, messages }) => given_up += messages,
            Observation::Load(_) => loads += 1,
            other => assert_eq!(*other, lost(7)),
        }
    }
    assert!(given_up > 0 && told.contains(&lost(7)));
    // Number 4,000 was never sent.
    assert_eq!(loads + given_up, sequence);
    ears.stop().await;
}

#[tokio::test]
async fn a_flood_is_left_alone() {
    let mut ears = Ears::with(10, 20_000, None);
    let peer = Peer::new().await;
    ears.open(7, &peer.endpoint()).await;
    let mut connection = peer.accept().await;
    let bytes: Vec<u8> = (0..20_000).flat_map(|sequence| encode_message(&own(7, sequence))).collect();
    // It ends before all is sent.
    connection.send(&bytes).await.ok();
    closed(&mut connection).await;
    let mut told = Vec::new();
    while told.last() != Some(&Observation::Lost(Lost { source: Source::Zmq, messages: 1 })) {
        told.push(ears.next().await);
    }
    assert_eq!(told[told.len() - 2], lost(7));
    assert_eq!(told[told.len() - 3], heard(7, 9_999));
    say(&mut peer.accept().await, &own(7, 20_000)).await;
    ears.expect(heard(7, 20_000)).await;
    ears.stop().await;
}

#[tokio::test]
async fn connections_are_bounded_and_publishers_take_turns() {
    let mut ears = Ears::with(1, 100, None);
    let peers = [Peer::new().await, Peer::new().await];
    ears.open(0, &peers[0].endpoint()).await;
    let mut first = peers[0].accept().await;
    ears.open(1, &peers[1].endpoint()).await;
    say(&mut first, &own(0, 0)).await;
    ears.expect(heard(0, 0)).await;
    ears.close(0, &peers[0].endpoint()).await;
    ears.expect(lost(0)).await;
    say(&mut peers[1].accept().await, &own(1, 0)).await;
    ears.expect(heard(1, 0)).await;
    ears.stop().await;
}

#[tokio::test]
async fn nothing_is_left_running() {
    let before = Handle::current().metrics().num_alive_tasks();
    let mut ears = Ears::new();
    let peer = Peer::new().await;
    ears.open(1, &peer.endpoint()).await;
    ears.open(2, "tcp://127.0.0.1:1").await;
    say(&mut peer.accept().await, &own(1, 0)).await;
    ears.expect(heard(1, 0)).await;
    ears.stop().await;
    assert_eq!(Handle::current().metrics().num_alive_tasks(), before);
}

#[tokio::test]
async fn publishers_behind_a_broker_are_told_apart() {
    let broker = Publisher::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let addresses = format!("xsub=tcp://127.0.0.1:1,xpub=tcp://127.0.0.1:1;{}", broker.endpoint());
    let watched = "dynamo".parse().unwrap();
    let mut ears = Ears::with(10, 100, Some((addresses.parse().unwrap(), watched)));
    // The namespace, and the topics that older releases do not prefix with it.
    within(broker.subscriptions().wait_for(|count| *count == 1 + Topic::NUMBERED.len() as u64)).await.unwrap();
    let publish = |subject: &str, mut parts: [Vec<u8>; 4]| {
        parts[0] = subject.as_bytes().to_vec();
        broker.publish(&parts);
    };
    publish("namespace.dynamo.kv_metrics", own(7, 0));
    publish("namespace.dynamo.kv-events", own(7, 1));
    publish("namespace.dynamo2.kv_metrics", own(7, 2));
    publish("namespace.dynamo.component.backend.endpoint.generate.kv_metrics", own(8, 3));
    publish("kv_metrics", own(9, 4));
    publish("kv_metrics_of_another_kind", own(9, 5));
    publish("kv-events", own(9, 6));
    ears.expect(heard(7, 0)).await;
    let Observation::Load(named) = heard(8, 3) else { unreachable!() };
    let scope = Scope { component: "backend".into(), endpoint: "generate".into() };
    ears.expect(Observation::Load(LoadEvent { scope: Some(scope), ..named })).await;
    ears.expect(heard(9, 4)).await;
    drop(broker);
    for publisher in [7, 8, 9] {
        ears.expect(lost(publisher)).await;
    }
    ears.stop().await;
}

/// As a broker of the namespace `dynamo` registers itself.
fn broker_record(id: u64, xpub_endpoints: &[String]) -> Arc<EventChannel> {
    let transport = Transport::ZmqBroker { xpub_endpoints: xpub_endpoints.to_vec() };
    Arc::new(EventChannel { transport, ..(*announced_of("any", id, "")).clone() })
}

#[tokio::test]
async fn each_broker_that_discovery_names_is_heard_and_each_message_counts_once() {
    let mut ears = Ears::new();
    let mut brokers = Vec::new();
    for id in 0..2 {
        let broker = Publisher::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let record = broker_record(id, &[broker.endpoint()]);
        ears.changes.send(ChannelChange::Opened(Source::Etcd, Arc::clone(&record))).await.unwrap();
        // Whatever the namespace, and the topics that older releases do not prefix with it.
        within(broker.subscriptions().wait_for(|count| *count == 1 + Topic::NUMBERED.len() as u64)).await.unwrap();
        brokers.push((broker, record));
    }
    let publish = |broker: usize, subject: &str, mut parts: [Vec<u8>; 4]| {
        parts[0] = subject.as_bytes().to_vec();
        brokers[broker].0.publish(&parts);
    };
    for sequence in 0..3 {
        publish(0, "namespace.dynamo.kv_metrics", own(7, sequence));
        ears.expect(heard(7, sequence)).await;
    }
    for sequence in 0..4 {
        publish(1, "namespace.dynamo.kv_metrics", own(7, sequence));
    }
    ears.expect(heard(7, 3)).await;
    publish(1, "kv_metrics", own(9, 0));
    ears.expect(heard(9, 0)).await;
    // What the other brings too is still known.
    ears.changes.send(ChannelChange::Closed(Arc::clone(&brokers[0].1))).await.unwrap();
    publish(1, "namespace.dynamo.kv_metrics", own(7, 4));
    ears.expect(heard(7, 4)).await;
    ears.changes.send(ChannelChange::Closed(Arc::clone(&brokers[1].1))).await.unwrap();
    for publisher in [7, 9] {
        ears.expect(lost(publisher)).await;
    }
    ears.stop().await;
}

#[tokio::test]
async fn a_bad_record_of_a_broker_costs_itself() {
    let mut ears = Ears::with(1, 100, None);
    let endpoint = |port: usize| format!("tcp://192.0.2.1:{port}");
    let brokers = (1..=MAX_BROKERS).map(|port| vec![endpoint(port)]);
    let bad = [vec!["ipc:///tmp/x".to_owned()], (1..=MAX_ENDPOINTS + 1).map(endpoint).collect(), vec![endpoint(99)]];
    for (id, endpoints) in (0..).zip(brokers.chain(bad)) {
        ears.changes.send(ChannelChange::Opened(Source::Etcd, broker_record(id, &endpoints))).await.unwrap();
    }
    for expected in [Reason::Malformed, Reason::TooManyEntries, Reason::TooManyEntries] {
        let Observation::Rejected(Rejection { source, topic, reason, .. }) = ears.next().await else {
            panic!("a rejection")
        };
        assert_eq!((source, topic, reason), (Source::Etcd, Topic::Discovery, expected));
        assert!(topic.sources().contains(&source) && reason.applies_to(topic), "its count is shown");
    }
    ears.stop().await;
}

#[tokio::test]
async fn a_thousand_publishers_are_heard_to_the_last_message() {
    const PUBLISHERS: u64 = 1_000;
    const EVENTS: u64 = 20;
    process::descriptors_suffice(4_000).unwrap();
    let mut ears = Ears::with(2_000, 10_000, None);
    let mut publishers = Map::new();
    for id in 0..PUBLISHERS {
        let publisher = Publisher::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        ears.open(id, &publisher.endpoint()).await;
        publishers.insert(id, publisher);
    }
    for publisher in publishers.values() {
        within(publisher.subscriptions().wait_for(|count| *count == 1)).await.unwrap();
    }
    for sequence in 0..EVENTS {
        for (id, publisher) in &publishers {
            publisher.publish(&own(*id, sequence));
        }
        tokio::task::yield_now().await;
    }
    let mut next = Map::new();
    for _ in 0..PUBLISHERS * EVENTS {
        let observation = ears.next().await;
        let Observation::Load(LoadEvent { message, .. }) = &observation else {
            panic!("{observation:?}");
        };
        let expected: &mut u64 = next.entry(message.channel.publisher).or_default();
        assert_eq!(observation, heard(message.channel.publisher, *expected));
        *expected += 1;
    }
    ears.stop().await;
    assert!(next.values().all(|heard| *heard == EVENTS));
}
