//! What discovery says, whichever voice says it: the entries of etcd, of a folder or of Kubernetes resources are the same
//! key paths and JSON values.
//!
//! A voice lists its entries and watches them; the registry compares each with what it knows, and tells the fleet of
//! instances and cards, and the event sources of channels. Telling the same twice changes nothing.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio::sync::mpsc;

use super::owners::Owners;
use crate::causes::one_line;
use crate::fleet::{
    Entry, Observation, Reason, Registration, Rejection, Scope, Source, Standing, Topic, WorkerId, WorkerKey,
};
use crate::target::NamespaceFilter;
use crate::wire::{self, EventChannel, Registered};

/// Entries of one voice at most; those beyond are rejected. A worker has some five: instance, helpers, card, channels.
const MAX_ENTRIES: usize = 200_000;

/// A change of the channels that events come over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ChannelChange {
    /// A publisher is there, as this voice says. Two voices may both say so; each closes it for itself.
    Opened(Source, Arc<EventChannel>),
    /// A voice that said so no longer does.
    Closed(Arc<EventChannel>),
}

/// The entries of one voice.
pub(crate) struct Registry {
    source: Source,
    namespace: NamespaceFilter,
    owners: Owners,
    known: HashMap<String, Known>,
    book_keeping: BookKeeping,
    observations: mpsc::Sender<Observation>,
    channels: mpsc::Sender<ChannelChange>,
}

struct Known {
    value: Vec<u8>,
    standing: Standing,
    owner: Option<WorkerId>,
    /// `None` where the value says nothing of a watched namespace, or was rejected: to be looked at once, not again.
    registered: Option<Registered>,
}

impl Registry {
    pub(crate) fn new(
        source: Source,
        namespace: NamespaceFilter,
        owners: Owners,
        observations: mpsc::Sender<Observation>,
        channels: mpsc::Sender<ChannelChange>,
    ) -> Self {
        let (known, book_keeping) = (HashMap::new(), BookKeeping::default());
        Self { source, namespace, owners, known, book_keeping, observations, channels }
    }

    /// An entry is there, or is there still. `id` tells it from the voice's others, `path` is its key path in etcd's
    /// layout, `owner` the id that the process which registered it has as a worker, where the voice tells.
    pub(crate) async fn put(
        &mut self,
        id: &str,
        path: &str,
        value: &[u8],
        standing: Standing,
        owner: Option<WorkerId>,
    ) {
        let unchanged = |known: &Known| known.value == value && known.standing == standing && known.owner == owner;
        match self.known.get(id) {
            Some(known) if unchanged(known) => return,
            None if self.known.len() >= MAX_ENTRIES => return self.reject(Reason::TooManyEntries, path, "").await,
            _ => {}
        }
        let registered = match wire::decode_registration(path, value) {
            Ok(registered) => registered.filter(|registered| self.namespace.matches(registered.namespace())),
            Err(error) => {
                self.reject(error.reason, path, &error.to_string()).await;
                None
            }
        };
        let new = Known { value: value.to_vec(), standing, owner, registered };
        let told = new.registered.clone().map(|registered| (registered, new.standing.clone()));
        let old = self.known.insert(id.to_owned(), new).and_then(|known| Some((known.registered?, known.owner)));
        let is_channel = |registered: &Registered| matches!(registered, Registered::Channel(_));
        let again = old
            .as_ref()
            .zip(told.as_ref())
            .is_some_and(|((old, before), (new, _))| new.replaces(old) && (*before == owner || !is_channel(new)));
        // What the entry said before is taken back, unless it still says it of the same worker or publisher.
        if let Some((old, owner)) = old.filter(|_| !again) {
            self.take_back(old, owner).await;
        }
        // A channel has no standing: one that was told is open.
        if let Some((registered, standing)) = told.filter(|(registered, _)| !(again && is_channel(registered))) {
            self.tell(registered, standing, owner).await;
        }
    }

    /// An entry is gone.
    pub(crate) async fn remove(&mut self, id: &str) {
        if let Some(Known { registered: Some(registered), owner, .. }) = self.known.remove(id) {
            self.take_back(registered, owner).await;
        }
    }

    /// After a complete list: every entry that was not in it is gone.
    pub(crate) async fn keep_only(&mut self, keep: &HashSet<String>) {
        let gone = self.known.keys().filter(|id| !keep.contains(*id)).cloned().collect();
        self.remove_all(gone).await;
    }

    /// Entries are gone together: cards before instances, as a worker whose card outlives its instance is draining, and
    /// channels last, each of which waits for its last word.
    pub(crate) async fn remove_all(&mut self, mut ids: Vec<String>) {
        ids.sort_by_cached_key(|id| match self.known.get(id).and_then(|known| known.registered.as_ref()) {
            Some(Registered::Card(..) | Registered::Adapter(..)) => 0,
            Some(Registered::Instance(_)) | None => 1,
            Some(Registered::Channel(_)) => 2,
        });
        for id in ids {
            self.remove(&id).await;
        }
    }

    /// Whether the voice is heard now.
    pub(crate) async fn connected(&mut self, connected: bool) {
        self.observe(Observation::Connection { source: self.source, connected }).await;
    }

    async fn tell(&mut self, registered: Registered, standing: Standing, owner: Option<WorkerId>) {
        if let Registered::Card(key, _) = &registered {
            for channel in self.book_keeping.serves(key) {
                self.change(ChannelChange::Closed(channel)).await;
            }
        }
        if let Registered::Channel(channel) = &registered {
            self.owners.put(self.source, channel, owner);
        }
        match self.entry(registered, standing) {
            Ok(registration) => self.observe(Observation::Registered(registration)).await,
            Err(channel) if self.book_keeping.opens(&channel, owner) => {
                self.change(ChannelChange::Opened(self.source, channel)).await;
            }
            Err(_) => {}
        }
    }

    async fn take_back(&mut self, registered: Registered, owner: Option<WorkerId>) {
        if let Registered::Card(key, _) = &registered {
            self.book_keeping.leaves(key);
        }
        if let Registered::Channel(channel) = &registered {
            self.owners.remove(self.source, channel);
        }
        match self.entry(registered, Standing::default()) {
            Ok(registration) => self.observe(Observation::Deregistered(registration)).await,
            Err(channel) if self.book_keeping.closes(&channel, owner) => {
                self.change(ChannelChange::Closed(channel)).await;
            }
            Err(_) => {}
        }
    }

    /// What the fleet is told; a channel is not the fleet's.
    fn entry(&self, registered: Registered, standing: Standing) -> Result<Registration, Arc<EventChannel>> {
        let (key, entry) = match registered {
            Registered::Instance(key) => (key, Entry::Instance(standing)),
            Registered::Card(key, card) => (key, Entry::Card(*card)),
            Registered::Adapter(key, adapter) => (key, Entry::Adapter(adapter)),
            Registered::Channel(channel) => return Err(channel),
        };
        Ok(Registration { source: self.source, key, entry })
    }

    /// Something of the voice's that is no entry cannot be used.
    pub(crate) async fn reject(&self, reason: Reason, path: &str, detail: &str) {
        let path: String = one_line(path).escape_debug().collect();
        let detail = format!("{} (key {path})", one_line(detail));
        self.observe(Observation::Rejected(Rejection { source: self.source, topic: Topic::Discovery, reason, detail }))
            .await;
    }

    async fn observe(&self, observation: Observation) {
        // Nobody folds any more once the bridge stops.
        self.observations.send(observation).await.ok();
    }

    async fn change(&self, change: ChannelChange) {
        self.channels.send(change).await.ok();
    }
}

/// Tells routers' channels of [`Topic::ActiveSequences`] from those that workers have too from 1.5 on, and on which they say
/// nothing that is used: a worker has a card for the endpoint that its channel is about.
#[derive(Default)]
struct BookKeeping {
    cards: HashSet<WorkerKey>,
    /// Channels that were told, by the worker whose they are if it is one.
    told: HashMap<WorkerKey, Vec<Arc<EventChannel>>>,
}

impl BookKeeping {
    /// The worker whose channel it is, if who registered it is one.
    fn worker(channel: &EventChannel, owner: Option<WorkerId>) -> Option<WorkerKey> {
        let (Scope { component, endpoint }, id) = channel.scope.clone().zip(owner)?;
        let namespace = channel.namespace.as_str().into();
        let is_book_keeping = channel.topic == Topic::ActiveSequences.as_str();
        is_book_keeping.then_some(WorkerKey { namespace, component, endpoint, id })
    }

    /// A worker has a card. Which channels are its own, though they were told.
    fn serves(&mut self, worker: &WorkerKey) -> Vec<Arc<EventChannel>> {
        self.cards.insert(worker.clone());
        self.told.remove(worker).unwrap_or_default()
    }

    fn leaves(&mut self, worker: &WorkerKey) {
        self.cards.remove(worker);
    }

    /// Whether a channel is to be told.
    fn opens(&mut self, channel: &Arc<EventChannel>, owner: Option<WorkerId>) -> bool {
        let Some(worker) = Self::worker(channel, owner) else { return true };
        if self.cards.contains(&worker) {
            return false;
        }
        self.told.entry(worker).or_default().push(Arc::clone(channel));
        true
    }

    /// Whether it was told, and is to be taken back.
    fn closes(&mut self, channel: &Arc<EventChannel>, owner: Option<WorkerId>) -> bool {
        let Some(worker) = Self::worker(channel, owner) else { return true };
        let Some(told) = self.told.get_mut(&worker) else { return false };
        let before = told.len();
        told.retain(|known| known != channel);
        let was_told = told.len() < before;
        if told.is_empty() {
            self.told.remove(&worker);
        }
        was_told
    }
}

#[cfg(test)]
mod tests;
