//! How far umem has come with this program.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Starts the thread that listens to umem on a socket, once, or says the errno.
pub(crate) type Listen = fn(socket: i32) -> Result<(), i32>;

static LISTEN: OnceLock<Listen> = OnceLock::new();

/// How umem is listened to. To be called when the object has been loaded.
pub(crate) fn listens_by(listen: Listen) {
    let _ = LISTEN.set(listen);
}

/// umem is listened to from now on: something has been handed over.
pub(crate) fn listen(socket: i32) -> Result<(), i32> {
    LISTEN.get().map_or(Ok(()), |listen| listen(socket))
}

/// umem has said `keep`: whatever becomes of it, this process stays.
static KEEPS: AtomicBool = AtomicBool::new(false);

/// All of the guest's memory has been handed over: what is mapped from now on is none that umem brings.
static SETTLED: AtomicBool = AtomicBool::new(false);

/// True once umem knows which memory the guest has.
pub(crate) fn is_settled() -> bool {
    SETTLED.load(Ordering::Relaxed)
}

/// umem has said something.
static HAS_BEGUN: AtomicBool = AtomicBool::new(false);

/// True once umem has begun its work. Before that it may not look at what the kernel reports to it.
pub(crate) fn has_begun() -> bool {
    HAS_BEGUN.load(Ordering::Relaxed)
}

/// True once the guest may be running here.
pub(crate) fn guest_may_run() -> bool {
    KEEPS.load(Ordering::Relaxed)
}

/// umem has begun its work.
pub(crate) fn begin() {
    HAS_BEGUN.store(true, Ordering::Relaxed);
}

/// The guest may run here from now on.
pub(crate) fn keep() {
    KEEPS.store(true, Ordering::Relaxed);
}

/// umem knows which memory the guest has.
pub(crate) fn settle() {
    SETTLED.store(true, Ordering::Relaxed);
}
