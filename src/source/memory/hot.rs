//! Hot pages: pages that the guest writes in every pass. A page is hot if it is dirty again in the pass after the one
//! that sent it.
//!
//! ```text
//! pass     2      3          4            stop
//! dirty    yes    yes        yes          yes      hot: left out of passes 3 and 4, first after the switchover
//! dirty    yes    yes        no           no       hot in pass 3, cooled off in pass 4, which sends the page
//! ```
//!
//! A hot page is dirty until it is sent. The dirty log's mark of the page is taken in each pass: without a new mark the
//! page has cooled off.

use umem_wire::RegionId;

use super::SourceMemory;
use crate::memory::bits::Bits;
use crate::memory::dirty::{LEAVES_OUT_FROM, LeftToSend};
use crate::memory::pages::low_bits;

/// The hot pages of each region, and the history that decides it.
pub(super) struct Hot {
    regions: Box<[Heat]>,
}

struct Heat {
    /// Pages that the last pass over their block has sent.
    sent: Bits,
    /// Pages that the last pass over their block has left out: dirty, although the dirty log has not marked them again.
    /// After the last pass: the pages that are sent first.
    hot: Bits,
}

impl Hot {
    /// State for regions of these numbers of pages.
    pub(super) fn new(regions: &[(u64, u8)]) -> Hot {
        let heat = |&(pages, _): &(u64, u8)| Heat { sent: Bits::new(pages), hot: Bits::new(pages) };
        Hot { regions: regions.iter().map(heat).collect() }
    }

    fn region(&self, id: RegionId) -> &Heat {
        &self.regions[usize::from(id.0)]
    }

    /// Chooses the pages to send in pass number `pass`, a bit each, from the `count` ≤ 64 pages at `first` with the
    /// marks `marked`. Only the lane of their block calls this. With `sends_all` no page is left out.
    pub(super) fn choose(
        &self,
        id: RegionId,
        (first, count): (u64, u64),
        marked: u64,
        (pass, sends_all): (u32, bool),
    ) -> u64 {
        let Heat { sent, hot } = self.region(id);
        let (sent_before, hot_before) = (sent.bits(first, count), hot.bits(first, count));
        let leaves_out = pass >= LEAVES_OUT_FROM && !sends_all;
        let stays = if leaves_out { marked & (sent_before | hot_before) } else { 0 };
        let goes = (marked | hot_before) & !stays;
        if stays != hot_before {
            hot.replace(first, count, stays);
        }
        if goes != sent_before {
            sent.replace(first, count, goes);
        }
        goes
    }

    /// The pages of a region that are still to be sent.
    fn left(&self, marks: &Bits, id: RegionId) -> LeftToSend {
        let heat = self.region(id);
        let mut left = LeftToSend::default();
        for first in (0..marks.pages()).step_by(64) {
            let (marked, hot) = (marks.word(first), heat.hot.word(first));
            let stays = marked & (heat.sent.word(first) | hot);
            left.dirty_bytes += u64::from((marked | hot).count_ones());
            left.hot_bytes += u64::from(stays.count_ones());
            left.cooled_bytes += u64::from((hot & !marked).count_ones());
        }
        left
    }

    /// Called when no pass follows and every mark has been made. All dirty pages of a region get marks; those that have
    /// been written since the last pass sent or left them out are sent first.
    pub(super) fn settle(&self, marks: &Bits, id: RegionId) {
        let Heat { sent, hot } = self.region(id);
        for first in (0..marks.pages()).step_by(64) {
            let count = 64.min(marks.pages() - first);
            let was_hot = hot.bits(first, count);
            let was_written = marks.bits(first, count) & sent.bits(first, count);
            if was_hot | was_written != 0 {
                marks.add(first, was_hot);
                hot.replace(first, count, was_hot | was_written);
            }
        }
    }
}

impl SourceMemory {
    /// The memory that is still to be sent. Its hot part is correct from the second pass on.
    pub(crate) fn left_to_send(&self) -> LeftToSend {
        let tracked = self.tracked();
        let elsewhere = tracked.marks.elsewhere();
        let mut left = LeftToSend { dirty_bytes: elsewhere, ..LeftToSend::default() };
        for (index, region) in self.regions.iter().enumerate() {
            let id = RegionId(u16::try_from(index).expect("at most 256 regions"));
            let pages = tracked.hot.left(tracked.marks.region(id), id);
            let shift = region.unit().shift();
            if !tracked.marks.is_logged(id) {
                left.unlogged_bytes += pages.dirty_bytes << shift;
                continue;
            }
            left.dirty_bytes += pages.dirty_bytes << shift;
            left.hot_bytes += if self.sends_all(id) { 0 } else { pages.hot_bytes << shift };
            left.cooled_bytes += pages.cooled_bytes << shift;
        }
        left
    }

    /// Whether each pass sends all dirty pages of a region. Contents in a staging file have limited room, and come
    /// again only if the guest writes them again.
    pub(super) fn sends_all(&self, id: RegionId) -> bool {
        self.is_own(id)
    }
}

/// A bulk lane's walk of the hot pages after the switchover, once around.
#[derive(Default)]
pub(super) struct HotWalk {
    /// Number of regions that the lane has walked. The last one is the first region again, as the lane begins inside
    /// it.
    regions: usize,
    /// The next page to check.
    page: u64,
    /// The page of the first region at which the lane began.
    began: u64,
}

impl HotWalk {
    /// Lane `index` of `lanes` begins at its share of the first region.
    pub(super) fn new(memory: &SourceMemory, index: usize, lanes: usize) -> HotWalk {
        let pages = memory.regions.first().map_or(0, |region| region.claims().pages());
        let page = pages * index as u64 / lanes.max(1) as u64;
        HotWalk { regions: 0, page, began: page }
    }

    /// The next hot pages that no lane has taken, within one word of `count` ≤ 64 pages: the first page, and a bit
    /// each.
    pub(super) fn next(
        &mut self,
        memory: &SourceMemory,
        count: impl Fn(RegionId) -> u64,
    ) -> Option<(RegionId, u64, u64)> {
        let hot = &memory.landing_tracked()?.hot;
        let regions = memory.regions.len();
        while self.regions <= regions {
            let id = RegionId(u16::try_from(self.regions % regions.max(1)).ok()?);
            let pages = &hot.regions.get(usize::from(id.0))?.hot;
            let end = if self.regions == regions { self.began } else { pages.pages() };
            let first = pages.next(self.page, true);
            if first >= end {
                (self.regions, self.page) = (self.regions + 1, 0);
                continue;
            }
            let count = count(id).min(64 - first % 64).min(end - first);
            self.page = first + count;
            let taken = pages.take_word(first, count);
            if taken != 0 {
                return Some((id, first, taken));
            }
        }
        None
    }
}

/// The runs of set bits in a word: first bit and length of each.
pub(super) fn runs_of(mut word: u64) -> impl Iterator<Item = (u64, u64)> {
    std::iter::from_fn(move || {
        let first = u64::from(word.trailing_zeros());
        let count = u64::from((word.checked_shr(word.trailing_zeros())?).trailing_ones());
        word &= !(low_bits(count) << first);
        Some((first, count))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use umem_wire::PageSize;

    use super::*;
    use crate::memory::claims::{Run, RunKind};
    use crate::memory::staging::{StagedFile, Staging};
    use crate::source::memory::rounds::tests::{mark, memory, pass};
    use crate::source::memory::{RoundsWalk, Walk};

    const RAM: RegionId = RegionId(0);

    fn pages(runs: &[(RunKind, u64, u64)]) -> Vec<u64> {
        runs.iter().flat_map(|&(_, first, pages)| first..first + pages).collect()
    }

    /// Numbers of pages that are still to be sent: dirty, hot, cooled off.
    fn left(memory: &SourceMemory) -> [u64; 3] {
        let left = memory.left_to_send();
        [left.dirty_bytes, left.hot_bytes, left.cooled_bytes].map(|bytes| bytes >> 12)
    }

    #[test]
    fn page_dirty_in_two_consecutive_passes_is_left_out_until_it_has_cooled_off() {
        let (memory, _file) = memory(&[10, 11, 700]);
        let mut lane = RoundsWalk::new(0, 1);
        pass(&memory, &mut lane);
        [10, 11, 700].iter().for_each(|&page| mark(&memory, page));
        assert_eq!(pages(&pass(&memory, &mut lane)), [10, 11, 700], "dirty once");
        // Page 11 skips a pass, so it is not dirty in two consecutive ones.
        [10, 900].iter().for_each(|&page| mark(&memory, page));
        assert_eq!(left(&memory), [2, 1, 0]);
        assert_eq!(pages(&pass(&memory, &mut lane)), [900]);
        assert_eq!(left(&memory), [1, 0, 1], "page 10 is still dirty");
        [10, 11].iter().for_each(|&page| mark(&memory, page));
        assert_eq!(left(&memory), [2, 1, 0]);
        for _ in 0..2 {
            assert_eq!(pages(&pass(&memory, &mut lane)), [11]);
            [10, 11].iter().for_each(|&page| mark(&memory, page));
            assert_eq!(left(&memory), [2, 2, 0]);
            assert!(pass(&memory, &mut lane).is_empty(), "both are hot");
            mark(&memory, 10);
            assert_eq!(left(&memory), [2, 1, 1]);
        }
        assert_eq!(pages(&pass(&memory, &mut lane)), [11], "it has cooled off");
        assert_eq!(pages(&pass(&memory, &mut lane)), [10], "it has cooled off, too");
        assert_eq!(left(&memory), [0, 0, 0]);
    }

    /// All pages that the lanes claim after the switchover, one claim of each lane in turn.
    fn claimed(memory: &SourceMemory, lanes: usize, most: u64) -> Vec<u64> {
        let mut walks: Vec<_> = (0..lanes).map(|index| Walk::new(memory, index, lanes)).collect();
        let mut runs: Vec<Run> = Vec::new();
        let mut is_left = true;
        while is_left {
            is_left = false;
            for walk in &mut walks {
                is_left |= walk.next_runs(memory, most, &mut runs).unwrap();
            }
        }
        let pages = |run: &Run| run.range.first..run.range.first + run.range.pages;
        runs.iter().flat_map(pages).collect()
    }

    #[test]
    fn pages_written_in_the_last_pass_are_sent_first_after_the_switchover_and_once() {
        for (lanes, most) in [(1, u64::MAX), (3, u64::MAX), (2, 4096)] {
            let (memory, _file) = memory(&[]);
            let mut lane = RoundsWalk::new(0, 1);
            pass(&memory, &mut lane);
            let hot = [70, 71, 600, 1025, 2000, 3583];
            // Cold: dirty at the end, but not sent in the last pass.
            let cold = [0, 5, 511, 1024, 2001];
            hot.iter().for_each(|&page| mark(&memory, page));
            pass(&memory, &mut lane);
            hot.iter().for_each(|&page| mark(&memory, page));
            pass(&memory, &mut lane);
            // Page 600 is left out although it has not been marked again: it still has to be sent.
            let again = hot.iter().filter(|&&page| page != 600);
            again.chain(&cold).for_each(|&page| mark(&memory, page));
            memory.end_rounds();
            assert!(memory.claim_demanded(RAM, 71), "somebody waits for it");
            let claimed = claimed(&memory, lanes, most);
            let (mut first, mut last) = (claimed[..5].to_vec(), claimed[5..].to_vec());
            first.sort_unstable();
            last.sort_unstable();
            assert_eq!(first, [70, 600, 1025, 2000, 3583], "{lanes} lanes: {claimed:?}");
            assert_eq!(last, cold, "{lanes} lanes: {claimed:?}");
        }
    }

    /// A page that was not sent in a pass that was cut short is dirty, which gives no information about the guest.
    #[test]
    fn page_not_sent_in_any_pass_goes_behind_pages_written_since() {
        let (memory, _file) = memory(&[]);
        let mut lane = RoundsWalk::new(0, 1);
        lane.begin_pass();
        let mut runs = Vec::new();
        lane.next_runs(&memory, 4096, &mut runs).unwrap();
        lane.cut_pass();
        while lane.next_runs(&memory, 4096, &mut runs).unwrap() {}
        mark(&memory, 17);
        memory.end_rounds();
        assert_eq!(claimed(&memory, 1, 4096)[..3], [17, 512, 513]);
    }

    /// These pages are in a staging file with limited room, and come again only when they are written again.
    #[test]
    fn hot_pages_of_ram_without_a_file_are_sent_in_each_pass_and_first_after_the_switchover() {
        let file = StagedFile::create("ram0", 1024 << 12).unwrap();
        let ram = file.ram_file().unwrap();
        let staging = Arc::new(Staging::new(vec![Some(file)], false));
        let memory = SourceMemory::new(vec![ram], false).in_rounds(true);
        let memory = memory.staged(Some(staging.clone()));
        memory.land(memory.table().unwrap().with_units(&[PageSize::SIZE_4K]).unwrap());
        let put = |page: u64| staging.put(&memory.marks(), RAM, page << 12, &[7; 4096]).unwrap();
        let mut lane = RoundsWalk::new(0, 1);
        pass(&memory, &mut lane);
        for _ in 0..4 {
            put(600);
            assert_eq!(left(&memory), [1, 0, 0], "none is left out");
            assert_eq!(pages(&pass(&memory, &mut lane)), [600]);
            assert_eq!(staging.held_bytes(), 0);
        }
        [3, 600].into_iter().for_each(put);
        memory.end_rounds();
        assert_eq!(claimed(&memory, 1, u64::MAX), [600, 3]);
    }

    #[test]
    fn runs_of_a_word_are_its_set_bits() {
        let runs = |word| runs_of(word).collect::<Vec<_>>();
        assert!(runs(0).is_empty());
        assert_eq!(runs(u64::MAX), [(0, 64)]);
        assert_eq!(runs(1 << 63 | 0b110), [(1, 2), (63, 1)]);
    }
}
