//! One invented stream of requests: a router places them, engines compute them. No clock and no I/O: a tick is a pass.
//!
//! All that mocks say is read off this one state, so that tokens, blocks and hits add up. [`Ledger`] is what they have to
//! add up to; it is kept by request, while passes are what the engines do.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use rand::RngExt;
use rand::rngs::StdRng;

use crate::fleet::{HitBlocks, Load, Pass, Queued, Scheduled};

/// Tokens of a prompt and of an answer, at most.
const LONGEST: (u32, u32) = (512, 64);
/// Tokens of prompts that a pass computes at most: longer ones are computed in chunks.
const CHUNK: u32 = 256;
/// How often an engine gets a request. With prompts as above it has some four of them at a time.
const ARRIVALS_PER_PASS: f64 = 0.125;
/// A router sends an engine no more where so many wait.
const LONGEST_QUEUE: usize = 8;
/// Seconds of a pass: at least, and for each token that it computes.
const WALL_TIME: (f64, f64) = (0.005, 0.000_05);

/// What the engines are like, and what is asked of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) engines: usize,
    /// Tokens a block.
    pub(super) block_size: u32,
    /// Blocks of each engine.
    pub(super) total_blocks: u64,
    /// Requests that an engine computes at a time.
    pub(super) slots: u64,
    /// An engine that has nothing to do says so each time that so many ticks have passed.
    pub(super) heartbeat: u64,
    /// Requests in all; without end where it is `None`.
    pub(super) requests: Option<u64>,
}

/// One request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) id: u128,
    /// A hash for each full block of the prompt.
    pub(super) hashes: Vec<u64>,
    /// Tokens of the prompt.
    pub(super) prompt: u32,
    pub(super) blocks: HitBlocks,
    /// Tokens of the prompt that are in the cache, of those that the engine makes use of.
    cached: u32,
    /// Tokens of the prompt that the router believes are not.
    pub(super) effective: u32,
    /// Tokens of the answer.
    output: u32,
}

/// What a router tells of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Placed,
    Prefilled,
    Freed,
}

/// What is to be said of an engine, which is known by its number.
#[derive(Debug, PartialEq)]
pub(super) enum Said {
    Step(usize, Arc<Request>, Step),
    Pass(usize, Pass),
    Load(usize, Load),
}

/// What everything adds up to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ledger {
    /// Placed.
    pub(super) requests: u64,
    /// Of those.
    isl_blocks: u64,
    /// Of those.
    overlap_blocks: u64,
    /// Of requests that have ended.
    prefill_tokens: u64,
    /// Of requests that have ended; the first token of each is made by its prefill.
    decode_tokens: u64,
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { requests, isl_blocks, overlap_blocks, prefill_tokens, decode_tokens } = self;
        write!(
            f,
            "requests={requests} isl_blocks={isl_blocks} overlap_blocks={overlap_blocks} prefill_tokens={prefill_tokens} decode_tokens={decode_tokens}"
        )
    }
}

/// The router and its engines.
#[derive(Debug)]
pub(super) struct Stream {
    shape: Shape,
    random: StdRng,
    engines: Vec<Engine>,
    ledger: Ledger,
}

impl Stream {
    pub(super) fn new(shape: Shape, random: StdRng) -> Self {
        let engines = (0..shape.engines).map(|_| Engine::default()).collect();
        Self { shape, random, engines, ledger: Ledger::default() }
    }

    /// One pass of each engine; what is to be said of it, in that order.
    pub(super) fn tick(&mut self) -> Vec<Said> {
        let mut said = Vec::new();
        for number in 0..self.engines.len() {
            let request = self.arrival(self.engines[number].queued.len());
            let engine = &mut self.engines[number];
            if let Some(request) = request {
                said.push(Said::Step(number, Arc::clone(&request), Step::Placed));
                engine.place(request);
            }
            let (pass, steps) = engine.pass(&self.shape);
            for (request, step) in steps {
                if step == Step::Freed {
                    self.ledger.prefill_tokens += u64::from(request.prompt - request.cached);
                    self.ledger.decode_tokens += u64::from(request.output - 1);
                }
                said.push(Said::Step(number, request, step));
            }
            said.extend(pass.map(|pass| Said::Pass(number, pass)));
            said.extend(engine.told_load(&self.shape).map(|load| Said::Load(number, load)));
        }
        said
    }

    /// Whether every request that there will be has ended.
    pub(super) fn is_done(&self) -> bool {
        let idle = |engine: &Engine| engine.queued.is_empty() && engine.running.is_empty();
        self.shape.requests.is_some_and(|requests| self.ledger.requests >= requests) && self.engines.iter().all(idle)
    }

    /// The load of an engine.
    pub(super) fn load(&self, engine: usize) -> Load {
        self.engines[engine].load(&self.shape)
    }

    pub(super) fn ledger(&self) -> Ledger {
        self.ledger
    }

    fn arrival(&mut self, queued: usize) -> Option<Arc<Request>> {
        let Shape { block_size, total_blocks, slots, requests, .. } = self.shape;
        // Half of the cache holds a prompt, so that the whole of it holds an answer too.
        let half = u32::try_from(total_blocks.saturating_mul(block_size.into()) / 2).unwrap_or(u32::MAX);
        let (longest, longest_answer) = (half.min(LONGEST.0), half.min(LONGEST.1));
        let wanted = requests.is_none_or(|requests| self.ledger.requests < requests);
        if !wanted || slots == 0 || longest == 0 || queued >= LONGEST_QUEUE {
            return None;
        }
        if !self.random.random_bool(ARRIVALS_PER_PASS) {
            return None;
        }
        let request = self.invent(longest, longest_answer);
        self.ledger.requests += 1;
        self.ledger.isl_blocks += u64::from(request.blocks.isl);
        self.ledger.overlap_blocks += u64::from(request.blocks.overlap);
        Some(Arc::new(request))
    }

    fn invent(&mut self, longest: u32, longest_answer: u32) -> Request {
        let (random, size) = (&mut self.random, self.shape.block_size);
        let mut prompt = random.random_range(1..=longest);
        // Whole blocks are a case of their own: only such a prompt can be cached altogether.
        if prompt > size && random.random_bool(0.25) {
            prompt -= prompt % size;
        }
        let full = prompt / size;
        let overlap = if random.random_bool(0.5) { random.random_range(0..=full) } else { 0 };
        let held = overlap * size;
        Request {
            id: random.random(),
            hashes: (0..full).map(|_| random.random()).collect(),
            prompt,
            blocks: HitBlocks { isl: prompt.div_ceil(size), overlap },
            // Where all of a prompt is cached, the engine computes its last block once more.
            cached: if held == prompt { prompt - size } else { held },
            effective: prompt - held,
            output: random.random_range(1..=longest_answer),
        }
    }
}

/// A request in a slot.
#[derive(Debug)]
struct Running {
    request: Arc<Request>,
    /// Tokens of its prompt that are in the cache.
    ready: u32,
    /// Tokens of its answer.
    made: u32,
}

impl Running {
    fn is_prefilled(&self) -> bool {
        self.ready == self.request.prompt
    }

    fn tokens(&self) -> u64 {
        u64::from(self.ready) + u64::from(self.made)
    }
}

#[derive(Debug, Default)]
struct Engine {
    queued: VecDeque<Arc<Request>>,
    running: Vec<Running>,
    /// Passes and heartbeats.
    counter: u64,
    /// Ticks since the last one of them.
    silent: u64,
    /// The load that was told last, and how many ticks ago.
    told: Option<(Load, u64)>,
    /// Blocks of the prompts that it got, and those of them that were cached.
    hits: (u64, u64),
}

impl Engine {
    fn place(&mut self, request: Arc<Request>) {
        self.hits.0 += u64::from(request.blocks.isl);
        self.hits.1 += u64::from(request.blocks.overlap);
        self.queued.push_back(request);
    }

    /// What it computes in a tick, if anything, and what becomes of its requests.
    fn pass(&mut self, shape: &Shape) -> (Option<Pass>, Vec<(Arc<Request>, Step)>) {
        self.admit(shape);
        let mut scheduled = Scheduled::default();
        let mut steps = Vec::new();
        let mut chunk = CHUNK;
        for running in &mut self.running {
            if running.is_prefilled() {
                scheduled.decode_requests += 1;
                scheduled.decode_kv_tokens += running.tokens();
                running.made += 1;
            } else if chunk > 0 {
                let computed = chunk.min(running.request.prompt - running.ready);
                chunk -= computed;
                scheduled.prefill_requests += 1;
                scheduled.prefill_tokens += u64::from(computed);
                scheduled.prefill_kv_tokens += u64::from(running.ready);
                running.ready += computed;
                if running.is_prefilled() {
                    running.made = 1;
                    steps.push((Arc::clone(&running.request), Step::Prefilled));
                }
            }
        }
        self.running.retain(|running| {
            let ended = running.made == running.request.output;
            if ended {
                steps.push((Arc::clone(&running.request), Step::Freed));
            }
            !ended
        });
        (self.counted(shape, scheduled), steps)
    }

    /// As many as there are slots and, to their last token, blocks for: none is ever preempted.
    fn admit(&mut self, shape: &Shape) {
        let whole = |request: &Request| (request.prompt + request.output).div_ceil(shape.block_size);
        let mut reserved: u64 = self.running.iter().map(|running| u64::from(whole(&running.request))).sum();
        while let Some(request) = self.queued.front() {
            reserved += u64::from(whole(request));
            if reserved > shape.total_blocks || self.running.len() as u64 >= shape.slots {
                return;
            }
            let ready = request.cached;
            self.running.extend(self.queued.pop_front().map(|request| Running { request, ready, made: 0 }));
        }
    }

    /// The pass with its number; a heartbeat at times where there was nothing to compute.
    fn counted(&mut self, shape: &Shape, scheduled: Scheduled) -> Option<Pass> {
        self.silent += 1;
        let computes = scheduled.requests() > 0;
        if !computes && self.silent < shape.heartbeat {
            return None;
        }
        (self.silent, self.counter) = (0, self.counter + 1);
        let tokens = scheduled.prefill_tokens + scheduled.decode_requests;
        let wall_time = if computes { WALL_TIME.1.mul_add(approximately(tokens), WALL_TIME.0) } else { 0.0 };
        let waiting = self.queued.iter().map(|request| u64::from(request.prompt - request.cached)).sum();
        let queued =
            Queued { prefill_requests: self.queued.len() as u64, prefill_tokens: waiting, ..Queued::default() };
        Some(Pass { counter: self.counter, wall_time, scheduled, queued })
    }

    fn load(&self, shape: &Shape) -> Load {
        let blocks = |running: &Running| running.tokens().div_ceil(shape.block_size.into());
        let active: u64 = self.running.iter().map(blocks).sum();
        Load {
            active_slots: Some(self.running.len() as u64),
            total_slots: Some(shape.slots),
            active_blocks: Some(active),
            total_blocks: Some(shape.total_blocks),
            waiting: Some(self.queued.len() as u64),
            cache_usage: Some(share(active, shape.total_blocks)),
            prefix_hit_rate: Some(share(self.hits.1, self.hits.0)),
            spec_decode: None,
        }
    }

    /// The load where it has changed. Unlike a real worker, which is silent while nothing changes, it is told with every
    /// heartbeat too: whoever listens later is to see something.
    fn told_load(&mut self, shape: &Shape) -> Option<Load> {
        let load = self.load(shape);
        match &mut self.told {
            Some((told, ago)) if *told == load && *ago + 1 < shape.heartbeat => {
                *ago += 1;
                None
            }
            _ => {
                self.told = Some((load.clone(), 0));
                Some(load)
            }
        }
    }
}

/// A part of a whole; 0 where there is no whole.
pub(super) fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { approximately(part) / approximately(whole) }
}

#[expect(clippy::cast_precision_loss, reason = "what mocks have is small")]
fn approximately(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use rand::SeedableRng;

    use super::*;

    const SHAPE: Shape =
        Shape { engines: 3, block_size: 16, total_blocks: 100, slots: 100, heartbeat: 10, requests: Some(200) };

    fn stream(shape: Shape, seed: u64) -> Stream {
        Stream::new(shape, StdRng::seed_from_u64(seed))
    }

    /// Everything that is said until the last request has ended, and ten heartbeats more.
    fn whole(stream: &mut Stream) -> Vec<Said> {
        let mut said = Vec::new();
        let mut ticks = 0_u64;
        while !stream.is_done() {
            said.extend(stream.tick());
            ticks += 1;
            assert!(ticks < 1_000_000, "it comes to an end: {:?}", stream.ledger());
        }
        for _ in 0..10 * stream.shape.heartbeat {
            said.extend(stream.tick());
        }
        said
    }

    /// The ledger as somebody makes it who only hears what is said.
    fn heard(said: &[Said]) -> Ledger {
        let mut ledger = Ledger::default();
        for said in said {
            match said {
                Said::Step(_, request, Step::Placed) => {
                    ledger.requests += 1;
                    ledger.isl_blocks += u64::from(request.blocks.isl);
                    ledger.overlap_blocks += u64::from(request.blocks.overlap);
                }
                Said::Pass(_, pass) => {
                    ledger.prefill_tokens += pass.scheduled.prefill_tokens;
                    ledger.decode_tokens += pass.scheduled.decode_requests;
                }
                Said::Step(..) | Said::Load(..) => {}
            }
        }
        ledger
    }

    #[test]
    fn passes_chunk_long_prompts_and_leave_room_for_answers() {
        let said = whole(&mut stream(SHAPE, 1));
        let passes: Vec<_> =
            said.iter().filter_map(|said| if let Said::Pass(0, pass) = said { Some(pass) } else { None }).collect();
        assert!(passes.iter().all(|pass| pass.scheduled.prefill_tokens <= u64::from(CHUNK)));
        assert!(passes.iter().any(|pass| pass.scheduled.prefill_tokens == u64::from(CHUNK)), "some are longer");
        assert!(passes.iter().any(|pass| pass.queued.prefill_requests > 0), "some wait");
        assert!(passes.iter().enumerate().all(|(number, pass)| pass.counter == number as u64 + 1));
        let last = passes[passes.len() - 1];
        assert_eq!((last.wall_time, last.scheduled), (0.0, Scheduled::default()), "a heartbeat");
    }

    #[test]
    fn one_seed_says_one_thing_and_another_another() {
        assert_eq!(whole(&mut stream(SHAPE, 1)), whole(&mut stream(SHAPE, 1)));
        assert_ne!(whole(&mut stream(SHAPE, 1)), whole(&mut stream(SHAPE, 2)));
    }

    #[test]
    fn a_prompt_that_is_cached_altogether_costs_its_last_block() {
        let mut stream = stream(SHAPE, 3);
        let cached =
            std::iter::from_fn(|| Some(stream.invent(512, 64))).find(|request| request.effective == 0).unwrap();
        assert_eq!((cached.prompt % 16, cached.prompt - cached.cached), (0, 16));
        assert_eq!(cached.blocks.isl, cached.blocks.overlap);
    }

    #[test]
    fn engines_without_room_get_nothing_and_say_that_they_are_idle() {
        for shape in [Shape { slots: 0, ..SHAPE }, Shape { total_blocks: 0, ..SHAPE }] {
            let mut stream = stream(shape, 1);
            let said: Vec<_> = (0..1000).flat_map(|_| stream.tick()).collect();
            assert_eq!(heard(&said), Ledger::default());
            assert!(said.iter().any(|said| matches!(said, Said::Pass(..))));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_said_adds_up_to_the_ledger_whatever_the_engines_are_like(
            seed: u64, engines in 1..4_usize, block_size in 1..64_u32, total_blocks in 4..200_u64, slots in 1..20_u64,
        ) {
            let shape = Shape { engines, block_size, total_blocks, slots, heartbeat: 5, requests: Some(50) };
            let mut stream = stream(shape, seed);
            let said = whole(&mut stream);
            prop_assert_eq!(heard(&said), stream.ledger());
            prop_assert_eq!(stream.ledger().requests, 50);
            let mut in_flight = HashMap::new();
            for said in &said {
                match said {
                    Said::Step(_, request, step) => {
                        let before = in_flight.insert(request.id, *step);
                        let expected = match step {
                            Step::Placed => None,
                            Step::Prefilled => Some(Step::Placed),
                            Step::Freed => Some(Step::Prefilled),
                        };
                        prop_assert_eq!(before, expected);
                    }
                    Said::Load(_, load) => {
                        prop_assert!(load.active_blocks <= Some(total_blocks) && load.active_slots <= Some(slots));
                    }
                    Said::Pass(..) => {}
                }
            }
            prop_assert!(in_flight.values().all(|step| *step == Step::Freed));
            for engine in 0..engines {
                let last = said.iter().rev().find_map(|said| match said {
                    Said::Load(number, load) if *number == engine => load.active_blocks,
                    _ => None,
                });
                prop_assert_eq!(last, Some(0), "nothing is left in use");
            }
        }
    }
}
