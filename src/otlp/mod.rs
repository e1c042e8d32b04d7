//! The push side of OTLP, from the options and the standard variables.
//!
//! The exporters are those of `opentelemetry-otlp`; what they send their messages with is the bridge's own, for gRPC and
//! HTTP alike. Theirs throws away what a receiver answers: how much of a push it rejected, how long it wants to be left alone,
//! and, over HTTP, whether it is a receiver at all.

mod environment;
mod exporter;
mod pushes;
mod transport;

use axum::http::{HeaderMap, HeaderValue, Uri, header};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use opentelemetry_sdk::metrics::Temporality;
use percent_encoding::percent_decode_str;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::time::Duration;

pub(crate) use self::environment::Environment;
use self::environment::own_name;
pub(crate) use self::pushes::push_counts;
use crate::config::{OtlpOptions, OtlpProtocol, names_a_server};

/// Why nothing can be pushed. One line each, with the variable to change; values may be secret and are left out.
#[derive(Debug, thiserror::Error)]
pub enum OtlpError {
    /// A variable holds something else than its specification allows.
    #[error("{variable} must be {expected}")]
    Variable {
        /// Its name.
        variable: String,
        /// What it may hold.
        expected: &'static str,
    },
    /// A certificate or key cannot be read. The path is left out: some set the variable to the key itself.
    #[error("cannot read the file that {variable} names: {source}")]
    File {
        /// Which variable named it.
        variable: String,
        /// From the file system.
        source: std::io::Error,
    },
    /// A certificate or key is none.
    #[error(
        "the certificates for OTLP cannot be used: {0}; check OTEL_EXPORTER_OTLP_CERTIFICATE, _CLIENT_CERTIFICATE and _CLIENT_KEY"
    )]
    Certificates(String),
    /// The exporter's own complaint.
    #[error("cannot push OTLP: {0}; check --otlp-endpoint [OTEL_EXPORTER_OTLP_ENDPOINT]")]
    Build(String),
}

/// What is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    Metrics,
    Traces,
}

impl Signal {
    fn lower(self) -> &'static str {
        match self {
            Self::Metrics => "metrics",
            Self::Traces => "traces",
        }
    }

    fn upper(self) -> String {
        self.lower().to_uppercase()
    }
}

/// Where one signal goes, and how.
pub(crate) struct Destination {
    signal: Signal,
    /// Without user and password, which are among the headers.
    url: Uri,
    pub(crate) protocol: OtlpProtocol,
    timeout: Duration,
    headers: HeaderMap,
    gzip: bool,
    temporality: Temporality,
    certificates: Certificates,
}

impl Destination {
    /// Where `signal` goes; `None` where nobody asked for it.
    pub(crate) fn of(
        signal: Signal,
        options: &OtlpOptions,
        environment: &Environment<'_>,
    ) -> Result<Option<Self>, OtlpError> {
        if !environment.wants(signal)? {
            return Ok(None);
        }
        let own = environment.get(&own_name(signal, "ENDPOINT"));
        let general = options.otlp_endpoint.as_ref().map(|endpoint| endpoint.0.clone());
        let is_general = own.is_none();
        let Some(given) = own.or(general) else { return Ok(None) };
        let variable = if is_general { OtlpOptions::ENDPOINT.to_owned() } else { own_name(signal, "ENDPOINT") };
        let (url, user) = without_user(&given)
            .ok_or(OtlpError::Variable { variable, expected: "a URL such as http://localhost:4317" })?;
        let protocol = match environment.own_protocol(signal)?.or(options.protocol()) {
            Some(protocol) => protocol,
            None if url.port_u16() == Some(4318) => OtlpProtocol::HttpProtobuf,
            None => OtlpProtocol::Grpc,
        };
        // Over HTTP the general endpoint is a base, a signal's own is taken as it stands.
        let url = if is_general && protocol == OtlpProtocol::HttpProtobuf { below(&url, signal) } else { url };
        let mut headers = environment.headers(signal)?;
        if let Some(user) = user {
            headers.entry(header::AUTHORIZATION).or_insert(user);
        }
        environment.check_sdk(signal)?;
        Ok(Some(Self {
            signal,
            url,
            protocol,
            timeout: environment.timeout(signal)?,
            headers,
            gzip: environment.gzip(signal)?,
            temporality: if signal == Signal::Metrics { environment.temporality()? } else { Temporality::default() },
            certificates: certificates(signal, environment)?,
        }))
    }
}

/// An http or https URL without the user and password that may be in it, and the header that says them, as HTTP clients
/// make it; `None` where it is no such URL.
fn without_user(url: &str) -> Option<(Uri, Option<HeaderValue>)> {
    let mut parts = url.parse::<Uri>().ok()?.into_parts();
    if !["http", "https"].contains(&parts.scheme.as_ref()?.as_str()) {
        return None;
    }
    let authority = parts.authority.take()?;
    let (user, host) = match authority.as_str().rsplit_once('@') {
        Some((user, host)) => (Some(basic(user)?), host),
        None => (None, authority.as_str()),
    };
    parts.authority = Some(host.parse().ok()?);
    let uri = Uri::from_parts(parts).ok()?;
    uri.authority().is_some_and(names_a_server).then_some((uri, user))
}

fn basic(user: &str) -> Option<HeaderValue> {
    let (name, password) = user.split_once(':').unwrap_or((user, ""));
    let mut credentials: Vec<u8> = percent_decode_str(name).collect();
    credentials.push(b':');
    credentials.extend(percent_decode_str(password));
    let mut value = HeaderValue::try_from(format!("Basic {}", BASE64_STANDARD.encode(credentials))).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// Where a signal is taken below a base URL. A query, such as a key, stays.
fn below(base: &Uri, signal: Signal) -> Uri {
    let path = format!("{}/v1/{}", base.path().trim_end_matches('/'), signal.lower());
    let path = base.query().map_or(path.clone(), |query| format!("{path}?{query}"));
    let mut parts = base.clone().into_parts();
    parts.path_and_query = path.parse().ok();
    Uri::from_parts(parts).unwrap_or_else(|_| base.clone())
}

/// PEM files, read.
struct Certificates {
    /// Whom to trust; without it the system's roots.
    authority: Option<Vec<u8>>,
    /// Certificate and key to show.
    identity: Option<(Vec<u8>, Vec<u8>)>,
}

fn certificates(signal: Signal, environment: &Environment<'_>) -> Result<Certificates, OtlpError> {
    let read = |rest| match environment.otlp(signal, rest) {
        None => Ok(None),
        Some((variable, path)) => std::fs::read(path).map(Some).map_err(|source| OtlpError::File { variable, source }),
    };
    let identity = match (read("CLIENT_CERTIFICATE")?, read("CLIENT_KEY")?) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        _ => {
            return Err(OtlpError::Certificates("certificate and key belong together, and one is missing".to_owned()));
        }
    };
    let authority = read("CERTIFICATE")?;
    // It would make exporters that trust nobody, and complain about the network.
    let holds_one = |pem: &Vec<u8>| CertificateDer::pem_slice_iter(pem).next().is_some_and(|found| found.is_ok());
    if authority.as_ref().is_some_and(|pem| !holds_one(pem)) {
        return Err(OtlpError::Certificates("the authority's file holds no PEM certificate".to_owned()));
    }
    Ok(Certificates { authority, identity })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(
        signal: Signal,
        endpoint: Option<&str>,
        variables: &[(&str, &str)],
    ) -> Result<Option<Destination>, String> {
        let options = OtlpOptions { otlp_endpoint: endpoint.map(Into::into), otlp_protocol: None };
        let lookup = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Destination::of(signal, &options, &Environment(&lookup)).map_err(|error| error.to_string())
    }

    fn destination(signal: Signal, endpoint: Option<&str>, variables: &[(&str, &str)]) -> Found {
        let destination = found(signal, endpoint, variables)?;
        Ok(destination.map(|destination| (destination.url.to_string(), destination.protocol)))
    }

    type Found = Result<Option<(String, OtlpProtocol)>, String>;

    #[expect(clippy::unnecessary_wraps, reason = "to be compared with what was found")]
    fn to(url: &str, protocol: OtlpProtocol) -> Found {
        Ok(Some((url.to_owned(), protocol)))
    }

    #[test]
    fn the_endpoint_is_a_base_over_http_and_the_whole_over_grpc() {
        let base = Some("http://collector:4318/");
        assert_eq!(
            destination(Signal::Metrics, base, &[]),
            to("http://collector:4318/v1/metrics", OtlpProtocol::HttpProtobuf)
        );
        assert_eq!(
            destination(Signal::Traces, base, &[]),
            to("http://collector:4318/v1/traces", OtlpProtocol::HttpProtobuf)
        );
        assert_eq!(
            destination(Signal::Traces, Some("http://collector:4318/otlp/?Api-Key=a/b"), &[]),
            to("http://collector:4318/otlp/v1/traces?Api-Key=a/b", OtlpProtocol::HttpProtobuf)
        );
        let grpc = Some("http://collector:4317");
        assert_eq!(destination(Signal::Metrics, grpc, &[]), to("http://collector:4317/", OtlpProtocol::Grpc));
        assert_eq!(destination(Signal::Metrics, None, &[]), Ok(None));
    }

    #[test]
    fn a_signals_own_variables_win_and_are_taken_as_they_stand() {
        let variables = [
            ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "https://other/path"),
            ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/protobuf"),
        ];
        let base = Some("http://collector:4317");
        assert_eq!(
            destination(Signal::Metrics, base, &variables),
            to("https://other/path", OtlpProtocol::HttpProtobuf)
        );
        assert_eq!(destination(Signal::Traces, base, &variables), to("http://collector:4317/", OtlpProtocol::Grpc));
        assert_eq!(destination(Signal::Traces, None, &variables), Ok(None), "one signal alone");
    }

    #[test]
    fn a_user_becomes_a_header_where_none_is_given_and_is_nowhere_else() {
        let base = Some("http://us%40er:ge%3Aheim@collector:4317");
        let of = |variables: &[(&str, &str)]| found(Signal::Metrics, base, variables).unwrap().unwrap();
        let destination = of(&[]);
        assert_eq!(destination.url, "http://collector:4317/");
        // us@er:ge:heim
        assert_eq!(destination.headers["authorization"], "Basic dXNAZXI6Z2U6aGVpbQ==");
        assert!(destination.headers["authorization"].is_sensitive());
        let given = of(&[("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Bearer%20token")]);
        assert_eq!(given.headers["authorization"], "Bearer token");
    }

    #[test]
    fn the_standard_switches_turn_it_off() {
        let base = Some("http://collector:4317");
        assert_eq!(destination(Signal::Metrics, base, &[("OTEL_SDK_DISABLED", "TRUE")]), Ok(None));
        assert_eq!(destination(Signal::Traces, base, &[("OTEL_TRACES_EXPORTER", "none")]), Ok(None));
        assert!(destination(Signal::Metrics, base, &[("OTEL_TRACES_EXPORTER", "none")]).unwrap().is_some());
    }

    #[test]
    fn an_endpoint_that_is_no_url_is_refused_without_repeating_it() {
        for bad in [
            "collector:4317",
            "ftp://geheim@collector",
            "http://",
            "http:///v1",
            "http://u:geheim@",
            "http://h:99999",
            "http://h:1;geheim",
        ] {
            let refusal = destination(Signal::Metrics, Some(bad), &[]).unwrap_err();
            assert!(refusal.contains("--otlp-endpoint") && !refusal.contains("geheim"), "{refusal}");
        }
    }
}
