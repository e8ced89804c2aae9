//! Failures before the switchover: the guest continues at its place, and the attempt leaves nothing behind.

use std::fs;
use std::io::Read;
use std::net::{TcpListener, TcpStream};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use umem_wire::HELLO_BYTES;

use crate::destination::Destination;
use crate::halted::Halted;
use crate::moving::Moved;
use crate::support::{Machine, Qemu, QemuVersion, Qmp, Ram, Scratch, Side, Umem, wait_for};
use crate::{NOBODY, boot, incoming, migrate, says};

#[test]
fn failure_before_the_switchover_leaves_the_guest_running_with_qemu_7_2() {
    survives_failures(QemuVersion::V7_2);
}

#[test]
fn failure_before_the_switchover_leaves_the_guest_running_with_qemu_10_0() {
    survives_failures(QemuVersion::V10_0);
}

/// One guest goes through every failure, and then moves.
fn survives_failures(version: QemuVersion) {
    let scratch = Scratch::new();
    let machine = Machine::linux(version);
    let mut source = boot(&machine, &scratch);
    let settings = migration_settings(&mut source);

    for failure in [
        nobody_listens,
        the_destination_is_killed_while_it_waits,
        the_destination_is_interrupted_while_it_waits,
        the_destination_is_interrupted_while_a_stranger_is_silent,
        the_destination_says_nothing,
        the_source_is_interrupted_when_connected,
        the_source_is_interrupted_when_stopped,
        the_source_is_interrupted_when_loaded,
        the_destination_is_interrupted_when_connected,
        the_destination_is_interrupted_when_stopped,
        the_destination_is_killed_when_connected,
        the_destination_is_killed_when_stopped,
        the_source_is_killed_when_stopped,
        the_guest_to_be_is_killed_when_stopped,
        the_source_is_killed_when_connected,
        the_connection_is_cut_when_stopped,
        the_device_state_does_not_load,
        the_ram_sizes_differ,
        a_ram_backend_is_missing,
        the_destination_has_no_space,
    ] {
        failure(&machine, &scratch, &mut source);
        assert_eq!(source.qmp.status(), "running");
        source.serial.goes_on();
        assert_eq!(migration_settings(&mut source), settings);
        scratch.wait_until_gone("destination");
        let left = scratch.ram_files();
        assert_eq!(left, [machine.ram_file(&scratch, Side::Source, "ram0")]);
    }

    let destination = Destination::start(&machine, &scratch);
    Moved::start(source, destination, &["-p"]).complete().end();
}

fn migration_settings(source: &mut Qemu) -> [Value; 2] {
    ["query-migrate-capabilities", "query-migrate-parameters"]
        .map(|query| source.qmp.execute(query, json!({})))
}

fn nobody_listens(_: &Machine, _: &Scratch, source: &mut Qemu) {
    let text = migrate(source, NOBODY, &["-p"]).fails();
    says(&text, "cannot connect to tcp:127.0.0.1:1: Connection refused");
    says(&text, "start `umem incoming` there first");
}

fn the_destination_is_killed_while_it_waits(
    machine: &Machine,
    scratch: &Scratch,
    source: &mut Qemu,
) {
    let mut destination = Destination::start(machine, scratch);
    destination.umem.kill();
    let text = migrate(source, &destination.uri, &["-p"]).fails();
    says(&text, "cannot connect");
    destination.left_by_its_umem(scratch);
}

fn the_destination_is_interrupted_while_it_waits(
    machine: &Machine,
    scratch: &Scratch,
    _: &mut Qemu,
) {
    let mut destination = Destination::start(machine, scratch);
    destination.umem.signal(Signal::SIGINT);
    says(&destination.umem.fails(), "interrupted; no guest had arrived");
}

fn the_destination_is_interrupted_while_a_stranger_is_silent(
    machine: &Machine,
    scratch: &Scratch,
    _: &mut Qemu,
) {
    let mut destination = Destination::start(machine, scratch);
    let address = destination.uri.strip_prefix("tcp:").expect("a tcp: URI");
    let _stranger = TcpStream::connect(address).expect("umem listens");
    destination.umem.signal(Signal::SIGINT);
    says(&destination.umem.fails(), "interrupted; no guest had arrived");
}

/// The listener is not a umem.
fn the_destination_says_nothing(_: &Machine, _: &Scratch, source: &mut Qemu) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let uri = format!("tcp:{}", listener.local_addr().expect("the listener is bound"));
    let mut umem = migrate(source, &uri, &["-p"]);
    let (mut connection, _) = listener.accept().expect("umem connects");
    connection.read_exact(&mut [0; HELLO_BYTES]).expect("umem says hello");
    umem.signal(Signal::SIGINT);
    says(&umem.fails(), "interrupted; the guest continues at the source");
}

fn the_source_is_interrupted_when_connected(
    machine: &Machine,
    scratch: &Scratch,
    source: &mut Qemu,
) {
    let mut halted = Halted::when_connected(machine, scratch, source);
    halted.umem.signal(Signal::SIGINT);
    says(&halted.umem.fails(), "interrupted; the guest continues at the source");
    let text = halted.destination.umem.fails();
    says(&text, "the source gave up: interrupted; the guest continues at the source");
}

fn the_source_is_interrupted_when_stopped(machine: &Machine, scratch: &Scratch, source: &mut Qemu) {
    let mut halted = Halted::when_stopped(machine, scratch, source);
    halted.umem.signal(Signal::SIGINT);
    says(&halted.umem.fails(), "interrupted; the guest continues at the source");
    says(&halted.destination.umem.fails(), "the source gave up: interrupted");
}

/// The guest ran when its device state was saved, so a QEMU would start it as soon as it has loaded that.
fn the_source_is_interrupted_when_loaded(machine: &Machine, scratch: &Scratch, source: &mut Qemu) {
    let mut halted = Halted::when_loaded(machine, scratch, source);
    let destination = Qmp::connect(&halted.destination.qmp).status();
    assert_eq!((destination.as_str(), source.qmp.status().as_str()), ("paused", "finish-migrate"));
    halted.umem.signal(Signal::SIGINT);
    says(&halted.umem.fails(), "interrupted; the guest continues at the source");
    says(&halted.destination.umem.fails(), "the source gave up: interrupted");
}

fn the_destination_is_interrupted_when_connected(
    machine: &Machine,
    scratch: &Scratch,
    source: &mut Qemu,
) {
    let mut halted = Halted::when_connected(machine, scratch, source);
    halted.destination.umem.signal(Signal::SIGINT);
    says(&halted.destination.umem.fails(), "interrupted; ");
    // The destination's report about it is held back with the rest.
    halted.tap.cut();
    says(&halted.umem.fails(), "the connection to the destination was lost");
}

fn the_destination_is_interrupted_when_stopped(
    machine: &Machine,
    scratch: &Scratch,
    source: &mut Qemu,
) {
    let mut halted = Halted::when_stopped(machine, scratch, source);
    halted.destination.umem.signal(Signal::SIGINT);
    says(&halted.destination.umem.fails(), "interrupted; the guest stays at the source");
    halted.tap.cut();
    says(&halted.umem.fails(), "the connection to the destination was lost");
}

fn the_destination_is_killed_when_connected(
    machine: &Machine,
    scratch: &Scratch,
    source: &mut Qemu,
) {
    let mut halted = Halted::when_connected(machine, scratch, source);
    halted.destination.umem.kill();
    halted.tap.cut();
    says(&halted.umem.fails(), "the connection to the destination was lost");
    halted.destination.left_by_its_umem(scratch);
}

fn the_destination_is_killed_when_stopped(machine: &Machine, scratch: &Scratch, source: &mut Qemu) {
    let mut halted = Halted::when_stopped(machine, scratch, source);
    halted.destination.umem.kill();
    halted.tap.cut();
    says(&halted.umem.fails(), "the connection to the destination was lost");
    halted.destination.left_by_its_umem(scratch);
}

/// QEMU cancels its migration by itself; the umem that takes over lets the guest run, if it does not by then, and
/// restores the settings.
fn the_source_is_killed_when_stopped(machine: &Machine, scratch: &Scratch, source: &mut Qemu) {
    let mut halted = Halted::when_stopped(machine, scratch, source);
    halted.umem.kill();
    halted.tap.cut();
    wait_for("QEMU to run its guest", || (source.qmp.status() == "running").then_some(()));
    let uri = &halted.destination.uri;
    Umem::start(["migrate", "--json", "--resume", &halted.session, uri]).succeeds();
    // The destination is notified, or has given up before, because nothing was loaded yet.
    halted.destination.umem.fails();
}

fn the_guest_to_be_is_killed_when_stopped(machine: &Machine, scratch: &Scratch, source: &mut Qemu) {
    let halted = Halted::when_stopped(machine, scratch, source);
    halted.destination.kill_guest();
    says(&halted.destination.umem.fails(), "the guest's monitor: it");
    halted.tap.cut();
    says(&halted.umem.fails(), "the connection to the destination was lost");
}

fn the_source_is_killed_when_connected(machine: &Machine, scratch: &Scratch, source: &mut Qemu) {
    let mut halted = Halted::when_connected(machine, scratch, source);
    halted.umem.kill();
    says(&halted.destination.umem.fails(), "the connection to the source was lost");
}

fn the_connection_is_cut_when_stopped(machine: &Machine, scratch: &Scratch, source: &mut Qemu) {
    let halted = Halted::when_stopped(machine, scratch, source);
    halted.tap.cut();
    says(&halted.umem.fails(), "the connection to the destination was lost");
    says(&halted.destination.umem.fails(), "the connection to the source was lost");
}

fn the_device_state_does_not_load(machine: &Machine, scratch: &Scratch, source: &mut Qemu) {
    let other = Machine { cpus: 1, ..machine.clone() };
    let destination = Destination::start(&other, scratch);
    let text = migrate(source, &destination.uri, &["-p"]).fails();
    says(&text, "the destination gave up: the guest's monitor: it");
    says(&destination.umem.fails(), "the guest's monitor: it");
}

fn the_ram_sizes_differ(machine: &Machine, scratch: &Scratch, source: &mut Qemu) {
    let other = Machine { ram: vec![Ram { id: "ram0", mib: 128 }], ..machine.clone() };
    let destination = Destination::start(&other, scratch);
    let text = migrate(source, &destination.uri, &["-p"]).fails();
    for part in ["ram0", "256", "128"] {
        says(&text, part);
    }
    says(&text, "the destination gave up: ");
    let same = destination.umem.fails();
    says(&text, &same);
}

fn a_ram_backend_is_missing(machine: &Machine, scratch: &Scratch, source: &mut Qemu) {
    let dimm = Ram { id: "ram1", mib: 128 };
    let other = Machine { ram: [&machine.ram[..], &[dimm]].concat(), ..machine.clone() };
    let destination = Destination::start(&other, scratch);
    let text = migrate(source, &destination.uri, &["-p"]).fails();
    says(&text, "ram1");
    says(&text, &destination.umem.fails());
}

fn the_destination_has_no_space(machine: &Machine, scratch: &Scratch, source: &mut Qemu) {
    let small = scratch.path("small");
    fs::create_dir_all(&small).expect("a directory");
    // The mount is umem's alone and ends with it.
    let mount = format!("mount -t tmpfs -o size=64m none {} && exec \"$@\"", small.display());
    let wrapper = ["unshare", "--mount", "sh", "-c", &mount, "sh"];
    let mut words = machine.command_line(scratch, Side::Destination);
    let path = machine.ram_file(scratch, Side::Destination, "ram0").display().to_string();
    let there = small.join("ram0").display().to_string();
    words.iter_mut().for_each(|word| *word = word.replace(&path, &there));
    let mut umem = Umem::start_under(&wrapper, incoming(&words, &[], "tcp:127.0.0.1:0"));
    let uri = umem.event("listening")["uri"].as_str().expect("a URI").to_owned();
    let text = migrate(source, &uri, &["-p"]).fails();
    says(&text, "the destination gave up: RAM ram0 needs 256 MiB");
    says(&text, "has 64 MiB free");
    says(&text, &umem.fails());
}
