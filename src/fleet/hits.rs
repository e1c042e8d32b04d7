//! Placements of requests and their hit rates, counted under the worker that they name.
//!
//! An event says which worker id a request went to, and nothing else of the worker. Component and endpoint come from
//! discovery, which may be later than the event, and so may the card that says how many tokens a block has: until then the
//! event is held.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Id, Source, WorkerId, WorkerKey};

/// Events held for ids that nothing has named, in all: 1.5 MiB. The subject carries the events of a whole namespace, other
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

/// What is counted for a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Counted {
    /// A request was placed on it.
    Placed,
    /// Its hit rate, as an event of its own says it.
    Blocks(HitBlocks),
    /// Its prompt in tokens, and the blocks that were cached.
    Overlap { isl_tokens: u64, blocks: u32 },
    /// The blocks that its prompt fills, and the tokens that were to be computed.
    Effective { full_blocks: u32, tokens: u64 },
}

impl Counted {
    /// The prompt in blocks of so many tokens, where that is known.
    fn blocks(self, source: Source, block_size: Option<u64>) -> Result<Option<HitBlocks>, Impossible> {
        let impossible = Impossible { source, counted: self };
        let (isl, overlap) = match (self, block_size) {
            (Self::Blocks(blocks), _) => return Ok(Some(blocks)),
            (Self::Placed, _) | (_, None) => return Ok(None),
            (Self::Overlap { isl_tokens, blocks }, Some(size)) => (isl_tokens.div_ceil(size), Some(u64::from(blocks))),
            (Self::Effective { full_blocks, tokens }, Some(size)) => {
                let full = u64::from(full_blocks);
                (full + u64::from(tokens % size > 0), full.checked_sub(tokens / size))
            }
        };
        let isl = u32::try_from(isl).map_err(|_| impossible)?;
        let overlap = overlap.and_then(|blocks| u32::try_from(blocks).ok()).filter(|overlap| *overlap <= isl);
        Ok(Some(HitBlocks { isl, overlap: overlap.ok_or(impossible)? }))
    }
}

/// A prompt with more in the cache than it has, and where that was heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Impossible {
    pub(super) source: Source,
    pub(super) counted: Counted,
}

/// The events counted for a worker since it was first named.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HitTotals {
    /// Requests placed, by the routers that keep book of them.
    pub placed: u64,
    /// Hit rates.
    pub events: u64,
    /// Sum of [`HitBlocks::isl`].
    pub isl: u64,
    /// Sum of [`HitBlocks::overlap`].
    pub overlap: u64,
}

/// The worker that an id's events are counted for.
#[derive(Debug)]
struct Named {
    key: Arc<WorkerKey>,
    /// Tokens a block.
    block_size: Option<u64>,
}

/// What was counted under one set of labels.
#[derive(Debug)]
struct Count {
    /// The worker that has the labels, or had them last.
    key: Arc<WorkerKey>,
    totals: HitTotals,
    departed: Option<Instant>,
}

/// A living worker that stands in the way of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Rival {
    /// It has the same labels, in another namespace.
    Labels(Arc<WorkerKey>),
    /// It has the same id, and is another endpoint.
    Id(Arc<WorkerKey>),
}

/// The counts by worker, and the events that wait for one.
#[derive(Debug)]
pub(super) struct Hits {
    /// How long counts outlive their worker, and events wait for theirs.
    ttl: Duration,
    /// Ids remembered at most; a departed worker's count goes before a living one's.
    max_named: usize,
    /// What stands for every namespace in the labels, where they do not tell namespaces apart.
    pub(super) one_namespace: Option<Arc<str>>,
    named: HashMap<Id, Named>,
    /// By worker, in [`Self::one_namespace`] where there is one: each is a set of labels.
    counts: HashMap<WorkerKey, Count>,
    held: HashMap<Id, Vec<(Source, Counted)>>,
    held_since: VecDeque<(Instant, Id)>,
    held_events: usize,
    dropped: Dropped,
}

/// Events given up because nothing named their worker in time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Dropped {
    pub(super) hit_rates: u64,
    pub(super) placements: u64,
}

impl Hits {
    pub(super) fn new(ttl: Duration, max_named: usize) -> Self {
        let (named, counts, held, held_since) = (HashMap::new(), HashMap::new(), HashMap::new(), VecDeque::new());
        let (one_namespace, held_events, dropped) = (None, 0, Dropped::default());
        Self { ttl, max_named, one_namespace, named, counts, held, held_since, held_events, dropped }
    }

    /// The key that stands for the labels of a worker's series: equal of two workers whose series would be one.
    pub(super) fn labels(&self, key: &WorkerKey) -> WorkerKey {
        let namespace = Arc::clone(self.one_namespace.as_ref().unwrap_or(&key.namespace));
        WorkerKey { namespace, ..key.clone() }
    }

    /// Whether there is nothing to [`name`](Self::name): the worker has its id and its labels, and nothing waits.
    pub(super) fn is_settled(&self, key: &WorkerKey, block_size: Option<u64>) -> bool {
        let id = (Arc::clone(&key.namespace), key.id);
        let has_id = |named: &Named| *named.key == *key && named.block_size == block_size.filter(|size| *size > 0);
        self.named.get(&id).is_some_and(has_id) && !self.held.contains_key(&id) && self.has_labels(key)
    }

    /// Whether a worker has its labels, as one that lives.
    pub(super) fn has_labels(&self, key: &WorkerKey) -> bool {
        self.counts.get(&self.labels(key)).is_some_and(|count| *count.key == *key && count.departed.is_none())
    }

    /// Who keeps a worker from being counted, and from being shown where the labels are the same: the first has them for as
    /// long as it lives.
    pub(super) fn rival(&self, key: &WorkerKey) -> Option<Rival> {
        let living = |labels: &WorkerKey| self.counts.get(labels).filter(|count| count.departed.is_none());
        let of_labels = living(&self.labels(key)).map(|count| &count.key).filter(|other| ***other != *key);
        if let Some(other) = of_labels {
            return Some(Rival::Labels(Arc::clone(other)));
        }
        let named = self.named.get(&(Arc::clone(&key.namespace), key.id)).filter(|named| *named.key != *key)?;
        living(&self.labels(&named.key)).map(|_| Rival::Id(Arc::clone(&named.key)))
    }

    /// Counts it for the worker that has the id, and returns whose hit rate it is; or holds it until that is known.
    pub(super) fn count(
        &mut self,
        id: Id,
        source: Source,
        counted: Counted,
        now: Instant,
    ) -> Result<Option<(Arc<WorkerKey>, HitBlocks)>, Impossible> {
        if let Some(named) = self.named.get(&id) {
            let (key, block_size) = (Arc::clone(&named.key), named.block_size);
            let labels = self.labels(&key);
            if let Some(count) = self.counts.get_mut(&labels) {
                if counted == Counted::Placed {
                    count.totals.placed = count.totals.placed.saturating_add(1);
                    return Ok(None);
                }
                if let Some(blocks) = counted.blocks(source, block_size)? {
                    count.totals.add(blocks);
                    return Ok(Some((key, blocks)));
                }
            }
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
            .push((source, counted));
        Ok(None)
    }

    /// Gives an id to the worker `key`, unless it has a [`Rival`], and returns the hit rates that were held for it and can
    /// be counted now, or never.
    ///
    /// A count stays with its labels, whoever has the id next: it never moves, and goes on where it was if they come back.
    pub(super) fn name(&mut self, key: &Arc<WorkerKey>, block_size: Option<u64>) -> Vec<Result<HitBlocks, Impossible>> {
        let id = (Arc::clone(&key.namespace), key.id);
        let rival = self.rival(key);
        if matches!(rival, Some(Rival::Labels(_))) {
            return Vec::new();
        }
        let labels = self.labels(key);
        if !self.counts.contains_key(&labels) && self.counts.len() >= self.max_named {
            self.keep_counts(|count| count.departed.is_none());
        }
        let none = || Count { key: Arc::clone(key), totals: HitTotals::default(), departed: None };
        let count = self.counts.entry(labels).or_insert_with(none);
        let before = std::mem::replace(&mut count.key, Arc::clone(key));
        count.departed = None;
        let id_before = (Arc::clone(&before.namespace), before.id);
        if id_before != id && self.named.get(&id_before).is_some_and(|named| named.key == before) {
            self.named.remove(&id_before);
        }
        if rival.is_some() {
            return Vec::new();
        }
        let named = Named { key: Arc::clone(key), block_size: block_size.filter(|size| *size > 0) };
        let block_size = named.block_size;
        self.named.insert(id.clone(), named);
        let Some(held) = self.held.remove(&id) else { return Vec::new() };
        let before = held.len();
        let (mut rated, mut waiting) = (Vec::new(), Vec::new());
        for (source, counted) in held {
            match counted.blocks(source, block_size).transpose() {
                _ if counted == Counted::Placed => count.totals.placed = count.totals.placed.saturating_add(1),
                None => waiting.push((source, counted)),
                Some(blocks) => rated.push(blocks),
            }
        }
        for blocks in rated.iter().flatten() {
            count.totals.add(*blocks);
        }
        self.held_events = self.held_events - before + waiting.len();
        if !waiting.is_empty() {
            self.held.insert(id, waiting);
        }
        rated
    }

    /// The worker is gone; its counts stay for a while.
    pub(super) fn depart(&mut self, key: &WorkerKey, now: Instant) {
        let labels = self.labels(key);
        if let Some(count) = self.counts.get_mut(&labels).filter(|count| *count.key == *key) {
            count.departed = Some(now);
        }
    }

    pub(super) fn expire(&mut self, now: Instant) {
        let ttl = self.ttl;
        let old = |since: Instant| now.saturating_duration_since(since) >= ttl;
        self.keep_counts(|count| !count.departed.is_some_and(old));
        while self.held_since.front().is_some_and(|(since, _)| old(*since)) {
            self.give_up_oldest();
        }
    }

    fn keep_counts(&mut self, keep: impl Fn(&Count) -> bool) {
        let before = self.counts.len();
        self.counts.retain(|_, count| keep(count));
        if self.counts.len() < before {
            let mut named = std::mem::take(&mut self.named);
            named.retain(|_, named| self.counts.contains_key(&self.labels(&named.key)));
            self.named = named;
        }
    }

    fn give_up_oldest(&mut self) {
        let Some((_, id)) = self.held_since.pop_front() else {
            return;
        };
        // An id that was named meanwhile is no longer held.
        let held = self.held.remove(&id).unwrap_or_default();
        self.held_events -= held.len();
        for (_, counted) in held {
            match counted {
                Counted::Blocks(_) => self.dropped.hit_rates = self.dropped.hit_rates.saturating_add(1),
                Counted::Placed => self.dropped.placements = self.dropped.placements.saturating_add(1),
                // The placement itself was counted, or given up.
                Counted::Overlap { .. } | Counted::Effective { .. } => {}
            }
        }
    }

    /// Events given up because nothing named their worker in time.
    pub(super) fn dropped(&self) -> Dropped {
        self.dropped
    }

    /// Workers of which something was counted.
    pub(super) fn totals(&self) -> impl Iterator<Item = (&Arc<WorkerKey>, HitTotals)> {
        let counted = self.counts.values().filter(|count| count.totals != HitTotals::default());
        counted.map(|count| (&count.key, count.totals))
    }

    /// Living workers on which a request was ever placed.
    pub(super) fn placed_on(&self) -> impl Iterator<Item = &Arc<WorkerKey>> {
        let living = self.counts.values().filter(|count| count.departed.is_none() && count.totals.placed > 0);
        living.map(|count| &count.key)
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

    const HIT: Counted = Counted::Blocks(HitBlocks { isl: 10, overlap: 4 });

    fn id(worker: u64) -> Id {
        ("dynamo".into(), WorkerId(worker))
    }

    impl Hits {
        fn hit(&mut self, worker: u64, now: Instant) -> Option<Arc<WorkerKey>> {
            self.count(id(worker), Source::Nats, HIT, now).unwrap().map(|(key, _)| key)
        }
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
        assert!(hits.hit(1, now).is_none());
        assert!(hits.hit(1, now).is_none());
        assert_eq!(hits.name(&key("generate", 1), None).len(), 2);
        assert_eq!(hits.name(&key("generate", 1), None).len(), 0);
        let totals: Vec<_> = hits.totals().map(|(_, totals)| totals).collect();
        assert_eq!(totals, [HitTotals { placed: 0, events: 2, isl: 20, overlap: 8 }]);
    }

    #[test]
    fn a_count_stays_with_the_worker_that_took_the_id_first() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        hits.name(&key("generate", 1), None);
        hits.name(&key("embed", 1), None);
        assert_eq!(&*hits.hit(1, now).unwrap().endpoint, "generate");
        hits.depart(&key("embed", 1), now);
        hits.expire(now + Duration::from_secs(300));
        assert_eq!(hits.totals().count(), 1, "another endpoint's departure is not the owner's");
    }

    #[test]
    fn counts_outlive_their_worker_for_the_ttl_and_no_longer() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        hits.name(&key("generate", 1), None);
        hits.hit(1, now);
        hits.depart(&key("generate", 1), now);
        hits.expire(now + Duration::from_secs(299));
        assert!(hits.hit(1, now + Duration::from_secs(299)).is_some(), "a late event still counts");
        hits.expire(now + Duration::from_secs(300));
        assert_eq!(hits.totals().count(), 0);
    }

    #[test]
    fn a_worker_that_comes_back_keeps_its_count() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        hits.name(&key("generate", 1), None);
        hits.hit(1, now);
        hits.depart(&key("generate", 1), now);
        hits.name(&key("generate", 1), None);
        hits.expire(now + Duration::from_secs(1000));
        assert_eq!(hits.totals().count(), 1);
    }

    #[test]
    fn what_nobody_names_is_dropped_and_counted() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        hits.hit(1, now);
        hits.expire(now + Duration::from_secs(300));
        assert_eq!((hits.dropped().hit_rates, hits.held.len(), hits.held_events), (1, 0, 0));
    }

    #[test]
    fn holding_is_bounded_and_gives_up_the_oldest_first() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        for worker in 0..=MAX_HELD as u64 {
            hits.hit(worker, now);
        }
        assert_eq!((hits.dropped().hit_rates, hits.held_events), (1, MAX_HELD));
        assert_eq!(hits.name(&key("generate", 0), None).len(), 0, "the oldest was given up");
        assert_eq!(hits.name(&key("generate", 1), None).len(), 1);
    }

    #[test]
    fn departed_ids_make_room_for_living_ones() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 2), Instant::now());
        for worker in 0..3 {
            hits.name(&key("generate", worker), None);
            hits.depart(&key("generate", worker), now);
        }
        assert!(hits.named.len() <= 2);
    }

    #[test]
    fn a_prompt_is_counted_in_blocks_once_the_card_says_how_large_they_are() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        let prompts = [
            (Counted::Effective { full_blocks: 6, tokens: 100 }, (7, 0)),
            (Counted::Effective { full_blocks: 6, tokens: 4 }, (7, 6)),
            (Counted::Effective { full_blocks: 6, tokens: 0 }, (6, 6)),
            (Counted::Effective { full_blocks: 0, tokens: 10 }, (1, 0)),
            (Counted::Overlap { isl_tokens: 500, blocks: 15 }, (32, 15)),
        ];
        for (prompt, _) in prompts {
            hits.count(id(1), Source::Zmq, Counted::Placed, now).unwrap();
            hits.count(id(1), Source::Zmq, prompt, now).unwrap();
        }
        assert_eq!(hits.name(&key("generate", 1), None), [], "no card yet");
        assert_eq!(hits.totals().next().unwrap().1.placed, 5);
        let rated = hits.name(&key("generate", 1), Some(16));
        let expected = prompts.map(|(_, (isl, overlap))| Ok(HitBlocks { isl, overlap }));
        assert_eq!(rated, expected);
        assert_eq!((hits.name(&key("generate", 1), Some(16)).len(), hits.held_events), (0, 0), "once");
        let totals = hits.totals().next().unwrap().1;
        assert_eq!((totals.placed, totals.events, totals.isl, totals.overlap), (5, 5, 53, 27));
    }

    #[test]
    fn more_to_compute_than_there_is_cannot_be() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        hits.name(&key("generate", 1), Some(16));
        for prompt in [
            Counted::Effective { full_blocks: 6, tokens: 112 },
            Counted::Effective { full_blocks: 6, tokens: u64::MAX },
            Counted::Overlap { isl_tokens: 16, blocks: 2 },
            Counted::Overlap { isl_tokens: u64::MAX, blocks: 2 },
        ] {
            assert!(hits.count(id(1), Source::Zmq, prompt, now).is_err(), "{prompt:?}");
        }
        assert_eq!(hits.totals().count(), 0);
    }
}
