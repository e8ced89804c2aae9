//! Whose the guest is at the destination: every decision about it, as a state machine without descriptors,
//! threads, clock or output.
//!
//! [`Core::handle`] follows the contract of both cores ([`control`](crate::control)). Where the core must not go on
//! before an effect has succeeded, that effect is the last of its answer, and its success is an input:
//! [`Input::Committed`], [`Input::Held`] and so on. The record of *loaded* is vital; of others that cannot be written
//! [`Input::NotWritten`] tells.
//!
//! # States
//!
//! A [`Stage`] is what this side waits for; [`Phase`] is what the protocol allows. [`Core::is_consistent`] asserts
//! which of them go together.
//!
//! | stage | phase | whose the guest is | on disk | umem is killed here |
//! |---|---|---|---|---|
//! | `Receiving` | comparing … receiving device state | the source's | nothing | the guest here ends, the source's goes on |
//! | `Loading`, `Loaded` | loading | the source's | nothing | the same |
//! | `Committing` | loading | the source's, which can no longer cancel | nothing | the same |
//! | `Holding` | loading | the source's | nothing, then *loaded* | the guest waits if it was held, and ends if not |
//! | `Awaiting` | loaded | only the source knows | *loaded* | the guest waits for `--resume` |
//! | `Starting` | switched | ours | *loaded*, then *switched* | the guest waits; a switchover not written comes again |
//! | `Serving` | running | ours | *switched*, then *running* | the guest waits for its pages |
//! | `Unregistering` | running | ours | *running* | the same |
//! | `Parting` | completing | ours, complete | *running*, then *complete* | the guest runs on; `--resume` tells the source |
//! | `TakingOver` | loaded … running | as the record says | as it was | as before `--resume` |
//! | `Seeking`, `Stopping`, `Releasing` | any | as the phase says | as it was | as in that phase |
//! | `Ended` | any | | nothing, unless the guest stays | |
//!
//! From *switched* on the source's guest never runs again. Before *loaded* is written nothing here outlives umem.
//! In between (`Awaiting`) the guest neither runs nor ends, unless its source or a person says so.
//!
//! # Inputs
//!
//! | input | where it moves on |
//! |---|---|
//! | `Received(remaining)`, `RoundsEnded` | with both: settle the pages |
//! | `PagesSettled` | `Receiving`, and *settled* is sent |
//! | `Received(stopped, device state, load)` | `Receiving` → `Loading` |
//! | `Loaded` | `Loading` → `Loaded`, with postcopy or every page → `Committing` |
//! | `Committed`, `Held` | `Committing` → `Holding` → `Awaiting`: write *loaded*, hold the guest, send *loaded* |
//! | `Received(switchover)` | `Awaiting` → `Starting`: keep the guest, write *switched*, run it |
//! | `Running` | `Starting` → `Serving`: write *running*, send it |
//! | `AllCached`, `AllReleased` | `Serving` → `Unregistering` once both have come (one for shared memory) |
//! | `Unregistered` | `Unregistering` → `Parting`: free the guest, write *complete*, send it |
//! | `Received(complete)` | `Parting` → `Stopping`: write *parted* |
//! | a loss that nothing outlives, an error | any → `Seeking` → `Stopping` → `Ended` |
//!
//! The lanes have states of their own, in [`link`]. An answer that nobody waits for changes nothing.

mod ending;
pub(crate) mod farewell;
mod link;
mod phases;
pub(crate) mod takeover;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use umem_wire::destination::{Input as Step, Mode, Phase};
use umem_wire::{Event as Heard, Fault, FaultCode, Frame, LaneRole, RegionTable, Standing, Totals};

use super::Order;
use crate::control::liveness::Steps;
use crate::error::{Error, Result};
use crate::events::{Event, Remark};
use crate::session::DestinationState;
use crate::transport::uri::Uri;

pub(crate) use ending::Outcome;
pub(crate) use link::Entrance;
use link::Link;

/// What is settled when a migration begins.
#[derive(Clone, Debug)]
pub(crate) struct SessionPolicy {
    /// Both sides go on over other lanes when these are lost after *loaded*.
    pub(crate) recovers: bool,
    /// There are bulk lanes. An answer on the demand lane waits behind pages otherwise.
    pub(crate) has_bulk_lanes: bool,
    /// What comes is checked.
    pub(crate) is_checked: bool,
    /// A page has come when it is the guest's own ([`Input::AllReleased`]).
    pub(crate) is_private: bool,
    /// No monitor holds the guest back: it runs as soon as it has pages. So no page is requested for it before the
    /// guest is ours.
    pub(crate) runs_itself: bool,
    /// A program that embeds this has a way of its own to end it.
    pub(crate) is_embedded: bool,
    /// What another process takes over, should this one be killed; none where nobody could.
    pub(crate) session: Option<Session>,
    /// The most that a step of the source's may take before *loaded* while nothing moves.
    pub(crate) step_timeout: Duration,
}

/// A session that another process can take over.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    pub(crate) number: String,
    /// ` --session-dir …`, where a command needs that.
    pub(crate) directory_option: String,
}

impl Session {
    /// The command that takes it over.
    pub(crate) fn command(&self) -> String {
        format!("umem incoming --resume {}{}", self.number, self.directory_option)
    }
}

/// The moment of an input.
pub(crate) type Moment = super::Moment<Memory>;

/// How the guest's memory stands.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    pub(crate) pages_missing: u64,
    pub(crate) bytes_missing: u64,
    pub(crate) pages_done: u64,
    pub(crate) totals: Totals,
}

/// The file system that has least room for what is to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FreeSpace {
    /// The RAM file.
    pub(crate) ram: String,
    pub(crate) bytes: u64,
}

/// How the guest's process has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// With all of its memory, and not in failure as far as can be known: a guest may shut down.
    Fine,
    /// Otherwise. ` (exit status: 1)`, or nothing.
    Failed { how: String },
}

/// The guest's process, when a migration fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Process {
    /// It has ended, or is our own.
    Gone,
    /// It ends with umem.
    EndsWithUs,
    /// It stays, and waits for missing pages.
    Stays,
}

/// What has happened.
#[derive(Debug)]
pub(crate) enum Input {
    /// The regions have been compared, and the threads run: the guest waits for its source.
    Begin(RegionTable),
    /// The threads run for a session that another process has served.
    TakeOver,
    /// The source said this on the demand lane.
    Received(Heard),
    /// Every copy that came in rounds has landed, on all lanes.
    RoundsEnded,
    /// [`Effect::SettlePages`] has succeeded.
    PagesSettled,
    /// Every page is cached.
    AllCached,
    /// Private memory: every page is the guest's own.
    AllReleased,
    /// The monitor has loaded the device state, of a guest that ran when it was stopped (`runs`) or stood still.
    Loaded { runs: bool },
    /// The monitor has let the guest run.
    Running,
    /// The monitor or a thread has failed, and nothing can go on.
    Failed(Error),
    /// An effect could not be carried out, or the driver has a bug.
    NotDone(Error),
    /// A lane is lost.
    LaneLost { lane: LaneRole, error: Error },
    /// There is no room for what has come.
    NoRoom { error: Error, free: Option<FreeSpace> },
    /// A page that has come cannot be made visible for want of memory; it is tried again.
    ShortOfTables { why: String, free: Option<FreeSpace> },
    /// [`Effect::MeasureRoom`] has found this; none where there is enough, or nobody knows.
    Room(Option<FreeSpace>),
    /// The demand thread has let go of a lost lane: nothing of it is in flight.
    Quiet,
    /// What those who served lost lanes have said has all been handled.
    Settled,
    /// All lanes of one attempt have come in.
    Came,
    /// Of the connections that were given one has gone, or leads elsewhere.
    GivenInVain,
    /// By hand.
    Order(Order),
    /// The address of that order has been looked up.
    Found { order: u64, uri: Uri, found: io::Result<Vec<SocketAddr>> },
    /// [`Effect::Bind`] has come to this address.
    Bound { uri: String },
    /// [`Effect::WriteAddress`] has failed.
    AddressNotWritten(Error),
    /// A resume by hand cannot be carried out.
    NotResumed(Error),
    /// By hand: the source comes to this place, which the driver has.
    Offered(Entrance),
    /// Somebody interrupts, or the program that embeds this cancels.
    Interrupt,
    /// The guest's process has ended.
    GuestEnded(Exit),
    /// Time has passed.
    Tick,
    /// [`Effect::Commit`] has succeeded: nobody cancels any more.
    Committed,
    /// A record of this state, which is not vital, could not be written.
    NotWritten { state: DestinationState, error: Error },
    /// [`Effect::Hold`] has succeeded: the guest's process waits should umem be killed.
    Held,
    /// [`Effect::TakeUp`] has succeeded: faults are served again.
    TakenUp,
    /// [`Effect::Unregister`] has succeeded; how the guest's process has ended, if it has.
    Unregistered { exit: Option<Exit>, unmapped_bytes: u64 },
    /// [`Effect::SeekCause`] has found this.
    Cause { error: Error, process: Process },
    /// [`Effect::EndThreads`] is done.
    ThreadsEnded,
    /// [`Effect::Release`] has succeeded: the guest's process has been told to go on alone.
    Released,
}

/// What is to be done.
#[derive(Debug)]
pub(crate) enum Effect {
    /// Ask the monitor to get ready.
    Prepare,
    /// What came in rounds and does not remain is here for good.
    SettlePages,
    /// Ask the monitor to load this.
    Load(Vec<u8>),
    /// Ask the monitor to let the guest run.
    Run,
    /// Request pages from here on, for a guest that [runs itself](SessionPolicy::runs_itself).
    RequestPages,
    /// Keep cores awake while the guest stands still.
    StayAwake,
    /// The guest runs, after a standstill of this long: cores may sleep.
    Sleep { downtime: Duration },
    /// Decide against everybody who would still cancel.
    Commit,
    /// Write this down, before anything that follows.
    Persist(Record),
    /// Have the guest's process wait, should umem be killed. It still ends when umem ends by itself.
    Hold,
    /// Have the guest's process end when umem ends by itself, as before *switched*; it waits if umem is killed.
    Doom,
    /// The guest is ours: have its process stay whatever happens to umem.
    Keep,
    /// Take up what a process before this has left: touch again, wake who waits.
    TakeUp,
    /// Private memory: have the rest touched.
    TouchTheRest,
    /// Have the guest leave its userfaultfds, and look whether it is still there.
    Unregister,
    /// The guest is complete: its process needs nobody any more.
    Free,
    /// What the source's memory comes to.
    Compare(Vec<u64>),
    /// Say this on the demand lane.
    Send(Frame),
    /// Say that everything is here, with the digests where they are known.
    SendCompletion,
    /// Ask on the demand lane whether somebody is there.
    Ping(u64),
    /// Cut all lanes, and wait for the bulk threads' end.
    Sever,
    /// Report [`Input::Settled`] behind everything that has been said already.
    Settle,
    /// What was landing is missing again.
    RollBack,
    /// Go on over the lanes that have come in: say this first, and the completion afterwards.
    Reconnect { standing: Standing, is_complete: bool },
    /// The lanes that have come in are not wanted.
    DropLanes,
    /// Look up where to listen, and report [`Input::Found`].
    LookUp { order: u64, uri: Uri },
    /// Listen at one of these addresses.
    Bind { uri: Uri, found: Vec<SocketAddr> },
    /// Take lanes where was offered last, or was bound.
    Open,
    /// Refuse what was offered last.
    Decline,
    /// The connections that were given are of no use any more.
    ForgetGiven,
    /// The source finds this side here from now on.
    WriteAddress(String),
    /// Look for room, and report it.
    MeasureRoom,
    /// The protocol's phase has this name now.
    Entered(&'static str),
    /// What a person sees going on has this name.
    Show(&'static str),
    /// Tell those who look on.
    Report(Event),
    /// Ask those who may know better why this happened.
    SeekCause(Error),
    /// End the threads. What was to be sent leaves first, this last; after a failure nobody waits for long.
    EndThreads { told: Option<Fault>, has_failed: bool },
    /// Tell the guest's process to go on alone.
    Release,
    /// After a failure: have the guest's process wait for whoever takes over. One that cannot be told so ends.
    LetWait,
    /// After a failure: end the guest's process, unless it is to stay whatever happens to umem.
    EndGuest,
    /// Nobody has to take over any more: remove the record.
    Forget,
    /// This is how it has ended.
    Finish(Outcome),
}

impl super::Effect for Effect {
    fn has_answer(&self) -> bool {
        match self {
            Effect::SettlePages
            | Effect::Commit
            | Effect::Hold
            | Effect::TakeUp
            | Effect::Unregister
            | Effect::SeekCause(_)
            | Effect::EndThreads { .. }
            | Effect::Release => true,
            Effect::Prepare
            | Effect::Load(_)
            | Effect::Run
            | Effect::RequestPages
            | Effect::StayAwake
            | Effect::Sleep { .. }
            | Effect::Persist(_)
            | Effect::Doom
            | Effect::Keep
            | Effect::TouchTheRest
            | Effect::Free
            | Effect::Compare(_)
            | Effect::Send(_)
            | Effect::SendCompletion
            | Effect::Ping(_)
            | Effect::Sever
            | Effect::Settle
            | Effect::RollBack
            | Effect::Reconnect { .. }
            | Effect::DropLanes
            | Effect::LookUp { .. }
            | Effect::Bind { .. }
            | Effect::Open
            | Effect::Decline
            | Effect::ForgetGiven
            | Effect::WriteAddress(_)
            | Effect::MeasureRoom
            | Effect::Entered(_)
            | Effect::Show(_)
            | Effect::Report(_)
            | Effect::LetWait
            | Effect::EndGuest
            | Effect::Forget
            | Effect::Finish(_) => false,
        }
    }
}

/// What is written down for a process that takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    Loaded { mode: Mode, runs: bool },
    Switched { stopped_us: u64, at: Instant },
    Running { at: Instant },
    Complete { totals: Totals },
    Parted,
}

impl Record {
    /// Whether what follows must not be done where this cannot be written. Once the guest is this side's it goes on
    /// all the same: what is there says less than is so, which the source makes up for.
    pub(crate) fn is_vital(&self) -> bool {
        matches!(self, Record::Loaded { .. })
    }

    pub(crate) fn state(&self) -> DestinationState {
        match self {
            Record::Loaded { .. } => DestinationState::Loaded,
            Record::Switched { .. } => DestinationState::Switched,
            Record::Running { .. } => DestinationState::Running,
            Record::Complete { .. } => DestinationState::Complete,
            Record::Parted => DestinationState::Parted,
        }
    }
}

/// What this side waits for, beside its lanes.
#[derive(Debug)]
enum Stage {
    /// The source, up to *load*. What has come of the device state.
    Receiving {
        state: Vec<u8>,
    },
    /// The monitor, to load the device state.
    Loading,
    /// Every page, without which the guest may not run where there is no postcopy. Whether the guest ran at the source.
    Loaded {
        runs: bool,
    },
    /// [`Effect::Commit`].
    Committing {
        runs: bool,
    },
    /// The record of *loaded*, and [`Effect::Hold`].
    Holding,
    /// The switchover.
    Awaiting,
    /// The monitor, to let the guest run. Whether somebody who interrupts knows that it does not answer.
    Starting {
        is_told: bool,
    },
    /// The pages that are missing.
    Serving,
    /// [`Effect::Unregister`].
    Unregistering,
    /// The source's goodbye.
    Parting,
    /// [`Effect::TakeUp`], in a session that another process has served.
    TakingOver,
    /// [`Effect::SeekCause`].
    Seeking(Voice),
    /// [`Effect::EndThreads`].
    Stopping(ending::Verdict),
    /// [`Effect::Release`].
    Releasing,
    Ended,
}

/// How a side leaves that has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Voice {
    /// The other side hears why.
    Tells,
    /// To the other side it is as if umem had been killed: another process may go on.
    Silent,
}

/// How much of the guest's memory is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pages {
    Coming,
    /// Every page is cached; private memory has pages that are not the guest's own.
    Cached,
    /// Private memory: all are the guest's own, which was heard first.
    Released,
    Whole,
}

/// Whose the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Source,
    /// The source's or ours: only the source knows.
    Undecided,
    Ours,
}

/// When what happened; the source's stop is dated back from its switchover.
#[derive(Clone, Debug, Default)]
pub(crate) struct Times {
    pub(crate) stopped: Option<Instant>,
    pub(crate) switched: Option<Instant>,
    pub(crate) running: Option<Instant>,
    pub(crate) first_page: Option<Instant>,
    pub(crate) cached: Option<Instant>,
    pub(crate) downtime: Duration,
}

/// An error that ends the migration.
struct Failure {
    error: Error,
    voice: Voice,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { error, voice: Voice::Tells }
    }
}

/// What a handler adds its effects to.
type Effects = super::Effects<Effect>;

/// The state machine.
#[derive(Debug)]
pub(crate) struct Core {
    terms: SessionPolicy,
    phase: Phase,
    stage: Stage,
    pages: Pages,
    /// Every copy that came in rounds has landed.
    have_rounds_ended: bool,
    link: Link,
    steps: Steps,
    times: Times,
}

impl Core {
    /// A migration whose lanes have just opened.
    pub(crate) fn new(terms: SessionPolicy, entrance: Option<Entrance>, now: Instant) -> Core {
        let link = Link::up(&terms, entrance);
        Core::at(terms, Phase::new(), Stage::Receiving { state: Vec::new() }, link, now)
    }

    fn at(terms: SessionPolicy, phase: Phase, stage: Stage, link: Link, now: Instant) -> Core {
        Core {
            steps: Steps::new(terms.step_timeout, now),
            terms,
            phase,
            stage,
            pages: Pages::Coming,
            have_rounds_ended: false,
            link,
            times: Times::default(),
        }
    }

    /// Takes what has happened; the answer is what is to be done, in order.
    pub(crate) fn handle(&mut self, input: Input, now: &Moment) -> Effects {
        let mut effects = Effects::new();
        let handled = match self.stage {
            Stage::Seeking(_) | Stage::Stopping(_) | Stage::Releasing | Stage::Ended => {
                self.end(input, now, &mut effects);
                Ok(())
            }
            _ => self.go_on(input, now, &mut effects),
        };
        if let Err(failure) = handled {
            self.fail(failure, &mut effects);
        }
        debug_assert!(self.is_consistent(), "{:?} in phase {}", self.stage, self.phase.name());
        effects
    }

    fn go_on(
        &mut self,
        input: Input,
        now: &Moment,
        effects: &mut Effects,
    ) -> std::result::Result<(), Failure> {
        match input {
            Input::Begin(landing) => self.begin(landing, now, effects),
            Input::TakeOver => {
                Core::take_over(effects);
                Ok(())
            }
            Input::TakenUp => self.taken_up(now, effects),
            Input::Received(heard) => self.received(heard, now, effects),
            Input::RoundsEnded => {
                self.have_rounds_ended = true;
                self.settle_pages(effects);
                Ok(())
            }
            Input::PagesSettled => self.pages_settled(effects),
            Input::AllCached => self.all_cached(now, effects),
            Input::AllReleased => self.all_released(effects),
            Input::Loaded { runs } => self.loaded(runs, effects),
            Input::Committed => self.committed(effects),
            Input::NotWritten { state, error } => {
                say_not_written(state, &error, effects);
                Ok(())
            }
            Input::Held => self.held(effects),
            Input::Running => self.running(now, effects),
            Input::Unregistered { exit, unmapped_bytes } => {
                self.unregistered(exit, unmapped_bytes, now, effects)
            }
            // One that has not run yet has not shut down.
            Input::GuestEnded(Exit::Fine) if self.has_run() => Ok(()),
            Input::GuestEnded(Exit::Fine) => Err(self.guest_died("").into()),
            Input::GuestEnded(Exit::Failed { how }) => Err(self.guest_died(&how).into()),
            Input::Failed(error) | Input::NotDone(error) => Err(error.into()),
            Input::Interrupt => self.interrupted(now, effects),
            Input::LaneLost { lane, error } => self.lane_lost(lane, error, now, effects),
            Input::NoRoom { error, free } => self.no_room(error, free, now, effects),
            Input::ShortOfTables { why, free } => {
                self.short_of_tables(&why, free.as_ref(), now, effects);
                Ok(())
            }
            Input::Room(free) => {
                self.measured(free.as_ref(), now);
                Ok(())
            }
            Input::Quiet => self.quiet(now, effects),
            Input::Settled => {
                self.settled(now, effects);
                Ok(())
            }
            Input::Came => self.came(now, effects),
            Input::GivenInVain => {
                self.given_in_vain(effects);
                Ok(())
            }
            Input::Order(Order::Pause) => self.pause(now, effects),
            Input::Order(Order::Resume(uri)) => {
                self.resume(uri, effects);
                Ok(())
            }
            Input::Found { order, uri, found } => {
                self.found(order, uri, found, effects);
                Ok(())
            }
            Input::Bound { uri } => {
                self.bound(uri, effects);
                Ok(())
            }
            Input::AddressNotWritten(error) => {
                not_written(&error, effects);
                Ok(())
            }
            Input::NotResumed(error) => {
                not_resumed(&error, effects);
                Ok(())
            }
            Input::Offered(entrance) => self.offered(entrance, now, effects),
            Input::Tick => self.tick(now, effects),
            Input::Cause { .. } | Input::ThreadsEnded | Input::Released => Ok(()),
        }
    }

    /// Moves the protocol on. A phase that an input does not fit stays: whose the guest is has not changed.
    fn step(&mut self, step: Step<'_>, effects: &mut Effects) -> Result<()> {
        let before = self.phase.name();
        match self.phase.clone().step(step) {
            Ok(phase) => {
                if phase.name() != before {
                    effects.push(Effect::Entered(phase.name()));
                }
                self.phase = phase;
                Ok(())
            }
            Err((_, error)) => Err(Error::protocol("demand lane", error)),
        }
    }

    /// Which stages and phases go together.
    fn is_consistent(&self) -> bool {
        match &self.stage {
            Stage::Receiving { .. } => matches!(
                self.phase,
                Phase::Comparing
                    | Phase::Preparing
                    | Phase::Ready
                    | Phase::Rounds
                    | Phase::Settling
                    | Phase::Settled
                    | Phase::Receiving { .. }
            ),
            Stage::Loading | Stage::Loaded { .. } | Stage::Committing { .. } | Stage::Holding => {
                matches!(self.phase, Phase::Loading { .. })
            }
            Stage::Awaiting => matches!(self.phase, Phase::Loaded { .. }),
            Stage::Starting { .. } => matches!(self.phase, Phase::Switched { .. }),
            Stage::Serving | Stage::Unregistering => matches!(self.phase, Phase::Running { .. }),
            Stage::Parting => matches!(self.phase, Phase::Completing),
            Stage::TakingOver => self.phase.outlives_its_lanes(),
            Stage::Releasing => matches!(self.phase, Phase::Completed(_)),
            Stage::Seeking(_) | Stage::Stopping(_) | Stage::Ended => true,
        }
    }

    fn owner(&self) -> Owner {
        match self.phase {
            Phase::Loaded { .. } => Owner::Undecided,
            _ if self.phase.may_run() => Owner::Ours,
            _ => Owner::Source,
        }
    }

    /// The guest has run here.
    fn has_run(&self) -> bool {
        matches!(self.phase, Phase::Running { .. } | Phase::Completing | Phase::Completed(_))
    }

    /// Where this side stands, as a source hears it on other lanes.
    fn standing(&self, now: &Moment) -> Standing {
        // A time that could not be written down is not known to a process that takes over.
        let times = self.times.running.zip(self.times.switched);
        let ran_after = times.map_or(Duration::ZERO, |(r, s)| r.saturating_duration_since(s));
        Standing {
            switched: self.owner() == Owner::Ours,
            running: self.has_run().then(|| micros(ran_after)),
            totals: now.memory.totals,
        }
    }

    /// When [`Input::Tick`] has something to do at the latest.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.link.deadline().into_iter().chain(self.steps.deadline()).min()
    }

    /// Why lanes that come in are not wanted now, if they are not.
    pub(crate) fn refusal(&self) -> Option<(FaultCode, Cow<'static, str>)> {
        self.link.refusal(&self.phase)
    }

    /// The phase, as it is called while there are lanes.
    pub(crate) fn phase_name(&self) -> &'static str {
        self.phase.name()
    }

    pub(crate) fn times(&self) -> &Times {
        &self.times
    }

    /// How often other lanes have replaced lost ones, and how long there were none in all.
    pub(crate) fn recoveries(&self) -> (u32, Duration) {
        (self.link.recoveries, self.link.disconnected)
    }
}

fn not_resumed(error: &Error, effects: &mut Effects) {
    let reason = error.to_string();
    effects.push(Effect::Report(Event::Remark(Remark::NotResumed { reason })));
}

/// Of a guest that is complete that would be found again.
fn say_not_written(state: DestinationState, error: &Error, effects: &mut Effects) {
    if state != DestinationState::Complete {
        not_written(error, effects);
    }
}

fn not_written(error: &Error, effects: &mut Effects) {
    let reason = error.to_string();
    effects.push(Effect::Report(Event::Remark(Remark::NotWritten { reason })));
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
