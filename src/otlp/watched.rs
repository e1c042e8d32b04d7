//! Exporters whose failures are told, once and with their cause.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use opentelemetry_http::{Bytes, HttpError, Request, Response};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::metrics::Temporality;
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::trace::SpanData;
use tracing::{info, warn};

use crate::causes::with_causes;

/// What the transport met last. The exporters themselves only say "network error".
#[derive(Debug, Clone, Default)]
pub(super) struct Cause(Arc<Mutex<Option<String>>>);

impl Cause {
    fn set(&self, cause: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(cause);
    }

    fn take(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// An HTTP client that keeps the cause of its last failure.
#[derive(Debug)]
pub(super) struct HttpClient {
    client: reqwest::blocking::Client,
    cause: Cause,
}

impl HttpClient {
    pub(super) fn new(client: reqwest::blocking::Client, cause: &Cause) -> Self {
        Self { client, cause: cause.clone() }
    }
}

#[async_trait]
impl opentelemetry_http::HttpClient for HttpClient {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let response = opentelemetry_http::HttpClient::send_bytes(&self.client, request).await;
        response.inspect_err(|error| self.cause.set(with_causes(&**error)))
    }
}

/// An exporter that says in the log when it starts to fail, and when it works again.
pub(crate) struct Watched<E> {
    inner: E,
    what: &'static str,
    host: String,
    cause: Cause,
    failing: AtomicBool,
}

impl<E> Watched<E> {
    pub(super) fn new(inner: E, what: &'static str, host: &str, cause: Cause) -> Self {
        Self { inner, what, host: host.to_owned(), cause, failing: AtomicBool::new(false) }
    }

    fn heed(&self, result: OTelSdkResult) -> OTelSdkResult {
        let was_failing = self.failing.swap(result.is_err(), Ordering::Relaxed);
        match &result {
            Err(error) if !was_failing => {
                let cause = self.cause.take().map(|cause| format!(" ({cause})")).unwrap_or_default();
                warn!("Pushing {} to {} fails: {error}{cause}; trying again at every interval", self.what, self.host);
            }
            Ok(()) if was_failing => info!("Pushing {} to {} works again", self.what, self.host),
            _ => {}
        }
        result
    }
}

impl<E> fmt::Debug for Watched<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("what", &self.what).finish_non_exhaustive()
    }
}

impl<E: PushMetricExporter> PushMetricExporter for Watched<E> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        self.heed(self.inner.export(metrics).await)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.inner.temporality()
    }
}

impl<E: opentelemetry_sdk::trace::SpanExporter> opentelemetry_sdk::trace::SpanExporter for Watched<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.heed(self.inner.export(batch).await)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}
