//! Files that a QEMU makes: their owner, and the files that umem has to remove if no guest arrives.

use std::ffi::{CStr, OsStr, c_char, c_int};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::{config, report, state, sys};

/// `open(2)`. `mode` is ignored if the flags make no file.
///
/// # Safety
///
/// As for `open(2)`.
pub(crate) unsafe fn open(path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    // SAFETY: the caller's path is a string.
    let is_ours = flags & sys::O_NEW == sys::O_NEW
        && config::is_qemu()
        && !state::is_settled()
        && !path.is_null()
        && unsafe { is_in_memory(CStr::from_ptr(path)) };
    let mode = if is_ours { mode & 0o700 } else { mode };
    // SAFETY: the caller's own promises, passed on.
    let descriptor = unsafe { sys::open(path, flags, mode) };
    if is_ours && let Some(identity) = identity(descriptor) {
        let named = std::fs::read_link(format!("/proc/self/fd/{descriptor}"));
        if let (Some(config), Ok(path)) = (config::get(), named) {
            report::made(config.socket, &path, identity);
        }
    }
    descriptor
}

/// Whether the path's directory is on tmpfs or hugetlbfs.
fn is_in_memory(path: &CStr) -> bool {
    let path = Path::new(OsStr::from_bytes(path.to_bytes()));
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    std::fs::File::open(directory.unwrap_or(Path::new(".")))
        .is_ok_and(|directory| sys::is_memory(directory.as_raw_fd()))
}

fn identity(descriptor: c_int) -> Option<(u64, u64)> {
    if descriptor < 0 {
        return None;
    }
    // SAFETY: the descriptor is the caller's and stays so: ManuallyDrop never closes it.
    let file = ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(descriptor) });
    file.metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()))
}
