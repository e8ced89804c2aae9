//! The operations: the resources they own, their options, and the checks that need no kernel.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::mail::Mailbox;
use crate::memory::{Memory, Span};

/// Most bytes of one operation: the kernel's `MAX_RW_COUNT`, 2 GiB less a page.
pub const OPERATION_BYTES_MAX: usize = 0x7fff_f000;

/// Most pieces of one vectored send: the kernel's `IOV_MAX`.
pub const PIECES_MAX: usize = 1024;

/// The descriptor of an operation.
#[derive(Clone, Debug)]
pub enum Fd {
    /// A descriptor; the table holds a share in it until the operation's last completion.
    Owned(Arc<OwnedFd>),
    /// A slot of [`Ring::register_files`](crate::Ring::register_files).
    Fixed(u32),
}

impl From<Arc<OwnedFd>> for Fd {
    fn from(fd: Arc<OwnedFd>) -> Fd {
        Fd::Owned(fd)
    }
}

impl From<OwnedFd> for Fd {
    fn from(fd: OwnedFd) -> Fd {
        Fd::Owned(Arc::new(fd))
    }
}

/// One operation, with all that it needs while it runs.
///
/// Sends never raise SIGPIPE. In a [`Chain`](crate::Chain) a send with a successor always waits for
/// all of its bytes: otherwise the successor could start in the middle of a message.
#[derive(Debug)]
pub enum Op {
    /// `recv(2)`.
    Recv {
        /// A connected socket.
        fd: Fd,
        /// The destination of the bytes.
        memory: Memory,
        /// Fill all of the memory (`MSG_WAITALL`); fewer bytes are
        /// [`Outcome::Short`](crate::Outcome::Short).
        wait_all: bool,
        /// Wait for data before the first attempt (`IORING_RECVSEND_POLL_FIRST`, Linux 5.19).
        poll_first: bool,
    },
    /// `send(2)`.
    Send {
        /// A connected socket.
        fd: Fd,
        /// The bytes to send.
        memory: Memory,
        /// More follows at once (`MSG_MORE`).
        more: bool,
        /// Send all of it (`MSG_WAITALL`); fewer bytes are
        /// [`Outcome::Short`](crate::Outcome::Short).
        wait_all: bool,
    },
    /// `send(2)` without a copy. Two completions: the result, then
    /// [`Outcome::Released`](crate::Outcome::Released) with the memory; only one after an early
    /// failure.
    SendZc {
        /// A connected socket.
        fd: Fd,
        /// The bytes to send; must not change before they are released.
        memory: Memory,
        /// More follows at once (`MSG_MORE`).
        more: bool,
        /// Send all of it (`MSG_WAITALL`); fewer bytes are
        /// [`Outcome::Short`](crate::Outcome::Short).
        wait_all: bool,
        /// The registered buffer that contains `memory`, if one does.
        fixed: Option<u16>,
    },
    /// `sendmsg(2)` of several pieces, all of their bytes (`MSG_WAITALL`).
    SendVectored {
        /// A connected socket.
        fd: Fd,
        /// 1 to [`PIECES_MAX`] pieces, none of them [`Memory::Pieces`]; returned as
        /// [`Memory::Pieces`].
        pieces: Vec<Memory>,
        /// As in [`Op::SendZc`], with its two completions.
        zero_copy: bool,
        /// More follows at once (`MSG_MORE`).
        more: bool,
    },
    /// `pread(2)`, or `read(2)` without an offset.
    Read {
        /// The file to read.
        fd: Fd,
        /// The destination of the bytes.
        memory: Memory,
        /// In bytes; none for the file's own position, and for files without a position.
        offset: Option<u64>,
    },
    /// [`Op::Read`] into a part of a registered buffer.
    ReadFixed {
        /// The file to read.
        fd: Fd,
        /// The index of the buffer among those registered.
        buffer: u16,
        /// The part of that buffer.
        span: Span,
        /// In bytes; none for the file's own position, and for files without a position.
        offset: Option<u64>,
    },
    /// `pwrite(2)`, or `write(2)` without an offset.
    Write {
        /// The file to write.
        fd: Fd,
        /// The bytes to write.
        memory: Memory,
        /// In bytes; none for the file's own position, and for files without a position.
        offset: Option<u64>,
    },
    /// `poll(2)` of one descriptor.
    Poll {
        /// The descriptor.
        fd: Fd,
        /// `POLLIN` and so on; the result has the same form.
        events: u32,
        /// Report repeatedly, until cancelled or ended by the kernel (a completion with `last`).
        multishot: bool,
    },
    /// Completes with [`Outcome::Done`](crate::Outcome::Done) after a time.
    Timeout {
        /// The time from submission.
        after: Duration,
    },
    /// `splice(2)`; one of the two is a pipe.
    Splice {
        /// The source of the bytes.
        from: Fd,
        /// In bytes; none for a pipe, a socket, or the file's own position.
        from_offset: Option<u64>,
        /// The destination of the bytes.
        to: Fd,
        /// In bytes; none for a pipe, a socket, or the file's own position.
        to_offset: Option<u64>,
        /// Most bytes to move.
        len: u32,
        /// `SPLICE_F_MOVE` and so on.
        flags: u32,
    },
    /// `madvise(2)`.
    Madvise {
        /// Whole pages.
        span: Span,
        /// `MADV_POPULATE_WRITE` and so on.
        advice: i32,
    },
    /// `fallocate(2)`.
    Fallocate {
        /// The file.
        fd: Fd,
        /// `FALLOC_FL_PUNCH_HOLE` and so on.
        mode: i32,
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u64,
    },
    /// A message to another ring, which receives it as
    /// [`Outcome::Message`](crate::Outcome::Message).
    MsgRing {
        /// The receiving ring.
        to: Mailbox,
        /// Any value.
        value: u64,
        /// Any value.
        extra: u32,
    },
    /// Completes at once.
    Nop,
}

/// The operations with their options off; the setters below turn them on.
impl Op {
    /// [`Op::Recv`] of the bytes available.
    pub fn recv(fd: impl Into<Fd>, memory: impl Into<Memory>) -> Op {
        Op::Recv { fd: fd.into(), memory: memory.into(), wait_all: false, poll_first: false }
    }

    /// [`Op::Send`] of as much as fits.
    pub fn send(fd: impl Into<Fd>, memory: impl Into<Memory>) -> Op {
        Op::Send { fd: fd.into(), memory: memory.into(), more: false, wait_all: false }
    }

    /// [`Op::SendZc`] of as much as fits, from memory that is not registered.
    pub fn send_zc(fd: impl Into<Fd>, memory: impl Into<Memory>) -> Op {
        Op::SendZc {
            fd: fd.into(),
            memory: memory.into(),
            more: false,
            wait_all: false,
            fixed: None,
        }
    }

    /// [`Op::SendVectored`], copied.
    pub fn send_vectored(fd: impl Into<Fd>, pieces: Vec<Memory>) -> Op {
        Op::SendVectored { fd: fd.into(), pieces, zero_copy: false, more: false }
    }

    /// [`Op::Read`] at the file's own position.
    pub fn read(fd: impl Into<Fd>, memory: impl Into<Memory>) -> Op {
        Op::Read { fd: fd.into(), memory: memory.into(), offset: None }
    }

    /// [`Op::ReadFixed`] at the file's own position.
    pub fn read_fixed(fd: impl Into<Fd>, buffer: u16, span: Span) -> Op {
        Op::ReadFixed { fd: fd.into(), buffer, span, offset: None }
    }

    /// [`Op::Write`] at the file's own position.
    pub fn write(fd: impl Into<Fd>, memory: impl Into<Memory>) -> Op {
        Op::Write { fd: fd.into(), memory: memory.into(), offset: None }
    }

    /// [`Op::Poll`], once.
    pub fn poll(fd: impl Into<Fd>, events: u32) -> Op {
        Op::Poll { fd: fd.into(), events, multishot: false }
    }

    /// [`Op::Timeout`].
    pub fn timeout(after: Duration) -> Op {
        Op::Timeout { after }
    }

    /// [`Op::Splice`] without offsets or flags.
    pub fn splice(from: impl Into<Fd>, to: impl Into<Fd>, len: u32) -> Op {
        Op::Splice {
            from: from.into(),
            from_offset: None,
            to: to.into(),
            to_offset: None,
            len,
            flags: 0,
        }
    }

    /// [`Op::Madvise`].
    pub fn madvise(span: Span, advice: i32) -> Op {
        Op::Madvise { span, advice }
    }

    /// [`Op::Fallocate`].
    pub fn fallocate(fd: impl Into<Fd>, mode: i32, offset: u64, len: u64) -> Op {
        Op::Fallocate { fd: fd.into(), mode, offset, len }
    }

    /// [`Op::MsgRing`].
    pub fn msg_ring(to: Mailbox, value: u64, extra: u32) -> Op {
        Op::MsgRing { to, value, extra }
    }

    /// [`Op::Nop`].
    pub fn nop() -> Op {
        Op::Nop
    }

    /// Moves all of the bytes. For receives and sends.
    #[must_use]
    pub fn wait_all(mut self) -> Op {
        match &mut self {
            Op::Recv { wait_all, .. } | Op::Send { wait_all, .. } | Op::SendZc { wait_all, .. } => {
                *wait_all = true;
            }
            Op::SendVectored { .. } => (),
            other => debug_assert!(false, "{} has no wait_all", other.name()),
        }
        self
    }

    /// Skips an attempt that would find no data: for a receive on a socket that is likely to be
    /// idle. Data that is there already is received as well, a little later than without this
    /// option.
    #[must_use]
    pub fn poll_first(mut self) -> Op {
        match &mut self {
            Op::Recv { poll_first, .. } => *poll_first = true,
            other => debug_assert!(false, "{} has no poll_first", other.name()),
        }
        self
    }

    /// Announces that more follows. For sends.
    #[must_use]
    pub fn more(mut self) -> Op {
        match &mut self {
            Op::Send { more, .. } | Op::SendZc { more, .. } | Op::SendVectored { more, .. } => {
                *more = true;
            }
            other => debug_assert!(false, "{} has no more", other.name()),
        }
        self
    }

    /// Does not copy. For vectored sends.
    #[must_use]
    pub fn zero_copy(mut self) -> Op {
        match &mut self {
            Op::SendVectored { zero_copy, .. } => *zero_copy = true,
            other => debug_assert!(false, "{} has no zero_copy", other.name()),
        }
        self
    }

    /// The memory lies in this registered buffer. For [`Op::SendZc`].
    #[must_use]
    pub fn fixed(mut self, buffer: u16) -> Op {
        match &mut self {
            Op::SendZc { fixed, .. } => *fixed = Some(buffer),
            other => debug_assert!(false, "{} has no fixed", other.name()),
        }
        self
    }

    /// Starts at this byte of the file. For reads and writes.
    #[must_use]
    pub fn at(mut self, position: u64) -> Op {
        match &mut self {
            Op::Read { offset, .. } | Op::ReadFixed { offset, .. } | Op::Write { offset, .. } => {
                *offset = Some(position);
            }
            other => debug_assert!(false, "{} has no offset", other.name()),
        }
        self
    }

    /// Reports repeatedly. For polls.
    #[must_use]
    pub fn multishot(mut self) -> Op {
        match &mut self {
            Op::Poll { multishot, .. } => *multishot = true,
            other => debug_assert!(false, "{} has no multishot", other.name()),
        }
        self
    }

    /// Takes the operation's memory out of it.
    pub fn into_memory(self) -> Option<Memory> {
        match self {
            Op::Recv { memory, .. }
            | Op::Send { memory, .. }
            | Op::SendZc { memory, .. }
            | Op::Read { memory, .. }
            | Op::Write { memory, .. } => Some(memory),
            Op::SendVectored { pieces, .. } => Some(Memory::Pieces(pieces)),
            Op::ReadFixed { span, .. } | Op::Madvise { span, .. } => Some(Memory::Span(span)),
            Op::Poll { .. }
            | Op::Timeout { .. }
            | Op::Splice { .. }
            | Op::Fallocate { .. }
            | Op::MsgRing { .. }
            | Op::Nop => None,
        }
    }

    /// The operation's name, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Recv { .. } => "recv",
            Op::Send { .. } => "send",
            Op::SendZc { .. } => "send_zc",
            Op::SendVectored { .. } => "send_vectored",
            Op::Read { .. } => "read",
            Op::ReadFixed { .. } => "read_fixed",
            Op::Write { .. } => "write",
            Op::Poll { .. } => "poll",
            Op::Timeout { .. } => "timeout",
            Op::Splice { .. } => "splice",
            Op::Madvise { .. } => "madvise",
            Op::Fallocate { .. } => "fallocate",
            Op::MsgRing { .. } => "msg_ring",
            Op::Nop => "nop",
        }
    }

    pub(crate) fn is_multishot(&self) -> bool {
        matches!(self, Op::Poll { multishot: true, .. })
    }

    /// Finds requests that no kernel could carry out, before submission. `linked`: it has a
    /// successor.
    pub(crate) fn check(&self, linked: bool) -> Result<(), Error> {
        let invalid = |what| Err(Error::Invalid { what });
        match self {
            Op::Recv { memory, .. }
            | Op::Send { memory, .. }
            | Op::SendZc { memory, .. }
            | Op::Read { memory, .. }
            | Op::Write { memory, .. } => match memory {
                Memory::Pieces(_) => invalid("only a vectored send takes pieces"),
                _ if memory.len() > OPERATION_BYTES_MAX => invalid(TOO_LONG),
                _ => Ok(()),
            },
            Op::SendVectored { pieces, .. } => check_pieces(pieces),
            Op::ReadFixed { span, .. } | Op::Madvise { span, .. } => {
                if span.len() > OPERATION_BYTES_MAX { invalid(TOO_LONG) } else { Ok(()) }
            }
            Op::Poll { multishot: true, .. } if linked => {
                invalid("a multishot poll has no end for a successor to wait for")
            }
            Op::Poll { .. }
            | Op::Timeout { .. }
            | Op::Splice { .. }
            | Op::Fallocate { .. }
            | Op::MsgRing { .. }
            | Op::Nop => Ok(()),
        }
    }

    /// The number of bytes below which its success is [`Outcome::Short`](crate::Outcome::Short):
    /// exactly where the kernel breaks a chain. The kernel does so for a transfer with MSG_WAITALL,
    /// and for every incomplete read, write or splice (io_uring/net.c, rw.c, splice.c:
    /// `req_set_fail`).
    pub(crate) fn wanted(&self, linked: bool) -> Option<u32> {
        let (len, all) = match self {
            Op::Recv { memory, wait_all, .. } => (memory.len(), *wait_all),
            Op::Send { memory, wait_all, .. } | Op::SendZc { memory, wait_all, .. } => {
                (memory.len(), *wait_all || linked)
            }
            Op::SendVectored { pieces, .. } => (pieces.iter().map(Memory::len).sum(), true),
            Op::Read { memory, .. } | Op::Write { memory, .. } => (memory.len(), linked),
            Op::ReadFixed { span, .. } => (span.len(), linked),
            Op::Splice { len, .. } => return linked.then_some(*len),
            Op::Poll { .. }
            | Op::Timeout { .. }
            | Op::Madvise { .. }
            | Op::Fallocate { .. }
            | Op::MsgRing { .. }
            | Op::Nop => return None,
        };
        all.then_some(len as u32)
    }
}

fn check_pieces(pieces: &[Memory]) -> Result<(), Error> {
    let invalid = |what| Err(Error::Invalid { what });
    if pieces.is_empty() || pieces.len() > PIECES_MAX {
        return invalid("a vectored send has 1 to 1024 pieces");
    }
    if pieces.iter().any(|piece| matches!(piece, Memory::Pieces(_))) {
        return invalid("a piece has no pieces of its own");
    }
    let total = pieces.iter().try_fold(0, |sum: usize, piece| sum.checked_add(piece.len()));
    if total.is_none_or(|total| total > OPERATION_BYTES_MAX) {
        return invalid(TOO_LONG);
    }
    Ok(())
}

const TOO_LONG: &str = "one operation moves at most 2 GiB less a page";

/// An operation (or a whole [`Chain`](crate::Chain)) that was not submitted, with the error. The
/// kernel has seen nothing of it, and its memory is in it.
#[derive(Debug)]
pub struct Rejected<T = Op> {
    /// The error.
    pub error: Error,
    /// The operation or chain.
    pub op: T,
}

impl<T> std::fmt::Display for Rejected<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.error.fmt(f)
    }
}

impl<T: std::fmt::Debug> std::error::Error for Rejected<T> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl<T> From<Rejected<T>> for Error {
    fn from(rejected: Rejected<T>) -> Error {
        rejected.error
    }
}
