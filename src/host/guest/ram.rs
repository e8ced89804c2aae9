//! The demo guest's RAM: a shared mapping of a file, read and written word by word.

use std::fs::OpenOptions;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

use super::pattern::{PAGE_WORDS, Words};
use crate::error::{Context, Error, Result};
use crate::host::command::RamPath;

/// Bytes of a page here; what the transport's pages are does not matter to the guest.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// The mapping. Its words are accessed through raw volatile reads and writes only.
pub(crate) struct GuestRam {
    start: NonNull<u64>,
    pub(crate) bytes: u64,
    pub(crate) name: String,
    pub(crate) path: std::path::PathBuf,
}

// SAFETY: plain memory; threads keep out of each other's pages by the machine's page locks, and
// every access is volatile.
unsafe impl Send for GuestRam {}
// SAFETY: as above.
unsafe impl Sync for GuestRam {}

impl GuestRam {
    /// Opens or creates the file, gives it `bytes` and maps it shared. Where the preload object is
    /// loaded it takes this very mapping over.
    pub(crate) fn map(ram: &RamPath, bytes: u64) -> Result<GuestRam> {
        let failed =
            |what: String| Error::Ram { name: ram.name.clone(), path: ram.path.clone(), what };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&ram.path)
            .map_err(|error| failed(error.to_string()))?;
        let length = file.metadata().map_err(|error| failed(error.to_string()))?.len();
        if length == 0 {
            file.set_len(bytes).map_err(|error| failed(error.to_string()))?;
        } else if length != bytes {
            return Err(failed(format!("has {length} bytes, not the {bytes} asked for")));
        }
        let len = NonZeroUsize::new(usize::try_from(bytes).expect("64-bit Linux"))
            .ok_or_else(|| Error::Usage("a guest needs at least 1 MiB".into()))?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, &file, 0) }
            .context(|| format!("mapping RAM {}", ram.name))?;
        // SAFETY: advice on our own mapping; it changes no content.
        let _ = unsafe { madvise(start, len.get(), MmapAdvise::MADV_HUGEPAGE) };
        let (name, path) = (ram.name.clone(), ram.path.clone());
        Ok(GuestRam { start: start.cast(), bytes, name, path })
    }

    pub(crate) fn pages(&self) -> u64 {
        self.bytes / PAGE_BYTES
    }

    fn word(&self, page: u64, word: usize) -> *mut u64 {
        assert!(page < self.pages() && word < PAGE_WORDS);
        let index = usize::try_from(page).expect("64-bit Linux") * PAGE_WORDS + word;
        // SAFETY: inside the mapping, as just asserted.
        unsafe { self.start.as_ptr().add(index) }
    }

    /// Reads the first word of a page, which is where a missing page is waited for.
    pub(crate) fn touch(&self, page: u64) -> u64 {
        // SAFETY: mapped and aligned; volatile, as other threads and the daemon write there.
        unsafe { self.word(page, 0).read_volatile() }
    }

    /// The first wrong word: its index, what it must be, what it is.
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
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and no thread of the machine is left.
        let _ = unsafe { munmap(self.start.cast(), usize::try_from(self.bytes).unwrap_or(0)) };
    }
}
