//! The receive buffer between a socket and its reader, with TLS records if there is TLS.
//!
//! The channel moves with its lane. Hello and welcome pass through it; then it belongs to the
//! thread that serves the lane, whose ring receives into its buffer, or to the pump.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::runtime::polling::poll;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{MsgFlags, Shutdown, recv, send, shutdown};
use rustls::Error;
use umem_ring::Bytes;

use super::explain;
use super::records::{Outgoing, RECORD_BYTES_MAX, Records, Window};

/// One connection's receiving direction, and with TLS its sending direction too.
pub(crate) struct Channel {
    records: Option<Records>,
    /// None while a receive is in flight.
    buffer: Option<Bytes>,
    window: Window,
    end: Option<End>,
}

/// Why a TLS channel receives nothing more.
enum End {
    /// The peer has sent close_notify.
    Closed,
    /// The received data is invalid.
    Broken(Error),
    /// The connection has ended without close_notify.
    Cut,
}

impl Channel {
    /// Without TLS, with a buffer of `bytes`.
    pub(crate) fn clear(bytes: usize) -> Channel {
        let buffer = Some(Bytes::with_capacity(bytes));
        Channel { records: None, buffer, window: Window::default(), end: None }
    }

    /// After a handshake, with the data already decrypted, and the data received and not decrypted
    /// yet.
    pub(crate) fn secured(
        records: Records,
        plain: &[u8],
        sealed: &[u8],
        peer_has_closed: bool,
    ) -> Channel {
        let mut buffer = [plain, sealed].concat();
        let (plain, all) = (plain.len(), buffer.len());
        buffer.resize(all + RECORD_BYTES_MAX, 0);
        let window = Window { plain: 0..plain, sealed: plain..all };
        let buffer = Some(Bytes::from(buffer));
        let end = peer_has_closed.then_some(End::Closed);
        Channel { records: Some(records), buffer, window, end }
    }

    /// Makes room for a stream of which `bytes` may have to wait, and their records.
    pub(crate) fn widen(&mut self, bytes: usize) {
        let mut buffer = self.take_buffer().into_vec();
        buffer.resize(buffer.len().max(bytes + RECORD_BYTES_MAX), 0);
        self.buffer = Some(Bytes::from(buffer));
    }

    fn take_buffer(&mut self) -> Bytes {
        self.buffer.take().expect("one receive at a time")
    }

    pub(crate) fn has_tls(&self) -> bool {
        self.records.is_some()
    }

    /// With TLS: appends data to send, in records of the largest size. [`Channel::flush`] or
    /// [`Channel::close`] makes the last record. An error is the reason why no more can be sent.
    pub(crate) fn append(&mut self, out: &mut Outgoing, bytes: &[u8]) -> Result<(), String> {
        told(self.records_mut().append(out, bytes))
    }

    /// The same for `bytes` bytes that `copy` provides: those from an offset on, as many as its
    /// slice has room for.
    pub(crate) fn append_with(
        &mut self,
        out: &mut Outgoing,
        bytes: usize,
        copy: impl FnMut(usize, &mut [u8]),
    ) -> Result<(), String> {
        told(self.records_mut().append_with(out, bytes, copy))
    }

    /// With TLS: makes the last record of the appended data.
    pub(crate) fn flush(&mut self, out: &mut Outgoing) -> Result<(), String> {
        told(self.records_mut().flush(out))
    }

    /// With TLS: the same, followed by close_notify.
    pub(crate) fn close(&mut self, out: &mut Outgoing) -> Result<(), String> {
        told(self.records_mut().close(out))
    }

    fn records_mut(&mut self) -> &mut Records {
        self.records.as_mut().expect("records are requested only with TLS")
    }

    /// Whether no receive is in flight, and none has ended without returning its buffer.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.buffer.is_some()
    }

    /// The decrypted data; none while a receive is in flight.
    pub(crate) fn plain(&self) -> &[u8] {
        match &self.buffer {
            Some(buffer) => &buffer.as_slice()[self.window.plain.clone()],
            None => &[],
        }
    }

    /// Removes `count` taken bytes.
    pub(crate) fn take(&mut self, count: usize) {
        self.window.plain.start += count;
        assert!(
            self.window.plain.start <= self.window.plain.end,
            "at most the data present is taken"
        );
    }

    /// The buffer for the next receive, after moving leftover data to its front.
    pub(crate) fn free(&mut self) -> Bytes {
        let mut buffer = self.take_buffer();
        let start = self.window.pack(buffer.as_mut_slice());
        let end = buffer.capacity();
        debug_assert!(start < end, "received data is taken");
        buffer.slice(start..end)
    }

    /// A receive has put `count` bytes there; 0 at the connection's end.
    pub(crate) fn filled(&mut self, buffer: Bytes, count: usize) {
        let whole = buffer.capacity();
        let mut buffer = buffer.slice(0..whole);
        match &mut self.records {
            None => self.window.plain.end += count,
            Some(_) if self.end.is_some() => {}
            Some(_) if count == 0 => self.end = Some(End::Cut),
            Some(records) => {
                self.window.sealed.end += count;
                match records.open(buffer.as_mut_slice(), &mut self.window) {
                    Err(error) => self.end = Some(End::Broken(error)),
                    Ok(()) if records.peer_has_closed() => self.end = Some(End::Closed),
                    Ok(()) => {}
                }
            }
        }
        self.buffer = Some(buffer);
    }

    /// Receives without waiting: the number of bytes, 0 at the end.
    pub(crate) fn receive(&mut self, socket: &impl AsFd) -> nix::Result<usize> {
        let mut room = self.free();
        let socket = socket.as_fd().as_raw_fd();
        let received = recv(socket, room.as_mut_slice(), MsgFlags::MSG_DONTWAIT);
        match received {
            Ok(count) => self.filled(room, count),
            Err(_) => {
                let whole = room.capacity();
                self.buffer = Some(room.slice(0..whole));
            }
        }
        received
    }

    /// With TLS: whether the received data was invalid.
    pub(crate) fn is_broken(&self) -> bool {
        matches!(self.end, Some(End::Broken(_)))
    }

    /// With TLS: nothing more comes.
    pub(crate) fn has_ended(&self) -> bool {
        self.end.is_some()
    }

    /// With TLS: why the connection is unusable, unless the peer has closed it in order.
    pub(crate) fn cause(&self) -> Option<String> {
        match self.end.as_ref()? {
            End::Closed => None,
            End::Broken(error) => Some(explain::failure(error)),
            End::Cut => Some("the connection was cut without notice".into()),
        }
    }

    /// Appends an alert for the peer's error, if there is one.
    pub(crate) fn protest(&mut self, out: &mut Outgoing) {
        if let (Some(records), Some(End::Broken(error))) = (&mut self.records, &self.end) {
            // Without the alert the peer sees only that the connection ends.
            let _ = records.protest(out, error);
        }
    }

    /// With TLS, at once and if there is room: sends an alert for the peer's error, or otherwise
    /// close_notify. Only when nothing else is in flight.
    pub(crate) fn part(&mut self, socket: &OwnedFd) {
        let mut out = Outgoing::default();
        match (&mut self.records, &self.end) {
            (None, _) => return,
            (Some(_), Some(End::Broken(_))) => self.protest(&mut out),
            (Some(records), _) => {
                // Without close_notify the peer sees only that the connection ends.
                let _ = records.close(&mut out);
            }
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let _ = send(socket.as_raw_fd(), out.pending(), flags);
    }

    /// Waits until the peer has ended the connection too, at most `patience`: closing a socket with
    /// unread data would send RST and discard data in flight.
    pub(crate) fn linger(&mut self, socket: &OwnedFd, patience: Duration) {
        if self.records.is_none() || self.buffer.is_none() {
            return;
        }
        let _ = shutdown(socket.as_raw_fd(), Shutdown::Write);
        let deadline = Instant::now() + patience;
        while self.end.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let plain = self.window.plain.len();
            self.take(plain);
            match self.receive(socket) {
                Ok(1..) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                    if matches!(poll(&mut fds, timeout), Ok(0)) {
                        return;
                    }
                }
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// Reads the bytes available, without waiting: none at the end.
    pub(crate) fn hear(&mut self, socket: &impl AsFd, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let plain = self.plain();
            if !plain.is_empty() {
                let count = plain.len().min(into.len());
                into[..count].copy_from_slice(&plain[..count]);
                self.take(count);
                return Ok(count);
            }
            if self.has_ended() {
                return Ok(0);
            }
            match self.receive(socket) {
                Ok(0) if !self.has_tls() => return Ok(0),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// The bytes as they are sent.
    pub(crate) fn sealed(&mut self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        if !self.has_tls() {
            return Ok(bytes.to_vec());
        }
        let mut out = Outgoing::default();
        let made = self.append(&mut out, bytes).and_then(|()| self.flush(&mut out));
        made.map_err(io::Error::other)?;
        Ok(out.pending().to_vec())
    }
}

fn told(result: Result<(), Error>) -> Result<(), String> {
    result.map_err(|error| format!("TLS: {}", explain::failure(&error)))
}

#[cfg(test)]
mod tests;
