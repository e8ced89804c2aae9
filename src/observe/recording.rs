//! What a report is made of: one side's migration, as numbers over time.

use serde::{Deserialize, Serialize};

use crate::statistics::map::{Came, Map};
use crate::statistics::{Completed, Counters};

/// Samples that are kept: when there are more, every other one goes and half as many come.
const SAMPLES_MAX: usize = 1024;

/// Phases that are kept: a migration has a dozen, and some more each time its link is lost.
const SPANS_MAX: usize = 1000;

/// One side of a migration. `--report FILE.json` writes it; `--report FILE.html` shows it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Recording {
    /// umem's version.
    pub version: String,
    /// `source` or `destination`.
    pub role: String,
    /// When the recording began, milliseconds since 1970. All other times count from there, in seconds.
    pub began_unix_ms: u64,
    /// How long it lasted, seconds.
    pub seconds: f64,
    /// The guest's RAM, bytes.
    pub total_bytes: u64,
    /// Counters as time went on, in the order of time.
    pub samples: Vec<Sample>,
    /// The protocol's phases, one behind the other.
    pub phases: Vec<Span>,
    /// How the guest's memory came, in the order of its addresses.
    pub map: MapRecord,
    /// Fault latencies at the destination: lower and upper edge in µs, and how many lay between.
    pub faults: Vec<(f64, f64, u64)>,
    /// How often all connections were lost after the switchover.
    #[serde(default)]
    pub connection_losses: u32,
    /// How long there were none then, seconds.
    #[serde(default)]
    pub disconnected_s: f64,
    /// The report in numbers, if the migration came to its end.
    pub completed: Option<Completed>,
    /// Why it did not.
    pub error: Option<String>,
}

/// Counters at a time, all from the beginning on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Seconds.
    pub at_s: f64,
    /// Bytes that moved as page contents.
    pub data_bytes: u64,
    /// Bytes of pages of zeroes.
    pub zero_bytes: u64,
    /// Bytes of pages that the source did not have.
    pub hole_bytes: u64,
    /// Bytes that moved as page contents, each time they did: also while the guest ran at the source.
    #[serde(default)]
    pub crossed_data_bytes: u64,
    /// Bytes of pages of any kind that moved, each time they did.
    #[serde(default)]
    pub crossed_bytes: u64,
    /// Pages that were asked for.
    pub pages_demand: u64,
    /// Faults that wait for their pages at this moment.
    pub faults_waiting: u64,
}

/// A phase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// As in messages.
    pub name: String,
    /// When it began, seconds.
    pub begin_s: f64,
    /// When it ended, seconds.
    pub end_s: f64,
}

/// The guest's memory in cells of the same size.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct MapRecord {
    /// Bytes of a cell; the last one may be shorter.
    pub cell_bytes: u64,
    /// One an element.
    pub cells: Vec<CellRecord>,
}

/// A part of the guest's memory. Pages here are of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CellRecord {
    /// Pages that somebody waited for.
    pub demand: u32,
    /// Pages that nobody waited for, with contents.
    pub background: u32,
    /// The same, of zeroes.
    pub zero: u32,
    /// The same, that the source did not have.
    pub hole: u32,
    /// When its last page had come, seconds; none if some have not.
    pub complete_s: Option<f64>,
}

/// Takes samples, within bounds whatever happens.
pub(super) struct Recorder {
    samples: Vec<Sample>,
    /// Seconds between samples.
    interval_s: f64,
    /// When each cell was seen complete.
    complete_s: Vec<Option<f64>>,
    pub(super) spans: Vec<Span>,
}

impl Recorder {
    pub(super) fn new(interval_s: f64) -> Recorder {
        Recorder { samples: Vec::new(), interval_s, complete_s: Vec::new(), spans: Vec::new() }
    }

    pub(super) fn interval_s(&self) -> f64 {
        self.interval_s
    }

    pub(super) fn span(&mut self, span: Span) {
        if self.spans.len() < SPANS_MAX {
            self.spans.push(span);
        }
    }

    /// Whether it is time for the next sample.
    pub(super) fn is_due(&self, at_s: f64) -> bool {
        // A wake that is a little early must not double the interval.
        self.samples.last().is_none_or(|last| at_s - last.at_s >= 0.9 * self.interval_s)
    }

    pub(super) fn sample(&mut self, sample: Sample, map: &Map) {
        if self.samples.len() == SAMPLES_MAX {
            let mut index = 0;
            self.samples.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            self.interval_s *= 2.0;
        }
        self.samples.push(sample);
        self.complete_s.resize(map.cells().len(), None);
        for (index, (complete, came)) in self.complete_s.iter_mut().zip(map.cells()).enumerate() {
            if complete.is_none() && came.pages() >= map.cell_pages(index) {
                *complete = Some(sample.at_s);
            }
        }
    }

    /// Adds to a recording what was seen.
    pub(super) fn give(&self, recording: &mut Recording, counters: &Counters) {
        let record = |(came, &complete_s): (Came, &Option<f64>)| CellRecord {
            demand: came.demand,
            background: came.background,
            zero: came.zero,
            hole: came.hole,
            complete_s,
        };
        recording.samples.clone_from(&self.samples);
        recording.phases.clone_from(&self.spans);
        recording.faults = counters.faults.look().buckets();
        recording.map = MapRecord {
            cell_bytes: counters.map.cell_bytes(),
            cells: counters.map.cells().zip(&self.complete_s).map(record).collect(),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_recording_keeps_its_size_and_its_whole_length() {
        let mut recorder = Recorder::new(0.01);
        let mut taken = 0;
        for step in 0..1_000_000_u32 {
            let at_s = f64::from(step) * 0.01;
            if recorder.is_due(at_s) {
                recorder.sample(Sample { at_s, ..Sample::default() }, &Map::default());
                taken += 1;
            }
        }
        assert!(taken < 20 * SAMPLES_MAX, "{taken}");
        let samples = &recorder.samples;
        assert!((SAMPLES_MAX / 2..=SAMPLES_MAX).contains(&samples.len()), "{}", samples.len());
        assert!(samples[0].at_s == 0.0 && samples.last().unwrap().at_s > 9900.0);
        let gaps = || samples.windows(2).map(|pair| pair[1].at_s - pair[0].at_s);
        assert!(gaps().all(|gap| gap > 0.0));
        let (least, most) =
            gaps().fold((f64::MAX, 0.0_f64), |(l, m), gap| (l.min(gap), m.max(gap)));
        assert!(most < 2.1 * least, "{least} s to {most} s");
    }
}
