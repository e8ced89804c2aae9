//! A side with no pages left to serve dials to deliver one message: the goodbye to a destination that has not received
//! it, or the notice to a destination with a loaded guest that the guest continues at the source.
//!
//! The destination waits for the message, whichever process sends it. Without the message the destination ends after a
//! while, or waits for the user. So a few attempts are worth their time, and further ones are not: after the
//! destination has ended by itself, no process listens.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use umem_wire::Fault;

use crate::error::{Error, Result};
use crate::transport::uri::Uri;

/// The interval between attempts.
const INTERVAL: Duration = Duration::from_millis(200);

/// How long connections may be refused before the call ends. A destination that was killed and resumed listens again
/// within this time.
const NOBODY_PATIENCE: Duration = Duration::from_secs(5);

/// The message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    /// To a destination that has everything: no more pages come.
    Goodbye,
    /// The reason why the migration cannot continue.
    GaveUp(Fault),
}

/// The result of an attempt.
#[derive(Debug)]
pub(crate) enum Called {
    /// The destination has received the message.
    Heard,
    /// The lanes could not be opened.
    NotOpened(Error),
    /// The lanes were opened, but the message was not received.
    NotHeard(Error),
}

/// The next step.
#[derive(Debug)]
pub(crate) enum Next {
    /// Nothing before the deadline, or before the end of the attempt.
    Wait,
    /// Dial.
    Dial,
    /// The call has ended.
    Over(Result<()>),
}

#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) uri: Uri,
    pub(crate) word: Word,
    /// No attempt begins or lasts after this time.
    pub(crate) until: Instant,
    begun: Instant,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The next attempt begins at this time.
    Pausing(Instant),
    /// An attempt is under way.
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

    /// Handles the result of the attempt.
    pub(crate) fn called(&mut self, called: Called, now: Instant) -> Next {
        match called {
            Called::Heard => Next::Over(Ok(())),
            Called::NotHeard(error) | Called::NotOpened(error @ Error::Interrupted(_)) => {
                Next::Over(Err(error))
            }
            Called::NotOpened(error) if now + INTERVAL >= self.until => Next::Over(Err(error)),
            // Likewise if a proxy in between accepts connections for a destination that is gone.
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

/// Whether no process listens at the address.
pub(crate) fn is_nobody(error: &Error) -> bool {
    let nobody = [ErrorKind::ConnectionRefused, ErrorKind::NotFound];
    matches!(error, Error::Connect { source, .. } if nobody.contains(&source.kind()))
}
