//! The Prometheus text of the fleet, encoded once for each refreshed fleet however often it is pulled.

use std::io::{self, Write};
use std::sync::Arc;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use opentelemetry::metrics::MeterProvider;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use prometheus::{Encoder, Registry, TextEncoder};
use tokio::sync::{Mutex, watch};

use crate::fleet::Snapshot;
use crate::instruments::{self, Naming, Recorder};
use crate::process;
use crate::telemetry::{SCOPE, TelemetryError};

/// Why there is no text. None of it is the client's fault.
#[derive(Debug, thiserror::Error)]
pub enum ExpositionError {
    /// The encoder refused a metric.
    #[error("cannot encode the metrics: {0}")]
    Encode(#[from] prometheus::Error),
    /// The compressor failed.
    #[error("cannot compress the metrics: {0}")]
    Compress(#[from] io::Error),
    /// Nothing encodes.
    #[error("the encoding was interrupted: {0}")]
    Interrupted(io::Error),
}

/// A meter provider of its own, and the text of its last collect.
#[derive(Debug)]
pub struct Exposition {
    registry: Registry,
    fleet: watch::Receiver<Arc<Snapshot>>,
    /// The fleet that all of one text is about, though it is refreshed meanwhile.
    collected: watch::Sender<Arc<Snapshot>>,
    last: Arc<Mutex<Encoded>>,
    /// Collects nothing any more once it is dropped.
    _provider: SdkMeterProvider,
}

/// Each is made when it is first asked for.
#[derive(Debug, Default)]
struct Encoded {
    generation: u64,
    text: Option<Bytes>,
    gzip: Option<Bytes>,
}

impl Exposition {
    /// Registers the catalogue for a fleet of at most `max_workers`.
    ///
    /// # Errors
    /// The exporter refuses its registry.
    pub fn new(fleet: watch::Receiver<Arc<Snapshot>>, max_workers: usize) -> Result<(Self, Recorder), TelemetryError> {
        let registry = Registry::new();
        let exporter = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            .without_counter_suffixes()
            .without_units()
            .without_target_info()
            .scope_info_enabled(false)
            .build()?;
        let view = instruments::room_for(max_workers);
        let provider = SdkMeterProvider::builder().with_reader(exporter).with_view(view).build();
        let (collected, snapshot) = watch::channel(Arc::default());
        let recorder = instruments::register(&provider.meter(SCOPE), Naming::Prometheus, &snapshot);
        Ok((Self { registry, fleet, collected, last: Arc::default(), _provider: provider }, recorder))
    }

    /// The text of the last refreshed fleet, gzipped or not. Whoever comes while it is being encoded waits for the same
    /// bytes.
    ///
    /// Takes some 25 µs a worker of a large fleet: not on a thread that others wait for.
    ///
    /// Cancel safe: what was begun for a client that left is there for the next one.
    ///
    /// # Errors
    /// See [`ExpositionError`].
    pub async fn current(&self, gzip: bool) -> Result<Bytes, ExpositionError> {
        let mut last = Arc::clone(&self.last).lock_owned().await;
        let fleet = Arc::clone(&self.fleet.borrow());
        if last.generation != fleet.generation {
            *last = Encoded { generation: fleet.generation, ..Encoded::default() };
            self.collected.send_replace(fleet);
        }
        if let Some(bytes) = if gzip { &last.gzip } else { &last.text } {
            return Ok(bytes.clone());
        }
        let registry = self.registry.clone();
        let encode = move || if gzip { last.gzip(&registry) } else { last.text(&registry) };
        process::apart("encode", encode).await.map_err(ExpositionError::Interrupted)?
    }
}

impl Encoded {
    fn text(&mut self, registry: &Registry) -> Result<Bytes, ExpositionError> {
        if let Some(text) = &self.text {
            return Ok(text.clone());
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&registry.gather(), &mut text)?;
        Ok(self.text.insert(text.into()).clone())
    }

    fn gzip(&mut self, registry: &Registry) -> Result<Bytes, ExpositionError> {
        // Label sets repeat so much that the fastest level already leaves an eighth.
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&self.text(registry)?)?;
        Ok(self.gzip.insert(encoder.finish()?.into()).clone())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_fleet_that_is_refreshed_while_a_text_is_made_is_that_of_the_next_text() {
        let snapshot =
            |generation| Arc::new(Snapshot { generation, by_events_alone: generation, ..Snapshot::default() });
        let (published, fleet) = watch::channel(snapshot(1));
        let (exposition, _recorder) = Exposition::new(fleet, 1).unwrap();
        let shows = |text: &[u8], generation| {
            let line = format!("\ndynamo_bridge_workers_by_events_alone {generation}\n");
            assert!(String::from_utf8_lossy(text).contains(&line), "{generation}");
        };
        shows(&exposition.current(false).await.unwrap(), 1);
        published.send_replace(snapshot(2));
        let mut collected = Vec::new();
        TextEncoder::new().encode(&exposition.registry.gather(), &mut collected).unwrap();
        shows(&collected, 1);
        shows(&exposition.current(false).await.unwrap(), 2);
    }

    #[test]
    fn what_waits_in_the_pool_of_all_keeps_nobody_from_the_text() {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().max_blocking_threads(1).build().unwrap();
        let (answer, waits) = std::sync::mpsc::channel::<()>();
        let (_published, fleet) = watch::channel(Arc::new(Snapshot { generation: 1, ..Snapshot::default() }));
        let (exposition, _recorder) = Exposition::new(fleet, 1).unwrap();
        let waiting = runtime.spawn_blocking(move || waits.recv());
        runtime.block_on(async {
            for gzip in [false, true, true] {
                let pulled = tokio::time::timeout(Duration::from_secs(60), exposition.current(gzip)).await;
                assert!(!pulled.expect("it does not wait").unwrap().is_empty());
            }
        });
        assert!(!waiting.is_finished());
        drop(answer);
    }
}
