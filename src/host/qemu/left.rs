//! The QEMU that an earlier umem process of the session has left. It is contacted when there is a question, and not
//! before.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use super::Qemu;
use super::record::Record;
use crate::error::{Error, Result};
use crate::host::monitor::Monitor;
use crate::host::qmp::{Process, Qmp};

/// Source: the QEMU of a guest that may have been given away.
pub(super) struct Departed {
    record: Record,
    qemu: Option<Qemu>,
}

impl Departed {
    pub(super) fn new(record: Record) -> Departed {
        Departed { record, qemu: None }
    }

    /// None if there is no QEMU, or none that could run the guest.
    fn qemu(&mut self) -> Result<Option<&mut Qemu>> {
        let (Some(path), Some(undo)) = (&self.record.socket, &self.record.undo) else {
            return Ok(None);
        };
        if self.qemu.is_none() {
            match Qmp::connect(path) {
                Ok(qmp) => self.qemu = Some(Qemu::left(qmp, undo)),
                Err(_) if undo.process.is_some_and(Process::has_ended) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.qemu.as_mut())
    }
}

impl Monitor for Departed {
    fn name(&self) -> &'static str {
        "the QEMU of a guest that another process has stopped"
    }

    fn stands_still(&mut self) -> Result<()> {
        self.qemu()?.map_or(Ok(()), Qemu::stands_still)
    }

    fn resume(&mut self) -> Result<()> {
        let Some(qemu) = self.qemu()? else { return Ok(()) };
        if qemu.is_ours()? { qemu.resume() } else { Ok(()) }
    }

    fn put_back(&mut self) -> Result<()> {
        self.qemu()?.map_or(Ok(()), Qemu::put_back)
    }
}

/// Destination: the QEMU of a guest that has been loaded. QEMU may itself wait for a page, and answers no client until
/// then.
pub(super) struct Waiting {
    /// The path of its socket; without one, `kept` is the connection.
    pub(super) path: Option<PathBuf>,
    pub(super) kept: Option<UnixStream>,
    /// The guest ran at the source.
    pub(super) runs: bool,
}

impl Monitor for Waiting {
    fn name(&self) -> &'static str {
        "the QEMU of a guest that another process has loaded"
    }

    fn run(&mut self) -> Result<()> {
        let qmp = match (&self.path, self.kept.take()) {
            (Some(path), _) => Qmp::connect(path)?,
            (None, Some(stream)) => Qmp::go_on(stream)?,
            (None, None) => {
                return Err(Error::Host(
                    "its QMP socket was not kept: resume the guest with the monitor command `cont`"
                        .into(),
                ));
            }
        };
        Qemu::loaded(qmp, self.runs).run()
    }
}
