//! Guest memory on this machine: its files and mappings, and the states of its pages.
//!
//! - [`region`]: a RAM file mapped into this process, pointers and lengths only
//! - [`pages`]: the destination's page states (Missing → Landing → Cached) and waiters
//! - [`blocks`]: complete parts of a region, which can leave the userfaultfd
//! - [`kind`]: how the guest maps it: shared, private, anonymous
//! - [`guarded`]: reads of mapped memory that may be gone
//! - [`fragments`]: discarded parts of landing units that are larger than the guest's pages
//! - [`acks`]: pages that the destination has acknowledged, so that the source may free them
//! - [`claim`]: the locks and checks of a RAM file
//! - [`claims`]: the source's claim bitmap and the order in which pages are sent
//! - [`bits`]: a bit a page
//! - [`dirty`]: pages that a running guest has written
//! - [`data`]: data and holes of a RAM file
//! - [`copy`]: guest memory that umem copies out, for its sum or to encrypt it
//! - [`sequences`]: pages that the guest will want soon, which the background sends first
//! - [`sync`]: the atomics of all of these, which a model checker can replace
//! - [`words`]: state that outlives this process, for a takeover
//! - [`staging`]: contents of memory that is no file of the guest's, until they have been sent
//! - [`stamp`]: whether a file has changed
//! - [`zero`]: whether a page is all zeroes

pub(crate) mod acks;
pub(crate) mod bits;
pub(crate) mod blocks;
pub(crate) mod claim;
pub(crate) mod claims;
pub(crate) mod copy;
pub(crate) mod created;
pub(crate) mod data;
pub(crate) mod dirty;
pub(crate) mod fragments;
pub(crate) mod guarded;
pub(crate) mod kind;
pub(crate) mod pages;
pub(crate) mod region;
pub(crate) mod sequences;
pub(crate) mod staging;
pub(crate) mod stamp;
pub(crate) mod sums;
pub(crate) mod sync;
pub(crate) mod words;
pub(crate) mod zero;

use crate::error::{Error, Result};

/// The unit in which memory completes, is unregistered, and is taken by a bulk lane: 2 MiB, the
/// size of a huge page on x86-64, or one page if pages are larger.
pub(crate) const BLOCK_BYTES: u64 = 2 << 20;

/// The kernel page size that umem supports ([`check_pages`]).
const PAGE_BYTES: u64 = 4096;

/// Bytes of this kernel's small pages: the unit of mincore(2) and the page map, and of files
/// outside hugetlbfs. The kernel is asked once.
pub(crate) fn small_page_bytes() -> u64 {
    static BYTES: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *BYTES.get_or_init(|| {
        // SAFETY: no memory is passed.
        let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        u64::try_from(bytes).expect("every kernel has pages (sysconf(3))")
    })
}

/// Refuses a kernel with pages of another size than 4 KiB (16 or 64 KiB, on other architectures). A
/// landing unit is never smaller than the kernel's page, and no test has moved memory on such a
/// kernel.
///
/// # Errors
/// The kernel's page size, and the kernel to boot.
pub(crate) fn check_pages() -> Result<()> {
    let bytes = small_page_bytes();
    if bytes == PAGE_BYTES {
        return Ok(());
    }
    Err(Error::Environment(format!(
        "this kernel has pages of {bytes} bytes, and umem moves memory in pages of {PAGE_BYTES} bytes: boot a kernel \
         with pages of 4 KiB"
    )))
}

/// Pages in a block for pages of `1 << page_shift` bytes.
pub(crate) fn block_pages(page_shift: u8) -> u64 {
    (BLOCK_BYTES >> page_shift).max(1)
}
