//! Without lanes, after the switchover: the source opens them until an attempt succeeds, or an order sets another way.
//!
//! The loss of any lane takes all of them down. The driver dials at once, then with growing pauses. On a new demand
//! lane the destination reports its standing and its pages, and the migration continues from there.

use std::time::{Duration, Instant};

use umem_wire::source::{Input as Step, Phase};
use umem_wire::{Event as Said, FaultCode, Standing};

use super::{
    Doing, Effect, Input, Linked, Moment, Opened, Question, Record, Route, STANDSTILL_PATIENCE,
    Silence, Source, Switchover, Target, Way,
};
use crate::control::Order;
use crate::control::backoff::Backoff;
use crate::control::calling::is_nobody;
use crate::error::{Error, Result};
use crate::events::{
    Event, Missing, Pause, Place, Remark, Room, Route as LaneRoute, Unanswered, words,
};

/// How long connections to the destination may be refused before an event reports the consequence. A destination that
/// is resumed listens again within this time.
const SILENCE_PATIENCE: Duration = Duration::from_secs(5);

/// One period without lanes.
#[derive(Debug)]
pub(super) struct Cut {
    since: Instant,
    stage: Stage,
    backoff: Backoff,
    listener: Listener,
    /// An event has reported that the destination has no room.
    shortage_is_told: bool,
    /// An event has reported the effect of another interrupt.
    was_interrupted: bool,
}

#[derive(Debug)]
enum Stage {
    /// The lanes' threads end. `why` is the reason for the new lanes.
    TakingDown { why: String },
    /// A process that takes over makes sure that the migration has not been cancelled.
    TakingOver,
    /// An attempt is under way.
    Opening,
    /// The next attempt is due then, if there is a way.
    Waiting { until: Instant },
}

/// Whether a process listens at the destination's address.
#[derive(Clone, Copy, Debug)]
enum Listener {
    Answered,
    SilentSince { at: Instant, is_told: bool },
}

impl Cut {
    fn new(stage: Stage, now: Instant) -> Cut {
        Cut {
            since: now,
            stage,
            backoff: Backoff::new(),
            listener: Listener::Answered,
            shortage_is_told: false,
            was_interrupted: false,
        }
    }

    pub(super) fn taken_over(now: Instant) -> Cut {
        Cut::new(Stage::TakingOver, now)
    }

    /// An event has reported that there are no lanes.
    pub(super) fn is_announced(&self) -> bool {
        matches!(self.stage, Stage::Opening | Stage::Waiting { .. })
    }

    pub(super) fn deadline(&self, route: &Route) -> Option<Instant> {
        match self.stage {
            Stage::Waiting { until } if route.is_open() => Some(until),
            _ => None,
        }
    }
}

impl Source {
    fn without_lanes(&mut self) -> Option<&mut Cut> {
        match &mut self.doing {
            Doing::Cut(cut) => Some(cut),
            _ => None,
        }
    }

    /// Takes all lanes down, to open new ones.
    pub(super) fn recover(&mut self, why: &str, now: &Moment) -> Result<()> {
        self.step(Step::Broken)?;
        self.do_next(Effect::TakeDown);
        let stage = Stage::TakingDown { why: why.to_owned() };
        self.doing = Doing::Cut(Cut::new(stage, now.at));
        Ok(())
    }

    /// An earlier report of a shortage counts for this period without lanes.
    pub(super) fn shortage_is_told(&mut self) {
        if let Some(cut) = self.without_lanes() {
            cut.shortage_is_told = true;
        }
    }

    pub(super) fn cut(&mut self, input: Input, now: &Moment) -> Result<()> {
        match input {
            Input::Received(event) => self.received(event, now),
            Input::Failed(Error::Lost { .. })
            | Input::BulkEnded
            | Input::PassEnded
            | Input::Counted { .. }
            | Input::StateLeft => Ok(()),
            Input::Failed(error) => Err(error),
            Input::Monitor(answer) => self.answered(answer, now),
            Input::Digested(outcome) => self.digested(outcome, now),
            Input::TakeOver => {
                self.do_next(Effect::Commit);
                Ok(())
            }
            Input::Order(order) => self.ordered_without_lanes(order, now),
            Input::Given => {
                self.give();
                self.attempt_if_waiting(now)
            }
            Input::Interrupted => self.interrupted_without_lanes(now),
            Input::Committed => {
                self.do_next(Effect::StartRelease);
                self.announce("another process has served this session before");
                self.attempt(now)
            }
            Input::LanesDown => self.lanes_are_down(now),
            Input::Opened(opened) => self.opened(opened, now),
            Input::Time | Input::Begin | Input::EndPasses | Input::Called(_) => Ok(()),
            Input::Abandoned(_) | Input::NotDone(_) => unreachable!("taken in every state"),
        }
    }

    fn lanes_are_down(&mut self, now: &Moment) -> Result<()> {
        let Some(Cut { stage: Stage::TakingDown { why }, .. }) = self.without_lanes() else {
            return Ok(());
        };
        let why = std::mem::take(why);
        let (bytes, errors) = (self.heard.bytes, now.checksum_errors);
        let (events, in_vain) = self.route.pausing.lost(&why, bytes, errors);
        events.into_iter().for_each(|event| self.tell(event));
        self.announce(in_vain.as_deref().unwrap_or(&why));
        self.attempt(now)
    }

    /// Reports that there is no connection, and what umem does about it.
    fn announce(&mut self, why: &str) {
        self.do_next(Effect::Show("waiting"));
        let reason = why.to_owned();
        self.tell(match &self.route.target {
            Target::Way(Way::Given) if !self.route.pausing.is_paused() => {
                Event::Recovering { reason, route: LaneRoute::Given }
            }
            Target::Way(Way::Dial(uri)) if !self.route.pausing.is_paused() => {
                Event::Recovering { reason, route: LaneRoute::Dials(uri.clone()) }
            }
            _ => Event::Paused { reason, pause: Pause::Source },
        });
    }

    /// Opens lanes if there is a way. Otherwise waits for an order.
    fn attempt(&mut self, now: &Moment) -> Result<()> {
        let stage = match self.route.take() {
            Some(way) => {
                let epoch = self.next_epoch()?;
                self.do_next(Effect::Open { way, epoch });
                Stage::Opening
            }
            None => self.waiting(now),
        };
        if let Some(cut) = self.without_lanes() {
            cut.stage = stage;
        }
        Ok(())
    }

    fn waiting(&mut self, now: &Moment) -> Stage {
        let Doing::Cut(cut) = &mut self.doing else { return Stage::Waiting { until: now.at } };
        Stage::Waiting { until: now.at + cut.backoff.next(&mut self.jitter) }
    }

    fn opened(&mut self, opened: Opened, now: &Moment) -> Result<()> {
        match opened {
            Opened::Lanes(standing) => {
                self.phase_of(standing, now)?;
                // A pause that was ordered meanwhile takes effect at once.
                if !self.route.pausing.is_paused() {
                    self.go_on(standing, now);
                    return Ok(());
                }
                self.do_next(Effect::HangUp);
            }
            Opened::NotNow(error) => {
                if let Error::Peer { code: FaultCode::OutOfMemory, text, .. } = &error {
                    self.tell_shortage(text);
                }
                self.remark_on_silence(&error, now);
                // The given connections are used up. An order that arrived meanwhile has been reported, or has set
                // another way.
                let reason = error.to_string();
                match self.route.target {
                    _ if self.route.pausing.is_paused() => {}
                    Target::Nowhere => self.announce(&reason),
                    Target::Way(_) => self.tell(Event::Retrying { reason }),
                }
            }
            Opened::Never(error) => return Err(error),
        }
        let stage = self.waiting(now);
        if let Some(cut) = self.without_lanes() {
            cut.stage = stage;
        }
        Ok(())
    }

    /// Reports once in each period that the destination has no room for the guest's pages.
    fn tell_shortage(&mut self, text: &str) {
        let Some(cut) = self.without_lanes() else { return };
        if !std::mem::replace(&mut cut.shortage_is_told, true) {
            self.tell(Event::Short { reason: text.to_owned(), room: Room::Elsewhere });
        }
    }

    /// After a failed attempt: if connections are refused for a while, the destination's process has ended, and only
    /// the user can find out how.
    fn remark_on_silence(&mut self, error: &Error, now: &Moment) {
        let Some(cut) = self.without_lanes() else { return };
        if !is_nobody(error) {
            cut.listener = Listener::Answered;
            return;
        }
        let (at, is_told) = match cut.listener {
            Listener::Answered => (now.at, false),
            Listener::SilentSince { at, is_told } => (at, is_told),
        };
        let is_due = !is_told && now.at - at >= SILENCE_PATIENCE;
        cut.listener = Listener::SilentSince { at, is_told: is_told || is_due };
        let (true, Some(kept), Some(uri)) = (is_due, &self.plan.kept, self.route.uri()) else {
            return;
        };
        let unanswered = Unanswered {
            uri: uri.clone(),
            session: kept.session.clone(),
            directory_option: kept.directory_option.clone(),
            is_running: self.heard.is_running,
            heard_bytes: self.heard.bytes,
            total_bytes: self.plan.total_bytes,
        };
        self.tell(Event::Unanswered(unanswered));
    }

    /// Settles the questions that neither side could answer when the lanes broke.
    fn phase_of(&mut self, standing: Standing, now: &Moment) -> Result<()> {
        let was_committed = matches!(self.phase, Phase::Committed);
        self.step(Step::Received(&Said::Resume(standing)))?;
        self.heard.bytes = standing.totals.bytes();
        self.do_next(Effect::Persist(Record::Heard(self.heard)));
        if let (true, Phase::Serving, Some(us)) = (was_committed, &self.phase, standing.running) {
            self.running(self.ran_at(us, now));
        }
        Ok(())
    }

    /// Continues over new lanes.
    fn go_on(&mut self, standing: Standing, now: &Moment) {
        let Doing::Cut(cut) = &self.doing else { return };
        let disconnected = now.at - cut.since;
        self.disconnected += disconnected;
        self.recoveries += 1;
        self.doing = Doing::Linked(Linked::new(self.plan.step_timeout));
        self.do_next(Effect::Serve);
        self.watch_over(now);
        self.do_next(Effect::Show("sending"));
        let (place, recoveries) = (Place::Source, self.recoveries);
        self.tell(Event::Resumed { place, disconnected, recoveries });
        self.switch_over_again(standing, now);
        if matches!(self.phase, Phase::Serving) && self.plan.postcopy && self.background {
            self.send_bulk(now.at);
        }
    }

    /// Sends a switchover again that has not arrived.
    fn switch_over_again(&mut self, standing: Standing, now: &Moment) {
        // The switchover arrived earlier, even if the process that was killed there could not write that. So the guest
        // belongs to the destination, and the monitor here is not asked.
        if standing.switched || self.has_arrived {
            self.has_arrived = true;
            self.switchover = Switchover::Plain;
            if !standing.switched {
                self.do_next(Effect::Switchover);
            }
            return;
        }
        // Neither side has the guest yet, and another client may have resumed it here meanwhile.
        let unanswered = match self.switchover {
            Switchover::Owed { unanswered, .. } => unanswered + 1,
            Switchover::Plain | Switchover::Refused => 1,
        };
        let silence = Silence::Until(now.at + STANDSTILL_PATIENCE);
        self.switchover = Switchover::Owed { unanswered, silence };
        self.do_next(Effect::Ask(Question::StandsStill));
    }

    fn ordered_without_lanes(&mut self, order: Order, now: &Moment) -> Result<()> {
        match order {
            Order::Pause => {
                self.route.pausing.pause();
                self.announce("paused manually");
                return Ok(());
            }
            Order::Resume(Some(uri)) if uri.is_one_connection() => {
                self.tell(Event::Remark(Remark::NoAddress { uri }));
                return Ok(());
            }
            Order::Resume(uri) => {
                if let Some(uri) = uri {
                    self.route.target = Target::Way(Way::Dial(uri));
                }
                self.route.pausing.resume();
            }
        }
        self.attempt_if_waiting(now)
    }

    fn attempt_if_waiting(&mut self, now: &Moment) -> Result<()> {
        match &self.doing {
            Doing::Cut(Cut { stage: Stage::Waiting { .. }, .. }) if self.route.is_open() => {
                self.attempt(now)
            }
            _ => Ok(()),
        }
    }

    /// Ctrl-C without lanes: the first one reports the consequence of the second.
    fn interrupted_without_lanes(&mut self, now: &Moment) -> Result<()> {
        // An embedding program has another way to end the migration. It is not a cancellation.
        if self.plan.is_embedded {
            return Ok(());
        }
        let has_all_left =
            matches!(self.phase, Phase::Serving) && now.moved_bytes >= self.plan.total_bytes;
        let missing = if has_all_left { Missing::PerhapsNothing } else { Missing::Pages };
        let Some(cut) = self.without_lanes() else { return Ok(()) };
        if std::mem::replace(&mut cut.was_interrupted, true) {
            let how = self
                .plan
                .kept
                .as_ref()
                .map(|kept| format!("; {} continues the session", kept.command()));
            return Err(Error::Interrupted(format!(
                "the destination is not connected; {}: keep the RAM file of this guest, and do not start the guest \
                 here again{}",
                words::missing(missing),
                how.unwrap_or_default()
            )));
        }
        self.tell(Event::Remark(Remark::InterruptAgain { missing }));
        Ok(())
    }

    pub(super) fn look_after_cut(&mut self, now: &Moment) -> Result<()> {
        match &self.doing {
            Doing::Cut(Cut { stage: Stage::Waiting { until }, .. })
                if *until <= now.at && self.route.is_open() =>
            {
                self.attempt(now)
            }
            _ => Ok(()),
        }
    }
}
