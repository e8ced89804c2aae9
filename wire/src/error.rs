//! What can be wrong with what a peer sent, or with the order in which either end did things.
//!
//! Each step of understanding has its own type, so that a caller matches only on what can happen
//! there; [`Error`] is their sum, for callers that pass everything on.

use crate::fault::{Fault, FaultCode};
use crate::frame::Kind;
use crate::hello::VersionRange;
use crate::limits::*;
use crate::region::{PageRange, PageSize, RegionId, RegionMismatch};

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

/// Why a lane did not open.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HelloError {
    /// The first eight bytes are not ours.
    #[error("the peer does not speak umem")]
    NotUmem,
    /// The versions are empty, reversed, or contain zero.
    #[error("the peer's versions {0} are not a range")]
    VersionRange(VersionRange),
    /// The ranges of versions do not meet.
    #[error("no common version: here {ours}, the peer {theirs}")]
    NoCommonVersion {
        /// What this end speaks.
        ours: VersionRange,
        /// What the peer speaks.
        theirs: VersionRange,
    },
    /// The lane's role is neither demand nor bulk.
    #[error("unknown lane role {0}")]
    Role(u8),
    /// The lane's index does not fit its role and the number of bulk lanes.
    #[error("lane index {index} does not fit its role among {bulk_lanes} bulk lanes")]
    Index {
        /// The index that came.
        index: u16,
        /// The number of bulk lanes that came.
        bulk_lanes: u16,
    },
    /// More bulk lanes than [`LANES_MAX`].
    #[error("{0} bulk lanes, at most {LANES_MAX} are possible")]
    Lanes(u16),
    /// Bytes that must be zero are not.
    #[error("reserved bytes of the hello are not zero")]
    Reserved,
    /// Bits have changed on the way.
    #[error("the checksum of a hello or a welcome is wrong: bytes change on their way")]
    Sum,
    /// Proofs of a secret made in a way that this end does not know.
    #[error("the peer proves secrets in way {0}, which is not known here")]
    AuthVersion(u16),
    /// The destination answered a nonce with something else.
    #[error("the destination asks for no secret")]
    NoNonce,
    /// The destination refused the lane, and says why.
    #[error("the destination refused: {text} ({code})")]
    Refused {
        /// The reason, for programs.
        code: FaultCode,
        /// The reason, for people.
        text: String,
    },
    /// A refusal's code or text cannot be read.
    #[error("the destination refused, but its reason is unreadable")]
    RefusalUnreadable,
    /// The welcome chose what the hello did not offer.
    #[error("the destination chose {0} that was not offered")]
    NotOffered(&'static str),
    /// The welcome belongs to another session.
    #[error("the welcome is for another session")]
    OtherSession,
}

/// What is wrong with a table of regions, or with a range of pages in one.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RegionError {
    /// The table is empty.
    #[error("a table without regions")]
    Empty,
    /// The table has more than [`REGIONS_MAX`] entries.
    #[error("{0} regions, at most {REGIONS_MAX} are possible")]
    TooMany(usize),
    /// A name is empty, too long, not UTF-8, has control characters or is not padded with NUL.
    #[error("region {0}: its name must be 1 to {REGION_NAME_BYTES_MAX} bytes of printable UTF-8")]
    Name(usize),
    /// Two regions have one name.
    #[error("two regions are called '{0}'")]
    Duplicate(String),
    /// A page size is not a power of two from 4 KiB to 1 GiB.
    #[error("region {index}: a page of 2^{shift} bytes (12 to 30 are possible)")]
    PageSize {
        /// Which region of the table.
        index: usize,
        /// The base-2 logarithm of the page size.
        shift: u8,
    },
    /// A length is zero or not whole pages.
    #[error("region '{name}': {bytes} bytes are not a positive multiple of its page size")]
    Bytes {
        /// The region's name.
        name: String,
        /// Its length in bytes.
        bytes: u64,
    },
    /// All regions together are longer than [`TOTAL_BYTES_MAX`].
    #[error("the regions are more than {TOTAL_BYTES_MAX} bytes in all")]
    Total,
    /// A ready frame has more or fewer landing units than there are regions.
    #[error("{units} landing units for {regions} regions")]
    UnitCount {
        /// Units that came.
        units: usize,
        /// Regions in the table.
        regions: usize,
    },
    /// A landing unit that is smaller than the region's pages, or leaves a rest of the region.
    #[error("region '{name}' of {bytes} bytes in {page_size} pages cannot land in units of {unit}")]
    Unit {
        /// The region's name.
        name: String,
        /// Its length in bytes.
        bytes: u64,
        /// Its page size at the source.
        page_size: PageSize,
        /// The unit.
        unit: PageSize,
    },
    /// Padding in a region's descriptor is not zero.
    #[error("region {0}: reserved bytes are not zero")]
    Reserved(usize),
    /// No region has this number.
    #[error("there is no region {}", .0.0)]
    Unknown(RegionId),
    /// A range without pages.
    #[error("a range of no pages in region {}", .0.0)]
    NoPages(RegionId),
    /// A range that leaves its region.
    #[error("{range} is outside its region of {region_pages} pages")]
    Outside {
        /// The range.
        range: PageRange,
        /// The pages that the region has.
        region_pages: u64,
    },
}

/// What is wrong with one frame, whoever sent it and when.
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
    /// A body shorter, longer or more uneven than this kind can have.
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
    /// A have frame that speaks of no pages, of too many, or from the middle of a word on.
    #[error("have frame: {0} is not possible")]
    HaveRange(PageRange),
    /// A have frame with bits past its last page.
    #[error("have frame: bits past the last page")]
    HavePadding,
    /// A regions frame whose table makes no sense.
    #[error("regions frame: {0}")]
    Regions(RegionError),
}

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
