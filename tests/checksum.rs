//! Bits that change in transit (`--checksum`): the sides detect them before the guest sees them, and send the damaged
//! frames again.
//!
//! A relay between the two umem processes changes bits at seeded places, in pages, headers, hellos and answers. The
//! demo guest checks every word that it reads while its memory arrives, and all of it at the end. Without `--checksum`
//! there is nothing to test: a changed bit of a page reaches the guest.

#[path = "checksum/changed.rs"]
mod changed;
mod support;

use std::os::unix::fs::FileExt;
use std::process::Command;

use serde_json::{Value, json};
use support::{Cutter, How, Move, Qmp, Scratch, Umem, seed, seeded, wait_for};
use umem_wire::{HEADER_BYTES, HELLO_BYTES};

const UMEM: &str = env!("CARGO_BIN_EXE_umem");

/// Moves a guest while `count` bits change on the path to the destination, each up to `most` bytes after the previous
/// one, and then some on the path back.
fn flip_often(how: How, count: usize, most: u64) {
    let seed = seed(how.mib ^ most);
    let back = count / 3;
    let moving = Move::start_through(how, |cutter| {
        cutter.flip_after(seeded(seed, most).take(count));
        // Requests, and 32 bytes of have frames for each MiB whenever lanes are reopened.
        cutter.flip_answers_after(seeded(!seed, 20 * how.mib).take(back));
        cutter.let_pages_go();
    });
    moving.cutter.wait_for_flips(u32::try_from(count + back).unwrap());
    let (source, destination) = moving.complete();
    let wrong = |report: &Value| report["checksum_errors"].as_u64().unwrap();
    assert!(wrong(&destination) > 0, "{destination}");
    for report in [&source, &destination] {
        assert!(report["recoveries"].as_u64() > Some(0), "{report}");
        assert_eq!(report["checksum"], true);
    }
    is_equal(&source, &destination);
}

/// Both sides have the digests of both, and they are equal.
fn is_equal(source: &Value, destination: &Value) {
    let [there, here] = [source, destination].map(|report| report["digests"][0].clone());
    assert_eq!(there["region"], "ram0");
    assert_ne!(there["digest"], "0000000000000000");
    for digest in [&there, &here] {
        assert_eq!(digest["digest"], digest["peer"], "{there} {here}");
    }
    assert_eq!(there["digest"], here["digest"]);
}

#[test]
fn checksums_cover_shared_memory() {
    let migrate = &["--checksum", "--lanes", "2"];
    flip_often(How { mib: 96, threads: 2, migrate, ..How::default() }, 12, 6 << 20);
}

#[test]
fn checksums_cover_huge_pages() {
    let migrate = &["--checksum"];
    flip_often(How { mib: 64, threads: 1, migrate, huge: true, ..How::default() }, 9, 5 << 20);
}

#[test]
fn checksums_cover_private_memory() {
    let (migrate, kind) = (&["--checksum"], Some("private"));
    let incoming = &["--postcopy-flags", "1"];
    flip_often(How { mib: 48, threads: 1, kind, migrate, incoming, ..How::default() }, 6, 6 << 20);
}

#[test]
fn checksums_cover_anonymous_memory() {
    let (migrate, kind) = (&["--checksum"], Some("anonymous"));
    let arriving = &["--discard"];
    flip_often(How { mib: 48, threads: 2, kind, migrate, arriving, ..How::default() }, 6, 6 << 20);
}

/// Pages that the source has freed are part of its digest.
#[test]
fn checksums_cover_memory_freed_by_the_source() {
    let migrate = &["--checksum", "--release-ram"];
    flip_often(How { mib: 64, threads: 1, migrate, ..How::default() }, 9, 5 << 20);
}

/// A file that moves to an idle guest, so that every control byte is known.
struct Still {
    scratch: Scratch,
    incoming: Umem,
    uri: String,
}

impl Still {
    fn start() -> Still {
        Still::start_checked(true)
    }

    fn start_checked(checked: bool) -> Still {
        let scratch = Scratch::new();
        let bytes: Vec<u8> = (0..8 << 20).map(|at: u32| (at / 4096 * 31 + at) as u8).collect();
        std::fs::write(scratch.ram("source"), bytes).unwrap();
        Still::start_of(scratch, 8, checked)
    }

    /// For a source's file of this many MiB, existing or to be created.
    fn start_of(scratch: Scratch, mib: u64, checked: bool) -> Still {
        let mib = mib.to_string();
        let ram = format!("ram0={}", scratch.ram("destination").display());
        let qmp = scratch.path("guest.qmp").display().to_string();
        let mut arguments = vec!["incoming", "--json", "--ram", &ram];
        arguments.extend(checked.then_some("--checksum"));
        arguments.extend(["tcp:127.0.0.1:0", "--", UMEM, "guest", "--incoming", "--threads", "0"]);
        arguments.extend(["--ram", &ram, "--size", &mib, "--qmp", &qmp]);
        let mut incoming = Umem::start(arguments);
        let uri = incoming.event("listening")["uri"].as_str().unwrap().to_owned();
        Still { scratch, incoming, uri }
    }

    fn migrate(&self, options: &[&str], uri: &str) -> Umem {
        let ram = format!("ram0={}", self.scratch.ram("source").display());
        let mut arguments = vec!["migrate", "--json", "--ram", &ram];
        arguments.extend(options);
        arguments.push(uri);
        Umem::start(arguments)
    }
}

/// All pages come before the switchover, and no bit changes in transit.
#[test]
fn digests_match_without_postcopy() {
    let mut still = Still::start();
    let plain = still.migrate(&[], &still.uri).fails();
    assert!(plain.contains("this side requires checksums: use --checksum there"), "{plain}");
    let mut migrate = still.migrate(&["--checksum"], &still.uri);
    let (source, destination) = (migrate.event("completed"), still.incoming.event("completed"));
    is_equal(&source, &destination);
    assert_eq!(destination["checksum_errors"], 0);
    migrate.succeeds();
}

/// Before the switchover a wrong checksum ends the migration, and the guest continues at the source.
#[test]
fn before_the_switchover_the_guest_stays() {
    let migrate = &["--checksum"];
    let how = How { mib: 8, threads: 1, migrate, ..How::default() };
    // In the name of the region, behind the hellos of two lanes.
    let place = (2 * HELLO_BYTES + HEADER_BYTES + 2) as u64;
    let moving = Move::start_through(how, |cutter| cutter.flip_at_once_after(place));
    let Move { scratch, guest: _guest, mut incoming, migrate, .. } = moving;
    let error = migrate.fails();
    assert!(error.contains("the checksum of a regions frame is wrong"), "{error}");
    assert_eq!(incoming.wait().code(), Some(1));
    let mut qmp = Qmp::connect(&scratch.path("source.qmp"));
    assert_eq!(qmp.execute("umem-verify", json!({}))["bad_pages"], 0);
}

/// A path that damages everything is not retried forever, and the guest is not lost.
#[test]
fn path_with_persistent_corruption_is_paused() {
    let elsewhere = Scratch::new();
    let control: &'static str = elsewhere.path("control").display().to_string().leak();
    let incoming: &'static [&'static str] = vec!["--control", control].leak();
    let migrate = &["--checksum"];
    let how = How { mib: 16, threads: 1, migrate, incoming, ..How::default() };
    let mut moving = Move::switched(how);
    // Hellos are shorter than that, and every run is longer.
    moving.cutter.flip_every(Some(3000));
    moving.cutter.let_pages_go();
    moving.incoming.event("checksum_error");
    moving.incoming.event("paused");
    wait_for("word of it", || {
        let stderr = moving.incoming.stderr();
        stderr.contains("8 consecutive connections failed checksum verification").then_some(())
    });
    moving.cutter.flip_every(None);
    let resumed = Command::new(UMEM).args(["control", control, "resume"]).status().unwrap();
    assert!(resumed.success());
    let (source, destination) = moving.complete();
    is_equal(&source, &destination);
    assert!(destination["checksum_errors"].as_u64() >= Some(8), "{destination}");
}

/// The destination's frames on its demand lane up to *running*, if its guest demands nothing: a welcome, ready with the
/// unit of one region, loaded, running. And when it is complete: one digest, complete.
const UNTIL_RUNNING: u64 = (HELLO_BYTES + (HEADER_BYTES + 1) + 2 * HEADER_BYTES) as u64;
const COMPLETION: u64 = (HEADER_BYTES + 8 + HEADER_BYTES + 40) as u64;

/// Damage of any origin is detected.
#[test]
fn both_sides_report_differing_digests() {
    let mut still = Still::start();
    let cutter = Cutter::to(&still.uri);
    cutter.limit_answers(Some(UNTIL_RUNNING));
    cutter.let_pages_go();
    let mut migrate = still.migrate(&["-p", "--checksum"], cutter.uri());
    cutter.wait_for_answers(UNTIL_RUNNING + COMPLETION);
    // All pages have arrived. A write stands for a damaged page:
    let file = std::fs::File::options().write(true).open(still.scratch.ram("source")).unwrap();
    file.write_all_at(b"another", 5 * 4096).unwrap();
    cutter.limit_answers(None);
    for side in [&mut migrate, &mut still.incoming] {
        let digest = side.event("completed")["digests"][0].clone();
        assert_ne!(digest["digest"], digest["peer"], "{digest}");
    }
    let damaged = "the digests of RAM ram0 differ between the two sides";
    assert!(migrate.fails().contains(damaged));
    let told = still.incoming.event("damaged");
    assert!(told["error"].as_str().unwrap().contains(damaged), "{told}");
    // The guest keeps running, and at its end umem's exit status reports the damage.
    Qmp::connect(&still.scratch.path("guest.qmp")).quit();
    assert!(still.incoming.fails().contains(damaged));
}
