//! A guest that moves repeatedly, over connections that break; at the end this process has the resources that it had at
//! the beginning.
//!
//! The guest runs all the time in this process: its memory is a source's and a destination's in turn. Its threads check
//! every word that they read while pages arrive; before it leaves again every page is checked. `UMEM_SOAK_MOVES=N` for
//! more moves, `UMEM_SEED=N` for others.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a test may say what it does")]

#[path = "soak/hybrid.rs"]
mod hybrid;
mod support;

use std::sync::Arc;

use support::Random;
use support::embedded::{
    Backing, Deed, Deeds, End, Ends, Guest, Habits, Left, Model, Move, Pausing, Region, Route,
    Running, Side, mappings,
};
use umem::embed::Guest as Owner;

const MOVES: u64 = 100;

/// 16 MiB, in two regions of odd sizes.
const PAGES: [u64; 2] = [3001, 1095];

/// Mappings of the allocator, an arena for each core, and stacks cached for later threads (40 MiB in glibc).
const SPARE_MAPPINGS: usize = 128;

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |value| value.parse().expect("a number"))
}

fn memory(model: &Arc<Model>) -> Arc<Guest> {
    let region = |(index, &pages): (usize, &u64)| {
        Region::new(&format!("ram{index}"), Backing::Shared, pages)
    };
    Guest::new(PAGES.iter().enumerate().map(region).collect(), model.clone())
}

/// Breaks while pages move; in one move of eight before the guest has been handed over.
fn deeds(random: &mut Random) -> [Deeds; 4] {
    let mut some = |count: u64, bits: u64| -> Deeds {
        let deed = |random: &mut Random| {
            let ends = random.pick(&[Ends::Both, Ends::Source, Ends::Destination]);
            match random.below(4) {
                0 => Deed::CutOne(random.below(4) as usize, ends),
                1 => Deed::Tell(0),
                _ => Deed::Cut(ends),
            }
        };
        (0..random.below(count + 1)).map(|_| (random.magnitude(bits), deed(random))).collect()
    };
    let later = some(1, 21);
    let early = some(8, 8);
    // Up to eight, mostly none.
    let early = if early.len() == 8 { early } else { Deeds::new() };
    [early, Deeds::new(), Deeds::new(), later]
}

#[test]
fn repeated_moves_leave_nothing_behind() {
    let seed = number("UMEM_SEED", 1);
    let moves = number("UMEM_SOAK_MOVES", MOVES);
    let mut random = Random::of(seed, 0);
    let model = Arc::new(Model::new(seed, &PAGES));
    let habits = Habits { threads: 2, accesses: None, writes: 30, discards: 1 };
    let directory = tempfile::tempdir().expect("a directory");
    let mut guest = memory(&model);
    guest.fill(&mut random);
    let mut running = Some(Running::start(&guest, habits, seed));
    let mut before = None;
    let (mut stayed, mut resumed) = (0, 0);
    for count in 0..moves {
        // One-time allocations of the process by the first moves are not leftovers.
        if count == 2 {
            before = Some((Left::now(), mappings()));
        }
        let arriving = memory(&model);
        let moved = Move {
            seed: random.next(),
            route: random.pick(&[Route::Unix, Route::Tcp, Route::Given]),
            bulk_lanes: 1 + random.below(2) as u16,
            postcopy: random.percent(90),
            recovers: true,
            checksum: random.percent(30),
            state_bytes: random.below(10_000),
            habits,
            deeds: deeds(&mut random),
            pauses: [(random.pick(&[Side::Source, Side::Destination]), Pausing::Elsewhere); 2],
            directory: directory.path(),
        }
        .run(&guest, &arriving, |leaving| {
            running.take().into_iter().for_each(Running::stop);
            leaving.check_all();
        });
        resumed += moved.resumed;
        let bad = [guest.take_bad(), arriving.take_bad()].concat();
        match (&moved.source, &moved.destination) {
            (End::Completed(_), End::Completed(_)) => {
                assert!(bad.is_empty(), "UMEM_SEED={seed} move {count}: {bad:?}");
                (guest, running) = (arriving, moved.running);
            }
            (End::Failed(failure), _) if failure.guest == Owner::AtSource && !moved.has_run => {
                stayed += 1;
                running.get_or_insert_with(|| Running::start(&guest, habits, seed ^ count));
            }
            other => panic!("UMEM_SEED={seed} move {count}: {other:?}"),
        }
    }
    assert!(running.is_some(), "it runs");
    let before = before.expect("there are three moves at least");
    Left::returned_to(&before.0).unwrap_or_else(|after| {
        panic!("UMEM_SEED={seed}: {after:?}, at the beginning {:?}", before.0)
    });
    let after = mappings();
    running.take().into_iter().for_each(Running::stop);
    guest.check_all();
    assert_eq!(guest.take_bad(), Vec::<String>::new(), "UMEM_SEED={seed}");
    assert!(after < before.1 + SPARE_MAPPINGS, "{} mappings, then {after}", before.1);
    println!("{moves} moves, {stayed} not begun, connections back {resumed} times (both sides)");
}
