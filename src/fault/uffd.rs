//! A guest's userfaultfd: its events and the ioctls that answer them.
//!
//! io_uring has no command for these ioctls, so they are plain system calls; reading the events
//! goes through the ring. Layouts and numbers are those of `linux/userfaultfd.h`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

/// Bytes of one event as read from the descriptor.
pub(crate) const MESSAGE_BYTES: usize = 32;

/// What the kernel reports on a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A thread of the guest waits at this address (guest side's address space).
    PageFault { address: u64 },
    /// The guest side discarded a range (balloon, MADV_DONTNEED, MADV_REMOVE).
    Remove { start: u64, end: u64 },
    /// An event that we did not ask for.
    Other { kind: u8 },
}

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;

impl Event {
    /// Reads one `struct uffd_msg`.
    pub(crate) fn decode(bytes: &[u8; MESSAGE_BYTES]) -> Event {
        let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        match bytes[0] {
            EVENT_PAGEFAULT => Event::PageFault { address: word(16) },
            EVENT_REMOVE => Event::Remove { start: word(8), end: word(16) },
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

nix::ioctl_read!(ioctl_unregister, 0xaa, 0x01, Range);
nix::ioctl_read!(ioctl_wake, 0xaa, 0x02, Range);
nix::ioctl_readwrite!(ioctl_zeropage, 0xaa, 0x04, RangeOperation);
nix::ioctl_readwrite!(ioctl_continue, 0xaa, 0x07, RangeOperation);

/// How an attempt to make a page visible to the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Marked {
    /// The guest sees it, and whoever waited has been woken.
    Done,
    /// It was visible before (or its range has been unregistered); waiters need a wake.
    Already,
    /// The file has no page there yet.
    NotPresent,
    /// Events are pending that must be read first; try again afterwards.
    Again,
    /// The guest's process, or its mapping, is gone.
    Gone,
}

/// A userfaultfd that belongs to the guest's address space. Addresses are the guest side's.
#[derive(Clone)]
pub(crate) struct Uffd(Arc<OwnedFd>);

impl Uffd {
    pub(crate) fn new(descriptor: OwnedFd) -> Uffd {
        Uffd(Arc::new(descriptor))
    }

    pub(crate) fn descriptor(&self) -> Arc<OwnedFd> {
        self.0.clone()
    }

    /// Maps the page-cache page(s) of a shared file at `start..start + len` into the guest.
    pub(crate) fn mark_cached(&self, start: u64, len: u64) -> io::Result<Marked> {
        let mut operation = RangeOperation { range: Range { start, len }, mode: 0, done: 0 };
        // SAFETY: the struct is the ioctl's own and outlives the call; the kernel checks the range.
        let result = unsafe { ioctl_continue(self.0.as_raw_fd(), &mut operation) };
        marked(result)
    }

    /// Puts a page of zeroes at `start`, allocating it.
    pub(crate) fn mark_zero(&self, start: u64, len: u64) -> io::Result<Marked> {
        let mut operation = RangeOperation { range: Range { start, len }, mode: 0, done: 0 };
        // SAFETY: as in mark_cached.
        let result = unsafe { ioctl_zeropage(self.0.as_raw_fd(), &mut operation) };
        marked(result)
    }

    /// Wakes every thread that waits in the range; those whose page is not there fault anew.
    pub(crate) fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = Range { start, len };
        // SAFETY: as in mark_cached.
        unsafe { ioctl_wake(self.0.as_raw_fd(), &mut range) }?;
        Ok(())
    }

    /// Takes the range out of the userfaultfd for good and wakes its waiters. Calling it again for
    /// a part of the same range does nothing.
    pub(crate) fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = Range { start, len };
        // SAFETY: as in mark_cached.
        match unsafe { ioctl_unregister(self.0.as_raw_fd(), &mut range) } {
            // The guest's process is gone, and its mappings with it.
            Err(nix::Error::ENOMEM | nix::Error::ESRCH) => Ok(()),
            result => Ok(result.map(drop)?),
        }
    }
}

fn marked(result: nix::Result<i32>) -> io::Result<Marked> {
    match result {
        Ok(_) => Ok(Marked::Done),
        // Somebody else marked it, e.g. two threads that finished at the same time.
        Err(nix::Error::EEXIST) => Ok(Marked::Already),
        // No registered mapping at the address: its block has been unregistered already.
        Err(nix::Error::ENOENT) => Ok(Marked::Already),
        Err(nix::Error::EFAULT) => Ok(Marked::NotPresent),
        // The address space is being changed; the change's event is waiting to be read.
        Err(nix::Error::EAGAIN) => Ok(Marked::Again),
        Err(nix::Error::ESRCH) => Ok(Marked::Gone),
        Err(errno) => Err(errno.into()),
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
        assert_eq!(Event::decode(&bytes), Event::PageFault { address: 0x7f00_0000_1000 });
        bytes[0] = EVENT_REMOVE;
        bytes[8..16].copy_from_slice(&0x1000u64.to_ne_bytes());
        bytes[16..24].copy_from_slice(&0x3000u64.to_ne_bytes());
        assert_eq!(Event::decode(&bytes), Event::Remove { start: 0x1000, end: 0x3000 });
        bytes[0] = 0x14;
        assert_eq!(Event::decode(&bytes), Event::Other { kind: 0x14 });
    }
}
