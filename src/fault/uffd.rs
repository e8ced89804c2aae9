//! A guest's userfaultfd: its events and the ioctls that answer them.
//!
//! io_uring has no command for these ioctls, so they are plain system calls; reading the events
//! goes through the ring. Layouts and numbers are those of `linux/userfaultfd.h`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use umem_ring::Span;

use super::open::{self, Faults};
use crate::memory::kind::Kind;
use crate::memory::small_page_bytes;

/// Bytes of one event as read from the descriptor.
pub(crate) const MESSAGE_BYTES: usize = 32;

/// The size of the pieces in which a range is unregistered if it cannot be unregistered as a whole.
const STEP_BYTES: u64 = 2 << 20;

/// An event that the kernel reports on a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A thread of the guest waits at this address (guest side's address space). `thread` is its
    /// number, or 0 if the userfaultfd was not set up to report it.
    PageFault { address: u64, thread: u32 },
    /// The guest side discarded a range (balloon, MADV_DONTNEED, MADV_REMOVE).
    Remove { start: u64, end: u64 },
    /// The guest side unmapped a range: pages that were to come there are of no use any more.
    Unmap { start: u64, end: u64 },
    /// The guest side forked: the child has memory that is never filled.
    Fork,
    /// The guest side moved a mapping: pages would be placed at addresses that the guest no longer
    /// uses.
    Remap,
    /// An unknown event.
    Other { kind: u8 },
}

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;

impl Event {
    /// Reads one `struct uffd_msg`.
    pub(crate) fn decode(bytes: &[u8; MESSAGE_BYTES]) -> Event {
        let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        match bytes[0] {
            EVENT_PAGEFAULT => {
                let thread = bytes[24..28].try_into().expect("4 bytes");
                Event::PageFault { address: word(16), thread: u32::from_ne_bytes(thread) }
            }
            EVENT_REMOVE => Event::Remove { start: word(8), end: word(16) },
            EVENT_UNMAP => Event::Unmap { start: word(8), end: word(16) },
            EVENT_FORK => Event::Fork,
            EVENT_REMAP => Event::Remap,
            kind => Event::Other { kind },
        }
    }
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RangeOperation {
    range: Range,
    mode: u64,
    /// Bytes done, or a negative errno.
    done: i64,
}

#[repr(C)]
struct CopyOperation {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    /// Bytes done, or a negative errno.
    done: i64,
}

nix::ioctl_read!(ioctl_unregister, 0xaa, 0x01, Range);
nix::ioctl_read!(ioctl_wake, 0xaa, 0x02, Range);
nix::ioctl_readwrite!(ioctl_copy, 0xaa, 0x03, CopyOperation);
nix::ioctl_readwrite!(ioctl_zeropage, 0xaa, 0x04, RangeOperation);
nix::ioctl_readwrite!(ioctl_continue, 0xaa, 0x07, RangeOperation);

/// The result of an attempt to place pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    /// Bytes that the guest sees now, from the start of the range; their waiters have been woken.
    pub(crate) bytes: u64,
    /// The reason why the attempt stopped; none at the end of the range.
    pub(crate) stop: Option<Stop>,
}

/// The reason why pages could not be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The guest sees the next page already; its waiters need a wake.
    Already,
    /// The file has no page there yet.
    NotPresent,
    /// Pending events must be read first; then try again.
    Again,
    /// The guest's process is gone, or the range is not registered (any more), or spans several
    /// mappings.
    Gone,
}

/// A userfaultfd that belongs to the guest's address space. Addresses are the guest side's.
#[derive(Clone)]
pub(crate) struct Uffd(Arc<Open>);

/// Other processes may have the same one open: a program that embeds umem or has handed its memory
/// over.
struct Open {
    descriptor: Arc<OwnedFd>,
    /// Whether it blocked when umem got it; umem restores that at the end.
    waited: AtomicBool,
    /// The kernel has reported that the address space is gone. Then nothing can be placed, and
    /// nothing is missed. Code that counts pages as present checks this before it reports them.
    is_gone: AtomicBool,
    /// The address space was found gone when a page was to be placed: the guest has ended without
    /// the page.
    has_missed: AtomicBool,
}

impl Drop for Open {
    fn drop(&mut self) {
        if self.waited.load(SeqCst) {
            let _ = self.change_flags(|flags| flags - OFlag::O_NONBLOCK);
        }
    }
}

impl Open {
    /// Changes the flags. True if that had an effect.
    fn change_flags(&self, change: impl FnOnce(OFlag) -> OFlag) -> nix::Result<bool> {
        let before = OFlag::from_bits_retain(fcntl(&*self.descriptor, FcntlArg::F_GETFL)?);
        let after = change(before);
        if after == before {
            return Ok(false);
        }
        fcntl(&*self.descriptor, FcntlArg::F_SETFL(after))?;
        Ok(true)
    }
}

impl Uffd {
    pub(crate) fn new(descriptor: OwnedFd) -> Uffd {
        let descriptor = Arc::new(descriptor);
        let [waited, is_gone, has_missed] = [(); 3].map(|()| AtomicBool::new(false));
        Uffd(Arc::new(Open { descriptor, waited, is_gone, has_missed }))
    }

    /// A userfaultfd for memory of this process. It catches only faults of user mode, which need no
    /// privilege: enough if no guest and no system call ever accesses a missing page.
    pub(crate) fn for_this_process() -> io::Result<Uffd> {
        let (uffd, _) = open::open(Faults::UserMode)?;
        let features = open::MISSING_SHMEM | open::MINOR_SHMEM | open::MISSING_HUGETLBFS;
        open::handshake(&uffd, features)?;
        Ok(Uffd::new(uffd))
    }

    /// Registers a mapping of this process, of this kind of memory.
    pub(crate) fn register(&self, start: u64, len: u64, kind: Kind) -> io::Result<()> {
        open::register(&self.0.descriptor, &(start..start + len), kind)
    }

    pub(crate) fn descriptor(&self) -> Arc<OwnedFd> {
        self.0.descriptor.clone()
    }

    /// Maps the page-cache pages of a file at `start..start + len` into the guest.
    pub(crate) fn map(&self, start: u64, len: u64) -> io::Result<Placed> {
        let (result, done) = self.try_map(start, len);
        self.placed(result, done, len)
    }

    fn try_map(&self, start: u64, len: u64) -> (nix::Result<i32>, i64) {
        let mut operation = RangeOperation { range: Range { start, len }, mode: 0, done: 0 };
        // SAFETY: the struct is the ioctl's own and outlives the call; the kernel checks the range.
        let result = unsafe { ioctl_continue(self.0.descriptor.as_raw_fd(), &mut operation) };
        (result, operation.done)
    }

    /// Places zeroes at `start..start + len`; for private memory without allocating pages.
    pub(crate) fn zero(&self, start: u64, len: u64) -> io::Result<Placed> {
        let mut operation = RangeOperation { range: Range { start, len }, mode: 0, done: 0 };
        // SAFETY: as in map.
        let result = unsafe { ioctl_zeropage(self.0.descriptor.as_raw_fd(), &mut operation) };
        self.placed(result, operation.done, len)
    }

    /// Copies bytes of umem to fresh private pages of the guest at `start`; both are whole pages.
    pub(crate) fn copy(&self, start: u64, bytes: &[u8]) -> io::Result<Placed> {
        let len = bytes.len() as u64;
        let from = bytes.as_ptr().expose_provenance() as u64;
        let mut operation = CopyOperation { to: start, from, len, mode: 0, done: 0 };
        // SAFETY: the kernel reads bytes that are borrowed for the call, and checks the range.
        let result = unsafe { ioctl_copy(self.0.descriptor.as_raw_fd(), &mut operation) };
        self.placed(result, operation.done, len)
    }

    /// Reads pending events, as many as fit; 0 bytes when there are none. Needs O_NONBLOCK.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match nix::unistd::read(&*self.0.descriptor, buffer) {
            Ok(count) => Ok(count),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => Ok(0),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The same, into memory that other processes may see.
    pub(crate) fn read_into(&self, span: &Span) -> io::Result<usize> {
        // SAFETY: the span is mapped with this length, and no reference to it exists.
        let count =
            unsafe { libc::read(self.0.descriptor.as_raw_fd(), span.as_ptr().cast(), span.len()) };
        match usize::try_from(count) {
            Ok(count) => Ok(count),
            Err(_) => match io::Error::last_os_error() {
                error
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) =>
                {
                    Ok(0)
                }
                error => Err(error),
            },
        }
    }

    /// Makes reads and polls fail instead of blocking from now on, until umem drops its last
    /// reference: its former owner may not have set that, and a blocking userfaultfd cannot be
    /// polled.
    pub(crate) fn set_nonblocking(&self) -> io::Result<()> {
        if self.0.change_flags(|flags| flags | OFlag::O_NONBLOCK)? {
            self.0.waited.store(true, SeqCst);
        }
        Ok(())
    }

    /// Wakes every thread that waits in the range; those whose page is missing fault again.
    pub(crate) fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = Range { start, len };
        // SAFETY: as in mark_cached.
        unsafe { ioctl_wake(self.0.descriptor.as_raw_fd(), &mut range) }?;
        Ok(())
    }

    /// Unregisters the range for good and wakes its waiters. Without effect on parts that are
    /// unregistered or unmapped already. Returns how many bytes were found unmapped, in pieces of 2
    /// MiB.
    pub(crate) fn unregister(&self, start: u64, len: u64) -> io::Result<u64> {
        let mut range = Range { start, len };
        // SAFETY: as in mark_cached.
        match unsafe { ioctl_unregister(self.0.descriptor.as_raw_fd(), &mut range) } {
            Ok(_) => Ok(0),
            Err(nix::Error::ESRCH) => {
                self.0.is_gone.store(true, SeqCst);
                Ok(0)
            }
            // The guest's process is gone with its mappings, or the kernel has no memory to split a
            // mapping.
            Err(nix::Error::ENOMEM) => {
                // This call finds out which of the two, without other effects.
                match self.try_map(start, small_page_bytes()).0 {
                    Err(nix::Error::ESRCH) => {
                        self.0.is_gone.store(true, SeqCst);
                        Ok(0)
                    }
                    _ => Err(nix::Error::ENOMEM.into()),
                }
            }
            // The range is unmapped, or a part of it is memory that userfaultfd does not support.
            Err(nix::Error::EINVAL) => {
                let half = (len / 2).next_multiple_of(STEP_BYTES);
                if half >= len {
                    return Ok(len);
                }
                Ok(self.unregister(start, half)? + self.unregister(start + half, len - half)?)
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// Whether any call so far has found the guest's address space gone.
    pub(crate) fn is_gone(&self) -> bool {
        self.0.is_gone.load(SeqCst)
    }

    /// Whether a page could not be placed because the address space was gone.
    pub(crate) fn has_missed(&self) -> bool {
        self.0.has_missed.load(SeqCst)
    }

    fn placed(&self, result: nix::Result<i32>, done: i64, len: u64) -> io::Result<Placed> {
        let stop = match result {
            Ok(_) => return Ok(Placed { bytes: len, stop: None }),
            // A part is done; the cause shows at the next attempt.
            Err(nix::Error::EAGAIN) if done > 0 => {
                return Ok(Placed { bytes: done.unsigned_abs(), stop: None });
            }
            // The address space is being changed; the change's event is waiting to be read.
            Err(nix::Error::EAGAIN) => Stop::Again,
            // Another thread placed it, for example when two threads finish at the same time.
            Err(nix::Error::EEXIST) => Stop::Already,
            Err(nix::Error::EFAULT) => Stop::NotPresent,
            // No registered mapping at the address: its block has been unregistered already, or it
            // is unmapped. Or the range continues in another mapping (validate_dst_vma in
            // mm/userfaultfd.c).
            Err(nix::Error::ENOENT) => Stop::Gone,
            // No address space.
            Err(nix::Error::ESRCH) => {
                self.0.has_missed.store(true, SeqCst);
                self.0.is_gone.store(true, SeqCst);
                Stop::Gone
            }
            Err(errno) => return Err(errno.into()),
        };
        Ok(Placed { bytes: 0, stop: Some(stop) })
    }
}

/// Userfaultfd-related state of the mappings of a process, from `/proc/PID/smaps`: true when any
/// mapping is still registered for missing (`um`) or minor (`ui`) faults.
pub(crate) fn process_is_registered(pid: u32) -> io::Result<bool> {
    use io::BufRead;
    let smaps = io::BufReader::new(File::open(format!("/proc/{pid}/smaps"))?);
    for line in smaps.lines() {
        if let Some(flags) = line?.strip_prefix("VmFlags:")
            && flags.split_whitespace().any(|flag| flag == "um" || flag == "ui")
        {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_parsed_in_the_kernels_layout() {
        let mut bytes = [0u8; MESSAGE_BYTES];
        bytes[0] = EVENT_PAGEFAULT;
        bytes[8..16].copy_from_slice(&1u64.to_ne_bytes());
        bytes[16..24].copy_from_slice(&0x7f00_0000_1000u64.to_ne_bytes());
        bytes[24..28].copy_from_slice(&77u32.to_ne_bytes());
        assert_eq!(
            Event::decode(&bytes),
            Event::PageFault { address: 0x7f00_0000_1000, thread: 77 }
        );
        bytes[0] = EVENT_REMOVE;
        bytes[8..16].copy_from_slice(&0x1000u64.to_ne_bytes());
        bytes[16..24].copy_from_slice(&0x3000u64.to_ne_bytes());
        assert_eq!(Event::decode(&bytes), Event::Remove { start: 0x1000, end: 0x3000 });
        bytes[0] = EVENT_UNMAP;
        assert_eq!(Event::decode(&bytes), Event::Unmap { start: 0x1000, end: 0x3000 });
        bytes[0] = EVENT_FORK;
        assert_eq!(Event::decode(&bytes), Event::Fork);
        bytes[0] = 0x77;
        assert_eq!(Event::decode(&bytes), Event::Other { kind: 0x77 });
    }

    /// A monitor does so with a DIMM that is unplugged.
    #[test]
    fn unmapped_range_is_skipped() {
        use std::num::NonZeroUsize;

        use nix::sys::memfd::{MFdFlags, memfd_create};
        use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
        const BYTES: u64 = 4 * STEP_BYTES;
        let len = NonZeroUsize::new(BYTES as usize).unwrap();
        let step = NonZeroUsize::new(STEP_BYTES as usize).unwrap();
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(BYTES).unwrap();
        let uffd = Uffd::for_this_process().unwrap();
        // SAFETY: a fresh mapping at an address of the kernel's choice, without references.
        let start =
            unsafe { mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &file, 0) };
        let start = start.unwrap();
        let address = start.as_ptr().expose_provenance() as u64;
        uffd.register(address, BYTES, Kind::Shared).unwrap();
        // The middle of the range is now memory that userfaultfd does not support.
        let other = File::open("/proc/self/exe").unwrap();
        let at = NonZeroUsize::new(address as usize + STEP_BYTES as usize).unwrap();
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        // SAFETY: replaces a part of this test's own mapping.
        unsafe { mmap(Some(at), step, ProtFlags::PROT_READ, flags, &other, 0) }.unwrap();
        assert_eq!(uffd.unregister(address, BYTES).unwrap(), STEP_BYTES);
        // The rest of the range is unregistered: these accesses do not wait.
        for at in [0, 2 * STEP_BYTES, BYTES - 4096] {
            // SAFETY: mapped, and its file is long enough.
            let byte = unsafe { start.as_ptr().cast::<u8>().add(at as usize).read_volatile() };
            assert_eq!(byte, 0);
        }
        // SAFETY: this test's own mappings, without references.
        unsafe { munmap(start, len.get()) }.unwrap();
        assert_eq!(uffd.unregister(address, BYTES).unwrap(), BYTES);
        assert!(!uffd.is_gone(), "this process exists");
    }
}
