//! loom's atomics in place of the standard library's.
//!
//! loom weakens a sequentially consistent load or store to an acquiring or releasing one, and would report impossible
//! results. Read-modify-write operations see the latest value, in loom as everywhere. So a sequentially consistent
//! access is one of those here, and weaker accesses use loom's own.

pub(crate) use std::sync::PoisonError;
pub(crate) use std::sync::atomic::Ordering;

pub(crate) use loom::sync::{Mutex, MutexGuard, RwLock};

use Ordering::{AcqRel, Relaxed, SeqCst};

macro_rules! atomic {
    ($name:ident, $value:ty, $nothing:expr) => {
        #[derive(Default)]
        pub(crate) struct $name(loom::sync::atomic::$name);

        impl $name {
            pub(crate) fn new(value: $value) -> $name {
                $name(loom::sync::atomic::$name::new(value))
            }

            pub(crate) fn load(&self, order: Ordering) -> $value {
                match order {
                    SeqCst => self.0.fetch_or($nothing, AcqRel),
                    order => self.0.load(order),
                }
            }

            pub(crate) fn store(&self, value: $value, order: Ordering) {
                match order {
                    SeqCst => drop(self.0.swap(value, AcqRel)),
                    order => self.0.store(value, order),
                }
            }

            pub(crate) fn swap(&self, value: $value, order: Ordering) -> $value {
                self.0.swap(value, order)
            }

            pub(crate) fn fetch_or(&self, value: $value, order: Ordering) -> $value {
                self.0.fetch_or(value, order)
            }

            pub(crate) fn fetch_and(&self, value: $value, order: Ordering) -> $value {
                self.0.fetch_and(value, order)
            }

            pub(crate) fn compare_exchange(
                &self,
                before: $value,
                after: $value,
                order: Ordering,
                _: Ordering,
            ) -> Result<$value, $value> {
                self.0.compare_exchange(before, after, order, Relaxed)
            }

            pub(crate) fn fetch_update(
                &self,
                order: Ordering,
                _: Ordering,
                mut update: impl FnMut($value) -> Option<$value>,
            ) -> Result<$value, $value> {
                let mut now = self.load(SeqCst);
                while let Some(next) = update(now) {
                    match self.compare_exchange(now, next, order, Relaxed) {
                        Ok(before) => return Ok(before),
                        Err(changed) => now = changed,
                    }
                }
                Err(now)
            }
        }
    };
}

atomic!(AtomicU64, u64, 0);
atomic!(AtomicU32, u32, 0);
atomic!(AtomicBool, bool, false);

impl AtomicU32 {
    pub(crate) fn fetch_add(&self, value: u32, order: Ordering) -> u32 {
        self.0.fetch_add(value, order)
    }

    pub(crate) fn fetch_sub(&self, value: u32, order: Ordering) -> u32 {
        self.0.fetch_sub(value, order)
    }
}
