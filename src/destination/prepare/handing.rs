//! Waiting for a guest's process to hand its memory over.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crate::destination::Note;
use crate::error::{Error, Result};
use crate::fault::handoff::{Handed, HandoffListener, HandoffSocket, Message};
use crate::host::command::{Monitor, RamPath};
use crate::inbox::{Inbox, Wake};

/// A monitor maps its RAM within a second of its start; a machine under load gets this long.
pub(super) const HANDOFF_TIMEOUT: Duration = Duration::from_secs(60);

/// How long after its sockets have closed a process may take to end.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);

/// Pieces that all hand-over messages together may have, and userfaultfds that may come with them.
const PIECES_MAX: usize = 4096;

/// What has been handed over.
pub(super) struct Memory {
    pub(super) handed: Vec<Handed>,
    pub(super) knows_umem: bool,
    pub(super) keeps_sessions: bool,
}

/// Waits until the process that we have started, or one that it has started, hands over its memory.
pub(super) fn accept_memory(
    listener: &HandoffListener,
    monitor: &mut Monitor,
    inbox: &Inbox<Note>,
) -> Result<(HandoffSocket, Memory)> {
    let deadline = Instant::now() + HANDOFF_TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match inbox.wait(&[listener.as_fd(), monitor.exited()], Some(left))? {
            Wake::Signal => return Err(Error::Interrupted("no guest had arrived".into())),
            Wake::Timeout => {
                return Err(Error::Host(
                    "COMMAND has not handed over its memory: give it the path that --handoff names"
                        .into(),
                ));
            }
            Wake::Ready(0) => {}
            Wake::Ready(_) => {
                return Err(Error::Host(
                    "it exited before it handed over its memory (its own messages say why)".into(),
                ));
            }
            Wake::Message(_) => continue,
        }
        let (mut handoff, pid) = match listener.accept()? {
            Ok(accepted) => accepted,
            Err(why) => {
                eprintln!("umem: ignored a connection to the hand-over socket: {why}");
                continue;
            }
        };
        if let Some(memory) = receive_memory(&mut handoff, monitor, pid, inbox)? {
            return Ok((handoff, memory));
        }
    }
}

/// None when the process has closed the socket without handing anything over.
pub(super) fn receive_memory(
    handoff: &mut HandoffSocket,
    monitor: &mut Monitor,
    pid: u32,
    inbox: &Inbox<Note>,
) -> Result<Option<Memory>> {
    let mut memory = Memory { handed: Vec::new(), knows_umem: true, keeps_sessions: true };
    let deadline = Instant::now() + HANDOFF_TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let extra = [handoff.stream().as_fd(), monitor.exited()];
        match inbox.wait(&extra, Some(left))? {
            Wake::Signal => return Err(Error::Interrupted("no guest had arrived".into())),
            Wake::Timeout => {
                return Err(Error::Preload("the hand-over message has not come".into()));
            }
            Wake::Ready(0) => {}
            Wake::Ready(_) => {
                return Err(Error::Host("it ended as it handed over its memory".into()));
            }
            Wake::Message(_) => continue,
        }
        let Some(messages) = handoff.read()? else {
            handoff.explain_end()?;
            if memory.handed.is_empty() {
                return Ok(None);
            }
            return Err(Error::Preload("the last hand-over message has not come".into()));
        };
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
            if memory.handed.len() > PIECES_MAX {
                return Err(Error::Preload(format!(
                    "more than {PIECES_MAX} pieces of memory were handed over"
                )));
            }
            if !more {
                return Ok(Some(memory));
            }
        }
    }
}

/// Waits until each of the RAM files has been handed over.
pub(super) fn take_over(
    ram: &[RamPath],
    monitor: &Monitor,
    handoff: &mut HandoffSocket,
    inbox: &Inbox<Note>,
) -> Result<Memory> {
    let mut missing: HashMap<&str, ()> = ram.iter().map(|ram| (ram.name.as_str(), ())).collect();
    let (mut handed, mut all_keep_sessions) = (Vec::new(), true);
    let mut loaded = false;
    let deadline = Instant::now() + HANDOFF_TIMEOUT;
    while !missing.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        let extra = [handoff.stream().as_fd(), monitor.exited()];
        let messages = match inbox.wait(&extra, Some(left))? {
            Wake::Signal => return Err(Error::Interrupted("no guest had arrived".into())),
            Wake::Timeout => return Err(never_handed_over(loaded, &missing)),
            Wake::Ready(0) => handoff.read()?,
            Wake::Ready(_) => return Err(exited(loaded, &missing)),
            Wake::Message(_) => continue,
        };
        let Some(messages) = messages else {
            return Err(closed(monitor, inbox, loaded, &missing)?);
        };
        for message in messages {
            match message {
                Message::Loaded => loaded = true,
                Message::Memory { pieces, keeps_sessions, .. } => {
                    all_keep_sessions &= keeps_sessions;
                    for piece in pieces {
                        let name = piece.name.as_deref().unwrap_or_default();
                        if missing.remove(name).is_some() {
                            handed.push(piece);
                        }
                    }
                }
                Message::Released | Message::Session(_) => {}
            }
        }
    }
    Ok(Memory { handed, knows_umem: true, keeps_sessions: all_keep_sessions })
}

/// Why the hand-over socket was closed: mostly because the process is ending, which shows a moment
/// later.
fn closed(
    monitor: &Monitor,
    inbox: &Inbox<Note>,
    loaded: bool,
    missing: &HashMap<&str, ()>,
) -> Result<Error> {
    let deadline = Instant::now() + EXIT_TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        return Ok(match inbox.wait(&[monitor.exited()], Some(left))? {
            Wake::Signal => Error::Interrupted("no guest had arrived".into()),
            Wake::Ready(_) => exited(loaded, missing),
            Wake::Timeout => never_handed_over(loaded, missing),
            Wake::Message(_) => continue,
        });
    }
}

fn exited(loaded: bool, missing: &HashMap<&str, ()>) -> Error {
    if !loaded {
        return never_handed_over(loaded, missing);
    }
    let names = names(missing);
    Error::Host(format!("it exited before it mapped RAM {names} (its own messages say why)"))
}

fn names(missing: &HashMap<&str, ()>) -> String {
    missing.keys().copied().collect::<Vec<_>>().join(", ")
}

fn never_handed_over(loaded: bool, missing: &HashMap<&str, ()>) -> Error {
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
