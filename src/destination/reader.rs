//! Receives one lane: pages into guest memory, everything else into small buffers.
//!
//! Into huge pages a run is received straight through our mapping: while it is, the receive of the next
//! header is already linked behind it, so that the kernel goes on without us. The wire's receiver promises
//! that a header follows every run.
//!
//! Small pages come in two steps, which is faster than one: a receive into fresh small pages faults on every
//! one of them, and has it zeroed first (`umem-perf floor` compares the ways). A lane of small pages is
//! *read ahead*: a receive takes whatever is there, headers and pages, into a buffer that stays in the
//! processor's cache. From there pages are written to the file, or copied in, as nobody but the guest's
//! process has a mapping of anonymous memory; a page that a vCPU waits for is given to the guest from there.
//! The demand lane is read ahead too whatever the pages are, if they are not too large: an answer and its header
//! take one receive. What is left of a long run, beyond what has been read ahead, goes through a pipe into the
//! file (`pipe.rs`), which spares the way through the buffer.
//!
//! A bulk lane of TLS is read ahead whatever the pages are: records are decrypted in the buffer that they were
//! received into, while it is in the cache, and their contents go the same way on. Of a huge page what is
//! there is written as it comes.
//!
//! On a lane that is checked a run is whole, and its pages add up, before any of them goes further: what is
//! read ahead or staged is not written before that, and what was received in place is not cached, so that it
//! goes back with all else that was landing (`GuestMemory::roll_back`).
//!
//! A run that cannot be placed at once, as the guest is changing its mappings, is held and tried again,
//! and nothing further is taken from the lane meanwhile: the thread goes on with what else it does.

mod failing;
mod pipe;
mod read_ahead;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use umem_ring::{Bytes, Chain, Completion, Fd, Memory, Op, Outcome, Ring};
use umem_wire::{Event, HEADER_BYTES, LaneRole, PageRange, Receiver, RegionTable, Target};

use super::ahead::{AHEAD_BULK_BYTES, AHEAD_DEMAND_BYTES, Ahead};
use super::faults::RETRY_INTERVAL;
use super::guest::{GuestMemory, PageId};
use crate::error::{Error, Result};
use crate::lane::Lane;
use crate::memory::claims::RunKind;
use crate::memory::guarded::Gone;
use crate::memory::sums;
use failing::write;
use pipe::Piped;

/// Completion tokens of the reader; the threads' own tokens start above.
pub(crate) const TOKEN_CONTROL: u64 = 0;
pub(crate) const TOKEN_RUN: u64 = 1;
pub(crate) const TOKEN_RETRY: u64 = 2;
pub(crate) const TOKEN_AHEAD: u64 = 3;
pub(crate) const TOKEN_READABLE: u64 = 4;
pub(crate) const TOKEN_FREE: u64 = 16;

/// One lane's receiving end.
pub(crate) struct LaneReader {
    name: String,
    socket: Arc<OwnedFd>,
    receiver: Receiver,
    guest: Arc<GuestMemory>,
    /// For the header in flight; given back with each completion.
    header: Option<Bytes>,
    /// For the run in flight, where it does not go straight into its pages.
    staging: Option<Bytes>,
    /// Nobody waits for what comes here: small pages are staged, and memory that is short is spared.
    is_bulk: bool,
    /// What has been read ahead, where that is done.
    ahead: Option<Ahead>,
    /// The way of long runs, where there is one.
    piped: Option<Piped>,
    held: Option<Held>,
    retry_armed: bool,
    /// Operations that have not completed.
    in_flight: u32,
    /// The data run whose bytes are coming.
    current: Option<PageRange>,
    /// Of a checked lane: the sums of the current run's pages, once they are known to be right.
    sums: Vec<u32>,
    is_verified: bool,
    /// Nothing more is taken from the lane.
    is_unreadable: bool,
    /// There is no room for what has come: nothing more of the lane is looked at.
    is_stuck: bool,
    /// Bytes of the current run that have been copied in when that happened, behind those that have landed.
    stuck_bytes: usize,
    /// Whoever reads this lane reads the guest's events too.
    may_give: bool,
    /// The current run is a page that has been given.
    is_given: bool,
    given: Vec<Given>,
}

/// A page that was [given](GuestMemory::give), and when it had come.
pub(crate) struct Given {
    pub(crate) page: PageId,
    pub(crate) arrived: Instant,
}

/// Why a lane stands still.
enum Held {
    /// Pages that were read ahead wait to be copied in.
    Ahead,
    /// A run waits to be copied in, its first `done` bytes are, and perhaps the header behind it.
    Run { range: PageRange, staging: Bytes, done: usize, next: Option<(Outcome, Bytes)> },
    /// The next run waits for room.
    Room,
}

/// What a lane brought, beside the pages, which are in place already.
pub(crate) enum Arrived {
    /// A run is cached; `last` when it was the guest's last.
    Run { range: PageRange, last: bool },
    /// Anything else that the wire's receiver reported.
    Other(Event),
}

impl LaneReader {
    /// A bulk lane, from its beginning; `before` is what has been read of it already.
    pub(crate) fn bulk(
        lane: &Lane,
        regions: &RegionTable,
        guest: Arc<GuestMemory>,
        before: Option<Ahead>,
    ) -> LaneReader {
        let receiver = Receiver::for_destination(LaneRole::Bulk);
        let mut receiver = receiver.checked(lane.is_checked());
        receiver.set_regions(regions);
        let is_small = guest.regions.iter().all(|region| !region.memory.is_received_into());
        let ahead = match lane.take_channel() {
            Some(channel) => {
                guest.bring_in_records();
                Some(Ahead::secured(&guest, *channel))
            }
            None if is_small => before.or_else(|| Ahead::new(&guest, AHEAD_BULK_BYTES)),
            None => before,
        };
        let is_copied = guest.regions.iter().any(|region| region.memory.is_copied_in());
        let goes_unseen = is_small && !is_copied && !receiver.is_checked();
        let is_clear = ahead.as_ref().is_some_and(|ahead| !ahead.channel.has_tls());
        let piped = (goes_unseen && is_clear).then(Piped::new).flatten();
        LaneReader { is_bulk: true, ahead, piped, ..LaneReader::new(lane, receiver, guest) }
    }

    /// The demand lane, with a receiver that has read its beginning already.
    pub(crate) fn demand(lane: &Lane, receiver: Receiver, guest: Arc<GuestMemory>) -> LaneReader {
        let ahead = Ahead::new(&guest, AHEAD_DEMAND_BYTES);
        let may_give = !guest.is_sharded();
        LaneReader { ahead, may_give, ..LaneReader::new(lane, receiver, guest) }
    }

    fn new(lane: &Lane, receiver: Receiver, guest: Arc<GuestMemory>) -> LaneReader {
        let header = Some(Bytes::with_capacity(HEADER_BYTES));
        LaneReader {
            name: lane.name.clone(),
            socket: lane.socket(),
            receiver,
            guest,
            header,
            staging: None,
            is_bulk: false,
            ahead: None,
            piped: None,
            held: None,
            retry_armed: false,
            in_flight: 0,
            current: None,
            sums: Vec::new(),
            is_verified: false,
            is_unreadable: false,
            is_stuck: false,
            stuck_bytes: 0,
            may_give: false,
            is_given: false,
            given: Vec::new(),
        }
    }

    /// Both sides check what comes.
    pub(crate) fn is_checked(&self) -> bool {
        self.receiver.is_checked()
    }

    /// No operation of this lane is left, nor a run that has come and is not in place: after an error
    /// [`Error::Lost`] this becomes true by itself, and nothing reaches a page any more.
    pub(crate) fn is_quiet(&self) -> bool {
        self.in_flight == 0
    }

    /// After a loss, when it is quiet: of a run that breaks off, the pages that were read ahead and have
    /// been copied in are here for good, and count. The others are as if they had never begun to come.
    pub(crate) fn settle(
        &mut self,
        wake: impl FnMut(PageId),
        mut arrived: impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        let (Some(range), Target::Run(run)) = (self.current.take(), self.receiver.next_target())
        else {
            return Ok(());
        };
        let region = self.guest.region(range.region);
        let end = run.byte_offset + self.stuck_bytes as u64;
        let pages = (end >> region.unit_shift()) - range.first;
        if !region.memory.is_copied_in() || pages == 0 {
            return Ok(());
        }
        let range = PageRange { pages, ..range };
        let last = self.guest.finish(range, RunKind::Data, wake)?;
        arrived(Arrived::Run { range, last })
    }

    /// What has been read beyond the lane's end.
    pub(crate) fn into_ahead(self) -> Option<Ahead> {
        self.ahead.filter(|ahead| ahead.channel.is_at_rest())
    }

    /// Pages that whoever waited for them sees already, since the last call. `wake` has not got them.
    pub(crate) fn take_given(&mut self) -> impl ExactSizeIterator<Item = Given> {
        self.given.drain(..)
    }

    /// What is sent the other way, as it leaves.
    pub(crate) fn sealed(&mut self, bytes: Vec<u8>) -> Result<Memory> {
        let channel = self.ahead.as_mut().map(|ahead| &mut ahead.channel);
        match channel.filter(|channel| channel.has_tls()) {
            None => Ok(Memory::from(bytes)),
            Some(channel) => match channel.sealed(&bytes) {
                Ok(sealed) => Ok(Memory::from(sealed)),
                Err(error) => Err(self.lost(error.to_string())),
            },
        }
    }

    /// With TLS, when nothing is on its way to the source: tells it what is wrong with what it sent, if it is,
    /// or else that nothing more comes.
    pub(crate) fn part(&mut self, socket: &OwnedFd) {
        if let Some(ahead) = &mut self.ahead {
            ahead.channel.part(socket);
        }
    }

    /// Takes what has been read already, and starts the first receive.
    pub(crate) fn begin(
        &mut self,
        ring: &mut Ring,
        mut wake: impl FnMut(PageId),
        mut arrived: impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        let begun = self.take_ahead(ring, &mut wake, &mut arrived);
        self.noticed(begun)
    }

    /// Starts the next receive. Called once at the start; [`LaneReader::complete`] calls it then.
    pub(crate) fn arm(&mut self, ring: &mut Ring) -> Result<()> {
        if self.ahead.is_some() {
            return self.arm_ahead(ring);
        }
        match self.receiver.next_target() {
            Target::Control { exact } => {
                let memory = self.buffer(exact);
                ring.submit(Op::recv(self.socket(), memory).wait_all(), TOKEN_CONTROL)
                    .map_err(|rejected| Error::Ring(rejected.error))?;
                self.in_flight += 1;
            }
            Target::Run(run) => {
                let region = self.guest.region(run.region);
                // A run of several pages is background on whatever lane.
                let nobody_waits = self.is_bulk || run.bytes > 1 << region.unit_shift();
                if nobody_waits && !self.guest.has_room() {
                    self.held = Some(Held::Room);
                    return self.arm_retry(ring);
                }
                let is_small = !region.memory.is_copied_in() && !region.memory.is_received_into();
                let pages = if region.memory.is_copied_in() || (is_small && nobody_waits) {
                    let len = usize::try_from(run.bytes).expect("a run is at most 2 MiB");
                    let staging = self.staging.take();
                    let staging = staging.unwrap_or_else(|| Bytes::with_capacity(STAGING_BYTES));
                    Memory::from(staging.slice(0..len))
                } else {
                    Memory::from(region.file().span(run.byte_offset, run.bytes))
                };
                let header = self.buffer(HEADER_BYTES);
                let chain = Chain::new()
                    .then(Op::recv(self.socket(), pages).wait_all(), TOKEN_RUN)
                    .then(Op::recv(self.socket(), header).wait_all(), TOKEN_CONTROL);
                ring.submit_chain(chain).map_err(|rejected| Error::Ring(rejected.error))?;
                self.in_flight += 2;
            }
        }
        Ok(())
    }

    fn socket(&self) -> Fd {
        Fd::from(self.socket.clone())
    }

    /// Takes a completion with one of the reader's tokens. `wake` gets each page that a vCPU waits
    /// for and that is now cached, `arrived` all that came.
    pub(crate) fn complete(
        &mut self,
        ring: &mut Ring,
        completion: Completion,
        wake: impl FnMut(PageId),
        arrived: impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        self.in_flight -= 1;
        if self.is_stuck {
            return Ok(());
        }
        let taken = self.take(ring, completion, wake, arrived);
        self.noticed(taken)
    }

    /// What has come and has no room is not there, nor what is behind it.
    fn noticed<T>(&mut self, result: Result<T>) -> Result<T> {
        self.is_stuck |= matches!(result, Err(Error::OutOfMemory(_)));
        result
    }

    fn take(
        &mut self,
        ring: &mut Ring,
        completion: Completion,
        mut wake: impl FnMut(PageId),
        mut arrived: impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        let outcome = completion.outcome;
        match (completion.token, completion.memory) {
            (TOKEN_CONTROL, Some(Memory::Bytes(bytes))) => {
                if let Some(Held::Run { next, .. }) = &mut self.held {
                    *next = Some((outcome, bytes));
                    return Ok(());
                }
                self.control(ring, outcome, bytes, &mut wake, &mut arrived)
            }
            (TOKEN_AHEAD, Some(Memory::Bytes(buffer))) => {
                let (Outcome::Done(count), Some(ahead)) = (outcome, &mut self.ahead) else {
                    return Err(self.failed(outcome));
                };
                if count == 0 && !ahead.channel.has_tls() {
                    return Err(self.failed(outcome));
                }
                ahead.channel.filled(buffer, count as usize);
                self.take_ahead(ring, &mut wake, &mut arrived)
            }
            (TOKEN_READABLE, _) => {
                let Outcome::Done(_) = outcome else {
                    return Err(self.failed(outcome));
                };
                self.carry(&mut wake, &mut arrived)?;
                self.take_ahead(ring, &mut wake, &mut arrived)
            }
            (TOKEN_RUN, memory) => {
                let Outcome::Done(_) = outcome else {
                    return Err(self.failed(outcome));
                };
                match memory {
                    Some(memory) => {
                        self.verify(|sums| sums::of_memory(&memory, sums))?;
                        match memory {
                            Memory::Bytes(staging) => {
                                self.place(ring, staging, &mut wake, &mut arrived)
                            }
                            memory => self.landed(memory.len(), &mut wake, &mut arrived),
                        }
                    }
                    None => unreachable!("a receive gives its memory back"),
                }
            }
            (TOKEN_RETRY, _) => {
                self.retry_armed = false;
                self.resume(ring, &mut wake, &mut arrived)
            }
            (token, memory) => unreachable!("completion {token} with {memory:?} in a lane reader"),
        }
    }

    fn control(
        &mut self,
        ring: &mut Ring,
        outcome: Outcome,
        bytes: Bytes,
        wake: &mut impl FnMut(PageId),
        arrived: &mut impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        let result = match outcome {
            Outcome::Done(_) => self.receiver.control(bytes.as_slice()),
            // The run before it has failed and says why.
            Outcome::NotStarted { .. } => return Ok(()),
            other => return Err(self.failed(other)),
        };
        if bytes.capacity() == HEADER_BYTES {
            self.header = Some(bytes);
        }
        self.events(wake, arrived)?;
        result.map_err(|error| self.unreadable(&error))?;
        // The source may close a lane that has ended.
        if self.receiver.is_ended() { Ok(()) } else { self.arm(ring) }
    }

    /// On a checked lane: adds up the pages of a run that has come whole, and fails if they are not as they
    /// were sent.
    fn verify(
        &mut self,
        sum: impl FnOnce(&mut Vec<u32>) -> std::result::Result<(), Gone>,
    ) -> Result<()> {
        if !self.receiver.is_checked() {
            return Ok(());
        }
        sum(&mut self.sums).map_err(|Gone| {
            Error::Host(
                "its RAM file has been truncated, or cannot be read any more: what has come of the guest's \
                 memory is gone"
                    .into(),
            )
        })?;
        let verified = self.receiver.verify(&self.sums);
        verified.map_err(|error| self.unreadable(&error))?;
        self.is_verified = true;
        Ok(())
    }

    /// Puts a staged run where it belongs, or holds it.
    fn place(
        &mut self,
        ring: &mut Ring,
        staging: Bytes,
        wake: &mut impl FnMut(PageId),
        arrived: &mut impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        let Target::Run(run) = self.receiver.next_target() else {
            unreachable!("a run that has been received is the current one")
        };
        let region = self.guest.region(run.region);
        if !region.memory.is_copied_in() {
            write(&self.guest, staging.as_slice(), &run)?;
            return self.placed(staging, wake, arrived);
        }
        let range = PageRange {
            region: run.region,
            first: run.byte_offset >> region.unit_shift(),
            pages: run.bytes >> region.unit_shift(),
        };
        let done = self.place_from(range, staging.as_slice(), 0)?;
        if done == staging.len() {
            return self.placed(staging, wake, arrived);
        }
        self.held = Some(Held::Run { range, staging, done, next: None });
        self.arm_retry(ring)
    }

    /// Copies in what comes after the first `done` bytes; how much is in place then.
    fn place_from(&mut self, range: PageRange, bytes: &[u8], mut done: usize) -> Result<usize> {
        let placed = self.guest.place(range, bytes, &mut done);
        self.stuck_bytes = if placed.is_err() { done } else { 0 };
        placed.map(|()| done)
    }

    fn placed(
        &mut self,
        staging: Bytes,
        wake: &mut impl FnMut(PageId),
        arrived: &mut impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        let bytes = staging.len();
        self.staging = Some(staging);
        self.landed(bytes, wake, arrived)
    }

    fn landed(
        &mut self,
        bytes: usize,
        wake: &mut impl FnMut(PageId),
        arrived: &mut impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        let landed = self.receiver.landed(bytes as u64);
        landed.map_err(|error| self.unreadable(&error))?;
        self.events(wake, arrived)
    }

    /// Goes on with what is held.
    fn resume(
        &mut self,
        ring: &mut Ring,
        wake: &mut impl FnMut(PageId),
        arrived: &mut impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        match self.held.take() {
            None => Ok(()),
            // The header of a run has come, and nothing of it will.
            Some(Held::Room) if self.guest.lanes_are_down() => {
                Err(self.lost("given up with the other lanes".into()))
            }
            Some(Held::Room | Held::Ahead) => self.take_ahead(ring, wake, arrived),
            Some(Held::Run { range, staging, done, next }) => {
                let done = self.place_from(range, staging.as_slice(), done)?;
                if done < staging.len() {
                    self.held = Some(Held::Run { range, staging, done, next });
                    return self.arm_retry(ring);
                }
                self.placed(staging, wake, arrived)?;
                match next {
                    Some((outcome, bytes)) => self.control(ring, outcome, bytes, wake, arrived),
                    None => Ok(()),
                }
            }
        }
    }

    fn arm_retry(&mut self, ring: &mut Ring) -> Result<()> {
        if !self.retry_armed {
            self.retry_armed = true;
            ring.submit(Op::timeout(RETRY_INTERVAL), TOKEN_RETRY)
                .map_err(|rejected| Error::Ring(rejected.error))?;
            self.in_flight += 1;
        }
        Ok(())
    }

    fn events(
        &mut self,
        wake: &mut impl FnMut(PageId),
        arrived: &mut impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        while let Some(event) = self.receiver.poll_event() {
            let (range, kind) = match event {
                Event::RunBegins(range) => {
                    self.guest.begin(range, &self.name)?;
                    self.current = Some(range);
                    continue;
                }
                Event::Data(range) => {
                    self.current = None;
                    (range, RunKind::Data)
                }
                Event::Zero(range) => (range, RunKind::Zero),
                Event::Hole(range) => (range, RunKind::Hole),
                other => {
                    arrived(Arrived::Other(other))?;
                    continue;
                }
            };
            if kind != RunKind::Data {
                self.guest.begin(range, &self.name)?;
            }
            // Before the pages count as here: with the last of them the digests are read.
            if kind == RunKind::Data && std::mem::take(&mut self.is_verified) {
                let shift = self.guest.region(range.region).unit_shift();
                let first = sums::first_summed(range, shift);
                self.guest.digests.add(range.region, first, &self.sums);
            }
            if kind != RunKind::Data && self.receiver.is_checked() {
                let shift = self.guest.region(range.region).unit_shift();
                let first = sums::first_summed(range, shift);
                let pages = sums::pages_summed(range, shift);
                self.guest.digests.add_zeroes(range.region, first, pages);
            }
            let last = if kind == RunKind::Data && std::mem::take(&mut self.is_given) {
                self.guest.finish_given(range)?
            } else {
                self.guest.finish(range, kind, &mut *wake)?
            };
            arrived(Arrived::Run { range, last })?;
        }
        Ok(())
    }

    /// The header's buffer, or a new one for a body.
    fn buffer(&mut self, len: usize) -> Bytes {
        match self.header.take() {
            Some(header) if header.capacity() == HEADER_BYTES && len <= HEADER_BYTES => {
                header.slice(0..len)
            }
            _ => Bytes::with_capacity(len),
        }
    }
}

/// The longest run of small pages.
pub(super) const STAGING_BYTES: usize = 2 << 20;
const _: () = assert!(STAGING_BYTES as u64 == umem_wire::limits::RUN_BYTES_MAX);
