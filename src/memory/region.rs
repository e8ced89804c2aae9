//! A RAM file mapped into this process.
//!
//! A guest may write the bytes at any time, so there is never a reference to them: only a pointer
//! and a length, which go to the kernel ([`umem_ring::Span`]) or to raw reads.

use std::fs::{File, Metadata, OpenOptions};
use std::io::IoSlice;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, HUGETLBFS_MAGIC, OVERLAYFS_SUPER_MAGIC, Statfs,
    TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs, statfs,
};
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::unistd::Pid;
use umem_ring::{Fd, Span};

use super::guarded::{self, Gone};
use super::kind::Backing;
use super::stamp::Stamp;
use super::{claim, data};
use crate::error::{Context, Error, Result};

/// A file mapping, unmapped when its last holder (an operation in flight included) is dropped.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
    /// The process that has it mapped: stored, as asking for it is a system call.
    process: Pid,
}

// SAFETY: the mapping is plain memory for the kernel and for raw reads; no thread owns it.
unsafe impl Send for Mapping {}
// SAFETY: as above; there are no references into it, so nothing can alias wrongly.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: start and len are those of the mapping made here, and the last holder has been
        // dropped.
        let unmapped = unsafe { munmap(self.start.cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

/// One region of guest memory: its file and this process's mapping of it.
pub(crate) struct RamFile {
    pub(crate) name: String,
    /// The region's start in its file, bytes: offsets count from there.
    base: u64,
    pub(crate) bytes: u64,
    /// log2 of the page size: the kernel's (tmpfs, files) or hugetlbfs's.
    pub(crate) page_shift: u8,
    pub(crate) backing: Backing,
    /// Whether the file is on tmpfs (as a memfd is) or hugetlbfs.
    is_memory: bool,
    /// Whether the file's times change at a write, and not when the data reaches a disk.
    keeps_times: bool,
    /// Whether other processes share the open file, and so its position.
    is_shared: bool,
    file: File,
    mapping: Arc<Mapping>,
    /// The file's stamp, from the moment at which it must not change any more ([`fix`](RamFile::fix)).
    /// None while umem punches holes. Locked only for a copy.
    stamp: Mutex<Option<Stamp>>,
}

/// More bytes are written to a file of small pages, and fewer copied in: a demand page of 4 KiB is
/// copied, and the read-ahead of a bulk lane is written.
const FEW_BYTES: usize = 16 << 10;

/// The least capacity of a pipe (`PIPE_BUF` in limits.h): a page, if a user has many pipes
/// (pipe(7)).
const PIPE_BYTES: usize = libc::PIPE_BUF;

/// Whether a sandbox refused a system call that it does not know.
fn is_forbidden(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS | libc::EACCES))
}

/// Whether a file is shared memory: on tmpfs, as a memfd is, or hugetlbfs.
pub(crate) fn is_memory(file: &File) -> nix::Result<bool> {
    let kind = fstatfs(file)?.filesystem_type();
    Ok(kind == TMPFS_MAGIC || kind == HUGETLBFS_MAGIC)
}

/// Whether the file at `path` lies in a tmpfs that makes huge pages of it: one mounted with
/// huge=always, or with huge=within_size if the file is large enough. Only for advice, so false if
/// it cannot be found out.
pub(crate) fn is_in_huge_tmpfs(path: &Path) -> bool {
    let is_huge = |metadata: std::fs::Metadata| metadata.blksize() >= super::BLOCK_BYTES;
    // Other file systems may have blocks as large without making huge pages.
    let is_tmpfs = |stat: Statfs| stat.filesystem_type() == TMPFS_MAGIC;
    std::fs::metadata(path).is_ok_and(is_huge) && statfs(path).is_ok_and(is_tmpfs)
}

impl RamFile {
    /// Opens a source's RAM file, to be mapped for reading only. It may be any file, for example a
    /// snapshot or a file that QEMU maps; a file that is to be freed has to be memory.
    pub(crate) fn open_source(name: &str, path: &Path, to_free: bool) -> Result<RamFile> {
        RamFile::open_part(name, path, None, to_free)
    }

    /// The same with a part of the file as the region, if one is given: a range of its bytes.
    pub(crate) fn open_part(
        name: &str,
        path: &Path,
        part: Option<Range<u64>>,
        to_free: bool,
    ) -> Result<RamFile> {
        let ram = |what: String| Error::Ram { name: name.into(), path: path.into(), what };
        let file =
            OpenOptions::new().read(true).write(to_free).open(path).map_err(|error| match error
                .kind()
            {
                std::io::ErrorKind::NotFound => {
                    ram("no such file; give the file that backs the guest's RAM".into())
                }
                std::io::ErrorKind::PermissionDenied => {
                    ram("permission denied; run umem as the user that owns the guest's RAM file"
                        .into())
                }
                _ => ram(format!("cannot be opened: {error}")),
            })?;
        RamFile::of_opened(name, path, file, part, to_free)
    }

    /// A source's RAM file that is open already, for reading, and for writing if it is to be freed;
    /// `path` is for messages. Only a part of the file is the region, if one is given.
    pub(crate) fn of_opened(
        name: &str,
        path: &Path,
        file: File,
        part: Option<Range<u64>>,
        to_free: bool,
    ) -> Result<RamFile> {
        let ram = |what: String| Error::Ram { name: name.into(), path: path.into(), what };
        if to_free && !is_memory(&file).map_err(|error| ram(error.to_string()))? {
            return Err(ram(
                "--release-ram would destroy what is in this file, which is on a disk; leave the \
                 option out, or name a file in /dev/shm or on hugetlbfs"
                    .into(),
            ));
        }
        RamFile::of_source_in(name, file, part).map_err(|error| ram(error.to_string()))
    }

    /// A source's RAM file that is open already, for reading at least.
    pub(crate) fn of_source(name: &str, file: File) -> Result<RamFile> {
        RamFile::of_source_in(name, file, None)
    }

    fn of_source_in(name: &str, file: File, part: Option<Range<u64>>) -> Result<RamFile> {
        let kind = file.metadata().context(|| format!("RAM {name}"))?.file_type();
        if !kind.is_file() {
            return Err(Error::Unsupported(
                "is not a regular file; give the file that backs the guest's RAM".into(),
            ));
        }
        RamFile::map(name, file, part, ProtFlags::PROT_READ)
    }

    /// Another region, which is another part of the same open file, as locks belong to the open
    /// file.
    pub(crate) fn another_part(&self, name: &str, part: Range<u64>) -> Result<RamFile> {
        let file = self.file.try_clone().context(|| format!("RAM {name}"))?;
        RamFile::of_source_in(name, file, Some(part))
    }

    /// The same file and mapping once more, to send it again.
    pub(crate) fn again(&self) -> Result<RamFile> {
        Ok(RamFile {
            name: self.name.clone(),
            file: self.file.try_clone().context(|| format!("RAM {}", self.name))?,
            mapping: self.mapping.clone(),
            stamp: Mutex::new(self.stamp()),
            ..*self
        })
    }

    /// The same for a descriptor that its owner continues to use. The file is opened again if
    /// possible, so that its position and its locks are not changed.
    pub(crate) fn of_owner(name: &str, file: File) -> Result<RamFile> {
        let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
        let again = is_file.then(|| File::open(format!("/proc/self/fd/{}", file.as_raw_fd())));
        match again {
            Some(Ok(again)) => RamFile::of_source(name, again),
            _ => Ok(RamFile { is_shared: true, ..RamFile::of_source(name, file)? }),
        }
    }

    /// Takes over the RAM file that a guest handed over, to land pages in it.
    pub(crate) fn from_handoff(name: &str, file: File) -> Result<RamFile> {
        let bytes = file.metadata().context(|| format!("RAM {name}"))?.len();
        RamFile::from_handoff_part(name, file, 0..bytes)
    }

    /// The same with a part of the file as the region: a range of its bytes.
    pub(crate) fn from_handoff_part(name: &str, file: File, part: Range<u64>) -> Result<RamFile> {
        let ram =
            RamFile::map(name, file, Some(part), ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        let ram = RamFile { is_shared: true, ..ram };
        if ram.backing.has_huge_pages() {
            // Only advice: a kernel without huge pages lands small ones. A file that gets huge
            // pages by advice alone keeps small ones, as most of its pages are written to it and
            // not through the mapping.
            // SAFETY: the range is this process's own mapping; the advice changes no content.
            let _ = unsafe {
                madvise(ram.mapping.start.cast(), ram.mapping.len, MmapAdvise::MADV_HUGEPAGE)
            };
        }
        Ok(ram)
    }

    /// Maps a part of it, or all.
    fn map(
        name: &str,
        file: File,
        part: Option<Range<u64>>,
        protection: ProtFlags,
    ) -> Result<RamFile> {
        let what = || format!("RAM {name}");
        guarded::install();
        let metadata = file.metadata().context(what)?;
        let is_memory = is_memory(&file).context(what)?;
        let system = fstatfs(&file).context(what)?.filesystem_type();
        let on_hugetlb = system == HUGETLBFS_MAGIC;
        // They update times when a page is about to be written (page_mkwrite), as memory does.
        let local = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC];
        let keeps_times = is_memory || local.contains(&system);
        let page_bytes = if on_hugetlb { metadata.blksize() } else { super::small_page_bytes() };
        // Bytes behind the end of a file belong to no region.
        let part = part.unwrap_or(0..u64::MAX);
        let (base, bytes) = (part.start, part.end.min(metadata.len()).saturating_sub(part.start));
        if !base.is_multiple_of(page_bytes) {
            return Err(Error::Unsupported(format!(
                "it begins at byte {base} of its file, which is not a multiple of its page size, {page_bytes}"
            )));
        }
        if bytes == 0 || !bytes.is_multiple_of(page_bytes) {
            return Err(Error::Unsupported(format!(
                "its size, {bytes} bytes, is not a positive multiple of its page size, {page_bytes}"
            )));
        }
        let len = usize::try_from(bytes).expect("64-bit Linux");
        let length = NonZeroUsize::new(len).expect("checked above");
        let from = i64::try_from(base).expect("file offsets fit");
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps no other mapping.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &file, from) }
            .context(|| format!("mapping RAM {name}, {bytes} bytes"))?
            .cast::<u8>();
        let page_shift = u8::try_from(page_bytes.trailing_zeros()).expect("at most 64");
        let mapping = Arc::new(Mapping { start, len, process: Pid::this() });
        let backing = match on_hugetlb {
            true => Backing::Hugetlb,
            // A tmpfs reports the size of its huge pages here if it makes them.
            false if metadata.blksize() >= super::BLOCK_BYTES => Backing::Huge,
            false => Backing::Small,
        };
        Ok(RamFile {
            name: name.into(),
            base,
            bytes,
            page_shift,
            backing,
            is_memory,
            keeps_times,
            is_shared: false,
            file,
            mapping,
            stamp: Mutex::default(),
        })
    }

    /// The offset in the file of an offset in the region.
    pub(crate) fn in_file(&self, offset: u64) -> u64 {
        self.base + offset
    }

    /// The region's range in the file.
    pub(crate) fn part(&self) -> Range<u64> {
        self.base..self.base + self.bytes
    }

    /// Device and inode, which identify the file.
    pub(crate) fn identity(&self) -> Result<(u64, u64)> {
        let metadata = self.file.metadata().context(|| format!("RAM {}", self.name))?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// Takes the file for the migration that sends it; no other migration may have it. A file that
    /// is open in other processes is not taken: they would share the lock, and keep it.
    pub(crate) fn claim_for_source(&self, after_a_dead: bool) -> Result<()> {
        if self.is_shared {
            return Ok(());
        }
        claim::take_for_source(&self.name, self.file.as_fd(), after_a_dead)
    }

    /// Takes the file for the guest that has its memory there, and for its migration.
    pub(crate) fn claim_for_guest(&self) -> Result<()> {
        claim::take_for_guest(&self.name, self.file.as_fd())
    }

    /// Ends the move, once the whole guest has arrived: the guest may be moved on.
    pub(crate) fn end_move(&self) {
        claim::end_move(self.file.as_fd());
    }

    /// From here on the file must not change, and [`check`](RamFile::check) fails if it has. Of a
    /// guest's file on a network's or an unknown file system no stamp is kept: writes of the guest
    /// before its stop may reach the file later, and change its times.
    pub(crate) fn fix(&self, is_snapshot: bool) -> Result<()> {
        if is_snapshot || self.keeps_times {
            let stamp = self.stamp_now()?;
            self.stamped().get_or_insert(stamp);
        }
        Ok(())
    }

    /// The stamp of that time, or after umem's last holes.
    pub(crate) fn stamp(&self) -> Option<Stamp> {
        *self.stamped()
    }

    fn stamped(&self) -> MutexGuard<'_, Option<Stamp>> {
        self.stamp.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before umem punches holes. Fails if the file has been changed by another process. Until
    /// [`end_holes`](RamFile::end_holes) only its length is checked.
    pub(crate) fn begin_holes(&self) -> Result<Option<Stamp>> {
        self.check()?;
        Ok(self.stamped().take())
    }

    /// After umem has punched holes of at most `bytes`. If more is gone, this fails, and so does each later
    /// [`check`](RamFile::check).
    pub(crate) fn end_holes(&self, before: Option<Stamp>, bytes: u64) -> Result<()> {
        let Some(before) = before else { return Ok(()) };
        let now = self.stamp_now()?;
        if before.lost_more_than(bytes, &now) {
            *self.stamped() = Some(before);
            return Err(self.failed(
                "has changed while it was served: more of it was freed than the destination has",
            ));
        }
        *self.stamped() = Some(now);
        Ok(())
    }

    /// The current stamp.
    pub(crate) fn stamp_now(&self) -> Result<Stamp> {
        let metadata = self.file.metadata().context(|| format!("RAM {}", self.name))?;
        Ok(Stamp::of(&metadata, self.is_memory))
    }

    /// Fails if the file has become shorter than the region: missing data is no hole then.
    pub(crate) fn check_length(&self) -> Result<()> {
        let metadata = self.file.metadata().context(|| format!("RAM {}", self.name))?;
        self.check_length_of(&metadata)
    }

    /// Fails also if the file differs from its stamp.
    pub(crate) fn check(&self) -> Result<()> {
        let before = self.stamp();
        let metadata = self.file.metadata().context(|| format!("RAM {}", self.name))?;
        self.check_length_of(&metadata)?;
        let Some(before) = before else { return Ok(()) };
        match before.difference(&Stamp::of(&metadata, self.is_memory)) {
            None => Ok(()),
            // umem has begun to punch holes in the meantime.
            Some(_) if self.stamp() != Some(before) => Ok(()),
            Some(what) => Err(self.failed(&format!("has changed while it was served: {what}"))),
        }
    }

    fn check_length_of(&self, metadata: &Metadata) -> Result<()> {
        let (now, bytes) = (metadata.len().saturating_sub(self.base), self.bytes);
        if now >= bytes {
            return Ok(());
        }
        Err(self.failed(&format!(
            "has been truncated while it was served: {now} of its {bytes} bytes are left"
        )))
    }

    /// The error for data that cannot be read.
    pub(crate) fn gone(&self) -> Error {
        let Err(error) = self.check() else {
            return self.failed(
                "cannot be read any more, though it is as long as before: its disk, its file system or this \
                 machine's memory has an error (the kernel's log says which)",
            );
        };
        error
    }

    fn failed(&self, what: &str) -> Error {
        let number = self.file.as_raw_fd();
        let path = std::fs::read_link(format!("/proc/self/fd/{number}"))
            .map_or_else(|_| "its file".to_owned(), |path| path.display().to_string());
        Error::RamFailed { name: self.name.clone(), path, what: what.to_owned() }
    }

    /// `len` bytes from `offset`, for the kernel to read or write.
    pub(crate) fn span(&self, offset: u64, len: u64) -> Span {
        assert!(offset + len <= self.bytes);
        let offset = usize::try_from(offset).expect("64-bit Linux");
        let len = usize::try_from(len).expect("64-bit Linux");
        // SAFETY: inside the mapping (asserted above), which the Arc keeps mapped while the span or
        // an operation with it exists.
        unsafe {
            let start = self.mapping.start.add(offset);
            Span::new(start, len, self.mapping.clone())
        }
    }

    /// True if the page at `offset` reads as zeroes. It must not lie in a hole: reading a hole of a
    /// shared memory file through a mapping would allocate it.
    pub(crate) fn page_is_zero(&self, offset: u64) -> Result<bool> {
        let len = 1u64 << self.page_shift;
        assert!(offset + len <= self.bytes);
        // SAFETY: one page inside this mapping, page aligned.
        let is_zero = unsafe {
            let start = self.mapping.start.add(usize::try_from(offset).expect("64-bit Linux"));
            guarded::is_zero(start, usize::try_from(len).expect("64-bit Linux"))
        };
        is_zero.map_err(|Gone| self.gone())
    }

    /// The start of the first data in a range of the file; `None` if all of it is a hole, or if the
    /// file has become shorter, which [`check_length`](RamFile::check_length) finds out. On
    /// hugetlbfs everything up to the data is read, so keep the range short.
    pub(crate) fn next_data_in(&self, range: Range<u64>) -> Result<Option<u64>> {
        let range = self.in_file(range.start)..self.in_file(range.end);
        match self.backing {
            Backing::Hugetlb => data::next_huge(&self.file, range, self.page_shift),
            Backing::Small | Backing::Huge => data::next(&self.file, range, self.is_shared),
        }
        .map(|found| found.map(|found| found - self.base))
        .map_err(|error| self.failed(&format!("cannot be read: looking for its data: {error}")))
    }

    /// Maps a page that holds data, and with a huge page all that is mapped along with it.
    pub(crate) fn map_in(&self, offset: u64) -> Result<()> {
        let span = self.span(offset, 1);
        // SAFETY: the byte lies inside this mapping.
        unsafe { guarded::touch(span.as_ptr()) }.map_err(|Gone| self.gone())
    }

    /// Which of the kernel's pages of a range are in memory: a byte for each of
    /// [`small_page_bytes`], its lowest bit set if so. Replaces the content of `resident`.
    ///
    /// [`small_page_bytes`]: super::small_page_bytes
    pub(crate) fn resident(&self, offset: u64, len: u64, resident: &mut Vec<u8>) -> Result<()> {
        let span = self.span(offset, len);
        let page_bytes = super::small_page_bytes();
        resident.clear();
        resident.resize(usize::try_from(len.div_ceil(page_bytes)).expect("64-bit Linux"), 0);
        // SAFETY: the span is mapped, and the vector has a byte for each of its pages.
        let result =
            unsafe { libc::mincore(span.as_ptr().cast(), span.len(), resident.as_mut_ptr()) };
        if result == 0 {
            return Ok(());
        }
        if is_forbidden(&std::io::Error::last_os_error()) {
            return self.resident_by_seeking(offset, page_bytes, resident);
        }
        Err(Error::last_os(format!("mincore of RAM {}", self.name)))
    }

    /// The same if a sandbox forbids mincore(2): the data of the file in the range, in memory or
    /// not.
    fn resident_by_seeking(&self, offset: u64, page_bytes: u64, resident: &mut [u8]) -> Result<()> {
        for (number, is_there) in (0..).zip(resident) {
            let page = offset + number * page_bytes;
            *is_there = u8::from(self.next_data_in(page..page + page_bytes)?.is_some());
        }
        Ok(())
    }

    /// Whether all of a range is in memory.
    pub(crate) fn is_resident(&self, offset: u64, len: u64) -> Result<bool> {
        let mut resident = Vec::new();
        self.resident(offset, len, &mut resident)?;
        Ok(resident.iter().all(|page| page & 1 == 1))
    }

    /// A copy of `len` bytes from `offset`; holes read as zeroes and stay holes.
    pub(crate) fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(len).expect("64-bit Linux")];
        self.read_into(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// Fills `bytes` from `offset` on, in the same way.
    pub(crate) fn read_into(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(bytes, self.in_file(offset)).map_err(|error| {
            let unread = || self.failed(&format!("cannot be read: {error}"));
            self.check().err().unwrap_or_else(unread)
        })
    }

    /// Writes bytes into the file. A lack of memory for a page is an error.
    ///
    /// A write to the file makes small pages without zeroing them first. For a huge page the same
    /// call would zero the rest, more slowly than a page fault zeroes the whole; and a write takes
    /// the file's lock, which a bulk thread holds for as long as it writes. A demand page does not
    /// wait for that lock.
    pub(crate) fn write_at(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        if self.backing == Backing::Hugetlb {
            return match self.copy_in(bytes, offset) {
                Err(error) if is_forbidden(&error) => self.copy_in_by_pipe(bytes, offset),
                other => other,
            };
        }
        if self.backing.has_huge_pages() || bytes.len() <= FEW_BYTES {
            match self.copy_in(bytes, offset) {
                // The container forbids it.
                Err(error) if is_forbidden(&error) => {}
                other => return other,
            }
        }
        self.file.write_all_at(bytes, self.in_file(offset))
    }

    /// Through the mapping, the only way on hugetlbfs. A copy by this process would end the process
    /// when no page is left; the kernel's copy returns an error. A forked child has another pid
    /// here, but lands nothing: only the forking thread continues in a child, and a ring does not
    /// belong to the child.
    fn copy_in(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        let base = self.span(offset, bytes.len() as u64).as_ptr() as usize;
        let mut done = 0;
        while done < bytes.len() {
            let from = [IoSlice::new(&bytes[done..])];
            let to = [RemoteIoVec { base: base + done, len: bytes.len() - done }];
            done += process_vm_writev(self.mapping.process, &from, &to)?;
        }
        Ok(())
    }

    /// The same if a sandbox forbids process_vm_writev(2): reading from a pipe is also a copy by
    /// the kernel, which returns an error when no page is left.
    fn copy_in_by_pipe(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        let to = self.span(offset, bytes.len() as u64);
        let (output, input) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let mut done = 0;
        while done < bytes.len() {
            // Less than an empty pipe holds, so the write does not block.
            let put = nix::unistd::write(&input, &bytes[done..bytes.len().min(done + PIPE_BYTES)])?;
            let end = done + put;
            while done < end {
                let place = to.as_ptr().wrapping_add(done).cast();
                // SAFETY: inside the span, which is mapped; the kernel writes there, and no reference exists.
                let got = unsafe { libc::read(output.as_raw_fd(), place, end - done) };
                match usize::try_from(got) {
                    Ok(got) => done += got,
                    Err(_) => return Err(std::io::Error::last_os_error()),
                }
            }
        }
        Ok(())
    }

    /// Allocates the page at `offset`, all zeroes.
    pub(crate) fn allocate_page(&self, offset: u64) -> Result<()> {
        let flags = nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let signed = |n: u64| i64::try_from(n).expect("file offsets fit");
        nix::fcntl::fallocate(
            self.file.as_fd(),
            flags,
            signed(self.in_file(offset)),
            signed(1 << self.page_shift),
        )
        .map_err(|errno| {
            Error::of_memory(format!("allocating a page of RAM {}", self.name), errno.into())
        })
    }

    /// Frees memory: the range reads as zeroes then.
    pub(crate) fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let flags = nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE
            | nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE;
        let signed = |n: u64| i64::try_from(n).expect("file offsets fit");
        nix::fcntl::fallocate(self.file.as_fd(), flags, signed(self.in_file(offset)), signed(len))
            .context(|| format!("discarding pages of RAM {}", self.name))
    }

    /// Frees the memory of the whole region.
    pub(crate) fn free(&self) -> Result<()> {
        self.discard(0, self.bytes)
    }

    /// The file, for a ring, whose operations take offsets [in the file](RamFile::in_file).
    pub(crate) fn shared_file(&self) -> Result<Fd> {
        let file = self.file.try_clone().context(|| format!("RAM {}", self.name))?;
        Ok(Fd::from(OwnedFd::from(file)))
    }

    /// The file, for direct calls, with the same offsets.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Bytes that the file holds in memory or on disk (holes not counted), up to the region's size.
    pub(crate) fn allocated_bytes(&self) -> Result<u64> {
        Ok(self.file_bytes()?.min(self.bytes))
    }

    /// The same for the whole file, of which other regions may have parts.
    pub(crate) fn file_bytes(&self) -> Result<u64> {
        let metadata = self.file.metadata().context(|| format!("RAM {}", self.name))?;
        // st_blocks counts units of 512 bytes whatever the file system (stat(2)).
        Ok(metadata.blocks() * 512)
    }

    /// Bytes that can still be allocated on the file's file system; `None` if there is no limit (a
    /// memfd).
    pub(crate) fn free_bytes(&self) -> Result<Option<u64>> {
        let stat = nix::sys::statvfs::fstatvfs(&self.file)
            .context(|| format!("RAM {}: statvfs", self.name))?;
        Ok((stat.blocks() > 0).then(|| stat.blocks_available() * stat.fragment_size()))
    }
}

#[cfg(test)]
mod tests {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn ram_of(file: &File) -> RamFile {
        RamFile::from_handoff("ram0", file.try_clone().unwrap()).unwrap()
    }

    #[test]
    fn without_process_vm_writev_bytes_are_copied_in_by_a_pipe() {
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(64 << 10).unwrap();
        let ram = ram_of(&file);
        let bytes: Vec<u8> = (0..50_000u32).map(|at| at as u8 | 1).collect();
        ram.copy_in_by_pipe(&bytes, 4096).unwrap();
        assert!(ram.read(4096, 50_000).unwrap() == bytes);
        assert_eq!(ram.read(0, 4096).unwrap(), [0; 4096]);
        // Without a free page it returns an error, and raises no signal.
        file.set_len(8192).unwrap();
        let error = ram.copy_in_by_pipe(&bytes, 4096).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }

    #[test]
    fn without_mincore_holes_are_found_through_the_file() {
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(64 << 10).unwrap();
        let ram = ram_of(&file);
        for page in [1, 2, 7] {
            ram.write_at(&[1], page << 12).unwrap();
        }
        let mut asked = Vec::new();
        ram.resident(4096, 32 << 10, &mut asked).unwrap();
        let mut found = vec![9; asked.len()];
        ram.resident_by_seeking(4096, 4096, &mut found).unwrap();
        assert_eq!(found, asked);
        assert_eq!(found, [1, 1, 0, 0, 0, 0, 1, 0]);
        // As on a kernel with larger pages.
        let mut found = [9; 4];
        ram.resident_by_seeking(0, 16 << 10, &mut found).unwrap();
        assert_eq!(found, [1, 1, 0, 0]);
    }

    #[test]
    fn own_holes_are_no_change_and_foreign_holes_are() {
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.write_all_at(&[0xa5; 64 << 10], 0).unwrap();
        let ram = ram_of(&file);
        ram.fix(false).unwrap();
        let before = ram.begin_holes().unwrap();
        ram.discard(0, 8192).unwrap();
        ram.check().unwrap();
        ram.end_holes(before, 8192).unwrap();
        ram.check().unwrap();
        // Another process punches at the same time.
        let before = ram.begin_holes().unwrap();
        ram.discard(8192, 8192).unwrap();
        assert!(ram.end_holes(before, 4096).unwrap_err().to_string().contains("has changed"));
        assert!(ram.check().is_err());
        let ram = ram_of(&file);
        ram.fix(false).unwrap();
        ram.discard(32 << 10, 4096).unwrap();
        assert!(ram.begin_holes().is_err());
    }

    /// From now on only mappings can write the file, which shows the bytes that take this way.
    #[test]
    fn small_write_does_not_take_the_file_lock() {
        let file = memfd_create(c"ram", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC);
        let file = File::from(file.unwrap());
        file.set_len(1 << 20).unwrap();
        let ram = RamFile::from_handoff("ram0", file.try_clone().unwrap()).unwrap();
        let (page, many) = (vec![0xa5; 4096], vec![0x5a; FEW_BYTES + 1]);
        ram.write_at(&many, 8192).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_FUTURE_WRITE)).unwrap();
        ram.write_at(&page, 4096).unwrap();
        assert!(is_forbidden(&ram.write_at(&many, 8192).unwrap_err()));
        let expected = [vec![0; 4096], page, many, vec![0; 4096]].concat();
        let there = ram.read(0, 65536).unwrap();
        assert!(there[..expected.len()] == expected[..]);
    }
}
