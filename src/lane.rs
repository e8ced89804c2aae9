//! Lanes: the connections between source and destination, up to the point where a ring takes over.
//!
//! The source dials. Each lane opens with its hello and the destination's welcome, exchanged with
//! ordinary blocking calls under a time limit; from then on the lane's descriptor belongs to the
//! ring of the thread that serves it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use umem_wire::{
    Capabilities, FaultCode, Frame, HELLO_BYTES, Hello, HelloError, LaneRole, PROTOCOL, SessionId,
    Welcome, transmit,
};

use crate::error::{Context, Error, Result};
use crate::uri::Uri;

/// How long either side waits for the other's hello. A peer that says nothing is not umem.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Unsent bytes that a lane lets the kernel queue before it stops feeding it: enough to keep
/// 40 Gbit/s busy for 100 µs, and little enough that the order of pages can still change.
const NOTSENT_LOWAT_BYTES: u32 = 512 << 10;

/// Silence of this long means the peer or the path is dead (TCP_USER_TIMEOUT).
const USER_TIMEOUT_MS: u32 = 30_000;

/// A connected lane.
pub(crate) struct Lane {
    socket: Arc<OwnedFd>,
    /// Named in errors: `demand lane`, `bulk lane 2`.
    pub(crate) name: String,
    /// The congestion control that the kernel uses for it; none for unix sockets.
    pub(crate) congestion: Option<String>,
}

impl Lane {
    pub(crate) fn socket(&self) -> Arc<OwnedFd> {
        self.socket.clone()
    }

    /// The same socket for blocking reads and writes.
    pub(crate) fn blocking(&self) -> Result<File> {
        Ok(File::from(self.socket.try_clone().context(|| self.name.clone())?))
    }

    fn new(socket: OwnedFd, name: String, is_tcp: bool) -> Result<Lane> {
        let congestion =
            if is_tcp { Some(tune(socket.as_fd()).context(|| name.clone())?) } else { None };
        Ok(Lane { socket: Arc::new(socket), name, congestion })
    }
}

/// Sets what every TCP lane wants and returns the congestion control it got.
fn tune(socket: BorrowedFd<'_>) -> nix::Result<String> {
    setsockopt(&socket, sockopt::TcpNoDelay, &true)?;
    setsockopt(&socket, sockopt::KeepAlive, &true)?;
    setsockopt(&socket, sockopt::TcpUserTimeout, &USER_TIMEOUT_MS)?;
    setsockopt_raw(socket, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)?;
    // A page lane wants the path's whole rate at once; cubic gives two to three times bbr's on
    // short paths. Where the administrator does not allow it, the system's own choice stays.
    let _ = setsockopt(&socket, sockopt::TcpCongestion, &"cubic".into());
    let got = nix::sys::socket::getsockopt(&socket, sockopt::TcpCongestion)?;
    Ok(got.to_string_lossy().trim_end_matches('\0').to_owned())
}

fn setsockopt_raw(socket: BorrowedFd<'_>, level: i32, name: i32, value: u32) -> nix::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: the option reads four bytes from a local variable that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    nix::errno::Errno::result(result).map(drop)
}

/// Sends the reason why we give up on a lane that no ring serves (any more). It never waits: a peer
/// that does not read, or has gone, finds out by the lane's end.
pub(crate) fn tell(socket: &OwnedFd, error: &Error) {
    use std::os::fd::AsRawFd;
    let mut bytes = Vec::new();
    transmit::encode(&Frame::Error(error.to_fault()), &mut bytes);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let _ = nix::sys::socket::send(socket.as_raw_fd(), &bytes, flags);
}

/// What a lane is called in messages.
pub(crate) fn lane_name(role: LaneRole, index: u16) -> String {
    match role {
        LaneRole::Demand => "demand lane".into(),
        LaneRole::Bulk => format!("bulk lane {index}"),
    }
}

/// Waits until the socket is readable: false when it is not in time, an error when waiting is over
/// for another reason, such as a signal.
pub(crate) type Wait<'a> = &'a dyn Fn(BorrowedFd<'_>, Duration) -> Result<bool>;

/// Connects to a destination and opens a lane there.
pub(crate) fn dial(uri: &Uri, hello: &Hello, wait: Wait<'_>) -> Result<Lane> {
    let name = lane_name(hello.role, hello.index);
    let failed = |source| Error::Connect { uri: uri.to_string(), source };
    let (socket, is_tcp) = match uri {
        Uri::Tcp { host, port } => (OwnedFd::from(connect_tcp(host, *port).map_err(failed)?), true),
        Uri::Unix { path } => (OwnedFd::from(UnixStream::connect(path).map_err(failed)?), false),
    };
    let lane = Lane::new(socket, name, is_tcp)?;
    greet(&lane, hello, wait)?;
    Ok(lane)
}

/// Tries each address that the name has; a dead one costs [`HELLO_TIMEOUT`].
fn connect_tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut error = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, HELLO_TIMEOUT) {
            Ok(stream) => return Ok(stream),
            Err(failed) => error = failed,
        }
    }
    Err(error)
}

fn greet(lane: &Lane, hello: &Hello, wait: Wait<'_>) -> Result<()> {
    let lost = |error: io::Error| Error::Lost {
        side: "destination",
        lane: lane.name.clone(),
        what: format!("no welcome: {error}; check that it is `umem incoming` that listens there"),
    };
    with_timeout(lane, |mut socket| {
        socket.write_all(&hello.encode()).map_err(lost)?;
        if !wait(lane.socket.as_fd(), HELLO_TIMEOUT)? {
            return Err(lost(io::ErrorKind::TimedOut.into()));
        }
        let mut bytes = [0; HELLO_BYTES];
        socket.read_exact(&mut bytes).map_err(lost)?;
        let welcome = Welcome::decode(&bytes).map_err(|error| match error {
            HelloError::Refused { code, text } => Error::Peer { side: "destination", code, text },
            other => Error::protocol(&lane.name, other),
        })?;
        welcome.check(hello).map_err(|error| Error::protocol(&lane.name, error))
    })
}

/// Runs the blocking hello exchange with a limit on each read and write.
fn with_timeout<T>(lane: &Lane, exchange: impl FnOnce(File) -> Result<T>) -> Result<T> {
    let socket = lane.socket.as_fd();
    let set = |seconds| -> nix::Result<()> {
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(seconds))?;
        setsockopt(&socket, sockopt::SendTimeout, &TimeVal::seconds(seconds))
    };
    set(HELLO_TIMEOUT.as_secs().cast_signed()).context(|| lane.name.clone())?;
    let answer = exchange(lane.blocking()?)?;
    // Zero means no limit (socket(7)).
    set(0).context(|| lane.name.clone())?;
    Ok(answer)
}

/// Where a destination waits for lanes.
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, std::path::PathBuf),
}

impl Listener {
    pub(crate) fn bind(uri: &Uri) -> Result<Listener> {
        let failed = |source: io::Error| Error::Listen {
            uri: uri.to_string(),
            hint: match source.kind() {
                io::ErrorKind::AddrInUse => "; stop what listens there or choose another one",
                io::ErrorKind::PermissionDenied => "; choose a place this user may listen on",
                io::ErrorKind::AddrNotAvailable => "; the address is not one of this machine's",
                io::ErrorKind::NotFound => "; its directory does not exist",
                _ => "",
            },
            source,
        };
        match uri {
            Uri::Tcp { host, port } => {
                let host = if host.is_empty() { "0.0.0.0" } else { host };
                Ok(Listener::Tcp(TcpListener::bind((host, *port)).map_err(failed)?))
            }
            Uri::Unix { path } => {
                Ok(Listener::Unix(bind_private(path).map_err(failed)?, path.clone()))
            }
        }
    }

    /// The address with the port that the kernel chose.
    pub(crate) fn uri(&self, asked: &Uri) -> Uri {
        match (self, asked) {
            (Listener::Tcp(listener), Uri::Tcp { host, port }) => {
                let port = listener.local_addr().map_or(*port, |address| address.port());
                Uri::Tcp { host: host.clone(), port }
            }
            _ => asked.clone(),
        }
    }

    /// Accepts one connection and reads its hello. A connection that does not speak umem is
    /// dropped and reported as `Ok(Err(why))`: a port scanner must not end a migration.
    pub(crate) fn accept(
        &self,
        wait: Wait<'_>,
    ) -> Result<std::result::Result<(Lane, Hello), String>> {
        let (socket, is_tcp) = match self {
            Listener::Tcp(listener) => {
                (OwnedFd::from(listener.accept().context(|| "accepting a lane")?.0), true)
            }
            Listener::Unix(listener, _) => {
                (OwnedFd::from(listener.accept().context(|| "accepting a lane")?.0), false)
            }
        };
        let mut lane = Lane::new(socket, "new lane".into(), is_tcp)?;
        if !wait(lane.socket.as_fd(), HELLO_TIMEOUT)? {
            return Ok(Err("it says nothing".into()));
        }
        let hello = with_timeout(&lane, |mut socket| {
            let mut bytes = [0; HELLO_BYTES];
            socket.read_exact(&mut bytes).context(|| "its hello")?;
            Hello::decode(&bytes).map_err(|error| Error::protocol("new lane", error))
        });
        Ok(match hello {
            Ok(hello) => {
                lane.name = lane_name(hello.role, hello.index);
                Ok((lane, hello))
            }
            Err(error) => Err(error.to_string()),
        })
    }
}

/// Makes a listening unix socket that is the owner's alone.
///
/// It is made under a mask for that; umask is per process, so no other thread may have been started
/// yet.
pub(crate) fn bind_private(path: &std::path::Path) -> io::Result<UnixListener> {
    let mask = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    nix::sys::stat::umask(mask);
    listener
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Tcp(listener) => listener.as_fd(),
            Listener::Unix(listener, _) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Answers a hello that fits.
pub(crate) fn welcome(lane: &Lane, hello: &Hello) -> Result<()> {
    let welcome = match Welcome::answer(hello, PROTOCOL, Capabilities::NONE, [0; 32]) {
        Ok(welcome) => welcome,
        Err(error) => {
            refuse(lane, FaultCode::Protocol, &error.to_string())?;
            return Err(Error::protocol(&lane.name, error));
        }
    };
    lane.blocking()?.write_all(&welcome.encode()).context(|| lane.name.clone())
}

/// Answers a hello that does not fit.
pub(crate) fn refuse(lane: &Lane, code: FaultCode, text: &str) -> Result<()> {
    lane.blocking()?.write_all(&Welcome::refuse(code, text)).context(|| lane.name.clone())
}

/// The hello of one lane of a new session.
pub(crate) fn hello(session: SessionId, role: LaneRole, index: u16, bulk_lanes: u16) -> Hello {
    Hello {
        versions: PROTOCOL,
        capabilities: Capabilities::NONE,
        session,
        role,
        index,
        bulk_lanes,
        proof: [0; 32],
    }
}

/// A session id that nobody can guess.
pub(crate) fn new_session() -> Result<SessionId> {
    let mut id = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut id))
        .context(|| "reading /dev/urandom")?;
    Ok(SessionId(id))
}

/// True when the lane stays on this machine, where zero-copy sends are copied anyway.
pub(crate) fn stays_local(uri: &Uri) -> bool {
    match uri {
        Uri::Unix { .. } => true,
        Uri::Tcp { host, port } => (host.as_str(), *port)
            .to_socket_addrs()
            .is_ok_and(|mut addresses| addresses.all(|address| address.ip().is_loopback())),
    }
}
