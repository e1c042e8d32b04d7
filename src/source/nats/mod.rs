//! The connection to NATS, and what is heard over it: replies to scrapes and events.

mod connection;
mod error;
mod events;
mod options;
mod permissions;
mod scrape;
mod tls;
mod watch;

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub(crate) use connection::{Connection, connect};
pub use error::NatsError;
pub(crate) use options::NatsOptions;

use crate::config::Config;
use crate::fleet::{Observation, Source};
use crate::source::owners::Owners;

/// What the server denied is tried again this often: it does not say when it would grant it.
const RETRY_DENIED: Duration = Duration::from_secs(10);

/// Connects, then scrapes and listens until `stop`.
///
/// # Errors
/// NATS cannot be reached at start, or refuses. A connection lost later is no error: the client reconnects for ever, and
/// says so in observations.
pub(crate) async fn run(
    config: Config,
    owners: Owners,
    observations: mpsc::Sender<Observation>,
    stop: CancellationToken,
) -> Result<(), NatsError> {
    let lost = Observation::Connection { source: Source::Nats, connected: false };
    observations.send(lost).await.ok();
    let Some(connection) = stop.run_until_cancelled(connect(&config.nats)).await.transpose()? else {
        return Ok(());
    };
    let listener = events::Listener::subscribe(connection.clone(), &config, owners, observations.clone()).await?;
    let scraper = scrape::Scraper::subscribe(connection.clone(), &config, observations.clone()).await?;
    let reporting = async {
        connection.watch.report(&connection.client, observations).await;
        Ok(())
    };
    let hear = Box::pin(async { tokio::try_join!(listener.run(), scraper.run(), reporting).map(|_| ()) });
    stop.run_until_cancelled(hear).await.unwrap_or(Ok(()))
}
