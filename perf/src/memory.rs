//! Memory files of each page kind, and mappings of them.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use serde::Serialize;

use crate::error::{Context, Result, failure};

/// Bytes of a base page.
pub(crate) const PAGE_BYTES: usize = 4096;

/// What a memory file consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Pages {
    /// A memfd of 4 KiB pages.
    Memfd,
    /// A file in a tmpfs mounted with `huge=always`.
    HugeTmpfs,
}

impl Pages {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Pages::Memfd => "memfd, 4 KiB pages",
            Pages::HugeTmpfs => "tmpfs huge=always",
        }
    }

    /// A new, empty file of `bytes`, without a name: it goes when its last user does.
    pub(crate) fn file(self, bytes: usize) -> Result<File> {
        let file = match self {
            Pages::Memfd => File::from(
                memfd_create(c"umem-perf", MFdFlags::MFD_CLOEXEC).context(|| "making a memfd")?,
            ),
            Pages::HugeTmpfs => huge_tmpfs_file(bytes)
                .context(|| "making a tmpfs with huge pages (it takes CAP_SYS_ADMIN)")?,
        };
        file.set_len(bytes as u64).context(|| "sizing a memory file")?;
        Ok(file)
    }
}

/// A file in a tmpfs of its own that is mounted nowhere (fsopen(2)); the open file keeps it alive.
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
    // SAFETY: a constant name, relative to a mount that nobody else can reach.
    let file = unsafe { libc::openat(mount.as_raw_fd(), c"ram".as_ptr(), flags, 0o600) };
    owned(libc::c_long::from(file)).map(File::from)
}

fn pointer(text: Option<&CStr>) -> *const libc::c_char {
    text.map_or(std::ptr::null(), CStr::as_ptr)
}

/// The descriptor that a system call has just returned.
fn owned(result: libc::c_long) -> std::io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: the kernel has just made it for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// A shared mapping of a whole memory file. Only pointers leave it: other threads, and the kernel
/// on behalf of other sockets, write there.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory without an owner; what is read and written through the pointers is up to
// their users, who only hand them to the kernel or access them after the writer has ended.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn of(file: &File, bytes: usize) -> Result<Mapping> {
        let Some(length) = NonZeroUsize::new(bytes) else {
            return failure("a mapping of nothing");
        };
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, file, 0) }
            .context(|| "mapping a memory file")?;
        Ok(Mapping { start: start.cast(), bytes })
    }

    /// The address of byte `offset`, and how many bytes lie from there to the end.
    pub(crate) fn at(&self, offset: usize) -> (*mut u8, usize) {
        assert!(offset <= self.bytes);
        // SAFETY: inside the mapping or at its end, as just asserted.
        (unsafe { self.start.as_ptr().add(offset) }, self.bytes - offset)
    }

    /// Writes its own number into each page's first word, and something else into all others.
    pub(crate) fn fill(&self) {
        for page in 0..self.bytes / PAGE_BYTES {
            let (start, _) = self.at(page * PAGE_BYTES);
            // SAFETY: the page is ours alone while it is filled, and aligned.
            unsafe {
                start.write_bytes(0xa5, PAGE_BYTES);
                start.cast::<u64>().write(page as u64);
            }
        }
    }

    /// The first page that does not hold what [`Mapping::fill`] wrote, judged by its ends.
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

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping; pointers into it do not outlive it.
        let _ = unsafe { munmap(self.start.cast(), self.bytes) };
    }
}
