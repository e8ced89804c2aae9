//! `--release-ram`: frees pages at the source after the destination has acknowledged them, while the migration runs.
//!
//! The thread exists from the switchover on: before it every page is needed here, in case the guest is resumed. Lanes
//! note acknowledgements in [`SourceMemory`] and wake the thread. It punches holes into the RAM files, a few at a time;
//! the control thread frees the remaining pages at the end. Between groups of holes the thread checks whether another
//! process has changed the files.

use crate::runtime::screen;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use nix::fcntl::FallocateFlags;
use umem_ring::{Completion, Config, Fd, Op, Outcome, Ring, TOKEN_WAKE, Wait, Waker};
use umem_wire::RegionId;

use super::{SourceMemory, digest};
use crate::error::{Error, Result};
use crate::memory::stamp::Stamp;
use crate::runtime::panics;
use crate::runtime::worker::Started;

/// Holes punched at a time. The kernel punches each on a thread of its own, which competes with the lanes.
const RELEASES_MAX: usize = 4;

/// The token of the first hole that is being punched; those of the other holes follow.
const TOKEN_RELEASED: u64 = 0;

/// A hole that is being punched: its contents are no longer in the file once that is done.
struct Releasing {
    region: RegionId,
    digest: u64,
}

/// A hole that has been begun since the contents of its file were last known.
struct Punched {
    region: usize,
    bytes: u64,
    /// For the first hole of its file: the file's stamp from before.
    before: Option<Stamp>,
}

/// The parts of the release thread.
pub(crate) struct Releaser {
    pub(crate) memory: Arc<SourceMemory>,
}

impl Releaser {
    /// Frees pages until the migration ends. A file whose pages cannot be freed is reported and does not fail the
    /// migration: its pages stay.
    pub(crate) fn run(self, started: Started<Waker>) -> Result<()> {
        let mut ring = Ring::new(&Config { name: "release".into(), ..Config::default() })?;
        let files = self.memory.regions.iter().map(|region| region.ram.shared_file());
        let files = files.collect::<Result<Vec<Fd>>>()?;
        started.with(ring.waker()?);
        let mut queue = VecDeque::new();
        let mut releasing: [Option<Releasing>; RELEASES_MAX] = Default::default();
        let mut punched = Vec::with_capacity(RELEASES_MAX);
        loop {
            panics::point(format_args!("release"));
            if releasing.iter().all(Option::is_none) {
                self.settle(&mut punched)?;
            }
            // A group of holes is completed before the next one begins: the contents of the files are known only
            // between groups.
            while punched.len() < RELEASES_MAX
                && let Some(slot) = releasing.iter().position(Option::is_none)
                && let Some((region, offset, len)) = self.next(&mut queue)
            {
                self.unsettle(&mut punched, region, len)?;
                releasing[slot] = Some(self.begin(region, offset, len));
                let mode = (FallocateFlags::FALLOC_FL_PUNCH_HOLE
                    | FallocateFlags::FALLOC_FL_KEEP_SIZE)
                    .bits();
                ring.submit(
                    Op::fallocate(files[region].clone(), mode, self.in_file(region, offset), len),
                    TOKEN_RELEASED + slot as u64,
                )
                .map_err(|rejected| Error::Ring(rejected.error))?;
            }
            ring.enter(Wait::One)?;
            while let Some(Completion { token, outcome, .. }) = ring.next() {
                match (token, outcome) {
                    (TOKEN_WAKE, _) => {}
                    (slot, Outcome::Done(_)) => {
                        let slot = usize::try_from(slot - TOKEN_RELEASED).expect("our own token");
                        let done = releasing[slot].take().expect("released once");
                        self.memory.digests.add_digest(done.region, done.digest);
                    }
                    (_, other) => {
                        self.memory.digest_is_lost.store(true, Relaxed);
                        let why = crate::source::outcome_text(other);
                        screen::say(&format!(
                            "umem: the guest's RAM here stays allocated: freeing it: {why}"
                        ));
                        return Ok(());
                    }
                }
            }
            if self.memory.is_ending.load(Acquire) && ring.in_flight() == 0 {
                // The control thread checks the files itself at the end.
                let _ = self.settle(&mut punched);
                return Ok(());
            }
        }
    }

    fn in_file(&self, region: usize, offset: u64) -> u64 {
        self.memory.regions[region].ram.in_file(offset)
    }

    /// Notes that a hole is about to be punched.
    fn unsettle(&self, punched: &mut Vec<Punched>, region: usize, bytes: u64) -> Result<()> {
        let before = match punched.iter().any(|hole| hole.region == region) {
            true => None,
            false => self.memory.regions[region].ram.begin_holes()?,
        };
        punched.push(Punched { region, bytes, before });
        Ok(())
    }

    /// Called when no hole is being punched any more.
    fn settle(&self, punched: &mut Vec<Punched>) -> Result<()> {
        for (region, known) in self.memory.regions.iter().enumerate() {
            let ours = || punched.iter().filter(move |hole| hole.region == region);
            let before = ours().find_map(|hole| hole.before);
            known.ram.end_holes(before, ours().map(|hole| hole.bytes).sum())?;
        }
        punched.clear();
        Ok(())
    }

    /// Prepares a piece that is about to be freed; with a digest, its share of the digest is computed first.
    fn begin(&self, region: usize, offset: u64, len: u64) -> Releasing {
        let digest = match self.memory.is_checked {
            // The piece counts as zeroes when the rest is read.
            true => digest::of_part(&self.memory.regions[region].ram, offset, len)
                .map(|digest| digest.wrapping_sub(digest::of_zeroes(offset, len))),
            false => Ok(0),
        };
        // Without a digest the comparison at the end is impossible, which does not fail the migration.
        self.memory.digest_is_lost.fetch_or(digest.is_err(), Relaxed);
        let region = RegionId(u16::try_from(region).expect("at most 256 regions"));
        Releasing { region, digest: digest.unwrap_or(0) }
    }

    /// The next piece to free: region, offset and length in bytes. Refills the queue, which holds at most one group of
    /// pages.
    fn next(&self, queue: &mut VecDeque<(usize, u64, u64)>) -> Option<(usize, u64, u64)> {
        if self.memory.is_ending.load(Acquire) {
            return None;
        }
        for (index, region) in self.memory.regions.iter().enumerate() {
            if !queue.is_empty() {
                break;
            }
            region.take_acknowledged(|offset, len| queue.push_back((index, offset, len)));
        }
        queue.pop_front()
    }
}
