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
//! as wholes: moments of a pass say nothing of the next one. What the guest writes all the while (hot pages) a pass
//! leaves out, so that passes end once most of what is left is hot. The contents of a guest's memory may come through QEMU's
//! stream. Marked pages then wait for room, so lanes go around and the log looks by turns until the look is whole.
//!
//! Time (`--timeout`) and a person (`umem control SOCKET postcopy`) cut a pass short: each lane finishes its current
//! block and reports the end of its pass. The pages that it has not sent stay dirty, so they remain as others do. A look
//! that is in parts is finished all the same.

use std::time::{Duration, Instant};

use umem_wire::Frame;
use umem_wire::source::{Input as Step, Phase};

use super::{Effect, Moment, Question, Source};
use crate::error::Result;
use crate::events::Event;
use crate::memory::dirty::{LEAVES_OUT_FROM, LeftToSend};

/// A pass that leaves more than this share of what the one before it left is not worth another one. Of both, what is
/// hot does not count. If more than this share of what is left is hot, another pass cannot be worth it either.
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
    /// The passes end after this, counted from the moment at which the destination is ready.
    pub(crate) timeout: Option<Duration>,
}

/// What the passes have come to so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Passes {
    /// Passes that have ended.
    pub(crate) count: u32,
    /// Bytes a second that the guest wrote in the last pass that was a whole one, each page once.
    pub(crate) dirty_bytes_per_s: Option<u64>,
    /// How long the rest takes at the rate of the fastest pass; none where the guest does not wait for it (`-p`), and
    /// before a rate is known.
    pub(crate) expected_downtime: Option<Duration>,
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The guest's writes are tracked.
    Tracking,
    /// So many lanes have been around in this pass.
    Sending { lanes_left: u16 },
    /// The log has looked over the guest, and the dirty pages are counted.
    Looking,
    /// The guest stands still.
    Stopping,
}

/// How far the rounds have come.
#[derive(Debug)]
pub(super) struct Rounds {
    plan: RoundsPlan,
    stage: Stage,
    /// The pass that goes on, from 1.
    pass: u32,
    began: Instant,
    /// Bytes that had been sent when the pass began.
    sent_before: u64,
    /// Bytes that the pass before it left, less what was hot.
    dirty_before: Option<u64>,
    /// The most that any pass has sent, bytes a second.
    rate: f64,
    /// Then the passes are cut short.
    deadline: Option<Instant>,
    /// The pass that goes on is cut short, and no other one follows.
    is_cut: bool,
    /// The guest has been stopped by another program.
    has_stopped: bool,
    passes: Passes,
}

/// What has come of a pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Verdict {
    Again,
    /// The guest is to stop.
    Enough,
}

impl Rounds {
    /// From *ready* on; `is_cut` where somebody has asked for their end before.
    fn new(plan: RoundsPlan, is_cut: bool, now: Instant) -> Rounds {
        Rounds {
            plan,
            stage: Stage::Tracking,
            pass: 0,
            began: now,
            sent_before: 0,
            dirty_before: None,
            rate: 0.0,
            deadline: plan.timeout.and_then(|timeout| now.checked_add(timeout)),
            is_cut,
            has_stopped: false,
            passes: Passes::default(),
        }
    }

    fn begin_pass(&mut self, lanes: u16, now: Instant) {
        (self.pass, self.began) = (self.pass + 1, now);
        self.stage = Stage::Sending { lanes_left: lanes };
    }

    /// When time alone ends the passes.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline.filter(|_| !self.is_cut && self.stage != Stage::Stopping)
    }

    fn is_due(&self, now: Instant) -> bool {
        self.deadline().is_some_and(|deadline| deadline <= now)
    }

    /// Ends the passes with the one that goes on. True where lanes send and are to be told.
    fn cut(&mut self) -> bool {
        let was_cut = std::mem::replace(&mut self.is_cut, true);
        !was_cut && matches!(self.stage, Stage::Sending { .. })
    }

    /// What a pass leaves. Only from the pass before the first one that leaves pages out are any of them hot.
    fn known(&self, left: LeftToSend) -> LeftToSend {
        let is_known = self.pass + 1 >= LEAVES_OUT_FROM;
        LeftToSend { hot_bytes: if is_known { left.hot_bytes } else { 0 }, ..left }
    }

    /// Whether the guest is to stop after a pass that has left so much, when so many bytes have been sent in all.
    fn judge(&mut self, left: LeftToSend, sent: u64, total: u64, now: Instant) -> Verdict {
        let LeftToSend { dirty_bytes: dirty, hot_bytes: hot, cooled_bytes: cooled, .. } = left;
        let next = dirty.saturating_sub(hot);
        let seconds = now.saturating_duration_since(self.began).as_secs_f64().max(1e-6);
        let rate = sent.saturating_sub(self.sent_before) as f64 / seconds;
        self.rate = self.rate.max(rate);
        let fits = dirty as f64 <= self.rate * self.plan.downtime_limit.as_secs_f64();
        let shrinks =
            self.dirty_before.is_none_or(|before| next as f64 <= SHRINKS_TO * before as f64);
        let is_worth_it = hot as f64 <= SHRINKS_TO * dirty as f64;
        let has_passes = self.pass < self.plan.passes_max;
        let has_bytes = sent <= total.saturating_mul(SENT_MAX);
        let may_go_on = !self.is_cut && !self.has_stopped && !self.is_due(now);
        (self.sent_before, self.dirty_before) = (sent, Some(next));
        self.passes.count = self.pass;
        // A pass that was cut short has left pages that it has not sent, which says nothing of what the guest writes.
        if !self.is_cut && !self.has_stopped {
            let written = dirty.saturating_sub(cooled);
            self.passes.dirty_bytes_per_s = Some((written as f64 / seconds) as u64);
        }
        match may_go_on && !fits && shrinks && is_worth_it && has_passes && has_bytes {
            true => Verdict::Again,
            false => Verdict::Enough,
        }
    }

    /// How long so much takes at the rate of the fastest pass.
    fn time_of(&self, bytes: u64) -> Option<Duration> {
        let seconds = bytes as f64 / self.rate;
        Duration::try_from_secs_f64(seconds).ok().filter(|_| self.rate > 0.0)
    }
}

impl Source {
    /// What the passes have come to; none where there are none.
    pub(crate) fn passes(&self) -> Option<Passes> {
        self.rounds.as_ref().map(|rounds| rounds.passes)
    }

    /// Bytes that have been sent in passes, each time they were; of these some count as moved.
    pub(super) fn sent_in_rounds(&self) -> u64 {
        self.rounds.as_ref().map_or(0, |rounds| rounds.sent_before)
    }

    /// The destination is ready: the guest's writes are tracked before a page goes.
    pub(super) fn begin_rounds(&mut self, plan: RoundsPlan, now: &Moment) {
        self.rounds = Some(Rounds::new(plan, self.is_cut_early, now.at));
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
        let is_cut = rounds.is_cut;
        self.times.first_page.get_or_insert(now.at);
        self.do_next(Effect::SendPass);
        if is_cut {
            self.do_next(Effect::CutPass);
        }
    }

    /// Ends the passes whose time is over.
    pub(super) fn look_after_passes(&mut self, now: &Moment) {
        if self.rounds.as_ref().is_some_and(|rounds| rounds.is_due(now.at)) {
            self.end_passes();
        }
    }

    /// The passes end now: lanes finish the blocks that they are at, and the guest stops.
    pub(super) fn end_passes(&mut self) {
        match &mut self.rounds {
            Some(rounds) => {
                if rounds.cut() {
                    self.do_next(Effect::CutPass);
                }
            }
            None => self.is_cut_early = true,
        }
    }

    /// The dirty log has looked over the guest.
    pub(super) fn looked(&mut self, result: Result<()>) -> Result<()> {
        result?;
        if self.phase == Phase::Rounds {
            self.do_next(Effect::CountDirty);
        }
        Ok(())
    }

    /// The guest stands still before it was asked to: no pass follows the one that goes on.
    pub(super) fn has_stopped_by_itself(&mut self) {
        if let Some(rounds) = &mut self.rounds {
            rounds.has_stopped = true;
        }
    }

    /// The dirty log has marked as much as may wait to be sent: lanes go around once more in the same pass, also in one
    /// that was cut short. Otherwise the rest of the guest's memory would come while the guest stands still.
    pub(super) fn looked_in_part(&mut self) {
        let lanes = self.plan.bulk_lanes;
        if let (Some(rounds), Phase::Rounds) = (&mut self.rounds, &self.phase) {
            rounds.stage = Stage::Sending { lanes_left: lanes };
            self.do_next(Effect::SendPass);
        }
    }

    /// A lane has been around.
    pub(super) fn pass_has_ended(&mut self) {
        let Some(rounds) = &mut self.rounds else { return };
        let Stage::Sending { lanes_left } = &mut rounds.stage else { return };
        *lanes_left = lanes_left.saturating_sub(1);
        if *lanes_left == 0 {
            rounds.stage = Stage::Looking;
            self.do_next(Effect::Ask(Question::Look));
        }
    }

    /// What a pass has left is known.
    pub(super) fn counted(&mut self, left: LeftToSend, sent_bytes: u64, now: &Moment) {
        let (total_bytes, postcopy) = (self.plan.total_bytes, self.plan.postcopy);
        let Some(rounds) = self.rounds.as_mut().filter(|_| self.phase == Phase::Rounds) else {
            return;
        };
        let took = now.at.saturating_duration_since(rounds.began);
        let pass_bytes = sent_bytes.saturating_sub(rounds.sent_before);
        let left = rounds.known(left);
        let LeftToSend { dirty_bytes, hot_bytes, unlogged_bytes, .. } = left;
        let verdict = rounds.judge(left, sent_bytes, total_bytes, now.at);
        rounds.passes.expected_downtime = rounds.time_of(dirty_bytes).filter(|_| !postcopy);
        if verdict == Verdict::Enough {
            rounds.stage = Stage::Stopping;
        }
        let event = Event::Pass {
            pass: rounds.pass,
            took,
            sent_bytes: pass_bytes,
            dirty_bytes: dirty_bytes + unlogged_bytes,
            hot_bytes,
            dirty_bytes_per_s: rounds.passes.dirty_bytes_per_s,
            expected_downtime: rounds.passes.expected_downtime,
            is_cut: rounds.is_cut,
        };
        self.tell(event);
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

    fn left(dirty_bytes: u64) -> LeftToSend {
        LeftToSend { dirty_bytes, ..LeftToSend::default() }
    }

    /// What comes of passes that each take a second, given what is dirty after each and what has been sent by then.
    fn verdicts(plan: RoundsPlan, passes: &[(u64, u64)]) -> Vec<Verdict> {
        let begun = Instant::now();
        let mut rounds = Rounds::new(plan, false, begun);
        let pass = |(second, &(dirty, sent)): (u64, &(u64, u64))| {
            rounds.begin_pass(1, begun + Duration::from_secs(second));
            let end = begun + Duration::from_secs(second + 1);
            rounds.judge(left(dirty), sent, 4 * GIB, end)
        };
        (0..).zip(passes).map(pass).collect()
    }

    #[test]
    fn whole_passes_say_when_it_is_enough() {
        use Verdict::{Again, Enough};
        let plan =
            RoundsPlan { passes_max: 4, downtime_limit: Duration::from_millis(500), timeout: None };
        // What the link sends in half a second.
        assert_eq!(verdicts(plan, &[(GIB / 2, GIB)]), [Enough]);
        assert_eq!(verdicts(plan, &[(GIB, GIB), (GIB / 2, 2 * GIB)]), [Again, Enough]);
        // It does not shrink.
        let shrinks = [(2 * GIB, GIB), (14 * GIB / 10, 2 * GIB), (GIB, 3 * GIB)];
        assert_eq!(verdicts(plan, &shrinks), [Again, Again, Enough]);
        assert_eq!(verdicts(plan, &[(2 * GIB, GIB), (15 * GIB / 10, 2 * GIB)]), [Again, Enough]);
        // Too many passes, or too many bytes.
        let plan = RoundsPlan { passes_max: 2, downtime_limit: Duration::ZERO, timeout: None };
        assert_eq!(verdicts(plan, &[(100, GIB), (1, 2 * GIB)]), [Again, Enough]);
        assert_eq!(verdicts(plan, &[(0, GIB)]), [Enough]);
        assert_eq!(verdicts(plan, &[(100, 8 * GIB + 1)]), [Enough]);
    }

    /// Each pass takes a second and leaves half of what the one before it left, so that it alone would go on.
    #[test]
    fn passes_end_when_their_time_is_over_and_not_before() {
        use Verdict::{Again, Enough};
        let passes = [(2 * GIB, GIB), (GIB, 2 * GIB), (GIB / 2, 3 * GIB), (GIB / 4, 4 * GIB)];
        let plan = |timeout| RoundsPlan { passes_max: 9, downtime_limit: Duration::ZERO, timeout };
        assert_eq!(verdicts(plan(None), &passes), [Again; 4]);
        for (timeout_ms, expected) in [
            (4001, [Again, Again, Again, Again]),
            (3000, [Again, Again, Enough, Enough]),
            (2001, [Again, Again, Enough, Enough]),
            (1000, [Enough; 4]),
        ] {
            let timeout = Some(Duration::from_millis(timeout_ms));
            assert_eq!(verdicts(plan(timeout), &passes), expected, "{timeout_ms} ms");
        }
    }

    /// Each pass takes a second. What is hot is left out from the third one on.
    #[test]
    fn passes_end_when_most_of_what_is_left_is_hot_and_hot_pages_alone_end_none() {
        use Verdict::{Again, Enough};
        let plan = RoundsPlan { passes_max: 9, downtime_limit: Duration::ZERO, timeout: None };
        let begun = Instant::now();
        let judge = |passes: &[(u64, u64)]| {
            let mut rounds = Rounds::new(plan, false, begun);
            let pass = |(second, &(dirty_bytes, hot_bytes)): (u64, &(u64, u64))| {
                rounds.begin_pass(1, begun + Duration::from_secs(second));
                let cooled_bytes = dirty_bytes / 2;
                let left =
                    LeftToSend { dirty_bytes, hot_bytes, cooled_bytes, ..LeftToSend::default() };
                let left = rounds.known(left);
                let end = begun + Duration::from_secs(second + 1);
                let verdict = rounds.judge(left, (second + 1) * GIB, 9 * GIB, end);
                assert_eq!(rounds.passes.dirty_bytes_per_s, Some(dirty_bytes - dirty_bytes / 2));
                verdict
            };
            (0..).zip(passes).map(pass).collect::<Vec<_>>()
        };
        // All that is left does not shrink to 0.7, but what is not hot does.
        let still = [(100, 100), (90, 50), (80, 55), (60, 55)];
        assert_eq!(judge(&still), [Again, Again, Again, Enough]);
        assert_eq!(judge(&[(100, 0), (90, 0)]), [Again, Enough]);
        // What is not hot does not shrink either.
        assert_eq!(judge(&[(100, 0), (60, 20), (60, 30)]), [Again, Again, Enough]);
        // 0.7 of what is left is hot, and more.
        assert_eq!(judge(&[(100, 0), (50, 35), (20, 15)]), [Again, Again, Enough]);
    }

    #[test]
    fn no_pass_follows_one_that_ends_with_the_guest_stopped_by_another_program() {
        let begun = Instant::now();
        let plan = RoundsPlan { passes_max: 9, downtime_limit: Duration::ZERO, timeout: None };
        for (has_stopped, expected) in [(false, Verdict::Again), (true, Verdict::Enough)] {
            let mut rounds = Rounds::new(plan, false, begun);
            rounds.begin_pass(1, begun);
            rounds.has_stopped = has_stopped;
            let end = begun + Duration::from_secs(1);
            let left = LeftToSend { dirty_bytes: GIB, ..LeftToSend::default() };
            assert_eq!(rounds.judge(left, 4 * GIB, 4 * GIB, end), expected);
            // How much is left says nothing of what the guest writes in a pass then.
            assert_eq!(rounds.passes.dirty_bytes_per_s.is_none(), has_stopped);
        }
    }

    #[test]
    fn a_pass_that_is_cut_short_says_nothing_of_the_rate_of_writing() {
        let begun = Instant::now();
        let at = |second| begun + Duration::from_secs(second);
        let plan = RoundsPlan { passes_max: 9, downtime_limit: Duration::ZERO, timeout: None };
        let mut rounds = Rounds::new(plan, false, begun);
        rounds.begin_pass(1, at(0));
        assert_eq!(rounds.judge(left(GIB), 4 * GIB, 4 * GIB, at(2)), Verdict::Again);
        assert_eq!(rounds.passes.dirty_bytes_per_s, Some(GIB / 2));
        assert_eq!(rounds.time_of(GIB), Some(Duration::from_millis(500)));
        rounds.begin_pass(1, at(2));
        assert!(rounds.cut(), "a lane sends");
        assert!(!rounds.cut(), "it has been told");
        assert_eq!(rounds.judge(left(GIB / 2), 5 * GIB, 4 * GIB, at(3)), Verdict::Enough);
        assert_eq!((rounds.passes.count, rounds.passes.dirty_bytes_per_s), (2, Some(GIB / 2)));
        // Nothing has been sent at all.
        let mut rounds = Rounds::new(plan, true, begun);
        rounds.begin_pass(1, at(0));
        assert_eq!(rounds.judge(left(GIB), 0, 4 * GIB, at(1)), Verdict::Enough);
        assert_eq!((rounds.passes.dirty_bytes_per_s, rounds.time_of(GIB)), (None, None));
    }
}
