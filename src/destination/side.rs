//! Whose memory it is: another process's, which umem started or which came to it, or our own, where
//! umem is a part of the program that runs the guest.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::ExitStatus;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Note;
use crate::error::{Context, Result};
use crate::fault::handoff::{HandoffSocket, Message};
use crate::host::command::Monitor;
use crate::inbox::{Inbox, Wake};

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
        Ok(index == 0 || process.handoff.read()?.is_none())
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

    /// From here on the source may give its guest up: should we be killed this one waits. If we end by
    /// ourselves before it is ours, we still end it.
    pub(crate) fn hold(&mut self) -> Result<()> {
        match self.process_mut() {
            Some(process) if process.keeps_sessions => process.handoff.keep(),
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
    pub(crate) fn release(&mut self) -> Result<()> {
        let Some(process) = self.process_mut() else { return Ok(()) };
        process.monitor.release();
        if !process.knows_umem {
            return Ok(());
        }
        process.handoff.release()?;
        loop {
            match process.handoff.read()? {
                // The process ended meanwhile, as a guest may.
                None => return Ok(()),
                Some(messages) if messages.iter().any(|m| matches!(m, Message::Released)) => {
                    return Ok(());
                }
                Some(_) => {}
            }
        }
    }

    /// The guest runs alone now. Waits until its monitor ends, whose exit status is ours, so that
    /// its terminal stays its own; a signal ends the waiting, not the guest.
    pub(crate) fn outlive(&mut self, inbox: &Inbox<Note>) -> Result<i32> {
        let Some(process) = self.process_mut() else { return Ok(0) };
        while process.monitor.is_child() {
            match inbox.wait(&[process.monitor.exited()], None)? {
                Wake::Signal => break,
                Wake::Ready(_) => {
                    let status = process.monitor.wait()?;
                    return Ok(status.and_then(|status| status.code()).unwrap_or(1));
                }
                Wake::Message(_) | Wake::Timeout => {}
            }
        }
        Ok(0)
    }
}
