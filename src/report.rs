//! What a migration tells at its end, and the events on the way, as JSON or for a person.

pub(crate) mod events;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::control::event::Event;
use crate::error::{Error, Result};
use crate::memory::sums::RegionDigest;
use crate::observe::faults::AllFaults;
use crate::observe::map::Map;
use crate::{print, progress};

/// Counters that worker threads keep and the control thread reads.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) data_bytes: AtomicU64,
    pub(crate) zero_bytes: AtomicU64,
    pub(crate) hole_bytes: AtomicU64,
    pub(crate) pages_demand: AtomicU64,
    pub(crate) pages_background: AtomicU64,
    /// Pages that are where they belong: cached at the destination, sent at the source.
    pub(crate) pages_done: AtomicU64,
    /// Bytes that zero-copy sends put on the wire without copying, and with.
    pub(crate) zero_copied_bytes: AtomicU64,
    pub(crate) copied_bytes: AtomicU64,
    /// Bytes of page contents that were moved while the guest ran, each time they were.
    pub(crate) rounds_bytes: AtomicU64,
    /// At the destination: of the device state, as it comes.
    pub(crate) state_bytes: AtomicU64,
    /// What came and was not what had been sent, where there are checksums.
    pub(crate) checksum_errors: AtomicU64,
    /// How each part of the guest's memory came.
    pub(crate) map: Map,
    /// At the destination.
    pub(crate) faults: AllFaults,
}

impl Counters {
    /// For a guest with regions of these sizes, bytes.
    pub(crate) fn of(regions: impl Iterator<Item = u64>) -> Counters {
        Counters { map: Map::new(regions), ..Counters::default() }
    }

    /// Bytes of the guest that are where they belong.
    pub(crate) fn done_bytes(&self) -> u64 {
        self.totals().bytes()
    }

    pub(crate) fn add(counter: &AtomicU64, value: u64) {
        counter.fetch_add(value, Relaxed);
    }

    pub(crate) fn totals(&self) -> umem_wire::Totals {
        umem_wire::Totals {
            data_bytes: self.data_bytes.load(Relaxed),
            zero_bytes: self.zero_bytes.load(Relaxed),
            hole_bytes: self.hole_bytes.load(Relaxed),
            pages_demand: self.pages_demand.load(Relaxed),
            pages_background: self.pages_background.load(Relaxed),
        }
    }

    /// What has been moved in all, as the other side counts it.
    pub(crate) fn set(&self, totals: &umem_wire::Totals) {
        self.data_bytes.store(totals.data_bytes, Relaxed);
        self.zero_bytes.store(totals.zero_bytes, Relaxed);
        self.hole_bytes.store(totals.hole_bytes, Relaxed);
        self.pages_demand.store(totals.pages_demand, Relaxed);
        self.pages_background.store(totals.pages_background, Relaxed);
        self.pages_done.store(totals.pages(), Relaxed);
    }

    /// How the pages left this process, in words.
    pub(crate) fn zero_copy(&self) -> String {
        let (zero_copied, copied) =
            (self.zero_copied_bytes.load(Relaxed), self.copied_bytes.load(Relaxed));
        match (zero_copied, copied) {
            (0, _) => "none: copied by the kernel".into(),
            (_, 0) => "all".into(),
            _ => format!("{:.0} %", 100.0 * zero_copied as f64 / (zero_copied + copied) as f64),
        }
    }
}

/// The last object of `--json`; §10 of the design.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Completed {
    /// Always `completed`.
    pub event: String,
    /// `source` or `destination`.
    pub role: String,
    /// Memory kind, `shared`.
    pub kind: String,
    /// Bytes of a page as it moves (the larger of the two sides' pages), the smallest among the
    /// regions.
    pub page_size: u64,
    /// Bulk lanes.
    pub lanes: u16,
    /// The guest's RAM, bytes.
    pub total_bytes: u64,
    /// Bytes that crossed the wire as page contents.
    pub data_bytes: u64,
    /// Bytes of pages that were all zero and crossed as a header.
    pub zero_bytes: u64,
    /// Bytes of pages that the source's file did not have.
    pub hole_bytes: u64,
    /// Pages that were asked for.
    pub pages_demand: u64,
    /// Pages that came unasked.
    pub pages_background: u64,
    /// Source stopped → destination running, milliseconds. The source measures all of it; the
    /// destination's figure lacks the switchover message's way through the network.
    pub downtime_ms: f64,
    /// Destination running → last page cached, seconds; 0 when all came before.
    pub drain_s: f64,
    /// Source stopped → last page cached, seconds.
    pub total_s: f64,
    /// Page contents over the time from the first page to the last, Gbit/s.
    pub gbps: f64,
    /// From reading a fault to waking the guest, at the destination; null at the source.
    pub fault_latency_us: Option<Latency>,
    /// The same by stage, of faults whose pages were asked for; null at the source.
    #[serde(default)]
    pub fault_stages_us: Option<FaultStages>,
    /// Processor time of the process that umem runs in.
    pub cpu_s: CpuTime,
    /// How the pages left the source without being copied; at the destination, how they landed.
    pub zero_copy: String,
    /// Bytes of guest memory that this side has freed: at the source the guest's RAM, with
    /// `--release-ram`; at the destination spare copies, of which kind `shared` has none.
    pub release_bytes: u64,
    /// Kind `private`: the most that was in the destination's file at a time beside the guest's own
    /// pages, bytes.
    #[serde(default)]
    pub spare_bytes_max: u64,
    /// Congestion control of the lanes, or `none` on unix sockets.
    pub congestion: String,
    /// How often the lanes were lost and the migration went on over new ones.
    #[serde(default)]
    pub recoveries: u32,
    /// How long there were none in all, seconds.
    #[serde(default)]
    pub disconnected_s: f64,
    /// Whether what came was checked (`--checksum`).
    #[serde(default)]
    pub checksum: bool,
    /// What this side got that was not what had been sent, and was sent again.
    #[serde(default)]
    pub checksum_errors: u64,
    /// What all pages of each region come to, with `--checksum`; empty where that is not known.
    #[serde(default)]
    pub digests: Vec<RegionDigest>,
}

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

/// Where the time of a fault goes at the destination.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct FaultStages {
    /// From reading the fault until its request has been handed to the kernel; of a guest in shards: until
    /// the demand thread has been told of it.
    pub read_to_asked: Stage,
    /// From then until the page has come: the network, and the source.
    pub asked_to_arrived: Stage,
    /// From then until the page is visible and whoever waited has been woken.
    pub arrived_to_continued: Stage,
}

impl FaultStages {
    /// In the order in which they follow each other, with what they are called.
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
    /// Of a histogram of nanoseconds.
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

/// Processor time of a process, seconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct CpuTime {
    /// In user mode.
    pub user: f64,
    /// In the kernel.
    pub system: f64,
}

impl CpuTime {
    pub(crate) fn of_this_process() -> CpuTime {
        use nix::sys::resource::{UsageWho, getrusage};
        let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else {
            return CpuTime::default();
        };
        let seconds =
            |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
        CpuTime { user: seconds(usage.user_time()), system: seconds(usage.system_time()) }
    }
}

impl Completed {
    /// Whether both sides have the same memory, as far as they have said.
    pub(crate) fn check_digests(&self) -> Result<()> {
        let differ = self.digests.iter().filter(|digest| digest.differs());
        let regions = differ.map(|digest| digest.region.as_str()).collect::<Vec<_>>().join(", ");
        if regions.is_empty() { Ok(()) } else { Err(Error::Damaged { regions }) }
    }

    /// The summary for a person: a few short lines.
    pub fn summary(&self) -> String {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let mut text = format!(
            "moved {:.0} MiB in {:.2} s: {:.0} MiB of data, {:.0} MiB of zeroes and holes\n\
             downtime {:.1} ms; {:.2} Gbit/s; {} pages on demand, {} in the background\n",
            mib(self.total_bytes),
            self.total_s,
            mib(self.data_bytes),
            mib(self.zero_bytes + self.hole_bytes),
            self.downtime_ms,
            self.gbps,
            self.pages_demand,
            self.pages_background,
        );
        if let Some(latency) = self.fault_latency_us.as_ref().filter(|latency| latency.count > 0) {
            text += &format!(
                "a fault took {} µs in the middle, {} µs at p99, {} µs at worst ({} faults)\n",
                latency.p50, latency.p99, latency.max, latency.count
            );
        }
        text += &self.stages();
        text + &self.integrity()
    }

    /// Where the middle fault's time went, a line or none.
    fn stages(&self) -> String {
        let Some(stages) = self.fault_stages_us.as_ref().filter(|s| s.asked_to_arrived.count > 0)
        else {
            return String::new();
        };
        let medians = stages.each().map(|(name, stage)| format!("{name} {:.1} µs", stage.p50));
        format!("of it in the middle: {}\n", medians.join(", "))
    }

    /// What the checksums have said, a line or none.
    fn integrity(&self) -> String {
        if !self.checksum {
            return String::new();
        }
        let digests: Vec<String> = self
            .digests
            .iter()
            .map(|region| format!("{} {}", region.region, region.digest))
            .collect();
        let are_compared = self.digests.iter().all(|region| region.peer.is_some());
        let outcome = match self.check_digests() {
            _ if digests.is_empty() => "no digest is known".to_owned(),
            Ok(()) if are_compared => {
                format!("digests equal on both sides: {}", digests.join(", "))
            }
            Ok(()) => format!("digests not compared: {}", digests.join(", ")),
            Err(_) => format!("DIGESTS DIFFER: {}", digests.join(", ")),
        };
        format!("checked: {} wrong checksums; {outcome}\n", self.checksum_errors)
    }
}

/// Where events go.
#[derive(Clone)]
pub(crate) enum Output {
    /// Sentences on stderr, the report on stdout.
    Person,
    /// JSON objects on stdout.
    Json,
    /// To the program that umem is a part of; nothing is printed.
    Host(Take),
}

type Take = Arc<dyn Fn(&Event) + Send + Sync>;

impl Output {
    /// For a program of its own, with or without `--json`.
    pub(crate) fn new(json: bool) -> Output {
        if json { Output::Json } else { Output::Person }
    }

    pub(crate) fn is_for_person(&self) -> bool {
        matches!(self, Output::Person)
    }

    /// What a migration has to tell.
    pub(crate) fn tell(&self, event: &Event) {
        match (self, event.name()) {
            (Output::Host(take), _) => take(event),
            (_, None) => self.remark(&events::sentence(event)),
            (_, Some(name)) => self.event(name, events::fields(event), &events::sentence(event)),
        }
    }

    /// An event of a program that is no migration, with its sentence for a person.
    pub(crate) fn event(&self, name: &str, fields: serde_json::Value, sentence: &str) {
        match self {
            Output::Json => {
                let mut object = serde_json::json!({ "event": name });
                if let (Some(object), serde_json::Value::Object(fields)) =
                    (object.as_object_mut(), fields)
                {
                    object.extend(fields);
                }
                self.line(&object.to_string());
            }
            Output::Person if !sentence.is_empty() => progress::say(&format!("umem: {sentence}")),
            Output::Person | Output::Host(_) => {}
        }
    }

    /// A sentence for whoever started this program.
    pub(crate) fn remark(&self, sentence: &str) {
        if !matches!(self, Output::Host(_)) {
            progress::say(&format!("umem: {sentence}"));
        }
    }

    pub(crate) fn completed(&self, report: &Completed) {
        match self {
            Output::Json => {
                self.line(&serde_json::to_string(report).expect("plain numbers and strings"));
            }
            Output::Person => {
                print::out(&report.summary());
            }
            // It gets the report itself.
            Output::Host(_) => {}
        }
    }

    /// The one line that an error ends in.
    pub(crate) fn failed(&self, error: &Error) {
        // What monitors and commands say may have lines of its own.
        self.remark(&error.to_string().lines().collect::<Vec<_>>().join(" "));
        if matches!(self, Output::Json) {
            let object = serde_json::json!({ "event": "failed", "error": error.to_string() });
            self.line(&object.to_string());
        }
    }

    /// One line on stdout. That it cannot be written shows in the exit status, at the end.
    pub(crate) fn line(&self, text: &str) {
        print::out_line(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The other side counts what it likes.
    #[test]
    fn totals_of_a_peer_are_summed_without_overflow() {
        let counters = Counters::of([1 << 20].into_iter());
        counters.set(&umem_wire::Totals {
            data_bytes: u64::MAX,
            zero_bytes: u64::MAX,
            hole_bytes: 1,
            pages_demand: u64::MAX,
            pages_background: 1,
        });
        assert_eq!(counters.done_bytes(), u64::MAX);
        assert_eq!(counters.totals().pages(), u64::MAX);
        assert_eq!(counters.pages_done.load(Relaxed), u64::MAX);
    }
}
