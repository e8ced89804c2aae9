//! One attempt to open the source's lanes again.
//!
//! On a new demand lane the destination first sends its phase and its pages. The source compares them with its claims.
//! An order of `umem control` or of the embedding program, and an interrupt, end the attempt.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, recv};
use umem_wire::{Event, FaultCode, Receiver, Standing, Target};

use crate::control::source as control;
use crate::control::source::{Input, Way};
use crate::error::{Error, Result};
use crate::runtime::inbox::{Inbox, Wait, Wake};
use crate::source::link::{self, Opened};
use crate::source::{InboxMessage, Migration, peer};
use crate::transport::lane::{self, HELLO_TIMEOUT, Hearing, Lane, Session};
use crate::transport::secure;

/// The reason why an attempt failed.
enum Failed {
    /// Another attempt may succeed.
    Attempt(Error),
    /// The two sides disagree on the pages that have arrived: the migration cannot continue.
    Migration(Error),
}

impl Migration {
    /// Opens all lanes once, and receives the destination's pages. The core gets other messages of that time first.
    pub(in crate::source) fn open(&mut self, way: Way, epoch: u32) -> Result<()> {
        let given = self.link.given.take();
        let waiting = Waiting::new(&self.inbox);
        let attempt = match way {
            Way::Dial(uri) => self.attempt(&waiting, |session, wait| {
                let open =
                    |index| secure::dial(&uri, &session.hello(index, epoch), &self.link.pass, wait);
                (0..=session.bulk_lanes).map(open).collect()
            }),
            Way::Given => self.attempt(&waiting, |session, wait| {
                let sockets = given.unwrap_or_default();
                link::open_over(sockets, session, epoch, &self.link.pass, wait)
            }),
        };
        let (notes, was_interrupted) = waiting.into_parts();
        for note in notes {
            let input = self.input(note);
            self.answers.push_back(input);
        }
        if was_interrupted {
            self.answers.push_back(Input::Interrupted);
        }
        self.answers.push_back(Input::Opened(match attempt {
            Ok(opened) => {
                self.memory.accounted(&opened.standing.totals);
                let standing = opened.standing;
                self.link.opened = Some(opened);
                control::Opened::Lanes(standing)
            }
            Err(Failed::Attempt(error)) => control::Opened::NotNow(error),
            Err(Failed::Migration(error)) => control::Opened::Never(error),
        }));
        Ok(())
    }

    fn attempt(
        &self,
        waiting: &Waiting<'_>,
        open: impl FnOnce(&Session, Wait<'_>) -> Result<Vec<Lane>>,
    ) -> std::result::Result<Opened, Failed> {
        let wait = |fds: &[(BorrowedFd<'_>, PollFlags)], limit| waiting.wait(fds, limit);
        let lanes = open(&self.link.session, &wait).map_err(Failed::Attempt)?;
        let receiver = Receiver::for_resumed_source(self.memory.landing());
        let mut receiver = receiver.checked(lanes[0].is_checked());
        let standing = self.hear(&lanes[0], &mut receiver, waiting).inspect_err(|failed| {
            if let Failed::Migration(error) = failed {
                lane::tell(&lanes[0].socket(), lanes[0].is_checked(), error);
            }
        })?;
        Ok(Opened { lanes, receiver, standing })
    }

    /// Receives the destination's phase and pages, and claims those pages.
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
        // Bounds the other frames of a peer that keeps sending.
        let mut hearing = Hearing::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let fds = [(demand.as_fd(), PollFlags::POLLIN)];
            if !waiting.wait(&fds, Some(HELLO_TIMEOUT)).map_err(Failed::Attempt)? {
                return Err(lost("the destination does not send its page states".into()));
            }
            // The demand thread reads the bytes after the account.
            let Target::Control { exact } = receiver.next_target() else {
                unreachable!("a source receives no pages");
            };
            let exact = exact.min(buffer.len());
            let flags = MsgFlags::MSG_DONTWAIT;
            let count = match recv(demand.as_fd().as_raw_fd(), &mut buffer[..exact], flags) {
                Ok(0) => return Err(lost("the destination closed the connection".into())),
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
                    // A process that takes over at the destination may still need this side's pages.
                    (Event::Error(fault), _) => return Err(Failed::Attempt(peer(fault))),
                    // Only the demand thread answers a ping, and it has not started yet.
                    (_, _) => {}
                }
            }
        }
    }
}

impl InboxMessage {
    /// Whether the note is an order about the lanes.
    fn is_order(&self) -> bool {
        matches!(self, InboxMessage::Pause | InboxMessage::Resume(_) | InboxMessage::Reconnect(_))
    }
}

/// Waits for a lane that is being opened again, and keeps other messages for later.
struct Waiting<'a> {
    inbox: &'a Inbox<InboxMessage>,
    notes: RefCell<VecDeque<InboxMessage>>,
    was_interrupted: Cell<bool>,
}

impl<'a> Waiting<'a> {
    fn new(inbox: &'a Inbox<InboxMessage>) -> Waiting<'a> {
        Waiting { inbox, notes: RefCell::default(), was_interrupted: Cell::new(false) }
    }

    /// Waits for a descriptor; false after `limit`. An error ends the attempt: a signal or an order about the lanes has
    /// arrived.
    fn wait(&self, fds: &[(BorrowedFd<'_>, PollFlags)], limit: Option<Duration>) -> Result<bool> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            match self.inbox.wait_for(fds, left)? {
                Wake::Ready(_) => return Ok(true),
                Wake::Timeout => return Ok(false),
                // An embedding program handles its signals itself.
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

    fn into_parts(self) -> (VecDeque<InboxMessage>, bool) {
        (self.notes.into_inner(), self.was_interrupted.get())
    }
}
