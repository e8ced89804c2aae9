//! Parts of a landing unit that the guest has discarded before the unit arrived.
//!
//! If the source's pages are larger than the destination's, one landing unit is many pages of the
//! guest, which may discard some of them. The guest must not see the unit's contents of those
//! pages. Units of one page need no entry: their state records the discard.

use std::collections::BTreeMap;

use super::sync::{AtomicBool, Mutex, MutexGuard, Ordering::SeqCst, PoisonError};
use super::words::AtomicWords;

/// Discarded pages of units that have not arrived, for one region.
///
/// Allocates only for units with discarded pages, one bit for each page of the unit.
pub(crate) struct Fragments {
    pages_per_unit: u64,
    /// Whether any part was ever discarded. Never cleared: most guests discard no part of a unit.
    any: AtomicBool,
    units: Mutex<BTreeMap<u64, Box<[u64]>>>,
    /// For a takeover: a bit for every page that was ever added. The bits of units that have arrived
    /// are meaningless.
    shared: Option<AtomicWords>,
}

impl Fragments {
    /// Units of `pages_per_unit` pages each, a power of two.
    pub(crate) fn new(pages_per_unit: u64) -> Fragments {
        Fragments {
            pages_per_unit,
            any: AtomicBool::new(false),
            units: Mutex::new(BTreeMap::new()),
            shared: None,
        }
    }

    /// Records discards also in these words from now on, and starts with the words' discards of units
    /// that have not arrived.
    pub(crate) fn share(&mut self, words: AtomicWords, has_come: impl Fn(u64) -> bool) {
        let bits = words.iter().enumerate().filter_map(|(at, word)| {
            let bits = word.load(SeqCst);
            (bits != 0).then_some((at as u64 * 64, bits))
        });
        for (first, bits) in bits {
            for page in (0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| first + bit) {
                let unit = page / self.pages_per_unit;
                if !has_come(unit) {
                    self.add(unit, page % self.pages_per_unit, 1);
                }
            }
        }
        self.shared = Some(words);
    }

    /// Records that the pages `first..first + count` of `unit` are discarded.
    pub(crate) fn add(&self, unit: u64, first: u64, count: u64) {
        debug_assert!(first + count <= self.pages_per_unit);
        if let Some(shared) = &self.shared {
            let start = unit * self.pages_per_unit + first;
            for page in start..start + count {
                let word = &shared[usize::try_from(page / 64).expect("state is in memory")];
                word.fetch_or(1 << (page % 64), SeqCst);
            }
        }
        self.any.store(true, SeqCst);
        let words = usize::try_from(self.pages_per_unit.div_ceil(64)).expect("small");
        let mut units = self.lock();
        let bits = units.entry(unit).or_insert_with(|| vec![0; words].into());
        for page in first..first + count {
            bits[usize::try_from(page / 64).expect("small")] |= 1 << (page % 64);
        }
    }

    /// Removes and returns the discarded pages of a unit; none for most.
    pub(crate) fn take(&self, unit: u64) -> Option<Discarded> {
        if !self.any.load(SeqCst) {
            return None;
        }
        self.lock().remove(&unit).map(|bits| Discarded { bits, pages: self.pages_per_unit })
    }

    /// Whether a part of a unit in the range has been discarded.
    pub(crate) fn any_in(&self, first: u64, units: u64) -> bool {
        self.any.load(SeqCst) && self.lock().range(first..first + units).next().is_some()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Box<[u64]>>> {
        self.units.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The discarded pages of one unit.
pub(crate) struct Discarded {
    bits: Box<[u64]>,
    pages: u64,
}

impl Discarded {
    /// Runs of pages that are (`true`) or are not (`false`) discarded: first page and count.
    pub(crate) fn runs(&self, discarded: bool) -> impl Iterator<Item = (u64, u64)> {
        let is = move |page: u64| {
            let word = self.bits[usize::try_from(page / 64).expect("small")];
            (word >> (page % 64) & 1 == 1) == discarded
        };
        let mut page = 0;
        std::iter::from_fn(move || {
            while page < self.pages && !is(page) {
                page += 1;
            }
            let first = page;
            while page < self.pages && is(page) {
                page += 1;
            }
            (first < page).then_some((first, page - first))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discarded_pages_of_a_unit_are_reported_once() {
        let fragments = Fragments::new(512);
        assert!(fragments.take(3).is_none() && !fragments.any_in(0, 10));
        fragments.add(3, 10, 2);
        fragments.add(3, 500, 12);
        assert!(fragments.any_in(3, 1) && !fragments.any_in(4, 6));
        let discarded = fragments.take(3).unwrap();
        assert_eq!(discarded.runs(true).collect::<Vec<_>>(), [(10, 2), (500, 12)]);
        assert_eq!(discarded.runs(false).collect::<Vec<_>>(), [(0, 10), (12, 488)]);
        assert!(fragments.take(3).is_none());
    }

    #[test]
    fn discards_of_missing_units_survive_a_takeover() {
        let words = || AtomicWords::zeroed(8 * 16 / 64);
        let (mut fragments, shared) = (Fragments::new(16), words());
        fragments.share(words(), |_| false);
        fragments.add(3, 15, 1);
        fragments.add(4, 0, 3);
        fragments.take(4).unwrap();
        for (word, noted) in shared.iter().zip(fragments.shared.unwrap().iter()) {
            word.store(noted.load(SeqCst), SeqCst);
        }
        let mut next = Fragments::new(16);
        next.share(shared, |unit| unit == 3);
        assert!(next.take(3).is_none());
        assert_eq!(next.take(4).unwrap().runs(true).collect::<Vec<_>>(), [(0, 3)]);
    }
}
