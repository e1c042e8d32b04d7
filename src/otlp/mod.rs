//! OTLP exporters, from the options and the standard `OTEL_EXPORTER_OTLP_*` variables.
//!
//! `opentelemetry-otlp` reads headers, compression, timeout and temporality from the environment itself, and falls back
//! silently where they are malformed; here they are checked first. It reads no certificates: that is done here.

mod watched;

use std::path::Path;
use std::time::Duration;

use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig, Identity};
use opentelemetry_otlp::{
    ExporterBuildError, MetricExporter, SpanExporter, WithExportConfig, WithHttpConfig, WithTonicConfig,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use self::watched::{Cause, HttpClient, Watched};
use crate::causes::with_causes;
use crate::config::{OtlpOptions, OtlpProtocol};

/// The specification's default for one export.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

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
    /// A certificate or key cannot be read.
    #[error("cannot read {path}, named by {variable}: {source}")]
    File {
        /// Which variable named it.
        variable: String,
        /// As given.
        path: String,
        /// From the file system.
        source: std::io::Error,
    },
    /// A certificate or key is none.
    #[error(
        "the certificates for OTLP cannot be used: {0}; check OTEL_EXPORTER_OTLP_CERTIFICATE, _CLIENT_CERTIFICATE and _CLIENT_KEY"
    )]
    Certificates(String),
    /// The exporter's own complaint.
    #[error("cannot push OTLP: {0}; check --otlp-endpoint and the OTEL_EXPORTER_OTLP_* variables")]
    Build(#[from] ExporterBuildError),
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
}

/// Where one signal goes, and how.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Destination {
    pub(crate) url: String,
    pub(crate) protocol: OtlpProtocol,
    timeout: Duration,
    certificates: Certificates,
}

/// A look at the environment; an empty variable is an unset one, as the specification says.
pub(crate) struct Environment<'a>(pub(crate) &'a dyn Fn(&str) -> Option<String>);

impl Environment<'_> {
    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name).filter(|value| !value.is_empty())
    }

    /// The signal's own variable, else the one for all signals, with the name that it was found under.
    fn otlp(&self, signal: Signal, rest: &str) -> Option<(String, String)> {
        let own = format!("OTEL_EXPORTER_OTLP_{}_{rest}", signal.lower().to_uppercase());
        let general = format!("OTEL_EXPORTER_OTLP_{rest}");
        [own, general].into_iter().find_map(|name| self.get(&name).map(|value| (name, value)))
    }

    fn is(&self, name: &str, value: &str) -> bool {
        self.get(name).is_some_and(|set| set.eq_ignore_ascii_case(value))
    }
}

impl Destination {
    /// Where `signal` goes; `None` where nobody asked for it.
    pub(crate) fn of(
        signal: Signal,
        options: &OtlpOptions,
        environment: &Environment<'_>,
    ) -> Result<Option<Self>, OtlpError> {
        let switched_off = environment.is("OTEL_SDK_DISABLED", "true")
            || environment.is(&format!("OTEL_{}_EXPORTER", signal.lower().to_uppercase()), "none");
        let own_url = format!("OTEL_EXPORTER_OTLP_{}_ENDPOINT", signal.lower().to_uppercase());
        let own = environment.get(&own_url);
        let Some(given) = own.clone().or_else(|| options.otlp_endpoint.clone()).filter(|_| !switched_off) else {
            return Ok(None);
        };
        let variable = if own.is_some() { own_url } else { "--otlp-endpoint [OTEL_EXPORTER_OTLP_ENDPOINT]".to_owned() };
        let port =
            port_of(&given).ok_or(OtlpError::Variable { variable, expected: "a URL such as http://localhost:4317" })?;
        let protocol = match own_protocol(signal, environment)? {
            Some(protocol) => protocol,
            None => options.otlp_protocol.unwrap_or(if port == 4318 {
                OtlpProtocol::HttpProtobuf
            } else {
                OtlpProtocol::Grpc
            }),
        };
        // Over HTTP the general endpoint is a base, a signal's own is taken as it stands.
        let url = match protocol {
            OtlpProtocol::HttpProtobuf if own.is_none() => {
                format!("{}/v1/{}", given.trim_end_matches('/'), signal.lower())
            }
            _ => given,
        };
        check_variables(signal, environment)?;
        let timeout =
            environment.otlp(signal, "TIMEOUT").and_then(|(_, value)| value.parse().ok()).map(Duration::from_millis);
        let certificates = certificates(signal, environment)?;
        Ok(Some(Self { url, protocol, timeout: timeout.unwrap_or(DEFAULT_TIMEOUT), certificates }))
    }

    pub(crate) fn metric_exporter(&self) -> Result<Watched<MetricExporter>, OtlpError> {
        let (builder, cause) = (MetricExporter::builder(), Cause::default());
        let exporter = match self.protocol {
            OtlpProtocol::Grpc => self.tonic(builder.with_tonic()).build()?,
            OtlpProtocol::HttpProtobuf => self.http(builder.with_http(), &cause)?.build()?,
        };
        Ok(Watched::new(exporter, "metrics", self.host(), cause))
    }

    pub(crate) fn span_exporter(&self) -> Result<Watched<SpanExporter>, OtlpError> {
        let (builder, cause) = (SpanExporter::builder(), Cause::default());
        let exporter = match self.protocol {
            OtlpProtocol::Grpc => self.tonic(builder.with_tonic()).build()?,
            OtlpProtocol::HttpProtobuf => self.http(builder.with_http(), &cause)?.build()?,
        };
        Ok(Watched::new(exporter, "traces", self.host(), cause))
    }

    /// The URL without the user and password that may be in it.
    fn host(&self) -> &str {
        self.url.split_once('@').map_or(&*self.url, |(_, host)| host)
    }

    fn tonic<B: WithExportConfig + WithTonicConfig>(&self, builder: B) -> B {
        let builder = builder.with_endpoint(&self.url).with_timeout(self.timeout);
        if !self.url.starts_with("https:") {
            return builder;
        }
        let mut tls = ClientTlsConfig::new();
        tls = match &self.certificates.authority {
            Some(authority) => tls.ca_certificate(Certificate::from_pem(authority)),
            None => tls.with_enabled_roots(),
        };
        if let Some((certificate, key)) = &self.certificates.identity {
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        builder.with_tls_config(tls)
    }

    fn http<B: WithExportConfig + WithHttpConfig>(&self, builder: B, cause: &Cause) -> Result<B, OtlpError> {
        let refused = |error: reqwest::Error| OtlpError::Certificates(with_causes(&error));
        let mut client = reqwest::blocking::Client::builder().timeout(self.timeout);
        if let Some(authority) = &self.certificates.authority {
            client = client.tls_certs_only(reqwest::Certificate::from_pem_bundle(authority).map_err(refused)?);
        }
        if let Some((certificate, key)) = &self.certificates.identity {
            let pem = [&certificate[..], b"\n", &key[..]].concat();
            client = client.identity(reqwest::Identity::from_pem(&pem).map_err(refused)?);
        }
        // A blocking client may not be made on a thread of an async runtime.
        let built = std::thread::spawn(move || client.build()).join();
        let client = built
            .map_err(|_| OtlpError::Certificates("the HTTP client could not start".to_owned()))?
            .map_err(refused)?;
        Ok(builder.with_endpoint(&self.url).with_timeout(self.timeout).with_http_client(HttpClient::new(client, cause)))
    }
}

/// The port of an http or https URL, its default included; `None` where it is no such URL.
fn port_of(url: &str) -> Option<u16> {
    let uri: axum::http::Uri = url.parse().ok()?;
    let default = match uri.scheme_str()? {
        "http" => 80,
        "https" => 443,
        _ => return None,
    };
    uri.host().filter(|host| !host.is_empty())?;
    Some(uri.port_u16().unwrap_or(default))
}

fn own_protocol(signal: Signal, environment: &Environment<'_>) -> Result<Option<OtlpProtocol>, OtlpError> {
    let variable = format!("OTEL_EXPORTER_OTLP_{}_PROTOCOL", signal.lower().to_uppercase());
    match environment.get(&variable).as_deref() {
        None => Ok(None),
        Some("grpc") => Ok(Some(OtlpProtocol::Grpc)),
        Some("http/protobuf") => Ok(Some(OtlpProtocol::HttpProtobuf)),
        Some(_) => Err(OtlpError::Variable { variable, expected: "grpc or http/protobuf" }),
    }
}

/// Refuses what the exporters would silently replace by a default.
fn check_variables(signal: Signal, environment: &Environment<'_>) -> Result<(), OtlpError> {
    type Check = fn(&str) -> bool;
    let milliseconds: Check = |value| value.parse::<u64>().is_ok_and(|value| value > 0);
    let pairs: Check =
        |value| value.split(',').all(|pair| pair.split_once('=').is_some_and(|(key, _)| !key.trim().is_empty()));
    let preference: Check = |value| ["cumulative", "delta", "lowmemory"].contains(&value.to_lowercase().as_str());
    let refuse = |found: Option<(String, String)>, expected, check: Check| match found {
        Some((variable, value)) if !check(&value) => Err(OtlpError::Variable { variable, expected }),
        _ => Ok(()),
    };
    let named = |name: &str| environment.get(name).map(|value| (name.to_owned(), value));
    refuse(environment.otlp(signal, "TIMEOUT"), "a number of milliseconds", milliseconds)?;
    refuse(environment.otlp(signal, "COMPRESSION"), "gzip or none", |value| ["gzip", "none"].contains(&value))?;
    refuse(environment.otlp(signal, "HEADERS"), "key=value pairs with commas between", pairs)?;
    if signal == Signal::Metrics {
        refuse(named("OTEL_METRIC_EXPORT_INTERVAL"), "a number of milliseconds", milliseconds)?;
        let variable = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE";
        refuse(named(variable), "cumulative, delta or lowmemory", preference)?;
    }
    Ok(())
}

/// PEM files, read.
#[derive(Debug, PartialEq, Eq)]
struct Certificates {
    /// Whom to trust; without it the system's roots.
    authority: Option<Vec<u8>>,
    /// Certificate and key to show.
    identity: Option<(Vec<u8>, Vec<u8>)>,
}

fn certificates(signal: Signal, environment: &Environment<'_>) -> Result<Certificates, OtlpError> {
    let read = |rest| match environment.otlp(signal, rest) {
        None => Ok(None),
        Some((variable, path)) => {
            std::fs::read(Path::new(&path)).map(Some).map_err(|source| OtlpError::File { variable, path, source })
        }
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

    fn destination(signal: Signal, endpoint: Option<&str>, variables: &[(&str, &str)]) -> Found {
        let options = OtlpOptions { otlp_endpoint: endpoint.map(str::to_owned), otlp_protocol: None };
        let lookup = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let destination =
            Destination::of(signal, &options, &Environment(&lookup)).map_err(|error| error.to_string())?;
        Ok(destination.map(|destination| (destination.url, destination.protocol)))
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
        let grpc = Some("http://collector:4317");
        assert_eq!(destination(Signal::Metrics, grpc, &[]), to("http://collector:4317", OtlpProtocol::Grpc));
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
        assert_eq!(destination(Signal::Traces, base, &variables), to("http://collector:4317", OtlpProtocol::Grpc));
        assert_eq!(destination(Signal::Traces, None, &variables), Ok(None), "one signal alone");
    }

    #[test]
    fn the_standard_switches_turn_it_off() {
        let base = Some("http://collector:4317");
        assert_eq!(destination(Signal::Metrics, base, &[("OTEL_SDK_DISABLED", "TRUE")]), Ok(None));
        assert_eq!(destination(Signal::Traces, base, &[("OTEL_TRACES_EXPORTER", "none")]), Ok(None));
        assert!(destination(Signal::Metrics, base, &[("OTEL_TRACES_EXPORTER", "none")]).unwrap().is_some());
    }

    #[test]
    fn what_the_exporters_would_silently_ignore_is_refused_by_name_and_without_its_value() {
        let base = Some("http://collector:4317");
        for (variable, value) in [
            ("OTEL_METRIC_EXPORT_INTERVAL", "geheim"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "0"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "geheim"),
            ("OTEL_EXPORTER_OTLP_METRICS_COMPRESSION", "geheim"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "geheim"),
            ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "geheim"),
            ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "geheim"),
            ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "geheim"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere/at/all"),
        ] {
            let refusal = destination(Signal::Metrics, base, &[(variable, value)]).unwrap_err();
            assert!(refusal.contains(variable) && !refusal.contains("geheim"), "{refusal}");
        }
        for bad in ["collector:4317", "ftp://collector", "http://", "http:///v1"] {
            let refusal = destination(Signal::Metrics, Some(bad), &[]).unwrap_err();
            assert!(refusal.contains("--otlp-endpoint"), "{refusal}");
        }
    }
}
