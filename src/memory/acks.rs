//! Acknowledged pages, which the source may free, three bits a page.
//!
//! A page is *sent* from when it is handed to the kernel until it is acknowledged, and *pending*
//! from then until a thread takes it to free it. So only sent pages are freed, and each page once.
//! The acknowledgement stays recorded: a destination that lacks the page later cannot get it again.
//! One more bit for every [`GROUP_PAGES`] pages marks groups with pending pages.

use std::ops::Range;

use super::pages::low_bits;
use super::sync::AtomicU64;
use super::sync::Ordering::{AcqRel, Acquire};
use super::words::AtomicWords;

/// Pages that are searched at once for pending ones: 64 words.
const GROUP_PAGES: u64 = 64 * 64;

/// A page was acknowledged that had not been sent, or had been acknowledged before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotSent {
    pub(crate) page: u64,
}

/// The pages of one region.
pub(crate) struct Acks {
    pages: u64,
    sent: Box<[AtomicU64]>,
    pending: Box<[AtomicU64]>,
    /// Also visible to a process that takes over: these pages may be gone.
    acknowledged: AtomicWords,
    /// A bit a group, set after the pages' own.
    groups: Box<[AtomicU64]>,
}

impl Acks {
    pub(crate) fn new(pages: u64) -> Acks {
        Acks::over(AtomicWords::zeroed(pages.div_ceil(64)), pages)
    }

    /// Starts with the pages that were acknowledged to an earlier process.
    pub(crate) fn over(acknowledged: AtomicWords, pages: u64) -> Acks {
        assert_eq!(acknowledged.len() as u64, pages.div_ceil(64));
        Acks {
            pages,
            sent: zeroed(pages.div_ceil(64)),
            pending: zeroed(pages.div_ceil(64)),
            acknowledged,
            groups: zeroed(pages.div_ceil(GROUP_PAGES).div_ceil(64)),
        }
    }

    /// Marks pages that are about to be handed to the kernel.
    pub(crate) fn sending(&self, first: u64, pages: u64) {
        for (word, mask) in self.words(first, pages) {
            self.sent[word].fetch_or(mask, AcqRel);
        }
    }

    /// Marks pages as acknowledged. An error names a page that was not sent; earlier pages are
    /// marked.
    pub(crate) fn acknowledge(&self, first: u64, pages: u64) -> Result<(), NotSent> {
        for (word, mask) in self.words(first, pages) {
            let sent = self.sent[word].fetch_and(!mask, AcqRel) & mask;
            self.free(word, sent);
            if sent != mask {
                let page = word as u64 * 64 + u64::from((mask & !sent).trailing_zeros());
                return Err(NotSent { page });
            }
        }
        Ok(())
    }

    /// Marks newly acknowledged pages as pending.
    fn free(&self, word: usize, pages: u64) {
        self.acknowledged[word].fetch_or(pages, AcqRel);
        self.pending[word].fetch_or(pages, AcqRel);
        let group = word as u64 * 64 / GROUP_PAGES;
        self.groups[index(group / 64)].fetch_or(1 << (group % 64), AcqRel);
    }

    /// For new lanes: the destination has the pages `has` of the 64 pages from `first` on, which
    /// counts as an acknowledgement; the others count as not sent. `Err` names a page that it lacks
    /// although it has acknowledged it: the page may be gone here.
    pub(crate) fn account(&self, first: u64, has: u64) -> Result<(), u64> {
        let word = index(first / 64);
        let acknowledged = self.acknowledged[word].load(Acquire);
        let gone = acknowledged & !has;
        if gone != 0 {
            return Err(first + u64::from(gone.trailing_zeros()));
        }
        self.sent[word].fetch_and(0, AcqRel);
        if has != acknowledged {
            self.free(word, has & !acknowledged);
        }
        Ok(())
    }

    /// Takes pending pages, of one group at most, as ranges in order: the caller frees them.
    pub(crate) fn take(&self, mut range: impl FnMut(Range<u64>)) {
        let Some(group) = self.take_group() else { return };
        let mut open: Option<Range<u64>> = None;
        let words =
            group * GROUP_PAGES / 64..((group + 1) * GROUP_PAGES).min(self.pages).div_ceil(64);
        for word in words {
            let mut bits = self.pending[index(word)].swap(0, AcqRel);
            while bits != 0 {
                let from = u64::from(bits.trailing_zeros());
                let count = u64::from((bits >> from).trailing_ones());
                bits &= !(low_bits(count) << from);
                let found = word * 64 + from..word * 64 + from + count;
                match &mut open {
                    Some(last) if last.end == found.start => last.end = found.end,
                    _ => open.replace(found).into_iter().for_each(&mut range),
                }
            }
        }
        open.into_iter().for_each(range);
    }

    fn take_group(&self) -> Option<u64> {
        for (word, groups) in self.groups.iter().enumerate() {
            let bits = groups.load(Acquire);
            if bits != 0 {
                let bit = bits & bits.wrapping_neg();
                groups.fetch_and(!bit, AcqRel);
                return Some(word as u64 * 64 + u64::from(bit.trailing_zeros()));
            }
        }
        None
    }

    /// The words that hold a range, each with the mask of its pages.
    fn words(&self, first: u64, pages: u64) -> impl Iterator<Item = (usize, u64)> + use<> {
        let end = first + pages;
        assert!(end <= self.pages, "pages {first}+{pages} of {}", self.pages);
        (first / 64..end.div_ceil(64)).map(move |word| {
            let from = first.max(word * 64) - word * 64;
            let to = end.min((word + 1) * 64) - word * 64;
            (index(word), low_bits(to) & !low_bits(from))
        })
    }
}

fn zeroed(words: u64) -> Box<[AtomicU64]> {
    (0..words).map(|_| AtomicU64::new(0)).collect()
}

fn index(word: u64) -> usize {
    usize::try_from(word).expect("page bits are in memory, so their index fits")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(acks: &Acks) -> Vec<Range<u64>> {
        let mut ranges = Vec::new();
        loop {
            let before = ranges.len();
            acks.take(|range| ranges.push(range));
            if ranges.len() == before {
                return ranges;
            }
        }
    }

    #[test]
    fn acknowledged_pages_are_taken_once() {
        let acks = Acks::new(10_000);
        acks.sending(0, 10_000);
        assert_eq!(taken(&acks), []);
        for (first, pages) in [(60, 10), (70, 200), (9_999, 1), (4_000, 200), (0, 1)] {
            acks.acknowledge(first, pages).unwrap();
        }
        // A range ends with its group of 4096 pages.
        let expected = [0..1, 60..270, 4_000..4_096, 4_096..4_200, 9_999..10_000];
        assert_eq!(taken(&acks), expected);
        assert_eq!(taken(&acks), []);
    }

    #[test]
    fn acknowledging_an_unsent_page_or_a_page_twice_is_refused() {
        let acks = Acks::new(1_000);
        acks.sending(100, 100);
        assert_eq!(acks.acknowledge(99, 2), Err(NotSent { page: 99 }));
        assert_eq!(acks.acknowledge(150, 51), Err(NotSent { page: 200 }));
        assert_eq!(acks.acknowledge(150, 1), Err(NotSent { page: 150 }));
        assert_eq!(acks.acknowledge(500, 500), Err(NotSent { page: 500 }));
        assert_eq!(taken(&acks), [100..101, 150..200]);
    }

    #[test]
    fn after_a_loss_arrived_pages_are_freed_and_the_rest_is_sent_again() {
        let acks = Acks::new(200);
        acks.sending(0, 150);
        acks.acknowledge(10, 20).unwrap();
        assert_eq!(taken(&acks), [10..30; 1]);
        // The destination has 0..40 of the sent pages, and lacks the rest.
        assert_eq!(acks.account(0, low_bits(40)), Ok(()));
        assert_eq!(acks.account(64, 0), Ok(()));
        assert_eq!(acks.account(128, 0), Ok(()));
        assert_eq!(taken(&acks), [0..10, 30..40]);
        assert_eq!(acks.acknowledge(100, 1), Err(NotSent { page: 100 }));
        acks.sending(100, 1);
        acks.acknowledge(100, 1).unwrap();
        assert_eq!(taken(&acks), [100..101; 1]);
        // Acknowledged pages may have been freed.
        assert_eq!(acks.account(0, low_bits(40) & !(1 << 13)), Err(13));
    }

    #[test]
    fn concurrent_acknowledgements_are_each_taken_once() {
        const PAGES: u64 = 50_000;
        let acks = Acks::new(PAGES);
        acks.sending(0, PAGES);
        let freed = std::thread::scope(|scope| {
            for part in 0..4 {
                let acks = &acks;
                scope.spawn(move || {
                    (0..PAGES).filter(|page| page % 4 == part).for_each(|page| {
                        acks.acknowledge(page, 1).unwrap();
                    });
                });
            }
            let mut freed = 0;
            while freed < PAGES {
                acks.take(|range| freed += range.end - range.start);
            }
            freed
        });
        assert_eq!(freed, PAGES);
        assert_eq!(taken(&acks), []);
    }
}
