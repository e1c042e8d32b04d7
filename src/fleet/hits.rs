//! KV hit rate events, counted under the worker that they name.
//!
//! An event says which worker id a request went to, and nothing else of the worker. Component and endpoint come from the
//! worker's answer to a scrape, which may be later than the event: until then the event is held.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{WorkerId, WorkerKey};

/// Events held for ids that nothing has named, in all: 1 MiB. The subject carries the events of a whole namespace, other
/// components' too, so the bound is reached in normal life; the ids held longest are given up first.
const MAX_HELD: usize = 65_536;

/// One request that a KV router placed on a worker (`KvHitRateEvent`, Dynamo 0.1 - 0.9).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HitRate {
    /// Namespace of the router and the worker.
    pub namespace: Arc<str>,
    /// The worker chosen.
    pub worker: WorkerId,
    /// Its blocks.
    pub blocks: HitBlocks,
}

/// The prompt of one request in KV-cache blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HitBlocks {
    /// Length of the prompt, rounded up.
    pub isl: u32,
    /// Those of them that the worker was believed to hold already; never more than `isl`.
    pub overlap: u32,
}

/// The events counted for a worker since it was first named.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HitTotals {
    /// Events.
    pub events: u64,
    /// Sum of [`HitBlocks::isl`].
    pub isl: u64,
    /// Sum of [`HitBlocks::overlap`].
    pub overlap: u64,
}

type Id = (Arc<str>, WorkerId);

#[derive(Debug)]
struct Named {
    key: Arc<WorkerKey>,
    totals: HitTotals,
    departed: Option<Instant>,
}

/// The counts by worker, and the events that wait for one.
#[derive(Debug)]
pub(super) struct Hits {
    /// How long counts outlive their worker, and events wait for theirs.
    ttl: Duration,
    /// Ids remembered at most; a departed worker's count goes before a living one's.
    max_named: usize,
    named: HashMap<Id, Named>,
    held: HashMap<Id, Vec<HitBlocks>>,
    held_since: VecDeque<(Instant, Id)>,
    held_events: usize,
    dropped: u64,
}

impl Hits {
    pub(super) fn new(ttl: Duration, max_named: usize) -> Self {
        let (named, held, held_since) = (HashMap::new(), HashMap::new(), VecDeque::new());
        Self { ttl, max_named, named, held, held_since, held_events: 0, dropped: 0 }
    }

    /// Counts an event of a named worker and returns its key, or holds it.
    pub(super) fn count(&mut self, event: HitRate, now: Instant) -> Option<Arc<WorkerKey>> {
        let id = (event.namespace, event.worker);
        if let Some(named) = self.named.get_mut(&id) {
            named.totals.add(event.blocks);
            return Some(Arc::clone(&named.key));
        }
        while self.held_events >= MAX_HELD {
            self.give_up_oldest();
        }
        self.held_events += 1;
        self.held
            .entry(id)
            .or_insert_with_key(|id| {
                self.held_since.push_back((now, id.clone()));
                Vec::new()
            })
            .push(event.blocks);
        None
    }

    /// Gives an id to the worker `key`, unless another one has it, and returns the events that were held for it.
    ///
    /// The first worker that takes an id keeps it as long as its counts are kept: a count never moves.
    pub(super) fn name(&mut self, key: &Arc<WorkerKey>) -> Vec<HitBlocks> {
        let id = (Arc::clone(&key.namespace), key.id);
        if let Some(named) = self.named.get_mut(&id) {
            if named.key == *key {
                named.departed = None;
            }
            return Vec::new();
        }
        if self.named.len() >= self.max_named {
            self.named.retain(|_, named| named.departed.is_none());
        }
        let events = self.held.remove(&id).unwrap_or_default();
        self.held_events -= events.len();
        let mut totals = HitTotals::default();
        for blocks in &events {
            totals.add(*blocks);
        }
        self.named.insert(id, Named { key: Arc::clone(key), totals, departed: None });
        events
    }

    /// The worker is gone; its counts stay for a while.
    pub(super) fn depart(&mut self, key: &WorkerKey, now: Instant) {
        let id = (Arc::clone(&key.namespace), key.id);
        if let Some(named) = self.named.get_mut(&id).filter(|named| *named.key == *key) {
            named.departed = Some(now);
        }
    }

    pub(super) fn expire(&mut self, now: Instant) {
        let ttl = self.ttl;
        let old = |since: Instant| now.saturating_duration_since(since) >= ttl;
        self.named.retain(|_, named| !named.departed.is_some_and(old));
        while self.held_since.front().is_some_and(|(since, _)| old(*since)) {
            self.give_up_oldest();
        }
    }

    fn give_up_oldest(&mut self) {
        let Some((_, id)) = self.held_since.pop_front() else {
            return;
        };
        // An id that was named meanwhile is no longer held.
        let events = self.held.remove(&id).map_or(0, |events| events.len());
        self.held_events -= events;
        self.dropped = self.dropped.saturating_add(events as u64);
    }

    /// Events given up because nothing named their worker in time.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Workers with at least one event.
    pub(super) fn totals(&self) -> impl Iterator<Item = (&Arc<WorkerKey>, HitTotals)> {
        self.named.values().filter(|named| named.totals.events > 0).map(|named| (&named.key, named.totals))
    }
}

impl HitTotals {
    fn add(&mut self, blocks: HitBlocks) {
        self.events = self.events.saturating_add(1);
        self.isl = self.isl.saturating_add(blocks.isl.into());
        self.overlap = self.overlap.saturating_add(blocks.overlap.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(worker: u64) -> HitRate {
        HitRate { namespace: "dynamo".into(), worker: WorkerId(worker), blocks: HitBlocks { isl: 10, overlap: 4 } }
    }

    fn key(endpoint: &str, worker: u64) -> Arc<WorkerKey> {
        Arc::new(WorkerKey {
            namespace: "dynamo".into(),
            component: "backend".into(),
            endpoint: endpoint.into(),
            id: WorkerId(worker),
        })
    }

    #[test]
    fn what_was_held_is_counted_once_when_the_worker_is_named() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        assert!(hits.count(event(1), now).is_none());
        assert!(hits.count(event(1), now).is_none());
        assert_eq!(hits.name(&key("generate", 1)).len(), 2);
        assert_eq!(hits.name(&key("generate", 1)).len(), 0);
        let totals: Vec<_> = hits.totals().map(|(_, totals)| totals).collect();
        assert_eq!(totals, [HitTotals { events: 2, isl: 20, overlap: 8 }]);
    }

    #[test]
    fn a_count_stays_with_the_worker_that_took_the_id_first() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        hits.name(&key("generate", 1));
        hits.name(&key("embed", 1));
        assert_eq!(&*hits.count(event(1), now).unwrap().endpoint, "generate");
        hits.depart(&key("embed", 1), now);
        hits.expire(now + Duration::from_secs(300));
        assert_eq!(hits.totals().count(), 1, "another endpoint's departure is not the owner's");
    }

    #[test]
    fn counts_outlive_their_worker_for_the_ttl_and_no_longer() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        hits.name(&key("generate", 1));
        hits.count(event(1), now);
        hits.depart(&key("generate", 1), now);
        hits.expire(now + Duration::from_secs(299));
        assert!(hits.count(event(1), now + Duration::from_secs(299)).is_some(), "a late event still counts");
        hits.expire(now + Duration::from_secs(300));
        assert_eq!(hits.totals().count(), 0);
    }

    #[test]
    fn a_worker_that_comes_back_keeps_its_count() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        hits.name(&key("generate", 1));
        hits.count(event(1), now);
        hits.depart(&key("generate", 1), now);
        hits.name(&key("generate", 1));
        hits.expire(now + Duration::from_secs(1000));
        assert_eq!(hits.totals().count(), 1);
    }

    #[test]
    fn what_nobody_names_is_dropped_and_counted() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        hits.count(event(1), now);
        hits.expire(now + Duration::from_secs(300));
        assert_eq!((hits.dropped(), hits.held.len(), hits.held_events), (1, 0, 0));
    }

    #[test]
    fn holding_is_bounded_and_gives_up_the_oldest_first() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        for worker in 0..=MAX_HELD as u64 {
            hits.count(event(worker), now);
        }
        assert_eq!((hits.dropped(), hits.held_events), (1, MAX_HELD));
        assert_eq!(hits.name(&key("generate", 0)).len(), 0, "the oldest was given up");
        assert_eq!(hits.name(&key("generate", 1)).len(), 1);
    }

    #[test]
    fn departed_ids_make_room_for_living_ones() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 2), Instant::now());
        for worker in 0..3 {
            hits.name(&key("generate", worker));
            hits.depart(&key("generate", worker), now);
        }
        assert!(hits.named.len() <= 2);
    }
}
