//! Distributions of latencies.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// A latency distribution in microseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Latency {
    /// Faults measured.
    pub count: u64,
    /// Median.
    pub p50: u64,
    /// 90th percentile.
    pub p90: u64,
    /// 99th percentile.
    pub p99: u64,
    /// 99.9th percentile.
    pub p999: u64,
    /// Worst.
    pub max: u64,
}

impl Latency {
    pub(crate) fn of(histogram: &Histogram<u64>) -> Latency {
        Latency {
            count: histogram.len(),
            p50: histogram.value_at_quantile(0.5),
            p90: histogram.value_at_quantile(0.9),
            p99: histogram.value_at_quantile(0.99),
            p999: histogram.value_at_quantile(0.999),
            max: histogram.max(),
        }
    }
}

/// The stages of a fault's time at the destination.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct FaultStages {
    /// From reading the fault until its request has been handed to the kernel; for a guest in
    /// shards: until the demand thread has the request.
    pub read_to_asked: Stage,
    /// From then until the page has come: the network and the source.
    pub asked_to_arrived: Stage,
    /// From then until the page is visible and its waiters have been woken.
    pub arrived_to_continued: Stage,
}

impl FaultStages {
    /// The stages in order, with their names.
    pub fn each(&self) -> [(&'static str, &Stage); 3] {
        [
            ("read → asked", &self.read_to_asked),
            ("asked → arrived", &self.asked_to_arrived),
            ("arrived → continued", &self.arrived_to_continued),
        ]
    }
}

/// One stage's distribution in microseconds, to two digits.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Stage {
    /// Faults measured.
    pub count: u64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Worst.
    pub max: f64,
}

impl Stage {
    /// The distribution of a histogram of nanoseconds.
    pub(crate) fn of(histogram_ns: &Histogram<u64>) -> Stage {
        let us = |ns: u64| ns as f64 / 1e3;
        Stage {
            count: histogram_ns.len(),
            p50: us(histogram_ns.value_at_quantile(0.5)),
            p90: us(histogram_ns.value_at_quantile(0.9)),
            p99: us(histogram_ns.value_at_quantile(0.99)),
            max: us(histogram_ns.max()),
        }
    }
}

/// A histogram of microseconds up to an hour, three significant digits.
pub(crate) fn latency_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("constant bounds are valid")
}

/// Records a latency; one beyond the histogram's range counts as its maximum.
pub(crate) fn record(histogram: &mut Histogram<u64>, latency: Duration) {
    histogram.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX).max(1));
}
