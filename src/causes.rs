//! What stands behind an error: the libraries' own texts often name only what was attempted.

use std::error::Error;

use crate::redact;

/// An error and everything behind it, in one line that says nothing twice, and no secret of a URL.
pub(crate) fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        next = cause.source();
    }
    redact::urls(&text)
}

/// The first line of what a server, a parser or a peer said, which may be a page long.
pub(crate) fn one_line(text: &str) -> String {
    const LONGEST: usize = 300;
    let line = text.lines().next().unwrap_or_default().trim_end();
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Told {
        text: &'static str,
        source: Option<Box<Told>>,
    }

    #[test]
    fn causes_follow_and_what_was_said_is_not_said_again() {
        let inner = Box::new(Told { text: "refused", source: None });
        let middle = Box::new(Told { text: "cannot connect", source: Some(inner) });
        let outer = Told { text: "cannot connect", source: Some(middle) };
        assert_eq!(with_causes(&outer), "cannot connect: refused");
        let leaky = Told { text: "cannot reach http://user:geheim@host/?key=geheim", source: None };
        assert_eq!(with_causes(&leaky), "cannot reach http://host/");
    }
}
