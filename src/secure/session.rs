//! A TLS session over buffers of ours: rustls says what the records mean, and no byte is copied that need
//! not be.
//!
//! Two rules keep rustls's unbuffered interface simple. What has come is taken apart at once, up to a
//! record that is not whole, so that sending never meets a record that has to be read first. And what is
//! to be sent is made only when everything before it has left.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, Error, ServerConfig};

use super::{Interest, explain, readable, writable};

/// Bytes of a record on the wire, at most (RFC 8446, 5.2).
const RECORD_BYTES_MAX: usize = 5 + PLAIN_BYTES_MAX + 256;

/// Bytes of pages in a record, at most.
const PLAIN_BYTES_MAX: usize = 16 << 10;

/// What a record has beside them, and more: header, type, tag (22 bytes), or a change of keys (27).
const RECORD_BYTES_BESIDE: usize = 64;

/// Changes of keys that may leave with pages.
const RECORDS_BESIDE: usize = 4;

/// Bytes of a handshake's messages that are kept until they are whole: rustls takes no message of more.
const HANDSHAKE_BYTES_MAX: usize = 64 << 10;

/// Bytes that are received at once when pages flow, and so the most plaintext that waits for its lane:
/// what fits a processor's second cache beside the plaintext.
const STREAM_BYTES: usize = (128 << 10) + RECORD_BYTES_MAX;

enum Connection {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// One side of a TLS connection, with the records that have come and those that are to leave.
pub(super) struct Session {
    connection: Box<Connection>,
    incoming: Incoming,
    outgoing: Outgoing,
    peer_has_closed: bool,
}

/// What rustls is given to do beside reading.
enum Job<'a> {
    Read,
    Encrypt(&'a [u8]),
    Close,
}

/// What rustls said.
enum State {
    /// There is more to do.
    Moved,
    /// Nothing more before something comes; pages may not be sent yet.
    Blocked,
    /// The same, and they may. A job has been done.
    Open,
    PeerClosed,
}

impl Session {
    pub(super) fn client(
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<Session, Error> {
        let connection = UnbufferedClientConnection::new(config, name)?;
        Ok(Session::new(Connection::Client(connection)))
    }

    pub(super) fn server(config: Arc<ServerConfig>) -> Result<Session, Error> {
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

    /// Makes room for a stream of pages.
    pub(super) fn widen(&mut self) {
        self.incoming.grow(STREAM_BYTES);
    }

    /// Receives records, without waiting: their number of bytes, 0 at the end.
    pub(super) fn receive(&mut self, socket: &impl AsFd) -> nix::Result<usize> {
        let room = self.incoming.room();
        debug_assert!(!room.is_empty(), "records have been taken apart since");
        let count = recv(socket.as_fd().as_raw_fd(), room, MsgFlags::MSG_DONTWAIT)?;
        self.incoming.end += count;
        Ok(count)
    }

    /// Takes apart what has come; pages are appended to `plain`. False: the handshake is not over.
    /// After an error the alert that tells the other side is there to be sent.
    pub(super) fn read(&mut self, plain: &mut Vec<u8>) -> Result<bool, Error> {
        loop {
            match self.process(plain, &Job::Read) {
                Ok(State::Moved) => {}
                Ok(State::PeerClosed) => self.peer_has_closed = true,
                Ok(State::Open) => return Ok(true),
                Ok(State::Blocked) => return Ok(false),
                Err(error) => {
                    // What it still has to say, which comes before any more reading.
                    while self.common().wants_write() {
                        let _ = self.process(plain, &Job::Read);
                    }
                    return Err(error);
                }
            }
        }
    }

    /// The other side has said that nothing more comes.
    pub(super) fn peer_has_closed(&self) -> bool {
        self.peer_has_closed
    }

    /// Encrypts pages that are to leave. Everything before them has left.
    pub(super) fn encrypt(&mut self, plain: &[u8]) -> Result<(), Error> {
        self.write(&Job::Encrypt(plain))
    }

    /// Says that nothing more comes.
    pub(super) fn close(&mut self) -> Result<(), Error> {
        self.write(&Job::Close)
    }

    fn write(&mut self, job: &Job<'_>) -> Result<(), Error> {
        let mut plain = Vec::new();
        loop {
            match self.process(&mut plain, job)? {
                State::Open => break,
                State::Blocked => return Err(Error::HandshakeNotComplete),
                State::Moved => {}
                State::PeerClosed => self.peer_has_closed = true,
            }
        }
        assert!(plain.is_empty(), "what has come is taken apart before anything is sent");
        Ok(())
    }

    fn process(&mut self, plain: &mut Vec<u8>, job: &Job<'_>) -> Result<State, Error> {
        let Session { connection, incoming, outgoing, .. } = self;
        let (discard, state) = match &mut **connection {
            Connection::Client(connection) => {
                let status = connection.process_tls_records(incoming.filled());
                handle(status, plain, outgoing, job)
            }
            Connection::Server(connection) => {
                let status = connection.process_tls_records(incoming.filled());
                handle(status, plain, outgoing, job)
            }
        };
        incoming.discard(discard);
        state
    }

    /// Whether records are to leave.
    pub(super) fn has_outgoing(&self) -> bool {
        !self.outgoing.pending().is_empty()
    }

    /// Sends records, without waiting: their number of bytes.
    pub(super) fn send(&mut self, socket: &impl AsFd) -> nix::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let count = send(socket.as_fd().as_raw_fd(), self.outgoing.pending(), flags)?;
        self.outgoing.start += count;
        Ok(count)
    }
}

/// Does what rustls asks for, and the job when its time has come. The number is of bytes that have been
/// read for good.
fn handle<D>(
    status: UnbufferedStatus<'_, '_, D>,
    plain: &mut Vec<u8>,
    outgoing: &mut Outgoing,
    job: &Job<'_>,
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
            // It leaves before anything else does, from a buffer of ours.
            data.done();
            Ok(State::Moved)
        }
        ConnectionState::BlockedHandshake => Ok(State::Blocked),
        ConnectionState::PeerClosed => Ok(State::PeerClosed),
        // Both have closed; there is nothing left to do.
        ConnectionState::Closed => Ok(State::Open),
        ConnectionState::WriteTraffic(mut traffic) => {
            let mut result = Ok(State::Open);
            let mut written = |encrypted| match encrypted {
                Ok(count) => Ok(count),
                Err(EncryptError::InsufficientSize(size)) => Err(size.required_size),
                Err(EncryptError::EncryptExhausted) => {
                    result = Err(Error::EncryptError);
                    Ok(0)
                }
            };
            match job {
                Job::Read => {}
                Job::Encrypt(bytes) => {
                    // Enough at once: each attempt may add a change of keys to what is to leave.
                    let records = bytes.len().div_ceil(PLAIN_BYTES_MAX) + RECORDS_BESIDE;
                    outgoing.reserve(bytes.len() + records * RECORD_BYTES_BESIDE);
                    outgoing.append(|room| written(traffic.encrypt(bytes, room)));
                }
                Job::Close => outgoing.append(|room| written(traffic.queue_close_notify(room))),
            }
            result
        }
        // There is no early data without resumption, and what is not known is nothing we asked for.
        _ => Err(Error::General("TLS in a state that was not asked for".into())),
    });
    (discard, state)
}

/// Records as they come: whole ones are taken out in front.
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
        assert!(self.start <= self.end, "no more than there is");
    }

    /// Where more can come. What is there is a part of a record, or of a handshake's message.
    fn room(&mut self) -> &mut [u8] {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        if self.end == self.bytes.len() {
            self.grow(HANDSHAKE_BYTES_MAX + RECORD_BYTES_MAX);
        }
        &mut self.bytes[self.end..]
    }
}

/// Records that are to leave.
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

    /// Has `write` fill the room behind what is there; its error is the room that it needs.
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

/// A handshake that is going on, over a socket that nobody else uses meanwhile.
pub(super) struct Handshake {
    socket: Arc<OwnedFd>,
    session: Session,
    /// Of the first bytes that came.
    began: Vec<u8>,
    /// What came right behind the handshake.
    plain: Vec<u8>,
}

/// What umem's own first bytes begin with, where TLS would be expected.
const PLAIN: &[u8] = b"UMEM";

impl Handshake {
    pub(super) fn new(socket: Arc<OwnedFd>, session: Session) -> Handshake {
        Handshake { socket, session, began: Vec::new(), plain: Vec::new() }
    }

    pub(super) fn interest(&self) -> Interest<'_> {
        match self.session.has_outgoing() {
            true => writable(&self.socket),
            false => readable(&self.socket),
        }
    }

    /// Goes on, without waiting. True: both sides have shown their certificates.
    pub(super) fn advance(&mut self) -> Result<bool, String> {
        loop {
            let is_open = match self.session.read(&mut self.plain) {
                Ok(is_open) => is_open,
                Err(error) => {
                    // The other side is told, in what it speaks: who speaks no TLS would not understand.
                    if !self.is_plain() {
                        let _ = self.session.send(&self.socket);
                    }
                    return Err(explain::failure(&error));
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
        if self.began.len() < PLAIN.len() {
            let count = self.session.incoming.end.min(PLAIN.len());
            self.began = self.session.incoming.bytes[..count].to_vec();
        }
    }

    /// The other side does not know of TLS.
    pub(super) fn is_plain(&self) -> bool {
        self.began == PLAIN
    }

    fn ended(&self, how: String) -> String {
        match self.began.is_empty() {
            true => format!("it answered nothing in TLS ({how}); was it started with --tls-creds?"),
            false => format!("the connection ended in the handshake: {how}"),
        }
    }

    /// The other side's own certificate, which it has shown to be its.
    pub(super) fn peer_certificate(&self) -> Option<Vec<u8>> {
        Some(self.session.common().peer_certificates()?.first()?.to_vec())
    }

    /// The session, and what has come on it already.
    pub(super) fn finish(self) -> (Session, Vec<u8>) {
        (self.session, self.plain)
    }
}
