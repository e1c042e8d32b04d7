//! The web server: `/metrics` for Prometheus, health, and a page that says so.

mod connections;

use std::io::ErrorKind;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, VARY};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, info, warn};

use crate::exposition::Exposition;
use crate::fleet::Snapshot;
use crate::readiness::Readiness;
use crate::throttle::Throttle;
pub(crate) use connections::Connections;
use connections::{Slot, WatchedStream};

/// The one format that is served.
const TEXT_FORMAT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4");
/// Time until another attempt to accept a connection, where that failed; and where another connection ends for it.
const REFUSED_PAUSE: Duration = Duration::from_millis(500);
const EVICTED_PAUSE: Duration = Duration::from_millis(10);
/// A client must send its next request's head within this, idle time included.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// After this a connection is closed behind its current response, so that nobody holds one for ever.
const MAX_AGE: Duration = Duration::from_secs(10 * 60);
/// How long a response under way may still take once its connection is to close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// What there is to serve.
pub(crate) struct Pages {
    pub(crate) exposition: Exposition,
    pub(crate) fleet: watch::Receiver<Arc<Snapshot>>,
    pub(crate) readiness: Readiness,
    /// Of the line that there is no text.
    pub(crate) trouble: Mutex<Throttle>,
}

/// Serves until `stop`, then finishes the responses under way.
pub(crate) async fn serve(listener: TcpListener, pages: Pages, connections: Arc<Connections>, stop: CancellationToken) {
    if let Ok(address) = listener.local_addr() {
        info!("Listening on http://{address}");
    }
    let app = router(Arc::new(pages));
    let (tasks, mut trouble) = (TaskTracker::new(), Throttle::default());
    let accept = async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let slot = connections.enter().await;
                    tasks.spawn(connection(stream, app.clone(), slot, stop.clone()));
                }
                Err(error) => refused(&error, &connections, &mut trouble).await,
            }
        }
    };
    stop.run_until_cancelled(accept).await;
    tasks.close();
    tasks.wait().await;
}

/// Accepting fails while the process has no descriptors left: one connection gives way, since trying again at once would only
/// burn time. A client that has gone already is no failure.
async fn refused(error: &std::io::Error, connections: &Connections, trouble: &mut Throttle) {
    if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset)
    {
        return;
    }
    if let Some(more_since_last) = trouble.due(Instant::now()) {
        warn!(more_since_last, "Cannot accept a connection: {error}");
    }
    tokio::time::sleep(if connections.shrink() { EVICTED_PAUSE } else { REFUSED_PAUSE }).await;
}

async fn connection(stream: TcpStream, app: Router, slot: Slot, stop: CancellationToken) {
    let (app, client) = (TowerToHyperService::new(app), &slot.client);
    let service = service_fn(|request| {
        client.asks();
        let answer = app.call(request);
        async {
            let answer = answer.await;
            client.is_answered();
            answer
        }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(WatchedStream { stream, client: Arc::clone(client) }), service);
    let mut serving = pin!(serving);
    let ended = tokio::select! {
        ended = serving.as_mut() => Some(ended),
        () = stop.cancelled() => None,
        () = client.evicted.cancelled() => return debug!("A connection is closed for a newcomer"),
        () = tokio::time::sleep(MAX_AGE) => None,
    };
    let ended = if let Some(ended) = ended {
        ended
    } else {
        serving.as_mut().graceful_shutdown();
        tokio::time::timeout(CLOSE_TIMEOUT, serving).await.unwrap_or(Ok(()))
    };
    if let Err(error) = ended {
        debug!("A connection ended: {error}");
    }
}

fn router(pages: Arc<Pages>) -> Router {
    Router::new()
        .route("/", get(Html(include_str!("http/index.html"))))
        .route("/metrics", get(metrics))
        .route("/readyz", get(readyz))
        // That it answers is all: a restart mends no lost connection, and a task that fails ends the process.
        .route("/livez", get("ok\n"))
        .route("/healthz", get("ok\n"))
        .fallback(|| async { (StatusCode::NOT_FOUND, "not found; try /metrics\n") })
        .method_not_allowed_fallback(|| async { (StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n") })
        .with_state(pages)
}

async fn readyz(State(pages): State<Arc<Pages>>) -> Response {
    let fleet = Arc::clone(&pages.fleet.borrow());
    match &pages.readiness.failures(&fleet, Instant::now())[..] {
        [] => "ok\n".into_response(),
        failures => (StatusCode::SERVICE_UNAVAILABLE, failures.join("\n") + "\n").into_response(),
    }
}

async fn metrics(State(pages): State<Arc<Pages>>, headers: HeaderMap) -> Response {
    let gzip = accepts_gzip(&headers);
    let body = match pages.exposition.current(gzip).await {
        Ok(body) => body,
        Err(error) => {
            let mut trouble = pages.trouble.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(more_since_last) = trouble.due(Instant::now()) {
                error!(more_since_last, "{error}");
            }
            return (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response();
        }
    };
    let length = HeaderValue::from(body.len());
    let mut response = ([(CONTENT_TYPE, TEXT_FORMAT), (CONTENT_LENGTH, length)], body).into_response();
    response.headers_mut().insert(VARY, HeaderValue::from_static("accept-encoding"));
    if gzip {
        response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    response
}

/// Whether `Accept-Encoding` names gzip, or `*`, with a weight above zero (RFC 9110, section 12.5.3).
fn accepts_gzip(headers: &HeaderMap) -> bool {
    let mut any = false;
    for coding in
        headers.get_all(ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok()).flat_map(|v| v.split(','))
    {
        let mut parts = coding.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let weight = parts.find_map(|part| part.strip_prefix("q=")).map_or(Ok(1.0), str::parse::<f32>);
        let wanted = weight.is_ok_and(|weight| weight > 0.0);
        if name.eq_ignore_ascii_case("gzip") {
            return wanted;
        }
        any |= name == "*" && wanted;
    }
    any
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn gzip_is_sent_to_those_who_ask_for_it() {
        let accepts = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_str(value).unwrap());
            accepts_gzip(&headers)
        };
        for wanted in ["gzip", "deflate, GZIP", "gzip;q=0.5, identity", "br, *;q=0.1"] {
            assert!(accepts(wanted), "{wanted}");
        }
        for unwanted in ["", "identity", "gzip;q=0", "gzip;q=0, *", "gzipped", "*;q=0", "gzip;q=x"] {
            assert!(!accepts(unwanted), "{unwanted}");
        }
        assert!(!accepts_gzip(&HeaderMap::new()));
    }

    #[tokio::test]
    async fn an_answer_under_way_is_finished_when_the_server_stops_and_nothing_is_asked_any_more() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stop, asked, ready) = (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
        let (came, waits) = (asked.clone(), ready.clone());
        let handler = move || async move {
            came.cancel();
            waits.cancelled().await;
            "all of it"
        };
        let slot = Arc::new(Connections::default()).enter().await;
        let stream = listener.accept().await.unwrap().0;
        let serving = tokio::spawn(connection(stream, Router::new().route("/", get(handler)), slot, stop.clone()));
        client.write_all(b"GET / HTTP/1.1\r\nHost: it\r\n\r\n").await.unwrap();
        asked.cancelled().await;
        stop.cancel();
        ready.cancel();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("all of it"), "{answer}");
        serving.await.unwrap();
    }
}
