//! Rings, pairs of sockets and mappings for the tests.

use std::any::Any;
use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::{Duration, Instant};

use umem_ring::{Completion, Config, Fd, Memory, Outcome, Ring, Span, Wait};

/// Longer than any step of the tests takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn ring() -> Ring {
    Ring::new(&Config::default()).expect("a ring")
}

pub(crate) fn ring_of(ops_max: u32, entries: u32) -> Ring {
    let config = Config { ops_max, entries, ..Config::default() };
    Ring::new(&config).expect("a ring")
}

/// Enters until there are `count` completions.
pub(crate) fn collect(ring: &mut Ring, count: usize) -> Vec<Completion> {
    let start = Instant::now();
    let mut completions = Vec::new();
    loop {
        while completions.len() < count
            && let Some(completion) = ring.next()
        {
            completions.push(completion);
        }
        if completions.len() >= count {
            return completions;
        }
        let left = PATIENCE.checked_sub(start.elapsed());
        let left = left
            .unwrap_or_else(|| panic!("{count} completions expected, received: {completions:#?}"));
        ring.enter(Wait::OneFor(left)).expect("enter");
    }
}

/// Enters until there is a completion.
pub(crate) fn one(ring: &mut Ring) -> Completion {
    collect(ring, 1).remove(0)
}

/// Enters until nothing is in flight.
pub(crate) fn settle(ring: &mut Ring) -> Vec<Completion> {
    let start = Instant::now();
    let mut completions = Vec::new();
    loop {
        completions.extend(std::iter::from_fn(|| ring.next()));
        if ring.in_flight() == 0 {
            return completions;
        }
        assert!(start.elapsed() < PATIENCE, "{} unexpected completions", ring.in_flight());
        ring.enter(Wait::OneFor(PATIENCE)).expect("enter");
    }
}

/// Submits the queue and returns the completions available at once.
pub(crate) fn poke(ring: &mut Ring) -> Vec<Completion> {
    ring.enter(Wait::No).expect("enter");
    std::iter::from_fn(|| ring.next()).collect()
}

pub(crate) fn tokens(completions: &[Completion]) -> Vec<u64> {
    completions.iter().map(|completion| completion.token).collect()
}

pub(crate) fn outcomes(completions: &[Completion]) -> Vec<Outcome> {
    completions.iter().map(|completion| completion.outcome).collect()
}

/// The bytes of a returned buffer.
pub(crate) fn bytes(completion: Completion) -> Vec<u8> {
    let memory = completion.memory.expect("memory");
    memory.into_bytes().expect("bytes").into_vec()
}

/// One end for the ring, one for the test.
pub(crate) fn pair() -> (Fd, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    (Fd::from(OwnedFd::from(ours)), theirs)
}

/// The same over TCP on loopback; unix sockets have no zero copy.
pub(crate) fn tcp_pair() -> (Fd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("an address");
    let ours = TcpStream::connect(address).expect("connect");
    let (theirs, _) = listener.accept().expect("accept");
    (Fd::from(OwnedFd::from(ours)), theirs)
}

/// Limits the unread bytes that a connection's end accepts from now on.
pub(crate) fn small_window(end: &TcpStream) {
    let bytes: libc::c_int = 32 << 10;
    // SAFETY: the option reads four bytes from a local variable that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            end.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUF,
            (&raw const bytes).cast(),
            size_of_val(&bytes) as libc::socklen_t,
        )
    };
    assert_eq!(result, 0);
}

pub(crate) fn memfd(len: u64) -> File {
    // SAFETY: the name is a literal with its final zero.
    let fd = unsafe { libc::memfd_create(c"umem-ring".as_ptr(), libc::MFD_CLOEXEC) };
    let file = File::from(owned(fd));
    file.set_len(len).expect("a length");
    file
}

pub(crate) fn pipe() -> (OwnedFd, OwnedFd) {
    let mut fds = [-1; 2];
    // SAFETY: the kernel writes two numbers.
    let result = unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    (owned(fds[0]), owned(fds[1]))
}

pub(crate) fn eventfd() -> File {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    File::from(owned(fd))
}

/// A descriptor that a system call has just made.
pub(crate) fn owned(fd: i32) -> OwnedFd {
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the descriptor is new and has no other owner.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A mapping, unmapped when its last span is dropped.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an address and a length; the tests touch it while no operation does.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn anonymous(len: usize) -> Arc<Mapping> {
        Mapping::new(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    pub(crate) fn shared(file: &File, len: usize) -> Arc<Mapping> {
        Mapping::new(len, libc::MAP_SHARED, file.as_raw_fd())
    }

    pub(crate) fn span(self: &Arc<Self>) -> Span {
        let owner: Arc<dyn Any + Send + Sync> = self.clone();
        // SAFETY: the mapping lives until the owner is dropped, and no reference to it exists.
        unsafe { Span::new(self.start, self.len, owner) }
    }

    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    pub(crate) fn fill(&self, bytes: &[u8]) {
        assert!(bytes.len() <= self.len);
        // SAFETY: inside the mapping, and no operation uses it now.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.as_ptr(), bytes.len()) };
    }

    pub(crate) fn read(&self, len: usize) -> Vec<u8> {
        assert!(len <= self.len);
        let mut bytes = vec![0xa5; len];
        // SAFETY: inside the mapping, and no operation uses it now.
        unsafe { ptr::copy_nonoverlapping(self.start.as_ptr(), bytes.as_mut_ptr(), len) };
        bytes
    }

    fn new(len: usize, flags: i32, fd: i32) -> Arc<Mapping> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, access, flags, fd, 0) };
        assert_ne!(start, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Arc::new(Mapping { start: NonNull::new(start.cast()).expect("not null"), len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the last owner is dropped, so no span and no operation uses the mapping.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// A small generator, so that a seed repeats a failing run.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }

    pub(crate) fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

pub(crate) fn memory_len(memory: &Option<Memory>) -> Option<usize> {
    memory.as_ref().map(Memory::len)
}
