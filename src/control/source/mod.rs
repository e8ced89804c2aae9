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

/// The parameters of a migration. They are known before lanes are open, and stay constant.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Pages are sent after the switchover.
    pub(crate) postcopy: bool,
    /// Pages are sent before the stop, too.
    pub(crate) rounds: Option<RoundsPlan>,
    /// 0 if one connection serves as all lanes.
    pub(crate) bulk_lanes: u16,
    /// Both sides continue over other lanes when these are lost after the switchover.
    pub(crate) recovers: bool,
    /// Another process can continue the session; None if no process could.
    pub(crate) kept: Option<Kept>,
    /// The memory of both sides is compared at the end.
    pub(crate) is_checked: bool,
    /// umem is a part of another program, which has its own way to end the migration.
    pub(crate) is_embedded: bool,
    /// The guest's memory.
    pub(crate) total_bytes: u64,
    /// How long a step of the destination may last without progress.
    pub(crate) step_timeout: Duration,
    /// Seeds the jitter of the pauses between attempts.
    pub(crate) seed: u64,
}

/// The session file, as commands name it.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub(crate) session: String,
    /// ` --session-dir …`, if the command needs the option.
    pub(crate) directory_option: String,
}

impl Kept {
    /// The command with which another process continues the session.
    pub(crate) fn command(&self) -> String {
        format!("umem migrate --resume {}{}", self.session, self.directory_option)
    }
}

/// The record of a guest that may have been given away.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Left {
    /// The highest epoch of any attempt to open lanes.
    pub(crate) epoch: u32,
    /// The destination's last report.
    pub(crate) heard: Heard,
    pub(crate) stopped: Instant,
    pub(crate) switched: Instant,
}

/// An event that the core handles.
#[derive(Debug)]
pub(crate) enum Input {
    /// All lanes are open, and no frame has been sent.
    Begin,
    /// Continues the session of another process.
    TakeOver,
    /// Time has passed.
    Time,
    /// A frame has come on the demand lane.
    Received(umem_wire::Event),
    /// The device state has been handed to the kernel.
    StateLeft,
    /// A bulk lane has sent all the pages that it found.
    BulkEnded,
    /// A bulk lane has sent the dirty pages of its blocks.
    PassEnded,
    /// Answers [`Effect::CountDirty`]: the dirty pages, and the bytes that have been sent in rounds.
    Counted { left: LeftToSend, sent_bytes: u64 },
    /// A thread has failed: a lane is lost, or a worse fault has occurred.
    Failed(Error),
    /// The monitor has answered.
    Monitor(Answer),
    /// The digests of the memory here; None if they are not known.
    Digested(Result<Option<Vec<u64>>>),
    /// An order of `umem control` or of the embedding program.
    Order(Order),
    /// An order: end the passes and stop the guest.
    EndPasses,
    /// An order: the driver has received connections, and opens lanes on them.
    Given,
    /// A signal asks umem to end.
    Interrupted,
    /// The driver can wait for nothing any more.
    Abandoned(Error),
    /// An effect has failed, or the driver has a bug.
    NotDone(Error),
    /// No cancellation has come, and none is possible any more: answers [`Effect::Commit`].
    Committed,
    /// All messages of the lanes' threads have been handed in: answers [`Effect::TakeDown`].
    LanesDown,
    /// Answers [`Effect::Open`].
    Opened(Opened),
    /// Answers [`Effect::Call`].
    Called(Called),
}

/// The result of an attempt to open lanes.
#[derive(Debug)]
pub(crate) enum Opened {
    /// The lanes are open. The destination has reported its pages, and the sides agree on them.
    Lanes(Standing),
    /// Another attempt may succeed.
    NotNow(Error),
    /// The sides disagree on the pages that have arrived, or the guest has ended: the migration cannot continue.
    Never(Error),
}

/// An action for the driver.
#[derive(Debug)]
pub(crate) enum Effect {
    /// Write this record, before any effect that follows.
    Persist(Record),
    /// Remove the record: no takeover is needed any more.
    Forget,
    /// Pass the point after which a cancellation is too late. Answered by [`Input::Committed`].
    Commit,
    /// Ask the monitor. [`Input::Monitor`] answers after any time, or never.
    Ask(Question),
    /// Start the protocol: send the region table.
    SendRegions,
    /// Take the destination's landing units.
    Land(RegionTable),
    /// The guest stands still: its files no longer change, and its pages may be sent.
    Fix,
    Send(Frame),
    /// Send the device state and its end; [`Input::StateLeft`] follows once it has left.
    SendState(Vec<u8>),
    /// Send the switchover: the guest then belongs to the destination.
    Switchover,
    /// Report that no more pages come, with the totals sent.
    Goodbye(Goodbye),
    Ping(u64),
    /// Have the bulk lanes send the dirty pages once. Each lane reports the end with [`Input::PassEnded`].
    SendPass,
    /// Have the bulk lanes end the pass after their current blocks. Each lane reports the end with
    /// [`Input::PassEnded`].
    CutPass,
    /// Count the dirty pages. Answered by [`Input::Counted`].
    CountDirty,
    /// The guest stands still. From here on each page is sent at most once, and the dirty pages remain to be sent. Send
    /// that on all lanes.
    EndRounds,
    /// Have the bulk lanes send the pages that no demand has asked for.
    SendBulk,
    /// Free the pages that the destination has, from now on.
    StartRelease,
    EndRelease,
    /// Read all memory. Answered by [`Input::Digested`] later.
    Digest,
    /// Check that the guest's files are unchanged. Compare them with checksums if the checksums of both sides are
    /// known.
    CheckFiles {
        are_compared: bool,
    },
    /// End the threads of the lanes, hand in their last messages, then [`Input::LanesDown`].
    TakeDown,
    /// Open all lanes once, and receive the destination's pages. Answered by [`Input::Opened`]. An order or an
    /// interrupt ends the attempt early.
    Open {
        way: Way,
        epoch: u32,
    },
    /// Close the lanes that were opened.
    HangUp,
    /// Serve the lanes that were opened.
    Serve,
    /// End all threads. After a failure its reason is the last frame on the lanes.
    EndThreads(Option<Fault>),
    /// Dial once to send this message. Answered by [`Input::Called`].
    Call {
        uri: Uri,
        epoch: u32,
        until: Instant,
        word: Word,
    },
    /// Free the guest's memory here, if the options ask for that.
    FreeRest,
    /// Keep cores awake while the guest stands still, or stop doing so.
    StayAwake,
    Relax,
    /// The current activity, for the display.
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

/// A record for another process. The monitor module writes the settings to undo itself, before it stops the guest.
#[derive(Clone, Debug)]
pub(crate) enum Record {
    /// A switchover may be sent from now on.
    Committed { background: bool, times: Times },
    /// No switchover was sent, and none will be.
    Stopped,
    /// The pages here are not needed any more.
    Completed,
    /// The epoch of the next attempt, and its address.
    Epoch { epoch: u32, uri: Option<Uri> },
    /// The destination's last report, for the user.
    Heard(Heard),
    /// A RAM file has failed: the next `--resume` means that the user has restored it.
    FileFailed,
}

impl Record {
    /// Whether a failed write of the record prevents the effects that follow. Without one of the other records another
    /// process does redundant work: it asks both sides, is refused for a while, or repeats a message.
    pub(crate) fn is_vital(&self) -> bool {
        matches!(self, Record::Committed { .. })
    }
}

/// The form of the goodbye.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goodbye {
    /// For a destination that ends when it receives the goodbye.
    Said,
    /// Followed by a ping, which the destination answers after it has written the goodbye to its record.
    Asked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Question {
    /// Track the guest's writes.
    Track,
    /// Whether all pages that the guest has written so far are marked dirty.
    Look,
    Stop,
    Save,
    /// Whether the guest stands still, and no other client could resume it.
    StandsStill,
    PutBack,
    Resume,
}

/// The means of opening lanes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Dial(Uri),
    /// On connections that the driver holds.
    Given,
}

/// The destination's last report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Heard {
    /// The guest runs there.
    pub(crate) is_running: bool,
    /// Bytes of its memory that have arrived there.
    pub(crate) bytes: u64,
}

/// The times of the migration's steps.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times {
    pub(crate) stopped: Option<Instant>,
    /// When the switchover was sent, the last time.
    pub(crate) switched: Option<Instant>,
    pub(crate) running: Option<Instant>,
    pub(crate) first_page: Option<Instant>,
    pub(crate) completed: Option<Instant>,
}

impl Times {
    /// For how long the guest had stood still when the switchover was sent, µs: what the switchover says.
    pub(crate) fn stopped_us(&self) -> u64 {
        self.stopped.zip(self.switched).map_or(0, |(stopped, switched)| {
            let stood = switched.saturating_duration_since(stopped);
            u64::try_from(stood.as_micros()).unwrap_or(u64::MAX)
        })
    }

    /// From the last instruction at the source to the first one at the destination: both sides have the same number.
    pub(crate) fn downtime(&self) -> Duration {
        match (self.stopped, self.running) {
            (Some(stopped), Some(running)) => running.saturating_duration_since(stopped),
            _ => Duration::ZERO,
        }
    }
}

/// The end of the migration.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The destination has everything.
    Completed(Totals),
    Failed {
        error: Error,
        guest: Guest,
    },
}

/// The owner and the state of the guest after a failure.
#[derive(Debug)]
pub(crate) enum Guest {
    /// It runs here, as before.
    Here,
    /// It stands still here: its monitor did not resume it.
    Stopped(Error),
    /// It stands still here, or continues later: its monitor has not answered.
    Asked,
    /// It may run at the destination, which may need the pages here.
    Away,
    /// It has all of its memory at the destination.
    Complete,
}

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
    /// Why the record of a guest that was never stopped is kept.
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
        self.epoch = next
            .ok_or_else(|| Error::Unsupported("the connection has been lost too often".into()))?;
        let (epoch, uri) = (self.epoch, self.route.uri().cloned());
        self.do_next(Effect::Persist(Record::Epoch { epoch, uri }));
        Ok(epoch)
    }
}

/// The destination gave up for this reason.
pub(crate) fn peer(fault: Fault) -> Error {
    Error::Peer { side: "destination", code: fault.code, text: fault.text }
}
