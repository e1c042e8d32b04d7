//! Ways into a server: one that is closed for a while between one call of a gRPC client and its next, and one whose
//! connections stop to lead anywhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy, copy_bidirectional};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

/// What an HTTP/2 client says first.
const PREFACE: usize = 24;
/// The type of the frame that begins a call.
const HEADERS: u8 = 1;

/// Passes everything on, but holds one call, counted from 1 over all connections, until it is told to let it through.
pub struct Gate {
    address: String,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    held: usize,
    calls: AtomicUsize,
    reached: Semaphore,
    open: Semaphore,
}

impl Gate {
    pub async fn before(server: &str, held: usize) -> Self {
        let (calls, reached, open) = (AtomicUsize::new(0), Semaphore::new(0), Semaphore::new(0));
        let shared = Arc::new(Shared { held, calls, reached, open });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (server, gate) = (server.to_owned(), Arc::clone(&shared));
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&server).await.unwrap();
                let ((from_client, mut to_client), (mut from_server, to_server)) =
                    (client.into_split(), server.into_split());
                let gate = Arc::clone(&gate);
                tokio::spawn(async move { gate.pass(from_client, to_server).await });
                tokio::spawn(async move { copy(&mut from_server, &mut to_client).await });
            }
        });
        Self { address, shared, task }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Waits for the call that is held.
    pub async fn reached(&self) {
        self.shared.reached.acquire().await.unwrap().forget();
    }

    pub fn release(&self) {
        self.shared.open.add_permits(1);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shared {
    async fn pass(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> std::io::Result<()> {
        let mut preface = [0; PREFACE];
        from.read_exact(&mut preface).await?;
        to.write_all(&preface).await?;
        loop {
            let mut head = [0; 9];
            from.read_exact(&mut head).await?;
            let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            let mut payload = vec![0; length];
            from.read_exact(&mut payload).await?;
            if head[3] == HEADERS && self.calls.fetch_add(1, Ordering::Relaxed) + 1 == self.held {
                self.reached.add_permits(1);
                self.open.acquire().await.unwrap().forget();
            }
            to.write_all(&head).await?;
            to.write_all(&payload).await?;
        }
    }
}

/// Takes connections and passes everything on, until it is told to do so no more for those that there are. They stay open.
pub struct FreezingGate {
    address: String,
    connections: Arc<AtomicUsize>,
    frozen: watch::Sender<usize>,
    task: JoinHandle<()>,
}

impl FreezingGate {
    pub async fn before(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (frozen, connections) = (watch::Sender::new(0), Arc::new(AtomicUsize::new(0)));
        let (server, freezes, counted) = (server.to_owned(), frozen.subscribe(), Arc::clone(&connections));
        let task = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let number = counted.fetch_add(1, Ordering::Relaxed) + 1;
                let mut server = TcpStream::connect(&server).await.unwrap();
                let mut freezes = freezes.clone();
                tokio::spawn(async move {
                    let frozen = async { freezes.wait_for(|frozen| *frozen >= number).await.is_ok() };
                    let is_frozen = tokio::select! {
                        _ = copy_bidirectional(&mut client, &mut server) => false,
                        is_frozen = frozen => is_frozen,
                    };
                    if is_frozen {
                        // Both ends are kept: neither side hears that nobody passes anything on.
                        std::future::pending::<()>().await;
                    }
                });
            }
        });
        Self { address, connections, frozen, task }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Of the connections that there are, none leads anywhere any more.
    pub fn freeze(&self) {
        self.frozen.send_replace(self.connections());
    }

    /// How many there were so far.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for FreezingGate {
    fn drop(&mut self) {
        self.task.abort();
    }
}
