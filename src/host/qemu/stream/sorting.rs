//! Divides QEMU's stream, event by event: pages that umem moves are marked, the contents of RAM without a file are put
//! where the lanes find them ([`Staging`]), and the rest is kept ([`Cut`]).

use std::ops::Range;
use std::sync::Arc;

use umem_wire::RegionId;

use super::cut::Cut;
use super::{Block, Event, PAGE_BYTES};
use crate::error::{Error, Result};
use crate::memory::dirty::DirtyMap;
use crate::memory::staging::{STAGED_PAGE_BYTES, Staging};

/// Bytes of one read: the capacity of a socket.
pub(super) const PIECE_BYTES: usize = 256 << 10;

/// Bytes of contents that are put at once: those of a piece, and the rest of the page whose end it has.
const PUT_BYTES_MAX: usize = PIECE_BYTES + PAGE_BYTES;

/// A RAM block that umem moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Moved {
    /// QEMU's name of the block.
    pub(super) block: String,
    pub(super) bytes: u64,
    pub(super) region: RegionId,
}

/// Divides a stream into marks, contents and the remaining stream.
pub(super) struct Sorter {
    moved: Vec<Moved>,
    /// The region of each block of the stream, once the blocks are known.
    regions: Vec<Option<RegionId>>,
    marks: Arc<DirtyMap>,
    staging: Option<Arc<Staging>>,
    /// Pages that are still to be marked, or put and marked.
    run: Option<Run>,
    /// Contents of a run of data that are still to be put.
    contents: Vec<u8>,
    /// The next contents belong to the run.
    takes_contents: bool,
    first_walk: FirstWalk,
    pub(super) cut: Cut,
    pub(super) is_ram_over: bool,
}

/// QEMU's first walk of the guest's memory, in the order of blocks and offsets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FirstWalk {
    /// No page has arrived.
    Begins,
    /// The last page that has arrived, by block and offset.
    At(usize, u64),
    Over,
}

impl FirstWalk {
    /// The walk after this page.
    fn with(self, block: usize, offset: u64) -> FirstWalk {
        match self {
            FirstWalk::At(before, last) if (block, offset) <= (before, last) => FirstWalk::Over,
            FirstWalk::Begins | FirstWalk::At(..) => FirstWalk::At(block, offset),
            FirstWalk::Over => FirstWalk::Over,
        }
    }
}

/// Consecutive pages.
struct Run {
    kind: RunKind,
    region: RegionId,
    /// Range of bytes in the region.
    bytes: Range<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum RunKind {
    /// Of a region with a file: its contents are in the file.
    Marks,
    Zeroes,
    Data,
}

impl Sorter {
    pub(super) fn new(
        moved: Vec<Moved>,
        marks: Arc<DirtyMap>,
        staging: Option<Arc<Staging>>,
        cut: Cut,
    ) -> Sorter {
        Sorter {
            moved,
            regions: Vec::new(),
            marks,
            staging,
            run: None,
            contents: Vec::new(),
            takes_contents: false,
            first_walk: FirstWalk::Begins,
            cut,
            is_ram_over: false,
        }
    }

    /// Releases to the lanes the pages that QEMU's first walk has passed; all pages if the walk is over.
    ///
    /// QEMU tracks all writes before its walk begins, and clears a page's bit before it writes the page's record. So a
    /// write after the record was read is in a later record, and a lane that reads the page after the record has all
    /// writes from before it. A page without a record (a free page of a balloon) had its bit cleared before the walk
    /// came to it.
    pub(super) fn let_go(&mut self, is_walked: bool) {
        if is_walked || self.is_ram_over {
            self.first_walk = FirstWalk::Over;
        }
        match self.first_walk {
            FirstWalk::Begins => {}
            FirstWalk::At(block, offset) => {
                let before = self.regions[..block].iter().flatten();
                before.for_each(|&region| self.marks.let_go(region, u64::MAX));
                if let Some(region) = self.regions[block] {
                    self.marks.let_go(region, offset + PAGE_BYTES as u64);
                }
            }
            FirstWalk::Over => self.marks.let_all_go(),
        }
    }

    pub(super) fn take(&mut self, blocks: &[Block], event: &Event<'_>) -> Result<()> {
        match *event {
            Event::Began { .. } if self.regions.len() != blocks.len() => self.find(blocks)?,
            Event::Page { block, offset, is_zero, .. } => {
                self.first_walk = self.first_walk.with(block, offset);
                match self.regions[block] {
                    Some(region) => self.page(region, offset, is_zero)?,
                    None => self.takes_contents = false,
                }
            }
            Event::Content(bytes) if self.takes_contents => self.contents.extend_from_slice(bytes),
            Event::Ended { is_last: true } => {
                // Settled first, so that a thread that waits for the end of RAM finds all pages.
                self.settle_run()?;
                self.is_ram_over = true;
            }
            _ => {}
        }
        let regions = &self.regions;
        self.cut.take(blocks, |block| regions[block].is_some(), event)
    }

    /// Finds the blocks that umem moves among the blocks of the stream.
    fn find(&mut self, blocks: &[Block]) -> Result<()> {
        for moved in &self.moved {
            let block = blocks.iter().find(|block| block.name == moved.block);
            let bytes = block.map_or(0, |block| block.bytes);
            if bytes != moved.bytes {
                return Err(Error::Host(format!(
                    "its RAM block {} has {bytes} bytes in its migration stream, and {} in its list of RAM blocks",
                    moved.block, moved.bytes
                )));
            }
        }
        let of = |block: &Block| {
            let moved = self.moved.iter().find(|moved| moved.block == block.name);
            moved.map(|moved| moved.region)
        };
        self.regions = blocks.iter().map(of).collect();
        Ok(())
    }

    /// Adds a page to the run, if it follows it.
    fn page(&mut self, region: RegionId, offset: u64, is_zero: bool) -> Result<()> {
        let is_staged = self.staging.as_ref().is_some_and(|staging| staging.has(region));
        let kind = match (is_staged, is_zero) {
            (false, _) => RunKind::Marks,
            (true, true) => RunKind::Zeroes,
            (true, false) => RunKind::Data,
        };
        self.takes_contents = kind == RunKind::Data;
        let end = offset + PAGE_BYTES as u64;
        match &mut self.run {
            Some(Run { kind: before, region: of, bytes })
                if *before == kind
                    && *of == region
                    && bytes.end == offset
                    && self.contents.len() < PUT_BYTES_MAX =>
            {
                bytes.end = end;
            }
            _ => {
                self.settle_run()?;
                self.run = Some(Run { kind, region, bytes: offset..end });
            }
        }
        Ok(())
    }

    /// Marks the pages that are still to be marked, after their contents have been put. A page whose contents have
    /// arrived in part begins the next run.
    pub(super) fn settle_run(&mut self) -> Result<()> {
        let Some(Run { kind, region, bytes }) = self.run.take() else { return Ok(()) };
        let len = bytes.end - bytes.start;
        let staging = || {
            let staging = self.staging.as_deref();
            staging.ok_or_else(|| Error::Internal("contents without a place".into()))
        };
        match kind {
            RunKind::Marks => {
                if !self.marks.mark_bytes(region, bytes.start, len) {
                    return Err(not_moved(region, &bytes));
                }
            }
            RunKind::Zeroes => staging()?.put_zeroes(&self.marks, region, bytes.start, len)?,
            RunKind::Data => {
                let part = self.contents.len() % PAGE_BYTES;
                let whole = self.contents.len() - part;
                let (put, rest) = self.contents.split_at(whole);
                staging()?.put(&self.marks, region, bytes.start, put)?;
                if whole as u64 != len {
                    let start = bytes.start + whole as u64;
                    let rest = rest.to_vec();
                    self.contents.clear();
                    self.contents.extend_from_slice(&rest);
                    self.run = Some(Run { kind, region, bytes: start..bytes.end });
                    return Ok(());
                }
                self.contents.clear();
            }
        }
        Ok(())
    }
}

const _: () = assert!(PAGE_BYTES as u64 == STAGED_PAGE_BYTES);

fn not_moved(region: RegionId, bytes: &Range<u64>) -> Error {
    let (start, end) = (bytes.start, bytes.end);
    Error::Host(format!(
        "its migration stream has the bytes {start:#x} to {end:#x} of region {}, which are not moved",
        region.0
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::qemu::stream::Parser;
    use crate::host::qemu::stream::tests::whole;
    use crate::memory::staging::StagedFile;

    const RAM: RegionId = RegionId(0);

    /// The contents and marks after a stream that is read in pieces of this size.
    fn put(stream: &[u8], piece: usize) -> ([u8; 2], u64) {
        let bytes = 2 * STAGED_PAGE_BYTES;
        let file = StagedFile::create("ram0", bytes).unwrap();
        let ram = file.ram_file().unwrap();
        let staging = Arc::new(Staging::new(vec![Some(file)], false));
        let marks = Arc::new(DirtyMap::new(&[(2, 12)]));
        let moved = vec![Moved { block: "ram0".into(), bytes, region: RAM }];
        let cut = Cut::new(1 << 20);
        let mut sorter = Sorter::new(moved, marks.clone(), Some(staging), cut);
        let mut parser = Parser::new();
        for piece in stream.chunks(piece) {
            let read = parser.read(piece, |parser, event| sorter.take(parser.blocks(), &event));
            read.unwrap();
            sorter.settle_run().unwrap();
        }
        assert!(sorter.is_ram_over && sorter.contents.is_empty());
        let pages = [0, 1].map(|page| {
            let bytes = ram.read(page * STAGED_PAGE_BYTES, STAGED_PAGE_BYTES).unwrap();
            assert!(bytes.iter().all(|&byte| byte == bytes[0]), "page {page} in part");
            bytes[0]
        });
        (pages, marks.region(RAM).word(0))
    }

    #[test]
    fn first_walk_is_over_when_it_returns_to_an_earlier_page() {
        let walk = FirstWalk::Begins.with(0, 0).with(0, 4096).with(2, 0);
        assert_eq!(walk, FirstWalk::At(2, 0));
        for (block, offset) in [(2, 0), (1, 8192), (0, 0)] {
            assert_eq!(walk.with(block, offset), FirstWalk::Over);
        }
        assert_eq!(FirstWalk::Over.with(7, 0), FirstWalk::Over);
    }

    #[test]
    fn pages_are_released_as_the_first_walk_passes_them_and_all_at_its_end() {
        let stream = whole();
        let let_go_after = |bytes: usize, is_looked: bool| {
            let marks = Arc::new(DirtyMap::new(&[(2, 12), (1, 12)]));
            marks.hold_back();
            let moved = [("ram0", 0x2000, 0), ("vga", 0x1000, 1)];
            let moved = moved.map(|(block, bytes, region)| Moved {
                block: block.into(),
                bytes,
                region: RegionId(region),
            });
            let mut sorter = Sorter::new(moved.into(), marks.clone(), None, Cut::new(1 << 20));
            let mut parser = Parser::new();
            let read = |parser: &Parser, event: Event<'_>| sorter.take(parser.blocks(), &event);
            parser.read(&stream[..bytes], read).unwrap();
            sorter.settle_run().unwrap();
            sorter.let_go(is_looked);
            let ready =
                |region, pages| (1..=pages).filter(|&end| marks.is_ready(region, end)).count();
            (ready(RegionId(0), 2), ready(RegionId(1), 1))
        };
        let mut steps = Vec::new();
        for bytes in 0..=stream.len() {
            let ready = let_go_after(bytes, false);
            if steps.last() != Some(&ready) {
                steps.push(ready);
            }
        }
        assert_eq!(steps, [(0, 0), (1, 0), (2, 0), (2, 1)]);
        // A look from the beginning is done.
        assert_eq!(let_go_after(0, true), (2, 1));
    }

    #[test]
    fn each_page_has_its_last_contents_for_any_pieces() {
        let stream = whole();
        for piece in (1..200).chain(4000..4200).chain([stream.len()]) {
            assert_eq!(put(&stream, piece), ([3, 2], 0b11), "{piece}");
        }
    }
}
