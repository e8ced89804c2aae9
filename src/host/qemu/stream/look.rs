//! When a look over the whole guest is done: every page that was written before it began has been in the stream.
//!
//! QEMU collects what the guest has written now and then (it *syncs*), and goes through the pages that it has collected
//! in the order of the blocks, round and round. So a look is done when QEMU has synced after the look began, and has
//! since then either found nothing to send, or gone through all pages once. The first is counted by QEMU; the rest is
//! seen in the stream behind the *fence*, which is where the stream was when the sync was known of. QEMU's thread syncs
//! between two parts, and what it has written before lies in the socket then, before the fence.
//!
//! ```text
//! look begins     sync     fence                 wrap                 wrap: done
//! ....................|......|..b17 b40 c2 c3 d1 | a0 a7 b16 c2 ... d1 | a0
//!                            '- where QEMU was at the sync is not known: the first wrap does not count alone
//! ```

/// Passes over the end of the guest's memory that a whole look takes: from one to the next are all pages.
const WRAPS: u8 = 2;

/// A look over the guest whose sync has been.
#[derive(Debug)]
pub(super) struct Look {
    fence: u64,
    /// The page before, by block and offset.
    before: Option<(usize, u64)>,
    wraps: u8,
    /// The part that is being read began behind the fence and has had no page so far.
    is_empty: bool,
}

impl Look {
    /// One whose sync was before this byte of the stream.
    pub(super) fn new(fence: u64) -> Look {
        Look { fence, before: None, wraps: 0, is_empty: false }
    }

    /// One from the beginning of the stream on, where QEMU is at the first page.
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

    /// The part is over. Whether the look is done.
    pub(super) fn ended(&mut self) -> bool {
        std::mem::take(&mut self.is_empty) || self.wraps == WRAPS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A part at this byte, its pages' numbers, and whether the look is done then.
    fn part(look: &mut Look, at: u64, pages: &[u64]) -> bool {
        look.began(at);
        for (index, &page) in (1..).zip(pages) {
            look.page(0, page << 12, at + index);
        }
        look.ended()
    }

    #[test]
    fn a_part_without_pages_behind_the_fence_ends_a_look() {
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
    fn all_pages_have_passed_from_one_wrap_behind_the_fence_to_the_next() {
        let mut look = Look::new(100);
        // Wraps before the fence are of a pass whose sync nobody knows.
        assert!(!part(&mut look, 10, &[5, 4, 3, 2, 1]));
        // The page before the fence is not compared with.
        assert!(!part(&mut look, 200, &[0, 6]));
        assert!(!part(&mut look, 300, &[2, 3, 9]));
        // The same page again is a whole pass, too.
        assert!(part(&mut look, 400, &[9]));
    }
}
