//! How a destination finds the process into which a guest arrives, for every kind of monitor. The destination starts
//! the process or waits for its connection, takes over its memory, and checks that its monitor waits for a guest.

mod finding;
mod handing;

use std::path::Path;
use std::time::{Duration, Instant};

use std::os::unix::net::UnixStream;

use super::command::{self, MonitorProcess, RamPath, Sockets, Start};
use super::kind::{Arriving, ArrivingGuest, Connection, Listening, MonitorKind, MonitorSocket};
use super::monitor::{Monitor, MonitorRecord, NoMonitor};
use super::registry::{PRELOADED, kind_of};
use crate::error::{Error, Result};
use crate::fault::handoff::{Handed, HandoffListener, HandoffSocket};
use crate::memory::claim::{self, User};
use crate::memory::kind::Kind;
use crate::runtime::inbox::{Inbox, Wake};

use finding::find;
pub(crate) use handing::check_pieces;
use handing::{Callers, HANDOFF_TIMEOUT, Memory, accept_memory, receive_memory};

/// The outcome of an interrupt before a source has connected.
pub(crate) const NO_GUEST: &str = "no guest had arrived";

/// The interval between attempts to connect to a monitor's socket that does not exist yet.
const CONNECT_INTERVAL: Duration = Duration::from_millis(20);

/// A destination's requirements of the process into which a guest arrives.
pub(crate) struct Wanted<'a> {
    /// The guest's RAM files; empty to ask the monitor.
    pub(crate) ram: &'a [RamPath],
    /// How the guest maps its memory, unless its process reports that.
    pub(crate) kind: Kind,
    /// The socket where a process without the preload object hands over its memory.
    pub(crate) handoff: Option<&'a Path>,
    /// The monitor's socket, if the monitor has one of its own.
    pub(crate) monitor: Option<&'a MonitorSocket>,
    /// Where the monitor listens for the device state by itself.
    pub(crate) listening: Option<Listening>,
    /// A preload object to use instead of the built-in one.
    pub(crate) preload: Option<&'a Path>,
    /// The monitor to start, with its arguments; empty for a process that connects to the hand-over socket.
    pub(crate) command: &'a [String],
}

/// A process that will connect, or was started and will hand over its memory.
pub(crate) struct Expected<'a> {
    wanted: Wanted<'a>,
    /// The socket where a process without the preload object hands its memory over.
    listener: Option<HandoffListener>,
}

/// A process whose guest is to arrive.
pub(crate) struct Arrived {
    pub(crate) process: MonitorProcess,
    pub(crate) handoff: HandoffSocket,
    pub(crate) handed: Vec<Handed>,
    pub(crate) knows_umem: bool,
    pub(crate) keeps_sessions: bool,
    /// None for a guest that runs by itself.
    pub(crate) monitor: Option<Box<dyn Monitor>>,
    /// Advice for the user: how a guest would move faster.
    pub(crate) advice: Option<String>,
    /// Only the guest may have its files mapped.
    pub(crate) wants_alone: bool,
}

impl<'a> Expected<'a> {
    /// Makes what must exist before the guest's process does.
    pub(crate) fn new(wanted: Wanted<'a>) -> Result<Expected<'a>> {
        if wanted.command.is_empty() && wanted.handoff.is_none() {
            return Err(Error::Usage(
                "no COMMAND: write the guest's monitor after --, such as `umem incoming tcp::4444 -- \
                 qemu-system-x86_64 …`, or give with --handoff the socket at which a monitor will hand over its \
                 memory"
                    .into(),
            ));
        }
        let listener = wanted.handoff.map(HandoffListener::bind).transpose()?;
        Ok(Expected { wanted, listener })
    }

    /// The guest's process has not been started yet.
    pub(crate) fn is_to_come(&self) -> bool {
        self.wanted.command.is_empty()
    }

    /// Starts the process, if umem is to start it, and waits for its memory.
    pub(crate) fn arrive<N>(self, inbox: &Inbox<N>) -> Result<Arrived> {
        let wanted = self.wanted;
        if wanted.command.is_empty() {
            let listener = self.listener.expect("there is a COMMAND or a hand-over socket");
            return take_over_stranger(&wanted, &listener, inbox);
        }
        if self.listener.is_none() {
            for RamPath { name, path } in wanted.ram {
                claim::check_path(name, path, User::Destination)?;
                claim::check_unused(name, path)?;
            }
        }
        let start = Start {
            command: wanted.command,
            ram: if self.listener.is_none() { wanted.ram } else { &[] },
            kind: wanted.kind,
            preload: wanted.preload,
            hands_over: self.listener.is_some(),
            add_qmp: wanted.monitor.is_none(),
        };
        let (mut process, sockets) = command::start(&start)?;
        let Sockets { handoff, qmp } = sockets;
        // A process that hands its memory over by itself may share that memory with any process.
        let wants_alone = self.listener.is_none();
        let (handoff, memory, found) = match (self.listener, handoff) {
            (Some(listener), _) => {
                let (handoff, memory) = accept_memory(&listener, &mut process, inbox)?;
                (handoff, memory, ask(&wanted, qmp, &process, inbox)?)
            }
            (None, handoff) => {
                let stream = handoff.expect("the preload object has a socket");
                let mut handoff = HandoffSocket::new(stream);
                let (memory, found) = find(&wanted, &mut process, &mut handoff, inbox)?;
                (handoff, memory, found)
            }
        };
        Ok(Arrived::new(process, handoff, memory, found, wants_alone))
    }
}

impl Arrived {
    fn new(
        process: MonitorProcess,
        handoff: HandoffSocket,
        memory: Memory,
        found: Option<ArrivingGuest>,
        wants_alone: bool,
    ) -> Arrived {
        let Memory { handed, knows_umem, keeps_sessions } = memory;
        let (monitor, advice) =
            found.map_or((None, None), |found| (Some(found.monitor), found.advice));
        Arrived {
            process,
            handoff,
            handed,
            knows_umem,
            keeps_sessions,
            monitor,
            advice,
            wants_alone,
        }
    }
}

/// The monitor of a guest that an earlier umem process has had loaded, from that process's record. `kept` is the
/// connection that the guest's process has kept; `runs` is true if the guest ran at the source. None for a guest
/// without a monitor.
pub(crate) fn loaded(
    record: Option<&MonitorRecord>,
    kept: Option<UnixStream>,
    runs: bool,
) -> Result<Box<dyn Monitor>> {
    match record {
        Some(record) => kind_of(record)?.loaded(&record.state, kept, runs),
        None => Ok(Box::new(NoMonitor)),
    }
}

/// Waits for a process that another program has started, and for its memory.
fn take_over_stranger<N>(
    wanted: &Wanted<'_>,
    listener: &HandoffListener,
    inbox: &Inbox<N>,
) -> Result<Arrived> {
    let mut callers = Callers::new(listener);
    loop {
        // Late connections are closed before the descriptors are counted.
        callers.forget_late(Instant::now());
        let left = callers.deadline().map(|at| at.saturating_duration_since(Instant::now()));
        let index = match inbox.wait(&callers.fds(), left)? {
            Wake::Signal => return Err(Error::Interrupted("no guest had arrived".into())),
            Wake::Ready(index) => index,
            Wake::Message(_) | Wake::Timeout => continue,
        };
        let Some(first) = callers.answer(index)? else { continue };
        let mut process = MonitorProcess::follow(first.pid)?;
        let (handoff, memory) = receive_memory(first, &mut process, inbox)?;
        let found = ask(wanted, None, &process, inbox)?;
        return Ok(Arrived::new(process, handoff, memory, found, false));
    }
}

/// Asks the monitor of a process that hands its memory over itself, if the monitor has a socket.
fn ask<N>(
    wanted: &Wanted<'_>,
    inherited: Option<UnixStream>,
    process: &MonitorProcess,
    inbox: &Inbox<N>,
) -> Result<Option<ArrivingGuest>> {
    let found = connect(wanted, inherited, process, inbox)?;
    let Some((kind, connection)) = found else { return Ok(None) };
    let arriving =
        Arriving { kind: wanted.kind, listening: wanted.listening.clone(), hands_over: true };
    // A monitor need not answer.
    inbox.wait_for_work(NO_GUEST, None, move || kind.arriving(connection, arriving)).map(Some)
}

/// The monitor's kind and a connection to it: the connection that its process was started with, or a new one.
fn connect<N>(
    wanted: &Wanted<'_>,
    inherited: Option<UnixStream>,
    process: &MonitorProcess,
    inbox: &Inbox<N>,
) -> Result<Option<(&'static dyn MonitorKind, Connection)>> {
    Ok(match (inherited, wanted.monitor) {
        (Some(stream), _) => Some((PRELOADED, Connection { stream, path: None })),
        (None, Some(socket)) => {
            let stream = dial(socket, process, inbox)?;
            Some((socket.kind, Connection { stream, path: Some(socket.path.clone()) }))
        }
        (None, None) => None,
    })
}

/// Waits until the monitor listens: its socket may not exist yet, or exist without a listener.
fn dial<N>(
    socket: &MonitorSocket,
    process: &MonitorProcess,
    inbox: &Inbox<N>,
) -> Result<UnixStream> {
    let deadline = Instant::now() + HANDOFF_TIMEOUT;
    loop {
        let is_late = Instant::now() >= deadline;
        let MonitorSocket { kind, path } = socket.clone();
        // A connect to a socket with a full queue blocks.
        let tried =
            inbox.wait_for_work(NO_GUEST, None, move || match UnixStream::connect(&path) {
                Err(error) if is_late => Err(kind.cannot_connect(&path, &error)),
                tried => Ok(tried.ok()),
            })?;
        if let Some(stream) = tried {
            return Ok(stream);
        }
        match inbox.wait(&[process.exited()], Some(CONNECT_INTERVAL))? {
            Wake::Signal => return Err(Error::Interrupted(NO_GUEST.into())),
            Wake::Ready(_) => {
                return Err(Error::Host("it exited at once (its own messages say why)".into()));
            }
            Wake::Message(_) | Wake::Timeout => {}
        }
    }
}
