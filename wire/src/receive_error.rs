//! What can be wrong with what comes over a lane.

use crate::frame::{FrameError, Kind};
#[cfg(doc)]
use crate::limits::RUN_BYTES_MAX;
use crate::region::{PageRange, RegionError};

/// Why a lane's bytes cannot go on. The lane is of no more use.
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
    /// A kind of frame that belongs on another lane.
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
    /// Pages are spoken of before both ends know the regions and their landing units.
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
    /// A destination that says what it has although nobody asked: the lane replaces no lost one.
    #[error("{kind} frame on a lane that resumes nothing")]
    NotResuming {
        /// The frame's kind.
        kind: Kind,
    },
    /// Something else before the destination has said all that it has.
    #[error("{kind} frame before the destination has said which pages it has")]
    NotResumed {
        /// The frame's kind.
        kind: Kind,
    },
    /// Pages that are spoken of out of order, twice, or in part of a word.
    #[error("have frame: {range} is not what comes next")]
    HaveOrder {
        /// The pages that came.
        range: PageRange,
    },
    /// Pages that do not exist.
    #[error("{kind} frame: {error}")]
    Pages {
        /// The frame's kind.
        kind: Kind,
        /// What is wrong with them.
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
        /// Which frame of this way of the lane was to come, from 0 on.
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
    /// A data run on a checked lane has landed and its sum was not asked about: a mistake at this end.
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
        /// Bytes that were known to be missing.
        missing_bytes: u64,
    },
    /// The caller handed over bytes that do not belong here: a mistake at this end.
    #[error("{given_bytes} bytes were given where {wanted_bytes} were wanted")]
    Misfed {
        /// Bytes that [`next_target`](crate::Receiver::next_target) asked for.
        wanted_bytes: u64,
        /// Bytes that came.
        given_bytes: u64,
    },
}

impl ReceiveError {
    /// Whether what came is not what was sent: the lane is lost, the peer has done nothing wrong.
    pub fn is_corruption(&self) -> bool {
        use ReceiveError::*;
        matches!(self, HeaderSum { .. } | BodySum { .. } | RunSum { .. })
    }
}
