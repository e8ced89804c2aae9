//! `tracing` for the command: to stderr, with `--verbose` or RUST_LOG.
//!
//! As a library umem only emits events: the embedding program decides where they go.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use tracing_subscriber::EnvFilter;

use crate::runtime::print;

static IS_ON: AtomicBool = AtomicBool::new(false);

/// The filter of `--verbose`.
const VERBOSE: &str = "umem=debug";

/// Starts tracing if RUST_LOG is set or `verbose` is true. RUST_LOG takes precedence.
pub(crate) fn begin(verbose: bool) {
    let directives = std::env::var("RUST_LOG").ok().filter(|text| !text.trim().is_empty());
    let directives = match (directives, verbose) {
        (Some(directives), _) => directives,
        (None, true) => VERBOSE.to_owned(),
        (None, false) => return,
    };
    let filter = EnvFilter::builder().parse_lossy(directives);
    // A second call in the same process, as in tests, finds a subscriber.
    let begun = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_thread_names(true)
        .with_writer(|| print::Stderr)
        .try_init();
    IS_ON.store(begun.is_ok(), Relaxed);
}

/// Whether trace lines go to stderr.
pub(crate) fn is_on() -> bool {
    IS_ON.load(Relaxed)
}
