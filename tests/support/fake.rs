//! A NATS micro service that says what a test wants, well formed or not.

use std::sync::{Arc, Mutex};

use async_nats::Client;
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::task::JoinHandle;

/// Answers every `$SRV` request until it is dropped.
pub struct FakeService {
    stats: Arc<Mutex<Vec<Bytes>>>,
    task: JoinHandle<()>,
}

impl FakeService {
    /// A service of `dynamo`/`backend` in the plain form, with that instance id and those endpoints.
    pub async fn start(client: &Client, instance: &str, endpoints: &[String]) -> Self {
        let stats = reply("dynamo_backend", instance, endpoints);
        Self::saying(client, "dynamo_backend", instance, Some("Dynamo component backend in namespace dynamo"), &[stats])
            .await
    }

    /// Answers each STATS request with all of `stats`, one after the other, and INFO only with a description.
    pub async fn saying(
        client: &Client,
        service: &str,
        instance: &str,
        description: Option<&str>,
        stats: &[String],
    ) -> Self {
        let mut asked = client.subscribe("$SRV.>").await.unwrap();
        client.flush().await.unwrap();
        let stats = Arc::new(Mutex::new(stats.iter().map(|stats| Bytes::from(stats.clone())).collect::<Vec<_>>()));
        let info_subject = format!("$SRV.INFO.{service}.{instance}");
        let info = description.map(|description| {
            serde_json::json!({ "name": service, "id": instance, "description": description, "version": "0.0.1" })
                .to_string()
        });
        let (client, said) = (client.clone(), Arc::clone(&stats));
        let task = tokio::spawn(async move {
            while let Some(message) = asked.next().await {
                let Some(reply_to) = message.reply else { continue };
                let replies = match &*message.subject {
                    "$SRV.STATS" => said.lock().unwrap().clone(),
                    subject if subject == info_subject => info.iter().map(|info| Bytes::from(info.clone())).collect(),
                    _ => Vec::new(),
                };
                for reply in replies {
                    client.publish(reply_to.clone(), reply).await.unwrap();
                }
            }
        });
        Self { stats, task }
    }

    /// Says something else from now on.
    pub fn say(&self, stats: &[String]) {
        *self.stats.lock().unwrap() = stats.iter().map(|stats| Bytes::from(stats.clone())).collect();
    }
}

impl Drop for FakeService {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A STATS reply.
pub fn reply(service: &str, instance: &str, endpoints: &[String]) -> String {
    format!(
        r#"{{"type":"io.nats.micro.v1.stats_response","name":"{service}","id":"{instance}","version":"0.0.1","started":"2026-01-01T00:00:00Z","endpoints":[{}]}}"#,
        endpoints.join(",")
    )
}

/// An endpoint in a STATS reply, under its whole subject.
pub fn endpoint(subject: &str, data: &str) -> String {
    format!(r#"{{"name":"e","subject":"{subject}","num_requests":0,"num_errors":0,"data":{data}}}"#)
}
