//! Channels over real sockets: data from a good peer in any pieces, and what a bad peer may send.

use std::io::{Read, Write};
use std::net::Shutdown as How;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustls::crypto::ring::cipher_suite as suite;
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, SupportedCipherSuite};

use super::super::records::{DATA, HANDSHAKE, KEY_UPDATE, PLAIN_BYTES_MAX, VAIN_MAX};
use super::super::session::{Handshake, Session};
use super::super::testing::{Certificates, bytes, shaken};
use super::*;

const MANY: u64 = 1 << 24;

struct Side {
    channel: Channel,
    socket: UnixStream,
}

/// Both ends of a connection, after a handshake.
fn pair_with(suite: SupportedCipherSuite, records: u64) -> (Side, Side) {
    let (left, right) = UnixStream::pair().unwrap();
    let fd = |socket: &UnixStream| Arc::new(OwnedFd::from(socket.try_clone().unwrap()));
    let (client, server) = shaken(suite, records, (fd(&left), fd(&right)));
    (Side { channel: client, socket: left }, Side { channel: server, socket: right })
}

fn pair() -> (Side, Side) {
    pair_with(suite::TLS13_AES_128_GCM_SHA256, MANY)
}

impl Side {
    /// Records of these bytes.
    fn sealed(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.channel.sealed(bytes).unwrap()
    }

    /// One record of any content.
    fn record(&mut self, content: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = Outgoing::default();
        self.channel.records_mut().say(&mut out, content, bytes).unwrap();
        out.pending().to_vec()
    }

    fn closing(&mut self) -> Vec<u8> {
        let mut out = Outgoing::default();
        self.channel.close(&mut out).unwrap();
        out.pending().to_vec()
    }

    /// Takes the data received on the socket, until there is no more for now or at all.
    fn take(&mut self) -> Vec<u8> {
        let mut got = Vec::new();
        loop {
            let plain = self.channel.plain();
            got.extend_from_slice(plain);
            let count = plain.len();
            self.channel.take(count);
            if self.channel.has_ended() {
                return got;
            }
            match self.channel.receive(&self.socket) {
                Ok(_) => {}
                Err(Errno::EAGAIN) => return got,
                Err(errno) => panic!("{errno}"),
            }
        }
    }

    /// Takes the data that results from these bytes, sent by the other end.
    fn given(&mut self, other: &mut Side, sent: &[u8]) -> Vec<u8> {
        other.socket.write_all(sent).unwrap();
        self.take()
    }
}

#[test]
fn every_cipher_carries_data_in_both_directions() {
    for suite in [
        suite::TLS13_AES_128_GCM_SHA256,
        suite::TLS13_AES_256_GCM_SHA384,
        suite::TLS13_CHACHA20_POLY1305_SHA256,
    ] {
        let (mut left, mut right) = pair_with(suite, MANY);
        for count in [1, 100, PLAIN_BYTES_MAX, PLAIN_BYTES_MAX + 1, 100_000] {
            let sent = bytes(count as u64, count);
            let sealed = left.sealed(&sent);
            let records = count.div_ceil(PLAIN_BYTES_MAX);
            assert_eq!(sealed.len(), count + 22 * records, "5 + 1 + 16 bytes a record");
            assert!(right.given(&mut left, &sealed) == sent);
            let sealed = right.sealed(&sent);
            assert!(left.given(&mut right, &sealed) == sent);
        }
    }
}

/// A receive may end anywhere, and bring one byte.
#[test]
fn records_in_pieces_are_decrypted_whole() {
    let (mut left, mut right) = pair();
    let sent = bytes(1, 3000);
    let mut sealed = left.sealed(&sent[..1000]);
    sealed.extend(left.sealed(&sent[1000..1001]));
    sealed.extend(left.sealed(&sent[1001..]));
    let one_by_one: Vec<u8> =
        sealed.iter().flat_map(|byte| right.given(&mut left, &[*byte])).collect();
    assert!(one_by_one == sent);
    for cut in 0..=sealed.len() {
        let mut sealed = left.sealed(&sent[..1000]);
        sealed.extend(left.sealed(&sent[1000..1001]));
        sealed.extend(left.sealed(&sent[1001..]));
        let mut got = right.given(&mut left, &sealed[..cut]);
        got.extend(right.given(&mut left, &sealed[cut..]));
        assert!(got == sent, "cut at {cut}");
    }
}

/// Data that is not taken at once stays, and later data fits behind it.
#[test]
fn data_not_taken_stays_in_front_of_later_data() {
    let (mut left, mut right) = pair();
    right.channel.widen(64 << 10);
    let sent = bytes(2, 60 << 10);
    for piece in sent.chunks(7001) {
        let sealed = left.sealed(piece);
        left.socket.write_all(&sealed).unwrap();
        while !matches!(right.channel.receive(&right.socket), Err(Errno::EAGAIN)) {}
        assert!(!right.channel.has_ended());
    }
    assert!(right.channel.plain() == sent);
}

/// Keys for five records, each of which is used for no more.
#[test]
fn keys_are_renewed_before_their_record_limit() {
    let (mut left, mut right) = pair_with(suite::TLS13_AES_128_GCM_SHA256, 5);
    let sent = bytes(3, 40 * PLAIN_BYTES_MAX);
    for chunk in sent.chunks(4 * PLAIN_BYTES_MAX) {
        let sealed = left.sealed(chunk);
        assert!(right.given(&mut left, &sealed) == chunk);
    }
    let sealed = left.sealed(&sent[..16 * PLAIN_BYTES_MAX]);
    // Four records of pages and one that announces the next key, repeatedly.
    let beside = sealed.len() - 16 * (PLAIN_BYTES_MAX + 22);
    assert!(beside >= 3 * 27 && beside.is_multiple_of(27), "{beside}");
}

/// A peer with another implementation: its request for a new key is answered before any other data.
#[test]
fn key_is_renewed_on_the_peers_request() {
    let certificates = Certificates::new();
    let suite = suite::TLS13_AES_128_GCM_SHA256;
    let (theirs, ours) = UnixStream::pair().unwrap();
    let session = Session::server(Arc::new(certificates.server(suite))).unwrap();
    let fd = Arc::new(OwnedFd::from(ours.try_clone().unwrap()));
    let mut handshake = Handshake::new(fd, session);
    let name = ServerName::try_from("there").unwrap();
    let mut client = ClientConnection::new(Arc::new(certificates.client(suite)), name).unwrap();
    let mut theirs = theirs;
    while client.is_handshaking() {
        client.write_tls(&mut theirs).unwrap();
        if handshake.advance().unwrap() {
            break;
        }
        client.read_tls(&mut theirs).unwrap();
        client.process_new_packets().unwrap();
    }
    while client.wants_write() {
        client.write_tls(&mut theirs).unwrap();
    }
    while !handshake.advance().unwrap() {}
    let mut right = Side { channel: handshake.finish().unwrap(), socket: ours };
    for round in 0..3 {
        client.refresh_traffic_keys().unwrap();
        client.writer().write_all(b"more").unwrap();
        while client.wants_write() {
            client.write_tls(&mut theirs).unwrap();
        }
        assert_eq!(right.take(), b"more", "round {round}");
        let sealed = right.sealed(b"answer");
        assert_eq!(sealed.len(), 27 + 6 + 22, "a new key before the answer");
        right.socket.write_all(&sealed).unwrap();
        client.read_tls(&mut theirs).unwrap();
        client.process_new_packets().unwrap();
        let mut answer = [0; 6];
        client.reader().read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
    }
    // The peer has received this side's end, and this side the peer's.
    let closing = right.closing();
    right.socket.write_all(&closing).unwrap();
    client.read_tls(&mut theirs).unwrap();
    assert!(client.process_new_packets().unwrap().peer_has_closed());
    client.send_close_notify();
    client.write_tls(&mut theirs).unwrap();
    assert!(right.take().is_empty());
    assert!(right.channel.has_ended());
    assert_eq!(right.channel.cause(), None);
}

/// One changed bit anywhere: its record gives no data, earlier data is kept, and the sender gets an
/// alert.
#[test]
fn changed_bit_breaks_the_channel_and_sends_an_alert() {
    for at in 0..27 {
        let (mut left, mut right) = pair();
        let good = left.sealed(b"good");
        let mut bad = left.sealed(b"wrong");
        bad[at] ^= 1;
        // The version is not checked (RFC 8446, 5.1), but is authenticated; with another length the
        // record ends elsewhere.
        let rest = left.sealed(&[0; 300]);
        let got = right.given(&mut left, &[good, bad, rest].concat());
        assert_eq!(got, b"good", "byte {at}");
        assert!(right.channel.is_broken(), "byte {at}");
        let cause = right.channel.cause().unwrap();
        let socket = OwnedFd::from(right.socket.try_clone().unwrap());
        right.channel.part(&socket);
        assert!(left.take().is_empty());
        let told = left.channel.cause().unwrap();
        assert!(told.contains("alert"), "byte {at}: {told}");
        if at >= 5 {
            assert_eq!(cause, "a record does not decrypt: bytes changed in transit", "byte {at}");
            assert!(told.contains("bad record mac"), "byte {at}: {told}");
        }
    }
}

/// Wherever the connection ends: only after close_notify has it ended in order.
#[test]
fn connection_cut_before_close_notify_is_an_error() {
    let whole = {
        let (mut left, _right) = pair();
        left.sealed(b"something").len() + left.closing().len()
    };
    for cut in 0..=whole {
        let (mut left, mut right) = pair();
        let mut sealed = left.sealed(b"something");
        let first = sealed.len();
        sealed.extend(left.closing());
        assert_eq!(sealed.len(), whole);
        left.socket.write_all(&sealed[..cut]).unwrap();
        left.socket.shutdown(How::Both).unwrap();
        let got = right.take();
        assert_eq!(got, if cut >= first { &b"something"[..] } else { b"" }, "cut at {cut}");
        let cause = right.channel.cause();
        let is_cut = cause.is_some_and(|cause| cause.contains("cut without notice"));
        assert!(right.channel.has_ended());
        assert_eq!(is_cut, cut < whole, "cut at {cut}");
    }
}

/// Nothing after close_notify counts, whoever sent it.
#[test]
fn data_after_close_notify_is_ignored() {
    let (mut left, mut right) = pair();
    let mut sealed = left.closing();
    sealed.extend(left.sealed(b"more"));
    assert!(right.given(&mut left, &sealed).is_empty());
    assert!(right.channel.has_ended());
    assert_eq!(right.channel.cause(), None);
}

/// A peer cannot keep this side busy with empty records, and a few of them do no harm.
#[test]
fn too_many_empty_records_in_a_row_are_refused() {
    let update = [KEY_UPDATE, 0, 0, 1, 0];
    type Vain = fn(&mut Side) -> Vec<u8>;
    let empty: Vain = |side| side.record(DATA, b"");
    let cancelled: Vain = |side| side.record(super::super::records::ALERT, &[1, 90]);
    for vain in [empty, cancelled] {
        let (mut left, mut right) = pair();
        for _ in 0..3 {
            for _ in 0..VAIN_MAX {
                let record = vain(&mut left);
                assert!(right.given(&mut left, &record).is_empty());
            }
            let sealed = left.sealed(b"something");
            assert_eq!(right.given(&mut left, &sealed), b"something");
        }
        for _ in 0..=VAIN_MAX {
            let record = vain(&mut left);
            assert!(!right.channel.has_ended());
            assert!(right.given(&mut left, &record).is_empty());
        }
        assert!(right.channel.is_broken());
    }
    // New keys, of which each record needs the next one.
    let (mut left, mut right) = pair_with(suite::TLS13_AES_128_GCM_SHA256, MANY);
    for count in 0..=VAIN_MAX {
        assert!(!right.channel.has_ended(), "{count}");
        let mut out = Outgoing::default();
        left.channel.records_mut().renew(&mut out).unwrap();
        assert!(out.pending().len() == update.len() + 22);
        assert!(right.given(&mut left, out.pending()).is_empty());
    }
    assert!(right.channel.is_broken());
}

#[test]
fn invalid_records_are_refused() {
    type Bad = fn(&mut Side) -> Vec<u8>;
    let bad: [(&str, Bad); 8] = [
        ("something of the handshake", |side| side.record(HANDSHAKE, &[1, 0, 0, 1, 0])),
        ("a ticket from a client", |side| side.record(HANDSHAKE, &[4, 0, 0, 1, 0])),
        ("a part of a message", |side| side.record(HANDSHAKE, &[KEY_UPDATE, 0, 0])),
        ("a new key and more", |side| {
            side.record(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 0, KEY_UPDATE, 0, 0, 1, 0])
        }),
        ("a new key in another way", |side| side.record(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 2])),
        ("nothing but zeroes", |side| side.record(0, &[0; 100])),
        ("a record in the clear", |_| vec![DATA - 1, 3, 3, 0, 2, 1, 0]),
        ("a record that is too long", |_| vec![DATA, 3, 3, 0x41, 1]),
    ];
    for (what, bad) in bad {
        let (mut left, mut right) = pair();
        let good = left.sealed(b"good");
        let bad = bad(&mut left);
        assert_eq!(right.given(&mut left, &[good, bad].concat()), b"good", "{what}");
        assert!(right.channel.is_broken(), "{what}");
        let socket = OwnedFd::from(right.socket.try_clone().unwrap());
        right.channel.part(&socket);
        assert!(left.take().is_empty());
        assert!(left.channel.cause().unwrap().contains("alert"), "{what}");
    }
}

/// A buffer that a ring has returned is reused: making records allocates once.
#[test]
fn records_are_made_in_a_reused_buffer() {
    let (mut left, mut right) = pair();
    let sent = bytes(4, 100_000);
    let mut out = Outgoing::with_room(sent.len());
    let mut places = Vec::new();
    for _ in 0..3 {
        let copy = |at: usize, room: &mut [u8]| room.copy_from_slice(&sent[at..][..room.len()]);
        left.channel.append_with(&mut out, sent.len(), copy).unwrap();
        left.channel.flush(&mut out).unwrap();
        let records = out.into_bytes();
        places.push(records.as_slice().as_ptr());
        assert!(right.given(&mut left, records.as_slice()) == sent);
        out = Outgoing::reuse(records);
    }
    assert!(places.iter().all(|place| *place == places[0]), "{places:?}");
}
