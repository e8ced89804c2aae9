//! Ending connections, for somebody else than who serves them.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::sys::socket::Shutdown;

use super::Lane;
use super::tuning::is_tcp;

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
    if is_tcp(socket) {
        // SAFETY: the address is a local variable of the length given; this address family undoes the
        // connection (connect(2)) and involves no other memory.
        unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, length) };
    }
}
