//! One dialed attempt to notify the destination, when the source has no pages left to serve
//! ([`calling`](crate::control::calling)).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, recv};
use umem_wire::{Event, Fault, Frame, Receiver, RegionTable, Seal, Target, transmit};

use crate::control::calling::Called;
use crate::control::source::closing::GOODBYE_PING;
use crate::error::{Error, Result};
use crate::runtime::inbox::{Inbox, Wake};
use crate::source::{InboxMessage, peer};
use crate::transport::lane::{self, HELLO_TIMEOUT, Lane, Session};
use crate::transport::secure::{self, ClientAuth};
use crate::transport::uri::Uri;

/// The dialing side: the address, the session and its credentials.
pub(in crate::source) struct Caller<'a> {
    pub(in crate::source) uri: &'a Uri,
    pub(in crate::source) session: Session,
    pub(in crate::source) pass: &'a ClientAuth,
    pub(in crate::source) inbox: &'a Inbox<InboxMessage>,
}

impl Caller<'_> {
    /// Says goodbye, in one attempt. `landing` has the destination's landing units. Lanes are opened until `until` at
    /// most.
    pub(in crate::source) fn goodbye(
        &self,
        epoch: u32,
        until: Instant,
        landing: &RegionTable,
    ) -> Called {
        self.call(epoch, until, |demand| self.part(demand, landing))
    }

    /// Reports why the migration cannot continue, in one attempt.
    pub(in crate::source) fn gave_up(&self, epoch: u32, until: Instant, why: &Fault) -> Called {
        self.call(epoch, until, |demand| self.say_why(demand, why))
    }

    fn call(&self, epoch: u32, until: Instant, say: impl FnOnce(&Lane) -> Result<()>) -> Called {
        if self.uri.is_one_connection() {
            return Called::NotHeard(Error::Unsupported(
                "the session had one connection, which cannot be opened again".into(),
            ));
        }
        match self.open(epoch, until) {
            Ok(lanes) => say(&lanes[0]).map_or_else(Called::NotHeard, |()| Called::Heard),
            Err(error) => Called::NotOpened(error),
        }
    }

    /// Tells a complete destination that the source sends no more pages. An error if the destination did not receive
    /// that; a destination that has exited does not need it.
    fn part(&self, demand: &Lane, landing: &RegionTable) -> Result<()> {
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
                Event::Error(fault) => return Err(peer(fault)),
                _ => {}
            }
        }
        match has_parted {
            true => Ok(()),
            false => Err(Error::Unsupported("the destination closed the connection".into())),
        }
    }

    /// Sends the reason why the migration cannot continue, and waits until the destination has read it.
    fn say_why(&self, demand: &Lane, why: &Fault) -> Result<()> {
        lane::tell_fault(&demand.socket(), demand.is_checked(), why.clone());
        let until = Instant::now() + HELLO_TIMEOUT;
        // Closing a socket with unread data sends RST and discards data in flight, so incoming data is read.
        let mut buffer = [0; 4096];
        while self.read(demand, &mut buffer, until)? > 0 {}
        Ok(())
    }

    /// Opens all lanes, the demand lane first.
    fn open(&self, epoch: u32, until: Instant) -> Result<Vec<Lane>> {
        let wait = |fds: &[(BorrowedFd<'_>, PollFlags)], limit: Option<Duration>| {
            let at = limit.map_or(until, |limit| until.min(Instant::now() + limit));
            self.wait(fds, at)
        };
        let open =
            |index| secure::dial(self.uri, &self.session.hello(index, epoch), self.pass, &wait);
        (0..=self.session.bulk_lanes).map(open).collect()
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
                unreachable!("a source receives no pages");
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

    /// Reads incoming bytes; 0 at the end of the connection.
    fn read(&self, lane: &Lane, buffer: &mut [u8], until: Instant) -> Result<usize> {
        loop {
            if !self.wait(&[(lane.as_fd(), PollFlags::POLLIN)], until)? {
                return Err(Error::Unsupported("the destination does not answer".into()));
            }
            match recv(lane.as_fd().as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(count) => return Ok(count),
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(_) => return Ok(0),
            }
        }
    }

    /// Waits for a descriptor; false after `until`. Posted messages no longer matter and are ignored.
    fn wait(&self, fds: &[(BorrowedFd<'_>, PollFlags)], until: Instant) -> Result<bool> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.inbox.wait_for(fds, Some(left))? {
                Wake::Ready(_) => return Ok(true),
                Wake::Timeout => return Ok(false),
                Wake::Signal => {
                    return Err(Error::Interrupted("the destination has not been notified".into()));
                }
                Wake::Message(_) => {}
            }
        }
    }
}
