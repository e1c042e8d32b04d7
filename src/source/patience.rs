//! How a voice goes on while its server is out of reach: with pauses that grow, and without filling the log.

use std::time::Duration;

use tokio::time::Instant;

/// Pause after the first failure, and the longest one after many.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
/// A trouble that goes on is written this often.
const COMPLAINT_PAUSE: Duration = Duration::from_secs(60);

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

/// Says when to complain: at once, and then in moderation until all is well again.
#[derive(Debug, Default)]
pub(super) struct Complaints {
    last: Option<Instant>,
}

impl Complaints {
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        let due = self.last.is_none_or(|last| now.saturating_duration_since(last) >= COMPLAINT_PAUSE);
        if due {
            self.last = Some(now);
        }
        due
    }

    /// The next trouble is a new one.
    pub(super) fn over(&mut self) {
        self.last = None;
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

    #[test]
    fn a_trouble_is_complained_of_at_once_and_then_once_a_minute() {
        let (mut complaints, start) = (Complaints::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!([0, 1, 59, 60, 61].map(|second| complaints.is_due(at(second))), [true, false, false, true, false]);
        complaints.over();
        assert!(complaints.is_due(at(62)));
    }
}
