//! Arriving guests, in every mode; they check all of their memory at the destination.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use nix::sys::signal::Signal;
use umem_wire::HELLO_BYTES;

use crate::destination::Destination;
use crate::moving::{Moved, Moving};
use crate::support::{Cutter, Ends, Machine, QemuVersion, Qmp, Ram, Scratch, Tap, Umem};
use crate::{boot, booted, migrate};

#[test]
fn loaded_guest_moves_by_postcopy_with_qemu_7_2() {
    moves_by_postcopy(QemuVersion::V7_2);
}

#[test]
fn loaded_guest_moves_by_postcopy_with_qemu_10_0() {
    moves_by_postcopy(QemuVersion::V10_0);
}

fn moves_by_postcopy(version: QemuVersion) {
    let scratch = Scratch::new();
    let machine = Machine::linux(version);
    let source = boot(&machine, &scratch);
    let destination = Destination::start(&machine, &scratch);
    let moved = Moved::start(source, destination, &["-p"]).complete();
    assert!(moved.report["pages_background"].as_u64() > Some(0), "{}", moved.report);
    moved.end();
}

#[test]
fn remaining_pages_arrive_after_an_interrupt_without_background() {
    let scratch = Scratch::new();
    let machine = Machine::linux(QemuVersion::V10_0);
    let source = boot(&machine, &scratch);
    let destination = Destination::start(&machine, &scratch);
    let tap = Tap::to(&destination.uri, None);
    let mut moving = Moved::start_through(&tap, source, destination, &["-p", "-n"]);
    moving.umem.event("running");
    // The guest demands all of its checked memory, and checks it.
    moving.is_whole_at_the_destination();
    assert_eq!(tap.bulk_bytes(), HELLO_BYTES as u64, "a page without a demand was sent");
    assert!(moving.umem.is_running());

    moving.umem.signal(Signal::SIGINT);
    let moved = moving.complete();
    assert!(moved.report["pages_background"].as_u64() > Some(0), "{}", moved.report);
    moved.end();
}

#[test]
fn all_pages_arrive_before_the_switchover_with_stop_first() {
    let scratch = Scratch::new();
    let machine = Machine::linux(QemuVersion::V7_2);
    let source = boot(&machine, &scratch);
    let destination = Destination::start(&machine, &scratch);
    let moved = Moved::start(source, destination, &["--stop-first"]).complete();
    assert_eq!(moved.report["pages_demand"], 0);
    assert_eq!(moved.report["fault_latency_us"]["count"], 0);
    moved.end();
}

/// Every connection is cut, and new ones fail for ten seconds: the guest runs on with the pages that it has, and with
/// all of them afterwards.
#[test]
fn loaded_guest_survives_ten_seconds_without_a_connection() {
    let scratch = Scratch::new();
    let machine = Machine::linux(QemuVersion::V10_0);
    let source = boot(&machine, &scratch);
    let destination = Destination::start(&machine, &scratch);
    let cutter = Cutter::to(&destination.uri);
    let umem = migrate(&source, cutter.uri(), &["-p", "--lanes", "2"]);
    let mut moving = Moving { source, umem, destination };
    moving.umem.event("running");
    moving.destination.umem.event("running");
    // Some of its memory is here when the connections break, in the middle of a page.
    cutter.cut_after([(10 << 20, Ends::Both)]);
    cutter.refuse_after_cut();
    cutter.let_pages_go();
    cutter.wait_for_cuts(1);
    moving.umem.event("recovering");
    moving.destination.umem.event("recovering");
    // The test is about this duration itself; no event marks its end.
    std::thread::sleep(Duration::from_secs(10));
    assert!(moving.umem.is_running() && moving.destination.umem.is_running());
    cutter.admit();
    for umem in [&mut moving.umem, &mut moving.destination.umem] {
        let resumed = umem.event("resumed");
        assert!(resumed["disconnected_ms"].as_f64() > Some(10_000.0), "{resumed}");
    }
    let moved = moving.complete();
    assert_eq!(moved.report["recoveries"], 1, "{}", moved.report);
    moved.end();
}

/// Both umems are killed, one after the other and together; others take over.
#[test]
fn loaded_guest_survives_the_death_of_both_umems() {
    let scratch = Scratch::new();
    let machine = Machine::linux(QemuVersion::V10_0);
    let source = boot(&machine, &scratch);
    let sessions = scratch.path("sessions").display().to_string();
    let options = ["--session-dir", &sessions];
    let destination = Destination::start_with(&machine, &scratch, &options, "tcp:127.0.0.1:0");
    let cutter = Cutter::to(&destination.uri);
    let umem = migrate(&source, cutter.uri(), &["-p", "--session-dir", &sessions]);
    let mut moving = Moving { source, umem, destination };
    let session = moving.umem.event("resumable")["session"].as_str().expect("text").to_owned();
    let resume = |command| {
        Umem::start([command, "--json", "--session-dir", &sessions, "--resume", &session])
    };
    // Whether the switchover has arrived there is unknown, and so is whether the guest runs.
    moving.destination.umem.kill();
    // The relay's lane numbers restart.
    cutter.cut(Ends::Both, false);
    moving.destination.umem = resume("incoming");
    moving.umem.event("running");
    moving.destination.umem.event("resumed");
    cutter.let_pages_go();
    for (kills_source, kills_destination) in [(true, false), (false, true), (true, true)] {
        cutter.wait_for_passed(cutter.passed() + (6 << 20));
        if kills_source {
            moving.umem.kill();
        }
        if kills_destination {
            moving.destination.umem.kill();
            moving.destination.umem = resume("incoming");
        }
        if kills_source {
            moving.umem = resume("migrate");
        }
    }
    let mut moved = moving.complete();
    // The process that has taken over is not QEMU's parent, and has ended.
    assert!(moved.destination.umem.wait().success());
    Qmp::connect(&moved.destination.qmp).quit();
    moved.source.qmp.quit();
    assert_eq!(fs::read_dir(&sessions).expect("the directory exists").count(), 0);
}

#[test]
fn two_guests_move_concurrently() {
    let scratch = Scratch::new();
    let old = Machine { name: "old", ..Machine::linux(QemuVersion::V7_2) };
    let new = Machine { name: "new", ..Machine::linux(QemuVersion::V10_0) };
    // Every pair reaches the same stage before either continues.
    let mut sources = [old.start(&scratch), new.start(&scratch)];
    sources.iter_mut().for_each(|source| booted(&mut source.serial));
    let machines = [&old, &new];
    let destinations = machines.map(|machine| Destination::start(machine, &scratch));
    let mut moving = Vec::new();
    for (source, destination) in sources.into_iter().zip(destinations) {
        moving.push(Moved::start(source, destination, &["-p"]));
    }
    let moved: Vec<Moved> = moving.into_iter().map(Moving::complete).collect();
    moved.into_iter().for_each(Moved::end);
}

#[test]
fn guest_moves_over_unix_sockets_and_two_bulk_lanes() {
    let scratch = Scratch::new();
    let machine = Machine::linux(QemuVersion::V10_0);
    let source = boot(&machine, &scratch);
    let socket = scratch.path("lanes");
    let uri = format!("unix:{}", socket.display());
    let destination = Destination::start_with(&machine, &scratch, &[], &uri);
    let moved = Moved::start(source, destination, &["-p", "--lanes", "2"]).complete();
    assert_eq!(moved.report["lanes"], 2);
    assert!(!socket.exists(), "the socket is left behind");
    moved.end();
}

#[test]
fn ram_backends_move_in_any_order() {
    let scratch = Scratch::new();
    let [main, dimm] = [Ram { id: "ram0", mib: 256 }, Ram { id: "ram1", mib: 256 }];
    let sender = Machine {
        ram: vec![main, dimm],
        // More than the main memory, so that the DIMM is in use.
        guest: "umem.mib=288 memhp_default_state=online".into(),
        ..Machine::linux(QemuVersion::V7_2)
    };
    let receiver = Machine { ram: vec![dimm, main], ..sender.clone() };
    let source = boot(&sender, &scratch);
    let destination = Destination::start(&receiver, &scratch);
    let moved = Moved::start(source, destination, &["-p"]).complete();
    assert_eq!(moved.report["total_bytes"], 512 << 20);
    moved.end();
}

/// The RFC's design: RAM becomes anonymous memory of the guest, and the file is empty.
#[test]
fn private_ram_becomes_anonymous_with_qemu_10_0() {
    becomes_private(QemuVersion::V10_0, "1");
}

#[test]
fn private_ram_becomes_anonymous_at_the_end_with_qemu_7_2() {
    becomes_private(QemuVersion::V7_2, "0");
}

fn becomes_private(version: QemuVersion, flags: &str) {
    let scratch = Scratch::new();
    let machine = Machine { becomes_private: true, ..Machine::linux(version) };
    let source = boot(&machine, &scratch);
    let options = ["--kind", "private", "--postcopy-flags", flags];
    let destination = Destination::start_with(&machine, &scratch, &options, "tcp:127.0.0.1:0");
    let moved = Moved::start(source, destination, &["-p"]).complete();
    for path in &moved.destination.ram_files {
        assert_eq!(fs::metadata(path).expect("the guest has the file").blocks(), 0);
    }
    moved.end();
}
