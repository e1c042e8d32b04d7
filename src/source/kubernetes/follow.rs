//! The objects of one kind: a list, then a watch from that very moment on, so that nothing is missed in between.
//!
//! Whatever ends a watch with an error - a server gone or mute, a version that is too old, a right taken away - is answered
//! in one way: a new list, after a pause. The watcher of kube's own runtime does not tell when a watch stands.

use std::error::Error;
use std::fmt;
use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt;
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use kube::client::AuthError;
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::super::patience::Pauses;

use crate::causes::{one_line, with_causes};

/// Objects asked for at once.
const PAGE: u32 = 500;
/// The server ends a watch after this: a watch in which nothing happens must be told from a server that is mute.
pub(super) const WATCH: Duration = Duration::from_secs(30);
/// After this a connection counts as a good one. A watch that ends sooner is not renewed sooner.
const STEADY: Duration = Duration::from_secs(1);

/// What is followed.
pub(super) struct Kind<K, T> {
    pub(super) api: Api<K>,
    pub(super) labels: Option<&'static str>,
    /// What of an object is of interest.
    pub(super) read: fn(K) -> T,
}

/// What is heard of the objects of one kind.
pub(super) enum Heard<T> {
    /// All that there are, by name.
    Listed(Vec<(String, T)>),
    /// From now on every change is heard.
    Live,
    /// One is there, or has changed.
    Applied(String, T),
    /// One is gone.
    Deleted(String),
    /// Changes are not heard any more.
    Failed(Failure),
}

/// What the server, or the way to it, refused.
#[derive(Debug)]
pub(super) struct Failure {
    /// What was tried, in Kubernetes' own words.
    pub(super) verb: &'static str,
    pub(super) error: kube::Error,
}

impl Failure {
    /// The HTTP status, where the server answered.
    pub(super) fn status(&self) -> Option<u16> {
        match &self.error {
            kube::Error::Api(status) => Some(status.code),
            _ => None,
        }
    }

    /// The error, or what stands behind it where its own words say nothing.
    pub(super) fn cause(&self) -> &(dyn Error + 'static) {
        match &self.error {
            kube::Error::Service(error) => error.as_ref(),
            kube::Error::HyperError(error) => error,
            error => error,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.error {
            kube::Error::Api(status) if !status.message.is_empty() => f.write_str(&one_line(&status.message)),
            kube::Error::Api(status) => write!(f, "HTTP status {}", status.code),
            _ => f.write_str(&said(self.cause())),
        }
    }
}

/// The error in one line, without what is secret in a kubeconfig: the command that is to say who asks, and its environment.
pub(super) fn said(error: &(dyn Error + 'static)) -> String {
    let mut causes = std::iter::successors(Some(error), |error| (*error).source());
    match causes.find_map(|cause| cause.downcast_ref()) {
        Some(AuthError::AuthExecRun { out, .. }) => {
            let complaint = one_line(String::from_utf8_lossy(&out.stderr).trim_start());
            format!("the user's exec command ended with {}: {complaint}", out.status)
        }
        _ => one_line(&with_causes(error)),
    }
}

/// Follows for ever; ends when nobody hears it any more.
pub(super) async fn follow<K, T, M>(kind: Kind<K, T>, told: mpsc::Sender<M>, message: fn(Heard<T>) -> M)
where
    K: Resource + Clone + DeserializeOwned + fmt::Debug,
{
    let mut pauses = Pauses::new();
    loop {
        let mut steady = false;
        let result = list_and_watch(&kind, &mut steady, |heard| told.send(message(heard))).await;
        let Err(Ended::Failed(failure)) = result else { return };
        if told.send(message(Heard::Failed(failure))).await.is_err() {
            return;
        }
        if steady {
            pauses = Pauses::new();
        }
        sleep(pauses.grow()).await;
    }
}

enum Ended {
    Failed(Failure),
    Unheard,
}

impl<M> From<mpsc::error::SendError<M>> for Ended {
    fn from(_: mpsc::error::SendError<M>) -> Self {
        Self::Unheard
    }
}

async fn list_and_watch<K, T, M, F>(
    kind: &Kind<K, T>,
    steady: &mut bool,
    tell: impl Fn(Heard<T>) -> F,
) -> Result<(), Ended>
where
    K: Resource + Clone + DeserializeOwned + fmt::Debug,
    F: Future<Output = Result<(), mpsc::error::SendError<M>>>,
{
    let failed = |verb| move |error| Ended::Failed(Failure { verb, error });
    let (objects, mut version) = list(kind).await.map_err(failed("list"))?;
    tell(Heard::Listed(objects)).await?;
    let timeout = u32::try_from(WATCH.as_secs()).ok();
    let parameters = WatchParams {
        label_selector: kind.labels.map(str::to_owned),
        timeout,
        bookmarks: true,
        ..WatchParams::default()
    };
    loop {
        let since = Instant::now();
        let mut events = pin!(kind.api.watch(&parameters, &version).await.map_err(failed("watch"))?);
        tell(Heard::Live).await?;
        while let Some(event) = events.next().await {
            let heard = match event.map_err(failed("watch"))? {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    version = object.resource_version().unwrap_or_default();
                    Heard::Applied(object.name_any(), (kind.read)(object))
                }
                WatchEvent::Deleted(object) => {
                    version = object.resource_version().unwrap_or_default();
                    Heard::Deleted(object.name_any())
                }
                WatchEvent::Bookmark(mark) => {
                    version = mark.metadata.resource_version;
                    continue;
                }
                WatchEvent::Error(status) => return Err(failed("watch")(kube::Error::Api(status))),
            };
            tell(heard).await?;
        }
        sleep(STEADY.saturating_sub(since.elapsed())).await;
        *steady = true;
    }
}

/// Everything that there is at one version, and which.
async fn list<K, T>(kind: &Kind<K, T>) -> kube::Result<(Vec<(String, T)>, String)>
where
    K: Resource + Clone + DeserializeOwned + fmt::Debug,
{
    let mut parameters =
        ListParams { label_selector: kind.labels.map(str::to_owned), limit: Some(PAGE), ..ListParams::default() };
    let mut objects = Vec::new();
    loop {
        let page = kind.api.list(&parameters).await?;
        objects.extend(page.items.into_iter().map(|object| (object.name_any(), (kind.read)(object))));
        parameters.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
        if parameters.continue_token.is_none() {
            return Ok((objects, page.metadata.resource_version.unwrap_or_default()));
        }
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    fn told(error: kube::Error) -> (Option<u16>, String) {
        let failure = Failure { verb: "list", error };
        (failure.status(), failure.to_string())
    }

    #[test]
    fn a_failure_is_told_in_one_line() {
        let status = |message: &str| kube::Error::Api(Status::failure(message, "x").with_code(502).boxed());
        assert_eq!(told(status("bad gateway")), (Some(502), "bad gateway".to_owned()));
        assert_eq!(told(status("")).1, "HTTP status 502");
        assert_eq!(told(status("<html>\n<body>")).1, "<html>");
        let page = told(status(&"ä".repeat(1000))).1;
        assert_eq!((page.chars().count(), page.ends_with("ä...")), (303, true));
        let refused = std::io::Error::other(std::io::Error::other("refused"));
        assert_eq!(told(kube::Error::Service(Box::new(refused))), (None, "refused".to_owned()));
    }
}
