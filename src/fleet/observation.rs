//! What sources say, in the fleet's own words.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::hits::HitRate;
use super::{Adapter, Card, EndpointCounts, Estimate, Load, Pass, Rank, Routing, WorkerId, WorkerKey};

/// One thing that a source saw or heard.
#[derive(Debug, Clone, PartialEq)]
pub enum Observation {
    /// An endpoint of a living process answered a scrape.
    Answered(Answer),
    /// An endpoint that is watched said in its answer to a scrape what it counted.
    Served {
        /// Which endpoint of which worker.
        key: WorkerKey,
        /// The process that counted.
        process: Process,
        /// Since it started.
        counts: EndpointCounts,
    },
    /// A worker of a watched namespace answered a scrape, and is not one of those watched.
    Elsewhere {
        /// Its namespace.
        namespace: Arc<str>,
        /// Its id.
        worker: WorkerId,
    },
    /// A discovery voice found an entry, or found it changed.
    Registered(Registration),
    /// An entry that a discovery voice had found is gone.
    Deregistered(Registration),
    /// A worker said its load in an event.
    Load(LoadEvent),
    /// A router said what it believes of a worker.
    Estimated(EstimateEvent),
    /// A worker's engine made a pass.
    Passed(PassEvent),
    /// A numbered message that says nothing of a worker.
    Heard(Numbered),
    /// A channel's connection broke: what was heard over it is no longer known.
    ChannelLost(Channel),
    /// A KV router placed a request.
    HitRate {
        /// The message.
        message: Numbered,
        /// What it says.
        hit: HitRate,
    },
    /// A KV router told the others what became of its requests.
    Routed(RoutingEvent),
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
    /// What a source does not let the bridge do, all of it.
    Denied {
        /// The source.
        source: Source,
        /// For a person, such as "subscribe to a.b".
        actions: Vec<Arc<str>>,
    },
    /// A source that was only tried is not listened to.
    Abandoned(Source),
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
    /// Its Dynamo release: the service's version from 0.6 on.
    pub release: Option<Arc<str>>,
}

/// What a discovery voice says of one entry.
#[derive(Debug, Clone, PartialEq)]
pub struct Registration {
    /// The voice.
    pub source: Source,
    /// Whose entry.
    pub key: WorkerKey,
    /// What is registered.
    pub entry: Entry,
}

/// What a Dynamo process registers of itself.
#[derive(Debug, Clone, PartialEq)]
pub enum Entry {
    /// An instance of an endpoint: it is alive.
    Instance(Standing),
    /// The card of the model that it serves.
    Card(Card),
    /// A `LoRA` adapter that it has loaded.
    Adapter(Adapter),
}

/// How an instance stands with the voice that found it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Whether requests reach it. Only Kubernetes tells registered and ready apart.
    pub ready: bool,
    /// The pod that it runs in.
    pub pod: Option<Pod>,
}

impl Default for Standing {
    fn default() -> Self {
        Self { ready: true, pod: None }
    }
}

/// A Kubernetes pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: Arc<str>,
    /// Its Kubernetes namespace.
    pub namespace: Arc<str>,
}

/// The load of a rank, from an event.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadEvent {
    /// The message.
    pub message: Numbered,
    /// Namespace of the worker.
    pub namespace: Arc<str>,
    /// Whose worker it is, where the transport says so.
    pub scope: Option<Scope>,
    /// The worker.
    pub worker: WorkerId,
    /// The rank.
    pub rank: Rank,
    /// Its whole load, as far as events of its release say it.
    pub load: Load,
}

/// A router's estimate of the load of a rank, from an event.
#[derive(Debug, Clone, PartialEq)]
pub struct EstimateEvent {
    /// The message.
    pub message: Numbered,
    /// Namespace of the worker.
    pub namespace: Arc<str>,
    /// The worker.
    pub worker: WorkerId,
    /// The rank.
    pub rank: Rank,
    /// The estimate.
    pub estimate: Estimate,
}

/// A pass of a rank's engine, from an event.
#[derive(Debug, Clone, PartialEq)]
pub struct PassEvent {
    /// The message.
    pub message: Numbered,
    /// Namespace of the worker.
    pub namespace: Arc<str>,
    /// Whose worker it is, where the transport says so.
    pub scope: Option<Scope>,
    /// The worker.
    pub worker: WorkerId,
    /// The rank.
    pub rank: Rank,
    /// The pass.
    pub pass: Pass,
}

/// A router's book-keeping, from an event.
#[derive(Debug, Clone, PartialEq)]
pub struct RoutingEvent {
    /// The message.
    pub message: Numbered,
    /// Namespace of the router and its workers.
    pub namespace: Arc<str>,
    /// What became of which request, in order.
    pub steps: Vec<Routing>,
}

/// Component and endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Scope {
    /// The component.
    pub component: Arc<str>,
    /// The endpoint.
    pub endpoint: Arc<str>,
}

/// Where numbered messages come from: each channel counts on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Channel {
    /// The transport.
    pub source: Source,
    /// Dynamo's id of the publisher; a restarted publisher may keep it.
    pub publisher: u64,
    /// What it is about.
    pub topic: Topic,
}

/// One message of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numbered {
    /// The channel.
    pub channel: Channel,
    /// Its number, one more than that of the message before.
    pub sequence: u64,
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
    /// The server did not let the request out, or the answers in.
    Denied,
}

impl ScrapeOutcome {
    /// Whether the fleet was asked, whatever it answered.
    #[must_use]
    pub fn is_success(self) -> bool {
        !matches!(self, Self::Disconnected | Self::Denied)
    }

    /// For logs and spans.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::TimedOut => "timed_out",
            Self::NoResponders => "no_responders",
            Self::Disconnected => "disconnected",
            Self::Denied => "denied",
        }
    }
}

/// Where observations come from: the value of the label `source`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// A NATS server.
    Nats,
    /// Publishers of ZMQ events.
    Zmq,
    /// An etcd server.
    Etcd,
    /// A folder that stands in for etcd on a developer's machine.
    Files,
    /// A Kubernetes API server.
    Kubernetes,
}

impl Source {
    /// Every source.
    pub const ALL: [Self; 5] = [Self::Nats, Self::Zmq, Self::Etcd, Self::Files, Self::Kubernetes];

    /// The label's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nats => "nats",
            Self::Zmq => "zmq",
            Self::Etcd => "etcd",
            Self::Files => "files",
            Self::Kubernetes => "kubernetes",
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
    /// Load events.
    KvMetrics,
    /// Events of engines, one a pass.
    ForwardPassMetrics,
    /// Events of KV routers about their requests.
    ActiveSequences,
    /// Entries of discovery.
    Discovery,
}

impl Topic {
    /// Every topic.
    pub const ALL: [Self; 6] = [
        Self::Stats,
        Self::KvHitRate,
        Self::KvMetrics,
        Self::ForwardPassMetrics,
        Self::ActiveSequences,
        Self::Discovery,
    ];

    /// Those of events.
    pub const EVENTS: [Self; 4] = [Self::KvHitRate, Self::KvMetrics, Self::ForwardPassMetrics, Self::ActiveSequences];

    /// Those of events that may be listened to or not, on either transport.
    pub const NUMBERED: [Self; 3] = [Self::KvMetrics, Self::ForwardPassMetrics, Self::ActiveSequences];

    /// That one of them that Dynamo calls so.
    #[must_use]
    pub fn numbered(name: &str) -> Option<Self> {
        Self::NUMBERED.into_iter().find(|topic| topic.as_str() == name)
    }

    /// The label's value, Dynamo's own word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stats => "stats",
            Self::KvHitRate => "kv-hit-rate",
            Self::KvMetrics => "kv_metrics",
            Self::ForwardPassMetrics => "forward-pass-metrics",
            Self::ActiveSequences => "active_sequences_events",
            Self::Discovery => "discovery",
        }
    }

    /// The sources that carry it.
    #[must_use]
    pub fn sources(self) -> &'static [Source] {
        match self {
            Self::Stats | Self::KvHitRate => &[Source::Nats],
            Self::KvMetrics | Self::ForwardPassMetrics | Self::ActiveSequences => &[Source::Nats, Source::Zmq],
            Self::Discovery => &[Source::Etcd, Source::Files, Source::Kubernetes],
        }
    }
}

/// Why something from outside was not used: the value of the label `reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// Longer than any honest message.
    TooLarge,
    /// There, and may not be read.
    Unreadable,
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
    /// Of a service that does not say which component it is.
    NoInfo,
    /// More overlap than prompt.
    OverlapExceedsIsl,
    /// A router's blocks are not the worker's, or nothing shows that they are.
    OtherBlockSize,
    /// The same process answered one scrape twice.
    DuplicateReply,
    /// A second living process claims the worker id, or a worker of another namespace the labels.
    DuplicateWorker,
    /// Beyond the configured number of workers.
    TooManyWorkers,
    /// Beyond the number of component / endpoint pairs.
    TooManyGroups,
    /// Beyond the entries that one discovery voice, or one message, may have, or the routers' estimates that are kept.
    TooManyEntries,
    /// Beyond the ranks that are reported of one worker, or of all.
    TooManyRanks,
    /// A rank that the worker's card does not have.
    UnknownRank,
    /// Another version than is known here.
    UnknownVersion,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 18] = [
        Self::TooLarge,
        Self::Unreadable,
        Self::Malformed,
        Self::Truncated,
        Self::WrongShape,
        Self::OutOfRange,
        Self::BadSubject,
        Self::NoInfo,
        Self::OverlapExceedsIsl,
        Self::OtherBlockSize,
        Self::DuplicateReply,
        Self::DuplicateWorker,
        Self::TooManyWorkers,
        Self::TooManyGroups,
        Self::TooManyEntries,
        Self::TooManyRanks,
        Self::UnknownRank,
        Self::UnknownVersion,
    ];

    /// The label's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TooLarge => "too_large",
            Self::Unreadable => "unreadable",
            Self::Malformed => "malformed",
            Self::Truncated => "truncated",
            Self::WrongShape => "wrong_shape",
            Self::OutOfRange => "out_of_range",
            Self::BadSubject => "bad_subject",
            Self::NoInfo => "no_info",
            Self::OverlapExceedsIsl => "overlap_exceeds_isl",
            Self::OtherBlockSize => "other_block_size",
            Self::DuplicateReply => "duplicate_reply",
            Self::DuplicateWorker => "duplicate_worker",
            Self::TooManyWorkers => "too_many_workers",
            Self::TooManyGroups => "too_many_groups",
            Self::TooManyEntries => "too_many_entries",
            Self::TooManyRanks => "too_many_ranks",
            Self::UnknownRank => "unknown_rank",
            Self::UnknownVersion => "unknown_version",
        }
    }

    /// Whether a message of `topic` can be rejected for it: such pairs are exported from the start with zero.
    #[must_use]
    pub fn applies_to(self, topic: Topic) -> bool {
        match self {
            Self::TooLarge | Self::Malformed | Self::Truncated | Self::WrongShape | Self::OutOfRange => true,
            Self::OverlapExceedsIsl => matches!(topic, Topic::KvHitRate | Topic::ActiveSequences),
            Self::OtherBlockSize => topic == Topic::ActiveSequences,
            Self::BadSubject | Self::NoInfo | Self::DuplicateReply => topic == Topic::Stats,
            Self::DuplicateWorker => matches!(topic, Topic::Stats | Topic::Discovery),
            // Of events those that may show a candidate to be a worker.
            Self::TooManyWorkers | Self::TooManyGroups | Self::TooManyRanks => {
                matches!(topic, Topic::Stats | Topic::Discovery | Topic::KvMetrics | Topic::ForwardPassMetrics)
            }
            Self::TooManyEntries => topic == Topic::Discovery || Topic::NUMBERED.contains(&topic),
            Self::UnknownRank => matches!(topic, Topic::Stats | Topic::KvMetrics | Topic::ForwardPassMetrics),
            Self::Unreadable => topic == Topic::Discovery,
            Self::UnknownVersion => Topic::NUMBERED.contains(&topic),
        }
    }
}

/// Something from outside that was not used. It costs itself alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// Where it came from.
    pub source: Source,
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
