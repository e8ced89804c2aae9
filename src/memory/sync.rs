//! What the state of pages is made of: atomics and locks, in one place.
//!
//! Here they are the standard library's. `tests/models` compiles the files that use them with loom's in this
//! module's place, and has every order of their threads' steps tried.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
pub(crate) use std::sync::{Mutex, MutexGuard, PoisonError};
