//! The end of a migration at the source: threads end, memory is freed, and the outcome is reported.

use std::sync::atomic::Ordering::{Relaxed, Release};
use std::time::Instant;

use umem_ring::Waker;
use umem_wire::{Fault, Frame, PageSize, Totals};

use super::Migration;
use super::lanes::bulk;
use super::lanes::demand::Command;
use crate::control::source::{Guest, Outcome};
use crate::error::{Error, Result};
use crate::events::{Event, Remark};
use crate::memory::sums::RegionDigest;
use crate::runtime::worker;
use crate::statistics::{Completed, CpuTime};
use crate::transport::lane;

impl Migration {
    /// Ends the thread that frees pages during the migration.
    pub(super) fn end_release(&mut self) {
        self.memory.is_ending.store(true, Release);
        self.memory.releaser.get().into_iter().for_each(Waker::wake);
        if let Some(thread) = self.release_thread.take() {
            let _ = thread.join();
        }
    }

    /// Frees the rest at the end: the destination has every page.
    pub(super) fn release_rest(&self) -> Result<u64> {
        if !self.memory.releases {
            return Ok(0);
        }
        self.memory.regions.iter().try_for_each(|region| region.ram.free())?;
        Ok(self.allocated_bytes.saturating_sub(self.memory.allocated_bytes()?))
    }

    /// Ends the threads. Pending data is still sent, the reason of a failure last. If the demand thread has failed,
    /// this thread sends the reason.
    pub(super) fn end(&mut self, fault: Option<Fault>) {
        if let Some(fault) = &fault {
            self.send(&Frame::Error(fault.clone()));
        }
        self.command(Command::End);
        self.order_bulk(bulk::Order::Stop);
        for thread in self.bulk_threads.drain(..) {
            let _ = thread.join();
        }
        self.end_release();
        // None while there are no lanes.
        let sever = || self.link.sockets.sever();
        let demand = self.demand_thread.take();
        let demand = demand.map(|thread| worker::part(thread, fault.is_some(), sever));
        if let (Some(Ok(None) | Err(_)), Some(handle), Some(fault)) = (demand, &self.demand, fault)
        {
            lane::tell_fault(&handle.socket, self.memory.is_checked, fault);
        }
    }

    /// The outcome of the migration: the report, or an error that names the owner of the guest.
    pub(super) fn outcome(mut self) -> Result<Completed> {
        match self.core.take_outcome() {
            Some(Outcome::Completed(totals)) => Ok(self.report(totals)),
            Some(Outcome::Failed { error, guest }) => Err(self.explain(error, guest)),
            None => Err(Error::Internal("the migration has no outcome".into())),
        }
    }

    /// Adds the consequence of an error for the guest.
    fn explain(&self, error: Error, guest: Guest) -> Error {
        match (guest, error) {
            (Guest::Here, error) => error,
            (Guest::Stopped(why), error) => Error::Host(format!(
                "{error}; the guest could not be resumed here either: {why}; resume the guest manually with the \
                 monitor command `cont`"
            )),
            (Guest::Asked, error) => self.left_to_monitor(&error),
            (Guest::Away | Guest::Complete, Error::Lost { side, lane, what }) => Error::Lost {
                side,
                lane,
                what: format!(
                    "{what}; the guest may run at the destination: do not start the guest here again, and keep its \
                     RAM file"
                ),
            },
            (guest, Error::RamFailed { name, path, what }) => {
                let what = format!("{what}; {}", self.what_a_failed_file_means(&guest));
                Error::RamFailed { name, path, what }
            }
            (_, error) => error,
        }
    }

    /// The consequence of a RAM file that failed after the switchover, and the remedy.
    fn what_a_failed_file_means(&self, guest: &Guest) -> String {
        if matches!(guest, Guest::Complete) {
            return "the destination has every page, and some of them may be wrong: stop the guest there, and start \
                    it again from an older state, unless the file is known to have changed after its last page was \
                    sent"
                .into();
        }
        let how = match self.how_to_resume() {
            Some(how) => format!(
                "restore the contents and the length of the same file, then {how} continues the session"
            ),
            None => "this session cannot continue".into(),
        };
        format!(
            "the guest runs at the destination and waits for pages that existed only here: do not start the guest \
             here again; {how}"
        )
    }

    /// The error for a monitor that does not answer and is not waited for any more. The session stays.
    fn left_to_monitor(&self, error: &Error) -> Error {
        let error = match error {
            Error::Interrupted(_) => "interrupted".to_owned(),
            other => other.to_string(),
        };
        let how = self.how_to_resume();
        let how = how
            .map_or_else(String::new, |how| format!("; or, when the monitor answers again: {how}"));
        Error::Host(format!(
            "{error}; the monitor has not answered, so the guest may stand still here, or continue later: query the \
             monitor with `query-status`, and resume the guest with `cont`{how}"
        ))
    }

    fn report(&self, totals: Totals) -> Completed {
        let seconds = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from).as_secs_f64(),
            _ => 0.0,
        };
        let times = self.core.times();
        let (recoveries, disconnected) = self.core.recoveries();
        let passes = self.core.passes().unwrap_or_default();
        let ours = self.memory.counters.totals();
        let moving_s = seconds(times.first_page.or(times.stopped), times.completed);
        let precopy_s = seconds(times.first_page, times.stopped);
        let crossed_bytes = self.memory.counters.crossed_bytes(totals.data_bytes);
        let unit = self.memory.regions.iter().map(|region| region.unit()).min();
        if self.has_monitor && self.output.is_for_person() {
            self.output.tell(&Event::Remark(Remark::QuitMonitor));
        }
        Completed {
            event: "completed".into(),
            role: "source".into(),
            kind: "shared".into(),
            page_size: unit.map_or(0, PageSize::bytes),
            lanes: self.lane_count,
            total_bytes: self.memory.total_bytes(),
            data_bytes: totals.data_bytes,
            zero_bytes: totals.zero_bytes,
            hole_bytes: totals.hole_bytes,
            pages_demand: ours.pages_demand,
            pages_background: ours.pages_background,
            downtime_ms: times.downtime().as_secs_f64() * 1e3,
            drain_s: seconds(times.running, times.completed),
            total_s: seconds(times.stopped, times.completed),
            precopy_s,
            precopy_bytes: self.memory.counters.rounds_bytes.load(Relaxed),
            passes: passes.count,
            dirty_bytes_per_s: passes.dirty_bytes_per_s,
            expected_downtime_ms: passes.expected_downtime.map(|time| time.as_secs_f64() * 1e3),
            gbps: if moving_s > 0.0 { crossed_bytes as f64 * 8e-9 / moving_s } else { 0.0 },
            fault_latency_us: None,
            fault_stages_us: None,
            cpu_s: CpuTime::of_this_process(),
            zero_copy: self.memory.counters.zero_copy(),
            release_bytes: self.release_bytes,
            spare_bytes_max: 0,
            congestion: self.congestion.clone(),
            recoveries,
            disconnected_s: disconnected.as_secs_f64(),
            checksum: self.memory.is_checked,
            checksum_errors: self.memory.counters.checksum_errors.load(Relaxed),
            digests: self.digests(),
        }
    }

    fn digests(&self) -> Vec<RegionDigest> {
        let (Some(ours), theirs) = self.core.digests() else { return Vec::new() };
        let names = self.memory.regions.iter().map(|region| region.ram.name.as_str());
        RegionDigest::all(names, ours, theirs)
    }
}
