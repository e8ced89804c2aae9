//! The reports of a ring, translated from the kernel's completions.

use crate::error::Errno;
use crate::key::Key;
use crate::memory::Memory;

/// The token of completions caused by a [`Waker`](crate::Waker).
pub const TOKEN_WAKE: u64 = u64::MAX;

/// The token of messages from other rings.
pub const TOKEN_MESSAGE: u64 = u64::MAX - 1;

/// One report about one operation, message or wake-up (for the last two `key` is [`Key::NONE`]).
#[derive(Debug)]
pub struct Completion {
    /// The operation.
    pub key: Key,
    /// The token of the submission, [`TOKEN_MESSAGE`] or [`TOKEN_WAKE`].
    pub token: u64,
    /// The result.
    pub outcome: Outcome,
    /// The operation's memory, returned with its last completion; `None` for operations without
    /// memory.
    pub memory: Option<Memory>,
    /// Whether this is the last completion of `key`. Messages and wake-ups are never the last.
    pub last: bool,
}

/// The result of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Success: bytes moved, poll events, or 0 where there is nothing to count. A receive or read
    /// of 0 bytes is the end of the stream; an expired [`Op::Timeout`](crate::Op::Timeout) is 0.
    /// For a wake-up: how many were merged into this one.
    Done(u32),
    /// Fewer bytes moved than required: a send or receive that waits for all of its bytes, or a
    /// read, write or splice with a successor in its chain. The successor did not start.
    Short {
        /// Bytes moved.
        done: u32,
        /// Bytes asked for.
        wanted: u32,
    },
    /// The operation failed. `ECANCELED` follows a [`Ring::cancel`](crate::Ring::cancel).
    Failed(Errno),
    /// The operation never ran, because `failed`, a member of the same chain, failed or was short.
    NotStarted {
        /// The member whose completion has the cause.
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
