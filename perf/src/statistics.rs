//! Medians and spreads over rounds.

use serde::Serialize;

/// The median; of an even number of values the mean of the two in the middle. NaN of none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len() / 2, sorted.len() % 2) {
        (0, 0) => f64::NAN,
        (middle, 0) => f64::midpoint(sorted[middle - 1], sorted[middle]),
        (middle, _) => sorted[middle],
    }
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]).total_cmp(&2.0), std::cmp::Ordering::Equal);
        assert_eq!(median(&[4.0, 1.0]).total_cmp(&2.5), std::cmp::Ordering::Equal);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_spread_keeps_its_ends() {
        let spread = Spread::of(vec![2.0, 9.0, 4.0]);
        assert!((spread.min, spread.median, spread.max) == (2.0, 4.0, 9.0));
    }
}
