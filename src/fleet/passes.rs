//! Forward passes of a worker's engine (Dynamo 1.1 and later), added up.

use std::collections::BTreeMap;
use std::time::Instant;

use super::Rank;
use super::bounds::PASSES;
use super::observation::Channel;

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
    counter: Option<(u64, Instant)>,
    totals: PassTotals,
}

impl Passes {
    /// Takes a pass or a heartbeat.
    pub(super) fn take(&mut self, channel: Channel, rank: Rank, pass: Pass, now: Instant) {
        let Track { last, counter, totals } = self.0.entry(rank).or_default();
        // A counter that goes back is an engine that started anew, and so is one that no engine could have come to.
        let gap = counter.map_or(0, |(counter, at)| {
            let gap = pass.counter.saturating_sub(counter).saturating_sub(1);
            if gap > PASSES.most(now.saturating_duration_since(at)) { 0 } else { gap }
        });
        totals.lost = totals.lost.saturating_add(gap);
        (*last, *counter) = (Some((channel, pass)), Some((pass.counter, now)));
        // An engine that receives prompts from another one reports a chunk of them with no time. A heartbeat has none at all.
        totals.prefill_tokens = totals.prefill_tokens.saturating_add(pass.scheduled.prefill_tokens);
        if pass.wall_time > 0.0 {
            totals.passes = totals.passes.saturating_add(1);
            totals.decode_tokens = totals.decode_tokens.saturating_add(pass.scheduled.decode_requests);
        }
    }

    /// Whether a pass of that rank was heard.
    pub(super) fn has(&self, rank: Rank) -> bool {
        self.0.contains_key(&rank)
    }

    /// How many ranks were heard.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The last pass of other ranks is no longer how they are.
    pub(super) fn keep(&mut self, is_kept: impl Fn(Rank) -> bool) {
        for (_, track) in self.0.iter_mut().filter(|(rank, _)| !is_kept(**rank)) {
            track.last = None;
        }
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

    /// The channels over which the last ones came.
    pub(super) fn channels(&self) -> impl Iterator<Item = (Rank, Channel)> {
        self.0.iter().filter_map(|(rank, track)| track.last.map(|(channel, _)| (*rank, channel)))
    }

    /// Forgets all of a rank.
    pub(super) fn remove(&mut self, rank: Rank) {
        self.0.remove(&rank);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
        let (mut passes, now) = (Passes::default(), Instant::now());
        passes.take(CHANNEL, Rank(0), pass(41, 0.02), now);
        passes.take(CHANNEL, Rank(0), Pass { counter: 42, ..Pass::default() }, now);
        passes.take(CHANNEL, Rank(0), pass(43, 0.01), now);
        assert_eq!(totals(&passes), PassTotals { passes: 2, prefill_tokens: 200, decode_tokens: 6, lost: 0 });
    }

    #[test]
    fn a_chunk_of_a_prompt_that_took_no_time_counts_its_tokens() {
        let (mut passes, now) = (Passes::default(), Instant::now());
        let scheduled = Scheduled { prefill_requests: 1, prefill_tokens: 1024, ..Scheduled::default() };
        passes.take(CHANNEL, Rank(0), Pass { counter: 1, scheduled, ..Pass::default() }, now);
        assert_eq!(totals(&passes), PassTotals { prefill_tokens: 1024, ..PassTotals::default() });
    }

    /// What is lost after each of these counters, a second between two.
    fn lost(counters: &[u64]) -> Vec<u64> {
        let (mut passes, start) = (Passes::default(), Instant::now());
        let mut after = |second, counter| {
            passes.take(CHANNEL, Rank(0), pass(counter, 0.01), start + Duration::from_secs(second));
            totals(&passes).lost
        };
        (0..).zip(counters).map(|(second, counter)| after(second, *counter)).collect()
    }

    #[test]
    fn gaps_after_the_first_pass_are_counted_and_a_restart_is_none() {
        assert_eq!(lost(&[1000, 1003, 1, 2, 5_002]), [0, 2, 2, 2, 5_001]);
    }

    #[test]
    fn a_counter_that_no_engine_comes_to_is_another_count() {
        assert_eq!(lost(&[1000, i64::MAX as u64, 1001, 1003]), [0, 0, 0, 1]);
        assert_eq!(lost(&[1000, 100_000, 100_002]), [0, 0, 1]);
    }

    #[test]
    fn a_lost_channel_takes_the_last_pass_and_leaves_the_totals() {
        let (mut passes, now) = (Passes::default(), Instant::now());
        passes.take(CHANNEL, Rank(0), pass(1, 0.01), now);
        passes.forget(CHANNEL);
        let (_, last, totals) = passes.ranks().next().unwrap();
        assert_eq!((last, totals.passes), (None, 1));
    }
}
