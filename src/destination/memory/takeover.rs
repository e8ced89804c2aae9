//! Support for takeovers: the page states live in a memory file that outlives this process, and the process that takes
//! over continues with them.

use std::sync::atomic::Ordering::SeqCst;

use umem_wire::{PageRange, RegionId};

use super::{GuestMemory, GuestRegion, what};
use crate::error::{Context, Error, Result};
use crate::fault::uffd::{Event, MESSAGE_BYTES};
use crate::memory::claims::RunKind;
use crate::memory::pages::{PageState, PageStates};
use crate::memory::words::{COUNTERS, EVENTS_BYTES, Extent, State};

/// Words counted for a takeover: each variant is the index of its word.
#[derive(Clone, Copy)]
pub(super) enum Told {
    ZeroBytes = 0,
    HoleBytes = 1,
    PagesDemand = 2,
    /// No count: the page that is being [given](GuestMemory::give), packed, plus 1; 0 for none.
    Giving = 3,
}

const _: () = assert!((Told::Giving as usize) < COUNTERS);

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
        let told = |what: Told| told[what as usize].load(SeqCst);
        let cached = |region: &GuestRegion| {
            let mut pages = 0;
            let _ = region.pages.each_cached(|_, count| {
                pages += count;
                Ok::<(), ()>(())
            });
            region.byte_offset(pages)
        };
        let bytes: u64 = self.regions.iter().map(cached).sum();
        let zero_bytes = told(Told::ZeroBytes).min(bytes);
        let hole_bytes = told(Told::HoleBytes).min(bytes - zero_bytes);
        let pages_done = self.counters.pages_done.load(SeqCst);
        let pages_demand = told(Told::PagesDemand).min(pages_done);
        let counters = &self.counters;
        for (counter, value) in [
            (&counters.zero_bytes, zero_bytes),
            (&counters.hole_bytes, hole_bytes),
            (&counters.data_bytes, bytes - zero_bytes - hole_bytes),
            (&counters.pages_demand, pages_demand),
            (&counters.pages_background, pages_done - pages_demand),
        ] {
            counter.store(value, SeqCst);
        }
    }

    /// Private memory that has arrived is touched and released again, whatever the previous process had done. The touch
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

    pub(super) fn tell(&self, what: Told, value: u64) {
        if let Some(told) = &self.told {
            told[what as usize].fetch_add(value, SeqCst);
        }
    }
}
