//! Loads and passes of ids that nothing has named yet: held until something does, and else given up and counted.
//!
//! They are never given to another worker. An `SGLang` engine over several nodes with data-parallel attention is such a case:
//! its nodes of rank 1 and up publish passes under ids of their own and register no endpoint, and nothing on the wire says
//! which leader is theirs. That one worker alone is registered at the endpoint of their channel proves nothing: the engine's
//! own leader may be the one that is still starting, what was counted for the wrong one would stay there, and a second
//! replica would make the sums of the first fall.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::bounds::Refusal;
use super::observation::{LoadEvent, PassEvent, Reason, Scope, Topic};
use super::passes::Passes;
use super::{Id, MAX_RANKS, Rank, WorkerId};

/// Ids of which something is held, at most.
const MAX_IDS: usize = 10_000;

/// Wall times held for an id; its passes are all added up, however many they are.
const MAX_WALL_TIMES: usize = 256;

/// What is held, by id, and what was given up.
#[derive(Debug)]
pub(super) struct Pending {
    held: HashMap<Id, Held>,
    /// Ranks for which room was needed at the last look, and those that came since: they have room of their own, so that
    /// they do not take it from workers.
    ranks: usize,
    max_ranks: usize,
    dropped: BTreeMap<Topic, u64>,
}

/// What was heard of an id, and when the first of it came.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) since: Instant,
    /// Whose worker it is, where an event says so.
    pub(super) scope: Option<Scope>,
    /// The last load of each rank.
    pub(super) ranks: BTreeMap<Rank, LoadEvent>,
    pub(super) passes: Passes,
    passes_held: u64,
    pub(super) wall_times: Vec<(Rank, f64)>,
}

/// An id of which everything was given up, as nothing named it in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unnamed {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Component and endpoint that its events are about, where they say so.
    pub scope: Option<Scope>,
    /// The id.
    pub worker: WorkerId,
    /// Load events given up with it.
    pub loads: u64,
    /// Passes and heartbeats given up with it.
    pub passes: u64,
}

impl Pending {
    /// With room for so many ranks.
    pub(super) fn new(max_ranks: usize) -> Self {
        Self { held: HashMap::new(), ranks: 0, max_ranks, dropped: BTreeMap::new() }
    }

    /// Holds a load; the one that it replaces is given up.
    pub(super) fn load(&mut self, id: Id, event: LoadEvent, now: Instant) -> Result<(), Refusal> {
        let more_room = self.ranks < self.max_ranks;
        let Some(held) = self.of(id, event.scope.as_ref(), now) else {
            self.drop(Topic::KvMetrics, 1);
            return Ok(());
        };
        held.admits(event.rank, more_room)?;
        let before = held.rank_count();
        let replaced = held.ranks.insert(event.rank, event).is_some();
        let more = held.rank_count() - before;
        self.ranks += more;
        self.drop(Topic::KvMetrics, u64::from(replaced));
        Ok(())
    }

    /// Holds a pass, added to those before.
    pub(super) fn pass(&mut self, id: Id, event: &PassEvent, now: Instant) -> Result<(), Refusal> {
        let PassEvent { rank, pass, .. } = *event;
        let more_room = self.ranks < self.max_ranks;
        let Some(held) = self.of(id, event.scope.as_ref(), now) else {
            self.drop(Topic::ForwardPassMetrics, 1);
            return Ok(());
        };
        held.admits(rank, more_room)?;
        let before = held.rank_count();
        held.passes.take(event.message.channel, rank, pass, now);
        held.passes_held += 1;
        if pass.wall_time > 0.0 && held.wall_times.len() < MAX_WALL_TIMES {
            held.wall_times.push((rank, pass.wall_time));
        }
        let more = held.rank_count() - before;
        self.ranks += more;
        Ok(())
    }

    /// Where to hold what is heard of an id; `None` where there is no room for more ids.
    fn of(&mut self, id: Id, scope: Option<&Scope>, now: Instant) -> Option<&mut Held> {
        let has_room = self.held.len() < MAX_IDS;
        let held = match self.held.entry(id) {
            Entry::Occupied(held) => held.into_mut(),
            Entry::Vacant(room) if has_room => room.insert(Held {
                since: now,
                scope: None,
                ranks: BTreeMap::new(),
                passes: Passes::default(),
                passes_held: 0,
                wall_times: Vec::new(),
            }),
            Entry::Vacant(_) => return None,
        };
        if let Some(scope) = scope {
            held.scope.get_or_insert_with(|| scope.clone());
        }
        Some(held)
    }

    /// Events given up unheld.
    pub(super) fn drop(&mut self, topic: Topic, events: u64) {
        let dropped = self.dropped.entry(topic).or_default();
        *dropped = dropped.saturating_add(events);
    }

    /// What was held of an id that is named now.
    pub(super) fn take(&mut self, id: &Id) -> Option<Held> {
        self.held.remove(id)
    }

    /// What is held of each id.
    pub(super) fn all(&self) -> impl Iterator<Item = (&Id, &Held)> {
        self.held.iter()
    }

    /// Gives up what is held of an id and names no place: the id is another place's.
    pub(super) fn give_up_unplaced(&mut self, id: &Id) {
        if let Some(held) = self.held.get(id).filter(|held| held.scope.is_none()) {
            let Unnamed { loads, passes, .. } = held.unnamed(id);
            self.held.remove(id);
            self.drop(Topic::KvMetrics, loads);
            self.drop(Topic::ForwardPassMetrics, passes);
        }
    }

    /// Gives up what is held for so long, and returns whose it was.
    pub(super) fn expire(&mut self, now: Instant, ttl: Duration) -> Vec<Unnamed> {
        let is_old = |held: &Held| now.saturating_duration_since(held.since) >= ttl;
        let given_up: Vec<_> =
            self.held.extract_if(|_, held| is_old(held)).map(|(id, held)| held.unnamed(&id)).collect();
        for Unnamed { loads, passes, .. } in &given_up {
            self.drop(Topic::KvMetrics, *loads);
            self.drop(Topic::ForwardPassMetrics, *passes);
        }
        self.ranks = self.held.values().map(Held::rank_count).sum();
        given_up
    }

    /// Events given up, by topic.
    pub(super) fn dropped(&self, topic: Topic) -> u64 {
        self.dropped.get(&topic).copied().unwrap_or_default()
    }
}

impl Unnamed {
    /// All events given up with it.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.loads.saturating_add(self.passes)
    }
}

impl Held {
    /// The ranks for which it needs room.
    fn rank_count(&self) -> usize {
        self.ranks.len().max(self.passes.len())
    }

    /// Whether there is room for a rank: `more_room` where there is some for ranks that are new.
    fn admits(&self, rank: Rank, more_room: bool) -> Result<(), Refusal> {
        let is_known = self.ranks.contains_key(&rank) || self.passes.has(rank);
        let has_room = is_known || (more_room && self.rank_count() < MAX_RANKS as usize);
        has_room.then_some(()).ok_or_else(|| (Reason::TooManyRanks, format!("rank {}", rank.0)))
    }

    fn unnamed(&self, (namespace, worker): &Id) -> Unnamed {
        Unnamed {
            namespace: Arc::clone(namespace),
            scope: self.scope.clone(),
            worker: *worker,
            loads: self.ranks.len() as u64,
            passes: self.passes_held,
        }
    }
}
