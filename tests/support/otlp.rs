//! An OTLP receiver that shares no code with the bridge, and what it received.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use dynamo_metrics::instruments::{CATALOGUE, Metric};
use serde_json::Value;
use tokio::process::Command;

use super::program::told;
use super::{Bridge, Exposition, Program, Row, eventually, peers, same};

/// A transport of OTLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    Grpc,
    Http,
}

impl Via {
    pub const BOTH: [Self; 2] = [Self::Grpc, Self::Http];

    /// As `OTEL_EXPORTER_OTLP_PROTOCOL` calls it.
    pub fn protocol(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Http => "http/protobuf",
        }
    }
}

/// `tests/peers/otlp_receiver.py`, listening for both transports. Stopped when dropped.
pub struct Receiver {
    pub program: Program,
    grpc: u64,
    http: u64,
    heard: Mutex<Heard>,
}

#[derive(Default)]
struct Heard {
    lines: usize,
    requests: Vec<Arc<Request>>,
}

/// One request that arrived.
#[derive(Debug)]
pub struct Request(Value);

impl Receiver {
    /// With options of the script.
    pub async fn start(options: &[&str]) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/otlp_receiver.py");
        let mut program = Program::start(Command::new(peers::python()).arg(script).args(options));
        let ready = program
            .line("that it is ready", |line| {
                let line: Value = serde_json::from_str(line).ok()?;
                (line["ready"] == true).then_some(line)
            })
            .await;
        Self {
            program,
            grpc: ready["grpc"].as_u64().unwrap(),
            http: ready["http"].as_u64().unwrap(),
            heard: Mutex::default(),
        }
    }

    /// Where it listens, for a client that speaks no TLS.
    pub fn url(&self, via: Via) -> String {
        format!("http://{}", self.address(via))
    }

    /// The same for one that does.
    pub fn tls_url(&self, via: Via) -> String {
        format!("https://{}", self.address(via))
    }

    pub fn address(&self, via: Via) -> String {
        let port = match via {
            Via::Grpc => self.grpc,
            Via::Http => self.http,
        };
        format!("127.0.0.1:{port}")
    }

    /// All requests so far, in order.
    pub fn requests(&self) -> Vec<Arc<Request>> {
        let mut heard = self.heard.lock().unwrap();
        let lines = self.program.lines_from(heard.lines);
        heard.lines += lines.len();
        let requests = lines.iter().filter_map(|line| serde_json::from_str(line).ok());
        let requests = requests.map(Request).filter(|request| !request.0["signal"].is_null());
        heard.requests.extend(requests.map(Arc::new));
        heard.requests.clone()
    }

    /// The pushes of metrics that it took over that transport, in order.
    pub fn pushes(&self, via: Via) -> Vec<Arc<Request>> {
        let mut requests = self.requests();
        requests.retain(|request| request.via() == via && request.is("metrics"));
        requests
    }

    /// Waits until `find` finds something among all requests.
    pub async fn eventually<T>(&self, what: &str, find: impl Fn(&[Arc<Request>]) -> Option<T>) -> T {
        eventually(&format!("the receiver hears {what}"), || async {
            let requests = self.requests();
            find(&requests).ok_or_else(|| {
                let last = requests.iter().rev().find(|request| request.is("metrics"));
                let last = last.map(|request| request.metrics().sorted(""));
                let written = told(&self.program.lines());
                format!("{} requests; the last metrics: {last:?}\n{written}", requests.len())
            })
        })
        .await
    }

    /// Waits until the last push over a transport shows the values that a pull then shows.
    pub async fn agrees_with(&self, bridge: &Bridge, via: Via) {
        eventually(&format!("{via:?} pushes what the pull shows"), || async {
            let pulled = bridge.metrics().await;
            let last = self.pushes(via).pop().ok_or("nothing is pushed")?.metrics();
            same(&last.sorted("llm_"), &pulled.sorted("llm_"))?;
            if last.keys() == pulled.keys() { Ok(()) } else { Err("other series of the bridge itself".to_owned()) }
        })
        .await;
    }

    /// Waits until the last push over a transport is as `find` wants it.
    pub async fn last<T>(&self, via: Via, what: &str, find: impl Fn(&Request) -> Option<T>) -> T {
        self.eventually(what, |requests| {
            let mut pushes = requests.iter().rev();
            find(pushes.find(|request| request.via() == via && request.is("metrics"))?)
        })
        .await
    }
}

impl Request {
    pub fn via(&self) -> Via {
        match self.0["via"].as_str() {
            Some("grpc") => Via::Grpc,
            _ => Via::Http,
        }
    }

    /// Whether it carries that signal, `metrics` or `traces`, and was taken.
    pub fn is(&self, signal: &str) -> bool {
        self.0["signal"] == signal && self.0["failed"].is_null()
    }

    /// Whether the receiver answered with the error that it was asked for.
    pub fn failed(&self) -> bool {
        !self.0["failed"].is_null()
    }

    /// When it arrived, in seconds.
    pub fn time(&self) -> f64 {
        self.0["time"].as_f64().unwrap()
    }

    pub fn tls(&self) -> bool {
        self.0["tls"] == true
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.0["headers"][name].as_str()
    }

    /// The attributes of the one resource that it is about.
    pub fn resource(&self) -> BTreeMap<String, String> {
        let all = ["resourceMetrics", "resourceSpans"].map(|field| list(&self.0["body"][field]));
        let all = all.concat();
        assert_eq!(all.len(), 1, "one resource: {all:?}");
        attributes(&all[0]["resource"]).into_iter().collect()
    }

    /// The metrics as they came, and the name of the scope of each.
    pub fn raw_metrics(&self) -> Vec<(String, Value)> {
        self.scoped("resourceMetrics", "scopeMetrics", "metrics")
    }

    /// The spans as they came, and the name of the scope of each.
    pub fn spans(&self) -> Vec<(String, Value)> {
        self.scoped("resourceSpans", "scopeSpans", "spans")
    }

    fn scoped(&self, resources: &str, scopes: &str, items: &str) -> Vec<(String, Value)> {
        let mut found = Vec::new();
        for resource in list(&self.0["body"][resources]) {
            for scope in list(&resource[scopes]) {
                let name = scope["scope"]["name"].as_str().unwrap_or_default();
                found.extend(list(&scope[items]).into_iter().map(|item| (name.to_owned(), item)));
            }
        }
        found
    }

    /// The metrics under their Prometheus names, histograms as Prometheus has them: what a pull of the same values shows.
    pub fn metrics(&self) -> Exposition {
        Exposition::of(self.raw_metrics().iter().flat_map(|(_, metric)| rows(metric)))
    }
}

/// The catalogue's entry for a metric that was pushed.
pub fn catalogued(metric: &Value) -> &'static Metric {
    let name = metric["name"].as_str().unwrap();
    let entry = CATALOGUE.iter().find(|entry| entry.otlp == name);
    entry.unwrap_or_else(|| panic!("{name} is not in the catalogue"))
}

/// An attribute as it came, with its type.
pub fn attribute(item: &Value, name: &str) -> Option<Value> {
    let all = list(&item["attributes"]).into_iter();
    let mut all = all.filter(|attribute| attribute["key"] == name);
    all.next().map(|attribute| attribute["value"].clone())
}

fn attributes(item: &Value) -> Vec<(String, String)> {
    let all = list(&item["attributes"]).into_iter().map(|attribute| {
        let value = attribute["value"].as_object().unwrap().values().next().unwrap();
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        (attribute["key"].as_str().unwrap().to_owned(), value)
    });
    let mut all: Vec<_> = all.collect();
    all.sort();
    all
}

fn rows(metric: &Value) -> Vec<Row> {
    let name = catalogued(metric).prometheus;
    let points = |kind: &str| list(&metric[kind]["dataPoints"]);
    let plain = points("gauge").into_iter().chain(points("sum"));
    let plain = plain.map(|point| {
        let value = [&point["asInt"], &point["asDouble"]].into_iter().find_map(number);
        (name.to_owned(), attributes(&point), value.expect("a value"))
    });
    plain.chain(points("histogram").iter().flat_map(|point| histogram(name, point))).collect()
}

fn histogram(name: &str, point: &Value) -> Vec<Row> {
    let labels = attributes(point);
    let bounds = list(&point["explicitBounds"]);
    let bounds = bounds.iter().filter_map(number).map(|bound| bound.to_string());
    let mut sum = 0.0;
    let mut rows = Vec::new();
    for (bound, count) in bounds.chain(["+Inf".to_owned()]).zip(list(&point["bucketCounts"])) {
        sum += number(&count).expect("a count");
        let mut labels = labels.clone();
        labels.push(("le".to_owned(), bound));
        labels.sort();
        rows.push((format!("{name}_bucket"), labels, sum));
    }
    // protobuf's JSON form leaves out what is zero.
    let of = |field: &str| number(&point[field]).unwrap_or_default();
    rows.push((format!("{name}_sum"), labels.clone(), of("sum")));
    rows.push((format!("{name}_count"), labels, of("count")));
    rows
}

/// 64-bit integers are strings.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}
