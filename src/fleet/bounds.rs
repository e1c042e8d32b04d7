//! What cannot be, whoever says it: one number that lies must not spoil a sum for good.
//!
//! Absolute bounds lie above whatever runs today. What a model card says bounds more closely, with [`ROOM`], since engines
//! count a little over and a card may be late. A count that somebody else counts cannot grow faster than some [`Rate`]: one
//! that does is another count.

use std::time::Duration;

use super::{Cached, Card, Estimate, Load, Pass, Prompt, Ranks, Reason};

/// KV-cache blocks of a rank: blocks of one token each, of 1 KB, would be 4 TB.
const MAX_BLOCKS: u64 = 1 << 32;
/// Requests that a rank has at once, or that wait for it. Engines are set to some hundreds or thousands.
const MAX_REQUESTS: u64 = 1 << 20;
/// Tokens of a prompt, of a block, and of all that one pass computes. The longest contexts are 10 million tokens.
const MAX_PROMPT: u64 = 1 << 24;
/// Tokens of many requests, which may share them: 65,536 of the longest prompts.
const MAX_TOKENS: u64 = 1 << 40;
/// Tokens of a draft: engines draft a handful.
const MAX_DRAFT: u64 = 1 << 10;
/// Seconds of a pass: the prefill of a long prompt takes minutes.
const MAX_WALL_TIME: f64 = 3600.0;
/// Data-parallel ranks of a deployment: each is at least a GPU.
const MAX_RANK: u32 = 1 << 16;

/// How many times as much as the limits allow is believed.
const ROOM: u64 = 2;
/// The same of a share, which is 1 at most: rounding, and a block that is kept apart.
const ROOM_OF_A_SHARE: f64 = 1.1;

/// Why something is not used, and what it was.
pub(super) type Refusal = (Reason, String);

/// How fast a count can grow.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rate {
    per_second: u64,
    /// What happened for so long may come at once.
    at_once: Duration,
}

/// Passes of a rank: a pass of the smallest model takes a good part of a millisecond.
pub(super) const PASSES: Rate = Rate { per_second: 10_000, at_once: Duration::from_secs(1) };
/// Messages of a publisher on one topic, which may be those of a thousand ranks.
pub(super) const MESSAGES: Rate = Rate { per_second: 100_000, at_once: Duration::from_secs(1) };
/// Tokens that a rank drafts.
pub(super) const DRAFTED: Rate = Rate { per_second: 10_000_000, at_once: Duration::from_secs(1) };
/// Requests of an endpoint.
pub(super) const REQUESTS: Rate = Rate { per_second: 10_000, at_once: Duration::from_secs(1) };
/// Nanoseconds that an endpoint spends on 10,000 requests at a time, each of which is counted when it ends.
pub(super) const PROCESSING: Rate = Rate { per_second: 10_000 * 1_000_000_000, at_once: Duration::from_secs(60 * 60) };

impl Rate {
    /// The most by which the count grows in that time.
    pub(super) fn most(self, elapsed: Duration) -> u64 {
        let milliseconds = u128::from(self.per_second) * (elapsed.saturating_add(self.at_once)).as_millis() / 1000;
        u64::try_from(milliseconds).unwrap_or(u64::MAX)
    }
}

/// A share in use, 0..1; `None` of more than all.
pub(super) fn share(value: f64) -> Option<f64> {
    (value <= ROOM_OF_A_SHARE).then_some(value.min(1.0))
}

/// Whether a deployment can have that many ranks.
pub(super) fn is_rank(number: u32) -> bool {
    number < MAX_RANK
}

/// Takes out what no rank can have, and what is more than its own limits allow; names the first of it.
pub(super) fn judge_load(load: &mut Load) -> Option<Refusal> {
    let mut judged = Judged(None);
    judged.count("total blocks", &mut load.total_blocks, MAX_BLOCKS);
    judged.count("total slots", &mut load.total_slots, MAX_REQUESTS);
    judged.count("active blocks", &mut load.active_blocks, with_room(load.total_blocks, MAX_BLOCKS));
    judged.count("active slots", &mut load.active_slots, with_room(load.total_slots, MAX_REQUESTS));
    judged.count("waiting requests", &mut load.waiting, MAX_REQUESTS);
    judged.share("cache usage", &mut load.cache_usage);
    judged.share("prefix hit rate", &mut load.prefix_hit_rate);
    if let Some(spec_decode) = &mut load.spec_decode {
        judged.count("tokens of a draft", &mut spec_decode.spec_tokens, MAX_DRAFT);
    }
    judged.0
}

/// Takes out what no engine can have; names the first of it.
pub(super) fn judge_card(card: &mut Card) -> Option<Refusal> {
    let mut judged = Judged(None);
    judged.count("total blocks", &mut card.limits.blocks, MAX_BLOCKS);
    judged.count("total slots", &mut card.limits.slots, MAX_REQUESTS);
    judged.count("tokens of a batch", &mut card.limits.batch_tokens, MAX_PROMPT);
    judged.count("tokens of a block", &mut card.block_size, MAX_PROMPT);
    let Ranks { first, count } = card.ranks;
    if !is_rank(first.unwrap_or_default().saturating_add(count).saturating_sub(1)) {
        judged.refuse("the number of ranks", &count);
        card.ranks = Ranks { first: None, count: 1 };
    }
    judged.0
}

/// Takes out what no router can believe; names the first of it. It may place more on a worker than fits.
pub(super) fn judge_estimate(estimate: &mut Estimate) -> Option<Refusal> {
    let mut judged = Judged(None);
    judged.count("estimated blocks", &mut estimate.decode_blocks, MAX_BLOCKS);
    judged.count("estimated tokens", &mut estimate.prefill_tokens, MAX_TOKENS);
    judged.0
}

/// What is impossible in a pass, if anything: a pass is counted whole, or not at all.
///
/// What it computes goes into the KV cache, and is no more than a batch where it is no prompt that came from another engine.
pub(super) fn judge_pass(pass: &Pass, card: Option<&Card>) -> Result<(), Refusal> {
    let Pass { wall_time, scheduled, queued, .. } = pass;
    let limits = card.map(|card| card.limits).unwrap_or_default();
    let cached = card.and_then(|card| limits.blocks?.checked_mul(card.block_size?));
    let tokens = with_room(cached.zip(limits.batch_tokens).map(|(cached, batch)| cached.max(batch)), MAX_PROMPT);
    let slots = with_room(limits.slots, MAX_REQUESTS);
    let counts = [
        ("requests in prefill", scheduled.prefill_requests, slots),
        ("requests in decode", scheduled.decode_requests, slots),
        ("tokens of prefill", scheduled.prefill_tokens, tokens),
        ("cached tokens of prefill", scheduled.prefill_kv_tokens, MAX_TOKENS),
        ("cached tokens of decode", scheduled.decode_kv_tokens, MAX_TOKENS),
        ("queued requests", queued.prefill_requests, MAX_REQUESTS),
        ("queued tokens", queued.prefill_tokens, MAX_TOKENS),
        ("preempted requests", queued.decode_requests, MAX_REQUESTS),
        ("tokens of preempted requests", queued.decode_kv_tokens, MAX_TOKENS),
    ];
    let mut judged = Judged(None);
    for (what, value, most) in counts {
        judged.count(what, &mut Some(value), most);
    }
    if *wall_time > MAX_WALL_TIME {
        judged.refuse("seconds of a pass", wall_time);
    }
    judged.whole()
}

/// What is impossible in a prompt, if anything.
pub(super) fn judge_prompt(prompt: &Prompt) -> Result<(), Refusal> {
    let tokens = match prompt.cached {
        Cached::Overlap { isl_tokens, .. } => isl_tokens,
        Cached::Effective { tokens } => tokens,
        Cached::Untracked | Cached::InEventOfItsOwn => 0,
    };
    let mut judged = Judged(None);
    judged.count("tokens of a prompt", &mut Some(tokens), MAX_PROMPT);
    judged.count("blocks of a prompt", &mut prompt.full_blocks.map(u64::from), MAX_PROMPT);
    judged.whole()
}

/// The same of a prompt in blocks, which have a token at least.
pub(super) fn judge_blocks(blocks: u32) -> Result<(), Refusal> {
    let mut judged = Judged(None);
    judged.count("blocks of a prompt", &mut Some(blocks.into()), MAX_PROMPT);
    judged.whole()
}

/// So many times as much as there is; 0 is no limit that anything has.
fn with_room(limit: Option<u64>, most: u64) -> u64 {
    limit.filter(|limit| *limit > 0).map_or(most, |limit| limit.saturating_mul(ROOM).min(most))
}

/// The first of what was refused.
struct Judged(Option<Refusal>);

impl Judged {
    /// Refuses the whole of it for any part.
    fn whole(self) -> Result<(), Refusal> {
        self.0.map_or(Ok(()), Err)
    }

    fn count(&mut self, what: &str, value: &mut Option<u64>, most: u64) {
        if let Some(impossible) = value.take_if(|value| *value > most) {
            self.refuse(what, &format_args!("{impossible}, more than {most}"));
        }
    }

    fn share(&mut self, what: &str, value: &mut Option<f64>) {
        let said = *value;
        *value = said.and_then(share);
        if let Some(impossible) = said.filter(|_| value.is_none()) {
            self.refuse(what, &format_args!("{impossible}, more than 1"));
        }
    }

    fn refuse(&mut self, what: &str, value: &dyn std::fmt::Display) {
        self.0.get_or_insert_with(|| (Reason::OutOfRange, format!("{what}: {value}")));
    }
}
