//! What sources say, in the fleet's own words.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::hits::HitRate;
use super::{Load, Rank, WorkerKey};

/// One thing that a source saw or heard.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "the large one is the one that comes by the thousand")]
pub enum Observation {
    /// An endpoint of a living process answered a scrape.
    Answered(Answer),
    /// A KV router placed a request.
    HitRate(HitRate),
    /// Bytes from outside could not be used.
    Rejected(Rejection),
    /// Messages were lost before they could be read.
    Lost(Lost),
    /// A scrape ended.
    Scraped(Scrape),
    /// The connection to a source was made or lost.
    Connection {
        /// The source.
        source: Source,
        /// Whether it is connected now.
        connected: bool,
    },
}

/// A worker's answer to a scrape.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Whose answer.
    pub key: WorkerKey,
    /// The process that gave it.
    pub process: Process,
    /// Its load, if it said any.
    pub report: Option<Report>,
}

/// The load of one rank, whole.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The rank.
    pub rank: Rank,
    /// Its load.
    pub load: Load,
}

/// One run of a worker's program: a NATS micro service instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Unique for each run.
    pub instance: Arc<str>,
    /// When it started, by its own clock, if it said so readably.
    pub started: Option<SystemTime>,
}

impl Process {
    /// Later processes are greater; two of one age are told apart by their instance, so that the order is total.
    pub(super) fn order(&self) -> (Option<SystemTime>, &str) {
        (self.started, &self.instance)
    }
}

/// The end of a scrape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scrape {
    /// How it ended.
    pub outcome: ScrapeOutcome,
    /// Replies received, unusable ones included.
    pub replies: u64,
    /// From the request to the end.
    pub took: Duration,
    /// The end, by the wall clock.
    pub at: SystemTime,
}

/// How a scrape ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScrapeOutcome {
    /// Every worker of the last scrape answered.
    Complete,
    /// The timeout ended it: a worker of the last scrape did not answer in time, or none was known before.
    TimedOut,
    /// The server said that nobody listens.
    NoResponders,
    /// The request could not be sent.
    Disconnected,
}

impl ScrapeOutcome {
    /// Whether the fleet was asked, whatever it answered.
    #[must_use]
    pub fn is_success(self) -> bool {
        self != Self::Disconnected
    }

    /// For logs and spans.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::TimedOut => "timed_out",
            Self::NoResponders => "no_responders",
            Self::Disconnected => "disconnected",
        }
    }
}

/// Where observations come from: the value of the label `source`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// A NATS server.
    Nats,
}

impl Source {
    /// Every source.
    pub const ALL: [Self; 1] = [Self::Nats];

    /// The label's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nats => "nats",
        }
    }
}

/// What a message was about: the value of the label `topic`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Topic {
    /// Replies to a scrape.
    Stats,
    /// Events of KV routers.
    KvHitRate,
}

impl Topic {
    /// Every topic.
    pub const ALL: [Self; 2] = [Self::Stats, Self::KvHitRate];

    /// The label's value, Dynamo's own word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stats => "stats",
            Self::KvHitRate => "kv-hit-rate",
        }
    }

    /// The source that carries it.
    #[must_use]
    pub fn source(self) -> Source {
        match self {
            Self::Stats | Self::KvHitRate => Source::Nats,
        }
    }
}

/// Why something from outside was not used: the value of the label `reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// Longer than any honest message.
    TooLarge,
    /// Not the encoding that its topic has.
    Malformed,
    /// Ended in the middle.
    Truncated,
    /// Well encoded, but another type than expected in some place.
    WrongShape,
    /// A number that its quantity cannot have.
    OutOfRange,
    /// A subject without a readable worker id.
    BadSubject,
    /// More overlap than prompt.
    OverlapExceedsIsl,
    /// The same process answered one scrape twice.
    DuplicateReply,
    /// A second living process claims the worker id.
    DuplicateWorker,
    /// Beyond the configured number of workers.
    TooManyWorkers,
    /// Beyond the number of component / endpoint pairs.
    TooManyGroups,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 11] = [
        Self::TooLarge,
        Self::Malformed,
        Self::Truncated,
        Self::WrongShape,
        Self::OutOfRange,
        Self::BadSubject,
        Self::OverlapExceedsIsl,
        Self::DuplicateReply,
        Self::DuplicateWorker,
        Self::TooManyWorkers,
        Self::TooManyGroups,
    ];

    /// The label's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TooLarge => "too_large",
            Self::Malformed => "malformed",
            Self::Truncated => "truncated",
            Self::WrongShape => "wrong_shape",
            Self::OutOfRange => "out_of_range",
            Self::BadSubject => "bad_subject",
            Self::OverlapExceedsIsl => "overlap_exceeds_isl",
            Self::DuplicateReply => "duplicate_reply",
            Self::DuplicateWorker => "duplicate_worker",
            Self::TooManyWorkers => "too_many_workers",
            Self::TooManyGroups => "too_many_groups",
        }
    }

    /// Whether a message of `topic` can be rejected for it: such pairs are exported from the start with zero.
    #[must_use]
    pub fn applies_to(self, topic: Topic) -> bool {
        match self {
            Self::TooLarge | Self::Malformed | Self::Truncated | Self::WrongShape | Self::OutOfRange => true,
            Self::OverlapExceedsIsl => topic == Topic::KvHitRate,
            Self::BadSubject
            | Self::DuplicateReply
            | Self::DuplicateWorker
            | Self::TooManyWorkers
            | Self::TooManyGroups => topic == Topic::Stats,
        }
    }
}

/// Something from outside that was not used. It costs itself alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// What it was about.
    pub topic: Topic,
    /// Why.
    pub reason: Reason,
    /// For a person: which message, which field.
    pub detail: String,
}

/// Messages that the client gave up because the bridge read too slowly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost {
    /// Where they came from.
    pub source: Source,
    /// How many at least.
    pub messages: u64,
}
