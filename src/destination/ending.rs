//! How a migration ends at the destination: errors say what they mean for the guest, threads end, and what happened
//! is told.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::latency::Latencies;
use umem_ring::Waker;
use umem_wire::destination::Phase;
use umem_wire::{FaultCode, Frame};

use super::demand::Command;
use super::side::GuestSide;
use super::{Migration, millis};
use crate::error::Error;
use crate::lane;
use crate::memory::sums::RegionDigest;
use crate::report::{Completed, CpuTime};
use crate::worker;

/// How long a process may take to end whose memory is gone.
pub(super) const EXIT_PATIENCE: Duration = Duration::from_secs(5);

impl Migration<'_> {
    pub(super) fn guest_exited(&self, side: &mut GuestSide) -> Error {
        // Its memory may be gone a moment before it is known to have ended.
        side.exits_within(EXIT_PATIENCE);
        let how = side.status().map_or_else(String::new, |status| format!(" ({status})"));
        if matches!(self.phase, Phase::Completing) {
            Error::Ended(format!(
                "the guest's process ended{how} when all of its memory had come, before its source had said \
                 goodbye"
            ))
        } else if self.phase.may_run() {
            Error::Ended(format!(
                "the guest's process ended{how} before all of its memory had come"
            ))
        } else {
            Error::Host(format!("it exited{how} before the guest arrived"))
        }
    }

    /// Adds what an error means for the guest.
    pub(super) fn explain(&self, error: Error) -> Error {
        match error {
            Error::Lost { side, lane, what } if self.phase.may_run() => Error::Lost {
                side,
                lane,
                what: format!(
                    "{what}; the guest runs here and waits for {} pages that only the source has: \
                     do not start it there again",
                    self.guest.pages_missing()
                ),
            },
            other => other,
        }
    }

    /// Ends the threads. What was to be sent still goes out, the reason of a failure last, by us if
    /// the demand thread is the one that failed.
    pub(super) fn end(&mut self, error: Option<&Error>) -> Latencies {
        if let Some(error) = error.filter(|_| !self.leaves_quietly) {
            let mut fault = error.to_fault();
            if self.guest_ends {
                fault.code = FaultCode::Ended;
            }
            self.send(&Frame::Error(fault));
        }
        let _ = self.commands.send(Command::End);
        self.demand.wake();
        self.bulk_wakers.iter().for_each(Waker::wake);
        for thread in self.bulk_threads.drain(..) {
            let _ = thread.join();
        }
        if let Some(toucher) = &self.toucher {
            toucher.end();
        }
        if let Some(thread) = self.touch_thread.take() {
            let _ = thread.join();
        }
        let demand = self.demand_thread.take().expect("ended once");
        let sever = || self.link.sockets.sever();
        let latencies = worker::part(demand, error.is_some(), sever).ok().flatten();
        let tells = error.filter(|_| !self.leaves_quietly);
        if let (None, Some(socket), Some(error)) = (&latencies, &self.demand_socket, tells) {
            lane::tell(socket, self.is_checked, error);
        }
        let mut latencies = latencies.unwrap_or_else(Latencies::new);
        // After the demand thread, which tells them of pages.
        self.fault_wakers.iter().for_each(Waker::wake);
        for thread in self.fault_threads.drain(..) {
            if let Ok(Some(shard)) = thread.join() {
                latencies.add(&shard);
            }
        }
        latencies
    }

    pub(super) fn report(&self, latencies: &Latencies) -> Completed {
        let totals = self.guest.counters.totals();
        let seconds = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from).as_secs_f64(),
            _ => 0.0,
        };
        let moving_s = seconds(self.times.first_page, self.times.cached);
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
            downtime_ms: millis(self.times.downtime),
            drain_s: seconds(self.times.running, self.times.cached),
            total_s: seconds(self.times.stopped, self.times.cached),
            gbps: if moving_s > 0.0 { totals.data_bytes as f64 * 8e-9 / moving_s } else { 0.0 },
            fault_latency_us: None,
            fault_stages_us: None,
            cpu_s: CpuTime::of_this_process(),
            zero_copy: self.guest.how_pages_landed().into(),
            release_bytes,
            spare_bytes_max,
            congestion: self.congestion.clone(),
            recoveries: self.link.recoveries,
            disconnected_s: self.link.disconnected.as_secs_f64(),
            checksum: self.is_checked,
            checksum_errors: self.guest.counters.checksum_errors.load(Relaxed),
            digests: self.digests(),
        };
        latencies.tell(&mut report);
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
