//! rustls's side of a handshake: rustls interprets the records, this module reads and writes the
//! socket.
//!
//! Two rules keep rustls's unbuffered interface simple. Received data is processed at once, up to
//! an incomplete record, so that sending never meets a record that has to be read first. Data to
//! send is produced only when everything before it has been sent. When both sides have shown their
//! certificates the keys go to [`Records`], and rustls is used for key renewal alone.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, Error, ServerConfig};

use super::channel::Channel;
use super::explain;
use super::records::{Keys, RECORD_BYTES_MAX, Records};
use crate::runtime::inbox::{Interest, readable, writable};
use crate::transport::foreign;

/// Bytes of handshake messages that are kept until they are complete: rustls accepts no larger
/// message.
const HANDSHAKE_BYTES_MAX: usize = 64 << 10;

enum Connection {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// One side of a TLS connection, up to the end of its handshake, with the received records and
/// those to send.
pub(crate) struct Session {
    connection: Box<Connection>,
    incoming: Incoming,
    outgoing: Outgoing,
    peer_has_closed: bool,
}

/// rustls's result.
enum State {
    /// There is more to do.
    Moved,
    /// Input is needed; the handshake is not over.
    Blocked,
    /// Input is needed; the handshake is over.
    Open,
    PeerClosed,
}

impl Session {
    pub(crate) fn client(
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<Session, Error> {
        let connection = UnbufferedClientConnection::new(config, name)?;
        Ok(Session::new(Connection::Client(connection)))
    }

    pub(crate) fn server(config: Arc<ServerConfig>) -> Result<Session, Error> {
        let connection = UnbufferedServerConnection::new(config)?;
        Ok(Session::new(Connection::Server(connection)))
    }

    fn new(connection: Connection) -> Session {
        Session {
            connection: Box::new(connection),
            incoming: Incoming::with_room(RECORD_BYTES_MAX),
            outgoing: Outgoing::default(),
            peer_has_closed: false,
        }
    }

    fn common(&self) -> &CommonState {
        match &*self.connection {
            Connection::Client(connection) => connection,
            Connection::Server(connection) => connection,
        }
    }

    /// Receives records, without waiting: their number of bytes, 0 at the end.
    pub(crate) fn receive(&mut self, socket: &impl AsFd) -> nix::Result<usize> {
        let room = self.incoming.room();
        debug_assert!(!room.is_empty(), "complete records have been taken out");
        let count = recv(socket.as_fd().as_raw_fd(), room, MsgFlags::MSG_DONTWAIT)?;
        self.incoming.end += count;
        Ok(count)
    }

    /// Processes received data; plaintext after the handshake is appended to `plain`. False: the
    /// handshake is not over. After an error the alert for the peer is ready to be sent.
    pub(crate) fn read(&mut self, plain: &mut Vec<u8>) -> Result<bool, Error> {
        loop {
            match self.process(plain) {
                Ok(State::Moved) => {}
                Ok(State::PeerClosed) => self.peer_has_closed = true,
                Ok(State::Open) => return Ok(true),
                Ok(State::Blocked) => return Ok(false),
                Err(error) => {
                    // Pending output precedes any further reading.
                    while self.common().wants_write() {
                        let _ = self.process(plain);
                    }
                    return Err(error);
                }
            }
        }
    }

    fn process(&mut self, plain: &mut Vec<u8>) -> Result<State, Error> {
        let Session { connection, incoming, outgoing, .. } = self;
        let (discard, state) = match &mut **connection {
            Connection::Client(connection) => {
                let status = connection.process_tls_records(incoming.filled());
                handle(status, plain, outgoing)
            }
            Connection::Server(connection) => {
                let status = connection.process_tls_records(incoming.filled());
                handle(status, plain, outgoing)
            }
        };
        incoming.discard(discard);
        state
    }

    /// Whether there are records to send.
    pub(crate) fn has_outgoing(&self) -> bool {
        !self.outgoing.pending().is_empty()
    }

    /// Sends records, without waiting: their number of bytes.
    pub(crate) fn send(&mut self, socket: &impl AsFd) -> nix::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let count = send(socket.as_fd().as_raw_fd(), self.outgoing.pending(), flags)?;
        self.outgoing.start += count;
        Ok(count)
    }
}

/// Carries out rustls's request. Returns the number of bytes that were consumed.
fn handle<D>(
    status: UnbufferedStatus<'_, '_, D>,
    plain: &mut Vec<u8>,
    outgoing: &mut Outgoing,
) -> (usize, Result<State, Error>) {
    let UnbufferedStatus { mut discard, state } = status;
    let state = state.and_then(|state| match state {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                let record = record?;
                discard += record.discard;
                plain.extend_from_slice(record.payload);
            }
            Ok(State::Moved)
        }
        ConnectionState::EncodeTlsData(mut data) => {
            outgoing.append(|room| match data.encode(room) {
                Ok(count) => Ok(count),
                Err(EncodeError::InsufficientSize(size)) => Err(size.required_size),
                Err(EncodeError::AlreadyEncoded) => unreachable!("encoded once"),
            });
            Ok(State::Moved)
        }
        ConnectionState::TransmitTlsData(data) => {
            // The data is sent before anything else, from a buffer of this module.
            data.done();
            Ok(State::Moved)
        }
        ConnectionState::BlockedHandshake => Ok(State::Blocked),
        ConnectionState::PeerClosed => Ok(State::PeerClosed),
        // Both sides have closed; nothing is left to do.
        ConnectionState::Closed => Ok(State::Open),
        ConnectionState::WriteTraffic(_) => Ok(State::Open),
        // Without resumption there is no early data, and unknown states were not requested.
        _ => Err(Error::General("TLS in a state that was not asked for".into())),
    });
    (discard, state)
}

/// Received records; complete ones are taken out in front.
struct Incoming {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Incoming {
    fn with_room(bytes: usize) -> Incoming {
        Incoming { bytes: vec![0; bytes], start: 0, end: 0 }
    }

    fn grow(&mut self, bytes: usize) {
        if self.bytes.len() < bytes {
            self.bytes.resize(bytes, 0);
        }
    }

    fn filled(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.end]
    }

    fn discard(&mut self, count: usize) {
        self.start += count;
        assert!(self.start <= self.end, "at most the data present is taken");
    }

    /// The room for more data. The buffer holds a part of a record, or of a handshake message.
    fn room(&mut self) -> &mut [u8] {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        if self.end == self.bytes.len() {
            self.grow(HANDSHAKE_BYTES_MAX + RECORD_BYTES_MAX);
        }
        &mut self.bytes[self.end..]
    }
}

/// Records to send.
#[derive(Default)]
struct Outgoing {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Outgoing {
    fn pending(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Makes room for this many bytes.
    fn reserve(&mut self, bytes: usize) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.bytes.len() < self.end + bytes {
            self.bytes.resize(self.end + bytes, 0);
        }
    }

    /// Lets `write` fill the room behind the present data; its error is the room that it needs.
    fn append(&mut self, mut write: impl FnMut(&mut [u8]) -> Result<usize, usize>) {
        self.reserve(0);
        loop {
            match write(&mut self.bytes[self.end..]) {
                Ok(count) => return self.end += count,
                Err(required) => self.reserve(required),
            }
        }
    }
}

/// A handshake in progress, on a socket without other users.
pub(crate) struct Handshake {
    socket: Arc<OwnedFd>,
    session: Session,
    /// The first bytes that came.
    began: Vec<u8>,
    /// Plaintext that came right after the handshake.
    plain: Vec<u8>,
}

/// The first bytes that are kept: as many as tell any protocol.
const BEGINNING_BYTES: usize = 8;

impl Handshake {
    pub(crate) fn new(socket: Arc<OwnedFd>, session: Session) -> Handshake {
        Handshake { socket, session, began: Vec::new(), plain: Vec::new() }
    }

    pub(crate) fn interest(&self) -> Interest<'_> {
        match self.session.has_outgoing() {
            true => writable(&self.socket),
            false => readable(&self.socket),
        }
    }

    /// Advances without waiting. True: both sides have shown their certificates.
    pub(crate) fn advance(&mut self) -> Result<bool, String> {
        loop {
            let is_open = match self.session.read(&mut self.plain) {
                Ok(is_open) => is_open,
                Err(error) => {
                    // The peer is sent an alert, unless it does not use TLS and could not read it.
                    if !self.is_plain() {
                        let _ = self.session.send(&self.socket);
                    }
                    return Err(match foreign::spoken(&self.began) {
                        Some(protocol) => format!("it speaks {protocol}, neither TLS nor umem"),
                        None => explain::failure(&error),
                    });
                }
            };
            while self.session.has_outgoing() {
                match self.session.send(&self.socket) {
                    Ok(_) => {}
                    Err(Errno::EAGAIN) => return Ok(false),
                    Err(Errno::EINTR) => continue,
                    Err(errno) => return Err(format!("the connection broke: {}", errno.desc())),
                }
            }
            if is_open && !self.session.common().is_handshaking() {
                return Ok(true);
            }
            match self.session.receive(&self.socket) {
                Ok(0) => return Err(self.ended(io::ErrorKind::UnexpectedEof.to_string())),
                Ok(_) => self.look_at_beginning(),
                Err(Errno::EAGAIN) => return Ok(false),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(self.ended(errno.desc().into())),
            }
        }
    }

    fn look_at_beginning(&mut self) {
        if self.began.len() < BEGINNING_BYTES {
            let count = self.session.incoming.end.min(BEGINNING_BYTES);
            self.began = self.session.incoming.bytes[..count].to_vec();
        }
    }

    /// Whether any data has come.
    pub(crate) fn has_begun(&self) -> bool {
        !self.began.is_empty()
    }

    /// Whether the peer does not use TLS.
    pub(crate) fn is_plain(&self) -> bool {
        self.began.starts_with(foreign::UMEM)
    }

    fn ended(&self, how: String) -> String {
        match self.began.is_empty() {
            true => format!("it did not answer in TLS ({how}); was it started with --tls-creds?"),
            false => format!("the connection ended in the handshake: {how}"),
        }
    }

    /// The peer's own certificate, whose possession it has proven.
    pub(crate) fn peer_certificate(&self) -> Option<Vec<u8>> {
        Some(self.session.common().peer_certificates()?.first()?.to_vec())
    }

    /// Continues as a channel, with the data that has come already.
    pub(crate) fn finish(self) -> Result<Channel, Error> {
        let Session { connection, mut incoming, peer_has_closed, .. } = self.session;
        let (secrets, keys) = match *connection {
            Connection::Client(connection) => {
                let (secrets, keys) = connection.dangerous_into_kernel_connection()?;
                (secrets, Keys::Client(keys))
            }
            Connection::Server(connection) => {
                let (secrets, keys) = connection.dangerous_into_kernel_connection()?;
                (secrets, Keys::Server(keys))
            }
        };
        let records = Records::new(keys, secrets)?;
        Ok(Channel::secured(records, &self.plain, incoming.filled(), peer_has_closed))
    }
}
