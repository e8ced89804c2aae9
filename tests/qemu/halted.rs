//! Migrations that a test stops at a known place.

use nix::sys::signal::Signal;
use serde_json::json;
use umem_wire::{HEADER_BYTES, HELLO_BYTES, Kind};

use crate::destination::Destination;
use crate::support::{Machine, Qemu, Qmp, Scratch, Tap, Umem, wait_for};
use crate::{migrate, says};

/// Frames of the destination that precede its guest's running: a welcome, ready, loaded.
const UNTIL_CONNECTED: usize = HELLO_BYTES;
/// A ready frame has a byte for each region, and the guests here that are halted have one.
const UNTIL_READY: usize = HELLO_BYTES + HEADER_BYTES + 1;

/// A migration that stands still at a known place, because the destination's next step is held back.
pub(super) struct Halted {
    pub(super) tap: Tap,
    pub(super) umem: Umem,
    pub(super) destination: Destination,
    /// The session's number, once the source's guest has stopped.
    pub(super) session: String,
}

impl Halted {
    /// All lanes are open and the source's guest runs.
    pub(super) fn when_connected(
        machine: &Machine,
        scratch: &Scratch,
        source: &mut Qemu,
    ) -> Halted {
        let mut halted = Halted::after(UNTIL_CONNECTED, machine, scratch, source);
        halted.umem.event("connected");
        halted.destination.umem.event("connected");
        assert_eq!(source.qmp.status(), "running");
        halted
    }

    /// The source's guest has stopped, and its device state is saved.
    pub(super) fn when_stopped(machine: &Machine, scratch: &Scratch, source: &mut Qemu) -> Halted {
        let mut halted = Halted::after(UNTIL_READY, machine, scratch, source);
        let stopped = halted.umem.event("stopped");
        halted.session = stopped["session"].as_str().expect("text").to_owned();
        halted.destination.umem.event("stopped");
        wait_for("the device state to be saved", || {
            (source.qmp.status() == "finish-migrate").then_some(())
        });
        halted
    }

    /// The destination's QEMU has loaded the device state, and may have demanded pages, but the source has not been
    /// notified.
    pub(super) fn when_loaded(machine: &Machine, scratch: &Scratch, source: &Qemu) -> Halted {
        let tap = |uri: &str| Tap::holding(uri, UNTIL_READY, Kind::Loaded);
        let mut halted = Halted::with(tap, machine, scratch, source);
        halted.destination.umem.event("stopped");
        let mut guest = Qmp::connect(&halted.destination.qmp);
        wait_for("the device state to be loaded", || {
            let loading = guest.execute("query-migrate", json!({}));
            (loading["status"] == "completed").then_some(())
        });
        halted
    }

    /// Interrupts the source, so that the guest continues there.
    pub(super) fn ends_at_the_source(mut self) {
        self.umem.signal(Signal::SIGINT);
        says(&self.umem.fails(), "interrupted; the guest continues at the source");
        self.tap.cut();
        self.destination.umem.fails();
    }

    fn after(answers: usize, machine: &Machine, scratch: &Scratch, source: &Qemu) -> Halted {
        Halted::with(|uri| Tap::to(uri, Some(answers)), machine, scratch, source)
    }

    fn with(
        tap: impl FnOnce(&str) -> Tap,
        machine: &Machine,
        scratch: &Scratch,
        source: &Qemu,
    ) -> Halted {
        let destination = Destination::start(machine, scratch);
        let tap = tap(&destination.uri);
        let umem = migrate(source, tap.uri(), &["-p"]);
        Halted { tap, umem, destination, session: String::new() }
    }
}
