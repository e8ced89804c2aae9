//! What the destination's core and its driver exchange: the parameters, inputs, effects with their records, and the
//! outcome.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use umem_wire::destination::Mode;
use umem_wire::{Event as Heard, Fault, Frame, LaneRole, RegionTable, Standing, Totals};

use crate::control::Order;
use crate::error::Error;
use crate::events::Event;
use crate::session::DestinationState;
use crate::transport::uri::Uri;

/// The parameters of a migration, constant from its beginning.
#[derive(Clone, Debug)]
pub(crate) struct SessionPolicy {
    /// Both sides continue over other lanes when these are lost after *loaded*.
    pub(crate) recovers: bool,
    /// Whether there are bulk lanes. Without them an answer on the demand lane waits behind pages.
    pub(crate) has_bulk_lanes: bool,
    /// Incoming data is verified by checksums.
    pub(crate) is_checked: bool,
    /// The guest's memory is private: a page counts as arrived when it is the guest's own ([`Input::AllReleased`]).
    pub(crate) is_private: bool,
    /// No monitor holds the guest: it runs as soon as it has pages. So no page is requested for it before the guest
    /// belongs to this side.
    pub(crate) runs_itself: bool,
    /// umem is a part of another program, which has its own way to end the migration.
    pub(crate) is_embedded: bool,
    /// The session for a takeover, should this process be killed; None if no process could take over.
    pub(crate) session: Option<Session>,
    /// How long a step of the source may last before *loaded* without progress.
    pub(crate) step_timeout: Duration,
}

/// A session that another process can take over.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    pub(crate) number: String,
    /// ` --session-dir …`, if the command needs the option.
    pub(crate) directory_option: String,
}

impl Session {
    /// The command for the takeover.
    pub(crate) fn command(&self) -> String {
        format!("umem incoming --resume {}{}", self.number, self.directory_option)
    }
}

/// The moment of an input.
pub(crate) type Moment = crate::control::Moment<Memory>;

/// The state of the guest's memory.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    pub(crate) pages_missing: u64,
    pub(crate) bytes_missing: u64,
    pub(crate) pages_done: u64,
    pub(crate) totals: Totals,
}

/// The file system with the least room for the missing pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FreeSpace {
    /// The RAM file.
    pub(crate) ram: String,
    pub(crate) bytes: u64,
}

/// How the guest's process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// With all of its memory, and without a known failure: a guest may shut down.
    Fine,
    /// Any other end. ` (exit status: 1)`, or nothing.
    Failed { how: String },
}

/// The guest's process after a failed migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Process {
    /// It has ended, or is this process.
    Gone,
    /// It ends with umem.
    EndsWithUs,
    /// It stays, and waits for missing pages.
    Stays,
}

/// The entrance for new lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entrance {
    /// The source dials.
    Listener,
    /// Given connections, one for each lane.
    Given,
}

/// An event that the core handles.
#[derive(Debug)]
pub(crate) enum Input {
    /// The regions have been compared, and the threads run: wait for the source.
    Begin(RegionTable),
    /// The threads run for a session that another process served.
    TakeOver,
    /// The source sent this on the demand lane.
    Received(Heard),
    /// Every copy received in rounds has landed, on all lanes.
    RoundsEnded,
    /// [`Effect::SettlePages`] has succeeded.
    PagesSettled,
    /// Every page is cached.
    AllCached,
    /// Private memory: every page is the guest's own.
    AllReleased,
    /// The monitor has loaded the device state. `runs` is true if the guest ran when it was stopped at the source.
    Loaded { runs: bool },
    /// The monitor has started the guest.
    Running,
    /// The monitor or a thread has failed: the migration cannot continue.
    Failed(Error),
    /// An effect has failed, or the driver has a bug.
    NotDone(Error),
    /// A lane is lost.
    LaneLost { lane: LaneRole, error: Error },
    /// Memory or disk space is exhausted for incoming pages.
    NoRoom { error: Error, free: Option<FreeSpace> },
    /// A received page cannot be made visible for lack of memory. The attempt is repeated.
    ShortOfTables { why: String, free: Option<FreeSpace> },
    /// The result of [`Effect::MeasureRoom`]; None if there is enough room, or if the room is unknown.
    Room(Option<FreeSpace>),
    /// The demand thread has released a lost lane: no operation of the lane is in flight.
    Quiet,
    /// All messages of the threads that served lost lanes have been handled.
    Settled,
    /// All lanes of one attempt have been accepted.
    Came,
    /// One of the given connections has closed, or leads to another session.
    GivenInVain,
    /// An order of `umem control` or of the embedding program.
    Order(Order),
    /// The lookup of that order's address has ended.
    Found { order: u64, uri: Uri, found: io::Result<Vec<SocketAddr>> },
    /// [`Effect::Bind`] has bound this address.
    Bound { uri: String },
    /// [`Effect::WriteAddress`] has failed.
    AddressNotWritten(Error),
    /// A resume order cannot be carried out.
    NotResumed(Error),
    /// An order: the source arrives at this entrance, which the driver holds.
    Offered(Entrance),
    /// A signal interrupts, or the embedding program cancels.
    Interrupt,
    /// The guest's process has ended.
    GuestEnded(Exit),
    /// Time has passed.
    Tick,
    /// [`Effect::Commit`] has succeeded: a cancellation is no longer possible.
    Committed,
    /// The record of this state, which is not vital, could not be written.
    NotWritten { state: DestinationState, error: Error },
    /// [`Effect::Hold`] has succeeded: the guest's process waits if umem is killed.
    Held,
    /// [`Effect::TakeUp`] has succeeded: faults are served again.
    TakenUp,
    /// [`Effect::Unregister`] has succeeded. `exit` is the end of the guest's process, if it has ended.
    Unregistered { exit: Option<Exit>, unmapped_bytes: u64 },
    /// The result of [`Effect::SeekCause`].
    Cause { error: Error, process: Process },
    /// [`Effect::EndThreads`] is done.
    ThreadsEnded,
    /// [`Effect::Release`] has succeeded: the guest's process continues without umem.
    Released,
}

/// An action for the driver.
#[derive(Debug)]
pub(crate) enum Effect {
    /// Ask the monitor to prepare.
    Prepare,
    /// Pages received in rounds are final, except the remaining ones.
    SettlePages,
    /// Ask the monitor to load this device state.
    Load(Vec<u8>),
    /// Ask the monitor to start the guest.
    Run,
    /// Request pages from here on, for a guest that [runs itself](SessionPolicy::runs_itself).
    RequestPages,
    /// Keep cores awake while the guest stands still.
    StayAwake,
    /// The guest runs, after this downtime: cores may sleep.
    Sleep { downtime: Duration },
    /// Rule out any later cancellation.
    Commit,
    /// Write this record, before any effect that follows.
    Persist(Record),
    /// Have the guest's process wait if umem is killed. It still ends when umem exits.
    Hold,
    /// Have the guest's process end when umem exits, as before *switched*. It waits if umem is killed.
    Doom,
    /// The guest belongs to this side: have its process stay, whether umem exits or is killed.
    Keep,
    /// Continue the work of an earlier process: touch pages again, and wake waiting threads.
    TakeUp,
    /// Private memory: have the remaining pages touched.
    TouchTheRest,
    /// Have the guest unregister its userfaultfds, and check that the guest still exists.
    Unregister,
    /// The guest is complete: its process no longer needs another process.
    Free,
    /// Compare with these digests of the source's memory.
    Compare(Vec<u64>),
    /// Send this on the demand lane.
    Send(Frame),
    /// Send the completion, with the digests if they are known.
    SendCompletion,
    /// Send a ping on the demand lane.
    Ping(u64),
    /// Close all lanes, and wait for the end of the bulk threads.
    Sever,
    /// Report [`Input::Settled`] behind all messages posted so far.
    Settle,
    /// Landing pages become missing again.
    RollBack,
    /// Continue over the accepted lanes: send the standing first, then the completion.
    Reconnect { standing: Standing, is_complete: bool },
    /// Close the accepted lanes.
    DropLanes,
    /// Look up the address to listen at, and report [`Input::Found`].
    LookUp { order: u64, uri: Uri },
    /// Listen at one of these addresses.
    Bind { uri: Uri, found: Vec<SocketAddr> },
    /// Accept lanes at the last offered or bound entrance.
    Open,
    /// Refuse the last offer.
    Decline,
    /// Close the given connections: they are of no further use.
    ForgetGiven,
    /// From now on the source finds this side at this address: write it to the record.
    WriteAddress(String),
    /// Measure the room, and report it.
    MeasureRoom,
    /// The protocol's phase now has this name.
    Entered(&'static str),
    /// The name of the current activity, for the display.
    Show(&'static str),
    /// Report this event.
    Report(Event),
    /// Ask the monitor and the threads for the cause of this error.
    SeekCause(Error),
    /// End the threads. Pending data is sent first, this fault last. After a failure the wait is short.
    EndThreads { told: Option<Fault>, has_failed: bool },
    /// Tell the guest's process to continue without umem.
    Release,
    /// After a failure: have the guest's process wait for a takeover. A process that cannot receive that order ends.
    LetWait,
    /// After a failure: end the guest's process, unless it is to stay in every case.
    EndGuest,
    /// No takeover is needed any more: remove the record.
    Forget,
    /// The migration has ended with this outcome.
    Finish(Outcome),
}

impl crate::control::Effect for Effect {
    fn has_answer(&self) -> bool {
        match self {
            Effect::SettlePages
            | Effect::Commit
            | Effect::Hold
            | Effect::TakeUp
            | Effect::Unregister
            | Effect::SeekCause(_)
            | Effect::EndThreads { .. }
            | Effect::Release => true,
            Effect::Prepare
            | Effect::Load(_)
            | Effect::Run
            | Effect::RequestPages
            | Effect::StayAwake
            | Effect::Sleep { .. }
            | Effect::Persist(_)
            | Effect::Doom
            | Effect::Keep
            | Effect::TouchTheRest
            | Effect::Free
            | Effect::Compare(_)
            | Effect::Send(_)
            | Effect::SendCompletion
            | Effect::Ping(_)
            | Effect::Sever
            | Effect::Settle
            | Effect::RollBack
            | Effect::Reconnect { .. }
            | Effect::DropLanes
            | Effect::LookUp { .. }
            | Effect::Bind { .. }
            | Effect::Open
            | Effect::Decline
            | Effect::ForgetGiven
            | Effect::WriteAddress(_)
            | Effect::MeasureRoom
            | Effect::Entered(_)
            | Effect::Show(_)
            | Effect::Report(_)
            | Effect::LetWait
            | Effect::EndGuest
            | Effect::Forget
            | Effect::Finish(_) => false,
        }
    }
}

/// A record for a process that takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    Loaded { mode: Mode, runs: bool },
    Switched { stopped_us: u64, at: Instant },
    Running { at: Instant },
    Complete { totals: Totals },
    Parted,
}

impl Record {
    /// Whether a failed write of the record prevents the effects that follow. Once the guest belongs to this side, the
    /// migration continues: the file then has an earlier state, and the source supplies the rest.
    pub(crate) fn is_vital(&self) -> bool {
        matches!(self, Record::Loaded { .. })
    }

    pub(crate) fn state(&self) -> DestinationState {
        match self {
            Record::Loaded { .. } => DestinationState::Loaded,
            Record::Switched { .. } => DestinationState::Switched,
            Record::Running { .. } => DestinationState::Running,
            Record::Complete { .. } => DestinationState::Complete,
            Record::Parted => DestinationState::Parted,
        }
    }
}

/// The times of the migration's steps. The source's stop is computed back from its switchover.
#[derive(Clone, Debug, Default)]
pub(crate) struct Times {
    pub(crate) stopped: Option<Instant>,
    pub(crate) switched: Option<Instant>,
    pub(crate) running: Option<Instant>,
    pub(crate) first_page: Option<Instant>,
    pub(crate) cached: Option<Instant>,
    pub(crate) downtime: Duration,
}

/// The outcome of a migration.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The guest has all of its memory. `unheard` is the standing for a source that has not received the completion.
    Complete {
        unheard: Option<Standing>,
    },
    Failed(Error),
}
