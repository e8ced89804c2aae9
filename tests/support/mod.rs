//! Shared parts of the tests with real processes.
//!
//! - [`Scratch`]: the directory of a test's files; at its end the test's processes are ended and its files removed
//! - [`Umem`]: a `umem` process, its events and its errors
//! - [`Machine`] and [`Qemu`]: a QEMU's options, and a running one with a [`Qmp`] connection
//! - [`Serial`]: the console of the Linux guest
//! - [`Guests`]: two demo guests, the source's and the destination's
//! - [`Chromium`]: a browser that opens reports
//! - [`LaneFromSource`]: the peer of a `umem migrate`, played by the test
//! - [`LaneToDestination`]: the peer of a `umem incoming`, played by the test
//! - [`peer`]: such a source with all of its lanes, and pages
//! - [`waiting`]: guests that wait behind `umem incoming`, and snapshots that move to them
//! - [`Authority`]: signs certificates
//! - [`HugePages`] and [`HugeFile`]: huge pages of the machine, returned afterwards
//! - [`MemoryLimit`]: a control group that limits the memory of processes of a test
//! - [`Room`]: a file system of limited size for RAM files
//! - [`Tap`]: a relay between two umem processes that counts bytes and can hold them back
//! - [`Cutter`]: a relay that breaks connections, or changes bits, at known bytes or on request
//! - [`Move`]: a guest that moves through a [`Cutter`]
//! - [`killed::Move`]: the same, with umems that are killed and taken over
//! - [`Network`]: two hosts with a router between them, in network namespaces of the test
//! - [`seed`], [`seeded`] and [`Random`]: a test's seed, and numbers that depend on it alone
//! - [`Fifo`]: unblocks another program
//! - [`SlowDisk`]: a disk whose reads take their time, for a QEMU
//! - [`embedded`]: both sides in the test's own process, and the wire between them
//!
//! Tests wait for events, never for time: after [`DEADLINE`] a test fails. Processes that a test started end with it,
//! also when it panics.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a test may say what it does")]
#![allow(dead_code, reason = "each test file uses its own part of this")]

mod arrival;
mod certificates;
mod chromium;
mod cutter;
mod destination;
pub(crate) mod embedded;
mod fifo;
mod guests;
mod hugepages;
pub(crate) mod killed;
mod limit;
mod moving;
mod network;
pub(crate) mod peer;
mod process;
mod qemu;
mod qmp;
mod random;
mod room;
pub(crate) mod sandbox;
mod scratch;
mod serial;
mod slow_disk;
mod source;
mod tap;
mod umem;
pub(crate) mod waiting;

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[allow(unused_imports, reason = "each test file uses its own part of this")]
pub(crate) use {
    certificates::{Authority, write_private},
    chromium::{Chromium, Scheme},
    cutter::{Cutter, Ends},
    destination::LaneFromSource,
    fifo::Fifo,
    guests::Guests,
    hugepages::{HugeFile, HugePages},
    limit::MemoryLimit,
    moving::{How, Move},
    network::{Namespace, Network},
    process::Process,
    qemu::{Machine, Qemu, QemuVersion, Ram, Side, SourceRam, provided},
    qmp::Qmp,
    random::{Random, seed, seeded},
    room::Room,
    scratch::Scratch,
    serial::{Beat, Serial},
    slow_disk::SlowDisk,
    source::LaneToDestination,
    tap::Tap,
    umem::{Umem, limit_descriptors},
};

/// A wait fails after this time: long after the awaited event should have happened, on any machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// The interval of polling.
const INTERVAL: Duration = Duration::from_millis(10);

/// Another program of the workspace, in the directory of umem's executable.
pub(crate) fn program(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_umem")).with_file_name(name);
    assert!(path.exists(), "{} is missing: `cargo build --workspace` first", path.display());
    path
}

/// Polls until there is a value.
///
/// # Panics
/// After [`DEADLINE`].
pub(crate) fn wait_for<T>(what: impl Display, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = look() {
            return value;
        }
        assert!(started.elapsed() < DEADLINE, "{DEADLINE:?} passed without {what}");
        std::thread::sleep(INTERVAL);
    }
}
