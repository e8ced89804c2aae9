//! The check that a QEMU's guest has stood still since umem stopped it, made before the guest is given away.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::saving::{self, Saving};
use super::{Qemu, STATUS_INTERVAL, claim, run_state};
use crate::error::{Error, Result};

/// Time limit for a guest's run state to follow the end of its migration: that takes the main loop's lock once.
const SETTLES_WITHIN: Duration = Duration::from_secs(10);

impl Qemu {
    /// Completes QEMU's migration, if it is not complete, and checks that the guest has stood still since then.
    pub(super) fn is_given_away(&mut self) -> Result<()> {
        let is_taken = match (&self.claim, &self.left_claim) {
            (Some(claim), _) => !claim.is_held(),
            (None, Some(name)) => claim::is_anothers(&mut self.qmp, name)?,
            (None, None) => false,
        };
        if is_taken {
            return Err(Error::Host(
                "another client has removed umem's claim on the guest (the character device umem-mover)"
                    .into(),
            ));
        }
        let before = self.given_away.take();
        let was_held = matches!(self.saving, Saving::Held(_));
        let migration = match std::mem::take(&mut self.saving) {
            Saving::Held(socket) => {
                self.saving = Saving::Begun;
                if let Err(error) = saving::finish(&socket) {
                    return Err(self.why_unfinished(error)?);
                }
                self.wait_migrated()?;
                self.saving = Saving::Over;
                self.wait_settled()?;
                self.qmp.execute("query-migrate", json!({}))?
            }
            saving => {
                self.saving = saving;
                self.qmp.execute("query-migrate", json!({}))?
            }
        };
        // The last check: a guest that was resumed after the migration's end shows in its status, or in the event that
        // came before the answer.
        let status = run_state::status(&mut self.qmp)?;
        self.has_run |= self.qmp.has_run();
        let is_as_before = match &before {
            Some((before, of)) => *before == status && figures(of) == figures(&migration),
            // A monitor without claims is not a QEMU, and has no such run state.
            None if !was_held && self.left_claim.is_none() => !run_state::is_live(&status),
            None => status == "postmigrate" && migration["status"] == "completed",
        };
        if self.has_run || !is_as_before {
            return Err(is_not_ours((&status, &migration)));
        }
        self.given_away = Some((status, migration));
        Ok(())
    }

    /// The reason why a migration cannot be completed: another client may have ended it.
    fn why_unfinished(&mut self, error: Error) -> Result<Error> {
        let migration = self.qmp.execute("query-migrate", json!({}))?;
        let status = migration["status"].as_str().unwrap_or("none");
        Ok(match status {
            "cancelled" | "cancelling" | "failed" => Error::Host(format!(
                "its migration was ended by another client before the guest was given away (query-migrate reports \
                 {status})"
            )),
            _ => error,
        })
    }

    /// QEMU reports a migration as completed before it has recorded its figures, and before the guest's run state
    /// changes.
    fn wait_settled(&mut self) -> Result<()> {
        let started = Instant::now();
        while run_state::status(&mut self.qmp)? == "finish-migrate" {
            if started.elapsed() > SETTLES_WITHIN {
                let within = SETTLES_WITHIN.as_secs();
                return Err(Error::Host(format!(
                    "its migration has completed, and the guest is still in finish-migrate {within} s later"
                )));
            }
            std::thread::sleep(STATUS_INTERVAL);
        }
        Ok(())
    }
}

/// The figures that identify a completed migration: QEMU writes them once, at its end. The transferred bytes still grow
/// as QEMU closes its stream.
fn figures(migration: &Value) -> [&Value; 4] {
    ["status", "total-time", "setup-time", "downtime"].map(|name| &migration[name])
}

/// The error for a guest or migration whose reported state differs from the one that umem has left.
pub(super) fn is_not_ours((status, migration): (&str, &Value)) -> Error {
    let migration = migration["status"].as_str().unwrap_or("none");
    Error::Host(format!(
        "another client has resumed or moved the guest (the guest is {status}, the migration is {migration}): umem \
         does not give the guest away"
    ))
}
