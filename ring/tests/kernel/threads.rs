//! Messages between rings, wake-ups from threads without a ring, and the core of a ring's thread.

use std::sync::mpsc;
use std::thread;

use umem_ring::{
    Config, Error, Key, Mailbox, Op, Outcome, Ring, TOKEN_MESSAGE, TOKEN_WAKE, Wait, Waker,
};

use crate::util::*;

/// The next message; skips all other completions.
fn message(ring: &mut Ring) -> (u64, u32) {
    loop {
        let completion = one(ring);
        if let Outcome::Message { value, extra } = completion.outcome {
            assert_eq!((completion.token, completion.key), (TOKEN_MESSAGE, Key::NONE));
            return (value, extra);
        }
        assert_eq!(completion.outcome, Outcome::Done(0), "a message was sent");
    }
}

#[test]
fn mailboxes_and_wakers_are_send_and_sync() {
    fn goes_anywhere<T: Clone + Send + Sync + 'static>() {}
    goes_anywhere::<Mailbox>();
    goes_anywhere::<Waker>();
    goes_anywhere::<umem_ring::Span>();
    goes_anywhere::<umem_ring::Fd>();
}

#[test]
fn rings_on_two_threads_exchange_messages() {
    const ROUNDS: u64 = 500;
    let mut ring = ring();
    let (addresses, arrived) = mpsc::channel::<Mailbox>();
    let ours = ring.mailbox();
    let other = thread::spawn(move || {
        let mut ring = self::ring_with_name("other");
        addresses.send(ring.mailbox()).expect("the first thread waits");
        for _ in 0..ROUNDS {
            let (value, extra) = message(&mut ring);
            let back = Op::msg_ring(ours.clone(), !value, extra ^ u32::MAX);
            ring.submit(back, 0).expect("room");
        }
        settle(&mut ring);
        ring.close(PATIENCE).expect("close");
    });
    let theirs = arrived.recv().expect("the other thread's address");
    for round in 0..ROUNDS {
        // All bits of both are used: a value looks like an internal key, a result like an errno.
        let value = u64::MAX.rotate_left(round as u32) ^ (round << 56);
        let extra = 0x8000_0000 | round as u32;
        ring.submit(Op::msg_ring(theirs.clone(), value, extra), 0).expect("room");
        assert_eq!(message(&mut ring), (!value, extra ^ u32::MAX));
    }
    other.join().expect("the other thread");
}

#[test]
fn message_arrives_with_every_bit() {
    let mut ring = ring();
    for bit in 0..64 {
        let (value, extra) = (1u64 << bit, 1u32 << (bit % 32));
        ring.submit(Op::msg_ring(ring.mailbox(), value, extra), 0).expect("room");
        assert_eq!(message(&mut ring), (value, extra));
        settle(&mut ring);
    }
}

#[test]
fn message_to_a_closed_ring_is_refused() {
    let mut ring = ring();
    let mailbox = self::ring_with_name("closed").mailbox();
    let rejected = ring.submit(Op::msg_ring(mailbox, 1, 2), 3).expect_err("closed");
    assert!(matches!(rejected.error, Error::Closed));
    assert!(matches!(rejected.op, Op::MsgRing { value: 1, extra: 2, .. }));
    assert_eq!(ring.in_flight(), 0);
}

/// Many more than the completion queue holds, before the receiver reads one.
#[test]
fn messages_beyond_the_completion_queue_all_arrive() {
    const MESSAGES: u64 = 5000;
    let mut receiver = ring_of(1, 1);
    let mailbox = receiver.mailbox();
    let sender = thread::spawn(move || {
        let mut ring = ring();
        let mut sent = Vec::new();
        for value in 0..MESSAGES {
            let mut op = Op::msg_ring(mailbox.clone(), value, 0);
            while let Err(rejected) = ring.submit(op, value) {
                assert!(matches!(rejected.error, Error::Full { .. }), "{rejected}");
                op = rejected.op;
                let completions = collect(&mut ring, 1);
                sent.extend(outcomes(&completions));
            }
        }
        sent.extend(outcomes(&settle(&mut ring)));
        sent
    });
    let sent = sender.join().expect("the sender");
    assert_eq!(sent, vec![Outcome::Done(0); MESSAGES as usize]);
    let values: Vec<u64> = sent.iter().map(|_| message(&mut receiver).0).collect();
    assert_eq!(values, (0..MESSAGES).collect::<Vec<_>>());
}

#[test]
fn thread_without_a_ring_wakes_a_ring() {
    let mut ring = ring();
    let waker: Waker = ring.waker().expect("a waker");
    assert_eq!(ring.in_flight(), 0, "the standing read is not the user's");
    for _ in 0..50 {
        let waker = waker.clone();
        let other = thread::spawn(move || waker.wake());
        let completion = one(&mut ring);
        assert_eq!((completion.token, completion.key), (TOKEN_WAKE, Key::NONE));
        assert_eq!(completion.outcome, Outcome::Done(1));
        assert!(!completion.last);
        other.join().expect("the other thread");
    }
    assert!(poke(&mut ring).is_empty());
}

#[test]
fn wake_ups_are_merged_and_none_is_lost() {
    let mut ring = ring();
    let waker = ring.waker().expect("a waker");
    let again = ring.waker().expect("the same waker");
    (0..5).for_each(|_| waker.wake());
    (0..5).for_each(|_| again.wake());
    let first = one(&mut ring);
    assert_eq!(first.outcome, Outcome::Done(10));
    assert!(poke(&mut ring).is_empty());
    // Between a read and the next one.
    waker.wake();
    ring.enter(Wait::One).expect("enter");
    waker.wake();
    assert_eq!(one(&mut ring).outcome, Outcome::Done(1));
    assert_eq!(one(&mut ring).outcome, Outcome::Done(1));
    // From several threads at once: the sum is right, however they are merged.
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let waker = waker.clone();
            thread::spawn(move || (0..500).for_each(|_| waker.wake()))
        })
        .collect();
    let mut sum = 0;
    while sum < 2000 {
        let Outcome::Done(count) = one(&mut ring).outcome else { panic!("a wake-up") };
        sum += count;
    }
    assert_eq!(sum, 2000);
    for thread in threads {
        thread.join().expect("a waking thread");
    }
}

#[test]
fn ring_thread_runs_on_the_configured_core() {
    let cores = core_affinity::get_core_ids().expect("cores");
    for core in cores {
        let bound = thread::spawn(move || {
            let config = Config { core: Some(core.id), ..Config::default() };
            let _ring = Ring::new(&config).expect("a ring");
            core_affinity::get_core_ids().expect("cores")
        });
        assert_eq!(bound.join().expect("the thread"), [core]);
    }
    for core in [1000, 1 << 20] {
        let config = Config { core: Some(core), ..Config::default() };
        let error = Ring::new(&config).expect_err("no such core");
        assert!(matches!(error, Error::Core { .. }), "{error}");
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}

fn ring_with_name(name: &str) -> Ring {
    let config = Config { name: name.to_owned(), ..Config::default() };
    Ring::new(&config).expect("a ring")
}
