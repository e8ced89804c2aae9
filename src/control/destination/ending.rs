//! The end of a migration: the owner of the guest, the reports, and the state for a takeover.

use umem_wire::destination::Phase;
use umem_wire::{Fault, FaultCode};

use super::{
    Core, Effect, Effects, Failure, Input, Moment, Outcome, Owner, Process, Stage, Voice,
    say_not_written,
};
use crate::error::Error;
use crate::events::{Event, Remark};

/// The decision when the threads end.
#[derive(Debug)]
pub(super) enum Verdict {
    /// The guest has all of its memory.
    Complete,
    /// The guest was not served again: its state is as the earlier process left it.
    Untouched(Error),
    /// The guest waits here for a takeover, indefinitely if none comes.
    Stays(Error),
    /// The guest ends with umem, or has ended.
    Ends(Error),
}

impl Core {
    /// The migration cannot continue. Its cause is sought before any decision.
    pub(super) fn fail(&mut self, failure: Failure, effects: &mut Effects) {
        let Failure { error, voice } = failure;
        effects.drop_question();
        let is_taken_up = !matches!(self.stage, Stage::TakingOver);
        if is_taken_up {
            self.stage = Stage::Seeking(voice);
            effects.push(Effect::SeekCause(error));
        } else {
            // The guest waits as before, and its record stays.
            self.stage = Stage::Stopping(Verdict::Untouched(error));
            effects.push(Effect::EndThreads { told: None, has_failed: true });
        }
    }

    /// Handles an input during the end.
    pub(super) fn end(&mut self, input: Input, now: &Moment, effects: &mut Effects) {
        match (&self.stage, input) {
            (&Stage::Seeking(voice), Input::Cause { error, process }) => {
                self.decide(voice, error, process, effects);
            }
            // The state of the guest cannot be determined: that alone does not end the guest.
            (&Stage::Seeking(voice), Input::Failed(error) | Input::NotDone(error)) => {
                self.decide(voice, error, Process::Stays, effects);
            }
            (Stage::Stopping(_), Input::ThreadsEnded | Input::Failed(_) | Input::NotDone(_)) => {
                self.part(now, effects);
            }
            (Stage::Releasing, Input::Released) => self.say_goodbye(now, effects),
            // In the first case the guest is complete; only the result of its process is missing.
            (Stage::Releasing | Stage::Ended, Input::Failed(error) | Input::NotDone(error)) => {
                self.finish(Outcome::Failed(error), effects);
            }
            (_, Input::NotWritten { state, error }) => say_not_written(state, &error, effects),
            _ => {}
        }
    }

    /// The owner of the guest decides whether the guest stays, and the data for a takeover with it. From *loaded* on
    /// the source may have given its guest up. Then only the source or the user ends this guest.
    fn decide(&mut self, voice: Voice, error: Error, process: Process, effects: &mut Effects) {
        let is_there = process != Process::Gone;
        let stays = match self.owner() {
            Owner::Source => false,
            Owner::Undecided => {
                is_there
                    && self.terms.session.is_some()
                    && !matches!(error, Error::Peer { .. } | Error::Interrupted(_))
            }
            Owner::Ours => process == Process::Stays,
        };
        let fault = match self.owner() {
            Owner::Undecided | Owner::Ours if !stays => {
                Fault { code: FaultCode::Ended, ..error.to_fault() }
            }
            _ => error.to_fault(),
        };
        let told = (voice == Voice::Tells).then_some(fault);
        self.stage = Stage::Stopping(match stays {
            true => Verdict::Stays(error),
            false => Verdict::Ends(error),
        });
        effects.extend([Effect::Show("ending"), Effect::EndThreads { told, has_failed: true }]);
    }

    /// The threads have ended.
    fn part(&mut self, now: &Moment, effects: &mut Effects) {
        let stage = std::mem::replace(&mut self.stage, Stage::Ended);
        let Stage::Stopping(verdict) = stage else { return };
        match verdict {
            Verdict::Complete => {
                self.stage = Stage::Releasing;
                effects.push(Effect::Release);
            }
            Verdict::Untouched(error) => self.finish(Outcome::Failed(error), effects),
            Verdict::Ends(error) => {
                // In this order: a process that is killed in between leaves the record of a guest that has ended, never
                // a guest without a record.
                effects.extend([Effect::EndGuest, Effect::Forget]);
                let error = self.explain(error, now);
                self.finish(Outcome::Failed(error), effects);
            }
            Verdict::Stays(error) => {
                effects.push(Effect::LetWait);
                if let Some(session) = &self.terms.session {
                    effects.push(Effect::Report(Event::Stays {
                        session: Some(session.number.clone()),
                        is_loaded_only: self.owner() == Owner::Undecided,
                        command: session.command(),
                    }));
                }
                let error = self.explain(error, now);
                self.finish(Outcome::Failed(error), effects);
            }
        }
    }

    /// Ends the session, unless the source has not received the completion. In that case this process stays for the
    /// source for a while, and the record stays for a later `--resume`.
    fn say_goodbye(&mut self, now: &Moment, effects: &mut Effects) {
        let unheard = match (&self.phase, &self.terms.session) {
            (Phase::Completed(None), Some(session)) => {
                let (session, command) = (session.number.clone(), session.command());
                effects.push(Effect::Report(Event::Remark(Remark::SourceUnaware {
                    session,
                    command,
                })));
                Some(self.standing(now))
            }
            (Phase::Completed(None), None) => None,
            _ => {
                effects.push(Effect::Forget);
                None
            }
        };
        self.finish(Outcome::Complete { unheard }, effects);
    }

    fn finish(&mut self, outcome: Outcome, effects: &mut Effects) {
        self.stage = Stage::Ended;
        effects.push(Effect::Finish(outcome));
    }

    /// Adds the consequence of an error for the guest.
    fn explain(&self, error: Error, now: &Moment) -> Error {
        match error {
            Error::Lost { side, lane, what } if self.owner() == Owner::Ours => Error::Lost {
                side,
                lane,
                what: format!(
                    "{what}; the guest runs here and waits for {} pages that only the source has: do not start the \
                     guest there again",
                    now.memory.pages_missing
                ),
            },
            other => other,
        }
    }

    /// The guest's process has ended too early.
    pub(super) fn guest_died(&self, how: &str) -> Error {
        match self.owner() {
            _ if self.phase == Phase::Completing => Error::Ended(format!(
                "the guest's process ended{how} after all of its memory had arrived, before the source's goodbye"
            )),
            Owner::Ours => Error::Ended(format!(
                "the guest's process ended{how} before all of its memory had arrived"
            )),
            Owner::Source | Owner::Undecided => {
                Error::Host(format!("it exited{how} before the guest arrived"))
            }
        }
    }
}
