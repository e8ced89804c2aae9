//! What a migration tells those who look on, as values. JSON and sentences are made of them at the edge
//! ([`words`]), and a program that embeds umem takes them as they are.

pub(crate) mod words;

use std::time::Duration;

use crate::transport::uri::Uri;

/// The phase in which there are no lanes, after the switchover: the guest runs on with what it has.
pub(crate) const CUT: &str = "without connection";

/// Something that has happened on the way.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event {
    /// The destination waits for its source, and for a guest where one is to come to `handoff`.
    Listening { uri: String, guest_pid: Option<u32>, handoff: Option<String> },
    /// The destination waits for its source to come back, or to come to another process.
    ListeningAgain { uri: String },
    /// All lanes are open; at the source with the address that was dialled.
    Connected { to: Option<Uri>, lanes: u16, security: &'static str, checksum: bool },
    /// A pass over the running guest's memory has ended.
    Pass {
        pass: u32,
        took: Duration,
        /// Bytes of page contents that it has sent.
        sent_bytes: u64,
        /// Bytes that are to be sent (again).
        dirty_bytes: u64,
        /// Bytes a second that the guest wrote in the last whole pass, each page once.
        dirty_bytes_per_s: Option<u64>,
        /// How long the rest takes at the rate of the fastest pass, where the guest waits for it.
        expected_downtime: Option<Duration>,
        /// It was cut short, so that the rest has pages that it has not sent.
        is_cut: bool,
    },
    /// The guest has stopped here, in a session of this number if one is kept.
    Stopped { postcopy: bool, session: Option<String> },
    /// The source has stopped its guest.
    StoppedAtSource { postcopy: bool },
    /// The guest runs at the destination, and stood still for so long.
    Running { place: Place, downtime: Duration },
    /// Another process can go on with this command, from now on.
    Resumable { session: String, command: String },
    /// Lanes were lost, and are opened again.
    Recovering { reason: String, route: Route },
    /// Lanes were lost, and nobody opens them before an order.
    Paused { reason: String, pause: Pause },
    /// An attempt to open lanes has failed; another one follows.
    Retrying { reason: String },
    /// There are lanes again.
    Resumed { place: Place, disconnected: Duration, recoveries: u32 },
    /// The destination lacks memory for the guest's pages.
    Short { reason: String, room: Room },
    /// Bytes have changed on their way.
    ChecksumError { reason: String, errors: u64 },
    /// Nobody listens where the destination was.
    Unanswered(Unanswered),
    /// The guest goes on at the source, as this lane was lost like this, and the destination may have loaded it: it
    /// is told.
    Telling { uri: Uri, lane: String, reason: String },
    /// The destination could not be told that the guest goes on at the source.
    Untold { uri: Uri, reason: String },
    /// A session that was taken over has ended at once.
    Undone { session: String, how: Undone },
    /// A person has ended the session, and what the destination may need is left in these files.
    Abandoned { session: String, ram: Vec<String> },
    /// Pages were thrown away, as the guest's memory was unmapped while they came.
    Unmapped { bytes: u64 },
    /// The digests of both sides differ.
    Damaged { error: String },
    /// After a failure: the guest's process stays and waits for a umem that takes over.
    Stays { session: Option<String>, is_loaded_only: bool, command: String },
    /// The guest's process has been sent SIGTERM; `halted` is what keeps it from acting on it.
    Stopping { guest_pid: u32, is_halted: bool },
    /// The guest's process has been told to let go of its userfaultfds, and has not said that it has.
    Releasing { guest_pid: u32, is_stopped: bool, why: String },
    /// Umem ends before the guest's process, which is complete.
    Left { guest_pid: u32 },
    /// Something for a person alone.
    Remark(Remark),
}

/// The side that tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Source,
    Destination,
}

/// How lanes are opened again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// The source dials this address.
    Dials(Uri),
    /// Over connections that the embedding program has given.
    Given,
    /// The destination waits for the source, and misses so many pages.
    Waits { pages_missing: u64 },
}

/// Who has nothing to open lanes with before an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pause {
    Source,
    /// With the pages that it misses.
    Destination {
        pages_missing: u64,
    },
    /// The destination, by an order that came while there were no lanes.
    Ordered,
    /// The destination, as a connection that was given is of no use.
    GivenInVain,
}

/// What is known of the room at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// To the source, nothing.
    Elsewhere,
    /// Bytes that are still to come, and bytes free in the file system that has least.
    Here { missing: u64, free: Option<u64> },
}

/// What a source knows of a destination where nobody listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unanswered {
    pub(crate) uri: Uri,
    pub(crate) session: String,
    /// ` --session-dir …`, where a command needs that.
    pub(crate) directory_option: String,
    /// The guest ran there when it was heard of last.
    pub(crate) is_running: bool,
    /// Bytes of its memory that it had then, and all of them.
    pub(crate) heard_bytes: u64,
    pub(crate) total_bytes: u64,
}

/// How a session that was taken over has ended at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Undone {
    /// At the source: no switchover had left, and the guest goes on there.
    GoesOn,
    /// The same, and the monitor knows nothing of the session.
    NothingLeft,
    /// At the source: the destination has everything, and whether it could be told so.
    Parted { is_told: bool },
    /// At the destination: both sides know that the guest is complete.
    Complete,
    /// At the destination: the guest is complete, and whether the source has heard of it.
    Heard { is_told: bool },
}

/// What a person is told, and no program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Remark {
    /// The source's monitor has not answered yet whether its guest goes on.
    AwaitsMonitor,
    /// The destination denies the switchover, and the source's monitor has not answered whether it may leave again;
    /// whether another interrupt ends the waiting.
    AwaitsStandstill { can_leave: bool },
    /// The digests of both sides are not compared.
    NotCompared { reason: String },
    /// The source's guest must not run again.
    QuitMonitor,
    /// Memory was to be freed at the source.
    NotFreed { reason: String },
    /// The source's monitor could not be left as it was.
    NotPutBack { reason: String },
    /// The guest goes on at the source, which may have been changed to track its writes.
    NotTidied { reason: String, command: String },
    /// After an interrupt: pages that nobody has asked for are sent now.
    SendsTheRest,
    /// After an interrupt: the destination needs so many bytes more.
    StillNeeded { bytes: u64 },
    /// A pause by hand has no effect before the switchover, or where the other side cannot resume.
    NotPaused { place: Place },
    /// A resume by hand names something that cannot be dialled.
    NoAddress { uri: Uri },
    /// After an interrupt without lanes: what another one would leave.
    InterruptAgain { missing: Missing },
    /// Too many connections were lost to wrong checksums.
    Distrusted { losses: u32 },
    /// A umem that takes over waits for the monitor of a guest that stands still.
    StandsStill,
    /// The destination's session could not be written down, and it goes on.
    NotWritten { reason: String },
    /// A resume by hand is not carried out.
    NotResumed { reason: String },
    /// After an interrupt: a destination that could run the guest does not know whose it is.
    SourceMayGiveUp,
    /// After an interrupt: the guest runs here, and needs so many pages more.
    PagesNeeded { pages: u64 },
    /// After an interrupt: the guest is to run here, and its monitor has not answered. It goes on until the pages
    /// have come, or another interrupt ends the waiting.
    AwaitsCont { pages: u64, goes_on: bool },
    /// After an interrupt of a destination without lanes: what another one would mean.
    InterruptAgainHere { lost: Lost },
    /// The source has not heard that its guest is complete.
    SourceUnaware { session: String, command: String },
    /// A umem that takes over a guest which is complete waits for the source, to tell it so.
    AwaitsSource,
    /// The source has come, and has been told that its guest is complete.
    SourceTold,
    /// The guest has ended, and the source has not been told; why it could not be, if it came.
    SourceNotToldOfEnd { reason: Option<String> },
    /// The address of a umem that was killed cannot be listened at yet.
    AddressInUse { uri: Uri },
    /// The destination of a session that was undone could not be told.
    DestinationNotTold { uri: Uri, reason: String },
}

/// What a destination lacks that cannot be reached, as far as its source knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// Every page has been sent; whether all have come is not known.
    PerhapsNothing,
    /// Pages that are only at the source.
    Pages,
}

/// What cannot be known or had at a destination without lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// Whose the guest is.
    Owner,
    /// Its pages.
    Pages,
}

/// What a source waits for whose destination has not had the switchover.
pub(crate) const AWAITS_STANDSTILL: &str = "the destination has not had the switchover, and the monitor here has not \
    answered whether the guest still stands still: it runs on neither side until the monitor does";

/// What a destination waits for whose monitor has not answered.
pub(crate) fn awaits_cont(pages_missing: u64) -> String {
    format!(
        "the source has given the guest to this side, and the monitor here has not answered `cont` yet; \
         {pages_missing} pages are still to come"
    )
}

impl Event {
    /// The event's name in JSON; none for what a person alone is told.
    pub(crate) fn name(&self) -> Option<&'static str> {
        Some(match self {
            Event::Listening { .. } | Event::ListeningAgain { .. } => "listening",
            Event::Connected { .. } => "connected",
            Event::Pass { .. } => "pass",
            Event::Stopped { .. } | Event::StoppedAtSource { .. } => "stopped",
            Event::Running { .. } => "running",
            Event::Resumable { .. } => "resumable",
            Event::Recovering { .. } => "recovering",
            Event::Paused { .. } => "paused",
            Event::Retrying { .. } => "retrying",
            Event::Resumed { .. } => "resumed",
            Event::Short { .. } => "short",
            Event::ChecksumError { .. } => "checksum_error",
            Event::Unanswered(_) => "unanswered",
            Event::Telling { .. } => "telling",
            Event::Untold { .. } => "untold",
            Event::Undone { .. } => "undone",
            Event::Abandoned { .. } => "abandoned",
            Event::Unmapped { .. } => "unmapped",
            Event::Damaged { .. } => "damaged",
            Event::Stays { .. } => "stays",
            Event::Stopping { .. } => "stopping",
            Event::Releasing { .. } => "releasing",
            Event::Left { .. } => "left",
            Event::Remark(_) => return None,
        })
    }
}
