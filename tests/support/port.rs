//! A port for a server that cannot choose one itself.

use std::net::SocketAddr;

use tokio::net::TcpSocket;

/// A port that nobody else gets. Until a server listens on it, connections to it are refused.
///
/// The socket is bound and never listens. Linux gives its port to no one who asks for any, and lets a server have it that
/// asks for it by number with `SO_REUSEADDR`, as all do that can be restarted. Elsewhere it is merely likely to be free.
pub struct Port {
    number: u16,
    _held: Option<TcpSocket>,
}

impl Port {
    pub fn reserve() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        Self { number: socket.local_addr().unwrap().port(), _held: cfg!(target_os = "linux").then_some(socket) }
    }

    pub fn number(&self) -> u16 {
        self.number
    }

    /// Address and port.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.number)
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address())
    }
}
