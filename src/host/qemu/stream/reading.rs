//! The thread that reads QEMU's stream: it marks the pages that it reads, and keeps the stream without them. For a
//! guest with RAM without files it puts the pages' contents where the lanes find them ([`Staging`]).
//!
//! It reads only while another thread waits for a look, and contents have room: QEMU waits while its stream is not
//! read, and the guest runs meanwhile. From the moment when the guest is to stop, it reads to the end. The same holds
//! while QEMU does not answer: a QEMU whose guest was stopped by another client writes the rest with its main loop's
//! lock held.
//!
//! A stream that another program has had QEMU begin ([`Reading::go_on`]) is read as far as there is room, and to its
//! end once the guest stands still. QEMU is not queried: that it waits for an acknowledgement before it stops its guest
//! (`switchover-ack`) shows in a part without pages, because it would otherwise have stopped the guest at that point.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{MsgFlags, recv};

use super::cut::Cut;
use super::look::Look;
use super::sorting::{Moved, PIECE_BYTES, Sorter};
use super::{Event, Parser};
use crate::error::{Context, Error, Result};
use crate::host::qemu::saving;
use crate::memory::dirty::DirtyMap;
use crate::memory::staging::Staging;
use crate::runtime::{panics, polling};

/// Limit of QEMU's silence while its stream is read. QEMU may have disks to flush.
const SILENCE_MAX: Duration = Duration::from_secs(120);

/// The message `MIG_RP_MSG_SWITCHOVER_ACK` of QEMU's migration/migration.c, without data: the guest may be stopped.
pub(super) const SWITCHOVER_ACK: [u8; 4] = [0, 7, 0, 0];

/// Time limit for QEMU's answers; after it the stream is read even without room: first [`SURPLUS_BYTES`], and twice as
/// much every [`SURPLUS_DOUBLES`]. A busy QEMU answers late, and one that holds its main loop's lock while it writes
/// answers only after it has been read: 16 MiB a second late, 4 GiB after three.
const ANSWERS_WITHIN: Duration = Duration::from_millis(200);
const SURPLUS_BYTES: u64 = 1 << 20;
const SURPLUS_DOUBLES: Duration = Duration::from_millis(250);

/// The bytes that may be read without room in all while an answer is awaited.
fn surplus_max(awaited: Duration) -> u64 {
    let Some(late) = awaited.checked_sub(ANSWERS_WITHIN) else { return 0 };
    let times = u32::try_from(late.as_millis() / SURPLUS_DOUBLES.as_millis()).unwrap_or(u32::MAX);
    SURPLUS_BYTES.saturating_mul(1_u64.checked_shl(times).unwrap_or(u64::MAX))
}

/// How often a waiting reader checks that limit.
const LOOKS_EVERY: Duration = Duration::from_millis(50);

nix::ioctl_read_bad!(bytes_to_read, libc::FIONREAD, libc::c_int);

/// A stream that is being read.
pub(in crate::host::qemu) struct Reading {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    socket: UnixStream,
    state: Mutex<State>,
    changed: Condvar,
    staging: Option<Arc<Staging>>,
    /// Another program has had QEMU begin, and QEMU paces itself.
    is_passive: bool,
}

/// Tracks whether QEMU answers while its stream is being read.
pub(super) struct Pulse(Weak<Shared>);

impl Pulse {
    /// Queries QEMU. If that takes long, the stream is read meanwhile.
    pub(super) fn asking<T>(&self, ask: impl FnOnce() -> T) -> T {
        let note = |since| {
            self.0.upgrade().map(|shared| {
                let mut state = shared.lock();
                (state.asked, state.surplus) = (since, 0);
            })
        };
        note(Some(Instant::now()));
        let answer = ask();
        note(None);
        answer
    }

    /// Waits for this long, or for the end of the stream. False at its end.
    pub(super) fn goes_on(&self, within: Duration) -> bool {
        let Some(shared) = self.0.upgrade() else { return false };
        let state = shared.lock();
        if state.is_over() || state.is_finishing {
            return false;
        }
        let until = Some(Instant::now() + within);
        let state = wait(&shared.changed, state, until);
        !state.is_over() && !state.is_finishing
    }

    /// The guest stands still: the stream is read to the end.
    pub(super) fn finish(&self) {
        self.0.upgrade().into_iter().for_each(|shared| shared.finish());
    }
}

/// State shared between the reader and the threads that wait for it.
#[derive(Default)]
struct State {
    /// Bytes that have been read from the socket.
    read: u64,
    may_read: bool,
    /// The stream is read to the end, independent of looks.
    is_finishing: bool,
    /// A look that the reader is to begin.
    look: Option<Look>,
    is_looking: bool,
    /// Time of a query that QEMU has not answered yet.
    asked: Option<Instant>,
    /// Bytes read without room since then.
    surplus: u64,
    /// RAM's last part has been read: the guest stands still.
    is_ram_over: bool,
    /// When RAM's last part began: the guest had been stopped.
    stopped_at: Option<Instant>,
    /// Number of QEMU's passes over all of RAM.
    passes: u32,
    /// The stream without the pages that umem moves, once the thread has ended.
    end: Option<Result<Vec<u8>>>,
}

impl State {
    fn is_over(&self) -> bool {
        self.is_ram_over || self.end.is_some()
    }

    /// Whether QEMU may be blocked by unread data: the stream is read then, with a bound that grows.
    fn may_be_waited_for(&self) -> bool {
        self.is_finishing
            || self.asked.is_some_and(|since| self.surplus < surplus_max(since.elapsed()))
    }

    /// The reason why the stream cannot be read. It is returned in full once.
    fn failure(&mut self) -> Result<()> {
        let Some(Err(error)) = &mut self.end else { return Ok(()) };
        let again = Error::Host("its migration stream has failed".into());
        Err(std::mem::replace(error, again))
    }
}

impl Reading {
    /// Reads the stream that QEMU writes. Other threads do not read from this socket meanwhile.
    pub(super) fn start(
        socket: UnixStream,
        moved: Vec<Moved>,
        (marks, staging): (Arc<DirtyMap>, Option<Arc<Staging>>),
        state_bytes_max: usize,
    ) -> Result<Reading> {
        Reading::begin(socket, None, moved, (marks, staging), state_bytes_max)
    }

    /// Continues a stream that begins with `head`, which has been read from the socket. Another program has told its
    /// QEMU to migrate.
    pub(super) fn go_on(
        socket: UnixStream,
        head: Vec<u8>,
        moved: Vec<Moved>,
        to: (Arc<DirtyMap>, Option<Arc<Staging>>),
        state_bytes_max: usize,
    ) -> Result<Reading> {
        Reading::begin(socket, Some(head), moved, to, state_bytes_max)
    }

    fn begin(
        socket: UnixStream,
        head: Option<Vec<u8>>,
        moved: Vec<Moved>,
        (marks, staging): (Arc<DirtyMap>, Option<Arc<Staging>>),
        state_bytes_max: usize,
    ) -> Result<Reading> {
        let state = State { may_read: true, ..State::default() };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let shared = Shared { socket, state, changed, staging, is_passive: head.is_some() };
        let shared = Arc::new(shared);
        let ours = shared.clone();
        let held_back = marks.clone();
        let thread = std::thread::Builder::new().name("umem-stream".into());
        let run = move || {
            let (cut, staging) = (Cut::new(state_bytes_max), ours.staging.clone());
            let sorter = Sorter::new(moved, marks, staging, cut);
            let reader = Reader {
                shared: &ours,
                parser: Parser::new(),
                sorter,
                look: None,
                pace: Pace::default(),
            };
            let end = panics::caught(|| reader.run(&head.unwrap_or_default()));
            if end.is_err() {
                // QEMU's migration fails, and does not wait: the guest continues.
                saving::abandon(&ours.socket);
            }
            // Lanes end their pass, and the next look returns the reason.
            held_back.let_all_go();
            ours.lock().end = Some(end);
            ours.changed.notify_all();
        };
        let thread = thread.spawn(run).context(|| "starting a thread")?;
        Ok(Reading { shared, thread: Some(thread) })
    }

    /// The socket, for messages to QEMU.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.shared.socket
    }

    /// A handle for waiting for QEMU's answers, which does not keep the reader from ending.
    pub(super) fn pulse(&self) -> Pulse {
        Pulse(Arc::downgrade(&self.shared))
    }

    /// Reads from the beginning until every page has been read once, and releases each page. Reading stops then.
    pub(super) fn begin_first_pass(&self) {
        self.begin_look(&mut self.shared.lock(), Look::first());
    }

    /// Waits for the end of a look that is under way.
    pub(super) fn looked(&self) -> Result<()> {
        let mut state = self.shared.lock();
        while state.is_looking && !state.is_over() {
            state = wait(&self.shared.changed, state, None);
        }
        state.failure()
    }

    /// The moment when the guest was known to stand still, no later than the end of RAM.
    pub(super) fn stopped_at(&self) -> Option<Instant> {
        self.shared.lock().stopped_at
    }

    /// Number of times that QEMU has walked all of RAM and begun anew.
    pub(super) fn passes(&self) -> u32 {
        self.shared.lock().passes
    }

    /// Continues reading, until a look is done or without limit.
    pub(super) fn read_on(&self) {
        self.shared.lock().may_read = true;
        self.shared.changed.notify_all();
    }

    /// Waits until every page has been read that QEMU knew of at its last sync, which is over. Reading stops then.
    pub(super) fn look(&self) -> Result<()> {
        let mut state = self.shared.lock();
        let fence = state.read + unread_bytes(&self.shared.socket)?;
        self.begin_look(&mut state, Look::new(fence));
        drop(state);
        self.looked()
    }

    fn begin_look(&self, state: &mut State, look: Look) {
        state.look = Some(look);
        (state.may_read, state.is_looking) = (true, true);
        self.shared.changed.notify_all();
    }

    /// Whether no more pages will come, or none that can be parsed.
    pub(super) fn is_over(&self) -> Result<bool> {
        let mut state = self.shared.lock();
        state.failure()?;
        Ok(state.is_over())
    }

    /// Reads to the end from now on.
    pub(super) fn finish(&self) {
        self.shared.finish();
    }

    /// Waits until RAM is over, or this time has passed. Returns whether it is over.
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

    /// Waits for the end, and returns the stream without the pages that umem moves. The stream is returned once.
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
    /// A stream that is not needed to its end is discarded.
    fn drop(&mut self) {
        if self.shared.lock().end.is_none() {
            saving::abandon(&self.shared.socket);
            self.finish();
        }
        if let Some(thread) = self.thread.take() {
            // The thread has caught its own panic.
            let _ = thread.join();
        }
    }
}

/// The thread's own state.
struct Reader<'a> {
    shared: &'a Shared,
    parser: Parser,
    sorter: Sorter,
    look: Option<Look>,
    pace: Pace,
}

/// The next step of a QEMU that paces itself, inferred from its stream.
#[derive(Default)]
struct Pace {
    /// The preceding page, by block and offset.
    before: Option<(usize, u64)>,
    passes: u32,
    /// The current part has had no page so far.
    is_empty: bool,
    /// QEMU has gone around without a page to send, which it does only while it waits for an acknowledgement.
    waits_for_a_word: bool,
    has_stopped: bool,
}

impl Pace {
    fn take(&mut self, event: &Event<'_>) {
        match *event {
            Event::Began { is_last, .. } => {
                self.is_empty = true;
                self.has_stopped |= is_last;
            }
            Event::Page { block, offset, .. } => {
                self.is_empty = false;
                let now = (block, offset);
                let is_anew = self.before.replace(now).is_some_and(|before| now <= before);
                self.passes += u32::from(is_anew);
            }
            Event::Ended { is_last: false } => {
                self.waits_for_a_word |= self.is_empty && self.before.is_some();
            }
            Event::Ended { is_last: true } | Event::Content(_) | Event::Other(_) => {}
        }
    }
}

impl Reader<'_> {
    /// Reads to the end, starting with the bytes that have arrived already. Returns the stream without the pages that
    /// umem moves.
    fn run(mut self, head: &[u8]) -> Result<Vec<u8>> {
        let mut piece = vec![0; PIECE_BYTES];
        // A piece is no larger than the limit of one put.
        let mut heads = head.chunks(PIECE_BYTES);
        loop {
            let bytes = match heads.next() {
                Some(bytes) => bytes,
                None => {
                    let count = self.receive(&mut piece)?;
                    &piece[..count]
                }
            };
            if bytes.is_empty() {
                return Err(Error::Host(match self.shared.is_passive {
                    false => "it has ended its migration before the end of its stream".into(),
                    true => "it ended its migration before the end of its stream: the migration was cancelled or \
                        failed; ask the program that began it"
                        .into(),
                }));
            }
            let is_looked = self.take(bytes)?;
            if self.shared.is_passive {
                self.keep_pace();
            }
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

    /// Reacts to the pace of a QEMU that paces itself.
    fn keep_pace(&mut self) {
        if std::mem::take(&mut self.pace.waits_for_a_word) && !self.pace.has_stopped {
            // If QEMU does not take it, the stream's error has the reason. A repeated acknowledgement changes nothing.
            let _ = (&self.shared.socket).write_all(&SWITCHOVER_ACK);
        }
        let mut state = self.shared.lock();
        state.passes = self.pace.passes;
        if self.pace.has_stopped && state.stopped_at.is_none() {
            state.stopped_at = Some(Instant::now());
            drop(state);
            // QEMU writes the rest with its main loop's lock held.
            self.shared.finish();
        }
    }

    /// Waits until the thread may read and data is available.
    fn receive(&mut self, piece: &mut [u8]) -> Result<usize> {
        let what = || "reading QEMU's migration stream";
        let socket = &self.shared.socket;
        loop {
            let mut state = self.shared.lock();
            while !state.may_read && !state.may_be_waited_for() {
                let until = Some(Instant::now() + LOOKS_EVERY);
                state = wait(&self.shared.changed, state, until);
            }
            let mut is_surplus = !state.may_read;
            if let Some(staging) = &self.shared.staging
                && !state.is_finishing
            {
                is_surplus = state.may_be_waited_for();
                drop(state);
                let within = if is_surplus { Duration::ZERO } else { LOOKS_EVERY };
                let has_room = staging.wait_for_room(within);
                if !has_room && !is_surplus {
                    continue;
                }
                is_surplus = !has_room;
                state = self.shared.lock();
            }
            if let Some(look) = state.look.take() {
                self.look = Some(look);
            }
            // With the lock: the bytes read and the bytes waiting are counted together.
            match recv(socket.as_raw_fd(), piece, MsgFlags::MSG_DONTWAIT) {
                Ok(count) => {
                    state.read += count as u64;
                    state.surplus += if is_surplus { count as u64 } else { 0 };
                    return Ok(count);
                }
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                // QEMU has closed the socket with an acknowledgement unread.
                Err(Errno::ECONNRESET) => return Ok(0),
                Err(errno) => return Err(std::io::Error::from(errno)).context(what),
            }
            drop(state);
            let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            match polling::poll(
                &mut ready,
                PollTimeout::try_from(SILENCE_MAX).unwrap_or(PollTimeout::MAX),
            ) {
                // Before the stop the manager may take its time (`pause-before-switchover`).
                Ok(0) if self.shared.is_passive && !self.pace.has_stopped => {}
                Ok(0) => {
                    return Err(Error::Host(format!(
                        "it has written no data to its migration stream for {} s",
                        SILENCE_MAX.as_secs()
                    )));
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(std::io::Error::from(errno)).context(what),
            }
        }
    }

    /// Processes the bytes read. Returns whether a look is done.
    fn take(&mut self, bytes: &[u8]) -> Result<bool> {
        let (sorter, look, pace) = (&mut self.sorter, &mut self.look, &mut self.pace);
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
            pace.take(&event);
            sorter.take(parser.blocks(), &event)
        })?;
        sorter.settle_run()?;
        sorter.let_go(is_looked);
        Ok(is_looked)
    }
}

/// Bytes that wait in a socket.
fn unread_bytes(socket: &UnixStream) -> Result<u64> {
    let mut bytes = 0;
    // SAFETY: the descriptor is open, and the kernel writes an int, which outlives the call.
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
    /// Has the stream read to the end from now on.
    fn finish(&self) {
        let mut state = self.lock();
        (state.may_read, state.is_finishing) = (true, true);
        drop(state);
        self.changed.notify_all();
        self.staging.iter().for_each(|staging| staging.wake());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The inferred pace of a QEMU that writes these parts, given by the numbers of their pages.
    fn pace(parts: &[&[u64]]) -> Pace {
        let mut pace = Pace::default();
        for pages in parts {
            pace.take(&Event::Began { section: 2, is_last: false, at: 0 });
            for page in *pages {
                let (offset, is_zero) = (page << 12, false);
                pace.take(&Event::Page { block: 0, offset, is_zero, at: 0 });
            }
            pace.take(&Event::Ended { is_last: false });
        }
        pace
    }

    #[test]
    fn late_answer_lets_more_be_read_the_later_it_is() {
        let surplus = |ms| surplus_max(Duration::from_millis(ms)) >> 20;
        assert_eq!([0, 199, 200, 449, 450, 1200, 3200].map(surplus), [0, 0, 1, 1, 2, 16, 4096]);
        assert_eq!(surplus_max(Duration::MAX), u64::MAX);
    }

    #[test]
    fn part_without_pages_shows_that_qemu_waits_for_an_acknowledgement() {
        assert!(!pace(&[&[0, 1], &[2, 3]]).waits_for_a_word);
        assert!(pace(&[&[0, 1], &[]]).waits_for_a_word);
        // Nothing has been written yet.
        assert!(!pace(&[&[]]).waits_for_a_word);
    }

    #[test]
    fn pass_is_over_when_pages_begin_again() {
        assert_eq!(pace(&[&[0, 1, 5], &[7, 9]]).passes, 0);
        assert_eq!(pace(&[&[0, 1, 5], &[5], &[7, 9], &[1, 2]]).passes, 2);
    }
}
