//! The destination's lanes, or their absence.
//!
//! ```text
//! Up --a bulk lane is lost--> Doubtful --nothing on the demand lane in time--> Down
//!  |                             |--the source gives up--> the migration has failed
//!  +--the demand lane is lost----+------------------------------------------->  |
//!  +--the source opens new lanes, pause------------------------------------->   |
//!  ^                                                                            |
//!  +---- all lanes of one attempt are here, and nothing of the old ones is -----+
//! ```
//!
//! Any lane's loss takes all of them down: one way to break, one way to go on. The order is what makes it
//! safe. Connections are severed; bulk threads end, each when no operation of its lane is left; the
//! demand thread lets go of its lane in the same way and says so. Only then can no byte reach a page any
//! more, and what was landing becomes Missing again ([`Effect::RollBack`]). Only then does another
//! lane get to work, and the first thing said on it is which pages have come.
//!
//! The guest notices nothing but waits: the threads that serve its faults go on.

use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use umem_wire::destination::{Input as Step, Phase};
use umem_wire::{Fault, FaultCode, Frame, LaneRole};

use super::{
    Core, Effect, Effects, Failure, FreeSpace, Moment, Owner, SessionPolicy, Stage, not_resumed,
};
use crate::control::doubt::Doubt;
use crate::control::liveness::{self, Due, Liveness, stood_still_by_option};
use crate::control::pausing::Pausing;
use crate::error::{Error, Result, lane_name};
use crate::events::{Event, Lost, Pause, Place, Remark, Room, Route};
use crate::transport::lane::not_bound;
use crate::transport::uri::Uri;

/// How long a destination that has everything waits for a source that has not heard of it. The guest
/// does not need either of them any more.
pub(super) const GOODBYE_PATIENCE: Duration = Duration::from_secs(30);

/// How long after a shortage of memory room is looked for; each further one without a page that has come is
/// twice as long, up to this.
const ROOM_PAUSE_MIN: Duration = Duration::from_secs(1);
const ROOM_PAUSE_MAX: Duration = Duration::from_secs(16);

/// Room that is worth another attempt: a huge page, or what is missing.
const ROOM_BYTES_MIN: u64 = 2 << 20;

/// After so long without one a shortage is news again.
const SHORTAGE_SILENCE: Duration = Duration::from_secs(10);

type Handled = std::result::Result<(), Failure>;

/// The lanes of the session, and how others may come.
#[derive(Debug)]
pub(super) struct Link {
    recovers: bool,
    pub(super) state: State,
    /// Where lanes come in that replace lost ones; none where there were connections alone.
    entrance: Option<Entrance>,
    /// While it is paused no lanes are taken, whatever the entrance.
    pausing: Pausing,
    /// How often something has been said by hand: an address that was looked up for an earlier order is of
    /// no use.
    orders: u64,
    pub(super) liveness: Liveness,
    shortage: Option<Shortage>,
    /// When somebody was told last that pages cannot be made visible for want of memory.
    short_of_tables: Option<Instant>,
    pub(super) recoveries: u32,
    pub(super) disconnected: Duration,
}

/// Where lanes come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entrance {
    /// The source dials.
    Listener,
    /// Connections that were given, one for each lane.
    Given,
}

#[derive(Debug)]
pub(super) enum State {
    Up,
    /// A bulk lane is lost. A source that gives up says why on the demand lane, which is not ordered
    /// against it.
    AwaitingCause(Doubt),
    Down {
        since: Instant,
        old: Old,
        /// Every page is here: the source is waited for until then.
        until: Option<Instant>,
        /// Somebody has interrupted since, and knows what another interrupt means.
        was_interrupted: bool,
    },
}

/// What there still is of lanes that are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Old {
    /// Operations may be in flight.
    Ending,
    /// The same, and other lanes have come in.
    Replaced,
    Gone,
}

/// There was no room for what had come: no lanes are taken until there may be.
#[derive(Debug)]
struct Shortage {
    /// For whoever comes meanwhile; none once lanes are taken again.
    refusal: Option<String>,
    /// When to look for room next, and how long after that.
    until: Instant,
    pause: Duration,
    /// Pages that had come by then.
    pages_done: u64,
}

impl Link {
    /// Of a session that has just begun.
    pub(super) fn up(terms: &SessionPolicy, entrance: Option<Entrance>) -> Link {
        Link::new(terms, State::Up, entrance)
    }

    /// Of a session whose process is gone: there are no lanes, and nothing of those before is left.
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

    /// Connections that were given are of no use any more.
    fn forget_given(&mut self, effects: &mut Effects) {
        if self.entrance == Some(Entrance::Given) {
            self.entrance = None;
            effects.push(Effect::ForgetGiven);
        }
    }

    /// By hand: lanes are taken whether there is room or not.
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
            _ if !phase.outlives_its_lanes() => refused("its lanes are not to be replaced"),
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

/// Of a source that the guest still belongs to.
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

    /// A loss that other lanes make up for. None where everything is here and no lane can come.
    ///
    /// # Errors
    /// The migration does not go on without its lanes.
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

    /// The source gives up. Where that is for its files, it may come back once they have been put right.
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

    /// Looks after what has become due.
    pub(super) fn tick(&mut self, now: &Moment, effects: &mut Effects) -> Handled {
        self.look_after_step(now)?;
        self.look_for_room(now, effects);
        match self.link.liveness.due(now.at) {
            Due::Nothing => {}
            Due::Ask(number) => effects.push(Effect::Ping(number)),
            Due::Lost => {
                let patience = self.link.liveness.patience().as_secs_f64();
                return Err(silent(format!("it has not answered for {patience} s")).into());
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

    /// Ends a migration whose source does not take its next step, while the guest is still its own.
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
            let reason = "of the connections that were given one has closed or led elsewhere";
            let reason = reason.into();
            effects.push(Effect::Report(Event::Paused { reason, pause: Pause::GivenInVain }));
        }
    }

    /// The source has opened lanes again: it has lost the old ones, whatever they look like from here.
    pub(super) fn came(&mut self, now: &Moment, effects: &mut Effects) -> Handled {
        if !self.phase.outlives_its_lanes() {
            // It was told so at the entrance.
            effects.push(Effect::DropLanes);
            return Ok(());
        }
        if !self.link.is_down() {
            self.break_lanes("the source has opened new connections", now, effects)?;
            if self.link.pausing.is_paused() {
                // That was one loss too many to wrong checksums: who looks after it resumes it.
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

    /// Gives up all lanes. The demand thread says when it has let go of its own.
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

    /// Says that there are no lanes, and what becomes of the guest.
    pub(super) fn announce(&self, reason: String, now: &Moment, effects: &mut Effects) {
        let pages_missing = now.memory.pages_missing;
        let has_way = self.link.entrance.is_some() && !self.link.pausing.is_paused();
        effects.push(Effect::Report(match has_way {
            true => Event::Recovering { reason, route: Route::Waits { pages_missing } },
            false => Event::Paused { reason, pause: Pause::Destination { pages_missing } },
        }));
    }

    /// The demand thread has let go of its lane, and the bulk threads have ended: nothing lands any
    /// more. What they have said of their lanes is on its way, and must not be taken for news of the
    /// next ones.
    pub(super) fn quiet(&mut self, now: &Moment, effects: &mut Effects) -> Handled {
        // The lane that had no room for a page was its own.
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

    /// Goes on over the lanes that have come in: nothing is left of the old ones.
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

    /// There is no room for what has come, on one lane or on several of them. It comes again when there is.
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
        // The source hears why before it loses its lanes.
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

    /// Has room looked for when that is due.
    fn look_for_room(&mut self, now: &Moment, effects: &mut Effects) {
        if let Some(shortage) = &mut self.link.shortage
            && shortage.refusal.is_some()
            && shortage.until <= now.at
        {
            shortage.until = now.at + shortage.pause;
            effects.push(Effect::MeasureRoom);
        }
    }

    /// Lets the source in again when there may be room: where the file systems cannot say so, after a while.
    pub(super) fn measured(&mut self, free: Option<&FreeSpace>, now: &Moment) {
        // Less would be gone at once.
        let wanted = ROOM_BYTES_MIN.min(now.memory.bytes_missing);
        if free.is_none_or(|free| free.bytes >= wanted) {
            self.link.try_room();
        }
    }

    /// By hand: no lanes until a resume.
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
            let reason = "by hand".into();
            effects.push(Effect::Report(Event::Paused { reason, pause: Pause::Ordered }));
            return Ok(());
        }
        self.break_lanes("paused by hand", now, effects)
    }

    /// By hand: the source may come back, to another address if one is named. Its name is looked up
    /// meanwhile by somebody else: there are pages to be served.
    pub(super) fn resume(&mut self, uri: Option<Uri>, effects: &mut Effects) {
        self.link.orders += 1;
        self.link.try_room();
        match uri {
            None => self.link.pausing.resume(),
            Some(uri) if uri.is_one_connection() => {
                not_resumed(&Error::Usage(format!("{uri} is no address to listen at")), effects);
            }
            Some(uri) => effects.push(Effect::LookUp { order: self.link.orders, uri }),
        }
    }

    /// The name of a resume by hand has been looked up. What listened before still does if it is none, and a
    /// pause goes on.
    pub(super) fn found(
        &mut self,
        order: u64,
        uri: Uri,
        found: io::Result<Vec<SocketAddr>>,
        effects: &mut Effects,
    ) {
        // Otherwise something else has been said by hand since then.
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

    /// By hand: the source comes here, or over these connections, of which lanes are made that replace the
    /// others, lost or not.
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

    /// Ctrl-C while there are no lanes: the first says what the second means.
    pub(super) fn interrupted_without_lanes(&mut self, effects: &mut Effects) -> Handled {
        let lost = match self.owner() {
            // Nothing is lost by leaving.
            _ if matches!(self.stage, Stage::Parting) => return self.lose(effects),
            // A program that embeds this has another way to end it, which no cancel is.
            _ if self.terms.is_embedded => return Ok(()),
            Owner::Source | Owner::Undecided => Lost::Owner,
            Owner::Ours => Lost::Pages,
        };
        let State::Down { was_interrupted, .. } = &mut self.link.state else { return Ok(()) };
        if std::mem::replace(was_interrupted, true) {
            let what = lost.in_words();
            let text = format!("there was no connection, and {what}");
            return Err(Error::Interrupted(text).into());
        }
        effects.push(Effect::Report(Event::Remark(Remark::InterruptAgainHere { lost })));
        Ok(())
    }
}

impl Lost {
    pub(crate) fn in_words(self) -> &'static str {
        match self {
            Lost::Owner => "the source may have given its guest up, and only it knows",
            Lost::Pages => "the guest here waits for pages that only the source has",
        }
    }
}

/// Says what lacks, how much of it, and what to do.
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
    let reason = format!("{what}; up to {} MiB are still to come{room}", missing >> 20);
    let room = Room::Here { missing, free: free.map(|free| free.bytes) };
    effects.push(Effect::Report(Event::Short { reason: reason.clone(), room }));
    reason
}
