//! Ctrl-C. The handler only records it; long operations check for it, and unwind as from an error,
//! so that the guards of processes and files clean up.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::error::{Context, Result, failure};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    INTERRUPTED.store(true, Relaxed);
}

/// Catches SIGINT and SIGTERM from now on.
pub(crate) fn catch() -> Result<()> {
    // Without SA_RESTART, so that a blocking system call returns.
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler stores to an atomic and does nothing else.
        unsafe { sigaction(signal, &action) }.context(|| "catching signals")?;
    }
    Ok(())
}

/// An error once SIGINT or SIGTERM has come.
pub(crate) fn check() -> Result<()> {
    if INTERRUPTED.load(Relaxed) { failure("interrupted") } else { Ok(()) }
}
