//! One worker: which voices name it, and what is known of its load.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::bounds::{self, Refusal};
use super::card::{Adapter, AdapterId, BlockSizes, Card, Ranks};
use super::hits::Rival;
use super::observation::{Channel, Entry, Pod, Process, Reason, Report, Source, Standing};
use super::passes::{Pass, Passes};
use super::recount::{SpecDecodeRecounts, Voice};
use super::snapshot::WorkerState;
use super::{Load, MAX_RANKS, Rank};

/// What the voices together say of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    /// Alive, and requests reach it.
    Ready,
    /// Alive, and none reach it yet or any more.
    NotReady,
    /// It takes no more requests, and still computes those that it has.
    Draining,
    /// Nobody names it, or somebody who did has lost it.
    Gone,
}

/// When a voice counts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hearing<'a> {
    pub(super) now: Instant,
    pub(super) worker_ttl: Duration,
    pub(super) idle_ttl: Option<Duration>,
    /// The sources that are connected now; the others abstain.
    pub(super) connected: &'a BTreeSet<Source>,
}

/// What a worker has of what two may want: its labels, and its id.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) enum Claim {
    /// To be found out: it is new, or it was gone.
    #[default]
    Open,
    /// Both.
    Settled,
    /// Another living worker has one: its placements are not counted, and without the labels it has no series.
    Lost(Rival),
}

/// An instance of an endpoint that some voice names. A candidate, until it is welcomed as a worker.
#[derive(Debug, Default)]
pub(super) struct Worker {
    /// Whether it counts: it has reported, has an engine's card, or is the explicit target.
    pub(super) welcomed: bool,
    /// Its events named no place, and it was taken for the target's.
    pub(super) guessed: bool,
    pub(super) claim: Claim,
    /// Any load was heard since this process was discovered.
    pub(super) reported: bool,
    /// Its last answer to a scrape, and who gave it.
    answer: Option<(Instant, Process)>,
    pub(super) release: Option<Arc<str>>,
    /// Registered by these voices.
    instances: BTreeMap<Source, Standing>,
    /// Voices that had named it and lost it.
    lost: BTreeSet<Source>,
    cards: BTreeMap<Source, Card>,
    /// The ranks of its card for which there is room.
    listed: u32,
    adapters: BTreeMap<(Source, Arc<str>), Option<u64>>,
    adapter_sizes: Arc<HashMap<AdapterId, u64>>,
    stats: Option<Report>,
    events: BTreeMap<Rank, (Channel, Load)>,
    /// The last event.
    spoke: Option<Instant>,
    pub(super) passes: Passes,
    pub(super) spec_decode: SpecDecodeRecounts,
}

impl Worker {
    /// Takes an answer to a scrape: it states the whole load. Whether its counts could be.
    pub(super) fn answered(&mut self, process: Process, report: Option<Report>, now: Instant) -> bool {
        if self.process().is_some_and(|known| *known != process) {
            self.reported = false;
        }
        self.answer = Some((now, process));
        self.reported |= report.is_some();
        let could_be = match &report {
            Some(Report { rank, load: Load { spec_decode: Some(spec_decode), .. } }) => {
                self.spec_decode.see(*rank, Voice::Stats, &spec_decode.counts, now)
            }
            _ => true,
        };
        self.stats = report;
        could_be
    }

    /// Takes an entry of a discovery voice.
    pub(super) fn registered(&mut self, source: Source, entry: Entry) {
        match entry {
            Entry::Instance(standing) => {
                self.lost.remove(&source);
                self.instances.insert(source, standing);
            }
            Entry::Card(card) => {
                self.cards.insert(source, card);
            }
            Entry::Adapter(Adapter { name, block_size }) => {
                self.adapters.insert((source, name), block_size);
                self.measure_adapters();
            }
        }
    }

    pub(super) fn deregistered(&mut self, source: Source, entry: Entry) {
        match entry {
            Entry::Instance(_) if self.instances.remove(&source).is_some() => {
                self.lost.insert(source);
            }
            Entry::Instance(_) => {}
            Entry::Card(_) => {
                self.cards.remove(&source);
            }
            Entry::Adapter(Adapter { name, .. }) => {
                self.adapters.remove(&(source, name));
                self.measure_adapters();
            }
        }
    }

    /// Takes the load of a rank from an event. Whether its counts could be.
    pub(super) fn heard(&mut self, channel: Channel, rank: Rank, load: &Load, now: Instant) -> bool {
        self.reported = true;
        self.spoke = Some(now);
        let counted = self.stats.as_ref().is_some_and(|stats| stats.rank == rank && stats.load.spec_decode.is_some());
        let counts = load.spec_decode.as_ref().filter(|_| !counted).map(|spec_decode| &spec_decode.counts);
        self.events.insert(rank, (channel, load.clone()));
        counts.is_none_or(|counts| self.spec_decode.see(rank, Voice::Events, counts, now))
    }

    /// Takes a pass of a rank from an event.
    pub(super) fn passed(&mut self, channel: Channel, rank: Rank, pass: Pass, now: Instant) {
        self.passes.take(channel, rank, pass, now);
        self.reported = true;
        self.spoke = Some(now);
    }

    /// Takes the passes that were heard before it was known.
    pub(super) fn caught_up(&mut self, passes: Passes, now: Instant) {
        if passes.ranks().next().is_some() {
            (self.reported, self.spoke, self.passes) = (true, Some(now), passes);
        }
    }

    /// What came over that channel is no longer known.
    pub(super) fn forget(&mut self, channel: Channel) {
        self.events.retain(|_, (heard_over, _)| *heard_over != channel);
        self.passes.forget(channel);
    }

    pub(super) fn process(&self) -> Option<&Process> {
        self.answer.as_ref().map(|(_, process)| process)
    }

    /// How long ago it answered a scrape, if ever.
    fn silent_for(&self, now: Instant) -> Option<Duration> {
        self.answer.as_ref().map(|(at, _)| now.saturating_duration_since(*at))
    }

    pub(super) fn answers(&self, hearing: Hearing<'_>) -> bool {
        self.silent_for(hearing.now).is_some_and(|silent| silent < hearing.worker_ttl)
    }

    /// Whether no voice ever named it.
    pub(super) fn is_kept_by_events(&self) -> bool {
        self.answer.is_none() && self.instances.is_empty() && self.lost.is_empty() && self.cards.is_empty()
    }

    /// Whether it is the target's by its events alone, which name no place.
    pub(super) fn is_guessed(&self) -> bool {
        self.guessed && self.is_kept_by_events()
    }

    fn speaks(&self, hearing: Hearing<'_>) -> bool {
        let spoke = self.spoke.filter(|_| self.is_kept_by_events()).zip(hearing.idle_ttl);
        spoke.is_some_and(|(at, idle_ttl)| hearing.now.saturating_duration_since(at) < idle_ttl)
    }

    pub(super) fn has_card(&self) -> bool {
        !self.cards.is_empty()
    }

    /// Whether a card says so.
    pub(super) fn is_an_engine(&self) -> bool {
        self.cards.values().any(Card::is_of_an_engine)
    }

    /// A connected voice that named the worker and lost it wins; one that is not connected abstains.
    pub(super) fn presence(&self, hearing: Hearing<'_>) -> Presence {
        let answers = self.answers(hearing);
        let no_answer = self.answer.is_some() && !answers && hearing.connected.contains(&Source::Nats);
        let deregistered = self.lost.iter().any(|source| hearing.connected.contains(source));
        if self.speaks(hearing) {
            return Presence::Ready;
        }
        if self.instances.is_empty() && self.has_card() && deregistered {
            return Presence::Draining;
        }
        if no_answer || deregistered || (!answers && self.instances.is_empty()) {
            return Presence::Gone;
        }
        if self.instances.values().all(|standing| standing.ready) { Presence::Ready } else { Presence::NotReady }
    }

    /// Nothing names it any more: it need not be remembered.
    pub(super) fn is_forgotten(&self, hearing: Hearing<'_>) -> bool {
        self.instances.is_empty() && self.cards.is_empty() && !self.answers(hearing) && !self.speaks(hearing)
    }

    pub(super) fn state(&self, presence: Presence) -> WorkerState {
        match presence {
            Presence::Draining => WorkerState::Draining,
            Presence::NotReady => WorkerState::NotReady,
            Presence::Ready | Presence::Gone if self.reported => WorkerState::Reporting,
            Presence::Ready | Presence::Gone => WorkerState::Silent,
        }
    }

    /// Its ranks, where its card tells which they are.
    fn told_ranks(&self) -> Option<Ranks> {
        self.card().map(|card| card.ranks).filter(|ranks| ranks.first.is_some())
    }

    /// Whether it has that rank, as far as its card tells.
    pub(super) fn has(&self, rank: Rank) -> bool {
        self.told_ranks().is_none_or(|ranks| ranks.place(rank).is_some_and(|place| place < self.listed))
    }

    /// Whether a rank is its own, and there is room for it: `more_room` where there is some for ranks that are new.
    pub(super) fn admits(&self, rank: Rank, more_room: bool) -> Result<(), Refusal> {
        let is_known = || self.events.contains_key(&rank) || self.passes.has(rank);
        let reason = match self.told_ranks() {
            _ if !bounds::is_rank(rank.0) => Reason::OutOfRange,
            Some(ranks) if ranks.place(rank).is_none() => Reason::UnknownRank,
            Some(_) if self.has(rank) => return Ok(()),
            None if is_known() || (more_room && self.rank_count() < MAX_RANKS as usize) => return Ok(()),
            _ => Reason::TooManyRanks,
        };
        Err((reason, format!("rank {}", rank.0)))
    }

    /// Finds room for the ranks of its card, of so many; how many of them had none. What other ranks said is over.
    pub(super) fn list_ranks(&mut self, room: usize) -> u32 {
        let count = self.card().map_or(0, |card| card.ranks.count);
        self.listed = count.min(MAX_RANKS).min(u32::try_from(room).unwrap_or(u32::MAX).max(1));
        let gone: BTreeSet<_> = self.spoken_ranks().filter(|rank| !self.has(*rank)).collect();
        self.events.retain(|rank, _| !gone.contains(rank));
        self.passes.keep(|rank| !gone.contains(&rank));
        self.stats.take_if(|stats| gone.contains(&stats.rank));
        count - self.listed
    }

    /// Whether there was no room for some of the ranks of its card.
    pub(super) fn lacks_room(&self) -> bool {
        self.card().is_some_and(|card| card.ranks.count.min(MAX_RANKS) > self.listed)
    }

    fn spoken_ranks(&self) -> impl Iterator<Item = Rank> {
        let stats = self.stats.iter().map(|stats| stats.rank);
        stats.chain(self.events.keys().copied()).chain(self.passes.ranks().map(|(rank, ..)| rank))
    }

    /// The ranks for which it needs room.
    pub(super) fn rank_count(&self) -> usize {
        self.events.len().max(self.passes.len()).max(self.listed as usize)
    }

    /// Whether another worker has the labels of its series.
    pub(super) fn is_hidden(&self) -> bool {
        matches!(self.claim, Claim::Lost(Rival::Labels(_)))
    }

    /// A source that names it.
    pub(super) fn named_by(&self) -> Source {
        self.instances.keys().chain(self.cards.keys()).next().copied().unwrap_or(Source::Nats)
    }

    /// The first voice's card.
    pub(super) fn card(&self) -> Option<&Card> {
        self.cards.values().next()
    }

    /// Where it runs, if a voice says so.
    pub(super) fn pod(&self) -> Option<&Pod> {
        self.instances.values().find_map(|standing| standing.pod.as_ref())
    }

    /// Adapters by name, however many voices name them.
    pub(super) fn adapters(&self) -> usize {
        self.adapters.keys().map(|(_, name)| name).collect::<BTreeSet<_>>().len()
    }

    fn measure_adapters(&mut self) {
        let known = self.adapters.iter().filter_map(|((_, name), size)| Some((AdapterId::of(name), (*size)?)));
        self.adapter_sizes = Arc::new(known.collect());
    }

    /// Tokens a block, of the model and of its adapters.
    pub(super) fn block_sizes(&self) -> BlockSizes {
        let base = self.card().and_then(|card| card.block_size);
        BlockSizes { base, adapters: Arc::clone(&self.adapter_sizes) }
    }

    /// Every rank that it has or has spoken of, with what is known of each: from its answer, else from its events (0.4 and
    /// 0.5 say the same in both, and the answer is never missed), else from its last pass, and its limits else from its card.
    pub(super) fn ranks(&self) -> BTreeMap<Rank, Load> {
        let mut ranks: BTreeMap<Rank, Load> =
            self.events.iter().map(|(rank, (_, load))| (*rank, load.clone())).collect();
        if let Some(Report { rank, load }) = &self.stats {
            let event = ranks.remove(rank).unwrap_or_default();
            ranks.insert(*rank, load.clone().or(event));
        }
        for (rank, pass) in self.passes.ranks().filter_map(|(rank, last, _)| Some((rank, last?))) {
            let load = ranks.entry(rank).or_default();
            load.active_slots = load.active_slots.or(Some(pass.scheduled.requests()));
            load.waiting = load.waiting.or(Some(pass.queued.requests()));
        }
        let first = self.card().and_then(|card| card.ranks.first).unwrap_or_default();
        for rank in first..first.saturating_add(self.listed) {
            ranks.entry(Rank(rank)).or_default();
        }
        for load in ranks.values_mut() {
            self.judge(load);
        }
        ranks
    }

    /// All its ranks, those included for which there is no room.
    pub(super) fn all_ranks(&self, shown: usize) -> u64 {
        let told = self.card().map_or(1, |card| u64::from(card.ranks.count));
        told.max(shown as u64)
    }

    /// Gives a load the limits that it lacks, and takes out what is impossible by itself or with them; says what that was.
    pub(super) fn judge(&self, load: &mut Load) -> Option<Refusal> {
        let limits = self.card().map(|card| card.limits).unwrap_or_default();
        let impossible = bounds::judge_load(load);
        load.total_blocks = load.total_blocks.or(limits.blocks);
        load.total_slots = load.total_slots.or(limits.slots);
        impossible.or(bounds::judge_load(load))
    }

    /// Whether the rank is told: it is not 0, or one of several.
    pub(super) fn is_labelled(&self, rank: Rank) -> bool {
        rank != Rank(0) || self.card().is_some_and(|card| card.ranks.count > 1)
    }
}
