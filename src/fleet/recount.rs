//! Counters that somebody else counts.

use std::collections::BTreeMap;
use std::time::Instant;

use super::MAX_RANKS;
use super::bounds::{DRAFTED, Rate};
use super::load::{Rank, SpecDecodeCounts};

/// Re-counts a cumulative value that a worker reports, so that what the bridge exports never spikes and never falls.
///
/// The first value seen is the baseline and counts as zero: a bridge that starts beside an old worker must not show its
/// whole life as one increase. A value below the last one is a restart, and counts whole. One that grew faster than it can
/// is doubted: it is passed over if what follows does not go on from it, else it is a new baseline.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Recount {
    last: Option<(u64, Instant)>,
    doubted: Option<u64>,
    total: Option<u64>,
}

impl Recount {
    /// Takes the value now reported, which grows at that rate at most. Whether it could be.
    pub(super) fn see(&mut self, value: u64, now: Instant, rate: Rate) -> bool {
        let increase = |last| if value < last { value } else { value - last };
        let most = self.last.map_or(0, |(_, at)| rate.most(now.saturating_duration_since(at)));
        let added = self.last.map_or(0, |(last, _)| increase(last));
        let goes_on = self.doubted.is_some_and(|doubted| value >= doubted && value - doubted <= most);
        let total = self.total.unwrap_or_default();
        if added > most && !goes_on {
            self.doubted = Some(value);
            return false;
        }
        self.total = Some(if added > most { total } else { total.saturating_add(added) });
        (self.last, self.doubted) = (Some((value, now)), None);
        true
    }

    /// Takes the value that another process reports in its place: a smaller one is a restart, any other a new baseline.
    pub(super) fn see_another(&mut self, value: u64, now: Instant, rate: Rate) -> bool {
        if self.last.is_some_and(|(last, _)| value >= last) {
            self.rebase();
        }
        self.see(value, now, rate)
    }

    /// What is reported next is a new baseline: it comes by another way, which may lag behind.
    fn rebase(&mut self) {
        (self.last, self.doubted) = (None, None);
    }

    /// What was counted since the baseline, once there is one.
    pub(super) fn total(&self) -> Option<u64> {
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
    /// Takes the counts now reported, as long as there is room for their rank. Whether they could be.
    pub(super) fn see(&mut self, rank: Rank, voice: Voice, counts: &SpecDecodeCounts, now: Instant) -> bool {
        if self.0.len() >= MAX_RANKS as usize && !self.0.contains_key(&rank) {
            return true;
        }
        let (last, recount) = self.0.entry(rank).or_default();
        if last.replace(voice).is_some_and(|last| last != voice) {
            recount.rebase();
        }
        recount.see(counts, now)
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

    /// Takes the counts now reported. Whether they could be.
    fn see(&mut self, counts: &SpecDecodeCounts, now: Instant) -> bool {
        let mut could_be = true;
        let reported = [counts.drafts, counts.draft_tokens, counts.accepted_tokens];
        let recounts = [&mut self.drafts, &mut self.draft_tokens, &mut self.accepted_tokens];
        for (recount, value) in recounts.into_iter().zip(reported) {
            if let Some(value) = value {
                could_be &= recount.see(value, now, DRAFTED);
            }
        }
        let positions = counts.accepted_per_position.len().max(self.accepted_per_position.len());
        self.accepted_per_position.resize(positions, Recount::default());
        for (recount, value) in self.accepted_per_position.iter_mut().zip(&counts.accepted_per_position) {
            could_be &= recount.see(*value, now, DRAFTED);
        }
        could_be
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
    use super::super::bounds::REQUESTS;
    use super::*;

    #[test]
    fn the_first_value_is_the_baseline_and_a_fall_is_a_restart() {
        assert_eq!(Recount::default().total(), None, "nothing reported, nothing shown");
        assert_eq!(totals(&[1_000_000, 1_000_005, 1_000_005, 3, 4]), [0, 5, 5, 8, 9]);
    }

    /// What the totals are after each value of a count of requests.
    fn totals(values: &[u64]) -> Vec<u64> {
        let (mut recount, now) = (Recount::default(), Instant::now());
        let mut total = |value| {
            recount.see(value, now, REQUESTS);
            recount.total().unwrap()
        };
        values.iter().map(|value| total(*value)).collect()
    }

    #[test]
    fn a_value_that_leaps_is_passed_over_and_two_that_go_on_are_another_count() {
        const LEAP: u64 = i64::MAX as u64;
        assert_eq!(totals(&[1000, LEAP, 1005, 1006]), [0, 0, 5, 6]);
        assert_eq!(totals(&[1000, LEAP, LEAP + 5, LEAP + 6]), [0, 0, 0, 1], "it did start anew");
        assert_eq!(totals(&[1000, LEAP, LEAP - 1, 1005]), [0, 0, 0, 5]);
        assert_eq!(totals(&[LEAP, 1_000_000, 1_000_005, 1_000_006]), [0, 0, 0, 1], "the first one was the lie");
    }

    #[test]
    fn each_rank_counts_on_its_own_and_another_way_is_another_baseline() {
        let (mut recounts, now) = (SpecDecodeRecounts::default(), Instant::now());
        let mut see = |rank, voice, drafts| {
            let counts = SpecDecodeCounts { drafts: Some(drafts), ..SpecDecodeCounts::default() };
            recounts.see(Rank(rank), voice, &counts, now);
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
