//! Counters of the threads that move pages.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::faults::AllFaults;
use super::map::Map;

/// Counters that worker threads update and the control thread reads.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) data_bytes: AtomicU64,
    pub(crate) zero_bytes: AtomicU64,
    pub(crate) hole_bytes: AtomicU64,
    pub(crate) pages_demand: AtomicU64,
    pub(crate) pages_background: AtomicU64,
    /// Pages that are done: cached at the destination, sent at the source.
    pub(crate) pages_done: AtomicU64,
    /// Bytes that zero-copy sends sent without a copy, and bytes that the kernel copied.
    pub(crate) zero_copied_bytes: AtomicU64,
    pub(crate) copied_bytes: AtomicU64,
    /// Bytes of page contents that were moved while the guest ran, counted each time.
    pub(crate) rounds_bytes: AtomicU64,
    /// The part of [`data_bytes`](Counters::data_bytes) whose last copy was moved while the guest
    /// ran.
    pub(crate) settled_bytes: AtomicU64,
    /// Bytes of pages of any kind that were moved while the guest ran, each time they were.
    pub(crate) rounds_page_bytes: AtomicU64,
    /// Of [`done_bytes`](Counters::done_bytes): those whose last copy was moved while the guest ran.
    pub(crate) settled_page_bytes: AtomicU64,
    /// At the destination: bytes of the device state received.
    pub(crate) state_bytes: AtomicU64,
    /// Of [`moved_bytes`](Counters::moved_bytes): those that an earlier process of the session moved. They are no part
    /// of any rate of this process.
    pub(crate) earlier_bytes: AtomicU64,
    /// The part of these with contents.
    pub(crate) earlier_data_bytes: AtomicU64,
    /// Received data with a wrong checksum.
    pub(crate) checksum_errors: AtomicU64,
    /// The origin of each part of the guest's memory.
    pub(crate) map: Map,
    /// At the destination: faults.
    pub(crate) faults: AllFaults,
}

impl Counters {
    /// For a guest with regions of these sizes, bytes.
    pub(crate) fn of(regions: impl Iterator<Item = u64>) -> Counters {
        Counters { map: Map::new(regions), ..Counters::default() }
    }

    /// Bytes of the guest's memory that are done.
    pub(crate) fn done_bytes(&self) -> u64 {
        self.totals().bytes()
    }

    /// Bytes of page contents that crossed the wire, counted each time, if `data_bytes` of the
    /// guest's memory are data.
    pub(crate) fn crossed_bytes(&self, data_bytes: u64) -> u64 {
        let once = data_bytes.saturating_sub(self.settled_bytes.load(Relaxed));
        once.saturating_add(self.rounds_bytes.load(Relaxed))
    }

    /// Bytes of pages of any kind that have been moved, each time they were.
    pub(crate) fn moved_bytes(&self) -> u64 {
        let once = self.done_bytes().saturating_sub(self.settled_page_bytes.load(Relaxed));
        once.saturating_add(self.rounds_page_bytes.load(Relaxed))
    }

    /// Of [`moved_bytes`](Counters::moved_bytes): those that this process has moved.
    pub(crate) fn moved_here_bytes(&self) -> u64 {
        self.moved_bytes().saturating_sub(self.earlier_bytes.load(Relaxed))
    }

    /// Of [`crossed_bytes`](Counters::crossed_bytes): those that crossed in this process's time.
    pub(crate) fn crossed_here_bytes(&self, data_bytes: u64) -> u64 {
        self.crossed_bytes(data_bytes).saturating_sub(self.earlier_data_bytes.load(Relaxed))
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

    /// Sets the totals that the other side, or the earlier processes of this side, have counted. What these count and
    /// this process did not, an earlier process moved.
    pub(crate) fn set(&self, totals: &umem_wire::Totals) {
        let before = self.totals();
        // First, so that no rate has these bytes in between.
        let more = totals.bytes().saturating_sub(before.bytes());
        Counters::add(&self.earlier_bytes, more);
        let more = totals.data_bytes.saturating_sub(before.data_bytes);
        Counters::add(&self.earlier_data_bytes, more);
        self.data_bytes.store(totals.data_bytes, Relaxed);
        self.zero_bytes.store(totals.zero_bytes, Relaxed);
        self.hole_bytes.store(totals.hole_bytes, Relaxed);
        self.pages_demand.store(totals.pages_demand, Relaxed);
        self.pages_background.store(totals.pages_background, Relaxed);
        self.pages_done.store(totals.pages(), Relaxed);
    }

    /// How the pages were sent, in words.
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

    /// A peer may send any counts.
    #[test]
    fn totals_of_a_peer_saturate_when_summed() {
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
        counters.set(&umem_wire::Totals { data_bytes: u64::MAX, ..counters.totals() });
        assert_eq!(counters.moved_here_bytes(), 0);
    }

    #[test]
    fn bytes_of_an_earlier_process_are_done_and_not_moved_here() {
        let counters = Counters::of([1 << 20].into_iter());
        let told = umem_wire::Totals {
            data_bytes: 3 << 16,
            zero_bytes: 1 << 16,
            ..umem_wire::Totals::default()
        };
        counters.set(&told);
        assert_eq!((counters.done_bytes(), counters.moved_here_bytes()), (1 << 18, 0));
        Counters::add(&counters.data_bytes, 1 << 12);
        assert_eq!(counters.moved_here_bytes(), 1 << 12);
        assert_eq!(counters.crossed_here_bytes(counters.totals().data_bytes), 1 << 12);
    }
}
