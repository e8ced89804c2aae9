//! Whether the other side is reachable, and whether it makes progress.
//!
//! A side with nothing to send only listens. The kernel's keep-alives reveal a connection that is gone, with two
//! exceptions: a proxy in between may answer the keep-alives for a host that has lost its end, and a process may be
//! stopped. So each side pings the other from time to time ([`Liveness`]). The other side's demand thread answers at
//! once, whatever its guest and monitor do. The source pings from the destination's *ready* on. The destination pings
//! from there until the source may have given its guest up.
//!
//! With one connection as all lanes, neither side pings: the answer would wait behind pages for any length of time.
//!
//! A side that answers pings may still never take its next step, while the guest stands still. So each step of the
//! other side before the switchover has a limit ([`Steps`]). Any progress restarts the limit.

use std::time::{Duration, Instant};

/// How long a step of the other side may last without progress, by default: its monitor may load a state from a slow
/// disk, or wait for a host that swaps.
pub(crate) const STEP_TIMEOUT: Duration = Duration::from_secs(600);

/// From one answer, or the beginning, to the next ping.
const INTERVAL: Duration = Duration::from_secs(5);

/// How long an answer may take. The kernel reports a silent network as a loss after 10 s. Beyond that, the remaining
/// causes are a stopped process and a proxy as above.
const PATIENCE: Duration = Duration::from_secs(15);

/// The open ping, or the time of the next one.
#[derive(Debug)]
pub(crate) struct Liveness {
    number: u64,
    state: State,
    interval: Duration,
    patience: Duration,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Pings are off.
    Off,
    Quiet {
        until: Instant,
    },
    Asked {
        until: Instant,
    },
}

/// The action that is due.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Nothing,
    /// Send a ping with this number.
    Ask(u64),
    /// The answer is overdue.
    Lost,
}

impl Liveness {
    /// Pings are off at first. A shorter `step_timeout` shortens the wait for an answer, too.
    pub(crate) fn off(step_timeout: Duration) -> Liveness {
        let interval = INTERVAL.min(step_timeout / 4);
        let patience = PATIENCE.min(step_timeout / 2);
        Liveness { number: 0, state: State::Off, interval, patience }
    }

    /// How long an answer may take.
    pub(crate) fn patience(&self) -> Duration {
        self.patience
    }

    /// Lanes are up if `is_on`, without an open ping on them.
    pub(crate) fn begin(&mut self, is_on: bool, now: Instant) {
        self.state = if is_on { State::Quiet { until: now + self.interval } } else { State::Off };
    }

    /// An answer has arrived.
    pub(crate) fn answered(&mut self, number: u64, now: Instant) {
        if matches!(self.state, State::Asked { .. }) && number == self.number {
            self.state = State::Quiet { until: now + self.interval };
        }
    }

    /// Other data has been received or accepted since: the other side is there, and may have had no time to answer.
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

    /// When [`due`](Liveness::due) returns an action.
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
    /// The awaited step, and the bytes moved at the last progress.
    current: Option<(&'static str, u64)>,
    until: Instant,
}

/// The result of [`Steps::look`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// No step is awaited, or the step is within its limit.
    Waits,
    /// The step makes progress.
    Moves,
    /// The step has lasted this long without progress.
    Over(Duration),
}

/// The text for a step without progress for too long.
pub(crate) fn stood_still(limit: Duration, step: &str) -> String {
    format!("no data moved for {} s while {step}", limit.as_secs_f64())
}

/// The same for a step whose limit is an option.
pub(crate) fn stood_still_by_option(limit: Duration, step: &str) -> String {
    let what = stood_still(limit, step);
    format!("{what}; if its monitor needs longer, give a longer --step-timeout")
}

impl Steps {
    pub(crate) fn new(limit: Duration, now: Instant) -> Steps {
        Steps { limit, current: None, until: now }
    }

    /// When the awaited step reaches its limit.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.current.map(|_| self.until)
    }

    /// Awaits this step of the other side, if any, for its limit at most. `moved` measures progress.
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
    fn progress_restarts_the_limit_of_a_step() {
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
    fn silence_is_a_loss_only_after_a_ping() {
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
        // The answer to a ping on earlier lanes.
        liveness.answered(0, asked);
        liveness.answered(1, asked + PATIENCE / 2);
        let again = liveness.deadline().unwrap();
        assert_eq!((again - asked, liveness.due(again)), (PATIENCE / 2 + INTERVAL, Due::Ask(2)));
        liveness.answered(1, again);
        assert_eq!(liveness.due(again + PATIENCE), Due::Lost);
        assert_eq!(liveness.deadline(), None, "the loss is reported once");
    }
}
