//! Whether the destination is still there, while there is nothing to say to it.
//!
//! A source that has sent everything, and is asked for nothing, only listens. A connection that has gone shows
//! then by the kernel's keep-alives, unless something in between, such as a proxy, goes on answering them for a
//! destination that has lost its end and waits for this side to come back. So the source asks the
//! destination itself from time to time: its demand thread answers at once, whatever the guest does.
//!
//! Where there is one connection alone nobody asks: the answer would wait behind pages, for as long as the
//! destination likes.

use std::time::{Duration, Instant};

/// From one answer, or the beginning, to the next question.
const INTERVAL: Duration = Duration::from_secs(5);

/// How long an answer may take. A network's silence counts as a loss after 10 s, by the kernel; beyond that only
/// a process that does not run, or such a proxy, is left.
const PATIENCE: Duration = Duration::from_secs(15);

/// The question that is open, or when the next one is due.
pub(super) struct Liveness {
    number: u64,
    state: State,
}

#[derive(Clone, Copy)]
enum State {
    /// There is nobody to ask.
    Off,
    Quiet {
        until: Instant,
    },
    Asked {
        until: Instant,
    },
}

/// What is to be done now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Due {
    Nothing,
    /// Ask, with this number.
    Ask(u64),
    /// No answer has come.
    Lost,
}

impl Liveness {
    pub(super) fn off() -> Liveness {
        Liveness { number: 0, state: State::Off }
    }

    /// There are lanes, if `is_on`, and no question on them.
    pub(super) fn begin(&mut self, is_on: bool, now: Instant) {
        self.state = if is_on { State::Quiet { until: now + INTERVAL } } else { State::Off };
    }

    /// An answer has come.
    pub(super) fn answered(&mut self, number: u64, now: Instant) {
        if matches!(self.state, State::Asked { .. }) && number == self.number {
            self.state = State::Quiet { until: now + INTERVAL };
        }
    }

    pub(super) fn due(&mut self, now: Instant) -> Due {
        match self.state {
            State::Quiet { until } if until <= now => {
                self.number += 1;
                self.state = State::Asked { until: now + PATIENCE };
                Due::Ask(self.number)
            }
            State::Asked { until } if until <= now => {
                self.state = State::Off;
                Due::Lost
            }
            _ => Due::Nothing,
        }
    }

    /// When [`due`](Liveness::due) has something to say.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Off => None,
            State::Quiet { until } | State::Asked { until } => Some(until),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_a_loss_only_after_a_question() {
        let begun = Instant::now();
        let mut liveness = Liveness::off();
        assert_eq!(
            (liveness.due(begun + 10 * PATIENCE), liveness.deadline()),
            (Due::Nothing, None)
        );
        liveness.begin(true, begun);
        assert_eq!(liveness.due(begun), Due::Nothing);
        let asked = liveness.deadline().unwrap();
        assert_eq!(liveness.due(asked), Due::Ask(1));
        assert_eq!(liveness.due(asked), Due::Nothing);
        // Of lanes before these.
        liveness.answered(0, asked);
        liveness.answered(1, asked + PATIENCE / 2);
        let again = liveness.deadline().unwrap();
        assert_eq!((again - asked, liveness.due(again)), (PATIENCE / 2 + INTERVAL, Due::Ask(2)));
        liveness.answered(1, again);
        assert_eq!(liveness.due(again + PATIENCE), Due::Lost);
        assert_eq!(liveness.deadline(), None, "it is said once");
    }
}
