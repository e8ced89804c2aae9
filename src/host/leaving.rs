//! How a source finds the guest that leaves, for every kind of monitor.

use super::command::RamPath;
use super::kind::{Leaving, LeavingGuest, MonitorSocket};
use super::monitor::{Monitor, MonitorRecord, NoMonitor};
use super::registry::kind_of;
use crate::error::{Error, Result};
use crate::events::Undone;
use crate::memory::claim;
use crate::memory::region::RamFile;

/// Finds the guest: its monitor, checked, and its RAM files. May block: a monitor may not answer.
///
/// # Errors
/// The guest does not exist, or cannot be moved. The monitor is unchanged.
pub(crate) fn open(socket: Option<&MonitorSocket>, wanted: &Leaving<'_>) -> Result<LeavingGuest> {
    match socket {
        Some(socket) => socket.kind.leaving(&socket.path, wanted),
        None => files_alone(wanted),
    }
}

/// RAM files without a monitor, such as a snapshot.
fn files_alone(wanted: &Leaving<'_>) -> Result<LeavingGuest> {
    if wanted.ram.is_empty() {
        return Err(Error::Usage(
            "nothing to move: give the guest's QMP socket with --qmp, or RAM files with --ram \
             NAME=PATH"
                .into(),
        ));
    }
    for RamPath { name, path } in wanted.ram {
        claim::check_path(name, path, claim::User::Source)?;
    }
    let open = |ram: &RamPath| RamFile::open_source(&ram.name, &ram.path, wanted.releases);
    let files = wanted.ram.iter().map(open).collect::<Result<_>>()?;
    let (monitor, ram) = (Box::new(NoMonitor), wanted.ram.to_vec());
    Ok(LeavingGuest { monitor, ram, files, staging: None, remarks: Vec::new() })
}

/// The monitor of a guest that an earlier umem process may have given away, from that process's record; None for a
/// guest without a monitor.
pub(crate) fn departed(record: Option<&MonitorRecord>) -> Result<Box<dyn Monitor>> {
    match record {
        Some(record) => kind_of(record)?.departed(&record.state),
        None => Ok(Box::new(NoMonitor)),
    }
}

/// Starts a guest that an earlier umem process has stopped and not given away. May block.
pub(crate) fn undo(record: Option<&MonitorRecord>) -> Result<Undone> {
    match record {
        Some(record) => kind_of(record)?.undo(&record.state),
        None => Ok(Undone::GoesOn),
    }
}
