//! The Prometheus text of the fleet, encoded once for each refreshed fleet however often it is pulled.

use std::io::Write;
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
use crate::telemetry::{SCOPE, TelemetryError};

/// Why there is no text. None of it is the client's fault.
#[derive(Debug, thiserror::Error)]
pub enum ExpositionError {
    /// The encoder refused a metric.
    #[error("cannot encode the metrics: {0}")]
    Encode(#[from] prometheus::Error),
    /// The compressor failed.
    #[error("cannot compress the metrics: {0}")]
    Compress(#[from] std::io::Error),
    /// The encoding task was ended.
    #[error("the encoding was interrupted: {0}")]
    Interrupted(#[from] tokio::task::JoinError),
}

/// A meter provider of its own, and the text of its last collect.
#[derive(Debug)]
pub struct Exposition {
    registry: Registry,
    fleet: watch::Receiver<Arc<Snapshot>>,
    last: Mutex<Option<Encoded>>,
    /// Collects nothing any more once it is dropped.
    _provider: SdkMeterProvider,
}

#[derive(Debug)]
struct Encoded {
    generation: u64,
    text: Bytes,
    /// Made when it is first asked for.
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
        let recorder = instruments::register(&provider.meter(SCOPE), Naming::Prometheus, &fleet);
        Ok((Self { registry, fleet, last: Mutex::new(None), _provider: provider }, recorder))
    }

    /// The text of the last refreshed fleet, gzipped or not. Whoever comes while it is being encoded waits for the same
    /// bytes.
    ///
    /// Cancel safe: what was encoded for a client that left is encoded again for the next one.
    ///
    /// # Errors
    /// See [`ExpositionError`].
    pub async fn current(&self, gzip: bool) -> Result<Bytes, ExpositionError> {
        let mut last = self.last.lock().await;
        let generation = self.fleet.borrow().generation;
        let mut encoded = match last.take() {
            Some(encoded) if encoded.generation == generation => encoded,
            _ => Encoded { generation, text: self.encode().await?, gzip: None },
        };
        let bytes = if gzip { encoded.gzip().await? } else { encoded.text.clone() };
        *last = Some(encoded);
        Ok(bytes)
    }

    /// Takes some 25 µs a worker of a large fleet: not on a thread that others wait for.
    async fn encode(&self) -> Result<Bytes, ExpositionError> {
        let registry = self.registry.clone();
        let encode = move || {
            let mut text = Vec::new();
            TextEncoder::new().encode(&registry.gather(), &mut text).map(|()| Bytes::from(text))
        };
        Ok(tokio::task::spawn_blocking(encode).await??)
    }
}

impl Encoded {
    async fn gzip(&mut self) -> Result<Bytes, ExpositionError> {
        if let Some(gzip) = &self.gzip {
            return Ok(gzip.clone());
        }
        let text = self.text.clone();
        let compress = move || {
            // Label sets repeat so much that the fastest level already leaves an eighth.
            let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(&text)?;
            encoder.finish().map(Bytes::from)
        };
        let gzip = tokio::task::spawn_blocking(compress).await??;
        Ok(self.gzip.insert(gzip).clone())
    }
}
