//! Headers: their layout, their fields, and their meaning.

use super::kind::Kind;
use super::standing::Standing;
use super::{FrameError, HEADER_BYTES};
use crate::bytes::{put, u16_at, u32_at, u64_at};
use crate::limits::*;
use crate::region::{PageRange, RegionId};

pub(super) mod field {
    pub(in crate::frame) const KIND: usize = 0;
    pub(in crate::frame) const FLAGS: usize = 1;
    pub(in crate::frame) const REGION: usize = 2;
    pub(in crate::frame) const BODY_BYTES: usize = 4;
    pub(in crate::frame) const FIRST: usize = 8;
    pub(in crate::frame) const PAGES: usize = 16;
    pub(in crate::frame) const EXTRA: usize = 24;
}

pub(super) const FLAG_POSTCOPY: u8 = 1;
pub(super) const FLAG_BACKGROUND: u8 = 2;

const FLAG_LAST: u8 = 1;

const FLAG_SWITCHED: u8 = 1;
const FLAG_RUNNING: u8 = 2;

const _: () = assert!(field::EXTRA + size_of::<u64>() == HEADER_BYTES);

/// The offset of the sums in a header.
pub(crate) const EXTRA_AT: usize = field::EXTRA;

/// The offset of the body's length in a header.
pub(crate) const BODY_BYTES_AT: usize = field::BODY_BYTES;

/// The body length in a header that this end has encoded.
pub(crate) fn body_bytes(header: &[u8; HEADER_BYTES]) -> usize {
    u32_at(header, BODY_BYTES_AT) as usize
}

/// A header with a known tag, field by field. [`Header::head`] gives its meaning.
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

    /// The caller has checked the kind's limit; all limits fit 32 bits.
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

    /// Reads the fields. Checks that the kind exists and that unused fields are zero.
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

    /// The first field that is not zero although the kind does not use it.
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
            Kind::Loaded | Kind::LaneEnd | Kind::Rounds | Kind::RoundsEnd | Kind::Settled => {
                nothing
            }
            Kind::Remaining => Header { flags: flags & FLAG_LAST, body_bytes, ..nothing },
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
}

/// The flags of a stopped frame.
pub(crate) fn stopped_flags(postcopy: bool, background: bool) -> u8 {
    (u8::from(postcopy) * FLAG_POSTCOPY) | (u8::from(background) * FLAG_BACKGROUND)
}

/// The flags of a remaining frame.
pub(crate) fn remaining_flags(last: bool) -> u8 {
    u8::from(last) * FLAG_LAST
}

/// Whether the remaining frame with these flags is the last.
pub(super) fn is_last_remaining(flags: u8) -> bool {
    flags & FLAG_LAST != 0
}

/// The flags of a resume frame.
pub(crate) fn standing_flags(standing: &Standing) -> u8 {
    (u8::from(standing.switched) * FLAG_SWITCHED)
        | (u8::from(standing.running.is_some()) * FLAG_RUNNING)
}

/// Whether the guest has switched, and whether it runs; the second only with the first.
pub(super) fn standing_of(flags: u8) -> Result<(bool, bool), FrameError> {
    match (flags & FLAG_SWITCHED != 0, flags & FLAG_RUNNING != 0) {
        (false, true) => Err(FrameError::Standing),
        standing => Ok(standing),
    }
}
