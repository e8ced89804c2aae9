//! Rounds: before the stop, pages are sent pass after pass while the guest runs, until few remain or the rest no longer
//! shrinks.
//!
//! ```text
//! ready --> track --> pass 1 --> count --> pass 2 --> count ... --> stop --> remaining list --> settled --> stopped
//!                     lanes send            judged by
//!                     dirty pages, then     whole passes
//!                     the log looks
//! ```
//!
//! A pass ends when every lane has been around once and the dirty log has then looked over the whole guest. The pages
//! that the log has marked by that time are the ones that the pass leaves. Passes are judged as wholes, because a
//! moment of a pass does not predict the next one. A pass leaves out pages that the guest writes all the time (hot
//! pages), so passes end once most of the remaining pages are hot. The contents of a guest's memory may come through
//! QEMU's stream. Marked pages then wait for room, so lanes and log take turns until the look is complete.
//!
//! Time (`--timeout`) and an order (`umem control SOCKET postcopy`) cut a pass short: each lane finishes its current
//! block and reports the end of its pass. The unsent pages stay dirty, so they remain as others do. A look in parts is
//! still completed.

use std::time::{Duration, Instant};

use umem_wire::Frame;
use umem_wire::source::{Input as Step, Phase};

use super::{Effect, Moment, Question, RoundsPlan, Source};
use crate::error::Result;
use crate::events::Event;
use crate::memory::dirty::{LEAVES_OUT_FROM, LeftToSend};

/// A pass that leaves more than this share of the bytes left by the pass before it does not justify another one. Hot
/// bytes count in neither. If more than this share of the remaining bytes is hot, another pass is not justified either.
const SHRINKS_TO: f64 = 0.7;

/// The most that is sent before the stop, as a multiple of the guest's memory.
const SENT_MAX: u64 = 2;

/// The result of the passes so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Passes {
    /// Passes that have ended.
    pub(crate) count: u32,
    /// Bytes a second that the guest wrote in the last whole pass, each page once.
    pub(crate) dirty_bytes_per_s: Option<u64>,
    /// The time to send the rest at the rate of the fastest pass. None if the guest does not wait for the rest (`-p`),
    /// and before a rate is known.
    pub(crate) expected_downtime: Option<Duration>,
}

/// The awaited event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The guest's writes are tracked.
    Tracking,
    /// This many lanes have not yet been around in this pass.
    Sending { lanes_left: u16 },
    /// The log looks over the guest, and the dirty pages are counted.
    Looking,
    /// The guest stands still.
    Stopping,
}

/// The progress of the rounds.
#[derive(Debug)]
pub(super) struct Rounds {
    plan: RoundsPlan,
    stage: Stage,
    /// The current pass, from 1.
    pass: u32,
    began: Instant,
    /// Bytes sent before the current pass.
    sent_before: u64,
    /// Bytes that the previous pass left, without the hot ones.
    dirty_before: Option<u64>,
    /// The highest rate of any pass, bytes a second.
    rate: f64,
    /// The passes are cut short at this time.
    deadline: Option<Instant>,
    /// The current pass is cut short, and is the last one.
    is_cut: bool,
    /// Another program has stopped the guest.
    has_stopped: bool,
    passes: Passes,
}

/// The judgement of a pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Verdict {
    Again,
    /// Stop the guest.
    Enough,
}

impl Rounds {
    /// From *ready* on. `is_cut` is true if an order has already ended the passes.
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

    /// The time at which the passes end.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline.filter(|_| !self.is_cut && self.stage != Stage::Stopping)
    }

    fn is_due(&self, now: Instant) -> bool {
        self.deadline().is_some_and(|deadline| deadline <= now)
    }

    /// Makes the current pass the last one. Returns true if lanes send, and so must be notified.
    fn cut(&mut self) -> bool {
        let was_cut = std::mem::replace(&mut self.is_cut, true);
        !was_cut && matches!(self.stage, Stage::Sending { .. })
    }

    /// The bytes that a pass leaves. Pages count as hot only from the pass before the first one that leaves pages out.
    fn known(&self, left: LeftToSend) -> LeftToSend {
        let is_known = self.pass + 1 >= LEAVES_OUT_FROM;
        LeftToSend { hot_bytes: if is_known { left.hot_bytes } else { 0 }, ..left }
    }

    /// Whether the guest is to stop after a pass with this rest and these total bytes sent.
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
        // A pass that was cut short leaves unsent pages, so its rest does not measure the guest's writes.
        if !self.is_cut && !self.has_stopped {
            let written = dirty.saturating_sub(cooled);
            self.passes.dirty_bytes_per_s = Some((written as f64 / seconds) as u64);
        }
        match may_go_on && !fits && shrinks && is_worth_it && has_passes && has_bytes {
            true => Verdict::Again,
            false => Verdict::Enough,
        }
    }

    /// The time to send these bytes at the rate of the fastest pass.
    fn time_of(&self, bytes: u64) -> Option<Duration> {
        let seconds = bytes as f64 / self.rate;
        Duration::try_from_secs_f64(seconds).ok().filter(|_| self.rate > 0.0)
    }
}

impl Source {
    /// The result of the passes; None without rounds.
    pub(crate) fn passes(&self) -> Option<Passes> {
        self.rounds.as_ref().map(|rounds| rounds.passes)
    }

    /// Bytes sent in passes, repeated sends included. Some of them count as moved.
    pub(super) fn sent_in_rounds(&self) -> u64 {
        self.rounds.as_ref().map_or(0, |rounds| rounds.sent_before)
    }

    /// The destination is ready: track the guest's writes before any page is sent.
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

    /// Ends passes whose time is over.
    pub(super) fn look_after_passes(&mut self, now: &Moment) {
        if self.rounds.as_ref().is_some_and(|rounds| rounds.is_due(now.at)) {
            self.end_passes();
        }
    }

    /// Ends the passes now: lanes finish their current blocks, and the guest stops.
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

    /// The guest stands still before umem stopped it: no pass follows the current one.
    pub(super) fn has_stopped_by_itself(&mut self) {
        if let Some(rounds) = &mut self.rounds {
            rounds.has_stopped = true;
        }
    }

    /// The dirty log has marked as many pages as may wait to be sent. Lanes go around once more in the same pass, even
    /// in one that was cut short. Otherwise the rest of the guest's memory would be sent while the guest stands still.
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

    /// The rest of a pass is known.
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

    /// The guest stands still after rounds: the dirty pages remain, and the destination receives their list.
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

    /// The verdicts on passes of one second each. `passes` has the dirty bytes after each pass and the bytes sent by
    /// then.
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
    fn passes_end_when_the_rest_is_small_or_does_not_shrink() {
        use Verdict::{Again, Enough};
        let plan =
            RoundsPlan { passes_max: 4, downtime_limit: Duration::from_millis(500), timeout: None };
        // The link sends this in half a second.
        assert_eq!(verdicts(plan, &[(GIB / 2, GIB)]), [Enough]);
        assert_eq!(verdicts(plan, &[(GIB, GIB), (GIB / 2, 2 * GIB)]), [Again, Enough]);
        // The rest does not shrink.
        let shrinks = [(2 * GIB, GIB), (14 * GIB / 10, 2 * GIB), (GIB, 3 * GIB)];
        assert_eq!(verdicts(plan, &shrinks), [Again, Again, Enough]);
        assert_eq!(verdicts(plan, &[(2 * GIB, GIB), (15 * GIB / 10, 2 * GIB)]), [Again, Enough]);
        // Too many passes, or too many bytes.
        let plan = RoundsPlan { passes_max: 2, downtime_limit: Duration::ZERO, timeout: None };
        assert_eq!(verdicts(plan, &[(100, GIB), (1, 2 * GIB)]), [Again, Enough]);
        assert_eq!(verdicts(plan, &[(0, GIB)]), [Enough]);
        assert_eq!(verdicts(plan, &[(100, 8 * GIB + 1)]), [Enough]);
    }

    /// Each pass takes a second and leaves half of the previous rest, so the rest alone would never end the passes.
    #[test]
    fn passes_end_exactly_when_their_time_is_over() {
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

    /// Each pass takes a second. Hot pages are left out from the third pass on.
    #[test]
    fn passes_end_when_the_rest_is_mostly_hot() {
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
        // The whole rest does not shrink to 0.7, but its part without hot pages does.
        let still = [(100, 100), (90, 50), (80, 55), (60, 55)];
        assert_eq!(judge(&still), [Again, Again, Again, Enough]);
        assert_eq!(judge(&[(100, 0), (90, 0)]), [Again, Enough]);
        // The part without hot pages does not shrink either.
        assert_eq!(judge(&[(100, 0), (60, 20), (60, 30)]), [Again, Again, Enough]);
        // More than 0.7 of the rest is hot.
        assert_eq!(judge(&[(100, 0), (50, 35), (20, 15)]), [Again, Again, Enough]);
    }

    #[test]
    fn guest_stopped_by_another_program_ends_the_passes() {
        let begun = Instant::now();
        let plan = RoundsPlan { passes_max: 9, downtime_limit: Duration::ZERO, timeout: None };
        for (has_stopped, expected) in [(false, Verdict::Again), (true, Verdict::Enough)] {
            let mut rounds = Rounds::new(plan, false, begun);
            rounds.begin_pass(1, begun);
            rounds.has_stopped = has_stopped;
            let end = begun + Duration::from_secs(1);
            let left = LeftToSend { dirty_bytes: GIB, ..LeftToSend::default() };
            assert_eq!(rounds.judge(left, 4 * GIB, 4 * GIB, end), expected);
            // The rest then does not measure the guest's writes in a pass.
            assert_eq!(rounds.passes.dirty_bytes_per_s.is_none(), has_stopped);
        }
    }

    #[test]
    fn cut_pass_does_not_change_the_dirty_rate() {
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
        assert!(!rounds.cut(), "the lanes have been notified");
        assert_eq!(rounds.judge(left(GIB / 2), 5 * GIB, 4 * GIB, at(3)), Verdict::Enough);
        assert_eq!((rounds.passes.count, rounds.passes.dirty_bytes_per_s), (2, Some(GIB / 2)));
        // No byte has been sent.
        let mut rounds = Rounds::new(plan, true, begun);
        rounds.begin_pass(1, at(0));
        assert_eq!(rounds.judge(left(GIB), 0, 4 * GIB, at(1)), Verdict::Enough);
        assert_eq!((rounds.passes.dirty_bytes_per_s, rounds.time_of(GIB)), (None, None));
    }
}
