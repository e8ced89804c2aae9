//! Which pages a running guest has written: what is marked by a log, and taken by whoever sends pages.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Result;

/// A log of the pages that a guest writes.
pub(crate) trait DirtyLog: Send {
    /// Begins to track. From its return on every write is marked sooner or later, before `finish` returns.
    fn start(&mut self, marks: Arc<DirtyMap>) -> Result<()>;
    /// Returns once a whole look over the guest is done: every page written before the call is marked.
    fn next(&mut self) -> Result<()>;
    /// The guest stands still (it has been stopped by the host): the last marks.
    fn finish(&mut self) -> Result<()>;
}

/// A bit a landing unit of each region.
#[derive(Debug)]
pub(crate) struct DirtyMap {
    regions: Vec<Vec<AtomicU64>>,
}

impl DirtyMap {
    /// Of regions of so many units, none of them marked.
    pub(crate) fn new(units: &[u64]) -> DirtyMap {
        let words = |units: &u64| {
            let words = usize::try_from(units.div_ceil(64)).expect("memory of this machine");
            std::iter::repeat_with(AtomicU64::default).take(words).collect()
        };
        DirtyMap { regions: units.iter().map(words).collect() }
    }

    pub(crate) fn mark(&self, region: usize, pages: Range<u64>) {
        for page in pages {
            self.regions[region][(page / 64) as usize]
                .fetch_or(1 << (page % 64), Ordering::Release);
        }
    }

    /// Takes the mark of a page: whether there was one.
    pub(crate) fn take(&self, region: usize, page: u64) -> bool {
        let bit = 1 << (page % 64);
        let word = &self.regions[region][(page / 64) as usize];
        word.fetch_and(!bit, Ordering::Acquire) & bit != 0
    }
}
