//! What the source does when lanes are lost after the switchover, in a session that recovers.
//!
//! Any lane's loss takes all of them down. Their threads end, connections are severed, and the source
//! dials until all lanes are open again: at once, then with growing pauses, until Ctrl-C. On the new
//! demand lane the destination says where it stands and which pages it has; what it misses is unclaimed,
//! and everything goes on. While there are no lanes nothing at this side touches a claim but the control
//! thread, which does all of this.
//!
//! Before the switchover a lost lane is the end of the migration: the guest goes on here.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, recv};
use serde_json::json;
use umem_wire::source::{Input, Phase};
use umem_wire::{Event, Frame, LaneRole, Receiver, Standing, Target};

use super::demand::Command;
use super::embedded;
use super::liveness::{Due, Liveness};
use super::{Migration, Note, peer};
use crate::error::{Error, Result};
use crate::inbox::{Inbox, Wake};
use crate::lane::{self, CAUSE_PATIENCE, HELLO_TIMEOUT, Lane, Session, Severable, lane_name};
use crate::observe::watch::CUT;
use crate::secure::Pass;
use crate::session::{Keeper, SourceRecord};
use crate::suspicion::Suspicion;
use crate::uri::Uri;

/// The pause before the second attempt; each further one is twice as long …
const PAUSE_MIN: Duration = Duration::from_millis(100);

/// … up to this.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How long nobody may listen where the destination was before somebody is told what that means: one that is
/// started again is there sooner.
const SILENCE_PATIENCE: Duration = Duration::from_secs(5);

/// What is needed to open lanes again, and how often that was.
pub(super) struct Link {
    recovers: bool,
    pub(super) session: Session,
    /// What is shown, and asked for, each time lanes are opened.
    pass: Arc<Pass>,
    /// Where the destination listens; none where there were connections, which cannot be opened again.
    uri: Option<Uri>,
    /// Connections in place of lost ones, good for one attempt.
    given: Option<Vec<OwnedFd>>,
    /// Of the last attempt to open lanes.
    epoch: u32,
    /// Where another process finds what it needs to go on, should this one be killed.
    pub(super) keeper: Option<Keeper<SourceRecord>>,
    sockets: Severable,
    is_up: bool,
    pub(super) liveness: Liveness,
    /// A bulk lane is lost, and until then a destination that gives up may say so on the demand lane.
    doubt: Option<(Error, Instant)>,
    /// By hand: no lanes are opened.
    is_paused: bool,
    was_interrupted: bool,
    suspicion: Suspicion,
    /// Bytes that the destination had when it said so last.
    pub(super) accounted: u64,
    /// It has said that the guest runs there.
    pub(super) heard_running: bool,
    /// Since when nobody answers, and whether that has been remarked on.
    unanswered: Option<(Instant, bool)>,
    pub(super) recoveries: u32,
    pub(super) disconnected: Duration,
}

impl Link {
    /// With the lanes that have just been opened, demand lane first.
    pub(super) fn new(session: Session, pass: Arc<Pass>, uri: Option<Uri>, lanes: &[Lane]) -> Link {
        let recovers = |lane: &Lane| lane.capabilities.contains(umem_wire::Capabilities::RECOVERY);
        Link {
            recovers: lanes.iter().all(recovers),
            session,
            pass,
            uri,
            given: None,
            epoch: 0,
            keeper: None,
            sockets: Severable::new(lanes),
            is_up: true,
            liveness: Liveness::off(),
            doubt: None,
            is_paused: false,
            was_interrupted: false,
            suspicion: Suspicion::default(),
            accounted: 0,
            heard_running: false,
            unanswered: None,
            recoveries: 0,
            disconnected: Duration::ZERO,
        }
    }

    /// Of a session whose process is gone: there are no lanes.
    pub(super) fn taken_over(
        session: Session,
        pass: Arc<Pass>,
        uri: Option<Uri>,
        keeper: Keeper<SourceRecord>,
        record: &SourceRecord,
    ) -> Link {
        Link {
            recovers: true,
            epoch: record.epoch,
            keeper: Some(keeper),
            is_up: false,
            accounted: record.heard_bytes,
            heard_running: record.running,
            ..Link::new(session, pass, uri, &[])
        }
    }

    /// The number of the next attempt to open lanes: more than any before it, of any process. So it is
    /// written down before it is used.
    pub(super) fn next_epoch(&mut self) -> Result<u32> {
        let next = self.epoch.checked_add(1);
        self.epoch = next
            .ok_or_else(|| Error::Unsupported("the connection has been lost too often".into()))?;
        let (epoch, uri) = (self.epoch, self.uri.as_ref().map(Uri::to_string));
        if let Some(keeper) = &self.keeper {
            keeper.edit(|record| {
                record.epoch = epoch;
                record.uri = uri.unwrap_or_else(|| record.uri.clone());
            })?;
        }
        Ok(epoch)
    }

    pub(super) fn recovers(&self) -> bool {
        self.recovers
    }

    pub(super) fn is_up(&self) -> bool {
        self.is_up
    }

    /// For who may have to end them.
    pub(super) fn severable(&self) -> Severable {
        self.sockets.clone()
    }

    /// By hand: whoever has these opens others from here on, and no address is dialled.
    fn give(&mut self, sockets: Vec<OwnedFd>) {
        (self.uri, self.given) = (None, Some(sockets));
        self.is_paused = false;
    }

    fn has_way(&self) -> bool {
        !self.is_paused && (self.uri.is_some() || self.given.is_some())
    }

    /// How to open lanes now, if there is a way.
    fn take_way(&mut self) -> Option<Way> {
        if self.is_paused {
            return None;
        }
        let given = self.given.take().map(Way::Given);
        given.or_else(|| self.uri.clone().map(Way::Dial))
    }

    /// When [`Migration::look_after_link`] has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let doubt = self.doubt.as_ref().map(|&(_, until)| until);
        doubt.into_iter().chain(self.liveness.deadline()).min()
    }

    /// From the switchover on, and each time there are lanes again.
    pub(super) fn watch_over(&mut self) {
        let is_asked = self.recovers && self.session.bulk_lanes > 0;
        self.liveness.begin(is_asked, Instant::now());
    }
}

/// How lanes are opened again.
enum Way {
    Dial(Uri),
    /// One for each, the demand lane's first.
    Given(Vec<OwnedFd>),
}

/// Lanes of one attempt, opened.
struct Opened {
    lanes: Vec<Lane>,
    /// Has read what the destination said first on the demand lane.
    receiver: Receiver,
    standing: Standing,
}

/// Why there was no attempt, or it came to nothing.
enum Failed {
    /// Another attempt may come to something.
    Attempt(Error),
    /// The two sides do not agree on what has come: nothing can go on.
    Migration(Error),
}

impl Migration {
    /// A lane is lost.
    pub(super) fn lane_lost(&mut self, error: Error) -> Result<()> {
        if matches!(self.phase, Phase::Completed(_)) {
            // The destination has everything, and does without a goodbye.
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

    /// Acts on a bulk lane's loss of which the demand lane has said nothing, and on a destination that says
    /// nothing at all.
    pub(super) fn look_after_link(&mut self) -> Result<()> {
        match self.link.liveness.due(Instant::now()) {
            Due::Nothing => {}
            Due::Ask(number) => self.send(&Frame::Ping(number)),
            // It knows that everything has come.
            Due::Lost if matches!(self.phase, Phase::Completed(_)) => {}
            Due::Lost => return self.recover("the destination does not answer"),
        }
        match self.link.doubt.take_if(|(_, until)| *until <= Instant::now()) {
            Some((error, _)) => self.recover(&error.to_string()),
            None => Ok(()),
        }
    }

    /// By hand: gives up the lanes until a resume.
    pub(super) fn pause(&mut self) -> Result<()> {
        if !self.link.recovers || self.phase.may_run() {
            self.output.remark(
                "not paused: the guest has not been switched over, or its destination cannot resume",
            );
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
            return Ok(());
        }
        let counters = &self.memory.counters;
        let Link { suspicion, accounted, .. } = &mut self.link;
        self.link.is_paused |= suspicion.lost(why, *accounted, counters, &self.output);
        self.go_on_from(why, since)
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
    fn left_over(&mut self, note: Note) -> Result<()> {
        match note {
            Note::Received(event) => self.received(event),
            Note::Failed(Error::Lost { .. }) | Note::BulkEnded => Ok(()),
            Note::Failed(error) => Err(error),
            Note::Host(answer) => self.answered(answer),
            Note::Digested(outcome) => self.digested(outcome),
            Note::Pause => {
                self.link.is_paused = true;
                self.announce("paused by hand");
                Ok(())
            }
            Note::Resume(Some(uri)) if uri.is_one_connection() => {
                self.output.remark(&format!("not resumed: {uri} is no address to connect to"));
                Ok(())
            }
            Note::Resume(uri) => {
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
    fn announce(&mut self, why: &str) {
        self.progress.phase("waiting");
        self.progress.watch().entered(CUT);
        let fields = json!({ "reason": why });
        match &self.link.uri {
            _ if self.link.given.is_some() && !self.link.is_paused => {
                self.output.event("recovering", fields, "");
            }
            Some(uri) if !self.link.is_paused => self.output.event(
                "recovering",
                fields,
                &format!("{why}; the guest runs at the destination; trying {uri} again"),
            ),
            _ => self.output.event(
                "paused",
                fields,
                &format!(
                    "{why}; the guest runs at the destination and may need pages from here; going on \
                     when a resume says how"
                ),
            ),
        }
    }

    /// Opens lanes until that works.
    fn open_again(&mut self) -> Result<Opened> {
        let mut pause = PAUSE_MIN;
        loop {
            if let Some(way) = self.link.take_way() {
                let was_given = matches!(way, Way::Given(_));
                self.link.next_epoch()?;
                let waiting = Waiting::new(&self.inbox);
                let attempt = self.attempt(way, &waiting);
                let (notes, was_interrupted) = waiting.into_parts();
                match attempt {
                    Ok(opened) => {
                        self.link.unanswered = None;
                        self.phase_of(&opened)?;
                        notes.into_iter().try_for_each(|note| self.left_over(note))?;
                        // A pause that came meanwhile takes effect at once.
                        if !self.link.is_paused {
                            return Ok(opened);
                        }
                    }
                    Err(Failed::Migration(error)) => return Err(error),
                    Err(Failed::Attempt(error)) => {
                        self.remark_on_silence(&error);
                        // What was given is used up; an order that has come may be another way.
                        match was_given && !notes.iter().any(Note::is_order) {
                            true => self.announce(&error.to_string()),
                            false => {
                                let fields = json!({ "reason": error.to_string() });
                                self.output.event("retrying", fields, "");
                            }
                        }
                        notes.into_iter().try_for_each(|note| self.left_over(note))?;
                    }
                }
                if was_interrupted {
                    self.interrupted_without_lanes()?;
                }
            }
            self.pause_between(pause)?;
            pause = (2 * pause).min(PAUSE_MAX);
        }
    }

    /// After an attempt that came to nothing: where nobody listens for a while the destination's process has
    /// ended, and only a person can find out how.
    fn remark_on_silence(&mut self, error: &Error) {
        let nobody = [ErrorKind::ConnectionRefused, ErrorKind::NotFound];
        match error {
            Error::Connect { source, .. } if nobody.contains(&source.kind()) => {}
            _ => return self.link.unanswered = None,
        }
        let (since, is_told) = self.link.unanswered.unwrap_or((Instant::now(), false));
        let is_due = !is_told && since.elapsed() >= SILENCE_PATIENCE;
        self.link.unanswered = Some((since, is_told || is_due));
        let (true, Some(keeper), Some(uri)) = (is_due, &self.link.keeper, &self.link.uri) else {
            return;
        };
        let (session, running) = (keeper.session(), self.link.heard_running);
        let (heard, total) = (self.link.accounted >> 20, self.memory.total_bytes() >> 20);
        let known = match (running, heard) {
            (false, _) => "whether the guest runs there is not known here".to_owned(),
            (true, 0) => {
                "the guest runs there, and how much of its memory it has is not known here".into()
            }
            (true, _) => {
                format!("the guest runs there, and had {heard} of {total} MiB when last heard of")
            }
        };
        let text = format!(
            "nobody listens at {uri}: the umem there has ended, and {known}; `umem incoming --resume {session}` \
             there goes on with the guest, or says here that it is complete, or that it has ended; if that \
             is known to be so, interrupt this twice and end it with `umem migrate --resume {session}{} \
             --abandon`",
            keeper.directory_option()
        );
        let fields = json!({
            "uri": uri.to_string(), "session": session, "running": running, "heard_bytes": self.link.accounted,
        });
        self.output.event("unanswered", fields, &text);
    }

    /// Waits before the next attempt; for a resume if there is no way to make one.
    fn pause_between(&mut self, pause: Duration) -> Result<()> {
        let until = Instant::now() + jittered(pause);
        loop {
            let has_way = self.link.has_way();
            let left = until.saturating_duration_since(Instant::now());
            match self.inbox.wait(&[], has_way.then_some(left))? {
                Wake::Timeout => return Ok(()),
                Wake::Ready(_) => {}
                Wake::Signal => self.interrupted_without_lanes()?,
                Wake::Message(note) => {
                    let is_resume = matches!(note, Note::Resume(_) | Note::Reconnect(_));
                    self.left_over(note)?;
                    if is_resume && self.link.has_way() {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Opens all lanes once, and hears what the destination has.
    fn attempt(&self, way: Way, waiting: &Waiting<'_>) -> std::result::Result<Opened, Failed> {
        let Link { session, pass, epoch, .. } = &self.link;
        let wait = |fds: &[(BorrowedFd<'_>, PollFlags)], limit| waiting.wait(fds, limit);
        let lanes = match way {
            Way::Dial(uri) => {
                let open = |index| lane::dial(&uri, &session.hello(index, *epoch), pass, &wait);
                (0..=session.bulk_lanes).map(open).collect::<Result<Vec<_>>>()
            }
            Way::Given(sockets) => embedded::open_over(sockets, session, *epoch, pass, &wait),
        };
        let lanes = lanes.map_err(Failed::Attempt)?;
        let receiver = Receiver::for_resumed_source(self.memory.landing());
        let mut receiver = receiver.checked(lanes[0].is_checked());
        let standing = self.hear(&lanes[0], &mut receiver, waiting).inspect_err(|failed| {
            if let Failed::Migration(error) = failed {
                lane::tell(&lanes[0].socket(), lanes[0].is_checked(), error);
            }
        })?;
        Ok(Opened { lanes, receiver, standing })
    }

    /// Hears where the destination stands and what it has, and claims accordingly.
    fn hear(
        &self,
        demand: &Lane,
        receiver: &mut Receiver,
        waiting: &Waiting<'_>,
    ) -> std::result::Result<Standing, Failed> {
        let lost = |what: String| {
            let lane = demand.name.clone();
            Failed::Attempt(Error::Lost { side: "destination", lane, what })
        };
        let mut standing = None;
        let mut buffer = vec![0; 64 << 10];
        loop {
            let fds = [(demand.as_fd(), PollFlags::POLLIN)];
            if !waiting.wait(&fds, Some(HELLO_TIMEOUT)).map_err(Failed::Attempt)? {
                return Err(lost("it does not say what it has".into()));
            }
            // What comes after the account is for the demand thread.
            let Target::Control { exact } = receiver.next_target() else {
                unreachable!("no pages come to a source");
            };
            let exact = exact.min(buffer.len());
            let flags = MsgFlags::MSG_DONTWAIT;
            let count = match recv(demand.as_fd().as_raw_fd(), &mut buffer[..exact], flags) {
                Ok(0) => return Err(lost("the destination closed it".into())),
                Ok(count) => count,
                Err(Errno::EAGAIN | Errno::EINTR) => continue,
                Err(errno) => return Err(lost(errno.to_string())),
            };
            receiver.control(&buffer[..count]).map_err(|error| {
                match self.memory.received(&demand.name, &error) {
                    error @ Error::Lost { .. } => Failed::Attempt(error),
                    error => Failed::Migration(error),
                }
            })?;
            while let Some(event) = receiver.poll_event() {
                match (event, standing) {
                    (Event::Resume(heard), _) => standing = Some(heard),
                    (Event::Have { range, words }, _) => {
                        let accounted = self.memory.account(range, &words, &demand.name);
                        accounted.map_err(Failed::Migration)?;
                    }
                    (Event::Accounted, Some(standing)) => return Ok(standing),
                    (Event::Error(fault), _) => return Err(Failed::Migration(peer(fault))),
                    // A ping is answered by nobody but the demand thread, which is not there yet.
                    (_, _) => {}
                }
            }
        }
    }

    /// What neither side could know when the lanes broke is settled.
    fn phase_of(&mut self, opened: &Opened) -> Result<()> {
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
        self.start_demand(lane, receiver)?;
        self.link.is_up = true;
        self.link.watch_over();
        let disconnected_ms = since.elapsed().as_secs_f64() * 1e3;
        self.progress.phase("sending");
        self.progress.watch().reconnected(self.phase.name());
        self.output.event(
            "resumed",
            json!({ "disconnected_ms": disconnected_ms, "recoveries": self.link.recoveries }),
            &format!("connected again after {:.1} s", disconnected_ms / 1e3),
        );
        if !standing.switched {
            self.send_switchover();
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
        let what = if has_all_left {
            "every page has been sent; whether all have come only the destination knows"
        } else {
            "the guest runs at the destination, and what it has not got of its memory is only here"
        };
        if std::mem::replace(&mut self.link.was_interrupted, true) {
            let how =
                self.how_to_resume().map_or_else(String::new, |how| format!("; {how} goes on"));
            return Err(Error::Interrupted(format!(
                "there was no connection to the destination; {what}: keep this guest's RAM file, and do \
                 not start it here again{how}"
            )));
        }
        self.output.remark(&format!("{what}; interrupt again to give up"));
        Ok(())
    }
}

impl Note {
    /// Whether somebody decides with it what is to be done about the lanes.
    fn is_order(&self) -> bool {
        matches!(self, Note::Pause | Note::Resume(_) | Note::Reconnect(_))
    }
}

/// Waits for a lane that is being opened again, and keeps what else comes for afterwards.
struct Waiting<'a> {
    inbox: &'a Inbox<Note>,
    notes: RefCell<VecDeque<Note>>,
    was_interrupted: Cell<bool>,
}

impl<'a> Waiting<'a> {
    fn new(inbox: &'a Inbox<Note>) -> Waiting<'a> {
        Waiting { inbox, notes: RefCell::default(), was_interrupted: Cell::new(false) }
    }

    /// An error where the attempt is to be given up: a signal has come, or word from whoever directs
    /// this.
    fn wait(&self, fds: &[(BorrowedFd<'_>, PollFlags)], limit: Option<Duration>) -> Result<bool> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            match self.inbox.wait_for(fds, left)? {
                Wake::Ready(_) => return Ok(true),
                Wake::Timeout => return Ok(false),
                // Without effect in another program.
                Wake::Signal if self.inbox.is_embedded() => {}
                Wake::Signal => {
                    self.was_interrupted.set(true);
                    return Err(Error::Interrupted("the attempt is given up".into()));
                }
                Wake::Message(note) => {
                    let is_order = note.is_order();
                    self.notes.borrow_mut().push_back(note);
                    if is_order {
                        return Err(Error::Interrupted("the attempt is given up".into()));
                    }
                }
            }
        }
    }

    fn into_parts(self) -> (VecDeque<Note>, bool) {
        (self.notes.into_inner(), self.was_interrupted.get())
    }
}

/// Half of a pause to all of it, so that many sources do not come at the same moment.
fn jittered(pause: Duration) -> Duration {
    // As random as is needed: the keys of each new state are.
    let random = RandomState::new().build_hasher().finish();
    let half = pause / 2;
    half + half.mul_f64(f64::from((random >> 32) as u32) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;

    use umem_wire::{
        Capabilities, HELLO_BYTES, Hello, PROTOCOL, PageRange, RegionId, RegionTable, Totals,
        Welcome, transmit,
    };

    use crate::host::SourceHost;
    use crate::host::thread::{Answer, HostThread, Question};
    use crate::idle::IdleCores;
    use crate::inbox::{Canceller, Post};
    use crate::memory::region::RamFile;
    use crate::observe::watch::{Role, Watch};
    use crate::report::Output;
    use crate::source::memory::SourceMemory;
    use crate::source::{Order, Plan, wait};

    const PAGES: u64 = 512;

    /// A lane's end at a destination that the test plays.
    struct End {
        stream: TcpStream,
        hello: Hello,
        receiver: Receiver,
    }

    impl End {
        fn accept(listener: &TcpListener, landing: Option<&RegionTable>) -> End {
            let mut stream = listener.accept().unwrap().0;
            let mut bytes = [0; HELLO_BYTES];
            stream.read_exact(&mut bytes).unwrap();
            let hello = Hello::decode(&bytes).unwrap();
            let welcome = Welcome::answer(&hello, PROTOCOL, Capabilities::RECOVERY, [0; 32]);
            stream.write_all(&welcome.unwrap().encode()).unwrap();
            let mut receiver = Receiver::for_destination(hello.role);
            landing.into_iter().for_each(|landing| receiver.set_regions(landing));
            End { stream, hello, receiver }
        }

        fn say(&mut self, frame: &Frame) {
            let mut bytes = Vec::new();
            transmit::encode(frame, &mut bytes);
            self.stream.write_all(&bytes).unwrap();
        }

        /// The next event; none when the source has closed the lane.
        fn event(&mut self) -> Option<Event> {
            let mut buffer = Vec::new();
            loop {
                if let Some(event) = self.receiver.poll_event() {
                    return Some(event);
                }
                let (bytes, is_run) = match self.receiver.next_target() {
                    Target::Control { exact } => (exact as u64, false),
                    Target::Run(run) => (run.bytes, true),
                };
                buffer.resize(usize::try_from(bytes).unwrap(), 0);
                let count = self.stream.read(&mut buffer).unwrap_or(0);
                match (count, is_run) {
                    (0, _) => return None,
                    (_, true) => self.receiver.landed(count as u64).unwrap(),
                    (_, false) => self.receiver.control(&buffer[..count]).unwrap(),
                }
            }
        }

        /// Up to an event of this name.
        fn until(&mut self, name: &str) -> Event {
            std::iter::from_fn(|| self.event()).find(|event| event.name() == name).unwrap()
        }

        /// Notes the pages that come until the lane ends or is closed; none for a second time.
        fn pages(&mut self, have: &mut [u64]) {
            while let Some(event) = self.event() {
                let (Event::Data(range) | Event::Zero(range) | Event::Hole(range)) = event else {
                    if event == Event::LaneEnd { return } else { continue }
                };
                for page in range.first..range.first + range.pages {
                    let word = &mut have[usize::try_from(page / 64).unwrap()];
                    assert!(*word >> (page % 64) & 1 == 0, "page {page} came twice");
                    *word |= 1 << (page % 64);
                }
            }
        }
    }

    /// The destination's part: paused after a while, and resumed at the second address.
    fn play(listeners: &[TcpListener; 2], post: &Post<Note>) {
        let [first, second] = listeners;
        let (mut demand, mut bulk) = (End::accept(first, None), End::accept(first, None));
        let Event::Regions(table) = demand.until("regions") else { unreachable!() };
        demand.receiver.set_regions(&table);
        bulk.receiver.set_regions(&table);
        demand.say(&Frame::Ready(table.units()));
        demand.until("load");
        demand.say(&Frame::Loaded);
        demand.until("switchover");
        demand.say(&Frame::Running { us_since_switchover: 1 });
        let mut have = vec![0; usize::try_from(PAGES / 64).unwrap()];
        bulk.event().unwrap();
        post.send(Note::Pause);
        bulk.pages(&mut have);
        assert_eq!(std::iter::from_fn(|| demand.event()).last(), None, "closed, too");
        // As if the last of them had not come.
        have[7] = 0;

        let port = second.local_addr().unwrap().port();
        post.send(Note::Resume(Some(Uri::Tcp { host: "127.0.0.1".into(), port })));
        let session = demand.hello.session;
        let (mut demand, mut bulk) =
            (End::accept(second, Some(&table)), End::accept(second, Some(&table)));
        for lane in [&demand, &bulk] {
            assert_eq!((lane.hello.session, lane.hello.epoch), (session, 1));
        }
        let totals = Totals::default();
        demand.say(&Frame::Resume(Standing { switched: true, running: Some(1), totals }));
        let range = PageRange { region: RegionId(0), first: 0, pages: PAGES };
        demand.say(&Frame::Have { range, words: have.clone() });
        bulk.pages(&mut have);
        assert_eq!(have, vec![u64::MAX; have.len()], "the rest, and nothing else");
        demand.say(&Frame::Complete(totals));
        demand.until("complete");
    }

    #[test]
    fn a_pause_gives_up_every_lane_and_a_resume_goes_on_at_another_address() {
        let mut file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        file.write_all(&[7; 4096 * PAGES as usize]).unwrap();
        let ram = RamFile::open_source("ram0", file.path(), false).unwrap();
        let memory = Arc::new(SourceMemory::new(vec![ram], false));
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let port = listeners[0].local_addr().unwrap().port();
        let uri = Uri::Tcp { host: "127.0.0.1".into(), port };
        let inbox = Inbox::embedded(Canceller::new().unwrap()).unwrap();
        let (post, answers) = (inbox.post(), inbox.post());
        let destination = std::thread::spawn(move || play(&listeners, &post));
        let session = Session::new(1, false, true).unwrap();
        let pass = Arc::new(Pass::default());
        let wait = |fds: &[(BorrowedFd<'_>, PollFlags)], limit| wait(&inbox, fds, limit);
        let open = |index| lane::dial(&uri, &session.hello(index, 0), &pass, &wait).unwrap();
        let lanes: Vec<Lane> = (0..=1).map(open).collect();
        let link = Link::new(session, pass, Some(uri), &lanes);
        let watch = Watch::new(Role::Source, false, None);
        let host = HostThread::<dyn SourceHost>::elsewhere(move |question| {
            answers.send(Note::Host(match question {
                Question::Stop => Answer::Stopped(Ok(None)),
                Question::Save => Answer::Saved(Ok(Vec::new())),
                _ => Answer::Resumed(Ok(())),
            }));
        });
        let plan = Plan {
            postcopy: true,
            background: true,
            cores: &[],
            idle_cores: IdleCores::Sleep,
            order: Order::Adaptive,
            watch: &watch,
            quiet: true,
            has_monitor: false,
            stays_local: true,
        };
        let output = Output::Host(Arc::new(|_, _| {}));
        let migration = Migration::start(&plan, output, inbox, (lanes, link), memory, host);
        let report = migration.unwrap().drive().unwrap();
        assert_eq!(report.recoveries, 1);
        destination.join().unwrap();
    }
}
