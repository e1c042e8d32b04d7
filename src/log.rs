//! The log: what is written (`DYN_LOG`), in which form (`DYN_LOGGING_JSONL`), and by whom: a thread of its own, so that a pipe
//! that is full and not read holds up nothing but the log.

use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;

use tracing::level_filters::LevelFilter;
use tracing::{Subscriber, warn};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{EnvFilter, FilterExt, FilterFn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{Layer, fmt};

use crate::{process, redact};

/// What is written where `DYN_LOG` does not say.
const DEFAULT_FILTER: &str = "info,async_nats=off,kube_client=off";
/// Lines that wait for the writer; further ones are left out.
const WAITING_LINES: usize = 4096;
/// Characters of what is wrong that are shown.
const LONGEST_SHOWN: usize = 100;
/// What a word without a level can mean: Dynamo's own crates, since a deployment has one `DYN_LOG` for all, and those in this
/// process that write to the log.
const TARGETS: [&str; 16] = [
    "dynamo",
    "metrics",
    "mock_worker",
    "async_nats",
    "axum",
    "h2",
    "hyper",
    "kube",
    "mio",
    "opentelemetry",
    "reqwest",
    "rustls",
    "tokio",
    "tonic",
    "tower",
    "want",
];

/// Counts the lines that were left out since the start.
static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

/// Why there is no log. One line each, with what to change.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// `DYN_LOG` is no filter.
    #[error(
        "DYN_LOG must be one of the levels error, warn, info, debug, trace and off, or name targets too, such as info,async_nats=warn; {0:?} is neither"
    )]
    Filter(String),
    /// Another subscriber is installed already.
    #[error("the log cannot be set up: {0}")]
    Subscriber(#[from] TryInitError),
}

/// Writes what waits when it is dropped, as far as that takes no longer than a second or two.
#[derive(Debug)]
pub struct Log(Option<WorkerGuard>);

impl Drop for Log {
    fn drop(&mut self) {
        let guard = self.0.take();
        process::briefly(move || drop(guard));
    }
}

/// Installs the log alone.
///
/// # Errors
/// A malformed variable, or a second call.
pub fn start() -> Result<Log, LogError> {
    let (layer, log) = layer()?;
    tracing_subscriber::registry().with(layer).try_init()?;
    Ok(log)
}

/// Lines left out since the start because the log was not read fast enough.
pub(crate) fn lines_dropped() -> u64 {
    DROPPED.get().map_or(0, |counter| counter.dropped_lines() as u64)
}

/// The log as a part of a subscriber.
pub(crate) fn layer<S>() -> Result<(Box<dyn Layer<S> + Send + Sync>, Log), LogError>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let variable = |name| std::env::var_os(name).unwrap_or_default().to_string_lossy().into_owned();
    let filter = filter(&variable("DYN_LOG"))?;
    let writer = NonBlockingBuilder::default().buffered_lines_limit(WAITING_LINES).thread_name("log");
    let (writer, guard) = writer.finish(StandardError { said: 0 });
    DROPPED.get_or_init(|| writer.error_counter());
    let layer = fmt::layer().with_writer(writer);
    let is_jsonl = is_truthy(&variable("DYN_LOGGING_JSONL"));
    let layer = if is_jsonl {
        layer.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
    } else {
        layer.with_ansi(io::stderr().is_terminal()).boxed()
    };
    Ok((layer.with_filter(filter.and(FilterFn::new(redact::may_be_logged))).boxed(), Log(Some(guard))))
}

/// Reads `DYN_LOG`. A misspelt level would otherwise be a target that nothing has, and the log silent for good.
fn filter(text: &str) -> Result<EnvFilter, LogError> {
    let parts: Vec<_> = text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    if parts.is_empty() {
        return filter(DEFAULT_FILTER);
    }
    for part in &parts {
        let refusal = || LogError::Filter(part.chars().take(LONGEST_SHOWN).collect());
        EnvFilter::try_new(part).map_err(|_| refusal())?;
        let target = part.split(['=', '[']).next().unwrap_or_default();
        let is_alone = target.len() == part.len();
        if !is_path(target) || (is_alone && !is_level(part) && !is_known(part)) {
            return Err(refusal());
        }
    }
    EnvFilter::try_new(parts.join(",")).map_err(|_| LogError::Filter(text.trim().to_owned()))
}

fn is_path(target: &str) -> bool {
    target.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | ':' | '-' | '.'))
}

fn is_level(word: &str) -> bool {
    word.parse::<LevelFilter>().is_ok()
}

fn is_known(target: &str) -> bool {
    let starts_with = |known: &&str| {
        target.strip_prefix(*known).is_some_and(|rest| rest.is_empty() || rest.starts_with(['_', ':', '-']))
    };
    TARGETS.iter().any(starts_with)
}

/// The words that Dynamo takes for yes.
fn is_truthy(value: &str) -> bool {
    ["1", "true", "on", "yes"].contains(&value.trim().to_lowercase().as_str())
}

/// Where the lines go, and how many of those left out were reported.
struct StandardError {
    said: u64,
}

impl Write for StandardError {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        io::stderr().write(line)
    }

    /// Comes when no line waits any more, so that there is room again.
    fn flush(&mut self) -> io::Result<()> {
        let left_out = lines_dropped();
        let new = left_out - self.said;
        self.said = left_out;
        if new > 0 {
            warn!("{new} log lines were left out, since the log was not read fast enough");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_filter_is_taken_with_blanks_around_it() {
        for (text, meant) in [
            ("", "kube_client=off,async_nats=off,info"),
            (" , ", "kube_client=off,async_nats=off,info"),
            ("info", "info"),
            ("info\n", "info"),
            (" debug", "debug"),
            ("WARN", "warn"),
            ("off", "off"),
            ("3", "info"),
            ("info, async_nats=warn", "async_nats=warn,info"),
            ("info,async_nats=warn,\n", "async_nats=warn,info"),
            ("dynamo_metrics::source=debug", "dynamo_metrics::source=debug"),
            ("metrics=OFF", "metrics=off"),
            ("dynamo_metrics", "dynamo_metrics=trace"),
            ("async_nats::connection", "async_nats::connection=trace"),
            ("info,dynamo_llm::kv_router=trace", "dynamo_llm::kv_router=trace,info"),
            ("info,somebody_elses=debug", "somebody_elses=debug,info"),
            ("[scrape]=debug", "[scrape]=debug"),
            (
                "warn,dynamo_metrics[scrape{outcome=\"failed\"}]=debug",
                "warn,dynamo_metrics[scrape{outcome=\"failed\"}]=debug",
            ),
        ] {
            assert_eq!(filter(text).unwrap().to_string(), meant, "{text:?}");
        }
    }

    #[test]
    fn what_would_silence_the_log_by_mistake_is_refused_by_its_name() {
        for (text, wrong) in [
            ("verbose", "verbose"),
            ("warning", "warning"),
            ("info,warning", "warning"),
            ("6", "6"),
            ("inf", "inf"),
            ("information", "information"),
            ("metricsx", "metricsx"),
            ("info;async_nats=warn", "info;async_nats=warn"),
            ("info async_nats=warn", "info async_nats=warn"),
            ("info,async_nats=warning", "async_nats=warning"),
            ("info,async_nats=9", "async_nats=9"),
            ("=nonsense=", "=nonsense="),
            ("\"info\"", "\"info\""),
            ("debug\ninfo", "debug\ninfo"),
        ] {
            let error = filter(text).unwrap_err();
            assert!(matches!(&error, LogError::Filter(part) if part == wrong), "{text:?}: {error}");
            let error = error.to_string();
            assert!(error.starts_with("DYN_LOG ") && error.contains("debug") && error.lines().count() == 1, "{error}");
        }
        let long = filter(&"x".repeat(100_000)).unwrap_err().to_string();
        assert!(long.len() < 500, "{} characters", long.len());
    }
}
