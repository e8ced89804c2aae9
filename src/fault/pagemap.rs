//! The populated pages of a process, from `/proc/PID/pagemap`
//! (`Documentation/admin-guide/mm/pagemap.rst`).

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use crate::memory::small_page_bytes;

/// The page of an entry is in memory, or swapped out.
const POPULATED: u64 = 1 << 63 | 1 << 62;

/// Entries of the page map per read.
const ENTRIES: usize = 8192;

/// Whether any page of a range of addresses is populated: in the process `pid`, or in this one.
///
/// # Errors
/// The process has ended, or this process may not read its page map.
pub(crate) fn is_populated(pid: Option<u32>, range: &Range<u64>) -> io::Result<bool> {
    let mut map = match pid {
        Some(pid) => File::open(format!("/proc/{pid}/pagemap"))?,
        None => File::open("/proc/self/pagemap")?,
    };
    let page_bytes = small_page_bytes();
    map.seek(SeekFrom::Start(range.start / page_bytes * 8))?;
    let mut left = usize::try_from((range.end - range.start) / page_bytes).expect("64-bit Linux");
    let mut entries = vec![0; left.min(ENTRIES) * 8];
    while left > 0 {
        let count = left.min(ENTRIES);
        let entries = &mut entries[..count * 8];
        map.read_exact(entries)?;
        let (words, _) = entries.as_chunks::<8>();
        if words.iter().any(|word| u64::from_ne_bytes(*word) & POPULATED != 0) {
            return Ok(true);
        }
        left -= count;
    }
    Ok(false)
}
