//! Lanes: the connections between source and destination, up to the point where a ring takes over.
//!
//! The source dials, or both sides were given one connection that all lanes share. Each lane opens
//! with its hello and the destination's welcome; a signal ends the wait for either. From then on
//! the lane's descriptor belongs to the ring of the thread that serves it.

mod greeting;
mod hearing;
mod listener;
mod severing;
#[cfg(test)]
mod tests;
mod tuning;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use umem_wire::{Capabilities, Fault, Frame, LaneRole, Seal, transmit};

use super::tls::{Channel, Fate};
use crate::error::{Context, Error, Result, lane_name};
use crate::runtime::polling::poll;

pub(crate) use greeting::{
    HelloBytes, Session, capabilities, capabilities_with, new_session, refuse,
};
pub(crate) use hearing::Hearing;
pub(crate) use listener::{Listener, not_bound};
pub(crate) use severing::{ShutdownHandle, sever};
use tuning::{
    BACKGROUND_TIMEOUT_MS, DEMAND_TIMEOUT_MS, NOTSENT_LOWAT_BYTES, go_first, is_tcp, tune,
};
pub(crate) use tuning::{
    CONGESTION_CONTROL, SHARED_QUEUE_BYTES, choose_congestion, setsockopt_raw,
};

/// How long either side waits for the other's hello. A silent peer is not umem.
///
/// On an existing connection the other end may be handed to a umem at any time, so its first byte
/// is awaited without a limit. This limit holds from the first byte on.
pub(crate) const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// How long after the loss of a bulk lane the peer's reason may still come: a peer that gives up
/// sends it on the demand lane before it closes any lane, and lanes are not ordered against each
/// other.
pub(crate) const CAUSE_PATIENCE: Duration = Duration::from_millis(250);

/// A connected lane.
#[derive(Clone)]
pub(crate) struct Lane {
    socket: Arc<OwnedFd>,
    /// Named in errors: `demand lane`, `bulk lane 2`.
    pub(crate) name: String,
    /// The congestion control that the kernel uses for the connection; none for unix sockets.
    pub(crate) congestion: Option<String>,
    /// Unsent bytes that the kernel may queue for the lane.
    pub(crate) queue_bytes: u32,
    /// The capabilities of both sides; known once the lane is open.
    pub(crate) capabilities: Capabilities,
    /// With TLS: the fate of the connection …
    fate: Option<Arc<Fate>>,
    /// … and the connection, which the pump owns.
    connection: Option<Weak<OwnedFd>>,
    /// With TLS in the lane's own thread: the TLS state, until that thread takes it.
    channel: Option<Arc<Mutex<Option<Box<Channel>>>>>,
}

impl Lane {
    pub(crate) fn socket(&self) -> Arc<OwnedFd> {
        self.socket.clone()
    }

    /// Sets the unsent bytes that the kernel queues for a TCP lane before the socket reports itself
    /// full.
    pub(crate) fn set_queue_bytes(&self, bytes: u32) -> nix::Result<()> {
        setsockopt_raw(self.socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, bytes)
    }

    /// The same socket for blocking reads and writes.
    pub(crate) fn blocking(&self) -> Result<File> {
        Ok(File::from(self.socket.try_clone().context(|| self.name.clone())?))
    }

    /// Whether both sides check the lane's data.
    pub(crate) fn is_checked(&self) -> bool {
        self.capabilities.contains(Capabilities::CHECKSUM)
    }

    /// The same lane, after a TLS handshake.
    pub(crate) fn secured(self, channel: Channel) -> Lane {
        Lane { channel: Some(Arc::new(Mutex::new(Some(Box::new(channel))))), ..self }
    }

    /// With TLS: takes the TLS state for the thread that serves the lane from now on.
    pub(crate) fn take_channel(&self) -> Option<Box<Channel>> {
        self.channel()?.take()
    }

    fn channel(&self) -> Option<MutexGuard<'_, Option<Box<Channel>>>> {
        let channel = self.channel.as_ref()?;
        Some(channel.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Bytes as they are sent before a thread serves the lane: TLS records if there is TLS.
    pub(crate) fn sealed(&self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        match self.channel().as_deref_mut() {
            Some(Some(channel)) => channel.sealed(bytes),
            _ => Ok(bytes.to_vec()),
        }
    }

    /// Sends bytes before a thread serves the lane. Waits for room.
    pub(crate) fn say(&self, bytes: &[u8]) -> Result<()> {
        let what = || self.name.clone();
        let bytes = self.sealed(bytes).context(what)?;
        send_all(&self.socket, &bytes).context(what)
    }

    /// Receives the bytes available, before a thread serves the lane, without waiting: none at the
    /// end.
    fn hear(&self, into: &mut [u8]) -> io::Result<usize> {
        match self.channel().as_deref_mut() {
            Some(Some(channel)) => channel.hear(&self.socket, into),
            _ => Ok(recv(self.socket.as_raw_fd(), into, MsgFlags::MSG_DONTWAIT)?),
        }
    }

    /// The same lane, behind a TLS pump: `socket` leads to the pump.
    pub(crate) fn behind(self, socket: OwnedFd, fate: Arc<Fate>) -> Lane {
        let connection = Some(Arc::downgrade(&self.socket));
        Lane { socket: Arc::new(socket), fate: Some(fate), connection, channel: None, ..self }
    }

    /// With TLS: the reason why the connection broke, if it did, until a thread serves the lane.
    pub(crate) fn cause(&self) -> Option<String> {
        match self.channel().as_deref() {
            Some(Some(channel)) => channel.cause(),
            _ => self.fate.as_ref().and_then(|fate| fate.cause()).map(str::to_owned),
        }
    }

    /// The same lane, with its role.
    pub(crate) fn assign(self, role: LaneRole, index: u16) -> Lane {
        let name = lane_name(role, index);
        if let Some(fate) = &self.fate {
            fate.assign(&name, role);
        }
        // A lane that a source has dialled had its role from the beginning.
        if role == LaneRole::Demand && self.congestion.is_some() && self.name != name {
            let behind = self.connection.as_ref().and_then(Weak::upgrade);
            let connection = behind.as_ref().unwrap_or(&self.socket);
            let _ = setsockopt(connection, sockopt::TcpUserTimeout, &DEMAND_TIMEOUT_MS);
            go_first(connection);
        }
        Lane { name, ..self }
    }

    /// A lane with a connection of its own, owned by umem. The socket blocks from now on, as
    /// splice(2) has to wait for it.
    pub(crate) fn new(socket: OwnedFd, name: String) -> Result<Lane> {
        let flags = fcntl(&socket, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
        let flags = flags.context(|| name.clone())?;
        if flags.contains(OFlag::O_NONBLOCK) {
            let flags = FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK);
            fcntl(&socket, flags).context(|| name.clone())?;
        }
        let is_demand = name == lane_name(LaneRole::Demand, 0);
        let timeout_ms = if is_demand { DEMAND_TIMEOUT_MS } else { BACKGROUND_TIMEOUT_MS };
        let lane = Lane::tuned(socket, name, NOTSENT_LOWAT_BYTES, timeout_ms)?;
        if is_demand && lane.congestion.is_some() {
            go_first(&lane.socket);
        }
        Ok(lane)
    }

    /// The one lane of a connection that everything shares. Other processes may have the socket,
    /// too (`fd:N`), so its blocking mode is not changed; rings wait for it in either mode.
    pub(crate) fn shared(socket: OwnedFd) -> Result<Lane> {
        let name = lane_name(LaneRole::Demand, 0);
        let lane = Lane::tuned(socket, name, SHARED_QUEUE_BYTES, BACKGROUND_TIMEOUT_MS)?;
        if lane.congestion.is_none() {
            // The kernel doubles it, for its own bookkeeping (socket(7)).
            setsockopt(&lane.socket, sockopt::SndBuf, &(SHARED_QUEUE_BYTES as usize))
                .context(|| lane.name.clone())?;
        }
        Ok(lane)
    }

    fn tuned(socket: OwnedFd, name: String, queue_bytes: u32, timeout_ms: u32) -> Result<Lane> {
        let congestion = if is_tcp(&socket) {
            Some(tune(socket.as_fd(), queue_bytes, timeout_ms).context(|| name.clone())?)
        } else {
            None
        };
        let capabilities = Capabilities::NONE;
        let socket = Arc::new(socket);
        let (fate, connection, channel) = (None, None, None);
        Ok(Lane { socket, name, congestion, queue_bytes, capabilities, fate, connection, channel })
    }
}

impl AsFd for Lane {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends all bytes. Waits for room, also on a nonblocking socket.
pub(crate) fn send_all(socket: &OwnedFd, mut bytes: &[u8]) -> nix::Result<()> {
    while !bytes.is_empty() {
        match nix::sys::socket::send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::EAGAIN) => {
                match poll(
                    &mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)],
                    PollTimeout::NONE,
                ) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(errno) => return Err(errno),
                }
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Sends the reason for giving up on a lane that no ring serves (any more), `checked` or not. Never
/// waits: a peer that does not read, or has closed, learns it from the lane's end.
pub(crate) fn tell(socket: &OwnedFd, checked: bool, error: &Error) {
    tell_fault(socket, checked, error.to_fault());
}

/// Sends a fault in the same way.
pub(crate) fn tell_fault(socket: &OwnedFd, checked: bool, fault: Fault) {
    let mut bytes = Vec::new();
    transmit::encode(&Frame::Error(fault), &mut bytes);
    Seal::new(checked).frames(&mut bytes);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let _ = nix::sys::socket::send(socket.as_raw_fd(), &bytes, flags);
}
