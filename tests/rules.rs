//! The alert and recording rules, as Prometheus's own tool judges them.

use tokio::process::Command;

use crate::support::peers;

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
