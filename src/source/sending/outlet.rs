//! Sends batches through a pipe: by vmsplice(2) and splice(2) the socket refers to the pages of the
//! guest's memory themselves, and only the receiver copies them.
//!
//! For lanes that stay on this machine, where a zero-copy send is copied after all: its
//! notification must mean that the pages are the sender's again, so that they cannot lie in another
//! socket's queue. Spliced pages can, as there is no notification. That is safe for the memory of a
//! stopped guest: it does not change while pages may be in flight, or, if the migration fails and
//! the guest continues, the sent data is not used.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::sys::signal::{SigSet, Signal};
use umem_ring::Memory;

/// The pipe's size, which counts pages, one in each slot: the largest batch without its headers.
/// Unprivileged users may have as much (pipe(7), `/proc/sys/fs/pipe-max-size`).
const PIPE_BYTES: i32 = 1 << 20;

/// A smaller pipe costs more calls than it saves.
const PIPE_BYTES_MIN: i32 = 256 << 10;

/// A lane's pipe, and the batch in it.
#[derive(Debug)]
pub(in crate::source) struct SpliceSender {
    output: OwnedFd,
    input: OwnedFd,
    pieces: Vec<Memory>,
    /// The next piece for the pipe, and the bytes of it that are in the pipe.
    next: usize,
    done: usize,
    /// Bytes in the pipe.
    inside: usize,
}

/// The progress of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::source) enum Left {
    /// The socket has taken all of it.
    All,
    /// The socket takes more when it is writable.
    Some,
}

/// Why a batch was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::source) enum SpliceError {
    /// Pages cannot be spliced; [`SpliceSender::into_rest`] has the unsent part.
    Unable,
    /// The connection is broken, or the memory is gone.
    Failed(Errno),
}

impl SpliceSender {
    /// None if there is no such pipe. Blocks SIGPIPE for the calling thread from then on: splice(2)
    /// raises it when the connection is closed, and has no flag against that.
    pub(in crate::source) fn new() -> Option<SpliceSender> {
        let mut broken = SigSet::empty();
        broken.add(Signal::SIGPIPE);
        broken.thread_block().ok()?;
        let (output, input) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).ok()?;
        // Refused to a user whose pipes have too much already (pipe(7), `pipe-user-pages-soft`).
        let _ = fcntl(&input, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
        let size = fcntl(&input, FcntlArg::F_GETPIPE_SZ).ok()?;
        (size >= PIPE_BYTES_MIN).then(|| SpliceSender {
            output,
            input,
            pieces: Vec::new(),
            next: 0,
            done: 0,
            inside: 0,
        })
    }

    /// Takes a batch, after the one before has been sent.
    pub(in crate::source) fn begin(&mut self, pieces: Vec<Memory>) {
        debug_assert!(self.pieces.is_empty() && self.inside == 0);
        (self.pieces, self.next, self.done) = (pieces, 0, 0);
    }

    /// Lets the socket take as much as it can, without waiting. Operations of a ring on the socket
    /// still wait, as their mode is fixed when they begin.
    pub(in crate::source) fn advance(&mut self, socket: impl AsFd) -> Result<Left, SpliceError> {
        // splice(2) waits on a blocking socket, even with SPLICE_F_NONBLOCK.
        let block =
            |flags| fcntl(socket.as_fd(), FcntlArg::F_SETFL(flags)).map_err(SpliceError::Failed);
        block(OFlag::O_NONBLOCK)?;
        let left = self.splice_out(&socket);
        block(OFlag::empty())?;
        left
    }

    fn splice_out(&mut self, socket: &impl AsFd) -> Result<Left, SpliceError> {
        loop {
            if self.inside == 0 {
                self.fill()?;
            }
            if self.inside == 0 {
                return Ok(Left::All);
            }
            let mut flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
            flags.set(SpliceFFlags::SPLICE_F_MORE, self.next < self.pieces.len());
            match splice(&self.output, None, socket, None, self.inside, flags) {
                // Never returned for a pipe with data.
                Ok(0) => return Err(SpliceError::Failed(Errno::EIO)),
                Ok(count) => self.inside -= count,
                Err(Errno::EAGAIN) => return Ok(Left::Some),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(stuck(errno)),
            }
        }
    }

    /// Fills the pipe up.
    fn fill(&mut self) -> Result<(), SpliceError> {
        while let Some(piece) = self.pieces.get(self.next) {
            let put = match piece {
                // Written, as its buffer is reused at once.
                Memory::Bytes(bytes) => {
                    nix::unistd::write(&self.input, &bytes.as_slice()[self.done..])
                }
                Memory::Span(span) => {
                    let rest = libc::iovec {
                        iov_base: span.as_ptr().wrapping_add(self.done).cast(),
                        iov_len: span.len() - self.done,
                    };
                    let (fd, flags) = (self.input.as_raw_fd(), libc::SPLICE_F_NONBLOCK);
                    // SAFETY: one piece of a mapping, which the span keeps; the kernel takes
                    // references to its pages, and reads them.
                    let result = unsafe { libc::vmsplice(fd, &raw const rest, 1, flags) };
                    Errno::result(result).map(isize::unsigned_abs)
                }
                Memory::Pieces(_) => unreachable!("a batch has no nested pieces"),
            };
            match put {
                Ok(count) => {
                    self.inside += count;
                    self.done += count;
                    if self.done == piece.len() {
                        (self.next, self.done) = (self.next + 1, 0);
                    }
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(stuck(errno)),
            }
        }
        Ok(())
    }

    /// The pieces of a batch that has been sent.
    pub(in crate::source) fn end(&mut self) -> Vec<Memory> {
        std::mem::take(&mut self.pieces)
    }

    /// The part of the batch that the socket has not taken, to be sent in another way. Drops the
    /// pipe with its data.
    pub(in crate::source) fn into_rest(self) -> Vec<Memory> {
        let before: usize = self.pieces[..self.next].iter().map(Memory::len).sum();
        let mut left = before + self.done - self.inside;
        let mut rest = Vec::with_capacity(self.pieces.len());
        for piece in self.pieces {
            let gone = left.min(piece.len());
            left -= gone;
            if gone < piece.len() {
                rest.push(without(piece, gone));
            }
        }
        rest
    }
}

/// A piece without its first `gone` bytes, fewer than all.
fn without(piece: Memory, gone: usize) -> Memory {
    match piece {
        Memory::Bytes(bytes) => {
            let length = bytes.len();
            Memory::Bytes(bytes.slice(gone..length))
        }
        Memory::Span(span) => {
            let rest = span.sub(gone, span.len() - gone);
            Memory::Span(rest.expect("inside the span"))
        }
        Memory::Pieces(_) => unreachable!("a batch has no nested pieces"),
    }
}

fn stuck(errno: Errno) -> SpliceError {
    match errno {
        // Readable memory without pages to refer to; the latter three are a sandbox's errors for a
        // system call that it does not know.
        Errno::EINVAL | Errno::EFAULT | Errno::ENOSYS | Errno::EPERM | Errno::EACCES => {
            SpliceError::Unable
        }
        errno => SpliceError::Failed(errno),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::fs::FileExt;

    use nix::poll::{PollFd, PollFlags, PollTimeout};

    use crate::runtime::polling::poll;
    use nix::sys::eventfd::EventFd;

    use super::*;
    use crate::memory::region::RamFile;

    const RAM_BYTES: u64 = 8 << 20;

    /// A file in which each word is its own offset.
    fn ram() -> RamFile {
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        let words: Vec<u8> = (0..RAM_BYTES).step_by(8).flat_map(u64::to_le_bytes).collect();
        file.as_file().write_all_at(&words, 0).unwrap();
        RamFile::open_source("ram0", file.path(), false).unwrap()
    }

    /// Headers and runs in turns, more than a pipe and a socket hold, and the bytes that they are.
    fn batch(ram: &RamFile) -> (Vec<Memory>, Vec<u8>) {
        let (mut pieces, mut bytes) = (Vec::new(), Vec::new());
        for (index, offset) in (0..RAM_BYTES).step_by(256 << 10).enumerate() {
            let header = vec![index as u8; 32 * (index % 3 + 1)];
            bytes.extend_from_slice(&header);
            pieces.push(Memory::from(header));
            let length = (256 << 10) - 4096 * (index as u64 % 5);
            bytes.extend((offset..offset + length).step_by(8).flat_map(u64::to_le_bytes));
            pieces.push(Memory::from(ram.span(offset, length)));
        }
        (pieces, bytes)
    }

    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let outgoing = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (outgoing, listener.accept().unwrap().0)
    }

    fn bytes_of(pieces: &[Memory]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for piece in pieces {
            let mut copy = vec![0; piece.len()];
            crate::memory::copy::copy_out(piece, 0, &mut copy).unwrap();
            bytes.extend(copy);
        }
        bytes
    }

    #[test]
    fn headers_and_pages_arrive_in_order() {
        let ram = ram();
        let (outgoing, mut incoming) = connection();
        let mut outlet = SpliceSender::new().unwrap();
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            incoming.read_to_end(&mut bytes).map(|_| bytes).unwrap()
        });
        let mut expected = Vec::new();
        for _ in 0..2 {
            let (pieces, bytes) = batch(&ram);
            let count = pieces.len();
            outlet.begin(pieces);
            while outlet.advance(&outgoing).unwrap() == Left::Some {
                let mut room = [PollFd::new(outgoing.as_fd(), PollFlags::POLLOUT)];
                poll(&mut room, PollTimeout::NONE).unwrap();
            }
            assert_eq!(outlet.end().len(), count, "all buffers come back");
            expected.extend(bytes);
        }
        drop(outgoing);
        assert!(reader.join().unwrap() == expected, "every byte is equal");
    }

    #[test]
    fn into_rest_returns_the_bytes_that_the_socket_has_not_taken() {
        let ram = ram();
        let (outgoing, mut incoming) = connection();
        let mut outlet = SpliceSender::new().unwrap();
        let (pieces, expected) = batch(&ram);
        outlet.begin(pieces);
        // Without a reader, and with more data than both sockets hold.
        assert_eq!(outlet.advance(&outgoing), Ok(Left::Some));
        assert!(outlet.inside > 0, "the pipe holds bytes too");
        let rest = bytes_of(&outlet.into_rest());
        drop(outgoing);
        let mut taken = Vec::new();
        incoming.read_to_end(&mut taken).unwrap();
        assert!(!taken.is_empty() && !rest.is_empty());
        taken.extend(rest);
        assert!(taken == expected, "no byte is lost or sent twice");
    }

    /// A file that can be written to, and takes no pages.
    #[test]
    fn batch_is_returned_whole_when_pages_cannot_be_spliced() {
        let ram = ram();
        let mut outlet = SpliceSender::new().unwrap();
        let (pieces, expected) = batch(&ram);
        outlet.begin(pieces);
        let counter = EventFd::new().unwrap();
        assert_eq!(outlet.advance(&counter), Err(SpliceError::Unable));
        assert!(bytes_of(&outlet.into_rest()) == expected);
    }

    #[test]
    fn closed_connection_is_an_error_without_a_signal() {
        let ram = ram();
        let (outgoing, incoming) = connection();
        drop(incoming);
        outgoing.shutdown(std::net::Shutdown::Write).unwrap();
        let mut outlet = SpliceSender::new().unwrap();
        outlet.begin(batch(&ram).0);
        assert_eq!(outlet.advance(&outgoing), Err(SpliceError::Failed(Errno::EPIPE)));
        let blocked = SigSet::thread_get_mask().unwrap();
        assert!(
            blocked.contains(Signal::SIGPIPE),
            "it would end a process that does not ignore it"
        );
    }
}
