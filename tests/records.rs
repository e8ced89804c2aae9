//! Bulk lanes of TLS from a sender other than umem: all of the data arrives, and data that was changed, truncated or
//! ended too early is not accepted.

mod support;

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use support::{Authority, DEADLINE, LaneToDestination, Scratch, Umem};
use umem_wire::{
    Capabilities, Frame, Hello, LaneRole, PROTOCOL, PageRange, RegionId, SessionId, transmit,
};

const UMEM: &str = env!("CARGO_BIN_EXE_umem");
const MIB: u64 = 8;
const PAGES: u64 = MIB << 8;

type Tls = StreamOwned<ClientConnection, TcpStream>;

/// A destination that has switched over to a guest without memory, and the bulk lane to it.
struct Arrival {
    scratch: Scratch,
    incoming: Umem,
    bulk: Tls,
}

impl Arrival {
    fn new() -> Arrival {
        let scratch = Scratch::new();
        let creds = Authority::new("ours").credentials(&scratch, "tls", "127.0.0.1");
        let ram = format!("ram0={}", scratch.ram("destination").display());
        let qmp = scratch.path("guest.qmp").display().to_string();
        let mib = MIB.to_string();
        let creds_path = creds.display().to_string();
        let umem = ["incoming", "--json", "--ram", &ram, "--tls-creds", &creds_path];
        let guest = ["tcp:127.0.0.1:0", "--", UMEM, "guest", "--incoming", "--threads", "0"];
        let guest = guest.into_iter().chain(["--ram", &ram, "--size", &mib, "--qmp", &qmp]);
        let mut incoming = Umem::start(umem.into_iter().chain(guest));
        let uri = incoming.event("listening")["uri"].as_str().unwrap().to_owned();
        let hello = |role, index| Hello {
            versions: PROTOCOL,
            capabilities: Capabilities::NONE,
            session: SessionId([7; 16]),
            role,
            epoch: 0,
            index,
            bulk_lanes: 1,
            proof: [0; 32],
        };
        let mut demand =
            LaneToDestination::open(dial(&creds, &uri), &hello(LaneRole::Demand, 0)).unwrap();
        let mut bulk = dial(&creds, &uri);
        LaneToDestination::open(&mut bulk, &hello(LaneRole::Bulk, 1)).unwrap();
        demand.switch_over(MIB << 20);
        incoming.event("running");
        // A lane of TLS is closed by both ends.
        std::thread::spawn(|| demand.until_closed());
        Arrival { scratch, incoming, bulk }
    }

    /// Encrypts `bytes`; the records have not been sent.
    fn records(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.bulk.conn.writer().write_all(bytes).unwrap();
        self.pending()
    }

    /// The records of close_notify.
    fn closing(&mut self) -> Vec<u8> {
        self.bulk.conn.send_close_notify();
        self.pending()
    }

    fn pending(&mut self) -> Vec<u8> {
        let mut records = Vec::new();
        while self.bulk.conn.wants_write() {
            self.bulk.conn.write_tls(&mut records).unwrap();
        }
        records
    }

    /// In pieces of this many bytes, each sent separately.
    fn send(&mut self, records: &[u8], piece: usize) {
        for piece in records.chunks(piece) {
            self.bulk.sock.write_all(piece).unwrap();
        }
    }

    /// The contents of the guest's file.
    fn memory(&self) -> Vec<u8> {
        fs::read(self.scratch.ram("destination")).unwrap()
    }
}

fn dial(creds: &Path, uri: &str) -> Tls {
    let pem = |name: &str| fs::read(creds.join(name)).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&pem("ca-cert.pem")).unwrap()).unwrap();
    let config =
        ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(&pem("client-cert.pem")).unwrap()],
                PrivateKeyDer::from_pem_slice(&pem("client-key.pem")).unwrap(),
            )
            .unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let stream = TcpStream::connect(uri.strip_prefix("tcp:").unwrap()).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_nodelay(true).unwrap();
    let mut session = ClientConnection::new(Arc::new(config), name).unwrap();
    session.set_buffer_limit(None);
    StreamOwned::new(session, stream)
}

fn range(first: u64, pages: u64) -> PageRange {
    PageRange { region: RegionId(0), first, pages }
}

fn contents(page: u64) -> Vec<u8> {
    (0..4096).map(|at| (page * 7 + at * 13) as u8 | 1).collect()
}

/// The frame of a run, and its pages.
fn data(first: u64, pages: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    transmit::encode(&Frame::Data(range(first, pages)), &mut bytes);
    (first..first + pages).for_each(|page| bytes.extend(contents(page)));
    bytes
}

fn frame(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    transmit::encode(frame, &mut bytes);
    bytes
}

/// Every division of the stream into records and receives, and a key update in the middle of a run. The close_notify of
/// both ends comes last, one after the other.
#[test]
fn lane_is_decoded_the_same_in_any_pieces() {
    for (record, piece) in
        [(1 << 20, 1 << 20), (16 << 10, 1000), (701, 4096), (4096, 4119), (37, 61)]
    {
        let mut arrival = Arrival::new();
        let sent = [data(0, 20), frame(&Frame::Zero(range(20, PAGES - 21))), data(PAGES - 1, 1)];
        for (number, bytes) in sent.concat().chunks(record).enumerate() {
            if number % 50 == 1 {
                arrival.bulk.conn.refresh_traffic_keys().unwrap();
            }
            let records = arrival.records(bytes);
            arrival.send(&records, piece);
        }
        let mut last = arrival.records(&frame(&Frame::LaneEnd));
        last.extend(arrival.closing());
        arrival.send(&last, piece);
        // The close_notify, after which the connection ends: without it this would be an error.
        assert_eq!(arrival.bulk.read(&mut [0]).unwrap(), 0);
        let memory = arrival.memory();
        for page in (0..20).chain([PAGES - 1]) {
            let start = (page * 4096) as usize;
            assert!(
                memory[start..start + 4096] == contents(page),
                "page {page}, {record}, {piece}"
            );
        }
        let middle = 20 * 4096..((PAGES - 1) * 4096) as usize;
        assert!(memory[middle].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn changed_bit_on_a_bulk_lane_is_reported_on_both_sides() {
    let mut arrival = Arrival::new();
    let good = arrival.records(&data(0, 4));
    let mut bad = arrival.records(&data(4, 1));
    bad[1000] ^= 4;
    arrival.send(&[good, bad].concat(), usize::MAX);
    let error = arrival.bulk.read(&mut [0]).unwrap_err();
    assert!(error.to_string().contains("BadRecordMac"), "{error}");
    let error = arrival.incoming.fails();
    assert!(error.contains("bulk lane 1"), "{error}");
    assert!(error.contains("TLS: a record does not decrypt"), "{error}");
    let memory = File::open(arrival.scratch.ram("destination"));
    let memory = memory.map(|mut file| {
        let mut page = [0; 4096];
        file.read_exact(&mut page).map(|()| page)
    });
    // The data before it is right.
    assert!(matches!(memory, Ok(Ok(page)) if page[..] == contents(0)));
}

/// Truncated behind a record, inside a record, or behind a run; and closed cleanly, but too early.
#[test]
fn truncated_bulk_lane_is_not_taken_for_ended() {
    for (cut, is_cut) in [(100, true), (1 << 20, true), (1 << 20, false)] {
        let mut arrival = Arrival::new();
        let mut records = arrival.records(&data(0, 2));
        if !is_cut {
            records.extend(arrival.closing());
        }
        records.truncate(cut);
        arrival.send(&records, usize::MAX);
        if is_cut {
            arrival.bulk.sock.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let error = arrival.incoming.fails();
        assert!(error.contains("bulk lane 1"), "{error}");
        assert!(error.contains("the source closed it"), "{error}");
        assert_eq!(error.contains("TLS: the connection was cut without notice"), is_cut, "{error}");
        let left = arrival.bulk.read(&mut [0]);
        let is_closed = matches!(&left, Ok(0))
            || left.as_ref().is_err_and(|error| {
                matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof)
            });
        assert!(is_closed, "{left:?}");
    }
}
