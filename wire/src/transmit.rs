//! Encodes frames. Frequent ones are arrays on the stack; the rest is appended to the caller's
//! buffer. A frame over a limit, or a page past every region, is a mistake of this end and panics.

use crate::fault::{Fault, push_text};
use crate::frame::{
    DIGEST_BYTES, Frame, HAVE_WORD_PAGES, HEADER_BYTES, Header, Kind, REMAINING_RUN_BYTES,
    REQUEST_ENTRY_BYTES, Standing, Totals, UNIT_BYTES, have_body_bytes, have_words,
    remaining_flags, remaining_run, request_entry, standing_flags, stopped_flags,
};
use crate::limits::*;
use crate::region::{PageRange, PageSize, RegionId, RegionTable};

/// Appends a frame. After [`Frame::Data`] the caller sends the pages, after [`Frame::DeviceState`]
/// the state; all other frames are whole.
pub fn encode(frame: &Frame, out: &mut Vec<u8>) {
    let header = match frame {
        Frame::Data(range) => Header::with_range(Kind::Data, *range),
        Frame::Zero(range) => Header::with_range(Kind::Zero, *range),
        Frame::Hole(range) => Header::with_range(Kind::Hole, *range),
        Frame::Ack(range) => Header::with_range(Kind::Ack, *range),
        Frame::Stopped { postcopy, background } => {
            Header { flags: stopped_flags(*postcopy, *background), ..Header::new(Kind::Stopped) }
        }
        Frame::Load { state_bytes } => Header::with_first(Kind::Load, *state_bytes),
        Frame::Loaded => Header::new(Kind::Loaded),
        Frame::Switchover { stopped_us } => Header::with_first(Kind::Switchover, *stopped_us),
        Frame::Running { us_since_switchover: us } => Header::with_first(Kind::Running, *us),
        Frame::LaneEnd => Header::new(Kind::LaneEnd),
        Frame::Rounds => Header::new(Kind::Rounds),
        Frame::RoundsEnd => Header::new(Kind::RoundsEnd),
        Frame::Settled => Header::new(Kind::Settled),
        Frame::Ping(number) => Header::with_first(Kind::Ping, *number),
        Frame::Pong(number) => Header::with_first(Kind::Pong, *number),
        Frame::DeviceState { bytes } => {
            out.extend_from_slice(&device_state_header(*bytes as usize));
            return;
        }
        Frame::Request(pages) => return request(out, pages),
        Frame::Regions(table) => return regions(out, table),
        Frame::Ready(units) => return ready(out, units),
        Frame::Complete(totals) => return complete(out, totals),
        Frame::Resume(standing) => return resume(out, standing),
        Frame::Have { range, words } => return have(out, *range, words.iter().copied()),
        Frame::Digests(digests) => return self::digests(out, digests),
        Frame::Remaining { runs, last } => return remaining(out, runs, *last),
        Frame::Error(fault) => return error(out, fault),
    };
    out.extend_from_slice(&header.encode());
}

/// A data run's header; `pages` × landing unit raw bytes must follow.
pub fn data_header(range: PageRange) -> [u8; HEADER_BYTES] {
    Header::with_range(Kind::Data, range).encode()
}

/// A zero run, whole.
pub fn zero_header(range: PageRange) -> [u8; HEADER_BYTES] {
    Header::with_range(Kind::Zero, range).encode()
}

/// A hole run, whole.
pub fn hole_header(range: PageRange) -> [u8; HEADER_BYTES] {
    Header::with_range(Kind::Hole, range).encode()
}

/// An acknowledgement, whole.
pub fn ack_header(range: PageRange) -> [u8; HEADER_BYTES] {
    Header::with_range(Kind::Ack, range).encode()
}

/// The header of 1 to [`STATE_CHUNK_BYTES_MAX`] bytes of device state, which must follow.
pub fn device_state_header(bytes: usize) -> [u8; HEADER_BYTES] {
    assert!((1..=STATE_CHUNK_BYTES_MAX).contains(&bytes), "a state chunk of {bytes} bytes");
    Header::with_body(Kind::DeviceState, bytes).encode()
}

/// Appends a request for 1 to [`REQUEST_ENTRIES_MAX`] pages, each as region (the source's number)
/// and page index.
pub fn request(out: &mut Vec<u8>, pages: &[(RegionId, u64)]) {
    assert!((1..=REQUEST_ENTRIES_MAX).contains(&pages.len()), "a request of {} pages", pages.len());
    let body_bytes = pages.len() * REQUEST_ENTRY_BYTES;
    out.extend_from_slice(&Header::with_body(Kind::Request, body_bytes).encode());
    for &(region, page) in pages {
        out.extend_from_slice(&request_entry(region, page));
    }
}

fn regions(out: &mut Vec<u8>, table: &RegionTable) {
    let header = Header::with_body(Kind::Regions, table.encoded_bytes());
    out.extend_from_slice(&header.encode());
    table.encode(out);
}

fn ready(out: &mut Vec<u8>, units: &[PageSize]) {
    assert!((1..=REGIONS_MAX).contains(&units.len()), "units for {} regions", units.len());
    let header = Header::with_body(Kind::Ready, units.len() * UNIT_BYTES);
    out.extend_from_slice(&header.encode());
    out.extend(units.iter().map(|unit| unit.shift()));
}

fn complete(out: &mut Vec<u8>, totals: &Totals) {
    let body = totals.encode();
    out.extend_from_slice(&Header::with_body(Kind::Complete, body.len()).encode());
    out.extend_from_slice(&body);
}

fn digests(out: &mut Vec<u8>, digests: &[u64]) {
    assert!((1..=REGIONS_MAX).contains(&digests.len()), "digests of {} regions", digests.len());
    let header = Header::with_body(Kind::Digests, digests.len() * DIGEST_BYTES);
    out.extend_from_slice(&header.encode());
    digests.iter().for_each(|digest| out.extend_from_slice(&digest.to_le_bytes()));
}

/// Appends a remaining frame: at most [`REMAINING_RUNS_MAX`] runs of pages that are still to come.
pub fn remaining(out: &mut Vec<u8>, runs: &[PageRange], last: bool) {
    assert!(runs.len() <= REMAINING_RUNS_MAX, "a remaining frame of {} runs", runs.len());
    let header = Header {
        flags: remaining_flags(last),
        ..Header::with_body(Kind::Remaining, runs.len() * REMAINING_RUN_BYTES)
    };
    out.extend_from_slice(&header.encode());
    runs.iter().for_each(|&run| out.extend_from_slice(&remaining_run(run)));
}

fn resume(out: &mut Vec<u8>, standing: &Standing) {
    let body = standing.totals.encode();
    let header = Header {
        flags: standing_flags(standing),
        first: standing.running.unwrap_or(0),
        ..Header::with_body(Kind::Resume, body.len())
    };
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(&body);
}

/// Appends a have frame for `range`, 1 to [`HAVE_PAGES_MAX`] pages from a multiple of 64 on: a bit
/// a page, the words as in [`Frame::Have`].
pub fn have(out: &mut Vec<u8>, range: PageRange, words: impl ExactSizeIterator<Item = u64>) {
    assert!((1..=HAVE_PAGES_MAX).contains(&range.pages), "a have frame of {range}");
    assert!(range.first.is_multiple_of(HAVE_WORD_PAGES), "a have frame of {range}");
    assert_eq!(words.len() as u64, have_words(range.pages), "a word for each 64 pages");
    let PageRange { region, first, pages } = range;
    let header = Header {
        region: region.0,
        first,
        pages,
        ..Header::with_body(Kind::Have, have_body_bytes(pages) as usize)
    };
    out.extend_from_slice(&header.encode());
    words.for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
}

fn error(out: &mut Vec<u8>, fault: &Fault) {
    let mut text = Vec::new();
    push_text(&mut text, &fault.text, ERROR_TEXT_BYTES_MAX);
    let first = u64::from(fault.code.number());
    let header = Header { first, ..Header::with_body(Kind::Error, text.len()) };
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(&text);
}
