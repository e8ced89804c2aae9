//! Userfaultfds for memory of this process: made, registered, and released.
//!
//! [`Guarded`] holds a spare duplicate of the userfaultfd that only [`release`](Guarded::release) closes. Until then
//! accesses to missing pages wait and never read zeroes, also after a panic.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, fcntl};

use super::open::{self, DEVICE, Faults};
use super::pagemap;
use super::uffd::Uffd;
use crate::error::{Context, Error, Result};
use crate::memory::kind::Kind;
use crate::memory::small_page_bytes;

const FEATURES: [(u64, &str); 6] = [
    (open::EVENT_REMOVE, "EVENT_REMOVE"),
    (open::MISSING_HUGETLBFS, "MISSING_HUGETLBFS"),
    (open::MISSING_SHMEM, "MISSING_SHMEM"),
    (open::THREAD_ID, "THREAD_ID"),
    (open::MINOR_HUGETLBFS, "MINOR_HUGETLBFS (Linux 5.13)"),
    (open::MINOR_SHMEM, "MINOR_SHMEM (Linux 5.14)"),
];

/// A piece of this process's memory that is to be filled.
#[derive(Clone, Debug)]
pub(crate) struct Area {
    /// The region's name.
    pub(crate) name: String,
    pub(crate) addresses: Range<u64>,
    /// The file that is mapped there, MAP_SHARED; none for private memory without a file.
    pub(crate) file: Option<Mapped>,
}

/// A file from an offset on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapped {
    /// Device and inode: inode numbers repeat on other file systems.
    pub(crate) file: (u64, u64),
    pub(crate) offset: u64,
}

/// The result of [`check`] for an area.
struct Checked {
    /// Whether a forked child would inherit it.
    forks: bool,
    page_bytes: u64,
}

/// Areas that are registered with a userfaultfd.
pub(crate) struct Guarded {
    areas: Vec<(Area, Checked)>,
    uffd: Uffd,
    /// A duplicate of the same userfaultfd, which stays open when this is dropped.
    spare: RawFd,
}

impl Guarded {
    /// Registers the areas with a new userfaultfd, or takes over `existing`, with which they have
    /// to be registered already. From here on every access to a missing page waits.
    ///
    /// The areas must be mapped as described, be empty, and stay so until [`Guarded::release`].
    ///
    /// # Errors
    /// No permission for userfaultfd, a kernel that lacks a feature, or memory that differs from
    /// its description. Nothing has been registered then.
    pub(crate) fn new(areas: Vec<Area>, existing: Option<BorrowedFd<'_>>) -> Result<Guarded> {
        let areas = areas
            .into_iter()
            .map(|area| check(&area, existing.is_some()).map(|checked| (area, checked)))
            .collect::<Result<Vec<_>>>()?;
        let descriptor = match existing {
            Some(existing) => {
                existing.try_clone_to_owned().context(|| "duplicating the userfaultfd")?
            }
            None => make()?,
        };
        if existing.is_none() {
            // On an error the descriptor is closed, which unregisters all areas.
            areas.iter().try_for_each(|(area, _)| register(&descriptor, area))?;
        }
        let number = fcntl(&descriptor, FcntlArg::F_DUPFD_CLOEXEC(3))
            .context(|| "duplicating the userfaultfd")?;
        let uffd = Uffd::new(descriptor);
        let guarded = Guarded { areas, uffd, spare: number };
        if let Err(error) = guarded.take() {
            guarded.release();
            return Err(error);
        }
        Ok(guarded)
    }

    /// A child forked in the meantime has the memory without the userfaultfd, and would read
    /// zeroes.
    fn take(&self) -> Result<()> {
        self.uffd.set_nonblocking().context(|| "the userfaultfd")?;
        self.areas.iter().try_for_each(|(area, _)| {
            area.advise(libc::MADV_DONTFORK).context(|| format!("madvise of RAM {}", area.name))
        })
    }

    /// The areas, each with its page size in bytes.
    pub(crate) fn areas(&self) -> impl Iterator<Item = (&Area, u64)> {
        self.areas.iter().map(|(area, checked)| (area, checked.page_bytes))
    }

    /// The userfaultfd, for the threads that serve it.
    pub(crate) fn uffd(&self) -> Uffd {
        self.uffd.clone()
    }

    /// Ends all waiting: missing pages are zeroes from here on.
    pub(crate) fn release(self) {
        for (area, checked) in &self.areas {
            // Fails if the program has unmapped a part in the meantime, as it may.
            let _ = self.uffd.unregister(area.addresses.start, area.bytes());
            if checked.forks {
                let _ = area.advise(libc::MADV_DOFORK);
            }
        }
        // SAFETY: `new` made the descriptor, and no other code has its number.
        drop(unsafe { OwnedFd::from_raw_fd(self.spare) });
    }
}

impl Area {
    pub(crate) fn bytes(&self) -> u64 {
        self.addresses.end - self.addresses.start
    }

    /// The kind of its mapping.
    pub(crate) fn kind(&self) -> Kind {
        if self.file.is_some() { Kind::Shared } else { Kind::Anonymous }
    }

    fn advise(&self, advice: libc::c_int) -> io::Result<()> {
        let address = usize::try_from(self.addresses.start).expect("64-bit Linux");
        let start = std::ptr::with_exposed_provenance_mut(address);
        let len = usize::try_from(self.bytes()).expect("64-bit Linux");
        // SAFETY: changes whether a forked child inherits the range, and no content.
        let result = unsafe { libc::madvise(start, len, advice) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Also for the kernel's faults, as system calls and KVM access the guest's memory.
fn create() -> Result<OwnedFd> {
    let (uffd, _) = open::open(Faults::All).map_err(|error| {
        Error::Unsupported(format!(
            "no userfaultfd for the guest's memory: {error}; let this program's user read and write \
             {DEVICE}, or set `sysctl vm.unprivileged_userfaultfd=1`"
        ))
    })?;
    Ok(uffd)
}

/// A userfaultfd with every feature that any kind of memory needs.
fn make() -> Result<OwnedFd> {
    let wanted = FEATURES.iter().fold(0, |all, (bit, _)| all | bit);
    // Asking for a feature that the kernel lacks makes the descriptor unusable, so a separate one
    // asks.
    let lacking = wanted & !open::handshake(&create()?, 0).context(|| "UFFDIO_API")?;
    if lacking != 0 {
        let names: Vec<_> =
            FEATURES.iter().filter(|(bit, _)| lacking & bit != 0).map(|(_, name)| *name).collect();
        return Err(Error::Unsupported(format!(
            "this kernel's userfaultfd lacks {}; umem needs Linux 6.3 or later",
            names.join(", ")
        )));
    }
    let uffd = create()?;
    open::handshake(&uffd, wanted).context(|| "UFFDIO_API")?;
    Ok(uffd)
}

fn register(uffd: &OwnedFd, area: &Area) -> Result<()> {
    open::register(uffd, &area.addresses, area.kind()).map_err(|error| {
        Error::Unsupported(format!(
            "RAM {} cannot be registered with userfaultfd: {error}; shared memory must be of a memfd, of \
             tmpfs or of hugetlbfs, and no other userfaultfd may have it",
            area.name
        ))
    })?;
    Ok(())
}

/// Checks that the area is mapped as described and is empty.
fn check(area: &Area, is_registered: bool) -> Result<Checked> {
    let wrong = |what: &str| Error::Unsupported(format!("RAM {}: {what}", area.name));
    let smaps = File::open("/proc/self/smaps").context(|| "/proc/self/smaps")?;
    let mappings = mappings(BufReader::new(smaps), &area.addresses)
        .context(|| "/proc/self/smaps")?
        .ok_or_else(|| wrong("not all of its addresses are mapped: map it first, whole"))?;
    let is_as_said = |mapping: &Mapping| match &area.file {
        Some(file) => {
            let offset = mapping.addresses.start.wrapping_sub(area.addresses.start);
            let is_the_same =
                mapping.file == file.file && mapping.offset == file.offset.wrapping_add(offset);
            mapping.has("sh") && is_the_same
        }
        None => !mapping.has("sh") && mapping.file == NO_FILE,
    };
    if !mappings.iter().all(is_as_said) {
        return Err(wrong(match area.file {
            Some(_) => {
                "its addresses are not a MAP_SHARED mapping of its file from the first byte on"
            }
            None => "it is not mapped MAP_PRIVATE | MAP_ANONYMOUS; memory of a file needs the file",
        }));
    }
    let modes: &[&str] = if area.kind().lands_in_file() { &["um", "ui"] } else { &["um"] };
    if is_registered && !modes.iter().all(|mode| mappings.iter().all(|m| m.has(mode))) {
        return Err(wrong(
            "it is not registered with the userfaultfd that was given: register it first, for \
             missing and, if it is shared, for minor faults",
        ));
    }
    let page_bytes = mappings[0].page_bytes;
    let is_whole = |number: u64| number.is_multiple_of(page_bytes.max(small_page_bytes()));
    if !is_whole(area.addresses.start) || !is_whole(area.addresses.end) {
        return Err(wrong("its address and size must be multiples of its page size"));
    }
    let is_anonymous = !area.kind().lands_in_file();
    if is_anonymous
        && pagemap::is_populated(None, &area.addresses).context(|| "/proc/self/pagemap")?
    {
        return Err(wrong(
            "it has contents already, which no fault would ever replace: discard them with \
             madvise(MADV_DONTNEED), and do not touch it before it is registered",
        ));
    }
    Ok(Checked { forks: !mappings.iter().any(|mapping| mapping.has("dc")), page_bytes })
}

/// A mapping of this process, from its entry in smaps (proc_pid_smaps(5)).
struct Mapping {
    addresses: Range<u64>,
    /// The mapping's offset in its file, bytes.
    offset: u64,
    /// Device and inode of its file, or [`NO_FILE`].
    file: (u64, u64),
    page_bytes: u64,
    flags: String,
}

/// The numbers in proc(5) for memory without a file.
const NO_FILE: (u64, u64) = (0, 0);

impl Mapping {
    /// `START-END PERMISSIONS OFFSET DEVICE INODE …`, the first line of its entry.
    fn begin(line: &str) -> Option<Mapping> {
        let mut words = line.split_ascii_whitespace();
        let number = |text| u64::from_str_radix(text, 16).ok();
        let (start, end) = words.next()?.split_once('-')?;
        let addresses = number(start)?..number(end)?;
        let offset = number(words.nth(1)?)?;
        let (major, minor) = words.next()?.split_once(':')?;
        let part = |text| u32::from_str_radix(text, 16).ok();
        let device = libc::makedev(part(major)?, part(minor)?);
        let file = (device, words.next()?.parse().ok()?);
        Some(Mapping {
            addresses,
            offset,
            file,
            page_bytes: small_page_bytes(),
            flags: String::new(),
        })
    }

    fn has(&self, flag: &str) -> bool {
        self.flags.split_ascii_whitespace().any(|word| word == flag)
    }
}

/// The mappings that make up a range; none when they do not cover it.
fn mappings(smaps: impl BufRead, range: &Range<u64>) -> io::Result<Option<Vec<Mapping>>> {
    let mut at = range.start;
    let mut all = Vec::new();
    let mut current: Option<Mapping> = None;
    for line in smaps.lines() {
        let line = line?;
        if let Some(mapping) = Mapping::begin(&line) {
            current = mapping.addresses.contains(&at).then_some(mapping);
            continue;
        }
        let Some(mapping) = &mut current else { continue };
        if let Some(size) = line.strip_prefix("KernelPageSize:") {
            let kib = size.trim().strip_suffix(" kB").and_then(|kib| kib.parse::<u64>().ok());
            mapping.page_bytes = kib.map_or(mapping.page_bytes, |kib| kib << 10);
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            flags.clone_into(&mut mapping.flags);
            at = mapping.addresses.end;
            all.extend(current.take());
            if at >= range.end {
                return Ok(Some(all));
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

    use super::*;

    const SMAPS: &str = "\
1000-3000 rw-s 00000000 00:01 5   /memfd:a (deleted)
KernelPageSize:        4 kB
VmFlags: rd wr sh um ui
3000-5000 rw-s 00002000 00:01 5   /memfd:a (deleted)
KernelPageSize:        4 kB
VmFlags: rd wr sh dc
200000-400000 rw-p 00000000 00:00 0
KernelPageSize:     2048 kB
VmFlags: rd wr ht
";

    #[test]
    fn every_mapping_of_a_range_is_checked() {
        let of = |range: Range<u64>| mappings(SMAPS.as_bytes(), &range).unwrap();
        let all = of(0x2000..0x5000).unwrap();
        assert_eq!(all.iter().map(|m| m.has("um")).collect::<Vec<_>>(), [true, false]);
        assert_eq!(all.iter().map(|m| m.has("dc")).collect::<Vec<_>>(), [false, true]);
        assert_eq!(
            all.iter().map(|m| (m.offset, m.file)).collect::<Vec<_>>(),
            [(0, (1, 5)), (0x2000, (1, 5))]
        );
        let huge = &of(0x20_0000..0x40_0000).unwrap()[0];
        assert_eq!((huge.has("sh"), huge.file, huge.page_bytes), (false, NO_FILE, 2 << 20));
        assert!(of(0x4000..0x6000).is_none(), "a gap after the mapping");
        assert!(of(0x0..0x2000).is_none(), "a gap before the mapping");
        assert!(of(0x20_0000..0x50_0000).is_none(), "no mapping behind the range");
    }

    #[test]
    fn same_inode_number_on_another_device_is_another_file() {
        use std::os::unix::fs::MetadataExt;

        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        file.as_file().set_len(8192).unwrap();
        let metadata = file.as_file().metadata().unwrap();
        let bytes = std::num::NonZeroUsize::new(8192).unwrap();
        let (prot, flags) = (ProtFlags::PROT_READ, MapFlags::MAP_SHARED);
        // SAFETY: a new mapping, which nothing refers to.
        let address = unsafe { mmap(None, bytes, prot, flags, file.as_file(), 0) }.unwrap();
        let start = address.as_ptr().expose_provenance() as u64;
        for (device, is_it) in [(metadata.dev(), true), (metadata.dev() + 1, false)] {
            let mapped = Mapped { file: (device, metadata.ino()), offset: 0 };
            let addresses = start..start + 8192;
            let area = Area { name: "ram0".into(), addresses, file: Some(mapped) };
            assert_eq!(check(&area, false).is_ok(), is_it, "device {device}");
        }
        // SAFETY: the mapping made above, whole.
        unsafe { munmap(address, bytes.get()) }.unwrap();
    }
}
