//! What comes back from the kernel, in the user's words.

use crate::error::Errno;
use crate::key::Key;
use crate::memory::Memory;

/// The token of completions caused by a [`Waker`](crate::Waker).
pub const TOKEN_WAKE: u64 = u64::MAX;

/// The token of messages from other rings.
pub const TOKEN_MESSAGE: u64 = u64::MAX - 1;

/// One report about one operation, or one message or wake-up (then `key` is [`Key::NONE`]).
#[derive(Debug)]
pub struct Completion {
    /// The operation it is about.
    pub key: Key,
    /// What the operation was submitted with, [`TOKEN_MESSAGE`] or [`TOKEN_WAKE`].
    pub token: u64,
    /// What happened.
    pub outcome: Outcome,
    /// The operation's memory, given back with its last completion; `None` where it has none.
    pub memory: Option<Memory>,
    /// Nothing more will come for `key`. Messages and wake-ups are never the last.
    pub last: bool,
}

/// What happened to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It succeeded: bytes moved, poll events, or 0 where there is nothing to count. A receive or read
    /// of 0 bytes is the end of the stream; an expired [`Op::Timeout`](crate::Op::Timeout) is 0.
    /// For a wake-up it is how many were merged into this one.
    Done(u32),
    /// It moved less than it had to: a send or receive that waits for all of its bytes, or a read,
    /// write or splice with a successor in its chain. That successor did not start.
    Short {
        /// Bytes moved.
        done: u32,
        /// Bytes asked for.
        wanted: u32,
    },
    /// The kernel refused or gave up. `ECANCELED` is the answer to [`Ring::cancel`](crate::Ring::cancel).
    Failed(Errno),
    /// It never ran, because `failed`, a member of the same chain, failed or was short.
    NotStarted {
        /// The member whose own completion says why.
        failed: Key,
    },
    /// A zero-copy send's memory is no longer in use; its result came earlier.
    Released {
        /// The kernel copied the bytes after all (loopback, a device without scatter-gather).
        copied: bool,
    },
    /// A message from another ring.
    Message {
        /// As given to [`Op::MsgRing`](crate::Op::MsgRing).
        value: u64,
        /// As given to [`Op::MsgRing`](crate::Op::MsgRing).
        extra: u32,
    },
}
