//! How other threads reach a ring.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

/// A ring's address, for [`Op::MsgRing`](crate::Op::MsgRing) from other rings.
///
/// It does not keep the ring open. The ring shares out a duplicate of its own descriptor, so a message
/// to a ring that has closed is [`Error::Closed`](crate::Error::Closed), and never goes to whatever has
/// the number now. A message that is on its way when the ring closes is lost.
#[derive(Clone, Debug)]
pub struct Mailbox {
    ring: Weak<OwnedFd>,
}

impl Mailbox {
    pub(crate) fn new(ring: &Arc<OwnedFd>) -> Mailbox {
        Mailbox { ring: Arc::downgrade(ring) }
    }

    /// The ring, kept open for as long as the answer is held; `None` once it has closed.
    pub(crate) fn ring(&self) -> Option<Arc<OwnedFd>> {
        self.ring.upgrade()
    }
}

/// Wakes a ring from a thread that has none: it sees a completion with
/// [`TOKEN_WAKE`](crate::TOKEN_WAKE). Wake-ups that come before it looks are merged into one; none is
/// lost. Waking a closed ring does nothing.
#[derive(Clone, Debug)]
pub struct Waker {
    eventfd: Arc<File>,
}

impl Waker {
    pub(crate) fn new(eventfd: Arc<File>) -> Waker {
        Waker { eventfd }
    }

    /// Wakes the ring. Never blocks; a few hundred nanoseconds.
    pub fn wake(&self) {
        // The counter is full (EAGAIN) after 2^64 wake-ups that nobody read: the ring is awake then.
        let _ = (&*self.eventfd).write(&1u64.to_ne_bytes());
    }
}
