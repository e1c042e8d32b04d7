//! What discovery says, whichever voice says it: the entries of etcd, of a folder or of Kubernetes resources are the same
//! key paths and JSON values.
//!
//! A voice lists its entries and watches them; the registry compares each with what it knows, and tells the fleet of
//! instances and cards, and the event sources of channels. Telling the same twice changes nothing.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::fleet::{Entry, Observation, Reason, Registration, Rejection, Source, Standing, Topic};
use crate::target::NamespaceFilter;
use crate::wire::{self, EventChannel, Registered};

/// Entries of one voice at most; those beyond are rejected. A worker has some five: instance, helpers, card, channels.
const MAX_ENTRIES: usize = 200_000;

/// A change of the channels that events come over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ChannelChange {
    /// A publisher is there. Two voices may both say so; each closes it for itself.
    Opened(Arc<EventChannel>),
    /// A voice that said so no longer does.
    Closed(Arc<EventChannel>),
}

/// The entries of one voice.
pub(crate) struct Registry {
    source: Source,
    namespace: NamespaceFilter,
    known: HashMap<String, Known>,
    observations: mpsc::Sender<Observation>,
    channels: mpsc::Sender<ChannelChange>,
}

struct Known {
    value: Vec<u8>,
    standing: Standing,
    /// `None` where the value says nothing of a watched namespace, or was rejected: to be looked at once, not again.
    registered: Option<Registered>,
}

impl Registry {
    pub(crate) fn new(
        source: Source,
        namespace: NamespaceFilter,
        observations: mpsc::Sender<Observation>,
        channels: mpsc::Sender<ChannelChange>,
    ) -> Self {
        Self { source, namespace, known: HashMap::new(), observations, channels }
    }

    /// An entry is there, or is there still. `id` tells it from the voice's others, `path` is its key path in etcd's
    /// layout.
    pub(crate) async fn put(&mut self, id: &str, path: &str, value: &[u8], standing: Standing) {
        let unchanged = |known: &Known| known.value == value && known.standing == standing;
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
        let new = Known { value: value.to_vec(), standing, registered };
        let told = new.registered.clone().map(|registered| (registered, new.standing.clone()));
        let old = self.known.insert(id.to_owned(), new).and_then(|known| known.registered);
        let again = old.as_ref().zip(told.as_ref()).is_some_and(|(old, (new, _))| new.replaces(old));
        // What the entry said before is taken back, unless it still says it of the same worker or publisher.
        if let Some(old) = old.filter(|_| !again) {
            self.take_back(old).await;
        }
        // A channel has no standing: one that was told is open.
        let is_open = |registered: &Registered| again && matches!(registered, Registered::Channel(_));
        if let Some((registered, standing)) = told.filter(|(registered, _)| !is_open(registered)) {
            self.tell(registered, standing).await;
        }
    }

    /// An entry is gone.
    pub(crate) async fn remove(&mut self, id: &str) {
        if let Some(registered) = self.known.remove(id).and_then(|known| known.registered) {
            self.take_back(registered).await;
        }
    }

    /// After a complete list: every entry that was not in it is gone.
    pub(crate) async fn keep_only(&mut self, keep: &HashSet<String>) {
        let gone: Vec<_> = self.known.keys().filter(|id| !keep.contains(*id)).cloned().collect();
        for id in gone {
            self.remove(&id).await;
        }
    }

    /// Whether the voice is heard now.
    pub(crate) async fn connected(&mut self, connected: bool) {
        self.observe(Observation::Connection { source: self.source, connected }).await;
    }

    async fn tell(&self, registered: Registered, standing: Standing) {
        match self.entry(registered, standing) {
            Ok(registration) => self.observe(Observation::Registered(registration)).await,
            Err(channel) => self.change(ChannelChange::Opened(channel)).await,
        }
    }

    async fn take_back(&self, registered: Registered) {
        match self.entry(registered, Standing::default()) {
            Ok(registration) => self.observe(Observation::Deregistered(registration)).await,
            Err(channel) => self.change(ChannelChange::Closed(channel)).await,
        }
    }

    /// What the fleet is told; a channel is not the fleet's.
    fn entry(&self, registered: Registered, standing: Standing) -> Result<Registration, Arc<EventChannel>> {
        let (key, entry) = match registered {
            Registered::Instance(key) => (key, Entry::Instance(standing)),
            Registered::Card(key, card) => (key, Entry::Card(*card)),
            Registered::Adapter(key, name) => (key, Entry::Adapter(name)),
            Registered::Channel(channel) => return Err(channel),
        };
        Ok(Registration { source: self.source, key, entry })
    }

    /// Something of the voice's that is no entry cannot be used.
    pub(crate) async fn reject(&self, reason: Reason, path: &str, detail: &str) {
        let detail = format!("{detail} (key {path})");
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

#[cfg(test)]
mod tests;
