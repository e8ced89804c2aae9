//! How a memory file is filled from a socket.

use std::fs::File;
use std::io::Read;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use serde::Serialize;

use crate::error::{Context, Result, failure};
use crate::interrupt;
use crate::memory::{Mapping, Pages};

/// A buffer that stays in the core's cache.
const HOT_BYTES: usize = 256 << 10;

/// Bytes that one call is asked to receive into the mapping, or to splice; also the pipe's size.
const CALL_BYTES: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Receive {
    /// Into a buffer in the cache, and forgotten.
    Discard,
    /// Straight into a mapping of the fresh file.
    Map,
    /// Into a buffer in the cache, then pwrite(2) to the fresh file.
    Write,
    /// splice(2) socket → pipe → fresh file.
    Splice,
}

impl Receive {
    pub(crate) fn name(self, pages: Pages) -> String {
        let file = pages.name();
        match self {
            Receive::Discard => format!("a hot buffer, thrown away (from {file})"),
            Receive::Map => format!("a fresh mapping: {file}"),
            Receive::Write => format!("a hot buffer, then pwrite: {file}"),
            Receive::Splice => format!("splice through a pipe: {file}"),
        }
    }

    /// Receives `bytes`, and closes the connection.
    pub(super) fn all(self, socket: TcpStream, target: &File, bytes: usize) -> Result<()> {
        match self {
            Receive::Discard => through_buffer(socket, bytes, |_, _| Ok(())),
            Receive::Write => {
                through_buffer(socket, bytes, |data, offset| target.write_all_at(data, offset))
            }
            Receive::Map => into_mapping(&socket, &Mapping::of(target, bytes)?, bytes),
            Receive::Splice => through_pipe(&socket, target, bytes),
        }
        .context(|| format!("{self:?}"))
    }
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

fn into_mapping(socket: &TcpStream, mapping: &Mapping, bytes: usize) -> Result<()> {
    let mut received = 0;
    while received < bytes {
        interrupt::check()?;
        let (start, left) = mapping.at(received);
        let length = CALL_BYTES.min(left);
        // SAFETY: the bytes lie inside the mapping, which outlives the call; nobody else uses it.
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

/// A pipe that holds [`CALL_BYTES`]: its reading end, its writing end.
fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (output, input) = nix::unistd::pipe2(OFlag::O_CLOEXEC).context(|| "pipe")?;
    let size = i32::try_from(CALL_BYTES)?;
    fcntl(&input, FcntlArg::F_SETPIPE_SZ(size)).context(|| "enlarging a pipe")?;
    Ok((output, input))
}

fn cut_short(received: usize, bytes: usize) -> Result<()> {
    failure(format!("the sender stopped after {received} of {bytes} bytes"))
}
