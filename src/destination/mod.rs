//! The destination: `umem incoming`, umemd in the RFC.
//!
//! The control thread prepares the guest, accepts the lanes, carries out the decisions of
//! [`control::destination`](crate::control::destination) and reports; it blocks on nothing but its inbox. The threads
//! of [`lanes`] move the pages into [`memory`]; a thread of its own waits for the monitor.

mod admission;
mod driving;
pub(crate) mod embedded;
mod ending;
pub(crate) mod faults;
pub(crate) mod landing;
pub(crate) mod lanes;
mod link;
pub(crate) mod memory;
pub(crate) mod session;
mod side;
mod starting;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::PollFlags;
use umem_ring::Waker;
use umem_wire::{Event, Fault, Receiver, RegionTable};

use crate::control::destination::{Core, Outcome};
use crate::error::{Error, Result};
use crate::events as control;
use crate::host::arriving::{Expected, NO_GUEST};
use crate::host::command::RamPath;
use crate::host::kind::MonitorSocket;
use crate::host::monitor::{Answer, NoMonitor};
use crate::host::switchover::Switchover;
use crate::host::thread::HostThread;
use crate::memory::check_pages;
use crate::memory::kind::Kind;
use crate::observe::output::Output;
use crate::observe::progress::Progress;
use crate::observe::watch::{LinkOrder, Watch};
use crate::observe::{self, Observer};
use crate::runtime::cores::Cores;
use crate::runtime::idle::{Awake, IdleCores};
use crate::runtime::inbox::Inbox;
use crate::runtime::role::Role;
use crate::runtime::worker::Failure;
use crate::session::{DestinationRecord, SessionFile};
use crate::statistics::Completed;
use crate::transport::lane::{self, Lane, Listener};
use crate::transport::secure::{Security, ServerAuth};
use crate::transport::single::{self, SharedConnection};
use crate::transport::uri::Uri;

use self::admission::accept::{AdmissionPolicy, Entrance, Lanes};
use self::admission::prepare::{self, Adopted, Prepared};
use self::faults::latency::Latencies;
use self::faults::serving::Servers;
use self::lanes::demand::{Command, RequestsFrom};
use self::session::farewell::CompletionNotifier;
use self::session::keeping::Persistence;
use link::Link;
use memory::GuestMemory;
use memory::touch::Toucher;

/// The options of `umem incoming`.
#[derive(Clone, Debug)]
pub struct Options {
    /// The address to listen on.
    pub uri: Uri,
    /// The guest's RAM files; empty to read them from a QEMU's command line.
    pub ram: Vec<RamPath>,
    /// How the guest maps its memory, unless its process reports that.
    pub kind: Kind,
    /// Private memory: touch and release pages as they arrive, not at the end.
    pub touch: bool,
    /// The socket where a process that umem does not start with the preload object hands over its memory.
    pub handoff: Option<PathBuf>,
    /// The monitor's socket, if the monitor has one of its own.
    pub monitor: Option<MonitorSocket>,
    /// The address where QEMU listens for its migration; None to give QEMU a socket of umem's.
    pub connect: Option<PathBuf>,
    /// The side that starts the guest here.
    pub switchover: Switchover,
    /// The most bulk lanes that a source may open; none if the URI is a single connection.
    pub lanes_max: u16,
    /// Refuse a source without checksums.
    pub checksum: bool,
    /// Accept a guest whose memory seems not to fit.
    pub overcommit: bool,
    /// How lanes are secured.
    pub security: Security,
    /// The longest time that a step of the source may take before the switchover without progress.
    pub step_timeout: Duration,
    /// Cores for the demand lane and the bulk lanes, in this order; empty to choose.
    pub cores: Vec<usize>,
    /// The depth of idle states while faults arrive.
    pub idle_cores: IdleCores,
    /// A preload object to use instead of the built-in one.
    pub preload: Option<PathBuf>,
    /// The directory for the session file, which a takeover needs; None for the default.
    pub session_dir: Option<PathBuf>,
    /// JSON events on stdout.
    pub json: bool,
    /// What this process exposes to observers.
    pub observe: observe::Options,
    /// The monitor to start, with its arguments; empty for a monitor that connects to the hand-over socket.
    pub command: Vec<String>,
}

pub use self::session::takeover::run as resume;
pub use crate::session::ResumeOptions;

/// Messages to the control thread.
pub(crate) enum InboxMessage {
    /// A control frame on the demand lane.
    Received(Event),
    /// The last page is cached.
    AllCached,
    /// Private memory: the last page is mapped in the guest's process.
    AllReleased,
    /// A bulk lane has ended with its end frame.
    BulkEnded,
    /// The pages that a bulk lane brought in rounds are in place; from now on each page arrives once there.
    RoundsEnded,
    /// A worker failed.
    Failed(Error),
    /// The monitor has answered.
    Host(Answer),
    /// The demand thread has released a lost lane: no operation of it is in flight.
    Quiet,
    /// All messages of the threads that served lost lanes have been read.
    Settled,
    /// Order of `umem control`: give up the lanes, and accept none until a resume.
    Pause,
    /// Order of `umem control`: accept lanes again, at another address if one is named.
    Resume(Option<Uri>),
    /// The address of resume order number `order` has been looked up.
    Found { order: u64, uri: Uri, found: io::Result<Vec<SocketAddr>> },
    /// Order of `umem control`: accept lanes here.
    Listen(Listener),
    /// Order of `umem control`: take lanes on these connections.
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

/// Receives one guest. Returns when the guest is complete and a started command has exited; the value is the process's
/// exit status.
///
/// # Errors
/// Any reason that kept the guest from arriving. Before the switchover an error leaves nothing behind.
pub fn run(options: &Options) -> Result<i32> {
    // First, before descriptors are opened.
    let single = match single::is_listening(&options.uri) {
        true => None,
        false => SharedConnection::open(&options.uri)?,
    };
    let (socket, mut command) = single.map_or((None, None), |s| (Some(s.socket), s.command));
    let inbox = Inbox::new()?;
    let output = Output::new(options.json);
    // Answers until the guest's process has ended.
    let observer = Observer::start(&options.observe, Role::Destination, None, &output)?;
    // Files may be FIFOs; opening one waits for a writer.
    let security = options.security.clone();
    let loaded = inbox.wait_for_work(NO_GUEST, None, move || ServerAuth::load(&security));
    let (guard, received) = match loaded.map(Arc::new) {
        Ok(guard) => {
            let received = receive(options, socket, &guard, &inbox, &observer);
            let received = received.map_err(|error| guard.explain(error));
            (Some(guard), received)
        }
        Err(error) => (None, Err(error)),
    };
    let received = received.map_err(|error| match &mut command {
        Some(command) => command.explain(error),
        None => error,
    });
    observer.ended(received.as_ref().map(|received| &received.report));
    let Received { mut prepared, report, farewell } = received?;
    output.completed(&report);
    let damaged = report.check_digests().err();
    if let Some(error) = &damaged {
        output.tell(&control::Event::Damaged { error: error.to_string() });
    }
    let status = match farewell {
        Some(farewell) if prepared.side.is_outlived() => {
            farewell.stay(&mut prepared.side, &inbox, &output)
        }
        _ => {
            // Progress of the lanes is printed first.
            drop(guard);
            drop(command);
            prepared.side.outlive(&inbox, &output)
        }
    }?;
    // The guest has kept running; the error reports the failure in any case.
    damaged.map_or(Ok(status), Err)
}

/// A complete guest.
struct Received {
    /// The process that it runs in.
    prepared: Prepared,
    report: Completed,
    /// For a source that missed the completion.
    farewell: Option<CompletionNotifier>,
}

/// Receives the guest.
fn receive(
    options: &Options,
    socket: Option<OwnedFd>,
    guard: &Arc<ServerAuth>,
    inbox: &Inbox<InboxMessage>,
    observer: &Observer,
) -> Result<Received> {
    let output = Output::new(options.json);
    let entrance = match socket {
        Some(socket) => Entrance::Connection(socket),
        None => Entrance::Listener(Listener::bind_waiting(&options.uri, &|fds, limit| {
            wait(inbox, fds, limit)
        })?),
    };
    let uri = entrance.uri(&options.uri);
    let open = guard.check_open(&entrance.way_in(), &uri)?;
    if let Some(open) = open {
        output.remark(&open);
    }
    let uri = uri.to_string();
    check_pages()?;
    let expected = Expected::new(prepare::wanted(options))?;
    let announce = |guest_pid| {
        let handoff = options.handoff.as_ref().map(|path| path.display().to_string());
        output.tell(&control::Event::Listening { uri: uri.clone(), guest_pid, handoff });
    };
    let is_to_come = expected.is_to_come();
    if is_to_come {
        announce(None);
    }
    let mut prepared = Prepared::new(options, expected.arrive(inbox)?)?;
    if !is_to_come {
        announce(prepared.side.pid());
    }
    let (lanes_max, checksum) = (options.lanes_max, options.checksum);
    let is_external = options.switchover == Switchover::External;
    let terms = AdmissionPolicy { lanes_max, recovers: true, checksum, is_external };
    let lanes = entrance.accept(guard, terms, &output, inbox, &prepared)?;
    output.tell(&control::Event::Connected {
        to: None,
        lanes: lanes.hello.bulk_lanes,
        security: guard.describe(),
        checksum: lanes.demand.is_checked(),
    });
    let (receiver, adopted) = crate::destination::admission::accept::compare(
        &lanes.demand,
        inbox,
        &mut prepared,
        options.step_timeout,
    )?;
    let keeping = crate::destination::session::keeping::keep(
        options, &uri, &lanes, &prepared, &adopted, &output,
    )
    .inspect_err(|error| lane::tell(&lanes.demand.socket(), lanes.demand.is_checked(), error))?;
    let runs_itself = prepared.monitor.is_none();
    let monitor = prepared.monitor.take().unwrap_or_else(|| Box::new(NoMonitor));
    let host = HostThread::start(monitor, inbox.post())?;
    let plan = Plan {
        touch: options.touch,
        cores: &options.cores,
        idle_cores: options.idle_cores,
        watch: &observer.watch,
        quiet: options.observe.quiet,
        step_timeout: options.step_timeout,
    };
    let open = Open { lanes, guard: guard.clone(), receiver, adopted, keeping, runs_itself };
    let migration = Migration::start(&plan, output, inbox, open, host, &mut prepared.side)?;
    let (report, farewell) = migration.drive(&mut prepared.side)?;
    Ok(Received { prepared, report, farewell })
}

/// Waits before a guest's process exists.
fn wait(
    inbox: &Inbox<InboxMessage>,
    fds: &[(BorrowedFd<'_>, PollFlags)],
    limit: Option<Duration>,
) -> Result<bool> {
    inbox.wait_ready(fds, limit, NO_GUEST)
}

fn peer(fault: Fault) -> Error {
    Error::Peer { side: "source", code: fault.code, text: fault.text }
}

/// The options of a reception.
struct Plan<'a> {
    /// As in [`Options`].
    touch: bool,
    cores: &'a [usize],
    idle_cores: IdleCores,
    watch: &'a Arc<Watch>,
    quiet: bool,
    step_timeout: Duration,
}

/// The lanes, and the parameters negotiated on them.
struct Open {
    lanes: Lanes,
    /// The credentials that replacement lanes must present.
    guard: Arc<ServerAuth>,
    receiver: Receiver,
    adopted: Adopted,
    /// For a takeover after this process was killed.
    keeping: Option<Persistence>,
    /// See [`SessionPolicy::runs_itself`](crate::control::destination::SessionPolicy::runs_itself).
    runs_itself: bool,
}

/// The initial state of the demand thread.
struct Serving {
    core: Core,
    link: Link,
    keeper: Option<SessionFile<DestinationRecord>>,
    /// None if a previous process has lost the lane.
    lane: Option<(Lane, Receiver)>,
    requests_from: RequestsFrom,
    /// The source requested acknowledgements of pages.
    acks: bool,
    lane_count: usize,
    landing: RegionTable,
}

/// A migration with its lanes open: the core that decides, and the objects that carry out its decisions.
struct Migration<'a> {
    core: Core,
    /// Set when the migration has ended.
    outcome: Option<Outcome>,
    output: Output,
    inbox: &'a Inbox<InboxMessage>,
    guest: Arc<GuestMemory>,
    host: HostThread,
    link: Link,
    threads: Threads,
    /// The session record for a takeover.
    keeper: Option<SessionFile<DestinationRecord>>,
    landing: RegionTable,
    /// The source requested checksums.
    is_checked: bool,
    /// This process has summed every page.
    digests_are_known: bool,
    /// The digests of the source's memory, once received.
    source_digests: Option<Vec<u64>>,
    lane_count: u16,
    /// Bulk lanes whose rounds are over.
    rounds_ended: u16,
    congestion: String,
    idle_cores: IdleCores,
    /// Keeps cores awake while the guest stands still.
    awake: Option<Awake>,
    progress: Progress,
    /// Latencies of faults, once the threads have ended.
    latencies: Latencies,
}

/// The threads, and the means to reach them.
struct Threads {
    cores: Cores,
    servers: Servers,
    commands: Sender<Command>,
    demand: Waker,
    /// The wake-up of the last demand lane's thread.
    demand_socket: Option<Arc<OwnedFd>>,
    demand_thread: Option<JoinHandle<Option<Latencies>>>,
    bulk_wakers: Vec<Waker>,
    bulk_threads: Vec<JoinHandle<Option<()>>>,
    /// The fault threads of a guest in shards.
    fault_wakers: Vec<Waker>,
    fault_threads: Vec<JoinHandle<Option<Latencies>>>,
    /// The touch thread of private memory.
    toucher: Option<Toucher>,
    touch_thread: Option<JoinHandle<Option<()>>>,
}

impl Threads {
    /// Sends an order to the demand thread. If that thread has ended, its own message carries the reason.
    fn command(&self, command: Command) {
        let _ = self.commands.send(command);
        self.demand.wake();
    }
}

/// An encoded frame.
fn encoded(frame: &umem_wire::Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    umem_wire::transmit::encode(frame, &mut bytes);
    bytes
}
