//! Room for connections: so many at a time, of which the one that is idle longest gives way to a newcomer.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::throttle::Throttle;

/// Connections at once. A handful of Prometheus servers need one each.
const MAX_CONNECTIONS: usize = 256;
/// A newcomer has so long to ask: it must not give way to the next one before its request has come. Who has been answered and
/// asks again within this time is no Prometheus, and could be busy without end.
const ARRIVAL: Duration = Duration::from_millis(200);
/// A client that reads nothing of its answer for so long counts as idle. Shorter than a health check waits.
const STALLED: Duration = Duration::from_secs(1);
/// So does one whose answer takes longer than this altogether, however it reads.
const LONGEST_ANSWER: Duration = Duration::from_secs(30);
/// How often is looked for one that gives way where all are being answered.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// The connections that are open.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    table: Mutex<Table>,
    left: Notify,
}

#[derive(Debug, Default)]
struct Table {
    accepted: u64,
    open: BTreeMap<u64, Arc<Client>>,
    evicted: u64,
    full: Throttle,
}

/// A connection's place; free again when it is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    connections: Arc<Connections>,
    number: u64,
    pub(super) client: Arc<Client>,
}

/// What a connection does.
#[derive(Debug)]
pub(super) struct Client {
    /// Somebody else needs its slot.
    pub(super) evicted: CancellationToken,
    activity: Mutex<Activity>,
}

#[derive(Debug, Clone, Copy)]
struct Activity {
    /// When it came, asked, or last took a part of an answer. What it sends of a head does not count.
    since: Instant,
    /// When it last asked.
    asked: Instant,
    doing: Doing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    /// Nobody has listened to it yet, which is no fault of its own.
    Comes,
    /// It has not asked yet.
    Arrives,
    /// Its answer is being made.
    Asks,
    /// Its answer is on the way.
    Takes,
    /// It has taken all of its answer.
    Waits,
    /// It asked again as soon as it was answered.
    Hurries,
}

impl Connections {
    /// Connections that are open.
    pub(crate) fn open(&self) -> u64 {
        self.table().open.len() as u64
    }

    /// Connections that were closed for others, since the start.
    pub(crate) fn evicted(&self) -> u64 {
        self.table().evicted
    }

    /// Closes a connection, so that a newcomer has its descriptor; says whether there was one to close.
    pub(super) fn shrink(&self) -> bool {
        self.table().evict(Instant::now()).is_some()
    }

    /// A place for a newcomer; waits where everybody is being answered.
    pub(super) async fn enter(self: &Arc<Self>) -> Slot {
        loop {
            if let Some(slot) = self.slot(Instant::now()) {
                return slot;
            }
            tokio::time::timeout(BETWEEN_LOOKS, self.left.notified()).await.ok();
        }
    }

    fn slot(self: &Arc<Self>, now: Instant) -> Option<Slot> {
        let mut table = self.table();
        if table.open.len() >= MAX_CONNECTIONS {
            let idle = table.evict(now)?;
            if let Some(more_since_last) = table.full.due(now) {
                warn!(
                    more_since_last,
                    "All {MAX_CONNECTIONS} connections of the web server are taken: the one that was idle longest ({:.1} s) is closed for a newcomer",
                    idle.as_secs_f64()
                );
            }
        }
        table.accepted += 1;
        let (number, client) = (table.accepted, Arc::new(Client::new(now)));
        table.open.insert(number, Arc::clone(&client));
        Some(Slot { connections: Arc::clone(self), number, client })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Closes the connection that has been idle longest, and says for how long; none where all are being answered.
    fn evict(&mut self, now: Instant) -> Option<Duration> {
        let idle = |(number, client): (&u64, &Arc<Client>)| Some((client.activity().idle(now)?, *number));
        let (idle, number) = self.open.iter().filter_map(idle).max()?;
        self.open.remove(&number)?.evicted.cancel();
        self.evicted += 1;
        Some(idle)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.connections.table().open.remove(&self.number);
        self.connections.left.notify_one();
    }
}

impl Client {
    fn new(now: Instant) -> Self {
        let activity = Activity { since: now, asked: now, doing: Doing::Comes };
        Self { evicted: CancellationToken::new(), activity: Mutex::new(activity) }
    }

    /// What it has sent so far is heard, and is no whole head.
    fn is_awaited(&self) {
        let mut activity = self.activity();
        if activity.doing == Doing::Comes {
            *activity = Activity { since: Instant::now(), doing: Doing::Arrives, ..*activity };
        }
    }

    /// It has sent a whole head.
    pub(super) fn asks(&self) {
        self.activity().asks(Instant::now());
    }

    /// Its answer is made, and on the way.
    pub(super) fn is_answered(&self) {
        self.activity().turns(Doing::Asks, Doing::Takes);
    }

    /// All that was on the way is taken.
    fn is_done(&self) {
        self.activity().turns(Doing::Takes, Doing::Waits);
    }

    fn takes(&self) {
        self.activity().since = Instant::now();
    }

    fn activity(&self) -> MutexGuard<'_, Activity> {
        self.activity.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Activity {
    fn asks(&mut self, now: Instant) {
        let was_answered = matches!(self.doing, Doing::Waits | Doing::Hurries);
        let hurries = was_answered && now.saturating_duration_since(self.since) < ARRIVAL;
        *self = Self { since: now, asked: now, doing: if hurries { Doing::Hurries } else { Doing::Asks } };
    }

    fn turns(&mut self, from: Doing, to: Doing) {
        if self.doing == from {
            self.doing = to;
        }
    }

    /// For how long it has been idle, if it is.
    fn idle(&self, now: Instant) -> Option<Duration> {
        let idle = now.saturating_duration_since(self.since);
        let allowed = match self.doing {
            Doing::Arrives => ARRIVAL,
            Doing::Comes => STALLED,
            Doing::Asks | Doing::Takes if now.saturating_duration_since(self.asked) < LONGEST_ANSWER => STALLED,
            Doing::Asks | Doing::Takes | Doing::Waits | Doing::Hurries => Duration::ZERO,
        };
        (idle >= allowed).then_some(idle)
    }
}

/// A connection that notes what its client takes.
pub(super) struct WatchedStream {
    pub(super) stream: TcpStream,
    pub(super) client: Arc<Client>,
}

impl WatchedStream {
    fn note(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.client.takes();
        }
        written
    }
}

impl AsyncRead for WatchedStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if read.is_pending() {
            self.client.is_awaited();
        }
        read
    }
}

impl AsyncWrite for WatchedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.note(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.note(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// Comes when the server has nothing left to write.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.client.is_done();
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_is_who_waits_for_a_request_or_takes_nothing_of_an_answer_for_long() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let doing = |doing| Activity { since: start, asked: start, doing };
        for idle in [Doing::Waits, Doing::Hurries] {
            assert_eq!(doing(idle).idle(at(7)), Some(Duration::from_millis(7)));
        }
        for (busy, allowed) in [(Doing::Comes, 1000), (Doing::Arrives, 200), (Doing::Asks, 1000), (Doing::Takes, 1000)]
        {
            assert_eq!(doing(busy).idle(at(allowed - 1)), None);
            assert_eq!(doing(busy).idle(at(allowed)), Some(Duration::from_millis(allowed)));
        }
        let slow =
            |second: u64| Activity { since: at(1000 * second), ..doing(Doing::Takes) }.idle(at(1000 * second + 500));
        assert_eq!(slow(29), None);
        assert_eq!(slow(30), Some(Duration::from_millis(500)), "it reads, but has been at it for too long");
    }

    #[test]
    fn an_answer_is_under_way_until_all_of_it_is_taken() {
        let client = Client::new(Instant::now());
        let doing = || client.activity().doing;
        client.is_awaited();
        assert_eq!(doing(), Doing::Arrives);
        client.asks();
        client.is_awaited();
        // The server flushes while the answer is being made too.
        client.is_done();
        assert_eq!(doing(), Doing::Asks);
        client.is_answered();
        client.takes();
        assert_eq!(doing(), Doing::Takes, "a part of it");
        client.is_done();
        assert_eq!(doing(), Doing::Waits);
    }

    #[test]
    fn who_asks_again_at_once_is_never_busy() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut activity = Activity { since: start, asked: start, doing: Doing::Waits };
        activity.asks(at(199));
        assert_eq!((activity.doing, activity.idle(at(199))), (Doing::Hurries, Some(Duration::ZERO)));
        activity.asks(at(398));
        assert_eq!(activity.doing, Doing::Hurries);
        activity.asks(at(598));
        assert_eq!((activity.doing, activity.idle(at(700))), (Doing::Asks, None));
    }

    #[test]
    fn who_is_idle_longest_gives_way_and_nobody_does_who_is_answered() {
        let (connections, start) = (Arc::new(Connections::default()), Instant::now());
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let slots: Vec<_> = (0..256).map(|number| connections.slot(at(number)).unwrap()).collect();
        for slot in &slots {
            slot.client.activity().doing = Doing::Asks;
        }
        assert!(connections.slot(at(300)).is_none());
        for number in [9, 5] {
            slots[number].client.activity().doing = Doing::Waits;
        }
        let gone = || (0..256).filter(|number| slots[*number].client.evicted.is_cancelled()).collect::<Vec<_>>();
        let first = connections.slot(at(300)).unwrap();
        assert_eq!((gone(), connections.open(), connections.evicted()), (vec![5], 256, 1));
        let _second = connections.slot(at(300)).unwrap();
        assert_eq!((gone(), connections.open(), connections.evicted()), (vec![5, 9], 256, 2));
        first.client.activity().doing = Doing::Arrives;
        assert!(connections.slot(at(300)).is_none(), "who has only just come has time to ask");
        drop(slots);
        assert_eq!(connections.open(), 2);
    }
}
