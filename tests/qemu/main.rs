//! Unmodified QEMUs and a real Linux guest: moved under load, unaffected by failures, refused if they cannot be moved.
//!
//! The guest (tests/guest) checks every word of its memory continuously, on both sides. Run by `tests/run`, which
//! provides two versions of QEMU, a kernel and the guest.

mod arrivals;
mod asked;
mod destination;
mod discards;
mod disks;
mod failures;
mod found;
mod halted;
mod huge_pages;
mod movers;
mod moving;
mod own_memory;
mod passive;
mod refusals;
mod stream;
mod streamed;
#[path = "../support/mod.rs"]
mod support;
mod terminal;
mod unplugged;
mod vhost_user;

use support::{Machine, Qemu, Scratch, Serial, Umem};

/// An address without a listener: the port of tcpmux, which only root could bind.
const NOBODY: &str = "tcp:127.0.0.1:1";

/// Starts a source and waits until its Linux guest is busy.
fn boot(machine: &Machine, scratch: &Scratch) -> Qemu {
    let mut source = machine.start(scratch);
    booted(&mut source.serial);
    source
}

fn booted(serial: &mut Serial) {
    serial.beat("reads and writes", |beat| beat.reads > 0 && beat.writes > 0);
}

/// The arguments of a `umem incoming`.
fn incoming(command: &[String], options: &[&str], uri: &str) -> Vec<String> {
    let ours = [&["incoming", "--json"], options, &[uri, "--"]].concat();
    ours.into_iter().map(str::to_owned).chain(command.iter().cloned()).collect()
}

/// Starts a `umem migrate` of this guest.
fn migrate(source: &Qemu, uri: &str, options: &[&str]) -> Umem {
    let qmp = source.socket.to_str().expect("the path is UTF-8");
    let words = [&["migrate", "--json", "--qmp", qmp], options, &[uri]].concat();
    Umem::start(words)
}

fn says(text: &str, part: &str) {
    assert!(text.contains(part), "{part:?} is not in: {text}");
}
