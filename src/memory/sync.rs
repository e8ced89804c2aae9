//! The atomics and locks of page states, in one place.
//!
//! Here they are the standard library's. `tests/models` compiles the files that use them with
//! The model tests replace this module by loom's types, and check every interleaving of the threads.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
pub(crate) use std::sync::{Mutex, MutexGuard, PoisonError};
