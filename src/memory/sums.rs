//! Sums of pages for `--checksum`: of umem's own buffers, and of guest memory, which is copied out
//! piece by piece, as there may be no reference to it.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use serde::{Deserialize, Serialize};
use umem_ring::{Memory, Span};
use umem_wire::checksum::{self, SUMMED_BYTES};
use umem_wire::{PageRange, RegionId};

use super::copy::copy_out_of_span;
use super::guarded::Gone;

/// log2 of the bytes that one sum covers.
const SUMMED_SHIFT: u8 = 12;
const _: () = assert!(1 << SUMMED_SHIFT == SUMMED_BYTES);

/// Replaces the content of `sums` by the sum of each 4 KiB of a buffer.
pub(crate) fn of_slice(bytes: &[u8], sums: &mut Vec<u32>) {
    sums.clear();
    sums.extend(bytes.as_chunks::<SUMMED_BYTES>().0.iter().map(|page| checksum::page_sum(page)));
}

/// The same for a piece of a mapping. With concurrent writes a sum may match no state of the
/// memory.
pub(crate) fn of_span(span: &Span, sums: &mut Vec<u32>) -> Result<(), Gone> {
    sums.clear();
    let mut page = [0; SUMMED_BYTES];
    for offset in (0..span.len()).step_by(SUMMED_BYTES) {
        copy_out_of_span(span, offset, &mut page)?;
        sums.push(checksum::page_sum(&page));
    }
    Ok(())
}

/// The same for data to send or received, one buffer or one piece of a mapping.
pub(crate) fn of_memory(memory: &Memory, sums: &mut Vec<u32>) -> Result<(), Gone> {
    match memory {
        Memory::Bytes(bytes) => {
            of_slice(bytes.as_slice(), sums);
            Ok(())
        }
        Memory::Span(span) => of_span(span, sums),
        Memory::Pieces(_) => unreachable!("a run is one piece of memory"),
    }
}

/// The index, in pages of 4 KiB, of the first page of a range that counts units of `unit_shift`.
pub(crate) fn first_summed(range: PageRange, unit_shift: u8) -> u64 {
    range.first << (unit_shift - SUMMED_SHIFT)
}

/// The number of pages of 4 KiB in such a range.
pub(crate) fn pages_summed(range: PageRange, unit_shift: u8) -> u64 {
    range.pages << (unit_shift - SUMMED_SHIFT)
}

/// The digest of each region so far.
#[derive(Default)]
pub(crate) struct Digests(Box<[AtomicU64]>);

impl Digests {
    pub(crate) fn of(regions: usize) -> Digests {
        Digests((0..regions).map(|_| AtomicU64::new(0)).collect())
    }

    /// Adds pages with these sums for good, from page `first` on, counted in 4 KiB.
    pub(crate) fn add(&self, region: RegionId, first: u64, sums: &[u32]) {
        self.add_digest(region, checksum::digest(first, sums));
    }

    /// Adds `pages` pages of zeroes or holes from page `first` on, counted in 4 KiB.
    pub(crate) fn add_zeroes(&self, region: RegionId, first: u64, pages: u64) {
        self.add_digest(region, checksum::digest_of_zeroes(first, pages));
    }

    pub(crate) fn add_digest(&self, region: RegionId, digest: u64) {
        self.0[usize::from(region.0)].fetch_add(digest, Relaxed);
    }

    pub(crate) fn get(&self) -> Vec<u64> {
        self.0.iter().map(|digest| digest.load(Relaxed)).collect()
    }
}

/// A region's digest at both sides, in a report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionDigest {
    /// The region's name.
    pub region: String,
    /// The digest of its pages at this side, 16 hexadecimal digits: at the destination as they
    /// arrived, at the source as its file has them.
    pub digest: String,
    /// The same at the other side; null if unknown.
    pub peer: Option<String>,
}

impl RegionDigest {
    /// The digests in the order of the source's table.
    pub(crate) fn all<'a>(
        names: impl Iterator<Item = &'a str>,
        ours: &[u64],
        theirs: Option<&[u64]>,
    ) -> Vec<RegionDigest> {
        let text = |digest: &u64| format!("{digest:016x}");
        let of = |(index, name): (usize, &str)| RegionDigest {
            region: name.to_owned(),
            digest: ours.get(index).map(text).unwrap_or_default(),
            peer: theirs.and_then(|theirs| theirs.get(index)).map(text),
        };
        names.enumerate().map(of).collect()
    }

    /// Whether both sides' digests are known and differ.
    pub(crate) fn differs(&self) -> bool {
        self.peer.as_ref().is_some_and(|peer| *peer != self.digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ptr::NonNull;
    use std::sync::Arc;

    #[test]
    fn span_has_the_sums_of_its_bytes() {
        let bytes: Vec<u8> = (0..3 * SUMMED_BYTES).map(|at| ((at * 7) >> 3) as u8).collect();
        let owner = Arc::new(bytes.clone());
        let start = NonNull::new(owner.as_ptr().cast_mut()).unwrap();
        // SAFETY: the vector is not accessed again, and lives as long as the span.
        let span = unsafe { Span::new(start, bytes.len(), owner) };
        let (mut here, mut there) = (vec![7], Vec::new());
        of_slice(&bytes, &mut here);
        of_memory(&Memory::from(span), &mut there).unwrap();
        assert_eq!((here.len(), &here), (3, &there));
        assert_eq!(here[1], checksum::page_sum(&bytes[4096..8192]));
    }

    #[test]
    fn report_names_the_region_that_differs() {
        let digests = RegionDigest::all(["a", "b"].into_iter(), &[1, 2], Some(&[1, 3]));
        assert_eq!([digests[0].differs(), digests[1].differs()], [false, true]);
        assert_eq!(
            (digests[1].digest.as_str(), digests[1].region.as_str()),
            ("0000000000000002", "b")
        );
        assert!(!RegionDigest::all(["a"].into_iter(), &[1], None)[0].differs());
    }
}
