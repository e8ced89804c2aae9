//! `--release-ram`: frees at the source what the destination has acknowledged, while the migration
//! runs.
//!
//! The thread exists from the switchover on: before it every page is needed here, should the guest be
//! resumed. Lanes note acknowledgements in [`SourceMemory`] and wake it; it punches holes into the RAM
//! files, a few at a time, and what it has not come to at the end the control thread frees.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use nix::fcntl::FallocateFlags;
use umem_ring::{Completion, Config, Fd, Op, Outcome, Ring, TOKEN_WAKE, Wait, Waker};

use super::memory::SourceMemory;
use crate::error::{Error, Result};
use crate::worker::Started;

/// Holes punched at a time. The kernel does each on a thread of its own, which lanes compete with.
const RELEASES_MAX: usize = 4;

const TOKEN_RELEASED: u64 = 0;

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
        loop {
            while ring.in_flight() < RELEASES_MAX
                && let Some((region, offset, len)) = self.next(&mut queue)
            {
                let mode = (FallocateFlags::FALLOC_FL_PUNCH_HOLE
                    | FallocateFlags::FALLOC_FL_KEEP_SIZE)
                    .bits();
                ring.submit(
                    Op::fallocate(files[region].clone(), mode, offset, len),
                    TOKEN_RELEASED,
                )
                .map_err(|rejected| Error::Ring(rejected.error))?;
            }
            ring.enter(Wait::One)?;
            while let Some(Completion { token, outcome, .. }) = ring.next() {
                match (token, outcome) {
                    (TOKEN_WAKE, _) | (_, Outcome::Done(_)) => {}
                    (_, other) => {
                        let why = super::outcome_text(other);
                        eprintln!("umem: the guest's RAM here stays allocated: freeing it: {why}");
                        return Ok(());
                    }
                }
            }
            if self.memory.is_ending.load(Acquire) && ring.in_flight() == 0 {
                return Ok(());
            }
        }
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
