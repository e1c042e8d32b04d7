//! Counters that somebody else counts.

use super::load::SpecDecodeCounts;

/// Re-counts a cumulative value that a worker reports, so that what the bridge exports never spikes and never falls.
///
/// The first value seen is the baseline and counts as zero: a bridge that starts beside an old worker must not show its
/// whole life as one increase. A value below the last one is a restart, and counts whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recount {
    last: Option<u64>,
    total: u64,
}

impl Recount {
    /// Takes the value now reported.
    pub fn see(&mut self, value: u64) {
        let increase = match self.last {
            None => 0,
            Some(last) if value < last => value,
            Some(last) => value - last,
        };
        self.total = self.total.saturating_add(increase);
        self.last = Some(value);
    }

    /// What was counted since the baseline, once there is one.
    #[must_use]
    pub fn total(&self) -> Option<u64> {
        self.last.map(|_| self.total)
    }
}

/// [`SpecDecodeCounts`] re-counted.
#[derive(Debug, Clone, Default)]
pub(super) struct SpecDecodeRecount {
    drafts: Recount,
    draft_tokens: Recount,
    accepted_tokens: Recount,
    accepted_per_position: Vec<Recount>,
}

impl SpecDecodeRecount {
    /// Takes the counts now reported.
    pub(super) fn see(&mut self, counts: &SpecDecodeCounts) {
        let reported = [counts.drafts, counts.draft_tokens, counts.accepted_tokens];
        let recounts = [&mut self.drafts, &mut self.draft_tokens, &mut self.accepted_tokens];
        for (recount, value) in recounts.into_iter().zip(reported) {
            if let Some(value) = value {
                recount.see(value);
            }
        }
        let positions = counts.accepted_per_position.len().max(self.accepted_per_position.len());
        self.accepted_per_position.resize(positions, Recount::default());
        for (recount, value) in self.accepted_per_position.iter_mut().zip(&counts.accepted_per_position) {
            recount.see(*value);
        }
    }

    /// The counts since the baseline.
    pub(super) fn totals(&self) -> SpecDecodeCounts {
        SpecDecodeCounts {
            drafts: self.drafts.total(),
            draft_tokens: self.draft_tokens.total(),
            accepted_tokens: self.accepted_tokens.total(),
            accepted_per_position: self.accepted_per_position.iter().filter_map(Recount::total).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_is_the_baseline_and_a_fall_is_a_restart() {
        let mut recount = Recount::default();
        assert_eq!(recount.total(), None, "nothing reported, nothing shown");
        let mut totals = Vec::new();
        for value in [1_000_000, 1_000_005, 1_000_005, 3, 4] {
            recount.see(value);
            totals.push(recount.total().unwrap());
        }
        assert_eq!(totals, [0, 5, 5, 8, 9]);
    }
}
