//! The guest's report of its accesses: a line about every 100 ms (tests/guest describes it).

use std::path::Path;

use serde::Serialize;

use crate::statistics::median;

/// One line: latencies of the accesses since the line before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Beat {
    beat: u64,
    /// Page reads since the guest began.
    reads: u64,
    /// Wrong words since the guest began.
    pub(super) bad: u64,
    p50_us: u64,
    p99_us: u64,
    max_us: u64,
    /// The guest's clock.
    ms: u64,
}

/// Latencies of several beats.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Latency {
    /// Median of the beats' medians.
    pub(super) p50_us: f64,
    /// Median of the beats' 99th percentiles.
    pub(super) p99_us: f64,
    /// The largest of the beats' 99th percentiles.
    pub(super) p99_worst_us: f64,
    /// The largest of all.
    pub(super) max_us: f64,
    /// The guest's usual work that was not done during the move, in seconds: unlike a percentile it
    /// does not fall when a mover goes on for long after the guest has the pages it needs. NaN for
    /// a guest that does nothing.
    pub(super) work_lost_s: f64,
}

impl Latency {
    /// The latencies of the beats during the move; `before` are those at the source.
    pub(super) fn of(before: &[Beat], beats: &[Beat]) -> Latency {
        // A beat without accesses reports zero, which is no latency.
        let read = beats.iter().filter(|beat| beat.max_us > 0);
        let values = |get: fn(&Beat) -> u64| -> Vec<f64> {
            read.clone().map(|beat| get(beat) as f64).collect()
        };
        Latency {
            p50_us: median(&values(|beat| beat.p50_us)),
            p99_us: median(&values(|beat| beat.p99_us)),
            p99_worst_us: values(|beat| beat.p99_us).into_iter().fold(f64::NAN, f64::max),
            max_us: values(|beat| beat.max_us).into_iter().fold(f64::NAN, f64::max),
            work_lost_s: work_lost_s(before, beats),
        }
    }
}

/// The usual rate is that of the last second at the source.
fn work_lost_s(before: &[Beat], beats: &[Beat]) -> f64 {
    let usual = &before[before.len().saturating_sub(10)..];
    let (Some(first), Some(stopped)) = (usual.first(), usual.last()) else { return f64::NAN };
    let Some(last) = beats.last() else { return f64::NAN };
    let reads_a_ms = stopped.reads_since(first) / stopped.ms_since(first);
    let lost_ms = last.ms_since(stopped) - last.reads_since(stopped) / reads_a_ms;
    if lost_ms.is_finite() { lost_ms / 1e3 } else { f64::NAN }
}

impl Beat {
    fn reads_since(&self, other: &Beat) -> f64 {
        self.reads.saturating_sub(other.reads) as f64
    }

    fn ms_since(&self, other: &Beat) -> f64 {
        self.ms.saturating_sub(other.ms) as f64
    }
}

/// The beats on a console so far, without an incomplete last line.
pub(super) fn beats_in(console: &Path) -> Vec<Beat> {
    let text = std::fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().filter_map(parse).collect()
}

fn parse(line: &str) -> Option<Beat> {
    let (_, fields) = line.split_once("umem-guest ")?;
    let number = |name: &str| {
        let mut fields = fields.split_whitespace().filter_map(|field| field.split_once('='));
        fields.find(|(key, _)| *key == name)?.1.parse().ok()
    };
    Some(Beat {
        beat: number("beat")?,
        reads: number("reads")?,
        bad: number("bad")?,
        p50_us: number("p50_us")?,
        p99_us: number("p99_us")?,
        max_us: number("max_us")?,
        ms: number("ms")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "umem-guest beat=7 reads=8123 writes=0 bad=0 pass=1 max_us=812 p50_us=3 \
                        p99_us=96 ms=700";

    #[test]
    fn only_beat_lines_parse_as_beats() {
        let beat = parse(LINE).unwrap();
        assert_eq!((beat.beat, beat.max_us, beat.p99_us, beat.ms), (7, 812, 96, 700));
        assert_eq!(parse("umem-guest ready mib=256"), None);
        assert_eq!(parse("umem-guest beat=7 reads=81"), None);
    }

    #[test]
    fn latency_of_beats_is_their_median_and_worst() {
        let beat = |p99_us, max_us| Beat { p99_us, max_us, ..parse(LINE).unwrap() };
        let latency = Latency::of(&[], &[beat(10, 20), beat(30, 900), beat(20, 30)]);
        assert!((latency.p50_us, latency.p99_us, latency.max_us) == (3.0, 20.0, 900.0));
        assert!(latency.p99_worst_us.total_cmp(&30.0).is_eq());
        assert!(Latency::of(&[], &[]).max_us.is_nan());
    }

    #[test]
    fn work_lost_is_measured_against_the_usual_rate() {
        let beat = |reads, ms| Beat { reads, ms, ..parse(LINE).unwrap() };
        let before = [beat(0, 0), beat(1000, 1000)];
        // A second at half the usual rate, then a second at the usual one.
        let beats = [beat(1500, 2000), beat(2500, 3000)];
        assert!(work_lost_s(&before, &beats).total_cmp(&0.5).is_eq());
        // An idle guest.
        assert!(work_lost_s(&[beat(0, 0), beat(0, 1000)], &[beat(0, 2000)]).is_nan());
    }
}
