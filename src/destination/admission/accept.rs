//! Lanes at the destination: a source dials, its lanes are accepted, its regions are read. In a session that recovers
//! the door stays open for lanes that replace lost ones.

mod door;

use crate::error;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use umem_wire::{Capabilities, Event, FaultCode, Hello, LaneRole, Receiver, RegionTable, Target};

use super::prepare::{Adopted, Prepared};
use crate::destination::{InboxMessage, peer};
use crate::error::{Context, Error, Result};
use crate::observe::output::Output;
use crate::runtime::inbox::{Inbox, Wake};
use crate::transport::lane::{self, HELLO_TIMEOUT, Lane, Listener, ShutdownHandle};
use crate::transport::limits;
use crate::transport::secure::{self, Opened, Opening, Progress, ServerAuth, WayIn};
use crate::transport::uri::Uri;

pub(in crate::destination) use door::LaneAcceptor;

/// The lanes of one session, all opened in one attempt.
pub(in crate::destination) struct Lanes {
    pub(in crate::destination) demand: Lane,
    pub(in crate::destination) bulk: Vec<Lane>,
    /// The demand lane's.
    pub(in crate::destination) hello: Hello,
    /// The peer's identity that all of them presented, with TLS.
    pub(in crate::destination) certificate: Option<Vec<u8>>,
    /// The door for further lanes.
    pub(in crate::destination) door: Option<LaneAcceptor>,
}

impl Lanes {
    /// The source requests acknowledgements.
    pub(in crate::destination) fn acks(&self) -> bool {
        self.hello.capabilities.contains(Capabilities::ACKS)
    }

    /// Pages arrive while the source's guest runs.
    pub(in crate::destination) fn has_rounds(&self) -> bool {
        self.demand.capabilities.contains(Capabilities::ROUNDS)
    }

    /// Both sides continue over new lanes when these are lost.
    pub(in crate::destination) fn recovers(&self) -> bool {
        self.demand.capabilities.contains(Capabilities::RECOVERY)
    }

    pub(in crate::destination) fn all(&self) -> impl Iterator<Item = &Lane> {
        self.bulk.iter().chain([&self.demand])
    }

    pub(in crate::destination) fn shutdown_handle(&self) -> ShutdownHandle {
        ShutdownHandle::new(self.all())
    }
}

/// Requirements on a session.
#[derive(Clone, Copy)]
pub(in crate::destination) struct AdmissionPolicy {
    /// The most bulk lanes.
    pub(in crate::destination) lanes_max: u16,
    /// This side can continue over other lanes.
    pub(in crate::destination) recovers: bool,
    /// Sessions without checksums are refused.
    pub(in crate::destination) checksum: bool,
    /// An external switchover: a program beside umem starts the guest, on both sides.
    pub(in crate::destination) is_external: bool,
}

impl AdmissionPolicy {
    /// Requirements of a session that has begun: its other properties are compared with its first hello.
    fn of_session(hello: &Hello) -> AdmissionPolicy {
        let is_external = hello.capabilities.contains(Capabilities::EXTERNAL);
        AdmissionPolicy {
            lanes_max: hello.bulk_lanes,
            recovers: true,
            checksum: false,
            is_external,
        }
    }

    /// What this side offers.
    fn capabilities(&self) -> Capabilities {
        lane::capabilities_with(self.recovers, self.is_external)
    }

    /// The reason to refuse a source, if any.
    fn refusal(&self, hello: &Hello) -> Option<String> {
        if hello.bulk_lanes > self.lanes_max {
            return Some(format!("at most {} lanes here; use --lanes there", self.lanes_max));
        }
        let is_checked = hello.capabilities.contains(Capabilities::CHECKSUM);
        if self.checksum && !is_checked {
            return Some("this side requires checksums: use --checksum there".to_owned());
        }
        // A refusal has room for 116 bytes.
        let why = match (self.is_external, hello.capabilities.contains(Capabilities::EXTERNAL)) {
            (true, false) => {
                "this side leaves the switchover to its manager: use --switchover external there"
            }
            (false, true) => {
                "this side has the guest run itself: leave out --switchover external there"
            }
            _ => return None,
        };
        Some(why.to_owned())
    }
}

/// The place where the source connects.
pub(in crate::destination) enum Entrance {
    Listener(Listener),
    /// The single connection.
    Connection(OwnedFd),
}

impl Entrance {
    /// The listening address, with the port that the kernel chose.
    pub(in crate::destination) fn uri(&self, asked: &Uri) -> Uri {
        match self {
            Entrance::Listener(listener) => listener.uri(asked),
            Entrance::Connection(_) => asked.clone(),
        }
    }

    /// The input of the check which peers could connect.
    pub(in crate::destination) fn way_in(&self) -> WayIn<'_> {
        match self {
            Entrance::Listener(listener) => WayIn::Listener(listener),
            Entrance::Connection(socket) => WayIn::Connection(socket),
        }
    }

    /// Accepts all lanes of a session. No other session is accepted then.
    pub(in crate::destination) fn accept(
        self,
        guard: &Arc<ServerAuth>,
        terms: AdmissionPolicy,
        output: &Output,
        inbox: &Inbox<InboxMessage>,
        prepared: &Prepared,
    ) -> Result<Lanes> {
        let lanes = match self {
            Entrance::Listener(listener) => {
                let door = LaneAcceptor::new(listener, guard.clone(), terms, output);
                accept(door, inbox, prepared)
            }
            Entrance::Connection(socket) => accept_single(socket, guard, terms, inbox, prepared),
        }?;
        let count = u16::try_from(lanes.bulk.len()).expect("there are LANES_MAX at most");
        let demand = &lanes.demand;
        let told = |error: &Error| lane::tell(&demand.socket(), demand.is_checked(), error);
        limits::check(count).inspect_err(told)?;
        Ok(lanes)
    }
}

/// Accepts the lanes of the first session that opens all of them. No connection delays another, and an incomplete
/// session does not block the next.
fn accept(
    mut door: LaneAcceptor,
    inbox: &Inbox<InboxMessage>,
    prepared: &Prepared,
) -> Result<Lanes> {
    loop {
        if let Some(mut lanes) = door.whole() {
            if lanes.recovers() {
                door.begun(&lanes);
                lanes.door = Some(door);
            }
            return Ok(lanes);
        }
        let mut fds = vec![(prepared.side.exited(), PollFlags::POLLIN)];
        fds.extend(door.fds());
        let limit = door.next_deadline().map(|at| at.saturating_duration_since(Instant::now()));
        match inbox.wait_for(&fds, limit)? {
            Wake::Signal => return Err(interrupted()),
            Wake::Ready(0) => return Err(exited()),
            Wake::Ready(index) => door.answer(index - 1)?,
            Wake::Message(InboxMessage::Failed(error)) => return Err(error),
            // No message arrives before there are workers.
            Wake::Message(_) | Wake::Timeout => {}
        }
        door.forget_late(Instant::now());
    }
}

/// Opens the lane of the single connection. The source may send its hello at any time.
fn accept_single(
    socket: OwnedFd,
    guard: &ServerAuth,
    terms: AdmissionPolicy,
    inbox: &Inbox<InboxMessage>,
    prepared: &Prepared,
) -> Result<Lanes> {
    let refused = |why: String| {
        let lane = error::lane_name(LaneRole::Demand, 0);
        Error::Lost { side: "source", lane, what: format!("no source: {why}") }
    };
    let mut opening = Opening::new(Lane::shared(socket)?, guard).map_err(refused)?;
    let mut deadline = None;
    let opened = loop {
        let fds = [opening.interest(), (prepared.side.exited(), PollFlags::POLLIN)];
        match inbox.wait_for(&fds, left(deadline, &refused)?)? {
            Wake::Signal => return Err(interrupted()),
            Wake::Ready(0) => {}
            Wake::Ready(_) => return Err(exited()),
            Wake::Message(_) | Wake::Timeout => continue,
        }
        match opening.advance(guard).map_err(refused)? {
            Progress::Opened(opened) => break opened,
            Progress::Waits(again) => opening = again,
        }
        if opening.has_begun() {
            deadline.get_or_insert(Instant::now() + HELLO_TIMEOUT);
        }
    };
    let Opened { lane: demand, hello, answer, certificate } = opened;
    let mut demand = guard.seat(demand, LaneRole::Demand, 0)?;
    if hello.role != LaneRole::Demand || hello.bulk_lanes > 0 || hello.epoch > 0 {
        let text = "one connection here: the source must use fd: or exec: too";
        lane::refuse(&demand, FaultCode::Refused, text);
        return Err(Error::protocol(&demand.name, "a lane of several, on the only connection"));
    }
    if let Some(why) = terms.refusal(&hello) {
        lane::refuse(&demand, FaultCode::Refused, &why);
        return Err(refused(why));
    }
    secure::welcome(&mut demand, &hello, terms.capabilities(), answer.as_ref())?;
    Ok(Lanes { demand, bulk: Vec::new(), hello, certificate, door: None })
}

/// How long a source may take once it has begun to send its hello; no limit before that.
pub(in crate::destination) fn left(
    deadline: Option<Instant>,
    late: &dyn Fn(String) -> Error,
) -> Result<Option<Duration>> {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    match left {
        Some(Duration::ZERO) => {
            let seconds = HELLO_TIMEOUT.as_secs();
            Err(late(format!("it has not sent its hello within {seconds} s")))
        }
        left => Ok(left),
    }
}

fn interrupted() -> Error {
    Error::Interrupted("no guest had arrived".into())
}

fn exited() -> Error {
    Error::Host("it exited before the guest arrived (its own messages say why)".into())
}

/// How long the source's regions may take; the source sends them as soon as all lanes are open.
const REGIONS_TIMEOUT: Duration = Duration::from_secs(60);

/// Reads the source's regions and puts this side's in their order; an error is sent to the source. The result has the
/// landing table.
pub(in crate::destination) fn compare(
    demand: &Lane,
    inbox: &Inbox<InboxMessage>,
    prepared: &mut Prepared,
    step_timeout: Duration,
) -> Result<(Receiver, Adopted)> {
    let receiver = Receiver::for_destination(LaneRole::Demand);
    let mut receiver = receiver.checked(demand.is_checked());
    let limit = REGIONS_TIMEOUT.min(step_timeout);
    let compared = read_regions(demand, inbox, prepared, &mut receiver, limit)
        .and_then(|table| prepared.adopt(&table))
        .and_then(|adopted| {
            let regions = adopted.landing.iter();
            limits::check_mappings(regions.map(|(_, region)| region.bytes)).map(|()| adopted)
        });
    match compared {
        Ok(adopted) => {
            receiver.set_regions(&adopted.landing);
            Ok((receiver, adopted))
        }
        Err(error) => {
            lane::tell(&demand.socket(), demand.is_checked(), &error);
            Err(error)
        }
    }
}

fn read_regions(
    demand: &Lane,
    inbox: &Inbox<InboxMessage>,
    prepared: &Prepared,
    receiver: &mut Receiver,
    limit: Duration,
) -> Result<RegionTable> {
    let mut socket = demand.blocking()?;
    let mut buffer = Vec::new();
    let deadline = Instant::now() + limit;
    loop {
        // Other frames do not extend the limit.
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let what = format!("its regions have not arrived for {} s", limit.as_secs_f64());
            return Err(lost(demand, &what));
        }
        match inbox.wait(&[socket.as_fd(), prepared.side.exited()], Some(left))? {
            Wake::Signal => return Err(interrupted()),
            Wake::Ready(0) => {}
            Wake::Ready(_) => return Err(exited()),
            Wake::Message(_) | Wake::Timeout => continue,
        }
        let Target::Control { exact } = receiver.next_target() else {
            return Err(Error::protocol(&demand.name, "pages before the regions"));
        };
        buffer.resize(exact, 0);
        let count = match socket.read(&mut buffer) {
            Ok(0) => return Err(lost(demand, "the source closed it")),
            Ok(count) => count,
            Err(error) => match error.kind() {
                ErrorKind::ConnectionReset => return Err(lost(demand, "the source closed it")),
                // A given socket may be non-blocking.
                ErrorKind::Interrupted | ErrorKind::WouldBlock => continue,
                _ => return Err(error).context(|| demand.name.clone()),
            },
        };
        let read = receiver.control(&buffer[..count]);
        read.map_err(|error| Error::received("source", &demand.name, &error))?;
        match receiver.poll_event() {
            None | Some(Event::Ping(_) | Event::Pong(_)) => {}
            Some(Event::Regions(table)) => return Ok(table),
            Some(Event::Error(fault)) => return Err(peer(fault)),
            Some(other) => {
                let what = format!("{} before the regions", other.name());
                return Err(Error::protocol(&demand.name, what));
            }
        }
    }
}

fn lost(lane: &Lane, what: &str) -> Error {
    Error::Lost { side: "source", lane: lane.name.clone(), what: what.into() }
}
