//! The questions to a guest's monitor, and its answers. umem does not control a vCPU itself: a monitor stops the guest,
//! saves its device state, loads it on the other side and starts the guest there.
//!
//! A kind of monitor has two parts: a [`Monitor`], defined here, and a [`MonitorKind`](super::kind::MonitorKind), which
//! finds its guests. Both sides use the same trait, and each asks its own questions:
//!
//! ```text
//! source:       before_stop, dirty_log | stop  save_state  stands_still+ | put_back
//!                                      +--------- resume, at any time before that
//! destination:  handle | prepare  load_state  run
//! takeover:     source: stands_still*, then put_back or resume    destination: run
//! ```
//!
//! - The questions come one at a time, in this order; each waits for the answer to its predecessor.
//! - An error is an answer: the monitor is unchanged, and can be asked to undo earlier questions (`resume`).
//! - A question that a kind of monitor cannot answer is answered with an error that names the kind. Nothing panics.
//! - [`Question`] and [`Answer`] are the same as data, for a monitor that answers asynchronously: a program that embeds
//!   umem. [`Question::put`] asks a [`Monitor`].

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::memory::dirty::{DirtyLog, DirtyMap};

/// Records what another process needs to undo a stop, and to complete the steps after the stop.
pub(crate) type BeforeStop = Box<dyn Fn(&MonitorRecord) -> Result<()> + Send>;

/// The part of a session's record that belongs to the kind of monitor. Only that kind reads the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MonitorRecord {
    /// The name of the kind.
    pub(crate) kind: String,
    pub(crate) state: serde_json::Value,
}

/// What another process needs to take over a monitor if this process is killed.
pub(crate) struct Handle {
    pub(crate) record: MonitorRecord,
    /// A descriptor of the connection, if another process could not open a connection of its own.
    pub(crate) connection: Option<OwnedFd>,
}

/// The guest of a loaded device state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loaded {
    /// The guest ran when it was stopped; otherwise it arrives paused.
    pub(crate) runs: bool,
}

/// The monitor of one guest.
pub(crate) trait Monitor: Send {
    /// The kind of monitor: the subject of a sentence in errors.
    fn name(&self) -> &str;

    /// What another process needs to take over this monitor; None if a takeover needs nothing.
    fn handle(&self) -> Result<Option<Handle>> {
        Ok(None)
    }

    /// Source: calls `note` before every stop. The stop fails if `note` does.
    fn before_stop(&mut self, _note: BeforeStop) {}

    /// Source: the log of the pages that the guest writes while it runs; None if no log exists.
    fn dirty_log(&mut self) -> Option<Box<dyn DirtyLog>> {
        None
    }

    /// Source: stops every vCPU, after all work that is possible while they still run, and saves the device state. From
    /// here on neither the device state nor the guest's memory changes. Returns the moment at which the guest stopped,
    /// if that is later than this call.
    fn stop(&mut self) -> Result<Option<Instant>> {
        Err(self.cannot("stop a guest"))
    }

    /// Source: the device state of the stopped guest.
    fn save_state(&mut self) -> Result<Vec<u8>> {
        Err(self.cannot("save a guest's device state"))
    }

    /// Source: ensures that the guest has stood still since the stop, and cannot continue without a command. Asked
    /// right before the guest is given away, and again before the switchover is sent once more.
    fn stands_still(&mut self) -> Result<()> {
        Err(self.cannot("report whether its guest stands still"))
    }

    /// Source: undoes stop and save. The guest continues here, unchanged.
    fn resume(&mut self) -> Result<()> {
        Err(self.cannot("resume a guest that it has stopped"))
    }

    /// Source: restores the settings that were changed for the move. The guest has been given away.
    fn put_back(&mut self) -> Result<()> {
        Ok(())
    }

    /// Destination: prepares for the device state before it arrives. The guest still runs at the source.
    fn prepare(&mut self) -> Result<()> {
        Ok(())
    }

    /// Destination: loads the device state. This may touch guest memory, so faults are served meanwhile.
    fn load_state(&mut self, _state: Vec<u8>) -> Result<Loaded> {
        Err(self.cannot("load a device state"))
    }

    /// Destination: starts the vCPUs of a guest that ran when it was stopped.
    fn run(&mut self) -> Result<()> {
        Err(self.cannot("start a guest that has arrived"))
    }

    /// The error for a question that this kind of monitor cannot answer.
    fn cannot(&self, what: &str) -> Error {
        Error::Host(format!("{} cannot {what}", self.name()))
    }
}

/// A question to the monitor.
pub(crate) enum Question {
    /// Mark the pages that the guest writes from now on.
    Track(Arc<DirtyMap>),
    /// Mark all pages that have been written so far.
    Look,
    Stop,
    Save,
    /// Ensure that the guest may be given away.
    StandsStill,
    PutBack,
    Resume,
    Prepare,
    Load(Vec<u8>),
    Run,
}

/// The monitor's answers, in the order of the questions.
#[derive(Debug)]
pub(crate) enum Answer {
    /// The guest's writes are tracked from now on.
    Tracking(Result<()>),
    /// All pages that had been written at the time of the question are marked.
    Looked(Result<()>),
    /// Some of those pages are not marked yet: the marked pages have to be sent first, and then the question is
    /// repeated.
    LookedInPart,
    /// All pages are marked, and the guest has stopped by itself: it writes no more pages.
    LookedLast,
    /// The moment at which the guest stopped, if that is later than the question.
    Stopped(Result<Option<Instant>>),
    Saved(Result<Vec<u8>>),
    /// The guest may be given away.
    StandsStill(Result<()>),
    /// The changes in the source's monitor are undone.
    PutBack(Result<()>),
    Resumed(Result<()>),
    Prepared(Result<()>),
    Loaded(Result<Loaded>),
    Running(Result<()>),
}

impl Question {
    /// Asks a monitor, or the log of its guest's writes. Tracking ends when the guest continues.
    pub(crate) fn put(
        self,
        monitor: &mut dyn Monitor,
        log: &mut Option<Box<dyn DirtyLog>>,
    ) -> Answer {
        match self {
            Question::Track(marks) => Answer::Tracking(match log {
                Some(log) => log.start(marks),
                None => Err(monitor.cannot("track what its guest writes")),
            }),
            Question::Look => match log {
                None => Answer::Looked(Err(monitor.cannot("track what its guest writes"))),
                Some(log) => match log.next() {
                    Ok(()) if log.is_in_part() => Answer::LookedInPart,
                    Ok(()) if log.has_stopped() => Answer::LookedLast,
                    looked => Answer::Looked(looked),
                },
            },
            Question::Stop => Answer::Stopped(monitor.stop().and_then(|at| {
                log.as_mut().map_or(Ok(()), |log| log.finish())?;
                Ok(at)
            })),
            Question::Save => Answer::Saved(monitor.save_state()),
            Question::StandsStill => Answer::StandsStill(monitor.stands_still()),
            Question::PutBack => Answer::PutBack(monitor.put_back()),
            Question::Resume => {
                *log = None;
                Answer::Resumed(monitor.resume())
            }
            Question::Prepare => Answer::Prepared(monitor.prepare()),
            Question::Load(state) => Answer::Loaded(monitor.load_state(state)),
            Question::Run => Answer::Running(monitor.run()),
        }
    }

    /// The answer to this question that carries an error.
    pub(crate) fn failed(&self) -> fn(Error) -> Answer {
        match self {
            Question::Track(_) => |error| Answer::Tracking(Err(error)),
            Question::Look => |error| Answer::Looked(Err(error)),
            Question::Stop => |error| Answer::Stopped(Err(error)),
            Question::Save => |error| Answer::Saved(Err(error)),
            Question::StandsStill => |error| Answer::StandsStill(Err(error)),
            Question::PutBack => |error| Answer::PutBack(Err(error)),
            Question::Resume => |error| Answer::Resumed(Err(error)),
            Question::Prepare => |error| Answer::Prepared(Err(error)),
            Question::Load(_) => |error| Answer::Loaded(Err(error)),
            Question::Run => |error| Answer::Running(Err(error)),
        }
    }
}

/// A guest without a monitor, which has only its memory: at a source, for example, a snapshot's RAM file; at a
/// destination, a process that hands its memory over and runs its guest by itself.
pub(crate) struct NoMonitor;

impl Monitor for NoMonitor {
    fn name(&self) -> &'static str {
        "a guest without a monitor"
    }

    fn stop(&mut self) -> Result<Option<Instant>> {
        Ok(None)
    }

    fn save_state(&mut self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    fn stands_still(&mut self) -> Result<()> {
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        Ok(())
    }

    fn load_state(&mut self, state: Vec<u8>) -> Result<Loaded> {
        if state.is_empty() {
            return Ok(Loaded { runs: true });
        }
        Err(Error::Host(format!(
            "the source sends {} bytes of device state, and the guest here has no monitor that can load them: give \
             its QMP socket with --qmp",
            state.len()
        )))
    }

    fn run(&mut self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A monitor of one role, as in a new kind's first version.
    struct Bare;

    impl Monitor for Bare {
        fn name(&self) -> &'static str {
            "a bare monitor"
        }
    }

    #[test]
    fn unanswerable_question_gives_an_error_that_names_the_kind() {
        let marks = Arc::new(DirtyMap::new(&[]));
        let ask = |question: Question| match question.put(&mut Bare, &mut None) {
            Answer::Tracking(Err(error))
            | Answer::Looked(Err(error))
            | Answer::Stopped(Err(error))
            | Answer::Saved(Err(error))
            | Answer::StandsStill(Err(error))
            | Answer::Resumed(Err(error))
            | Answer::Loaded(Err(error))
            | Answer::Running(Err(error)) => error.to_string(),
            other => panic!("{other:?}"),
        };
        for question in [
            Question::Track(marks),
            Question::Look,
            Question::Stop,
            Question::Save,
            Question::StandsStill,
            Question::Resume,
            Question::Load(Vec::new()),
            Question::Run,
        ] {
            let says = ask(question);
            assert!(says.contains("a bare monitor cannot"), "{says}");
        }
    }
}
