//! The publishers of mock workers of Dynamo 1.6 and of their router: a ZMQ socket for each topic of each.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;

use tokio::net::lookup_host;

use super::voice::{Lane, Message, Voice};
use super::{MockConfig, MockError};
use crate::fleet::WorkerId;
use crate::zmtp::Publisher;
use crate::{process, wire};

/// Of a publisher: its socket, and some subscribers.
const DESCRIPTORS: u64 = 4;

/// The sockets.
pub(super) struct Outlet {
    publishers: BTreeMap<Lane, Publisher>,
    entries: Vec<(String, String)>,
}

/// Listens for subscribers.
pub(super) async fn open(config: &MockConfig, workers: &[WorkerId], voice: &Voice) -> Result<Outlet, MockError> {
    let host = &config.places.zmq_host;
    let address = address_of(host).await?;
    // All are about one endpoint, whoever publishes.
    let scope = config.key(workers[0]);
    // Where they do not suffice, binding or accepting says so.
    process::descriptors_suffice(DESCRIPTORS * voice.publishers().count() as u64).ok();
    let (mut publishers, mut entries) = (BTreeMap::new(), Vec::new());
    for (lane, id) in voice.publishers() {
        let publisher = Publisher::bind(address).await.map_err(|source| unusable(host, source))?;
        entries.push(wire::encode_channel(&scope, lane.topic(), id, &publisher.endpoint()));
        publishers.insert(lane, publisher);
    }
    Ok(Outlet { publishers, entries })
}

/// Its address, with any port.
async fn address_of(host: &str) -> Result<SocketAddr, MockError> {
    let mut addresses = lookup_host((host, 0)).await.map_err(|source| unusable(host, source))?;
    addresses.next().ok_or_else(|| unusable(host, io::Error::other("it has no address")))
}

fn unusable(host: &str, source: io::Error) -> MockError {
    MockError::Publish { host: host.to_owned(), source }
}

impl Outlet {
    /// What says where they are.
    pub(super) fn entries(&self) -> Vec<(String, String)> {
        self.entries.clone()
    }

    /// Waits until each of them has a subscriber; how many there are.
    pub(super) async fn is_subscribed_to(&self) -> String {
        for publisher in self.publishers.values() {
            // It ends with the publisher.
            publisher.subscriptions().wait_for(|subscriptions| *subscriptions > 0).await.ok();
        }
        format!("{} publishers have a subscriber", self.publishers.len())
    }

    pub(super) fn publish(&self, message: &Message, now: u64) {
        if let Some((publisher, envelope)) = self.publishers.get(&message.lane).zip(message.envelope(now)) {
            publisher.publish(&wire::encode_frames(&envelope));
        }
    }
}
