//! The destination: `umem incoming`, the RFC's umemd.
//!
//! The control thread here prepares the guest, accepts the lanes, carries out what
//! [`control::destination`](crate::control::destination) decides and reports; it never blocks on anything but its
//! inbox. The pages are moved by the threads of [`lanes`] into [`memory`], and the monitor is waited for by
//! a thread of its own.

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
use crate::host::command::RamPath;
use crate::host::thread::{Answer, HostThread};
use crate::host::{DestinationHost, RunsItself};
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

use self::admission::accept::{Entrance, Lanes, Terms};
use self::admission::prepare::{Adopted, Expected, Prepared};
use self::faults::latency::Latencies;
use self::faults::serving::Servers;
use self::lanes::demand::{Command, RequestsFrom};
use self::session::farewell::CompletionNotifier;
use self::session::keeping::Persistence;
use link::Link;
use memory::GuestMemory;
use memory::touch::Toucher;

/// What `umem incoming` is asked to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen.
    pub uri: Uri,
    /// The guest's RAM files; empty to read them from a QEMU's command line.
    pub ram: Vec<RamPath>,
    /// How the guest maps its memory, where it does not say so itself.
    pub kind: Kind,
    /// Private memory: have pages touched and released as they come, not at the end.
    pub touch: bool,
    /// Where a process that is not started with the preload object hands over its memory.
    pub handoff: Option<PathBuf>,
    /// The monitor's QMP socket, where it has one of its own.
    pub qmp: Option<PathBuf>,
    /// The most bulk lanes that a source may open; where the URI is one connection there are none.
    pub lanes_max: u16,
    /// Take no guest that comes without checksums.
    pub checksum: bool,
    /// Take a guest for whose memory there seems to be no room.
    pub overcommit: bool,
    /// How lanes are secured.
    pub security: Security,
    /// The most that a step of the source's may take before the switchover while nothing moves.
    pub step_timeout: Duration,
    /// Cores for the demand lane and the bulk lanes, in this order; empty to choose.
    pub cores: Vec<usize>,
    /// What idle cores do while faults come.
    pub idle_cores: IdleCores,
    /// The preload object to use in place of the built-in one.
    pub preload: Option<PathBuf>,
    /// Where to leave what another process needs to go on; none for the usual place.
    pub session_dir: Option<PathBuf>,
    /// JSON events on stdout.
    pub json: bool,
    /// What others may see.
    pub observe: observe::Options,
    /// The monitor to start, with its arguments; empty for one that comes to the hand-over socket.
    pub command: Vec<String>,
}

pub use self::session::takeover::run as resume;
pub use crate::session::ResumeOptions;

/// What reaches the control thread.
pub(crate) enum Note {
    /// A control frame on the demand lane.
    Received(Event),
    /// The last page is cached.
    AllCached,
    /// Private memory: the last page is the guest's own.
    AllReleased,
    /// A bulk lane has ended in order.
    BulkEnded,
    /// What came on a bulk lane in rounds is in place, and each page comes once there from now on.
    RoundsEnded,
    /// A worker could not go on.
    Failed(Error),
    /// The monitor has answered.
    Host(Answer),
    /// The demand thread has let go of a lost lane: nothing of it is in flight.
    Quiet,
    /// All notes of those who have served lost lanes have been read.
    Settled,
    /// By hand: give up the lanes, and take none until a resume.
    Pause,
    /// By hand: take lanes again, at another address if one is named.
    Resume(Option<Uri>),
    /// The address of resume number `order` by hand has been looked up.
    Found { order: u64, uri: Uri, found: io::Result<Vec<SocketAddr>> },
    /// By hand: take lanes here.
    Listen(Listener),
    /// By hand: take lanes on these connections.
    Reconnect(Vec<OwnedFd>),
}

impl Failure for Note {
    fn failed(error: Error) -> Note {
        Note::Failed(error)
    }

    fn into_failure(self) -> Option<Error> {
        match self {
            Note::Failed(error) => Some(error),
            Note::Received(Event::Error(fault)) => Some(peer(fault)),
            _ => None,
        }
    }
}

impl From<LinkOrder> for Note {
    fn from(order: LinkOrder) -> Note {
        match order {
            LinkOrder::Pause => Note::Pause,
            LinkOrder::Resume(uri) => Note::Resume(uri),
        }
    }
}

impl From<Answer> for Note {
    fn from(answer: Answer) -> Note {
        Note::Host(answer)
    }
}

/// What an interrupt means before a source has come.
const NO_GUEST: &str = "no guest had arrived";

/// Receives one guest. Returns when it is complete and, where a command was started, has exited;
/// the value is the process's exit status.
///
/// # Errors
/// Anything that kept the guest from arriving; until the switchover nothing is left behind then.
pub fn run(options: &Options) -> Result<i32> {
    // Before anything else makes descriptors.
    let single = match single::is_listening(&options.uri) {
        true => None,
        false => SharedConnection::open(&options.uri)?,
    };
    let (socket, mut command) = single.map_or((None, None), |s| (Some(s.socket), s.command));
    let inbox = Inbox::new()?;
    let output = Output::new(options.json);
    // Answers until the guest's process has ended.
    let observer = Observer::start(&options.observe, Role::Destination, None, &output)?;
    // Files may be FIFOs, which wait for who writes to them.
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
            // What lanes have sent leaves first.
            drop(guard);
            drop(command);
            prepared.side.outlive(&inbox, &output)
        }
    }?;
    // The guest has run with what it has all the while; whoever started this is to know in any case.
    damaged.map_or(Ok(status), Err)
}

/// A guest that is complete.
struct Received {
    /// What it runs in.
    prepared: Prepared,
    report: Completed,
    /// For a source that has not heard of it.
    farewell: Option<CompletionNotifier>,
}

/// Receives it.
fn receive(
    options: &Options,
    socket: Option<OwnedFd>,
    guard: &Arc<ServerAuth>,
    inbox: &Inbox<Note>,
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
    let expected = Expected::new(options)?;
    let announce = |guest_pid| {
        let handoff = options.handoff.as_ref().map(|path| path.display().to_string());
        output.tell(&control::Event::Listening { uri: uri.clone(), guest_pid, handoff });
    };
    let is_to_come = expected.is_to_come();
    if is_to_come {
        announce(None);
    }
    let mut prepared = expected.prepare(inbox)?;
    if !is_to_come {
        announce(prepared.side.pid());
    }
    let (lanes_max, checksum) = (options.lanes_max, options.checksum);
    let terms = Terms { lanes_max, recovers: true, checksum };
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
    let runs_itself = prepared.host.is_none();
    let host = prepared.host.take().unwrap_or_else(|| Box::new(RunsItself));
    let host = HostThread::<dyn DestinationHost>::start(host, inbox.post())?;
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

/// Waits before there is a guest to look after.
fn wait(
    inbox: &Inbox<Note>,
    fds: &[(BorrowedFd<'_>, PollFlags)],
    limit: Option<Duration>,
) -> Result<bool> {
    inbox.wait_ready(fds, limit, NO_GUEST)
}

fn peer(fault: Fault) -> Error {
    Error::Peer { side: "source", code: fault.code, text: fault.text }
}

/// How to receive.
struct Plan<'a> {
    /// As in [`Options`].
    touch: bool,
    cores: &'a [usize],
    idle_cores: IdleCores,
    watch: &'a Arc<Watch>,
    quiet: bool,
    step_timeout: Duration,
}

/// The lanes, and what has been agreed on them.
struct Open {
    lanes: Lanes,
    /// What those who replace them have to show.
    guard: Arc<ServerAuth>,
    receiver: Receiver,
    adopted: Adopted,
    /// For the case that this process is killed.
    keeping: Option<Persistence>,
    /// See [`Terms::runs_itself`](crate::control::destination::Terms::runs_itself).
    runs_itself: bool,
}

/// What the demand thread begins with.
struct Serving {
    core: Core,
    link: Link,
    keeper: Option<SessionFile<DestinationRecord>>,
    /// None where a process before this has lost it.
    lane: Option<(Lane, Receiver)>,
    requests_from: RequestsFrom,
    /// The source wants to hear which pages have come.
    acks: bool,
    lane_count: usize,
    landing: RegionTable,
}

/// A migration with its lanes open: the core that decides, and what its decisions are carried out with.
struct Migration<'a> {
    core: Core,
    /// Once it has ended.
    outcome: Option<Outcome>,
    output: Output,
    inbox: &'a Inbox<Note>,
    guest: Arc<GuestMemory>,
    host: HostThread<dyn DestinationHost>,
    link: Link,
    threads: Threads,
    /// Where another process finds what it needs to go on, should this one be killed.
    keeper: Option<SessionFile<DestinationRecord>>,
    landing: RegionTable,
    /// What comes is checked.
    is_checked: bool,
    /// Every page has been summed by this process.
    digests_are_known: bool,
    /// What the source's memory comes to, once it has said so.
    source_digests: Option<Vec<u64>>,
    lane_count: u16,
    /// Bulk lanes whose rounds are over.
    rounds_ended: u16,
    congestion: String,
    idle_cores: IdleCores,
    /// Keeps cores awake while the guest stands still.
    awake: Option<Awake>,
    progress: Progress,
    /// What faults took, once the threads have ended.
    latencies: Latencies,
}

/// The threads, and how they are reached.
struct Threads {
    cores: Cores,
    servers: Servers,
    commands: Sender<Command>,
    demand: Waker,
    /// Of the last demand lane.
    demand_socket: Option<Arc<OwnedFd>>,
    demand_thread: Option<JoinHandle<Option<Latencies>>>,
    bulk_wakers: Vec<Waker>,
    bulk_threads: Vec<JoinHandle<Option<()>>>,
    /// Of a guest in shards.
    fault_wakers: Vec<Waker>,
    fault_threads: Vec<JoinHandle<Option<Latencies>>>,
    /// Of private memory.
    toucher: Option<Toucher>,
    touch_thread: Option<JoinHandle<Option<()>>>,
}

impl Threads {
    /// Tells the demand thread. Where it has ended its own note says why.
    fn command(&self, command: Command) {
        let _ = self.commands.send(command);
        self.demand.wake();
    }
}

/// A frame as it is sent.
fn encoded(frame: &umem_wire::Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    umem_wire::transmit::encode(frame, &mut bytes);
    bytes
}
