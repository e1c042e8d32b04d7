use super::*;

struct Heard {
    registry: Registry,
    observations: mpsc::Receiver<Observation>,
    channels: mpsc::Receiver<ChannelChange>,
}

fn registry() -> Heard {
    registry_of(Source::Etcd, Owners::default())
}

fn registry_of(source: Source, owners: Owners) -> Heard {
    let (observe, observations) = mpsc::channel(100);
    let (change, channels) = mpsc::channel(100);
    let registry = Registry::new(source, "dynamo".parse().unwrap(), owners, observe, change);
    Heard { registry, observations, channels }
}

impl Heard {
    async fn put(&mut self, path: &str, value: &str) {
        self.owned(path, value, None).await;
    }

    /// By the process of a worker.
    async fn owned(&mut self, path: &str, value: &str, owner: Option<u64>) {
        self.registry.put(path, path, value.as_bytes(), Standing::default(), owner.map(WorkerId)).await;
    }

    /// What was said since the last look, in short.
    fn said(&mut self) -> Vec<String> {
        let mut said = Vec::new();
        while let Ok(observation) = self.observations.try_recv() {
            said.push(match observation {
                Observation::Registered(Registration { key, entry, .. }) => format!("+ {} {}", key.id, name(&entry)),
                Observation::Deregistered(Registration { key, entry, .. }) => format!("- {} {}", key.id, name(&entry)),
                Observation::Rejected(rejection) => rejection.reason.as_str().to_owned(),
                other => format!("{other:?}"),
            });
        }
        while let Ok(change) = self.channels.try_recv() {
            said.push(match change {
                ChannelChange::Opened(_, channel) => format!("+ channel {}", channel.publisher),
                ChannelChange::Closed(channel) => format!("- channel {}", channel.publisher),
            });
        }
        said
    }
}

fn name(entry: &Entry) -> &'static str {
    match entry {
        Entry::Instance(_) => "instance",
        Entry::Card(_) => "card",
        Entry::Adapter(_) => "adapter",
    }
}

fn instance(namespace: &str, id: u64) -> String {
    format!(r#"{{"namespace":"{namespace}","component":"backend","endpoint":"generate","instance_id":{id}}}"#)
}

const CHANNEL: &str = r#"{"namespace":"dynamo","topic":"kv_metrics","instance_id":7,"transport":{"kind":"Zmq","config":{"endpoint":"tcp://192.0.2.2:1"}}}"#;

#[tokio::test]
async fn an_entry_is_told_once_and_taken_back_when_it_goes() {
    let mut heard = registry();
    for _ in 0..2 {
        heard.put("v1/instances/a", &instance("dynamo", 1)).await;
        heard.put("v1/event_channels/7", CHANNEL).await;
    }
    assert_eq!(heard.said(), ["+ 1 instance", "+ channel 7"]);
    heard.registry.remove("v1/instances/a").await;
    heard.registry.remove("v1/event_channels/7").await;
    heard.registry.remove("v1/instances/a").await;
    assert_eq!(heard.said(), ["- 1 instance", "- channel 7"]);
}

#[tokio::test]
async fn a_changed_entry_takes_back_what_it_said_of_another() {
    let mut heard = registry();
    heard.put("v1/instances/a", &instance("dynamo", 1)).await;
    heard.put("v1/instances/a", &instance("dynamo", 2)).await;
    assert_eq!(heard.said(), ["+ 1 instance", "- 1 instance", "+ 2 instance"]);
    heard.put("v1/event_channels/7", CHANNEL).await;
    heard.put("v1/event_channels/7", &CHANNEL.replace(":1\"", ":2\"")).await;
    assert_eq!(heard.said(), ["+ channel 7", "- channel 7", "+ channel 7"], "a publisher on a new port");
    heard.put("v1/instances/a", "garbage").await;
    assert_eq!(heard.said(), ["malformed", "- 2 instance"]);
}

#[tokio::test]
async fn a_channel_whose_pod_stands_otherwise_stays_open_and_is_closed_once() {
    let mut heard = registry();
    for ready in [true, false, true] {
        let standing = || Standing { ready, pod: None };
        heard.registry.put("a", "v1/instances/a", instance("dynamo", 1).as_bytes(), standing(), None).await;
        heard.registry.put("b", "v1/event_channels/7", CHANNEL.as_bytes(), standing(), None).await;
    }
    assert_eq!(heard.said(), ["+ 1 instance", "+ 1 instance", "+ 1 instance", "+ channel 7"]);
    heard.registry.remove("b").await;
    assert_eq!(heard.said(), ["- channel 7"]);
}

#[tokio::test]
async fn a_list_takes_back_what_is_not_in_it() {
    let mut heard = registry();
    for id in 1..=3 {
        heard.put(&format!("v1/instances/{id}"), &instance("dynamo", id)).await;
    }
    heard.said();
    heard.registry.keep_only(&HashSet::from(["v1/instances/2".to_owned()])).await;
    let mut said = heard.said();
    said.sort();
    assert_eq!(said, ["- 1 instance", "- 3 instance"]);
}

#[tokio::test]
async fn of_workers_that_go_as_a_whole_none_loses_its_instance_before_its_card() {
    let mut heard = registry();
    let mut ids = Vec::new();
    for id in 1..=2 {
        let [card, channel] = book_keeping(id, id * 10);
        let instance = (format!("v1/instances/{id}"), instance("dynamo", id));
        for (path, value) in [channel, instance, card] {
            heard.put(&path, &value).await;
            ids.push(path);
        }
    }
    heard.said();
    heard.registry.remove_all(ids).await;
    let gone = ["- 1 card", "- 2 card", "- 1 instance", "- 2 instance", "- channel 10", "- channel 20"];
    assert_eq!(heard.said(), gone);
}

#[tokio::test]
async fn another_namespace_and_garbage_cost_themselves_once() {
    let mut heard = registry();
    for _ in 0..2 {
        heard.put("v1/instances/a", &instance("other", 1)).await;
        heard.put("v1/instances/b", "{").await;
        heard.put("v1/event_sources/c", "{").await;
    }
    heard.put("v1/instances/d", &instance("dynamo-1a2b3c4d", 4)).await;
    assert_eq!(heard.said(), ["truncated", "+ 4 instance"]);
}

#[tokio::test]
async fn entries_are_bounded_and_those_beyond_are_rejected() {
    let mut heard = registry();
    // Of no interest, and remembered all the same.
    for entry in 0..200_000 {
        heard.put(&format!("v1/event_sources/{entry}"), "").await;
        assert_eq!(heard.said(), [] as [&str; 0], "{entry}");
    }
    heard.put("v1/instances/a", &instance("dynamo", 1)).await;
    assert_eq!(heard.said(), ["too_many_entries"]);
    heard.registry.remove("v1/event_sources/7").await;
    heard.put("v1/instances/a", &instance("dynamo", 1)).await;
    assert_eq!(heard.said(), ["+ 1 instance"]);
}

/// A worker's card, and a channel of its own or of a router's, as 1.6 registers them.
fn book_keeping(worker: u64, publisher: u64) -> [(String, String); 2] {
    let key = WorkerKey {
        namespace: "dynamo".into(),
        component: "backend".into(),
        endpoint: "generate".into(),
        id: WorkerId(worker),
    };
    let value = format!(
        r#"{{"namespace":"dynamo","component":"backend","endpoint":"generate","instance_id":{worker},"card_json":{{"display_name":"m"}}}}"#
    );
    let card = (format!("v1/mdc/dynamo/backend/generate/{worker:x}"), value);
    [card, wire::encode_channel(&key, Topic::ActiveSequences.as_str(), publisher, "tcp://192.0.2.2:1")]
}

#[tokio::test]
async fn a_workers_own_book_keeping_is_not_heard_and_a_routers_is() {
    let mut heard = registry();
    let [card, own] = book_keeping(1, 10);
    let [_, routers] = book_keeping(1, 20);
    heard.owned(&card.0, &card.1, Some(1)).await;
    heard.owned(&own.0, &own.1, Some(1)).await;
    heard.owned(&routers.0, &routers.1, Some(2)).await;
    assert_eq!(heard.said(), ["+ 1 card", "+ channel 20"]);
    for path in [&own.0, &card.0, &routers.0] {
        heard.registry.remove(path).await;
    }
    assert_eq!(heard.said(), ["- 1 card", "- channel 20"]);
    heard.put(&card.0, &card.1).await;
    heard.put(&own.0, &own.1).await;
    assert_eq!(heard.said(), ["+ 1 card", "+ channel 10"], "nobody says whose it is");
    heard.owned(&own.0, &own.1, Some(1)).await;
    assert_eq!(heard.said(), ["- channel 10"], "now somebody does");
}

#[tokio::test]
async fn a_channel_is_closed_once_a_card_shows_that_it_is_a_workers() {
    let mut heard = registry();
    let [card, own] = book_keeping(1, 10);
    heard.owned(&own.0, &own.1, Some(1)).await;
    heard.owned(&card.0, &card.1, Some(1)).await;
    assert_eq!(heard.said(), ["+ 1 card", "+ channel 10", "- channel 10"]);
    heard.registry.remove(&own.0).await;
    heard.registry.remove(&card.0).await;
    assert_eq!(heard.said(), ["- 1 card"]);
}

#[tokio::test]
async fn whose_a_publisher_of_passes_is_is_known_while_a_source_that_tells_it_has_the_channel() {
    let owners = Owners::default();
    let mut etcd = registry_of(Source::Etcd, owners.clone());
    let mut kubernetes = registry_of(Source::Kubernetes, owners.clone());
    let (path, passes) = ("v1/event_channels/dynamo/x/7", CHANNEL.replace("kv_metrics", "forward-pass-metrics"));
    etcd.owned("v1/event_channels/dynamo/x/8", &CHANNEL.replace(":7", ":8"), Some(31)).await;
    etcd.put(path, &passes).await;
    assert_eq!([7, 8].map(|publisher| owners.of(publisher)), [None, None], "nobody's, and no passes");
    etcd.owned(path, &passes, Some(31)).await;
    kubernetes.owned(path, &passes, Some(31)).await;
    assert_eq!(owners.of(7), Some(WorkerId(31)));
    etcd.registry.remove(path).await;
    assert_eq!(owners.of(7), Some(WorkerId(31)), "the other source has it still");
    kubernetes.owned(path, &passes, Some(32)).await;
    assert_eq!(owners.of(7), Some(WorkerId(32)));
    kubernetes.registry.remove(path).await;
    assert_eq!(owners.of(7), None);
}
