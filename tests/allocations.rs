//! The data path allocates nothing: the number of allocations of umem's threads does not depend on the bytes moved.
//!
//! Both sides run in this process, under an allocator that counts the allocations of the threads that move pages. A
//! guest of four times the size may cost a few allocations more, as queues reach their size, and none for each batch,
//! answer or request.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use umem::embed::{DestinationSetup, Event, Memory, SourceSetup};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of umem's threads.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

impl Counting {
    fn count() {
        let mut name = [0u8; 16];
        // SAFETY: PR_GET_NAME writes 16 bytes.
        unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        if name.starts_with(b"umem-") {
            ALLOCATIONS.fetch_add(1, SeqCst);
        }
    }
}

// SAFETY: every call is forwarded to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Counting::count();
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(start, layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Counting::count();
        // SAFETY: as the caller promises.
        unsafe { System.realloc(start, layout, size) }
    }
}

const PAGE: usize = 4096;
const SMALL: usize = 8 << 20;
const LARGE: usize = 64 << 20;
/// Allowance for a larger guest: vectors that grow by doubling, a few of them on each of four threads.
const SPARE: u64 = 40;

#[test]
fn allocations_do_not_grow_with_the_guest() {
    // The first of each includes the process's one-time allocations.
    for shared in [true, false] {
        costs_no_more(|bytes| moved(bytes, shared, Rounds::None), &format!("shared: {shared}"));
    }
    // In rounds, with buffers for checksums and without.
    for rounds in [Rounds::Plain, Rounds::Checked] {
        costs_no_more(|bytes| moved(bytes, true, rounds), &format!("{rounds:?}"));
    }
}

fn costs_no_more(moved: impl Fn(usize) -> u64, what: &str) {
    moved(SMALL);
    let (small, large) = (moved(SMALL), moved(LARGE));
    assert!(small > 0, "the threads that move pages were not seen");
    assert!(
        large <= small + SPARE,
        "{large} allocations for {LARGE} bytes and {small} for {SMALL}, {what}"
    );
}

/// Whether pages are sent in rounds before the stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rounds {
    None,
    Plain,
    Checked,
}

/// Allocations while a guest of `bytes` bytes moves and is read meanwhile, every other page on demand.
fn moved(bytes: usize, shared: bool, rounds: Rounds) -> u64 {
    let source_ram = ram(bytes);
    // Runs of one, two and three pages of data, with pages of zeroes and holes between them.
    for page in 0..bytes / PAGE {
        match page % 9 {
            0 | 2 | 3 | 5 | 6 | 7 => {
                source_ram
                    .write_all_at(&[contents(page); PAGE], (page * PAGE) as u64)
                    .expect("room");
            }
            1 => source_ram.write_all_at(&[0; PAGE], (page * PAGE) as u64).expect("room"),
            _ => {}
        }
    }
    let destination_ram = shared.then(|| ram(bytes));
    let memory = map(bytes, destination_ram.as_ref());
    let (mut here, mut there) = (Vec::<OwnedFd>::new(), Vec::<OwnedFd>::new());
    for _ in 0..2 {
        let (one, other) = UnixStream::pair().expect("a pair of sockets");
        here.push(one.into());
        there.push(other.into());
    }
    let mut source = SourceSetup::new();
    source.region("ram0", source_ram.as_fd()).expect("a region");
    source.connections(here).expect("connections");
    source.checksum(rounds == Rounds::Checked);
    if rounds != Rounds::None {
        source.precopy(4, Duration::ZERO);
    }
    let mut destination = DestinationSetup::new();
    let file = destination_ram.as_ref().map(|file| file.as_fd());
    let region = Memory { start: memory.cast(), bytes: bytes as u64, file };
    // SAFETY: the mapping has no other user, and stays until the end.
    unsafe { destination.region("ram0", &region) }.expect("a region");
    destination.connections(there).expect("connections");

    let ram_of_source = source_ram.try_clone().expect("a descriptor");
    let before = ALLOCATIONS.load(SeqCst);
    let (source, destination) =
        (source.start().expect("a source"), destination.start().expect("a destination"));
    let sending = std::thread::spawn(move || {
        while let Some(event) = source.wait(None).expect("events") {
            match event {
                Event::Stop => {
                    // Pages written this late remain for the stop. These are the pages of runs that do not grow with
                    // the guest.
                    for page in (0..SMALL / PAGE).step_by(9 * 16) {
                        let offset = (page * PAGE) as u64;
                        ram_of_source.write_all_at(&[contents(page); PAGE], offset).expect("room");
                        source.written(0, offset, PAGE as u64).expect("the page exists");
                    }
                    source.stopped().expect("an answer");
                }
                Event::SaveState => source.saved(Vec::new()).expect("an answer"),
                Event::Completed(_) => return,
                Event::Failed(failure) => panic!("{}", failure.error),
                _ => {}
            }
        }
    });
    let start = memory.as_ptr() as usize;
    let mut guest = None;
    while let Some(event) = destination.wait(None).expect("events") {
        match event {
            Event::LoadState(_) => destination.loaded().expect("an answer"),
            Event::Run => {
                guest = Some(std::thread::spawn(move || check(start, bytes)));
                destination.running().expect("an answer");
            }
            Event::Completed(_) => break,
            Event::Failed(failure) => panic!("{}", failure.error),
            _ => {}
        }
    }
    sending.join().expect("the source ends well");
    guest.expect("the guest ran").join().expect("every page is right");
    let count = ALLOCATIONS.load(SeqCst) - before;
    drop(destination);
    // SAFETY: our own mapping, which has no user any more.
    unsafe { munmap(memory.cast(), bytes) }.expect("the memory is mapped");
    count
}

/// Reads a word of each page, in an order that defeats pre-paging.
fn check(start: usize, bytes: usize) {
    let pages = bytes / PAGE;
    // A stride coprime to the power of two visits all pages.
    for step in 0..pages {
        let page = step * 12_345 % pages;
        let word = (start + page * PAGE + 64) as *const u8;
        // SAFETY: inside the mapping, which stays until this thread has been joined.
        let found = unsafe { word.read_volatile() };
        let expected = if matches!(page % 9, 1 | 4 | 8) { 0 } else { contents(page) };
        assert_eq!(found, expected, "page {page}");
    }
}

fn contents(page: usize) -> u8 {
    (page % 251) as u8 + 1
}

fn ram(bytes: usize) -> File {
    let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
    file.set_len(bytes as u64).expect("room");
    file
}

fn map(bytes: usize, file: Option<&File>) -> NonNull<u8> {
    let length = bytes.try_into().expect("not zero");
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe {
        match file {
            Some(file) => mmap(None, length, protection, MapFlags::MAP_SHARED, file, 0),
            None => mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE),
        }
    };
    start.expect("room for a mapping").cast()
}
