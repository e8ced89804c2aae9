//! Guests that arrive in QEMU's own memory: QEMU's command line gives only the size of their RAM.

use std::fs::{self, File};

use crate::destination::Destination;
use crate::moving::{Moved, Moving};
use crate::support::{
    Cutter, Ends, Machine, Qemu, QemuVersion, Qmp, Ram, Scratch, Side, SourceRam, Umem,
};
use crate::{boot, booted, incoming, migrate, says};

/// The options of a machine with its main memory in the backend of this name.
fn named(words: Vec<String>, name: &str) -> Vec<String> {
    let backend = format!("id={name},");
    let main = format!("memory-backend={name}");
    let rename = |word: String| word.replace("id=ram0,", &backend);
    words.into_iter().map(|word| rename(word).replace("memory-backend=ram0", &main)).collect()
}

/// A source whose main memory has the name of QEMU's own, and is in a file.
fn source(machine: &Machine, scratch: &Scratch) -> Qemu {
    let words = named(machine.command_line(scratch, Side::Source), "pc.ram");
    let [test, umem] =
        ["test", "umem"].map(|monitor| machine.socket(scratch, Side::Source, monitor));
    let mut source = Qemu::start(&words, &test, umem, machine.serial(scratch, Side::Source));
    booted(&mut source.serial);
    source
}

/// The words of a destination with its main memory in QEMU's own RAM, and with DIMMs and nodes without files.
fn own(machine: &Machine, scratch: &Scratch) -> Vec<String> {
    let words = machine.command_line(scratch, Side::Destination);
    let is_main = |word: &String| word.starts_with("memory-backend-file,id=ram0,");
    let mut own: Vec<String> = Vec::new();
    for word in words {
        if is_main(&word) {
            assert_eq!(own.pop().as_deref(), Some("-object"));
            continue;
        }
        own.push(match word.strip_prefix("memory-backend-file,") {
            Some(backend) => {
                let (backend, _) = backend.split_once(",share=on").expect("it is shared");
                format!("memory-backend-ram,{backend}")
            }
            None => word.replace(",memory-backend=ram0", ""),
        });
    }
    own
}

/// The words with these properties for the backend of the main memory.
fn with_backend(words: &[String], backend: &str) -> Vec<String> {
    let words = words.iter().map(|word| match word.starts_with("q35") {
        true => format!("{word},memory-backend=pc.ram"),
        false => word.clone(),
    });
    words.chain(["-object".to_owned(), format!("{backend},id=pc.ram,size=256M")]).collect()
}

fn destination(
    machine: &Machine,
    scratch: &Scratch,
    words: &[String],
    options: &[&str],
) -> Destination {
    let mut destination = Destination::by(words, machine, scratch, options, "tcp:127.0.0.1:0");
    // The file's length is the guest's memory.
    let file = |ram: &Ram| machine.ram_file(scratch, Side::Source, ram.id);
    destination.ram_files = machine.ram.iter().map(file).collect();
    destination
}

fn arrives(machine: &Machine, options: &[&str]) {
    let scratch = Scratch::new();
    let source = source(machine, &scratch);
    let destination = destination(machine, &scratch, &own(machine, &scratch), &[]);
    let moved = Moved::start(source, destination, options).complete();
    assert_eq!(moved.report["kind"], "anonymous");
    assert_eq!(scratch.ram_files().len(), machine.ram.len(), "the destination has made a file");
    is_kept_from_children(moved.destination.guest_pid, &machine.ram);
    moved.end();
}

/// As QEMU requests: its RAM is in no child that it forks.
fn is_kept_from_children(pid: u32, ram: &[Ram]) {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the guest runs");
    let (mut kib, mut found) = (0, 0);
    for line in maps.lines() {
        if let Some(size) = line.strip_prefix("Size:") {
            let size = size.trim().strip_suffix(" kB").expect("a unit");
            kib = size.parse::<u64>().expect("a size");
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && ram.iter().any(|ram| ram.mib << 10 == kib)
        {
            assert!(flags.split_whitespace().any(|flag| flag == "dc"), "{flags}");
            found += 1;
        }
    }
    assert!(found >= ram.len(), "{found} of its RAM blocks are mapped in one piece");
}

#[test]
fn guest_moves_into_the_default_ram_of_qemu_10_0() {
    arrives(&Machine::linux(QemuVersion::V10_0), &["-p"]);
}

#[test]
fn guest_moves_into_the_default_ram_of_qemu_7_2() {
    arrives(&Machine::linux(QemuVersion::V7_2), &["-p", "--checksum"]);
}

#[test]
fn guest_moves_into_default_ram_with_the_source_stopped_first() {
    arrives(&Machine::linux(QemuVersion::V10_0), &["--stop-first", "--checksum"]);
}

#[test]
fn memory_of_dimms_and_nodes_moves_into_backends_without_files() {
    let [main, dimm] = [Ram { id: "ram0", mib: 256 }, Ram { id: "ram1", mib: 256 }];
    let guest = "umem.mib=288 memhp_default_state=online".into();
    arrives(
        &Machine { ram: vec![main, dimm], guest, ..Machine::linux(QemuVersion::V7_2) },
        &["-p"],
    );
    let nodes = vec![Ram { id: "ram-node0", mib: 128 }, Ram { id: "ram-node1", mib: 128 }];
    arrives(&Machine { ram: nodes, ..Machine::linux(QemuVersion::V10_0) }, &["-p"]);
}

/// The default memory beside a DIMM that is in a file.
#[test]
fn guest_moves_between_different_kinds_of_memory() {
    let scratch = Scratch::new();
    let [main, dimm] = [Ram { id: "ram0", mib: 256 }, Ram { id: "ram1", mib: 256 }];
    let machine = Machine {
        ram: vec![main, dimm],
        guest: "umem.mib=288 memhp_default_state=online".into(),
        ..Machine::linux(QemuVersion::V10_0)
    };
    let source = source(&machine, &scratch);
    let file = machine.ram_file(&scratch, Side::Destination, "ram1");
    let words = own(&machine, &scratch).into_iter().map(|word| {
        match word.starts_with("memory-backend-ram,id=ram1") {
            true => format!(
                "memory-backend-file,id=ram1,size=256M,share=on,mem-path={}",
                file.display()
            ),
            false => word,
        }
    });
    let words: Vec<String> = words.collect();
    let destination = destination(&machine, &scratch, &words, &[]);
    let moved = Moved::start(source, destination, &["-p"]).complete();
    assert_eq!(moved.report["kind"], "anonymous,shared");
    moved.end();
}

/// Memory that QEMU has allocated before it reports its addresses would never be missing.
#[test]
fn preallocated_memory_is_emptied_before_the_guest_arrives() {
    for version in [QemuVersion::V7_2, QemuVersion::V10_0] {
        let scratch = Scratch::new();
        let machine = Machine::linux(version);
        let source = source(&machine, &scratch);
        let words = with_backend(&own(&machine, &scratch), "memory-backend-ram,prealloc=on");
        let destination = destination(&machine, &scratch, &words, &[]);
        Moved::start(source, destination, &["-p"]).complete().end();
    }
}

#[test]
fn locked_memory_is_refused() {
    let scratch = Scratch::new();
    let machine = Machine::linux(QemuVersion::V10_0);
    let mut words = own(&machine, &scratch);
    words.extend(["-overcommit", "mem-lock=on"].map(str::to_owned));
    let text = Umem::start(incoming(&words, &[], "tcp:127.0.0.1:0")).fails();
    says(&text, "RAM pc.ram");
    says(&text, "mem-lock=on");
    scratch.wait_until_gone("destination");
}

#[test]
fn shared_memory_without_a_visible_file_is_refused() {
    for version in [QemuVersion::V7_2, QemuVersion::V10_0] {
        let scratch = Scratch::new();
        let machine = Machine::bare(version);
        let words = with_backend(&own(&machine, &scratch), "memory-backend-ram,share=on");
        let text = Umem::start(incoming(&words, &[], "tcp:127.0.0.1:0")).fails();
        says(&text, "RAM backend pc.ram is a memory-backend-ram with share=on");
        scratch.wait_until_gone("destination");
    }
}

#[test]
fn ballooned_pages_of_default_ram_read_as_zeroes() {
    for version in [QemuVersion::V7_2, QemuVersion::V10_0] {
        let scratch = Scratch::new();
        let machine = Machine {
            guest: "umem.mib=64 umem.balloon=64".into(),
            extra: ["-device", "virtio-balloon-pci,free-page-reporting=on"]
                .map(str::to_owned)
                .into(),
            ..Machine::linux(version)
        };
        let mut source = source(&machine, &scratch);
        source.serial.beat("pages given to the host", |beat| beat.given > 100);
        let destination = destination(&machine, &scratch, &own(&machine, &scratch), &[]);
        // Slowly, so that most pages are given back before they arrive.
        let umem = migrate(&source, &destination.uri, &["-p", "--max-postcopy-bandwidth", "32M"]);
        let mut moving = Moving { source, umem, destination };
        moving.umem.event("running");
        let before = moving.source.serial.last_beat().given;
        moving.destination.serial.beat("more pages given", |beat| beat.given > before + 300);
        assert!(moving.destination.umem.is_running());
        let mut moved: Moved = moving.complete();
        let then = moved.destination.serial.last_beat().given;
        moved.destination.serial.beat("and still more", |beat| beat.given > then + 100);
        moved.end();
    }
}

#[test]
fn guest_in_default_ram_survives_lost_connections() {
    let scratch = Scratch::new();
    let machine = Machine::linux(QemuVersion::V10_0);
    let source = source(&machine, &scratch);
    let destination = destination(&machine, &scratch, &own(&machine, &scratch), &[]);
    let cutter = Cutter::to(&destination.uri);
    let umem = migrate(&source, cutter.uri(), &["-p", "--lanes", "2"]);
    let mut moving = Moving { source, umem, destination };
    moving.umem.event("running");
    moving.destination.umem.event("running");
    // In the middle of a page.
    cutter.cut_after([(10 << 20, Ends::Both), (5 << 20, Ends::Both)]);
    cutter.let_pages_go();
    cutter.wait_for_cuts(2);
    let moved = moving.complete();
    assert!(moved.report["recoveries"].as_u64() >= Some(2), "{}", moved.report);
    moved.end();
}

#[test]
fn guest_in_default_ram_survives_the_death_of_its_umems() {
    survives_the_death_of_its_umems(own);
}

/// Both umems are killed; others take over. The preload object hands QEMU's own memory over again.
fn survives_the_death_of_its_umems(words: impl Fn(&Machine, &Scratch) -> Vec<String>) {
    let scratch = Scratch::new();
    let machine = Machine::linux(QemuVersion::V10_0);
    let source = source(&machine, &scratch);
    let sessions = scratch.path("sessions").display().to_string();
    let options = ["--session-dir", &sessions];
    let destination = destination(&machine, &scratch, &words(&machine, &scratch), &options);
    let cutter = Cutter::to(&destination.uri);
    let umem = migrate(&source, cutter.uri(), &["-p", "--session-dir", &sessions]);
    let mut moving = Moving { source, umem, destination };
    let session = moving.umem.event("resumable")["session"].as_str().expect("text").to_owned();
    let resume = |command| {
        Umem::start([command, "--json", "--session-dir", &sessions, "--resume", &session])
    };
    moving.destination.umem.kill();
    // The relay's lanes begin again.
    cutter.cut(Ends::Both, false);
    moving.destination.umem = resume("incoming");
    moving.umem.event("running");
    moving.destination.umem.event("resumed");
    cutter.let_pages_go();
    for (kills_source, kills_destination) in [(false, true), (true, true)] {
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
    // The umem that has taken over is not the QEMU's parent, and has ended.
    assert!(moved.destination.umem.wait().success());
    Qmp::connect(&moved.destination.qmp).quit();
    moved.source.qmp.quit();
    assert_eq!(fs::read_dir(&sessions).expect("it is there").count(), 0);
}

/// QEMU's log is complete for TCG from 9.0 on.
#[test]
fn guest_moves_into_default_ram_while_it_runs_at_its_source() {
    let machine = Machine { guest: "umem.mib=64".into(), ..Machine::linux(QemuVersion::V10_0) };
    arrives(&machine, &["--precopy", "--checksum"]);
}

/// The rest is sent after the switchover: pages that were sent before and written since are missing until then.
#[test]
fn pages_remaining_after_rounds_are_missing_in_default_ram() {
    let guest = "umem.mib=64 umem.write=90".into();
    let machine = Machine { guest, ..Machine::linux(QemuVersion::V10_0) };
    for options in [["--lanes", "1"], ["--lanes", "2"]] {
        for passes in ["1", "8"] {
            let scratch = Scratch::new();
            let source = source(&machine, &scratch);
            let destination = destination(&machine, &scratch, &own(&machine, &scratch), &[]);
            let rounds = ["--precopy", "-p", "--checksum", "--precopy-passes", passes];
            let mut moving = Moved::start(source, destination, &[&rounds[..], &options].concat());
            let pass = moving.umem.event("pass");
            assert!(pass["remaining_bytes"].as_u64() > Some(0), "{pass}");
            moving.complete().end();
        }
    }
}

/// Neither command line specifies more about RAM than its size.
#[test]
fn guest_moves_from_default_ram_into_default_ram() {
    let machine = |source_ram| Machine {
        source_ram,
        guest: "umem.mib=64".into(),
        ..Machine::linux(QemuVersion::V10_0)
    };
    for options in [&["--checksum"][..], &["--precopy", "-p", "--downtime-limit", "0"]] {
        let scratch = Scratch::new();
        let source = boot(&machine(SourceRam::Default), &scratch);
        let words = own(&machine(SourceRam::File), &scratch);
        let mut destination =
            Destination::by(&words, &machine(SourceRam::File), &scratch, &[], "tcp:127.0.0.1:0");
        // The file's length is the guest's memory.
        let length = scratch.path("length");
        fs::File::create(&length).and_then(|file| file.set_len(256 << 20)).expect("a file");
        destination.ram_files = vec![length];
        let moved = Moved::start(source, destination, options).complete();
        assert_eq!(moved.report["kind"], "anonymous");
        moved.end();
    }
}

#[test]
fn guest_moves_into_a_memory_file() {
    for version in [QemuVersion::V7_2, QemuVersion::V10_0] {
        let scratch = Scratch::new();
        let machine = Machine::linux(version);
        let source = source(&machine, &scratch);
        let words = with_backend(&own(&machine, &scratch), "memory-backend-memfd,share=on");
        let destination = destination(&machine, &scratch, &words, &[]);
        let moved = Moved::start(source, destination, &["-p"]).complete();
        assert_eq!(moved.report["kind"], "shared");
        moved.end();
    }
}

#[test]
fn guest_in_a_memory_file_survives_the_death_of_its_umems() {
    let words = |machine: &Machine, scratch: &Scratch| {
        with_backend(&own(machine, scratch), "memory-backend-memfd,share=on")
    };
    survives_the_death_of_its_umems(words);
}

/// Neither side has a file: the contents come with QEMU's stream, and go into QEMU's own memory.
fn moves_without_files(
    source_ram: SourceRam,
    words: impl Fn(&Machine, &Scratch) -> Vec<String>,
    options: &[&str],
    kind: &str,
) {
    let scratch = Scratch::new();
    let guest = "umem.mib=96".into();
    let receiver = Machine { guest, ..Machine::linux(QemuVersion::V10_0) };
    let source = boot(&Machine { source_ram, ..receiver.clone() }, &scratch);
    let mut destination = destination(&receiver, &scratch, &words(&receiver, &scratch), &[]);
    let as_long = scratch.ram("as-long-as-the-memory");
    File::create(&as_long).and_then(|file| file.set_len(256 << 20)).expect("a sparse file");
    destination.ram_files = vec![as_long];
    let moved = Moved::start(source, destination, options).complete();
    assert_eq!(moved.report["kind"], kind);
    moved.end();
}

#[test]
fn default_ram_moves_into_default_ram() {
    moves_without_files(SourceRam::Default, own, &["--precopy"], "anonymous");
    let hybrid = ["--precopy", "-p", "--precopy-passes", "1", "--checksum"];
    moves_without_files(SourceRam::Default, own, &hybrid, "anonymous");
}

#[test]
fn memory_file_moves_into_a_memory_file() {
    let memfd = |machine: &Machine, scratch: &Scratch| {
        let words = with_backend(&own(machine, scratch), "memory-backend-memfd,share=on");
        words.iter().map(|word| word.replace("pc.ram", "ram0")).collect()
    };
    moves_without_files(SourceRam::Memfd, memfd, &["--precopy", "-p"], "shared");
}

/// The device discards its unplugged memory when its state is loaded; the guest's pages may have landed there by then.
#[test]
fn guest_with_virtio_mem_moves_into_memory_without_files() {
    for (version, options) in [
        (QemuVersion::V7_2, &["-p"][..]),
        (QemuVersion::V10_0, &["-p"]),
        (QemuVersion::V10_0, &["--stop-first", "--checksum"]),
    ] {
        let scratch = Scratch::new();
        let machine = |side| {
            let path = scratch.ram("vmem");
            let backend = match side {
                Side::Source => format!("memory-backend-file,share=on,mem-path={}", path.display()),
                Side::Destination => "memory-backend-ram".into(),
            };
            let backend = format!("{backend},id=mem1,size=128M");
            let device = "virtio-mem-pci,id=vmem,memdev=mem1,requested-size=64M";
            let words = ["-m", "256M,maxmem=1G", "-object", &backend, "-device", device];
            let extra = words.map(str::to_owned).into();
            // The pluggable range takes some of its memory.
            Machine { guest: "umem.mib=64".into(), extra, ..Machine::linux(version) }
        };
        let source = source(&machine(Side::Source), &scratch);
        let receiver = machine(Side::Destination);
        let destination = destination(&receiver, &scratch, &own(&receiver, &scratch), &[]);
        let mut moving = Moved::start(source, destination, options);
        for umem in [&mut moving.umem, &mut moving.destination.umem] {
            assert_eq!(umem.event("completed")["total_bytes"], 384 << 20);
        }
        moving.is_whole_at_the_destination();
        moving.umem.succeeds();
    }
}
