//! What the destination does when lanes are lost, in a session that recovers.
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
//! more, and what was landing becomes Missing again ([`GuestMemory::roll_back`]). Only then does another
//! lane get to work, and the first thing said on it is which pages have come.
//!
//! The guest notices nothing but waits: the threads that serve its faults go on.
//!
//! [`GuestMemory::roll_back`]: super::guest::GuestMemory::roll_back

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::{Duration, Instant};

use umem_wire::destination::{Input, Phase};
use umem_wire::{Fault, FaultCode, Frame, LaneRole, Standing, transmit};

use super::accept::{Door, Lanes};
use super::demand::{Command, Resume};
use super::link::{Link, Shortage, State};
use super::{Migration, Note, peer};
use crate::control::event::{Event, Pause, Place, Remark, Room, Route};
use crate::control::liveness::{Due, Step, stood_still_by_option};
use crate::error::{Error, Result};
use crate::lane::{self, CAUSE_PATIENCE, Listener, lane_name};
use crate::observe::watch::CUT;
use crate::secure::WayIn;
use crate::uri::Uri;

/// How long a destination that has everything waits for a source that has not heard of it. The guest
/// does not need either of them any more.
const GOODBYE_PATIENCE: Duration = Duration::from_secs(30);

/// How long after a shortage of memory room is looked for; each further one without a page that has come is
/// twice as long, up to this.
const ROOM_PAUSE_MIN: Duration = Duration::from_secs(1);
const ROOM_PAUSE_MAX: Duration = Duration::from_secs(16);

/// Room that is worth another attempt: a huge page, or what is missing.
const ROOM_BYTES_MIN: u64 = 2 << 20;

/// After so long without one a shortage is news again.
const SHORTAGE_SILENCE: Duration = Duration::from_secs(10);
/// Of a source that the guest still belongs to.
fn silent(what: String) -> Error {
    Error::Lost { side: "source", lane: lane_name(LaneRole::Demand, 0), what }
}

impl Migration<'_> {
    /// A lane is lost.
    pub(super) fn lane_lost(&mut self, error: Error) -> Result<()> {
        if !self.link.recovers {
            return match self.phase {
                Phase::Completing => self.step(Input::Lost),
                _ => Err(error),
            };
        }
        if !self.phase.outlives_its_lanes() {
            return Err(error);
        }
        if let Error::OutOfMemory(_) = &error {
            return self.has_no_room(error);
        }
        let Error::Lost { lane, .. } = &error else { return Err(error) };
        let is_demand = *lane == lane_name(LaneRole::Demand, 0);
        match &self.link.state {
            State::Up if !is_demand => {
                let until = Instant::now() + CAUSE_PATIENCE;
                self.link.state = State::Doubtful { error, until };
                Ok(())
            }
            State::Up | State::Doubtful { .. } if is_demand => self.break_lanes(&error.to_string()),
            _ => Ok(()),
        }
    }

    /// The source gives up. Where that is for its files, it may come back once they have been put right.
    pub(super) fn source_gives_up(&mut self, fault: Fault) -> Result<()> {
        let may_come_back = fault.code == FaultCode::SourceMemory
            && self.link.recovers
            && self.phase.outlives_its_lanes()
            && self.phase != Phase::Completing;
        if !may_come_back {
            return Err(peer(fault));
        }
        if self.link.is_down() {
            return Ok(());
        }
        self.break_lanes(&format!("the source gave up: {}", fault.text))
    }

    /// Looks after new lanes and after what has become due.
    pub(super) fn look_after_link(&mut self) -> Result<()> {
        let now = Instant::now();
        self.look_for_room(now);
        if let Some(door) = &mut self.link.door {
            let refused = |why: &'static str| Some((FaultCode::Refused, why.into()));
            let shortage = self.link.shortage.as_ref().and_then(|s| s.refusal.clone());
            door.set_refusal(match shortage {
                _ if self.link.is_paused => {
                    refused("the migration is paused here; resume it first")
                }
                _ if !self.phase.outlives_its_lanes() => {
                    refused("its lanes are not to be replaced")
                }
                Some(why) => Some((FaultCode::OutOfMemory, why.into())),
                None => None,
            });
            door.forget_late(now);
            if let Some(lanes) = door.whole() {
                self.new_lanes(lanes)?;
                self.link.forget_given();
            } else if door.is_of_connections() && !door.has_all() {
                self.given_in_vain();
            }
        }
        match self.link.liveness.due(now) {
            Due::Nothing => {}
            Due::Ask(number) => {
                let _ = self.commands.send(Command::Ping(number));
                self.demand.wake();
            }
            Due::Lost => {
                let patience = self.link.liveness.patience().as_secs_f64();
                return Err(silent(format!("it has not answered for {patience} s")));
            }
        }
        match &mut self.link.state {
            State::Doubtful { error, until } if *until <= now => {
                let why = error.to_string();
                self.break_lanes(&why)
            }
            State::Down { until, .. } if self.phase == Phase::Completing => {
                let until = *until.get_or_insert(now + GOODBYE_PATIENCE);
                if until <= now { self.step(Input::Lost) } else { Ok(()) }
            }
            _ => Ok(()),
        }
    }

    /// Ends a migration whose source does not take its next step, while the guest is still its own.
    pub(super) fn look_after_step(&mut self) -> Result<()> {
        let step = match self.phase {
            Phase::Ready | Phase::Receiving { .. } | Phase::Loading { .. } => {
                Some((self.phase.name(), Duration::MAX))
            }
            _ => None,
        };
        let now = Instant::now();
        if step.is_none() {
            // From *loaded* on the source may give its guest up, and silence decides nothing.
            self.link.liveness.begin(false, now);
        }
        let counters = &self.guest.counters;
        let moved = counters.done_bytes() + counters.state_bytes.load(Relaxed);
        match self.steps.look(step, moved, now) {
            Step::Waits => Ok(()),
            Step::Moves => {
                self.link.liveness.moved(now);
                Ok(())
            }
            Step::Over(limit) => Err(silent(stood_still_by_option(limit, self.phase.name()))),
        }
    }

    /// Of the connections that were given one has gone, or was the other end of something else.
    fn given_in_vain(&mut self) {
        self.link.forget_given();
        if self.link.is_down() && self.link.arrived.is_none() {
            let reason =
                "of the connections that were given one has closed or led elsewhere".into();
            self.output.tell(&Event::Paused { reason, pause: Pause::GivenInVain });
        }
    }

    /// The source has opened lanes again: it has lost the old ones, whatever they look like from here.
    fn new_lanes(&mut self, lanes: Lanes) -> Result<()> {
        if !self.link.is_down() {
            self.break_lanes("the source has opened new connections")?;
            if self.link.is_paused {
                // That was one loss too many to wrong checksums: who looks after it resumes it.
                return Ok(());
            }
        }
        self.link.arrived = Some(lanes);
        self.go_on()
    }

    /// Gives up all lanes. The demand thread says when it has let go of its own.
    fn break_lanes(&mut self, why: &str) -> Result<()> {
        self.step(Input::Broken)?;
        self.guest.set_lanes_down(true);
        self.link.sockets.sever();
        self.bulk_wakers.clear();
        for thread in self.bulk_threads.drain(..) {
            // What it has failed of comes as a note.
            let _ = thread.join();
        }
        self.link.was_interrupted = false;
        self.link.state = State::Down { since: Instant::now(), is_quiet: false, until: None };
        self.progress.phase("waiting");
        self.progress.watch().entered(CUT);
        let counters = &self.guest.counters;
        let done = counters.pages_done.load(SeqCst);
        let errors = counters.checksum_errors.load(Relaxed);
        let (events, in_vain) = self.link.suspicion.lost(why, done, errors).into_parts();
        events.iter().for_each(|event| self.output.tell(event));
        self.link.is_paused |= in_vain.is_some();
        let short = self.link.shortage.as_ref().and_then(|shortage| shortage.refusal.clone());
        let why = in_vain.or(short).unwrap_or_else(|| why.to_owned());
        self.announce(&why);
        Ok(())
    }

    /// Says that there are no lanes, and what becomes of the guest.
    pub(super) fn announce(&self, why: &str) {
        let (reason, pages_missing) = (why.to_owned(), self.guest.pages_missing());
        let has_way = self.link.door.is_some() && !self.link.is_paused;
        self.output.tell(&match has_way {
            true => Event::Recovering { reason, route: Route::Waits { pages_missing } },
            false => Event::Paused { reason, pause: Pause::Destination { pages_missing } },
        });
    }

    /// The demand thread has let go of its lane, and the bulk threads have ended: nothing lands any
    /// more. What they have said of their lanes is in the inbox, and must not be taken for news of the
    /// next ones.
    pub(super) fn quiet(&mut self) -> Result<()> {
        // The lane that had no room for a page was its own.
        if let State::Doubtful { error, .. } = &self.link.state {
            let why = error.to_string();
            self.break_lanes(&why)?;
        }
        self.inbox.post().send(Note::Settled);
        Ok(())
    }

    /// There is no room for what has come, on one lane or on several of them. It comes again when there is.
    fn has_no_room(&mut self, error: Error) -> Result<()> {
        if !matches!(self.link.state, State::Up) {
            return Ok(());
        }
        let pages_done = self.guest.counters.pages_done.load(SeqCst);
        let last = self.link.shortage.take().filter(|last| last.pages_done == pages_done);
        let pause = last.map_or(ROOM_PAUSE_MIN, |last| (2 * last.pause).min(ROOM_PAUSE_MAX));
        let why = self.say_shortage(&error.to_string());
        let (refusal, until) = (Some(why.clone()), Instant::now() + pause);
        self.link.shortage = Some(Shortage { refusal, until, pause, pages_done });
        // The source hears why before it loses its lanes.
        let error = Error::OutOfMemory(why);
        self.send(&Frame::Error(error.to_fault()));
        self.link.state = State::Doubtful { error, until: Instant::now() + CAUSE_PATIENCE };
        Ok(())
    }

    /// Says what lacks, how much of it, and what to do.
    fn say_shortage(&self, what: &str) -> String {
        let missing = self.guest.bytes_missing();
        let room = self.guest.least_room();
        let free = room.map_or_else(String::new, |(ram, free)| {
            format!(", and the file system of RAM {ram} has room for {} MiB", free >> 20)
        });
        let why = format!("{what}; up to {} MiB are still to come{free}", missing >> 20);
        let room = Room::Here { missing, free: room.map(|(_, free)| free) };
        self.output.tell(&Event::Short { reason: why.clone(), room });
        why
    }

    /// Lets the source in again when there may be room: where the file systems cannot say so, after a while.
    fn look_for_room(&mut self, now: Instant) {
        if let Some(why) = self.guest.take_shortage() {
            let is_told = self.link.short_of_tables.replace(now);
            if is_told.is_none_or(|at| now - at > SHORTAGE_SILENCE) {
                self.say_shortage(&why);
            }
        }
        let Some(shortage) = &mut self.link.shortage else { return };
        if shortage.refusal.is_none() || shortage.until > now {
            return;
        }
        // Less would be gone at once.
        let wanted = ROOM_BYTES_MIN.min(self.guest.bytes_missing());
        match self.guest.least_room() {
            Some((_, free)) if free < wanted => shortage.until = now + shortage.pause,
            _ => shortage.refusal = None,
        }
    }

    /// By hand: lanes are taken whether there is room or not.
    fn try_room(&mut self) {
        self.link.shortage.iter_mut().for_each(|shortage| shortage.refusal = None);
    }

    pub(super) fn settled(&mut self) -> Result<()> {
        if let State::Down { is_quiet, .. } = &mut self.link.state {
            *is_quiet = true;
        }
        self.guest.roll_back()?;
        self.go_on()
    }

    /// Goes on over new lanes, if they are here and nothing is left of the old ones.
    fn go_on(&mut self) -> Result<()> {
        let State::Down { since, is_quiet: true, .. } = self.link.state else { return Ok(()) };
        let Some(lanes) = self.link.arrived.take() else { return Ok(()) };
        self.guest.set_lanes_down(false);
        self.link.sockets.replace(lanes.all());
        self.link.hello = lanes.hello.clone();
        self.demand_socket = Some(lanes.demand.socket());
        self.congestion = lanes.demand.congestion.clone().unwrap_or_else(|| "none".into());
        self.link.state = State::Up;
        self.link.recoveries += 1;
        self.link.disconnected += since.elapsed();
        let acks = lanes.acks();
        let resume = Resume {
            lane: lanes.demand,
            landing: self.landing.clone(),
            first: frame(&Frame::Resume(self.standing())),
            last: match self.phase {
                Phase::Completing => self.completion(),
                _ => Vec::new(),
            },
        };
        self.start_bulk(lanes.bulk, acks)?;
        // The thread has ended where this fails, and its own note says why.
        let _ = self.commands.send(Command::Resume(Box::new(resume)));
        self.demand.wake();
        self.progress.phase("filling");
        self.progress.watch().reconnected(self.phase.name());
        let (place, disconnected) = (Place::Destination, since.elapsed());
        let recoveries = self.link.recoveries;
        self.output.tell(&Event::Resumed { place, disconnected, recoveries });
        Ok(())
    }

    /// What the source hears first on new lanes.
    pub(super) fn standing(&self) -> Standing {
        let switched = !matches!(self.phase, Phase::Loaded { .. });
        let running = self.times.running.zip(self.times.switched).filter(|_| switched);
        let us = |since: Duration| u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        Standing {
            switched,
            running: running.map(|(running, switched)| us(running - switched)),
            totals: self.guest.counters.totals(),
        }
    }

    /// By hand: no lanes until a resume.
    pub(super) fn pause(&mut self) -> Result<()> {
        if !self.link.recovers || !self.phase.outlives_its_lanes() {
            self.output.tell(&Event::Remark(Remark::NotPaused { place: Place::Destination }));
            return Ok(());
        }
        self.link.next_order();
        self.link.is_paused = true;
        self.link.arrived = None;
        self.link.forget_given();
        if self.link.is_down() {
            self.output.tell(&Event::Paused { reason: "by hand".into(), pause: Pause::Ordered });
            return Ok(());
        }
        self.break_lanes("paused by hand")
    }

    /// By hand: the source may come back, to another address if one is named. Its name is looked up
    /// meanwhile by somebody else: there are pages to be served.
    pub(super) fn resume(&mut self, uri: Option<Uri>) -> Result<()> {
        let order = self.link.next_order();
        self.try_room();
        let Some(uri) = uri else {
            self.link.is_paused = false;
            return Ok(());
        };
        if uri.is_one_connection() {
            self.not_resumed(&Error::Usage(format!("{uri} is no address to listen at")));
            return Ok(());
        }
        let (post, named) = (self.inbox.post(), uri.clone());
        let tell = move |found| post.send(Note::Found { order, uri: named, found });
        if let Err(error) = Listener::look_up(&uri, tell) {
            self.not_resumed(&error);
        }
        Ok(())
    }

    /// The name of a resume by hand has been looked up.
    pub(super) fn found(
        &mut self,
        order: u64,
        uri: &Uri,
        found: io::Result<Vec<SocketAddr>>,
    ) -> Result<()> {
        if order != self.link.orders {
            // Something else has been said by hand since then.
            return Ok(());
        }
        let found = found.map_err(|error| lane::not_bound(uri, error));
        if let Err(error) = found.and_then(|found| self.listen_elsewhere(uri, &found)) {
            self.not_resumed(&error);
        }
        Ok(())
    }

    /// What listened before still does, and a pause goes on.
    fn not_resumed(&self, error: &Error) {
        self.output.remark(&format!("not resumed: {error}"));
    }

    /// Has the source come in somewhere else, where whoever may not come in here may not either.
    fn listen_elsewhere(&mut self, uri: &Uri, found: &[SocketAddr]) -> Result<()> {
        let listener = Listener::bind_found(uri, found)?;
        let uri = listener.uri(uri);
        if let Some(open) = self.link.guard.check_open(&WayIn::Listener(&listener), &uri)? {
            self.output.remark(&open);
        }
        self.listen(listener);
        let uri = uri.to_string();
        self.keep_address(&uri)?;
        self.output.tell(&Event::ListeningAgain { uri });
        Ok(())
    }

    /// By hand: the source may come back here.
    pub(super) fn listen(&mut self, listener: Listener) {
        self.link.next_order();
        self.try_room();
        let Link { guard, hello, certificate, .. } = &self.link;
        let certificate = certificate.clone();
        let door = Door::of_session(listener, guard.clone(), hello, certificate, &self.output);
        self.link.door = Some(door);
        self.link.is_paused = false;
    }

    /// By hand: the source comes back over these connections, of which lanes are made that replace the
    /// others, lost or not.
    pub(super) fn reconnect(&mut self, sockets: Vec<OwnedFd>) -> Result<()> {
        if !self.link.recovers || !self.phase.outlives_its_lanes() {
            return Ok(());
        }
        self.link.next_order();
        self.try_room();
        let Link { guard, hello, certificate, .. } = &self.link;
        let certificate = certificate.clone();
        let door = Door::of_connections(sockets, guard.clone(), hello, certificate, &self.output);
        self.link.door = Some(door);
        self.link.is_paused = false;
        if self.link.is_down() {
            return Ok(());
        }
        self.break_lanes("other connections were given")
    }

    /// Ctrl-C while there are no lanes: the first says what the second means. None while there are.
    pub(super) fn interrupted_without_lanes(&mut self) -> Option<Result<()>> {
        if !self.link.is_down() {
            return None;
        }
        let (what, hint) = match self.phase {
            // Nothing is lost by leaving.
            Phase::Completing => return Some(self.step(Input::Lost)),
            // A program that embeds this has another way to end it, which no cancel is.
            _ if self.inbox.is_embedded() => return Some(Ok(())),
            Phase::Loaded { .. } => (
                "the source may have given its guest up, and only it knows",
                "interrupt again to end this one, if the guest runs there",
            ),
            _ => (
                "the guest here waits for pages that only the source has",
                "interrupt again to leave it waiting for ever",
            ),
        };
        if self.link.was_interrupted {
            return Some(Err(Error::Interrupted(format!("there was no connection, and {what}"))));
        }
        self.link.was_interrupted = true;
        self.output.remark(&format!("{what}; {hint}"));
        Some(Ok(()))
    }
}

fn frame(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    transmit::encode(frame, &mut bytes);
    bytes
}
