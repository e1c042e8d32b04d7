//! One test binary: linking a binary for each file costs more than everything else here.
//!
//! Every test starts the servers that it needs, on ports of their own, and the real programs of this package.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on says so")]
#![allow(clippy::print_stdout, reason = "a test says what it left out")]
#![allow(unreachable_pub, missing_docs, reason = "nobody links against a test")]

mod support;

mod bad_events;
mod bad_input;
mod bill;
mod catalogue;
mod collector;
mod dashboards;
mod demo;
mod etcd;
mod events;
mod exposition;
mod files;
mod fixtures;
mod http;
mod ids;
mod kubernetes;
mod laptop;
mod log;
mod manifests;
mod mock;
mod nats_credentials;
mod nats_flood;
mod nats_permissions;
mod nats_tls;
mod otlp;
mod prometheus;
mod publishers;
mod real_clusters;
mod real_today;
mod real_workers;
mod releases;
mod rules;
mod scrape;
mod secrets;
mod stack;
