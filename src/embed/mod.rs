//! umem as a part of another program: a virtual machine monitor, a test, a tool.
//!
//! A [`SourceSetup`] or a [`DestinationSetup`] names the memory to move and the connections. Its `start` returns a
//! [`Source`] or a [`Destination`]; umem's own threads then do the work. umem sends the program [`Event`]s: questions
//! and reports. The handle's `event_fd` is readable while there are events, for the program's main loop; the program
//! takes them when convenient. `umem.h` is the same interface in C.
//!
//! | event | at the | the program then | and calls |
//! |---|---|---|---|
//! | [`Connected`](Event::Connected) | both | has nothing to do | |
//! | [`ReadLog`](Event::ReadLog) | source | reports the contents of its log of writes | [`Source::written`], [`Source::log_read`] |
//! | [`Stop`](Event::Stop) | source | stops every vCPU, and all else that writes guest memory | [`Source::stopped`] |
//! | [`SaveState`](Event::SaveState) | source | saves its device state, if it has any | [`Source::saved`] |
//! | [`LoadState`](Event::LoadState) | destination | loads it; that may touch guest memory | [`Destination::loaded`] |
//! | [`Run`](Event::Run) | destination | starts its vCPUs: the switchover | [`Destination::running`] |
//! | [`Running`](Event::Running) | source | has nothing to do | |
//! | [`Recovering`](Event::Recovering) | both | has nothing to do | |
//! | [`Paused`](Event::Paused) | both | makes connections, or names an address | `reconnect`, `resume_at`, `resume` |
//! | [`Resumed`](Event::Resumed) | both | has nothing to do | |
//! | [`Completed`](Event::Completed) | both | drops the handle; a source its guest, too | |
//! | [`Failed`](Event::Failed) | both | reads the guest's owner from [`Failure::guest`] | |
//!
//! Instead of an answer the program may call `refuse` with a reason, which ends the migration.
//!
//! # Effects on the program
//!
//! umem writes nothing to the standard streams, sets no signal handler and takes no signal: its threads block every
//! signal. No panic leaves umem's threads; a panic becomes [`Error::Internal`]. A dropped handle leaves no threads. The
//! thread that serves demand pages requests the lowest real-time priority. The background threads request a nice value
//! of −10. Both apply to the thread alone.
//!
//! # What must hold
//!
//! From `start` on, a thread that touches a missing page of a destination sleeps until the page has arrived. So the
//! thread that takes events must not touch guest memory that is still to be loaded, and a device state is best loaded
//! on a thread of its own.
//!
//! # Pages before the stop
//!
//! With [`SourceSetup::precopy`] umem sends pages while the guest runs, and sends again the pages that the guest writes
//! meanwhile. The program reports the writes: after each write with [`Source::written`], or from a log, such as KVM's
//! dirty log, with [`Source::written_bitmap`]. The log must be on before [`SourceSetup::start`]. With
//! [`SourceSetup::log`] the event [`ReadLog`](Event::ReadLog) asks for the log's contents after each pass.
//! [`Stop`](Event::Stop) asks for the last writes: the program stops the guest, reports the writes, and then calls
//! [`Source::stopped`]. The memory at the destination must be of a file.
//!
//! # Lost connections
//!
//! Connections lost before the switchover end the migration, and the guest continues at the source. Later the source
//! may have given the guest up, so the migration continues without connections: the guest runs on with the pages that
//! it has, and new connections replace the lost ones. A source that was given an address dials it again until the
//! source is dropped; a destination that listens keeps listening. A side that was given connections is
//! [`Paused`](Event::Paused) until its program gives others with `reconnect`. That applies only if the programs of both
//! sides called `recover(true)`; otherwise a lost connection ends the migration. The program may also call `pause`, for
//! example to move the traffic elsewhere.
//!
//! Neither side gives up by itself then: a program that believes the other side lost for good drops the handle. A
//! destination that has loaded and has not been asked to run may wait for a source that never received its answer and
//! continues alone. Only an observer of both sides can decide that.
//!
//! When a destination fails after the switchover, the destination owns the guest, and the missing pages will not
//! arrive. A thread that touches them still waits, also after the handle is dropped: a page never reads as zeroes
//! because umem has failed. Only [`Destination::guest_has_stopped`] ends the wait.
//!
//! # Example
//!
//! A mebibyte moves between two sides in one process (real programs have one side each):
//!
//! ```
//! use std::os::fd::{AsFd, AsRawFd};
//! use std::os::unix::fs::FileExt;
//! use std::os::unix::net::UnixStream;
//! use std::ptr::NonNull;
//! use umem::embed::{DestinationSetup, Event, Memory, SourceSetup};
//! # use nix::sys::memfd::{MFdFlags, memfd_create};
//! # use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! const BYTES: usize = 1 << 20;
//! // The source's guest has its memory in a file …
//! let file = std::fs::File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC)?);
//! file.set_len(BYTES as u64)?;
//! file.write_all_at(b"moved", 4096)?;
//! // … and the destination's is anonymous.
//! let length = BYTES.try_into()?;
//! let (protection, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
//! let start = unsafe { mmap_anonymous(None, length, protection, flags)? };
//!
//! let (here, there) = (UnixStream::pair()?, UnixStream::pair()?);
//! let mut source = SourceSetup::new();
//! source.region("ram0", file.as_fd())?;
//! source.connections(vec![here.0.into(), there.0.into()])?;
//! let mut destination = DestinationSetup::new();
//! // SAFETY: the mapping has no other user, and stays until the end.
//! unsafe { destination.region("ram0", &Memory { start, bytes: BYTES as u64, file: None })? };
//! destination.connections(vec![here.1.into(), there.1.into()])?;
//!
//! let (source, destination) = (source.start()?, destination.start()?);
//! let sending = std::thread::spawn(move || -> umem::Result<()> {
//!     while let Some(event) = source.wait(None)? {
//!         match event {
//!             Event::Stop => source.stopped()?,
//!             Event::SaveState => source.saved(b"registers".to_vec())?,
//!             Event::Completed(_) => return Ok(()),
//!             Event::Failed(failure) => return Err(failure.error),
//!             _ => {}
//!         }
//!     }
//!     Ok(())
//! });
//! while let Some(event) = destination.wait(None)? {
//!     match event {
//!         Event::LoadState(state) => {
//!             assert_eq!(state, b"registers");
//!             destination.loaded()?;
//!         }
//!         Event::Run => destination.running()?,
//!         Event::Completed(report) => {
//!             assert_eq!(report.total_bytes, BYTES as u64);
//!             break;
//!         }
//!         Event::Failed(failure) => return Err(failure.error.into()),
//!         _ => {}
//!     }
//! }
//! sending.join().unwrap()?;
//! drop(destination);
//! // SAFETY: five bytes of our own mapping, which has no writer any more.
//! assert_eq!(unsafe { start.byte_add(4096).cast::<[u8; 5]>().read() }, *b"moved");
//! # unsafe { munmap(start, BYTES)? };
//! # Ok(()) }
//! ```

pub(crate) mod desk;
mod destination;
pub(crate) mod handle;
mod source;

use std::time::Duration;

pub use destination::{Destination, DestinationSetup, Memory};
pub use source::{Source, SourceSetup};

use crate::error::Error;
use crate::statistics::Completed;

/// A question or a report to the program; the [module](self) lists what the program does about each.
#[derive(Debug)]
pub enum Event {
    /// Every lane is open.
    Connected,
    /// Source, with [`SourceSetup::log`]: report what the guest has written since its log was read last. The guest runs
    /// on.
    ReadLog,
    /// Source: stop the guest.
    Stop,
    /// Source: save the device state of the stopped guest.
    SaveState,
    /// Destination: load this device state, which may be empty.
    LoadState(Vec<u8>),
    /// Destination: the guest belongs to this side; run it.
    Run,
    /// Source: the guest runs at the destination.
    Running {
        /// How long the guest stood still.
        downtime: Duration,
    },
    /// The connections are lost or given up, and the migration continues without them; missing pages wait longer. umem
    /// opens new connections, or waits for the source to do so. Of consecutive untaken events of this kind and the next
    /// two, only the last is kept.
    Recovering {
        /// The reason, in one line.
        reason: String,
    },
    /// As `Recovering`, and umem opens nothing until the program calls `resume`, `resume_at` or `reconnect`.
    Paused {
        /// The reason, in one line.
        reason: String,
    },
    /// All connections are open again.
    Resumed {
        /// How long there were no connections.
        disconnected: Duration,
    },
    /// Every page has arrived; the last event.
    Completed(Box<Completed>),
    /// The migration failed; the last event.
    Failed(Failure),
}

impl Event {
    /// Whether the event reports on lost connections.
    pub(crate) fn is_of_link(&self) -> bool {
        matches!(self, Event::Recovering { .. } | Event::Paused { .. } | Event::Resumed { .. })
    }
}

/// How the migration failed.
#[derive(Debug)]
pub struct Failure {
    /// The reason.
    pub error: Error,
    /// The guest's owner now.
    pub guest: Guest,
}

/// The guest's owner after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// The source, as before: a stopped guest continues. The destination discards its copy; its memory no longer blocks
    /// a thread and has no valid contents.
    AtSource,
    /// The destination, or possibly the destination: the source must never run the guest again. At the destination the
    /// guest waits where pages are missing.
    AtDestination,
}

/// Progress. All fields are zero until the lanes are open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// The guest's memory, bytes.
    pub total_bytes: u64,
    /// Bytes that have not arrived (destination) or have not been sent (source).
    pub missing_bytes: u64,
    /// Bytes that arrived as data.
    pub data_bytes: u64,
    /// Bytes that arrived as a zero header.
    pub zero_bytes: u64,
    /// Bytes that arrived as a hole header: the source's file has nothing there.
    pub hole_bytes: u64,
    /// Pages that were demanded.
    pub pages_demand: u64,
    /// Pages that arrived without a demand.
    pub pages_background: u64,
    /// With [checksums](SourceSetup::checksum): frames and pages that changed in transit to this side and were sent
    /// again.
    pub checksum_errors: u64,
}
