//! Where NATS is, and who asks there.

#![expect(clippy::doc_markdown, reason = "doc comments of options are their help texts")]

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use async_nats::ServerAddr;
use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args};
use percent_encoding::percent_decode_str;

use super::tls;
use crate::config::{Secret, belong_together, duration};

/// Where Dynamo itself looks for NATS.
const DEFAULT_NATS_SERVER: &str = "nats://localhost:4222";
pub(super) const CREDENTIALS_FILE: &str = "--nats-credentials-file [NATS_AUTH_CREDENTIALS_FILE]";

/// The NATS server, under the names that Dynamo itself reads.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "NATS")]
pub(crate) struct NatsOptions {
    /// Server URL, or several with commas between [default: nats://localhost:4222 where no other way to find workers is
    /// configured]. A user and password (nats://user:password@host) or a token (nats://token@host) in it, percent-encoded,
    /// is sent to all of them, unless one of the options below says who asks
    #[arg(long, env = "NATS_SERVER", value_name = "URL")]
    nats_server: Option<Secret>,
    /// How long to try before giving up at start; later the bridge reconnects for ever
    #[arg(long, env = "NATS_STARTUP_CONNECT_TIMEOUT_SECONDS", default_value = "30s", value_name = "DURATION",
        value_parser = duration)]
    pub(super) nats_connect_timeout: Duration,
    /// User
    #[arg(long, env = "NATS_AUTH_USERNAME", value_name = "USER")]
    nats_username: Option<String>,
    /// Password of the user
    #[arg(long, env = "NATS_AUTH_PASSWORD", value_name = "PASSWORD")]
    nats_password: Option<Secret>,
    /// Token, where there is no user
    #[arg(long, env = "NATS_AUTH_TOKEN", value_name = "TOKEN")]
    nats_token: Option<Secret>,
    /// NKey seed, where there is no token either
    #[arg(long, env = "NATS_AUTH_NKEY", value_name = "SEED")]
    nats_nkey: Option<Secret>,
    /// File with a JWT and its NKey seed, where there is none of them
    #[arg(long, env = "NATS_AUTH_CREDENTIALS_FILE", value_name = "FILE")]
    nats_credentials_file: Option<PathBuf>,
    #[command(flatten)]
    pub(super) tls: TlsOptions,
}

/// TLS, which is done where the URL says tls://, where the server wants it, and where any of these is set.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "NATS")]
pub(super) struct TlsOptions {
    /// File with the certificates to trust [default: the system's]
    #[arg(long, env = "NATS_TLS_CA_CERT_PATH", value_name = "FILE")]
    pub(super) nats_ca: Option<PathBuf>,
    /// File with the certificate to show
    #[arg(long, env = "NATS_TLS_CLIENT_CERT_PATH", value_name = "FILE")]
    pub(super) nats_client_cert: Option<PathBuf>,
    /// File with its key
    #[arg(long, env = "NATS_TLS_CLIENT_KEY_PATH", value_name = "FILE")]
    pub(super) nats_client_key: Option<PathBuf>,
    /// Take any certificate of the server's: for tests alone
    #[arg(long, env = "NATS_TLS_INSECURE", action = ArgAction::SetTrue, value_parser = BoolishValueParser::new())]
    pub(super) nats_tls_insecure: bool,
    /// Begin with TLS, for a server with handshake_first, instead of waiting for what it says
    #[arg(long)]
    pub(super) nats_tls_first: bool,
}

impl TlsOptions {
    /// Whether anything is said of certificates.
    pub(super) fn is_given(&self) -> bool {
        self.nats_ca.is_some() || self.nats_client_cert.is_some() || self.nats_tls_insecure
    }
}

/// Who asks.
#[derive(Debug, Clone)]
pub(super) enum Credentials {
    User(String, Secret),
    Token(Secret),
    NKey(Secret),
    File(PathBuf),
}

/// One or more NATS server addresses, without user and password: the client's own log shows them.
pub(super) struct Servers {
    pub(super) addresses: Vec<ServerAddr>,
    /// The one user that the URLs name.
    user: Option<UrlUser>,
}

/// What stands before the `@` of a URL, decoded.
#[derive(PartialEq)]
struct UrlUser {
    name: String,
    password: Option<String>,
}

impl Servers {
    /// The refusals leave the text out: there may be a password in it.
    fn parse(text: &str) -> Result<Self, String> {
        let mut servers = Self { addresses: Vec::new(), user: None };
        for url in text.split(',').map(str::trim).filter(|url| !url.is_empty()) {
            let (address, user) = read(url).ok_or(NO_URL)?;
            if user.is_some() && servers.user.is_some() && servers.user != user {
                return Err(TWO_USERS.to_owned());
            }
            servers.addresses.push(address);
            servers.user = user.or(servers.user);
        }
        if servers.addresses.is_empty() { Err(NO_URL.to_owned()) } else { Ok(servers) }
    }
}

const NO_URL: &str = "--nats-server [NATS_SERVER] is no URL; write it like nats://host:4222, or tls://host:4222, and with \
    a user like nats://user:password@host:4222, where %40 stands for @, %2F for / and %2C for a comma";
const TWO_USERS: &str = "--nats-server [NATS_SERVER] names several users, and all servers are asked as one; say which by \
    --nats-username [NATS_AUTH_USERNAME] and --nats-password [NATS_AUTH_PASSWORD], and leave them out of the URLs";

/// An address, and who is to ask there. `None` for what is no URL that NATS is asked by.
fn read(url: &str) -> Option<(ServerAddr, Option<UrlUser>)> {
    let address: ServerAddr = url.parse().ok().filter(|address: &ServerAddr| !address.is_websocket())?;
    let decode = |part| percent_decode_str(part).decode_utf8().map(Cow::into_owned);
    let name = address.username().map(decode).transpose().ok()?;
    let password = address.password().map(decode).transpose().ok()?;
    let is_named = name.is_some() || password.is_some();
    let user = is_named.then(|| UrlUser { name: name.unwrap_or_default(), password });
    let mut url = address.into_inner();
    url.set_username("").and_then(|()| url.set_password(None)).ok()?;
    url.set_path("");
    url.set_query(None);
    url.set_fragment(None);
    Some((ServerAddr::from_url(url).ok()?, user))
}

impl fmt::Display for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, url) in self.addresses.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            // The client takes the brackets away.
            let (open, close) = if url.host().contains(':') { ("[", "]") } else { ("", "") };
            write!(f, "{comma}{}://{open}{}{close}:{}", url.scheme(), url.host(), url.port())?;
        }
        Ok(())
    }
}

impl NatsOptions {
    /// Whether a server is named.
    pub(crate) fn is_given(&self) -> bool {
        self.nats_server.is_some()
    }

    /// The servers, in the order given.
    pub(super) fn servers(&self) -> Result<Servers, String> {
        Servers::parse(self.nats_server.as_ref().map_or(DEFAULT_NATS_SERVER, |server| &server.0))
    }

    /// Who asks, and the option that says so. The options come in the order in which Dynamo takes them, and before the user
    /// in the URL, which Dynamo does not read.
    pub(super) fn credentials(&self, servers: &Servers) -> Option<(Credentials, &'static str)> {
        if let (Some(user), Some(password)) = (&self.nats_username, &self.nats_password) {
            return Some((
                Credentials::User(user.clone(), password.clone()),
                "--nats-username [NATS_AUTH_USERNAME] and --nats-password [NATS_AUTH_PASSWORD]",
            ));
        }
        if let Some(token) = &self.nats_token {
            return Some((Credentials::Token(token.clone()), "--nats-token [NATS_AUTH_TOKEN]"));
        }
        if let Some(seed) = &self.nats_nkey {
            return Some((Credentials::NKey(seed.clone()), "--nats-nkey [NATS_AUTH_NKEY]"));
        }
        if let Some(path) = &self.nats_credentials_file {
            return Some((Credentials::File(path.clone()), CREDENTIALS_FILE));
        }
        let UrlUser { name, password } = servers.user.as_ref()?;
        let secret = |text: &String| Secret(text.clone());
        Some(match password {
            Some(password) => (
                Credentials::User(name.clone(), secret(password)),
                "the user and password in --nats-server [NATS_SERVER]",
            ),
            None => {
                (Credentials::Token(secret(name)), "the token in --nats-server [NATS_SERVER], or give it a password")
            }
        })
    }

    /// Checks what clap cannot see, or would repeat with a password in it.
    ///
    /// # Errors
    /// One line that names the options at odds.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.servers()?;
        belong_together(
            (self.nats_username.is_some(), "--nats-username [NATS_AUTH_USERNAME]"),
            (self.nats_password.is_some(), "--nats-password [NATS_AUTH_PASSWORD]"),
        )?;
        belong_together(
            (self.tls.nats_client_cert.is_some(), tls::CLIENT_CERT),
            (self.tls.nats_client_key.is_some(), tls::CLIENT_KEY),
        )
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        nats: NatsOptions,
    }

    fn asks(options: &[&str]) -> Option<(Credentials, &'static str)> {
        let Command { nats } = Command::parse_from([&["program"], options].concat());
        nats.credentials(&nats.servers().unwrap())
    }

    #[test]
    fn without_a_server_it_is_the_one_where_dynamo_itself_looks() {
        let Command { nats } = Command::parse_from(["program"]);
        assert_eq!(nats.servers().unwrap().to_string(), "nats://localhost:4222");
    }

    #[test]
    fn no_user_or_password_is_left_in_the_address_of_a_server() {
        let urls = "nats://user:geheim@localhost:4222/?geheim,tls://geheim@other";
        let servers = Servers::parse(&urls.replace("user:", "geheim@")).err();
        assert!(servers.is_some_and(|refusal| !refusal.contains("geheim")), "two users");
        for url in urls.split(',') {
            let servers = Servers::parse(url).unwrap();
            assert!(!format!("{:?} {servers}", servers.addresses).contains("geheim"), "{url}");
        }
        assert_eq!(
            Servers::parse("nats://u:p@localhost:4222,tls://other,[::1]:1").unwrap().to_string(),
            "nats://localhost:4222,tls://other:4222,nats://[::1]:1"
        );
    }

    #[test]
    fn a_user_or_token_in_a_url_is_decoded_and_the_same_for_all_servers() {
        let url = "nats://a%40b:p%2Fw%C3%BCrd@one,two";
        let Some((Credentials::User(user, password), _)) = asks(&["--nats-server", url]) else { panic!("a user") };
        assert_eq!((&*user, &*password.0), ("a@b", "p/würd"));
        let Some((Credentials::Token(token), option)) = asks(&["--nats-server", "s3%2Ccret@one"]) else {
            panic!("a token")
        };
        assert_eq!(token.0, "s3,cret");
        assert!(option.contains("NATS_SERVER"), "{option}");
        assert!(asks(&["--nats-server", "nats://one"]).is_none());
        for refused in ["nats://%ff@one", "nats://a:b@one,nats://c:d@two", "ws://one", "http://one", "nats://a:b/c@one"]
        {
            assert!(Servers::parse(refused).is_err(), "{refused}");
        }
    }

    #[test]
    fn the_options_come_before_the_user_in_the_url_and_in_dynamos_order() {
        let url = ["--nats-server", "nats://u:p@one"];
        let file = [&url[..], &["--nats-credentials-file", "f"]].concat();
        assert!(matches!(asks(&file), Some((Credentials::File(_), _))));
        let nkey = [&file[..], &["--nats-nkey", "n"]].concat();
        assert!(matches!(asks(&nkey), Some((Credentials::NKey(_), _))));
        let token = [&nkey[..], &["--nats-token", "t"]].concat();
        assert!(matches!(asks(&token), Some((Credentials::Token(_), _))));
        let user = [&token[..], &["--nats-username", "n", "--nats-password", "s"]].concat();
        assert!(matches!(asks(&user), Some((Credentials::User(name, _), _)) if name == "n"));
    }
}
