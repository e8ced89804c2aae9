//! `tracing` for the command: to stderr, when asked for with `--verbose` or RUST_LOG.
//!
//! As a library umem only emits events: the program around it decides where they go.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use tracing_subscriber::EnvFilter;

use crate::runtime::print;

static IS_ON: AtomicBool = AtomicBool::new(false);

/// What `--verbose` stands for.
const VERBOSE: &str = "umem=debug";

/// Begins, if there is something to show: RUST_LOG decides what, and `verbose` where it is not set.
pub(crate) fn begin(verbose: bool) {
    let directives = std::env::var("RUST_LOG").ok().filter(|text| !text.trim().is_empty());
    let directives = match (directives, verbose) {
        (Some(directives), _) => directives,
        (None, true) => VERBOSE.to_owned(),
        (None, false) => return,
    };
    let filter = EnvFilter::builder().parse_lossy(directives);
    // There is one already where umem has been called twice in a process, as tests may.
    let begun = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_thread_names(true)
        .with_writer(|| print::Stderr)
        .try_init();
    IS_ON.store(begun.is_ok(), Relaxed);
}

/// Whether lines of a trace come to stderr.
pub(crate) fn is_on() -> bool {
    IS_ON.load(Relaxed)
}
