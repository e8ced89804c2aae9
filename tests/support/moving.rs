//! A demo guest that moves from one umem to another, through a relay that disturbs the move.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::arrival::{self, Arrival};
use super::{Cutter, DEADLINE, HugeFile, Qmp, Room, Scratch, Umem};

/// The interval at which a wait checks that both sides still run.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// A guest that moves from one umem to another through a [`Cutter`].
pub(crate) struct Move {
    /// The file system of its RAM file at the destination, if that is limited.
    pub(crate) room: Option<Room>,
    pub(crate) scratch: Scratch,
    pub(crate) guest: Umem,
    pub(crate) incoming: Umem,
    pub(crate) migrate: Umem,
    pub(crate) cutter: Cutter,
    pub(crate) mib: u64,
    _huge: Option<HugeFile>,
    /// The guest's file at the source.
    pub(crate) source_ram: PathBuf,
    _disk: Option<TempDir>,
}

/// The parameters of a move.
#[derive(Clone, Copy, Default)]
pub(crate) struct How {
    pub(crate) mib: u64,
    /// Options of both guests.
    pub(crate) threads: u32,
    pub(crate) kind: Option<&'static str>,
    /// For `umem incoming`.
    pub(crate) incoming: &'static [&'static str],
    /// For the guest there.
    pub(crate) arriving: &'static [&'static str],
    pub(crate) migrate: &'static [&'static str],
    /// Every page arrives before the guest runs at its destination.
    pub(crate) without_postcopy: bool,
    /// For both umem processes: a directory of certificates, or a secret.
    pub(crate) security: Option<[&'static str; 2]>,
    pub(crate) huge: bool,
    /// The guest's file at the source is on a disk.
    pub(crate) from_disk: bool,
    /// The size in MiB of the file system of its RAM file at the destination.
    pub(crate) room: Option<u64>,
}

impl Move {
    /// Up to the start of `umem migrate`.
    pub(crate) fn start(how: How) -> Move {
        Move::start_through(how, |_| {})
    }

    /// As above; `prepare` sets up the relay before any byte passes.
    pub(crate) fn start_through(how: How, prepare: impl FnOnce(&Cutter)) -> Move {
        let scratch = Scratch::new();
        let mib = how.mib.to_string();
        let threads = how.threads.to_string();
        let path = |name: &str| scratch.path(name).display().to_string();
        let [source_qmp, destination_qmp] = [path("source.qmp"), path("destination.qmp")];
        let huge = how.huge.then(|| HugeFile::with_room(how.mib));
        let disk = || tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let disk = how.from_disk.then(disk);
        let source_file = match &disk {
            Some(directory) => directory.path().join("source"),
            None => scratch.ram("source"),
        };
        let source_ram = format!("ram0={}", source_file.display());
        let common = ["--size", &mib, "--threads", &threads, "--seed", "7"];
        let mut arguments = vec!["guest", "--qmp", &source_qmp, "--ram", &source_ram];
        arguments.extend(common);
        let mut guest = Umem::start(arguments);
        guest.event("ready");

        let room = how.room.map(|mib| Room::of(mib, &scratch.path("room")));
        let ram = match (&huge, &room) {
            (Some(huge), _) => format!("ram0={}", huge.path().display()),
            (None, Some(room)) => format!("ram0={}", room.ram().display()),
            (None, None) => format!("ram0={}", scratch.ram("destination").display()),
        };
        let arrival = Arrival {
            qmp: &destination_qmp,
            ram: &ram,
            handoff: &path("handoff"),
            kind: how.kind,
            common: &common,
            incoming: how.incoming,
            arriving: how.arriving,
            security: how.security,
            wrapper: &[],
        };
        let (incoming, cutter) = arrival.start();
        prepare(&cutter);
        let mut arguments = vec!["migrate", "--json", "--qmp", &source_qmp, cutter.uri()];
        arguments.extend((!how.without_postcopy).then_some("-p"));
        arguments.extend(how.migrate);
        arguments.extend(how.security.iter().flatten());
        let migrate = Umem::start(arguments);
        Move {
            room,
            scratch,
            guest,
            incoming,
            migrate,
            cutter,
            mib: how.mib,
            _huge: huge,
            source_ram: source_file,
            _disk: disk,
        }
    }

    /// Up to the guest running at the destination. Its pages arrive on demand, until the cutter releases the others.
    pub(crate) fn switched(how: How) -> Move {
        let mut moving = Move::start(how);
        moving.migrate.event("running");
        moving.incoming.event("running");
        moving
    }

    /// Waits for this many cuts in total. Fails at once if a side ends before, and after the deadline with the progress
    /// so far, which separates a stall from a failure.
    pub(crate) fn wait_for_cuts(&mut self, count: u32) {
        let since = Instant::now();
        loop {
            let cuts = self.cutter.cuts_within(count, LOOK_INTERVAL);
            if cuts >= count {
                return;
            }
            for side in [&mut self.migrate, &mut self.incoming] {
                let is_running = side.is_running();
                let stderr = side.stderr();
                assert!(is_running, "a side ended after {cuts} of {count} cuts: {stderr}");
                assert!(since.elapsed() < DEADLINE, "only {cuts} of {count} cuts: {stderr}");
            }
        }
    }

    /// Waits for the end on both sides, and has the guest check its memory. Returns both reports.
    pub(crate) fn complete(mut self) -> (Value, Value) {
        let source = self.migrate.event("completed");
        let destination = self.incoming.event("completed");
        let [source_qmp, destination_qmp] =
            ["source.qmp", "destination.qmp"].map(|name| self.scratch.path(name));
        arrival::check(&destination_qmp, self.mib, &destination);
        self.migrate.succeeds();
        Qmp::connect(&source_qmp).quit();
        self.guest.succeeds();
        Qmp::connect(&destination_qmp).quit();
        self.incoming.succeeds();
        (source, destination)
    }
}
