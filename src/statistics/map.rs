//! The origin of each part of the guest's memory, in a number of cells that does not grow with the
//! guest.
//!
//! The threads that move pages count here with one relaxed addition for each cell that a run
//! touches: a run is 2 MiB at most, so it touches two cells of a guest beyond 8 GiB, and 32 cells
//! of the smallest size.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use umem_wire::PageRange;

use crate::memory::claims::RunKind;

/// Most cells of all regions together: enough for a picture. A cell takes 24 bytes.
pub(crate) const CELLS_MAX: u64 = 4096;

/// The smallest cell, 64 KiB, which limits the cells that a run touches.
const CELL_SHIFT_MIN: u32 = 16;

/// The unit of the counts, which divides all page sizes.
const SMALL_PAGE_SHIFT: u32 = 12;

/// Counts of one cell, in small pages: requested ones, the others by content, and those that an
/// earlier process of the same session moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Came {
    pub(crate) demand: u32,
    pub(crate) background: u32,
    pub(crate) zero: u32,
    pub(crate) hole: u32,
    pub(crate) earlier: u32,
}

impl Came {
    pub(crate) fn pages(self) -> u64 {
        let counts = [self.demand, self.background, self.zero, self.hole, self.earlier];
        counts.into_iter().map(u64::from).sum()
    }
}

/// The whole guest, one region after the other.
#[derive(Default)]
pub(crate) struct Map {
    /// The start of each region, bytes.
    starts: Vec<u64>,
    total_bytes: u64,
    cell_shift: u32,
    cells: Box<[Cell]>,
}

/// Two counts in each number: pages on demand and in the background; of zeroes and of holes.
#[derive(Default)]
struct Cell {
    data: AtomicU64,
    empty: AtomicU64,
    /// Pages that an earlier process moved.
    earlier: AtomicU64,
}

/// The first count of a pair is in the upper half.
const FIRST: u64 = 1 << 32;

impl Map {
    /// For regions of these sizes, bytes.
    pub(crate) fn new(regions: impl Iterator<Item = u64>) -> Map {
        let mut total_bytes = 0;
        let mut starts = Vec::new();
        for bytes in regions {
            starts.push(total_bytes);
            total_bytes += bytes;
        }
        let mut cell_shift = CELL_SHIFT_MIN;
        while total_bytes.div_ceil(1 << cell_shift) > CELLS_MAX {
            cell_shift += 1;
        }
        let cells = (0..total_bytes.div_ceil(1 << cell_shift)).map(|_| Cell::default()).collect();
        Map { starts, total_bytes, cell_shift, cells }
    }

    /// Counts a run that has come, or has been sent, of pages of `1 << page_shift` bytes.
    pub(crate) fn count(&self, range: PageRange, page_shift: u8, kind: RunKind, demanded: bool) {
        self.each_cell(range.region.0, range.first, range.pages, page_shift, |cell, pages| {
            match (demanded, kind) {
                (true, _) => cell.data.fetch_add(pages * FIRST, Relaxed),
                (false, RunKind::Data) => cell.data.fetch_add(pages, Relaxed),
                (false, RunKind::Zero) => cell.empty.fetch_add(pages * FIRST, Relaxed),
                (false, RunKind::Hole) => cell.empty.fetch_add(pages, Relaxed),
            };
        });
    }

    /// Counts pages that an earlier process of the same session moved.
    pub(crate) fn count_earlier(&self, range: PageRange, page_shift: u8) {
        self.each_cell(range.region.0, range.first, range.pages, page_shift, |cell, pages| {
            cell.earlier.fetch_add(pages, Relaxed);
        });
    }

    /// Counts a page of a run as demanded that has been counted as not demanded.
    pub(crate) fn was_demanded(&self, region: u16, page: u64, page_shift: u8, kind: RunKind) {
        self.each_cell(region, page, 1, page_shift, |cell, pages| {
            match kind {
                RunKind::Data => {
                    cell.data.fetch_add(pages * (FIRST - 1), Relaxed);
                    return;
                }
                RunKind::Zero => cell.empty.fetch_sub(pages * FIRST, Relaxed),
                RunKind::Hole => cell.empty.fetch_sub(pages, Relaxed),
            };
            cell.data.fetch_add(pages * FIRST, Relaxed);
        });
    }

    /// Calls `f` with each cell of a range and the small pages of the range in it.
    fn each_cell(
        &self,
        region: u16,
        first: u64,
        pages: u64,
        page_shift: u8,
        f: impl Fn(&Cell, u64),
    ) {
        let Some(start) = self.starts.get(usize::from(region)) else { return };
        let mut at = start + (first << page_shift);
        let end = at + (pages << page_shift);
        while at < end {
            let cell = at >> self.cell_shift;
            let to = end.min((cell + 1) << self.cell_shift);
            let Some(cell) = usize::try_from(cell).ok().and_then(|cell| self.cells.get(cell))
            else {
                return;
            };
            f(cell, (to - at) >> SMALL_PAGE_SHIFT);
            at = to;
        }
    }

    /// Bytes of a cell; the last one may be shorter.
    pub(crate) fn cell_bytes(&self) -> u64 {
        1 << self.cell_shift
    }

    /// Small pages of cell `index`.
    pub(crate) fn cell_pages(&self, index: usize) -> u64 {
        let start = (index as u64) << self.cell_shift;
        self.total_bytes.saturating_sub(start).min(self.cell_bytes()) >> SMALL_PAGE_SHIFT
    }

    /// The counts of every cell, in the order of addresses. Cells may change during the iteration.
    pub(crate) fn cells(&self) -> impl ExactSizeIterator<Item = Came> {
        let halves = |pair: u64| {
            let half = |value: u64| u32::try_from(value).expect("32 bits remain");
            (half(pair >> 32), half(pair & (FIRST - 1)))
        };
        self.cells.iter().map(move |cell| {
            let (demand, background) = halves(cell.data.load(Relaxed));
            let (zero, hole) = halves(cell.empty.load(Relaxed));
            let earlier = u32::try_from(cell.earlier.load(Relaxed)).unwrap_or(u32::MAX);
            Came { demand, background, zero, hole, earlier }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umem_wire::RegionId;

    fn range(region: u16, first: u64, pages: u64) -> PageRange {
        PageRange { region: RegionId(region), first, pages }
    }

    #[test]
    fn every_page_counts_once_in_one_cell() {
        // 3 cells of 64 KiB and a page; the second region begins in the middle of the first cell.
        let map = Map::new([8 * 4096, 41 * 4096].into_iter());
        assert_eq!(map.cells().len(), 4);
        assert_eq!([0, 3].map(|cell| map.cell_pages(cell)), [16, 1]);
        map.count(range(0, 0, 8), 12, RunKind::Hole, false);
        map.count(range(1, 0, 10), 12, RunKind::Data, false);
        map.count(range(1, 10, 1), 12, RunKind::Data, true);
        map.count(range(1, 11, 30), 12, RunKind::Zero, false);
        let cells: Vec<_> = map.cells().collect();
        assert_eq!(cells[0], Came { background: 8, hole: 8, ..Came::default() });
        assert_eq!(cells[1], Came { demand: 1, background: 2, zero: 13, ..Came::default() });
        for (index, cell) in cells.iter().enumerate() {
            assert_eq!(cell.pages(), map.cell_pages(index));
        }
    }

    #[test]
    fn demanded_page_moves_from_its_kind_to_demand() {
        let map = Map::new([16 * 4096].into_iter());
        for (page, kind) in [(0, RunKind::Data), (4, RunKind::Zero), (8, RunKind::Hole)] {
            map.count(range(0, page, 4), 12, kind, false);
            map.was_demanded(0, page + 1, 12, kind);
        }
        let came = map.cells().next().unwrap();
        assert_eq!(came, Came { demand: 3, background: 3, zero: 3, hole: 3, earlier: 0 });
        map.count_earlier(range(0, 12, 4), 12);
        let came = map.cells().next().unwrap();
        assert_eq!((came.earlier, came.pages()), (4, 16));
    }

    #[test]
    fn number_of_cells_is_bounded_for_any_guest_size() {
        for gib in [1, 5, 1000, 100_000_u64] {
            let map = Map::new([gib << 30].into_iter());
            let cells = map.cells().len() as u64;
            assert!((CELLS_MAX / 2..=CELLS_MAX).contains(&cells), "{gib} GiB: {cells}");
        }
        let map = Map::new([64 << 30].into_iter());
        // A 1 GiB page covers many cells.
        map.count(range(0, 1, 1), 30, RunKind::Data, true);
        let pages: u64 = map.cells().map(Came::pages).sum();
        assert_eq!(pages, 1 << 18);
        // An empty map counts nothing.
        Map::default().count(range(0, 0, 1), 12, RunKind::Data, true);
    }
}
