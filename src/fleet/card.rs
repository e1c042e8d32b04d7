//! What a worker's model card says: who serves what, and how much fits.

use std::sync::Arc;

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

/// What a rank can hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// KV-cache blocks.
    pub blocks: Option<u64>,
    /// Request slots.
    pub slots: Option<u64>,
}

/// The data-parallel ranks of one worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranks {
    /// The first.
    pub first: u32,
    /// How many; at least one, and at most [`MAX_RANKS`].
    pub count: u32,
}

/// Ranks of a worker that are reported: each costs a series of every gauge.
pub const MAX_RANKS: u32 = 256;

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
