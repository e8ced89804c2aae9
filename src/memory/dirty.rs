//! Pages that a running guest writes: the dirty log that marks them, and the map from which the
//! source takes them.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};

use umem_wire::{PageRange, RegionId};

use super::bits::Bits;
use crate::error::Result;

/// Tracks the pages that a running guest writes, by any writer: vCPUs, devices, other threads of
/// its monitor.
///
/// Calls come from one thread, in this order: [`start`](DirtyLog::start) once,
/// [`next`](DirtyLog::next) any number of times, [`finish`](DirtyLog::finish) at most once.
/// Dropping a log ends its tracking, and does not change the guest.
pub(crate) trait DirtyLog: Send {
    /// Begins to track. Every write after its return to a page that is [ready](DirtyMap::is_ready) is marked before
    /// `finish` returns, at the latest. A log that tracks pages one after the other holds back the others
    /// ([`DirtyMap::hold_back`]), and lets them go without another call.
    fn start(&mut self, marks: Arc<DirtyMap>) -> Result<()>;

    /// Returns after a whole pass over the guest: every page written before the call is marked, or counted as
    /// [elsewhere](DirtyMap::set_elsewhere). Returns earlier when marked pages must be sent before the pass can
    /// continue: [`is_in_part`](DirtyLog::is_in_part) is true then, and the next call continues the same pass.
    fn next(&mut self) -> Result<()>;

    /// Whether the last pass is unfinished.
    fn is_in_part(&self) -> bool {
        false
    }

    /// Whether another program had the guest stop before the last pass ended: no pass follows.
    fn has_stopped(&self) -> bool {
        false
    }

    /// The host has stopped the guest: makes the last marks.
    fn finish(&mut self) -> Result<()>;
}

/// Pages of all regions, a bit each: written at the source since they were sent.
///
/// Call [`Bits::take_word`] before reading the page: later writes set the bit again.
pub(crate) struct DirtyMap {
    regions: Box<[Bits]>,
    /// log2 of the bytes of each region's pages.
    shifts: Box<[u8]>,
    /// Regions to whose pages the log may lose writes.
    unlogged: Box<[AtomicBool]>,
    /// Bytes that have been written and are not marked yet.
    elsewhere: AtomicU64,
    /// Of each region: the bytes from its beginning that may be read, as all writes to them are marked.
    ready: Box<[AtomicU64]>,
}

impl DirtyMap {
    /// For regions of this many pages of `1 << shift` bytes.
    pub(crate) fn new(regions: &[(u64, u8)]) -> DirtyMap {
        let bits = regions.iter().map(|&(pages, _)| Bits::new(pages));
        let shifts = regions.iter().map(|&(_, shift)| shift);
        DirtyMap {
            regions: bits.collect(),
            shifts: shifts.collect(),
            unlogged: regions.iter().map(|_| AtomicBool::new(false)).collect(),
            elsewhere: AtomicU64::new(0),
            ready: regions.iter().map(|_| AtomicU64::new(u64::MAX)).collect(),
        }
    }

    /// The log may lose writes to this region. All of its pages count as written until the guest stands still: no pass
    /// sends them, and they remain as a whole. Called before the log has [started](DirtyLog::start).
    pub(crate) fn set_unlogged(&self, id: RegionId) {
        let bits = self.region(id);
        bits.set(0, bits.pages());
        self.unlogged[usize::from(id.0)].store(true, Relaxed);
    }

    /// Whether the log knows all writes to this region.
    pub(crate) fn is_logged(&self, id: RegionId) -> bool {
        !self.unlogged[usize::from(id.0)].load(Relaxed)
    }

    /// No page may be read before [`let_go`](DirtyMap::let_go) releases it.
    pub(crate) fn hold_back(&self) {
        self.ready.iter().for_each(|ready| ready.store(0, Relaxed));
    }

    /// Releases the first `bytes` of a region for reading. Released pages are not held back again.
    pub(crate) fn let_go(&self, id: RegionId, bytes: u64) {
        // A reader of the value sees the marks that were made before.
        self.ready[usize::from(id.0)].fetch_max(bytes, Release);
    }

    /// All pages may be read.
    pub(crate) fn let_all_go(&self) {
        self.ready.iter().for_each(|ready| ready.store(u64::MAX, Release));
    }

    /// Whether the pages of a region before `end`, in landing units, may be read. Call this before taking their bits.
    pub(crate) fn is_ready(&self, id: RegionId, end: u64) -> bool {
        let index = usize::from(id.0);
        end << self.shifts[index] <= self.ready[index].load(Acquire)
    }

    pub(crate) fn region(&self, id: RegionId) -> &Bits {
        &self.regions[usize::from(id.0)]
    }

    /// Marks the pages of a region that these bytes lie in. False if the region has no such bytes.
    #[must_use]
    pub(crate) fn mark_bytes(&self, id: RegionId, offset: u64, len: u64) -> bool {
        let index = usize::from(id.0);
        let (Some(bits), Some(shift)) = (self.regions.get(index), self.shifts.get(index)) else {
            return false;
        };
        let Some(end) = offset.checked_add(len).map(|end| end.div_ceil(1 << shift)) else {
            return false;
        };
        let is_there = end <= bits.pages();
        if is_there && len > 0 {
            let first = offset >> shift;
            self.mark(PageRange { region: id, first, pages: end - first });
        }
        is_there
    }

    /// Marks pages of a region, in landing units.
    pub(crate) fn mark(&self, range: PageRange) {
        self.region(range.region).set(range.first, range.pages);
    }

    /// Marks every page.
    pub(crate) fn mark_all(&self) {
        self.regions.iter().for_each(|bits| bits.set(0, bits.pages()));
    }

    /// Sets the bytes that the guest has written and that the log marks later.
    pub(crate) fn set_elsewhere(&self, bytes: u64) {
        self.elsewhere.store(bytes, Relaxed);
    }

    /// Bytes that the guest has written and that the log marks later.
    pub(crate) fn elsewhere(&self) -> u64 {
        self.elsewhere.load(Relaxed)
    }

    /// Bytes of all dirty pages, including those elsewhere.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> u64 {
        let regions = self.regions.iter().zip(&self.shifts);
        let marked: u64 = regions.map(|(bits, shift)| bits.count() << shift).sum();
        marked + self.elsewhere()
    }
}

/// The first pass that leaves out hot pages, which are pages found dirty in two consecutive passes. The first pass
/// sends every page, so that a dirty page of the second one has been found dirty once.
pub(crate) const LEAVES_OUT_FROM: u32 = 3;

/// The part of the guest's memory that is still to be sent while the guest runs, in bytes of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LeftToSend {
    /// Pages that have been written since they were sent, as far as the dirty log knows.
    pub(crate) dirty_bytes: u64,
    /// Dirty pages that the guest writes in every pass, so that another pass would leave them out.
    pub(crate) hot_bytes: u64,
    /// Dirty pages that the last pass has left out, and that have not been written since.
    pub(crate) cooled_bytes: u64,
    /// Pages of regions that are not sent in any pass, as the log may lose writes to them. They are not in the other
    /// counts.
    pub(crate) unlogged_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marked_bytes_mark_their_units() {
        let map = DirtyMap::new(&[(8, 12), (4, 21)]);
        assert!(map.mark_bytes(RegionId(0), 4095, 2));
        assert!(map.mark_bytes(RegionId(1), (2 << 20) - 1, 1));
        assert!(map.mark_bytes(RegionId(1), 9, 0));
        assert!(!map.mark_bytes(RegionId(0), 7 * 4096, 4097));
        assert!(!map.mark_bytes(RegionId(0), u64::MAX, 2));
        assert!(!map.mark_bytes(RegionId(2), 0, 1));
        map.mark(PageRange { region: RegionId(1), first: 3, pages: 1 });
        assert_eq!(runs(&map, 0), [(0, 2)]);
        assert_eq!(runs(&map, 1), [(0, 1), (3, 1)]);
        assert_eq!(map.bytes(), 2 * 4096 + 2 * (2 << 20));
        map.mark_all();
        assert_eq!(map.bytes(), 8 * 4096 + 4 * (2 << 20));
    }

    #[test]
    fn pages_held_back_are_released_in_order_from_the_beginning() {
        let [first, second] = [RegionId(0), RegionId(1)];
        let map = DirtyMap::new(&[(8, 12), (4, 21)]);
        assert!(map.is_ready(first, 8) && map.is_ready(second, 4));
        map.hold_back();
        assert!(!map.is_ready(first, 1) && !map.is_ready(second, 1));
        map.let_go(first, (3 << 12) + 4095);
        map.let_go(first, 4096);
        map.let_go(second, 2 << 21);
        assert!(map.is_ready(first, 3) && !map.is_ready(first, 4));
        assert!(map.is_ready(second, 2) && !map.is_ready(second, 3));
        map.let_all_go();
        assert!(map.is_ready(first, 8) && map.is_ready(second, 4));
    }

    fn runs(map: &DirtyMap, region: u16) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        let push = |first, pages| {
            runs.push((first, pages));
            Ok::<(), ()>(())
        };
        map.region(RegionId(region)).each_run(true, push).unwrap();
        runs
    }
}
