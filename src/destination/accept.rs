//! Lanes at the destination: a source dials, its lanes are accepted, its regions are read. In a session
//! that recovers the door stays open, and lanes that replace lost ones come in there too.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, recv};
use umem_wire::limits::LANES_MAX;
use umem_wire::{Capabilities, Event, FaultCode, Hello, LaneRole, Receiver, RegionTable, Target};

use super::prepare::{Adopted, Prepared};
use super::{Note, peer};
use crate::doctor::limits;
use crate::error::{Context, Error, Result};
use crate::inbox::{Inbox, Wake};
use crate::lane::{self, HELLO_TIMEOUT, Lane, Listener, Severable};
use crate::report::Output;
use crate::secure::{Guard, Interest, Opened, Opening, Progress, WayIn};
use crate::uri::Uri;

/// The lanes of one session, all opened in one attempt.
pub(super) struct Lanes {
    pub(super) demand: Lane,
    pub(super) bulk: Vec<Lane>,
    /// The demand lane's.
    pub(super) hello: Hello,
    /// What all of them have shown, where TLS is asked for.
    pub(super) certificate: Option<Vec<u8>>,
    /// Where more of them may come in.
    pub(super) door: Option<Door>,
}

impl Lanes {
    /// The source wants to hear which pages have come.
    pub(super) fn acks(&self) -> bool {
        self.hello.capabilities.contains(Capabilities::ACKS)
    }

    /// Both sides go on over new lanes when these are lost.
    pub(super) fn recovers(&self) -> bool {
        self.demand.capabilities.contains(Capabilities::RECOVERY)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Lane> {
        self.bulk.iter().chain([&self.demand])
    }

    pub(super) fn severable(&self) -> Severable {
        Severable::new(self.all())
    }
}

/// What a session has to be like.
#[derive(Clone, Copy)]
pub(super) struct Terms {
    /// The most bulk lanes.
    pub(super) lanes_max: u16,
    /// This side is able to go on over other lanes.
    pub(super) recovers: bool,
    /// No session without checksums.
    pub(super) checksum: bool,
}

impl Terms {
    /// Those of a session that has begun: what else it has is compared with its first hello.
    fn of_session(hello: &Hello) -> Terms {
        Terms { lanes_max: hello.bulk_lanes, recovers: true, checksum: false }
    }

    /// Why a source is refused, if it is.
    fn refusal(&self, hello: &Hello) -> Option<String> {
        if hello.bulk_lanes > self.lanes_max {
            return Some(format!("at most {} lanes here; use --lanes there", self.lanes_max));
        }
        let is_checked = hello.capabilities.contains(Capabilities::CHECKSUM);
        (self.checksum && !is_checked)
            .then(|| "checksums are asked for here: give --checksum".to_owned())
    }
}

/// Where the source comes in.
pub(super) enum Entrance {
    Listener(Listener),
    /// The one connection there is.
    Connection(OwnedFd),
}

impl Entrance {
    /// Its address, with a port that the kernel chose.
    pub(super) fn uri(&self, asked: &Uri) -> Uri {
        match self {
            Entrance::Listener(listener) => listener.uri(asked),
            Entrance::Connection(_) => asked.clone(),
        }
    }

    /// For the question who could come in.
    pub(super) fn way_in(&self) -> WayIn<'_> {
        match self {
            Entrance::Listener(listener) => WayIn::Listener(listener),
            Entrance::Connection(socket) => WayIn::Connection(socket),
        }
    }

    /// Opens all lanes of a session. Nobody else comes in then.
    pub(super) fn accept(
        self,
        guard: &Arc<Guard>,
        terms: Terms,
        output: &Output,
        inbox: &Inbox<Note>,
        prepared: &Prepared,
    ) -> Result<Lanes> {
        let lanes = match self {
            Entrance::Listener(listener) => {
                let door = Door::new(listener, guard.clone(), terms, output);
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

/// Connections that have not said yet who they are. When there are more the oldest is dropped, which
/// has had the most time: a source says it at once. Room for all lanes of a session and as many
/// strangers.
const PENDING_MAX: usize = 2 * (LANES_MAX as usize + 1);

/// Accepts the lanes of the first session that opens all of them. No connection holds up another, and
/// a session that comes to nothing does not keep the next one out.
fn accept(mut door: Door, inbox: &Inbox<Note>, prepared: &Prepared) -> Result<Lanes> {
    loop {
        if let Some(mut lanes) = door.whole() {
            if lanes.recovers() {
                door.known = Some(Known::new(&lanes.hello, lanes.certificate.clone()));
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
            Wake::Message(Note::Failed(error)) => return Err(error),
            // Nobody else posts before there are workers.
            Wake::Message(_) | Wake::Timeout => {}
        }
        door.forget_late(Instant::now());
    }
}

/// Where sources dial, and everybody who has and is not a lane of a whole session yet. Or nobody dials,
/// and there are connections that were given.
pub(super) struct Door {
    listener: Option<Listener>,
    guard: Arc<Guard>,
    terms: Terms,
    output: Output,
    /// The oldest first.
    pending: VecDeque<Pending>,
    session: Option<Session>,
    /// The session that has begun: only lanes of it come in, to replace lost ones.
    known: Option<Known>,
}

/// A session that has begun, and what is needed to replace its lanes.
struct Known {
    hello: Hello,
    /// Who began it: nobody else goes on with it, whatever the authority has signed.
    certificate: Option<Vec<u8>>,
    /// The highest that a demand lane has had.
    epoch: u32,
    /// Why no lanes are wanted now, if they are not.
    refusal: Option<&'static str>,
}

impl Known {
    fn new(hello: &Hello, certificate: Option<Vec<u8>>) -> Known {
        Known { hello: hello.clone(), certificate, epoch: hello.epoch, refusal: None }
    }

    fn is_of_session(&self, hello: &Hello) -> bool {
        let ours = &self.hello;
        let bulk_lanes = hello.bulk_lanes == ours.bulk_lanes;
        hello.session == ours.session && bulk_lanes && hello.capabilities == ours.capabilities
    }
}

/// A connection that has not said who it is.
struct Pending {
    opening: Opening,
    /// None for one that was given, whose other end may come into the source's hands at any time.
    deadline: Option<Instant>,
}

/// A session some of whose lanes have come, the demand lane among them.
struct Session {
    hello: Hello,
    /// Who opened it, where TLS is asked for: nobody else opens a lane of it.
    certificate: Option<Vec<u8>>,
    demand: Lane,
    /// Lane i at index i - 1.
    bulk: Vec<Option<Lane>>,
    /// The next lane has to come before this.
    deadline: Instant,
    /// The source has begun to speak on the demand lane, which is read later: its end does not show
    /// then.
    has_spoken: bool,
}

#[derive(Clone, Copy)]
enum Who {
    Stranger,
    Pending(usize),
    Session,
}

impl Door {
    fn new(listener: Listener, guard: Arc<Guard>, terms: Terms, output: &Output) -> Door {
        Door {
            listener: Some(listener),
            guard,
            terms,
            output: output.clone(),
            pending: VecDeque::new(),
            session: None,
            known: None,
        }
    }

    /// A door for a session that has begun, at another address than before or the first one.
    pub(super) fn of_session(
        listener: Listener,
        guard: Arc<Guard>,
        hello: &Hello,
        certificate: Option<Vec<u8>>,
        output: &Output,
    ) -> Door {
        let door = Door::new(listener, guard, Terms::of_session(hello), output);
        Door { known: Some(Known::new(hello, certificate)), ..door }
    }

    /// For a session that has begun, with a connection for each lane of it.
    pub(super) fn of_connections(
        sockets: Vec<OwnedFd>,
        guard: Arc<Guard>,
        hello: &Hello,
        certificate: Option<Vec<u8>>,
        output: &Output,
    ) -> Door {
        let mut door = Door {
            listener: None,
            guard,
            terms: Terms::of_session(hello),
            output: output.clone(),
            pending: VecDeque::new(),
            session: None,
            known: Some(Known::new(hello, certificate)),
        };
        for socket in sockets {
            let lane = match hello.bulk_lanes {
                0 => Lane::shared(socket),
                _ => Lane::new(socket, "a lane".into()),
            };
            door.open(lane, None);
        }
        door
    }

    /// Nobody dials.
    pub(super) fn is_of_connections(&self) -> bool {
        self.listener.is_none()
    }

    /// Connections that were given are of use only together: false when one is gone.
    pub(super) fn has_all(&self) -> bool {
        let of_session = |session: &Session| 1 + session.bulk.iter().flatten().count();
        let count = self.pending.len() + self.session.as_ref().map_or(0, of_session);
        count == usize::from(self.terms.lanes_max) + 1
    }

    /// Whether lanes of the session that has begun are wanted; if not, why.
    pub(super) fn set_refusal(&mut self, refusal: Option<&'static str>) {
        self.known.iter_mut().for_each(|known| known.refusal = refusal);
    }

    /// Whom to listen to; when one of these is ready [`answer`](Door::answer) takes its index.
    pub(super) fn fds(&self) -> Vec<Interest<'_>> {
        self.who().into_iter().map(|(_, interest)| interest).collect()
    }

    fn who(&self) -> Vec<(Who, Interest<'_>)> {
        let session = self.session.iter().filter(|session| !session.has_spoken);
        let session =
            session.map(|session| (Who::Session, (session.demand.as_fd(), PollFlags::POLLIN)));
        let pending = self.pending.iter().enumerate();
        let pending = pending.map(|(i, p)| (Who::Pending(i), p.opening.interest()));
        let listener = self.listener.iter();
        let stranger = listener.map(|l| (Who::Stranger, (l.as_fd(), PollFlags::POLLIN)));
        session.chain(pending).chain(stranger).collect()
    }

    pub(super) fn answer(&mut self, index: usize) -> Result<()> {
        match self.who().get(index) {
            Some((Who::Stranger, _)) => self.knock(),
            Some(&(who, _)) => {
                self.hear(who);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// All lanes of a session, once they are here.
    pub(super) fn whole(&mut self) -> Option<Lanes> {
        self.session.take_if(|session| session.is_whole()).map(Session::into_lanes)
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let session = self.session.iter().map(|session| session.deadline);
        self.pending.iter().filter_map(|pending| pending.deadline).chain(session).min()
    }

    fn knock(&mut self) -> Result<()> {
        let Some(socket) = self.listener.as_ref().map_or(Ok(None), Listener::accept)? else {
            return Ok(());
        };
        if self.pending.len() == PENDING_MAX {
            self.pending.pop_front();
            self.ignored("others came before it had said who it is");
        }
        self.open(Lane::new(socket, "a lane".into()), Some(Instant::now() + HELLO_TIMEOUT));
        Ok(())
    }

    fn open(&mut self, lane: Result<Lane>, deadline: Option<Instant>) {
        let lane = lane.map_err(|error| error.to_string());
        match lane.and_then(|lane| Opening::new(lane, &self.guard)) {
            Ok(opening) => self.pending.push_back(Pending { opening, deadline }),
            Err(why) => self.ignored(&why),
        }
    }

    fn hear(&mut self, who: Who) {
        let index = match who {
            Who::Pending(index) => index,
            Who::Session => return self.look_after_session(),
            Who::Stranger => return,
        };
        let Pending { opening, deadline } = self.pending.remove(index).expect("it is there");
        match opening.advance(&self.guard) {
            Ok(Progress::Waits(opening)) => {
                self.pending.insert(index, Pending { opening, deadline });
            }
            Ok(Progress::Opened(opened)) => self.greet(opened),
            Err(why) => self.ignored(&why),
        }
    }

    /// A lane that has said what it is for.
    fn greet(&mut self, opened: Opened) {
        let Opened { lane, hello, answer, certificate } = opened;
        let mut lane = match self.guard.seat(lane, hello.role, hello.index) {
            Ok(lane) => lane,
            Err(error) => return self.ignored(&error.to_string()),
        };
        let may_come = match &mut self.known {
            None if hello.epoch > 0 => Err("there is no migration here to go on with"),
            None => Ok(()),
            Some(known) if !known.is_of_session(&hello) => Err(ANOTHER),
            Some(known) if known.certificate != certificate => Err(SOMEBODY_ELSE),
            Some(Known { refusal: Some(why), .. }) => Err(*why),
            Some(known) if hello.role == LaneRole::Demand => {
                // Lanes of a later attempt end those of one before it; they are refused afterwards.
                let is_later = hello.epoch > known.epoch;
                if is_later {
                    known.epoch = hello.epoch;
                    self.session = None;
                }
                if is_later { Ok(()) } else { Err("another attempt was later") }
            }
            Some(_) => Ok(()),
        };
        if let Err(why) = may_come {
            return lane::refuse(&lane, FaultCode::Refused, why);
        }
        let place = match &mut self.session {
            None if hello.role == LaneRole::Demand => None,
            Some(session) => match session.place(&hello, certificate.as_ref()) {
                Some(place) => Some(place),
                None => return refuse(&lane),
            },
            None => return refuse(&lane),
        };
        if let Some(why) = self.terms.refusal(&hello) {
            return lane::refuse(&lane, FaultCode::Refused, &why);
        }
        let ours = lane::capabilities(self.terms.recovers);
        if lane::welcome(&mut lane, &hello, ours, answer.as_ref()).is_err() {
            return;
        }
        match (place, &mut self.session) {
            (Some(place), Some(session)) => {
                session.bulk[place] = Some(lane);
                session.deadline = Instant::now() + HELLO_TIMEOUT;
            }
            _ => self.session = Some(Session::new(lane, hello, certificate)),
        }
    }

    /// The demand lane of a session that is not whole is readable: mostly because it was closed.
    fn look_after_session(&mut self) {
        let Some(session) = &mut self.session else { return };
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(session.demand.as_fd().as_raw_fd(), &mut [0], flags) {
            Ok(1..) => session.has_spoken = true,
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Ok(0) | Err(_) => {
                self.session = None;
                self.ignored("its demand lane closed before all of its lanes had come");
            }
        }
    }

    pub(super) fn forget_late(&mut self, now: Instant) {
        let before = self.pending.len();
        self.pending.retain(|pending| pending.deadline.is_none_or(|deadline| deadline > now));
        for _ in self.pending.len()..before {
            self.ignored("it did not say who it is");
        }
        if let Some(session) = self.session.take_if(|session| session.deadline <= now) {
            let what = "not all of its lanes have come";
            let demand = &session.demand;
            lane::tell(&demand.socket(), demand.is_checked(), &lost(demand, what));
            self.ignored(what);
        }
    }
}

impl Door {
    fn ignored(&self, why: &str) {
        self.output.remark(&format!("ignored a connection: {why}"));
    }
}

impl Session {
    fn new(demand: Lane, hello: Hello, certificate: Option<Vec<u8>>) -> Session {
        let bulk = (0..hello.bulk_lanes).map(|_| None).collect();
        let deadline = Instant::now() + HELLO_TIMEOUT;
        Session { hello, certificate, demand, bulk, deadline, has_spoken: false }
    }

    /// Where a lane belongs, if it is one of ours that has not come.
    fn place(&self, hello: &Hello, certificate: Option<&Vec<u8>>) -> Option<usize> {
        let is_ours = hello.role == LaneRole::Bulk
            && hello.session == self.hello.session
            && certificate == self.certificate.as_ref()
            && hello.epoch == self.hello.epoch
            && hello.bulk_lanes == self.hello.bulk_lanes
            && hello.capabilities == self.hello.capabilities;
        let place = usize::from(hello.index).checked_sub(1)?;
        (is_ours && self.bulk.get(place)?.is_none()).then_some(place)
    }

    fn is_whole(&self) -> bool {
        self.bulk.iter().all(Option::is_some)
    }

    fn into_lanes(self) -> Lanes {
        let Session { demand, hello, certificate, bulk, .. } = self;
        let bulk = bulk.into_iter().flatten().collect();
        Lanes { demand, bulk, hello, certificate, door: None }
    }
}

const ANOTHER: &str = "another migration is being received";
const SOMEBODY_ELSE: &str =
    "this migration began with another certificate, and goes on with it alone";

fn refuse(lane: &Lane) {
    lane::refuse(lane, FaultCode::Refused, ANOTHER);
}

/// Opens the lane of the one connection there is. The source may come at any time.
fn accept_single(
    socket: OwnedFd,
    guard: &Guard,
    terms: Terms,
    inbox: &Inbox<Note>,
    prepared: &Prepared,
) -> Result<Lanes> {
    let refused = |why: String| {
        let lane = lane::lane_name(LaneRole::Demand, 0);
        Error::Lost { side: "source", lane, what: format!("no source: {why}") }
    };
    let mut opening = Opening::new(Lane::shared(socket)?, guard).map_err(refused)?;
    let opened = loop {
        let fds = [opening.interest(), (prepared.side.exited(), PollFlags::POLLIN)];
        match inbox.wait_for(&fds, None)? {
            Wake::Signal => return Err(interrupted()),
            Wake::Ready(0) => {}
            Wake::Ready(_) => return Err(exited()),
            Wake::Message(_) | Wake::Timeout => continue,
        }
        match opening.advance(guard).map_err(refused)? {
            Progress::Opened(opened) => break opened,
            Progress::Waits(again) => opening = again,
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
    lane::welcome(&mut demand, &hello, lane::capabilities(terms.recovers), answer.as_ref())?;
    Ok(Lanes { demand, bulk: Vec::new(), hello, certificate, door: None })
}

fn interrupted() -> Error {
    Error::Interrupted("no guest had arrived".into())
}

fn exited() -> Error {
    Error::Host("it exited before the guest arrived (its own messages say why)".into())
}

/// Reads the source's regions and puts ours in their order; an error is told to the source. The
/// answer has the landing table.
pub(super) fn compare(
    demand: &Lane,
    inbox: &Inbox<Note>,
    prepared: &mut Prepared,
) -> Result<(Receiver, Adopted)> {
    let receiver = Receiver::for_destination(LaneRole::Demand);
    let mut receiver = receiver.checked(demand.is_checked());
    let compared = read_regions(demand, inbox, prepared, &mut receiver)
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
    inbox: &Inbox<Note>,
    prepared: &Prepared,
    receiver: &mut Receiver,
) -> Result<RegionTable> {
    let mut socket = demand.blocking()?;
    let mut buffer = Vec::new();
    loop {
        match inbox.wait(&[socket.as_fd(), prepared.side.exited()], None)? {
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
                ErrorKind::Interrupted => continue,
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
