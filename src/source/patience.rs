//! How a voice goes on while its server is out of reach: with pauses that grow.

use std::time::Duration;

/// Pause after the first failure, and the longest one after many.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// Waits longer and longer.
#[derive(Debug)]
pub(super) struct Pauses {
    next: Duration,
}

impl Pauses {
    pub(super) fn new() -> Self {
        Self { next: PAUSES.0 }
    }

    /// How long to wait now.
    pub(super) fn grow(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(PAUSES.1);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit() {
        let mut pauses = Pauses::new();
        let taken: Vec<_> = (0..7).map(|_| pauses.grow().as_millis()).collect();
        assert_eq!(taken, [250, 500, 1000, 2000, 4000, 5000, 5000]);
    }
}
