//! A bit a page of one region.

use super::pages::low_bits;
use super::sync::{AtomicU64, Ordering};

/// A bit for each page of a region, all clear at first. Threads may set and clear bits
/// concurrently.
pub(crate) struct Bits {
    pages: u64,
    words: Box<[AtomicU64]>,
}

impl Bits {
    pub(crate) fn new(pages: u64) -> Bits {
        Bits { pages, words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Sets the bits of `first..first + pages`.
    pub(crate) fn set(&self, first: u64, pages: u64) {
        for (word, mask) in self.words(first, pages) {
            // Release: a thread that takes the bit sees all writes before it was set.
            self.words[word].fetch_or(mask, Ordering::AcqRel);
        }
    }

    /// Clears the bits of `first..first + pages`.
    pub(crate) fn clear(&self, first: u64, pages: u64) {
        for (word, mask) in self.words(first, pages) {
            self.words[word].fetch_and(!mask, Ordering::AcqRel);
        }
    }

    pub(crate) fn get(&self, page: u64) -> bool {
        self.word(page / 64 * 64) >> (page % 64) & 1 == 1
    }

    /// The bits of the 64 pages from `first` on, a multiple of 64.
    pub(crate) fn word(&self, first: u64) -> u64 {
        self.words[index(first)].load(Ordering::Acquire)
    }

    /// The bits of the `count` ≤ 64 pages from `first`, which lie in one word of 64.
    pub(crate) fn bits(&self, first: u64, count: u64) -> u64 {
        self.word(first / 64 * 64) >> (first % 64) & low_bits(count)
    }

    /// Sets the bits in `bits`, of pages from `first` on, a multiple of 64.
    pub(crate) fn add(&self, first: u64, bits: u64) {
        self.words[index(first)].fetch_or(bits, Ordering::AcqRel);
    }

    /// Makes `bits` the bits of the `count` ≤ 64 pages from `first`, which lie in one word of 64. Only the calling
    /// thread may change these pages meanwhile, others may change their neighbours.
    pub(crate) fn replace(&self, first: u64, count: u64, bits: u64) {
        let (offset, mask) = (first % 64, low_bits(count));
        assert!(count <= 64 - offset && first + count <= self.pages && bits & !mask == 0);
        let word = &self.words[index(first)];
        word.fetch_and(!(mask << offset) | bits << offset, Ordering::AcqRel);
        word.fetch_or(bits << offset, Ordering::AcqRel);
    }

    /// Takes and clears the bits of the `count` ≤ 64 pages from `first`, which lie in one word of
    /// 64. A set bit `i` in the result is page `first + i`.
    pub(crate) fn take_word(&self, first: u64, count: u64) -> u64 {
        let offset = first % 64;
        assert!(count <= 64 - offset && first + count <= self.pages);
        let mask = low_bits(count) << offset;
        let word = &self.words[index(first)];
        // Most words of a guest that writes little are clear, and need no write.
        if word.load(Ordering::Acquire) & mask == 0 {
            return 0;
        }
        (word.fetch_and(!mask, Ordering::AcqRel) & mask) >> offset
    }

    /// The number of set bits.
    #[cfg(test)]
    pub(crate) fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }

    /// Calls `f` with each maximal run of pages, first and count, whose bits equal `set`, in order.
    pub(crate) fn each_run<E>(
        &self,
        set: bool,
        mut f: impl FnMut(u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut page = 0;
        while page < self.pages {
            let start = self.next(page, set);
            let end = self.next(start, !set);
            if start < end {
                f(start, end - start)?;
            }
            page = end;
        }
        Ok(())
    }

    /// The first page from `page` on whose bit equals `set`, or the end.
    pub(crate) fn next(&self, mut page: u64, set: bool) -> u64 {
        while page < self.pages {
            let word = self.word(page / 64 * 64);
            let wanted = (if set { word } else { !word }) >> (page % 64);
            if wanted != 0 {
                return (page + u64::from(wanted.trailing_zeros())).min(self.pages);
            }
            page = (page / 64 + 1) * 64;
        }
        self.pages
    }

    fn words(&self, first: u64, pages: u64) -> impl Iterator<Item = (usize, u64)> + use<> {
        let end = first + pages;
        assert!(end <= self.pages, "pages {first}+{pages} of {}", self.pages);
        (first / 64..end.div_ceil(64)).map(move |word| {
            let (from, to) =
                (first.max(word * 64) - word * 64, end.min(word * 64 + 64) - word * 64);
            (index(word * 64), low_bits(to) & !low_bits(from))
        })
    }
}

fn index(page: u64) -> usize {
    usize::try_from(page / 64).expect("a bit a page is in memory, so its index fits")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(bits: &Bits, set: bool) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        bits.each_run(set, |first, pages| {
            runs.push((first, pages));
            Ok::<(), ()>(())
        })
        .unwrap();
        runs
    }

    #[test]
    fn runs_have_their_full_length() {
        let bits = Bits::new(200);
        assert_eq!((runs(&bits, true), runs(&bits, false)), (vec![], vec![(0, 200)]));
        bits.set(60, 70);
        bits.set(199, 1);
        bits.clear(100, 1);
        assert_eq!(runs(&bits, true), [(60, 40), (101, 29), (199, 1)]);
        assert_eq!(runs(&bits, false), [(0, 60), (100, 1), (130, 69)]);
        assert_eq!(bits.count(), 70);
        assert!(bits.get(60) && !bits.get(100) && bits.get(199));
        bits.set(0, 200);
        assert_eq!((runs(&bits, true), runs(&bits, false)), (vec![(0, 200)], vec![]));
    }

    #[test]
    fn bit_is_taken_once() {
        let bits = Bits::new(100);
        bits.set(3, 62);
        assert_eq!(bits.take_word(0, 4), 0b1000);
        assert_eq!(bits.take_word(0, 8), 0b1111_0000);
        assert_eq!(bits.take_word(64, 36), 1);
        assert_eq!(bits.take_word(64, 36), 0);
        assert_eq!(bits.count(), 56);
    }

    #[test]
    fn bits_in_the_middle_of_a_word_are_replaced_and_their_neighbours_stay() {
        let bits = Bits::new(100);
        bits.set(0, 100);
        bits.replace(8, 4, 0b0101);
        assert_eq!((bits.bits(6, 8), bits.count()), (0b1101_0111, 98));
        bits.replace(8, 4, 0b1010);
        assert_eq!((bits.bits(8, 4), bits.bits(64, 36)), (0b1010, low_bits(36)));
        bits.replace(64, 36, 0);
        bits.add(64, 0b110);
        assert_eq!(runs(&bits, true), [(0, 8), (9, 1), (11, 53), (65, 2)]);
    }
}
