//! What a NATS server does not let the bridge do is said, and shown.

use futures_util::future::join_all;

use crate::support::{Bridge, FakeService, Nats, documents, endpoint, eventually, worker};

const LOAD: &str = r#"{"kv_active_blocks":77}"#;
const TOPICS: [&str; 3] = ["kv_metrics", "forward-pass-metrics", "active_sequences_events"];

/// Subjects to publish to, and to subscribe to.
#[derive(Debug, Clone)]
struct Permissions {
    publish: Vec<String>,
    subscribe: Vec<String>,
}

impl Permissions {
    /// Those that the documents say are needed.
    fn documented() -> Self {
        let document = documents::read("docs/operating.md");
        let (_, said) = document.split_once("**NATS permissions:**").unwrap();
        let (publish, subscribe) = said.split_once("\n- ").unwrap().0.split_once("subscribes to").unwrap();
        let subscribe = subjects(subscribe).into_iter().flat_map(|subject| match subject.strip_suffix("TOPIC") {
            Some(scope) => TOPICS.map(|topic| format!("{scope}{topic}")).to_vec(),
            None => vec![subject],
        });
        Self { publish: subjects(publish), subscribe: subscribe.collect() }
    }

    /// All but one, for each of them: what the bridge may not do then, and the rest.
    fn without_one(&self) -> Vec<(String, Self)> {
        let without = |all: &[String], index| [&all[..index], &all[index + 1..]].concat();
        let publish = self.publish.iter().enumerate().map(|(index, subject)| {
            let publish = without(&self.publish, index);
            (format!("publish to {subject}"), Self { publish, ..self.clone() })
        });
        let subscribe = self.subscribe.iter().enumerate().map(|(index, subject)| {
            let subscribe = without(&self.subscribe, index);
            (format!("subscribe to {subject}"), Self { subscribe, ..self.clone() })
        });
        publish.chain(subscribe).collect()
    }

    fn user(&self, name: &str) -> String {
        let Self { publish, subscribe } = self;
        format!(
            "{{ user: {name}, password: p, permissions: {{ publish: {{ allow: {publish:?} }}, subscribe: {{ allow: {subscribe:?} }} }} }}"
        )
    }
}

fn subjects(text: &str) -> Vec<String> {
    let quoted = text.split('`').skip(1).step_by(2).filter(|quoted| quoted.contains('.'));
    quoted.map(str::to_owned).collect()
}

fn configuration(users: &[String]) -> String {
    format!("authorization {{ users = [ {{ user: admin, password: a }}, {} ] }}", users.join(", "))
}

async fn bridge_of(nats: &Nats, user: &str, options: &[&str]) -> Bridge {
    Bridge::watching(&nats.url_of(&format!("{user}:p")), options, &[]).await
}

/// The answer of `/readyz`, once it is as expected.
async fn says(bridge: &Bridge, what: &str, expected: impl Fn(&str) -> bool) {
    eventually(&format!("/readyz says {what}"), || async {
        let text = reqwest::get(format!("{}/readyz", bridge.url)).await.unwrap().text().await.unwrap();
        if expected(&text) { Ok(()) } else { Err(format!("{text}\n{}", bridge.program.lines().join("\n"))) }
    })
    .await;
}

async fn is_ready(bridge: &Bridge) {
    says(bridge, "that it is", |text| text.trim() == "ok").await;
}

fn complaints(bridge: &Bridge, action: &str) -> usize {
    let complaint = format!("No NATS permission to {action}: ");
    bridge.program.lines().iter().filter(|line| line.contains(&complaint)).count()
}

#[tokio::test]
async fn the_permissions_that_the_readme_names_are_enough_and_each_is_missed_by_name() {
    let needed = Permissions::documented();
    let reduced = needed.without_one();
    assert_eq!(reduced.len(), 13, "{reduced:?}");
    let users = reduced.iter().enumerate().map(|(index, (_, rest))| rest.user(&format!("u{index}")));
    let users: Vec<_> = users.chain([needed.user("whole")]).collect();
    let nats = Nats::configured(&configuration(&users)).await;
    let client = async_nats::ConnectOptions::with_user_and_password("admin".into(), "a".into());
    let client = client.connect(nats.url()).await.unwrap();
    let _service = FakeService::start(&client, "one", &[endpoint("dynamo_backend.generate-1f", LOAD)]).await;

    let whole = bridge_of(&nats, "whole", &[]).await;
    whole.shows("llm_kv_blocks_active", &worker("31"), 77.0).await;
    is_ready(&whole).await;
    for scope in ["", ".component.backend", ".component.backend.endpoint.generate"] {
        for topic in TOPICS {
            client.publish(format!("namespace.dynamo{scope}.{topic}"), "?".into()).await.unwrap();
        }
    }
    client.publish("namespace.dynamo.kv-hit-rate", "?".into()).await.unwrap();
    for (topic, heard) in [("kv-hit-rate", 1.0)].into_iter().chain(TOPICS.map(|topic| (topic, 3.0))) {
        whole
            .eventually(topic, |metrics| {
                let rejected = metrics.values("dynamo_bridge_messages_rejected_total", &[("topic", topic)]);
                (rejected.into_iter().reduce(|sum, more| sum + more) == Some(heard)).then_some(())
            })
            .await;
    }
    let log = whole.program.lines();
    assert!(!log.iter().any(|line| line.contains("permission")), "{log:?}");

    join_all(reduced.iter().enumerate().map(async |(index, (action, _))| {
        let bridge = bridge_of(&nats, &format!("u{index}"), &[]).await;
        let line = format!("nats: no permission to {action}");
        says(&bridge, &line, |text| text.lines().any(|said| said == line)).await;
        // What goes without it goes on.
        let unasked = action.ends_with("$SRV.STATS") || action.ends_with("_INBOX.>");
        bridge.shows("dynamo_bridge_scrape_success", &[], if unasked { 0.0 } else { 1.0 }).await;
        bridge.shows("dynamo_bridge_source_connected", &[("source", "nats")], 1.0).await;
        assert_eq!(complaints(&bridge, action), 1, "{action}");
    }))
    .await;
}

#[tokio::test]
async fn permissions_that_are_granted_later_are_used_and_those_that_are_revoked_are_missed() {
    let needed = Permissions::documented();
    let nothing = Permissions { publish: vec!["nothing".to_owned()], subscribe: vec!["nothing".to_owned()] };
    let mut nats = Nats::configured(&configuration(&[nothing.user("bridge")])).await;
    let client = async_nats::ConnectOptions::with_user_and_password("admin".into(), "a".into());
    let client = client.connect(nats.url()).await.unwrap();
    let _service = FakeService::start(&client, "one", &[endpoint("dynamo_backend.generate-1f", LOAD)]).await;
    let target = ["--component", "backend", "--endpoint", "generate"];
    let bridge = bridge_of(&nats, "bridge", &target).await;
    for denied in ["publish to $SRV.STATS", "subscribe to _INBOX.>", "subscribe to namespace.*.kv-hit-rate"] {
        says(&bridge, denied, |text| text.contains(denied)).await;
    }
    bridge.shows("dynamo_bridge_scrape_success", &[], 0.0).await;

    nats.reconfigure(&configuration(&[needed.user("bridge")])).await;
    is_ready(&bridge).await;
    bridge.shows("llm_kv_blocks_active", &worker("31"), 77.0).await;
    let event = r#"{"worker_id":31,"isl_blocks":40,"overlap_blocks":8}"#;
    client.publish("namespace.dynamo.kv-hit-rate", event.into()).await.unwrap();
    bridge.shows("llm_kv_hit_rate_isl_blocks", &worker("31"), 40.0).await;

    nats.reconfigure(&configuration(&[nothing.user("bridge")])).await;
    for denied in ["publish to $SRV.STATS", "subscribe to namespace.*.kv-hit-rate"] {
        says(&bridge, denied, |text| text.contains(denied)).await;
    }
    bridge.shows("dynamo_bridge_scrape_success", &[], 0.0).await;
    let lost = |bridge: &Bridge| bridge.program.lines().iter().filter(|line| line.contains("was lost")).count();
    assert_eq!(lost(&bridge), 0, "the server let the connection be");

    // A new connection is judged anew.
    nats.kill().await;
    nats.configure(&configuration(&[needed.user("bridge")]));
    nats.restart().await;
    is_ready(&bridge).await;
    bridge.shows("llm_kv_blocks_active", &worker("31"), 77.0).await;
}
