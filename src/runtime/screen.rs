//! This process's terminal: a bar, and lines above it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use indicatif::ProgressBar;

use super::print;

/// The bar on this process's terminal.
static ON_SCREEN: Mutex<Option<ProgressBar>> = Mutex::new(None);

fn on_screen() -> MutexGuard<'static, Option<ProgressBar>> {
    ON_SCREEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Shows a bar from now on.
pub(crate) fn show(bar: ProgressBar) {
    *on_screen() = Some(bar);
}

/// Removes the bar.
pub(crate) fn clear() {
    on_screen().take();
}

/// Prints a line to stderr, above the bar if there is one.
pub(crate) fn say(line: &str) {
    let bar = on_screen().clone();
    match bar {
        Some(bar) if print::stderr_is_ready() => bar.suspend(|| print::err_line(line)),
        _ => print::err_line(line),
    }
}
