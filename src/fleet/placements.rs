//! What KV routers tell each other of their requests: where each was placed, how much of its prompt was cached there, and
//! when it ended (`active_sequences_events`).
//!
//! In a disaggregated fleet a request is placed twice, for prefill and for decode. From 1.2 on neither half says the whole
//! of the prompt: they are joined by the request.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::card::AdapterId;
use super::hits::Counted;
use super::observation::Channel;
use super::router_blocks::PlacedBy;
use super::{Id, WorkerId};

/// Requests remembered at most, some 100 bytes each. Those beyond are counted, and are not seen in flight.
const MAX_REQUESTS: usize = 200_000;

/// How long half of a placement waits for the other, which comes some 20 ms later.
const JOIN_WAIT: Duration = Duration::from_secs(60);

/// One step of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Routing {
    /// The request.
    pub request: RequestId,
    /// The router, where it has a number (0.9 and later).
    pub router: Option<WorkerId>,
    /// The `LoRA` adapter that it asks for, where that has a router of its own (1.0 - 1.3).
    pub adapter: Option<AdapterId>,
    /// The worker that has it.
    pub worker: WorkerId,
    /// What happened.
    pub step: Step,
}

/// A request of a router. Two routers may have requests of one name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestId([u8; 16]);

impl RequestId {
    /// Of any length, as clients may name their requests themselves: what is kept is a hash.
    #[must_use]
    pub fn of(router: &[u8], request: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(router.len() as u64).to_be_bytes()).update(router).update(request.as_bytes());
        let mut id = [0; 16];
        hasher.finalize_xof().fill(&mut id);
        Self(id)
    }
}

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The router placed it.
    Placed(Prompt),
    /// Its prompt is computed.
    Prefilled,
    /// It ended.
    Freed,
}

/// What a placement says of the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prompt {
    /// KV-cache blocks that it fills; the prefill half of a placement leaves them open.
    pub full_blocks: Option<u32>,
    /// How much of it is in the worker's cache.
    pub cached: Cached,
}

/// How much of a prompt the worker was believed to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cached {
    /// The length of the prompt in tokens, and the blocks that are cached (1.0, 1.1).
    Overlap {
        /// Tokens.
        isl_tokens: u64,
        /// Blocks.
        blocks: u32,
    },
    /// The tokens that are left to be computed (1.2 and later).
    Effective {
        /// Tokens; 0 where all of it is cached.
        tokens: u64,
    },
    /// The router does not say: this is the decode half, or it does not track prefill at all.
    Untracked,
    /// A `kv-hit-rate` event says it (0.4 - 0.9).
    InEventOfItsOwn,
}

/// What is known of a request's prompt so far.
#[derive(Debug, Clone, PartialEq)]
enum Known {
    /// All, or as much as there will be.
    Whole,
    /// All, from the prefill half; the decode half is to say nothing more.
    WholeOfPrefill,
    /// The prefill half: where it is computed, and how many tokens of it.
    Prefill(Id, u64),
    /// The decode half: full blocks, and in whose blocks that is.
    Decode(u32, PlacedBy),
}

#[derive(Debug)]
struct Request {
    since: Instant,
    /// Where it is in flight, and over which channel that was heard.
    on: Vec<(Id, Channel)>,
    known: Known,
}

/// The requests that routers have told of.
#[derive(Debug)]
pub(super) struct Placements {
    /// A request of which nothing was heard for so long is over: a router that dies frees nothing.
    ttl: Duration,
    requests: HashMap<RequestId, Request>,
    /// Channels over which requests were placed.
    placers: HashSet<Channel>,
}

impl Placements {
    pub(super) fn new(ttl: Duration) -> Self {
        Self { ttl, requests: HashMap::new(), placers: HashSet::new() }
    }

    /// Takes a step; what is to be counted, for whom, and in whose blocks.
    pub(super) fn take(&mut self, by: PlacedBy, routing: &Routing, on: Id, now: Instant) -> Vec<Rated> {
        match routing.step {
            Step::Placed(prompt) => {
                let rated = self.placed(by, routing.request, prompt, on.clone(), now);
                [(on, by, Counted::Placed)].into_iter().chain(rated).collect()
            }
            Step::Prefilled => Vec::new(),
            Step::Freed => {
                self.freed(routing.request, &on);
                Vec::new()
            }
        }
    }

    fn placed(&mut self, by: PlacedBy, request: RequestId, prompt: Prompt, on: Id, now: Instant) -> Option<Rated> {
        let known = self.requests.get(&request).map(|request| request.known.clone());
        let (known, rated) = joined(known, by, prompt, &on);
        if self.requests.len() >= MAX_REQUESTS && !self.requests.contains_key(&request) {
            return rated;
        }
        self.placers.insert(by.channel);
        let request =
            self.requests.entry(request).or_insert(Request { since: now, on: Vec::new(), known: Known::Whole });
        (request.since, request.known) = (now, known);
        request.on.retain(|(id, _)| *id != on);
        request.on.push((on, by.channel));
        rated
    }

    fn freed(&mut self, id: RequestId, on: &Id) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.on.retain(|(id, _)| id != on);
        let awaits_decode = matches!(request.known, Known::Prefill(..) | Known::WholeOfPrefill);
        if request.on.is_empty() && !awaits_decode {
            self.requests.remove(&id);
        }
    }

    /// What was placed over that channel may have ended unheard.
    pub(super) fn lose(&mut self, channel: Channel) {
        if !self.placers.remove(&channel) {
            return;
        }
        self.requests.retain(|_, request| {
            let before = request.on.len();
            request.on.retain(|(_, heard_over)| *heard_over != channel);
            !request.on.is_empty() || before == 0
        });
    }

    pub(super) fn expire(&mut self, now: Instant) {
        let ttl = self.ttl;
        self.requests.retain(|_, request| {
            let limit = if request.on.is_empty() { JOIN_WAIT.min(ttl) } else { ttl };
            now.saturating_duration_since(request.since) < limit
        });
    }

    /// Requests in flight by worker.
    pub(super) fn in_flight(&self) -> HashMap<&Id, u64> {
        let mut counts = HashMap::new();
        for (id, _) in self.requests.values().flat_map(|request| &request.on) {
            *counts.entry(id).or_default() += 1;
        }
        counts
    }
}

/// Whom a placement is counted for, in whose blocks, and what it says.
type Rated = (Id, PlacedBy, Counted);

/// What is known of a prompt after a placement, and what can be counted of it now. A disaggregated one is counted for the
/// worker that computes the prompt.
fn joined(known: Option<Known>, by: PlacedBy, prompt: Prompt, on: &Id) -> (Known, Option<Rated>) {
    let effective =
        |id: &Id, by, full_blocks, tokens| Some((id.clone(), by, Counted::Effective { full_blocks, tokens }));
    match (prompt.cached, prompt.full_blocks, known) {
        (Cached::Overlap { isl_tokens, blocks }, full_blocks, known)
            if full_blocks.is_none() || known != Some(Known::WholeOfPrefill) =>
        {
            let known = if full_blocks.is_some() { Known::Whole } else { Known::WholeOfPrefill };
            (known, Some((on.clone(), by, Counted::Overlap { isl_tokens, full_blocks, blocks })))
        }
        (Cached::Effective { tokens }, Some(full_blocks), _) => (Known::Whole, effective(on, by, full_blocks, tokens)),
        (Cached::Effective { tokens }, None, Some(Known::Decode(full_blocks, by))) => {
            (Known::Whole, effective(on, by, full_blocks, tokens))
        }
        (Cached::Effective { tokens }, None, _) => (Known::Prefill(on.clone(), tokens), None),
        (Cached::Untracked, Some(full_blocks), Some(Known::Prefill(id, tokens))) => {
            (Known::Whole, effective(&id, by, full_blocks, tokens))
        }
        (Cached::Untracked, Some(full_blocks), None) => (Known::Decode(full_blocks, by), None),
        _ => (Known::Whole, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{Source, Topic};

    const CHANNEL: Channel = Channel { source: Source::Zmq, publisher: 1, topic: Topic::ActiveSequences };
    const OTHER: Channel = Channel { publisher: 2, ..CHANNEL };
    const TTL: Duration = Duration::from_secs(600);

    struct Routers(Placements, Instant);

    impl Routers {
        fn new() -> Self {
            Self(Placements::new(TTL), Instant::now())
        }

        fn take(&mut self, channel: Channel, request: &str, worker: u64, step: Step) -> Vec<(u64, Counted)> {
            let (request, worker) = (RequestId::of(b"router", request), WorkerId(worker));
            let routing = Routing { request, router: None, adapter: None, worker, step };
            let counted = self.0.take(PlacedBy::over(channel, worker), &routing, ("dynamo".into(), worker), self.1);
            counted.into_iter().map(|((_, worker), _, counted)| (worker.0, counted)).collect()
        }

        fn in_flight(&self, worker: u64) -> u64 {
            self.0.in_flight().get(&("dynamo".into(), WorkerId(worker))).copied().unwrap_or_default()
        }
    }

    fn placed(full_blocks: Option<u32>, cached: Cached) -> Step {
        Step::Placed(Prompt { full_blocks, cached })
    }

    const PREFILL: Cached = Cached::Effective { tokens: 4 };
    const JOINED: Counted = Counted::Effective { full_blocks: 6, tokens: 4 };

    #[test]
    fn a_request_is_in_flight_from_its_placement_to_its_end() {
        let mut routers = Routers::new();
        let counted = routers.take(CHANNEL, "a", 1, placed(Some(6), PREFILL));
        assert_eq!(counted, [(1, Counted::Placed), (1, JOINED)]);
        routers.take(CHANNEL, "b", 1, placed(Some(6), PREFILL));
        routers.take(CHANNEL, "a", 1, Step::Prefilled);
        assert_eq!(routers.in_flight(1), 2);
        routers.take(CHANNEL, "a", 1, Step::Freed);
        routers.take(CHANNEL, "nobody's", 1, Step::Freed);
        assert_eq!((routers.in_flight(1), routers.0.requests.len()), (1, 1));
    }

    #[test]
    fn the_halves_of_a_placement_are_joined_on_the_prefill_worker_in_either_order() {
        let mut routers = Routers::new();
        assert_eq!(routers.take(CHANNEL, "a", 1, placed(None, PREFILL)), [(1, Counted::Placed)]);
        routers.take(CHANNEL, "a", 1, Step::Freed);
        let joined = routers.take(OTHER, "a", 2, placed(Some(6), Cached::Untracked));
        assert_eq!(joined, [(2, Counted::Placed), (1, JOINED)]);
        routers.take(OTHER, "a", 2, Step::Freed);
        assert_eq!(routers.take(OTHER, "b", 2, placed(Some(6), Cached::Untracked)), [(2, Counted::Placed)]);
        assert_eq!(routers.take(CHANNEL, "b", 1, placed(None, PREFILL)), [(1, Counted::Placed), (1, JOINED)]);
        assert_eq!((routers.in_flight(1), routers.in_flight(2)), (1, 1));
        routers.take(CHANNEL, "b", 1, Step::Freed);
        routers.take(OTHER, "b", 2, Step::Freed);
        assert!(routers.0.requests.is_empty());
    }

    #[test]
    fn up_to_1_1_the_prefill_half_alone_is_counted() {
        let mut routers = Routers::new();
        let overlap = |blocks| Cached::Overlap { isl_tokens: 100, blocks };
        let counted = routers.take(CHANNEL, "a", 1, placed(None, overlap(6)));
        assert_eq!(counted[1], (1, Counted::Overlap { isl_tokens: 100, full_blocks: None, blocks: 6 }));
        routers.take(CHANNEL, "a", 1, Step::Freed);
        assert_eq!(routers.take(CHANNEL, "a", 2, placed(Some(6), overlap(0))), [(2, Counted::Placed)]);
    }

    #[test]
    fn a_router_that_dies_leaves_nothing_in_flight_for_ever() {
        let mut routers = Routers::new();
        routers.take(CHANNEL, "a", 1, placed(Some(6), PREFILL));
        routers.take(OTHER, "b", 1, placed(Some(6), PREFILL));
        routers.0.lose(CHANNEL);
        assert_eq!(routers.in_flight(1), 1, "its channel is gone");
        routers.0.expire(routers.1 + TTL);
        assert_eq!(routers.in_flight(1), 0, "nothing was heard of it");
    }

    #[test]
    fn a_half_that_is_not_joined_is_given_up() {
        let mut routers = Routers::new();
        routers.take(CHANNEL, "a", 1, placed(None, PREFILL));
        routers.take(CHANNEL, "a", 1, Step::Freed);
        routers.0.expire(routers.1 + JOIN_WAIT);
        assert!(routers.0.requests.is_empty());
    }

    #[test]
    fn requests_are_bounded_and_those_beyond_are_counted_all_the_same() {
        let mut routers = Routers::new();
        for number in 0..MAX_REQUESTS {
            routers.take(CHANNEL, &number.to_string(), 1, placed(Some(6), PREFILL));
        }
        assert_eq!(routers.take(CHANNEL, "beyond", 1, placed(Some(6), PREFILL)).len(), 2);
        assert_eq!(routers.in_flight(1), MAX_REQUESTS as u64);
    }
}
