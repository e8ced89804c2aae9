//! The guest's memory at the destination, shared by the threads that fill it.
//!
//! Pages land directly in the guest's own shared memory through this process's mapping of it. The
//! order of steps for any run of pages, whoever receives it:
//! [`begin`](GuestMemory::begin) before its first byte, [`finish`](GuestMemory::finish) after its
//! last, and [`mark`](GuestMemory::mark) for each page that a vCPU waits for.

use std::sync::atomic::Ordering::SeqCst;

use umem_wire::{PageRange, RegionId};

use crate::error::{Context, Error, Result};
use crate::fault::uffd::{Marked, Uffd};
use crate::memory::blocks::Blocks;
use crate::memory::claims::RunKind;
use crate::memory::pages::{PageState, PageStates};
use crate::memory::region::RamFile;
use crate::report::Counters;

/// One region: its file, where the guest has it, and what of it has come.
pub(crate) struct GuestRegion {
    pub(crate) ram: RamFile,
    pub(crate) uffd: Uffd,
    /// Where the guest's process maps it.
    pub(crate) address: u64,
    pub(crate) pages: PageStates,
    blocks: Blocks,
}

impl GuestRegion {
    pub(crate) fn new(ram: RamFile, uffd: Uffd, address: u64) -> GuestRegion {
        let (pages, shift) = (ram.pages(), ram.page_shift);
        GuestRegion {
            ram,
            uffd,
            address,
            pages: PageStates::new(pages),
            blocks: Blocks::new(pages, shift),
        }
    }

    fn byte_offset(&self, page: u64) -> u64 {
        page << self.ram.page_shift
    }
}

/// All regions, in the order of the source's table, so that ids on the wire are indices here.
pub(crate) struct GuestMemory {
    pub(crate) regions: Vec<GuestRegion>,
    pub(crate) counters: Counters,
    pages_total: u64,
}

/// A page, packed for the journey through another ring's completion queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PageId {
    pub(crate) region: RegionId,
    pub(crate) page: u64,
}

impl PageId {
    /// Region in the top 16 bits, page in the lower 48, as in a request on the wire.
    pub(crate) fn pack(self) -> u64 {
        u64::from(self.region.0) << 48 | self.page
    }

    pub(crate) fn unpack(value: u64) -> PageId {
        let region = RegionId(u16::try_from(value >> 48).expect("16 bits remain"));
        PageId { region, page: value & ((1 << 48) - 1) }
    }
}

impl GuestMemory {
    pub(crate) fn new(regions: Vec<GuestRegion>) -> GuestMemory {
        let pages_total = regions.iter().map(|region| region.ram.pages()).sum();
        GuestMemory { regions, counters: Counters::default(), pages_total }
    }

    pub(crate) fn total_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.ram.bytes).sum()
    }

    pub(crate) fn region(&self, id: RegionId) -> &GuestRegion {
        &self.regions[usize::from(id.0)]
    }

    /// The page at an address of the guest's process.
    pub(crate) fn find(&self, address: u64) -> Option<PageId> {
        let index = self.regions.iter().position(|region| {
            (region.address..region.address + region.ram.bytes).contains(&address)
        })?;
        let region = &self.regions[index];
        let id = RegionId(u16::try_from(index).expect("the table has at most 256 regions"));
        Some(PageId { region: id, page: (address - region.address) >> region.ram.page_shift })
    }

    /// Missing → Landing, before a byte of the range is received. A page that has come before is
    /// the peer's fault: it would overwrite what the guest has written since.
    pub(crate) fn begin(&self, range: PageRange, lane: &str) -> Result<()> {
        self.region(range.region).pages.begin(range.first, range.pages).map_err(|again| {
            let name = &self.region(range.region).ram.name;
            Error::protocol(lane, format!("page {} of RAM {name} came a second time", again.page))
        })
    }

    /// Landing → Cached, after the last byte. Calls `wake` with each page of the range that a vCPU
    /// waits for; unregisters what is complete. True when this was the last page of all.
    pub(crate) fn finish(
        &self,
        range: PageRange,
        kind: RunKind,
        mut wake: impl FnMut(PageId),
    ) -> Result<bool> {
        let region = self.region(range.region);
        region.pages.finish(range.first, range.pages, |page| {
            region.ram.discard_page(region.byte_offset(page))
        })?;
        self.count(region, range, kind);
        region.pages.each_wanted(range.first, range.pages, |page| {
            wake(PageId { region: range.region, page });
        });
        let mut left = Ok(());
        region.blocks.complete(range.first, range.pages, |pages| {
            let start = region.address + region.byte_offset(pages.start);
            let len = region.byte_offset(pages.end - pages.start);
            let result = region.uffd.unregister(start, len);
            left = std::mem::replace(&mut left, Ok(())).and(result);
        });
        left.context(|| format!("unregistering RAM {} from userfaultfd", region.ram.name))?;
        let done = self.counters.pages_done.fetch_add(range.pages, SeqCst) + range.pages;
        Ok(done == self.pages_total)
    }

    fn count(&self, region: &GuestRegion, range: PageRange, kind: RunKind) {
        let counter = match kind {
            RunKind::Data => &self.counters.data_bytes,
            RunKind::Zero => &self.counters.zero_bytes,
            RunKind::Hole => &self.counters.hole_bytes,
        };
        Counters::add(counter, region.byte_offset(range.pages));
    }

    /// The guest side has discarded a range of its addresses: what has not come of it yet is to read
    /// as zeroes when it has.
    pub(crate) fn discard(&self, start: u64, end: u64) {
        for region in &self.regions {
            let from = start.max(region.address);
            let to = end.min(region.address + region.ram.bytes);
            if from < to {
                let first = (from - region.address) >> region.ram.page_shift;
                let last = (to - region.address) >> region.ram.page_shift;
                region.pages.discard(first, last - first);
            }
        }
    }

    /// Makes a cached page visible to the guest and wakes whoever waits for it. False when events
    /// are pending that have to be read first: try again after that.
    pub(crate) fn mark(&self, id: PageId) -> Result<bool> {
        let region = self.region(id.region);
        debug_assert_eq!(region.pages.get(id.page), PageState::Cached);
        let offset = region.byte_offset(id.page);
        let (start, len) = (region.address + offset, 1u64 << region.ram.page_shift);
        let what = || format!("marking a page of RAM {} cached", region.ram.name);
        // A page of zeroes is in no file yet; a neighbour that lands in the same huge page may
        // allocate it between the two calls, so that the first one works the second time.
        for _ in 0..3 {
            match region.uffd.mark_cached(start, len).context(what)? {
                Marked::Done | Marked::Gone => return Ok(true),
                Marked::Again => return Ok(false),
                Marked::Already => {
                    region.uffd.wake(start, len).context(what)?;
                    return Ok(true);
                }
                Marked::NotPresent if region.ram.on_hugetlb => region.ram.allocate_page(offset)?,
                Marked::NotPresent => match region.uffd.mark_zero(start, len).context(what)? {
                    Marked::Done | Marked::Gone => return Ok(true),
                    Marked::Again => return Ok(false),
                    Marked::Already | Marked::NotPresent => {}
                },
            }
        }
        // Whoever waits faults again, and finds the page there or asks anew.
        region.uffd.wake(start, len).context(what)?;
        Ok(true)
    }

    /// At the end: the whole guest leaves its userfaultfds.
    pub(crate) fn unregister_all(&self) -> Result<()> {
        for region in &self.regions {
            region
                .uffd
                .unregister(region.address, region.ram.bytes)
                .context(|| format!("unregistering RAM {}", region.ram.name))?;
        }
        Ok(())
    }

    /// For the report: how background pages came into place, in words.
    pub(crate) fn how_pages_landed(&self) -> &'static str {
        let huge = self.regions.iter().filter(|region| region.ram.has_huge_pages).count();
        match huge {
            0 => "none: written from a buffer",
            all if all == self.regions.len() => "all: received into guest memory",
            _ => "huge pages: received into guest memory; small pages: written from a buffer",
        }
    }

    pub(crate) fn pages_missing(&self) -> u64 {
        self.pages_total - self.counters.pages_done.load(SeqCst)
    }
}
