//! Digest of the guest's memory at the source (`--checksum`), for comparison with the memory that has landed.
//!
//! The files are as they were when the guest stopped. A few threads read them once more at the end, so that the
//! comparison also finds errors between the reading of a page and its checksum. Holes count as pages of zeroes, and are
//! not read. Pages that `--release-ram` frees during the migration are added before they are freed
//! ([`release`](super::release)), less the zeroes that they count for when the rest is read.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use umem_wire::RegionId;
use umem_wire::checksum::{self, SUMMED_BYTES};

use super::{Holes, SourceMemory};
use crate::error::{Context, Result};
use crate::memory::guarded::Gone;
use crate::memory::region::RamFile;
use crate::memory::sums;
use crate::runtime::inbox::Post;
use crate::runtime::panics;
use crate::source::InboxMessage;

/// Threads that read: more than these exceed the memory bandwidth of most machines.
const THREADS_MAX: usize = 8;

/// The unit of a thread's work: whole pages of any size up to this, or one larger page.
const PIECE_BYTES: u64 = 16 << 20;

/// Begins to read the files; a note carries the result. Pages are not freed meanwhile.
pub(in crate::source) fn begin(memory: Arc<SourceMemory>, post: Post<InboxMessage>) -> Result<()> {
    let read = move || {
        let is_known = !memory.digest_is_lost.load(Relaxed);
        let digests = panics::caught(|| {
            panics::point(format_args!("digest"));
            all(&memory)
        });
        // Sent in any case: the control thread waits for the note.
        post.send(InboxMessage::Digested(digests.map(|digests| is_known.then_some(digests))));
    };
    let thread = std::thread::Builder::new().name("umem-digest".into()).spawn(read);
    thread.map(drop).context(|| "starting thread umem-digest")
}

/// Adds the pages left in the files to those that have been freed.
fn all(memory: &SourceMemory) -> Result<Vec<u64>> {
    let next = AtomicU64::new(0);
    let threads =
        std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(THREADS_MAX);
    std::thread::scope(|scope| {
        let works: Vec<_> = (0..threads).map(|_| scope.spawn(|| some(memory, &next))).collect();
        works
            .into_iter()
            .try_for_each(|work| work.join().unwrap_or_else(|panic| Err(panics::error(&*panic))))
    })?;
    Ok(memory.digests.get())
}

/// Processes pieces until none is left.
fn some(memory: &SourceMemory, next: &AtomicU64) -> Result<()> {
    let pieces = |ram: &RamFile| ram.bytes.div_ceil(piece_bytes(ram));
    loop {
        let mut piece = next.fetch_add(1, Relaxed);
        let mut found = None;
        for (region, id) in memory.regions.iter().zip(0..) {
            if piece < pieces(&region.ram) {
                found = Some((RegionId(id), &region.ram));
                break;
            }
            piece -= pieces(&region.ram);
        }
        let Some((id, ram)) = found else { return Ok(()) };
        let offset = piece * piece_bytes(ram);
        let len = piece_bytes(ram).min(ram.bytes - offset);
        memory.digests.add_digest(id, of_part(ram, offset, len)?);
    }
}

fn piece_bytes(ram: &RamFile) -> u64 {
    PIECE_BYTES.max(1 << ram.page_shift)
}

/// The digest of a part of a file, whole pages. Holes are not read: a read would allocate them.
pub(in crate::source) fn of_part(ram: &RamFile, offset: u64, len: u64) -> Result<u64> {
    let mut holes = Holes::of(ram, offset, len)?;
    let page_bytes = 1 << ram.page_shift;
    let (mut sums, mut digest) = (Vec::new(), 0u64);
    for page in (offset..offset + len).step_by(1 << ram.page_shift) {
        if holes.covers(ram, page)? {
            digest = digest.wrapping_add(of_zeroes(page, page_bytes));
            continue;
        }
        sums::of_span(&ram.span(page, page_bytes), &mut sums).map_err(|Gone| ram.gone())?;
        digest = digest.wrapping_add(checksum::digest(page / SUMMED_BYTES as u64, &sums));
    }
    Ok(digest)
}

/// The digest of a part of a file that is one hole.
pub(in crate::source) fn of_zeroes(offset: u64, len: u64) -> u64 {
    checksum::digest_of_zeroes(offset / SUMMED_BYTES as u64, len / SUMMED_BYTES as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    fn memory(files: &[&[(u64, u8)]]) -> SourceMemory {
        let rams = files.iter().map(|pages| {
            let mut file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
            file.as_file().set_len(40 << 20).unwrap();
            for &(page, byte) in *pages {
                file.seek(SeekFrom::Start(page * 4096)).unwrap();
                file.write_all(&[byte; 4096]).unwrap();
            }
            RamFile::open_source("ram", file.path(), false).unwrap()
        });
        SourceMemory::new(rams.collect(), false).checked(true)
    }

    #[test]
    fn digest_depends_on_the_place_of_data_and_counts_holes_as_zeroes() {
        let sum = |byte| checksum::page_sum(&[byte; 4096]);
        let memory = memory(&[&[(5, 1), (9000, 2), (77, 0)], &[]]);
        let zeroes = of_zeroes(0, 40 << 20);
        let expected = [(5, 1), (9000, 2)].iter().fold(zeroes, |all, &(page, byte)| {
            all.wrapping_add(checksum::digest(page, &[sum(byte)]))
                .wrapping_sub(checksum::digest_of_zeroes(page, 1))
        });
        assert_eq!(all(&memory).unwrap(), [expected, zeroes]);
        let allocated = memory.regions[0].ram.allocated_bytes().unwrap();
        assert_eq!(allocated, 3 * 4096, "read no hole");
    }

    /// Freed pages are added before, and count as zeroes when the rest is read.
    #[test]
    fn freed_pages_count_once() {
        let mut file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        file.write_all(&[[1; 4096], [2; 4096], [3; 4096]].concat()).unwrap();
        let ram = RamFile::open_source("ram", file.path(), true).unwrap();
        let memory = SourceMemory::new(vec![ram], true).checked(true);
        let ram = &memory.regions[0].ram;
        let whole = of_part(ram, 0, 3 * 4096).unwrap();
        let freed = of_part(ram, 4096, 4096).unwrap().wrapping_sub(of_zeroes(4096, 4096));
        memory.digests.add_digest(RegionId(0), freed);
        ram.discard(4096, 4096).unwrap();
        assert_ne!(of_part(ram, 0, 3 * 4096).unwrap(), whole);
        assert_eq!(all(&memory).unwrap(), [whole]);
    }
}
