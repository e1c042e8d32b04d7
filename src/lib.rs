//! Telemetry bridge for NVIDIA Dynamo.
pub mod bridge;
pub mod config;
pub mod exposition;
pub mod fleet;
mod http;
pub mod instruments;
mod journal;
pub mod mock;
pub mod otlp;
pub mod process;
pub mod source;
pub mod target;
pub mod telemetry;
pub mod wire;

pub use config::Config;
