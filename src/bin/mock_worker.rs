//! The mock worker's program: options, log, signals; the library does the rest.

use std::process::ExitCode;

use dynamo_metrics::mock::{self, MockConfig};
use dynamo_metrics::{process, telemetry};

#[tokio::main]
async fn main() -> ExitCode {
    let config = match MockConfig::from_args(std::env::args()) {
        Ok(config) => config,
        Err(error) => error.exit(),
    };
    process::exit_code(start(config).await)
}

async fn start(config: MockConfig) -> anyhow::Result<()> {
    telemetry::log_only()?;
    mock::run(config, process::shutdown_signal()?).await?;
    Ok(())
}
