//! What the standard variables say of OpenTelemetry. The SDK silently replaces what it cannot read by a default; here it
//! ends the start, with the name of the variable and without its value, which may be secret.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::KeyValue;
use opentelemetry_sdk::metrics::Temporality;
use percent_encoding::percent_decode_str;

use super::{OtlpError, Signal};
use crate::config::OtlpProtocol;

/// A look at the environment; an empty variable is an unset one, as the specification says.
pub(crate) struct Environment<'a>(pub(crate) &'a dyn Fn(&str) -> Option<String>);

/// Whether a value is one that its variable may hold.
type Check = fn(&str) -> bool;

/// The specification's default for one export.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// What a timeout of zero means, which the specification calls no limit: a connection that nobody serves ends some day.
const NO_LIMIT: Duration = Duration::from_secs(60 * 60);
/// No interval of a monitoring tool is longer: 24 hours, in milliseconds.
const LONGEST: u64 = 24 * 60 * 60 * 1000;
/// Spans that wait to be exported, at most: the SDK makes room for them at once.
const LARGEST_QUEUE: usize = 100_000;

/// What the SDK reads itself.
const BY_THE_SDK: &[(Signal, &str, &str, Check)] = &[
    (Signal::Metrics, "OTEL_METRIC_EXPORT_INTERVAL", INTERVAL, is_interval),
    (Signal::Traces, "OTEL_BSP_SCHEDULE_DELAY", INTERVAL, is_interval),
    (Signal::Traces, "OTEL_BSP_MAX_QUEUE_SIZE", "a number from 1 to 100000", is_size),
    (Signal::Traces, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "a number from 1 to 100000", is_size),
    (Signal::Traces, "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "a number", is_count),
    (Signal::Traces, "OTEL_SPAN_EVENT_COUNT_LIMIT", "a number", is_count),
    (Signal::Traces, "OTEL_SPAN_LINK_COUNT_LIMIT", "a number", is_count),
    (
        Signal::Traces,
        "OTEL_TRACES_SAMPLER",
        "always_on, always_off, traceidratio, or one of these behind parentbased_",
        |value| {
            ["always_on", "always_off", "traceidratio"].contains(&value.strip_prefix("parentbased_").unwrap_or(value))
        },
    ),
    (Signal::Traces, "OTEL_TRACES_SAMPLER_ARG", "a ratio from 0 to 1", |value| {
        value.parse().is_ok_and(|ratio: f64| (0.0..=1.0).contains(&ratio))
    }),
];
const INTERVAL: &str = "a number of milliseconds from 1 to 86400000";

fn is_interval(value: &str) -> bool {
    value.parse().is_ok_and(|milliseconds| (1..=LONGEST).contains(&milliseconds))
}

fn is_size(value: &str) -> bool {
    value.parse().is_ok_and(|size| (1..=LARGEST_QUEUE).contains(&size))
}

fn is_count(value: &str) -> bool {
    value.parse::<u32>().is_ok()
}

impl Environment<'_> {
    pub(super) fn get(&self, name: &str) -> Option<String> {
        (self.0)(name).filter(|value| !value.is_empty())
    }

    /// The signal's own variable, else the one for all signals, with the name that it was found under.
    pub(super) fn otlp(&self, signal: Signal, rest: &str) -> Option<(String, String)> {
        let general = format!("OTEL_EXPORTER_OTLP_{rest}");
        [own_name(signal, rest), general].into_iter().find_map(|name| self.get(&name).map(|value| (name, value)))
    }

    /// What `read` makes of a variable; `None` where it is not set.
    fn read<T>(
        found: Option<(String, String)>,
        expected: &'static str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, OtlpError> {
        let Some((variable, value)) = found else { return Ok(None) };
        read(&value).map(Some).ok_or(OtlpError::Variable { variable, expected })
    }

    fn named(&self, name: &str) -> Option<(String, String)> {
        self.get(name).map(|value| (name.to_owned(), value))
    }

    /// Whether the switches leave a signal on.
    pub(super) fn wants(&self, signal: Signal) -> Result<bool, OtlpError> {
        let disabled = Self::read(self.named("OTEL_SDK_DISABLED"), "true or false", |value| {
            value.to_lowercase().parse::<bool>().ok()
        })?;
        // What Prometheus pulls is there in any case.
        let (known, expected) = match signal {
            Signal::Metrics => (&["otlp", "prometheus", "none"][..], "otlp, prometheus or none"),
            Signal::Traces => (&["otlp", "none"][..], "otlp or none"),
        };
        let exporter = self.named(&format!("OTEL_{}_EXPORTER", signal.upper()));
        let otlp = Self::read(exporter, expected, |value| {
            let mut exporters = value.split(',').map(str::trim);
            exporters.clone().all(|name| known.contains(&name)).then(|| exporters.any(|name| name == "otlp"))
        })?;
        Ok(!disabled.unwrap_or(false) && otlp.unwrap_or(true))
    }

    /// The protocol that is set for this signal alone.
    pub(super) fn own_protocol(&self, signal: Signal) -> Result<Option<OtlpProtocol>, OtlpError> {
        Self::read(self.named(&own_name(signal, "PROTOCOL")), OtlpProtocol::EXPECTED, OtlpProtocol::named)
    }

    /// How long one export may take, its repetitions included.
    pub(super) fn timeout(&self, signal: Signal) -> Result<Duration, OtlpError> {
        let by_the_sdk = match signal {
            Signal::Metrics => "OTEL_METRIC_EXPORT_TIMEOUT",
            Signal::Traces => "OTEL_BSP_EXPORT_TIMEOUT",
        };
        let limit = |found| {
            Self::read(found, "a number of milliseconds, or 0 for no limit", |value| match value.parse().ok()? {
                0 => Some(NO_LIMIT),
                milliseconds => Some(Duration::from_millis(milliseconds).min(NO_LIMIT)),
            })
        };
        let of_exporter = limit(self.otlp(signal, "TIMEOUT"))?.unwrap_or(DEFAULT_TIMEOUT);
        Ok(limit(self.named(by_the_sdk))?.map_or(of_exporter, |of_sdk| of_exporter.min(of_sdk)))
    }

    pub(super) fn headers(&self, signal: Signal) -> Result<HeaderMap, OtlpError> {
        let expected = "key=value pairs with commas between, and keys that HTTP allows";
        Ok(Self::read(self.otlp(signal, "HEADERS"), expected, headers)?.unwrap_or_default())
    }

    pub(super) fn gzip(&self, signal: Signal) -> Result<bool, OtlpError> {
        let gzip = Self::read(self.otlp(signal, "COMPRESSION"), "gzip or none", |value| match value {
            "gzip" => Some(true),
            "none" => Some(false),
            _ => None,
        })?;
        Ok(gzip.unwrap_or(false))
    }

    pub(super) fn temporality(&self) -> Result<Temporality, OtlpError> {
        let variable = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE";
        let preference =
            Self::read(self.named(variable), "cumulative, delta or lowmemory", |value| match &*value.to_lowercase() {
                "cumulative" => Some(Temporality::Cumulative),
                "delta" => Some(Temporality::Delta),
                "lowmemory" => Some(Temporality::LowMemory),
                _ => None,
            })?;
        // The bounds of the buckets are part of what a metric says.
        let variable = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION";
        Self::read(self.named(variable), "explicit_bucket_histogram, the only one that there is", |value| {
            (value == "explicit_bucket_histogram").then_some(())
        })?;
        Ok(preference.unwrap_or_default())
    }

    /// Checks what the SDK reads itself.
    pub(super) fn check_sdk(&self, signal: Signal) -> Result<(), OtlpError> {
        for (of, name, expected, check) in BY_THE_SDK {
            if *of == signal {
                Self::read(self.named(name), expected, |value| check(value).then_some(()))?;
            }
        }
        Ok(())
    }

    /// The attributes that `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SERVICE_NAME` give to whatever is exported.
    pub(crate) fn resource_attributes(&self) -> Result<Vec<KeyValue>, OtlpError> {
        let expected = "key=value pairs with commas between, percent-encoded";
        let attributes = Self::read(self.named("OTEL_RESOURCE_ATTRIBUTES"), expected, |value| {
            let attribute = |(key, value)| Some(KeyValue::new(decoded(key)?, decoded(value)?));
            pairs(value).map(|pair| pair.and_then(attribute)).collect::<Option<Vec<_>>>()
        })?;
        let name = self.get("OTEL_SERVICE_NAME").map(|name| KeyValue::new("service.name", name));
        Ok(attributes.unwrap_or_default().into_iter().chain(name).collect())
    }
}

/// A variable for one signal alone.
pub(super) fn own_name(signal: Signal, rest: &str) -> String {
    format!("OTEL_EXPORTER_OTLP_{}_{rest}", signal.upper())
}

/// `key=value` pairs with commas between; `None` for one that is none. Members that are blank say nothing.
fn pairs(text: &str) -> impl Iterator<Item = Option<(&str, &str)>> {
    let members = text.split(',').filter(|member| !member.trim().is_empty());
    members.map(|member| {
        let (key, value) = member.split_once('=')?;
        Some((key.trim(), value.trim())).filter(|(key, _)| !key.is_empty())
    })
}

/// A percent sign that begins no code stands for itself: a token may hold one.
fn headers(text: &str) -> Option<HeaderMap> {
    let header = |(name, value): (&str, &str)| {
        let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
        let mut value = HeaderValue::from_bytes(&percent_decode_str(value).collect::<Vec<_>>()).ok()?;
        // Libraries do not print it then, and HTTP/2 keeps it in no table.
        value.set_sensitive(true);
        Some((name, value))
    };
    pairs(text).map(|pair| pair.and_then(header)).collect()
}

/// `None` where a percent sign begins no code, or what it codes is no UTF-8.
fn decoded(text: &str) -> Option<String> {
    let is_code = |rest: &str| rest.len() >= 2 && rest.bytes().take(2).all(|digit| digit.is_ascii_hexdigit());
    let well_formed = text.split('%').skip(1).all(is_code);
    well_formed.then(|| percent_decode_str(text).decode_utf8().ok())?.map(std::borrow::Cow::into_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<T>(variables: &[(&str, &str)], read: impl Fn(&Environment<'_>) -> T) -> T {
        let lookup = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        read(&Environment(&lookup))
    }

    #[test]
    fn resource_attributes_are_percent_decoded_and_malformed_ones_are_refused() {
        let attributes = |text| {
            with(&[("OTEL_RESOURCE_ATTRIBUTES", text)], |environment| {
                let attributes = environment.resource_attributes().map_err(|error| error.to_string())?;
                Ok::<_, String>(
                    attributes.iter().map(|pair| format!("{}={}", pair.key, pair.value)).collect::<Vec<_>>(),
                )
            })
        };
        assert_eq!(
            attributes("env=Prod%20EU, a%2Cb = c%3Dd%C3%A9 ,"),
            Ok(vec!["env=Prod EU".into(), "a,b=c=dé".into()])
        );
        assert_eq!(attributes("digest=sha256:a=b,empty="), Ok(vec!["digest=sha256:a=b".into(), "empty=".into()]));
        for bad in ["geheim", "=geheim", "a=b,geheim", "a=geheim%", "a=geheim%2", "a=geheim%zz", "a=geheim%FF", "a=%+1"]
        {
            let refusal = attributes(bad).unwrap_err();
            assert!(
                refusal.starts_with("OTEL_RESOURCE_ATTRIBUTES must be ") && !refusal.contains("geheim"),
                "{refusal}"
            );
        }
    }

    #[test]
    fn headers_are_percent_decoded_and_names_with_blanks_are_refused() {
        let read = |text| {
            with(&[("OTEL_EXPORTER_OTLP_HEADERS", text)], |environment| {
                environment.headers(Signal::Metrics).map_err(|error| error.to_string())
            })
        };
        let headers = read("Authorization=Bearer%20geheim==,x-share=100%").unwrap();
        assert_eq!(headers["authorization"], "Bearer geheim==");
        assert_eq!(headers["x-share"], "100%");
        assert!(!format!("{headers:?}").contains("geheim"));
        for bad in ["geheim", "x key=geheim", "=geheim", "a=geheim%0A", "ä=geheim"] {
            let refusal = read(bad).unwrap_err();
            assert!(
                refusal.starts_with("OTEL_EXPORTER_OTLP_HEADERS must be ") && !refusal.contains("geheim"),
                "{refusal}"
            );
        }
    }

    #[test]
    fn the_shorter_timeout_holds_and_zero_is_no_limit() {
        let timeout = |variables: &[(&str, &str)]| with(variables, |e| e.timeout(Signal::Metrics).unwrap());
        assert_eq!(timeout(&[]), Duration::from_secs(10));
        assert_eq!(timeout(&[("OTEL_EXPORTER_OTLP_TIMEOUT", "0")]), NO_LIMIT);
        let both = [("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "2000"), ("OTEL_METRIC_EXPORT_TIMEOUT", "1000")];
        assert_eq!(timeout(&both), Duration::from_secs(1));
    }

    #[test]
    fn the_exporters_that_are_named_decide() {
        let wants = |signal, value| {
            let name = if signal == Signal::Metrics { "OTEL_METRICS_EXPORTER" } else { "OTEL_TRACES_EXPORTER" };
            with(&[(name, value)], |environment| environment.wants(signal).ok())
        };
        for (value, metrics, traces) in [
            ("", Some(true), Some(true)),
            ("otlp", Some(true), Some(true)),
            ("none", Some(false), Some(false)),
            ("prometheus", Some(false), None),
            ("prometheus, otlp", Some(true), None),
            ("console", None, None),
        ] {
            assert_eq!(wants(Signal::Metrics, value), metrics, "{value}");
            assert_eq!(wants(Signal::Traces, value), traces, "{value}");
        }
    }
}
