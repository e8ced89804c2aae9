//! Errors in the bytes of a lane.

use crate::frame::{FrameError, Kind};
#[cfg(doc)]
use crate::limits::RUN_BYTES_MAX;
use crate::region::{PageRange, RegionError};

/// The error of a lane, which is unusable from then on.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The frame itself is wrong.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A kind of frame that only this end may send.
    #[error("{kind} frame from the wrong end")]
    WrongDirection {
        /// The frame's kind.
        kind: Kind,
    },
    /// A kind of frame that belongs to another lane.
    #[error("{kind} frame on a {} lane", if *bulk { "bulk" } else { "demand" })]
    WrongLane {
        /// The frame's kind.
        kind: Kind,
        /// Whether this is a bulk lane.
        bulk: bool,
    },
    /// A frame after the lane's end.
    #[error("{kind} frame after the lane's end")]
    AfterEnd {
        /// The frame's kind.
        kind: Kind,
    },
    /// A frame names pages before both ends know the regions and their landing units.
    #[error("{kind} frame before the regions are agreed on")]
    NoRegions {
        /// The frame's kind.
        kind: Kind,
    },
    /// The table of regions came again.
    #[error("the table of regions came twice")]
    RegionsTwice,
    /// A ready frame that answers no table of regions: none was offered, or it came again.
    #[error("a ready frame that was not asked for")]
    ReadyUnasked,
    /// Landing units that do not fit the table of regions.
    #[error("ready frame: {0}")]
    Units(RegionError),
    /// A destination sent an account unasked: the lane replaces no lost one.
    #[error("{kind} frame on a lane that replaces no lost one")]
    NotResuming {
        /// The frame's kind.
        kind: Kind,
    },
    /// Another frame before the destination's account is complete.
    #[error("{kind} frame before the destination has reported which pages it has")]
    NotResumed {
        /// The frame's kind.
        kind: Kind,
    },
    /// An account names pages out of order, twice, or in part of a word.
    #[error("have frame: {range} is not the next range")]
    HaveOrder {
        /// The pages that came.
        range: PageRange,
    },
    /// Pages that do not exist.
    #[error("{kind} frame: {error}")]
    Pages {
        /// The frame's kind.
        kind: Kind,
        /// The fault.
        error: RegionError,
    },
    /// A data run longer than [`RUN_BYTES_MAX`] (or one page).
    #[error("data run of {range} is longer than {pages_max} pages")]
    RunLength {
        /// The run.
        range: PageRange,
        /// The most pages a run in this region may have.
        pages_max: u64,
    },
    /// The sum of a frame's header is wrong.
    #[error("the checksum of frame {number} of the lane is wrong")]
    HeaderSum {
        /// The expected number of the frame in this direction of the lane, from 0 on.
        number: u64,
    },
    /// The sum of a frame's body is wrong.
    #[error("the checksum of a {kind} frame is wrong")]
    BodySum {
        /// The frame's kind.
        kind: Kind,
    },
    /// The sum of a data run's pages is wrong.
    #[error("the checksum of {range} is wrong")]
    RunSum {
        /// The run.
        range: PageRange,
    },
    /// A data run on a checked lane has landed without a check of its sum: a mistake of this end.
    #[error("{range} has landed unchecked")]
    Unchecked {
        /// The run.
        range: PageRange,
    },
    /// More or fewer digests than there are regions.
    #[error("{digests} digests for {regions} regions")]
    DigestCount {
        /// Digests that came.
        digests: usize,
        /// Regions in the table.
        regions: usize,
    },
    /// The peer closed the lane inside a frame.
    #[error("the lane closed with {missing_bytes} bytes of a frame still to come")]
    Truncated {
        /// Bytes that were still expected.
        missing_bytes: u64,
    },
    /// The caller gave bytes that were not asked for: a mistake of this end.
    #[error("{given_bytes} bytes were given where {wanted_bytes} were wanted")]
    Misfed {
        /// Bytes that [`next_target`](crate::Receiver::next_target) asked for.
        wanted_bytes: u64,
        /// Bytes given.
        given_bytes: u64,
    },
}

impl ReceiveError {
    /// Whether the data changed in transit: the lane is lost, and the peer has made no mistake.
    pub fn is_corruption(&self) -> bool {
        use ReceiveError::*;
        matches!(self, HeaderSum { .. } | BodySum { .. } | RunSum { .. })
    }
}
