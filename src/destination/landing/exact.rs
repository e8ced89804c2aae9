//! A lane that receives a byte only when its place is known.
//!
//! A header or a body is received whole, into a small buffer. A run is received whole, with the receive of the next
//! header linked behind it. The place of its bytes depends on the run:
//!
//! - *in place*: into this process's mapping of the file. Huge pages, and a small page that a vCPU waits for.
//! - *staged*: into a buffer, from which it is then written to the file or copied in. All other small pages, and all
//!   runs that are copied in. A run that cannot be copied in at once is held, and so is the header behind it if that
//!   arrives.
//!
//! ```text
//! in flight:
//!   header  -->  run, header  -->  header          a run that is in place as soon as it is whole
//!   header  -->  run, header  -->  timer, header   a run that is held
//!                                    |-->  header  the rest of it is copied in before the header comes
//!                                    '-->  timer   the header comes before that, and is kept
//!   header  -->  timer                             a run that there is no room for
//! ```
//!
//! **Invariant:** while the lane has neither failed nor ended, the operations in flight are one of these: a header or a
//! body; a run and the header behind it; the timer of a lane that waits for room; the timer of a held run, of which at
//! most a part has been copied in, and the header behind it unless that has arrived. A header buffer is here while a
//! lane waits for room. Neither a header buffer nor the staging buffer is here while a run is held.
//! [`Exact::assert_invariants`] asserts it.

use umem_ring::{Bytes, Chain, Memory, Op, Outcome, Ring};
use umem_wire::{HEADER_BYTES, PageRange, RunTarget, Target};

use super::lane_core::{LaneCore, Pause, Sink};
use super::{STAGING_BYTES, TOKEN_CONTROL, TOKEN_RUN};
use crate::error::Result;
use crate::memory::sums;

/// The buffers of such a lane.
pub(super) struct Exact {
    /// For the next header. A body has a buffer of its own, and the header behind it a new one.
    header: Option<Bytes>,
    /// For a staged run, once there has been one.
    staging: Option<Bytes>,
    held: Option<Held>,
}

/// A staged run that waits to be copied in.
struct Held {
    range: PageRange,
    staging: Bytes,
    /// Its bytes that are in place.
    done: usize,
    /// The header behind it, if that has arrived or its receive has failed.
    next: Option<(Outcome, Bytes)>,
}

impl Exact {
    pub(super) fn new() -> Exact {
        Exact { header: Some(Bytes::with_capacity(HEADER_BYTES)), staging: None, held: None }
    }

    /// Starts the next receive.
    pub(super) fn arm(&mut self, core: &mut LaneCore, ring: &mut Ring) -> Result<()> {
        match core.receiver.next_target() {
            Target::Control { exact } => {
                let memory = self.header_of(exact);
                core.submit(ring, Op::recv(core.socket(), memory).wait_all(), TOKEN_CONTROL)
            }
            Target::Run(run) if core.lacks_room(&run) => core.pause_for(ring, Pause::Room),
            Target::Run(run) => {
                let pages = self.memory_for(core, &run);
                let header = self.header_of(HEADER_BYTES);
                let pair = Chain::new()
                    .then(Op::recv(core.socket(), pages).wait_all(), TOKEN_RUN)
                    .then(Op::recv(core.socket(), header).wait_all(), TOKEN_CONTROL);
                core.submit_pair(ring, pair)
            }
        }
    }

    /// The place where a run is received.
    fn memory_for(&mut self, core: &LaneCore, run: &RunTarget) -> Memory {
        let region = core.guest.region(run.region);
        let memory = region.memory;
        let is_in_place =
            memory.is_received_into() || !memory.is_copied_in() && !core.is_background(run);
        if is_in_place {
            return Memory::from(region.file().span(run.byte_offset, run.bytes));
        }
        let len = usize::try_from(run.bytes).expect("a run is at most 2 MiB");
        let staging = self.staging.take();
        let staging = staging.unwrap_or_else(|| Bytes::with_capacity(STAGING_BYTES));
        Memory::from(staging.slice(0..len))
    }

    /// The header's buffer, or a new one for a body.
    fn header_of(&mut self, len: usize) -> Bytes {
        match self.header.take() {
            Some(header) if header.capacity() == HEADER_BYTES && len <= HEADER_BYTES => {
                header.slice(0..len)
            }
            _ => Bytes::with_capacity(len),
        }
    }

    /// Continues the held run, or starts the next receive.
    pub(super) fn go_on(
        &mut self,
        core: &mut LaneCore,
        ring: &mut Ring,
        sink: &mut impl Sink,
    ) -> Result<()> {
        match self.held.take() {
            Some(held) => self.copy_in(core, ring, held, sink),
            None => self.arm(core, ring),
        }
    }

    /// The receive of a header or a body has completed.
    pub(super) fn control_received(
        &mut self,
        core: &mut LaneCore,
        ring: &mut Ring,
        outcome: Outcome,
        bytes: Bytes,
        sink: &mut impl Sink,
    ) -> Result<()> {
        if let Some(held) = &mut self.held {
            held.next = Some((outcome, bytes));
            return Ok(());
        }
        match outcome {
            Outcome::Done(_) => {}
            // The run before it has failed and has the reason.
            Outcome::NotStarted { .. } => return Ok(()),
            other => return Err(core.failed(other)),
        }
        let taken = core.control(bytes.as_slice(), sink);
        if bytes.capacity() == HEADER_BYTES {
            self.header = Some(bytes);
        }
        taken?;
        // The source may close a lane that has ended.
        if core.receiver.is_ended() { Ok(()) } else { self.arm(core, ring) }
    }

    /// The receive of a run has completed.
    pub(super) fn run_received(
        &mut self,
        core: &mut LaneCore,
        ring: &mut Ring,
        outcome: Outcome,
        memory: Option<Memory>,
        sink: &mut impl Sink,
    ) -> Result<()> {
        let Outcome::Done(_) = outcome else {
            return Err(core.failed(outcome));
        };
        let memory = memory.expect("a receive gives its memory back");
        core.verify(|sums| sums::of_memory(&memory, sums))?;
        match memory {
            Memory::Bytes(staging) => self.staged(core, ring, staging, sink),
            in_place => core.landed(in_place.len(), sink),
        }
    }

    /// A run is whole in the staging buffer.
    fn staged(
        &mut self,
        core: &mut LaneCore,
        ring: &mut Ring,
        staging: Bytes,
        sink: &mut impl Sink,
    ) -> Result<()> {
        let Target::Run(run) = core.receiver.next_target() else {
            unreachable!("a run that has been received is the current one")
        };
        if core.guest.region(run.region).memory.is_copied_in() {
            let range = core.range_of(&run, staging.len());
            return self.copy_in(core, ring, Held { range, staging, done: 0, next: None }, sink);
        }
        core.write(&run, staging.as_slice())?;
        self.placed(core, staging, sink)
    }

    /// Copies a run in, or the rest of it, and holds the bytes that cannot be copied in now.
    fn copy_in(
        &mut self,
        core: &mut LaneCore,
        ring: &mut Ring,
        mut held: Held,
        sink: &mut impl Sink,
    ) -> Result<()> {
        core.copy_in(held.range, held.staging.as_slice(), &mut held.done)?;
        if held.done < held.staging.len() {
            self.held = Some(held);
            return core.pause_for(ring, Pause::Events);
        }
        let Held { staging, next, .. } = held;
        self.placed(core, staging, sink)?;
        match next {
            Some((outcome, bytes)) => self.control_received(core, ring, outcome, bytes, sink),
            None => Ok(()),
        }
    }

    /// The run in the staging buffer is in place.
    fn placed(&mut self, core: &mut LaneCore, staging: Bytes, sink: &mut impl Sink) -> Result<()> {
        let bytes = staging.len();
        self.staging = Some(staging);
        core.landed(bytes, sink)
    }

    /// Asserts the [module's](self) invariant. The lane has not failed.
    pub(super) fn assert_invariants(&self, core: &LaneCore) {
        let in_flight = core.in_flight();
        let is_run = matches!(core.receiver.next_target(), Target::Run(_));
        match (core.pause(), &self.held) {
            (None, None) if core.receiver.is_ended() => assert_eq!(in_flight, 0),
            (None, None) => assert_eq!(in_flight, 1 + u32::from(is_run), "a header, or a pair"),
            (Some(Pause::Room), None) => {
                assert!(is_run, "what waits for room is a run");
                assert_eq!(in_flight, 1, "the timer");
                assert!(self.header.is_some(), "no header is received");
            }
            (Some(Pause::Events), Some(held)) => {
                assert!(is_run && held.done < held.staging.len());
                assert_eq!(held.range, core.current.as_ref().expect("a run is held").range);
                assert!(core.guest.region(held.range.region).memory.is_copied_in());
                assert_eq!(in_flight, 1 + u32::from(held.next.is_none()), "the timer, the header");
                assert!(self.staging.is_none() && self.header.is_none());
            }
            (pause, held) => panic!("{pause:?} of a run that is held: {}", held.is_some()),
        }
    }
}
