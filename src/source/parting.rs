//! What the source dials for when nothing is left to be served: to say goodbye to a destination that has not heard
//! it, or that the guest goes on here to one that has loaded it.
//!
//! The destination waits for that, whoever says it; where it does not come it ends after a while, or waits for a
//! person. So it is worth a few attempts, and no more: nobody listens any more where it has ended by itself.

use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, recv};
use umem_wire::{Event, Frame, Receiver, RegionTable, Seal, Target, transmit};

use super::Note;
use crate::error::{Error, Result};
use crate::inbox::{Inbox, Wake};
use crate::lane::{self, HELLO_TIMEOUT, Lane, Session};
use crate::secure::Pass;
use crate::uri::Uri;

/// From one attempt to the next.
const INTERVAL: Duration = Duration::from_millis(200);

/// How long nobody may listen: who resumes a destination that was killed is there by then.
const NOBODY_PATIENCE: Duration = Duration::from_secs(5);

/// Asked behind the goodbye. It is answered once the destination has written down that the goodbye has come.
pub(super) const GOODBYE_PING: u64 = u64::MAX;

/// Nobody listens there.
pub(super) fn is_nobody(error: &Error) -> bool {
    let nobody = [ErrorKind::ConnectionRefused, ErrorKind::NotFound];
    matches!(error, Error::Connect { source, .. } if nobody.contains(&source.kind()))
}

/// Who dials.
pub(super) struct Caller<'a> {
    pub(super) uri: &'a Uri,
    pub(super) session: Session,
    pub(super) pass: &'a Pass,
    pub(super) inbox: &'a Inbox<Note>,
}

impl Caller<'_> {
    /// Says that nothing more is to come from here to a destination that has everything. An error where it could
    /// not be said, which a destination that has ended needs no more.
    pub(super) fn goodbye(
        &self,
        landing: &RegionTable,
        epochs: &mut dyn FnMut() -> Result<u32>,
        patience: Duration,
    ) -> Result<()> {
        let until = Instant::now() + patience;
        let lanes = self.open(epochs, until)?;
        let demand = &lanes[0];
        let receiver = Receiver::for_resumed_source(landing);
        let mut receiver = receiver.checked(demand.is_checked());
        let mut has_parted = false;
        let until = Instant::now() + HELLO_TIMEOUT;
        while let Some(event) = self.hear(demand, &mut receiver, until)? {
            match event {
                Event::Complete(totals) if !has_parted => {
                    has_parted = true;
                    let mut bytes = Vec::new();
                    transmit::encode(&Frame::Complete(totals), &mut bytes);
                    transmit::encode(&Frame::Ping(GOODBYE_PING), &mut bytes);
                    Seal::new(demand.is_checked()).frames(&mut bytes);
                    demand.say(&bytes)?;
                }
                Event::Pong(GOODBYE_PING) => return Ok(()),
                Event::Error(fault) => return Err(super::peer(fault)),
                _ => {}
            }
        }
        match has_parted {
            true => Ok(()),
            false => Err(Error::Unsupported("it closed the connection".into())),
        }
    }

    /// Says why nothing will go on, and waits until that has been read.
    pub(super) fn gave_up(
        &self,
        why: &Error,
        epochs: &mut dyn FnMut() -> Result<u32>,
        patience: Duration,
    ) -> Result<()> {
        let lanes = self.open(epochs, Instant::now() + patience)?;
        lane::tell(&lanes[0].socket(), lanes[0].is_checked(), why);
        let until = Instant::now() + HELLO_TIMEOUT;
        // What it says meanwhile is read, as a connection that is closed over it would be reset.
        let mut buffer = [0; 4096];
        while self.read(&lanes[0], &mut buffer, until)? > 0 {}
        Ok(())
    }

    /// All lanes of an attempt that is later than any before it, the demand lane first.
    fn open(&self, epochs: &mut dyn FnMut() -> Result<u32>, until: Instant) -> Result<Vec<Lane>> {
        if self.uri.is_one_connection() {
            return Err(Error::Unsupported("it was one connection".into()));
        }
        let wait = |fds: &[(BorrowedFd<'_>, PollFlags)], limit: Option<Duration>| {
            let at = limit.map_or(until, |limit| until.min(Instant::now() + limit));
            self.wait(fds, at)
        };
        let begun = Instant::now();
        loop {
            let epoch = epochs()?;
            let open =
                |index| lane::dial(self.uri, &self.session.hello(index, epoch), self.pass, &wait);
            match (0..=self.session.bulk_lanes).map(open).collect::<Result<Vec<_>>>() {
                Ok(lanes) => return Ok(lanes),
                Err(error @ Error::Interrupted(_)) => return Err(error),
                Err(error) if Instant::now() + INTERVAL >= until => return Err(error),
                // As little where something in between takes connections for nobody.
                Err(error @ (Error::Lost { .. } | Error::Connect { .. }))
                    if (is_nobody(&error) || !matches!(error, Error::Connect { .. }))
                        && begun.elapsed() > NOBODY_PATIENCE =>
                {
                    return Err(error);
                }
                Err(_) => self.wait(&[], Instant::now() + INTERVAL).map(drop)?,
            }
        }
    }

    fn hear(
        &self,
        demand: &Lane,
        receiver: &mut Receiver,
        until: Instant,
    ) -> Result<Option<Event>> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            if let Some(event) = receiver.poll_event() {
                return Ok(Some(event));
            }
            let Target::Control { exact } = receiver.next_target() else {
                unreachable!("no pages come to a source");
            };
            let exact = exact.min(buffer.len());
            let count = self.read(demand, &mut buffer[..exact], until)?;
            if count == 0 {
                return Ok(None);
            }
            receiver
                .control(&buffer[..count])
                .map_err(|error| Error::received("destination", &demand.name, &error))?;
        }
    }

    /// What has come; nothing at the connection's end.
    fn read(&self, lane: &Lane, buffer: &mut [u8], until: Instant) -> Result<usize> {
        loop {
            if !self.wait(&[(lane.as_fd(), PollFlags::POLLIN)], until)? {
                return Err(Error::Unsupported("it does not answer".into()));
            }
            match recv(lane.as_fd().as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(count) => return Ok(count),
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(_) => return Ok(0),
            }
        }
    }

    /// False when nothing is ready in time. What is posted says nothing any more.
    fn wait(&self, fds: &[(BorrowedFd<'_>, PollFlags)], until: Instant) -> Result<bool> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.inbox.wait_for(fds, Some(left))? {
                Wake::Ready(_) => return Ok(true),
                Wake::Timeout => return Ok(false),
                Wake::Signal => return Err(Error::Interrupted("nobody is told".into())),
                Wake::Message(_) => {}
            }
        }
    }
}
