//! What can be wrong with what a peer sent, or with the order in which either end did things.
//!
//! Each step of understanding has its own type, so that a caller matches only on what can happen
//! there, and stands beside what it is about; [`Error`] is their sum, for callers that pass everything on.

use crate::fault::Fault;
use crate::hello::HelloError;
use crate::limits::STATE_BYTES_MAX;
use crate::receive_error::ReceiveError;
use crate::region::{RegionError, RegionMismatch};

/// Any error of this crate.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// A lane did not open.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// A table of regions, or a range of pages, makes no sense.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The two tables of regions do not describe the same memory.
    #[error(transparent)]
    Mismatch(#[from] RegionMismatch),
    /// Bytes that came over a lane make no sense.
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    /// Something happened that cannot happen now, or the migration failed.
    #[error(transparent)]
    Phase(#[from] PhaseError),
}

/// Why a migration stopped. Comes with the failed phase that it led to.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PhaseError {
    /// This input cannot happen in this phase.
    #[error("{input} is not possible while {phase}")]
    Unexpected {
        /// The phase's name.
        phase: &'static str,
        /// The input's name.
        input: &'static str,
    },
    /// More device state than [`STATE_BYTES_MAX`].
    #[error("device state of {0} bytes, at most {STATE_BYTES_MAX} are possible")]
    StateTooLong(u64),
    /// The device state's length and the bytes that came disagree.
    #[error("device state of {announced} bytes was announced, {received} came")]
    StateLength {
        /// Bytes in all the chunks.
        received: u64,
        /// Bytes said by the load frame.
        announced: u64,
    },
    /// A lane went away.
    #[error("the connection was lost while {phase}")]
    Lost {
        /// The phase's name.
        phase: &'static str,
    },
    /// This end gave up, on request.
    #[error("cancelled while {phase}")]
    Cancelled {
        /// The phase's name.
        phase: &'static str,
    },
    /// The other end gave up.
    #[error("the peer gave up while {phase}: {fault}")]
    Peer {
        /// The phase's name.
        phase: &'static str,
        /// What it said.
        fault: Fault,
    },
}
