//! Whether what is shown can be believed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::fleet::{Snapshot, Source};

/// Intervals without a refresh after which the numbers are old.
const MISSED_INTERVALS: u32 = 3;

/// What the bridge has to have to be ready.
#[derive(Debug)]
pub(crate) struct Readiness {
    /// Sources that are configured.
    sources: BTreeSet<Source>,
    interval: Duration,
}

impl Readiness {
    /// A cluster that nobody asked for, and that the bridge merely runs in, is no source that it has to have.
    pub(crate) fn of(config: &Config) -> Self {
        let voices = config.voices().unwrap_or_default();
        let sources = [
            (Source::Nats, voices.nats),
            (Source::Etcd, voices.etcd),
            (Source::Files, voices.files),
            (Source::Kubernetes, voices.kubernetes && config.needs_kubernetes()),
        ];
        let sources = sources.into_iter().filter_map(|(source, wanted)| wanted.then_some(source)).collect();
        Self { sources, interval: config.scrape.poll_interval }
    }

    /// Why the bridge is not ready, a line each; none where it is.
    pub(crate) fn failures(&self, fleet: &Snapshot, now: Instant) -> Vec<String> {
        let connections = &fleet.health.connections;
        let is_connected = |source| connections.get(source).is_some_and(|view| view.connected);
        // One that was heard once is missed, asked for or not.
        let heard = connections.iter().filter(|(_, view)| view.was_connected).map(|(source, _)| source);
        let expected: BTreeSet<_> = self.sources.iter().chain(heard).collect();
        let mut failures: Vec<_> = expected
            .into_iter()
            .filter(|source| !is_connected(source))
            .map(|source| format!("{}: not connected", source.as_str()))
            .collect();
        for (source, actions) in &fleet.health.denied {
            let source = source.as_str();
            failures.extend(actions.iter().map(|action| format!("{source}: no permission to {action}")));
        }
        if self.sources.contains(&Source::Nats) {
            let scraped = fleet.health.last_success.map(|at| at.elapsed().unwrap_or_default());
            failures.extend(self.too_old("nats: the last scrape that could ask the workers", scraped));
        }
        let refreshed = fleet.at.map(|at| now.saturating_duration_since(at));
        failures.extend(self.too_old("fleet: the last refresh", refreshed));
        failures
    }

    fn too_old(&self, what: &str, age: Option<Duration>) -> Option<String> {
        let allowed = self.interval.saturating_mul(MISSED_INTERVALS);
        match age {
            Some(age) if age <= allowed => None,
            Some(age) => {
                let [age, allowed] = [age, allowed].map(|time| time.as_secs_f64());
                Some(format!("{what} is {age:.1} s old, more than three poll intervals ({allowed:.1} s)"))
            }
            None => Some(format!("{what} has not come yet")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::fleet::ConnectionView;

    const CONNECTED: ConnectionView = ConnectionView { connected: true, was_connected: true, reconnects: 0 };
    const LOST: ConnectionView = ConnectionView { connected: false, ..CONNECTED };
    const NEVER: ConnectionView = ConnectionView { was_connected: false, ..LOST };

    fn readiness(sources: &[Source]) -> Readiness {
        Readiness { sources: sources.iter().copied().collect(), interval: Duration::from_secs(1) }
    }

    fn fleet(connections: &[(Source, ConnectionView)], now: Instant) -> Snapshot {
        let mut fleet = Snapshot { at: Some(now), ..Snapshot::default() };
        fleet.health.connections = connections.iter().copied().collect();
        fleet.health.last_success = Some(SystemTime::now());
        fleet
    }

    #[test]
    fn each_reason_names_what_is_missing() {
        let now = Instant::now();
        let readiness = readiness(&[Source::Nats, Source::Etcd]);
        let expected = [
            "nats: not connected",
            "etcd: not connected",
            "nats: the last scrape that could ask the workers has not come yet",
            "fleet: the last refresh has not come yet",
        ];
        assert_eq!(readiness.failures(&Snapshot::default(), now), expected);
        let both = fleet(&[(Source::Nats, CONNECTED), (Source::Etcd, CONNECTED)], now);
        assert_eq!(readiness.failures(&both, now), [] as [&str; 0]);
        let lost = fleet(&[(Source::Nats, CONNECTED), (Source::Etcd, LOST)], now);
        assert_eq!(readiness.failures(&lost, now), ["etcd: not connected"]);
    }

    #[test]
    fn what_is_denied_is_named() {
        let (now, readiness) = (Instant::now(), readiness(&[Source::Nats]));
        let mut fleet = fleet(&[(Source::Nats, CONNECTED)], now);
        fleet.health.denied.insert(Source::Nats, vec!["subscribe to a.b".into(), "publish to c".into()]);
        let expected = ["nats: no permission to subscribe to a.b", "nats: no permission to publish to c"];
        assert_eq!(readiness.failures(&fleet, now), expected);
        fleet.health.denied.insert(Source::Nats, Vec::new());
        assert_eq!(readiness.failures(&fleet, now), [] as [&str; 0]);
    }

    #[test]
    fn a_refresh_is_good_for_three_intervals() {
        let (now, readiness) = (Instant::now(), readiness(&[Source::Etcd]));
        let fleet = fleet(&[(Source::Etcd, CONNECTED)], now);
        let after = |milliseconds| readiness.failures(&fleet, now + Duration::from_millis(milliseconds));
        assert_eq!(after(3000), [] as [&str; 0]);
        assert_eq!(after(3200), ["fleet: the last refresh is 3.2 s old, more than three poll intervals (3.0 s)"]);
    }

    #[test]
    fn a_scrape_that_could_ask_is_good_for_three_intervals() {
        let (now, readiness) = (Instant::now(), readiness(&[Source::Nats]));
        let mut fleet = fleet(&[(Source::Nats, CONNECTED)], now);
        fleet.health.last_success = SystemTime::now().checked_sub(Duration::from_secs(60));
        let failures = readiness.failures(&fleet, now);
        assert!(failures.len() == 1 && failures[0].starts_with("nats: the last scrape"), "{failures:?}");
    }

    #[test]
    fn a_cluster_that_nobody_asked_for_is_missed_once_it_was_heard() {
        let (now, readiness) = (Instant::now(), readiness(&[Source::Nats]));
        let with = |kubernetes| fleet(&[(Source::Nats, CONNECTED), (Source::Kubernetes, kubernetes)], now);
        assert_eq!(readiness.failures(&with(NEVER), now), [] as [&str; 0]);
        assert_eq!(readiness.failures(&with(LOST), now), ["kubernetes: not connected"]);
    }
}
