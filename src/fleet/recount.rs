//! Counters that somebody else counts.

use std::collections::BTreeMap;

use super::MAX_RANKS;
use super::load::{Rank, SpecDecodeCounts};

/// Re-counts a cumulative value that a worker reports, so that what the bridge exports never spikes and never falls.
///
/// The first value seen is the baseline and counts as zero: a bridge that starts beside an old worker must not show its
/// whole life as one increase. A value below the last one is a restart, and counts whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recount {
    last: Option<u64>,
    total: Option<u64>,
}

impl Recount {
    /// Takes the value now reported.
    pub fn see(&mut self, value: u64) {
        let increase = match self.last {
            None => 0,
            Some(last) if value < last => value,
            Some(last) => value - last,
        };
        self.total = Some(self.total.unwrap_or_default().saturating_add(increase));
        self.last = Some(value);
    }

    /// Takes the value that another process reports in its place: a smaller one is a restart, any other a new baseline.
    pub(super) fn see_another(&mut self, value: u64) {
        if self.last.is_some_and(|last| value >= last) {
            self.rebase();
        }
        self.see(value);
    }

    /// What is reported next is a new baseline: it comes by another way, which may lag behind.
    fn rebase(&mut self) {
        self.last = None;
    }

    /// What was counted since the baseline, once there is one.
    #[must_use]
    pub fn total(&self) -> Option<u64> {
        self.total
    }
}

/// What a report came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Voice {
    Stats,
    Events,
}

/// The [`SpecDecodeCounts`] of every rank of a worker, re-counted: each rank is an engine that counts on its own.
#[derive(Debug, Clone, Default)]
pub(super) struct SpecDecodeRecounts(BTreeMap<Rank, (Option<Voice>, SpecDecodeRecount)>);

impl SpecDecodeRecounts {
    /// Takes the counts now reported, as long as there is room for their rank.
    pub(super) fn see(&mut self, rank: Rank, voice: Voice, counts: &SpecDecodeCounts) {
        if self.0.len() >= MAX_RANKS as usize && !self.0.contains_key(&rank) {
            return;
        }
        let (last, recount) = self.0.entry(rank).or_default();
        if last.replace(voice).is_some_and(|last| last != voice) {
            recount.rebase();
        }
        recount.see(counts);
    }

    /// The counts since the baseline, of all ranks.
    pub(super) fn totals(&self) -> SpecDecodeCounts {
        let totals = self.0.values().map(|(_, recount)| recount.totals());
        totals.reduce(|sum, other| sum.plus(&other)).unwrap_or_default()
    }
}

/// [`SpecDecodeCounts`] re-counted.
#[derive(Debug, Clone, Default)]
struct SpecDecodeRecount {
    drafts: Recount,
    draft_tokens: Recount,
    accepted_tokens: Recount,
    accepted_per_position: Vec<Recount>,
}

impl SpecDecodeRecount {
    fn rebase(&mut self) {
        for recount in [&mut self.drafts, &mut self.draft_tokens, &mut self.accepted_tokens] {
            recount.rebase();
        }
        self.accepted_per_position.iter_mut().for_each(Recount::rebase);
    }

    /// Takes the counts now reported.
    fn see(&mut self, counts: &SpecDecodeCounts) {
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
    fn totals(&self) -> SpecDecodeCounts {
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

    #[test]
    fn each_rank_counts_on_its_own_and_another_way_is_another_baseline() {
        let mut recounts = SpecDecodeRecounts::default();
        let mut see = |rank, voice, drafts| {
            let counts = SpecDecodeCounts { drafts: Some(drafts), ..SpecDecodeCounts::default() };
            recounts.see(Rank(rank), voice, &counts);
            recounts.totals().drafts.unwrap()
        };
        let totals = [
            see(0, Voice::Events, 1000),
            see(1, Voice::Events, 10),
            see(0, Voice::Events, 1002),
            see(1, Voice::Events, 13),
            see(0, Voice::Stats, 1001),
            see(0, Voice::Stats, 1004),
        ];
        assert_eq!(totals, [0, 0, 2, 5, 5, 8]);
    }
}
