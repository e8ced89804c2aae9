//! Page states at the destination: Missing → Landing → Cached, two bits a page.
//!
//! A page's bytes are received straight into guest memory, so a page that landed twice would
//! overwrite later writes of the guest. [`PageStates::begin`] is the gate: it moves pages from
//! Missing to Landing before a byte of them is received, and refuses if any of them is already
//! beyond Missing. [`PageStates::finish`] moves them on to Cached, after the last byte.
//!
//! A guest may also discard a page that is still missing (balloon, MADV_DONTNEED): the page is then
//! *Discarded* until it has arrived, and its contents are dropped before it becomes Cached, as a page
//! of zeroes. It must still arrive: bytes in flight could land in it at any later time.
//!
//! When lanes are lost, and nothing can land any more, landing pages become Missing again
//! ([`PageStates::roll_back`]).
//!
//! Beside the state there is one bit a page, *wanted*: a vCPU waits for it. Different threads read
//! and write the two in this order: a thread that wants a page sets the bit and then reads the
//! state; a thread that completes a page sets the state and then reads the bit. Both are
//! sequentially consistent, so at least one of them sees the other and the vCPU is woken.

use super::sync::Ordering::SeqCst;
use super::words::AtomicWords;
use crate::error::Error;

/// The destination's state of a page. The numbers are the two bits in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageState {
    /// Still at the source, or in flight.
    Missing = 0b00,
    /// Its bytes are being received into guest memory.
    Landing = 0b01,
    /// The guest discarded it before it arrived: its contents must not become visible.
    Discarded = 0b10,
    /// Every byte is present (or the page holds zeroes): the guest may see it.
    Cached = 0b11,
}

/// The action for a fault that has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The page has not been requested yet: request it.
    Ask,
    /// The page is in flight, or requested: the thread that lands it sees that it is wanted.
    Wait,
    /// The page is present without other waiters: make the touched page of the guest visible.
    Show,
    /// The page is present, and a vCPU may wait for another part of it: wake all waiters.
    WakeAll,
}

/// A page that was to land, and is landing or has landed already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AlreadyHere {
    pub(crate) page: u64,
}

impl From<AlreadyHere> for Error {
    fn from(again: AlreadyHere) -> Error {
        Error::protocol("its lane", format!("page {} came a second time", again.page))
    }
}

/// The states of one region's pages.
pub(crate) struct PageStates {
    states: AtomicWords,
    /// This process's own: a takeover wakes all waiters, and they fault again.
    wanted: AtomicWords,
    pages: u64,
}

const STATES_PER_WORD: u64 = 32;
const BITS_PER_WORD: u64 = 64;
/// The lower bit of each of the 32 states in a word.
const LOWER_ALL: u64 = 0x5555_5555_5555_5555;

impl PageStates {
    /// All `pages` Missing, none wanted. Takes 3 bits of memory a page.
    pub(crate) fn new(pages: u64) -> PageStates {
        PageStates::over(AtomicWords::zeroed(pages.div_ceil(STATES_PER_WORD)), pages)
    }

    /// In words that may have been another process's.
    pub(crate) fn over(states: AtomicWords, pages: u64) -> PageStates {
        assert_eq!(states.len() as u64, pages.div_ceil(STATES_PER_WORD));
        PageStates { states, wanted: AtomicWords::zeroed(pages.div_ceil(BITS_PER_WORD)), pages }
    }

    pub(crate) fn get(&self, page: u64) -> PageState {
        let word = self.states[index(page / STATES_PER_WORD)].load(SeqCst);
        match word >> (page % STATES_PER_WORD * 2) & 0b11 {
            0b00 => PageState::Missing,
            0b01 => PageState::Landing,
            0b10 => PageState::Discarded,
            _ => PageState::Cached,
        }
    }

    /// Missing → Landing for `first..first + pages`, all of them or none; Discarded pages stay so.
    pub(crate) fn begin(&self, first: u64, pages: u64) -> Result<(), AlreadyHere> {
        for (word, mask) in self.words(first, pages) {
            let cell = &self.states[index(word)];
            // The lower bit is set in pages that are landing or cached.
            let begun = cell.fetch_update(SeqCst, SeqCst, |now| {
                let discarded = (now >> 1) & LOWER_ALL;
                (now & mask & LOWER_ALL == 0).then_some(now | (mask & LOWER_ALL & !discarded))
            });
            if let Err(now) = begun {
                let slot = u64::from((now & mask & LOWER_ALL).trailing_zeros()) / 2;
                let page = word * STATES_PER_WORD + slot;
                self.undo_begin(first, (word * STATES_PER_WORD).saturating_sub(first));
                return Err(AlreadyHere { page });
            }
        }
        Ok(())
    }

    /// Landing → Missing again. A page that was discarded in the meantime stays so.
    fn undo_begin(&self, first: u64, pages: u64) {
        for (word, mask) in self.words(first, pages) {
            self.states[index(word)].fetch_and(!(mask & LOWER_ALL), SeqCst);
        }
    }

    /// Landing → Cached for `first..first + pages`. Calls `discard` first with each page whose bytes
    /// must be dropped. An error of `discard` leaves that page and later ones unchanged. So does a
    /// page that is Cached already: a discarded page that arrived twice, which is an error.
    pub(crate) fn finish<E: From<AlreadyHere>>(
        &self,
        first: u64,
        pages: u64,
        mut discard: impl FnMut(u64) -> Result<(), E>,
    ) -> Result<(), E> {
        for (word, mask) in self.words(first, pages) {
            let cell = &self.states[index(word)];
            let mut now = cell.load(SeqCst);
            let mut thrown_away = 0;
            loop {
                let upper = (now >> 1) & LOWER_ALL & mask;
                let lower = now & LOWER_ALL & mask;
                let strange = (mask & LOWER_ALL) ^ upper ^ lower;
                if strange != 0 {
                    let slot = u64::from(strange.trailing_zeros()) / 2;
                    return Err(AlreadyHere { page: word * STATES_PER_WORD + slot }.into());
                }
                let mut left = upper & !thrown_away;
                while left != 0 {
                    discard(word * STATES_PER_WORD + u64::from(left.trailing_zeros()) / 2)?;
                    left &= left - 1;
                }
                thrown_away |= upper;
                match cell.compare_exchange(now, now | mask, SeqCst, SeqCst) {
                    Ok(_) => break,
                    Err(changed) => now = changed,
                }
            }
        }
        Ok(())
    }

    /// Landing → Missing for all pages: their lanes are gone, and no operation that could write to
    /// them is left. Calls `give_back` before that with each run of them, as their bytes may have
    /// come in part: if this process is killed in between, the pages are still known to have
    /// partial bytes. Discarded pages stay so, and Cached ones too.
    pub(crate) fn roll_back<E>(
        &self,
        mut give_back: impl FnMut(u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        for (word, mask) in self.words(0, self.pages) {
            let landing = |now: u64| now & LOWER_ALL & !(now >> 1) & mask;
            let cell = &self.states[index(word)];
            let mut left = landing(cell.load(SeqCst));
            while left != 0 {
                let slot = left.trailing_zeros();
                // Bits two apart belong to neighbours.
                let pages = (left | left << 1) >> slot;
                let count = pages.trailing_ones() / 2;
                give_back(word * STATES_PER_WORD + u64::from(slot / 2), u64::from(count))?;
                left &= !(low_bits(u64::from(2 * count)) << slot);
            }
            // Discards may have arrived meanwhile; no other event changes a landing page.
            let _ = cell.fetch_update(SeqCst, SeqCst, |now| Some(now & !landing(now)));
        }
        Ok(())
    }

    /// Which of the 64 pages from `first` on, a multiple of 64, are Cached: a bit each.
    pub(crate) fn cached_word(&self, first: u64) -> u64 {
        assert!(first.is_multiple_of(64) && first < self.pages);
        let half = |word: u64| {
            let now = self.states.get(index(word)).map_or(0, |cell| cell.load(SeqCst));
            compress(now & (now >> 1) & LOWER_ALL)
        };
        let word = first / STATES_PER_WORD;
        half(word) | half(word + 1) << STATES_PER_WORD
    }

    /// Calls `f` with each run of pages that are Cached: first page and count, of 64 pages at most.
    pub(crate) fn each_cached<E>(
        &self,
        mut f: impl FnMut(u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        for first in (0..self.pages).step_by(64) {
            let mut left = self.cached_word(first);
            while left != 0 {
                let offset = u64::from(left.trailing_zeros());
                let count = u64::from((left >> offset).trailing_ones());
                f(first + offset, count)?;
                left &= !(low_bits(count) << offset);
            }
        }
        Ok(())
    }

    /// The guest has discarded these pages: pages that have not arrived will read as zeroes.
    pub(crate) fn discard(&self, first: u64, pages: u64) {
        for (word, mask) in self.words(first, pages) {
            // Missing and Landing become Discarded; Cached stays, as the kernel has discarded the
            // page itself.
            let _ = self.states[index(word)].fetch_update(SeqCst, SeqCst, |now| {
                let cached = now & (now >> 1) & LOWER_ALL;
                let cached = cached | cached << 1;
                let discarded = mask & !cached & !LOWER_ALL;
                Some(now & !(mask & !cached) | discarded)
            });
        }
    }

    /// Processes a fault of `page` that has been read: records that a vCPU waits for it, unless it
    /// is present.
    ///
    /// If the page is a landing unit of several of the guest's pages, another vCPU may wait for
    /// another part of it, and the thread that landed it may not have checked for waiters yet. A
    /// bit that was set already is that vCPU's, so clearing it is a promise to wake the waiters of
    /// every part ([`Fault::WakeAll`]).
    pub(crate) fn fault(&self, page: u64) -> Fault {
        let is_first = self.want(page);
        match self.get(page) {
            PageState::Cached => {
                self.unwant(page);
                if is_first { Fault::Show } else { Fault::WakeAll }
            }
            PageState::Missing | PageState::Discarded if is_first => Fault::Ask,
            PageState::Missing | PageState::Discarded | PageState::Landing => Fault::Wait,
        }
    }

    /// Records that a vCPU waits for `page`; true if that was not recorded before.
    pub(crate) fn want(&self, page: u64) -> bool {
        let bit = 1 << (page % BITS_PER_WORD);
        self.wanted[index(page / BITS_PER_WORD)].fetch_or(bit, SeqCst) & bit == 0
    }

    /// Forgets that a vCPU waited for `page`; true if one did.
    pub(crate) fn unwant(&self, page: u64) -> bool {
        let bit = 1 << (page % BITS_PER_WORD);
        self.wanted[index(page / BITS_PER_WORD)].fetch_and(!bit, SeqCst) & bit != 0
    }

    /// Whether a vCPU waits for `page`.
    pub(crate) fn is_wanted(&self, page: u64) -> bool {
        self.wanted[index(page / BITS_PER_WORD)].load(SeqCst) >> (page % BITS_PER_WORD) & 1 == 1
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

/// The 32 bits at even places, moved together.
fn compress(even: u64) -> u64 {
    let steps = [
        (1, 0x3333_3333_3333_3333),
        (2, 0x0f0f_0f0f_0f0f_0f0f),
        (4, 0x00ff_00ff_00ff_00ff),
        (8, 0x0000_ffff_0000_ffff),
        (16, 0x0000_0000_ffff_ffff),
    ];
    steps.into_iter().fold(even, |bits, (shift, mask)| (bits | bits >> shift) & mask)
}

/// The lowest `count` bits set, for `count` up to 64.
pub(crate) fn low_bits(count: u64) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

fn index(word: u64) -> usize {
    usize::try_from(word).expect("page state is in memory, so its index fits")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Finishes a range and returns the pages whose bytes had to be dropped.
    fn finish(states: &PageStates, first: u64, pages: u64) -> Vec<u64> {
        let mut discarded = Vec::new();
        let discard = |page| {
            discarded.push(page);
            Ok::<(), AlreadyHere>(())
        };
        states.finish(first, pages, discard).unwrap();
        discarded
    }

    #[test]
    fn page_discarded_before_its_arrival_is_dropped_on_arrival() {
        let states = PageStates::new(200);
        states.begin(0, 10).unwrap();
        finish(&states, 0, 10);
        states.begin(50, 10).unwrap();
        // Cached 5..10, missing 10..50, landing 50..55.
        states.discard(5, 50);
        assert_eq!(states.get(7), PageState::Cached);
        assert_eq!(states.get(20), PageState::Discarded);
        assert_eq!(states.get(52), PageState::Discarded);
        assert_eq!(states.get(55), PageState::Landing);
        assert_eq!(finish(&states, 50, 10), [50, 51, 52, 53, 54]);
        states.begin(40, 10).unwrap();
        assert_eq!(finish(&states, 40, 10), (40..50).collect::<Vec<_>>());
        assert_eq!(states.begin(45, 1), Err(AlreadyHere { page: 45 }));
        assert_eq!(states.get(45), PageState::Cached);
    }

    #[test]
    fn page_passes_through_its_states_once() {
        let states = PageStates::new(1000);
        states.begin(30, 70).unwrap();
        assert_eq!(states.get(29), PageState::Missing);
        assert_eq!(states.get(30), PageState::Landing);
        assert_eq!(states.get(99), PageState::Landing);
        assert_eq!(states.get(100), PageState::Missing);
        finish(&states, 30, 70);
        assert_eq!(states.get(99), PageState::Cached);
        assert_eq!(states.begin(99, 1), Err(AlreadyHere { page: 99 }));
    }

    #[test]
    fn refused_landing_changes_no_state() {
        let states = PageStates::new(1000);
        states.begin(500, 1).unwrap();
        assert_eq!(states.begin(3, 900), Err(AlreadyHere { page: 500 }));
        for page in (0..1000).filter(|&page| page != 500) {
            assert_eq!(states.get(page), PageState::Missing, "page {page}");
        }
        assert_eq!(states.get(500), PageState::Landing);
    }

    /// Two lanes may both begin a discarded page, because its contents are never visible; it arrives once.
    #[test]
    fn discarded_page_arriving_twice_is_an_error() {
        let states = PageStates::new(64);
        states.discard(3, 1);
        states.begin(3, 1).unwrap();
        states.begin(3, 1).unwrap();
        assert_eq!(finish(&states, 3, 1), [3]);
        let again = states.finish(3, 1, |_| Ok::<(), AlreadyHere>(()));
        assert_eq!(again, Err(AlreadyHere { page: 3 }));
    }

    #[test]
    fn landing_pages_become_missing_again() {
        let states = PageStates::new(200);
        states.begin(0, 10).unwrap();
        finish(&states, 0, 10);
        states.begin(20, 50).unwrap();
        finish(&states, 40, 3);
        states.discard(50, 2);
        states.discard(100, 3);
        states.begin(100, 3).unwrap();
        states.begin(190, 10).unwrap();
        let mut back = Vec::new();
        states
            .roll_back(|first, pages| {
                back.extend(first..first + pages);
                Ok::<(), ()>(())
            })
            .unwrap();
        let landing = (20..70).filter(|page| !(40..43).contains(page) && ![50, 51].contains(page));
        assert_eq!(back, landing.chain(190..200).collect::<Vec<_>>());
        let cached = |page: &u64| states.get(*page) == PageState::Cached;
        assert_eq!(
            (0..200).filter(cached).collect::<Vec<_>>(),
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 40, 41, 42]
        );
        assert_eq!(states.get(50), PageState::Discarded);
        assert_eq!(states.get(101), PageState::Discarded);
        assert_eq!(states.cached_word(0), 0x3ff | 7 << 40);
        assert_eq!(states.cached_word(192), 0);
        let mut cached = Vec::new();
        let found = states.each_cached(|first, pages| {
            cached.push((first, pages));
            Ok::<(), ()>(())
        });
        assert_eq!((found, &cached[..]), (Ok(()), &[(0, 10), (40, 3)][..]));
        // The pages arrive again.
        states.begin(20, 20).unwrap();
        states.begin(43, 27).unwrap();
        finish(&states, 43, 27);
        assert_eq!(states.cached_word(64), 0x3f);
    }

    /// A process killed during `give_back` leaves pages Landing, and none that is Missing with
    /// partial bytes.
    #[test]
    fn pages_become_missing_only_after_their_contents_are_freed() {
        let states = PageStates::new(200);
        states.begin(10, 5).unwrap();
        states.begin(100, 2).unwrap();
        let killed = states.roll_back(|first, _| {
            assert_eq!(states.get(first), PageState::Landing);
            if first == 100 { Err("killed") } else { Ok(()) }
        });
        assert_eq!(killed, Err("killed"));
        assert_eq!(states.get(10), PageState::Missing);
        assert_eq!(states.get(101), PageState::Landing);
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
            threads.into_iter().map(|thread| thread.join().unwrap() as u64).sum()
        });
        assert_eq!(won, PAGES);
    }
}
