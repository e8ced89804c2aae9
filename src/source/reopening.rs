//! Opens the source's lanes again, until that works.
//!
//! It dials at once, then with growing pauses. On a new demand lane the destination first says where it stands and
//! what it has, which is compared with what has been claimed here. Orders that come by hand meanwhile are heard
//! between two attempts, or end one.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, recv};
use umem_wire::{Event, FaultCode, Receiver, Standing, Target};

use super::embedded;
use super::link::{Link, Way};
use super::{Migration, Note, peer};
use crate::control::event::{self, Unanswered};
use crate::error::{Error, Result};
use crate::inbox::{Inbox, Wake};
use crate::lane::{self, HELLO_TIMEOUT, Hearing, Lane};

/// The pause before the second attempt; each further one is twice as long …
const PAUSE_MIN: Duration = Duration::from_millis(100);

/// … up to this.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How long nobody may listen where the destination was before somebody is told what that means: one that is
/// started again is there sooner.
const SILENCE_PATIENCE: Duration = Duration::from_secs(5);

/// Lanes of one attempt, opened.
pub(super) struct Opened {
    pub(super) lanes: Vec<Lane>,
    /// Has read what the destination said first on the demand lane.
    pub(super) receiver: Receiver,
    pub(super) standing: Standing,
}

/// Why there was no attempt, or it came to nothing.
enum Failed {
    /// Another attempt may come to something.
    Attempt(Error),
    /// The two sides do not agree on what has come: nothing can go on.
    Migration(Error),
}

impl Migration {
    /// Opens lanes until that works.
    pub(super) fn open_again(&mut self) -> Result<Opened> {
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
                        if let Error::Peer { code: FaultCode::OutOfMemory, text, .. } = &error {
                            self.tell_shortage(text);
                        }
                        self.remark_on_silence(&error);
                        // What was given is used up; an order that has come may be another way.
                        match was_given && !notes.iter().any(Note::is_order) {
                            true => self.announce(&error.to_string()),
                            false => {
                                let reason = error.to_string();
                                self.output.tell(&event::Event::Retrying { reason });
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
        self.output.tell(&event::Event::Unanswered(Unanswered {
            uri: uri.clone(),
            session: keeper.session(),
            directory_option: keeper.directory_option(),
            is_running: self.link.heard_running,
            heard_bytes: self.link.accounted,
            total_bytes: self.memory.total_bytes(),
        }));
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
        // Whatever else comes does not keep us here.
        let mut hearing = Hearing::new();
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
                if !matches!(event, Event::Have { .. }) {
                    let taken = hearing.take(&event);
                    let violated = |why| Error::protocol(&demand.name, why);
                    taken.map_err(violated).map_err(Failed::Migration)?;
                }
                match (event, standing) {
                    (Event::Resume(heard), _) => standing = Some(heard),
                    (Event::Have { range, words }, _) => {
                        let accounted = self.memory.account(range, &words, &demand.name);
                        accounted.map_err(Failed::Migration)?;
                    }
                    (Event::Accounted, Some(standing)) => return Ok(standing),
                    (Event::Error(fault), _) if fault.code == FaultCode::Ended => {
                        return Err(Failed::Migration(peer(fault)));
                    }
                    // Whoever takes over from it there may still need what is here.
                    (Event::Error(fault), _) => return Err(Failed::Attempt(peer(fault))),
                    // A ping is answered by nobody but the demand thread, which is not there yet.
                    (_, _) => {}
                }
            }
        }
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
