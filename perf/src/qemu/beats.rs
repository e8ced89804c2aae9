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
}

/// The guest's usual work that was not done, in seconds: unlike a percentile it does not fall when a mover goes on for
/// long after the guest has the pages it needs. NaN for a guest that does nothing.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Lost {
    /// From the guest's last beat at the source on: while it stood still, and afterwards.
    pub(super) since_stop_s: f64,
    /// From the move's beginning on.
    pub(super) in_all_s: f64,
}

impl Latency {
    /// The latencies of the beats at the destination.
    pub(super) fn of(beats: &[Beat]) -> Latency {
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
        }
    }
}

/// The guest's usual rate is that of so many beats.
const USUAL_BEATS: usize = 20;

impl Lost {
    /// Of a guest that printed `before` until the move began, in all these beats `at_source`, and these at its
    /// destination. The usual rate is that of the last two seconds before the move.
    pub(super) fn of(before: &[Beat], at_source: &[Beat], at_destination: &[Beat]) -> Lost {
        let usual = &before[before.len().saturating_sub(USUAL_BEATS)..];
        let lost_s = |from: Option<&Beat>| {
            let (first, began) = (usual.first()?, usual.last()?);
            let (from, last) = (from?, at_destination.last()?);
            let reads_a_ms = began.reads_since(first) / began.ms_since(first);
            let lost_ms = last.ms_since(from) - last.reads_since(from) / reads_a_ms;
            lost_ms.is_finite().then_some(lost_ms / 1e3)
        };
        Lost {
            since_stop_s: lost_s(at_source.last()).unwrap_or(f64::NAN),
            in_all_s: lost_s(usual.last()).unwrap_or(f64::NAN),
        }
    }
}

impl Beat {
    fn reads_since(&self, other: &Beat) -> f64 {
        self.reads.saturating_sub(other.reads) as f64
    }

    fn ms_since(&self, other: &Beat) -> f64 {
        self.ms.saturating_sub(other.ms) as f64
    }
}

/// The guest's answer when it has checked all of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Checked {
    pub(super) pages: u64,
    /// Wrong words since the guest began.
    pub(super) bad: u64,
}

/// The beats on a console so far.
pub(super) fn beats_in(console: &Path) -> Vec<Beat> {
    whole_lines(console).lines().filter_map(parse).collect()
}

/// The guest's last answer on a console.
pub(super) fn checked_in(console: &Path) -> Option<Checked> {
    whole_lines(console).lines().rev().find_map(parse_checked)
}

/// A console's text without an incomplete last line.
fn whole_lines(console: &Path) -> String {
    let text = std::fs::read(console).unwrap_or_default();
    let mut text = String::from_utf8_lossy(&text).into_owned();
    text.truncate(text.rfind('\n').unwrap_or(0));
    text
}

/// A number of a line.
fn number(fields: &str, name: &str) -> Option<u64> {
    let mut fields = fields.split_whitespace().filter_map(|field| field.split_once('='));
    fields.find(|(key, _)| *key == name)?.1.parse().ok()
}

fn parse_checked(line: &str) -> Option<Checked> {
    let (_, fields) = line.split_once("umem-guest checked ")?;
    Some(Checked { pages: number(fields, "pages")?, bad: number(fields, "bad")? })
}

fn parse(line: &str) -> Option<Beat> {
    let (_, fields) = line.split_once("umem-guest ")?;
    let number = |name: &str| number(fields, name);
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
    fn answer_to_a_check_parses_and_beats_do_not() {
        let checked = parse_checked("umem-guest checked pages=256 bad=3");
        assert_eq!(checked, Some(Checked { pages: 256, bad: 3 }));
        assert_eq!(parse_checked(LINE), None);
        assert_eq!(parse("umem-guest checked pages=256 bad=3"), None);
    }

    #[test]
    fn latency_of_beats_is_their_median_and_worst() {
        let beat = |p99_us, max_us| Beat { p99_us, max_us, ..parse(LINE).unwrap() };
        let latency = Latency::of(&[beat(10, 20), beat(30, 900), beat(20, 30)]);
        assert!((latency.p50_us, latency.p99_us, latency.max_us) == (3.0, 20.0, 900.0));
        assert!(latency.p99_worst_us.total_cmp(&30.0).is_eq());
        assert!(Latency::of(&[]).max_us.is_nan());
    }

    #[test]
    fn work_lost_is_measured_against_the_rate_before_the_move() {
        let beat = |reads, ms| Beat { reads, ms, ..parse(LINE).unwrap() };
        let before = [beat(0, 0), beat(1000, 1000)];
        // A second at half the usual rate at the source, then one at a quarter, and one at the usual rate.
        let at_source = [before[0].clone(), before[1].clone(), beat(1500, 2000)];
        let lost = Lost::of(&before, &at_source, &[beat(1750, 3000), beat(2750, 4000)]);
        assert!(lost.since_stop_s.total_cmp(&0.75).is_eq(), "{lost:?}");
        assert!(lost.in_all_s.total_cmp(&1.25).is_eq(), "{lost:?}");
        // An idle guest, and one that has printed nothing.
        let idle = Lost::of(&[beat(0, 0), beat(0, 1000)], &[beat(0, 1000)], &[beat(0, 2000)]);
        assert!(idle.since_stop_s.is_nan() && idle.in_all_s.is_nan());
        assert!(Lost::of(&before, &at_source, &[]).since_stop_s.is_nan());
    }
}
