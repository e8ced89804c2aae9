//! The source's side of exactly once: a bit a page, set by the thread that sends it.
//!
//! Every page leaves the source once, by the demand lane or by a bulk lane; the thread that sets
//! its bit sends it. Bulk lanes first take whole blocks (a bit a block), so that they work on
//! different memory, and then claim the pages of a block that the demand lane has left, 64 pages at
//! a time.

use umem_wire::{PageRange, RegionId};

use super::block_pages;
use super::pages::low_bits;
use super::sync::{AtomicU64, Ordering};

/// The claims of one region.
pub(crate) struct Claims {
    pages: u64,
    block_pages: u64,
    claimed: Box<[AtomicU64]>,
    taken: Box<[AtomicU64]>,
}

impl Claims {
    pub(crate) fn new(pages: u64, page_shift: u8) -> Claims {
        let block_pages = block_pages(page_shift);
        Claims {
            pages,
            block_pages,
            claimed: zeroed(pages.div_ceil(64)),
            taken: zeroed(pages.div_ceil(block_pages).div_ceil(64)),
        }
    }

    /// Claims one page; true if the caller has to send it.
    pub(crate) fn claim(&self, page: u64) -> bool {
        let bit = 1 << (page % 64);
        self.claimed[index(page / 64)].fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    /// Claims the unclaimed ones of the `count` ≤ 64 pages from `first`, which lie in one word of
    /// 64; the caller has to send page `first + i` for each set bit `i` of the result.
    pub(crate) fn claim_word(&self, first: u64, count: u64) -> u64 {
        let offset = first % 64;
        assert!(count <= 64 - offset && first + count <= self.pages);
        let mask = low_bits(count) << offset;
        let before = self.claimed[index(first / 64)].fetch_or(mask, Ordering::AcqRel);
        (mask & !before) >> offset
    }

    /// Marks everything as sent, as an earlier process may have. [`account`](Claims::account) then
    /// sets the remaining pages.
    pub(crate) fn claim_all(&self) {
        for (word, first) in self.claimed.iter().zip((0..self.pages).step_by(64)) {
            word.store(low_bits(self.pages - first), Ordering::Release);
        }
    }

    /// Takes the first block at or after `from` that no lane has, going round once.
    pub(crate) fn take_block(&self, from: u64) -> Option<u64> {
        let blocks = self.blocks();
        let from = if from < blocks { from } else { 0 };
        self.take_in(from, blocks).or_else(|| self.take_in(0, from))
    }

    fn take_in(&self, from: u64, end: u64) -> Option<u64> {
        let mut block = from;
        while block < end {
            let word = &self.taken[index(block / 64)];
            let free = !word.load(Ordering::Relaxed) >> (block % 64);
            if free == 0 {
                block = (block / 64 + 1) * 64;
                continue;
            }
            block += u64::from(free.trailing_zeros());
            if block >= end {
                return None;
            }
            let bit = 1 << (block % 64);
            if word.fetch_or(bit, Ordering::AcqRel) & bit == 0 {
                return Some(block);
            }
        }
        None
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// For new lanes: the claims of the 64 pages from `first` on become the destination's account
    /// of them; the rest is to be sent (again). `Err` names a page that cannot be present, as it
    /// was never claimed. No thread may claim pages at the same time.
    pub(crate) fn account(&self, first: u64, has: u64) -> Result<(), u64> {
        assert!(first.is_multiple_of(64) && first < self.pages);
        let word = &self.claimed[index(first / 64)];
        let strange = has & !word.load(Ordering::Acquire);
        if strange != 0 {
            return Err(first + u64::from(strange.trailing_zeros()));
        }
        word.store(has, Ordering::Release);
        Ok(())
    }

    /// After the last [`account`](Claims::account): lanes take blocks again that have unclaimed
    /// pages.
    pub(crate) fn free_blocks(&self) {
        for block in 0..self.blocks() {
            let (first, pages) = self.block_range(block);
            let bit = 1 << (block % 64);
            let word = &self.taken[index(block / 64)];
            if self.is_claimed(first, pages) {
                word.fetch_or(bit, Ordering::AcqRel);
            } else {
                word.fetch_and(!bit, Ordering::AcqRel);
            }
        }
    }

    /// Calls `f` with each run of claimed pages, of 64 pages at most.
    pub(crate) fn each_claimed(&self, mut f: impl FnMut(u64, u64)) {
        for first in (0..self.pages).step_by(64) {
            let mut left = self.claimed[index(first / 64)].load(Ordering::Acquire);
            left &= low_bits((self.pages - first).min(64));
            while left != 0 {
                let offset = u64::from(left.trailing_zeros());
                let count = u64::from((left >> offset).trailing_ones());
                f(first + offset, count);
                left &= !(low_bits(count) << offset);
            }
        }
    }

    fn is_claimed(&self, first: u64, pages: u64) -> bool {
        let mut page = first;
        while page < first + pages {
            let count = (64 - page % 64).min(first + pages - page);
            let word = self.claimed[index(page / 64)].load(Ordering::Acquire);
            if !word >> (page % 64) & low_bits(count) != 0 {
                return false;
            }
            page += count;
        }
        true
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.pages.div_ceil(self.block_pages)
    }

    /// The block of `page`.
    pub(crate) fn block_of(&self, page: u64) -> u64 {
        page / self.block_pages
    }

    /// First page and number of pages of a block; the last one may be short.
    pub(crate) fn block_range(&self, block: u64) -> (u64, u64) {
        let first = block * self.block_pages;
        (first, self.block_pages.min(self.pages - first))
    }
}

/// The last demand, from which bulk lanes continue.
#[derive(Default)]
pub(crate) struct LastDemand(AtomicU64);

/// Bits for the page number in a packed (region, page), as in a request on the wire.
const PAGE_BITS: u32 = 48;

impl LastDemand {
    pub(crate) fn set(&self, region: RegionId, page: u64) {
        // Zero means "no demand yet", so page 0 of region 0 needs another bit.
        let packed = u64::from(region.0) << PAGE_BITS | page;
        self.0.store(packed.wrapping_add(1), Ordering::Relaxed);
    }

    /// The last demand, if it differs from `seen`, which is updated.
    pub(crate) fn moved(&self, seen: &mut u64) -> Option<(RegionId, u64)> {
        let now = self.0.load(Ordering::Relaxed);
        if now == *seen || now == 0 {
            return None;
        }
        *seen = now;
        let packed = now.wrapping_sub(1);
        let region = u16::try_from(packed >> PAGE_BITS).expect("16 bits remain");
        Some((RegionId(region), packed & low_bits(u64::from(PAGE_BITS))))
    }
}

/// The form in which a run of pages crosses the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RunKind {
    /// With its bytes.
    Data,
    /// As a header: the pages are present and hold zeroes.
    Zero,
    /// As a header: the pages are a hole of the file.
    Hole,
}

/// Pages that are sent together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) kind: RunKind,
    pub(crate) range: PageRange,
}

/// Appends a page to the last run if it continues it, or opens a new run.
pub(crate) fn push_page(runs: &mut Vec<Run>, kind: RunKind, region: RegionId, page: u64, max: u64) {
    if let Some(last) = runs.last_mut() {
        let continues = last.kind == kind
            && last.range.region == region
            && last.range.first + last.range.pages == page
            && (kind != RunKind::Data || last.range.pages < max);
        if continues {
            last.range.pages += 1;
            return;
        }
    }
    runs.push(Run { kind, range: PageRange { region, first: page, pages: 1 } });
}

fn zeroed(words: u64) -> Box<[AtomicU64]> {
    (0..words).map(|_| AtomicU64::new(0)).collect()
}

fn index(word: u64) -> usize {
    usize::try_from(word).expect("claims are in memory, so their index fits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_claimed_once_by_demand_and_bulk_together() {
        const PAGES: u64 = 512 * 20 + 77;
        let claims = Claims::new(PAGES, 12);
        let sent: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
        let count = |page: u64| sent[page as usize].fetch_add(1, Ordering::Relaxed);
        std::thread::scope(|scope| {
            for lane in 0..3 {
                let (claims, count) = (&claims, &count);
                scope.spawn(move || {
                    let mut cursor = lane * 7;
                    while let Some(block) = claims.take_block(cursor) {
                        let (first, pages) = claims.block_range(block);
                        for word in (first..first + pages).step_by(64) {
                            let won = claims.claim_word(word, 64.min(first + pages - word));
                            (0..64).filter(|i| won >> i & 1 == 1).for_each(|i| {
                                count(word + i);
                            });
                        }
                        cursor = block + 1;
                    }
                });
            }
            scope.spawn(|| {
                (0..PAGES).rev().step_by(3).filter(|&page| claims.claim(page)).for_each(|page| {
                    count(page);
                });
            });
        });
        for (page, sent) in sent.iter().enumerate() {
            assert_eq!(sent.load(Ordering::Relaxed), 1, "page {page}");
        }
    }

    #[test]
    fn block_search_wraps_around_from_the_cursor() {
        let claims = Claims::new(512 * 5, 12);
        let taken: Vec<_> = std::iter::from_fn(|| claims.take_block(3)).collect();
        assert_eq!(taken, [3, 4, 0, 1, 2]);
        assert_eq!(Claims::new(10, 12).block_range(0), (0, 10));
    }

    #[test]
    fn pages_missing_at_the_destination_are_claimed_again() {
        let claims = Claims::new(512 * 3 + 10, 12);
        while let Some(block) = claims.take_block(0) {
            let (first, pages) = claims.block_range(block);
            (first..first + pages).for_each(|page| assert!(claims.claim(page)));
        }
        // All but a page of the second block and the last one.
        for first in (0..512 * 3 + 10).step_by(64) {
            let has = match first {
                576 => !(1 << 5),
                1536 => low_bits(9),
                _ => u64::MAX,
            };
            claims.account(first, has).unwrap();
        }
        claims.free_blocks();
        assert_eq!(claims.take_block(0), Some(1));
        assert_eq!(claims.take_block(0), Some(3));
        assert_eq!(claims.take_block(0), None);
        let won: Vec<u64> = (0..512 * 3 + 10).filter(|&page| claims.claim(page)).collect();
        assert_eq!(won, [576 + 5, 1545]);
    }

    #[test]
    fn account_with_an_unsent_page_is_refused() {
        let claims = Claims::new(100, 12);
        claims.claim(64);
        assert_eq!(claims.account(64, 0b101), Err(66));
        assert_eq!(claims.account(64, 1), Ok(()));
    }

    #[test]
    fn each_claimed_run_is_named_once() {
        let claims = Claims::new(130, 12);
        let named = || {
            let mut runs = Vec::new();
            claims.each_claimed(|first, pages| runs.push((first, pages)));
            runs
        };
        assert_eq!(named(), []);
        for page in [3, 4, 63, 64, 129] {
            claims.claim(page);
        }
        assert_eq!(named(), [(3, 2), (63, 1), (64, 1), (129, 1)]);
        claims.claim_all();
        assert_eq!(named(), [(0, 64), (64, 64), (128, 2)]);
    }

    #[test]
    fn pivot_is_taken_once() {
        let pivot = LastDemand::default();
        let mut seen = 0;
        assert_eq!(pivot.moved(&mut seen), None);
        pivot.set(RegionId(0), 0);
        assert_eq!(pivot.moved(&mut seen), Some((RegionId(0), 0)));
        assert_eq!(pivot.moved(&mut seen), None);
        pivot.set(RegionId(3), 99);
        assert_eq!(pivot.moved(&mut seen), Some((RegionId(3), 99)));
    }

    #[test]
    fn adjacent_pages_of_one_kind_form_a_run() {
        let mut runs = Vec::new();
        for (kind, page) in [(RunKind::Data, 5), (RunKind::Data, 6), (RunKind::Data, 7)] {
            push_page(&mut runs, kind, RegionId(0), page, 2);
        }
        push_page(&mut runs, RunKind::Zero, RegionId(0), 8, 2);
        push_page(&mut runs, RunKind::Zero, RegionId(0), 10, 2);
        let shape: Vec<_> = runs.iter().map(|r| (r.range.first, r.range.pages)).collect();
        assert_eq!(shape, [(5, 2), (7, 1), (8, 1), (10, 1)]);
    }
}
