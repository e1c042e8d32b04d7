//! Where NATS is, and who asks there.

#![expect(clippy::doc_markdown, reason = "doc comments of options are their help texts")]

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::config::{Secret, duration};

/// Where Dynamo itself looks for NATS.
const DEFAULT_NATS_SERVER: &str = "nats://localhost:4222";

/// The NATS server, under the names that Dynamo itself reads.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "NATS")]
pub(crate) struct NatsOptions {
    /// Server URL, or several with commas between [default: nats://localhost:4222 where no other way to find workers is
    /// configured]
    #[arg(long, env = "NATS_SERVER", value_name = "URL")]
    nats_server: Option<Secret>,
    /// How long to try before giving up at start; later the bridge reconnects for ever
    #[arg(long, default_value = "30s", value_name = "DURATION", value_parser = duration)]
    pub(super) nats_connect_timeout: Duration,
    /// User
    #[arg(long, env = "NATS_AUTH_USERNAME", value_name = "USER")]
    pub(super) nats_username: Option<String>,
    /// Password of the user
    #[arg(long, env = "NATS_AUTH_PASSWORD", value_name = "PASSWORD")]
    pub(super) nats_password: Option<Secret>,
    /// Token
    #[arg(long, env = "NATS_AUTH_TOKEN", value_name = "TOKEN")]
    pub(super) nats_token: Option<Secret>,
    /// NKey seed
    #[arg(long, env = "NATS_AUTH_NKEY", value_name = "SEED")]
    pub(super) nats_nkey: Option<Secret>,
    /// File with a JWT and its NKey seed
    #[arg(long, env = "NATS_AUTH_CREDENTIALS_FILE", value_name = "FILE")]
    pub(super) nats_credentials_file: Option<PathBuf>,
}

/// One or more NATS server addresses.
pub(super) struct ServerUrls(pub Vec<async_nats::ServerAddr>);

impl ServerUrls {
    /// The refusal leaves the text out: there may be a password in it.
    fn parse(text: &str) -> Result<Self, String> {
        let refusal = || "--nats-server [NATS_SERVER] is no URL; write it like nats://host:4222".to_owned();
        let urls = text.split(',').map(str::trim).filter(|url| !url.is_empty());
        let urls = urls.map(str::parse).collect::<Result<Vec<_>, _>>().map_err(|_| refusal())?;
        if urls.is_empty() { Err(refusal()) } else { Ok(Self(urls)) }
    }
}

impl fmt::Display for ServerUrls {
    /// Without user and password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, url) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}://{}:{}", url.scheme(), url.host(), url.port())?;
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
    pub(super) fn servers(&self) -> Result<ServerUrls, String> {
        ServerUrls::parse(self.nats_server.as_ref().map_or(DEFAULT_NATS_SERVER, |server| &server.0))
    }

    /// Checks what clap cannot see, or would repeat with a password in it.
    ///
    /// # Errors
    /// One line that names the options at odds.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.servers()?;
        match (&self.nats_username, &self.nats_password) {
            (Some(_), None) => {
                Err("--nats-username [NATS_AUTH_USERNAME] needs --nats-password [NATS_AUTH_PASSWORD]".to_owned())
            }
            (None, Some(_)) => {
                Err("--nats-password [NATS_AUTH_PASSWORD] needs --nats-username [NATS_AUTH_USERNAME]".to_owned())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_shown_without_user_and_password() {
        let urls = ServerUrls::parse("nats://user:geheim@localhost:4222,tls://other").unwrap();
        assert_eq!(urls.to_string(), "nats://localhost:4222,tls://other:4222");
    }
}
