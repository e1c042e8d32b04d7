//! The README says what the programs do.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use dynamo_metrics::fleet::{MAX_GROUPS, MAX_POSITIONS, MAX_RANKS, Reason};
use dynamo_metrics::instruments::{CATALOGUE, Kind, Metric};
use dynamo_metrics::mock::MockConfig;
use dynamo_metrics::{Config, wire};

use crate::support::{
    Bridge, Exposition, FakeService, Nats, Port, captured, command, endpoint, eventually, mock_worker,
};

fn readme() -> String {
    fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap()
}

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
fn the_readmes_table_of_metrics_is_the_catalogue() {
    let expected: Vec<_> = CATALOGUE.iter().map(row).collect();
    let readme = readme();
    let is_row = |line: &&str| line.starts_with("| `llm_") || line.starts_with("| `dynamo_bridge_");
    let found: Vec<_> = readme.lines().filter(is_row).collect();
    assert_eq!(found, expected, "the table should be:\n{}", expected.join("\n"));
}

#[tokio::test]
async fn the_readmes_options_are_those_of_the_programs() {
    let readme = readme();
    for program in [env!("CARGO_BIN_EXE_metrics"), env!("CARGO_BIN_EXE_mock_worker")] {
        let output = command(program, &["--help"], &[]).output().await.unwrap();
        let help = String::from_utf8(output.stdout).unwrap();
        let options = &help[help.find("Usage:").unwrap()..];
        assert!(readme.contains(options), "the README should hold:\n{options}");
    }
}

#[test]
fn what_the_table_of_variables_calls_read_is_read() {
    let table = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/environment.md")).unwrap();
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
fn reasons(readme: &str) -> Vec<&str> {
    let (_, table) = readme.split_once("| reason | what was wrong |\n|---|---|\n").unwrap();
    let first_cells = table.lines().map_while(|line| line.strip_prefix("| ")?.split_once(" | ")).map(|(cell, _)| cell);
    first_cells.flat_map(|cell| cell.split(", ")).map(|reason| reason.trim_matches('`')).collect()
}

#[test]
fn the_readmes_table_of_reasons_has_each_reason_once_and_names_the_bounds() {
    let readme = readme();
    let mut found = reasons(&readme);
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
        assert!(readme.contains(&bound), "README.md should say: {bound}");
    }
}

/// What stands between backticks.
fn quoted(readme: &str) -> impl Iterator<Item = &str> {
    readme.lines().filter(|line| !line.starts_with("```")).flat_map(|line| line.split('`').skip(1).step_by(2))
}

#[test]
fn every_path_and_every_target_of_make_that_the_readme_names_is_there() {
    let readme = readme();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let is_path = |word: &&str| ["src/", "tests/", "otel-config/", ".ci/"].iter().any(|start| word.starts_with(start));
    let mut paths: Vec<_> = quoted(&readme).filter(is_path).map(|path| path.replace("*.", "")).collect();
    paths.retain(|path| !path.ends_with("json") && !path.ends_with("yaml"));
    let missing: Vec<_> = paths.iter().filter(|path| !folder.join(path).exists()).collect();
    assert!(missing.is_empty() && paths.len() > 20, "{missing:?} of {paths:?}");

    let makefile = fs::read_to_string(folder.join("Makefile")).unwrap();
    let commands = readme.lines().chain(quoted(&readme)).filter_map(|line| line.strip_prefix("make "));
    let targets: BTreeSet<_> = commands.filter_map(|rest| rest.split_whitespace().next()).collect();
    let is_there = |target: &&&str| makefile.lines().any(|line| line.starts_with(&format!("{target}: ")));
    let missing: Vec<_> = targets.iter().filter(|target| **target != "#" && !is_there(target)).collect();
    assert!(missing.is_empty() && targets.len() > 5, "{missing:?} of {targets:?}");
}

#[test]
fn every_command_of_the_readme_that_runs_a_program_is_understood() {
    let readme = readme();
    let commands: Vec<_> = readme
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
    assert!(readme().contains(&format!("Rust {named} or later")), "{named}");
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
