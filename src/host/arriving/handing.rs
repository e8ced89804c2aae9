//! Waiting for a guest's process to hand its memory over.

use crate::runtime::screen;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::fault::handoff::{Handed, HandoffListener, HandoffSocket, Message};
use crate::host::command::MonitorProcess;
use crate::runtime::accepting::{Accepted, Room};
use crate::runtime::inbox::{Inbox, Wake};

/// A monitor maps its RAM within a second of its start; a machine under load gets this long.
pub(super) const HANDOFF_TIMEOUT: Duration = Duration::from_secs(60);

/// How long after its sockets have closed a process may take to end.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);

/// Pieces at most in all hand-over messages together, and the limit of userfaultfds that come with them.
const PIECES_MAX: usize = 4096;

/// Refuses more pieces than a guest's process can have.
pub(crate) fn check_pieces(count: usize) -> Result<()> {
    if count <= PIECES_MAX {
        return Ok(());
    }
    Err(Error::Preload(format!("more than {PIECES_MAX} pieces of memory were handed over")))
}

/// The memory that has been handed over.
pub(super) struct Memory {
    pub(super) handed: Vec<Handed>,
    pub(super) knows_umem: bool,
    pub(super) keeps_sessions: bool,
}

/// Connections to the hand-over socket that may be open without a message. Beyond this the oldest is dropped: a guest's
/// process sends its message at once.
const CALLERS_MAX: usize = 8;

/// Reads of one such connection, of 4 KiB at most: a message may come in pieces, with others before it. The limit keeps
/// a connection that sends without end from delaying the others.
const READS_MAX: usize = 64;

/// How long such a connection may stay open.
const CALLER_TIMEOUT: Duration = HANDOFF_TIMEOUT;

/// Connections to the hand-over socket that have handed nothing over yet. None of them blocks another one.
pub(super) struct Callers<'a> {
    listener: &'a HandoffListener,
    /// The oldest first.
    waiting: Vec<Caller>,
    /// What the last dropped connection had sent.
    complaint: Option<String>,
    room: Room,
}

struct Caller {
    handoff: HandoffSocket,
    pid: u32,
    deadline: Instant,
    /// Reads of messages that hand nothing over.
    reads: usize,
}

/// A process that has begun to hand its memory over.
pub(super) struct First {
    pub(super) handoff: HandoffSocket,
    pub(super) pid: u32,
    /// The messages that it has sent.
    messages: Vec<Message>,
}

impl<'a> Callers<'a> {
    pub(super) fn new(listener: &'a HandoffListener) -> Callers<'a> {
        let (waiting, complaint) = (Vec::new(), None);
        Callers { listener, waiting, complaint, room: Room::default() }
    }

    /// The descriptors to wait for. When one is ready, [`answer`](Callers::answer) takes its index.
    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let waiting = self.waiting.iter().map(|caller| caller.handoff.stream().as_fd());
        // The listener is last, so that its absence does not change another descriptor's index.
        let listener = self.room.deadline(Instant::now()).is_none().then(|| self.listener.as_fd());
        waiting.chain(listener).collect()
    }

    /// The time at which [`forget_late`](Callers::forget_late) has to be called.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let caller = self.waiting.first().map(|caller| caller.deadline);
        caller.into_iter().chain(self.room.deadline(Instant::now())).min()
    }

    pub(super) fn forget_late(&mut self, now: Instant) {
        while self.waiting.first().is_some_and(|caller| caller.deadline <= now) {
            let caller = self.waiting.remove(0);
            self.drop_caller(&caller, "it has handed over no memory");
        }
    }

    /// Handles a ready descriptor. Returns the first process that hands its memory over.
    pub(super) fn answer(&mut self, index: usize) -> Result<Option<First>> {
        if index >= self.waiting.len() {
            self.accept()?;
            return Ok(None);
        }
        let mut caller = self.waiting.remove(index);
        let read = match caller.handoff.read() {
            Ok(None) => caller.handoff.explain_end().map(|()| None),
            read => read,
        };
        match read {
            Ok(Some(messages)) => {
                let is_memory = |message: &Message| matches!(message, Message::Memory { .. });
                if messages.iter().any(is_memory) {
                    let Caller { handoff, pid, .. } = caller;
                    return Ok(Some(First { handoff, pid, messages }));
                }
                caller.reads += 1;
                match caller.reads <= READS_MAX {
                    true => self.waiting.insert(index, caller),
                    false => self.drop_caller(&caller, "it sends data and hands over no memory"),
                }
            }
            Ok(None) => {}
            Err(error) if caller.handoff.is_flooded() => {
                self.drop_caller(&caller, &error.to_string());
            }
            // A guest's process sends what umem does not understand: this is final, as it will not send anything else.
            Err(error) => return Err(error),
        }
        Ok(None)
    }

    fn accept(&mut self) -> Result<()> {
        let stream = match self.listener.accept()? {
            Accepted::One(stream) => stream,
            Accepted::Gone => return Ok(()),
            Accepted::NoRoom(error) => {
                match self.waiting.is_empty() {
                    true => self.room.lacked(Instant::now()),
                    false => {
                        let oldest = self.waiting.remove(0);
                        self.drop_caller(&oldest, &error.to_string());
                    }
                }
                return Ok(());
            }
        };
        match HandoffListener::who(stream)? {
            Ok((handoff, pid)) => {
                if self.waiting.len() == CALLERS_MAX {
                    let oldest = self.waiting.remove(0);
                    self.drop_caller(&oldest, "others connected before it had handed over memory");
                }
                let deadline = Instant::now() + CALLER_TIMEOUT;
                self.waiting.push(Caller { handoff, pid, deadline, reads: 0 });
            }
            Err(why) => self.complain(why),
        }
        Ok(())
    }

    fn drop_caller(&mut self, caller: &Caller, why: &str) {
        self.complain(format!("process {}: {why}", caller.pid));
    }

    fn complain(&mut self, why: String) {
        screen::say(&format!("umem: ignored a connection to the hand-over socket: {why}"));
        self.complaint = Some(why);
    }

    /// The detail that follows the statement that nothing has been handed over.
    fn complaint(&self) -> String {
        self.complaint.as_ref().map_or_else(String::new, |why| format!(" (ignored: {why})"))
    }
}

/// Waits until the process that umem has started, or a child of that process, hands over its memory.
pub(super) fn accept_memory<N>(
    listener: &HandoffListener,
    monitor: &mut MonitorProcess,
    inbox: &Inbox<N>,
) -> Result<(HandoffSocket, Memory)> {
    let deadline = Instant::now() + HANDOFF_TIMEOUT;
    let mut callers = Callers::new(listener);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::Host(format!(
                "COMMAND has not handed over its memory: give it the path that --handoff names{}",
                callers.complaint()
            )));
        }
        let mut fds = vec![monitor.exited()];
        fds.extend(callers.fds());
        let next = callers.deadline().map(|at| at.saturating_duration_since(Instant::now()));
        let left = next.map_or(left, |next| next.min(left));
        let index = match inbox.wait(&fds, Some(left))? {
            Wake::Signal => return Err(Error::Interrupted("no guest had arrived".into())),
            Wake::Ready(0) => {
                return Err(Error::Host(
                    "it exited before it handed over its memory (its own messages say why)".into(),
                ));
            }
            Wake::Ready(index) => index - 1,
            Wake::Message(_) | Wake::Timeout => continue,
        };
        let Some(first) = callers.answer(index)? else { continue };
        return receive_memory(first, monitor, inbox);
    }
}

/// Takes the memory of a process that has begun to hand it over.
pub(super) fn receive_memory<N>(
    first: First,
    monitor: &mut MonitorProcess,
    inbox: &Inbox<N>,
) -> Result<(HandoffSocket, Memory)> {
    let First { mut handoff, pid, mut messages } = first;
    let mut memory = Memory { handed: Vec::new(), knows_umem: true, keeps_sessions: true };
    let deadline = Instant::now() + HANDOFF_TIMEOUT;
    loop {
        for message in messages {
            let Message::Memory { pieces, more, knows_umem, keeps_sessions } = message else {
                continue;
            };
            if memory.handed.is_empty() {
                monitor.hold(pid)?;
            }
            memory.handed.extend(pieces);
            memory.knows_umem &= knows_umem;
            memory.keeps_sessions &= keeps_sessions;
            check_pieces(memory.handed.len())?;
            if !more {
                return Ok((handoff, memory));
            }
        }
        messages = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Preload("the last hand-over message has not arrived".into()));
            }
            match inbox.wait(&[handoff.stream().as_fd(), monitor.exited()], Some(left))? {
                Wake::Signal => return Err(Error::Interrupted("no guest had arrived".into())),
                Wake::Ready(0) => break handoff.read()?,
                Wake::Ready(_) => {
                    return Err(Error::Host("it ended while it handed over its memory".into()));
                }
                Wake::Message(_) | Wake::Timeout => {}
            }
        }
        .ok_or_else(|| Error::Preload("the last hand-over message has not arrived".into()))?;
    }
}

/// Whether the process has ended. Its hand-over socket was closed, mostly because the process is ending; the end shows
/// a moment later.
pub(super) fn closed<N>(monitor: &MonitorProcess, inbox: &Inbox<N>) -> Result<bool> {
    let deadline = Instant::now() + EXIT_TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        return match inbox.wait(&[monitor.exited()], Some(left))? {
            Wake::Signal => Err(Error::Interrupted("no guest had arrived".into())),
            Wake::Ready(_) => Ok(true),
            Wake::Timeout => Ok(false),
            Wake::Message(_) => continue,
        };
    }
}

pub(super) fn exited(loaded: bool, missing: &HashMap<&str, ()>) -> Error {
    if !loaded {
        return never_handed_over(loaded, missing);
    }
    let names = names(missing);
    Error::Host(format!("it exited before it mapped RAM {names} (its own messages say why)"))
}

fn names(missing: &HashMap<&str, ()>) -> String {
    missing.keys().copied().collect::<Vec<_>>().join(", ")
}

pub(super) fn never_handed_over(loaded: bool, missing: &HashMap<&str, ()>) -> Error {
    let names = names(missing);
    Error::Preload(if loaded {
        format!(
            "COMMAND never mapped RAM {names}: check that its mem-path is the file named here and \
             that share=on"
        )
    } else {
        "the preload object was not loaded into COMMAND: it must be a dynamically linked program \
         that is neither setuid nor started through a program that clears LD_PRELOAD"
            .into()
    })
}
