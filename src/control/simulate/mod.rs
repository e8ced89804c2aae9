//! A simulation of both cores in virtual time. The wire loses lanes. The monitors answer late, wrongly or never. A
//! person interrupts and pauses. Disks are full. Either side is killed between any two effects. In some seeds the guest
//! writes while it runs at the source, and pages are sent in rounds before it stops ([`rounds`]).
//!
//! A seed determines the whole run. For a while ([`CHAOS`]) any fault may occur. After that the wire, the monitors and
//! the disks work, and a person follows umem's reports ([`person`]): the person resumes paused sides, starts umem again
//! with `--resume` where a record exists, and interrupts processes that only wait for that. At [`END`] the migration
//! must be over.
//!
//! The invariants:
//! - The guest never runs on both sides.
//! - No side forgets what the guest needs: a record of either side, or memory that the destination does not have.
//! - No page lands twice, except for copies in rounds, and only one set of lanes is served at a time.
//! - When the guest runs at the destination, no page that it has there is older than the source's.
//! - A failure before the stop leaves a guest that runs at the source and has never stood still.
//! - At the end the guest runs on one side with all of its memory, no process waits, and no source's record is left. If
//!   a person had to decide, umem has reported that.
//!
//! `UMEM_SEED=N` runs one seed and prints its events (`--nocapture`). `UMEM_SIM_SEEDS=N` runs that many seeds.

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

/// Until then any fault may occur.
const CHAOS: Duration = Duration::from_secs(40);

/// By then the migration has to be over.
const END: Duration = Duration::from_secs(400);

/// The default number of seeds: a debug build runs them in some seconds on two cores.
const SEEDS: u64 = 50_000;

/// A deliberate fault, which the invariants must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// The goodbye is sent before it is in the record.
    GoodbyeBeforeRecord,
    /// The switchover is sent before the record permits it.
    SwitchoverBeforeRecord,
    /// The record is removed before the guest is known to continue here.
    ForgetsEarly,
    /// The monitor is asked to resume the guest after the switchover, too.
    ResumesAlways,
    /// When a person abandons the source's session, a destination that answers counts as gone.
    TakesAnswersForSilence,
    /// In rounds a page is read before its mark is taken.
    ReadsBeforeTaking,
    /// The later of two copies of a page may land first.
    CopiesOvertake,
    /// The destination ends rounds when their end arrives, and not when every copy has landed.
    RoundsEndEarly,
    /// A remaining page counts as settled.
    SettlesRemaining,
    /// When the guest has stopped, pages that the log has not marked by then are left out.
    LeavesLastMarks,
    /// The result of a failed dirty log is used.
    BelievesFailedLog,
}

/// splitmix64: the random numbers of a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`. `limit` is not 0.
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// True with this probability in percent.
    fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// A duration of up to 2^`bits` ms, each magnitude as likely as the next.
    fn millis(&mut self, bits: u64) -> Duration {
        let bits = self.below(bits + 1);
        Duration::from_millis((1 << bits) + self.below(1 << bits) - 1)
    }
}

/// The outcome of a seed as one word, or the violated invariant.
fn run(seed: u64, fault: Fault) -> (Result<&'static str, String>, World) {
    let mut world = World::new(seed, fault);
    (world.run(), world)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}

/// The outcome and the log of a seed.
fn told(seed: u64, what: &str, world: &World) -> String {
    format!("UMEM_SEED={seed}: {what}\n{}", world.log())
}

/// The number of seeds for each outcome, and the first seed that failed.
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
fn guest_runs_on_one_side_and_both_sides_end_in_every_seed() {
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
    // With fewer seeds an outcome may be missing.
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
fn seed_determines_the_run() {
    for seed in 0..50 {
        let log = || run(seed, Fault::None).1.log();
        assert_eq!(log(), log(), "seed {seed}");
    }
}

#[test]
fn each_deliberate_fault_is_found() {
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
