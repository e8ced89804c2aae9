//! Medians and spreads over rounds.

use serde::Serialize;

/// The median; for an even number of values the mean of the two middle ones. NaN without values.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len() / 2, sorted.len() % 2) {
        (0, 0) => f64::NAN,
        (middle, 0) => f64::midpoint(sorted[middle - 1], sorted[middle]),
        (middle, _) => sorted[middle],
    }
}

/// None for NaN.
pub(crate) fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

/// One figure over all rounds, with every round's value.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) rounds: Vec<f64>,
}

impl Spread {
    pub(crate) fn of(rounds: Vec<f64>) -> Spread {
        Spread {
            median: median(&rounds),
            min: rounds.iter().copied().fold(f64::NAN, f64::min),
            max: rounds.iter().copied().fold(f64::NAN, f64::max),
            rounds,
        }
    }

    /// This figure over another of the same rounds, round by round, which cancels a slow round.
    pub(crate) fn over(&self, other: &Spread) -> Spread {
        Spread::of(
            self.rounds.iter().zip(&other.rounds).map(|(this, other)| this / other).collect(),
        )
    }
}

/// Latencies, in microseconds.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Distribution {
    pub(crate) count: usize,
    pub(crate) p50_us: f64,
    pub(crate) p90_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    pub(crate) max_us: f64,
    /// Buckets that are not empty, each [`BUCKETS_A_DOUBLING`]th of a doubling wide.
    pub(crate) histogram: Vec<Bucket>,
}

/// Latencies above the bucket before, up to and with `up_to_us`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Bucket {
    pub(crate) up_to_us: f64,
    pub(crate) count: usize,
}

/// Buckets to a doubling: with four each is 19 % wide.
const BUCKETS_A_DOUBLING: f64 = 4.0;

impl Distribution {
    /// Of nanoseconds. Percentiles are measured values; NaN without values.
    pub(crate) fn of(mut nanoseconds: Vec<u64>) -> Distribution {
        nanoseconds.sort_unstable();
        let count = nanoseconds.len();
        let us = |index: usize| nanoseconds.get(index).map_or(f64::NAN, |&ns| ns as f64 / 1e3);
        let at = |quantile: f64| us(((count as f64 * quantile).ceil() as usize).max(1) - 1);
        let mut histogram: Vec<Bucket> = Vec::new();
        for &ns in &nanoseconds {
            let step = (ns.max(1) as f64 / 1e3).log2() * BUCKETS_A_DOUBLING;
            // In hundredths, which is precise enough and shorter.
            let up_to_us = ((step.ceil() / BUCKETS_A_DOUBLING).exp2() * 100.0).ceil() / 100.0;
            match histogram.last_mut() {
                Some(bucket) if bucket.up_to_us >= up_to_us => bucket.count += 1,
                _ => histogram.push(Bucket { up_to_us, count: 1 }),
            }
        }
        Distribution {
            count,
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: at(1.0),
            histogram,
        }
    }

    /// The share of latencies up to each bucket's end.
    pub(crate) fn curve(&self) -> Vec<(f64, f64)> {
        let mut below = 0;
        let points = self.histogram.iter().map(|bucket| {
            below += bucket.count;
            (bucket.up_to_us, below as f64 / self.count as f64)
        });
        points.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_and_even_counts() {
        assert_eq!(median(&[3.0, 1.0, 2.0]).total_cmp(&2.0), std::cmp::Ordering::Equal);
        assert_eq!(median(&[4.0, 1.0]).total_cmp(&2.5), std::cmp::Ordering::Equal);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn spread_has_median_minimum_and_maximum() {
        let spread = Spread::of(vec![2.0, 9.0, 4.0]);
        assert!((spread.min, spread.median, spread.max) == (2.0, 4.0, 9.0));
    }

    #[test]
    fn ratio_is_the_median_of_the_rounds_ratios() {
        // The second round was slow for both; the ratio of the medians would be 1.
        let (this, other) = (Spread::of(vec![1.0, 8.0, 2.0]), Spread::of(vec![2.0, 16.0, 1.0]));
        assert!((this.over(&other).median - 0.5).abs() < 1e-9);
    }

    #[test]
    fn percentiles_are_measured_values() {
        let thousand = Distribution::of((1..=1000).rev().map(|us| us * 1000).collect());
        let Distribution { p50_us, p90_us, p99_us, p999_us, max_us, .. } = thousand;
        assert_eq!([p50_us, p90_us, p99_us, p999_us, max_us], [500.0, 900.0, 990.0, 999.0, 1000.0]);
        let one = Distribution::of(vec![7000]);
        assert_eq!([one.p50_us, one.p999_us, one.max_us], [7.0; 3]);
        assert!(Distribution::of(Vec::new()).p50_us.is_nan());
    }

    #[test]
    fn histogram_counts_every_value_once() {
        let values = Distribution::of(vec![1000, 1000, 1001, 64_000, 65_000]);
        let counts: Vec<usize> = values.histogram.iter().map(|bucket| bucket.count).collect();
        assert_eq!(counts, [2, 1, 1, 1]);
        assert_eq!(values.histogram[2], Bucket { up_to_us: 64.0, count: 1 });
        let curve = values.curve();
        assert!((curve[0].1 - 0.4).abs() < 1e-9 && (curve[3].1 - 1.0).abs() < 1e-9);
    }
}
