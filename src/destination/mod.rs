//! The destination: `umem incoming`, the RFC's umemd.
//!
//! The control thread here prepares the guest, accepts the lanes, walks through the phases of
//! [`umem_wire::destination`] and reports; it never blocks on anything but its inbox. The pages are
//! moved by the threads of [`demand`] and [`bulk`] into [`guest`], and the monitor is waited for by
//! a thread of its own.

mod accept;
pub(crate) mod acks;
pub(crate) mod bulk;
pub(crate) mod demand;
pub(crate) mod embedded;
mod farewell;
pub(crate) mod faults;
pub(crate) mod guest;
mod latency;
mod prepare;
pub(crate) mod reader;
mod recovery;
mod side;
pub(crate) mod takeover;
mod touch;
mod window;

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use serde_json::json;
use umem_ring::Waker;
use umem_wire::destination::{Input, Mode, Phase};
use umem_wire::{Event, Fault, Frame, Receiver, RegionTable, transmit};

use crate::cores::Cores;
use crate::error::{Context, Error, Result};
use crate::host::command::RamPath;
use crate::host::qemu::Qemu;
use crate::host::thread::{Answer, HostThread};
use crate::host::{DestinationHost, RunsItself};
use crate::idle::{self, Awake, IdleCores};
use crate::inbox::{Inbox, Wake};
use crate::lane::{self, Lane, Listener};
use crate::memory::kind::Kind;
use crate::memory::sums::RegionDigest;
use crate::observe::watch::{LinkOrder, Role, Watch};
use crate::observe::{self, Observer};
use crate::progress::Progress;
use crate::report::{Completed, CpuTime, Output};
use crate::secure::{Guard, Security};
use crate::session::{DestinationRecord, Keeper};
use crate::single::{self, Single};
use crate::uri::Uri;
use crate::worker::{self, Failure};

use accept::{Entrance, Lanes, Terms};
use acks::Acks;
use bulk::BulkLane;
use demand::{Command, DemandLane, Reach};
use farewell::Farewell;
use faults::{FaultThread, Servers};
use guest::GuestMemory;
use latency::Latencies;
use prepare::{Adopted, Expected, Prepared};
use recovery::Link;
use side::GuestSide;
use takeover::Keeping;
use touch::{TouchThread, Toucher};

/// Threads that serve the faults of a guest in shards, each with its own ring.
const FAULT_THREADS_MAX: usize = 16;

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
    /// How lanes are secured.
    pub security: Security,
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

pub use crate::session::ResumeOptions;
pub use takeover::run as resume;

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

/// Receives one guest. Returns when it is complete and, where a command was started, has exited;
/// the value is the process's exit status.
///
/// # Errors
/// Anything that kept the guest from arriving; until the switchover nothing is left behind then.
pub fn run(options: &Options) -> Result<i32> {
    // Before anything else makes descriptors.
    let single = match single::is_listening(&options.uri) {
        true => None,
        false => Single::open(&options.uri)?,
    };
    let (socket, mut command) = single.map_or((None, None), |s| (Some(s.socket), s.command));
    let inbox = Inbox::new()?;
    let output = Output::new(options.json);
    // Answers until the guest's process has ended.
    let observer = Observer::start(&options.observe, Role::Destination, None, &output)?;
    let (guard, received) = match Guard::load(&options.security).map(Arc::new) {
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
        let fields = json!({ "error": error.to_string() });
        output.event("damaged", fields, &error.to_string());
    }
    let status = match farewell {
        Some(farewell) if prepared.side.is_outlived() => {
            farewell.stay(&mut prepared.side, &inbox, &output)
        }
        _ => {
            // What lanes have sent leaves first.
            drop(guard);
            drop(command);
            prepared.side.outlive(&inbox)
        }
    }?;
    // Of a guest that goes on without us there is none.
    let status = status.map_or(0, |status| status.code().unwrap_or(1));
    // The guest has run with what it has all the while; whoever started this is to know in any case.
    damaged.map_or(Ok(status), Err)
}

/// A guest that is complete.
struct Received {
    /// What it runs in.
    prepared: Prepared,
    report: Completed,
    /// For a source that has not heard of it.
    farewell: Option<Farewell>,
}

/// Receives it.
fn receive(
    options: &Options,
    socket: Option<OwnedFd>,
    guard: &Arc<Guard>,
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
        let text = match &handoff {
            Some(path) => format!("waiting for a guest on {path} and a source on {uri}"),
            None => format!("waiting for a source on {uri}"),
        };
        let listening = json!({ "uri": uri, "guest_pid": guest_pid, "handoff": handoff });
        output.event("listening", listening, &text);
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
    output.event(
        "connected",
        json!({
            "lanes": lanes.bulk.len(),
            "security": guard.describe(),
            "checksum": lanes.demand.is_checked(),
        }),
        &format!("connected, {} bulk lane(s)", lanes.bulk.len()),
    );
    let (receiver, adopted) = accept::compare(&lanes.demand, inbox, &mut prepared)?;
    let keeping = takeover::keep(options, &uri, &lanes, &prepared, &adopted, &output).inspect_err(
        |error| lane::tell(&lanes.demand.socket(), lanes.demand.is_checked(), error),
    )?;
    let host = prepared.host.take().unwrap_or_else(|| Box::new(RunsItself));
    let host = HostThread::<dyn DestinationHost>::start(host, inbox.post())?;
    let plan = Plan {
        touch: options.touch,
        cores: &options.cores,
        idle_cores: options.idle_cores,
        watch: &observer.watch,
        quiet: options.observe.quiet,
    };
    let open = Open { lanes, guard: guard.clone(), receiver, adopted, keeping };
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
    match inbox.wait_for(fds, limit)? {
        Wake::Signal => Err(Error::Interrupted("no guest had arrived".into())),
        Wake::Timeout => Ok(false),
        Wake::Ready(_) | Wake::Message(_) => Ok(true),
    }
}

fn peer(fault: Fault) -> Error {
    Error::Peer { side: "source", code: fault.code, text: fault.text }
}

/// When what happened; the source's stop is dated back from its switchover.
#[derive(Default)]
struct Times {
    stopped: Option<Instant>,
    switched: Option<Instant>,
    running: Option<Instant>,
    first_page: Option<Instant>,
    cached: Option<Instant>,
    downtime: Duration,
}

/// How to receive.
struct Plan<'a> {
    /// As in [`Options`].
    touch: bool,
    cores: &'a [usize],
    idle_cores: IdleCores,
    watch: &'a Arc<Watch>,
    quiet: bool,
}

/// The lanes, and what has been agreed on them.
struct Open {
    lanes: Lanes,
    /// What those who replace them have to show.
    guard: Arc<Guard>,
    receiver: Receiver,
    adopted: Adopted,
    /// For the case that this process is killed.
    keeping: Option<Keeping>,
}

/// What the demand thread begins with.
struct Serving {
    link: Link,
    /// None where a process before this has lost it.
    lane: Option<(Lane, Receiver)>,
    /// The source wants to hear which pages have come.
    acks: bool,
    lane_count: usize,
    landing: RegionTable,
}

/// A migration with its lanes open: the control thread's state.
struct Migration<'a> {
    output: Output,
    inbox: &'a Inbox<Note>,
    guest: Arc<GuestMemory>,
    host: HostThread<dyn DestinationHost>,
    phase: Phase,
    link: Link,
    /// Where another process finds what it needs to go on, should this one be killed.
    keeper: Option<Keeper<DestinationRecord>>,
    landing: RegionTable,
    /// What comes is checked.
    is_checked: bool,
    /// Every page has been summed by this process.
    digests_are_known: bool,
    /// What the source's memory comes to, once it has said so.
    source_digests: Option<Vec<u64>>,
    cores: Cores,
    servers: Servers,
    mode: Mode,
    state: Vec<u8>,
    /// The guest ran at the source.
    runs: bool,
    /// The monitor has loaded the device state and the source has not heard of it.
    state_loaded: bool,
    all_cached: bool,
    all_released: bool,
    commands: Sender<Command>,
    demand: Waker,
    /// Of the last demand lane.
    demand_socket: Option<Arc<OwnedFd>>,
    lane_count: u16,
    bulk_wakers: Vec<Waker>,
    demand_thread: Option<JoinHandle<Option<Latencies>>>,
    bulk_threads: Vec<JoinHandle<Option<()>>>,
    /// Of a guest in shards.
    fault_wakers: Vec<Waker>,
    fault_threads: Vec<JoinHandle<Option<Latencies>>>,
    /// Of private memory.
    toucher: Option<Toucher>,
    touch_thread: Option<JoinHandle<Option<()>>>,
    congestion: String,
    idle_cores: IdleCores,
    /// Keeps cores awake while the guest stands still.
    awake: Option<Awake>,
    times: Times,
    progress: Progress,
}

impl<'a> Migration<'a> {
    fn start(
        plan: &Plan<'_>,
        output: Output,
        inbox: &'a Inbox<Note>,
        open: Open,
        host: HostThread<dyn DestinationHost>,
        side: &mut GuestSide,
    ) -> Result<Migration<'a>> {
        let Open { mut lanes, guard, receiver, adopted, keeping } = open;
        let Adopted { regions, sources, landing } = adopted;
        let mut guest = GuestMemory::new(regions, sources);
        let keeper = keeping.map(|keeping| keeping.begin(&mut guest, side)).transpose();
        let is_checked = lanes.demand.is_checked();
        let keeper =
            keeper.inspect_err(|error| lane::tell(&lanes.demand.socket(), is_checked, error))?;
        let congestion = lanes.demand.congestion.clone().unwrap_or_else(|| "none".into());
        let demand_socket = lanes.demand.socket();
        let (link, acks) = (Link::new(&mut lanes, guard), lanes.acks());
        let lane = Some((lanes.demand, receiver));
        let serving =
            Serving { link, lane, acks, lane_count: lanes.bulk.len(), landing: landing.clone() };
        let (mut migration, reach) =
            Migration::begin(plan, output, inbox, Arc::new(guest), serving, host)?;
        migration.keeper = keeper;
        migration.congestion = congestion;
        migration.demand_socket = Some(demand_socket);
        let started = migration
            .start_faults(&reach)
            .and_then(|()| migration.start_toucher(plan.touch, side))
            .and_then(|()| migration.start_bulk(lanes.bulk, acks))
            .and_then(|()| migration.get_ready(landing));
        match started {
            Ok(()) => Ok(migration),
            Err(error) => {
                migration.end(Some(&error));
                Err(error)
            }
        }
    }

    /// Starts the demand thread, and nothing else yet.
    fn begin(
        plan: &Plan<'_>,
        output: Output,
        inbox: &'a Inbox<Note>,
        guest: Arc<GuestMemory>,
        serving: Serving,
        host: HostThread<dyn DestinationHost>,
    ) -> Result<(Migration<'a>, Reach)> {
        let Serving { link, lane, acks, lane_count, landing } = serving;
        let is_checked = link.is_checked();
        let cores = Cores::choose(plan.cores, crate::cores::Role::Destination);
        let (commands, queue) = channel();
        if link.recovers() {
            let post = inbox.post();
            plan.watch.link(move |order| post.send(order.into()));
        }
        let demand = DemandLane {
            lane,
            guest: guest.clone(),
            serves_faults: !guest.is_sharded(),
            core: cores.demand(),
            follows: plan.cores.is_empty(),
            idle_cores: plan.idle_cores,
            has_background: lane_count == 0,
            recovers: link.recovers(),
            acks: Acks::new(acks),
            commands: queue,
            post: inbox.post(),
        };
        let (reach, demand_thread) =
            worker::start("umem-demand", inbox, move |started| demand.run(started))?;
        let (counters, total_bytes) = (&guest.counters, landing.total_bytes());
        let migration = Migration {
            progress: Progress::new(plan.watch, counters, total_bytes, &output, plan.quiet),
            output,
            guest: guest.clone(),
            host,
            phase: Phase::new(),
            link,
            keeper: None,
            cores,
            servers: Servers::new(Vec::new()),
            mode: Mode { postcopy: true, background: true },
            state: Vec::new(),
            runs: true,
            state_loaded: false,
            all_cached: false,
            all_released: !guest.has_private(),
            commands,
            demand: reach.waker.clone(),
            demand_socket: None,
            lane_count: u16::try_from(lane_count).expect("at most 64"),
            bulk_wakers: Vec::new(),
            demand_thread: Some(demand_thread),
            bulk_threads: Vec::new(),
            fault_wakers: Vec::new(),
            fault_threads: Vec::new(),
            toucher: None,
            touch_thread: None,
            congestion: "none".into(),
            idle_cores: plan.idle_cores,
            awake: None,
            times: Times::default(),
            landing,
            is_checked,
            digests_are_known: true,
            source_digests: None,
            inbox,
        };
        Ok((migration, reach))
    }

    fn get_ready(&mut self, landing: RegionTable) -> Result<()> {
        self.host.prepare();
        let ready = Frame::Ready(landing.units());
        self.step(Input::Received(&Event::Regions(landing)))?;
        self.step(Input::GuestReady)?;
        self.send(&ready);
        Ok(())
    }

    /// Starts those who serve the faults of a guest in shards; notes who serves which.
    fn start_faults(&mut self, demand: &Reach) -> Result<()> {
        let sources = self.guest.sources.len();
        if !self.guest.is_sharded() {
            self.servers = Servers::new(vec![demand.mailbox.clone(); sources]);
            return Ok(());
        }
        let threads = sources.min(self.cores.count()).min(FAULT_THREADS_MAX);
        let mut mailboxes = Vec::new();
        for index in 0..threads {
            let thread = FaultThread {
                guest: self.guest.clone(),
                sources: (index..sources).step_by(threads).collect(),
                core: self.cores.any(index),
                demand: demand.mailbox.clone(),
            };
            let name = format!("umem-faults-{}", index + 1);
            let (reach, handle) =
                worker::start(&name, self.inbox, move |started| thread.run(started))?;
            mailboxes.push(reach.mailbox);
            self.fault_wakers.push(reach.waker);
            self.fault_threads.push(handle);
        }
        let of_source = |source: usize| mailboxes[source % threads].clone();
        self.servers = Servers::new((0..sources).map(of_source).collect());
        let _ = self.commands.send(Command::Servers(self.servers.clone()));
        demand.waker.wake();
        Ok(())
    }

    fn start_toucher(&mut self, eager: bool, side: &GuestSide) -> Result<()> {
        if !self.guest.has_private() {
            return Ok(());
        }
        let process = side.process().expect("our own memory is shared or anonymous");
        let socket = process.handoff.stream().try_clone();
        let thread = TouchThread {
            guest: self.guest.clone(),
            socket: socket.context(|| "the hand-over socket")?.into(),
            eager,
            core: self.cores.bulk(0),
            post: self.inbox.post(),
        };
        let (work, ours) = touch::ways();
        let (waker, handle) =
            worker::start("umem-touch", self.inbox, move |started| thread.run(work, started))?;
        let (queue, toucher) = ours.reach(waker, eager);
        self.guest.set_toucher(queue);
        self.toucher = Some(toucher);
        self.touch_thread = Some(handle);
        Ok(())
    }

    fn start_bulk(&mut self, lanes: Vec<Lane>, acks: bool) -> Result<()> {
        for (index, lane) in lanes.into_iter().enumerate() {
            let bulk = BulkLane {
                lane,
                regions: self.landing.clone(),
                acks: Acks::new(acks),
                guest: self.guest.clone(),
                core: self.cores.bulk(index),
                servers: self.servers.clone(),
                ahead: None,
                post: self.inbox.post(),
            };
            let name = format!("umem-bulk-{}", index + 1);
            let (waker, thread) =
                worker::start(&name, self.inbox, move |started| bulk.run(started))?;
            self.bulk_wakers.push(waker);
            self.bulk_threads.push(thread);
        }
        Ok(())
    }

    /// Runs the phases to their end. After an error before the switchover the source is told, so
    /// that its guest goes on there.
    fn drive(mut self, side: &mut GuestSide) -> Result<(Completed, Option<Farewell>)> {
        let driven =
            self.until_completed(side).map_err(|error| worker::first_cause(self.inbox, error));
        self.progress.phase("ending");
        let latencies = self.end(driven.as_ref().err());
        if let Err(error) = driven {
            self.keep_what_can_go_on(side);
            return Err(self.explain(error));
        }
        side.release(self.inbox, &self.output)?;
        let farewell = self.part();
        Ok((self.report(&latencies), farewell))
    }

    fn until_completed(&mut self, side: &mut GuestSide) -> Result<()> {
        let mut guest_ended = false;
        while !matches!(self.phase, Phase::Completed(_)) {
            let watched =
                if guest_ended { Vec::new() } else { side.watched(self.toucher.is_some()) };
            let of_guest = watched.len();
            let fds: Vec<_> = watched
                .into_iter()
                .map(|fd| (fd, PollFlags::POLLIN))
                .chain(self.link.fds())
                .collect();
            let due = self.link.deadline().map(|at| at.saturating_duration_since(Instant::now()));
            let interval = self.progress.interval();
            match self.inbox.wait_for(&fds, Some(due.map_or(interval, |due| due.min(interval))))? {
                Wake::Timeout => {}
                Wake::Signal => self.interrupted()?,
                Wake::Ready(index) if index >= of_guest => self.link.answer(index - of_guest)?,
                Wake::Ready(index) => {
                    guest_ended = side.has_ended(index)?;
                    // A guest that has all of its memory may end before we have heard of it.
                    if guest_ended && self.guest.pages_missing() > 0 {
                        return Err(self.guest_exited(side));
                    }
                }
                Wake::Message(note) => self.note(note, side)?,
            }
            self.look_after_link()?;
            self.progress.update();
        }
        Ok(())
    }

    fn note(&mut self, note: Note, side: &mut GuestSide) -> Result<()> {
        match note {
            Note::Received(event) => self.received(event, side),
            Note::AllCached => {
                self.all_cached = true;
                self.times.cached = Some(Instant::now());
                if let Some(toucher) = &self.toucher {
                    self.progress.phase("touching");
                    toucher.touch_the_rest();
                }
                self.loaded_if_done(side)?;
                self.complete_if_done()
            }
            Note::AllReleased => {
                self.all_released = true;
                self.complete_if_done()
            }
            Note::BulkEnded => Ok(()),
            Note::Failed(error @ Error::Lost { .. }) => self.lane_lost(error),
            Note::Failed(error) => Err(error),
            Note::Quiet => {
                self.quiet();
                Ok(())
            }
            Note::Settled => self.settled(),
            Note::Pause => self.pause(),
            Note::Resume(uri) => self.resume(uri),
            Note::Found { order, uri, found } => self.found(order, &uri, found),
            Note::Listen(listener) => {
                self.listen(listener);
                Ok(())
            }
            Note::Reconnect(sockets) => self.reconnect(sockets),
            Note::Host(Answer::Loaded(result)) => {
                result?;
                self.state_loaded = true;
                self.loaded_if_done(side)
            }
            Note::Host(Answer::Prepared(result)) => result,
            Note::Host(Answer::Running(result)) => {
                result?;
                self.running()
            }
            Note::Host(_) => Ok(()),
        }
    }

    fn received(&mut self, event: Event, side: &mut GuestSide) -> Result<()> {
        if let Event::Error(fault) = event {
            return Err(peer(fault));
        }
        self.step(Input::Received(&event))?;
        match event {
            Event::Stopped { postcopy, background } => {
                self.mode = Mode { postcopy, background };
                self.times.stopped = Some(Instant::now());
                self.times.first_page = self.times.stopped;
                self.progress.phase(if postcopy { "switching" } else { "filling" });
                if postcopy {
                    self.awake = idle::stay_awake(self.idle_cores);
                }
                self.output.event("stopped", json!({ "postcopy": postcopy }), "");
            }
            Event::DeviceState(chunk) => self.state.extend_from_slice(&chunk),
            Event::Load { .. } => {
                self.runs = Qemu::runs_with(&self.state);
                self.awake = self.awake.take().or_else(|| idle::stay_awake(self.idle_cores));
                self.host.load_state(std::mem::take(&mut self.state));
            }
            Event::Switchover { stopped_us } => {
                side.keep()?;
                let now = Instant::now();
                self.times.switched = Some(now);
                self.times.downtime = Duration::from_micros(stopped_us);
                self.times.stopped = now.checked_sub(self.times.downtime).or(Some(now));
                self.keep_switched(stopped_us)?;
                self.host.run();
            }
            Event::Digests(digests) if self.is_checked => self.source_digests = Some(digests),
            Event::Digests(_) => {
                return Err(Error::protocol("demand lane", "digests that nobody asked for"));
            }
            _ => {}
        }
        Ok(())
    }

    fn running(&mut self) -> Result<()> {
        let now = Instant::now();
        self.awake = None;
        let since_switchover = self.times.switched.map_or(Duration::ZERO, |at| now - at);
        self.times.running = Some(now);
        self.times.downtime += since_switchover;
        self.keep_running()?;
        self.step(Input::GuestRunning)?;
        let us_since_switchover = u64::try_from(since_switchover.as_micros()).unwrap_or(u64::MAX);
        self.send(&Frame::Running { us_since_switchover });
        self.progress.watch().running(self.times.downtime);
        let downtime_ms = millis(self.times.downtime);
        self.output.event(
            "running",
            json!({ "downtime_ms": downtime_ms }),
            &format!("the guest runs here; it stood still for {downtime_ms:.1} ms"),
        );
        self.progress.phase("filling");
        self.complete_if_done()
    }

    /// Tells the source that the guest could run here. Without postcopy it could only once every
    /// page is cached: the source has sent them all, but that is not their arrival.
    fn loaded_if_done(&mut self, side: &mut GuestSide) -> Result<()> {
        let enough = self.mode.postcopy || self.all_cached;
        if !self.state_loaded || !enough {
            return Ok(());
        }
        self.state_loaded = false;
        // Once the source has heard this it may give the guest up.
        self.progress.watch().commit("the guest stays at the source")?;
        self.keep_loaded(side)?;
        self.step(Input::StateLoaded)?;
        self.send(&Frame::Loaded);
        self.say_how_to_resume();
        Ok(())
    }

    /// The end: every page is cached and the guest runs. It leaves its userfaultfds at once; the
    /// source hears of it and says goodbye.
    fn complete_if_done(&mut self) -> Result<()> {
        let is_done = self.all_cached && self.all_released;
        if !is_done || !matches!(self.phase, Phase::Running { .. }) {
            return Ok(());
        }
        self.guest.unregister_all()?;
        self.keep_complete();
        self.step(Input::AllCached)?;
        let _ = self.commands.send(Command::Send(self.completion()));
        self.demand.wake();
        Ok(())
    }

    /// What is said once everything is here.
    fn completion(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.is_checked && self.digests_are_known {
            transmit::encode(&Frame::Digests(self.guest.digests.get()), &mut bytes);
        }
        transmit::encode(&Frame::Complete(self.guest.counters.totals()), &mut bytes);
        bytes
    }

    fn interrupted(&mut self) -> Result<()> {
        if let Some(result) = self.interrupted_without_lanes() {
            return result;
        }
        if !self.phase.outlives_its_lanes() {
            return Err(Error::Interrupted("the guest stays at the source".into()));
        }
        if !self.phase.may_run() {
            self.output.remark(
                "the source may be giving the guest up at this moment; going on, as nobody would have \
                 it then",
            );
            return Ok(());
        }
        self.output.remark(&format!(
            "the guest runs here and still needs {} pages from the source; stopping now would stop \
             it, so this goes on until they have come",
            self.guest.pages_missing()
        ));
        Ok(())
    }

    fn guest_exited(&self, side: &mut GuestSide) -> Error {
        let how = side.status().map_or_else(String::new, |status| format!(" ({status})"));
        if self.phase.may_run() {
            Error::Host(format!("the guest's process ended{how} before all of its memory had come"))
        } else {
            Error::Host(format!("it exited{how} before the guest arrived"))
        }
    }

    /// Adds what an error means for the guest.
    fn explain(&self, error: Error) -> Error {
        match error {
            Error::Lost { side, lane, what } if self.phase.may_run() => Error::Lost {
                side,
                lane,
                what: format!(
                    "{what}; the guest runs here and waits for {} pages that only the source has: \
                     do not start it there again",
                    self.guest.pages_missing()
                ),
            },
            other => other,
        }
    }

    fn step(&mut self, input: Input<'_>) -> Result<()> {
        let phase = std::mem::replace(&mut self.phase, Phase::Failed { may_have_run: false });
        match phase.step(input) {
            Ok(phase) => {
                self.progress.watch().entered(phase.name());
                self.phase = phase;
                Ok(())
            }
            Err((phase, error)) => {
                self.phase = phase;
                Err(Error::protocol("demand lane", error))
            }
        }
    }

    fn send(&self, frame: &Frame) {
        let mut bytes = Vec::new();
        transmit::encode(frame, &mut bytes);
        // The thread has ended where this fails, and its own note says why.
        let _ = self.commands.send(Command::Send(bytes));
        self.demand.wake();
    }

    /// Ends the threads. What was to be sent still goes out, the reason of a failure last, by us if
    /// the demand thread is the one that failed.
    fn end(&mut self, error: Option<&Error>) -> Latencies {
        if let Some(error) = error {
            self.send(&Frame::Error(error.to_fault()));
        }
        let _ = self.commands.send(Command::End);
        self.demand.wake();
        self.bulk_wakers.iter().for_each(Waker::wake);
        for thread in self.bulk_threads.drain(..) {
            let _ = thread.join();
        }
        if let Some(toucher) = &self.toucher {
            toucher.end();
        }
        if let Some(thread) = self.touch_thread.take() {
            let _ = thread.join();
        }
        let demand = self.demand_thread.take().expect("ended once");
        let latencies = demand.join().ok().flatten();
        if let (None, Some(socket), Some(error)) = (&latencies, &self.demand_socket, error) {
            lane::tell(socket, self.is_checked, error);
        }
        let mut latencies = latencies.unwrap_or_else(Latencies::new);
        // After the demand thread, which tells them of pages.
        self.fault_wakers.iter().for_each(Waker::wake);
        for thread in self.fault_threads.drain(..) {
            if let Ok(Some(shard)) = thread.join() {
                latencies.add(&shard);
            }
        }
        latencies
    }

    fn report(&self, latencies: &Latencies) -> Completed {
        let totals = self.guest.counters.totals();
        let seconds = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from).as_secs_f64(),
            _ => 0.0,
        };
        let moving_s = seconds(self.times.first_page, self.times.cached);
        let page_shift =
            self.guest.regions.iter().map(|region| region.unit_shift).min().unwrap_or(12);
        let kinds: BTreeSet<&str> =
            self.guest.regions.iter().map(|region| region.kind.name()).collect();
        let (release_bytes, spare_bytes_max) = self.guest.release_totals();
        let mut report = Completed {
            event: "completed".into(),
            role: "destination".into(),
            kind: kinds.into_iter().collect::<Vec<_>>().join(","),
            page_size: 1 << page_shift,
            lanes: self.lane_count,
            total_bytes: self.guest.total_bytes(),
            data_bytes: totals.data_bytes,
            zero_bytes: totals.zero_bytes,
            hole_bytes: totals.hole_bytes,
            pages_demand: totals.pages_demand,
            pages_background: totals.pages_background,
            downtime_ms: millis(self.times.downtime),
            drain_s: seconds(self.times.running, self.times.cached),
            total_s: seconds(self.times.stopped, self.times.cached),
            gbps: if moving_s > 0.0 { totals.data_bytes as f64 * 8e-9 / moving_s } else { 0.0 },
            fault_latency_us: None,
            fault_stages_us: None,
            cpu_s: CpuTime::of_this_process(),
            zero_copy: self.guest.how_pages_landed().into(),
            release_bytes,
            spare_bytes_max,
            congestion: self.congestion.clone(),
            recoveries: self.link.recoveries,
            disconnected_s: self.link.disconnected.as_secs_f64(),
            checksum: self.is_checked,
            checksum_errors: self.guest.counters.checksum_errors.load(Relaxed),
            digests: self.digests(),
        };
        latencies.tell(&mut report);
        report
    }
}

impl Migration<'_> {
    /// For the report.
    fn digests(&self) -> Vec<RegionDigest> {
        if !self.is_checked || !self.digests_are_known {
            return Vec::new();
        }
        let names = self.guest.regions.iter().map(|region| region.name.as_str());
        RegionDigest::all(names, &self.guest.digests.get(), self.source_digests.as_deref())
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
