//! Frames: everything that travels on a lane after its hello.
//!
//! A frame is a 32-byte header, then the body whose length the header states, then, for a data run,
//! the pages themselves, which this crate never sees.
//!
//! ```text
//! 0     1      2       4           8        16       24      32
//! kind  flags  region  body bytes  first    pages    extra
//! u8    u8     u16     u32         u64      u64      u64
//! ```
//!
//! | kind | fields used, all others zero | body |
//! |---|---|---|
//! | data, zero, hole, ack | region, first page, pages | |
//! | request | | 8 bytes a page: region in the top 16 bits, page in the lower 48 |
//! | regions | | 80 bytes a region, see [`region`](crate::region) |
//! | ready | | 1 byte a region: base-2 logarithm of its landing unit, 12 to 30 |
//! | loaded, lane end | | |
//! | stopped | flags: 1 postcopy, 2 background | |
//! | device state | | opaque |
//! | load | first: bytes of state in all | |
//! | switchover, running | first: µs | |
//! | complete | | five u64, see [`Totals`] |
//! | resume | flags: 1 switched, 2 running; first: µs if it runs | five u64, see [`Totals`] |
//! | have | region, first page, pages | a bit a page, in words of 8 bytes |
//! | digests | | 8 bytes a region |
//! | ping, pong | first: any number | |
//! | error | first: code | UTF-8 without control characters |
//!
//! `extra` holds checksums where both ends can check ([`checksum`](crate::checksum)), else it is zero.
//!
//! Nothing here panics on what a peer sent.

use crate::bytes::{put, u16_at, u32_at, u64_at};
use crate::error::FrameError;
use crate::fault::{Fault, FaultCode, parse_text};
use crate::limits::*;
use crate::region::{DESCRIPTOR_BYTES, PageRange, PageSize, RegionId, RegionTable};
use crate::resume::{self, HAVE_WORD_PAGES, Standing};
use std::fmt;

/// Bytes of every frame's header.
pub const HEADER_BYTES: usize = 32;

/// Bytes of one page in a request's body.
pub(crate) const REQUEST_ENTRY_BYTES: usize = 8;

/// Bytes of one region in a ready frame's body.
pub(crate) const UNIT_BYTES: usize = 1;

/// Bits of a request's entry that hold the page.
const REQUEST_PAGE_BITS: u32 = 48;

/// Bytes of one region in a digests frame's body.
pub(crate) const DIGEST_BYTES: usize = 8;

/// Bytes of a complete frame's body.
const TOTALS_BYTES: usize = 40;

mod field {
    pub(super) const KIND: usize = 0;
    pub(super) const FLAGS: usize = 1;
    pub(super) const REGION: usize = 2;
    pub(super) const BODY_BYTES: usize = 4;
    pub(super) const FIRST: usize = 8;
    pub(super) const PAGES: usize = 16;
    pub(super) const EXTRA: usize = 24;
}

const FLAG_POSTCOPY: u8 = 1;
const FLAG_BACKGROUND: u8 = 2;

const FLAG_SWITCHED: u8 = 1;
const FLAG_RUNNING: u8 = 2;

const _: () = assert!(field::EXTRA + size_of::<u64>() == HEADER_BYTES);
const _: () = assert!(TOTALS_BYTES == size_of::<Totals>());

/// Where the sums of a header are.
pub(crate) const EXTRA_AT: usize = field::EXTRA;

/// Where a header says how long its body is.
pub(crate) const BODY_BYTES_AT: usize = field::BODY_BYTES;

/// The length of the body behind a header of our own.
pub(crate) fn body_bytes(header: &[u8; HEADER_BYTES]) -> usize {
    u32_at(header, BODY_BYTES_AT) as usize
}

/// A frame's tag. Zero is never one.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Kind {
    /// Pages, which follow.
    Data = 1,
    /// Pages that hold zeroes only.
    Zero = 2,
    /// Pages that the source's file does not have.
    Hole = 3,
    /// Pages that somebody at the destination waits for.
    Request = 4,
    /// Pages that the destination has made its own.
    Ack = 5,
    /// The source's table of regions.
    Regions = 16,
    /// The destination's guest waits to be moved into.
    Ready = 17,
    /// The source's guest has stopped.
    Stopped = 18,
    /// A piece of device state.
    DeviceState = 19,
    /// The device state is complete.
    Load = 20,
    /// The destination's guest has taken the device state.
    Loaded = 21,
    /// The guest belongs to the destination.
    Switchover = 22,
    /// The destination's guest runs.
    Running = 23,
    /// Nothing more comes on this bulk lane.
    LaneEnd = 24,
    /// Every page is cached; also the source's goodbye.
    Complete = 25,
    /// Where the destination stands, on a demand lane that replaces a lost one.
    Resume = 26,
    /// Which pages the destination has, behind a resume frame.
    Have = 27,
    /// What all that has landed comes to, region by region.
    Digests = 28,
    /// Please answer.
    Ping = 32,
    /// The answer.
    Pong = 33,
    /// The sender gives up.
    Error = 255,
}

impl Kind {
    /// Every kind, in order of its tag.
    pub const ALL: [Kind; 21] = [
        Kind::Data,
        Kind::Zero,
        Kind::Hole,
        Kind::Request,
        Kind::Ack,
        Kind::Regions,
        Kind::Ready,
        Kind::Stopped,
        Kind::DeviceState,
        Kind::Load,
        Kind::Loaded,
        Kind::Switchover,
        Kind::Running,
        Kind::LaneEnd,
        Kind::Complete,
        Kind::Resume,
        Kind::Have,
        Kind::Digests,
        Kind::Ping,
        Kind::Pong,
        Kind::Error,
    ];

    fn from_tag(tag: u8) -> Option<Kind> {
        Kind::ALL.into_iter().find(|&kind| kind as u8 == tag)
    }

    /// The kind's name, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Data => "data",
            Kind::Zero => "zero",
            Kind::Hole => "hole",
            Kind::Request => "request",
            Kind::Ack => "ack",
            Kind::Regions => "regions",
            Kind::Ready => "ready",
            Kind::Stopped => "stopped",
            Kind::DeviceState => "device state",
            Kind::Load => "load",
            Kind::Loaded => "loaded",
            Kind::Switchover => "switchover",
            Kind::Running => "running",
            Kind::LaneEnd => "lane end",
            Kind::Complete => "complete",
            Kind::Resume => "resume",
            Kind::Have => "have",
            Kind::Digests => "digests",
            Kind::Ping => "ping",
            Kind::Pong => "pong",
            Kind::Error => "error",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A header whose tag is known, field by field. [`Header::head`] says what it means.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) flags: u8,
    pub(crate) region: u16,
    pub(crate) body_bytes: u32,
    pub(crate) first: u64,
    pub(crate) pages: u64,
    pub(crate) extra: u64,
}

impl Header {
    /// A header with no field used.
    pub(crate) const fn new(kind: Kind) -> Header {
        Header { kind, flags: 0, region: 0, body_bytes: 0, first: 0, pages: 0, extra: 0 }
    }

    pub(crate) const fn with_range(kind: Kind, range: PageRange) -> Header {
        let PageRange { region: RegionId(region), first, pages } = range;
        Header { region, first, pages, ..Header::new(kind) }
    }

    pub(crate) const fn with_first(kind: Kind, first: u64) -> Header {
        Header { first, ..Header::new(kind) }
    }

    /// The caller has kept the kind's limit, all of which fit 32 bits.
    pub(crate) const fn with_body(kind: Kind, body_bytes: usize) -> Header {
        assert!(body_bytes <= BODY_BYTES_MAX, "a body over its limit");
        Header { body_bytes: body_bytes as u32, ..Header::new(kind) }
    }

    pub(crate) fn encode(self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[field::KIND] = self.kind as u8;
        out[field::FLAGS] = self.flags;
        put(&mut out, field::REGION, &self.region.to_le_bytes());
        put(&mut out, field::BODY_BYTES, &self.body_bytes.to_le_bytes());
        put(&mut out, field::FIRST, &self.first.to_le_bytes());
        put(&mut out, field::PAGES, &self.pages.to_le_bytes());
        put(&mut out, field::EXTRA, &self.extra.to_le_bytes());
        out
    }

    /// Reads the fields, and checks that the kind exists and uses every field that is not zero.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, FrameError> {
        let tag = bytes[field::KIND];
        let header = Header {
            kind: Kind::from_tag(tag).ok_or(FrameError::Kind(tag))?,
            flags: bytes[field::FLAGS],
            region: u16_at(bytes, field::REGION),
            body_bytes: u32_at(bytes, field::BODY_BYTES),
            first: u64_at(bytes, field::FIRST),
            pages: u64_at(bytes, field::PAGES),
            extra: u64_at(bytes, field::EXTRA),
        };
        match header.unused_field() {
            Some(field) => Err(FrameError::Unused { kind: header.kind, field }),
            None => Ok(header),
        }
    }

    /// The first field that is set although the kind does not use it.
    fn unused_field(&self) -> Option<&'static str> {
        let Header { kind, flags, region, body_bytes, first, pages, extra: _ } = *self;
        let nothing = Header::new(kind);
        let used = match kind {
            Kind::Data | Kind::Zero | Kind::Hole | Kind::Ack => {
                Header { region, first, pages, ..nothing }
            }
            Kind::Request
            | Kind::Regions
            | Kind::Ready
            | Kind::DeviceState
            | Kind::Complete
            | Kind::Digests => Header { body_bytes, ..nothing },
            Kind::Have => Header { region, first, pages, body_bytes, ..nothing },
            Kind::Resume => {
                let known = flags & (FLAG_SWITCHED | FLAG_RUNNING);
                let first = if known & FLAG_RUNNING == 0 { 0 } else { first };
                Header { flags: known, first, body_bytes, ..nothing }
            }
            Kind::Loaded | Kind::LaneEnd => nothing,
            Kind::Stopped => Header { flags: flags & (FLAG_POSTCOPY | FLAG_BACKGROUND), ..nothing },
            Kind::Load | Kind::Switchover | Kind::Running | Kind::Ping | Kind::Pong => {
                Header { first, ..nothing }
            }
            Kind::Error => Header { first, body_bytes, ..nothing },
        };
        let unused = [
            (self.flags != used.flags, "flags"),
            (self.region != used.region, "region"),
            (self.body_bytes != used.body_bytes, "body bytes"),
            (self.first != used.first, "first"),
            (self.pages != used.pages, "pages"),
            (self.extra != used.extra, "extra"),
        ];
        unused.iter().find(|(differs, _)| *differs).map(|&(_, name)| name)
    }

    /// What the header says, and what has to come before the frame is whole. Pages are not checked
    /// here: that takes the table of regions.
    pub(crate) fn head(self) -> Result<Head, FrameError> {
        let range =
            PageRange { region: RegionId(self.region), first: self.first, pages: self.pages };
        let frame = match self.kind {
            Kind::Data => return Ok(Head::Data(range)),
            Kind::Zero => Frame::Zero(range),
            Kind::Hole => Frame::Hole(range),
            Kind::Ack => Frame::Ack(range),
            Kind::Loaded => Frame::Loaded,
            Kind::LaneEnd => Frame::LaneEnd,
            Kind::Stopped => Frame::Stopped {
                postcopy: self.flags & FLAG_POSTCOPY != 0,
                background: self.flags & FLAG_BACKGROUND != 0,
            },
            Kind::Load => Frame::Load { state_bytes: self.first },
            Kind::Switchover => Frame::Switchover { stopped_us: self.first },
            Kind::Running => Frame::Running { us_since_switchover: self.first },
            Kind::Ping => Frame::Ping(self.first),
            Kind::Pong => Frame::Pong(self.first),
            Kind::Request
            | Kind::Regions
            | Kind::Ready
            | Kind::DeviceState
            | Kind::Complete
            | Kind::Resume
            | Kind::Have
            | Kind::Digests
            | Kind::Error => return self.body().map(Head::Body),
        };
        Ok(Head::Whole(frame))
    }

    fn body(self) -> Result<Body, FrameError> {
        let Header { kind, body_bytes, .. } = self;
        let bytes = body_bytes as usize;
        let (content, unit, bytes_min, bytes_max) = match kind {
            Kind::Request => {
                let unit = REQUEST_ENTRY_BYTES;
                (Content::Request, unit, unit, REQUEST_ENTRIES_MAX * unit)
            }
            Kind::Regions => {
                let unit = DESCRIPTOR_BYTES;
                (Content::Regions, unit, unit, REGIONS_MAX * unit)
            }
            Kind::Ready => (Content::Units, UNIT_BYTES, UNIT_BYTES, REGIONS_MAX * UNIT_BYTES),
            Kind::DeviceState => (Content::DeviceState, 1, 1, STATE_CHUNK_BYTES_MAX),
            Kind::Complete => (Content::Totals, 1, TOTALS_BYTES, TOTALS_BYTES),
            Kind::Resume => {
                let (switched, running) = standing_of(self.flags)?;
                let standing = (switched, running.then_some(self.first));
                (Content::Standing(standing.0, standing.1), 1, TOTALS_BYTES, TOTALS_BYTES)
            }
            Kind::Have => {
                let range = PageRange {
                    region: RegionId(self.region),
                    first: self.first,
                    pages: self.pages,
                };
                let is_aligned = self.first.is_multiple_of(HAVE_WORD_PAGES);
                if !is_aligned || !(1..=HAVE_PAGES_MAX).contains(&self.pages) {
                    return Err(FrameError::HaveRange(range));
                }
                let bytes = resume::body_bytes(self.pages) as usize;
                (Content::Have(range), 1, bytes, bytes)
            }
            Kind::Digests => {
                (Content::Digests, DIGEST_BYTES, DIGEST_BYTES, REGIONS_MAX * DIGEST_BYTES)
            }
            Kind::Error => {
                let code = u16::try_from(self.first).ok().and_then(FaultCode::from_number);
                let code = code.ok_or(FrameError::FaultCode(self.first))?;
                (Content::Fault(code), 1, 0, ERROR_TEXT_BYTES_MAX)
            }
            _ => unreachable!("a kind without a body"),
        };
        if !(bytes_min..=bytes_max).contains(&bytes) || !bytes.is_multiple_of(unit) {
            return Err(FrameError::BodyLength { kind, body_bytes });
        }
        Ok(Body { content, bytes })
    }
}

/// What a header means.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Head {
    /// The frame is whole.
    Whole(Frame),
    /// A body follows.
    Body(Body),
    /// Pages follow.
    Data(PageRange),
}

/// A body that is to come: what it is, and its length, which is within the kind's limit.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Body {
    pub(crate) content: Content,
    pub(crate) bytes: usize,
}

/// What a body holds.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Content {
    Request,
    Regions,
    Units,
    DeviceState,
    Totals,
    /// Switched, and running since so many µs after it.
    Standing(bool, Option<u64>),
    Have(PageRange),
    Digests,
    Fault(FaultCode),
}

impl Body {
    /// The whole frame, given its body, and room for the pages of a request: an empty vector.
    pub(crate) fn frame(
        self,
        bytes: &[u8],
        room: &mut Vec<(RegionId, u64)>,
    ) -> Result<Frame, FrameError> {
        assert_eq!(bytes.len(), self.bytes, "the body is whole");
        Ok(match self.content {
            Content::Request => {
                let mut pages = std::mem::take(room);
                pages.extend(decode_request(bytes));
                Frame::Request(pages)
            }
            Content::Regions => {
                Frame::Regions(RegionTable::decode(bytes).map_err(FrameError::Regions)?)
            }
            Content::Units => Frame::Ready(decode_units(bytes)?),
            Content::DeviceState => Frame::DeviceState { bytes: self.bytes as u32 },
            Content::Totals => Frame::Complete(Totals::decode(bytes)),
            Content::Standing(switched, running) => {
                Frame::Resume(Standing { switched, running, totals: Totals::decode(bytes) })
            }
            Content::Have(range) => Frame::Have { range, words: resume::decode(range, bytes)? },
            Content::Digests => {
                let digests = bytes.as_chunks::<DIGEST_BYTES>().0.iter();
                Frame::Digests(digests.map(|&digest| u64::from_le_bytes(digest)).collect())
            }
            Content::Fault(code) => {
                let text = parse_text(bytes).ok_or(FrameError::FaultText)?.to_owned();
                Frame::Error(Fault { code, text })
            }
        })
    }
}

/// The meaning of one frame, without the bytes of pages or device state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Frame {
    /// Pages; `pages` × page size raw bytes follow the header.
    Data(PageRange),
    /// Pages that hold zeroes only.
    Zero(PageRange),
    /// Pages that the source's file does not have: they read as zeroes and take no memory.
    Hole(PageRange),
    /// Pages that somebody at the destination waits for, 1 to [`REQUEST_ENTRIES_MAX`] of them, each
    /// as region and page index.
    Request(Vec<(RegionId, u64)>),
    /// Pages that the destination has made its own; the source may free them.
    Ack(PageRange),
    /// The source's table of regions.
    Regions(RegionTable),
    /// The regions match and the destination's guest waits to be moved into. Holds each region's
    /// landing unit, in the order of the source's table.
    Ready(Vec<PageSize>),
    /// The source's guest has stopped; comes before the first page in every mode.
    Stopped {
        /// Whether pages are sent after the switchover.
        postcopy: bool,
        /// Whether pages are sent that nobody asked for.
        background: bool,
    },
    /// A piece of device state, 1 to [`STATE_CHUNK_BYTES_MAX`] bytes, which follow the header.
    DeviceState {
        /// Its length.
        bytes: u32,
    },
    /// The device state is complete.
    Load {
        /// Bytes in all its pieces.
        state_bytes: u64,
    },
    /// The destination's guest has taken the device state.
    Loaded,
    /// The guest belongs to the destination.
    Switchover {
        /// µs since the source's guest stopped.
        stopped_us: u64,
    },
    /// The destination's guest runs.
    Running {
        /// µs since the switchover frame arrived.
        us_since_switchover: u64,
    },
    /// Nothing more comes on this bulk lane.
    LaneEnd,
    /// Every page is cached (from the destination); goodbye (from the source).
    Complete(Totals),
    /// Where the destination stands, first on a demand lane that replaces a lost one.
    Resume(Standing),
    /// Which of these pages the destination has: bit `i` of word `w` is page `first + 64 * w + i`. At
    /// most [`HAVE_PAGES_MAX`] pages.
    Have {
        /// The pages that are spoken of; the first is a multiple of 64.
        range: PageRange,
        /// As many as the pages need.
        words: Vec<u64>,
    },
    /// A digest of each region ([`checksum::digest`](crate::checksum::digest)), in the order of the
    /// source's table: of all that has landed, or of all that was to. Before complete, from either end.
    Digests(Vec<u64>),
    /// Please answer with this number.
    Ping(u64),
    /// The answer to the ping of this number.
    Pong(u64),
    /// The sender gives up.
    Error(Fault),
}

/// What one end has sent or received in all.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Bytes of pages in data runs.
    pub data_bytes: u64,
    /// Bytes of pages in zero runs.
    pub zero_bytes: u64,
    /// Bytes of pages in hole runs.
    pub hole_bytes: u64,
    /// Pages that somebody waited for.
    pub pages_demand: u64,
    /// Pages that nobody waited for.
    pub pages_background: u64,
}

impl Totals {
    pub(crate) fn encode(&self) -> [u8; TOTALS_BYTES] {
        let Totals { data_bytes, zero_bytes, hole_bytes, pages_demand, pages_background } = *self;
        let mut out = [0; TOTALS_BYTES];
        let fields = [data_bytes, zero_bytes, hole_bytes, pages_demand, pages_background];
        for (out, field) in out.as_chunks_mut::<8>().0.iter_mut().zip(fields) {
            *out = field.to_le_bytes();
        }
        out
    }

    fn decode(bytes: &[u8]) -> Totals {
        Totals {
            data_bytes: u64_at(bytes, 0),
            zero_bytes: u64_at(bytes, 8),
            hole_bytes: u64_at(bytes, 16),
            pages_demand: u64_at(bytes, 24),
            pages_background: u64_at(bytes, 32),
        }
    }
}

/// One page of a request's body. No table has a page index past 48 bits, see [`TOTAL_BYTES_MAX`].
pub(crate) fn request_entry(region: RegionId, page: u64) -> [u8; REQUEST_ENTRY_BYTES] {
    assert!(page >> REQUEST_PAGE_BITS == 0, "a page past every region");
    ((u64::from(region.0) << REQUEST_PAGE_BITS) | page).to_le_bytes()
}

fn decode_request(body: &[u8]) -> impl Iterator<Item = (RegionId, u64)> {
    let entries = body.as_chunks::<REQUEST_ENTRY_BYTES>().0.iter();
    let entries = entries.map(|&entry| u64::from_le_bytes(entry));
    let page_mask = (1 << REQUEST_PAGE_BITS) - 1;
    entries.map(move |e| (RegionId((e >> REQUEST_PAGE_BITS) as u16), e & page_mask))
}

/// The landing units in a ready frame's body.
fn decode_units(body: &[u8]) -> Result<Vec<PageSize>, FrameError> {
    let unit = |(index, &shift): (usize, &u8)| {
        PageSize::from_shift(shift).ok_or(FrameError::Unit { index, shift })
    };
    body.iter().enumerate().map(unit).collect()
}

/// The flags of a stopped frame.
pub(crate) fn stopped_flags(postcopy: bool, background: bool) -> u8 {
    (u8::from(postcopy) * FLAG_POSTCOPY) | (u8::from(background) * FLAG_BACKGROUND)
}

/// The flags of a resume frame.
pub(crate) fn standing_flags(standing: &Standing) -> u8 {
    (u8::from(standing.switched) * FLAG_SWITCHED)
        | (u8::from(standing.running.is_some()) * FLAG_RUNNING)
}

/// Whether the guest has switched, and runs: never the second without the first.
fn standing_of(flags: u8) -> Result<(bool, bool), FrameError> {
    match (flags & FLAG_SWITCHED != 0, flags & FLAG_RUNNING != 0) {
        (false, true) => Err(FrameError::Standing),
        standing => Ok(standing),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::RegionError;
    use crate::region::{PageSize, Region};
    use crate::transmit;

    const RANGE: PageRange =
        PageRange { region: RegionId(0x0102), first: 0x1122_3344_5566_7788, pages: 0x99 };

    /// A header's bytes from its fields, written out by hand.
    fn literal(
        kind: u8,
        flags: u8,
        region: [u8; 2],
        body: [u8; 4],
        first: [u8; 8],
        pages: [u8; 8],
    ) -> Vec<u8> {
        let mut out = vec![kind, flags];
        out.extend(region);
        out.extend(body);
        out.extend(first);
        out.extend(pages);
        out.extend([0; 8]);
        out
    }

    /// A frame's bytes, encoded behind others that must stay.
    fn encoded(frame: &Frame) -> Vec<u8> {
        let mut out = vec![0xa5; 7];
        out.spare_capacity_mut().fill(std::mem::MaybeUninit::new(0xa5));
        transmit::encode(frame, &mut out);
        assert_eq!(out[..7], [0xa5; 7]);
        out.split_off(7)
    }

    /// Reads a whole frame the way a receiver does.
    fn decoded(bytes: &[u8]) -> Result<Frame, FrameError> {
        let (header, body) = bytes.split_first_chunk().expect("a header");
        match Header::decode(header)?.head()? {
            Head::Whole(frame) => Ok(frame),
            Head::Data(range) => Ok(Frame::Data(range)),
            Head::Body(announced) => announced.frame(body, &mut Vec::new()),
        }
    }

    fn assert_literal(frame: &Frame, bytes: &[u8]) {
        assert_eq!(encoded(frame), bytes);
        assert_eq!(decoded(bytes).as_ref(), Ok(frame));
    }

    #[test]
    fn tags_keep_their_numbers() {
        let tags = Kind::ALL.map(|kind| kind as u8);
        let expected =
            [1, 2, 3, 4, 5, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 32, 33, 255];
        assert_eq!(tags, expected);
        for tag in 0..=255 {
            assert_eq!(
                Kind::from_tag(tag).map(|kind| kind as u8),
                tags.contains(&tag).then_some(tag)
            );
        }
    }

    #[test]
    fn runs_and_acks() {
        let bytes = |kind| {
            let first = [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11];
            literal(kind, 0, [2, 1], [0; 4], first, [0x99, 0, 0, 0, 0, 0, 0, 0])
        };
        assert_literal(&Frame::Data(RANGE), &bytes(1));
        assert_literal(&Frame::Zero(RANGE), &bytes(2));
        assert_literal(&Frame::Hole(RANGE), &bytes(3));
        assert_literal(&Frame::Ack(RANGE), &bytes(5));
        assert_eq!(transmit::data_header(RANGE)[..], bytes(1));
        assert_eq!(transmit::zero_header(RANGE)[..], bytes(2));
        assert_eq!(transmit::hole_header(RANGE)[..], bytes(3));
        assert_eq!(transmit::ack_header(RANGE)[..], bytes(5));
    }

    #[test]
    fn frames_without_fields() {
        let bytes = |kind| literal(kind, 0, [0; 2], [0; 4], [0; 8], [0; 8]);
        assert_literal(&Frame::Loaded, &bytes(21));
        assert_literal(&Frame::LaneEnd, &bytes(24));
    }

    #[test]
    fn frames_with_a_number() {
        let number = 0x0807_0605_0403_0201;
        let bytes = |kind| literal(kind, 0, [0; 2], [0; 4], [1, 2, 3, 4, 5, 6, 7, 8], [0; 8]);
        assert_literal(&Frame::Load { state_bytes: number }, &bytes(20));
        assert_literal(&Frame::Switchover { stopped_us: number }, &bytes(22));
        assert_literal(&Frame::Running { us_since_switchover: number }, &bytes(23));
        assert_literal(&Frame::Ping(number), &bytes(32));
        assert_literal(&Frame::Pong(number), &bytes(33));
    }

    #[test]
    fn stopped_has_two_flags() {
        let bytes = |flags| literal(18, flags, [0; 2], [0; 4], [0; 8], [0; 8]);
        assert_literal(&Frame::Stopped { postcopy: false, background: false }, &bytes(0));
        assert_literal(&Frame::Stopped { postcopy: true, background: false }, &bytes(1));
        assert_literal(&Frame::Stopped { postcopy: false, background: true }, &bytes(2));
        assert_literal(&Frame::Stopped { postcopy: true, background: true }, &bytes(3));
        let unused = FrameError::Unused { kind: Kind::Stopped, field: "flags" };
        assert_eq!(decoded(&bytes(4)), Err(unused));
    }

    #[test]
    fn a_request_packs_region_and_page() {
        let mut bytes = literal(4, 0, [0; 2], [16, 0, 0, 0], [0; 8], [0; 8]);
        bytes.extend([6, 5, 4, 3, 2, 1, 0xfe, 0xff]);
        bytes.extend([9, 0, 0, 0, 0, 0, 1, 0]);
        let pages = vec![(RegionId(0xfffe), 0x0102_0304_0506), (RegionId(1), 9)];
        assert_literal(&Frame::Request(pages), &bytes);
    }

    #[test]
    fn regions_follow_their_header() {
        let region = Region { name: "ram0".into(), bytes: 0x20_0000, page_size: PageSize::SIZE_2M };
        let table = RegionTable::new(vec![region]).unwrap();
        let mut bytes = literal(16, 0, [0; 2], [80, 0, 0, 0], [0; 8], [0; 8]);
        bytes.extend(b"ram0");
        bytes.extend([0; 60]);
        bytes.extend([0, 0, 0x20, 0, 0, 0, 0, 0]);
        bytes.extend([21, 0, 0, 0, 0, 0, 0, 0]);
        assert_literal(&Frame::Regions(table), &bytes);
        bytes[32] = b'\n';
        assert_eq!(decoded(&bytes), Err(FrameError::Regions(RegionError::Name(0))));
    }

    #[test]
    fn ready_has_a_byte_for_each_region() {
        let mut bytes = literal(17, 0, [0; 2], [3, 0, 0, 0], [0; 8], [0; 8]);
        bytes.extend([12, 30, 21]);
        let units = vec![PageSize::SIZE_4K, PageSize::SIZE_1G, PageSize::SIZE_2M];
        assert_literal(&Frame::Ready(units), &bytes);
        for shift in [0, 11, 31, 255] {
            bytes[33] = shift;
            assert_eq!(decoded(&bytes), Err(FrameError::Unit { index: 1, shift }));
        }
    }

    #[test]
    fn device_state_is_a_header_here() {
        let header = literal(19, 0, [0; 2], [0, 0, 1, 0], [0; 8], [0; 8]);
        assert_eq!(encoded(&Frame::DeviceState { bytes: 65536 }), header);
        assert_eq!(transmit::device_state_header(65536)[..], header);
        let whole = [header, vec![0xa5; 65536]].concat();
        assert_eq!(decoded(&whole), Ok(Frame::DeviceState { bytes: 65536 }));
    }

    #[test]
    fn complete_carries_five_numbers() {
        let totals = Totals {
            data_bytes: 1,
            zero_bytes: 2,
            hole_bytes: 3,
            pages_demand: 4,
            pages_background: 5 << 56,
        };
        let mut bytes = literal(25, 0, [0; 2], [40, 0, 0, 0], [0; 8], [0; 8]);
        for low in 1..=4 {
            bytes.extend([low, 0, 0, 0, 0, 0, 0, 0]);
        }
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 5]);
        assert_literal(&Frame::Complete(totals), &bytes);
    }

    #[test]
    fn resume_says_where_the_destination_stands() {
        let totals = Totals { pages_demand: 3, ..Totals::default() };
        let mut totals_bytes = [0; 40];
        totals_bytes[24] = 3;
        let bytes = |flags, us: u8| {
            let first = [us, 0, 0, 0, 0, 0, 0, 0];
            let mut bytes = literal(26, flags, [0; 2], [40, 0, 0, 0], first, [0; 8]);
            bytes.extend(totals_bytes);
            bytes
        };
        let standing = |switched, running| Standing { switched, running, totals };
        assert_literal(&Frame::Resume(standing(false, None)), &bytes(0, 0));
        assert_literal(&Frame::Resume(standing(true, None)), &bytes(1, 0));
        assert_literal(&Frame::Resume(standing(true, Some(9))), &bytes(3, 9));
        assert_eq!(decoded(&bytes(2, 9)), Err(FrameError::Standing));
        let unused = |field| Err(FrameError::Unused { kind: Kind::Resume, field });
        assert_eq!(decoded(&bytes(4, 0)), unused("flags"));
        assert_eq!(decoded(&bytes(1, 9)), unused("first"));
    }

    #[test]
    fn have_is_a_bit_a_page() {
        let bytes = |first: u8, pages: u8, words: &[u64]| {
            let mut first_page = [0; 8];
            first_page[0] = first;
            let body = [8 * words.len() as u8, 0, 0, 0];
            let mut bytes = literal(27, 0, [2, 1], body, first_page, [pages, 0, 0, 0, 0, 0, 0, 0]);
            words.iter().for_each(|word| bytes.extend(word.to_le_bytes()));
            bytes
        };
        let range = PageRange { region: RegionId(0x0102), first: 64, pages: 66 };
        let words = vec![0x8000_0000_0000_0001, 2];
        assert_literal(&Frame::Have { range, words: words.clone() }, &bytes(64, 66, &words));
        assert_eq!(decoded(&bytes(64, 65, &words)), Err(FrameError::HavePadding));
        for (first, pages) in [(63, 66), (64, 0)] {
            let range = PageRange { first, pages, ..range };
            let wrong = decoded(&bytes(first as u8, pages as u8, &words));
            assert_eq!(wrong, Err(FrameError::HaveRange(range)));
        }
        let length = FrameError::BodyLength { kind: Kind::Have, body_bytes: 16 };
        assert_eq!(decoded(&bytes(64, 64, &words)), Err(length));
    }

    #[test]
    fn digests_are_a_number_for_each_region() {
        let mut bytes = literal(28, 0, [0; 2], [16, 0, 0, 0], [0; 8], [0; 8]);
        bytes.extend([1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0, 0, 0, 0, 0]);
        assert_literal(&Frame::Digests(vec![0x0807_0605_0403_0201, 9]), &bytes);
    }

    #[test]
    fn an_error_has_a_code_and_a_text() {
        let mut bytes = literal(255, 0, [0; 2], [3, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0, 0], [0; 8]);
        bytes.extend("né".as_bytes());
        let fault = Fault { code: FaultCode::OutOfMemory, text: "né".into() };
        assert_literal(&Frame::Error(fault), &bytes);

        bytes[34] = 0xff;
        assert_eq!(decoded(&bytes), Err(FrameError::FaultText));
        bytes[8] = 0;
        assert_eq!(decoded(&bytes), Err(FrameError::FaultCode(0)));
        bytes[10] = 1;
        assert_eq!(decoded(&bytes), Err(FrameError::FaultCode(0x1_0000)));
    }

    #[test]
    fn unused_fields_are_zero() {
        let fields = [
            (field::FLAGS, "flags"),
            (field::REGION, "region"),
            (field::BODY_BYTES, "body bytes"),
            (field::FIRST, "first"),
            (field::PAGES, "pages"),
            (field::EXTRA, "extra"),
        ];
        for (at, field) in fields {
            let mut bytes = Header::new(Kind::Loaded).encode();
            bytes[at] = 1;
            let unused = FrameError::Unused { kind: Kind::Loaded, field };
            assert_eq!(Header::decode(&bytes), Err(unused));
        }
        assert_eq!(decoded(&[0; HEADER_BYTES]), Err(FrameError::Kind(0)));
    }

    #[test]
    fn bodies_keep_their_limits() {
        let limits = [
            (Kind::Request, [0, 7, 12, 2056], [8, 2048]),
            (Kind::Regions, [0, 79, 120, 20560], [80, 20480]),
            (Kind::Ready, [0, 257, 1 << 20, u32::MAX], [1, 256]),
            (Kind::DeviceState, [0, 65537, 1 << 20, u32::MAX], [1, 65536]),
            (Kind::Complete, [0, 39, 41, u32::MAX], [40, 40]),
            (Kind::Digests, [0, 7, 12, 2056], [8, 2048]),
        ];
        for (kind, wrong, right) in limits {
            for body_bytes in wrong {
                let header = Header { body_bytes, ..Header::new(kind) };
                assert_eq!(header.head(), Err(FrameError::BodyLength { kind, body_bytes }));
            }
            for body_bytes in right {
                let header = Header { body_bytes, ..Header::new(kind) };
                assert!(matches!(header.head(), Ok(Head::Body(_))), "{kind} {body_bytes}");
            }
        }
    }
}
