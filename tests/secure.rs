//! Access control: TLS with certificates on both sides, the shared secret, and unauthenticated addresses.

#[path = "secure/files.rs"]
mod files;
#[path = "secure/secret.rs"]
mod secret;
mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use nix::sys::signal::Signal;
use rcgen::{SerialNumber, date_time_ymd};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, Stream, StreamOwned};
use serde_json::Value;
use support::{Authority, DEADLINE, LaneToDestination, Scratch, Umem, wait_for, write_private};
use umem_wire::{Capabilities, HELLO_BYTES, Hello, LaneRole, PROTOCOL, SessionId, Welcome};

const UMEM: &str = env!("CARGO_BIN_EXE_umem");
const MIB: u64 = 8;
const SECRET: &str = "a secret of ours, and long enough";

/// A snapshot with data, zeroes and holes, and its destination.
struct Move {
    scratch: Scratch,
}

impl Move {
    fn new() -> Move {
        let scratch = Scratch::new();
        let file = File::create(scratch.ram("source")).unwrap();
        file.set_len(MIB << 20).unwrap();
        for page in (0..MIB << 8).filter(|page| page % 4 != 0) {
            let bytes: Vec<u8> = (0..4096u64).map(|at| (page * 7 + at * 13) as u8).collect();
            file.write_all_at(&bytes, page * 4096).unwrap();
        }
        Move { scratch }
    }

    fn secret(&self, name: &str, text: &str) -> String {
        let path = self.scratch.path(name);
        write_private(&path, text);
        path.display().to_string()
    }

    fn incoming(&self, uri: &str, security: &[&str]) -> (Umem, String) {
        let mut incoming = Umem::start(self.incoming_arguments(uri, security));
        let uri = incoming.event("listening")["uri"].as_str().unwrap().to_owned();
        (incoming, uri)
    }

    fn incoming_arguments(&self, uri: &str, security: &[&str]) -> Vec<String> {
        let ram = format!("ram0={}", self.scratch.ram("destination").display());
        let qmp = self.scratch.path("guest.qmp").display().to_string();
        let mib = MIB.to_string();
        let umem =
            ["incoming", "--json", "--ram", &ram].into_iter().chain(security.iter().copied());
        let guest = [uri, "--", UMEM, "guest", "--incoming", "--threads", "0", "--ram", &ram];
        let umem = umem.chain(guest).chain(["--size", &mib, "--qmp", &qmp]);
        umem.map(str::to_owned).collect()
    }

    fn migrate(&self, uri: &str, security: &[&str]) -> Umem {
        let ram = format!("ram0={}", self.scratch.ram("source").display());
        let arguments = ["migrate", "-p", "--json", "--ram", &ram];
        Umem::start(arguments.into_iter().chain(security.iter().copied()).chain([uri]))
    }

    /// Runs both sides to their end, and compares every byte.
    fn succeeds(&self, mut incoming: Umem, mut migrate: Umem, security: &str) {
        assert_eq!(migrate.event("connected")["security"], security);
        migrate.event("completed");
        assert_eq!(incoming.event("connected")["security"], security);
        incoming.event("completed");
        migrate.succeeds();
        let bytes = |name| fs::read(self.scratch.ram(name)).unwrap();
        assert!(bytes("source") == bytes("destination"), "every byte is equal");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn says(umem: &Umem, text: &str) {
    wait_for(format!("{text:?} on stderr"), || umem.stderr().contains(text).then_some(()));
}

fn socket(uri: &str) -> TcpStream {
    let stream = TcpStream::connect(uri.strip_prefix("tcp:").unwrap()).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// Runs the demo with these options of both sides.
fn demo(arguments: &[&str]) -> Value {
    let output = Command::new(UMEM).args(["demo", "--json"]).args(arguments).output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    serde_json::from_str(stdout.lines().last().unwrap()).unwrap()
}

#[test]
fn guest_moves_behind_tls_with_every_word_right() {
    let scratch = Scratch::new();
    let creds = Authority::new("ours").credentials(&scratch, "tls", "127.0.0.1");
    for options in [
        &["--size", "128", "--lanes", "3"][..],
        &["--size", "64", "--kind", "private", "--postcopy-flags", "1"],
        &["--size", "64", "--kind", "anonymous", "--discard"],
        &["--size", "64", "--stop-first"],
        &["--size", "64", "--precopy"],
        &["--size", "64", "--lanes", "2", "--checksum"],
        &["--size", "64", "--kind", "anonymous", "--checksum"],
    ] {
        let report = demo(&[options, &["--tls-creds", text(&creds)]].concat());
        assert_eq!(report["bad_pages"], 0, "{report}");
        assert_eq!(report["guest_writes_lost"], 0, "{report}");
        assert!(report["verified_pages"].as_u64() >= Some(64 * 256), "{report}");
    }
}

#[test]
fn guest_moves_with_a_secret() {
    let moving = Move::new();
    let secret = moving.secret("secret", SECRET);
    let report = demo(&["--size", "64", "--lanes", "2", "--secret-file", &secret]);
    assert_eq!(report["bad_pages"], 0, "{report}");
}

#[test]
fn every_address_scheme_takes_tls_and_a_secret() {
    let moving = Move::new();
    let creds = Authority::new("ours").credentials(&moving.scratch, "tls", "there.example");
    let (secret, same) = (moving.secret("one", SECRET), moving.secret("other", SECRET));
    let tls = ["--tls-creds", text(&creds)];
    let named = [&tls[..], &["--tls-hostname", "there.example"]].concat();
    let unix = format!("unix:{}", moving.scratch.path("lanes").display());

    for (uri, ours, theirs, security) in [
        ("tcp:127.0.0.1:0", &tls[..], &named[..], "tls"),
        (&unix, &tls, &named, "tls"),
        (&unix, &["--secret-file", &secret], &["--secret-file", &same], "secret"),
    ] {
        let moving = Move::new();
        let (incoming, uri) = moving.incoming(uri, ours);
        let migrate = moving.migrate(&uri, &[theirs, &["--lanes", "2"]].concat());
        moving.succeeds(incoming, migrate, security);
    }

    let ours = [&tls[..], &["--secret-file", &secret]].concat();
    let theirs = [&named[..], &["--secret-file", &same]].concat();
    let (left, right) = UnixStream::pair().unwrap();
    let incoming = Umem::start_inheriting(&left, 17, moving.incoming_arguments("fd:17", &ours));
    let ram = format!("ram0={}", moving.scratch.ram("source").display());
    let arguments = [&["migrate", "-p", "--json", "--ram", &ram, "fd:18"][..], &theirs].concat();
    let migrate = Umem::start_inheriting(&right, 18, arguments);
    drop((left, right));
    moving.succeeds(incoming, migrate, "tls+secret");
}

/// A refused peer gets the reason, the destination prints the peer's identity, and the right peer is still accepted.
#[test]
fn source_with_a_bad_certificate_is_refused() {
    let moving = Move::new();
    let ours = Authority::new("ours");
    let creds = |name: &str| ours.credentials(&moving.scratch, name, "127.0.0.1");
    let destination = creds("destination");
    ours.revoke(&destination, 77);
    let (mut incoming, uri) =
        moving.incoming("tcp:127.0.0.1:0", &["--tls-creds", text(&destination)]);

    let stranger = creds("stranger");
    Authority::new("somebody's").write(&stranger, "client", &["x"], |_| {});
    let expired = creds("expired");
    ours.write(&expired, "client", &["x"], |params| {
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2021, 1, 1);
    });
    let revoked = creds("revoked");
    ours.write(&revoked, "client", &["x"], |params| {
        params.serial_number = Some(SerialNumber::from(77));
    });
    let server = creds("server");
    fs::copy(server.join("server-cert.pem"), server.join("client-cert.pem")).unwrap();
    fs::copy(server.join("server-key.pem"), server.join("client-key.pem")).unwrap();

    for (creds, theirs, ours) in [
        (
            &stranger,
            "it does not accept our certificate",
            "signed by no authority in our ca-cert.pem",
        ),
        (&expired, "it does not accept our certificate", "has expired"),
        (&revoked, "it does not accept our certificate", "has been revoked"),
        (&server, "it does not accept our certificate", "a source one for clients"),
    ] {
        let error = moving.migrate(&uri, &["--tls-creds", text(creds)]).fails();
        assert!(error.contains("no secure connection to the destination"), "{error}");
        assert!(error.contains(theirs), "{ours}: {error}");
        says(&incoming, ours);
    }
    let error = moving.migrate(&uri, &[]).fails();
    assert!(error.contains("only TLS is accepted here: give --tls-creds"), "{error}");
    says(&incoming, "refused: only TLS is accepted here");
    assert!(incoming.is_running());

    let good = creds("good");
    let migrate = moving.migrate(&uri, &["--tls-creds", text(&good)]);
    moving.succeeds(incoming, migrate, "tls");
}

#[test]
fn source_sends_no_data_to_a_bad_certificate() {
    let moving = Move::new();
    let ours = Authority::new("ours");
    let creds = ours.credentials(&moving.scratch, "tls", "elsewhere.example");
    let stranger = Authority::new("strangers'").credentials(&moving.scratch, "x", "127.0.0.1");
    let secret = moving.secret("secret", SECRET);

    let (incoming, uri) = moving.incoming("tcp:127.0.0.1:0", &["--tls-creds", text(&creds)]);
    let error = moving.migrate(&uri, &["--tls-creds", text(&creds)]).fails();
    let hint = "is not for 127.0.0.1, but for elsewhere.example:";
    assert!(error.contains(hint) && error.contains("--tls-hostname"), "{error}");
    let error = moving.migrate(&uri, &["--tls-creds", text(&stranger)]).fails();
    assert!(error.contains("signed by no authority in our ca-cert.pem"), "{error}");
    says(&incoming, "TLS: it does not accept our certificate");
    let named = ["--tls-creds", text(&creds), "--tls-hostname", "elsewhere.example"];
    moving.succeeds(incoming, moving.migrate(&uri, &named), "tls");

    // A peer without TLS.
    let moving = Move::new();
    let (incoming, uri) = moving.incoming("tcp:127.0.0.1:0", &["--secret-file", &secret]);
    let error = moving.migrate(&uri, &named).fails();
    assert!(error.contains("was it started with --tls-creds?"), "{error}");
    says(&incoming, "it uses TLS, and this side has no --tls-creds");
    let migrate = moving.migrate(&uri, &["--secret-file", &secret]);
    moving.succeeds(incoming, migrate, "secret");
}

/// A source played by the test, which presents the certificate of `creds`, if any.
fn tls(creds: &Path, with_certificate: bool) -> ClientConnection {
    let pem = |name: &str| fs::read(creds.join(name)).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&pem("ca-cert.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match with_certificate {
        false => config.with_no_client_auth(),
        true => config
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(&pem("client-cert.pem")).unwrap()],
                PrivateKeyDer::from_pem_slice(&pem("client-key.pem")).unwrap(),
            )
            .unwrap(),
    };
    let name = ServerName::try_from("127.0.0.1").unwrap();
    ClientConnection::new(Arc::new(config), name).unwrap()
}

fn hello() -> Hello {
    Hello {
        versions: PROTOCOL,
        capabilities: Capabilities::NONE,
        session: SessionId([7; 16]),
        role: LaneRole::Demand,
        epoch: 0,
        index: 0,
        bulk_lanes: 0,
        proof: [0; 32],
    }
}

#[test]
fn source_without_a_certificate_is_refused() {
    let moving = Move::new();
    let creds = Authority::new("ours").credentials(&moving.scratch, "tls", "127.0.0.1");
    let (incoming, uri) = moving.incoming("tcp:127.0.0.1:0", &["--tls-creds", text(&creds)]);
    let (mut session, mut stream) = (tls(&creds, false), socket(&uri));
    let mut tls = Stream::new(&mut session, &mut stream);
    // A client's handshake is over before the server has checked it; the answer is an alert.
    let error = tls
        .write_all(&hello().encode())
        .and_then(|()| tls.read_exact(&mut [0; HELLO_BYTES]))
        .unwrap_err();
    assert!(error.to_string().contains("CertificateRequired"), "{error}");
    says(&incoming, "TLS: it shows no certificate");
    let migrate = moving.migrate(&uri, &["--tls-creds", text(&creds)]);
    moving.succeeds(incoming, migrate, "tls");
}

/// Foreign connections that send nothing, or start and stop, are served beside all others.
#[test]
fn silent_tls_client_does_not_delay_others() {
    let moving = Move::new();
    let creds = Authority::new("ours").credentials(&moving.scratch, "tls", "127.0.0.1");
    let (incoming, uri) = moving.incoming("tcp:127.0.0.1:0", &["--tls-creds", text(&creds)]);
    let silent: Vec<TcpStream> = (0..3).map(|_| socket(&uri)).collect();
    let mut begun = socket(&uri);
    let mut hello = Vec::new();
    tls(&creds, true).write_tls(&mut hello).unwrap();
    begun.write_all(&hello[..hello.len() / 2]).unwrap();
    // A connection whose handshake is over, and whose hello never comes.
    let (mut session, mut stream) = (tls(&creds, true), socket(&uri));
    while session.is_handshaking() {
        session.complete_io(&mut stream).unwrap();
    }
    let migrate = moving.migrate(&uri, &["--tls-creds", text(&creds)]);
    moving.succeeds(incoming, migrate, "tls");
    drop((silent, begun, stream));
}

#[test]
fn tls_handshake_can_be_interrupted() {
    let moving = Move::new();
    let creds = Authority::new("ours").credentials(&moving.scratch, "tls", "127.0.0.1");
    let tls = ["--tls-creds", text(&creds)];
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let mut migrate = moving.migrate(&uri, &tls);
    let (mut stream, _) = listener.accept().unwrap();
    stream.read_exact(&mut [0; 16]).unwrap();
    migrate.signal(Signal::SIGINT);
    let error = migrate.fails();
    assert!(error.contains("interrupted; the guest continues at the source"), "{error}");

    let (mut incoming, uri) = moving.incoming("tcp:127.0.0.1:0", &tls);
    let stream = socket(&uri);
    incoming.signal(Signal::SIGINT);
    let error = incoming.fails();
    assert!(error.contains("interrupted; no guest had arrived"), "{error}");
    drop(stream);
}

/// A peer that can only cut the connection cannot make it look like a clean end.
#[test]
fn truncated_tls_connection_is_not_taken_for_ended() {
    for is_cut in [true, false] {
        let moving = Move::new();
        let creds = Authority::new("ours").credentials(&moving.scratch, "tls", "127.0.0.1");
        let (mut incoming, uri) =
            moving.incoming("tcp:127.0.0.1:0", &["--tls-creds", text(&creds)]);
        let (mut session, mut stream) = (tls(&creds, true), socket(&uri));
        let mut tls = Stream::new(&mut session, &mut stream);
        tls.write_all(&hello().encode()).unwrap();
        let mut welcome = [0; HELLO_BYTES];
        tls.read_exact(&mut welcome).unwrap();
        Welcome::decode(&welcome).unwrap().check(&hello()).unwrap();
        incoming.event("connected");
        if !is_cut {
            session.send_close_notify();
            session.complete_io(&mut stream).unwrap();
        }
        drop(stream);
        let error = incoming.fails();
        assert!(error.contains("the source closed it"), "{error}");
        assert_eq!(error.contains("TLS: the connection was cut without notice"), is_cut, "{error}");
    }
}

/// Neither does a manual resume. The old listener still works then.
#[test]
fn resume_does_not_open_an_unauthenticated_address() {
    let moving = Move::new();
    let control = moving.scratch.path("control");
    let (mut incoming, uri) = moving.incoming("tcp:127.0.0.1:0", &["--control", text(&control)]);
    let hello = Hello { capabilities: Capabilities::RECOVERY, ..hello() };
    let mut lane = LaneToDestination::open(socket(&uri), &hello).expect("the first");
    lane.switch_over(MIB << 20);
    incoming.event("running");
    let resume = |uri: &str| Umem::start(["control", text(&control), "resume", uri]).succeeds();
    resume("tcp:0.0.0.0:0");
    says(&incoming, "not resumed: tcp:0.0.0.0:");
    says(&incoming, "open to any host that can reach it: give --tls-creds");
    resume("tcp:127.0.0.1:0");
    assert_ne!(incoming.event("listening")["uri"].as_str(), Some(&*uri));
}

/// Only the identity that began a migration continues it: another certificate of the same authority is refused, even if
/// its owner knows the session.
#[test]
fn resume_with_another_certificate_is_refused() {
    let moving = Move::new();
    let ours = Authority::new("ours");
    let creds = ours.credentials(&moving.scratch, "tls", "127.0.0.1");
    let others = ours.credentials(&moving.scratch, "others", "127.0.0.1");
    let (mut incoming, uri) = moving.incoming("tcp:127.0.0.1:0", &["--tls-creds", text(&creds)]);
    let hello = Hello { capabilities: Capabilities::RECOVERY, ..hello() };
    let open = |creds: &Path, epoch| {
        let stream = StreamOwned::new(tls(creds, true), socket(&uri));
        LaneToDestination::open(stream, &Hello { epoch, ..hello.clone() })
    };
    let mut lane = open(&creds, 0).expect("the first");
    lane.switch_over(MIB << 20);
    incoming.event("running");

    let refused = open(&others, 1).err().expect("another identity is refused");
    assert!(refused.contains("began with another certificate"), "{refused}");
    let _back = open(&creds, 1).expect("the identity of the first lane replaces the lane");
    incoming.event("recovering");
    incoming.event("resumed");
}

/// Every certificate of the authority passes the handshake. A connection that belongs to no session gets no thread,
/// however long it stays.
#[test]
fn connection_without_a_session_gets_no_thread() {
    let moving = Move::new();
    let ours = Authority::new("ours");
    let creds = ours.credentials(&moving.scratch, "tls", "127.0.0.1");
    let others = ours.credentials(&moving.scratch, "others", "127.0.0.1");
    let (mut incoming, uri) = moving.incoming("tcp:127.0.0.1:0", &["--tls-creds", text(&creds)]);
    let hello = Hello { capabilities: Capabilities::RECOVERY, ..hello() };
    let stream = StreamOwned::new(tls(&creds, true), socket(&uri));
    let mut lane = LaneToDestination::open(stream, &hello).expect("the first");
    lane.switch_over(MIB << 20);
    incoming.event("running");
    let threads = || {
        let threads = fs::read_dir(format!("/proc/{}/task", incoming.pid())).unwrap();
        threads.flatten().count()
    };
    let before = threads();
    let mut strangers = Vec::new();
    for index in 0..40 {
        let mut stream = StreamOwned::new(tls(&others, true), socket(&uri));
        let (session, epoch) = (SessionId([index; 16]), u32::from(index) % 2);
        stream.write_all(&Hello { session, epoch, ..hello.clone() }.encode()).unwrap();
        let mut welcome = [0; HELLO_BYTES];
        stream.read_exact(&mut welcome).unwrap();
        assert!(Welcome::decode(&welcome).is_err(), "umem accepts the connection");
        // The connection stays, and sends more.
        let _ = stream.write_all(b"x");
        strangers.push(stream);
    }
    assert!(threads() <= before, "{} threads, of {before} before", threads());
    drop(strangers);
}

/// Garbage in place of a record is an error of that lane, which both ends report.
#[test]
fn changed_tls_record_ends_the_lane() {
    let moving = Move::new();
    let creds = Authority::new("ours").credentials(&moving.scratch, "tls", "127.0.0.1");
    let (mut incoming, uri) = moving.incoming("tcp:127.0.0.1:0", &["--tls-creds", text(&creds)]);
    let (mut session, mut stream) = (tls(&creds, true), socket(&uri));
    let mut tls = Stream::new(&mut session, &mut stream);
    tls.write_all(&hello().encode()).unwrap();
    tls.read_exact(&mut [0; HELLO_BYTES]).unwrap();
    incoming.event("connected");
    session.writer().write_all(&[1; 64]).unwrap();
    let mut record = Vec::new();
    session.write_tls(&mut record).unwrap();
    *record.last_mut().unwrap() ^= 1;
    stream.write_all(&record).unwrap();
    let error = Stream::new(&mut session, &mut stream).read(&mut [0; 1]).unwrap_err();
    assert!(error.to_string().contains("BadRecordMac"), "{error}");
    let error = incoming.fails();
    assert!(error.contains("TLS: a record does not decrypt"), "{error}");
}

#[test]
fn certificates_are_refused_when_the_revocation_list_has_expired() {
    let moving = Move::new();
    let ours = Authority::new("ours");
    let current = ours.credentials(&moving.scratch, "current", "127.0.0.1");
    let expired = ours.credentials(&moving.scratch, "expired", "127.0.0.1");
    ours.revoke(&current, 77);
    ours.revoke_until(&expired, 77, 2021);
    let reason = "its certificate cannot be checked: our ca-crl.pem has expired";

    let (mut incoming, uri) = moving.incoming("tcp:127.0.0.1:0", &["--tls-creds", text(&expired)]);
    moving.migrate(&uri, &["--tls-creds", text(&current)]).fails();
    says(&incoming, reason);
    incoming.signal(Signal::SIGINT);
    incoming.wait();

    let (incoming, uri) = moving.incoming("tcp:127.0.0.1:0", &["--tls-creds", text(&current)]);
    let error = moving.migrate(&uri, &["--tls-creds", text(&expired)]).fails();
    assert!(error.contains(reason), "{error}");
    let migrate = moving.migrate(&uri, &["--tls-creds", text(&current)]);
    moving.succeeds(incoming, migrate, "tls");
}

#[test]
fn unauthenticated_address_needs_an_explicit_option() {
    let moving = Move::new();
    let secret = moving.secret("secret", SECRET);
    for uri in ["tcp:0.0.0.0:0", "tcp::0", "tcp:[::]:0"] {
        let error = Umem::start(moving.incoming_arguments(uri, &[])).fails_as_misused();
        for way in ["--tls-creds", "--secret-file", "--insecure"] {
            assert!(error.contains(way), "{error}");
        }
    }
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let arguments = moving.incoming_arguments("fd:9", &[]);
    let error = Umem::start_inheriting(&listener, 9, arguments).fails_as_misused();
    assert!(error.contains("--insecure"), "{error}");

    let server = ["bench", "server", "--json", "tcp:0.0.0.0:0"];
    let error = Umem::start(server).fails_as_misused();
    assert!(error.contains("give --insecure"), "{error}");
    Umem::start(server.into_iter().chain(["--insecure"])).event("listening");

    let (incoming, uri) = moving.incoming("tcp:0.0.0.0:0", &["--insecure"]);
    assert!(
        incoming.stderr().contains("is open: any host that reaches it"),
        "{}",
        incoming.stderr()
    );
    moving.succeeds(incoming, moving.migrate(&uri, &[]), "none");
    let moving = Move::new();
    let (incoming, uri) = moving.incoming("tcp:0.0.0.0:0", &["--secret-file", &secret]);
    assert_eq!(incoming.stderr().matches("open").count(), 0, "{}", incoming.stderr());
    let migrate = moving.migrate(&uri, &["--secret-file", &secret]);
    moving.succeeds(incoming, migrate, "secret");
}
