//! Replies of NATS micro services to `$SRV.STATS` and `$SRV.INFO` (ADR-32 of the NATS architecture decisions).

use std::borrow::Cow;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Number;
use serde_json::value::RawValue;

use super::{Malformed, count, from_json};
use crate::fleet::{EndpointCounts, Process};

/// What every service called its version before Dynamo 0.6.
pub const VERSION_BEFORE_0_6: &str = "0.0.1";

/// A STATS reply of one service instance, borrowed from its bytes.
#[derive(Debug)]
pub struct Reply<'a> {
    /// Service name.
    pub service: Cow<'a, str>,
    /// The instance that replied.
    pub process: Process,
    /// Its Dynamo release: the service's version from 0.6 on, which was the same for all before.
    pub release: Option<Arc<str>>,
    /// Its endpoints; a frontend has none.
    pub endpoints: Vec<Endpoint<'a>>,
}

/// One endpoint in a STATS reply.
#[derive(Debug, Deserialize)]
pub struct Endpoint<'a> {
    /// The subject that it serves.
    #[serde(borrow)]
    pub subject: Cow<'a, str>,
    /// What its stats handler said, as JSON; `None` for null.
    #[serde(borrow, default)]
    pub data: Option<&'a RawValue>,
    #[serde(borrow, default)]
    num_requests: Option<&'a RawValue>,
    #[serde(borrow, default)]
    num_errors: Option<&'a RawValue>,
    #[serde(borrow, default)]
    processing_time: Option<&'a RawValue>,
}

impl Endpoint<'_> {
    /// What the service itself counts of the endpoint, in every release.
    ///
    /// # Errors
    /// Something else than a count in one of them.
    pub fn counts(&self) -> Result<EndpointCounts, Malformed> {
        const WHAT: &str = "endpoint statistics";
        let read = |field, json: Option<&RawValue>| {
            let number = json.map(|json| from_json::<Number>(WHAT, json.get().as_bytes())).transpose()?;
            number.map(|number| count(WHAT, field, &number)).transpose()
        };
        Ok(EndpointCounts {
            requests: read("num_requests", self.num_requests)?,
            errors: read("num_errors", self.num_errors)?,
            processing: read("processing_time", self.processing_time)?,
        })
    }
}

/// Decodes a STATS reply, but not the `data` of its endpoints: each stands or falls alone.
///
/// # Errors
/// No JSON, too long, or not a reply.
pub fn decode_stats(json: &[u8]) -> Result<Reply<'_>, Malformed> {
    #[derive(Deserialize)]
    struct Wire<'a> {
        #[serde(borrow)]
        name: Cow<'a, str>,
        id: Arc<str>,
        #[serde(default)]
        version: Option<Arc<str>>,
        #[serde(borrow, default)]
        started: Option<Cow<'a, str>>,
        #[serde(borrow)]
        endpoints: Option<Vec<Endpoint<'a>>>,
    }
    let wire: Wire<'_> = from_json("STATS reply", json)?;
    let started = wire.started.and_then(|text| humantime::parse_rfc3339(&text).ok());
    Ok(Reply {
        service: wire.name,
        process: Process { instance: wire.id, started },
        release: wire.version.filter(|version| &**version != VERSION_BEFORE_0_6),
        endpoints: wire.endpoints.unwrap_or_default(),
    })
}

/// An INFO reply of one service instance.
#[derive(Debug, Deserialize)]
pub struct Info {
    /// Service name.
    #[serde(rename = "name")]
    pub service: String,
    /// The instance that replied.
    #[serde(rename = "id")]
    pub instance: Arc<str>,
    /// In Dynamo it names component and namespace.
    #[serde(default)]
    pub description: String,
}

/// Decodes an INFO reply.
///
/// # Errors
/// No JSON, too long, or not a reply.
pub fn decode_info(json: &[u8]) -> Result<Info, Malformed> {
    from_json("INFO reply", json)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::fleet::Reason;

    #[test]
    fn a_reply_keeps_each_endpoints_data_apart_and_unread() {
        let json = br#"{"type":"io.nats.micro.v1.stats_response","name":"s","id":"i","version":"0.0.1","started":"1970-01-01T00:00:01.5Z",
            "endpoints":[{"subject":"s.generate-1","data":null},{"subject":"s.load_metrics-1","data":{"kv_active_blocks":"?"}}]}"#;
        let reply = decode_stats(json).unwrap();
        assert_eq!(reply.process.started, Some(SystemTime::UNIX_EPOCH + Duration::from_millis(1500)));
        assert!(reply.endpoints[0].data.is_none());
        assert_eq!(reply.endpoints[1].data.unwrap().get(), r#"{"kv_active_blocks":"?"}"#);
    }

    #[test]
    fn an_endpoints_own_counts_are_read_apart_from_the_rest() {
        let counts = |fields: &str| {
            let json = format!(r#"{{"name":"s","id":"i","endpoints":[{{"subject":"s.generate-1",{fields}}}]}}"#);
            decode_stats(json.as_bytes()).unwrap().endpoints[0].counts().map_err(|error| error.reason)
        };
        let all = r#""num_requests":7,"num_errors":1,"processing_time":1500000000,"average_processing_time":214285714"#;
        let expected = EndpointCounts { requests: Some(7), errors: Some(1), processing: Some(1_500_000_000) };
        assert_eq!(counts(all), Ok(expected));
        assert_eq!(counts(r#""num_requests":null"#), Ok(EndpointCounts::default()));
        assert_eq!(counts(r#""num_requests":-1"#), Err(Reason::OutOfRange));
        assert_eq!(counts(r#""num_requests":"7""#), Err(Reason::WrongShape));
    }

    #[test]
    fn a_frontends_reply_has_no_endpoints() {
        for endpoints in ["[]", "null"] {
            let json = format!(r#"{{"name":"s","id":"i","started":"yesterday","endpoints":{endpoints}}}"#);
            let reply = decode_stats(json.as_bytes()).unwrap();
            assert!(reply.endpoints.is_empty());
            assert_eq!(reply.process.started, None);
        }
    }

    #[test]
    fn what_is_no_reply_is_refused_with_its_reason() {
        let long = vec![b' '; super::super::MAX_MESSAGE + 1];
        for (bytes, reason) in [
            (&b"hello"[..], Reason::Malformed),
            (b"\xff\xfe", Reason::Malformed),
            (b"", Reason::Truncated),
            (br#"{"name":"s","id":"i","endpoints":[{"subject""#, Reason::Truncated),
            (br#"{"name":"s","endpoints":[]}"#, Reason::WrongShape),
            (br#"{"name":"s","id":"i","endpoints":{}}"#, Reason::WrongShape),
            (b"[]", Reason::WrongShape),
            (&long, Reason::TooLarge),
        ] {
            assert_eq!(
                decode_stats(bytes).unwrap_err().reason,
                reason,
                "{:?}",
                String::from_utf8_lossy(&bytes[..bytes.len().min(40)])
            );
        }
    }
}
