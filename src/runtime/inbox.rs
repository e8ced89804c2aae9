//! The events that wake a control thread: messages of its worker threads, signals, other
//! descriptors, time.
//!
//! Workers (rings, the host's thread) post messages; an eventfd makes them visible to `poll`,
//! beside signals, which are blocked in every thread and read from a signalfd. In an embedding
//! program, whose signals umem leaves alone, a [`Canceller`] takes their place.
//!
//! Every signal that would end the process is a request that umem stop ([`Wake::Signal`]).
//! Exceptions:
//! - SIGKILL cannot be caught; `--resume` continues what it interrupts.
//! - SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS and SIGTRAP indicate a fault in umem itself.
//! - SIGPIPE and SIGXFSZ are ignored: the write fails, and its error is handled.
//! - A signal that was ignored when umem started stays ignored, as nohup(1) requires, except SIGINT
//!   and SIGTERM, which are always a user's request.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::panics;
use super::polling::poll;
use crate::error::{Context, Error, Result};

/// The result of [`block_signals`].
struct Signals {
    /// Signals that are read from signalfds.
    ours: SigSet,
    /// Signals that were blocked before.
    before: SigSet,
    /// Whether SIGXFSZ is ignored since then.
    ignores_file_size: bool,
}

static SIGNALS: OnceLock<Signals> = OnceLock::new();

/// Blocks the signals that end umem, in this thread and in all that it starts. Call this first.
pub(crate) fn block_signals() -> Result<()> {
    let ours = ours();
    let ignores_file_size = is_default(libc::SIGXFSZ);
    if ignores_file_size {
        dispose(libc::SIGXFSZ, libc::SIG_IGN).context(|| "ignoring SIGXFSZ")?;
    }
    let before = ours.thread_swap_mask(SigmaskHow::SIG_BLOCK).context(|| "blocking signals")?;
    SIGNALS.get_or_init(|| Signals { ours, before, ignores_file_size });
    Ok(())
}

/// Undoes [`block_signals`] in a child process before it becomes another program. Async-signal-safe.
pub(crate) fn unblock_signals() -> nix::Result<()> {
    let Some(signals) = SIGNALS.get() else { return Ok(()) };
    if signals.ignores_file_size {
        dispose(libc::SIGXFSZ, libc::SIG_DFL)?;
    }
    signals.before.thread_set_mask()
}

/// The signals that end this process unless they are caught; see the module.
fn ours() -> SigSet {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGINT);
    mask.add(Signal::SIGTERM);
    let mut raw: libc::sigset_t = *mask.as_ref();
    let named = [
        libc::SIGHUP,
        libc::SIGQUIT,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGALRM,
        libc::SIGVTALRM,
        libc::SIGPROF,
        libc::SIGSTKFLT,
        libc::SIGIO,
        libc::SIGPWR,
        libc::SIGXCPU,
    ];
    for signal in named.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX()) {
        if is_default(signal) {
            // SAFETY: `raw` is a set that was initialised above; the number is a signal's.
            unsafe { libc::sigaddset(&raw mut raw, signal) };
        }
    }
    // SAFETY: made by sigemptyset and sigaddset.
    unsafe { SigSet::from_sigset_t_unchecked(raw) }
}

/// Whether the signal is neither ignored nor caught.
fn is_default(signal: i32) -> bool {
    // SAFETY: a zeroed sigaction is a valid value of that type, which consists of integers.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: only reads the action; `action` outlives the call.
    let result = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    result == 0 && action.sa_sigaction == libc::SIG_DFL
}

/// Ignores a signal, or restores its default.
pub(crate) fn dispose(signal: i32, disposition: libc::sighandler_t) -> nix::Result<()> {
    // SAFETY: SIG_IGN or SIG_DFL, so that no handler runs.
    match unsafe { libc::signal(signal, disposition) } {
        libc::SIG_ERR => Err(Errno::last()),
        _ => Ok(()),
    }
}

/// The signals of a signalfd.
fn mask() -> SigSet {
    SIGNALS.get().map_or_else(ours, |signals| signals.ours)
}

/// The sending end for workers.
pub(crate) struct Post<T> {
    sender: Sender<T>,
    bell: Arc<EventFd>,
}

impl<T> Clone for Post<T> {
    fn clone(&self) -> Self {
        Post { sender: self.sender.clone(), bell: self.bell.clone() }
    }
}

impl<T> Post<T> {
    /// Posts a message. Does nothing once the control thread has ended.
    pub(crate) fn send(&self, message: T) {
        if self.sender.send(message).is_ok() {
            let _ = self.bell.write(1);
        }
    }
}

/// A descriptor and the events to wait for.
pub(crate) type Interest<'a> = (BorrowedFd<'a>, PollFlags);

/// Waits until one of the descriptors is ready: false after the timeout, an error when the wait
/// ends for another reason, such as a signal.
pub(crate) type Wait<'a> = &'a dyn Fn(&[Interest<'_>], Option<Duration>) -> Result<bool>;

/// Waits for data to read.
pub(crate) fn readable(socket: &impl AsFd) -> Interest<'_> {
    (socket.as_fd(), PollFlags::POLLIN)
}

/// Waits for room to write.
pub(crate) fn writable(socket: &impl AsFd) -> Interest<'_> {
    (socket.as_fd(), PollFlags::POLLOUT)
}

/// Why [`Inbox::wait`] returned.
pub(crate) enum Wake<T> {
    /// A worker posted this.
    Message(T),
    /// A signal that asks umem to stop, or its replacement.
    Signal,
    /// `extra[i]` is ready, or was closed.
    Ready(usize),
    /// The timeout has passed.
    Timeout,
}

/// The control thread's end.
pub(crate) struct Inbox<T> {
    sender: Sender<T>,
    receiver: Receiver<T>,
    bell: Arc<EventFd>,
    interrupts: Interrupts,
    /// The number of the last signal, 0 before the first.
    last_signal: AtomicI32,
}

/// The source of requests to stop.
enum Interrupts {
    /// The signals that [`block_signals`] has blocked.
    Signals(SignalFd),
    /// The embedding program.
    Host(Canceller),
}

impl Interrupts {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Interrupts::Signals(signals) => signals.as_fd(),
            Interrupts::Host(canceller) => canceller.bell.as_fd(),
        }
    }

    /// Takes one request, if there is one, and returns its signal's number.
    fn take(&self) -> Result<Option<i32>> {
        match self {
            Interrupts::Signals(signals) => {
                let info = signals.read_signal().context(|| "signalfd")?;
                Ok(info.map(|info| i32::try_from(info.ssi_signo).unwrap_or_default()))
            }
            Interrupts::Host(canceller) => {
                let is_cancelled = canceller.bell.read().is_ok();
                canceller.check().map(|()| is_cancelled.then_some(libc::SIGINT))
            }
        }
    }

    /// Fails if the wait must end.
    fn check(&self) -> Result<()> {
        match self {
            Interrupts::Signals(_) => Ok(()),
            Interrupts::Host(canceller) => canceller.check(),
        }
    }
}

/// Interrupts an inbox from within this process.
#[derive(Clone)]
pub(crate) struct Canceller {
    bell: Arc<EventFd>,
    is_abandoned: Arc<AtomicBool>,
}

impl Canceller {
    pub(crate) fn new() -> Result<Canceller> {
        Ok(Canceller { bell: bell()?, is_abandoned: Arc::default() })
    }

    /// Requests a stop, as Ctrl-C does: without effect where stopping is no longer possible.
    pub(crate) fn cancel(&self) {
        let _ = self.bell.write(1);
    }

    /// Ends every wait with an error from now on, in any phase: the embedding program has dropped
    /// the migration.
    pub(crate) fn abandon(&self) {
        self.is_abandoned.store(true, SeqCst);
        self.cancel();
    }

    fn check(&self) -> Result<()> {
        if self.is_abandoned.load(SeqCst) {
            return Err(Error::Interrupted(
                "the embedding program has cancelled the migration".into(),
            ));
        }
        Ok(())
    }
}

fn bell() -> Result<Arc<EventFd>> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    Ok(Arc::new(EventFd::from_flags(flags).context(|| "eventfd")?))
}

impl<T> Inbox<T> {
    /// For a program of its own, which handles its signals.
    pub(crate) fn new() -> Result<Inbox<T>> {
        let signals = SignalFd::with_flags(&mask(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .context(|| "signalfd")?;
        Inbox::interrupted_by(Interrupts::Signals(signals))
    }

    /// For a part of another program.
    pub(crate) fn embedded(canceller: Canceller) -> Result<Inbox<T>> {
        Inbox::interrupted_by(Interrupts::Host(canceller))
    }

    fn interrupted_by(interrupts: Interrupts) -> Result<Inbox<T>> {
        let (sender, receiver) = channel();
        let last_signal = AtomicI32::new(0);
        Ok(Inbox { sender, receiver, bell: bell()?, interrupts, last_signal })
    }

    /// Whether the last [`Wake::Signal`] was SIGINT: Ctrl-C, or a process that sent it.
    pub(crate) fn was_ctrl_c(&self) -> bool {
        self.last_signal.load(SeqCst) == libc::SIGINT
    }

    /// Whether umem is a part of another program, which has its own way to end the migration.
    pub(crate) fn is_embedded(&self) -> bool {
        matches!(self.interrupts, Interrupts::Host(_))
    }

    pub(crate) fn post(&self) -> Post<T> {
        Post { sender: self.sender.clone(), bell: self.bell.clone() }
    }

    /// Waits for the first of: a message, a signal, one of `extra` readable, `timeout`.
    pub(crate) fn wait(
        &self,
        extra: &[BorrowedFd<'_>],
        timeout: Option<Duration>,
    ) -> Result<Wake<T>> {
        let extra: Vec<_> = extra.iter().map(|fd| (*fd, PollFlags::POLLIN)).collect();
        self.wait_for(&extra, timeout)
    }

    /// The same, with the events for each of `extra`.
    pub(crate) fn wait_for(
        &self,
        extra: &[(BorrowedFd<'_>, PollFlags)],
        timeout: Option<Duration>,
    ) -> Result<Wake<T>> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            self.interrupts.check()?;
            match self.receiver.try_recv() {
                Ok(message) => return Ok(Wake::Message(message)),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => unreachable!("self holds a sender"),
            }
            let mut fds = vec![
                PollFd::new(self.bell.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.interrupts.as_fd(), PollFlags::POLLIN),
            ];
            fds.extend(extra.iter().map(|&(fd, flags)| PollFd::new(fd, flags)));
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            match poll(&mut fds, poll_timeout(left)) {
                Ok(0) => return Ok(Wake::Timeout),
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno).context(|| "poll"),
            }
            let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
            if ready(&fds[0]) {
                let _ = self.bell.read();
            }
            if ready(&fds[1])
                && let Some(number) = self.interrupts.take()?
            {
                self.last_signal.store(number, SeqCst);
                return Ok(Wake::Signal);
            }
            if !ready(&fds[0])
                && let Some(index) = fds[2..].iter().position(ready)
            {
                return Ok(Wake::Ready(index));
            }
        }
    }

    /// Waits until one of `extra` is ready: false after the timeout. A signal ends the wait;
    /// `meanwhile` then describes the guest's state in the error. Only while no worker posts: a
    /// message would be lost.
    pub(crate) fn wait_ready(
        &self,
        extra: &[(BorrowedFd<'_>, PollFlags)],
        timeout: Option<Duration>,
        meanwhile: &str,
    ) -> Result<bool> {
        match self.wait_for(extra, timeout)? {
            Wake::Signal => Err(Error::Interrupted(meanwhile.into())),
            Wake::Timeout => Ok(false),
            Wake::Ready(_) | Wake::Message(_) => Ok(true),
        }
    }
}

impl<T> Inbox<T> {
    /// Runs work that may block (a monitor that does not answer, a FIFO without a writer) on a
    /// thread of its own, so that a signal ends the wait; `meanwhile` then describes the guest's
    /// state in the error. The thread continues until the process ends. With `first` two signals
    /// are needed, and the first prints `first`. Only while no worker posts, as for
    /// [`Inbox::wait_ready`].
    pub(crate) fn wait_for_work<R: Send + 'static>(
        &self,
        meanwhile: &str,
        mut first: Option<&dyn Fn()>,
        work: impl FnOnce() -> Result<R> + Send + 'static,
    ) -> Result<R> {
        let done = bell()?;
        let (sender, receiver) = channel();
        let ring = done.clone();
        std::thread::Builder::new()
            .name(format!("{}waiting", panics::THREAD_PREFIX))
            .spawn(move || {
                let result = panics::caught(|| {
                    panics::point(format_args!("waiting"));
                    work()
                });
                let _ = sender.send(result);
                let _ = ring.write(1);
            })
            .context(|| "starting a thread")?;
        loop {
            match self.wait(&[done.as_fd()], None)? {
                Wake::Signal => match first.take() {
                    Some(say) => say(),
                    None => return Err(Error::Interrupted(meanwhile.into())),
                },
                Wake::Ready(_) => {
                    return receiver
                        .recv()
                        .map_err(|_| Error::Internal("the work ended without a result".into()))?;
                }
                Wake::Message(_) | Wake::Timeout => {}
            }
        }
    }
}

/// Rounded up to whole milliseconds, so that the end of a wait is not a busy loop.
fn poll_timeout(left: Option<Duration>) -> PollTimeout {
    match left {
        None => PollTimeout::NONE,
        Some(left) => {
            let millis = left.as_micros().div_ceil(1000);
            PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cancel_interrupts_one_wait_and_abandon_interrupts_all() {
        let canceller = Canceller::new().unwrap();
        let inbox = Inbox::embedded(canceller.clone()).unwrap();
        canceller.cancel();
        assert!(matches!(inbox.wait(&[], None), Ok(Wake::Signal)));
        inbox.post().send(7);
        assert!(matches!(inbox.wait(&[], None), Ok(Wake::Message(7))));
        canceller.abandon();
        inbox.post().send(8);
        for _ in 0..2 {
            assert!(matches!(inbox.wait(&[], None), Err(Error::Interrupted(_))));
        }
    }
}
