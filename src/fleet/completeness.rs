//! How much of what was published lately was heard.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::{Health, Topic};

/// Over which it is told.
const WINDOW: Duration = Duration::from_secs(60);
/// Between two marks.
const STEP: Duration = Duration::from_secs(5);

/// Events heard and missed by topic, at moments of the last minute.
#[derive(Debug, Default)]
pub(super) struct Completeness(VecDeque<(Instant, BTreeMap<Topic, Sums>)>);

#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    heard: u64,
    missed: u64,
}

impl Completeness {
    /// Heard by heard and missed of the last minute; nothing of a topic of which neither was.
    pub(super) fn look(&mut self, health: &Health, now: Instant) -> BTreeMap<Topic, f64> {
        let old = |at: Instant| now.saturating_duration_since(at) >= WINDOW;
        while self.0.get(1).is_some_and(|(at, _)| old(*at)) {
            self.0.pop_front();
        }
        let sums: BTreeMap<_, _> = Topic::EVENTS.into_iter().map(|topic| (topic, sums(health, topic))).collect();
        let before = |topic| self.0.front().and_then(|(_, sums)| sums.get(&topic)).copied().unwrap_or_default();
        let ratio = |(topic, now): (&Topic, &Sums)| Some((*topic, now.since(before(*topic))?));
        let ratios = sums.iter().filter_map(ratio).collect();
        if self.0.back().is_none_or(|(at, _)| now.saturating_duration_since(*at) >= STEP) {
            self.0.push_back((now, sums));
        }
        ratios
    }
}

impl Sums {
    #[expect(clippy::cast_precision_loss, reason = "events of a minute")]
    fn since(self, before: Self) -> Option<f64> {
        let (heard, missed) = (self.heard - before.heard, self.missed.saturating_sub(before.missed));
        (heard > 0 || missed > 0).then(|| heard as f64 / (heard as f64 + missed as f64))
    }
}

fn sums(health: &Health, topic: Topic) -> Sums {
    let missed = topic.sources().iter().filter_map(|source| health.missed.get(&(*source, topic)));
    let missed = missed.fold(0, |sum: u64, missed| sum.saturating_add(*missed));
    Sums { heard: health.events.get(&topic).copied().unwrap_or_default(), missed }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::Source;

    #[test]
    fn the_last_minute_counts_and_silence_says_nothing() {
        let (mut completeness, mut health, start) = (Completeness::default(), Health::default(), Instant::now());
        let mut at = |health: &Health, seconds| completeness.look(health, start + Duration::from_secs(seconds));
        assert!(at(&health, 0).is_empty());
        health.events.insert(Topic::KvMetrics, 3);
        health.missed.insert((Source::Zmq, Topic::KvMetrics), 1);
        assert_eq!(at(&health, 5), BTreeMap::from([(Topic::KvMetrics, 0.75)]));
        health.events.insert(Topic::KvMetrics, 4);
        assert_eq!(at(&health, 70), BTreeMap::from([(Topic::KvMetrics, 1.0)]), "the loss is over a minute ago");
        assert!(at(&health, 75).contains_key(&Topic::KvMetrics));
        assert!(at(&health, 140).is_empty());
    }
}
