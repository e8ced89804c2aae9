//! The destination's lanes, and the time without lanes.
//!
//! ```text
//! Up --a bulk lane is lost--> Doubtful --nothing on the demand lane in time--> Down
//!  |                             |--the source gives up--> the migration has failed
//!  +--the demand lane is lost----+------------------------------------------->  |
//!  +--the source opens new lanes, pause------------------------------------->   |
//!  ^                                                                            |
//!  +---- all lanes of one attempt are accepted, and the old ones are released --+
//! ```
//!
//! The loss of any lane takes all of them down, so there is one way to break and one way to continue. Its order makes
//! it safe. First the connections are closed. Each bulk thread ends when no operation of its lane is left. The demand
//! thread releases its lane in the same way, and reports that. Only then can no byte reach a page any more, and landing
//! pages become Missing again ([`Effect::RollBack`]). Only then does a new lane start, and its first message is the set
//! of pages that have arrived.
//!
//! The guest only waits: the threads that serve its faults continue.

use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use umem_wire::destination::{Input as Step, Phase};
use umem_wire::{Fault, FaultCode, Frame, LaneRole};

use super::{
    Core, Effect, Effects, Entrance, Failure, FreeSpace, Moment, Owner, SessionPolicy, Stage,
    not_resumed,
};
use crate::control::doubt::Doubt;
use crate::control::liveness::{self, Due, Liveness, stood_still_by_option};
use crate::control::pausing::Pausing;
use crate::error::{Error, Result, lane_name};
use crate::events::{Event, Lost, Pause, Place, Remark, Room, Route};
use crate::transport::lane::not_bound;
use crate::transport::uri::Uri;

/// How long a complete destination waits for a source that has not received the completion. The guest needs neither
/// side any more.
pub(super) const GOODBYE_PATIENCE: Duration = Duration::from_secs(30);

/// After a lack of room, the time until the room is measured. Each further lack without a page in between doubles it,
/// up to the maximum.
const ROOM_PAUSE_MIN: Duration = Duration::from_secs(1);
const ROOM_PAUSE_MAX: Duration = Duration::from_secs(16);

/// The room that makes another attempt worthwhile: a huge page, or the missing bytes.
const ROOM_BYTES_MIN: u64 = 2 << 20;

/// A shortage is reported again after this time without one.
const SHORTAGE_SILENCE: Duration = Duration::from_secs(10);

type Handled = std::result::Result<(), Failure>;

/// The lanes of the session, and the entrance for new ones.
#[derive(Debug)]
pub(super) struct Link {
    recovers: bool,
    pub(super) state: State,
    /// The entrance for lanes that replace lost ones; None if the session has only the first connections.
    entrance: Option<Entrance>,
    /// While this is paused, no lanes are accepted at any entrance.
    pausing: Pausing,
    /// The number of orders so far. An address that was looked up for an earlier order is dropped.
    orders: u64,
    pub(super) liveness: Liveness,
    shortage: Option<Shortage>,
    /// When the last event reported that pages cannot be made visible for lack of memory.
    short_of_tables: Option<Instant>,
    pub(super) recoveries: u32,
    pub(super) disconnected: Duration,
}

#[derive(Debug)]
pub(super) enum State {
    Up,
    /// A bulk lane is lost. A source that gives up sends its reason on the demand lane, in no order relative to the
    /// bulk lane.
    AwaitingCause(Doubt),
    Down {
        since: Instant,
        old: Old,
        /// Every page is here: wait for the source until this time.
        until: Option<Instant>,
        /// The user has interrupted since then, and knows the consequence of another interrupt.
        was_interrupted: bool,
    },
}

/// What remains of lost lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Old {
    /// Operations may be in flight.
    Ending,
    /// The same, and new lanes have been accepted.
    Replaced,
    Gone,
}

/// Room was exhausted: no lanes are accepted until there may be room again.
#[derive(Debug)]
struct Shortage {
    /// The refusal for sources that arrive meanwhile; None once lanes are accepted again.
    refusal: Option<String>,
    /// When to measure room next, and the interval after that.
    until: Instant,
    pause: Duration,
    /// Pages that had arrived at that time.
    pages_done: u64,
}

impl Link {
    /// For a session that has just begun.
    pub(super) fn up(terms: &SessionPolicy, entrance: Option<Entrance>) -> Link {
        Link::new(terms, State::Up, entrance)
    }

    /// For a session whose process is gone: no lanes are up, and nothing of earlier lanes is left.
    pub(super) fn down(terms: &SessionPolicy, since: Instant) -> Link {
        let state = State::Down { since, old: Old::Gone, until: None, was_interrupted: false };
        Link::new(terms, state, Some(Entrance::Listener))
    }

    fn new(terms: &SessionPolicy, state: State, entrance: Option<Entrance>) -> Link {
        Link {
            recovers: terms.recovers,
            state,
            entrance,
            pausing: Pausing::default(),
            orders: 0,
            liveness: Liveness::off(terms.step_timeout),
            shortage: None,
            short_of_tables: None,
            recoveries: 0,
            disconnected: Duration::ZERO,
        }
    }

    pub(super) fn is_down(&self) -> bool {
        matches!(self.state, State::Down { .. })
    }

    /// Closes the given connections: they are of no further use.
    fn forget_given(&mut self, effects: &mut Effects) {
        if self.entrance == Some(Entrance::Given) {
            self.entrance = None;
            effects.push(Effect::ForgetGiven);
        }
    }

    /// On an order: accept lanes with or without room.
    fn try_room(&mut self) {
        self.shortage.iter_mut().for_each(|shortage| shortage.refusal = None);
    }

    pub(super) fn refusal(&self, phase: &Phase) -> Option<(FaultCode, Cow<'static, str>)> {
        let refused = |why: &'static str| Some((FaultCode::Refused, why.into()));
        let shortage = self.shortage.as_ref().and_then(|shortage| shortage.refusal.clone());
        match shortage {
            _ if self.pausing.is_paused() => {
                refused("the migration is paused here; resume it first")
            }
            _ if !phase.outlives_its_lanes() => {
                refused("this destination does not replace lost lanes now")
            }
            Some(why) => Some((FaultCode::OutOfMemory, why.into())),
            None => None,
        }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let own = match &self.state {
            State::Up => None,
            State::AwaitingCause(doubt) => Some(doubt.until),
            State::Down { until, .. } => *until,
        };
        let shortage = self.shortage.as_ref().filter(|shortage| shortage.refusal.is_some());
        let room = shortage.map(|shortage| shortage.until);
        own.into_iter().chain(room).chain(self.liveness.deadline()).min()
    }
}

/// The error for a silent source, while the guest still belongs to the source.
fn silent(what: String) -> Error {
    Error::Lost { side: "source", lane: lane_name(LaneRole::Demand, 0), what }
}

impl Core {
    pub(super) fn lane_lost(
        &mut self,
        lane: LaneRole,
        error: Error,
        now: &Moment,
        effects: &mut Effects,
    ) -> Handled {
        let Some(error) = self.outlives(error, effects)? else { return Ok(()) };
        match (&self.link.state, lane) {
            (State::Up, LaneRole::Bulk) => {
                self.link.state = State::AwaitingCause(Doubt::new(error, now.at));
                Ok(())
            }
            (State::Up | State::AwaitingCause(_), LaneRole::Demand) => {
                self.break_lanes(&error.to_string(), now, effects)
            }
            _ => Ok(()),
        }
    }

    /// Checks that the migration outlives a loss. Returns None if everything is here and no lane can come.
    ///
    /// # Errors
    /// The migration cannot continue without its lanes.
    fn outlives(
        &mut self,
        error: Error,
        effects: &mut Effects,
    ) -> std::result::Result<Option<Error>, Failure> {
        match self.phase {
            Phase::Completing if !self.link.recovers => self.lose(effects).map(|()| None),
            _ if self.link.recovers && self.phase.outlives_its_lanes() => Ok(Some(error)),
            _ => Err(error.into()),
        }
    }

    /// The source gives up. If the reason is its files, it may return after the user has restored them.
    pub(super) fn source_gives_up(
        &mut self,
        fault: Fault,
        now: &Moment,
        effects: &mut Effects,
    ) -> Handled {
        let may_come_back = fault.code == FaultCode::SourceMemory
            && self.link.recovers
            && self.phase.outlives_its_lanes()
            && self.phase != Phase::Completing;
        if !may_come_back {
            let Fault { code, text } = fault;
            return Err(Error::Peer { side: "source", code, text }.into());
        }
        if self.link.is_down() {
            return Ok(());
        }
        self.break_lanes(&format!("the source gave up: {}", fault.text), now, effects)
    }

    /// Handles the work that is due.
    pub(super) fn tick(&mut self, now: &Moment, effects: &mut Effects) -> Handled {
        self.look_after_step(now)?;
        self.look_for_room(now, effects);
        match self.link.liveness.due(now.at) {
            Due::Nothing => {}
            Due::Ask(number) => effects.push(Effect::Ping(number)),
            Due::Lost => {
                let patience = self.link.liveness.patience().as_secs_f64();
                return Err(silent(format!("no answer for {patience} s")).into());
            }
        }
        match &mut self.link.state {
            State::AwaitingCause(doubt) if doubt.until <= now.at => {
                let why = doubt.error.to_string();
                self.break_lanes(&why, now, effects)
            }
            State::Down { until, .. } if self.phase == Phase::Completing => {
                let until = *until.get_or_insert(now.at + GOODBYE_PATIENCE);
                if until <= now.at { self.lose(effects) } else { Ok(()) }
            }
            _ => Ok(()),
        }
    }

    /// Ends a migration whose source does not take its next step, while the guest still belongs to the source.
    fn look_after_step(&mut self, now: &Moment) -> Result<()> {
        let step = match self.phase {
            Phase::Ready
            | Phase::Rounds
            | Phase::Settling
            | Phase::Settled
            | Phase::Receiving { .. }
            | Phase::Loading { .. } => Some((self.phase.name(), Duration::MAX)),
            _ => None,
        };
        if step.is_none() {
            // From *loaded* on the source may give its guest up, and silence decides nothing.
            self.link.liveness.begin(false, now.at);
        }
        match self.steps.look(step, now.moved_bytes, now.at) {
            liveness::Step::Waits => Ok(()),
            liveness::Step::Moves => {
                self.link.liveness.moved(now.at);
                Ok(())
            }
            liveness::Step::Over(limit) => {
                Err(silent(stood_still_by_option(limit, self.phase.name())))
            }
        }
    }

    pub(super) fn given_in_vain(&mut self, effects: &mut Effects) {
        self.link.forget_given(effects);
        if let State::Down { old: Old::Ending | Old::Gone, .. } = self.link.state {
            let reason = "one of the given connections was closed, or led to another process";
            let reason = reason.into();
            effects.push(Effect::Report(Event::Paused { reason, pause: Pause::GivenInVain }));
        }
    }

    /// The source has opened new lanes. So it has lost the old ones, even if they look intact from here.
    pub(super) fn came(&mut self, now: &Moment, effects: &mut Effects) -> Handled {
        if !self.phase.outlives_its_lanes() {
            // The entrance has sent the source the refusal.
            effects.push(Effect::DropLanes);
            return Ok(());
        }
        if !self.link.is_down() {
            self.break_lanes("the source has opened new connections", now, effects)?;
            if self.link.pausing.is_paused() {
                // That loss was one too many to wrong checksums: this side pauses until an order resumes it.
                effects.push(Effect::DropLanes);
                self.link.forget_given(effects);
                return Ok(());
            }
        }
        if let State::Down { old: old @ (Old::Ending | Old::Replaced), .. } = &mut self.link.state {
            *old = Old::Replaced;
        } else {
            self.reconnect(now, effects);
        }
        self.link.forget_given(effects);
        Ok(())
    }

    /// Closes all lanes. The demand thread reports when it has released its lane.
    fn break_lanes(&mut self, why: &str, now: &Moment, effects: &mut Effects) -> Handled {
        self.step(Step::Broken, effects)?;
        effects.push(Effect::Sever);
        self.link.state =
            State::Down { since: now.at, old: Old::Ending, until: None, was_interrupted: false };
        let (done, errors) = (now.memory.pages_done, now.checksum_errors);
        let (events, in_vain) = self.link.pausing.lost(why, done, errors);
        effects.extend(events.into_iter().map(Effect::Report));
        let short = self.link.shortage.as_ref().and_then(|shortage| shortage.refusal.clone());
        let why = in_vain.or(short).unwrap_or_else(|| why.to_owned());
        self.announce(why, now, effects);
        Ok(())
    }

    /// Reports that there are no lanes, and the consequence for the guest.
    pub(super) fn announce(&self, reason: String, now: &Moment, effects: &mut Effects) {
        let pages_missing = now.memory.pages_missing;
        let has_way = self.link.entrance.is_some() && !self.link.pausing.is_paused();
        effects.push(Effect::Report(match has_way {
            true => Event::Recovering { reason, route: Route::Waits { pages_missing } },
            false => Event::Paused { reason, pause: Pause::Destination { pages_missing } },
        }));
    }

    /// The demand thread has released its lane, and the bulk threads have ended: nothing lands any more. Their last
    /// messages are still in the inbox, and must not be mistaken for messages about the next lanes.
    pub(super) fn quiet(&mut self, now: &Moment, effects: &mut Effects) -> Handled {
        // The lane without room for a page was the demand thread's own.
        if let State::AwaitingCause(doubt) = &self.link.state {
            let why = doubt.error.to_string();
            self.break_lanes(&why, now, effects)?;
        }
        if self.link.is_down() {
            effects.push(Effect::Settle);
        }
        Ok(())
    }

    pub(super) fn settled(&mut self, now: &Moment, effects: &mut Effects) {
        let State::Down { old, .. } = &mut self.link.state else { return };
        let before = std::mem::replace(old, Old::Gone);
        effects.push(Effect::RollBack);
        if before == Old::Replaced {
            self.reconnect(now, effects);
        }
    }

    /// Continues over the accepted lanes: nothing of the old ones is left.
    fn reconnect(&mut self, now: &Moment, effects: &mut Effects) {
        let State::Down { since, .. } = self.link.state else { return };
        let disconnected = now.at.saturating_duration_since(since);
        self.link.state = State::Up;
        self.link.recoveries += 1;
        self.link.disconnected += disconnected;
        let recoveries = self.link.recoveries;
        let is_complete = self.phase == Phase::Completing;
        effects.extend([
            Effect::Reconnect { standing: self.standing(now), is_complete },
            Effect::Report(Event::Resumed { place: Place::Destination, disconnected, recoveries }),
        ]);
    }

    /// Room is exhausted for incoming pages, on one lane or several. The pages come again when there is room.
    pub(super) fn no_room(
        &mut self,
        error: Error,
        free: Option<FreeSpace>,
        now: &Moment,
        effects: &mut Effects,
    ) -> Handled {
        let Some(error) = self.outlives(error, effects)? else { return Ok(()) };
        if !matches!(self.link.state, State::Up) {
            return Ok(());
        }
        let pages_done = now.memory.pages_done;
        let last = self.link.shortage.take().filter(|last| last.pages_done == pages_done);
        let pause = last.map_or(ROOM_PAUSE_MIN, |last| (2 * last.pause).min(ROOM_PAUSE_MAX));
        let why = say_shortage(&error.to_string(), free.as_ref(), now, effects);
        let (refusal, until) = (Some(why.clone()), now.at + pause);
        self.link.shortage = Some(Shortage { refusal, until, pause, pages_done });
        // The source receives the reason before it loses its lanes.
        let error = Error::OutOfMemory(why);
        effects.push(Effect::Send(Frame::Error(error.to_fault())));
        self.link.state = State::AwaitingCause(Doubt::new(error, now.at));
        Ok(())
    }

    pub(super) fn short_of_tables(
        &mut self,
        why: &str,
        free: Option<&FreeSpace>,
        now: &Moment,
        effects: &mut Effects,
    ) {
        let is_told = self.link.short_of_tables.replace(now.at);
        if is_told.is_none_or(|at| now.at.saturating_duration_since(at) > SHORTAGE_SILENCE) {
            say_shortage(why, free, now, effects);
        }
    }

    /// Starts a measurement of room when it is due.
    fn look_for_room(&mut self, now: &Moment, effects: &mut Effects) {
        if let Some(shortage) = &mut self.link.shortage
            && shortage.refusal.is_some()
            && shortage.until <= now.at
        {
            shortage.until = now.at + shortage.pause;
            effects.push(Effect::MeasureRoom);
        }
    }

    /// Lets the source in again when there may be room. If the file systems cannot report room, that is after a while.
    pub(super) fn measured(&mut self, free: Option<&FreeSpace>, now: &Moment) {
        // Less room would be used up at once.
        let wanted = ROOM_BYTES_MIN.min(now.memory.bytes_missing);
        if free.is_none_or(|free| free.bytes >= wanted) {
            self.link.try_room();
        }
    }

    /// On an order: no lanes until a resume.
    pub(super) fn pause(&mut self, now: &Moment, effects: &mut Effects) -> Handled {
        if !self.link.recovers || !self.phase.outlives_its_lanes() {
            let place = Place::Destination;
            effects.push(Effect::Report(Event::Remark(Remark::NotPaused { place })));
            return Ok(());
        }
        self.link.orders += 1;
        self.link.pausing.pause();
        if let State::Down { old: old @ Old::Replaced, .. } = &mut self.link.state {
            *old = Old::Ending;
            effects.push(Effect::DropLanes);
        }
        self.link.forget_given(effects);
        if self.link.is_down() {
            let reason = "paused manually".into();
            effects.push(Effect::Report(Event::Paused { reason, pause: Pause::Ordered }));
            return Ok(());
        }
        self.break_lanes("paused manually", now, effects)
    }

    /// On an order: accept the source again, at another address if one is given. Another thread looks the name up,
    /// because this one has pages to serve.
    pub(super) fn resume(&mut self, uri: Option<Uri>, effects: &mut Effects) {
        self.link.orders += 1;
        self.link.try_room();
        match uri {
            None => self.link.pausing.resume(),
            Some(uri) if uri.is_one_connection() => {
                not_resumed(&Error::Usage(format!("umem cannot listen at {uri}")), effects);
            }
            Some(uri) => effects.push(Effect::LookUp { order: self.link.orders, uri }),
        }
    }

    /// The lookup for a resume order has ended. If it failed, the old listener stays, and a pause continues.
    pub(super) fn found(
        &mut self,
        order: u64,
        uri: Uri,
        found: io::Result<Vec<SocketAddr>>,
        effects: &mut Effects,
    ) {
        // Otherwise a later order has replaced this one.
        if order == self.link.orders {
            match found {
                Ok(found) => effects.push(Effect::Bind { uri, found }),
                Err(error) => not_resumed(&not_bound(&uri, error), effects),
            }
        }
    }

    pub(super) fn bound(&mut self, uri: String, effects: &mut Effects) {
        self.open(Entrance::Listener, effects);
        effects.extend([
            Effect::WriteAddress(uri.clone()),
            Effect::Report(Event::ListeningAgain { uri }),
        ]);
    }

    /// On an order: the source arrives at this entrance. Given connections become lanes that replace the present ones,
    /// lost or not.
    pub(super) fn offered(
        &mut self,
        entrance: Entrance,
        now: &Moment,
        effects: &mut Effects,
    ) -> Handled {
        if entrance == Entrance::Given && (!self.link.recovers || !self.phase.outlives_its_lanes())
        {
            effects.push(Effect::Decline);
            return Ok(());
        }
        self.open(entrance, effects);
        if entrance == Entrance::Listener || self.link.is_down() {
            return Ok(());
        }
        self.break_lanes("other connections were given", now, effects)
    }

    fn open(&mut self, entrance: Entrance, effects: &mut Effects) {
        self.link.orders += 1;
        self.link.try_room();
        self.link.entrance = Some(entrance);
        self.link.pausing.resume();
        effects.push(Effect::Open);
    }

    /// Ctrl-C without lanes: the first one reports the consequence of the second.
    pub(super) fn interrupted_without_lanes(&mut self, effects: &mut Effects) -> Handled {
        let lost = match self.owner() {
            // Leaving loses nothing.
            _ if matches!(self.stage, Stage::Parting) => return self.lose(effects),
            // An embedding program has another way to end the migration. It is not a cancellation.
            _ if self.terms.is_embedded => return Ok(()),
            Owner::Source | Owner::Undecided => Lost::Owner,
            Owner::Ours => Lost::Pages,
        };
        let State::Down { was_interrupted, .. } = &mut self.link.state else { return Ok(()) };
        if std::mem::replace(was_interrupted, true) {
            let what = lost.in_words();
            let text = format!("the source is not connected, and {what}");
            return Err(Error::Interrupted(text).into());
        }
        effects.push(Effect::Report(Event::Remark(Remark::InterruptAgainHere { lost })));
        Ok(())
    }
}

impl Lost {
    pub(crate) fn in_words(self) -> &'static str {
        match self {
            Lost::Owner => "only the source knows whether it has given the guest up",
            Lost::Pages => "the guest here waits for pages that only the source has",
        }
    }
}

/// Reports the resource that is short, its amount, and the remedy.
fn say_shortage(
    what: &str,
    free: Option<&FreeSpace>,
    now: &Moment,
    effects: &mut Effects,
) -> String {
    let missing = now.memory.bytes_missing;
    let room = free.map_or_else(String::new, |FreeSpace { ram, bytes }| {
        format!(", and the file system of RAM {ram} has room for {} MiB", bytes >> 20)
    });
    let reason = format!("{what}; up to {} MiB have not arrived{room}", missing >> 20);
    let room = Room::Here { missing, free: free.map(|free| free.bytes) };
    effects.push(Effect::Report(Event::Short { reason: reason.clone(), room }));
    reason
}
