//! Panics of umem's threads: the guest runs on at one side, and both sides report the panic.
//!
//! Builds with debug assertions have points at which a test can make a thread panic (`src/runtime/panics.rs`).
//! `docs/design/panics.md` lists the consequences of a panic for each thread.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use support::killed::{How, Move};
use support::{Authority, Guests, Qmp, Scratch, Umem};

/// A file that makes a umem panic at this point, and the wrapper that sets it.
fn panic_at(scratch: &Scratch, place: &str) -> (PathBuf, String) {
    let file = scratch.path("panic");
    std::fs::write(&file, "").expect("a file");
    let variable = format!("UMEM_TEST_PANIC={place}={}", file.display());
    (file, variable)
}

/// umem has panicked there, and reports that as an error.
fn has_panicked(mut umem: Umem, place: &str) {
    let status = umem.wait();
    let stderr = umem.stderr();
    assert_eq!(status.code(), Some(1), "{place}: {stderr}");
    let text = format!("requested by a test, at {place}");
    assert!(stderr.contains("panicked at") && stderr.contains(&text), "{place}: {stderr}");
    assert!(stderr.lines().any(|line| line.starts_with("umem: ")), "{place}: {stderr}");
}

#[test]
fn source_panic_before_the_commit_leaves_the_guest_at_the_source() {
    const POSTCOPY: &[&str] = &["-p"];
    const STOP_FIRST: &[&str] = &["--stop-first"];
    for (place, options) in [
        ("waiting", POSTCOPY),
        ("host", POSTCOPY),
        ("demand", POSTCOPY),
        ("beginning of umem-demand", POSTCOPY),
        ("control comparing regions", POSTCOPY),
        ("control ready", POSTCOPY),
        ("control sending pages before the switchover", STOP_FIRST),
        ("bulk", STOP_FIRST),
        ("control sending device state", POSTCOPY),
        ("control the destination loads device state", POSTCOPY),
        ("control about to switch over", POSTCOPY),
    ] {
        let scratch = Scratch::new();
        let mut guests = Guests::quiet(&scratch, &["--json"]);
        let (file, variable) = panic_at(&scratch, place);
        let qmp = guests.qmp().display().to_string();
        let words = [&["migrate", "--json", "--qmp", &qmp], options, &[guests.uri()]].concat();
        has_panicked(Umem::start_under(&["env", &variable], words), place);
        assert!(!file.exists(), "{place}");
        assert_eq!(Qmp::connect(&scratch.path("source")).status(), "running", "{place}");
        assert!(guests.source_runs(), "{place}");
        if place != "waiting" {
            assert_eq!(guests.incoming.wait().code(), Some(1), "{place}");
        }
    }
}

#[test]
fn destination_panic_before_the_commit_leaves_the_guest_at_the_source() {
    for place in [
        "host",
        "demand",
        "beginning of umem-demand",
        "control ready",
        "control receiving device state",
        "control loading device state",
    ] {
        let how = How { mib: 16, threads: 1, panics: ["", place], ..How::default() };
        let mut moving = Move::start_with(how, |scratch| {
            std::fs::write(scratch.path("panic"), "").expect("a file");
        });
        assert_eq!(moving.migrate.wait().code(), Some(1), "{place}: {}", moving.migrate.stderr());
        has_panicked(moving.incoming, place);
        assert_eq!(Qmp::connect(&moving.scratch.path("source.qmp")).status(), "running", "{place}");
        assert!(moving.guest.is_running(), "{place}");
        let there = moving.scratch.path("destination.qmp");
        assert!(UnixStream::connect(there).is_err(), "{place}: the guest at that side has ended");
    }
}

/// Pages come slowly enough for that, and continue when the cutter releases them.
#[test]
fn side_that_panics_after_the_commit_can_be_taken_over() {
    for [source, destination] in [
        ["control serving pages", ""],
        ["demand", ""],
        ["bulk", ""],
        ["", "control receiving pages"],
        ["", "demand"],
        ["", "bulk"],
    ] {
        let panics = [source, destination];
        let mut moving = Move::switched(How { mib: 16, threads: 1, panics, ..How::default() });
        moving.panics();
        let (place, command) = match source {
            "" => (destination, "incoming"),
            place => (place, "migrate"),
        };
        let side = if source.is_empty() { &mut moving.incoming } else { &mut moving.migrate };
        let status = side.wait();
        let stderr = side.stderr();
        assert_eq!(status.code(), Some(1), "{place}: {stderr}");
        assert!(stderr.contains(&format!("requested by a test, at {place}")), "{stderr}");
        let resumed = moving.resume(command);
        match source.is_empty() {
            true => moving.incoming = resumed,
            false => moving.migrate = resumed,
        }
        moving.complete();
    }
}

/// Threads that only compare, free, or accept connections: the migration continues by itself.
#[test]
fn panic_of_an_optional_thread_ends_nothing_else() {
    let scratch = Scratch::new();
    let credentials = Authority::new("ours").credentials(&scratch, "own", "127.0.0.1");
    let credentials: &'static str = credentials.display().to_string().leak();
    for (panics, migrate, security) in [
        (["digest", ""], &["--checksum"][..], None),
        (["tls", ""], &[], Some(["--tls-creds", credentials])),
        (["", "tls"], &[], Some(["--tls-creds", credentials])),
    ] {
        let how = How { mib: 16, threads: 1, panics, migrate, security, ..How::default() };
        let moving = Move::switched(how);
        if panics[0] == "digest" {
            std::fs::write(moving.scratch.path("panic"), "").expect("a file");
        } else {
            moving.panics();
        }
        let panic = moving.scratch.path("panic");
        let (source, _) = moving.complete();
        assert!(!panic.exists(), "{panics:?}");
        if panics[0] == "digest" {
            assert_eq!(source["digests"], serde_json::json!([]), "{source}");
        } else {
            assert!(source["recoveries"].as_u64() > Some(0), "{source}");
        }
    }
}

/// The client loses its connection, and no other client does.
#[test]
fn panic_in_a_client_request_ends_only_that_client() {
    let scratch = Scratch::new();
    let socket = scratch.path("control");
    let (file, variable) = panic_at(&scratch, "visitor");
    let words = ["incoming", "--json", "--control", socket.to_str().unwrap()];
    let guest = ["tcp:127.0.0.1:0", "--handoff", scratch.path("handoff").to_str().unwrap()]
        .map(str::to_owned);
    let words = words.iter().map(|&word| word.to_owned()).chain(guest);
    let mut incoming = Umem::start_under(&["env", &variable], words);
    incoming.event("listening");
    let ask = || {
        let mut stream = BufReader::new(UnixStream::connect(&socket).expect("umem listens"));
        stream.get_mut().write_all(b"{\"execute\":\"status\"}\n").expect("umem reads");
        let mut answers = String::new();
        // Or the connection closes, or is reset.
        for _ in 0..2 {
            let _ = stream.read_line(&mut answers);
        }
        answers
    };
    assert!(!ask().contains("return"));
    assert!(!file.exists());
    assert!(ask().contains("return"));
    assert!(incoming.is_running());
}
