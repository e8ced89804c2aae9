//! The error of the crate: what is wrong, what to do about it, and the cause.
//!
//! Every variant prints as a single line that includes its cause (`source`), so callers print the error alone and never
//! walk the chain.

use std::io;
use std::path::PathBuf;

use umem_wire::{Fault, FaultCode, LaneRole, ReceiveError};

/// The options of `umem migrate` to use where its passes over a running guest are impossible.
pub(crate) const WITHOUT_PASSES: &str = "-p without --precopy (postcopy), or --stop-first";

/// Every reason that can end a migration, worded for the user who acts on it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line cannot be carried out as written (exit status 2).
    #[error("{0}")]
    Usage(String),

    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// The operation and the object's name.
        what: String,
        /// The kernel's answer, errno kept.
        #[source]
        source: io::Error,
    },

    /// The ring could not be made or used.
    #[error("io_uring: {0}")]
    Ring(#[from] umem_ring::Error),

    /// The peer violated the protocol, or a stream was damaged in transit.
    #[error("the peer sent something that umem's protocol does not allow ({lane}): {what}")]
    Protocol {
        /// The lane that received the violation.
        lane: String,
        /// The rule that was violated.
        what: String,
    },

    /// The peer ended the migration and sent the reason.
    #[error("the {side} gave up: {text}")]
    Peer {
        /// "source" or "destination".
        side: &'static str,
        /// The reason's class, as received.
        code: FaultCode,
        /// The reason in the peer's words.
        text: String,
    },

    /// A connection ended before the migration did.
    #[error("the connection to the {side} was lost ({lane}): {what}")]
    Lost {
        /// "source" or "destination".
        side: &'static str,
        /// The lane that broke.
        lane: String,
        /// End of file, reset, timed out…
        what: String,
    },

    /// The peer could not be authenticated, or is not authorized.
    #[error("no secure connection to the {side}: {what}")]
    Insecure {
        /// "source" or "destination".
        side: &'static str,
        /// The reason. "it" in the text is the peer.
        what: String,
    },

    /// No process answers at the address.
    #[error("cannot connect to {uri}: {source}; {}", way_to(source))]
    Connect {
        /// The address as the user wrote it.
        uri: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },

    /// umem cannot listen on the address.
    #[error("cannot listen on {uri}: {source}{hint}")]
    Listen {
        /// The address as the user wrote it.
        uri: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
        /// The remedy, or empty.
        hint: &'static str,
    },

    /// A RAM file is missing, unreadable or of an unusable shape.
    #[error("RAM {name} ({}): {what}", path.display())]
    Ram {
        /// The region's name.
        name: String,
        /// Its file.
        path: PathBuf,
        /// The defect and its remedy.
        what: String,
    },

    /// A RAM file changed, or could not be read, while its pages were served.
    #[error("RAM {name} ({path}) {what}")]
    RamFailed {
        /// The region's name.
        name: String,
        /// Its file, as the kernel names it now.
        path: String,
        /// The defect and, at the end, its remedy.
        what: String,
    },

    /// This machine or this user's permissions are insufficient.
    #[error("{0}")]
    Environment(String),

    /// The machine monitor cannot be migrated as it was started.
    #[error("{0}")]
    Unsupported(String),

    /// A measurement cannot continue.
    #[error("{0}")]
    Bench(String),

    /// The machine monitor refused, failed or went away.
    #[error("the guest's monitor: {0}")]
    Host(String),

    /// The process of the guest ended at the side that was to run it: the migration cannot continue.
    #[error("the guest's monitor: {0}")]
    Ended(String),

    /// The preload object did not announce itself, or failed.
    #[error("{0}")]
    Preload(String),

    /// A command to a running umem was not carried out.
    #[error("{0}")]
    Control(String),

    /// The guest's memory does not fit.
    #[error("{0}")]
    OutOfMemory(String),

    /// A thread of umem panicked, with this message.
    #[error(
        "umem has a bug and cannot continue; please report it: {0}. A guest that misses pages waits for \
         them; it does not read zeroes"
    )]
    Internal(String),

    /// The guest has moved, and its memory differs from the source's: it runs with wrong memory.
    #[error(
        "the guest's memory is damaged: the digests of RAM {regions} differ between the two sides; stop the guest, and start it again from an older state"
    )]
    Damaged {
        /// The regions' names.
        regions: String,
    },

    /// An interrupt (Ctrl-C or SIGTERM) arrived while umem could still stop.
    #[error("interrupted; {0}")]
    Interrupted(String),
}

/// The crate's result type.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The current `errno`, with the operation that failed.
    pub(crate) fn last_os(what: impl Into<String>) -> Error {
        Error::System { what: what.into(), source: io::Error::last_os_error() }
    }

    /// A protocol violation on `lane`.
    pub(crate) fn protocol(lane: &str, what: impl ToString) -> Error {
        Error::Protocol { lane: lane.to_owned(), what: what.to_string() }
    }

    /// An unreadable frame or record arrived on `lane`. Without checksums `side` violated the protocol. With checksums
    /// the bytes changed in transit, which counts as a lost lane.
    pub(crate) fn received(side: &'static str, lane: &str, error: &ReceiveError) -> Error {
        if error.is_corruption() {
            let what = format!("{error}; bytes change in transit");
            return Error::Lost { side, lane: lane.to_owned(), what };
        }
        Error::protocol(lane, error)
    }

    /// The error of an operation on guest memory: out of memory, or another failure.
    pub(crate) fn of_memory(what: String, error: io::Error) -> Error {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::ENOMEM) => Error::OutOfMemory(format!("{what}: {error}")),
            _ => Error::System { what, source: error },
        }
    }

    /// Whether a session that recovers continues over new lanes after this error: a lane was lost, or received pages
    /// had no room and are sent again.
    pub(crate) fn ends_lanes(&self) -> bool {
        matches!(self, Error::Lost { .. } | Error::OutOfMemory(_))
    }

    /// The fault frame for the peer when this error ends the migration.
    pub(crate) fn to_fault(&self) -> Fault {
        let code = match self {
            Error::Protocol { .. } => FaultCode::Protocol,
            Error::OutOfMemory(_) => FaultCode::OutOfMemory,
            Error::Ended(_) => FaultCode::Ended,
            Error::Host(_) | Error::Preload(_) | Error::Unsupported(_) => FaultCode::HostFailed,
            Error::Interrupted(_) => FaultCode::Cancelled,
            Error::Ram { .. } => FaultCode::RegionMismatch,
            Error::RamFailed { .. } => FaultCode::SourceMemory,
            _ => FaultCode::Other,
        };
        Fault { code, text: self.to_string() }
    }

    /// The process's exit status for this error: 2 for usage, 1 for all else.
    pub fn exit_status(&self) -> i32 {
        if matches!(self, Error::Usage(_)) { 2 } else { 1 }
    }
}

/// What to do about a connection that the kernel refused so.
fn way_to(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => "run umem as the user that runs `umem incoming` there",
        io::ErrorKind::TimedOut
        | io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable => {
            "check the address, and what filters packets on the way"
        }
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => {
            "start `umem incoming` there first, with the command of the guest (`umem incoming --help` has examples)"
        }
        _ => "check the address, and that `umem incoming` listens there",
    }
}

/// A lane's name in messages.
pub(crate) fn lane_name(role: LaneRole, index: u16) -> String {
    match role {
        LaneRole::Demand => "demand lane".into(),
        LaneRole::Bulk => format!("bulk lane {index}"),
    }
}

/// Adds the object of a system call to its error.
pub(crate) trait Context<T> {
    /// Wraps the error; `what` is built only on failure.
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|source| Error::System { what: what().into(), source })
    }
}

impl<T> Context<T> for nix::Result<T> {
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|errno| Error::System { what: what().into(), source: errno.into() })
    }
}
