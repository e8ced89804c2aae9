//! A RAM file being mapped: protect the mapping, hand it over, or undo it.

use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::config::{self, RamFile};
use crate::report::{self, Code, Failure};
use crate::uffd::{self, Backing};
use crate::{commands, sys};

/// What has been handed over and is not released yet. The userfaultfds in it are the duplicates
/// that make the guest wait when umem dies: only [`release`] closes them.
static HELD: Mutex<Vec<Held>> = Mutex::new(Vec::new());

struct Held {
    name: String,
    address: usize,
    length: usize,
    /// Its file's pages are huge ones, as far as its file system could.
    is_huge: bool,
    /// QEMU asks several times whether it may populate; umem is told of the first.
    has_refused: bool,
    /// Never read: it is held open.
    _uffd: OwnedFd,
}

/// Maps a RAM file in the caller's stead. Returns what `mmap` returns, with errno set.
///
/// # Safety
///
/// As for `mmap(2)`.
pub(crate) unsafe fn map(
    ram: &RamFile,
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    descriptor: c_int,
    offset: i64,
) -> *mut c_void {
    let Some(config) = config::get() else {
        return sys::map_failed(sys::EINVAL);
    };
    config.hide();
    let fail = |failure: &Failure| {
        report::failure(config.socket, &ram.name, failure);
        sys::map_failed(failure.errno)
    };

    if let Err(failure) = check_before(ram, flags, descriptor) {
        return fail(&failure);
    }
    // SAFETY: the caller's own promises, passed on.
    let mapping = unsafe { sys::mmap(address, length, protection, flags, descriptor, offset) };
    if mapping == sys::MAP_FAILED {
        return mapping;
    }
    if let Err(failure) = protect(config.socket, ram, mapping, length, descriptor, offset) {
        // SAFETY: the mapping was made above and nobody else knows of it yet.
        unsafe { sys::munmap(mapping, length) };
        return fail(&failure);
    }
    mapping
}

/// True if the range reaches into memory that was handed over; umem is told, once.
pub(crate) fn refuse_populate(address: usize, length: usize) -> bool {
    let overlaps = |held: &Held| {
        address < held.address.saturating_add(held.length)
            && held.address < address.saturating_add(length)
    };
    refuse(
        overlaps,
        Code::Prealloc,
        "QEMU preallocates the guest's memory: start it without prealloc=on",
    )
}

/// True if anything was handed over; umem is told, once.
pub(crate) fn refuse_lock() -> bool {
    refuse(|_| true, Code::MemLock, "QEMU locks the guest's memory: start it without mem-lock=on")
}

fn refuse(is_meant: impl Fn(&Held) -> bool, code: Code, text: &str) -> bool {
    let Some(config) = config::get() else {
        return false;
    };
    let mut all = held();
    let Some(held) = all.iter_mut().find(|held| is_meant(held)) else {
        return false;
    };
    if !held.has_refused {
        held.has_refused = true;
        report::failure(config.socket, &held.name, &Failure::new(code, sys::EFAULT, text));
    }
    true
}

/// Everything is unregistered: closes the userfaultfds and says how many there were.
///
/// A page that was served by itself left a small mapping in its block, and the kernel would keep
/// mapping that block by small pages. Where the file has huge pages it is told to map them whole,
/// which moves no byte.
pub(crate) fn release() -> usize {
    let released = std::mem::take(&mut *held());
    for held in released.iter().filter(|held| held.is_huge) {
        map_whole(held.address, held.length);
    }
    released.len()
}

fn held() -> MutexGuard<'static, Vec<Held>> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check_before(ram: &RamFile, flags: c_int, descriptor: c_int) -> Result<(), Failure> {
    if flags & sys::MAP_SHARED == 0 {
        return Err(Failure::new(
            Code::ShareOff,
            sys::EINVAL,
            "the memory backend maps its file privately: give it share=on",
        ));
    }
    if held().iter().any(|held| held.name == ram.name) {
        return Err(Failure::new(
            Code::RamTwice,
            sys::EBUSY,
            "the RAM file is mapped a second time: give each memory backend a mem-path of its own",
        ));
    }
    let blocks = blocks_of(descriptor)?;
    if blocks > 0 {
        return Err(Failure::new(
            Code::RamInUse,
            sys::EBUSY,
            "the RAM file has contents already: remove it, or name another mem-path",
        ));
    }
    Ok(())
}

fn protect(
    socket: i32,
    ram: &RamFile,
    mapping: *mut c_void,
    length: usize,
    descriptor: c_int,
    offset: i64,
) -> Result<(), Failure> {
    // Pages that came with the mapping itself (locked from before, MAP_POPULATE) hold zeroes, and no
    // fault will ever ask for them.
    if blocks_of(descriptor)? > 0 {
        return Err(Failure::new(
            Code::RamPopulated,
            sys::EBUSY,
            "the guest's memory was locked or populated as it was mapped: start QEMU without \
             mem-lock=on",
        ));
    }
    let backing = Backing::of(descriptor);
    let (uffd, features) = uffd::open(backing)?;
    let length = length.next_multiple_of(backing.page_size.max(1));
    uffd::register(&uffd, mapping as usize, length)?;

    let message = report::handover_line(&report::Handover {
        ram,
        address: mapping as usize,
        length,
        offset,
        page_size: backing.page_size,
        features,
    });
    // Held before it is sent: from the moment umem has it, ours must be the spare.
    let uffd_number = uffd.as_raw_fd();
    held().push(Held {
        name: ram.name.clone(),
        address: mapping as usize,
        length,
        is_huge: block_size_of(descriptor) >= HUGE_PAGE_SIZE as u64,
        has_refused: false,
        _uffd: uffd,
    });
    let sent = report::send(socket, message.as_bytes(), &[uffd_number, descriptor])
        .and_then(|()| commands::start(socket));
    if let Err(errno) = sent {
        held().retain(|held| held.address != mapping as usize);
        return Err(Failure::new(Code::Send, errno, "the RAM could not be handed to umem"));
    }
    Ok(())
}

/// Block by block, as the kernel stops at the first one that it cannot map whole; one that is in use at
/// the moment is tried again, and then left to the kernel's own daemon.
fn map_whole(address: usize, length: usize) {
    let first = address.next_multiple_of(HUGE_PAGE_SIZE);
    let end = address.saturating_add(length);
    for block in (first..end).step_by(HUGE_PAGE_SIZE) {
        for _ in 0..COLLAPSE_ATTEMPTS_MAX {
            let block = std::ptr::with_exposed_provenance_mut(block);
            // SAFETY: how the block is mapped changes, and no content. The monitor may have unmapped
            // it meanwhile; then there is nothing to do, and the kernel says so.
            if unsafe { sys::madvise(block, HUGE_PAGE_SIZE, sys::MADV_COLLAPSE) } == 0 {
                break;
            }
        }
    }
}

/// A page that somebody holds at the moment makes the kernel give up on its block (EAGAIN).
const COLLAPSE_ATTEMPTS_MAX: usize = 3;

/// What a tmpfs that makes huge pages gives as its files' `st_blksize`.
const HUGE_PAGE_SIZE: usize = 2 << 20;

fn block_size_of(descriptor: c_int) -> u64 {
    metadata(descriptor).map_or(0, |metadata| metadata.blksize())
}

fn metadata(descriptor: c_int) -> std::io::Result<std::fs::Metadata> {
    // SAFETY: the descriptor is the caller's and stays so: ManuallyDrop never closes it.
    ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(descriptor) }).metadata()
}

fn blocks_of(descriptor: c_int) -> Result<u64, Failure> {
    match metadata(descriptor) {
        Ok(metadata) => Ok(metadata.blocks()),
        Err(error) => Err(Failure::new(
            Code::RamInUse,
            error.raw_os_error().unwrap_or(sys::EINVAL),
            "the RAM file cannot be examined",
        )),
    }
}
