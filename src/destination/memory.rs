//! The guest's memory at the destination, shared by the threads that fill it.
//!
//! The order of steps for any run of pages, in every thread: [`begin`](GuestMemory::begin) before its first byte,
//! [`place`](GuestMemory::place) for bytes in a buffer, [`finish`](GuestMemory::finish) after its last byte, and
//! [`mark`](GuestMemory::mark) for each page that a vCPU waits for. Such a page may instead be
//! [given](GuestMemory::give), which does all of that except the counting in
//! [`finish_given`](GuestMemory::finish_given).
//!
//! Differences between the kinds of memory:
//!
//! | | shared | private | anonymous |
//! |---|---|---|---|
//! | a page lands | in the file | in the file | in a buffer |
//! | the guest sees it by | UFFDIO_COPY or UFFDIO_CONTINUE when a vCPU waits, else when its block leaves | UFFDIO_CONTINUE | UFFDIO_COPY |
//! | a page of zeroes | stays a hole | UFFDIO_ZEROPAGE | nothing, until a vCPU waits |
//! | its block leaves the userfaultfd with its last page | cached | released ([`touch`]) | cached |
//!
//! **Discards.** The guest's process may discard pages at any time (balloon, MADV_DONTNEED). The kernel reports a
//! discard, waits until the report has been read, and then removes the pages. So a thread reads reports with the *gate*
//! of their userfaultfd closed, and applies them to the page states before it opens the gate. A thread that makes pages
//! visible, or cached, holds the gate open. So a page either becomes visible before its discard is read, and the kernel
//! removes it, or its discard is known. The thread that reads the reports needs no gate for pages that it makes visible
//! itself ([`mark`](GuestMemory::mark), [`give`](GuestMemory::give)).

#[cfg(test)]
pub(super) mod fixture;
mod gate;
mod giving;
mod placing;
mod region;
mod rounds;
mod takeover;
pub(in crate::destination) mod touch;

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use umem_wire::{PageRange, RegionId};

use crate::error::{Context, Error, Result};
use crate::fault::uffd::Stop;
use crate::memory::claims::RunKind;
use crate::memory::pages::PageState;
use crate::memory::sums::Digests;
use crate::memory::words::AtomicWords;
use crate::statistics::Counters;
use std::time::Duration;
use touch::TouchQueue;

pub(crate) use gate::FaultSource;
pub(crate) use region::{GuestRegion, Part, RegionSetup};
use rounds::Rounds;
pub(crate) use rounds::check as check_rounds;
use takeover::SharedCounter;

/// Delay before a page that could not be made visible because of pending events is tried again; further events end the
/// delay early.
pub(crate) const RETRY_INTERVAL: Duration = Duration::from_micros(200);

/// The same delay for want of memory: memory must be freed first.
pub(crate) const SHORTAGE_INTERVAL: Duration = Duration::from_millis(100);

/// Private memory: the limit of bytes that have landed in the file and are not released. Bulk lanes pause above it, so
/// that the guest's memory is never in this machine twice; demanded pages continue.
pub(crate) const SPARE_BYTES_MAX: u64 = 64 << 20;

/// The largest page size that can be copied in: a page waits whole in a buffer.
pub(crate) const COPIED_PAGE_BYTES_MAX: u64 = 2 << 20;

/// All regions, in the order of the source's table, so that region ids on the wire are indices.
pub(crate) struct GuestMemory {
    pub(crate) regions: Vec<GuestRegion>,
    pub(crate) sources: Vec<FaultSource>,
    pub(crate) counters: Arc<Counters>,
    /// With checksums: the sums of all landed pages.
    pub(crate) digests: Digests,
    /// Private memory: bytes that have landed and are not released, and their maximum.
    spare_bytes: AtomicU64,
    spare_bytes_max: AtomicU64,
    release_bytes: AtomicU64,
    /// Private memory: the thread that maps, touches and releases landed pages.
    touch: OnceLock<TouchQueue>,
    /// The lanes are lost: threads stop waiting for their receives.
    lanes_are_down: AtomicBool,
    /// Bulk lanes carry TLS records, from which no page is received in place.
    comes_in_records: AtomicBool,
    unmapped_bytes: AtomicU64,
    /// Why received pages cannot be made visible for want of memory, until it has been reported.
    shortage: Mutex<Option<String>>,
    /// Pages arrive in rounds while the source's guest runs, before each arrives once.
    rounds: Option<Rounds>,
    /// For a takeover: the record of cached pages, for the next process's report ([`SharedCounter`]).
    told: Option<AtomicWords>,
    pages_total: u64,
}

/// A page, packed for another ring's completion queue.
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
        let pages_total = regions.iter().map(|region| region.bytes >> region.unit_shift()).sum();
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
            unmapped_bytes: AtomicU64::new(0),
            shortage: Mutex::new(None),
            rounds: None,
            told: None,
            pages_total,
        }
    }

    /// The memory belongs to process `pid`. Without this call it belongs to this process.
    pub(crate) fn belongs_to(&mut self, pid: u32) {
        self.sources.iter_mut().for_each(|source| source.belongs_to(pid));
    }

    /// Demanded pages have arrived.
    pub(crate) fn count_demand(&self, pages: u64) {
        Counters::add(&self.counters.pages_demand, pages);
        self.tell(SharedCounter::PagesDemand, pages);
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

    /// The region and offset of an address of the guest's process.
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
        Some(PageId { region, page: offset >> self.regions[index].unit_shift() })
    }

    /// Missing → Landing, before a byte of the range is received. A page that has arrived before is a protocol
    /// violation: it would overwrite later writes of the guest.
    pub(crate) fn begin(&self, range: PageRange, lane: &str) -> Result<()> {
        self.region(range.region).pages.begin(range.first, range.pages).map_err(|again| {
            let name = &self.region(range.region).name;
            Error::protocol(lane, format!("page {} of RAM {name} came a second time", again.page))
        })
    }

    /// Landing → Cached, after the last byte. Calls `wake` with each page of the range that a vCPU waits for;
    /// unregisters complete blocks. True if this was the guest's last page.
    pub(crate) fn finish(
        &self,
        range: PageRange,
        kind: RunKind,
        wake: impl FnMut(PageId),
    ) -> Result<bool> {
        let region = self.region(range.region);
        if region.memory.kind.lands_in_file() {
            self.finish_in_file(region, range)?;
        } else if kind != RunKind::Data {
            region.pages.finish(range.first, range.pages, |_| Ok::<(), Error>(()))?;
        }
        self.finished(range, kind, wake)
    }

    /// As `finish` for a page that was [given](GuestMemory::give): the page is Cached, and no vCPU waits for it.
    pub(crate) fn finish_given(&self, range: PageRange) -> Result<bool> {
        assert!(range.pages == 1, "of {range:?} one page was given");
        self.finished(range, RunKind::Data, |_| {})
    }

    fn finished(
        &self,
        range: PageRange,
        kind: RunKind,
        mut wake: impl FnMut(PageId),
    ) -> Result<bool> {
        let region = self.region(range.region);
        self.count(region, range, kind);
        region.pages.each_wanted(range.first, range.pages, |page| {
            self.counters.map.was_demanded(range.region.0, page, region.unit_shift(), kind);
            wake(PageId { region: range.region, page });
        });
        if region.memory.kind.needs_touch() {
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

    /// Discarded pages free the bytes that have landed in the file for them.
    fn finish_in_file(&self, region: &GuestRegion, range: PageRange) -> Result<()> {
        let start = region.byte_offset(range.first);
        for (part, address, len) in region.pieces(start..start + region.byte_offset(range.pages)) {
            let first = (part.offset + (address - part.address)) >> region.unit_shift();
            let pages = len >> region.unit_shift();
            let _gate = self.sources[part.source].open_gate();
            region.finish_in_file(first, pages)?;
        }
        Ok(())
    }

    /// Every page of the range is mapped in the guest's process: a complete block leaves its userfaultfd.
    pub(crate) fn complete(&self, range: PageRange) -> Result<()> {
        let region = self.region(range.region);
        let mut left = Ok(());
        region.blocks.complete(range.first, range.pages, |pages| {
            let bytes = region.byte_offset(pages.start)..region.byte_offset(pages.end);
            for (part, address, len) in region.pieces(bytes) {
                let result = self.sources[part.source].uffd.unregister(address, len);
                left = std::mem::replace(&mut left, Ok(())).and(result.map(drop));
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
            RunKind::Zero => self.tell(SharedCounter::ZeroBytes, region.byte_offset(range.pages)),
            RunKind::Hole => self.tell(SharedCounter::HoleBytes, region.byte_offset(range.pages)),
        }
        self.counters.map.count(range, region.unit_shift(), kind, false);
    }

    /// The guest's process has discarded a range of its addresses: missing pages of it, and pages that wait in a
    /// private file, will read as zeroes.
    pub(crate) fn discard(&self, start: u64, end: u64) -> Result<()> {
        for region in &self.regions {
            for part in &region.parts {
                let from = start.max(part.address);
                let to = end.min(part.address + part.bytes);
                if from < to {
                    let offset = part.offset + (from - part.address);
                    region.discard(offset..offset + (to - from));
                    if region.memory.kind.keeps_discarded() {
                        region.file().discard(offset, to - from)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The guest's process has unmapped a range, as a monitor does with an unplugged DIMM: the missing pages of it are
    /// received and discarded.
    pub(crate) fn unmapped(&self, start: u64, end: u64) -> Result<()> {
        let parts = self.regions.iter().flat_map(|region| &region.parts);
        let overlap = |part: &Part| {
            end.min(part.address + part.bytes).saturating_sub(start.max(part.address))
        };
        self.unmapped_bytes.fetch_add(parts.map(overlap).sum(), SeqCst);
        self.discard(start, end)
    }

    /// Bytes of guest memory that the process has unmapped during the move.
    pub(crate) fn unmapped_bytes(&self) -> u64 {
        self.unmapped_bytes.load(SeqCst)
    }

    /// Whether the guest's process was found gone; later pages were not placed.
    pub(crate) fn is_gone(&self) -> bool {
        self.sources.iter().any(|source| source.uffd.is_gone())
    }

    /// Whether the process ended before it got a page that counts as cached.
    pub(crate) fn has_missed(&self) -> bool {
        self.sources.iter().any(|source| source.uffd.has_missed())
    }

    /// Private memory: the file has freed a range that the guest's process has touched.
    pub(crate) fn released(&self, range: PageRange) -> Result<()> {
        let bytes = self.region(range.region).byte_offset(range.pages);
        self.spare_bytes.fetch_sub(bytes, SeqCst);
        self.release_bytes.fetch_add(bytes, SeqCst);
        self.complete(range)
    }

    /// The lanes are lost, or new lanes are open.
    pub(crate) fn set_lanes_down(&self, down: bool) {
        self.lanes_are_down.store(down, SeqCst);
    }

    pub(crate) fn lanes_are_down(&self) -> bool {
        self.lanes_are_down.load(SeqCst)
    }

    /// A received page cannot be made visible for want of memory; it is tried again.
    pub(crate) fn cannot_show(&self, why: &str) {
        let mut shortage = self.shortage.lock().unwrap_or_else(PoisonError::into_inner);
        shortage.get_or_insert_with(|| why.to_owned());
    }

    /// The reason, once for all attempts since the last call.
    pub(crate) fn take_shortage(&self) -> Option<String> {
        self.shortage.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Upper bound of the bytes that are still to arrive.
    pub(crate) fn bytes_missing(&self) -> u64 {
        let totals = self.counters.totals();
        let done = totals.data_bytes + totals.zero_bytes + totals.hole_bytes;
        self.total_bytes().saturating_sub(done)
    }

    /// The RAM file whose file system has the least free bytes, with that number, if the missing pages may not fit.
    pub(crate) fn least_room(&self) -> Option<(&str, u64)> {
        let files = self.regions.iter().filter_map(|region| region.file.as_ref());
        let free = files.filter_map(|file| Some((file.name.as_str(), file.free_bytes().ok()??)));
        free.min_by_key(|&(_, free)| free).filter(|&(_, free)| free < self.bytes_missing())
    }

    /// Landing pages of lost lanes become Missing again. No operation of those lanes may be in flight. Bytes of
    /// partially received pages are freed, so that they cannot show through if the page arrives as a hole.
    pub(crate) fn roll_back(&self) -> Result<()> {
        for region in &self.regions {
            region.pages.roll_back(|first, pages| match &region.file {
                Some(file) => file.discard(region.byte_offset(first), region.byte_offset(pages)),
                None => Ok(()),
            })?;
        }
        Ok(())
    }

    /// A bit for each page of a range: whether it has arrived, as in a have frame.
    pub(crate) fn have(&self, range: PageRange) -> impl ExactSizeIterator<Item = u64> + use<'_> {
        let pages = &self.region(range.region).pages;
        let words = u32::try_from(range.pages.div_ceil(64)).expect("a have frame's words");
        (0..words).map(move |word| pages.cached_word(range.first + u64::from(word) * 64))
    }

    /// Calls `ask` with each missing page that a vCPU waits for.
    pub(crate) fn each_unanswered(&self, mut ask: impl FnMut(RegionId, u64)) {
        for (index, region) in self.regions.iter().enumerate() {
            let id = RegionId(u16::try_from(index).expect("the table has at most 256 regions"));
            region.pages.each_wanted(0, region.bytes >> region.unit_shift(), |page| {
                if region.pages.get(page) != PageState::Cached {
                    ask(id, page);
                }
            });
        }
    }

    /// Private memory: whether more pages may land in the background.
    pub(crate) fn has_room(&self) -> bool {
        let is_released_on_the_way = self.touch.get().is_some_and(TouchQueue::is_eager);
        !is_released_on_the_way || self.spare_bytes.load(SeqCst) < SPARE_BYTES_MAX
    }

    /// Private memory: the queue of the touch thread. Called once, before any page lands.
    pub(crate) fn set_toucher(&self, queue: TouchQueue) {
        assert!(self.touch.set(queue).is_ok(), "there is one toucher");
    }

    pub(crate) fn needs_touch(&self) -> bool {
        self.regions.iter().any(|region| region.memory.kind.needs_touch())
    }

    /// At the end: unregisters the whole guest, and counts the parts that are no longer mapped.
    pub(crate) fn unregister_all(&self) -> Result<()> {
        let mut unmapped = 0;
        for region in &self.regions {
            for part in &region.parts {
                unmapped += self.sources[part.source]
                    .uffd
                    .unregister(part.address, part.bytes)
                    .context(|| format!("unregistering RAM {}", region.name))?;
            }
        }
        self.unmapped_bytes.fetch_max(unmapped, SeqCst);
        Ok(())
    }

    /// Whether the guest's process no longer maps the address of an incomplete page: userfaultfd calls do not find the
    /// address.
    pub(crate) fn is_unmapped(&self, page: PageId) -> Result<bool> {
        let region = self.region(page.region);
        let (start, bytes) = (region.byte_offset(page.page), region.byte_offset(1));
        for (part, address, len) in region.pieces(start..start + bytes) {
            let uffd = &self.sources[part.source].uffd;
            for at in (address..address + len).step_by(1 << region.page_shift()) {
                let mapped = uffd.map(at, region.page_bytes());
                if mapped.map_err(|error| failed(region, error))?.stop != Some(Stop::Gone) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// A bulk lane carries TLS.
    pub(super) fn bring_in_records(&self) {
        self.comes_in_records.store(true, Relaxed);
    }

    /// For the report: how background pages were placed.
    pub(crate) fn how_pages_landed(&self) -> &'static str {
        if self.regions.iter().any(|region| region.memory.is_copied_in()) {
            return "none: copied from a buffer";
        }
        let huge = self.regions.iter().filter(|region| region.memory.is_received_into()).count();
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

    /// Private memory: bytes released so far, and the maximum in the file at a time.
    pub(crate) fn release_totals(&self) -> (u64, u64) {
        (self.release_bytes.load(SeqCst), self.spare_bytes_max.load(SeqCst))
    }
}

/// The error of placing pages: possibly only want of memory, of the guest's process or of the file.
fn failed(region: &GuestRegion, error: std::io::Error) -> Error {
    Error::of_memory(what(region), error)
}

fn what(region: &GuestRegion) -> String {
    format!("placing pages of RAM {}", region.name)
}
