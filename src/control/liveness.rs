//! Whether the other side is still there, and whether it goes on.
//!
//! A side that has nothing to say only listens. A connection that has gone shows then by the kernel's keep-alives,
//! unless something in between, such as a proxy, goes on answering them for a host that has lost its end, or the
//! process there does not run. So each side asks the other from time to time ([`Liveness`]): its demand thread
//! answers at once, whatever guest and monitor do. The source asks from the destination's *ready* on, the
//! destination from there until the source may have given its guest up.
//!
//! Where there is one connection alone nobody asks: the answer would wait behind pages, for as long as the
//! other side likes.
//!
//! A side that answers may still never take its next step, while the guest stands still. So each of the other side's
//! steps before the switchover has a limit ([`Steps`]), which whatever moves begins anew.

use std::time::{Duration, Instant};

/// The most that a step of the other side may take in which nothing moves, if nobody says otherwise: its monitor
/// may load a state from a slow disk, or wait for a host that swaps.
pub(crate) const STEP_TIMEOUT: Duration = Duration::from_secs(600);

/// From one answer, or the beginning, to the next question.
const INTERVAL: Duration = Duration::from_secs(5);

/// How long an answer may take. A network's silence counts as a loss after 10 s, by the kernel; beyond that only
/// a process that does not run, or such a proxy, is left.
const PATIENCE: Duration = Duration::from_secs(15);

/// The question that is open, or when the next one is due.
#[derive(Debug)]
pub(crate) struct Liveness {
    number: u64,
    state: State,
    interval: Duration,
    patience: Duration,
}

#[derive(Clone, Copy, Debug)]
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
pub(crate) enum Due {
    Nothing,
    /// Ask, with this number.
    Ask(u64),
    /// No answer has come.
    Lost,
}

impl Liveness {
    /// With nobody to ask yet. Who waits less than usual for a step waits less for an answer, too.
    pub(crate) fn off(step_timeout: Duration) -> Liveness {
        let interval = INTERVAL.min(step_timeout / 4);
        let patience = PATIENCE.min(step_timeout / 2);
        Liveness { number: 0, state: State::Off, interval, patience }
    }

    /// How long an answer may take.
    pub(crate) fn patience(&self) -> Duration {
        self.patience
    }

    /// There are lanes, if `is_on`, and no question on them.
    pub(crate) fn begin(&mut self, is_on: bool, now: Instant) {
        self.state = if is_on { State::Quiet { until: now + self.interval } } else { State::Off };
    }

    /// An answer has come.
    pub(crate) fn answered(&mut self, number: u64, now: Instant) {
        if matches!(self.state, State::Asked { .. }) && number == self.number {
            self.state = State::Quiet { until: now + self.interval };
        }
    }

    /// Something else has come, or has been taken, since: it is there, and may have no time to answer.
    pub(crate) fn moved(&mut self, now: Instant) {
        if matches!(self.state, State::Asked { .. }) {
            self.state = State::Asked { until: now + self.patience };
        }
    }

    pub(crate) fn due(&mut self, now: Instant) -> Due {
        match self.state {
            State::Quiet { until } if until <= now => {
                self.number += 1;
                self.state = State::Asked { until: now + self.patience };
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
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Off => None,
            State::Quiet { until } | State::Asked { until } => Some(until),
        }
    }
}

/// The limit of the other side's steps.
#[derive(Debug)]
pub(crate) struct Steps {
    limit: Duration,
    /// The step that is waited for, and what had been moved when something moved last.
    current: Option<(&'static str, u64)>,
    until: Instant,
}

/// What [`Steps::look`] finds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing is waited for, or not for too long.
    Waits,
    /// It goes on.
    Moves,
    /// Nothing has moved for so long.
    Over(Duration),
}

/// What is said of a step in which nothing has moved for too long.
pub(crate) fn stood_still(limit: Duration, step: &str) -> String {
    format!("nothing has moved for {} s while {step}", limit.as_secs_f64())
}

/// The same of a step whose limit is an option.
pub(crate) fn stood_still_by_option(limit: Duration, step: &str) -> String {
    let what = stood_still(limit, step);
    format!("{what}; if its monitor needs longer, give a longer --step-timeout")
}

impl Steps {
    pub(crate) fn new(limit: Duration, now: Instant) -> Steps {
        Steps { limit, current: None, until: now }
    }

    /// When a step that is waited for has had all of its time.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.current.map(|_| self.until)
    }

    /// This step of the other side is waited for, if any, for no longer than that, and so much has been moved.
    pub(crate) fn look(
        &mut self,
        step: Option<(&'static str, Duration)>,
        moved: u64,
        now: Instant,
    ) -> Step {
        let limit = step.map_or(self.limit, |(_, most)| self.limit.min(most));
        let looked = step.map(|(step, _)| (step, moved));
        if self.current != looked {
            self.current = looked;
            self.until = now + limit;
            return Step::Moves;
        }
        match looked {
            Some(_) if self.until <= now => Step::Over(limit),
            _ => Step::Waits,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_a_limit_that_whatever_moves_begins_anew() {
        let (begun, limit) = (Instant::now(), Duration::from_secs(60));
        let mut steps = Steps::new(limit, begun);
        let step = |name| Some((name, Duration::MAX));
        let at = |seconds| begun + Duration::from_secs(seconds);
        assert_eq!(steps.look(None, 0, at(1000)), Step::Waits);
        assert_eq!(steps.look(step("loading"), 0, at(1000)), Step::Moves);
        assert_eq!(steps.look(step("loading"), 0, at(1059)), Step::Waits);
        assert_eq!(steps.look(step("loading"), 1, at(1059)), Step::Moves);
        assert_eq!(steps.look(step("loading"), 1, at(1118)), Step::Waits);
        assert_eq!(steps.look(step("loading"), 1, at(1119)), Step::Over(limit));
        assert_eq!(steps.look(step("ready"), 1, at(1119)), Step::Moves);
        assert_eq!(steps.look(None, 1, at(9999)), Step::Moves);
        assert_eq!(steps.look(None, 1, at(99999)), Step::Waits);
        let soon = Duration::from_secs(9);
        assert_eq!(steps.look(Some(("soon", soon)), 1, begun), Step::Moves);
        assert_eq!(steps.look(Some(("soon", soon)), 1, at(9)), Step::Over(soon));
    }

    #[test]
    fn silence_is_a_loss_only_after_a_question() {
        let begun = Instant::now();
        let mut liveness = Liveness::off(STEP_TIMEOUT);
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
