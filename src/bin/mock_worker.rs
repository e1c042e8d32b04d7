//! The mock worker's program: options, log, signals; the library does the rest.

use std::process::ExitCode;

use dynamo_metrics::mock::{self, MockConfig};
use dynamo_metrics::{log, process};

#[tokio::main]
async fn main() -> ExitCode {
    let config = match MockConfig::from_args(std::env::args()) {
        Ok(config) => config,
        Err(message) => return process::usage(message),
    };
    process::exit_code(start(config).await)
}

async fn start(config: MockConfig) -> anyhow::Result<()> {
    let _log = log::start()?;
    mock::run(config, process::shutdown_signal()?).await?;
    Ok(())
}
