//! A session whose process is gone, with no pages to serve: the guest continues here, its destination has everything,
//! or the user ends the session. In the first two cases the destination is notified. In the third case the
//! destination's address must not answer: the guest never runs here again.
//!
//! ```text
//! no switchover was sent:         Undoing ---+
//!                                            +--> Calling --> Ended
//! the destination has everything: -----------+                  ^
//! the user abandons the session:  Knocking ---------------------+
//! ```

use std::time::{Duration, Instant};

use crate::control::Effects;
use crate::control::calling::{Call, Called, Next, Word};
use crate::error::{Error, Result};
use crate::events::{Event, Remark, Undone};
use crate::session::SourceState;
use crate::transport::uri::Uri;

/// The work of `--resume` for a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// No switchover was sent: the guest continues here.
    Undo,
    /// The guest may run at the destination, which is served.
    Serve,
    /// The same, but the user states that the pages here are not needed.
    Abandon,
    /// The destination has everything.
    Part,
}

/// The next step for a session with this record.
///
/// # Errors
/// The guest can continue here: there is nothing to abandon.
pub(crate) fn plan(state: SourceState, is_abandoned: bool) -> Result<Plan> {
    Ok(match (state, is_abandoned) {
        (SourceState::Stopped, false) => Plan::Undo,
        (SourceState::Stopped, true) => {
            return Err(Error::Usage(
                "no switchover was sent, so the guest can continue here: leave out --abandon"
                    .into(),
            ));
        }
        (SourceState::Committed, false) => Plan::Serve,
        (SourceState::Committed, true) => Plan::Abandon,
        (SourceState::Completed, _) => Plan::Part,
    })
}

/// How long a destination is dialed that needs nothing but a message.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub(crate) enum Input {
    Begin,
    Time,
    /// The monitor has been asked to resume the guest: answers [`Effect::Undo`].
    Undone(Result<Undone>),
    /// Answers [`Effect::Call`].
    Called(Called),
    /// Answers [`Effect::Knock`].
    Knocked(Knocked),
    NotDone(Error),
}

/// The answer at the destination's address.
#[derive(Debug)]
pub(crate) enum Knocked {
    /// The destination serves the session: all lanes have been open.
    Opened,
    /// Lanes could not be opened, for this reason.
    NotOpened(Error),
    /// The session had one connection, which is gone: there is no address.
    NoAddress,
}

#[derive(Debug)]
pub(crate) enum Effect {
    /// Have the guest continue here, if it still belongs to this session. Answered by [`Input::Undone`].
    Undo,
    /// Write that this epoch is used.
    Epoch(u32),
    /// Dial once to send this message. Answered by [`Input::Called`].
    Call {
        epoch: u32,
        until: Instant,
        word: Word,
    },
    /// Open all lanes once, and close them. Answered by [`Input::Knocked`].
    Knock {
        epoch: u32,
    },
    /// Free the guest's memory here, if the options asked for that.
    Free,
    /// Remove the record.
    Forget,
    Tell(Event),
}

impl crate::control::Effect for Effect {
    fn has_answer(&self) -> bool {
        match self {
            Effect::Undo | Effect::Call { .. } | Effect::Knock { .. } => true,
            Effect::Epoch(_) | Effect::Free | Effect::Forget | Effect::Tell(_) => false,
        }
    }
}

#[derive(Debug)]
enum Doing {
    Undoing,
    Knocking,
    Calling(Call, About),
    Ended(Result<()>),
}

/// The message to the destination.
#[derive(Clone, Copy, Debug)]
enum About {
    /// The guest stays here.
    Stays,
    /// The goodbye.
    Parts,
}

#[derive(Debug)]
pub(crate) struct Leftover {
    session: String,
    uri: Uri,
    /// The RAM files of the guest, which stay after an abandoned session.
    ram: Vec<String>,
    /// Of the last attempt to open lanes, of any process.
    epoch: u32,
    doing: Doing,
    effects: Effects<Effect>,
}

impl Leftover {
    /// No switchover was sent.
    pub(crate) fn stopped(session: String, uri: Uri, epoch: u32) -> Leftover {
        Leftover::of(session, uri, epoch, Doing::Undoing)
    }

    /// The destination has everything, and may not have received the goodbye.
    pub(crate) fn completed(session: String, uri: Uri, epoch: u32, now: Instant) -> Leftover {
        let call = Call::new(uri.clone(), Word::Goodbye, PATIENCE, now);
        Leftover::of(session, uri, epoch, Doing::Calling(call, About::Parts))
    }

    /// The user states that the pages here, which are in these files, are not needed.
    pub(crate) fn abandoned(session: String, uri: Uri, epoch: u32, ram: Vec<String>) -> Leftover {
        Leftover { ram, ..Leftover::of(session, uri, epoch, Doing::Knocking) }
    }

    fn of(session: String, uri: Uri, epoch: u32, doing: Doing) -> Leftover {
        Leftover { session, uri, ram: Vec::new(), epoch, doing, effects: Effects::new() }
    }

    /// Handles an input. Returns the effects in order.
    pub(crate) fn handle(&mut self, input: Input, now: Instant) -> Effects<Effect> {
        self.take(input, now);
        std::mem::replace(&mut self.effects, Effects::new())
    }

    fn take(&mut self, input: Input, now: Instant) {
        let next = match (input, &mut self.doing) {
            (Input::Begin, Doing::Undoing) => return self.effects.push(Effect::Undo),
            (Input::Undone(Ok(how)), Doing::Undoing) => return self.is_undone(how, now),
            (Input::Undone(Err(error)) | Input::NotDone(error), Doing::Undoing)
            | (Input::NotDone(error), Doing::Knocking) => {
                self.doing = Doing::Ended(Err(error));
                return;
            }
            (Input::Begin, Doing::Knocking) => return self.knock(),
            (Input::Knocked(knocked), Doing::Knocking) => return self.has_knocked(knocked),
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
            Doing::Undoing | Doing::Knocking | Doing::Ended(_) => None,
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.doing, Doing::Ended(_))
    }

    /// How it has ended.
    pub(crate) fn into_outcome(self) -> Option<Result<()>> {
        match self.doing {
            Doing::Ended(outcome) => Some(outcome),
            Doing::Undoing | Doing::Knocking | Doing::Calling(..) => None,
        }
    }

    fn knock(&mut self) {
        match self.next_epoch() {
            Ok(epoch) => self.effects.push(Effect::Knock { epoch }),
            Err(error) => self.doing = Doing::Ended(Err(error)),
        }
    }

    /// A destination that answers prevents the end of the session: the guest's only memory may be here, and no process
    /// serves it after that.
    fn has_knocked(&mut self, knocked: Knocked) {
        let outcome = match knocked {
            Knocked::Opened => Err(Error::Environment(format!(
                "the session is not abandoned: the destination at {} serves this session, and --resume {} without \
                 --abandon continues it",
                self.uri, self.session
            ))),
            Knocked::NotOpened(error) => self.may_be_abandoned(error),
            Knocked::NoAddress => Ok(()),
        };
        if outcome.is_ok() {
            self.effects.push(Effect::Forget);
            let (session, ram) = (self.session.clone(), std::mem::take(&mut self.ram));
            self.effects.push(Effect::Tell(Event::Abandoned { session, ram }));
        }
        self.doing = Doing::Ended(outcome);
    }

    /// Whether a session may be abandoned if no lanes could be opened to its destination.
    fn may_be_abandoned(&self, error: Error) -> Result<()> {
        let uri = &self.uri;
        let who = match error {
            Error::Connect { .. } => return Ok(()),
            Error::Interrupted(_) => return Err(error),
            // The destination may be paused. It may also be the destination of another guest by now.
            Error::Peer { text, .. } => format!("a umem at {uri} answers ({text})"),
            // A stopped process accepts connections, too.
            Error::Lost { .. } | Error::Insecure { .. } | Error::Protocol { .. } => {
                format!("a program at {uri} accepts connections ({error})")
            }
            error => {
                return Err(Error::Environment(format!(
                    "the session is not abandoned: umem cannot determine whether a umem answers at {uri}: {error}"
                )));
            }
        };
        Err(Error::Environment(format!(
            "the session is not abandoned: {who}; if that is not the destination of this guest, give an address of \
             the destination's host at which no process listens"
        )))
    }

    /// Higher than every epoch used so far, and written before its use.
    fn next_epoch(&mut self) -> Result<u32> {
        let next = self.epoch.checked_add(1);
        self.epoch =
            next.ok_or_else(|| Error::Unsupported("the connection was lost too often".into()))?;
        self.effects.push(Effect::Epoch(self.epoch));
        Ok(self.epoch)
    }

    fn is_undone(&mut self, how: Undone, now: Instant) {
        self.effects.push(Effect::Tell(Event::Undone { session: self.session.clone(), how }));
        // The destination waits for a switchover, or gave up long ago.
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
            Next::Dial => {
                let (until, word) = (call.until, call.word.clone());
                match self.next_epoch() {
                    Ok(epoch) => {
                        self.effects.push(Effect::Call { epoch, until, word });
                        return;
                    }
                    Err(error) => Err(error),
                }
            }
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
                // If connections are refused, the goodbye has arrived or is not needed.
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

#[cfg(test)]
mod tests {
    use std::io;

    use umem_wire::FaultCode;

    use super::*;

    fn uri() -> Uri {
        "tcp:destination:4444".parse().unwrap()
    }

    fn connect(kind: io::ErrorKind) -> Knocked {
        Knocked::NotOpened(Error::Connect { uri: uri().to_string(), source: kind.into() })
    }

    /// The effects and the outcome of an attempt to abandon a session with this answer at its destination.
    fn abandon(knocked: Knocked) -> (Vec<Effect>, Result<()>) {
        let now = Instant::now();
        let ram = vec!["/dev/shm/guest".to_owned()];
        let mut core = Leftover::abandoned("5e55".into(), uri(), 6, ram);
        let effects: Vec<Effect> = core.handle(Input::Begin, now).collect();
        let [Effect::Epoch(7), Effect::Knock { epoch: 7 }] = effects[..] else {
            panic!("{effects:?}")
        };
        let effects = core.handle(Input::Knocked(knocked), now).collect();
        assert!(core.has_ended());
        (effects, core.into_outcome().unwrap())
    }

    #[test]
    fn session_is_abandoned_only_if_its_destination_does_not_answer() {
        use io::ErrorKind::{ConnectionRefused, HostUnreachable, NotFound, TimedOut};
        let nobody = [ConnectionRefused, HostUnreachable, NotFound, TimedOut].map(connect);
        for knocked in nobody.into_iter().chain([Knocked::NoAddress]) {
            let what = format!("{knocked:?}");
            let (effects, outcome) = abandon(knocked);
            assert!(outcome.is_ok(), "{what}: {outcome:?}");
            let [Effect::Forget, Effect::Tell(Event::Abandoned { ram, .. })] = &effects[..] else {
                panic!("{what}: {effects:?}")
            };
            assert_eq!(ram[..], ["/dev/shm/guest"]);
        }
        let lane = || "demand lane".to_owned();
        let answers = [
            Error::Peer { side: "destination", code: FaultCode::Refused, text: "paused".into() },
            Error::Lost { side: "destination", lane: lane(), what: "closed".into() },
            Error::Insecure { side: "destination", what: "another certificate".into() },
            Error::Protocol { lane: lane(), what: "no umem".into() },
            // umem's own errors, which do not depend on the destination.
            Error::Environment("the secret cannot be read".into()),
            Error::System { what: "socket".into(), source: io::ErrorKind::OutOfMemory.into() },
        ];
        for knocked in answers.into_iter().map(Knocked::NotOpened).chain([Knocked::Opened]) {
            let what = format!("{knocked:?}");
            let (effects, outcome) = abandon(knocked);
            assert!(effects.is_empty(), "{what}: {effects:?}");
            let says = outcome.unwrap_err().to_string();
            assert!(says.starts_with("the session is not abandoned: "), "{what}: {says}");
        }
    }

    #[test]
    fn session_whose_epoch_cannot_be_written_is_not_abandoned() {
        let now = Instant::now();
        let mut core = Leftover::abandoned("5e55".into(), uri(), 6, Vec::new());
        core.handle(Input::Begin, now).for_each(drop);
        let error = Error::Environment("the disk is full".into());
        assert_eq!(core.handle(Input::NotDone(error), now).count(), 0);
        assert!(core.into_outcome().unwrap().is_err());
    }

    #[test]
    fn session_without_a_switchover_is_not_abandoned() {
        let says = plan(SourceState::Stopped, true).unwrap_err().to_string();
        assert!(says.contains("leave out --abandon"), "{says}");
        assert_eq!(plan(SourceState::Committed, true).unwrap(), Plan::Abandon);
        assert_eq!(plan(SourceState::Completed, true).unwrap(), Plan::Part);
    }
}
