//! The scrape: ask every worker for its STATS, and gather what comes back.
//!
//! One message to `$SRV.STATS` reaches every NATS micro service of the account, and each replies to the inbox named in
//! it. There is no end mark. A scrape ends when every instance that answered the last one has answered again and
//! [`QUIET`] has passed since the last reply, at the latest at its timeout. The inbox lives on between scrapes: a reply
//! that comes after the end is folded all the same, and its sender is waited for the next time.
//!
//! A reply names its service, but the way back from there to namespace and component is ambiguous. So an instance that
//! is seen for the first time is asked for its INFO, once, and its reply waits for that.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_nats::connection::State;
use async_nats::{Message, StatusCode, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt;
use serde_json::value::RawValue;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{Span, field, info_span, trace};

use super::permissions::{Action, STATS};
use super::{Connection, NatsError, RETRY_DENIED};
use crate::config::Config;
use crate::fleet::{
    Answer, Observation, Reason, Rejection, Report, Scrape, ScrapeOutcome, Source, Topic, WorkerId, WorkerKey,
};
use crate::target::{self, LOAD_ENDPOINT, Place, Target};
use crate::wire::{self, Malformed, Reply};

/// After the last expected reply, a new worker's may follow within this.
const QUIET: Duration = Duration::from_millis(20);
/// Scrapes for which an instance that no longer replies keeps its place in the directory.
const DIRECTORY_MEMORY: u64 = 60;
/// Services other than watched workers reply too; beyond this many instances for each worker allowed, new ones are
/// rejected.
const INSTANCES_PER_WORKER: usize = 4;
/// Replies that wait for their instance's INFO take at most this: those of 10,000 workers that are all new.
const MAX_UNPLACED_BYTES: usize = 64 * 1024 * 1024;

/// Asks, gathers and tells, until its client ends.
pub(super) struct Scraper {
    connection: Connection,
    target: Target,
    /// Whether what endpoints count is told.
    endpoint_stats: bool,
    observations: mpsc::Sender<Observation>,
    replies: Subscriber,
    inbox: String,
    /// When it was last subscribed to the inbox.
    subscribed: Instant,
    interval: Duration,
    timeout: Duration,
    directory: Directory,
    /// Instances of watched workers that answered the last scrape.
    expected: HashSet<Arc<str>>,
    number: u64,
    round: Option<Round>,
    /// When the round before began.
    asked_before: Instant,
}

/// One scrape under way.
struct Round {
    span: Span,
    started: Instant,
    last_reply: Instant,
    replies: u64,
    /// Every instance that replied to this request.
    replied: HashSet<Arc<str>>,
    /// Those of them that are watched workers, and those whose late reply to an earlier request came meanwhile.
    answered: HashSet<Arc<str>>,
    /// The replies of instances whose INFO is still to come.
    unplaced: HashMap<Arc<str>, Bytes>,
    unplaced_bytes: usize,
}

/// What a message to the inbox replies to.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Stats { number: u64 },
    Info,
}

impl Scraper {
    pub(super) async fn subscribe(
        connection: Connection,
        config: &Config,
        observations: mpsc::Sender<Observation>,
    ) -> Result<Self, NatsError> {
        let inbox = connection.client.new_inbox();
        let (subscribed, replies) = (Instant::now(), answers(&connection, &inbox).await?);
        let rules = config.rules();
        Ok(Self {
            connection,
            directory: Directory::new(rules.max_workers * INSTANCES_PER_WORKER),
            target: rules.target,
            endpoint_stats: config.scrape.endpoint_stats,
            observations,
            replies,
            inbox,
            subscribed,
            interval: config.scrape.poll_interval,
            timeout: config.scrape_timeout(),
            expected: HashSet::new(),
            number: 0,
            round: None,
            asked_before: subscribed,
        })
    }

    /// Runs until the client ends, or quietly until nobody folds any more.
    pub(super) async fn run(mut self) -> Result<(), NatsError> {
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !self.observations.is_closed() {
            let end = self.round.as_ref().map(|round| round.end(&self.expected, self.timeout));
            tokio::select! {
                message = self.replies.next() => match message {
                    Some(message) => self.hear(message).await,
                    None => return Err(NatsError::Ended),
                },
                (outcome, ()) = at(end), if end.is_some() => self.finish(outcome).await,
                _ = ticks.tick(), if self.round.is_none() => self.ask().await?,
            }
        }
        Ok(())
    }

    async fn ask(&mut self) -> Result<(), NatsError> {
        self.number += 1;
        self.round = Some(Round::new());
        // A request made now would be buffered, and answered when nobody waits for it.
        if self.connection.client.connection_state() != State::Connected {
            self.finish(ScrapeOutcome::Disconnected).await;
            return Ok(());
        }
        // A server whose permissions were changed lets the connection be.
        if self.connection.watch.denies(&Action::hear_answers()) && self.subscribed.elapsed() >= RETRY_DENIED {
            self.subscribed = Instant::now();
            self.replies = answers(&self.connection, &self.inbox).await?;
        }
        let reply_to = format!("{}.{}", self.inbox, Asked::Stats { number: self.number }.token());
        if !self.publish(STATS.to_owned(), reply_to).await {
            self.finish(ScrapeOutcome::Disconnected).await;
        }
        Ok(())
    }

    /// Whether the request went out. It waits while the connection's buffer is full, but not longer than a scrape may.
    async fn publish(&self, subject: String, reply_to: String) -> bool {
        let publish = self.connection.client.publish_with_reply(subject, reply_to, Bytes::new());
        tokio::time::timeout(self.timeout, publish).await.is_ok_and(|sent| sent.is_ok())
    }

    async fn hear(&mut self, message: Message) {
        let asked = message.subject.rsplit_once('.').and_then(|(_, token)| Asked::parse(token));
        match asked {
            Some(Asked::Stats { number }) if message.status == Some(StatusCode::NO_RESPONDERS) => {
                if number == self.number && self.round.as_ref().is_some_and(|round| round.replies == 0) {
                    self.finish(ScrapeOutcome::NoResponders).await;
                }
            }
            Some(Asked::Stats { number }) => self.stats(number, message.payload).await,
            Some(Asked::Info) if message.status.is_none() => self.info(&message.payload).await,
            // The instance left between its reply and our question, or somebody writes to a foreign inbox.
            Some(Asked::Info) | None => {}
        }
    }

    async fn stats(&mut self, number: u64, payload: Bytes) {
        if let Some(round) = &mut self.round {
            round.replies += 1;
            round.last_reply = Instant::now();
        }
        let reply = match wire::decode_stats(&payload) {
            Ok(reply) => reply,
            Err(error) => return self.reject(rejection(&error, "")).await,
        };
        let instance = Arc::clone(&reply.process.instance);
        let repeated = number == self.number
            && self.round.as_mut().is_some_and(|round| !round.replied.insert(Arc::clone(&instance)));
        if repeated {
            return self.reject(of_service(&reply, Reason::DuplicateReply, "it answered twice")).await;
        }
        match self.directory.find(&instance, self.number) {
            Found::Place(place) => self.answer(&reply, &place).await,
            Found::Elsewhere => {}
            Found::Full => self.reject(of_service(&reply, Reason::TooManyWorkers, "too many services")).await,
            Found::Unknown => {
                let info = format!("$SRV.INFO.{}.{instance}", reply.service);
                if let Some(round) = &mut self.round {
                    round.hold(instance, &payload);
                }
                let reply_to = format!("{}.{}", self.inbox, Asked::Info.token());
                self.publish(info, reply_to).await;
            }
        }
    }

    /// Writes down where an instance belongs, and folds the reply that waited for it.
    async fn info(&mut self, payload: &[u8]) {
        let info = match wire::decode_info(payload) {
            Ok(info) => info,
            Err(error) => return self.reject(rejection(&error, "")).await,
        };
        self.connection.watch.tried(&Action::ask_where(), std::time::Instant::now());
        let place = self.target.place(&info.service, &info.description).map(Arc::new);
        trace!(?info, ?place, "a service was asked where it belongs");
        self.directory.write(Arc::clone(&info.instance), place.clone(), self.number);
        let Some(round) = &mut self.round else { return };
        round.last_reply = Instant::now();
        let waiting = round.unplaced.remove(&info.instance);
        let (Some(payload), Some(place)) = (waiting, place) else {
            return;
        };
        if let Ok(reply) = wire::decode_stats(&payload) {
            self.answer(&reply, &place).await;
        }
    }

    async fn answer(&mut self, reply: &Reply<'_>, place: &Place) {
        let observations = observations(reply, place, &self.target);
        let is_worker = observations.iter().any(|observation| matches!(observation, Observation::Answered(_)));
        if let Some(round) = self.round.as_mut().filter(|_| is_worker) {
            round.answered.insert(Arc::clone(&reply.process.instance));
        }
        let counted = if self.endpoint_stats { counted(reply, place, &self.target) } else { Vec::new() };
        for observation in observations.into_iter().chain(counted) {
            self.tell(observation).await;
        }
    }

    async fn finish(&mut self, outcome: ScrapeOutcome) {
        let unplaced = self.round.as_mut().map(|round| std::mem::take(&mut round.unplaced)).unwrap_or_default();
        for payload in unplaced.values() {
            let Ok(reply) = wire::decode_stats(payload) else {
                continue;
            };
            // An instance that does not tell its INFO is known by its service's name, where that suffices.
            if let Some(place) = self.target.place(&reply.service, "") {
                self.answer(&reply, &place).await;
            } else if self.directory.is_mute(&reply.process.instance, self.number) {
                self.reject(of_service(&reply, Reason::NoInfo, "it does not answer $SRV.INFO")).await;
            }
        }
        let Some(round) = self.round.take() else { return };
        let outcome = self.permitted(&round, outcome);
        self.asked_before = round.started;
        self.expected = round.answered;
        self.directory.forget(self.number);
        round.span.record("outcome", outcome.as_str());
        round.span.record("replies", attribute(round.replies));
        round.span.record("workers", attribute(self.expected.len()));
        let (replies, took) = (round.replies, round.started.elapsed());
        self.tell(Observation::Scraped(Scrape { outcome, replies, took, at: SystemTime::now() })).await;
    }

    /// The outcome, unless the server did not let the request out, or the answers in. Its complaint of what was asked has
    /// come by the end of the next scrape.
    fn permitted(&self, round: &Round, outcome: ScrapeOutcome) -> ScrapeOutcome {
        let heard = round.replies > 0 || outcome == ScrapeOutcome::NoResponders;
        let tried = match outcome {
            ScrapeOutcome::Disconnected | ScrapeOutcome::Denied => return outcome,
            _ if heard => [Instant::now(); 2],
            _ => [self.asked_before, self.subscribed],
        };
        let actions = [Action::ask(), Action::hear_answers()];
        for (action, tried) in actions.iter().zip(tried) {
            self.connection.watch.tried(action, tried.into_std());
        }
        let denied = actions.iter().any(|action| self.connection.watch.denies(action));
        if denied { ScrapeOutcome::Denied } else { outcome }
    }

    async fn reject(&self, rejection: Rejection) {
        self.tell(Observation::Rejected(rejection)).await;
    }

    async fn tell(&self, observation: Observation) {
        // Nobody folds any more once the bridge stops; `run` sees it.
        self.observations.send(observation).await.ok();
    }
}

/// Subscribes to whatever is sent to the inbox.
async fn answers(connection: &Connection, inbox: &str) -> Result<Subscriber, NatsError> {
    let subscriber = connection.client.subscribe(format!("{inbox}.*")).await;
    subscriber.map_err(|error| NatsError::Subscribe(error.to_string()))
}

impl Round {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            span: info_span!("scrape", outcome = field::Empty, replies = field::Empty, workers = field::Empty),
            started: now,
            last_reply: now,
            replies: 0,
            replied: HashSet::new(),
            answered: HashSet::new(),
            unplaced: HashMap::new(),
            unplaced_bytes: 0,
        }
    }

    /// Keeps a reply until its instance is placed. One that finds no room is asked again by the next scrape.
    fn hold(&mut self, instance: Arc<str>, payload: &Bytes) {
        if self.unplaced_bytes + payload.len() <= MAX_UNPLACED_BYTES {
            self.unplaced_bytes += payload.len();
            self.unplaced.insert(instance, payload.clone());
        }
    }

    /// When this scrape ends and how, unless something else is heard before.
    fn end(&self, expected: &HashSet<Arc<str>>, timeout: Duration) -> (Instant, ScrapeOutcome) {
        let timed_out = self.started + timeout;
        let quiet = self.last_reply + QUIET;
        let complete = !expected.is_empty() && expected.is_subset(&self.answered);
        if complete && quiet < timed_out {
            (quiet, ScrapeOutcome::Complete)
        } else {
            (timed_out, ScrapeOutcome::TimedOut)
        }
    }
}

/// A count in a span. Of integers OpenTelemetry has `i64` alone: tracing-opentelemetry makes text of any other.
fn attribute(count: impl TryInto<i64>) -> i64 {
    count.try_into().unwrap_or(i64::MAX)
}

/// Waits until the moment, and says what it was for.
async fn at<T>(moment: Option<(Instant, T)>) -> (T, ()) {
    match moment {
        Some((moment, what)) => (what, tokio::time::sleep_until(moment).await),
        None => std::future::pending().await,
    }
}

impl Asked {
    /// The last token of the inbox that the reply goes to.
    fn token(&self) -> String {
        match self {
            Self::Stats { number } => number.to_string(),
            Self::Info => "info".to_owned(),
        }
    }

    fn parse(token: &str) -> Option<Self> {
        if token == "info" { Some(Self::Info) } else { token.parse().ok().map(|number| Self::Stats { number }) }
    }
}

/// Where each service instance belongs, as far as it was asked.
struct Directory {
    places: HashMap<Arc<str>, Entry>,
    /// Those that were asked and have not answered, and the scrape that last asked them.
    asked: HashMap<Arc<str>, u64>,
    capacity: usize,
}

struct Entry {
    /// `None` for a service of no watched namespace.
    place: Option<Arc<Place>>,
    seen: u64,
}

enum Found {
    Place(Arc<Place>),
    Elsewhere,
    Unknown,
    Full,
}

impl Directory {
    fn new(capacity: usize) -> Self {
        Self { places: HashMap::new(), asked: HashMap::new(), capacity }
    }

    fn find(&mut self, instance: &str, number: u64) -> Found {
        let is_full = self.places.len() >= self.capacity;
        match self.places.get_mut(instance) {
            Some(entry) => {
                entry.seen = number;
                entry.place.clone().map_or(Found::Elsewhere, Found::Place)
            }
            None if is_full => Found::Full,
            None => Found::Unknown,
        }
    }

    fn write(&mut self, instance: Arc<str>, place: Option<Arc<Place>>, number: u64) {
        self.asked.remove(&instance);
        if self.places.len() < self.capacity {
            self.places.insert(instance, Entry { place, seen: number });
        }
    }

    /// Whether an instance that has not answered in this scrape was asked in an earlier one too.
    fn is_mute(&mut self, instance: &Arc<str>, number: u64) -> bool {
        if self.asked.len() >= self.capacity && !self.asked.contains_key(instance) {
            return false;
        }
        self.asked.insert(Arc::clone(instance), number).is_some()
    }

    fn forget(&mut self, number: u64) {
        self.asked.retain(|_, asked| *asked + DIRECTORY_MEMORY >= number);
        self.places.retain(|_, entry| entry.seen + DIRECTORY_MEMORY >= number);
    }
}

/// What a reply of a service at `place` says of its workers, endpoint by endpoint. A fault in one costs that one.
fn observations(reply: &Reply<'_>, place: &Place, target: &Target) -> Vec<Observation> {
    let mut observations = Vec::new();
    let mut workers: BTreeMap<WorkerId, BTreeMap<&str, Option<&RawValue>>> = BTreeMap::new();
    for endpoint in &reply.endpoints {
        if let Some((name, worker)) = target::parse_endpoint_subject(&reply.service, &endpoint.subject) {
            workers.entry(worker).or_default().insert(name, endpoint.data);
        } else {
            let detail = format!("no worker id in subject {:?}", endpoint.subject);
            observations.push(Observation::Rejected(Rejection {
                source: Source::Nats,
                topic: Topic::Stats,
                reason: Reason::BadSubject,
                detail,
            }));
        }
    }
    let (namespace, component) = (Arc::<str>::from(&*place.namespace), Arc::<str>::from(&*place.component));
    for (id, endpoints) in workers {
        if is_elsewhere(&component, &endpoints, target) {
            observations.push(Observation::Elsewhere { namespace: Arc::clone(&namespace), worker: id });
            continue;
        }
        let served = served_endpoint(&endpoints, target);
        for (endpoint, data) in &endpoints {
            let hidden = *endpoint == LOAD_ENDPOINT && target.endpoint.is_none() && served.is_some();
            if hidden || !target.watches(&component, endpoint) {
                continue;
            }
            let sibling = if served == Some(endpoint) { endpoints.get(LOAD_ENDPOINT).copied().flatten() } else { None };
            let report = read(*data, &mut observations).or_else(|| read(sibling, &mut observations));
            let key = WorkerKey {
                namespace: Arc::clone(&namespace),
                component: Arc::clone(&component),
                endpoint: Arc::from(*endpoint),
                id,
            };
            observations.push(Observation::Answered(Answer {
                key,
                process: reply.process.clone(),
                release: reply.release.clone(),
                report,
            }));
        }
    }
    observations
}

/// What every watched endpoint of a reply counts: helpers, and `load_metrics`, are endpoints too.
fn counted(reply: &Reply<'_>, place: &Place, target: &Target) -> Vec<Observation> {
    let (namespace, component) = (Arc::<str>::from(&*place.namespace), Arc::<str>::from(&*place.component));
    let counted = reply.endpoints.iter().filter_map(|endpoint| {
        let (name, id) = target::parse_endpoint_subject(&reply.service, &endpoint.subject)?;
        let told = target.watches(&component, name).then(|| endpoint.counts())?;
        let (namespace, component) = (Arc::clone(&namespace), Arc::clone(&component));
        let key = WorkerKey { namespace, component, endpoint: name.into(), id };
        let process = reply.process.clone();
        Some(told.map_or_else(
            |error| Observation::Rejected(rejection(&error, "")),
            |counts| Observation::Served { key, process, counts },
        ))
    });
    counted.collect()
}

/// Whether these endpoints of a worker are not watched. `load_metrics` alone does not say which endpoint is served.
fn is_elsewhere(component: &str, endpoints: &BTreeMap<&str, Option<&RawValue>>, target: &Target) -> bool {
    let is_watched = |endpoint: &&str| target.watches(component, endpoint);
    let is_told = |endpoint: &&str| *endpoint != LOAD_ENDPOINT || !target.watches_component(component);
    endpoints.keys().any(is_told) && !endpoints.keys().any(is_watched)
}

/// The endpoint that the numbers on `load_metrics` belong to: the one asked for, else `generate`, else the first.
fn served_endpoint<'a>(endpoints: &BTreeMap<&'a str, Option<&RawValue>>, target: &Target) -> Option<&'a str> {
    let siblings = || endpoints.keys().copied().filter(|endpoint| *endpoint != LOAD_ENDPOINT);
    let wanted = target.endpoint.as_deref().unwrap_or("generate");
    let first = || {
        if target.endpoint.is_none() { siblings().next() } else { None }
    };
    siblings().find(|endpoint| *endpoint == wanted).or_else(first)
}

fn read(data: Option<&RawValue>, observations: &mut Vec<Observation>) -> Option<Report> {
    match wire::decode_load(data?.get().as_bytes()) {
        Ok(report) => report,
        Err(error) => {
            observations.push(Observation::Rejected(rejection(&error, data?.get())));
            None
        }
    }
}

/// A whole reply that is not used.
fn of_service(reply: &Reply<'_>, reason: Reason, why: &str) -> Rejection {
    let detail = format!("service {} instance {}: {why}", reply.service, reply.process.instance);
    Rejection { source: Source::Nats, topic: Topic::Stats, reason, detail }
}

/// With the beginning of what was rejected, for the log.
fn rejection(error: &Malformed, bytes: &str) -> Rejection {
    let beginning: String = bytes.chars().take(120).collect();
    let detail = if beginning.is_empty() { error.to_string() } else { format!("{error} in {beginning}") };
    Rejection { source: Source::Nats, topic: Topic::Stats, reason: error.reason, detail }
}

#[cfg(test)]
mod tests;
