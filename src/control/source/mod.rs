//! The source's core: from open lanes to the goodbye, or to a guest that continues here.
//!
//! ```text
//!            lanes are lost                all lanes are open again
//! Linked ---------------------> Cut -------------------------------> Linked
//!   |                            |
//!   |  the destination has everything
//!   +----------------------------+----> Closing ---> PuttingBack ---> Calling ---> Ended: completed
//!   |
//!   |  a failure                      the guest is ours
//!   +---> Blaming ---> (gives up) -----------------------> Resuming ---> Calling ---> Ended: failed
//!                           |         it is not
//!                           +-----------------------------------------------------> Ended: failed
//! ```
//!
//! The guest belongs to this side until [`Switchover`](Effect::Switchover) is carried out. Before that the core answers
//! every failure by asking the monitor to resume the guest. After that the guest never runs here again, with one
//! exception: the destination reports on new lanes that no switchover has arrived, and the monitor reports that the
//! guest was resumed here meanwhile.

pub(crate) mod closing;
mod contract;
mod cut;
mod failing;
pub(crate) mod leftover;
mod linked;
mod rounds;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use umem_wire::Fault;
use umem_wire::source::{Input as Step, Phase};

use super::backoff::Jitter;
use super::calling::Call;
use super::doubt::{Doubt, is_effect};
use super::liveness::Steps;
use super::pausing::Pausing;
use super::{Effects, Moment};
use crate::error::{Error, Result};
use crate::events::{CUT, Event};
use crate::host::monitor::Answer;
use crate::transport::uri::Uri;

use closing::{Closing, Digests};
use cut::Cut;
use failing::Resuming;
use linked::Linked;
use rounds::Rounds;

pub(crate) use contract::{
    Effect, Goodbye, Guest, Heard, Input, Kept, Left, Opened, Outcome, Plan, Question, Record,
    RoundsPlan, Times, Way,
};

/// The state of the switchover, beside the phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Switchover {
    /// It has not been sent; or it has been sent, and the destination has not denied its arrival.
    Plain,
    /// The destination has not received it. It is sent again when the monitor allows that in its answer to the last
    /// open question. Earlier open questions were asked on lanes that are gone.
    Owed { unanswered: u32, silence: Silence },
    /// The destination has not received it, and the monitor does not allow another one: the guest belongs to this side.
    Refused,
}

/// The reports of a monitor that has not answered whether a switchover may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Silence {
    /// No report so far; one is due at this time.
    Until(Instant),
    /// The event has been reported.
    Remarked,
    /// The user has interrupted, and umem has reported the effect of another interrupt.
    Known,
}

/// How long the monitor may take to answer that question before an event reports the delay.
const STANDSTILL_PATIENCE: Duration = Duration::from_secs(10);

/// Whether the monitor's settings have been restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PutBack {
    NotAsked,
    Asked,
    Answered,
}

/// The means of opening lanes now.
#[derive(Debug)]
struct Route {
    target: Target,
    /// While this is paused, the core opens no lanes.
    pausing: Pausing,
}

#[derive(Debug)]
enum Target {
    Way(Way),
    /// The connections are used up and cannot be opened again.
    Nowhere,
}

impl Route {
    fn is_open(&self) -> bool {
        !self.pausing.is_paused() && matches!(self.target, Target::Way(_))
    }

    fn uri(&self) -> Option<&Uri> {
        match &self.target {
            Target::Way(Way::Dial(uri)) => Some(uri),
            Target::Way(Way::Given) | Target::Nowhere => None,
        }
    }

    /// The means of the next attempt, if there is one. Given connections serve one attempt.
    fn take(&mut self) -> Option<Way> {
        match &self.target {
            _ if self.pausing.is_paused() => None,
            Target::Way(Way::Dial(uri)) => Some(Way::Dial(uri.clone())),
            Target::Way(Way::Given) => {
                self.target = Target::Nowhere;
                Some(Way::Given)
            }
            Target::Nowhere => None,
        }
    }
}

/// The current activity.
#[derive(Debug)]
enum Doing {
    /// The lanes are up.
    Linked(Linked),
    /// The lanes are down, and are opened again.
    Cut(Cut),
    /// The destination has everything.
    Closing(Closing),
    /// A bulk lane is lost, which ends the migration. The cause may still arrive on the demand lane.
    Blaming(Doubt),
    /// The monitor has been asked to resume the guest here.
    Resuming(Resuming),
    /// Only the monitor's settings are left to restore.
    PuttingBack {
        until: Instant,
        goodbye: Parted,
    },
    /// The core dials the destination for one message.
    Calling(Call, Then),
    Ended(Outcome),
    /// During a transition, and after a panic in one.
    Changing,
}

/// Whether the destination has received the goodbye.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parted {
    /// Received, or not waited for any more.
    Heard,
    Unheard,
}

/// The outcome after a call.
#[derive(Debug)]
enum Then {
    /// The migration is over.
    Complete,
    /// It has failed with this error, and the guest continues here.
    Stays(Error),
}

#[derive(Debug)]
pub(crate) struct Source {
    plan: Plan,
    phase: Phase,
    doing: Doing,
    switchover: Switchover,
    put_back: PutBack,
    route: Route,
    /// Of the last attempt to open lanes.
    epoch: u32,
    heard: Heard,
    /// The destination has reported the switchover's arrival. Its later reports cannot deny that.
    has_arrived: bool,
    digests: Digests,
    /// Pages are sent without a demand.
    background: bool,
    /// Set when the destination is ready, if the plan has rounds.
    rounds: Option<Rounds>,
    /// An order has ended the passes before they began.
    is_cut_early: bool,
    steps: Steps,
    jitter: Jitter,
    times: Times,
    /// Why the settings of a guest's monitor may not be restored. The guest was never stopped.
    not_tidied: Option<String>,
    recoveries: u32,
    disconnected: Duration,
    /// The effects of the current input.
    effects: Effects<Effect>,
}

impl Source {
    /// With all lanes open, at this address or on given connections.
    pub(crate) fn new(plan: Plan, uri: Option<Uri>, background: bool, now: Instant) -> Source {
        let doing = Doing::Linked(Linked::new(plan.step_timeout));
        Source::of(plan, doing, uri, background, now)
    }

    /// For a session that another process served, which may have given the guest away.
    pub(crate) fn taken_over(
        plan: Plan,
        uri: Option<Uri>,
        background: bool,
        left: Left,
        now: Instant,
    ) -> Source {
        let doing = Doing::Cut(Cut::taken_over(now));
        let mut source = Source::of(plan, doing, uri, background, now);
        source.phase = Phase::Committed;
        (source.epoch, source.heard) = (left.epoch, left.heard);
        source.has_arrived = left.heard.is_running;
        source.times.stopped = Some(left.stopped);
        source.times.switched = Some(left.switched);
        source
    }

    fn of(plan: Plan, doing: Doing, uri: Option<Uri>, background: bool, now: Instant) -> Source {
        let target = uri.map_or(Target::Nowhere, |uri| Target::Way(Way::Dial(uri)));
        Source {
            phase: Phase::new(),
            doing,
            switchover: Switchover::Plain,
            put_back: PutBack::NotAsked,
            route: Route { target, pausing: Pausing::default() },
            epoch: 0,
            heard: Heard::default(),
            has_arrived: false,
            digests: Digests::new(plan.is_checked),
            background,
            rounds: None,
            is_cut_early: false,
            steps: Steps::new(plan.step_timeout, now),
            jitter: Jitter::of(plan.seed),
            times: Times::default(),
            not_tidied: None,
            recoveries: 0,
            disconnected: Duration::ZERO,
            effects: Effects::new(),
            plan,
        }
    }

    /// Handles an input. Returns the effects in order.
    pub(crate) fn handle(&mut self, input: Input, now: &Moment) -> Effects<Effect> {
        if let Err(error) = self.take(input, now).and_then(|()| self.look_after(now)) {
            self.fail(error, now);
        }
        std::mem::replace(&mut self.effects, Effects::new())
    }

    /// The latest time at which [`Input::Time`] changes the state.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.doing {
            Doing::Linked(linked) => {
                let silence = match self.switchover {
                    Switchover::Owed { unanswered: 1.., silence: Silence::Until(at) } => Some(at),
                    _ => None,
                };
                let passes = self.rounds.as_ref().and_then(Rounds::deadline);
                let others = self.steps.deadline().into_iter().chain(silence).chain(passes);
                linked.deadline().into_iter().chain(others).min()
            }
            Doing::Cut(cut) => cut.deadline(&self.route),
            Doing::Closing(closing) => closing.deadline(),
            Doing::Blaming(doubt) => Some(doubt.until),
            Doing::Resuming(resuming) => resuming.deadline(),
            Doing::PuttingBack { until, .. } => Some(*until),
            Doing::Calling(call, _) => call.deadline(),
            Doing::Ended(_) | Doing::Changing => None,
        }
    }

    /// The migration has ended, and no effect is left.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.doing, Doing::Ended(_))
    }

    /// Takes the outcome; None after the first call.
    pub(crate) fn take_outcome(&mut self) -> Option<Outcome> {
        match self.change() {
            Doing::Ended(outcome) => Some(outcome),
            doing => {
                self.doing = doing;
                None
            }
        }
    }

    /// The name of the protocol's phase; None after a failure, so the display keeps the last one.
    pub(crate) fn phase_name(&self) -> Option<&'static str> {
        match (&self.doing, &self.phase) {
            (_, Phase::Failed { .. }) => None,
            (Doing::Cut(cut), _) if cut.is_announced() => Some(CUT),
            (_, phase) => Some(phase.name()),
        }
    }

    pub(crate) fn times(&self) -> &Times {
        &self.times
    }

    /// The number of recoveries, and the total time without lanes.
    pub(crate) fn recoveries(&self) -> (u32, Duration) {
        (self.recoveries, self.disconnected)
    }

    /// The digests of the memory here and of the landed memory, if they are known.
    pub(crate) fn digests(&self) -> (Option<&[u64]>, Option<&[u64]>) {
        self.digests.both()
    }
}

impl Source {
    fn take(&mut self, input: Input, now: &Moment) -> Result<()> {
        match input {
            Input::NotDone(error) => Err(error),
            Input::Abandoned(error) => {
                self.abandon(error, now);
                Ok(())
            }
            input => match self.doing {
                Doing::Linked(_) => self.linked(input, now),
                Doing::Cut(_) => self.cut(input, now),
                Doing::Closing(_) => self.closing(input, now),
                Doing::Blaming(_) => self.blaming(input),
                Doing::Resuming(_) => {
                    self.resuming(input, now);
                    Ok(())
                }
                Doing::PuttingBack { goodbye, .. } => {
                    match input {
                        Input::Monitor(Answer::PutBack(result)) => {
                            self.has_put_back(&result);
                            self.part(goodbye, now);
                        }
                        Input::Interrupted => self.not_put_back(goodbye, now),
                        _ => {}
                    }
                    Ok(())
                }
                Doing::Calling(..) => {
                    self.calling(input, now);
                    Ok(())
                }
                Doing::Ended(_) | Doing::Changing => Ok(()),
            },
        }
    }

    /// Handles the work that is due.
    fn look_after(&mut self, now: &Moment) -> Result<()> {
        match &self.doing {
            Doing::Linked(_) => {
                self.look_after_passes(now);
                self.look_after_step(now)?;
                self.look_after_link(now)
            }
            Doing::Cut(_) => self.look_after_cut(now),
            Doing::Closing(Closing::Parting { until }) if *until <= now.at => {
                self.finish(Parted::Heard, now);
                Ok(())
            }
            Doing::Blaming(doubt) if doubt.until <= now.at => self.is_to_blame(),
            Doing::Resuming(_) => {
                self.look_after_monitor(now);
                Ok(())
            }
            &Doing::PuttingBack { until, goodbye } if until <= now.at => {
                self.not_put_back(goodbye, now);
                Ok(())
            }
            Doing::Calling(..) => {
                self.look_after_call(now);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn step(&mut self, input: Step<'_>) -> Result<()> {
        let may_run = self.phase.may_run();
        let phase = std::mem::replace(&mut self.phase, Phase::Failed { may_run });
        match phase.step(input) {
            Ok(phase) => {
                self.phase = phase;
                Ok(())
            }
            Err((phase, error)) => {
                self.phase = phase;
                Err(Error::protocol("demand lane", error))
            }
        }
    }

    /// Takes the current activity. The caller sets the next one.
    fn change(&mut self) -> Doing {
        std::mem::replace(&mut self.doing, Doing::Changing)
    }

    fn do_next(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    fn tell(&mut self, event: Event) {
        self.do_next(Effect::Tell(event));
    }

    /// The epoch of the next attempt to open lanes. It is higher than every earlier epoch of any process, so it is
    /// written to the record before its use.
    fn next_epoch(&mut self) -> Result<u32> {
        let next = self.epoch.checked_add(1);
        self.epoch =
            next.ok_or_else(|| Error::Unsupported("the connection was lost too often".into()))?;
        let (epoch, uri) = (self.epoch, self.route.uri().cloned());
        self.do_next(Effect::Persist(Record::Epoch { epoch, uri }));
        Ok(epoch)
    }
}

/// The destination gave up for this reason.
pub(crate) fn peer(fault: Fault) -> Error {
    Error::Peer { side: "destination", code: fault.code, text: fault.text }
}
