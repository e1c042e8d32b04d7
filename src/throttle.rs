//! A log line that an input can cause again and again is written at once, and then in moderation.

use std::time::{Duration, Instant};

/// The same line comes at most once in this time.
const PAUSE: Duration = Duration::from_secs(60);

/// Says when a line is due, and counts those that were left out.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    last: Option<Instant>,
    left_out: u64,
}

impl Throttle {
    /// How many lines were left out since the last one that was due, where this one is due; `None` where it is to be left
    /// out.
    pub(crate) fn due(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < PAUSE) {
            self.left_out += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }

    /// All is well again: the next trouble is a new one, and due at once.
    pub(crate) fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trouble_is_told_at_once_and_then_once_a_minute_with_the_number_left_out() {
        let (mut throttle, start) = (Throttle::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(
            [0, 1, 59, 60, 61, 120].map(|second| throttle.due(at(second))),
            [Some(0), None, None, Some(2), None, Some(1)]
        );
        throttle.reset();
        assert_eq!(throttle.due(at(121)), Some(0));
    }
}
