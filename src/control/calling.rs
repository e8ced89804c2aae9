//! A side that has nothing more to serve dials to say one thing: the goodbye to a destination that has not heard
//! it, or that the guest goes on at the source to one that has loaded it.
//!
//! The destination waits for that, whoever says it; where it does not come it ends after a while, or waits for a
//! person. So it is worth a few attempts, and no more: nobody listens any more where it has ended by itself.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use umem_wire::Fault;

use crate::error::{Error, Result};
use crate::transport::uri::Uri;

/// From one attempt to the next.
const INTERVAL: Duration = Duration::from_millis(200);

/// How long nobody may listen: who resumes a destination that was killed is there by then.
const NOBODY_PATIENCE: Duration = Duration::from_secs(5);

/// What is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    /// That nothing more is to come, to a destination that has everything.
    Goodbye,
    /// Why nothing will go on.
    GaveUp(Fault),
}

/// What became of an attempt.
#[derive(Debug)]
pub(crate) enum Called {
    /// It has been heard.
    Heard,
    /// Lanes could not be opened.
    NotOpened(Error),
    /// It was opened, and not heard.
    NotHeard(Error),
}

/// What is to be done next.
#[derive(Debug)]
pub(crate) enum Next {
    /// Nothing before the deadline, or before the attempt has come to something.
    Wait,
    /// Dial.
    Dial,
    /// It is over.
    Over(Result<()>),
}

#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) uri: Uri,
    pub(crate) word: Word,
    /// No attempt lasts longer, or begins after that.
    pub(crate) until: Instant,
    begun: Instant,
    state: State,
}

#[derive(Debug)]
enum State {
    /// An attempt is to be made at this time.
    Pausing(Instant),
    /// One is under way.
    Dialing,
}

impl Call {
    pub(crate) fn new(uri: Uri, word: Word, patience: Duration, now: Instant) -> Call {
        Call { uri, word, until: now + patience, begun: now, state: State::Pausing(now) }
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Pausing(until) => Some(until),
            State::Dialing => None,
        }
    }

    /// Whether an attempt is due.
    pub(crate) fn look(&mut self, now: Instant) -> Next {
        match self.state {
            State::Pausing(until) if until <= now => {
                self.state = State::Dialing;
                Next::Dial
            }
            State::Pausing(_) | State::Dialing => Next::Wait,
        }
    }

    /// The attempt has come to this.
    pub(crate) fn called(&mut self, called: Called, now: Instant) -> Next {
        match called {
            Called::Heard => Next::Over(Ok(())),
            Called::NotHeard(error) | Called::NotOpened(error @ Error::Interrupted(_)) => {
                Next::Over(Err(error))
            }
            Called::NotOpened(error) if now + INTERVAL >= self.until => Next::Over(Err(error)),
            // As little where something in between takes connections for nobody.
            Called::NotOpened(error)
                if (is_nobody(&error) || matches!(error, Error::Lost { .. }))
                    && now - self.begun > NOBODY_PATIENCE =>
            {
                Next::Over(Err(error))
            }
            Called::NotOpened(_) => {
                self.state = State::Pausing(now + INTERVAL);
                Next::Wait
            }
        }
    }
}

/// Nobody listens there.
pub(crate) fn is_nobody(error: &Error) -> bool {
    let nobody = [ErrorKind::ConnectionRefused, ErrorKind::NotFound];
    matches!(error, Error::Connect { source, .. } if nobody.contains(&source.kind()))
}
