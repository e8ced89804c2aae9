//! For tests: a guest of this process, and pages of it that come.

use std::fs::File;

use nix::sys::memfd::{MFdFlags, memfd_create};
use umem_wire::{PageRange, RegionId};

use super::{FaultSource, GuestMemory, GuestRegion, PageId, Part, RegionSetup};
use crate::fault::uffd::{Stop, Uffd};
use crate::memory::kind::Kind;
use crate::memory::pages::PageState;
use crate::memory::region::RamFile;

pub(super) const PAGES: u64 = 8;

pub(super) fn id(page: u64) -> PageId {
    PageId { region: RegionId(0), page }
}

/// A guest of this process: its memory, its mapping, and its userfaultfd.
pub(super) struct Guest {
    pub(super) memory: GuestMemory,
    pub(super) mapping: RamFile,
    pub(super) uffd: Uffd,
}

impl Guest {
    pub(super) fn new() -> Guest {
        Guest::in_units_of(12)
    }

    /// What lands as one is `1 << unit_shift` bytes.
    pub(super) fn in_units_of(unit_shift: u8) -> Guest {
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(PAGES << 12).unwrap();
        let mapping = RamFile::from_handoff("guest", file.try_clone().unwrap()).unwrap();
        let uffd = Uffd::for_this_process().unwrap();
        let address = mapping.span(0, PAGES << 12).as_ptr().expose_provenance() as u64;
        uffd.register(address, PAGES << 12, Kind::Shared).unwrap();
        let region = GuestRegion::new(RegionSetup {
            name: "ram".into(),
            kind: Kind::Shared,
            bytes: PAGES << 12,
            unit_shift,
            page_shift: 12,
            file: Some(RamFile::from_handoff("ram", file).unwrap()),
            parts: vec![Part { offset: 0, bytes: PAGES << 12, address, source: 0 }],
        });
        let memory = GuestMemory::new(vec![region], vec![FaultSource::new(uffd.clone())]);
        Guest { memory, mapping, uffd }
    }

    pub(super) fn region(&self) -> &GuestRegion {
        self.memory.region(RegionId(0))
    }

    /// Its page is on its way, and somebody waits for it or not.
    pub(super) fn awaits(&self, page: u64, is_wanted: bool) {
        let range = PageRange { region: RegionId(0), first: page, pages: 1 };
        self.memory.begin(range, "a lane").unwrap();
        assert!(!is_wanted || self.region().pages.want(page));
    }

    pub(super) fn state(&self, page: u64) -> PageState {
        self.region().pages.get(page)
    }

    pub(super) fn address(&self, page: u64) -> u64 {
        self.region().parts[0].address + (page << 12)
    }

    /// Without a fault, which nobody would answer.
    pub(super) fn sees(&self, page: u64) -> bool {
        let shown = self.uffd.map(self.address(page), 4096).unwrap();
        shown.stop == Some(Stop::Already)
    }

    pub(super) fn contents(&self, page: u64) -> Vec<u8> {
        self.mapping.read(page << 12, 4096).unwrap()
    }
}
