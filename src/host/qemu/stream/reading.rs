//! The thread that reads QEMU's stream: it marks what it reads of, and keeps what is left of the stream.
//!
//! It reads only while somebody wants to know: QEMU waits when nobody reads, and the guest goes on meanwhile. From
//! the moment the guest is to stop it reads to the end.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{MsgFlags, recv};
use umem_wire::RegionId;

use super::cut::Cut;
use super::look::Look;
use super::{Block, Event, PAGE_BYTES, Parser};
use crate::error::{Context, Error, Result};
use crate::host::qemu::saving;
use crate::memory::dirty::DirtyMap;
use crate::runtime::{panics, polling};

/// Bytes that are read at once: what a socket holds.
const PIECE_BYTES: usize = 256 << 10;

/// How long QEMU may write nothing while somebody reads. It may have disks to flush.
const SILENCE_MAX: Duration = Duration::from_secs(120);

nix::ioctl_read_bad!(bytes_to_read, libc::FIONREAD, libc::c_int);

/// A RAM block that umem moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Moved {
    /// QEMU's name of it.
    pub(super) block: String,
    pub(super) bytes: u64,
    pub(super) region: RegionId,
}

/// A stream that is being read.
pub(in crate::host::qemu) struct Reading {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    socket: UnixStream,
    state: Mutex<State>,
    changed: Condvar,
}

/// What the reader and those who wait for it tell each other.
#[derive(Default)]
struct State {
    /// Bytes that have come out of the socket.
    read: u64,
    may_read: bool,
    /// To the end, whatever is looked for.
    is_finishing: bool,
    /// Of a look that the reader is to begin.
    fence: Option<u64>,
    is_looking: bool,
    /// RAM's last part has been read: the guest stands still.
    is_ram_over: bool,
    /// Once the thread has ended: the stream without what umem moves.
    end: Option<Result<Vec<u8>>>,
}

impl State {
    fn is_over(&self) -> bool {
        self.is_ram_over || self.end.is_some()
    }

    /// Why the stream cannot be read, which is said in full once.
    fn failure(&mut self) -> Result<()> {
        let Some(Err(error)) = &mut self.end else { return Ok(()) };
        let again = Error::Host("its migration stream has failed".into());
        Err(std::mem::replace(error, again))
    }
}

impl Reading {
    /// Reads what comes from QEMU. Nobody else reads from this socket meanwhile.
    pub(super) fn start(
        socket: UnixStream,
        moved: Vec<Moved>,
        marks: Arc<DirtyMap>,
        state_bytes_max: usize,
    ) -> Result<Reading> {
        let state = State { may_read: true, ..State::default() };
        let shared = Shared { socket, state: Mutex::new(state), changed: Condvar::new() };
        let shared = Arc::new(shared);
        let ours = shared.clone();
        let thread = std::thread::Builder::new().name("umem-stream".into());
        let run = move || {
            let sorter = Sorter::new(moved, marks, Cut::new(state_bytes_max));
            let reader = Reader { shared: &ours, parser: Parser::new(), sorter, look: None };
            let end = panics::caught(|| reader.run());
            if end.is_err() {
                // QEMU's migration fails, and does not wait: the guest runs on.
                saving::abandon(&ours.socket);
            }
            ours.lock().end = Some(end);
            ours.changed.notify_all();
        };
        let thread = thread.spawn(run).context(|| "starting a thread")?;
        Ok(Reading { shared, thread: Some(thread) })
    }

    /// The socket, for what goes the other way.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.shared.socket
    }

    /// Waits until every page has been read once, from the beginning on. Reading stops then.
    pub(super) fn first_pass(&self) -> Result<()> {
        self.read_look(0)
    }

    /// Reads on, until a look is done or for good.
    pub(super) fn go_on(&self) {
        self.shared.lock().may_read = true;
        self.shared.changed.notify_all();
    }

    /// Waits until every page has been read of that QEMU knew of at its last sync, which has been. Reading stops then.
    pub(super) fn look(&self) -> Result<()> {
        let state = self.shared.lock();
        let fence = state.read + unread_bytes(&self.shared.socket)?;
        drop(state);
        self.read_look(fence)
    }

    fn read_look(&self, fence: u64) -> Result<()> {
        let mut state = self.shared.lock();
        state.fence = Some(fence);
        (state.may_read, state.is_looking) = (true, true);
        self.shared.changed.notify_all();
        while state.is_looking && !state.is_over() {
            state = wait(&self.shared.changed, state, None);
        }
        state.failure()
    }

    /// Whether no more pages come, or none that would be understood.
    pub(super) fn is_over(&self) -> Result<bool> {
        let mut state = self.shared.lock();
        state.failure()?;
        Ok(state.is_over())
    }

    /// Reads to the end from now on.
    pub(super) fn finish(&self) {
        let mut state = self.shared.lock();
        (state.may_read, state.is_finishing) = (true, true);
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Waits until RAM is over, or this time has passed. Whether it is over.
    pub(super) fn wait_ram_over(&self, within: Option<Duration>) -> Result<bool> {
        let until = within.map(|within| Instant::now() + within);
        let mut state = self.shared.lock();
        while !state.is_over() {
            if until.is_some_and(|until| Instant::now() >= until) {
                return Ok(false);
            }
            state = wait(&self.shared.changed, state, until);
        }
        state.failure().map(|()| true)
    }

    /// Waits for the end, and gives the stream without the pages that umem moves. It is given once.
    pub(super) fn stream(&self) -> Result<Vec<u8>> {
        let mut state = self.shared.lock();
        loop {
            state.failure()?;
            match &mut state.end {
                Some(Ok(stream)) => return Ok(std::mem::take(stream)),
                _ => state = wait(&self.shared.changed, state, None),
            }
        }
    }
}

impl Drop for Reading {
    /// A stream that nobody wants to the end comes to none.
    fn drop(&mut self) {
        if self.shared.lock().end.is_none() {
            saving::abandon(&self.shared.socket);
            self.finish();
        }
        if let Some(thread) = self.thread.take() {
            // It has caught what it panicked of.
            let _ = thread.join();
        }
    }
}

/// The thread's own.
struct Reader<'a> {
    shared: &'a Shared,
    parser: Parser,
    sorter: Sorter,
    look: Option<Look>,
}

impl Reader<'_> {
    /// Reads to the end: the stream without the pages that umem moves.
    fn run(mut self) -> Result<Vec<u8>> {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let count = self.receive(&mut piece)?;
            if count == 0 {
                return Err(Error::Host(
                    "it has ended its migration before the end of its stream".into(),
                ));
            }
            let is_looked = self.take(&piece[..count])?;
            if self.parser.is_device_state()
                && saving::ends_with_description(self.sorter.cut.stream())
            {
                return Ok(self.sorter.cut.into_stream());
            }
            let mut state = self.shared.lock();
            state.is_ram_over = self.sorter.is_ram_over;
            if is_looked {
                self.look = None;
                (state.is_looking, state.may_read) = (false, state.is_finishing);
            }
            if is_looked || state.is_ram_over {
                self.shared.changed.notify_all();
            }
        }
    }

    /// Waits until it may read, and there is something.
    fn receive(&mut self, piece: &mut [u8]) -> Result<usize> {
        let what = || "reading QEMU's migration stream";
        let socket = &self.shared.socket;
        loop {
            let mut state = self.shared.lock();
            while !state.may_read {
                state = wait(&self.shared.changed, state, None);
            }
            if let Some(fence) = state.fence.take() {
                self.look = Some(Look::new(fence));
            }
            // With the lock: what has been read and what waits are known together.
            match recv(socket.as_raw_fd(), piece, MsgFlags::MSG_DONTWAIT) {
                Ok(count) => {
                    state.read += count as u64;
                    return Ok(count);
                }
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => return Err(std::io::Error::from(errno)).context(what),
            }
            drop(state);
            let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            match polling::poll(
                &mut ready,
                PollTimeout::try_from(SILENCE_MAX).unwrap_or(PollTimeout::MAX),
            ) {
                Ok(0) => {
                    return Err(Error::Host(format!(
                        "it has written nothing of its migration stream for {} s",
                        SILENCE_MAX.as_secs()
                    )));
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(std::io::Error::from(errno)).context(what),
            }
        }
    }

    /// Takes what has been read. Whether a look is done.
    fn take(&mut self, bytes: &[u8]) -> Result<bool> {
        let (sorter, look) = (&mut self.sorter, &mut self.look);
        let mut is_looked = false;
        self.parser.read(bytes, |parser, event| {
            if let Some(look) = look {
                match event {
                    Event::Began { at, .. } => look.began(at),
                    Event::Page { block, offset, at, .. } => look.page(block, offset, at),
                    Event::Ended { .. } => is_looked |= look.ended(),
                    Event::Content(_) | Event::Other(_) => {}
                }
            }
            sorter.take(parser.blocks(), &event)
        })?;
        sorter.mark_run()?;
        Ok(is_looked)
    }
}

/// Parts a stream into marks and what is left of it.
struct Sorter {
    moved: Vec<Moved>,
    /// The region of each block of the stream, once those are known.
    regions: Vec<Option<RegionId>>,
    marks: Arc<DirtyMap>,
    /// Bytes of a region that are yet to be marked.
    run: Option<(RegionId, Range<u64>)>,
    cut: Cut,
    is_ram_over: bool,
}

impl Sorter {
    fn new(moved: Vec<Moved>, marks: Arc<DirtyMap>, cut: Cut) -> Sorter {
        Sorter { moved, regions: Vec::new(), marks, run: None, cut, is_ram_over: false }
    }

    fn take(&mut self, blocks: &[Block], event: &Event<'_>) -> Result<()> {
        match *event {
            Event::Began { .. } if self.regions.len() != blocks.len() => self.find(blocks)?,
            Event::Page { block, offset, .. } => {
                if let Some(region) = self.regions[block] {
                    self.mark(region, offset)?;
                }
            }
            Event::Ended { is_last: true } => self.is_ram_over = true,
            _ => {}
        }
        let regions = &self.regions;
        self.cut.take(blocks, |block| regions[block].is_some(), event)
    }

    /// Finds what umem moves among the blocks of the stream.
    fn find(&mut self, blocks: &[Block]) -> Result<()> {
        for moved in &self.moved {
            let block = blocks.iter().find(|block| block.name == moved.block);
            let bytes = block.map_or(0, |block| block.bytes);
            if bytes != moved.bytes {
                return Err(Error::Host(format!(
                    "its RAM block {} has {bytes} bytes in its migration stream, and {} in its list of RAM blocks",
                    moved.block, moved.bytes
                )));
            }
        }
        let of = |block: &Block| {
            let moved = self.moved.iter().find(|moved| moved.block == block.name);
            moved.map(|moved| moved.region)
        };
        self.regions = blocks.iter().map(of).collect();
        Ok(())
    }

    /// Marks a page, with those before it if it follows them.
    fn mark(&mut self, region: RegionId, offset: u64) -> Result<()> {
        let end = offset + PAGE_BYTES as u64;
        match &mut self.run {
            Some((before, bytes)) if *before == region && bytes.end == offset => bytes.end = end,
            _ => {
                self.mark_run()?;
                self.run = Some((region, offset..end));
            }
        }
        Ok(())
    }

    /// Marks what is yet to be.
    fn mark_run(&mut self) -> Result<()> {
        let Some((region, bytes)) = self.run.take() else { return Ok(()) };
        if self.marks.mark_bytes(region, bytes.start, bytes.end - bytes.start) {
            return Ok(());
        }
        let (start, end) = (bytes.start, bytes.end);
        Err(Error::Host(format!(
            "its migration stream has the bytes {start:#x} to {end:#x} of region {}, which are not moved",
            region.0
        )))
    }
}

/// Bytes that wait in a socket.
fn unread_bytes(socket: &UnixStream) -> Result<u64> {
    let mut bytes = 0;
    // SAFETY: the descriptor is open, and the kernel writes an int, which lives.
    unsafe { bytes_to_read(socket.as_raw_fd(), &raw mut bytes) }
        .map_err(std::io::Error::from)
        .context(|| "a socket's unread bytes")?;
    Ok(bytes.unsigned_abs().into())
}

/// Waits for a change, or for this time.
fn wait<'a>(
    changed: &Condvar,
    state: MutexGuard<'a, State>,
    until: Option<Instant>,
) -> MutexGuard<'a, State> {
    match until {
        None => changed.wait(state).unwrap_or_else(PoisonError::into_inner),
        Some(until) => {
            let left = until.saturating_duration_since(Instant::now());
            changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
