//! The owner of the guest's memory: another process, which umem started or which connected to umem; or this process,
//! when umem is a part of the program that runs the guest.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::InboxMessage;
use crate::error::{Context, Error, Result};
use crate::events::Event;
use crate::fault::handoff::{HandoffSocket, Message};
use crate::host::command::MonitorProcess;
use crate::observe::output::Output;
use crate::runtime::inbox::{Inbox, Wake};
use crate::runtime::polling::poll;
use crate::runtime::process::{Standstill, standstill};

/// How long the guest's process may take to close its userfaultfds before umem prints a remark. It takes milliseconds,
/// unless the process is stopped, or maps a large guest with huge pages meanwhile.
const RELEASE_PATIENCE: Duration = Duration::from_secs(2);

/// How long the guest's process may take to drop pages that arrive once more. It takes milliseconds. The guest stands
/// still meanwhile.
const EMPTY_PATIENCE: Duration = Duration::from_secs(20);

/// The process that runs the guest.
pub(crate) enum GuestSide {
    /// Another process.
    Process(Box<GuestProcess>),
    /// This process. It outlives the migration and keeps its userfaultfds itself; `exited` never becomes readable.
    Here { never: EventFd },
}

/// The guest's process, and the socket on which it handed over its memory.
pub(crate) struct GuestProcess {
    pub(crate) monitor: MonitorProcess,
    pub(crate) handoff: HandoffSocket,
    /// The guest's process keeps its userfaultfds when umem ends, and understands commands.
    pub(crate) knows_umem: bool,
    /// The guest's process can also keep the state that a takeover needs.
    pub(crate) keeps_sessions: bool,
    /// umem has asked the process to end.
    is_ending: bool,
    /// umem no longer waits for the process.
    is_left_alone: bool,
}

impl GuestSide {
    pub(crate) fn here() -> Result<GuestSide> {
        let never = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).context(|| "eventfd")?;
        Ok(GuestSide::Here { never })
    }

    /// Its pid; None for this process.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.process().map(|process| process.monitor.pid())
    }

    pub(crate) fn process(&self) -> Option<&GuestProcess> {
        match self {
            GuestSide::Process(process) => Some(process),
            GuestSide::Here { .. } => None,
        }
    }

    /// The process whose memory it is; None for this process.
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

    /// Becomes readable when the process ends for which umem stays: the started command, if that is not the guest's
    /// process.
    pub(crate) fn command_exited(&self) -> BorrowedFd<'_> {
        match self {
            GuestSide::Process(process) => process.monitor.command_exited(),
            GuestSide::Here { never } => never.as_fd(),
        }
    }

    /// The descriptors that signal the process's end while pages arrive; [`has_ended`](GuestSide::has_ended) then
    /// checks. With private memory another thread reads the socket, and a process that does not know umem may close the
    /// socket at any time: in both cases only the process's end counts.
    pub(crate) fn watched(&self, has_private: bool) -> Vec<BorrowedFd<'_>> {
        let Some(process) = self.process() else { return Vec::new() };
        let is_ours = process.knows_umem && !has_private;
        let socket = is_ours.then(|| process.handoff.stream().as_fd());
        std::iter::once(process.monitor.exited()).chain(socket).collect()
    }

    /// Whether the guest's process has ended, after descriptor `index` of the watched ones became readable.
    pub(crate) fn has_ended(&mut self, index: usize) -> Result<bool> {
        let Some(process) = self.process_mut() else { return Ok(false) };
        // Before the end the process sends nothing on the socket; its exit gives end of file.
        if index == 0 {
            return Ok(true);
        }
        let Some(messages) = process.handoff.read()? else { return Ok(true) };
        process.handoff.forget_late(&messages)?;
        Ok(false)
    }

    /// Whether the guest's process has ended, checked now.
    pub(crate) fn has_exited(&self) -> bool {
        self.exits_within(Duration::ZERO)
    }

    /// Whether the process has ended, or ends in time.
    pub(crate) fn exits_within(&self, patience: Duration) -> bool {
        let ends_within = |exited, patience| {
            let mut fds = [PollFd::new(exited, PollFlags::POLLIN)];
            let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
            poll(&mut fds, patience).is_ok_and(|ready| ready > 0)
        };
        let since = Instant::now();
        let has_ended = ends_within(self.exited(), patience);
        if has_ended {
            // The exit status comes from the started command, which ends next if it has no other work.
            let left = patience.saturating_sub(since.elapsed());
            ends_within(self.command_exited(), left);
        }
        has_ended
    }

    /// The guest has all of its memory: its process stays even if umem ends.
    pub(crate) fn is_complete(&mut self) {
        self.process_mut().into_iter().for_each(|process| process.monitor.release());
    }

    /// The process ends with this one, because it would read zeroes otherwise.
    pub(crate) fn ends_with_us(&self) -> bool {
        self.process().is_some_and(|process| !process.monitor.is_released())
    }

    /// Ends the process, unless it stays even if umem ends.
    pub(crate) fn end(&mut self) {
        self.process_mut().into_iter().for_each(|process| process.monitor.end());
    }

    /// The exit status of the guest's process, if it is a child.
    pub(crate) fn status(&mut self) -> Option<ExitStatus> {
        self.process_mut()?.monitor.status().ok().flatten()
    }

    /// Has the guest's process keep the state that a takeover needs.
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

    /// From here on the source may give its guest up: the process waits if this one is killed. If this one exits before
    /// it owns the guest, it still ends the process.
    pub(crate) fn hold(&mut self) -> Result<()> {
        match self.process_mut() {
            Some(process) if process.keeps_sessions => {
                process.monitor.survive_panics();
                process.handoff.keep()
            }
            _ => Ok(()),
        }
    }

    /// The guest has never run here: it ends with this process until this side owns it.
    pub(crate) fn doom(&mut self) -> Result<()> {
        let Some(process) = self.process_mut() else { return Ok(()) };
        let pid = process.monitor.pid();
        process.monitor.hold(pid)
    }

    /// From here on this side owns the guest: its process stays even if umem ends, provided that its faults wait then.
    /// A process that would read zeroes is ended.
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
    /// A process that is stopped or traced does not answer. Its userfaultfds have no ranges registered any more, and it
    /// has the command already, which it carries out when it continues, with or without umem. So the wait is only for
    /// the confirmation, and a signal ends it.
    pub(crate) fn release(&mut self, inbox: &Inbox<InboxMessage>, output: &Output) -> Result<()> {
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
                // The remark has not been printed yet.
                Wake::Signal if until.take().is_some() => process.remark_on_silence(output),
                Wake::Signal => {
                    process.leave_alone(output);
                    return Ok(());
                }
                Wake::Message(_) => {}
            }
        }
    }

    /// The guest runs alone now. Stays until the started command ends, if it is a child, so that it keeps its terminal.
    /// The exit status is the command's, if known.
    pub(crate) fn outlive(&mut self, inbox: &Inbox<InboxMessage>, output: &Output) -> Result<i32> {
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

    /// A signal while umem only stays with the guest's process. Ctrl-C is for the guest, as in the terminal of a
    /// monitor started there; a second Ctrl-C is for umem, as is every other signal. Returns the exit status if umem is
    /// to leave.
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

    /// The guest continues without umem: prints where it runs.
    pub(crate) fn say_where(&mut self, output: &Output) {
        if let Some(process) = self.process_mut() {
            process.leave_alone(output);
        }
    }

    /// Whether umem stays while the guest's process runs.
    pub(crate) fn is_outlived(&self) -> bool {
        self.process().is_some_and(|process| process.monitor.is_child() && !process.is_left_alone)
    }

    /// Waits for the end of the process, which must be a child. Returns its exit status, 1 after a signal.
    pub(crate) fn wait(&mut self) -> Result<i32> {
        let Some(process) = self.process_mut() else { return Ok(0) };
        Ok(process.monitor.wait()?.map_or(0, |status| status.code().unwrap_or(1)))
    }
}

impl GuestProcess {
    pub(crate) fn new(
        monitor: MonitorProcess,
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

    /// The process was asked to close its userfaultfds and has not confirmed.
    fn remark_on_silence(&self, output: &Output) {
        let (guest_pid, is_stopped, why) = self.silence();
        output.tell(&Event::Releasing { guest_pid, is_stopped, why });
    }

    /// umem stops waiting for the process: prints where the guest runs.
    fn leave_alone(&mut self, output: &Output) {
        self.is_left_alone = true;
        output.tell(&Event::Left { guest_pid: self.monitor.pid() });
    }

    /// The process does not hand its memory over to a takeover.
    pub(crate) fn does_not_hand_over(&self) -> Error {
        let (pid, _, why) = self.silence();
        Error::Preload(format!(
            "the guest's process {pid} does not hand its memory over again: {why}; the process waits for another \
             --resume"
        ))
    }

    /// The process that owns the memory, possibly a child of the started one.
    fn memory_pid(&self) -> u32 {
        self.monitor.owner().unwrap_or(self.monitor.pid())
    }

    /// That process, whether it is stopped, and why it does not answer.
    fn silence(&self) -> (u32, bool, String) {
        let pid = self.memory_pid();
        match standstill(pid) {
            Some(Standstill::Stopped) => {
                (pid, true, format!("it is stopped; `kill -CONT {pid}` continues it"))
            }
            Some(Standstill::Traced) => (pid, true, "a debugger holds it".into()),
            None => (pid, false, "it does not answer".into()),
        }
    }
}
