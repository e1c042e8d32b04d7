//! A real Prometheus.

use serde_json::Value;
use tempfile::TempDir;
use tokio::process::Command;

use super::program::told;
use super::{Exposition, Port, Program, eventually, peers};

/// Pulls one target every second. Stopped when dropped.
pub struct Prometheus {
    _program: Program,
    _folder: TempDir,
    port: Port,
}

impl Prometheus {
    /// `None` where there is none: see [`peers::built`].
    pub async fn pulling(url: &str) -> Option<Self> {
        let path = peers::built("prometheus")?;
        let target = url.strip_prefix("http://").expect("a plain URL");
        let folder = tempfile::tempdir().unwrap();
        let configuration = folder.path().join("prometheus.yml");
        let text = format!(
            "scrape_configs: [{{job_name: bridge, scrape_interval: 1s, static_configs: [{{targets: ['{target}']}}]}}]"
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
        let llm = "%7B__name__%3D~%22llm_.%2B%22%7D";
        let response = reqwest::get(format!("{}/api/v1/query?query={llm}", self.port.url())).await;
        let text = response.unwrap().text().await.unwrap();
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(answer["status"], "success", "{answer}");
        let series = answer["data"]["result"].as_array().unwrap().iter().map(|series| {
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            let labels = series["metric"].as_object().unwrap().iter();
            let labels = labels.filter(|(name, _)| !["__name__", "job", "instance"].contains(&name.as_str()));
            (
                text(&series["metric"]["__name__"]),
                labels.map(|(name, value)| (name.clone(), text(value))).map(written).collect(),
                text(&series["value"][1]).parse().unwrap(),
            )
        });
        Exposition::of(series)
    }
}

/// Prometheus writes every bound of a histogram with a point, whatever was written.
fn written((name, value): (String, String)) -> (String, String) {
    let value = if name == "le" { value.trim_end_matches(".0").to_owned() } else { value };
    (name, value)
}
