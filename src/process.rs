//! What both programs are as processes: TLS, signals, exit code.

use std::fmt::Display;
use std::future::Future;
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

/// Chooses the one TLS implementation of the process. The exporters' HTTP client panics without one.
pub fn install_crypto() {
    // It fails where a provider is installed already: then that one serves.
    rustls::crypto::ring::default_provider().install_default().ok();
}

/// Completes at Ctrl-C or SIGTERM.
///
/// # Errors
/// The handlers cannot be installed.
pub fn shutdown_signal() -> std::io::Result<impl Future<Output = ()>> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        let name = tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
        };
        info!("{name} received, stopping");
    })
}

/// Says in one line on standard error what went wrong: 0 clean, 1 failed. (2, usage, is clap's.)
///
/// Every error of this crate tells its cause itself: the chain of causes would say it twice.
#[must_use]
#[expect(clippy::print_stderr, reason = "the log may not be up when this is needed")]
pub fn exit_code(result: Result<(), impl Display>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
