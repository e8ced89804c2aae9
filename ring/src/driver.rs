//! The ring itself: submission, waiting, and closing.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{CancelBuilder, SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, opcode, squeue, types};

use crate::chain::{CHAIN_MAX, Chain, Keys};
use crate::completion::{Completion, Outcome, TOKEN_MESSAGE, TOKEN_WAKE};
use crate::encode::{Aside, message_value};
use crate::error::{Errno, Error, buffers_error};
use crate::key::{Key, UserData};
use crate::mail::{Mailbox, Waker};
use crate::memory::Span;
use crate::op::{Fd, Op, Rejected};
use crate::setup::{Config, setup};
use crate::table::{Cqe, Next, Table};

/// How long dropping a [`Ring`] waits for the kernel to finish the operations in flight.
pub const DROP_PATIENCE: Duration = Duration::from_secs(1);

/// Most files registered with one ring.
pub const FILES_MAX: u32 = 64;

/// Whether [`Ring::enter`] waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Return at once.
    No,
    /// Until there is a completion. Blocks forever if nothing is in flight and no message or
    /// wake-up comes.
    One,
    /// Until there is a completion, or for this long.
    OneFor(Duration),
}

/// An io_uring and the operations in flight on it. See the [crate] for the ownership of memory.
#[derive(Debug)]
pub struct Ring {
    // Fields are dropped in this order: the ring closes before its buffers.
    io: Io,
    /// A duplicate of the ring's descriptor, lent to mailboxes.
    address: Arc<OwnedFd>,
    held: Held,
    /// Reports for the next calls of `next`.
    reports: VecDeque<Completion>,
    /// Completions that were read to make room in the queue.
    backlog: VecDeque<Cqe>,
    /// Storage for the next chain.
    spare_chain: Vec<(Op, u64)>,
    name: Box<str>,
    ops_max: u32,
    closed: bool,
    thread: PhantomData<*const ()>,
}

impl Ring {
    /// Makes a ring that belongs to the calling thread, and binds the thread to [`Config::core`].
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`], [`Error::Setup`] or [`Error::Missing`] if this kernel or process
    /// lacks something; [`Error::Core`] or [`Error::Invalid`] if the configuration is wrong.
    pub fn new(config: &Config) -> Result<Ring, Error> {
        let io = Io { ring: setup(config)? };
        let address = Arc::new(duplicate(&io)?);
        let cqes_max = io.ring.params().cq_entries() as usize;
        Ok(Ring {
            io,
            held: Held { table: Table::new(config.ops_max), ..Held::default() },
            address,
            reports: VecDeque::with_capacity(CHAIN_MAX),
            backlog: VecDeque::with_capacity(cqes_max),
            spare_chain: Vec::with_capacity(CHAIN_MAX),
            name: config.name.as_str().into(),
            ops_max: config.ops_max,
            closed: false,
            thread: PhantomData,
        })
    }

    /// Queues an operation. The kernel sees it with the next [`enter`](Self::enter), or earlier if
    /// the queue is full. Each of its completions has `token`.
    ///
    /// # Errors
    ///
    /// The operation is returned with [`Error::Full`] when [`Config::ops_max`] are in flight (read
    /// completions first), [`Error::Closed`] when it is a message to a closed ring,
    /// [`Error::Invalid`] when no kernel could run it, or [`Error::Submit`] when the kernel accepts
    /// no more operations.
    pub fn submit(&mut self, op: Op, token: u64) -> Result<Key, Rejected> {
        let aside = match self.admit(&op, 1, false) {
            Ok(aside) => aside,
            Err(error) => return Err(Rejected { error, op }),
        };
        if let Err(error) = self.reserve(1) {
            return Err(Rejected { error, op });
        }
        let (key, entry) = self.held.table.insert(op, token, aside);
        self.push(&entry);
        Ok(key)
    }

    /// Queues all of a chain's operations, or none.
    ///
    /// # Errors
    ///
    /// As for [`submit`](Self::submit), with the whole chain; [`Error::Invalid`] also for more than
    /// [`CHAIN_MAX`] members, or more than the submission queue has entries.
    pub fn submit_chain(&mut self, chain: Chain) -> Result<Keys, Rejected<Chain>> {
        let mut asides = [const { Aside::Nothing }; CHAIN_MAX];
        if let Err(error) = self.admit_chain(&chain, &mut asides) {
            return Err(Rejected { error, op: chain });
        }
        let mut members = chain.into_members();
        let Some(last) = members.len().checked_sub(1) else {
            return Ok(Keys::EMPTY);
        };
        let chain = self.held.table.begin_chain(members.len());
        for (at, ((op, token), aside)) in members.drain(..).zip(asides).enumerate() {
            let (_, entry) = self.held.table.insert_member(chain, op, token, aside, at < last);
            self.push(&entry);
        }
        if members.capacity() > self.spare_chain.capacity() {
            self.spare_chain = members;
        }
        Ok(self.held.table.chain_keys(chain))
    }

    /// An empty chain in the storage of the last one submitted, so that chains allocate nothing.
    pub fn chain(&mut self) -> Chain {
        Chain::from_storage(mem::take(&mut self.spare_chain))
    }

    /// Hands the queue to the kernel, lets it post completions, and waits as `wait` asks unless
    /// there is a completion already. May return early, for example after a signal, without a
    /// completion.
    ///
    /// # Errors
    ///
    /// [`Error::Submit`] with the kernel's reason; operations that the kernel did not accept stay
    /// in the queue.
    pub fn enter(&mut self, wait: Wait) -> Result<(), Error> {
        let wait = if self.reports.is_empty() && self.backlog.is_empty() { wait } else { Wait::No };
        if self.io.has_nothing_to_do(wait) {
            return Ok(());
        }
        self.io.enter(wait).map_err(Error::Submit)
    }

    /// The next completion of the last [`enter`](Self::enter); `None` when there are no more. Never
    /// waits.
    // Not an iterator: callers submit operations between two calls.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Option<Completion> {
        loop {
            if let Some(report) = self.reports.pop_front() {
                return Some(report);
            }
            let cqe = self.backlog.pop_front().or_else(|| self.io.reap())?;
            self.digest(cqe);
        }
    }

    /// Asks the kernel to cancel an operation. Its own completion still comes: `ECANCELED`, or
    /// [`Outcome::Short`] if it waits for all of its bytes and has some, or its result if that came
    /// first. A member of a chain that has not started is cancelled when its turn comes. Does
    /// nothing for an operation that has ended.
    ///
    /// # Errors
    ///
    /// [`Error::Submit`] when the kernel accepts no more operations.
    pub fn cancel(&mut self, key: Key) -> Result<(), Error> {
        if self.held.table.mark_cancelled(key) {
            self.push_cancel(key)?;
        }
        Ok(())
    }

    /// Cancels an operation whose owner is gone. Nothing more is reported for it, and its memory is
    /// dropped after its last completion. The effects on other members of its chain are reported
    /// for them.
    pub fn orphan(&mut self, key: Key) {
        self.held.table.mark_orphan(key);
        self.reports.retain(|report| report.key != key);
        // If the kernel accepts no more operations, the operation runs to its own end, and is
        // dropped then.
        let _ = self.cancel(key);
    }

    /// Operations whose last completion has not been read from the kernel yet, orphans included.
    pub fn in_flight(&self) -> usize {
        self.held.table.len()
    }

    /// Cancels everything, waits until nothing is in flight, and closes the ring. Unread
    /// completions are dropped with their memory.
    ///
    /// # Errors
    ///
    /// [`Error::LeftOver`] when the kernel still holds operations after `patience`: their memory is
    /// leaked. [`Error::Submit`] when the kernel accepts no cancellation; the memory is leaked then
    /// too.
    pub fn close(mut self, patience: Duration) -> Result<(), Error> {
        self.shut(patience)
    }

    /// Registers files. Operations on the returned slots save the kernel a look-up. Slots are never
    /// freed; the ring keeps the descriptors open until it closes.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] beyond [`FILES_MAX`] in all, [`Error::Register`] with the kernel's
    /// reason.
    pub fn register_files(&mut self, files: &[Arc<OwnedFd>]) -> Result<Vec<Fd>, Error> {
        let refused = |source| Error::Register { what: "files", source };
        let first = self.held.files.len() as u32;
        if files.len() > (FILES_MAX - first) as usize {
            return Err(Error::Invalid { what: "a ring takes at most 64 registered files" });
        }
        let submitter = self.io.ring.submitter();
        if !self.held.has_file_table {
            submitter.register_files_sparse(FILES_MAX).map_err(refused)?;
            self.held.has_file_table = true;
        }
        let numbers: Vec<_> = files.iter().map(|file| file.as_raw_fd()).collect();
        // The kernel stops at the first file that it refuses. That slot and those behind it stay
        // free.
        let done = submitter.register_files_update(first, &numbers).map_err(refused)?;
        self.held.files.extend_from_slice(&files[..done]);
        if done < files.len() {
            return Err(refused(io::Error::from_raw_os_error(libc::EBADF)));
        }
        Ok((first..first + done as u32).map(Fd::Fixed).collect())
    }

    /// Registers buffers, once. [`Op::ReadFixed`] and [`Op::SendZc`] name them by their index in
    /// `buffers`, and save the kernel pinning them each time. They stay pinned until the ring
    /// closes.
    ///
    /// # Errors
    ///
    /// [`Error::MemlockTooSmall`] when they exceed the limit of locked memory, otherwise
    /// [`Error::Register`] with the kernel's reason.
    pub fn register_buffers(&mut self, buffers: Vec<Span>) -> Result<(), Error> {
        let vectors: Vec<libc::iovec> = buffers
            .iter()
            .map(|span| libc::iovec { iov_base: span.as_ptr().cast(), iov_len: span.len() })
            .collect();
        // SAFETY: the spans' owners keep the ranges mapped, and `held` keeps the owners until the
        // buffers are unregistered or the ring is closed.
        let result = unsafe { self.io.ring.submitter().register_buffers(&vectors) };
        if let Err(source) = result {
            let needed_bytes = buffers.iter().map(|span| span.len() as u64).sum();
            return Err(buffers_error(source, needed_bytes, memlock_limit_bytes()));
        }
        self.held.buffers = buffers;
        Ok(())
    }

    /// The ring's address for messages from other rings.
    pub fn mailbox(&self) -> Mailbox {
        Mailbox::new(&self.address)
    }

    /// A waker, with which threads without a ring wake this one. All wakers of a ring are the same.
    ///
    /// # Errors
    ///
    /// [`Error::Descriptor`] when the eventfd cannot be made, [`Error::Submit`] when the kernel
    /// accepts no more operations.
    pub fn waker(&mut self) -> Result<Waker, Error> {
        if self.held.wake.is_none() {
            self.held.wake = Some(Wake::new()?);
        }
        self.arm_wake()?;
        match &self.held.wake {
            Some(wake) => Ok(Waker::new(Arc::clone(&wake.eventfd))),
            None => Err(Error::Closed),
        }
    }

    /// Completions that named no operation in flight. Only a zero-copy send that never started may
    /// cause one.
    pub fn stale_completions(&self) -> u64 {
        self.held.table.stale
    }

    /// Checks that `op` may be submitted and that `count` slots are free; returns the data kept
    /// beside it.
    fn admit(&self, op: &Op, count: usize, linked: bool) -> Result<Aside, Error> {
        if self.held.table.room() < count {
            return Err(Error::Full { ops_max: self.ops_max });
        }
        op.check(linked)?;
        match op {
            Op::MsgRing { to, .. } => to.ring().map(Aside::Recipient).ok_or(Error::Closed),
            _ => Ok(Aside::Nothing),
        }
    }

    fn admit_chain(&mut self, chain: &Chain, asides: &mut [Aside; CHAIN_MAX]) -> Result<(), Error> {
        let count = chain.len();
        if count > CHAIN_MAX {
            return Err(Error::Invalid { what: "a chain has at most 16 members" });
        }
        if count > self.io.ring.submission().capacity() {
            return Err(Error::Invalid { what: "a chain has to fit the submission queue" });
        }
        for (at, ((op, _), aside)) in chain.members().iter().zip(asides).enumerate() {
            *aside = self.admit(op, count, at + 1 < count)?;
        }
        self.reserve(count)
    }

    /// Makes room for `count` entries that are submitted together: two submissions would split a
    /// chain into two.
    fn reserve(&mut self, count: usize) -> Result<(), Error> {
        if self.io.room() >= count {
            return Ok(());
        }
        self.io.flush().map_err(Error::Submit)?;
        if self.io.room() >= count {
            return Ok(());
        }
        // The kernel accepts nothing while completions overflow their queue.
        while let Some(cqe) = self.io.reap() {
            self.backlog.push_back(cqe);
        }
        self.io.enter(Wait::No).map_err(Error::Submit)?;
        if self.io.room() >= count {
            return Ok(());
        }
        Err(Error::Submit(io::Error::from_raw_os_error(libc::EBUSY)))
    }

    /// Puts an entry into the reserved room.
    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: `held` owns all memory that the entry points to: an operation's memory in its
        // slot of the table until the terminal completion, the wake-up counter until its read has
        // ended. All of it is either dropped after the ring has nothing in flight, or leaked.
        let pushed = unsafe { self.io.ring.submission().push(entry) };
        assert!(pushed.is_ok(), "room was reserved");
    }

    fn push_cancel(&mut self, key: Key) -> Result<(), Error> {
        self.reserve(1)?;
        let entry = opcode::AsyncCancel::new(key.user_data())
            .build()
            .flags(squeue::Flags::SKIP_SUCCESS)
            .user_data(UserData::Cancel(key.payload()).encode());
        self.push(&entry);
        Ok(())
    }

    /// Turns one completion of the kernel into none, one or several reports.
    fn digest(&mut self, cqe: Cqe) {
        let next = match UserData::decode(cqe.user_data) {
            UserData::Operation(key) => self.held.table.complete(key, cqe, &mut self.reports),
            UserData::Cancel(payload) if cqe.result == -libc::ENOENT => {
                self.held.table.cancel_missed(payload)
            }
            UserData::Wake => {
                self.digest_wake(cqe.result);
                Next::Nothing
            }
            UserData::Message(payload) => {
                let value = message_value(payload, cqe.flags);
                let outcome = Outcome::Message { value, extra: cqe.result as u32 };
                self.report_event(TOKEN_MESSAGE, outcome);
                Next::Nothing
            }
            UserData::Cancel(_) | UserData::Ignored => Next::Nothing,
        };
        if let Next::Cancel(key) = next {
            // If the kernel accepts no more operations, the operation runs to its own end.
            let _ = self.push_cancel(key);
        }
    }

    fn digest_wake(&mut self, result: i32) {
        let Some(wake) = &mut self.held.wake else {
            return;
        };
        wake.armed = false;
        let count = wake.count();
        let rearm = match -result {
            ..=0 => {
                self.report_event(TOKEN_WAKE, Outcome::Done(count));
                true
            }
            libc::EINTR | libc::EAGAIN => true,
            // Only closing the ring cancels it.
            libc::ECANCELED => false,
            errno => {
                self.report_event(TOKEN_WAKE, Outcome::Failed(Errno::new(errno)));
                false
            }
        };
        if rearm
            && !self.closed
            && let Err(error) = self.arm_wake()
        {
            let errno = error.raw_os_error().unwrap_or(libc::EBUSY);
            self.report_event(TOKEN_WAKE, Outcome::Failed(Errno::new(errno)));
        }
    }

    fn report_event(&mut self, token: u64, outcome: Outcome) {
        let report = Completion { key: Key::NONE, token, outcome, memory: None, last: false };
        self.reports.push_back(report);
    }

    /// Queues the standing read of the eventfd, unless it is queued already.
    fn arm_wake(&mut self) -> Result<(), Error> {
        self.reserve(1)?;
        let Some(wake) = &mut self.held.wake else {
            return Ok(());
        };
        if wake.armed {
            return Ok(());
        }
        wake.armed = true;
        let entry = wake.read().user_data(UserData::Wake.encode());
        self.push(&entry);
        Ok(())
    }

    fn shut(&mut self, patience: Duration) -> Result<(), Error> {
        self.closed = true;
        let result = self.wind_down(patience);
        if self.held.is_idle() {
            return result.and_then(|()| self.unregister());
        }
        let left = Error::LeftOver {
            ring: self.name.clone(),
            count: self.held.in_flight() as u32,
            operations: self.held.describe().into(),
        };
        // The kernel may still read and write there after the ring is closed.
        mem::forget(mem::take(&mut self.held));
        result.and(Err(left))
    }

    /// Cancels and reaps until nothing is in flight, or `patience` ends.
    fn wind_down(&mut self, patience: Duration) -> Result<(), Error> {
        let start = Instant::now();
        while !self.held.is_idle() {
            self.push_cancel_all()?;
            let round = Instant::now();
            while !self.held.is_idle() {
                let left = CANCEL_AGAIN_AFTER.saturating_sub(round.elapsed());
                let left = left.min(patience.saturating_sub(start.elapsed()));
                self.io.enter(Wait::OneFor(left)).map_err(Error::Submit)?;
                while self.next().is_some() {}
                if left.is_zero() {
                    break;
                }
            }
            if start.elapsed() >= patience {
                break;
            }
        }
        Ok(())
    }

    /// Requests the cancellation of everything. An operation that could not be cancelled before is
    /// cancelled by a later request.
    fn push_cancel_all(&mut self) -> Result<(), Error> {
        self.reserve(1)?;
        let entry = opcode::AsyncCancel2::new(CancelBuilder::any())
            .build()
            .user_data(UserData::Ignored.encode());
        self.push(&entry);
        Ok(())
    }

    /// Unregisters files and buffers now. Closing the ring does so later: until then sockets stay
    /// open and pinned memory counts against the limit.
    fn unregister(&mut self) -> Result<(), Error> {
        let submitter = self.io.ring.submitter();
        if mem::take(&mut self.held.has_file_table) {
            submitter
                .unregister_files()
                .map_err(|source| Error::Unregister { what: "files", source })?;
        }
        if !self.held.buffers.is_empty() {
            submitter
                .unregister_buffers()
                .map_err(|source| Error::Unregister { what: "buffers", source })?;
        }
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if !self.closed {
            // No caller can receive the error; leftover memory is leaked.
            let _ = self.shut(DROP_PATIENCE);
        }
    }
}

/// Everything that the kernel may use while the ring is open; leaked as a whole if operations
/// remain.
#[derive(Debug, Default)]
struct Held {
    table: Table,
    wake: Option<Wake>,
    buffers: Vec<Span>,
    files: Vec<Arc<OwnedFd>>,
    has_file_table: bool,
}

impl Held {
    fn is_idle(&self) -> bool {
        self.in_flight() == 0
    }

    /// Operations that the kernel holds, the standing read included.
    fn in_flight(&self) -> usize {
        self.table.len() + usize::from(self.wake_is_armed())
    }

    fn wake_is_armed(&self) -> bool {
        self.wake.as_ref().is_some_and(|wake| wake.armed)
    }

    fn describe(&self) -> String {
        let mut counts = self.table.counts();
        if self.wake_is_armed() {
            counts.push(("wake-up", 1));
        }
        let texts: Vec<String> =
            counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
        texts.join(", ")
    }
}

/// The standing read behind every [`Waker`].
#[derive(Debug)]
struct Wake {
    eventfd: Arc<File>,
    /// The buffer of the eventfd's counter, not accessed while `armed`.
    counter: Box<[u8; 8]>,
    armed: bool,
}

impl Wake {
    fn new() -> Result<Wake, Error> {
        // SAFETY: no memory is involved.
        let number = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if number < 0 {
            let source = io::Error::last_os_error();
            return Err(Error::Descriptor { what: "an eventfd to be woken by", source });
        }
        // SAFETY: the descriptor is new and has no other owner.
        let eventfd = Arc::new(unsafe { File::from_raw_fd(number) });
        Ok(Wake { eventfd, counter: Box::new([0; 8]), armed: false })
    }

    fn read(&mut self) -> squeue::Entry {
        let target = types::Fd(self.eventfd.as_raw_fd());
        opcode::Read::new(target, self.counter.as_mut_ptr(), self.counter.len() as u32).build()
    }

    /// Wake-ups that the last read has merged.
    fn count(&self) -> u32 {
        u64::from_ne_bytes(*self.counter).min(u64::from(u32::MAX)) as u32
    }
}

/// The queues, and the system call that drives them.
struct Io {
    ring: IoUring,
}

impl std::fmt::Debug for Io {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Io({})", self.ring.as_raw_fd())
    }
}

impl Io {
    fn room(&mut self) -> usize {
        let queue = self.ring.submission();
        queue.capacity() - queue.len()
    }

    /// Whether a call would return at once: nothing is queued, and the awaited completion is there.
    fn has_nothing_to_do(&mut self, wait: Wait) -> bool {
        !matches!(wait, Wait::No)
            && self.ring.submission().is_empty()
            && !self.ring.completion().is_empty()
    }

    fn reap(&mut self) -> Option<Cqe> {
        let cqe = self.ring.completion().next()?;
        Some(Cqe { user_data: cqe.user_data(), result: cqe.result(), flags: cqe.flags() })
    }

    /// Hands the queue to the kernel.
    fn flush(&mut self) -> io::Result<()> {
        self.call(EnterFlags::empty(), 0, None)
    }

    /// Hands the queue to the kernel and lets it post completions: deferred ones, and those that
    /// overflowed.
    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        match wait {
            Wait::No => self.call(EnterFlags::GETEVENTS, 0, None),
            Wait::One => self.call(EnterFlags::GETEVENTS, 1, None),
            Wait::OneFor(limit) => self.call(EnterFlags::GETEVENTS, 1, Some(limit)),
        }
    }

    fn call(&mut self, flags: EnterFlags, want: u32, limit: Option<Duration>) -> io::Result<()> {
        let queued = self.ring.submission().len() as u32;
        let submitter = self.ring.submitter();
        let result = match limit {
            None => {
                // SAFETY: there is no argument; the entries' memory is owned as `Ring::push`
                // states.
                unsafe { submitter.enter::<libc::sigset_t>(queued, want, flags.bits(), None) }
            }
            Some(limit) => {
                let limit = Timespec::from(limit);
                let args = SubmitArgs::new().timespec(&limit);
                let flags = flags | EnterFlags::EXT_ARG;
                // SAFETY: the argument and the time it points to are on this stack frame, and the
                // kernel reads them during the call only.
                unsafe { submitter.enter(queued, want, flags.bits(), Some(&args)) }
            }
        };
        match result.map_err(|error| (error.raw_os_error(), error)) {
            Ok(_) => Ok(()),
            // A signal, the timeout, or a full completion queue: nothing is lost.
            Err((Some(libc::EINTR | libc::ETIME | libc::EBUSY), _)) => Ok(()),
            Err((_, error)) => Err(error),
        }
    }
}

fn duplicate(io: &Io) -> Result<OwnedFd, Error> {
    // SAFETY: the ring is open for the length of this call.
    let fd = unsafe { BorrowedFd::borrow_raw(io.ring.as_raw_fd()) };
    fd.try_clone_to_owned()
        .map_err(|source| Error::Descriptor { what: "a second descriptor of the ring", source })
}

fn memlock_limit_bytes() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes the two numbers during the call.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, ptr::from_mut(&mut limit)) };
    if result == 0 { limit.rlim_cur } else { libc::RLIM_INFINITY }
}

/// Time until [`Ring::close`] asks the kernel to cancel everything once more.
const CANCEL_AGAIN_AFTER: Duration = Duration::from_millis(20);
