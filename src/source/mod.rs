//! The source: `umem migrate`.
//!
//! The control thread connects while the guest still runs. From then on it carries out what the core decides
//! ([`control::source`](crate::control::source)): compare, stop the guest, send its device state, switch over, and
//! serve its pages until the destination has them all.

mod driving;
pub(crate) mod embedded;
mod ending;
pub(crate) mod lanes;
mod link;
pub(crate) mod memory;
mod passive;
pub(crate) mod sending;
pub(crate) mod session;
mod starting;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::PollFlags;
use umem_ring::{Outcome, Waker};
use umem_wire::{Event, Frame, transmit};

use crate::control::source::{Input, Source, peer};
use crate::error::{Error, Result};
use crate::events as control;
use crate::host::command::RamPath;
use crate::host::kind::{Leaving, LeavingGuest, MonitorSocket};
use crate::host::leaving;
use crate::host::monitor::Answer;
use crate::host::switchover::Switchover;
use crate::host::thread::HostThread;
use crate::observe::output::Output;
use crate::observe::progress::Progress;
use crate::observe::watch::{LinkOrder, Watch};
use crate::observe::{self, Observer};
use crate::runtime::bandwidth::Bandwidth;
use crate::runtime::cores::Cores;
use crate::runtime::idle::{Awake, IdleCores};
use crate::runtime::inbox::Inbox;
use crate::runtime::panics;
use crate::runtime::role::Role;
use crate::runtime::worker::Failure;
use crate::statistics::Completed;
use crate::transport::lane::{Lane, Session};
use crate::transport::secure::{self, ClientAuth, Security};
use crate::transport::single::SharedConnection;
use crate::transport::uri::Uri;

use self::lanes::demand::Command;
use link::Link;
use memory::SourceMemory;

/// The options of `umem migrate`.
#[derive(Clone, Debug)]
pub struct Options {
    /// The destination.
    pub uri: Uri,
    /// Postcopy: switch over first and send the pages after that. Otherwise all pages are sent before.
    pub postcopy: bool,
    /// Send pages without a demand.
    pub background: bool,
    /// Send pages before the guest stops; None to stop it first.
    pub precopy: Option<Precopy>,
    /// The guest's RAM files; empty to ask its monitor.
    pub ram: Vec<RamPath>,
    /// The monitor's socket; None for RAM files alone.
    pub monitor: Option<MonitorSocket>,
    /// The path at which QEMU migrates into umem, on another program's command; None if umem tells QEMU through its
    /// monitor.
    pub listen: Option<PathBuf>,
    /// The program that starts the guest at its destination.
    pub switchover: Switchover,
    /// Bulk lanes, 1 to [`LANES_MAX`](umem_wire::limits::LANES_MAX); 0 if the URI is one connection.
    pub lanes: u16,
    /// Free the guest's RAM here as it arrives at the destination.
    pub release_ram: bool,
    /// Verify all data sent and received, and compare all memory at the end.
    pub checksum: bool,
    /// How lanes are secured.
    pub security: Security,
    /// Cores for the demand lane and the bulk lanes, in this order; empty to choose.
    pub cores: Vec<usize>,
    /// What idle cores do while faults come.
    pub idle_cores: IdleCores,
    /// The order of background pages.
    pub order: Order,
    /// How long a step of the destination may last before the switchover without progress.
    pub step_timeout: Duration,
    /// The highest rate of the background after the switchover, bytes a second.
    pub max_postcopy_bandwidth: Option<u64>,
    /// The directory of session files; None for the default.
    pub session_dir: Option<PathBuf>,
    /// JSON events on stdout.
    pub json: bool,
    /// Options of progress, metrics and control.
    pub observe: observe::Options,
}

/// How pages are sent before the guest stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precopy {
    /// The most passes. The first one covers all of the memory.
    pub passes_max: u32,
    /// The guest is stopped once the rest can be sent within this time.
    pub downtime_limit: Duration,
    /// The passes end after this, and the guest is stopped.
    pub timeout: Option<Duration>,
    /// The highest rate of all lanes together in the passes, bytes a second.
    pub max_bandwidth: Option<u64>,
}

pub use self::session::takeover::{Options as ResumeOptions, run as resume};

/// The order of pages that are sent without a demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Order {
    /// Ahead of guests that read through their memory; otherwise onward from the last demand.
    #[default]
    Adaptive,
    /// In the order of memory, for comparison.
    Plain,
}

impl std::str::FromStr for Order {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Order, String> {
        match text {
            "adaptive" => Ok(Order::Adaptive),
            "plain" => Ok(Order::Plain),
            _ => Err(format!("{text:?} is neither adaptive nor plain")),
        }
    }
}

/// A message to the control thread.
pub(crate) enum InboxMessage {
    /// A control frame on the demand lane.
    Received(Event),
    /// The device state has been handed to the kernel.
    StateLeft,
    /// A bulk lane has sent all the pages that it found.
    BulkEnded,
    /// A bulk lane has sent the dirty pages of its blocks.
    PassEnded,
    /// An order: end the passes.
    EndPasses,
    /// A worker has failed.
    Failed(Error),
    /// The monitor has answered.
    Host(Answer),
    /// The digests of the guest's memory here.
    Digested(Result<Option<Vec<u64>>>),
    /// An order: close the lanes, and open none before a resume.
    Pause,
    /// An order: open lanes again, at another address if one is given.
    Resume(Option<Uri>),
    /// An order: open lanes on these connections, the demand lane's first.
    Reconnect(Vec<OwnedFd>),
}

impl Failure for InboxMessage {
    fn failed(error: Error) -> InboxMessage {
        InboxMessage::Failed(error)
    }

    fn into_failure(self) -> Option<Error> {
        match self {
            InboxMessage::Failed(error) => Some(error),
            InboxMessage::Received(Event::Error(fault)) => Some(peer(fault)),
            _ => None,
        }
    }
}

impl From<LinkOrder> for InboxMessage {
    fn from(order: LinkOrder) -> InboxMessage {
        match order {
            LinkOrder::Pause => InboxMessage::Pause,
            LinkOrder::Resume(uri) => InboxMessage::Resume(uri),
        }
    }
}

impl From<Answer> for InboxMessage {
    fn from(answer: Answer) -> InboxMessage {
        InboxMessage::Host(answer)
    }
}

/// The consequence of an interrupt before the guest is stopped.
const GOES_ON: &str = "the guest continues at the source";

/// Migrates one guest.
///
/// # Errors
/// Every reason for which the guest does not move. Until the switchover the guest runs here as before in that case.
pub fn run(options: &Options) -> Result<()> {
    // Before any other descriptor is opened.
    let single = SharedConnection::open(&options.uri)?;
    let (socket, mut command) = single.map_or((None, None), |s| (Some(s.socket), s.command));
    let output = Output::new(options.json);
    let inbox = Inbox::new()?;
    // Without postcopy the guest stands still meanwhile, and there is no background.
    let bandwidth = Arc::new(Bandwidth::new(options.max_postcopy_bandwidth));
    let limit = options.postcopy.then(|| bandwidth.clone());
    let observer = Observer::start(&options.observe, Role::Source, limit, &output)?;
    // Files may be FIFOs, which wait for their writer.
    let (security, uri) = (options.security.clone(), options.uri.clone());
    let loaded = inbox.wait_for_work(GOES_ON, None, move || ClientAuth::load(&security, &uri));
    let (pass, migrated) = match loaded.map(Arc::new) {
        Ok(pass) => {
            let migrated = migrate(options, socket, &pass, inbox, bandwidth, &observer);
            let migrated = migrated.map_err(|error| pass.explain(error));
            (Some(pass), migrated)
        }
        Err(error) => (None, Err(error)),
    };
    let migrated = migrated.map_err(|error| match &mut command {
        Some(command) => command.explain(error),
        None => error,
    });
    observer.ended(migrated.as_ref());
    let report = migrated?;
    output.completed(&report);
    // Dropping waits until data of the lanes has been sent.
    drop(pass);
    report.check_digests()
}

fn migrate(
    options: &Options,
    socket: Option<OwnedFd>,
    pass: &Arc<ClientAuth>,
    inbox: Inbox<InboxMessage>,
    bandwidth: Arc<Bandwidth>,
    observer: &Observer,
) -> Result<Completed> {
    let output = Output::new(options.json);
    let asked = options.clone();
    let guest = match &options.listen {
        Some(path) => passive::guest(options, path, pass, &inbox, &output)?,
        None => inbox.wait_for_work(GOES_ON, None, move || guest(&asked))?,
    };
    let LeavingGuest { mut monitor, ram, files, staging, remarks } = guest;
    remarks.iter().for_each(|what| output.remark(what));
    let log = match options.precopy {
        Some(_) => Some(monitor.dirty_log().ok_or_else(memory::no_dirty_log)?),
        None => None,
    };
    let memory = SourceMemory::new(files, options.release_ram).limited(bandwidth);
    let memory = memory.in_rounds(options.precopy.is_some()).staged(staging);
    let memory = Arc::new(memory.checked(options.checksum));
    memory.claim(false)?;
    if options.monitor.is_none() && options.listen.is_none() {
        memory.fix(true)?;
    }
    let (lanes, mut link) = dial(options, socket, pass, &inbox)?;
    let record = monitor.handle()?.map(|handle| handle.record);
    link.keeper =
        crate::source::session::takeover::keep(options, &link, (&ram, record), &memory, &output)?;
    if let Some(keeper) = link.keeper.clone() {
        monitor.before_stop(crate::source::session::takeover::note_stop(keeper));
    }
    output.tell(&control::Event::Connected {
        to: Some(options.uri.clone()),
        lanes: options.lanes,
        security: pass.describe(),
        checksum: options.checksum,
    });
    let look = |fds: &[(BorrowedFd<'_>, PollFlags)], limit| wait(&inbox, fds, limit);
    let plan = Plan {
        postcopy: options.postcopy,
        background: options.background,
        precopy: options.precopy,
        has_monitor: options.monitor.is_some(),
        // Behind TLS, lanes end at a pump in this process.
        stays_local: pass.has_tls() || secure::stays_local(&options.uri, &look)?,
        cores: &options.cores,
        idle_cores: options.idle_cores,
        order: options.order,
        step_timeout: options.step_timeout,
        watch: &observer.watch,
        quiet: options.observe.quiet,
    };
    let host = HostThread::tracking(monitor, log, inbox.post())?;
    Migration::start(&plan, output, inbox, (lanes, link), memory, host)?.drive(Input::Begin)
}

/// The guest's monitor, checked, and its RAM.
fn guest(options: &Options) -> Result<LeavingGuest> {
    let wanted = Leaving {
        ram: &options.ram,
        has_rounds: options.precopy.is_some(),
        follows: options.postcopy,
        releases: options.release_ram,
        is_checked: options.checksum,
    };
    leaving::open(options.monitor.as_ref(), &wanted)
}

/// Opens all lanes, the demand lane first. With a given connection it opens that one alone.
fn dial(
    options: &Options,
    socket: Option<OwnedFd>,
    pass: &Arc<ClientAuth>,
    inbox: &Inbox<InboxMessage>,
) -> Result<(Vec<Lane>, Link)> {
    let wait = |fds: &[(BorrowedFd<'_>, PollFlags)], limit| wait(inbox, fds, limit);
    if let Some(socket) = socket {
        let session = Session::new(0, options.release_ram, true)?.checked(options.checksum);
        let lanes = vec![secure::open_shared(socket, &session.hello(0, 0), pass, &wait)?];
        let link = Link::new(session, pass.clone(), None, &lanes);
        return Ok((lanes, link));
    }
    let session = Session::new(options.lanes, options.release_ram, true)?.checked(options.checksum);
    let session = session.in_rounds(options.precopy.is_some());
    let session = session.external(options.switchover == Switchover::External);
    let open = |index| secure::dial(&options.uri, &session.hello(index, 0), pass, &wait);
    let lanes = (0..=options.lanes).map(open).collect::<Result<Vec<_>>>()?;
    let link = Link::new(session, pass.clone(), Some(options.uri.clone()), &lanes);
    Ok((lanes, link))
}

/// Waits for a lane that is being opened.
fn wait(
    inbox: &Inbox<InboxMessage>,
    fds: &[(BorrowedFd<'_>, PollFlags)],
    limit: Option<Duration>,
) -> Result<bool> {
    // No message is posted before there are workers.
    inbox.wait_ready(fds, limit, GOES_ON)
}

/// The reason why a send or a receive failed.
fn outcome_text(outcome: Outcome) -> String {
    match outcome {
        Outcome::Done(_) | Outcome::Short { .. } => "the destination closed it".into(),
        Outcome::Failed(errno) => errno.to_string(),
        other => format!("{other:?}"),
    }
}

fn errno_of(outcome: &Outcome) -> Option<i32> {
    match outcome {
        Outcome::Failed(errno) => Some(errno.raw()),
        _ => None,
    }
}

/// The parameters of sending.
struct Plan<'a> {
    /// As in [`Options`].
    postcopy: bool,
    background: bool,
    precopy: Option<Precopy>,
    cores: &'a [usize],
    idle_cores: IdleCores,
    order: Order,
    watch: &'a Arc<Watch>,
    quiet: bool,
    /// Another client could resume the guest.
    has_monitor: bool,
    /// The lanes do not leave this machine.
    stays_local: bool,
    /// As in [`Options`].
    step_timeout: Duration,
}

/// The demand lane's thread and connection.
struct DemandHandle {
    commands: Sender<Command>,
    waker: Waker,
    socket: Arc<OwnedFd>,
}

/// A bulk lane's thread.
struct BulkHandle {
    orders: Sender<crate::source::lanes::bulk::Order>,
    waker: Waker,
}

impl BulkHandle {
    fn order(&self, order: crate::source::lanes::bulk::Order) {
        // Sending fails only if the thread has ended.
        let _ = self.orders.send(order);
        self.waker.wake();
    }
}

/// A migration with open lanes: its core, and the means to carry out the core's effects.
struct Migration {
    core: Source,
    /// Answers to the last effect, which the core handles before any other input.
    answers: VecDeque<Input>,
    lane_count: u16,
    output: Output,
    inbox: Inbox<InboxMessage>,
    memory: Arc<SourceMemory>,
    host: HostThread,
    has_monitor: bool,
    link: Link,
    /// The `follows` field of each new thread of the demand lane.
    follows: bool,
    idle_cores: IdleCores,
    /// Keeps cores awake while the guest stands still.
    awake: Option<Awake>,
    adapts: bool,
    cores: Cores,
    zero_copy: bool,
    /// None before the first demand lane.
    demand: Option<DemandHandle>,
    demand_thread: Option<JoinHandle<Option<()>>>,
    /// Bulk lanes that are not sending yet.
    idle: Vec<Lane>,
    bulk: Vec<BulkHandle>,
    bulk_threads: Vec<JoinHandle<Option<()>>>,
    release_thread: Option<JoinHandle<Option<()>>>,
    /// Bytes that the RAM files held at the switchover, if they are freed. Below it, the bytes of these freed at the
    /// end.
    allocated_bytes: u64,
    release_bytes: u64,
    congestion: String,
    progress: Progress,
}

impl Migration {
    /// Carries out the core's effects until its end. `first` is its first input.
    fn drive(mut self, first: Input) -> Result<Completed> {
        let caught = panics::caught(|| {
            self.handle(first);
            self.until_ended();
            Ok(())
        });
        if let Err(panic) = caught {
            // A panic ends the migration as any other failure does.
            self.handle(Input::NotDone(panic));
            self.until_ended();
        }
        self.outcome()
    }

    fn bytes_done(&self) -> u64 {
        let counters = &self.memory.counters;
        counters.data_bytes.load(Relaxed)
            + counters.zero_bytes.load(Relaxed)
            + counters.hole_bytes.load(Relaxed)
    }

    fn send(&self, frame: &Frame) {
        let mut bytes = Vec::new();
        transmit::encode(frame, &mut bytes);
        self.send_bytes(bytes);
    }

    fn send_bytes(&self, bytes: Vec<u8>) {
        self.command(Command::Send(bytes));
    }

    fn command(&self, command: Command) {
        let Some(demand) = &self.demand else { return };
        // Sending fails only if the thread has ended. Its own message then has the reason.
        let _ = demand.commands.send(command);
        demand.waker.wake();
    }
}
