//! What a lane asks of the kernel for its socket.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{setsockopt, sockopt};

/// Unsent bytes that a lane lets the kernel queue before it stops feeding it: enough to keep
/// 40 Gbit/s busy for 100 µs, and little enough that the order of pages can still change.
pub(super) const NOTSENT_LOWAT_BYTES: u32 = 512 << 10;

/// The same where background pages share the connection with demand pages, which wait for what is
/// queued: 64 KiB are 50 µs at 10 Gbit/s.
pub(crate) const SHARED_QUEUE_BYTES: u32 = 64 << 10;

/// What a page lane asks for, which wants the path's whole rate at once: cubic gives two to three times
/// bbr's on short paths.
pub(crate) const CONGESTION_CONTROL: &str = "cubic";

/// Silence of this long on the demand lane means that the peer or the path is dead (TCP_USER_TIMEOUT):
/// nothing there waits for room at the other side. All lanes go with it.
pub(super) const DEMAND_TIMEOUT_MS: u32 = 10_000;

/// The same where pages come in the background: a destination that has no room for them is silent too
/// (tcp(7): a window that stays closed for this long counts).
pub(super) const BACKGROUND_TIMEOUT_MS: u32 = 30_000;

/// A lane that has nothing to say is asked after this long, and then every [`KEEPALIVE_INTERVAL_S`],
/// whether anybody is there; who does not answer is dead by the timeouts above.
pub(super) const KEEPALIVE_IDLE_S: u32 = 3;

pub(super) const KEEPALIVE_INTERVAL_S: u32 = 2;

/// The highest priority that everybody may ask for (socket(7)); TC_PRIO_INTERACTIVE of
/// linux/pkt_sched.h.
pub(super) const INTERACTIVE: u32 = 6;

/// Asks for a TCP connection's packets to go before others: on this host by their priority, on the way by the
/// field that says so (IP_TOS, IPV6_TCLASS), where anybody heeds that.
pub(super) fn go_first(connection: &OwnedFd) {
    // One of them is for the other family, and fails.
    let low_delay = u32::from(libc::IPTOS_LOWDELAY);
    let connection = connection.as_fd();
    let _ = setsockopt_raw(connection, libc::IPPROTO_IP, libc::IP_TOS, low_delay);
    let _ = setsockopt_raw(connection, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, low_delay);
    let _ = setsockopt_raw(connection, libc::SOL_SOCKET, libc::SO_PRIORITY, INTERACTIVE);
}

/// Sets what every TCP lane wants and returns the congestion control it got.
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

/// Has connections use [`CONGESTION_CONTROL`]; where the administrator does not allow it, the system's own
/// choice stays.
///
/// To be called before a socket connects, or listens, and not only afterwards: one that has begun with bbr
/// stays paced by a timer whatever it is given later, which halves what a core sends over loopback.
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
    // Other sockets do not know the option.
    nix::sys::socket::getsockopt(&socket.as_fd(), sockopt::TcpNoDelay).is_ok()
}
