//! How a session resumes after all of its lanes were lost: the destination's account, the first
//! frames on the new demand lane.
//!
//! ```text
//! resume   the destination's standing: has the switchover come, does its guest run, its totals
//! have     which pages it has, a bit each: all of region 0 from its first page on, then region 1 …
//! have …
//! ```
//!
//! A have frame covers at most [`HAVE_PAGES_MAX`] pages of one region, in words of 64 bits, the
//! lowest bit the first page. It begins where the one before it ended, so that the account covers
//! every page exactly once: a page that the source takes for missing comes (again), and a page that
//! it takes for present never does. Other frames may come after the last page.
//!
//! The source compares the account with its own state: a page that it has never claimed cannot be
//! present, and an acknowledged page cannot be missing.

use crate::frame::Kind;
pub use crate::frame::{HAVE_WORD_PAGES, Standing};
use crate::limits::HAVE_PAGES_MAX;
use crate::receive_error::ReceiveError;
use crate::region::{PageRange, RegionId, RegionTable};

/// The ranges of the destination's have frames, in order.
pub fn have_ranges(landing: &RegionTable) -> impl Iterator<Item = PageRange> + use<> {
    let pages: Vec<(RegionId, u64)> = landing.iter().map(|(id, r)| (id, r.pages())).collect();
    pages.into_iter().flat_map(|(region, pages)| {
        (0..pages.div_ceil(HAVE_PAGES_MAX)).map(move |chunk| {
            let first = chunk * HAVE_PAGES_MAX;
            PageRange { region, first, pages: HAVE_PAGES_MAX.min(pages - first) }
        })
    })
}

/// The next part of the account that a source's receiver expects.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum AccountStep {
    /// The destination's standing.
    Standing,
    /// The destination's pages, from this page on.
    Pages { region: RegionId, first: u64 },
}

impl AccountStep {
    /// Whether a frame of this kind may come now. Frames that concern only the lane always may.
    pub(crate) fn check(&self, kind: Kind) -> Result<(), ReceiveError> {
        let is_next = match self {
            AccountStep::Standing => kind == Kind::Resume,
            AccountStep::Pages { .. } => kind == Kind::Have,
        };
        match kind {
            Kind::Ping | Kind::Pong | Kind::Error => Ok(()),
            _ if is_next => Ok(()),
            _ => Err(ReceiveError::NotResumed { kind }),
        }
    }

    /// Checks that these are the next pages, before any byte of the body is kept: they begin where
    /// the last ones ended, and end in whole words or with their region.
    pub(crate) fn check_range(
        &self,
        range: PageRange,
        landing: &RegionTable,
    ) -> Result<(), ReceiveError> {
        let AccountStep::Pages { region, first } = *self else {
            return Err(ReceiveError::NotResumed { kind: Kind::Have });
        };
        let end = range.first + range.pages;
        let is_whole = end.is_multiple_of(HAVE_WORD_PAGES) || end == landing.pages(region);
        match (range.region, range.first) == (region, first) && is_whole {
            true => Ok(()),
            false => Err(ReceiveError::HaveOrder { range }),
        }
    }

    /// Advances the account past these checked pages; none after the last page.
    pub(crate) fn heard(range: PageRange, landing: &RegionTable) -> Option<AccountStep> {
        let end = range.first + range.pages;
        if end < landing.pages(range.region) {
            return Some(AccountStep::Pages { region: range.region, first: end });
        }
        let region = RegionId(range.region.0 + 1);
        landing.get(region).map(|_| AccountStep::Pages { region, first: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::{PageSize, Region};

    fn table(pages: &[u64]) -> RegionTable {
        let region = |(index, pages): (usize, &u64)| Region {
            name: format!("ram{index}"),
            bytes: pages << 12,
            page_size: PageSize::SIZE_4K,
        };
        RegionTable::new(pages.iter().enumerate().map(region).collect()).unwrap()
    }

    fn range(region: u16, first: u64, pages: u64) -> PageRange {
        PageRange { region: RegionId(region), first, pages }
    }

    #[test]
    fn have_ranges_cover_every_page_once_and_in_order() {
        let landing = table(&[HAVE_PAGES_MAX + 3, 1, 2 * HAVE_PAGES_MAX]);
        let mut account = Some(AccountStep::Pages { region: RegionId(0), first: 0 });
        let ranges: Vec<_> = have_ranges(&landing).collect();
        for &next in &ranges {
            account.as_ref().unwrap().check_range(next, &landing).unwrap();
            account = AccountStep::heard(next, &landing);
        }
        assert_eq!(account, None);
        let max = HAVE_PAGES_MAX;
        let expected = [(0, 0, max), (0, max, 3), (1, 0, 1), (2, 0, max), (2, max, max)];
        assert_eq!(ranges, expected.map(|(region, first, pages)| range(region, first, pages)));
    }

    #[test]
    fn have_range_with_gap_repetition_or_partial_word_is_refused() {
        let landing = table(&[1000, 64]);
        let account = AccountStep::Pages { region: RegionId(0), first: 64 };
        for wrong in [range(0, 0, 64), range(0, 128, 64), range(1, 0, 64), range(0, 64, 65)] {
            let error = account.check_range(wrong, &landing).unwrap_err();
            assert_eq!(error, ReceiveError::HaveOrder { range: wrong });
        }
        account.check_range(range(0, 64, 128), &landing).unwrap();
        account.check_range(range(0, 64, 936), &landing).unwrap();
        assert!(AccountStep::Standing.check_range(range(0, 64, 64), &landing).is_err());
    }
}
