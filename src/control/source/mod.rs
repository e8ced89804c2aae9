//! The source's core: from open lanes to the goodbye, or back to a guest that goes on here.
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
//! The guest is this side's until [`Switchover`](Effect::Switchover) is carried out: up to there every failure asks
//! the monitor to have it go on. From there on it never runs here again, unless the destination says on new
//! lanes that no switchover has come, and the monitor that the guest has been let run here meanwhile.

pub(crate) mod closing;
mod cut;
mod failing;
pub(crate) mod leftover;
mod linked;
mod rounds;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use umem_wire::source::{Input as Step, Phase};
use umem_wire::{Fault, Frame, RegionTable, Standing, Totals};

use super::backoff::Jitter;
use super::calling::{Call, Called, Word};
use super::doubt::{Doubt, is_effect};
use super::liveness::Steps;
use super::pausing::Pausing;
use super::{Effects, Moment, Order};
use crate::error::{Error, Result};
use crate::events::{CUT, Event};
use crate::host::monitor::Answer;
use crate::memory::dirty::LeftToSend;
use crate::transport::uri::Uri;

use closing::{Closing, Digests};
use cut::Cut;
use failing::Resuming;
use linked::Linked;
use rounds::Rounds;
pub(crate) use rounds::RoundsPlan;

/// What is known before lanes are open, and does not change.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Pages are sent after the switchover.
    pub(crate) postcopy: bool,
    /// Pages are sent before the stop, too.
    pub(crate) rounds: Option<RoundsPlan>,
    /// 0 where one connection is everything.
    pub(crate) bulk_lanes: u16,
    /// Both sides go on over other lanes when these are lost after the switchover.
    pub(crate) recovers: bool,
    /// Another process can go on; none where nobody could.
    pub(crate) kept: Option<Kept>,
    /// Memory is compared at the end.
    pub(crate) is_checked: bool,
    /// Umem is a part of another program, which has a way of its own to end it.
    pub(crate) is_embedded: bool,
    /// The guest's memory.
    pub(crate) total_bytes: u64,
    /// The most that a step of the destination's may take while nothing moves.
    pub(crate) step_timeout: Duration,
    /// Of the pauses between attempts.
    pub(crate) seed: u64,
}

/// The record of a session, as commands name it.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub(crate) session: String,
    /// ` --session-dir …`, where a command needs that.
    pub(crate) directory_option: String,
}

impl Kept {
    /// The command by which another process goes on.
    pub(crate) fn command(&self) -> String {
        format!("umem migrate --resume {}{}", self.session, self.directory_option)
    }
}

/// What the record says of a guest that may have been given away.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Left {
    /// The highest number of an attempt to open lanes.
    pub(crate) epoch: u32,
    /// What the destination had said.
    pub(crate) heard: Heard,
    pub(crate) stopped: Instant,
    pub(crate) switched: Instant,
}

/// What has happened.
#[derive(Debug)]
pub(crate) enum Input {
    /// All lanes are open, and nothing has been said.
    Begin,
    /// Another process has had lanes.
    TakeOver,
    /// Nothing but time has passed.
    Time,
    /// A frame has come on the demand lane.
    Received(umem_wire::Event),
    /// The device state has been handed to the kernel.
    StateLeft,
    /// A bulk lane has sent all it found.
    BulkEnded,
    /// A bulk lane has sent what was dirty of its blocks.
    PassEnded,
    /// Answers [`Effect::CountDirty`]: what is left, and bytes that have been sent in rounds.
    Counted { left: LeftToSend, sent_bytes: u64 },
    /// A thread could not go on: a lane is lost, or something worse has happened.
    Failed(Error),
    /// The monitor has answered.
    Monitor(Answer),
    /// The digests of the memory here; none where they are not known.
    Digested(Result<Option<Vec<u64>>>),
    /// By hand.
    Order(Order),
    /// By hand: the passes end, and the guest stops.
    EndPasses,
    /// By hand: the driver has been given connections, over which lanes are opened.
    Given,
    /// Somebody wants umem to end.
    Interrupted,
    /// Nothing can be waited for any more.
    Abandoned(Error),
    /// An effect could not be carried out, or the driver has a bug.
    NotDone(Error),
    /// Nobody has cancelled, and nobody can any more: answers [`Effect::Commit`].
    Committed,
    /// All that the lanes' threads have still said has been handed in: answers [`Effect::TakeDown`].
    LanesDown,
    /// Answers [`Effect::Open`].
    Opened(Opened),
    /// Answers [`Effect::Call`].
    Called(Called),
}

/// What became of an attempt to open lanes.
#[derive(Debug)]
pub(crate) enum Opened {
    /// They are open, and the destination has said what it has, as agreed on here.
    Lanes(Standing),
    /// Another attempt may come to something.
    NotNow(Error),
    /// The sides do not agree on what has come, or the guest has ended: nothing can go on.
    Never(Error),
}

/// What is to be done.
#[derive(Debug)]
pub(crate) enum Effect {
    /// Write this down, before anything that follows.
    Persist(Record),
    /// Remove the record: nobody has to take over.
    Forget,
    /// Go beyond the point at which somebody could cancel. Answered by [`Input::Committed`].
    Commit,
    /// Answered by [`Input::Monitor`], at some time or never.
    Ask(Question),
    /// Begin the conversation.
    SendRegions,
    /// Take the destination's landing units.
    Land(RegionTable),
    /// The guest stands still: its files change no more, and its pages may leave.
    Fix,
    Send(Frame),
    /// Send the device state and its end; [`Input::StateLeft`] follows once it has left.
    SendState(Vec<u8>),
    /// Send the switchover: the guest is the destination's.
    Switchover,
    /// Say that nothing more comes, with what has been sent.
    Goodbye(Goodbye),
    Ping(u64),
    /// Have the bulk lanes send what is dirty, once around; each says so with [`Input::PassEnded`].
    SendPass,
    /// Have the bulk lanes end the pass with the blocks that they are at; each says so with [`Input::PassEnded`].
    CutPass,
    /// Report how much is dirty, as [`Input::Counted`].
    CountDirty,
    /// The guest stands still: no page goes a second time from here on, and what is dirty remains to go. Say so on
    /// all lanes.
    EndRounds,
    /// Have the bulk lanes send what nobody has asked for.
    SendBulk,
    /// Free what the destination has, from now on.
    StartRelease,
    EndRelease,
    /// Read all memory. Answered by [`Input::Digested`], at some time.
    Digest,
    /// The guest's files are as they were; compared with sums where those of both sides are known.
    CheckFiles {
        are_compared: bool,
    },
    /// End whatever works on the lanes, hand in what it has still said, and then [`Input::LanesDown`].
    TakeDown,
    /// Open all lanes once, and hear what the destination has. Answered by [`Input::Opened`], which an order or
    /// an interrupt hastens.
    Open {
        way: Way,
        epoch: u32,
    },
    /// Let go of the lanes that were opened.
    HangUp,
    /// Serve the lanes that were opened.
    Serve,
    /// End all threads, the reason of a failure last on the lanes.
    EndThreads(Option<Fault>),
    /// Dial once to say this. Answered by [`Input::Called`].
    Call {
        uri: Uri,
        epoch: u32,
        until: Instant,
        word: Word,
    },
    /// Free the guest's memory here, where that is wished.
    FreeRest,
    /// Keep cores awake while the guest stands still, or no more.
    StayAwake,
    Relax,
    /// What goes on, for the display.
    Show(&'static str),
    Tell(Event),
}

impl super::Effect for Effect {
    fn has_answer(&self) -> bool {
        match self {
            Effect::CountDirty
            | Effect::Commit
            | Effect::TakeDown
            | Effect::Open { .. }
            | Effect::Call { .. } => true,
            Effect::Persist(_)
            | Effect::Forget
            | Effect::Ask(_)
            | Effect::SendRegions
            | Effect::Land(_)
            | Effect::Fix
            | Effect::Send(_)
            | Effect::SendState(_)
            | Effect::Switchover
            | Effect::Goodbye(_)
            | Effect::Ping(_)
            | Effect::SendPass
            | Effect::CutPass
            | Effect::EndRounds
            | Effect::SendBulk
            | Effect::StartRelease
            | Effect::EndRelease
            | Effect::Digest
            | Effect::CheckFiles { .. }
            | Effect::HangUp
            | Effect::Serve
            | Effect::EndThreads(_)
            | Effect::FreeRest
            | Effect::StayAwake
            | Effect::Relax
            | Effect::Show(_)
            | Effect::Tell(_) => false,
        }
    }
}

/// What is written down for another process. What the monitor has to undo it writes itself, before it stops the
/// guest.
#[derive(Clone, Debug)]
pub(crate) enum Record {
    /// A switchover may leave from now on.
    Committed { background: bool, times: Times },
    /// None has left, and none will.
    Stopped,
    /// Nobody needs what is here.
    Completed,
    /// The number of the attempt that follows, and where it leads.
    Epoch { epoch: u32, uri: Option<Uri> },
    /// What the destination has said, for a person.
    Heard(Heard),
    /// A RAM file has failed: whoever resumes has put it right.
    FileFailed,
}

impl Record {
    /// Whether what follows must not be done where this cannot be written. Without the others another process
    /// does more than it had to: it asks both sides, is refused for a while, or says once more what was said.
    pub(crate) fn is_vital(&self) -> bool {
        matches!(self, Record::Committed { .. })
    }
}

/// How the goodbye is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goodbye {
    /// For a destination that ends with it.
    Said,
    /// With a question behind it, which is answered once the destination has written down that it has come.
    Asked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Question {
    /// Track the guest's writes.
    Track,
    /// Whether all is marked that the guest has written so far.
    Look,
    Stop,
    Save,
    /// Whether the guest stands still, and nobody but this side would have it go on.
    StandsStill,
    PutBack,
    Resume,
}

/// How lanes are opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Dial(Uri),
    /// On connections that the driver has.
    Given,
}

/// What the destination has said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Heard {
    /// The guest runs there.
    pub(crate) is_running: bool,
    /// Bytes of its memory that it had.
    pub(crate) bytes: u64,
}

/// When what happened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times {
    pub(crate) stopped: Option<Instant>,
    /// The switchover left, the first time.
    pub(crate) switched: Option<Instant>,
    pub(crate) running: Option<Instant>,
    pub(crate) first_page: Option<Instant>,
    pub(crate) completed: Option<Instant>,
}

impl Times {
    pub(crate) fn downtime(&self) -> Duration {
        match (self.stopped, self.running) {
            (Some(stopped), Some(running)) => running.saturating_duration_since(stopped),
            _ => Duration::ZERO,
        }
    }
}

/// How it ends.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The destination has everything.
    Completed(Totals),
    Failed {
        error: Error,
        guest: Guest,
    },
}

/// Whose the guest is after a failure.
#[derive(Debug)]
pub(crate) enum Guest {
    /// It runs here, as before.
    Here,
    /// It stands still here: its monitor did not have it go on.
    Stopped(Error),
    /// It stands still here, or goes on later: its monitor has not answered.
    Asked,
    /// It may run at the destination, which may need what is here.
    Away,
    /// It has all of its memory at the destination.
    Complete,
}

/// How far the switchover has come, beside the phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Switchover {
    /// It has not left, or it has, and the destination has not denied it.
    Plain,
    /// The destination has not had it. It leaves once more when the monitor says that it may, in its answer to
    /// the last of the questions that are open: those before it were asked on lanes that are gone.
    Owed { unanswered: u32, silence: Silence },
    /// The destination has not had it, and the monitor says that it may not: the guest is ours.
    Refused,
}

/// Who knows that the monitor has not answered whether a switchover may leave again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Silence {
    /// Nobody, and it is remarked on then.
    Until(Instant),
    /// It has been remarked on.
    Remarked,
    /// Somebody who has interrupted, and knows what another interrupt does.
    Known,
}

/// How long a monitor may take to answer that before it is remarked on.
const STANDSTILL_PATIENCE: Duration = Duration::from_secs(10);

/// Whether what was changed in the monitor has been put back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PutBack {
    NotAsked,
    Asked,
    Answered,
}

/// How lanes can be opened now.
#[derive(Debug)]
struct Route {
    target: Target,
    /// While it is paused none are opened.
    pausing: Pausing,
}

#[derive(Debug)]
enum Target {
    Way(Way),
    /// Connections that cannot be opened again.
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

    /// The way of an attempt, if there is one; connections are good for one.
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

/// What goes on.
#[derive(Debug)]
enum Doing {
    /// There are lanes.
    Linked(Linked),
    /// There are none, and they are opened again.
    Cut(Cut),
    /// The destination has everything.
    Closing(Closing),
    /// A bulk lane is lost, which ends the migration: why may still be told.
    Blaming(Doubt),
    /// The monitor has been asked to have the guest go on here.
    Resuming(Resuming),
    /// Everything is over but for the monitor.
    PuttingBack {
        until: Instant,
        goodbye: Parted,
    },
    /// The destination is told something.
    Calling(Call, Then),
    Ended(Outcome),
    /// While what follows is decided on, and after a panic that came in between.
    Changing,
}

/// Whether the destination has heard the goodbye.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parted {
    /// As far as that is waited for.
    Heard,
    Unheard,
}

/// What follows a call.
#[derive(Debug)]
enum Then {
    /// The migration is over.
    Complete,
    /// It has failed like this, and the guest goes on here.
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
    /// The destination has said that the switchover has come: what it says later cannot deny that.
    has_arrived: bool,
    digests: Digests,
    /// Pages are sent that nobody has asked for.
    background: bool,
    /// Once the destination is ready, where there are any.
    rounds: Option<Rounds>,
    /// Somebody has asked for the end of the passes before they began.
    is_cut_early: bool,
    steps: Steps,
    jitter: Jitter,
    times: Times,
    /// Why the record stays of a guest that was never stopped.
    not_tidied: Option<String>,
    recoveries: u32,
    disconnected: Duration,
    /// What is to be done after this input.
    effects: Effects<Effect>,
}

impl Source {
    /// All lanes are open, at this address or on connections that were given.
    pub(crate) fn new(plan: Plan, uri: Option<Uri>, background: bool, now: Instant) -> Source {
        let doing = Doing::Linked(Linked::new(plan.step_timeout));
        Source::of(plan, doing, uri, background, now)
    }

    /// Another process has had lanes, and the guest may have been given away by it.
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

    /// Takes what has happened; the answer is what is to be done, in order.
    pub(crate) fn handle(&mut self, input: Input, now: &Moment) -> Effects<Effect> {
        if let Err(error) = self.take(input, now).and_then(|()| self.look_after(now)) {
            self.fail(error, now);
        }
        std::mem::replace(&mut self.effects, Effects::new())
    }

    /// When time alone changes something, at the latest.
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

    /// It is over, once there is nothing more to do.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.doing, Doing::Ended(_))
    }

    /// How it has ended, once.
    pub(crate) fn take_outcome(&mut self) -> Option<Outcome> {
        match self.change() {
            Doing::Ended(outcome) => Some(outcome),
            doing => {
                self.doing = doing;
                None
            }
        }
    }

    /// What is shown of the protocol; nothing new after a failure.
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

    /// How often lanes were lost and opened again, and how long there were none.
    pub(crate) fn recoveries(&self) -> (u32, Duration) {
        (self.recoveries, self.disconnected)
    }

    /// The digests of the memory here, and of what has landed, where they are known.
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

    /// Does what has become due.
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

    /// Takes what goes on; something else follows.
    fn change(&mut self) -> Doing {
        std::mem::replace(&mut self.doing, Doing::Changing)
    }

    fn do_next(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    fn tell(&mut self, event: Event) {
        self.do_next(Effect::Tell(event));
    }

    /// The number of the next attempt to open lanes: more than any before it, of any process. So it is written
    /// down before it is used.
    fn next_epoch(&mut self) -> Result<u32> {
        let next = self.epoch.checked_add(1);
        self.epoch = next
            .ok_or_else(|| Error::Unsupported("the connection has been lost too often".into()))?;
        let (epoch, uri) = (self.epoch, self.route.uri().cloned());
        self.do_next(Effect::Persist(Record::Epoch { epoch, uri }));
        Ok(epoch)
    }
}

/// The destination gave up and said why.
pub(crate) fn peer(fault: Fault) -> Error {
    Error::Peer { side: "destination", code: fault.code, text: fault.text }
}
