//! The demo guest's RAM: a mapping of one of the kinds that umem knows, read and written word by word.

use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::num::NonZeroUsize;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use super::pattern::{PAGE_WORDS, Words};
use super::{Memory, handover};
use crate::error::{Context, Error, Result};
use crate::host::command::RamPath;
use crate::memory::small_page_bytes;

/// Bytes of a page here, independent of the transport's page size.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// Bytes of a page of hugetlb memory.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// The mapping. Its words are accessed through raw volatile reads and writes only.
pub(crate) struct GuestRam {
    start: NonNull<u64>,
    pub(crate) bytes: u64,
    pub(crate) name: String,
    /// The file that is mapped; None for anonymous memory.
    pub(crate) path: Option<PathBuf>,
    /// The advice that makes a page read as zeroes.
    discard: MmapAdvise,
    /// Number of pages that can only be discarded together.
    pub(crate) discard_pages: u64,
}

// SAFETY: plain memory. The machine's page locks keep threads out of each other's pages, and every access is volatile.
unsafe impl Send for GuestRam {}
// SAFETY: as above.
unsafe impl Sync for GuestRam {}

impl GuestRam {
    /// Maps `bytes` from a file that is opened or created, or anonymously. A loaded preload object takes over a file's
    /// mapping; anonymous memory is handed over here.
    pub(crate) fn map(memory: &Memory, bytes: u64) -> Result<GuestRam> {
        match memory {
            Memory::Shared(ram) => {
                map_file(ram, bytes, MapFlags::MAP_SHARED, MmapAdvise::MADV_REMOVE)
            }
            // Without its own copy the page shows the file again, which umem empties.
            Memory::Private(ram) => {
                map_file(ram, bytes, MapFlags::MAP_PRIVATE, MmapAdvise::MADV_DONTNEED)
            }
            Memory::Anonymous { name, handoff, shards, huge } => {
                let page_bytes = if *huge { HUGE_PAGE_BYTES } else { small_page_bytes() };
                let ram = map_anonymous(name, bytes, page_bytes)?;
                let (shards, start) = (*shards, ram.start.cast());
                let memory = handover::Memory { name, start, bytes, page_bytes, shards };
                handover::hand_over(handoff, &memory)?;
                Ok(ram)
            }
        }
    }

    pub(crate) fn pages(&self) -> u64 {
        self.bytes / PAGE_BYTES
    }

    /// Its address in this process.
    pub(crate) fn address(&self) -> usize {
        self.start.addr().get()
    }

    fn word(&self, page: u64, word: usize) -> *mut u64 {
        assert!(page < self.pages() && word < PAGE_WORDS);
        let index = usize::try_from(page).expect("64-bit Linux") * PAGE_WORDS + word;
        // SAFETY: inside the mapping, as just asserted.
        unsafe { self.start.as_ptr().add(index) }
    }

    /// Reads the first word of a page. If the page is missing, the read waits for it.
    pub(crate) fn touch(&self, page: u64) -> u64 {
        // SAFETY: mapped and aligned; volatile, as other threads and the daemon write there.
        unsafe { self.word(page, 0).read_volatile() }
    }

    /// The first wrong word: its index, the expected value and the value found.
    pub(crate) fn check(&self, page: u64, words: Words) -> Option<(usize, u64, u64)> {
        let start = self.word(page, 0);
        for word in 0..PAGE_WORDS {
            let want = words.word(word);
            // SAFETY: the page lies inside the mapping; volatile as above.
            let got = unsafe { start.add(word).read_volatile() };
            if got != want {
                return Some((word, want, got));
            }
        }
        None
    }

    pub(crate) fn write(&self, page: u64, words: Words) {
        let start = self.word(page, 0);
        for word in 0..PAGE_WORDS {
            // SAFETY: the page lies inside the mapping; volatile as above.
            unsafe { start.add(word).write_volatile(words.word(word)) };
        }
    }

    /// Gives [`discard_pages`](Self::discard_pages) pages back to the kernel: they read as zeroes from here on, as
    /// after a balloon.
    pub(crate) fn discard(&self, first: u64) -> nix::Result<()> {
        assert!(first + self.discard_pages <= self.pages());
        let bytes = usize::try_from(self.discard_pages * PAGE_BYTES).expect("64-bit Linux");
        let start = NonNull::new(self.word(first, 0)).expect("mapped");
        // SAFETY: inside the mapping, and the machine's page locks keep its threads out.
        unsafe { madvise(start.cast(), bytes, self.discard) }
    }
}

fn map_file(ram: &RamPath, bytes: u64, sharing: MapFlags, discard: MmapAdvise) -> Result<GuestRam> {
    let file = open(ram, bytes)?;
    let length = length(bytes)?;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe { mmap(None, length, READ_WRITE, sharing, &file, 0) }
        .context(|| format!("mapping RAM {}", ram.name))?;
    // SAFETY: advice on this process's own mapping; it changes no content.
    let _ = unsafe { madvise(start, length.get(), MmapAdvise::MADV_HUGEPAGE) };
    Ok(GuestRam {
        start: start.cast(),
        bytes,
        name: ram.name.clone(),
        path: Some(ram.path.clone()),
        discard,
        discard_pages: 1,
    })
}

/// Opens or creates the file and sizes it to `bytes`, if it does not have that size already.
fn open(ram: &RamPath, bytes: u64) -> Result<File> {
    let failed = |what: String| Error::Ram { name: ram.name.clone(), path: ram.path.clone(), what };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .mode(0o600)
        .truncate(false)
        .open(&ram.path)
        .map_err(|error| failed(error.to_string()))?;
    let length = file.metadata().map_err(|error| failed(error.to_string()))?.len();
    if length == 0 {
        file.set_len(bytes).map_err(|error| failed(error.to_string()))?;
    } else if length != bytes {
        return Err(failed(format!("has {length} bytes, not the {bytes} asked for")));
    }
    Ok(file)
}

fn map_anonymous(name: &str, bytes: u64, page_bytes: u64) -> Result<GuestRam> {
    let length = length(bytes)?;
    if !bytes.is_multiple_of(page_bytes) {
        return Err(Error::Usage(format!(
            "RAM {name} has pages of {} MiB: give it a --size of whole pages",
            page_bytes >> 20
        )));
    }
    let huge = page_bytes == HUGE_PAGE_BYTES;
    let pages =
        if huge { MapFlags::MAP_HUGETLB | MapFlags::MAP_HUGE_2MB } else { MapFlags::empty() };
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe { mmap_anonymous(None, length, READ_WRITE, MapFlags::MAP_PRIVATE | pages) };
    let start: NonNull<c_void> = match start {
        Err(nix::Error::ENOMEM) if huge => {
            return Err(Error::OutOfMemory(format!(
                "RAM {name} needs {} unused huge pages: reserve them with `sysctl vm.nr_hugepages=N`",
                bytes / page_bytes
            )));
        }
        start => start.context(|| format!("mapping RAM {name}"))?,
    };
    Ok(GuestRam {
        start: start.cast(),
        bytes,
        name: name.to_owned(),
        path: None,
        discard: MmapAdvise::MADV_DONTNEED,
        discard_pages: page_bytes / PAGE_BYTES,
    })
}

const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

fn length(bytes: u64) -> Result<NonZeroUsize> {
    NonZeroUsize::new(usize::try_from(bytes).expect("64-bit Linux"))
        .ok_or_else(|| Error::Usage("a guest needs at least 1 MiB".into()))
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        // SAFETY: this process's own mapping, and no thread of the machine is left.
        let _ = unsafe { munmap(self.start.cast(), usize::try_from(self.bytes).unwrap_or(0)) };
    }
}
