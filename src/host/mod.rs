//! The guest's host process: whoever runs the vCPUs (QEMU, the demo's own guest).
//!
//! umem never touches a vCPU itself. It asks the monitor to stop, to save its device state into a
//! socket, to load it on the other side and to run, over QMP:
//! - [`qmp`]: the client
//! - [`qemu`]: what is asked of a QEMU, and what its configuration must look like
//! - [`maps`]: what its process has mapped, and the very files
//! - [`command`]: the monitor that `umem incoming … -- COMMAND` starts, with the preload object
//! - [`thread`]: the thread that waits for the monitor, so that nobody else has to
//! - [`pieces`]: some of these one by one, for tests
//! - [`embedder`]: a program that umem is a part of, in the monitor's place
//! - [`switchover`]: who has the guest run
//! - [`guest`]: the demo's guest, which speaks the same QMP

pub(crate) mod command;
pub(crate) mod embedder;
pub mod guest;
pub(crate) mod maps;
#[doc(hidden)]
pub mod pieces;
pub(crate) mod qemu;
pub(crate) mod qmp;
pub(crate) mod switchover;
pub(crate) mod thread;

use std::os::fd::OwnedFd;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::memory::dirty::DirtyLog;
use qemu::Changes;
use qmp::Process;

/// What umem has changed in the source's monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Undo {
    /// The guest went on by itself when it was stopped.
    pub(crate) was_live: bool,
    /// By which the monitor knows what this session has changed there; none where it has no claims.
    pub(crate) claim: Option<String>,
    /// Of its settings.
    pub(crate) changes: Changes,
    /// Which process it is, as far as its socket says: without it the guest cannot run here.
    pub(crate) process: Option<Process>,
}

/// Writes down what a stop, and what comes after it, changes in a monitor.
pub(crate) type BeforeStop = Box<dyn Fn(&Undo) -> Result<()> + Send>;

/// What the source asks of the guest's monitor.
pub(crate) trait SourceHost: Send {
    /// Has `note` called before every stop, which fails if that does: what would have to be undone is
    /// written down then, should this process be killed.
    fn before_stop(&mut self, _note: BeforeStop) {}
    /// Who knows which pages the guest writes while it runs; none where nobody does.
    fn dirty_log(&mut self) -> Option<Box<dyn DirtyLog>> {
        None
    }
    /// Stops every vCPU, after whatever can be done while they still run, and saves the device state. From here on
    /// neither that nor the guest's memory changes. Says since when the guest stands still, where that is later
    /// than this call.
    fn stop(&mut self) -> Result<Option<Instant>>;
    /// The device state of the stopped guest.
    fn save_state(&mut self) -> Result<Vec<u8>>;
    /// Makes sure that the guest stands still, has done so since the stop, and goes on only if somebody tells it
    /// to. Asked right before the guest is given away, and again before that is said once more.
    fn stands_still(&mut self) -> Result<()> {
        Ok(())
    }
    /// Undoes stop and save: the guest goes on here as if nothing had happened.
    fn resume(&mut self) -> Result<()>;
    /// Puts back what was changed beside the guest, which has been given away.
    fn put_back(&mut self) -> Result<()> {
        Ok(())
    }
}

/// What the destination asks of the guest's monitor.
pub(crate) trait DestinationHost: Send {
    /// Does what can be done before the device state is there: the guest still runs at the source.
    fn prepare(&mut self) -> Result<()> {
        Ok(())
    }
    /// Loads the device state. May touch guest memory, so faults are served meanwhile.
    fn load_state(&mut self, state: Vec<u8>) -> Result<()>;
    /// Starts the vCPUs.
    fn run(&mut self) -> Result<()>;
    /// Another descriptor of the connection to the monitor, where whoever takes over could not open one
    /// of its own.
    fn connection(&self) -> Result<Option<OwnedFd>> {
        Ok(None)
    }
}

/// A source without a monitor: only a RAM file, e.g. a snapshot. There is nothing to stop.
pub(crate) struct FileOnly;

impl SourceHost for FileOnly {
    fn stop(&mut self) -> Result<Option<Instant>> {
        Ok(None)
    }

    fn save_state(&mut self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    fn resume(&mut self) -> Result<()> {
        Ok(())
    }
}

/// A destination whose guest runs by itself: there is nothing to load or start.
pub(crate) struct RunsItself;

impl DestinationHost for RunsItself {
    fn load_state(&mut self, state: Vec<u8>) -> Result<()> {
        if state.is_empty() {
            return Ok(());
        }
        Err(crate::Error::Host(format!(
            "the source sends {} bytes of device state, and the guest here has no monitor to load \
             them: give its QMP socket with --qmp",
            state.len()
        )))
    }

    fn run(&mut self) -> Result<()> {
        Ok(())
    }
}
