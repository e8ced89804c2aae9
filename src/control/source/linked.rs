//! With lanes: from the guest's stop to the last page.

use std::time::{Duration, Instant};

use umem_wire::source::{Input as Step, Phase};
use umem_wire::{Event as Said, FaultCode, Frame, LaneRole};

use super::{
    Doing, Doubt, Effect, Input, Moment, PutBack, Question, Record, Silence, Source, Switchover,
    Target, Way, peer,
};
use crate::control::Order;
use crate::control::doubt::is_effect;
use crate::control::liveness::{self, Due, Liveness, stood_still, stood_still_by_option};
use crate::error::{Error, Result, lane_name};
use crate::events::{AWAITS_STANDSTILL, Event, Place, Remark, Room};
use crate::host::monitor::Answer;

/// How long a destination may take to become ready: it already has its guest's memory, and compares regions.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// The open lanes.
#[derive(Debug)]
pub(super) struct Linked {
    liveness: Liveness,
    /// A bulk lane is lost after the switchover. The destination may give its reason on the demand lane.
    doubt: Option<Doubt>,
    /// The bulk lanes send the pages that remain.
    is_bulk_sent: bool,
    /// Bulk lanes that have sent all their pages.
    bulk_ended: u16,
}

impl Linked {
    pub(super) fn new(step_timeout: Duration) -> Linked {
        let liveness = Liveness::off(step_timeout);
        Linked { liveness, doubt: None, is_bulk_sent: false, bulk_ended: 0 }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let doubt = self.doubt.as_ref().map(|doubt| doubt.until);
        doubt.into_iter().chain(self.liveness.deadline()).min()
    }
}

impl Source {
    fn lanes(&mut self) -> Option<&mut Linked> {
        match &mut self.doing {
            Doing::Linked(linked) => Some(linked),
            _ => None,
        }
    }

    pub(super) fn linked(&mut self, input: Input, now: &Moment) -> Result<()> {
        match input {
            Input::Begin => {
                self.step(Step::SentRegions)?;
                self.do_next(Effect::SendRegions);
                Ok(())
            }
            Input::Received(event) => self.received(event, now),
            Input::StateLeft => {
                if matches!(self.phase, Phase::Loading { .. }) {
                    self.watch_over(now);
                    self.send_rest_early(now.at);
                }
                Ok(())
            }
            Input::BulkEnded => self.bulk_has_ended(),
            Input::PassEnded => {
                self.pass_has_ended();
                Ok(())
            }
            Input::Counted { left, sent_bytes } => {
                self.counted(left, sent_bytes, now);
                Ok(())
            }
            Input::Failed(error @ Error::Lost { .. }) => self.lane_lost(error, now),
            Input::Failed(error) => Err(error),
            Input::Monitor(answer) => self.answered(answer, now),
            Input::Digested(outcome) => self.digested(outcome, now),
            Input::Order(order) => self.ordered(&order, now),
            Input::EndPasses => {
                self.end_passes();
                Ok(())
            }
            Input::Given => self.given(now),
            Input::Interrupted => self.interrupted(now),
            Input::Committed => self.switch_over(now),
            Input::Time
            | Input::TakeOver
            | Input::LanesDown
            | Input::Opened(_)
            | Input::Called(_) => Ok(()),
            Input::Abandoned(_) | Input::NotDone(_) => unreachable!("taken in every state"),
        }
    }

    /// The destination sent this, on open lanes or on lanes that are being closed.
    pub(super) fn received(&mut self, event: Said, now: &Moment) -> Result<()> {
        if let Said::Error(fault) = event {
            return self.peer_failed(peer(fault), now);
        }
        self.step(Step::Received(&event))?;
        match event {
            Said::Ready(landing) => {
                self.do_next(Effect::Land(landing));
                self.watch_over(now);
                match self.plan.rounds {
                    Some(rounds) => self.begin_rounds(rounds, now),
                    None => self.ask_to_stop(now),
                }
            }
            Said::Settled => self.stopped(now)?,
            Said::Loaded => self.prepare_to_commit(now),
            Said::Running { us_since_switchover: us } => self.running(self.ran_at(us, now)),
            Said::Pong(number) => {
                if let Some(lanes) = self.lanes() {
                    lanes.liveness.answered(number, now.at);
                }
            }
            Said::Digests(digests) if self.plan.is_checked => self.digests.heard(digests),
            Said::Digests(_) => {
                return Err(Error::protocol("demand lane", "unrequested digests"));
            }
            Said::Complete(_) => self.completed(now),
            _ => {}
        }
        Ok(())
    }

    pub(super) fn ask_to_stop(&mut self, now: &Moment) {
        self.times.stopped = Some(now.at);
        if self.plan.postcopy {
            self.do_next(Effect::StayAwake);
        }
        self.do_next(Effect::Ask(Question::Stop));
    }

    /// Starts the pings, from *ready* on and each time lanes open again. After the switchover they run only if lanes
    /// can be replaced: otherwise a lost ping would lose the guest.
    pub(super) fn watch_over(&mut self, now: &Moment) {
        let is_asked = self.plan.bulk_lanes > 0 && (self.phase.may_run() || self.plan.recovers);
        if let Some(lanes) = self.lanes() {
            lanes.liveness.begin(is_asked, now.at);
        }
    }

    pub(super) fn answered(&mut self, answer: Answer, now: &Moment) -> Result<()> {
        match answer {
            Answer::Tracking(result) => self.tracking(result, now),
            Answer::Looked(result) => self.looked(result),
            Answer::LookedInPart => {
                self.looked_in_part();
                Ok(())
            }
            Answer::LookedLast => {
                self.has_stopped_by_itself();
                self.looked(Ok(()))
            }
            Answer::Stopped(result) => {
                if let Some(asked) = result? {
                    self.times.stopped = Some(asked);
                }
                match self.phase {
                    Phase::Rounds => self.end_rounds(),
                    _ => self.stopped(now),
                }
            }
            Answer::Saved(result) => self.send_state(result?, now),
            Answer::StandsStill(result) => self.may_be_given_away(result, now),
            Answer::PutBack(result) => {
                self.has_put_back(&result);
                Ok(())
            }
            Answer::Resumed(_) | Answer::Prepared(_) | Answer::Loaded(_) | Answer::Running(_) => {
                Ok(())
            }
        }
    }

    /// The guest stands still: its pages may be sent.
    fn stopped(&mut self, now: &Moment) -> Result<()> {
        let (postcopy, background) = (self.plan.postcopy, self.background);
        self.step(Step::GuestStopped { postcopy, background })?;
        self.do_next(Effect::Fix);
        let session = self.plan.kept.as_ref().map(|kept| kept.session.clone());
        self.tell(Event::Stopped { postcopy, session });
        self.do_next(Effect::Send(Frame::Stopped { postcopy, background }));
        if postcopy {
            self.do_next(Effect::Show("switching"));
            self.do_next(Effect::Ask(Question::Save));
        } else {
            self.do_next(Effect::Show("sending"));
            self.send_bulk(now.at);
        }
        Ok(())
    }

    /// Has the bulk lanes send the pages that remain, once on these lanes.
    pub(super) fn send_bulk(&mut self, now: Instant) {
        let Some(lanes) = self.lanes() else { return };
        if !std::mem::replace(&mut lanes.is_bulk_sent, true) {
            self.times.first_page.get_or_insert(now);
            self.do_next(Effect::SendBulk);
        }
    }

    /// After passes the remaining pages follow the device state at once, while the destination loads the state: few
    /// pages remain, and the guest writes most of them as soon as it runs. Without passes all of memory would compete
    /// with the switchover for the link and the cores.
    fn send_rest_early(&mut self, now: Instant) {
        if self.rounds.is_some() && self.plan.postcopy && self.background {
            self.send_bulk(now);
        }
    }

    fn send_state(&mut self, state: Vec<u8>, now: &Moment) -> Result<()> {
        self.step(Step::SentState { bytes: state.len() as u64 })?;
        self.step(Step::SentLoad)?;
        // An answer would arrive behind all of the state, so no ping is sent before the state has left.
        if let Some(lanes) = self.lanes() {
            lanes.liveness.begin(false, now.at);
        }
        self.do_next(Effect::SendState(state));
        Ok(())
    }

    /// The destination could run the guest. The monitor decides whether it may, and is asked last of all: the record
    /// states before that a switchover may have been sent.
    fn prepare_to_commit(&mut self, now: &Moment) {
        self.times.switched = Some(now.at);
        let (background, times) = (self.background, self.times);
        self.do_next(Effect::Persist(Record::Committed { background, times }));
        self.do_next(Effect::Ask(Question::StandsStill));
    }

    /// The monitor's answer for a guest that is about to be given away, or was given away by a switchover that has not
    /// arrived.
    fn may_be_given_away(&mut self, result: Result<()>, now: &Moment) -> Result<()> {
        if matches!(self.phase, Phase::Loaded { .. }) {
            result?;
            self.do_next(Effect::Commit);
            return Ok(());
        }
        let Switchover::Owed { unanswered, .. } = &mut self.switchover else { return Ok(()) };
        let Some(left) = unanswered.checked_sub(1) else { return Ok(()) };
        *unanswered = left;
        match result {
            // The last answer decides.
            _ if left > 0 => Ok(()),
            Ok(()) => {
                // On new lanes the destination reports whether the switchover has arrived.
                if self.lanes().is_some() {
                    self.switchover = Switchover::Plain;
                    self.send_switchover(now);
                }
                Ok(())
            }
            Err(error) => {
                self.switchover = Switchover::Refused;
                Err(error)
            }
        }
    }

    /// The commit point: from here on the guest never runs at this side again.
    fn switch_over(&mut self, now: &Moment) -> Result<()> {
        self.step(Step::SentSwitchover)?;
        self.send_switchover(now);
        self.ask_to_put_back();
        self.watch_over(now);
        if let Some(kept) = &self.plan.kept {
            let (session, command) = (kept.session.clone(), kept.command());
            self.tell(Event::Resumable { session, command });
        }
        self.do_next(Effect::StartRelease);
        Ok(())
    }

    /// Sends the switchover, perhaps again: the one that arrives says how long the guest has stood still.
    pub(super) fn send_switchover(&mut self, now: &Moment) {
        self.times.switched = Some(now.at);
        self.do_next(Effect::Switchover);
    }

    /// The time at which the guest ran, on this side's clock: the destination states how long after the switchover. That
    /// contains the switchover's way, as far as the destination can measure it, and not the way of the answer. So both
    /// sides have one downtime.
    pub(super) fn ran_at(&self, us_since_switchover: u64, now: &Moment) -> Instant {
        let after = Duration::from_micros(us_since_switchover);
        let at = self.times.switched.and_then(|switched| switched.checked_add(after));
        at.unwrap_or(now.at).min(now.at)
    }

    /// Has the monitor's settings restored, except for the guest itself, which has gone.
    pub(super) fn ask_to_put_back(&mut self) {
        self.put_back = PutBack::Asked;
        self.do_next(Effect::Ask(Question::PutBack));
    }

    pub(super) fn has_put_back(&mut self, result: &Result<()>) {
        self.put_back = PutBack::Answered;
        if let Err(error) = result {
            self.tell(Event::Remark(Remark::NotPutBack { reason: error.to_string() }));
        }
    }

    /// The guest has run at the destination since then. A destination that was killed before it could write that
    /// reports it again.
    pub(super) fn running(&mut self, since: Instant) {
        (self.switchover, self.has_arrived) = (Switchover::Plain, true);
        self.do_next(Effect::Relax);
        if self.times.running.replace(self.times.running.unwrap_or(since)).is_none() {
            self.heard.is_running = true;
            self.do_next(Effect::Persist(Record::Heard(self.heard)));
            self.tell(Event::Running { place: Place::Source, downtime: self.times.downtime() });
        }
        self.do_next(Effect::Show("sending"));
        if self.plan.postcopy && self.background {
            self.send_bulk(since);
        }
    }

    fn bulk_has_ended(&mut self) -> Result<()> {
        let bulk_lanes = self.plan.bulk_lanes;
        if let Some(lanes) = self.lanes() {
            lanes.bulk_ended += 1;
            if lanes.bulk_ended < bulk_lanes {
                return Ok(());
            }
        }
        let stood_still = matches!(self.phase, Phase::CopyingStopped);
        self.step(Step::PagesAllSent)?;
        if stood_still {
            self.do_next(Effect::Show("switching"));
            self.do_next(Effect::StayAwake);
            self.do_next(Effect::Ask(Question::Save));
        }
        Ok(())
    }

    /// A lane is lost.
    fn lane_lost(&mut self, error: Error, now: &Moment) -> Result<()> {
        if !self.plan.recovers || self.phase.may_run() {
            return Err(error);
        }
        if !is_effect(&error) {
            self.recover(&error.to_string(), now)
        } else {
            if let Some(lanes) = self.lanes() {
                lanes.doubt.get_or_insert_with(|| Doubt::new(error, now.at));
            }
            Ok(())
        }
    }

    /// The destination has given up. After the switchover that ends the migration only if the guest there has ended.
    /// Otherwise the destination, or a process that takes over from it, may still need the pages here.
    fn peer_failed(&mut self, error: Error, now: &Moment) -> Result<()> {
        let Error::Peer { code, text, .. } = &error else { return Err(error) };
        let can_go_on = self.plan.recovers && !self.phase.may_run();
        match code {
            FaultCode::Ended => Err(error),
            _ if !can_go_on => Err(error),
            // On lanes that are being closed.
            _ if self.lanes().is_none() => Ok(()),
            FaultCode::OutOfMemory => {
                let text = text.clone();
                self.tell(Event::Short { reason: text.clone(), room: Room::Elsewhere });
                self.recover(&format!("the destination pauses: {text}"), now)?;
                self.shortage_is_told();
                Ok(())
            }
            _ => self.recover(&error.to_string(), now),
        }
    }

    /// Whether lanes can be replaced.
    fn has_left(&self) -> bool {
        self.plan.recovers && !self.phase.may_run()
    }

    fn ordered(&mut self, order: &Order, now: &Moment) -> Result<()> {
        match order {
            Order::Pause if self.has_left() => {
                self.route.pausing.pause();
                self.recover("paused manually", now)
            }
            Order::Pause => {
                self.tell(Event::Remark(Remark::NotPaused { place: Place::Source }));
                Ok(())
            }
            // Nothing has been paused.
            Order::Resume(_) => Ok(()),
        }
    }

    fn given(&mut self, now: &Moment) -> Result<()> {
        if !self.has_left() {
            return Ok(());
        }
        self.give();
        self.recover("other connections were given", now)
    }

    /// On an order: from here on lanes are opened on given connections, and no address is dialed.
    pub(super) fn give(&mut self) {
        self.route.target = Target::Way(Way::Given);
        self.route.pausing.resume();
    }

    /// Ctrl-C: gives up while the guest belongs to this side. After that the destination needs this side. Without
    /// background pages Ctrl-C ends a benchmark: the rest is sent.
    fn interrupted(&mut self, now: &Moment) -> Result<()> {
        if self.phase.may_run() {
            return Err(Error::Interrupted("the guest continues at the source".into()));
        }
        if self.awaits_standstill() {
            return self.interrupted_while_owed();
        }
        if !self.background && matches!(self.phase, Phase::Serving) {
            self.background = true;
            self.tell(Event::Remark(Remark::SendsTheRest));
            self.send_bulk(now.at);
            return Ok(());
        }
        self.say_what_is_needed(now);
        Ok(())
    }

    /// Whether the destination denies the switchover, and the monitor has not answered whether it may be sent again.
    fn awaits_standstill(&self) -> bool {
        matches!(self.switchover, Switchover::Owed { unanswered: 1.., .. })
    }

    /// Neither side has the guest until the monitor answers: the first interrupt reports that, and the effect of
    /// another one. To the destination it then looks as if umem had been killed, and it waits for a takeover.
    fn interrupted_while_owed(&mut self) -> Result<()> {
        let Switchover::Owed { silence, .. } = &mut self.switchover else { return Ok(()) };
        let was = std::mem::replace(silence, Silence::Known);
        match &self.plan.kept {
            Some(kept) if was == Silence::Known && !self.plan.is_embedded => {
                Err(Error::Interrupted(format!(
                    "{AWAITS_STANDSTILL}; when the monitor answers again, {} continues the session",
                    kept.command()
                )))
            }
            kept => {
                let can_leave = kept.is_some() && !self.plan.is_embedded;
                self.tell(Event::Remark(Remark::AwaitsStandstill { can_leave }));
                Ok(())
            }
        }
    }

    /// Reports the awaited event once.
    fn look_after_standstill(&mut self, now: &Moment) {
        let Switchover::Owed { unanswered: 1.., silence } = &mut self.switchover else { return };
        if let Silence::Until(until) = *silence
            && until <= now.at
        {
            *silence = Silence::Remarked;
            let can_leave = self.plan.kept.is_some() && !self.plan.is_embedded;
            self.tell(Event::Remark(Remark::AwaitsStandstill { can_leave }));
        }
    }

    pub(super) fn say_what_is_needed(&mut self, now: &Moment) {
        let moved_bytes = now.moved_bytes.saturating_sub(self.sent_in_rounds());
        let bytes = self.plan.total_bytes.saturating_sub(moved_bytes);
        self.tell(Event::Remark(Remark::StillNeeded { bytes }));
    }

    /// Handles the loss of a bulk lane without a reason on the demand lane, and a silent destination.
    pub(super) fn look_after_link(&mut self, now: &Moment) -> Result<()> {
        self.look_after_standstill(now);
        let Some(lanes) = self.lanes() else { return Ok(()) };
        let (due, patience) = (lanes.liveness.due(now.at), lanes.liveness.patience());
        let doubt = lanes.doubt.take_if(|doubt| doubt.until <= now.at);
        match due {
            Due::Nothing => {}
            Due::Ask(number) => self.do_next(Effect::Ping(number)),
            Due::Lost if self.phase.may_run() => {
                return Err(silent(format!("no answer for {} s", patience.as_secs_f64())));
            }
            Due::Lost => return self.recover("the destination does not answer", now),
        }
        match doubt {
            Some(Doubt { error, .. }) => self.recover(&error.to_string(), now),
            None => Ok(()),
        }
    }

    /// Ends a migration whose destination does not take its next step, while the guest still belongs to this side.
    pub(super) fn look_after_step(&mut self, now: &Moment) -> Result<()> {
        let step = match self.phase {
            Phase::Comparing => Some((self.phase.name(), READY_TIMEOUT)),
            Phase::Settling | Phase::CopyingStopped | Phase::Loading { .. } => {
                Some((self.phase.name(), Duration::MAX))
            }
            _ => None,
        };
        match self.steps.look(step, now.moved_bytes, now.at) {
            liveness::Step::Waits => Ok(()),
            liveness::Step::Moves => {
                if let Some(lanes) = self.lanes() {
                    lanes.liveness.moved(now.at);
                }
                Ok(())
            }
            liveness::Step::Over(limit) => {
                let say = match self.phase {
                    Phase::Comparing => stood_still,
                    _ => stood_still_by_option,
                };
                Err(silent(say(limit, self.phase.name())))
            }
        }
    }
}

fn silent(what: String) -> Error {
    Error::Lost { side: "destination", lane: lane_name(LaneRole::Demand, 0), what }
}
