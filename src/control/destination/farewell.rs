//! A source that has not heard that its session is over: somebody is here when it comes, and the record stays until it
//! has been told.
//!
//! ```text
//! Waiting --Came--> Telling --Told--> Hearing --Parted--> Answering --Closed--> Over, told
//!   |  ^               |                |
//!   |  +----NotTold----+----Closed------+
//!   +--the time is up, an interrupt--> Over, not told
//! ```
//!
//! The source's goodbye says that it has written down what it was told. Lanes that end without one may be those of a
//! source that was killed over it, and looks for this side again when it is resumed. So the record goes with the
//! goodbye: a process that is killed before leaves it to whoever resumes the session, and a source that is told twice
//! hears the same.

use std::time::Instant;

use crate::control::Effects;

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// All of the source's lanes have come in.
    Came,
    /// [`Effect::Tell`] has succeeded.
    Told,
    /// The source has gone meanwhile, or does not read.
    NotTold,
    /// The source has said goodbye, or will not go on: [`Effect::Hear`] is done.
    Parted,
    /// The source has closed its lanes, or has not done it in time: [`Effect::Hear`] or [`Effect::Answer`] is done.
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
    /// Let it read that, and hear its goodbye.
    Hear,
    /// Remove the record.
    Forget,
    /// Say that the goodbye has come, and let the source close its lanes.
    Answer,
}

impl crate::control::Effect for Effect {
    fn has_answer(&self) -> bool {
        !matches!(self, Effect::Forget)
    }
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
    Hearing {
        until: Option<Instant>,
    },
    Answering,
    Over {
        is_told: bool,
    },
}

impl Farewell {
    pub(crate) fn new(until: Option<Instant>) -> Farewell {
        Farewell::Waiting { until }
    }

    /// Takes what has happened; the answer is what is to be done, in order.
    pub(crate) fn handle(&mut self, input: Input, now: Instant) -> Effects<Effect> {
        let mut effects = Effects::new();
        *self = match (*self, input) {
            (Farewell::Waiting { until }, Input::Came) => {
                effects.push(Effect::Tell);
                Farewell::Telling { until }
            }
            (Farewell::Waiting { until: Some(until) }, Input::Tick) if until <= now => {
                Farewell::Over { is_told: false }
            }
            (Farewell::Waiting { .. }, Input::Interrupt) => Farewell::Over { is_told: false },
            (Farewell::Telling { until }, Input::Told) => {
                effects.push(Effect::Hear);
                Farewell::Hearing { until }
            }
            (Farewell::Telling { until }, Input::NotTold)
            | (Farewell::Hearing { until }, Input::Closed) => Farewell::Waiting { until },
            (Farewell::Hearing { .. }, Input::Parted) => {
                effects.push(Effect::Forget);
                effects.push(Effect::Answer);
                Farewell::Answering
            }
            (Farewell::Answering, Input::Closed) => Farewell::Over { is_told: true },
            (same, _) => same,
        };
        effects
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
        let (hearing, answering) = (Farewell::Hearing { until }, Farewell::Answering);
        let (told, untold) = (Farewell::Over { is_told: true }, Farewell::Over { is_told: false });
        let for_ever = Farewell::Waiting { until: None };
        let tell = vec![Effect::Tell];
        let moves = [
            (waiting, Input::Came, telling, tell.clone()),
            (waiting, Input::Interrupt, untold, vec![]),
            (for_ever, Input::Came, Farewell::Telling { until: None }, tell),
            (for_ever, Input::Interrupt, untold, vec![]),
            (telling, Input::Told, hearing, vec![Effect::Hear]),
            (telling, Input::NotTold, waiting, vec![]),
            (hearing, Input::Parted, answering, vec![Effect::Forget, Effect::Answer]),
            (hearing, Input::Closed, waiting, vec![]),
            (answering, Input::Closed, told, vec![]),
        ];
        let inputs = [
            Input::Came,
            Input::Told,
            Input::NotTold,
            Input::Parted,
            Input::Closed,
            Input::Interrupt,
            Input::Tick,
        ];
        for state in [waiting, for_ever, telling, hearing, answering, told, untold] {
            for input in inputs {
                let expected = moves.iter().find(|(from, by, ..)| (*from, *by) == (state, input));
                let expected =
                    expected.map_or((state, vec![]), |(_, _, to, effects)| (*to, effects.clone()));
                let mut after = state;
                let effects: Vec<_> = after.handle(input, now).collect();
                assert_eq!((after, effects), expected, "{state:?} by {input:?}");
            }
        }
        let mut late = waiting;
        assert_eq!(late.deadline(), until);
        assert_eq!((late.handle(Input::Tick, end).count(), late), (0, untold));
    }

    /// A source that was killed when it had read everything comes again, as it has written nothing down.
    #[test]
    fn the_record_goes_with_the_goodbye_and_not_with_the_lanes() {
        let now = Instant::now();
        let mut farewell = Farewell::new(None);
        let mut feed = |input| farewell.handle(input, now).collect::<Vec<_>>();
        assert_eq!(feed(Input::Came), [Effect::Tell]);
        assert_eq!(feed(Input::NotTold), []);
        assert_eq!(feed(Input::Came), [Effect::Tell]);
        assert_eq!(feed(Input::Told), [Effect::Hear]);
        assert_eq!(feed(Input::Closed), []);
        assert_eq!(feed(Input::Came), [Effect::Tell]);
        assert_eq!(feed(Input::Told), [Effect::Hear]);
        assert_eq!(feed(Input::Parted), [Effect::Forget, Effect::Answer]);
        assert_eq!(feed(Input::Closed), []);
        assert_eq!(farewell.outcome(), Some(true));
    }
}
