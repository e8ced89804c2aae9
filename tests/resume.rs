//! Processes that are killed (SIGKILL) after the switchover: another process takes over, and the guest loses nothing.
//!
//! They are killed after seeded numbers of bytes between them, repeatedly, also during takeovers. The demo guest checks
//! every word that it reads while its memory arrives, and all of it at the end.

mod support;

use std::os::unix::process::ExitStatusExt;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::killed::{How, Move, REQUEST_BYTES, Side, text};
use support::{Ends, MemoryLimit, Qmp};

const UMEM: &str = env!("CARGO_BIN_EXE_umem");

#[test]
fn killed_source_is_taken_over() {
    let mut moving = Move::switched(How { mib: 128, threads: 2, ..How::default() });
    moving.kill_often(20, 3 << 20, &[Side::Source]);
    moving.complete();
}

/// Repeated moves, to a new process each time, by umems that are killed; they leave nothing behind. The guest runs in
/// each of them.
#[test]
fn guest_survives_repeated_moves_with_killed_umems() {
    let moves = std::env::var("UMEM_SOAK_KILLED").map_or(5, |moves| moves.parse().expect("moves"));
    let name = |number: usize| -> &'static str { format!("guest{number}.").leak() };
    let how = How { mib: 32, threads: 1, ..How::default() };
    let sides = [Side::Both, Side::Source, Side::Destination];
    let mut moving = Move::switched(how);
    for number in 0.. {
        moving.kill_often(3, 4 << 20, &sides);
        let (scratch, guest, [left, here], _) = moving.arrive();
        scratch.wait_until_gone(&format!("{left}.qmp"));
        std::fs::remove_file(scratch.ram(left)).expect("umem deletes no guest's memory");
        let mut qmp = Qmp::connect(&scratch.path(&format!("{here}.qmp")));
        if number == moves {
            qmp.quit();
            guest.succeeds();
            scratch.wait_until_gone(UMEM);
            break;
        }
        // The check of its memory has stopped the guest.
        qmp.execute("cont", json!({}));
        assert_eq!(qmp.status(), "running");
        drop(qmp);
        moving = Move::from(here, guest, name(number), scratch, how).until_switched();
    }
}

/// Freed pages are not requested again.
#[test]
fn killed_source_with_release_ram_is_taken_over() {
    let how =
        How { mib: 96, threads: 1, migrate: &["--release-ram", "--lanes", "2"], ..How::default() };
    let mut moving = Move::switched(how);
    moving.kill_often(10, 4 << 20, &[Side::Source]);
    let (source, _) = moving.complete();
    assert!(source["release_bytes"].as_u64() > Some(0), "{source}");
}

#[test]
fn killed_destination_is_taken_over() {
    let mut moving = Move::switched(How { mib: 128, threads: 2, ..How::default() });
    moving.kill_often(20, 3 << 20, &[Side::Destination]);
    moving.complete();
}

/// The kernel kills umem for the memory of its guest. The guest waits, and the source waits for the takeover.
#[test]
fn destination_killed_by_a_memory_limit_is_taken_over() {
    let limit = MemoryLimit::of(20);
    let mut moving = Move::switched(How { mib: 64, threads: 1, ..How::default() });
    limit.take(moving.incoming.pid());
    moving.cutter.let_pages_go();
    assert_eq!(moving.incoming.wait().signal(), Some(libc::SIGKILL));
    moving.migrate.event("recovering");
    assert_eq!(moving.scratch.processes("destination.qmp").len(), 1, "the guest's process exists");
    moving.incoming = moving.resume("incoming");
    moving.complete();
}

/// Sockets of a killed process may outlive it for a moment.
#[test]
fn takeover_waits_for_an_address_in_use() {
    let mut moving = Move::switched(How { mib: 16, threads: 1, ..How::default() });
    moving.incoming.kill();
    let address = moving.cutter.destination().trim_start_matches("tcp:").to_owned();
    let other = support::wait_for(format!("{address} to be free"), || {
        std::net::TcpListener::bind(&address).ok()
    });
    moving.incoming = moving.resume("incoming");
    support::wait_for("the resumed side's remark about its wait", || {
        moving.incoming.stderr().contains("still in use").then_some(())
    });
    drop(other);
    moving.complete();
}

#[test]
fn both_sides_killed_in_one_move_are_taken_over() {
    let mut moving = Move::switched(How { mib: 128, threads: 2, ..How::default() });
    moving.kill_often(20, 3 << 20, &[Side::Source, Side::Destination, Side::Both]);
    moving.complete();
}

/// A takeover of the source reads its files as the previous process would have.
#[test]
fn digests_are_compared_after_a_source_takeover() {
    let migrate = &["--checksum"];
    let how = How { mib: 64, threads: 1, migrate, ..How::default() };
    let mut moving = Move::switched(how);
    moving.kill_often(6, 3 << 20, &[Side::Source]);
    let (source, destination) = moving.complete();
    let digests = &source["digests"][0];
    assert!(digests["digest"].is_string(), "{source}");
    assert_eq!(digests["digest"], digests["peer"]);
    assert_eq!(destination["digests"][0]["digest"], digests["digest"]);
}

/// The sums of earlier pages died with the destination: the remaining sums prove nothing about the whole, and are not
/// taken for damage.
#[test]
fn destination_with_checksums_is_taken_over() {
    let migrate = &["--checksum", "--release-ram"];
    let how = How { mib: 64, threads: 1, migrate, ..How::default() };
    let mut moving = Move::switched(how);
    moving.kill_often(9, 3 << 20, &[Side::Source, Side::Destination, Side::Both]);
    moving.kill(Side::Both);
    let (source, destination) = moving.complete();
    assert_eq!([&source["digests"], &destination["digests"]], [&json!([]), &json!([])]);
}

/// Pages that the guest discards without a umem, or while one is killed over the discard, stay discarded.
#[test]
fn destination_with_discards_is_taken_over() {
    let arriving = &["--discard"];
    let how = How { mib: 64, threads: 2, arriving, ..How::default() };
    let mut moving = Move::switched(how);
    moving.kill_often(20, 2 << 20, &[Side::Destination]);
    moving.complete();
}

/// All pages have arrived, and the source does not know: the takeover of the destination sends it the completion.
#[test]
fn takeover_sends_a_missed_completion_again() {
    use umem_wire::{HEADER_BYTES, HELLO_BYTES};
    let mut moving = Move::switched(How { mib: 8, threads: 0, ..How::default() });
    moving.cutter.limit_answers(Some(0));
    moving.cutter.let_pages_go();
    // Up to the guest running there a request may have been sent, or the background was faster. A request is shorter
    // than the frames of the completion, which leave in one send: so this many bytes come with those alone.
    let running = HELLO_BYTES + (HEADER_BYTES + 1) + 2 * HEADER_BYTES;
    const COMPLETE_BYTES: usize = HEADER_BYTES + 40;
    const _: () = assert!(REQUEST_BYTES < COMPLETE_BYTES);
    moving.cutter.wait_for_answers((running + COMPLETE_BYTES) as u64);
    moving.incoming.kill();
    // A completion that the source has not received by now is lost.
    moving.cutter.cut(Ends::Both, false);
    moving.cutter.limit_answers(None);
    moving.incoming = moving.resume("incoming");
    moving.incoming.event("listening");
    moving.complete();
}

#[test]
fn destination_of_private_memory_is_taken_over() {
    for flags in [&["--postcopy-flags", "0"], &["--postcopy-flags", "1"]] {
        let how =
            How { mib: 64, threads: 1, kind: Some("private"), incoming: flags, ..How::default() };
        let mut moving = Move::switched(how);
        moving.kill_often(8, 4 << 20, &[Side::Destination, Side::Both]);
        moving.complete();
    }
}

#[test]
fn destination_of_anonymous_memory_is_taken_over() {
    let how = How { mib: 64, threads: 2, kind: Some("anonymous"), ..How::default() };
    for arriving in [&["--discard"][..], &["--shards", "4"]] {
        let mut moving = Move::switched(How { arriving, ..how });
        moving.kill_often(8, 4 << 20, &[Side::Destination, Side::Both]);
        moving.complete();
    }
}

/// The destination is killed as soon as the source has given its guest up: the switchover may have arrived or not, and
/// the guest may run or not. Then both are killed at that moment.
#[test]
fn takeover_during_the_switchover_keeps_the_guest() {
    for side in [Side::Destination, Side::Both, Side::Source].repeat(3) {
        let mut moving = Move::start(How { mib: 16, threads: 1, ..How::default() });
        moving.session = text(&moving.migrate.event("resumable"), "session");
        moving.kill(side);
        moving.complete();
    }
}

/// The source might have given its guest up at that moment, so the loaded guest stays without running, until an
/// administrator ends it.
#[test]
fn destination_killed_before_the_switchover_keeps_its_loaded_guest() {
    let mut moving = Move::loaded();
    moving.incoming.kill();
    moving.cutter.cut(Ends::Both, false);
    assert!(moving.scratch.processes("destination.qmp").len() == 1);
    moving.incoming = moving.resume("incoming");
    moving.incoming.event("recovering");
    let Move { scratch, mut guest, mut incoming, mut migrate, .. } = moving;
    // It would notify the destination if it could; the test interrupts the wait.
    migrate.event("telling");
    migrate.signal(Signal::SIGINT);
    assert!(migrate.fails().contains("the connection to the destination was lost"));
    incoming.signal(Signal::SIGINT);
    let warned = || incoming.stderr().contains("interrupt again to end this one").then_some(());
    support::wait_for("a warning", warned);
    incoming.signal(Signal::SIGINT);
    assert_eq!(incoming.wait().code(), Some(1));
    scratch.wait_until_gone("destination.qmp");
    assert!(!scratch.ram("destination").exists());
    assert_eq!(std::fs::read_dir(scratch.path("sessions")).unwrap().count(), 0);
    assert!(guest.is_running());
}

/// A source that has lost its lanes before the commit lets its guest continue, and notifies a destination that has
/// loaded it, which then does not wait for an interrupt.
#[test]
fn loaded_destination_is_notified_that_the_guest_stays() {
    for is_killed in [false, true] {
        let mut moving = Move::loaded();
        if is_killed {
            moving.incoming.kill();
        }
        moving.cutter.cut(Ends::Both, false);
        moving.cutter.limit_answers(None);
        moving.migrate.event("telling");
        assert_eq!(moving.status(), "running", "neither side waits for the other");
        if is_killed {
            moving.incoming = moving.resume("incoming");
        }
        let Move { scratch, mut guest, incoming, migrate, .. } = moving;
        let error = incoming.fails();
        assert!(error.contains("the source gave up: interrupted; the guest continues"), "{error}");
        let error = migrate.fails();
        assert!(error.contains("the connection to the destination was lost"), "{error}");
        assert!(!error.contains("was not notified"), "{error}");
        scratch.wait_until_gone("destination.qmp");
        assert!(!scratch.ram("destination").exists());
        assert_eq!(std::fs::read_dir(scratch.path("sessions")).unwrap().count(), 0);
        assert!(guest.is_running());
    }
}

#[test]
fn source_killed_before_the_switchover_gets_its_guest_back() {
    let mut moving = Move::loaded();
    moving.migrate.kill();
    assert_eq!(moving.status(), "paused");
    // The relay's lane numbers restart.
    moving.cutter.cut(Ends::Both, false);
    moving.cutter.limit_answers(None);
    let error = moving.resume_with("migrate", &["--abandon"]).fails_as_misused();
    assert!(error.contains("no switchover was sent"), "{error}");
    moving.migrate = moving.resume("migrate");
    moving.migrate.event("undone");
    assert_eq!(moving.status(), "running");
    let Move { scratch, mut guest, incoming, migrate, .. } = moving;
    migrate.succeeds();
    // The destination has loaded the guest, and must not keep it.
    assert!(incoming.fails().contains("before the switchover"));
    scratch.wait_until_gone("destination.qmp");
    assert!(!scratch.ram("destination").exists());
    let mut qmp = Qmp::connect(&scratch.path("source.qmp"));
    let verdict = qmp.execute("umem-verify", json!({}));
    assert_eq!(verdict["bad_pages"], 0, "{verdict}");
    Qmp::connect(&scratch.path("source.qmp")).quit();
    assert!(guest.wait().success());
    assert_eq!(std::fs::read_dir(scratch.path("sessions")).unwrap().count(), 0);
}

/// A living process is not taken over, and a file other than the guest's is not sent.
#[test]
fn takeover_refuses_sessions_that_cannot_continue() {
    let mut moving = Move::switched(How { mib: 16, threads: 0, ..How::default() });
    let session = moving.session.clone();
    for command in ["migrate", "incoming"] {
        let error = moving.resume(command).fails();
        assert!(error.contains("another running umem serves session"), "{error}");
        moving.session = "0123".into();
        let error = moving.resume(command).fails_as_misused();
        assert!(error.contains("no session 0123"), "{error}");
        assert!(error.contains(&session), "the error names the existing sessions: {error}");
        moving.session = session[..6].to_owned();
    }
    moving.migrate.kill();
    let (ram, aside) = (moving.scratch.ram("source"), moving.scratch.ram("aside"));
    std::fs::rename(&ram, &aside).unwrap();
    let error = moving.resume("migrate").fails();
    assert!(error.contains("no such file"), "{error}");
    std::fs::copy(&aside, &ram).unwrap();
    let error = moving.resume("migrate").fails();
    assert!(error.contains("was replaced"), "{error}");
    std::fs::rename(&aside, &ram).unwrap();
    moving.migrate = moving.resume("migrate");
    moving.complete();
}

/// A full disk keeps *switched* and *running* out of the session file. The guest belongs to the destination all the
/// same: it is neither ended nor reported to its source as one that never ran.
#[test]
fn destination_without_a_written_session_file_keeps_its_running_guest() {
    let mut moving = Move::switched(How { mib: 16, threads: 1, ..How::default() });
    moving.incoming.kill();
    moving.migrate.kill();
    let file = moving.sessions().join(format!("{}.destination", moving.session));
    let mut record: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(record["state"], "running");
    record["state"] = json!("loaded");
    record["switched_at"] = Value::Null;
    record["running_at"] = Value::Null;
    std::fs::write(&file, record.to_string()).unwrap();

    moving.incoming = moving.resume("incoming");
    moving.incoming.event("recovering");
    moving.incoming.signal(Signal::SIGINT);
    let incoming = &moving.incoming;
    let is_warned = || incoming.stderr().contains("interrupt again to").then_some(());
    support::wait_for("a warning", is_warned);
    moving.incoming.signal(Signal::SIGINT);
    assert_eq!(moving.incoming.wait().code(), Some(1));
    let stderr = moving.incoming.stderr();
    assert!(stderr.contains("the guest here waits for pages that only the source has"), "{stderr}");
    assert_eq!(moving.scratch.processes("destination.qmp").len(), 1, "the guest's process exists");

    moving.incoming = moving.resume("incoming");
    moving.migrate = moving.resume("migrate");
    moving.complete();
}

/// The source learns that the guest has ended, and both sides end.
#[test]
fn guest_death_without_a_umem_is_detected_at_takeover() {
    let mut moving = Move::switched(How { mib: 16, threads: 1, ..How::default() });
    moving.incoming.kill();
    moving.migrate.event("recovering");
    let guests = moving.scratch.processes("destination.qmp");
    let [(guest, _)] = &guests[..] else { panic!("{guests:?}") };
    let guest = nix::unistd::Pid::from_raw(i32::try_from(*guest).unwrap());
    nix::sys::signal::kill(guest, Signal::SIGKILL).unwrap();
    moving.scratch.wait_until_gone("destination.qmp");
    let error = moving.resume("incoming").fails();
    assert!(error.contains("ended while no umem served it"), "{error}");
    let Move { scratch, guest, migrate, .. } = moving;
    let error = migrate.fails();
    assert!(error.contains("ended while no umem served it"), "{error}");
    assert!(!scratch.ram("destination").exists());
    assert_eq!(std::fs::read_dir(scratch.path("sessions")).unwrap().count(), 0);
    drop(guest);
}
