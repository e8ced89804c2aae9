//! The owners and modes of files: certificates, keys, secrets, and what umem makes itself.

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use super::support::{Authority, Umem, write_private};
use super::{Move, SECRET, text};

#[test]
fn certificate_and_secret_files_are_checked_at_start() {
    let moving = Move::new();
    let ours = Authority::new("ours");
    let creds = ours.credentials(&moving.scratch, "tls", "127.0.0.1");
    let fails = |option: &str, path: &Path| {
        let arguments = moving.incoming_arguments("tcp:127.0.0.1:0", &[option, text(path)]);
        let incoming = Umem::start(arguments).fails();
        (incoming, moving.migrate("tcp:127.0.0.1:1", &[option, text(path)]).fails())
    };
    for key in ["server-key.pem", "client-key.pem"] {
        fs::set_permissions(creds.join(key), Permissions::from_mode(0o640)).unwrap();
    }
    let (incoming, migrate) = fails("--tls-creds", &creds);
    let path = text(&creds);
    assert!(incoming.contains(&format!("(mode 0640): chmod 600 {path}/server-key")), "{incoming}");
    assert!(migrate.contains(&format!("(mode 0640): chmod 600 {path}/client-key")), "{migrate}");

    for (role, other) in [("server", "client"), ("client", "server")] {
        let other = fs::read_to_string(creds.join(format!("{other}-key.pem"))).unwrap();
        write_private(&creds.join(format!("{role}-key.pem")), &other);
        ours.write(&creds, if role == "server" { "client" } else { "unused" }, &["x"], |_| {});
    }
    let (incoming, _) = fails("--tls-creds", &creds);
    assert!(
        incoming.contains("server-cert.pem: the key beside it belongs to another certificate"),
        "{incoming}"
    );

    fs::write(creds.join("ca-cert.pem"), "rubbish").unwrap();
    let (incoming, migrate) = fails("--tls-creds", &creds);
    for error in [incoming, migrate] {
        assert!(error.contains("ca-cert.pem: it has no certificate in PEM"), "{error}");
    }
    let (incoming, migrate) = fails("--tls-creds", &moving.scratch.path("nowhere"));
    assert!(incoming.contains("nowhere/server-cert.pem: No such file"), "{incoming}");
    assert!(migrate.contains("nowhere/client-cert.pem: No such file"), "{migrate}");

    let secret = PathBuf::from(moving.secret("secret", "too short\n"));
    let (incoming, migrate) = fails("--secret-file", &secret);
    for error in [incoming, migrate] {
        assert!(error.contains("a secret of 9 bytes"), "{error}");
    }
    write_private(&secret, SECRET);
    fs::set_permissions(&secret, Permissions::from_mode(0o604)).unwrap();
    let (incoming, migrate) = fails("--secret-file", &secret);
    for error in [incoming, migrate] {
        assert!(error.contains("(mode 0604): chmod 600"), "{error}");
    }
    let error = moving.migrate("tcp:127.0.0.1:1", &["--tls-hostname", "x"]).fails_as_misused();
    assert!(error.contains("add --tls-creds"), "{error}");
}

/// A user who can change an authority's certificate decides who gets access.
#[test]
fn credential_file_writable_by_another_user_is_refused() {
    let moving = Move::new();
    let creds = Authority::new("ours").credentials(&moving.scratch, "tls", "127.0.0.1");
    let secret = PathBuf::from(moving.secret("secret", SECRET));
    for (option, given, file) in [
        ("--tls-creds", &creds, creds.join("ca-cert.pem")),
        ("--tls-creds", &creds, creds.join("client-cert.pem")),
        ("--tls-creds", &creds, creds.join("client-key.pem")),
        ("--secret-file", &secret, secret.clone()),
    ] {
        let fails = || moving.migrate("tcp:127.0.0.1:1", &[option, text(given)]).fails();
        let mode = fs::metadata(&file).unwrap().permissions();
        chown(&file, Some(65534), None).unwrap();
        let error = fails();
        let (name, own) = (file.display(), nix::unistd::geteuid());
        assert!(error.contains(&format!("{name}: it belongs to user 65534")), "{error}");
        assert!(error.contains(&format!("chown {own} {name}")), "{error}");
        chown(&file, Some(own.as_raw()), None).unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o664)).unwrap();
        let error = fails();
        assert!(error.contains(&format!("(mode 0664): chmod go-w {name}")), "{error}");
        fs::set_permissions(&file, mode).unwrap();
    }
}

/// For a process that is not dumpable the kernel gives its /proc files to root and root's group (proc(5)), and
/// otherwise to the process's own user and group.
#[test]
fn process_with_a_secret_is_not_dumpable() {
    let moving = Move::new();
    let secret = moving.secret("secret", SECRET);
    let ram = format!("ram0={}", moving.scratch.ram("source").display());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let group_of = |security: &[&str]| {
        let arguments = [&["migrate", "-p", "--json", "--ram", &ram], security, &[&uri]].concat();
        let wrapper = ["setpriv", "--regid=65534", "--clear-groups"];
        let umem = Umem::start_under(&wrapper, arguments);
        // It has read all of its files before it dials.
        let (_stream, _) = listener.accept().unwrap();
        fs::metadata(format!("/proc/{}/status", umem.pid())).unwrap().gid()
    };
    assert_eq!(group_of(&[]), 65534);
    assert_eq!(group_of(&["--secret-file", &secret]), 0);
}

/// Whatever the process's umask: files that hold guest memory, and sockets that give access, are accessible to their
/// owner only.
#[test]
fn sockets_and_memory_files_are_private_to_their_owner() {
    let moving = Move::new();
    let lanes = moving.scratch.path("lanes");
    let uri = format!("unix:{}", lanes.display());
    let wrapper = ["sh", "-c", "umask 0; exec \"$0\" \"$@\""];
    let mut incoming = Umem::start_under(&wrapper, moving.incoming_arguments(&uri, &[]));
    incoming.event("listening");
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&lanes), 0o600);
    assert_eq!(mode(&moving.scratch.ram("destination")), 0o600);
    moving.succeeds(incoming, moving.migrate(&uri, &[]), "none");

    let handoff = moving.scratch.path("handoff");
    let arguments = ["incoming", "--json", "--handoff", text(&handoff), "tcp:127.0.0.1:0"];
    let mut incoming = Umem::start_under(&wrapper, arguments);
    incoming.event("listening");
    assert_eq!(mode(&handoff), 0o600);
}
