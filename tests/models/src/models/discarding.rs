//! Pages that the guest discards while they arrive.

use std::ops::Range;

use loom::sync::{Arc, RwLock};
use loom::thread;

use super::{check, region};
use crate::error::Error;
use crate::guest::{self, GuestRegion};
use crate::memory::pages::{AlreadyHere, PageState, PageStates};

struct Guest {
    region: GuestRegion,
    gate: RwLock<()>,
    has_gate: bool,
}

impl Guest {
    fn new(has_gate: bool) -> Guest {
        Guest { region: region(2), gate: RwLock::new(()), has_gate }
    }

    /// A lane brings the first unit, no byte of which is zero.
    fn land(&self) {
        self.region.pages.begin(0, 1).unwrap();
        self.region.file().write(0);
        self.region.file().write(1);
        let _gate = self.has_gate.then(|| self.gate.read().unwrap());
        guest::finish(&self.region, 0, 1).unwrap();
    }

    /// A discard is read, and applied to the page states, with the gate closed. The kernel removes the pages as soon as
    /// it has been read.
    fn discard(guest: &Arc<Guest>, pages: Range<u64>) {
        let (start, end) = (pages.start << 12, pages.end << 12);
        let kernel = {
            let _gate = guest.has_gate.then(|| guest.gate.write().unwrap());
            let file_of = guest.clone();
            let kernel = thread::spawn(move || {
                file_of.region.file().discard(start, end - start).unwrap();
            });
            guest::discard(&guest.region, start..end);
            kernel
        };
        kernel.join().unwrap();
    }
}

/// Discarded pages read as zeroes in the end, and all others have the source's contents.
pub fn discard_of_a_landing_unit_reads_as_zeroes() {
    check(|| discards(0..2, true));
}

/// The same for one of the unit's pages.
pub fn partial_discard_of_a_landing_unit_reads_as_zeroes() {
    check(|| discards(1..2, true));
}

/// Without the gate a lane may finish a page between its removal by the kernel and the recording of its discard.
pub fn discard_without_the_gate_leaks_old_contents() {
    check(|| discards(1..2, false));
}

fn discards(pages: Range<u64>, has_gate: bool) {
    let guest = Arc::new(Guest::new(has_gate));
    let lane = thread::spawn({
        let guest = guest.clone();
        move || guest.land()
    });
    Guest::discard(&guest, pages.clone());
    lane.join().unwrap();
    assert_eq!(guest.region.pages.get(0), PageState::Cached);
    for page in 0..2 {
        let is_zero = guest.region.file().is_zero(page);
        assert_eq!(is_zero, pages.contains(&(page as u64)), "page {page}");
    }
}

/// The lanes are lost while one unit was landing, and another one that the guest discards meanwhile. A discard is not
/// forgotten, no partial data stays, and both may arrive again.
pub fn discard_during_a_rollback_is_kept() {
    check(|| {
        let guest = Arc::new(Guest::new(true));
        guest.region.pages.begin(0, 2).unwrap();
        (0..4).for_each(|page| guest.region.file().write(page));
        let reader = thread::spawn({
            let guest = guest.clone();
            move || Guest::discard(&guest, 2..4)
        });
        let give_back = |first, units| guest.region.file().discard(first << 13, units << 13);
        guest.region.pages.roll_back(give_back).unwrap();
        reader.join().unwrap();
        assert_eq!(guest.region.pages.get(0), PageState::Missing);
        assert_eq!(guest.region.pages.get(1), PageState::Discarded);
        assert!((0..4).all(|page| guest.region.file().is_zero(page)));
        guest.region.pages.begin(0, 2).unwrap();
    });
}

/// Two lanes bring the same pages, whose states lie in two words: one of them succeeds, and the other leaves no trace.
pub fn duplicate_pages_land_once() {
    check(|| {
        let states = Arc::new(PageStates::new(40));
        let begin = |first: u64| states.begin(first, 2).is_ok();
        let other = thread::spawn({
            let states = states.clone();
            move || states.begin(32, 2).is_ok()
        });
        let won = [begin(31), other.join().unwrap()];
        assert!(won[0] != won[1], "{won:?}");
        assert_eq!(states.get(31) == PageState::Landing, won[0]);
        assert_eq!(states.get(32), PageState::Landing);
        assert_eq!(states.get(33) == PageState::Landing, won[1]);
    });
}

/// Two lanes bring a discarded page: none of it is visible, and it counts as received once.
pub fn duplicate_discarded_page_lands_once() {
    check(|| {
        let states = Arc::new(PageStates::new(4));
        states.discard(1, 1);
        let land = |states: &PageStates| {
            states.begin(1, 1)?;
            states.finish(1, 1, |_| Ok::<(), AlreadyHere>(()))
        };
        let other = thread::spawn({
            let states = states.clone();
            move || land(&states).is_ok()
        });
        let finished = [land(&states).is_ok(), other.join().unwrap()];
        assert!(finished.iter().any(|&finished| finished));
        assert_eq!(states.get(1), PageState::Cached);
    });
}
