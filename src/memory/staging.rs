//! Staging files for contents of guest memory without a file: they come page by page, and wait in a file of umem's own
//! until they have been sent.
//!
//! ```text
//! writer (one thread)            put, put_zeroes: the page's bytes, then its mark; both under the lock
//! lanes                          take the mark, read the page, send it, release it
//! release                        under the lock: frees a page unless it is marked again
//! ```
//!
//! So a marked page is in the file, or is a hole if it holds zeroes, and a sent page takes no memory once it is
//! released. Released contents are not needed any more: while pages are released the guest still has all of its memory,
//! and a failed migration leaves it running there.
//!
//! A file has no name at first, and vanishes with its process. It gets a name ([`Staging::name`]) before the guest may
//! run elsewhere: from then on it may have the only copy of a page, and another process may have to take over.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, fallocate};
use umem_wire::checksum::{self, SUMMED_BYTES};
use umem_wire::{PageRange, RegionId};

use super::bits::Bits;
use super::dirty::DirtyMap;
use super::region::RamFile;
use crate::error::{Context, Error, Result};
use crate::runtime::hex::hex;

/// The directory of the files: shared memory with names.
const DIRECTORY: &str = "/dev/shm";

/// Most bytes that wait in the files while the guest runs. Half of them are sent while the other half comes.
pub(crate) const STAGED_BYTES_MAX: u64 = 64 << 20;

/// The page size of this module: offsets and lengths of all calls are multiples of it.
pub(crate) const STAGED_PAGE_BYTES: u64 = 4096;

const PAGE: usize = STAGED_PAGE_BYTES as usize;

/// The file of one region.
pub(crate) struct StagedFile {
    name: String,
    file: File,
    /// Its name after [`Staging::name`].
    path: PathBuf,
    pages: u64,
}

impl StagedFile {
    /// An empty file of `bytes`, without a name, for the region `name`.
    ///
    /// # Errors
    /// There is no shared memory with names, or the size is not a multiple of [`STAGED_PAGE_BYTES`].
    pub(crate) fn create(name: &str, bytes: u64) -> Result<StagedFile> {
        if bytes == 0 || !bytes.is_multiple_of(STAGED_PAGE_BYTES) {
            return Err(Error::Unsupported(format!(
                "RAM {name} has {bytes} bytes, which is not a positive multiple of {STAGED_PAGE_BYTES}"
            )));
        }
        let what = || format!("a memory file in {DIRECTORY} for the contents of RAM {name}");
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE);
        let file = options.open(DIRECTORY).context(what)?;
        file.set_len(bytes).context(what)?;
        let mut random = [0; 8];
        // SAFETY: the kernel writes at most the array's length into it.
        let count = unsafe { libc::getrandom(random.as_mut_ptr().cast(), random.len(), 0) };
        if usize::try_from(count) != Ok(random.len()) {
            return Err(Error::last_os("random numbers"));
        }
        let path = Path::new(DIRECTORY).join(format!("umem-{}.ram", hex(&random)));
        Ok(StagedFile { name: name.into(), file, path, pages: bytes / STAGED_PAGE_BYTES })
    }

    /// Its path after [`Staging::name`].
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The same file, for the lanes to send from.
    pub(crate) fn ram_file(&self) -> Result<RamFile> {
        let file = self.file.try_clone().context(|| format!("RAM {}", self.name))?;
        RamFile::of_opened(&self.name, &self.path, file, None, false)
    }

    fn punch(&self, first: u64, pages: u64) -> Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let bytes = |pages: u64| i64::try_from(pages * STAGED_PAGE_BYTES).expect("offsets fit");
        fallocate(&self.file, flags, bytes(first), bytes(pages))
            .context(|| format!("giving back pages of RAM {}", self.name))
    }
}

/// The files of a migration whose guest has RAM without files.
pub(crate) struct Staging {
    /// By region; None if the guest has a file for the region.
    files: Vec<Option<StagedFile>>,
    /// Whether pages are summed before they are freed.
    is_checked: bool,
    /// The writer of the files stops the guest depending on the room in them.
    is_paced: bool,
    state: Mutex<State>,
    /// Notified when there is room, or enough to send.
    changed: Condvar,
}

struct State {
    /// By region: pages with contents in the file.
    held: Vec<Bits>,
    held_pages: u64,
    /// By region, if pages are summed: the share of each freed page in the digest, less that of a page of zeroes.
    sums: Vec<Vec<u64>>,
    /// None without a limit.
    pages_max: Option<u64>,
    is_named: bool,
    page: Box<[u8; PAGE]>,
}

impl Staging {
    /// A staging of these files, in the order of the regions.
    pub(crate) fn new(files: Vec<Option<StagedFile>>, is_checked: bool) -> Staging {
        let pages = || files.iter().map(|file| file.as_ref().map_or(0, |file| file.pages));
        let summed = |pages: u64| if is_checked { pages } else { 0 };
        let sums = |pages| vec![0; usize::try_from(summed(pages)).expect("64-bit Linux")];
        let state = State {
            held: pages().map(Bits::new).collect(),
            held_pages: 0,
            sums: pages().map(sums).collect(),
            pages_max: Some(STAGED_BYTES_MAX / STAGED_PAGE_BYTES),
            is_named: false,
            page: Box::new([0; PAGE]),
        };
        let is_paced = false;
        Staging { files, is_checked, is_paced, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// The same for a writer that stops the guest when the passes converge, which is sooner without a limit.
    pub(crate) fn paced(self) -> Staging {
        Staging { is_paced: true, ..self }
    }

    /// By `umem control`: the passes are to end. A paced writer has no limit from here on.
    pub(crate) fn end_passes(&self) {
        if self.is_paced {
            self.keep_all();
        }
    }

    /// Whether the contents of this region are staged.
    pub(crate) fn has(&self, region: RegionId) -> bool {
        self.files.get(usize::from(region.0)).is_some_and(Option::is_some)
    }

    fn file(&self, region: RegionId) -> Result<&StagedFile> {
        let file = self.files.get(usize::from(region.0)).and_then(Option::as_ref);
        file.ok_or_else(|| Error::Internal(format!("region {} has a file of its own", region.0)))
    }

    /// Removes the limit, for a region whose landing unit is larger than a page: units are sent whole, so sent pages
    /// of an incomplete unit are not freed.
    pub(crate) fn keep_all(&self) {
        self.lock().pages_max = None;
        self.changed.notify_all();
    }

    /// Puts whole pages into a region, and then marks them.
    ///
    /// # Errors
    /// There is no memory for them, or the region has no such bytes.
    pub(crate) fn put(
        &self,
        marks: &DirtyMap,
        region: RegionId,
        offset: u64,
        bytes: &[u8],
    ) -> Result<()> {
        let file = self.file(region)?;
        let (first, pages) = pages_of(file, offset, bytes.len() as u64)?;
        let mut state = self.lock();
        file.file.write_all_at(bytes, offset).map_err(|error| {
            let what = format!(
                "{} bytes for the contents of RAM {} in {DIRECTORY}",
                bytes.len(),
                file.name
            );
            Error::of_memory(what, error)
        })?;
        state.hold(region, first, pages);
        mark(marks, region, offset, bytes.len() as u64)?;
        let is_enough = state.is_enough();
        drop(state);
        if is_enough {
            self.changed.notify_all();
        }
        Ok(())
    }

    /// The same with pages of zeroes.
    pub(crate) fn put_zeroes(
        &self,
        marks: &DirtyMap,
        region: RegionId,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let file = self.file(region)?;
        let (first, pages) = pages_of(file, offset, len)?;
        let mut state = self.lock();
        state.each_held(region, first, pages, |first, pages| file.punch(first, pages))?;
        state.forget(region, first, pages);
        state.forget_sums(region, first, pages);
        mark(marks, region, offset, len)
    }

    /// Frees pages that have been sent, except those that have been marked again.
    pub(crate) fn release(&self, marks: &Bits, range: PageRange) -> Result<()> {
        let file = self.file(range.region)?;
        let mut state = self.lock();
        let (mut page, end) = (range.first, range.first + range.pages);
        while page < end {
            let first = marks.next(page, false).min(end);
            let last = marks.next(first, true).min(end);
            if first < last {
                if self.is_checked {
                    state.sum(file, range.region, first, last - first)?;
                }
                // Also pages that are holes: a lane that reads a hole while it is made allocates it.
                file.punch(first, last - first)?;
                state.forget(range.region, first, last - first);
            }
            page = last;
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// With checksums: the share of a region's freed pages in its digest, less that of as many zeroes.
    pub(crate) fn given_back(&self, region: RegionId) -> u64 {
        let state = self.lock();
        let sums = state.sums.get(usize::from(region.0)).map_or(&[][..], Vec::as_slice);
        sums.iter().fold(0, |all, &sum| all.wrapping_add(sum))
    }

    /// Bytes in the files.
    #[cfg(test)]
    pub(crate) fn held_bytes(&self) -> u64 {
        self.lock().held_pages * STAGED_PAGE_BYTES
    }

    /// Whether there is room for more; waits for it at most `within`.
    pub(crate) fn wait_for_room(&self, within: Duration) -> bool {
        self.wait(within, State::has_room)
    }

    /// Whether there is enough to send; waits for it at most `within`.
    pub(crate) fn wait_for_enough(&self, within: Duration) -> bool {
        self.wait(within, State::is_enough)
    }

    /// Makes waiting threads check again.
    pub(crate) fn wake(&self) {
        // With the lock: no thread is between its check and its wait.
        drop(self.lock());
        self.changed.notify_all();
    }

    fn wait(&self, within: Duration, is_so: impl Fn(&State) -> bool) -> bool {
        let state = self.lock();
        let until = Instant::now() + within;
        if is_so(&state) {
            return true;
        }
        let left = until.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout(state, left);
        is_so(&waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Gives the files their names, by which another process finds them. The names stay until [`remove`].
    ///
    /// # Errors
    /// A file cannot be named. Files named before keep their names.
    pub(crate) fn name(&self) -> Result<()> {
        let mut state = self.lock();
        if std::mem::replace(&mut state.is_named, true) {
            return Ok(());
        }
        for file in self.files.iter().flatten() {
            let what = || format!("naming the memory file {}", file.path.display());
            let number = file.file.as_raw_fd();
            let from = CString::new(format!("/proc/self/fd/{number}")).expect("no zero in it");
            let to = CString::new(file.path.as_os_str().as_bytes()).expect("no zero in it");
            let follow = AtFlags::AT_SYMLINK_FOLLOW;
            nix::unistd::linkat(AT_FDCWD, &*from, AT_FDCWD, &*to, follow).context(what)?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes the name of a staging file whose pages are not needed any more.
pub(crate) fn remove(path: &Path) {
    // A file that was never named has no name.
    let _ = std::fs::remove_file(path);
}

impl State {
    fn has_room(&self) -> bool {
        self.pages_max.is_none_or(|max| self.held_pages < max)
    }

    fn is_enough(&self) -> bool {
        self.pages_max.is_some_and(|max| self.held_pages >= max / 2)
    }

    fn hold(&mut self, region: RegionId, first: u64, pages: u64) {
        let held = &self.held[usize::from(region.0)];
        for page in first..first + pages {
            self.held_pages += u64::from(!held.get(page));
        }
        held.set(first, pages);
        self.forget_sums(region, first, pages);
    }

    /// Records that the file does not hold these pages any more.
    fn forget(&mut self, region: RegionId, first: u64, pages: u64) {
        let held = &self.held[usize::from(region.0)];
        for page in first..first + pages {
            self.held_pages -= u64::from(held.get(page));
        }
        held.clear(first, pages);
    }

    fn forget_sums(&mut self, region: RegionId, first: u64, pages: u64) {
        let sums = &mut self.sums[usize::from(region.0)];
        let index = |page: u64| usize::try_from(page).expect("64-bit Linux");
        if !sums.is_empty() {
            sums[index(first)..index(first + pages)].fill(0);
        }
    }

    fn each_held(
        &self,
        region: RegionId,
        first: u64,
        pages: u64,
        mut each: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let held = &self.held[usize::from(region.0)];
        let (mut page, end) = (first, first + pages);
        while page < end {
            let from = held.next(page, true).min(end);
            let to = held.next(from, false).min(end);
            if from < to {
                each(from, to - from)?;
            }
            page = to;
        }
        Ok(())
    }

    /// Sums those of these pages that the file holds.
    fn sum(&mut self, file: &StagedFile, region: RegionId, first: u64, pages: u64) -> Result<()> {
        const _: () = assert!(SUMMED_BYTES == PAGE);
        let index = usize::from(region.0);
        for page in first..first + pages {
            if !self.held[index].get(page) {
                continue;
            }
            file.file
                .read_exact_at(&mut self.page[..], page * STAGED_PAGE_BYTES)
                .context(|| format!("reading RAM {}", file.name))?;
            let sum = checksum::digest(page, &[checksum::page_sum(&self.page[..])]);
            let at = usize::try_from(page).expect("64-bit Linux");
            self.sums[index][at] = sum.wrapping_sub(checksum::digest_of_zeroes(page, 1));
        }
        Ok(())
    }
}

/// Marks bytes whose range has been checked against the file.
fn mark(marks: &DirtyMap, region: RegionId, offset: u64, len: u64) -> Result<()> {
    if marks.mark_bytes(region, offset, len) {
        return Ok(());
    }
    Err(Error::Internal(format!("region {} has no {len} bytes at {offset:#x}", region.0)))
}

/// The pages of these bytes, which must be whole pages of the file.
fn pages_of(file: &StagedFile, offset: u64, len: u64) -> Result<(u64, u64)> {
    let (first, pages) = (offset / STAGED_PAGE_BYTES, len / STAGED_PAGE_BYTES);
    let is_whole = (offset | len).is_multiple_of(STAGED_PAGE_BYTES);
    if is_whole && first.checked_add(pages).is_some_and(|end| end <= file.pages) {
        return Ok((first, pages));
    }
    Err(Error::Host(format!(
        "there are no {len} bytes at {offset:#x} in RAM {}, which are whole pages",
        file.name
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    const RAM: RegionId = RegionId(0);
    const PAGES: u64 = 1024;
    const NO_TIME: Duration = Duration::ZERO;

    fn staging(is_checked: bool) -> (Staging, DirtyMap, RamFile) {
        let file = StagedFile::create("pc.ram", PAGES * STAGED_PAGE_BYTES).unwrap();
        let ram = file.ram_file().unwrap();
        let marks = DirtyMap::new(&[(PAGES, 12)]);
        (Staging::new(vec![Some(file)], is_checked), marks, ram)
    }

    fn put(staging: &Staging, marks: &DirtyMap, page: u64, bytes: &[u8]) {
        let pages: Vec<u8> = bytes.iter().flat_map(|&byte| [byte; PAGE]).collect();
        staging.put(marks, RAM, page * STAGED_PAGE_BYTES, &pages).unwrap();
    }

    fn release(staging: &Staging, marks: &DirtyMap, first: u64, pages: u64) {
        staging.release(marks.region(RAM), PageRange { region: RAM, first, pages }).unwrap();
    }

    fn byte(ram: &RamFile, page: u64) -> u8 {
        let bytes = ram.read(page * STAGED_PAGE_BYTES, STAGED_PAGE_BYTES).unwrap();
        assert!(bytes.iter().all(|&byte| byte == bytes[0]));
        bytes[0]
    }

    #[test]
    fn released_page_is_freed_unless_marked_again() {
        let (staging, marks, ram) = staging(false);
        put(&staging, &marks, 5, &[1, 2, 3]);
        assert_eq!(marks.region(RAM).take_word(0, 64), 0b1110_0000);
        // A newer copy of the one in the middle comes while all three are being sent.
        put(&staging, &marks, 6, &[9]);
        release(&staging, &marks, 5, 3);
        assert_eq!([5, 6, 7].map(|page| byte(&ram, page)), [0, 9, 0]);
        assert_eq!(staging.held_bytes(), STAGED_PAGE_BYTES);
        assert_eq!(ram.allocated_bytes().unwrap(), STAGED_PAGE_BYTES);
        assert!(marks.region(RAM).get(6));
    }

    #[test]
    fn zeroes_become_holes() {
        let (staging, marks, ram) = staging(false);
        put(&staging, &marks, 0, &[1, 2, 3, 4]);
        staging.put_zeroes(&marks, RAM, STAGED_PAGE_BYTES, 2 * STAGED_PAGE_BYTES).unwrap();
        assert_eq!([0, 1, 2, 3].map(|page| byte(&ram, page)), [1, 0, 0, 4]);
        assert_eq!(ram.allocated_bytes().unwrap(), 2 * STAGED_PAGE_BYTES);
        assert_eq!(staging.held_bytes(), 2 * STAGED_PAGE_BYTES);
        assert_eq!(marks.region(RAM).word(0), 0b1111);
    }

    #[test]
    fn release_makes_room_and_keep_all_removes_the_limit() {
        let file = StagedFile::create("pc.ram", 2 * STAGED_BYTES_MAX).unwrap();
        let staging = Staging::new(vec![Some(file)], false);
        let pages = STAGED_BYTES_MAX / STAGED_PAGE_BYTES;
        let marks = DirtyMap::new(&[(2 * pages, 12)]);
        for first in (0..pages).step_by(256) {
            assert!(staging.wait_for_room(NO_TIME));
            assert_eq!(staging.wait_for_enough(NO_TIME), first >= pages / 2);
            put(&staging, &marks, first, &[7; 256]);
        }
        assert!(!staging.wait_for_room(NO_TIME));
        marks.region(RAM).clear(0, 1);
        release(&staging, &marks, 0, 1);
        assert!(staging.wait_for_room(NO_TIME));
        // Units larger than a page are sent whole.
        staging.keep_all();
        put(&staging, &marks, pages, &[7; 256]);
        assert!(staging.wait_for_room(NO_TIME) && !staging.wait_for_enough(NO_TIME));
    }

    #[test]
    fn digest_share_of_freed_pages_counts_their_last_contents() {
        let (staging, marks, ram) = staging(true);
        let sum = |page, byte: u8| {
            let sum = checksum::digest(page, &[checksum::page_sum(&[byte; PAGE])]);
            sum.wrapping_sub(checksum::digest_of_zeroes(page, 1))
        };
        put(&staging, &marks, 0, &[1, 2, 3, 4]);
        marks.region(RAM).clear(0, PAGES);
        release(&staging, &marks, 0, 4);
        let all: u64 = (0..4).fold(0, |all, page| all.wrapping_add(sum(page, page as u8 + 1)));
        assert_eq!(staging.given_back(RAM), all);
        // One page comes again and stays, one comes again as zeroes, one comes again and is released.
        put(&staging, &marks, 0, &[8]);
        staging.put_zeroes(&marks, RAM, STAGED_PAGE_BYTES, STAGED_PAGE_BYTES).unwrap();
        put(&staging, &marks, 2, &[9]);
        marks.region(RAM).clear(2, 1);
        release(&staging, &marks, 2, 1);
        assert_eq!(staging.given_back(RAM), sum(2, 9).wrapping_add(sum(3, 4)));
        assert_eq!(byte(&ram, 0), 8);
    }

    #[test]
    fn file_is_named_from_name_until_remove() {
        let (staging, marks, ram) = staging(false);
        put(&staging, &marks, 3, &[5]);
        let path = staging.files[0].as_ref().unwrap().path().to_owned();
        assert!(!path.exists());
        staging.name().unwrap();
        staging.name().unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!((metadata.dev(), metadata.ino()), ram.identity().unwrap());
        assert_eq!(metadata.mode() & 0o7777, 0o600);
        assert_eq!(byte(&RamFile::open_source("pc.ram", &path, false).unwrap(), 3), 5);
        remove(&path);
        assert!(!path.exists());
    }

    #[test]
    fn range_that_is_not_whole_pages_of_the_region_is_refused() {
        let (staging, marks, _ram) = staging(false);
        let end = PAGES * STAGED_PAGE_BYTES;
        for (offset, len) in [(end, 4096), (end - 4096, 8192), (u64::MAX - 4095, 4096), (1, 4096)] {
            assert!(staging.put_zeroes(&marks, RAM, offset, len).is_err(), "{offset} {len}");
        }
        assert!(staging.put(&marks, RAM, 0, &[1; 100]).is_err());
        assert!(staging.put(&marks, RegionId(1), 0, &[1; PAGE]).is_err());
        assert_eq!(marks.bytes(), 0);
        assert!(StagedFile::create("odd", 4097).is_err() && StagedFile::create("none", 0).is_err());
    }
}
