//! A destination with a source of a few rules. umem is killed and lanes are lost between any two effects.
//!
//! The guest must never run on both sides, and never be lost before it has all of its memory. At the end both sides
//! know the owner of the guest, or a record and a waiting guest are left for a takeover.

use std::collections::VecDeque;
use std::panic::catch_unwind;
use std::time::{Duration, Instant};

use umem_wire::destination::Mode;
use umem_wire::{Event as Heard, Fault, FaultCode, Frame, LaneRole, Totals};

use super::super::takeover::{Found, Plan, Recalled, plan};
use super::super::{Core, Effect, Entrance, Input, Memory, Moment, Outcome, Process, Record};
use super::{landing, lost, terms};
use crate::error::Error;
use crate::session::DestinationState;

/// The blow to umem or its lanes before the effect of this number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blow {
    /// SIGKILL.
    Kill,
    /// All lanes are lost.
    Cut,
    /// Ctrl-C, or SIGTERM.
    Interrupt,
    /// A thread fails.
    Fail,
}

/// The state of the source's guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// It belongs to the source, stopped or running.
    Holds,
    /// It has been given away: a switchover may be in transit.
    Gave,
    /// It has been resumed at the source, because the destination failed before the switchover.
    Resumed,
    /// The destination has all of it.
    Done,
    /// The source knows that the guest has ended.
    Mourns,
}

/// The guest's process at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guest {
    /// It ends with umem.
    Bound,
    /// It waits if umem is killed, and ends when umem exits.
    Held,
    /// It waits for a takeover.
    Kept,
    /// It has all of its memory.
    Free,
    Ended,
}

/// The kind of migration.
#[derive(Clone, Copy, Debug)]
struct Kind {
    is_private: bool,
    /// Pages are sent before the stop, too.
    has_rounds: bool,
}

const SHARED: Kind = Kind { is_private: false, has_rounds: false };
const PRIVATE: Kind = Kind { is_private: true, has_rounds: false };
const ROUNDS: Kind = Kind { is_private: false, has_rounds: true };

struct World {
    source: Source,
    guest: Guest,
    runs: bool,
    pages_missing: u64,
    record: Option<(DestinationState, Recalled)>,
    /// Lanes are up. Below are the frames and inputs in transit on them.
    is_connected: bool,
    to_source: VecDeque<Frame>,
    to_core: VecDeque<Input>,
    /// Other inputs of the core.
    notes: VecDeque<Input>,
    outcome: Option<Outcome>,
    now: Instant,
    /// The events so far, if they are to be printed.
    trace: Option<Vec<String>>,
    kind: Kind,
    /// How often the core could only wait.
    waits: u32,
    /// The number of effects so far, and the blows to come.
    done: usize,
    blows: Vec<(usize, Blow)>,
}

impl World {
    fn new(kind: Kind, blows: &[(usize, Blow)], is_traced: bool) -> World {
        World {
            source: Source::Holds,
            guest: Guest::Bound,
            runs: false,
            pages_missing: 7,
            record: None,
            is_connected: true,
            to_source: VecDeque::new(),
            to_core: VecDeque::new(),
            notes: VecDeque::new(),
            outcome: None,
            now: Instant::now(),
            trace: is_traced.then(Vec::new),
            kind,
            waits: 0,
            done: 0,
            blows: blows.to_vec(),
        }
    }

    fn note(&mut self, what: std::fmt::Arguments<'_>) {
        if let Some(trace) = &mut self.trace {
            trace.push(what.to_string());
        }
    }

    /// In between only the source knows the owner of the guest. The guest never runs on both sides.
    fn check(&self) {
        let at_source = matches!(self.source, Source::Holds | Source::Resumed);
        assert!(!(self.runs && at_source), "it runs twice: {:#?}", self.trace);
        let is_here = self.guest != Guest::Ended;
        let is_whole = matches!(self.source, Source::Done);
        assert!(at_source || is_here || is_whole, "the guest is lost: {:#?}", self.trace);
    }

    /// Runs umem at the destination until its end. Returns true if it was killed.
    fn live(&mut self, mut core: Core, first: Input) -> bool {
        let mut inputs = VecDeque::from([first]);
        loop {
            let Some(input) = inputs.pop_front().or_else(|| self.next_input()) else {
                // No further event is due: time passes.
                self.now += Duration::from_secs(60);
                self.waits += 1;
                assert!(self.waits < 100, "it never ends: {:#?}", self.trace);
                inputs.push_back(Input::Tick);
                continue;
            };
            self.note(format_args!("{input:?}"));
            for effect in core.handle(input, &self.at()) {
                self.done += 1;
                if let Some(at) = self.blows.iter().position(|&(at, _)| at == self.done) {
                    let (_, blow) = self.blows.remove(at);
                    self.note(format_args!("{blow:?}"));
                    match blow {
                        Blow::Kill => {
                            self.kill();
                            return true;
                        }
                        Blow::Cut => self.cut(),
                        Blow::Interrupt => self.notes.push_back(Input::Interrupt),
                        Blow::Fail => {
                            let error = Error::Internal("a panic".into());
                            self.notes.push_back(Input::Failed(error));
                        }
                    }
                }
                self.note(format_args!("-> {effect:?}"));
                inputs.extend(self.carry_out(effect));
                self.check();
            }
            if self.outcome.is_some() {
                self.end();
                return false;
            }
        }
    }

    fn at(&self) -> Moment {
        let memory = Memory { pages_missing: self.pages_missing, ..Memory::default() };
        Moment { at: self.now, moved_bytes: 0, checksum_errors: 0, memory }
    }

    fn next_input(&mut self) -> Option<Input> {
        if let Some(note) = self.notes.pop_front() {
            return Some(note);
        }
        if let Some(heard) = self.to_core.pop_front() {
            return Some(heard);
        }
        let frame = self.to_source.pop_front()?;
        self.source_hears(&frame);
        Some(Input::Tick)
    }

    fn say(&mut self, heard: Heard) {
        self.to_core.push_back(Input::Received(heard));
    }

    fn source_hears(&mut self, frame: &Frame) {
        self.note(format_args!("source hears {frame:?}"));
        match (self.source, frame) {
            (Source::Holds, Frame::Ready(_)) if self.kind.has_rounds => {
                self.say(Heard::Rounds);
                self.say(Heard::Remaining { runs: Vec::new(), last: false });
                self.say(Heard::Remaining { runs: Vec::new(), last: true });
                self.notes.push_back(Input::RoundsEnded);
            }
            (Source::Holds, Frame::Ready(_) | Frame::Settled) => {
                self.say(Heard::Stopped { postcopy: true, background: true });
                self.say(Heard::DeviceState(vec![1, 2]));
                self.say(Heard::Load { state_bytes: 2 });
            }
            (Source::Holds, Frame::Loaded) => {
                self.source = Source::Gave;
                self.say(Heard::Switchover { stopped_us: 3 });
            }
            (Source::Gave, Frame::Running { .. }) => self.send_pages(),
            (Source::Gave, Frame::Resume(standing)) => match standing {
                standing if !standing.switched => self.say(Heard::Switchover { stopped_us: 3 }),
                standing if standing.running.is_some() => self.send_pages(),
                _ => {}
            },
            (Source::Gave | Source::Done, Frame::Complete(_)) => {
                self.source = Source::Done;
                self.say(Heard::Complete(Totals::default()));
            }
            (Source::Resumed, Frame::Resume(_)) => {
                let text = "the guest continues at the source".into();
                self.say(Heard::Error(Fault { code: FaultCode::Cancelled, text }));
            }
            (Source::Holds, Frame::Error(_)) => self.source = Source::Resumed,
            (Source::Gave, Frame::Error(fault)) if fault.code == FaultCode::Ended => {
                self.source = Source::Mourns;
            }
            _ => {}
        }
        self.check();
    }

    fn send_pages(&mut self) {
        if self.pages_missing > 0 {
            self.pages_missing = 0;
            self.notes.push_back(Input::AllCached);
        }
    }

    /// Drops everything in transit. A source that still has its guest continues with it.
    fn cut(&mut self) {
        if !std::mem::replace(&mut self.is_connected, false) {
            return;
        }
        self.to_source.clear();
        self.to_core.clear();
        self.notes.push_back(lost(LaneRole::Demand));
        self.source_is_cut();
    }

    fn source_is_cut(&mut self) {
        if self.source == Source::Holds {
            self.source = Source::Resumed;
        }
    }

    fn kill(&mut self) {
        self.is_connected = false;
        self.to_source.clear();
        self.to_core.clear();
        self.notes.clear();
        self.source_is_cut();
        if self.guest == Guest::Bound {
            self.guest = Guest::Ended;
            self.runs = false;
        }
        self.check();
    }

    /// A source that waits for a destination opens its lanes again.
    fn dial(&mut self) {
        if matches!(self.source, Source::Gave | Source::Resumed | Source::Done) {
            self.notes.push_back(Input::Came);
        }
    }

    fn write(&mut self, record: Record) {
        let before = self.record.take().map(|(_, recalled)| recalled);
        let mode = Mode { postcopy: true, background: true };
        let mut recalled = before.unwrap_or(Recalled {
            state: record.state(),
            mode,
            stopped_us: 0,
            switched: None,
            running: None,
        });
        recalled.state = record.state();
        match record {
            Record::Switched { stopped_us, at } => {
                (recalled.stopped_us, recalled.switched) = (stopped_us, Some(at));
            }
            Record::Running { at } => recalled.running = Some(at),
            Record::Loaded { .. } | Record::Complete { .. } | Record::Parted => {}
        }
        self.record = Some((record.state(), recalled));
    }

    fn carry_out(&mut self, effect: Effect) -> Option<Input> {
        match effect {
            Effect::SettlePages => return Some(Input::PagesSettled),
            Effect::Load(_) => self.notes.push_back(Input::Loaded { runs: true }),
            Effect::Run => {
                self.runs = true;
                self.notes.push_back(Input::Running);
            }
            Effect::Commit => return Some(Input::Committed),
            Effect::Persist(record) => self.write(record),
            Effect::Hold => {
                self.guest = Guest::Held;
                return Some(Input::Held);
            }
            Effect::Doom => self.guest = Guest::Held,
            Effect::Keep | Effect::LetWait if self.guest != Guest::Free => {
                self.guest = Guest::Kept;
            }
            Effect::TakeUp => return Some(Input::TakenUp),
            Effect::TouchTheRest => self.notes.push_back(Input::AllReleased),
            Effect::Unregister => {
                return Some(Input::Unregistered { exit: None, unmapped_bytes: 0 });
            }
            Effect::Free => self.guest = Guest::Free,
            Effect::Send(frame) if self.is_connected => self.to_source.push_back(frame),
            Effect::SendCompletion if self.is_connected => {
                self.to_source.push_back(Frame::Complete(Totals::default()));
            }
            Effect::Sever => {
                self.is_connected = false;
                self.to_source.clear();
                self.to_core.clear();
                self.source_is_cut();
                self.notes.push_back(Input::Quiet);
                self.dial();
            }
            Effect::Settle => return Some(Input::Settled),
            Effect::Reconnect { standing, is_complete } => {
                self.is_connected = true;
                self.to_source.push_back(Frame::Resume(standing));
                if is_complete {
                    self.to_source.push_back(Frame::Complete(Totals::default()));
                }
            }
            Effect::SeekCause(error) => {
                let process = match self.guest {
                    Guest::Ended => Process::Gone,
                    Guest::Bound | Guest::Held => Process::EndsWithUs,
                    Guest::Kept | Guest::Free => Process::Stays,
                };
                return Some(Input::Cause { error, process });
            }
            Effect::EndThreads { told, .. } => {
                if self.is_connected {
                    self.to_source.extend(told.map(Frame::Error));
                    while let Some(frame) = self.to_source.pop_front() {
                        self.source_hears(&frame);
                    }
                    self.source_is_cut();
                    self.is_connected = false;
                }
                return Some(Input::ThreadsEnded);
            }
            Effect::Release => return Some(Input::Released),
            Effect::EndGuest if matches!(self.guest, Guest::Bound | Guest::Held) => {
                (self.guest, self.runs) = (Guest::Ended, false);
            }
            Effect::Forget => self.record = None,
            Effect::Finish(outcome) => self.outcome = Some(outcome),
            _ => {}
        }
        None
    }

    /// umem exits.
    fn end(&mut self) {
        if matches!(self.guest, Guest::Bound | Guest::Held) {
            self.guest = Guest::Ended;
            self.runs = false;
        }
        self.is_connected = false;
        self.to_source.clear();
        self.to_core.clear();
        self.notes.clear();
        self.check();
    }

    /// Takes over, as many times as needed.
    fn resume(&mut self) {
        while let Some((state, recalled)) = self.record {
            self.outcome = None;
            let guest = self.guest;
            self.note(format_args!("--resume, {state:?}, {guest:?}"));
            let found = match self.guest {
                Guest::Ended => Found::Ended,
                _ => Found::Waiting(()),
            };
            match plan(state, found) {
                Plan::Serve(()) => {
                    // The guest's process is no child of this umem, so it ends with this umem only on an order.
                    if self.guest == Guest::Held {
                        self.guest = Guest::Kept;
                    }
                    let core = Core::recalled(
                        super::SessionPolicy { is_private: self.kind.is_private, ..terms() },
                        &recalled,
                        self.now,
                    );
                    self.dial();
                    if !self.live(core, Input::TakeOver) && self.record.is_some() {
                        return;
                    }
                }
                Plan::Release(()) => {
                    self.guest = Guest::Free;
                    self.record = None;
                }
                Plan::Nothing => self.record = None,
                Plan::TellOfCompletion => {
                    self.source = Source::Done;
                    self.record = None;
                }
                Plan::TellOfEnd => {
                    assert_ne!(self.source, Source::Gave, "the guest is lost: {:#?}", self.trace);
                    self.record = None;
                }
            }
            self.check();
        }
    }

    /// Where the guest is at the end.
    fn account(&self) -> &'static str {
        match (self.source, self.guest) {
            (Source::Resumed, Guest::Ended) => "at the source",
            (Source::Done, Guest::Free) => "at the destination",
            (_, Guest::Free | Guest::Kept) if self.record.is_some() => "waiting",
            other => panic!("{other:?} is a guest without an owner: {:#?}", self.trace),
        }
    }
}

/// The number of effects of a run, and where its guest is at the end.
fn run(kind: Kind, blows: &[(usize, Blow)]) -> (usize, &'static str) {
    // Events are recorded only in a second run after a failure.
    let quiet = catch_unwind(|| run_once(kind, blows, false));
    quiet.unwrap_or_else(|_| run_once(kind, blows, true))
}

fn run_once(kind: Kind, blows: &[(usize, Blow)], is_traced: bool) -> (usize, &'static str) {
    let mut world = World::new(kind, blows, is_traced);
    let terms = super::SessionPolicy { is_private: kind.is_private, ..terms() };
    let core = Core::new(terms, Some(Entrance::Listener), world.now);
    world.live(core, Input::Begin(landing()));
    world.resume();
    (world.done, world.account())
}

#[test]
fn migration_without_a_blow_ends_at_the_destination() {
    for kind in [SHARED, PRIVATE, ROUNDS] {
        assert_eq!(run(kind, &[]).1, "at the destination");
    }
}

#[test]
fn guest_survives_any_blow_between_any_two_effects() {
    let mut ends = std::collections::BTreeSet::new();
    for kind in [SHARED, PRIVATE, ROUNDS] {
        let (effects, _) = run(kind, &[]);
        for at in 1..=effects {
            for blow in [Blow::Kill, Blow::Cut, Blow::Interrupt, Blow::Fail] {
                ends.insert(run(kind, &[(at, blow)]).1);
            }
        }
    }
    let ends: Vec<_> = ends.into_iter().collect();
    assert_eq!(ends, ["at the destination", "at the source"]);
}

#[test]
fn guest_survives_any_two_blows() {
    for kind in [SHARED, ROUNDS] {
        let (effects, _) = run(kind, &[]);
        for first in 1..=effects {
            for second in first + 1..=2 * effects {
                for one in [Blow::Kill, Blow::Cut] {
                    for other in [Blow::Kill, Blow::Cut, Blow::Interrupt, Blow::Fail] {
                        run(kind, &[(first, one), (second, other)]);
                    }
                }
            }
        }
    }
}
