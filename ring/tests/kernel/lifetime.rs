//! The lifetime of memory and descriptors, and the end of a ring.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use umem_ring::{Bytes, Chain, Error, Fd, Op, Outcome, Wait};

use crate::util::*;

#[test]
fn memory_and_descriptor_are_held_until_the_operation_ends() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let Fd::Owned(socket) = &fd else { panic!("a descriptor") };
    let socket = Arc::clone(socket);
    let mapping = Mapping::anonymous(4096);
    ring.submit(Op::recv(fd, mapping.span()), 0).expect("room");
    assert_eq!((Arc::strong_count(&mapping), Arc::strong_count(&socket)), (2, 2));
    ring.enter(Wait::No).expect("enter");
    peer.write_all(b"data").expect("write");
    ring.enter(Wait::One).expect("enter");
    assert_eq!((Arc::strong_count(&mapping), Arc::strong_count(&socket)), (2, 2));
    let completion = ring.next().expect("the operation has ended");
    assert_eq!((Arc::strong_count(&mapping), Arc::strong_count(&socket)), (2, 1));
    drop(completion);
    assert_eq!(Arc::strong_count(&mapping), 1);
}

#[test]
fn close_ends_everything_in_flight() {
    let mut ring = ring();
    let waker = ring.waker().expect("a waker");
    let (fd, mut peer) = pair();
    let mapping = Mapping::anonymous(4096);
    let (out, into) = pipe();
    let span = |at| mapping.span().sub(at, 16).expect("inside");
    ring.submit(Op::recv(fd.clone(), Bytes::with_capacity(16)), 0).expect("room");
    ring.submit(Op::recv(fd.clone(), span(0)).wait_all(), 1).expect("room");
    ring.submit(Op::poll(fd.clone(), libc::POLLIN as u32).multishot(), 2).expect("room");
    ring.submit(Op::timeout(Duration::from_secs(3600)), 3).expect("room");
    ring.submit(Op::splice(fd.clone(), into, 8), 4).expect("room");
    let chain = Chain::new()
        .then(Op::recv(fd.clone(), span(16)).wait_all(), 5)
        .then(Op::recv(fd.clone(), span(32)).wait_all(), 6)
        .then(Op::recv(fd, span(48)).wait_all(), 7);
    ring.submit_chain(chain).expect("room");
    ring.enter(Wait::No).expect("enter");
    assert_eq!((ring.in_flight(), Arc::strong_count(&mapping)), (8, 5));
    ring.close(PATIENCE).expect("everything ends in time");
    assert_eq!(Arc::strong_count(&mapping), 1);
    assert_eq!(peer.read(&mut [0; 1]).expect("read"), 0, "the descriptor was closed");
    waker.wake();
    drop(out);
}

#[test]
fn drop_ends_everything_in_flight() {
    let mapping = Mapping::anonymous(4096);
    let (fd, mut peer) = pair();
    let mut ring = ring();
    ring.submit(Op::recv(fd.clone(), mapping.span()).wait_all(), 0).expect("room");
    ring.enter(Wait::No).expect("enter");
    // One more that the kernel has not seen, and one whose completion is not read.
    ring.submit(Op::recv(fd, mapping.span()), 1).expect("room");
    ring.submit(Op::nop(), 2).expect("room");
    drop(ring);
    assert_eq!(Arc::strong_count(&mapping), 1);
    assert_eq!(peer.read(&mut [0; 1]).expect("read"), 0, "the descriptor was closed");
}

#[test]
fn idle_ring_closes_at_once() {
    ring().close(Duration::ZERO).expect("nothing in flight");
    drop(ring());
}

#[test]
fn unread_completions_are_dropped_with_the_ring() {
    let mapping = Mapping::anonymous(4096);
    let (fd, mut peer) = pair();
    let mut ring = ring();
    ring.submit(Op::recv(fd, mapping.span()), 0).expect("room");
    peer.write_all(b"data").expect("write");
    ring.enter(Wait::One).expect("enter");
    ring.close(PATIENCE).expect("close");
    assert_eq!(Arc::strong_count(&mapping), 1);
}

/// A page fault that waits for a userfaultfd handler cannot be cancelled: the only operation of
/// this project that may outlast a ring.
#[test]
fn operation_that_outlasts_the_ring_is_leaked_and_named() {
    let mapping = Mapping::anonymous(4096);
    let Some(uffd) = faults_wait(&mapping) else {
        eprintln!("skipped: userfaultfd is not permitted here");
        return;
    };
    let mut ring = ring();
    ring.submit(Op::madvise(mapping.span(), libc::MADV_POPULATE_WRITE), 0).expect("room");
    ring.enter(Wait::No).expect("enter");
    await_fault(&uffd);
    let error = ring.close(Duration::from_millis(50)).expect_err("the fault waits");
    assert!(matches!(&error, Error::LeftOver { count: 1, .. }), "{error}");
    assert!(error.to_string().contains("madvise 1"), "{error}");
    assert_eq!(Arc::strong_count(&mapping), 2, "leaked, not freed under the kernel");
    // The fault goes on without a handler, and the worker ends.
    drop(uffd);
}

#[test]
fn rings_can_be_made_and_closed_repeatedly() {
    for _ in 0..50 {
        let mut ring = ring();
        let (fd, _peer) = pair();
        ring.submit(Op::recv(fd, Bytes::with_capacity(64)), 0).expect("room");
        ring.submit(Op::nop(), 1).expect("room");
        assert_eq!(one(&mut ring).outcome, Outcome::Done(0));
    }
}

/// Waits until a kernel worker is in the fault; before that the operation can be cancelled.
fn await_fault(uffd: &OwnedFd) {
    let mut poll = libc::pollfd { fd: uffd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: the kernel reads and writes the structure during the call.
    let ready = unsafe { libc::poll(&raw mut poll, 1, PATIENCE.as_millis() as i32) };
    assert_eq!(ready, 1, "no fault came");
}

/// A userfaultfd that handles faults of this mapping; none where it is not permitted.
fn faults_wait(mapping: &Mapping) -> Option<OwnedFd> {
    #[repr(C)]
    struct Api {
        api: u64,
        features: u64,
        ioctls: u64,
    }
    #[repr(C)]
    struct Register {
        start: u64,
        len: u64,
        mode: u64,
        ioctls: u64,
    }
    // linux/userfaultfd.h
    const UFFD_API: u64 = 0xaa;
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
    const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

    // SAFETY: no memory is involved.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        return None;
    }
    let uffd = owned(fd as i32);
    let mut api = Api { api: UFFD_API, features: 0, ioctls: 0 };
    // SAFETY: the kernel reads and writes the structure during the call.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &raw mut api) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    let mut register = Register {
        start: mapping.address(),
        len: 4096,
        mode: UFFDIO_REGISTER_MODE_MISSING,
        ioctls: 0,
    };
    // SAFETY: as above; only the operation under test accesses the mapping.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    Some(uffd)
}
