//! A guest's memory, its expected contents, and a guest that reads and writes it and checks every word.

use std::ffi::c_void;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use umem::embed::{DestinationSetup, Memory, SourceSetup};

use super::super::random::{Random, mix};

pub(crate) const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

/// Consecutive pages owned by one thread of the guest.
const STRIPE: u64 = 8;

/// The kind of a region at the destination; at the source it is always a memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    Shared,
    Anonymous,
}

/// A region's mapping in this process.
pub(crate) struct Region {
    name: String,
    file: Option<File>,
    start: NonNull<c_void>,
    pages: u64,
}

// SAFETY: all accesses through it are volatile and word by word, and no page is written by one thread while another
// thread touches it.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    pub(crate) fn new(name: &str, backing: Backing, pages: u64) -> Region {
        let length = usize::try_from(pages).expect("64-bit") * PAGE;
        let length = NonZeroUsize::new(length).expect("a page at least");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let file = (backing == Backing::Shared).then(|| {
            let file = File::from(memfd_create(c"model", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
            file.set_len(pages * PAGE as u64).expect("its size");
            file
        });
        // SAFETY: fresh mappings at addresses of the kernel's choice.
        let start = unsafe {
            match &file {
                Some(file) => mmap(None, length, protection, MapFlags::MAP_SHARED, file, 0),
                None => mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE),
            }
        };
        Region { name: name.to_owned(), file, start: start.expect("memory"), pages }
    }

    fn word(&self, page: u64, index: usize) -> *mut u64 {
        assert!(page < self.pages && index < WORDS);
        let offset = usize::try_from(page).expect("64-bit") * PAGE + index * 8;
        // SAFETY: inside the mapping, as asserted.
        unsafe { self.start.as_ptr().cast::<u8>().add(offset).cast() }
    }

    fn read(&self, page: u64, index: usize) -> u64 {
        // SAFETY: mapped; a missing page blocks the access.
        unsafe { self.word(page, index).read_volatile() }
    }

    fn write(&self, page: u64, index: usize, value: u64) {
        // SAFETY: mapped; the page is the calling thread's.
        unsafe { self.word(page, index).write_volatile(value) }
    }

    /// As a balloon does.
    fn discard(&self, page: u64, pages: u64) {
        let length = usize::try_from(pages.min(self.pages - page)).expect("64-bit") * PAGE;
        let start = NonNull::new(self.word(page, 0).cast()).expect("mapped");
        let advice = match self.file {
            Some(_) => MmapAdvise::MADV_REMOVE,
            None => MmapAdvise::MADV_DONTNEED,
        };
        // SAFETY: whole pages of the mapping, which are the calling thread's.
        unsafe { madvise(start, length, advice) }.expect("discarding pages");
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let length = usize::try_from(self.pages).expect("64-bit") * PAGE;
        // SAFETY: our own mapping, without any other user.
        unsafe { munmap(self.start, length) }.expect("unmapping");
    }
}

/// The expected contents: a version for each page; 0 is zeroes.
pub(crate) struct Model {
    salt: u64,
    versions: Vec<Vec<AtomicU32>>,
}

impl Model {
    /// For regions of this many pages, all zeroes.
    pub(crate) fn new(salt: u64, pages: &[u64]) -> Model {
        let region = |&pages: &u64| (0..pages).map(|_| AtomicU32::new(0)).collect();
        Model { salt, versions: pages.iter().map(region).collect() }
    }

    fn word(&self, region: usize, page: u64, index: usize, version: u32) -> u64 {
        if version == 0 {
            return 0;
        }
        let place = (region as u64) << 56 ^ page << 32 ^ (index as u64) << 20;
        mix(self.salt ^ place ^ u64::from(version).rotate_left(44)) | 1
    }

    fn version(&self, region: usize, page: u64) -> &AtomicU32 {
        &self.versions[region][usize::try_from(page).expect("64-bit")]
    }
}

/// A guest's memory with its model.
pub(crate) struct Guest {
    pub(crate) regions: Vec<Region>,
    pub(crate) model: Arc<Model>,
    /// Wrong pages.
    bad: Mutex<Vec<String>>,
    /// The memory is void.
    abandoned: AtomicBool,
}

impl Guest {
    pub(crate) fn new(regions: Vec<Region>, model: Arc<Model>) -> Arc<Guest> {
        Arc::new(Guest { regions, model, bad: Mutex::default(), abandoned: AtomicBool::new(false) })
    }

    /// Writes the memory of a guest that has run for a while: data, zeroes, and untouched pages.
    pub(crate) fn fill(&self, random: &mut Random) {
        for (index, region) in self.regions.iter().enumerate() {
            // Most regions are mixed; some are all data, or empty.
            let [data, zero] = random.pick(&[[50, 20], [50, 20], [100, 0], [10, 10], [0, 0]]);
            for page in 0..region.pages {
                match random.below(100) {
                    drawn if drawn < data => self.write(index, page),
                    drawn if drawn < data + zero => {
                        (0..WORDS).for_each(|i| region.write(page, i, 0));
                    }
                    _ => {}
                }
            }
        }
    }

    /// Writes a new version of a page.
    pub(crate) fn write(&self, region: usize, page: u64) {
        let version = self.model.version(region, page);
        let next = version.load(Relaxed) + 1;
        for index in 0..WORDS {
            let value = self.model.word(region, page, index, next);
            self.regions[region].write(page, index, value);
        }
        version.store(next, Relaxed);
    }

    /// Checks every word of a page.
    pub(crate) fn check(&self, region: usize, page: u64) {
        let version = self.model.version(region, page).load(Relaxed);
        for index in 0..WORDS {
            let expected = self.model.word(region, page, index, version);
            let found = self.regions[region].read(page, index);
            if found != expected && !self.abandoned.load(SeqCst) {
                let text = format!(
                    "region {region} page {page} word {index}: {found:#x}, not {expected:#x} of version \
                     {version}"
                );
                return self.bad.lock().unwrap().push(text);
            }
        }
    }

    pub(crate) fn check_all(&self) {
        for (index, region) in self.regions.iter().enumerate() {
            (0..region.pages).for_each(|page| self.check(index, page));
        }
    }

    /// A random page.
    pub(crate) fn any(&self, random: &mut Random) -> (usize, u64) {
        let region = usize::try_from(random.below(self.regions.len() as u64)).expect("an index");
        (region, random.below(self.regions[region].pages))
    }

    /// The errors so far, cleared.
    pub(crate) fn take_bad(&self) -> Vec<String> {
        std::mem::take(&mut self.bad.lock().unwrap())
    }

    /// Errors are no longer counted.
    pub(crate) fn abandon(&self) {
        self.abandoned.store(true, SeqCst);
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.pages * PAGE as u64).sum()
    }

    /// The source's regions.
    pub(crate) fn leave(&self, setup: &mut SourceSetup) {
        for region in &self.regions {
            let file = region.file.as_ref().expect("a source's memory is a file");
            setup.region(&region.name, file.as_fd()).expect("a memory file");
        }
    }

    /// The destination's regions.
    pub(crate) fn arrive(&self, setup: &mut DestinationSetup) {
        for region in &self.regions {
            let memory = Memory {
                start: region.start,
                bytes: region.pages * PAGE as u64,
                file: region.file.as_ref().map(AsFd::as_fd),
            };
            // SAFETY: reached through volatile accesses alone, and mapped for the guest's lifetime, which the owner of
            // the setup guarantees.
            unsafe { setup.region(&region.name, &memory) }.expect("fresh memory");
        }
    }
}

/// The work of a guest's threads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Habits {
    pub(crate) threads: u64,
    /// Accesses of each thread; None is endless.
    pub(crate) accesses: Option<u64>,
    /// Of a hundred accesses.
    pub(crate) writes: u64,
    pub(crate) discards: u64,
}

/// Running threads of a guest.
pub(crate) struct Running {
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Running {
    pub(crate) fn start(guest: &Arc<Guest>, habits: Habits, seed: u64) -> Running {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = |index: u64| {
            let (guest, stop) = (guest.clone(), stop.clone());
            let random = Random::of(seed, 1000 + index);
            std::thread::spawn(move || run(&guest, habits, index, random, &stop))
        };
        Running { threads: (0..habits.threads).map(thread).collect(), stop }
    }

    /// Waits until their accesses are done.
    pub(crate) fn join(self) {
        self.threads
            .into_iter()
            .for_each(|thread| thread.join().expect("the thread does not panic"));
    }

    /// Stops after the current access of each.
    pub(crate) fn stop(self) {
        self.stop.store(true, SeqCst);
        self.join();
    }
}

/// Reads, writes and discards pages of this thread.
fn run(guest: &Guest, habits: Habits, index: u64, mut random: Random, stop: &AtomicBool) {
    let mut accesses = 0;
    while habits.accesses.is_none_or(|limit| accesses < limit) && !stop.load(Relaxed) {
        accesses += 1;
        let (region, page) = guest.any(&mut random);
        if page / STRIPE % habits.threads != index {
            continue;
        }
        if guest.abandoned.load(SeqCst) {
            return;
        }
        match random.below(100) {
            drawn if drawn < habits.discards => {
                let first = page - page % STRIPE;
                let pages = STRIPE.min(guest.regions[region].pages - first);
                guest.regions[region].discard(first, pages);
                for page in first..first + pages {
                    guest.model.version(region, page).store(0, Relaxed);
                }
            }
            drawn if drawn < habits.discards + habits.writes => {
                // Half of the times the old contents are checked first.
                if random.percent(50) {
                    guest.check(region, page);
                }
                guest.write(region, page);
            }
            _ => guest.check(region, page),
        }
    }
}
