//! The encoding of operations as submission queue entries.
//!
//! An entry points into the operation's memory and into its [`Aside`]. The table owns both from
//! before the entry is written until the operation's last completion, and moves neither.

use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd as RawTarget, Fixed, TimeoutFlags, Timespec};
use io_uring::{opcode, squeue};

use crate::key::{PAYLOAD_BITS, PAYLOAD_MASK, UserData};
use crate::memory::Memory;
use crate::op::{Fd, Op};

impl Op {
    /// The queue entry, without user_data and links. `linked`: it has a successor.
    pub(crate) fn encode(&mut self, aside: &mut Aside, linked: bool) -> squeue::Entry {
        match self {
            Op::Recv { fd, memory, wait_all, poll_first } => {
                let flags = if *wait_all { libc::MSG_WAITALL } else { 0 };
                let ioprio = if *poll_first { RECV_POLL_FIRST } else { 0 };
                let (start, len) = place(memory);
                on_fd!(fd, |t| opcode::Recv::new(t, start, len).flags(flags).ioprio(ioprio).build())
            }
            Op::Send { fd, memory, more, wait_all } => {
                let flags = send_flags(*more, *wait_all || linked);
                let (start, len) = place(memory);
                on_fd!(fd, |t| opcode::Send::new(t, start, len).flags(flags).build())
            }
            Op::SendZc { fd, memory, more, wait_all, fixed } => {
                let flags = send_flags(*more, *wait_all || linked) | record_end(*more);
                let (start, len) = place(memory);
                on_fd!(fd, |t| opcode::SendZc::new(t, start, len)
                    .flags(flags)
                    .zc_flags(SEND_ZC_REPORT_USAGE)
                    .buf_index(*fixed)
                    .build())
            }
            Op::SendVectored { fd, pieces, zero_copy, more } => {
                let header = aside.vectored(pieces);
                let flags = send_flags(*more, true) as u32;
                if *zero_copy {
                    let flags = flags | record_end(*more) as u32;
                    on_fd!(fd, |t| opcode::SendMsgZc::new(t, header)
                        .flags(flags)
                        .ioprio(SEND_ZC_REPORT_USAGE)
                        .build())
                } else {
                    on_fd!(fd, |t| opcode::SendMsg::new(t, header).flags(flags).build())
                }
            }
            Op::Read { fd, memory, offset } => {
                let (start, len) = place(memory);
                on_fd!(fd, |t| opcode::Read::new(t, start, len).offset(position(*offset)).build())
            }
            Op::ReadFixed { fd, buffer, span, offset } => {
                let (start, len) = (span.as_ptr(), span.len() as u32);
                on_fd!(fd, |t| opcode::ReadFixed::new(t, start, len, *buffer)
                    .offset(position(*offset))
                    .build())
            }
            Op::Write { fd, memory, offset } => {
                let (start, len) = place(memory);
                on_fd!(fd, |t| opcode::Write::new(t, start, len).offset(position(*offset)).build())
            }
            Op::Poll { fd, events, multishot } => {
                on_fd!(fd, |t| opcode::PollAdd::new(t, *events).multi(*multishot).build())
            }
            Op::Timeout { after } => opcode::Timeout::new(aside.timespec(*after))
                .flags(TimeoutFlags::ETIME_SUCCESS)
                .build(),
            Op::Splice { from, from_offset, to, to_offset, len, flags } => {
                let (from_offset, to_offset) =
                    (position(*from_offset) as i64, position(*to_offset) as i64);
                on_fd!(from, |f| on_fd!(to, |t| opcode::Splice::new(
                    f,
                    from_offset,
                    t,
                    to_offset,
                    *len
                )
                .flags(*flags)
                .build()))
            }
            Op::Madvise { span, advice } => {
                opcode::Madvise::new(span.as_ptr().cast(), span.len() as i64, *advice).build()
            }
            Op::Fallocate { fd, mode, offset, len } => {
                on_fd!(fd, |t| opcode::Fallocate::new(t, *len).offset(*offset).mode(*mode).build())
            }
            Op::MsgRing { value, extra, .. } => message(aside.recipient(), *value, *extra),
            Op::Nop => opcode::Nop::new().build(),
        }
    }
}

/// Memory that the kernel reads beside an operation's own. The table keeps it as long as that.
#[derive(Debug, Default)]
pub(crate) enum Aside {
    #[default]
    Nothing,
    Vectored(Box<Vectored>),
    Timespec(Box<Timespec>),
    /// The ring that receives a message, kept open until the message has arrived.
    Recipient(Arc<OwnedFd>),
}

impl Aside {
    fn vectored(&mut self, pieces: &mut [Memory]) -> *const libc::msghdr {
        let mut vectored = match mem::take(self) {
            Aside::Vectored(vectored) => vectored,
            _ => Box::default(),
        };
        let header = vectored.describe(pieces);
        *self = Aside::Vectored(vectored);
        header
    }

    fn timespec(&mut self, after: Duration) -> *const Timespec {
        *self = Aside::Timespec(Box::new(Timespec::from(after)));
        match self {
            Aside::Timespec(timespec) => &raw const **timespec,
            _ => std::ptr::null(),
        }
    }

    /// -1 without a ring, to which the kernel answers EBADF. Never happens: the driver looked the
    /// ring up.
    fn recipient(&self) -> RawTarget {
        match self {
            Aside::Recipient(fd) => RawTarget(fd.as_raw_fd()),
            _ => RawTarget(-1),
        }
    }
}

/// The header and vector of a vectored send. The storage is reused.
#[derive(Debug)]
pub(crate) struct Vectored {
    header: libc::msghdr,
    pieces: Vec<libc::iovec>,
}

impl Vectored {
    fn describe(&mut self, pieces: &mut [Memory]) -> *const libc::msghdr {
        self.pieces.clear();
        self.pieces.extend(
            pieces
                .iter_mut()
                .map(|m| libc::iovec { iov_base: m.address().cast(), iov_len: m.len() }),
        );
        self.header.msg_iov = self.pieces.as_mut_ptr();
        self.header.msg_iovlen = self.pieces.len() as _;
        &raw const self.header
    }
}

impl Default for Vectored {
    fn default() -> Vectored {
        // SAFETY: a msghdr is integers and pointers, and all zeroes is an empty one. It has private
        // padding in some libcs, so it cannot be written out as a literal.
        let header = unsafe { mem::zeroed() };
        Vectored { header, pieces: Vec::new() }
    }
}

/// A message as [`UserData::decode`] and the driver read it at the other end: the value's low bits
/// in user_data, its high bits in the flags, `extra` as the result.
///
/// The kernel leaves the upper half of the flags to the sender. It interprets the lower half
/// (IORING_CQE_F_32 makes an entry two entries long), so that half stays zero.
pub(crate) fn message(to: RawTarget, value: u64, extra: u32) -> squeue::Entry {
    let user_data = UserData::Message(value & PAYLOAD_MASK).encode();
    let flags = ((value >> PAYLOAD_BITS) as u32) << MESSAGE_FLAGS_SHIFT;
    opcode::MsgRingData::new(to, extra as i32, user_data, Some(flags)).build()
}

/// The value of a message, from its two parts.
pub(crate) fn message_value(payload: u64, flags: u32) -> u64 {
    payload | (u64::from(flags >> MESSAGE_FLAGS_SHIFT) << PAYLOAD_BITS)
}

/// `IORING_SEND_ZC_REPORT_USAGE` (linux/io_uring.h, since 6.2): the notification reports whether
/// the kernel copied.
pub(crate) const SEND_ZC_REPORT_USAGE: u16 = 1 << 3;

/// `IORING_RECVSEND_POLL_FIRST` (linux/io_uring.h, since 5.19): waits until the socket is ready, then tries.
const RECV_POLL_FIRST: u16 = 1 << 0;

/// The opcodes in use, and the kernel version that introduced each (man io_uring_enter).
pub(crate) const OPCODES: [(u8, &str, &str); 17] = [
    (opcode::Nop::CODE, "IORING_OP_NOP", "5.1"),
    (opcode::ReadFixed::CODE, "IORING_OP_READ_FIXED", "5.1"),
    (opcode::PollAdd::CODE, "IORING_OP_POLL_ADD", "5.1"),
    (opcode::SendMsg::CODE, "IORING_OP_SENDMSG", "5.3"),
    (opcode::Timeout::CODE, "IORING_OP_TIMEOUT", "5.4"),
    (opcode::AsyncCancel::CODE, "IORING_OP_ASYNC_CANCEL", "5.5"),
    (opcode::Fallocate::CODE, "IORING_OP_FALLOCATE", "5.6"),
    (opcode::Read::CODE, "IORING_OP_READ", "5.6"),
    (opcode::Write::CODE, "IORING_OP_WRITE", "5.6"),
    (opcode::Madvise::CODE, "IORING_OP_MADVISE", "5.6"),
    (opcode::Send::CODE, "IORING_OP_SEND", "5.6"),
    (opcode::Recv::CODE, "IORING_OP_RECV", "5.6"),
    (opcode::Splice::CODE, "IORING_OP_SPLICE", "5.7"),
    (opcode::MsgRingData::CODE, "IORING_OP_MSG_RING", "5.18"),
    (opcode::AsyncCancel2::CODE, "IORING_OP_ASYNC_CANCEL", "5.5"),
    (opcode::SendZc::CODE, "IORING_OP_SEND_ZC", "6.0"),
    (opcode::SendMsgZc::CODE, "IORING_OP_SENDMSG_ZC", "6.1"),
];

/// Builds an entry for either kind of descriptor, each of which is a type of its own for the
/// builders.
macro_rules! on_fd {
    ($fd:expr, |$target:ident| $build:expr) => {
        match $fd {
            Fd::Owned(fd) => {
                let $target = RawTarget(fd.as_raw_fd());
                $build
            }
            Fd::Fixed(slot) => {
                let $target = Fixed(*slot);
                $build
            }
        }
    };
}
use on_fd;

/// The address and length of a buffer; [`Op::check`] has checked that it is a buffer and short
/// enough.
fn place(memory: &mut Memory) -> (*mut u8, u32) {
    (memory.address(), memory.len() as u32)
}

fn send_flags(more: bool, wait_all: bool) -> i32 {
    let more = if more { libc::MSG_MORE } else { 0 };
    let wait_all = if wait_all { libc::MSG_WAITALL } else { 0 };
    libc::MSG_NOSIGNAL | more | wait_all
}

/// Ends a zero-copy send's last packet with the send. The kernel releases sends that share a packet
/// together (io_uring/notif.c, since Linux 6.10): in a stream without pauses it would never release
/// any.
fn record_end(more: bool) -> i32 {
    if more { 0 } else { libc::MSG_EOR }
}

/// -1 stands for the file's own position, or no position.
fn position(offset: Option<u64>) -> u64 {
    offset.unwrap_or(u64::MAX)
}

const MESSAGE_FLAGS_SHIFT: u32 = 16;
