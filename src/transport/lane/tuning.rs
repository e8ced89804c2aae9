//! The socket options of lanes.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{setsockopt, sockopt};

/// Unsent bytes that the kernel queues for a lane before the socket reports itself full: enough to
/// keep 40 Gbit/s busy for 100 µs, and little enough that the order of pages can still change.
pub(super) const NOTSENT_LOWAT_BYTES: u32 = 512 << 10;

/// The same for a connection that background pages share with demand pages, which wait for the
/// queued bytes: 64 KiB are 50 µs at 10 Gbit/s.
pub(crate) const SHARED_QUEUE_BYTES: u32 = 64 << 10;

/// The congestion control of page lanes, which should use the path's whole rate at once: cubic
/// gives two to three times bbr's rate on short paths.
pub(crate) const CONGESTION_CONTROL: &str = "cubic";

/// After silence of this length on the demand lane the peer or the path counts as dead
/// (TCP_USER_TIMEOUT): demand traffic never waits for room at the peer. All lanes end with it.
pub(super) const DEMAND_TIMEOUT_MS: u32 = 10_000;

/// The same for background pages: a destination without room for them is silent too (tcp(7): a
/// window that stays closed for this long counts).
pub(super) const BACKGROUND_TIMEOUT_MS: u32 = 30_000;

/// An idle lane is probed after this time, and then every [`KEEPALIVE_INTERVAL_S`]; a peer that
/// does not answer counts as dead after the timeouts above.
pub(super) const KEEPALIVE_IDLE_S: u32 = 3;

pub(super) const KEEPALIVE_INTERVAL_S: u32 = 2;

/// The highest priority that needs no privilege (socket(7)); TC_PRIO_INTERACTIVE of
/// linux/pkt_sched.h.
pub(super) const INTERACTIVE: u32 = 6;

/// Requests precedence for a TCP connection's packets: on this host through their priority, in the
/// network through IP_TOS or IPV6_TCLASS, where routers honour these.
pub(super) fn go_first(connection: &OwnedFd) {
    // One of the two is for the other address family, and fails.
    let low_delay = u32::from(libc::IPTOS_LOWDELAY);
    let connection = connection.as_fd();
    let _ = setsockopt_raw(connection, libc::IPPROTO_IP, libc::IP_TOS, low_delay);
    let _ = setsockopt_raw(connection, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, low_delay);
    let _ = setsockopt_raw(connection, libc::SOL_SOCKET, libc::SO_PRIORITY, INTERACTIVE);
}

/// Sets the options of every TCP lane and returns the congestion control in effect.
pub(super) fn tune(
    socket: BorrowedFd<'_>,
    queue_bytes: u32,
    timeout_ms: u32,
) -> nix::Result<String> {
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

/// Makes connections use [`CONGESTION_CONTROL`]; where the administrator does not allow it, the
/// system's default remains.
///
/// To be called also before a socket connects or listens: a socket that has begun with bbr stays
/// paced by a timer whatever it is given later, which halves a core's sending rate over loopback.
pub(crate) fn choose_congestion(socket: &impl AsFd) {
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

/// Whether a socket is TCP, so that TCP's options can be set on it.
pub(super) fn is_tcp(socket: &OwnedFd) -> bool {
    // Other sockets do not have the option.
    nix::sys::socket::getsockopt(&socket.as_fd(), sockopt::TcpNoDelay).is_ok()
}
