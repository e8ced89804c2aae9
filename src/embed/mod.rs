//! umem as a part of another program: a virtual machine monitor, a test, a tool.
//!
//! A [`SourceSetup`] or a [`DestinationSetup`] is told which memory to move and over which
//! connections; its `start` answers with a [`Source`] or a [`Destination`], and from then on
//! everything happens on threads of umem's own. The program is asked and told by [`Event`]s, which it
//! takes whenever it likes: the handle's `event_fd` is readable while there are any, for the program's
//! main loop. The C interface, `umem.h`, is the same thing in C.
//!
//! | event | at the | the program then | and calls |
//! |---|---|---|---|
//! | [`Connected`](Event::Connected) | both | has nothing to do | |
//! | [`ReadLog`](Event::ReadLog) | source | says what its log of writes has, if it has one | [`Source::written`], [`Source::log_read`] |
//! | [`Stop`](Event::Stop) | source | stops every vCPU, and all else that writes guest memory | [`Source::stopped`] |
//! | [`SaveState`](Event::SaveState) | source | saves its device state, if it has any | [`Source::saved`] |
//! | [`LoadState`](Event::LoadState) | destination | loads it; that may touch guest memory | [`Destination::loaded`] |
//! | [`Run`](Event::Run) | destination | starts its vCPUs: the switchover | [`Destination::running`] |
//! | [`Running`](Event::Running) | source | has nothing to do | |
//! | [`Recovering`](Event::Recovering) | both | has nothing to do | |
//! | [`Paused`](Event::Paused) | both | makes connections, or says where to | `reconnect`, `resume_at`, `resume` |
//! | [`Resumed`](Event::Resumed) | both | has nothing to do | |
//! | [`Completed`](Event::Completed) | both | drops the handle; a source its guest, too | |
//! | [`Failed`](Event::Failed) | both | sees [`Failure::guest`] for whose the guest is | |
//!
//! Instead of an answer it may call `refuse` with a reason, which ends the migration.
//!
//! # What happens to the program around it
//!
//! Nothing is written to its standard streams, no signal handler is set and no signal is taken: umem's
//! threads have every signal blocked. No panic leaves umem's threads; one becomes
//! [`Error::Internal`]. When a handle has been dropped none of its threads is
//! left. The thread that serves demand pages asks for the lowest real-time priority, and those that carry
//! the background for a nice value of −10, each for itself alone.
//!
//! # What must hold
//!
//! From `start` on a destination's memory waits: whoever touches a missing page sleeps until it has
//! come. The thread that takes events must therefore not touch guest memory that nobody loads, and a
//! device state is best loaded on a thread of its own.
//!
//! # Pages before the stop
//!
//! With [`SourceSetup::precopy`] pages are sent while the guest runs, and again those that it writes meanwhile. The
//! program knows which these are, and says so: after each write with [`Source::written`], or from a log, such as
//! KVM's dirty log, with [`Source::written_bitmap`]. The log is on before [`SourceSetup::start`]. A program that has
//! one is asked for what is in it with [`ReadLog`](Event::ReadLog) after each pass, if it says so beforehand
//! ([`SourceSetup::log`]). [`Stop`](Event::Stop) asks for the last of it: the guest stands still, everything that is
//! left is said, and then [`Source::stopped`] is called. The memory at the destination is of a file.
//!
//! # Lost connections
//!
//! Before the switchover they end the migration, and the guest goes on at the source. Later the source may
//! have given it up, so the migration goes on without them: the guest runs on with what it has, and other
//! connections take the place of the lost ones. A source that was given an address dials it again, until
//! it is dropped; a destination that listens goes on listening. Who was given connections is
//! [`Paused`](Event::Paused) until the program gives others, with `reconnect`; that is only so where both
//! sides' programs have asked for it, with `recover(true)`, as otherwise a lost connection ends the migration
//! as before. The program may also `pause` by itself, to move the traffic elsewhere for example.
//!
//! Nobody gives up by himself then: who believes that the other side will not come back drops the handle. A
//! destination that has loaded and has not been asked to run may wait for a source that never heard of it and
//! goes on alone: only who knows both can tell.
//!
//! When a destination fails after the switchover, the guest belongs to it and misses pages that nobody
//! will bring. They stay waited for, also when the handle has been dropped: a page never reads as
//! zeroes because umem has failed. Only [`Destination::guest_has_stopped`] ends the waiting.
//!
//! # Example
//!
//! A mebibyte moves between two ends in one process, which a program would hardly do:
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
//! // SAFETY: nobody else knows of the mapping, and it stays until the end.
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
//! // SAFETY: five bytes of our own mapping, which nobody writes any more.
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

/// What the program is asked or told; the [module](self) says what to do about each.
#[derive(Debug)]
pub enum Event {
    /// Every lane is open.
    Connected,
    /// Source, with [`SourceSetup::log`]: say what the guest has written since its log was read last. It runs on.
    ReadLog,
    /// Source: stop the guest.
    Stop,
    /// Source: save the device state of the stopped guest.
    SaveState,
    /// Destination: load this device state, which may be empty.
    LoadState(Vec<u8>),
    /// Destination: the guest is yours, run it.
    Run,
    /// Source: the guest runs at the destination.
    Running {
        /// How long it has stood still.
        downtime: Duration,
    },
    /// The connections are lost, or given up, and the migration goes on without them: whoever waits for
    /// a page waits longer. umem opens others, or waits for the source to. Of this event and the two below
    /// the last is kept where nobody has taken those before it.
    Recovering {
        /// What became of them, one line.
        reason: String,
    },
    /// The same, and nothing is opened until the program says how: `resume`, `resume_at`, `reconnect`.
    Paused {
        /// What became of them, one line.
        reason: String,
    },
    /// There are connections again.
    Resumed {
        /// How long there were none.
        disconnected: Duration,
    },
    /// Every page has come; the last event.
    Completed(Box<Completed>),
    /// It did not work; the last event.
    Failed(Failure),
}

impl Event {
    /// Whether it tells of connections that were lost.
    pub(crate) fn is_of_link(&self) -> bool {
        matches!(self, Event::Recovering { .. } | Event::Paused { .. } | Event::Resumed { .. })
    }
}

/// How it did not work.
#[derive(Debug)]
pub struct Failure {
    /// Why.
    pub error: Error,
    /// Whose the guest is now.
    pub guest: Guest,
}

/// Whose the guest is after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// The source's, as before: if it was asked to stop its guest, it lets it go on. The destination
    /// throws away what it has, which no longer waits for anything and is worth nothing.
    AtSource,
    /// The destination's, or it may be: the source must never run it again. At the destination it
    /// waits where pages are missing.
    AtDestination,
}

/// How far it has come. All zero before the lanes are open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// The guest's memory, bytes.
    pub total_bytes: u64,
    /// What of it has not come yet, or at the source not gone, bytes.
    pub missing_bytes: u64,
    /// What came as data, bytes …
    pub data_bytes: u64,
    /// … as a header that says zeroes, bytes …
    pub zero_bytes: u64,
    /// … and as a header that says that the source has nothing there, bytes.
    pub hole_bytes: u64,
    /// Pages that somebody waited for.
    pub pages_demand: u64,
    /// Pages that came unasked.
    pub pages_background: u64,
    /// With [checksums](SourceSetup::checksum): what came to this side otherwise than it was sent, and was
    /// sent again.
    pub checksum_errors: u64,
}
