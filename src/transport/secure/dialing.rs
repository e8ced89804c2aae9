//! Dialed connections, and lanes on existing connections.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::PollFlags;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, getsockname,
    getsockopt, socket, sockopt,
};
use umem_wire::Hello;

use super::{ClientAuth, introduce};
use crate::error::{Context, Error, Result, lane_name};
use crate::runtime::inbox::Wait;
use crate::transport::lane::{HELLO_TIMEOUT, Lane, choose_congestion};
use crate::transport::lookup;
use crate::transport::uri::Uri;

/// How often connecting to a unix socket with a full queue of connections is retried.
const CONNECT_INTERVAL: Duration = Duration::from_millis(20);

/// Connects to a destination and opens a lane.
pub(crate) fn dial(uri: &Uri, hello: &Hello, pass: &ClientAuth, wait: Wait<'_>) -> Result<Lane> {
    let name = lane_name(hello.role, hello.index);
    let lane = Lane::new(connect_to(uri, wait)?, name)?;
    introduce(lane, hello, pass, Some(HELLO_TIMEOUT), wait)
}

/// A connection to the listener at `uri`, without any data sent.
pub(crate) fn connect_to(uri: &Uri, wait: Wait<'_>) -> Result<OwnedFd> {
    match uri {
        Uri::Tcp { host, port } => connect_tcp(uri, host, *port, wait),
        Uri::Unix { path } => connect_unix(uri, path, wait),
        Uri::Fd { .. } | Uri::Exec { .. } => unreachable!("a single connection is not dialled"),
    }
}

/// Opens the one lane of an existing connection. The process at its other end may have to be
/// started first, so the first byte of the answer is awaited without a limit.
pub(crate) fn open_shared(
    socket: OwnedFd,
    hello: &Hello,
    pass: &ClientAuth,
    wait: Wait<'_>,
) -> Result<Lane> {
    introduce(Lane::shared(socket)?, hello, pass, None, wait)
}

/// Opens one of several lanes on an existing connection: the first as [`open_shared`] does; the
/// others are answered as soon as the first has been.
pub(crate) fn open(socket: OwnedFd, hello: &Hello, wait: Wait<'_>) -> Result<Lane> {
    let lane = Lane::new(socket, lane_name(hello.role, hello.index))?;
    let limit = (hello.index > 0).then_some(HELLO_TIMEOUT);
    introduce(lane, hello, &ClientAuth::default(), limit, wait)
}

/// Tries each address of the name; a dead one costs [`HELLO_TIMEOUT`].
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
            // The socket's queue of connections is full; no event reports free room, so it is tried
            // again.
            Err(Errno::EAGAIN) if Instant::now() < deadline => {
                wait(&[], Some(CONNECT_INTERVAL))?;
            }
            Err(errno) => return Err(failed(errno)),
        }
    }
}

/// One attempt, given up after [`HELLO_TIMEOUT`] or when `wait` gives up.
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
    // Rings wait on blocking sockets.
    fcntl(&socket, FcntlArg::F_SETFL(OFlag::empty())).context(|| "fcntl")?;
    Ok(Ok(socket))
}

/// Whether the lane stays on this machine, where zero-copy sends are copied anyway.
pub(crate) fn stays_local(uri: &Uri, wait: Wait<'_>) -> Result<bool> {
    Ok(match uri {
        // The peer of a single connection is unknown; such a connection has no bulk lanes.
        Uri::Unix { .. } | Uri::Fd { .. } | Uri::Exec { .. } => true,
        Uri::Tcp { host, port } => lookup::addresses(host, *port, wait)?
            .is_ok_and(|addresses| addresses.iter().all(|address| address.ip().is_loopback())),
    })
}

/// Whether a connection stays on this machine, as for [`stays_local`]; for a listener: all of its
/// connections.
pub(crate) fn is_local(socket: &impl AsFd) -> bool {
    let socket = socket.as_fd().as_raw_fd();
    getsockname::<SockaddrStorage>(socket).is_ok_and(|address| is_this_machine(&address))
}

/// Only addresses that are known to stay on this machine: others may lead anywhere, as AF_VSOCK to
/// other virtual machines.
fn is_this_machine(address: &SockaddrStorage) -> bool {
    if let Some(address) = address.as_sockaddr_in() {
        address.ip().is_loopback()
    } else if let Some(address) = address.as_sockaddr_in6() {
        address.ip().to_canonical().is_loopback()
    } else if let Some(address) = address.as_vsock_addr() {
        address.cid() == libc::VMADDR_CID_LOCAL
    } else {
        address.family() == Some(AddressFamily::Unix)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, UdpSocket};
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{SockaddrLike, VsockAddr};

    use super::*;

    fn vsock(cid: u32) -> SockaddrStorage {
        let address = VsockAddr::new(cid, 1);
        // SAFETY: the address is complete, and has the length given.
        unsafe { SockaddrStorage::from_raw(address.as_ptr(), Some(address.len())) }.unwrap()
    }

    #[test]
    fn address_is_local_only_if_known_to_stay_on_this_machine() {
        assert!(is_this_machine(&vsock(libc::VMADDR_CID_LOCAL)));
        for cid in [libc::VMADDR_CID_ANY, libc::VMADDR_CID_HYPERVISOR, libc::VMADDR_CID_HOST, 3] {
            assert!(!is_this_machine(&vsock(cid)), "CID {cid} is another machine, or any");
        }
        for (address, local) in [
            ("127.0.0.2:1", true),
            ("192.0.2.1:1", false),
            ("[::1]:1", true),
            ("[::ffff:127.0.0.1]:1", true),
            ("[::]:1", false),
        ] {
            let address: SocketAddr = address.parse().unwrap();
            assert_eq!(is_this_machine(&SockaddrStorage::from(address)), local, "{address}");
        }
        assert!(is_local(&UnixStream::pair().unwrap().0));
        assert!(!is_local(&UdpSocket::bind("0.0.0.0:0").unwrap()));
    }
}
