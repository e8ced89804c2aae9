//! Bodies: the length that a header may announce, and the decoding of the bytes.

use super::have::{self, HAVE_WORD_PAGES};
use super::header::{Header, is_last_remaining, standing_of};
use super::kind::Kind;
use super::standing::{Standing, TOTALS_BYTES, Totals};
use super::{Frame, FrameError};
use crate::bytes::{put, u64_at};
use crate::fault::{Fault, FaultCode, parse_text};
use crate::limits::*;
use crate::region::{DESCRIPTOR_BYTES, PageRange, PageSize, RegionId, RegionTable};

/// Bytes of one page in a request's body.
pub(crate) const REQUEST_ENTRY_BYTES: usize = 8;

/// Bytes of one region in a ready frame's body.
pub(crate) const UNIT_BYTES: usize = 1;

/// Bits of a request's entry that hold the page.
const REQUEST_PAGE_BITS: u32 = 48;

/// Bytes of one region in a digests frame's body.
pub(crate) const DIGEST_BYTES: usize = 8;

/// Bytes of one run of pages in a remaining frame's body.
pub(crate) const REMAINING_RUN_BYTES: usize = 16;

const _: () = assert!(REQUEST_ENTRIES_MAX * REQUEST_ENTRY_BYTES <= BODY_BYTES_MAX);
const _: () = assert!(REGIONS_MAX * UNIT_BYTES <= BODY_BYTES_MAX);
const _: () = assert!(REGIONS_MAX * DIGEST_BYTES <= BODY_BYTES_MAX);
const _: () = assert!(REMAINING_RUNS_MAX * REMAINING_RUN_BYTES <= BODY_BYTES_MAX);

/// A body that is to come: its content, and its length, which is within the kind's limit.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Body {
    pub(crate) content: Content,
    pub(crate) bytes: usize,
}

/// The content of a body.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Content {
    Request,
    Regions,
    Units,
    DeviceState,
    Totals,
    /// Whether switched, and the µs after it since when the guest runs.
    Standing(bool, Option<u64>),
    Have(PageRange),
    Digests,
    /// Whether the frame is the last one.
    Remaining(bool),
    Fault(FaultCode),
}

impl Body {
    /// The whole frame, given its body and an empty vector for the pages of a request.
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
            Content::Have(range) => Frame::Have { range, words: have::decode(range, bytes)? },
            Content::Digests => {
                let digests = bytes.as_chunks::<DIGEST_BYTES>().0.iter();
                Frame::Digests(digests.map(|&digest| u64::from_le_bytes(digest)).collect())
            }
            Content::Remaining(last) => {
                Frame::Remaining { runs: decode_remaining(bytes).collect(), last }
            }
            Content::Fault(code) => {
                let text = parse_text(bytes).ok_or(FrameError::FaultText)?.to_owned();
                Frame::Error(Fault { code, text })
            }
        })
    }
}

impl Header {
    pub(super) fn body(self) -> Result<Body, FrameError> {
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
                let bytes = have::body_bytes(self.pages) as usize;
                (Content::Have(range), 1, bytes, bytes)
            }
            Kind::Digests => {
                (Content::Digests, DIGEST_BYTES, DIGEST_BYTES, REGIONS_MAX * DIGEST_BYTES)
            }
            Kind::Remaining => {
                let unit = REMAINING_RUN_BYTES;
                let last = is_last_remaining(self.flags);
                (Content::Remaining(last), unit, 0, REMAINING_RUNS_MAX * unit)
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

/// One run of a remaining frame's body.
pub(crate) fn remaining_run(run: PageRange) -> [u8; REMAINING_RUN_BYTES] {
    let mut out = [0; REMAINING_RUN_BYTES];
    put(&mut out, 0, &request_entry(run.region, run.first));
    put(&mut out, REQUEST_ENTRY_BYTES, &run.pages.to_le_bytes());
    out
}

fn decode_remaining(body: &[u8]) -> impl Iterator<Item = PageRange> {
    body.as_chunks::<REMAINING_RUN_BYTES>().0.iter().map(|run| {
        let (first, pages) = (u64_at(run, 0), u64_at(run, REQUEST_ENTRY_BYTES));
        let page_mask = (1 << REQUEST_PAGE_BITS) - 1;
        let region = RegionId((first >> REQUEST_PAGE_BITS) as u16);
        PageRange { region, first: first & page_mask, pages }
    })
}

/// The landing units in a ready frame's body.
fn decode_units(body: &[u8]) -> Result<Vec<PageSize>, FrameError> {
    let unit = |(index, &shift): (usize, &u8)| {
        PageSize::from_shift(shift).ok_or(FrameError::Unit { index, shift })
    };
    body.iter().enumerate().map(unit).collect()
}
