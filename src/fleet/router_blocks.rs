//! Whether a router counts in blocks of the same size as the worker that it places a prompt on.
//!
//! A router counts a prompt in blocks of its own: n full ones, and the tokens that are left to be computed, of which its
//! blocks hold all but a last partial one. A frontend's router takes the size from the card. One that runs apart has an
//! option for it, says it nowhere, and a rate by the card's size would be a wrong number. What its prompts show:
//!
//! - More tokens than n + 1 of the card's blocks hold: its own are larger. (As many is what a model with speculative
//!   decoding by EAGLE shows, whose last block is never full.)
//! - More than n + 1 blocks of half the size would hold: its own are no smaller, as sizes are powers of two. A prompt
//!   shows that unless half of it is cached. Until then a router apart may as well count in smaller blocks, which hold what
//!   looks like a cached half of every prompt.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::WorkerId;
use super::card::AdapterId;
use super::observation::{Channel, Reason, Rejection};

/// Channels remembered at most, for each size of block that their workers have.
const MAX_ROUTERS: usize = 10_000;

/// A router that was silent for so long is forgotten.
const MEMORY: Duration = Duration::from_secs(60 * 60);

/// Who placed a prompt, and in whose blocks it is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PlacedBy {
    /// Over which it was heard.
    pub(super) channel: Channel,
    /// The router, where it says so.
    pub(super) router: Option<WorkerId>,
    /// The router runs apart from every frontend.
    pub(super) apart: bool,
    /// The adapter whose router it is.
    pub(super) adapter: Option<AdapterId>,
    /// The worker that it places the prompt on, and in whose blocks it counts.
    pub(super) on: WorkerId,
}

impl PlacedBy {
    /// One that says nothing of itself.
    pub(super) fn over(channel: Channel, on: WorkerId) -> Self {
        Self { channel, router: None, apart: false, adapter: None, on }
    }

    /// Of what came from it.
    pub(super) fn rejection(self, reason: Reason, detail: String) -> Rejection {
        let Channel { source, topic, .. } = self.channel;
        Rejection { source, topic, reason, detail }
    }
}

/// Why there is no rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doubt {
    /// The router's blocks have so many tokens at least, and the worker's have fewer.
    Larger(u64),
    /// They may be smaller.
    Unshown,
}

impl Doubt {
    /// For a person: about whom, and what to change. The worker's blocks have `size` tokens.
    pub(super) fn of(self, by: PlacedBy, size: u64) -> String {
        let PlacedBy { router, channel, on, .. } = by;
        let router = router.unwrap_or(WorkerId(channel.publisher));
        let counts = match self {
            Self::Larger(at_least) => format!("counts in blocks of {at_least} tokens or more"),
            Self::Unshown => "runs apart from the frontend and has not shown how large its blocks are".to_owned(),
        };
        format!(
            "router {router} {counts}, worker {on} has blocks of {size}: no hit rates; give it --router-block-size {size}"
        )
    }
}

#[derive(Debug, Clone, Copy)]
struct Shown {
    at_least: u64,
    apart: bool,
    at: Instant,
}

/// What the prompts of each channel showed, by the block size of the workers that they went to: a channel may have routers
/// for several models.
#[derive(Debug, Default)]
pub(super) struct RouterBlocks(HashMap<(Channel, u64), Shown>);

impl RouterBlocks {
    /// Takes what a prompt shows, and judges whether its blocks are the worker's, of `size` tokens.
    pub(super) fn judge(&mut self, by: PlacedBy, at_least: u64, size: u64, now: Instant) -> Result<(), Doubt> {
        let key = (by.channel, size);
        let has_room = self.0.len() < MAX_ROUTERS;
        let mut first = Shown { at_least: 0, apart: false, at: now };
        let shown = match self.0.get_mut(&key) {
            Some(shown) => shown,
            None if has_room => self.0.entry(key).or_insert(first),
            None => &mut first,
        };
        shown.at = now;
        shown.at_least = shown.at_least.max(at_least);
        shown.apart |= by.apart;
        match shown.at_least {
            at_least if at_least > size => Err(Doubt::Larger(at_least)),
            at_least if shown.apart && at_least <= size / 2 => Err(Doubt::Unshown),
            _ => Ok(()),
        }
    }

    pub(super) fn expire(&mut self, now: Instant) {
        self.0.retain(|_, shown| now.saturating_duration_since(shown.at) < MEMORY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{Source, Topic};

    fn router(publisher: u64, apart: bool) -> PlacedBy {
        let channel = Channel { source: Source::Zmq, publisher, topic: Topic::ActiveSequences };
        PlacedBy { apart, ..PlacedBy::over(channel, WorkerId(1)) }
    }

    #[test]
    fn one_prompt_shows_that_blocks_are_larger_and_no_later_one_takes_it_back() {
        let (mut blocks, now) = (RouterBlocks::default(), Instant::now());
        let judged = [16, 17, 1].map(|at_least| blocks.judge(router(1, false), at_least, 16, now));
        assert_eq!(judged, [Ok(()), Err(Doubt::Larger(17)), Err(Doubt::Larger(17))]);
        assert_eq!(blocks.judge(router(1, false), 17, 32, now), Ok(()), "workers of another size");
        assert_eq!(blocks.judge(router(2, false), 16, 16, now), Ok(()), "another router");
    }

    #[test]
    fn a_router_apart_has_no_rates_before_it_has_shown_that_its_blocks_are_no_smaller() {
        let (mut blocks, now) = (RouterBlocks::default(), Instant::now());
        let judged = [0, 8, 9, 0].map(|at_least| blocks.judge(router(1, true), at_least, 16, now));
        assert_eq!(judged, [Err(Doubt::Unshown), Err(Doubt::Unshown), Ok(()), Ok(())]);
        blocks.judge(router(2, true), 0, 16, now).unwrap_err();
        assert_eq!(blocks.judge(router(2, false), 0, 16, now), Err(Doubt::Unshown), "it is known, though it has left");
    }

    #[test]
    fn routers_are_bounded_and_silent_ones_make_room() {
        let (mut blocks, now) = (RouterBlocks::default(), Instant::now());
        for publisher in 0..=MAX_ROUTERS as u64 {
            blocks.judge(router(publisher, false), 16, 16, now).unwrap();
        }
        assert_eq!(blocks.0.len(), MAX_ROUTERS);
        blocks.expire(now + MEMORY);
        assert_eq!(blocks.0.len(), 0);
    }
}
