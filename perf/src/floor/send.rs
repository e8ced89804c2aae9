//! The ways of sending a memory file.

use std::fs::File;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use serde::Serialize;

use crate::error::{Context, Result, failure};
use crate::interrupt;
use crate::memory::{Mapping, PAGE_BYTES};

/// Bytes of one send.
const CALL_BYTES: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Send {
    /// sendfile(2): the socket takes the file's pages, nothing is copied.
    Sendfile,
    /// send(2) from a mapping of the file: the kernel copies.
    Mapping,
}

impl Send {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Send::Sendfile => "sendfile",
            Send::Mapping => "send from a mapping",
        }
    }

    /// Sends the pages of `runs`, which are all that hold data if `has_zeroes`; then every page is
    /// checked for zeroes, as a sender that does not know the runs has to. Closes the connection.
    #[expect(clippy::needless_pass_by_value, reason = "the connection ends here")]
    pub(super) fn all(
        self,
        file: &File,
        mapping: &Mapping,
        socket: TcpStream,
        runs: &[(usize, usize)],
        has_zeroes: bool,
    ) -> Result<()> {
        let mut looked_at = 0;
        for &(start, bytes) in runs {
            let end = start + bytes;
            if has_zeroes {
                let pages = (looked_at..end).step_by(PAGE_BYTES);
                let data = pages.filter(|&page| !mapping.is_zero_page(page)).count();
                if data != bytes / PAGE_BYTES {
                    return failure("the memory file's zero pages are not where they were made");
                }
                looked_at = end;
            }
            self.run(file, mapping, &socket, start, end)?;
        }
        Ok(())
    }

    fn run(
        self,
        file: &File,
        mapping: &Mapping,
        socket: &TcpStream,
        start: usize,
        end: usize,
    ) -> Result<()> {
        let mut sent = start;
        while sent < end {
            interrupt::check()?;
            let length = CALL_BYTES.min(end - sent);
            let result = match self {
                Send::Sendfile => sendfile(socket, file, sent, length),
                Send::Mapping => send(socket, mapping, sent, length),
            };
            match result {
                Ok(0) => return failure("the memory file is shorter than it was made"),
                Ok(count) => sent += count,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context(|| self.name()),
            }
        }
        Ok(())
    }
}

fn sendfile(socket: &TcpStream, file: &File, offset: usize, length: usize) -> nix::Result<usize> {
    let mut offset = offset as libc::off_t;
    nix::sys::sendfile::sendfile(socket, file, Some(&mut offset), length)
}

fn send(socket: &TcpStream, mapping: &Mapping, offset: usize, length: usize) -> nix::Result<usize> {
    let (start, left) = mapping.at(offset);
    let length = length.min(left);
    // SAFETY: the bytes lie inside the mapping, which outlives the call and is not written to.
    let result =
        unsafe { libc::send(socket.as_raw_fd(), start.cast(), length, libc::MSG_NOSIGNAL) };
    Errno::result(result).map(isize::unsigned_abs)
}
