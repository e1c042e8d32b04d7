//! What the NATS server does not let the bridge do. It says so once, by the way, and lets the connection be.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use crate::throttle::Throttle;

/// Denials kept: more than the bridge does different things.
const MAX_DENIED: usize = 64;
/// Characters of a subject kept. Those of the bridge are shorter.
const MAX_SUBJECT: usize = 200;

/// Where every service of the account is asked at once.
pub(super) const STATS: &str = "$SRV.STATS";
const INFO: &str = "$SRV.INFO.>";
const INBOX: &str = "_INBOX.>";

/// What takes a permission, as it would be granted: with `>` for the parts that differ from one time to the next.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Action {
    Publish(String),
    Subscribe(String),
}

impl Action {
    /// To ask the workers.
    pub(super) fn ask() -> Self {
        Self::Publish(STATS.to_owned())
    }

    /// To ask one of them where it belongs.
    pub(super) fn ask_where() -> Self {
        Self::Publish(INFO.to_owned())
    }

    /// To hear answers.
    pub(super) fn hear_answers() -> Self {
        Self::Subscribe(INBOX.to_owned())
    }

    /// What a complaint of the server, `Permissions Violation for Publish to "a.b"`, is about.
    pub(super) fn denied_by(complaint: &str) -> Option<Self> {
        let (verb, rest) = complaint.strip_prefix("Permissions Violation for ")?.split_once(" to \"")?;
        let subject: String = rest.split('"').next()?.chars().take(MAX_SUBJECT).collect();
        let granted = [INFO, INBOX].into_iter().find(|granted| subject.starts_with(granted.trim_end_matches('>')));
        let subject = granted.map_or(subject, str::to_owned);
        match verb {
            "Publish" => Some(Self::Publish(subject)),
            "Subscription" => Some(Self::Subscribe(subject)),
            _ => None,
        }
    }

    /// For the log.
    pub(super) fn consequence(&self) -> &'static str {
        match self {
            Self::Publish(subject) if subject == STATS => "no worker can be asked for its load",
            Self::Publish(subject) if subject == INFO => "no service can be asked which component it is",
            Self::Subscribe(subject) if subject == INBOX => "no answer of a worker is received",
            Self::Publish(_) => "nobody hears what it says there",
            Self::Subscribe(_) => "the events there are not heard",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Publish(subject) => write!(f, "publish to {subject}"),
            Self::Subscribe(subject) => write!(f, "subscribe to {subject}"),
        }
    }
}

/// What is denied, as far as is known. Nothing says when that ends: whoever tries again without a complaint is granted it.
#[derive(Debug, Default)]
pub(super) struct Denials {
    /// When the server last complained.
    denied: BTreeMap<Action, Instant>,
    complaints: BTreeMap<Action, Throttle>,
}

impl Denials {
    /// The server complained: whether that is to be said, and how often it was not since the last time.
    pub(super) fn add(&mut self, action: &Action, now: Instant) -> Option<u64> {
        if self.complaints.len() >= MAX_DENIED && !self.complaints.contains_key(action) {
            return None;
        }
        self.denied.insert(action.clone(), now);
        self.complaints.entry(action.clone()).or_default().due(now)
    }

    /// It was tried at that time, and whoever complains of that has done so by now.
    pub(super) fn tried(&mut self, action: &Action, at: Instant) {
        if self.denied.get(action).is_some_and(|complained| *complained < at) {
            self.denied.remove(action);
        }
    }

    /// All is tried anew.
    pub(super) fn clear(&mut self) {
        self.denied.clear();
    }

    pub(super) fn contains(&self, action: &Action) -> bool {
        self.denied.contains_key(action)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Action> {
        self.denied.keys()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn complaints_of_nats_servers_are_read() {
        let denied = |complaint: &str| Action::denied_by(complaint).map(|action| action.to_string());
        for (complaint, action) in [
            (r#"Permissions Violation for Publish to "$SRV.STATS""#, "publish to $SRV.STATS"),
            (r#"Permissions Violation for Publish to "$SRV.INFO.a_b.X1""#, "publish to $SRV.INFO.>"),
            (r#"Permissions Violation for Subscription to "_INBOX.X1.*""#, "subscribe to _INBOX.>"),
            (r#"Permissions Violation for Subscription to "a.*.b" (sid "3")"#, "subscribe to a.*.b"),
            (r#"Permissions Violation for Subscription to "a" using queue "q""#, "subscribe to a"),
        ] {
            assert_eq!(denied(complaint).as_deref(), Some(action));
        }
        for other in
            ["Stale Connection", "Permissions Violation for Publish to a", "Permissions Violation for Tea to \"a\""]
        {
            assert_eq!(denied(other), None, "{other}");
        }
    }

    #[test]
    fn what_is_tried_again_without_a_complaint_is_granted() {
        let (mut denials, action, start) = (Denials::default(), Action::ask(), Instant::now());
        let at = |second| start + Duration::from_secs(second);
        assert_eq!(denials.add(&action, at(1)), Some(0));
        assert_eq!(denials.add(&action, at(2)), None, "said already");
        denials.tried(&action, at(2));
        assert!(denials.contains(&action), "the complaint may be about that");
        denials.tried(&action, at(3));
        assert!(!denials.contains(&action));
    }

    #[test]
    fn a_server_that_denies_ever_more_subjects_fills_no_memory() {
        let mut denials = Denials::default();
        for number in 0..1000 {
            denials.add(&Action::Publish(number.to_string()), Instant::now());
        }
        assert_eq!((denials.denied.len(), denials.complaints.len()), (MAX_DENIED, MAX_DENIED));
    }
}
