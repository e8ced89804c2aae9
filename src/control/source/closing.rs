//! The destination has everything: memory is compared, the goodbye is sent, and no page is left to serve.

use std::time::{Duration, Instant};

use umem_wire::source::{Input as Step, Phase};
use umem_wire::{Event as Said, FaultCode, Frame};

use super::{
    Doing, Effect, Goodbye, Input, Moment, Outcome, Parted, PutBack, Record, Source, Then, peer,
};
use crate::control::calling::{Call, Called, Next, Word};
use crate::error::{Error, Result};
use crate::events::{Event, Remark};

/// How long a monitor may take to restore settings that have no effect on the guest.
const TIDY_PATIENCE: Duration = Duration::from_secs(5);

/// How long the destination may take to answer the goodbye. Nothing depends on the answer.
const GOODBYE_PATIENCE: Duration = Duration::from_secs(2);

/// How long the goodbye is sent again. A destination that was killed and resumed listens again within this time.
const GOODBYE_AGAIN_PATIENCE: Duration = Duration::from_secs(5);

/// The ping behind the goodbye. The destination answers it after it has written the goodbye to its record.
pub(crate) const GOODBYE_PING: u64 = u64::MAX;

#[derive(Debug)]
pub(super) enum Closing {
    /// All memory here is read.
    Comparing { lanes: Lanes },
    /// The goodbye has been sent. The destination may acknowledge it until this time.
    Parting { until: Instant },
}

/// The lanes on which the goodbye can be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lanes {
    Up,
    Lost,
}

impl Closing {
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self {
            Closing::Comparing { .. } => None,
            Closing::Parting { until } => Some(*until),
        }
    }
}

/// The digests of both sides.
#[derive(Debug)]
pub(super) struct Digests {
    theirs: Option<Vec<u64>>,
    ours: Ours,
}

#[derive(Debug)]
enum Ours {
    /// They are not known yet.
    Missing,
    /// There are none, or they cannot be known.
    None,
    Known(Vec<u64>),
}

impl Digests {
    pub(super) fn new(is_checked: bool) -> Digests {
        let ours = if is_checked { Ours::Missing } else { Ours::None };
        Digests { theirs: None, ours }
    }

    pub(super) fn heard(&mut self, digests: Vec<u64>) {
        self.theirs = Some(digests);
    }

    pub(super) fn both(&self) -> (Option<&[u64]>, Option<&[u64]>) {
        let ours = match &self.ours {
            Ours::Known(ours) => Some(&ours[..]),
            Ours::Missing | Ours::None => None,
        };
        (ours, self.theirs.as_deref())
    }
}

impl Source {
    /// The destination has everything. The goodbye follows, after the digest of the memory here if memory is compared.
    pub(super) fn completed(&mut self, now: &Moment) {
        self.times.completed = Some(now.at);
        let lanes = match self.doing {
            Doing::Linked(_) => Lanes::Up,
            _ => Lanes::Lost,
        };
        self.doing = Doing::Closing(Closing::Comparing { lanes });
        if matches!(self.digests.ours, Ours::Missing) {
            self.do_next(Effect::EndRelease);
            self.do_next(Effect::Show("comparing"));
            self.do_next(Effect::Digest);
        } else {
            self.say_goodbye(lanes, now);
        }
    }

    pub(super) fn closing(&mut self, input: Input, now: &Moment) -> Result<()> {
        match (input, &self.doing) {
            (Input::Received(event), _) => self.said_while_closing(event, now),
            (Input::Failed(Error::Lost { .. }), _) => {
                self.lanes_are_lost(now);
                Ok(())
            }
            (Input::Failed(error), _) => Err(error),
            (Input::Monitor(answer), _) => self.answered(answer, now),
            (Input::Digested(outcome), _) => self.digested(outcome, now),
            // Everything has been sent.
            (Input::Interrupted, Doing::Closing(Closing::Parting { .. })) => {
                self.finish(Parted::Heard, now);
                Ok(())
            }
            (Input::Interrupted, _) => {
                self.say_what_is_needed(now);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn said_while_closing(&mut self, event: Said, now: &Moment) -> Result<()> {
        match (&event, &self.doing) {
            (Said::Pong(GOODBYE_PING), Doing::Closing(Closing::Parting { .. })) => {
                self.finish(Parted::Heard, now);
                Ok(())
            }
            // The guest there ended before the goodbye arrived: neither side has completed.
            (Said::Error(fault), _) if fault.code == FaultCode::Ended => Err(peer(fault.clone())),
            // The destination knows that everything has arrived.
            (Said::Error(_), _) => Ok(()),
            _ => self.step(Step::Received(&event)),
        }
    }

    fn lanes_are_lost(&mut self, now: &Moment) {
        match &mut self.doing {
            Doing::Closing(Closing::Comparing { lanes }) => *lanes = Lanes::Lost,
            // It is unknown whether the goodbye has arrived.
            Doing::Closing(Closing::Parting { .. }) => self.finish(Parted::Unheard, now),
            _ => {}
        }
    }

    /// The digest of the memory here is known. A failed digest changes nothing for the guest, which has moved, unless
    /// its cause is the files: these may have failed before, too.
    pub(super) fn digested(
        &mut self,
        outcome: Result<Option<Vec<u64>>>,
        now: &Moment,
    ) -> Result<()> {
        let ours = match outcome {
            Ok(ours) => ours,
            Err(error @ Error::RamFailed { .. }) => return Err(error),
            Err(error) => {
                self.tell(Event::Remark(Remark::NotCompared { reason: error.to_string() }));
                None
            }
        };
        self.digests.ours = match ours {
            Some(ours) => {
                self.do_next(Effect::Send(Frame::Digests(ours.clone())));
                Ours::Known(ours)
            }
            None => Ours::None,
        };
        if let Doing::Closing(Closing::Comparing { lanes }) = self.doing {
            self.say_goodbye(lanes, now);
        }
        Ok(())
    }

    /// The record is written before the goodbye is sent: a process that takes over then knows that the pages here are
    /// not needed, whether or not the destination has received the goodbye.
    fn say_goodbye(&mut self, lanes: Lanes, now: &Moment) {
        let are_compared = matches!(self.digests.both(), (Some(_), Some(_)));
        // Before the goodbye confirms that the destination has the memory that was here.
        self.do_next(Effect::CheckFiles { are_compared });
        self.do_next(Effect::Persist(Record::Completed));
        match lanes {
            Lanes::Lost => self.finish(Parted::Unheard, now),
            Lanes::Up if self.plan.kept.is_some() => {
                self.do_next(Effect::Goodbye(Goodbye::Asked));
                let until = now.at + GOODBYE_PATIENCE;
                self.doing = Doing::Closing(Closing::Parting { until });
            }
            Lanes::Up => {
                self.do_next(Effect::Goodbye(Goodbye::Said));
                self.finish(Parted::Heard, now);
            }
        }
    }

    /// No page is left to serve.
    pub(super) fn finish(&mut self, goodbye: Parted, now: &Moment) {
        self.do_next(Effect::EndThreads(None));
        match self.put_back {
            PutBack::Asked => {
                let until = now.at + TIDY_PATIENCE;
                self.doing = Doing::PuttingBack { until, goodbye };
            }
            PutBack::NotAsked | PutBack::Answered => self.part(goodbye, now),
        }
    }

    pub(super) fn not_put_back(&mut self, goodbye: Parted, now: &Moment) {
        self.has_put_back(&Err(Error::Host("it does not answer".into())));
        self.part(goodbye, now);
    }

    /// Sends a lost goodbye again: a destination that was killed at that moment, or that cannot be reached now, would
    /// wait for it.
    pub(super) fn part(&mut self, goodbye: Parted, now: &Moment) {
        let uri = self.route.uri().filter(|uri| !uri.is_one_connection());
        match (goodbye, uri) {
            (Parted::Unheard, Some(uri)) => {
                let (uri, patience) = (uri.clone(), GOODBYE_AGAIN_PATIENCE);
                let call = Call::new(uri, Word::Goodbye, patience, now.at);
                self.doing = Doing::Calling(call, Then::Complete);
                self.look_after_call(now);
            }
            _ => self.is_complete(),
        }
    }

    pub(super) fn is_complete(&mut self) {
        let Phase::Completed(totals) = self.phase else { unreachable!("it is closing") };
        self.do_next(Effect::FreeRest);
        self.do_next(Effect::Forget);
        self.doing = Doing::Ended(Outcome::Completed(totals));
    }

    pub(super) fn calling(&mut self, input: Input, now: &Moment) {
        let Doing::Calling(call, _) = &mut self.doing else { return };
        let next = match input {
            Input::Called(called) => call.called(called, now.at),
            Input::Interrupted => call.called(
                Called::NotHeard(Error::Interrupted("no destination is notified".into())),
                now.at,
            ),
            _ => return,
        };
        self.call_goes_on(next);
    }

    pub(super) fn look_after_call(&mut self, now: &Moment) {
        let Doing::Calling(call, _) = &mut self.doing else { return };
        let next = call.look(now.at);
        self.call_goes_on(next);
    }

    fn call_goes_on(&mut self, next: Next) {
        let told = match next {
            Next::Wait => return,
            Next::Dial => match self.next_epoch() {
                Ok(epoch) => {
                    let Doing::Calling(call, _) = &self.doing else { return };
                    let Call { uri, word, until, .. } = call;
                    let (uri, word, until) = (uri.clone(), word.clone(), *until);
                    return self.do_next(Effect::Call { uri, epoch, until, word });
                }
                Err(error) => Err(error),
            },
            Next::Over(told) => told,
        };
        let Doing::Calling(call, then) = self.change() else { return };
        match then {
            Then::Complete => self.is_complete(),
            Then::Stays(error) => self.stays(error, &call.uri, told),
        }
    }
}
