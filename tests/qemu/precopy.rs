//! Guests whose memory goes while they run at the source, by QEMU's own log of what they write.

use crate::destination::Destination;
use crate::moving::Moved;
use crate::support::{Machine, QemuVersion, Scratch};
use crate::{boot, migrate};

#[test]
fn a_guest_under_load_moves_by_precopy_and_postcopy() {
    moves_after_rounds(&["--precopy", "-p"]);
}

#[test]
fn a_guest_under_load_moves_by_precopy_alone() {
    moves_after_rounds(&["--precopy"]);
}

#[test]
fn a_guest_under_load_moves_by_precopy_with_checksums() {
    moves_after_rounds(&["--precopy", "-p", "--checksum", "--lanes", "4"]);
}

fn moves_after_rounds(options: &[&str]) {
    let scratch = Scratch::new();
    let machine = Machine::linux(QemuVersion::V10_0);
    let source = boot(&machine, &scratch);
    let destination = Destination::start(&machine, &scratch);
    let mut moving = Moved::start(source, destination, options);
    let pass = moving.umem.event("pass");
    println!("{pass}");
    let moved = moving.complete();
    println!("{}", moved.report);
    moved.end();
}

/// Its log loses writes of guests without KVM.
#[test]
fn a_guest_whose_qemu_loses_writes_in_its_log_is_refused_by_name() {
    let scratch = Scratch::new();
    let machine = Machine::linux(QemuVersion::V7_2);
    let source = boot(&machine, &scratch);
    let error = migrate(&source, "tcp:127.0.0.1:1", &["--precopy", "-p"]).fails();
    assert!(error.contains("QEMU 7.2 without KVM loses writes"), "{error}");
}
