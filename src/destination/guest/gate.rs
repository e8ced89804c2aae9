//! A userfaultfd of the guest's process, and its *gate*: who makes pages visible holds it open, who reads
//! events closes it ([why](super)).

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::fault::uffd::Uffd;
use crate::memory::words::Events;

/// A userfaultfd of the guest's process.
pub(crate) struct FaultSource {
    pub(crate) uffd: Uffd,
    /// Where its events are read into, if another process may have to carry them out.
    pub(crate) events: Option<Events>,
    gate: RwLock<()>,
}

impl FaultSource {
    pub(crate) fn new(uffd: Uffd) -> FaultSource {
        FaultSource { uffd, events: None, gate: RwLock::new(()) }
    }

    /// For who makes pages visible.
    pub(super) fn open_gate(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For who reads what the kernel reports.
    pub(crate) fn close_gate(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }
}
