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
