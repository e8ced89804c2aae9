//! The end of a look over the whole guest: every page that was written before the look began has been in the stream.
//!
//! QEMU collects the guest's writes from time to time (it *syncs*), and walks the collected pages in the order of the
//! blocks, round and round. So a look is done when QEMU has synced after the look began, and has since then either
//! found nothing to send or walked all pages once. QEMU counts the syncs; the rest is visible in the stream behind the
//! *fence*, the position of the stream when the sync became known. QEMU's thread syncs between two parts, and its
//! output from before the sync is in the socket by then, before the fence.
//!
//! ```text
//! look begins     sync     fence                 wrap                 wrap: done
//! ....................|......|..b17 b40 c2 c3 d1 | a0 a7 b16 c2 ... d1 | a0
//!                            '- where QEMU was at the sync is not known: the first wrap does not count alone
//! ```

/// Wraps over the end of the guest's memory that a whole look takes: between two wraps are all pages.
const WRAPS: u8 = 2;

/// A look over the guest after its sync.
#[derive(Debug)]
pub(super) struct Look {
    fence: u64,
    /// The preceding page, by block and offset.
    before: Option<(usize, u64)>,
    wraps: u8,
    /// The current part began behind the fence and has had no page so far.
    is_empty: bool,
}

impl Look {
    /// A look whose sync came before this byte of the stream.
    pub(super) fn new(fence: u64) -> Look {
        Look { fence, before: None, wraps: 0, is_empty: false }
    }

    /// A look from the beginning of the stream, where QEMU is at the first page.
    pub(super) fn first() -> Look {
        Look { wraps: WRAPS - 1, ..Look::new(0) }
    }

    /// A part of RAM began at this byte of the stream.
    pub(super) fn began(&mut self, at: u64) {
        self.is_empty = at >= self.fence;
    }

    /// A page came, whose record began at this byte of the stream.
    pub(super) fn page(&mut self, block: usize, offset: u64, at: u64) {
        self.is_empty = false;
        if at < self.fence {
            return;
        }
        let now = (block, offset);
        if self.before.replace(now).is_some_and(|before| now <= before) {
            self.wraps = (self.wraps + 1).min(WRAPS);
        }
    }

    /// The part is over. Returns whether the look is done.
    pub(super) fn ended(&mut self) -> bool {
        std::mem::take(&mut self.is_empty) || self.wraps == WRAPS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds a part at this byte with these page numbers. Returns whether the look is done then.
    fn part(look: &mut Look, at: u64, pages: &[u64]) -> bool {
        look.began(at);
        for (index, &page) in (1..).zip(pages) {
            look.page(0, page << 12, at + index);
        }
        look.ended()
    }

    #[test]
    fn part_without_pages_behind_the_fence_ends_a_look() {
        let mut look = Look::new(100);
        assert!(!part(&mut look, 50, &[]));
        assert!(!part(&mut look, 99, &[]));
        assert!(!part(&mut look, 120, &[7]));
        assert!(part(&mut look, 130, &[]));
    }

    #[test]
    fn first_wrap_ends_a_look_from_the_beginning() {
        let mut look = Look::first();
        assert!(!part(&mut look, 10, &[0, 1, 2]));
        assert!(!part(&mut look, 20, &[3, 9]));
        assert!(part(&mut look, 30, &[4, 5]));
        let mut look = Look::first();
        assert!(!part(&mut look, 10, &[0, 1, 2]));
        assert!(part(&mut look, 20, &[]));
    }

    #[test]
    fn all_pages_pass_between_two_wraps_behind_the_fence() {
        let mut look = Look::new(100);
        // Wraps before the fence belong to a pass whose sync is unknown.
        assert!(!part(&mut look, 10, &[5, 4, 3, 2, 1]));
        // The page before the fence is not compared.
        assert!(!part(&mut look, 200, &[0, 6]));
        assert!(!part(&mut look, 300, &[2, 3, 9]));
        // The same page again is a whole pass, too.
        assert!(part(&mut look, 400, &[9]));
    }
}
