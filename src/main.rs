//! The bridge's program: options, log, signals; the library does the rest. `healthcheck` asks another one how it is.

use std::process::ExitCode;

use anyhow::anyhow;
use dynamo_metrics::{Config, bridge, healthcheck, process, telemetry};
use tokio::runtime::Runtime;

fn main() -> ExitCode {
    let config = match Config::from_args(std::env::args()) {
        Ok(config) => config,
        Err(message) => return process::usage(message),
    };
    if let Some(options) = config.healthcheck() {
        return process::exit_code(healthcheck::run(options));
    }
    process::exit_code(run(config))
}

fn run(config: Config) -> anyhow::Result<()> {
    let runtime = Runtime::new()?;
    let ended = runtime.block_on(start(config));
    // What still waits for a name or a disk does not hold up the end.
    runtime.shutdown_background();
    ended
}

async fn start(config: Config) -> anyhow::Result<()> {
    let tracing = telemetry::Tracing::start(&config)?;
    let result = bridge_until_signal(config).await;
    tracing.shutdown().await;
    result
}

async fn bridge_until_signal(config: Config) -> anyhow::Result<()> {
    let shutdown = process::shutdown_signal()?;
    let (host, port) = config.listen_address();
    let listener = process::listen(host, port)
        .map_err(|(address, error)| anyhow!("cannot listen on {address}: {error}; choose another --host or --port"))?;
    bridge::run(config, listener, shutdown).await?;
    Ok(())
}
