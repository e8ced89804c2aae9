//! Complete blocks leave the userfaultfd.

use std::ops::Range;

use loom::sync::{Arc, Mutex};
use loom::thread;

use super::check;
use crate::memory::blocks::Blocks;

/// Pages as large as a block.
const SHIFT: u8 = 21;

/// Two lanes complete neighbours. Each block leaves, perhaps twice, and no incomplete block does.
pub fn neighbouring_blocks_completed_together_are_unregistered() {
    check(|| leave(4, [1, 2]));
}

/// The same at an end of the region, and with a block between them.
pub fn blocks_completed_together_are_unregistered() {
    check(|| leave(4, [0, 2]));
}

fn leave(blocks: u64, complete: [u64; 2]) {
    let all = Arc::new((Blocks::new(blocks, SHIFT), Mutex::new(Vec::new())));
    let finish = |all: &(Blocks, Mutex<Vec<Range<u64>>>), block: u64| {
        all.0.complete(block, 1, |range| all.1.lock().unwrap().push(range));
    };
    let other = thread::spawn({
        let all = all.clone();
        move || finish(&all, complete[1])
    });
    finish(&all, complete[0]);
    other.join().unwrap();
    let left = all.1.lock().unwrap();
    for block in 0..blocks {
        let has_left = left.iter().any(|range| range.contains(&block));
        assert_eq!(has_left, complete.contains(&block), "block {block}: {left:?}");
    }
}
