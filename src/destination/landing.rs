//! Receives one lane: pages into guest memory, everything else into small buffers.
//!
//! # Landing methods
//!
//! A lane's bytes take one of four paths from its socket into guest memory. The path is chosen once, when the reader is
//! made, from the lane's properties and the memory's kind ([`Choice::of`]). State of a single path lies in its variant
//! of [`Way`], and its file begins with the invariant that its `assert_invariants` asserts.
//!
//! ```text
//!           from the socket         by way of                     into
//! exact     a run                   --------------------------->  huge pages, or a page that a vCPU waits for
//!           a run                   a staging buffer ---------->  other small pages
//! ahead     available bytes         a buffer in the cache ----->  small pages
//! spliced   available bytes         a buffer in the cache ----->  small pages of a file
//!           the rest of a long run  a pipe -------------------->  small pages of a file
//! records   records                 the buffer, decrypted ----->  any pages
//! ```
//!
//! - [Exact](exact): lanes of pages that are too large for a buffer, and bulk lanes of huge pages. A run is received
//!   *in place*, into the file's mapping; the receive of the next header is linked behind it, so the kernel continues
//!   without this thread. Or the run is *staged*: received whole into a buffer, from which it is written or copied in.
//! - [Read ahead](ahead): the other demand lanes, and bulk lanes of small pages. A receive takes all available bytes
//!   into a buffer that stays in the processor's cache. From there pages are written to the file, or copied in; a page
//!   that a vCPU waits for is copied into the guest.
//! - [Spliced](spliced): bulk lanes of small pages of files, without checksums. They are read ahead; the rest of a long
//!   run, beyond the bytes read ahead, goes through a pipe into the file.
//! - [Records](records): bulk lanes of TLS. Records are decrypted in their receive buffer, and the plaintext is handled
//!   like bytes read ahead. The bytes of a huge page are written as they arrive.
//!
//! Small pages take two steps, which is faster than one: a receive into fresh small pages faults on each page and has
//! it zeroed first (`umem-perf floor` compares the methods). The wire's receiver guarantees that a header follows every
//! run.
//!
//! # Common rules
//!
//! With checksums a run is whole, and its checksum verified, before any page of it goes further. A run that was read
//! ahead or staged is not written before that. A run that was received in place is not cached before that; after an
//! error it is rolled back with everything else in state Landing (`GuestMemory::roll_back`).
//!
//! A run that cannot be placed at once (the guest is changing its mappings, or private memory has no room) waits for a
//! timer ([`Pause`]). Until then the reader takes nothing more from the lane, and the thread does its other work.

mod ahead;
mod buffer;
mod exact;
mod failing;
mod lane_core;
mod pipe;
mod records;
mod spliced;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use umem_ring::{Completion, Memory, Ring};
use umem_wire::{Event, LaneRole, PageRange, Receiver, RegionTable};

use super::memory::{GuestMemory, PageId};
use crate::error::Result;
use crate::memory::kind::RegionMemory;
use crate::transport::lane::Lane;
use crate::transport::tls::Channel;

use ahead::ReadAhead;
use buffer::{AHEAD_BULK_BYTES, AHEAD_DEMAND_BYTES, Buffered, fits_ahead};
use exact::Exact;
use lane_core::{Callbacks, LaneCore, Pause, Sink};
use pipe::Pipe;
use records::Records;
use spliced::Spliced;

/// Completion tokens of the reader; the threads' own tokens start above.
pub(crate) const TOKEN_CONTROL: u64 = 0;
pub(crate) const TOKEN_RUN: u64 = 1;
pub(crate) const TOKEN_RETRY: u64 = 2;
pub(crate) const TOKEN_AHEAD: u64 = 3;
pub(crate) const TOKEN_READABLE: u64 = 4;
pub(crate) const TOKEN_FREE: u64 = 16;

/// The longest run, which a buffer must hold: 2 MiB.
const STAGING_BYTES: usize = 2 << 20;
const _: () = assert!(STAGING_BYTES as u64 == umem_wire::limits::RUN_BYTES_MAX);

/// The receiving end of one lane.
pub(crate) struct LaneReader {
    core: LaneCore,
    way: Way,
}

/// The path of a lane's bytes from its socket into guest memory.
enum Way {
    Exact(Exact),
    Ahead(ReadAhead),
    Spliced(Spliced),
    Records(Records),
}

/// The names of the paths, as chosen before one is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Exact,
    Ahead,
    Spliced,
    Records,
}

/// The properties that decide a lane's path, besides the memory.
#[derive(Clone, Copy, Debug)]
struct Facts {
    role: LaneRole,
    /// The socket carries TLS records. (A demand lane of TLS is decrypted before this reader.)
    is_secured: bool,
    /// The lane has checksums: the CPU must read every byte.
    is_checked: bool,
}

impl Choice {
    /// The path of a lane into these regions.
    fn of(facts: Facts, regions: impl Iterator<Item = RegionMemory> + Clone) -> Choice {
        let all = |can: fn(RegionMemory) -> bool| regions.clone().all(can);
        match facts.role {
            _ if facts.is_secured => Choice::Records,
            // Whole pages of every region must fit in the buffer.
            _ if !all(fits_ahead) => Choice::Exact,
            // One receive takes an answer with its header, for any page size.
            LaneRole::Demand => Choice::Ahead,
            LaneRole::Bulk if !all(|memory| !memory.is_received_into()) => Choice::Exact,
            LaneRole::Bulk if !facts.is_checked && all(RegionMemory::can_be_spliced) => {
                Choice::Spliced
            }
            LaneRole::Bulk => Choice::Ahead,
        }
    }
}

/// A page that was [given](GuestMemory::give), with its arrival time.
pub(crate) struct Given {
    pub(crate) page: PageId,
    pub(crate) arrived: Instant,
}

/// Items of a lane besides pages, which are in place already.
pub(crate) enum Arrived {
    /// A run is cached; `last` if it completed the guest.
    Run { range: PageRange, last: bool },
    /// Any other item of the wire's receiver.
    Other(Event),
}

impl LaneReader {
    /// A bulk lane, from its beginning; `before` holds the bytes that have been read of it.
    pub(crate) fn bulk(
        lane: &Lane,
        regions: &RegionTable,
        guest: Arc<GuestMemory>,
        before: Option<Channel>,
    ) -> LaneReader {
        let receiver = Receiver::for_destination(LaneRole::Bulk);
        let mut receiver = receiver.checked(lane.is_checked());
        receiver.set_regions(regions);
        let channel = lane.take_channel().map(|channel| *channel).or(before);
        let facts = Facts {
            role: LaneRole::Bulk,
            is_secured: channel.as_ref().is_some_and(Channel::has_tls),
            is_checked: receiver.is_checked(),
        };
        let memories = guest.regions.iter().map(|region| region.memory);
        let clear =
            |channel: Option<Channel>| channel.unwrap_or_else(|| Channel::clear(AHEAD_BULK_BYTES));
        let way = match (Choice::of(facts, memories), channel) {
            (Choice::Records, channel) => {
                guest.bring_in_records();
                let channel = channel.expect("records come through a channel");
                Way::Records(Records::new(&guest, channel))
            }
            (Choice::Exact, channel) => {
                assert!(channel.is_none(), "of an exact lane nothing is read ahead");
                Way::Exact(Exact::new())
            }
            (Choice::Ahead, channel) => Way::Ahead(ReadAhead::new(clear(channel))),
            (Choice::Spliced, channel) => match Pipe::new() {
                Some(pipe) => Way::Spliced(Spliced::new(clear(channel), pipe)),
                None => Way::Ahead(ReadAhead::new(clear(channel))),
            },
        };
        LaneReader { core: LaneCore::new(lane, receiver, guest, facts.role), way }
    }

    /// The demand lane, with a receiver that has read its beginning.
    pub(crate) fn demand(lane: &Lane, receiver: Receiver, guest: Arc<GuestMemory>) -> LaneReader {
        let role = LaneRole::Demand;
        let facts = Facts { role, is_secured: false, is_checked: receiver.is_checked() };
        let memories = guest.regions.iter().map(|region| region.memory);
        let way = match Choice::of(facts, memories) {
            Choice::Exact => Way::Exact(Exact::new()),
            Choice::Ahead => {
                let channel = Channel::clear(AHEAD_DEMAND_BYTES);
                // Otherwise other threads read the guest's events.
                let may_give = !guest.is_sharded();
                Way::Ahead(ReadAhead { gives: may_give, ..ReadAhead::new(channel) })
            }
            other => unreachable!("a demand lane is not {other:?}"),
        };
        LaneReader { core: LaneCore::new(lane, receiver, guest, role), way }
    }

    /// Turns checksums on.
    pub(crate) fn is_checked(&self) -> bool {
        self.core.receiver.is_checked()
    }

    /// No operation of this lane is in flight, and no received run is still to be placed. After an error
    /// [`Error::Lost`](crate::error::Error::Lost) this becomes true without further calls, and no page is written any
    /// more.
    pub(crate) fn is_quiet(&self) -> bool {
        self.core.in_flight() == 0
    }

    /// After a loss, when quiet: of an incomplete run, the pages that were read ahead and copied in stay and count. The
    /// other pages of the run become Missing again.
    pub(crate) fn settle(
        &mut self,
        wake: impl FnMut(PageId),
        arrived: impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        self.core.settle(&mut Callbacks { wake, arrived })
    }

    /// The bytes that were read beyond the lane's end.
    pub(crate) fn into_ahead(self) -> Option<Channel> {
        let channel = match self.way {
            Way::Exact(_) => return None,
            Way::Ahead(way) => way.buffer.channel,
            Way::Spliced(way) => way.buffer.channel,
            Way::Records(way) => way.buffer.channel,
        };
        Some(channel).filter(Channel::is_at_rest)
    }

    /// Calls `each` with the pages that were made visible to their waiting vCPUs since the last call, and returns their
    /// number. `wake` does not get these pages.
    pub(crate) fn take_given(&mut self, each: impl FnMut(Given)) -> usize {
        let Way::Ahead(way) = &mut self.way else { return 0 };
        let count = way.given.len();
        way.given.drain(..).for_each(each);
        count
    }

    /// Transforms outgoing bytes.
    pub(crate) fn sealed(&mut self, bytes: Vec<u8>) -> Result<Memory> {
        let Way::Records(way) = &mut self.way else { return Ok(Memory::from(bytes)) };
        match way.buffer.channel.sealed(&bytes) {
            Ok(sealed) => Ok(Memory::from(sealed)),
            Err(error) => Err(self.core.lost(error.to_string())),
        }
    }

    /// With TLS, when no send is in flight: queues a TLS alert about the error, or otherwise close_notify.
    pub(crate) fn part(&mut self, socket: &OwnedFd) {
        if let Way::Records(way) = &mut self.way {
            way.buffer.channel.part(socket);
        }
    }

    /// Takes the bytes that have been read, and starts the first receive.
    pub(crate) fn begin(
        &mut self,
        ring: &mut Ring,
        wake: impl FnMut(PageId),
        arrived: impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        let begun = self.proceed(ring, &mut Callbacks { wake, arrived });
        self.noticed(begun)
    }

    /// Starts the first receive of a lane of which nothing has been read. [`LaneReader::complete`] starts the others.
    pub(crate) fn arm(&mut self, ring: &mut Ring) -> Result<()> {
        let core = &mut self.core;
        match &mut self.way {
            Way::Exact(way) => way.arm(core, ring),
            Way::Ahead(way) => way.arm(core, ring),
            Way::Spliced(way) => way.arm(core, ring),
            Way::Records(way) => way.arm(core, ring),
        }
    }

    /// Takes a completion with one of the reader's tokens. `wake` gets each page that a vCPU waits for and that is now
    /// cached; `arrived` gets all items.
    pub(crate) fn complete(
        &mut self,
        ring: &mut Ring,
        completion: Completion,
        wake: impl FnMut(PageId),
        arrived: impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        self.core.completed();
        if self.core.is_out_of_room() {
            return Ok(());
        }
        let taken = self.take(ring, completion, &mut Callbacks { wake, arrived });
        self.noticed(taken)
    }

    fn noticed(&mut self, result: Result<()>) -> Result<()> {
        match &result {
            Ok(()) if cfg!(debug_assertions) => self.assert_invariants(),
            Ok(()) => {}
            Err(error) => self.core.failed_with(error),
        }
        result
    }

    /// Asserts the invariant of the lane's path, unless the lane has failed.
    fn assert_invariants(&self) {
        let core = &self.core;
        if !core.is_good() {
            return;
        }
        core.assert_invariants();
        match &self.way {
            Way::Exact(way) => way.assert_invariants(core),
            Way::Ahead(way) => way.assert_invariants(core),
            Way::Spliced(way) => way.assert_invariants(core),
            Way::Records(way) => way.assert_invariants(core),
        }
    }

    fn take(
        &mut self,
        ring: &mut Ring,
        completion: Completion,
        sink: &mut impl Sink,
    ) -> Result<()> {
        if completion.token == TOKEN_RETRY {
            return self.resume(ring, sink);
        }
        let (core, outcome) = (&mut self.core, completion.outcome);
        match (&mut self.way, completion.token, completion.memory) {
            (Way::Exact(way), TOKEN_RUN, memory) => {
                way.run_received(core, ring, outcome, memory, sink)
            }
            (Way::Exact(way), TOKEN_CONTROL, Some(Memory::Bytes(bytes))) => {
                way.control_received(core, ring, outcome, bytes, sink)
            }
            (Way::Ahead(way), TOKEN_AHEAD, Some(Memory::Bytes(bytes))) => {
                way.received(core, ring, outcome, bytes, sink)
            }
            (Way::Spliced(way), TOKEN_AHEAD, Some(Memory::Bytes(bytes))) => {
                way.received(core, ring, outcome, bytes, sink)
            }
            (Way::Spliced(way), TOKEN_READABLE, _) => way.readable(core, ring, outcome, sink),
            (Way::Records(way), TOKEN_AHEAD, Some(Memory::Bytes(bytes))) => {
                way.received(core, ring, outcome, bytes, sink)
            }
            (_, token, memory) => {
                unreachable!("completion {token} with {memory:?} in a lane reader")
            }
        }
    }

    /// The timer of a pause has expired.
    fn resume(&mut self, ring: &mut Ring, sink: &mut impl Sink) -> Result<()> {
        match self.core.end_pause() {
            // The header of a run has arrived, and its bytes will not.
            Pause::Room if self.core.guest.lanes_are_down() => {
                Err(self.core.lost("given up with the other lanes".into()))
            }
            Pause::Room | Pause::Events => self.proceed(ring, sink),
        }
    }

    /// Takes the bytes that are here, then receives more.
    fn proceed(&mut self, ring: &mut Ring, sink: &mut impl Sink) -> Result<()> {
        let core = &mut self.core;
        match &mut self.way {
            Way::Exact(way) => way.go_on(core, ring, sink),
            Way::Ahead(way) => way.take_all(core, ring, sink),
            Way::Spliced(way) => way.take_all(core, ring, sink),
            Way::Records(way) => way.take_all(core, ring, sink),
        }
    }
}
