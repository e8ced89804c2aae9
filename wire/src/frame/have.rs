//! The body of a have frame: a bit a page.

use super::FrameError;
use crate::region::PageRange;

/// Pages of one word in a have frame.
pub const HAVE_WORD_PAGES: u64 = 64;

/// Words in a have frame of this many pages.
pub(crate) fn words(pages: u64) -> u64 {
    pages.div_ceil(HAVE_WORD_PAGES)
}

/// Bytes of a have frame's body.
pub(crate) fn body_bytes(pages: u64) -> u64 {
    words(pages) * 8
}

/// The words in a have frame's body; bits past the last page must be zero.
pub(crate) fn decode(range: PageRange, body: &[u8]) -> Result<Vec<u64>, FrameError> {
    let words: Vec<u64> = body.as_chunks::<8>().0.iter().map(|&w| u64::from_le_bytes(w)).collect();
    let used = range.pages % HAVE_WORD_PAGES;
    match words.last() {
        Some(last) if used > 0 && last >> used != 0 => Err(FrameError::HavePadding),
        _ => Ok(words),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::RegionId;

    #[test]
    fn bits_past_the_last_page_are_refused() {
        let range = |pages| PageRange { region: RegionId(0), first: 0, pages };
        let body = |last: u64| [u64::MAX.to_le_bytes(), last.to_le_bytes()].concat();
        assert_eq!(decode(range(65), &body(1)), Ok(vec![u64::MAX, 1]));
        assert_eq!(decode(range(65), &body(2)), Err(FrameError::HavePadding));
        assert_eq!(decode(range(128), &body(1 << 63)), Ok(vec![u64::MAX, 1 << 63]));
    }
}
