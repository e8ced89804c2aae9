//! The owner of a RAM file: one guest, and one migration. Locks record that, which end with their owner only; a file
//! that is accessible to other users cannot be a guest's memory.

use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::sys::stat::Mode;
use nix::unistd::{Uid, chown, mkfifo};

use super::SMALL;
use super::support::killed::{Move, Side};
use super::support::{Guests, Qmp, Scratch, Umem};

const UMEM: &str = env!("CARGO_BIN_EXE_umem");

/// `umem incoming` whose guest is to have its memory in this file.
fn incoming(scratch: &Scratch, ram: &Path, more: &[&str]) -> Umem {
    let ram = format!("ram0={}", ram.display());
    let qmp = scratch.path("another.qmp").display().to_string();
    let mut arguments = vec!["incoming", "--json", "--ram", &ram];
    arguments.extend(more);
    arguments.extend(["tcp:127.0.0.1:0", "--", UMEM, "guest", "--incoming", "--threads", "0"]);
    arguments.extend(["--ram", &ram, "--size", "16", "--qmp", &qmp]);
    // Both have to know the kind.
    arguments.extend(more);
    Umem::start(arguments)
}

/// `umem migrate` of a guest without a monitor. No process listens there.
fn migrate(ram: &Path) -> Umem {
    let ram = format!("ram0={}", ram.display());
    Umem::start(["migrate", "--json", "--ram", &ram, "tcp:127.0.0.1:1"])
}

fn linked(scratch: &Scratch, file: &Path) -> std::path::PathBuf {
    let link = scratch.ram("link");
    std::fs::hard_link(file, &link).unwrap();
    link
}

#[test]
fn second_guest_of_one_ram_file_is_refused() {
    for more in [&[][..], &["--kind", "private"]] {
        let scratch = Scratch::new();
        let file = scratch.ram("destination");
        let mut first = incoming(&scratch, &file, more);
        first.event("listening");
        let link = linked(&scratch, &file);
        for path in [&file, &link] {
            let second = incoming(&scratch, path, &[]).fails();
            assert!(second.contains("another guest has its memory in this file"), "{second}");
            let source = migrate(path).fails();
            assert!(source.contains("another umem moves the guest"), "{source}");
        }
        assert!(first.is_running(), "{}", first.stderr());
        // The claim ends with the process that had it.
        first.signal(nix::sys::signal::Signal::SIGINT);
        first.wait();
        assert!(!file.exists(), "the file that umem made is removed");
        std::fs::remove_file(&link).unwrap();
        incoming(&scratch, &file, more).event("listening");
    }
}

/// A guest that umem has received keeps its file when its umem is killed, when another one takes over, and when there
/// is none any more; until it is complete it cannot be moved on.
#[test]
fn ram_file_stays_claimed_by_its_guest_after_umem_exits() {
    let mut moving = Move::switched(SMALL);
    let file = moving.scratch.ram("destination");
    let refused = |moving: &Move| {
        let second = incoming(&moving.scratch, &file, &[]).fails();
        assert!(second.contains("another guest has its memory in this file"), "{second}");
    };
    moving.incoming.kill();
    refused(&moving);
    let onward = migrate(&file).fails();
    assert!(onward.contains("has not completely arrived in it"), "{onward}");
    moving.incoming = moving.resume("incoming");
    moving.incoming.event("listening");
    refused(&moving);
    let (scratch, umem, names, _) = moving.arrive();
    let second = incoming(&scratch, &file, &[]).fails();
    assert!(second.contains("another guest has its memory in this file"), "{second}");
    // The guest may be moved on: only a destination is missing.
    let onward = migrate(&file).fails();
    assert!(onward.contains("cannot connect to"), "{onward}");
    Qmp::connect(&scratch.path(&format!("{}.qmp", names[1]))).quit();
    umem.succeeds();
}

/// No other umem moves a guest that is being moved, or takes its file; a resume of the session does.
#[test]
fn second_umem_of_one_guest_is_refused() {
    let mut moving = Move::switched(SMALL);
    let file = moving.scratch.ram("source");
    let link = linked(&moving.scratch, &file);
    let refused = |moving: &Move| {
        for path in [&file, &link] {
            let second = migrate(path).fails();
            assert!(second.contains("another umem moves the guest"), "{second}");
            let arriving = incoming(&moving.scratch, path, &[]).fails();
            assert!(arriving.contains("another umem moves the guest"), "{arriving}");
        }
    };
    refused(&moving);
    moving.kill(Side::Source);
    moving.migrate.event("resumed");
    refused(&moving);
    std::fs::remove_file(&link).unwrap();
    moving.complete();
}

/// A program without locks, such as a QEMU that was started with the same file, may write to it while a destination
/// waits: that data would stay wherever the source's guest has a hole.
#[test]
fn file_with_data_is_refused_when_the_source_connects() {
    let scratch = Scratch::new();
    let mut guests = Guests::quiet(&scratch, &["--json"]);
    let file = std::fs::File::options().write(true).open(scratch.ram("destination")).unwrap();
    file.write_all_at(b"another guest's", 5 << 20).unwrap();
    let error = guests.migrate(&["-p", "--json"]).fails();
    assert!(error.contains("the destination gave up: RAM ram0"), "{error}");
    assert!(error.contains("holds data at byte 5242880"), "{error}");
    assert!(guests.source_runs());
    guests.incoming.fails();
}

#[test]
fn ram_file_named_twice_is_refused() {
    let scratch = Scratch::new();
    let file = scratch.ram("source");
    std::fs::write(&file, [1; 8192]).unwrap();
    let [one, two] = ["a", "b"].map(|name| format!("{name}={}", file.display()));
    let twice = Umem::start(["migrate", "--ram", &one, "--ram", &two, "tcp:127.0.0.1:1"]);
    let twice = twice.fails_as_misused();
    assert!(twice.contains("are the same file"), "{twice}");
}

/// A defect of a file, and umem's message about it.
type Wrong = (&'static str, fn(&Path), &'static str);

const WRONG: [Wrong; 6] = [
    ("open", |path| make(path, 0o666), "can be written by users other than its owner (mode 0666)"),
    ("group", |path| make(path, 0o660), "can be written by users other than its owner (mode 0660)"),
    ("link", |path| symlink("elsewhere", path).unwrap(), "is a symbolic link, to elsewhere"),
    ("fifo", |path| mkfifo(path, Mode::S_IRWXU).unwrap(), "is a FIFO and no file"),
    ("socket", |path| drop(UnixListener::bind(path).unwrap()), "is a socket and no file"),
    ("directory", |path| std::fs::create_dir(path).unwrap(), "is a directory and no file"),
];

/// A file that could be the guest's, except for its mode.
fn make(path: &Path, mode: u32) {
    std::fs::File::create(path).unwrap().set_len(16 << 20).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn ram_file_accessible_to_other_users_is_refused() {
    let scratch = Scratch::new();
    for (name, make, expected) in WRONG {
        let path = scratch.ram(name);
        make(&path);
        for umem in [incoming(&scratch, &path, &[]), migrate(&path)] {
            let error = umem.fails();
            assert!(error.contains(expected), "{name}: {error}");
        }
        assert!(path.symlink_metadata().is_ok(), "umem must not remove the file");
        let _ = std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir(&path));
    }
}

/// Only root can make such a file.
#[test]
fn ram_file_of_another_user_is_refused() {
    assert!(Uid::effective().is_root(), "the tests run as root");
    let scratch = Scratch::new();
    let nobody = Uid::from_raw(65534);
    let path = scratch.ram("nobody");
    make(&path, 0o600);
    chown(&path, Some(nobody), None).unwrap();
    let error = incoming(&scratch, &path, &[]).fails();
    assert!(error.contains("belongs to user 65534"), "{error}");
    let directory = scratch.path("directory");
    std::fs::create_dir(&directory).unwrap();
    let open = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(&directory, open).unwrap();
    let error = incoming(&scratch, &directory.join("ram"), &[]).fails();
    assert!(
        error.contains("in a directory in which every user can replace the file (mode 0777)"),
        "{error}"
    );
    chown(&directory, Some(nobody), None).unwrap();
    let error = incoming(&scratch, &directory.join("ram"), &[]).fails();
    assert!(error.contains("in a directory of user 65534"), "{error}");
}
