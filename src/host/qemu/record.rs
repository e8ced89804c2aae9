//! QEMU's part of a session's record.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Changes;
use crate::error::{Error, Result};
use crate::host::monitor::MonitorRecord;
use crate::host::qmp::Process;
use crate::runtime::os_text;

/// The name of this kind of monitor in records.
pub(super) const KIND: &str = "qemu";

/// umem's changes in the source's monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Undo {
    /// The guest was live when it was stopped.
    pub(crate) was_live: bool,
    /// The name of the session's claim in the monitor; None if the monitor has no claims.
    pub(crate) claim: Option<String>,
    /// The changes of its settings.
    pub(crate) changes: Changes,
    /// The process at its socket, if it is visible: when it has ended, the guest cannot run here.
    pub(crate) process: Option<Process>,
}

/// What another process needs to take over a QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// None for a connection that the guest's process keeps.
    pub(super) socket: Option<PathBuf>,
    /// None before the first change.
    pub(super) undo: Option<Undo>,
}

/// The same, as in the file.
#[derive(Serialize, Deserialize)]
struct Written {
    socket: Option<String>,
    undo: Option<Undo>,
}

impl Record {
    pub(super) fn write(self) -> MonitorRecord {
        let socket = self.socket.map(|socket| os_text::encode(socket.as_os_str()));
        let written = Written { socket, undo: self.undo };
        let state = serde_json::to_value(written).expect("it is plain data");
        MonitorRecord { kind: KIND.into(), state }
    }

    /// # Errors
    /// It is no record of a QEMU.
    pub(super) fn read(state: &Value) -> Result<Record> {
        let written = Written::deserialize(state).map_err(|error| {
            Error::Environment(format!("the session file: its guest's QEMU: {error}"))
        })?;
        let socket = written.socket.map(|socket| os_text::decode(&socket).into());
        Ok(Record { socket, undo: written.undo })
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn record_with_a_path_that_is_not_utf8_reads_as_written() {
        let socket = PathBuf::from(OsStr::from_bytes(b"/run/\xff/qmp.sock"));
        let undo = Undo {
            was_live: true,
            claim: Some("umem-mover-1".into()),
            changes: Changes::default(),
            process: None,
        };
        for undo in [None, Some(undo)] {
            let record = Record { socket: Some(socket.clone()), undo };
            let written = record.clone().write();
            assert_eq!(written.kind, KIND);
            assert_eq!(Record::read(&written.state).unwrap(), record);
        }
        let says = Record::read(&serde_json::json!({ "socket": 1 })).unwrap_err().to_string();
        assert!(says.contains("session file"), "{says}");
    }
}
