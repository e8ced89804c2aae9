//! Page states at the destination: Missing → Landing → Cached, two bits a page.
//!
//! A page's bytes are received straight into guest memory, so a page that landed twice would
//! overwrite what the guest has written since. [`PageStates::begin`] is the gate: it moves pages
//! from Missing to Landing and refuses if any of them is already beyond that, before a byte of them
//! is received. [`PageStates::finish`] moves them on to Cached, after the last byte.
//!
//! Beside the state stands one bit a page, *wanted*: a vCPU waits for it. The two are read and
//! written by different threads with this rule: who wants a page sets the bit and then looks at the
//! state; who completes a page sets the state and then looks at the bit. Both are sequentially
//! consistent, so at least one of them sees the other and the vCPU is woken.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// What the destination knows of a page. The numbers are the two bits in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageState {
    /// Still at the source, or on its way.
    Missing = 0b00,
    /// Its bytes are being received into guest memory.
    Landing = 0b01,
    /// Every byte is there (or it is a page of zeroes): the guest may see it.
    Cached = 0b11,
}

/// A page that was to land but has landed, or is landing, already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AlreadyHere {
    pub(crate) page: u64,
}

/// The states of one region's pages.
pub(crate) struct PageStates {
    states: Box<[AtomicU64]>,
    wanted: Box<[AtomicU64]>,
    pages: u64,
}

const STATES_PER_WORD: u64 = 32;
const BITS_PER_WORD: u64 = 64;
/// Bit 0 of each of the 32 states in a word.
const LANDING_ALL: u64 = 0x5555_5555_5555_5555;
/// Both bits of each of the 32 states in a word.
const CACHED_ALL: u64 = u64::MAX;

impl PageStates {
    /// All `pages` Missing, none wanted. Takes 3 bits of memory a page.
    pub(crate) fn new(pages: u64) -> PageStates {
        PageStates {
            states: zeroed(pages.div_ceil(STATES_PER_WORD)),
            wanted: zeroed(pages.div_ceil(BITS_PER_WORD)),
            pages,
        }
    }

    pub(crate) fn get(&self, page: u64) -> PageState {
        let word = self.states[index(page / STATES_PER_WORD)].load(SeqCst);
        match word >> (page % STATES_PER_WORD * 2) & 0b11 {
            0b00 => PageState::Missing,
            0b01 => PageState::Landing,
            0b11 => PageState::Cached,
            other => unreachable!("page state {other:#b}"),
        }
    }

    /// Missing → Landing for `first..first + pages`, all of them or none.
    pub(crate) fn begin(&self, first: u64, pages: u64) -> Result<(), AlreadyHere> {
        for (word, mask) in self.words(first, pages) {
            let cell = &self.states[index(word)];
            let claimed = cell.fetch_update(SeqCst, SeqCst, |now| {
                (now & mask == 0).then_some(now | (mask & LANDING_ALL))
            });
            if let Err(now) = claimed {
                let slot = u64::from((now & mask).trailing_zeros()) / 2;
                let page = word * STATES_PER_WORD + slot;
                self.undo_begin(first, (word * STATES_PER_WORD).saturating_sub(first));
                return Err(AlreadyHere { page });
            }
        }
        Ok(())
    }

    fn undo_begin(&self, first: u64, pages: u64) {
        for (word, mask) in self.words(first, pages) {
            self.states[index(word)].fetch_and(!mask, SeqCst);
        }
    }

    /// Landing → Cached for `first..first + pages`. That they were Landing is ours to guarantee.
    pub(crate) fn finish(&self, first: u64, pages: u64) {
        for (word, mask) in self.words(first, pages) {
            let before = self.states[index(word)].fetch_or(mask & CACHED_ALL, SeqCst);
            assert_eq!(
                before & mask,
                mask & LANDING_ALL,
                "only a landing page becomes cached"
            );
        }
    }

    /// Notes that a vCPU waits for `page`; true when it was not noted before.
    pub(crate) fn want(&self, page: u64) -> bool {
        let bit = 1 << (page % BITS_PER_WORD);
        self.wanted[index(page / BITS_PER_WORD)].fetch_or(bit, SeqCst) & bit == 0
    }

    /// Forgets that a vCPU waited for `page`; true when one did.
    pub(crate) fn unwant(&self, page: u64) -> bool {
        let bit = 1 << (page % BITS_PER_WORD);
        self.wanted[index(page / BITS_PER_WORD)].fetch_and(!bit, SeqCst) & bit != 0
    }

    /// Calls `f` with each wanted page in `first..first + pages`.
    pub(crate) fn each_wanted(&self, first: u64, pages: u64, mut f: impl FnMut(u64)) {
        assert!(first + pages <= self.pages);
        let mut page = first;
        while page < first + pages {
            let offset = page % BITS_PER_WORD;
            let count = (BITS_PER_WORD - offset).min(first + pages - page);
            let mut bits =
                self.wanted[index(page / BITS_PER_WORD)].load(SeqCst) >> offset & low_bits(count);
            while bits != 0 {
                f(page + u64::from(bits.trailing_zeros()));
                bits &= bits - 1;
            }
            page += count;
        }
    }

    /// The words that hold `first..first + pages`, each with the mask of those pages' bits.
    fn words(&self, first: u64, pages: u64) -> impl Iterator<Item = (u64, u64)> + use<> {
        let end = first + pages;
        assert!(end <= self.pages, "pages {first}+{pages} of {}", self.pages);
        (first / STATES_PER_WORD..end.div_ceil(STATES_PER_WORD)).map(move |word| {
            let from = first.max(word * STATES_PER_WORD) - word * STATES_PER_WORD;
            let to = end.min((word + 1) * STATES_PER_WORD) - word * STATES_PER_WORD;
            (word, low_bits(to * 2) & !low_bits(from * 2))
        })
    }
}

fn zeroed(words: u64) -> Box<[AtomicU64]> {
    (0..words).map(|_| AtomicU64::new(0)).collect()
}

/// The lowest `count` bits set, for `count` up to 64.
pub(crate) fn low_bits(count: u64) -> u64 {
    if count >= 64 {
        u64::MAX
    } else {
        (1 << count) - 1
    }
}

fn index(word: u64) -> usize {
    usize::try_from(word).expect("page state is in memory, so its index fits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_goes_through_its_states_once() {
        let states = PageStates::new(1000);
        states.begin(30, 70).unwrap();
        assert_eq!(states.get(29), PageState::Missing);
        assert_eq!(states.get(30), PageState::Landing);
        assert_eq!(states.get(99), PageState::Landing);
        assert_eq!(states.get(100), PageState::Missing);
        states.finish(30, 70);
        assert_eq!(states.get(99), PageState::Cached);
        assert_eq!(states.begin(99, 1), Err(AlreadyHere { page: 99 }));
    }

    #[test]
    fn a_refused_landing_leaves_no_trace() {
        let states = PageStates::new(1000);
        states.begin(500, 1).unwrap();
        assert_eq!(states.begin(3, 900), Err(AlreadyHere { page: 500 }));
        for page in (0..1000).filter(|&page| page != 500) {
            assert_eq!(states.get(page), PageState::Missing, "page {page}");
        }
        assert_eq!(states.get(500), PageState::Landing);
    }

    #[test]
    #[should_panic(expected = "only a landing page becomes cached")]
    fn finishing_what_did_not_begin_is_our_bug() {
        PageStates::new(64).finish(3, 1);
    }

    #[test]
    fn wanted_pages_are_found_in_any_range() {
        let states = PageStates::new(300);
        for page in [0, 63, 64, 127, 128, 299] {
            assert!(states.want(page));
            assert!(!states.want(page));
        }
        let found = |first, pages| {
            let mut found = Vec::new();
            states.each_wanted(first, pages, |page| found.push(page));
            found
        };
        assert_eq!(found(0, 300), [0, 63, 64, 127, 128, 299]);
        assert_eq!(found(1, 63), [63]);
        assert_eq!(found(64, 65), [64, 127, 128]);
        assert!(states.unwant(127) && !states.unwant(127));
        assert_eq!(found(65, 63), [0u64; 0]);
    }

    #[test]
    fn each_page_is_won_by_one_of_many_threads() {
        const PAGES: u64 = 10_000;
        let states = PageStates::new(PAGES);
        let won: u64 = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..PAGES).filter(|&p| states.begin(p, 1).is_ok()).count()))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap() as u64)
                .sum()
        });
        assert_eq!(won, PAGES);
    }
}
