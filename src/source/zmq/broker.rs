//! A broker, to which all publishers connect, and which announces none of them. It is named by an option, or by discovery.

use std::str::FromStr;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::endpoint::Endpoint;
use super::listener::{Hearing, Listener, Shared};
use super::{Listening, MAX_ENDPOINTS};
use crate::fleet::Reason;
use crate::target::{NAMESPACE, NamespaceFilter};

/// The addresses at which brokers hand out events. Each has all events: one is listened to at a time.
///
/// That holds of the addresses that publishers are given together, by the option or by one record of discovery. Of several
/// records each is listened to: a publisher sends to those that were there when it started.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Broker(Vec<Endpoint>);

impl FromStr for Broker {
    type Err = String;

    /// `xsub=tcp://host:port;... , xpub=tcp://host:port;...`
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refusal = || "write it like xsub=tcp://host:5555,xpub=tcp://host:5556".to_owned();
        let lists = text.split(',').map(str::trim).map(|list| list.split_once('=').ok_or_else(refusal));
        let mut endpoints = Vec::new();
        for list in lists {
            match list? {
                ("xsub", _) => {}
                ("xpub", list) => {
                    let addresses = list.split(';').map(str::trim).filter(|address| !address.is_empty());
                    endpoints.extend(addresses.map(str::parse::<Endpoint>).collect::<Result<Vec<_>, _>>()?);
                }
                _ => return Err(refusal()),
            }
        }
        if endpoints.is_empty() { Err(refusal()) } else { Ok(Self(endpoints)) }
    }
}

impl Broker {
    /// As a record of discovery has it.
    ///
    /// # Errors
    /// What is wrong with the addresses.
    pub(super) fn announced(addresses: &[String]) -> Result<Self, (Reason, String)> {
        if addresses.len() > MAX_ENDPOINTS {
            return Err((Reason::TooManyEntries, format!("more than {MAX_ENDPOINTS} endpoints")));
        }
        let endpoints = addresses.iter().map(|address| address.parse()).collect::<Result<_, _>>();
        endpoints.map(Self).map_err(|error| (Reason::Malformed, error))
    }

    /// `unnamed` is the namespace of messages that name none.
    pub(super) fn listen(
        &self,
        watched: NamespaceFilter,
        unnamed: Option<Arc<str>>,
        shared: Arc<Shared>,
        stop: CancellationToken,
    ) -> Listening {
        let mut prefixes = vec![prefix(&watched)];
        if unnamed.is_some() {
            prefixes.extend(shared.topics.iter().map(|topic| topic.as_str().to_owned()));
        }
        let number = shared.copies().join();
        let hearing = Hearing::Broker { number, watched, unnamed };
        Listening::start(Listener::new(hearing, prefixes, shared), self.0.clone(), stop)
    }
}

/// What the subjects of watched namespaces start with, encoded as 1.4 on does. Worker generations are named after their
/// namespace, so the name has no end here.
///
/// Up to 1.3 a message behind a broker names its topic and nothing else (seen of 0.9.1, 1.0.2, 1.2.1 and 1.3.1): it is taken
/// for one of the namespace that the broker is announced in, else of the only one that is watched, and its worker's id
/// decides.
fn prefix(namespace: &NamespaceFilter) -> String {
    match namespace {
        NamespaceFilter::All => NAMESPACE.to_owned(),
        NamespaceFilter::Named(name) => {
            let plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
            NAMESPACE.chars().chain(name.chars().take_while(plain)).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_of_dynamos_spelling_are_found() {
        let broker = "xsub=tcp://a:5555;tcp://b:5555 , xpub=tcp://a:5556;tcp://b:5556".parse::<Broker>().unwrap();
        assert_eq!(broker.0.iter().map(ToString::to_string).collect::<Vec<_>>(), ["tcp://a:5556", "tcp://b:5556"]);
        for text in ["", "tcp://a:1", "xsub=tcp://a:1", "xpub=", "xpub=a:1", "pub=tcp://a:1", "xsub=,xpub=tcp://a"] {
            assert!(text.parse::<Broker>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_prefix_brings_every_spelling_of_a_namespace() {
        for (name, prefix) in [("dynamo", "namespace.dynamo"), ("a.b", "namespace.a"), ("*", "namespace.")] {
            assert_eq!(super::prefix(&name.parse().unwrap()), prefix);
        }
    }
}
