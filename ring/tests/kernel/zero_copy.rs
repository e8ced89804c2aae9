//! The two completions of a zero-copy send, and the single one of a failed send.

use std::io::Read;
use std::sync::Arc;

use umem_ring::{Chain, Completion, Memory, Op, Outcome};

use crate::util::*;

/// All completions of one key: checks that exactly one is the last, and that the memory comes with
/// it.
fn check_one_end(completions: &[Completion]) {
    let ends: Vec<_> = completions.iter().filter(|completion| completion.last).collect();
    assert_eq!(ends.len(), 1, "{completions:?}");
    let with_memory = completions.iter().filter(|completion| completion.memory.is_some()).count();
    assert_eq!((with_memory, ends[0].memory.is_some()), (1, true), "{completions:?}");
}

#[test]
fn zero_copy_send_returns_memory_with_its_notification() {
    let mut ring = ring();
    let (fd, mut peer) = tcp_pair();
    let mapping = Mapping::anonymous(65536);
    mapping.fill(&[7; 65536]);
    let key = ring.submit(Op::send_zc(fd, mapping.span()).wait_all(), 5).expect("room");
    let result = one(&mut ring);
    assert_eq!((result.key, result.outcome, result.last), (key, Outcome::Done(65536), false));
    assert!(result.memory.is_none());
    assert_eq!(Arc::strong_count(&mapping), 2, "the table holds the operation");
    assert_eq!(ring.in_flight(), 1);
    let mut received = vec![0; 65536];
    peer.read_exact(&mut received).expect("read");
    assert!(received.iter().all(|&byte| byte == 7));
    let released = one(&mut ring);
    assert_eq!((released.key, released.token, released.last), (key, 5, true));
    assert!(matches!(released.outcome, Outcome::Released { .. }), "{released:?}");
    assert_eq!(memory_len(&released.memory), Some(65536));
    drop(released);
    assert_eq!(Arc::strong_count(&mapping), 1);
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn zero_copy_over_loopback_reports_a_copy() {
    let mut ring = ring();
    let (fd, mut peer) = tcp_pair();
    ring.submit(Op::send_zc(fd, vec![1; 4096]), 0).expect("room");
    let reader = std::thread::spawn(move || peer.read_exact(&mut [0; 4096]));
    let completions = settle(&mut ring);
    assert_eq!(outcomes(&completions), [Outcome::Done(4096), Outcome::Released { copied: true }]);
    reader.join().expect("the reader").expect("read");
}

#[test]
fn vectored_zero_copy_send_returns_pieces_with_its_notification() {
    let mut ring = ring();
    let (fd, mut peer) = tcp_pair();
    let mut pieces: Vec<Memory> = vec![vec![1; 16].into(), vec![2; 4096].into()];
    for _ in 0..3 {
        let op = Op::send_vectored(fd.clone(), pieces).zero_copy();
        ring.submit(op, 0).expect("room");
        let result = one(&mut ring);
        assert_eq!((result.outcome, result.last), (Outcome::Done(4112), false));
        let mut received = [0; 4112];
        peer.read_exact(&mut received).expect("read");
        assert_eq!((received[15], received[16]), (1, 2));
        let released = one(&mut ring);
        assert!(released.last && matches!(released.outcome, Outcome::Released { .. }));
        pieces = released.memory.and_then(Memory::into_pieces).expect("pieces");
        assert_eq!(pieces.len(), 2);
    }
}

/// A stream without pauses: if sends that share a packet were released together, none ever would
/// be.
#[test]
fn zero_copy_send_is_released_before_the_next_is_sent() {
    const BYTES: usize = 256 << 10;
    let mut ring = ring();
    let (fd, mut peer) = tcp_pair();
    small_window(&peer);
    let send = |byte| Op::send_vectored(fd.clone(), vec![vec![byte; BYTES].into()]).zero_copy();
    for token in [1, 2] {
        ring.submit(send(token as u8), token).expect("room");
        let queued = one(&mut ring);
        assert_eq!((queued.token, queued.outcome), (token, Outcome::Done(BYTES as u32)));
    }
    peer.read_exact(&mut vec![0; BYTES]).expect("read");
    let released = one(&mut ring);
    assert!(matches!(released.outcome, Outcome::Released { .. }), "{released:?}");
    assert_eq!((released.token, ring.in_flight()), (1, 1));
    peer.read_exact(&mut vec![0; BYTES]).expect("read");
    assert_eq!(one(&mut ring).token, 2);
}

#[test]
fn zero_copy_send_from_a_registered_buffer_arrives() {
    let mut ring = ring();
    let (fd, mut peer) = tcp_pair();
    let mapping = Mapping::anonymous(8192);
    mapping.fill(&[9; 8192]);
    ring.register_buffers(vec![mapping.span()]).expect("registered");
    let part = mapping.span().sub(4096, 1000).expect("inside");
    ring.submit(Op::send_zc(fd, part).wait_all().fixed(0), 0).expect("room");
    assert_eq!(one(&mut ring).outcome, Outcome::Done(1000));
    let mut received = [0; 1000];
    peer.read_exact(&mut received).expect("read");
    assert!(received.iter().all(|&byte| byte == 9));
    assert!(one(&mut ring).last);
}

#[test]
fn failed_zero_copy_send_ends_once_with_or_without_notification() {
    let mut ring = ring();
    let (fd, peer) = tcp_pair();
    drop(peer);
    // The first send after the close is answered with a reset; the later ones fail.
    let mut failures = 0;
    for _ in 0..100 {
        let key = ring.submit(Op::send_zc(fd.clone(), vec![1; 4096]), 0).expect("room");
        let completions = settle(&mut ring);
        check_one_end(&completions);
        assert!(completions.iter().all(|completion| completion.key == key));
        match completions[0].outcome {
            Outcome::Failed(errno) => {
                assert!([libc::EPIPE, libc::ECONNRESET].contains(&errno.raw()), "{errno}");
                failures += 1;
            }
            Outcome::Done(4096) => (),
            other => panic!("{other:?}"),
        }
    }
    assert!(failures > 90, "{failures}");
    // Late completions named no later operation.
    assert!(poke(&mut ring).is_empty());
}

#[test]
fn zero_copy_send_on_an_unsupported_socket_fails_once() {
    let mut ring = ring();
    let (fd, _peer) = pair();
    ring.submit(Op::send_zc(fd, vec![1; 16]), 0).expect("room");
    let completions = settle(&mut ring);
    check_one_end(&completions);
    assert!(
        matches!(completions[0].outcome, Outcome::Failed(e) if e.raw() == libc::EOPNOTSUPP),
        "{completions:?}"
    );
}

#[test]
fn unstarted_zero_copy_send_returns_its_memory_once() {
    let mut ring = ring();
    let (fd, _reader) = tcp_pair();
    let (dead, gone) = pair();
    drop(gone);
    for _ in 0..50 {
        let chain = Chain::new()
            .then(Op::send(dead.clone(), b"x".to_vec()), 1)
            .then(Op::send_zc(fd.clone(), vec![1; 4096]).wait_all(), 2);
        let keys = ring.submit_chain(chain).expect("room");
        let completions = settle(&mut ring);
        let (first, second): (Vec<_>, Vec<_>) =
            completions.into_iter().partition(|completion| completion.token == 1);
        check_one_end(&first);
        check_one_end(&second);
        assert_eq!(second[0].outcome, Outcome::NotStarted { failed: keys[0] });
        // Late completions of the send are not reported for the slot's next operation.
        ring.submit(Op::nop(), 3).expect("room");
        assert_eq!(outcomes(&settle(&mut ring)), [Outcome::Done(0)]);
    }
}

#[test]
fn header_and_page_are_sent_as_a_chain() {
    let mut ring = ring();
    let (fd, mut peer) = tcp_pair();
    for _ in 0..20 {
        let chain = Chain::new()
            .then(Op::send(fd.clone(), b"head".to_vec()).more(), 1)
            .then(Op::send_zc(fd.clone(), vec![5; 4096]), 2)
            .then(Op::send(fd.clone(), b"tail".to_vec()), 3);
        ring.submit_chain(chain).expect("room");
        let mut completions = collect(&mut ring, 3);
        let mut received = vec![0; 4104];
        peer.read_exact(&mut received).expect("read");
        assert_eq!((&received[..4], &received[4100..]), (&b"head"[..], &b"tail"[..]));
        completions.extend(settle(&mut ring));
        assert_eq!(completions.len(), 4, "{completions:?}");
        let zero_copy: Vec<_> =
            completions.into_iter().filter(|completion| completion.token == 2).collect();
        check_one_end(&zero_copy);
        assert_eq!(zero_copy[0].outcome, Outcome::Done(4096));
    }
}

/// The receiver does not read, so the memory stays in use until the connection closes.
#[test]
fn zero_copy_memory_is_held_while_in_the_socket() {
    let mut ring = ring();
    let (fd, peer) = tcp_pair();
    let mapping = Mapping::anonymous(32 << 20);
    let key = ring.submit(Op::send_zc(fd, mapping.span()).wait_all(), 0).expect("room");
    assert!(poke(&mut ring).is_empty(), "more than the socket buffers take");
    ring.orphan(key);
    drop(peer);
    assert!(settle(&mut ring).is_empty());
    assert_eq!(Arc::strong_count(&mapping), 1);
}
