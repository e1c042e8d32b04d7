//! What a Dynamo process writes of itself into discovery: key paths and JSON values, the same in etcd (0.6 and later; 0.4
//! and 0.5 have paths of their own), in a folder and in Kubernetes resources (1.0 and later).

use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Number, Value, json};

use super::{Malformed, from_json, out_of_range};
use crate::fleet::{Adapter, Card, Limits, Ranks, Reason, Role, Scope, Topic, WorkerId, WorkerKey};

const INSTANCE: &str = "discovered instance";
const CARD: &str = "model card";
const CHANNEL: &str = "event channel";

/// Key prefixes under which [`decode_registration`] finds something.
pub const REGISTRATION_PREFIXES: [&str; 3] = ["v1/instances/", "v1/mdc/", "v1/event_channels/"];

/// Further ones of 0.4 and 0.5, in etcd alone; of 0.3, cards without limits. A key below `models/` does not say whose card
/// it is, its lease does: its path here ends in `/` and the lease in hex.
pub const OLD_PREFIXES: [&str; 2] = ["instances/", MODELS];

const MODELS: &str = "models/";

/// A registered entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Registered {
    /// An endpoint's instance.
    Instance(WorkerKey),
    /// The card of the model that a worker serves.
    Card(WorkerKey, Box<Card>),
    /// A LoRA adapter that a worker has loaded.
    Adapter(WorkerKey, Adapter),
    /// A publisher of events.
    Channel(Arc<EventChannel>),
}

impl Registered {
    /// The Dynamo namespace that it belongs to.
    #[must_use]
    pub fn namespace(&self) -> &str {
        match self {
            Self::Instance(key) | Self::Card(key, _) | Self::Adapter(key, _) => &key.namespace,
            Self::Channel(channel) => &channel.namespace,
        }
    }

    /// Whether saying this says `old` anew: the same kind of entry of the same worker. A channel's address is part of it.
    #[must_use]
    pub fn replaces(&self, old: &Self) -> bool {
        match (self, old) {
            (Self::Instance(new), Self::Instance(old)) | (Self::Card(new, _), Self::Card(old, _)) => new == old,
            (new, old) => new == old,
        }
    }
}

/// A publisher of events on one topic.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EventChannel {
    /// Dynamo's id of the publisher.
    pub publisher: u64,
    /// Dynamo's name of the topic.
    pub topic: String,
    /// Namespace of whom the events are about.
    pub namespace: String,
    /// Their component and endpoint, which 1.4 and later say.
    pub scope: Option<Scope>,
    /// How it is heard.
    pub transport: Transport,
}

/// How a channel is heard.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Transport {
    /// A ZMQ publisher's address, `tcp://host:port`, not checked.
    Zmq {
        /// The address.
        endpoint: String,
    },
    /// A broker, which hands out what every publisher of the namespace sends to it: `tcp://host:port` each, not checked.
    /// The channel's topic and publisher are the broker's own.
    ZmqBroker {
        /// Where it hands events out; one address at least.
        xpub_endpoints: Vec<String>,
    },
    /// A NATS subject, or something that is not heard at all.
    Other,
}

/// Decodes one entry; `None` for a key that says nothing to the bridge.
///
/// # Errors
/// A value that is not what its key announces.
pub fn decode_registration(path: &str, value: &[u8]) -> Result<Option<Registered>, Malformed> {
    if path.starts_with("v1/instances/") || path.starts_with("instances/") {
        let Identity { namespace, component, endpoint, instance_id } = from_json(INSTANCE, value)?;
        return Ok(Some(Registered::Instance(key(namespace, component, endpoint, instance_id))));
    }
    if let Some(rest) = path.strip_prefix("v1/mdc/") {
        return card(rest, value).map(Some);
    }
    if let Some(rest) = path.strip_prefix(MODELS) {
        return model(rest, value);
    }
    if let Some(rest) = path.strip_prefix("v1/event_channels/") {
        return Ok(channel(rest, value)?.map(|channel| Registered::Channel(Arc::new(channel))));
    }
    Ok(None)
}

#[derive(Deserialize)]
struct Identity {
    namespace: Arc<str>,
    component: Arc<str>,
    endpoint: Arc<str>,
    instance_id: u64,
}

fn key(namespace: Arc<str>, component: Arc<str>, endpoint: Arc<str>, id: u64) -> WorkerKey {
    WorkerKey { namespace, component, endpoint, id: WorkerId(id) }
}

/// From 0.7 on the card is wrapped in the identity of its worker; in 0.6 it is the value, and the key alone says whose.
fn card(path: &str, value: &[u8]) -> Result<Registered, Malformed> {
    #[derive(Deserialize)]
    struct Wrapped<'a> {
        #[serde(borrow)]
        card_json: Option<&'a RawValue>,
    }
    let parts: Vec<&str> = path.split('/').collect();
    let Wrapped { card_json } = from_json(CARD, value)?;
    let (key, json) = if let Some(card) = card_json {
        let Identity { namespace, component, endpoint, instance_id } = from_json(CARD, value)?;
        (key(namespace, component, endpoint, instance_id), card.get().as_bytes())
    } else {
        (key_of_path(&parts).ok_or_else(|| wrong_shape(CARD, format!("key {path:?}")))?, value)
    };
    if let [_, _, _, _, slug] = parts[..] {
        return Ok(Registered::Adapter(key, decode_adapter(slug, json)?));
    }
    Ok(Registered::Card(key, Box::new(decode_card(json)?)))
}

/// The entry of 0.3 - 0.5, which is no card but has its limits (0.4 on). `None` of one without a lease.
fn model(path: &str, value: &[u8]) -> Result<Option<Registered>, Malformed> {
    #[derive(Deserialize)]
    struct Wire {
        name: Arc<str>,
        endpoint: Served,
        runtime_config: Option<Runtime>,
    }
    #[derive(Deserialize)]
    struct Served {
        namespace: Arc<str>,
        component: Arc<str>,
        name: Arc<str>,
    }
    let lease = path.rsplit_once('/').and_then(|(_, lease)| u64::from_str_radix(lease, 16).ok());
    let Some(worker) = lease.filter(|lease| *lease > 0) else { return Ok(None) };
    let Wire { name, endpoint, runtime_config } = from_json(CARD, value)?;
    let key = key(endpoint.namespace, endpoint.component, endpoint.name, worker);
    let (limits, ranks) = runtime_config.unwrap_or_default().read()?;
    Ok(Some(Registered::Card(key, Box::new(Card { model: name, role: None, block_size: None, limits, ranks }))))
}

fn key_of_path(parts: &[&str]) -> Option<WorkerKey> {
    let [namespace, component, endpoint, id, ..] = parts else { return None };
    let id = u64::from_str_radix(id, 16).ok()?;
    Some(key((*namespace).into(), (*component).into(), (*endpoint).into(), id))
}

/// A card of an adapter. Where it does not tell the name, which requests have, the key's own spelling of it stands for it.
fn decode_adapter(slug: &str, json: &[u8]) -> Result<Adapter, Malformed> {
    #[derive(Deserialize)]
    struct Wire {
        display_name: Option<Arc<str>>,
        kv_cache_block_size: Option<Number>,
    }
    let Wire { display_name, kv_cache_block_size } = from_json(CARD, json)?;
    Ok(Adapter { name: display_name.unwrap_or_else(|| slug.into()), block_size: block_size(kv_cache_block_size)? })
}

fn decode_card(json: &[u8]) -> Result<Card, Malformed> {
    #[derive(Deserialize)]
    struct Wire {
        display_name: Arc<str>,
        kv_cache_block_size: Option<Number>,
        worker_type: Option<Value>,
        runtime_config: Option<Runtime>,
    }
    let wire: Wire = from_json(CARD, json)?;
    let (limits, ranks) = wire.runtime_config.unwrap_or_default().read()?;
    Ok(Card {
        model: wire.display_name,
        role: wire.worker_type.as_ref().and_then(Value::as_str).and_then(Role::parse),
        block_size: block_size(wire.kv_cache_block_size)?,
        limits,
        ranks,
    })
}

fn block_size(number: Option<Number>) -> Result<Option<u64>, Malformed> {
    Ok(optional_count("kv_cache_block_size", number)?.filter(|size| *size > 0))
}

/// What the engine can hold, in every release that says so.
#[derive(Deserialize, Default)]
struct Runtime {
    total_kv_blocks: Option<Number>,
    max_num_seqs: Option<Number>,
    max_num_batched_tokens: Option<Number>,
    data_parallel_start_rank: Option<Number>,
    data_parallel_size: Option<Number>,
}

impl Runtime {
    fn read(self) -> Result<(Limits, Ranks), Malformed> {
        let limits = Limits {
            blocks: optional_count("total_kv_blocks", self.total_kv_blocks)?,
            slots: optional_count("max_num_seqs", self.max_num_seqs)?,
            batch_tokens: optional_count("max_num_batched_tokens", self.max_num_batched_tokens)?,
        };
        let rank = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        let first = optional_count("data_parallel_start_rank", self.data_parallel_start_rank)?.map(rank);
        let count = optional_count("data_parallel_size", self.data_parallel_size)?.map_or(1, rank).max(1);
        Ok((limits, Ranks { first, count }))
    }
}

/// However large: what no engine can have costs itself, and not the card.
fn optional_count(field: &str, number: Option<Number>) -> Result<Option<u64>, Malformed> {
    number.map(|number| number.as_u64().ok_or_else(|| out_of_range(CARD, field, &number))).transpose()
}

/// Both layouts: `namespace` beside the topic (0.9 - 1.3), or a `scope` (1.4 - 1.6). `None` of a topic that is not heard,
/// whatever else the value says.
///
/// The path ends in the publisher's id. The value has it too, but Kubernetes keeps no number above 2^63 to the digit, and
/// up to 1.3 every other id is one.
fn channel(path: &str, value: &[u8]) -> Result<Option<EventChannel>, Malformed> {
    #[derive(Deserialize)]
    struct Wire {
        namespace: Option<String>,
        scope: Option<Value>,
        topic: String,
        instance_id: Number,
        transport: Carrier,
    }
    #[derive(Deserialize)]
    struct Carrier {
        kind: String,
        config: Option<Addresses>,
    }
    #[derive(Deserialize)]
    struct Addresses {
        endpoint: Option<String>,
        xpub_endpoints: Option<Vec<String>>,
    }
    let wire: Wire = from_json(CHANNEL, value)?;
    let addresses = wire.transport.config;
    let transport = if wire.transport.kind == BROKER {
        let xpub_endpoints = addresses.and_then(|addresses| addresses.xpub_endpoints).unwrap_or_default();
        if xpub_endpoints.is_empty() {
            return Err(wrong_shape(CHANNEL, "a broker without xpub_endpoints".to_owned()));
        }
        Transport::ZmqBroker { xpub_endpoints }
    } else if Topic::numbered(&wire.topic).is_none() {
        return Ok(None);
    } else {
        let endpoint = addresses.and_then(|addresses| addresses.endpoint).filter(|_| wire.transport.kind == DIRECT);
        endpoint.map_or(Transport::Other, |endpoint| Transport::Zmq { endpoint })
    };
    let (namespace, scope) = match (wire.namespace, wire.scope) {
        (_, Some(scope)) => place(scope)?,
        (Some(namespace), None) => (namespace, None),
        (None, None) => return Err(wrong_shape(CHANNEL, "no namespace".to_owned())),
    };
    let of_path = path.rsplit('/').next().and_then(|id| u64::from_str_radix(id, 16).ok());
    let publisher = of_path.or_else(|| wire.instance_id.as_u64());
    let publisher = publisher.ok_or_else(|| out_of_range(CHANNEL, "instance_id", &wire.instance_id))?;
    Ok(Some(EventChannel { publisher, topic: wire.topic, namespace, scope, transport }))
}

/// Names of the transports of [`Transport::Zmq`] and [`Transport::ZmqBroker`].
const DIRECT: &str = "Zmq";
const BROKER: &str = "ZmqBroker";

/// The namespace of a scope, and the endpoint where it is one's.
fn place(scope: Value) -> Result<(String, Option<Scope>), Malformed> {
    #[derive(Deserialize)]
    #[serde(tag = "kind", rename_all = "snake_case")]
    enum Wire {
        Namespace { name: String },
        Component { namespace: String },
        Endpoint { endpoint: Served },
    }
    #[derive(Deserialize)]
    struct Served {
        namespace: String,
        component: Arc<str>,
        name: Arc<str>,
    }
    let wire = serde_json::from_value(scope).map_err(|error| wrong_shape(CHANNEL, format!("scope: {error}")))?;
    Ok(match wire {
        Wire::Namespace { name: namespace } | Wire::Component { namespace } => (namespace, None),
        Wire::Endpoint { endpoint: Served { namespace, component, name: endpoint } } => {
            (namespace, Some(Scope { component, endpoint }))
        }
    })
}

/// The entry of an instance as 1.4 - 1.6 write it: key path and value.
#[must_use]
pub fn encode_instance(key: &WorkerKey) -> (String, String) {
    let WorkerKey { namespace, component, endpoint, id } = key;
    let value = json!({
        "type": "Endpoint", "component": component, "endpoint": endpoint, "namespace": namespace, "instance_id": id.0,
        "transport": { "tcp": format!("127.0.0.1:1/{id:x}/{namespace}/{component}/{endpoint}") },
    });
    (format!("v1/instances/{namespace}/{component}/{endpoint}/{id:x}"), value.to_string())
}

/// The entry of a model card, likewise.
#[must_use]
pub fn encode_card(key: &WorkerKey, card: &Card) -> (String, String) {
    let WorkerKey { namespace, component, endpoint, id } = key;
    let card = json!({
        "display_name": card.model, "kv_cache_block_size": card.block_size, "worker_type": card.role.map(Role::as_str),
        "runtime_config": {
            "total_kv_blocks": card.limits.blocks, "max_num_seqs": card.limits.slots,
            "max_num_batched_tokens": card.limits.batch_tokens,
            "data_parallel_start_rank": card.ranks.first, "data_parallel_size": card.ranks.count,
        },
    });
    let value = json!({
        "type": "Model", "namespace": namespace, "component": component, "endpoint": endpoint, "instance_id": id.0,
        "card_json": card,
    });
    (format!("v1/mdc/{namespace}/{component}/{endpoint}/{id:x}"), value.to_string())
}

/// The entry of a ZMQ publisher of events about an endpoint, likewise.
#[must_use]
pub fn encode_channel(key: &WorkerKey, topic: &str, publisher: u64, address: &str) -> (String, String) {
    let WorkerKey { namespace, component, endpoint, .. } = key;
    let value = json!({
        "type": "EventChannel",
        "scope": { "kind": "endpoint", "endpoint": { "namespace": namespace, "component": component, "name": endpoint } },
        "topic": topic, "instance_id": publisher, "transport": { "kind": "Zmq", "config": { "endpoint": address } },
    });
    let scope = format!("namespace/{namespace}/component/{component}/endpoint/{endpoint}");
    (format!("v1/event_channels/{scope}/topic/{topic}/{publisher:x}"), value.to_string())
}

fn wrong_shape(what: &'static str, detail: String) -> Malformed {
    Malformed { what, reason: Reason::WrongShape, detail }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(path: &str, value: &str) -> Registered {
        decode_registration(path, value.as_bytes()).unwrap().unwrap()
    }

    fn worker(id: u64) -> WorkerKey {
        key("dynamo".into(), "backend".into(), "generate".into(), id)
    }

    #[test]
    fn an_instance_is_named_by_its_value() {
        let value = r#"{"type":"Endpoint","component":"backend","endpoint":"generate","namespace":"dynamo","instance_id":31,"transport":{"tcp":"x"},"new":1}"#;
        assert_eq!(decode("v1/instances/dynamo/backend/generate/1f", value), Registered::Instance(worker(31)));
    }

    #[test]
    fn a_card_tells_the_limits_of_each_rank() {
        let card = r#"{"display_name":"tiny/model","kv_cache_block_size":16,"worker_type":"decode","runtime_config":{"total_kv_blocks":100,"max_num_seqs":null,"data_parallel_start_rank":2,"data_parallel_size":2}}"#;
        let expected = Card {
            model: "tiny/model".into(),
            role: Some(Role::Decode),
            block_size: Some(16),
            limits: Limits { blocks: Some(100), ..Limits::default() },
            ranks: Ranks { first: Some(2), count: 2 },
        };
        let wrapped = format!(
            r#"{{"type":"Model","namespace":"dynamo","component":"backend","endpoint":"generate","instance_id":31,"card_json":{card}}}"#
        );
        let path = "v1/mdc/dynamo/backend/generate/1f";
        assert_eq!(decode(path, &wrapped), Registered::Card(worker(31), Box::new(expected.clone())));
        assert_eq!(decode(path, card), Registered::Card(worker(31), Box::new(expected)), "0.6 does not wrap it");
    }

    #[test]
    fn the_lease_of_an_old_models_key_says_whose_it_is() {
        let value = r#"{"name":"m","endpoint":{"namespace":"dynamo","component":"backend","name":"generate"},"model_type":"Chat","runtime_config":{"total_kv_blocks":4096,"max_num_seqs":64}}"#;
        let card = |limits| {
            let (block_size, ranks) = (None, Ranks { first: None, count: 1 });
            Registered::Card(worker(31), Box::new(Card { model: "m".into(), role: None, block_size, limits, ranks }))
        };
        assert_eq!(
            decode("models/8afa2a5d/1f", value),
            card(Limits { blocks: Some(4096), slots: Some(64), batch_tokens: None })
        );
        let of_0_3 = value.replace("runtime_config", "else");
        assert_eq!(decode("models/m-1f/1f", &of_0_3), card(Limits::default()));
        for nobody in ["models/8afa2a5d/0", "models/8afa2a5d"] {
            assert_eq!(decode_registration(nobody, value.as_bytes()), Ok(None), "{nobody}");
        }
        assert_eq!(decode_registration("models/x/1f", b"{}").unwrap_err().reason, Reason::WrongShape);
    }

    #[test]
    fn a_lora_adapter_is_no_card_of_its_own() {
        let value = r#"{"type":"Model","namespace":"dynamo","component":"backend","endpoint":"generate","instance_id":31,"model_suffix":"my_adapter","card_json":{"display_name":"My/Adapter","kv_cache_block_size":64}}"#;
        let path = "v1/mdc/dynamo/backend/generate/1f/my_adapter";
        let adapter =
            |name: &str, block_size| Registered::Adapter(worker(31), Adapter { name: name.into(), block_size });
        assert_eq!(decode(path, value), adapter("My/Adapter", Some(64)));
        let says_nothing = value.replace(r#""display_name":"My/Adapter","kv_cache_block_size":64"#, "");
        assert_eq!(decode(path, &says_nothing), adapter("my_adapter", None));
    }

    #[test]
    fn channels_of_both_layouts_are_read() {
        let old = r#"{"type":"EventChannel","namespace":"dynamo","component":"","topic":"kv_metrics","instance_id":7,"transport":{"kind":"Zmq","config":{"endpoint":"tcp://192.0.2.2:1"}}}"#;
        let new = r#"{"type":"EventChannel","scope":{"kind":"endpoint","endpoint":{"namespace":"dynamo","component":"backend","name":"generate"}},"topic":"kv_metrics","instance_id":7,"transport":{"kind":"Zmq","config":{"endpoint":"tcp://192.0.2.2:1"}}}"#;
        let expected = |scope| EventChannel {
            publisher: 7,
            topic: "kv_metrics".to_owned(),
            namespace: "dynamo".to_owned(),
            scope,
            transport: Transport::Zmq { endpoint: "tcp://192.0.2.2:1".to_owned() },
        };
        let scope = Scope { component: "backend".into(), endpoint: "generate".into() };
        for (value, scope) in [(old, None), (new, Some(scope))] {
            assert_eq!(decode("v1/event_channels/x", value), Registered::Channel(Arc::new(expected(scope))));
        }
        // As an API server hands out 0xda3982aed0456594, and the highest of all.
        for (id, rounded) in
            [("da3982aed0456594", "15724743261270927000"), ("ffffffffffffffff", "18446744073709552000")]
        {
            let path = format!("v1/event_channels/dynamo//kv_metrics/{id}");
            let value = old.replace(r#""instance_id":7"#, &format!(r#""instance_id":{rounded}"#));
            let Registered::Channel(channel) = decode(&path, &value) else { panic!("a channel") };
            assert_eq!(format!("{:x}", channel.publisher), id);
        }
        let nats = old.replace("Zmq", "Nats").replace("endpoint", "subject_prefix");
        let Registered::Channel(channel) = decode("v1/event_channels/x", &nats) else { panic!("a channel") };
        assert_eq!(channel.transport, Transport::Other);
    }

    #[test]
    fn a_channel_belongs_to_a_namespace_a_component_or_an_endpoint() {
        let channel = |scope: &str, topic: &str| {
            let value = format!(
                r#"{{"type":"EventChannel","scope":{scope},"topic":"{topic}","instance_id":7,"transport":{{"kind":"Zmq","config":{{"endpoint":"tcp://192.0.2.2:1"}}}}}}"#
            );
            decode_registration("v1/event_channels/x/7", value.as_bytes()).unwrap()
        };
        for scope in [
            r#"{"kind":"namespace","name":"dynamo"}"#,
            r#"{"kind":"component","namespace":"dynamo","component":"backend"}"#,
        ] {
            let Some(Registered::Channel(found)) = channel(scope, "kv_metrics") else { panic!("a channel") };
            assert_eq!((&*found.namespace, &found.scope), ("dynamo", &None), "{scope}");
            assert_eq!(channel(scope, "of_another_kind"), None);
        }
        assert_eq!(channel(r#"{"kind":"cell","cell":1}"#, "of_another_kind"), None, "not ours, whatever its scope");
    }

    #[test]
    fn a_broker_tells_where_it_hands_out_the_events_of_its_namespace() {
        let transport = r#""transport":{"kind":"ZmqBroker","config":{"xsub_endpoints":["tcp://192.0.2.2:1"],"xpub_endpoints":["tcp://192.0.2.2:2","tcp://192.0.2.2:3"]}}"#;
        let old = r#""namespace":"dynamo","component":"zmq_broker""#;
        let new = r#""scope":{"kind":"component","namespace":"dynamo","component":"zmq_broker"}"#;
        for place in [old, new] {
            let value = format!(r#"{{"type":"EventChannel",{place},"topic":"any","instance_id":9,{transport}}}"#);
            let Registered::Channel(broker) = decode("v1/event_channels/x/9", &value) else { panic!("a channel") };
            let xpub_endpoints = ["tcp://192.0.2.2:2", "tcp://192.0.2.2:3"].map(str::to_owned).into();
            assert_eq!((&*broker.namespace, broker.publisher), ("dynamo", 9));
            assert_eq!(broker.transport, Transport::ZmqBroker { xpub_endpoints });
        }
    }

    fn any_card() -> impl Strategy<Value = Card> {
        let role =
            prop_oneof![Just(None), Just(Some(Role::Aggregated)), Just(Some(Role::Prefill)), Just(Some(Role::Decode)),];
        let count = || proptest::option::of(1..=u64::MAX);
        let counts = (count(), count(), count(), count());
        (any::<String>(), role, counts, any::<Option<u32>>(), 1..=u32::MAX).prop_map(
            |(model, role, (block_size, blocks, slots, batch_tokens), first, count)| Card {
                model: model.into(),
                role,
                block_size,
                limits: Limits { blocks, slots, batch_tokens },
                ranks: Ranks { first, count },
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_alike(id: u64, card in any_card(), publisher: u64, port: u16) {
            let (path, value) = encode_instance(&worker(id));
            prop_assert_eq!(decode(&path, &value), Registered::Instance(worker(id)));
            let (path, value) = encode_card(&worker(id), &card);
            prop_assert_eq!(decode(&path, &value), Registered::Card(worker(id), Box::new(card)));
            let endpoint = format!("tcp://127.0.0.1:{port}");
            let (path, value) = encode_channel(&worker(id), "kv_metrics", publisher, &endpoint);
            let (topic, namespace) = ("kv_metrics".to_owned(), "dynamo".to_owned());
            let scope = Some(Scope { component: "backend".into(), endpoint: "generate".into() });
            let transport = Transport::Zmq { endpoint };
            let channel = EventChannel { publisher, topic, namespace, scope, transport };
            prop_assert_eq!(decode(&path, &value), Registered::Channel(Arc::new(channel)));
        }
    }

    #[test]
    fn other_keys_say_nothing_and_bad_values_are_refused() {
        assert_eq!(decode_registration("v1/event_sources/x", b"?"), Ok(None));
        for (path, value, reason) in [
            ("v1/instances/x", "{", Reason::Truncated),
            ("v1/instances/x", "?", Reason::Malformed),
            (
                "v1/instances/x",
                r#"{"namespace":"a","component":"b","endpoint":"c","instance_id":-1}"#,
                Reason::WrongShape,
            ),
            ("v1/mdc/dynamo/backend", r#"{"display_name":"m"}"#, Reason::WrongShape),
            ("v1/mdc/a/b/c/zz", r#"{"display_name":"m"}"#, Reason::WrongShape),
            ("v1/mdc/a/b/c/1f", r#"{"display_name":"m","kv_cache_block_size":-1}"#, Reason::OutOfRange),
            (
                "v1/event_channels/x",
                r#"{"topic":"kv_metrics","instance_id":1,"transport":{"kind":"Zmq"}}"#,
                Reason::WrongShape,
            ),
            (
                "v1/event_channels/x",
                r#"{"topic":"kv_metrics","scope":{"kind":"cell"},"instance_id":1,"transport":{"kind":"Zmq"}}"#,
                Reason::WrongShape,
            ),
            (
                "v1/event_channels/x",
                r#"{"topic":"t","namespace":"n","instance_id":1,"transport":{"kind":"ZmqBroker","config":{"xpub_endpoints":[]}}}"#,
                Reason::WrongShape,
            ),
        ] {
            let refused = decode_registration(path, value.as_bytes()).unwrap_err();
            assert_eq!(refused.reason, reason, "{path} {value}");
        }
    }
}
