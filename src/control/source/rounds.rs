//! Before the stop: pages go while the guest runs, pass after pass, until what is left is little or does not shrink.
//!
//! ```text
//! ready --> track --> pass 1 --> count --> pass 2 --> count ... --> stop --> what remains --> settled --> stopped
//!                     lanes send            judged by what
//!                     dirty pages, then     whole passes
//!                     the log looks         have left
//! ```
//!
//! A pass is over when every lane has been around, and the dirty log has then looked over the whole guest: what it has
//! marked by that time is what the pass has left. Passes are judged
//! as wholes: moments of a pass say nothing of the next one. Where what the log marks has to wait for room (a guest
//! whose memory's contents come through QEMU's stream), lanes go around and the log looks by turns until the look is
//! whole.

use std::time::{Duration, Instant};

use umem_wire::Frame;
use umem_wire::source::{Input as Step, Phase};

use super::{Effect, Moment, Question, Source};
use crate::error::Result;
use crate::events::Event;

/// A pass that leaves more than this share of what the one before it left is not worth another one.
const SHRINKS_TO: f64 = 0.7;

/// The most that is sent before the stop, times the guest's memory.
const SENT_MAX: u64 = 2;

/// When rounds end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RoundsPlan {
    /// Passes at most.
    pub(crate) passes_max: u32,
    /// What is left is to be sent within this while the guest stands still.
    pub(crate) downtime_limit: Duration,
}

/// How far the rounds have come.
#[derive(Debug)]
pub(super) struct Rounds {
    plan: RoundsPlan,
    /// The pass that goes on, from 1.
    pass: u32,
    began: Instant,
    /// Lanes that have not been around in this pass.
    lanes_left: u16,
    /// Bytes that had been sent when the pass began.
    sent_before: u64,
    /// Bytes that the pass before it left.
    dirty_before: Option<u64>,
    /// The most that any pass has sent, bytes a second.
    rate: f64,
}

/// What has come of a pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Verdict {
    Again,
    /// The guest is to stop.
    Enough,
}

impl Rounds {
    fn new(plan: RoundsPlan, now: Instant) -> Rounds {
        Rounds {
            plan,
            pass: 0,
            began: now,
            lanes_left: 0,
            sent_before: 0,
            dirty_before: None,
            rate: 0.0,
        }
    }

    fn begin_pass(&mut self, lanes: u16, now: Instant) {
        (self.pass, self.began, self.lanes_left) = (self.pass + 1, now, lanes);
    }

    /// Whether the guest is to stop after a pass that has left so many bytes dirty, when so many have been sent in all.
    fn judge(&mut self, dirty: u64, sent: u64, total: u64, now: Instant) -> Verdict {
        let seconds = now.saturating_duration_since(self.began).as_secs_f64().max(1e-6);
        let rate = sent.saturating_sub(self.sent_before) as f64 / seconds;
        self.rate = self.rate.max(rate);
        let fits = dirty as f64 <= self.rate * self.plan.downtime_limit.as_secs_f64();
        let shrinks =
            self.dirty_before.is_none_or(|before| dirty as f64 <= SHRINKS_TO * before as f64);
        let has_passes = self.pass < self.plan.passes_max;
        let has_bytes = sent <= total.saturating_mul(SENT_MAX);
        (self.sent_before, self.dirty_before) = (sent, Some(dirty));
        match !fits && shrinks && has_passes && has_bytes {
            true => Verdict::Again,
            false => Verdict::Enough,
        }
    }
}

impl Source {
    /// The destination is ready: the guest's writes are tracked before a page goes.
    pub(super) fn begin_rounds(&mut self, plan: RoundsPlan, now: &Moment) {
        self.rounds = Some(Rounds::new(plan, now.at));
        self.do_next(Effect::Ask(Question::Track));
    }

    pub(super) fn tracking(&mut self, result: Result<()>, now: &Moment) -> Result<()> {
        result?;
        self.step(Step::SentRounds)?;
        self.do_next(Effect::Send(Frame::Rounds));
        self.do_next(Effect::Show("copying"));
        self.begin_pass(now);
        Ok(())
    }

    fn begin_pass(&mut self, now: &Moment) {
        let lanes = self.plan.bulk_lanes;
        let Some(rounds) = &mut self.rounds else { return };
        rounds.begin_pass(lanes, now.at);
        self.times.first_page.get_or_insert(now.at);
        self.do_next(Effect::SendPass);
    }

    /// The dirty log has looked over the guest.
    pub(super) fn looked(&mut self, result: Result<()>) -> Result<()> {
        result?;
        if self.phase == Phase::Rounds {
            self.do_next(Effect::CountDirty);
        }
        Ok(())
    }

    /// The dirty log has marked as much as may wait to be sent: lanes go around once more in the same pass.
    pub(super) fn looked_in_part(&mut self) {
        let lanes = self.plan.bulk_lanes;
        if let (Some(rounds), Phase::Rounds) = (&mut self.rounds, &self.phase) {
            rounds.lanes_left = lanes;
            self.do_next(Effect::SendPass);
        }
    }

    /// A lane has been around.
    pub(super) fn pass_has_ended(&mut self) {
        let Some(rounds) = &mut self.rounds else { return };
        rounds.lanes_left = rounds.lanes_left.saturating_sub(1);
        if rounds.lanes_left == 0 {
            self.do_next(Effect::Ask(Question::Look));
        }
    }

    /// What a pass has left is known.
    pub(super) fn counted(&mut self, dirty_bytes: u64, sent_bytes: u64, now: &Moment) {
        let total_bytes = self.plan.total_bytes;
        let Some(rounds) = self.rounds.as_mut().filter(|_| self.phase == Phase::Rounds) else {
            return;
        };
        let took = now.at.saturating_duration_since(rounds.began);
        let pass_bytes = sent_bytes.saturating_sub(rounds.sent_before);
        let verdict = rounds.judge(dirty_bytes, sent_bytes, total_bytes, now.at);
        let pass = rounds.pass;
        self.tell(Event::Pass { pass, took, sent_bytes: pass_bytes, dirty_bytes });
        match verdict {
            Verdict::Again => self.begin_pass(now),
            Verdict::Enough => self.ask_to_stop(now),
        }
    }

    /// The guest stands still after rounds: what is dirty remains, and the destination is told so.
    pub(super) fn end_rounds(&mut self) -> Result<()> {
        self.step(Step::SentRemaining)?;
        self.do_next(Effect::EndRounds);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// What comes of passes that each take a second, given what is dirty after each and what has been sent by then.
    fn verdicts(plan: RoundsPlan, passes: &[(u64, u64)]) -> Vec<Verdict> {
        let begun = Instant::now();
        let mut rounds = Rounds::new(plan, begun);
        let pass = |(second, &(dirty, sent)): (u64, &(u64, u64))| {
            rounds.begin_pass(1, begun + Duration::from_secs(second));
            let end = begun + Duration::from_secs(second + 1);
            rounds.judge(dirty, sent, 4 * GIB, end)
        };
        (0..).zip(passes).map(pass).collect()
    }

    #[test]
    fn whole_passes_say_when_it_is_enough() {
        use Verdict::{Again, Enough};
        let plan = RoundsPlan { passes_max: 4, downtime_limit: Duration::from_millis(500) };
        // What the link sends in half a second.
        assert_eq!(verdicts(plan, &[(GIB / 2, GIB)]), [Enough]);
        assert_eq!(verdicts(plan, &[(GIB, GIB), (GIB / 2, 2 * GIB)]), [Again, Enough]);
        // It does not shrink.
        let shrinks = [(2 * GIB, GIB), (14 * GIB / 10, 2 * GIB), (GIB, 3 * GIB)];
        assert_eq!(verdicts(plan, &shrinks), [Again, Again, Enough]);
        assert_eq!(verdicts(plan, &[(2 * GIB, GIB), (15 * GIB / 10, 2 * GIB)]), [Again, Enough]);
        // Too many passes, or too many bytes.
        let plan = RoundsPlan { passes_max: 2, downtime_limit: Duration::ZERO };
        assert_eq!(verdicts(plan, &[(100, GIB), (1, 2 * GIB)]), [Again, Enough]);
        assert_eq!(verdicts(plan, &[(0, GIB)]), [Enough]);
        assert_eq!(verdicts(plan, &[(100, 8 * GIB + 1)]), [Enough]);
    }
}
