//! The memory of a running guest: the pages written since they were sent, the order in which they are sent again, and
//! the pages that are left when the guest stops.

use std::sync::Arc;

use umem_ring::Memory;
use umem_wire::limits::REMAINING_RUNS_MAX;
use umem_wire::{HEADER_BYTES, PageRange, RegionId, transmit};

use super::hot::Hot;
use super::{Holes, SourceMemory};
use crate::error::{Error, Result, WITHOUT_PASSES};
use crate::memory::bits::Bits;
use crate::memory::claims::{Run, RunKind, push_page};
use crate::memory::dirty::DirtyMap;
use crate::memory::guarded::Gone;
use crate::memory::pages::low_bits;
use crate::memory::staging::{STAGED_PAGE_BYTES, Staging};
use crate::source::sending::seal::Sealer;
use crate::statistics::Counters;

/// The state of pages that are sent in rounds.
pub(super) struct Tracked {
    /// Pages to be sent, or sent again, as marked by the dirty log.
    pub(super) marks: Arc<DirtyMap>,
    /// By region: pages whose last copy was sent as data.
    data: Box<[Bits]>,
    /// Pages that the guest writes in every pass.
    pub(super) hot: Hot,
}

impl Tracked {
    /// Every page is to be sent. For regions of these numbers of pages of `1 << shift` bytes.
    pub(super) fn new(regions: &[(u64, u8)]) -> Tracked {
        let data = regions.iter().map(|&(pages, _)| Bits::new(pages)).collect();
        let marks = DirtyMap::new(regions);
        marks.mark_all();
        Tracked { marks: Arc::new(marks), data, hot: Hot::new(regions) }
    }
}

/// Words of 64 pages in a block, at most.
const BLOCK_WORDS: usize = 8;

/// A lane's walk of the dirty pages, once around in each pass. A block belongs to one lane in all passes, because the
/// copies of a page must stay in order.
pub(crate) struct RoundsWalk {
    index: u64,
    lanes: u64,
    /// The number of the pass, from 1.
    pass: u32,
    region: usize,
    /// The next block of that region to check.
    block: u64,
    /// Number of blocks in the regions before it.
    before: u64,
    current: Block,
    holes: Holes,
    /// The pass ends with the current block.
    is_cut: bool,
    /// The next block is held back by the dirty log.
    is_waiting: bool,
}

/// The current block.
#[derive(Clone, Copy)]
struct Block {
    region: RegionId,
    first: u64,
    /// Its pages that were dirty and have not been sent yet, a bit each.
    dirty: [u64; BLOCK_WORDS],
}

impl Block {
    fn next(&self) -> Option<u64> {
        let word = self.dirty.iter().position(|&word| word != 0)?;
        let bit = u64::from(self.dirty[word].trailing_zeros());
        Some(self.first + word as u64 * 64 + bit)
    }
}

impl RoundsWalk {
    /// The walk of lane `index` of `lanes`.
    pub(crate) fn new(index: usize, lanes: usize) -> RoundsWalk {
        let current = Block { region: RegionId(0), first: 0, dirty: [0; BLOCK_WORDS] };
        RoundsWalk {
            index: index as u64,
            lanes: lanes.max(1) as u64,
            pass: 0,
            region: 0,
            block: 0,
            before: 0,
            current,
            holes: Holes::default(),
            is_cut: false,
            is_waiting: false,
        }
    }

    /// Whether [`next_runs`](RoundsWalk::next_runs) has found nothing because the dirty log holds the next block back.
    pub(crate) fn is_waiting(&self) -> bool {
        self.is_waiting
    }

    /// Begins again with the first block.
    pub(crate) fn begin_pass(&mut self) {
        self.pass = self.pass.saturating_add(1);
        (self.region, self.block, self.before, self.is_cut) = (0, 0, 0, false);
    }

    /// The pass ends with the current block, whose bits have been taken; the bits of all other blocks stay.
    pub(crate) fn cut_pass(&mut self) {
        self.is_cut = true;
    }

    /// Takes the next `most` bytes of dirty data, or a block of pages that are sent without bytes, and appends their
    /// runs. False at the end of the pass. Appends nothing while the walk [waits](RoundsWalk::is_waiting).
    pub(crate) fn next_runs(
        &mut self,
        memory: &SourceMemory,
        most: u64,
        runs: &mut Vec<Run>,
    ) -> Result<bool> {
        if self.current.next().is_none() && !self.take_block(memory)? {
            return Ok(self.is_waiting);
        }
        let region = memory.region(self.current.region);
        let (unit, max) = (region.unit(), memory.run_pages_max(region.unit()));
        let mut bytes = 0;
        while bytes < most
            && let Some(page) = self.current.next()
        {
            let kind = self.holes.kind(&region.ram, page * unit.bytes(), unit.bytes())?;
            push_page(runs, kind, self.current.region, page, max);
            if kind == RunKind::Data {
                bytes += unit.bytes();
            }
            let at = page - self.current.first;
            let word = usize::try_from(at / 64).expect("inside a block");
            self.current.dirty[word] &= !(1 << (at % 64));
        }
        Ok(true)
    }

    /// Moves on to this lane's next block with dirty pages.
    fn take_block(&mut self, memory: &SourceMemory) -> Result<bool> {
        self.is_waiting = false;
        if self.is_cut {
            return Ok(false);
        }
        while let Some(region) = memory.regions.get(self.region) {
            let id = RegionId(u16::try_from(self.region).expect("at most 256 regions"));
            let blocks = region.claims().blocks();
            if !memory.tracked().marks.is_logged(id) {
                self.block = blocks;
            }
            while self.block < blocks {
                let block = self.block;
                let is_ours = (self.before + block) % self.lanes == self.index;
                let (first, pages) = region.claims().block_range(block);
                if is_ours && !memory.tracked().marks.is_ready(id, first + pages) {
                    self.is_waiting = true;
                    return Ok(false);
                }
                self.block += 1;
                if is_ours && self.take_dirty(memory, id, block)? {
                    return Ok(true);
                }
            }
            self.before += blocks;
            self.region += 1;
            self.block = 0;
        }
        Ok(false)
    }

    /// Takes the dirty bits of a block, all of them before the file is read: a later write is marked again, and its
    /// page is sent in the next pass. Hot pages are left out.
    fn take_dirty(&mut self, memory: &SourceMemory, id: RegionId, block: u64) -> Result<bool> {
        let region = memory.region(id);
        let (first, pages) = region.claims().block_range(block);
        let Tracked { marks, hot, .. } = memory.tracked();
        let (marks, rule) = (marks.region(id), (self.pass, memory.sends_all(id)));
        let mut dirty = [0; BLOCK_WORDS];
        let mut page = first;
        while page < first + pages {
            // A block may be less than a word of the bitmap, and begin within one.
            let count = (64 - page % 64).min(first + pages - page);
            let at = page - first;
            dirty[usize::try_from(at / 64).expect("inside a block")] |=
                hot.choose(id, (page, count), marks.take_word(page, count), rule) << (at % 64);
            page += count;
        }
        self.current = Block { region: id, first, dirty };
        if self.current.next().is_none() {
            return Ok(false);
        }
        let shift = region.unit().shift();
        self.holes.look_at(&region.ram, first << shift, pages << shift)?;
        Ok(true)
    }
}

impl SourceMemory {
    pub(super) fn tracked(&self) -> &Tracked {
        let tracked = self.landing_tracked();
        tracked.expect("rounds begin after the destination is ready")
    }

    /// The map that the dirty log marks.
    ///
    /// # Panics
    /// Without rounds, and before the destination is ready.
    pub(crate) fn marks(&self) -> Arc<DirtyMap> {
        self.tracked().marks.clone()
    }

    /// The pieces of a run that is sent while the guest runs: its header, and its pages if they are sent with it. With
    /// checksums the pages are copied to `copy` first, so that the sum matches the sent bytes although the guest writes
    /// meanwhile. Pages of a staging file are copied too: a release zeroes a part of a huge page in place.
    pub(crate) fn pieces_in_rounds(
        &self,
        run: &Run,
        sealer: &mut Sealer,
        copy: impl FnOnce() -> Vec<u8>,
    ) -> Result<([u8; HEADER_BYTES], Option<Memory>)> {
        let region = self.region(run.range.region);
        let contents = match run.kind {
            RunKind::Data if self.is_checked || self.gives_back(run.range.region).is_some() => {
                let (offset, len) =
                    (run.range.first * region.unit().bytes(), self.bytes(run.range));
                let mut bytes = copy();
                bytes.resize(usize::try_from(len).expect("64-bit Linux"), 0);
                region.ram.read_into(&mut bytes, offset)?;
                Some(Memory::from(bytes))
            }
            RunKind::Data => Some(self.contents(run.range)?),
            RunKind::Zero | RunKind::Hole => None,
        };
        let header = sealer.run(run, contents.as_ref()).map_err(|Gone| region.ram.gone())?;
        Ok((header, contents))
    }

    /// The staging files of a region, if its pages are released once they have been sent.
    fn gives_back(&self, id: RegionId) -> Option<&Staging> {
        let is_page = || self.region(id).unit().bytes() == STAGED_PAGE_BYTES;
        self.staging_of(id).filter(|_| is_page())
    }

    /// Notes that a run has been handed to the kernel in a round. Its pages in a staging file are not needed any more:
    /// if this lane is lost, the guest continues with its own memory.
    pub(crate) fn count_in_round(&self, run: &Run) -> Result<()> {
        let data = &self.tracked().data[usize::from(run.range.region.0)];
        Counters::add(&self.counters.rounds_page_bytes, self.bytes(run.range));
        match run.kind {
            RunKind::Data => {
                data.set(run.range.first, run.range.pages);
                Counters::add(&self.counters.rounds_bytes, self.bytes(run.range));
            }
            RunKind::Zero | RunKind::Hole => data.clear(run.range.first, run.range.pages),
        }
        match self.gives_back(run.range.region) {
            Some(staging) if run.kind != RunKind::Hole => {
                staging.release(self.tracked().marks.region(run.range.region), run.range)
            }
            _ => Ok(()),
        }
    }

    /// Called when the guest stands still and every mark has been made: dirty pages remain to be sent, once, and all
    /// others count as sent. Returns the remaining frames.
    pub(crate) fn end_rounds(&self) -> Vec<u8> {
        let (mut frames, mut runs) = (Vec::new(), Vec::new());
        for (index, region) in self.regions.iter().enumerate() {
            let id = RegionId(u16::try_from(index).expect("at most 256 regions"));
            let Tracked { marks, hot, .. } = self.tracked();
            let (marks, claims) = (marks.region(id), region.claims());
            hot.settle(marks, id);
            claims.claim_all();
            for first in (0..marks.pages()).step_by(64) {
                let clean = !marks.word(first) & low_bits(marks.pages() - first);
                claims.account(first, clean).expect("every page is claimed");
            }
            claims.free_blocks();
            let Ok(()) = marks.each_run(true, |first, pages| {
                runs.push(PageRange { region: id, first, pages });
                if runs.len() == REMAINING_RUNS_MAX {
                    transmit::remaining(&mut frames, &runs, false);
                    runs.clear();
                }
                Ok::<(), std::convert::Infallible>(())
            });
            let Ok(()) = marks.each_run(false, |first, pages| {
                self.count_clean(id, first, pages);
                Ok::<(), std::convert::Infallible>(())
            });
            if let Some(staging) = self.staging_of(id) {
                self.digests.add_digest(id, staging.given_back(id));
            }
        }
        transmit::remaining(&mut frames, &runs, true);
        frames
    }

    /// Counts pages whose last copy is final.
    fn count_clean(&self, region: RegionId, first: u64, pages: u64) {
        let data = &self.tracked().data[usize::from(region.0)];
        let (mut page, end) = (first, first + pages);
        while page < end {
            let is_data = data.get(page);
            let next = data.next(page, !is_data).min(end);
            let range = PageRange { region, first: page, pages: next - page };
            let kind = if is_data { RunKind::Data } else { RunKind::Hole };
            self.count(&Run { kind, range }, false);
            Counters::add(&self.counters.settled_page_bytes, self.bytes(range));
            if is_data {
                Counters::add(&self.counters.settled_bytes, self.bytes(range));
            }
            Counters::add(&self.counters.pages_background, range.pages);
            page = next;
        }
    }
}

/// The reason why a migration cannot have rounds.
pub(crate) fn no_dirty_log() -> Error {
    Error::Unsupported(format!(
        "the monitor of this guest has no log of the pages that the guest writes, which passes while the guest runs \
         need: use {WITHOUT_PASSES}"
    ))
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::FileExt;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use umem_wire::{Event, LaneRole, PageSize, Receiver};

    use super::*;
    use crate::memory::region::RamFile;

    /// Blocks of 2 MiB.
    const BLOCKS: u64 = 7;
    const BLOCK: u64 = 512;
    const RAM: RegionId = RegionId(0);

    /// A file of holes except for the pages `data`, in rounds.
    pub(in crate::source::memory) fn memory(data: &[u64]) -> (SourceMemory, std::fs::File) {
        let file = std::fs::File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len((BLOCKS * BLOCK) << 12).unwrap();
        data.iter().for_each(|&page| write(&file, page, 0xa5));
        let ram = RamFile::of_source("ram0", file.try_clone().unwrap()).unwrap();
        let memory = SourceMemory::new(vec![ram], false).in_rounds(true);
        memory.land(memory.table().unwrap().with_units(&[PageSize::SIZE_4K]).unwrap());
        (memory, file)
    }

    fn write(file: &std::fs::File, page: u64, byte: u8) {
        file.write_all_at(&[byte; 4096], page << 12).unwrap();
    }

    pub(in crate::source::memory) fn mark(memory: &SourceMemory, page: u64) {
        assert!(memory.marks().mark_bytes(RAM, page << 12, 1));
    }

    /// A whole pass of a lane.
    pub(in crate::source::memory) fn pass(
        memory: &SourceMemory,
        walk: &mut RoundsWalk,
    ) -> Vec<(RunKind, u64, u64)> {
        walk.begin_pass();
        let mut runs = Vec::new();
        while walk.next_runs(memory, 64 << 10, &mut runs).unwrap() {}
        runs.iter().for_each(|run| memory.count_in_round(run).unwrap());
        runs.iter().map(|run| (run.kind, run.range.first, run.range.pages)).collect()
    }

    #[test]
    fn block_stays_with_one_lane_in_every_pass() {
        let (memory, _file) = memory(&[]);
        let mut lanes = [0, 1, 2].map(|index| RoundsWalk::new(index, 3));
        for _ in 0..2 {
            memory.marks().mark_all();
            let mut came = Vec::new();
            for (index, lane) in lanes.iter_mut().enumerate() {
                for (_, first, pages) in pass(&memory, lane) {
                    came.extend(first..first + pages);
                    let blocks = first / BLOCK..(first + pages).div_ceil(BLOCK);
                    assert!(blocks.clone().all(|block| block % 3 == index as u64), "{blocks:?}");
                }
            }
            came.sort_unstable();
            assert!(came.into_iter().eq(0..BLOCKS * BLOCK), "every page once");
            assert_eq!(memory.left_to_send().dirty_bytes, 0);
        }
    }

    #[test]
    fn page_is_sent_as_its_kind_at_the_time_of_its_pass() {
        let (memory, file) = memory(&[3, 4, 600]);
        let mut lane = RoundsWalk::new(0, 1);
        let all = pass(&memory, &mut lane);
        let data = |runs: &[(RunKind, u64, u64)]| {
            let data = runs.iter().filter(|(kind, ..)| *kind == RunKind::Data);
            data.map(|&(_, first, pages)| (first, pages)).collect::<Vec<_>>()
        };
        assert_eq!(data(&all), [(3, 2), (600, 1)]);
        // A hole that becomes data, data that become zeroes, and no page without a mark.
        write(&file, 1000, 1);
        write(&file, 4, 0);
        write(&file, 5, 7);
        [4, 1000].iter().for_each(|&page| mark(&memory, page));
        let again = pass(&memory, &mut lane);
        assert_eq!(again, [(RunKind::Zero, 4, 1), (RunKind::Data, 1000, 1)]);
    }

    /// The bits of a block are taken before its pages are read: a bit that is set afterwards belongs to a later write,
    /// and stays.
    #[test]
    fn page_written_while_its_block_is_sent_is_sent_again() {
        let (memory, file) = memory(&[0, 1, 2]);
        let mut lane = RoundsWalk::new(0, 1);
        let mut runs = Vec::new();
        lane.next_runs(&memory, 4096, &mut runs).unwrap();
        // In the lane's current block, behind and before the page that the lane has just taken.
        for page in [0, 2, 300] {
            write(&file, page, 9);
            mark(&memory, page);
        }
        while lane.next_runs(&memory, 4096, &mut runs).unwrap() {}
        assert_eq!(memory.left_to_send().dirty_bytes, 3 << 12);
        let again: Vec<u64> = pass(&memory, &mut lane).iter().map(|&(_, first, _)| first).collect();
        assert_eq!(again, [0, 2, 300]);
    }

    #[test]
    fn lane_waits_for_blocks_held_back_by_the_log_until_they_are_released() {
        let (memory, _file) = memory(&[0, 600]);
        let marks = memory.marks();
        marks.hold_back();
        let mut lane = RoundsWalk::new(0, 1);
        let go_on = |lane: &mut RoundsWalk| {
            let mut runs = Vec::new();
            while lane.next_runs(&memory, 64 << 10, &mut runs).unwrap() && !lane.is_waiting() {}
            runs.iter().map(|run| run.range.pages).sum::<u64>()
        };
        lane.begin_pass();
        assert_eq!((go_on(&mut lane), lane.is_waiting()), (0, true));
        marks.let_go(RAM, ((2 * BLOCK) << 12) - 1);
        assert_eq!((go_on(&mut lane), lane.is_waiting()), (BLOCK, true));
        assert_eq!((go_on(&mut lane), lane.is_waiting()), (0, true));
        marks.let_all_go();
        assert_eq!((go_on(&mut lane), lane.is_waiting()), ((BLOCKS - 1) * BLOCK, false));
        // A pass that is cut short does not wait any longer.
        marks.mark_all();
        marks.hold_back();
        lane.begin_pass();
        assert_eq!((go_on(&mut lane), lane.is_waiting()), (0, true));
        lane.cut_pass();
        assert_eq!((go_on(&mut lane), lane.is_waiting()), (0, false));
    }

    #[test]
    fn cut_pass_ends_with_its_block_and_other_pages_stay_dirty() {
        let (memory, _file) = memory(&[0, 1, 700]);
        let mut lane = RoundsWalk::new(0, 1);
        lane.begin_pass();
        let mut runs = Vec::new();
        assert!(lane.next_runs(&memory, 4096, &mut runs).unwrap());
        lane.cut_pass();
        while lane.next_runs(&memory, 4096, &mut runs).unwrap() {}
        let pages: u64 = runs.iter().map(|run| run.range.pages).sum();
        assert_eq!(
            (pages, memory.left_to_send().dirty_bytes),
            (BLOCK, ((BLOCKS - 1) * BLOCK) << 12)
        );
        runs.iter().for_each(|run| memory.count_in_round(run).unwrap());
        assert_eq!(memory.counters.moved_bytes(), BLOCK << 12);
        // The next pass is whole.
        let rest: u64 = pass(&memory, &mut lane).iter().map(|&(.., pages)| pages).sum();
        assert_eq!((rest, memory.left_to_send().dirty_bytes), ((BLOCKS - 1) * BLOCK, 0));
        memory.end_rounds();
        assert_eq!(memory.counters.done_bytes(), (BLOCKS * BLOCK) << 12);
        assert_eq!(memory.counters.moved_bytes(), (BLOCKS * BLOCK) << 12, "nothing moves twice");
    }

    #[test]
    fn dirty_pages_remain_after_the_rounds_and_all_others_count_as_sent() {
        let (memory, _file) = memory(&[0, 1, 2, 700]);
        let mut lane = RoundsWalk::new(0, 1);
        pass(&memory, &mut lane);
        [1, 2, 1500].iter().for_each(|&page| mark(&memory, page));
        let frames = memory.end_rounds();
        let mut receiver = Receiver::for_destination(LaneRole::Demand);
        receiver.set_regions(memory.landing());
        let mut rest = &frames[..];
        let mut remaining = Vec::new();
        while !rest.is_empty() {
            let umem_wire::Target::Control { exact } = receiver.next_target() else { panic!() };
            let (now, later) = rest.split_at(exact);
            receiver.control(now).unwrap();
            rest = later;
            while let Some(event) = receiver.poll_event() {
                let Event::Remaining { runs, last } = event else { panic!("{event:?}") };
                assert_eq!(last, rest.is_empty());
                remaining.extend(runs.iter().map(|run| (run.first, run.pages)));
            }
        }
        assert_eq!(remaining, [(1, 2), (1500, 1)]);
        let left: Vec<u64> =
            (0..BLOCKS * BLOCK).filter(|&page| memory.claim_demanded(RAM, page)).collect();
        assert_eq!(left, [1, 2, 1500]);
        let totals = memory.counters.totals();
        assert_eq!((totals.data_bytes, totals.pages()), (2 << 12, BLOCKS * BLOCK - 3));
        assert_eq!(totals.bytes(), (BLOCKS * BLOCK - 3) << 12);
    }
}
