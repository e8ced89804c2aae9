//! Checksums ([`Capabilities::CHECKSUM`]): damaged data is detected before it is used.
//!
//! On a lane where both ends support checksums, every frame's `extra` field holds two CRC32C of 32
//! bits:
//!
//! ```text
//! 24           28
//! body         header
//! of the body, or of the pages' sums      of the frame's number, 8 bytes, and the 28 bytes before it
//! ```
//!
//! The *number* counts the frames of one direction of a lane from 0 on and is not sent: a lost,
//! repeated or reordered frame fails the check like a frame with changed bits. Error frames are not
//! counted, and all ones stand for their number: an error frame is the last, and its sender may not
//! know how many frames came before. The header has its own sum, because a wrong length would make
//! the receiver wait for bytes that never come.
//!
//! Pages are summed in pieces of 4 KiB, whatever their size ([`page_sum`]), when they are sent and
//! when they have come. The caller computes these sums: this crate never sees the pages. A run's
//! sum is the CRC32C of its page sums, each little-endian, in order. The same page sums make a
//! region's [`digest`].
//!
//! CRC32C detects every burst of up to 32 changed bits, and all but one in 4 billion other changes.
//! It does not protect against an attacker, who can change the sum as well; TLS does.
//!
//! [`Capabilities::CHECKSUM`]: crate::Capabilities::CHECKSUM

use crate::bytes::{put, u32_at};
use crate::frame::{BODY_BYTES_AT, EXTRA_AT, HEADER_BYTES, Kind, body_bytes};
use crate::receive_error::ReceiveError;

/// Bytes that one sum covers: of a page, or of a piece of a larger page.
pub const SUMMED_BYTES: usize = 4096;

/// The [`page_sum`] of zeroes.
pub const ZERO_SUM: u32 = 0x98f9_4189;

/// Stands for an error frame's number.
const NO_NUMBER: u64 = u64::MAX;

/// The sum of [`SUMMED_BYTES`] of a page.
pub fn page_sum(bytes: &[u8]) -> u32 {
    debug_assert_eq!(bytes.len(), SUMMED_BYTES);
    crc32c::crc32c(bytes)
}

/// A part of a region's digest: the share of consecutive pieces of [`SUMMED_BYTES`], from piece
/// number `first` on, given their sums.
///
/// A region's digest is the sum (modulo 2^64) of these shares over all of its pieces, in any order,
/// each once. Pages of zeroes count by their content, and holes count as zeroes
/// ([`digest_of_zeroes`]). So the digest does not depend on whether pages were sent as data, zeroes
/// or holes, and it differs when a page has not come at all.
///
/// Sent only with [`Capabilities::WHOLE_DIGESTS`](crate::Capabilities::WHOLE_DIGESTS): in older
/// digests zeroes added nothing.
pub fn digest(first: u64, sums: &[u32]) -> u64 {
    let pages = (first..).zip(sums);
    pages.fold(0, |digest, (page, &sum)| digest.wrapping_add(mixed(page, sum)))
}

/// The share of `pages` pieces of zeroes, or holes.
pub fn digest_of_zeroes(first: u64, pages: u64) -> u64 {
    (first..first + pages).fold(0, |digest, page| digest.wrapping_add(mixed(page, ZERO_SUM)))
}

/// Spreads a page's number and its sum over 64 bits: the finalizer of SplitMix64, twice.
fn mixed(page: u64, sum: u32) -> u64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    mix(mix(page.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_add(sum.into()))
}

/// The sending end of one direction of a lane: puts sums into frames, in the order in which they
/// are sent.
///
/// A copy keeps the frame count of its time, to go back when frames were not sent.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Seal {
    /// The next frame's number; none on a lane without checksums.
    next: Option<u64>,
}

impl Seal {
    /// Before the first frame of a lane; `checked`: whether both ends support checksums.
    pub const fn new(checked: bool) -> Seal {
        Seal { next: if checked { Some(0) } else { None } }
    }

    /// Whether frames get sums. If not, pages need not be summed.
    pub const fn is_on(&self) -> bool {
        self.next.is_some()
    }

    /// Seals whole frames, one after the other, none of which has pages. A device state frame has
    /// to be followed by its state.
    pub fn frames(&mut self, mut frames: &mut [u8]) {
        if !self.is_on() {
            return;
        }
        while let Some((header, rest)) = frames.split_first_chunk_mut::<HEADER_BYTES>() {
            let (body, rest) = rest.split_at_mut(body_bytes(header));
            self.header(header, crc32c::crc32c(body));
            frames = rest;
        }
    }

    /// Seals the header of a data run whose pages have these sums.
    pub fn data(&mut self, header: &mut [u8; HEADER_BYTES], sums: &[u32]) {
        if self.is_on() {
            self.header(header, run_sum(sums));
        }
    }

    fn header(&mut self, header: &mut [u8; HEADER_BYTES], body: u32) {
        let Some(next) = &mut self.next else { return };
        put(header, EXTRA_AT, &body.to_le_bytes());
        let number = if header[0] == Kind::Error as u8 { NO_NUMBER } else { *next };
        *next += u64::from(number != NO_NUMBER);
        let sum = header_sum(header, number);
        put(header, EXTRA_AT + 4, &sum.to_le_bytes());
    }
}

/// The receiving end of one direction of a lane.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Checker {
    next: u64,
}

impl Checker {
    /// Checks the header's sum and removes both sums from a complete header. Returns the sum that
    /// the body must have.
    pub(crate) fn open(&mut self, header: &mut [u8; HEADER_BYTES]) -> Result<u32, ReceiveError> {
        let (body, sum) = (u32_at(header, EXTRA_AT), u32_at(header, EXTRA_AT + 4));
        let is_error = header[0] == Kind::Error as u8;
        let number = if is_error { NO_NUMBER } else { self.next };
        if header_sum(header, number) != sum {
            return Err(ReceiveError::HeaderSum { number: self.next });
        }
        self.next += u64::from(!is_error);
        put(header, EXTRA_AT, &[0; 8]);
        Ok(body)
    }
}

/// The sum of a body.
pub(crate) fn body_sum(body: &[u8]) -> u32 {
    crc32c::crc32c(body)
}

/// A run's sum.
pub(crate) fn run_sum(sums: &[u32]) -> u32 {
    sums.iter().fold(0, |sum, page| crc32c::crc32c_append(sum, &page.to_le_bytes()))
}

fn header_sum(header: &[u8; HEADER_BYTES], number: u64) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&number.to_le_bytes()), &header[..EXTRA_AT + 4])
}

const _: () = assert!(EXTRA_AT + 8 == HEADER_BYTES && BODY_BYTES_AT + 4 <= EXTRA_AT);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::{Fault, FaultCode};
    use crate::frame::FrameError;
    use crate::frame::{Frame, Header};
    use crate::transmit;

    fn encoded(frames: &[Frame]) -> Vec<u8> {
        let mut out = Vec::new();
        frames.iter().for_each(|frame| transmit::encode(frame, &mut out));
        out
    }

    fn first(bytes: &[u8]) -> [u8; HEADER_BYTES] {
        *bytes.first_chunk().unwrap()
    }

    /// The check value of RFC 3720, B.4, and `ZERO_SUM`.
    #[test]
    fn page_sum_equals_the_crc32c_check_value() {
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(page_sum(&[0; SUMMED_BYTES]), ZERO_SUM);
    }

    #[test]
    fn sealed_header_opens_only_once_and_in_order() {
        let mut bytes = encoded(&[Frame::Ping(7), Frame::Loaded]);
        let plain = bytes.clone();
        let mut seal = Seal::new(true);
        seal.frames(&mut bytes);
        assert_ne!(bytes[..HEADER_BYTES], plain[..HEADER_BYTES]);
        let [ping, loaded] = [first(&bytes), first(&bytes[HEADER_BYTES..])];
        let open = |checker: &mut Checker, mut header| checker.open(&mut header).map(|_| header);
        let mut checker = Checker::default();
        assert_eq!(open(&mut checker, ping), Ok(first(&plain)));
        assert_eq!(open(&mut checker, ping), Err(ReceiveError::HeaderSum { number: 1 }));
        assert_eq!(open(&mut checker, loaded), Ok(first(&plain[HEADER_BYTES..])));
        assert_eq!(
            open(&mut Checker::default(), loaded),
            Err(ReceiveError::HeaderSum { number: 0 })
        );
    }

    #[test]
    fn error_frame_opens_at_any_number() {
        let error = Frame::Error(Fault::new(FaultCode::Other, "why"));
        let mut bytes = encoded(&[error]);
        Seal::new(true).frames(&mut bytes);
        let mut checker = Checker { next: 77 };
        let body = checker.open(&mut first(&bytes)).unwrap();
        assert_eq!((body, checker.next), (body_sum(b"why"), 77));
    }

    #[test]
    fn unchecked_lane_leaves_extra_zero() {
        let mut bytes = encoded(&[Frame::Ping(7), Frame::Digests(vec![1, 2])]);
        let plain = bytes.clone();
        Seal::new(false).frames(&mut bytes);
        assert_eq!(bytes, plain);
        Seal::new(true).frames(&mut bytes);
        let unused = FrameError::Unused { kind: Kind::Ping, field: "extra" };
        assert_eq!(Header::decode(&first(&bytes)), Err(unused));
    }

    #[test]
    fn every_flipped_bit_of_a_sealed_header_is_detected() {
        let mut bytes = encoded(&[Frame::Ping(0x1234)]);
        Seal::new(true).frames(&mut bytes);
        for bit in 0..8 * HEADER_BYTES {
            let mut flipped = first(&bytes);
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Checker::default().open(&mut flipped).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn digest_depends_on_page_position_and_not_on_order() {
        let whole = digest(5, &[1, 2, ZERO_SUM, 4]);
        let parts = [digest(8, &[4]), digest_of_zeroes(7, 1), digest(5, &[1, 2])];
        assert_eq!(parts.into_iter().fold(0, u64::wrapping_add), whole);
        assert_ne!(digest(5, &[2, 1, ZERO_SUM, 4]), whole);
        assert_ne!(digest(6, &[1, 2, ZERO_SUM, 4]), whole);
        assert_eq!(digest(3, &[ZERO_SUM; 9]), digest_of_zeroes(3, 9));
        assert_ne!(
            digest_of_zeroes(0, 9),
            digest_of_zeroes(0, 8),
            "a missing page changes the digest"
        );
    }
}
