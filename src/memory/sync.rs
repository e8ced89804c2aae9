//! The atomics and locks of page states, in one place.
//!
//! Here they are the standard library's. `tests/models` compiles the files that use them with
//! loom's in this module's place, and checks every interleaving of their threads.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
pub(crate) use std::sync::{Mutex, MutexGuard, PoisonError};
