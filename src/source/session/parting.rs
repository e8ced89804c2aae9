//! Dials to say one thing when nothing is left to be served, once ([`calling`](crate::control::calling)).

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

/// Who dials.
pub(in crate::source) struct Caller<'a> {
    pub(in crate::source) uri: &'a Uri,
    pub(in crate::source) session: Session,
    pub(in crate::source) pass: &'a ClientAuth,
    pub(in crate::source) inbox: &'a Inbox<InboxMessage>,
}

impl Caller<'_> {
    /// One attempt to say goodbye to a destination that has landed pages of these sizes. Lanes are opened until then
    /// at most.
    pub(in crate::source) fn goodbye(
        &self,
        epoch: u32,
        until: Instant,
        landing: &RegionTable,
    ) -> Called {
        self.call(epoch, until, |demand| self.part(demand, landing))
    }

    /// One attempt to say why nothing will go on.
    pub(in crate::source) fn gave_up(&self, epoch: u32, until: Instant, why: &Fault) -> Called {
        self.call(epoch, until, |demand| self.say_why(demand, why))
    }

    fn call(&self, epoch: u32, until: Instant, say: impl FnOnce(&Lane) -> Result<()>) -> Called {
        if self.uri.is_one_connection() {
            return Called::NotHeard(Error::Unsupported("it was one connection".into()));
        }
        match self.open(epoch, until) {
            Ok(lanes) => say(&lanes[0]).map_or_else(Called::NotHeard, |()| Called::Heard),
            Err(error) => Called::NotOpened(error),
        }
    }

    /// Says that nothing more is to come from here to a destination that has everything. An error where it could
    /// not be said, which a destination that has ended needs no more.
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
            false => Err(Error::Unsupported("it closed the connection".into())),
        }
    }

    /// Says why nothing will go on, and waits until that has been read.
    fn say_why(&self, demand: &Lane, why: &Fault) -> Result<()> {
        lane::tell_fault(&demand.socket(), demand.is_checked(), why.clone());
        let until = Instant::now() + HELLO_TIMEOUT;
        // What it says meanwhile is read, as a connection that is closed over it would be reset.
        let mut buffer = [0; 4096];
        while self.read(demand, &mut buffer, until)? > 0 {}
        Ok(())
    }

    /// All lanes, the demand lane first.
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
