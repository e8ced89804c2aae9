//! Lanes: the connections between source and destination, up to the point where a ring takes over.
//!
//! The source dials, or both sides were given one connection that all lanes share. Each lane opens
//! with its hello and the destination's welcome, which nobody waits for alone: signals end the wait.
//! From then on the lane's descriptor belongs to the ring of the thread that serves it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::PollFlags;
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr,
    getsockname, getsockopt, recv, setsockopt, socket, sockopt,
};
use umem_wire::{
    Capabilities, FaultCode, Frame, HELLO_BYTES, Hello, LaneRole, PROTOCOL, Seal, SessionId,
    Welcome, transmit,
};

use crate::error::{Context, Error, Result};
use crate::lookup;
use crate::secure::{Answer, Channel, Fate, Pass, introduce};
use crate::single;
use crate::uri::Uri;

/// How long either side waits for the other's hello. A peer that says nothing is not umem.
pub(crate) const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Unsent bytes that a lane lets the kernel queue before it stops feeding it: enough to keep
/// 40 Gbit/s busy for 100 µs, and little enough that the order of pages can still change.
const NOTSENT_LOWAT_BYTES: u32 = 512 << 10;

/// The same where background pages share the connection with demand pages, which wait for what is
/// queued: 64 KiB are 50 µs at 10 Gbit/s.
pub(crate) const SHARED_QUEUE_BYTES: u32 = 64 << 10;

/// What a page lane asks for, which wants the path's whole rate at once: cubic gives two to three times
/// bbr's on short paths.
pub(crate) const CONGESTION_CONTROL: &str = "cubic";

/// How long a lost bulk lane leaves open whether the peer has given up: it says so on the demand lane
/// before it closes any, and lanes are not ordered against each other.
pub(crate) const CAUSE_PATIENCE: Duration = Duration::from_millis(250);

/// How often a unix socket is tried whose queue of connections is full.
const CONNECT_INTERVAL: Duration = Duration::from_millis(20);

/// Silence of this long on the demand lane means that the peer or the path is dead (TCP_USER_TIMEOUT):
/// nothing there waits for room at the other side. All lanes go with it.
const DEMAND_TIMEOUT_MS: u32 = 10_000;

/// The same where pages come in the background: a destination that has no room for them is silent too
/// (tcp(7): a window that stays closed for this long counts).
const BACKGROUND_TIMEOUT_MS: u32 = 30_000;

/// A lane that has nothing to say is asked after this long, and then every [`KEEPALIVE_INTERVAL_S`],
/// whether anybody is there; who does not answer is dead by the timeouts above.
const KEEPALIVE_IDLE_S: u32 = 3;
const KEEPALIVE_INTERVAL_S: u32 = 2;

/// The highest priority that everybody may ask for (socket(7)); TC_PRIO_INTERACTIVE of
/// linux/pkt_sched.h.
const INTERACTIVE: u32 = 6;

/// A connected lane.
#[derive(Clone)]
pub(crate) struct Lane {
    socket: Arc<OwnedFd>,
    /// Named in errors: `demand lane`, `bulk lane 2`.
    pub(crate) name: String,
    /// The congestion control that the kernel uses for its connection; none for unix sockets.
    pub(crate) congestion: Option<String>,
    /// Unsent bytes that the kernel is to queue of it.
    pub(crate) queue_bytes: u32,
    /// What both sides can do; known once it is open.
    pub(crate) capabilities: Capabilities,
    /// With TLS: what became of its connection …
    fate: Option<Arc<Fate>>,
    /// … and the connection, which is the pump's.
    connection: Option<Weak<OwnedFd>>,
    /// With TLS that the lane's own thread does: what is between, until that thread takes it.
    channel: Option<Arc<Mutex<Option<Box<Channel>>>>>,
}

impl Lane {
    pub(crate) fn socket(&self) -> Arc<OwnedFd> {
        self.socket.clone()
    }

    /// Unsent bytes that the kernel queues of a TCP lane before it stops feeding it.
    pub(crate) fn set_queue_bytes(&self, bytes: u32) -> nix::Result<()> {
        setsockopt_raw(self.socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, bytes)
    }

    /// The same socket for blocking reads and writes.
    pub(crate) fn blocking(&self) -> Result<File> {
        Ok(File::from(self.socket.try_clone().context(|| self.name.clone())?))
    }

    /// Both sides check what comes over it.
    pub(crate) fn is_checked(&self) -> bool {
        self.capabilities.contains(Capabilities::CHECKSUM)
    }

    /// The same lane, behind a handshake of TLS.
    pub(crate) fn secured(self, channel: Channel) -> Lane {
        Lane { channel: Some(Arc::new(Mutex::new(Some(Box::new(channel))))), ..self }
    }

    /// With TLS: what is between the socket and who serves the lane, for good.
    pub(crate) fn take_channel(&self) -> Option<Box<Channel>> {
        self.channel()?.take()
    }

    fn channel(&self) -> Option<MutexGuard<'_, Option<Box<Channel>>>> {
        let channel = self.channel.as_ref()?;
        Some(channel.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What is said before a thread serves the lane, as it is sent.
    pub(crate) fn sealed(&self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        match self.channel().as_deref_mut() {
            Some(Some(channel)) => channel.sealed(bytes),
            _ => Ok(bytes.to_vec()),
        }
    }

    /// Says something before a thread serves the lane. It waits for room.
    pub(crate) fn say(&self, bytes: &[u8]) -> Result<()> {
        let what = || self.name.clone();
        let bytes = self.sealed(bytes).context(what)?;
        self.blocking()?.write_all(&bytes).context(what)
    }

    /// Hears what there is, before a thread serves the lane, without waiting: no bytes at the end.
    fn hear(&self, into: &mut [u8]) -> io::Result<usize> {
        match self.channel().as_deref_mut() {
            Some(Some(channel)) => channel.hear(&self.socket, into),
            _ => Ok(recv(self.socket.as_raw_fd(), into, MsgFlags::MSG_DONTWAIT)?),
        }
    }

    /// The same lane, behind a pump of TLS: `socket` leads there.
    pub(crate) fn behind(self, socket: OwnedFd, fate: Arc<Fate>) -> Lane {
        let connection = Some(Arc::downgrade(&self.socket));
        Lane { socket: Arc::new(socket), fate: Some(fate), connection, channel: None, ..self }
    }

    /// With TLS: why its connection broke, if it did, until a thread serves the lane.
    pub(crate) fn cause(&self) -> Option<String> {
        match self.channel().as_deref() {
            Some(Some(channel)) => channel.cause(),
            _ => self.fate.as_ref().and_then(|fate| fate.cause()).map(str::to_owned),
        }
    }

    /// The same lane, now that it is known what it is for.
    pub(crate) fn assign(self, role: LaneRole, index: u16) -> Lane {
        let name = lane_name(role, index);
        if let Some(fate) = &self.fate {
            fate.assign(&name, role);
        }
        // One that a source has dialled knew it from the beginning.
        if role == LaneRole::Demand && self.congestion.is_some() && self.name != name {
            let behind = self.connection.as_ref().and_then(Weak::upgrade);
            let connection = behind.as_ref().unwrap_or(&self.socket);
            let _ = setsockopt(connection, sockopt::TcpUserTimeout, &DEMAND_TIMEOUT_MS);
            go_first(connection);
        }
        Lane { name, ..self }
    }

    /// A lane with a connection of its own.
    pub(crate) fn new(socket: OwnedFd, name: String) -> Result<Lane> {
        let is_demand = name == lane_name(LaneRole::Demand, 0);
        let timeout_ms = if is_demand { DEMAND_TIMEOUT_MS } else { BACKGROUND_TIMEOUT_MS };
        let lane = Lane::tuned(socket, name, NOTSENT_LOWAT_BYTES, timeout_ms)?;
        if is_demand && lane.congestion.is_some() {
            go_first(&lane.socket);
        }
        Ok(lane)
    }

    /// The one lane of a connection that everything shares.
    pub(crate) fn shared(socket: OwnedFd) -> Result<Lane> {
        let name = lane_name(LaneRole::Demand, 0);
        let lane = Lane::tuned(socket, name, SHARED_QUEUE_BYTES, BACKGROUND_TIMEOUT_MS)?;
        if lane.congestion.is_none() {
            // The kernel doubles it, for its own bookkeeping (socket(7)).
            setsockopt(&lane.socket, sockopt::SndBuf, &(SHARED_QUEUE_BYTES as usize))
                .context(|| lane.name.clone())?;
        }
        Ok(lane)
    }

    fn tuned(socket: OwnedFd, name: String, queue_bytes: u32, timeout_ms: u32) -> Result<Lane> {
        let congestion = if single::is_tcp(&socket) {
            Some(tune(socket.as_fd(), queue_bytes, timeout_ms).context(|| name.clone())?)
        } else {
            None
        };
        let capabilities = Capabilities::NONE;
        let socket = Arc::new(socket);
        let (fate, connection, channel) = (None, None, None);
        Ok(Lane { socket, name, congestion, queue_bytes, capabilities, fate, connection, channel })
    }
}

impl AsFd for Lane {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Asks for a TCP connection's packets to go before others: on this host by their priority, on the way by the
/// field that says so (IP_TOS, IPV6_TCLASS), where anybody heeds that.
fn go_first(connection: &OwnedFd) {
    // One of them is for the other family, and fails.
    let low_delay = u32::from(libc::IPTOS_LOWDELAY);
    let connection = connection.as_fd();
    let _ = setsockopt_raw(connection, libc::IPPROTO_IP, libc::IP_TOS, low_delay);
    let _ = setsockopt_raw(connection, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, low_delay);
    let _ = setsockopt_raw(connection, libc::SOL_SOCKET, libc::SO_PRIORITY, INTERACTIVE);
}

/// Sets what every TCP lane wants and returns the congestion control it got.
fn tune(socket: BorrowedFd<'_>, queue_bytes: u32, timeout_ms: u32) -> nix::Result<String> {
    setsockopt(&socket, sockopt::TcpNoDelay, &true)?;
    setsockopt(&socket, sockopt::KeepAlive, &true)?;
    setsockopt(&socket, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
    setsockopt(&socket, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_S)?;
    setsockopt(&socket, sockopt::TcpUserTimeout, &timeout_ms)?;
    setsockopt_raw(socket, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, queue_bytes)?;
    choose_congestion(&socket);
    let got = nix::sys::socket::getsockopt(&socket, sockopt::TcpCongestion)?;
    Ok(got.to_string_lossy().trim_end_matches('\0').to_owned())
}

/// Has connections use [`CONGESTION_CONTROL`]; where the administrator does not allow it, the system's own
/// choice stays.
///
/// To be called before a socket connects, or listens, and not only afterwards: one that has begun with bbr
/// stays paced by a timer whatever it is given later, which halves what a core sends over loopback.
fn choose_congestion(socket: &impl AsFd) {
    let _ = setsockopt(socket, sockopt::TcpCongestion, &CONGESTION_CONTROL.into());
}

/// Sets an option of four bytes.
pub(crate) fn setsockopt_raw(
    socket: BorrowedFd<'_>,
    level: i32,
    name: i32,
    value: u32,
) -> nix::Result<()> {
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

/// Sends the reason why we give up on a lane that no ring serves (any more), and that is `checked` or not.
/// It never waits: a peer that does not read, or has gone, finds out by the lane's end.
pub(crate) fn tell(socket: &OwnedFd, checked: bool, error: &Error) {
    let mut bytes = Vec::new();
    transmit::encode(&Frame::Error(error.to_fault()), &mut bytes);
    Seal::new(checked).frames(&mut bytes);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let _ = nix::sys::socket::send(socket.as_raw_fd(), &bytes, flags);
}

/// Connections that may have to be ended by somebody else than who serves them. Each closes when that
/// one is done with it all the same. Clones are of the same connections.
#[derive(Clone, Default)]
pub(crate) struct Severable(Arc<Mutex<Vec<Weak<OwnedFd>>>>);

impl Severable {
    pub(crate) fn new<'a>(lanes: impl IntoIterator<Item = &'a Lane>) -> Severable {
        let all = Severable::default();
        all.replace(lanes);
        all
    }

    /// These are there in place of the others.
    pub(crate) fn replace<'a>(&self, lanes: impl IntoIterator<Item = &'a Lane>) {
        let sockets = lanes.into_iter().map(|lane| Arc::downgrade(&lane.socket)).collect();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = sockets;
    }

    /// Ends all that are still there.
    pub(crate) fn sever(&self) {
        let mut sockets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let alive = sockets.drain(..).filter_map(|socket| socket.upgrade());
        alive.for_each(|socket| sever(&socket));
    }
}

/// Ends a connection at once, whatever is on its way: operations on it complete, and the other side
/// hears of it, if it hears anything.
pub(crate) fn sever(socket: &OwnedFd) {
    // Both fail where the other side was first.
    let _ = nix::sys::socket::shutdown(socket.as_raw_fd(), Shutdown::Both);
    // What was sent and is not acknowledged would keep its memory until the connection times out.
    let nowhere =
        libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let length = size_of_val(&nowhere) as libc::socklen_t;
    if single::is_tcp(socket) {
        // SAFETY: the address is a local variable of the length given; this address family undoes the
        // connection (connect(2)) and involves no other memory.
        unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, length) };
    }
}

/// What a lane is called in messages.
pub(crate) fn lane_name(role: LaneRole, index: u16) -> String {
    match role {
        LaneRole::Demand => "demand lane".into(),
        LaneRole::Bulk => format!("bulk lane {index}"),
    }
}

/// Waits until one of the descriptors is ready for what is asked of it: false when none is in time, an
/// error when waiting is over for another reason, such as a signal.
pub(crate) type Wait<'a> =
    &'a dyn Fn(&[(BorrowedFd<'_>, PollFlags)], Option<Duration>) -> Result<bool>;

/// Connects to a destination and opens a lane there.
pub(crate) fn dial(uri: &Uri, hello: &Hello, pass: &Pass, wait: Wait<'_>) -> Result<Lane> {
    let name = lane_name(hello.role, hello.index);
    let lane = Lane::new(connect_to(uri, wait)?, name)?;
    introduce(lane, hello, pass, Some(HELLO_TIMEOUT), wait)
}

/// A connection to whoever listens there, and nothing said yet.
pub(crate) fn connect_to(uri: &Uri, wait: Wait<'_>) -> Result<OwnedFd> {
    match uri {
        Uri::Tcp { host, port } => connect_tcp(uri, host, *port, wait),
        Uri::Unix { path } => connect_unix(uri, path, wait),
        Uri::Fd { .. } | Uri::Exec { .. } => unreachable!("one connection is not dialled"),
    }
}

/// Opens the one lane of a connection that is there already. Who is at its other end may have to be
/// started first, so that the answer is waited for without a limit.
pub(crate) fn open_shared(
    socket: OwnedFd,
    hello: &Hello,
    pass: &Pass,
    wait: Wait<'_>,
) -> Result<Lane> {
    introduce(Lane::shared(socket)?, hello, pass, None, wait)
}

/// Opens one of several lanes on a connection that is there already, as [`open_shared`] does.
pub(crate) fn open(socket: OwnedFd, hello: &Hello, wait: Wait<'_>) -> Result<Lane> {
    let lane = Lane::new(socket, lane_name(hello.role, hello.index))?;
    introduce(lane, hello, &Pass::default(), None, wait)
}

/// Tries each address that the name has; a dead one costs [`HELLO_TIMEOUT`].
fn connect_tcp(uri: &Uri, host: &str, port: u16, wait: Wait<'_>) -> Result<OwnedFd> {
    let failed = |source| Error::Connect { uri: uri.to_string(), source };
    let mut error = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in lookup::addresses(host, port, wait)?.map_err(failed)? {
        let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        match connect(family, &SockaddrStorage::from(address), wait)? {
            Ok(socket) => return Ok(socket),
            Err(errno) => error = errno.into(),
        }
    }
    Err(failed(error))
}

fn connect_unix(uri: &Uri, path: &Path, wait: Wait<'_>) -> Result<OwnedFd> {
    let failed = |errno: Errno| Error::Connect { uri: uri.to_string(), source: errno.into() };
    let address = UnixAddr::new(path).map_err(failed)?;
    let deadline = Instant::now() + HELLO_TIMEOUT;
    loop {
        match connect(AddressFamily::Unix, &address, wait)? {
            Ok(socket) => return Ok(socket),
            // Its queue of connections is full, which nothing but another try can tell.
            Err(Errno::EAGAIN) if Instant::now() < deadline => {
                wait(&[], Some(CONNECT_INTERVAL))?;
            }
            Err(errno) => return Err(failed(errno)),
        }
    }
}

/// One attempt, given up after [`HELLO_TIMEOUT`] or when waiting is over.
fn connect(
    family: AddressFamily,
    address: &dyn SockaddrLike,
    wait: Wait<'_>,
) -> Result<nix::Result<OwnedFd>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Stream, flags, None).context(|| "socket")?;
    if family != AddressFamily::Unix {
        choose_congestion(&socket);
    }
    match nix::sys::socket::connect(socket.as_raw_fd(), address) {
        Ok(()) => {}
        Err(Errno::EINPROGRESS) => {
            if !wait(&[(socket.as_fd(), PollFlags::POLLOUT)], Some(HELLO_TIMEOUT))? {
                return Ok(Err(Errno::ETIMEDOUT));
            }
            match getsockopt(&socket, sockopt::SocketError).context(|| "SO_ERROR")? {
                0 => {}
                errno => return Ok(Err(Errno::from_raw(errno))),
            }
        }
        Err(errno) => return Ok(Err(errno)),
    }
    // A ring waits on sockets that block.
    fcntl(&socket, FcntlArg::F_SETFL(OFlag::empty())).context(|| "fcntl")?;
    Ok(Ok(socket))
}

/// A hello or a welcome that is coming in, in as many pieces as it likes.
pub(crate) struct HelloBytes {
    bytes: [u8; HELLO_BYTES],
    filled: usize,
}

impl HelloBytes {
    pub(crate) fn new() -> HelloBytes {
        HelloBytes { bytes: [0; HELLO_BYTES], filled: 0 }
    }

    /// Reads what there is, without waiting; all of it once it is whole.
    pub(crate) fn read(&mut self, lane: &Lane) -> io::Result<Option<[u8; HELLO_BYTES]>> {
        let rest = &mut self.bytes[self.filled..];
        match lane.hear(rest) {
            Ok(0) => return Err(closed()),
            Ok(count) => self.filled += count,
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => return Err(closed()),
                _ => return Err(error),
            },
        }
        Ok((self.filled == HELLO_BYTES).then_some(self.bytes))
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the other side closed it")
}

/// Where a destination waits for lanes.
pub(crate) enum Listener {
    Tcp(TcpListener),
    /// With the path that is ours to remove.
    Unix(UnixListener, Option<PathBuf>),
}

impl Listener {
    /// Listens there. A name is looked up, which may take as long as the resolver likes: that is for a
    /// thread that has nothing else to do.
    pub(crate) fn bind(uri: &Uri) -> Result<Listener> {
        let Uri::Tcp { host, port } = uri else { return Listener::bind_found(uri, &[]) };
        let found = (own_host(host), *port).to_socket_addrs();
        let found: Vec<SocketAddr> = found.map_err(|error| not_bound(uri, error))?.collect();
        Listener::bind_found(uri, &found)
    }

    /// The same for a thread that is waited for: it gives up when `wait` does.
    pub(crate) fn bind_waiting(uri: &Uri, wait: Wait<'_>) -> Result<Listener> {
        let Uri::Tcp { host, port } = uri else { return Listener::bind_found(uri, &[]) };
        let found = lookup::addresses(own_host(host), *port, wait)?;
        Listener::bind_found(uri, &found.map_err(|error| not_bound(uri, error))?)
    }

    /// Looks the address up for [`bind_found`](Listener::bind_found), and tells it, perhaps at once.
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

    /// Listens there, where `found` are the addresses that its name stands for.
    pub(crate) fn bind_found(uri: &Uri, found: &[SocketAddr]) -> Result<Listener> {
        let failed = |source| not_bound(uri, source);
        let listener = match uri {
            Uri::Tcp { .. } => Listener::Tcp(TcpListener::bind(found).map_err(failed)?),
            Uri::Unix { path } => {
                Listener::Unix(bind_private(path).map_err(failed)?, Some(path.clone()))
            }
            Uri::Fd { number } => Listener::inherited(*number)?,
            Uri::Exec { .. } => unreachable!("nobody listens there"),
        };
        // Who waits may have gone when it is accepted.
        match &listener {
            Listener::Tcp(listener) => {
                // What it accepts has the same.
                choose_congestion(listener);
                listener.set_nonblocking(true)
            }
            Listener::Unix(listener, _) => listener.set_nonblocking(true),
        }
        .map_err(failed)?;
        Ok(listener)
    }

    /// One that is bound already, as systemd hands it over; nothing that this process starts gets it.
    fn inherited(number: i32) -> Result<Listener> {
        let what = || format!("fd:{number}");
        // SAFETY: it listens, so that it was open when this process started, and nothing else in it
        // owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(number) };
        fcntl(&socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).context(what)?;
        let address = getsockname::<SockaddrStorage>(number).context(what)?;
        match address.family() {
            Some(AddressFamily::Inet | AddressFamily::Inet6) => Ok(Listener::Tcp(socket.into())),
            Some(AddressFamily::Unix) => Ok(Listener::Unix(socket.into(), None)),
            _ => Err(Error::Usage(format!(
                "fd:{number} listens neither for TCP nor at a unix socket"
            ))),
        }
    }

    /// The address with the port that the kernel chose, or that somebody else has bound.
    pub(crate) fn uri(&self, asked: &Uri) -> Uri {
        match (self, asked) {
            (Listener::Tcp(listener), Uri::Fd { .. }) => {
                listener.local_addr().map_or(asked.clone(), |address| Uri::Tcp {
                    host: address.ip().to_string(),
                    port: address.port(),
                })
            }
            (Listener::Unix(listener, _), Uri::Fd { .. }) => {
                let address = listener.local_addr().ok();
                let path = address.as_ref().and_then(|address| address.as_pathname());
                path.map_or(asked.clone(), |path| Uri::Unix { path: path.into() })
            }
            (Listener::Tcp(listener), Uri::Tcp { host, port }) => {
                let port = listener.local_addr().map_or(*port, |address| address.port());
                Uri::Tcp { host: host.clone(), port }
            }
            _ => asked.clone(),
        }
    }

    /// The next connection that waits, if it still does.
    pub(crate) fn accept(&self) -> Result<Option<OwnedFd>> {
        let accepted = match self {
            Listener::Tcp(listener) => listener.accept().map(|(socket, _)| socket.into()),
            Listener::Unix(listener, _) => listener.accept().map(|(socket, _)| socket.into()),
        };
        match accepted {
            Ok(socket) => Ok(Some(socket)),
            Err(error) => match error.kind() {
                // Who dialled has gone again.
                io::ErrorKind::WouldBlock
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error).context(|| "accepting a lane"),
            },
        }
    }
}

/// Makes a listening unix socket that is the owner's alone.
///
/// The file that bind makes has the socket's own mode, so that no mask of the whole process has to
/// change for it, whose other threads may make files meanwhile.
pub(crate) fn bind_private(path: &Path) -> io::Result<UnixListener> {
    use nix::sys::socket::{Backlog, bind, listen};
    use nix::sys::stat::{Mode, fchmod};
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(socket.into())
}

/// Every address of this machine, where none is named.
fn own_host(host: &str) -> &str {
    if host.is_empty() { "0.0.0.0" } else { host }
}

pub(crate) fn not_bound(uri: &Uri, source: io::Error) -> Error {
    Error::Listen {
        uri: uri.to_string(),
        hint: match source.kind() {
            io::ErrorKind::AddrInUse => "; stop what listens there or choose another one",
            io::ErrorKind::PermissionDenied => "; choose a place this user may listen on",
            io::ErrorKind::AddrNotAvailable => "; the address is not one of this machine's",
            io::ErrorKind::NotFound => "; its directory does not exist",
            _ => "",
        },
        source,
    }
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
        if let Listener::Unix(_, Some(path)) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// What this side, a destination, can do; going on over new lanes only where it can be reached again,
/// or told by somebody how.
pub(crate) fn capabilities(recovers: bool) -> Capabilities {
    let recovery = if recovers { Capabilities::RECOVERY } else { Capabilities::NONE };
    Capabilities::ACKS.union(Capabilities::CHECKSUM).union(recovery)
}

/// Answers a hello that fits; `answer` says that its sender has proven the secret, and we do too.
pub(crate) fn welcome(
    lane: &mut Lane,
    hello: &Hello,
    ours: Capabilities,
    answer: Option<&Answer>,
) -> Result<()> {
    let mut welcome = match Welcome::answer(hello, PROTOCOL, ours, [0; 32]) {
        Ok(welcome) => welcome,
        Err(error) => {
            refuse(lane, FaultCode::Protocol, &error.to_string());
            return Err(Error::protocol(&lane.name, error));
        }
    };
    if let Some(answer) = answer {
        welcome.proof = answer.welcome_proof(hello, &welcome);
    }
    lane.capabilities = welcome.capabilities;
    lane.say(&welcome.encode())
}

/// Answers a hello that does not fit. Who has gone already needs no answer.
pub(crate) fn refuse(lane: &Lane, code: FaultCode, text: &str) {
    let _ = lane.say(&Welcome::refuse(code, text));
}

/// A session as its source opens it: what the hellos of its lanes have in common.
#[derive(Clone, Copy)]
pub(crate) struct Session {
    pub(crate) id: SessionId,
    pub(crate) bulk_lanes: u16,
    pub(crate) capabilities: Capabilities,
}

impl Session {
    /// A new one. `acks` says whether acknowledgements are wanted, `recovers` whether this side can
    /// open lanes again.
    pub(crate) fn new(bulk_lanes: u16, acks: bool, recovers: bool) -> Result<Session> {
        let acks = if acks { Capabilities::ACKS } else { Capabilities::NONE };
        let recovery = if recovers { Capabilities::RECOVERY } else { Capabilities::NONE };
        Ok(Session { id: new_session()?, bulk_lanes, capabilities: acks.union(recovery) })
    }

    /// The same, with checksums or without.
    pub(crate) fn checked(self, checked: bool) -> Session {
        let sums = if checked { Capabilities::CHECKSUM } else { Capabilities::NONE };
        Session { capabilities: self.capabilities.union(sums), ..self }
    }

    /// The hello of lane `index`, 0 for the demand lane, in an attempt to open them all.
    pub(crate) fn hello(&self, index: u16, epoch: u32) -> Hello {
        Hello {
            versions: PROTOCOL,
            capabilities: self.capabilities,
            session: self.id,
            role: if index == 0 { LaneRole::Demand } else { LaneRole::Bulk },
            index,
            bulk_lanes: self.bulk_lanes,
            epoch,
            proof: [0; 32],
        }
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
pub(crate) fn stays_local(uri: &Uri, wait: Wait<'_>) -> Result<bool> {
    Ok(match uri {
        // What is behind one connection is not known; no bulk lane is.
        Uri::Unix { .. } | Uri::Fd { .. } | Uri::Exec { .. } => true,
        Uri::Tcp { host, port } => lookup::addresses(host, *port, wait)?
            .is_ok_and(|addresses| addresses.iter().all(|address| address.ip().is_loopback())),
    })
}

/// True when a connection does not leave this machine, as for [`stays_local`].
pub(crate) fn is_local(socket: &OwnedFd) -> bool {
    let Ok(address) = getsockname::<SockaddrStorage>(socket.as_raw_fd()) else { return false };
    match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
        (Some(address), _) => address.ip().is_loopback(),
        (None, Some(address)) => address.ip().is_loopback(),
        (None, None) => true,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// What the kernel has for an option of four bytes.
    fn option(lane: &Lane, level: i32, name: i32) -> i32 {
        let mut value = -1;
        let mut length = size_of_val(&value) as libc::socklen_t;
        // SAFETY: the kernel writes at most four bytes to a local variable.
        let result = unsafe {
            libc::getsockopt(
                lane.as_fd().as_raw_fd(),
                level,
                name,
                (&raw mut value).cast(),
                &raw mut length,
            )
        };
        assert_eq!(result, 0);
        value
    }

    #[test]
    fn packets_of_the_demand_lane_go_first() {
        for (address, level, name) in [
            ("127.0.0.1:0", libc::IPPROTO_IP, libc::IP_TOS),
            ("[::1]:0", libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
        ] {
            let listener = TcpListener::bind(address).unwrap();
            let dial =
                || OwnedFd::from(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
            let marks = |lane: &Lane| {
                (option(lane, level, name), option(lane, libc::SOL_SOCKET, libc::SO_PRIORITY))
            };
            let first = (i32::from(libc::IPTOS_LOWDELAY), 6);
            let dialled = Lane::new(dial(), lane_name(LaneRole::Demand, 0)).unwrap();
            assert_eq!(marks(&dialled), first, "{address}");
            let accepted = Lane::new(dial(), "a lane".into()).unwrap();
            assert_eq!(marks(&accepted), (0, 0), "{address}");
            assert_eq!(marks(&accepted.clone().assign(LaneRole::Bulk, 1)), (0, 0), "{address}");
            assert_eq!(marks(&accepted.assign(LaneRole::Demand, 0)), first, "{address}");
        }
    }
}
