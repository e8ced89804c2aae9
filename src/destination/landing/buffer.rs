//! The common part of the paths that receive all available bytes into a buffer: [read ahead](super::ahead),
//! [spliced](super::spliced) and [records](super::records).
//!
//! ```text
//!   buffer  [ taken | header, run, header, beginning of a run | free ]
//!                     ^ Buffered::take_all takes from here      ^ the next receive
//! ```
//!
//! **Invariant:** while the lane has neither failed nor ended, one operation is in flight: a receive, which owns the
//! buffer; or, with the buffer here, a poll or the timer of a pause. Bytes of the buffer's first run count as copied
//! only while the rest of them waits for the guest's events. [`Buffer::assert_invariants`] asserts it.

use umem_ring::{Bytes, Op, Outcome, Ring};
use umem_wire::{HEADER_BYTES, RunTarget, Target};

use super::lane_core::{LaneCore, Pause, Sink};
use crate::error::Result;
use crate::memory::kind::RegionMemory;
use crate::memory::sums;
use crate::transport::tls::Channel;

/// Pages up to this size, 64 KiB, are read ahead: a page waits whole in the buffer.
const AHEAD_SHIFT_MAX: u8 = 16;

/// The size of one receive of the demand lane: 16 answers of 4 KiB pages, or one of the largest pages.
pub(super) const AHEAD_DEMAND_BYTES: usize = 68 << 10;

/// The size of one receive of a bulk lane: large enough to amortize the system call, small enough to stay in a core's
/// cache until it is written.
pub(super) const AHEAD_BULK_BYTES: usize = 256 << 10;

const _: () = assert!(AHEAD_DEMAND_BYTES > (1 << AHEAD_SHIFT_MAX) + HEADER_BYTES);

/// Whether whole pages of this memory fit in the buffer.
pub(super) fn fits_ahead(memory: RegionMemory) -> bool {
    memory.unit_shift <= AHEAD_SHIFT_MAX
}

/// Bytes of a lane that have arrived and are not in place yet.
pub(super) struct Buffer {
    pub(super) channel: Channel,
    /// Bytes at the buffer's start that have been copied in, if the rest of the run had to wait.
    copied: usize,
}

/// Progress of the current run from the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// This many bytes of the run have been taken.
    Taken,
    /// More bytes must arrive first.
    Short,
    /// The guest's events must be read first.
    EventsPending,
}

/// A path that takes frames and runs from a buffer.
pub(super) trait Buffered {
    fn buffer(&mut self) -> &mut Buffer;

    /// Starts the next receive.
    fn arm(&mut self, core: &mut LaneCore, ring: &mut Ring) -> Result<()>;

    /// Places the bytes of the current run that the buffer holds.
    fn land(&mut self, core: &mut LaneCore, run: &RunTarget, sink: &mut impl Sink) -> Result<Step>;

    /// Bytes of a header or a body have been taken.
    fn control_taken(&mut self, _: &LaneCore) {}

    /// A receive has completed.
    fn received(
        &mut self,
        core: &mut LaneCore,
        ring: &mut Ring,
        outcome: Outcome,
        bytes: Bytes,
        sink: &mut impl Sink,
    ) -> Result<()> {
        let channel = &mut self.buffer().channel;
        match outcome {
            // With TLS the channel knows how the connection ended.
            Outcome::Done(count) if count > 0 || channel.has_tls() => {
                channel.filled(bytes, count as usize);
            }
            other => return Err(core.failed(other)),
        }
        self.take_all(core, ring, sink)
    }

    /// Takes everything from the buffer that can be placed now, then receives more.
    fn take_all(
        &mut self,
        core: &mut LaneCore,
        ring: &mut Ring,
        sink: &mut impl Sink,
    ) -> Result<()> {
        loop {
            match core.receiver.next_target() {
                // The source may close a lane that has ended.
                Target::Control { .. } if core.receiver.is_ended() => return Ok(()),
                Target::Control { exact } => {
                    if !self.buffer().take_control(core, exact, sink)? {
                        break;
                    }
                    self.control_taken(core);
                }
                Target::Run(run) if core.lacks_room(&run) => {
                    return core.pause_for(ring, Pause::Room);
                }
                Target::Run(run) => match self.land(core, &run, sink)? {
                    Step::Taken => {}
                    Step::Short => break,
                    Step::EventsPending => return core.pause_for(ring, Pause::Events),
                },
            }
        }
        self.arm(core, ring)
    }
}

impl Buffer {
    pub(super) fn new(channel: Channel) -> Buffer {
        Buffer { channel, copied: 0 }
    }

    /// A receive of all available bytes.
    pub(super) fn receive(&mut self, core: &LaneCore) -> Op {
        Op::recv(core.socket(), self.channel.free())
    }

    /// Takes up to `exact` bytes of a header or a body. False if there are none.
    fn take_control(
        &mut self,
        core: &mut LaneCore,
        exact: usize,
        sink: &mut impl Sink,
    ) -> Result<bool> {
        let bytes = self.channel.plain();
        let count = exact.min(bytes.len());
        if count == 0 {
            return Ok(false);
        }
        core.control(&bytes[..count], sink)?;
        self.channel.take(count);
        Ok(true)
    }

    /// Bytes of a run that are here.
    pub(super) fn bytes_of(&self, run: &RunTarget) -> usize {
        let left = usize::try_from(run.bytes).expect("64-bit Linux");
        left.min(self.channel.plain().len())
    }

    /// The whole pages among them.
    pub(super) fn page_bytes_of(&self, core: &LaneCore, run: &RunTarget) -> usize {
        let unit_shift = core.guest.region(run.region).memory.unit_shift;
        self.bytes_of(run) >> unit_shift << unit_shift
    }

    /// With checksums: compares the run with its checksum, once all of it is here. False before that.
    pub(super) fn verify(&mut self, core: &mut LaneCore, run: &RunTarget) -> Result<bool> {
        if !core.is_unverified() {
            return Ok(true);
        }
        let here = self.bytes_of(run);
        if (here as u64) < run.bytes {
            return Ok(false);
        }
        let whole = &self.channel.plain()[..here];
        core.verify(|sums| {
            sums::of_slice(whole, sums);
            Ok(())
        })?;
        Ok(true)
    }

    /// Writes the whole pages of a run that are here to its file, or copies them in.
    pub(super) fn land(
        &mut self,
        core: &mut LaneCore,
        run: &RunTarget,
        sink: &mut impl Sink,
    ) -> Result<Step> {
        if !self.verify(core, run)? {
            return Ok(Step::Short);
        }
        let bytes = self.page_bytes_of(core, run);
        if bytes == 0 {
            return Ok(Step::Short);
        }
        if core.guest.region(run.region).memory.is_copied_in() {
            let range = core.range_of(run, bytes);
            core.copy_in(range, &self.channel.plain()[..bytes], &mut self.copied)?;
            if self.copied < bytes {
                return Ok(Step::EventsPending);
            }
            self.copied = 0;
            self.landed(core, bytes, sink)?;
        } else {
            self.write(core, run, bytes, sink)?;
        }
        Ok(Step::Taken)
    }

    /// Writes `bytes` of a run to its file.
    pub(super) fn write(
        &mut self,
        core: &mut LaneCore,
        run: &RunTarget,
        bytes: usize,
        sink: &mut impl Sink,
    ) -> Result<()> {
        core.write(run, &self.channel.plain()[..bytes])?;
        self.landed(core, bytes, sink)
    }

    /// `bytes` of a run are in place.
    pub(super) fn landed(
        &mut self,
        core: &mut LaneCore,
        bytes: usize,
        sink: &mut impl Sink,
    ) -> Result<()> {
        self.channel.take(bytes);
        core.landed(bytes, sink)
    }

    /// Asserts the [module's](self) invariant. The lane has not failed.
    pub(super) fn assert_invariants(&self, core: &LaneCore) {
        assert!(core.in_flight() <= 1, "{}: one thing is in flight", core.name);
        assert!(
            core.pause().is_none() || self.channel.is_at_rest(),
            "{}: nothing is received during a pause",
            core.name
        );
        match core.pause() {
            Some(Pause::Events) => assert!(self.copied < self.channel.plain().len()),
            Some(Pause::Room) | None => assert_eq!(self.copied, 0),
        }
    }
}
