//! The real OpenTelemetry Collector, with the configuration that this project ships.

use std::collections::BTreeMap;

use tokio::process::Command;

use super::program::told;
use super::{Bridge, Exposition, Port, Program, Via, eventually, peers, same};

const CONFIGURATION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/otel-config/collector.yaml");

/// Stopped when dropped.
pub struct Collector {
    _program: Program,
    grpc: Port,
    http: Port,
    prometheus: Port,
    _health: Port,
}

impl Collector {
    /// `None` where there is none: see [`peers::built`].
    pub async fn start(environment: &[(&str, &str)]) -> Option<Self> {
        let path = peers::built("otelcol")?;
        dynamo_metrics::process::install_crypto();
        let [grpc, http, prometheus, health] = [(); 4].map(|()| Port::reserve());
        let mut command = Command::new(path);
        command.args(["--config", CONFIGURATION]).envs(environment.iter().copied());
        command
            .env("OTLP_GRPC_ADDRESS", grpc.address())
            .env("OTLP_HTTP_ADDRESS", http.address())
            .env("PROMETHEUS_ADDRESS", prometheus.address())
            .env("HEALTH_ADDRESS", health.address());
        let program = Program::start(&mut command);
        eventually("the Collector is healthy", || async {
            let response = reqwest::get(health.url()).await;
            let response = response.map_err(|error| format!("{error}\n{}", told(&program.lines())))?;
            let status = response.status();
            if status == 200 { Ok(()) } else { Err(status.to_string()) }
        })
        .await;
        Some(Self { _program: program, grpc, http, prometheus, _health: health })
    }

    /// What the Collector itself says about the configuration with something replaced; `None` where there is none.
    pub async fn validate(from: &str, to: &str) -> Option<std::process::Output> {
        let path = peers::built("otelcol")?;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("collector.yaml");
        std::fs::write(&file, std::fs::read_to_string(CONFIGURATION).unwrap().replace(from, to)).unwrap();
        let mut command = Command::new(path);
        command.args(["validate", "--config"]).arg(file).kill_on_drop(true);
        Some(command.output().await.unwrap())
    }

    /// Where it takes OTLP.
    pub fn url(&self, via: Via) -> String {
        match via {
            Via::Grpc => self.grpc.url(),
            Via::Http => self.http.url(),
        }
    }

    /// One pull of what it was pushed.
    pub async fn metrics(&self) -> Exposition {
        let response = reqwest::get(format!("{}/metrics", self.prometheus.url())).await.unwrap();
        assert_eq!(response.status(), 200);
        Exposition::parse(response.text().await.unwrap())
    }

    /// Waits until it shows of the fleet what the bridge shows, and returns it under the bridge's own names.
    pub async fn agrees_with(&self, bridge: &Bridge) -> Exposition {
        eventually("the Collector shows what the pull shows", || async {
            let pulled = bridge.metrics().await;
            let collected = self.metrics().await.renamed(as_pulled);
            same(&collected.sorted("llm_"), &pulled.sorted("llm_")).map(|()| collected)
        })
        .await
    }
}

/// The Collector puts a prefix before each name, `_total` behind every counter's, and the labels that say which bridge pushed
/// it.
fn as_pulled(name: &mut String, labels: &mut BTreeMap<String, String>) {
    const BARE: [&str; 2] = ["llm_kv_hit_rate_isl_blocks", "llm_kv_hit_rate_overlap_blocks"];
    let stripped = name.strip_prefix("otlp_").unwrap_or(name);
    let bare = BARE.into_iter().find(|bare| stripped.strip_suffix("_total") == Some(bare));
    *name = bare.unwrap_or(stripped).to_owned();
    labels.retain(|label, _| !["job", "instance"].contains(&&**label));
}
