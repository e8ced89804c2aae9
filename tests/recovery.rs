//! Connections that break after the switchover: the guest runs on, and loses nothing.
//!
//! A relay between the two umem processes breaks connections at seeded numbers of bytes, in the middle of frames and
//! pages, and at the moments when neither side can know which frames the other has received. The demo guest checks
//! every word that it reads while its memory arrives, and all of it at the end.

#![allow(clippy::print_stdout, reason = "a test may say what it does")]

mod support;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::Signal;
use serde_json::Value;
use support::{
    Authority, Cutter, Ends, How, MemoryLimit, Move, Scratch, Umem, seed, seeded, write_private,
};
use umem_wire::{HEADER_BYTES, HELLO_BYTES};

const UMEM: &str = env!("CARGO_BIN_EXE_umem");

/// The destination's frames on its demand lane up to *loaded*, if its guest demands nothing: a welcome, ready with the
/// unit of one region, loaded.
const UNTIL_LOADED: u64 = (HELLO_BYTES + HEADER_BYTES + 1 + HEADER_BYTES) as u64;
/// And then running.
const UNTIL_RUNNING: u64 = UNTIL_LOADED + HEADER_BYTES as u64;

/// Moves a guest whose connections break `count` times, each time after up to `most` bytes: in total fewer than its
/// data, four fifths of its memory.
fn cut_often(how: How, count: usize, most: u64) -> (Value, Value) {
    let mut moving = Move::switched(how);
    let seed = seed(how.mib ^ u64::from(how.threads) << 8);
    let ends = seeded(!seed, 3).map(|which| match which {
        0 => Ends::Source,
        1 => Ends::Destination,
        _ => Ends::Both,
    });
    moving.cutter.cut_after(seeded(seed, most).map(|bytes| bytes + 1).zip(ends).take(count));
    moving.cutter.let_pages_go();
    moving.wait_for_cuts(u32::try_from(count).unwrap());
    let (source, destination) = moving.complete();
    for report in [&source, &destination] {
        let recoveries = report["recoveries"].as_u64().unwrap();
        assert!(recoveries >= 1 && recoveries <= count as u64, "{report}");
        assert!(report["disconnected_s"].as_f64().unwrap() > 0.0, "{report}");
    }
    (source, destination)
}

#[test]
fn shared_memory_survives_many_connection_losses() {
    cut_often(How { mib: 128, threads: 2, ..How::default() }, 24, 8 << 20);
}

/// Most of these cuts happen while lanes are being opened, or while the destination sends its have frames.
#[test]
fn connection_losses_during_a_recovery_are_survived() {
    cut_often(How { mib: 64, threads: 1, ..How::default() }, 30, 600);
}

/// Replacement lanes present the same certificate, or prove the same secret, as the lost ones.
#[test]
fn secured_lanes_survive_connection_losses() {
    let scratch = Scratch::new();
    let creds = Authority::new("ours").credentials(&scratch, "tls", "127.0.0.1");
    let secret = scratch.path("secret");
    write_private(&secret, "thirty-two bytes that nobody knows");
    for (option, path) in [("--tls-creds", creds), ("--secret-file", secret)] {
        let path: &'static str = path.display().to_string().leak();
        let security = Some([option, path]);
        cut_often(How { mib: 64, threads: 1, security, ..How::default() }, 10, 6 << 20);
        // Acknowledgements are secured too.
        let migrate = &["--release-ram", "--lanes", "2"];
        let how = How { mib: 64, threads: 1, security, migrate, huge: true, ..How::default() };
        let (source, _) = cut_often(how, 10, 6 << 20);
        assert!(source["release_bytes"].as_u64() > Some(0), "{source}");
    }
}

#[test]
fn simultaneous_loss_of_several_lanes_is_survived() {
    let migrate = &["--lanes", "3"];
    cut_often(How { mib: 128, threads: 2, migrate, ..How::default() }, 16, 12 << 20);
}

#[test]
fn huge_pages_survive_connection_losses() {
    cut_often(How { mib: 64, threads: 1, huge: true, ..How::default() }, 12, 6 << 20);
}

#[test]
fn private_memory_survives_connection_losses() {
    for flags in ["0", "1"] {
        let incoming: &[_] =
            if flags == "0" { &["--postcopy-flags", "0"] } else { &["--postcopy-flags", "1"] };
        let kind = Some("private");
        cut_often(How { mib: 64, threads: 1, kind, incoming, ..How::default() }, 10, 8 << 20);
    }
}

#[test]
fn discarding_anonymous_memory_survives_connection_losses() {
    let how = How { mib: 64, threads: 2, kind: Some("anonymous"), ..How::default() };
    cut_often(How { arriving: &["--discard"], ..how }, 12, 6 << 20);
    // Served by threads of their own.
    cut_often(How { arriving: &["--shards", "4"], ..how }, 12, 6 << 20);
}

#[test]
fn discarding_shared_memory_survives_connection_losses() {
    let arriving = &["--discard"];
    cut_often(How { mib: 64, threads: 2, arriving, ..How::default() }, 16, 5 << 20);
}

/// Freed pages are not requested again.
#[test]
fn memory_freed_by_the_source_survives_connection_losses() {
    let migrate = &["--release-ram"];
    let how = How { mib: 96, threads: 2, migrate, ..How::default() };
    let (source, _) = cut_often(how, 16, 8 << 20);
    assert!(source["release_bytes"].as_u64() > Some(0), "{source}");
}

/// The session is resumed, and pages without a demand come at last: the source kept them back until an interrupt.
fn completes(mut moving: Move) -> (Value, Value) {
    moving.migrate.event("resumed");
    moving.incoming.event("resumed");
    moving.cutter.let_pages_go();
    moving.migrate.signal(Signal::SIGINT);
    moving.complete()
}

/// The source's new connections wait, the listening thread only waits meanwhile, and nothing ends.
#[test]
fn destination_accepts_new_lanes_when_descriptors_become_free() {
    let mut moving = Move::switched(How { mib: 8, threads: 0, migrate: &["-n"], ..How::default() });
    let before = moving.incoming.limit_descriptors(3);
    moving.cutter.cut(Ends::Both, false);
    moving.incoming.event("recovering");
    moving.migrate.event("recovering");
    moving.incoming.rests("umem");
    assert!(moving.incoming.is_running(), "{}", moving.incoming.stderr());
    moving.incoming.limit_descriptors(before);
    completes(moving);
}

/// A middlebox keeps the source's ends of connections that the destination has lost, and the kernel there acknowledges
/// until data is sent. The source has nothing to send, and probes.
#[test]
fn source_detects_a_destination_that_closed_its_sockets() {
    let moving = Move::switched(How { mib: 8, threads: 0, migrate: &["-n"], ..How::default() });
    moving.cutter.cut(Ends::Destination, false);
    completes(moving);
}

/// Its probe arrives nowhere, without an error.
#[test]
fn source_detects_an_unresponsive_destination() {
    let mut moving = Move::switched(How { mib: 8, threads: 0, migrate: &["-n"], ..How::default() });
    moving.cutter.limit_demand(Some(0));
    let lost = moving.migrate.event("recovering");
    assert_eq!(lost["reason"], "the destination does not answer");
    moving.cutter.limit_demand(None);
    completes(moving);
}

/// Only demanded pages are sent, and requests from before the cut are repeated.
#[test]
fn demands_are_requested_again_after_a_recovery() {
    let moving = Move::switched(How { mib: 32, threads: 2, migrate: &["-n"], ..How::default() });
    // Requests are sent, and no answer comes.
    moving.cutter.limit_demand(Some(0));
    let cutter = &moving.cutter;
    cutter.wait_for_answers(UNTIL_RUNNING + HEADER_BYTES as u64);
    cutter.cut(Ends::Both, false);
    cutter.limit_demand(None);
    let (_, destination) = completes(moving);
    assert!(destination["pages_demand"].as_u64() > Some(0), "{destination}");
}

/// A file that moves to an idle guest, so that every control byte is known.
struct Known {
    scratch: Scratch,
    incoming: Umem,
    migrate: Umem,
    cutter: Cutter,
}

/// The source's frames on its demand lane before the switchover: hello, one region, stopped, load.
const UNTIL_SWITCHOVER: u64 = (HELLO_BYTES + (HEADER_BYTES + 80) + HEADER_BYTES * 2) as u64;
const SWITCHOVER: u64 = HEADER_BYTES as u64;
/// Or goodbye.
const COMPLETE: u64 = (HEADER_BYTES + 40) as u64;

impl Known {
    /// `prepare` sets the cutter's limits.
    fn start(prepare: impl FnOnce(&Cutter)) -> Known {
        let scratch = Scratch::new();
        let bytes: Vec<u8> = (0..8 << 20).map(|at: u32| (at / 4096 * 31 + at) as u8).collect();
        std::fs::write(scratch.ram("source"), bytes).unwrap();
        let ram = format!("ram0={}", scratch.ram("destination").display());
        let qmp = scratch.path("guest.qmp").display().to_string();
        let mut arguments = vec!["incoming", "--json", "--ram", &ram, "tcp:127.0.0.1:0", "--"];
        arguments.extend([UMEM, "guest", "--incoming", "--threads", "0"]);
        arguments.extend(["--ram", &ram, "--size", "8", "--qmp", &qmp]);
        let mut incoming = Umem::start(arguments);
        let cutter = Cutter::to(incoming.event("listening")["uri"].as_str().unwrap());
        prepare(&cutter);
        let ram = format!("ram0={}", scratch.ram("source").display());
        let migrate = Umem::start(["migrate", "-p", "--json", "--ram", &ram, cutter.uri()]);
        Known { scratch, incoming, migrate, cutter }
    }

    fn cut(&self) {
        self.cutter.cut(Ends::Both, false);
        self.cutter.limit_demand(None);
        self.cutter.limit_answers(None);
    }

    fn is_equal(&self) {
        let [source, destination] =
            ["source", "destination"].map(|name| std::fs::read(self.scratch.ram(name)).unwrap());
        assert!(source == destination, "every byte is equal");
    }

    fn completes(mut self) {
        self.cutter.let_pages_go();
        for report in [self.migrate.event("completed"), self.incoming.event("completed")] {
            assert_eq!(report["recoveries"], 1, "{report}");
        }
        self.is_equal();
        self.migrate.succeeds();
    }
}

/// The source has given its guest up, and the destination has not received that.
#[test]
fn lost_switchover_is_sent_again() {
    let mut known = Known::start(|cutter| cutter.limit_demand(Some(UNTIL_SWITCHOVER)));
    known.cutter.wait_for_demand(UNTIL_SWITCHOVER + SWITCHOVER);
    known.cut();
    known.incoming.event("resumed");
    known.migrate.event("running");
    known.incoming.event("running");
    known.completes();
}

#[test]
fn lost_running_frame_is_made_up_for_on_reconnect() {
    let mut known = Known::start(|cutter| cutter.limit_answers(Some(UNTIL_LOADED)));
    known.incoming.event("running");
    known.cutter.wait_for_answers(UNTIL_RUNNING);
    known.cut();
    known.migrate.event("running");
    known.completes();
}

#[test]
fn lost_completion_is_sent_again() {
    let known = Known::start(|cutter| cutter.limit_answers(Some(UNTIL_RUNNING)));
    known.cutter.let_pages_go();
    known.cutter.wait_for_answers(UNTIL_RUNNING + COMPLETE);
    known.cut();
    known.completes();
}

/// The source has received the completion, and exited. Its goodbye is not needed.
#[test]
fn lost_goodbye_blocks_neither_side() {
    let before = UNTIL_SWITCHOVER + SWITCHOVER;
    let mut known = Known::start(|cutter| cutter.limit_demand(Some(before)));
    known.cutter.let_pages_go();
    known.cutter.wait_for_demand(before + COMPLETE);
    known.migrate.event("completed");
    known.cutter.cut(Ends::Both, true);
    known.incoming.event("recovering");
    known.is_equal();
    // It would wait a while for a source that may not know; the test interrupts the wait.
    known.incoming.signal(Signal::SIGINT);
    assert_eq!(known.incoming.event("completed")["recoveries"], 0);
    known.migrate.succeeds();
}

/// An interrupt of a side without a connection prints the consequences; a second one ends that side.
#[test]
fn abandoning_without_a_connection_takes_two_interrupts() {
    let mut known = Known::start(|_| {});
    known.migrate.event("running");
    known.incoming.event("running");
    known.cutter.cut(Ends::Both, true);
    known.migrate.event("recovering");
    known.incoming.event("recovering");
    let says = |umem: &Umem, text: &str| {
        support::wait_for(text, || umem.stderr().contains(text).then_some(()));
    };
    known.migrate.signal(Signal::SIGINT);
    says(&known.migrate, "exist only here; interrupt again to give up");
    known.migrate.signal(Signal::SIGINT);
    assert_eq!(known.migrate.wait().code(), Some(1));
    says(&known.migrate, "keep the RAM file of this guest");

    known.incoming.signal(Signal::SIGINT);
    says(&known.incoming, "interrupt again to leave the guest waiting for them forever");
    known.incoming.signal(Signal::SIGINT);
    assert_eq!(known.incoming.wait().code(), Some(1));
    // The guest waits for its pages; it is not ended, and reads no zeroes.
    assert!(!known.scratch.processes("guest").is_empty());
}

/// Before the switchover a lost lane ends the migration, and the source's guest continues.
#[test]
fn lanes_lost_before_the_switchover_are_not_reopened() {
    let mut known = Known::start(|cutter| cutter.limit_answers(Some(HELLO_BYTES as u64)));
    known.migrate.event("connected");
    known.cutter.wait_for_answers((HELLO_BYTES + HEADER_BYTES + 1) as u64);
    known.cutter.cut(Ends::Both, false);
    let error = known.migrate.fails();
    assert!(error.contains("was lost"), "{error}");
    assert_eq!(known.incoming.wait().code(), Some(1));
    assert!(!known.scratch.ram("destination").exists());
}

/// Foreign connections, old lanes and lanes of another session are refused.
#[test]
fn only_newer_lanes_of_the_same_session_are_accepted() {
    use std::io::{Read, Write};
    use umem_wire::{Capabilities, Hello, HelloError, LaneRole, PROTOCOL, SessionId, Welcome};
    let mut known = Known::start(|_| {});
    known.migrate.event("running");
    known.incoming.event("running");
    let stranger = |epoch| {
        let hello = Hello {
            versions: PROTOCOL,
            capabilities: Capabilities::RECOVERY,
            session: SessionId([7; 16]),
            role: LaneRole::Demand,
            index: 0,
            bulk_lanes: 1,
            epoch,
            proof: [0; 32],
        };
        let address = known.cutter.destination().to_owned();
        let mut lane = std::net::TcpStream::connect(address).unwrap();
        lane.write_all(&hello.encode()).unwrap();
        let mut answer = [0; HELLO_BYTES];
        lane.read_exact(&mut answer).unwrap();
        match Welcome::decode(&answer) {
            Err(HelloError::Refused { text, .. }) => text,
            other => panic!("{other:?}"),
        }
    };
    for epoch in [0, 1, u32::MAX] {
        assert_eq!(stranger(epoch), "another migration is being received");
    }
    known.cutter.cut(Ends::Both, true);
    known.incoming.event("recovering");
    assert_eq!(stranger(5), "another migration is being received");
    known.cutter.admit();
    known.incoming.event("resumed");
    known.completes();
}

/// Pages without room are sent again when there is room: no process is killed, no session ends, both sides report it.
#[test]
fn destination_out_of_memory_pauses_until_memory_is_free() {
    let checked: &[_] = &["--checksum"];
    for (migrate, security) in [(&[][..], false), (checked, false), (&[], true)] {
        let security = security.then(|| ["--secret-file", secret()]);
        let room = Some(96);
        let how = How { mib: 64, threads: 1, migrate, security, room, ..How::default() };
        let mut moving = Move::switched(how);
        moving.room.as_ref().unwrap().take(80);
        moving.cutter.let_pages_go();
        is_short(&mut moving);
        moving.room.as_ref().unwrap().give_back();
        let (source, destination) = moving.complete();
        for report in [source, destination] {
            assert!(report["recoveries"].as_u64() >= Some(1), "{report}");
        }
    }
}

/// A secret, in the build's temporary directory.
fn secret() -> &'static str {
    let path = format!("{}/secret-{}", env!("CARGO_TARGET_TMPDIR"), std::process::id());
    let path: &'static str = path.leak();
    let _ = std::fs::remove_file(path);
    write_private(path.as_ref(), "thirty-two bytes that nobody knows");
    path
}

/// Both sides report the lack of memory, and continue.
fn is_short(moving: &mut Move) {
    let here = moving.incoming.event("short");
    let reason = here["reason"].as_str().unwrap();
    assert!(reason.contains("RAM ram0") && reason.contains("have not arrived"), "{here}");
    assert!(here["missing_bytes"].as_u64() > Some(0), "{here}");
    assert!(here["free_bytes"].as_u64() < Some(16 << 20), "{here}");
    let there = moving.migrate.event("short");
    assert!(there["reason"].as_str().unwrap().contains("RAM ram0"), "{there}");
    assert!(moving.incoming.is_running() && moving.migrate.is_running());
}

/// Holes punched in the file of a guest that has left, and writes to it, are not taken for its memory.
#[test]
fn file_written_by_another_process_is_not_reported_complete() {
    use std::os::unix::fs::FileExt;
    let punch = |file: &std::fs::File| {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(file, flags, 40 << 20, 8 << 20).unwrap();
    };
    let write = |file: &std::fs::File| file.write_all_at(&[0x5a; 4096], 40 << 20).unwrap();
    let changes: [&dyn Fn(&std::fs::File); 2] = [&punch, &write];
    let freed = &["--release-ram"][..];
    // Pages are not demanded while they are freed: a change at the moment of umem's own hole may stay undetected.
    for (from_disk, migrate, threads) in
        [(true, &[][..], 1), (true, &["--checksum"], 1), (false, freed, 0)]
    {
        for change in changes {
            let how = How { mib: 64, threads, migrate, from_disk, ..How::default() };
            let mut moving = Move::switched(how);
            let file = std::fs::File::options().write(true).open(&moving.source_ram).unwrap();
            change(&file);
            moving.cutter.let_pages_go();
            assert_eq!(moving.migrate.wait().code(), Some(1));
            let error = moving.migrate.stderr();
            assert!(error.contains("has changed while it was served"), "{error}");
            let told = moving.incoming.event("recovering");
            assert!(told["reason"].as_str().unwrap().contains("has changed"), "{told}");
        }
    }
    // And an unchanged file is accepted.
    let moving = Move::switched(How { mib: 64, threads: 1, from_disk: true, ..How::default() });
    moving.cutter.let_pages_go();
    moving.complete();
}

/// The kernel reports that a limit is reached, and kills no process.
#[test]
fn memory_limit_pauses_both_sides_until_it_is_raised() {
    for (migrate, kind) in [(&[][..], "shared"), (&["--checksum"], "shared"), (&[], "private")] {
        let limit = MemoryLimit::of(30);
        // Version 2 kills them: `resume.rs` covers that.
        if !limit.kills_nobody() {
            println!("control groups of version 2 have no limit without kills");
            return;
        }
        let kind = Some(kind);
        let how = How { mib: 64, threads: 1, migrate, kind, ..How::default() };
        let mut moving = Move::switched(how);
        // The memory of the guest's process is outside umem's control.
        limit.take(moving.incoming.pid());
        moving.cutter.let_pages_go();
        // A page that has come may be the first to want memory, for the guest's page tables.
        loop {
            let short = moving.incoming.event("short");
            assert!(short["missing_bytes"].as_u64() > Some(0), "{short}");
            if short["reason"].as_str().unwrap().contains("a memory limit is reached") {
                break;
            }
        }
        moving.migrate.event("short");
        limit.set(1 << 20);
        let (source, destination) = moving.complete();
        for report in [source, destination] {
            assert!(report["recoveries"].as_u64() >= Some(1), "{report}");
        }
    }
}

/// There is too little room from the start, and the user knows that room will be made.
#[test]
fn guest_arrives_when_memory_is_freed_during_the_move() {
    // On demand, or in the background.
    for migrate in [&["-n"][..], &[]] {
        let incoming: &[_] = &["--overcommit"];
        let room = Some(24);
        let mut moving =
            Move::switched(How { mib: 64, threads: 2, incoming, migrate, room, ..How::default() });
        moving.cutter.let_pages_go();
        is_short(&mut moving);
        moving.room.as_ref().unwrap().resize(96);
        moving.migrate.event("resumed");
        if !migrate.is_empty() {
            // From now on also pages without a demand.
            moving.migrate.signal(Signal::SIGINT);
        }
        moving.complete();
    }
}

/// A guest without room is refused, unless an option overrides the check.
#[test]
fn guest_without_room_is_refused_before_it_stops() {
    let mut moving = Move::start(How { mib: 64, threads: 1, room: Some(24), ..How::default() });
    assert!(moving.incoming.fails().contains("--overcommit"));
    let error = moving.migrate.fails();
    assert!(error.contains("the destination gave up: RAM ram0 needs 64 MiB"), "{error}");
    assert!(moving.guest.is_running());
}

/// Only untouched pages of private memory are in the file: room is freed during the move.
#[test]
fn private_memory_arrives_with_little_free_memory() {
    let (kind, room, incoming) = (Some("private"), Some(8), &["--postcopy-flags", "1"]);
    let how = How { mib: 64, threads: 1, kind, room, incoming, ..How::default() };
    let moving = Move::switched(how);
    moving.cutter.let_pages_go();
    moving.complete();
}
