//! Mock workers of Dynamo 0.1 - 0.5 with all planes on NATS: micro services that answer STATS, and routers' events.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use async_nats::Client;
use async_nats::service::endpoint::Endpoint;
use async_nats::service::{Service, ServiceExt};
use futures_util::StreamExt;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::{MockConfig, MockError, MockTarget, Release};
use crate::fleet::{HitBlocks, WorkerId};
use crate::source::nats;
use crate::target::{self, LOAD_ENDPOINT};
use crate::wire;

/// A server that is gone cannot be told goodbye.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest prompt of a mock event, in blocks.
const MAX_ISL_BLOCKS: u32 = 64;

/// Serves until `shutdown`, then takes its services off the bus.
pub(super) async fn serve(
    config: &MockConfig,
    workers: Vec<(WorkerId, StdRng)>,
    mut shutdown: Pin<&mut impl Future<Output = ()>>,
) -> Result<(), MockError> {
    let client = tokio::select! {
        client = nats::connect(&config.nats, None) => client?,
        () = shutdown.as_mut() => return Ok(()),
    };
    let mut tasks = JoinSet::new();
    let mut services = Vec::new();
    for (id, random) in workers {
        let worker = Worker { config: config.clone(), id, random };
        services.push(worker.start(&client, &mut tasks).await.map_err(MockError::Register)?);
    }
    info!("Serving {} as {} worker(s)", config.target, services.len());
    shutdown.await;
    tasks.shutdown().await;
    if tokio::time::timeout(LEAVE_TIMEOUT, leave(services, &client)).await.is_err() {
        warn!("NATS did not take the services off in time");
    }
    Ok(())
}

async fn leave(services: Vec<Service>, client: &Client) {
    for service in services {
        if let Err(error) = service.stop().await {
            warn!("A service did not stop cleanly: {error}");
        }
    }
    if let Err(error) = client.drain().await {
        warn!("The connection did not close cleanly: {error}");
    }
}

struct Worker {
    config: MockConfig,
    id: WorkerId,
    random: StdRng,
}

impl Worker {
    async fn start(mut self, client: &Client, tasks: &mut JoinSet<()>) -> Result<Service, async_nats::Error> {
        let MockTarget { namespace, component, endpoint, release, .. } = self.config.target.clone();
        let name = target::service_name(&namespace, &component, release.name_form());
        let reporter = if release == Release::V0_0 { endpoint.clone() } else { LOAD_ENDPOINT.to_owned() };
        let reports_as = format!("{name}-{reporter}-{:x}", self.id);
        let (id, load, mut random) = (self.id, self.config.load.clone(), StdRng::from_rng(&mut self.random));
        let service = client
            .service_builder()
            .description(target::description(&namespace, &component))
            .stats_handler(
                move |endpoint, _| {
                    if endpoint == reports_as { load.report(release, &mut random) } else { Value::Null }
                },
            )
            .start(&name, wire::VERSION_BEFORE_0_6)
            .await?;
        for endpoint in BTreeSet::from([endpoint, reporter]) {
            let registered = service.endpoint_builder().name(format!("{name}-{endpoint}-{id:x}"));
            let requests = registered.add(target::endpoint_subject(&name, &endpoint, id)).await?;
            tasks.spawn(answer(requests));
        }
        if self.config.target.events_per_second > 0.0 {
            tasks.spawn(self.publish(client.clone()));
        }
        Ok(service)
    }

    /// Publishes events about this worker, as a router would that sends it requests.
    async fn publish(mut self, client: Client) {
        let subject = target::kv_hit_rate_subject(&self.config.target.namespace);
        let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / self.config.target.events_per_second));
        loop {
            ticks.tick().await;
            let isl = self.random.random_range(1..=MAX_ISL_BLOCKS);
            let blocks = HitBlocks { isl, overlap: self.random.random_range(0..=isl) };
            let event = wire::encode_hit_rate(self.id, blocks);
            if let Err(error) = client.publish(subject.clone(), event.into()).await {
                warn!("An event was not published: {error}");
            }
        }
    }
}

/// Answers requests to the endpoint with nothing: a mock serves no model.
async fn answer(mut requests: Endpoint) {
    while let Some(request) = requests.next().await {
        if let Err(error) = request.respond(Ok("".into())).await {
            warn!("A request was not answered: {error}");
        }
    }
}
