//! `--fault-rate`: demand faults during the stream, on a demand lane of their own.
//!
//! At either end the lane is served by the thread that serves it in a migration (`source::demand`,
//! `destination::demand`), at its priority. At the receiver a few threads stand for vCPUs: each page is touched once,
//! at its scheduled time, and the access is timed from start to return. The pages are in memory of their own, so that
//! every access waits: regions that all share one file at the source. A region that has been touched whole is freed.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use umem_wire::{Frame, LaneRole, Receiver, RegionTable, transmit};

use super::fault_limits::{REGION_BYTES, REGION_PAGES};
use super::memory::{Landing, filled, source_memory, wrong};
use super::pages::{PAGE_BYTES, word};
use super::protocol::Test;
use crate::destination::lanes::acks::Acks;
use crate::error::{Context, Result};
use crate::runtime::idle::IdleCores;
use crate::runtime::inbox::Inbox;
use crate::runtime::worker::Started;
use crate::source::memory::SourceMemory;
use crate::statistics::{Latency, latency_histogram, record};
use crate::transport::lane::Lane;
use crate::{destination, source};

/// The step from one page to the next, far apart: no access prefetches the next one.
const STEP: u64 = 1597;

const _: () = assert!(REGION_PAGES.is_power_of_two() && STEP % 2 == 1);

/// An access takes 0.1 to 1 ms, so one thread can wait for about this many a second.
const RATE_PER_THREAD: u32 = 1000;
const THREADS_MAX: u32 = 16;

/// Threads that touch pages.
pub(super) fn threads(rate: u32) -> u32 {
    rate.div_ceil(RATE_PER_THREAD).clamp(1, THREADS_MAX)
}

fn regions(test: &Test) -> usize {
    usize::try_from(test.faults.div_ceil(REGION_PAGES)).expect("few regions")
}

/// The source of the pages of faults.
pub(super) struct FaultSource {
    memory: Arc<SourceMemory>,
    table: RegionTable,
}

impl FaultSource {
    pub(super) fn new(test: &Test) -> Result<FaultSource> {
        let place = test.place();
        let file = filled(place.pages, 0, REGION_BYTES)?;
        let memory = source_memory(&file, regions(test), place.unit())?;
        // The file has no guest that could change it.
        memory.stopped.store(true, SeqCst);
        let table = memory.landing().clone();
        Ok(FaultSource { memory: Arc::new(memory), table })
    }

    /// Answers until the lane is cut off. Runs on the calling thread; `core` is a core that the user did not name.
    pub(super) fn serve(&self, lane: Lane, core: Option<usize>) -> Result<()> {
        use std::io::Write;
        let mut frame = Vec::new();
        // From here on pages may be requested.
        transmit::encode(&Frame::Stopped { postcopy: true, background: false }, &mut frame);
        lane.blocking()?.write_all(&frame).context(|| lane.name.clone())?;
        let mut receiver = Receiver::for_source(&self.table);
        receiver.set_regions(&self.table);
        source::lanes::demand::DemandLane {
            lane,
            receiver,
            memory: self.memory.clone(),
            core,
            follows: core.is_some(),
            // There is no background.
            adapts: false,
            idle_cores: IdleCores::default(),
            commands: std::sync::mpsc::channel().1,
            post: Inbox::new()?.post(),
        }
        .run(Started::unheard())
    }
}

/// The memory where faults happen.
pub(super) struct FaultLanding {
    landing: Landing,
    rate: u32,
    /// Number of pages.
    faults: u64,
    next: AtomicU64,
    /// Touched pages of each region.
    touched: Vec<AtomicU64>,
    state: Mutex<State>,
    stopped: Condvar,
}

struct State {
    is_stopped: bool,
    /// Latencies since counting began, and since the last query, µs.
    all: Histogram<u64>,
    interval: Histogram<u64>,
}

impl FaultLanding {
    pub(super) fn new(test: &Test) -> Result<FaultLanding> {
        let regions = regions(test);
        Ok(FaultLanding {
            landing: Landing::of_regions(test.place(), REGION_BYTES, regions)?,
            rate: test.fault_rate,
            faults: test.faults,
            next: AtomicU64::new(0),
            touched: (0..regions).map(|_| AtomicU64::new(0)).collect(),
            state: Mutex::new(State {
                is_stopped: false,
                all: latency_histogram(),
                interval: latency_histogram(),
            }),
            stopped: Condvar::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests pages, and makes them visible, until the lane is cut off. Runs on the calling thread.
    pub(super) fn serve(&self, lane: Lane, core: Option<usize>) -> Result<()> {
        let mut receiver = Receiver::for_destination(LaneRole::Demand);
        receiver.set_regions(&self.landing.table);
        let lane = destination::lanes::demand::DemandLane {
            lane: Some((lane, receiver)),
            guest: self.landing.guest.clone(),
            serves_faults: true,
            core,
            follows: core.is_some(),
            idle_cores: IdleCores::default(),
            requests_from: destination::lanes::demand::RequestsFrom::Stop,
            has_background: false,
            recovers: false,
            acks: Acks::new(false),
            commands: std::sync::mpsc::channel().1,
            post: Inbox::new()?.post(),
        };
        lane.run(Started::unheard()).map(drop)
    }

    /// Touches pages at their scheduled times, beside other threads that do. `began` is the same for all.
    pub(super) fn touch(&self, began: Instant) -> Result<()> {
        loop {
            let number = self.next.fetch_add(1, Relaxed);
            if number >= self.faults {
                return Ok(());
            }
            let turn = began + Duration::from_secs_f64(number as f64 / f64::from(self.rate));
            if !self.wait_until(turn) {
                return Ok(());
            }
            let region = number / REGION_PAGES;
            let page = number * STEP % REGION_PAGES;
            let index = usize::try_from(region).expect("few regions");
            let at = Instant::now();
            let found = self.landing.touch(index, page * PAGE_BYTES);
            let took = at.elapsed();
            let mut state = self.state();
            if state.is_stopped {
                // The lane is cut off: the page reads as zeroes.
                return Ok(());
            }
            if found != word(page, 0) {
                return Err(wrong(page));
            }
            record(&mut state.all, took);
            record(&mut state.interval, took);
            drop(state);
            if self.touched[index].fetch_add(1, SeqCst) + 1 == REGION_PAGES {
                self.landing.release(index)?;
            }
        }
    }

    /// False if it was stopped before.
    fn wait_until(&self, turn: Instant) -> bool {
        let mut state = self.state();
        while !state.is_stopped {
            let left = turn.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            let waited = self.stopped.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    /// Starts counting.
    pub(super) fn measure(&self) {
        let mut state = self.state();
        state.all.reset();
        state.interval.reset();
    }

    /// Latencies since counting began.
    pub(super) fn latency(&self) -> Latency {
        Latency::of(&self.state().all)
    }

    /// Latencies since the last call.
    pub(super) fn interval(&self) -> Latency {
        let mut state = self.state();
        let latency = Latency::of(&state.interval);
        state.interval.reset();
        latency
    }

    /// Stops counting; threads that wait for a page continue.
    pub(super) fn stop(&self) {
        self.state().is_stopped = true;
        self.stopped.notify_all();
    }

    /// Releases threads that wait for a page that will not arrive. After [`FaultLanding::stop`].
    pub(super) fn let_go(&self) -> Result<()> {
        self.landing.guest.unregister_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_of_a_region_is_touched_once() {
        let mut seen = vec![false; REGION_PAGES as usize];
        for number in 0..REGION_PAGES {
            let page = number * STEP % REGION_PAGES;
            assert!(!std::mem::replace(&mut seen[page as usize], true));
        }
    }
}
