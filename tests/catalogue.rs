//! The README says what the programs do.

use dynamo_metrics::instruments::{CATALOGUE, Kind, Metric};

use crate::support::{Bridge, Nats, command, mock_worker};

fn readme() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap()
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
    let table = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/environment.md")).unwrap();
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
fn sources(folder: &std::path::Path) -> String {
    let text = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        if path.is_dir() { sources(&path) } else { std::fs::read_to_string(path).unwrap() }
    };
    std::fs::read_dir(folder).unwrap().map(text).collect()
}

#[tokio::test]
async fn every_series_that_is_shown_has_an_entry_with_its_labels() {
    let nats = Nats::start().await;
    let _mock = mock_worker(nats.url(), &["--dp-rank", "1", "--passes-per-second", "20"]).await;
    let bridge = Bridge::watching(nats.url(), &["--namespace", "*"], &[]).await;
    let metrics = bridge
        .eventually("hits", |metrics| metrics.value("llm_kv_hit_rate_isl_blocks", &[]).map(|_| metrics.clone()))
        .await;
    for (name, labels, _) in metrics.sorted("") {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        let entry = CATALOGUE.iter().find(|metric| metric.prometheus == name || Some(metric.prometheus) == family);
        let entry = entry.unwrap_or_else(|| panic!("{name} has no entry"));
        let documented: Vec<_> = entry.labels.split(", ").map(|label| label.trim_matches(['[', ']'])).collect();
        for (label, _) in labels.iter().filter(|(label, _)| label != "le") {
            assert!(documented.contains(&label.as_str()), "{name} has a label {label}, documented are {documented:?}");
        }
    }
}
