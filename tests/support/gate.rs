//! A way into a gRPC server that is closed for a while, between one call of a client and its next.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
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
