//! Unmodified QEMUs and a real Linux guest: moved under load, left alone by failures, refused where
//! they cannot be moved.
//!
//! The guest (tests/guest) checks every word of its memory again and again, on both sides. Run by
//! `tests/run`, which provides two versions of QEMU, a kernel and the guest.

#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::{
    Cutter, Ends, Machine, Qemu, QemuVersion, Ram, Scratch, Serial, Side, Tap, Umem, wait_for,
};
use umem_wire::{HEADER_BYTES, HELLO_BYTES};

/// Where nobody listens: the port for tcpmux, which only root could have taken.
const NOBODY: &str = "tcp:127.0.0.1:1";

/// Frames of the destination that precede its guest's running: a welcome, ready, loaded.
const UNTIL_CONNECTED: usize = HELLO_BYTES;
/// A ready frame has a byte for each region, and the guests here that are halted have one.
const UNTIL_READY: usize = HELLO_BYTES + HEADER_BYTES + 1;

// -- Guests that arrive ---------------------------------------------------------------------------

#[test]
fn a_guest_under_load_moves_by_postcopy_with_qemu_7_2() {
    moves_by_postcopy(QemuVersion::V7_2);
}

#[test]
fn a_guest_under_load_moves_by_postcopy_with_qemu_10_0() {
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
fn without_background_pages_the_rest_comes_after_an_interrupt() {
    let scratch = Scratch::new();
    let machine = Machine::linux(QemuVersion::V10_0);
    let source = boot(&machine, &scratch);
    let destination = Destination::start(&machine, &scratch);
    let tap = Tap::to(&destination.uri, None);
    let mut moving = Moved::start_through(&tap, source, destination, &["-p", "-n"]);
    moving.umem.event("running");
    // The guest fetches all that it checks by itself, and checks it.
    moving.is_whole_at_the_destination();
    assert_eq!(tap.bulk_bytes(), HELLO_BYTES as u64, "a page nobody asked for has left");
    assert!(moving.umem.is_running());

    moving.umem.signal(Signal::SIGINT);
    let moved = moving.complete();
    assert!(moved.report["pages_background"].as_u64() > Some(0), "{}", moved.report);
    moved.end();
}

#[test]
fn without_postcopy_all_pages_come_before_the_switchover() {
    let scratch = Scratch::new();
    let machine = Machine::linux(QemuVersion::V7_2);
    let source = boot(&machine, &scratch);
    let destination = Destination::start(&machine, &scratch);
    let moved = Moved::start(source, destination, &[]).complete();
    assert_eq!(moved.report["pages_demand"], 0);
    assert_eq!(moved.report["fault_latency_us"]["count"], 0);
    moved.end();
}

/// Every connection is cut, and none can be made for ten seconds: the guest goes on with what it has,
/// and with all of it afterwards.
#[test]
fn a_guest_under_load_survives_ten_seconds_without_a_connection() {
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
    // What is tested is this time itself; nothing that happens in it tells when it is over.
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

/// Both umems are killed, one after the other and at once; others take over.
#[test]
fn a_guest_under_load_survives_the_death_of_its_umems() {
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
    // Whether the switchover has come there nobody knows, nor whether the guest runs.
    moving.destination.umem.kill();
    // The relay's lanes begin anew.
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
    // Who has taken over is not the QEMU's parent, and has ended.
    assert!(moved.destination.umem.wait().success());
    support::Qmp::connect(&moved.destination.qmp).quit();
    moved.source.qmp.quit();
    assert_eq!(fs::read_dir(&sessions).expect("it is there").count(), 0);
}

#[test]
fn two_guests_move_at_once() {
    let scratch = Scratch::new();
    let old = Machine { name: "old", ..Machine::linux(QemuVersion::V7_2) };
    let new = Machine { name: "new", ..Machine::linux(QemuVersion::V10_0) };
    // Every pair is at the same stage before either goes on.
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
fn a_guest_moves_over_unix_sockets_and_two_bulk_lanes() {
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
fn every_ram_backend_moves_whatever_their_order() {
    let scratch = Scratch::new();
    let [main, dimm] = [Ram { id: "ram0", mib: 256 }, Ram { id: "ram1", mib: 256 }];
    let sender = Machine {
        ram: vec![main, dimm],
        // More than the main memory has, so that the DIMM is in use.
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

/// The RFC's own shape: RAM ends as the guest's own anonymous memory, and the file empty.
#[test]
fn a_guests_memory_becomes_its_own_with_qemu_10_0() {
    becomes_private(QemuVersion::V10_0, "1");
}

#[test]
fn a_guests_memory_becomes_its_own_at_the_end_with_qemu_7_2() {
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
        assert_eq!(fs::metadata(path).expect("the guest has it").blocks(), 0);
    }
    moved.end();
}

// -- Failures before the switchover ---------------------------------------------------------------

#[test]
fn what_fails_before_the_switchover_leaves_the_guest_running_with_qemu_7_2() {
    survives_failures(QemuVersion::V7_2);
}

#[test]
fn what_fails_before_the_switchover_leaves_the_guest_running_with_qemu_10_0() {
    survives_failures(QemuVersion::V10_0);
}

/// One guest goes through every failure, and moves at last.
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
    says(&text, "start `umem incoming tcp:127.0.0.1:1` there first");
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
    let _stranger = TcpStream::connect(address).expect("it listens");
    destination.umem.signal(Signal::SIGINT);
    says(&destination.umem.fails(), "interrupted; no guest had arrived");
}

/// Something listens that is no umem.
fn the_destination_says_nothing(_: &Machine, _: &Scratch, source: &mut Qemu) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let uri = format!("tcp:{}", listener.local_addr().expect("it is bound"));
    let mut umem = migrate(source, &uri, &["-p"]);
    let (mut connection, _) = listener.accept().expect("umem connects");
    connection.read_exact(&mut [0; HELLO_BYTES]).expect("umem says hello");
    umem.signal(Signal::SIGINT);
    says(&umem.fails(), "interrupted; the guest goes on here");
}

fn the_source_is_interrupted_when_connected(
    machine: &Machine,
    scratch: &Scratch,
    source: &mut Qemu,
) {
    let mut halted = Halted::when_connected(machine, scratch, source);
    halted.umem.signal(Signal::SIGINT);
    says(&halted.umem.fails(), "interrupted; the guest goes on here");
    let text = halted.destination.umem.fails();
    says(&text, "the source gave up: interrupted; the guest goes on here");
}

fn the_source_is_interrupted_when_stopped(machine: &Machine, scratch: &Scratch, source: &mut Qemu) {
    let mut halted = Halted::when_stopped(machine, scratch, source);
    halted.umem.signal(Signal::SIGINT);
    says(&halted.umem.fails(), "interrupted; the guest goes on here");
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
    // What the destination says of it is held back with the rest.
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

/// Whoever takes over from it has the guest run again, and puts back what was changed in its QEMU.
fn the_source_is_killed_when_stopped(machine: &Machine, scratch: &Scratch, source: &mut Qemu) {
    let mut halted = Halted::when_stopped(machine, scratch, source);
    halted.umem.kill();
    halted.tap.cut();
    assert_eq!(source.qmp.status(), "postmigrate");
    let uri = &halted.destination.uri;
    Umem::start(["migrate", "--json", "--resume", &halted.session, uri]).succeeds();
    // It hears of it, or has given up before as nothing was loaded yet.
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

// -- Refusals -------------------------------------------------------------------------------------

#[test]
fn a_source_that_cannot_be_moved_is_refused_and_runs_on() {
    for version in [QemuVersion::V7_2, QemuVersion::V10_0] {
        let scratch = Scratch::new();
        let path = scratch.ram("source");
        let file = format!(
            "-machine memory-backend=ram0 -object \
             memory-backend-file,id=ram0,size=64M,mem-path={}",
            path.display()
        );
        let refused = |options: &str, expected: &[&str]| {
            let mut source = plain_source(version, &scratch, options);
            let text = migrate(&source, NOBODY, &["-p"]).fails();
            expected.iter().for_each(|part| says(&text, part));
            assert_eq!(source.qmp.status(), "running");
        };
        let how = "memory-backend-file,id=ram0,size=SIZE,share=on,mem-path=/dev/shm/FILE";
        refused("", &["RAM backend pc.ram is a memory-backend-ram", how]);
        let memfd = "-machine memory-backend=ram0 -object \
                     memory-backend-memfd,id=ram0,size=64M,share=on";
        refused(memfd, &["RAM backend ram0 is a memory-backend-memfd", how]);
        let ram = "-machine memory-backend=ram0 -object memory-backend-ram,id=ram0,size=64M";
        refused(ram, &["RAM backend ram0 is a memory-backend-ram", how]);
        refused(&file, &["RAM backend ram0 has share=off", "add share=on"]);
        let directory = file.replace(&path.display().to_string(), "/dev/shm") + ",share=on";
        refused(&directory, &["directory as its mem-path", "/dev/shm/ram0"]);

        let backend = VhostUser::listen(&scratch.path("vhost-user"));
        let vhost_user = format!(
            "{file},share=on -chardev socket,id=c,path={} -netdev vhost-user,id=n,chardev=c",
            backend.path.display()
        );
        refused(&vhost_user, &["a netdev of type vhost-user", "take it out"]);
        let _ = fs::remove_file(path);
    }
}

#[test]
fn a_command_that_cannot_receive_is_refused_and_leaves_nothing() {
    let scratch = Scratch::new();
    let ram = scratch.ram("ram0").display().to_string();
    let file = format!("-object memory-backend-file,id=ram0,size=64M,mem-path={ram}");
    let good = format!("-machine memory-backend=ram0 {file},share=on");
    for (options, expected) in [
        (String::new(), "COMMAND has no RAM that can be filled from outside"),
        (
            "-object memory-backend-memfd,id=ram0,size=64M,share=on".into(),
            "RAM backend ram0 is a memory-backend-memfd",
        ),
        (file.clone(), "RAM backend ram0 has share=off"),
        (format!("{file},share=on,prealloc=on"), "prealloc=on of RAM backend ram0"),
        (format!("{good} -mem-prealloc"), "-mem-prealloc makes QEMU touch every page"),
        (format!("{good} -overcommit mem-lock=on"), "mem-lock=on makes QEMU fetch every page"),
        (format!("{good} -device vfio-pci,host=00:02.0"), "vfio-pci reaches the guest's RAM past"),
        (format!("{good} -netdev vhost-user,id=n,chardev=c"), "vhost-user reaches the guest's RAM"),
        (format!("{good} -device vhost-user-fs-pci,chardev=c"), "vhost-user-fs-pci reaches"),
        (format!("{good} -daemonize"), "-daemonize hides QEMU from umem"),
        (format!("{good} -incoming tcp:127.0.0.1:0"), "QEMU's own -incoming"),
        (good.replace(&ram, "/dev/shm"), "RAM backend ram0 has a directory as its mem-path"),
        // QEMU's own refusals: its message, and one line of ours.
        (format!("{good} -device no-such-device"), "the guest's monitor: it"),
        (
            format!("{good} -no-such-option"),
            "the guest's monitor: it exited before it mapped RAM ram0 (its own messages say why)",
        ),
    ] {
        for version in [QemuVersion::V7_2, QemuVersion::V10_0] {
            let words = plain_command(version, &options);
            let text = Umem::start(incoming(&words, &[], "tcp:127.0.0.1:0")).fails();
            says(&text, expected);
            nothing_is_left(&scratch);
        }
    }
}

#[test]
fn what_else_keeps_a_destination_from_waiting_is_told() {
    let scratch = Scratch::new();
    let machine = Machine::bare(QemuVersion::V10_0);
    let words = machine.command_line(&scratch, Side::Destination);
    let anywhere = "tcp:127.0.0.1:0";
    let refused = |umem: Umem, expected: &[&str]| {
        let text = umem.fails();
        expected.iter().for_each(|part| says(&text, part));
        nothing_is_left(&scratch);
    };

    let options = ["--preload", "/nonexistent/preload.so"];
    let umem = Umem::start(incoming(&words, &options, anywhere));
    refused(umem, &["/nonexistent/preload.so cannot be used: No such file", "leave out --preload"]);

    let program = ["/nonexistent/qemu".to_owned()];
    let missing = [&program[..], &words[1..]].concat();
    let umem = Umem::start(incoming(&missing, &[], anywhere));
    refused(umem, &["cannot start /nonexistent/qemu: no such program"]);

    let busy = TcpListener::bind("127.0.0.1:0").expect("a port");
    let uri = format!("tcp:{}", busy.local_addr().expect("it is bound"));
    let umem = Umem::start(incoming(&words, &[], &uri));
    refused(umem, &["cannot listen on tcp:127.0.0.1:", "Address already in use", "choose another"]);

    let socket = scratch.path("busy");
    let _busy = UnixListener::bind(&socket).expect("a socket");
    let umem = Umem::start(incoming(&words, &[], &format!("unix:{}", socket.display())));
    refused(umem, &["cannot listen on unix:", "Address already in use"]);
    assert!(socket.exists(), "somebody else's socket is removed");

    // A user who may do nothing special but read this repository, wherever it lies.
    let nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups \
                  --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search \
                  --bounding-set=-all,+dac_read_search";
    let nobody: Vec<&str> = nobody.split_ascii_whitespace().collect();
    // Without the sockets and logs of `words`, for which nobody has no place.
    let ram = scratch.ram("ram0");
    let options = format!(
        "-machine memory-backend=ram0 -object \
         memory-backend-file,id=ram0,size=64M,share=on,mem-path={}",
        ram.display()
    );
    let plain = plain_command(QemuVersion::V10_0, &options);
    let umem = Umem::start_under(&nobody, incoming(&plain, &[], anywhere));
    refused(umem, &["no permission for userfaultfd", "/dev/userfaultfd"]);

    let used = machine.ram_file(&scratch, Side::Destination, "ram0");
    let mut file = fs::File::create(&used).expect("shared memory can be written");
    file.write_all(b"somebody's memory").expect("shared memory can be written");
    file.set_len(256 << 20).expect("as long as the backend");
    let text = Umem::start(incoming(&words, &[], anywhere)).fails();
    says(&text, "RAM ram0: its file holds data already");
    assert_eq!(fs::read(&used).expect("it is left alone")[..17], *b"somebody's memory");
}

#[test]
fn a_command_without_the_preload_object_is_refused() {
    let scratch = Scratch::new();
    let ram = format!("ram0={}", scratch.ram("ram0").display());
    let uri = "tcp:127.0.0.1:0";
    for (command, expected) in [
        // Loads it and maps nothing.
        (&["true"][..], "it exited before it mapped RAM ram0"),
        // Static, as it has to repair the dynamic linker's files: it loads nothing.
        (&["/sbin/ldconfig", "--version"], "the preload object was not loaded into COMMAND"),
    ] {
        let words = [&["incoming", "--json", "--ram", &ram, uri, "--"], command].concat();
        let text = Umem::start(words).fails();
        says(&text, expected);
        nothing_is_left(&scratch);
    }
}

#[test]
fn a_wrong_command_line_is_one_line_and_exit_status_2() {
    let qemu = QemuVersion::V10_0.program().display().to_string();
    for (line, expected) in [
        ("incoming tcp:127.0.0.1:0", "no COMMAND"),
        ("incoming tcp:127.0.0.1:0 -- true", "name its RAM files with --ram NAME=PATH"),
        ("incoming 127.0.0.1:4444 -- QEMU", "write tcp:HOST:PORT, unix:PATH, fd:N or"),
        ("incoming --lanes 0 tcp::0 -- QEMU", "--lanes is 1 to"),
        ("incoming --kind quick tcp::0 -- QEMU", "kinds are shared, private and anonymous"),
        ("migrate -p tcp:127.0.0.1:1", "give the guest's QMP socket with --qmp"),
        ("migrate -n --qmp x tcp:127.0.0.1:1", "-n only makes sense with -p"),
        ("migrate -p --ram ram0 tcp:127.0.0.1:1", "write NAME=PATH"),
        ("migrate -p --qmp x", "tcp:HOST:4444, or which session to --resume"),
        ("move", "--help"),
    ] {
        let line = line.replace("QEMU", &qemu);
        let text = Umem::start(line.split(' ')).fails_as_misused();
        says(&text, expected);
    }
}

#[test]
fn a_monitor_that_cannot_be_asked_is_told() {
    let scratch = Scratch::new();
    let missing = scratch.path("missing").display().to_string();
    let text = Umem::start(["migrate", "-p", "--qmp", &missing, NOBODY]).fails();
    says(&text, "cannot connect to the QMP socket");
    says(&text, &format!("-qmp unix:{missing},server=on,wait=off"));

    // QEMU serves one client at a time: a second one never hears a greeting.
    let machine = Machine::bare(QemuVersion::V7_2);
    let mut source = machine.start(&scratch);
    let taken = machine.socket(&scratch, Side::Source, "test").display().to_string();
    let text = Umem::start(["migrate", "-p", "--qmp", &taken, NOBODY]).fails();
    says(&text, "another program is connected");
    assert_eq!(source.qmp.status(), "running");
}

// -- Steps ----------------------------------------------------------------------------------------

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
    let qmp = source.socket.to_str().expect("it is UTF-8");
    let words = [&["migrate", "--json", "--qmp", qmp], options, &[uri]].concat();
    Umem::start(words)
}

fn says(text: &str, part: &str) {
    assert!(text.contains(part), "{part:?} is not in: {text}");
}

fn nothing_is_left(scratch: &Scratch) {
    // A process that umem has killed and waited for is gone when umem is.
    assert_eq!(scratch.processes(""), []);
    assert_eq!(scratch.ram_files(), Vec::<PathBuf>::new());
}

/// A QEMU with nothing to boot and just these options.
fn plain_command(version: QemuVersion, options: &str) -> Vec<String> {
    let program = version.program().display().to_string();
    let words = format!("-accel tcg -machine q35 -m 64M -nodefaults -display none {options}");
    [&[program][..], &words.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>()]
        .concat()
}

/// Such a QEMU, running.
fn plain_source(version: QemuVersion, scratch: &Scratch, options: &str) -> Qemu {
    let [test, umem] = ["test.qmp", "umem.qmp"].map(|name| scratch.path(name));
    let _ = fs::remove_file(&test);
    let mut words = plain_command(version, options);
    for socket in [&test, &umem] {
        words.push("-qmp".into());
        words.push(format!("unix:{},server=on,wait=off", socket.display()));
    }
    Qemu::start(&words, &test, umem, Serial::follow(&scratch.path("no-serial")))
}

/// A `umem incoming` that waits for a source, and the QEMU that it has started.
struct Destination {
    umem: Umem,
    uri: String,
    guest_pid: u32,
    serial: Serial,
    qmp: PathBuf,
    ram_files: Vec<PathBuf>,
}

impl Destination {
    fn start(machine: &Machine, scratch: &Scratch) -> Destination {
        Destination::start_with(machine, scratch, &[], "tcp:127.0.0.1:0")
    }

    fn start_with(
        machine: &Machine,
        scratch: &Scratch,
        options: &[&str],
        uri: &str,
    ) -> Destination {
        let words = machine.command_line(scratch, Side::Destination);
        let mut umem = Umem::start(incoming(&words, options, uri));
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

    fn kill_guest(&self) {
        let pid = nix::unistd::Pid::from_raw(self.guest_pid.try_into().expect("pids are small"));
        // umem, its parent, has not waited for it: the pid is its own.
        nix::sys::signal::kill(pid, Signal::SIGKILL).expect("it runs");
    }

    /// A umem that was killed cannot tidy up: its QEMU ends by itself, its empty RAM files stay.
    fn left_by_its_umem(&self, scratch: &Scratch) {
        scratch.wait_until_gone("destination");
        for path in &self.ram_files {
            fs::remove_file(path).expect("it is there");
        }
    }
}

/// A migration that stands still at a known place, because the destination's next step is held back.
struct Halted {
    tap: Tap,
    umem: Umem,
    destination: Destination,
    /// The session's number, once the source's guest has stopped.
    session: String,
}

impl Halted {
    /// All lanes are open and the source's guest runs.
    fn when_connected(machine: &Machine, scratch: &Scratch, source: &mut Qemu) -> Halted {
        let mut halted = Halted::after(UNTIL_CONNECTED, machine, scratch, source);
        halted.umem.event("connected");
        halted.destination.umem.event("connected");
        assert_eq!(source.qmp.status(), "running");
        halted
    }

    /// The source's guest has stopped, and its device state is saved.
    fn when_stopped(machine: &Machine, scratch: &Scratch, source: &mut Qemu) -> Halted {
        let mut halted = Halted::after(UNTIL_READY, machine, scratch, source);
        let stopped = halted.umem.event("stopped");
        halted.session = stopped["session"].as_str().expect("text").to_owned();
        halted.destination.umem.event("stopped");
        wait_for("the device state to be saved", || {
            (source.qmp.status() == "postmigrate").then_some(())
        });
        halted
    }

    fn after(answers: usize, machine: &Machine, scratch: &Scratch, source: &Qemu) -> Halted {
        let destination = Destination::start(machine, scratch);
        let tap = Tap::to(&destination.uri, Some(answers));
        let umem = migrate(source, tap.uri(), &["-p"]);
        Halted { tap, umem, destination, session: String::new() }
    }
}

/// A migration on its way.
struct Moving {
    source: Qemu,
    umem: Umem,
    destination: Destination,
}

impl Moving {
    /// Waits until the guest has checked all of its memory at the destination.
    fn is_whole_at_the_destination(&mut self) {
        let last = self.source.serial.last_beat();
        let serial = &mut self.destination.serial;
        let first = serial.beat("a number after the source's last", |_| true);
        assert!(first.number > last.number, "{first:?} at the destination after {last:?}");
        // One sweep was under way when the guest was moved, the next one is the destination's alone.
        serial.beat("two more sweeps", |beat| beat.passes >= first.passes + 2);
        serial.beat("further reads and writes", |beat| {
            beat.reads > first.reads && beat.writes > first.writes
        });
        assert_eq!(self.source.serial.last_beat().number, last.number, "both guests run");
    }

    /// Waits for both reports and checks them, and the guest.
    fn complete(mut self) -> Moved {
        let ours = self.umem.event("completed");
        let report = self.destination.umem.event("completed");
        check_reports(&ours, &report);
        self.is_whole_at_the_destination();
        assert_eq!(self.source.qmp.status(), "postmigrate");
        let total: u64 = self.destination.ram_files.iter().map(|path| bytes_of(path)).sum();
        assert_eq!(report["total_bytes"], total);
        is_free_of_userfaultfd(self.destination.guest_pid);
        self.umem.succeeds();
        Moved { source: self.source, destination: self.destination, report }
    }
}

/// A guest that has arrived, with the destination's report.
struct Moved {
    source: Qemu,
    destination: Destination,
    report: Value,
}

impl Moved {
    /// Starts a migration with these options.
    fn start(source: Qemu, destination: Destination, options: &[&str]) -> Moving {
        let umem = migrate(&source, &destination.uri, options);
        Moving { source, umem, destination }
    }

    fn start_through(
        tap: &Tap,
        source: Qemu,
        destination: Destination,
        options: &[&str],
    ) -> Moving {
        let umem = migrate(&source, tap.uri(), options);
        Moving { source, umem, destination }
    }

    /// Its QEMU quits; `umem incoming`, which has waited for it, ends as well.
    fn end(mut self) {
        assert!(self.destination.umem.is_running());
        support::Qmp::connect(&self.destination.qmp).quit();
        self.destination.umem.succeeds();
        self.source.qmp.quit();
    }
}

fn bytes_of(path: &Path) -> u64 {
    fs::metadata(path).expect("the guest has it").len()
}

/// Checks the two reports of one migration, each for itself and against each other.
fn check_reports(source: &Value, destination: &Value) {
    let kind = destination["kind"].as_str().expect("a kind");
    assert!(["shared", "private"].contains(&kind), "{destination}");
    for (report, role) in [(source, "source"), (destination, "destination")] {
        let number = |name: &str| {
            report[name].as_u64().unwrap_or_else(|| panic!("{name} is not a count: {report}"))
        };
        let seconds = |name: &str| {
            report[name].as_f64().unwrap_or_else(|| panic!("{name} is no number: {report}"))
        };
        assert_eq!(report["role"], role);
        assert_eq!(report["kind"].as_str(), Some(if role == "source" { "shared" } else { kind }));
        assert_eq!(report["page_size"], 4096);
        assert!(number("lanes") > 0, "{report}");
        let total = number("total_bytes");
        let parts = ["data_bytes", "zero_bytes", "hole_bytes"].map(number);
        assert_eq!(parts.iter().sum::<u64>(), total, "{report}");
        assert!(parts[0] > 0, "{report}");
        assert_eq!(number("pages_demand") + number("pages_background"), total / 4096, "{report}");
        assert!(seconds("downtime_ms") > 0.0, "{report}");
        assert!(seconds("total_s") > 0.0 && seconds("gbps") > 0.0, "{report}");
        assert!(seconds("drain_s") <= seconds("total_s"), "{report}");
        let is_released = report["kind"] == "private";
        assert_eq!(number("release_bytes"), if is_released { parts[0] } else { 0 }, "{report}");
        let cpu = &report["cpu_s"];
        assert!(cpu["user"].is_f64() && cpu["system"].is_f64(), "{report}");
        assert!(report["zero_copy"].is_string(), "{report}");
    }
    for name in ["total_bytes", "data_bytes", "zero_bytes", "hole_bytes", "lanes"] {
        assert_eq!(source[name], destination[name], "{name}");
    }
    let latency = &destination["fault_latency_us"];
    let quantiles =
        ["p50", "p90", "p99", "p999", "max"].map(|name| latency[name].as_u64().expect(name));
    assert!(quantiles.is_sorted(), "{latency}");
    // Where pages were asked for somebody waited; where none were, nobody did.
    let count = latency["count"].as_u64().expect("count");
    let asked = destination["pages_demand"].as_u64().expect("pages_demand");
    assert_eq!(count > 0, asked > 0, "{destination}");
}

/// The guest's process is as if it had never been a destination.
fn is_free_of_userfaultfd(pid: u32) {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the guest runs");
    let registered = |line: &&str| {
        line.strip_prefix("VmFlags:")
            .is_some_and(|flags| flags.split(' ').any(|flag| flag == "um" || flag == "ui"))
    };
    assert_eq!(maps.lines().find(registered), None);
    assert!(maps.contains("VmFlags:"), "this kernel does not tell flags");
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("the guest runs");
    let open = descriptors.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    let userfaultfds: Vec<PathBuf> =
        open.filter(|target| target.to_string_lossy().contains("userfaultfd")).collect();
    assert_eq!(userfaultfds, Vec::<PathBuf>::new());
}

/// A vhost-user backend that says as little as QEMU is content with, to start a netdev.
struct VhostUser {
    path: PathBuf,
}

impl VhostUser {
    fn listen(path: &Path) -> VhostUser {
        let listener = UnixListener::bind(path).expect("a socket");
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                // Until QEMU ends.
                let _ = VhostUser::serve(connection);
            }
        });
        VhostUser { path: path.into() }
    }

    /// Messages are a request's number, flags and the body's size, 32 bits each, and the body
    /// (QEMU, docs/interop/vhost-user.rst).
    fn serve(mut connection: UnixStream) -> std::io::Result<()> {
        const GET_FEATURES: u32 = 1;
        const REPLY: u32 = 1 | 1 << 2;
        const VIRTIO_F_VERSION_1: u64 = 1 << 32;
        loop {
            let mut header = [[0; 4]; 3];
            connection.read_exact(header.as_flattened_mut())?;
            let [request, _, size] = header.map(u32::from_le_bytes);
            connection.read_exact(&mut vec![0; size as usize])?;
            if request == GET_FEATURES {
                let header = [GET_FEATURES, REPLY, 8].map(u32::to_le_bytes);
                connection.write_all(header.as_flattened())?;
                connection.write_all(&VIRTIO_F_VERSION_1.to_le_bytes())?;
            }
        }
    }
}
