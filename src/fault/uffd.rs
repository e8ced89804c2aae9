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

/// What is unregistered piece by piece where it cannot be as one.
const STEP_BYTES: u64 = 2 << 20;

/// What the kernel reports on a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A thread of the guest waits at this address (guest side's address space).
    /// `thread` is its number, or 0 where the userfaultfd was not told to report that.
    PageFault { address: u64, thread: u32 },
    /// The guest side discarded a range (balloon, MADV_DONTNEED, MADV_REMOVE).
    Remove { start: u64, end: u64 },
    /// It unmapped one: what was to come there is of no use any more.
    Unmap { start: u64, end: u64 },
    /// The guest side forked: the child has memory that nobody would fill.
    Fork,
    /// The guest side moved a mapping: pages would be put where the guest no longer has them.
    Remap,
    /// An event that we do not know.
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

/// How far an attempt to put pages in place got, and what ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    /// Bytes that the guest sees now, from the start of the range; who waited for them is awake.
    pub(crate) bytes: u64,
    /// Why it went no further; none at the end of the range.
    pub(crate) stop: Option<Stop>,
}

/// Why pages could not be put in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The guest sees the next page already; those who wait for it need a wake.
    Already,
    /// The file has no page there yet.
    NotPresent,
    /// Events are pending that must be read first; try again afterwards.
    Again,
    /// The guest's process is gone, or the range is not registered (any more), or not all of it lies in one mapping.
    Gone,
}

/// A userfaultfd that belongs to the guest's address space. Addresses are the guest side's.
#[derive(Clone)]
pub(crate) struct Uffd(Arc<Open>);

/// Others may have the same one open, in a program that embeds umem or has handed its memory over.
struct Open {
    descriptor: Arc<OwnedFd>,
    /// It waited when we got it, and will again when we are through with it.
    waited: AtomicBool,
    /// The kernel has said that the address space is gone. Nothing can be put in place then, nor is anything
    /// missed; who counts pages as there asks before that is told to anybody.
    is_gone: AtomicBool,
    /// The same was said of a page that was to be put in place: the guest has ended without it.
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
    /// True if that has changed them.
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

    /// A userfaultfd for memory of this process. It catches faults of user mode only, which any
    /// user may: enough where no guest and no system call ever touches a page that is missing.
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

    /// Puts zeroes at `start..start + len`: of private memory without allocating it.
    pub(crate) fn zero(&self, start: u64, len: u64) -> io::Result<Placed> {
        let mut operation = RangeOperation { range: Range { start, len }, mode: 0, done: 0 };
        // SAFETY: as in map.
        let result = unsafe { ioctl_zeropage(self.0.descriptor.as_raw_fd(), &mut operation) };
        self.placed(result, operation.done, len)
    }

    /// Copies our bytes to fresh private pages of the guest at `start`; both are whole pages.
    pub(crate) fn copy(&self, start: u64, bytes: &[u8]) -> io::Result<Placed> {
        let len = bytes.len() as u64;
        let from = bytes.as_ptr().expose_provenance() as u64;
        let mut operation = CopyOperation { to: start, from, len, mode: 0, done: 0 };
        // SAFETY: the kernel reads our bytes, which are borrowed for the call, and checks the range.
        let result = unsafe { ioctl_copy(self.0.descriptor.as_raw_fd(), &mut operation) };
        self.placed(result, operation.done, len)
    }

    /// Takes events that are pending, as many as fit; 0 bytes when there are none. Needs O_NONBLOCK.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match nix::unistd::read(&*self.0.descriptor, buffer) {
            Ok(count) => Ok(count),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => Ok(0),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The same, into memory that others may see.
    pub(crate) fn read_into(&self, span: &Span) -> io::Result<usize> {
        // SAFETY: the span is mapped and so long, and no reference to it exists.
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

    /// Reads, and polls, fail rather than wait from now on, until nobody here has it any more: whoever handed it
    /// over may not have asked for that, and a userfaultfd that waits cannot be polled.
    pub(crate) fn set_nonblocking(&self) -> io::Result<()> {
        if self.0.change_flags(|flags| flags | OFlag::O_NONBLOCK)? {
            self.0.waited.store(true, SeqCst);
        }
        Ok(())
    }

    /// Wakes every thread that waits in the range; those whose page is not there fault anew.
    pub(crate) fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = Range { start, len };
        // SAFETY: as in mark_cached.
        unsafe { ioctl_wake(self.0.descriptor.as_raw_fd(), &mut range) }?;
        Ok(())
    }

    /// Takes the range out of the userfaultfd for good and wakes its waiters. Calling it again for
    /// a part of the same range does nothing, nor does it where the range is not mapped any more. Returns how many
    /// bytes of it were found to be so: pieces of 2 MiB of which nothing is mapped.
    pub(crate) fn unregister(&self, start: u64, len: u64) -> io::Result<u64> {
        let mut range = Range { start, len };
        // SAFETY: as in mark_cached.
        match unsafe { ioctl_unregister(self.0.descriptor.as_raw_fd(), &mut range) } {
            Ok(_) => Ok(0),
            Err(nix::Error::ESRCH) => {
                self.0.is_gone.store(true, SeqCst);
                Ok(0)
            }
            // The guest's process is gone, and its mappings with it; or the kernel has no memory to split one.
            Err(nix::Error::ENOMEM) => {
                // Which of the two this says, whatever else.
                match self.try_map(start, small_page_bytes()).0 {
                    Err(nix::Error::ESRCH) => {
                        self.0.is_gone.store(true, SeqCst);
                        Ok(0)
                    }
                    _ => Err(nix::Error::ENOMEM.into()),
                }
            }
            // Nothing is mapped there, or in a part of it something that no userfaultfd takes.
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

    /// Whether the guest's address space has been found gone by any call so far.
    pub(crate) fn is_gone(&self) -> bool {
        self.0.is_gone.load(SeqCst)
    }

    /// Whether a page could not be put in place because the address space was gone.
    pub(crate) fn has_missed(&self) -> bool {
        self.0.has_missed.load(SeqCst)
    }

    fn placed(&self, result: nix::Result<i32>, done: i64, len: u64) -> io::Result<Placed> {
        let stop = match result {
            Ok(_) => return Ok(Placed { bytes: len, stop: None }),
            // Some of it is done; what ended it shows at the next attempt.
            Err(nix::Error::EAGAIN) if done > 0 => {
                return Ok(Placed { bytes: done.unsigned_abs(), stop: None });
            }
            // The address space is being changed; the change's event is waiting to be read.
            Err(nix::Error::EAGAIN) => Stop::Again,
            // Somebody else placed it, e.g. two threads that finished at the same time.
            Err(nix::Error::EEXIST) => Stop::Already,
            Err(nix::Error::EFAULT) => Stop::NotPresent,
            // No registered mapping at the address: its block has been unregistered already, or nothing is mapped
            // there any more. Or the range goes on in another mapping (validate_dst_vma in mm/userfaultfd.c).
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
    fn events_are_read_as_the_kernel_lays_them_out() {
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

    /// As a monitor does with a DIMM that is unplugged.
    #[test]
    fn what_is_not_mapped_any_more_is_left_alone() {
        use std::num::NonZeroUsize;

        use nix::sys::memfd::{MFdFlags, memfd_create};
        use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
        const BYTES: u64 = 4 * STEP_BYTES;
        let len = NonZeroUsize::new(BYTES as usize).unwrap();
        let step = NonZeroUsize::new(STEP_BYTES as usize).unwrap();
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(BYTES).unwrap();
        let uffd = Uffd::for_this_process().unwrap();
        // SAFETY: a fresh mapping at an address of the kernel's choice, which nothing refers to.
        let start =
            unsafe { mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &file, 0) };
        let start = start.unwrap();
        let address = start.as_ptr().expose_provenance() as u64;
        uffd.register(address, BYTES, Kind::Shared).unwrap();
        // Something that no userfaultfd takes lies in the midst of it now.
        let other = File::open("/proc/self/exe").unwrap();
        let at = NonZeroUsize::new(address as usize + STEP_BYTES as usize).unwrap();
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        // SAFETY: it replaces a part of our own mapping.
        unsafe { mmap(Some(at), step, ProtFlags::PROT_READ, flags, &other, 0) }.unwrap();
        assert_eq!(uffd.unregister(address, BYTES).unwrap(), STEP_BYTES);
        // What is still there of it is registered no more: this does not wait.
        for at in [0, 2 * STEP_BYTES, BYTES - 4096] {
            // SAFETY: mapped, and its file is long enough.
            let byte = unsafe { start.as_ptr().cast::<u8>().add(at as usize).read_volatile() };
            assert_eq!(byte, 0);
        }
        // SAFETY: our own mappings, which nothing refers to.
        unsafe { munmap(start, len.get()) }.unwrap();
        assert_eq!(uffd.unregister(address, BYTES).unwrap(), BYTES);
        assert!(!uffd.is_gone(), "this process is there");
    }
}
