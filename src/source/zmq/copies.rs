//! What several brokers bring of one publisher: the same messages, each of which counts once.
//!
//! A publisher sends each message to every broker that it found when it started, and a broker hands out in order what it
//! gets. So a message whose number is not above the highest that any of them brought is a copy. One whose number is not
//! above the last over the same broker is of a publisher that started anew, as the others will bring it too.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use crate::fleet::{Channel, Numbered};

/// Publishers told apart behind all brokers.
pub(super) const MAX_CHANNELS: usize = 200_000;

/// A publisher that was silent for so long makes room for others: each process has one of its own, and ends some day.
const MEMORY: Duration = Duration::from_secs(60 * 60);

/// How often room is looked for.
const SWEEP: Duration = Duration::from_secs(60);

/// What came over all brokers.
#[derive(Debug, Default)]
pub(super) struct Copies {
    channels: HashMap<Channel, Track>,
    brokers: u64,
    swept: Option<Instant>,
}

/// How far a channel is.
#[derive(Debug)]
struct Track {
    heard: Instant,
    at: Option<Position>,
    /// The same over each broker that brings it.
    over: BTreeMap<u64, Position>,
}

/// How often the publisher started anew, and the number of its last message.
type Position = (u64, u64);

impl Copies {
    /// What tells another broker from those before.
    pub(super) fn join(&mut self) -> u64 {
        self.brokers += 1;
        self.brokers
    }

    /// Whether a message is the first of its copies; `None` where it is of one publisher more than can be told apart.
    pub(super) fn is_first(&mut self, broker: u64, message: Numbered, now: Instant) -> Option<bool> {
        let Numbered { channel, sequence } = message;
        if !self.channels.contains_key(&channel) && !self.has_room(now) {
            return None;
        }
        let first = || Track { heard: now, at: None, over: BTreeMap::new() };
        let Track { heard, at, over } = self.channels.entry(channel).or_insert_with(first);
        *heard = now;
        let starts = match over.get(&broker) {
            Some((starts, last)) => starts + u64::from(sequence <= *last),
            None => at.map_or(0, |(starts, _)| starts),
        };
        let position = (starts, sequence);
        over.insert(broker, position);
        let is_first = Some(position) > *at;
        *at = (*at).max(Some(position));
        Some(is_first)
    }

    fn has_room(&mut self, now: Instant) -> bool {
        let is_old = |at: Instant, limit| now.saturating_duration_since(at) >= limit;
        if self.channels.len() >= MAX_CHANNELS && self.swept.is_none_or(|at| is_old(at, SWEEP)) {
            self.swept = Some(now);
            self.channels.retain(|_, track| !is_old(track.heard, MEMORY));
        }
        self.channels.len() < MAX_CHANNELS
    }

    /// A broker is no longer heard. Which of the channels that it brought others still bring.
    pub(super) fn leave(&mut self, broker: u64) -> BTreeSet<Channel> {
        let mut others = BTreeSet::new();
        self.channels.retain(|channel, Track { at, over, .. }| {
            if over.remove(&broker).is_some() && !over.is_empty() {
                others.insert(*channel);
                // One that came between two starts of the publisher may not know of the second.
                for (starts, _) in over.values_mut() {
                    *starts = at.map_or(0, |(starts, _)| starts);
                }
            }
            !over.is_empty()
        });
        others
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{Source, Topic};

    const CHANNEL: Channel = Channel { source: Source::Zmq, publisher: 7, topic: Topic::KvMetrics };

    /// Which of the messages, each with the broker that brings it, are the first of their copies.
    fn first(copies: &mut Copies, messages: &[(u64, u64)]) -> Vec<bool> {
        let now = Instant::now();
        let is_first =
            |&(broker, sequence)| copies.is_first(broker, Numbered { channel: CHANNEL, sequence }, now).unwrap();
        messages.iter().map(is_first).collect()
    }

    #[test]
    fn each_message_counts_once_whichever_broker_is_faster() {
        let mut copies = Copies::default();
        let messages = [(1, 0), (2, 0), (2, 1), (2, 2), (1, 1), (1, 2), (1, 3), (3, 2), (3, 3), (3, 4), (1, 4)];
        let expected = [true, false, true, true, false, false, true, false, false, true, false];
        assert_eq!(first(&mut copies, &messages), expected);
    }

    #[test]
    fn a_publisher_that_starts_anew_is_heard_at_once_and_once() {
        let mut copies = Copies::default();
        assert_eq!(
            first(&mut copies, &[(1, 500), (2, 499), (1, 0), (2, 500), (2, 0), (2, 1)]),
            [true, false, true, false, false, true]
        );
        // One that came after the publisher's end.
        assert_eq!(first(&mut copies, &[(1, 1), (3, 0), (3, 2)]), [false, false, true]);
    }

    #[test]
    fn what_another_broker_still_brings_goes_on_where_it_was() {
        let mut copies = Copies::default();
        assert_eq!(first(&mut copies, &[(1, 0), (2, 0), (1, 1)]), [true, false, true]);
        assert_eq!(copies.leave(1), BTreeSet::from([CHANNEL]));
        assert_eq!(first(&mut copies, &[(2, 1), (2, 2)]), [false, true]);
        assert_eq!(copies.leave(2), BTreeSet::new());
        assert!(copies.channels.is_empty());
        assert_eq!(first(&mut copies, &[(3, 0)]), [true]);
    }

    #[test]
    fn a_broker_that_missed_a_start_is_heard_once_it_is_alone() {
        let mut copies = Copies::default();
        assert_eq!(first(&mut copies, &[(1, 500), (2, 3), (1, 0), (1, 4), (2, 5)]), [true, false, true, true, false]);
        copies.leave(1);
        assert_eq!(first(&mut copies, &[(2, 6)]), [true]);
    }

    #[test]
    fn publishers_are_bounded_and_silent_ones_make_room() {
        let (mut copies, now) = (Copies::default(), Instant::now());
        let mut hear = |publisher, now| {
            copies.is_first(1, Numbered { channel: Channel { publisher, ..CHANNEL }, sequence: 0 }, now)
        };
        for publisher in 0..MAX_CHANNELS as u64 {
            assert_eq!(hear(publisher, now), Some(true));
        }
        assert_eq!((hear(MAX_CHANNELS as u64, now), hear(0, now + MEMORY)), (None, Some(true)));
        assert_eq!((hear(MAX_CHANNELS as u64, now + MEMORY), hear(0, now + MEMORY)), (Some(true), Some(true)));
        assert_eq!(copies.channels.len(), 2);
    }
}
