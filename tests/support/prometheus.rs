//! A real Prometheus.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tempfile::TempDir;
use tokio::process::Command;

use super::program::told;
use super::{Exposition, Port, Program, eventually, peers};

const RULES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/otel-config/rules/*.yaml");
/// How far back a range reaches, in seconds, and how far apart its points are.
const RANGE: (u64, &str) = (300, "2");

/// Pulls one target every second, and evaluates this project's rules. Stopped when dropped.
pub struct Prometheus {
    _program: Program,
    _folder: TempDir,
    port: Port,
}

/// A series that a query found: its labels, its name among them, and its values.
#[derive(Debug)]
pub struct Found {
    pub labels: BTreeMap<String, String>,
    pub values: Vec<f64>,
}

/// A rule, as Prometheus has loaded it.
#[derive(Debug)]
pub struct Rule {
    pub name: String,
    pub query: String,
    pub alerts: bool,
    /// What went wrong when it was evaluated last.
    pub error: Option<String>,
}

impl Prometheus {
    /// `None` where there is none: see [`peers::built`].
    pub async fn pulling(url: &str) -> Option<Self> {
        let path = peers::built("prometheus")?;
        let target = url.strip_prefix("http://").expect("a plain URL");
        let folder = tempfile::tempdir().unwrap();
        let configuration = folder.path().join("prometheus.yml");
        let text = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{RULES}']\nscrape_configs: \
             [{{job_name: bridge, honor_labels: true, static_configs: [{{targets: ['{target}']}}]}}]"
        );
        std::fs::write(&configuration, text).unwrap();
        let port = Port::reserve();
        let mut command = Command::new(path);
        command.arg("--config.file").arg(&configuration);
        command.arg("--storage.tsdb.path").arg(folder.path().join("data"));
        command.args(["--web.listen-address", &port.address()]);
        let program = Program::start(&mut command);
        eventually("Prometheus is ready", || async {
            let response = reqwest::get(format!("{}/-/ready", port.url())).await;
            let response = response.map_err(|error| format!("{error}\n{}", told(&program.lines())))?;
            let status = response.status();
            if status == 200 { Ok(()) } else { Err(status.to_string()) }
        })
        .await;
        Some(Self { _program: program, _folder: folder, port })
    }

    /// What it now knows of `llm_*`, without the labels that it adds itself.
    pub async fn metrics(&self) -> Exposition {
        let found = self.query("{__name__=~\"llm_.+\"}").await.unwrap();
        Exposition::of(found.into_iter().map(|mut series| {
            let name = series.labels.remove("__name__").unwrap();
            let labels = series.labels.into_iter().filter(|(name, _)| !["job", "instance"].contains(&name.as_str()));
            (name, labels.map(written).collect(), series.values[0])
        }))
    }

    /// What an expression finds now; or what is wrong with it.
    pub async fn query(&self, expression: &str) -> Result<Vec<Found>, String> {
        found(&self.ask("query", &[("query", expression)]).await?["result"])
    }

    /// What it found within the last minutes, as for a graph.
    pub async fn query_range(&self, expression: &str) -> Result<Vec<Found>, String> {
        let end = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let (start, end) = ((end - RANGE.0).to_string(), end.to_string());
        let range = [("query", expression), ("start", &start), ("end", &end), ("step", RANGE.1)];
        found(&self.ask("query_range", &range).await?["result"])
    }

    /// The values of a label on the series that a selector finds.
    pub async fn label_values(&self, selector: &str, label: &str) -> Result<Vec<String>, String> {
        let values = self.ask(&format!("label/{label}/values"), &[("match[]", selector)]).await?;
        serde_json::from_value(values).map_err(|error| error.to_string())
    }

    /// Every rule.
    pub async fn rules(&self) -> Vec<Rule> {
        let answer = self.ask("rules", &[]).await.unwrap();
        let groups = answer["groups"].as_array().unwrap().iter();
        let rule = |rule: &Value| Rule {
            name: text(&rule["name"]),
            query: text(&rule["query"]),
            alerts: rule["type"] == "alerting",
            error: rule["lastError"].as_str().filter(|error| !error.is_empty()).map(str::to_owned),
        };
        groups.flat_map(|group| group["rules"].as_array().unwrap().iter().map(rule)).collect()
    }

    async fn ask(&self, what: &str, parameters: &[(&str, &str)]) -> Result<Value, String> {
        let url = format!("{}/api/v1/{what}", self.port.url());
        let url = reqwest::Url::parse_with_params(&url, parameters).unwrap();
        let answer = reqwest::get(url).await.unwrap().text().await.unwrap();
        let mut answer: Value = serde_json::from_str(&answer).map_err(|error| format!("{error}: {answer}"))?;
        if answer["status"] == "success" { Ok(answer["data"].take()) } else { Err(text(&answer["error"])) }
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// Series of an instant, which have a `value`, or of a range, which have `values`. Nothing else has labels.
fn found(result: &Value) -> Result<Vec<Found>, String> {
    let series = result.as_array().into_iter().flatten().map(|series| {
        let labels = series["metric"].as_object().ok_or_else(|| format!("no series: {result}"))?;
        let points = series["values"].as_array().cloned().unwrap_or_else(|| vec![series["value"].clone()]);
        Ok(Found {
            labels: labels.iter().map(|(name, value)| (name.clone(), text(value))).collect(),
            values: points.iter().map(|point| text(&point[1]).parse().unwrap()).collect(),
        })
    });
    series.collect()
}

/// Prometheus writes every bound of a histogram with a point, whatever was written.
fn written((name, value): (String, String)) -> (String, String) {
    let value = if name == "le" { value.trim_end_matches(".0").to_owned() } else { value };
    (name, value)
}
