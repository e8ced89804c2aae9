//! The source: which thread sends a page, and which frees it.

use loom::sync::{Arc, Mutex};
use loom::thread;

use super::check;
use crate::memory::acks::Acks;
use crate::memory::claims::Claims;

/// The demand lane and a bulk lane claim the same pages: each is sent by one of them.
pub fn page_claimed_by_two_lanes_is_sent_once() {
    check(|| {
        let claims = Arc::new(Claims::new(8, 12));
        let bulk = thread::spawn({
            let claims = claims.clone();
            move || {
                assert_eq!(claims.take_block(0), Some(0));
                claims.claim_word(0, 4)
            }
        });
        let demand = u64::from(claims.claim(2)) << 2 | u64::from(claims.claim(3)) << 3;
        let bulk = bulk.join().unwrap();
        assert_eq!((demand & bulk, demand | bulk), (0, 0b1111));
    });
}

/// Two bulk lanes look for a block: none is taken twice.
pub fn block_sought_by_two_lanes_is_taken_once() {
    check(|| {
        let claims = Arc::new(Claims::new(2, 21));
        let other = thread::spawn({
            let claims = claims.clone();
            move || claims.take_block(0)
        });
        let mut taken = [claims.take_block(0), other.join().unwrap()];
        taken.sort();
        assert_eq!(taken, [Some(0), Some(1)]);
    });
}

/// Two lanes receive acknowledgements of the same pages, while a thread frees them: each page is freed once.
pub fn acknowledged_pages_are_freed_once() {
    check(|| {
        let acks = Arc::new(Acks::new(128));
        acks.sending(0, 128);
        let freed = Arc::new(Mutex::new(Vec::new()));
        let take = |acks: &Acks, freed: &Mutex<Vec<u64>>| {
            acks.take(|range| freed.lock().unwrap().extend(range));
        };
        let lane = thread::spawn({
            let acks = acks.clone();
            move || {
                acks.acknowledge(63, 2).unwrap();
                assert!(acks.acknowledge(63, 1).is_err(), "the page was acknowledged before");
            }
        });
        let freeing = thread::spawn({
            let (acks, freed) = (acks.clone(), freed.clone());
            move || take(&acks, &freed)
        });
        acks.acknowledge(3, 1).unwrap();
        lane.join().unwrap();
        freeing.join().unwrap();
        take(&acks, &freed);
        let mut freed = freed.lock().unwrap();
        freed.sort_unstable();
        assert_eq!(*freed, [3, 63, 64]);
    });
}
