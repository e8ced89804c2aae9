//! Two ends in one test: the real receivers and phase machines of a source and a destination, over
//! lanes that are chopped at random and read in a random order, up to the last page or up to a
//! lane's sudden end.
//!
//! Pages are virtual: a pipe holds *which* bytes of which page come next, never the bytes, so
//! gigabytes cost nothing, and a byte that would land in the wrong place is detected at once.
//!
//! In a session that recovers, lanes are cut again and again, also during their opening and during
//! the account, and opened anew: every page still arrives, exactly once.
//!
//! In sessions with rounds the source's guest writes while its pages are sent, and they are sent
//! again, each on the lane of its block. When the guest has stopped, the last copy of each clean
//! page counts.
//!
//! With checksums bits change in flight too, and bytes are repeated: no changed page is cached,
//! every page still arrives, and both ends' digests are equal.
//!
//! Checked at every step: the two guests never both may run. At the end of a whole run: every page
//! arrived exactly once, with the source's content. At the end of a broken run: both ends have a
//! typed error or had finished, and the source may run exactly if it had not committed.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a test may say what it does")]

mod destination;
mod lane;
mod source;
#[path = "../support/mod.rs"]
mod support;
mod world;

use support::{Random, seeds};
use umem_wire::source::Phase;
use world::World;

#[test]
fn undisturbed_migration_moves_every_page_once() {
    for seed in seeds(200) {
        let mut world = World::new(Random(seed));
        world.run_until(World::is_completed, |_| {});
        world.assert_whole();
    }
}

#[test]
fn migration_with_a_fault_ends_with_one_guest() {
    let (mut resumed, mut lost, mut completed) = (0, 0, 0);
    for seed in seeds(400) {
        let mut world = World::new(Random(seed));
        let steps_before_fault = world.random.below(3000);
        for _ in 0..steps_before_fault {
            world.step();
        }
        world.inject_fault();
        world.run_until(World::is_over, |_| {});
        world.assert_ended();
        match world.source.phase {
            Phase::Completed(_) => completed += 1,
            _ if world.source.phase.may_run() => resumed += 1,
            _ => lost += 1,
        }
    }
    println!("{resumed} resumed at the source, {lost} not, {completed} completed");
    assert!(is_one_seed() || (resumed > 0 && lost > 0 && completed > 0));
}

#[test]
fn migration_with_cut_lanes_recovers() {
    let cuts = Harm { intervals: [30, 300, 3000], early: 100, what: World::cut_some };
    cuts.done_to_all(400, World::new);
}

#[test]
fn migration_with_changed_bits_recovers() {
    let what = |world: &mut World| match world.random.chance(10) {
        true => world.cut_some(),
        false => world.spoil_some(),
    };
    let harm = Harm { intervals: [10, 100, 1000], early: 500, what };
    harm.done_to_all(300, |random| World::checked(random, true));
}

/// The damage to migrations that recover, up to 39 times each.
struct Harm<W> {
    /// Steps per cut, on average: from very often to rarely.
    intervals: [u64; 3],
    /// Before the commit point, where a cut ends the migration: only one in so many cuts.
    early: u64,
    what: W,
}

impl<W: Fn(&mut World)> Harm<W> {
    fn done_to_all(&self, seeds_max: u64, new: impl Fn(Random) -> World) {
        let (mut whole, mut resumed, mut reconnected) = (0, 0, 0);
        for seed in seeds(seeds_max) {
            let mut world = new(Random(seed));
            world.recover();
            self.done_to(&mut world);
            reconnected += world.source.epoch;
            if world.source.committed {
                whole += 1;
                world.assert_gone_on();
            } else {
                resumed += 1;
                assert!(world.source.phase.may_run() && !world.destination.phase.may_run());
            }
        }
        println!("{whole} went on over {reconnected} attempts, {resumed} resumed at the source");
        assert!(is_one_seed() || (whole > 0 && resumed > 0 && reconnected > 500));
    }

    fn done_to(&self, world: &mut World) {
        let interval = self.intervals[world.random.index(3)];
        let mut left = world.random.below(40);
        world.run_until(World::is_over_or_kept, |world| {
            let committed = world.source.committed;
            assert!(!committed || world.source.failure.is_none(), "{:?}", world.source.failure);
            let failure = &world.destination.failure;
            assert!(failure.is_none() || !committed, "{failure:?}");
            let may_come = committed || world.random.below(self.early) == 0;
            if may_come && left > 0 && world.random.below(interval) == 0 {
                left -= 1;
                (self.what)(world);
            }
        });
    }
}

fn is_one_seed() -> bool {
    std::env::var_os("UMEM_SEED").is_some()
}
