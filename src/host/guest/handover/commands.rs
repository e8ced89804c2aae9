//! umem's commands to a process that has handed its memory over, and the consequences of umem's end for that process.

use std::io::{IoSliceMut, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, atomic::Ordering::SeqCst};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};

use super::{Held, advise};

/// Longer lines than any command are dropped.
const LINE_BYTES_MAX: usize = 256;

/// Carries out umem's commands until `release`, or until umem has ended.
pub(super) fn serve(stream: &UnixStream, held: &Arc<Held>) {
    match carry_out(stream, held) {
        Ended::Released => {
            let count = held.release();
            // If this fails, umem has ended and needs no answer.
            let mut stream = stream;
            let _ = writeln!(stream, "{}", json!({ "released": count }));
            let _ = stream.shutdown(Shutdown::Both);
        }
        // The guest runs here: threads wait for missing pages until another umem brings them.
        Ended::Kept => std::mem::forget(held.clone()),
        Ended::Forsaken => {
            // Exits at once: other threads may wait in faults that will not be answered any more. umem has reported
            // why.
            std::process::exit(1);
        }
    }
}

/// How the connection with umem ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Released,
    /// umem has gone after `keep`.
    Kept,
    /// umem has gone before `keep`.
    Forsaken,
}

pub(super) fn carry_out(stream: &UnixStream, held: &Arc<Held>) -> Ended {
    let mut commands =
        Lines { stream, bytes: Vec::new(), is_skipping: false, descriptors: Vec::new() };
    while let Some(line) = commands.next() {
        let answer = match line.as_slice() {
            b"keep" => {
                held.keeps.store(true, SeqCst);
                continue;
            }
            b"session" => {
                held.keep_session(std::mem::take(&mut commands.descriptors));
                continue;
            }
            b"release" => return Ended::Released,
            b"ping" => json!({ "pong": 1 }),
            line => match parse_touch(line) {
                Some((address, length)) => touch(&held.name, &held.area, address, length),
                None => continue,
            },
        };
        // If this fails, umem does not read any more, and the end of the stream comes next.
        let mut stream = stream;
        let _ = writeln!(stream, "{answer}");
    }
    if held.keeps.load(SeqCst) { Ended::Kept } else { Ended::Forsaken }
}

/// The lines of a stream, and the descriptors that came with them.
struct Lines<'a> {
    stream: &'a UnixStream,
    bytes: Vec<u8>,
    /// True within a line that is too long.
    is_skipping: bool,
    descriptors: Vec<OwnedFd>,
}

impl Lines<'_> {
    /// The next line without its newline; None at the end of the stream.
    fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some(end) = self.bytes.iter().position(|&byte| byte == b'\n') {
                let mut line: Vec<u8> = self.bytes.drain(..=end).collect();
                line.pop();
                if !std::mem::take(&mut self.is_skipping) && line.len() < LINE_BYTES_MAX {
                    return Some(line);
                }
                continue;
            }
            if self.bytes.len() >= LINE_BYTES_MAX {
                self.is_skipping = true;
                self.bytes.clear();
            }
            self.receive()?;
        }
    }

    fn receive(&mut self) -> Option<()> {
        let mut buffer = [0; 4096];
        let mut control = nix::cmsg_space!([i32; 4]);
        let mut iov = [IoSliceMut::new(&mut buffer)];
        let (socket, flags) = (self.stream.as_raw_fd(), MsgFlags::MSG_CMSG_CLOEXEC);
        let received = loop {
            match recvmsg::<()>(socket, &mut iov, Some(&mut control), flags) {
                Err(Errno::EINTR) => {}
                received => break received.ok()?,
            }
        };
        let count = received.bytes;
        for message in received.cmsgs().ok()? {
            if let ControlMessageOwned::ScmRights(fds) = message {
                // SAFETY: the kernel has just made these descriptors for this process.
                let owned = fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
                self.descriptors.extend(owned);
            }
        }
        self.bytes.extend_from_slice(&buffer[..count]);
        (count > 0).then_some(())
    }
}

/// `touch ADDRESS LENGTH`
fn parse_touch(line: &[u8]) -> Option<(u64, u64)> {
    let words = std::str::from_utf8(line).ok()?.strip_prefix("touch ")?;
    let (address, length) = words.split_once(' ')?;
    Some((address.parse().ok()?, length.parse().ok()?))
}

/// Makes pages visible to the guest; anonymous pages are as soon as they are present.
fn touch(name: &str, area: &Range<u64>, address: u64, length: u64) -> Value {
    let failed = |errno: i32, text: &str| json!({ "error": "touch", "name": name, "errno": errno, "text": text });
    let inside =
        address >= area.start && address.checked_add(length).is_some_and(|end| end <= area.end);
    if !inside {
        return failed(libc::EINVAL, "this guest has no memory");
    }
    let range = address..address + length;
    match advise(&range, libc::MADV_POPULATE_WRITE) {
        Ok(()) => json!({ "touched": address, "size": length }),
        Err(error) => failed(
            error.raw_os_error().unwrap_or(libc::EINVAL),
            "the guest's memory cannot be populated",
        ),
    }
}
