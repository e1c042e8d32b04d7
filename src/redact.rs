//! Text that is safe to show: no user, password or key of a URL is in it.

use tracing::{Level, Metadata};

/// The text with every URL in it cut down to scheme, host, port and path. What comes before a host's `@` and what follows
/// `?` or `#` may be secret, and libraries repeat whole URLs in their errors.
pub(crate) fn urls(text: &str) -> String {
    let mut parts = text.split("://");
    let mut shown = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        // No URL holds any of these.
        let end = part.find(|c: char| c.is_whitespace() || matches!(c, '"' | '<' | '>')).unwrap_or(part.len());
        let (url, rest) = part.split_at(end);
        let without_query = url.split(['?', '#']).next().unwrap_or_default();
        // A slash in a password that is not encoded makes a path of what follows it.
        let shown_url = without_query.rsplit('@').next().unwrap_or_default();
        shown.extend(["://", shown_url, rest]);
    }
    shown
}

/// Whether an event may be logged at all, whatever `DYN_LOG` asks for. Of the OpenTelemetry SDK only what it loses, such as
/// spans that find no room: that a push failed is said by the exporters, which do so once.
pub(crate) fn may_be_logged(metadata: &Metadata<'_>) -> bool {
    let is_of_sdk = metadata.target().starts_with("opentelemetry");
    !is_of_sdk || (*metadata.level() <= Level::WARN && !metadata.name().ends_with(".ExportError"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_keeps_scheme_host_port_and_path() {
        for (text, shown) in [
            ("http://collector:4318/v1/metrics", "http://collector:4318/v1/metrics"),
            ("http://user:geheim@collector:4318", "http://collector:4318"),
            ("https://us@er:ge@heim@[::1]:4318/v1?key=geheim#geheim", "https://[::1]:4318/v1"),
            ("https://collector?Api-Key=geheim/v1", "https://collector"),
            ("nats://u:geheim@a:4222,nats://geheim@b:4222", "nats://a:4222,nats://b:4222"),
            ("http://user:1/geheim@collector:4318/v1", "http://collector:4318/v1"),
            ("no URL", "no URL"),
            ("://", "://"),
        ] {
            assert_eq!(urls(text), shown);
        }
    }

    #[test]
    fn a_url_within_an_error_is_cut_down_and_the_rest_stays() {
        let error = r#"request for url (http://user:geheim@h:1/p?key=geheim) failed: "ws://geheim@x" refused"#;
        assert_eq!(urls(error), r#"request for url (http://h:1/p failed: "ws://x" refused"#);
    }
}
