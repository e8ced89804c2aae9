//! The receiver of one lane: says where the next bytes go, takes note of those that came, and says
//! what they meant.
//!
//! It stands between a socket and guest memory, and its twist is that it never sees a page: a data
//! run's bytes go from the socket straight into the guest's memory, so the receiver only counts
//! them, and for that to be right the caller must never read past the end of a header or body. The
//! caller asks [`Receiver::next_target`] before each receive and reads no more than it says. At the
//! source no pages ever arrive: there, and only there, reading ahead is safe.
//!
//! ```text
//!               control(32)               landed(n) … whole
//!   [header ....... ] --RunBegins--> [run .........] --Data--> [header ........]
//!        |  ^
//!        |  +------ control(body), its event ------ [body ......]
//!        +----- a body is announced -------------------^
//! ```
//!
//! The loop, for either side:
//!
//! ```text
//! loop {
//!     match receiver.next_target() {
//!         Control { exact } => receive at most `exact` bytes (source: any number), control(them)
//!         Run(to)           => receive at most `to.bytes` bytes into the page, landed(how many)
//!     }
//!     while let Some(event) = receiver.poll_event() { … }     // all, before the next receive
//! }
//! ```
//!
//! After the last byte of a run the next target is always a whole header,
//! `Control { exact: HEADER_BYTES }`: whatever the run was, a ring may link the receive of the next
//! header behind the receive of the run before either has completed.
//!
//! On a checked lane ([`Receiver::checked`]) the caller says what a run's pages add up to
//! ([`Receiver::verify`]) once all of it has come, and before the last byte of it counts as landed.
//!
//! **Invariant:** what is still to come is at least one byte, at most its limit, and belongs to a
//! frame that may come on this lane now: an unfinished run lies inside a known region at the
//! destination, and an unfinished body holds no more memory than 4 KiB, or than bytes came for it
//! (twice, as vectors grow). [`Receiver::assert_invariants`] asserts it. Once a call has failed the lane is of
//! no more use, and every later call fails the same way.

use crate::checksum::{Checker, SUMMED_BYTES, body_sum, run_sum};
use crate::error::ReceiveError;
use crate::fault::Fault;
use crate::frame::{Body, Content, Frame, HEADER_BYTES, Head, Header, Kind, Totals};
use crate::hello::LaneRole;
use crate::limits::*;
use crate::region::{PageRange, RegionId, RegionTable};
use crate::resume::{Account, Standing};
use std::collections::VecDeque;

/// Where the next bytes of the lane go.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// To [`Receiver::control`].
    Control {
        /// Bytes that the current header or body still wants: at the destination not one more may
        /// be read. Zero only after an error.
        exact: usize,
    },
    /// Into guest memory, then [`Receiver::landed`].
    Run(RunTarget),
}

/// Where in guest memory the current run goes on.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct RunTarget {
    /// The region, in the source's numbers.
    pub region: RegionId,
    /// Bytes from the start of the region.
    pub byte_offset: u64,
    /// Bytes of the run still to come, at least one.
    pub bytes: u64,
}

/// What has happened on a lane. Region numbers are the source's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A data run's header came: its pages may be claimed before a byte of them lands.
    RunBegins(PageRange),
    /// Every byte of the run that began last has landed.
    Data(PageRange),
    /// These pages are zeroes.
    Zero(PageRange),
    /// These pages are not in the source's file.
    Hole(PageRange),
    /// The destination waits for these pages, 1 to [`REQUEST_ENTRIES_MAX`] of them; all exist.
    Request(Vec<(RegionId, u64)>),
    /// The destination has made these pages its own.
    Ack(PageRange),
    /// The source's table of regions. Pages are spoken of once the caller has answered it and told
    /// this receiver the landing table ([`Receiver::set_regions`]).
    Regions(RegionTable),
    /// See [`Frame::Ready`]. The landing table, in which this receiver counts pages from here on.
    Ready(RegionTable),
    /// See [`Frame::Stopped`].
    Stopped {
        /// Whether pages are sent after the switchover.
        postcopy: bool,
        /// Whether pages are sent that nobody asked for.
        background: bool,
    },
    /// The next piece of device state, 1 to [`STATE_CHUNK_BYTES_MAX`] bytes.
    DeviceState(Vec<u8>),
    /// See [`Frame::Load`].
    Load {
        /// Bytes in all pieces of the device state.
        state_bytes: u64,
    },
    /// See [`Frame::Loaded`].
    Loaded,
    /// See [`Frame::Switchover`].
    Switchover {
        /// µs since the source's guest stopped.
        stopped_us: u64,
    },
    /// See [`Frame::Running`].
    Running {
        /// µs since the switchover frame arrived there.
        us_since_switchover: u64,
    },
    /// Nothing more comes on this lane.
    LaneEnd,
    /// See [`Frame::Complete`].
    Complete(Totals),
    /// See [`Frame::Resume`].
    Resume(Standing),
    /// See [`Frame::Have`]; each page is spoken of once, in order.
    Have {
        /// The pages.
        range: PageRange,
        /// A bit each, words of 64.
        words: Vec<u64>,
    },
    /// See [`Frame::Digests`]: one for each region.
    Digests(Vec<u64>),
    /// The last have frame has come: every page has been spoken of.
    Accounted,
    /// To be answered with a pong of this number.
    Ping(u64),
    /// The answer to the ping of this number.
    Pong(u64),
    /// The peer gives up.
    Error(Fault),
}

impl Event {
    /// The event's name, for messages.
    pub fn name(&self) -> &'static str {
        let kind = match self {
            Event::RunBegins(_) => return "the start of a data run",
            Event::Accounted => return "the end of an account",
            Event::Data(_) => Kind::Data,
            Event::Zero(_) => Kind::Zero,
            Event::Hole(_) => Kind::Hole,
            Event::Request(_) => Kind::Request,
            Event::Ack(_) => Kind::Ack,
            Event::Regions(_) => Kind::Regions,
            Event::Ready(_) => Kind::Ready,
            Event::Stopped { .. } => Kind::Stopped,
            Event::DeviceState(_) => Kind::DeviceState,
            Event::Load { .. } => Kind::Load,
            Event::Loaded => Kind::Loaded,
            Event::Switchover { .. } => Kind::Switchover,
            Event::Running { .. } => Kind::Running,
            Event::LaneEnd => Kind::LaneEnd,
            Event::Complete(_) => Kind::Complete,
            Event::Resume(_) => Kind::Resume,
            Event::Have { .. } => Kind::Have,
            Event::Digests(_) => Kind::Digests,
            Event::Ping(_) => Kind::Ping,
            Event::Pong(_) => Kind::Pong,
            Event::Error(_) => Kind::Error,
        };
        kind.name()
    }
}

/// One end of one lane, from the end of its hello on. See the [module](self) for its use.
#[derive(Debug)]
pub struct Receiver {
    lane: Lane,
    /// The source's table, offered and not answered (at the source), or come (at the destination).
    offered: Option<RegionTable>,
    /// The landing table.
    regions: Option<RegionTable>,
    /// What the destination has to say before all else, on a lane that replaces a lost one.
    account: Option<Account>,
    /// On a lane that is checked.
    checker: Option<Checker>,
    state: State,
    events: VecDeque<Event>,
    /// Room for the next body and the next request's pages, so that requests allocate nothing.
    spare: Spare,
}

/// What bodies and requests were in, empty.
#[derive(Debug, Default)]
struct Spare {
    body: Vec<u8>,
    pages: Vec<(RegionId, u64)>,
}

/// Larger bodies than this are not kept for: requests are smaller.
const SPARE_BYTES_MAX: usize = 4096;

/// Which end of which lane this is: together with the kind it decides what may come.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Lane {
    AtSource(LaneRole),
    AtDestination(LaneRole),
    /// A bulk lane at the destination, after its end.
    Ended,
}

/// What is arriving.
#[derive(Debug)]
enum State {
    Header {
        bytes: [u8; HEADER_BYTES],
        filled: usize,
    },
    Body {
        kind: Kind,
        body: Body,
        bytes: Vec<u8>,
        sum: Option<u32>,
    },
    /// With the sum that its pages must have, until they are known to.
    Run {
        range: PageRange,
        target: RunTarget,
        sum: Option<u32>,
    },
    Failed(ReceiveError),
}

impl State {
    const NEXT_HEADER: State = State::Header { bytes: [0; HEADER_BYTES], filled: 0 };
}

impl Receiver {
    /// The source's end of the demand lane, where `table` is offered: ready is the answer to it, and
    /// gives the landing table.
    pub fn for_source(table: &RegionTable) -> Receiver {
        let receiver = Receiver::new(Lane::AtSource(LaneRole::Demand));
        Receiver { offered: Some(table.clone()), ..receiver }
    }

    /// The source's end of a bulk lane, on which only acknowledgements, pings and errors come.
    pub fn for_source_bulk() -> Receiver {
        Receiver::new(Lane::AtSource(LaneRole::Bulk))
    }

    /// The source's end of a demand lane that replaces a lost one: what the destination says first is
    /// where it stands and what it has.
    pub fn for_resumed_source(landing: &RegionTable) -> Receiver {
        let receiver = Receiver::new(Lane::AtSource(LaneRole::Demand));
        let (regions, account) = (Some(landing.clone()), Some(Account::Standing));
        Receiver { regions, account, ..receiver }
    }

    /// The destination's end of a demand lane that replaces a lost one: the regions are agreed on.
    pub fn for_resumed_destination(landing: &RegionTable) -> Receiver {
        let receiver = Receiver::new(Lane::AtDestination(LaneRole::Demand));
        let (offered, regions) = (Some(landing.clone()), Some(landing.clone()));
        Receiver { offered, regions, ..receiver }
    }

    /// The destination's end of a lane. It needs [`Receiver::set_regions`] before the first page
    /// comes, which is after the destination sent its ready.
    pub fn for_destination(role: LaneRole) -> Receiver {
        Receiver::new(Lane::AtDestination(role))
    }

    fn new(lane: Lane) -> Receiver {
        // At the destination a call makes two events at most (an empty queue, then one frame).
        let events = VecDeque::with_capacity(4);
        let state = State::NEXT_HEADER;
        let (offered, regions, account, checker) = (None, None, None, None);
        let spare = Spare::default();
        Receiver { lane, offered, regions, account, checker, state, events, spare }
    }

    /// The same receiver; if both ends of the lane can, it checks everything that comes. To be said before
    /// the first byte.
    #[must_use]
    pub fn checked(self, checked: bool) -> Receiver {
        Receiver { checker: checked.then(Checker::default), ..self }
    }

    /// Whether the lane is checked: runs have to be verified.
    pub fn is_checked(&self) -> bool {
        self.checker.is_some()
    }

    /// Gives the receiver the landing table, whose numbers travel: required before pages, requests
    /// or acknowledgements may come. The source's end of the demand lane finds it itself.
    pub fn set_regions(&mut self, regions: &RegionTable) {
        self.regions = Some(regions.clone());
    }

    /// Where the next bytes go.
    pub fn next_target(&self) -> Target {
        match &self.state {
            State::Header { filled, .. } => Target::Control { exact: HEADER_BYTES - filled },
            State::Body { body, bytes, .. } => Target::Control { exact: body.bytes - bytes.len() },
            State::Run { target, .. } => Target::Run(*target),
            State::Failed(_) => Target::Control { exact: 0 },
        }
    }

    /// Takes bytes of headers and bodies: at the destination no more than the target's `exact`, at
    /// the source any number (they make one event per 32 bytes at most). When it fails, the events
    /// of the frames before the wrong one can still be polled.
    pub fn control(&mut self, bytes: &[u8]) -> Result<(), ReceiveError> {
        self.check_feed(bytes.len()).and_then(|()| self.feed(bytes)).map_err(|e| self.fail(e))
    }

    /// Whether the current run's pages, all of them, are as they were sent: given the
    /// [`page_sum`](crate::checksum::page_sum) of each [`SUMMED_BYTES`] of them in order. They must not be
    /// used if not. Without a run, or on a lane that is not checked, there is nothing to ask about.
    ///
    /// [`SUMMED_BYTES`]: crate::checksum::SUMMED_BYTES
    pub fn verify(&mut self, sums: &[u32]) -> Result<(), ReceiveError> {
        let State::Run { range, sum: expected @ Some(_), .. } = &mut self.state else {
            return Ok(());
        };
        let range = *range;
        let region = self.regions.as_ref().and_then(|regions| regions.get(range.region));
        let wanted_bytes = range.pages << region.expect("a run needs its region").page_size.shift();
        let given_bytes = sums.len() as u64 * SUMMED_BYTES as u64;
        if given_bytes != wanted_bytes {
            return Err(self.fail(ReceiveError::Misfed { wanted_bytes, given_bytes }));
        }
        if expected.take() == Some(run_sum(sums)) {
            return Ok(());
        }
        Err(self.fail(ReceiveError::RunSum { range }))
    }

    /// Notes that bytes of the current run are in memory, no more than the target's.
    pub fn landed(&mut self, bytes: u64) -> Result<(), ReceiveError> {
        let wanted_bytes = match &self.state {
            State::Failed(error) => return Err(error.clone()),
            State::Run { target, .. } => target.bytes,
            State::Header { .. } | State::Body { .. } => 0,
        };
        let State::Run { range, target, sum } = &mut self.state else {
            return Err(self.fail(ReceiveError::Misfed { wanted_bytes, given_bytes: bytes }));
        };
        if bytes > wanted_bytes {
            return Err(self.fail(ReceiveError::Misfed { wanted_bytes, given_bytes: bytes }));
        }
        if sum.is_some() && bytes == wanted_bytes {
            let range = *range;
            return Err(self.fail(ReceiveError::Unchecked { range }));
        }
        target.byte_offset += bytes;
        target.bytes -= bytes;
        if target.bytes == 0 {
            self.events.push_back(Event::Data(*range));
            self.state = State::NEXT_HEADER;
        }
        Ok(())
    }

    /// The next thing that has happened, in the lane's order. Drain them before the next receive.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Takes a request's pages back when they are not needed any more; the next request is put there.
    pub fn give_back(&mut self, mut pages: Vec<(RegionId, u64)>) {
        pages.clear();
        self.spare.pages = pages;
    }

    /// Whether the lane's end has come: the peer may close it, and nothing is lost.
    pub fn is_ended(&self) -> bool {
        self.lane == Lane::Ended
    }

    /// Whether the lane is between two frames: the only place where a peer may close it.
    pub fn is_between_frames(&self) -> bool {
        matches!(self.state, State::Header { filled: 0, .. })
    }

    /// Notes that the peer closed the lane, which is an error inside a frame.
    pub fn closed(&mut self) -> Result<(), ReceiveError> {
        let missing_bytes = match self.next_target() {
            _ if self.is_between_frames() => return Ok(()),
            Target::Control { exact } => exact as u64,
            Target::Run(target) => target.bytes,
        };
        Err(self.fail(ReceiveError::Truncated { missing_bytes }))
    }

    /// Asserts what the module says always holds. Called after every step in tests and debug
    /// builds.
    pub fn assert_invariants(&self) {
        match &self.state {
            State::Header { filled, .. } => assert!(*filled < HEADER_BYTES),
            State::Body { body, bytes, .. } => {
                assert!(bytes.len() < body.bytes && body.bytes <= BODY_BYTES_MAX);
                let grown = body.bytes.min(2 * bytes.len());
                assert!(bytes.capacity() <= grown.max(SPARE_BYTES_MAX));
            }
            State::Run { range, target, sum } => {
                assert!(sum.is_none() || self.is_checked());
                assert_eq!(range.region, target.region);
                let Lane::AtDestination(_) = self.lane else { panic!("a run at {:?}", self.lane) };
                let regions = self.regions.as_ref().expect("a run needs regions");
                let region = regions.get(range.region).expect("a run needs its region");
                assert!(regions.check(*range).is_ok());
                assert!(range.pages <= region.page_size.run_pages_max());
                let end = (range.first + range.pages) << region.page_size.shift();
                assert!(target.bytes > 0 && target.byte_offset + target.bytes == end);
                assert!(target.byte_offset >= range.first << region.page_size.shift());
            }
            State::Failed(_) => {}
        }
    }

    fn check_feed(&self, given: usize) -> Result<(), ReceiveError> {
        let wanted = match (&self.state, self.lane, self.next_target()) {
            (State::Failed(error), _, _) => return Err(error.clone()),
            (_, Lane::AtSource(_), _) => return Ok(()),
            (_, _, Target::Control { exact }) => exact,
            (_, _, Target::Run(_)) => 0,
        };
        if given <= wanted {
            return Ok(());
        }
        Err(ReceiveError::Misfed { wanted_bytes: wanted as u64, given_bytes: given as u64 })
    }

    fn feed(&mut self, mut bytes: &[u8]) -> Result<(), ReceiveError> {
        while !bytes.is_empty() {
            let Target::Control { exact } = self.next_target() else {
                unreachable!("a run at the source, or bytes past the header at the destination");
            };
            let (now, later) = bytes.split_at(bytes.len().min(exact));
            bytes = later;
            self.feed_some(now)?;
        }
        if cfg!(debug_assertions) {
            self.assert_invariants();
        }
        Ok(())
    }

    /// Takes at least one byte and at most what the current header or body wants.
    fn feed_some(&mut self, bytes: &[u8]) -> Result<(), ReceiveError> {
        match &mut self.state {
            State::Header { bytes: header, filled } => {
                header[*filled..*filled + bytes.len()].copy_from_slice(bytes);
                *filled += bytes.len();
                if *filled == HEADER_BYTES {
                    let sum = self.checker.as_mut().map(|checker| checker.open(header));
                    let sum = sum.transpose()?;
                    let header = Header::decode(header)?;
                    self.state = self.begin(header, sum)?;
                }
            }
            State::Body { kind, body, bytes: received, sum } => {
                grow(received, bytes.len(), body.bytes);
                received.extend_from_slice(bytes);
                if received.len() == body.bytes {
                    if sum.is_some_and(|sum| sum != body_sum(received)) {
                        return Err(ReceiveError::BodySum { kind: *kind });
                    }
                    let (body, received) = (*body, std::mem::take(received));
                    self.state = State::NEXT_HEADER;
                    self.finish(body, received)?;
                }
            }
            State::Run { .. } | State::Failed(_) => unreachable!("these want no control bytes"),
        }
        Ok(())
    }

    /// A header is whole, and right where there are sums, `sum` that of what follows it: what comes next?
    fn begin(&mut self, header: Header, sum: Option<u32>) -> Result<State, ReceiveError> {
        self.lane.check(header.kind)?;
        self.check_account(header.kind)?;
        match header.head()? {
            Head::Whole(frame) => {
                self.whole(frame)?;
                Ok(State::NEXT_HEADER)
            }
            Head::Body(Body { bytes: 0, content: Content::Fault(code) }) => {
                self.events.push_back(Event::Error(Fault { code, text: String::new() }));
                Ok(State::NEXT_HEADER)
            }
            Head::Body(body) => {
                if let (Content::Have(range), Some(account)) = (body.content, &self.account) {
                    self.check_pages(Kind::Have, range)?;
                    account.check_range(range, self.regions.as_ref().expect("just checked"))?;
                }
                Ok(State::Body {
                    kind: header.kind,
                    body,
                    bytes: std::mem::take(&mut self.spare.body),
                    sum,
                })
            }
            Head::Data(range) => {
                let target = self.run_target(range)?;
                self.events.push_back(Event::RunBegins(range));
                Ok(State::Run { range, target, sum })
            }
        }
    }

    /// A body is whole.
    fn finish(&mut self, body: Body, bytes: Vec<u8>) -> Result<(), ReceiveError> {
        if body.content == Content::DeviceState {
            self.events.push_back(Event::DeviceState(bytes));
            return Ok(());
        }
        let frame = body.frame(&bytes, &mut self.spare.pages)?;
        if bytes.capacity() <= SPARE_BYTES_MAX {
            self.spare.body = bytes;
            self.spare.body.clear();
        }
        self.whole(frame)
    }

    /// A frame is whole: checks the pages it speaks of, and turns it into its event.
    fn whole(&mut self, frame: Frame) -> Result<(), ReceiveError> {
        let event = match frame {
            Frame::Data(_) | Frame::DeviceState { .. } => {
                unreachable!("these have states and events of their own")
            }
            Frame::Zero(range) => {
                self.check_pages(Kind::Zero, range)?;
                Event::Zero(range)
            }
            Frame::Hole(range) => {
                self.check_pages(Kind::Hole, range)?;
                Event::Hole(range)
            }
            Frame::Ack(range) => {
                self.check_pages(Kind::Ack, range)?;
                Event::Ack(range)
            }
            Frame::Request(pages) => {
                for &(region, first) in &pages {
                    self.check_pages(Kind::Request, PageRange { region, first, pages: 1 })?;
                }
                Event::Request(pages)
            }
            Frame::Regions(table) => {
                if self.offered.is_some() {
                    return Err(ReceiveError::RegionsTwice);
                }
                self.offered = Some(table.clone());
                Event::Regions(table)
            }
            Frame::LaneEnd => {
                self.lane = Lane::Ended;
                Event::LaneEnd
            }
            Frame::Ready(units) => {
                let offered = self.offered.take().ok_or(ReceiveError::ReadyUnasked)?;
                let landing = offered.with_units(&units).map_err(ReceiveError::Units)?;
                self.set_regions(&landing);
                Event::Ready(landing)
            }
            Frame::Stopped { postcopy, background } => Event::Stopped { postcopy, background },
            Frame::Load { state_bytes } => Event::Load { state_bytes },
            Frame::Loaded => Event::Loaded,
            Frame::Switchover { stopped_us } => Event::Switchover { stopped_us },
            Frame::Running { us_since_switchover } => Event::Running { us_since_switchover },
            Frame::Complete(totals) => Event::Complete(totals),
            Frame::Resume(standing) => {
                self.account = Some(Account::Pages { region: RegionId(0), first: 0 });
                Event::Resume(standing)
            }
            Frame::Have { range, words } => {
                let regions = self.regions.as_ref().expect("a resumed lane has its regions");
                self.account = Account::heard(range, regions);
                self.events.push_back(Event::Have { range, words });
                if self.account.is_some() {
                    return Ok(());
                }
                Event::Accounted
            }
            Frame::Digests(digests) => {
                let kind = Kind::Digests;
                let regions = self.regions.as_ref().ok_or(ReceiveError::NoRegions { kind })?.len();
                if digests.len() != regions {
                    return Err(ReceiveError::DigestCount { digests: digests.len(), regions });
                }
                Event::Digests(digests)
            }
            Frame::Ping(number) => Event::Ping(number),
            Frame::Pong(number) => Event::Pong(number),
            Frame::Error(fault) => Event::Error(fault),
        };
        self.events.push_back(event);
        Ok(())
    }

    /// Whether a kind of frame fits what the destination has to say first, if it has to.
    fn check_account(&self, kind: Kind) -> Result<(), ReceiveError> {
        match &self.account {
            Some(account) => account.check(kind),
            None if matches!(kind, Kind::Resume | Kind::Have) => {
                Err(ReceiveError::NotResuming { kind })
            }
            None => Ok(()),
        }
    }

    fn check_pages(&self, kind: Kind, range: PageRange) -> Result<(), ReceiveError> {
        let regions = self.regions.as_ref().ok_or(ReceiveError::NoRegions { kind })?;
        regions.check(range).map_err(|error| ReceiveError::Pages { kind, error })
    }

    /// Where a data run begins, once it is known to be inside its region and within its limit.
    fn run_target(&self, range: PageRange) -> Result<RunTarget, ReceiveError> {
        let kind = Kind::Data;
        let regions = self.regions.as_ref().ok_or(ReceiveError::NoRegions { kind })?;
        regions.check(range).map_err(|error| ReceiveError::Pages { kind, error })?;
        let region = regions.get(range.region).expect("checked");
        let pages_max = match self.is_checked() {
            true => region.page_size.checked_run_pages_max(),
            false => region.page_size.run_pages_max(),
        };
        if range.pages > pages_max {
            return Err(ReceiveError::RunLength { range, pages_max });
        }
        let shift = region.page_size.shift();
        Ok(RunTarget {
            region: range.region,
            byte_offset: range.first << shift,
            bytes: range.pages << shift,
        })
    }

    fn fail(&mut self, error: ReceiveError) -> ReceiveError {
        self.state = State::Failed(error.clone());
        error
    }
}

impl Lane {
    /// Whether a kind of frame may come here.
    fn check(self, kind: Kind) -> Result<(), ReceiveError> {
        let (way, lanes) = route(kind);
        let (role, way_here) = match self {
            Lane::Ended if kind == Kind::Error => return Ok(()),
            Lane::Ended => return Err(ReceiveError::AfterEnd { kind }),
            Lane::AtSource(role) => (role, Way::ToSource),
            Lane::AtDestination(role) => (role, Way::ToDestination),
        };
        if way != way_here && way != Way::Both {
            return Err(ReceiveError::WrongDirection { kind });
        }
        match (role, lanes) {
            (LaneRole::Demand, Lanes::Bulk) => Err(ReceiveError::WrongLane { kind, bulk: false }),
            (LaneRole::Bulk, Lanes::Demand) => Err(ReceiveError::WrongLane { kind, bulk: true }),
            _ => Ok(()),
        }
    }
}

/// Which way a kind of frame goes.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Way {
    ToDestination,
    ToSource,
    Both,
}

/// Which lanes a kind of frame goes over.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Lanes {
    Demand,
    Bulk,
    Any,
}

fn route(kind: Kind) -> (Way, Lanes) {
    match kind {
        Kind::Data | Kind::Zero | Kind::Hole => (Way::ToDestination, Lanes::Any),
        Kind::LaneEnd => (Way::ToDestination, Lanes::Bulk),
        Kind::Regions | Kind::Stopped | Kind::DeviceState | Kind::Load | Kind::Switchover => {
            (Way::ToDestination, Lanes::Demand)
        }
        Kind::Request | Kind::Ready | Kind::Loaded | Kind::Running => {
            (Way::ToSource, Lanes::Demand)
        }
        Kind::Resume | Kind::Have => (Way::ToSource, Lanes::Demand),
        Kind::Ack => (Way::ToSource, Lanes::Any),
        Kind::Complete | Kind::Digests => (Way::Both, Lanes::Demand),
        Kind::Ping | Kind::Pong | Kind::Error => (Way::Both, Lanes::Any),
    }
}

/// Makes room for `more_bytes`, at most doubling what has come, and never past the whole body.
fn grow(received: &mut Vec<u8>, more_bytes: usize, body_bytes: usize) {
    if received.capacity() - received.len() < more_bytes {
        let room = more_bytes.max(received.len()).min(body_bytes - received.len());
        received.reserve_exact(room);
    }
}

/// Every event once, for the tests of the phases.
#[cfg(test)]
pub(crate) fn one_of_each() -> Vec<Event> {
    use crate::fault::FaultCode;
    use crate::region::{PageSize, Region};
    let (region, page_size) = (RegionId(0), PageSize::SIZE_4K);
    let range = PageRange { region, first: 0, pages: 1 };
    let ram = Region { name: "ram".into(), bytes: page_size.bytes(), page_size };
    let table = RegionTable::new(vec![ram]).expect("a table");
    vec![
        Event::RunBegins(range),
        Event::Data(range),
        Event::Zero(range),
        Event::Hole(range),
        Event::Request(vec![(region, 0)]),
        Event::Ack(range),
        Event::Regions(table.clone()),
        Event::Ready(table),
        Event::Stopped { postcopy: true, background: true },
        Event::DeviceState(vec![0xa5]),
        Event::Load { state_bytes: 1 },
        Event::Loaded,
        Event::Switchover { stopped_us: 1 },
        Event::Running { us_since_switchover: 1 },
        Event::LaneEnd,
        Event::Complete(Totals::default()),
        Event::Resume(Standing { switched: true, running: Some(1), totals: Totals::default() }),
        Event::Have { range, words: vec![1] },
        Event::Accounted,
        Event::Digests(vec![5]),
        Event::Ping(1),
        Event::Pong(1),
        Event::Error(Fault::new(FaultCode::Other, "why")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::Seal;
    use crate::error::{FrameError, RegionError};
    use crate::fault::FaultCode;
    use crate::region::{PageSize, Region};
    use crate::transmit;

    const SMALL: RegionId = RegionId(0);
    const HUGE: RegionId = RegionId(1);

    /// 1024 pages of 4 KiB and 2 pages of 1 GiB.
    fn table() -> RegionTable {
        let region = |name: &str, bytes, page_size| Region { name: name.into(), bytes, page_size };
        RegionTable::new(vec![
            region("small", 4 << 20, PageSize::SIZE_4K),
            region("huge", 2 << 30, PageSize::SIZE_1G),
        ])
        .unwrap()
    }

    fn range(region: RegionId, first: u64, pages: u64) -> PageRange {
        PageRange { region, first, pages }
    }

    fn bulk() -> Receiver {
        let mut receiver = Receiver::for_destination(LaneRole::Bulk);
        receiver.set_regions(&table());
        receiver
    }

    fn source() -> Receiver {
        let mut receiver = Receiver::for_source(&table());
        receiver.control(&encoded(&Frame::Ready(table().units()))).unwrap();
        assert_eq!(drain(&mut receiver), [Event::Ready(table())]);
        receiver
    }

    fn encoded(frame: &Frame) -> Vec<u8> {
        let mut out = Vec::new();
        transmit::encode(frame, &mut out);
        out
    }

    /// Feeds a frame target by target, `step` bytes at most each time.
    fn feed(receiver: &mut Receiver, bytes: &[u8], step: usize) -> Result<(), ReceiveError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let Target::Control { exact } = receiver.next_target() else { panic!("a run") };
            let (now, later) = rest.split_at(exact.min(step).min(rest.len()));
            receiver.control(now)?;
            receiver.assert_invariants();
            rest = later;
        }
        Ok(())
    }

    fn drain(receiver: &mut Receiver) -> Vec<Event> {
        std::iter::from_fn(|| receiver.poll_event()).collect()
    }

    /// What the destination says first on a lane that replaces a lost one.
    #[test]
    fn a_resumed_lane_begins_with_an_account_of_every_page() {
        let standing = Standing { switched: true, running: None, totals: Totals::default() };
        let resume = encoded(&Frame::Resume(standing));
        let have = |region, first, pages, words: &[u64]| {
            encoded(&Frame::Have { range: range(region, first, pages), words: words.to_vec() })
        };
        let request = encoded(&Frame::Request(vec![(SMALL, 1)]));
        let fresh = || Receiver::for_resumed_source(&table());
        let mut receiver = fresh();
        let ping = encoded(&Frame::Ping(4));
        let first = have(SMALL, 0, 960, &[7; 15]);
        let rest = [have(SMALL, 960, 64, &[0]), have(HUGE, 0, 2, &[3])].concat();
        let whole = [&resume[..], &ping, &first, &rest, &request].concat();
        feed(&mut receiver, &whole, 5).unwrap();
        let events = [
            Event::Resume(standing),
            Event::Ping(4),
            Event::Have { range: range(SMALL, 0, 960), words: vec![7; 15] },
            Event::Have { range: range(SMALL, 960, 64), words: vec![0] },
            Event::Have { range: range(HUGE, 0, 2), words: vec![3] },
            Event::Accounted,
            Event::Request(vec![(SMALL, 1)]),
        ];
        assert_eq!(drain(&mut receiver), events);
        let again = feed(&mut receiver, &resume, 64);
        assert_eq!(again, Err(ReceiveError::NotResuming { kind: Kind::Resume }));

        let early = feed(&mut fresh(), &request, 64);
        assert_eq!(early, Err(ReceiveError::NotResumed { kind: Kind::Request }));
        let unsaid = feed(&mut fresh(), &first, 64);
        assert_eq!(unsaid, Err(ReceiveError::NotResumed { kind: Kind::Have }));
        let gap = [&resume[..], &have(SMALL, 64, 64, &[0])].concat();
        let order = ReceiveError::HaveOrder { range: range(SMALL, 64, 64) };
        assert_eq!(feed(&mut fresh(), &gap, 64), Err(order));
        let mut outside = fresh();
        let result =
            feed(&mut outside, &[&resume[..], &have(SMALL, 0, 1088, &[0; 17])].concat(), 9);
        assert!(matches!(result, Err(ReceiveError::Pages { kind: Kind::Have, .. })), "{result:?}");
        let normal = feed(&mut source(), &resume, 64);
        assert_eq!(normal, Err(ReceiveError::NotResuming { kind: Kind::Resume }));
    }

    #[test]
    fn a_resumed_lane_at_the_destination_has_its_regions() {
        let mut receiver = Receiver::for_resumed_destination(&table());
        let regions = feed(&mut receiver, &encoded(&Frame::Regions(table())), 64);
        assert_eq!(regions, Err(ReceiveError::RegionsTwice));
        let mut receiver = Receiver::for_resumed_destination(&table());
        feed(&mut receiver, &transmit::hole_header(range(SMALL, 3, 2)), 64).unwrap();
        assert_eq!(drain(&mut receiver), [Event::Hole(range(SMALL, 3, 2))]);
    }

    #[test]
    fn a_run_goes_straight_to_its_pages() {
        let mut receiver = bulk();
        let run = range(SMALL, 3, 2);
        assert_eq!(receiver.next_target(), Target::Control { exact: HEADER_BYTES });
        receiver.control(&transmit::data_header(run)).unwrap();
        assert_eq!(drain(&mut receiver), [Event::RunBegins(run)]);

        let target =
            |byte_offset, bytes| Target::Run(RunTarget { region: SMALL, byte_offset, bytes });
        assert_eq!(receiver.next_target(), target(12288, 8192));
        receiver.landed(1).unwrap();
        receiver.assert_invariants();
        assert_eq!(receiver.next_target(), target(12289, 8191));
        assert_eq!(drain(&mut receiver), []);
        receiver.landed(8191).unwrap();
        assert_eq!(drain(&mut receiver), [Event::Data(run)]);
        assert_eq!(receiver.next_target(), Target::Control { exact: HEADER_BYTES });
    }

    #[test]
    fn after_every_run_comes_a_whole_header() {
        let mut receiver = bulk();
        let (events, header) =
            (receiver.events.capacity(), Target::Control { exact: HEADER_BYTES });
        for pages in 1..=512 {
            receiver.control(&transmit::data_header(range(SMALL, 0, pages))).unwrap();
            receiver.landed(pages * 4096).unwrap();
            assert_eq!(receiver.next_target(), header);
            assert_eq!(drain(&mut receiver).len(), 2);
        }
        receiver.control(&transmit::data_header(range(HUGE, 1, 1))).unwrap();
        receiver.landed(1 << 30).unwrap();
        assert_eq!(receiver.next_target(), header);
        assert_eq!(receiver.events.capacity(), events, "the loop allocates nothing");
    }

    #[test]
    fn a_run_has_a_limit_and_an_unlanded_one_does_not() {
        let long = range(SMALL, 0, 513);
        let too_long = ReceiveError::RunLength { range: long, pages_max: 512 };
        assert_eq!(bulk().control(&transmit::data_header(long)), Err(too_long));
        let two = range(HUGE, 0, 2);
        let too_long = ReceiveError::RunLength { range: two, pages_max: 1 };
        assert_eq!(bulk().control(&transmit::data_header(two)), Err(too_long));

        let mut receiver = bulk();
        let whole = range(SMALL, 0, 1024);
        receiver.control(&transmit::zero_header(whole)).unwrap();
        receiver.control(&transmit::hole_header(two)).unwrap();
        assert_eq!(drain(&mut receiver), [Event::Zero(whole), Event::Hole(two)]);
    }

    #[test]
    fn pages_must_exist() {
        let outside = range(SMALL, 1024, 1);
        let error = RegionError::Outside { range: outside, region_pages: 1024 };
        for kind in [Kind::Data, Kind::Zero, Kind::Hole] {
            let header = Header::with_range(kind, outside).encode();
            let pages = ReceiveError::Pages { kind, error: error.clone() };
            assert_eq!(bulk().control(&header), Err(pages));
            let mut ignorant = Receiver::for_destination(LaneRole::Bulk);
            assert_eq!(ignorant.control(&header), Err(ReceiveError::NoRegions { kind }));
        }
        let ack = ReceiveError::Pages { kind: Kind::Ack, error };
        assert_eq!(source().control(&transmit::ack_header(outside)), Err(ack));
        let request = encoded(&Frame::Request(vec![(SMALL, 1023), (HUGE, 2)]));
        let range = range(HUGE, 2, 1);
        let error = RegionError::Outside { range, region_pages: 2 };
        let pages = ReceiveError::Pages { kind: Kind::Request, error };
        assert_eq!(source().control(&request), Err(pages));
    }

    #[test]
    fn bodies_come_in_any_pieces() {
        let frames = [
            Frame::Regions(table()),
            Frame::Stopped { postcopy: true, background: true },
            Frame::Complete(Totals { data_bytes: 1, ..Totals::default() }),
            Frame::Error(Fault::new(FaultCode::Other, "why")),
            Frame::Error(Fault::new(FaultCode::Other, "")),
        ];
        for step in 1..=64 {
            let mut receiver = Receiver::for_destination(LaneRole::Demand);
            for frame in &frames {
                feed(&mut receiver, &encoded(frame), step).unwrap();
            }
            let mut state = transmit::device_state_header(100).to_vec();
            state.extend([0xa5; 100]);
            feed(&mut receiver, &state, step).unwrap();
            assert!(receiver.is_between_frames());
            assert_eq!(
                drain(&mut receiver),
                [
                    Event::Regions(table()),
                    Event::Stopped { postcopy: true, background: true },
                    Event::Complete(Totals { data_bytes: 1, ..Totals::default() }),
                    Event::Error(Fault { code: FaultCode::Other, text: "why".into() }),
                    Event::Error(Fault { code: FaultCode::Other, text: String::new() }),
                    Event::DeviceState(vec![0xa5; 100]),
                ]
            );
        }
    }

    #[test]
    fn the_source_reads_ahead_and_the_destination_does_not() {
        let pages = vec![(SMALL, 7), (HUGE, 1)];
        let mut bytes = encoded(&Frame::Request(pages.clone()));
        bytes.extend(encoded(&Frame::Ping(1)));
        bytes.extend(&encoded(&Frame::Loaded)[..31]);
        let mut receiver = source();
        receiver.control(&bytes).unwrap();
        assert_eq!(drain(&mut receiver), [Event::Request(pages), Event::Ping(1)]);
        assert_eq!(receiver.next_target(), Target::Control { exact: 1 });

        let misfed = ReceiveError::Misfed { wanted_bytes: 32, given_bytes: 64 };
        assert_eq!(bulk().control(&[0; 64]), Err(misfed));
    }

    #[test]
    fn events_before_a_wrong_frame_remain() {
        let mut receiver = source();
        let bytes = [encoded(&Frame::Ping(1)), vec![0; 32]].concat();
        let wrong = ReceiveError::Frame(FrameError::Kind(0));
        assert_eq!(receiver.control(&bytes), Err(wrong.clone()));
        assert_eq!(drain(&mut receiver), [Event::Ping(1)]);
        assert_eq!(receiver.next_target(), Target::Control { exact: 0 });
        assert_eq!(receiver.control(&encoded(&Frame::Ping(2))), Err(wrong.clone()));
        assert_eq!(receiver.landed(1), Err(wrong));
    }

    #[test]
    fn our_own_miscounts_are_errors() {
        let misfed =
            |wanted_bytes, given_bytes| Err(ReceiveError::Misfed { wanted_bytes, given_bytes });
        assert_eq!(bulk().landed(1), misfed(0, 1));
        let mut receiver = bulk();
        receiver.control(&transmit::data_header(range(SMALL, 0, 1))).unwrap();
        assert_eq!(receiver.control(&[1]), misfed(0, 1));
        let mut receiver = bulk();
        receiver.control(&transmit::data_header(range(SMALL, 0, 1))).unwrap();
        assert_eq!(receiver.landed(4097), misfed(4096, 4097));
    }

    fn checked() -> Receiver {
        bulk().checked(true)
    }

    fn sealed_run(seal: &mut Seal, range: PageRange, sums: &[u32]) -> [u8; HEADER_BYTES] {
        let mut header = transmit::data_header(range);
        seal.data(&mut header, sums);
        header
    }

    #[test]
    fn a_run_lands_once_its_sum_is_right() {
        let (pages, sums) = (range(SMALL, 3, 2), [7, 9]);
        let begun = |receiver: &mut Receiver, seal: &mut Seal| {
            receiver.control(&sealed_run(seal, pages, &sums)).unwrap();
            assert_eq!(receiver.poll_event(), Some(Event::RunBegins(pages)));
        };
        let (mut receiver, mut seal) = (checked(), Seal::new(true));
        begun(&mut receiver, &mut seal);
        receiver.landed(5000).unwrap();
        receiver.verify(&sums).unwrap();
        receiver.landed(3192).unwrap();
        assert_eq!(drain(&mut receiver), [Event::Data(pages)]);

        begun(&mut receiver, &mut seal);
        let wrong = ReceiveError::RunSum { range: pages };
        assert_eq!(receiver.verify(&[7, 8]), Err(wrong.clone()));
        assert!(wrong.is_corruption());
        assert_eq!(receiver.landed(8192), Err(wrong));
        assert_eq!(drain(&mut receiver), []);

        let (mut receiver, mut seal) = (checked(), Seal::new(true));
        begun(&mut receiver, &mut seal);
        assert_eq!(receiver.landed(8192), Err(ReceiveError::Unchecked { range: pages }));
        let (mut receiver, mut seal) = (checked(), Seal::new(true));
        begun(&mut receiver, &mut seal);
        let misfed = ReceiveError::Misfed { wanted_bytes: 8192, given_bytes: 4096 };
        assert_eq!(receiver.verify(&[7]), Err(misfed));
    }

    #[test]
    fn requests_allocate_nothing_when_they_are_given_back() {
        let mut receiver = Receiver::for_source(&table());
        receiver.set_regions(&table());
        let mut places = Vec::new();
        for page in 0..9 {
            let pages = vec![(SMALL, page), (HUGE, 1)];
            feed(&mut receiver, &encoded(&Frame::Request(pages.clone())), 7).unwrap();
            let Some(Event::Request(came)) = receiver.poll_event() else { panic!("no request") };
            assert_eq!(came, pages);
            places.push((came.as_ptr(), receiver.spare.body.as_ptr()));
            receiver.give_back(came);
        }
        assert!(places[1..].iter().all(|place| *place == places[1]), "{places:?}");
    }

    #[test]
    fn checked_runs_are_short() {
        let (mut seal, pages) = (Seal::new(true), range(SMALL, 0, 17));
        let header = sealed_run(&mut seal, pages, &[0; 17]);
        let long = ReceiveError::RunLength { range: pages, pages_max: 16 };
        assert_eq!(checked().control(&header), Err(long));
        assert_eq!(bulk().control(&transmit::data_header(pages)), Ok(()));
    }

    /// Nothing is waited for, allocated or said because of bits that have changed.
    #[test]
    fn every_flipped_bit_of_a_checked_lane_is_found() {
        let frames = [
            Frame::Request(vec![(SMALL, 7), (HUGE, 1)]),
            Frame::Ack(range(SMALL, 0, 4)),
            Frame::Digests(vec![1, 2]),
            Frame::Error(Fault::new(FaultCode::Other, "why")),
        ];
        for frame in &frames {
            let mut bytes = encoded(frame);
            Seal::new(true).frames(&mut bytes);
            let receiver = || {
                let mut receiver = Receiver::for_source(&table()).checked(true);
                receiver.set_regions(&table());
                receiver
            };
            assert_eq!(feed(&mut receiver(), &bytes, 99), Ok(()));
            for bit in 0..8 * bytes.len() {
                let mut flipped = bytes.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                let mut receiver = receiver();
                let error = feed(&mut receiver, &flipped, 99).unwrap_err();
                assert!(error.is_corruption(), "bit {bit} of {frame:?}: {error}");
                assert_eq!(drain(&mut receiver), []);
            }
        }
        let unsealed = checked().control(&encoded(&Frame::LaneEnd));
        assert_eq!(unsealed, Err(ReceiveError::HeaderSum { number: 0 }));
    }

    #[test]
    fn each_kind_has_its_way_and_its_lanes() {
        // Letters: who accepts it. s/S source demand/bulk, d/D destination demand/bulk.
        let routes = [
            (Kind::Data, "dD"),
            (Kind::Zero, "dD"),
            (Kind::Hole, "dD"),
            (Kind::Request, "s"),
            (Kind::Ack, "sS"),
            (Kind::Regions, "d"),
            (Kind::Ready, "s"),
            (Kind::Stopped, "d"),
            (Kind::DeviceState, "d"),
            (Kind::Load, "d"),
            (Kind::Loaded, "s"),
            (Kind::Switchover, "d"),
            (Kind::Running, "s"),
            (Kind::LaneEnd, "D"),
            (Kind::Complete, "sd"),
            (Kind::Resume, "s"),
            (Kind::Have, "s"),
            (Kind::Digests, "sd"),
            (Kind::Ping, "sSdD"),
            (Kind::Pong, "sSdD"),
            (Kind::Error, "sSdD"),
        ];
        assert_eq!(routes.map(|(kind, _)| kind), Kind::ALL);
        let lanes = [
            ('s', Lane::AtSource(LaneRole::Demand)),
            ('S', Lane::AtSource(LaneRole::Bulk)),
            ('d', Lane::AtDestination(LaneRole::Demand)),
            ('D', Lane::AtDestination(LaneRole::Bulk)),
        ];
        for (kind, accepted) in routes {
            for (letter, lane) in lanes {
                let comes = lane.check(kind);
                assert_eq!(comes.is_ok(), accepted.contains(letter), "{kind} at {lane:?}");
            }
            assert_eq!(Lane::Ended.check(kind).is_ok(), kind == Kind::Error);
        }
        let wrong = ReceiveError::WrongDirection { kind: Kind::Loaded };
        assert_eq!(bulk().control(&encoded(&Frame::Loaded)), Err(wrong));
        let wrong = ReceiveError::WrongLane { kind: Kind::Load, bulk: true };
        assert_eq!(bulk().control(&encoded(&Frame::Load { state_bytes: 0 })), Err(wrong));
    }

    #[test]
    fn nothing_but_an_error_follows_the_end() {
        let mut receiver = bulk();
        receiver.control(&encoded(&Frame::LaneEnd)).unwrap();
        feed(&mut receiver, &encoded(&Frame::Error(Fault::new(FaultCode::Other, "x"))), 99)
            .unwrap();
        assert_eq!(drain(&mut receiver).len(), 2);
        assert_eq!(receiver.closed(), Ok(()));
        let after = ReceiveError::AfterEnd { kind: Kind::Ping };
        assert_eq!(receiver.control(&encoded(&Frame::Ping(0))), Err(after));
    }

    #[test]
    fn the_regions_come_once() {
        let mut receiver = Receiver::for_destination(LaneRole::Demand);
        let regions = encoded(&Frame::Regions(table()));
        feed(&mut receiver, &regions, 99).unwrap();
        assert_eq!(feed(&mut receiver, &regions, 99), Err(ReceiveError::RegionsTwice));
    }

    #[test]
    fn ready_gives_the_units_in_which_pages_are_counted() {
        let (small, huge) = (PageSize::SIZE_4K, PageSize::SIZE_1G);
        let request = |page| encoded(&Frame::Request(vec![(SMALL, page)]));
        let mut receiver = Receiver::for_source(&table());
        let early = ReceiveError::NoRegions { kind: Kind::Request };
        assert_eq!(receiver.control(&request(0)), Err(early));

        let landing = table().with_units(&[PageSize::SIZE_2M, huge]).unwrap();
        let ready = encoded(&Frame::Ready(landing.units()));
        let mut receiver = Receiver::for_source(&table());
        receiver.control(&ready).unwrap();
        receiver.control(&request(1)).unwrap();
        let events = [Event::Ready(landing), Event::Request(vec![(SMALL, 1)])];
        assert_eq!(drain(&mut receiver), events);
        let range = range(SMALL, 2, 1);
        let error = RegionError::Outside { range, region_pages: 2 };
        let outside = ReceiveError::Pages { kind: Kind::Request, error };
        assert_eq!(receiver.control(&request(2)), Err(outside));

        let mut receiver = source();
        assert_eq!(receiver.control(&ready), Err(ReceiveError::ReadyUnasked));
        for units in [&[small][..], &[small; 2], &[huge; 2], &[small, huge, huge]] {
            let mut receiver = Receiver::for_source(&table());
            let error = table().with_units(units).unwrap_err();
            let ready = encoded(&Frame::Ready(units.to_vec()));
            assert_eq!(receiver.control(&ready), Err(ReceiveError::Units(error)));
        }
    }

    #[test]
    fn a_lane_closes_between_frames() {
        assert_eq!(bulk().closed(), Ok(()));
        let mut receiver = bulk();
        let header = transmit::data_header(range(SMALL, 0, 1));
        receiver.control(&header[..20]).unwrap();
        assert_eq!(receiver.closed(), Err(ReceiveError::Truncated { missing_bytes: 12 }));
        let mut receiver = bulk();
        receiver.control(&header).unwrap();
        receiver.landed(96).unwrap();
        assert_eq!(receiver.closed(), Err(ReceiveError::Truncated { missing_bytes: 4000 }));
    }
}
