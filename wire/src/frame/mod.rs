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
//! | loaded, lane end, rounds, rounds end, settled | | |
//! | stopped | flags: 1 postcopy, 2 background | |
//! | device state | | opaque |
//! | load | first: total bytes of state | |
//! | switchover, running | first: µs | |
//! | complete | | five u64, see [`Totals`] |
//! | resume | flags: 1 switched, 2 running; first: µs if it runs | five u64, see [`Totals`] |
//! | have | region, first page, pages | a bit a page, in words of 8 bytes |
//! | digests | | 8 bytes a region |
//! | remaining | flags: 1 last | 16 bytes a run: its first page as in a request, then its pages |
//! | ping, pong | first: any number | |
//! | error | first: code | UTF-8 without control characters |
//!
//! `extra` holds checksums where both ends support them ([`checksum`](crate::checksum)), otherwise
//! zero.
//!
//! No input from a peer makes this module panic.

mod body;
mod error;
mod have;
mod head;
mod header;
mod kind;
mod standing;
#[cfg(test)]
mod tests;

pub(crate) use body::{
    Body, Content, DIGEST_BYTES, REMAINING_RUN_BYTES, REQUEST_ENTRY_BYTES, UNIT_BYTES,
    remaining_run, request_entry,
};
pub use error::FrameError;
pub use have::HAVE_WORD_PAGES;
pub(crate) use have::{body_bytes as have_body_bytes, words as have_words};
pub(crate) use head::Head;
pub(crate) use header::{
    BODY_BYTES_AT, EXTRA_AT, Header, body_bytes, remaining_flags, standing_flags, stopped_flags,
};
pub use kind::Kind;
pub use standing::{Standing, Totals};

use crate::fault::Fault;
#[cfg(doc)]
use crate::limits::*;
use crate::region::{PageRange, PageSize, RegionId, RegionTable};

/// Bytes of every frame's header.
pub const HEADER_BYTES: usize = 32;

/// The meaning of one frame, without the bytes of pages or device state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Frame {
    /// Pages; `pages` × page size raw bytes follow the header.
    Data(PageRange),
    /// Pages that hold zeroes only.
    Zero(PageRange),
    /// Pages that the source's file does not have: they read as zeroes and take no memory.
    Hole(PageRange),
    /// Pages that a vCPU at the destination waits for, 1 to [`REQUEST_ENTRIES_MAX`] of them, each
    /// as region and page index.
    Request(Vec<(RegionId, u64)>),
    /// Pages that the destination has cached; the source may free them.
    Ack(PageRange),
    /// The source's table of regions.
    Regions(RegionTable),
    /// The regions match and the destination is ready to receive the guest. Holds each region's
    /// landing unit, in the order of the source's table.
    Ready(Vec<PageSize>),
    /// The source's guest has stopped; precedes the first page in every mode.
    Stopped {
        /// Whether pages are sent after the switchover.
        postcopy: bool,
        /// Whether pages are sent without a request.
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
    /// The destination's guest has loaded the device state.
    Loaded,
    /// The guest belongs to the destination.
    Switchover {
        /// µs since the source's guest stopped.
        stopped_us: u64,
    },
    /// The destination's guest runs.
    Running {
        /// µs since the switchover frame arrived, or would have arrived if it had not waited behind other bytes: the
        /// guest has stood still at least since *stopped* came. With the switchover's own number this is the guest's
        /// downtime at both ends.
        us_since_switchover: u64,
    },
    /// The last frame of this bulk lane.
    LaneEnd,
    /// From the destination: every page is cached. From the source: goodbye.
    Complete(Totals),
    /// The destination's standing, first on a demand lane that replaces a lost one.
    Resume(Standing),
    /// Which of these pages the destination has: bit `i` of word `w` is page `first + 64 * w + i`. At
    /// most [`HAVE_PAGES_MAX`] pages.
    Have {
        /// The pages; the first is a multiple of 64.
        range: PageRange,
        /// One word for each 64 pages.
        words: Vec<u64>,
    },
    /// A digest of each region ([`checksum::digest`](crate::checksum::digest)), in the order of the
    /// source's table, from either end before complete: the destination's of all that has landed,
    /// the source's of all that its files hold.
    Digests(Vec<u64>),
    /// The source's guest runs while its pages come; a page may come several times.
    Rounds,
    /// All pages that this bulk lane carried in rounds have come: from here on each page comes
    /// once.
    RoundsEnd,
    /// Pages that are still to come after rounds: at most [`REMAINING_RUNS_MAX`] runs. All other
    /// pages have come.
    Remaining {
        /// Runs of pages, in any order.
        runs: Vec<PageRange>,
        /// Whether this is the last remaining frame.
        last: bool,
    },
    /// The destination has taken note of the remaining pages and of all pages of the rounds: from
    /// here on each page comes once.
    Settled,
    /// Asks for a pong with this number.
    Ping(u64),
    /// The answer to the ping of this number.
    Pong(u64),
    /// The sender gives up.
    Error(Fault),
}
