//! What both programs are as processes: TLS, signals, sockets, file descriptors, threads, exit code.

use std::fmt::Display;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tracing::info;

/// How long the end of the process waits until its last lines are read.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(2);

/// Chooses the one TLS implementation of the process. The exporters' HTTP client panics without one.
pub fn install_crypto() {
    // It fails where a provider is installed already: then that one serves.
    rustls::crypto::ring::default_provider().install_default().ok();
}

/// Completes at Ctrl-C or SIGTERM.
///
/// # Errors
/// The handlers cannot be installed.
pub fn shutdown_signal() -> io::Result<impl Future<Output = ()>> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        let name = tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
        };
        info!("{name} received, stopping");
    })
}

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// Listens on a port of that address, or of every address of this machine: by IPv6 and IPv4, or by IPv4 alone where there is
/// no IPv6. Must be called within a Tokio runtime.
///
/// # Errors
/// It cannot, with the address that it tried last.
pub fn listen(host: Option<IpAddr>, port: u16) -> Result<TcpListener, (SocketAddr, io::Error)> {
    let on = |host: IpAddr| {
        let address = SocketAddr::new(host, port);
        bound(address).map_err(|error| (address, error))
    };
    match host {
        Some(host) => on(host),
        None => on(Ipv6Addr::UNSPECIFIED.into()).or_else(|(address, error)| {
            if is_without_ipv6(&error) { on(Ipv4Addr::UNSPECIFIED.into()) } else { Err((address, error)) }
        }),
    }
}

fn bound(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        // The system's own default may be another.
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// A port that is taken, or may not be used, is so by IPv4 too.
fn is_without_ipv6(error: &io::Error) -> bool {
    !matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied)
}

/// Raises the limit of open files as far as it goes without privileges, and says what to do where it does not reach so far.
///
/// # Errors
/// One line for a person.
pub fn descriptors_suffice(needed: u64) -> Result<(), String> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // Without a soft limit there is none.
    let allowed = match (current, maximum) {
        (None, _) => return Ok(()),
        (Some(_), maximum) if setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_ok() => maximum,
        (Some(current), _) => Some(current),
    };
    match allowed.filter(|allowed| *allowed < needed) {
        None => Ok(()),
        Some(allowed) => Err(format!(
            "{needed} files and connections may be needed at a time, but only {allowed} may be open; raise the hard limit (ulimit -Hn {needed}, or LimitNOFILE={needed} of a systemd service), or lower --max-workers"
        )),
    }
}

/// Does what blocks on a thread of its own: in a pool, what is served would stand behind what waits for a network or a disk,
/// and the end of the process would wait for it.
///
/// The work goes on when its caller has given up: what bounds the number of such threads has to be held by the work.
///
/// # Errors
/// There is no thread to be had, or the work panicked.
pub(crate) async fn apart<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (done, result) = oneshot::channel();
    let worker = thread::Builder::new().name(name.to_owned());
    worker.spawn(move || done.send(work()).ok())?;
    result.await.map_err(|_| io::Error::other(format!("the thread {name} ended unexpectedly")))
}

/// Says in one line on standard error what went wrong: 0 clean, 1 failed. (2, usage, is clap's.)
///
/// Every error of this crate tells its cause itself: the chain of causes would say it twice.
#[must_use]
#[expect(clippy::print_stderr, reason = "the log may not be up when this is needed, or has ended")]
pub fn exit_code(result: Result<(), impl Display>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let line = format!("error: {error}");
            briefly(move || eprintln!("{line}"));
            ExitCode::FAILURE
        }
    }
}

/// Says what is wrong with the command line, or what was asked of it: `--help`, `--version`.
#[must_use]
pub fn usage(message: clap::Error) -> ExitCode {
    let code = ExitCode::from(u8::try_from(message.exit_code()).unwrap_or(2));
    briefly(move || {
        message.print().ok();
    });
    code
}

/// Does what blocks for as long as standard error is not read, and gives it up after [`LAST_WORDS_TIMEOUT`].
pub(crate) fn briefly(last_words: impl FnOnce() + Send + 'static) {
    let (done, ended) = mpsc::channel();
    thread::spawn(move || {
        last_words();
        done.send(()).ok();
    });
    ended.recv_timeout(LAST_WORDS_TIMEOUT).ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_address_of_this_machine_answers() {
        let listener = listen(None, 0).unwrap();
        let address = listener.local_addr().unwrap();
        let mut answering = vec![IpAddr::V4(Ipv4Addr::LOCALHOST)];
        if std::net::TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
            assert_eq!(address.ip(), Ipv6Addr::UNSPECIFIED);
            answering.push(Ipv6Addr::LOCALHOST.into());
        } else {
            println!("left out: this machine has no IPv6");
        }
        for host in answering {
            tokio::net::TcpStream::connect((host, address.port())).await.unwrap();
        }
    }

    #[tokio::test]
    async fn an_address_that_is_given_stays_as_given_and_a_port_that_is_taken_is_not_shared() {
        let listener = listen(Some(Ipv4Addr::LOCALHOST.into()), 0).unwrap();
        let address = listener.local_addr().unwrap();
        assert_eq!(address.ip(), Ipv4Addr::LOCALHOST);
        for host in [None, Some(address.ip())] {
            let (tried, error) = listen(host, address.port()).unwrap_err();
            assert_eq!((tried.port(), error.kind()), (address.port(), io::ErrorKind::AddrInUse), "{host:?}");
        }
    }

    #[test]
    fn ipv4_alone_is_listened_to_only_where_there_is_no_ipv6() {
        use rustix::io::Errno;
        for (errno, without) in [
            (Errno::AFNOSUPPORT, true),
            (Errno::ADDRNOTAVAIL, true),
            (Errno::PROTONOSUPPORT, true),
            (Errno::ADDRINUSE, false),
            (Errno::ACCESS, false),
        ] {
            assert_eq!(is_without_ipv6(&errno.into()), without, "{errno:?}");
        }
    }

    #[test]
    fn the_limit_of_open_files_is_raised_as_far_as_it_goes() {
        assert_eq!(descriptors_suffice(1), Ok(()));
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        assert_eq!(current, maximum);
        if let Some(maximum) = maximum {
            let refusal = descriptors_suffice(maximum + 1).unwrap_err();
            assert!(refusal.contains(&format!("only {maximum} may be open")), "{refusal}");
        }
    }
}
