//! What becomes of the connection to NATS once it is made.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_nats::connection::State;
use async_nats::{Client, Event, ServerError};
use tokio::sync::{Notify, mpsc};
use tracing::{debug, info, warn};

use super::permissions::{Action, Denials};
use crate::fleet::{Lost, Observation, Source};
use crate::throttle::Throttle;

/// The client drops events while too many of them wait, so the connection is looked at beside them.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// What the client says of its connection. It waits for its callback, so that events are only noted here:
/// [`report`](Self::report) passes them on.
#[derive(Debug, Default)]
pub(super) struct Watch {
    pending: Mutex<Pending>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Pending {
    /// Messages given up since the last report.
    lost: u64,
    /// Whether the connection was lost before.
    was_lost: bool,
    denials: Denials,
    log: Log,
}

/// The lines that whoever is on the other side can cause at will.
#[derive(Debug, Default)]
struct Log {
    lost: Throttle,
    back: Throttle,
    slow: Throttle,
    other: Throttle,
}

impl Log {
    fn complaint(&mut self, complaint: &str, now: Instant) {
        if let Some(more_since_last) = self.other.due(now) {
            warn!(more_since_last, "The NATS server complains: {complaint:?}");
        }
    }
}

impl Watch {
    /// Notes an event, and writes to the log what an operator needs to know.
    pub(super) fn heard(&self, event: &Event, now: Instant) {
        let mut pending = self.pending();
        let Pending { lost, was_lost, denials, log } = &mut *pending;
        match event {
            Event::Disconnected => {
                *was_lost = true;
                if let Some(more_since_last) = log.lost.due(now) {
                    warn!(more_since_last, "The connection to NATS was lost; reconnecting");
                }
            }
            // The same throttle, so that the last word is not that all is well.
            Event::ClientError(error) => {
                if let Some(more_since_last) = log.lost.due(now) {
                    warn!(more_since_last, "NATS cannot be reached: {error}; reconnecting");
                }
            }
            Event::Connected if *was_lost => {
                denials.clear();
                if let Some(more_since_last) = log.back.due(now) {
                    info!(more_since_last, "Connected to NATS again");
                }
            }
            Event::SlowConsumer(_) => {
                *lost += 1;
                if let Some(more_since_last) = log.slow.due(now) {
                    warn!(more_since_last, "The bridge reads from NATS too slowly; messages were lost");
                }
            }
            Event::ServerError(ServerError::Other(complaint)) => match Action::denied_by(complaint) {
                Some(action) => {
                    if let Some(more_since_last) = denials.add(&action, now) {
                        warn!(more_since_last, "No NATS permission to {action}: {}", action.consequence());
                    }
                }
                None => log.complaint(complaint, now),
            },
            Event::ServerError(error) => log.complaint(&error.to_string(), now),
            other => debug!("NATS: {other}"),
        }
        drop(pending);
        self.changed.notify_one();
    }

    /// Passes on what was noted, and what the client knows of its connection, until nobody folds any more.
    pub(super) async fn report(&self, client: &Client, observations: mpsc::Sender<Observation>) {
        let statistics = client.statistics();
        let connects = || statistics.connects.load(Ordering::Relaxed);
        let mut reported = Reported { connected: true, connects: connects(), denied: Vec::new() };
        let mut news = vec![Observation::Connection { source: Source::Nats, connected: true }];
        let mut looks = tokio::time::interval(LOOK_INTERVAL);
        loop {
            for observation in news {
                if observations.send(observation).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                () = self.changed.notified() => {}
                _ = looks.tick() => {}
                () = observations.closed() => return,
            }
            news = reported.changes(client.connection_state() == State::Connected, connects());
            let (messages, denied) = self.news();
            if denied != reported.denied {
                reported.denied.clone_from(&denied);
                news.push(Observation::Denied { source: Source::Nats, actions: denied });
            }
            if messages > 0 {
                news.push(Observation::Lost(Lost { source: Source::Nats, messages }));
            }
        }
    }

    /// Messages given up since the last call, and what is denied now.
    fn news(&self) -> (u64, Vec<Arc<str>>) {
        let mut pending = self.pending();
        let denied = pending.denials.iter().map(|action| action.to_string().into()).collect();
        (std::mem::take(&mut pending.lost), denied)
    }

    /// Whether that is denied.
    pub(super) fn denies(&self, action: &Action) -> bool {
        self.pending().denials.contains(action)
    }

    /// That was tried at that time, and had the time to be complained of.
    pub(super) fn tried(&self, action: &Action, at: Instant) {
        self.pending().denials.tried(action, at);
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The connection, as it was last reported to the fleet.
struct Reported {
    connected: bool,
    /// Connections made so far: one that broke and was made again between two looks is known by it.
    connects: u64,
    denied: Vec<Arc<str>>,
}

impl Reported {
    fn changes(&mut self, connected: bool, connects: u64) -> Vec<Observation> {
        let mut changes = Vec::new();
        let change = |connected| Observation::Connection { source: Source::Nats, connected };
        if self.connected && (!connected || connects > self.connects) {
            self.connected = false;
            changes.push(change(false));
        }
        if !self.connected && connected {
            (self.connected, self.connects) = (connected, connects);
            changes.push(change(true));
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_broke_and_came_back_between_two_looks_was_lost() {
        let mut reported = Reported { connected: true, connects: 1, denied: Vec::new() };
        let mut pending = |connected, connects| {
            let changes = reported.changes(connected, connects).into_iter();
            let connected = |change| matches!(change, Observation::Connection { connected: true, .. });
            changes.map(connected).collect::<Vec<_>>()
        };
        assert_eq!(pending(true, 1), [false; 0]);
        assert_eq!(pending(true, 2), [false, true]);
        assert_eq!(pending(false, 2), [false]);
        assert_eq!(pending(false, 2), [false; 0]);
        assert_eq!(pending(true, 3), [true]);
    }
}
