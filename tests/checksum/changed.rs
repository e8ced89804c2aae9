//! RAM files that change while they are served: truncated, punched, overwritten. In every case no changed page reaches
//! the guest, the migration is not reported complete, the destination gets the reason, and the session continues once
//! the file is restored.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::support::{Cutter, Qmp, Scratch, Umem};
use super::{COMPLETION, Still, UNTIL_RUNNING};

const BYTES: u64 = 8 << 20;

/// The contents of the source's file, and the contents after a change.
fn contents(number: u8) -> Vec<u8> {
    (0..BYTES).map(|at| ((at / 4096 * 31 + at) as u8) ^ number).collect()
}

fn open(path: &Path) -> File {
    File::options().write(true).open(path).unwrap()
}

fn punch(path: &Path, offset: i64, length: i64) {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(open(path), flags, offset, length).unwrap();
}

type Change = fn(&Path);

/// Each kind of change, with its error message.
const CHANGES: [(&str, Change); 6] = [
    ("truncated", |path| open(path).set_len(0).unwrap()),
    ("truncated", |path| open(path).set_len(BYTES / 2).unwrap()),
    ("has changed", |path| {
        open(path).set_len(0).unwrap();
        open(path).set_len(BYTES).unwrap();
    }),
    ("has changed", |path| punch(path, 0, BYTES as i64)),
    ("has changed", |path| punch(path, 4 << 20, 4096)),
    ("has changed", |path| open(path).write_all_at(&contents(77), 0).unwrap()),
];

/// A snapshot that is served to an idle guest.
struct Served {
    still: Still,
    snapshot: PathBuf,
    migrate: Umem,
    session: String,
    _disk: Option<TempDir>,
}

impl Served {
    /// Its guest runs at the destination, without any page.
    fn start(on_disk: bool, options: &[&str]) -> Served {
        let mut still = Still::start_checked(options.contains(&"--checksum"));
        let disk = on_disk.then(|| tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
        let snapshot = match &disk {
            Some(directory) => directory.path().join("snapshot"),
            None => still.scratch.ram("source"),
        };
        std::fs::write(&snapshot, contents(0)).unwrap();
        let ram = format!("ram0={}", snapshot.display());
        let mut arguments = vec!["migrate", "--json", "-p", "-n", "--ram", &ram, &still.uri];
        arguments.extend(options);
        let mut migrate = Umem::start(&arguments);
        let session = migrate.event("stopped")["session"].as_str().unwrap().to_owned();
        migrate.event("running");
        still.incoming.event("running");
        Served { still, snapshot, migrate, session, _disk: disk }
    }

    fn resume(&self) -> Umem {
        Umem::start(["migrate", "--json", "--resume", &self.session])
    }

    /// The old contents are restored, and all pages arrive.
    fn complete(mut self, mut resumed: Umem) {
        resumed.event("resumed");
        // Pages without a demand.
        resumed.signal(Signal::SIGINT);
        resumed.event("completed");
        resumed.succeeds();
        self.still.incoming.event("completed");
        let arrived = std::fs::read(self.still.scratch.ram("destination")).unwrap();
        assert!(arrived == contents(0), "the destination has the snapshot's contents");
        Qmp::connect(&self.still.scratch.path("guest.qmp")).quit();
        self.still.incoming.succeeds();
    }
}

fn a_change_is_no_end(on_disk: bool, options: &[&str]) {
    for (word, change) in CHANGES {
        let mut served = Served::start(on_disk, options);
        change(&served.snapshot);
        served.migrate.signal(Signal::SIGINT);
        assert_eq!(served.migrate.wait().code(), Some(1));
        let error = served.migrate.stderr();
        assert!(error.contains(word), "{error}");
        assert!(error.contains(&format!("umem migrate --resume {}", served.session)), "{error}");
        let told = served.still.incoming.event("recovering");
        let reason = told["reason"].as_str().unwrap();
        assert!(reason.contains("the source gave up: RAM ram0"), "{reason}");
        assert!(reason.contains(word), "{reason}");
        let there = std::fs::read(served.still.scratch.ram("destination")).unwrap();
        assert!(there.iter().all(|&byte| byte == 0), "no page has arrived");
        open(&served.snapshot).write_all_at(&contents(0), 0).unwrap();
        let resumed = served.resume();
        served.complete(resumed);
    }
}

#[test]
fn changed_snapshot_in_memory_is_served_after_it_is_restored() {
    a_change_is_no_end(false, &[]);
}

#[test]
fn changed_snapshot_on_disk_is_served_after_it_is_restored() {
    a_change_is_no_end(true, &["--checksum"]);
}

/// The file was not watched meanwhile: the takeover checks it, and takes the second resume for confirmation.
#[test]
fn file_changed_between_two_umems_is_detected() {
    let mut served = Served::start(false, &[]);
    served.migrate.kill();
    open(&served.snapshot).write_all_at(b"another", 5 * 4096).unwrap();
    let refused = served.resume().fails();
    assert!(refused.contains("has changed since its guest left"), "{refused}");
    open(&served.snapshot).write_all_at(&contents(0), 0).unwrap();
    let resumed = served.resume();
    served.complete(resumed);
}

/// Pages are in flight, and the kernel and umem read a truncated range: no signal ends umem.
#[test]
fn truncated_file_gives_an_error_instead_of_a_signal() {
    for options in [&["-p"][..], &["-p", "--checksum"], &["-p", "--lanes", "4"], &[]] {
        let scratch = Scratch::new();
        let snapshot = scratch.ram("source");
        let page: Vec<u8> = (0..4096).map(|at| at as u8 | 1).collect();
        std::fs::write(&snapshot, page.repeat(256 << 8)).unwrap();
        let mut still = Still::start_of(scratch, 256, options.contains(&"--checksum"));
        let cutter = Cutter::to(&still.uri);
        let has_left = options.contains(&"-p");
        let mut migrate = still.migrate(options, cutter.uri());
        // Pages are held back, so that the lanes are full.
        migrate.event(if has_left { "running" } else { "stopped" });
        open(&snapshot).set_len(0).unwrap();
        cutter.let_pages_go();
        let status = migrate.wait();
        assert_eq!((status.code(), status.signal()), (Some(1), None), "{}", migrate.stderr());
        let error = migrate.stderr();
        assert!(error.contains("has been truncated while it was served: 0 of its"), "{error}");
        match has_left {
            true => still.incoming.event("recovering"),
            false => still.incoming.event("failed"),
        };
    }
}

/// All pages have arrived, and their correctness is unknown: neither side reports completion.
#[test]
fn file_changed_before_the_end_is_not_reported_complete() {
    let mut still = Still::start_checked(false);
    let cutter = Cutter::to(&still.uri);
    cutter.limit_answers(Some(UNTIL_RUNNING));
    cutter.let_pages_go();
    let migrate = still.migrate(&["-p"], cutter.uri());
    // Without digests.
    cutter.wait_for_answers(UNTIL_RUNNING + COMPLETION - (umem_wire::HEADER_BYTES + 8) as u64);
    open(&still.scratch.ram("source")).write_all_at(b"another", 5 * 4096).unwrap();
    cutter.limit_answers(None);
    let error = migrate.fails();
    assert!(error.contains("has changed while it was served"), "{error}");
    let told = still.incoming.event("failed");
    assert!(told["error"].as_str().unwrap().contains("has changed while it was served"), "{told}");
    Qmp::connect(&still.scratch.path("guest.qmp")).quit();
    still.incoming.fails();
}
