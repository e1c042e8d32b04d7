//! OpenTelemetry providers for the push side, and the subscribers of the bridge's own log and spans.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use opentelemetry::metrics::MeterProvider;
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::resource::TelemetryResourceDetector;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::FilterFn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{Config, OtlpOptions};
use crate::fleet::Snapshot;
use crate::instruments::{self, Naming, Recorder};
use crate::log::{self, Log, LogError};
use crate::otlp::{Destination, Environment, OtlpError, Signal};
use crate::process;

/// Instrumentation scope of everything that the bridge exports.
pub(crate) const SCOPE: &str = "dynamo-metrics";

/// How long the last pushes may take together, of metrics and then of traces.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// What is left of it for the later one, at least. Who stops a container waits for ten seconds in all.
const LEAST_FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Why an exporter or the log cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// OTLP is misconfigured.
    #[error(transparent)]
    Otlp(#[from] OtlpError),
    /// The OpenTelemetry SDK's own complaint.
    #[error("OpenTelemetry: {0}")]
    Sdk(#[from] opentelemetry_sdk::error::OTelSdkError),
    /// There is no log.
    #[error(transparent)]
    Log(#[from] LogError),
}

/// The meter provider that pushes.
#[derive(Debug)]
pub struct MetricPush {
    provider: SdkMeterProvider,
    ending: CancellationToken,
}

impl MetricPush {
    /// Starts pushing, if an endpoint is configured. Must be called within a Tokio runtime.
    ///
    /// A provider of its own: one shared with the pull side would show a departed worker once more on the slower of the
    /// two readers.
    pub(crate) fn start(
        options: &OtlpOptions,
        fleet: &watch::Receiver<Arc<Snapshot>>,
        max_workers: usize,
    ) -> Result<Option<(Self, Recorder)>, TelemetryError> {
        let Some(destination) = Destination::of(Signal::Metrics, options, &process_environment())? else {
            return Ok(None);
        };
        let protocol = destination.protocol;
        let (exporter, ending) = destination.metric_exporter()?;
        let provider = SdkMeterProvider::builder()
            .with_resource(resource()?)
            .with_reader(PeriodicReader::builder(exporter).build())
            .with_view(instruments::room_for(max_workers))
            .build();
        let recorder = instruments::register(&provider.meter(SCOPE), Naming::Otlp, fleet);
        info!("Pushing metrics by OTLP ({protocol:?})");
        Ok(Some((Self { provider, ending }, recorder)))
    }

    /// Pushes once more and ends. Gives up after [`FLUSH_TIMEOUT`].
    pub(crate) async fn shutdown(self) {
        self.ending.cancel();
        end_in_time("metrics", move || self.provider.shutdown()).await;
    }
}

/// The process's log, and its spans on their way to the collector.
#[derive(Debug)]
pub struct Tracing {
    export: Option<(SdkTracerProvider, CancellationToken)>,
    _log: Log,
}

impl Tracing {
    /// Installs the log (`DYN_LOG`, `DYN_LOGGING_JSONL`) and, where an OTLP endpoint is configured, the export of spans.
    /// Must be called within a Tokio runtime, once.
    ///
    /// # Errors
    /// A malformed variable, or a second call.
    pub fn start(config: &Config) -> Result<Self, TelemetryError> {
        process::install_crypto();
        let destination = Destination::of(Signal::Traces, &config.otlp, &process_environment())?;
        let export = match destination {
            Some(destination) => {
                let (exporter, ending) = destination.span_exporter()?;
                let provider = SdkTracerProvider::builder().with_resource(resource()?).with_batch_exporter(exporter);
                Some((provider.build(), ending))
            }
            None => None,
        };
        let spans = export.as_ref().map(|(provider, _)| {
            // Without the filter the transport's own spans would be exported, and make new ones.
            let own = FilterFn::new(|metadata| metadata.target().starts_with("dynamo_metrics"));
            // Line numbers, threads and busy times would outweigh what the span says.
            tracing_opentelemetry::layer()
                .with_tracer(provider.tracer(SCOPE))
                .with_location(false)
                .with_threads(false)
                .with_target(false)
                .with_tracked_inactivity(false)
                .with_filter(own)
        });
        let (layer, log) = log::layer()?;
        tracing_subscriber::registry().with(layer).with(spans).try_init().map_err(LogError::from)?;
        Ok(Self { export, _log: log })
    }

    /// Exports the last spans and writes the last lines. Gives up [`FLUSH_TIMEOUT`] after the last push began, or after
    /// [`LEAST_FLUSH_TIMEOUT`].
    pub async fn shutdown(self) {
        if let Some((provider, ending)) = self.export {
            ending.cancel();
            end_in_time("traces", move || provider.shutdown()).await;
        }
    }
}

fn process_environment() -> Environment<'static> {
    Environment(&|name| std::env::var(name).ok())
}

/// Who pushes. `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SERVICE_NAME` win over the defaults.
fn resource() -> Result<Resource, OtlpError> {
    let defaults = [
        KeyValue::new("service.name", SCOPE),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", instance_id()),
    ];
    let given = process_environment().resource_attributes()?;
    let resource = Resource::builder_empty().with_attributes(defaults);
    Ok(resource.with_detector(Box::new(TelemetryResourceDetector)).with_attributes(given).build())
}

/// The same for metrics and traces, another one at each start: a random UUID.
fn instance_id() -> &'static str {
    static ID: OnceLock<String> = OnceLock::new();
    ID.get_or_init(|| {
        // Version 4, variant 1 (RFC 9562).
        let random = rand::random::<u128>() & !(0xf000 << 64) & !(0b11 << 62) | (0x4000 << 64) | (0b10 << 62);
        let hex = format!("{random:032x}");
        format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
    })
}

/// Runs a provider's shutdown, which blocks and may overrun its own timeout.
async fn end_in_time<E: std::fmt::Display + Send + 'static>(
    what: &str,
    shutdown: impl FnOnce() -> Result<(), E> + Send + 'static,
) {
    static BEGIN: OnceLock<Instant> = OnceLock::new();
    let limit = flush_timeout(BEGIN.get_or_init(Instant::now).elapsed());
    match tokio::time::timeout(limit, tokio::task::spawn_blocking(shutdown)).await {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(error))) => warn!("The last {what} were not pushed: {error}"),
        Ok(Err(error)) => warn!("The last {what} were not pushed: {error}"),
        Err(_) => warn!("The last {what} were not pushed within {limit:.0?}"),
    }
}

/// How long a last push may take, so long after the first one began.
fn flush_timeout(since: Duration) -> Duration {
    FLUSH_TIMEOUT.saturating_sub(since).max(LEAST_FLUSH_TIMEOUT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_pushes_take_one_time_together() {
        assert_eq!(flush_timeout(Duration::ZERO), FLUSH_TIMEOUT);
        assert_eq!(flush_timeout(Duration::from_secs(2)), Duration::from_secs(3));
        assert_eq!(flush_timeout(FLUSH_TIMEOUT * 2), LEAST_FLUSH_TIMEOUT);
    }

    #[test]
    fn the_instance_id_is_a_random_uuid() {
        let id = instance_id();
        let parts: Vec<usize> = id.split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12]);
        assert_eq!(id.as_bytes()[14], b'4');
        assert!(matches!(id.as_bytes()[19], b'8' | b'9' | b'a' | b'b'));
    }
}
