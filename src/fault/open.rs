//! Opening a userfaultfd for this process's own memory, and registering memory with it.

use std::fs::OpenOptions;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::memory::kind::Kind;

/// The file whose permissions allow userfaultfd (since Linux 6.1).
pub(crate) const DEVICE: &str = "/dev/userfaultfd";

/// The faults that it catches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Faults {
    /// Also the kernel's: KVM and system calls access a guest's memory.
    All,
    /// Only those of user mode, which need no privilege, and do not suffice for a guest.
    UserMode,
}

/// The permission that allowed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// The permissions of [`DEVICE`].
    Device,
    /// A sysctl or a capability, by the system call.
    SystemCall,
}

/// Opens a nonblocking userfaultfd.
///
/// # Errors
/// The errno of the system call: EPERM without permission, ENOSYS on a kernel without userfaultfd.
pub(crate) fn open(faults: Faults) -> io::Result<(OwnedFd, Way)> {
    const IOC_NEW: libc::c_ulong = 0xaa00;
    const USER_MODE_ONLY: libc::c_int = 1;
    let mut flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    if faults == Faults::UserMode {
        flags |= USER_MODE_ONLY;
    }
    if let Ok(device) = OpenOptions::new().read(true).write(true).open(DEVICE) {
        // SAFETY: an ioctl whose argument is a number.
        let number = unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW, flags) };
        if number >= 0 {
            // SAFETY: the descriptor is new and has no other owner.
            return Ok((unsafe { OwnedFd::from_raw_fd(number) }, Way::Device));
        }
    }
    // SAFETY: a system call whose argument is a number.
    let number = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    match i32::try_from(number) {
        // SAFETY: as above.
        Ok(number @ 0..) => Ok((unsafe { OwnedFd::from_raw_fd(number) }, Way::SystemCall)),
        _ => Err(io::Error::last_os_error()),
    }
}

pub(crate) const EVENT_REMOVE: u64 = 1 << 3;
pub(crate) const MISSING_HUGETLBFS: u64 = 1 << 4;
pub(crate) const MISSING_SHMEM: u64 = 1 << 5;
pub(crate) const THREAD_ID: u64 = 1 << 8;
pub(crate) const MINOR_HUGETLBFS: u64 = 1 << 9;
pub(crate) const MINOR_SHMEM: u64 = 1 << 10;

/// Agrees on the features with the kernel; returns all features of the kernel. Once for each
/// userfaultfd.
///
/// # Errors
/// EINVAL for a feature that the kernel does not have.
pub(crate) fn handshake(uffd: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut api = Api { api: API, features, ioctls: 0 };
    // SAFETY: the structure is the one that the ioctl takes, alive for the call.
    unsafe { ioctl_api(uffd.as_raw_fd(), &mut api) }?;
    Ok(api.features)
}

const API: u64 = 0xaa;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

nix::ioctl_readwrite!(ioctl_api, 0xaa, 0x3f, Api);

/// Registers addresses of this process: for missing faults, and for minor ones if pages land in a
/// file.
///
/// # Errors
/// EINVAL for memory that userfaultfd does not support, EBUSY for memory of another userfaultfd.
pub(crate) fn register(uffd: &OwnedFd, addresses: &Range<u64>, kind: Kind) -> io::Result<()> {
    let minor = if kind.lands_in_file() { MODE_MINOR } else { 0 };
    let len = addresses.end - addresses.start;
    let mut register =
        Register { start: addresses.start, len, mode: MODE_MISSING | minor, ioctls: 0 };
    // SAFETY: the structure is the one that the ioctl takes, alive for the call; the kernel checks the range.
    unsafe { ioctl_register(uffd.as_raw_fd(), &mut register) }?;
    Ok(())
}

const MODE_MISSING: u64 = 1 << 0;
const MODE_MINOR: u64 = 1 << 2;

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

nix::ioctl_readwrite!(ioctl_register, 0xaa, 0x00, Register);
