//! Makes the guest's memory of the pieces that were handed over: assembles the pieces, compares them with the source's
//! regions, and checks the available space.

use std::collections::BTreeMap;
use std::sync::Arc;

use umem_wire::{Agreement, PageSize, Region, RegionId, RegionTable};

use super::{Prepared, check_alone};
use crate::destination::memory::{
    COPIED_PAGE_BYTES_MAX, FaultSource, GuestRegion, Part, RegionSetup,
};
use crate::error::{Error, Result};
use crate::fault::handoff::Handed;
use crate::fault::uffd::Uffd;
use crate::memory::kind::{Backing, Kind};
use crate::memory::region::RamFile;

/// The guest's memory, as [`Prepared::adopt`] makes it.
pub(crate) struct Adopted {
    /// In the source's order.
    pub(crate) regions: Vec<GuestRegion>,
    pub(crate) sources: Vec<FaultSource>,
    /// The source's table in landing units.
    pub(crate) landing: RegionTable,
}

impl Prepared {
    /// Compares the source's regions with this side's, checks that they fit, that there is space and that the memory is
    /// empty, and makes the guest's memory of them in the source's order.
    pub(crate) fn adopt(&mut self, theirs: &RegionTable) -> Result<Adopted> {
        if self.wants_alone {
            check_alone(&self.handed)?;
        }
        let found = self.regions(theirs)?;
        check_empty(&found)?;
        self.adopt_found(found, theirs)
    }

    /// The same for memory that has pages already, in a takeover.
    pub(crate) fn adopt_again(&mut self, theirs: &RegionTable) -> Result<Adopted> {
        let found = self.regions(theirs)?;
        self.adopt_found(found, theirs)
    }

    fn adopt_found(&self, mut found: Vec<Found>, theirs: &RegionTable) -> Result<Adopted> {
        let ours = found
            .iter()
            .map(|region| Region {
                name: region.name.clone(),
                bytes: region.bytes,
                page_size: PageSize::from_shift(region.page_shift).expect("a page size"),
            })
            .collect();
        let ours = RegionTable::new(ours).map_err(|error| Error::Unsupported(error.to_string()))?;
        let Agreement { ids, landing } =
            ours.compare(theirs).map_err(|mismatch| Error::Unsupported(mismatch.to_string()))?;
        for (id, (_, landed)) in ids.iter().zip(landing.iter()) {
            found[usize::from(id.0)].set_unit(landed.page_size)?;
        }
        if self.wants_room {
            check_space(&found)?;
        }
        let mut sources = Vec::new();
        let mut found: Vec<_> = found.into_iter().map(Some).collect();
        let mut take = |id: &RegionId| {
            let region = found[usize::from(id.0)].take().expect("ids are distinct");
            region.adopt(&mut sources)
        };
        let regions = ids.iter().map(&mut take).collect();
        Ok(Adopted { regions, sources, landing })
    }

    /// Assembles the pieces of each region.
    fn regions(&mut self, theirs: &RegionTable) -> Result<Vec<Found>> {
        let mut by_name: BTreeMap<String, Vec<Handed>> = BTreeMap::new();
        for piece in self.handed.drain(..) {
            let name = match &piece.name {
                Some(name) => name.clone(),
                None if theirs.len() == 1 => {
                    let (_, only) = theirs.iter().next().expect("a table is never empty");
                    only.name.clone()
                }
                None => {
                    return Err(Error::Unsupported(format!(
                        "the guest here has handed over its memory without names, so there must be \
                         one region at the source, not {}: one --ram with the whole of it",
                        theirs.len()
                    )));
                }
            };
            by_name.entry(name).or_default().push(piece);
        }
        by_name.into_iter().map(|(name, pieces)| Found::new(name, pieces)).collect()
    }
}

/// A region of the guest, as it was handed over.
struct Found {
    name: String,
    kind: Kind,
    bytes: u64,
    page_shift: u8,
    unit_shift: u8,
    file: Option<RamFile>,
    parts: Vec<(Part, Uffd)>,
}

impl Found {
    fn new(name: String, mut pieces: Vec<Handed>) -> Result<Found> {
        pieces.sort_by_key(|piece| piece.offset);
        let (kind, page_shift) = (pieces[0].kind, pieces[0].page_shift);
        let base = pieces[0].file_offset;
        let unlike = |piece: &Handed| {
            piece.kind != kind || piece.page_shift != page_shift || piece.file_offset != base
        };
        if pieces.iter().any(unlike) {
            return Err(Error::Unsupported(format!(
                "RAM {name} was handed over in pieces of different kinds or page sizes, or of different parts of a \
                 file"
            )));
        }
        let mut bytes = 0;
        let mut file = None;
        let mut parts = Vec::new();
        for piece in pieces {
            if piece.offset != bytes {
                return Err(Error::Unsupported(format!(
                    "RAM {name} was handed over with a gap or an overlap at its byte {bytes}: the \
                     pieces' offsets and sizes must cover it once"
                )));
            }
            bytes += piece.bytes;
            file = file.or(piece.file);
            let Handed { address, bytes, offset, uffd, .. } =
                Handed { name: None, file: None, ..piece };
            parts.push((Part { offset, bytes, address, source: 0 }, uffd));
        }
        // A file may be longer than the guest's mapping of it.
        let part = base..base.saturating_add(bytes);
        let file = file.map(|file| RamFile::from_handoff_part(&name, file, part)).transpose()?;
        if let Some(file) = &file {
            // The preload object has claimed the file already, and has kept the claim.
            file.claim_for_guest()?;
        }
        if let Some(file) = file.as_ref().filter(|file| file.bytes != bytes) {
            return Err(Error::Unsupported(format!(
                "RAM {name}: the guest maps {bytes} bytes of a file of {} bytes; give the backend \
                 the size of its file",
                file.bytes
            )));
        }
        let page_shift = file.as_ref().map_or(page_shift, |file| file.page_shift);
        if kind.needs_touch() && page_shift != 12 {
            return Err(Error::Unsupported(format!(
                "RAM {name}: --kind private needs a file of 4 KiB pages, on tmpfs; use --kind \
                 shared, or anonymous memory, for hugetlbfs"
            )));
        }
        Ok(Found { name, kind, bytes, page_shift, unit_shift: page_shift, file, parts })
    }

    fn backing(&self) -> Backing {
        self.file.as_ref().map_or(Backing::of_pages(self.page_shift), |file| file.backing)
    }

    fn set_unit(&mut self, unit: PageSize) -> Result<()> {
        self.unit_shift = unit.shift();
        let is_whole = |(part, _): &(Part, Uffd)| {
            part.offset.is_multiple_of(unit.bytes()) && part.bytes.is_multiple_of(unit.bytes())
        };
        if !self.parts.iter().all(is_whole) {
            return Err(Error::Unsupported(format!(
                "RAM {} comes in pages of {unit}, and was handed over in pieces that are not \
                 multiples of that",
                self.name
            )));
        }
        if !self.kind.lands_in_file() && unit.bytes() > COPIED_PAGE_BYTES_MAX {
            return Err(Error::Unsupported(format!(
                "RAM {} has pages of {unit}: anonymous memory can be filled with pages of 4 KiB and \
                 2 MiB",
                self.name
            )));
        }
        Ok(())
    }

    /// Makes the region, and adds its userfaultfds to the sources if they are not there yet.
    fn adopt(self, sources: &mut Vec<FaultSource>) -> GuestRegion {
        let Found { name, kind, bytes, page_shift, unit_shift, file, parts } = self;
        let parts = parts
            .into_iter()
            .map(|(part, uffd)| {
                let is_same = |source: &FaultSource| {
                    Arc::ptr_eq(&source.uffd.descriptor(), &uffd.descriptor())
                };
                let source = sources.iter().position(is_same).unwrap_or_else(|| {
                    sources.push(FaultSource::new(uffd));
                    sources.len() - 1
                });
                Part { source, ..part }
            })
            .collect();
        let setup = RegionSetup { name, kind, bytes, unit_shift, page_shift, file, parts };
        GuestRegion::new(setup)
    }
}

/// Each RAM file was empty when the guest here mapped it. A program without a lock may have written to it since, and
/// its data would stay wherever the source's guest has none.
fn check_empty(regions: &[Found]) -> Result<()> {
    for (region, file) in regions.iter().filter_map(|r| Some((r, r.file.as_ref()?))) {
        // On hugetlbfs the search for data in a hole reads the hole.
        if file.file_bytes()? == 0 {
            continue;
        }
        if let Some(at) = file.next_data_in(0..region.bytes)? {
            return Err(Error::Unsupported(format!(
                "RAM {}: its file was empty when the guest here mapped it, and holds data at byte {at} by now: \
                 another program writes to it; end that one, and start this guest again with a new file",
                region.name
            )));
        }
    }
    Ok(())
}

/// The alternatives if space is missing.
const WITHOUT_ROOM: &str = "take the guest all the same with `umem incoming --overcommit`, if room \
                            comes while it moves, as from a source on this machine that frees its own";

/// The RAM files' file systems, and the machine, must have space for every page: once the guest runs here it could not
/// be moved back.
fn check_space(regions: &[Found]) -> Result<()> {
    for (region, file) in regions.iter().filter_map(|r| Some((r, r.file.as_ref()?))) {
        // A private file holds only a small part of its region at a time.
        if region.kind.needs_touch() {
            continue;
        }
        let free = file.free_bytes()?;
        let needed = file.bytes - file.allocated_bytes()?.min(file.bytes);
        if let Some(free) = free.filter(|&free| free < needed) {
            return Err(Error::OutOfMemory(format!(
                "RAM {} needs {} MiB and its file system at the destination has {} MiB free: make \
                 room there (for /dev/shm: `mount -o remount,size=…`), or {WITHOUT_ROOM}",
                region.name,
                needed >> 20,
                free >> 20
            )));
        }
    }
    let is_hugetlb = |region: &&Found| region.backing() == Backing::Hugetlb;
    let needed: u64 = regions.iter().filter(|r| !is_hugetlb(r)).map(|r| r.bytes).sum();
    let available = available_bytes();
    if let Some(available) = available.filter(|&available| available < needed) {
        return Err(Error::OutOfMemory(format!(
            "the guest has {} MiB of RAM and the destination {} MiB of memory available: free some \
             there, or {WITHOUT_ROOM}",
            needed >> 20,
            available >> 20
        )));
    }
    Ok(())
}

/// The kernel's estimate of memory that can be allocated without swapping (`MemAvailable`, proc(5)).
fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}
