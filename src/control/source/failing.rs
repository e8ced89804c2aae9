//! After a failure: its cause, the notices, and the guest that continues here if it may.

use std::time::{Duration, Instant};

use umem_wire::source::Phase;
use umem_wire::{Event as Said, FaultCode, LaneRole};

use super::{
    Doing, Doubt, Effect, Guest, Input, Moment, Outcome, Question, Record, Source, Switchover,
    Then, is_effect, peer,
};
use crate::control::calling::{Call, Word, is_nobody};
use crate::error::{Error, Result, lane_name};
use crate::events::{Event, Remark};
use crate::host::monitor::Answer;
use crate::transport::uri::Uri;

/// How far the demand lane may lag behind a bulk lane when a destination gives up.
const CAUSE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a monitor may take to restore the settings of a guest that was never stopped.
const TIDY_PATIENCE: Duration = Duration::from_secs(5);

/// Why the monitor's settings may not have been restored.
const UNANSWERED: &str = "it has not answered";

/// How long a monitor may take to resume its guest before an event reports the delay.
const RESUME_PATIENCE: Duration = Duration::from_secs(10);

/// How long a destination that may have loaded the guest is dialed.
const TELL_PATIENCE: Duration = Duration::from_secs(30);

/// The monitor has been asked to resume the guest here.
#[derive(Debug)]
pub(super) struct Resuming {
    error: Error,
    patience: Patience,
    /// The destination may have loaded the guest, and could not be notified why it does not get the guest.
    untold: Option<Uri>,
}

#[derive(Debug)]
enum Patience {
    /// The guest was never stopped: there is little to undo, and the wait is short.
    Tidy { until: Instant },
    /// An event reports the delay at this time, or at an interrupt.
    Quiet { until: Instant },
    /// The user knows that an interrupt leaves the guest as it is. The delay is reported then, if it was not yet.
    Known { until: Option<Instant> },
}

impl Resuming {
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.patience {
            Patience::Tidy { until } | Patience::Quiet { until } => Some(until),
            Patience::Known { until } => until,
        }
    }
}

impl Source {
    /// A failure ends the migration.
    pub(super) fn fail(&mut self, error: Error, now: &Moment) {
        self.effects.drop_question();
        match self.doing {
            Doing::Ended(Outcome::Failed { .. }) => {}
            // The loss of a bulk lane may have a cause that arrives on the demand lane.
            Doing::Linked(_) | Doing::Cut(_) if is_effect(&error) => {
                self.doing = Doing::Blaming(Doubt { error, until: now.at + CAUSE_TIMEOUT });
            }
            _ => self.give_up(error, now),
        }
    }

    pub(super) fn blaming(&mut self, input: Input) -> Result<()> {
        match input {
            Input::Failed(error) if !is_effect(&error) => Err(error),
            Input::Received(Said::Error(fault)) => Err(peer(fault)),
            Input::Interrupted => self.is_to_blame(),
            _ => Ok(()),
        }
    }

    /// No cause has arrived.
    pub(super) fn is_to_blame(&mut self) -> Result<()> {
        match self.change() {
            Doing::Blaming(doubt) => Err(doubt.error),
            doing => {
                self.doing = doing;
                Ok(())
            }
        }
    }

    fn give_up(&mut self, error: Error, now: &Moment) {
        let untold = self.untold(&error);
        let is_given_away = !self.phase.may_run() && self.switchover != Switchover::Refused;
        if !is_given_away && self.times.stopped.is_some() {
            // Written before the destination learns that it does not get the guest: otherwise a later `--resume` would
            // look there for a guest that has ended. If the write fails, `--resume` asks both sides.
            self.do_next(Effect::Persist(Record::Stopped));
        }
        // After the commit a panic looks to the destination like a kill: the lanes end. The destination then waits for
        // the umem that takes this session over, and does not give up as well. The same holds while neither side has
        // the guest.
        let is_kept = is_given_away && self.plan.recovers && self.plan.kept.is_some();
        let is_owed = matches!(self.switchover, Switchover::Owed { .. });
        let is_silent = match error {
            Error::Internal(_) => true,
            Error::Interrupted(_) => is_owed,
            _ => false,
        };
        let is_told = !(is_kept && is_silent);
        self.do_next(Effect::EndThreads(is_told.then(|| error.to_fault())));
        if is_given_away {
            return self.is_given_away(error);
        }
        self.do_next(Effect::Ask(Question::Resume));
        let patience = if self.times.stopped.is_none() {
            Patience::Tidy { until: now.at + TIDY_PATIENCE }
        } else {
            let until = now.at + RESUME_PATIENCE;
            // After an interrupt the user knows why umem waits.
            match error {
                Error::Interrupted(_) => Patience::Known { until: Some(until) },
                _ => Patience::Quiet { until },
            }
        };
        self.doing = Doing::Resuming(Resuming { error, patience, untold });
    }

    /// The address of a destination that must be notified that it does not get a guest that it may have loaded, if
    /// there are no lanes for that message.
    fn untold(&self, error: &Error) -> Option<Uri> {
        let may_be_loaded = matches!(self.phase, Phase::Loading { .. } | Phase::Loaded { .. })
            || self.switchover == Switchover::Refused;
        let has_no_lanes =
            matches!(error, Error::Lost { .. }) || matches!(self.doing, Doing::Cut(_));
        let uri = self.route.uri().filter(|uri| !uri.is_one_connection());
        uri.filter(|_| may_be_loaded && has_no_lanes && self.plan.recovers).cloned()
    }

    /// The guest belongs to the destination, as far as this side knows.
    fn is_given_away(&mut self, error: Error) {
        let is_complete = matches!(self.phase, Phase::Completed(_));
        let has_file_failed = matches!(error, Error::RamFailed { .. });
        if matches!(error, Error::Peer { code: FaultCode::Ended, .. })
            || is_complete && has_file_failed
        {
            // The guest there has ended, or has every page: the migration cannot continue.
            self.do_next(Effect::Forget);
        } else if has_file_failed {
            // With this record the next `--resume` means that the user has restored the file.
            self.do_next(Effect::Persist(Record::FileFailed));
        }
        let guest = if is_complete { Guest::Complete } else { Guest::Away };
        self.doing = Doing::Ended(Outcome::Failed { error, guest });
    }

    pub(super) fn resuming(&mut self, input: Input, now: &Moment) {
        let Doing::Resuming(resuming) = &mut self.doing else { return };
        match (input, &mut resuming.patience) {
            (
                Input::Monitor(Answer::Resumed(Err(why))),
                Patience::Quiet { .. } | Patience::Known { .. },
            ) => self.is_not_resumed(Guest::Stopped(why)),
            (Input::Monitor(Answer::Resumed(Err(why))), Patience::Tidy { .. }) => {
                self.is_not_tidied(why.to_string());
                self.goes_on(now);
            }
            (Input::Monitor(Answer::Resumed(Ok(()))), _) => self.goes_on(now),
            (Input::Interrupted, Patience::Tidy { .. }) => {
                self.is_not_tidied(UNANSWERED.into());
                self.goes_on(now);
            }
            // An embedding program has another way to end the migration. It is not a cancellation.
            (Input::Interrupted, _) if self.plan.is_embedded => {}
            (Input::Interrupted, Patience::Known { .. }) => self.is_not_resumed(Guest::Asked),
            (Input::Interrupted, patience @ Patience::Quiet { .. }) => {
                *patience = Patience::Known { until: None };
                self.tell(Event::Remark(Remark::AwaitsMonitor));
            }
            _ => {}
        }
    }

    pub(super) fn look_after_monitor(&mut self, now: &Moment) {
        let Doing::Resuming(resuming) = &mut self.doing else { return };
        if resuming.deadline().is_none_or(|until| until > now.at) {
            return;
        }
        match resuming.patience {
            Patience::Tidy { .. } => {
                self.is_not_tidied(UNANSWERED.into());
                self.goes_on(now);
            }
            Patience::Quiet { .. } | Patience::Known { .. } => {
                resuming.patience = Patience::Known { until: None };
                self.tell(Event::Remark(Remark::AwaitsMonitor));
            }
        }
    }

    fn is_not_resumed(&mut self, guest: Guest) {
        if let Doing::Resuming(Resuming { error, .. }) = self.change() {
            self.doing = Doing::Ended(Outcome::Failed { error, guest });
        }
    }

    /// The guest continues here.
    fn goes_on(&mut self, now: &Moment) {
        let Doing::Resuming(Resuming { error, untold, .. }) = self.change() else { return };
        match untold {
            Some(uri) => {
                let (lane, reason) = match &error {
                    Error::Lost { lane, what, .. } => (lane.clone(), what.clone()),
                    error => (lane_name(LaneRole::Demand, 0), error.to_string()),
                };
                self.tell(Event::Telling { uri: uri.clone(), lane, reason });
                let why = Error::Interrupted(
                    "the guest continues at the source, which had lost the connection".into(),
                );
                let call = Call::new(uri, Word::GaveUp(why.to_fault()), TELL_PATIENCE, now.at);
                self.doing = Doing::Calling(call, Then::Stays(error));
                self.look_after_call(now);
            }
            None => self.is_back(error),
        }
    }

    /// The destination has been notified that the guest stays here, or could not be reached.
    pub(super) fn stays(&mut self, error: Error, uri: &Uri, told: Result<()>) {
        // If connections are refused, no destination waits.
        if let Err(why) = told
            && !is_nobody(&why)
        {
            self.tell(Event::Untold { uri: uri.clone(), reason: why.to_string() });
        }
        self.is_back(error);
    }

    /// The guest was never stopped, but the settings changed to track its writes may still be in its monitor.
    /// `--resume` restores them.
    fn is_not_tidied(&mut self, reason: String) {
        if self.rounds.is_some() && self.plan.kept.is_some() {
            self.not_tidied = Some(reason);
        }
    }

    fn is_back(&mut self, error: Error) {
        let effect = match self.not_tidied.take() {
            Some(reason) => Effect::ReportUnrestored { reason },
            None => Effect::Forget,
        };
        self.do_next(effect);
        self.doing = Doing::Ended(Outcome::Failed { error, guest: Guest::Here });
    }

    /// The driver can wait for nothing any more: pending work is left as it is.
    pub(super) fn abandon(&mut self, error: Error, now: &Moment) {
        match self.change() {
            Doing::Ended(outcome) => self.doing = Doing::Ended(outcome),
            Doing::PuttingBack { .. } | Doing::Calling(_, Then::Complete) => self.is_complete(),
            Doing::Calling(call, Then::Stays(failure)) => {
                self.stays(failure, &call.uri, Err(error));
            }
            Doing::Resuming(_) => self.is_left(error),
            doing => {
                self.doing = doing;
                self.give_up(error, now);
                self.no_answer_is_waited_for();
            }
        }
    }

    fn no_answer_is_waited_for(&mut self) {
        match self.change() {
            Doing::Resuming(Resuming { error, patience: Patience::Tidy { .. }, .. }) => {
                self.is_not_tidied(UNANSWERED.into());
                self.is_back(error);
            }
            Doing::Resuming(Resuming { error, .. }) => self.is_left(error),
            doing => self.doing = doing,
        }
    }

    /// The monitor has been asked to resume the guest, and its answer is not waited for any more.
    fn is_left(&mut self, error: Error) {
        self.doing = Doing::Ended(Outcome::Failed { error, guest: Guest::Asked });
    }
}
