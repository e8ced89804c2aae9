//! The thread between a TLS connection and the demand lane. It encrypts the bytes that the lane
//! sends and decrypts the bytes for the lane. (Bulk lanes do that in their own threads.)
//!
//! ```text
//! lane's ring <-- socket pair --> pump: plaintext | records <-- TCP --> the other side's pump
//! ```
//!
//! The pump reads from the lane only when all records have been sent, and from the connection only
//! when the lane has taken everything. So it holds one buffer each way, and each end feels the
//! other's backpressure. When the lane closes, its remaining bytes are still sent, then
//! close_notify. When a close_notify comes, the lane ends after the last byte. A connection that
//! ends without one has been cut: the lane ends too, and [`Fate`] holds the reason.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, recv, send, setsockopt, shutdown,
    socketpair, sockopt,
};
use umem_wire::LaneRole;
use umem_wire::limits::LANES_MAX;

use crate::error::{Context, Error, Result};
use crate::runtime::polling::poll;
use crate::runtime::{panics, priority};
use crate::transport::lane::{self, Lane};
use crate::transport::tls::{Channel, Fate, Outgoing};

/// Bytes of a lane that are encrypted at once: eight records, which fit a core's L2 cache together
/// with their plaintext.
const CHUNK_BYTES: usize = 128 << 10;

/// How long a connection may send nothing after its lane has closed, before it is dropped; received
/// data does not extend it.
const LINGER: Duration = Duration::from_secs(10);

/// Most of these periods in all, for the last buffer and the data that the kernel has queued.
const LINGERS_MAX: u32 = 3;

/// Most pumps at a time: those of a lane in use, of its replacement, and of lost lanes with data
/// left to send. When there are more the oldest is cut.
const RUNNING_MAX: usize = 8;

/// Most broken connections that are remembered: all of a session's lanes.
const CAUSES_MAX: usize = LANES_MAX as usize + 1;

/// All pumps of one side. Dropping it ends them, after all data of their lanes has been sent.
pub(super) struct Pumps {
    running: Mutex<Vec<Running>>,
    /// [`LINGER`]
    linger: Duration,
}

impl Default for Pumps {
    fn default() -> Pumps {
        Pumps::lingering(LINGER)
    }
}

impl Pumps {
    fn lingering(linger: Duration) -> Pumps {
        Pumps { running: Mutex::default(), linger }
    }
}

struct Running {
    fate: Arc<Fate>,
    thread: JoinHandle<()>,
    connection: Weak<OwnedFd>,
    /// The lane's end, which is closed when its last user drops it.
    lane: Weak<OwnedFd>,
}

impl Pumps {
    /// Puts a pump before a TLS lane, if it is to be a demand lane.
    pub(super) fn seat(&self, lane: Lane, fate: Arc<Fate>, role: LaneRole) -> Result<Lane> {
        if role != LaneRole::Demand {
            return Ok(lane);
        }
        match lane.take_channel() {
            Some(channel) => self.start(lane, *channel, fate),
            None => Ok(lane),
        }
    }

    /// Puts a pump before a connection, and returns the lane behind it.
    fn start(&self, lane: Lane, mut channel: Channel, fate: Arc<Fate>) -> Result<Lane> {
        let (ours, theirs) = pair(lane.queue_bytes).context(|| "socketpair")?;
        channel.widen(CHUNK_BYTES);
        let pump = Pump {
            connection: lane.socket(),
            lane: theirs,
            chunk: vec![0; CHUNK_BYTES],
            received_all: channel.has_ended(),
            channel,
            outgoing: Outgoing::with_room(CHUNK_BYTES),
            lane_ended: None,
            until: None,
            linger: self.linger,
            sent_all: false,
            showed_end: false,
            is_cut: false,
            fate: fate.clone(),
        };
        let connection = Arc::downgrade(&pump.connection);
        let mut pumps = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        forget_ended(&mut pumps);
        cut_oldest(&pumps);
        let thread = std::thread::Builder::new()
            .name("umem-tls".into())
            .spawn(move || pump.run_to_its_end())
            .context(|| "starting thread umem-tls")?;
        let lane = lane.behind(ours, fate.clone());
        let running = Running { fate, thread, connection, lane: Arc::downgrade(&lane.socket()) };
        pumps.push(running);
        Ok(lane)
    }

    /// Adds the reason why the connection broke, as TLS reports it, to the error of a lost lane.
    pub(super) fn explain(&self, error: Error) -> Error {
        let Error::Lost { side, lane, what } = error else {
            return error;
        };
        let pumps = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let fates = pumps.iter().rev().map(|pump| &pump.fate);
        let mut of_lane = fates.filter(|fate| fate.lane() == Some(&*lane));
        let what = match of_lane.find_map(|fate| fate.cause()) {
            Some(cause) => format!("{what} (TLS: {cause})"),
            None => what,
        };
        Error::Lost { side, lane, what }
    }
}

/// Forgets ended pumps except the last broken ones, for [`Pumps::explain`].
fn forget_ended(pumps: &mut Vec<Running>) {
    let tells = |pump: &Running| pump.fate.cause().is_some() && pump.fate.lane().is_some();
    pumps.retain(|pump| !pump.thread.is_finished() || tells(pump));
    let ended = pumps.iter().filter(|pump| pump.thread.is_finished()).count();
    let mut too_many = ended.saturating_sub(CAUSES_MAX);
    pumps.retain(|pump| {
        let goes = too_many > 0 && pump.thread.is_finished();
        too_many -= usize::from(goes);
        !goes
    });
}

/// Makes room for one more pump.
fn cut_oldest(pumps: &[Running]) {
    let running = || pumps.iter().filter(|pump| !pump.thread.is_finished());
    let too_many = (running().count() + 1).saturating_sub(RUNNING_MAX);
    for connection in running().take(too_many).filter_map(|pump| pump.connection.upgrade()) {
        lane::sever(&connection);
    }
}

impl Drop for Pumps {
    fn drop(&mut self) {
        let pumps = self.running.get_mut().unwrap_or_else(PoisonError::into_inner);
        for pump in pumps.iter() {
            if let Some(lane) = pump.lane.upgrade() {
                // Other owners may still hold the lane, without anything to send.
                let _ = shutdown(lane.as_raw_fd(), Shutdown::Both);
            }
        }
        for pump in pumps.drain(..) {
            let _ = pump.thread.join();
        }
    }
}

/// The lane's end and the pump's, which queue this many bytes.
fn pair(queue_bytes: u32) -> nix::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags)?;
    for socket in [&ours, &theirs] {
        let bytes = queue_bytes as usize;
        // A size above the system's limit takes a privilege; without it the limit applies.
        if setsockopt(socket, sockopt::SndBufForce, &bytes).is_err() {
            setsockopt(socket, sockopt::SndBuf, &bytes)?;
        }
    }
    Ok((ours, theirs))
}

struct Pump {
    connection: Arc<OwnedFd>,
    lane: OwnedFd,
    /// The received data, and the keys of both directions.
    channel: Channel,
    /// Records of the data that the lane has sent.
    outgoing: Outgoing,
    /// Data that the lane has sent, before encryption.
    chunk: Vec<u8>,
    /// Set when the lane has ended: the time at which data was last sent.
    lane_ended: Option<Instant>,
    /// The time at which the pump ends, even if data still moves.
    until: Option<Instant>,
    /// [`LINGER`]
    linger: Duration,
    /// Everything has been sent.
    sent_all: bool,
    /// Everything has been received.
    received_all: bool,
    /// The lane has been shown its end.
    showed_end: bool,
    /// The connection is broken.
    is_cut: bool,
    fate: Arc<Fate>,
}

impl Pump {
    /// A pump that panics loses its connection, as with any other cause.
    fn run_to_its_end(mut self) {
        let fate = self.fate.clone();
        let run = panics::caught(|| {
            self.run();
            Ok(())
        });
        if let Err(panic) = run {
            fate.broke(panic.to_string());
        }
        // Both ends see the end only now.
    }

    fn run(&mut self) {
        loop {
            panics::point(format_args!("tls"));
            self.take_role();
            let sent = self.take_from_lane() | self.send();
            let received = self.receive() | self.give_to_lane();
            let is_done = self.is_cut || (self.sent_all && self.received_all);
            if is_done && self.channel.plain().is_empty() {
                return;
            }
            if sent {
                self.lane_ended = self.lane_ended.map(|_| Instant::now());
            }
            if self.left().is_some_and(|left| left.is_zero()) {
                return;
            }
            if !sent && !received && !self.wait() {
                return;
            }
        }
    }

    /// The time left to wait after the lane has closed.
    fn left(&mut self) -> Option<Duration> {
        let (ended, now) = (self.lane_ended?, Instant::now());
        let until = *self.until.get_or_insert(now + LINGERS_MAX * self.linger);
        Some(until.min(ended + self.linger).saturating_duration_since(now))
    }

    /// Demand pages take precedence, as in the threads of their lanes.
    fn take_role(&self) {
        let Some(role) = self.fate.newly_assigned() else { return };
        if role == LaneRole::Demand as u8 {
            priority::go_first();
        } else {
            priority::go_early();
        }
    }

    /// Encrypts the lane's data, or its end, once everything before it has been sent.
    fn take_from_lane(&mut self) -> bool {
        if self.lane_ended.is_some() || self.is_cut || self.has_outgoing() {
            return false;
        }
        let (channel, out) = (&mut self.channel, &mut self.outgoing);
        let made = match recv(self.lane.as_raw_fd(), &mut self.chunk, MsgFlags::MSG_DONTWAIT) {
            Ok(count) if count > 0 => {
                channel.append(out, &self.chunk[..count]).and_then(|()| channel.flush(out))
            }
            Err(Errno::EAGAIN | Errno::EINTR) => return false,
            // The lane has closed, with or without having read everything.
            Ok(_) | Err(_) => {
                self.lane_ended = Some(Instant::now());
                channel.close(out)
            }
        };
        if let Err(cause) = made {
            self.cut(cause);
        }
        true
    }

    fn has_outgoing(&self) -> bool {
        !self.outgoing.pending().is_empty()
    }

    /// Sends records; after the last of them the connection's end.
    fn send(&mut self) -> bool {
        let mut moved = false;
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        while self.has_outgoing() && !self.sent_all {
            match send(self.connection.as_raw_fd(), self.outgoing.pending(), flags) {
                Ok(count) => {
                    self.outgoing.sent(count);
                    moved = true;
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return moved,
                Err(errno) => {
                    // Data that came before the break may still be read.
                    self.fate.broke(errno.desc().into());
                    self.lane_ended.get_or_insert_with(Instant::now);
                    self.sent_all = true;
                    return true;
                }
            }
        }
        if self.lane_ended.is_some() && !self.sent_all {
            let _ = shutdown(self.connection.as_raw_fd(), Shutdown::Write);
            self.sent_all = true;
            moved = true;
        }
        moved
    }

    /// Decrypts received data, once the lane has taken everything before it.
    fn receive(&mut self) -> bool {
        if self.received_all || self.is_cut || !self.channel.plain().is_empty() {
            return false;
        }
        match self.channel.receive(&self.connection) {
            Ok(_) => {
                self.received_all = self.channel.has_ended();
                if let Some(cause) = self.channel.cause() {
                    // The peer is sent an alert, if it is still there.
                    self.channel.protest(&mut self.outgoing);
                    self.send();
                    self.cut(cause);
                }
            }
            Err(Errno::EAGAIN | Errno::EINTR) => return false,
            Err(errno) => self.cut(errno.desc().into()),
        }
        true
    }

    /// Hands decrypted data to the lane; after the last of it the lane's end.
    fn give_to_lane(&mut self) -> bool {
        let mut moved = false;
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        loop {
            let plain = self.channel.plain();
            if plain.is_empty() {
                break;
            }
            let left = plain.len();
            match send(self.lane.as_raw_fd(), plain, flags) {
                Ok(count) => {
                    self.channel.take(count);
                    moved = true;
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return moved,
                // The lane has closed and needs no more data.
                Err(_) => self.channel.take(left),
            }
        }
        if self.received_all && !self.showed_end {
            let _ = shutdown(self.lane.as_raw_fd(), Shutdown::Write);
            self.showed_end = true;
            moved = true;
        }
        moved
    }

    /// The connection is lost. Received data is still handed to the lane, then the pump ends.
    fn cut(&mut self, cause: String) {
        self.fate.broke(cause);
        self.is_cut = true;
    }

    /// Waits until something can move. False: nothing has for too long.
    fn wait(&mut self) -> bool {
        let left = self.left();
        let is_whole = !self.is_cut;
        let takes = is_whole && self.lane_ended.is_none() && !self.has_outgoing();
        let gives = !self.channel.plain().is_empty();
        let sends = is_whole && self.has_outgoing() && !self.sent_all;
        let receives = is_whole && !gives && !self.received_all;
        let flags = |input, output| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, input);
            flags.set(PollFlags::POLLOUT, output);
            flags
        };
        let (at_lane, at_connection) = (flags(takes, gives), flags(receives, sends));
        let mut fds: Vec<PollFd<'_>> =
            [(self.lane.as_fd(), at_lane), (self.connection.as_fd(), at_connection)]
                .into_iter()
                // Polling a closed descriptor without events would report the hang-up without end.
                .filter(|(_, flags)| !flags.is_empty())
                .map(|(fd, flags)| PollFd::new(fd, flags))
                .collect();
        let timeout = match left {
            None => PollTimeout::NONE,
            Some(left) => PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX),
        };
        match poll(&mut fds, timeout) {
            Ok(0) => false,
            Ok(_) | Err(_) => true,
        }
    }
}

#[cfg(test)]
mod tests;
