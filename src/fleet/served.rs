//! What NATS micro services count of each endpoint that they serve, counted again.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::WorkerKey;
use super::bounds::{PROCESSING, REQUESTS, Refusal};
use super::observation::{Process, Reason};
use super::recount::Recount;

/// What an endpoint of one process counted since that process started; `None` is unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EndpointCounts {
    /// Requests.
    pub requests: Option<u64>,
    /// Those of them that failed.
    pub errors: Option<u64>,
    /// Time that all of them took, in nanoseconds.
    pub processing: Option<u64>,
}

/// The counts of every endpoint, since each was first seen.
#[derive(Debug)]
pub(super) struct Served {
    endpoints: HashMap<WorkerKey, Endpoint>,
    /// Endpoints remembered at most.
    capacity: usize,
}

#[derive(Debug)]
struct Endpoint {
    process: Process,
    at: Instant,
    /// In the order of [`EndpointCounts`].
    counts: [Recount; 3],
}

impl Served {
    pub(super) fn new(capacity: usize) -> Self {
        Self { endpoints: HashMap::new(), capacity }
    }

    /// Takes what an endpoint counts now, or says why not.
    ///
    /// Of two processes that claim one key and both reply, the one that started later is counted, as it is shown.
    pub(super) fn take(
        &mut self,
        key: WorkerKey,
        process: Process,
        counts: EndpointCounts,
        now: Instant,
        ttl: Duration,
    ) -> Result<(), Refusal> {
        if self.endpoints.len() >= self.capacity && !self.endpoints.contains_key(&key) {
            let detail = format!("the statistics of an endpoint of {} are beyond what is remembered", key.id);
            return Err((Reason::TooManyWorkers, detail));
        }
        let id = key.id;
        let first = || Endpoint { process: process.clone(), at: now, counts: <[Recount; 3]>::default() };
        let endpoint = self.endpoints.entry(key).or_insert_with(first);
        let is_other = endpoint.process != process;
        if is_other && endpoint.is_shown(now, ttl) && endpoint.process.order() > process.order() {
            return Ok(());
        }
        (endpoint.process, endpoint.at) = (process, now);
        let values = [(counts.requests, REQUESTS), (counts.errors, REQUESTS), (counts.processing, PROCESSING)];
        let mut could_be = true;
        for (recount, (value, rate)) in endpoint.counts.iter_mut().zip(values) {
            could_be &= match value {
                Some(value) if is_other => recount.see_another(value, now, rate),
                Some(value) => recount.see(value, now, rate),
                None => true,
            };
        }
        let leap = || (Reason::OutOfRange, format!("the statistics of an endpoint of {id} leap: {counts:?}"));
        could_be.then_some(()).ok_or_else(leap)
    }

    /// Forgets what was not heard of for so long.
    pub(super) fn expire(&mut self, now: Instant, memory: Duration) {
        self.endpoints.retain(|_, endpoint| endpoint.is_shown(now, memory));
    }

    /// The counts of the endpoints that replied lately, in no order.
    pub(super) fn totals(&self, now: Instant, ttl: Duration) -> impl Iterator<Item = (&WorkerKey, EndpointCounts)> {
        let shown = self.endpoints.iter().filter(move |(_, endpoint)| endpoint.is_shown(now, ttl));
        shown.map(|(key, endpoint)| {
            let [requests, errors, processing] = endpoint.counts.map(|recount| recount.total());
            (key, EndpointCounts { requests, errors, processing })
        })
    }
}

impl Endpoint {
    fn is_shown(&self, now: Instant, ttl: Duration) -> bool {
        now.saturating_duration_since(self.at) < ttl
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::fleet::WorkerId;

    const TTL: Duration = Duration::from_secs(3);

    struct Clocked {
        served: Served,
        now: Instant,
    }

    impl Clocked {
        fn new() -> Self {
            Self { served: Served::new(2), now: Instant::now() }
        }

        /// The total of requests, after a process that started at that second has counted so many.
        fn see(&mut self, started: u64, requests: u64) -> Option<u64> {
            self.reply(1, started, requests);
            let totals = self.served.totals(self.now, TTL).find(|(key, _)| key.id.0 == 1);
            totals.and_then(|(_, counts)| counts.requests)
        }

        fn reply(&mut self, id: u64, started: u64, requests: u64) -> bool {
            let key = WorkerKey {
                namespace: "dynamo".into(),
                component: "backend".into(),
                endpoint: "generate".into(),
                id: WorkerId(id),
            };
            let process = Process {
                instance: format!("started at {started}").into(),
                started: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(started)),
            };
            let counts = EndpointCounts { requests: Some(requests), ..EndpointCounts::default() };
            self.served.take(key, process, counts, self.now, TTL).is_ok()
        }
    }

    #[test]
    fn the_first_sight_is_the_baseline_and_a_restart_counts_from_nothing() {
        let mut clocked = Clocked::new();
        let totals = [(10, 1_000), (10, 1_005), (20, 2), (20, 7)].map(|(started, count)| clocked.see(started, count));
        assert_eq!(totals, [0, 5, 7, 12].map(Some));
    }

    #[test]
    fn of_two_living_processes_the_later_one_is_counted_and_nothing_spikes() {
        let mut clocked = Clocked::new();
        let mut totals = Vec::new();
        for _ in 0..2 {
            totals.extend([clocked.see(20, 50), clocked.see(10, 1_000_000)]);
        }
        clocked.now += TTL;
        totals.extend([clocked.see(10, 1_000_000), clocked.see(10, 1_000_001)]);
        assert_eq!(
            totals,
            [0, 0, 0, 0, 0, 1].map(Some),
            "what a process counted before it is one to be counted is not added"
        );
    }

    #[test]
    fn an_endpoint_that_was_not_heard_for_a_while_goes_on_where_it_was() {
        let mut clocked = Clocked::new();
        clocked.see(10, 1_000);
        clocked.see(10, 1_005);
        clocked.now += TTL;
        assert_eq!(clocked.served.totals(clocked.now, TTL).count(), 0);
        assert_eq!(clocked.see(10, 1_009), Some(9));
        clocked.now += TTL * 2;
        clocked.served.expire(clocked.now, TTL * 2);
        assert_eq!(clocked.see(10, 1_010), Some(0), "forgotten, it is seen for the first time");
    }

    #[test]
    fn a_count_that_leaps_is_refused_and_the_next_honest_one_is_right() {
        let mut clocked = Clocked::new();
        let totals = [1_000, i64::MAX as u64, 1_005].map(|count| clocked.see(10, count));
        assert_eq!(totals, [0, 0, 5].map(Some));
        assert!(!clocked.reply(1, 10, i64::MAX as u64));
    }

    #[test]
    fn endpoints_are_bounded() {
        let mut clocked = Clocked::new();
        let taken = [1, 2, 3, 1].map(|id| clocked.reply(id, 10, 5));
        assert_eq!(taken, [true, true, false, true]);
    }
}
