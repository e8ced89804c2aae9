//! The raw round trip of a fault: userfaultfd → TCP → the page → visible, with plain system calls.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use nix::errno::Errno;

use super::pattern::random_order;
use super::toucher::touch;
use crate::error::{Context, Result, failure};
use crate::floor::{connection, joined};
use crate::interrupt;
use crate::machine::{pin, two_cores};
use crate::memory::{Mapping, PAGE_BYTES, Pages};
use crate::userfault::Userfault;

/// Touches `count` pages and returns the time of each access, nanoseconds. The guest and the source
/// are on one core (the guest waits while the source works), the handler on the same or on another
/// one.
pub(super) fn round_trips(
    pages: Pages,
    bytes: usize,
    count: usize,
    one_core: bool,
) -> Result<Vec<u64>> {
    let [here, other] = two_cores()?;
    let handler_core = if one_core { here } else { other };
    let source = pages.source().file(bytes)?;
    let source = Mapping::of(&source, bytes)?;
    source.fill();
    let (file, guest) = pages.map(bytes)?;
    let uffd = Userfault::of(&guest, pages)?;
    let landing = Landing::new(pages, file.as_ref(), bytes)?;
    let (answers, requests) = connection()?;
    for socket in [&answers, &requests] {
        socket.set_nodelay(true).context(|| "TCP_NODELAY")?;
    }
    let (running, ended) = UnixStream::pair().context(|| "a pair of sockets")?;
    let page_bytes = landing.page_bytes();
    std::thread::scope(|scope| {
        let (guest, source) = (&guest, &source);
        let sender = scope.spawn(move || {
            pin(here)?;
            answer(answers, source, page_bytes)
        });
        // The thread owns the userfaultfd: if the thread ends early, the guest reads zeroes and
        // ends.
        let handler = scope.spawn(move || {
            pin(handler_core)?;
            landing.serve(&uffd, guest, requests, &ended)
        });
        let toucher = scope.spawn(move || {
            let _running = running;
            pin(here)?;
            touch_all(guest, bytes, page_bytes, count)
        });
        let (touched, handled, sent) =
            (joined(toucher.join()), joined(handler.join()), joined(sender.join()));
        // The first cause is in the handler or the source.
        handled.and(sent).and(touched)
    })
}

/// Each access to a missing page, as the guest's thread sees it.
fn touch_all(guest: &Mapping, bytes: usize, page_bytes: usize, count: usize) -> Result<Vec<u64>> {
    let small = page_bytes / PAGE_BYTES;
    let order = random_order(bytes / page_bytes);
    let mut latencies = Vec::with_capacity(count);
    for page in order.into_iter().take(count) {
        interrupt::check()?;
        let began = Instant::now();
        let number = touch(guest, page * small);
        latencies.push(u64::try_from(began.elapsed().as_nanos())?);
        if number != (page * small) as u64 {
            return failure(format!("page {page} of the floor arrived wrong"));
        }
    }
    Ok(latencies)
}

/// The source: receives an offset, sends the page.
fn answer(mut socket: TcpStream, source: &Mapping, page_bytes: usize) -> Result<()> {
    let mut request = [0; 8];
    loop {
        match socket.read_exact(&mut request) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error).context(|| "the source's end"),
        }
        let (start, left) = source.at(usize::try_from(u64::from_le_bytes(request))?);
        let mut sent = 0;
        while sent < page_bytes.min(left) {
            // SAFETY: inside the mapping, to which nothing writes any more.
            let result = unsafe {
                let rest = start.add(sent).cast();
                libc::send(socket.as_raw_fd(), rest, page_bytes - sent, libc::MSG_NOSIGNAL)
            };
            match Errno::result(result) {
                Ok(count) => sent += count.unsigned_abs(),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context(|| "sending a page"),
            }
        }
    }
}

/// The place where a page is received.
enum Landing {
    /// Straight into a second mapping of the file, this many bytes at once.
    File(Mapping, usize),
    /// Into a buffer of one page, to be copied from there.
    Buffer(Vec<u8>),
}

impl Landing {
    fn new(pages: Pages, file: Option<&File>, bytes: usize) -> Result<Landing> {
        Ok(match file {
            Some(file) => Landing::File(Mapping::of(file, bytes)?, pages.page_bytes()),
            None => Landing::Buffer(vec![0; pages.page_bytes()]),
        })
    }

    fn page_bytes(&self) -> usize {
        match self {
            Landing::File(_, page_bytes) => *page_bytes,
            Landing::Buffer(buffer) => buffer.len(),
        }
    }

    /// Answers faults until the guest has ended.
    fn serve(
        mut self,
        uffd: &Userfault,
        guest: &Mapping,
        mut socket: TcpStream,
        ended: &UnixStream,
    ) -> Result<()> {
        let page_bytes = self.page_bytes();
        while let Some(address) = uffd.fault(guest, ended.as_fd())? {
            let offset = address - address % page_bytes;
            socket.write_all(&(offset as u64).to_le_bytes()).context(|| "asking for a page")?;
            match &mut self {
                Landing::File(mapping, _) => {
                    receive(&socket, mapping, offset, page_bytes)?;
                    uffd.proceed(guest, offset, page_bytes)?;
                }
                Landing::Buffer(buffer) => {
                    socket.read_exact(buffer).context(|| "receiving a page")?;
                    uffd.copy(guest, offset, buffer)?;
                }
            }
        }
        Ok(())
    }
}

fn receive(socket: &TcpStream, mapping: &Mapping, offset: usize, bytes: usize) -> Result<()> {
    let (start, left) = mapping.at(offset);
    assert!(bytes <= left);
    let mut received = 0;
    while received < bytes {
        // SAFETY: inside the mapping; the guest does not see the page yet.
        let result = unsafe {
            let rest = start.add(received).cast();
            libc::recv(socket.as_raw_fd(), rest, bytes - received, libc::MSG_WAITALL)
        };
        match Errno::result(result) {
            Ok(0) => return failure("the floor's source has closed its connection"),
            Ok(count) => received += count.unsigned_abs(),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context(|| "receiving a page"),
        }
    }
    Ok(())
}
