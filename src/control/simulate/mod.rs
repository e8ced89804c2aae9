//! Both cores over a wire that loses lanes, with monitors that answer late, wrongly or never, people who interrupt and
//! pause, disks that are full, and kills between any two effects of either side, in a time of its own. In some seeds the
//! guest writes while it runs at the source, and pages go in rounds before it stops ([`rounds`]).
//!
//! A seed decides on everything, and always is the same run. For a while ([`CHAOS`]) anything may happen; then the
//! wire, the monitors and the disks are well, and a person does what umem has told ([`person`]): resumes what was
//! paused, starts umem again with `--resume` where a record lies, and interrupts what only waits for that. After [`END`]
//! it must be over.
//!
//! What must hold, whatever happens:
//! - The guest never runs twice.
//! - Nothing forgets what the guest needs: a record of either side, or memory that the destination does not have.
//! - No page lands twice, but for copies in rounds, and no lanes are served beside others.
//! - No page that the guest has when it runs at the destination is older than the source's.
//! - A failure before the stop leaves a guest that runs on at the source and has never stood still.
//! - At the end the guest runs on one side with all of its memory, nobody is left waiting, and no source's record is.
//!   Where a person had to decide, umem has said so.
//!
//! `UMEM_SEED=N` runs one seed and prints what happens in it (`--nocapture`), `UMEM_SIM_SEEDS=N` runs as many.

#![allow(clippy::print_stdout, reason = "a test may say what it does")]

mod destination;
mod person;
mod rounds;
mod source;
mod threads;
mod world;

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use world::World;

/// Until then anything may happen.
const CHAOS: Duration = Duration::from_secs(40);

/// By then it has to be over.
const END: Duration = Duration::from_secs(400);

/// Where nobody says how many: as many as a debug build runs in some seconds on two cores.
const SEEDS: u64 = 50_000;

/// What is done wrong on purpose, to see it found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// The goodbye is said before the record says so.
    GoodbyeBeforeRecord,
    /// The switchover leaves before the record says that it may have.
    SwitchoverBeforeRecord,
    /// The record goes before the guest is known to go on here.
    ForgetsEarly,
    /// The monitor is asked to have the guest go on after the switchover, too.
    ResumesAlways,
    /// A destination that answers a person who abandons its source's session is taken for gone.
    TakesAnswersForSilence,
    /// In rounds a page is read before its mark is taken.
    ReadsBeforeTaking,
    /// Of two copies of a page the later one may land first.
    CopiesOvertake,
    /// Rounds are over at the destination when their end has come, and not when every copy has landed.
    RoundsEndEarly,
    /// A page that remains counts as settled.
    SettlesRemaining,
    /// The guest stands still, and what the log has not marked by then is left out.
    LeavesLastMarks,
    /// A dirty log that has failed is believed.
    BelievesFailedLog,
}

/// splitmix64: the numbers of a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `limit`, which is not 0.
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// True in so many cases of a hundred.
    fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Milliseconds up to 2^`bits`, each magnitude as likely as the next.
    fn millis(&mut self, bits: u64) -> Duration {
        let bits = self.below(bits + 1);
        Duration::from_millis((1 << bits) + self.below(1 << bits) - 1)
    }
}

/// What a seed has come to, in a word, or what was wrong.
fn run(seed: u64, fault: Fault) -> (Result<&'static str, String>, World) {
    let mut world = World::new(seed, fault);
    (world.run(), world)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}

/// What a seed's log says, for whoever looks for a fault.
fn told(seed: u64, what: &str, world: &World) -> String {
    format!("UMEM_SEED={seed}: {what}\n{}", world.log())
}

/// How many seeds have come to what, and the first that was wrong.
fn run_all(seeds: Range<u64>) -> Result<BTreeMap<&'static str, u64>, String> {
    let mut outcomes: BTreeMap<&'static str, u64> = BTreeMap::new();
    for seed in seeds.clone() {
        match run(seed, Fault::None) {
            (Ok(outcome), world) => {
                *outcomes.entry(outcome).or_default() += 1;
                if let Some(rounds) = world.rounds_came_to() {
                    *outcomes.entry(rounds).or_default() += 1;
                }
                if seeds.end - seeds.start == 1 {
                    println!("{}", told(seed, outcome, &world));
                }
            }
            (Err(what), world) => return Err(told(seed, &what, &world)),
        }
    }
    Ok(outcomes)
}

#[test]
fn a_guest_runs_once_and_both_sides_come_to_an_end_whatever_happens() {
    let (first, count) = match number("UMEM_SEED") {
        Some(seed) => (seed, 1),
        None => (0, number("UMEM_SIM_SEEDS").unwrap_or(SEEDS)),
    };
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let share = count.div_ceil(threads);
    let results: Vec<_> = std::thread::scope(|scope| {
        let begins = (first..first + count).step_by(share as usize);
        let spawn = |begin| scope.spawn(move || run_all(begin..(begin + share).min(first + count)));
        let running: Vec<_> = begins.map(spawn).collect();
        running.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let mut outcomes: BTreeMap<&'static str, u64> = BTreeMap::new();
    for result in results {
        match result {
            Ok(part) => {
                part.into_iter().for_each(|(what, n)| *outcomes.entry(what).or_default() += n);
            }
            Err(what) => panic!("{what}"),
        }
    }
    println!("{count} seeds: {outcomes:?}");
    // Otherwise nothing has been tried.
    if count >= SEEDS {
        for outcome in [
            "completed",
            "stayed",
            "completed after a kill",
            "stayed after a kill",
            "rounds, and completed",
            "rounds, and stayed",
            "rounds, and stayed without a stop",
        ] {
            assert!(outcomes.contains_key(outcome), "{outcomes:?}");
        }
    }
}

#[test]
fn a_seed_is_always_the_same_run() {
    for seed in 0..50 {
        let log = || run(seed, Fault::None).1.log();
        assert_eq!(log(), log(), "seed {seed}");
    }
}

#[test]
fn each_fault_that_is_put_in_is_found() {
    for fault in [
        Fault::GoodbyeBeforeRecord,
        Fault::SwitchoverBeforeRecord,
        Fault::ForgetsEarly,
        Fault::ResumesAlways,
        Fault::TakesAnswersForSilence,
        Fault::ReadsBeforeTaking,
        Fault::CopiesOvertake,
        Fault::RoundsEndEarly,
        Fault::SettlesRemaining,
        Fault::LeavesLastMarks,
        Fault::BelievesFailedLog,
    ] {
        let is_found = |seed| run(seed, fault).0.is_err() && run(seed, Fault::None).0.is_ok();
        assert!((0..SEEDS).any(is_found), "{fault:?} was not found");
    }
}
