//! A QEMU that `umem incoming` has started in a terminal: the owner of the terminal's signals, and of its input.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::pty::openpty;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getsid};

use crate::destination::Destination;
use crate::moving::Moving;
use crate::support::{Cutter, Machine, Qemu, QemuVersion, Scratch, wait_for};
use crate::{boot, migrate};

/// The characters of Ctrl-C and Ctrl-\, unless a program has switched their signals off.
const CTRL_C: u8 = 0x03;
const CTRL_BACKSLASH: u8 = 0x1c;

/// A terminal: the side that types, and the side of programs.
fn terminal() -> (File, OwnedFd) {
    let pty = openpty(None, None).expect("a terminal");
    // A process that inherited the typing side would keep the terminal open.
    fcntl(&pty.master, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).expect("the terminal is open");
    fcntl(&pty.slave, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).expect("the terminal is open");
    (File::from(pty.master), pty.slave)
}

/// Up to a guest that runs at the destination, whose other pages are held back.
fn switched(source: Qemu, mut destination: Destination) -> (Moving, Cutter) {
    let cutter = Cutter::to(&destination.uri);
    let mut umem = migrate(&source, cutter.uri(), &["-p"]);
    umem.event("running");
    destination.umem.event("running");
    (Moving { source, umem, destination }, cutter)
}

/// Each of them would end a QEMU that receives it, and with it the guest.
#[test]
fn terminal_signals_and_hangup_do_not_end_an_incomplete_guest() {
    let scratch = Scratch::new();
    let machine = Machine::linux(QemuVersion::V10_0);
    let source = boot(&machine, &scratch);
    let (mut keyboard, theirs) = terminal();
    let destination = Destination::start_at(&theirs, &machine, &scratch);
    drop(theirs);
    let guest = Pid::from_raw(destination.guest_pid.try_into().expect("pids are small"));
    assert_eq!(getsid(Some(guest)), Ok(guest), "the guest leads its own session");
    let (moving, cutter) = switched(source, destination);
    let told = |count: usize| {
        let told = moving.destination.umem.stderr().matches("so umem continues until").count();
        (told == count).then_some(())
    };
    keyboard.write_all(&[CTRL_C]).expect("the terminal accepts input");
    wait_for("the remark about Ctrl-C", || told(1));
    keyboard.write_all(&[CTRL_BACKSLASH]).expect("the terminal accepts input");
    wait_for("the remark about Ctrl-\\", || told(2));
    // The terminal's window is closed.
    drop(keyboard);
    wait_for("the remark about the hang-up", || told(3));
    // Not a question to QEMU, whose main loop may wait for a page as well.
    assert_eq!(getsid(Some(guest)), Ok(guest), "the guest's process exists");
    cutter.let_pages_go();
    moving.complete().end();
}

/// A QMP monitor in the terminal, to which Ctrl-C is an ordinary character, as with `-nographic`. Not the human
/// monitor, whose prompt would be part of umem's next line.
const MONITOR: [&str; 4] =
    ["-chardev", "stdio,id=terminal,signal=off", "-mon", "chardev=terminal,mode=control"];

#[test]
fn terminal_monitor_takes_input_before_and_after_the_move() {
    let scratch = Scratch::new();
    let machine = Machine::linux(QemuVersion::V10_0);
    let source = boot(&machine, &scratch);
    let (mut keyboard, theirs) = terminal();
    let extra = MONITOR.map(str::to_owned).to_vec();
    let destination = Destination::start_at(&theirs, &Machine { extra, ..machine }, &scratch);
    let (mut moving, cutter) = switched(source, destination);
    keyboard.write_all(&[CTRL_C]).expect("the terminal accepts input");
    cutter.let_pages_go();
    moving.umem.event("completed");
    moving.destination.umem.event("completed");
    moving.is_whole_at_the_destination();
    assert!(!moving.destination.umem.stderr().contains("continues until"), "no signal ended QEMU");
    let quit = b"{\"execute\": \"qmp_capabilities\"}\n{\"execute\": \"quit\"}\n";
    keyboard.write_all(quit).expect("the terminal accepts input");
    moving.destination.umem.succeeds();
    moving.umem.succeeds();
    moving.source.qmp.quit();
}

/// Ctrl-C in its terminal ends a QEMU whose guest is complete, as if the user had started it there.
#[test]
fn ctrl_c_ends_a_complete_guest() {
    let scratch = Scratch::new();
    let machine = Machine::linux(QemuVersion::V10_0);
    let source = boot(&machine, &scratch);
    let (mut keyboard, theirs) = terminal();
    let destination = Destination::start_at(&theirs, &machine, &scratch);
    let umem = migrate(&source, &destination.uri, &["-p"]);
    let mut moved = Moving { source, umem, destination }.complete();
    keyboard.write_all(&[CTRL_C]).expect("the terminal accepts input");
    let stopping = moved.destination.umem.event("stopping");
    assert_eq!(stopping["guest_pid"], moved.destination.guest_pid, "{stopping}");
    moved.destination.umem.succeeds();
    scratch.wait_until_gone("vm-destination");
    moved.source.qmp.quit();
}

/// Settings that QEMU did not restore when it was killed: here the guest does not arrive.
#[test]
fn terminal_settings_are_restored_after_its_monitor_ends() {
    let scratch = Scratch::new();
    let machine = Machine::bare(QemuVersion::V10_0);
    let (_keyboard, theirs) = terminal();
    let settings = || nix::sys::termios::tcgetattr(&theirs).expect("a terminal");
    let before = settings();
    let extra = MONITOR.map(str::to_owned).to_vec();
    let mut destination = Destination::start_at(&theirs, &Machine { extra, ..machine }, &scratch);
    wait_for("QEMU to set its terminal", || (settings() != before).then_some(()));
    destination.umem.signal(Signal::SIGHUP);
    let status = destination.umem.wait();
    assert_eq!((status.code(), status.signal()), (Some(1), None));
    assert!(destination.umem.stderr().contains("interrupted; no guest had arrived"));
    assert_eq!(settings(), before);
}
