//! What one worker says of itself.

/// Data-parallel rank within a worker; 0 where the worker has none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rank(pub u32);

/// The load of one rank, as far as it is known. `None` is unknown: it has no series, and is never zero.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Load {
    /// Requests that occupy a slot.
    pub active_slots: Option<u64>,
    /// Slots that the engine has.
    pub total_slots: Option<u64>,
    /// KV-cache blocks in use.
    pub active_blocks: Option<u64>,
    /// KV-cache blocks that the engine has.
    pub total_blocks: Option<u64>,
    /// Requests that wait for a slot.
    pub waiting: Option<u64>,
    /// Share of the KV cache in use, 0..1, as the engine reports it.
    pub cache_usage: Option<f64>,
    /// Hit rate of the engine's prefix cache, 0..1.
    pub prefix_hit_rate: Option<f64>,
    /// Speculative decoding, where the engine does it.
    pub spec_decode: Option<SpecDecode>,
}

impl Load {
    /// Share of the KV cache in use: as reported, else computed, where both counts are known.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "block counts are far below 2^53")]
    pub fn usage(&self) -> Option<f64> {
        let computed = || Some((self.active_blocks?, self.total_blocks.filter(|total| *total > 0)?));
        self.cache_usage.or_else(|| computed().map(|(active, total)| active as f64 / total as f64))
    }

    /// Whether it says nothing at all.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        *self == Self::default()
    }
}

/// Speculative decoding counts of an engine since its start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecDecode {
    /// Tokens that a draft proposes: a setting, not a count.
    pub spec_tokens: Option<u64>,
    /// The counts.
    pub counts: SpecDecodeCounts,
}

/// The cumulative part of [`SpecDecode`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecDecodeCounts {
    /// Drafts made.
    pub drafts: Option<u64>,
    /// Tokens drafted.
    pub draft_tokens: Option<u64>,
    /// Drafted tokens that were accepted.
    pub accepted_tokens: Option<u64>,
    /// Accepted tokens by their position in the draft, at most [`MAX_POSITIONS`].
    pub accepted_per_position: Vec<u64>,
}

/// Positions of a draft that are reported: engines draft a handful of tokens, and each position is a series a worker.
pub const MAX_POSITIONS: usize = 16;
