//! The destination's core: every decision about the ownership of the guest, as a state machine without descriptors,
//! threads, clock or output.
//!
//! [`Core::handle`] follows the contract of both cores ([`control`](crate::control)). If the core must not continue
//! before an effect has succeeded, that effect is the last of its batch, and its success is an input:
//! [`Input::Committed`], [`Input::Held`] and so on. The record of *loaded* is vital. [`Input::NotWritten`] reports a
//! failed write of the other records.
//!
//! # States
//!
//! A [`Stage`] is the event that this side waits for; [`Phase`] is the protocol's state. [`Core::is_consistent`]
//! asserts the valid combinations.
//!
//! | stage | phase | owner of the guest | on disk | if umem is killed here |
//! |---|---|---|---|---|
//! | `Receiving` | comparing … receiving device state | the source | nothing | only the source's guest continues |
//! | `Loading`, `Loaded` | loading | the source | nothing | the same |
//! | `Committing` | loading | the source, which can no longer cancel | nothing | the same |
//! | `Holding` | loading | the source | nothing, then *loaded* | the guest waits if it was held, and ends if not |
//! | `Awaiting` | loaded | only the source knows | *loaded* | the guest waits for `--resume` |
//! | `Starting` | switched | this side | *loaded*, then *switched* | the same; an unwritten switchover is resent |
//! | `Serving` | running | this side | *switched*, then *running* | the guest waits for its pages |
//! | `Unregistering` | running | this side | *running* | the same |
//! | `Parting` | completing | this side | *running*, then *complete* | it continues; `--resume` notifies the source |
//! | `TakingOver` | loaded … running | as recorded | unchanged | as before `--resume` |
//! | `Seeking`, `Stopping`, `Releasing` | any | by the phase | unchanged | as in that phase |
//! | `Ended` | any | | nothing, unless the guest stays | |
//!
//! From *switched* on the source's guest never runs again. Before *loaded* is written nothing here outlives umem. In
//! between (`Awaiting`) the guest neither runs nor ends, unless its source or the user decides so.
//!
//! # Inputs
//!
//! | input | transition |
//! |---|---|
//! | `Received(remaining)`, `RoundsEnded` | with both: settle the pages |
//! | `PagesSettled` | `Receiving`, and *settled* is sent |
//! | `Received(stopped, device state, load)` | `Receiving` → `Loading` |
//! | `Loaded` | `Loading` → `Loaded`, with postcopy or every page → `Committing` |
//! | `Committed`, `Held` | `Committing` → `Holding` → `Awaiting`: write *loaded*, hold the guest, send *loaded* |
//! | `Received(switchover)` | `Awaiting` → `Starting`: keep the guest, write *switched*, run it |
//! | `Running` | `Starting` → `Serving`: write *running*, send it |
//! | `AllCached`, `AllReleased` | `Serving` → `Unregistering` after both (after one for shared memory) |
//! | `Unregistered` | `Unregistering` → `Parting`: free the guest, write *complete*, send it |
//! | `Received(complete)` | `Parting` → `Stopping`: write *parted* |
//! | a loss that ends the migration, an error | any → `Seeking` → `Stopping` → `Ended` |
//!
//! The lanes have states of their own, in [`link`]. An answer to no open question changes nothing.

mod contract;
mod ending;
pub(crate) mod farewell;
mod link;
mod phases;
pub(crate) mod takeover;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::time::{Duration, Instant};

use umem_wire::destination::{Input as Step, Phase};
use umem_wire::{FaultCode, Standing};

use super::Order;
use crate::control::liveness::Steps;
use crate::error::{Error, Result};
use crate::events::{Event, Remark};
use crate::session::DestinationState;

use link::Link;

pub(crate) use contract::{
    Effect, Entrance, Exit, FreeSpace, Input, Memory, Moment, Outcome, Process, Record, Session,
    SessionPolicy, Times,
};

/// The event that this side waits for, apart from its lanes.
#[derive(Debug)]
enum Stage {
    /// The source's frames up to *load*. Holds the device state received so far.
    Receiving {
        state: Vec<u8>,
    },
    /// The monitor, to load the device state.
    Loading,
    /// Every page, without which the guest may not run if there is no postcopy. Holds whether the guest ran at the
    /// source.
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
    /// The monitor, to start the guest. Holds whether the user has interrupted and knows that the monitor does not
    /// answer.
    Starting {
        is_told: bool,
    },
    /// The missing pages.
    Serving,
    /// [`Effect::Unregister`].
    Unregistering,
    /// The source's goodbye.
    Parting,
    /// [`Effect::TakeUp`], in a session that another process served.
    TakingOver,
    /// [`Effect::SeekCause`].
    Seeking(Voice),
    /// [`Effect::EndThreads`].
    Stopping(ending::Verdict),
    /// [`Effect::Release`].
    Releasing,
    Ended,
}

/// How a failed side leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Voice {
    /// The other side receives the reason.
    Tells,
    /// To the other side it looks as if umem had been killed: another process may continue.
    Silent,
}

/// How much of the guest's memory has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pages {
    Coming,
    /// Every page is cached; some pages of private memory are not the guest's own yet.
    Cached,
    /// Private memory: all pages are the guest's own, and not all have been reported cached yet.
    Released,
    Whole,
}

/// The owner of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Source,
    /// The source or this side: only the source knows.
    Undecided,
    Ours,
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

/// The effects of a handler.
type Effects = super::Effects<Effect>;

/// The state machine.
#[derive(Debug)]
pub(crate) struct Core {
    terms: SessionPolicy,
    phase: Phase,
    stage: Stage,
    pages: Pages,
    /// Every copy received in rounds has landed.
    have_rounds_ended: bool,
    link: Link,
    steps: Steps,
    times: Times,
}

impl Core {
    /// For a migration whose lanes have just opened.
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

    /// Handles an input. Returns the effects in order.
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
            // A guest that has not run yet cannot have shut down.
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

    /// Advances the protocol. A frame that does not fit leaves the phase as it is: the owner of the guest has not
    /// changed.
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

    /// Whether the stage fits the phase.
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

    /// Whether the guest has run here.
    fn has_run(&self) -> bool {
        matches!(self.phase, Phase::Running { .. } | Phase::Completing | Phase::Completed(_))
    }

    /// The standing of this side, as it is sent to a source on new lanes.
    fn standing(&self, now: &Moment) -> Standing {
        // A process that takes over does not know a time that could not be written.
        let times = self.times.running.zip(self.times.switched);
        let ran_after = times.map_or(Duration::ZERO, |(r, s)| r.saturating_duration_since(s));
        Standing {
            switched: self.owner() == Owner::Ours,
            running: self.has_run().then(|| micros(ran_after)),
            totals: now.memory.totals,
        }
    }

    /// The latest time at which [`Input::Tick`] changes the state.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.link.deadline().into_iter().chain(self.steps.deadline()).min()
    }

    /// Why new lanes are refused now; None if they are accepted.
    pub(crate) fn refusal(&self) -> Option<(FaultCode, Cow<'static, str>)> {
        self.link.refusal(&self.phase)
    }

    /// The name of the phase, as it is while lanes are up.
    pub(crate) fn phase_name(&self) -> &'static str {
        self.phase.name()
    }

    pub(crate) fn times(&self) -> &Times {
        &self.times
    }

    /// The number of recoveries, and the total time without lanes.
    pub(crate) fn recoveries(&self) -> (u32, Duration) {
        (self.link.recoveries, self.link.disconnected)
    }
}

fn not_resumed(error: &Error, effects: &mut Effects) {
    let reason = error.to_string();
    effects.push(Effect::Report(Event::Remark(Remark::NotResumed { reason })));
}

/// Reports a failed write. A failed write of *complete* is not reported, because the next process finds that state
/// again.
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
