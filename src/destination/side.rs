//! Whose memory it is: another process's, which umem started or which came to it, or our own, where
//! umem is a part of the program that runs the guest.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Note;
use crate::error::{Context, Error, Result};
use crate::events::Event;
use crate::fault::handoff::{HandoffSocket, Message};
use crate::host::command::Monitor;
use crate::observe::output::Output;
use crate::runtime::inbox::{Inbox, Wake};
use crate::runtime::polling::poll;
use crate::runtime::process::{Standstill, standstill};

/// How long the guest's process may take to let go of its userfaultfds before that is remarked on. It takes
/// milliseconds, unless it does not run, or maps a large guest by huge pages meanwhile.
const RELEASE_PATIENCE: Duration = Duration::from_secs(2);

/// How long it may take to drop pages that come once more, which takes milliseconds: the guest stands still meanwhile.
const EMPTY_PATIENCE: Duration = Duration::from_secs(20);

/// Who runs the guest.
pub(crate) enum GuestSide {
    /// Another process.
    Process(Box<GuestProcess>),
    /// This one. It does not end before us, and keeps its userfaultfds itself; what `exited` gives is
    /// never readable.
    Here { never: EventFd },
}

/// The guest's process, and the socket on which it has handed over its memory.
pub(crate) struct GuestProcess {
    pub(crate) monitor: Monitor,
    pub(crate) handoff: HandoffSocket,
    /// The guest side keeps its userfaultfds without us, and understands our commands.
    pub(crate) knows_umem: bool,
    /// And can keep what somebody needs who takes over from us.
    pub(crate) keeps_sessions: bool,
    /// Somebody has asked it to end, through us.
    is_ending: bool,
    /// Nobody waits for it any more.
    is_left_alone: bool,
}

impl GuestSide {
    pub(crate) fn here() -> Result<GuestSide> {
        let never = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).context(|| "eventfd")?;
        Ok(GuestSide::Here { never })
    }

    /// Its pid, where that is not ours.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.process().map(|process| process.monitor.pid())
    }

    pub(crate) fn process(&self) -> Option<&GuestProcess> {
        match self {
            GuestSide::Process(process) => Some(process),
            GuestSide::Here { .. } => None,
        }
    }

    /// The process whose memory it is, where that is not this one.
    pub(crate) fn memory_pid(&self) -> Option<u32> {
        self.process().map(GuestProcess::memory_pid)
    }

    fn process_mut(&mut self) -> Option<&mut GuestProcess> {
        match self {
            GuestSide::Process(process) => Some(process),
            GuestSide::Here { .. } => None,
        }
    }

    /// Becomes readable when the guest's process ends.
    pub(crate) fn exited(&self) -> BorrowedFd<'_> {
        match self {
            GuestSide::Process(process) => process.monitor.exited(),
            GuestSide::Here { never } => never.as_fd(),
        }
    }

    /// Becomes readable when what umem stays for ends: what it has started, if that is not the guest's process itself.
    pub(crate) fn command_exited(&self) -> BorrowedFd<'_> {
        match self {
            GuestSide::Process(process) => process.monitor.command_exited(),
            GuestSide::Here { never } => never.as_fd(),
        }
    }

    /// What may tell of its end while pages come; then ask [`has_ended`](GuestSide::has_ended). With
    /// private memory the guest side's answers on the socket go to somebody else, and who does not know
    /// umem may close it when it likes: then the process's end has to do.
    pub(crate) fn watched(&self, has_private: bool) -> Vec<BorrowedFd<'_>> {
        let Some(process) = self.process() else { return Vec::new() };
        let is_ours = process.knows_umem && !has_private;
        let socket = is_ours.then(|| process.handoff.stream().as_fd());
        std::iter::once(process.monitor.exited()).chain(socket).collect()
    }

    /// Whether the guest's process has ended, after entry `index` of what is watched became readable.
    pub(crate) fn has_ended(&mut self, index: usize) -> Result<bool> {
        let Some(process) = self.process_mut() else { return Ok(false) };
        // Nothing is said on the socket before the end; an end of file comes with the exit.
        if index == 0 {
            return Ok(true);
        }
        let Some(messages) = process.handoff.read()? else { return Ok(true) };
        process.handoff.forget_late(&messages)?;
        Ok(false)
    }

    /// Whether the guest's process has ended, asked now.
    pub(crate) fn has_exited(&self) -> bool {
        self.exits_within(Duration::ZERO)
    }

    /// Whether it has, or does so in time.
    pub(crate) fn exits_within(&self, patience: Duration) -> bool {
        let ends_within = |exited, patience| {
            let mut fds = [PollFd::new(exited, PollFlags::POLLIN)];
            let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
            poll(&mut fds, patience).is_ok_and(|ready| ready > 0)
        };
        let since = Instant::now();
        let has_ended = ends_within(self.exited(), patience);
        if has_ended {
            // How the guest has ended says what has started it, which ends next if it has nothing else to do.
            let left = patience.saturating_sub(since.elapsed());
            ends_within(self.command_exited(), left);
        }
        has_ended
    }

    /// It has all of its memory: its process stays, whatever happens to umem.
    pub(crate) fn is_complete(&mut self) {
        self.process_mut().into_iter().for_each(|process| process.monitor.release());
    }

    /// Its process ends with this one, as it would go on with zeroes.
    pub(crate) fn ends_with_us(&self) -> bool {
        self.process().is_some_and(|process| !process.monitor.is_released())
    }

    /// Ends its process, unless that stays whatever happens to umem.
    pub(crate) fn end(&mut self) {
        self.process_mut().into_iter().for_each(|process| process.monitor.end());
    }

    /// How the guest's process has ended, where it is a child.
    pub(crate) fn status(&mut self) -> Option<ExitStatus> {
        self.process_mut()?.monitor.status().ok().flatten()
    }

    /// Has the guest's side keep what somebody needs who takes over.
    pub(crate) fn entrust(
        &mut self,
        listener: UnixListener,
        state: &File,
        qmp: Option<OwnedFd>,
    ) -> Result<()> {
        match self.process_mut() {
            Some(process) => process.handoff.entrust(listener, state, qmp),
            None => Ok(()),
        }
    }

    /// The guest's side can drop pages of its own memory, so that they are missing again.
    pub(crate) fn can_empty(&self) -> bool {
        self.process().is_some_and(|process| process.handoff.registers())
    }

    /// Has the guest's side drop pages of its own memory that come once more: ranges of addresses in the memory that
    /// begins at `block`.
    pub(crate) fn empty(&mut self, block: u64, stale: &[Range<u64>]) -> Result<()> {
        match self.process_mut() {
            Some(process) => process.handoff.empty(block, stale, EMPTY_PATIENCE),
            None => Err(Error::Internal("memory of this process takes no pages twice".into())),
        }
    }

    /// From here on the source may give its guest up: should we be killed this one waits. If we end by
    /// ourselves before it is ours, we still end it.
    pub(crate) fn hold(&mut self) -> Result<()> {
        match self.process_mut() {
            Some(process) if process.keeps_sessions => {
                process.monitor.survive_panics();
                process.handoff.keep()
            }
            _ => Ok(()),
        }
    }

    /// The guest, which has never run here, ends with us until it is ours.
    pub(crate) fn doom(&mut self) -> Result<()> {
        let Some(process) = self.process_mut() else { return Ok(()) };
        let pid = process.monitor.pid();
        process.monitor.hold(pid)
    }

    /// From here on the guest is ours: its process stays, whatever happens to umem, if its faults wait
    /// then. One that would go on with zeroes is ended.
    pub(crate) fn keep(&mut self) -> Result<()> {
        match self.process_mut() {
            Some(process) if process.knows_umem => {
                process.monitor.release();
                process.handoff.keep()
            }
            _ => Ok(()),
        }
    }

    /// The guest is complete: its process closes its userfaultfds and runs on alone.
    ///
    /// A process that does not run, as it is stopped or in a debugger, does not answer. Nothing is registered
    /// with its userfaultfds any more, and it has been told what to do, so that it does that by itself as soon
    /// as it goes on, whether we are there or not: what is waited for is only to know it done, and a signal
    /// ends the waiting.
    pub(crate) fn release(&mut self, inbox: &Inbox<Note>, output: &Output) -> Result<()> {
        let Some(process) = self.process_mut() else { return Ok(()) };
        process.monitor.release();
        if !process.knows_umem {
            return Ok(());
        }
        process.handoff.release()?;
        let mut until = Some(Instant::now() + RELEASE_PATIENCE);
        loop {
            let fds = [process.handoff.stream().as_fd(), process.monitor.exited()];
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            match inbox.wait(&fds, left)? {
                Wake::Ready(0) => match process.handoff.read()? {
                    Some(messages) if !messages.iter().any(Message::is_released) => {}
                    // The process may have ended meanwhile, as a guest may.
                    _ => return Ok(()),
                },
                Wake::Ready(_) => return Ok(()),
                Wake::Timeout => {
                    until = None;
                    process.remark_on_silence(output);
                }
                // Nobody has been told yet what is waited for.
                Wake::Signal if until.take().is_some() => process.remark_on_silence(output),
                Wake::Signal => {
                    process.leave_alone(output);
                    return Ok(());
                }
                Wake::Message(_) => {}
            }
        }
    }

    /// The guest runs alone now. Stays until what we have started ends, if that is a child, so that its terminal stays
    /// its own. The exit status is its, where we see its end.
    pub(crate) fn outlive(&mut self, inbox: &Inbox<Note>, output: &Output) -> Result<i32> {
        while self.is_outlived() {
            match inbox.wait(&[self.command_exited()], None)? {
                Wake::Signal => {
                    if let Some(status) = self.interrupted(inbox.was_ctrl_c(), output) {
                        return Ok(status);
                    }
                }
                Wake::Ready(_) => return self.wait(),
                Wake::Message(_) | Wake::Timeout => {}
            }
        }
        Ok(0)
    }

    /// A signal, while all that we do is to stay with the guest's process. Ctrl-C is for the guest, as in the
    /// terminal of a monitor that was started there, and a second one for us; every other signal is for us
    /// alone. Our exit status, if we are to leave.
    pub(crate) fn interrupted(&mut self, is_ctrl_c: bool, output: &Output) -> Option<i32> {
        let process = self.process_mut()?;
        if process.is_ending || !is_ctrl_c {
            process.leave_alone(output);
            return Some(i32::from(process.is_ending));
        }
        process.is_ending = true;
        process.monitor.terminate();
        let pid = process.monitor.pid();
        let is_halted = standstill(pid).is_some();
        output.tell(&Event::Stopping { guest_pid: pid, is_halted });
        None
    }

    /// The guest goes on without us: whoever started us is told where it is.
    pub(crate) fn say_where(&mut self, output: &Output) {
        if let Some(process) = self.process_mut() {
            process.leave_alone(output);
        }
    }

    /// Whether umem stays for as long as the guest's process runs.
    pub(crate) fn is_outlived(&self) -> bool {
        self.process().is_some_and(|process| process.monitor.is_child() && !process.is_left_alone)
    }

    /// Waits for the end of the process, which must be a child; its exit status, 1 where a signal has ended it.
    pub(crate) fn wait(&mut self) -> Result<i32> {
        let Some(process) = self.process_mut() else { return Ok(0) };
        Ok(process.monitor.wait()?.map_or(0, |status| status.code().unwrap_or(1)))
    }
}

impl GuestProcess {
    pub(crate) fn new(
        monitor: Monitor,
        handoff: HandoffSocket,
        knows_umem: bool,
        keeps_sessions: bool,
    ) -> GuestProcess {
        GuestProcess {
            monitor,
            handoff,
            knows_umem,
            keeps_sessions,
            is_ending: false,
            is_left_alone: false,
        }
    }

    /// It has been told to let go, and has not said that it has.
    fn remark_on_silence(&self, output: &Output) {
        let (guest_pid, is_stopped, why) = self.silence();
        output.tell(&Event::Releasing { guest_pid, is_stopped, why });
    }

    /// Nobody waits for its end any more: whoever started us is told where the guest is.
    fn leave_alone(&mut self, output: &Output) {
        self.is_left_alone = true;
        output.tell(&Event::Left { guest_pid: self.monitor.pid() });
    }

    /// It does not hand over to a umem that takes over.
    pub(crate) fn does_not_hand_over(&self) -> Error {
        let (pid, _, why) = self.silence();
        Error::Preload(format!(
            "the guest's process {pid} does not hand its memory over again: {why}; it waits for another \
             --resume"
        ))
    }

    /// The process whose memory it is, which may be one that ours has started.
    fn memory_pid(&self) -> u32 {
        self.monitor.owner().unwrap_or(self.monitor.pid())
    }

    /// Whose memory it is, whether that process is stopped, and why it does not answer in words.
    fn silence(&self) -> (u32, bool, String) {
        let pid = self.memory_pid();
        match standstill(pid) {
            Some(Standstill::Stopped) => {
                (pid, true, format!("it is stopped, and `kill -CONT {pid}` lets it go on"))
            }
            Some(Standstill::Traced) => (pid, true, "a debugger holds it".into()),
            None => (pid, false, "it does not answer".into()),
        }
    }
}
