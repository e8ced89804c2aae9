//! The order of the page checks, the expected contents, and the checking threads.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crate::Result;
use crate::memory::Memory;

/// Number of checking threads.
const THREADS: usize = 2;

/// The least share of discarded pages: one of this many, in ranges of up to [`RANGE_PAGES_MAX`] …
const DISCARDED_ONE_IN: usize = 32;
const RANGE_PAGES_MAX: usize = 8;

/// … and no fewer than this, of checked pages as well as of the others.
const DISCARDED_MIN: usize = 4;

/// Fewer pages leave no choice.
const BALLOON_PAGES_MIN: usize = 16;

/// Wrong pages that are described; all are counted.
const DESCRIBED_MAX: u64 = 10;

/// The findings.
pub(crate) struct Found {
    pub(crate) pages: u64,
    /// How often a page had unexpected contents.
    pub(crate) wrong_pages: u64,
    pub(crate) discarded_seen: usize,
    pub(crate) discarded_unseen: usize,
}

/// Checks all pages of a memory.
pub(crate) struct Checker<'a> {
    memory: &'a Memory,
    snapshot: &'a File,
    random: Random,
    /// All pages in random order.
    order: Vec<u64>,
    /// The number of pages before the middle.
    first: usize,
    /// The ranges to discard in the middle …
    discarded: Vec<Range<u64>>,
    /// … by page.
    is_discarded: Vec<bool>,
    wrong_pages: AtomicU64,
}

impl<'a> Checker<'a> {
    /// The middle is after `first` pages, or after half of them.
    pub(crate) fn new(
        memory: &'a Memory,
        snapshot: &'a File,
        seed: u64,
        first: Option<usize>,
    ) -> Checker<'a> {
        let mut order: Vec<u64> = (0..memory.pages()).collect();
        let mut random = Random(seed);
        // Every order is equally likely (Fisher and Yates, 1938).
        for last in (1..order.len()).rev() {
            order.swap(last, random.below(last + 1));
        }
        let is_discarded = vec![false; order.len()];
        let (discarded, wrong_pages) = (Vec::new(), AtomicU64::new(0));
        let first = first.unwrap_or(order.len() / 2).min(order.len());
        Checker { memory, snapshot, random, order, first, discarded, is_discarded, wrong_pages }
    }

    /// Compares the first pages with the snapshot, and returns their number.
    pub(crate) fn see_the_first(&self) -> usize {
        let (first, _) = self.parts();
        self.compare(first, Expect::Snapshot);
        first.len()
    }

    /// Chooses the ranges to discard while the rest is checked.
    pub(crate) fn choose_what_goes(&mut self) -> Result<()> {
        let pages = self.order.len();
        if self.first.min(pages - self.first) < BALLOON_PAGES_MIN {
            return Err(format!(
                "--balloon needs {BALLOON_PAGES_MIN} pages before the middle and after it"
            ));
        }
        loop {
            let [seen, unseen] = self.discarded_pages();
            if seen.min(unseen) >= DISCARDED_MIN && seen + unseen >= pages / DISCARDED_ONE_IN {
                return Ok(());
            }
            let first = self.random.below(pages) as u64;
            let range = first..first + 1 + self.random.below(RANGE_PAGES_MAX) as u64;
            if self.memory.are_of_one_region(&range) {
                range.clone().for_each(|page| self.is_discarded[index(page)] = true);
                self.discarded.push(range);
            }
        }
    }

    /// Compares the rest with the snapshot, while the chosen ranges are discarded, which must read as zeroes then.
    pub(crate) fn see_the_rest(&self) -> Result<()> {
        let (_, rest) = self.parts();
        let (gone, stay) = self.split(rest);
        thread::scope(|scope| {
            let discarding = scope
                .spawn(|| self.discarded.iter().try_for_each(|range| self.memory.discard(range)));
            self.compare(&stay, Expect::Snapshot);
            discarding.join().expect("the thread does not panic")
        })?;
        self.compare(&gone, Expect::Zeroes);
        Ok(())
    }

    /// Compares all pages again.
    pub(crate) fn see_everything(&self) {
        let (gone, stay) = self.split(&self.order);
        self.compare(&stay, Expect::Snapshot);
        self.compare(&gone, Expect::Zeroes);
    }

    pub(crate) fn found(&self) -> Found {
        let [discarded_seen, discarded_unseen] = self.discarded_pages();
        let wrong_pages = self.wrong_pages.load(Ordering::Relaxed);
        Found { pages: self.memory.pages(), wrong_pages, discarded_seen, discarded_unseen }
    }

    /// The pages before the middle, and after it.
    fn parts(&self) -> (&[u64], &[u64]) {
        self.order.split_at(self.first)
    }

    /// Discarded pages, and the others.
    fn split(&self, pages: &[u64]) -> (Vec<u64>, Vec<u64>) {
        pages.iter().partition(|&&page| self.is_discarded[index(page)])
    }

    /// How many of them have been checked before, and how many not.
    fn discarded_pages(&self) -> [usize; 2] {
        let (seen, unseen) = self.parts();
        [seen, unseen].map(|part| self.split(part).0.len())
    }

    fn compare(&self, pages: &[u64], expect: Expect) {
        thread::scope(|scope| {
            for part in pages.chunks(pages.len().div_ceil(THREADS).max(1)) {
                scope.spawn(move || self.compare_part(part, expect));
            }
        });
    }

    fn compare_part(&self, pages: &[u64], expect: Expect) {
        let bytes = usize::try_from(self.memory.page_bytes).expect("64-bit Linux");
        let mut want = vec![0; bytes];
        for &page in pages {
            let (offset, start) = self.memory.page(page);
            if expect == Expect::Snapshot {
                self.snapshot.read_exact_at(&mut want, offset).expect("the snapshot has its size");
            }
            let (words, _) = want.as_chunks::<8>();
            let wrong = words.iter().enumerate().find_map(|(index, want)| {
                // SAFETY: a word of the page, which is inside the mapping; volatile, because another process fills it.
                let got = unsafe { start.add(index).read_volatile() }.to_ne_bytes();
                (got != *want).then_some((index, got, *want))
            });
            if let Some((index, got, want)) = wrong
                && self.wrong_pages.fetch_add(1, Ordering::Relaxed) < DESCRIBED_MAX
            {
                eprintln!(
                    "umem-test-snapshot-client: page {page}, byte {}: {got:02x?}, not {want:02x?} \
                     as {expect:?} says",
                    index * 8
                );
            }
        }
    }
}

fn index(page: u64) -> usize {
    usize::try_from(page).expect("64-bit Linux")
}

/// The expected contents of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Snapshot,
    Zeroes,
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// A number below `limit`; the bias of a remainder does not matter here.
    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).expect("64-bit Linux")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A memory without a filler, and a snapshot of zeroes except for one byte.
    fn checked(wrong_byte: Option<u64>) -> Found {
        let memory = Memory::map(1 << 20, 2, false).unwrap();
        let mut path = std::env::temp_dir();
        path.push(format!("umem-test-snapshot-{}-{wrong_byte:?}", std::process::id()));
        let mut file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .expect("a temporary file");
        std::fs::remove_file(&path).expect("the file exists");
        file.write_all(&[0; 1 << 20]).unwrap();
        if let Some(at) = wrong_byte {
            file.write_all_at(&[1], at).unwrap();
        }
        let mut checker = Checker::new(&memory, &file, 3, None);
        assert_eq!(checker.see_the_first(), 128);
        checker.choose_what_goes().unwrap();
        checker.see_the_rest().unwrap();
        checker.see_everything();
        checker.found()
    }

    #[test]
    fn check_detects_a_change_of_any_byte() {
        let found = checked(None);
        assert_eq!((found.pages, found.wrong_pages), (256, 0));
        let (seen, unseen) = (found.discarded_seen as u64, found.discarded_unseen as u64);
        assert!(seen >= 4 && unseen >= 4 && seen + unseen < 64, "{seen} {unseen}");
        // Kept pages are compared twice, discarded ones once at most.
        let wrong = |page: u64| checked(Some(page * 4096 + page * 16)).wrong_pages;
        let total: u64 = (0..256).map(wrong).sum();
        assert_eq!(total, 2 * (256 - seen - unseen) + seen);
    }
}
