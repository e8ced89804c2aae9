//! umem asks a destination's QEMU for its guest's memory, however that QEMU was started; umem adds its preload object
//! anywhere in a chain of wrappers, or reports its absence before a source connects.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::process::Command;

use serde_json::json;
use umem_wire::HELLO_BYTES;

use crate::destination::Destination;
use crate::found::{VERSIONS, arrives_at, mapped, on_a_disk, small};
use crate::support::{Machine, Qemu, QemuVersion, Qmp, Scratch, Side, Tap, Umem, wait_for};
use crate::{incoming, migrate, says};

const ANYWHERE: &str = "tcp:127.0.0.1:0";

fn words(line: &str) -> Vec<String> {
    line.split_ascii_whitespace().map(str::to_owned).collect()
}

/// A running source, and its memory.
fn source(machine: &Machine, scratch: &Scratch) -> (Qemu, File) {
    let source = machine.start(scratch);
    let name = machine.ram_file(scratch, Side::Source, "ram0");
    let memory = mapped(source.pid(), &name.display().to_string());
    (source, memory)
}

#[test]
fn qemu_behind_a_wrapper_gets_the_preload_object() {
    let scratch = Scratch::new();
    let machine = small(QemuVersion::V10_0);
    let script = scratch.path("script");
    // The wrapper runs other commands before, and stays afterwards.
    let qemu = machine.command_line(&scratch, Side::Destination).join(" ");
    let program = machine.version.program().display().to_string();
    let text = format!("#!/bin/sh\n{program} -version >/dev/null\n{qemu}\nexit $?\n");
    fs::write(&script, text).expect("a file");
    fs::set_permissions(&script, Permissions::from_mode(0o755)).expect("the file exists");
    let script = script.display().to_string();
    let given = machine.command_line(&scratch, Side::Destination);
    let namespace = Namespace::new();
    for wrapped in [
        [words("taskset 3"), given.clone()].concat(),
        [words("nice -n 1 env A=B"), given.clone()].concat(),
        [words("unshare -n --"), given.clone()].concat(),
        [words("setpriv --no-new-privs"), given.clone()].concat(),
        vec!["sh".into(), "-c".into(), format!("exec {qemu}")],
        [words("ip netns exec"), vec![namespace.name.clone()], given.clone()].concat(),
        vec![script],
    ] {
        let (source, memory) = source(&machine, &scratch);
        let destination = Destination::by(&wrapped, &machine, &scratch, &[], ANYWHERE);
        arrives_at(destination, source, &[memory]);
        for path in scratch.ram_files() {
            fs::remove_file(path).expect("the file exists");
        }
    }
}

/// QEMU reports the owner of the memory: its parent is another process, which may have other work.
#[test]
fn end_of_qemu_is_detected_while_its_wrapper_script_runs() {
    for has_come in [false, true] {
        let scratch = Scratch::new();
        let machine = small(QemuVersion::V10_0);
        let qemu = machine.command_line(&scratch, Side::Destination).join(" ");
        let given =
            ["sh".into(), "-c".into(), format!("exec 2>/dev/null; {qemu}; sleep 1000; true")];
        let (mut source, _) = source(&machine, &scratch);
        let mut destination = Destination::by(&given, &machine, &scratch, &[], ANYWHERE);
        let program = machine.version.program();
        let is_qemu = |pid: &u32| {
            let run = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            run.file_name() == program.file_name()
        };
        let pids = children(destination.guest_pid);
        let pid = pids.into_iter().find(is_qemu).expect("the script runs QEMU");
        let kill = || {
            let pid = nix::unistd::Pid::from_raw(pid.try_into().expect("pids are small"));
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)
                .expect("the process exists");
        };
        if has_come {
            let tap = Tap::to(&destination.uri, Some(HELLO_BYTES));
            let umem = migrate(&source, tap.uri(), &["-p"]);
            destination.umem.event("connected");
            kill();
            says(&destination.umem.fails(), "exited");
            tap.cut();
            umem.fails();
        } else {
            kill();
            says(&destination.umem.fails(), "exited");
        }
        assert_eq!(source.qmp.status(), "running");
        assert_eq!(scratch.processes("destination"), []);
    }
}

fn children(pid: u32) -> Vec<u32> {
    let listed = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let listed = listed.expect("the process exists");
    listed.split_ascii_whitespace().map(|pid| pid.parse().expect("a pid")).collect()
}

/// A named network namespace, removed when dropped.
struct Namespace {
    name: String,
}

impl Namespace {
    fn new() -> Namespace {
        let name = format!("umem-test-{}", std::process::id());
        Namespace::ip("add", &name);
        Namespace { name }
    }

    fn ip(what: &str, name: &str) {
        let status = Command::new("ip").args(["netns", what, name]).status();
        assert!(status.is_ok_and(|status| status.success()), "ip netns {what} {name}");
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        Namespace::ip("delete", &self.name);
    }
}

/// Options equivalent to [`small`]'s in other forms, without the memory.
fn plain(machine: &Machine, scratch: &Scratch) -> Vec<String> {
    let test = machine.socket(scratch, Side::Destination, "test");
    let program = machine.version.program().display().to_string();
    let line = format!(
        "{program} -accel tcg -cpu max -nodefaults -display none -no-reboot -smp 2 -m 64M -serial null \
         -qmp unix:{},server=on,wait=off",
        test.display()
    );
    words(&line)
}

#[test]
fn memory_is_found_in_every_configuration() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let machine = small(version);
        let plain = plain(&machine, &scratch);
        let ram = machine.ram_file(&scratch, Side::Destination, "ram0").display().to_string();
        let config = scratch.path("config");
        let text = format!(
            "[machine]\n  type = \"q35\"\n  memory-backend = \"ram0\"\n[object \"ram0\"]\n  \
             qom-type = \"memory-backend-file\"\n  size = \"64M\"\n  share = \"on\"\n  mem-path = \"{ram}\"\n"
        );
        fs::write(&config, text).expect("a file");
        let json = format!(
            "{{\"qom-type\":\"memory-backend-file\",\"id\":\"ram0\",\"size\":67108864,\"share\":true,\
             \"mem-path\":\"{ram}\"}}"
        );
        let backend =
            format!("qom-type=memory-backend-file,id=ram0,size=64M,share=yes,mem-path={ram}");
        let q35 = "-machine type=q35,memory-backend=ram0";
        for more in [
            vec!["-readconfig".to_owned(), config.display().to_string()],
            [words(q35), vec!["-object".into(), json]].concat(),
            [words(q35), vec!["--object".into(), backend], words("-incoming defer")].concat(),
        ] {
            let (source, memory) = source(&machine, &scratch);
            let all = [plain.clone(), more].concat();
            let destination = Destination::by(&all, &machine, &scratch, &[], ANYWHERE);
            let made = fs::metadata(&ram).expect("QEMU has made the file");
            assert_eq!(made.mode() & 0o777, 0o600, "other users can read the guest's memory");
            arrives_at(destination, source, &[memory]);
            for path in scratch.ram_files() {
                fs::remove_file(path).expect("the file exists");
            }
        }
    }
}

#[test]
fn memory_outside_the_guest_is_released() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let mut machine = small(version);
        let (source, memory) = source(&machine, &scratch);
        let image = on_a_disk(&scratch);
        let spare = scratch.ram("spare");
        let more = format!(
            "-object memory-backend-file,id=spare,size=8M,share=on,mem-path={} \
             -object memory-backend-memfd,id=another,size=8M,share=on \
             -object memory-backend-file,id=rom,size=16M,share=on,readonly=on,mem-path={}",
            spare.display(),
            image.display()
        );
        machine.extra = words(&more);
        let destination = Destination::start(&machine, &scratch);
        // Nothing of it is registered any more, so no thread waits there.
        wait_for("the end of the registration", || {
            let smaps = fs::read_to_string(format!("/proc/{}/smaps", destination.guest_pid));
            let smaps = smaps.expect("the process exists");
            let entry =
                smaps.split_once(&spare.display().to_string()).expect("the file is mapped").1;
            let flags = entry.lines().find(|line| line.starts_with("VmFlags:")).expect("flags");
            let is_registered = flags.split(' ').any(|flag| flag == "um" || flag == "ui");
            (!is_registered).then_some(())
        });
        arrives_at(destination, source, &[memory]);
        fs::remove_file(image).expect("the file exists");
    }
}

#[test]
fn nvdimm_disk_cannot_be_filled() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let mut machine = small(version);
        let image = on_a_disk(&scratch);
        let more = format!(
            "-machine nvdimm=on -m 64M,slots=1,maxmem=1G \
             -object memory-backend-file,id=nv,size=16M,share=on,mem-path={} -device nvdimm,memdev=nv",
            image.display()
        );
        machine.extra = words(&more);
        let given = machine.command_line(&scratch, Side::Destination);
        let text = Umem::start(incoming(&given, &[], ANYWHERE)).fails();
        says(&text, "RAM backend nv has its memory in");
        says(&text, "named files on tmpfs and hugetlbfs");
        assert_eq!(scratch.ram_files(), Vec::<std::path::PathBuf>::new());
        assert!(image.exists(), "a foreign disk has been removed");
        fs::remove_file(image).expect("the file exists");
    }
}

#[test]
fn longer_file_is_filled_up_to_the_guests_memory() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let machine = small(version);
        let (source, memory) = source(&machine, &scratch);
        let name = machine.ram_file(&scratch, Side::Destination, "ram0");
        let file = File::options().write(true).create_new(true).mode(0o600).open(&name);
        file.and_then(|file| file.set_len(80 << 20)).expect("shared memory has room");
        let destination = Destination::start(&machine, &scratch);
        arrives_at(destination, source, &[memory]);
        assert_eq!(fs::metadata(&name).expect("umem leaves the file").len(), 80 << 20);
    }
}

#[test]
fn unusable_command_is_reported_before_a_source_connects() {
    let scratch = Scratch::new();
    let machine = small(QemuVersion::V10_0);
    let given = machine.command_line(&scratch, Side::Destination);
    let fails = |given: &[String], options: &[&str]| {
        let text = Umem::start(incoming(given, options, ANYWHERE)).fails();
        assert_eq!(scratch.processes("destination"), []);
        text
    };

    // A wrapper that does not pass the preload object on.
    let wrapped = [words("env -u LD_PRELOAD"), given.clone(), words("-no-such-option")].concat();
    let text = Umem::start(incoming(&wrapped, &[], ANYWHERE)).fails_as_misused();
    says(&text, "started no QEMU with umem's preload object");

    // The monitor of another QEMU.
    let other = Machine { name: "other", ..small(QemuVersion::V10_0) };
    let mut running = other.start(&scratch);
    let socket = running.socket.display().to_string();
    let text = fails(&given, &["--qmp", &socket]);
    says(&text, "it is in the state running, and does not wait for a guest");
    let waiting = Machine { extra: words("-incoming defer"), name: "waiting", ..other };
    let mut other = waiting.start(&scratch);
    let socket = other.socket.display().to_string();
    let text = fails(&given, &["--qmp", &socket]);
    says(&text, "RAM backend ram0 has its memory in");
    assert_eq!(running.qmp.status(), "running");

    // Not all of the guest's memory, or too much.
    let ram = |name: &str, id: &str| {
        format!("{name}={}", machine.ram_file(&scratch, Side::Destination, id).display())
    };
    let spare = format!(
        "-object memory-backend-file,id=spare,size=8M,share=on,mem-path={}",
        machine.ram_file(&scratch, Side::Destination, "spare").display()
    );
    let more = [given, words(&spare)].concat();
    let text = fails(&more, &["--ram", &ram("spare", "spare")]);
    says(&text, "RAM backend ram0");
    says(&text, "is not named by --ram");
    let both = ["--ram", &ram("ram0", "ram0"), "--ram", &ram("spare", "spare")];
    let text = Umem::start(incoming(&more, &both, ANYWHERE)).fails_as_misused();
    says(&text, "--ram spare names a file that is not RAM of the guest");
    assert_eq!(other.qmp.status(), "inmigrate");
}

/// The file of a QEMU without a umem has no lock, and an empty file looks unused.
#[test]
fn empty_file_mapped_by_another_qemu_is_refused() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let machine = small(version);
        let name = machine.ram_file(&scratch, Side::Destination, "ram0");
        let other = Machine { name: "other", extra: words("-incoming defer"), ..small(version) };
        let others = other.ram_file(&scratch, Side::Source, "ram0").display().to_string();
        let same = |word: &String| word.replace(&others, &name.display().to_string());
        let line: Vec<String> =
            other.command_line(&scratch, Side::Source).iter().map(same).collect();
        let start = || {
            let [test, umem] =
                ["test", "umem"].map(|monitor| other.socket(&scratch, Side::Source, monitor));
            let _ = fs::remove_file(&test);
            Qemu::start(&line, &test, umem, other.serial(&scratch, Side::Source))
        };

        let before = start();
        assert_eq!(fs::metadata(&name).expect("QEMU has made the file").blocks(), 0);
        fs::set_permissions(&name, Permissions::from_mode(0o600)).expect("the file exists");
        let given = machine.command_line(&scratch, Side::Destination);
        let text = Umem::start(incoming(&given, &[], ANYWHERE)).fails();
        says(&text, &format!("RAM ram0: process {} has mapped the same file", before.pid()));
        drop(before);

        // A QEMU that starts while umem waits.
        let destination = Destination::start(&machine, &scratch);
        let meanwhile = start();
        let mut source = machine.start(&scratch);
        let expected = format!("process {} has mapped the same file", meanwhile.pid());
        says(&migrate(&source, &destination.uri, &["-p"]).fails(), &expected);
        says(&destination.umem.fails(), &expected);
        assert_eq!(source.qmp.status(), "running");
        drop(meanwhile);
    }
}

/// Memory that QEMU maps like RAM after umem knows the guest's memory is not filled.
#[test]
fn memory_plugged_in_later_is_left_to_qemu() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let mut machine = small(version);
        machine.extra = words("-m 64M,slots=2,maxmem=1G");
        let (source, _) = source(&machine, &scratch);
        let mut destination = Destination::start(&machine, &scratch);
        let mut guest = Qmp::connect(&destination.qmp);
        let plug = |guest: &mut Qmp, id: &str| {
            let backend = json!({ "qom-type": "memory-backend-file", "id": id, "size": 128 << 20,
                "share": true, "mem-path": scratch.ram(id) });
            guest.execute("object-add", backend);
        };
        plug(&mut guest, "waiting");
        let mut umem = migrate(&source, &destination.uri, &["-p"]);
        umem.event("completed");
        destination.umem.event("completed");
        umem.succeeds();
        plug(&mut guest, "later");
        for (id, address) in [("waiting", 0x1_0000_0000u64), ("later", 0x1_0800_0000)] {
            let device = json!({ "driver": "pc-dimm", "id": format!("d-{id}"), "memdev": id });
            guest.execute("device_add", device);
            let file = scratch.path(id);
            let save = json!({ "val": address, "size": 4096, "filename": file });
            guest.execute("pmemsave", save);
            assert_eq!(fs::read(file).expect("QEMU has written the file"), [0; 4096]);
        }
        guest.quit();
        destination.umem.succeeds();
        source.qmp.quit();
    }
}

/// Only the file made for the guest is removed, not the file that has its name by then.
#[test]
fn file_that_replaced_the_ram_file_is_kept() {
    let scratch = Scratch::new();
    let machine = small(QemuVersion::V10_0);
    let name = machine.ram_file(&scratch, Side::Destination, "ram0");
    let ram = format!("ram0={}", name.display());
    for options in [&[][..], &["--ram", &ram]] {
        let mut destination = Destination::start_with(&machine, &scratch, options, ANYWHERE);
        let guests = scratch.ram("guests");
        fs::rename(&name, &guests).expect("QEMU has made the file");
        fs::write(&name, "somebody's").expect("shared memory can be written");
        destination.umem.signal(nix::sys::signal::Signal::SIGINT);
        destination.umem.fails();
        assert_eq!(fs::read(&name).expect("umem leaves the file"), b"somebody's");
        fs::remove_file(&name).expect("the file exists");
        fs::remove_file(guests).expect("the file exists");
    }
}
