//! Support for takeovers: the page states live in a memory file that outlives this process, and the process that takes
//! over continues with them.

use std::sync::atomic::Ordering::SeqCst;

use umem_wire::{PageRange, RegionId, Totals};

use super::{GuestMemory, GuestRegion, what};
use crate::control::destination::Record;
use crate::control::destination::takeover::Recalled;
use crate::error::{Context, Error, Result};
use crate::fault::uffd::{Event, MESSAGE_BYTES};
use crate::memory::claims::RunKind;
use crate::memory::pages::{PageState, PageStates};
use crate::memory::words::{COUNTERS, EVENTS_BYTES, Extent, State};
use crate::session::{DestinationState, since_boot, when};

/// Words counted for a takeover: each variant is the index of its word.
#[derive(Clone, Copy)]
pub(super) enum SharedCounter {
    ZeroBytes = 0,
    HoleBytes = 1,
    PagesDemand = 2,
    /// No count: the page that is being [given](GuestMemory::give), packed, plus 1; 0 for none.
    Giving = 3,
    /// Not a count: the progress of the switchover. 0 before it, 1 from *switched* on, 2 from *running* on.
    Standing = 4,
    /// From the guest's stop at the source until the source sent the switchover, in microseconds. Valid from
    /// *switched* on.
    StoppedUs = 5,
    /// The arrival of the switchover, in nanoseconds [since boot](since_boot). Valid from *switched* on.
    SwitchedAt = 6,
    /// The start of the guest, in nanoseconds since boot. Valid from *running* on.
    RunningAt = 7,
}

const _: () = assert!((SharedCounter::RunningAt as usize) < COUNTERS);

/// Values of [`SharedCounter::Standing`].
const SWITCHED: u64 = 1;
const RUNNING: u64 = 2;

impl GuestMemory {
    /// The requirements on a memory file for the states, by region.
    pub(crate) fn extents(&self) -> Vec<Extent> {
        let extent = |region: &GuestRegion| Extent {
            pages: region.bytes >> region.unit_shift(),
            parts_per_page: 1 << (region.unit_shift() - region.page_shift()),
        };
        self.regions.iter().map(extent).collect()
    }

    /// Keeps the states in this file from now on, and takes over its contents. Before any page arrives.
    pub(crate) fn share(&mut self, state: &State) {
        for (index, region) in self.regions.iter_mut().enumerate() {
            let words = state.region(index);
            region.pages = PageStates::over(words.states, region.bytes >> region.unit_shift());
            if let Some(parts) = words.parts {
                let pages = &region.pages;
                region.fragments.share(parts, |unit| pages.get(unit) == PageState::Cached);
            }
        }
        for (index, source) in self.sources.iter_mut().enumerate() {
            source.events = Some(state.events(index));
        }
        self.told = Some(state.counters());
    }

    /// Notes in the memory file that the guest belongs to this side, or runs. This cannot fail, unlike a write of the
    /// session file, which fails on a full disk. A process that takes over relies on the note: a guest that runs must
    /// not be reported as one that was never switched over.
    pub(crate) fn note_standing(&self, record: &Record) {
        let Some(told) = &self.told else { return };
        let store = |word: SharedCounter, value| told[word as usize].store(value, SeqCst);
        match *record {
            Record::Switched { stopped_us, at } => {
                store(SharedCounter::StoppedUs, stopped_us);
                store(SharedCounter::SwitchedAt, since_boot(at));
                store(SharedCounter::Standing, SWITCHED);
            }
            Record::Running { at } => {
                store(SharedCounter::RunningAt, since_boot(at));
                store(SharedCounter::Standing, RUNNING);
            }
            Record::Loaded { .. } | Record::Complete { .. } | Record::Parted => {}
        }
    }

    /// The progress of the earlier processes: the later one of their session file's state and the state that
    /// [`GuestMemory::note_standing`] has noted. Times come from the note, which every process has written: if one was
    /// killed between its note and its write of the file, the file's later states have no time of the switchover.
    pub(crate) fn noted_standing(&self, recalled: Recalled) -> Recalled {
        let Some(told) = &self.told else { return recalled };
        let load = |word: SharedCounter| told[word as usize].load(SeqCst);
        let mut recalled = recalled;
        let standing = load(SharedCounter::Standing);
        if standing >= SWITCHED {
            recalled.stopped_us = load(SharedCounter::StoppedUs);
            recalled.switched = Some(when(load(SharedCounter::SwitchedAt)));
            if recalled.state == DestinationState::Loaded {
                recalled.state = DestinationState::Switched;
            }
        }
        if standing >= RUNNING {
            recalled.running = Some(when(load(SharedCounter::RunningAt)));
            if recalled.state == DestinationState::Switched {
                recalled.state = DestinationState::Running;
            }
        }
        recalled
    }

    /// Continues where a process was killed, as the [table](crate::memory::words) describes. `share` has been called,
    /// and no other thread runs yet. Waiting threads are not woken yet.
    pub(crate) fn take_over(&self) -> Result<()> {
        self.keep_given()?;
        self.roll_back()?;
        for source in &self.sources {
            let Some(events) = &source.events else { continue };
            let mut bytes = [0; EVENTS_BYTES];
            events.copy(&mut bytes);
            for event in bytes.as_chunks::<MESSAGE_BYTES>().0 {
                if let Event::Remove { start, end } | Event::Unmap { start, end } =
                    Event::decode(event)
                {
                    self.discard(start, end)?;
                }
            }
            events.clear(EVENTS_BYTES);
        }
        let mut pages_done = 0;
        for (index, region) in self.regions.iter().enumerate() {
            let id = RegionId(u16::try_from(index).expect("the table has at most 256 regions"));
            region.pages.each_cached(|first, pages| {
                pages_done += pages;
                let range = PageRange { region: id, first, pages };
                self.counters.map.count_earlier(range, region.unit_shift());
                // Private memory is complete when it has been released (again).
                if region.memory.kind.needs_touch() { Ok(()) } else { self.complete(range) }
            })?;
        }
        self.counters.pages_done.store(pages_done, SeqCst);
        self.recount();
        Ok(())
    }

    /// The progress so far, as counted by the previous process; pages in flight at its death count as data.
    fn recount(&self) {
        let Some(told) = &self.told else { return };
        let told = |what: SharedCounter| told[what as usize].load(SeqCst);
        let cached = |region: &GuestRegion| {
            let mut pages = 0;
            let _ = region.pages.each_cached(|_, count| {
                pages += count;
                Ok::<(), ()>(())
            });
            region.byte_offset(pages)
        };
        let bytes: u64 = self.regions.iter().map(cached).sum();
        let zero_bytes = told(SharedCounter::ZeroBytes).min(bytes);
        let hole_bytes = told(SharedCounter::HoleBytes).min(bytes - zero_bytes);
        let pages_done = self.counters.pages_done.load(SeqCst);
        let pages_demand = told(SharedCounter::PagesDemand).min(pages_done);
        self.counters.set(&Totals {
            data_bytes: bytes - zero_bytes - hole_bytes,
            zero_bytes,
            hole_bytes,
            pages_demand,
            pages_background: pages_done - pages_demand,
        });
    }

    /// Touches and releases all private memory that has arrived, even if the earlier process had done so. The touch
    /// thread runs.
    pub(crate) fn touch_again(&self) -> Result<()> {
        for (index, region) in self.regions.iter().enumerate() {
            if !region.memory.kind.needs_touch() {
                continue;
            }
            let id = RegionId(u16::try_from(index).expect("the table has at most 256 regions"));
            let queue = self.touch.get().expect("private memory has its toucher");
            region.pages.each_cached(|first, pages| {
                let (mut page, end) = (first, first + pages);
                while page < end {
                    let (kind, pages) = region.kind_at(page, end)?;
                    if kind == RunKind::Data {
                        self.spare_bytes.fetch_add(region.byte_offset(pages), SeqCst);
                    }
                    queue.landed(PageRange { region: id, first: page, pages }, kind);
                    page += pages;
                }
                Ok::<(), Error>(())
            })?;
        }
        Ok(())
    }

    /// Wakes all waiting threads: those without their page fault again, and the thread that reads the events now sees
    /// them.
    pub(crate) fn wake_all(&self) -> Result<()> {
        for region in &self.regions {
            for part in &region.parts {
                let uffd = &self.sources[part.source].uffd;
                uffd.wake(part.address, part.bytes).context(|| what(region))?;
            }
        }
        Ok(())
    }

    pub(super) fn tell(&self, what: SharedCounter, value: u64) {
        if let Some(told) = &self.told {
            told[what as usize].fetch_add(value, SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use umem_wire::destination::Mode;

    use super::super::fixture::Guest;
    use super::*;

    const MODE: Mode = Mode { postcopy: true, background: true };

    fn recalled(state: DestinationState) -> Recalled {
        Recalled { state, mode: MODE, stopped_us: 0, switched: None, running: None }
    }

    #[test]
    fn memory_file_has_the_switchover_that_the_session_file_lacks() {
        let mut guest = Guest::new();
        let state = State::new(guest.memory.extents(), 1).unwrap();
        guest.memory.share(&state);
        let loaded = recalled(DestinationState::Loaded);
        let noted = |guest: &Guest| guest.memory.noted_standing(loaded);
        guest.memory.note_standing(&Record::Loaded { mode: MODE, runs: true });
        assert_eq!(noted(&guest).state, DestinationState::Loaded);

        let at = Instant::now();
        guest.memory.note_standing(&Record::Switched { stopped_us: 1500, at });
        let switched = noted(&guest);
        assert_eq!((switched.state, switched.stopped_us), (DestinationState::Switched, 1500));
        assert_eq!(switched.running, None);

        let later = at + Duration::from_millis(2);
        guest.memory.note_standing(&Record::Running { at: later });
        let running = noted(&guest);
        assert_eq!(running.state, DestinationState::Running);
        assert!(running.ran_after() <= Duration::from_millis(3), "{:?}", running.ran_after());
        // The process that took over has written only its own state to the session file.
        let running = guest.memory.noted_standing(recalled(DestinationState::Running));
        assert_eq!((running.stopped_us, running.switched.is_some()), (1500, true));
        assert_ne!(running.ran_after(), Duration::ZERO);
        // A later state in the session file takes precedence.
        let complete = recalled(DestinationState::Complete);
        assert_eq!(guest.memory.noted_standing(complete).state, DestinationState::Complete);
    }
}
