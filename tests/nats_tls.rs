//! NATS over TLS.

use crate::support::{Authority, Bridge, Etcd, Exposition, Nats, dynamo, mock_worker, peers, refusal, worker};

const ANY_USER: &str = "authorization { users = [ { user: u, password: geheim } ] }";

/// A server with a certificate of that authority, and further lines in its `tls` block.
async fn server(authority: &Authority, more: &str) -> Nats {
    showing(authority.server(), more).await
}

async fn showing((certificate, key): (String, String), more: &str) -> Nats {
    Nats::configured(&format!("tls {{ cert_file: {certificate:?}, key_file: {key:?}, {more} }}")).await
}

fn schemes(nats: &Nats) -> [String; 2] {
    let address = nats.url().split_once("://").unwrap().1;
    [format!("nats://{address}"), format!("tls://{address}")]
}

async fn hears_a_worker(nats: &str, options: &[&str], environment: &[(&str, &str)]) -> Bridge {
    let _mock = mock_worker(nats, &[options, &["--kv-active", "77"]].concat()).await;
    let bridge = Bridge::watching(nats, options, environment).await;
    bridge.shows("llm_kv_blocks_active", &[], 77.0).await;
    bridge
}

#[tokio::test]
async fn a_server_with_tls_is_heard_whichever_scheme_its_url_has() {
    let authority = Authority::new();
    let nats = server(&authority, "").await;
    for url in schemes(&nats) {
        hears_a_worker(&url, &["--nats-ca", &authority.certificate()], &[]).await;
    }
    let of_dynamo = authority.certificate();
    let bridge = Bridge::watching(nats.url(), &[], &[("NATS_TLS_CA_CERT_PATH", &of_dynamo)]).await;
    bridge.shows("dynamo_bridge_source_connected", &[("source", "nats")], 1.0).await;
}

#[tokio::test]
async fn a_real_worker_and_the_bridge_read_the_same_variables() {
    const RELEASE: &str = "1.6.1";
    if !peers::can_run_dynamo(&[RELEASE]).await {
        return;
    }
    let authority = Authority::new();
    let (nats, etcd, ca) = (server(&authority, "").await, Etcd::start().await, authority.certificate());
    let [_, url] = schemes(&nats);
    let environment = [("NATS_SERVER", &*url), ("NATS_TLS_CA_CERT_PATH", &ca)];
    let target = ["--component", "backend", "--endpoint", "generate"];
    let bridge = Bridge::finding(&target, &environment).await;
    let real = dynamo::over_tls(RELEASE, &etcd.url(), &url, &ca, &["--kv-active", "42", "--flip"]).await;
    let active = |metrics: &Exposition| metrics.value("llm_kv_blocks_active", &worker(&real.id));
    bridge.eventually("its load", |metrics| active(metrics).filter(|active| [42.0, 43.0].contains(active))).await;
}

#[tokio::test]
async fn mutual_tls_needs_certificate_and_key() {
    let authority = Authority::new();
    let ca = authority.certificate();
    let nats = server(&authority, &format!("ca_file: {ca:?}, verify: true")).await;
    let (certificate, key) = authority.client();
    let options = ["--nats-ca", &ca, "--nats-client-cert", &certificate, "--nats-client-key", &key];
    hears_a_worker(nats.url(), &options, &[]).await;

    let refused = refusal(&["--nats-server", nats.url(), "--nats-ca", &ca], &[]).await;
    assert!(refused.contains("check --nats-client-cert [NATS_TLS_CLIENT_CERT_PATH]"), "{refused}");
}

#[tokio::test]
async fn a_server_that_wants_tls_first_gets_it() {
    let authority = Authority::new();
    let ca = authority.certificate();
    let nats = server(&authority, "handshake_first: true").await;
    hears_a_worker(nats.url(), &["--nats-ca", &ca, "--nats-tls-first"], &[]).await;
    let options = ["--nats-server", nats.url(), "--nats-ca", &ca, "--nats-connect-timeout", "1s"];
    let refused = refusal(&options, &[]).await;
    assert!(refused.contains("needs --nats-tls-first"), "{refused}");

    let plain = Nats::start().await;
    let options = ["--nats-server", plain.url(), "--nats-connect-timeout", "1s", "--nats-tls-first"];
    let refused = refusal(&options, &[]).await;
    assert!(refused.contains("does not begin with TLS"), "{refused}");
}

/// At once: with a timeout of a day the test would not end.
#[tokio::test]
async fn a_certificate_of_an_unknown_issuer_or_for_no_host_ends_the_start_at_once() {
    let authority = Authority::new();
    let nats = server(&authority, "").await;
    let no_host = showing(authority.client(), "").await;
    let (stranger, ca) = (Authority::new(), authority.certificate());
    let long = ["--nats-connect-timeout", "24h", "--nats-server"];
    for options in
        [&[nats.url()][..], &[nats.url(), "--nats-ca", &stranger.certificate()], &[no_host.url(), "--nats-ca", &ca]]
    {
        let refused = refusal(&[&long[..], options].concat(), &[]).await;
        assert!(refused.contains("check --nats-ca [NATS_TLS_CA_CERT_PATH]"), "{options:?}: {refused}");
    }
}

#[tokio::test]
async fn insecure_takes_any_certificate_and_says_so() {
    let authority = Authority::new();
    let nats = server(&authority, "").await;
    let mut bridge = hears_a_worker(nats.url(), &["--nats-tls-insecure"], &[]).await;
    bridge.program.says("is not verified: --nats-tls-insecure [NATS_TLS_INSECURE]").await;
    let bridge = Bridge::watching(nats.url(), &[], &[("NATS_TLS_INSECURE", "True")]).await;
    bridge.shows("dynamo_bridge_source_connected", &[("source", "nats")], 1.0).await;
    let refused = refusal(&["--nats-server", nats.url()], &[("NATS_TLS_INSECURE", "0")]).await;
    assert!(refused.contains("--nats-ca"), "{refused}");
}

#[tokio::test]
async fn no_credentials_travel_in_the_clear_where_certificates_are_configured() {
    let authority = Authority::new();
    let nats = Nats::configured(ANY_USER).await;
    let (ca, url) = (authority.certificate(), nats.url_of("u:geheim"));
    let options = ["--nats-server", &url, "--nats-ca", &ca, "--nats-connect-timeout", "1s"];
    let refused = refusal(&options, &[]).await;
    assert!(refused.contains("does not begin with TLS"), "{refused}");
}

#[tokio::test]
async fn files_that_are_missing_or_something_else_are_named_with_their_option() {
    let authority = Authority::new();
    let (ca, (certificate, key)) = (authority.certificate(), authority.client());
    let stranger = Authority::new();
    let (_, strange_key) = stranger.client();
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
    for (options, said) in [
        (&["--nats-ca", "/nowhere"][..], "check --nats-ca [NATS_TLS_CA_CERT_PATH]"),
        (&["--nats-ca", text], "it holds no PEM certificate; check --nats-ca [NATS_TLS_CA_CERT_PATH]"),
        (
            &["--nats-client-cert", text, "--nats-client-key", &key],
            "check --nats-client-cert [NATS_TLS_CLIENT_CERT_PATH]",
        ),
        (
            &["--nats-client-cert", &certificate, "--nats-client-key", &ca],
            "no PEM private key; check --nats-client-key",
        ),
        (&["--nats-client-cert", &certificate, "--nats-client-key", &strange_key], "check --nats-client-cert"),
    ] {
        let refused = refusal(&[&["--nats-server", "nats://127.0.0.1:1"], options].concat(), &[]).await;
        assert!(refused.contains(said), "{options:?}: {refused}");
    }
}
