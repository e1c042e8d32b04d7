//! The connection to NATS, and what is heard over it: replies to scrapes and events.

mod connection;
mod error;
mod events;
mod options;
mod scrape;
mod tls;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub(crate) use connection::connect;
pub use error::NatsError;
pub(crate) use options::NatsOptions;

use crate::config::Config;
use crate::fleet::Observation;

/// Connects, then scrapes and listens until `stop`.
///
/// # Errors
/// NATS cannot be reached at start, or refuses. A connection lost later is no error: the client reconnects for ever, and
/// says so in observations.
pub(crate) async fn run(
    config: Config,
    observations: mpsc::Sender<Observation>,
    stop: CancellationToken,
) -> Result<(), NatsError> {
    let connecting = connect(&config.nats, Some(observations.clone()));
    let Some(client) = stop.run_until_cancelled(connecting).await.transpose()? else {
        return Ok(());
    };
    let target = config.rules().target;
    let listening =
        events::Listener::subscribe(&client, target.namespace.clone(), &config.events.topics, observations.clone())
            .await?;
    let scraping = scrape::Scraper::subscribe(client, target, &config, observations).await?;
    let hear = async { tokio::try_join!(listening.run(), scraping.run()).map(|_| ()) };
    stop.run_until_cancelled(hear).await.unwrap_or(Ok(()))
}
