//! The pages of a test: the file that is sent, the files that are filled, and how one pass follows the
//! other.
//!
//! Every pass sends the same file, whose pages can be told from their number, and lands in a file of
//! its own that nobody has touched. Lanes go from pass to pass by themselves, so that they do not wait
//! for each other; a pass that all of them have left is retired: its memory is checked, if that was
//! asked for, and given back by the retirer's thread. When that is behind, lanes wait for it: this is
//! what bounds the memory ([`REGIONS_ALIVE_MAX`]).

use std::fmt;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;
use std::str::FromStr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use serde::{Deserialize, Serialize};
use umem_wire::{PageSize, Region, RegionTable};

use super::protocol::Counts;
use crate::destination::guest::{FaultSource, GuestMemory, GuestRegion, Part, RegionSetup};
use crate::error::{Context, Error, Result};
use crate::fault::uffd::Uffd;
use crate::memory::BLOCK_BYTES;
use crate::memory::kind::Kind;
use crate::memory::pages::PageState;
use crate::memory::region::RamFile;
use crate::report::Counters;
use crate::source::memory::SourceMemory;

/// What page numbers count: the unit in which pages land.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// Bytes of a pass at most: long enough that its beginning and end do not show, and few enough that
/// the memory is back in time.
pub(crate) const REGION_BYTES_MAX: u64 = 512 << 20;

/// Passes whose memory there is at a time, at most: the one that is filled, the next one that some
/// lanes are in already, one that waits to be given back and one that is being given back; or the one
/// that is sent. And some room for others.
const REGIONS_ALIVE_MAX: u64 = 6;

/// Of these there are two most of the time: the one that is filled and the one that is given back.
const WARM_REGIONS: u64 = 2;

/// Bytes that are placed to learn what placing takes.
const SAMPLE_BYTES: usize = 64 << 20;

/// A buffer that stays in the processor's cache.
const HOT_BYTES: usize = 256 << 10;

const NAME: &str = "bench";

/// What the memory consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum PageKind {
    /// A memfd of 4 KiB pages, unless the system gives shared memory huge ones.
    #[serde(rename = "4K")]
    Small,
    /// A tmpfs that makes huge pages.
    #[serde(rename = "2M")]
    Huge,
}

impl PageKind {
    pub(super) fn bytes(self) -> u64 {
        match self {
            PageKind::Small => PAGE_BYTES,
            PageKind::Huge => BLOCK_BYTES,
        }
    }

    fn file(self, bytes: u64) -> Result<File> {
        let file = match self {
            PageKind::Small => {
                memfd_create(c"umem-bench", MFdFlags::MFD_CLOEXEC).context(|| "making a memfd")?
            }
            PageKind::Huge => {
                crate::demo::huge_tmpfs_file(bytes.div_ceil(1 << 20)).ok_or_else(|| {
                    Error::Bench(
                        "no tmpfs with huge pages can be made here: run this side as root, or leave \
                         out --page-size 2M"
                            .into(),
                    )
                })?
            }
        };
        let file = File::from(file);
        file.set_len(bytes).context(|| "sizing a memory file")?;
        Ok(file)
    }
}

impl fmt::Display for PageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PageKind::Small => "4K",
            PageKind::Huge => "2M",
        })
    }
}

impl FromStr for PageKind {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<PageKind, String> {
        match text {
            "4K" | "4k" => Ok(PageKind::Small),
            "2M" | "2m" => Ok(PageKind::Huge),
            _ => Err(format!("pages are of 4K or 2M, not {text:?}")),
        }
    }
}

/// Bytes of a pass that this machine has the memory for, whole blocks.
pub(super) fn region_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context(|| "/proc/meminfo")?;
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"))
        .and_then(|kib| kib.parse::<u64>().ok())
        .map_or(0, |kib| kib << 10);
    let bytes = (available / REGIONS_ALIVE_MAX).min(REGION_BYTES_MAX) / BLOCK_BYTES * BLOCK_BYTES;
    if bytes == 0 {
        return Err(Error::Bench(format!(
            "only {} MiB of memory are available here, too little to measure with: free some",
            available >> 20
        )));
    }
    Ok(bytes)
}

/// What a page holds, by its number: every word of it.
fn word(page: u64, index: usize) -> u64 {
    mix(page).wrapping_add(index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Spreads the numbers (splitmix64's finish).
fn mix(page: u64) -> u64 {
    let mut x = page.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn is_zero(page: u64, zero_percent: u32) -> bool {
    mix(page) % 100 < u64::from(zero_percent)
}

/// A whole page.
fn page_bytes(page: u64, zero_percent: u32, bytes: &mut [u8]) {
    if is_zero(page, zero_percent) {
        return bytes.fill(0);
    }
    for (index, chunk) in bytes.chunks_exact_mut(size_of::<u64>()).enumerate() {
        chunk.copy_from_slice(&word(page, index).to_le_bytes());
    }
}

/// A memory that a pass goes from or into.
pub(super) trait Memory: Send + Sync {
    fn counters(&self) -> &Counters;
}

/// The passes of one side, in order.
pub(super) struct Passes<M> {
    lanes: usize,
    make: Box<dyn Fn(u64) -> Result<M> + Send + Sync>,
    region_bytes: u64,
    state: Mutex<State<M>>,
}

struct State<M> {
    /// The next pass that nobody has entered.
    next: u64,
    /// Bytes in the passes from there on; none where there is no end.
    left: Option<u64>,
    /// Passes that some lane is in, or has yet to enter.
    alive: Vec<Alive<M>>,
    /// Of the passes that have been left.
    counted: Counts,
}

struct Alive<M> {
    number: u64,
    memory: Arc<M>,
    lanes_left: usize,
}

impl<M: Memory> Passes<M> {
    /// Passes of `region_bytes` each until `bytes` of pages are used up; `make` makes the memory.
    pub(super) fn new(
        lanes: u16,
        region_bytes: u64,
        bytes: Option<u64>,
        make: impl Fn(u64) -> Result<M> + Send + Sync + 'static,
    ) -> Passes<M> {
        let left = bytes.map(|bytes| bytes.next_multiple_of(PAGE_BYTES));
        let state = State { next: 0, left, alive: Vec::new(), counted: Counts::default() };
        Passes { lanes: lanes.into(), make: Box::new(make), region_bytes, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State<M>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory of a pass, for a lane that has left the one before; none after the last one.
    pub(super) fn enter(&self, number: u64) -> Result<Option<Arc<M>>> {
        let mut state = self.state();
        if let Some(alive) = state.alive.iter().find(|alive| alive.number == number) {
            return Ok(Some(alive.memory.clone()));
        }
        assert_eq!(number, state.next, "a lane leaves a pass before it enters the next one");
        let bytes = self.region_bytes.min(state.left.unwrap_or(u64::MAX));
        if bytes == 0 {
            return Ok(None);
        }
        let memory = Arc::new((self.make)(bytes)?);
        state.left = state.left.map(|left| left - bytes);
        state.next += 1;
        state.alive.push(Alive { number, memory: memory.clone(), lanes_left: 0 });
        Ok(Some(memory))
    }

    /// A lane has left a pass, and holds nothing of it any more. The last one gets its memory.
    pub(super) fn leave(&self, number: u64) -> Option<Arc<M>> {
        let mut state = self.state();
        let index = state.alive.iter().position(|alive| alive.number == number)?;
        state.alive[index].lanes_left += 1;
        if state.alive[index].lanes_left < self.lanes {
            return None;
        }
        let memory = state.alive.remove(index).memory;
        state.counted = state.counted + counts(memory.counters());
        Some(memory)
    }

    /// What is left when lanes have been cut off: the memory that they were in.
    pub(super) fn take_rest(&self) -> Vec<Arc<M>> {
        let mut state = self.state();
        let alive = std::mem::take(&mut state.alive);
        let rest = alive.iter().map(|alive| counts(alive.memory.counters()));
        state.counted = rest.fold(state.counted, |sum, counts| sum + counts);
        alive.into_iter().map(|alive| alive.memory).collect()
    }

    /// What has been moved until now.
    pub(super) fn counts(&self) -> Counts {
        let state = self.state();
        let alive = state.alive.iter().map(|alive| counts(alive.memory.counters()));
        alive.fold(state.counted, |sum, counts| sum + counts)
    }
}

fn counts(counters: &Counters) -> Counts {
    Counts {
        bytes: counters.data_bytes.load(Relaxed),
        zero_bytes: counters.zero_bytes.load(Relaxed) + counters.hole_bytes.load(Relaxed),
        zero_copied_bytes: counters.zero_copied_bytes.load(Relaxed),
        copied_bytes: counters.copied_bytes.load(Relaxed),
    }
}

/// The sender's files: one for whole passes, and one for the last if it is smaller.
pub(super) struct Source {
    whole: Option<OwnedFd>,
    last: Option<(u64, OwnedFd)>,
}

impl Source {
    pub(super) fn new(
        pages: PageKind,
        zero_percent: u32,
        region_bytes: u64,
        bytes: Option<u64>,
    ) -> Result<Source> {
        let total = bytes.map_or(u64::MAX, |bytes| bytes.next_multiple_of(PAGE_BYTES));
        let last = if bytes.is_some() { total % region_bytes } else { 0 };
        let make = |bytes| filled(pages, zero_percent, bytes);
        Ok(Source {
            whole: if total >= region_bytes { Some(make(region_bytes)?) } else { None },
            last: if last > 0 { Some((last, make(last)?)) } else { None },
        })
    }

    /// The memory of a pass of this many bytes.
    pub(super) fn memory(&self, bytes: u64) -> Result<SourceMemory> {
        let file = match &self.last {
            Some((last, file)) if *last == bytes => file,
            _ => self.whole.as_ref().expect("passes are whole, or the last one"),
        };
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let ram = RamFile::open_source(NAME, Path::new(&path), false)?;
        let memory = SourceMemory::new(vec![ram], false);
        memory.land(memory.table()?);
        Ok(memory)
    }
}

impl Memory for SourceMemory {
    fn counters(&self) -> &Counters {
        &self.counters
    }
}

/// A memory file that holds every page.
fn filled(pages: PageKind, zero_percent: u32, bytes: u64) -> Result<OwnedFd> {
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

/// The table of a pass of this many bytes; both sides make the same.
fn table(bytes: u64) -> RegionTable {
    let region = Region { name: NAME.into(), bytes, page_size: PageSize::SIZE_4K };
    RegionTable::new(vec![region]).expect("one region of whole pages is valid")
}

/// Where a pass lands: a fresh file, and a mapping of it that stands for the guest's, registered with a
/// userfaultfd.
pub(super) struct Landing {
    pub(super) guest: Arc<GuestMemory>,
    pub(super) table: RegionTable,
    _mapping: Mapping,
}

impl Landing {
    pub(super) fn new(pages: PageKind, bytes: u64) -> Result<Landing> {
        let file = pages.file(bytes)?;
        let mapping = Mapping::of(&file, bytes)?;
        let address = mapping.start.as_ptr().expose_provenance() as u64;
        let uffd = Uffd::for_this_process().context(|| "userfaultfd")?;
        uffd.register_shared(address, bytes).context(|| "registering memory with userfaultfd")?;
        let region = GuestRegion::new(RegionSetup {
            name: NAME.into(),
            kind: Kind::Shared,
            bytes,
            unit_shift: PageSize::SIZE_4K.shift(),
            page_shift: PageSize::SIZE_4K.shift(),
            file: Some(RamFile::from_handoff(NAME, file)?),
            parts: vec![Part { offset: 0, bytes, address, source: 0 }],
        });
        let guest = Arc::new(GuestMemory::new(vec![region], vec![FaultSource::new(uffd)]));
        Ok(Landing { guest, table: table(bytes), _mapping: mapping })
    }

    /// Compares every page that is said to have landed with what it has to be. Returns how many are.
    pub(super) fn verify(&self, zero_percent: u32) -> Result<u64> {
        let region = &self.guest.regions[0];
        let mut expected = vec![0; PAGE_BYTES as usize];
        let mut verified = 0;
        for page in 0..region.bytes / PAGE_BYTES {
            if region.pages.get(page) != PageState::Cached {
                continue;
            }
            page_bytes(page, zero_percent, &mut expected);
            if region.file().read(page * PAGE_BYTES, PAGE_BYTES)? != expected {
                return Err(Error::Bench(format!(
                    "page {page} arrived wrong: this is a fault of umem or of the network between; \
                     please report it"
                )));
            }
            verified += 1;
        }
        Ok(verified)
    }
}

impl Memory for Landing {
    fn counters(&self) -> &Counters {
        &self.guest.counters
    }
}

/// A mapping that nobody reads through.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an address and a length; nothing is ever read or written through it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn of(file: &File, bytes: u64) -> Result<Mapping> {
        let len = usize::try_from(bytes).expect("64-bit Linux");
        let length = NonZeroUsize::new(len).expect("a pass is not empty");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, file, 0) }
            .context(|| "mapping a memory file")?;
        Ok(Mapping { start: start.cast(), len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping; there are no pointers into it.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

/// Writes as much memory as the passes will have, and gives it back: what this machine has not used for
/// long may take several times longer to get, where it is a virtual one.
pub(super) fn warm(pages: PageKind, region_bytes: u64) -> Result<()> {
    let (buffer, bytes) = (vec![0xa5; HOT_BYTES], WARM_REGIONS * region_bytes);
    let file = pages.file(bytes)?;
    for offset in (0..bytes).step_by(HOT_BYTES) {
        file.write_all_at(&buffer, offset).context(|| "filling a memory file")?;
    }
    Ok(())
}

/// Processor seconds that placing a GiB in fresh memory takes here, from a buffer in the cache and with
/// nothing else to do; the memory is warm. It tells what of a receiver's time is the memory's.
pub(super) fn placing_s_per_gib(pages: PageKind) -> Result<f64> {
    let buffer = vec![0xa5; HOT_BYTES];
    let file = pages.file(SAMPLE_BYTES as u64)?;
    let before = thread_time();
    for offset in (0..SAMPLE_BYTES).step_by(HOT_BYTES) {
        file.write_all_at(&buffer, offset as u64).context(|| "filling a memory file")?;
    }
    let seconds = thread_time().saturating_sub(before).as_secs_f64();
    Ok(seconds / (SAMPLE_BYTES as f64 / f64::from(1 << 30)))
}

/// Processor time of the calling thread.
pub(super) fn thread_time() -> Duration {
    clock_time(libc::CLOCK_THREAD_CPUTIME_ID).unwrap_or_default()
}

/// What a clock says; none when it has gone, as a thread's does with the thread.
pub(super) fn clock_time(clock: libc::clockid_t) -> Option<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes to a local variable.
    let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).ok()?;
    (result == 0).then(|| Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_end_with_the_bytes_and_count_each_lane_once() {
        let passes = Passes::new(2, 8 << 20, Some((8 << 20) + 5000), |bytes| {
            Landing::new(PageKind::Small, bytes)
        });
        let first = passes.enter(0).unwrap().unwrap();
        assert_eq!(first.guest.total_bytes(), 8 << 20);
        Counters::add(&first.guest.counters.data_bytes, 7);
        drop(first);
        assert!(passes.leave(0).is_none());
        let last = passes.enter(1).unwrap().unwrap();
        assert_eq!(last.guest.total_bytes(), 8192);
        Counters::add(&last.guest.counters.data_bytes, 5);
        assert!(passes.enter(2).unwrap().is_none());
        assert_eq!(passes.counts().bytes, 12);
        assert!(passes.leave(0).is_some());
        assert_eq!(passes.counts().bytes, 12);
        assert_eq!(passes.take_rest().len(), 1);
        assert_eq!(passes.counts().bytes, 12);
    }

    #[test]
    fn a_page_that_is_wrong_is_found() {
        let landing = Landing::new(PageKind::Small, 4 << 20).unwrap();
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
    fn a_share_of_the_pages_is_zero() {
        let zeroes = (0..10_000).filter(|&page| is_zero(page, 30)).count();
        assert!((2_500..3_500).contains(&zeroes), "{zeroes}");
        let file = filled(PageKind::Small, 30, 1 << 20).unwrap();
        let mut page = vec![0; PAGE_BYTES as usize];
        let number = (0..256).find(|&page| is_zero(page, 30)).unwrap();
        File::from(file).read_exact_at(&mut page, number * PAGE_BYTES).unwrap();
        assert!(page.iter().all(|&byte| byte == 0));
    }
}
