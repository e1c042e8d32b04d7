//! What both programs are as processes: TLS, signals, file descriptors, exit code.

use std::fmt::Display;
use std::future::Future;
use std::io;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

/// How long the end of the process waits for one who reads its last lines.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(2);

/// Chooses the one TLS implementation of the process. The exporters' HTTP client panics without one.
pub fn install_crypto() {
    // It fails where a provider is installed already: then that one serves.
    rustls::crypto::ring::default_provider().install_default().ok();
}

/// Completes at Ctrl-C or SIGTERM.
///
/// # Errors
/// The handlers cannot be installed.
pub fn shutdown_signal() -> io::Result<impl Future<Output = ()>> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        let name = tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
        };
        info!("{name} received, stopping");
    })
}

/// Raises the limit of open files as far as it goes without privileges, and says what to do where it does not reach so far.
///
/// # Errors
/// One line for a person.
pub fn descriptors_suffice(needed: u64) -> Result<(), String> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // Without a soft limit there is none.
    let allowed = match (current, maximum) {
        (None, _) => return Ok(()),
        (Some(_), maximum) if setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_ok() => maximum,
        (Some(current), _) => Some(current),
    };
    match allowed.filter(|allowed| *allowed < needed) {
        None => Ok(()),
        Some(allowed) => Err(format!(
            "{needed} files and connections may be needed at a time, but only {allowed} may be open; raise the hard limit (ulimit -Hn {needed}, or LimitNOFILE={needed} of a systemd service), or lower --max-workers"
        )),
    }
}

/// Says in one line on standard error what went wrong: 0 clean, 1 failed. (2, usage, is clap's.)
///
/// Every error of this crate tells its cause itself: the chain of causes would say it twice.
#[must_use]
#[expect(clippy::print_stderr, reason = "the log may not be up when this is needed, or has ended")]
pub fn exit_code(result: Result<(), impl Display>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let line = format!("error: {error}");
            briefly(move || eprintln!("{line}"));
            ExitCode::FAILURE
        }
    }
}

/// Says what is wrong with the command line, or what was asked of it: `--help`, `--version`.
#[must_use]
pub fn usage(message: clap::Error) -> ExitCode {
    let code = ExitCode::from(u8::try_from(message.exit_code()).unwrap_or(2));
    briefly(move || {
        message.print().ok();
    });
    code
}

/// Does what blocks for ever where nobody reads standard error, and gives it up after [`LAST_WORDS_TIMEOUT`].
pub(crate) fn briefly(last_words: impl FnOnce() + Send + 'static) {
    let (done, ended) = mpsc::channel();
    thread::spawn(move || {
        last_words();
        done.send(()).ok();
    });
    ended.recv_timeout(LAST_WORDS_TIMEOUT).ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_open_files_is_raised_as_far_as_it_goes() {
        assert_eq!(descriptors_suffice(1), Ok(()));
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        assert_eq!(current, maximum);
        if let Some(maximum) = maximum {
            let refusal = descriptors_suffice(maximum + 1).unwrap_err();
            assert!(refusal.contains(&format!("only {maximum} may be open")), "{refusal}");
        }
    }
}
