//! The mappings, and their hand-over: as Firecracker before it runs a guest from a snapshot.

use std::ffi::c_void;
use std::io::IoSlice;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::Result;

const PAGE_BYTES: u64 = 4096;
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Anonymous memory in one or two mappings. They stay until the process ends, and there is never a reference into them,
/// because another process fills them.
pub(crate) struct Memory {
    regions: Vec<Region>,
    pub(crate) page_bytes: u64,
}

/// One mapping.
struct Region {
    start: NonNull<c_void>,
    bytes: u64,
    /// Its offset in the snapshot.
    offset: u64,
}

// SAFETY: plain memory, which is only read, through raw pointers and as volatile.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

/// The objects that must stay open as long as a page may be missing.
pub(crate) struct HandedOver {
    _socket: UnixStream,
    _uffd: OwnedFd,
}

impl Memory {
    /// Maps `bytes` without touching them. Two regions are 5/8 and 3/8 of it, about as in a machine
    /// with a hole below 4 GiB.
    pub(crate) fn map(bytes: u64, regions: usize, huge: bool) -> Result<Memory> {
        let page_bytes = if huge { HUGE_PAGE_BYTES } else { PAGE_BYTES };
        let first = match regions {
            1 => bytes,
            2 => (bytes / 8 * 5).next_multiple_of(page_bytes),
            _ => return Err(format!("--regions {regions}: 1 or 2 are possible")),
        };
        if bytes == 0 || !bytes.is_multiple_of(page_bytes) || (regions == 2 && first >= bytes) {
            return Err(format!("{bytes} bytes are not whole pages for each region"));
        }
        let sizes = if regions == 1 { vec![bytes] } else { vec![first, bytes - first] };
        let mut offset = 0;
        let mut mapped = Vec::new();
        for bytes in sizes {
            mapped.push(Region { start: map(bytes, huge)?, bytes, offset });
            offset += bytes;
        }
        Ok(Memory { regions: mapped, page_bytes })
    }

    pub(crate) fn pages(&self) -> u64 {
        self.regions.iter().map(|region| region.bytes).sum::<u64>() / self.page_bytes
    }

    /// The offset of a page in the snapshot, and its address here.
    pub(crate) fn page(&self, page: u64) -> (u64, NonNull<u64>) {
        let offset = page * self.page_bytes;
        let region = self.regions.iter().rfind(|region| region.offset <= offset);
        let region = region.expect("the first one begins at 0");
        assert!(offset + self.page_bytes <= region.offset + region.bytes);
        let inside = usize::try_from(offset - region.offset).expect("64-bit Linux");
        // SAFETY: inside the mapping, as just asserted.
        (offset, unsafe { region.start.byte_add(inside) }.cast())
    }

    pub(crate) fn are_of_one_region(&self, pages: &Range<u64>) -> bool {
        let (first, end) = (pages.start * self.page_bytes, pages.end * self.page_bytes);
        let holds = |r: &Region| r.offset <= first && end <= r.offset + r.bytes;
        self.regions.iter().any(holds)
    }

    /// Discards pages of one region, as a balloon device does.
    pub(crate) fn discard(&self, pages: &Range<u64>) -> Result<()> {
        assert!(self.are_of_one_region(pages));
        let (_, start) = self.page(pages.start);
        let bytes = (pages.end - pages.start) * self.page_bytes;
        let bytes = usize::try_from(bytes).expect("64-bit Linux");
        // SAFETY: inside the mapping, which holds no Rust objects.
        unsafe { madvise(start.cast(), bytes, MmapAdvise::MADV_DONTNEED) }
            .map_err(|errno| format!("discarding pages {pages:?}: {errno}"))
    }

    /// Registers the memory with one userfaultfd and sends it to the listener at `socket`.
    pub(crate) fn hand_over(&self, socket: &Path) -> Result<HandedOver> {
        let uffd = self.register()?;
        let stream = UnixStream::connect(socket)
            .map_err(|error| format!("connecting to {}: {error}", socket.display()))?;
        let mappings: Vec<String> =
            self.regions.iter().map(|region| region.message(self.page_bytes)).collect();
        let message = format!("[{}]", mappings.join(","));
        let (descriptors, bytes) = ([uffd.as_raw_fd()], [IoSlice::new(message.as_bytes())]);
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let sent = sendmsg::<()>(stream.as_raw_fd(), &bytes, &rights, MsgFlags::MSG_NOSIGNAL, None)
            .map_err(|errno| format!("handing the memory over: {errno}"))?;
        assert_eq!(sent, message.len(), "a fresh socket has room for a message");
        Ok(HandedOver { _socket: stream, _uffd: uffd })
    }

    fn register(&self) -> Result<OwnedFd> {
        let what = |what: &str| {
            let error = std::io::Error::last_os_error();
            format!("{what}: {error}; this needs root, or vm.unprivileged_userfaultfd=1")
        };
        // SAFETY: flags only.
        let number =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let number = i32::try_from(number).ok().filter(|&number| number >= 0);
        let number = number.ok_or_else(|| what("userfaultfd"))?;
        // SAFETY: the kernel has just made it for this process.
        let uffd = unsafe { OwnedFd::from_raw_fd(number) };
        let huge = self.page_bytes == HUGE_PAGE_BYTES;
        let features = uffd::EVENT_REMOVE | if huge { uffd::MISSING_HUGETLBFS } else { 0 };
        let mut api = uffd::Api { api: uffd::API, features, ioctls: 0 };
        // SAFETY: the structure has the ioctl's layout; below as well.
        unsafe { uffd::handshake(number, &mut api) }.map_err(|_| what("UFFDIO_API"))?;
        for region in &self.regions {
            let (start, length) = (region.start.addr().get() as u64, region.bytes);
            let mut register = uffd::Register { start, length, mode: uffd::MISSING, ioctls: 0 };
            // SAFETY: as above.
            unsafe { uffd::register(number, &mut register) }
                .map_err(|_| what("UFFDIO_REGISTER"))?;
        }
        Ok(uffd)
    }
}

impl Region {
    /// Firecracker's fields, all of them and no others. The last one is in bytes, too.
    fn message(&self, page_bytes: u64) -> String {
        format!(
            r#"{{"base_host_virt_addr":{},"size":{},"offset":{},"page_size":{page_bytes},"page_size_kib":{page_bytes}}}"#,
            self.start.addr(),
            self.bytes,
            self.offset,
        )
    }
}

fn map(bytes: u64, huge: bool) -> Result<NonNull<c_void>> {
    let length = NonZeroUsize::new(usize::try_from(bytes).expect("64-bit Linux")).expect("checked");
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let mut flags = MapFlags::MAP_PRIVATE;
    if huge {
        flags |= MapFlags::MAP_HUGETLB | MapFlags::MAP_HUGE_2MB;
    }
    // SAFETY: a new mapping at an address of the kernel's choice.
    unsafe { mmap_anonymous(None, length, protection, flags) }.map_err(|errno| {
        let hint = if huge { "; are there enough huge pages (vm.nr_hugepages)?" } else { "" };
        format!("mapping {bytes} bytes: {errno}{hint}")
    })
}

mod uffd {
    //! The needed part; numbers and layouts are those of `linux/userfaultfd.h`.

    pub(super) const API: u64 = 0xaa;
    pub(super) const EVENT_REMOVE: u64 = 1 << 3;
    pub(super) const MISSING_HUGETLBFS: u64 = 1 << 4;
    /// A mode.
    pub(super) const MISSING: u64 = 1 << 0;

    #[repr(C)]
    pub(super) struct Api {
        pub(super) api: u64,
        pub(super) features: u64,
        pub(super) ioctls: u64,
    }

    #[repr(C)]
    pub(super) struct Register {
        pub(super) start: u64,
        pub(super) length: u64,
        pub(super) mode: u64,
        pub(super) ioctls: u64,
    }

    nix::ioctl_readwrite!(handshake, 0xaa, 0x3f, Api);
    nix::ioctl_readwrite!(register, 0xaa, 0x00, Register);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_cover_the_snapshot_once() {
        let memory = Memory::map(3 << 20, 2, false).unwrap();
        let [first, second] = &memory.regions[..] else { panic!() };
        assert_eq!((first.offset, second.offset), (0, first.bytes));
        assert_eq!(first.bytes + second.bytes, 3 << 20);
        let last = first.bytes / PAGE_BYTES - 1;
        let at_end = first.start.addr().get() as u64 + first.bytes - PAGE_BYTES;
        assert_eq!(memory.page(last).1.addr().get() as u64, at_end);
        assert_eq!(memory.page(last + 1), (first.bytes, second.start.cast()));
    }

    #[test]
    fn handover_message_matches_firecracker() {
        let region = Region {
            start: NonNull::new(std::ptr::without_provenance_mut(4096)).unwrap(),
            bytes: 8192,
            offset: 12288,
        };
        let text = r#"{"base_host_virt_addr":4096,"size":8192,"offset":12288,"page_size":4096,"page_size_kib":4096}"#;
        assert_eq!(region.message(4096), text);
    }
}
