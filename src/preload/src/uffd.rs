//! Opening a userfaultfd that also catches the kernel's faults, and registering a mapping with it.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::config::Kind;
use crate::report::{Code, Failure};
use crate::sys;

const EVENT_REMOVE: u64 = 1 << 3;
const MISSING_HUGETLBFS: u64 = 1 << 4;
const MISSING_SHMEM: u64 = 1 << 5;
const THREAD_ID: u64 = 1 << 8;
const MINOR_HUGETLBFS: u64 = 1 << 9;
const MINOR_SHMEM: u64 = 1 << 10;

/// The names in linux/userfaultfd.h, for the error that names the missing features.
const FEATURE_NAMES: [(u64, &str); 6] = [
    (EVENT_REMOVE, "EVENT_REMOVE"),
    (MISSING_HUGETLBFS, "MISSING_HUGETLBFS"),
    (MISSING_SHMEM, "MISSING_SHMEM"),
    (THREAD_ID, "THREAD_ID"),
    (MINOR_HUGETLBFS, "MINOR_HUGETLBFS (Linux 5.13)"),
    (MINOR_SHMEM, "MINOR_SHMEM (Linux 5.14)"),
];

const REGISTER_MODE_MISSING: u64 = 1 << 0;
const REGISTER_MODE_MINOR: u64 = 1 << 2;
const IOCTL_WAKE: u64 = 1 << 2;
const IOCTL_COPY: u64 = 1 << 3;
const IOCTL_ZEROPAGE: u64 = 1 << 4;
const IOCTL_CONTINUE: u64 = 1 << 7;

const UFFD_API: u64 = 0xaa;
const USERFAULTFD_IOC_NEW: u64 = 0xaa00;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    length: u64,
}

const _: () = assert!(size_of::<UffdioApi>() == 24 && size_of::<UffdioRegister>() == 32);
const _: () = assert!(size_of::<UffdioRange>() == 16);

/// The backing of the memory's pages.
#[derive(Clone, Copy)]
pub(crate) struct Backing {
    pub(crate) page_size: usize,
    source: Source,
}

#[derive(Clone, Copy)]
enum Source {
    Tmpfs,
    Hugetlbfs,
    Anonymous,
}

impl Backing {
    /// Of a RAM file.
    pub(crate) fn of(descriptor: i32) -> Self {
        match sys::hugetlbfs_page_size(descriptor) {
            Some(page_size) => Backing { page_size, source: Source::Hugetlbfs },
            None => Backing { page_size: sys::page_size(), source: Source::Tmpfs },
        }
    }

    /// Of memory without a file.
    pub(crate) fn anonymous() -> Self {
        Backing { page_size: sys::page_size(), source: Source::Anonymous }
    }

    fn features(self) -> u64 {
        let kind = match self.source {
            Source::Hugetlbfs => MISSING_HUGETLBFS | MINOR_HUGETLBFS,
            Source::Tmpfs => MISSING_SHMEM | MINOR_SHMEM,
            Source::Anonymous => 0,
        };
        kind | EVENT_REMOVE | THREAD_ID
    }
}

/// A userfaultfd with the features that this backing needs, and those features.
pub(crate) fn open(backing: Backing) -> Result<(OwnedFd, u64), Failure> {
    let wanted = backing.features();
    // Requesting a missing feature makes the descriptor unusable, so a separate one queries the features.
    let offered = handshake(&create()?, 0)?;
    if wanted & !offered != 0 {
        return Err(Failure::new(
            Code::Features,
            sys::EINVAL,
            &missing_features(wanted & !offered),
        ));
    }
    let uffd = create()?;
    handshake(&uffd, wanted)?;
    Ok((uffd, wanted))
}

/// Registers the range: from here on a touch of a page that is not marked cached waits.
pub(crate) fn register(
    uffd: &OwnedFd,
    kind: Kind,
    start: usize,
    length: usize,
) -> Result<(), Failure> {
    let has_file = kind != Kind::Anonymous;
    let minor = if has_file { REGISTER_MODE_MINOR } else { 0 };
    let mut register = UffdioRegister {
        start: start as u64,
        length: length as u64,
        mode: REGISTER_MODE_MISSING | minor,
        ioctls: 0,
    };
    // SAFETY: the argument is the structure that UFFDIO_REGISTER takes, alive for the call.
    let result = unsafe { sys::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
    if let Err(errno) = result {
        return Err(Failure::new(
            Code::Register,
            errno,
            match has_file {
                true => {
                    "the guest's memory cannot be registered with userfaultfd: its file must be on tmpfs \
                     or hugetlbfs"
                }
                false => "the guest's memory cannot be registered with userfaultfd",
            },
        ));
    }
    let needed = IOCTL_WAKE | if has_file { IOCTL_CONTINUE } else { IOCTL_COPY | IOCTL_ZEROPAGE };
    if register.ioctls & needed != needed {
        return Err(Failure::new(
            Code::Features,
            sys::EINVAL,
            match has_file {
                true => "this kernel cannot continue minor faults on the guest's memory",
                false => "this kernel cannot copy pages into the guest's memory",
            },
        ));
    }
    // Discarded pages must become zeroes without the file, which is emptied at the end.
    if kind == Kind::Private && register.ioctls & IOCTL_ZEROPAGE == 0 {
        return Err(Failure::new(
            Code::Register,
            sys::EINVAL,
            "the guest's memory has no page of zeroes: with --kind private its file must be on \
             tmpfs, not on hugetlbfs",
        ));
    }
    Ok(())
}

/// Unregisters a range. Fails with an errno.
pub(crate) fn unregister(uffd: &OwnedFd, start: usize, length: usize) -> Result<(), i32> {
    let mut range = UffdioRange { start: start as u64, length: length as u64 };
    // SAFETY: the argument is the structure that UFFDIO_UNREGISTER takes, alive for the call.
    unsafe { sys::ioctl(uffd.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut range) }
}

/// Opens the device first: its file permissions are the modern way to allow userfaultfd. Never for user mode
/// only: the kernel causes the faults of KVM and of system calls.
fn create() -> Result<OwnedFd, Failure> {
    let number = sys::open_device(c"/dev/userfaultfd")
        .and_then(|device| sys::ioctl_value(device.as_raw_fd(), USERFAULTFD_IOC_NEW, sys::O_UFFD))
        .or_else(|_| sys::userfaultfd(sys::O_UFFD));
    match number {
        // SAFETY: the kernel has just made this descriptor, which has no other owner.
        Ok(number) => Ok(unsafe { OwnedFd::from_raw_fd(number) }),
        Err(errno @ (sys::EPERM | sys::EACCES)) => Err(Failure::new(
            Code::Permission,
            errno,
            "no permission for userfaultfd: let QEMU's user read and write /dev/userfaultfd, or set \
             vm.unprivileged_userfaultfd=1, or run QEMU with CAP_SYS_PTRACE",
        )),
        Err(errno) => Err(Failure::new(
            Code::Unavailable,
            errno,
            "this kernel gives no userfaultfd (CONFIG_USERFAULTFD)",
        )),
    }
}

/// UFFDIO_API; returns the kernel's features.
fn handshake(uffd: &OwnedFd, features: u64) -> Result<u64, Failure> {
    let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the argument is the structure that UFFDIO_API takes, alive for the call.
    match unsafe { sys::ioctl(uffd.as_raw_fd(), UFFDIO_API, &raw mut api) } {
        Ok(()) => Ok(api.features),
        Err(errno) => Err(Failure::new(
            Code::Features,
            errno,
            "this kernel refuses the userfaultfd features that umem needs",
        )),
    }
}

fn missing_features(missing: u64) -> String {
    let names: Vec<&str> =
        FEATURE_NAMES.iter().filter(|(bit, _)| missing & bit != 0).map(|(_, name)| *name).collect();
    format!("this kernel's userfaultfd lacks {}", names.join(", "))
}
