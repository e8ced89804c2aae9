//! Errors in received data and in the order of events of either end.
//!
//! Each step of decoding has its own error type, beside the code that returns it, so that a caller
//! matches only on what can happen there. [`Error`] is their sum, for callers that pass all on.

use crate::fault::Fault;
use crate::hello::HelloError;
use crate::limits::STATE_BYTES_MAX;
use crate::receive_error::ReceiveError;
use crate::region::{RegionError, RegionMismatch};

/// Any error of this crate.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// A lane failed to open.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// A table of regions, or a range of pages, is invalid.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The two tables of regions do not describe the same memory.
    #[error(transparent)]
    Mismatch(#[from] RegionMismatch),
    /// Bytes received over a lane are invalid.
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    /// An input that this phase does not accept, or a failed migration.
    #[error(transparent)]
    Phase(#[from] PhaseError),
}

/// The cause of a failed migration. Comes with the failed phase.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PhaseError {
    /// This phase does not accept this input.
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
    /// The announced length of the device state differs from the bytes received.
    #[error("device state of {announced} bytes was announced, {received} came")]
    StateLength {
        /// Bytes received, in all chunks.
        received: u64,
        /// Bytes announced by the load frame.
        announced: u64,
    },
    /// A lane was lost.
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
        /// The peer's reason.
        fault: Fault,
    },
}
