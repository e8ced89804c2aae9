//! `--release-ram`: frees at the source what the destination has acknowledged, while the migration
//! runs.
//!
//! The thread exists from the switchover on: before it every page is needed here, should the guest be
//! resumed. Lanes note acknowledgements in [`SourceMemory`] and wake it; it punches holes into the RAM
//! files, a few at a time, and what it has not come to at the end the control thread frees.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use nix::fcntl::FallocateFlags;
use umem_ring::{Completion, Config, Fd, Op, Outcome, Ring, TOKEN_WAKE, Wait, Waker};
use umem_wire::RegionId;

use super::digest;
use super::memory::SourceMemory;
use crate::error::{Error, Result};
use crate::panics;
use crate::progress;
use crate::worker::Started;

/// Holes punched at a time. The kernel does each on a thread of its own, which lanes compete with.
const RELEASES_MAX: usize = 4;

/// And those after it: which of the holes that are being punched.
const TOKEN_RELEASED: u64 = 0;

/// A hole that is being punched: what it held is not in its file any more once that is done.
struct Releasing {
    region: RegionId,
    digest: u64,
}

/// What the release thread needs.
pub(crate) struct Releaser {
    pub(crate) memory: Arc<SourceMemory>,
}

impl Releaser {
    /// Frees until the migration ends. A file that cannot be freed is no reason to fail: it is said,
    /// and the rest stays.
    pub(crate) fn run(self, started: Started<Waker>) -> Result<()> {
        let mut ring = Ring::new(&Config { name: "release".into(), ..Config::default() })?;
        let files = self.memory.regions.iter().map(|region| region.ram.shared_file());
        let files = files.collect::<Result<Vec<Fd>>>()?;
        started.with(ring.waker()?);
        let mut queue = VecDeque::new();
        let mut releasing: [Option<Releasing>; RELEASES_MAX] = Default::default();
        loop {
            panics::point(format_args!("release"));
            while let Some(slot) = releasing.iter().position(Option::is_none)
                && let Some((region, offset, len)) = self.next(&mut queue)
            {
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
                        let why = super::outcome_text(other);
                        progress::say(&format!(
                            "umem: the guest's RAM here stays allocated: freeing it: {why}"
                        ));
                        return Ok(());
                    }
                }
            }
            if self.memory.is_ending.load(Acquire) && ring.in_flight() == 0 {
                return Ok(());
            }
        }
    }

    fn in_file(&self, region: usize, offset: u64) -> u64 {
        self.memory.regions[region].ram.in_file(offset)
    }

    /// What is about to be freed, with what it comes to where that is to be known.
    fn begin(&self, region: usize, offset: u64, len: u64) -> Releasing {
        let digest = match self.memory.is_checked {
            // It counts as zeroes when the rest is read.
            true => digest::of_part(&self.memory.regions[region].ram, offset, len)
                .map(|digest| digest.wrapping_sub(digest::of_zeroes(offset, len))),
            false => Ok(0),
        };
        // That nothing can be compared at the end is no reason to fail.
        self.memory.digest_is_lost.fetch_or(digest.is_err(), Relaxed);
        let region = RegionId(u16::try_from(region).expect("at most 256 regions"));
        Releasing { region, digest: digest.unwrap_or(0) }
    }

    /// The next piece to free: region, offset and length in bytes. Refills the queue, which holds one
    /// group of pages at most.
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
