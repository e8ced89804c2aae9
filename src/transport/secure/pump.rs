//! The thread between a TLS connection and the demand lane, which encrypts what the lane sends and decrypts
//! what comes for it. (Bulk lanes do that in their own threads.)
//!
//! ```text
//! lane's ring <-- socket pair --> pump: plaintext | records <-- TCP --> the other side's pump
//! ```
//!
//! It takes from the lane only when all records have left, and from the connection only when the lane has
//! taken everything, so that it holds one buffer each way and both ends feel the other's pace. When the
//! lane closes, what it has sent still goes out, then the notice that nothing more comes; when such a
//! notice comes, the lane's end shows behind the last byte. A connection that ends without one has been
//! cut: the lane ends too, and [`Fate`] says why.

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

/// Bytes that are taken from a lane and encrypted at once: eight records, which fit a processor's second
/// cache beside their plaintext.
const CHUNK_BYTES: usize = 128 << 10;

/// How long nothing may leave by a connection after its lane has closed, before it is given up; what still comes
/// does not count.
const LINGER: Duration = Duration::from_secs(10);

/// How much longer that may take in all, for the last buffer and what the kernel has queued.
const LINGERS_MAX: u32 = 3;

/// Pumps that run at a time: those of a lane in use, of one that takes its place, and of lanes that were lost and have
/// something left to say. When there are more the oldest is cut.
const RUNNING_MAX: usize = 8;

/// Connections that broke and are remembered: all of a session's lanes.
const CAUSES_MAX: usize = LANES_MAX as usize + 1;

/// All pumps of one side. When it goes they end: what lanes have sent leaves first.
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
    /// The lane's end, which is closed when nobody needs it any more.
    lane: Weak<OwnedFd>,
}

impl Pumps {
    /// Puts a pump before a lane of TLS, if it is to be a demand lane.
    pub(super) fn seat(&self, lane: Lane, fate: Arc<Fate>, role: LaneRole) -> Result<Lane> {
        if role != LaneRole::Demand {
            return Ok(lane);
        }
        match lane.take_channel() {
            Some(channel) => self.start(lane, *channel, fate),
            None => Ok(lane),
        }
    }

    /// Puts a pump before a connection, and gives back the lane behind it.
    fn start(&self, lane: Lane, mut channel: Channel, fate: Arc<Fate>) -> Result<Lane> {
        let (ours, theirs) = pair(lane.queue_bytes).context(|| "socketpair")?;
        channel.widen(CHUNK_BYTES);
        let pump = Pump {
            connection: lane.socket(),
            lane: theirs,
            chunk: vec![0; CHUNK_BYTES],
            heard_all: channel.has_ended(),
            channel,
            outgoing: Outgoing::with_room(CHUNK_BYTES),
            lane_ended: None,
            until: None,
            linger: self.linger,
            said_all: false,
            told_end: false,
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

    /// Adds to the error of a lost lane why its connection broke, where TLS knows.
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

/// Keeps of those that have ended only the last that broke, for [`Pumps::explain`].
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

/// Makes room for one more.
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
                // Somebody still has it, who has nothing to say any more.
                let _ = shutdown(lane.as_raw_fd(), Shutdown::Both);
            }
        }
        for pump in pumps.drain(..) {
            let _ = pump.thread.join();
        }
    }
}

/// A lane's end and the pump's, which queue so many bytes.
fn pair(queue_bytes: u32) -> nix::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags)?;
    for socket in [&ours, &theirs] {
        let bytes = queue_bytes as usize;
        // Past the system's limit it takes a privilege, without which that limit is what there is.
        if setsockopt(socket, sockopt::SndBufForce, &bytes).is_err() {
            setsockopt(socket, sockopt::SndBuf, &bytes)?;
        }
    }
    Ok((ours, theirs))
}

struct Pump {
    connection: Arc<OwnedFd>,
    lane: OwnedFd,
    /// What has come for the lane, and how both ways are secured.
    channel: Channel,
    /// Records of what the lane has sent.
    outgoing: Outgoing,
    /// What the lane has sent, before it is encrypted.
    chunk: Vec<u8>,
    /// The lane sends nothing any more: when something last left.
    lane_ended: Option<Instant>,
    /// Then this ends, whatever still moves.
    until: Option<Instant>,
    /// [`LINGER`]
    linger: Duration,
    /// Nothing more leaves.
    said_all: bool,
    /// Nothing more comes.
    heard_all: bool,
    /// The lane has been shown so.
    told_end: bool,
    /// The connection is of no more use.
    is_cut: bool,
    fate: Arc<Fate>,
}

impl Pump {
    /// One that panics loses its connection, as any other cause would have it.
    fn run_to_its_end(mut self) {
        let fate = self.fate.clone();
        let run = panics::caught(|| {
            self.run();
            Ok(())
        });
        if let Err(panic) = run {
            fate.broke(panic.to_string());
        }
        // Both ends show it only now.
    }

    fn run(&mut self) {
        loop {
            panics::point(format_args!("tls"));
            self.take_role();
            let sent = self.take_from_lane() | self.send();
            let received = self.receive() | self.give_to_lane();
            let is_done = self.is_cut || (self.said_all && self.heard_all);
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

    /// How long there is still something to wait for, once the lane has closed.
    fn left(&mut self) -> Option<Duration> {
        let (ended, now) = (self.lane_ended?, Instant::now());
        let until = *self.until.get_or_insert(now + LINGERS_MAX * self.linger);
        Some(until.min(ended + self.linger).saturating_duration_since(now))
    }

    /// Demand pages go first, as in the threads of their lanes.
    fn take_role(&self) {
        let Some(role) = self.fate.newly_assigned() else { return };
        if role == LaneRole::Demand as u8 {
            priority::go_first();
        } else {
            priority::go_early();
        }
    }

    /// Encrypts what the lane has sent, or its end, if everything before it has left.
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
            // It has closed, with or without having read everything.
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
        while self.has_outgoing() && !self.said_all {
            match send(self.connection.as_raw_fd(), self.outgoing.pending(), flags) {
                Ok(count) => {
                    self.outgoing.sent(count);
                    moved = true;
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return moved,
                Err(errno) => {
                    // What has come before it broke may still be read.
                    self.fate.broke(errno.desc().into());
                    self.lane_ended.get_or_insert_with(Instant::now);
                    self.said_all = true;
                    return true;
                }
            }
        }
        if self.lane_ended.is_some() && !self.said_all {
            let _ = shutdown(self.connection.as_raw_fd(), Shutdown::Write);
            self.said_all = true;
            moved = true;
        }
        moved
    }

    /// Decrypts what has come, if the lane has taken everything before it.
    fn receive(&mut self) -> bool {
        if self.heard_all || self.is_cut || !self.channel.plain().is_empty() {
            return false;
        }
        match self.channel.receive(&self.connection) {
            Ok(_) => {
                self.heard_all = self.channel.has_ended();
                if let Some(cause) = self.channel.cause() {
                    // The other side is told why; it may have gone.
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

    /// Hands over what has been decrypted; after the last of it the lane's end.
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
                // It has closed; nobody wants the rest.
                Err(_) => self.channel.take(left),
            }
        }
        if self.heard_all && !self.told_end {
            let _ = shutdown(self.lane.as_raw_fd(), Shutdown::Write);
            self.told_end = true;
            moved = true;
        }
        moved
    }

    /// The connection is lost. What has come is still handed over, and then this ends.
    fn cut(&mut self, cause: String) {
        self.fate.broke(cause);
        self.is_cut = true;
    }

    /// Waits until something can move. False: nothing has, for too long.
    fn wait(&mut self) -> bool {
        let left = self.left();
        let is_whole = !self.is_cut;
        let takes = is_whole && self.lane_ended.is_none() && !self.has_outgoing();
        let gives = !self.channel.plain().is_empty();
        let sends = is_whole && self.has_outgoing() && !self.said_all;
        let receives = is_whole && !gives && !self.heard_all;
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
                // One that nothing is asked of would tell that it was closed, for ever.
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
