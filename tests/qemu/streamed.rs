//! Guests whose memory is not in a file that umem could open: its contents come with QEMU's migration stream. The guest
//! checks every word at the destination.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::destination::Destination;
use crate::moving::{Moved, Moving};
use crate::stream::moves;
use crate::support::{Cutter, Machine, Qemu, QemuVersion, Qmp, Scratch, SourceRam, Umem, wait_for};
use crate::{NOBODY, boot, migrate, says};

/// The limit of waiting contents while the guest runs (`STAGED_BYTES_MAX`), with the surplus of one read of the stream
/// and that of a QEMU that answers a second late.
const STAGED_BYTES_MAX: u64 = (64 << 20) + (1 << 20) + (16 << 20);

/// The tests' Linux guest, whose memory is QEMU's own.
fn machine(source_ram: SourceRam) -> Machine {
    let guest = "umem.mib=96".into();
    Machine { source_ram, guest, ..Machine::linux(QemuVersion::V10_0) }
}

#[test]
fn default_ram_moves_in_rounds_before_the_switchover() {
    moves(&machine(SourceRam::Default), &["--lanes", "2"]);
}

#[test]
fn default_ram_moves_in_rounds_and_then_by_postcopy() {
    moves(&machine(SourceRam::Default), &["--precopy", "-p", "--downtime-limit", "0"]);
}

#[test]
fn memory_file_and_private_file_move_in_rounds() {
    moves(&machine(SourceRam::Memfd), &["--precopy", "-p"]);
    moves(&machine(SourceRam::PrivateFile), &["--precopy", "-p", "--lanes", "2"]);
}

/// A file of umem's own that holds contents: open, and without a name before the commit.
fn staged_file(umem: &Umem) -> Option<PathBuf> {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", umem.pid())).ok()?;
    descriptors.flatten().map(|entry| entry.path()).find(|path| {
        let target = fs::read_link(path).unwrap_or_default();
        let target = target.to_string_lossy();
        target.starts_with("/dev/shm/") && target.ends_with(" (deleted)")
    })
}

/// Bytes of memory that a file holds.
fn bytes_in(file: &Path) -> u64 {
    fs::metadata(file).map_or(0, |metadata| metadata.blocks() * 512)
}

/// Bytes of a process's memory that are in no file.
fn private_bytes(umem: &Umem) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", umem.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("it is told");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib << 10
}

/// Files of umem's own that have names.
fn named_files() -> Vec<PathBuf> {
    let entries = fs::read_dir("/dev/shm").expect("it can be listed").flatten();
    let names = entries.map(|entry| entry.path());
    names.filter(|path| path.extension().is_some_and(|end| end == "ram")).collect()
}

/// A move whose bulk lane stalls in the middle of the first pass, once the waiting contents have reached their limit.
fn stalled(scratch: &Scratch) -> (Moving, Cutter, PathBuf) {
    let machine = machine(SourceRam::Default);
    let source = boot(&machine, scratch);
    let destination = Destination::start(&machine, scratch);
    let cutter = Cutter::to(&destination.uri);
    let sessions = scratch.path("sessions").display().to_string();
    let umem = migrate(&source, cutter.uri(), &["--precopy", "-p", "--session-dir", &sessions]);
    let mut moving = Moving { source, umem, destination };
    let file = wait_for("a file of umem's own", || {
        assert!(moving.umem.is_running(), "{}", moving.umem.stderr());
        staged_file(&moving.umem)
    });
    wait_for("as much in it as may wait", || {
        assert!(moving.umem.is_running(), "{}", moving.umem.stderr());
        (bytes_in(&file) >= 64 << 20).then_some(())
    });
    (moving, cutter, file)
}

#[test]
fn waiting_contents_are_bounded_while_the_guest_runs_and_its_lane_stalls() {
    let scratch = Scratch::new();
    let (mut moving, cutter, file) = stalled(&scratch);
    for _ in 0..3 {
        moving.source.serial.goes_on();
        assert_eq!(moving.source.qmp.status(), "running");
        let (staged, private) = (bytes_in(&file), private_bytes(&moving.umem));
        assert!(staged <= STAGED_BYTES_MAX, "{staged} bytes wait");
        assert!(private <= 64 << 20, "{private} bytes are umem's own");
    }
    cutter.let_pages_go();
    moving.complete().end();
}

/// QEMU then writes the rest, and may hold its main loop's lock meanwhile: umem reads the rest even without room.
#[test]
fn guest_paused_by_its_user_while_the_lane_stalls_arrives_paused() {
    let scratch = Scratch::new();
    let (mut moving, cutter, _) = stalled(&scratch);
    moving.source.qmp.execute("stop", json!({}));
    wait_for("the end of RAM", || {
        let migration = moving.source.qmp.execute("query-migrate", json!({}));
        (migration["ram"]["remaining"] == 0).then_some(())
    });
    cutter.let_pages_go();
    moving.umem.event("completed");
    moving.destination.umem.event("completed");
    let mut qmp = Qmp::connect(&moving.destination.qmp);
    assert_eq!(qmp.status(), "paused");
    qmp.execute("cont", json!({}));
    moving.is_whole_at_the_destination();
    moving.umem.succeeds();
}

/// The same for a guest with a file, whose stream is not read while a pass is sent.
#[test]
fn guest_stopped_by_another_client_in_a_pass_does_not_block_qemu() {
    let scratch = Scratch::new();
    let machine = machine(SourceRam::File);
    let mut source = boot(&machine, &scratch);
    let destination = Destination::start(&machine, &scratch);
    let cutter = Cutter::to(&destination.uri);
    let mut umem = migrate(&source, cutter.uri(), &["--precopy", "-p"]);
    // QEMU syncs again when its first pass has been read, which is before umem sends anything.
    wait_for("the first pass", || {
        let migration = source.qmp.execute("query-migrate", json!({}));
        (migration["ram"]["dirty-sync-count"].as_u64() >= Some(2)).then_some(())
    });
    source.qmp.execute("stop", json!({}));
    wait_for("the end of RAM", || {
        let migration = source.qmp.execute("query-migrate", json!({}));
        (migration["ram"]["remaining"] == 0).then_some(())
    });
    // Nor is it resumed when the move fails.
    umem.kill();
    wait_for("the end of the migration", || (source.qmp.status() == "paused").then_some(()));
    source.qmp.execute("cont", json!({}));
    source.serial.goes_on();
}

#[test]
fn guest_without_files_continues_when_its_umem_is_killed_before_the_stop() {
    let scratch = Scratch::new();
    let (mut moving, _cutter, _) = stalled(&scratch);
    moving.umem.kill();
    moving.source.serial.goes_on();
    assert_eq!(moving.source.qmp.status(), "running");
    assert_eq!(named_files(), Vec::<PathBuf>::new());
    moving.destination.umem.kill();
    // The session records how to undo the changes.
    let sessions = scratch.path("sessions");
    let session = fs::read_dir(&sessions)
        .expect("sessions")
        .flatten()
        .find_map(|entry| entry.file_name().to_str()?.strip_suffix(".source").map(str::to_owned));
    let session = session.expect("a session");
    let sessions = sessions.display().to_string();
    Umem::start(["migrate", "--session-dir", &sessions, "--resume", &session, NOBODY]).succeeds();
    assert_eq!(moving.source.qmp.status(), "running");
    moving.source.serial.goes_on();
}

/// Unsent contents are in a file that another process finds.
#[test]
fn guest_without_files_is_whole_when_its_umem_is_killed_after_the_switchover() {
    let scratch = Scratch::new();
    let machine = machine(SourceRam::Default);
    let source = boot(&machine, &scratch);
    let destination = Destination::start(&machine, &scratch);
    let sessions = scratch.path("sessions").display().to_string();
    let options = ["--precopy", "-p", "--precopy-passes", "1", "--max-postcopy-bandwidth", "1M"];
    let options = [&options[..], &["--downtime-limit", "0", "--session-dir", &sessions]].concat();
    let mut moving = Moved::start(source, destination, &options);
    let session = moving.umem.event("resumable")["session"].as_str().expect("text").to_owned();
    moving.umem.event("running");
    let files = named_files();
    assert_eq!(files.len(), 1, "{files:?}");
    moving.umem.kill();
    let resume = ["migrate", "--json", "--session-dir", &sessions, "--resume", &session];
    moving.umem = Umem::start(resume);
    moving.umem.event("completed");
    moving.destination.umem.event("completed");
    moving.is_whole_at_the_destination();
    moving.umem.succeeds();
    assert_eq!(named_files(), Vec::<PathBuf>::new());
    assert_eq!(fs::read_dir(&sessions).expect("sessions").count(), 0);
}

/// Each refusal names the option with which the guest can be moved.
#[test]
fn guest_without_files_is_refused_by_name_when_its_contents_cannot_be_sent() {
    let scratch = Scratch::new();
    let refused = |mut source: Qemu, options: &[&str], why: &str| {
        says(&migrate(&source, NOBODY, options).fails(), why);
        assert_eq!(source.qmp.status(), "running");
    };
    let machine = machine(SourceRam::Default);
    let before = "RAM backend pc.ram is a memory-backend-ram, without a file that umem can open: add --precopy";
    refused(boot(&machine, &scratch), &["-p"], before);
    let named = format!("pc.ram={}", scratch.ram("none").display());
    refused(boot(&machine, &scratch), &["--precopy", "--ram", &named], "leave out --ram");
    refused(boot(&machine, &scratch), &["--precopy", "--release-ram"], "leave out --release-ram");
    let old = Machine { version: QemuVersion::V7_2, ..machine };
    refused(boot(&old, &scratch), &["--precopy"], "QEMU 7.2 without KVM loses writes");
}
