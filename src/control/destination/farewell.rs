//! A source that has not heard that its session is over: somebody is here when it comes, and the record stays until it
//! has been told.
//!
//! ```text
//! Waiting --Came--> Telling --Told--> Closing --Closed--> Over, told
//!   |  ^               |
//!   |  +----NotTold----+
//!   +--the time is up, an interrupt--> Over, not told
//! ```
//!
//! The record goes last: a process that is killed before leaves it to whoever resumes the session, and a source that
//! is told twice hears the same.

use std::time::Instant;

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// All of the source's lanes have come in.
    Came,
    /// [`Effect::Tell`] has succeeded.
    Told,
    /// The source has gone meanwhile, or does not read.
    NotTold,
    /// [`Effect::LetClose`] is done.
    Closed,
    /// Somebody interrupts.
    Interrupt,
    /// Time has passed.
    Tick,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Tell the source, on the lanes that have come in.
    Tell,
    /// Let it read that, and close its lanes.
    LetClose,
    /// Remove the record.
    Forget,
}

/// The state machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Farewell {
    /// Until then, or for ever.
    Waiting {
        until: Option<Instant>,
    },
    Telling {
        until: Option<Instant>,
    },
    Closing,
    Over {
        is_told: bool,
    },
}

impl Farewell {
    pub(crate) fn new(until: Option<Instant>) -> Farewell {
        Farewell::Waiting { until }
    }

    /// Takes what has happened; the answer is what is to be done.
    pub(crate) fn handle(&mut self, input: Input, now: Instant) -> Option<Effect> {
        let (next, effect) = match (*self, input) {
            (Farewell::Waiting { until }, Input::Came) => {
                (Farewell::Telling { until }, Some(Effect::Tell))
            }
            (Farewell::Waiting { until: Some(until) }, Input::Tick) if until <= now => {
                (Farewell::Over { is_told: false }, None)
            }
            (Farewell::Waiting { .. }, Input::Interrupt) => {
                (Farewell::Over { is_told: false }, None)
            }
            (Farewell::Telling { .. }, Input::Told) => (Farewell::Closing, Some(Effect::LetClose)),
            (Farewell::Telling { until }, Input::NotTold) => (Farewell::Waiting { until }, None),
            (Farewell::Closing, Input::Closed) => {
                (Farewell::Over { is_told: true }, Some(Effect::Forget))
            }
            (same, _) => (same, None),
        };
        *self = next;
        effect
    }

    /// When [`Input::Tick`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match *self {
            Farewell::Waiting { until } => until,
            _ => None,
        }
    }

    /// Whether the source knows, once it is over.
    pub(crate) fn outcome(&self) -> Option<bool> {
        match *self {
            Farewell::Over { is_told } => Some(is_told),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_state_answers_every_input() {
        let now = Instant::now();
        let end = now + Duration::from_secs(1);
        let until = Some(end);
        let (waiting, telling) = (Farewell::Waiting { until }, Farewell::Telling { until });
        let (closing, told) = (Farewell::Closing, Farewell::Over { is_told: true });
        let untold = Farewell::Over { is_told: false };
        let for_ever = Farewell::Waiting { until: None };
        let moves = [
            (waiting, Input::Came, telling, Some(Effect::Tell)),
            (waiting, Input::Interrupt, untold, None),
            (for_ever, Input::Came, Farewell::Telling { until: None }, Some(Effect::Tell)),
            (for_ever, Input::Interrupt, untold, None),
            (telling, Input::Told, closing, Some(Effect::LetClose)),
            (telling, Input::NotTold, waiting, None),
            (closing, Input::Closed, told, Some(Effect::Forget)),
        ];
        let inputs = [
            Input::Came,
            Input::Told,
            Input::NotTold,
            Input::Closed,
            Input::Interrupt,
            Input::Tick,
        ];
        for state in [waiting, for_ever, telling, closing, told, untold] {
            for input in inputs {
                let expected = moves.iter().find(|&&(from, by, ..)| (from, by) == (state, input));
                let expected = expected.map_or((state, None), |&(_, _, to, effect)| (to, effect));
                let mut after = state;
                let effect = after.handle(input, now);
                assert_eq!((after, effect), expected, "{state:?} by {input:?}");
            }
        }
        let mut late = waiting;
        assert_eq!(late.deadline(), until);
        assert_eq!((late.handle(Input::Tick, end), late), (None, untold));
    }

    /// Killed before any effect, this leaves the record; and nothing but the record's end follows a source that knows.
    #[test]
    fn the_record_goes_only_after_the_source_has_been_told() {
        let now = Instant::now();
        let mut farewell = Farewell::new(None);
        let mut effects = Vec::new();
        let mut next = Some(Input::Came);
        while let Some(input) = next.take() {
            let effect = farewell.handle(input, now);
            effects.extend(effect);
            next = match effect {
                // The first time it has gone again.
                Some(Effect::Tell) if effects.len() == 1 => Some(Input::NotTold),
                Some(Effect::Tell) => Some(Input::Told),
                Some(Effect::LetClose) => Some(Input::Closed),
                Some(Effect::Forget) => None,
                None => Some(Input::Came),
            };
        }
        assert_eq!(effects, [Effect::Tell, Effect::Tell, Effect::LetClose, Effect::Forget]);
        assert_eq!(farewell.outcome(), Some(true));
    }
}
