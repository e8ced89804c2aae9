//! The states of a QEMU's guest, and how a move treats them.
//!
//! QEMU carries the state in its stream, so a guest arrives in its earlier state: paused, panicked, shut down. umem
//! starts a guest at the destination if it was *live*: it ran, or it slept (S3), to which QEMU returns on `cont`.

use serde_json::json;

use crate::error::{Error, Result};
use crate::host::qmp::Qmp;

/// The first QEMU that carries a sleeping guest. Earlier ones wake the guest when they save its device state, and that
/// device state is a sleeping guest's.
const CARRIES_SUSPENDED: (u64, u64) = (9, 0);

/// `query-status`.
pub(super) fn status(qmp: &mut Qmp) -> Result<String> {
    let status = qmp.execute("query-status", json!({}))?;
    Ok(status["status"].as_str().unwrap_or_default().to_owned())
}

/// Whether the guest continues by itself.
pub(super) fn is_live(status: &str) -> bool {
    matches!(status, "running" | "suspended")
}

/// Whether a migration with this status in `query-migrate` is under way.
pub(super) fn is_under_way(migration: &str) -> bool {
    !matches!(migration, "none" | "completed" | "failed" | "cancelled")
}

/// Checks that a guest in that state can be moved away, and that QEMU is not migrating it already.
pub(super) fn check(qmp: &mut Qmp) -> Result<String> {
    let migration = qmp.execute("query-migrate", json!({}))?;
    let migration = migration["status"].as_str().unwrap_or("none");
    if is_under_way(migration) {
        return Err(Error::Unsupported(format!(
            "a migration of this guest is in progress, by QEMU or by another umem (query-migrate reports \
             {migration}): let it end, or end it with the monitor command migrate_cancel"
        )));
    }
    let status = status(qmp)?;
    match status.as_str() {
        "running" | "paused" | "prelaunch" | "shutdown" | "guest-panicked" | "io-error"
        | "internal-error" | "watchdog" => Ok(status),
        // A failed migration has left the guest in this state, with a QEMU that does not restore the earlier one.
        "postmigrate" if migration != "completed" => Ok(status),
        "postmigrate" => Err(Error::Unsupported(
            "its guest was migrated (query-status reports postmigrate), and may run elsewhere: if the guest runs \
             nowhere else, first resume it here with the monitor command cont"
                .into(),
        )),
        "suspended" if version(qmp)? < CARRIES_SUSPENDED => {
            let (major, minor) = CARRIES_SUSPENDED;
            Err(Error::Unsupported(format!(
                "its guest is suspended, and this QEMU would wake the guest when it saves the device state: wake the \
                 guest first with the monitor command system_wakeup, or use QEMU {major}.{minor} or later"
            )))
        }
        "suspended" => Ok(status),
        _ => Err(Error::Unsupported(format!(
            "its guest cannot be moved in the state {status:?} (query-status): move the guest when that state has \
             ended"
        ))),
    }
}

pub(super) fn version(qmp: &mut Qmp) -> Result<(u64, u64)> {
    let version = qmp.execute("query-version", json!({}))?;
    let part = |name: &str| version["qemu"][name].as_u64().unwrap_or(0);
    Ok((part("major"), part("minor")))
}
