//! One side of one direction of a running test: its lanes' threads and counters.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::clock::{clock_time, thread_time, waited};
use super::faults::{self, FaultLanding, FaultSource};
use super::lanes::{self, LandPages, SendPages};
use super::memory::{self, Landing, Source};
use super::passes::Passes;
use super::protocol::{Counts, Direction, End, Measured, Test};
use crate::error::{Context, Error, Result};
use crate::runtime::cores::{Cores, Place};
use crate::runtime::inbox::Inbox;
use crate::runtime::role::Role;
use crate::runtime::worker::{self, Failure};
use crate::source::memory::SourceMemory;
use crate::statistics::{CpuTime, Latency};
use crate::transport::lane::Lane;

/// Messages of threads to the control thread.
pub(super) enum ThreadMessage {
    /// A lane of this direction has moved its last byte.
    LaneEnded(Direction),
    /// A thread has failed.
    Failed(Error),
}

impl Failure for ThreadMessage {
    fn failed(error: Error) -> ThreadMessage {
        ThreadMessage::Failed(error)
    }

    fn into_failure(self) -> Option<Error> {
        match self {
            ThreadMessage::LaneEnded(_) => None,
            ThreadMessage::Failed(error) => Some(error),
        }
    }
}

/// The preparation of a side, which takes time and memory: made when the test is agreed on.
pub(super) struct Prepared {
    direction: Direction,
    role: Role,
    work: Work,
    faults: Option<Faults>,
    placing_s_per_gib: Option<f64>,
}

/// This side's part in faults.
#[derive(Clone)]
enum Faults {
    Answers(Arc<FaultSource>),
    Has(Arc<FaultLanding>),
}

#[derive(Clone)]
enum Work {
    Send(Arc<Passes<SourceMemory>>),
    Land(Arc<Passes<Landing>>),
    SendAny(Arc<AtomicU64>),
    ReceiveAny(Arc<AtomicU64>),
}

impl Prepared {
    pub(super) fn new(test: &Test, end: End, direction: Direction) -> Result<Prepared> {
        let (place, zero_percent, bytes) = (test.place(), test.zero_percent, test.whole_bytes());
        let role = end.role(direction);
        let mut placing_s_per_gib = None;
        let work = match (role, test.discard) {
            (Role::Source, true) => Work::SendAny(Arc::default()),
            (Role::Destination, true) => Work::ReceiveAny(Arc::default()),
            (Role::Source, false) => {
                let source = Source::new(place, zero_percent, test.region_bytes, bytes)?;
                let make = move |bytes| source.memory(bytes);
                Work::Send(Arc::new(Passes::new(test.lanes, test.region_bytes, bytes, make)))
            }
            (Role::Destination, false) => {
                let region_bytes = test.region_bytes.min(bytes.unwrap_or(u64::MAX));
                memory::warm(place, region_bytes)?;
                placing_s_per_gib = Some(memory::placing_s_per_gib(place, region_bytes)?);
                let make = move |bytes| Landing::new(place, bytes);
                Work::Land(Arc::new(Passes::new(test.lanes, test.region_bytes, bytes, make)))
            }
        };
        let faults = match role {
            _ if test.fault_rate == 0 => None,
            Role::Source => Some(Faults::Answers(Arc::new(FaultSource::new(test)?))),
            Role::Destination => Some(Faults::Has(Arc::new(FaultLanding::new(test)?))),
        };
        Ok(Prepared { direction, role, work, faults, placing_s_per_gib })
    }
}

/// A running side.
pub(super) struct RunningSide {
    direction: Direction,
    work: Work,
    faults: Option<Faults>,
    placing_s_per_gib: Option<f64>,
    /// The threads of the stream.
    lanes: Vec<Lane>,
    fault_lane: Option<Lane>,
    threads: Vec<JoinHandle<Option<()>>>,
    clocks: Vec<Arc<Clock>>,
    retirer: Option<JoinHandle<Option<Result<u64>>>>,
    zero_percent: u32,
    verify: bool,
    /// Lanes are cut off: their errors are no failures from here on.
    stopping: Arc<AtomicBool>,
    running: usize,
    since: Moment,
    until: Option<Moment>,
}

/// A moment, and the counters at it.
#[derive(Clone)]
struct Moment {
    at: Instant,
    counts: Counts,
    retransmits: Option<u64>,
    cpu: CpuTime,
    threads: Vec<Times>,
}

/// The times of a lane's thread.
struct Clock {
    id: libc::clockid_t,
    thread: i32,
    /// The total, once it has ended.
    total: OnceLock<Times>,
}

/// How a thread spent its time.
#[derive(Clone, Copy, Default)]
struct Times {
    /// Running.
    ran: Duration,
    /// Runnable without a core; None if unknown.
    waited: Option<Duration>,
}

impl Clock {
    fn of_this_thread() -> Result<Clock> {
        let mut id = 0;
        // SAFETY: the call writes to a local variable; the thread is the calling one.
        let result = unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut id) };
        if result != 0 {
            return Err(std::io::Error::from_raw_os_error(result))
                .context(|| "pthread_getcpuclockid");
        }
        Ok(Clock { id, thread: nix::unistd::gettid().as_raw(), total: OnceLock::new() })
    }

    fn now(&self) -> Times {
        let of_the_living =
            || Times { ran: clock_time(self.id).unwrap_or_default(), waited: waited(self.thread) };
        self.total.get().copied().unwrap_or_else(of_the_living)
    }

    /// Called by the thread itself, at its end.
    fn end(&self) {
        let _ = self.total.set(Times { ran: thread_time(), waited: waited(self.thread) });
    }
}

impl RunningSide {
    /// Starts the threads of these connections, all of one direction. `cores` are the named cores, if any.
    pub(super) fn start(
        test: &Test,
        prepared: Prepared,
        mut lanes: Vec<Lane>,
        cores: &[usize],
        zero_copy: bool,
        inbox: &Inbox<ThreadMessage>,
    ) -> Result<RunningSide> {
        let Prepared { direction, role, work, faults, placing_s_per_gib } = prepared;
        let fault_lane = faults.is_some().then(|| lanes.pop()).flatten();
        let mut side = RunningSide {
            direction,
            since: Moment::none(),
            work,
            faults,
            placing_s_per_gib,
            running: lanes.len(),
            lanes,
            fault_lane,
            threads: Vec::new(),
            clocks: Vec::new(),
            retirer: None,
            zero_percent: test.zero_percent,
            verify: test.verify,
            stopping: Arc::default(),
            until: None,
        };
        // Before the first byte moves.
        side.since = side.moment();
        let retire = side.start_retirer(inbox)?;
        if test.discard {
            side.lanes.iter().try_for_each(lanes::queue_freely)?;
        }
        let chosen = Cores::choose(&[], role);
        for (index, lane) in side.lanes.clone().into_iter().enumerate() {
            let core = match cores {
                // As in iperf3, so that the figures compare.
                [] if test.discard => Place::Anywhere,
                // As in a migration.
                [] => chosen.bulk(index),
                named => Place::At(named[index % named.len()]),
            };
            let bytes = test.bytes.map(|bytes| share(bytes, index, side.lanes.len()));
            let index = index as u16;
            let work = side.work.clone();
            let (lanes, retire, name) = (test.lanes, retire.clone(), lane.name.clone());
            let clock = side.spawn(inbox, name, core, true, move || match work {
                Work::Send(passes) => {
                    SendPages { lane, index, lanes, core, zero_copy, passes }.run()
                }
                Work::Land(passes) => LandPages { lane, core, passes, retire }.run(),
                Work::SendAny(sent) => lanes::send_any(&lane, bytes, &sent),
                Work::ReceiveAny(received) => lanes::receive_any(&lane, bytes, &received),
            })?;
            side.clocks.push(clock);
        }
        let core = if cores.is_empty() { chosen.demand() } else { None };
        side.start_faults(test.fault_rate, core, inbox)?;
        Ok(side)
    }

    /// The thread that frees memory, if pages land.
    fn start_retirer(&mut self, inbox: &Inbox<ThreadMessage>) -> Result<SyncSender<Arc<Landing>>> {
        let (retire, retired) = sync_channel(1);
        if matches!(self.work, Work::Land(_)) {
            let (zero_percent, verify) = (self.zero_percent, self.verify);
            let ((), thread) = worker::start("bench-retire", inbox, move |started| {
                started.with(());
                Ok(give_back(&retired, verify, zero_percent))
            })?;
            self.retirer = Some(thread);
        }
        Ok(retire)
    }

    /// The thread that serves the fault lane, and the touching threads.
    fn start_faults(
        &mut self,
        rate: u32,
        core: Option<usize>,
        inbox: &Inbox<ThreadMessage>,
    ) -> Result<()> {
        let (Some(faults), Some(lane)) = (self.faults.clone(), self.fault_lane.clone()) else {
            return Ok(());
        };
        let name = lane.name.clone();
        let place = core.map_or(Place::Anywhere, Place::At);
        match faults {
            Faults::Answers(source) => {
                self.spawn(inbox, name, place, false, move || source.serve(lane, core))?;
            }
            Faults::Has(landing) => {
                let serving = landing.clone();
                self.spawn(inbox, name, place, false, move || serving.serve(lane, core))?;
                let began = Instant::now();
                for _ in 0..faults::threads(rate) {
                    let landing = landing.clone();
                    let touch = move || landing.touch(began);
                    self.spawn(inbox, "bench-touch".into(), Place::Anywhere, false, touch)?;
                }
            }
        }
        Ok(())
    }

    /// Starts a thread of this side; with `is_lane` its end is counted.
    fn spawn(
        &mut self,
        inbox: &Inbox<ThreadMessage>,
        name: String,
        place: Place,
        is_lane: bool,
        body: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<Arc<Clock>> {
        let (stopping, post, direction) = (self.stopping.clone(), inbox.post(), self.direction);
        let (clock, thread) = worker::start(&name, inbox, move |started| {
            if let Some(core) = place.enter() {
                core_affinity::set_for_current(core_affinity::CoreId { id: core });
            }
            let clock = Arc::new(Clock::of_this_thread()?);
            started.with(clock.clone());
            let result = body();
            clock.end();
            if stopping.load(SeqCst) {
                return Ok(());
            }
            result?;
            if is_lane {
                post.send(ThreadMessage::LaneEnded(direction));
            }
            Ok(())
        })?;
        self.threads.push(thread);
        Ok(clock)
    }

    /// Starts counting.
    pub(super) fn measure(&mut self) {
        self.since = self.moment();
        if let Some(landing) = self.fault_landing() {
            landing.measure();
        }
    }

    fn fault_landing(&self) -> Option<&FaultLanding> {
        match &self.faults {
            Some(Faults::Has(landing)) => Some(landing),
            _ => None,
        }
    }

    /// Fault latencies here since the last call; None without faults.
    pub(super) fn interval_faults(&self) -> Option<Latency> {
        self.fault_landing().map(FaultLanding::interval)
    }

    pub(super) fn direction(&self) -> Direction {
        self.direction
    }

    /// A lane has ended; counting ends with the last one.
    pub(super) fn lane_ended(&mut self) {
        self.running -= 1;
        if self.running == 0 {
            self.until = Some(self.moment());
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.running == 0
    }

    /// Cuts the lanes off: later errors of their threads are no failures. The other side must be notified before
    /// [`RunningSide::end`], which closes them.
    pub(super) fn stop(&mut self) {
        if self.until.is_none() {
            self.until = Some(self.moment());
        }
        self.stopping.store(true, SeqCst);
        if let Some(landing) = self.fault_landing() {
            landing.stop();
        }
    }

    /// Ends the threads, checks the landed pages if requested, and frees the memory.
    pub(super) fn end(mut self) -> Result<Measured> {
        self.stop();
        let verified_pages = self.join()?;
        let until = self.until.take().expect("the side has been stopped");
        let seconds = until.at.duration_since(self.since.at).as_secs_f64();
        let (busy, pressed) = shares(&self.since.threads, &until.threads, seconds);
        Ok(Measured {
            seconds,
            counts: until.counts - self.since.counts,
            retransmits: until
                .retransmits
                .zip(self.since.retransmits)
                .map(|(until, since)| until.saturating_sub(since)),
            user_s: until.cpu.user - self.since.cpu.user,
            system_s: until.cpu.system - self.since.cpu.system,
            busy,
            pressed,
            placing_s_per_gib: self.placing_s_per_gib,
            verified_pages,
            faults: self.fault_landing().map(FaultLanding::latency),
            congestion: self.lanes[0].congestion.clone().unwrap_or_else(|| "none".into()),
        })
    }

    /// Returns the number of checked pages.
    fn join(&mut self) -> Result<u64> {
        self.stopping.store(true, SeqCst);
        for lane in self.lanes.iter().chain(&self.fault_lane) {
            // Fails if the other side has gone.
            let _ = nix::sys::socket::shutdown(
                lane.as_fd().as_raw_fd(),
                nix::sys::socket::Shutdown::Both,
            );
        }
        if let Some(landing) = self.fault_landing() {
            landing.stop();
        }
        let let_go = self.fault_landing().map_or(Ok(()), FaultLanding::let_go);
        for thread in self.threads.drain(..) {
            // The reason of its failure has been posted.
            let _ = thread.join();
        }
        let_go?;
        let mut verified = 0;
        if let Some(retirer) = self.retirer.take() {
            let checked = retirer.join().ok().flatten();
            let lost = || Error::Internal("the thread that frees memory panicked".into());
            verified += checked.ok_or_else(lost)??;
        }
        if let Work::Land(passes) = &self.work {
            for landing in passes.take_rest() {
                if self.verify {
                    verified += landing.verify(self.zero_percent)?;
                }
            }
        }
        Ok(verified)
    }

    /// Bytes moved since counting began, the time, and the retransmitted segments.
    pub(super) fn so_far(&self) -> (Duration, Counts, Option<u64>) {
        let now = self.until.clone().unwrap_or_else(|| self.moment());
        let again = now.retransmits.zip(self.since.retransmits);
        (
            now.at.duration_since(self.since.at),
            now.counts - self.since.counts,
            again.map(|(now, since)| now.saturating_sub(since)),
        )
    }

    fn moment(&self) -> Moment {
        let counts = match &self.work {
            Work::Send(passes) => passes.counts(),
            Work::Land(passes) => passes.counts(),
            Work::SendAny(bytes) | Work::ReceiveAny(bytes) => {
                Counts { bytes: bytes.load(Relaxed), ..Counts::default() }
            }
        };
        Moment {
            at: Instant::now(),
            counts,
            retransmits: self.lanes.iter().map(lanes::retransmits).sum(),
            cpu: CpuTime::of_this_process(),
            threads: self.clocks.iter().map(|clock| clock.now()).collect(),
        }
    }
}

impl Moment {
    fn none() -> Moment {
        Moment {
            at: Instant::now(),
            counts: Counts::default(),
            retransmits: None,
            cpu: CpuTime::default(),
            threads: Vec::new(),
        }
    }
}

impl Drop for RunningSide {
    /// A failed test leaves no thread behind.
    fn drop(&mut self) {
        let _ = self.join();
    }
}

/// Frees the memory of passes that all lanes have left, after a check if requested. Returns the number of checked
/// pages.
fn give_back(retired: &Receiver<Arc<Landing>>, verify: bool, zero_percent: u32) -> Result<u64> {
    let mut verified = 0;
    while let Ok(landing) = retired.recv() {
        if verify {
            verified += landing.verify(zero_percent)?;
        }
    }
    Ok(verified)
}

/// The largest shares of time of any thread, running, and running or runnable without a core. Threads that had not
/// started when counting began had used no time.
fn shares(since: &[Times], until: &[Times], seconds: f64) -> (f64, Option<f64>) {
    let since = since.iter().copied().chain(std::iter::repeat(Times::default()));
    let (mut busy, mut pressed) = (0.0_f64, None::<f64>);
    for (until, since) in until.iter().zip(since) {
        let share = |time: Duration| time.as_secs_f64() / seconds.max(f64::MIN_POSITIVE);
        let ran = share(until.ran.saturating_sub(since.ran));
        busy = busy.max(ran);
        if let Some(waited) = until.waited {
            let waited = share(waited.saturating_sub(since.waited.unwrap_or_default()));
            pressed = Some(pressed.unwrap_or(0.0).max(ran + waited));
        }
    }
    (busy, pressed)
}

/// Lane `index`'s part of the bytes of a test.
fn share(bytes: u64, index: usize, lanes: usize) -> u64 {
    let (lanes, index) = (lanes as u64, index as u64);
    bytes / lanes + u64::from(index < bytes % lanes)
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn lanes_divide_all_bytes() {
        for (bytes, lanes) in [(10, 3), (2, 5), (1 << 40, 7), (0, 1)] {
            assert_eq!((0..lanes).map(|lane| share(bytes, lane, lanes)).sum::<u64>(), bytes);
        }
    }
}
