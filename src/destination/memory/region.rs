//! One region of the guest: its file, its mappings in the guest's process, and its page states.

use std::ops::Range;

use crate::error::Result;
use crate::memory::blocks::Blocks;
use crate::memory::claims::RunKind;
use crate::memory::fragments::Fragments;
use crate::memory::kind::{Backing, Kind, RegionMemory};
use crate::memory::pages::{PageState, PageStates};
use crate::memory::region::RamFile;

/// A piece of a region that the guest's process maps contiguously, with one userfaultfd.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    /// Its offset in the region, bytes.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    /// Its address in the guest's process.
    pub(crate) address: u64,
    /// Its userfaultfd: an index of [`GuestMemory::sources`](super::GuestMemory::sources).
    pub(crate) source: usize,
}

/// One region: its file, its mappings in the guest, and its page states.
pub(crate) struct GuestRegion {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    /// Its properties. Its unit, the larger of both sides' page sizes, lands as one: all page numbers count units.
    pub(crate) memory: RegionMemory,
    pub(super) file: Option<RamFile>,
    /// In the order of their offsets; together they cover the region.
    pub(super) parts: Vec<Part>,
    pub(crate) pages: PageStates,
    pub(super) fragments: Fragments,
    pub(super) blocks: Blocks,
}

/// The parameters of a region.
pub(crate) struct RegionSetup {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) bytes: u64,
    pub(crate) unit_shift: u8,
    pub(crate) page_shift: u8,
    /// None for memory without a file ([`Kind::lands_in_file`]).
    pub(crate) file: Option<RamFile>,
    /// Sorted, contiguous, each of whole units.
    pub(crate) parts: Vec<Part>,
}

impl GuestRegion {
    pub(crate) fn new(setup: RegionSetup) -> GuestRegion {
        let RegionSetup { name, kind, bytes, unit_shift, page_shift, file, parts } = setup;
        assert_eq!(file.is_some(), kind.lands_in_file(), "RAM {name} is {kind}");
        let backing = file.as_ref().map_or(Backing::of_pages(page_shift), |file| file.backing);
        let memory = RegionMemory { kind, backing, page_shift, unit_shift };
        memory.assert_possible();
        let units = bytes >> unit_shift;
        GuestRegion {
            name,
            bytes,
            memory,
            file,
            parts,
            pages: PageStates::new(units),
            fragments: Fragments::new(1 << (unit_shift - page_shift)),
            blocks: Blocks::new(units, unit_shift),
        }
    }

    pub(crate) fn byte_offset(&self, page: u64) -> u64 {
        page << self.unit_shift()
    }

    /// The file that pages land in.
    ///
    /// # Panics
    /// For anonymous memory, which has no file.
    pub(crate) fn file(&self) -> &RamFile {
        self.file.as_ref().expect("anonymous memory lands in buffers")
    }

    /// The region is complete: the file's guest may be moved again.
    pub(crate) fn end_move(&self) {
        self.file.iter().for_each(RamFile::end_move);
    }

    /// log2 of the size of a landing unit. All page numbers count these.
    pub(crate) fn unit_shift(&self) -> u8 {
        self.memory.unit_shift
    }

    /// log2 of the size of the guest's pages here.
    pub(super) fn page_shift(&self) -> u8 {
        self.memory.page_shift
    }

    pub(super) fn page_bytes(&self) -> u64 {
        1 << self.page_shift()
    }

    /// The part that contains a byte of the region.
    pub(crate) fn part_at(&self, offset: u64) -> &Part {
        let after = self.parts.partition_point(|part| part.offset <= offset);
        &self.parts[after - 1]
    }

    /// The guest's addresses of a range of the region, piece by piece.
    pub(crate) fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = (&Part, u64, u64)> {
        let mut offset = range.start;
        std::iter::from_fn(move || {
            (offset < range.end).then(|| {
                let part = self.part_at(offset);
                let len = range.end.min(part.offset + part.bytes) - offset;
                let address = part.address + (offset - part.offset);
                offset += len;
                (part, address, len)
            })
        })
    }

    /// Whether the file has data for arrived pages from `page` on, and how many pages are alike. A page without data in
    /// the file is zero, or mapped by the guest already, and a zero page does not change it.
    pub(super) fn kind_at(&self, page: u64, end: u64) -> Result<(RunKind, u64)> {
        let data = self.file().next_data_in(self.byte_offset(page)..self.byte_offset(end))?;
        let next = data.map_or(end, |offset| (offset >> self.unit_shift()).min(end));
        Ok(if next > page { (RunKind::Hole, next - page) } else { (RunKind::Data, 1) })
    }

    /// No byte of the unit has been discarded.
    pub(super) fn is_plain(&self, unit: u64) -> bool {
        self.pages.get(unit) == PageState::Landing
            && (self.memory.unit_is_page() || !self.fragments.any_in(unit, 1))
    }

    /// The guest has discarded bytes of the region.
    pub(super) fn discard(&self, bytes: Range<u64>) {
        let unit_bytes = 1u64 << self.unit_shift();
        let whole = bytes.start.next_multiple_of(unit_bytes)..bytes.end / unit_bytes * unit_bytes;
        if whole.start < whole.end {
            self.pages.discard(
                whole.start >> self.unit_shift(),
                (whole.end - whole.start) >> self.unit_shift(),
            );
        }
        if self.memory.unit_is_page() {
            return;
        }
        let head = bytes.start..bytes.end.min(whole.start);
        let tail = bytes.start.max(whole.end).max(head.end)..bytes.end;
        for rest in [head, tail] {
            if rest.start < rest.end {
                let unit = rest.start >> self.unit_shift();
                let first = (rest.start - self.byte_offset(unit)) >> self.page_shift();
                self.fragments.add(unit, first, (rest.end - rest.start) >> self.page_shift());
                // The kernel discards pages that have arrived.
                if self.pages.get(unit) == PageState::Cached {
                    self.fragments.take(unit);
                }
            }
        }
    }

    /// Landing → Cached for pages whose bytes are in the file. Bytes of parts discarded meanwhile are freed first. The
    /// caller holds the gate of their part open.
    pub(super) fn finish_in_file(&self, first: u64, pages: u64) -> Result<()> {
        let unit_bytes = 1 << self.unit_shift();
        self.discard_fragments(first, pages)?;
        self.pages
            .finish(first, pages, |page| self.file().discard(self.byte_offset(page), unit_bytes))
    }

    /// Frees the landed bytes of discarded parts of units.
    fn discard_fragments(&self, first: u64, units: u64) -> Result<()> {
        if self.memory.unit_is_page() || !self.fragments.any_in(first, units) {
            return Ok(());
        }
        for unit in first..first + units {
            let Some(discarded) = self.fragments.take(unit) else { continue };
            for (page, count) in discarded.runs(true) {
                let offset = self.byte_offset(unit) + (page << self.page_shift());
                self.file().discard(offset, count << self.page_shift())?;
            }
        }
        Ok(())
    }
}
