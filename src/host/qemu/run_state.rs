//! The states a QEMU's guest can be in, and what a move makes of them.
//!
//! QEMU carries the state in its stream, so that a guest arrives as what it was: paused, panicked, shut down. It
//! is let run there if it was *live*: it ran, or it slept (S3), from which QEMU goes back to sleep by `cont`.

use serde_json::json;

use crate::error::{Error, Result};
use crate::host::qmp::Qmp;

/// The first QEMU that carries a guest which sleeps. Those before it wake it as they save its device state, and
/// its device state is that of one which sleeps.
const CARRIES_SUSPENDED: (u64, u64) = (9, 0);

/// `query-status`.
pub(super) fn status(qmp: &mut Qmp) -> Result<String> {
    let status = qmp.execute("query-status", json!({}))?;
    Ok(status["status"].as_str().unwrap_or_default().to_owned())
}

/// Whether it goes on by itself.
pub(super) fn is_live(status: &str) -> bool {
    matches!(status, "running" | "suspended")
}

/// The status of a migration, as `query-migrate` has it, while there is one.
pub(super) fn is_under_way(migration: &str) -> bool {
    !matches!(migration, "none" | "completed" | "failed" | "cancelled")
}

/// Checks that a guest in that state can be moved away, and its QEMU is not about to move it itself.
pub(super) fn check(qmp: &mut Qmp) -> Result<String> {
    let migration = qmp.execute("query-migrate", json!({}))?;
    let migration = migration["status"].as_str().unwrap_or("none");
    if is_under_way(migration) {
        return Err(Error::Unsupported(format!(
            "a migration of QEMU's own is under way (query-migrate says {migration}), or of another umem: let \
             it end, or end it with the monitor command migrate_cancel"
        )));
    }
    let status = status(qmp)?;
    match status.as_str() {
        "running" | "paused" | "prelaunch" | "shutdown" | "guest-panicked" | "io-error"
        | "internal-error" | "watchdog" => Ok(status),
        // A migration that failed has left it in this state, where QEMU does not go back to the one before.
        "postmigrate" if migration != "completed" => Ok(status),
        "postmigrate" => Err(Error::Unsupported(
            "its guest has been migrated away (query-status says postmigrate), and may run elsewhere: if it \
             does not, let it run here first with the monitor command cont"
                .into(),
        )),
        "suspended" if version(qmp)? < CARRIES_SUSPENDED => {
            let (major, minor) = CARRIES_SUSPENDED;
            Err(Error::Unsupported(format!(
                "its guest is suspended, and this QEMU would wake it as it saves its device state: wake it \
                 first with the monitor command system_wakeup, or use QEMU {major}.{minor} or later"
            )))
        }
        "suspended" => Ok(status),
        _ => Err(Error::Unsupported(format!(
            "its guest cannot be moved in its state {status:?} (query-status): move it when that has ended"
        ))),
    }
}

pub(super) fn version(qmp: &mut Qmp) -> Result<(u64, u64)> {
    let version = qmp.execute("query-version", json!({}))?;
    let part = |name: &str| version["qemu"][name].as_u64().unwrap_or(0);
    Ok((part("major"), part("minor")))
}
