//! The channel between the control thread and the program: events one way, answers the other.
//!
//! The control thread never waits here: it queues an event and signals the eventfd; the program takes the event when
//! convenient. A question stays open until the program answers; the answer goes straight to the control thread's inbox.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use umem_wire::RegionId;

use super::{Event, Failure, Guest, Stats};
use crate::error::{Context, Error, Result};
use crate::events::{self, Place};
use crate::host::embedder::{Answers, Embedder, LinkOrder, Orders};
use crate::host::monitor::{Answer, Question};
use crate::memory::dirty::DirtyMap;
use crate::observe::output::Output;
use crate::runtime::inbox::Canceller;
use crate::runtime::polling::poll;
use crate::statistics::{Completed, Counters};
use crate::transport::lane::ShutdownHandle;

pub(crate) struct HostChannel {
    desk: Mutex<ChannelState>,
    /// The number of queued events.
    bell: EventFd,
    /// With precopy: where any thread marks the guest's writes.
    marks: OnceLock<Arc<DirtyMap>>,
    /// Whether the program has a log of its guest's writes, and gets [`Event::ReadLog`].
    has_log: bool,
    ended: Condvar,
    canceller: Canceller,
}

#[derive(Default)]
struct ChannelState {
    events: VecDeque<Event>,
    open: Option<Open>,
    answers: Option<Arc<Answers>>,
    /// The source's guest was asked to stop.
    stop_asked: bool,
    /// The guest was asked to continue afterwards.
    resume_asked: bool,
    /// The program has reported that the guest stands still.
    has_stopped: bool,
    /// The destination's guest was asked to run: it belongs to that side.
    run_asked: bool,
    counters: Option<(Arc<Counters>, u64)>,
    lanes: ShutdownHandle,
    /// The number of connections to reopen, while lanes can be given up and reopened.
    orders: Option<(u16, Arc<Orders>)>,
    /// The last event is queued.
    has_failed: bool,
    has_ended: bool,
}

/// A question without an answer so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Open {
    ReadLog,
    Stop,
    Save,
    Load,
    Run,
}

impl Open {
    /// A request to the program.
    fn name(self) -> &'static str {
        match self {
            Open::ReadLog => "read its log",
            Open::Stop => "stop",
            Open::Save => "save",
            Open::Load => "load",
            Open::Run => "run",
        }
    }
}

impl HostChannel {
    pub(crate) fn new() -> Result<HostChannel> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE;
        Ok(HostChannel {
            desk: Mutex::default(),
            bell: EventFd::from_flags(flags).context(|| "eventfd")?,
            marks: OnceLock::new(),
            has_log: false,
            ended: Condvar::new(),
            canceller: Canceller::new()?,
        })
    }

    /// The same, for a program that has a log of its guest's writes.
    pub(crate) fn with_log(self, has_log: bool) -> HostChannel {
        HostChannel { has_log, ..self }
    }

    fn state(&self) -> MutexGuard<'_, ChannelState> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, state: &mut ChannelState, event: Event) {
        // Connections may come and go often while the program takes no events: of consecutive connection events only
        // the last is kept.
        if event.is_of_link()
            && let Some(last) = state.events.back_mut().filter(|last| last.is_of_link())
        {
            *last = event;
            return;
        }
        state.events.push_back(event);
        // The queue holds a handful of events.
        let _ = self.bell.write(1);
    }
}

/// For the control thread.
impl Embedder for HostChannel {
    fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// Where answers go from here on.
    fn answers(&self, post: Answers) {
        self.state().answers = Some(Arc::new(post));
    }

    /// Every lane is open.
    fn connected(&self, lanes: ShutdownHandle) {
        let mut state = self.state();
        state.lanes = lanes;
        self.put(&mut state, Event::Connected);
    }

    /// The lanes to end if the migration is cut off.
    fn connected_by(&self, lanes: ShutdownHandle) {
        self.state().lanes = lanes;
    }

    /// From here on lanes can be given up and reopened, over `connections` connections.
    fn takes_orders(&self, connections: u16, post: Orders) {
        self.state().orders = Some((connections, Arc::new(post)));
    }

    /// The counters from here on, and the size of the guest's memory in bytes.
    fn watch(&self, counters: Arc<Counters>, total_bytes: u64) {
        self.state().counters = Some((counters, total_bytes));
    }

    fn ask(&self, question: Question) {
        let mut state = self.state();
        let (open, event) = match question {
            // The program learns the events in advance and may act freely.
            Question::Prepare => return,
            Question::Track(marks) => {
                self.marks.get_or_init(|| marks);
                return answer_at_once(state, Answer::Tracking(Ok(())));
            }
            Question::Look if self.has_log => (Open::ReadLog, Event::ReadLog),
            // The program reports writes as they happen.
            Question::Look => return answer_at_once(state, Answer::Looked(Ok(()))),
            Question::Stop => {
                state.stop_asked = true;
                (Open::Stop, Event::Stop)
            }
            Question::Save => (Open::Save, Event::SaveState),
            Question::Load(state) => (Open::Load, Event::LoadState(state)),
            Question::Run => {
                state.run_asked = true;
                (Open::Run, Event::Run)
            }
            // Only the program can run its guest.
            Question::StandsStill => return answer_at_once(state, Answer::StandsStill(Ok(()))),
            Question::PutBack => return answer_at_once(state, Answer::PutBack(Ok(()))),
            // The failure that follows carries the reason.
            Question::Resume => {
                state.resume_asked = true;
                return answer_at_once(state, Answer::Resumed(Ok(())));
            }
        };
        state.open = Some(open);
        self.put(&mut state, event);
    }

    /// The observer of events other than questions and the end.
    fn output(self: Arc<HostChannel>) -> Output {
        let desk = self;
        Output::Host(Arc::new(move |event| {
            let event = match event {
                // The guest continues now. Notifying the destination may take a while, because the source dials it.
                events::Event::Telling { lane, reason, .. } => {
                    let (lane, what) = (lane.clone(), reason.clone());
                    let error = Error::Lost { side: "destination", lane, what };
                    return desk.fail(&mut desk.state(), error);
                }
                // The destination's program initiated that itself.
                &events::Event::Running { place: Place::Source, downtime } => {
                    Event::Running { downtime }
                }
                events::Event::Recovering { reason, .. } => {
                    Event::Recovering { reason: reason.clone() }
                }
                events::Event::Paused { reason, .. } => Event::Paused { reason: reason.clone() },
                &events::Event::Resumed { disconnected, .. } => Event::Resumed { disconnected },
                _ => return,
            };
            desk.put(&mut desk.state(), event);
        }))
    }
}

/// For the thread that runs a migration.
impl HostChannel {
    /// Whether the guest belongs to this side, a destination, and misses pages.
    pub(crate) fn guest_waits(&self) -> bool {
        let state = self.state();
        let missing = state.stats().missing_bytes;
        state.run_asked && (state.counters.is_none() || missing > 0)
    }

    /// The last event, if it is a failure.
    fn fail(&self, state: &mut ChannelState, error: Error) {
        if std::mem::replace(&mut state.has_failed, true) {
            return;
        }
        let is_committed = state.run_asked || (state.stop_asked && !state.resume_asked);
        let guest = if is_committed { Guest::AtDestination } else { Guest::AtSource };
        self.put(state, Event::Failed(Failure { error, guest }));
    }

    /// No thread of the migration runs any more: queues the last event, unless it is queued already.
    pub(crate) fn end(&self, result: Result<Completed>) {
        let mut state = self.state();
        state.open = None;
        state.answers = None;
        state.orders = None;
        match result {
            Ok(report) => self.put(&mut state, Event::Completed(Box::new(report))),
            Err(error) => self.fail(&mut state, error),
        }
        state.has_ended = true;
        self.ended.notify_all();
    }
}

/// For the program.
impl HostChannel {
    pub(crate) fn event_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    pub(crate) fn next_event(&self) -> Option<Event> {
        let mut state = self.state();
        let event = state.events.pop_front()?;
        let _ = self.bell.read();
        Some(event)
    }

    /// Waits for an event, no longer than `timeout` if there is one.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> Result<Option<Event>> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            if let Some(event) = self.next_event() {
                return Ok(Some(event));
            }
            let left = match deadline {
                None => PollTimeout::NONE,
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(None);
                    }
                    // Rounded up, so that the last wait is no busy loop.
                    PollTimeout::try_from(left.as_micros().div_ceil(1000))
                        .unwrap_or(PollTimeout::MAX)
                }
            };
            match poll(&mut [PollFd::new(self.bell.as_fd(), PollFlags::POLLIN)], left) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context(|| "poll"),
            }
        }
    }

    /// Marks writes of the guest, or on its behalf, to ranges that the region has: (offset, length) in bytes.
    ///
    /// # Errors
    /// [`Error::Usage`] after the guest was reported to stand still: the remaining pages have been counted.
    pub(crate) fn written(
        &self,
        region: u16,
        ranges: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<()> {
        // Before that every page is dirty.
        let Some(marks) = self.marks.get() else { return Ok(()) };
        for (offset, len) in ranges {
            let is_there = marks.mark_bytes(RegionId(region), offset, len);
            debug_assert!(is_there, "its bytes have been looked at");
        }
        let state = self.state();
        match state.has_stopped && !state.resume_asked {
            true => Err(Error::Usage(
                "the guest was reported to stand still, and its writes until then are sent: report each write \
                 before the answer to the stop"
                    .into(),
            )),
            false => Ok(()),
        }
    }

    /// Takes the answer to the question `expected`; `answer` runs only if that question is open.
    pub(crate) fn answer(&self, expected: Open, answer: impl FnOnce() -> Answer) -> Result<()> {
        let mut state = self.state();
        if state.open != Some(expected) {
            return Err(not_asked(expected.name()));
        }
        state.has_stopped |= expected == Open::Stop;
        state.answer(answer());
        Ok(())
    }

    /// Rejects the open question with this reason.
    pub(crate) fn refuse(&self, why: &str) -> Result<()> {
        let mut state = self.state();
        let failed = Error::Host(why.split_whitespace().collect::<Vec<_>>().join(" "));
        let answer = match state.open {
            Some(Open::ReadLog) => Answer::Looked(Err(failed)),
            Some(Open::Stop) => Answer::Stopped(Err(failed)),
            Some(Open::Save) => Answer::Saved(Err(failed)),
            Some(Open::Load) => Answer::Loaded(Err(failed)),
            Some(Open::Run) => Answer::Running(Err(failed)),
            None => return Err(not_asked("do anything")),
        };
        state.answer(answer);
        Ok(())
    }

    /// Has the lanes given up or reopened.
    pub(crate) fn order(&self, order: LinkOrder) -> Result<()> {
        let orders = self.state().orders.clone();
        let (connections, post) = orders.ok_or_else(|| {
            Error::Usage("there are no connections yet, or the migration has ended".into())
        })?;
        if let LinkOrder::Reconnect(sockets) = &order
            && sockets.len() != usize::from(connections)
        {
            return Err(Error::Usage(format!(
                "{} connections: this migration began with {connections} and continues with as many",
                sockets.len()
            )));
        }
        post(order)
    }

    pub(crate) fn stats(&self) -> Stats {
        self.state().stats()
    }

    /// False if the thread has not ended after `patience`.
    pub(crate) fn wait_for_end(&self, patience: Duration) -> bool {
        let running = |state: &mut ChannelState| !state.has_ended;
        let waited = self.ended.wait_timeout_while(self.state(), patience, running);
        waited.unwrap_or_else(PoisonError::into_inner).0.has_ended
    }

    /// Ends every send and receive.
    pub(crate) fn cut_lanes(&self) {
        self.state().lanes.sever();
    }
}

impl ChannelState {
    fn answer(&mut self, answer: Answer) {
        self.open = None;
        if let Some(answers) = &self.answers {
            answers(answer);
        }
    }

    fn stats(&self) -> Stats {
        let Some((counters, total_bytes)) = &self.counters else { return Stats::default() };
        let totals = counters.totals();
        Stats {
            total_bytes: *total_bytes,
            missing_bytes: total_bytes.saturating_sub(totals.bytes()),
            data_bytes: totals.data_bytes,
            zero_bytes: totals.zero_bytes,
            hole_bytes: totals.hole_bytes,
            pages_demand: totals.pages_demand,
            pages_background: totals.pages_background,
            checksum_errors: counters.checksum_errors.load(Relaxed),
        }
    }
}

/// For questions that the program does not have to answer.
fn answer_at_once(state: MutexGuard<'_, ChannelState>, answer: Answer) {
    let answers = state.answers.clone();
    drop(state);
    if let Some(answers) = answers {
        answers(answer);
    }
}

fn not_asked(what: &str) -> Error {
    Error::Usage(format!(
        "umem has not asked to {what}: answer each event once, after it has arrived and before the migration ends"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desk() -> (HostChannel, std::sync::mpsc::Receiver<Answer>) {
        let (sender, receiver) = std::sync::mpsc::channel();
        let desk = HostChannel::new().unwrap();
        desk.answers(Box::new(move |answer| sender.send(answer).unwrap()));
        (desk, receiver)
    }

    fn is_readable(desk: &HostChannel) -> bool {
        let mut fds = [PollFd::new(desk.event_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn descriptor_is_readable_while_events_are_queued() {
        let (desk, _answers) = desk();
        assert!(!is_readable(&desk));
        desk.ask(Question::Stop);
        desk.ask(Question::Save);
        for _ in 0..2 {
            assert!(is_readable(&desk));
            desk.next_event().unwrap();
        }
        assert!(!is_readable(&desk) && desk.next_event().is_none());
    }

    #[test]
    fn answer_is_accepted_once_and_only_for_an_open_question() {
        let (desk, answers) = desk();
        let saved = || Answer::Saved(Ok(Vec::new()));
        assert!(desk.answer(Open::Save, saved).is_err() && desk.refuse("why").is_err());
        desk.ask(Question::Save);
        assert!(desk.answer(Open::Stop, || Answer::Stopped(Ok(None))).is_err());
        desk.answer(Open::Save, saved).unwrap();
        assert!(desk.answer(Open::Save, saved).is_err());
        desk.ask(Question::Run);
        desk.refuse("two\nlines").unwrap();
        let answers: Vec<_> = answers.try_iter().collect();
        let [Answer::Saved(Ok(_)), Answer::Running(Err(error))] = &answers[..] else { panic!() };
        assert!(error.to_string().contains("two lines"), "{error}");
    }

    #[test]
    fn writes_reported_after_the_stop_are_refused() {
        let (desk, _answers) = desk();
        let marks = Arc::new(DirtyMap::new(&[(4, 12)]));
        let is_refused = || desk.written(0, [(4096, 1)]).is_err();
        assert!(!is_refused(), "no pass tracks writes yet");
        desk.ask(Question::Track(marks.clone()));
        assert!(!is_refused() && marks.bytes() == 4096);
        desk.ask(Question::Stop);
        assert!(!is_refused(), "the last writes");
        desk.answer(Open::Stop, || Answer::Stopped(Ok(None))).unwrap();
        assert!(is_refused());
        desk.ask(Question::Resume);
        assert!(!is_refused(), "the guest continues");
    }

    #[test]
    fn program_with_a_log_gets_a_read_log_event() {
        let (desk, answers) = desk();
        desk.ask(Question::Look);
        assert!(matches!(answers.try_recv(), Ok(Answer::Looked(Ok(())))) && !is_readable(&desk));
        let desk = desk.with_log(true);
        desk.ask(Question::Look);
        assert!(answers.try_recv().is_err() && matches!(desk.next_event(), Some(Event::ReadLog)));
        desk.answer(Open::ReadLog, || Answer::Looked(Ok(()))).unwrap();
        assert!(matches!(answers.try_recv(), Ok(Answer::Looked(Ok(())))));
        desk.ask(Question::Look);
        desk.refuse("it overran").unwrap();
        assert!(matches!(answers.try_recv(), Ok(Answer::Looked(Err(_)))));
    }

    #[test]
    fn only_the_latest_connection_event_is_queued() {
        let desk = Arc::new(desk().0);
        let Output::Host(tell) = desk.clone().output() else { unreachable!() };
        let place = Place::Destination;
        let reason = || "why".to_owned();
        let disconnected = Duration::from_millis(1500);
        for recoveries in 0..1000 {
            let route = events::Route::Waits { pages_missing: 1 };
            tell(&events::Event::Recovering { reason: reason(), route });
            tell(&events::Event::Resumed { place, disconnected, recoveries });
        }
        desk.ask(Question::Run);
        tell(&events::Event::Paused { reason: reason(), pause: events::Pause::Ordered });
        tell(&events::Event::Running { place, downtime: Duration::ZERO });
        let events: Vec<_> = std::iter::from_fn(|| desk.next_event()).collect();
        let [Event::Resumed { disconnected }, Event::Run, Event::Paused { reason }] = &events[..]
        else {
            panic!("{events:?}")
        };
        assert_eq!((disconnected.as_millis(), reason.as_str()), (1500, "why"));
        assert!(!is_readable(&desk));
    }

    #[test]
    fn cancelled_guest_continues_before_the_destination_is_notified() {
        let (desk, _answers) = desk();
        let desk = Arc::new(desk);
        let Output::Host(tell) = desk.clone().output() else { unreachable!() };
        desk.ask(Question::Stop);
        desk.ask(Question::Resume);
        let uri = crate::transport::uri::Uri::Tcp { host: "host".into(), port: 1 };
        let (lane, reason) = ("demand lane".into(), "why".into());
        tell(&events::Event::Telling { uri, lane, reason });
        desk.end(Err(Error::Interrupted("reported already".into())));
        let events: Vec<_> = std::iter::from_fn(|| desk.next_event()).collect();
        let [Event::Stop, Event::Failed(failure)] = &events[..] else { panic!("{events:?}") };
        assert_eq!(failure.guest, Guest::AtSource);
        assert!(failure.error.to_string().contains("(demand lane): why"), "{}", failure.error);
    }

    #[test]
    fn orders_are_accepted_while_the_migration_thread_runs() {
        let (desk, _answers) = desk();
        let refused = |desk: &HostChannel, order| desk.order(order).unwrap_err().to_string();
        assert!(refused(&desk, LinkOrder::Pause).contains("no connections yet"));
        desk.takes_orders(2, Box::new(|_| Ok(())));
        desk.order(LinkOrder::Pause).unwrap();
        assert!(refused(&desk, LinkOrder::Reconnect(Vec::new())).contains("0 connections"));
        desk.end(Err(Error::Interrupted("why".into())));
        assert!(refused(&desk, LinkOrder::Resume).contains("has ended"));
    }

    #[test]
    fn failure_names_the_owner_of_the_guest() {
        use Question::{Load, Resume, Run, Save, Stop};

        for (questions, guest) in [
            (vec![], Guest::AtSource),
            (vec![Stop, Resume], Guest::AtSource),
            (vec![Stop, Save, Resume], Guest::AtSource),
            (vec![Stop, Save], Guest::AtDestination),
            (vec![Load(Vec::new())], Guest::AtSource),
            (vec![Load(Vec::new()), Run], Guest::AtDestination),
        ] {
            let (desk, _answers) = desk();
            questions.into_iter().for_each(|question| desk.ask(question));
            desk.end(Err(Error::Interrupted("why".into())));
            let last = std::iter::from_fn(|| desk.next_event()).last();
            let Some(Event::Failed(failure)) = last else { panic!("{last:?}") };
            assert_eq!(failure.guest, guest);
        }
    }
}
