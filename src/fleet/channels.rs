//! Numbered channels: what was lost on them, and what is therefore no longer known.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::WorkerKey;
use super::bounds::MESSAGES;
use super::observation::{Channel, Numbered, Source};

/// A publisher that was silent for this long makes room for others.
const MEMORY: Duration = Duration::from_secs(60 * 60);

/// The last number of each channel, and whose values came over it. Publishers go on counting whoever listens: the number is
/// kept when a channel breaks, and tells how much was missed when it is heard again.
#[derive(Debug)]
pub(super) struct Channels {
    tracks: HashMap<Channel, Track>,
    capacity: usize,
}

#[derive(Debug)]
struct Track {
    last: u64,
    at: Instant,
    /// Broke since: it may never be heard again.
    broken: bool,
    workers: BTreeSet<Arc<WorkerKey>>,
}

/// What a message's number tells, where it is not the next one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gap {
    /// Messages that did not come.
    pub(super) lost: u64,
    /// Whose values are no longer known.
    pub(super) workers: BTreeSet<Arc<WorkerKey>>,
}

impl Channels {
    pub(super) fn new(capacity: usize) -> Self {
        Self { tracks: HashMap::new(), capacity }
    }

    /// Takes the number of a message. The first one heard is where counting starts; one that is not greater than the last
    /// is a publisher that started anew, and no gap. One that is greater than any publisher could have come to is another
    /// count: what was lost is not known, but what was heard may be wrong.
    pub(super) fn see(&mut self, message: Numbered, now: Instant) -> Option<Gap> {
        let Numbered { channel, sequence } = message;
        let Some(track) = self.tracks.get_mut(&channel) else {
            if self.tracks.len() >= self.capacity {
                self.tracks.retain(|_, track| !track.broken && now.saturating_duration_since(track.at) < MEMORY);
            }
            if self.tracks.len() < self.capacity {
                let track = Track { last: sequence, at: now, broken: false, workers: BTreeSet::new() };
                self.tracks.insert(channel, track);
            }
            return None;
        };
        let missing = sequence.saturating_sub(track.last).saturating_sub(1);
        let is_leap = missing > MESSAGES.most(now.saturating_duration_since(track.at));
        (track.last, track.at, track.broken) = (sequence, now, false);
        let gap = || Gap { lost: if is_leap { 0 } else { missing }, workers: std::mem::take(&mut track.workers) };
        (missing > 0).then(gap)
    }

    /// A value of that worker came over the channel.
    pub(super) fn carries(&mut self, channel: Channel, worker: &Arc<WorkerKey>) {
        if let Some(track) = self.tracks.get_mut(&channel) {
            track.workers.insert(Arc::clone(worker));
        }
    }

    /// The channel broke; whose values are no longer known.
    pub(super) fn lose(&mut self, channel: Channel) -> BTreeSet<Arc<WorkerKey>> {
        let Some(track) = self.tracks.get_mut(&channel) else { return BTreeSet::new() };
        track.broken = true;
        std::mem::take(&mut track.workers)
    }

    /// The channels of a source.
    pub(super) fn of(&self, source: Source) -> Vec<Channel> {
        self.tracks.keys().filter(|channel| channel.source == source).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{Topic, WorkerId};

    fn message(sequence: u64) -> Numbered {
        Numbered { channel: Channel { source: Source::Zmq, publisher: 7, topic: Topic::KvMetrics }, sequence }
    }

    fn worker() -> Arc<WorkerKey> {
        Arc::new(WorkerKey {
            namespace: "dynamo".into(),
            component: "backend".into(),
            endpoint: "generate".into(),
            id: WorkerId(1),
        })
    }

    impl Channels {
        fn lost(&mut self, message: Numbered, now: Instant) -> u64 {
            self.see(message, now).map_or(0, |gap| gap.lost)
        }
    }

    #[test]
    fn a_gap_is_counted_and_a_restart_is_none() {
        let (mut channels, now) = (Channels::new(10), Instant::now());
        let lost = [100, 101, 105, 0, 1, 1].map(|number| channels.lost(message(number), now));
        assert_eq!(lost, [0, 0, 3, 0, 0, 0]);
    }

    #[test]
    fn a_leap_that_no_publisher_makes_is_another_count_and_what_was_heard_is_unknown() {
        let (mut channels, now) = (Channels::new(10), Instant::now());
        let hour = Duration::from_secs(3600);
        let heard = [(1, now), (1 << 63, now), (2, now), (4, now), (1_000_004, now), (100_000_004, now + hour)];
        let lost = heard.map(|(number, at)| channels.lost(message(number), at));
        assert_eq!(lost, [0, 0, 0, 1, 0, 98_999_999]);
        channels.carries(message(0).channel, &worker());
        let leap = channels.see(message(u64::MAX), now + hour);
        assert_eq!(leap, Some(Gap { lost: 0, workers: BTreeSet::from([worker()]) }));
    }

    #[test]
    fn after_a_gap_the_values_that_came_over_the_channel_are_unknown() {
        let (mut channels, now) = (Channels::new(10), Instant::now());
        let worker = worker();
        channels.see(message(1), now);
        channels.carries(message(1).channel, &worker);
        assert_eq!(channels.see(message(2), now), None);
        let gap = Gap { lost: 1, workers: BTreeSet::from([Arc::clone(&worker)]) };
        assert_eq!(channels.see(message(4), now), Some(gap));
        channels.carries(message(4).channel, &worker);
        assert_eq!(channels.lose(message(4).channel), BTreeSet::from([worker]));
        let missed = Gap { lost: 4, workers: BTreeSet::new() };
        assert_eq!(channels.see(message(9), now), Some(missed), "what was published meanwhile");
    }

    #[test]
    fn channels_are_bounded_and_silent_ones_make_room() {
        let (mut channels, now) = (Channels::new(1), Instant::now());
        let other = |sequence| {
            let mut message = message(sequence);
            message.channel.publisher = 8;
            message
        };
        channels.see(message(1), now);
        channels.see(other(1), now);
        assert_eq!(channels.lost(other(5), now), 0, "no room: not judged");
        channels.see(other(6), now + MEMORY);
        assert_eq!(channels.lost(other(8), now + MEMORY), 1);
        channels.lose(other(8).channel);
        channels.see(message(1), now + MEMORY);
        assert_eq!(channels.lost(message(3), now + MEMORY), 1, "a broken one made room");
    }
}
