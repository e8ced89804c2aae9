//! A source that has not learned of the session's end: this process waits for it, and the record stays until the source
//! has been informed.
//!
//! ```text
//! Waiting --Came--> Telling --Told--> Hearing --Parted--> Answering --Closed--> Over, told
//!   |  ^               |                |
//!   |  +----NotTold----+----Closed------+
//!   +--timeout, interrupt--> Over, not told
//! ```
//!
//! The source's goodbye means that the source has written the notice to its own record. Lanes that end without a
//! goodbye may belong to a source that was killed at that moment, and that dials this side again when it is resumed. So
//! the record is removed at the goodbye. If this process is killed before, the next `--resume` finds the record, and a
//! source that is informed twice receives the same message.

use std::time::Instant;

use crate::control::Effects;

/// An event for this state machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// All of the source's lanes have been accepted.
    Came,
    /// [`Effect::Tell`] has succeeded.
    Told,
    /// The source has gone meanwhile, or does not read.
    NotTold,
    /// The source has said goodbye, or will not continue: [`Effect::Hear`] is done.
    Parted,
    /// The source has closed its lanes, or its time is up: [`Effect::Hear`] or [`Effect::Answer`] is done.
    Closed,
    /// A signal interrupts.
    Interrupt,
    /// Time has passed.
    Tick,
}

/// An action for the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Send the notice on the accepted lanes.
    Tell,
    /// Let the source read the notice, and receive its goodbye.
    Hear,
    /// Remove the record.
    Forget,
    /// Acknowledge the goodbye, and let the source close its lanes.
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
    /// Until this time, or indefinitely.
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

    /// Handles an input. Returns the effects in order.
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

    /// The time at which [`Input::Tick`] changes the state.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match *self {
            Farewell::Waiting { until } => until,
            _ => None,
        }
    }

    /// After the end, whether the source has been informed.
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
    fn farewell_handles_every_input_in_every_state() {
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

    /// A source that was killed after it had read everything dials again, because it has written nothing.
    #[test]
    fn record_is_removed_at_the_goodbye_and_kept_when_lanes_close() {
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
