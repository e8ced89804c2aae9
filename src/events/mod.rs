//! Events of a migration, as values. [`words`] turns them into JSON and sentences; a program that embeds umem takes the
//! values.

pub(crate) mod words;

use std::path::PathBuf;
use std::time::Duration;

use crate::transport::uri::Uri;

/// The phase after the switchover in which there are no lanes: the guest runs on with the pages that it has.
pub(crate) const CUT: &str = "without connection";

/// One event of a migration.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Event {
    /// The destination waits for its source, and also for a guest if one is to connect to `handoff`.
    Listening { uri: String, guest_pid: Option<u32>, handoff: Option<String> },
    /// The source waits until another program has QEMU migrate to its socket.
    AwaitsQemu { path: PathBuf },
    /// The destination waits for its source to reconnect, here or after a takeover of the source.
    ListeningAgain { uri: String },
    /// All lanes are open. `to` is the address that the source dialled; None at the destination.
    Connected { to: Option<Uri>, lanes: u16, security: &'static str, checksum: bool },
    /// A pass over the running guest's memory has ended.
    Pass {
        pass: u32,
        took: Duration,
        /// Bytes of page contents that the pass has sent.
        sent_bytes: u64,
        /// Bytes that remain to be sent.
        dirty_bytes: u64,
        /// Of these, bytes of pages that the guest writes all the while, which a further pass leaves out.
        hot_bytes: u64,
        /// Bytes a second that the guest wrote in the last whole pass, each page once.
        dirty_bytes_per_s: Option<u64>,
        /// How long the rest takes at the rate of the fastest pass, if the guest waits for the rest.
        expected_downtime: Option<Duration>,
        /// Whether the pass was cut short: the rest then includes pages that no pass has sent.
        is_cut: bool,
    },
    /// The destination's source has stopped its guest. `session` is the session's number if one is kept.
    Stopped { postcopy: bool, session: Option<String> },
    /// The source has stopped its guest.
    StoppedAtSource { postcopy: bool },
    /// The guest runs at the destination. It stood still for `downtime`.
    Running { place: Place, downtime: Duration },
    /// The guest may run at the destination, which stood still for `downtime` by then: the program that manages both
    /// monitors lets it run.
    LeftToManager { place: Place, downtime: Duration },
    /// From now on another process can take over with this command.
    Resumable { session: String, command: String },
    /// Lanes were lost and are being opened again.
    Recovering { reason: String, route: Route },
    /// Lanes were lost. They are opened again only by an order.
    Paused { reason: String, pause: Pause },
    /// An attempt to open lanes has failed; another attempt follows.
    Retrying { reason: String },
    /// All lanes are open again.
    Resumed { place: Place, disconnected: Duration, recoveries: u32 },
    /// The destination lacks memory for the guest's pages.
    Short { reason: String, room: Room },
    /// Bytes changed in transit.
    ChecksumError { reason: String, errors: u64 },
    /// No process listens at the destination's address.
    Unanswered(Unanswered),
    /// The guest continues at the source, because `lane` was lost for this reason. The destination may have loaded the
    /// guest and is being notified.
    Telling { uri: Uri, lane: String, reason: String },
    /// The destination could not be notified that the guest continues at the source.
    Untold { uri: Uri, reason: String },
    /// A session that was taken over ended at once.
    Undone { session: String, how: Undone },
    /// A user has abandoned the session. These files may hold pages that the destination needs.
    Abandoned { session: String, ram: Vec<String> },
    /// Pages were discarded, because the guest's memory was unmapped while they arrived.
    Unmapped { bytes: u64 },
    /// The digests of both sides differ.
    Damaged { error: String },
    /// After a failure: the guest's process stays and waits for a takeover.
    Stays { session: Option<String>, is_loaded_only: bool, command: String },
    /// The guest's process has been sent SIGTERM. `is_halted`: the process is stopped and acts on SIGTERM once it
    /// continues.
    Stopping { guest_pid: u32, is_halted: bool },
    /// The guest's process was asked to close its userfaultfds and has not confirmed.
    Releasing { guest_pid: u32, is_stopped: bool, why: String },
    /// Umem exits before the guest's process, which is complete.
    Left { guest_pid: u32 },
    /// A remark for a user; JSON omits it.
    Remark(Remark),
}

/// The side that reports the event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Source,
    Destination,
}

/// How lanes are opened again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// The source dials this address again.
    Dials(Uri),
    /// The embedding program has given connections.
    Given,
    /// The destination waits for the source.
    Waits { pages_missing: u64 },
}

/// The side that needs an order to open lanes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pause {
    Source,
    /// The destination, with the number of pages that it misses.
    Destination {
        pages_missing: u64,
    },
    /// The destination, because an order to pause arrived while there were no lanes.
    Ordered,
    /// The destination, because a connection that was given is unusable.
    GivenInVain,
}

/// This side's knowledge of the free memory at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// Nothing: this side is the source.
    Elsewhere,
    /// `missing`: bytes that have not arrived. `free`: bytes free in the file system that has the least.
    Here { missing: u64, free: Option<u64> },
}

/// A source's knowledge of a destination at whose address no process listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unanswered {
    pub(crate) uri: Uri,
    pub(crate) session: String,
    /// ` --session-dir …` if the command needs the option.
    pub(crate) directory_option: String,
    /// The guest ran there, by the destination's last report.
    pub(crate) is_running: bool,
    /// Bytes of the guest's memory that the last report listed, and their total.
    pub(crate) heard_bytes: u64,
    pub(crate) total_bytes: u64,
}

/// How a session that was taken over ended at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Undone {
    /// At the source: no switchover had been sent, and the guest continues there.
    GoesOn,
    /// As `GoesOn`, and the monitor holds no state of the session.
    NothingLeft,
    /// At the source: the destination has every page. `is_told`: the destination received the goodbye.
    Parted { is_told: bool },
    /// At the destination: both sides know that the guest is complete.
    Complete,
    /// At the destination: the guest is complete. `is_told`: the source received the completion.
    Heard { is_told: bool },
}

/// A remark for a user that has no JSON form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Remark {
    /// The source's monitor has not confirmed that its guest runs again.
    AwaitsMonitor,
    /// The destination reports that it received no switchover, and the source's monitor has not confirmed that the
    /// guest still stands still. `can_leave`: another interrupt ends the wait.
    AwaitsStandstill { can_leave: bool },
    /// The digests of both sides are not compared.
    NotCompared { reason: String },
    /// The source's guest must not run again.
    QuitMonitor,
    /// Memory was to be freed at the source and was not.
    NotFreed { reason: String },
    /// The source's monitor could not be restored to its settings.
    NotPutBack { reason: String },
    /// The guest continues at the source, whose monitor may still have settings for tracking writes.
    NotTidied { reason: String, command: String },
    /// After an interrupt: pages without a demand are sent now.
    SendsTheRest,
    /// After an interrupt: the destination needs `bytes` more.
    StillNeeded { bytes: u64 },
    /// A manual pause has no effect before the switchover, or if the other side cannot resume.
    NotPaused { place: Place },
    /// A manual resume names an address that cannot be dialled.
    NoAddress { uri: Uri },
    /// After an interrupt without lanes: what another interrupt would leave behind.
    InterruptAgain { missing: Missing },
    /// Too many connections failed checksum verification.
    Distrusted { losses: u32 },
    /// A takeover waits for the monitor of a guest that stands still.
    StandsStill,
    /// The destination's session file could not be written; the migration continues.
    NotWritten { reason: String },
    /// A manual resume is not carried out.
    NotResumed { reason: String },
    /// After an interrupt: a destination that is ready to run the guest does not know which side owns it.
    SourceMayGiveUp,
    /// After an interrupt: the guest runs here and misses `pages`.
    PagesNeeded { pages: u64 },
    /// After an interrupt: the guest is to run here, and its monitor has not answered. `goes_on`: umem waits until the
    /// pages have arrived; otherwise another interrupt ends the wait.
    AwaitsCont { pages: u64, goes_on: bool },
    /// After an interrupt of a destination without lanes: what another interrupt would mean.
    InterruptAgainHere { lost: Lost },
    /// The source has not learned that its guest is complete.
    SourceUnaware { session: String, command: String },
    /// A takeover of a complete guest waits for the source, to send it the completion.
    AwaitsSource,
    /// The source has connected and received the completion.
    SourceTold,
    /// The guest has ended, and the source was not notified. `reason` is set if the source connected.
    SourceNotToldOfEnd { reason: Option<String> },
    /// The address of a killed umem is still in use.
    AddressInUse { uri: Uri },
    /// The destination of a session that was undone could not be notified.
    DestinationNotTold { uri: Uri, reason: String },
}

/// The data that the destination cannot obtain, as far as its source knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// Every page has been sent; whether all have arrived is unknown.
    PerhapsNothing,
    /// Pages that exist only at the source.
    Pages,
}

/// The information or data that a destination without lanes cannot obtain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// The guest's owner.
    Owner,
    /// Its pages.
    Pages,
}

/// The wait of a source whose destination has not received the switchover.
pub(crate) const AWAITS_STANDSTILL: &str = "the destination has not received the switchover, and the monitor here has not \
    confirmed that the guest still stands still: the guest runs on neither side until the monitor answers";

/// The wait of a destination whose monitor has not answered.
pub(crate) fn awaits_cont(pages_missing: u64) -> String {
    format!(
        "the source has given the guest to this side, and the monitor here has not answered `cont` yet; \
         {pages_missing} pages have not arrived"
    )
}

impl Event {
    /// The same with an external switchover: umem has no guest run.
    pub(crate) fn left_to_manager(self) -> Event {
        match self {
            Event::Running { place, downtime } => Event::LeftToManager { place, downtime },
            other => other,
        }
    }

    /// The event's name in JSON; None for a remark.
    pub(crate) fn name(&self) -> Option<&'static str> {
        Some(match self {
            Event::Listening { .. } | Event::ListeningAgain { .. } | Event::AwaitsQemu { .. } => {
                "listening"
            }
            Event::Connected { .. } => "connected",
            Event::Pass { .. } => "pass",
            Event::Stopped { .. } | Event::StoppedAtSource { .. } => "stopped",
            Event::Running { .. } => "running",
            Event::LeftToManager { .. } => "left_to_manager",
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
