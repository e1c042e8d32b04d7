//! Who asks NATS, and that nobody reads in the log how.

use crate::support::{Bridge, Nats, Program, command, refusal};

/// Everything that is said anywhere.
const TRACE: (&str, &str) = ("DYN_LOG", "trace");
/// Part of each secret below, however it is encoded.
const PLANTED: &str = "geheim";

async fn connects(nats: &str, environment: &[(&str, &str)]) -> Bridge {
    let bridge = Bridge::watching(nats, &[], environment).await;
    bridge.shows("dynamo_bridge_source_connected", &[("source", "nats")], 1.0).await;
    bridge
}

fn assert_silent_about(secret: &str, program: &Program) {
    let lines = program.lines();
    assert!(lines.iter().any(|line| line.contains("TRACE")), "{lines:?}");
    let told: Vec<_> = lines.iter().filter(|line| line.contains(secret)).collect();
    assert!(told.is_empty(), "{told:#?}");
}

#[tokio::test]
async fn a_user_and_password_in_the_url_are_sent_decoded_and_never_logged() {
    let nats = Nats::with_options(&["--user", "a@b", "--pass", "geheim/1,2"]).await;
    let url = nats.url_of("a%40b:geheim%2F1%2C2");
    let mut bridge = connects(&format!("{url},nats://127.0.0.1:1"), &[TRACE]).await;
    assert!(bridge.program.interrupt().await.success());
    assert_silent_about(PLANTED, &bridge.program);
}

#[tokio::test]
async fn a_token_in_the_url_is_sent() {
    let nats = Nats::with_options(&["--auth", "geheim-t0ken"]).await;
    let bridge = connects(&nats.url_of("geheim-t0ken"), &[TRACE]).await;
    assert_silent_about(PLANTED, &bridge.program);
}

#[tokio::test]
async fn an_option_says_who_asks_and_the_url_is_passed_over() {
    let nats = Nats::with_options(&["--user", "u", "--pass", "geheim"]).await;
    let environment = [("NATS_AUTH_USERNAME", "u"), ("NATS_AUTH_PASSWORD", "geheim"), TRACE];
    let bridge = connects(&nats.url_of("other:geheim2"), &environment).await;
    assert_silent_about(PLANTED, &bridge.program);
    let refused = refusal(&["--nats-server", &nats.url_of("u:geheim")], &[("NATS_AUTH_TOKEN", "geheim2")]).await;
    assert!(refused.ends_with("check --nats-token [NATS_AUTH_TOKEN]") && !refused.contains(PLANTED), "{refused}");
}

#[tokio::test]
async fn refused_credentials_are_named_by_where_they_came_from() {
    let nats = Nats::with_options(&["--user", "u", "--pass", "p"]).await;
    for (user, option) in [
        ("u:geheim", "check the user and password in --nats-server [NATS_SERVER]"),
        ("geheim", "check the token in --nats-server [NATS_SERVER]"),
    ] {
        let refused = refusal(&["--nats-server", &nats.url_of(user)], &[]).await;
        assert!(refused.contains("refused the credentials") && refused.contains(option), "{refused}");
        assert!(!refused.contains(PLANTED), "{refused}");
    }
    let refused = refusal(&["--nats-server", nats.url()], &[]).await;
    assert!(refused.contains("--nats-username [NATS_AUTH_USERNAME]"), "none is needed there: {refused}");
}

#[tokio::test]
async fn servers_that_name_different_users_are_refused_without_naming_them() {
    let options = ["--nats-server", "nats://u:geheim@127.0.0.1:1,nats://v:geheim@127.0.0.1:2"];
    let output = command(env!("CARGO_BIN_EXE_metrics"), &options, &[]).output().await.unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("names several users") && !text.contains(PLANTED), "{text}");
}

#[tokio::test]
async fn seeds_and_credentials_files_are_used_and_never_logged() {
    const SEED: &str = "SUAMLK2ZNL35WSMW37E7UD4VZ7ELPKW7DHC3BWBSD2GCZ7IUQQXZIORRBU";
    const KEY: &str = "UCK5N7N66OBOINFXAYC2ACJQYFSOD4VYNU6APEJTAVFZB2SVHLKGEW7L";
    let nats = Nats::configured(&format!("authorization {{ users = [ {{ nkey: {KEY} }} ] }}")).await;
    let bridge = connects(nats.url(), &[("NATS_AUTH_NKEY", SEED), TRACE]).await;
    assert_silent_about(SEED, &bridge.program);

    // Nobody knows its user: the file is read, its key signs, and the server refuses.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("user.creds");
    let jwt = "eyJnZWhlaW0.geheim.geheim";
    let text = format!(
        "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n-----BEGIN USER NKEY SEED-----\n{SEED}\n------END USER NKEY SEED------\n"
    );
    std::fs::write(&file, text).unwrap();
    let options = ["--host", "127.0.0.1", "--port", "0", "--nats-server", nats.url(), "--nats-credentials-file"];
    let options = [&options[..], &[file.to_str().unwrap()]].concat();
    let mut program = Program::start(&mut command(env!("CARGO_BIN_EXE_metrics"), &options, &[TRACE]));
    assert_eq!(program.ended().await.code(), Some(1));
    let last = program.lines().pop().unwrap();
    assert!(last.contains("check --nats-credentials-file [NATS_AUTH_CREDENTIALS_FILE]"), "{last}");
    assert_silent_about(SEED, &program);
    assert_silent_about(PLANTED, &program);
}
