//! Events of today's Dynamo on NATS, well formed or not, as a test wants them.

use async_nats::Client;
use dynamo_metrics::wire::{Envelope, encode_envelope};
use serde_json::{Value, json};

pub const PASSES: &str = "forward-pass-metrics";
pub const SEQUENCES: &str = "active_sequences_events";

/// Publishes on one topic of `dynamo.backend.generate`, and numbers what it publishes.
pub struct Publisher {
    client: Client,
    id: u64,
    topic: &'static str,
    /// Of the next one.
    pub sequence: u64,
}

impl Publisher {
    pub fn new(client: &Client, id: u64, topic: &'static str) -> Self {
        Self { client: client.clone(), id, topic, sequence: 0 }
    }

    pub async fn publish(&mut self, event: &Value) {
        self.publish_bytes(&packed(event)).await;
    }

    /// Publishes a payload as it is.
    pub async fn publish_bytes(&mut self, payload: &[u8]) {
        let Self { id: publisher, topic, sequence, .. } = *self;
        self.publish_raw(encode_envelope(&Envelope { publisher, sequence, published_at: 0, topic, payload })).await;
        self.sequence += 1;
    }

    /// Publishes what is no envelope.
    pub async fn publish_raw(&self, message: Vec<u8>) {
        let subject = format!("namespace.dynamo.component.backend.endpoint.generate.{}", self.topic);
        self.client.publish(subject, message.into()).await.unwrap();
        self.client.flush().await.unwrap();
    }
}

/// A forward pass of rank 0 that computes a prompt of so many tokens, beside the decoding of three requests.
pub fn pass(worker: u64, counter: u64, prefill_tokens: u64) -> Value {
    let scheduled = json!({
        "num_prefill_requests": 1, "sum_prefill_tokens": prefill_tokens, "var_prefill_length": 0.0,
        "sum_prefill_kv_tokens": 0, "num_decode_requests": 3, "sum_decode_kv_tokens": 300, "var_decode_kv_tokens": 0.0,
    });
    let queued = json!({
        "num_prefill_requests": 0, "sum_prefill_tokens": 0, "var_prefill_length": 0.0, "num_decode_requests": 0,
        "sum_decode_kv_tokens": 0, "var_decode_kv_tokens": 0.0,
    });
    json!({
        "version": 1, "worker_id": worker.to_string(), "dp_rank": 0, "counter_id": counter, "wall_time": 0.5,
        "scheduled_requests": scheduled, "queued_requests": queued,
    })
}

/// A router's word of a request on rank 0 of a worker.
pub fn step(router: u64, request: &str, worker: u64, data: &Value) -> Value {
    let worker = json!({ "worker_id": worker, "dp_rank": 0 });
    let event = json!({
        "request_id": request, "worker": worker, "data": data, "router_id": router, "lora_name": null,
    });
    json!({ "events": [event] })
}

/// That it was placed: a prompt with those hashes of full blocks, and so many tokens to be computed.
pub fn add_request(hashes: &Value, effective: &Value) -> Value {
    let hint = json!({ "initial_effective_prefill_tokens": effective });
    json!({ "AddRequest": {
        "token_sequence": hashes, "track_prefill_tokens": true, "expected_output_tokens": null, "prefill_load_hint": hint,
    } })
}

/// As `MessagePack`.
pub fn packed(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    pack(value, &mut bytes);
    bytes
}

fn pack(value: &Value, into: &mut Vec<u8>) {
    let length = |length: usize| u32::try_from(length).unwrap().to_be_bytes();
    match value {
        Value::Null => into.push(0xc0),
        Value::Bool(value) => into.push(if *value { 0xc3 } else { 0xc2 }),
        Value::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(number), _) => into.extend([&[0xcf][..], &number.to_be_bytes()].concat()),
            (None, Some(number)) => into.extend([&[0xd3][..], &number.to_be_bytes()].concat()),
            (None, None) => into.extend([&[0xcb][..], &number.as_f64().unwrap().to_be_bytes()].concat()),
        },
        Value::String(text) => into.extend([&[0xdb][..], &length(text.len()), text.as_bytes()].concat()),
        Value::Array(items) => {
            into.extend([&[0xdd][..], &length(items.len())].concat());
            for item in items {
                pack(item, into);
            }
        }
        Value::Object(fields) => {
            into.extend([&[0xdf][..], &length(fields.len())].concat());
            for (name, field) in fields {
                pack(&Value::String(name.clone()), into);
                pack(field, into);
            }
        }
    }
}
