//! A stream of QEMU's, in any pieces: the parsed records do not depend on the pieces, and the remaining stream parses
//! to nothing further.

use umem::host::pieces::{Parsed, parse};

/// Byte 0 is the number of pieces' lengths that follow; the rest is the stream.
pub(crate) fn run(input: &[u8]) {
    let Some((&pieces, rest)) = input.split_first() else { return };
    let (pieces, stream) = rest.split_at(rest.len().min(pieces.into()));
    let whole = parse([stream], is_moved);
    let mut lengths = pieces.iter().cycle();
    let mut left = stream;
    let apart = std::iter::from_fn(|| {
        let length = lengths.next().map_or(1, |&length| usize::from(length) + 1);
        let (now, later) = left.split_at(length.min(left.len()));
        left = later;
        (!now.is_empty()).then_some(now)
    });
    match (whole, parse(apart, is_moved)) {
        (Ok(whole), Ok(apart)) => {
            assert!(whole == apart, "{whole:?} whole, {apart:?} in pieces");
            is_left(&whole);
        }
        (Err(whole), Err(apart)) => assert_eq!(whole.to_string(), apart.to_string()),
        (whole, apart) => panic!("{whole:?} whole, {apart:?} in pieces"),
    }
}

fn is_left(parsed: &Parsed) {
    if !parsed.is_device_state {
        return;
    }
    let again = parse([&parsed.cut[..]], is_moved).expect("the rest is a stream");
    assert!(again.blocks == parsed.blocks && again.capabilities == parsed.capabilities);
    assert!(again.cut == parsed.cut && again.is_device_state);
    assert!(again.pages.iter().all(|&(block, ..)| !is_moved(&again.blocks[block].0)));
}

fn is_moved(name: &str) -> bool {
    name.contains("ram")
}
