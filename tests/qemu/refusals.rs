//! Refusals: a guest that cannot be moved, or a QEMU that cannot receive, is refused in one line, and left unchanged.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::support::{Machine, Qemu, QemuVersion, Scratch, Serial, Side, Umem};
use crate::vhost_user::VhostUser;
use crate::{NOBODY, incoming, migrate, says};

#[test]
fn unmovable_source_is_refused_and_keeps_running() {
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
        refused(&vhost_user, &["a netdev of type vhost-user", "remove it"]);
        let _ = fs::remove_file(path);
    }
}

#[test]
fn command_unable_to_receive_is_refused_without_leftovers() {
    let scratch = Scratch::new();
    let ram = scratch.ram("ram0").display().to_string();
    let file = format!("-object memory-backend-file,id=ram0,size=64M,mem-path={ram}");
    let good = format!("-machine memory-backend=ram0 {file},share=on");
    let backend = VhostUser::listen(&scratch.path("vhost-user"));
    let given = format!("-chardev socket,id=c,path={}", backend.path.display());
    let memdev = format!(
        "-object memory-backend-file,id=ram1,size=1M,share=on,mem-path={}",
        scratch.ram("ram1").display()
    );
    for (options, expected) in [
        (
            "-machine memory-backend=ram0 -object memory-backend-memfd,id=ram0,size=64M,share=off"
                .into(),
            "RAM backend ram0 is a memory-backend-memfd with share=off",
        ),
        (good.replace(",share=on", ""), "RAM backend ram0 has share=off"),
        (
            format!("{file},share=on,prealloc=on"),
            "preallocates the guest's memory: start it without",
        ),
        (format!("{good} -mem-prealloc"), "preallocates the guest's memory: start it without"),
        (format!("{good} -overcommit mem-lock=on"), "without mem-lock=on"),
        (
            format!("{good} -netdev type=vhost-user,id=n,chardev=c {given}"),
            "n, a netdev of type vhost-user, lets",
        ),
        (
            format!("{good} -device ivshmem-plain,memdev=ram1 {memdev}"),
            "(ivshmem-plain) shares memory",
        ),
        (
            format!("{good} -device driver=ivshmem-plain,memdev=ram1 {memdev}"),
            "(ivshmem-plain) shares memory",
        ),
        (
            format!(r#"{good} -device {{"driver":"ivshmem-plain","memdev":"ram1"}} {memdev}"#),
            "(ivshmem-plain) shares memory",
        ),
        (
            format!(r#"{good} -netdev {{"type":"vhost-user","id":"n","chardev":"c"}} {given}"#),
            "n, a netdev of type vhost-user, lets",
        ),
        // There is no such device here: QEMU reports that before a source connects.
        (
            format!("{good} -netdev type=vhost-vdpa,id=n,vhostdev=/nonexistent/vdpa"),
            "its own messages say why",
        ),
        (
            format!(
                r#"{good} -netdev {{"type":"vhost-vdpa","id":"n","vhostdev":"/nonexistent/vdpa"}}"#
            ),
            "its own messages say why",
        ),
        (format!("{good} -daemonize"), "-daemonize hides QEMU from umem"),
        (format!("{good} -incoming tcp:127.0.0.1:0"), "QEMU's own -incoming"),
        (good.replace(&ram, "/dev/shm"), "RAM backend ram0 has a directory as its mem-path"),
        // QEMU's own refusals: its message, and one line of umem's.
        (format!("{good} -device no-such-device"), "the guest's monitor: it"),
        (
            format!("{good} -no-such-option"),
            "the guest's monitor: it exited before it could be asked for its RAM (its own messages say why)",
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
fn further_obstacles_of_a_destination_are_reported() {
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
    let uri = format!("tcp:{}", busy.local_addr().expect("the listener is bound"));
    let umem = Umem::start(incoming(&words, &[], &uri));
    refused(umem, &["cannot listen on tcp:127.0.0.1:", "Address already in use", "choose another"]);

    let socket = scratch.path("busy");
    let _busy = UnixListener::bind(&socket).expect("a socket");
    let umem = Umem::start(incoming(&words, &[], &format!("unix:{}", socket.display())));
    refused(umem, &["cannot listen on unix:", "Address already in use"]);
    assert!(socket.exists(), "a foreign socket is removed");

    // A user whose only capability is to read this repository.
    let nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups \
                  --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search \
                  --bounding-set=-all,+dac_read_search";
    let nobody: Vec<&str> = nobody.split_ascii_whitespace().collect();
    // Without the sockets and logs of `words`, for which that user has no directory.
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
    let holds_data = format!("RAM {}: its file holds data already, and ", used.display());
    let remove = format!("remove this one (rm {})", used.display());
    let text = Umem::start(incoming(&words, &[], anywhere)).fails();
    [&holds_data, "an earlier guest has left it", &remove]
        .iter()
        .for_each(|part| says(&text, part));
    // Nobody is told to remove the memory of a guest that runs.
    let file = fs::File::open(&used).expect("the file is readable");
    let bytes = std::num::NonZeroUsize::new(4096).expect("a page has bytes");
    let (rights, flags) = (ProtFlags::PROT_READ, MapFlags::MAP_SHARED);
    // SAFETY: a new mapping, which nothing reads.
    let mapping = unsafe { mmap(None, bytes, rights, flags, &file, 0) }.expect("a mapping");
    drop(file);
    let text = Umem::start(incoming(&words, &[], anywhere)).fails();
    let ours = format!("{holds_data}process {} (", std::process::id());
    says(&text, &ours);
    says(&text, "another guest's memory: name another file");
    assert!(!text.contains("remove"), "{text}");
    // SAFETY: the mapping is this function's, and has no user.
    unsafe { munmap(mapping, bytes.get()) }.expect("a mapping");
    assert_eq!(fs::read(&used).expect("umem leaves the file")[..17], *b"somebody's memory");
}

#[test]
fn command_without_the_preload_object_is_refused() {
    let scratch = Scratch::new();
    let ram = format!("ram0={}", scratch.ram("ram0").display());
    let uri = "tcp:127.0.0.1:0";
    for (command, expected) in [
        // Loads it and maps no RAM.
        (&["true"][..], "it exited before it mapped RAM ram0"),
        // Static, because it must be able to repair the dynamic linker's files: it loads nothing.
        (&["/sbin/ldconfig", "--version"], "the preload object was not loaded into COMMAND"),
    ] {
        let words = [&["incoming", "--json", "--ram", &ram, uri, "--"], command].concat();
        let text = Umem::start(words).fails();
        says(&text, expected);
        nothing_is_left(&scratch);
    }
}

#[test]
fn wrong_command_line_gives_one_line_and_exit_status_2() {
    let qemu = QemuVersion::V10_0.program().display().to_string();
    for (line, expected) in [
        ("incoming tcp:127.0.0.1:0", "no COMMAND"),
        ("incoming tcp:127.0.0.1:0 -- true", "name its RAM files with --ram NAME=PATH"),
        ("incoming 127.0.0.1:4444 -- QEMU", "write tcp:HOST:PORT, unix:PATH, fd:N or"),
        ("incoming --lanes 0 tcp::0 -- QEMU", "--lanes is 1 to"),
        ("incoming --kind quick tcp::0 -- QEMU", "kinds are shared, private and anonymous"),
        ("migrate -p tcp:127.0.0.1:1", "give the guest's QMP socket with --qmp"),
        ("migrate -n --qmp x tcp:127.0.0.1:1", "-n needs -p"),
        ("migrate -p --ram ram0 tcp:127.0.0.1:1", "write NAME=PATH"),
        ("migrate -p --qmp x", "tcp:HOST:4444, or a session to --resume"),
        ("move", "--help"),
    ] {
        let line = line.replace("QEMU", &qemu);
        let text = Umem::start(line.split(' ')).fails_as_misused();
        says(&text, expected);
    }
}

#[test]
fn missing_or_busy_monitor_is_reported() {
    let scratch = Scratch::new();
    let missing = scratch.path("missing").display().to_string();
    let text = Umem::start(["migrate", "-p", "--qmp", &missing, NOBODY]).fails();
    says(&text, "cannot connect to the QMP socket");
    says(&text, &format!("-qmp unix:{missing},server=on,wait=off"));

    // QEMU serves one client at a time: a second one never gets a greeting.
    let machine = Machine::bare(QemuVersion::V7_2);
    let mut source = machine.start(&scratch);
    let taken = machine.socket(&scratch, Side::Source, "test").display().to_string();
    let text = Umem::start(["migrate", "-p", "--qmp", &taken, NOBODY]).fails();
    says(&text, "another program is connected");
    assert_eq!(source.qmp.status(), "running");
}

fn nothing_is_left(scratch: &Scratch) {
    // A process that umem has killed and reaped is gone when umem is.
    assert_eq!(scratch.processes(""), []);
    assert_eq!(scratch.ram_files(), Vec::<PathBuf>::new());
}

/// A QEMU without a system to boot and with these options only.
fn plain_command(version: QemuVersion, options: &str) -> Vec<String> {
    let program = version.program().display().to_string();
    let words = format!("-accel tcg -machine q35 -m 64M -nodefaults -display none {options}");
    [&[program][..], &words.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>()]
        .concat()
}

/// Such a QEMU, running.
pub(super) fn plain_source(version: QemuVersion, scratch: &Scratch, options: &str) -> Qemu {
    let [test, umem] = ["test.qmp", "umem.qmp"].map(|name| scratch.path(name));
    let _ = fs::remove_file(&test);
    let mut words = plain_command(version, options);
    for socket in [&test, &umem] {
        words.push("-qmp".into());
        words.push(format!("unix:{},server=on,wait=off", socket.display()));
    }
    Qemu::start(&words, &test, umem, Serial::follow(&scratch.path("no-serial")))
}

#[test]
fn partial_line_of_qemu_is_kept_apart_from_umems_output() {
    let expected = "umem: RAM ram0: it is gone";
    for half in ["", "qemu-system-x86_64:", "qemu-system-x86_64: "] {
        assert_eq!(Umem::without_half_a_line(&format!("{half}{expected}")), expected);
    }
    let whole = "qemu-system-x86_64: terminating on signal 15";
    assert_eq!(Umem::without_half_a_line(whole), whole);
}
