//! What became of the pushes, counted for the bridge's own metrics.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::Signal;

/// The pushes of one signal since the process started. There is one exporter a signal and process.
#[derive(Debug)]
pub(crate) struct Pushes {
    exist: AtomicBool,
    failed: AtomicU64,
    rejected: AtomicU64,
}

static METRICS: Pushes = Pushes::new();
static TRACES: Pushes = Pushes::new();

/// Those of every signal that is pushed.
pub(crate) fn of_every_signal() -> impl Iterator<Item = (Signal, &'static Pushes)> {
    let all = [Signal::Metrics, Signal::Traces].into_iter().map(|signal| (signal, Pushes::of(signal)));
    all.filter(|(_, pushes)| pushes.exist.load(Ordering::Relaxed))
}

impl Pushes {
    const fn new() -> Self {
        Self { exist: AtomicBool::new(false), failed: AtomicU64::new(0), rejected: AtomicU64::new(0) }
    }

    fn of(signal: Signal) -> &'static Self {
        match signal {
            Signal::Metrics => &METRICS,
            Signal::Traces => &TRACES,
        }
    }

    /// Those of a signal that is pushed from now on.
    pub(super) fn begin(signal: Signal) -> &'static Self {
        let pushes = Self::of(signal);
        pushes.exist.store(true, Ordering::Relaxed);
        pushes
    }

    pub(super) fn fail(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn reject(&self, items: u64) {
        self.rejected.fetch_add(items, Ordering::Relaxed);
    }

    /// Pushes that did not arrive.
    pub(crate) fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Data points or spans that arrived and were not taken.
    pub(crate) fn rejected(&self) -> u64 {
        self.rejected.load(Ordering::Relaxed)
    }
}
