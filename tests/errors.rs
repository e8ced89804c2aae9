//! What umem says of a mistake that people make: each message names the object, the reason and the way out, in words of
//! the user's and not of a library's.

mod support;

use std::fs::{self, Permissions};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use support::peer::hello;
use support::waiting::{incoming_to_idle_guest, uri_of, write_snapshot};
use support::{Authority, Scratch, Umem, wait_for, write_private};

const UMEM: &str = env!("CARGO_BIN_EXE_umem");

/// A user whose only capability is to read this repository.
const NOBODY: [&str; 7] = [
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search",
    "--bounding-set=-all,+dac_read_search",
];

fn migrate_by(qmp: &Path) -> Umem {
    let qmp = qmp.display().to_string();
    Umem::start(["migrate", "-p", "--json", "--qmp", &qmp, "tcp:127.0.0.1:1"])
}

#[track_caller]
fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
}

#[test]
fn qmp_socket_that_cannot_be_used_is_named_with_the_reason() {
    let scratch = Scratch::new();
    let path = scratch.path("monitor");
    has(&migrate_by(&path).fails(), &["monitor: it does not exist", "start QEMU with `-qmp unix:"]);
    fs::write(&path, "no socket").unwrap();
    has(&migrate_by(&path).fails(), &["monitor: it is a file and no socket", "-qmp option"]);
    fs::remove_file(&path).unwrap();

    let listener = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    let qmp = path.display().to_string();
    let arguments = ["migrate", "-p", "--json", "--qmp", &qmp, "tcp:127.0.0.1:1"];
    let text = Umem::start_under(&NOBODY, arguments).fails();
    has(&text, &["monitor: this user may not use it", "as the user that runs QEMU, or as root"]);
    drop(listener);
    has(&migrate_by(&path).fails(), &["no process listens there any more", "start QEMU with"]);
}

#[test]
fn socket_that_is_not_qmp_is_named_for_what_it_is() {
    let scratch = Scratch::new();
    let control = scratch.path("control");
    let mut incoming = {
        let ram = format!("ram0={}", scratch.ram("destination").display());
        let (socket, qmp) = (control.display().to_string(), scratch.path("guest.qmp"));
        let qmp = qmp.display().to_string();
        let umem =
            ["incoming", "--json", "--control", &socket, "--ram", &ram, "tcp:127.0.0.1:0", "--"];
        let guest = [
            UMEM,
            "guest",
            "--incoming",
            "--threads",
            "0",
            "--ram",
            &ram,
            "--size",
            "8",
            "--qmp",
            &qmp,
        ];
        Umem::start([&umem[..], &guest[..]].concat())
    };
    uri_of(&mut incoming);
    let text = migrate_by(&control).fails();
    has(&text, &["control is the --control socket of a umem", "QEMU's -qmp option"]);

    for (greeting, expected) in [
        (
            "QEMU 10.0.2 monitor - type 'help' for more information\r\n(qemu) ",
            "a human monitor of QEMU",
        ),
        ("SSH-2.0-OpenSSH_9.2p1\r\n", "does not greet as a QMP socket does, but with \"SSH-2.0"),
    ] {
        let path = scratch.path("other");
        let listener = UnixListener::bind(&path).unwrap();
        let migrate = migrate_by(&path);
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(greeting.as_bytes()).unwrap();
        has(&migrate.fails(), &[expected, "-qmp option"]);
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn control_socket_that_cannot_be_used_is_named_with_the_reason() {
    let scratch = Scratch::new();
    let path = scratch.path("control");
    let asks = || Umem::start(["control", &path.display().to_string(), "status"]).fails();
    has(&asks(), &["control: it does not exist", "--control"]);
    fs::write(&path, "no socket").unwrap();
    has(&asks(), &["control: it is a file and no socket", "--control"]);
    fs::remove_file(&path).unwrap();
    drop(UnixListener::bind(&path).unwrap());
    has(&asks(), &["control: its umem has ended"]);
    fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    let monitor = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"{\"QMP\": {}}\n").unwrap();
        stream
    });
    has(&asks(), &["control: it is the QMP socket of a QEMU", "--control"]);
    monitor.join().unwrap();
}

/// Rust's parsers of numbers have sentences of their own.
#[test]
fn number_that_is_none_is_refused_in_plain_words() {
    for (arguments, expected) in [
        (&["migrate", "--lanes", "many", "--ram", "a=b", "tcp:a:1"][..], "not a whole number"),
        (&["migrate", "--lanes", "-1", "--ram", "a=b", "tcp:a:1"], "not a whole number"),
        (&["migrate", "--lanes", "70000", "--ram", "a=b", "tcp:a:1"], "the number is too large"),
        (&["migrate", "--lanes", "", "--ram", "a=b", "tcp:a:1"], "a whole number is missing"),
        (&["bench", "client", "-t", "long", "host"], "not a number"),
        (&["bench", "client", "-p", "http", "host"], "not a whole number"),
        (&["bench", "server", "-p", "70000"], "the number is too large"),
        (&["migrate", "--ram", "a=b", "tcp:a:http"], "not a port"),
    ] {
        let text = Umem::start(arguments).fails_as_misused();
        assert!(text.contains(expected), "{arguments:?}: {text}");
        for rust in ["digit found", "fit in target", "empty string", "float literal"] {
            assert!(!text.contains(rust), "{arguments:?}: {text}");
        }
    }
}

#[test]
fn missing_credential_is_named_with_its_option() {
    let scratch = Scratch::new();
    let source = scratch.ram("source");
    write_snapshot(&source, 1);
    let ram = format!("ram0={}", source.display());
    let migrate = |option: &str, path: &Path| {
        let path = path.display().to_string();
        Umem::start(["migrate", "-p", "--json", "--ram", &ram, option, &path, "tcp:127.0.0.1:1"])
            .fails()
    };
    let text = migrate("--secret-file", &scratch.path("nothing"));
    has(&text, &["nothing: No such file", "--secret-file", "head -c 32 /dev/urandom"]);
    let text = migrate("--tls-creds", &scratch.path("nowhere"));
    has(&text, &["nowhere/client-cert.pem: No such file", "--tls-creds", "ca-cert.pem"]);
    let creds = Authority::new("ours").credentials(&scratch, "tls", "127.0.0.1");
    let key = creds.join("client-key.pem");
    fs::remove_file(&key).unwrap();
    let text = migrate("--tls-creds", &creds);
    has(&text, &["client-key.pem: No such file", "--tls-creds"]);
    for encrypted in [
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIB\n-----END ENCRYPTED PRIVATE KEY-----\n",
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nMIIB\n\
         -----END RSA PRIVATE KEY-----\n",
    ] {
        write_private(&key, encrypted);
        let text = migrate("--tls-creds", &creds);
        has(&text, &["client-key.pem: the key is encrypted", "openssl pkey -in"]);
    }
    write_private(&key, "no key");
    has(&migrate("--tls-creds", &creds), &["client-key.pem: it has no private key in PEM"]);
}

/// The peer stays silent after its first bytes, as SSH does: the limits of a handshake do not matter.
#[test]
fn peer_of_another_protocol_is_named_at_its_first_bytes() {
    let scratch = Scratch::new();
    let source = scratch.ram("source");
    write_snapshot(&source, 1);
    let ram = format!("ram0={}", source.display());
    let creds = Authority::new("ours").credentials(&scratch, "tls", "127.0.0.1");
    let creds = creds.display().to_string();
    let secret = scratch.path("secret");
    write_private(&secret, "a secret of ours, and long enough");
    let secret = secret.display().to_string();
    for security in [&[][..], &["--secret-file", &secret], &["--tls-creds", &creds]] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let arguments =
            [&["migrate", "-p", "--json", "--ram", &ram][..], security, &[&uri]].concat();
        let migrate = Umem::start(arguments);
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n").unwrap();
        let text = migrate.fails();
        has(&text, &["it speaks SSH"]);
        assert!(
            text.contains("`umem incoming`") || text.contains("neither TLS nor umem"),
            "{text}"
        );
    }

    let mut incoming = incoming_to_idle_guest(&scratch, 1);
    let uri = uri_of(&mut incoming);
    let address = uri.strip_prefix("tcp:").unwrap();
    for (first, expected) in [
        (&b"SSH-2.0-OpenSSH_9.2p1\r\n"[..], "it speaks SSH, not umem"),
        (b"GET / HTTP/1.1\r\n", "it speaks HTTP, not umem"),
        (b"\x16\x03\x01\x02", "it uses TLS, and this side has no --tls-creds"),
    ] {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(first).unwrap();
        wait_for(expected, || incoming.stderr().contains(expected).then_some(()));
    }
    // A umem that is slow is no foreign peer.
    let mut slow = std::net::TcpStream::connect(address).unwrap();
    slow.write_all(&hello(0, 1).encode()[..2]).unwrap();
}

/// umem replaces the socket of a umem that was killed, and no other file.
#[test]
fn address_of_a_killed_umem_is_taken_and_that_of_another_file_is_not() {
    let scratch = Scratch::new();
    let path = scratch.path("lanes");
    let uri = format!("unix:{}", path.display());
    let incoming = || {
        let ram = format!("ram0={}", scratch.ram("destination").display());
        let qmp = scratch.path("guest.qmp").display().to_string();
        let umem = ["incoming", "--json", "--ram", &ram, &uri, "--", UMEM, "guest", "--incoming"];
        let guest = ["--threads", "0", "--ram", &ram, "--size", "8", "--qmp", &qmp];
        Umem::start([&umem[..], &guest[..]].concat())
    };
    drop(UnixListener::bind(&path).unwrap());
    let mut first = incoming();
    first.event("listening");
    let bench = |uri: &str| Umem::start(["bench", "server", uri]).fails();
    has(&bench(&uri), &["cannot listen on unix:", "another program listens at this socket"]);
    first.kill();
    let file = scratch.path("file");
    fs::write(&file, "no socket").unwrap();
    let text = bench(&format!("unix:{}", file.display()));
    has(&text, &["cannot listen on unix:", "the file there is no socket"]);
    assert_eq!(fs::read(&file).unwrap(), b"no socket");
}
