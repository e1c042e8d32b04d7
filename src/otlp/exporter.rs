//! The exporter of one signal, and the client that it sends with: this one repeats what may be repeated, waits where it is
//! asked to, counts, and says in the log what changes.

use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use opentelemetry_http::{HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{
    ExporterBuildError, MetricExporter, RetryPolicy, SpanExporter, WithExportConfig, WithHttpConfig,
};
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceResponse;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::pushes::Pushes;
use super::transport::{Answer, Failure, Reply, Retry, Transport};
use super::{Destination, OtlpError, Signal};
use crate::redact;
use crate::throttle::Throttle;

/// Pauses between attempts, doubled each time: a receiver that restarts is met within the first few, and one that is gone
/// is left in peace.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Of a receiver's words so many characters are logged.
const WORDS: usize = 200;

impl Destination {
    /// The exporter of metrics, and what is to be cancelled before the last push, which is not repeated then. Must be called
    /// within a Tokio runtime.
    pub(crate) fn metric_exporter(self) -> Result<(MetricExporter, CancellationToken), OtlpError> {
        let builder = MetricExporter::builder().with_temporality(self.temporality).with_http();
        let (builder, ending) = self.sending::<ExportMetricsServiceResponse, _>(builder)?;
        Ok((builder.build()?, ending))
    }

    /// The same of spans.
    pub(crate) fn span_exporter(self) -> Result<(SpanExporter, CancellationToken), OtlpError> {
        let builder = SpanExporter::builder().with_http();
        let (builder, ending) = self.sending::<ExportTraceServiceResponse, _>(builder)?;
        Ok((builder.build()?, ending))
    }

    /// Gives an exporter a client that sends over gRPC as well. Everything else of the exporter's is switched off: it reads
    /// headers, compression and timeout from the environment, and falls back in silence where they are malformed.
    fn sending<R: Reply, B: WithExportConfig + WithHttpConfig>(
        self,
        builder: B,
    ) -> Result<(B, CancellationToken), OtlpError> {
        // The URL is shown without its query; user and password are not in it.
        let receiver = redact::urls(&self.url.to_string()).trim_end_matches('/').to_owned();
        let ending = CancellationToken::new();
        let push = Push {
            signal: self.signal,
            receiver: receiver.clone(),
            transport: Transport::to(&self)?,
            timeout: self.timeout,
            ending: ending.clone(),
            pushes: Pushes::begin(self.signal),
            state: Mutex::default(),
        };
        let client = Client::<R> { push: Arc::new(push), runtime: Handle::current(), reply: PhantomData };
        let builder = builder
            .with_endpoint(receiver)
            .with_timeout(self.timeout)
            .with_retry_policy(RetryPolicy::disabled())
            // How much it takes is the receiver's to say.
            .with_max_request_body_size(usize::MAX)
            .with_http_client(client);
        Ok((builder, ending))
    }
}

impl From<ExporterBuildError> for OtlpError {
    fn from(error: ExporterBuildError) -> Self {
        Self::Build(redact::urls(&error.to_string()))
    }
}

/// What an exporter sends its messages with. May be called from any thread, and does its work on the runtime that it was
/// made in.
struct Client<R> {
    push: Arc<Push>,
    runtime: Handle,
    reply: PhantomData<fn() -> R>,
}

#[async_trait]
impl<R: Reply> HttpClient for Client<R> {
    /// Of the request the message alone counts. A response means that it was taken.
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (push, message) = (Arc::clone(&self.push), request.into_body());
        let pushed = self.runtime.spawn(async move {
            let outcome = push.repeatedly::<R>(push.transport.body(&message)).await;
            push.report(outcome, message.len())
        });
        pushed.await??;
        Ok(Response::new(Bytes::new()))
    }
}

impl<R> fmt::Debug for Client<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("receiver", &self.push.receiver).finish_non_exhaustive()
    }
}

/// The pushes of one signal.
struct Push {
    signal: Signal,
    /// The receiver's URL as it may be shown.
    receiver: String,
    transport: Transport,
    timeout: Duration,
    /// The bridge ends: what is pushed now is pushed once.
    ending: CancellationToken,
    pushes: &'static Pushes,
    state: Mutex<State>,
}

/// What the last pushes met.
#[derive(Default)]
struct State {
    /// The log says that they fail.
    is_trouble_known: bool,
    troubles: Throttle,
    /// The receiver does not want to be asked before.
    not_before: Option<Instant>,
    /// What it said last of what it rejected.
    rejection: Option<String>,
    rejections: Throttle,
}

impl Push {
    /// Tries until the time for one export is over.
    async fn repeatedly<R: Reply>(&self, body: Bytes) -> Result<Answer, String> {
        let deadline = Instant::now() + self.timeout;
        self.with_state(|state| match state.not_before.filter(|not_before| *not_before > Instant::now()) {
            Some(_) => Err("the receiver asked to wait".to_owned()),
            None => Ok(()),
        })?;
        let mut pause = FIRST_PAUSE;
        loop {
            let failure = match timeout_at(deadline, self.transport.send::<R>(body.clone())).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(failure)) => failure,
                Err(_) => {
                    self.transport.renew();
                    return Err(format!("no answer within {}", humantime::format_duration(self.timeout)));
                }
            };
            let Some(again) = self.next_attempt(&failure, pause).filter(|again| *again < deadline) else {
                return Err(failure.cause);
            };
            tokio::select! {
                () = tokio::time::sleep_until(again) => {}
                () = self.ending.cancelled() => return Err(failure.cause),
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// `None` where the same request would be refused again. What the receiver asks for holds for later pushes too.
    fn next_attempt(&self, failure: &Failure, pause: Duration) -> Option<Instant> {
        let now = Instant::now();
        match failure.retry {
            Retry::Never => None,
            // So that those who lost the same receiver do not all come back at once.
            Retry::Soon => Some(now + pause.mul_f64(rand::random_range(0.75..1.25))),
            Retry::After(wait) => {
                self.with_state(|state| state.not_before = Some(now + wait));
                Some(now + wait.max(pause))
            }
        }
    }

    fn with_state<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn report(&self, outcome: Result<Answer, String>, size: usize) -> Result<(), String> {
        let (what, receiver) = (self.signal.lower(), &self.receiver);
        let answer = outcome.inspect_err(|cause| {
            self.pushes.fail();
            if let Some(more_since_last) = self.with_state(State::begin_trouble) {
                warn!(more_since_last, "Pushing {what} to {receiver} fails: {cause}; trying again at every interval");
            }
        })?;
        if self.with_state(|state| std::mem::take(&mut state.is_trouble_known)) {
            info!("Pushing {what} to {receiver} works again");
        }
        self.report_rejections(&answer, size);
        Ok(())
    }

    /// Each of what was rejected took a byte at least, so that no receiver can make the count leap.
    fn report_rejections(&self, answer: &Answer, size: usize) {
        let rejected = u64::try_from(answer.rejected).unwrap_or(0).min(size as u64);
        self.pushes.reject(rejected);
        let message = redact::urls(&answer.message).chars().take(WORDS).collect::<String>();
        let rejection = (rejected > 0 || !message.is_empty()).then_some(message);
        let due = self.with_state(|state| {
            let changed = state.rejection != rejection;
            state.rejection.clone_from(&rejection);
            let message = rejection.filter(|_| changed)?;
            Some((message, state.rejections.due(Instant::now().into_std())?))
        });
        if let Some((message, more_since_last)) = due {
            let (what, receiver) = (self.signal.lower(), &self.receiver);
            warn!(more_since_last, "The receiver of {what} at {receiver} rejected {rejected} of them: {message:?}");
        }
    }
}

impl State {
    /// How many troubles were left out since the last one that was said, where this one is to be said.
    fn begin_trouble(&mut self) -> Option<u64> {
        if self.is_trouble_known {
            return None;
        }
        let due = self.troubles.due(Instant::now().into_std());
        self.is_trouble_known = due.is_some();
        due
    }
}
