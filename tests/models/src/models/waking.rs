//! vCPUs that wait for pages, the threads that read their faults, and a lane that lands the awaited pages.

use loom::sync::Arc;
use loom::thread;

use super::{check, region};
use crate::guest::{self, GuestRegion};
use crate::memory::pages::{Fault, PageState, PageStates};
use crate::sync::AtomicU32;
use crate::sync::Ordering::SeqCst;

/// The decision about a fault that has been read.
type Decide = fn(&PageStates, u64) -> Fault;

struct Guest {
    region: GuestRegion,
    /// vCPUs that wait in the kernel, a bit for each of the guest's pages.
    waiting: AtomicU32,
    /// Arrived units with a waiting vCPU, as reported by lanes, a bit a unit.
    told: AtomicU32,
    /// Requested units, a bit each.
    asked: AtomicU32,
}

impl Guest {
    /// With vCPUs that wait for all of these pages, whose faults have not been read.
    fn waiting_for(units: u64, pages: &[u64]) -> Guest {
        Guest {
            region: region(units),
            waiting: AtomicU32::new(pages.iter().map(|page| 1 << page).sum()),
            told: AtomicU32::new(0),
            asked: AtomicU32::new(0),
        }
    }

    /// A fault thread reads one fault, as `Faults::fault`.
    fn read(&self, page: u64, decide: Decide) {
        let unit = page / 2;
        match decide(&self.region.pages, unit) {
            Fault::Show => self.wake(0b01 << page),
            Fault::WakeAll => self.cached(unit),
            Fault::Ask => {
                let before = self.asked.fetch_or(1 << unit, SeqCst);
                assert!(before & 1 << unit == 0, "the page is requested twice");
            }
            Fault::Wait => {}
        }
    }

    /// The thread takes the reports of lanes, as `Faults::cached`.
    fn take_told(&self, units: u32) {
        let told = self.told.fetch_and(!units, SeqCst) & units;
        (0..8).filter(|unit| told >> unit & 1 == 1).for_each(|unit| self.cached(unit));
    }

    fn cached(&self, unit: u64) {
        self.region.pages.unwant(unit);
        self.wake(0b11 << (2 * unit));
    }

    /// UFFDIO_WAKE: a waiting vCPU faults again, and finds the page.
    fn wake(&self, pages: u32) {
        self.waiting.fetch_and(!pages, SeqCst);
    }

    /// A lane brings units, as `GuestMemory::begin` and `finish`.
    fn land(&self, first: u64, units: u64) {
        self.region.pages.begin(first, units).unwrap();
        guest::finish(&self.region, first, units).unwrap();
        self.region.pages.each_wanted(first, units, |unit| {
            self.told.fetch_or(1 << unit, SeqCst);
        });
        if guest::complete(&self.region, first, units) > 0 {
            self.wake(!0);
        }
    }

    fn nobody_waits(&self) {
        assert_eq!(self.waiting.load(SeqCst), 0, "a vCPU waits forever");
    }
}

/// Two vCPUs touch two pages of one landing unit, which arrives meanwhile. The unit's block is incomplete, so it does
/// not leave the userfaultfd.
pub fn both_faults_of_one_unit_are_woken() {
    check(|| two_faults(PageStates::fault));
}

/// The same with an earlier, wrong decision: a page that is here wakes only the vCPUs that wait at the touched address.
/// The second fault of the unit clears the bit of the first.
pub fn two_faults_of_one_unit_by_state_alone_lose_a_wake() {
    check(|| {
        two_faults(|pages, unit| {
            let is_first = pages.want(unit);
            match pages.get(unit) {
                PageState::Cached => {
                    pages.unwant(unit);
                    Fault::Show
                }
                PageState::Missing if is_first => Fault::Ask,
                _ => Fault::Wait,
            }
        });
    });
}

fn two_faults(decide: Decide) {
    let guest = Arc::new(Guest::waiting_for(2, &[0, 1]));
    let lane = thread::spawn({
        let guest = guest.clone();
        move || guest.land(0, 1)
    });
    guest.read(0, decide);
    guest.take_told(0b1);
    guest.read(1, decide);
    lane.join().unwrap();
    guest.take_told(0b1);
    guest.nobody_waits();
}

/// Two threads serve faults of units whose bits lie in one word; both units arrive as one run.
pub fn two_fault_threads_lose_no_wake() {
    check(|| {
        let guest = Arc::new(Guest::waiting_for(3, &[1, 2]));
        let threads = [
            thread::spawn({
                let guest = guest.clone();
                move || guest.land(0, 2)
            }),
            thread::spawn({
                let guest = guest.clone();
                move || guest.read(1, PageStates::fault)
            }),
        ];
        guest.read(2, PageStates::fault);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        guest.take_told(0b11);
        guest.nobody_waits();
    });
}

/// The last unit of a block arrives, and the block leaves the userfaultfd, while a fault of an earlier unit of it is
/// served.
pub fn fault_of_a_block_being_unregistered_is_woken() {
    check(|| {
        let guest = Arc::new(Guest::waiting_for(2, &[1, 2]));
        let lanes = [0, 1].map(|unit| {
            let guest = guest.clone();
            thread::spawn(move || guest.land(unit, 1))
        });
        guest.read(1, PageStates::fault);
        guest.read(2, PageStates::fault);
        lanes.into_iter().for_each(|lane| lane.join().unwrap());
        guest.take_told(0b11);
        guest.nobody_waits();
    });
}
