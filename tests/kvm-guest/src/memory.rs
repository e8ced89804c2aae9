//! The guest's memory.

use std::fs::OpenOptions;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use umem::host::guest::handover;

use crate::Result;
use crate::code::{PAGE_BYTES, RAM_BYTES_MAX};
use crate::pattern::GROUP_BYTES;

/// The kinds of the guest's memory. Each kind has its own hand-over: the preload object takes a file as it is mapped;
/// anonymous memory is handed over by its owner.
#[derive(Clone, Debug)]
pub(crate) enum Backing {
    /// A file mapped shared; it gets its size here if it is empty.
    SharedFile(PathBuf),
    /// Anonymous memory, handed over to the umem that listens at this socket.
    Anonymous(PathBuf),
}

/// The name of the guest's memory, for umem.
const RAM_NAME: &str = "ram0";

/// A mapping for a guest. There is never a reference into it, because others write there. It stays until the process
/// ends, because a vCPU may be in a fault of it until then.
#[derive(Debug)]
pub(crate) struct Memory {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: an address and a length, of a mapping that stays.
unsafe impl Send for Memory {}
// SAFETY: as above; nothing of it reads or writes there without saying so.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps the memory of a guest, without touching it. `bytes` is its size if the file is empty.
    pub(crate) fn map(backing: &Backing, bytes: u64) -> Result<Memory> {
        match backing {
            Backing::SharedFile(path) => {
                let what = |error: std::io::Error| format!("RAM {}: {error}", path.display());
                let mut options = OpenOptions::new();
                options.read(true).write(true).create(true).truncate(false);
                let file = options.open(path).map_err(what)?;
                let found = file.metadata().map_err(what)?.len();
                if found == 0 {
                    file.set_len(bytes).map_err(what)?;
                }
                let bytes = check_size(if found == 0 { bytes } else { found })?;
                let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
                // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing.
                let start =
                    unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, &file, 0) }
                        .map_err(|errno| what(errno.into()))?;
                Ok(Memory { start: start.cast(), bytes: bytes.get() })
            }
            Backing::Anonymous(socket) => {
                let memory = Memory::private(check_size(bytes)?)?;
                let (start, page_bytes) = (memory.start.cast(), PAGE_BYTES.into());
                let handed =
                    handover::Memory { name: RAM_NAME, start, bytes, page_bytes, shards: 1 };
                handover::hand_over(socket, &handed).map_err(|error| error.to_string())?;
                Ok(memory)
            }
        }
    }

    /// Memory of this process alone.
    pub(crate) fn private(bytes: NonZeroUsize) -> Result<Memory> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: as above.
        let start = unsafe { mmap_anonymous(None, bytes, protection, MapFlags::MAP_PRIVATE) }
            .map_err(|errno| format!("mapping {bytes} bytes: {errno}"))?;
        Ok(Memory { start: start.cast(), bytes: bytes.get() })
    }

    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// The size of a guest's memory, if it is valid.
pub(crate) fn check_size(bytes: u64) -> Result<NonZeroUsize> {
    usize::try_from(bytes)
        .ok()
        .and_then(NonZeroUsize::new)
        .filter(|_| bytes <= RAM_BYTES_MAX && bytes.is_multiple_of(GROUP_BYTES))
        .ok_or_else(|| format!("{bytes} bytes of RAM: whole MiB, from 1 to 3072, are possible"))
}
