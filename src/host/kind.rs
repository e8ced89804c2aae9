//! A kind of monitor, as the sides of a migration see it: how its guests are found, and how another process goes on with
//! one. A new kind implements [`MonitorKind`] in a folder of its own, and has a line in
//! [`registry`](super::registry).

use std::fmt::Debug;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use umem_wire::limits::REGION_NAME_BYTES_MAX;

use super::command::RamPath;
use super::monitor::Monitor;
use super::switchover::Switchover;
use crate::error::{Error, Result};
use crate::events::Undone;
use crate::memory::kind::Kind;
use crate::memory::region::RamFile;
use crate::memory::staging::Staging;

/// The unix socket of a guest's monitor, and the kind of that monitor.
#[derive(Clone, Debug)]
pub struct MonitorSocket {
    pub(crate) kind: &'static dyn MonitorKind,
    pub(crate) path: PathBuf,
}

/// What a source wants of the guest that leaves.
pub(crate) struct Leaving<'a> {
    /// The RAM files that the user has named; empty to ask the monitor.
    pub(crate) ram: &'a [RamPath],
    /// Pages are sent before the guest stops.
    pub(crate) has_rounds: bool,
    /// Pages may be sent after the switchover.
    pub(crate) follows: bool,
    /// The RAM files are freed as their pages leave.
    pub(crate) releases: bool,
    /// Contents have checksums.
    pub(crate) is_checked: bool,
}

/// A guest that can leave.
pub(crate) struct LeavingGuest {
    pub(crate) monitor: Box<dyn Monitor>,
    /// The paths by which its files can be opened again.
    pub(crate) ram: Vec<RamPath>,
    pub(crate) files: Vec<RamFile>,
    /// Where the contents come of RAM that has no file.
    pub(crate) staging: Option<Arc<Staging>>,
    /// For the user: how the guest would move faster, and which of its RAM no pass sends.
    pub(crate) remarks: Vec<String>,
}

/// A connection to the monitor of a guest that is to arrive.
pub(crate) struct Connection {
    pub(crate) stream: UnixStream,
    /// Where the monitor listens; None for a connection that another process could not open.
    pub(crate) path: Option<PathBuf>,
}

/// Where a monitor listens for the device state by itself, and who has the guest run then.
#[derive(Clone, Debug)]
pub(crate) struct Listening {
    pub(crate) path: PathBuf,
    pub(crate) switchover: Switchover,
}

/// What a destination wants of the process into which a guest arrives.
#[derive(Clone)]
pub(crate) struct Arriving {
    pub(crate) kind: Kind,
    /// None for a monitor that is told by umem to take the device state.
    pub(crate) listening: Option<Listening>,
    /// The process hands its memory over itself; otherwise the preload object does.
    pub(crate) hands_over: bool,
}

/// A monitor that waits for a guest.
pub(crate) struct ArrivingGuest {
    pub(crate) monitor: Box<dyn Monitor>,
    /// The RAM that a source fills.
    pub(crate) ram: Vec<GuestRam>,
    /// The process that has made the monitor's socket, if this process sees it.
    pub(crate) pid: Option<u32>,
    /// How a guest would move faster, for the user.
    pub(crate) advice: Option<String>,
}

/// RAM of a guest that is to arrive, as its monitor describes it.
pub(crate) struct GuestRam {
    pub(crate) name: String,
    /// The file that the monitor was told to open; empty where the RAM has none with a name.
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    /// In the address space of the monitor's process. None where the monitor does not say.
    pub(crate) address: Option<u64>,
    pub(crate) is_shared: bool,
}

impl GuestRam {
    /// Whether it has no file: the monitor's own private memory.
    pub(crate) fn is_anonymous(&self) -> bool {
        self.path.as_os_str().is_empty() && !self.is_shared
    }
}

/// Whether the id of a RAM backend can be the region's name.
pub(crate) fn check_ram_name(name: &str) -> Result<()> {
    let bytes = name.len();
    if bytes <= REGION_NAME_BYTES_MAX {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "RAM backend {name} has an id of {bytes} bytes, and the two sides tell memory apart by {REGION_NAME_BYTES_MAX} \
         bytes: give it a shorter id on both sides, or name its file with --ram NAME=PATH on both"
    )))
}

/// A kind of monitor. Its functions may block, as a monitor need not answer.
pub(crate) trait MonitorKind: Debug + Sync {
    /// The kind, in the records of sessions.
    fn name(&self) -> &'static str;

    /// Source: connects to a monitor, checks that its guest can be moved, and opens the guest's RAM.
    fn leaving(&self, socket: &Path, wanted: &Leaving<'_>) -> Result<LeavingGuest>;

    /// Source: the monitor of a guest that a process before this may have given away, from that one's record. Asked when
    /// there is something to ask, not before.
    fn departed(&self, state: &Value) -> Result<Box<dyn Monitor>>;

    /// Source: has a guest run that a process before this has stopped and not given away, and puts back what that process
    /// has changed.
    fn undo(&self, state: &Value) -> Result<Undone>;

    /// Destination: checks that this monitor waits for a guest which can arrive, and asks it for its RAM.
    fn arriving(&self, connection: Connection, wanted: Arriving) -> Result<ArrivingGuest>;

    /// Destination: the monitor of a guest that a process before this has had loaded, from that one's record. `kept` is
    /// the connection that the guest's process has kept; `runs` says whether the guest ran at the source. Asked when there
    /// is something to ask, not before.
    fn loaded(
        &self,
        state: &Value,
        kept: Option<UnixStream>,
        runs: bool,
    ) -> Result<Box<dyn Monitor>>;

    /// Why a socket of this kind could not be connected to, and what to do.
    fn cannot_connect(&self, socket: &Path, error: &io::Error) -> Error;
}
