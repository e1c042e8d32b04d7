//! The web server.

use std::time::Duration;

use reqwest::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use reqwest::{Client, Method, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::support::{Bridge, Etcd, Nats, Port, Program, command, eventually, mock_worker};

#[tokio::test]
async fn metrics_are_text_of_version_0_0_4_gzipped_for_who_asks() {
    let nats = Nats::start().await;
    let _mock = mock_worker(nats.url(), &["--kv-active", "7", "--passes-per-second", "0"]).await;
    let bridge = Bridge::start(nats.url(), &[]).await;
    bridge.shows("llm_load_avg", &[], 7.0).await;
    let (client, url) = (Client::new(), format!("{}/metrics", bridge.url));

    for accept in ["application/openmetrics-text", "application/json", "*/*"] {
        let plain = client.get(&url).header("accept", accept).send().await.unwrap();
        assert_eq!(plain.headers()[CONTENT_TYPE], "text/plain; version=0.0.4", "{accept}");
        assert!(!plain.headers().contains_key(CONTENT_ENCODING));
    }
    let gzip = client.get(&url).header(ACCEPT_ENCODING, "gzip").send().await.unwrap();
    assert_eq!(gzip.headers()[CONTENT_ENCODING], "gzip");
    let mut text = String::new();
    std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(&gzip.bytes().await.unwrap()[..]), &mut text)
        .unwrap();
    assert!(text.contains("# HELP llm_kv_blocks_active Active KV cache blocks\n"), "{text}");
    assert!(text.ends_with('\n'));
}

#[tokio::test]
async fn head_is_get_without_the_body_and_the_rest_is_refused_plainly() {
    let nats = Nats::start().await;
    let bridge = Bridge::start(nats.url(), &[]).await;
    let client = Client::new();
    let head = client.head(format!("{}/metrics", bridge.url)).send().await.unwrap();
    assert_eq!(head.status(), StatusCode::OK);
    let length: usize = head.headers()[CONTENT_LENGTH].to_str().unwrap().parse().unwrap();
    assert!(length > 1000, "{length}");
    assert!(head.bytes().await.unwrap().is_empty());

    for (method, path, status) in [
        (Method::POST, "/metrics", StatusCode::METHOD_NOT_ALLOWED),
        (Method::DELETE, "/", StatusCode::METHOD_NOT_ALLOWED),
        (Method::GET, "/nothing", StatusCode::NOT_FOUND),
        (Method::GET, "/metrics/", StatusCode::NOT_FOUND),
        (Method::POST, "/readyz", StatusCode::METHOD_NOT_ALLOWED),
        (Method::GET, "/", StatusCode::OK),
        (Method::GET, "/livez", StatusCode::OK),
        (Method::GET, "/healthz", StatusCode::OK),
    ] {
        let response = client.request(method.clone(), format!("{}{path}", bridge.url)).send().await.unwrap();
        assert_eq!(response.status(), status, "{method} {path}");
        let html = response.headers()[CONTENT_TYPE].to_str().unwrap().starts_with("text/html");
        assert_eq!(html, path == "/" && status == StatusCode::OK, "{method} {path}");
        assert!(!response.text().await.unwrap().is_empty(), "{method} {path}");
    }
}

#[tokio::test]
async fn a_client_that_says_nonsense_or_nothing_keeps_nobody_else_from_the_metrics() {
    let nats = Nats::start().await;
    let mut bridge = Bridge::start(nats.url(), &[]).await;
    let address = bridge.url.trim_start_matches("http://").to_owned();
    let mut mute = Vec::new();
    for _ in 0..50 {
        mute.push(TcpStream::connect(&address).await.unwrap());
    }
    let mut nonsense = TcpStream::connect(&address).await.unwrap();
    nonsense.write_all(b"\x16\x03\x01 hello?\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    nonsense.read_to_end(&mut answer).await.unwrap();
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{answer:?}");
    bridge.metrics().await;
    assert!(bridge.program.interrupt().await.success(), "and it stops with them connected");
}

#[tokio::test]
async fn every_address_of_the_machine_answers_where_none_is_given() {
    let options = ["--discovery", "file", "--file-kv", "/nowhere", "--port", "0"];
    let mut bridge = Program::start(&mut command(env!("CARGO_BIN_EXE_metrics"), &options, &[]));
    let line = bridge.says("Listening on http://").await;
    let (address, port) = line.rsplit_once(':').unwrap();
    let has_ipv6 = std::net::TcpListener::bind("[::1]:0").is_ok();
    if !has_ipv6 {
        println!("left out: this machine has no IPv6");
    }
    let hosts = if has_ipv6 { &["127.0.0.1", "[::1]"][..] } else { &["127.0.0.1"] };
    assert!(!has_ipv6 || address.ends_with("http://[::]"), "{line}");
    dynamo_metrics::process::install_crypto();
    for host in hosts {
        assert_eq!(
            reqwest::get(format!("http://{host}:{port}/livez")).await.unwrap().status(),
            StatusCode::OK,
            "{host}"
        );
    }
    assert_eq!(healthcheck(&["--live", "--port", port]).await, (0, String::new()));
}

/// More clients than there is room for.
const CROWD: usize = 300;

/// A crowd that is already there, each doing the same; gone when it is dropped.
async fn crowd<F: Future<Output = ()> + Send + 'static>(bridge: &Bridge, behave: fn(TcpStream) -> F) -> JoinSet<()> {
    let address = bridge.url.trim_start_matches("http://");
    let mut crowd = JoinSet::new();
    for _ in 0..CROWD {
        crowd.spawn(behave(TcpStream::connect(address).await.unwrap()));
    }
    crowd
}

/// Honest pulls and health checks, each over a connection of its own, are served in time while the crowd is there.
async fn serves_others(bridge: &Bridge, crowd: &mut JoinSet<()>) {
    // The old limit of an idle connection was 75 s.
    let client = Client::builder().timeout(Duration::from_secs(40)).pool_max_idle_per_host(0).build().unwrap();
    let (_, port) = bridge.url.rsplit_once(':').unwrap();
    for path in ["/metrics", "/livez", "/metrics", "/readyz"] {
        let served = client.get(format!("{}{path}", bridge.url)).send().await;
        assert_eq!(served.unwrap_or_else(|error| panic!("{path}: {error:?}")).status(), StatusCode::OK);
    }
    eventually("metrics healthcheck is answered", || async {
        let (code, text) = healthcheck(&["--live", "--port", port]).await;
        if code == 0 { Ok(()) } else { Err(text) }
    })
    .await;
    bridge
        .eventually("connections were closed for others", |metrics| {
            metrics.value("dynamo_bridge_http_connections_evicted_total", &[]).filter(|evicted| *evicted > 0.0)
        })
        .await;
    crowd.shutdown().await;
}

async fn says_nothing(stream: TcpStream) {
    let _stream = stream;
    std::future::pending::<()>().await;
}

/// Asks again and again over the connection that it keeps, and comes back when that was closed.
async fn is_polite(mut stream: TcpStream) {
    let address = stream.peer_addr().unwrap();
    loop {
        let asked = stream.write_all(b"GET /livez HTTP/1.1\r\nHost: bridge\r\n\r\n").await;
        let mut answer = [0; 1024];
        let read = stream.read(&mut answer).await.unwrap_or_default();
        if asked.is_err() || read == 0 {
            stream = TcpStream::connect(address).await.unwrap();
        }
        sleep(Duration::from_millis(500)).await;
    }
}

async fn drips_a_head(mut stream: TcpStream) {
    for byte in b"GET /metrics HTTP/1.1\r\nX-Long: ".iter().chain(std::iter::repeat(&b'x')) {
        if stream.write_all(&[*byte]).await.is_err() {
            return;
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// Asks for far more than fits into any buffer.
async fn never_reads(mut stream: TcpStream) {
    let request = b"GET /metrics HTTP/1.1\r\nHost: bridge\r\n\r\n";
    while stream.write_all(request).await.is_ok() {}
}

#[tokio::test]
async fn a_crowd_of_clients_keeps_nobody_from_the_metrics() {
    let nats = Nats::start().await;
    let mut bridge = Bridge::start(nats.url(), &[]).await;
    bridge.shows("dynamo_bridge_scrape_success", &[], 1.0).await;
    serves_others(&bridge, &mut crowd(&bridge, says_nothing).await).await;
    serves_others(&bridge, &mut crowd(&bridge, is_polite).await).await;
    serves_others(&bridge, &mut crowd(&bridge, drips_a_head).await).await;
    serves_others(&bridge, &mut crowd(&bridge, never_reads).await).await;
    bridge.program.says("All 256 connections of the web server are taken").await;
    bridge
        .eventually("the crowd is gone", |metrics| {
            metrics.value("dynamo_bridge_http_connections", &[]).filter(|open| *open <= 8.0)
        })
        .await;
    let lines = bridge.program.lines();
    assert!(lines.iter().filter(|line| line.contains("256 connections")).count() < 10, "{lines:?}");
    assert!(bridge.program.interrupt().await.success());
}

#[tokio::test]
async fn idle_connections_that_take_the_last_descriptors_keep_nobody_from_the_metrics() {
    const FEW: usize = 64;
    dynamo_metrics::process::install_crypto();
    let program = env!("CARGO_BIN_EXE_metrics");
    let options = "--host 127.0.0.1 --port 0 --discovery file --file-kv /nowhere";
    let limited = format!("ulimit -n {FEW}; exec {program} {options}");
    let mut program = Program::start(&mut command("/bin/sh", &["-c", &limited], &[]));
    let line = program.says("Listening on ").await;
    let (_, url) = line.split_once("Listening on ").unwrap();
    let bridge = Bridge { program, url: url.to_owned() };
    let mut crowd = JoinSet::new();
    for _ in 0..2 * FEW {
        crowd.spawn(says_nothing(TcpStream::connect(url.trim_start_matches("http://")).await.unwrap()));
    }
    // The old limit of an idle connection was 75 s.
    let client = Client::builder().timeout(Duration::from_secs(40)).pool_max_idle_per_host(0).build().unwrap();
    for _ in 0..3 {
        let served = client.get(format!("{url}/livez")).send().await.unwrap();
        assert_eq!(served.status(), StatusCode::OK);
    }
    let said = bridge.program.lines().iter().filter(|line| line.contains("Cannot accept a connection")).count();
    assert!((1..5).contains(&said), "{:?}", bridge.program.lines());
}

#[tokio::test]
async fn a_pull_between_two_refreshes_gets_the_same_bytes() {
    let nats = Nats::start().await;
    let options = ["--namespace", "dynamo", "--poll-interval", "1h", "--worker-ttl", "3h"];
    let bridge = Bridge::watching(nats.url(), &options, &[]).await;
    bridge.shows("dynamo_bridge_scrape_success", &[], 1.0).await;
    assert_eq!(bridge.metrics().await.text, bridge.metrics().await.text);
}

/// The answer to `/readyz` and what `metrics healthcheck` makes of it, once they are as expected.
async fn is_ready(bridge: &Bridge, expected: Result<(), &str>) {
    let (status, code) = if expected.is_ok() { (StatusCode::OK, 0) } else { (StatusCode::SERVICE_UNAVAILABLE, 1) };
    let reason = expected.err().unwrap_or("ok");
    eventually(&format!("/readyz says {reason}"), || async {
        let response = reqwest::get(format!("{}/readyz", bridge.url)).await.unwrap();
        let (found, text) = (response.status(), response.text().await.unwrap());
        if found == status && text.contains(reason) { Ok(()) } else { Err(format!("{found}: {text}")) }
    })
    .await;
    let (_, port) = bridge.url.rsplit_once(':').unwrap();
    eventually(&format!("metrics healthcheck ends with {code}"), || async {
        let (found, text) = healthcheck(&["--port", port]).await;
        let told = code == 0 || (text.starts_with("error: ") && text.contains(reason) && text.lines().count() == 1);
        if found == code && told { Ok(()) } else { Err(format!("{found}: {text}")) }
    })
    .await;
    assert_eq!(healthcheck(&["--live", "--port", port]).await.0, 0, "alive all the while");
}

async fn healthcheck(options: &[&str]) -> (i32, String) {
    let options = [&["healthcheck"], options].concat();
    let output = command(env!("CARGO_BIN_EXE_metrics"), &options, &[]).output().await.unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[tokio::test]
async fn a_bridge_is_ready_while_every_configured_source_is_connected() {
    let (mut etcd, nats) = (Etcd::start().await, Nats::start().await);
    // Slow enough for a loaded machine to scrape in time.
    let options = ["--etcd-endpoints", &etcd.url(), "--poll-interval", "2s", "--worker-ttl", "6s"];
    let bridge = Bridge::watching(nats.url(), &options, &[]).await;
    is_ready(&bridge, Ok(())).await;
    etcd.kill().await;
    is_ready(&bridge, Err("etcd: not connected")).await;
    etcd.resume().await;
    is_ready(&bridge, Ok(())).await;
    drop(nats);
    is_ready(&bridge, Err("nats: not connected")).await;
}

#[tokio::test]
async fn a_bridge_that_never_reached_its_source_is_alive_and_not_ready() {
    let nobody = Port::reserve();
    let bridge = Bridge::watching(&format!("nats://{}", nobody.address()), &[], &[]).await;
    is_ready(&bridge, Err("nats: not connected")).await;
}

#[tokio::test]
async fn a_health_check_of_nobody_names_the_options_to_change() {
    let nobody = Port::reserve();
    let (code, text) = healthcheck(&["--host", "127.0.0.1", "--port", &nobody.number().to_string()]).await;
    assert_eq!(code, 1);
    assert!(text.contains(&nobody.address()) && text.contains("check --host and --port"), "{text}");
}
