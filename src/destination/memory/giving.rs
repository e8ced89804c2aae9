//! Shared memory: one step puts a demanded page into its file, makes it visible to the guest and wakes the vCPU.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Instant;

use super::takeover::SharedCounter;
use super::{GuestMemory, GuestRegion, PageId};
use crate::error::{Error, Result};
use crate::fault::uffd::Placed;
use crate::memory::pages::PageState;

impl GuestMemory {
    /// Shared memory of small pages: puts an arrived page that a vCPU waits for into its file, makes the page visible
    /// to the guest, wakes the waiting threads and marks the page cached. UFFDIO_COPY does this in one call. Only for
    /// the thread that reads the guest's events, so that the page cannot be discarded meanwhile.
    ///
    /// Returns the start time. None if nothing has been done: the caller then writes the page and
    /// [marks](GuestMemory::mark) it, as for a page without a waiting vCPU. The result is None for pages that the file
    /// has already (EEXIST), while the guest changes its mappings (EAGAIN), and for other errors, which the fallback
    /// meets too and reports.
    pub(crate) fn give(&self, id: PageId, bytes: &[u8]) -> Result<Option<Instant>> {
        let region = self.region(id.region);
        let is_plain = || region.is_plain(id.page) && region.pages.is_wanted(id.page);
        if !region.memory.can_be_given() || bytes.len() as u64 != region.page_bytes() || !is_plain()
        {
            return Ok(None);
        }
        let began = Instant::now();
        let offset = region.byte_offset(id.page);
        if !self.announce(region, id) {
            return Ok(None);
        }
        let part = region.part_at(offset);
        let address = part.address + (offset - part.offset);
        let placed = self.sources[part.source].uffd.copy(address, bytes);
        let is_given = matches!(placed, Ok(Placed { stop: None, .. }));
        if is_given {
            let discard =
                |page| region.file().discard(region.byte_offset(page), region.page_bytes());
            region.pages.finish(id.page, 1, discard)?;
        }
        if let Some(told) = &self.told {
            told[SharedCounter::Giving as usize].store(0, SeqCst);
        }
        Ok(is_given.then_some(began))
    }

    /// A takeover has to know the page that is being given: the guest may have changed it before it is cached. False if
    /// the file has the page already, because its presence would prove nothing then. (A page that is allocated and was
    /// never filled does not count as present, here or at a takeover.) mincore takes no lock of the file; lseek does,
    /// and waits for a bulk thread's write.
    fn announce(&self, region: &GuestRegion, id: PageId) -> bool {
        let Some(told) = &self.told else { return true };
        let resident = region.file().is_resident(region.byte_offset(id.page), region.page_bytes());
        if !matches!(resident, Ok(false)) {
            return false;
        }
        told[SharedCounter::Giving as usize].store(id.pack() + 1, SeqCst);
        true
    }

    /// A page that was being given and is in the file has arrived: the file did not have it before, and the kernel puts
    /// the page there whole. The guest may have changed it since.
    pub(super) fn keep_given(&self) -> Result<()> {
        let Some(giving) = self.told.as_ref().map(|told| &told[SharedCounter::Giving as usize])
        else {
            return Ok(());
        };
        let Some(id) = giving.load(SeqCst).checked_sub(1).map(PageId::unpack) else {
            return Ok(());
        };
        if let Some(region) = self.regions.get(usize::from(id.region.0))
            && id.page < region.bytes >> region.unit_shift()
            && region.memory.can_be_given()
            && region.pages.get(id.page) == PageState::Landing
        {
            let offset = region.byte_offset(id.page);
            if region.file().next_data_in(offset..offset + region.page_bytes())? == Some(offset) {
                region.pages.finish(id.page, 1, |_| Ok::<(), Error>(()))?;
            }
        }
        giving.store(0, SeqCst);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use umem_wire::{PageRange, RegionId};

    use super::super::fixture::{Guest, PAGES, id};
    use super::*;
    use crate::fault::uffd::Stop;
    use crate::memory::claims::RunKind;
    use crate::memory::words::State;

    const BYTES: [u8; 4096] = [0xa5; 4096];

    #[test]
    fn awaited_page_is_copied_in() {
        let guest = Guest::new();
        guest.awaits(1, true);
        assert!(guest.memory.give(id(1), &BYTES).unwrap().is_some());
        assert_eq!(guest.state(1), PageState::Cached);
        assert_eq!(guest.contents(1), BYTES);
        assert!(guest.sees(1));
        let range = PageRange { region: RegionId(0), first: 1, pages: 1 };
        assert!(!guest.memory.finish_given(range).unwrap());
        assert_eq!(guest.memory.pages_missing(), PAGES - 1);
        assert!(guest.memory.begin(range, "a lane").is_err(), "it came a second time");
    }

    #[test]
    fn demand_page_falls_back_to_continue_when_copy_fails() {
        let guest = Guest::new();
        let refused = |page: u64| guest.memory.give(id(page), &BYTES).unwrap().is_none();
        guest.awaits(0, false);
        assert!(refused(0), "no vCPU waits");
        assert_eq!((guest.state(0), guest.contents(0)), (PageState::Landing, vec![0; 4096]));

        guest.awaits(1, true);
        guest.region().pages.discard(1, 1);
        assert!(refused(1), "the guest has discarded it");
        assert_eq!((guest.state(1), guest.contents(1)), (PageState::Discarded, vec![0; 4096]));

        guest.awaits(2, true);
        guest.region().file().allocate_page(2 << 12).unwrap();
        assert!(refused(2), "the file has it already");
        assert_eq!((guest.state(2), guest.contents(2)), (PageState::Landing, vec![0; 4096]));
        guest.region().file().write_at(&BYTES, 2 << 12).unwrap();
        let range = PageRange { region: RegionId(0), first: 2, pages: 1 };
        let mut woken = Vec::new();
        guest.memory.finish(range, RunKind::Data, |page| woken.push(page)).unwrap();
        assert_eq!(woken, [id(2)]);
        assert!(guest.memory.mark(id(2)).unwrap());
        assert!(guest.sees(2));
        assert_eq!(guest.contents(2), BYTES);

        guest.awaits(3, true);
        guest.uffd.unregister(guest.address(3), 4096).unwrap();
        assert!(refused(3), "the userfaultfd does not have it any more");
        assert_eq!((guest.state(3), guest.contents(3)), (PageState::Landing, vec![0; 4096]));
    }

    /// A guest that is taken over after its umem was killed while giving `page`.
    fn killed(page: u64, give: impl FnOnce(&Guest)) -> Guest {
        let mut guest = Guest::new();
        let state = State::new(guest.memory.extents(), 1).unwrap();
        guest.memory.share(&state);
        guest.awaits(page, true);
        assert!(guest.memory.announce(guest.region(), id(page)));
        give(&guest);
        guest.memory.take_over().unwrap();
        assert_eq!(state.counters()[SharedCounter::Giving as usize].load(SeqCst), 0);
        guest
    }

    #[test]
    fn page_copied_by_a_killed_process_counts_as_cached() {
        let changed = [vec![0x5a], BYTES[1..].to_vec()].concat();
        let guest = killed(5, |guest| {
            let copied = guest.uffd.copy(guest.address(5), &BYTES).unwrap();
            assert_eq!(copied.stop, None);
            // The guest continues, and changes the page.
            guest.mapping.write_at(&[0x5a], 5 << 12).unwrap();
            // Of other landing pages, the number of received bytes is unknown.
            guest.awaits(6, true);
            guest.region().file().write_at(&BYTES, 6 << 12).unwrap();
        });
        assert_eq!((guest.state(5), guest.contents(5)), (PageState::Cached, changed));
        assert_eq!((guest.state(6), guest.contents(6)), (PageState::Missing, vec![0; 4096]));
        assert_eq!(guest.memory.pages_missing(), PAGES - 1);
    }

    #[test]
    fn page_not_yet_copied_by_a_killed_process_is_missing() {
        let guest = killed(5, |_| {});
        assert_eq!((guest.state(5), guest.contents(5)), (PageState::Missing, vec![0; 4096]));
        // Allocated and never filled: the kernel refuses it.
        let guest = killed(5, |guest| {
            guest.region().file().allocate_page(5 << 12).unwrap();
            let refused = guest.uffd.copy(guest.address(5), &BYTES).unwrap();
            assert_eq!(refused.stop, Some(Stop::Already));
        });
        assert_eq!((guest.state(5), guest.contents(5)), (PageState::Missing, vec![0; 4096]));
    }

    #[test]
    fn page_is_recorded_while_it_is_copied_in() {
        let mut guest = Guest::new();
        let state = State::new(guest.memory.extents(), 1).unwrap();
        guest.memory.share(&state);
        let named = || state.counters()[SharedCounter::Giving as usize].load(SeqCst);
        guest.awaits(4, true);
        guest.region().file().write_at(&[0; 4096], 4 << 12).unwrap();
        assert!(!guest.memory.announce(guest.region(), id(4)), "its presence proves nothing");
        assert_eq!(named(), 0);
        guest.awaits(7, true);
        assert!(guest.memory.announce(guest.region(), id(7)));
        assert_eq!(named(), id(7).pack() + 1);
        assert!(guest.memory.give(id(7), &BYTES).unwrap().is_some());
        assert_eq!(named(), 0);
    }
}
