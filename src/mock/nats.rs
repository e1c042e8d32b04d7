//! Mock workers with all planes on NATS: micro services that answer STATS, and events.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use async_nats::Client;
use async_nats::service::endpoint::Endpoint;
use async_nats::service::{Service, ServiceExt};
use futures_util::StreamExt;
use futures_util::stream::SelectAll;
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::warn;

use super::play::Loads;
use super::{MockConfig, MockError};
use crate::fleet::{Report, WorkerId};
use crate::source::nats::{self, Connection};
use crate::target;

/// A server that is gone cannot be told goodbye.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(3);

/// The workers on NATS.
pub(super) struct Outlet {
    pub(super) client: Client,
    services: Vec<Service>,
    _answers: JoinSet<()>,
}

/// Registers the services; `None` where `shutdown` came first.
pub(super) async fn open(
    config: &MockConfig,
    workers: &[WorkerId],
    loads: &Loads,
    shutdown: Pin<&mut impl Future<Output = ()>>,
) -> Result<Option<Outlet>, MockError> {
    let Connection { client, .. } = tokio::select! {
        connection = nats::connect(&config.nats) => connection?,
        () = shutdown => return Ok(None),
    };
    let mut answers = JoinSet::new();
    let mut services = Vec::new();
    for (number, id) in workers.iter().enumerate() {
        let load = loads.of(number);
        services.push(serve(config, *id, load, &client, &mut answers).await.map_err(MockError::Register)?);
    }
    Ok(Some(Outlet { client, services, _answers: answers }))
}

impl Outlet {
    /// Waits until somebody asks for STATS, of one service or of all; how they asked.
    pub(super) async fn is_asked(&self) -> String {
        let mut questions = SelectAll::new();
        for subject in ["$SRV.STATS", "$SRV.STATS.>"] {
            match self.client.subscribe(subject).await {
                Ok(subscriber) => questions.push(subscriber),
                Err(error) => warn!("Nobody is waited for: {error}"),
            }
        }
        questions.next().await.map(|question| question.subject.to_string()).unwrap_or_default()
    }

    /// Takes the services off the bus.
    pub(super) async fn leave(self) {
        let Self { client, services, .. } = self;
        let leave = async {
            for service in services {
                if let Err(error) = service.stop().await {
                    warn!("A service did not stop cleanly: {error}");
                }
            }
            if let Err(error) = client.drain().await {
                warn!("The connection did not close cleanly: {error}");
            }
        };
        if tokio::time::timeout(LEAVE_TIMEOUT, leave).await.is_err() {
            warn!("NATS did not take the services off in time");
        }
    }
}

async fn serve(
    config: &MockConfig,
    id: WorkerId,
    load: watch::Receiver<Report>,
    client: &Client,
    answers: &mut JoinSet<()>,
) -> Result<Service, async_nats::Error> {
    let target = &config.target;
    let (release, endpoint) = (target.release(), target.endpoint.as_str());
    let name = target::service_name(&target.namespace, &target.component, release.name_form());
    let reporter = release.reporter(endpoint);
    let full_name = |endpoint: &str| format!("{name}-{endpoint}-{id:x}");
    let reports_as = full_name(reporter);
    let mut builder = client.service_builder().description(target::description(&target.namespace, &target.component));
    if release.stats(&load.borrow()).is_some() {
        builder = builder.stats_handler(move |endpoint, _| {
            let data = if endpoint == reports_as { release.stats(&load.borrow()) } else { None };
            data.unwrap_or(Value::Null)
        });
    }
    let service = builder.start(&name, release.version()).await?;
    for endpoint in BTreeSet::from([endpoint, reporter]) {
        let registered = service.endpoint_builder().name(full_name(endpoint));
        let requests = registered.add(target::endpoint_subject(&name, endpoint, id)).await?;
        answers.spawn(answer(requests));
    }
    Ok(service)
}

/// Answers requests to the endpoint with nothing: a mock serves no model.
async fn answer(mut requests: Endpoint) {
    while let Some(request) = requests.next().await {
        if let Err(error) = request.respond(Ok("".into())).await {
            warn!("A request was not answered: {error}");
        }
    }
}
