//! Errors in a frame.

use super::kind::Kind;
use crate::region::{PageRange, RegionError};

/// An error in a single frame, independent of its sender and its time.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    /// No frame has this tag.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// A field that this kind does not use is not zero.
    #[error("{kind} frame: unused field '{field}' is not zero")]
    Unused {
        /// The frame's kind.
        kind: Kind,
        /// The field's name in the layout.
        field: &'static str,
    },
    /// A body of a length that this kind cannot have.
    #[error("{kind} frame: a body of {body_bytes} bytes is not possible")]
    BodyLength {
        /// The frame's kind.
        kind: Kind,
        /// The length in the header.
        body_bytes: u32,
    },
    /// An error frame whose code is zero or past 16 bits.
    #[error("error frame: {0} is not a code")]
    FaultCode(u64),
    /// An error frame whose text is not UTF-8 or has control characters.
    #[error("error frame: the text is not printable UTF-8")]
    FaultText,
    /// A landing unit is not a power of two from 4 KiB to 1 GiB.
    #[error("ready frame: region {index} in units of 2^{shift} bytes (12 to 30 are possible)")]
    Unit {
        /// Which region of the table.
        index: usize,
        /// The base-2 logarithm of the unit.
        shift: u8,
    },
    /// A guest that runs without having been switched over.
    #[error("resume frame: a guest that runs before the switchover")]
    Standing,
    /// A have frame that names no pages, too many pages, or starts in the middle of a word.
    #[error("have frame: {0} is not possible")]
    HaveRange(PageRange),
    /// A have frame with bits past its last page.
    #[error("have frame: bits past the last page")]
    HavePadding,
    /// A regions frame with an invalid table.
    #[error("regions frame: {0}")]
    Regions(RegionError),
}
