//! The one error of the crate: what is wrong, what to do about it, and the cause underneath.
//!
//! Every variant prints as a single line. A cause (`source`) is part of that line already, so
//! callers print the error alone and never walk the chain.

use std::io;
use std::path::PathBuf;

use umem_wire::{Fault, FaultCode, LaneRole, ReceiveError};

/// What to give `umem migrate` where its passes over a running guest are impossible.
pub(crate) const WITHOUT_PASSES: &str = "-p without --precopy (postcopy), or --stop-first";

/// Everything that can end a migration, worded for the person who has to act on it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line cannot be carried out as written (exit status 2).
    #[error("{0}")]
    Usage(String),

    /// A system call failed; `what` says which one and on what.
    #[error("{what}: {source}")]
    System {
        /// What was being done, with the name of the object it was done to.
        what: String,
        /// The kernel's answer, errno kept.
        #[source]
        source: io::Error,
    },

    /// The ring could not be made or used.
    #[error("io_uring: {0}")]
    Ring(#[from] umem_ring::Error),

    /// The other side broke the protocol, or a stream was damaged on its way.
    #[error("the peer sent something that umem's protocol does not allow ({lane}): {what}")]
    Protocol {
        /// The lane it came in on.
        lane: String,
        /// The rule that it broke.
        what: String,
    },

    /// The other side gave up and said why.
    #[error("the {side} gave up: {text}")]
    Peer {
        /// "source" or "destination".
        side: &'static str,
        /// The reason's class, as it came over the wire.
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

    /// Who is at the other end of a connection could not be made sure of, or is not let in.
    #[error("no secure connection to the {side}: {what}")]
    Insecure {
        /// "source" or "destination".
        side: &'static str,
        /// Why, of "it", the other side.
        what: String,
    },

    /// Nobody answers at the address.
    #[error("cannot connect to {uri}: {source}; start `umem incoming {uri}` there first")]
    Connect {
        /// The address as the user wrote it.
        uri: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },

    /// The address cannot be listened on.
    #[error("cannot listen on {uri}: {source}{hint}")]
    Listen {
        /// The address as the user wrote it.
        uri: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
        /// What to do, or empty.
        hint: &'static str,
    },

    /// A RAM file is missing, unreadable or of an unusable shape.
    #[error("RAM {name} ({}): {what}", path.display())]
    Ram {
        /// The region's name.
        name: String,
        /// Its file.
        path: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },

    /// A RAM file changed, or could not be read, while its pages were served.
    #[error("RAM {name} ({path}) {what}")]
    RamFailed {
        /// The region's name.
        name: String,
        /// Its file, as the kernel names it now.
        path: String,
        /// What is wrong with it and, at the end, what to do.
        what: String,
    },

    /// This machine, or what this user may do on it, is not enough.
    #[error("{0}")]
    Environment(String),

    /// The machine monitor cannot be migrated as it was started.
    #[error("{0}")]
    Unsupported(String),

    /// A measurement cannot go on.
    #[error("{0}")]
    Bench(String),

    /// The machine monitor refused, failed or went away.
    #[error("the guest's monitor: {0}")]
    Host(String),

    /// The guest's process has ended where the guest was to run: nothing can go on.
    #[error("the guest's monitor: {0}")]
    Ended(String),

    /// The preload object did not announce itself, or could not do its work.
    #[error("{0}")]
    Preload(String),

    /// A command to an umem that runs was not carried out.
    #[error("{0}")]
    Control(String),

    /// The guest's memory does not fit.
    #[error("{0}")]
    OutOfMemory(String),

    /// A thread of umem panicked, with this message.
    #[error(
        "umem has a bug and cannot go on; please report it: {0}. A guest that misses pages waits for \
         them; it does not read zeroes"
    )]
    Internal(String),

    /// The guest has moved, and what it moved with is not what the source had: it runs with wrong memory.
    #[error(
        "the guest's memory is damaged: the digests of RAM {regions} differ between the two sides; stop the guest, and start it again from an older state"
    )]
    Damaged {
        /// The regions' names.
        regions: String,
    },

    /// Somebody pressed Ctrl-C (or sent SIGTERM) while stopping was still possible.
    #[error("interrupted; {0}")]
    Interrupted(String),
}

/// Shorthand used all over the crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The current `errno` with the name of what failed.
    pub(crate) fn last_os(what: impl Into<String>) -> Error {
        Error::System { what: what.into(), source: io::Error::last_os_error() }
    }

    /// A protocol violation on `lane`.
    pub(crate) fn protocol(lane: &str, what: impl ToString) -> Error {
        Error::Protocol { lane: lane.to_owned(), what: what.to_string() }
    }

    /// Something came on `lane` that cannot be read: the `side` it came from broke the protocol, or, where
    /// there are checksums, it is not what was sent, and the lane is as good as lost.
    pub(crate) fn received(side: &'static str, lane: &str, error: &ReceiveError) -> Error {
        if error.is_corruption() {
            let what = format!("{error}; bytes change on their way");
            return Error::Lost { side, lane: lane.to_owned(), what };
        }
        Error::protocol(lane, error)
    }

    /// What it means for guest memory that `what` failed like this: nothing but that there is no room, or more.
    pub(crate) fn of_memory(what: String, error: io::Error) -> Error {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::ENOMEM) => Error::OutOfMemory(format!("{what}: {error}")),
            _ => Error::System { what, source: error },
        }
    }

    /// A session that recovers goes on after it, over other lanes: a lane is lost, or there is no room for what
    /// has come on it, which comes again then.
    pub(crate) fn ends_lanes(&self) -> bool {
        matches!(self, Error::Lost { .. } | Error::OutOfMemory(_))
    }

    /// What the peer is told when this error ends the migration.
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

/// What a lane is called in messages.
pub(crate) fn lane_name(role: LaneRole, index: u16) -> String {
    match role {
        LaneRole::Demand => "demand lane".into(),
        LaneRole::Bulk => format!("bulk lane {index}"),
    }
}

/// Names the thing that a system call was for.
pub(crate) trait Context<T> {
    /// Wraps the error; `what` is only built on failure.
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
