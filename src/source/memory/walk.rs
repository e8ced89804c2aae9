//! The order in which a bulk lane claims pages.

use umem_wire::RegionId;

use super::hot::{HotWalk, runs_of};
use super::{Holes, SourceMemory, SourceRegion};
use crate::error::Result;
use crate::memory::claims::{Run, push_page};
use crate::memory::sequences::Followed;

/// A bulk lane's walk of the memory: pages ahead of predictable access sequences first, then pages that the guest wrote
/// in the last pass while it ran at the source, then block by block, from the last demand on.
pub(crate) struct Walk {
    region: usize,
    block: u64,
    pivot_seen: u64,
    current: Option<Block>,
    followed: Followed,
    /// None once all hot pages have been walked.
    hot: Option<HotWalk>,
    /// For a piece of a sequence, or for hot pages.
    holes: Holes,
    /// For a block, while no block is taken.
    spare: Holes,
}

/// Limit of pieces of sequences, of at most 64 pages each, whose pages turn out to be sent already, before the walk
/// continues by blocks.
const VAIN_PIECES_MAX: usize = 64;

/// A block that this lane has taken, and its pages that are not claimed yet.
struct Block {
    region: RegionId,
    next: u64,
    end: u64,
    holes: Holes,
}

impl Walk {
    /// Lane `index` of `lanes` begins at its share of the first region, so that lanes do not
    /// contend for neighbouring blocks.
    pub(crate) fn new(memory: &SourceMemory, index: usize, lanes: usize) -> Walk {
        let blocks = memory.regions.first().map_or(0, |region| region.claims().blocks());
        let block = blocks * index as u64 / lanes.max(1) as u64;
        Walk {
            region: 0,
            block,
            pivot_seen: 0,
            current: None,
            followed: Followed::default(),
            hot: Some(HotWalk::new(memory, index, lanes)),
            holes: Holes::default(),
            spare: Holes::default(),
        }
    }

    /// Claims the next `most` bytes of pages, 1 to 64 pages, and appends their runs; false when no page is left.
    ///
    /// No more is claimed than is about to be sent: a request for a claimed page waits for all pages that were claimed
    /// before it.
    pub(crate) fn next_runs(
        &mut self,
        memory: &SourceMemory,
        most: u64,
        runs: &mut Vec<Run>,
    ) -> Result<bool> {
        if self.run_ahead(memory, most, runs)? {
            return Ok(true);
        }
        if self.claim_hot(memory, most, runs)? {
            return Ok(true);
        }
        if self.current.is_none() {
            self.current = self.take_block(memory)?;
        }
        let Some(block) = &mut self.current else { return Ok(false) };
        block.claim_word(memory, most, runs)?;
        if block.next == block.end {
            self.spare = self.current.take().map(|block| block.holes).unwrap_or_default();
        }
        Ok(true)
    }

    /// Claims pages that are predicted to be accessed soon; false if there are none.
    fn run_ahead(&mut self, memory: &SourceMemory, most: u64, runs: &mut Vec<Run>) -> Result<bool> {
        let limits = |id| {
            let region = memory.region(id);
            (region.claims().pages(), (most / region.unit().bytes()).max(1))
        };
        for _ in 0..VAIN_PIECES_MAX {
            let Some(piece) = self.followed.next(&memory.sequences, limits) else {
                return Ok(false);
            };
            let region = memory.region(piece.region);
            let unit = region.unit();
            let won = region.claims().claim_word(piece.first, piece.pages);
            if won == 0 {
                continue;
            }
            let (start, len) = (piece.first << unit.shift(), piece.pages << unit.shift());
            self.holes.look_at(&region.ram, start, len)?;
            let max = memory.run_pages_max(unit);
            push_won(&mut self.holes, region, (piece.region, max), piece.first, won, runs)?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Claims the unclaimed ones of the next hot pages; false if there are none.
    fn claim_hot(&mut self, memory: &SourceMemory, most: u64, runs: &mut Vec<Run>) -> Result<bool> {
        let Some(walk) = &mut self.hot else { return Ok(false) };
        let pages_max = |id| (most / memory.region(id).unit().bytes()).max(1);
        let Some((id, first, hot)) = walk.next(memory, pages_max) else {
            self.hot = None;
            return Ok(false);
        };
        let region = memory.region(id);
        let unit = region.unit();
        for (offset, pages) in runs_of(hot) {
            let first = first + offset;
            let won = region.claims().claim_word(first, pages);
            if won != 0 {
                self.holes.look_at(&region.ram, first << unit.shift(), pages << unit.shift())?;
                let max = memory.run_pages_max(unit);
                push_won(&mut self.holes, region, (id, max), first, won, runs)?;
            }
        }
        Ok(true)
    }

    fn take_block(&mut self, memory: &SourceMemory) -> Result<Option<Block>> {
        if let Some((region, page)) = memory.pivot.moved(&mut self.pivot_seen) {
            self.region = usize::from(region.0);
            self.block = memory.region(region).claims().block_of(page);
        }
        for _ in 0..memory.regions.len() {
            let region = &memory.regions[self.region];
            if let Some(block) = region.claims().take_block(self.block) {
                self.block = block + 1;
                let (first, pages) = region.claims().block_range(block);
                let shift = region.unit().shift();
                let mut holes = std::mem::take(&mut self.spare);
                holes.look_at(&region.ram, first << shift, pages << shift)?;
                return Ok(Some(Block {
                    region: RegionId(u16::try_from(self.region).expect("at most 256 regions")),
                    next: first,
                    end: first + pages,
                    holes,
                }));
            }
            self.region = (self.region + 1) % memory.regions.len();
            self.block = 0;
        }
        Ok(None)
    }
}

impl Block {
    fn claim_word(&mut self, memory: &SourceMemory, most: u64, runs: &mut Vec<Run>) -> Result<()> {
        let region = memory.region(self.region);
        let unit = region.unit();
        let word = self.next;
        let most = (most / unit.bytes()).max(1);
        let count = (64 - word % 64).min(self.end - word).min(most);
        self.next += count;
        let won = region.claims().claim_word(word, count);
        let max = memory.run_pages_max(unit);
        push_won(&mut self.holes, region, (self.region, max), word, won, runs)
    }
}

/// Appends the pages of a successful claim, a bit each from `first` on, as runs of at most `max` pages.
fn push_won(
    holes: &mut Holes,
    region: &SourceRegion,
    (id, max): (RegionId, u64),
    first: u64,
    mut won: u64,
    runs: &mut Vec<Run>,
) -> Result<()> {
    let unit = region.unit();
    while won != 0 {
        let page = first + u64::from(won.trailing_zeros());
        won &= won - 1;
        let kind = holes.kind(&region.ram, page * unit.bytes(), unit.bytes())?;
        push_page(runs, kind, id, page, max);
    }
    Ok(())
}
