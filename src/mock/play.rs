//! The stream of requests in time, and what is said of it on its way out.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tracing::{info, warn};

use super::requests::{Said, Stream};
use super::voice::{Message, Voice};
use super::{MockConfig, nats, zmq};
use crate::fleet::Report;

/// The load of each worker, for its STATS. The releases that say it there have one rank.
#[derive(Debug, Default)]
pub(super) struct Loads(Vec<watch::Sender<Report>>);

impl Loads {
    /// Of engines that have done nothing yet.
    pub(super) fn new(voice: &Voice, stream: &Stream, workers: usize) -> Self {
        Self((0..workers).map(|worker| watch::Sender::new(voice.load(worker, stream.load(worker)).1)).collect())
    }

    pub(super) fn of(&self, worker: usize) -> watch::Receiver<Report> {
        self.0[worker].subscribe()
    }
}

/// The plane that events leave by.
pub(super) enum Outlet {
    Nats(nats::Outlet),
    Zmq(zmq::Outlet),
}

pub(super) struct Play {
    pub(super) stream: Stream,
    pub(super) voice: Voice,
    pub(super) loads: Loads,
    pub(super) outlet: Outlet,
}

impl Play {
    /// Runs until it is dropped.
    pub(super) async fn run(&mut self, config: &MockConfig) {
        let target = &config.target;
        if target.passes_per_second <= 0.0 {
            return std::future::pending().await;
        }
        if target.requests.is_some() {
            self.is_listened_to().await;
        }
        let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / target.passes_per_second));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut done = false;
        loop {
            ticks.tick().await;
            let said = self.stream.tick();
            self.say(said).await;
            if self.stream.is_done() && !done {
                done = true;
                info!("All requests have ended: {}", self.stream.ledger());
            }
            // Where it cannot keep up the next tick is due already, and the registrations are to be kept all the same.
            tokio::task::yield_now().await;
        }
    }

    /// Takes leave, with what all of it added up to.
    pub(super) async fn end(self) {
        info!("Altogether, with the tokens of requests that have ended: {}", self.stream.ledger());
        if let Outlet::Nats(outlet) = self.outlet {
            outlet.leave().await;
        }
    }

    async fn is_listened_to(&self) {
        let listeners = match &self.outlet {
            Outlet::Nats(outlet) => outlet.is_asked().await,
            Outlet::Zmq(outlet) => outlet.is_subscribed_to().await,
        };
        info!("Somebody listens: {listeners}");
    }

    async fn say(&mut self, said: Vec<Said>) {
        for said in &said {
            if let Said::Load(engine, load) = said {
                let (worker, report) = self.voice.load(*engine, load.clone());
                if let Some(shown) = self.loads.0.get(worker) {
                    shown.send_replace(report);
                }
            }
        }
        for message in self.voice.messages(said) {
            self.send(&message).await;
        }
    }

    async fn send(&self, message: &Message) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = u64::try_from(since.as_millis()).unwrap_or_default();
        match &self.outlet {
            Outlet::Nats(outlet) => {
                let subject = self.voice.subject(message.lane);
                if let Err(error) = outlet.client.publish(subject, message.bytes(now).into()).await {
                    warn!("An event was not published: {error}");
                }
            }
            Outlet::Zmq(outlet) => outlet.publish(message, now),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::task::Poll;

    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;
    use crate::fleet::WorkerId;

    const TURNS: usize = 50;

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn one_that_cannot_keep_up_lets_others_have_their_turn_after_each_tick() {
        let options = ["mock_worker", "--plane", "zmq", "--workers", "200", "--passes-per-second", "100000"];
        let config = MockConfig::from_args(options.map(str::to_owned)).unwrap();
        let workers: Vec<_> = (1..=200).map(WorkerId).collect();
        let voice = Voice::new(&config, &workers, &mut StdRng::seed_from_u64(7));
        let stream = || Stream::new(config.shape(), StdRng::seed_from_u64(7));
        let outlet = Outlet::Zmq(zmq::open(&config, &workers, &voice).await.unwrap());
        let mut play = Play { stream: stream(), voice, loads: Loads::default(), outlet };
        let (mut run, mut turns) = (Box::pin(play.run(&config)), 0);
        poll_fn(|context| {
            turns += 1;
            assert!(run.as_mut().poll(context).is_pending());
            if turns < TURNS { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
        drop(run);
        let mut of_as_many_ticks = stream();
        for _ in 0..TURNS {
            of_as_many_ticks.tick();
        }
        let requests = play.stream.ledger().requests;
        assert!((1..=of_as_many_ticks.ledger().requests).contains(&requests), "{requests}");
    }
}
