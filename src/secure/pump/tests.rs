//! Pumps over real sockets, with certificates of their own.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;

use nix::sys::socket::getsockopt;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::crypto::{CipherSuiteCommon, CryptoProvider, ring as provider};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite, Tls13CipherSuite};

use super::*;

/// AES-128-GCM whose keys may encrypt this many records.
fn suite(records: u64) -> SupportedCipherSuite {
    let SupportedCipherSuite::Tls13(suite) = provider::cipher_suite::TLS13_AES_128_GCM_SHA256;
    SupportedCipherSuite::Tls13(Box::leak(Box::new(Tls13CipherSuite {
        common: CipherSuiteCommon {
            suite: suite.common.suite,
            hash_provider: suite.common.hash_provider,
            confidentiality_limit: records,
        },
        hkdf_provider: suite.hkdf_provider,
        aead_alg: suite.aead_alg,
        quic: None,
    })))
}

struct Certificates {
    roots: Arc<RootCertStore>,
    own: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Certificates {
    fn new() -> Certificates {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let authority = CertifiedIssuer::self_signed(params, key).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(authority.der().clone()).unwrap();
        let params = CertificateParams::new(["there".to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let own = params.signed_by(&key, &authority).unwrap().der().clone();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        Certificates { roots: Arc::new(roots), own, key }
    }

    /// Both sides of a connection, not shaken yet.
    fn sessions(&self, records: u64) -> (Session, Session) {
        let provider = Arc::new(CryptoProvider {
            cipher_suites: vec![suite(records)],
            ..provider::default_provider()
        });
        let verifier =
            WebPkiClientVerifier::builder_with_provider(self.roots.clone(), provider.clone());
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(vec![self.own.clone()], self.key.clone_key())
            .unwrap();
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.roots.clone())
            .with_client_auth_cert(vec![self.own.clone()], self.key.clone_key())
            .unwrap();
        let name = ServerName::try_from("there").unwrap();
        (
            Session::client(Arc::new(client), name).unwrap(),
            Session::server(Arc::new(server)).unwrap(),
        )
    }
}

/// Two lanes with TLS between them, over sockets that hold little.
fn lanes(pumps: &Pumps, records: u64) -> (Lane, Lane) {
    let (left, right) = UnixStream::pair().unwrap();
    for socket in [&left, &right] {
        setsockopt(socket, sockopt::SndBuf, &8192).unwrap();
    }
    let lane = |socket: UnixStream, name: &str| Lane::new(socket.into(), name.into()).unwrap();
    secured(pumps, records, lane(left, "left"), lane(right, "right"))
}

/// The same over connections that are there.
fn secured(pumps: &Pumps, records: u64, left: Lane, right: Lane) -> (Lane, Lane) {
    let (client, server) = Certificates::new().sessions(records);
    let mut client = Handshake::new(left.socket(), client);
    let mut server = Handshake::new(right.socket(), server);
    while !(client.advance().unwrap() & server.advance().unwrap()) {}
    let start = |lane: Lane, handshake| {
        let fate = Fate::named(lane.name.clone());
        pumps.start(lane, handshake, fate).unwrap()
    };
    (start(left, client), start(right, server))
}

fn bytes(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// In pieces of many sizes; then this direction ends.
fn write(lane: &Lane, bytes: &[u8]) {
    let mut file = lane.blocking().unwrap();
    let (mut rest, mut size) = (bytes, 1);
    while !rest.is_empty() {
        let (now, later) = rest.split_at(size.min(rest.len()));
        file.write_all(now).unwrap();
        (rest, size) = (later, size * 3 % 300_007 + 1);
    }
}

/// Megabytes each way at once, with keys that are used up again and again: a real one's last for
/// 256 GiB.
#[test]
fn everything_arrives_while_keys_are_renewed() {
    let pumps = Pumps::default();
    let (left, right) = lanes(&pumps, 40);
    let (to_right, to_left) = (bytes(1, 6 << 20), bytes(2, 3 << 20));
    let read = |lane: &Lane, count: usize| {
        let mut file: File = lane.blocking().unwrap();
        let mut bytes = vec![0; count];
        file.read_exact(&mut bytes).unwrap();
        bytes
    };
    std::thread::scope(|scope| {
        scope.spawn(|| write(&left, &to_right));
        scope.spawn(|| write(&right, &to_left));
        let at_left = scope.spawn(|| read(&left, to_left.len()));
        assert!(read(&right, to_right.len()) == to_right);
        assert!(at_left.join().unwrap() == to_left);
    });
}

/// A lane that closes right behind its last byte.
#[test]
fn what_was_sent_before_the_end_arrives_and_the_end_behind_it() {
    let pumps = Pumps::default();
    let (left, right) = lanes(&pumps, 1 << 24);
    let sent = bytes(3, 1 << 20);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            write(&left, &sent);
            drop(left);
        });
        let mut got = Vec::new();
        right.blocking().unwrap().read_to_end(&mut got).unwrap();
        assert!(got == sent);
    });
    assert_eq!(right.cause(), None, "it ended in order");
    drop(right);
    // Both pumps have nothing left to do.
    drop(pumps);
}

/// Whoever gives up, all at once: no pump is left waiting for a lane that is still there.
#[test]
fn pumps_end_though_somebody_holds_a_lane() {
    let pumps = Pumps::default();
    let (left, right) = lanes(&pumps, 1 << 24);
    drop(pumps);
    for lane in [left, right] {
        let result = lane.blocking().unwrap().read(&mut [0; 1]);
        let has_ended = match &result {
            Ok(count) => *count == 0,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        };
        assert!(has_ended, "{result:?}");
    }
}

#[test]
fn a_cause_is_added_to_the_lane_it_is_of() {
    let pumps = Pumps::default();
    let (left, right) = lanes(&pumps, 1 << 24);
    let lost =
        |lane: &str| Error::Lost { side: "source", lane: lane.into(), what: "closed".into() };
    assert!(!pumps.explain(lost("left")).to_string().contains("TLS"));
    pumps.0.lock().unwrap()[0].fate.cause.set("why".into()).unwrap();
    assert!(pumps.explain(lost("left")).to_string().contains("closed (TLS: why)"));
    assert!(!pumps.explain(lost("right")).to_string().contains("TLS"));
    drop((left, right));
}

/// What a lane's connection is told when it turns out to be the demand lane's is told to the connection, which
/// the lane itself does not have any more.
#[test]
fn a_demand_lane_has_the_demand_lanes_timeout_behind_its_pump() {
    let pumps = Pumps::default();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    let left = Lane::new(dialled.into(), "demand lane".into()).unwrap();
    let right = Lane::new(accepted.into(), "a lane".into()).unwrap();
    let (dialled, accepted) = (left.socket(), right.socket());
    let (_left, right) = secured(&pumps, 1 << 20, left, right);
    let told = |connection: &OwnedFd| {
        let timeout_ms = getsockopt(connection, sockopt::TcpUserTimeout).unwrap();
        (timeout_ms, getsockopt(connection, sockopt::Priority).unwrap())
    };
    assert_ne!(told(&dialled), told(&accepted));
    let _right = right.assign(LaneRole::Demand, 0);
    assert_eq!(told(&dialled), told(&accepted));
}
