use clap::Parser;

use super::*;

#[derive(Parser)]
struct Options {
    #[command(flatten)]
    etcd: EtcdOptions,
}

fn options(arguments: &[&str]) -> EtcdOptions {
    Options::parse_from([&["test"], arguments].concat()).etcd
}

fn urls(endpoints: &str) -> Result<Vec<String>, String> {
    options(&["--etcd-endpoints", endpoints]).urls()
}

#[test]
fn endpoints_are_a_list_with_or_without_a_scheme() {
    assert_eq!(urls("one:2379, https://two:2379/,").unwrap(), ["http://one:2379", "https://two:2379"]);
    assert_eq!(urls("[::1]:2379").unwrap(), ["http://[::1]:2379"]);
    assert_eq!(options(&[]).urls().unwrap(), ["http://localhost:2379"], "where Dynamo itself looks");
    let tls = options(&["--etcd-endpoints", "one:2379,http://two:2379", "--etcd-ca", "ca.pem"]);
    assert_eq!(tls.urls().unwrap(), ["https://one:2379", "http://two:2379"]);
}

#[test]
fn what_is_no_list_of_servers_is_refused_without_repeating_it() {
    for bad in ["", ",", "ftp://geheim:1", "http://", "geheim:x:y", "http://user:geheim@host:2379", "a b"] {
        let refused = urls(bad).unwrap_err();
        assert!(refused.contains("[ETCD_ENDPOINTS]") && !refused.contains("geheim"), "{refused}");
    }
}

#[test]
fn what_belongs_together_is_asked_for_together() {
    assert!(options(&["--etcd-username", "u"]).check().unwrap_err().contains("needs --etcd-password"));
    assert!(options(&["--etcd-password", "p"]).check().unwrap_err().contains("needs --etcd-username"));
    assert!(options(&["--etcd-client-cert", "c"]).check().unwrap_err().contains("needs --etcd-client-key"));
    assert!(options(&["--etcd-client-key", "k"]).check().unwrap_err().contains("needs --etcd-client-cert"));
    assert_eq!(options(&[]).check(), Ok(()));
}

#[test]
fn a_file_that_is_missing_or_no_certificate_is_named() {
    let missing = options(&["--etcd-endpoints", "host:2379", "--etcd-ca", "/nowhere/ca.pem"]).servers().unwrap_err();
    assert!(missing.to_string().starts_with("cannot read /nowhere/ca.pem: "), "{missing}");
    assert!(missing.to_string().ends_with("check --etcd-ca [ETCD_AUTH_CA]"), "{missing}");
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let none = options(&["--etcd-endpoints", "host:2379", "--etcd-ca", path]).servers().unwrap_err();
    assert!(none.to_string().contains("holds no PEM certificate"), "{none}");
    let identity = ["--etcd-client-cert", path, "--etcd-client-key", path];
    let none = options(&[&["--etcd-endpoints", "https://host:2379"][..], &identity].concat()).servers().unwrap_err();
    assert!(none.to_string().contains("ETCD_AUTH_CLIENT_KEY"), "{none}");
}

#[test]
fn ranges_hold_what_begins_alike_and_nothing_else() {
    assert_eq!(end_of("v1/mdc/"), "v1/mdc0");
    let next = next_after(b"v1/mdc/a");
    assert!(&next[..] > b"v1/mdc/a".as_slice() && &next[..] < b"v1/mdc/a\x01".as_slice());
}

#[test]
fn no_password_is_printed() {
    let options = options(&["--etcd-username", "user", "--etcd-password", "geheim", "--etcd-endpoints", "geheim:1"]);
    assert!(!format!("{options:?}").contains("geheim"));
}
