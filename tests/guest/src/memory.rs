//! The checked memory: one anonymous mapping, and for each page its generation and a lock.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, Ordering};

const PAGE_SIZE: usize = 4096;
const WORDS: u64 = (PAGE_SIZE / size_of::<u64>()) as u64;

/// 2^64 divided by the golden ratio, odd.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// In a page's state: a thread is checking or writing it. The other bits are its generation.
const LOCKED: u32 = 1 << 31;

pub(crate) struct Memory {
    words: *mut u64,
    /// One a page: generation and lock bit.
    states: Vec<AtomicU32>,
    seed: u64,
}

// SAFETY: a page's words are only reached through a `Page`, and its lock bit lets one exist at a time.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

/// The result of a check: the first wrong word, and the number of wrong words.
pub(crate) struct Wrong {
    pub(crate) word: u64,
    pub(crate) want: u64,
    pub(crate) got: u64,
    pub(crate) count: u64,
}

impl Memory {
    pub(crate) fn new(mib: u64, seed: u64) -> Result<Self, String> {
        let pages = mib as usize * (1 << 20) / PAGE_SIZE;
        if pages == 0 {
            return Err("umem.mib is zero".into());
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let words = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                pages * PAGE_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if words == libc::MAP_FAILED {
            return Err(format!("mmap of {mib} MiB: {}", std::io::Error::last_os_error()));
        }
        let states = std::iter::repeat_with(AtomicU32::default).take(pages).collect();
        Ok(Memory { words: words.cast(), states, seed })
    }

    pub(crate) fn pages(&self) -> u64 {
        self.states.len() as u64
    }

    /// Writes every page's first contents, on all processors.
    pub(crate) fn fill(&self) {
        let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
        std::thread::scope(|scope| {
            for index in 0..threads {
                scope.spawn(move || {
                    for page in (index..self.pages()).step_by(threads as usize) {
                        self.lock(page).rewrite();
                    }
                });
            }
        });
    }

    /// Waits for the page; its holder may be waiting for its arrival.
    pub(crate) fn lock(&self, page: u64) -> Page<'_> {
        let state = &self.states[page as usize];
        loop {
            let before = state.fetch_or(LOCKED, Ordering::Acquire);
            if before & LOCKED == 0 {
                // SAFETY: the page is one of the mapping's, so it lies inside of it.
                let words = unsafe { self.words.add((page * WORDS) as usize) };
                let contents = self.seed ^ mix(page);
                return Page { words, state, generation: before, contents, memory: PhantomData };
            }
            std::thread::yield_now();
        }
    }
}

/// A locked page, until it is dropped.
pub(crate) struct Page<'a> {
    words: *mut u64,
    state: &'a AtomicU32,
    generation: u32,
    /// The key that distinguishes this page's words from all others.
    contents: u64,
    memory: PhantomData<&'a Memory>,
}

impl Page<'_> {
    /// Reads one word, so that a missing page must arrive.
    pub(crate) fn touch(&self) {
        // SAFETY: the page is mapped and locked by this thread; volatile, so that the read is made.
        unsafe { self.words.read_volatile() };
    }

    /// Compares every word.
    pub(crate) fn check(&self) -> Result<(), Wrong> {
        let mut wrong: Option<Wrong> = None;
        for (word, want) in self.expected() {
            // SAFETY: `word` is below WORDS; the page is mapped and locked by this thread.
            let got = unsafe { self.words.add(word as usize).read_volatile() };
            if got != want {
                wrong.get_or_insert(Wrong { word, want, got, count: 0 }).count += 1;
            }
        }
        wrong.map_or(Ok(()), Err)
    }

    /// Writes the words of the page's next generation.
    pub(crate) fn rewrite(&mut self) {
        self.generation = (self.generation + 1) & !LOCKED;
        for (word, value) in self.expected() {
            // SAFETY: as in `check`.
            unsafe { self.words.add(word as usize).write_volatile(value) };
        }
    }

    fn expected(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let base = mix(self.contents.wrapping_add(u64::from(self.generation)));
        (0..WORDS).map(move |word| (word, base ^ word.wrapping_mul(GOLDEN)))
    }
}

impl Drop for Page<'_> {
    fn drop(&mut self) {
        self.state.store(self.generation, Ordering::Release);
    }
}

/// The finaliser of splitmix64: every bit of the input changes about half of the output's.
pub(crate) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(GOLDEN);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
