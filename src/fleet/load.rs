//! What one worker says of itself.

use super::bounds;

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
    /// Share of the KV cache in use, 0..1: as reported, else computed, where both counts are known. An engine that counts a
    /// little over has all of it in use; nothing is known of one that has far more in use than there is.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "block counts are far below 2^53")]
    pub fn usage(&self) -> Option<f64> {
        let computed = || Some((self.active_blocks?, self.total_blocks.filter(|total| *total > 0)?));
        let usage = self.cache_usage.or_else(|| computed().map(|(active, total)| active as f64 / total as f64));
        usage.and_then(bounds::share)
    }

    /// This load, and what it leaves open as `other` has it.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            active_slots: self.active_slots.or(other.active_slots),
            total_slots: self.total_slots.or(other.total_slots),
            active_blocks: self.active_blocks.or(other.active_blocks),
            total_blocks: self.total_blocks.or(other.total_blocks),
            waiting: self.waiting.or(other.waiting),
            cache_usage: self.cache_usage.or(other.cache_usage),
            prefix_hit_rate: self.prefix_hit_rate.or(other.prefix_hit_rate),
            spec_decode: self.spec_decode.or(other.spec_decode),
        }
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

impl SpecDecodeCounts {
    /// The counts of two engines together.
    pub(super) fn plus(&self, other: &Self) -> Self {
        let sum = |one: Option<u64>, other: Option<u64>| match (one, other) {
            (Some(one), Some(other)) => Some(one.saturating_add(other)),
            _ => one.or(other),
        };
        let positions = self.accepted_per_position.len().max(other.accepted_per_position.len());
        let at = |counts: &Self, position: usize| counts.accepted_per_position.get(position).copied();
        Self {
            drafts: sum(self.drafts, other.drafts),
            draft_tokens: sum(self.draft_tokens, other.draft_tokens),
            accepted_tokens: sum(self.accepted_tokens, other.accepted_tokens),
            accepted_per_position: (0..positions)
                .filter_map(|position| sum(at(self, position), at(other, position)))
                .collect(),
        }
    }
}

/// Positions of a draft that are reported: engines draft a handful of tokens, and each position is a series a worker.
pub const MAX_POSITIONS: usize = 16;
