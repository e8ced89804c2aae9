//! How other threads reach a ring.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

/// A ring's address, for [`Op::MsgRing`](crate::Op::MsgRing) from other rings.
///
/// A mailbox does not keep the ring open. The ring lends out a duplicate of its own descriptor, so
/// a message to a closed ring is [`Error::Closed`](crate::Error::Closed), and never reaches a new
/// owner of the descriptor's number. A message in flight is lost when the ring closes.
#[derive(Clone, Debug)]
pub struct Mailbox {
    ring: Weak<OwnedFd>,
}

impl Mailbox {
    pub(crate) fn new(ring: &Arc<OwnedFd>) -> Mailbox {
        Mailbox { ring: Arc::downgrade(ring) }
    }

    /// The ring, kept open for as long as the result is held; `None` once it has closed.
    pub(crate) fn ring(&self) -> Option<Arc<OwnedFd>> {
        self.ring.upgrade()
    }
}

/// Wakes a ring from a thread without a ring: the woken ring sees a completion with
/// [`TOKEN_WAKE`](crate::TOKEN_WAKE). Wake-ups before that are merged into one; none is lost.
/// Waking a closed ring does nothing.
#[derive(Clone, Debug)]
pub struct Waker {
    eventfd: Arc<File>,
}

impl Waker {
    pub(crate) fn new(eventfd: Arc<File>) -> Waker {
        Waker { eventfd }
    }

    /// Wakes the ring. Never blocks; takes a few hundred nanoseconds.
    pub fn wake(&self) {
        // The counter is full (EAGAIN) after 2^64 unread wake-ups: the ring is awake then.
        let _ = (&*self.eventfd).write(&1u64.to_ne_bytes());
    }
}
