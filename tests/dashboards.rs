//! Every query of the dashboards, of Dynamo's own old ones and of the rules, run by a real Prometheus beside live fleets.

use std::collections::BTreeSet;

use dynamo_metrics::instruments::CATALOGUE;
use futures_util::future::join_all;
use serde_json::Value;

use crate::support::grafana::{Choice, Dashboard, Query, each, text};
use crate::support::{Bridge, Cluster, Found, Nats, Place, Prometheus, eventually, mock_worker, peers};

const OURS: &str = "otel-config/grafana/dashboards";
/// The queries of those that Dynamo shipped up to 0.4, of two times.
const DYNAMOS: &str = "tests/fixtures/dashboards";
/// How a panel begins to say what fleets it shows nothing of.
const EMPTY: &str = "Empty where ";
/// Grafana's own that are used; others are `suffix: ` and a word.
const UNITS: [&str; 3] = ["short", "percentunit", "s"];
const COLUMNS: u64 = 24;
const CHATS_AT_A_TIME: usize = 4;

/// What a fleet has not: panels that begin to say so like that may show nothing of it.
type Lacks = &'static [&'static str];

/// Of 1.6.1 alone, without NATS.
const TODAYS: Lacks = &["the bridge has no NATS", "engines do not report it"];
/// Of mock workers of 0.5, which are asked over NATS.
const ASKED: Lacks =
    &["no forward passes are published", "events carry no numbers", "no router tells what is in flight"];

fn may_be_empty(query: &Query, lacks: Lacks) -> bool {
    lacks.iter().any(|lacking| query.description.contains(&format!("{EMPTY}{lacking}")))
}

/// What is wrong with what was found, if anything is.
fn complaint(found: &[Found], legend: &[String]) -> Option<String> {
    let lacking = |label: &&String| found.iter().any(|series| !series.labels.contains_key(*label));
    if let Some(label) = legend.iter().find(lacking) {
        return Some(format!("no label {label}: {found:?}"));
    }
    let shown: BTreeSet<_> =
        found.iter().map(|series| legend.iter().map(|label| &series.labels[label]).collect::<Vec<_>>()).collect();
    if shown.len() < found.len() {
        return Some(format!("the legend {legend:?} is not of one series: {found:?}"));
    }
    let odd = |value: &f64| !value.is_finite() || *value < 0.0;
    found.iter().find(|series| series.values.iter().any(odd)).map(|series| format!("odd: {series:?}"))
}

/// What is wrong with a query, if anything is.
async fn ask(prometheus: &Prometheus, query: &Query, lacks: Lacks) -> Option<String> {
    let found = if query.is_graph {
        prometheus.query_range(&query.expression).await
    } else {
        prometheus.query(&query.expression).await
    };
    let complaint = match &found {
        Ok(found) if found.is_empty() && !may_be_empty(query, lacks) => Some("finds nothing".to_owned()),
        Ok(found) => complaint(found, &query.legend),
        Err(error) => Some(error.clone()),
    };
    complaint.map(|complaint| format!("{}: {complaint}\n    {}", query.place, query.expression))
}

/// What is wrong with a dashboard, whatever is chosen of its variables.
async fn look(prometheus: &Prometheus, dashboard: &Dashboard, lacks: Lacks) -> Vec<String> {
    let mut complaints = Vec::new();
    for choice in [Choice::All, Choice::One] {
        match dashboard.choose(prometheus, choice).await {
            Ok(chosen) => {
                let queries = dashboard.queries(&chosen);
                complaints.extend(join_all(queries.iter().map(|query| ask(prometheus, query, lacks))).await);
            }
            Err(nothing) => complaints.push(Some(nothing)),
        }
    }
    complaints.into_iter().flatten().collect()
}

async fn every_panel_shows_something(prometheus: &Prometheus, folders: &[&str], lacks: Lacks) {
    let dashboards: Vec<_> = folders.iter().flat_map(|folder| Dashboard::all(folder)).collect();
    eventually("every panel shows something", || async {
        let complaints = join_all(dashboards.iter().map(|dashboard| look(prometheus, dashboard, lacks))).await.concat();
        if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n")) }
    })
    .await;
}

/// Recording rules find something, by role; nothing is to be alerted.
async fn every_rule_is_content(prometheus: &Prometheus) {
    let by = ["component", "endpoint", "dynamo_namespace", "role", "worker_id"].map(str::to_owned);
    eventually("every rule is content", || async {
        let mut complaints = Vec::new();
        for rule in prometheus.rules().await {
            let complaint = match (prometheus.query(&rule.query).await, rule.error) {
                (_, Some(error)) | (Err(error), _) => Some(error),
                (Ok(found), _) if rule.alerts => found.first().map(|series| format!("alerts: {series:?}")),
                (Ok(found), _) if found.is_empty() => Some("finds nothing".to_owned()),
                (Ok(found), _) => complaint(&found, if rule.name.starts_with("worker:") { &by } else { &by[..4] }),
            };
            complaints.extend(complaint.map(|complaint| format!("{}: {complaint}\n    {}", rule.name, rule.query)));
        }
        if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n")) }
    })
    .await;
}

async fn comes_to(prometheus: &Prometheus, expression: &str, value: f64) {
    eventually(&format!("{expression} is {value}"), || async {
        let found = prometheus.query(expression).await?;
        let is_so = found.len() == 1 && found[0].values == [value];
        if is_so { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
}

/// Nothing is known of KV blocks, and an autoscaler is not without a vector.
async fn nothing_was_asked_yet(prometheus: &Prometheus) {
    comes_to(prometheus, "role:llm_workers:count", 2.0).await;
    comes_to(prometheus, "role:llm_requests_slots_headroom:ratio", 1.0).await;
    for rule in ["requests_waiting:sum", "forward_pass_prefill_tokens:rate2m", "forward_pass_decode_tokens:rate2m"] {
        comes_to(prometheus, &format!("role:llm_{rule}"), 0.0).await;
    }
}

/// Chat requests for ever, whose prompts have prefixes in common.
async fn chats(cluster: &Cluster) {
    for round in 0.. {
        let chat = |which: usize| cluster.ask("300", "60", (round + which) % 5 * 100).ended_well();
        join_all((0..CHATS_AT_A_TIME).map(chat)).await;
    }
}

/// Whether two panels cover each other.
fn overlap(one: &Value, other: &Value) -> bool {
    let side = |panel: &Value, start: &str, length: &str| {
        let start = panel["gridPos"][start].as_u64().unwrap();
        (start, start + panel["gridPos"][length].as_u64().unwrap())
    };
    let meet = |start, length| {
        let (one, other) = (side(one, start, length), side(other, start, length));
        one.0 < other.1 && other.0 < one.1
    };
    meet("x", "w") && meet("y", "h")
}

fn is_laid_out(name: &str, panels: &[&Value]) {
    for (index, panel) in panels.iter().enumerate() {
        let title = text(&panel["title"]);
        let place = &panel["gridPos"];
        let right = place["x"].as_u64().unwrap() + place["w"].as_u64().unwrap();
        assert!(right <= COLUMNS && place["h"].as_u64().unwrap() >= 3, "{name} / {title}: {place}");
        for other in &panels[..index] {
            assert!(!overlap(panel, other), "{name} / {title} covers {}", other["title"]);
            assert!(panel["id"] != other["id"] && panel["title"] != other["title"], "{name} / {title} is twice");
        }
    }
}

fn is_complete(name: &str, panel: &Value) {
    let title = text(&panel["title"]);
    let source = serde_json::json!({"type": "prometheus", "uid": "${datasource}"});
    assert!(panel["id"].is_u64() && !title.is_empty(), "{name}: {panel}");
    assert!(["timeseries", "stat", "table"].contains(&text(&panel["type"])), "{name} / {title}");
    assert!(!text(&panel["description"]).is_empty(), "{name} / {title} does not say what it shows");
    assert_eq!(panel["datasource"], source, "{name} / {title}");
    let unit = text(&panel["fieldConfig"]["defaults"]["unit"]);
    let is_known = UNITS.contains(&unit) || unit.starts_with("suffix: ") || panel["type"] == "table";
    assert!(is_known, "{name} / {title}: {unit}");
    let targets: Vec<_> = each(&panel["targets"]).collect();
    let names: BTreeSet<_> = targets.iter().map(|target| text(&target["refId"])).collect();
    assert!(!targets.is_empty() && names.len() == targets.len(), "{name} / {title}: {names:?}");
    for target in targets {
        assert_eq!(target["datasource"], source, "{name} / {title}");
        assert!(!text(&target["legendFormat"]).is_empty(), "{name} / {title} has no legend");
    }
}

/// The metrics that a text names, as Prometheus has them: the parts of a histogram by its own name.
pub fn metrics(text: &str) -> BTreeSet<&str> {
    let words = text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_' && letter != ':');
    let words = words.map(|word| word.trim_end_matches([':', '_']));
    let is_metric = |word: &&str| word.starts_with("llm_") || word.starts_with("dynamo_bridge_");
    words.filter(is_metric).map(|word| word.strip_suffix("_bucket").unwrap_or(word)).collect()
}

#[test]
fn grafana_can_lay_out_every_dashboard() {
    let dashboards = Dashboard::all(OURS);
    let uids: BTreeSet<_> = dashboards.iter().map(|dashboard| text(&dashboard.json["uid"])).collect();
    assert_eq!(uids.len(), 3, "{uids:?}");
    for Dashboard { name, json } in &dashboards {
        assert_eq!(text(&json["uid"]), format!("dynamo-{name}"));
        assert!(json["schemaVersion"].as_u64().is_some_and(|version| version >= 39), "{name}");
        assert!(!text(&json["title"]).is_empty() && json["id"].is_null(), "{name}: Grafana gives ids itself");
        let panels: Vec<_> = each(&json["panels"]).collect();
        is_laid_out(name, &panels);
        for panel in panels {
            is_complete(name, panel);
        }
    }
}

#[test]
fn every_dashboard_has_the_same_variables_and_uses_no_others() {
    for dashboard in Dashboard::all(OURS) {
        let name = &dashboard.name;
        let variables: Vec<_> = each(&dashboard.json["templating"]["list"]).collect();
        let names: Vec<_> = variables.iter().map(|variable| text(&variable["name"])).collect();
        assert!(names.starts_with(&["datasource", "namespace", "component", "endpoint"]), "{name}: {names:?}");
        assert_eq!((&variables[0]["type"], &variables[0]["query"]), (&"datasource".into(), &"prometheus".into()));
        assert_eq!(text(&variables[1]["query"]["query"]), "label_values(llm_worker_info, dynamo_namespace)", "{name}");
        for variable in dashboard.variables() {
            assert_eq!((text(&variable["allValue"]), &variable["includeAll"]), (".*", &true.into()), "{name}");
            assert_eq!(text(&variable["datasource"]["uid"]), "${datasource}", "{name}");
        }
        let chosen: Vec<_> = names.iter().map(|name| ((*name).to_owned(), ".*".to_owned())).collect();
        for query in dashboard.queries(&chosen) {
            assert!(!query.expression.contains('$'), "{}: {}", query.place, query.expression);
        }
        // A series that has these labels is filtered by them.
        for query in dashboard.panels().flat_map(|panel| each(&panel["targets"])).map(|target| text(&target["expr"])) {
            let is_of_workers = query.contains("llm_");
            let filters =
                ["namespace", "component", "endpoint"].map(|name| query.contains(&format!("{name}=~\"${name}")));
            assert_eq!(filters, [is_of_workers; 3], "{name}: {query}");
        }
    }
}

#[test]
fn dashboards_and_rules_name_no_metric_that_is_not_in_the_catalogue() {
    let catalogue: BTreeSet<_> = CATALOGUE.iter().map(|metric| metric.prometheus).collect();
    for file in [
        "grafana/dashboards/fleet.json",
        "grafana/dashboards/workers.json",
        "grafana/dashboards/bridge.json",
        "rules/alerts.yaml",
        "rules/recording.yaml",
    ] {
        let text = std::fs::read_to_string(format!("{}/otel-config/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let unknown: Vec<_> = metrics(&text).into_iter().filter(|name| !catalogue.contains(name)).collect();
        assert!(unknown.is_empty(), "{file}: {unknown:?}");
    }
}

/// Of a cluster of 1.6.1 alone, before, under and after load.
async fn every_query_finds_series(options: &[&str], folders: &[&str]) {
    if !peers::can_run_cluster().await {
        return;
    }
    let cluster = Cluster::start(Place::etcd().await);
    let bridge = cluster.bridge().await;
    let Some(prometheus) = Prometheus::pulling(&bridge.url).await else {
        return;
    };
    let _workers = cluster.workers(options);
    nothing_was_asked_yet(&prometheus).await;
    cluster.answers().await;
    tokio::select! {
        () = every_panel_shows_something(&prometheus, folders, TODAYS) => (),
        () = chats(&cluster) => (),
    }
    comes_to(&prometheus, "sum(rate(llm_forward_passes_total[10s]))", 0.0).await;
    every_panel_shows_something(&prometheus, folders, TODAYS).await;
    every_rule_is_content(&prometheus).await;
}

#[tokio::test]
async fn every_query_finds_series_on_a_real_cluster() {
    every_query_finds_series(&[], &[OURS, DYNAMOS]).await;
}

/// Dynamo's own dashboards do not name ranks.
#[tokio::test]
async fn every_query_finds_series_on_a_real_cluster_with_two_ranks() {
    every_query_finds_series(&["--data-parallel-size", "2"], &[OURS]).await;
}

#[tokio::test]
async fn every_query_finds_series_on_a_fleet_that_is_asked_over_nats() {
    let nats = Nats::start().await;
    let bridge = Bridge::start(nats.url(), &[]).await;
    let Some(prometheus) = Prometheus::pulling(&bridge.url).await else {
        return;
    };
    let _workers = mock_worker(nats.url(), &["--release", "0.5", "--workers", "2"]).await;
    every_panel_shows_something(&prometheus, &[OURS, DYNAMOS], ASKED).await;
}
