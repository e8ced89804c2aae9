//! The fate of the TLS connection of a lane that is behind a pump.

use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};

use umem_wire::LaneRole;

/// The fate of a lane's TLS connection.
pub(crate) struct Fate {
    /// Why it broke, set before the lane sees its end.
    cause: OnceLock<String>,
    lane: OnceLock<String>,
    /// 0, or 1 + the lane's role, until the pump has read it.
    role: AtomicU8,
}

impl Fate {
    fn new() -> Fate {
        Fate { cause: OnceLock::new(), lane: OnceLock::new(), role: AtomicU8::new(0) }
    }

    pub(crate) fn unnamed() -> Arc<Fate> {
        Arc::new(Fate::new())
    }

    pub(crate) fn named(lane: String) -> Arc<Fate> {
        let fate = Fate::new();
        let _ = fate.lane.set(lane);
        Arc::new(fate)
    }

    /// Sets the lane's name and role: its pump then takes precedence as the lane's own thread does.
    pub(crate) fn assign(&self, lane: &str, role: LaneRole) {
        let _ = self.lane.set(lane.to_owned());
        self.role.store(1 + role as u8, Relaxed);
    }

    /// The lane's name, once it is known.
    pub(crate) fn lane(&self) -> Option<&str> {
        self.lane.get().map(String::as_str)
    }

    /// The role, if it was assigned since the last call.
    pub(crate) fn newly_assigned(&self) -> Option<u8> {
        if self.role.load(Relaxed) == 0 {
            return None;
        }
        Some(self.role.swap(0, Relaxed) - 1)
    }

    /// Sets the cause of the break. The first cause stays.
    pub(crate) fn broke(&self, cause: String) {
        let _ = self.cause.set(cause);
    }

    /// Why the connection broke, if it did.
    pub(crate) fn cause(&self) -> Option<&str> {
        self.cause.get().map(String::as_str)
    }
}
