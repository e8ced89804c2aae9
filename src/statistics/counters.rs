//! What the threads that move pages count.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::faults::AllFaults;
use super::map::Map;

/// Counters that worker threads keep and the control thread reads.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) data_bytes: AtomicU64,
    pub(crate) zero_bytes: AtomicU64,
    pub(crate) hole_bytes: AtomicU64,
    pub(crate) pages_demand: AtomicU64,
    pub(crate) pages_background: AtomicU64,
    /// Pages that are where they belong: cached at the destination, sent at the source.
    pub(crate) pages_done: AtomicU64,
    /// Bytes that zero-copy sends put on the wire without copying, and with.
    pub(crate) zero_copied_bytes: AtomicU64,
    pub(crate) copied_bytes: AtomicU64,
    /// Bytes of page contents that were moved while the guest ran, each time they were.
    pub(crate) rounds_bytes: AtomicU64,
    /// Of [`data_bytes`](Counters::data_bytes): those whose last copy was moved while the guest ran.
    pub(crate) settled_bytes: AtomicU64,
    /// Bytes of pages of any kind that were moved while the guest ran, each time they were.
    pub(crate) rounds_page_bytes: AtomicU64,
    /// Of [`done_bytes`](Counters::done_bytes): those whose last copy was moved while the guest ran.
    pub(crate) settled_page_bytes: AtomicU64,
    /// At the destination: of the device state, as it comes.
    pub(crate) state_bytes: AtomicU64,
    /// What came and was not what had been sent, where there are checksums.
    pub(crate) checksum_errors: AtomicU64,
    /// How each part of the guest's memory came.
    pub(crate) map: Map,
    /// At the destination.
    pub(crate) faults: AllFaults,
}

impl Counters {
    /// For a guest with regions of these sizes, bytes.
    pub(crate) fn of(regions: impl Iterator<Item = u64>) -> Counters {
        Counters { map: Map::new(regions), ..Counters::default() }
    }

    /// Bytes of the guest that are where they belong.
    pub(crate) fn done_bytes(&self) -> u64 {
        self.totals().bytes()
    }

    /// Bytes of page contents that crossed the wire, each time they did, where so many of the guest's pages are data.
    pub(crate) fn crossed_bytes(&self, data_bytes: u64) -> u64 {
        let once = data_bytes.saturating_sub(self.settled_bytes.load(Relaxed));
        once.saturating_add(self.rounds_bytes.load(Relaxed))
    }

    /// Bytes of pages of any kind that have been moved, each time they were.
    pub(crate) fn moved_bytes(&self) -> u64 {
        let once = self.done_bytes().saturating_sub(self.settled_page_bytes.load(Relaxed));
        once.saturating_add(self.rounds_page_bytes.load(Relaxed))
    }

    pub(crate) fn add(counter: &AtomicU64, value: u64) {
        counter.fetch_add(value, Relaxed);
    }

    pub(crate) fn totals(&self) -> umem_wire::Totals {
        umem_wire::Totals {
            data_bytes: self.data_bytes.load(Relaxed),
            zero_bytes: self.zero_bytes.load(Relaxed),
            hole_bytes: self.hole_bytes.load(Relaxed),
            pages_demand: self.pages_demand.load(Relaxed),
            pages_background: self.pages_background.load(Relaxed),
        }
    }

    /// What has been moved in all, as the other side counts it.
    pub(crate) fn set(&self, totals: &umem_wire::Totals) {
        self.data_bytes.store(totals.data_bytes, Relaxed);
        self.zero_bytes.store(totals.zero_bytes, Relaxed);
        self.hole_bytes.store(totals.hole_bytes, Relaxed);
        self.pages_demand.store(totals.pages_demand, Relaxed);
        self.pages_background.store(totals.pages_background, Relaxed);
        self.pages_done.store(totals.pages(), Relaxed);
    }

    /// How the pages left this process, in words.
    pub(crate) fn zero_copy(&self) -> String {
        let (zero_copied, copied) =
            (self.zero_copied_bytes.load(Relaxed), self.copied_bytes.load(Relaxed));
        match (zero_copied, copied) {
            (0, _) => "none: copied by the kernel".into(),
            (_, 0) => "all".into(),
            _ => format!("{:.0} %", 100.0 * zero_copied as f64 / (zero_copied + copied) as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The other side counts what it likes.
    #[test]
    fn totals_of_a_peer_are_summed_without_overflow() {
        let counters = Counters::of([1 << 20].into_iter());
        counters.set(&umem_wire::Totals {
            data_bytes: u64::MAX,
            zero_bytes: u64::MAX,
            hole_bytes: 1,
            pages_demand: u64::MAX,
            pages_background: 1,
        });
        assert_eq!(counters.done_bytes(), u64::MAX);
        assert_eq!(counters.totals().pages(), u64::MAX);
        assert_eq!(counters.pages_done.load(Relaxed), u64::MAX);
    }
}
