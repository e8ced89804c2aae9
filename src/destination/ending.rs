//! How a migration ends at the destination: threads end, and what happened is told.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use umem_ring::Waker;
use umem_wire::{Fault, Frame};

use super::faults::latency::Latencies;
use super::lanes::demand::Command;
use super::{Migration, encoded};
use crate::memory::sums::RegionDigest;
use crate::runtime::worker;
use crate::statistics::{Completed, CpuTime};
use crate::transport::lane;

/// How long a process may take to end whose memory is gone.
pub(super) const EXIT_PATIENCE: Duration = Duration::from_secs(5);

impl Migration<'_> {
    /// Ends the threads. What was to be sent still goes out, the reason of a failure last, by us if
    /// the demand thread is the one that failed.
    pub(super) fn end(&mut self, told: Option<&Fault>, has_failed: bool) {
        let threads = &mut self.threads;
        if let Some(fault) = told {
            threads.command(Command::Send(encoded(&Frame::Error(fault.clone()))));
        }
        threads.command(Command::End);
        threads.bulk_wakers.iter().for_each(Waker::wake);
        for thread in threads.bulk_threads.drain(..) {
            let _ = thread.join();
        }
        if let Some(toucher) = &threads.toucher {
            toucher.end();
        }
        if let Some(thread) = threads.touch_thread.take() {
            let _ = thread.join();
        }
        let demand = threads.demand_thread.take().expect("ended once");
        let sever = || self.link.sockets.sever();
        let latencies = worker::part(demand, has_failed, sever).ok().flatten();
        if let (None, Some(socket), Some(fault)) = (&latencies, &threads.demand_socket, told) {
            lane::tell_fault(socket, self.is_checked, fault.clone());
        }
        let mut latencies = latencies.unwrap_or_else(Latencies::new);
        // After the demand thread, which tells them of pages.
        threads.fault_wakers.iter().for_each(Waker::wake);
        for thread in threads.fault_threads.drain(..) {
            if let Ok(Some(shard)) = thread.join() {
                latencies.add(&shard);
            }
        }
        self.latencies = latencies;
    }

    pub(super) fn report(&self) -> Completed {
        let times = self.core.times();
        let (recoveries, disconnected) = self.core.recoveries();
        let totals = self.guest.counters.totals();
        let seconds = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from).as_secs_f64(),
            _ => 0.0,
        };
        let moving_s = seconds(times.first_page, times.cached);
        let precopy_s = seconds(times.first_page, times.stopped);
        let crossed_bytes = self.guest.counters.crossed_bytes(totals.data_bytes);
        let page_shift =
            self.guest.regions.iter().map(|region| region.unit_shift()).min().unwrap_or(12);
        let kinds: BTreeSet<&str> =
            self.guest.regions.iter().map(|region| region.memory.kind.name()).collect();
        let (release_bytes, spare_bytes_max) = self.guest.release_totals();
        let mut report = Completed {
            event: "completed".into(),
            role: "destination".into(),
            kind: kinds.into_iter().collect::<Vec<_>>().join(","),
            page_size: 1 << page_shift,
            lanes: self.lane_count,
            total_bytes: self.guest.total_bytes(),
            data_bytes: totals.data_bytes,
            zero_bytes: totals.zero_bytes,
            hole_bytes: totals.hole_bytes,
            pages_demand: totals.pages_demand,
            pages_background: totals.pages_background,
            downtime_ms: times.downtime.as_secs_f64() * 1e3,
            drain_s: seconds(times.running, times.cached),
            total_s: seconds(times.stopped, times.cached),
            precopy_s,
            precopy_bytes: self.guest.counters.rounds_bytes.load(Relaxed),
            passes: 0,
            dirty_bytes_per_s: None,
            expected_downtime_ms: None,
            gbps: if moving_s > 0.0 { crossed_bytes as f64 * 8e-9 / moving_s } else { 0.0 },
            fault_latency_us: None,
            fault_stages_us: None,
            cpu_s: CpuTime::of_this_process(),
            zero_copy: self.guest.how_pages_landed().into(),
            release_bytes,
            spare_bytes_max,
            congestion: self.congestion.clone(),
            recoveries,
            disconnected_s: disconnected.as_secs_f64(),
            checksum: self.is_checked,
            checksum_errors: self.guest.counters.checksum_errors.load(Relaxed),
            digests: self.digests(),
        };
        self.latencies.tell(&mut report);
        report
    }

    /// For the report.
    fn digests(&self) -> Vec<RegionDigest> {
        if !self.is_checked || !self.digests_are_known {
            return Vec::new();
        }
        let names = self.guest.regions.iter().map(|region| region.name.as_str());
        RegionDigest::all(names, &self.guest.digests.get(), self.source_digests.as_deref())
    }
}
