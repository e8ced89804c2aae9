//! Words of state that many threads change, and, where a session can be taken over, the next process
//! too: on the heap, or in a memory file that outlives this process.
//!
//! # The memory file of a destination
//!
//! The guest's side holds it (`session` on the hand-over socket), so that it lives exactly as long as
//! the guest whose pages it speaks of. Its layout follows from the regions alone ([`Extent`]):
//!
//! ```text
//! counters  8 words          what has come, the page that is being given, how far the switchover has come
//! events    4 KiB a source   what the kernel reports on each userfaultfd is read into here
//! per region:
//!   states  2 bits a page    as in pages.rs
//!   parts   1 bit a guest page, where a landing unit is several: what of it has been discarded
//! ```
//!
//! # Killed at any moment
//!
//! | killed | what the next process finds and does |
//! |---|---|
//! | while a page lands | Landing: what came in part goes back, *then* the page is Missing ([`PageStates::roll_back`]) |
//! | after the page was copied in (UFFDIO_COPY), before Cached | Landing, so Missing: it comes again, and EEXIST keeps what the guest has written |
//! | after a page of a file was given (UFFDIO_COPY), before Cached | the page is named in the counters, and the file has it: Cached |
//! | before it was given, or as the kernel refused | the page is named, and the file does not have it: Landing, as above |
//! | after Cached, before whoever waits was woken | all waiters are woken: they fault again, and are shown the page |
//! | after a block's last page, before it left the userfaultfd | every complete block leaves again, which does nothing the second time |
//! | after a fault was read, before it was asked for | all waiters are woken, and fault again |
//! | after a discard was read, before it was noted | the event lies in the file: it is noted then. Noting it twice is noting it once |
//! | after a discarded page came, before it was given back | Discarded: it comes again, and is given back before it is Cached |
//! | private: anywhere between Cached and released | shown, touched and released again: what the guest has made its own is not changed by any of that |
//!
//! The kernel takes an event from its queue and copies it in one system call, which a signal does not
//! divide; the pages that it copies to are there already and locked, as far as that is allowed.
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

/// Bytes of a userfaultfd's events in the file: those of one read, at most.
pub(crate) const EVENTS_BYTES: usize = 4096;

/// Bytes before the events: the counters.
const HEAD_BYTES: usize = 4096;

/// Words of counters.
pub(crate) const COUNTERS: usize = 8;

/// Some words, all of them zero at first.
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
    /// Keeps them mapped.
    _mapping: Arc<Mapping>,
}

// SAFETY: an address of atomics that the mapping keeps in place; they are shared by nature.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl AtomicWords {
    /// On the heap.
    pub(crate) fn zeroed(words: u64) -> AtomicWords {
        AtomicWords::Heap((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    /// In a file, which is made if it is not there, for this user alone.
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
            // SAFETY: the mapping has so many words there, aligned, for as long as it is held; whoever
            // else has it mapped is another process, and accesses to atomics may race with anything.
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

// SAFETY: an address and a length; what is there is reached through atomics and raw pointers alone.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn of(file: &File, len: usize) -> Result<Arc<Mapping>> {
        let length = NonZeroUsize::new(len).expect("a file of state has a head");
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing of ours.
        let start = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, file, 0) }
            .context(|| "mapping the state of the guest's pages")?;
        Ok(Arc::new(Mapping { start: start.cast(), len }))
    }

    /// Words from this byte on.
    fn words(self: &Arc<Mapping>, offset: usize, len: usize) -> AtomicWords {
        assert!(offset.is_multiple_of(8) && offset + len * 8 <= self.len);
        // SAFETY: inside the mapping, as asserted, which begins at a page.
        let start = unsafe { self.start.add(offset) }.cast();
        AtomicWords::Shared(SharedWords { start, len, _mapping: self.clone() })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and its last holder has gone.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

/// What a region needs: its pages (landing units), and how many of the guest's pages each is.
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
    /// None where a page is one of the guest's.
    pub(crate) parts: Option<AtomicWords>,
}

impl State {
    /// A new one, all zeroes, whose length nobody can change.
    pub(crate) fn new(extents: Vec<Extent>, sources: usize) -> Result<State> {
        let what = || "a memory file for the state of the guest's pages";
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"umem-state", flags).context(what)?);
        file.set_len(length(&extents, sources) as u64).context(what)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).context(what)?;
        State::of(file, extents, sources)
    }

    /// One that another process has made.
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
        // There from now on, so that no copy of an event has to wait for a page. A user who may lock
        // nothing has them in memory all the same, unless it runs out.
        for source in 0..sources {
            let events = state.events(source);
            events.touch();
            // SAFETY: inside our own mapping.
            let _ =
                unsafe { mlock(NonNull::new_unchecked(events.0.as_ptr()).cast(), EVENTS_BYTES) };
        }
        Ok(state)
    }

    pub(crate) fn counters(&self) -> AtomicWords {
        self.mapping.words(0, COUNTERS)
    }

    /// Where the events of a userfaultfd are read into.
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

/// Where the events of one userfaultfd are read into: all zeroes where nothing is to be carried out.
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
        // SAFETY: inside the span, which is mapped, and into a buffer of our own.
        unsafe { std::ptr::copy_nonoverlapping(self.0.as_ptr(), into.as_mut_ptr(), into.len()) };
    }

    /// The first so many bytes have been carried out.
    pub(crate) fn clear(&self, bytes: usize) {
        assert!(bytes <= self.0.len());
        // SAFETY: inside the span, which is mapped writable. No operation writes there now: the next
        // one is submitted afterwards.
        unsafe { std::ptr::write_bytes(self.0.as_ptr(), 0, bytes) };
    }

    /// Has its page in memory, and changes nothing.
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
    fn what_one_process_has_written_another_finds() {
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
        // SAFETY: inside the span, which nobody else has.
        unsafe { state.events(1).span().as_ptr().add(EVENTS_BYTES - 1).write(3) };

        let file = state.file.try_clone().unwrap();
        assert!(file.set_len(1).is_err(), "its length is sealed");
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
