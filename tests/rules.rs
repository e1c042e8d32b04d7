//! The alert and recording rules, as Prometheus's own tool judges them.

use tokio::process::Command;

use crate::dashboards::metrics;
use crate::support::{documents, peers};

/// The YAML files of a folder below the rules.
fn files(folder: &str) -> Vec<std::path::PathBuf> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("otel-config/rules").join(folder);
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|extension| extension == "yaml")).collect()
}

async fn promtool(verb: &str, folder: &str) {
    let Some(promtool) = peers::built("promtool") else {
        return;
    };
    let output = Command::new(promtool).args([verb, "rules"]).args(files(folder)).kill_on_drop(true).output().await;
    let output = output.unwrap();
    let written = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(output.status.success(), "{written}");
}

#[tokio::test]
async fn promtool_accepts_every_rule() {
    promtool("check", "").await;
}

#[tokio::test]
async fn each_rule_does_what_its_unit_test_says() {
    promtool("test", "tests").await;
}

/// What follows `key:` on the lines of those files.
fn values(key: &str, folder: &str) -> Vec<String> {
    let texts = files(folder).into_iter().map(|path| std::fs::read_to_string(path).unwrap());
    let of_text = |text: String| {
        let of_line = |line: &str| Some(line.trim_start_matches([' ', '-']).strip_prefix(key)?.trim().to_owned());
        text.lines().filter_map(of_line).collect::<Vec<_>>()
    };
    texts.flat_map(of_text).collect()
}

#[test]
fn each_rule_has_a_unit_test() {
    let tested = values("expr:", "tests").concat();
    let rules = [values("record:", ""), values("alert:", "")].concat();
    let untested: Vec<_> = rules.iter().filter(|rule| !tested.contains(rule.as_str())).collect();
    assert!(untested.is_empty() && rules.len() > 20, "{untested:?} of {rules:?}");
}

/// Of each row of the document's table with that first heading, what stands between backticks in its first two cells.
fn rows<'a>(document: &'a str, heading: &str) -> Vec<[Vec<&'a str>; 2]> {
    let (_, table) = document.split_once(&format!("\n| {heading} | ")).unwrap();
    let rows = table.lines().skip(2).map_while(|line| line.strip_prefix("| ")?.split_once(" | "));
    let quoted = |cell: &'a str| cell.split('`').skip(1).step_by(2).collect();
    rows.map(|(first, rest)| [quoted(first), quoted(rest.split(" | ").next().unwrap_or_default())]).collect()
}

/// Whether the document means this name: it may leave out what is clear.
fn is_meant(written: &str, name: &str) -> bool {
    match written.split_once('…') {
        None => written == name,
        Some((start, end)) => name.starts_with(start) && name.ends_with(end) && name.len() > start.len() + end.len(),
    }
}

#[test]
fn the_document_names_every_alert_with_what_it_looks_at_and_no_other() {
    let document = documents::read("docs/dashboards.md");
    let file = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/otel-config/rules/alerts.yaml")).unwrap();
    let alerts = file.split("- alert: ").skip(1).map(|rule| {
        let (name, rest) = rule.split_once('\n').unwrap();
        (name.trim(), metrics(rest.split_once("for: ").unwrap().0))
    });
    let alerts: Vec<_> = alerts.collect();
    let rows = rows(&document, "alert");
    for (alert, looks_at) in &alerts {
        let of_alert: Vec<_> = rows.iter().filter(|[names, _]| names.iter().any(|it| is_meant(it, alert))).collect();
        assert_eq!(of_alert.len(), 1, "{alert}: {of_alert:?}");
        let [_, named] = of_alert[0];
        let missing = looks_at.iter().find(|metric| !named.iter().any(|it| is_meant(it, metric)));
        assert!(missing.is_none(), "{alert} looks at {missing:?} too: {named:?}");
    }
    for [names, named] in &rows {
        let of_row = |(alert, _): &&(&str, _)| names.iter().any(|it| is_meant(it, alert));
        let looks_at: Vec<_> = alerts.iter().filter(of_row).flat_map(|(_, metrics)| metrics).collect();
        let unused = named.iter().find(|it| !looks_at.iter().any(|metric| is_meant(it, metric)));
        assert!(unused.is_none(), "none of {names:?} looks at {unused:?}");
        let unknown = names.iter().find(|it| !alerts.iter().any(|(alert, _)| is_meant(it, alert)));
        assert!(unknown.is_none(), "there is no alert {unknown:?}");
    }
}

#[test]
fn the_document_names_every_recording_rule_for_autoscalers_and_no_other() {
    let document = documents::read("docs/dashboards.md");
    let rows = rows(&document, "rule");
    let is_rule = |word: &&str| word.starts_with("role:") || word.starts_with('…');
    let named: Vec<_> = rows.iter().flat_map(|[names, _]| names.iter().copied().filter(is_rule)).collect();
    let rules: Vec<_> = values("record:", "").into_iter().filter(|rule| rule.starts_with("role:")).collect();
    let missing: Vec<_> = rules.iter().filter(|rule| !named.iter().any(|it| is_meant(it, rule))).collect();
    let unknown: Vec<_> = named.iter().filter(|it| !rules.iter().any(|rule| is_meant(it, rule))).collect();
    assert!(missing.is_empty() && unknown.is_empty(), "{missing:?} are missing, and there are no {unknown:?}");
}
