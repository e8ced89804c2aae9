//! The control socket, and its commands: `status`, `set`, `postcopy`, `cancel`.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use support::{Guests, Qmp, Scratch, Umem, wait_for};

/// A connection to a control socket, after the greeting.
struct Control {
    stream: BufReader<UnixStream>,
}

impl Control {
    fn connect(path: &Path) -> Control {
        let what = format!("the socket {}", path.display());
        let stream = wait_for(what, || UnixStream::connect(path).ok());
        let mut control = Control { stream: BufReader::new(stream) };
        let greeting = control.read();
        assert_eq!(greeting["umem"]["version"], env!("CARGO_PKG_VERSION"));
        control
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("an answer");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    fn ask(&mut self, command: &Value) -> Value {
        writeln!(self.stream.get_mut(), "{command}").expect("umem reads");
        self.read()
    }

    fn status(&mut self) -> Value {
        self.ask(&json!({ "execute": "status" }))["return"].take()
    }

    fn refused(&mut self, command: &str) -> String {
        let mut answer = self.ask(&json!({ "execute": command }));
        let Value::String(text) = answer["error"]["desc"].take() else { panic!("{answer}") };
        text
    }

    fn limit(&mut self, bytes_per_s: u64) {
        let arguments = json!({ "max-postcopy-bandwidth": bytes_per_s });
        let answer = self.ask(&json!({ "execute": "set", "arguments": arguments }));
        assert_eq!(answer, json!({ "return": {} }));
    }
}

/// A successful `umem control`; returns its output.
fn umem_control(socket: &Path, words: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_umem"));
    let output = command.arg("control").arg(socket).args(words).output().expect("umem starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn is_gone(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_err()
}

fn end(scratch: &Scratch, guests: Guests) {
    Qmp::connect(&scratch.path("destination")).quit();
    guests.incoming.succeeds();
}

/// A very low limit takes effect, and is lifted while pages move; the migration can no longer be cancelled then.
#[test]
fn bandwidth_limit_changes_during_a_move() {
    let scratch = Scratch::new();
    let (source, destination) = (scratch.path("migrate"), scratch.path("incoming"));
    let socket = destination.display().to_string();
    let mut guests = Guests::quiet(&scratch, &["--json", "--control", &socket]);
    let mut incoming = Control::connect(&destination);
    assert_eq!(incoming.status()["phase"], "waiting for a source");
    let socket = source.display().to_string();
    let limit = ["--max-postcopy-bandwidth", "64K"];
    let arguments = ["-p", "--json", "--lanes", "2", "--control", &socket];
    let mut migrate = guests.migrate(&[&arguments[..], &limit[..]].concat());
    migrate.event("running");
    let mut control = Control::connect(&source);
    let before = control.status();
    assert_eq!(before["max-postcopy-bandwidth"], 64 << 10);
    assert_eq!(before["role"], "source");
    assert_eq!(before["may-cancel"], false);
    assert!(control.refused("cancel").contains("too late"), "the source");
    assert!(incoming.refused("cancel").contains("too late"), "the destination");
    // The destination has no background.
    let arguments = json!({ "max-postcopy-bandwidth": 0 });
    let refused = incoming.ask(&json!({ "execute": "set", "arguments": arguments }));
    assert!(refused["error"]["desc"].is_string(), "{refused}");

    umem_control(&source, &["set", "max-postcopy-bandwidth=128K"]);
    assert_eq!(control.status()["max-postcopy-bandwidth"], 128 << 10);
    control.limit(0);
    migrate.event("completed");
    guests.incoming.event("completed");
    let after = incoming.status();
    assert_eq!(after["done-bytes"], after["total-bytes"]);
    assert_eq!(after["phase"], "completed");
    migrate.succeeds();
    assert!(is_gone(&source), "the socket is removed with its umem");
    end(&scratch, guests);
    assert!(is_gone(&destination));
}

/// A guest that reads all of its memory demands each page, however low the background's limit.
#[test]
fn demand_pages_bypass_the_bandwidth_limit() {
    for lanes in [&["--lanes", "2"][..], &[]] {
        let scratch = Scratch::new();
        let mut guests = Guests::quiet(&scratch, &["--json"]);
        let arguments = ["-p", "--json", "--max-postcopy-bandwidth", "1K"];
        let mut migrate = match lanes {
            [] => guests.migrate_over_one(&arguments),
            lanes => guests.migrate(&[&arguments[..], lanes].concat()),
        };
        migrate.event("running");
        let mut guest = Qmp::connect(&scratch.path("destination"));
        assert_eq!(guest.execute("umem-verify", json!({}))["bad_pages"], 0);
        drop(guest);
        let report = migrate.event("completed");
        // At this limit the rest would have taken hours.
        assert!(report["pages_demand"].as_u64().unwrap() > 3500, "{report}");
        migrate.succeeds();
        guests.incoming.event("completed");
        end(&scratch, guests);
    }
}

/// All lanes together, and the single connection that answers share with the background.
#[test]
fn background_stays_within_the_bandwidth_limit() {
    for lanes in [&["--lanes", "3"][..], &["--lanes", "1"]] {
        let limit_bytes_per_s = f64::from(8 << 20);
        let scratch = Scratch::new();
        let mut guests = Guests::quiet(&scratch, &["--json"]);
        let limit = ["-p", "--json", "--max-postcopy-bandwidth", "8M"];
        let mut migrate = guests.migrate(&[&limit[..], lanes].concat());
        let report = migrate.event("completed");
        let sent = report["pages_background"].as_f64().unwrap() * 4096.0;
        assert!(sent > f64::from(15 << 20), "{report}");
        // The initial allowance of each lane, and the catching up of 5 ms.
        let most =
            limit_bytes_per_s * (report["drain_s"].as_f64().unwrap() + 0.005) + 3.0 * 262_144.0;
        assert!(sent <= most, "{sent} > {most}: {report}");
        migrate.succeeds();
        guests.incoming.event("completed");
        end(&scratch, guests);
    }
}

#[test]
fn single_connection_stays_within_the_bandwidth_limit() {
    let scratch = Scratch::new();
    let mut guests = Guests::quiet(&scratch, &["--json"]);
    let limit = ["-p", "--json", "--max-postcopy-bandwidth", "8M"];
    let mut migrate = guests.migrate_over_one(&limit);
    let report = migrate.event("completed");
    assert_eq!(report["lanes"], 0);
    let sent = report["pages_background"].as_f64().unwrap() * 4096.0;
    assert!(sent > f64::from(15 << 20), "{report}");
    let most = f64::from(8 << 20) * (report["drain_s"].as_f64().unwrap() + 0.005) + 65_536.0;
    assert!(sent <= most, "{sent} > {most}: {report}");
    migrate.succeeds();
    guests.incoming.event("completed");
    end(&scratch, guests);
}

/// Up to a first pass that would take minutes.
fn in_a_pass(guests: &Guests, socket: &Path, mode: &[&str]) -> (Umem, Control) {
    let path = socket.display().to_string();
    let slowly = ["--json", "--max-bandwidth", "64K", "--control", &path];
    let migrate = guests.migrate(&[mode, &slowly].concat());
    let mut control = Control::connect(socket);
    wait_for("the first pass", || (control.status()["pass"] == 1).then_some(()));
    (migrate, control)
}

#[test]
fn postcopy_command_ends_the_passes_and_the_rest_follows_the_guest() {
    let (scratch, socket) = (Scratch::new(), "control");
    let mut guests = Guests::quiet(&scratch, &["--json"]);
    let socket = scratch.path(socket);
    let (mut migrate, mut control) = in_a_pass(&guests, &socket, &["--precopy", "-p"]);
    let status = control.status();
    assert_eq!(status["phase"], "sending pages while the guest runs");
    assert_eq!(status["max-bandwidth"], 64 << 10);
    assert_eq!(status["pass-bytes"], guests.bytes());
    let remaining = status["remaining-bytes"].as_u64().unwrap();
    assert!(remaining > guests.bytes() / 2, "{status}");
    umem_control(&socket, &["set", "max-bandwidth=65000"]);
    assert_eq!(control.status()["max-bandwidth"], 65000);
    umem_control(&socket, &["postcopy"]);
    let pass = migrate.event("pass");
    assert_eq!((&pass["pass"], &pass["cut"]), (&json!(1), &json!(true)));
    let report = migrate.event("completed");
    guests.incoming.event("completed");
    // The pass sent the smaller part.
    let sent = pass["sent_bytes"].as_u64().unwrap();
    assert!(sent < guests.bytes() / 2, "{pass}");
    assert_eq!(report["precopy_bytes"], sent);
    migrate.succeeds();
    end(&scratch, guests);
}

#[test]
fn postcopy_command_is_refused_in_a_move_without_postcopy() {
    let scratch = Scratch::new();
    let guests = Guests::quiet(&scratch, &["--json"]);
    let (migrate, mut control) = in_a_pass(&guests, &scratch.path("control"), &[]);
    let refused = control.refused("postcopy");
    assert!(refused.contains("cancel it, and start it again with --precopy -p"), "{refused}");
    assert_eq!(control.ask(&json!({ "execute": "cancel" })), json!({ "return": {} }));
    assert!(migrate.fails().contains("the guest continues at the source"));
    guests.incoming.fails();
}

#[test]
fn either_side_can_be_cancelled_before_the_switchover() {
    let scratch = Scratch::new();
    let socket = scratch.path("incoming");
    let mut guests =
        Guests::quiet(&scratch, &["--json", "--control", &socket.display().to_string()]);
    // A client that stays silent.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let control = scratch.path("migrate");
    let migrate = guests.migrate_to(&uri, &["-p", "--control", &control.display().to_string()]);
    let status: Value = serde_json::from_str(&{
        Control::connect(&control);
        umem_control(&control, &["status"])
    })
    .unwrap();
    assert_eq!((&status["phase"], &status["may-cancel"]), (&json!("connecting"), &json!(true)));
    assert_eq!(umem_control(&control, &["cancel"]), "");
    assert_eq!(migrate.fails(), "interrupted; the guest continues at the source");
    assert!(is_gone(&control));
    assert!(guests.source_runs());

    umem_control(&socket, &["cancel"]);
    let error = guests.incoming.fails();
    assert!(error.starts_with("interrupted; "), "{error}");
    assert!(is_gone(&socket));
}

#[test]
fn control_socket_is_private_and_replaces_a_stale_one() {
    let scratch = Scratch::new();
    let socket = scratch.path("control");
    let word = socket.display().to_string();
    let mut first = Guests::quiet(&scratch, &["--json", "--control", &word]);
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");

    let uri = format!("unix:{}", scratch.path("listen").display());
    let handoff = scratch.path("handoff").display().to_string();
    let others = ["incoming", "--control", &word, "--handoff", &handoff, &uri];
    let error = Umem::start(others).fails();
    assert!(error.contains("another process uses the socket"), "{error}");
    assert!(!is_gone(&socket), "the socket belongs to the first umem");

    first.incoming.kill();
    assert!(!is_gone(&socket), "a killed umem leaves the socket");
    let second = Umem::start(others);
    Control::connect(&socket);
    drop(second);

    // A file other than a socket is not removed.
    let file = scratch.path("file");
    std::fs::write(&file, "precious").unwrap();
    let word = file.display().to_string();
    let others = ["incoming", "--control", &word, "--handoff", &handoff, &uri];
    let error = Umem::start(others).fails();
    assert!(error.contains("the file is not a socket"), "{error}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
}

#[test]
fn malformed_and_silent_control_clients_disturb_no_other() {
    let scratch = Scratch::new();
    let socket = scratch.path("control");
    let word = socket.display().to_string();
    let guests = Guests::quiet(&scratch, &["--json", "--control", &word]);
    let mut silent: Vec<Control> = (0..7).map(|_| Control::connect(&socket)).collect();
    let mut control = Control::connect(&socket);
    control.stream.get_mut().write_all(b"{\"execute\": \"sta").unwrap();
    control.stream.get_mut().write_all(b"tus\"}\n\n[]\n").unwrap();
    assert_eq!(control.read()["return"]["role"], "destination");
    assert!(control.read()["error"]["desc"].is_string());
    // A line without a newline.
    let endless = vec![b'x'; 80 << 10];
    let _ = silent[0].stream.get_mut().write_all(&endless);
    let error = silent[0].read();
    assert!(error["error"]["desc"].as_str().unwrap().contains("bytes"), "{error}");
    assert_eq!(control.status()["phase"], "waiting for a source");
    // The ninth client is served when another one leaves.
    drop(silent);
    Control::connect(&socket);
    drop(guests);
}

#[test]
fn umem_control_reports_the_reason_of_a_failure() {
    let scratch = Scratch::new();
    let nobody = scratch.path("nobody").display().to_string();
    let error = Umem::start(["control", &nobody, "status"]).fails();
    assert!(error.contains("--control"), "{error}");
    for words in
        [&["set"][..], &["set", "x=1"], &["set", "max-postcopy-bandwidth=fast"], &["status", "now"]]
    {
        Umem::start([&["control", &nobody], words].concat()).fails_as_misused();
    }
    // Another program's socket.
    let path = scratch.path("other");
    let listener = UnixListener::bind(&path).unwrap();
    let other = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"{\"QMP\": {}}\n").unwrap();
    });
    let error = Umem::start(["control", &path.display().to_string(), "status"]).fails();
    assert!(error.contains("is the QMP socket of a QEMU"), "{error}");
    other.join().unwrap();
}

/// An existing socket is probed without waiting: its owner may never accept.
#[test]
fn control_socket_with_a_full_queue_counts_as_in_use() {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
    };
    use std::os::fd::AsRawFd;
    let scratch = Scratch::new();
    let path = scratch.path("full");
    let address = UnixAddr::new(&path).unwrap();
    let new = |flags| socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
    let listener = new(SockFlag::empty());
    bind(listener.as_raw_fd(), &address).unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let waiting: Vec<_> = std::iter::repeat_with(|| new(SockFlag::SOCK_NONBLOCK))
        .take_while(|socket| connect(socket.as_raw_fd(), &address).is_ok())
        .collect();
    assert!(!waiting.is_empty());
    let socket = path.display().to_string();
    let error =
        Umem::start(["migrate", "--control", &socket, "--ram", "a=/b", "tcp:127.0.0.1:1"]).fails();
    assert!(error.contains("another process uses the socket"), "{error}");
}

/// The peer of a socket may be any program: its text is escaped, whatever it contains, and has a time limit.
#[test]
fn control_characters_from_a_peer_are_escaped() {
    let scratch = Scratch::new();
    let path = scratch.path("control");
    let listener = UnixListener::bind(&path).unwrap();
    let liar = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let said = "{\"umem\":{}}\n{\"error\":{\"desc\":\"\\u001b[2J\\u009bm\\ntwo\"}}\n";
        stream.write_all(said.as_bytes()).unwrap();
        // Until the client has read all of that.
        let mut lines = BufReader::new(stream);
        lines.read_line(&mut String::new()).unwrap();
    });
    let error = Umem::start(["control", &path.display().to_string(), "status"]).fails();
    assert_eq!(error, "\\u{1b}[2J\\u{9b}m two");
    liar.join().unwrap();
}

/// There is no connection to drop: new clients wait, and the thread that cannot accept does not spin.
#[test]
fn control_client_is_answered_when_descriptors_become_free() {
    let scratch = Scratch::new();
    let socket = scratch.path("control");
    let guests = Guests::quiet(&scratch, &["--json", "--control", socket.to_str().unwrap()]);
    let before = guests.incoming.limit_descriptors(3);
    let waiting = UnixStream::connect(&socket).unwrap();
    guests.incoming.rests("umem-control");
    guests.incoming.limit_descriptors(before);
    let mut greeting = String::new();
    BufReader::new(waiting).read_line(&mut greeting).unwrap();
    assert!(greeting.starts_with("{\"umem\":"), "{greeting}");
}

/// Clients that send nothing or half a line, or do not read answers: the next client is served.
#[test]
fn silent_clients_do_not_block_the_control_socket() {
    let scratch = Scratch::new();
    let socket = scratch.path("control");
    let guests = Guests::quiet(&scratch, &["--json", "--control", socket.to_str().unwrap()]);
    let silent: Vec<Control> = (0..40)
        .map(|index| {
            let mut control = Control::connect(&socket);
            let half: &[u8] = if index % 2 == 0 { b"" } else { b"{\"execute\":" };
            control.stream.get_mut().write_all(half).unwrap();
            control
        })
        .collect();
    assert_eq!(Control::connect(&socket).status()["role"], "destination");
    // A client that floods the socket and does not read: umem stops reading it.
    let mut deaf = UnixStream::connect(&socket).unwrap();
    deaf.set_nonblocking(true).unwrap();
    let many = b"{\"execute\":\"help\"}\n".repeat(1000);
    let mut refused = 0;
    while refused < 100 {
        if deaf.write(&many).is_ok_and(|taken| taken > 0) {
            refused = 0;
            continue;
        }
        refused += 1;
        assert_eq!(Control::connect(&socket).status()["role"], "destination");
    }
    // A client whose command has no end is dropped.
    let mut endless = UnixStream::connect(&socket).unwrap();
    while endless.write_all(&[b'x'; 4096]).is_ok() {}
    assert_eq!(Control::connect(&socket).status()["role"], "destination");
    drop((silent, deaf, guests));
}
