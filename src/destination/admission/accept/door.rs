//! The door: where sources connect, and the handling of a connection until its session is complete.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, recv};
use umem_wire::limits::LANES_MAX;
use umem_wire::{FaultCode, Hello, LaneRole};

use super::{AdmissionPolicy, Lanes, lost};
use crate::error::Result;
use crate::observe::output::Output;
use crate::runtime::accepting::Accepted;
use crate::runtime::inbox::Interest;
use crate::transport::lane::{self, HELLO_TIMEOUT, Lane, Listener};
use crate::transport::secure::{self, Opened, Opening, Progress, ServerAuth};

/// The most connections that have not sent their hello. A surplus connection replaces the oldest, which has had the
/// most time: a source sends its hello at once. Room for all lanes of a session and as many others.
const PENDING_MAX: usize = 2 * (LANES_MAX as usize + 1);

/// How long all lanes of a session may take to arrive: 64 of them on a long path.
const SESSION_TIMEOUT: Duration = Duration::from_secs(60);

/// The listener and the connections that are not lanes of a complete session yet; or, without a listener, connections
/// that were given.
pub(in crate::destination) struct LaneAcceptor {
    listener: Option<Listener>,
    guard: Arc<ServerAuth>,
    terms: AdmissionPolicy,
    output: Output,
    /// The oldest first.
    pending: VecDeque<Pending>,
    session: Option<Session>,
    /// The session that has begun: only lanes that replace its lost ones are accepted.
    known: Option<Known>,
}

/// A session that has begun, and the requirements on replacements of its lanes.
struct Known {
    hello: Hello,
    /// The identity of the peer that began it: another identity is refused, even with a certificate of the same
    /// authority.
    certificate: Option<Vec<u8>>,
    /// The highest epoch of a demand lane.
    epoch: u32,
    /// The reason to refuse lanes now, if any.
    refusal: Option<Refusal>,
}

/// The reason to refuse lanes, as sent to a source.
pub(in crate::destination) type Refusal = (FaultCode, Cow<'static, str>);

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

/// A connection without a hello so far.
struct Pending {
    opening: Opening,
    /// None for a given connection that has sent nothing: its other end may reach the source at any time.
    deadline: Option<Instant>,
}

/// A session with some of its lanes, the demand lane among them.
struct Session {
    hello: Hello,
    /// The identity of its peer, with TLS: a lane from another identity is refused.
    certificate: Option<Vec<u8>>,
    demand: Lane,
    /// Lane i at index i - 1.
    bulk: Vec<Option<Lane>>,
    /// The deadline of the next lane …
    deadline: Instant,
    /// … and of the last lane, however many arrive.
    until: Instant,
    /// The source has sent data on the demand lane, to be read later: its end is invisible then.
    has_spoken: bool,
}

#[derive(Clone, Copy)]
enum PollTarget {
    Stranger,
    Pending(usize),
    Session,
}

impl LaneAcceptor {
    pub(super) fn new(
        listener: Listener,
        guard: Arc<ServerAuth>,
        terms: AdmissionPolicy,
        output: &Output,
    ) -> LaneAcceptor {
        LaneAcceptor {
            listener: Some(listener),
            guard,
            terms,
            output: output.clone(),
            pending: VecDeque::new(),
            session: None,
            known: None,
        }
    }

    /// A door for a session that has begun, at the first address or another one.
    pub(in crate::destination) fn of_session(
        listener: Listener,
        guard: Arc<ServerAuth>,
        hello: &Hello,
        certificate: Option<Vec<u8>>,
        output: &Output,
    ) -> LaneAcceptor {
        let door = LaneAcceptor::new(listener, guard, AdmissionPolicy::of_session(hello), output);
        LaneAcceptor { known: Some(Known::new(hello, certificate)), ..door }
    }

    /// A door for a session that has begun, with one connection a lane.
    pub(in crate::destination) fn of_connections(
        sockets: Vec<OwnedFd>,
        guard: Arc<ServerAuth>,
        hello: &Hello,
        certificate: Option<Vec<u8>>,
        output: &Output,
    ) -> LaneAcceptor {
        let mut door = LaneAcceptor {
            listener: None,
            guard,
            terms: AdmissionPolicy::of_session(hello),
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

    /// Stops listening.
    pub(in crate::destination) fn is_of_connections(&self) -> bool {
        self.listener.is_none()
    }

    /// Given connections are usable only together: false when one is lost.
    pub(in crate::destination) fn has_all(&self) -> bool {
        let of_session = |session: &Session| 1 + session.bulk.iter().flatten().count();
        let count = self.pending.len() + self.session.as_ref().map_or(0, of_session);
        count == usize::from(self.terms.lanes_max) + 1
    }

    /// The session has begun: from now on only lanes that replace its lost ones are accepted.
    pub(super) fn begun(&mut self, lanes: &Lanes) {
        self.known = Some(Known::new(&lanes.hello, lanes.certificate.clone()));
    }

    /// Whether the session that has begun needs lanes; if not, the reason.
    pub(in crate::destination) fn set_refusal(&mut self, refusal: Option<Refusal>) {
        if let Some(known) = &mut self.known {
            known.refusal = refusal;
        }
    }

    /// Descriptors to poll; when one is ready, [`answer`](LaneAcceptor::answer) takes its index.
    pub(in crate::destination) fn fds(&self) -> Vec<Interest<'_>> {
        self.poll_targets().into_iter().map(|(_, interest)| interest).collect()
    }

    fn poll_targets(&self) -> Vec<(PollTarget, Interest<'_>)> {
        let session = self.session.iter().filter(|session| !session.has_spoken);
        let session = session
            .map(|session| (PollTarget::Session, (session.demand.as_fd(), PollFlags::POLLIN)));
        let pending = self.pending.iter().enumerate();
        let pending = pending.map(|(i, p)| (PollTarget::Pending(i), p.opening.interest()));
        // The listener comes last, so that no other index depends on whether it is polled.
        let listener = self.listener.iter().filter_map(Listener::interest);
        let stranger = listener.map(|fd| (PollTarget::Stranger, (fd, PollFlags::POLLIN)));
        session.chain(pending).chain(stranger).collect()
    }

    pub(in crate::destination) fn answer(&mut self, index: usize) -> Result<()> {
        match self.poll_targets().get(index) {
            Some((PollTarget::Stranger, _)) => self.accept_connection(),
            Some(&(target, _)) => {
                self.read_hello(target);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// All lanes of a session, once they have arrived.
    pub(in crate::destination) fn whole(&mut self) -> Option<Lanes> {
        self.session.take_if(|session| session.is_whole()).map(Session::into_lanes)
    }

    pub(in crate::destination) fn next_deadline(&self) -> Option<Instant> {
        let session = self.session.iter().map(|session| session.deadline);
        let listener = self.listener.iter().filter_map(Listener::deadline);
        let pending = self.pending.iter().filter_map(|pending| pending.deadline);
        pending.chain(session).chain(listener).min()
    }

    fn accept_connection(&mut self) -> Result<()> {
        let Some(listener) = &mut self.listener else { return Ok(()) };
        let socket = match listener.accept()? {
            Accepted::One(socket) => socket,
            Accepted::Gone => return Ok(()),
            // A connection that has had time is dropped for its descriptor; without one the accept is only tried again
            // later.
            Accepted::NoRoom(error) => {
                match self.pending.pop_front() {
                    Some(_) => self.ignored(&format!("it had not sent its hello: {error}")),
                    None => listener.leave(),
                }
                return Ok(());
            }
        };
        if self.pending.len() == PENDING_MAX {
            self.pending.pop_front();
            self.ignored("newer connections arrived before it had sent its hello");
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

    fn read_hello(&mut self, target: PollTarget) {
        let index = match target {
            PollTarget::Pending(index) => index,
            PollTarget::Session => return self.look_after_session(),
            PollTarget::Stranger => return,
        };
        let Pending { opening, deadline } = self.pending.remove(index).expect("it is there");
        match opening.advance(&self.guard) {
            Ok(Progress::Waits(opening)) => {
                let now_has = || Instant::now() + HELLO_TIMEOUT;
                let deadline = deadline.or_else(|| opening.has_begun().then(now_has));
                self.pending.insert(index, Pending { opening, deadline });
            }
            Ok(Progress::Opened(opened)) => self.greet(opened),
            Err(why) => self.ignored(&why),
        }
    }

    /// A lane with its hello.
    fn greet(&mut self, opened: Opened) {
        let Opened { lane, hello, answer, certificate } = opened;
        let refused = |why: &'static str| Err((FaultCode::Refused, Cow::Borrowed(why)));
        let may_come = match &mut self.known {
            None if hello.epoch > 0 => refused("this side has no migration to continue"),
            None => Ok(()),
            Some(known) if !known.is_of_session(&hello) => refused(ANOTHER),
            Some(known) if known.certificate != certificate => refused(SOMEBODY_ELSE),
            Some(Known { refusal: Some(refusal), .. }) => Err(refusal.clone()),
            Some(known) if hello.role == LaneRole::Demand => {
                // Lanes of a later attempt end those of an earlier one, which are refused from then on.
                let is_later = hello.epoch > known.epoch;
                if is_later {
                    known.epoch = hello.epoch;
                    self.session = None;
                }
                if is_later { Ok(()) } else { refused("another attempt was later") }
            }
            Some(_) => Ok(()),
        };
        if let Err((code, why)) = may_come {
            return lane::refuse(&lane, code, &why);
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
        // The lane is accepted: threads and priority are for lanes of the session alone.
        let mut lane = match self.guard.seat(lane, hello.role, hello.index) {
            Ok(lane) => lane,
            Err(error) => return self.ignored(&error.to_string()),
        };
        let ours = self.terms.capabilities();
        if secure::welcome(&mut lane, &hello, ours, answer.as_ref()).is_err() {
            return;
        }
        match (place, &mut self.session) {
            (Some(place), Some(session)) => {
                session.bulk[place] = Some(lane);
                session.deadline = session.until.min(Instant::now() + HELLO_TIMEOUT);
            }
            _ => self.session = Some(Session::new(lane, hello, certificate)),
        }
    }

    /// The demand lane of an incomplete session is readable: usually because it was closed.
    fn look_after_session(&mut self) {
        let Some(session) = &mut self.session else { return };
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(session.demand.as_fd().as_raw_fd(), &mut [0], flags) {
            Ok(1..) => session.has_spoken = true,
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // A source that tries whether it is admitted, before its guest comes (`umem migrate --listen`).
            Ok(0) if session.bulk.iter().all(Option::is_none) => self.session = None,
            Ok(0) | Err(_) => {
                self.session = None;
                self.ignored("its demand lane closed before all of its lanes had arrived");
            }
        }
    }

    pub(in crate::destination) fn forget_late(&mut self, now: Instant) {
        let before = self.pending.len();
        self.pending.retain(|pending| pending.deadline.is_none_or(|deadline| deadline > now));
        for _ in self.pending.len()..before {
            self.ignored("it did not send its hello");
        }
        if let Some(session) = self.session.take_if(|session| session.deadline <= now) {
            let what = "not all of its lanes have arrived";
            let demand = &session.demand;
            lane::tell(&demand.socket(), demand.is_checked(), &lost(demand, what));
            self.ignored(what);
        }
    }

    fn ignored(&self, why: &str) {
        self.output.remark(&format!("ignored a connection: {why}"));
    }
}

impl Session {
    fn new(demand: Lane, hello: Hello, certificate: Option<Vec<u8>>) -> Session {
        let bulk = (0..hello.bulk_lanes).map(|_| None).collect();
        let now = Instant::now();
        let (deadline, until) = (now + HELLO_TIMEOUT, now + SESSION_TIMEOUT);
        Session { hello, certificate, demand, bulk, deadline, until, has_spoken: false }
    }

    /// The slot of a lane, if it is one of the session that has not arrived.
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
const SOMEBODY_ELSE: &str = "this migration began with another certificate and accepts no other";

fn refuse(lane: &Lane) {
    lane::refuse(lane, FaultCode::Refused, ANOTHER);
}
