//! One guest with regions of different kinds and page sizes, handed over in another order than the source's. The guest
//! is this test's own process.

mod support;

use std::fs::File;
use std::io::{IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use support::{HugePages, Scratch, Umem};

const MIB: usize = 1 << 20;

/// A mapping that is never unmapped: the process ends with the test.
struct Memory {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory, accessed with volatile reads only.
unsafe impl Send for Memory {}

impl Memory {
    fn map(bytes: usize, flags: i32, file: Option<BorrowedFd<'_>>) -> Memory {
        let descriptor = file.map_or(-1, |file| file.as_raw_fd());
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, descriptor, 0) };
        assert_ne!(start, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Memory { start: start.cast(), bytes }
    }

    /// Reads all of it, from its end to its beginning: the thread waits for every missing page.
    fn read(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..self.bytes)
            .rev()
            // SAFETY: inside the mapping; volatile, as umem fills it.
            .map(|at| unsafe { self.start.add(at).read_volatile() })
            .collect();
        bytes.reverse();
        bytes
    }

    fn piece(&self, name: &str, kind: &str, page_size: usize, more: bool) -> String {
        format!(
            r#"{{"name":"{name}","kind":"{kind}","base_host_virt_addr":{},"size":{},"offset":0,
            "page_size":{page_size},"more":{more}}}"#,
            self.start.addr(),
            self.bytes
        )
    }
}

const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
const MODE_MISSING: u64 = 1;
const MODE_MINOR: u64 = 4;

/// Of `linux/userfaultfd.h`, with its structures as words.
#[allow(missing_docs, clippy::missing_safety_doc, reason = "made by nix's macros")]
mod ioctl {
    nix::ioctl_readwrite!(api, 0xaa, 0x3f, [u64; 3]);
    nix::ioctl_readwrite!(register, 0xaa, 0x00, [u64; 4]);
}

fn userfaultfd(features: u64) -> OwnedFd {
    // SAFETY: a system call without pointers.
    let number = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let number = i32::try_from(number).expect("descriptors are small");
    assert!(number >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just made it for this process.
    let uffd = unsafe { OwnedFd::from_raw_fd(number) };
    let mut api = [0xaa, features, 0];
    // SAFETY: the argument has the layout of `struct uffdio_api`.
    unsafe { ioctl::api(uffd.as_raw_fd(), &mut api) }.expect("these features");
    uffd
}

fn register(uffd: &OwnedFd, memory: &Memory, mode: u64) {
    let mut range = [memory.start.addr() as u64, memory.bytes as u64, mode, 0];
    // SAFETY: the argument has the layout of `struct uffdio_register`.
    unsafe { ioctl::register(uffd.as_raw_fd(), &mut range) }.expect("the memory can be registered");
}

fn hand_over(socket: &UnixStream, pieces: &[String], descriptors: &[i32]) {
    let text = format!("[{}]", pieces.join(","));
    let rights = [ControlMessage::ScmRights(descriptors)];
    let text = [IoSlice::new(text.as_bytes())];
    sendmsg::<()>(socket.as_raw_fd(), &text, &rights, MsgFlags::empty(), None).expect("sent");
}

/// Pages of data, of zeroes, and holes.
fn write_region(path: &Path, bytes: usize, seed: u8) -> Vec<u8> {
    let mut contents = vec![0; bytes];
    for (number, page) in contents.chunks_mut(4096).enumerate() {
        if number % 5 != 0 {
            page.iter_mut().enumerate().for_each(|(at, byte)| {
                *byte = (number as u8).wrapping_mul(31).wrapping_add(at as u8) ^ seed;
            });
        }
    }
    File::create(path).expect("a file").write_all(&contents).expect("room");
    contents
}

/// The kernel accepts no range across mappings, or one that is unmapped in part.
#[test]
fn split_mapping_keeps_its_remaining_pages() {
    let scratch = Scratch::new();
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let memory = Memory::map(3 * MIB, private, None);
    let uffd = userfaultfd(FEATURE_EVENT_REMOVE);
    register(&uffd, &memory, MODE_MISSING);
    let page = |number: usize| memory.start.wrapping_add(number * 4096).cast();
    for number in [21, 201, 333] {
        // SAFETY: a page of our own mapping; its dump flag changes.
        let advised = unsafe { libc::madvise(page(number), 4096, libc::MADV_DONTDUMP) };
        assert_eq!(advised, 0);
    }
    const GONE: [usize; 3] = [70, 71, 500];
    for number in GONE {
        // SAFETY: a page of our own mapping, which has no reader from here on.
        assert_eq!(unsafe { libc::munmap(page(number), 4096) }, 0);
    }

    let handoff = scratch.path("handoff").display().to_string();
    let mut incoming =
        Umem::start(["incoming", "--json", "--handoff", &handoff, "tcp:127.0.0.1:0"]);
    let uri = incoming.event("listening")["uri"].as_str().expect("a URI").to_owned();
    let socket = UnixStream::connect(&handoff).expect("umem listens");
    hand_over(&socket, &[memory.piece("ram", "anonymous", 4096, false)], &[uffd.as_raw_fd()]);
    let path = scratch.ram("ram");
    let expected = write_region(&path, 3 * MIB, 4);
    let ram = format!("ram={}", path.display());
    let mut migrate = Umem::start(["migrate", "-p", "--json", "--ram", &ram, &uri]);
    incoming.event("completed");
    migrate.event("completed");
    for number in (0..3 * MIB / 4096).filter(|number| !GONE.contains(number)) {
        let at = number * 4096;
        let there = Memory { start: page(number).cast(), bytes: 4096 }.read();
        assert!(there == expected[at..at + 4096], "page {number} differs");
    }
    migrate.succeeds();
    incoming.succeeds();
}

/// The process maps huge pages without a reservation (MAP_NORESERVE), and the pool has too few of them.
#[test]
fn empty_huge_page_pool_pauses_both_sides_until_it_is_filled() {
    const LACKING: u64 = 2;
    let scratch = Scratch::new();
    let mut room = HugePages::reserve(2);
    let pages = HugePages::free() + LACKING;
    let bytes = usize::try_from(pages).expect("few") * 2 * MIB;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_NORESERVE;
    let memory = Memory::map(bytes, flags, None);
    let uffd = userfaultfd(FEATURE_EVENT_REMOVE | FEATURE_MISSING_HUGETLBFS);
    register(&uffd, &memory, MODE_MISSING);
    let handoff = scratch.path("handoff").display().to_string();
    let mut incoming =
        Umem::start(["incoming", "--json", "--handoff", &handoff, "tcp:127.0.0.1:0"]);
    let uri = incoming.event("listening")["uri"].as_str().expect("a URI").to_owned();
    let socket = UnixStream::connect(&handoff).expect("umem listens");
    let piece = memory.piece("huge", "anonymous", 2 * MIB, false);
    hand_over(&socket, &[piece], &[uffd.as_raw_fd()]);
    let path = scratch.ram("huge");
    let expected = write_region(&path, bytes, 5);
    let ram = format!("huge={}", path.display());
    let mut migrate = Umem::start(["migrate", "-p", "--json", "--ram", &ram, &uri]);
    let short = incoming.event("short");
    assert_eq!(short["missing_bytes"], LACKING * 2 * MIB as u64, "{short}");
    migrate.event("short");
    assert!(incoming.is_running() && migrate.is_running());
    room.grow(LACKING);
    incoming.event("completed");
    migrate.event("completed");
    assert!(memory.read() == expected, "the memory differs");
    migrate.succeeds();
    incoming.succeeds();
}

#[test]
fn guest_with_mixed_kinds_and_page_sizes_moves() {
    let scratch = Scratch::new();
    let _room = HugePages::reserve(4);
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let small = Memory::map(3 * MIB, private, None);
    let huge = Memory::map(8 * MIB, private | libc::MAP_HUGETLB, None);
    let file = memfd_create(c"umem-test-regions", MFdFlags::MFD_CLOEXEC).expect("a file");
    let file = File::from(file);
    file.set_len(5 * MIB as u64).expect("room");
    let shared = Memory::map(5 * MIB, libc::MAP_SHARED, Some(file.as_fd()));

    let uffd = userfaultfd(FEATURE_EVENT_REMOVE | FEATURE_MISSING_HUGETLBFS);
    register(&uffd, &small, MODE_MISSING);
    register(&uffd, &huge, MODE_MISSING);
    let minor = userfaultfd(FEATURE_EVENT_REMOVE | FEATURE_MISSING_SHMEM | FEATURE_MINOR_SHMEM);
    register(&minor, &shared, MODE_MISSING | MODE_MINOR);

    let handoff = scratch.path("handoff").display().to_string();
    let mut incoming =
        Umem::start(["incoming", "--json", "--handoff", &handoff, "tcp:127.0.0.1:0"]);
    let uri = incoming.event("listening")["uri"].as_str().expect("a URI").to_owned();
    let socket = UnixStream::connect(&handoff).expect("umem listens");
    let anonymous = [
        small.piece("small", "anonymous", 4096, true),
        huge.piece("huge", "anonymous", 2 * MIB, true),
    ];
    hand_over(&socket, &anonymous, &[uffd.as_raw_fd()]);
    let pieces = [shared.piece("shared", "shared", 4096, false)];
    hand_over(&socket, &pieces, &[minor.as_raw_fd(), file.as_raw_fd()]);

    // A thread may be in the kernel when the test has failed, but the process's end ends it too.
    let readers = [("shared", shared), ("huge", huge), ("small", small)]
        .map(|(name, memory)| (name, std::thread::spawn(move || memory.read())));
    let mut expected = Vec::new();
    let mut words: Vec<String> = ["migrate", "-p", "--json"].map(str::to_owned).to_vec();
    for (name, mib, seed) in [("shared", 5, 1), ("huge", 8, 2), ("small", 3, 3)] {
        let path = scratch.ram(name);
        expected.push(write_region(&path, mib * MIB, seed));
        words.extend(["--ram".into(), format!("{name}={}", path.display())]);
    }
    words.push(uri);
    let mut migrate = Umem::start(words);
    for ((name, reader), expected) in readers.into_iter().zip(&expected) {
        assert!(&reader.join().expect("the thread does not panic") == expected, "{name} differs");
    }
    assert_eq!(incoming.event("completed")["kind"], "anonymous,shared");
    migrate.event("completed");
    migrate.succeeds();
    incoming.succeeds();
}
