//! A small histogram that threads record into without a lock: exact below 16 µs, then eight buckets
//! for each power of two.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

const LINEAR: u64 = 16;
const SUB_BUCKETS: u64 = 8;
/// Up to 2^36 µs, nineteen hours; longer times count as that.
const BUCKETS: usize = (LINEAR + (36 - 4) * SUB_BUCKETS) as usize;

pub(crate) struct Latencies {
    buckets: [AtomicU32; BUCKETS],
    max_us: AtomicU64,
}

pub(crate) struct Summary {
    pub(crate) max_us: u64,
    pub(crate) p50_us: u64,
    pub(crate) p99_us: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Latencies { buckets: [const { AtomicU32::new(0) }; BUCKETS], max_us: AtomicU64::new(0) }
    }
}

impl Latencies {
    pub(crate) fn record(&self, latency: Duration) {
        let us = latency.as_micros() as u64;
        self.buckets[bucket_of(us)].fetch_add(1, Relaxed);
        self.max_us.fetch_max(us, Relaxed);
    }

    /// Summarises the latencies since the last call, and resets.
    pub(crate) fn take(&self) -> Summary {
        let counts: Vec<u64> =
            self.buckets.iter().map(|bucket| u64::from(bucket.swap(0, Relaxed))).collect();
        let max_us = self.max_us.swap(0, Relaxed);
        let total: u64 = counts.iter().sum();
        let percentile = |percent: u64| {
            let rank = (total * percent).div_ceil(100).max(1);
            let mut seen = 0;
            let reached = counts.iter().position(|count| {
                seen += count;
                seen >= rank
            });
            reached.map_or(0, upper_end).min(max_us)
        };
        Summary { max_us, p50_us: percentile(50), p99_us: percentile(99) }
    }
}

fn bucket_of(us: u64) -> usize {
    if us < LINEAR {
        return us as usize;
    }
    let exponent = u64::from(us.ilog2());
    let sub_bucket = (us >> (exponent - 3)) - SUB_BUCKETS;
    ((LINEAR + (exponent - 4) * SUB_BUCKETS + sub_bucket) as usize).min(BUCKETS - 1)
}

/// The largest value, in microseconds, that falls into the bucket.
fn upper_end(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < LINEAR {
        return bucket;
    }
    let exponent = (bucket - LINEAR) / SUB_BUCKETS + 4;
    let sub_bucket = (bucket - LINEAR) % SUB_BUCKETS;
    ((SUB_BUCKETS + sub_bucket + 1) << (exponent - 3)) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_meet_without_gaps() {
        for us in 0..100_000 {
            let bucket = bucket_of(us);
            assert!(us <= upper_end(bucket), "{us}");
            assert!(bucket == 0 || us > upper_end(bucket - 1), "{us}");
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_of_a_known_distribution() {
        let latencies = Latencies::default();
        for us in 1..=100 {
            latencies.record(Duration::from_micros(us));
        }
        let summary = latencies.take();
        assert_eq!(summary.max_us, 100);
        assert!((50..=56).contains(&summary.p50_us), "{}", summary.p50_us);
        assert!((99..=100).contains(&summary.p99_us), "{}", summary.p99_us);
        assert_eq!(latencies.take().max_us, 0);
    }
}
