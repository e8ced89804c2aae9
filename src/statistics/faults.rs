//! Live figures of faults: how many wait, and how long served ones took.
//!
//! Each thread that serves faults writes a [`FaultCounts`] of its own with plain stores; readers
//! add them up.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Buckets an octave: a bucket's upper edge is 19 % above its lower one on average.
const PER_OCTAVE: usize = 4;
/// From 1 µs to 2^32 µs, over an hour; longer latencies count in the last bucket.
const OCTAVES: usize = 32;
const BUCKETS: usize = PER_OCTAVE * OCTAVES;

/// One thread's counts, which only that thread writes.
pub(crate) struct FaultCounts {
    waiting: AtomicU64,
    sum_us: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

impl FaultCounts {
    /// Sets how many faults wait for their pages.
    pub(crate) fn waiting(&self, count: usize) {
        self.waiting.store(count as u64, Relaxed);
    }

    /// Counts a served fault.
    pub(crate) fn served(&self, latency: Duration) {
        let us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX).max(1);
        add(&self.sum_us, us);
        add(&self.buckets[bucket(us)], 1);
    }
}

/// Adds, for the only writer.
fn add(counter: &AtomicU64, value: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(value), Relaxed);
}

/// The counts of all threads.
#[derive(Default)]
pub(crate) struct AllFaults(Mutex<Vec<Arc<FaultCounts>>>);

impl AllFaults {
    /// New counts for a thread that begins to serve faults.
    pub(crate) fn join(&self) -> Arc<FaultCounts> {
        let counts = Arc::new(FaultCounts {
            waiting: AtomicU64::new(0),
            sum_us: AtomicU64::new(0),
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
        });
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(counts.clone());
        counts
    }

    /// The current figures.
    pub(crate) fn look(&self) -> FaultView {
        let mut view = FaultView { waiting: 0, sum_us: 0, buckets: [0; BUCKETS] };
        for counts in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            view.waiting += counts.waiting.load(Relaxed);
            view.sum_us += counts.sum_us.load(Relaxed);
            for (sum, bucket) in view.buckets.iter_mut().zip(&counts.buckets) {
                *sum += bucket.load(Relaxed);
            }
        }
        view
    }

    /// How many faults wait.
    pub(crate) fn waiting(&self) -> u64 {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.iter().map(|counts| counts.waiting.load(Relaxed)).sum()
    }

    /// The sum of all served latencies, µs: changes with each served fault.
    pub(crate) fn sum_us(&self) -> u64 {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.iter().fold(0, |sum, counts| sum.wrapping_add(counts.sum_us.load(Relaxed)))
    }
}

/// The figures of [`AllFaults::look`].
pub(crate) struct FaultView {
    pub(crate) waiting: u64,
    /// Sum of all latencies, µs.
    pub(crate) sum_us: u64,
    buckets: [u64; BUCKETS],
}

impl FaultView {
    pub(crate) fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The faults below each power of two, µs: (2, …), (4, …) …; one bucket of a Prometheus
    /// histogram each.
    pub(crate) fn octaves(&self) -> impl Iterator<Item = (u64, u64)> {
        self.buckets.chunks(PER_OCTAVE).enumerate().scan(0, |below, (octave, buckets)| {
            *below += buckets.iter().sum::<u64>();
            Some((2 << octave, *below))
        })
    }

    /// The buckets from the first to the last that are not empty: lower and upper edge, µs, and
    /// count.
    pub(crate) fn buckets(&self) -> Vec<(f64, f64, u64)> {
        let holds = |&index: &usize| self.buckets[index] > 0;
        let (Some(first), Some(last)) = ((0..BUCKETS).find(holds), (0..BUCKETS).rev().find(holds))
        else {
            return Vec::new();
        };
        (first..=last).map(|index| (edge(index), edge(index + 1), self.buckets[index])).collect()
    }
}

/// The bucket of a latency of 1 µs or more.
fn bucket(us: u64) -> usize {
    let octave = us.ilog2() as usize;
    // The two bits below the highest; zeroes for small numbers.
    let quarter = ((us << 2) >> octave) as usize & (PER_OCTAVE - 1);
    (octave * PER_OCTAVE + quarter).min(BUCKETS - 1)
}

/// The lower edge of a bucket, µs.
fn edge(bucket: usize) -> f64 {
    let quarter = (bucket % PER_OCTAVE) as f64 / PER_OCTAVE as f64;
    (1.0 + quarter) * 2_f64.powi(i32::try_from(bucket / PER_OCTAVE).expect("a few octaves"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latency_lies_between_the_edges_of_its_bucket() {
        for us in (1..5000).chain([65_535, 65_536, 1 << 31]) {
            let bucket = bucket(us);
            assert!(edge(bucket) <= us as f64 && (us as f64) < edge(bucket + 1), "{us} µs");
        }
        assert_eq!(bucket(u64::MAX >> 2), BUCKETS - 1);
    }

    #[test]
    fn look_sums_the_counts_of_all_threads() {
        let faults = AllFaults::default();
        let (one, other) = (faults.join(), faults.join());
        one.waiting(3);
        other.waiting(4);
        one.served(Duration::from_micros(100));
        other.served(Duration::from_micros(100));
        other.served(Duration::from_micros(500));
        let view = faults.look();
        assert_eq!((view.waiting, view.sum_us, view.count()), (7, 700, 3));
        let octaves: Vec<_> = view.octaves().collect();
        assert_eq!(octaves[5..9], [(64, 0), (128, 2), (256, 2), (512, 3)]);
        let buckets = view.buckets();
        assert_eq!(buckets.first(), Some(&(96.0, 112.0, 2)));
        assert_eq!(buckets.last(), Some(&(448.0, 512.0, 1)));
    }
}
