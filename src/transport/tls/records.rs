//! The records of a TLS 1.3 connection whose handshake is over (RFC 8446, 5 and 4.6.3).
//!
//! rustls makes the keys, at first and whenever they are renewed. That leaves the records, which are taken
//! apart and made here, with ring's ciphers, in the buffers that the lanes have anyway: rustls itself copies
//! what it decrypts into memory that it allocates for each record, and encrypts only what lies in a slice,
//! which a guest's memory never does.
//!
//! ```text
//! on the wire   type 23 | version | length | encrypted: contents … type zeroes… | tag
//! in a buffer   plaintext, ready to be taken | room | records that are not whole yet | room
//! ```
//!
//! Decrypting moves the contents of a record to right behind those of the one before it, in the same pass.

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

/// Type, version and length before what is encrypted.
const HEADER_BYTES: usize = 5;

/// Bytes of contents in a record, at most.
pub(crate) const PLAIN_BYTES_MAX: usize = 16 << 10;

/// What an encrypted record may have beside its contents: their type, zeroes, the tag.
const EXPANSION_BYTES_MAX: usize = 256;

/// Bytes of a record on the wire, at most.
pub(crate) const RECORD_BYTES_MAX: usize = HEADER_BYTES + PLAIN_BYTES_MAX + EXPANSION_BYTES_MAX;

/// Bytes of the tag of every cipher of TLS 1.3.
const TAG_BYTES: usize = 16;

/// What a record of ours has beside its contents.
const BESIDE_BYTES: usize = HEADER_BYTES + 1 + TAG_BYTES;

/// Records one after another that bring nothing, at most: as in BoringSSL, whose limit rustls has too.
pub(crate) const VAIN_MAX: u32 = 32;

/// Types of records' contents.
pub(crate) const ALERT: u8 = 21;
pub(crate) const HANDSHAKE: u8 = 22;
pub(crate) const DATA: u8 = 23;

/// Types of a handshake's messages that come after it.
const NEW_SESSION_TICKET: u8 = 4;
pub(crate) const KEY_UPDATE: u8 = 24;

/// An alert's level.
const WARNING: u8 = 1;
const FATAL: u8 = 2;

/// Where keys come from.
pub(crate) enum Keys {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
    #[cfg(any(test, feature = "fuzz"))]
    Fixed(fixed::FixedKeys),
}

impl Keys {
    /// How many records a key may encrypt.
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

/// One direction's key, and how many records it has been used for.
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

    /// The next record's (RFC 8446, 5.3): each is used once.
    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        let tail = nonce[NONCE_LEN - 8..].iter_mut();
        tail.zip(self.sequence.to_be_bytes()).for_each(|(byte, number)| *byte ^= number);
        // At 100 Gbit/s of the smallest records it takes 3,000 years to come back to 0.
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Where things are in a buffer that records are received into.
#[derive(Debug, Default)]
pub(crate) struct Window {
    /// What can be taken.
    pub(crate) plain: Range<usize>,
    /// What has come and is not decrypted: part of a record.
    pub(crate) sealed: Range<usize>,
}

impl Window {
    /// Moves what there is to the buffer's beginning: where more can come.
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
    /// How many a key may encrypt.
    records_max: u64,
    /// The other side has renewed its key and wants ours renewed, before anything else is sent.
    owes_update: bool,
    /// Records since the last one that brought something.
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

    /// The other side has said that nothing more comes.
    pub(crate) fn peer_has_closed(&self) -> bool {
        self.peer_has_closed
    }

    /// Decrypts all records that are whole. After an error nothing more can be read; what came before it
    /// is there to be taken.
    pub(crate) fn open(&mut self, buffer: &mut [u8], window: &mut Window) -> Result<(), Error> {
        while let Some(record) = self.next_record(buffer, window)? {
            self.open_one(buffer, window, record)?;
        }
        Ok(())
    }

    /// Where the first record is, if it is whole.
    fn next_record(
        &self,
        buffer: &[u8],
        window: &mut Window,
    ) -> Result<Option<Range<usize>>, Error> {
        if self.peer_has_closed {
            // Whatever follows is not of this connection.
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
        let header = *buffer[record.start..].first_chunk::<HEADER_BYTES>().expect("it is whole");
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

    /// Nobody may keep us busy with nothing.
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

    /// What comes after a handshake is short, so that a record has whole messages.
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
                // Nothing is resumed.
                (NEW_SESSION_TICKET, _, Keys::Client(_)) => {}
                _ => return Err(unexpected(HANDSHAKE)),
            }
            if rest.is_empty() {
                return Ok(());
            }
            contents = rest;
        }
    }

    /// Appends what is to be sent. It leaves in records as large as can be; the last one is not made
    /// before [`Records::flush`].
    pub(crate) fn append(&mut self, out: &mut Outgoing, bytes: &[u8]) -> Result<(), Error> {
        let copy = |at, room: &mut [u8]| room.copy_from_slice(&bytes[at..][..room.len()]);
        self.append_with(out, bytes.len(), copy)
    }

    /// The same for so many bytes that `copy` gives: those from an offset on, as many as it is given room
    /// for.
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

    /// Says that nothing more comes.
    pub(crate) fn close(&mut self, out: &mut Outgoing) -> Result<(), Error> {
        self.flush(out)?;
        let close_notify = [WARNING, AlertDescription::CloseNotify.into()];
        self.say(out, ALERT, &close_notify)
    }

    /// Says why what has come is of no use; not where the other side has said such a thing itself.
    pub(crate) fn protest(&mut self, out: &mut Outgoing, error: &Error) -> Result<(), Error> {
        match alert(error) {
            Some(alert) => self.say(out, ALERT, &[FATAL, alert.into()]),
            None => Ok(()),
        }
    }

    fn is_renewal_due(&self) -> bool {
        // The record that says so is the last one.
        self.owes_update || self.writing.sequence + 1 >= self.records_max
    }

    pub(crate) fn renew(&mut self, out: &mut Outgoing) -> Result<(), Error> {
        // Of the other side's key nothing is asked: it looks after that itself.
        self.say(out, HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 0])?;
        self.writing = self.keys.next_for_writing()?;
        self.owes_update = false;
        Ok(())
    }

    /// Makes a record of its own.
    pub(crate) fn say(
        &mut self,
        out: &mut Outgoing,
        content: u8,
        bytes: &[u8],
    ) -> Result<(), Error> {
        assert_eq!(out.filled, 0, "records come one after another");
        out.room()[..bytes.len()].copy_from_slice(bytes);
        out.filled = bytes.len();
        self.seal(out, content)
    }

    fn seal(&mut self, out: &mut Outgoing, content: u8) -> Result<(), Error> {
        let length = u16::try_from(out.filled + 1 + TAG_BYTES).expect("a record is short");
        let [high, low] = length.to_be_bytes();
        // TLS 1.2, as everybody says for the sake of those in between.
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

/// What the other side is told.
fn alert(error: &Error) -> Option<AlertDescription> {
    match error {
        Error::AlertReceived(_) => None,
        Error::DecryptError => Some(AlertDescription::BadRecordMac),
        Error::PeerSentOversizedRecord => Some(AlertDescription::RecordOverflow),
        Error::InvalidMessage(_) => Some(AlertDescription::DecodeError),
        _ => Some(AlertDescription::UnexpectedMessage),
    }
}

/// Records that are to leave, in a buffer that is used again and again.
#[derive(Default)]
pub(crate) struct Outgoing {
    bytes: Vec<u8>,
    start: usize,
    /// Of the last record that has been made.
    end: usize,
    /// Bytes of contents of the next one, which stand where they are encrypted.
    filled: usize,
}

impl Outgoing {
    /// With room for so many bytes of contents, made into records at once.
    pub(crate) fn with_room(plain_bytes: usize) -> Outgoing {
        let records = plain_bytes.div_ceil(PLAIN_BYTES_MAX) + 1;
        Outgoing {
            bytes: vec![0; records * (PLAIN_BYTES_MAX + BESIDE_BYTES)],
            ..Outgoing::default()
        }
    }

    /// Where contents of the next record go.
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

    /// So many bytes of what is pending have left.
    pub(crate) fn sent(&mut self, count: usize) {
        self.start += count;
        assert!(self.start <= self.end, "no more than there is");
        if self.start == self.end && self.filled == 0 {
            (self.start, self.end) = (0, 0);
        }
    }

    /// The records, for a ring.
    pub(crate) fn into_bytes(self) -> Bytes {
        assert_eq!(self.filled, 0, "the last record has been made");
        Bytes::from(self.bytes).slice(self.start..self.end)
    }

    /// Makes use of a buffer that a ring has given back.
    pub(crate) fn reuse(bytes: Bytes) -> Outgoing {
        Outgoing { bytes: bytes.into_vec(), ..Outgoing::default() }
    }
}
