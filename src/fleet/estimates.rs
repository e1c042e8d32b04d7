//! What KV routers believe of workers by their own book-keeping: each router believes something else, and none of it is what
//! the worker says of itself.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::observation::Channel;
use super::{Id, Rank};

/// What a router believes of one rank of a worker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Estimate {
    /// KV-cache blocks of the requests that it placed there.
    pub decode_blocks: Option<u64>,
    /// Tokens of their prompts that are still to be computed.
    pub prefill_tokens: Option<u64>,
}

/// The last estimate of each router for each rank of each worker.
#[derive(Debug)]
pub(super) struct Estimates {
    /// A router that said nothing for so long is gone, and so is a worker that nothing names.
    ttl: Duration,
    /// Estimates kept at most.
    capacity: usize,
    kept: usize,
    routers: HashMap<Channel, Router>,
}

#[derive(Debug)]
struct Router {
    heard: Instant,
    workers: HashMap<(Id, Rank), (Estimate, Instant)>,
}

impl Estimates {
    pub(super) fn new(ttl: Duration, capacity: usize) -> Self {
        Self { ttl, capacity, kept: 0, routers: HashMap::new() }
    }

    /// Takes an estimate. Whether there was room for it.
    pub(super) fn take(&mut self, channel: Channel, of: (Id, Rank), estimate: Estimate, now: Instant) -> bool {
        let is_known = self.routers.get(&channel).is_some_and(|router| router.workers.contains_key(&of));
        if !is_known && self.kept >= self.capacity {
            return false;
        }
        let router = self.routers.entry(channel).or_insert_with(|| Router { heard: now, workers: HashMap::new() });
        router.heard = now;
        router.workers.insert(of, (estimate, now));
        self.kept += usize::from(!is_known);
        true
    }

    /// What came over that channel is no longer known.
    pub(super) fn lose(&mut self, channel: Channel) {
        if let Some(router) = self.routers.remove(&channel) {
            self.kept -= router.workers.len();
        }
    }

    /// Forgets what routers said that are gone, and of workers that are.
    pub(super) fn expire(&mut self, now: Instant, is_named: impl Fn(&Id) -> bool) {
        let is_new = |at: Instant| now.saturating_duration_since(at) < self.ttl;
        self.routers.retain(|_, router| {
            router.workers.retain(|(id, _), (_, at)| is_named(id) || is_new(*at));
            is_new(router.heard)
        });
        self.kept = self.routers.values().map(|router| router.workers.len()).sum();
    }

    /// Every estimate, by the channel that it came over, in no order.
    pub(super) fn all(&self) -> impl Iterator<Item = (Channel, &Id, Rank, Estimate)> {
        self.routers.iter().flat_map(|(channel, router)| {
            router.workers.iter().map(|((id, rank), (estimate, _))| (*channel, id, *rank, *estimate))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{Source, Topic, WorkerId};

    const TTL: Duration = Duration::from_secs(600);

    fn router(publisher: u64) -> Channel {
        Channel { source: Source::Nats, publisher, topic: Topic::KvMetrics }
    }

    fn rank(worker: u64) -> (Id, Rank) {
        (("dynamo".into(), WorkerId(worker)), Rank(0))
    }

    impl Estimates {
        fn said(&mut self, publisher: u64, worker: u64, blocks: u64, now: Instant) -> bool {
            let estimate = Estimate { decode_blocks: Some(blocks), prefill_tokens: None };
            self.take(router(publisher), rank(worker), estimate, now)
        }

        fn rows(&self) -> Vec<(u64, u64, u64)> {
            let row = |(channel, id, _, estimate): (Channel, &Id, Rank, Estimate)| {
                (channel.publisher, id.1.0, estimate.decode_blocks.unwrap())
            };
            let mut rows: Vec<_> = self.all().map(row).collect();
            rows.sort_unstable();
            assert_eq!(rows.len(), self.kept);
            rows
        }
    }

    #[test]
    fn a_router_goes_when_it_is_silent_and_a_worker_when_nothing_names_it() {
        let (mut estimates, start) = (Estimates::new(TTL, 10), Instant::now());
        estimates.said(8, 1, 10, start);
        estimates.said(9, 1, 11, start);
        estimates.said(9, 2, 12, start);
        estimates.said(9, 1, 13, start + TTL / 2);
        estimates.expire(start + TTL / 2, |_| false);
        assert_eq!(estimates.rows(), [(8, 1, 10), (9, 1, 13), (9, 2, 12)]);
        estimates.expire(start + TTL, |(_, worker)| worker.0 == 1);
        assert_eq!(estimates.rows(), [(9, 1, 13)], "8 is silent, and 2 has no name");
        estimates.lose(router(9));
        assert_eq!(estimates.rows(), []);
    }

    #[test]
    fn estimates_are_bounded_in_number_and_a_known_one_can_change() {
        let (mut estimates, now) = (Estimates::new(TTL, 1), Instant::now());
        assert!(estimates.said(8, 1, 10, now));
        assert!(!estimates.said(9, 1, 11, now));
        assert!(!estimates.said(8, 2, 12, now));
        assert!(estimates.said(8, 1, 13, now));
        assert_eq!(estimates.rows(), [(8, 1, 13)]);
        estimates.lose(router(8));
        assert!(estimates.said(9, 1, 11, now));
    }
}
