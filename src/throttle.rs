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
}

/// A connection that comes and goes, told in moderation: trouble as a [`Throttle`] has it, and that all is well again where
/// the last line said otherwise. So the log ends with how it stands, however often it changed.
#[derive(Debug, Default)]
pub(crate) struct Link {
    troubles: Throttle,
    said_well: bool,
}

impl Link {
    /// Whether to say that all is well.
    pub(crate) fn is_well(&mut self) -> bool {
        !std::mem::replace(&mut self.said_well, true)
    }

    /// As [`Throttle::due`].
    pub(crate) fn troubled(&mut self, now: Instant) -> Option<u64> {
        let due = self.troubles.due(now);
        self.said_well &= due.is_none();
        due
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
    }

    #[test]
    fn a_connection_that_comes_and_goes_is_told_of_twice_a_minute_and_ends_as_it_stands() {
        let (mut link, start) = (Link::default(), Instant::now());
        assert!(link.is_well());
        let turns = (0..100).map(|second| (link.troubled(start + Duration::from_secs(second)), link.is_well()));
        let told: Vec<_> = turns.enumerate().filter(|(_, said)| *said != (None, false)).collect();
        assert_eq!(told, [(0, (Some(0), true)), (60, (Some(59), true))]);
    }
}
