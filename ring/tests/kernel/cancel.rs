//! Cancelling: races, stale keys, orphans. In every case an operation ends exactly once.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use umem_ring::{Bytes, Chain, Completion, Errno, Fd, Key, Op, Outcome, Ring, Wait};

use crate::util::*;

const CANCELED: Outcome = Outcome::Failed(Errno::CANCELED);

#[test]
fn cancelled_waiting_operation_returns_its_memory() {
    let mut ring = ring();
    let (fd, _peer) = pair();
    let event = Fd::from(OwnedFd::from(eventfd()));
    let (out, into) = pipe();
    let into = Fd::from(into);
    for op in [
        Op::recv(fd.clone(), Bytes::with_capacity(8)),
        Op::recv(fd.clone(), Bytes::with_capacity(8)).wait_all(),
        Op::read(event, Bytes::with_capacity(8)),
        Op::poll(fd.clone(), libc::POLLIN as u32),
        Op::timeout(Duration::from_secs(3600)),
    ] {
        let name = op.name();
        let has_memory = !matches!(op, Op::Poll { .. } | Op::Timeout { .. });
        let key = ring.submit(op, 0).expect("room");
        assert!(poke(&mut ring).is_empty(), "{name}");
        ring.cancel(key).expect("cancel");
        ring.cancel(key).expect("a second cancellation has no effect");
        let completion = one(&mut ring);
        assert_eq!((completion.key, completion.outcome), (key, CANCELED), "{name}");
        assert_eq!(completion.memory.is_some(), has_memory, "{name}");
        assert!(poke(&mut ring).is_empty(), "{name}");
    }
    // An operation in a worker thread is interrupted, before it has started or in the middle.
    for spin in 0..20 {
        let op = Op::splice(fd.clone(), into.clone(), 8);
        let key = ring.submit(op, 0).expect("room");
        ring.enter(Wait::No).expect("enter");
        (0..spin * 5000).for_each(|_| std::hint::spin_loop());
        ring.cancel(key).expect("cancel");
        assert_eq!(one(&mut ring).outcome, CANCELED);
    }
    drop(out);
}

#[test]
fn operation_still_in_the_queue_is_cancelled() {
    let mut ring = ring();
    let (fd, _peer) = pair();
    let key = ring.submit(Op::recv(fd, Bytes::with_capacity(8)), 0).expect("room");
    ring.cancel(key).expect("cancel");
    assert_eq!(one(&mut ring).outcome, CANCELED);
}

#[test]
fn cancelled_operation_with_some_bytes_is_short() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let key = ring.submit(Op::recv(fd, Bytes::with_capacity(8)).wait_all(), 0).expect("room");
    ring.enter(Wait::No).expect("enter");
    peer.write_all(b"abc").expect("write");
    assert!(poke(&mut ring).is_empty());
    ring.cancel(key).expect("cancel");
    let completion = one(&mut ring);
    assert_eq!(completion.outcome, Outcome::Short { done: 3, wanted: 8 });
    assert_eq!(&bytes(completion)[..3], b"abc");
}

#[test]
fn stale_key_does_not_cancel_the_slots_next_operation() {
    let mut ring = ring_of(1, 8);
    let (fd, mut peer) = pair();
    let old = ring.submit(Op::nop(), 0).expect("room");
    assert_eq!(one(&mut ring).key, old);
    let new = ring.submit(Op::recv(fd, Bytes::with_capacity(4)), 1).expect("the only slot");
    assert_ne!(new, old);
    ring.cancel(old).expect("nothing to do");
    ring.orphan(old);
    assert!(poke(&mut ring).is_empty());
    peer.write_all(b"data").expect("write");
    let completion = one(&mut ring);
    assert_eq!((completion.key, completion.outcome), (new, Outcome::Done(4)));
}

/// A cancellation in flight when the operation ends and its slot is reused.
#[test]
fn late_cancellation_does_not_cancel_the_slots_next_operation() {
    let mut ring = ring_of(1, 8);
    let (fd, mut peer) = pair();
    for _ in 0..100 {
        let old = ring.submit(Op::recv(fd.clone(), Bytes::with_capacity(4)), 0).expect("room");
        ring.enter(Wait::No).expect("enter");
        peer.write_all(b"done").expect("write");
        ring.enter(Wait::One).expect("enter");
        ring.cancel(old).expect("queued, and too late");
        assert_eq!(one(&mut ring).outcome, Outcome::Done(4));
        let new = ring.submit(Op::recv(fd.clone(), Bytes::with_capacity(4)), 1).expect("room");
        assert!(poke(&mut ring).is_empty());
        peer.write_all(b"next").expect("write");
        let completion = one(&mut ring);
        assert_eq!((completion.key, completion.outcome), (new, Outcome::Done(4)));
    }
}

#[test]
fn data_for_an_orphan_is_not_reported() {
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let mapping = Mapping::anonymous(4096);
    let orphan = ring.submit(Op::recv(fd.clone(), mapping.span()), 1).expect("room");
    ring.enter(Wait::No).expect("enter");
    // The data comes before the cancellation.
    peer.write_all(b"late").expect("write");
    ring.enter(Wait::No).expect("enter");
    ring.orphan(orphan);
    assert!(settle(&mut ring).is_empty());
    assert_eq!(Arc::strong_count(&mapping), 1);
    // The data comes after the cancellation.
    let orphan = ring.submit(Op::recv(fd, mapping.span()), 1).expect("room");
    ring.enter(Wait::No).expect("enter");
    ring.orphan(orphan);
    assert_eq!(Arc::strong_count(&mapping), 2, "the kernel has not confirmed the cancellation");
    assert!(settle(&mut ring).is_empty());
    assert_eq!(Arc::strong_count(&mapping), 1);
}

#[test]
fn cancellation_racing_with_data_ends_the_operation_once() {
    const ROUNDS: u64 = 2000;
    let seed = 1;
    let mut random = Random::new(seed);
    let mut ring = ring();
    let (fd, mut peer) = pair();
    let (go, gone) = std::sync::mpsc::channel();
    let writer = std::thread::spawn(move || {
        let mut random = Random::new(seed + 1);
        for () in gone {
            for _ in 0..random.below(300) {
                std::hint::spin_loop();
            }
            peer.write_all(b"x").expect("write");
        }
    });
    let (mut received, mut cancelled) = (0, 0);
    for round in 0..ROUNDS {
        let op = Op::recv(fd.clone(), Bytes::with_capacity(1));
        let key = ring.submit(op, round).expect("room");
        ring.enter(Wait::No).expect("enter");
        go.send(()).expect("the writer waits");
        for _ in 0..random.below(3000) {
            std::hint::spin_loop();
        }
        ring.cancel(key).expect("cancel");
        let completion = one(&mut ring);
        assert_eq!((completion.key, completion.token, completion.last), (key, round, true));
        match completion.outcome {
            Outcome::Done(1) => received += 1,
            CANCELED => cancelled += 1,
            other => panic!("seed {seed}, round {round}: {other:?}"),
        }
    }
    // A cancelled receive loses no byte. The writer may still wait for room.
    for _ in 0..cancelled {
        ring.submit(Op::recv(fd.clone(), Bytes::with_capacity(1)), 0).expect("room");
        assert_eq!(one(&mut ring).outcome, Outcome::Done(1), "seed {seed}");
    }
    drop(go);
    writer.join().expect("the writer");
    assert_eq!(received + cancelled, ROUNDS);
}

/// All at once: chains and single operations, data, cancellations and orphans in any order.
#[test]
fn every_operation_of_a_random_mix_ends_exactly_once() {
    for seed in 0..40 {
        Storm::new(seed).run();
    }
}

/// A storm's expectation of each operation that has not ended.
struct Storm {
    seed: u64,
    random: Random,
    ring: Ring,
    lines: Vec<(Fd, UnixStream)>,
    open: HashMap<Key, u64>,
    ended: u64,
    next_token: u64,
}

impl Storm {
    fn new(seed: u64) -> Storm {
        let lines: Vec<_> = (0..4).map(|_| pair()).collect();
        for (_, peer) in &lines {
            peer.set_nonblocking(true).expect("nonblocking");
        }
        Storm {
            seed,
            random: Random::new(seed),
            ring: ring_of(32, 8),
            lines,
            open: HashMap::new(),
            ended: 0,
            next_token: 0,
        }
    }

    fn run(mut self) {
        for _ in 0..500 {
            match self.random.below(8) {
                0..=1 => self.submit_one(),
                2 => self.submit_chain(),
                3 => self.feed(),
                4 => self.drain(),
                5 => self.cancel_some(),
                _ => self.reap(),
            }
        }
        for (_, peer) in &self.lines {
            peer.shutdown(std::net::Shutdown::Both).expect("shutdown");
        }
        let rest = settle(&mut self.ring);
        self.account(rest);
        assert!(self.open.is_empty(), "seed {}: lost {:?}", self.seed, self.open);
        assert!(self.ended > 50, "seed {}: only {}", self.seed, self.ended);
        assert_eq!(self.ring.stale_completions(), 0, "seed {}", self.seed);
        self.ring.close(PATIENCE).expect("close");
    }

    fn any_op(&mut self) -> Op {
        let line = self.random.below(self.lines.len() as u64) as usize;
        let fd = self.lines[line].0.clone();
        let len = 1 + self.random.below(32) as usize;
        match self.random.below(7) {
            0 => Op::nop(),
            1 => Op::recv(fd, Bytes::with_capacity(len)),
            2..=3 => Op::recv(fd, Bytes::with_capacity(len)).wait_all(),
            4 => Op::send(fd, vec![1; len]),
            5 => Op::poll(fd, libc::POLLIN as u32),
            _ => Op::send_vectored(fd, vec![vec![1; len].into(), vec![2; len].into()]),
        }
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    fn submit_one(&mut self) {
        let (op, token) = (self.any_op(), self.token());
        if let Ok(key) = self.ring.submit(op, token) {
            assert!(self.open.insert(key, token).is_none());
        }
    }

    fn submit_chain(&mut self) {
        let mut chain = Chain::new();
        let mut members = Vec::new();
        for _ in 0..2 + self.random.below(4) {
            let (op, token) = (self.any_op(), self.token());
            chain = chain.then(op, token);
            members.push(token);
        }
        if let Ok(keys) = self.ring.submit_chain(chain) {
            self.open.extend(keys.iter().copied().zip(members));
        }
    }

    fn feed(&mut self) {
        let line = self.random.below(self.lines.len() as u64) as usize;
        let len = self.random.below(64) as usize;
        match self.lines[line].1.write(&[7; 64][..len]) {
            Ok(count) => assert!(count <= len),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }

    fn drain(&mut self) {
        let line = self.random.below(self.lines.len() as u64) as usize;
        match self.lines[line].1.read(&mut [0; 4096]) {
            Ok(count) => assert_ne!(count, 0, "the ring's end is open"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }

    fn cancel_some(&mut self) {
        let mut keys: Vec<_> = self.open.keys().copied().collect();
        keys.sort_by_key(|key| self.open[key]);
        for key in keys {
            if self.random.chance(8) {
                self.ring.orphan(key);
                self.open.remove(&key);
            } else if self.random.chance(4) {
                self.ring.cancel(key).expect("cancel");
            }
        }
    }

    fn reap(&mut self) {
        let completions = poke(&mut self.ring);
        self.account(completions);
    }

    fn account(&mut self, completions: Vec<Completion>) {
        for completion in completions {
            let token = self.open.remove(&completion.key);
            assert_eq!(token, Some(completion.token), "seed {}: {completion:?}", self.seed);
            assert!(completion.last, "seed {}: {completion:?}", self.seed);
            self.ended += 1;
        }
    }
}
