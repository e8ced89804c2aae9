//! The guest's memory at the destination, shared by the threads that fill it.
//!
//! The order of steps for any run of pages, whoever receives it: [`begin`](GuestMemory::begin) before
//! its first byte, [`place`](GuestMemory::place) for bytes that wait in a buffer,
//! [`finish`](GuestMemory::finish) after its last, and [`mark`](GuestMemory::mark) for each page that
//! a vCPU waits for.
//!
//! What the kinds of memory differ in:
//!
//! | | shared | private | anonymous |
//! |---|---|---|---|
//! | a page lands | in the file | in the file | in a buffer |
//! | the guest sees it by | UFFDIO_CONTINUE when a vCPU waits, else when its block leaves | UFFDIO_CONTINUE | UFFDIO_COPY |
//! | a page of zeroes | stays a hole | UFFDIO_ZEROPAGE | nothing, until a vCPU waits |
//! | its block leaves the userfaultfd with its last page | cached | released ([`touch`](super::touch)) | cached |
//!
//! **Discards.** The guest side may discard pages at any time (balloon, MADV_DONTNEED). The kernel
//! reports that, waits until the report has been read, and then removes the pages. What is visible in
//! a shared file only by [`mark`](GuestMemory::mark), which the reader of the reports calls, cannot
//! meet a discard half-way. Where another thread makes pages visible (private, anonymous) it does so
//! behind the *gate* of its userfaultfd: the reports are read with the gate closed, and are carried
//! out in the page states before it opens, so that a page is either visible before its report is read,
//! and the kernel removes it, or known to be discarded.

use std::ops::Range;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use umem_wire::{PageRange, RegionId};

use super::touch::TouchQueue;
use crate::error::{Context, Error, Result};
use crate::fault::uffd::{Event, MESSAGE_BYTES, Placed, Stop, Uffd};
use crate::memory::blocks::Blocks;
use crate::memory::claims::RunKind;
use crate::memory::fragments::Fragments;
use crate::memory::kind::Kind;
use crate::memory::pages::{PageState, PageStates};
use crate::memory::region::RamFile;
use crate::memory::sums::Digests;
use crate::memory::words::{COUNTERS, EVENTS_BYTES, Events, Extent, State, Words};
use crate::report::Counters;

/// The most that is made visible with the gate held open, unless a page is larger: a reader of fault
/// reports waits for this at most, some 20 µs.
const GATE_BYTES_MAX: u64 = 64 << 10;

/// Private memory: what has landed in the file and is not released yet. Bulk lanes pause above this,
/// so that the guest's memory is never twice in this machine; demanded pages go on.
pub(crate) const SPARE_BYTES_MAX: u64 = 64 << 20;

/// The largest pages that can be copied in: they wait whole in a buffer.
pub(crate) const COPIED_PAGE_BYTES_MAX: u64 = 2 << 20;

/// A page of zeroes, as large as the largest that UFFDIO_ZEROPAGE does not know (hugetlb).
static ZEROES: [u8; COPIED_PAGE_BYTES_MAX as usize] = [0; COPIED_PAGE_BYTES_MAX as usize];

/// A userfaultfd of the guest's process.
pub(crate) struct FaultSource {
    pub(crate) uffd: Uffd,
    /// Where its events are read into, if another process may have to carry them out.
    pub(crate) events: Option<Events>,
    gate: RwLock<()>,
}

impl FaultSource {
    pub(crate) fn new(uffd: Uffd) -> FaultSource {
        FaultSource { uffd, events: None, gate: RwLock::new(()) }
    }

    /// For who makes pages visible.
    fn open_gate(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For who reads what the kernel reports.
    pub(crate) fn close_gate(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A piece of a region that the guest's process maps in one, with one userfaultfd.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    /// Where it begins in the region, bytes.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    /// Where the guest's process maps it.
    pub(crate) address: u64,
    /// Its userfaultfd: an index of [`GuestMemory::sources`].
    pub(crate) source: usize,
}

/// One region: its file, where the guest has it, and what of it has come.
pub(crate) struct GuestRegion {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) bytes: u64,
    /// log2 of what lands as one: the larger of both sides' page sizes. All page numbers count these.
    pub(crate) unit_shift: u8,
    /// log2 of the size of the guest's pages here.
    page_shift: u8,
    file: Option<RamFile>,
    /// In the order of their offsets; together they are the region.
    parts: Vec<Part>,
    pub(crate) pages: PageStates,
    fragments: Fragments,
    blocks: Blocks,
}

/// What a region is made from.
pub(crate) struct RegionSetup {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) bytes: u64,
    pub(crate) unit_shift: u8,
    pub(crate) page_shift: u8,
    /// None for anonymous memory.
    pub(crate) file: Option<RamFile>,
    /// Sorted, without gaps, each of whole units.
    pub(crate) parts: Vec<Part>,
}

impl GuestRegion {
    pub(crate) fn new(setup: RegionSetup) -> GuestRegion {
        let RegionSetup { name, kind, bytes, unit_shift, page_shift, file, parts } = setup;
        let units = bytes >> unit_shift;
        GuestRegion {
            name,
            kind,
            bytes,
            unit_shift,
            page_shift,
            file,
            parts,
            pages: PageStates::new(units),
            fragments: Fragments::new(1 << (unit_shift - page_shift)),
            blocks: Blocks::new(units, unit_shift),
        }
    }

    pub(crate) fn byte_offset(&self, page: u64) -> u64 {
        page << self.unit_shift
    }

    /// The file that pages land in.
    ///
    /// # Panics
    /// For anonymous memory, which has none.
    pub(crate) fn file(&self) -> &RamFile {
        self.file.as_ref().expect("anonymous memory lands in buffers")
    }

    /// Pages of this region come into place by way of a buffer, whatever lane brings them.
    pub(crate) fn is_copied(&self) -> bool {
        self.kind == Kind::Anonymous
    }

    /// Its memory comes in huge pages, which can be received into.
    pub(crate) fn has_huge_pages(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.has_huge_pages)
    }

    fn page_bytes(&self) -> u64 {
        1 << self.page_shift
    }

    fn unit_is_page(&self) -> bool {
        self.unit_shift == self.page_shift
    }

    /// The part that a byte of the region is in.
    pub(crate) fn part_at(&self, offset: u64) -> &Part {
        let after = self.parts.partition_point(|part| part.offset <= offset);
        &self.parts[after - 1]
    }

    /// The guest's addresses of a range of the region, piece by piece.
    pub(crate) fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = (&Part, u64, u64)> {
        let mut offset = range.start;
        std::iter::from_fn(move || {
            (offset < range.end).then(|| {
                let part = self.part_at(offset);
                let len = range.end.min(part.offset + part.bytes) - offset;
                let address = part.address + (offset - part.offset);
                offset += len;
                (part, address, len)
            })
        })
    }
}

/// What is counted for a process that may have to take over: the index of its word.
#[derive(Clone, Copy)]
enum Told {
    ZeroBytes = 0,
    HoleBytes = 1,
    PagesDemand = 2,
}

const _: () = assert!((Told::PagesDemand as usize) < COUNTERS);

/// All regions, in the order of the source's table, so that ids on the wire are indices here.
pub(crate) struct GuestMemory {
    pub(crate) regions: Vec<GuestRegion>,
    pub(crate) sources: Vec<FaultSource>,
    pub(crate) counters: Arc<Counters>,
    /// With checksums: what all that has landed comes to.
    pub(crate) digests: Digests,
    /// Private memory: bytes that have landed and are not released, and the most that ever were.
    spare_bytes: AtomicU64,
    spare_bytes_max: AtomicU64,
    release_bytes: AtomicU64,
    /// Private memory: who maps, touches and releases what has landed.
    touch: OnceLock<TouchQueue>,
    /// The lanes are lost: whoever waits to receive something there gives up.
    lanes_are_down: AtomicBool,
    /// Bulk lanes bring records of TLS, which no page is received from in place.
    comes_in_records: AtomicBool,
    /// Where another process may have to go on: what has come, for its report ([`Told`]).
    told: Option<Words>,
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
    pub(crate) fn new(regions: Vec<GuestRegion>, sources: Vec<FaultSource>) -> GuestMemory {
        let pages_total = regions.iter().map(|region| region.bytes >> region.unit_shift).sum();
        let counters = Arc::new(Counters::of(regions.iter().map(|region| region.bytes)));
        GuestMemory {
            digests: Digests::of(regions.len()),
            regions,
            sources,
            counters,
            spare_bytes: AtomicU64::new(0),
            spare_bytes_max: AtomicU64::new(0),
            release_bytes: AtomicU64::new(0),
            touch: OnceLock::new(),
            lanes_are_down: AtomicBool::new(false),
            comes_in_records: AtomicBool::new(false),
            told: None,
            pages_total,
        }
    }

    /// What a memory file for the states has to hold of each region.
    pub(crate) fn extents(&self) -> Vec<Extent> {
        let extent = |region: &GuestRegion| Extent {
            pages: region.bytes >> region.unit_shift,
            parts_per_page: 1 << (region.unit_shift - region.page_shift),
        };
        self.regions.iter().map(extent).collect()
    }

    /// Keeps the states in this file from now on, and takes them as they are there. Before any page
    /// comes.
    pub(crate) fn share(&mut self, state: &State) {
        for (index, region) in self.regions.iter_mut().enumerate() {
            let words = state.region(index);
            region.pages = PageStates::over(words.states, region.bytes >> region.unit_shift);
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

    /// Goes on where a process was killed, as the [table](crate::memory::words) says; `share` has been
    /// called, and nobody else is at work yet. Who waits is not woken yet.
    pub(crate) fn take_over(&self) -> Result<()> {
        self.roll_back()?;
        for source in &self.sources {
            let Some(events) = &source.events else { continue };
            let mut bytes = [0; EVENTS_BYTES];
            events.copy(&mut bytes);
            for event in bytes.as_chunks::<MESSAGE_BYTES>().0 {
                if let Event::Remove { start, end } = Event::decode(event) {
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
                if region.kind == Kind::Private { Ok(()) } else { self.complete(range) }
            })?;
        }
        self.counters.pages_done.store(pages_done, SeqCst);
        self.recount();
        Ok(())
    }

    /// What has come so far, as the process before this has counted; what it was killed over is data.
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

    /// Private memory that has come is touched and released, whatever the process before this had done
    /// of that. The toucher runs.
    pub(crate) fn touch_again(&self) -> Result<()> {
        for (index, region) in self.regions.iter().enumerate() {
            if region.kind != Kind::Private {
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

    /// Wakes all who wait: those whose page is not there fault again, and are heard of by whoever reads
    /// the events now.
    pub(crate) fn wake_all(&self) -> Result<()> {
        for region in &self.regions {
            for part in &region.parts {
                let uffd = &self.sources[part.source].uffd;
                uffd.wake(part.address, part.bytes).context(|| what(region))?;
            }
        }
        Ok(())
    }

    fn tell(&self, what: Told, value: u64) {
        if let Some(told) = &self.told {
            told[what as usize].fetch_add(value, SeqCst);
        }
    }

    /// Pages that were asked for have come.
    pub(crate) fn count_demand(&self, pages: u64) {
        Counters::add(&self.counters.pages_demand, pages);
        self.tell(Told::PagesDemand, pages);
    }

    pub(crate) fn bytes(&self, range: PageRange) -> u64 {
        self.region(range.region).byte_offset(range.pages)
    }

    pub(crate) fn total_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.bytes).sum()
    }

    pub(crate) fn region(&self, id: RegionId) -> &GuestRegion {
        &self.regions[usize::from(id.0)]
    }

    /// True when a region has several userfaultfds.
    pub(crate) fn is_sharded(&self) -> bool {
        let is_sharded = |region: &GuestRegion| {
            region.parts.iter().any(|part| part.source != region.parts[0].source)
        };
        self.regions.iter().any(is_sharded)
    }

    /// True when the events of a userfaultfd must be read with its gate closed.
    pub(crate) fn is_gated(&self, source: usize) -> bool {
        self.regions
            .iter()
            .filter(|region| region.kind != Kind::Shared)
            .any(|region| region.parts.iter().any(|part| part.source == source))
    }

    /// The region and the offset in it of an address of the guest's process.
    fn locate(&self, address: u64) -> Option<(usize, u64)> {
        self.regions.iter().enumerate().find_map(|(index, region)| {
            let covers =
                |part: &&Part| (part.address..part.address + part.bytes).contains(&address);
            let part = region.parts.iter().find(covers)?;
            Some((index, part.offset + (address - part.address)))
        })
    }

    /// The page at an address of the guest's process.
    pub(crate) fn find(&self, address: u64) -> Option<PageId> {
        let (index, offset) = self.locate(address)?;
        let region = RegionId(u16::try_from(index).expect("the table has at most 256 regions"));
        Some(PageId { region, page: offset >> self.regions[index].unit_shift })
    }

    /// Missing → Landing, before a byte of the range is received. A page that has come before is
    /// the peer's fault: it would overwrite what the guest has written since.
    pub(crate) fn begin(&self, range: PageRange, lane: &str) -> Result<()> {
        self.region(range.region).pages.begin(range.first, range.pages).map_err(|again| {
            let name = &self.region(range.region).name;
            Error::protocol(lane, format!("page {} of RAM {name} came a second time", again.page))
        })
    }

    /// Anonymous memory: copies what has come of a run into place and marks it cached; the first
    /// `done` bytes have been already. Returns how much is in place now: less than all of it when
    /// events are pending, which have to be read before it can go on.
    pub(crate) fn place(&self, range: PageRange, bytes: &[u8], done: usize) -> Result<usize> {
        let region = self.region(range.region);
        let start = region.byte_offset(range.first);
        let end = start + bytes.len() as u64;
        let mut at = start + done as u64;
        let within = |offset: u64| usize::try_from(offset - start).expect("a buffer's length");
        while at < end {
            let part = region.part_at(at);
            let len = GATE_BYTES_MAX.max(1 << region.unit_shift);
            let to = end.min(part.offset + part.bytes).min(at + len);
            let source = &self.sources[part.source];
            let _gate = source.open_gate();
            let chunk = &bytes[within(at)..within(to)];
            let unit_bytes = 1 << region.unit_shift;
            let first = at >> region.unit_shift;
            for run in runs(chunk, unit_bytes, |unit| region.is_plain(first + unit)) {
                let offset = at + run.start as u64;
                let (first, units) =
                    (offset >> region.unit_shift, (run.bytes.len() / unit_bytes) as u64);
                let placed = if run.is_plain {
                    copy_in(region, part, source, offset, run.bytes)?
                } else {
                    copy_rest(region, part, source, offset, run.bytes)?
                };
                if !placed {
                    return Ok(within(offset));
                }
                region.pages.finish(first, units, |_| Ok::<(), Error>(()))?;
            }
            at = to;
        }
        Ok(bytes.len())
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
        if region.file.is_some() {
            self.finish_in_file(region, range)?;
        } else if kind != RunKind::Data {
            region.pages.finish(range.first, range.pages, |_| Ok::<(), Error>(()))?;
        }
        self.count(region, range, kind);
        region.pages.each_wanted(range.first, range.pages, |page| {
            self.counters.map.was_demanded(range.region.0, page, region.unit_shift, kind);
            wake(PageId { region: range.region, page });
        });
        if region.kind == Kind::Private {
            if kind == RunKind::Data {
                let bytes = region.byte_offset(range.pages);
                let spare = self.spare_bytes.fetch_add(bytes, SeqCst) + bytes;
                self.spare_bytes_max.fetch_max(spare, SeqCst);
            }
            self.touch.get().expect("private memory has its toucher").landed(range, kind);
        } else {
            self.complete(range)?;
        }
        let done = self.counters.pages_done.fetch_add(range.pages, SeqCst) + range.pages;
        Ok(done == self.pages_total)
    }

    /// Discarded pages give back what has landed in the file for them.
    fn finish_in_file(&self, region: &GuestRegion, range: PageRange) -> Result<()> {
        let unit_bytes = 1 << region.unit_shift;
        let discard = |page| region.file().discard(region.byte_offset(page), unit_bytes);
        // The second time for those that were discarded between the first one and the new state.
        region.discard_fragments(range.first, range.pages)?;
        region.pages.finish(range.first, range.pages, discard)?;
        region.discard_fragments(range.first, range.pages)
    }

    /// Every page of the range is the guest's own: a block that is complete leaves its userfaultfd.
    pub(crate) fn complete(&self, range: PageRange) -> Result<()> {
        let region = self.region(range.region);
        let mut left = Ok(());
        region.blocks.complete(range.first, range.pages, |pages| {
            let bytes = region.byte_offset(pages.start)..region.byte_offset(pages.end);
            for (part, address, len) in region.pieces(bytes) {
                let result = self.sources[part.source].uffd.unregister(address, len);
                left = std::mem::replace(&mut left, Ok(())).and(result);
            }
        });
        left.context(|| format!("unregistering RAM {} from userfaultfd", region.name))
    }

    fn count(&self, region: &GuestRegion, range: PageRange, kind: RunKind) {
        let counter = match kind {
            RunKind::Data => &self.counters.data_bytes,
            RunKind::Zero => &self.counters.zero_bytes,
            RunKind::Hole => &self.counters.hole_bytes,
        };
        Counters::add(counter, region.byte_offset(range.pages));
        match kind {
            RunKind::Data => {}
            RunKind::Zero => self.tell(Told::ZeroBytes, region.byte_offset(range.pages)),
            RunKind::Hole => self.tell(Told::HoleBytes, region.byte_offset(range.pages)),
        }
        self.counters.map.count(range, region.unit_shift, kind, false);
    }

    /// The guest side has discarded a range of its addresses: what has not come of it yet is to read
    /// as zeroes when it has, and so is what waits in a private file.
    pub(crate) fn discard(&self, start: u64, end: u64) -> Result<()> {
        for region in &self.regions {
            for part in &region.parts {
                let from = start.max(part.address);
                let to = end.min(part.address + part.bytes);
                if from < to {
                    let offset = part.offset + (from - part.address);
                    region.discard(offset..offset + (to - from));
                    if region.kind == Kind::Private {
                        region.file().discard(offset, to - from)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes a cached page visible to the guest and wakes whoever waits for it. False when events
    /// are pending that have to be read first: try again after that.
    pub(crate) fn mark(&self, id: PageId) -> Result<bool> {
        let region = self.region(id.region);
        debug_assert_eq!(region.pages.get(id.page), PageState::Cached);
        let offset = region.byte_offset(id.page);
        if region.unit_is_page() {
            return self.show(region, offset);
        }
        // Whoever waits faults again, and is shown the one page that it needs.
        let part = region.part_at(offset);
        let address = part.address + (offset - part.offset);
        self.sources[part.source]
            .uffd
            .wake(address, 1 << region.unit_shift)
            .context(|| what(region))?;
        Ok(true)
    }

    /// Somebody waits at an address whose page is cached: it was late, or the page has been discarded
    /// since, or reclaimed. False as for [`mark`](GuestMemory::mark).
    pub(crate) fn show_at(&self, address: u64) -> Result<bool> {
        let Some((index, offset)) = self.locate(address) else { return Ok(true) };
        let region = &self.regions[index];
        self.show(region, offset & !(region.page_bytes() - 1))
    }

    /// One page of the guest's size.
    fn show(&self, region: &GuestRegion, offset: u64) -> Result<bool> {
        let part = region.part_at(offset);
        let uffd = &self.sources[part.source].uffd;
        let (address, len) = (part.address + (offset - part.offset), region.page_bytes());
        // A page of zeroes is in no file yet; a neighbour that lands in the same huge page may
        // allocate it between the two calls, so that the first one works the second time.
        for _ in 0..3 {
            if region.file.is_some() {
                match uffd.map(address, len).context(|| what(region))?.stop {
                    None => return Ok(true),
                    Some(Stop::Again) => return Ok(false),
                    Some(Stop::Already | Stop::Gone) => break,
                    Some(Stop::NotPresent) => {}
                }
            }
            if let Some(file) = region.file.as_ref().filter(|file| file.on_hugetlb) {
                file.allocate_page(offset)?;
                continue;
            }
            match zero(region, uffd, address, len)?.stop {
                None => return Ok(true),
                Some(Stop::Again) => return Ok(false),
                Some(Stop::Gone) => break,
                Some(Stop::Already | Stop::NotPresent) => {}
            }
        }
        // Whoever waits finds the page there, or faults again and asks anew.
        uffd.wake(address, len).context(|| what(region))?;
        Ok(true)
    }

    /// Private memory: makes a range that has come visible, so that it can be touched: data from the
    /// file, the rest as zeroes. Returns how many of its pages are: fewer than all when events are
    /// pending. For the toucher, which is not the one that reads them.
    pub(crate) fn show_private(&self, range: PageRange, kind: RunKind) -> Result<u64> {
        let region = self.region(range.region);
        let mut at = region.byte_offset(range.first);
        let end = at + region.byte_offset(range.pages);
        let done = |at: u64| (at >> region.unit_shift) - range.first;
        while at < end {
            let part = region.part_at(at);
            let source = &self.sources[part.source];
            let to = end.min(part.offset + part.bytes).min(at + GATE_BYTES_MAX);
            let _gate = source.open_gate();
            while at < to {
                let address = part.address + (at - part.offset);
                let mut placed = Placed { bytes: 0, stop: Some(Stop::NotPresent) };
                if kind == RunKind::Data {
                    placed = source.uffd.map(address, to - at).context(|| what(region))?;
                }
                if placed.stop == Some(Stop::NotPresent) {
                    // Page by page where it was to be data: the one that was discarded.
                    let len = if kind == RunKind::Data { region.page_bytes() } else { to - at };
                    placed = zero(region, &source.uffd, address, len)?;
                }
                at += placed.bytes;
                match placed.stop {
                    None => {}
                    Some(Stop::Already | Stop::NotPresent) => at += region.page_bytes(),
                    Some(Stop::Again) => return Ok(done(at)),
                    Some(Stop::Gone) => at = to,
                }
            }
        }
        Ok(range.pages)
    }

    /// Private memory: the file has given back a range that the guest side has touched.
    pub(crate) fn released(&self, range: PageRange) -> Result<()> {
        let bytes = self.region(range.region).byte_offset(range.pages);
        self.spare_bytes.fetch_sub(bytes, SeqCst);
        self.release_bytes.fetch_add(bytes, SeqCst);
        self.complete(range)
    }

    /// The lanes are lost, or there are new ones.
    pub(crate) fn set_lanes_down(&self, down: bool) {
        self.lanes_are_down.store(down, SeqCst);
    }

    pub(crate) fn lanes_are_down(&self) -> bool {
        self.lanes_are_down.load(SeqCst)
    }

    /// What was landing when the lanes were lost is missing again. No operation of theirs may be left.
    /// What has come of it in part goes back, so that it cannot show through if the page comes as a
    /// hole.
    pub(crate) fn roll_back(&self) -> Result<()> {
        for region in &self.regions {
            region.pages.roll_back(|first, pages| match &region.file {
                Some(file) => file.discard(region.byte_offset(first), region.byte_offset(pages)),
                None => Ok(()),
            })?;
        }
        Ok(())
    }

    /// Which pages of a range have come, a bit each, as a have frame has it.
    pub(crate) fn have(&self, range: PageRange) -> impl ExactSizeIterator<Item = u64> + use<'_> {
        let pages = &self.region(range.region).pages;
        let words = u32::try_from(range.pages.div_ceil(64)).expect("a have frame's words");
        (0..words).map(move |word| pages.cached_word(range.first + u64::from(word) * 64))
    }

    /// Calls `ask` with each page that somebody waits for and that has not come.
    pub(crate) fn each_unanswered(&self, mut ask: impl FnMut(RegionId, u64)) {
        for (index, region) in self.regions.iter().enumerate() {
            let id = RegionId(u16::try_from(index).expect("the table has at most 256 regions"));
            region.pages.each_wanted(0, region.bytes >> region.unit_shift, |page| {
                if region.pages.get(page) != PageState::Cached {
                    ask(id, page);
                }
            });
        }
    }

    /// Private memory: may more land in the background?
    pub(crate) fn has_room(&self) -> bool {
        let is_released_on_the_way = self.touch.get().is_some_and(TouchQueue::is_eager);
        !is_released_on_the_way || self.spare_bytes.load(SeqCst) < SPARE_BYTES_MAX
    }

    /// Private memory: who touches what has landed. Called once, before any page lands.
    pub(crate) fn set_toucher(&self, queue: TouchQueue) {
        assert!(self.touch.set(queue).is_ok(), "there is one toucher");
    }

    pub(crate) fn has_private(&self) -> bool {
        self.regions.iter().any(|region| region.kind == Kind::Private)
    }

    /// At the end: the whole guest leaves its userfaultfds.
    pub(crate) fn unregister_all(&self) -> Result<()> {
        for region in &self.regions {
            for part in &region.parts {
                self.sources[part.source]
                    .uffd
                    .unregister(part.address, part.bytes)
                    .context(|| format!("unregistering RAM {}", region.name))?;
            }
        }
        Ok(())
    }

    /// A bulk lane is one of TLS.
    pub(super) fn bring_in_records(&self) {
        self.comes_in_records.store(true, Relaxed);
    }

    /// For the report: how background pages came into place, in words.
    pub(crate) fn how_pages_landed(&self) -> &'static str {
        if self.regions.iter().any(GuestRegion::is_copied) {
            return "none: copied from a buffer";
        }
        let huge = self.regions.iter().filter(|region| region.file().has_huge_pages).count();
        match huge {
            _ if self.comes_in_records.load(Relaxed) => "none: written from a buffer",
            0 => "none: written from a buffer",
            all if all == self.regions.len() => "all: received into guest memory",
            _ => "huge pages: received into guest memory; small pages: written from a buffer",
        }
    }

    pub(crate) fn pages_missing(&self) -> u64 {
        self.pages_total - self.counters.pages_done.load(SeqCst)
    }

    /// Private memory: bytes released so far, and the most that was in the file at a time.
    pub(crate) fn release_totals(&self) -> (u64, u64) {
        (self.release_bytes.load(SeqCst), self.spare_bytes_max.load(SeqCst))
    }
}

impl GuestRegion {
    /// What the file has of pages that have come, from `page` on, and how many are alike: one that it has
    /// not is of zeroes, or the guest's own already, which zeroes do not change.
    fn kind_at(&self, page: u64, end: u64) -> Result<(RunKind, u64)> {
        let data = self.file().next_data(self.byte_offset(page))?;
        let next = data.map_or(end, |offset| (offset >> self.unit_shift).min(end));
        Ok(if next > page { (RunKind::Hole, next - page) } else { (RunKind::Data, 1) })
    }

    /// Nothing of the unit has been discarded.
    fn is_plain(&self, unit: u64) -> bool {
        self.pages.get(unit) == PageState::Landing
            && (self.unit_is_page() || !self.fragments.any_in(unit, 1))
    }

    /// Bytes of the region have been discarded by the guest.
    fn discard(&self, bytes: Range<u64>) {
        let unit_bytes = 1u64 << self.unit_shift;
        let whole = bytes.start.next_multiple_of(unit_bytes)..bytes.end / unit_bytes * unit_bytes;
        if whole.start < whole.end {
            self.pages.discard(
                whole.start >> self.unit_shift,
                (whole.end - whole.start) >> self.unit_shift,
            );
        }
        if self.unit_is_page() {
            return;
        }
        let head = bytes.start..bytes.end.min(whole.start);
        let tail = bytes.start.max(whole.end).max(head.end)..bytes.end;
        for rest in [head, tail] {
            if rest.start < rest.end {
                let unit = rest.start >> self.unit_shift;
                let first = (rest.start - self.byte_offset(unit)) >> self.page_shift;
                self.fragments.add(unit, first, (rest.end - rest.start) >> self.page_shift);
                // What has come already is the kernel's to discard.
                if self.pages.get(unit) == PageState::Cached {
                    self.fragments.take(unit);
                }
            }
        }
    }

    /// Gives back what has landed in the file for discarded parts of units.
    fn discard_fragments(&self, first: u64, units: u64) -> Result<()> {
        if self.unit_is_page() || !self.fragments.any_in(first, units) {
            return Ok(());
        }
        for unit in first..first + units {
            let Some(discarded) = self.fragments.take(unit) else { continue };
            for (page, count) in discarded.runs(true) {
                let offset = self.byte_offset(unit) + (page << self.page_shift);
                self.file().discard(offset, count << self.page_shift)?;
            }
        }
        Ok(())
    }
}

fn what(region: &GuestRegion) -> String {
    format!("placing pages of RAM {}", region.name)
}

/// Zeroes at an address; UFFDIO_ZEROPAGE does not know the pages of hugetlb.
fn zero(region: &GuestRegion, uffd: &Uffd, address: u64, len: u64) -> Result<Placed> {
    if region.page_shift == 12 {
        return uffd.zero(address, len).context(|| what(region));
    }
    let page = usize::try_from(region.page_bytes()).expect("64-bit Linux");
    uffd.copy(address, &ZEROES[..page]).context(|| what(region))
}

/// Copies whole pages to the guest. False when events are pending.
fn copy_in(
    region: &GuestRegion,
    part: &Part,
    source: &FaultSource,
    offset: u64,
    bytes: &[u8],
) -> Result<bool> {
    let page = usize::try_from(region.page_bytes()).expect("64-bit Linux");
    let address = part.address + (offset - part.offset);
    let mut at = 0;
    while at < bytes.len() {
        let placed =
            source.uffd.copy(address + at as u64, &bytes[at..]).context(|| what(region))?;
        at += usize::try_from(placed.bytes).expect("a buffer's length");
        match placed.stop {
            None => {}
            // From an attempt before this one.
            Some(Stop::Already) => {
                source.uffd.wake(address + at as u64, page as u64).context(|| what(region))?;
                at += page;
            }
            Some(Stop::Again) => return Ok(false),
            Some(Stop::Gone) => return Ok(true),
            Some(Stop::NotPresent) => {
                return Err(Error::System {
                    what: what(region),
                    source: std::io::Error::from_raw_os_error(libc::EFAULT),
                });
            }
        }
    }
    Ok(true)
}

/// Copies what has not been discarded of one unit. False when events are pending.
fn copy_rest(
    region: &GuestRegion,
    part: &Part,
    source: &FaultSource,
    offset: u64,
    bytes: &[u8],
) -> Result<bool> {
    let unit = offset >> region.unit_shift;
    if region.pages.get(unit) == PageState::Discarded {
        return Ok(true);
    }
    let Some(discarded) = region.fragments.take(unit) else {
        return copy_in(region, part, source, offset, bytes);
    };
    for (page, count) in discarded.runs(false) {
        let (from, len) = (page << region.page_shift, count << region.page_shift);
        let at = usize::try_from(from).expect("a buffer's length");
        let len = usize::try_from(len).expect("a buffer's length");
        if !copy_in(region, part, source, offset + from, &bytes[at..at + len])? {
            for (page, count) in discarded.runs(true) {
                region.fragments.add(unit, page, count);
            }
            return Ok(false);
        }
    }
    Ok(true)
}

/// Some units of a run, in its buffer.
struct Units<'a> {
    start: usize,
    bytes: &'a [u8],
    is_plain: bool,
}

/// Plain units as long runs, the others one by one.
fn runs(
    bytes: &[u8],
    unit_bytes: usize,
    is_plain: impl Fn(u64) -> bool,
) -> impl Iterator<Item = Units<'_>> {
    let plain_at = move |at: usize| is_plain((at / unit_bytes) as u64);
    let mut end = 0;
    std::iter::from_fn(move || {
        let start = end;
        if start == bytes.len() {
            return None;
        }
        let is_plain = plain_at(start);
        end += unit_bytes;
        while is_plain && end < bytes.len() && plain_at(end) {
            end += unit_bytes;
        }
        Some(Units { start, bytes: &bytes[start..end], is_plain })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_units_are_copied_together() {
        let bytes = [0; 5 * 4096];
        let runs: Vec<_> = runs(&bytes, 4096, |unit| unit != 2)
            .map(|run| (run.start / 4096, run.bytes.len() / 4096, run.is_plain))
            .collect();
        assert_eq!(runs, [(0, 2, true), (2, 1, false), (3, 2, true)]);
    }
}
