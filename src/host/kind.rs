//! A kind of monitor, as the sides of a migration see it: how its guests are found, and how another process takes over
//! from this one. A new kind implements [`MonitorKind`] in a folder of its own, and has a line in
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

/// A source's requirements of the guest that leaves.
pub(crate) struct Leaving<'a> {
    /// The RAM files that the user has named; empty to ask the monitor.
    pub(crate) ram: &'a [RamPath],
    /// Pages are sent before the guest stops.
    pub(crate) has_rounds: bool,
    /// Pages may be sent after the switchover.
    pub(crate) follows: bool,
    /// The RAM files are freed as their pages leave.
    pub(crate) releases: bool,
    /// Page contents have checksums.
    pub(crate) is_checked: bool,
}

/// A guest that can leave.
pub(crate) struct LeavingGuest {
    pub(crate) monitor: Box<dyn Monitor>,
    /// The paths by which its files can be opened again.
    pub(crate) ram: Vec<RamPath>,
    pub(crate) files: Vec<RamFile>,
    /// The files that receive the contents of RAM without a file.
    pub(crate) staging: Option<Arc<Staging>>,
    /// For the user: how the guest would move faster, and which of its RAM is not sent in any pass.
    pub(crate) remarks: Vec<String>,
}

/// A connection to the monitor of a guest that is to arrive.
pub(crate) struct Connection {
    pub(crate) stream: UnixStream,
    /// Where the monitor listens; None for a connection that another process could not open.
    pub(crate) path: Option<PathBuf>,
}

/// The address at which a monitor itself listens for the device state, and the side that starts the guest then.
#[derive(Clone, Debug)]
pub(crate) struct Listening {
    pub(crate) path: PathBuf,
    pub(crate) switchover: Switchover,
}

/// A destination's requirements of the process into which a guest arrives.
#[derive(Clone)]
pub(crate) struct Arriving {
    pub(crate) kind: Kind,
    /// None for a monitor that takes the device state by umem's command.
    pub(crate) listening: Option<Listening>,
    /// The process hands its memory over itself; otherwise the preload object does.
    pub(crate) hands_over: bool,
}

/// A monitor that waits for a guest.
pub(crate) struct ArrivingGuest {
    pub(crate) monitor: Box<dyn Monitor>,
    /// The RAM that a source fills.
    pub(crate) ram: Vec<GuestRam>,
    /// The process that has made the monitor's socket, if it is visible from this process.
    pub(crate) pid: Option<u32>,
    /// Advice for the user: how a guest would move faster.
    pub(crate) advice: Option<String>,
}

/// RAM of a guest that is to arrive, as its monitor describes it.
pub(crate) struct GuestRam {
    pub(crate) name: String,
    /// The file that the monitor was given to open; empty if the RAM has no file with a name.
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    /// In the address space of the monitor's process. None if the monitor does not report it.
    pub(crate) address: Option<u64>,
    pub(crate) is_shared: bool,
}

impl GuestRam {
    /// Whether it has no file: it is the monitor's own private memory.
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
        "RAM backend {name} has an id of {bytes} bytes, and the two sides distinguish memory by \
         {REGION_NAME_BYTES_MAX} bytes: give it a shorter id on both sides, or name its file with --ram NAME=PATH on \
         both"
    )))
}

/// A kind of monitor. Its functions may block: a monitor may not answer.
pub(crate) trait MonitorKind: Debug + Sync {
    /// The kind's name in session records.
    fn name(&self) -> &'static str;

    /// Source: connects to a monitor, checks that its guest can be moved, and opens the guest's RAM.
    fn leaving(&self, socket: &Path, wanted: &Leaving<'_>) -> Result<LeavingGuest>;

    /// Source: the monitor of a guest that an earlier umem process may have given away, from that process's record. The
    /// monitor is contacted when there is a question, not before.
    fn departed(&self, state: &Value) -> Result<Box<dyn Monitor>>;

    /// Source: starts a guest that an earlier umem process has stopped and not given away, and undoes that process's
    /// changes.
    fn undo(&self, state: &Value) -> Result<Undone>;

    /// Destination: checks that this monitor waits for a guest which can arrive, and asks it for its RAM.
    fn arriving(&self, connection: Connection, wanted: Arriving) -> Result<ArrivingGuest>;

    /// Destination: the monitor of a guest that an earlier umem process has had loaded, from that process's record.
    /// `kept` is the connection that the guest's process has kept; `runs` is true if the guest ran at the source. The
    /// monitor is contacted when there is a question, not before.
    fn loaded(
        &self,
        state: &Value,
        kept: Option<UnixStream>,
        runs: bool,
    ) -> Result<Box<dyn Monitor>>;

    /// The error for a socket of this kind that could not be connected to, with the next command.
    fn cannot_connect(&self, socket: &Path, error: &io::Error) -> Error;
}
