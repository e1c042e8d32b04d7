//! Forward passes of a worker's engine (Dynamo 1.1 and later), added up.

use std::collections::BTreeMap;

use super::observation::Channel;
use super::{MAX_RANKS, Rank};

/// One iteration of an engine on one rank.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pass {
    /// One more than that of the rank's pass before; an idle engine's heartbeats count along.
    pub counter: u64,
    /// Seconds that it took; 0 for a heartbeat, which is no pass.
    pub wall_time: f64,
    /// What it computed.
    pub scheduled: Scheduled,
    /// What waited.
    pub queued: Queued,
}

/// What a pass computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Scheduled {
    /// Requests whose prompt, or a part of it, was computed.
    pub prefill_requests: u64,
    /// Tokens of those prompts that were computed.
    pub prefill_tokens: u64,
    /// Tokens of those prompts that the KV cache held already.
    pub prefill_kv_tokens: u64,
    /// Requests that got one more token.
    pub decode_requests: u64,
    /// Tokens that the KV cache held for them.
    pub decode_kv_tokens: u64,
}

/// What waited during a pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Queued {
    /// Requests whose prompt waits.
    pub prefill_requests: u64,
    /// Tokens of those prompts.
    pub prefill_tokens: u64,
    /// Requests that were preempted.
    pub decode_requests: u64,
    /// Tokens that the KV cache held for them.
    pub decode_kv_tokens: u64,
}

impl Scheduled {
    /// What older releases called active slots.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.prefill_requests.saturating_add(self.decode_requests)
    }
}

impl Queued {
    /// What older releases called waiting.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.prefill_requests.saturating_add(self.decode_requests)
    }
}

/// The passes of a rank since the bridge first heard one of its worker's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PassTotals {
    /// Passes.
    pub passes: u64,
    /// Sum of [`Scheduled::prefill_tokens`].
    pub prefill_tokens: u64,
    /// Sum of [`Scheduled::decode_requests`]: a token for each.
    pub decode_tokens: u64,
    /// Passes and heartbeats that did not come, by the gaps in [`Pass::counter`].
    pub lost: u64,
}

/// The passes of a worker by rank.
#[derive(Debug, Default)]
pub(super) struct Passes(BTreeMap<Rank, Track>);

#[derive(Debug, Clone, Copy, Default)]
struct Track {
    /// The last one, while it is known.
    last: Option<(Channel, Pass)>,
    counter: Option<u64>,
    totals: PassTotals,
}

impl Passes {
    /// Takes a pass or a heartbeat. Whether there was room for its rank.
    pub(super) fn take(&mut self, channel: Channel, rank: Rank, pass: Pass) -> bool {
        if !self.0.contains_key(&rank) && self.0.len() >= MAX_RANKS as usize {
            return false;
        }
        let Track { last, counter, totals } = self.0.entry(rank).or_default();
        // A counter that goes back is an engine that started anew.
        let gap = counter.map_or(0, |counter| pass.counter.saturating_sub(counter).saturating_sub(1));
        totals.lost = totals.lost.saturating_add(gap);
        (*last, *counter) = (Some((channel, pass)), Some(pass.counter));
        // An engine that receives prompts from another one reports a chunk of them with no time. A heartbeat has none at all.
        totals.prefill_tokens = totals.prefill_tokens.saturating_add(pass.scheduled.prefill_tokens);
        if pass.wall_time > 0.0 {
            totals.passes = totals.passes.saturating_add(1);
            totals.decode_tokens = totals.decode_tokens.saturating_add(pass.scheduled.decode_requests);
        }
        true
    }

    /// What came over that channel last is no longer how it is; what it added up to stays.
    pub(super) fn forget(&mut self, channel: Channel) {
        for track in self.0.values_mut() {
            track.last = track.last.filter(|(heard_over, _)| *heard_over != channel);
        }
    }

    /// Each rank's last pass, while it is known, and what all add up to.
    pub(super) fn ranks(&self) -> impl Iterator<Item = (Rank, Option<Pass>, PassTotals)> {
        self.0.iter().map(|(rank, track)| (*rank, track.last.map(|(_, pass)| pass), track.totals))
    }

    /// The channels over which they came.
    pub(super) fn channels(&self) -> impl Iterator<Item = Channel> {
        self.0.values().filter_map(|track| track.last.map(|(channel, _)| channel))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{Source, Topic};

    const CHANNEL: Channel = Channel { source: Source::Zmq, publisher: 7, topic: Topic::ForwardPassMetrics };

    fn pass(counter: u64, wall_time: f64) -> Pass {
        let scheduled =
            Scheduled { prefill_requests: 1, prefill_tokens: 100, decode_requests: 3, ..Scheduled::default() };
        Pass { counter, wall_time, scheduled, queued: Queued::default() }
    }

    fn totals(passes: &Passes) -> PassTotals {
        passes.ranks().next().unwrap().2
    }

    #[test]
    fn passes_add_up_and_heartbeats_only_keep_the_count() {
        let mut passes = Passes::default();
        passes.take(CHANNEL, Rank(0), pass(41, 0.02));
        passes.take(CHANNEL, Rank(0), Pass { counter: 42, ..Pass::default() });
        passes.take(CHANNEL, Rank(0), pass(43, 0.01));
        assert_eq!(totals(&passes), PassTotals { passes: 2, prefill_tokens: 200, decode_tokens: 6, lost: 0 });
    }

    #[test]
    fn a_chunk_of_a_prompt_that_took_no_time_counts_its_tokens() {
        let mut passes = Passes::default();
        let scheduled = Scheduled { prefill_requests: 1, prefill_tokens: 1024, ..Scheduled::default() };
        passes.take(CHANNEL, Rank(0), Pass { counter: 1, scheduled, ..Pass::default() });
        assert_eq!(totals(&passes), PassTotals { prefill_tokens: 1024, ..PassTotals::default() });
    }

    #[test]
    fn gaps_after_the_first_pass_are_counted_and_a_restart_is_none() {
        let mut passes = Passes::default();
        let lost: Vec<_> = [1000, 1003, 1, 2, i64::MAX as u64, 3]
            .map(|counter| {
                passes.take(CHANNEL, Rank(0), pass(counter, 0.01));
                totals(&passes).lost
            })
            .into();
        let jump = i64::MAX as u64 - 3;
        assert_eq!(lost, [0, 2, 2, 2, 2 + jump, 2 + jump]);
    }

    #[test]
    fn a_lost_channel_takes_the_last_pass_and_leaves_the_totals() {
        let mut passes = Passes::default();
        passes.take(CHANNEL, Rank(0), pass(1, 0.01));
        passes.forget(CHANNEL);
        let (_, last, totals) = passes.ranks().next().unwrap();
        assert_eq!((last, totals.passes), (None, 1));
    }

    #[test]
    fn ranks_are_bounded() {
        let mut passes = Passes::default();
        for rank in 0..MAX_RANKS {
            assert!(passes.take(CHANNEL, Rank(rank), pass(1, 0.01)));
        }
        assert!(!passes.take(CHANNEL, Rank(MAX_RANKS), pass(1, 0.01)));
    }
}
