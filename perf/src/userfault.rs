//! userfaultfd(2), as far as a floor needs it. Numbers and layouts are those of
//! `linux/userfaultfd.h`.

#![allow(clippy::disallowed_methods, reason = "it may open all that it polls")]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Context, Result, failure};
use crate::memory::{Mapping, Pages};

/// A userfaultfd with which the whole of one mapping is registered.
pub(crate) struct Userfault(File);

const API: u64 = 0xaa;
const IOC_NEW: libc::c_ulong = 0xaa00;
const MISSING_HUGETLBFS: u64 = 1 << 4;
const MISSING_SHMEM: u64 = 1 << 5;
const MINOR_HUGETLBFS: u64 = 1 << 9;
const MINOR_SHMEM: u64 = 1 << 10;
const MODE_MISSING: u64 = 1;
const MODE_MINOR: u64 = 1 << 2;
const EVENT_PAGEFAULT: u8 = 0x12;
const MESSAGE_BYTES: usize = 32;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Continue {
    start: u64,
    length: u64,
    mode: u64,
    mapped: i64,
}

nix::ioctl_readwrite!(handshake, 0xaa, 0x3f, Api);
nix::ioctl_readwrite!(register, 0xaa, 0x00, Register);
nix::ioctl_readwrite!(copy, 0xaa, 0x03, Copy);
nix::ioctl_readwrite!(proceed, 0xaa, 0x07, Continue);

impl Userfault {
    /// Registers `mapping`, which consists of `pages`: for missing faults in anonymous memory, and
    /// for missing and minor faults in files.
    pub(crate) fn of(mapping: &Mapping, pages: Pages) -> Result<Userfault> {
        let (features, mode) = match pages {
            Pages::Anonymous => (0, MODE_MISSING),
            Pages::AnonymousHuge => (MISSING_HUGETLBFS, MODE_MISSING),
            Pages::Memfd | Pages::HugeTmpfs | Pages::Private => {
                (MISSING_SHMEM | MINOR_SHMEM, MODE_MISSING | MODE_MINOR)
            }
            Pages::Hugetlb => (MISSING_HUGETLBFS | MINOR_HUGETLBFS, MODE_MISSING | MODE_MINOR),
        };
        let uffd = create().context(
            || "making a userfaultfd (needs root, or permission to open /dev/userfaultfd)",
        )?;
        let mut api = Api { api: API, features, ioctls: 0 };
        // SAFETY: the structure is the one that the ioctl takes, alive for the call; here and below.
        unsafe { handshake(uffd.as_raw_fd(), &mut api) }.context(|| "UFFDIO_API")?;
        let start = mapping.at(0).0.expose_provenance() as u64;
        let mut range = Register { start, length: mapping.bytes() as u64, mode, ioctls: 0 };
        // SAFETY: as above; the mapping belongs to this process.
        unsafe { register(uffd.as_raw_fd(), &mut range) }.context(|| "UFFDIO_REGISTER")?;
        Ok(Userfault(uffd.into()))
    }

    /// Its number, for another process.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// UFFDIO_COPY of whole pages to `offset` of the mapping.
    pub(crate) fn copy(&self, mapping: &Mapping, offset: usize, data: &[u8]) -> Result<()> {
        let (to, left) = mapping.at(offset);
        assert!(data.len() <= left);
        let mut range = Copy {
            to: to.expose_provenance() as u64,
            from: data.as_ptr().expose_provenance() as u64,
            length: data.len() as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: reads `data` and writes inside the mapping.
        unsafe { copy(self.0.as_raw_fd(), &mut range) }.context(|| "UFFDIO_COPY")?;
        Ok(())
    }

    /// UFFDIO_CONTINUE of pages that the file has.
    pub(crate) fn proceed(&self, mapping: &Mapping, offset: usize, bytes: usize) -> Result<()> {
        let (start, left) = mapping.at(offset);
        assert!(bytes <= left);
        let start = start.expose_provenance() as u64;
        let mut range = Continue { start, length: bytes as u64, mode: 0, mapped: 0 };
        // SAFETY: changes which pages the mapping shows, inside of it.
        unsafe { proceed(self.0.as_raw_fd(), &mut range) }.context(|| "UFFDIO_CONTINUE")?;
        Ok(())
    }

    /// Waits for a fault: the offset into `mapping`. None when `until` is readable or closed.
    pub(crate) fn fault(&self, mapping: &Mapping, until: BorrowedFd<'_>) -> Result<Option<usize>> {
        loop {
            let mut message = [0; MESSAGE_BYTES];
            let mut waiting = [
                PollFd::new(self.0.as_fd(), PollFlags::POLLIN),
                PollFd::new(until, PollFlags::POLLIN),
            ];
            match poll(&mut waiting, PollTimeout::NONE) {
                Ok(_) => {}
                Err(Errno::EINTR) => {
                    crate::interrupt::check()?;
                    continue;
                }
                Err(errno) => return Err(errno).context(|| "waiting for a fault"),
            }
            if !waiting[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN)) {
                return Ok(None);
            }
            match nix::unistd::read(&self.0, &mut message) {
                Ok(MESSAGE_BYTES) if message[0] == EVENT_PAGEFAULT => {
                    let address: [u8; 8] = message[16..24].try_into().expect("8 bytes");
                    let start = mapping.at(0).0.addr() as u64;
                    return Ok(Some(usize::try_from(u64::from_le_bytes(address) - start)?));
                }
                Ok(_) => return failure("an unexpected event on a userfaultfd"),
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => return Err(errno).context(|| "reading a fault"),
            }
        }
    }
}

/// Through the device if it exists, otherwise by the system call.
fn create() -> std::io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd");
    // SAFETY: neither takes memory: an ioctl whose argument is a number, and a system call with flags.
    let number = device
        .map_or(-1, |device| unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW, flags).into() });
    let number = match number {
        // SAFETY: as above.
        ..0 => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) },
        number => number,
    };
    match i32::try_from(number) {
        // SAFETY: the descriptor is new and has no other owner.
        Ok(number @ 0..) => Ok(unsafe { OwnedFd::from_raw_fd(number) }),
        _ => Err(std::io::Error::last_os_error()),
    }
}
