//! A lane that is read ahead.

use umem_ring::{Op, Outcome, Ring};
use umem_wire::{PageRange, RunTarget, Target};

use super::failing::{not_written, write};
use super::pipe::{Piped, Stage, Stuck};
use super::{Arrived, Given, Held, LaneReader, TOKEN_AHEAD, TOKEN_READABLE};
use crate::destination::ahead::{AHEAD_SHIFT_MAX, Ahead};
use crate::destination::guest::PageId;
use crate::error::{Error, Result};
use crate::memory::sums;

impl LaneReader {
    /// The same of a lane that is read ahead: as much as there is room for, or, where a run goes through the
    /// pipe, what is behind it.
    pub(super) fn arm_ahead(&mut self, ring: &mut Ring) -> Result<()> {
        let target = self.receiver.next_target();
        let socket = self.socket();
        let Some(ahead) = &mut self.ahead else { return Ok(()) };
        if ahead.channel.has_ended() {
            return Err(self.ended());
        }
        let stage = self.piped.as_ref().map_or(Stage::Off, Piped::stage);
        let (op, token) = match (stage, target) {
            (Stage::Run, _) => (Op::poll(socket, libc::POLLIN as u32), TOKEN_READABLE),
            // Nothing is left in the buffer when a run has gone by it.
            (Stage::Header, Target::Control { exact }) => {
                (Op::recv(socket, ahead.channel.free().slice(0..exact)), TOKEN_AHEAD)
            }
            _ => {
                // On the demand lane nothing is likely to come before the next request; on a bulk lane, or behind the
                // beginning of an answer, there is more already.
                let is_idle = !self.is_bulk && ahead.channel.plain().is_empty();
                let receive = Op::recv(socket, ahead.channel.free());
                (if is_idle { receive.poll_first() } else { receive }, TOKEN_AHEAD)
            }
        };
        ring.submit(op, token).map_err(|rejected| Error::Ring(rejected.error))?;
        self.in_flight += 1;
        Ok(())
    }

    /// Takes what has been read ahead, then receives more.
    pub(super) fn take_ahead(
        &mut self,
        ring: &mut Ring,
        wake: &mut impl FnMut(PageId),
        arrived: &mut impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        while let Some(Ahead { channel, placed }) = &mut self.ahead
            && channel.is_at_rest()
        {
            let bytes = channel.plain();
            match self.receiver.next_target() {
                // The source may close a lane that has ended.
                Target::Control { .. } if self.receiver.is_ended() => return Ok(()),
                Target::Control { .. } if bytes.is_empty() => break,
                Target::Control { exact } => {
                    let taken = exact.min(bytes.len());
                    let result = self.receiver.control(&bytes[..taken]);
                    channel.take(taken);
                    self.events(wake, arrived)?;
                    result.map_err(|error| self.unreadable(&error))?;
                    if let (Target::Control { .. }, Some(piped)) =
                        (self.receiver.next_target(), &mut self.piped)
                    {
                        piped.rest();
                    }
                }
                Target::Run(run) => {
                    let region = self.guest.region(run.region);
                    // A run of several pages is background on whatever lane.
                    let nobody_waits = self.is_bulk || run.bytes > 1 << region.unit_shift();
                    if nobody_waits && !self.guest.has_room() {
                        self.held = Some(Held::Room);
                        return self.arm_retry(ring);
                    }
                    let there = usize::try_from(run.bytes).expect("64-bit Linux");
                    if !region.memory.is_copied_in() && region.unit_shift() > AHEAD_SHIFT_MAX {
                        let there = bytes.len().min(there - *placed);
                        if there == 0 {
                            break;
                        }
                        let byte_offset = run.byte_offset + *placed as u64;
                        write(&self.guest, &bytes[..there], &RunTarget { byte_offset, ..run })?;
                        channel.take(there);
                        *placed += there;
                        self.poured(&run, wake, arrived)?;
                        continue;
                    }
                    if let Some(piped) = &mut self.piped
                        && piped.takes(run.bytes, bytes.len())
                    {
                        let whole = there.min(bytes.len());
                        if whole == 0 {
                            break;
                        }
                        if whole as u64 == run.bytes {
                            piped.run_ended();
                        }
                        write(&self.guest, &bytes[..whole], &run)?;
                        channel.take(whole);
                        self.landed(whole, wake, arrived)?;
                        continue;
                    }
                    if self.receiver.is_checked() && !self.is_verified {
                        let Some(whole) = bytes.get(..there) else { break };
                        sums::of_slice(whole, &mut self.sums);
                        let verified = self.receiver.verify(&self.sums);
                        verified.map_err(|error| self.unreadable(&error))?;
                        self.is_verified = true;
                        continue;
                    }
                    let pages = there.min(bytes.len()) >> region.unit_shift();
                    if pages == 0 {
                        break;
                    }
                    let whole = pages << region.unit_shift();
                    if region.memory.is_copied_in() {
                        let range = PageRange {
                            region: run.region,
                            first: run.byte_offset >> region.unit_shift(),
                            pages: pages as u64,
                        };
                        let copied = self.guest.place(range, &bytes[..whole], placed);
                        self.stuck_bytes = if copied.is_err() { *placed } else { 0 };
                        copied?;
                        if *placed < whole {
                            self.held = Some(Held::Ahead);
                            return self.arm_retry(ring);
                        }
                        *placed = 0;
                    } else {
                        let page = run.byte_offset >> region.unit_shift();
                        let page = PageId { region: run.region, page };
                        // All of the run, not what is left of one: the others of its pages are not given.
                        let is_one = self.current.is_some_and(|run| run.pages == 1);
                        let given = match self.may_give && is_one {
                            true => self.guest.give(page, &bytes[..whole])?,
                            false => None,
                        };
                        match given {
                            Some(arrived) => self.given.push(Given { page, arrived }),
                            None => write(&self.guest, &bytes[..whole], &run)?,
                        }
                        self.is_given = given.is_some();
                    }
                    channel.take(whole);
                    self.landed(whole, wake, arrived)?;
                }
            }
        }
        self.arm(ring)
    }

    /// Moves what has come of the current run through the pipe.
    pub(super) fn carry(
        &mut self,
        wake: &mut impl FnMut(PageId),
        arrived: &mut impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        let (Target::Run(run), Some(piped)) = (self.receiver.next_target(), &mut self.piped) else {
            unreachable!("only a run goes through the pipe");
        };
        let ram = self.guest.region(run.region).file();
        match piped.carry(&self.socket, ram.descriptor(), run.byte_offset, run.bytes) {
            Ok(0) => Err(self.failed(Outcome::Done(0))),
            Ok(bytes) => {
                if bytes as u64 == run.bytes {
                    piped.run_ended();
                }
                self.landed(bytes, wake, arrived)
            }
            Err(Stuck::Unable) => {
                piped.give_up();
                Ok(())
            }
            Err(Stuck::Socket(errno)) => Err(self.lost(errno.desc().into())),
            Err(Stuck::File(errno)) => Err(not_written(&ram.name, errno.into())),
        }
    }

    /// More of a run is in its huge page; perhaps all of it.
    pub(super) fn poured(
        &mut self,
        run: &RunTarget,
        wake: &mut impl FnMut(PageId),
        arrived: &mut impl FnMut(Arrived) -> Result<()>,
    ) -> Result<()> {
        let Some(ahead) = self.ahead.as_mut().filter(|ahead| ahead.placed as u64 == run.bytes)
        else {
            return Ok(());
        };
        let bytes = std::mem::take(&mut ahead.placed);
        let span = self.guest.region(run.region).file().span(run.byte_offset, run.bytes);
        self.verify(|sums| sums::of_span(&span, sums))?;
        self.landed(bytes, wake, arrived)
    }
}
