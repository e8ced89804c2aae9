//! Ending connections from a thread that does not serve them.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::sys::socket::Shutdown;

use super::Lane;
use super::tuning::is_tcp;

/// Connections that another thread than the serving one may have to end. The serving thread still
/// closes each of them. Clones refer to the same connections.
#[derive(Clone, Default)]
pub(crate) struct ShutdownHandle(Arc<Mutex<Vec<Weak<OwnedFd>>>>);

impl ShutdownHandle {
    pub(crate) fn new<'a>(lanes: impl IntoIterator<Item = &'a Lane>) -> ShutdownHandle {
        let all = ShutdownHandle::default();
        all.replace(lanes);
        all
    }

    /// Replaces all connections.
    pub(crate) fn replace<'a>(&self, lanes: impl IntoIterator<Item = &'a Lane>) {
        let sockets = lanes.into_iter().map(|lane| Arc::downgrade(&lane.socket)).collect();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = sockets;
    }

    /// Ends all connections that are still open.
    pub(crate) fn sever(&self) {
        let mut sockets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let alive = sockets.drain(..).filter_map(|socket| socket.upgrade());
        alive.for_each(|socket| sever(&socket));
    }
}

/// Ends a connection at once and discards data in flight: operations on it complete, and the peer
/// receives a reset if it can receive at all.
pub(crate) fn sever(socket: &OwnedFd) {
    // Both calls fail if the peer was first.
    let _ = nix::sys::socket::shutdown(socket.as_raw_fd(), Shutdown::Both);
    // Unacknowledged data would otherwise keep its memory until the connection times out.
    let nowhere =
        libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let length = size_of_val(&nowhere) as libc::socklen_t;
    if is_tcp(socket) {
        // SAFETY: the address is a local variable of the length given; this address family
        // dissolves the connection (connect(2)) and involves no other memory.
        unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, length) };
    }
}
