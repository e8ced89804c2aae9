//! Latencies of the guest's faults, in total and by stage.
//!
//! The stages of a fault: umem *reads* it from its userfaultfd, *requests* its page, the page *arrives*, and the vCPU
//! is *continued*: the page is made visible and waiting threads are woken. Faults of pages that were already in flight
//! need no request and have no stages.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use umem_wire::RegionId;

use crate::destination::memory::PageId;
use crate::statistics::{Completed, FaultStages, Latency, Stage, latency_histogram, record};

/// Two significant digits distinguish stages; they cost 4 KiB for each power of two that occurs.
const STAGE_DIGITS: u8 = 2;

/// The longest stage that is recorded exactly: a minute, ns.
const STAGE_MAX_NS: u64 = 60_000_000_000;

/// Latencies of answered faults.
pub(crate) struct Latencies {
    whole_us: Histogram<u64>,
    read_to_asked_ns: Histogram<u64>,
    asked_to_arrived_ns: Histogram<u64>,
    arrived_to_continued_ns: Histogram<u64>,
}

impl Latencies {
    pub(crate) fn new() -> Latencies {
        Latencies {
            whole_us: latency_histogram(),
            read_to_asked_ns: stage(),
            asked_to_arrived_ns: stage(),
            arrived_to_continued_ns: stage(),
        }
    }

    /// Adds the latencies of another thread.
    pub(crate) fn add(&mut self, other: &Latencies) {
        // All histograms have the same range, so none is refused.
        let _ = self.whole_us.add(&other.whole_us);
        let _ = self.read_to_asked_ns.add(&other.read_to_asked_ns);
        let _ = self.asked_to_arrived_ns.add(&other.asked_to_arrived_ns);
        let _ = self.arrived_to_continued_ns.add(&other.arrived_to_continued_ns);
    }

    /// Writes the latencies into a report.
    pub(crate) fn tell(&self, report: &mut Completed) {
        report.fault_latency_us = Some(Latency::of(&self.whole_us));
        report.fault_stages_us = Some(FaultStages {
            read_to_asked: Stage::of(&self.read_to_asked_ns),
            asked_to_arrived: Stage::of(&self.asked_to_arrived_ns),
            arrived_to_continued: Stage::of(&self.arrived_to_continued_ns),
        });
    }
}

fn stage() -> Histogram<u64> {
    Histogram::new_with_bounds(1, STAGE_MAX_NS, STAGE_DIGITS).expect("constant bounds are valid")
}

fn record_stage(histogram: &mut Histogram<u64>, from: Instant, to: Instant) {
    let ns = to.saturating_duration_since(from).as_nanos();
    histogram.saturating_record(u64::try_from(ns).unwrap_or(u64::MAX).max(1));
}

/// Times of the faults of one page that a vCPU waits for.
struct Stamps {
    read: Instant,
    asked: Option<Instant>,
    arrived: Option<Instant>,
}

/// The pages that the guests of a thread wait for, and their latencies so far.
pub(crate) struct Waiting {
    pages: HashMap<PageId, Stamps>,
    latencies: Latencies,
}

impl Waiting {
    pub(crate) fn new() -> Waiting {
        Waiting { pages: HashMap::with_capacity(1024), latencies: Latencies::new() }
    }

    /// Number of pages that a vCPU waits for.
    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    /// A fault has been read; the longest wait for a page counts.
    pub(crate) fn read(&mut self, page: PageId, at: Instant) {
        self.pages.entry(page).or_insert(Stamps { read: at, asked: None, arrived: None });
    }

    /// These pages are requested now.
    pub(crate) fn asked(&mut self, pages: &[(RegionId, u64)]) {
        if pages.is_empty() {
            return;
        }
        let now = Instant::now();
        for &(region, page) in pages {
            if let Some(stamps) = self.pages.get_mut(&PageId { region, page }) {
                stamps.asked = Some(now);
            }
        }
    }

    /// The page has arrived.
    pub(crate) fn arrived(&mut self, page: PageId, at: Instant) {
        if let Some(stamps) = self.pages.get_mut(&page)
            && stamps.asked.is_some()
        {
            stamps.arrived.get_or_insert(at);
        }
    }

    /// The waiting threads continue; returns the latency if a thread waited.
    pub(crate) fn continued(&mut self, page: PageId) -> Option<Duration> {
        let stamps = self.pages.remove(&page)?;
        let now = Instant::now();
        let whole = now.saturating_duration_since(stamps.read);
        record(&mut self.latencies.whole_us, whole);
        if let (Some(asked), Some(arrived)) = (stamps.asked, stamps.arrived) {
            record_stage(&mut self.latencies.read_to_asked_ns, stamps.read, asked);
            record_stage(&mut self.latencies.asked_to_arrived_ns, asked, arrived);
            record_stage(&mut self.latencies.arrived_to_continued_ns, arrived, now);
        }
        Some(whole)
    }

    pub(crate) fn into_latencies(self) -> Latencies {
        self.latencies
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(page: u64) -> PageId {
        PageId { region: RegionId(0), page }
    }

    #[test]
    fn fault_stages_add_up_to_the_total_latency() {
        let mut waiting = Waiting::new();
        let read = Instant::now().checked_sub(Duration::from_millis(5)).unwrap();
        waiting.read(page(1), read);
        // A second vCPU that waits for the same page.
        waiting.read(page(1), Instant::now());
        waiting.asked(&[(RegionId(0), 1), (RegionId(0), 7)]);
        waiting.arrived(page(1), Instant::now());
        let whole = waiting.continued(page(1)).unwrap();
        assert!(whole >= Duration::from_millis(5), "{whole:?}");
        assert_eq!((waiting.len(), waiting.continued(page(1))), (0, None));

        let latencies = waiting.into_latencies();
        let stages = [
            &latencies.read_to_asked_ns,
            &latencies.asked_to_arrived_ns,
            &latencies.arrived_to_continued_ns,
        ];
        assert_eq!(stages.map(Histogram::len), [1; 3]);
        let sum: u64 = stages.iter().map(|stage| stage.max()).sum();
        // Two significant digits each.
        let ns = whole.as_nanos() as f64;
        assert!((sum as f64 - ns).abs() <= ns / 50.0, "{sum} of {ns}");
        assert!(latencies.read_to_asked_ns.max() >= 5_000_000);
    }

    #[test]
    fn page_without_a_request_has_no_stages() {
        let mut waiting = Waiting::new();
        waiting.read(page(1), Instant::now());
        waiting.arrived(page(1), Instant::now());
        assert!(waiting.continued(page(1)).is_some());
        let latencies = waiting.into_latencies();
        assert_eq!(latencies.whole_us.len(), 1);
        assert_eq!(latencies.asked_to_arrived_ns.len(), 0);
    }
}
