//! The state of one side of a running migration, for observers, and their few orders to it.
//!
//! The control thread reports its phases to a [`Watch`] and has it take samples. Metrics, the control socket and the
//! terminal's display read the watch from other threads. The threads that move pages count them in [`Counters`]; a
//! watch only reads those.
//!
//! **Cancelling.** Until the point of no return either side can give up and leave the guest at the source. One atomic
//! word decides: the control thread commits before the point of no return, and a cancel succeeds only before the
//! commit. So a reported cancellation is final.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;

use super::passes::{PassControl, PassProgress};
use super::recording::{Recorder, Recording, Sample, Span};
use crate::error::{Error, Result};
use crate::events::CUT;
use crate::runtime::bandwidth::Bandwidth;
use crate::runtime::role::Role;
use crate::statistics::{Completed, Counters};
use crate::transport::uri::Uri;

/// The interval between the first samples of a recording; later intervals are longer.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(10);

/// The shortest window of a rate.
const RATE_WINDOW: Duration = Duration::from_secs(1);

/// The most orders that wait for the control thread: users and programs give one at a time.
const ORDERS_MAX: usize = 16;

/// The last phase of either side.
const COMPLETED: &str = "completed";

/// The phase before the protocol's first phase.
fn first_phase(role: Role) -> &'static str {
    match role {
        Role::Source => "connecting",
        Role::Destination => "waiting for a source",
    }
}

pub(crate) struct Watch {
    role: Role,
    began: Instant,
    began_unix: SystemTime,
    commitment: AtomicU8,
    /// The limit of the background, at a source with one.
    bandwidth: Option<Arc<Bandwidth>>,
    live: OnceLock<Live>,
    /// Passes an order about the lanes to the control thread, if the migration recovers.
    link: OnceLock<Box<dyn Fn(LinkOrder) + Send + Sync>>,
    /// Orders that the control thread has not read yet.
    orders: AtomicUsize,
    /// The controls of the passes, at a source with passes while the guest runs.
    passes: OnceLock<PassControl>,
    state: Mutex<State>,
}

/// An order about the lanes of a migration after its switchover.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LinkOrder {
    /// Give the lanes up; the guest runs on with the pages that it has.
    Pause,
    /// Open the lanes again, at another address if the order has one.
    Resume(Option<Uri>),
}

/// The counters, known together with the guest's size.
struct Live {
    counters: Arc<Counters>,
    total_bytes: u64,
}

struct State {
    phase: &'static str,
    phase_began: Instant,
    recorder: Option<Recorder>,
    pace: Pace,
    downtime: Option<Duration>,
    cuts: Cuts,
    passes: PassProgress,
}

/// Times without lanes, after the switchover.
#[derive(Default)]
struct Cuts {
    count: u32,
    /// The total of the past ones.
    past: Duration,
    /// The start of the current one.
    since: Option<Instant>,
}

impl Cuts {
    fn begin(&mut self, now: Instant) {
        if self.since.is_none() {
            self.count += 1;
            self.since = Some(now);
        }
    }

    fn end(&mut self, now: Instant) {
        self.past = self.total(now);
        self.since = None;
    }

    fn total(&self, now: Instant) -> Duration {
        self.past + self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}

/// Undecided, cancelled, or beyond the point of no return.
const OPEN: u8 = 0;
const CANCELLED: u8 = 1;
const COMMITTED: u8 = 2;

impl Watch {
    /// The watch of a side that begins now; `records` for a report.
    pub(crate) fn new(role: Role, records: bool, bandwidth: Option<Arc<Bandwidth>>) -> Arc<Watch> {
        let now = Instant::now();
        Arc::new(Watch {
            role,
            began: now,
            began_unix: SystemTime::now(),
            commitment: AtomicU8::new(OPEN),
            bandwidth,
            live: OnceLock::new(),
            link: OnceLock::new(),
            orders: AtomicUsize::new(0),
            passes: OnceLock::new(),
            state: Mutex::new(State {
                phase: first_phase(role),
                phase_began: now,
                recorder: records.then(|| Recorder::new(SAMPLE_INTERVAL.as_secs_f64())),
                pace: Pace::new(now),
                downtime: None,
                cuts: Cuts::default(),
                passes: PassProgress::default(),
            }),
        })
    }

    pub(crate) fn role(&self) -> Role {
        self.role
    }

    pub(crate) fn bandwidth(&self) -> Option<&Arc<Bandwidth>> {
        self.bandwidth.as_ref()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// For the control thread.
impl Watch {
    /// Takes the guest's size, and the counters of its pages.
    pub(crate) fn attach(&self, counters: Arc<Counters>, total_bytes: u64) {
        self.live.get_or_init(|| Live { counters, total_bytes });
    }

    /// Allows orders about the lanes; `tell` passes them to the control thread.
    pub(crate) fn link(&self, tell: impl Fn(LinkOrder) + Send + Sync + 'static) {
        self.link.get_or_init(|| Box::new(tell));
    }

    /// Allows orders about the passes, which have this limit; `end` has the control thread end the passes.
    pub(crate) fn has_passes(
        &self,
        postcopy: bool,
        limit: Arc<Bandwidth>,
        end: impl Fn() + Send + Sync + 'static,
    ) {
        let (end, has_ended) = (Box::new(end), AtomicBool::new(false));
        self.passes.get_or_init(|| PassControl { postcopy, limit, end, has_ended });
    }

    /// A pass begins, with these bytes to send.
    pub(crate) fn pass_begins(&self, bytes: u64) {
        let gone_bytes = self.gone_in_passes();
        self.state().passes.begin(bytes, gone_bytes, Instant::now());
    }

    /// A pass has ended and left these bytes; the rate of guest writes and the expected downtime, if known.
    pub(crate) fn pass_ends(
        &self,
        left_bytes: u64,
        dirty_bytes_per_s: Option<u64>,
        expected_downtime: Option<Duration>,
    ) {
        self.state().passes.end(left_bytes, dirty_bytes_per_s, expected_downtime);
    }

    /// The guest stands still: no pass follows.
    pub(crate) fn passes_are_over(&self) {
        self.state().passes.over();
    }

    fn gone_in_passes(&self) -> u64 {
        self.live.get().map_or(0, |live| live.counters.rounds_page_bytes.load(Relaxed))
    }

    /// A phase of the protocol begins or continues. Without lanes the watch shows that as the phase, until the end or
    /// [`reconnected`](Watch::reconnected).
    pub(crate) fn entered(&self, phase: &'static str) {
        let now = Instant::now();
        let mut state = self.state();
        match phase {
            CUT => state.cuts.begin(now),
            COMPLETED => state.cuts.end(now),
            _ if state.cuts.since.is_some() => return,
            _ => {}
        }
        self.shows(phase, now, state);
    }

    /// The lanes are open again, in this phase.
    pub(crate) fn reconnected(&self, phase: &'static str) {
        let now = Instant::now();
        let mut state = self.state();
        state.cuts.end(now);
        self.shows(phase, now, state);
    }

    fn shows(&self, phase: &'static str, now: Instant, mut state: MutexGuard<'_, State>) {
        if state.phase == phase {
            return;
        }
        let (before, since) = (state.phase, state.phase_began);
        (state.phase, state.phase_began) = (phase, now);
        if let Some(recorder) = &mut state.recorder {
            recorder.span(self.span(before, since, now));
        }
        drop(state);
        let seconds = (now - since).as_secs_f64();
        tracing::info!(role = self.role.name(), phase = before, seconds, "phase ends");
        tracing::info!(role = self.role.name(), phase, "phase begins");
    }

    fn span(&self, name: &str, begin: Instant, end: Instant) -> Span {
        let seconds = |at: Instant| at.saturating_duration_since(self.began).as_secs_f64();
        Span { name: name.to_owned(), begin_s: seconds(begin), end_s: seconds(end) }
    }

    /// The guest runs at the destination after this downtime.
    pub(crate) fn running(&self, downtime: Duration) {
        self.state().downtime = Some(downtime);
    }

    /// The interval of [`tick`](Watch::tick), at most `most`.
    pub(crate) fn interval(&self, most: Duration) -> Duration {
        let state = self.state();
        let wished = state.recorder.as_ref().map(Recorder::interval_s);
        wished.map_or(most, |seconds| Duration::from_secs_f64(seconds).min(most))
    }

    /// Takes a sample if one is due.
    pub(crate) fn tick(&self) {
        let Some(live) = self.live.get() else { return };
        let now = Instant::now();
        let at_s = (now - self.began).as_secs_f64();
        let mut state = self.state();
        state.pace.note(now, live.counters.moved_here_bytes());
        if let Some(recorder) = state.recorder.as_mut().filter(|recorder| recorder.is_due(at_s)) {
            recorder.sample(sample(&live.counters, at_s), &live.counters.map);
        }
    }

    /// The control thread has read an order.
    pub(crate) fn heard(&self) {
        // Orders of an embedding program are not counted.
        let _ = self.orders.fetch_update(SeqCst, SeqCst, |count| count.checked_sub(1));
    }

    /// Passes the point of no return.
    ///
    /// # Errors
    /// The migration was cancelled before; `otherwise` describes the guest's state.
    pub(crate) fn commit(&self, otherwise: &str) -> Result<()> {
        match self.commitment.compare_exchange(OPEN, COMMITTED, SeqCst, SeqCst) {
            Err(CANCELLED) => Err(Error::Interrupted(otherwise.into())),
            _ => Ok(()),
        }
    }

    /// The finished recording; None without one.
    pub(crate) fn recording(
        &self,
        outcome: std::result::Result<&Completed, &Error>,
    ) -> Option<Recording> {
        let mut state = self.state();
        // The migration ends with its last phase.
        let is_over = state.phase == COMPLETED;
        let end = if is_over { state.phase_began } else { Instant::now() };
        let at_s = (end - self.began).as_secs_f64();
        let last = self.span(state.phase, state.phase_began, end);
        let cuts = (state.cuts.count, state.cuts.total(end).as_secs_f64());
        let recorder = state.recorder.as_mut()?;
        let since = self.began_unix.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut recording = Recording {
            version: env!("CARGO_PKG_VERSION").into(),
            role: self.role.name().into(),
            began_unix_ms: u64::try_from(since.as_millis()).unwrap_or(0),
            seconds: at_s,
            total_bytes: self.live.get().map_or(0, |live| live.total_bytes),
            connection_losses: cuts.0,
            disconnected_s: cuts.1,
            completed: outcome.ok().cloned(),
            error: outcome.err().map(ToString::to_string),
            ..Recording::default()
        };
        if !is_over {
            recorder.span(last);
        }
        if let Some(live) = self.live.get() {
            recorder.sample(sample(&live.counters, at_s), &live.counters.map);
            recorder.give(&mut recording, &live.counters);
        }
        Some(recording)
    }
}

fn sample(counters: &Counters, at_s: f64) -> Sample {
    let data_bytes = counters.data_bytes.load(Relaxed);
    Sample {
        at_s,
        data_bytes,
        crossed_data_bytes: counters.crossed_here_bytes(data_bytes),
        crossed_bytes: counters.moved_here_bytes(),
        zero_bytes: counters.zero_bytes.load(Relaxed),
        hole_bytes: counters.hole_bytes.load(Relaxed),
        pages_demand: counters.pages_demand.load(Relaxed),
        faults_waiting: counters.faults.waiting(),
    }
}

/// For observers.
impl Watch {
    /// The status.
    pub(crate) fn status(&self) -> Status {
        let gone_bytes = self.gone_in_passes();
        let state = self.state();
        let (phase, downtime) = (state.phase, state.downtime);
        let now = Instant::now();
        let (bytes_per_s, is_known) = (state.pace.bytes_per_s(now), state.pace.is_known(now));
        let (connection_losses, disconnected) = (state.cuts.count, state.cuts.total(now));
        let passes = state.passes.view(gone_bytes, now);
        drop(state);
        let mut status = Status {
            role: self.role.name(),
            phase,
            seconds: self.began.elapsed().as_secs_f64(),
            bytes_per_s: bytes_per_s as u64,
            downtime_ms: downtime.map(|downtime| downtime.as_secs_f64() * 1e3),
            pass: passes.pass,
            pass_bytes: passes.pass_bytes,
            remaining_bytes: passes.remaining_bytes,
            dirty_bytes_per_s: passes.dirty_bytes_per_s,
            expected_downtime_ms: passes.expected_downtime_ms,
            max_bandwidth: self.pass_bandwidth().and_then(|limit| limit.limit()),
            max_postcopy_bandwidth: self.bandwidth.as_ref().and_then(|limit| limit.limit()),
            connection_losses,
            disconnected_s: disconnected.as_secs_f64(),
            may_cancel: self.commitment.load(SeqCst) == OPEN,
            ..Status::default()
        };
        let Some(live) = self.live.get() else { return status };
        let counters = &live.counters;
        status.total_bytes = live.total_bytes;
        status.data_bytes = counters.data_bytes.load(Relaxed);
        status.zero_bytes = counters.zero_bytes.load(Relaxed);
        status.hole_bytes = counters.hole_bytes.load(Relaxed);
        status.done_bytes = status.data_bytes + status.zero_bytes + status.hole_bytes;
        status.pages_demand = counters.pages_demand.load(Relaxed);
        status.pages_background = counters.pages_background.load(Relaxed);
        status.faults_waiting = counters.faults.waiting();
        status.precopy_bytes = counters.rounds_bytes.load(Relaxed);
        let left = status.total_bytes.saturating_sub(status.done_bytes) as f64;
        // Only the source knows the bytes that a pass has to send.
        let is_unknown = phase == umem_wire::destination::Phase::Rounds.name();
        status.seconds_left = match passes.pass_bytes {
            Some(_) => passes.seconds_left,
            None => (is_known && bytes_per_s > 0.0 && !is_unknown).then(|| left / bytes_per_s),
        };
        status
    }

    /// The limit of the passes, at a source with passes.
    pub(crate) fn pass_bandwidth(&self) -> Option<&Arc<Bandwidth>> {
        self.passes.get().map(|passes| &passes.limit)
    }

    /// Ends the passes and switches over to postcopy.
    ///
    /// # Errors
    /// The reason why that is impossible, and the alternative.
    pub(crate) fn switch_to_postcopy(&self) -> std::result::Result<(), &'static str> {
        if self.role == Role::Destination {
            return Err(
                "this is the destination, and the source switches to postcopy: send the command to the \
                 control socket of `umem migrate`",
            );
        }
        let Some(passes) = self.passes.get() else {
            return Err(
                "there are no passes to end: this migration has none (-p without --precopy, --stop-first), or has not \
                 connected yet",
            );
        };
        if !passes.postcopy {
            return Err(
                "this migration was started without -p, so all pages arrive before the guest runs at the destination: \
                 cancel it, and start it again with --precopy -p",
            );
        }
        if self.is_committed() {
            return Err("the guest has been switched over already");
        }
        passes.end();
        Ok(())
    }

    /// Bytes of pages that moved, each transfer counted.
    pub(crate) fn moved_bytes(&self) -> u64 {
        self.live.get().map_or(0, |live| live.counters.moved_here_bytes())
    }

    pub(crate) fn counters(&self) -> Option<&Counters> {
        self.live.get().map(|live| &*live.counters)
    }

    /// Whether the migration is beyond the point of no return.
    pub(crate) fn is_committed(&self) -> bool {
        self.commitment.load(SeqCst) == COMMITTED
    }

    /// Orders the control thread to give up the lanes, or to open them again.
    ///
    /// # Errors
    /// The reason why that is impossible.
    pub(crate) fn order(&self, order: LinkOrder) -> std::result::Result<(), &'static str> {
        let Some(tell) = self.link.get() else {
            return Err("there are no connections yet, or the migration cannot open them again");
        };
        if !self.is_committed() {
            return Err(
                "the guest has not been switched over: use cancel, which leaves the guest at the source",
            );
        }
        let waits = |count| (count < ORDERS_MAX).then_some(count + 1);
        if self.orders.fetch_update(SeqCst, SeqCst, waits).is_err() {
            return Err("earlier orders have not been carried out yet: try again");
        }
        tell(order);
        Ok(())
    }

    /// Cancels the migration, as Ctrl-C would.
    ///
    /// # Errors
    /// The reason why that is no longer possible.
    pub(crate) fn cancel(&self) -> std::result::Result<(), &'static str> {
        match self.commitment.compare_exchange(OPEN, CANCELLED, SeqCst, SeqCst) {
            Ok(_) => {
                // Every thread blocks this signal, so it ends any wait of the control thread, through its
                // signalfd.
                kill(Pid::this(), Signal::SIGINT)
                    .map_err(|_| "the signal to the control thread could not be sent")
            }
            Err(CANCELLED) => Ok(()),
            Err(_) => Err(match self.role {
                Role::Source => {
                    "too late: the guest runs at the destination and needs its pages from this side"
                }
                Role::Destination => {
                    "too late: the source may have handed the guest over, and the guest needs the source's pages"
                }
            }),
        }
    }
}

/// A snapshot of a migration, for the control socket and `--json`.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Status {
    pub(crate) role: &'static str,
    pub(crate) phase: &'static str,
    /// Seconds since umem started.
    pub(crate) seconds: f64,
    pub(crate) total_bytes: u64,
    /// Bytes of these that have arrived.
    pub(crate) done_bytes: u64,
    pub(crate) data_bytes: u64,
    pub(crate) zero_bytes: u64,
    pub(crate) hole_bytes: u64,
    pub(crate) pages_demand: u64,
    pub(crate) pages_background: u64,
    /// At the destination: faults that wait for a page.
    pub(crate) faults_waiting: u64,
    /// The rate over the last one to two seconds.
    pub(crate) bytes_per_s: u64,
    /// Time left at this rate; in a pass the time to its end, at the average rate of the pass so far.
    pub(crate) seconds_left: Option<f64>,
    /// At a source with passes while the guest runs: the pass, from 1; the bytes of pages of any kind that it has to
    /// send; the bytes that remain.
    pub(crate) pass: Option<u32>,
    pub(crate) pass_bytes: Option<u64>,
    pub(crate) remaining_bytes: Option<u64>,
    /// Bytes of page contents sent while the guest ran, each transfer counted.
    pub(crate) precopy_bytes: u64,
    /// The rate of guest writes in the last whole pass, each page once.
    pub(crate) dirty_bytes_per_s: Option<u64>,
    /// How long the rest would take with a stopped guest, if the guest waits for the rest.
    pub(crate) expected_downtime_ms: Option<f64>,
    pub(crate) downtime_ms: Option<f64>,
    /// The number of losses of all lanes since the switchover, and the time without lanes.
    pub(crate) connection_losses: u32,
    pub(crate) disconnected_s: f64,
    /// The limit of the passes, if there is one.
    pub(crate) max_bandwidth: Option<u64>,
    /// The limit of the background at the source, if there is one.
    pub(crate) max_postcopy_bandwidth: Option<u64>,
    pub(crate) may_cancel: bool,
}

/// The rate over one to two windows.
struct Pace {
    older: (Instant, u64),
    newer: (Instant, u64),
    now: (Instant, u64),
}

impl Pace {
    fn new(now: Instant) -> Pace {
        Pace { older: (now, 0), newer: (now, 0), now: (now, 0) }
    }

    fn note(&mut self, now: Instant, bytes: u64) {
        // Time before the first byte does not count.
        if self.now.1 == 0 {
            *self = Pace::new(now);
        }
        // Bytes that a lost connection discarded have not been moved.
        if bytes < self.now.1 {
            let at = (now, bytes);
            *self = Pace { older: at, newer: at, now: at };
        }
        self.now = (now, bytes);
        if now - self.newer.0 >= RATE_WINDOW {
            (self.older, self.newer) = (self.newer, self.now);
        }
    }

    /// Whether the rate covers a whole window: an estimate from less would be far off.
    fn is_known(&self, at: Instant) -> bool {
        at.saturating_duration_since(self.older.0) >= RATE_WINDOW
    }

    fn bytes_per_s(&self, at: Instant) -> f64 {
        let seconds = at.saturating_duration_since(self.older.0).as_secs_f64();
        if seconds > 0.0 { (self.now.1 - self.older.1) as f64 / seconds } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cancel_is_refused_beyond_the_point_of_no_return() {
        let watch = Watch::new(Role::Destination, false, None);
        assert!(watch.status().may_cancel);
        watch.commit("it stays").unwrap();
        assert!(watch.cancel().unwrap_err().contains("too late"));
        assert!(!watch.status().may_cancel);
        watch.commit("it stays").unwrap();
    }

    #[test]
    fn cancelled_migration_does_not_commit() {
        // The signal would end the test's process, so the test sets the word itself. The test of the command
        // covers the signal.
        let watch = Watch::new(Role::Source, false, None);
        watch.commitment.store(CANCELLED, SeqCst);
        assert!(watch.cancel().is_ok(), "a second cancel succeeds too");
        let error = watch.commit("the guest continues here").unwrap_err();
        assert!(matches!(error, Error::Interrupted(_)), "{error}");
    }

    #[test]
    fn rate_covers_the_last_seconds() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut pace = Pace::new(start);
        assert_eq!(pace.bytes_per_s(start), 0.0);
        // No bytes for a minute, then 1000 bytes a second, then a stall.
        pace.note(at(60_000), 0);
        for step in 1..=100 {
            pace.note(at(60_000 + 100 * step), 100 * step);
        }
        let rate = pace.bytes_per_s(at(70_000));
        assert!((rate - 1000.0).abs() < 1.0, "{rate}");
        for step in 1..=30 {
            pace.note(at(70_000 + 100 * step), 10_000);
        }
        assert_eq!(pace.bytes_per_s(at(73_000)), 0.0);
        // A lost connection discarded some bytes, which move again.
        pace.note(at(73_100), 4_000);
        assert_eq!(pace.bytes_per_s(at(73_100)), 0.0);
        assert!(!pace.is_known(at(73_200)), "no estimate from a moment");
        pace.note(at(74_100), 5_000);
        assert!(pace.is_known(at(74_100)));
        assert!((pace.bytes_per_s(at(74_100)) - 1000.0).abs() < 1.0);
    }

    /// Pages sent while the guest ran count when they were sent, not when the guest stops.
    #[test]
    fn pages_of_passes_count_in_the_rate_when_they_are_sent() {
        let watch = Watch::new(Role::Source, true, None);
        let counters = Arc::new(Counters::of([1 << 20].into_iter()));
        watch.attach(counters.clone(), 1 << 20);
        Counters::add(&counters.rounds_bytes, 3 << 18);
        Counters::add(&counters.rounds_page_bytes, 3 << 19);
        watch.tick();
        let before = sample(&counters, 1.0);
        for counter in [&counters.data_bytes, &counters.settled_bytes] {
            Counters::add(counter, 1 << 19);
        }
        Counters::add(&counters.hole_bytes, 1 << 18);
        Counters::add(&counters.settled_page_bytes, 3 << 18);
        let after = sample(&counters, 2.0);
        assert_eq!((before.data_bytes, after.data_bytes), (0, 1 << 19));
        let crossed = |sample: &Sample| (sample.crossed_data_bytes, sample.crossed_bytes);
        assert_eq!([crossed(&before), crossed(&after)], [(3 << 18, 3 << 19); 2]);
    }

    /// A process that takes over has most of the guest from the beginning, and no rate from that.
    #[test]
    fn bytes_of_an_earlier_process_are_in_no_rate() {
        let watch = Watch::new(Role::Source, true, None);
        let counters = Arc::new(Counters::of([1 << 30].into_iter()));
        watch.attach(counters.clone(), 1 << 30);
        watch.tick();
        counters.set(&umem_wire::Totals { data_bytes: 900 << 20, ..Default::default() });
        watch.tick();
        let status = watch.status();
        assert_eq!((status.done_bytes, status.bytes_per_s), (900 << 20, 0));
        assert_eq!(status.seconds_left, None);
        assert_eq!(watch.moved_bytes(), 0);
        let sample = sample(&counters, 1.0);
        assert_eq!((sample.crossed_bytes, sample.crossed_data_bytes), (0, 0));
        assert_eq!(sample.data_bytes, 900 << 20);
    }

    #[test]
    fn loss_is_counted_once_despite_phase_changes() {
        let watch = Watch::new(Role::Destination, true, None);
        watch.attach(Arc::new(Counters::of([1 << 20].into_iter())), 1 << 20);
        let cuts = || (watch.status().connection_losses, watch.status().phase);
        watch.entered("loading");
        assert_eq!(cuts(), (0, "loading"));
        assert_eq!(watch.status().disconnected_s, 0.0);
        for count in 1..=2 {
            watch.entered(CUT);
            watch.entered("running");
            watch.entered(CUT);
            assert_eq!(cuts(), (count, CUT));
            watch.reconnected("running");
            assert_eq!(cuts(), (count, "running"));
        }
        let so_far = watch.status().disconnected_s;
        assert!(
            so_far > 0.0 && watch.status().disconnected_s == so_far,
            "the total does not change"
        );
        watch.entered(CUT);
        watch.entered("completed");
        assert_eq!(cuts(), (3, "completed"));
        let recording = watch.recording(Err(&Error::Internal("why".into()))).unwrap();
        assert_eq!((recording.connection_losses, recording.phases.len()), (3, 7));
    }

    #[test]
    fn phases_are_recorded_in_order() {
        let watch = Watch::new(Role::Source, true, None);
        let counters = Arc::new(Counters::of([1 << 20].into_iter()));
        watch.attach(counters.clone(), 1 << 20);
        for phase in ["ready", "ready", "serving pages"] {
            watch.entered(phase);
        }
        watch.tick();
        let recording = watch.recording(Err(&Error::Internal("why".into()))).unwrap();
        let names: Vec<&str> = recording.phases.iter().map(|span| &*span.name).collect();
        assert_eq!(names, ["connecting", "ready", "serving pages"]);
        assert!(recording.phases.windows(2).all(|pair| pair[0].end_s == pair[1].begin_s));
        assert_eq!(recording.phases[2].end_s, recording.seconds);
        assert!(!recording.samples.is_empty() && recording.map.cells.len() == 16);
        assert!(recording.error.is_some() && recording.completed.is_none());
        assert!(
            Watch::new(Role::Source, false, None)
                .recording(Err(&Error::Usage("".into())))
                .is_none()
        );
    }
}
