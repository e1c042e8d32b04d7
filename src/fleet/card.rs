//! What a worker's model card says: who serves what, and how much fits.

use std::collections::HashMap;
use std::sync::Arc;

use super::Rank;

/// A model card, as far as the bridge reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    /// Name of the model.
    pub model: Arc<str>,
    /// What the worker does of a request; cards up to 1.2 do not say.
    pub role: Option<Role>,
    /// Tokens a KV-cache block.
    pub block_size: Option<u64>,
    /// Limits of each rank.
    pub limits: Limits,
    /// The first data-parallel rank, and how many there are.
    pub ranks: Ranks,
}

impl Card {
    /// Whether it is an engine's: it says how much that can hold, or which part of a request it computes. vLLM, `SGLang`,
    /// TensorRT-LLM and the simulated engine say one of the limits in every release that can, and an encode worker says its
    /// role. Routers that register a card of their own (1.0 and later) say no limit and call themselves aggregated, and so do
    /// engines without a KV cache.
    pub(super) fn is_of_an_engine(&self) -> bool {
        let Limits { blocks, slots, batch_tokens } = self.limits;
        blocks.or(slots).or(batch_tokens).is_some() || self.role.is_some_and(|role| role != Role::Aggregated)
    }
}

/// A `LoRA` adapter that a worker has loaded, as its own card says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adapter {
    /// By which it is asked for.
    pub name: Arc<str>,
    /// Tokens a KV-cache block.
    pub block_size: Option<u64>,
}

/// An adapter's name, of any length: what is kept is a hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AdapterId([u8; 8]);

impl AdapterId {
    /// Of that name.
    #[must_use]
    pub fn of(name: &str) -> Self {
        let mut id = [0; 8];
        blake3::Hasher::new().update(name.as_bytes()).finalize_xof().fill(&mut id);
        Self(id)
    }
}

/// Tokens of a block: more than any prompt has.
const MAX_BLOCK: u64 = u32::MAX as u64;

/// Tokens a KV-cache block of one worker.
#[derive(Debug, Clone, Default)]
pub(super) struct BlockSizes {
    /// Of its base model, in which routers count from 1.4 on whatever the request asks for.
    pub(super) base: Option<u64>,
    /// Of its adapters, each of which has a router of its own up to 1.3.
    pub(super) adapters: Arc<HashMap<AdapterId, u64>>,
}

impl BlockSizes {
    /// Whether nothing has changed since those were taken.
    pub(super) fn are(&self, known: &Self) -> bool {
        self.base == known.base && Arc::ptr_eq(&self.adapters, &known.adapters)
    }

    pub(super) fn of(&self, adapter: Option<AdapterId>) -> Option<u64> {
        let size = adapter.map_or(self.base, |adapter| self.adapters.get(&adapter).copied());
        size.filter(|size| (1..=MAX_BLOCK).contains(size))
    }
}

/// What a rank can hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// KV-cache blocks.
    pub blocks: Option<u64>,
    /// Request slots.
    pub slots: Option<u64>,
    /// Tokens that one pass computes.
    pub batch_tokens: Option<u64>,
}

/// The data-parallel ranks of one worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranks {
    /// The first; cards up to 0.9 do not say.
    pub first: Option<u32>,
    /// How many; at least one. No more than [`MAX_RANKS`] of them are reported.
    pub count: u32,
}

impl Ranks {
    /// The place of a rank among them; `None` of one that is not there.
    pub(super) fn place(self, rank: Rank) -> Option<u32> {
        rank.0.checked_sub(self.first.unwrap_or_default()).filter(|place| *place < self.count)
    }
}

/// Ranks of a worker that are reported: each costs a series of every gauge. The widest expert parallelism known is 320.
pub const MAX_RANKS: u32 = 1024;

/// Data-parallel ranks for which there is room, on average: engines have one for each GPU of a node.
const RANKS_PER_WORKER: usize = 8;

/// Ranks of all workers that are reported, where there are so many workers at most.
#[must_use]
pub fn max_ranks(max_workers: usize) -> usize {
    max_workers.saturating_mul(2 * RANKS_PER_WORKER).max(16_000)
}

/// What a worker does of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// All of it.
    Aggregated,
    /// Computes the prompt.
    Prefill,
    /// Generates the answer.
    Decode,
    /// Encodes images or audio.
    Encode,
}

impl Role {
    /// Dynamo's word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Aggregated => "aggregated",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Encode => "encode",
        }
    }

    /// Reads Dynamo's word; `None` for one that is not known here.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Aggregated, Self::Prefill, Self::Decode, Self::Encode].into_iter().find(|role| role.as_str() == word)
    }
}
