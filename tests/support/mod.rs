//! What the tests with real processes share.
//!
//! - [`Scratch`]: where a test's files lie; at its end its processes are ended and its files removed
//! - [`Umem`]: a `umem` process, its events and what it complained of
//! - [`Machine`] and [`Qemu`]: a QEMU's options, and a running one with a [`Qmp`] connection
//! - [`Serial`]: what our Linux guest says on its console
//! - [`Guests`]: two of umem's own guests, of which one is to become the other
//! - [`Chromium`]: a browser that opens reports
//! - [`LaneFromSource`]: the other end of a `umem migrate`, for a test to play
//! - [`LaneToDestination`]: the other end of a `umem incoming`
//! - [`peer`]: the same with all of its lanes, and pages
//! - [`waiting`]: guests that wait behind `umem incoming`, and snapshots to move to them
//! - [`Authority`]: makes certificates
//! - [`HugePages`] and [`HugeFile`]: huge pages of the machine, which it gets back afterwards
//! - [`MemoryLimit`]: a control group in which processes of a test have so much memory and no more
//! - [`Room`]: a file system for RAM files with as much room as a test says
//! - [`Tap`]: a relay between two umem processes that counts what passes and can hold it back
//! - [`Cutter`]: a relay that breaks connections, or changes bits, at known bytes or when told to
//! - [`Move`]: a guest on its way through a [`Cutter`]
//! - [`killed::Move`]: the same, by umems that are killed and go on as others
//! - [`Network`]: two hosts with a router between them, in network namespaces of the test's own
//! - [`seed`], [`seeded`] and [`Random`]: a test's seed, and numbers that depend on it alone
//! - [`Fifo`]: lets another program go on
//! - [`embedded`]: both sides in the test's own process, and the wire between them
//!
//! Tests wait for events, never for time: [`DEADLINE`] is only when a test gives up. Whatever a test
//! started ends with it, also when it panics.

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
    qemu::{Machine, Qemu, QemuVersion, Ram, Side, SourceRam},
    qmp::Qmp,
    random::{Random, seed, seeded},
    room::Room,
    scratch::Scratch,
    serial::{Beat, Serial},
    source::LaneToDestination,
    tap::Tap,
    umem::{Umem, limit_descriptors},
};

/// When a wait is given up: long after what it waits for should have happened, on any machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// How often something is looked at that gives no notice by itself.
const INTERVAL: Duration = Duration::from_millis(10);

/// Another program of the workspace: beside umem, where a build of all of it puts it.
pub(crate) fn program(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_umem")).with_file_name(name);
    assert!(path.exists(), "{} is missing: `cargo build --workspace` first", path.display());
    path
}

/// Looks until there is a value.
///
/// # Panics
/// When [`DEADLINE`] has passed without one.
pub(crate) fn wait_for<T>(what: impl Display, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = look() {
            return value;
        }
        assert!(started.elapsed() < DEADLINE, "waited {DEADLINE:?} in vain for {what}");
        std::thread::sleep(INTERVAL);
    }
}
