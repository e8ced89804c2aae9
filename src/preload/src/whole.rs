//! Maps complete memory with huge pages again.
//!
//! A page that was served on demand left a small mapping in its block, and the kernel would keep mapping that block
//! with small pages. MADV_COLLAPSE makes the kernel map the block as a whole, which moves no byte.

use std::os::fd::{AsRawFd, OwnedFd};

use crate::sys;

/// The `st_blksize` of files on a tmpfs that makes huge pages.
pub(crate) const HUGE_PAGE_SIZE: usize = 2 << 20;

/// The most bytes of one call. Each call first drains every core's page lists and waits for that (`lru_add_drain_all`
/// in the kernel's mm/khugepaged.c), which takes longer than mapping a block. After a failed call the halves are tried.
const CALL_SIZE: usize = 256 << 20;

/// The most attempts for a block: the kernel gives up on a block while one of its pages is in use (EAGAIN).
const ATTEMPTS_MAX: usize = 3;

/// Maps a file's mapping, from `offset` of the file on, with huge pages. Holes are skipped: their calls would fail. A
/// block in use is tried again, and then left to the kernel's own daemon.
pub(crate) fn map(address: usize, length: usize, file: &OwnedFd, offset: u64) {
    let end = offset.saturating_add(length as u64);
    let mut at = offset;
    while let Some(data) = sys::next_data(file.as_raw_fd(), at).filter(|&data| data < end) {
        at = sys::next_hole(file.as_raw_fd(), data).map_or(end, |hole| hole.min(end));
        let from = address + (data - offset) as usize;
        let to = address + (at - offset) as usize;
        let mut call = from.next_multiple_of(HUGE_PAGE_SIZE);
        while call + HUGE_PAGE_SIZE <= to {
            let size = CALL_SIZE.min((to - call) / HUGE_PAGE_SIZE * HUGE_PAGE_SIZE);
            collapse(call, size);
            call += size;
        }
        if at <= data {
            return;
        }
    }
}

/// Maps the range, or its halves: the kernel stops at the first block that it cannot map as a whole, and does not
/// report which.
fn collapse(start: usize, size: usize) {
    let is_one = size == HUGE_PAGE_SIZE;
    for _ in 0..if is_one { ATTEMPTS_MAX } else { 1 } {
        let blocks = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: changes how the blocks are mapped, and no content. If the monitor has unmapped them meanwhile, the
        // call fails without effect.
        if unsafe { sys::madvise(blocks, size, sys::MADV_COLLAPSE) } == 0 {
            return;
        }
    }
    if !is_one {
        let half = size / HUGE_PAGE_SIZE / 2 * HUGE_PAGE_SIZE;
        collapse(start, half);
        collapse(start + half, size - half);
    }
}
