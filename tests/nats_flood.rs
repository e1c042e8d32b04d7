//! More than the bridge can read, and a connection that does not last: neither fills the log.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::support::{Bridge, Exposition, Nats, eventually};

/// Its own lines of every level.
const DEBUG: (&str, &str) = ("DYN_LOG", "dynamo_metrics=debug,metrics=debug");
const LOST: (&str, [(&str, &str); 1]) = ("dynamo_bridge_messages_lost_total", [("source", "nats")]);
const BATCH: usize = 100_000;

fn lines_with(bridge: &Bridge, text: &str) -> Vec<String> {
    bridge.program.lines().into_iter().filter(|line| line.contains(text)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_events_is_counted_and_takes_a_line_a_minute() {
    let nats = Nats::start().await;
    let bridges = [Bridge::watching(nats.url(), &[], &[]).await, Bridge::watching(nats.url(), &[], &[DEBUG]).await];
    for bridge in &bridges {
        bridge.shows("dynamo_bridge_scrape_success", &[], 1.0).await;
    }
    let client = nats.client().await;
    let flood = tokio::spawn(async move {
        loop {
            for _ in 0..BATCH {
                client.publish("namespace.dynamo.kv_metrics", "?".into()).await.unwrap();
            }
            client.flush().await.unwrap();
        }
    });
    for bridge in &bridges {
        let lost = |metrics: &Exposition| metrics.value(LOST.0, &LOST.1).filter(|lost| *lost >= 10_000.0);
        bridge.eventually("messages are lost", lost).await;
    }
    flood.abort();
    for bridge in &bridges {
        let lines = bridge.program.lines();
        let too_slow = lines_with(bridge, "reads from NATS too slowly");
        // One a minute of a test that takes seconds.
        assert!((1..=10).contains(&too_slow.len()) && lines.len() < 100, "{}: {too_slow:?}", lines.len());
        assert!(too_slow[0].contains("more_since_last=0"), "{}", too_slow[0]);
    }
}

/// Answers as a server does, and hangs up.
async fn hang_up(client: TcpStream) -> std::io::Result<()> {
    let mut client = BufReader::new(client);
    client
        .write_all(b"INFO {\"server_id\":\"X\",\"version\":\"2.10.0\",\"max_payload\":1048576,\"headers\":true}\r\n")
        .await?;
    let mut line = String::new();
    while !line.starts_with("PING") {
        line.clear();
        client.read_line(&mut line).await?;
    }
    client.write_all(b"PONG\r\n").await
}

#[tokio::test]
async fn a_connection_that_never_lasts_takes_a_line_a_minute() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("nats://{}", listener.local_addr().unwrap());
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&connections);
    let server = tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            hang_up(client).await.ok();
        }
    });
    let bridge = Bridge::watching(&url, &[], &[DEBUG]).await;
    eventually("300 connections", || async {
        let made = connections.load(Ordering::Relaxed);
        if made >= 300 { Ok(()) } else { Err(made.to_string()) }
    })
    .await;
    server.abort();
    for text in ["The connection to NATS was lost", "Connected to NATS again"] {
        let lines = lines_with(&bridge, text);
        assert!((1..=10).contains(&lines.len()), "{lines:?}");
    }
    assert!(bridge.program.lines().len() < 100, "{:?}", bridge.program.lines());
    let reconnects = |metrics: &Exposition| {
        metrics.value("dynamo_bridge_source_reconnects_total", &[("source", "nats")]).filter(|made| *made >= 2.0)
    };
    bridge.eventually("reconnections are counted", reconnects).await;
}
