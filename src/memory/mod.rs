//! Guest memory on this machine: its files and mappings, what of it has come, what of it has gone.
//!
//! - [`region`]: a RAM file mapped into this process, pointers and lengths only
//! - [`pages`]: the destination's page states (Missing → Landing → Cached) and who waits
//! - [`blocks`]: which parts of a region are complete and can leave the userfaultfd
//! - [`kind`]: how the guest maps it: shared, private, anonymous
//! - [`guarded`]: reads of mapped memory that may not be there any more
//! - [`fragments`]: discarded parts of landing units that are larger than the guest's pages
//! - [`acks`]: what the destination has of the source's pages, so that they may be freed
//! - [`claim`]: whose a RAM file is, and who moves it
//! - [`claims`]: the source's claim bitmap and the order in which pages leave
//! - [`bits`]: a bit a page
//! - [`dirty`]: which pages a running guest has written, and who knows
//! - [`data`]: where a RAM file has data, and where holes
//! - [`copy`]: guest memory that is read here, for its sum or to be encrypted
//! - [`sequences`]: who will want which pages soon: what the background runs ahead of
//! - [`sync`]: the atomics of all of these, so that a model checker can take their place
//! - [`words`]: state that outlives this process, where a session can be taken over
//! - [`staging`]: contents of memory that is no file of the guest's, until they have left
//! - [`stamp`]: is a file still as it was
//! - [`zero`]: is this page all zeroes

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

/// A block is what is completed and unregistered as one, and what a bulk lane takes as one: 2 MiB,
/// the size of a huge page on x86-64, or one page where pages are larger.
pub(crate) const BLOCK_BYTES: u64 = 2 << 20;

/// The kernel's pages that umem moves memory on ([`check_pages`]).
const PAGE_BYTES: u64 = 4096;

/// Bytes of this kernel's pages, where nothing asks for huge ones: what mincore(2) and the page map count in, and
/// what a file that is not on hugetlbfs consists of. The kernel is asked once.
pub(crate) fn small_page_bytes() -> u64 {
    static BYTES: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *BYTES.get_or_init(|| {
        // SAFETY: no memory is passed.
        let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        u64::try_from(bytes).expect("every kernel has pages (sysconf(3))")
    })
}

/// Refuses a kernel whose pages are not of 4 KiB (16 or 64 KiB, on other architectures). A landing unit is never
/// smaller than the kernel's page, and no test has moved memory on such a kernel.
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
