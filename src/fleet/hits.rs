//! Placements of requests and their hit rates, counted under the worker that they name.
//!
//! An event says which worker id a request went to, and nothing else of the worker. Component and endpoint come from
//! discovery, which may be later than the event, and so may the card that says how many tokens a block has: until then the
//! event is held.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::card::BlockSizes;
use super::observation::{Reason, Rejection};
use super::router_blocks::{PlacedBy, RouterBlocks};
use super::{Id, WorkerId, WorkerKey};

/// Events held for ids that nothing has named, in all: 6 MiB. The subject carries the events of a whole namespace, other
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
    /// Its prompt in tokens and, where that is said, the blocks that it fills; and the blocks that were cached.
    Overlap { isl_tokens: u64, full_blocks: Option<u32>, blocks: u32 },
    /// The blocks that its prompt fills, and the tokens that were to be computed.
    Effective { full_blocks: u32, tokens: u64 },
}

impl Counted {
    /// The prompt in blocks of `size` tokens, from the router's of `router_size`; `None` of one with more in the cache than it
    /// has.
    ///
    /// The two differ where prefill and decode workers have blocks of different sizes: the full blocks are
    /// counted in those of the decode worker. What is left to be computed shows the rest, as only whole blocks are cached.
    fn blocks(self, router_size: u64, size: u64) -> Option<HitBlocks> {
        let (isl_tokens, overlap) = match self {
            Self::Blocks(blocks) => return Some(blocks),
            Self::Placed => return None,
            Self::Overlap { isl_tokens, blocks, .. } => (isl_tokens, u64::from(blocks)),
            Self::Effective { full_blocks, tokens } => {
                let full = u64::from(full_blocks).checked_mul(router_size)?;
                let partial = (tokens % size + size - full % size) % size;
                let isl_tokens = full.checked_add(partial).filter(|_| partial < router_size)?;
                (isl_tokens, isl_tokens.checked_sub(tokens)? / size)
            }
        };
        let isl = u32::try_from(isl_tokens.div_ceil(size)).ok()?;
        let overlap = u32::try_from(overlap).ok().filter(|overlap| *overlap <= isl)?;
        Some(HitBlocks { isl, overlap })
    }

    /// The tokens that a block of the router has at least: the full ones and a partial one hold all that are named.
    fn at_least(self) -> u64 {
        match self {
            Self::Effective { full_blocks, tokens }
            | Self::Overlap { full_blocks: Some(full_blocks), isl_tokens: tokens, .. } => {
                tokens.div_ceil(u64::from(full_blocks) + 1)
            }
            Self::Placed | Self::Blocks(_) | Self::Overlap { full_blocks: None, .. } => 0,
        }
    }
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
    /// Those of its series.
    labels: WorkerKey,
    block_sizes: BlockSizes,
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
    held: HashMap<Id, Vec<(PlacedBy, Counted)>>,
    held_since: VecDeque<(Instant, Id)>,
    held_events: usize,
    routers: RouterBlocks,
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
        let (one_namespace, held_events, routers, dropped) = (None, 0, RouterBlocks::default(), Dropped::default());
        Self { ttl, max_named, one_namespace, named, counts, held, held_since, held_events, routers, dropped }
    }

    /// The key that stands for the labels of a worker's series: equal of two workers whose series would be one.
    pub(super) fn labels(&self, key: &WorkerKey) -> WorkerKey {
        let namespace = Arc::clone(self.one_namespace.as_ref().unwrap_or(&key.namespace));
        WorkerKey { namespace, ..key.clone() }
    }

    /// Whether there is nothing to [`name`](Self::name): the worker has its id and its labels, and what waits, waits for a
    /// block size that has not come.
    pub(super) fn is_settled(&self, key: &WorkerKey, block_sizes: &BlockSizes) -> bool {
        let id = (Arc::clone(&key.namespace), key.id);
        let has_id = |named: &Named| *named.key == *key && named.block_sizes.are(block_sizes);
        self.named.get(&id).is_some_and(has_id) && self.has_labels(key)
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
        living(&named.labels).map(|_| Rival::Id(Arc::clone(&named.key)))
    }

    /// Counts it for the worker that has the id, and returns whose hit rate it is; or holds it until that is known.
    pub(super) fn count(
        &mut self,
        id: Id,
        by: PlacedBy,
        counted: Counted,
        now: Instant,
    ) -> Result<Option<(Arc<WorkerKey>, HitBlocks)>, Rejection> {
        let router_size = self.router_size(&id.0, by, counted);
        if let Some(named) = self.named.get(&id)
            && let Some(count) = self.counts.get_mut(&named.labels)
        {
            if counted == Counted::Placed {
                count.totals.placed = count.totals.placed.saturating_add(1);
                return Ok(None);
            }
            if let Some(blocks) = rated(&mut self.routers, named, (by, router_size), counted, now)? {
                count.totals.add(blocks);
                return Ok(Some((Arc::clone(&named.key), blocks)));
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
            .push((by, counted));
        Ok(None)
    }

    /// Gives an id to the worker `key`, unless it has a [`Rival`], and returns the hit rates that were held for it and can
    /// be counted now, or never.
    ///
    /// A count stays with its labels, whoever has the id next: it never moves, and goes on where it was if they come back.
    pub(super) fn name(
        &mut self,
        key: &Arc<WorkerKey>,
        block_sizes: BlockSizes,
        now: Instant,
    ) -> Vec<Result<HitBlocks, Rejection>> {
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
        let count = self.counts.entry(labels.clone()).or_insert_with(none);
        let before = std::mem::replace(&mut count.key, Arc::clone(key));
        count.departed = None;
        let id_before = (Arc::clone(&before.namespace), before.id);
        if id_before != id && self.named.get(&id_before).is_some_and(|named| named.key == before) {
            self.named.remove(&id_before);
        }
        if rival.is_some() {
            return Vec::new();
        }
        let mut totals = count.totals;
        let named = Named { key: Arc::clone(key), labels: labels.clone(), block_sizes };
        self.named.insert(id.clone(), named);
        let Some(held) = self.held.remove(&id) else { return Vec::new() };
        let before = held.len();
        let (mut judged, mut waiting) = (Vec::new(), Vec::new());
        for (by, counted) in held {
            let router_size = self.router_size(&id.0, by, counted);
            let Some(named) = self.named.get(&id) else { continue };
            match rated(&mut self.routers, named, (by, router_size), counted, now).transpose() {
                _ if counted == Counted::Placed => totals.placed = totals.placed.saturating_add(1),
                None => waiting.push((by, counted)),
                Some(blocks) => judged.push(blocks),
            }
        }
        for blocks in judged.iter().flatten() {
            totals.add(*blocks);
        }
        if let Some(count) = self.counts.get_mut(&labels) {
            count.totals = totals;
        }
        self.held_events = self.held_events - before + waiting.len();
        if !waiting.is_empty() {
            self.held.insert(id, waiting);
        }
        judged
    }

    /// Tokens a block of the worker in whose blocks the router counts, where that one is known and it makes a difference.
    fn router_size(&self, namespace: &Arc<str>, by: PlacedBy, counted: Counted) -> Option<u64> {
        if matches!(counted, Counted::Placed | Counted::Blocks(_)) {
            return None;
        }
        self.named.get(&(Arc::clone(namespace), by.on))?.block_sizes.of(by.adapter)
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
        self.routers.expire(now);
        while self.held_since.front().is_some_and(|(since, _)| old(*since)) {
            self.give_up_oldest();
        }
    }

    fn keep_counts(&mut self, keep: impl Fn(&Count) -> bool) {
        let before = self.counts.len();
        self.counts.retain(|_, count| keep(count));
        if self.counts.len() < before {
            let mut named = std::mem::take(&mut self.named);
            named.retain(|_, named| self.counts.contains_key(&named.labels));
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

/// The blocks of a prompt on that worker; `None` while nothing says how large they are. The router counts in blocks of
/// `router_size` tokens where that is known, else in the worker's.
fn rated(
    routers: &mut RouterBlocks,
    named: &Named,
    (by, router_size): (PlacedBy, Option<u64>),
    counted: Counted,
    now: Instant,
) -> Result<Option<HitBlocks>, Rejection> {
    if let Counted::Blocks(blocks) = counted {
        return Ok(Some(blocks));
    }
    let Some(size) = named.block_sizes.of(by.adapter).filter(|_| counted != Counted::Placed) else {
        return Ok(None);
    };
    let router_size = router_size.unwrap_or(size);
    let other = |detail| by.rejection(Reason::OtherBlockSize, detail);
    routers.judge(by, counted.at_least(), router_size, now).map_err(|doubt| other(doubt.of(by, router_size)))?;
    let worker = named.key.id;
    if router_size > size {
        let decode = by.on;
        return Err(other(format!(
            "worker {worker} has blocks of {size} tokens, and its prompt is counted in those of {router_size} of worker {decode}"
        )));
    }
    let more = || format!("more of a prompt of worker {worker} than there is: {counted:?}");
    let blocks = counted.blocks(router_size, size).ok_or_else(|| by.rejection(Reason::OverlapExceedsIsl, more()))?;
    Ok(Some(blocks))
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
    use crate::fleet::{AdapterId, Channel, Source, Topic};

    const ROUTER: Channel = Channel { source: Source::Zmq, publisher: 7, topic: Topic::ActiveSequences };
    const HIT: Counted = Counted::Blocks(HitBlocks { isl: 10, overlap: 4 });

    fn by(on: u64) -> PlacedBy {
        PlacedBy::over(ROUTER, WorkerId(on))
    }

    fn id(worker: u64) -> Id {
        ("dynamo".into(), WorkerId(worker))
    }

    impl Hits {
        fn named(&mut self, key: &Arc<WorkerKey>, base: Option<u64>) -> Vec<Result<HitBlocks, Rejection>> {
            self.name(key, BlockSizes { base, ..BlockSizes::default() }, Instant::now())
        }

        fn hit(&mut self, worker: u64, now: Instant) -> Option<Arc<WorkerKey>> {
            self.count(id(worker), by(worker), HIT, now).unwrap().map(|(key, _)| key)
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
        assert_eq!(hits.named(&key("generate", 1), None).len(), 2);
        assert_eq!(hits.named(&key("generate", 1), None).len(), 0);
        let totals: Vec<_> = hits.totals().map(|(_, totals)| totals).collect();
        assert_eq!(totals, [HitTotals { placed: 0, events: 2, isl: 20, overlap: 8 }]);
    }

    #[test]
    fn a_count_stays_with_the_worker_that_took_the_id_first() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        hits.named(&key("generate", 1), None);
        hits.named(&key("embed", 1), None);
        assert_eq!(&*hits.hit(1, now).unwrap().endpoint, "generate");
        hits.depart(&key("embed", 1), now);
        hits.expire(now + Duration::from_secs(300));
        assert_eq!(hits.totals().count(), 1, "another endpoint's departure is not the owner's");
    }

    #[test]
    fn counts_outlive_their_worker_for_the_ttl_and_no_longer() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        hits.named(&key("generate", 1), None);
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
        hits.named(&key("generate", 1), None);
        hits.hit(1, now);
        hits.depart(&key("generate", 1), now);
        hits.named(&key("generate", 1), None);
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
        assert_eq!(hits.named(&key("generate", 0), None).len(), 0, "the oldest was given up");
        assert_eq!(hits.named(&key("generate", 1), None).len(), 1);
    }

    #[test]
    fn departed_ids_make_room_for_living_ones() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 2), Instant::now());
        for worker in 0..3 {
            hits.named(&key("generate", worker), None);
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
            (Counted::Overlap { isl_tokens: 500, full_blocks: Some(31), blocks: 15 }, (32, 15)),
        ];
        for (prompt, _) in prompts {
            hits.count(id(1), by(1), Counted::Placed, now).unwrap();
            hits.count(id(1), by(1), prompt, now).unwrap();
        }
        assert_eq!(hits.named(&key("generate", 1), None), [], "no card yet");
        assert_eq!(hits.totals().next().unwrap().1.placed, 5);
        let rated = hits.named(&key("generate", 1), Some(16));
        let expected = prompts.map(|(_, (isl, overlap))| Ok(HitBlocks { isl, overlap }));
        assert_eq!(rated, expected);
        assert_eq!((hits.named(&key("generate", 1), Some(16)).len(), hits.held_events), (0, 0), "once");
        let totals = hits.totals().next().unwrap().1;
        assert_eq!((totals.placed, totals.events, totals.isl, totals.overlap), (5, 5, 53, 27));
    }

    #[test]
    fn more_to_compute_than_there_is_cannot_be() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        hits.named(&key("generate", 1), Some(16));
        for prompt in [
            Counted::Effective { full_blocks: 6, tokens: 112 },
            Counted::Overlap { isl_tokens: 16, full_blocks: Some(1), blocks: 2 },
            Counted::Overlap { isl_tokens: u64::MAX, full_blocks: None, blocks: 2 },
        ] {
            let refused = hits.count(id(1), by(1), prompt, now).unwrap_err();
            assert_eq!(refused.reason, Reason::OverlapExceedsIsl, "{prompt:?}");
        }
        assert_eq!(hits.totals().count(), 0);
        assert!(hits.count(id(1), by(1), PLAIN, now).is_ok(), "the router's others count");
    }

    /// Of 100 tokens, in blocks of 16.
    const PLAIN: Counted = Counted::Effective { full_blocks: 6, tokens: 100 };

    #[test]
    fn a_router_whose_blocks_are_larger_has_no_more_rates_and_keeps_those_that_were_counted() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        hits.named(&key("generate", 1), Some(16));
        let other = PlacedBy::over(Channel { publisher: 8, ..ROUTER }, WorkerId(1));
        // In blocks of 128: a prompt whose beginning is cached, one of which nothing is, and again the first. In 1.1 both
        // the tokens and the blocks are named, and whatever is cached shows the size.
        for larger in [
            Counted::Effective { full_blocks: 2, tokens: 44 },
            Counted::Effective { full_blocks: 2, tokens: 300 },
            Counted::Effective { full_blocks: 2, tokens: 44 },
            Counted::Overlap { isl_tokens: 300, full_blocks: Some(2), blocks: 2 },
        ] {
            let counted = hits.count(id(1), by(1), larger, now).map_err(|refused| refused.reason);
            hits.count(id(1), other, PLAIN, now).unwrap();
            let events = hits.totals().next().unwrap().1.events;
            match counted {
                Ok(_) => assert_eq!(events, 2, "the size had not shown"),
                Err(reason) => assert_eq!(reason, Reason::OtherBlockSize),
            }
        }
        assert_eq!(hits.totals().next().unwrap().1.events, 5);
    }

    #[test]
    fn a_prompt_in_a_decode_workers_blocks_is_counted_in_those_of_the_prefill_worker() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        let mut count = |full_blocks, tokens, (decode, prefill)| {
            hits.named(&key("generate", 1), Some(prefill));
            hits.named(&key("decode", 2), Some(decode));
            let prompt = Counted::Effective { full_blocks, tokens };
            let counted = hits.count(id(1), by(2), prompt, now);
            counted
                .map(|counted| counted.map(|(_, blocks)| (blocks.isl, blocks.overlap)))
                .map_err(|refused| refused.reason)
        };
        // By the router's own histogram of 1.6.1: 0, and 0.4.
        assert_eq!(count(10, 160, (16, 64)), Ok(Some((3, 0))));
        assert_eq!(count(20, 192, (16, 64)), Ok(Some((5, 2))));
        assert_eq!(count(20, 196, (16, 64)), Ok(Some((6, 2))), "and a bit");
        assert_eq!(count(20, 250, (16, 64)), Err(Reason::OverlapExceedsIsl), "no prompt of 320 to 335 tokens");
        assert_eq!(count(2, 128, (64, 16)), Err(Reason::OtherBlockSize), "8 to 11 blocks");
    }

    #[test]
    fn an_adapter_with_a_router_of_its_own_is_counted_in_its_own_blocks() {
        let (mut hits, now) = (Hits::new(Duration::from_secs(300), 10), Instant::now());
        let (known, unknown) = (AdapterId::of("ad/Apter"), AdapterId::of("other"));
        let sizes = |adapters: &[(AdapterId, u64)]| BlockSizes {
            base: Some(16),
            adapters: Arc::new(adapters.iter().copied().collect()),
        };
        hits.name(&key("generate", 1), sizes(&[(known, 64)]), now);
        let mut count = |adapter, full_blocks, tokens| {
            let prompt = Counted::Effective { full_blocks, tokens };
            let by = PlacedBy { adapter, ..by(1) };
            hits.count(id(1), by, prompt, now).unwrap().map(|(_, blocks)| (blocks.isl, blocks.overlap))
        };
        assert_eq!(count(Some(known), 2, 160), Some((3, 0)), "160 tokens, and nothing is cached");
        assert_eq!(count(Some(known), 5, 192), Some((5, 2)));
        assert_eq!(count(None, 10, 160), Some((10, 0)), "the base model by the same channel");
        assert_eq!(count(Some(unknown), 2, 160), None, "its card is awaited");
        assert_eq!(hits.name(&key("generate", 1), sizes(&[(known, 64), (unknown, 128)]), now).len(), 1);
    }
}
