//! Workers that register in etcd, and an etcd that fails.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::support::registered::{card, instance};
use crate::support::{Authority, Bridge, Etcd, Gate, Port, lines_allowed, refusal, worker};

const SILENT: [(&str, &str); 3] = [("component", "backend"), ("endpoint", "generate"), ("state", "silent")];

impl Bridge {
    async fn hearing(etcd: &Etcd, options: &[&str]) -> Self {
        Self::finding(&[&["--etcd-endpoints", &etcd.url()], options].concat(), &[("DYN_LOG", "debug,h2=info")]).await
    }

    async fn through(gate: &Gate) -> Self {
        Self::finding(&["--etcd-endpoints", gate.address()], &[]).await
    }

    async fn shows_workers(&self, workers: f64) {
        self.shows("llm_workers", &SILENT, workers).await;
    }

    async fn is_connected(&self, connected: bool) {
        self.shows("dynamo_bridge_source_connected", &[("source", "etcd")], f64::from(u8::from(connected))).await;
    }

    async fn reconnects(&self) -> Option<f64> {
        self.metrics().await.value("dynamo_bridge_source_reconnects_total", &[("source", "etcd")])
    }
}

impl Etcd {
    /// An instance and its card.
    async fn register(&self, id: u64) {
        let [(key, value), (card_key, card)] = [instance(id), card(id, 4096, 64)];
        self.put(&key, &value).await;
        self.put(&card_key, &card).await;
    }

    async fn deregister(&self, id: u64) {
        self.delete(&instance(id).0).await;
        self.delete(&card(id, 0, 0).0).await;
    }
}

#[tokio::test]
async fn a_worker_is_there_while_its_key_is() {
    let etcd = Etcd::start().await;
    etcd.register(1).await;
    let bridge = Bridge::hearing(&etcd, &[]).await;
    bridge.shows("llm_kv_blocks_total", &worker("1"), 4096.0).await;
    etcd.register(2).await;
    bridge.shows("llm_requests_total_slots", &worker("2"), 64.0).await;
    bridge.shows_workers(2.0).await;
    let (key, changed) = card(2, 8192, 64);
    etcd.put(&key, &changed).await;
    bridge.shows("llm_kv_blocks_total", &worker("2"), 8192.0).await;
    etcd.deregister(1).await;
    bridge.loses("llm_kv_blocks_total", &worker("1")).await;
    bridge.shows_workers(1.0).await;
    etcd.deregister(2).await;
    bridge.shows_workers(0.0).await;
}

#[tokio::test]
async fn a_lease_takes_all_keys_of_its_worker_along() {
    let etcd = Etcd::start().await;
    let bridge = Bridge::hearing(&etcd, &[]).await;
    let granted = etcd.control(&["lease", "grant", "600"]).await;
    let lease = granted.split_whitespace().nth(1).unwrap();
    for (key, value) in [instance(1), card(1, 4096, 64)] {
        etcd.control(&["put", "--lease", lease, "--", &key, &value]).await;
    }
    bridge.shows("llm_kv_blocks_total", &worker("1"), 4096.0).await;
    etcd.control(&["lease", "revoke", lease]).await;
    bridge.loses("llm_kv_blocks_total", &worker("1")).await;
    bridge.shows_workers(0.0).await;
}

#[tokio::test]
async fn more_workers_than_a_page_holds_are_all_found() {
    let etcd = Etcd::start().await;
    let entries: BTreeMap<_, _> = (1..=1500).flat_map(|id| [instance(id), card(id, 4096, 64)]).collect();
    etcd.put_all(&entries).await;
    let bridge = Bridge::hearing(&etcd, &[]).await;
    bridge.shows_workers(1500.0).await;
}

/// One list for each of the five kinds of keys, then the watch.
const WATCH: usize = 6;

#[tokio::test]
async fn what_happens_between_the_list_and_the_watch_is_not_missed() {
    let etcd = Etcd::start().await;
    etcd.register(1).await;
    let gate = Gate::before(&etcd.address(), WATCH).await;
    let bridge = Bridge::through(&gate).await;
    gate.reached().await;
    etcd.deregister(1).await;
    etcd.register(2).await;
    gate.release();
    bridge.shows("llm_kv_blocks_total", &worker("2"), 4096.0).await;
    bridge.shows_workers(1.0).await;
    assert_eq!(bridge.reconnects().await, Some(0.0));
}

#[tokio::test]
async fn what_was_compacted_before_the_watch_began_is_listed_anew() {
    let etcd = Etcd::start().await;
    etcd.register(1).await;
    let gate = Gate::before(&etcd.address(), WATCH).await;
    let mut bridge = Bridge::through(&gate).await;
    gate.reached().await;
    etcd.deregister(1).await;
    etcd.register(2).await;
    etcd.compact().await;
    gate.release();
    bridge.program.says("have been compacted").await;
    bridge.shows("llm_kv_blocks_total", &worker("2"), 4096.0).await;
    bridge.shows_workers(1.0).await;
}

#[tokio::test]
async fn what_was_compacted_between_two_pages_is_listed_anew() {
    let etcd = Etcd::start().await;
    etcd.put_all(&(1..=1500).map(instance).collect()).await;
    let gate = Gate::before(&etcd.address(), 2).await;
    let target = ["--component", "backend", "--endpoint", "generate"];
    let mut bridge = Bridge::finding(&[&["--etcd-endpoints", gate.address()], &target[..]].concat(), &[]).await;
    gate.reached().await;
    let (key, value) = instance(2000);
    etcd.put(&key, &value).await;
    etcd.compact().await;
    gate.release();
    bridge.program.says("has been compacted").await;
    bridge.shows_workers(1501.0).await;
}

#[tokio::test]
async fn garbage_is_counted_and_costs_nobody_else() {
    let etcd = Etcd::start().await;
    let too_large = " ".repeat(256 * 1024 + 1);
    let cases = [
        ("v1/instances/dynamo/backend/generate/a", "{", "truncated"),
        ("v1/mdc/dynamo/backend/generate/a", "\"text\"", "wrong_shape"),
        ("v1/event_channels/\u{fffd}", "no JSON", "malformed"),
        ("v1/mdc/dynamo/backend/generate/b", &too_large, "too_large"),
    ];
    let bridge = Bridge::hearing(&etcd, &[]).await;
    let rejected = |reason| [("source", "etcd"), ("topic", "discovery"), ("reason", reason)];
    bridge.is_connected(true).await;
    for (key, value, reason) in cases {
        bridge.shows("dynamo_bridge_messages_rejected_total", &rejected(reason), 0.0).await;
        // Its arguments would be too long for etcdctl.
        etcd.put_all(&BTreeMap::from([(key.to_owned(), value.to_owned())])).await;
        bridge.shows("dynamo_bridge_messages_rejected_total", &rejected(reason), 1.0).await;
    }
    etcd.register(1).await;
    bridge.shows_workers(1.0).await;
    assert_eq!(bridge.reconnects().await, Some(0.0));
}

#[tokio::test]
async fn etcd_may_be_killed_and_come_back() {
    let mut etcd = Etcd::start().await;
    etcd.register(1).await;
    let bridge = Bridge::hearing(&etcd, &[]).await;
    bridge.shows_workers(1.0).await;
    etcd.kill().await;
    bridge.is_connected(false).await;
    bridge.shows_workers(1.0).await;
    etcd.resume().await;
    bridge.is_connected(true).await;
    assert_eq!(bridge.reconnects().await, Some(1.0));
    bridge.shows_workers(1.0).await;
    etcd.register(2).await;
    bridge.shows_workers(2.0).await;
}

#[tokio::test]
async fn an_etcd_that_comes_and_goes_takes_a_few_lines() {
    const TURNS: u64 = 6;
    let start = Instant::now();
    let mut etcd = Etcd::start().await;
    let bridge = Bridge::hearing(&etcd, &[]).await;
    bridge.is_connected(true).await;
    for _ in 0..TURNS {
        etcd.kill().await;
        bridge.is_connected(false).await;
        etcd.resume().await;
        bridge.is_connected(true).await;
    }
    assert_eq!(bridge.reconnects().await, Some(f64::from(u32::try_from(TURNS).unwrap())));
    for line in ["Connected to etcd", "was lost"] {
        let count = bridge.program.count(line);
        assert!((1..=lines_allowed(start)).contains(&count), "{line}: {count}");
    }
}

#[tokio::test]
async fn a_flood_of_bad_keys_takes_a_few_lines() {
    const BATCHES: u32 = 10;
    const KEYS: u32 = 2000;
    let start = Instant::now();
    let etcd = Etcd::start().await;
    etcd.register(1).await;
    let bridge = Bridge::finding(&["--etcd-endpoints", &etcd.url()], &[]).await;
    bridge.shows_workers(1.0).await;
    let long = "y".repeat(5000);
    for batch in 0..BATCHES {
        let entry = |key: u32| match key % 3 {
            0 => (format!("v1/instances/{batch}/{key}"), "{".to_owned()),
            1 => (format!("v1/mdc/{batch}/{key}"), "{".to_owned()),
            _ => (format!("v1/event_channels/{batch}/{key}"), "?".to_owned()),
        };
        let bad = (0..KEYS).map(entry).chain([(format!("v1/mdc/{long}/{batch}"), format!("\"{long}\""))]);
        etcd.put_all(&bad.collect()).await;
    }
    let all = f64::from(BATCHES * (KEYS + 1));
    bridge
        .eventually("all are rejected", |metrics| {
            let rejected = metrics.values("dynamo_bridge_messages_rejected_total", &[("source", "etcd")]);
            (rejected.iter().sum::<f64>() >= all).then_some(())
        })
        .await;
    bridge.shows_workers(1.0).await;
    let rejections = bridge.program.count("Rejected");
    assert!((1..=3 * lines_allowed(start)).contains(&rejections), "{rejections}");
    let longest = bridge.program.lines().iter().map(String::len).max();
    assert!(longest.is_some_and(|length| length < 2000), "{longest:?}");
}

#[tokio::test]
async fn what_changed_and_was_compacted_while_nobody_watched_is_seen_afterwards() {
    let mut etcd = Etcd::start().await;
    etcd.register(1).await;
    etcd.register(2).await;
    let bridge = Bridge::hearing(&etcd, &[]).await;
    bridge.shows_workers(2.0).await;
    etcd.kill().await;
    bridge.is_connected(false).await;
    etcd.resume_unreachable().await;
    etcd.deregister(1).await;
    etcd.register(3).await;
    etcd.register(4).await;
    etcd.compact().await;
    etcd.kill().await;
    etcd.resume().await;
    bridge.is_connected(true).await;
    bridge.shows_workers(3.0).await;
    bridge.loses("llm_kv_blocks_total", &worker("1")).await;
}

#[tokio::test]
async fn a_mute_server_is_noticed_and_heard_again() {
    let etcd = Etcd::start().await;
    let bridge = Bridge::hearing(&etcd, &[]).await;
    bridge.is_connected(true).await;
    etcd.program().signal("-STOP").await;
    bridge.is_connected(false).await;
    etcd.program().signal("-CONT").await;
    bridge.is_connected(true).await;
    etcd.register(1).await;
    bridge.shows_workers(1.0).await;
}

#[tokio::test]
async fn the_next_server_takes_over() {
    let (dead, mut first, second) = (Port::reserve(), Etcd::start().await, Etcd::start().await);
    first.register(1).await;
    second.register(2).await;
    let endpoints = [dead.address(), first.url(), second.url()].join(",");
    let bridge = Bridge::finding(&["--etcd-endpoints", &endpoints], &[]).await;
    bridge.shows("llm_kv_blocks_total", &worker("1"), 4096.0).await;
    first.kill().await;
    bridge.shows("llm_kv_blocks_total", &worker("2"), 4096.0).await;
    bridge.loses("llm_kv_blocks_total", &worker("1")).await;
}

#[tokio::test]
async fn a_member_without_its_cluster_is_not_believed() {
    let [one, mut other] = Etcd::pair().await;
    one.register(1).await;
    let bridge = Bridge::hearing(&one, &[]).await;
    bridge.shows_workers(1.0).await;
    other.kill().await;
    bridge.is_connected(false).await;
    other.resume().await;
    bridge.is_connected(true).await;
    other.register(2).await;
    bridge.shows_workers(2.0).await;
}

#[tokio::test]
async fn a_user_who_may_read_the_registrations_is_enough() {
    // Tokens that expire between two looks of the bridge.
    let etcd = Etcd::with_options(&["--auth-token-ttl", "1"]).await;
    for arguments in [
        "user add root:secret",
        "user grant-role root root",
        "role add reader",
        "role grant-permission reader --prefix=true read v1/",
        "user add dynamo:secret",
        "user grant-role dynamo reader",
        "auth enable",
    ] {
        etcd.control(&arguments.split(' ').collect::<Vec<_>>()).await;
    }
    let endpoints = ["--etcd-endpoints", &etcd.url()];
    let asking = |user, password| [&endpoints[..], &["--etcd-username", user, "--etcd-password", password]].concat();
    let nobody = refusal(&endpoints, &[]).await;
    assert!(nobody.contains("user name is empty") && nobody.contains("--etcd-username"), "{nobody}");
    let wrong = refusal(&asking("dynamo", "geheim"), &[]).await;
    assert!(wrong.contains("authentication failed") && wrong.contains("[ETCD_AUTH_PASSWORD]"), "{wrong}");
    assert!(!wrong.contains("geheim"));

    let environment = [("DYN_LOG", "debug,h2=info")];
    let mut bridge = Bridge::finding(&asking("dynamo", "secret"), &environment).await;
    bridge.is_connected(true).await;
    bridge.program.says("token is no longer good").await;
    let (key, value) = instance(1);
    etcd.control(&["--user", "root:secret", "put", "--", &key, &value]).await;
    let (key, value) = card(1, 4096, 64);
    etcd.control(&["--user", "root:secret", "put", "--", &key, &value]).await;
    bridge.shows_workers(1.0).await;
    assert_eq!(bridge.reconnects().await, Some(0.0));
}

#[tokio::test]
async fn a_user_who_may_not_is_refused() {
    let etcd = Etcd::start().await;
    for arguments in ["user add root:secret", "user grant-role root root", "user add dynamo:secret", "auth enable"] {
        etcd.control(&arguments.split(' ').collect::<Vec<_>>()).await;
    }
    let user = ["--etcd-username", "dynamo", "--etcd-password", "secret"];
    let refused = refusal(&[&["--etcd-endpoints", &etcd.url()], &user[..]].concat(), &[]).await;
    assert!(refused.contains("permission denied") && refused.contains("may read the keys below v1/"), "{refused}");
}

#[tokio::test]
async fn a_user_is_no_harm_where_nobody_is_asked_for_one() {
    let etcd = Etcd::start().await;
    etcd.register(1).await;
    let bridge = Bridge::hearing(&etcd, &["--etcd-username", "dynamo", "--etcd-password", "secret"]).await;
    bridge.shows_workers(1.0).await;
}

#[tokio::test]
async fn certificates_are_shown_and_checked() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (server, (certificate, key)) = (authority.server(), authority.client());
    let etcd = Etcd::secured(&authority.certificate(), (&server.0, &server.1)).await;
    etcd.register(1).await;
    let shown = ["--etcd-client-cert", &certificate, "--etcd-client-key", &key];
    let trusting = authority.certificate();
    let bridge = Bridge::hearing(&etcd, &[&["--etcd-ca", &trusting], &shown[..]].concat()).await;
    bridge.shows_workers(1.0).await;

    // At once: with a timeout of a day the test would not end.
    let (distrusting, url) = (stranger.certificate(), etcd.url());
    let long = ["--etcd-connect-timeout", "24h", "--etcd-endpoints", &url];
    let refused = refusal(&[&long[..], &["--etcd-ca", &distrusting], &shown].concat(), &[]).await;
    assert!(refused.contains("; check --etcd-ca [ETCD_AUTH_CA]"), "{refused}");
    let refused = refusal(&[&long[..], &["--etcd-ca", &trusting]].concat(), &[]).await;
    assert!(refused.contains("; check --etcd-client-cert [ETCD_AUTH_CLIENT_CERT]"), "{refused}");
}

#[tokio::test]
async fn a_member_with_another_certificate_keeps_nobody_from_the_others() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (server, other) = (authority.server(), stranger.server());
    let (certificate, key) = authority.client();
    let etcd = Etcd::secured(&authority.certificate(), (&server.0, &server.1)).await;
    let strange = Etcd::secured(&stranger.certificate(), (&other.0, &other.1)).await;
    let (ca, urls) = (authority.certificate(), [strange.url(), etcd.url()].join(","));
    let options = ["--etcd-endpoints", &urls, "--etcd-ca", &ca];
    let shown = ["--etcd-client-cert", &certificate, "--etcd-client-key", &key];
    Bridge::finding(&[options, shown].concat(), &[]).await.is_connected(true).await;
}

#[tokio::test]
async fn an_etcd_that_is_not_there_ends_the_start_with_a_hint() {
    let nobody = Port::reserve();
    let options = ["--etcd-endpoints", &nobody.address(), "--etcd-connect-timeout", "500ms"];
    let refused = refusal(&options, &[]).await;
    let expected = format!("etcd at {} could not be reached within 500ms: ", nobody.url());
    assert!(refused.starts_with(&expected) && refused.contains("[ETCD_ENDPOINTS]"), "{refused}");
    assert!(refused.contains("Connection refused"), "{refused}");
    let in_seconds = [("ETCD_ENDPOINTS", &*nobody.address()), ("ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS", "1")];
    let refused = refusal(&["--discovery", "etcd"], &in_seconds).await;
    assert!(refused.contains("could not be reached within 1s: "), "{refused}");
}
