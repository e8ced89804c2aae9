//! What wakes a control thread: messages of its worker threads, signals, other descriptors, time.
//!
//! Workers (rings, the host's thread) post messages; a bell (an eventfd) makes them visible to
//! `poll`, beside SIGINT and SIGTERM, which are blocked in every thread and read from a signalfd. In a
//! process whose signals are not ours a [`Canceller`] stands for them.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::error::{Context, Error, Result};

/// Blocks the signals that end umem, in this thread and in all that it starts. Call it first.
pub(crate) fn block_signals() -> Result<()> {
    mask().thread_block().context(|| "blocking signals")
}

/// Undoes [`block_signals`] in a child process before it becomes the guest.
pub(crate) fn unblock_signals() -> nix::Result<()> {
    mask().thread_unblock()
}

fn mask() -> SigSet {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGINT);
    mask.add(Signal::SIGTERM);
    mask
}

/// Where workers post to.
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
    /// Posts a message. When the control thread has gone nobody needs it any more.
    pub(crate) fn send(&self, message: T) {
        if self.sender.send(message).is_ok() {
            let _ = self.bell.write(1);
        }
    }
}

/// Why [`Inbox::wait`] returned.
pub(crate) enum Wake<T> {
    /// A worker posted this.
    Message(T),
    /// SIGINT or SIGTERM, or what stands for them.
    Signal,
    /// `extra[i]` is ready for what was asked, or was closed.
    Ready(usize),
    /// The time is up.
    Timeout,
}

/// The control thread's end.
pub(crate) struct Inbox<T> {
    sender: Sender<T>,
    receiver: Receiver<T>,
    bell: Arc<EventFd>,
    interrupts: Interrupts,
}

/// What tells umem to stop.
enum Interrupts {
    /// SIGINT and SIGTERM, which [`block_signals`] has blocked.
    Signals(SignalFd),
    /// The program that umem is a part of.
    Host(Canceller),
}

impl Interrupts {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Interrupts::Signals(signals) => signals.as_fd(),
            Interrupts::Host(canceller) => canceller.bell.as_fd(),
        }
    }

    /// Takes one, if there is one.
    fn take(&self) -> Result<bool> {
        match self {
            Interrupts::Signals(signals) => {
                Ok(signals.read_signal().context(|| "signalfd")?.is_some())
            }
            Interrupts::Host(canceller) => {
                let is_cancelled = canceller.bell.read().is_ok();
                canceller.check().map(|()| is_cancelled)
            }
        }
    }

    /// Waiting goes on.
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

    /// As Ctrl-C does: without effect where stopping is no longer possible.
    pub(crate) fn cancel(&self) {
        let _ = self.bell.write(1);
    }

    /// Nobody is interested any more: every wait fails from now on, whatever phase it is in.
    pub(crate) fn abandon(&self) {
        self.is_abandoned.store(true, SeqCst);
        self.cancel();
    }

    fn check(&self) -> Result<()> {
        if self.is_abandoned.load(SeqCst) {
            return Err(Error::Interrupted("the program that umem is a part of gave it up".into()));
        }
        Ok(())
    }
}

fn bell() -> Result<Arc<EventFd>> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    Ok(Arc::new(EventFd::from_flags(flags).context(|| "eventfd")?))
}

impl<T> Inbox<T> {
    /// For a process whose signals are ours.
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
        Ok(Inbox { sender, receiver, bell: bell()?, interrupts })
    }

    /// Whether it belongs to a part of another program, which has a way of its own to end it.
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

    /// The same, with what each of `extra` is to be ready for.
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
            if ready(&fds[1]) && self.interrupts.take()? {
                return Ok(Wake::Signal);
            }
            if !ready(&fds[0])
                && let Some(index) = fds[2..].iter().position(ready)
            {
                return Ok(Wake::Ready(index));
            }
        }
    }

    /// Waits until one of `extra` is ready: false when none is in time. A signal ends it, and `meanwhile` says
    /// what has become of the guest then. For as long as nobody posts: a message is taken and lost.
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

/// Rounded up to whole milliseconds, so that a wait does not turn into a busy loop at its end.
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
    fn a_cancelled_wait_is_interrupted_once_and_an_abandoned_one_for_good() {
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
