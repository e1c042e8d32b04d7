//! Whose channels the publishers of forward passes are, as discovery tells: etcd by the lease of an entry, Kubernetes by the
//! resource that it stands in. A folder does not tell.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::fleet::{Source, Topic, WorkerId};
use crate::wire::EventChannel;

/// Written by discovery, read where events are decoded. Bounded by the entries that discovery may have.
#[derive(Debug, Clone, Default)]
pub(crate) struct Owners(Arc<RwLock<HashMap<(u64, Source), WorkerId>>>);

impl Owners {
    /// A source of discovery has the channel, and tells whose it is.
    pub(super) fn put(&self, source: Source, channel: &EventChannel, owner: Option<WorkerId>) {
        let Some(owner) = owner.filter(|_| channel.topic == Topic::ForwardPassMetrics.as_str()) else { return };
        let mut owners = self.0.write().unwrap_or_else(PoisonError::into_inner);
        owners.insert((channel.publisher, source), owner);
    }

    /// It no longer has it.
    pub(super) fn remove(&self, source: Source, channel: &EventChannel) {
        if channel.topic == Topic::ForwardPassMetrics.as_str() {
            self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&(channel.publisher, source));
        }
    }

    /// The worker that publishes under that id.
    pub(super) fn of(&self, publisher: u64) -> Option<WorkerId> {
        let owners = self.0.read().unwrap_or_else(PoisonError::into_inner);
        Topic::Discovery.sources().iter().find_map(|source| owners.get(&(publisher, *source)).copied())
    }
}
