//! What Dynamo processes registered in Kubernetes: a resource for each worker, alive while the pod that owns it is an
//! endpoint, and ready while that is.

#![expect(clippy::doc_markdown, reason = "doc comments of options are their help texts")]

mod cluster;
mod follow;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind};
use kube::config::KubeConfigOptions;
use kube::{Client, Config};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::cluster::{Cluster, Endpoint, Resource, read_pod, read_resource, read_slice};
use self::follow::{Failure, Heard, Kind, WATCH, follow, said};
use super::registry::Registry;
use crate::causes::one_line;
use crate::config::duration;
use crate::fleet::{self, Reason, Standing, WorkerId};
use crate::redact;
use crate::throttle::Link;
use crate::tls::{self, Refusal};

/// Slices and pods of Dynamo's workers.
const LABELS: &str = "nvidia.com/dynamo-discovery-backend=kubernetes,nvidia.com/dynamo-discovery-enabled=true";
/// Where a pod finds who it is.
const SERVICE_ACCOUNT_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
/// Objects on their way to the join.
const CHANNEL: usize = 256;
/// A connection is not waited for longer than this.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A server that says nothing for this long is mute: it would have ended a watch by now.
const SILENCE: Duration = WATCH.saturating_add(Duration::from_secs(10));

/// The Kubernetes API server: that of the kubeconfig, else that of the pod's own cluster.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Kubernetes")]
pub(crate) struct KubernetesOptions {
    /// Kubernetes namespace of the workers [default: POD_NAMESPACE, the pod's own, or that of the kubeconfig's context]
    #[arg(long, value_name = "NAME")]
    kube_namespace: Option<String>,
    /// What a worker is
    #[arg(
        long,
        env = "DYN_KUBE_DISCOVERY_MODE",
        default_value = "pod",
        value_name = "MODE",
        hide_possible_values = true
    )]
    kube_discovery_mode: Mode,
    /// How long to try before giving up at start; later the bridge reconnects for ever
    #[arg(long, default_value = "30s", value_name = "DURATION", value_parser = duration)]
    kube_connect_timeout: Duration,
}

impl KubernetesOptions {
    /// Whether there is a cluster at hand: this is a pod that has a service account, or a namespace is named.
    pub(crate) fn is_given(&self) -> bool {
        let is_pod = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some_and(|host| !host.is_empty());
        self.kube_namespace.is_some() || (is_pod && Path::new(SERVICE_ACCOUNT_TOKEN).exists())
    }
}

/// What registers, by Dynamo's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    Pod,
    Container,
}

/// Why Kubernetes cannot be heard. One line each, with what to change.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    /// Neither a kubeconfig nor a pod.
    #[error(
        "no Kubernetes cluster is known here: {kubeconfig}, and this is no pod with a service account ({pod}); set KUBECONFIG to a kubeconfig, or run the bridge in a pod"
    )]
    NoCluster {
        /// What is wrong with the kubeconfig.
        kubeconfig: String,
        /// What is missing of a pod.
        pod: String,
    },
    /// The kubeconfig names what cannot be used.
    #[error("Kubernetes cannot be asked: {0}; check the kubeconfig")]
    Client(String),
    /// Nobody answered in time.
    #[error("Kubernetes at {server} could not be reached within {}: {last}; check the kubeconfig, or wait longer with --kube-connect-timeout", humantime::format_duration(*.timeout))]
    Unreachable {
        /// The API server.
        server: String,
        /// How long it was tried.
        timeout: Duration,
        /// What the last attempt met.
        last: String,
    },
    /// The server does not know the user.
    #[error(
        "Kubernetes at {server} refused the credentials: {detail}; check the kubeconfig's user, or the service account of the pod"
    )]
    Refused {
        /// The API server.
        server: String,
        /// Its words.
        detail: String,
    },
    /// One side does not take the other's certificate.
    #[error("Kubernetes at {server} refused TLS, or was refused: {detail}; check {entry} in the kubeconfig")]
    Tls {
        /// The API server.
        server: String,
        /// What TLS says.
        detail: String,
        /// What to change.
        entry: &'static str,
    },
    /// The user may not do what has to be done.
    #[error(
        "Kubernetes does not let the bridge {verb} {resource} in namespace {namespace}: {detail}; give its service account a Role with the verbs list and watch on {needed}, or name another namespace with --kube-namespace"
    )]
    Forbidden {
        /// What was tried.
        verb: &'static str,
        /// On what.
        resource: &'static str,
        /// Where.
        namespace: String,
        /// Everything that is listed and watched.
        needed: String,
        /// The server's words.
        detail: String,
    },
}

/// Tells the registry what is in Kubernetes until `stop`.
///
/// # Errors
/// There is no cluster, the server cannot be reached at start, or it refuses. What goes wrong later is survived.
pub(crate) async fn run(
    options: KubernetesOptions,
    registry: Registry,
    stop: CancellationToken,
) -> Result<(), KubernetesError> {
    stop.run_until_cancelled(Box::pin(speak(options, registry))).await.unwrap_or(Ok(()))
}

async fn speak(options: KubernetesOptions, registry: Registry) -> Result<(), KubernetesError> {
    let mut config = cluster_at_hand().await?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(SILENCE);
    config.reset_reader_on_write = true;
    // What fails is tried again here, and said.
    config.default_retry = false;
    // A user in the URL is nothing to Kubernetes, and the client would log it.
    let server = redact::urls(&config.cluster_url.to_string());
    config.cluster_url = server.parse().unwrap_or(config.cluster_url);
    let server = server.trim_end_matches('/').to_owned();
    let default = || own_namespace().unwrap_or_else(|| config.default_namespace.trim().to_owned());
    let namespace = options.kube_namespace.unwrap_or_else(default);
    let client = Client::try_from(config).map_err(|error| KubernetesError::Client(said(&error)))?;

    let (sender, told) = mpsc::channel(CHANNEL);
    let metadata = ApiResource::from_gvk_with_plural(
        &GroupVersionKind::gvk("nvidia.com", "v1alpha1", "DynamoWorkerMetadata"),
        "dynamoworkermetadatas",
    );
    let resources = Kind {
        api: Api::<DynamicObject>::namespaced_with(client.clone(), &namespace, &metadata),
        labels: None,
        read: read_resource,
    };
    let slices = Kind {
        api: Api::<EndpointSlice>::namespaced(client.clone(), &namespace),
        labels: Some(LABELS),
        read: read_slice,
    };
    let pods = Kind { api: Api::<Pod>::namespaced(client, &namespace), labels: Some(LABELS), read: read_pod };
    let endpoints = async {
        match options.kube_discovery_mode {
            Mode::Pod => follow(slices, sender.clone(), Told::Endpoints).await,
            Mode::Container => follow(pods, sender.clone(), Told::Endpoints).await,
        }
    };
    let resources = follow(resources, sender.clone(), Told::Resources);
    let voice = Voice {
        endpoints: Feed::new(match options.kube_discovery_mode {
            Mode::Pod => "endpointslices.discovery.k8s.io",
            Mode::Container => "pods",
        }),
        resources: Feed::new("dynamoworkermetadatas.nvidia.com"),
        cluster: Cluster::default(),
        told: HashMap::new(),
        registry,
        server,
        namespace: namespace.as_str().into(),
        heard: false,
        start: Instant::now(),
        timeout: options.kube_connect_timeout,
    };
    tokio::select! {
        ended = voice.hear(told) => ended,
        // They follow for ever.
        ((), ()) = async { tokio::join!(resources, endpoints) } => Ok(()),
    }
}

/// Where Dynamo itself looks for workers. The variable alone is no word that there is a cluster to ask: many pods have it.
fn own_namespace() -> Option<String> {
    std::env::var("POD_NAMESPACE").ok().filter(|namespace| !namespace.is_empty())
}

/// That of the kubeconfig, else the pod's own.
async fn cluster_at_hand() -> Result<Config, KubernetesError> {
    match Config::from_kubeconfig(&KubeConfigOptions::default()).await {
        Ok(config) => Ok(config),
        Err(kubeconfig) => Config::incluster().map_err(|pod| KubernetesError::NoCluster {
            kubeconfig: one_line(&format!("{}: {kubeconfig}", kubeconfig_variable())),
            pod: one_line(&pod.to_string()),
        }),
    }
}

/// What names the kubeconfig: most of what may be wrong with a file is told without its name.
fn kubeconfig_variable() -> String {
    let files = std::env::var("KUBECONFIG").unwrap_or_default();
    if files.is_empty() { "KUBECONFIG is not set".to_owned() } else { format!("KUBECONFIG={files}") }
}

enum Told {
    Resources(Heard<Resource>),
    Endpoints(Heard<Vec<Endpoint>>),
}

/// How it stands with the objects of one kind.
struct Feed {
    /// Kubernetes' name of them.
    resource: &'static str,
    /// Whether every change of them is heard.
    live: bool,
    link: Link,
}

impl Feed {
    fn new(resource: &'static str) -> Self {
        Self { resource, live: false, link: Link::default() }
    }

    fn failed(&mut self, failure: &Failure, server: &str) {
        self.live = false;
        let (verb, resource) = (failure.verb, self.resource);
        let Some(more_since_last) = self.link.troubled(Instant::now().into_std()) else {
            debug!("Kubernetes at {server}: cannot {verb} {resource}: {failure}");
            return;
        };
        if failure.status() == Some(404) {
            warn!(
                more_since_last,
                "Kubernetes at {server} knows no {resource}: is Dynamo's operator installed? Trying again"
            );
        } else {
            warn!(more_since_last, "Kubernetes at {server}: cannot {verb} {resource}: {failure}; trying again");
        }
    }
}

struct Voice {
    resources: Feed,
    endpoints: Feed,
    cluster: Cluster,
    /// Ids of the entries that the registry has, by their resource.
    told: HashMap<String, Vec<String>>,
    registry: Registry,
    server: String,
    namespace: Arc<str>,
    /// Whether everything was heard once.
    heard: bool,
    start: Instant,
    timeout: Duration,
}

impl Voice {
    async fn hear(mut self, mut told: mpsc::Receiver<Told>) -> Result<(), KubernetesError> {
        self.registry.connected(false).await;
        while let Some(told) = told.recv().await {
            let was_live = self.is_live();
            match told {
                Told::Resources(heard) => self.of_resources(heard).await?,
                Told::Endpoints(heard) => self.of_endpoints(heard)?,
            }
            let live = self.is_live();
            // Half a picture is none: a pod that was replaced while nothing was heard would come and go.
            if live {
                self.tell().await;
            }
            if live != was_live {
                self.turned(live).await;
            }
        }
        Ok(())
    }

    fn is_live(&self) -> bool {
        self.resources.live && self.endpoints.live
    }

    async fn turned(&mut self, live: bool) {
        if live {
            let (server, namespace) = (&self.server, &self.namespace);
            if [&mut self.resources, &mut self.endpoints].map(|feed| feed.link.is_well()).contains(&true) {
                info!("Connected to Kubernetes at {server}, namespace {namespace}");
            } else {
                debug!("Connected to Kubernetes at {server}, namespace {namespace}");
            }
            self.heard = true;
        }
        self.registry.connected(live).await;
    }

    async fn of_resources(&mut self, heard: Heard<Resource>) -> Result<(), KubernetesError> {
        match heard {
            Heard::Listed(listed) => {
                self.cluster.retain_resources(&names(&listed));
                for (name, resource) in listed {
                    self.put(name, resource).await;
                }
            }
            Heard::Applied(name, resource) => self.put(name, resource).await,
            Heard::Deleted(name) => self.cluster.remove_resource(&name),
            Heard::Live => self.resources.live = true,
            Heard::Failed(failure) => {
                self.judge(&failure, self.resources.resource)?;
                self.resources.failed(&failure, &self.server);
            }
        }
        Ok(())
    }

    fn of_endpoints(&mut self, heard: Heard<Vec<Endpoint>>) -> Result<(), KubernetesError> {
        match heard {
            Heard::Listed(listed) => {
                self.cluster.retain_endpoints(&names(&listed));
                for (name, endpoints) in listed {
                    self.cluster.put_endpoints(name, endpoints);
                }
            }
            Heard::Applied(name, endpoints) => self.cluster.put_endpoints(name, endpoints),
            Heard::Deleted(name) => self.cluster.remove_endpoints(&name),
            Heard::Live => self.endpoints.live = true,
            Heard::Failed(failure) => {
                self.judge(&failure, self.endpoints.resource)?;
                self.endpoints.failed(&failure, &self.server);
            }
        }
        Ok(())
    }

    async fn put(&mut self, name: String, resource: Resource) {
        let faults = resource.faults.clone();
        if self.cluster.put_resource(name.clone(), resource) {
            for fault in faults {
                let path = format!("{name}/{fault}");
                self.registry.reject(Reason::WrongShape, &path, "Kubernetes resource: a map expected").await;
            }
        }
    }

    /// Brings the registry up to date.
    async fn tell(&mut self) {
        for name in self.cluster.take_stale() {
            let joined = self.cluster.join(&name);
            let entries = joined.as_ref().map(|joined| joined.entries).unwrap_or_default();
            let ids: Vec<_> = entries.iter().map(|(path, _)| format!("{name}/{path}")).collect();
            let kept: HashSet<_> = ids.iter().collect();
            for id in self.told.remove(&name).unwrap_or_default() {
                if !kept.contains(&id) {
                    self.registry.remove(&id).await;
                }
            }
            let Some(joined) = joined else { continue };
            let pod = fleet::Pod { name: joined.pod, namespace: Arc::clone(&self.namespace) };
            let standing = Standing { ready: joined.ready, pod: Some(pod) };
            let owner = joined.entries.iter().find_map(|(path, _)| owner(path));
            for (id, (path, value)) in ids.iter().zip(joined.entries) {
                self.registry.put(id, path, value, standing.clone(), owner).await;
            }
            self.told.insert(name, ids);
        }
    }

    /// Whether a failure ends it all: one that asks for another configuration, before anything was heard.
    fn judge(&self, failure: &Failure, resource: &'static str) -> Result<(), KubernetesError> {
        if self.heard {
            return Ok(());
        }
        let (server, detail) = (self.server.clone(), failure.to_string());
        if let Some(refusal) = tls::refusal(failure.cause()) {
            let entry = match refusal {
                Refusal::OfServer => "certificate-authority, and that the certificate names the host of server,",
                Refusal::OfClient => "client-certificate and client-key",
            };
            return Err(KubernetesError::Tls { server, detail, entry });
        }
        match failure.status() {
            Some(401) => Err(KubernetesError::Refused { server, detail }),
            Some(403) => {
                let (verb, namespace) = (failure.verb, self.namespace.to_string());
                let needed = format!("{} and {}", self.resources.resource, self.endpoints.resource);
                Err(KubernetesError::Forbidden { verb, resource, namespace, needed, detail })
            }
            // Dynamo's operator may be installed later.
            Some(404) => Ok(()),
            _ if self.start.elapsed() < self.timeout => Ok(()),
            _ => Err(KubernetesError::Unreachable { server, timeout: self.timeout, last: detail }),
        }
    }
}

fn names<T>(listed: &[(String, T)]) -> HashSet<&str> {
    listed.iter().map(|(name, _)| name.as_str()).collect()
}

/// The worker of whose resource this is the path of an entry, if it is that of an instance.
fn owner(path: &str) -> Option<WorkerId> {
    let (_, id) = path.strip_prefix("v1/instances/")?.rsplit_once('/')?;
    u64::from_str_radix(id, 16).ok().map(WorkerId)
}
