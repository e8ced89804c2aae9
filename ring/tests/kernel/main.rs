//! The ring against the real kernel: every operation, every way to end one, and every limit.
//!
//! No test sleeps. A wait has a limit only so that a lost completion fails the test instead of
//! hanging it.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a test may say what it does")]

mod cancel;
mod chains;
mod lifetime;
mod limits;
mod operations;
mod threads;
mod util;
mod zero_copy;
