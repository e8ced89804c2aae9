//! The ways of filling memory from a socket.

use std::fs::File;
use std::io::Read;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, sync_channel};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::sys::mman::MmapAdvise;
use serde::Serialize;

use crate::error::{Context, Result, failure};
use crate::interrupt;
use crate::memory::{HUGE_PAGE_BYTES, Mapping, Pages};
use crate::userfault::Userfault;

/// A buffer that stays in the core's cache.
const HOT_BYTES: usize = 256 << 10;

/// A smaller one, of which more stays in the cache.
const SMALL_BYTES: usize = 64 << 10;

/// Bytes of one receive into the mapping, or of one splice; also the pipe's size.
const CALL_BYTES: usize = 1 << 20;

/// Bytes that are copied for the guest at a time, and how many such pieces may wait.
const OWN_BYTES: usize = 1 << 20;
const OWN_PIECES_MAX: usize = 8;

/// Pages are populated in pieces of this many bytes, and at most this many bytes ahead of the
/// receiver.
const MADE_BYTES: usize = 2 << 20;
const AHEAD_BYTES: usize = 32 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Receive {
    /// Into a buffer in the cache, then discarded.
    Discard,
    /// Straight into a mapping of the fresh file.
    Map,
    /// As `Map`, with a second thread that populates the mapping's pages ahead of the receiver.
    MapAhead,
    /// Into a buffer in the cache, then pwrite(2) to the fresh file.
    Write,
    /// splice(2) socket → pipe → fresh file.
    Splice,
    /// Into a buffer, then UFFDIO_COPY into registered anonymous memory.
    Copy,
    /// The same in smaller pieces.
    CopySmall,
    /// As `Write`, then UFFDIO_CONTINUE, MADV_POPULATE_WRITE and MADV_REMOVE by the same thread.
    Own,
    /// As `Own`, with everything after the write by a second thread.
    OwnBeside,
}

/// The memory that one run fills.
pub(super) struct Target {
    file: Option<File>,
    pub(super) mapping: Mapping,
    /// Only if pages become visible through it.
    uffd: Option<Userfault>,
}

impl Target {
    pub(super) fn new(pages: Pages, bytes: usize) -> Result<Target> {
        let (file, mapping) = pages.map(bytes)?;
        let is_registered = pages.is_anonymous() || pages == Pages::Private;
        let uffd = is_registered.then(|| Userfault::of(&mapping, pages)).transpose()?;
        Ok(Target { file, mapping, uffd })
    }

    fn file(&self) -> Result<&File> {
        self.file.as_ref().ok_or_else(|| "this memory has no file".into())
    }

    fn uffd(&self) -> Result<&Userfault> {
        self.uffd.as_ref().ok_or_else(|| "this memory has no userfaultfd".into())
    }
}

impl Receive {
    pub(crate) fn name(self, pages: Pages) -> String {
        let file = pages.name();
        match self {
            Receive::Discard => format!("a hot buffer, thrown away (from {file})"),
            Receive::Map => format!("a fresh mapping: {file}"),
            Receive::MapAhead => format!("a mapping populated ahead: {file}"),
            Receive::Write => format!("a hot buffer, then pwrite: {file}"),
            Receive::Splice => format!("splice through a pipe: {file}"),
            Receive::Copy => format!("a buffer, then UFFDIO_COPY: {file}"),
            Receive::CopySmall => format!("64 KiB, then UFFDIO_COPY: {file}"),
            Receive::Own => format!("pwrite, then the guest's own: {file}"),
            Receive::OwnBeside => format!("pwrite, made own by a thread: {file}"),
        }
    }

    /// Receives `bytes`, and closes the connection. Returns the processor time of a second thread,
    /// seconds.
    pub(super) fn all(
        self,
        socket: TcpStream,
        target: &Target,
        pages: Pages,
        bytes: usize,
    ) -> Result<f64> {
        let none = |()| 0.0;
        match self {
            Receive::Discard => through_buffer(socket, bytes, |_, _| Ok(())).map(none),
            Receive::Write => {
                let file = target.file()?;
                through_buffer(socket, bytes, |data, offset| file.write_all_at(data, offset))
                    .map(none)
            }
            Receive::Map => into_mapping(&socket, &target.mapping, bytes, |_| Ok(())).map(none),
            Receive::MapAhead => into_mapping_ahead(&socket, &target.mapping, bytes),
            Receive::Splice => through_pipe(&socket, target.file()?, bytes).map(none),
            Receive::Copy => {
                let buffer_bytes =
                    if pages == Pages::AnonymousHuge { HUGE_PAGE_BYTES } else { HOT_BYTES };
                into_anonymous(socket, target, bytes, buffer_bytes).map(none)
            }
            Receive::CopySmall => into_anonymous(socket, target, bytes, SMALL_BYTES).map(none),
            Receive::Own => {
                into_own(socket, target, bytes, |piece| make_own(target, piece)).map(none)
            }
            Receive::OwnBeside => into_own_beside(socket, target, bytes),
        }
        .context(|| format!("{self:?}"))
    }
}

/// Anonymous memory: whole buffers, each copied in with one UFFDIO_COPY.
fn into_anonymous(
    mut socket: TcpStream,
    target: &Target,
    bytes: usize,
    buffer_bytes: usize,
) -> Result<()> {
    let mut buffer = vec![0; buffer_bytes];
    let uffd = target.uffd()?;
    let mut received = 0;
    while received < bytes {
        interrupt::check()?;
        let length = buffer.len().min(bytes - received);
        socket.read_exact(&mut buffer[..length])?;
        uffd.copy(&target.mapping, received, &buffer[..length])?;
        received += length;
    }
    Ok(())
}

/// A part of the memory that has landed in the file.
#[derive(Clone, Copy)]
struct Piece {
    offset: usize,
    bytes: usize,
}

/// Private memory: into the file, and `own` for each complete piece.
fn into_own(
    socket: TcpStream,
    target: &Target,
    bytes: usize,
    mut own: impl FnMut(Piece) -> Result<()>,
) -> Result<()> {
    let file = target.file()?;
    let mut owned = 0;
    through_buffer(socket, bytes, |data, offset| {
        file.write_all_at(data, offset)?;
        let landed = usize::try_from(offset).expect("64 bits") + data.len();
        while owned + OWN_BYTES <= landed || (landed == bytes && owned < bytes) {
            let piece = Piece { offset: owned, bytes: OWN_BYTES.min(bytes - owned) };
            own(piece).map_err(std::io::Error::other)?;
            owned += piece.bytes;
        }
        Ok(())
    })
}

fn into_own_beside(socket: TcpStream, target: &Target, bytes: usize) -> Result<f64> {
    std::thread::scope(|scope| {
        let (sender, pieces): (_, Receiver<Piece>) = sync_channel(OWN_PIECES_MAX);
        let helper = scope.spawn(move || {
            // The thread inherits the receiver's core; lets it use both.
            crate::machine::pin_to(&crate::machine::two_cores()?)?;
            pieces.into_iter().try_for_each(|piece| make_own(target, piece))?;
            super::thread_cpu_s()
        });
        let received = into_own(socket, target, bytes, |piece| {
            sender.send(piece).map_err(|_| "the second thread of the receiver has ended".into())
        });
        drop(sender);
        let helped = super::joined(helper.join());
        received.and(helped)
    })
}

/// Makes pages of the file visible, copies them for the guest, and frees the file's copy.
fn make_own(target: &Target, piece: Piece) -> Result<()> {
    let (mapping, Piece { offset, bytes }) = (&target.mapping, piece);
    target.uffd()?.proceed(mapping, offset, bytes)?;
    mapping.advise(offset, bytes, MmapAdvise::MADV_POPULATE_WRITE)?;
    // As MADV_REMOVE does for a shared mapping.
    let flags = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
        | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    nix::fcntl::fallocate(target.file()?, flags, i64::try_from(offset)?, i64::try_from(bytes)?)
        .context(|| "releasing the file's copy")
}

fn through_buffer(
    mut socket: TcpStream,
    bytes: usize,
    mut store: impl FnMut(&[u8], u64) -> std::io::Result<()>,
) -> Result<()> {
    let mut buffer = vec![0; HOT_BYTES];
    let mut received = 0;
    while received < bytes {
        interrupt::check()?;
        let length = buffer.len().min(bytes - received);
        match socket.read(&mut buffer[..length]) {
            Ok(0) => return cut_short(received, bytes),
            Ok(count) => {
                store(&buffer[..count], received as u64)?;
                received += count;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// `before` gets the number of bytes received, before each call.
fn into_mapping(
    socket: &TcpStream,
    mapping: &Mapping,
    bytes: usize,
    mut before: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    let mut received = 0;
    while received < bytes {
        interrupt::check()?;
        before(received)?;
        let (start, left) = mapping.at(received);
        let length = CALL_BYTES.min(left);
        // SAFETY: the bytes lie inside the mapping, which outlives the call and has no other user.
        let result =
            unsafe { libc::recv(socket.as_raw_fd(), start.cast(), length, libc::MSG_WAITALL) };
        match Errno::result(result) {
            Ok(0) => return cut_short(received, bytes),
            Ok(count) => received += count.unsigned_abs(),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// The receiver waits for no page: if it is faster than the populating thread, its own accesses
/// make the pages.
fn into_mapping_ahead(socket: &TcpStream, mapping: &Mapping, bytes: usize) -> Result<f64> {
    std::thread::scope(|scope| {
        let (sender, pieces): (_, Receiver<usize>) = sync_channel(AHEAD_BYTES / MADE_BYTES);
        let helper = scope.spawn(move || {
            // The thread inherits the receiver's core; lets it use both.
            crate::machine::pin_to(&crate::machine::two_cores()?)?;
            pieces.into_iter().try_for_each(|offset| {
                let length = MADE_BYTES.min(bytes - offset);
                mapping.advise(offset, length, MmapAdvise::MADV_POPULATE_WRITE)
            })?;
            super::thread_cpu_s()
        });
        let mut asked = 0;
        let received = into_mapping(socket, mapping, bytes, |received| {
            while asked < bytes.min(received + AHEAD_BYTES) && sender.try_send(asked).is_ok() {
                asked += MADE_BYTES;
            }
            Ok(())
        });
        drop(sender);
        let helped = super::joined(helper.join());
        received.and(helped)
    })
}

fn through_pipe(socket: &TcpStream, target: &File, bytes: usize) -> Result<()> {
    let (output, input) = pipe()?;
    let flags = SpliceFFlags::SPLICE_F_MOVE;
    let (mut received, mut stored) = (0, 0);
    while stored < bytes {
        interrupt::check()?;
        if received == stored {
            let length = CALL_BYTES.min(bytes - received);
            match splice(socket, None, &input, None, length, flags) {
                Ok(0) => return cut_short(received, bytes),
                Ok(count) => received += count,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            continue;
        }
        let mut offset = stored as i64;
        let target = target.as_fd();
        match splice(&output, None, target, Some(&mut offset), received - stored, flags) {
            Ok(count) => stored += count,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// A pipe of [`CALL_BYTES`]: its reading end, its writing end.
fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (output, input) = nix::unistd::pipe2(OFlag::O_CLOEXEC).context(|| "pipe")?;
    let size = i32::try_from(CALL_BYTES)?;
    fcntl(&input, FcntlArg::F_SETPIPE_SZ(size)).context(|| "enlarging a pipe")?;
    Ok((output, input))
}

fn cut_short(received: usize, bytes: usize) -> Result<()> {
    failure(format!("the sender stopped after {received} of {bytes} bytes"))
}
