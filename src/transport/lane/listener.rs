//! The destination's listener for lanes.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollTimeout};
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname};

use super::tuning::choose_congestion;
use crate::error::{Context, Error, Result};
use crate::runtime::accepting::{Accepted, Room};
use crate::runtime::inbox::Wait;
use crate::runtime::polling::poll;
use crate::runtime::private_socket::{bind_private_anew, is_socket};
use crate::transport::lookup;
use crate::transport::uri::Uri;

/// How long a name's resolver may take for a caller without a way to interrupt it.
const LOOKUP_PATIENCE: Duration = Duration::from_secs(10);

/// The destination's listener for lanes.
pub(crate) struct Listener {
    socket: Listening,
    /// Whether the socket blocked when it was inherited: another owner (such as systemd) may rely
    /// on that.
    blocked: bool,
    room: Room,
}

enum Listening {
    Tcp(TcpListener),
    /// With the path that umem has to remove.
    Unix(UnixListener, Option<PathBuf>),
}

impl Listener {
    /// Listens at `uri`, for a caller that cannot be interrupted: a resolver has
    /// [`LOOKUP_PATIENCE`].
    pub(crate) fn bind(uri: &Uri) -> Result<Listener> {
        let deadline = Instant::now() + LOOKUP_PATIENCE;
        Listener::bind_waiting(uri, &|fds, _| {
            let mut fds: Vec<_> = fds.iter().map(|&(fd, flags)| PollFd::new(fd, flags)).collect();
            let left = deadline.saturating_duration_since(Instant::now()).as_millis();
            match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                Ok(0) => Err(not_bound(uri, io::ErrorKind::TimedOut.into())),
                Ok(_) | Err(Errno::EINTR) => Ok(true),
                Err(errno) => Err(errno).context(|| "poll"),
            }
        })
    }

    /// Listens at `uri`, and gives up when `wait` does.
    pub(crate) fn bind_waiting(uri: &Uri, wait: Wait<'_>) -> Result<Listener> {
        let Uri::Tcp { host, port } = uri else { return Listener::bind_found(uri, &[]) };
        let found = lookup::addresses(own_host(host), *port, wait)?;
        Listener::bind_found(uri, &found.map_err(|error| not_bound(uri, error))?)
    }

    /// Looks the address up for [`bind_found`](Listener::bind_found), and passes the result on,
    /// perhaps at once.
    pub(crate) fn look_up(
        uri: &Uri,
        tell: impl FnOnce(io::Result<Vec<SocketAddr>>) + Send + 'static,
    ) -> Result<()> {
        match uri {
            Uri::Tcp { host, port } => lookup::begin(own_host(host), *port, tell),
            _ => {
                tell(Ok(Vec::new()));
                Ok(())
            }
        }
    }

    /// Listens at `uri`, whose name stands for the addresses `found`.
    pub(crate) fn bind_found(uri: &Uri, found: &[SocketAddr]) -> Result<Listener> {
        let failed = |source| not_bound(uri, source);
        let socket = match uri {
            Uri::Tcp { .. } => Listening::Tcp(TcpListener::bind(found).map_err(failed)?),
            Uri::Unix { path } => {
                Listening::Unix(bind_private_anew(path).map_err(failed)?, Some(path.clone()))
            }
            Uri::Fd { number } => Listening::inherited(*number)?,
            Uri::Exec { .. } => unreachable!("a single connection has no listener"),
        };
        if let Listening::Tcp(listener) = &socket {
            // Accepted connections inherit it.
            choose_congestion(listener);
        }
        let flags = fcntl(&socket, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
        let flags = flags.context(|| uri.to_string())?;
        let is_inherited = matches!(uri, Uri::Fd { .. });
        let blocked = is_inherited && !flags.contains(OFlag::O_NONBLOCK);
        let listener = Listener { socket, blocked, room: Room::default() };
        // A waiting connection may have closed before it is accepted.
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(listener)
    }

    fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        match &self.socket {
            Listening::Tcp(listener) => listener.set_nonblocking(nonblocking),
            Listening::Unix(listener, _) => listener.set_nonblocking(nonblocking),
        }
    }

    /// The address with the port that the kernel chose, or the one of the inherited socket.
    pub(crate) fn uri(&self, asked: &Uri) -> Uri {
        match (&self.socket, asked) {
            (Listening::Tcp(listener), Uri::Fd { .. }) => {
                listener.local_addr().map_or(asked.clone(), |address| Uri::Tcp {
                    host: address.ip().to_string(),
                    port: address.port(),
                })
            }
            (Listening::Unix(listener, _), Uri::Fd { .. }) => {
                let address = listener.local_addr().ok();
                let path = address.as_ref().and_then(|address| address.as_pathname());
                path.map_or(asked.clone(), |path| Uri::Unix { path: path.into() })
            }
            (Listening::Tcp(listener), Uri::Tcp { host, port }) => {
                let port = listener.local_addr().map_or(*port, |address| address.port());
                Uri::Tcp { host: host.clone(), port }
            }
            _ => asked.clone(),
        }
    }

    /// Accepts the next waiting connection. Without a free descriptor the caller has to free one,
    /// or to [`leave`](Listener::leave) the listener.
    pub(crate) fn accept(&self) -> Result<Accepted<OwnedFd>> {
        let accepted = match &self.socket {
            Listening::Tcp(listener) => listener.accept().map(|(socket, _)| socket.into()),
            Listening::Unix(listener, _) => listener.accept().map(|(socket, _)| socket.into()),
        };
        Accepted::of(accepted).context(|| "accepting a lane")
    }

    /// Stops listening for a while, as no descriptor is free.
    pub(crate) fn leave(&mut self) {
        self.room.lacked(Instant::now());
    }

    /// The descriptor to poll, except after [`leave`](Listener::leave).
    pub(crate) fn interest(&self) -> Option<BorrowedFd<'_>> {
        self.deadline().is_none().then(|| self.as_fd())
    }

    /// The end of the pause after [`leave`](Listener::leave).
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.room.deadline(Instant::now())
    }
}

impl Listening {
    /// A socket that is bound already, as systemd hands it over; closed in all child processes.
    fn inherited(number: i32) -> Result<Listening> {
        let what = || format!("fd:{number}");
        // SAFETY: the socket listens, so it was open when this process started, and nothing else in
        // this process owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(number) };
        fcntl(&socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).context(what)?;
        let address = getsockname::<SockaddrStorage>(number).context(what)?;
        match address.family() {
            Some(AddressFamily::Inet | AddressFamily::Inet6) => Ok(Listening::Tcp(socket.into())),
            Some(AddressFamily::Unix) => Ok(Listening::Unix(socket.into(), None)),
            _ => Err(Error::Usage(format!(
                "fd:{number} is a listening socket, but neither TCP nor unix"
            ))),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listening::Tcp(listener) => listener.as_fd(),
            Listening::Unix(listener, _) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.blocked {
            let _ = self.set_nonblocking(false);
        }
        if let Listening::Unix(_, Some(path)) = &self.socket {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Every address of this machine, if no host is given.
fn own_host(host: &str) -> &str {
    if host.is_empty() { "0.0.0.0" } else { host }
}

pub(crate) fn not_bound(uri: &Uri, source: io::Error) -> Error {
    Error::Listen {
        uri: uri.to_string(),
        hint: match source.kind() {
            io::ErrorKind::AddrInUse => match uri {
                Uri::Unix { path } if !is_socket(path) => {
                    "; the file there is no socket: choose another path"
                }
                Uri::Unix { .. } => {
                    "; another program listens at this socket: stop it, or choose another path"
                }
                _ => {
                    "; stop the program that listens there (`ss -ltnp` names it), or choose another address"
                }
            },
            io::ErrorKind::PermissionDenied => "; choose an address that this user may listen on",
            io::ErrorKind::AddrNotAvailable => "; the address is not one of this machine's",
            io::ErrorKind::NotFound => "; its directory does not exist",
            _ => "",
        },
        source,
    }
}
