//! One request and its answer, over gRPC or HTTP.

use std::error::Error;
use std::io::Write;
use std::marker::PhantomData;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};
use bytes::{BufMut, Bytes};
use flate2::Compression;
use flate2::write::GzEncoder;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceResponse;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use prost::Message;
use tonic::codec::{BufferSettings, Codec, CompressionEncoding, EncodeBuf, Encoder};
use tonic::metadata::MetadataMap;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Extensions, Request, Status};
use tonic_prost::ProstDecoder;
use tonic_types::StatusExt;

use super::{Destination, OtlpError};
use crate::causes::with_causes;
use crate::config::OtlpProtocol;
use crate::tls::{self, Refusal};

const USER_AGENT: &str = concat!("dynamo-metrics/", env!("CARGO_PKG_VERSION"));
const PROTOBUF: &str = "application/x-protobuf";
/// A connection is given up after this, so that there is time for another one.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The kernel asks an idle connection whether it lives: after this, so often, and so many times in vain.
const TCP_KEEP_ALIVE: (Duration, Duration, u32) = (Duration::from_secs(15), Duration::from_secs(5), 3);
/// An HTTP connection that was idle for longer is not used again: nothing tells whether it still leads anywhere.
const IDLE: Duration = Duration::from_secs(10);
/// Retry-After and `RetryInfo` are believed up to this.
const LONGEST_WAIT: Duration = Duration::from_secs(10 * 60);
/// Of an answer no more is read: it holds a number and a sentence.
const LARGEST_ANSWER: usize = 64 * 1024;

/// What a receiver says of what it took.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    /// Data points or spans that it did not take.
    pub(super) rejected: i64,
    /// Why, or what else it has to say.
    pub(super) message: String,
}

/// An answer as it comes from the call of one signal.
pub(super) trait Reply: Message + Default + 'static {
    /// Of the call.
    const PATH: &'static str;

    fn answer(self) -> Answer;
}

impl Reply for ExportMetricsServiceResponse {
    const PATH: &'static str = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export";

    fn answer(self) -> Answer {
        let partial = self.partial_success.unwrap_or_default();
        Answer { rejected: partial.rejected_data_points, message: partial.error_message }
    }
}

impl Reply for ExportTraceServiceResponse {
    const PATH: &'static str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";

    fn answer(self) -> Answer {
        let partial = self.partial_success.unwrap_or_default();
        Answer { rejected: partial.rejected_spans, message: partial.error_message }
    }
}

/// Why a request was not taken.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) cause: String,
    pub(super) retry: Retry,
}

/// Whether the same request may be taken later, by OTLP's rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Retry {
    Never,
    /// The bridge chooses when.
    Soon,
    /// The receiver does.
    After(Duration),
}

impl Failure {
    fn new(cause: impl Into<String>, retry: Retry) -> Self {
        Self { cause: cause.into(), retry }
    }
}

/// A way to a receiver.
pub(super) enum Transport {
    Grpc(Box<Grpc>),
    Http(Http),
}

impl Transport {
    /// Must be called within a Tokio runtime.
    pub(super) fn to(destination: &Destination) -> Result<Self, OtlpError> {
        match destination.protocol {
            OtlpProtocol::Grpc => Grpc::to(destination).map(|grpc| Self::Grpc(Box::new(grpc))),
            OtlpProtocol::HttpProtobuf => Http::to(destination).map(Self::Http),
        }
    }

    /// What every attempt to push `message` sends.
    pub(super) fn body(&self, message: &Bytes) -> Bytes {
        match self {
            Self::Http(http) if http.gzip => gzip(message).map_or_else(|| message.clone(), Bytes::from),
            _ => message.clone(),
        }
    }

    /// Cancelling it gives the request up.
    pub(super) async fn send<R: Reply>(&self, body: Bytes) -> Result<Answer, Failure> {
        match self {
            Self::Grpc(grpc) => grpc.send::<R>(body).await,
            Self::Http(http) => http.send::<R>(body).await,
        }
    }

    /// The next request takes a new connection: on the present one nobody answered in time.
    pub(super) fn renew(&self) {
        // Over HTTP/1.1 a connection with a request that was given up is closed anyway.
        if let Self::Grpc(grpc) = self {
            *grpc.channel.lock().unwrap_or_else(PoisonError::into_inner) = grpc.endpoint.connect_lazy();
        }
    }
}

fn gzip(message: &[u8]) -> Option<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(message).ok()?;
    encoder.finish().ok()
}

/// gRPC over one connection.
pub(super) struct Grpc {
    endpoint: Endpoint,
    channel: Mutex<Channel>,
    metadata: MetadataMap,
    gzip: bool,
}

impl Grpc {
    fn to(destination: &Destination) -> Result<Self, OtlpError> {
        let unusable = |error: tonic::transport::Error| OtlpError::Certificates(with_causes(&error));
        let (idle, interval, retries) = TCP_KEEP_ALIVE;
        // A connection that leads nowhere is known for one while a push waits for its answer, with time left for another
        // one. That is three pings a push at most, and none between pushes: grpc-go, and so the Collector, closes a connection
        // at the fourth without an answer in between.
        let mut endpoint = Endpoint::from(destination.url.clone())
            .user_agent(USER_AGENT)
            .map_err(unusable)?
            .connect_timeout(CONNECT_TIMEOUT.min(destination.timeout / 2))
            .tcp_keepalive(Some(idle))
            .tcp_keepalive_interval(Some(interval))
            .tcp_keepalive_retries(Some(retries))
            .http2_keep_alive_interval(destination.timeout.mul_f64(0.4))
            .keep_alive_timeout(destination.timeout.mul_f64(0.3));
        if destination.url.scheme_str() == Some("https") {
            let mut tls = ClientTlsConfig::new();
            tls = match &destination.certificates.authority {
                Some(authority) => tls.ca_certificate(Certificate::from_pem(authority)),
                None => tls.with_enabled_roots(),
            };
            if let Some((certificate, key)) = &destination.certificates.identity {
                tls = tls.identity(Identity::from_pem(certificate, key));
            }
            endpoint = endpoint.tls_config(tls).map_err(unusable)?;
        }
        let channel = Mutex::new(endpoint.connect_lazy());
        let metadata = MetadataMap::from_headers(destination.headers.clone());
        Ok(Self { endpoint, channel, metadata, gzip: destination.gzip })
    }

    async fn send<R: Reply>(&self, body: Bytes) -> Result<Answer, Failure> {
        let channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut client = tonic::client::Grpc::new(channel);
        if self.gzip {
            client = client.send_compressed(CompressionEncoding::Gzip).accept_compressed(CompressionEncoding::Gzip);
        }
        let request = Request::from_parts(self.metadata.clone(), Extensions::default(), body);
        client.ready().await.map_err(|error| undelivered(with_causes(&error), &error))?;
        let response = client.unary(request, PathAndQuery::from_static(R::PATH), Encoded::<R>(PhantomData)).await;
        response.map(|response| response.into_inner().answer()).map_err(|status| refused(&status))
    }
}

/// There was no way to the receiver. A certificate that one side does not take now is taken no more at once.
fn undelivered(cause: String, error: &(dyn Error + 'static)) -> Failure {
    let check = match tls::refusal(error) {
        None => return Failure::new(cause, Retry::Soon),
        Some(Refusal::OfServer) => {
            "OTEL_EXPORTER_OTLP_CERTIFICATE, and that the certificate names the host of the endpoint"
        }
        Some(Refusal::OfClient) => "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and OTEL_EXPORTER_OTLP_CLIENT_KEY",
    };
    Failure::new(format!("{cause}; check {check}"), Retry::Never)
}

/// The receiver's own words are left out: it may repeat what it was sent.
fn refused(status: &Status) -> Failure {
    let mut cause = format!("gRPC status {:?}", status.code());
    let transport = Error::source(status);
    if let Some(transport) = transport {
        cause = format!("{cause}: {}", with_causes(transport));
        if tls::refusal(transport).is_some() {
            return undelivered(cause, transport);
        }
    }
    let asked = status.get_details_retry_info().and_then(|info| info.retry_delay).map(wait);
    let retry = match status.code() {
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss => asked.unwrap_or(Retry::Soon),
        // Without the receiver's word that it will be over, it will not.
        Code::ResourceExhausted => asked.unwrap_or(Retry::Never),
        _ if transport.is_some() => Retry::Soon,
        _ => Retry::Never,
    };
    Failure { cause, retry }
}

fn wait(asked: Duration) -> Retry {
    Retry::After(asked.min(LONGEST_WAIT))
}

/// Requests that are bytes already, so that an attempt more costs no encoding.
struct Encoded<R>(PhantomData<R>);

struct Verbatim;

impl<R: Reply> Codec for Encoded<R> {
    type Encode = Bytes;
    type Decode = R;
    type Encoder = Verbatim;
    type Decoder = ProstDecoder<R>;

    fn encoder(&mut self) -> Verbatim {
        Verbatim
    }

    fn decoder(&mut self) -> ProstDecoder<R> {
        ProstDecoder::new(BufferSettings::default())
    }
}

impl Encoder for Verbatim {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

/// HTTP with protobuf.
pub(super) struct Http {
    client: reqwest::Client,
    url: Uri,
    headers: HeaderMap,
    gzip: bool,
}

impl Http {
    fn to(destination: &Destination) -> Result<Self, OtlpError> {
        let unusable = |error: reqwest::Error| OtlpError::Certificates(with_causes(&error));
        let (idle, interval, retries) = TCP_KEEP_ALIVE;
        // A redirect would take the headers, and what is secret in them, to whoever is named there.
        let mut client = reqwest::Client::builder()
            .user_agent(USER_AGENT)
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT.min(destination.timeout / 2))
            .tcp_keepalive(idle)
            .tcp_keepalive_interval(interval)
            .tcp_keepalive_retries(retries)
            .pool_idle_timeout(IDLE);
        if let Some(authority) = &destination.certificates.authority {
            client = client.tls_certs_only(reqwest::Certificate::from_pem_bundle(authority).map_err(unusable)?);
        }
        if let Some((certificate, key)) = &destination.certificates.identity {
            let pem = [&certificate[..], b"\n", &key[..]].concat();
            client = client.identity(reqwest::Identity::from_pem(&pem).map_err(unusable)?);
        }
        let mut headers = destination.headers.clone();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROTOBUF));
        if destination.gzip {
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        let client = client.build().map_err(unusable)?;
        Ok(Self { client, url: destination.url.clone(), headers, gzip: destination.gzip })
    }

    async fn send<R: Reply>(&self, body: Bytes) -> Result<Answer, Failure> {
        let unsent = |error: reqwest::Error| undelivered(with_causes(&error), &error);
        let request = self.client.post(self.url.to_string()).headers(self.headers.clone()).body(body);
        let mut response = request.send().await.map_err(unsent)?;
        let status = response.status();
        if !status.is_success() {
            return Err(self.unsuccessful(status, response.headers()));
        }
        let mut answer = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(unsent)? {
            answer.extend_from_slice(&chunk);
            if answer.len() > LARGEST_ANSWER {
                break;
            }
        }
        let kind = text(response.headers(), &header::CONTENT_TYPE).unwrap_or_default();
        read::<R>(kind, &answer).ok_or_else(|| {
            let cause = format!("HTTP status {status}, but with no answer of an OTLP receiver");
            Failure::new(cause, Retry::Never)
        })
    }

    fn unsuccessful(&self, status: StatusCode, headers: &HeaderMap) -> Failure {
        let retry = match status.as_u16() {
            429 | 502..=504 => text(headers, &header::RETRY_AFTER).and_then(retry_after).unwrap_or(Retry::Soon),
            _ => Retry::Never,
        };
        let mut cause = format!("HTTP status {status}");
        if status.is_redirection() {
            let here = reqwest::Url::parse(&self.url.to_string()).ok();
            let there = text(headers, &header::LOCATION).and_then(|location| here?.join(location).ok());
            let there = there.map_or("nowhere".to_owned(), |url| url.origin().ascii_serialization());
            cause = format!("{cause}: it redirects to {there}, which is not followed");
        }
        Failure { cause, retry }
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// In seconds, or a date.
fn retry_after(value: &str) -> Option<Retry> {
    if let Ok(seconds) = value.trim().parse() {
        return Some(wait(Duration::from_secs(seconds)));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(wait(date.duration_since(SystemTime::now()).unwrap_or_default()))
}

/// The answer of an OTLP receiver; `None` where it is something else, such as the page of a login. Receivers exist that
/// answer with nothing, or with JSON.
fn read<R: Reply>(kind: &str, answer: &[u8]) -> Option<Answer> {
    match kind.split(';').next().unwrap_or_default().trim() {
        _ if answer.is_empty() => Some(Answer::default()),
        PROTOBUF => R::decode(answer).ok().map(Reply::answer),
        "application/json" => json(answer),
        _ => None,
    }
}

fn json(answer: &[u8]) -> Option<Answer> {
    let answer: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(answer).ok()?;
    if answer.keys().any(|key| key != "partialSuccess") {
        return None;
    }
    let partial = answer.get("partialSuccess").cloned().unwrap_or_default();
    let rejected = [&partial["rejectedDataPoints"], &partial["rejectedSpans"]].into_iter().find_map(|number| {
        // 64-bit integers are strings in protobuf's JSON.
        number.as_i64().or_else(|| number.as_str()?.parse().ok())
    });
    let message = partial["errorMessage"].as_str().unwrap_or_default().to_owned();
    Some(Answer { rejected: rejected.unwrap_or_default(), message })
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::collector::trace::v1::ExportTracePartialSuccess;
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn a_2xx_is_an_answer_only_where_it_reads_as_one() {
        let partial = ExportTracePartialSuccess { rejected_spans: 3, error_message: "too old".to_owned() };
        let said = ExportTraceServiceResponse { partial_success: Some(partial) }.encode_to_vec();
        let rejected = Answer { rejected: 3, message: "too old".to_owned() };
        let answer = |kind, body: &[u8]| read::<ExportTraceServiceResponse>(kind, body);
        assert_eq!(answer(PROTOBUF, &said), Some(rejected));
        assert_eq!(answer("", b""), Some(Answer::default()), "Prometheus says nothing");
        assert_eq!(answer("application/json; charset=utf-8", b"{}"), Some(Answer::default()));
        let json = br#"{"partialSuccess":{"rejectedSpans":"3","errorMessage":"too old"}}"#;
        assert_eq!(answer("application/json", json).map(|answer| answer.rejected), Some(3));
        assert_eq!(answer("text/html", b"<html>Please log in</html>"), None);
        assert_eq!(answer(PROTOBUF, b"<html>Please log in</html>"), None);
        assert_eq!(answer("application/json", br#"{"error":"log in"}"#), None);
        assert_eq!(answer("text/plain", b"ok"), None);
    }

    #[test]
    fn retry_after_is_a_number_of_seconds_or_a_date() {
        assert_eq!(retry_after("30"), Some(Retry::After(Duration::from_secs(30))));
        assert_eq!(retry_after("99999999"), Some(Retry::After(LONGEST_WAIT)));
        assert_eq!(retry_after("Fri, 31 Dec 1999 23:59:59 GMT"), Some(Retry::After(Duration::ZERO)));
        assert_eq!(retry_after("soon"), None);
    }

    #[test]
    fn a_grpc_status_is_repeated_by_otlps_rules() {
        let asked = ErrorDetails::with_retry_info(Some(Duration::from_secs(30)));
        for (code, plain, told) in [
            (Code::Unavailable, Retry::Soon, Retry::After(Duration::from_secs(30))),
            (Code::ResourceExhausted, Retry::Never, Retry::After(Duration::from_secs(30))),
            (Code::InvalidArgument, Retry::Never, Retry::Never),
        ] {
            assert_eq!(refused(&Status::new(code, "")).retry, plain, "{code:?}");
            assert_eq!(refused(&Status::with_error_details(code, "", asked.clone())).retry, told, "{code:?}");
        }
    }
}
