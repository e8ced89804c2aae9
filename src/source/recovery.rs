//! What the source does when lanes are lost after the switchover, in a session that recovers.
//!
//! Any lane's loss takes all of them down. Their threads end, connections are severed, and the source
//! dials until all lanes are open again: at once, then with growing pauses, until Ctrl-C. On the new
//! demand lane the destination says where it stands and which pages it has; what it misses is unclaimed,
//! and everything goes on. While there are no lanes nothing at this side touches a claim but the control
//! thread, which does all of this.
//!
//! Before the switchover a lost lane is the end of the migration: the guest goes on here.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use umem_wire::source::{Input, Phase};
use umem_wire::{Event, FaultCode, LaneRole};

use super::demand::Command;
use super::link::Link;
use super::reopening::Opened;
use super::{Migration, Note};
use crate::control::event::{Event as Told, Missing, Pause, Place, Remark, Room, Route};
use crate::control::liveness::{Due, Step, stood_still, stood_still_by_option};
use crate::error::{Error, Result};
use crate::inbox::Wake;
use crate::lane::{CAUSE_PATIENCE, lane_name};
use crate::observe::watch::CUT;
use crate::report::events;

/// How long a destination may take to be ready: it has its guest's memory already, and compares regions.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

impl Migration {
    /// A lane is lost.
    pub(super) fn lane_lost(&mut self, error: Error) -> Result<()> {
        if matches!(self.phase, Phase::Completed(_)) {
            // The destination has everything, and does without a goodbye.
            self.parting_is_lost();
            return Ok(());
        }
        if !self.link.recovers || self.phase.may_run() {
            return Err(error);
        }
        let Error::Lost { lane, .. } = &error else { return Err(error) };
        if *lane == lane_name(LaneRole::Demand, 0) {
            return self.recover(&error.to_string());
        }
        self.link.doubt.get_or_insert((error, Instant::now() + CAUSE_PATIENCE));
        Ok(())
    }

    /// The destination has given up. After the switchover that is the end only if its guest has ended: otherwise
    /// it, or a process that takes over from it, may still need what is here.
    pub(super) fn peer_failed(&mut self, error: Error) -> Result<()> {
        let Error::Peer { code, text, .. } = &error else { return Err(error) };
        let can_go_on = self.link.recovers && !self.phase.may_run();
        match code {
            FaultCode::Ended => Err(error),
            _ if !can_go_on => Err(error),
            // Of lanes that are being taken down, or with nothing left to do.
            _ if !self.link.is_up || matches!(self.phase, Phase::Completed(_)) => Ok(()),
            FaultCode::OutOfMemory => {
                let text = text.clone();
                self.tell_shortage(&text);
                self.recover(&format!("the destination pauses: {text}"))
            }
            _ => self.recover(&error.to_string()),
        }
    }

    /// Says, once each time, that the destination has no room for the guest's pages.
    pub(super) fn tell_shortage(&mut self, text: &str) {
        if std::mem::replace(&mut self.link.is_short, true) {
            return;
        }
        self.output.tell(&Told::Short { reason: text.to_owned(), room: Room::Elsewhere });
    }

    /// Acts on a bulk lane's loss of which the demand lane has said nothing, and on a destination that says
    /// nothing at all.
    pub(super) fn look_after_link(&mut self) -> Result<()> {
        self.link.parting.take_if(|until| *until <= Instant::now());
        match self.link.liveness.due(Instant::now()) {
            Due::Nothing => {}
            Due::Ask(number) => self.command(Command::Ping(number)),
            // It knows that everything has come.
            Due::Lost if matches!(self.phase, Phase::Completed(_)) => {}
            Due::Lost if self.phase.may_run() => {
                let patience = self.link.liveness.patience().as_secs_f64();
                let what = format!("it has not answered for {patience} s");
                return Err(self.silent(what));
            }
            Due::Lost => return self.recover("the destination does not answer"),
        }
        match self.link.doubt.take_if(|(_, until)| *until <= Instant::now()) {
            Some((error, _)) => self.recover(&error.to_string()),
            None => Ok(()),
        }
    }

    /// Ends a migration whose destination does not take its next step, while the guest is still ours.
    pub(super) fn look_after_step(&mut self) -> Result<()> {
        let step = match self.phase {
            Phase::Comparing => Some((self.phase.name(), READY_TIMEOUT)),
            Phase::Precopying | Phase::Loading { .. } => Some((self.phase.name(), Duration::MAX)),
            _ => None,
        };
        let now = Instant::now();
        match self.steps.look(step, self.bytes_done(), now) {
            Step::Waits => Ok(()),
            Step::Moves => {
                self.link.liveness.moved(now);
                Ok(())
            }
            Step::Over(limit) => {
                let say = match self.phase {
                    Phase::Comparing => stood_still,
                    _ => stood_still_by_option,
                };
                Err(self.silent(say(limit, self.phase.name())))
            }
        }
    }

    fn silent(&self, what: String) -> Error {
        Error::Lost { side: "destination", lane: lane_name(LaneRole::Demand, 0), what }
    }

    /// By hand: gives up the lanes until a resume.
    pub(super) fn pause(&mut self) -> Result<()> {
        if !self.link.recovers || self.phase.may_run() {
            self.remark(Remark::NotPaused { place: Place::Source });
            return Ok(());
        }
        self.link.is_paused = true;
        self.recover("paused by hand")
    }

    /// By hand: goes on over these connections.
    pub(super) fn reconnect(&mut self, sockets: Vec<OwnedFd>) -> Result<()> {
        if !self.link.recovers || self.phase.may_run() {
            return Ok(());
        }
        self.link.give(sockets);
        self.recover("other connections were given")
    }

    /// Takes everything down, and returns when lanes are up again.
    fn recover(&mut self, why: &str) -> Result<()> {
        let since = Instant::now();
        self.take_down()?;
        if matches!(self.phase, Phase::Completed(_)) {
            // The destination knows that it has everything; it does without a goodbye.
            self.parting_is_lost();
            return Ok(());
        }
        let counters = &self.memory.counters;
        let Link { suspicion, accounted, .. } = &mut self.link;
        let in_vain = suspicion.lost(why, *accounted, counters, &self.output);
        self.link.is_paused |= in_vain.is_some();
        self.go_on_from(in_vain.as_deref().unwrap_or(why), since)
    }

    /// Goes on where a process was killed.
    pub(super) fn take_over(&mut self) -> Result<()> {
        self.progress.watch().commit("the guest goes on here")?;
        self.start_release()?;
        self.go_on_from("another process has served this session before", Instant::now())
    }

    fn go_on_from(&mut self, why: &str, since: Instant) -> Result<()> {
        self.announce(why);
        let opened = self.open_again()?;
        self.link.disconnected += since.elapsed();
        self.link.recoveries += 1;
        self.go_on(opened, since)
    }

    /// Ends whatever worked on the lanes, and takes what they have still told.
    fn take_down(&mut self) -> Result<()> {
        self.step(Input::Broken)?;
        self.link.is_up = false;
        self.link.liveness.begin(false, Instant::now());
        self.link.doubt = None;
        self.link.was_interrupted = false;
        self.link.sockets.sever();
        self.idle.clear();
        self.command(Command::End);
        self.bulk_wakers.drain(..).for_each(|waker| waker.wake());
        for thread in self.bulk_threads.drain(..).chain(self.demand_thread.take()) {
            let _ = thread.join();
        }
        self.bulk_ended = 0;
        while let Wake::Message(note) = self.inbox.wait(&[], Some(Duration::ZERO))? {
            self.left_over(note)?;
        }
        Ok(())
    }

    /// What a note means when its lane is gone.
    pub(super) fn left_over(&mut self, note: Note) -> Result<()> {
        match note {
            Note::Received(event) => self.received(event),
            Note::Failed(Error::Lost { .. }) | Note::BulkEnded | Note::StateLeft => Ok(()),
            Note::Failed(error) => Err(error),
            Note::Host(answer) => self.answered(answer),
            Note::Digested(outcome) => self.digested(outcome),
            Note::Pause => {
                self.progress.watch().heard();
                self.link.is_paused = true;
                self.announce("paused by hand");
                Ok(())
            }
            Note::Resume(Some(uri)) if uri.is_one_connection() => {
                self.progress.watch().heard();
                self.remark(Remark::NoAddress { uri });
                Ok(())
            }
            Note::Resume(uri) => {
                self.progress.watch().heard();
                self.link.uri = uri.or(self.link.uri.take());
                self.link.is_paused = false;
                Ok(())
            }
            Note::Reconnect(sockets) => {
                self.link.give(sockets);
                Ok(())
            }
        }
    }

    /// Says that there is no connection, and what will be done about it.
    pub(super) fn announce(&mut self, why: &str) {
        self.progress.phase("waiting");
        self.progress.watch().entered(CUT);
        let reason = why.to_owned();
        self.output.tell(&match &self.link.uri {
            _ if self.link.given.is_some() && !self.link.is_paused => {
                Told::Recovering { reason, route: Route::Given }
            }
            Some(uri) if !self.link.is_paused => {
                Told::Recovering { reason, route: Route::Dials(uri.clone()) }
            }
            _ => Told::Paused { reason, pause: Pause::Source },
        });
    }

    /// What neither side could know when the lanes broke is settled.
    pub(super) fn phase_of(&mut self, opened: &Opened) -> Result<()> {
        let before = self.phase.clone();
        self.step(Input::Received(&Event::Resume(opened.standing)))?;
        self.memory.accounted(&opened.standing.totals);
        self.link.accounted = self.memory.counters.done_bytes();
        self.keep_heard();
        if let (Phase::Committed, Phase::Serving, Some(us)) =
            (before, &self.phase, opened.standing.running)
        {
            let since_switchover = Duration::from_micros(us);
            let at =
                self.times.switched.and_then(|switched| switched.checked_add(since_switchover));
            self.running(at.unwrap_or_else(Instant::now).min(Instant::now()))?;
        }
        Ok(())
    }

    /// Everything goes on over new lanes.
    fn go_on(&mut self, opened: Opened, since: Instant) -> Result<()> {
        let Opened { mut lanes, receiver, standing } = opened;
        self.link.sockets.replace(&lanes);
        self.idle = lanes.split_off(1);
        let lane = lanes.pop().expect("the demand lane is there");
        self.congestion = lane.congestion.clone().unwrap_or_else(|| "none".into());
        self.digest_as(&lane);
        self.start_demand(lane, receiver)?;
        self.link.is_up = true;
        self.link.is_short = false;
        self.link.watch_over(false);
        let (place, disconnected) = (Place::Source, since.elapsed());
        self.progress.phase("sending");
        self.progress.watch().reconnected(self.phase.name());
        let recoveries = self.link.recoveries;
        self.output.tell(&Told::Resumed { place, disconnected, recoveries });
        if !standing.switched {
            // Nobody has the guest yet, and somebody may have let it run here meanwhile.
            self.link.owes_switchover = true;
            self.host.stands_still();
        }
        if matches!(self.phase, Phase::Serving) && self.postcopy && self.background {
            self.start_bulk()?;
        }
        Ok(())
    }

    /// Ctrl-C while there are no lanes: the first says what the second means.
    pub(super) fn interrupted_without_lanes(&mut self) -> Result<()> {
        // A program that embeds this has another way to end it, which no cancel is.
        if self.inbox.is_embedded() {
            return Ok(());
        }
        let has_all_left =
            matches!(self.phase, Phase::Serving) && self.bytes_done() >= self.memory.total_bytes();
        let missing = if has_all_left { Missing::PerhapsNothing } else { Missing::Pages };
        if std::mem::replace(&mut self.link.was_interrupted, true) {
            let how =
                self.how_to_resume().map_or_else(String::new, |how| format!("; {how} goes on"));
            return Err(Error::Interrupted(format!(
                "there was no connection to the destination; {}: keep this guest's RAM file, and do \
                 not start it here again{how}",
                events::missing(missing)
            )));
        }
        self.remark(Remark::InterruptAgain { missing });
        Ok(())
    }
}

#[cfg(test)]
mod tests;
