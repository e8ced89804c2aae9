//! The receiver of one lane: says where the next bytes go, counts the bytes that came, and decodes
//! them into events.
//!
//! It stands between a socket and guest memory and never sees a page: a data run's bytes go from
//! the socket straight into the guest's memory, and the receiver only counts them. So the caller
//! must never read past the end of a header or body: it asks [`Receiver::next_target`] before each
//! receive and reads no more than the target allows. At the source, and only there, reading ahead
//! is safe, as no pages arrive.
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
//! After the last byte of a run the next target is always a whole header, `Control { exact:
//! HEADER_BYTES }`: so a ring may link the receive of the next header behind the receive of any run
//! before either has completed.
//!
//! On a checked lane ([`Receiver::checked`]) the caller gives the sums of a run's pages
//! ([`Receiver::verify`]) after all of its bytes have come, and before the last byte counts as
//! landed.
//!
//! **Invariant:** the rest of the current header, body or run is at least one byte, at most its
//! limit, and belongs to a frame that may come on this lane now. At the destination an unfinished
//! run lies inside a known region. An unfinished body holds at most the larger of 4 KiB and the
//! bytes that came for it (twice, as vectors grow). [`Receiver::assert_invariants`] asserts this.
//! After a call has failed the lane is unusable, and every later call fails with the same error.

mod event;
mod lane;
mod meaning;
#[cfg(test)]
mod tests;

pub use event::Event;
#[cfg(test)]
pub(crate) use event::one_of_each;

use std::collections::VecDeque;

use crate::checksum::{Checker, SUMMED_BYTES, body_sum, run_sum};
use crate::frame::{Body, HEADER_BYTES, Header, Kind};
use crate::hello::LaneRole;
use crate::limits::*;
use crate::receive_error::ReceiveError;
use crate::region::{PageRange, RegionId, RegionTable};
use crate::resume::AccountStep;
use lane::Lane;

/// Where the next bytes of the lane go.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// To [`Receiver::control`].
    Control {
        /// Bytes that the current header or body still needs: the destination must not read more.
        /// Zero only after an error.
        exact: usize,
    },
    /// Into guest memory, then [`Receiver::landed`].
    Run(RunTarget),
}

/// The place in guest memory for the rest of the current run.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct RunTarget {
    /// The region, in the source's numbers.
    pub region: RegionId,
    /// Bytes from the start of the region.
    pub byte_offset: u64,
    /// Bytes of the run still to come, at least one.
    pub bytes: u64,
}

/// One end of one lane, from the end of its hello on. See the [module](self) for its use.
#[derive(Debug)]
pub struct Receiver {
    lane: Lane,
    /// The source's table: at the source while it waits for an answer, at the destination once it
    /// came.
    offered: Option<RegionTable>,
    /// The landing table.
    regions: Option<RegionTable>,
    /// The next part of the destination's account, on a lane that replaces a lost one.
    account: Option<AccountStep>,
    /// Present on a checked lane.
    checker: Option<Checker>,
    state: State,
    events: VecDeque<Event>,
    /// Buffers for the next body and the next request's pages, so that requests allocate nothing.
    spare: Spare,
}

/// Empty buffers of former bodies and requests.
#[derive(Debug, Default)]
struct Spare {
    body: Vec<u8>,
    pages: Vec<(RegionId, u64)>,
}

/// Larger body buffers are not kept, as requests are smaller.
const SPARE_BYTES_MAX: usize = 4096;

/// The arriving part of a frame.
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
    /// With the sum that its pages must have, until it is checked.
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
    /// The source's end of the demand lane, after it offered `table`: ready answers it, and gives
    /// the landing table.
    pub fn for_source(table: &RegionTable) -> Receiver {
        let receiver = Receiver::new(Lane::AtSource(LaneRole::Demand));
        Receiver { offered: Some(table.clone()), ..receiver }
    }

    /// The source's end of a bulk lane, on which only acknowledgements, pings and errors come.
    pub fn for_source_bulk() -> Receiver {
        Receiver::new(Lane::AtSource(LaneRole::Bulk))
    }

    /// The source's end of a demand lane that replaces a lost one: the destination first sends its
    /// standing and its pages.
    pub fn for_resumed_source(landing: &RegionTable) -> Receiver {
        let receiver = Receiver::new(Lane::AtSource(LaneRole::Demand));
        let (regions, account) = (Some(landing.clone()), Some(AccountStep::Standing));
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

    /// The same receiver, on a checked lane if `checked`, that is if both ends support checksums.
    /// To be called before the first byte.
    #[must_use]
    pub fn checked(self, checked: bool) -> Receiver {
        Receiver { checker: checked.then(Checker::default), ..self }
    }

    /// Whether the lane is checked: runs have to be verified.
    pub fn is_checked(&self) -> bool {
        self.checker.is_some()
    }

    /// Sets the landing table, whose numbers are used on the wire. Required before pages, requests
    /// or acknowledgements may come. The source's end of the demand lane derives it itself.
    pub fn set_regions(&mut self, regions: &RegionTable) {
        self.regions = Some(regions.clone());
    }

    /// The place for the lane's next bytes.
    pub fn next_target(&self) -> Target {
        match &self.state {
            State::Header { filled, .. } => Target::Control { exact: HEADER_BYTES - filled },
            State::Body { body, bytes, .. } => Target::Control { exact: body.bytes - bytes.len() },
            State::Run { target, .. } => Target::Run(*target),
            State::Failed(_) => Target::Control { exact: 0 },
        }
    }

    /// Takes bytes of headers and bodies: at the destination no more than the target's `exact`, at
    /// the source any number (they make one event per 32 bytes at most). On failure the events of
    /// the frames before the wrong one can still be polled.
    pub fn control(&mut self, bytes: &[u8]) -> Result<(), ReceiveError> {
        self.check_feed(bytes.len()).and_then(|()| self.feed(bytes)).map_err(|e| self.fail(e))
    }

    /// Checks the sum of the current run, all of which must have come, given the
    /// [`page_sum`](crate::checksum::page_sum) of each [`SUMMED_BYTES`] of its pages in order. On
    /// an error the pages must not be used. Without a run, or on an unchecked lane, does nothing.
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

    /// Counts bytes of the current run as landed, no more than the target's.
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

    /// The next event, in the lane's order. Drain all events before the next receive.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Takes a request's vector back for the next request.
    pub fn give_back(&mut self, mut pages: Vec<(RegionId, u64)>) {
        pages.clear();
        self.spare.pages = pages;
    }

    /// Whether the lane has ended: the peer may then close it without loss.
    pub fn is_ended(&self) -> bool {
        self.lane == Lane::Ended
    }

    /// Whether the lane is between two frames, the only point where a peer may close it.
    pub fn is_between_frames(&self) -> bool {
        matches!(self.state, State::Header { filled: 0, .. })
    }

    /// Notes that the peer closed the lane: an error inside a frame.
    pub fn closed(&mut self) -> Result<(), ReceiveError> {
        let missing_bytes = match self.next_target() {
            _ if self.is_between_frames() => return Ok(()),
            Target::Control { exact } => exact as u64,
            Target::Run(target) => target.bytes,
        };
        Err(self.fail(ReceiveError::Truncated { missing_bytes }))
    }

    /// Asserts the module's invariant. Called after every step in tests and debug builds.
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

    /// Takes at least one byte and at most what the current header or body needs.
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
            State::Run { .. } | State::Failed(_) => {
                unreachable!("these targets take no control bytes")
            }
        }
        Ok(())
    }

    fn fail(&mut self, error: ReceiveError) -> ReceiveError {
        self.state = State::Failed(error.clone());
        error
    }
}

/// Makes room for `more_bytes`: at most twice what has come, at most the whole body.
fn grow(received: &mut Vec<u8>, more_bytes: usize, body_bytes: usize) {
    if received.capacity() - received.len() < more_bytes {
        let room = more_bytes.max(received.len()).min(body_bytes - received.len());
        received.reserve_exact(room);
    }
}
