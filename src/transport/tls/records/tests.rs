//! Against the records of RFC 8448, section 3: a simple handshake with one round trip, TLS_AES_128_GCM_SHA256.

use super::fixed::FixedKey;
use super::*;

/// "{client} derive write traffic keys for application data".
const CLIENT: FixedKey = (hex("17422dda596ed5d9acd890e3c63f5051"), hex("5b78923dee08579033e523d9"));

/// "{server} derive write traffic keys for application data".
const SERVER: FixedKey = (hex("9f02283b6c9c07efc26bb9f2ac92e356"), hex("cf782b88dd83549aadf1e984"));

/// Its payload is the bytes 0 to 49.
const CLIENT_DATA: [u8; 72] = hex(
    "1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b9819a8a5b46b395bd54a9a20441e2b\
     62974e1f5a6292a2977014bd1e3deae63aeebb21694915e4",
);

/// The same payload. A ticket was sent before.
const SERVER_DATA: [u8; 72] = hex(
    "17030300432e937e11ef4ac740e538ad36005fc4a46932fc3225d05f82aa1b36e30efaf97d90e6dffc602dcb501a59a8\
     fcc49c4bf2e5f0a21c0047c2abf332540dd032e167c2955d",
);

const CLIENT_ALERT: [u8; 24] = hex("1703030013c9872760655666b74d7ff1153efd6db6d0b0e3");
const SERVER_ALERT: [u8; 24] = hex("1703030013b58fd67166ebf599d24720cfbe7efa7a8864a9");

const fn hex<const N: usize>(text: &str) -> [u8; N] {
    const fn digit(byte: u8) -> u8 {
        match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            _ => panic!("no digit"),
        }
    }
    let text = text.as_bytes();
    assert!(text.len() == 2 * N);
    let (mut bytes, mut index) = ([0; N], 0);
    while index < N {
        bytes[index] = digit(text[2 * index]) << 4 | digit(text[2 * index + 1]);
        index += 1;
    }
    bytes
}

fn payload() -> Vec<u8> {
    (0..50).collect()
}

/// The plaintext that a receiver gets from these records.
fn opened(records: &mut Records, sealed: &[u8]) -> Vec<u8> {
    let mut buffer = sealed.to_vec();
    let mut window = Window { plain: 0..0, sealed: 0..sealed.len() };
    records.open(&mut buffer, &mut window).unwrap();
    assert_eq!(window.sealed, sealed.len()..sealed.len(), "every record is whole");
    buffer[window.plain].to_vec()
}

#[test]
fn sealed_records_equal_those_of_rfc_8448() {
    for (ours, theirs, before, data, alert) in [
        (CLIENT, SERVER, 0, CLIENT_DATA, CLIENT_ALERT),
        (SERVER, CLIENT, 1, SERVER_DATA, SERVER_ALERT),
    ] {
        let mut records = Records::fixed(theirs, ours, u64::MAX);
        records.writing.sequence = before;
        let mut out = Outgoing::default();
        records.append(&mut out, &payload()).unwrap();
        records.close(&mut out).unwrap();
        assert_eq!(out.pending(), [&data[..], &alert].concat());
    }
}

#[test]
fn records_of_rfc_8448_are_opened() {
    for (ours, theirs, before, data, alert) in [
        (SERVER, CLIENT, 0, CLIENT_DATA, CLIENT_ALERT),
        (CLIENT, SERVER, 1, SERVER_DATA, SERVER_ALERT),
    ] {
        let mut records = Records::fixed(theirs, ours, u64::MAX);
        records.reading.sequence = before;
        assert_eq!(opened(&mut records, &data), payload());
        assert!(!records.peer_has_closed());
        assert_eq!(opened(&mut records, &alert), b"");
        assert!(records.peer_has_closed());
    }
}
