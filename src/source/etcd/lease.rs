//! Entries under a lease, as a Dynamo process has them: for mock workers.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

use tonic::Status;
use tracing::warn;

use super::rpc::{self, Client};
use super::{EtcdError, EtcdOptions, Server};
use crate::source::patience::Pauses;
use crate::throttle::Throttle;

/// In seconds; as Dynamo had it up to 1.4.
const TTL: i64 = 10;
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(3);

/// Keeps entries, each a key and a value, in etcd until `shutdown`, then takes them out. Calls `registered` when they are
/// there for the first time.
///
/// # Errors
/// The options, or a server that cannot be had at start. Later it registers again.
pub(crate) async fn hold(
    options: &EtcdOptions,
    entries: &[(String, String)],
    registered: impl FnOnce(),
    mut shutdown: Pin<&mut impl Future<Output = ()>>,
) -> Result<(), EtcdError> {
    let servers = options.servers()?;
    let credentials = options.credentials();
    let mut registered = Some(registered);
    let (mut pauses, mut troubles) = (Pauses::new(), Throttle::default());
    loop {
        let Server { url, endpoint } = &servers[0];
        let ended = async {
            let mut client = Client::connect(endpoint, credentials.as_ref()).await?;
            let lease = client.grant(TTL).await?;
            for (key, value) in entries {
                client.put(key, value, lease).await?;
            }
            if let Some(registered) = registered.take() {
                registered();
            }
            tokio::select! {
                status = keep(&mut client, lease) => Err(status),
                () = shutdown.as_mut() => {
                    // It runs out by itself where the server is gone.
                    client.revoke(lease).await.ok();
                    Ok(())
                }
            }
        };
        match ended.await {
            Ok(()) => return Ok(()),
            Err(status) if registered.is_some() => {
                return Err(EtcdError::Register { server: url.clone(), detail: rpc::told(&status) });
            }
            Err(status) => {
                if let Some(more_since_last) = troubles.due(Instant::now()) {
                    warn!(more_since_last, "etcd at {url}: {}; registering again", rpc::told(&status));
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pauses.grow()) => {}
            () = shutdown.as_mut() => return Ok(()),
        }
    }
}

/// Runs until the lease cannot be renewed, and says why.
async fn keep(client: &mut Client<'_>, lease: i64) -> Status {
    let mut ticks = tokio::time::interval(KEEP_ALIVE_INTERVAL);
    loop {
        ticks.tick().await;
        if let Err(status) = client.keep_alive(lease).await {
            return status;
        }
    }
}
