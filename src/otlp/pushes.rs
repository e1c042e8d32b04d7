//! What became of the pushes, counted for the bridge's own metrics.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Signal;
use crate::fleet::PushCounts;

/// The pushes of one signal since the process started. There is one exporter a signal and process.
#[derive(Debug, Default)]
pub(super) struct Pushes {
    failed: AtomicU64,
    rejected: AtomicU64,
}

/// Each is there once its signal is pushed.
static METRICS: OnceLock<Pushes> = OnceLock::new();
static TRACES: OnceLock<Pushes> = OnceLock::new();

/// Those of every signal that is pushed.
pub(crate) fn push_counts() -> Vec<PushCounts> {
    let counts = |signal: Signal| Some(Pushes::cell(signal).get()?.counts(signal));
    [Signal::Metrics, Signal::Traces].into_iter().filter_map(counts).collect()
}

impl Pushes {
    fn cell(signal: Signal) -> &'static OnceLock<Self> {
        match signal {
            Signal::Metrics => &METRICS,
            Signal::Traces => &TRACES,
        }
    }

    /// Those of a signal that is pushed from now on.
    pub(super) fn begin(signal: Signal) -> &'static Self {
        Self::cell(signal).get_or_init(Self::default)
    }

    /// A push did not arrive.
    pub(super) fn fail(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// Data points or spans arrived and were not taken.
    pub(super) fn reject(&self, items: u64) {
        self.rejected.fetch_add(items, Ordering::Relaxed);
    }

    fn counts(&self, signal: Signal) -> PushCounts {
        PushCounts {
            signal: signal.lower(),
            failed: self.failed.load(Ordering::Relaxed),
            rejected_items: self.rejected.load(Ordering::Relaxed),
        }
    }
}
