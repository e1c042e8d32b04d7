//! How the connection to NATS is made.

use std::sync::Arc;
use std::time::Duration;

use async_nats::{Client, ConnectErrorKind, ConnectOptions};
use tokio::time::Instant;
use tracing::{info, warn};

use super::error::NatsError;
use super::options::{Credentials, NatsOptions};
use super::tls;
use super::watch::Watch;
use crate::throttle::Throttle;

/// A cut network is noticed after two of these without an answer; the client's own default is a minute.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// Messages that may wait for the bridge on each subscription: the replies of 10,000 workers come all at once.
const SUBSCRIPTION_CAPACITY: usize = 32_768;
/// Pause after the first failed attempt to connect at start, and the longest pause after later ones.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(2));

/// Said to whoever configured nothing, and has no NATS on this machine.
const ELSEWHERE: &str = "; or say where else workers register: --etcd-endpoints [ETCD_ENDPOINTS], \
    --discovery kubernetes [DYN_DISCOVERY_BACKEND], --discovery file [DYN_FILE_KV]";

/// Said where the server wants credentials and there are none.
const ANY_CREDENTIALS: &str = "--nats-username [NATS_AUTH_USERNAME] and --nats-password [NATS_AUTH_PASSWORD], \
    --nats-token [NATS_AUTH_TOKEN], --nats-nkey [NATS_AUTH_NKEY] or --nats-credentials-file [NATS_AUTH_CREDENTIALS_FILE]";

/// A connection that was made once. The client keeps it up.
#[derive(Clone)]
pub(crate) struct Connection {
    pub(crate) client: Client,
    pub(super) watch: Arc<Watch>,
}

/// Connects to the first server that answers, trying again until the configured timeout.
///
/// # Errors
/// Nobody answered in time, or one side refused the other.
pub(crate) async fn connect(nats: &NatsOptions) -> Result<Connection, NatsError> {
    let named = nats.servers().map_err(NatsError::Option)?;
    let (servers, credentials) = (named.to_string(), nats.credentials(&named));
    let started = Instant::now();
    let mut pause = RETRY.0;
    let mut complaints = Throttle::default();
    let watch = Arc::new(Watch::default());
    let options = options(nats, credentials.as_ref(), &watch).await?;
    loop {
        let error = match options.clone().connect(&named.addresses[..]).await {
            Ok(client) => {
                info!("Connected to NATS at {servers}");
                return Ok(Connection { client, watch });
            }
            Err(error) => error,
        };
        let detail = format!("{error}{}", tls::hint(&error));
        if matches!(error.kind(), ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication) {
            let option = credentials.map_or(ANY_CREDENTIALS, |(_, option)| option);
            return Err(NatsError::Refused { servers, detail, option });
        }
        if let Some(option) = tls::refusal(&error) {
            return Err(NatsError::Tls { servers, detail, option });
        }
        let left = nats.nats_connect_timeout.saturating_sub(started.elapsed());
        if left.is_zero() {
            return Err(NatsError::Unreachable {
                servers,
                timeout: nats.nats_connect_timeout,
                last: detail,
                elsewhere: if nats.is_given() { "" } else { ELSEWHERE },
            });
        }
        if let Some(more_since_last) = complaints.due(Instant::now().into_std()) {
            let left = left.as_secs();
            warn!(more_since_last, "NATS at {servers} cannot be reached: {detail}; trying for another {left}s");
        }
        tokio::time::sleep(pause.min(left)).await;
        pause = (pause * 2).min(RETRY.1);
    }
}

async fn options(
    nats: &NatsOptions,
    credentials: Option<&(Credentials, &'static str)>,
    watch: &Arc<Watch>,
) -> Result<ConnectOptions, NatsError> {
    let watch = Arc::clone(watch);
    let options = ConnectOptions::new()
        .name("dynamo-metrics")
        .ping_interval(PING_INTERVAL)
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .event_callback(move |event| {
            watch.heard(&event, std::time::Instant::now());
            std::future::ready(())
        });
    let options = tls::apply(&nats.tls, options)?;
    Ok(match credentials {
        None => options,
        Some((Credentials::User(user, password), _)) => options.user_and_password(user.clone(), password.0.clone()),
        Some((Credentials::Token(token), _)) => options.token(token.0.clone()),
        Some((Credentials::NKey(seed), _)) => options.nkey(seed.0.clone()),
        Some((Credentials::File(path), option)) => {
            options.credentials_file(path).await.map_err(|error| NatsError::file(option, path, error))?
        }
    })
}
