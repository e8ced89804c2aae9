//! The data path allocates nothing once it is warm. A test binary of its own, for the allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use umem_ring::{Bytes, Config, Fd, Memory, Op, Outcome, Ring, Wait};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this thread's allocations count: the test runner's own thread allocates at any time.
    static COUNTS: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTS.get() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller keeps the contract of alloc.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of dealloc, and the pointer came from System.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn warm_data_path_allocates_nothing() {
    COUNTS.set(true);
    let mut ring = Ring::new(&Config::default()).expect("a ring");
    let (left, right) = UnixStream::pair().expect("a pair");
    let (left, right) = (Fd::from(OwnedFd::from(left)), Fd::from(OwnedFd::from(right)));
    let mut buffers = vec![Bytes::with_capacity(64), Bytes::with_capacity(64)];
    let mut pieces: Vec<Memory> = vec![Bytes::with_capacity(32).into(), vec![1; 32].into()];
    for _ in 0..10 {
        rounds(&mut ring, &left, &right, &mut buffers, &mut pieces);
    }
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for _ in 0..1000 {
        rounds(&mut ring, &left, &right, &mut buffers, &mut pieces);
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
    assert!(before > 0, "allocations are counted");
}

/// A send and a receive: alone, as a chain, and vectored.
fn rounds(
    ring: &mut Ring,
    left: &Fd,
    right: &Fd,
    buffers: &mut Vec<Bytes>,
    pieces: &mut Vec<Memory>,
) {
    let mut take = || buffers.pop().expect("a buffer");
    ring.submit(Op::send(left.clone(), take()), 0).expect("room");
    ring.submit(Op::recv(right.clone(), take()).wait_all(), 0).expect("room");
    reap(ring, 2, buffers, pieces);

    let mut take = || buffers.pop().expect("a buffer");
    let (send, receive) = (Op::send(left.clone(), take()), Op::read(right.clone(), take()));
    let chain = ring.chain().then(send, 0).then(receive, 0);
    ring.submit_chain(chain).expect("room");
    reap(ring, 2, buffers, pieces);

    let send = Op::send_vectored(left.clone(), std::mem::take(pieces));
    ring.submit(send, 0).expect("room");
    ring.submit(Op::recv(right.clone(), buffers.pop().expect("a buffer")), 0).expect("room");
    reap(ring, 2, buffers, pieces);
}

fn reap(ring: &mut Ring, mut count: usize, buffers: &mut Vec<Bytes>, pieces: &mut Vec<Memory>) {
    while count > 0 {
        ring.enter(Wait::OneFor(Duration::from_secs(10))).expect("enter");
        while let Some(completion) = ring.next() {
            assert_eq!(completion.outcome, Outcome::Done(64));
            match completion.memory.expect("memory") {
                Memory::Bytes(bytes) => buffers.push(bytes),
                Memory::Pieces(back) => *pieces = back,
                Memory::Span(_) => panic!("a span, and none was submitted"),
            }
            count -= 1;
        }
    }
}
