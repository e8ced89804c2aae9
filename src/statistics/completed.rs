//! What a migration has come to, at its end.

use serde::{Deserialize, Serialize};

use super::latency::{FaultStages, Latency};
use crate::error::{Error, Result};
use crate::memory::sums::RegionDigest;

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
    /// Bytes of pages that crossed the wire with their contents. Each page counts once.
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
    /// First page → source stopped, seconds; 0 without passes while the guest ran.
    #[serde(default)]
    pub precopy_s: f64,
    /// Bytes of page contents that crossed the wire while the guest ran at the source, each time they did.
    #[serde(default)]
    pub precopy_bytes: u64,
    /// At the source: passes over the running guest's memory.
    #[serde(default)]
    pub passes: u32,
    /// At the source: bytes a second that the guest wrote in the last pass that was a whole one, each page once; null
    /// without such a pass.
    #[serde(default)]
    pub dirty_bytes_per_s: Option<u64>,
    /// At the source: how long the pages that the last pass left were expected to take at the rate of the fastest pass,
    /// milliseconds. Null with `-p`, whose guest does not wait for them, and without passes. The downtime has the
    /// device state besides.
    #[serde(default)]
    pub expected_downtime_ms: Option<f64>,
    /// Page contents that crossed the wire, each time they did, over the time from the first page to the last,
    /// Gbit/s.
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
        if self.precopy_bytes > 0 {
            text += &format!(
                "{:.0} MiB in {:.2} s while the guest ran at the source",
                mib(self.precopy_bytes),
                self.precopy_s,
            );
            text += &match (self.passes, self.dirty_bytes_per_s) {
                (0, _) => "\n".to_owned(),
                (passes, None) => format!(", in {passes} pass(es)\n"),
                (passes, Some(rate)) => {
                    format!(", in {passes} pass(es); it wrote {:.0} MiB/s\n", mib(rate))
                }
            };
        }
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
