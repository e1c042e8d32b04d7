//! Room for connections: so many at a time, of which the one that is idle longest gives way to a newcomer.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
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
/// A client that reads nothing of its answer for so long counts as idle. Shorter than a health check waits.
const STALLED: Duration = Duration::from_secs(2);
/// So does one whose answer takes longer than this altogether, however it reads.
const LONGEST_ANSWER: Duration = Duration::from_secs(30);
/// How often is looked for one that gives way where all are being answered.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// The connections that are open.
#[derive(Debug, Default)]
pub(crate) struct Room {
    guests: Mutex<Guests>,
    left: Notify,
    evicted: AtomicU64,
}

#[derive(Debug, Default)]
struct Guests {
    entered: u64,
    present: BTreeMap<u64, Arc<Guest>>,
    crowded: Throttle,
}

/// A connection's place; free again when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    room: Arc<Room>,
    number: u64,
    pub(super) guest: Arc<Guest>,
}

/// What a connection does.
#[derive(Debug)]
pub(super) struct Guest {
    /// Somebody else needs its place.
    pub(super) evicted: CancellationToken,
    doing: Mutex<Doing>,
}

#[derive(Debug, Clone, Copy)]
struct Doing {
    /// When it came, asked, or last took a part of an answer. What it sends of a head does not count.
    since: Instant,
    /// When it last asked.
    asked: Instant,
    /// Its answer is being made.
    is_answered: bool,
    /// There is more of its answer than it has taken.
    is_behind: bool,
}

impl Room {
    /// Connections that are open.
    pub(crate) fn open(&self) -> u64 {
        self.guests().present.len() as u64
    }

    /// Connections that were closed for others, since the start.
    pub(crate) fn evicted(&self) -> u64 {
        self.evicted.load(Ordering::Relaxed)
    }

    /// A place for a newcomer; waits where everybody is being answered.
    pub(super) async fn enter(self: &Arc<Self>) -> Place {
        loop {
            if let Some(place) = self.place(Instant::now()) {
                return place;
            }
            tokio::time::timeout(BETWEEN_LOOKS, self.left.notified()).await.ok();
        }
    }

    fn place(self: &Arc<Self>, now: Instant) -> Option<Place> {
        let mut guests = self.guests();
        if guests.present.len() >= MAX_CONNECTIONS {
            let (number, idle) = guests.longest_idle(now)?;
            guests.present.remove(&number)?.evicted.cancel();
            self.evicted.fetch_add(1, Ordering::Relaxed);
            if let Some(more_since_last) = guests.crowded.due(now) {
                warn!(
                    more_since_last,
                    "All {MAX_CONNECTIONS} connections of the web server are taken: the one that was idle longest ({:.1} s) is closed for a newcomer",
                    idle.as_secs_f64()
                );
            }
        }
        guests.entered += 1;
        let (number, guest) = (guests.entered, Arc::new(Guest::new(now)));
        guests.present.insert(number, Arc::clone(&guest));
        Some(Place { room: Arc::clone(self), number, guest })
    }

    fn guests(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Guests {
    /// Who has been idle longest, and for how long; nobody where all are being answered.
    fn longest_idle(&self, now: Instant) -> Option<(u64, Duration)> {
        let idle = |(number, guest): (&u64, &Arc<Guest>)| Some((*number, guest.doing().idle(now)?));
        self.present.iter().filter_map(idle).max_by_key(|(_, idle)| *idle)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.room.guests().present.remove(&self.number);
        self.room.left.notify_one();
    }
}

impl Guest {
    fn new(now: Instant) -> Self {
        let doing = Doing { since: now, asked: now, is_answered: false, is_behind: false };
        Self { evicted: CancellationToken::new(), doing: Mutex::new(doing) }
    }

    /// It has sent a whole head.
    pub(super) fn asks(&self) {
        let now = Instant::now();
        *self.doing() = Doing { since: now, asked: now, is_answered: true, is_behind: false };
    }

    /// Its answer is made, and on the way.
    pub(super) fn is_answered(&self) {
        self.doing().is_answered = false;
    }

    fn writes(&self, taken: bool) {
        let mut doing = self.doing();
        doing.is_behind = !taken;
        if taken {
            doing.since = Instant::now();
        }
    }

    fn doing(&self) -> MutexGuard<'_, Doing> {
        self.doing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Doing {
    /// For how long it has been idle, if it is.
    fn idle(&self, now: Instant) -> Option<Duration> {
        let idle = now.saturating_duration_since(self.since);
        let is_busy = (self.is_answered || self.is_behind)
            && idle < STALLED
            && now.saturating_duration_since(self.asked) < LONGEST_ANSWER;
        (!is_busy).then_some(idle)
    }
}

/// A connection that notes what its client takes.
pub(super) struct Noted {
    pub(super) stream: TcpStream,
    pub(super) guest: Arc<Guest>,
}

impl Noted {
    fn note(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.guest.writes(written.is_ready());
        written
    }
}

impl AsyncRead for Noted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Noted {
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

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
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
        let idle = Doing { since: start, asked: start, is_answered: false, is_behind: false };
        let answered = Doing { is_answered: true, ..idle };
        let behind = Doing { is_behind: true, ..idle };
        assert_eq!(idle.idle(at(7)), Some(Duration::from_millis(7)));
        for busy in [answered, behind] {
            assert_eq!(busy.idle(at(1999)), None);
            assert_eq!(busy.idle(at(2000)), Some(Duration::from_secs(2)));
        }
        let slow = |second: u64| Doing { since: at(1000 * second), ..behind }.idle(at(1000 * second + 500));
        assert_eq!(slow(29), None);
        assert_eq!(slow(30), Some(Duration::from_millis(500)), "it reads, but has been at it for too long");
    }

    #[test]
    fn who_is_idle_longest_gives_way_and_nobody_does_who_is_answered() {
        let (room, start) = (Arc::new(Room::default()), Instant::now());
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let places: Vec<_> = (0..256).map(|number| room.place(at(number)).unwrap()).collect();
        for place in &places {
            place.guest.doing().is_answered = true;
        }
        assert!(room.place(at(300)).is_none());
        for number in [9, 5] {
            places[number].guest.doing().is_answered = false;
        }
        let gone = || (0..256).filter(|number| places[*number].guest.evicted.is_cancelled()).collect::<Vec<_>>();
        let _first = room.place(at(300)).unwrap();
        assert_eq!((gone(), room.open(), room.evicted()), (vec![5], 256, 1));
        let _second = room.place(at(300)).unwrap();
        assert_eq!((gone(), room.open(), room.evicted()), (vec![5, 9], 256, 2));
        drop(places);
        assert_eq!(room.open(), 2);
    }
}
