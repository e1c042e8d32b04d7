//! The documents say what the programs do.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use dynamo_metrics::fleet::{MAX_GROUPS, MAX_POSITIONS, MAX_RANKS, Reason};
use dynamo_metrics::instruments::{CATALOGUE, Kind, Metric};
use dynamo_metrics::mock::MockConfig;
use dynamo_metrics::{Config, wire};

use crate::support::documents;
use crate::support::{
    Bridge, Exposition, FakeService, Nats, Port, captured, command, endpoint, eventually, mock_worker,
};

fn row(metric: &Metric) -> String {
    let kind = match metric.kind {
        Kind::Gauge(_) => "gauge",
        Kind::Counter(_) | Kind::FractionCounter(_) => "counter",
        Kind::Histogram(_) => "histogram",
    };
    let unit = if metric.unit.is_empty() { "" } else { &format!("`{}`", metric.unit) };
    format!("| `{}` | `{}` | {kind} | {unit} | {} | {} |", metric.prometheus, metric.otlp, metric.labels, metric.help)
}

#[test]
fn the_tables_of_metrics_are_the_catalogue() {
    for (heading, prefix) in [("The fleet", "llm_"), ("The bridge itself", "dynamo_bridge_")] {
        let metrics = CATALOGUE.iter().filter(|metric| metric.prometheus.starts_with(prefix));
        let rows: Vec<_> = metrics.map(row).collect();
        let start = format!(
            "## {heading}\n\n| Prometheus | OTLP | instrument | unit | labels | what it says |\n|---|---|---|---|---|---|\n"
        );
        documents::generated("docs/metrics.md", &start, "\n\n", &rows.join("\n"));
    }
}

#[tokio::test]
async fn the_options_are_those_of_the_programs() {
    for (program, document) in
        [(env!("CARGO_BIN_EXE_metrics"), "docs/options.md"), (env!("CARGO_BIN_EXE_mock_worker"), "docs/mock-worker.md")]
    {
        let output = command(program, &["--help"], &[]).output().await.unwrap();
        let help = String::from_utf8(output.stdout).unwrap();
        let (_, options) = help.split_once("Usage:").unwrap();
        documents::generated(document, "```\nUsage:", "```", options);
    }
}

#[test]
fn what_the_table_of_variables_calls_read_is_read() {
    let table = documents::read("docs/environment.md");
    let (_, dynamo) = table.split_once("## Dynamo\n").unwrap();
    let dynamo = dynamo.split_once("\n## ").map_or(dynamo, |(section, _)| section);
    let rows: Vec<Vec<_>> =
        dynamo.lines().filter(|line| line.starts_with("| `")).map(|row| row.split(" | ").collect()).collect();
    assert!(rows.len() > 30, "{dynamo}");
    let sources = sources(concat!(env!("CARGO_MANIFEST_DIR"), "/src").as_ref());
    for row in rows {
        let variables = row[0].split('`').skip(1).step_by(2);
        // The libraries that look for a cluster and speak TLS read these.
        for variable in variables.filter(|name| *name != "KUBERNETES_SERVICE_PORT") {
            let is_read = sources.contains(&format!("\"{variable}\""));
            assert_eq!(row[2], if is_read { "read" } else { "not read" }, "{variable}");
        }
    }
}

/// The text of every source file below.
fn sources(folder: &Path) -> String {
    let text = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.unwrap().path();
        if path.is_dir() { sources(&path) } else { fs::read_to_string(path).unwrap() }
    };
    fs::read_dir(folder).unwrap().map(text).collect()
}

/// Each reason of the table, as often as it is named there.
fn reasons(document: &str) -> Vec<&str> {
    let (_, table) = document.split_once("| reason | what was wrong |\n|---|---|\n").unwrap();
    let first_cells = table.lines().map_while(|line| line.strip_prefix("| ")?.split_once(" | ")).map(|(cell, _)| cell);
    first_cells.flat_map(|cell| cell.split(", ")).map(|reason| reason.trim_matches('`')).collect()
}

#[test]
fn the_table_of_reasons_has_each_reason_once_and_names_the_bounds() {
    let document = documents::read("docs/metrics.md");
    let mut found = reasons(&document);
    let mut expected = Reason::ALL.map(Reason::as_str);
    found.sort_unstable();
    expected.sort_unstable();
    assert_eq!(found, expected);
    for bound in [
        format!("more than {} KiB of JSON", wire::MAX_MESSAGE / 1024),
        format!("an event of more than {} MiB", wire::MAX_EVENT / 1024 / 1024),
        format!("beyond {MAX_GROUPS} component / endpoint pairs"),
        format!("beyond {},{:03} data-parallel ranks of a worker", MAX_RANKS / 1000, MAX_RANKS % 1000),
        format!("by their position in the draft, the first {MAX_POSITIONS},"),
    ] {
        assert!(document.contains(&bound), "docs/metrics.md should say: {bound}");
    }
}

/// What stands between backticks.
fn quoted(document: &str) -> impl Iterator<Item = &str> {
    document.lines().filter(|line| !line.starts_with("```")).flat_map(|line| line.split('`').skip(1).step_by(2))
}

#[test]
fn every_path_and_every_target_of_make_that_a_document_names_is_there() {
    let documents = all_text();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let is_path =
        |word: &&str| ["src/", "tests/", "docs/", "otel-config/", ".ci/"].iter().any(|start| word.starts_with(start));
    let mut paths: Vec<_> = quoted(&documents).filter(is_path).map(|path| path.replace("*.", "")).collect();
    paths.retain(|path| !path.ends_with("json") && !path.ends_with("yaml"));
    let missing: Vec<_> = paths.iter().filter(|path| !folder.join(path).exists()).collect();
    assert!(missing.is_empty() && paths.len() > 20, "{missing:?} of {paths:?}");

    let makefile = fs::read_to_string(folder.join("Makefile")).unwrap();
    let commands = documents.lines().chain(quoted(&documents)).filter_map(|line| line.strip_prefix("make "));
    let targets: BTreeSet<_> = commands.filter_map(|rest| rest.split_whitespace().next()).collect();
    let is_there = |target: &&&str| makefile.lines().any(|line| line.starts_with(&format!("{target}: ")));
    let missing: Vec<_> = targets.iter().filter(|target| **target != "#" && !is_there(target)).collect();
    assert!(missing.is_empty() && targets.len() > 5, "{missing:?} of {targets:?}");
}

/// GitHub's name of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_within_the_repository_leads_somewhere() {
    let mut links = 0;
    for (name, text) in documents::all() {
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
        for target in targets.filter(|target| !target.contains("://")) {
            links += 1;
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(&name).parent().unwrap().to_owned();
            let path =
                if file.is_empty() { folder.join(Path::new(&name).file_name().unwrap()) } else { folder.join(file) };
            assert!(path.exists(), "{name} links to {target}");
            let has_heading = || {
                let linked = fs::read_to_string(&path).unwrap();
                linked.lines().any(|line| line.starts_with('#') && anchor(line) == heading)
            };
            assert!(heading.is_empty() || has_heading(), "{name} links to {target}");
        }
    }
    assert!(links > 20, "{links}");
}

fn all_text() -> String {
    documents::all().into_iter().map(|(_, text)| text + "\n").collect()
}

#[test]
fn the_readme_is_read_in_five_minutes() {
    let length = documents::read("README.md").len();
    assert!(length <= 10 * 1024, "{length} bytes: what is for reference belongs in docs/");
}

#[test]
fn every_command_of_the_documents_that_runs_a_program_is_understood() {
    let documents = all_text();
    let commands: Vec<_> = documents
        .lines()
        .flat_map(|line| line.split('`'))
        .filter_map(|text| text.split_once("cargo run ")?.1.split_once("--bin "))
        .map(|(_, command)| command.split('#').next().unwrap().replace(" -- ", " ").replace(" &", ""))
        .collect();
    for command in &commands {
        let arguments = command.split_whitespace().map(str::to_owned);
        let parsed = match command.split_whitespace().next() {
            Some("metrics") => Config::from_args(arguments).map(|_| ()),
            Some("mock_worker") => MockConfig::from_args(arguments).map(|_| ()),
            _ => panic!("no such program: {command}"),
        };
        assert!(parsed.is_ok(), "{command}: {}", parsed.unwrap_err());
    }
    assert!(commands.len() >= 7, "{commands:?}");
}

/// What a build with an older Rust than the one of this machine needs: Cargo itself refuses a package that wants more.
#[tokio::test]
async fn the_rust_that_the_readme_names_is_enough_for_every_dependency() {
    let version = |text: &str| text.split('.').take(2).map(|part| part.parse::<u32>().unwrap()).collect::<Vec<_>>();
    let named = env!("CARGO_PKG_RUST_VERSION");
    assert!(documents::read("README.md").contains(&format!("Rust {named} or later")), "{named}");
    let mut cargo = tokio::process::Command::new(env!("CARGO"));
    cargo.args(["metadata", "--locked", "--offline", "--format-version", "1"]);
    cargo.args(["--filter-platform", "x86_64-unknown-linux-gnu"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = cargo.kill_on_drop(true).output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let wants_more =
        |package: &&serde_json::Value| package["rust_version"].as_str().is_some_and(|it| version(it) > version(named));
    let too_new: Vec<_> = packages.iter().filter(wants_more).map(|package| &package["id"]).collect();
    assert!(too_new.is_empty(), "{too_new:?}");
}

/// The entry of a series.
fn entry(name: &str) -> &'static Metric {
    let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
    let entry = CATALOGUE.iter().find(|metric| metric.prometheus == name || Some(metric.prometheus) == family);
    entry.unwrap_or_else(|| panic!("{name} has no entry"))
}

/// Workers of two releases that say all that mock workers say, one that decodes speculatively, and one of which a router
/// has an estimate.
#[tokio::test]
async fn every_metric_has_series_with_the_labels_that_are_documented() {
    let nats = Nats::start().await;
    let client = nats.client().await;
    let folder = tempfile::tempdir().unwrap();
    let folder = ["--file-kv", folder.path().to_str().unwrap()];
    let fast = ["--passes-per-second", "20"];
    let _old = mock_worker(nats.url(), &[&fast[..], &["--dp-rank", "1"]].concat()).await;
    let _new = mock_worker(nats.url(), &[&fast[..], &folder, &["--release", "1.6"]].concat()).await;
    let spec = r#"{"kv_stats":{},"worker_stats":{},"spec_decode_stats":{"num_spec_tokens":4,"num_drafts":1,"num_draft_tokens":4,"num_accepted_tokens":3,"num_accepted_tokens_per_pos":[2]}}"#;
    let endpoints = [("1f", spec), ("3ceea21007e45a1e", r#"{"kv_active_blocks":1}"#)];
    let endpoints = endpoints.map(|(id, load)| endpoint(&format!("dynamo_backend.generate-{id}"), load));
    let _others = FakeService::start(&client, "others", &endpoints).await;
    let (options, nobody) = (["--namespace", "*", "--endpoint-stats", "--router-estimates"], Port::reserve());
    let push = ["--otlp-endpoint", &nobody.url()];
    let bridge = Bridge::watching(nats.url(), &[&options[..], &folder, &push].concat(), &[]).await;
    bridge.shows("llm_workers", &[("state", "reporting"), ("dynamo_namespace", "dynamo")], 4.0).await;
    let estimate = captured("1.1.1-cluster", "event.namespace.dynamo.kv_metrics.1.bin");
    client.publish("namespace.dynamo.kv_metrics", estimate.into()).await.unwrap();

    let without_series = |metrics: &Exposition| {
        let shown: BTreeSet<_> = metrics.keys().iter().map(|(name, _)| entry(name).prometheus).collect();
        let all = CATALOGUE.iter().map(|metric| metric.prometheus);
        all.filter(|name| !shown.contains(name)).map(|name| format!("# {name}")).collect::<Vec<_>>().join("\n")
    };
    let metrics = eventually("every metric has series", || async {
        let metrics = bridge.metrics().await;
        let missing = without_series(&metrics);
        if missing.is_empty() { Ok(metrics) } else { Err(missing) }
    })
    .await;
    for (name, labels) in metrics.keys() {
        let shown: BTreeSet<_> =
            labels.iter().map(|(label, _)| label.as_str()).filter(|label| *label != "le").collect();
        let documented: Vec<_> = entry(&name).labels.split(", ").filter(|label| !label.is_empty()).collect();
        let always = documented.iter().filter(|label| !label.starts_with('['));
        let missing: Vec<_> = always.filter(|label| !shown.contains(**label)).collect();
        assert!(missing.is_empty(), "{name} has no {missing:?}: {labels:?}");
        let allowed: BTreeSet<_> = documented.iter().map(|label| label.trim_matches(['[', ']'])).collect();
        assert!(shown.is_subset(&allowed), "{name} has labels {shown:?}, documented are {documented:?}");
    }
}
