//! Words of state that many threads change, and after a takeover the next process too: on the heap,
//! or in a memory file that outlives this process.
//!
//! # The memory file of a destination
//!
//! The guest's side holds it (`session` on the hand-over socket), so that it lives exactly as long
//! as the guest whose pages it describes. Its layout follows from the regions alone ([`Extent`]):
//!
//! ```text
//! counters  8 words          totals received, the page that is being given, the progress of the switchover
//! events    4 KiB a source   the buffer for the kernel's events of each userfaultfd
//! per region:
//!   states  2 bits a page    as in pages.rs
//!   parts   1 bit a guest page, where a landing unit is several: its discarded pages
//! ```
//!
//! # Killed at any moment
//!
//! | killed | what the next process finds and does |
//! |---|---|
//! | while a page lands | Landing: partial bytes are freed, *then* the page is Missing ([`PageStates::roll_back`]) |
//! | after the page was copied in (UFFDIO_COPY), before Cached | Landing, so Missing: it is sent again, and EEXIST keeps the guest's writes |
//! | after a page of a file was given (UFFDIO_COPY), before Cached | the page is named in the counters, and the file has it: Cached |
//! | before it was given, or after the kernel refused | the page is named, and the file does not have it: Landing, as above |
//! | after Cached, before its waiters were woken | all waiters are woken: they fault again, and the page becomes visible |
//! | after a block's last page, before it left the userfaultfd | every complete block leaves again, without effect the second time |
//! | after a fault was read, before the page was requested | all waiters are woken, and fault again |
//! | after a discard was read, before it was recorded | the event is in the file: it is recorded then, twice without harm |
//! | after a discarded page arrived, before it was freed | Discarded: it is sent again, and freed before it is Cached |
//! | private: anywhere between Cached and released | made visible, touched and released again: none of that changes the guest's private copies |
//!
//! The kernel takes an event from its queue and copies it in one system call, which a signal does
//! not interrupt; the pages of the buffer are present already, and locked as far as that is
//! allowed.
//!
//! [`PageStates::roll_back`]: super::pages::PageStates::roll_back

use std::fs::{File, OpenOptions};
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap, munmap};
use umem_ring::Span;

use super::sync::AtomicU64;
use crate::error::{Context, Error, Result};

/// Bytes of a userfaultfd's events in the file: at most those of one read.
pub(crate) const EVENTS_BYTES: usize = 4096;

/// Bytes before the events: the counters.
const HEAD_BYTES: usize = 4096;

/// Words of counters.
pub(crate) const COUNTERS: usize = 8;

/// Words, all zero at first.
pub(crate) enum AtomicWords {
    /// This process's own.
    Heap(Box<[AtomicU64]>),
    /// A part of a mapping.
    Shared(SharedWords),
}

/// See [`AtomicWords`].
pub(crate) struct SharedWords {
    start: NonNull<AtomicU64>,
    len: usize,
    /// Keeps the mapping.
    _mapping: Arc<Mapping>,
}

// SAFETY: the address of atomics that the mapping keeps in place; atomics may be shared.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl AtomicWords {
    /// On the heap.
    pub(crate) fn zeroed(words: u64) -> AtomicWords {
        AtomicWords::Heap((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    /// In a file, which is made if it does not exist, private to this user.
    pub(crate) fn in_file(path: &Path, words: u64) -> Result<AtomicWords> {
        let what = || format!("{}", path.display());
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path).context(what)?;
        let words = usize::try_from(words).expect("state is in memory");
        file.set_len(words as u64 * 8).context(what)?;
        Ok(Mapping::of(&file, words * 8)?.words(0, words))
    }
}

impl Deref for AtomicWords {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        match self {
            AtomicWords::Heap(words) => words,
            // SAFETY: the mapping has this many words there, aligned, while it is held; other
            // holders are other processes, and accesses to atomics may race.
            AtomicWords::Shared(words) => unsafe {
                std::slice::from_raw_parts(words.start.as_ptr(), words.len)
            },
        }
    }
}

/// A shared mapping of a whole file of state.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an address and a length; its bytes are accessed only through atomics and raw pointers.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn of(file: &File, len: usize) -> Result<Arc<Mapping>> {
        let length = NonZeroUsize::new(len).expect("a file of state has a head");
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps no other mapping.
        let start = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, file, 0) }
            .context(|| "mapping the state of the guest's pages")?;
        Ok(Arc::new(Mapping { start: start.cast(), len }))
    }

    /// `len` words from byte `offset` on.
    fn words(self: &Arc<Mapping>, offset: usize, len: usize) -> AtomicWords {
        assert!(offset.is_multiple_of(8) && offset + len * 8 <= self.len);
        // SAFETY: inside the mapping, as asserted, which begins at a page.
        let start = unsafe { self.start.add(offset) }.cast();
        AtomicWords::Shared(SharedWords { start, len, _mapping: self.clone() })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping made here, and its last holder has been dropped.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

/// The size of a region: its pages (landing units), and the number of the guest's pages in each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub(crate) pages: u64,
    pub(crate) parts_per_page: u64,
}

impl Extent {
    fn state_words(self) -> u64 {
        self.pages.div_ceil(32)
    }

    fn part_words(self) -> u64 {
        match self.parts_per_page {
            1 => 0,
            parts => (self.pages * parts).div_ceil(64),
        }
    }

    fn words(self) -> u64 {
        self.state_words() + self.part_words()
    }
}

/// The state of a guest's pages, in a memory file.
pub(crate) struct State {
    pub(crate) file: File,
    mapping: Arc<Mapping>,
    extents: Vec<Extent>,
    sources: usize,
}

/// A region's share of the file.
pub(crate) struct RegionWords {
    pub(crate) states: AtomicWords,
    /// None if a landing unit is one of the guest's pages.
    pub(crate) parts: Option<AtomicWords>,
}

impl State {
    /// A new file, all zeroes, whose length is sealed.
    pub(crate) fn new(extents: Vec<Extent>, sources: usize) -> Result<State> {
        let what = || "the memory file for the state of the guest's pages";
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"umem-state", flags).context(what)?);
        file.set_len(length(&extents, sources) as u64).context(what)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).context(what)?;
        State::of(file, extents, sources)
    }

    /// A file that another process has made.
    pub(crate) fn found(file: File, extents: Vec<Extent>, sources: usize) -> Result<State> {
        let bytes = file.metadata().context(|| "the state of the guest's pages")?.len();
        let expected = length(&extents, sources) as u64;
        if bytes != expected {
            return Err(Error::Environment(format!(
                "the state of the guest's pages has {bytes} bytes, not {expected}: the guest's side or \
                 the session file is of another umem"
            )));
        }
        State::of(file, extents, sources)
    }

    fn of(file: File, extents: Vec<Extent>, sources: usize) -> Result<State> {
        let mapping = Mapping::of(&file, length(&extents, sources))?;
        let state = State { file, mapping, extents, sources };
        // Faulted in now, so that no copy of an event has to wait for a page. For a user who may
        // not lock memory they are present as well, unless memory runs out.
        for source in 0..sources {
            let events = state.events(source);
            events.touch();
            // SAFETY: inside this mapping.
            let _ =
                unsafe { mlock(NonNull::new_unchecked(events.0.as_ptr()).cast(), EVENTS_BYTES) };
        }
        Ok(state)
    }

    pub(crate) fn counters(&self) -> AtomicWords {
        self.mapping.words(0, COUNTERS)
    }

    /// The buffer for the events of a userfaultfd.
    pub(crate) fn events(&self, source: usize) -> Events {
        assert!(source < self.sources);
        let offset = HEAD_BYTES + source * EVENTS_BYTES;
        // SAFETY: inside the mapping, which the span keeps; no reference to these bytes is ever made.
        Events(unsafe {
            let start = self.mapping.start.add(offset);
            Span::new(start, EVENTS_BYTES, self.mapping.clone())
        })
    }

    pub(crate) fn region(&self, index: usize) -> RegionWords {
        let before: u64 = self.extents[..index].iter().map(|extent| extent.words()).sum();
        let extent = self.extents[index];
        let number = |words: u64| usize::try_from(words).expect("state is in memory");
        let at = HEAD_BYTES + self.sources * EVENTS_BYTES + number(before) * 8;
        let states = number(extent.state_words());
        let parts = number(extent.part_words());
        RegionWords {
            states: self.mapping.words(at, states),
            parts: (parts > 0).then(|| self.mapping.words(at + states * 8, parts)),
        }
    }
}

fn length(extents: &[Extent], sources: usize) -> usize {
    let words: u64 = extents.iter().map(|extent| extent.words()).sum();
    let bytes = usize::try_from(words).expect("state is in memory") * 8;
    (HEAD_BYTES + sources * EVENTS_BYTES + bytes).next_multiple_of(4096)
}

/// The buffer for the events of one userfaultfd: all zeroes if no event is to be carried out.
#[derive(Clone)]
pub(crate) struct Events(Span);

impl Events {
    /// For an operation of a ring.
    pub(crate) fn span(&self) -> Span {
        self.0.clone()
    }

    /// A copy of the first bytes.
    pub(crate) fn copy(&self, into: &mut [u8]) {
        assert!(into.len() <= self.0.len());
        // SAFETY: inside the span, which is mapped, and into the caller's buffer.
        unsafe { std::ptr::copy_nonoverlapping(self.0.as_ptr(), into.as_mut_ptr(), into.len()) };
    }

    /// Marks the first `bytes` bytes as carried out.
    pub(crate) fn clear(&self, bytes: usize) {
        assert!(bytes <= self.0.len());
        // SAFETY: inside the span, which is mapped writable. No operation writes there now: the next
        // one is submitted afterwards.
        unsafe { std::ptr::write_bytes(self.0.as_ptr(), 0, bytes) };
    }

    /// Faults its page in without changing it.
    fn touch(&self) {
        // SAFETY: one byte of the span, by an atomic operation.
        unsafe { std::sync::atomic::AtomicU8::from_ptr(self.0.as_ptr()) }
            .fetch_or(0, std::sync::atomic::Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::SeqCst;

    fn extents() -> Vec<Extent> {
        vec![Extent { pages: 33, parts_per_page: 1 }, Extent { pages: 5, parts_per_page: 512 }]
    }

    #[test]
    fn words_written_by_one_process_are_read_by_another() {
        let state = State::new(extents(), 2).unwrap();
        let (first, second) = (state.region(0), state.region(1));
        assert_eq!((first.states.len(), second.states.len()), (2, 1));
        assert!(first.parts.is_none());
        let parts = second.parts.unwrap();
        assert_eq!(parts.len(), 40);
        let all = [&first.states[1], &second.states[0], &parts[0], &parts[39]];
        for (value, word) in (1..).zip(all) {
            assert_eq!(word.swap(value, SeqCst), 0);
        }
        state.counters()[7].store(9, SeqCst);
        // SAFETY: inside the span, which has no other user.
        unsafe { state.events(1).span().as_ptr().add(EVENTS_BYTES - 1).write(3) };

        let file = state.file.try_clone().unwrap();
        assert!(file.set_len(1).is_err(), "the file's length is sealed");
        let found = State::found(file, extents(), 2).unwrap();
        let (first, second) = (found.region(0), found.region(1));
        let parts = second.parts.unwrap();
        let all =
            [&first.states[1], &second.states[0], &parts[0], &parts[39], &found.counters()[7]];
        assert_eq!(all.map(|word| word.load(SeqCst)), [1, 2, 3, 4, 9]);
        assert_eq!(first.states[0].load(SeqCst), 0);
        let mut bytes = [0; EVENTS_BYTES];
        found.events(0).copy(&mut bytes);
        assert_eq!(bytes, [0; EVENTS_BYTES]);
        found.events(1).copy(&mut bytes);
        assert_eq!(bytes[EVENTS_BYTES - 1], 3);
        found.events(1).clear(EVENTS_BYTES);
        state.events(1).copy(&mut bytes);
        assert_eq!(bytes, [0; EVENTS_BYTES]);
    }

    #[test]
    fn state_of_another_guest_is_refused() {
        let state = State::new(extents(), 2).unwrap();
        let error = State::found(state.file.try_clone().unwrap(), extents(), 3).err().unwrap();
        assert!(error.to_string().contains("bytes"), "{error}");
    }
}
