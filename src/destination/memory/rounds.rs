//! Pages that come while the source's guest runs, and come again where it writes to them.
//!
//! They land in the file, the last copy of each counts, and nobody sees them: here the guest does not run, and no page
//! is asked for. When the source's guest has stopped it names the pages that are still to come. They are taken out of
//! the file and are Missing, as they were; all others become Cached, as if they had come once.
//!
//! ```text
//! rounds   data, zeroes, holes --> file, again and again          every page Missing
//! settle   remaining pages     --> no longer in the file          Missing
//!          all others          --> counted, digested              Cached; complete blocks leave the userfaultfd
//! ```
//!
//! All copies of a page come on one lane, in order. A lane that does otherwise spoils its own pages, and nothing else.

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

/// What has come in rounds.
pub(super) struct Rounds {
    regions: Vec<RegionRounds>,
    /// What remains is settled: pages come once from now on.
    are_over: AtomicBool,
}

struct RegionRounds {
    /// Pages that have come at least once.
    came: Bits,
    /// Pages that the file has: the last copy was data.
    data: Bits,
    /// Pages that are to come again.
    remaining: Bits,
    /// With checksums: of each 4 KiB that has come.
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

/// Why memory cannot take pages in rounds.
pub(crate) fn check(regions: &[GuestRegion]) -> Result<()> {
    let Some(region) = regions.iter().find(|region| !region.memory.kind.lands_in_file()) else {
        return Ok(());
    };
    Err(Error::Unsupported(format!(
        "RAM {} is {} memory here, in which a page cannot land twice, and the source sends pages while its guest runs: \
         give `umem migrate` there {WITHOUT_PASSES}, or give the guest here memory of kind shared or private",
        region.name, region.memory.kind
    )))
}

impl GuestMemory {
    /// Pages come in rounds, before any has come. The regions are fit for that ([`check`]).
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

    /// A copy of these pages has landed in the file, with these sums where there are checksums.
    pub(crate) fn copied(&self, range: PageRange, page_sums: &[u32]) {
        let rounds = self.of_rounds(range.region);
        self.sum_anew(rounds, range, |index| page_sums[index]);
        rounds.data.set(range.first, range.pages);
        rounds.came.set(range.first, range.pages);
        Counters::add(&self.counters.rounds_page_bytes, self.bytes(range));
        Counters::add(&self.counters.rounds_bytes, self.bytes(range));
    }

    /// These pages are zeroes, or holes: what the file has of them goes.
    pub(crate) fn emptied(&self, range: PageRange) -> Result<()> {
        let rounds = self.of_rounds(range.region);
        self.sum_anew(rounds, range, |_| ZERO_SUM);
        self.punch(range, |page| rounds.data.get(page))?;
        rounds.data.clear(range.first, range.pages);
        rounds.came.set(range.first, range.pages);
        Counters::add(&self.counters.rounds_page_bytes, self.bytes(range));
        Ok(())
    }

    /// Takes the pages' former sums out of the digest, and these in.
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

    /// Punches those pages of a range out of the file for which this is so.
    fn punch(&self, range: PageRange, is_there: impl Fn(u64) -> bool) -> Result<()> {
        let region = self.region(range.region);
        let (mut page, end) = (range.first, range.first + range.pages);
        while page < end {
            let start = (page..end).find(|&page| is_there(page)).unwrap_or(end);
            let stop = (start..end).find(|&page| !is_there(page)).unwrap_or(end);
            if start < stop {
                region
                    .file()
                    .discard(region.byte_offset(start), region.byte_offset(stop - start))?;
            }
            page = stop;
        }
        Ok(())
    }

    /// The source names pages that are still to come.
    pub(crate) fn remains(&self, runs: &[PageRange]) -> Result<()> {
        if !self.is_in_rounds() {
            return Err(violated("pages that remain of no rounds"));
        }
        for run in runs {
            self.of_rounds(run.region).remaining.set(run.first, run.pages);
        }
        Ok(())
    }

    /// Every copy has landed, and all that remains has been named: the rest is here for good. Calls `wake` with each
    /// page of it that a vCPU waits for. True when this was the last page of all.
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

    /// These pages come once more: what has come of them is as if it had not.
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
        self.punch(range, |page| rounds.data.get(page))
    }

    /// The last copies of these pages count.
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

    use super::super::fixture::{Guest, PAGES, id};
    use super::*;
    use crate::memory::pages::PageState;

    fn range(first: u64, pages: u64) -> PageRange {
        PageRange { region: RegionId(0), first, pages }
    }

    /// A guest in rounds, with checksums.
    fn guest() -> Guest {
        let mut guest = Guest::new();
        guest.memory.begin_rounds(true);
        guest
    }

    /// A copy of a page comes, as a lane brings it.
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
    fn the_last_copies_count_and_what_remains_is_as_if_it_had_never_come() {
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

        // From here on each page comes once.
        assert!(guest.memory.begin(range(0, 1), "a lane").is_err());
        for last in [4, 5] {
            guest.memory.begin(range(last, 1), "a lane").unwrap();
            let is_last = guest.memory.finish(range(last, 1), RunKind::Hole, |_| {}).unwrap();
            assert_eq!(is_last, last == 5);
        }
    }

    #[test]
    fn a_source_that_is_wrong_about_what_has_come_is_found_out() {
        let guest = guest();
        guest.memory.emptied(range(0, PAGES - 1)).unwrap();
        let error = guest.memory.settle(|_| {}).unwrap_err().to_string();
        assert!(error.contains(&format!("page {} of RAM ram has not come", PAGES - 1)), "{error}");
        // Nor may it send a page that comes once before that is settled.
        let guest = self::guest();
        guest.memory.emptied(range(0, PAGES)).unwrap();
        guest.memory.begin(range(3, 1), "a lane").unwrap();
        assert!(guest.memory.settle(|_| {}).is_err());
        assert!(Guest::new().memory.remains(&[range(0, 1)]).is_err(), "there are no rounds");
    }

    #[test]
    fn nothing_remains_of_a_guest_that_does_not_write() {
        let guest = guest();
        guest.memory.emptied(range(0, PAGES)).unwrap();
        assert!(guest.memory.settle(|_| {}).unwrap(), "this was the last page");
        assert_eq!(guest.memory.pages_missing(), 0);
    }
}
