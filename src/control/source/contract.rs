//! What the source's core and its driver exchange: the parameters, inputs, effects with their records, and the outcome.

use std::time::{Duration, Instant};

use umem_wire::{Fault, Frame, RegionTable, Standing, Totals};

use crate::control::Order;
use crate::control::calling::{Called, Word};
use crate::error::{Error, Result};
use crate::events::Event;
use crate::host::monitor::Answer;
use crate::memory::dirty::LeftToSend;
use crate::transport::uri::Uri;

/// The parameters of a migration. They are known before lanes are open, and stay constant.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Pages are sent after the switchover.
    pub(crate) postcopy: bool,
    /// Pages are sent before the stop, too.
    pub(crate) rounds: Option<RoundsPlan>,
    /// 0 if one connection serves as all lanes.
    pub(crate) bulk_lanes: u16,
    /// Both sides continue over other lanes when these are lost after the switchover.
    pub(crate) recovers: bool,
    /// Another process can continue the session; None if no process could.
    pub(crate) kept: Option<Kept>,
    /// The memory of both sides is compared at the end.
    pub(crate) is_checked: bool,
    /// umem is a part of another program, which has its own way to end the migration.
    pub(crate) is_embedded: bool,
    /// The guest's memory.
    pub(crate) total_bytes: u64,
    /// How long a step of the destination may last without progress.
    pub(crate) step_timeout: Duration,
    /// Seeds the jitter of the pauses between attempts.
    pub(crate) seed: u64,
}

/// The limits of the rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RoundsPlan {
    /// The most passes.
    pub(crate) passes_max: u32,
    /// The passes end once the rest can be sent within this time while the guest stands still.
    pub(crate) downtime_limit: Duration,
    /// The passes end after this time, counted from the destination's *ready*.
    pub(crate) timeout: Option<Duration>,
}

/// The session file, as commands name it.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub(crate) session: String,
    /// ` --session-dir …`, if the command needs the option.
    pub(crate) directory_option: String,
}

impl Kept {
    /// The command with which another process continues the session.
    pub(crate) fn command(&self) -> String {
        format!("umem migrate --resume {}{}", self.session, self.directory_option)
    }
}

/// The record of a guest that may have been given away.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Left {
    /// The highest epoch of any attempt to open lanes.
    pub(crate) epoch: u32,
    /// The destination's last report.
    pub(crate) heard: Heard,
    pub(crate) stopped: Instant,
    pub(crate) switched: Instant,
}

/// An event that the core handles.
#[derive(Debug)]
pub(crate) enum Input {
    /// All lanes are open, and no frame has been sent.
    Begin,
    /// Continues the session of another process.
    TakeOver,
    /// Time has passed.
    Time,
    /// A frame has arrived on the demand lane.
    Received(umem_wire::Event),
    /// The device state has been handed to the kernel.
    StateLeft,
    /// A bulk lane has sent all the pages that it found.
    BulkEnded,
    /// A bulk lane has sent the dirty pages of its blocks.
    PassEnded,
    /// Answers [`Effect::CountDirty`]: the dirty pages, and the bytes that have been sent in rounds.
    Counted { left: LeftToSend, sent_bytes: u64 },
    /// A thread has failed: a lane is lost, or a worse fault has occurred.
    Failed(Error),
    /// The monitor has answered.
    Monitor(Answer),
    /// The digests of the memory here; None if they are not known.
    Digested(Result<Option<Vec<u64>>>),
    /// An order of `umem control` or of the embedding program.
    Order(Order),
    /// An order: end the passes and stop the guest.
    EndPasses,
    /// An order: the driver has received connections, and opens lanes on them.
    Given,
    /// A signal asks umem to end.
    Interrupted,
    /// The driver can wait for nothing any more.
    Abandoned(Error),
    /// An effect has failed, or the driver has a bug.
    NotDone(Error),
    /// No cancellation has arrived, and none is possible any more: answers [`Effect::Commit`].
    Committed,
    /// All messages of the lanes' threads have been handed in: answers [`Effect::TakeDown`].
    LanesDown,
    /// Answers [`Effect::Open`].
    Opened(Opened),
    /// Answers [`Effect::Call`].
    Called(Called),
}

/// The result of an attempt to open lanes.
#[derive(Debug)]
pub(crate) enum Opened {
    /// The lanes are open. The destination has reported its pages, and the sides agree on them.
    Lanes(Standing),
    /// Another attempt may succeed.
    NotNow(Error),
    /// The sides disagree on the pages that have arrived, or the guest has ended: the migration cannot continue.
    Never(Error),
}

/// An action for the driver.
#[derive(Debug)]
pub(crate) enum Effect {
    /// Write this record, before any effect that follows.
    Persist(Record),
    /// Remove the record: no takeover is needed any more.
    Forget,
    /// Pass the point after which a cancellation is too late. Answered by [`Input::Committed`].
    Commit,
    /// Ask the monitor. [`Input::Monitor`] answers after any time, or never.
    Ask(Question),
    /// Start the protocol: send the region table.
    SendRegions,
    /// Take the destination's landing units.
    Land(RegionTable),
    /// The guest stands still: its files no longer change, and its pages may be sent.
    Fix,
    Send(Frame),
    /// Send the device state and its end; [`Input::StateLeft`] follows once it has left.
    SendState(Vec<u8>),
    /// Send the switchover: the guest then belongs to the destination.
    Switchover,
    /// Report that no more pages come, with the totals sent.
    Goodbye(Goodbye),
    Ping(u64),
    /// Have the bulk lanes send the dirty pages once. Each lane reports the end with [`Input::PassEnded`].
    SendPass,
    /// Have the bulk lanes end the pass after their current blocks. Each lane reports the end with
    /// [`Input::PassEnded`].
    CutPass,
    /// Count the dirty pages. Answered by [`Input::Counted`].
    CountDirty,
    /// The guest stands still. From here on each page is sent at most once, and the dirty pages remain to be sent. Send
    /// that on all lanes.
    EndRounds,
    /// Have the bulk lanes send the pages that no demand has asked for.
    SendBulk,
    /// Free the pages that the destination has, from now on.
    StartRelease,
    EndRelease,
    /// Read all memory. Answered by [`Input::Digested`] later.
    Digest,
    /// Check that the guest's files are unchanged. Compare them with checksums if the checksums of both sides are
    /// known.
    CheckFiles {
        are_compared: bool,
    },
    /// End the threads of the lanes, hand in their last messages, then [`Input::LanesDown`].
    TakeDown,
    /// Open all lanes once, and receive the destination's pages. Answered by [`Input::Opened`]. An order or an
    /// interrupt ends the attempt early.
    Open {
        way: Way,
        epoch: u32,
    },
    /// Close the lanes that were opened.
    HangUp,
    /// Serve the lanes that were opened.
    Serve,
    /// End all threads. After a failure its reason is the last frame on the lanes.
    EndThreads(Option<Fault>),
    /// Dial once to send this message. Answered by [`Input::Called`].
    Call {
        uri: Uri,
        epoch: u32,
        until: Instant,
        word: Word,
    },
    /// Free the guest's memory here, if the options ask for that.
    FreeRest,
    /// Keep cores awake while the guest stands still, or stop doing so.
    StayAwake,
    Relax,
    /// The current activity, for the display.
    Show(&'static str),
    Tell(Event),
    /// The guest continues here, and its monitor has not confirmed for this reason that its settings are restored. If
    /// they were changed, the record stays: report the command that restores them. Without a record nothing was
    /// changed, because the monitor module writes one first.
    ReportUnrestored {
        reason: String,
    },
}

impl crate::control::Effect for Effect {
    fn has_answer(&self) -> bool {
        match self {
            Effect::CountDirty
            | Effect::Commit
            | Effect::TakeDown
            | Effect::Open { .. }
            | Effect::Call { .. } => true,
            Effect::Persist(_)
            | Effect::Forget
            | Effect::Ask(_)
            | Effect::SendRegions
            | Effect::Land(_)
            | Effect::Fix
            | Effect::Send(_)
            | Effect::SendState(_)
            | Effect::Switchover
            | Effect::Goodbye(_)
            | Effect::Ping(_)
            | Effect::SendPass
            | Effect::CutPass
            | Effect::EndRounds
            | Effect::SendBulk
            | Effect::StartRelease
            | Effect::EndRelease
            | Effect::Digest
            | Effect::CheckFiles { .. }
            | Effect::HangUp
            | Effect::Serve
            | Effect::EndThreads(_)
            | Effect::FreeRest
            | Effect::StayAwake
            | Effect::Relax
            | Effect::Show(_)
            | Effect::Tell(_)
            | Effect::ReportUnrestored { .. } => false,
        }
    }
}

/// A record for another process. The monitor module writes the settings to undo itself, before it stops the guest.
#[derive(Clone, Debug)]
pub(crate) enum Record {
    /// A switchover may be sent from now on.
    Committed { background: bool, times: Times },
    /// No switchover was sent, and none will be.
    Stopped,
    /// The pages here are not needed any more.
    Completed,
    /// The epoch of the next attempt, and its address.
    Epoch { epoch: u32, uri: Option<Uri> },
    /// The destination's last report, for the user.
    Heard(Heard),
    /// A RAM file has failed: the next `--resume` means that the user has restored it.
    FileFailed,
}

impl Record {
    /// Whether a failed write of the record prevents the effects that follow. Without one of the other records another
    /// process does redundant work: it asks both sides, is refused for a while, or repeats a message.
    pub(crate) fn is_vital(&self) -> bool {
        matches!(self, Record::Committed { .. })
    }
}

/// The form of the goodbye.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goodbye {
    /// For a destination that ends when it receives the goodbye.
    Said,
    /// Followed by a ping, which the destination answers after it has written the goodbye to its record.
    Asked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Question {
    /// Track the guest's writes.
    Track,
    /// Whether all pages that the guest has written so far are marked dirty.
    Look,
    Stop,
    Save,
    /// Whether the guest stands still, and no other client could resume it.
    StandsStill,
    PutBack,
    Resume,
}

/// The means of opening lanes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Dial(Uri),
    /// On connections that the driver holds.
    Given,
}

/// The destination's last report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Heard {
    /// The guest runs there.
    pub(crate) is_running: bool,
    /// Bytes of its memory that have arrived there.
    pub(crate) bytes: u64,
}

/// The times of the migration's steps.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times {
    pub(crate) stopped: Option<Instant>,
    /// When the switchover was sent, the last time.
    pub(crate) switched: Option<Instant>,
    pub(crate) running: Option<Instant>,
    pub(crate) first_page: Option<Instant>,
    pub(crate) completed: Option<Instant>,
}

impl Times {
    /// For how long the guest had stood still when the switchover was sent, µs: what the switchover says.
    pub(crate) fn stopped_us(&self) -> u64 {
        self.stopped.zip(self.switched).map_or(0, |(stopped, switched)| {
            let stood = switched.saturating_duration_since(stopped);
            u64::try_from(stood.as_micros()).unwrap_or(u64::MAX)
        })
    }

    /// From the last instruction at the source to the first one at the destination: both sides have the same number.
    pub(crate) fn downtime(&self) -> Duration {
        match (self.stopped, self.running) {
            (Some(stopped), Some(running)) => running.saturating_duration_since(stopped),
            _ => Duration::ZERO,
        }
    }
}

/// The end of the migration.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The destination has everything.
    Completed(Totals),
    Failed {
        error: Error,
        guest: Guest,
    },
}

/// The owner and the state of the guest after a failure.
#[derive(Debug)]
pub(crate) enum Guest {
    /// It runs here, as before.
    Here,
    /// It stands still here: its monitor did not resume it.
    Stopped(Error),
    /// It stands still here, or continues later: its monitor has not answered.
    Asked,
    /// It may run at the destination, which may need the pages here.
    Away,
    /// It has all of its memory at the destination.
    Complete,
}
