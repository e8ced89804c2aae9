//! A session that a process has left in which nothing is served: the guest goes on here, or its destination has
//! everything. What is left is to tell the destination so.
//!
//! ```text
//! no switchover had left:    Undo -> Undone ---+
//!                                              +--> Calling --> Ended
//! the destination has everything: -------------+
//! ```

use std::time::{Duration, Instant};

use crate::control::Effects;
use crate::control::calling::{Call, Called, Next, Word};
use crate::error::{Error, Result};
use crate::events::{Event, Remark, Undone};
use crate::transport::uri::Uri;

/// How long a destination is tried that needs nothing but a word.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub(crate) enum Input {
    Begin,
    Time,
    /// The monitor has been asked to have the guest go on: answers [`Effect::Undo`].
    Undone(Result<Undone>),
    /// Answers [`Effect::Call`].
    Called(Called),
    NotDone(Error),
}

#[derive(Debug)]
pub(crate) enum Effect {
    /// Have the guest go on here, if it is still this session's to resume. Answered by [`Input::Undone`].
    Undo,
    /// Write down that this number is used.
    Epoch(u32),
    /// Dial once to say this. Answered by [`Input::Called`].
    Call {
        epoch: u32,
        until: Instant,
        word: Word,
    },
    /// Free the guest's memory here, where that was wished.
    Free,
    /// Remove the record.
    Forget,
    Tell(Event),
}

impl crate::control::Effect for Effect {
    fn has_answer(&self) -> bool {
        match self {
            Effect::Undo | Effect::Call { .. } => true,
            Effect::Epoch(_) | Effect::Free | Effect::Forget | Effect::Tell(_) => false,
        }
    }
}

#[derive(Debug)]
enum Doing {
    Undoing,
    Calling(Call, About),
    Ended(Result<()>),
}

/// What the destination is told.
#[derive(Clone, Copy, Debug)]
enum About {
    /// That the guest stays here.
    Stays,
    /// The goodbye.
    Parts,
}

#[derive(Debug)]
pub(crate) struct Leftover {
    session: String,
    uri: Uri,
    /// Of the last attempt to open lanes, of any process.
    epoch: u32,
    doing: Doing,
    effects: Effects<Effect>,
}

impl Leftover {
    /// No switchover had left.
    pub(crate) fn stopped(session: String, uri: Uri, epoch: u32) -> Leftover {
        Leftover { session, uri, epoch, doing: Doing::Undoing, effects: Effects::new() }
    }

    /// The destination has everything, and may not have heard the goodbye.
    pub(crate) fn completed(session: String, uri: Uri, epoch: u32, now: Instant) -> Leftover {
        let call = Call::new(uri.clone(), Word::Goodbye, PATIENCE, now);
        let doing = Doing::Calling(call, About::Parts);
        Leftover { session, uri, epoch, doing, effects: Effects::new() }
    }

    /// Takes what has happened; the answer is what is to be done, in order.
    pub(crate) fn handle(&mut self, input: Input, now: Instant) -> Effects<Effect> {
        self.take(input, now);
        std::mem::replace(&mut self.effects, Effects::new())
    }

    fn take(&mut self, input: Input, now: Instant) {
        let next = match (input, &mut self.doing) {
            (Input::Begin, Doing::Undoing) => return self.effects.push(Effect::Undo),
            (Input::Undone(Ok(how)), Doing::Undoing) => return self.is_undone(how, now),
            (Input::Undone(Err(error)) | Input::NotDone(error), Doing::Undoing) => {
                self.doing = Doing::Ended(Err(error));
                return;
            }
            (Input::Called(called), Doing::Calling(call, _)) => call.called(called, now),
            (Input::NotDone(error), Doing::Calling(..)) => Next::Over(Err(error)),
            (Input::Begin | Input::Time, Doing::Calling(call, _)) => call.look(now),
            _ => return,
        };
        self.call_goes_on(next);
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.doing {
            Doing::Calling(call, _) => call.deadline(),
            Doing::Undoing | Doing::Ended(_) => None,
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.doing, Doing::Ended(_))
    }

    /// How it has ended.
    pub(crate) fn into_outcome(self) -> Option<Result<()>> {
        match self.doing {
            Doing::Ended(outcome) => Some(outcome),
            Doing::Undoing | Doing::Calling(..) => None,
        }
    }

    fn is_undone(&mut self, how: Undone, now: Instant) {
        self.effects.push(Effect::Tell(Event::Undone { session: self.session.clone(), how }));
        // It would be waiting for a switchover, or has given up long ago.
        let why = Error::Interrupted("the source's umem was killed before the switchover".into());
        let word = Word::GaveUp(why.to_fault());
        let call = Call::new(self.uri.clone(), word, PATIENCE, now);
        self.doing = Doing::Calling(call, About::Stays);
    }

    fn call_goes_on(&mut self, next: Next) {
        let Doing::Calling(call, about) = &self.doing else { return };
        let about = *about;
        let told = match next {
            Next::Wait => return,
            Next::Dial => match self.epoch.checked_add(1) {
                Some(epoch) => {
                    let (until, word) = (call.until, call.word.clone());
                    self.epoch = epoch;
                    self.effects.push(Effect::Epoch(epoch));
                    self.effects.push(Effect::Call { epoch, until, word });
                    return;
                }
                None => Err(Error::Unsupported("the connection has been lost too often".into())),
            },
            Next::Over(told) => told,
        };
        match (about, told) {
            (About::Stays, told) => {
                if let Err(error) = told {
                    let (uri, reason) = (self.uri.clone(), error.to_string());
                    let remark = Remark::DestinationNotTold { uri, reason };
                    self.effects.push(Effect::Tell(Event::Remark(remark)));
                }
                self.effects.push(Effect::Forget);
            }
            (About::Parts, told) => {
                // Where nobody listens any more the goodbye has come, or nobody needs it.
                let how = Undone::Parted { is_told: told.is_ok() };
                self.effects.push(Effect::Free);
                self.effects.push(Effect::Forget);
                let session = self.session.clone();
                self.effects.push(Effect::Tell(Event::Undone { session, how }));
            }
        }
        self.doing = Doing::Ended(Ok(()));
    }
}
