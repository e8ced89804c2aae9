//! The data of a report: one side's migration, as numbers over time.

use serde::{Deserialize, Serialize};

use crate::statistics::map::{Came, Map};
use crate::statistics::{Completed, Counters};

/// The most samples. Beyond it every other sample is dropped, and the interval doubles.
const SAMPLES_MAX: usize = 1024;

/// The most phases: a migration has a dozen, and a few more for each lost link.
const SPANS_MAX: usize = 1000;

/// One side of a migration. `--report FILE.json` writes it; `--report FILE.html` shows it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Recording {
    /// umem's version.
    pub version: String,
    /// `source` or `destination`.
    pub role: String,
    /// The start of the recording, milliseconds since 1970. All other times are seconds since then.
    pub began_unix_ms: u64,
    /// The duration, seconds.
    pub seconds: f64,
    /// The guest's RAM, bytes.
    pub total_bytes: u64,
    /// Counters over time, in order.
    pub samples: Vec<Sample>,
    /// The protocol's phases, in order.
    pub phases: Vec<Span>,
    /// How the guest's memory arrived, in the order of its addresses.
    pub map: MapRecord,
    /// Fault latencies at the destination: lower and upper edge in µs, and the count between them.
    pub faults: Vec<(f64, f64, u64)>,
    /// The number of losses of all connections after the switchover.
    #[serde(default)]
    pub connection_losses: u32,
    /// The time without connections after the switchover, seconds.
    #[serde(default)]
    pub disconnected_s: f64,
    /// The report in numbers, if the migration completed.
    pub completed: Option<Completed>,
    /// The reason of a failure.
    pub error: Option<String>,
}

/// Counters at a time, all since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Seconds.
    pub at_s: f64,
    /// Bytes that moved as page contents.
    pub data_bytes: u64,
    /// Bytes of pages of zeroes.
    pub zero_bytes: u64,
    /// Bytes of holes: pages that the source's file does not have.
    pub hole_bytes: u64,
    /// Bytes that moved as page contents, each transfer counted: also while the guest ran at the source. Those that an
    /// earlier process of the session moved are left out.
    #[serde(default)]
    pub crossed_data_bytes: u64,
    /// The same of pages of any kind.
    #[serde(default)]
    pub crossed_bytes: u64,
    /// Pages that moved on demand.
    pub pages_demand: u64,
    /// Faults that wait for their pages.
    pub faults_waiting: u64,
}

/// A phase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// The name, as in messages.
    pub name: String,
    /// The start, seconds.
    pub begin_s: f64,
    /// The end, seconds.
    pub end_s: f64,
}

/// The guest's memory in cells of equal size.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct MapRecord {
    /// Bytes of a cell; the last one may be shorter.
    pub cell_bytes: u64,
    /// One element for each cell.
    pub cells: Vec<CellRecord>,
}

/// A part of the guest's memory, in pages of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CellRecord {
    /// Pages on demand.
    pub demand: u32,
    /// Background pages with contents.
    pub background: u32,
    /// Background pages of zeroes.
    pub zero: u32,
    /// Background pages that are holes at the source.
    pub hole: u32,
    /// Pages that an earlier process of the session moved: how is not known.
    #[serde(default)]
    pub earlier: u32,
    /// The arrival of its last page, seconds; None if pages are missing, or an earlier process moved all of them.
    pub complete_s: Option<f64>,
}

/// Takes samples, in bounded memory.
pub(super) struct Recorder {
    samples: Vec<Sample>,
    /// The interval between samples, seconds.
    interval_s: f64,
    /// The time at which each cell was found complete.
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
        // A slightly early wake-up must not double the interval.
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
            let is_earlier = u64::from(came.earlier) >= map.cell_pages(index);
            if complete.is_none() && !is_earlier && came.pages() >= map.cell_pages(index) {
                *complete = Some(sample.at_s);
            }
        }
    }

    /// Adds the samples, phases and cells to a recording.
    pub(super) fn give(&self, recording: &mut Recording, counters: &Counters) {
        let record = |(came, &complete_s): (Came, &Option<f64>)| CellRecord {
            demand: came.demand,
            background: came.background,
            zero: came.zero,
            hole: came.hole,
            earlier: came.earlier,
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
    fn long_recording_has_bounded_size_and_covers_the_whole_time() {
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
