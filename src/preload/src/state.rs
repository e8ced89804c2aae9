//! umem's progress with this program.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Starts the thread that reads umem's commands on a socket, once. Fails with an errno.
pub(crate) type Listen = fn(socket: i32) -> Result<(), i32>;

static LISTEN: OnceLock<Listen> = OnceLock::new();

/// Sets the function that starts the command thread. Called when the object has been loaded.
pub(crate) fn listens_by(listen: Listen) {
    let _ = LISTEN.set(listen);
}

/// Starts the command thread, after the first hand-over.
pub(crate) fn listen(socket: i32) -> Result<(), i32> {
    LISTEN.get().map_or(Ok(()), |listen| listen(socket))
}

/// Whether umem has sent `keep`: this process stays even if umem ends.
static KEEPS: AtomicBool = AtomicBool::new(false);

/// Whether all of the guest's memory has been handed over: umem does not fill later mappings.
static SETTLED: AtomicBool = AtomicBool::new(false);

/// True once umem knows the guest's memory.
pub(crate) fn is_settled() -> bool {
    SETTLED.load(Ordering::Relaxed)
}

/// Whether umem has sent a command.
static HAS_BEGUN: AtomicBool = AtomicBool::new(false);

/// True once umem has begun its work. Before that it may not read the kernel's events.
pub(crate) fn has_begun() -> bool {
    HAS_BEGUN.load(Ordering::Relaxed)
}

/// True once the guest may be running here.
pub(crate) fn guest_may_run() -> bool {
    KEEPS.load(Ordering::Relaxed)
}

/// Notes that umem has begun its work.
pub(crate) fn begin() {
    HAS_BEGUN.store(true, Ordering::Relaxed);
}

/// Notes that the guest may run here from now on.
pub(crate) fn keep() {
    KEEPS.store(true, Ordering::Relaxed);
}

/// Notes that umem knows the guest's memory.
pub(crate) fn settle() {
    SETTLED.store(true, Ordering::Relaxed);
}
