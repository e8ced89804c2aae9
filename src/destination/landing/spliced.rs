//! A bulk lane of small pages that is read ahead; the rest of its long runs goes through a pipe into the file.
//!
//! ```text
//!   buffer:  [header, run, header, beginning of a long run]
//!   socket:                                               [ … the rest of it ][header, …
//!                                                           |                   |
//!                    splice(2) whenever the socket is readable                  received alone, as another long run
//!                                                                               may be behind it
//! ```
//!
//! **Invariant:** the invariant of the [buffer](super::buffer); the CPU need not read a page: there are no checksums
//! and no TLS, and every region has a file of small pages. The pipe is empty between turns. While it carries a run,
//! that run is the current one, and the buffer's bytes of it have been written before the socket is polled.
//! [`Spliced::assert_invariants`] asserts it.

use umem_ring::{Op, Outcome, Ring};
use umem_wire::{LaneRole, RunTarget, Target};

use super::buffer::{Buffer, Buffered, Step, fits_ahead};
use super::lane_core::{LaneCore, Sink, not_written};
use super::pipe::{Pipe, SpliceError, Stage};
use super::{TOKEN_AHEAD, TOKEN_READABLE};
use crate::error::Result;
use crate::memory::kind::RegionMemory;
use crate::transport::tls::Channel;

/// The buffer and the pipe of such a lane.
pub(super) struct Spliced {
    pub(super) buffer: Buffer,
    pipe: Pipe,
}

impl Spliced {
    pub(super) fn new(channel: Channel, pipe: Pipe) -> Spliced {
        Spliced { buffer: Buffer::new(channel), pipe }
    }

    /// The socket has more bytes of the current run, or has ended.
    pub(super) fn readable(
        &mut self,
        core: &mut LaneCore,
        ring: &mut Ring,
        outcome: Outcome,
        sink: &mut impl Sink,
    ) -> Result<()> {
        let Outcome::Done(_) = outcome else {
            return Err(core.failed(outcome));
        };
        self.carry(core, sink)?;
        self.take_all(core, ring, sink)
    }

    /// Moves the available bytes of the current run through the pipe.
    fn carry(&mut self, core: &mut LaneCore, sink: &mut impl Sink) -> Result<()> {
        let Target::Run(run) = core.receiver.next_target() else {
            unreachable!("only a run goes through the pipe");
        };
        let ram = core.guest.region(run.region).file();
        let to = ram.in_file(run.byte_offset);
        match self.pipe.carry(&core.socket, ram.descriptor(), to, run.bytes) {
            Ok(0) => Err(core.failed(Outcome::Done(0))),
            Ok(bytes) => {
                if bytes as u64 == run.bytes {
                    self.pipe.run_ended();
                }
                core.landed(bytes, sink)
            }
            Err(SpliceError::Unable) => {
                self.pipe.give_up();
                Ok(())
            }
            Err(SpliceError::Socket(errno)) => Err(core.lost(errno.desc().into())),
            Err(SpliceError::File(errno)) => Err(not_written(&ram.name, errno.into())),
        }
    }

    /// Asserts the [module's](self) invariant. The lane has not failed.
    pub(super) fn assert_invariants(&self, core: &LaneCore) {
        self.buffer.assert_invariants(core);
        assert_eq!(core.role, LaneRole::Bulk);
        assert!(!core.receiver.is_checked(), "{}: spliced pages cannot be checked", core.name);
        assert!(!self.buffer.channel.has_tls());
        let can = |memory| RegionMemory::can_be_spliced(memory) && fits_ahead(memory);
        assert!(core.guest.regions.iter().all(|region| can(region.memory)));
        if self.pipe.stage() == Stage::Run {
            assert!(matches!(core.receiver.next_target(), Target::Run(_)));
            let is_empty = self.buffer.channel.plain().is_empty();
            assert!(is_empty || core.pause().is_some(), "the buffer's part of a run goes first");
        }
    }
}

impl Buffered for Spliced {
    fn buffer(&mut self) -> &mut Buffer {
        &mut self.buffer
    }

    fn arm(&mut self, core: &mut LaneCore, ring: &mut Ring) -> Result<()> {
        match (self.pipe.stage(), core.receiver.next_target()) {
            (Stage::Run, _) => {
                let poll = Op::poll(core.socket(), libc::POLLIN as u32);
                core.submit(ring, poll, TOKEN_READABLE)
            }
            // The buffer is empty after a spliced run.
            (Stage::Header, Target::Control { exact }) => {
                let header = self.buffer.channel.free().slice(0..exact);
                core.submit(ring, Op::recv(core.socket(), header), TOKEN_AHEAD)
            }
            (Stage::Header | Stage::Off, _) => {
                let receive = self.buffer.receive(core);
                core.submit(ring, receive, TOKEN_AHEAD)
            }
        }
    }

    fn land(&mut self, core: &mut LaneCore, run: &RunTarget, sink: &mut impl Sink) -> Result<Step> {
        let here = self.buffer.channel.plain().len();
        if !self.pipe.takes(run.bytes, here) {
            return self.buffer.land(core, run, sink);
        }
        // The buffered bytes go first; they need not be whole pages.
        let here = self.buffer.bytes_of(run);
        if here == 0 {
            return Ok(Step::Short);
        }
        if here as u64 == run.bytes {
            self.pipe.run_ended();
        }
        self.buffer.write(core, run, here, sink)?;
        Ok(Step::Taken)
    }

    fn control_taken(&mut self, core: &LaneCore) {
        if let Target::Control { .. } = core.receiver.next_target() {
            self.pipe.rest();
        }
    }
}
