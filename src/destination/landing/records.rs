//! A bulk lane of TLS: records are decrypted in their receive buffer, while it is in the cache.
//!
//! Small pages are then handled like pages read ahead. A page of a file that does not fit in the buffer is *poured*:
//! its bytes are written as they arrive, and land when the page is whole. Without TLS such a page is received in place.
//! With checksums its sum covers the file's contents, before its state becomes Cached.
//!
//! **Invariant:** the invariant of the [buffer](super::buffer); the channel has TLS; nothing is received when the
//! channel has ended; bytes are poured only while a run of such a file is the current one, and fewer than all of it.
//! [`Records::assert_invariants`] asserts it.

use umem_ring::Ring;
use umem_wire::{HEADER_BYTES, LaneRole, RunTarget, Target};

use super::buffer::{AHEAD_BULK_BYTES, Buffer, Buffered, Step, fits_ahead};
use super::lane_core::{LaneCore, Sink};
use super::{STAGING_BYTES, TOKEN_AHEAD};
use crate::destination::memory::GuestMemory;
use crate::error::Result;
use crate::memory::kind::RegionMemory;
use crate::memory::sums;
use crate::transport::tls::Channel;

/// The buffer of such a lane.
pub(super) struct Records {
    pub(super) buffer: Buffer,
    /// Bytes of the current run at its start that have been written and have not landed.
    poured: usize,
}

/// Whether a run of this memory is written as it arrives.
fn is_poured(memory: RegionMemory) -> bool {
    !memory.is_copied_in() && !fits_ahead(memory)
}

impl Records {
    pub(super) fn new(guest: &GuestMemory, mut channel: Channel) -> Records {
        let memories = guest.regions.iter().map(|region| region.memory);
        let copied = memories.filter(|memory| memory.is_copied_in());
        let largest = copied.map(|memory| 1 << memory.unit_shift).max().unwrap_or(0);
        channel.widen(AHEAD_BULK_BYTES.max(largest.min(STAGING_BYTES) + HEADER_BYTES));
        Records { buffer: Buffer::new(channel), poured: 0 }
    }

    /// Writes the bytes of a run that are here; the run lands when it is whole.
    fn pour(&mut self, core: &mut LaneCore, run: &RunTarget, sink: &mut impl Sink) -> Result<Step> {
        let poured = self.poured as u64;
        let (byte_offset, bytes) = (run.byte_offset + poured, run.bytes - poured);
        let rest = RunTarget { byte_offset, bytes, ..*run };
        let here = self.buffer.bytes_of(&rest);
        if here == 0 {
            return Ok(Step::Short);
        }
        core.write(&rest, &self.buffer.channel.plain()[..here])?;
        self.buffer.channel.take(here);
        self.poured += here;
        if self.poured as u64 == run.bytes {
            let bytes = std::mem::take(&mut self.poured);
            let span = core.guest.region(run.region).file().span(run.byte_offset, run.bytes);
            core.verify(|sums| sums::of_span(&span, sums))?;
            core.landed(bytes, sink)?;
        }
        Ok(Step::Taken)
    }

    /// Asserts the [module's](self) invariant. The lane has not failed.
    pub(super) fn assert_invariants(&self, core: &LaneCore) {
        self.buffer.assert_invariants(core);
        assert_eq!(core.role, LaneRole::Bulk);
        assert!(self.buffer.channel.has_tls());
        let is_receiving = !self.buffer.channel.is_at_rest();
        assert!(!is_receiving || !self.buffer.channel.has_ended());
        if self.poured > 0 {
            let Target::Run(run) = core.receiver.next_target() else {
                panic!("{}: {} bytes are poured of no run", core.name, self.poured)
            };
            assert!(is_poured(core.guest.region(run.region).memory));
            assert!((self.poured as u64) < run.bytes);
        }
    }
}

impl Buffered for Records {
    fn buffer(&mut self) -> &mut Buffer {
        &mut self.buffer
    }

    fn arm(&mut self, core: &mut LaneCore, ring: &mut Ring) -> Result<()> {
        if self.buffer.channel.has_ended() {
            return Err(core.ended(self.buffer.channel.cause()));
        }
        let receive = self.buffer.receive(core);
        core.submit(ring, receive, TOKEN_AHEAD)
    }

    fn land(&mut self, core: &mut LaneCore, run: &RunTarget, sink: &mut impl Sink) -> Result<Step> {
        if is_poured(core.guest.region(run.region).memory) {
            return self.pour(core, run, sink);
        }
        self.buffer.land(core, run, sink)
    }
}
