//! QEMU's own migration stream: recorded and parsed in pieces, and parsed while it arrives, as a log of the pages that
//! the guest writes. The guest checks every word at the destination.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;

use serde_json::{Value, json};
use umem::host::pieces::{Destination, Parsed, Source, parse};

use crate::destination;
use crate::moving::Moved;
use crate::support::{Machine, Qemu, QemuVersion, Qmp, Ram, Random, Scratch, Serial, Side, seed};
use crate::{boot, migrate, says};

const PAGE: usize = 4096;
const RAM_BYTES: u64 = 256 << 20;

/// The tests' Linux guest with one backend, `ram0`.
fn machine(version: QemuVersion) -> Machine {
    Machine { guest: "umem.mib=64".into(), ..Machine::linux(version) }
}

/// The same machine waiting for a guest, with this memory.
fn waits(machine: &Machine, scratch: &Scratch, ram: &[u8]) -> Qemu {
    let mut words = machine.command_line(scratch, Side::Destination);
    words.extend(["-incoming", "defer"].map(str::to_owned));
    let test = machine.socket(scratch, Side::Destination, "test");
    let umem = machine.socket(scratch, Side::Destination, "umem");
    let serial = machine.serial(scratch, Side::Destination);
    let qemu = Qemu::start(&words, &test, umem, serial);
    let file =
        File::options().write(true).open(machine.ram_file(scratch, Side::Destination, "ram0"));
    let file = file.expect("QEMU has made the file");
    for (offset, page) in (0..).step_by(PAGE).zip(ram.chunks(PAGE)) {
        if page.iter().any(|&byte| byte != 0) {
            file.write_all_at(page, offset).expect("the file is large enough");
        }
    }
    qemu
}

/// Waits until the guest has checked all of its memory at the destination.
fn is_whole(before: &mut Serial, now: &mut Serial) {
    let last = before.last_beat();
    let first = now.beat("a number after the source's last", |beat| beat.number > last.number);
    now.beat("two more sweeps", |beat| beat.passes >= first.passes + 2);
    assert_eq!(before.last_beat().number, last.number, "both guests run");
}

/// Records the stream of a migration by QEMU alone. The guest writes until the first pass is over.
fn record(source: &mut Qemu, scratch: &Scratch) -> Vec<u8> {
    let path = scratch.path("stream");
    let listener = UnixListener::bind(&path).expect("a socket");
    let fast = json!({ "max-bandwidth": 1_u64 << 40, "downtime-limit": 1 });
    source.qmp.execute("migrate-set-parameters", fast);
    let uri = format!("unix:{}", path.display());
    source.qmp.execute("migrate", json!({ "uri": uri }));
    let (mut socket, _) = listener.accept().expect("QEMU connects");
    let mut stream = Vec::new();
    // More bytes than the guest wrote, so the stream has the writes of the first pass too.
    let first = (&mut socket).take(3 * RAM_BYTES / 2).read_to_end(&mut stream);
    first.expect("QEMU writes");
    source.qmp.execute("stop", json!({}));
    socket.read_to_end(&mut stream).expect("QEMU writes");
    stream
}

fn in_one(stream: &[u8]) -> Parsed {
    parse([stream], |name| name.ends_with("ram0")).expect("the stream parses")
}

fn in_pieces(stream: &[u8], random: &mut Random) -> Parsed {
    let mut left = stream;
    let pieces = std::iter::from_fn(|| {
        let count = usize::try_from(random.magnitude(20)).expect("a count").min(left.len());
        let (now, later) = left.split_at(count);
        left = later;
        (!now.is_empty()).then_some(now)
    });
    parse(pieces, |name| name.ends_with("ram0")).expect("the stream parses")
}

/// Checks that the last record of each page in the stream matches the file.
fn is_the_memory(parsed: &Parsed, ram: &[u8]) {
    let block = parsed
        .blocks
        .iter()
        .position(|(name, _)| name.ends_with("ram0"))
        .expect("the stream has the block");
    assert_eq!(parsed.blocks[block].1, RAM_BYTES);
    let mut last = vec![None; ram.len() / PAGE];
    for (of, offset, is_zero, _) in &parsed.pages {
        if *of == block {
            last[usize::try_from(*offset).expect("an offset") / PAGE] = Some(*is_zero);
        }
    }
    for (page, is_zero) in ram.chunks(PAGE).zip(last) {
        let is_zero = is_zero.expect("the first pass has every page");
        assert!(!is_zero || page.iter().all(|&byte| byte == 0));
    }
}

#[test]
fn recorded_stream_parses_alike_in_any_pieces_and_its_rest_loads() {
    let mut random = Random::new(seed(1));
    for version in [QemuVersion::V7_2, QemuVersion::V10_0] {
        let scratch = Scratch::new();
        let machine = machine(version);
        let mut source = boot(&machine, &scratch);
        let stream = record(&mut source, &scratch);
        let whole = in_one(&stream);
        assert!(whole.is_device_state && whole.parts > 1, "{} parts", whole.parts);
        assert_eq!(whole.capabilities, Vec::<String>::new());
        for _ in 0..3 {
            let apart = in_pieces(&stream, &mut random);
            // assert_eq would print both.
            assert!(apart == whole, "{version:?}: other pieces parse differently");
        }
        assert!(whole.cut.len() < 2 << 20 && stream.len() > 60 << 20);
        let again = in_one(&whole.cut);
        assert!(again.cut == whole.cut, "{version:?}: a second cut changes the rest");
        // The log of this version loses writes under TCG.
        if version == QemuVersion::V7_2 {
            continue;
        }
        let ram = fs::read(machine.ram_file(&scratch, Side::Source, "ram0")).expect("RAM");
        is_the_memory(&whole, &ram);
        let mut destination = waits(&machine, &scratch, &ram);
        let cut = scratch.path("cut");
        fs::write(&cut, &whole.cut).expect("a file");
        let uri = format!("exec:cat {}", cut.display());
        destination.qmp.execute("migrate-incoming", json!({ "uri": uri }));
        loaded(&mut destination.qmp);
        destination.qmp.execute("cont", json!({}));
        is_whole(&mut source.serial, &mut destination.serial);
    }
}

/// Waits until QEMU has its device state.
fn loaded(qmp: &mut Qmp) {
    crate::support::wait_for("the device state", || {
        let migration = qmp.execute("query-migrate", json!({}));
        assert_ne!(migration["status"], "failed", "{migration}");
        (migration["status"] == "completed").then_some(())
    });
}

/// Settings that may change for the time of a move.
fn settings(qmp: &mut Qmp) -> [Value; 2] {
    ["query-migrate-capabilities", "query-migrate-parameters"]
        .map(|ask| qmp.execute(ask, json!({})))
}

/// A copy of the guest's RAM: each page as it was in the file when its mark was taken.
struct Copied {
    file: File,
    ram: Vec<u8>,
}

impl Copied {
    fn of(machine: &Machine, scratch: &Scratch) -> Copied {
        let file = File::open(machine.ram_file(scratch, Side::Source, "ram0")).expect("RAM");
        Copied { file, ram: vec![0; usize::try_from(RAM_BYTES).expect("RAM_BYTES fits a usize")] }
    }

    /// Copies the marked pages. Returns their number.
    fn take(&mut self, source: &Source) -> usize {
        let marked = source.marked(0);
        for &page in &marked {
            let at = usize::try_from(page).expect("a page") * PAGE;
            self.file.read_exact_at(&mut self.ram[at..at + PAGE], at as u64).expect("RAM");
        }
        marked.len()
    }

    /// Pages that differ from the file.
    fn wrong(&self) -> Vec<usize> {
        let mut page = [0; PAGE];
        let mut is_wrong = |index: &usize| {
            self.file.read_exact_at(&mut page, (index * PAGE) as u64).expect("RAM");
            page != self.ram[index * PAGE..][..PAGE]
        };
        (0..self.ram.len() / PAGE).filter(|index| is_wrong(index)).collect()
    }
}

fn connect(source: &Qemu) -> Source {
    Source::connect(&source.socket, &[("ram0", RAM_BYTES)]).expect("the guest is free")
}

#[test]
fn constantly_writing_guest_arrives_whole_through_its_stream() {
    let scratch = Scratch::new();
    let machine = machine(QemuVersion::V10_0);
    let mut source = boot(&machine, &scratch);
    let before = settings(&mut source.qmp);
    let mut ours = connect(&source);
    let mut copied = Copied::of(&machine, &scratch);
    ours.start().expect("QEMU migrates");
    let mut counts = Vec::new();
    for _ in 0..4 {
        ours.look().expect("a look");
        counts.push(copied.take(&ours));
        assert_eq!(source.qmp.status(), "running");
    }
    ours.stop().expect("the guest stops");
    assert_eq!(source.qmp.status(), "finish-migrate");
    counts.push(copied.take(&ours));
    assert_eq!(counts[0], copied.ram.len() / PAGE, "the first look has every page");
    assert!(
        counts[1..].iter().all(|&count| count > 0),
        "the guest writes in every look: {counts:?}"
    );
    assert_eq!(copied.wrong(), Vec::<usize>::new());
    let state = ours.state().expect("the state was saved");
    assert!(state.len() < 2 << 20, "{} bytes", state.len());
    let mut destination = waits(&machine, &scratch, &copied.ram);
    let of_destination = settings(&mut destination.qmp);
    let mut arrived = Destination::load(&destination.socket, state).expect("the state loads");
    ours.give_away().expect("the guest stands still");
    arrived.run().expect("the guest runs");
    is_whole(&mut source.serial, &mut destination.serial);
    assert_eq!(source.qmp.status(), "postmigrate");
    assert_eq!(settings(&mut source.qmp), before);
    assert_eq!(settings(&mut destination.qmp), of_destination);
}

#[test]
fn idle_guest_runs_until_umem_stops_it() {
    let scratch = Scratch::new();
    let machine =
        Machine { guest: "umem.mib=64 umem.mode=idle".into(), ..machine(QemuVersion::V10_0) };
    let mut source = machine.start(&scratch);
    source.serial.beat("anything", |_| true);
    let mut ours = connect(&source);
    ours.start().expect("QEMU migrates");
    let mut copied = Copied::of(&machine, &scratch);
    for _ in 0..10 {
        ours.look().expect("a look");
        copied.take(&ours);
        source.serial.goes_on();
    }
    let stopped = ours.stop().expect("the guest stops");
    assert!(stopped.is_some());
    // QEMU stopped the guest itself, so it also continues the guest itself.
    copied.take(&ours);
    assert_eq!(copied.wrong(), Vec::<usize>::new());
    ours.resume().expect("the guest continues");
    assert_eq!(source.qmp.status(), "running");
    source.serial.goes_on();
}

#[test]
fn guest_continues_after_its_umem_ends_in_a_pass_and_moves_later() {
    let scratch = Scratch::new();
    let machine = machine(QemuVersion::V10_0);
    let mut source = boot(&machine, &scratch);
    let before = settings(&mut source.qmp);
    for is_undone in [true, false] {
        let mut ours = connect(&source);
        ours.start().expect("QEMU migrates");
        ours.look().expect("a look");
        if is_undone {
            ours.resume().expect("the guest continues");
            assert_eq!(settings(&mut source.qmp), before);
        }
        drop(ours);
        source.serial.goes_on();
        assert_eq!(source.qmp.status(), "running");
    }
    // Undoes the settings that the previous umem left.
    let mut ours = connect(&source);
    assert_eq!(settings(&mut source.qmp), before);
    let mut copied = Copied::of(&machine, &scratch);
    ours.start().expect("QEMU migrates");
    ours.look().expect("a look");
    copied.take(&ours);
    ours.stop().expect("the guest stops");
    copied.take(&ours);
    assert_eq!(copied.wrong(), Vec::<usize>::new());
    ours.resume().expect("the guest continues");
    assert_eq!(source.qmp.status(), "running");
    source.serial.goes_on();
    assert_eq!(settings(&mut source.qmp), before);
}

#[test]
fn unusable_stream_is_refused_before_any_change() {
    let scratch = Scratch::new();
    let mut old = machine(QemuVersion::V7_2);
    old.name = "old";
    let mut source = boot(&old, &scratch);
    let before = settings(&mut source.qmp);
    let error =
        connect(&source).start().expect_err("a log that loses writes is refused").to_string();
    says(&error, "QEMU 7.2 without KVM loses writes");
    assert_eq!(settings(&mut source.qmp), before);
    drop(source);

    let mut source = boot(&machine(QemuVersion::V10_0), &scratch);
    let set = |state: bool| json!({ "capabilities": [{ "capability": "dirty-bitmaps", "state": state }] });
    source.qmp.execute("migrate-set-capabilities", set(true));
    let before = settings(&mut source.qmp);
    let error = connect(&source).start().expect_err("a stream with disks is refused").to_string();
    says(&error, "capability dirty-bitmaps is on");
    assert_eq!(settings(&mut source.qmp), before);
    source.qmp.execute("migrate-set-capabilities", set(false));
    let mut ours = connect(&source);
    let listener = UnixListener::bind(scratch.path("other")).expect("a socket");
    let uri = format!("unix:{}", scratch.path("other").display());
    source.qmp.execute("migrate", json!({ "uri": uri }));
    let error = ours.start().expect_err("another client migrates the guest").to_string();
    says(&error, "a migration of this guest is in progress");
    source.qmp.execute("migrate_cancel", json!({}));
    drop(listener);
    source.serial.goes_on();
}

/// Moves a guest with passes while it runs, by umem's own two sides. Returns the event of the first pass.
pub(crate) fn moves(machine: &Machine, options: &[&str]) -> Value {
    let scratch = Scratch::new();
    let mut source = boot(machine, &scratch);
    let before = settings(&mut source.qmp);
    let destination = destination::Destination::start(machine, &scratch);
    let mut moving = Moved::start(source, destination, &[&["--checksum"], options].concat());
    let pass = moving.umem.event("pass");
    assert_eq!(pass["pass"], 1);
    let reports = [moving.umem.event("completed"), moving.destination.umem.event("completed")];
    for report in &reports {
        for digest in report["digests"].as_array().expect("digests were compared") {
            assert_eq!(digest["digest"], digest["peer"], "{report}");
        }
    }
    moving.is_whole_at_the_destination();
    assert_eq!(moving.source.qmp.status(), "postmigrate");
    moving.umem.succeeds();
    assert_eq!(settings(&mut moving.source.qmp), before);
    pass
}

#[test]
fn guest_moves_in_passes_and_then_by_postcopy() {
    moves(&machine(QemuVersion::V10_0), &["--precopy", "-p", "--downtime-limit", "0"]);
}

#[test]
fn guest_moves_in_passes_before_the_switchover() {
    moves(&machine(QemuVersion::V10_0), &["--lanes", "2"]);
}

/// The bandwidth limit makes the first pass longer than the timeout of the passes.
#[test]
fn passes_end_at_their_timeout() {
    for mode in [&["--precopy", "-p"][..], &[]] {
        let slowly = ["--max-bandwidth", "8M", "--timeout", "2"];
        let pass = moves(&machine(QemuVersion::V10_0), &[mode, &slowly].concat());
        assert_eq!(pass["cut"], true, "{pass}");
    }
}

/// Two NUMA nodes, of which the guest's memory needs more than one.
fn nodes() -> Machine {
    let node = |id| Ram { id, mib: 128 };
    Machine { ram: vec![node("node0"), node("node1")], ..Machine::linux(QemuVersion::V10_0) }
}

/// Without KVM QEMU 10.0 loses writes to all RAM blocks but its first one: the guest writes to both, in every pass.
#[test]
fn ram_whose_log_loses_writes_is_sent_after_the_switchover_in_rounds() {
    let dimm = [Ram { id: "ram0", mib: 192 }, Ram { id: "ram1", mib: 128 }];
    let guest = "umem.mib=176 memhp_default_state=online".into();
    let dimm = Machine { ram: dimm.into(), guest, ..Machine::linux(QemuVersion::V10_0) };
    for machine in [nodes(), dimm] {
        for lanes in ["1", "3"] {
            let options = ["--precopy", "-p", "--downtime-limit", "0", "--lanes", lanes];
            let pass = moves(&machine, &options);
            // All of the second block remains, and no pass sends any of it.
            assert!(pass["remaining_bytes"].as_u64() >= Some(128 << 20), "{pass}");
            assert!(pass["sent_bytes"].as_u64() <= Some(192 << 20), "{pass}");
        }
    }
}

/// Without KVM: an old QEMU's log, and that of each QEMU for any but its first RAM block, which would have to be sent
/// while the guest stands still.
#[test]
fn passes_are_refused_when_the_log_loses_writes() {
    let scratch = Scratch::new();
    let two = Machine { name: "two", ..nodes() };
    let hybrid = &["--precopy", "-p"][..];
    let block = "except to its first RAM block, and node1 is another block";
    for (machine, modes, why) in [
        (machine(QemuVersion::V7_2), &[hybrid, &["--precopy"], &[]][..], "QEMU 7.2 without KVM"),
        (two, &[&["--precopy"], &[]], block),
    ] {
        let mut source = boot(&machine, &scratch);
        for mode in modes {
            let error = migrate(&source, crate::NOBODY, mode).fails();
            says(&error, why);
            says(&error, "-p without --precopy (postcopy), or --stop-first");
            assert_eq!(source.qmp.status(), "running");
        }
    }
}

/// Writes that QEMU's log loses are missing in its stream as well, and no file has them.
#[test]
fn ram_without_a_file_is_refused_when_the_log_loses_writes() {
    let scratch = Scratch::new();
    let mut machine = Machine { ram: Vec::new(), ..machine(QemuVersion::V10_0) };
    let node = |id| format!("-object memory-backend-ram,id={id},size=128M -numa node,memdev={id}");
    let words = format!("-m 256M {} {}", node("node0"), node("node1"));
    machine.extra = words.split(' ').map(str::to_owned).collect();
    let mut source = boot(&machine, &scratch);
    for mode in [&["--precopy", "-p"][..], &[]] {
        let error = migrate(&source, crate::NOBODY, mode).fails();
        says(&error, "node1 is another block, whose contents come from that log's stream");
        assert_eq!(source.qmp.status(), "running");
    }
}

/// umem is killed while the destination waits and pages are in transit.
#[test]
fn guest_continues_after_its_umem_is_killed_in_a_pass() {
    let scratch = Scratch::new();
    let machine = machine(QemuVersion::V10_0);
    let mut source = boot(&machine, &scratch);
    let before = settings(&mut source.qmp);
    let destination = destination::Destination::start(&machine, &scratch);
    // The guest writes more than the pass can send in that time, so another pass follows.
    let slow = ["--precopy", "-p", "--downtime-limit", "0", "--precopy-passes", "100"];
    let mut umem = migrate(&source, &destination.uri, &slow);
    umem.event("pass");
    umem.kill();
    source.serial.goes_on();
    let mut ours = connect(&source);
    assert_eq!(source.qmp.status(), "running");
    assert_eq!(settings(&mut source.qmp), before);
    ours.resume().expect("no setting is left to undo");
}
