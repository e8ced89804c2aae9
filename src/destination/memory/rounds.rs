//! Rounds: pages that arrive while the source's guest runs, and arrive again after the guest has written to them.
//!
//! The pages land in the file, and the last copy of each counts. No thread accesses them: the guest does not run here,
//! and pages are not requested. When the source's guest has stopped, the source names the pages that are still to be
//! sent. They are removed from the file and are Missing, as before; all others become Cached, as if they had arrived
//! once.
//!
//! ```text
//! rounds   data, zeroes, holes --> file, again and again          every page Missing
//! settle   remaining pages     --> no longer in the file          Missing
//!          all others          --> counted, digested              Cached; complete blocks leave the userfaultfd
//! ```
//!
//! With anonymous memory the guest's own pages take the place of the file's. The first copy of a page is copied in, and
//! each later one overwrites it. The guest side drops the remaining pages before [`GuestMemory::settle`]: only that
//! process can. A remaining page that is still present would never fault, so the guest side checks this and reports it.
//!
//! All copies of a page arrive on one lane, in order. A source that violates this damages its own pages, and nothing
//! else.

use std::ops::Range;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32};

use umem_wire::checksum::{ZERO_SUM, digest};
use umem_wire::{PageRange, RegionId};

use super::{GuestMemory, GuestRegion, PageId};
use crate::error::{Error, Result, WITHOUT_PASSES, lane_name};
use crate::memory::bits::Bits;
use crate::memory::claims::RunKind;
use crate::memory::sums;
use crate::statistics::Counters;

/// The state of pages that arrive in rounds.
pub(super) struct Rounds {
    regions: Vec<RegionRounds>,
    /// The remaining pages are settled: from now on each page arrives once.
    are_over: AtomicBool,
}

struct RegionRounds {
    /// Pages that have arrived at least once.
    came: Bits,
    /// Pages that the file or the guest has: the last copy was data.
    data: Bits,
    /// Pages that will arrive again.
    remaining: Bits,
    /// With checksums: the sum of each 4 KiB that has arrived.
    sums: Option<Box<[AtomicU32]>>,
}

impl RegionRounds {
    fn new(region: &GuestRegion, is_checked: bool) -> RegionRounds {
        let pages = region.bytes >> region.unit_shift();
        let all = PageRange { region: RegionId(0), first: 0, pages };
        let summed = sums::pages_summed(all, region.unit_shift());
        RegionRounds {
            came: Bits::new(pages),
            data: Bits::new(pages),
            remaining: Bits::new(pages),
            sums: is_checked.then(|| (0..summed).map(|_| AtomicU32::new(0)).collect()),
        }
    }
}

/// Checks that memory can take pages in rounds. `can_empty`: the guest side can drop the remaining pages. Its answers
/// come on the hand-over socket, on which private memory's touch thread listens for its own.
pub(crate) fn check(regions: &[GuestRegion], can_empty: bool) -> Result<()> {
    let has_no_file = |region: &&GuestRegion| !region.memory.kind.lands_in_file();
    let Some(region) = regions.iter().find(has_no_file) else { return Ok(()) };
    let private = regions.iter().find(|region| region.memory.kind.needs_touch());
    if let (true, Some(private)) = (can_empty, private) {
        return Err(Error::Unsupported(format!(
            "RAM {} has no file here and RAM {} is of kind private, and the source sends pages while its guest runs, \
             which one of the two alone can take: give `umem migrate` there {WITHOUT_PASSES}, or leave out --kind private \
             here",
            region.name, private.name
        )));
    }
    if can_empty {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "RAM {} is {} memory here, in which a page cannot land twice, and the source sends pages while its guest runs: \
         give `umem migrate` there {WITHOUT_PASSES}, or give the guest here memory of kind shared or private",
        region.name, region.memory.kind
    )))
}

impl GuestMemory {
    /// Begins the rounds, before any page has arrived. The regions have passed [`check`].
    pub(crate) fn begin_rounds(&mut self, is_checked: bool) {
        let regions = self.regions.iter().map(|region| RegionRounds::new(region, is_checked));
        self.rounds = Some(Rounds { regions: regions.collect(), are_over: AtomicBool::new(false) });
    }

    /// Pages may come again.
    pub(crate) fn is_in_rounds(&self) -> bool {
        self.rounds.as_ref().is_some_and(|rounds| !rounds.are_over.load(SeqCst))
    }

    fn of_rounds(&self, region: RegionId) -> &RegionRounds {
        let rounds = self.rounds.as_ref().expect("rounds have begun");
        &rounds.regions[usize::from(region.0)]
    }

    /// A copy of these pages has landed in the file. With checksums these are its sums.
    pub(crate) fn copied(&self, range: PageRange, page_sums: &[u32]) {
        let rounds = self.of_rounds(range.region);
        self.sum_anew(rounds, range, |index| page_sums[index]);
        rounds.data.set(range.first, range.pages);
        rounds.came.set(range.first, range.pages);
        Counters::add(&self.counters.rounds_page_bytes, self.bytes(range));
        Counters::add(&self.counters.rounds_bytes, self.bytes(range));
    }

    /// These pages are zeroes, or holes: the file's copies of them are removed.
    pub(crate) fn emptied(&self, range: PageRange) -> Result<()> {
        let rounds = self.of_rounds(range.region);
        self.sum_anew(rounds, range, |_| ZERO_SUM);
        self.take_out(range, |page| rounds.data.get(page))?;
        rounds.data.clear(range.first, range.pages);
        rounds.came.set(range.first, range.pages);
        Counters::add(&self.counters.rounds_page_bytes, self.bytes(range));
        Ok(())
    }

    /// Replaces the pages' earlier sums in the digest by these.
    fn sum_anew(&self, rounds: &RegionRounds, range: PageRange, sum: impl Fn(usize) -> u32) {
        let Some(all) = &rounds.sums else { return };
        let shift = self.region(range.region).unit_shift();
        let first = sums::first_summed(range, shift);
        let each = sums::pages_summed(PageRange { pages: 1, ..range }, shift);
        let mut change = 0u64;
        for (index, page) in (first..first + sums::pages_summed(range, shift)).enumerate() {
            let new = sum(index);
            let old = all[usize::try_from(page).expect("sums are in memory")].swap(new, Relaxed);
            if rounds.came.get(page / each) {
                change = change.wrapping_sub(digest(page, &[old]));
            }
            change = change.wrapping_add(digest(page, &[new]));
        }
        self.digests.add_digest(range.region, change);
    }

    /// Whether a page has a copy, and the end of the pages from there on for which this is the same.
    pub(super) fn copies_alike(&self, region: RegionId, page: u64) -> (bool, u64) {
        let data = &self.of_rounds(region).data;
        let is_there = data.get(page);
        (is_there, data.next(page, !is_there))
    }

    /// The pages that the guest side drops before [`settle`](GuestMemory::settle): for each region without a file its
    /// address, and the address ranges that may have copies of remaining pages.
    pub(crate) fn stale(&self) -> Vec<(u64, Vec<Range<u64>>)> {
        let mut all = Vec::new();
        for (index, region) in self.regions.iter().enumerate() {
            if region.memory.kind.lands_in_file() {
                continue;
            }
            let id = RegionId(u16::try_from(index).expect("the table has at most 256 regions"));
            let rounds = self.of_rounds(id);
            for part in &region.parts {
                let mut stale = Vec::new();
                let _ = rounds.remaining.each_run(true, |first, pages| {
                    let from = region.byte_offset(first).max(part.offset);
                    let to = region.byte_offset(first + pages).min(part.offset + part.bytes);
                    if from < to {
                        let address = |offset| part.address + (offset - part.offset);
                        stale.push(address(from)..address(to));
                    }
                    Ok::<(), ()>(())
                });
                if !stale.is_empty() {
                    all.push((part.address, stale));
                }
            }
        }
        all
    }

    /// Removes from the file those pages of a range for which `is_there` is true. Without a file they become zeroes.
    fn take_out(&self, range: PageRange, is_there: impl Fn(u64) -> bool) -> Result<()> {
        let region = self.region(range.region);
        let (mut page, end) = (range.first, range.first + range.pages);
        while page < end {
            let start = (page..end).find(|&page| is_there(page)).unwrap_or(end);
            let stop = (start..end).find(|&page| !is_there(page)).unwrap_or(end);
            if start < stop {
                match &region.file {
                    Some(file) => {
                        file.discard(region.byte_offset(start), region.byte_offset(stop - start))?;
                    }
                    None => {
                        let (first, pages) = (start, stop - start);
                        self.write_zeroes(PageRange { first, pages, ..range })?;
                    }
                }
            }
            page = stop;
        }
        Ok(())
    }

    /// The source names pages that are still to be sent.
    pub(crate) fn remains(&self, runs: &[PageRange]) -> Result<()> {
        if !self.is_in_rounds() {
            return Err(violated("pages that remain of no rounds"));
        }
        for run in runs {
            self.of_rounds(run.region).remaining.set(run.first, run.pages);
        }
        Ok(())
    }

    /// Ends the rounds: every copy has landed, the source has named all remaining pages, and the guest side has dropped
    /// the [stale](GuestMemory::stale) ones. All other pages become Cached; calls `wake` with each of them that a vCPU
    /// waits for. True if this completed the guest.
    pub(crate) fn settle(&self, mut wake: impl FnMut(PageId)) -> Result<bool> {
        let (mut is_last, lane) = (false, demand_lane());
        for (index, region) in self.regions.iter().enumerate() {
            let id = RegionId(u16::try_from(index).expect("the table has at most 256 regions"));
            let rounds = self.of_rounds(id);
            rounds.remaining.each_run(true, |first, pages| {
                self.take_back(region, PageRange { region: id, first, pages })
            })?;
            rounds.remaining.each_run(false, |first, pages| {
                let range = PageRange { region: id, first, pages };
                is_last = self.keep_copies(rounds, range, &lane, &mut wake)?;
                Ok::<(), Error>(())
            })?;
        }
        if let Some(rounds) = &self.rounds {
            rounds.are_over.store(true, SeqCst);
        }
        Ok(is_last)
    }

    /// These pages arrive once more: undoes their earlier arrival.
    fn take_back(&self, region: &GuestRegion, range: PageRange) -> Result<()> {
        let rounds = self.of_rounds(range.region);
        if let Some(all) = &rounds.sums {
            let shift = region.unit_shift();
            let each = sums::pages_summed(PageRange { pages: 1, ..range }, shift);
            let first = sums::first_summed(range, shift);
            let change = (first..first + sums::pages_summed(range, shift))
                .filter(|page| rounds.came.get(page / each))
                .fold(0u64, |change, page| {
                    let sum = all[usize::try_from(page).expect("sums are in memory")].load(Relaxed);
                    change.wrapping_sub(digest(page, &[sum]))
                });
            self.digests.add_digest(range.region, change);
        }
        match region.file {
            Some(_) => self.take_out(range, |page| rounds.data.get(page)),
            // The guest side has dropped the page.
            None => Ok(()),
        }
    }

    /// Makes the last copies of these pages count.
    fn keep_copies(
        &self,
        rounds: &RegionRounds,
        range: PageRange,
        lane: &str,
        wake: &mut impl FnMut(PageId),
    ) -> Result<bool> {
        let end = range.first + range.pages;
        let missing = rounds.came.next(range.first, false);
        if missing < end {
            let name = &self.region(range.region).name;
            return Err(violated(&format!(
                "page {missing} of RAM {name} has not come and is not said to remain"
            )));
        }
        let (mut page, mut is_last) = (range.first, false);
        while page < end {
            let is_data = rounds.data.get(page);
            let next = rounds.data.next(page, !is_data).min(end);
            let run = PageRange { first: page, pages: next - page, ..range };
            let kind = if is_data { RunKind::Data } else { RunKind::Hole };
            self.begin(run, lane)?;
            let region = self.region(run.region);
            if is_data && region.memory.is_copied_in() {
                region.pages.finish(run.first, run.pages, |_| Ok::<(), Error>(()))?;
            }
            is_last = self.finish(run, kind, &mut *wake)?;
            Counters::add(&self.counters.settled_page_bytes, self.bytes(run));
            if is_data {
                Counters::add(&self.counters.settled_bytes, self.bytes(run));
            }
            Counters::add(&self.counters.pages_background, run.pages);
            page = next;
        }
        Ok(is_last)
    }
}

fn demand_lane() -> String {
    lane_name(umem_wire::LaneRole::Demand, 0)
}

fn violated(what: &str) -> Error {
    Error::protocol(&demand_lane(), what)
}

#[cfg(test)]
mod tests {
    use umem_wire::checksum::{digest_of_zeroes, page_sum};

    use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

    use super::super::fixture::{Guest, PAGES, id};
    use super::super::{FaultSource, Part, RegionSetup};
    use super::*;
    use crate::fault::uffd::Uffd;
    use crate::memory::kind::Kind;
    use crate::memory::pages::PageState;
    use crate::memory::region::RamFile;

    fn range(first: u64, pages: u64) -> PageRange {
        PageRange { region: RegionId(0), first, pages }
    }

    /// A guest in rounds, with checksums.
    fn guest() -> Guest {
        let mut guest = Guest::new();
        guest.memory.begin_rounds(true);
        guest
    }

    /// A copy of a page arrives, as on a lane.
    fn comes(guest: &Guest, page: u64, byte: u8) {
        let bytes = [byte; 4096];
        guest.region().file().write_at(&bytes, page << 12).unwrap();
        guest.memory.copied(range(page, 1), &[page_sum(&bytes)]);
    }

    fn digest_of(pages: &[(u64, u8)]) -> u64 {
        let of = |&(page, byte): &(u64, u8)| digest(page, &[page_sum(&[byte; 4096])]);
        pages.iter().map(of).fold(0, u64::wrapping_add)
    }

    #[test]
    fn last_copies_count_and_remaining_pages_are_missing_again() {
        let guest = guest();
        guest.memory.emptied(range(0, PAGES)).unwrap();
        for (page, byte) in [(0, 1), (1, 2), (2, 3), (1, 4), (3, 5), (4, 6)] {
            comes(&guest, page, byte);
        }
        // Data that becomes a hole, and data again.
        guest.memory.emptied(range(2, 2)).unwrap();
        comes(&guest, 3, 7);
        assert!((0..PAGES).all(|page| guest.state(page) == PageState::Missing));
        guest.memory.remains(&[range(4, 2)]).unwrap();
        assert!(guest.region().pages.want(1), "somebody touches a page meanwhile");
        let mut woken = Vec::new();
        assert!(!guest.memory.settle(|page| woken.push(page)).unwrap());
        assert_eq!(woken, [id(1)]);
        assert!(!guest.memory.is_in_rounds());

        let states: Vec<_> = (0..PAGES).map(|page| guest.state(page)).collect();
        for (page, state) in (0..).zip(states) {
            let is_missing = [4, 5].contains(&page);
            let expected = if is_missing { PageState::Missing } else { PageState::Cached };
            assert_eq!(state, expected, "page {page}");
        }
        for (page, byte) in [(0, 1), (1, 4), (2, 0), (3, 7), (4, 0), (5, 0)] {
            assert!(guest.contents(page) == [byte; 4096], "page {page}");
        }
        let has = |page: u64| guest.region().file().next_data_in(page << 12..(page + 1) << 12);
        assert_eq!((has(2).unwrap(), has(4).unwrap()), (None, None), "they take no room");
        let zeroes = digest_of_zeroes(2, 1).wrapping_add(digest_of_zeroes(6, PAGES - 6));
        let expected = digest_of(&[(0, 1), (1, 4), (3, 7)]).wrapping_add(zeroes);
        assert_eq!(guest.memory.digests.get(), [expected]);
        let totals = guest.memory.counters.totals();
        assert_eq!((totals.data_bytes, totals.hole_bytes), (3 << 12, 3 << 12));
        assert_eq!(guest.memory.pages_missing(), 2);

        // From here on each page arrives once.
        assert!(guest.memory.begin(range(0, 1), "a lane").is_err());
        for last in [4, 5] {
            guest.memory.begin(range(last, 1), "a lane").unwrap();
            let is_last = guest.memory.finish(range(last, 1), RunKind::Hole, |_| {}).unwrap();
            assert_eq!(is_last, last == 5);
        }
    }

    #[test]
    fn source_that_counts_a_missing_page_as_sent_is_refused() {
        let guest = guest();
        guest.memory.emptied(range(0, PAGES - 1)).unwrap();
        let error = guest.memory.settle(|_| {}).unwrap_err().to_string();
        assert!(error.contains(&format!("page {} of RAM ram has not come", PAGES - 1)), "{error}");
        // Nor may the source send a page of the second phase before the rounds are settled.
        let guest = self::guest();
        guest.memory.emptied(range(0, PAGES)).unwrap();
        guest.memory.begin(range(3, 1), "a lane").unwrap();
        assert!(guest.memory.settle(|_| {}).is_err());
        assert!(Guest::new().memory.remains(&[range(0, 1)]).is_err(), "there are no rounds");
    }

    #[test]
    fn no_page_remains_of_a_guest_that_does_not_write() {
        let guest = guest();
        guest.memory.emptied(range(0, PAGES)).unwrap();
        assert!(guest.memory.settle(|_| {}).unwrap(), "this was the last page");
        assert_eq!(guest.memory.pages_missing(), 0);
    }

    /// A guest of this process in memory without a file, in rounds, with checksums.
    struct Own {
        memory: GuestMemory,
        uffd: Uffd,
        start: std::ptr::NonNull<std::ffi::c_void>,
    }

    const BYTES: usize = (PAGES as usize) << 12;

    impl Own {
        fn new() -> Own {
            let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            let length = std::num::NonZeroUsize::new(BYTES).unwrap();
            // SAFETY: a fresh mapping at an address of the kernel's choice.
            let start = unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE) };
            let start = start.unwrap();
            let uffd = Uffd::for_this_process().unwrap();
            let address = start.as_ptr().expose_provenance() as u64;
            uffd.register(address, BYTES as u64, Kind::Anonymous).unwrap();
            let region = GuestRegion::new(RegionSetup {
                name: "ram".into(),
                kind: Kind::Anonymous,
                bytes: BYTES as u64,
                unit_shift: 12,
                page_shift: 12,
                file: None,
                parts: vec![Part { offset: 0, bytes: BYTES as u64, address, source: 0 }],
            });
            let mut memory = GuestMemory::new(vec![region], vec![FaultSource::new(uffd.clone())]);
            memory.begin_rounds(true);
            Own { memory, uffd, start }
        }

        fn address(&self, page: u64) -> u64 {
            self.start.as_ptr().expose_provenance() as u64 + (page << 12)
        }

        fn comes(&self, first: u64, bytes: &[u8]) {
            let contents: Vec<u8> = bytes.iter().flat_map(|&byte| [byte; 4096]).collect();
            let sums: Vec<u32> = bytes.iter().map(|&byte| page_sum(&[byte; 4096])).collect();
            let (mut done, range) = (0, range(first, bytes.len() as u64));
            self.memory.place_again(range, &contents, &mut done).unwrap();
            assert_eq!(done, contents.len());
            self.memory.copied(range, &sums);
        }

        /// As the guest side does it.
        fn drop_stale(&self) {
            for (block, stale) in self.memory.stale() {
                assert_eq!(block, self.address(0));
                self.uffd.unregister(block, BYTES as u64).unwrap();
                for range in stale {
                    let at = std::ptr::with_exposed_provenance_mut(range.start as usize);
                    let length = (range.end - range.start) as usize;
                    let at = std::ptr::NonNull::new(at).unwrap();
                    // SAFETY: a part of this guest's mapping, which holds no Rust object.
                    unsafe { madvise(at, length, MmapAdvise::MADV_DONTNEED) }.unwrap();
                }
                self.uffd.register(block, BYTES as u64, Kind::Anonymous).unwrap();
            }
        }

        /// The contents of a page that is present.
        fn contents(&self, page: u64) -> Vec<u8> {
            let at = self.start.as_ptr().cast::<u8>().wrapping_add((page as usize) << 12);
            // SAFETY: each byte lies in the mapping.
            (0..4096).map(|index| unsafe { at.add(index).read_volatile() }).collect()
        }
    }

    impl Drop for Own {
        fn drop(&mut self) {
            // SAFETY: this guest's mapping, without references into it.
            let _ = unsafe { munmap(self.start, BYTES) };
        }
    }

    #[test]
    fn later_copies_overwrite_earlier_ones_in_memory_without_a_file() {
        let guest = Own::new();
        guest.memory.emptied(range(0, PAGES)).unwrap();
        guest.comes(0, &[1]);
        // Some of these pages are present, and others are not.
        guest.comes(0, &[2, 3, 4, 5]);
        guest.comes(2, &[6, 7, 8]);
        guest.memory.emptied(range(3, 3)).unwrap();
        guest.comes(3, &[9]);
        guest.comes(6, &[10]);
        guest.memory.remains(&[range(1, 1), range(6, 2)]).unwrap();
        let expected =
            [1..2, 6..8].map(|range| guest.address(range.start)..guest.address(range.end));
        assert_eq!(guest.memory.stale(), [(guest.address(0), expected.to_vec())]);
        guest.drop_stale();
        assert!(!guest.memory.settle(|_| {}).unwrap());

        for (page, byte) in [(0, 2), (2, 6), (3, 9), (4, 0)] {
            assert!(guest.contents(page) == [byte; 4096], "page {page}");
        }
        let state = |page| guest.memory.region(RegionId(0)).pages.get(page);
        for page in 0..PAGES {
            let is_missing = [1, 6, 7].contains(&page);
            let expected = if is_missing { PageState::Missing } else { PageState::Cached };
            assert_eq!(state(page), expected, "page {page}");
        }
        let zeroes = digest_of_zeroes(4, 2);
        let expected = digest_of(&[(0, 2), (2, 6), (3, 9)]).wrapping_add(zeroes);
        assert_eq!(guest.memory.digests.get(), [expected]);
        // The remaining pages arrive once, where no page is present.
        for (page, byte) in [(1, 11), (6, 12), (7, 13)] {
            guest.memory.begin(range(page, 1), "a lane").unwrap();
            let mut done = 0;
            guest.memory.place(range(page, 1), &[byte; 4096], &mut done).unwrap();
            let is_last = guest.memory.finish(range(page, 1), RunKind::Data, |_| {}).unwrap();
            assert_eq!(is_last, page == 7);
            assert!(guest.contents(page) == [byte; 4096], "page {page}");
        }
    }

    #[test]
    fn memory_without_a_file_accepts_pages_twice_if_its_side_can_drop_them() {
        let guest = Own::new();
        check(&guest.memory.regions, true).unwrap();
        let error = check(&guest.memory.regions, false).unwrap_err().to_string();
        assert!(error.contains("RAM ram is anonymous memory here"), "{error}");
        check(&Guest::new().memory.regions, false).unwrap();

        let file = || {
            let file = tempfile::tempfile().unwrap();
            file.set_len(4096).unwrap();
            RamFile::from_handoff("private", file)
        };
        let [own, private] = [None, Some(file)].map(|file| {
            let kind = if file.is_some() { Kind::Private } else { Kind::Anonymous };
            let parts = vec![Part { offset: 0, bytes: 4096, address: 0, source: 0 }];
            let (name, file) = (kind.name().into(), file.map(|file| file().unwrap()));
            let (bytes, unit_shift, page_shift) = (4096, 12, 12);
            GuestRegion::new(RegionSetup { name, kind, bytes, unit_shift, page_shift, file, parts })
        });
        let error = check(&[own, private], true).unwrap_err().to_string();
        assert!(error.contains("RAM private is of kind private"), "{error}");
    }
}
