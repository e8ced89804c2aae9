//! The memory of a test: the file that is sent, and the memory that pages land in.
//!
//! Every pass sends the same file, whose pages are derived from their numbers, and lands in fresh memory of its own.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use umem_wire::{PageSize, Region, RegionTable};

use super::clock::thread_time;
use super::pages::{MemoryKind, PAGE_BYTES, PageKind, Place, page_bytes};
use super::passes::Memory;
use crate::destination::memory::{FaultSource, GuestMemory, GuestRegion, Part, RegionSetup};
use crate::error::{Context, Error, Result};
use crate::fault::uffd::Uffd;
use crate::memory::pages::PageState;
use crate::memory::region::RamFile;
use crate::source::memory::SourceMemory;
use crate::statistics::Counters;

/// Usually two memories of passes exist: the one being filled and the one being freed.
const WARM_REGIONS: u64 = 2;

/// Bytes placed to measure the cost of placing.
const SAMPLE_BYTES: u64 = 64 << 20;

/// A buffer that stays in the processor's cache; whole pages.
const HOT_BYTES: usize = 256 << 10;

/// The sender's files: one for whole passes, and one for the last if it is smaller. They stay mapped from pass to pass,
/// because the speed of mapping and unmapping a file is not measured.
pub(super) struct Source {
    whole: Option<RamFile>,
    last: Option<RamFile>,
    unit: PageSize,
}

impl Source {
    /// For `bytes` of whole pages, or without end.
    pub(super) fn new(
        place: Place,
        zero_percent: u32,
        region_bytes: u64,
        bytes: Option<u64>,
    ) -> Result<Source> {
        let total = bytes.unwrap_or(u64::MAX);
        let last = if bytes.is_some() { total % region_bytes } else { 0 };
        let make = |bytes| ram(&filled(place.pages, zero_percent, bytes)?, 0);
        Ok(Source {
            whole: (total >= region_bytes).then(|| make(region_bytes)).transpose()?,
            last: (last > 0).then(|| make(last)).transpose()?,
            unit: place.unit(),
        })
    }

    /// The memory of a pass of this many bytes.
    pub(super) fn memory(&self, bytes: u64) -> Result<SourceMemory> {
        let file = match &self.last {
            Some(last) if last.bytes == bytes => last,
            _ => self.whole.as_ref().expect("passes are whole, or the last one"),
        };
        landing_in(self.unit, vec![file.again()?])
    }
}

/// Sends a file once for each region.
pub(super) fn source_memory(
    file: &OwnedFd,
    regions: usize,
    unit: PageSize,
) -> Result<SourceMemory> {
    landing_in(unit, (0..regions).map(|index| ram(file, index)).collect::<Result<_>>()?)
}

/// Sends these files, from the start.
fn landing_in(unit: PageSize, files: Vec<RamFile>) -> Result<SourceMemory> {
    let units = vec![unit; files.len()];
    let memory = SourceMemory::new(files, false);
    let landing = memory.table()?.with_units(&units);
    memory.land(landing.map_err(|error| Error::Internal(error.to_string()))?);
    Ok(memory)
}

fn ram(file: &OwnedFd, index: usize) -> Result<RamFile> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    RamFile::open_source(&name(index), Path::new(&path), false)
}

impl Memory for SourceMemory {
    fn counters(&self) -> &Counters {
        &self.counters
    }
}

/// A memory file that holds every page.
pub(super) fn filled(pages: PageKind, zero_percent: u32, bytes: u64) -> Result<OwnedFd> {
    let file = pages.file(bytes)?;
    let mut buffer = vec![0; HOT_BYTES];
    let mut offset = 0;
    while offset < bytes {
        let len = usize::try_from(bytes - offset).unwrap_or(usize::MAX).min(buffer.len());
        for (index, page) in buffer[..len].chunks_mut(PAGE_BYTES as usize).enumerate() {
            page_bytes(offset / PAGE_BYTES + index as u64, zero_percent, page);
        }
        file.write_all_at(&buffer[..len], offset).context(|| "filling a memory file")?;
        offset += len as u64;
    }
    Ok(file.into())
}

fn name(index: usize) -> String {
    format!("bench{index}")
}

/// Memory where pages land: untouched, mapped as a guest would map it, and registered with a userfaultfd.
pub(super) struct Landing {
    pub(super) guest: Arc<GuestMemory>,
    /// The landing table; the other side computes the same.
    pub(super) table: RegionTable,
    mappings: Vec<Mapping>,
}

impl Landing {
    /// For one pass.
    pub(super) fn new(place: Place, bytes: u64) -> Result<Landing> {
        Landing::of_regions(place, bytes, 1)
    }

    /// Several regions of this many bytes each, whole landing units.
    pub(super) fn of_regions(place: Place, bytes: u64, regions: usize) -> Result<Landing> {
        let uffd = Uffd::for_this_process().context(|| "userfaultfd")?;
        let (mut mappings, mut guest_regions, mut table) = (Vec::new(), Vec::new(), Vec::new());
        for index in 0..regions {
            let name = name(index);
            let (mapping, file) = mapped(place, bytes)?;
            let address = mapping.start.as_ptr().expose_provenance() as u64;
            uffd.register(address, bytes, place.kind.into())
                .context(|| "registering memory with userfaultfd")?;
            mappings.push(mapping);
            guest_regions.push(GuestRegion::new(RegionSetup {
                name: name.clone(),
                kind: place.kind.into(),
                bytes,
                unit_shift: place.unit().shift(),
                page_shift: place.unit().shift(),
                file: file.map(|file| RamFile::from_handoff(&name, file)).transpose()?,
                parts: vec![Part { offset: 0, bytes, address, source: 0 }],
            }));
            table.push(Region { name, bytes, page_size: place.unit() });
        }
        let table = RegionTable::new(table).map_err(|error| Error::Internal(error.to_string()))?;
        let guest = Arc::new(GuestMemory::new(guest_regions, vec![FaultSource::new(uffd)]));
        Ok(Landing { guest, table, mappings })
    }

    /// Compares every landed page with its expected contents. Returns the number of pages.
    pub(super) fn verify(&self, zero_percent: u32) -> Result<u64> {
        let (mut expected, mut found) =
            (vec![0; PAGE_BYTES as usize], vec![0; PAGE_BYTES as usize]);
        let mut verified = 0;
        for (region, mapping) in self.guest.regions.iter().zip(&self.mappings) {
            for page in 0..region.bytes / PAGE_BYTES {
                let offset = page * PAGE_BYTES;
                if region.pages.get(offset >> region.unit_shift()) != PageState::Cached {
                    continue;
                }
                page_bytes(page, zero_percent, &mut expected);
                if region.memory.is_copied_in() {
                    mapping.read(offset, &mut found);
                } else {
                    found = region.file().read(offset, PAGE_BYTES)?;
                }
                if found != expected {
                    return Err(wrong(page));
                }
                verified += 1;
            }
        }
        Ok(verified)
    }

    /// The first word of a page, for a thread that waits for it.
    pub(super) fn touch(&self, region: usize, offset: u64) -> u64 {
        let mut word = [0; size_of::<u64>()];
        self.mappings[region].read(offset, &mut word);
        u64::from_le_bytes(word)
    }

    /// Frees a region's memory. Every page of it has arrived.
    pub(super) fn release(&self, region: usize) -> Result<()> {
        let guest = &self.guest.regions[region];
        if !guest.memory.is_copied_in() {
            return guest.file().discard(0, guest.bytes);
        }
        let mapping = &self.mappings[region];
        // SAFETY: our own mapping, whose pages have been checked; there are no pointers into it.
        unsafe { madvise(mapping.start.cast(), mapping.len, MmapAdvise::MADV_DONTNEED) }
            .context(|| "freeing memory")
    }
}

pub(super) fn wrong(page: u64) -> Error {
    Error::Bench(format!(
        "page {page} arrived wrong: this is a fault of umem or of the network between; please report it"
    ))
}

impl Memory for Landing {
    fn counters(&self) -> &Counters {
        &self.guest.counters
    }
}

/// Fresh memory, and its file if it has one.
fn mapped(place: Place, bytes: u64) -> Result<(Mapping, Option<File>)> {
    match place.kind {
        MemoryKind::Shared => {
            let file = place.pages.file(bytes)?;
            Ok((Mapping::of(&file, bytes)?, Some(file)))
        }
        MemoryKind::Anonymous => Ok((Mapping::anonymous(bytes, place.pages)?, None)),
    }
}

/// A mapping that stands for a guest's.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an address and a length of plain memory, which is read byte by byte and never referred to.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn of(file: &impl AsFd, bytes: u64) -> Result<Mapping> {
        let (len, length) = lengths(bytes);
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, file, 0) }
            .context(|| "mapping a memory file")?;
        Ok(Mapping { start: start.cast(), len })
    }

    fn anonymous(bytes: u64, pages: PageKind) -> Result<Mapping> {
        let (len, length) = lengths(bytes);
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let mut flags = MapFlags::MAP_PRIVATE;
        if pages == PageKind::Huge {
            flags |= MapFlags::MAP_HUGETLB;
        }
        // SAFETY: as above.
        let start = unsafe { mmap_anonymous(None, length, protection, flags) }
            .context(|| format!("mapping {} MiB of anonymous memory", bytes >> 20))?;
        Ok(Mapping { start: start.cast(), len })
    }

    /// Copies bytes; waits for missing pages.
    fn read(&self, offset: u64, to: &mut [u8]) {
        let offset = usize::try_from(offset).expect("64-bit Linux");
        assert!(offset + to.len() <= self.len);
        for (index, byte) in to.iter_mut().enumerate() {
            // SAFETY: inside our own mapping; volatile, because another thread places the page.
            *byte = unsafe { self.start.add(offset + index).read_volatile() };
        }
    }
}

fn lengths(bytes: u64) -> (usize, NonZeroUsize) {
    let len = usize::try_from(bytes).expect("64-bit Linux");
    (len, NonZeroUsize::new(len).expect("memory is not empty"))
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping; there are no pointers into it.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

/// Places as much memory as the passes will have, and frees it: on a virtual machine, memory that has not been used for
/// long may take several times longer to get.
pub(super) fn warm(place: Place, region_bytes: u64) -> Result<()> {
    fill(place, WARM_REGIONS * region_bytes)
}

/// Processor seconds for placing a GiB in fresh memory here, from a cached buffer and without other work; the memory is
/// warm. The figure shows the memory's share of a receiver's time.
pub(super) fn placing_s_per_gib(place: Place, region_bytes: u64) -> Result<f64> {
    // The passes use warm memory too.
    let bytes = SAMPLE_BYTES.min(WARM_REGIONS * region_bytes);
    let before = thread_time();
    fill(place, bytes)?;
    let seconds = thread_time().saturating_sub(before).as_secs_f64();
    Ok(seconds / (bytes as f64 / f64::from(1 << 30)))
}

/// Fills fresh memory from a cached buffer, as a lane does after a receive.
fn fill(place: Place, bytes: u64) -> Result<()> {
    let unit = usize::try_from(place.unit().bytes()).expect("64-bit Linux");
    let step = HOT_BYTES.max(unit);
    let buffer = vec![0xa5; step];
    let bytes = bytes.next_multiple_of(step as u64);
    if place.kind == MemoryKind::Shared {
        let file = place.pages.file(bytes)?;
        for offset in (0..bytes).step_by(step) {
            file.write_all_at(&buffer, offset).context(|| "filling a memory file")?;
        }
        return Ok(());
    }
    let mapping = Mapping::anonymous(bytes, place.pages)?;
    let start = mapping.start.as_ptr().expose_provenance() as u64;
    let uffd = Uffd::for_this_process().context(|| "userfaultfd")?;
    uffd.register(start, bytes, place.kind.into())
        .context(|| "registering memory with userfaultfd")?;
    for offset in (0..bytes).step_by(step) {
        let mut done = 0;
        while done < step {
            let at = start + offset + done as u64;
            let placed = uffd.copy(at, &buffer[done..]).context(|| "filling memory")?;
            if let Some(stop) = placed.stop {
                return Err(Error::Bench(format!("filling memory stopped: {stop:?}")));
            }
            done += usize::try_from(placed.bytes).expect("a buffer's length");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::pages::is_zero;
    use super::*;

    const SHARED: Place = Place { kind: MemoryKind::Shared, pages: PageKind::Small };

    #[test]
    fn wrong_page_is_found() {
        let landing = Landing::new(SHARED, 4 << 20).unwrap();
        let region = &landing.guest.regions[0];
        let mut page = vec![0; PAGE_BYTES as usize];
        for (number, changed) in [(3, false), (5, true)] {
            page_bytes(number, 0, &mut page);
            page[4000] ^= u8::from(changed);
            region.file().write_at(&page, number * PAGE_BYTES).unwrap();
            region.pages.begin(number, 1).unwrap();
            region.pages.finish(number, 1, |_| Ok::<(), Error>(())).unwrap();
            match landing.verify(0) {
                Ok(verified) => assert_eq!((verified, changed), (1, false)),
                Err(error) => assert!(changed && error.to_string().contains("page 5"), "{error}"),
            }
        }
    }

    #[test]
    fn requested_share_of_pages_is_zero() {
        let zeroes = (0..10_000).filter(|&page| is_zero(page, 30)).count();
        assert!((2_500..3_500).contains(&zeroes), "{zeroes}");
        let file = filled(PageKind::Small, 30, 1 << 20).unwrap();
        let mut page = vec![0; PAGE_BYTES as usize];
        let number = (0..256).find(|&page| is_zero(page, 30)).unwrap();
        File::from(file).read_exact_at(&mut page, number * PAGE_BYTES).unwrap();
        assert!(page.iter().all(|&byte| byte == 0));
    }
}
