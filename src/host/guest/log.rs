//! The dirty log of the demo's guest: its monitor reports the written pages.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use serde_json::{Value, json};
use umem_wire::RegionId;

use super::ram::PAGE_BYTES;
use crate::error::{Error, Result};
use crate::host::qmp::Qmp;
use crate::memory::dirty::{DirtyLog, DirtyMap};

/// The command that returns the pages written since the previous call, and clears the list.
pub(super) const COMMAND: &str = "umem-dirty";

/// The log of a demo guest's monitor, over a connection of its own.
struct GuestLog {
    qmp: Qmp,
    marks: Option<Arc<DirtyMap>>,
}

/// The log of the guest behind this monitor; None if the guest is not the demo's.
pub(crate) fn of(qmp: &mut Qmp) -> Option<Box<dyn DirtyLog>> {
    qmp.try_execute(COMMAND, json!({})).ok()?.ok()?;
    let path = qmp.path()?;
    let qmp = Qmp::open(UnixStream::connect(&path).ok()?, &path.display().to_string()).ok()?;
    Some(Box::new(GuestLog { qmp, marks: None }))
}

impl GuestLog {
    fn look(&mut self) -> Result<()> {
        let mut from = Some(0);
        while let Some(page) = from {
            let answer = self.qmp.execute(COMMAND, json!({ "from": page }))?;
            from = answer["next"].as_u64().filter(|&next| next > page);
            self.mark(&answer["runs"])?;
        }
        Ok(())
    }

    fn mark(&self, runs: &Value) -> Result<()> {
        let Some(marks) = &self.marks else { return Ok(()) };
        let strange = || Error::Host(format!("{COMMAND}: not a list of pages"));
        for run in runs.as_array().ok_or_else(strange)? {
            let number = |index: usize| run.get(index).and_then(Value::as_u64);
            let (first, pages) = number(0).zip(number(1)).ok_or_else(strange)?;
            let bytes = (first.checked_mul(PAGE_BYTES)).zip(pages.checked_mul(PAGE_BYTES));
            let (offset, len) = bytes.ok_or_else(strange)?;
            if !marks.mark_bytes(RegionId(0), offset, len) {
                return Err(strange());
            }
        }
        Ok(())
    }
}

impl DirtyLog for GuestLog {
    fn start(&mut self, marks: Arc<DirtyMap>) -> Result<()> {
        self.marks = Some(marks);
        self.look()
    }

    fn next(&mut self) -> Result<()> {
        self.look()
    }

    fn finish(&mut self) -> Result<()> {
        self.look()
    }
}
