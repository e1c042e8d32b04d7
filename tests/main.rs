//! One test binary: linking a binary for each file costs more than everything else here.
//!
//! Every test starts the servers that it needs, on ports of their own, and the real programs of this package.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on says so")]

mod support;

mod bad_input;
mod collector;
mod demo;
mod events;
mod otlp;
mod prometheus;
mod real_workers;
mod scrape;
