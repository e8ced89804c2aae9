//! The guest's memory is the memory that its QEMU has mapped, whatever its paths name by now: it arrives, or the move
//! is refused before the guest stops, with the reason.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::json;

use crate::destination::Destination;
use crate::moving::Moved;
use crate::support::{Machine, Qemu, QemuVersion, Qmp, Ram, Scratch, Side, Umem};
use crate::{NOBODY, boot, migrate, says};

pub(super) const VERSIONS: [QemuVersion; 2] = [QemuVersion::V7_2, QemuVersion::V10_0];

/// The place of a test's mark in guest memory, which the firmware does not touch.
const MARK_OFFSET: u64 = 32 << 20;

/// A machine with 64 MiB of memory and no system to boot.
pub(super) fn small(version: QemuVersion) -> Machine {
    Machine { ram: vec![Ram { id: "ram0", mib: 64 }], ..Machine::bare(version) }
}

/// The mapping of a file of this name in a process, which has exactly one.
pub(super) fn mapped(pid: u32, name: &str) -> File {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("the process exists");
    let line =
        maps.lines().find(|line| line.contains(name)).expect("the process has mapped the file");
    let range = line.split(' ').next().expect("a range");
    let path = format!("/proc/{pid}/map_files/{range}");
    File::options().read(true).write(true).open(path).expect("the file can be opened")
}

/// Stops the guest, moves it, and compares each byte of its memory, which the source has in these files.
fn arrives(source: Qemu, memory: &[File], machine: &Machine, scratch: &Scratch) {
    let destination = Destination::start(machine, scratch);
    arrives_at(destination, source, memory);
}

/// Likewise, with a destination that waits already.
pub(super) fn arrives_at(mut destination: Destination, mut source: Qemu, memory: &[File]) {
    source.qmp.execute("stop", json!({}));
    for (index, file) in memory.iter().enumerate() {
        let mark = format!("the guest's memory {index}");
        file.write_all_at(mark.as_bytes(), MARK_OFFSET).expect("memory");
    }
    let mut umem = migrate(&source, &destination.uri, &["-p"]);
    umem.event("completed");
    destination.umem.event("completed");
    for (from, to) in memory.iter().zip(&destination.ram_files) {
        let to = fs::read(to).expect("the file exists");
        // Either file may be longer than the guest's memory.
        let bytes = to.len().min(from.metadata().expect("the file is open").len() as usize);
        let mut expected = vec![0; bytes];
        from.read_exact_at(&mut expected, 0).expect("the file is long enough");
        assert!(expected == to[..bytes], "other memory has arrived");
    }
    umem.succeeds();
    Qmp::connect(&destination.qmp).quit();
    destination.umem.succeeds();
    source.qmp.quit();
}

/// The umem of the source refuses the guest, which runs on.
fn is_refused(source: &mut Qemu, options: &[&str], expected: &[&str]) {
    let text = migrate(source, NOBODY, &[&["-p"], options].concat()).fails();
    expected.iter().for_each(|part| says(&text, part));
    assert_eq!(source.qmp.status(), "running");
}

/// The source accepts the guest, and fails only because no destination answers.
fn is_taken(source: &mut Qemu, options: &[&str]) {
    is_refused(source, options, &["cannot connect to tcp:127.0.0.1:1"]);
}

#[test]
fn mapped_file_is_moved_although_its_path_was_replaced() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let machine = small(version);
        let source = machine.start(&scratch);
        let name = machine.ram_file(&scratch, Side::Source, "ram0");
        let memory = mapped(source.pid(), &name.display().to_string());
        let other = scratch.ram("other");
        fs::copy(&name, &other).expect("shared memory has room");
        fs::rename(&other, &name).expect("both files exist");
        arrives(source, &[memory], &machine, &scratch);
    }
}

#[test]
fn unlinked_ram_file_is_moved() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let machine = small(version);
        let source = machine.start(&scratch);
        let name = machine.ram_file(&scratch, Side::Source, "ram0");
        let memory = mapped(source.pid(), &name.display().to_string());
        fs::remove_file(&name).expect("the file exists");
        arrives(source, &[memory], &machine, &scratch);
    }
}

/// As a manager may pass it: in any other process its path leads elsewhere.
#[test]
fn inherited_memfd_is_moved() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let machine = small(version);
        let memory = memfd_create(c"guest", MFdFlags::empty()).expect("a memory file");
        let memory = File::from(memory);
        memory.set_len(64 << 20).expect("shared memory has room");
        let name = machine.ram_file(&scratch, Side::Source, "ram0").display().to_string();
        let given = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let words = machine.command_line(&scratch, Side::Source);
        let words: Vec<String> = words.iter().map(|word| word.replace(&name, &given)).collect();
        let source = start_by(&words, &machine, &scratch);
        // umem does not get the descriptor.
        fcntl(&memory, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).expect("the descriptor is open");
        arrives(source, &[memory], &machine, &scratch);
    }
}

#[test]
fn ram_file_in_another_mount_namespace_is_found() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let machine = small(version);
        let name = machine.ram_file(&scratch, Side::Source, "ram0");
        let somebodys = File::create(&name).expect("shared memory can be written");
        somebodys.set_len(64 << 20).expect("shared memory has room");
        let elsewhere = "mount -t tmpfs none /dev/shm && exec \"$@\"";
        let wrapper = ["unshare", "-m", "--propagation", "private", "sh", "-c", elsewhere, "sh"];
        let source = start_under(&wrapper, &machine, &scratch);
        let memory = mapped(source.pid(), &name.display().to_string());
        arrives(source, &[memory], &machine, &scratch);
    }
}

/// A source, through a program that becomes it.
fn start_under(wrapper: &[&str], machine: &Machine, scratch: &Scratch) -> Qemu {
    let wrapper = wrapper.iter().map(|&word| word.to_owned());
    let words: Vec<String> = wrapper.chain(machine.command_line(scratch, Side::Source)).collect();
    start_by(&words, machine, scratch)
}

/// A source with this command line.
fn start_by(words: &[String], machine: &Machine, scratch: &Scratch) -> Qemu {
    let [test, umem] =
        ["test", "umem"].map(|monitor| machine.socket(scratch, Side::Source, monitor));
    Qemu::start(words, &test, umem, machine.serial(scratch, Side::Source))
}

#[test]
fn monitor_socket_made_by_a_parent_leads_to_qemu() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let mut machine = small(version);
        let path = scratch.path("given.qmp");
        let listener = UnixListener::bind(&path).expect("a socket");
        fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty())).expect("the terminal is open");
        let number = std::os::fd::AsRawFd::as_raw_fd(&listener);
        let given = format!("-chardev socket,id=given,fd={number},server=on,wait=off");
        machine.extra.extend(given.split(' ').map(str::to_owned));
        machine.extra.extend(["-mon", "chardev=given,mode=control"].map(str::to_owned));
        let mut source = machine.start(&scratch);
        drop(listener);
        source.socket = path;
        let name = machine.ram_file(&scratch, Side::Source, "ram0");
        let memory = mapped(source.pid(), &name.display().to_string());
        machine.extra.clear();
        arrives(source, &[memory], &machine, &scratch);
    }
}

#[test]
fn guest_with_numa_nodes_moves_with_qemu_7_2() {
    numa_moves(QemuVersion::V7_2);
}

#[test]
fn guest_with_numa_nodes_moves_with_qemu_10_0() {
    numa_moves(QemuVersion::V10_0);
}

fn numa_moves(version: QemuVersion) {
    let scratch = Scratch::new();
    let ram = vec![Ram { id: "ram-node0", mib: 128 }, Ram { id: "ram-node1", mib: 128 }];
    let machine = Machine { ram, ..Machine::linux(version) };
    let source = boot(&machine, &scratch);
    let destination = Destination::start(&machine, &scratch);
    Moved::start(source, destination, &["-p"]).complete().end();
}

#[test]
fn longer_file_is_moved_up_to_the_guests_memory() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let machine = small(version);
        let name = machine.ram_file(&scratch, Side::Source, "ram0");
        let file = File::options().read(true).write(true).create_new(true).open(&name);
        let file = file.expect("shared memory can be written");
        file.set_len(80 << 20).expect("shared memory has room");
        file.write_all_at(b"not the guest's", 72 << 20).expect("shared memory has room");
        let source = machine.start(&scratch);
        arrives(source, &[file], &machine, &scratch);
    }
}

/// A file of this length, accessible to its owner only.
fn file_of(path: &Path, mib: u64) -> File {
    let mut options = File::options();
    let options = options.read(true).write(true).create_new(true).mode(0o600);
    let file = options.open(path).expect("shared memory can be written");
    file.set_len(mib << 20).expect("shared memory has room");
    file
}

/// A command line whose backends share one file, each at an offset of its own, MiB.
fn in_one_file(words: &[String], path: &Path, offsets: &[(&str, u64)]) -> Vec<String> {
    let place = |word: &String| {
        let place = offsets.iter().find(|(id, _)| word.contains(&format!(",id={id},")));
        let (before, _) = word.split_once(",mem-path=")?;
        place.map(|(_, mib)| format!("{before},mem-path={},offset={mib}M", path.display()))
    };
    words.iter().map(|word| place(word).unwrap_or_else(|| word.clone())).collect()
}

/// A source whose backends are in one file.
fn source_in_one_file(
    machine: &Machine,
    scratch: &Scratch,
    path: &Path,
    offsets: &[(&str, u64)],
) -> Qemu {
    let words = in_one_file(&machine.command_line(scratch, Side::Source), path, offsets);
    let [test, umem] =
        ["test", "umem"].map(|monitor| machine.socket(scratch, Side::Source, monitor));
    Qemu::start(&words, &test, umem, machine.serial(scratch, Side::Source))
}

fn at_one_file(
    machine: &Machine,
    scratch: &Scratch,
    path: &Path,
    offsets: &[(&str, u64)],
) -> Destination {
    let words = in_one_file(&machine.command_line(scratch, Side::Destination), path, offsets);
    let mut destination = Destination::by(&words, machine, scratch, &[], "tcp:127.0.0.1:0");
    destination.ram_files = vec![path.to_owned()];
    destination
}

/// QEMU supports offset= since 8.1.
#[test]
fn numa_nodes_in_one_file_move_into_one_file_with_other_offsets() {
    let scratch = Scratch::new();
    let ram = vec![Ram { id: "ram-node0", mib: 128 }, Ram { id: "ram-node1", mib: 128 }];
    let machine = Machine { ram, ..Machine::linux(QemuVersion::V10_0) };
    let [from, to] = ["from", "to"].map(|name| scratch.ram(name));
    // QEMU makes the file as long as its first backend needs.
    let mut source =
        source_in_one_file(&machine, &scratch, &from, &[("ram-node0", 128), ("ram-node1", 0)]);
    crate::booted(&mut source.serial);
    let at = [("ram-node0", 0), ("ram-node1", 128)];
    drop(file_of(&to, 256));
    let destination = at_one_file(&machine, &scratch, &to, &at);
    let options = ["-p", "--checksum"];
    let moved = Moved::start(source, destination, &options).complete();
    assert_eq!(moved.report["total_bytes"], 256 << 20);
    moved.end();
}

#[test]
fn memory_at_a_file_offset_is_moved_and_bytes_around_it_are_kept() {
    for options in [&["-p"][..], &["-p", "--release-ram"], &["--stop-first"]] {
        let scratch = Scratch::new();
        let machine = small(QemuVersion::V10_0);
        let [from, to] = ["from", "to"].map(|name| scratch.ram(name));
        let others: [(&[u8], u64); 2] = [(b"before it", 0), (b"behind it", 140 << 20)];
        let file = file_of(&from, 160);
        others.iter().for_each(|(bytes, at)| file.write_all_at(bytes, *at).expect("room"));
        let mut source = source_in_one_file(&machine, &scratch, &from, &[("ram0", 64)]);
        let there = file_of(&to, 128);
        let mut destination = at_one_file(&machine, &scratch, &to, &[("ram0", 32)]);
        source.qmp.execute("stop", json!({}));
        file.write_all_at(b"the guest's", (64 << 20) + MARK_OFFSET).expect("room");
        let mut expected = vec![0; 64 << 20];
        file.read_exact_at(&mut expected, 64 << 20).expect("the file is long enough");
        let mut umem = migrate(&source, &destination.uri, options);
        umem.event("completed");
        destination.umem.event("completed");
        umem.succeeds();
        let mut found = vec![0; 64 << 20];
        there.read_exact_at(&mut found, 32 << 20).expect("the file is long enough");
        assert!(found == expected, "other memory has arrived");
        for (at, mib) in [(0, 32), (96 << 20, 32)] {
            let mut around = vec![0; mib << 20];
            there.read_exact_at(&mut around, at).expect("the file is long enough");
            assert!(
                around.iter().all(|byte| *byte == 0),
                "the bytes around the memory have changed"
            );
        }
        // Only the two pages of other owners are left.
        let is_freed = fs::metadata(&from).expect("the file exists").blocks() * 512 <= 2 * 4096;
        assert_eq!(is_freed, options.contains(&"--release-ram"), "{options:?}");
        for (bytes, at) in others {
            let mut there = vec![0; bytes.len()];
            file.read_exact_at(&mut there, at).expect("the file is long enough");
            assert_eq!(there, bytes, "{options:?}");
        }
        Qmp::connect(&destination.qmp).quit();
        destination.umem.succeeds();
        source.qmp.quit();
    }
}

/// A takeover finds each part at its place.
#[test]
fn shared_file_of_several_backends_is_served_after_a_takeover() {
    let scratch = Scratch::new();
    let ram = vec![Ram { id: "ram-node0", mib: 64 }, Ram { id: "ram-node1", mib: 64 }];
    let machine = Machine { ram, ..Machine::bare(QemuVersion::V10_0) };
    let [from, to] = ["from", "to"].map(|name| scratch.ram(name));
    let [leaving, arriving] =
        [[("ram-node0", 80), ("ram-node1", 0)], [("ram-node0", 0), ("ram-node1", 64)]];
    let mut source = source_in_one_file(&machine, &scratch, &from, &leaving);
    source.qmp.execute("stop", json!({}));
    let file = File::options().read(true).write(true).open(&from).expect("QEMU has made the file");
    for (at, byte) in [(88, 0x5a), (8, 0xa5)] {
        file.write_all_at(&vec![byte; 32 << 20], at << 20).expect("room");
    }
    drop(file_of(&to, 128));
    let mut destination = at_one_file(&machine, &scratch, &to, &arriving);
    let slowly = ["-p", "--max-postcopy-bandwidth", "16M"];
    let mut umem = migrate(&source, &destination.uri, &slowly);
    let session = umem.event("stopped")["session"].as_str().expect("text").to_owned();
    umem.event("running");
    umem.kill();
    Umem::start(["migrate", "--json", "--resume", &session]).succeeds();
    destination.umem.event("completed");
    let there = File::open(&to).expect("the file exists");
    for ((_, at), (_, to)) in leaving.into_iter().zip(arriving) {
        let mut parts = [vec![0; 64 << 20], vec![0; 64 << 20]];
        file.read_exact_at(&mut parts[0], at << 20).expect("the file is long enough");
        there.read_exact_at(&mut parts[1], to << 20).expect("the file is long enough");
        assert!(parts[0] == parts[1], "other memory has arrived");
    }
    Qmp::connect(&destination.qmp).quit();
    destination.umem.succeeds();
    source.qmp.quit();
}

#[test]
fn backends_with_overlapping_file_ranges_are_refused() {
    let scratch = Scratch::new();
    let name = scratch.ram("both");
    file_of(&name, 128);
    let backend = |id: &str, offset: u32| {
        let path = name.display();
        format!(
            "-object memory-backend-file,id={id},size=64M,share=on,mem-path={path},offset={offset}M"
        )
    };
    let two = format!(
        "-machine memory-backend=ram0 -m 64M,slots=1,maxmem=1G {} {} -device pc-dimm,id=d,memdev=ram1",
        backend("ram0", 0),
        backend("ram1", 32)
    );
    let mut source = plain_source(QemuVersion::V10_0, &scratch, &two);
    is_refused(&mut source, &[], &["RAM backends ", " share memory in the file "]);
    source.qmp.quit();

    let apart = two.replace("offset=32M", "offset=64M");
    let mut source = plain_source(QemuVersion::V10_0, &scratch, &apart);
    let ram = format!("ram0={}", name.display());
    is_refused(&mut source, &["--ram", &ram], &["contains several RAM", "leave out --ram"]);
    is_taken(&mut source, &[]);
}

#[test]
fn overlong_memory_name_is_refused() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let id = "m".repeat(64);
        let one = format!(
            "-machine memory-backend={id} -object memory-backend-file,id={id},size=64M,share=on,mem-path={}",
            scratch.ram("long").display()
        );
        let mut source = plain_source(version, &scratch, &one);
        is_refused(&mut source, &[], &["an id of 64 bytes", "give it a shorter id"]);
        let ram = format!("ram0={}", scratch.ram("long").display());
        is_taken(&mut source, &["--ram", &ram]);
    }
}

fn plain_source(version: QemuVersion, scratch: &Scratch, options: &str) -> Qemu {
    crate::refusals::plain_source(version, scratch, options)
}

#[test]
fn named_files_are_compared_with_qemus_mappings() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let machine = small(version);
        let mut source = machine.start(&scratch);
        let name = machine.ram_file(&scratch, Side::Source, "ram0");
        let ram = |path: &Path| format!("ram0={}", path.display());
        let other = scratch.ram("other");
        fs::copy(&name, &other).expect("shared memory has room");
        let expected = [
            other.to_str().expect("the path is UTF-8"),
            "is not the file that the guest's QEMU has mapped",
        ];
        is_refused(&mut source, &["--ram", &ram(&other)], &expected);
        let twice = [&ram(&name), "--ram", &ram(&name)].map(str::to_owned);
        is_refused(&mut source, &["--ram", &twice[0], &twice[1], &twice[2]], &["is named twice"]);
        is_taken(&mut source, &["--ram", &ram(&name)]);

        let dimm = Ram { id: "ram1", mib: 128 };
        let machine =
            Machine { name: "dimm", ram: [small(version).ram, vec![dimm]].concat(), ..machine };
        let mut source = machine.start(&scratch);
        let name = machine.ram_file(&scratch, Side::Source, "ram0");
        is_refused(&mut source, &["--ram", &ram(&name)], &["also has RAM ram1", "leave out --ram"]);
        is_taken(&mut source, &[]);
    }
}

#[test]
fn user_without_access_to_the_mappings_gets_an_error() {
    let scratch = Scratch::new();
    let machine = small(QemuVersion::V10_0);
    let mut source = machine.start(&scratch);
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    fs::set_permissions(&source.socket, everybody).expect("the socket exists");
    let nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups \
                  --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search \
                  --bounding-set=-all,+dac_read_search";
    let nobody: Vec<&str> = nobody.split_ascii_whitespace().collect();
    let qmp = source.socket.to_str().expect("the path is UTF-8");
    let words = ["migrate", "--json", "-p", "--qmp", qmp, NOBODY];
    let text = Umem::start_under(&nobody, words).fails();
    says(&text, &format!("process {}, has mapped", source.pid()));
    says(&text, "run umem as root, or as QEMU's user");
    assert_eq!(source.qmp.status(), "running");
}

#[test]
fn device_names_and_unused_memory_are_ignored() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let mut machine = small(version);
        let more = "-netdev user,id=vhost-user-n -device e1000,netdev=vhost-user-n,id=vfio-x,romfile= \
                    -object memory-backend-ram,id=spare,size=8M \
                    -object memory-backend-memfd,id=another,size=8M,share=on";
        machine.extra = more.split_ascii_whitespace().map(str::to_owned).collect();
        let source = machine.start(&scratch);
        let name = machine.ram_file(&scratch, Side::Source, "ram0");
        let memory = mapped(source.pid(), &name.display().to_string());
        machine.extra.truncate(4);
        arrives(source, &[memory], &machine, &scratch);
    }
}

#[test]
fn nvdimm_disk_is_left_alone_or_refused_at_once() {
    for version in VERSIONS {
        let scratch = Scratch::new();
        let image = on_a_disk(&scratch);
        let nvdimm = |more: &str, device: &str| {
            format!(
                "-machine nvdimm=on,memory-backend=ram0 -m 64M,slots=1,maxmem=1G \
                 -object memory-backend-file,id=ram0,size=64M,share=on,mem-path={} \
                 -object memory-backend-file,id=nv,size=16M,mem-path={},{more} \
                 -device nvdimm,id=n,memdev=nv{device}",
                scratch.ram("source").display(),
                image.display()
            )
        };
        let mut source = plain_source(version, &scratch, &nvdimm("share=on", ""));
        is_refused(&mut source, &[], &["RAM backend nv", "lies on a disk", "readonly=on"]);
        source.qmp.quit();
        let readonly = nvdimm("share=on,readonly=on", ",unarmed=on");
        let mut source = plain_source(version, &scratch, &readonly);
        is_taken(&mut source, &[]);
        source.qmp.quit();
        let private = nvdimm("share=off,readonly=on", ",unarmed=on");
        let mut source = plain_source(version, &scratch, &private);
        is_refused(&mut source, &[], &["RAM backend nv has readonly=on and share=off"]);
        source.qmp.quit();
        fs::remove_file(image).expect("the file exists");
    }
}

/// An image of 16 MiB outside tmpfs.
pub(super) fn on_a_disk(scratch: &Scratch) -> PathBuf {
    let name = scratch.path("image");
    let name = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!(
        "{}-image",
        name.parent().and_then(Path::file_name).expect("a name").display()
    ));
    let mut file = File::create(&name).expect("the target directory can be written");
    file.set_len(16 << 20).expect("the file system has room");
    file.write_all(b"a disk").expect("the file system has room");
    name
}
