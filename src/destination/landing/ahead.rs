//! A lane of small pages that is read ahead: a receive takes all available bytes, headers and pages.
//!
//! Pages go from the buffer into the file, or are copied in. On a demand lane a page that a vCPU waits for may be
//! [given](crate::destination::memory::GuestMemory::give) to the guest instead, and one receive takes an answer with
//! its header.
//!
//! **Invariant:** the invariant of the [buffer](super::buffer); there is no TLS; every region's pages fit in the
//! buffer; only a demand lane gives pages, and only to a guest whose events its own thread reads.
//! [`ReadAhead::assert_invariants`] asserts it.

use umem_ring::Ring;
use umem_wire::{LaneRole, RunTarget};

use super::buffer::{Buffer, Buffered, Step, fits_ahead};
use super::lane_core::{LaneCore, Sink};
use super::{Given, TOKEN_AHEAD};
use crate::destination::memory::PageId;
use crate::error::Result;
use crate::transport::tls::Channel;

/// The buffer of such a lane, and the pages given from it.
pub(super) struct ReadAhead {
    pub(super) buffer: Buffer,
    /// A demand lane whose thread also reads the guest's events.
    pub(super) gives: bool,
    /// Pages given since the last query.
    pub(super) given: Vec<Given>,
}

impl ReadAhead {
    /// A reader that gives no pages.
    pub(super) fn new(channel: Channel) -> ReadAhead {
        ReadAhead { buffer: Buffer::new(channel), gives: false, given: Vec::new() }
    }

    /// Gives a page whose bytes are all here to its waiting vCPU. False if the page must be placed the usual way.
    fn give(&mut self, core: &mut LaneCore, run: &RunTarget) -> Result<bool> {
        // All of the run, not the rest of one: the other pages of the run are not given.
        let Some(current) = core.current.as_mut().filter(|current| current.range.pages == 1) else {
            return Ok(false);
        };
        let bytes = self.buffer.bytes_of(run);
        if (bytes as u64) < run.bytes {
            return Ok(false);
        }
        let page = PageId { region: run.region, page: current.range.first };
        let Some(arrived) = core.guest.give(page, &self.buffer.channel.plain()[..bytes])? else {
            return Ok(false);
        };
        current.is_given = true;
        self.given.push(Given { page, arrived });
        Ok(true)
    }

    /// Asserts the [module's](self) invariant. The lane has not failed.
    pub(super) fn assert_invariants(&self, core: &LaneCore) {
        self.buffer.assert_invariants(core);
        assert!(!self.buffer.channel.has_tls());
        assert!(core.guest.regions.iter().all(|region| fits_ahead(region.memory)));
        assert!(!self.gives || core.role == LaneRole::Demand && !core.guest.is_sharded());
        assert!(self.gives || self.given.is_empty());
    }
}

impl Buffered for ReadAhead {
    fn buffer(&mut self) -> &mut Buffer {
        &mut self.buffer
    }

    fn arm(&mut self, core: &mut LaneCore, ring: &mut Ring) -> Result<()> {
        // On the demand lane nothing is likely to arrive before the next request. On a bulk lane, or after the
        // beginning of an answer, more bytes are available.
        let is_idle = core.role == LaneRole::Demand && self.buffer.channel.plain().is_empty();
        let receive = self.buffer.receive(core);
        core.submit(ring, if is_idle { receive.poll_first() } else { receive }, TOKEN_AHEAD)
    }

    fn land(&mut self, core: &mut LaneCore, run: &RunTarget, sink: &mut impl Sink) -> Result<Step> {
        if self.gives && self.buffer.verify(core, run)? && self.give(core, run)? {
            let bytes = self.buffer.bytes_of(run);
            self.buffer.landed(core, bytes, sink)?;
            return Ok(Step::Taken);
        }
        self.buffer.land(core, run, sink)
    }
}
