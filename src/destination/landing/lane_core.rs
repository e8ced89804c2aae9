//! The part of a lane's reader that every path uses.
//!
//! **Invariant:** while the lane has not failed, an operation is in flight unless the lane has ended: a receive, a
//! poll, or the timer of a pause. A pause and its timer start and end together, so that only operations started before
//! a pause complete during it. The current run is the run that the wire's receiver takes; it is verified only with
//! checksums. [`LaneCore::assert_invariants`] asserts it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use umem_ring::{Chain, Fd, Op, Ring};
use umem_wire::{Event, LaneRole, PageRange, Receiver, RunTarget, Target};

use super::{Arrived, TOKEN_RETRY};
use crate::destination::memory::{GuestMemory, PageId, RETRY_INTERVAL};
use crate::error::{Error, Result};
use crate::memory::claims::RunKind;
use crate::memory::guarded::Gone;
use crate::memory::sums;
use crate::transport::lane::Lane;

/// The receiver of a lane's results.
pub(super) trait Sink {
    /// A vCPU waits for this page, which is cached now.
    fn wake(&mut self, page: PageId);
    /// Any item of the lane; pages are in place.
    fn arrived(&mut self, arrived: Arrived) -> Result<()>;
}

/// A sink of two functions.
pub(super) struct Callbacks<W, A> {
    pub(super) wake: W,
    pub(super) arrived: A,
}

impl<W: FnMut(PageId), A: FnMut(Arrived) -> Result<()>> Sink for Callbacks<W, A> {
    fn wake(&mut self, page: PageId) {
        (self.wake)(page);
    }

    fn arrived(&mut self, arrived: Arrived) -> Result<()> {
        (self.arrived)(arrived)
    }
}

/// The state that every path uses.
pub(super) struct LaneCore {
    pub(super) name: String,
    pub(super) socket: Arc<OwnedFd>,
    pub(super) receiver: Receiver,
    pub(super) guest: Arc<GuestMemory>,
    pub(super) role: LaneRole,
    /// Pages of this lane may arrive again.
    is_in_rounds: bool,
    /// The data run whose bytes are arriving.
    pub(super) current: Option<Current>,
    pub(super) health: Health,
    /// Operations that have not completed.
    in_flight: u32,
    /// No receive starts until a timer has expired.
    pause: Option<Pause>,
    /// With checksums: the sum of the current run's pages.
    sums: Vec<u32>,
}

/// A data run whose bytes are arriving.
pub(super) struct Current {
    pub(super) range: PageRange,
    /// Its checksum is verified, and the sums of its pages are known.
    pub(super) is_verified: bool,
    /// The run is a page that has been [given](GuestMemory::give).
    pub(super) is_given: bool,
}

/// The reason of a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pause {
    /// The next run waits for room: private memory must be released first.
    Room,
    /// The rest of a run waits until the guest's events have been read.
    Events,
}

/// Whether a lane takes more bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Health {
    Good,
    /// The connection or its contents failed; operations in flight complete by themselves.
    Failed,
    /// Received bytes could not be decoded; the error has been counted.
    Unreadable,
    /// Received pages have no room: the lane is read no further. This many bytes behind the landed ones have been
    /// copied in.
    NoRoom {
        copied: usize,
    },
}

impl LaneCore {
    pub(super) fn new(
        lane: &Lane,
        receiver: Receiver,
        guest: Arc<GuestMemory>,
        role: LaneRole,
    ) -> LaneCore {
        LaneCore {
            name: lane.name.clone(),
            socket: lane.socket(),
            is_in_rounds: role == LaneRole::Bulk && guest.is_in_rounds(),
            receiver,
            guest,
            role,
            current: None,
            health: Health::Good,
            in_flight: 0,
            pause: None,
            sums: Vec::new(),
        }
    }

    pub(super) fn is_good(&self) -> bool {
        self.health == Health::Good
    }

    pub(super) fn is_out_of_room(&self) -> bool {
        matches!(self.health, Health::NoRoom { .. })
    }

    /// A call has failed. Pages that have arrived without room are dropped, and everything behind them.
    pub(super) fn failed_with(&mut self, error: &Error) {
        match (self.health, error) {
            (Health::NoRoom { .. }, _) => {}
            (_, Error::OutOfMemory(_)) => self.health = Health::NoRoom { copied: 0 },
            (Health::Good, _) => self.health = Health::Failed,
            (Health::Failed | Health::Unreadable, _) => {}
        }
    }

    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight
    }

    pub(super) fn pause(&self) -> Option<Pause> {
        self.pause
    }

    pub(super) fn socket(&self) -> Fd {
        Fd::from(self.socket.clone())
    }

    pub(super) fn submit(&mut self, ring: &mut Ring, op: Op, token: u64) -> Result<()> {
        ring.submit(op, token).map_err(|rejected| Error::Ring(rejected.error))?;
        self.in_flight += 1;
        Ok(())
    }

    /// Submits two operations, the second linked behind the first.
    pub(super) fn submit_pair(&mut self, ring: &mut Ring, pair: Chain) -> Result<()> {
        ring.submit_chain(pair).map_err(|rejected| Error::Ring(rejected.error))?;
        self.in_flight += 2;
        Ok(())
    }

    /// An operation has completed.
    pub(super) fn completed(&mut self) {
        self.in_flight -= 1;
    }

    /// Pauses, and starts the timer that ends the pause.
    pub(super) fn pause_for(&mut self, ring: &mut Ring, pause: Pause) -> Result<()> {
        assert!(self.pause.is_none(), "one timer at a time");
        self.pause = Some(pause);
        self.submit(ring, Op::timeout(RETRY_INTERVAL), TOKEN_RETRY)
    }

    /// The timer has expired; returns the reason of the pause.
    pub(super) fn end_pause(&mut self) -> Pause {
        self.pause.take().expect("a timer has its pause")
    }

    /// No vCPU waits for this run: small pages may be staged, and scarce memory is spared. A run of several pages is
    /// background on any lane.
    pub(super) fn is_background(&self, run: &RunTarget) -> bool {
        let unit_shift = self.guest.region(run.region).memory.unit_shift;
        self.role == LaneRole::Bulk || run.bytes > 1 << unit_shift
    }

    /// A run that must wait until private memory has been released.
    pub(super) fn lacks_room(&self, run: &RunTarget) -> bool {
        self.is_background(run) && !self.guest.has_room()
    }

    /// Takes bytes of a header or a body.
    pub(super) fn control(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<()> {
        let result = self.receiver.control(bytes);
        self.events(sink)?;
        result.map_err(|error| self.unreadable(&error))
    }

    /// The current run has a checksum that is not verified yet.
    pub(super) fn is_unverified(&self) -> bool {
        self.receiver.is_checked()
            && self.current.as_ref().is_some_and(|current| !current.is_verified)
    }

    /// With checksums: sums the pages of a complete run, and fails if the sum is wrong.
    pub(super) fn verify(
        &mut self,
        sum: impl FnOnce(&mut Vec<u32>) -> std::result::Result<(), Gone>,
    ) -> Result<()> {
        if !self.receiver.is_checked() {
            return Ok(());
        }
        sum(&mut self.sums).map_err(|Gone| {
            Error::Host(
                "its RAM file has been truncated, or cannot be read any more: the guest's received \
                 memory is gone"
                    .into(),
            )
        })?;
        let verified = self.receiver.verify(&self.sums);
        verified.map_err(|error| self.unreadable(&error))?;
        self.current.as_mut().expect("only a run is verified").is_verified = true;
        Ok(())
    }

    /// The pages within `bytes` of a run, from its current position.
    pub(super) fn range_of(&self, run: &RunTarget, bytes: usize) -> PageRange {
        let unit_shift = self.guest.region(run.region).memory.unit_shift;
        PageRange {
            region: run.region,
            first: run.byte_offset >> unit_shift,
            pages: bytes as u64 >> unit_shift,
        }
    }

    /// Copies in the bytes after the first `done` bytes, and moves `done` behind the bytes in place.
    pub(super) fn copy_in(
        &mut self,
        range: PageRange,
        bytes: &[u8],
        done: &mut usize,
    ) -> Result<()> {
        let copied = match self.is_in_rounds {
            true => self.guest.place_again(range, bytes, done),
            false => self.guest.place(range, bytes, done),
        };
        if let Err(Error::OutOfMemory(_)) = copied {
            self.health = Health::NoRoom { copied: *done };
        }
        copied
    }

    /// Writes bytes of a run to its file, from its current position.
    pub(super) fn write(&self, run: &RunTarget, bytes: &[u8]) -> Result<()> {
        let ram = self.guest.region(run.region).file();
        ram.write_at(bytes, run.byte_offset).map_err(|error| not_written(&ram.name, error))
    }

    /// `bytes` of the current run are in place.
    pub(super) fn landed(&mut self, bytes: usize, sink: &mut impl Sink) -> Result<()> {
        let landed = self.receiver.landed(bytes as u64);
        landed.map_err(|error| self.unreadable(&error))?;
        self.events(sink)
    }

    fn events(&mut self, sink: &mut impl Sink) -> Result<()> {
        while let Some(event) = self.receiver.poll_event() {
            match event {
                Event::RunBegins(range) => {
                    if !self.is_in_rounds {
                        self.guest.begin(range, &self.name)?;
                    }
                    self.current = Some(Current { range, is_verified: false, is_given: false });
                }
                Event::Data(range) => self.data_landed(range, sink)?,
                Event::Zero(range) => self.zeroes_landed(range, RunKind::Zero, sink)?,
                Event::Hole(range) => self.zeroes_landed(range, RunKind::Hole, sink)?,
                Event::RoundsEnd if !std::mem::take(&mut self.is_in_rounds) => {
                    return Err(Error::protocol(&self.name, "the end of rounds that it has not"));
                }
                other => sink.arrived(Arrived::Other(other))?,
            }
        }
        Ok(())
    }

    fn data_landed(&mut self, range: PageRange, sink: &mut impl Sink) -> Result<()> {
        let current = self.current.take().expect("a run has begun");
        debug_assert_eq!(current.range, range);
        if self.is_in_rounds {
            self.guest.copied(range, &self.sums);
            return Ok(());
        }
        // Before the pages are marked: the digests are read with the last page.
        if current.is_verified {
            let unit_shift = self.guest.region(range.region).memory.unit_shift;
            let first = sums::first_summed(range, unit_shift);
            self.guest.digests.add(range.region, first, &self.sums);
        }
        let last = if current.is_given {
            self.guest.finish_given(range)?
        } else {
            self.guest.finish(range, RunKind::Data, |page| sink.wake(page))?
        };
        sink.arrived(Arrived::Run { range, last })
    }

    /// A run without data, whose pages are complete with its header.
    fn zeroes_landed(
        &mut self,
        range: PageRange,
        kind: RunKind,
        sink: &mut impl Sink,
    ) -> Result<()> {
        if self.is_in_rounds {
            return self.guest.emptied(range);
        }
        self.guest.begin(range, &self.name)?;
        // Before the pages are marked, as above.
        if self.receiver.is_checked() {
            let unit_shift = self.guest.region(range.region).memory.unit_shift;
            let first = sums::first_summed(range, unit_shift);
            let pages = sums::pages_summed(range, unit_shift);
            self.guest.digests.add_zeroes(range.region, first, pages);
        }
        let last = self.guest.finish(range, kind, |page| sink.wake(page))?;
        sink.arrived(Arrived::Run { range, last })
    }

    /// After a loss, when nothing is in flight: the copied pages of an incomplete run count.
    pub(super) fn settle(&mut self, sink: &mut impl Sink) -> Result<()> {
        let (Some(Current { range, .. }), Target::Run(run)) =
            (self.current.take(), self.receiver.next_target())
        else {
            return Ok(());
        };
        let copied = match self.health {
            Health::NoRoom { copied } => copied,
            Health::Good | Health::Failed | Health::Unreadable => 0,
        };
        let memory = self.guest.region(range.region).memory;
        let end = run.byte_offset + copied as u64;
        let pages = (end >> memory.unit_shift) - range.first;
        // Pages of a pass count when all passes are over.
        if !memory.is_copied_in() || pages == 0 || self.is_in_rounds {
            return Ok(());
        }
        let range = PageRange { pages, ..range };
        let last = self.guest.finish(range, RunKind::Data, |page| sink.wake(page))?;
        sink.arrived(Arrived::Run { range, last })
    }

    /// Asserts the [module's](self) invariant. The lane has not failed.
    pub(super) fn assert_invariants(&self) {
        let has_ended = self.receiver.is_ended();
        assert_eq!(self.in_flight == 0, has_ended, "{}: something is always in flight", self.name);
        assert!(self.pause.is_none() || !has_ended, "{}: nothing to wait for", self.name);
        match (&self.current, self.receiver.next_target()) {
            (Some(current), Target::Run(run)) => {
                assert_eq!(current.range.region, run.region);
                assert!(current.range.first <= self.range_of(&run, 0).first);
                assert!(!current.is_verified || self.receiver.is_checked());
                assert!(!current.is_given, "a page that has been given has landed");
            }
            (None, Target::Control { .. }) => {}
            (current, target) => panic!(
                "{}: {target:?} with {:?} as the current run",
                self.name,
                current.as_ref().map(|current| current.range)
            ),
        }
    }
}

pub(super) fn not_written(ram: &str, error: std::io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::ENOMEM | libc::EFAULT) => out_of_memory(ram),
        _ => Error::System { what: format!("writing RAM {ram}"), source: error },
    }
}

pub(super) fn out_of_memory(ram: &str) -> Error {
    Error::OutOfMemory(format!(
        "no memory left for the pages of RAM {ram}: its file system is full, or a memory limit is reached"
    ))
}
