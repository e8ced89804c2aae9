//! The RAM of the demo's guests: files that leave nothing behind.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::error::{Context, Result};

/// The region of either guest.
pub(super) const RAM_NAME: &str = "ram0";

/// RAM of one guest: an unnamed file, freed with its last user.
pub(super) struct DemoRam {
    file: OwnedFd,
    pub(super) what: &'static str,
}

impl DemoRam {
    /// Bytes that its pages occupy.
    pub(super) fn allocated_bytes(&self) -> Result<u64> {
        let stat = nix::sys::stat::fstat(&self.file).context(|| "the RAM file")?;
        // fstat(2) counts in units of 512 bytes.
        Ok(u64::try_from(stat.st_blocks).expect("not negative") * 512)
    }

    /// The path for the children, as a value of `--ram`.
    pub(super) fn option(&self) -> String {
        format!("{RAM_NAME}=/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }
}

/// A file in a private tmpfs with huge pages, if this process may mount one; else a memfd.
pub(super) fn shared_ram(size_mib: u64) -> Result<DemoRam> {
    match huge_tmpfs_file(size_mib) {
        Some(file) => Ok(DemoRam { file, what: "tmpfs with huge pages" }),
        None => memfd_ram(),
    }
}

pub(super) fn memfd_ram() -> Result<DemoRam> {
    let file = memfd_create(c"umem-demo", MFdFlags::MFD_CLOEXEC).context(|| "making a memfd")?;
    Ok(DemoRam { file, what: "memfd" })
}

/// Makes a tmpfs that is mounted nowhere (fsopen(2)), so that it leaves nothing behind.
pub(crate) fn huge_tmpfs_file(size_mib: u64) -> Option<OwnedFd> {
    const FSOPEN_CLOEXEC: u32 = 1;
    const FSCONFIG_SET_STRING: u32 = 1;
    const FSCONFIG_CMD_CREATE: u32 = 6;
    const FSMOUNT_CLOEXEC: u32 = 1;
    let owned = |fd: libc::c_long| {
        let fd = i32::try_from(fd).ok().filter(|&fd| fd >= 0)?;
        // SAFETY: the kernel has just made this descriptor for this process.
        Some(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    // SAFETY: a constant string and flags.
    let fs = owned(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC) })?;
    let size = std::ffi::CString::new(format!("{}M", size_mib + 2)).ok()?;
    for (key, value) in [(c"huge", c"always"), (c"size", size.as_c_str()), (c"mode", c"0700")] {
        let (fd, set) = (fs.as_raw_fd(), FSCONFIG_SET_STRING);
        // SAFETY: both strings end in zero and outlive the call.
        let result =
            unsafe { libc::syscall(libc::SYS_fsconfig, fd, set, key.as_ptr(), value.as_ptr(), 0) };
        if result != 0 {
            return None;
        }
    }
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: this command takes no strings.
    let created = unsafe {
        libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), FSCONFIG_CMD_CREATE, null, null, 0)
    };
    if created != 0 {
        return None;
    }
    // SAFETY: descriptors and flags only.
    let mount =
        owned(unsafe { libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), FSMOUNT_CLOEXEC, 0) })?;
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC;
    // SAFETY: a constant name, relative to a mount that no other process can reach.
    let file = owned(libc::c_long::from(unsafe {
        libc::openat(mount.as_raw_fd(), c"ram".as_ptr(), flags, 0o600)
    }))?;
    // The open file keeps the mount alive.
    Some(file)
}
