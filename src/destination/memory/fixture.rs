//! For tests: a guest of this process, and its arriving pages.

use std::fs::File;

use nix::sys::memfd::{MFdFlags, memfd_create};
use umem_wire::{PageRange, RegionId};

use super::{FaultSource, GuestMemory, GuestRegion, PageId, Part, RegionSetup};
use crate::fault::uffd::{Stop, Uffd};
use crate::memory::kind::Kind;
use crate::memory::pages::PageState;
use crate::memory::region::RamFile;

pub(in crate::destination) const PAGES: u64 = 8;

pub(in crate::destination) fn id(page: u64) -> PageId {
    PageId { region: RegionId(0), page }
}

/// A guest of this process: its memory, its mapping, and its userfaultfd.
pub(in crate::destination) struct Guest {
    pub(in crate::destination) memory: GuestMemory,
    pub(in crate::destination) mapping: RamFile,
    pub(in crate::destination) uffd: Uffd,
}

impl Guest {
    pub(in crate::destination) fn new() -> Guest {
        Guest::in_units_of(12)
    }

    /// A landing unit is `1 << unit_shift` bytes.
    pub(in crate::destination) fn in_units_of(unit_shift: u8) -> Guest {
        Guest::of(PAGES, unit_shift)
    }

    /// A guest of this many pages.
    pub(in crate::destination) fn of(pages: u64, unit_shift: u8) -> Guest {
        let bytes = pages << 12;
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(bytes).unwrap();
        let mapping = RamFile::from_handoff("guest", file.try_clone().unwrap()).unwrap();
        let uffd = Uffd::for_this_process().unwrap();
        let address = mapping.span(0, bytes).as_ptr().expose_provenance() as u64;
        uffd.register(address, bytes, Kind::Shared).unwrap();
        let region = GuestRegion::new(RegionSetup {
            name: "ram".into(),
            kind: Kind::Shared,
            bytes,
            unit_shift,
            page_shift: 12,
            file: Some(RamFile::from_handoff("ram", file).unwrap()),
            parts: vec![Part { offset: 0, bytes, address, source: 0 }],
        });
        let memory = GuestMemory::new(vec![region], vec![FaultSource::new(uffd.clone())]);
        Guest { memory, mapping, uffd }
    }

    pub(in crate::destination) fn region(&self) -> &GuestRegion {
        self.memory.region(RegionId(0))
    }

    /// Its page is in flight, with or without a waiting thread.
    pub(in crate::destination) fn awaits(&self, page: u64, is_wanted: bool) {
        let range = PageRange { region: RegionId(0), first: page, pages: 1 };
        self.memory.begin(range, "a lane").unwrap();
        assert!(!is_wanted || self.region().pages.want(page));
    }

    pub(in crate::destination) fn state(&self, page: u64) -> PageState {
        self.region().pages.get(page)
    }

    pub(in crate::destination) fn address(&self, page: u64) -> u64 {
        self.region().parts[0].address + (page << 12)
    }

    /// Without a fault, which would get no answer.
    pub(in crate::destination) fn sees(&self, page: u64) -> bool {
        let shown = self.uffd.map(self.address(page), 4096).unwrap();
        shown.stop == Some(Stop::Already)
    }

    pub(in crate::destination) fn contents(&self, page: u64) -> Vec<u8> {
        self.mapping.read(page << 12, 4096).unwrap()
    }
}
