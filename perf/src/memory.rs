//! Memory files of each page kind, and mappings of them.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use serde::Serialize;

use crate::error::{Context, Result, failure};
use crate::interrupt;
use crate::machine::memory_free_mib;

/// Bytes of a base page.
pub(crate) const PAGE_BYTES: usize = 4096;

/// Bytes of a huge page.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// The kind of the memory that is filled, and its mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Pages {
    /// A memfd of 4 KiB pages, mapped shared.
    Memfd,
    /// A file in a tmpfs mounted with `huge=always`, mapped shared.
    HugeTmpfs,
    /// A memfd of 2 MiB pages from the kernel's pool, mapped shared.
    Hugetlb,
    /// Anonymous memory of 4 KiB pages.
    Anonymous,
    /// Anonymous memory of 2 MiB pages from the kernel's pool.
    AnonymousHuge,
    /// A memfd mapped private, which is empty when the guest has its own copy of every page.
    Private,
}

impl Pages {
    pub(crate) const ALL: [Pages; 6] = [
        Pages::Memfd,
        Pages::HugeTmpfs,
        Pages::Hugetlb,
        Pages::Anonymous,
        Pages::AnonymousHuge,
        Pages::Private,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Pages::Memfd => "memfd, 4 KiB pages",
            Pages::HugeTmpfs => "tmpfs huge=always",
            Pages::Hugetlb => "hugetlb, 2 MiB pages",
            Pages::Anonymous => "anonymous, 4 KiB pages",
            Pages::AnonymousHuge => "anonymous, 2 MiB hugetlb",
            Pages::Private => "private memfd, 4 KiB pages",
        }
    }

    /// Its name on the command line.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Pages::Memfd => "memfd",
            Pages::HugeTmpfs => "huge-tmpfs",
            Pages::Hugetlb => "hugetlb",
            Pages::Anonymous => "anonymous",
            Pages::AnonymousHuge => "anonymous-huge",
            Pages::Private => "private",
        }
    }

    /// The kind of the file from which such memory is filled: pages of about the same size.
    pub(crate) fn source(self) -> Pages {
        match self {
            Pages::Memfd | Pages::Anonymous | Pages::Private => Pages::Memfd,
            Pages::HugeTmpfs | Pages::Hugetlb | Pages::AnonymousHuge => Pages::HugeTmpfs,
        }
    }

    /// Whether its pages come from the kernel's pool of huge pages.
    pub(crate) fn is_from_pool(self) -> bool {
        matches!(self, Pages::Hugetlb | Pages::AnonymousHuge)
    }

    /// Whether it has no file.
    pub(crate) fn is_anonymous(self) -> bool {
        matches!(self, Pages::Anonymous | Pages::AnonymousHuge)
    }

    /// A new, empty file of `bytes` without a name, which its last user removes.
    pub(crate) fn file(self, bytes: usize) -> Result<File> {
        let memfd = |flags| memfd_create(c"umem-perf", flags | MFdFlags::MFD_CLOEXEC);
        let file = match self {
            Pages::Memfd | Pages::Private => {
                File::from(memfd(MFdFlags::empty()).context(|| "making a memfd")?)
            }
            Pages::Hugetlb => {
                let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
                File::from(memfd(flags).context(|| "making a memfd of huge pages")?)
            }
            Pages::HugeTmpfs => huge_tmpfs_file(bytes)
                .context(|| "making a tmpfs with huge pages (needs CAP_SYS_ADMIN)")?,
            Pages::Anonymous | Pages::AnonymousHuge => {
                return failure("anonymous memory has no file");
            }
        };
        file.set_len(bytes as u64).context(|| "sizing a memory file")?;
        Ok(file)
    }

    /// Memory of this kind, empty.
    pub(crate) fn map(self, bytes: usize) -> Result<(Option<File>, Mapping)> {
        if self.is_anonymous() {
            return Ok((None, Mapping::anonymous(bytes, self == Pages::AnonymousHuge)?));
        }
        let file = self.file(bytes)?;
        let mapping = self.map_file(&file, bytes)?;
        Ok((Some(file), mapping))
    }

    /// A file of this kind, as a guest maps it.
    pub(crate) fn map_file(self, file: &File, bytes: usize) -> Result<Mapping> {
        let sharing = match self {
            Pages::Private => MapFlags::MAP_PRIVATE,
            _ => MapFlags::MAP_SHARED,
        };
        Mapping::with(file, bytes, sharing)
    }

    /// Bytes that one fault populates.
    pub(crate) fn page_bytes(self) -> usize {
        if self.is_from_pool() { HUGE_PAGE_BYTES } else { PAGE_BYTES }
    }

    /// Warms as much memory of this kind: see [`warm`].
    pub(crate) fn warm(self, bytes: usize) -> Result<()> {
        warm(|| {
            let (_file, mapping) = self.map(bytes).context(|| "warming memory")?;
            mapping.touch_for_writing()
        })
    }
}

/// Writes memory and frees it with `once`, until that gets no faster: the first touch of memory
/// that a virtual machine has not used for seconds costs several times more, as its host backs it
/// again, and the kernel does not always reuse the memory that was freed last.
pub(crate) fn warm(mut once: impl FnMut() -> Result<()>) -> Result<()> {
    until_no_faster(|| {
        interrupt::check()?;
        let began = Instant::now();
        once()?;
        Ok(began.elapsed())
    })
}

/// Calls `once`, which returns its time, at least twice, until the time is no less than before.
fn until_no_faster(mut once: impl FnMut() -> Result<Duration>) -> Result<()> {
    const TIMES_MAX: u32 = 6;
    /// A time above this share of the best one is not less.
    const LESS: f64 = 0.8;
    let mut best_s = f64::INFINITY;
    for _ in 0..TIMES_MAX {
        let seconds = once()?.as_secs_f64();
        if seconds > LESS * best_s {
            break;
        }
        best_s = seconds;
    }
    Ok(())
}

impl std::str::FromStr for Pages {
    type Err = String;

    fn from_str(word: &str) -> std::result::Result<Pages, String> {
        let words = Pages::ALL.map(Pages::word).join(", ");
        let found = Pages::ALL.into_iter().find(|pages| pages.word() == word);
        found.ok_or_else(|| format!("give one of {words}"))
    }
}

/// Values separated by commas, for an option.
#[derive(Clone, Debug)]
pub(crate) struct List<T>(pub(crate) Vec<T>);

impl<T: std::str::FromStr<Err: std::fmt::Display>> std::str::FromStr for List<T> {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<List<T>, String> {
        let values = text.split(',').map(|word| {
            let parsed = word.trim().parse();
            parsed.map_err(|error: T::Err| format!("{word:?} in {text:?}: {error}"))
        });
        values.collect::<std::result::Result<_, _>>().map(List)
    }
}

/// A file in a tmpfs of its own that is mounted nowhere (fsopen(2)); the open file keeps the tmpfs
/// alive.
fn huge_tmpfs_file(bytes: usize) -> std::io::Result<File> {
    const FSOPEN_CLOEXEC: u32 = 1;
    const FSCONFIG_SET_STRING: u32 = 1;
    const FSCONFIG_CMD_CREATE: u32 = 6;
    const FSMOUNT_CLOEXEC: u32 = 1;
    // SAFETY: a constant string and flags.
    let fs = owned(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC) })?;
    let configure = |command: u32, key: Option<&CStr>, value: Option<&CStr>| {
        let (key, value) = (pointer(key), pointer(value));
        // SAFETY: both are null or strings that end in zero and outlive the call.
        let result =
            unsafe { libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), command, key, value, 0) };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // Room for whole huge pages.
    let size = CString::new((bytes + (4 << 20)).to_string())?;
    configure(FSCONFIG_SET_STRING, Some(c"huge"), Some(c"always"))?;
    configure(FSCONFIG_SET_STRING, Some(c"size"), Some(&size))?;
    configure(FSCONFIG_SET_STRING, Some(c"mode"), Some(c"0700"))?;
    configure(FSCONFIG_CMD_CREATE, None, None)?;
    // SAFETY: descriptors and flags only.
    let mount =
        owned(unsafe { libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), FSMOUNT_CLOEXEC, 0) })?;
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC;
    // SAFETY: a constant name, relative to a mount that no other process can reach.
    let file = unsafe { libc::openat(mount.as_raw_fd(), c"ram".as_ptr(), flags, 0o600) };
    owned(libc::c_long::from(file)).map(File::from)
}

fn pointer(text: Option<&CStr>) -> *const libc::c_char {
    text.map_or(std::ptr::null(), CStr::as_ptr)
}

/// The descriptor that a system call has just returned.
fn owned(result: libc::c_long) -> std::io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: the descriptor is new and has no other owner.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Memory: a mapping of a whole memory file, or anonymous. It gives out only pointers: other
/// threads, and the kernel on behalf of other sockets, write there.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory without an owner; the users of the pointers only hand them to the kernel, or
// access the memory after its writer has ended.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// A shared mapping of a whole memory file.
    pub(crate) fn of(file: &File, bytes: usize) -> Result<Mapping> {
        Mapping::with(file, bytes, MapFlags::MAP_SHARED)
    }

    fn with(file: &File, bytes: usize, sharing: MapFlags) -> Result<Mapping> {
        let length = length(bytes)?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, length, READ_WRITE, sharing, file, 0) }
            .context(|| "mapping a memory file")?;
        Ok(Mapping { start: start.cast(), bytes })
    }

    pub(crate) fn anonymous(bytes: usize, huge: bool) -> Result<Mapping> {
        let pages =
            if huge { MapFlags::MAP_HUGETLB | MapFlags::MAP_HUGE_2MB } else { MapFlags::empty() };
        let flags = MapFlags::MAP_PRIVATE | pages;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap_anonymous(None, length(bytes)?, READ_WRITE, flags) }
            .context(|| "mapping anonymous memory")?;
        Ok(Mapping { start: start.cast(), bytes })
    }

    /// Populates every page, writable.
    fn touch_for_writing(&self) -> Result<()> {
        for offset in (0..self.bytes).step_by(WARM_BYTES) {
            crate::interrupt::check()?;
            let (_, left) = self.at(offset);
            self.advise(offset, left.min(WARM_BYTES), MmapAdvise::MADV_POPULATE_WRITE)?;
        }
        Ok(())
    }

    /// madvise(2) for a part of it.
    pub(crate) fn advise(&self, offset: usize, bytes: usize, advice: MmapAdvise) -> Result<()> {
        let (start, left) = self.at(offset);
        assert!(bytes <= left);
        let start = NonNull::new(start).ok_or("a mapping is nowhere")?;
        // SAFETY: inside the mapping, into which there are no references.
        unsafe { madvise(start.cast(), bytes, advice) }.context(|| format!("{advice:?}"))
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The address of byte `offset`, and the number of bytes from there to the end.
    pub(crate) fn at(&self, offset: usize) -> (*mut u8, usize) {
        assert!(offset <= self.bytes);
        // SAFETY: inside the mapping or at its end, as just asserted.
        (unsafe { self.start.as_ptr().add(offset) }, self.bytes - offset)
    }

    /// Writes its own number into each page's first word, and another pattern into all others.
    pub(crate) fn fill(&self) {
        for page in 0..self.bytes / PAGE_BYTES {
            self.fill_page(page * PAGE_BYTES, page);
        }
    }

    /// Fills only the pages that are data in a guest of umem with this share of zero pages, with
    /// their numbers among themselves, so that they read as those of [`Mapping::fill`] when put
    /// together. Returns the runs of such pages, as offset and length in bytes; together they are
    /// whole huge pages.
    pub(crate) fn fill_data(&self, zero_percent: u32) -> Result<Vec<(usize, usize)>> {
        let is_data = |page: &usize| !is_zero(*page, zero_percent);
        let mut data: Vec<usize> = (0..self.bytes / PAGE_BYTES).filter(is_data).collect();
        if zero_percent > 0 {
            // They may hold a guest's data from before.
            let whole = data.len() - data.len() % (HUGE_PAGE_BYTES / PAGE_BYTES);
            data.drain(whole..).for_each(|page| self.set_page(page * PAGE_BYTES, 0));
        }
        if data.is_empty() {
            return failure("no data is left beside the zero pages: choose a larger --size");
        }
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for (number, page) in data.into_iter().enumerate() {
            let offset = page * PAGE_BYTES;
            self.fill_page(offset, number);
            match runs.last_mut() {
                Some((start, bytes)) if *start + *bytes == offset => *bytes += PAGE_BYTES,
                _ => runs.push((offset, PAGE_BYTES)),
            }
        }
        Ok(runs)
    }

    fn fill_page(&self, offset: usize, number: usize) {
        self.set_page(offset, 0xa5);
        let (start, _) = self.at(offset);
        // SAFETY: only this thread accesses the page while it is filled, and the page is aligned.
        unsafe { start.cast::<u64>().write(number as u64) }
    }

    fn set_page(&self, offset: usize, byte: u8) {
        let (start, left) = self.at(offset);
        assert!(PAGE_BYTES <= left);
        // SAFETY: as above.
        unsafe { start.write_bytes(byte, PAGE_BYTES) }
    }

    /// Whether a page holds nothing but zeroes.
    pub(crate) fn is_zero_page(&self, offset: usize) -> bool {
        let (start, left) = self.at(offset);
        assert!(PAGE_BYTES <= left);
        let words = start.cast::<[u64; WORDS_AT_ONCE]>();
        (0..PAGE_BYTES / size_of::<[u64; WORDS_AT_ONCE]>()).all(|index| {
            // SAFETY: inside the page, aligned; it is only read while senders run.
            let words = unsafe { words.add(index).read() };
            words.iter().fold(0, |all, word| all | word) == 0
        })
    }

    /// The first page without the content of [`Mapping::fill`], judged by its first and last word.
    pub(crate) fn first_wrong_page(&self) -> Option<usize> {
        (0..self.bytes / PAGE_BYTES).find(|&page| {
            let (start, _) = self.at(page * PAGE_BYTES);
            // SAFETY: inside the page, aligned; its writers have ended.
            let (number, last) = unsafe {
                (start.cast::<u64>().read_volatile(), start.add(PAGE_BYTES - 1).read_volatile())
            };
            number != page as u64 || last != 0xa5
        })
    }
}

/// Words that are checked at once.
const WORDS_AT_ONCE: usize = 32;

/// The zero pages of `umem guest` with its default seed (`src/host/guest/pattern.rs`): groups of 16
/// pages, with data in between.
fn is_zero(page: usize, percent: u32) -> bool {
    const SEED: u64 = 1;
    mix(SEED ^ mix(page as u64 / 16)) % 100 < u64::from(percent)
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
pub(crate) fn mix(value: u64) -> u64 {
    let mut mixed = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

/// Bytes that are populated between two checks for Ctrl-C.
const WARM_BYTES: usize = 64 << 20;

fn length(bytes: usize) -> Result<NonZeroUsize> {
    NonZeroUsize::new(bytes).ok_or_else(|| "a mapping of nothing".into())
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping made here; pointers into it do not outlive it.
        let _ = unsafe { munmap(self.start.cast(), self.bytes) };
    }
}

/// Huge pages reserved in the kernel's pool; dropping this restores the pool's size.
pub(crate) struct Pool {
    before: usize,
}

const POOL: &str = "/proc/sys/vm/nr_hugepages";

impl Pool {
    /// Makes sure that the pool has `bytes` free in pages of 2 MiB.
    pub(crate) fn reserve(bytes: usize) -> Result<Pool> {
        if !bytes.is_multiple_of(HUGE_PAGE_BYTES) {
            return failure("pages of 2 MiB need an even --size");
        }
        let needed = bytes / HUGE_PAGE_BYTES;
        let count = |name: &str| -> Result<usize> {
            let text = std::fs::read_to_string("/proc/meminfo")?;
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
            number.ok_or_else(|| "this kernel has no pool of huge pages".into())
        };
        let free = || -> Result<usize> {
            Ok(count("HugePages_Free")?.saturating_sub(count("HugePages_Rsvd")?))
        };
        let before: usize = std::fs::read_to_string(POOL)?.trim().parse()?;
        let pool = Pool { before };
        let missing = needed.saturating_sub(free()?);
        if missing > 0 {
            std::fs::write(POOL, (before + missing).to_string())
                .context(|| format!("enlarging {POOL} (needs root)"))?;
        }
        match free()? {
            free if free >= needed => Ok(pool),
            free => failure(format!(
                "the kernel's pool has {free} huge pages free of the {needed} needed: choose a \
                 smaller --size, or free memory"
            )),
        }
    }
}

impl Pool {
    /// Takes free memory into the pool except `leave_mib`: the pool's memory is not written, so the
    /// rest is used repeatedly, and stays warm.
    pub(crate) fn hold_all_but(leave_mib: usize) -> Result<Pool> {
        let before: usize = std::fs::read_to_string(POOL)?.trim().parse()?;
        let more = memory_free_mib().saturating_sub(leave_mib) / (HUGE_PAGE_BYTES >> 20);
        // The kernel takes as many as it can get.
        std::fs::write(POOL, (before + more).to_string())
            .context(|| format!("enlarging {POOL} (needs root)"))?;
        Ok(Pool { before })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = std::fs::write(POOL, self.before.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cold memory is written again, and memory that does not get warm is not written forever.
    #[test]
    fn warming_repeats_until_no_faster_and_gives_up() {
        let left = |seconds: &[u64]| {
            let mut passes = seconds.iter();
            let once = || Ok(Duration::from_secs(*passes.next().ok_or("once too often")?));
            until_no_faster(once).unwrap();
            passes.len()
        };
        assert_eq!(left(&[10, 10, 10]), 1);
        assert_eq!(left(&[100, 10, 9, 9]), 1);
        assert_eq!(left(&[640, 320, 160, 80, 40, 20, 10]), 1);
    }

    #[test]
    fn lists_and_names_of_memory_kinds_parse() {
        let list: List<Pages> = "memfd, private".parse().unwrap();
        assert_eq!(list.0, [Pages::Memfd, Pages::Private]);
        assert!("memfd,tape".parse::<List<Pages>>().unwrap_err().contains("tape"));
        assert!("1,,2".parse::<List<u16>>().is_err());
        for pages in Pages::ALL {
            assert_eq!(pages.word().parse(), Ok(pages));
        }
    }

    #[test]
    fn first_wrong_page_finds_a_lost_page() {
        let mapping = Mapping::anonymous(8 * PAGE_BYTES, false).unwrap();
        assert_eq!(mapping.first_wrong_page(), Some(0));
        mapping.fill();
        assert_eq!(mapping.first_wrong_page(), None);
        mapping.advise(5 * PAGE_BYTES, PAGE_BYTES, MmapAdvise::MADV_DONTNEED).unwrap();
        assert_eq!(mapping.first_wrong_page(), Some(5));
    }

    #[test]
    fn fill_data_numbers_only_data_pages() {
        let mapping = Mapping::anonymous(16 << 20, false).unwrap();
        let runs = mapping.fill_data(50).unwrap();
        let bytes: usize = runs.iter().map(|(_, bytes)| bytes).sum();
        assert!(bytes.is_multiple_of(HUGE_PAGE_BYTES) && (4 << 20..12 << 20).contains(&bytes));
        let (first, length) = runs[1];
        assert!(first > runs[0].0 + runs[0].1 && !mapping.is_zero_page(first));
        assert!(mapping.is_zero_page(first - PAGE_BYTES) && mapping.is_zero_page(first + length));
        // SAFETY: inside the mapping, aligned.
        let number = unsafe { mapping.at(first).0.cast::<u64>().read() };
        assert_eq!(number, (runs[0].1 / PAGE_BYTES) as u64);
        // The same again after a guest with more data.
        let last = runs.last().map(|(start, bytes)| start + bytes).unwrap();
        let data = (last..16 << 20).step_by(PAGE_BYTES);
        let rest: Vec<usize> = data.filter(|offset| !is_zero(offset / PAGE_BYTES, 50)).collect();
        assert!(!rest.is_empty());
        rest.iter().for_each(|&offset| mapping.fill_page(offset, 7));
        assert_eq!(mapping.fill_data(50).unwrap(), runs);
        assert!(rest.iter().all(|&offset| mapping.is_zero_page(offset)));
        assert!(mapping.fill_data(100).is_err());
    }
}
