//! Complete parts of a region, and when a complete part leaves the userfaultfd.
//!
//! A block whose every page is cached needs no userfaultfd any more: once it is unregistered, the
//! kernel serves its faults alone and maps it with huge pages. But each call splits the guest's
//! mapping, and a checkerboard of finished blocks would exceed `vm.max_map_count` (65,530). So a
//! block leaves when it touches a part that has left already (the mapping does not split further),
//! or while the number of islands is below [`ISLANDS_MAX`]; otherwise it stays registered until a
//! neighbour leaves, and its faults are answered at once.

use std::ops::Range;

use super::block_pages;
use super::sync::{AtomicU32, AtomicU64, Ordering::SeqCst};

/// Islands of unregistered memory per region; each costs the guest up to two mappings, so this
/// stays far below the kernel's default of 65,530 mappings a process even with 16 regions.
pub(crate) const ISLANDS_MAX: u32 = 1024;

/// The blocks of one region.
pub(crate) struct Blocks {
    pages: u64,
    block_pages: u64,
    /// Missing pages of each block.
    missing: Box<[AtomicU32]>,
    /// Set by the thread that unregisters a block.
    left: Box<[AtomicU64]>,
    islands: AtomicU32,
}

impl Blocks {
    pub(crate) fn new(pages: u64, page_shift: u8) -> Blocks {
        let block_pages = block_pages(page_shift);
        let blocks = pages.div_ceil(block_pages);
        let size = |block: u64| block_pages.min(pages - block * block_pages);
        let missing = (0..blocks)
            .map(|b| AtomicU32::new(u32::try_from(size(b)).expect("a block has at most 512 pages")))
            .collect();
        let left = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Blocks { pages, block_pages, missing, left, islands: AtomicU32::new(0) }
    }

    /// Counts `first..first + pages` as cached and calls `leave` with each range of pages that the
    /// caller must now unregister.
    pub(crate) fn complete(&self, first: u64, pages: u64, mut leave: impl FnMut(Range<u64>)) {
        let end = first + pages;
        for block in first / self.block_pages..end.div_ceil(self.block_pages) {
            let from = first.max(block * self.block_pages);
            let to = end.min((block + 1) * self.block_pages);
            let count = u32::try_from(to - from).expect("a block has at most 512 pages");
            let before = self.missing[index(block)].fetch_sub(count, SeqCst);
            assert!(before >= count, "block {block} was completed twice");
            if before == count
                && let Some(blocks) = self.take_around(block)
            {
                leave(
                    blocks.start * self.block_pages
                        ..(blocks.end * self.block_pages).min(self.pages),
                );
            }
        }
    }

    /// Whether the block of `page` needs no userfaultfd any more.
    #[cfg(test)]
    fn has_left(&self, page: u64) -> bool {
        self.is_left(page / self.block_pages)
    }

    fn take_around(&self, block: u64) -> Option<Range<u64>> {
        let blocks = self.missing.len() as u64;
        let waiting = |b: u64| self.missing[index(b)].load(SeqCst) == 0 && !self.is_left(b);
        let mut range = block..block + 1;
        while range.start > 0 && waiting(range.start - 1) {
            range.start -= 1;
        }
        while range.end < blocks && waiting(range.end) {
            range.end += 1;
        }
        let touches = range.start == 0
            || range.end == blocks
            || self.is_left(range.start - 1)
            || self.is_left(range.end);
        if !touches && self.islands.fetch_add(1, SeqCst) >= ISLANDS_MAX {
            self.islands.fetch_sub(1, SeqCst);
            return None;
        }
        for b in range.clone() {
            self.left[index(b / 64)].fetch_or(1 << (b % 64), SeqCst);
        }
        Some(range)
    }

    fn is_left(&self, block: u64) -> bool {
        self.left[index(block / 64)].load(SeqCst) >> (block % 64) & 1 == 1
    }
}

fn index(block: u64) -> usize {
    usize::try_from(block).expect("blocks are in memory, so their index fits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_is_unregistered_with_its_last_page() {
        let blocks = Blocks::new(512 * 3 + 10, 12);
        let mut left = Vec::new();
        blocks.complete(512, 511, |range| left.push(range));
        assert_eq!(left, []);
        blocks.complete(1023, 1, |range| left.push(range));
        assert_eq!(left, vec![512..1024; 1]);
        blocks.complete(1024, 522, |range| left.push(range));
        assert_eq!(left, [512..1024, 1024..1536, 1536..1546]);
        assert!(blocks.has_left(1545) && !blocks.has_left(0));
    }

    #[test]
    fn checkerboard_of_complete_blocks_has_bounded_mappings() {
        const BLOCKS: u64 = 20_000;
        let blocks = Blocks::new(512 * BLOCKS, 12);
        let mut calls = 0;
        for block in (1..BLOCKS - 1).step_by(2) {
            blocks.complete(block * 512, 512, |_| calls += 1);
        }
        assert_eq!(calls, ISLANDS_MAX);
        // The gaps close: everything leaves, in ranges that cover each block.
        let mut pages = u64::from(calls) * 512;
        for block in (0..BLOCKS).step_by(2).chain([BLOCKS - 1]) {
            blocks.complete(block * 512, 512, |range| pages += range.end - range.start);
        }
        assert_eq!(pages, 512 * BLOCKS);
    }
}
