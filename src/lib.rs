//! Telemetry bridge for NVIDIA Dynamo: hears every worker's load and hands it to Prometheus and OTLP.
//!
//! ```text
//!  who is there: NATS $SRV, etcd, files, Kubernetes ─┐                                    ┌─ instruments ─ Prometheus provider ─ /metrics
//!  load, passes: NATS $SRV.STATS and events, ZMQ ────┼─ Observation ─> Fleet ─> Snapshot ─┤
//!  limits:       model cards ────────────────────────┤   (one order,   (watch)            └─ instruments ─ OTLP provider ─ push
//!  placements:   routers' events, NATS and ZMQ ──────┘    one writer)
//! ```
//!
//! Data goes one way. Sources ([`source`]) turn what they hear into [`fleet::Observation`]s. One loop ([`bridge`]) folds
//! them, in order, into the [`fleet::Fleet`], and publishes a [`fleet::Snapshot`] at the end of each scrape, and at least
//! once an interval. Sinks ([`exposition`], [`telemetry`]) read the last snapshot and nothing else.
//!
//! What holds everywhere:
//!
//! - **Unknown is absent.** A value that a worker did not say has no series; it is never zero.
//! - **Gone is gone.** A worker that discovery no longer names leaves every exporter with all its load.
//! - **Counts never fall**, and never move from one label set to another.
//! - **Bad input costs itself.** It is counted by reason, logged at most once a minute, and nothing else changes.
//! - **Everything is bounded**: workers, groups, entries, events held, messages, connections.
//!
//! | module | what it is |
//! |---|---|
//! | [`target`] | names: namespaces, components, endpoints, and how each Dynamo release spells them on NATS |
//! | [`wire`] | bytes: the one place that knows Dynamo's JSON and msgpack |
//! | [`fleet`] | the domain, pure: no clock, no I/O, no OpenTelemetry |
//! | [`source`] | the voices: NATS (scrape, events), etcd, files, Kubernetes, ZMQ; what discovery holds |
//! | `zmtp` | the wire protocol of ZMQ, bounded |
//! | [`bridge`] | where all meet: [`bridge::run`] |
//! | [`instruments`] | the metric catalogue |
//! | [`exposition`], `http` | the pull side |
//! | `readiness`, [`healthcheck`] | whether what is shown can be believed, and who asks |
//! | [`telemetry`], [`otlp`] | the push side, and the bridge's own spans |
//! | [`log`] | what is written, by a thread of its own |
//! | `journal`, `throttle` | the log lines about the fleet; lines that an input causes, in moderation |
//! | [`config`], [`process`], `causes`, `tls`, `redact` | command line, environment, signals, what stands behind an error, without secrets |
//! | [`mock`] | mock workers |

pub mod bridge;
mod causes;
pub mod config;
pub mod exposition;
pub mod fleet;
pub mod healthcheck;
mod http;
pub mod instruments;
mod journal;
pub mod log;
pub mod mock;
pub mod otlp;
pub mod process;
mod readiness;
mod redact;
pub mod source;
pub mod target;
pub mod telemetry;
mod throttle;
mod tls;
pub mod wire;
pub mod zmtp;

pub use config::Config;
