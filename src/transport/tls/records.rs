//! The records of a TLS 1.3 connection whose handshake is over (RFC 8446, 5 and 4.6.3).
//!
//! rustls derives the keys, at first and on each renewal. umem encrypts and decrypts the records
//! itself, with ring's ciphers, in the buffers that the lanes have anyway: rustls would copy
//! decrypted data into memory that it allocates for each record, and encrypts only data in a slice,
//! which a guest's memory never is.
//!
//! ```text
//! on the wire   type 23 | version | length | encrypted: contents … type zeroes… | tag
//! in a buffer   plaintext, ready to be taken | room | records that are not whole yet | room
//! ```
//!
//! Decryption moves a record's contents to right behind those of the record before it, in the same
//! pass.

#[cfg(any(test, feature = "fuzz"))]
mod fixed;
#[cfg(test)]
mod tests;

use std::ops::Range;

use ring::aead::{self, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::client::ClientConnectionData;
use rustls::crypto::cipher::{AeadKey, Iv};
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, Error, ExtractedSecrets,
    InvalidMessage, PeerMisbehaved, SupportedCipherSuite,
};
use umem_ring::Bytes;

#[cfg(feature = "fuzz")]
pub(crate) use fixed::fuzz;

/// Type, version and length before the encrypted part.
const HEADER_BYTES: usize = 5;

/// Most bytes of contents in a record.
pub(crate) const PLAIN_BYTES_MAX: usize = 16 << 10;

/// Most bytes of an encrypted record beside its contents: their type, zeroes, the tag.
const EXPANSION_BYTES_MAX: usize = 256;

/// Most bytes of a record on the wire.
pub(crate) const RECORD_BYTES_MAX: usize = HEADER_BYTES + PLAIN_BYTES_MAX + EXPANSION_BYTES_MAX;

/// Bytes of the tag of every cipher of TLS 1.3.
const TAG_BYTES: usize = 16;

/// Bytes of umem's records beside their contents.
const BESIDE_BYTES: usize = HEADER_BYTES + 1 + TAG_BYTES;

/// Most records in a row without content: as in BoringSSL, whose limit rustls has too.
pub(crate) const VAIN_MAX: u32 = 32;

/// Content types of records.
pub(crate) const ALERT: u8 = 21;
pub(crate) const HANDSHAKE: u8 = 22;
pub(crate) const DATA: u8 = 23;

/// Types of handshake messages after the handshake.
const NEW_SESSION_TICKET: u8 = 4;
pub(crate) const KEY_UPDATE: u8 = 24;

/// An alert's level.
const WARNING: u8 = 1;
const FATAL: u8 = 2;

/// The source of keys.
pub(crate) enum Keys {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
    #[cfg(any(test, feature = "fuzz"))]
    Fixed(fixed::FixedKeys),
}

impl Keys {
    /// Most records that one key may encrypt.
    fn records_max(&self) -> u64 {
        let SupportedCipherSuite::Tls13(suite) = match self {
            Keys::Client(keys) => keys.negotiated_cipher_suite(),
            Keys::Server(keys) => keys.negotiated_cipher_suite(),
            #[cfg(any(test, feature = "fuzz"))]
            Keys::Fixed(_) => return u64::MAX,
        };
        suite.common.confidentiality_limit
    }

    fn next_for_reading(&mut self) -> Result<Cipher, Error> {
        Cipher::new(match self {
            Keys::Client(keys) => keys.update_rx_secret()?,
            Keys::Server(keys) => keys.update_rx_secret()?,
            #[cfg(any(test, feature = "fuzz"))]
            Keys::Fixed(keys) => return Ok(keys.next_for_reading()),
        })
    }

    fn next_for_writing(&mut self) -> Result<Cipher, Error> {
        Cipher::new(match self {
            Keys::Client(keys) => keys.update_tx_secret()?,
            Keys::Server(keys) => keys.update_tx_secret()?,
            #[cfg(any(test, feature = "fuzz"))]
            Keys::Fixed(keys) => return Ok(keys.next_for_writing()),
        })
    }
}

/// One direction's key, and its count of records.
struct Cipher {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

impl Cipher {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Cipher, Error> {
        use ConnectionTrafficSecrets::{Aes128Gcm, Aes256Gcm, Chacha20Poly1305};
        let (algorithm, key, iv): (_, AeadKey, Iv) = match secrets {
            Aes128Gcm { key, iv } => (&aead::AES_128_GCM, key, iv),
            Aes256Gcm { key, iv } => (&aead::AES_256_GCM, key, iv),
            Chacha20Poly1305 { key, iv } => (&aead::CHACHA20_POLY1305, key, iv),
            _ => return Err(Error::General("a cipher that was not offered".into())),
        };
        let key = UnboundKey::new(algorithm, key.as_ref());
        let iv = iv.as_ref().try_into();
        let (Ok(key), Ok(iv)) = (key, iv) else {
            return Err(Error::General("a key that is not its cipher's".into()));
        };
        Ok(Cipher { key: LessSafeKey::new(key), iv, sequence })
    }

    /// The next record's nonce (RFC 8446, 5.3): each is used once.
    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        let tail = nonce[NONCE_LEN - 8..].iter_mut();
        tail.zip(self.sequence.to_be_bytes()).for_each(|(byte, number)| *byte ^= number);
        // At 100 Gbit/s of the smallest records the count wraps after 3,000 years.
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// The layout of a receive buffer.
#[derive(Debug, Default)]
pub(crate) struct Window {
    /// Plaintext that can be taken.
    pub(crate) plain: Range<usize>,
    /// Received bytes that are not decrypted: part of a record.
    pub(crate) sealed: Range<usize>,
}

impl Window {
    /// Moves all data to the buffer's beginning; returns where more can come.
    pub(crate) fn pack(&mut self, buffer: &mut [u8]) -> usize {
        buffer.copy_within(self.plain.clone(), 0);
        self.plain = 0..self.plain.len();
        let sealed = self.plain.end..self.plain.end + self.sealed.len();
        buffer.copy_within(self.sealed.clone(), sealed.start);
        self.sealed = sealed;
        self.sealed.end
    }
}

/// Both directions of a connection whose handshake is over.
pub(crate) struct Records {
    keys: Keys,
    reading: Cipher,
    writing: Cipher,
    /// Most records per key.
    records_max: u64,
    /// The peer has renewed its key and requests a renewal, which has to precede all other data.
    owes_update: bool,
    /// Records without content since the last one with content.
    vain: u32,
    peer_has_closed: bool,
}

impl Records {
    pub(crate) fn new(keys: Keys, secrets: ExtractedSecrets) -> Result<Records, Error> {
        Ok(Records {
            reading: Cipher::new(secrets.rx)?,
            writing: Cipher::new(secrets.tx)?,
            records_max: keys.records_max(),
            keys,
            owes_update: false,
            vain: 0,
            peer_has_closed: false,
        })
    }

    /// Whether the peer has sent close_notify.
    pub(crate) fn peer_has_closed(&self) -> bool {
        self.peer_has_closed
    }

    /// Decrypts all complete records. After an error nothing more can be read; earlier data can
    /// still be taken.
    pub(crate) fn open(&mut self, buffer: &mut [u8], window: &mut Window) -> Result<(), Error> {
        while let Some(record) = self.next_record(buffer, window)? {
            self.open_one(buffer, window, record)?;
        }
        Ok(())
    }

    /// The range of the first record, if it is complete.
    fn next_record(
        &self,
        buffer: &[u8],
        window: &mut Window,
    ) -> Result<Option<Range<usize>>, Error> {
        if self.peer_has_closed {
            // All later bytes are not part of this connection.
            window.sealed.start = window.sealed.end;
            return Ok(None);
        }
        let sealed = &buffer[window.sealed.clone()];
        let Some(&[content, _, _, high, low]) = sealed.first_chunk() else { return Ok(None) };
        if content != DATA {
            return Err(InvalidMessage::InvalidContentType.into());
        }
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length > PLAIN_BYTES_MAX + EXPANSION_BYTES_MAX {
            return Err(Error::PeerSentOversizedRecord);
        }
        let whole = HEADER_BYTES + length;
        let start = window.sealed.start;
        Ok((sealed.len() >= whole).then(|| start..start + whole))
    }

    fn open_one(
        &mut self,
        buffer: &mut [u8],
        window: &mut Window,
        record: Range<usize>,
    ) -> Result<(), Error> {
        window.sealed.start = record.end;
        let header =
            *buffer[record.start..].first_chunk::<HEADER_BYTES>().expect("a complete record");
        let to = window.plain.end;
        let skipped = record.start + HEADER_BYTES - to;
        let nonce = self.reading.nonce();
        let in_out = &mut buffer[to..record.end];
        let opened = self.reading.key.open_within(nonce, Aad::from(header), in_out, skipped..);
        let Ok(opened) = opened else { return Err(Error::DecryptError) };
        let Some(last) = opened.iter().rposition(|&byte| byte != 0) else {
            return Err(PeerMisbehaved::IllegalTlsInnerPlaintext.into());
        };
        let (contents, content) = (&opened[..last], opened[last]);
        if contents.len() > PLAIN_BYTES_MAX {
            return Err(Error::PeerSentOversizedRecord);
        }
        match content {
            DATA if contents.is_empty() => self.came_in_vain(PeerMisbehaved::TooManyEmptyFragments),
            DATA => {
                self.vain = 0;
                window.plain.end += last;
                Ok(())
            }
            ALERT => self.alerted(contents),
            HANDSHAKE => self.messages(contents),
            other => Err(unexpected(other)),
        }
    }

    /// Limits records without content, which would keep this side busy.
    fn came_in_vain(&mut self, too_many: PeerMisbehaved) -> Result<(), Error> {
        self.vain += 1;
        if self.vain > VAIN_MAX { Err(too_many.into()) } else { Ok(()) }
    }

    fn alerted(&mut self, contents: &[u8]) -> Result<(), Error> {
        let &[_, description] = contents else {
            return Err(InvalidMessage::MessageTooShort.into());
        };
        match AlertDescription::from(description) {
            AlertDescription::CloseNotify => {
                self.peer_has_closed = true;
                Ok(())
            }
            AlertDescription::UserCanceled => {
                self.came_in_vain(PeerMisbehaved::TooManyWarningAlertsReceived)
            }
            other => Err(Error::AlertReceived(other)),
        }
    }

    /// Messages after a handshake are short, so a record holds whole messages.
    fn messages(&mut self, mut contents: &[u8]) -> Result<(), Error> {
        loop {
            let short = || Error::from(InvalidMessage::MessageTooShort);
            let Some((&[kind, high, middle, low], rest)) = contents.split_first_chunk() else {
                return Err(short());
            };
            let length = u32::from_be_bytes([0, high, middle, low]) as usize;
            let (body, rest) = rest.split_at_checked(length).ok_or_else(short)?;
            self.came_in_vain(PeerMisbehaved::TooManyKeyUpdateRequests)?;
            match (kind, body, &self.keys) {
                (KEY_UPDATE, &[asks @ 0..=1], _) if rest.is_empty() => {
                    self.reading = self.keys.next_for_reading()?;
                    self.owes_update |= asks == 1;
                }
                (KEY_UPDATE, &[_], _) if !rest.is_empty() => {
                    return Err(PeerMisbehaved::KeyEpochWithPendingFragment.into());
                }
                (KEY_UPDATE, ..) => return Err(InvalidMessage::InvalidKeyUpdate.into()),
                // Sessions are not resumed.
                (NEW_SESSION_TICKET, _, Keys::Client(_)) => {}
                _ => return Err(unexpected(HANDSHAKE)),
            }
            if rest.is_empty() {
                return Ok(());
            }
            contents = rest;
        }
    }

    /// Appends data to send, in records of the largest size. [`Records::flush`] makes the last
    /// record.
    pub(crate) fn append(&mut self, out: &mut Outgoing, bytes: &[u8]) -> Result<(), Error> {
        let copy = |at, room: &mut [u8]| room.copy_from_slice(&bytes[at..][..room.len()]);
        self.append_with(out, bytes.len(), copy)
    }

    /// The same for `bytes` bytes that `copy` provides: those from an offset on, as many as its
    /// slice has room for.
    pub(crate) fn append_with(
        &mut self,
        out: &mut Outgoing,
        bytes: usize,
        mut copy: impl FnMut(usize, &mut [u8]),
    ) -> Result<(), Error> {
        let mut done = 0;
        while done < bytes {
            if out.filled == 0 && self.is_renewal_due() {
                self.renew(out)?;
            }
            let room = out.room();
            let taken = room.len().min(bytes - done);
            copy(done, &mut room[..taken]);
            done += taken;
            out.filled += taken;
            if out.filled == PLAIN_BYTES_MAX {
                self.seal(out, DATA)?;
            }
        }
        Ok(())
    }

    /// Makes the last record.
    pub(crate) fn flush(&mut self, out: &mut Outgoing) -> Result<(), Error> {
        if out.filled == 0 { Ok(()) } else { self.seal(out, DATA) }
    }

    /// Appends close_notify.
    pub(crate) fn close(&mut self, out: &mut Outgoing) -> Result<(), Error> {
        self.flush(out)?;
        let close_notify = [WARNING, AlertDescription::CloseNotify.into()];
        self.say(out, ALERT, &close_notify)
    }

    /// Appends an alert for invalid received data, unless the peer has sent an alert itself.
    pub(crate) fn protest(&mut self, out: &mut Outgoing, error: &Error) -> Result<(), Error> {
        match alert(error) {
            Some(alert) => self.say(out, ALERT, &[FATAL, alert.into()]),
            None => Ok(()),
        }
    }

    fn is_renewal_due(&self) -> bool {
        // The record with the announcement is the last one of its key.
        self.owes_update || self.writing.sequence + 1 >= self.records_max
    }

    pub(crate) fn renew(&mut self, out: &mut Outgoing) -> Result<(), Error> {
        // No renewal of the peer's key is requested: the peer takes care of it.
        self.say(out, HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 0])?;
        self.writing = self.keys.next_for_writing()?;
        self.owes_update = false;
        Ok(())
    }

    /// Makes a separate record.
    pub(crate) fn say(
        &mut self,
        out: &mut Outgoing,
        content: u8,
        bytes: &[u8],
    ) -> Result<(), Error> {
        assert_eq!(out.filled, 0, "the record before is complete");
        out.room()[..bytes.len()].copy_from_slice(bytes);
        out.filled = bytes.len();
        self.seal(out, content)
    }

    fn seal(&mut self, out: &mut Outgoing, content: u8) -> Result<(), Error> {
        let length = u16::try_from(out.filled + 1 + TAG_BYTES).expect("a record is short");
        let [high, low] = length.to_be_bytes();
        // TLS 1.2, as every implementation sends for the sake of middleboxes.
        let header = [DATA, 3, 3, high, low];
        let (to, record) = out.bytes[out.end..].split_at_mut(HEADER_BYTES);
        to.copy_from_slice(&header);
        let (plain, tag) = record.split_at_mut(out.filled + 1);
        plain[out.filled] = content;
        let nonce = self.writing.nonce();
        let sealed = self.writing.key.seal_in_place_separate_tag(nonce, Aad::from(header), plain);
        tag[..TAG_BYTES].copy_from_slice(sealed.map_err(|_| Error::EncryptError)?.as_ref());
        out.end += out.filled + BESIDE_BYTES;
        out.filled = 0;
        Ok(())
    }
}

fn unexpected(content: u8) -> Error {
    Error::InappropriateMessage {
        expect_types: vec![ContentType::ApplicationData],
        got_type: content.into(),
    }
}

/// The alert that the peer is sent.
fn alert(error: &Error) -> Option<AlertDescription> {
    match error {
        Error::AlertReceived(_) => None,
        Error::DecryptError => Some(AlertDescription::BadRecordMac),
        Error::PeerSentOversizedRecord => Some(AlertDescription::RecordOverflow),
        Error::InvalidMessage(_) => Some(AlertDescription::DecodeError),
        _ => Some(AlertDescription::UnexpectedMessage),
    }
}

/// Records to send, in a reused buffer.
#[derive(Default)]
pub(crate) struct Outgoing {
    bytes: Vec<u8>,
    start: usize,
    /// End of the last complete record.
    end: usize,
    /// Content bytes of the next record, already at their place for encryption.
    filled: usize,
}

impl Outgoing {
    /// With room for records of `plain_bytes` of contents.
    pub(crate) fn with_room(plain_bytes: usize) -> Outgoing {
        let records = plain_bytes.div_ceil(PLAIN_BYTES_MAX) + 1;
        Outgoing {
            bytes: vec![0; records * (PLAIN_BYTES_MAX + BESIDE_BYTES)],
            ..Outgoing::default()
        }
    }

    /// The room for the next record's contents.
    fn room(&mut self) -> &mut [u8] {
        let start = self.end + HEADER_BYTES;
        let whole = start + PLAIN_BYTES_MAX + 1 + TAG_BYTES;
        if self.bytes.len() < whole {
            self.bytes.resize(whole, 0);
        }
        &mut self.bytes[start + self.filled..start + PLAIN_BYTES_MAX]
    }

    pub(crate) fn pending(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Removes `count` sent bytes.
    pub(crate) fn sent(&mut self, count: usize) {
        self.start += count;
        assert!(self.start <= self.end, "at most the bytes present");
        if self.start == self.end && self.filled == 0 {
            (self.start, self.end) = (0, 0);
        }
    }

    /// The records, for a ring.
    pub(crate) fn into_bytes(self) -> Bytes {
        assert_eq!(self.filled, 0, "no unfinished record");
        Bytes::from(self.bytes).slice(self.start..self.end)
    }

    /// Reuses a buffer that a ring has returned.
    pub(crate) fn reuse(bytes: Bytes) -> Outgoing {
        Outgoing { bytes: bytes.into_vec(), ..Outgoing::default() }
    }
}
