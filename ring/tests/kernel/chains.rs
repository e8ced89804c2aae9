//! Links: the order of members, and the member at fault.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use umem_ring::{Bytes, CHAIN_MAX, Chain, Completion, Errno, Error, Memory, Op, Outcome, Wait};

use crate::util::*;

const CANCELED: Outcome = Outcome::Failed(Errno::CANCELED);

fn recv(fd: &umem_ring::Fd, len: usize) -> Op {
    Op::recv(fd.clone(), Bytes::with_capacity(len)).wait_all()
}

fn all_have_memory(completions: &[Completion]) -> bool {
    completions.iter().all(|completion| completion.last && completion.memory.is_some())
}

#[test]
fn chain_members_run_in_order() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let chain = ring
        .chain()
        .then(Op::send(fd.clone(), b"ask".to_vec()), 1)
        .then(recv(&fd, 4), 2)
        .then(recv(&fd, 2), 3);
    let keys = ring.submit_chain(chain).expect("room");
    assert_eq!(keys.len(), 3);
    let sent = one(&mut ring);
    assert_eq!((sent.key, sent.outcome), (keys[0], Outcome::Done(3)));
    peer.read_exact(&mut [0; 3]).expect("read");
    peer.write_all(b"answer").expect("write");
    let answers = collect(&mut ring, 2);
    assert_eq!(tokens(&answers), [2, 3]);
    assert_eq!(outcomes(&answers), [Outcome::Done(4), Outcome::Done(2)]);
    let received: Vec<u8> = answers.into_iter().flat_map(bytes).collect();
    assert_eq!(received, b"answer");
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn first_member_is_short_when_the_peer_closes() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let chain = Chain::new().then(recv(&fd, 8), 1).then(recv(&fd, 4), 2).then(recv(&fd, 2), 3);
    let keys = ring.submit_chain(chain).expect("room");
    assert!(poke(&mut ring).is_empty());
    peer.write_all(b"abc").expect("write");
    assert!(poke(&mut ring).is_empty(), "the receive waits for all bytes");
    drop(peer);
    let completions = collect(&mut ring, 3);
    let failed = keys[0];
    assert_eq!(
        outcomes(&completions),
        [
            Outcome::Short { done: 3, wanted: 8 },
            Outcome::NotStarted { failed },
            Outcome::NotStarted { failed }
        ]
    );
    assert_eq!(tokens(&completions), [1, 2, 3]);
    assert!(all_have_memory(&completions));
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn last_member_is_reported_short() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let chain = Chain::new().then(recv(&fd, 2), 1).then(recv(&fd, 4), 2);
    ring.submit_chain(chain).expect("room");
    peer.write_all(b"abc").expect("write");
    drop(peer);
    assert_eq!(
        outcomes(&collect(&mut ring, 2)),
        [Outcome::Done(2), Outcome::Short { done: 1, wanted: 4 }]
    );
}

#[test]
fn failed_middle_member_leaves_later_members_not_started() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let (dead, gone) = pair();
    drop(gone);
    peer.write_all(b"abcd").expect("write");
    let chain = Chain::new()
        .then(recv(&fd, 2), 1)
        .then(Op::send(dead, b"x".to_vec()), 2)
        .then(recv(&fd, 2), 3)
        .then(recv(&fd, 2), 4);
    let keys = ring.submit_chain(chain).expect("room");
    let completions = collect(&mut ring, 4);
    let failed = keys[1];
    assert_eq!(
        outcomes(&completions),
        [
            Outcome::Done(2),
            Outcome::Failed(Errno::new(libc::EPIPE)),
            Outcome::NotStarted { failed },
            Outcome::NotStarted { failed }
        ]
    );
    assert_eq!(tokens(&completions), [1, 2, 3, 4]);
    assert!(all_have_memory(&completions));
}

/// The kernel checks all members before it starts the first, and then reports ECANCELED for the
/// first.
#[test]
fn earlier_members_blame_the_refused_member() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    peer.write_all(b"abcd").expect("write");
    let (out, into) = pipe();
    let refused = Op::Splice {
        from: out.into(),
        from_offset: None,
        to: into.into(),
        to_offset: None,
        len: 1,
        flags: 1 << 20,
    };
    let chain = Chain::new()
        .then(recv(&fd, 2), 1)
        .then(recv(&fd, 2), 2)
        .then(refused, 3)
        .then(recv(&fd, 2), 4);
    let keys = ring.submit_chain(chain).expect("room");
    let completions = collect(&mut ring, 4);
    let failed = keys[2];
    assert_eq!(tokens(&completions), [1, 2, 3, 4]);
    assert_eq!(
        outcomes(&completions),
        [
            Outcome::NotStarted { failed },
            Outcome::NotStarted { failed },
            Outcome::Failed(Errno::new(libc::EINVAL)),
            Outcome::NotStarted { failed }
        ]
    );
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn short_read_or_splice_breaks_the_chain() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    peer.write_all(b"abc").expect("write");
    let file = memfd(3);
    let read = Op::read(OwnedFd::from(file), Bytes::with_capacity(8)).at(0);
    let keys = ring.submit_chain(Chain::new().then(read, 1).then(recv(&fd, 2), 2)).expect("room");
    assert_eq!(
        outcomes(&collect(&mut ring, 2)),
        [Outcome::Short { done: 3, wanted: 8 }, Outcome::NotStarted { failed: keys[0] }]
    );
    let (_out, into) = pipe();
    let chain = Chain::new().then(Op::splice(fd.clone(), into, 64), 1).then(recv(&fd, 2), 2);
    let keys = ring.submit_chain(chain).expect("room");
    assert_eq!(
        outcomes(&collect(&mut ring, 2)),
        [Outcome::Short { done: 3, wanted: 64 }, Outcome::NotStarted { failed: keys[0] }]
    );
}

#[test]
fn partial_receive_without_wait_all_keeps_the_chain() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    peer.write_all(b"abc").expect("write");
    let some = Op::recv(fd.clone(), Bytes::with_capacity(8));
    ring.submit_chain(Chain::new().then(some, 1).then(Op::nop(), 2)).expect("room");
    assert_eq!(outcomes(&collect(&mut ring, 2)), [Outcome::Done(3), Outcome::Done(0)]);
}

#[test]
fn send_with_a_successor_sends_all_bytes() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let len = 4 << 20;
    let chain = Chain::new()
        .then(Op::send(fd.clone(), vec![7; len]), 1)
        .then(Op::send(fd, b"end".to_vec()), 2);
    ring.submit_chain(chain).expect("room");
    ring.enter(Wait::No).expect("enter");
    let reader = std::thread::spawn(move || {
        let mut received = vec![0; len + 3];
        peer.read_exact(&mut received).expect("read");
        received
    });
    assert_eq!(outcomes(&collect(&mut ring, 2)), [Outcome::Done(len as u32), Outcome::Done(3)]);
    assert_eq!(&reader.join().expect("the reader")[len..], b"end");
}

#[test]
fn send_with_a_successor_is_short_when_the_peer_closes() {
    let mut ring = ring();
    let (fd, peer) = pair();
    let wanted = 4 << 20;
    let chain = Chain::new().then(Op::send(fd, vec![7; wanted as usize]), 1).then(Op::nop(), 2);
    let keys = ring.submit_chain(chain).expect("room");
    assert!(poke(&mut ring).is_empty(), "more than the socket takes");
    drop(peer);
    let completions = collect(&mut ring, 2);
    let Outcome::Short { done, wanted: of } = completions[0].outcome else {
        panic!("{completions:?}");
    };
    assert!(of == wanted && 0 < done && done < wanted);
    let failed = keys[0];
    assert_eq!(completions[1].outcome, Outcome::NotStarted { failed });
}

#[test]
fn cancelled_first_member_ends_the_chain() {
    let mut ring = ring();
    let (fd, _peer) = pair();
    let keys =
        ring.submit_chain(Chain::new().then(recv(&fd, 8), 1).then(recv(&fd, 4), 2)).expect("room");
    assert!(poke(&mut ring).is_empty());
    ring.cancel(keys[0]).expect("cancel");
    let completions = collect(&mut ring, 2);
    assert_eq!(outcomes(&completions), [CANCELED, Outcome::NotStarted { failed: keys[0] }]);
    assert!(all_have_memory(&completions));
}

/// The kernel cannot find an operation that has not started, so it is cancelled after its start.
#[test]
fn cancelled_later_member_ends_when_its_turn_comes() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let chain = Chain::new().then(recv(&fd, 2), 1).then(recv(&fd, 4), 2).then(recv(&fd, 2), 3);
    let keys = ring.submit_chain(chain).expect("room");
    assert!(poke(&mut ring).is_empty());
    ring.cancel(keys[1]).expect("cancel");
    assert!(poke(&mut ring).is_empty(), "the first member is not affected");
    peer.write_all(b"ab").expect("write");
    let completions = collect(&mut ring, 3);
    assert_eq!(
        outcomes(&completions),
        [Outcome::Done(2), CANCELED, Outcome::NotStarted { failed: keys[1] }]
    );
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn earlier_failure_is_blamed_instead_of_a_cancelled_member() {
    let mut ring = ring();
    let (fd, peer) = pair();
    let keys =
        ring.submit_chain(Chain::new().then(recv(&fd, 2), 1).then(recv(&fd, 4), 2)).expect("room");
    ring.cancel(keys[1]).expect("cancel");
    drop(peer);
    assert_eq!(
        outcomes(&collect(&mut ring, 2)),
        [Outcome::Short { done: 0, wanted: 2 }, Outcome::NotStarted { failed: keys[0] }]
    );
}

#[test]
fn orphan_in_the_middle_is_unreported_but_named_as_culprit() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let mapping = Mapping::anonymous(4096);
    let orphan = Op::recv(fd.clone(), mapping.span()).wait_all();
    let keys = ring
        .submit_chain(Chain::new().then(recv(&fd, 2), 1).then(orphan, 2).then(recv(&fd, 2), 3))
        .expect("room");
    assert!(poke(&mut ring).is_empty());
    ring.orphan(keys[1]);
    peer.write_all(b"ab").expect("write");
    let completions = settle(&mut ring);
    assert_eq!(tokens(&completions), [1, 3]);
    assert_eq!(completions[1].outcome, Outcome::NotStarted { failed: keys[1] });
    assert_eq!(std::sync::Arc::strong_count(&mapping), 1);
}

#[test]
fn chain_is_submitted_as_a_whole_at_every_queue_fill() {
    // The queue's fill differs in each round, so that every possible cut would occur.
    let mut ring = ring_of(64, 8);
    let (fd, _peer) = pair();
    for filler in 0..8 {
        for _ in 0..filler {
            ring.submit(Op::nop(), 0).expect("room");
        }
        let chain = Chain::new()
            .then(Op::nop(), 1)
            .then(recv(&fd, 1), 2)
            .then(Op::nop(), 3)
            .then(Op::nop(), 4);
        let keys = ring.submit_chain(chain).expect("room");
        let early = poke(&mut ring);
        assert!(early.iter().all(|completion| completion.token < 2), "{early:?}");
        ring.cancel(keys[1]).expect("cancel");
        let failed = keys[1];
        let rest: Vec<_> = settle(&mut ring).iter().map(|completion| completion.outcome).collect();
        let not_started = Outcome::NotStarted { failed };
        assert_eq!(rest, [CANCELED, not_started, not_started]);
    }
}

#[test]
fn chain_that_does_not_fit_is_returned_whole() {
    let mut ring = ring_of(4, 8);
    let nops = |count| (0..count).fold(Chain::new(), |chain, at| chain.then(Op::nop(), at));
    let rejected = ring.submit_chain(nops(5)).expect_err("four at most");
    assert!(matches!(rejected.error, Error::Full { ops_max: 4 }));
    assert_eq!(rejected.op.len(), 5);
    assert_eq!(ring.in_flight(), 0);
    ring.submit_chain(nops(4)).expect("as many as fit");
    assert_eq!(tokens(&settle(&mut ring)), [0, 1, 2, 3]);

    let mut small = ring_of(64, 2);
    assert!(matches!(
        small.submit_chain(nops(3)).expect_err("two at most").error,
        Error::Invalid { .. }
    ));
    let mut large = ring_of(64, 64);
    let rejected = large.submit_chain(nops(CHAIN_MAX as u64 + 1)).expect_err("too long");
    assert!(matches!(rejected.error, Error::Invalid { .. }));
    large.submit_chain(nops(CHAIN_MAX as u64)).expect("the longest");
    assert_eq!(settle(&mut large).len(), CHAIN_MAX);
    assert!(large.submit_chain(Chain::new()).expect("nothing").is_empty());
}

#[test]
fn chain_with_an_invalid_member_is_returned_whole() {
    let mut ring = ring();
    let (fd, _peer) = pair();
    let pieces = Memory::Pieces(vec![Bytes::with_capacity(1).into()]);
    let chain = Chain::new().then(Op::nop(), 1).then(Op::recv(fd.clone(), pieces), 2);
    let rejected = ring.submit_chain(chain).expect_err("pieces are for sends");
    assert!(matches!(rejected.error, Error::Invalid { .. }));
    assert_eq!(rejected.op.into_members().len(), 2);
    let endless = Op::poll(fd, libc::POLLIN as u32).multishot();
    let chain = Chain::new().then(endless, 1).then(Op::nop(), 2);
    assert!(ring.submit_chain(chain).is_err());
    assert_eq!(ring.in_flight(), 0);
}
