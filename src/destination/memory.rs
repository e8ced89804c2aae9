//! The guest's memory at the destination, shared by the threads that fill it.
//!
//! The order of steps for any run of pages, whoever receives it: [`begin`](GuestMemory::begin) before
//! its first byte, [`place`](GuestMemory::place) for bytes that wait in a buffer,
//! [`finish`](GuestMemory::finish) after its last, and [`mark`](GuestMemory::mark) for each page that
//! a vCPU waits for. A page that a vCPU waits for may be [given](GuestMemory::give) instead, which is all of that
//! but for what [`finish_given`](GuestMemory::finish_given) counts.
//!
//! What the kinds of memory differ in:
//!
//! | | shared | private | anonymous |
//! |---|---|---|---|
//! | a page lands | in the file | in the file | in a buffer |
//! | the guest sees it by | UFFDIO_COPY or UFFDIO_CONTINUE when a vCPU waits, else when its block leaves | UFFDIO_CONTINUE | UFFDIO_COPY |
//! | a page of zeroes | stays a hole | UFFDIO_ZEROPAGE | nothing, until a vCPU waits |
//! | its block leaves the userfaultfd with its last page | cached | released ([`touch`]) | cached |
//!
//! **Discards.** The guest side may discard pages at any time (balloon, MADV_DONTNEED). The kernel
//! reports that, waits until the report has been read, and then removes the pages. So the reports are read with
//! the *gate* of their userfaultfd closed, and are carried out in the page states before it opens; who makes pages
//! visible, or cached, holds it open. A page is then either so before its report is read, and the kernel removes
//! it, or known to be discarded. The thread that reads the reports needs no gate for what it makes visible itself
//! ([`mark`](GuestMemory::mark), [`give`](GuestMemory::give)).

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
use takeover::Told;

/// A page that could not be made visible because events were pending is tried again after the next
/// events, or after this long.
pub(crate) const RETRY_INTERVAL: Duration = Duration::from_micros(200);

/// The same where there is no memory to make it visible with: somebody has to make room first.
pub(crate) const SHORTAGE_INTERVAL: Duration = Duration::from_millis(100);

/// Private memory: what has landed in the file and is not released yet. Bulk lanes pause above this,
/// so that the guest's memory is never twice in this machine; demanded pages go on.
pub(crate) const SPARE_BYTES_MAX: u64 = 64 << 20;

/// The largest pages that can be copied in: they wait whole in a buffer.
pub(crate) const COPIED_PAGE_BYTES_MAX: u64 = 2 << 20;

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
    unmapped_bytes: AtomicU64,
    /// Why pages that have come cannot be made visible for want of memory, until somebody has heard of it.
    shortage: Mutex<Option<String>>,
    /// Pages come while the source's guest runs, before they come once.
    rounds: Option<Rounds>,
    /// Where another process may have to go on: what has come, for its report ([`Told`]).
    told: Option<AtomicWords>,
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

    /// The memory is the process `pid`'s. Without this it is this process's.
    pub(crate) fn belongs_to(&mut self, pid: u32) {
        self.sources.iter_mut().for_each(|source| source.belongs_to(pid));
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
        Some(PageId { region, page: offset >> self.regions[index].unit_shift() })
    }

    /// Missing → Landing, before a byte of the range is received. A page that has come before is
    /// the peer's fault: it would overwrite what the guest has written since.
    pub(crate) fn begin(&self, range: PageRange, lane: &str) -> Result<()> {
        self.region(range.region).pages.begin(range.first, range.pages).map_err(|again| {
            let name = &self.region(range.region).name;
            Error::protocol(lane, format!("page {} of RAM {name} came a second time", again.page))
        })
    }

    /// Landing → Cached, after the last byte. Calls `wake` with each page of the range that a vCPU
    /// waits for; unregisters what is complete. True when this was the last page of all.
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

    /// The same for what has been [given](GuestMemory::give): it is Cached, and nobody waits for it any more.
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

    /// Discarded pages give back what has landed in the file for them.
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

    /// Every page of the range is the guest's own: a block that is complete leaves its userfaultfd.
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
            RunKind::Zero => self.tell(Told::ZeroBytes, region.byte_offset(range.pages)),
            RunKind::Hole => self.tell(Told::HoleBytes, region.byte_offset(range.pages)),
        }
        self.counters.map.count(range, region.unit_shift(), kind, false);
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
                    if region.memory.kind.keeps_discarded() {
                        region.file().discard(offset, to - from)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The guest side has unmapped a range, as a monitor does with a DIMM that is unplugged: what is still to come of
    /// it is received and thrown away.
    pub(crate) fn unmapped(&self, start: u64, end: u64) -> Result<()> {
        let parts = self.regions.iter().flat_map(|region| &region.parts);
        let overlap = |part: &Part| {
            end.min(part.address + part.bytes).saturating_sub(start.max(part.address))
        };
        self.unmapped_bytes.fetch_add(parts.map(overlap).sum(), SeqCst);
        self.discard(start, end)
    }

    /// Bytes of the guest's memory that its side has unmapped meanwhile.
    pub(crate) fn unmapped_bytes(&self) -> u64 {
        self.unmapped_bytes.load(SeqCst)
    }

    /// Whether the guest's process has been found gone: what has come since then came to nothing.
    pub(crate) fn is_gone(&self) -> bool {
        self.sources.iter().any(|source| source.uffd.is_gone())
    }

    /// Whether it has ended without a page that counts as cached.
    pub(crate) fn has_missed(&self) -> bool {
        self.sources.iter().any(|source| source.uffd.has_missed())
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

    /// A page that has come cannot be made visible for want of memory; it is tried again.
    pub(crate) fn cannot_show(&self, why: &str) {
        let mut shortage = self.shortage.lock().unwrap_or_else(PoisonError::into_inner);
        shortage.get_or_insert_with(|| why.to_owned());
    }

    /// Why that was so, once for all that has been tried since the last call.
    pub(crate) fn take_shortage(&self) -> Option<String> {
        self.shortage.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Up to so many bytes are still to come.
    pub(crate) fn bytes_missing(&self) -> u64 {
        let totals = self.counters.totals();
        let done = totals.data_bytes + totals.zero_bytes + totals.hole_bytes;
        self.total_bytes().saturating_sub(done)
    }

    /// The RAM file whose file system has the least room, if what is to come may not fit, and its bytes.
    pub(crate) fn least_room(&self) -> Option<(&str, u64)> {
        let files = self.regions.iter().filter_map(|region| region.file.as_ref());
        let free = files.filter_map(|file| Some((file.name.as_str(), file.free_bytes().ok()??)));
        free.min_by_key(|&(_, free)| free).filter(|&(_, free)| free < self.bytes_missing())
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
            region.pages.each_wanted(0, region.bytes >> region.unit_shift(), |page| {
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

    pub(crate) fn needs_touch(&self) -> bool {
        self.regions.iter().any(|region| region.memory.kind.needs_touch())
    }

    /// At the end: the whole guest leaves its userfaultfds, and what of it is not mapped any more shows.
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

    /// Whether the guest side maps nothing any more at an address of a page that is not complete: no call of the
    /// userfaultfd finds it there.
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

    /// A bulk lane is one of TLS.
    pub(super) fn bring_in_records(&self) {
        self.comes_in_records.store(true, Relaxed);
    }

    /// For the report: how background pages came into place, in words.
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

    /// Private memory: bytes released so far, and the most that was in the file at a time.
    pub(crate) fn release_totals(&self) -> (u64, u64) {
        (self.release_bytes.load(SeqCst), self.spare_bytes_max.load(SeqCst))
    }
}

/// Why pages could not be put in place: perhaps only for want of memory, the guest side's own or its file's.
fn failed(region: &GuestRegion, error: std::io::Error) -> Error {
    Error::of_memory(what(region), error)
}

fn what(region: &GuestRegion) -> String {
    format!("placing pages of RAM {}", region.name)
}
