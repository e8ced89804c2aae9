//! The destination's side of a move.

use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::sys::signal::Signal;

use crate::incoming;
use crate::support::{Machine, Ram, Scratch, Serial, Side, Umem};

/// A `umem incoming` that waits for a source, and its QEMU.
pub(super) struct Destination {
    pub(super) umem: Umem,
    pub(super) uri: String,
    pub(super) guest_pid: u32,
    pub(super) serial: Serial,
    pub(super) qmp: PathBuf,
    pub(super) ram_files: Vec<PathBuf>,
}

impl Destination {
    pub(super) fn start(machine: &Machine, scratch: &Scratch) -> Destination {
        Destination::start_with(machine, scratch, &[], "tcp:127.0.0.1:0")
    }

    pub(super) fn start_with(
        machine: &Machine,
        scratch: &Scratch,
        options: &[&str],
        uri: &str,
    ) -> Destination {
        let words = machine.command_line(scratch, Side::Destination);
        Destination::by(&words, machine, scratch, options, uri)
    }

    /// Through a wrapper command that starts this machine's QEMU.
    pub(super) fn by(
        words: &[String],
        machine: &Machine,
        scratch: &Scratch,
        options: &[&str],
        uri: &str,
    ) -> Destination {
        Destination::of(Umem::start(incoming(words, options, uri)), machine, scratch)
    }

    /// In the foreground of a terminal, which is the standard input of both.
    pub(super) fn start_at(
        terminal: &impl AsFd,
        machine: &Machine,
        scratch: &Scratch,
    ) -> Destination {
        let words = machine.command_line(scratch, Side::Destination);
        let umem = Umem::start_at(terminal, incoming(&words, &[], "tcp:127.0.0.1:0"));
        Destination::of(umem, machine, scratch)
    }

    fn of(mut umem: Umem, machine: &Machine, scratch: &Scratch) -> Destination {
        let listening = umem.event("listening");
        let pid = listening["guest_pid"].as_u64().expect("a pid");
        let file = |ram: &Ram| machine.ram_file(scratch, Side::Destination, ram.id);
        Destination {
            umem,
            uri: listening["uri"].as_str().expect("a URI").to_owned(),
            guest_pid: u32::try_from(pid).expect("pids are small"),
            serial: machine.serial(scratch, Side::Destination),
            qmp: machine.socket(scratch, Side::Destination, "test"),
            ram_files: machine.ram.iter().map(file).collect(),
        }
    }

    pub(super) fn kill_guest(&self) {
        let pid = nix::unistd::Pid::from_raw(self.guest_pid.try_into().expect("pids are small"));
        // umem, its parent, has not reaped it: the pid is its own.
        nix::sys::signal::kill(pid, Signal::SIGKILL).expect("the process exists");
    }

    /// A killed umem cannot clean up: its QEMU ends by itself, its empty RAM files stay.
    pub(super) fn left_by_its_umem(&self, scratch: &Scratch) {
        scratch.wait_until_gone("destination");
        for path in &self.ram_files {
            fs::remove_file(path).expect("the file exists");
        }
    }
}
