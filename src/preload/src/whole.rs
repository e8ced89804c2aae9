//! Memory in huge pages is mapped by them again once all of it is there.
//!
//! A page that was served by itself left a small mapping in its block, and the kernel would keep mapping that
//! block by small pages. MADV_COLLAPSE has it map the block whole, which moves no byte.

use std::os::fd::{AsRawFd, OwnedFd};

use crate::sys;

/// What a tmpfs that makes huge pages gives as its files' `st_blksize`.
pub(crate) const HUGE_PAGE_SIZE: usize = 2 << 20;

/// The most that one call is for. Each first empties what every core has put by for the kernel's lists of pages,
/// and waits for that (`lru_add_drain_all` in its mm/khugepaged.c), which takes longer than to map a block; after
/// one that fails the halves are tried.
const CALL_SIZE: usize = 256 << 20;

/// A page that somebody holds at the moment makes the kernel give up on its block (EAGAIN).
const ATTEMPTS_MAX: usize = 3;

/// A mapping of a file in huge pages, from `offset` of it on. Only what the file has is mapped whole: holes cannot
/// be, and each would be a call that fails. A block that is in use at the moment is tried again, and then left to the
/// kernel's own daemon.
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

/// As the kernel stops at the first block that it cannot map whole, and does not say at which.
fn collapse(start: usize, size: usize) {
    let is_one = size == HUGE_PAGE_SIZE;
    for _ in 0..if is_one { ATTEMPTS_MAX } else { 1 } {
        let blocks = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: how the blocks are mapped changes, and no content. The monitor may have unmapped them meanwhile;
        // then there is nothing to do, and the kernel says so.
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
