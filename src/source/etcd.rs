//! What Dynamo processes registered in etcd: a list at one revision, then a watch from the next one on, so that nothing is
//! missed in between.
//!
//! Whatever ends a watch - a server gone, mute or without a leader, revisions compacted away - is answered in one way: a
//! new connection, to the next server where there are several, and a new list.

#![expect(clippy::doc_markdown, reason = "doc comments of options are their help texts")]

mod lease;
mod rpc;

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::http::Uri;
use bytes::Bytes;
use clap::Args;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
use tonic::{Status, Streaming};
use tracing::{debug, info, warn};

use self::rpc::{CALL_TIMEOUT, Client, KeyValue, RangeRequest, WatchResponse};
use super::patience::Pauses;
use super::registry::Registry;
use crate::causes::with_causes;
use crate::config::{Secret, belong_together, duration, names_a_server};
use crate::fleet::{Standing, WorkerId};
use crate::throttle::Link;
use crate::tls::{self, Refusal};
use crate::wire::{MAX_MESSAGE, OLD_PREFIXES, REGISTRATION_PREFIXES};

pub(crate) use lease::hold;

/// Where Dynamo itself looks for etcd.
const DEFAULT_SERVER: &str = "http://localhost:2379";
/// Entries asked for at once. A model card has some 2 KiB.
const PAGE: i64 = 1000;
/// A connection is asked for something this often, so that silence is known to mean that nothing changes.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// After this a connection counts as a good one.
const STEADY: Duration = Duration::from_secs(10);

/// The etcd servers, under the names that Dynamo itself reads.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "etcd")]
pub(crate) struct EtcdOptions {
    /// Server URL, or several of one cluster with commas between [default: http://localhost:2379 where etcd is asked for]
    #[arg(long, env = "ETCD_ENDPOINTS", value_name = "URL")]
    etcd_endpoints: Option<Secret>,
    /// How long to try before giving up at start; later the bridge reconnects for ever
    #[arg(long, env = "ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS", default_value = "30s", value_name = "DURATION",
        value_parser = duration)]
    etcd_connect_timeout: Duration,
    /// User
    #[arg(long, env = "ETCD_AUTH_USERNAME", value_name = "USER")]
    etcd_username: Option<String>,
    /// Password of the user
    #[arg(long, env = "ETCD_AUTH_PASSWORD", value_name = "PASSWORD")]
    etcd_password: Option<Secret>,
    /// File with the certificates to trust [default: the system's]
    #[arg(long, env = "ETCD_AUTH_CA", value_name = "FILE")]
    etcd_ca: Option<PathBuf>,
    /// File with the certificate to show
    #[arg(long, env = "ETCD_AUTH_CLIENT_CERT", value_name = "FILE")]
    etcd_client_cert: Option<PathBuf>,
    /// File with its key
    #[arg(long, env = "ETCD_AUTH_CLIENT_KEY", value_name = "FILE")]
    etcd_client_key: Option<PathBuf>,
}

/// Why etcd cannot be heard. One line each, with what to change.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// An option is malformed; checked at start already.
    #[error("{0}")]
    Option(String),
    /// An entry was not taken.
    #[error("etcd at {server} does not take a registration: {detail}; check --etcd-endpoints [ETCD_ENDPOINTS]")]
    Register {
        /// Its address.
        server: String,
        /// The server's words.
        detail: String,
    },
    /// Nobody answered in time.
    #[error("etcd at {servers} could not be reached within {}: {last}; check --etcd-endpoints [ETCD_ENDPOINTS], or wait longer with --etcd-connect-timeout", humantime::format_duration(*.timeout))]
    Unreachable {
        /// As given.
        servers: String,
        /// How long it was tried.
        timeout: Duration,
        /// What the last attempt met.
        last: String,
    },
    /// The server does not know the user, wants one, or lets them read too little.
    #[error(
        "etcd at {server} refused: {detail}; check --etcd-username [ETCD_AUTH_USERNAME] and --etcd-password [ETCD_AUTH_PASSWORD], and that the user may read the keys below v1/"
    )]
    Refused {
        /// Which one.
        server: String,
        /// The server's words.
        detail: String,
    },
    /// One side does not take the other's certificate.
    #[error("etcd at {server} refused TLS, or was refused: {detail}; check {option}")]
    Tls {
        /// Which one.
        server: String,
        /// What TLS says.
        detail: String,
        /// What to change.
        option: &'static str,
    },
    /// A certificate or key cannot be read.
    #[error("cannot read {path}: {source}; check {option}")]
    File {
        /// Which option named it.
        option: &'static str,
        /// As given.
        path: String,
        /// From the file system.
        source: std::io::Error,
    },
    /// A certificate or key is none.
    #[error(
        "the certificates for etcd cannot be used: {0}; check --etcd-ca [ETCD_AUTH_CA], --etcd-client-cert [ETCD_AUTH_CLIENT_CERT] and --etcd-client-key [ETCD_AUTH_CLIENT_KEY]"
    )]
    Certificates(String),
}

/// Who reads.
struct Credentials {
    name: String,
    password: Secret,
}

/// One member of the cluster.
#[derive(Debug)]
struct Server {
    url: String,
    endpoint: Endpoint,
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

impl EtcdOptions {
    /// Whether a server is named.
    pub(crate) fn is_given(&self) -> bool {
        self.etcd_endpoints.is_some()
    }

    /// Checks what clap cannot see, or would repeat with a password in it.
    ///
    /// # Errors
    /// One line that names the options at odds.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.urls()?;
        belong_together(
            (self.etcd_username.is_some(), "--etcd-username [ETCD_AUTH_USERNAME]"),
            (self.etcd_password.is_some(), "--etcd-password [ETCD_AUTH_PASSWORD]"),
        )?;
        belong_together(
            (self.etcd_client_cert.is_some(), "--etcd-client-cert [ETCD_AUTH_CLIENT_CERT]"),
            (self.etcd_client_key.is_some(), "--etcd-client-key [ETCD_AUTH_CLIENT_KEY]"),
        )
    }

    /// The servers, in the order given; where no scheme is, with TLS if there is anything to do TLS with, as Dynamo has
    /// it. The refusal leaves the text out: there may be a password in it.
    fn urls(&self) -> Result<Vec<String>, String> {
        let refusal = || {
            "--etcd-endpoints [ETCD_ENDPOINTS] is no list of servers; write it like http://host:2379,http://other:2379"
                .to_owned()
        };
        let scheme = if self.etcd_ca.is_some() || self.etcd_client_cert.is_some() { "https" } else { "http" };
        let given = self.etcd_endpoints.as_ref().map_or(DEFAULT_SERVER, |endpoints| &endpoints.0);
        let urls = given.split(',').map(str::trim).filter(|url| !url.is_empty()).map(|url| {
            let url = if url.contains("://") { url.to_owned() } else { format!("{scheme}://{url}") };
            let uri: Uri = url.parse().map_err(|_| refusal())?;
            let authority = uri.authority().ok_or_else(refusal)?;
            if authority.as_str().contains('@') {
                return Err("--etcd-endpoints [ETCD_ENDPOINTS] holds a user; \
                     give it by --etcd-username [ETCD_AUTH_USERNAME] and --etcd-password [ETCD_AUTH_PASSWORD]"
                    .to_owned());
            }
            match uri.scheme_str() {
                Some(scheme @ ("http" | "https")) if names_a_server(authority) => Ok(format!("{scheme}://{authority}")),
                _ => Err(refusal()),
            }
        });
        let urls = urls.collect::<Result<Vec<_>, _>>()?;
        if urls.is_empty() { Err(refusal()) } else { Ok(urls) }
    }

    fn servers(&self) -> Result<Vec<Server>, EtcdError> {
        let urls = self.urls().map_err(EtcdError::Option)?;
        let unusable = |error: tonic::transport::Error| EtcdError::Certificates(with_causes(&error));
        let tls = self.tls()?;
        let server = |url: String| {
            let mut endpoint = Endpoint::from_shared(url.clone()).map_err(unusable)?.connect_timeout(CALL_TIMEOUT);
            if url.starts_with("https:") {
                endpoint = endpoint.tls_config(tls.clone()).map_err(unusable)?;
            }
            Ok(Server { url, endpoint })
        };
        urls.into_iter().map(server).collect()
    }

    fn tls(&self) -> Result<ClientTlsConfig, EtcdError> {
        let mut tls = ClientTlsConfig::new();
        tls = match &self.etcd_ca {
            Some(path) => {
                let pem = read("--etcd-ca [ETCD_AUTH_CA]", path)?;
                // It would make a client that trusts nobody, and complains about the network.
                if CertificateDer::pem_slice_iter(&pem).next().is_none_or(|found| found.is_err()) {
                    return Err(EtcdError::Certificates("the authority's file holds no PEM certificate".to_owned()));
                }
                tls.ca_certificate(Certificate::from_pem(pem))
            }
            None => tls.with_enabled_roots(),
        };
        if let (Some(certificate), Some(key)) = (&self.etcd_client_cert, &self.etcd_client_key) {
            let certificate = read("--etcd-client-cert [ETCD_AUTH_CLIENT_CERT]", certificate)?;
            tls = tls.identity(Identity::from_pem(certificate, read("--etcd-client-key [ETCD_AUTH_CLIENT_KEY]", key)?));
        }
        Ok(tls)
    }

    fn credentials(&self) -> Option<Credentials> {
        let (name, password) = self.etcd_username.as_ref().zip(self.etcd_password.as_ref())?;
        Some(Credentials { name: name.clone(), password: password.clone() })
    }
}

fn read(option: &'static str, path: &Path) -> Result<Vec<u8>, EtcdError> {
    std::fs::read(path).map_err(|source| EtcdError::File { option, path: path.display().to_string(), source })
}

/// Connects, then tells the registry what is in etcd until `stop`.
///
/// # Errors
/// No server can be reached at start, or one refuses. A connection lost later is no error: another is made, for ever.
pub(crate) async fn run(options: EtcdOptions, registry: Registry, stop: CancellationToken) -> Result<(), EtcdError> {
    let (servers, credentials) = (options.servers()?, options.credentials());
    let voice = Voice { servers, credentials, page: PAGE, registry };
    stop.run_until_cancelled(voice.speak(options.etcd_connect_timeout)).await.unwrap_or(Ok(()))
}

/// What to change where TLS is refused.
fn option(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::OfServer => {
            "--etcd-ca [ETCD_AUTH_CA], and that the certificate names the host in --etcd-endpoints [ETCD_ENDPOINTS]"
        }
        Refusal::OfClient => "--etcd-client-cert [ETCD_AUTH_CLIENT_CERT] and --etcd-client-key [ETCD_AUTH_CLIENT_KEY]",
    }
}

struct Voice {
    servers: Vec<Server>,
    credentials: Option<Credentials>,
    page: i64,
    registry: Registry,
}

/// A connection over which everything was listed.
struct Session<'a> {
    client: Client<'a>,
    changes: Streaming<WatchResponse>,
}

impl Voice {
    async fn speak(mut self, timeout: Duration) -> Result<(), EtcdError> {
        let Self { servers, credentials, page, registry } = &mut self;
        let (start, mut heard) = (Instant::now(), false);
        let (mut pauses, mut link) = (Pauses::new(), Link::default());
        // Servers that were tried, and those that TLS was refused by in a row.
        let (mut turn, mut refused) = (0, 0);
        registry.connected(false).await;
        loop {
            let server = &servers[turn % servers.len()];
            turn += 1;
            let failure = match open(server, credentials.as_ref(), page, registry).await {
                Ok(session) => {
                    if link.is_well() {
                        info!("Connected to etcd at {server}");
                    } else {
                        debug!("Connected to etcd at {server}");
                    }
                    registry.connected(true).await;
                    let since = Instant::now();
                    let failure = follow(session, registry).await;
                    registry.connected(false).await;
                    heard = true;
                    if since.elapsed() >= STEADY {
                        pauses = Pauses::new();
                    }
                    failure
                }
                Err(failure) => failure,
            };
            let cause = rpc::told(&failure);
            if !heard && rpc::is_refusal(&failure) {
                return Err(EtcdError::Refused { server: server.url.clone(), detail: cause });
            }
            // Of several servers one may show a bad certificate while another is heard.
            let refusal = tls::refusal(&failure);
            refused = if refusal.is_some() { refused + 1 } else { 0 };
            if let Some(refusal) = refusal.filter(|_| !heard && refused >= servers.len()) {
                return Err(EtcdError::Tls { server: server.url.clone(), detail: cause, option: option(refusal) });
            }
            let left = timeout.saturating_sub(start.elapsed());
            if !heard && left.is_zero() {
                let servers = servers.iter().map(|server| &*server.url).collect::<Vec<_>>().join(",");
                return Err(EtcdError::Unreachable { servers, timeout, last: cause });
            }
            match link.troubled(Instant::now().into_std()) {
                None => debug!("etcd at {server}: {cause}"),
                Some(more_since_last) if heard => {
                    warn!(more_since_last, "The connection to etcd at {server} was lost: {cause}; reconnecting");
                }
                Some(more_since_last) => {
                    let left = left.as_secs();
                    warn!(more_since_last, "etcd at {server} cannot be reached: {cause}; trying for another {left}s");
                }
            }
            let pause = pauses.grow();
            tokio::time::sleep(if heard { pause } else { pause.min(left) }).await;
        }
    }
}

/// Connects, lists, and starts to watch.
async fn open<'a>(
    server: &Server,
    credentials: Option<&'a Credentials>,
    page: &mut i64,
    registry: &mut Registry,
) -> Result<Session<'a>, Status> {
    let mut client = Client::connect(&server.endpoint, credentials).await?;
    let mut list = List { client: &mut client, page, registry, listed: HashSet::new(), revision: 0 };
    for prefix in REGISTRATION_PREFIXES {
        list.read(prefix).await?;
    }
    let mut prefixes = REGISTRATION_PREFIXES.to_vec();
    for prefix in OLD_PREFIXES {
        match list.read(prefix).await {
            Ok(()) => prefixes.push(prefix),
            // The keys below v1/ are all that a user needs to read for the releases from 0.6 on.
            Err(status) if rpc::is_denied(&status) => debug!("etcd at {server}: {prefix} is left out: {status}"),
            Err(status) => return Err(status),
        }
    }
    let List { listed, revision, .. } = list;
    registry.keep_only(&listed).await;
    let ranges = prefixes.into_iter().map(|prefix| (Bytes::from_static(prefix.as_bytes()), end_of(prefix)));
    let changes = client.watch(ranges, revision + 1).await?;
    Ok(Session { client, changes })
}

/// Tells the registry everything that there is at one revision.
struct List<'l, 'c> {
    client: &'l mut Client<'c>,
    page: &'l mut i64,
    registry: &'l mut Registry,
    listed: HashSet<String>,
    /// 0 before the first answer.
    revision: i64,
}

impl List<'_, '_> {
    async fn read(&mut self, prefix: &'static str) -> Result<(), Status> {
        let (mut key, range_end) = (Bytes::from_static(prefix.as_bytes()), end_of(prefix));
        loop {
            let (range_end, limit, revision) = (range_end.clone(), *self.page, self.revision);
            let request = RangeRequest { key: key.clone(), range_end, limit, revision, keys_only: false };
            let answer = match self.client.range(request).await {
                Err(status) if rpc::is_too_large(&status) && *self.page > 1 => {
                    *self.page /= 2;
                    continue;
                }
                answer => answer?,
            };
            if self.revision == 0 {
                self.revision = answer.header.map_or(0, |header| header.revision);
            }
            let last = answer.kvs.last().map(|entry| next_after(&entry.key));
            for entry in answer.kvs {
                self.listed.insert(put(self.registry, &entry).await);
            }
            match last {
                Some(next) if answer.more => key = next,
                _ => return Ok(()),
            }
        }
    }
}

/// Tells the registry every change until something goes wrong, and returns what.
async fn follow(mut session: Session<'_>, registry: &mut Registry) -> Status {
    let Session { client, changes } = &mut session;
    let mut probes = tokio::time::interval_at(Instant::now() + PROBE_INTERVAL, PROBE_INTERVAL);
    probes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let change = tokio::select! {
            change = changes.message() => change,
            _ = probes.tick() => match client.range(probe()).await {
                Ok(_) => continue,
                Err(status) => return status,
            },
        };
        let change = match change {
            Ok(Some(change)) => change,
            Ok(None) => return Status::unavailable("the server ended the watch"),
            Err(status) => return status,
        };
        if change.compact_revision > 0 {
            return Status::out_of_range("the revisions that were watched have been compacted");
        }
        if change.canceled {
            return Status::aborted(format!("the server ended the watch: {}", change.cancel_reason));
        }
        for event in change.events {
            let Some(entry) = event.kv else { continue };
            if event.r#type == rpc::DELETE {
                registry.remove(&String::from_utf8_lossy(&entry.key)).await;
            } else {
                put(registry, &entry).await;
            }
        }
    }
}

/// Tells the registry of an entry, and returns the key that it is known by.
async fn put(registry: &mut Registry, entry: &KeyValue) -> String {
    let key = String::from_utf8_lossy(&entry.key).into_owned();
    // One byte too many is as good as a megabyte, and is not kept.
    let value = &entry.value[..entry.value.len().min(MAX_MESSAGE + 1)];
    let is_old = OLD_PREFIXES.iter().any(|prefix| key.starts_with(prefix));
    let path = if is_old { &format!("{key}/{:x}", entry.lease) } else { &key };
    // A worker's id is its lease.
    let owner = (entry.lease != 0).then_some(WorkerId(entry.lease.cast_unsigned()));
    registry.put(&key, path, value, Standing::default(), owner).await;
    key
}

/// A key that the user may read, whether there or not. The answer takes the whole cluster's consent, a good token and a
/// server that is awake; and unlike a progress request of the watch, every proxy lets it through.
fn probe() -> RangeRequest {
    let key = Bytes::from_static(REGISTRATION_PREFIXES[0].as_bytes());
    RangeRequest { key, limit: 1, keys_only: true, ..RangeRequest::default() }
}

/// The first key beyond all that begin with `prefix`.
fn end_of(prefix: &str) -> Bytes {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end.into()
}

/// The first key after `key`.
fn next_after(key: &[u8]) -> Bytes {
    [key, b"\0"].concat().into()
}

#[cfg(test)]
mod tests;
