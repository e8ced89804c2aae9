//! Full queues, full tables, and requests that are refused before the kernel sees them.

use std::os::fd::OwnedFd;
use std::thread;

use umem_ring::{
    Bytes, Config, Error, Memory, OPERATION_BYTES_MAX, OPS_MAX, Op, Outcome, PIECES_MAX, Ring, Wait,
};

use crate::util::*;

#[test]
fn full_submission_queue_is_submitted_and_refilled() {
    let mut ring = ring_of(256, 4);
    for token in 0..100 {
        ring.submit(Op::nop(), token).expect("a full queue is submitted");
    }
    let completions = settle(&mut ring);
    assert_eq!(tokens(&completions), (0..100).collect::<Vec<_>>());
}

#[test]
fn full_table_returns_the_operation() {
    let mut ring = ring_of(2, 8);
    let (fd, _peer) = pair();
    for token in 0..2 {
        ring.submit(Op::recv(fd.clone(), Bytes::with_capacity(4)), token).expect("room");
    }
    let rejected = ring.submit(Op::send(fd, b"kept".to_vec()), 2).expect_err("no room");
    assert!(matches!(rejected.error, Error::Full { ops_max: 2 }), "{rejected}");
    let memory = rejected.op.into_memory().and_then(Memory::into_bytes).expect("its bytes");
    assert_eq!(memory.as_slice(), b"kept");
    assert_eq!(ring.in_flight(), 2);
}

#[test]
fn slots_are_reused_and_keys_are_not() {
    let mut ring = ring_of(4, 4);
    let mut seen = std::collections::HashSet::new();
    for round in 0..1000 {
        assert!(seen.insert(ring.submit(Op::nop(), round).expect("room")));
        if round % 3 == 2 {
            settle(&mut ring);
        }
    }
}

/// As many operations as possible, each with two completions, none of which is read in between.
#[test]
fn completion_queue_holds_everything_in_flight() {
    let mut ring = ring_of(512, 64);
    let (fd, peer) = tcp_pair();
    let reader = thread::spawn(move || {
        let mut peer = peer;
        std::io::copy(&mut peer, &mut std::io::sink())
    });
    for token in 0..512 {
        ring.submit(Op::send_zc(fd.clone(), vec![1; 100]), token).expect("room");
    }
    ring.enter(Wait::One).expect("enter");
    drop(fd);
    let completions = settle(&mut ring);
    let ends = completions.iter().filter(|completion| completion.last).count();
    let failed = completions.iter().any(|c| matches!(c.outcome, Outcome::Failed(_)));
    assert_eq!((ends, completions.len(), failed), (512, 1024, false));
    reader.join().expect("the reader").expect("read");
}

/// More completions than the queue holds, before a single one is read: the kernel keeps the rest.
#[test]
fn overflowing_completion_queue_loses_nothing() {
    let mut ring = ring_of(64, 64);
    let mut tokens_seen = 0;
    for _ in 0..20 {
        // Messages to itself bring two completions each, one of them outside the table.
        for token in 0..32 {
            ring.submit(Op::msg_ring(ring.mailbox(), token, 0), token).expect("room");
        }
        ring.enter(Wait::No).expect("enter");
        tokens_seen += settle(&mut ring).iter().filter(|c| c.token < 32).count();
    }
    assert_eq!(tokens_seen, 640);
}

#[test]
fn impossible_operation_is_refused_at_submission() {
    let mut ring = ring();
    let (fd, _peer) = pair();
    let byte = || Memory::from(vec![1]);
    let mapping = Mapping::anonymous(4096);
    // SAFETY: nothing uses the part that is not mapped, because the operation is refused.
    let huge = unsafe {
        let start = std::ptr::NonNull::new(mapping.span().as_ptr()).expect("not null");
        umem_ring::Span::new(start, OPERATION_BYTES_MAX + 1, mapping.clone())
    };
    for op in [
        Op::recv(fd.clone(), Memory::Pieces(vec![byte()])),
        Op::recv(fd.clone(), huge.clone()),
        Op::madvise(huge.clone(), libc::MADV_DONTNEED),
        Op::send_vectored(fd.clone(), Vec::new()),
        Op::send_vectored(fd.clone(), (0..=PIECES_MAX).map(|_| byte()).collect()),
        Op::send_vectored(fd.clone(), vec![Memory::Pieces(vec![byte()])]),
        Op::send_vectored(fd.clone(), vec![huge.into(), byte()]),
    ] {
        let name = op.name();
        let rejected = ring.submit(op, 0).expect_err(name);
        assert!(matches!(rejected.error, Error::Invalid { .. }), "{rejected}");
        assert_eq!(rejected.op.name(), name);
    }
    assert_eq!(ring.in_flight(), 0);
    let most = (0..PIECES_MAX).map(|_| byte()).collect();
    ring.submit(Op::send_vectored(fd, most), 0).expect("the most pieces that are allowed");
    assert_eq!(one(&mut ring).outcome, Outcome::Done(PIECES_MAX as u32));
}

#[test]
fn impossible_configuration_is_refused() {
    for (ops_max, entries) in [(0, 8), (OPS_MAX + 1, 8), (u32::MAX, 8), (8, 0)] {
        let config = Config { ops_max, entries, ..Config::default() };
        let error = Ring::new(&config).expect_err("refused");
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
    }
    let largest = Config { ops_max: OPS_MAX, entries: u32::MAX, ..Config::default() };
    Ring::new(&largest).expect("the largest configuration");
}

#[test]
fn bad_slot_or_descriptor_fails_only_its_operation() {
    let mut ring = ring();
    ring.submit(Op::send(umem_ring::Fd::Fixed(3), vec![1]), 0).expect("room");
    let completion = one(&mut ring);
    assert!(matches!(completion.outcome, Outcome::Failed(e) if e.raw() == libc::EBADF));
    assert!(completion.memory.is_some());
    let file = OwnedFd::from(memfd(0));
    ring.submit(Op::recv(file, vec![0]), 0).expect("room");
    assert!(matches!(one(&mut ring).outcome, Outcome::Failed(e) if e.raw() == libc::ENOTSOCK));
}

/// On a thread without CAP_IPC_LOCK, as root may lock any amount.
#[test]
fn error_at_the_limit_of_locked_memory_names_it() {
    // Large enough for the rings themselves, which count as well, also those just closed.
    const LIMIT_BYTES: u64 = 8 << 20;
    let error = thread::spawn(|| {
        lower_memlock_limit(LIMIT_BYTES);
        drop_capabilities();
        let mut ring = ring();
        let mapping = Mapping::anonymous(32 << 20);
        ring.register_buffers(vec![mapping.span()]).expect_err("four times the limit")
    })
    .join()
    .expect("the thread");
    assert!(
        matches!(
            error,
            Error::MemlockTooSmall { needed_bytes: 33_554_432, limit_bytes: LIMIT_BYTES, .. }
        ),
        "{error:?}"
    );
    assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
}

/// For this process; no other test locks more than a few pages.
fn lower_memlock_limit(limit_bytes: u64) {
    let limit = libc::rlimit { rlim_cur: limit_bytes, rlim_max: limit_bytes };
    // SAFETY: the kernel reads the structure during the call.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// For this thread only.
fn drop_capabilities() {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    // linux/capability.h
    const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;
    let header = Header { version: LINUX_CAPABILITY_VERSION_3, pid: 0 };
    let none = [0u32; 6];
    // SAFETY: the kernel reads both during the call; version 3 takes two sets of three numbers.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}
