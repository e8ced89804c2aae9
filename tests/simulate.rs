//! Both real sides in one process, over a wire that breaks, delays and half-closes and, with checksums, changes,
//! duplicates, loses and reorders bytes, with a guest that checks every word that it reads.
//!
//! `wire/tests/simulate` runs the protocol alone, with simulated memory and time, a million steps a second. Here
//! everything is real but the network: threads, userfaultfd, io_uring, sockets, memory. A seed decides the guest's
//! regions and contents, the guest's accesses, how the two sides connect, and the events of the path: where pieces end,
//! which lane is held back while others pass, when connections break and which side sees it at once, when the move is
//! paused and how it resumes. The schedule of the threads depends on the machine, so a seed makes the same choices each
//! time, and not always the same migration.
//!
//! `UMEM_SEED=N` runs one seed, `UMEM_SIM_SEEDS=N` that many, from `UMEM_SIM_FIRST` on.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a test may say what it does")]

mod support;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use support::Random;
use support::embedded::{
    Backing, Deed, Deeds, End, Ends, Guest, Habits, Left, Model, Move, Moved, Pausing, Region,
    Route, Side, Spoil,
};
use umem::Error;
use umem::embed::{Failure, Guest as Owner};
use umem_wire::HEADER_BYTES;

/// The default length: until then a new seed begins.
const TIME: Duration = Duration::from_secs(15);

/// Seeds after which nothing of them may be left.
const ROUND: u64 = 64;

/// Concurrent seeds: a seed mostly waits.
const AT_A_TIME: usize = 24;

/// Pages of one region; sizes are odd, and sometimes beyond a block of 2 MiB.
const PAGES_MAX: u64 = 700;

/// The choices of a seed.
struct Plan {
    regions: Vec<(Backing, u64)>,
    route: Route,
    bulk_lanes: u16,
    postcopy: bool,
    recovers: bool,
    checksum: bool,
    state_bytes: u64,
    habits: Habits,
    deeds: [Deeds; 4],
    pauses: [(Side, Pausing); 2],
}

impl Plan {
    fn of(seed: u64) -> Plan {
        let mut random = Random::of(seed, 0);
        let backings = random.pick(&[
            &[Backing::Shared][..],
            &[Backing::Anonymous],
            &[Backing::Shared, Backing::Anonymous],
        ]);
        let count = random.pick(&[1, 1, 2, 3, 5]);
        let regions = (0..count)
            .map(|_| (random.pick(backings), 1 + random.magnitude(9).min(PAGES_MAX) % PAGES_MAX))
            .collect();
        let route =
            random.pick(&[Route::Unix, Route::Unix, Route::Tcp, Route::Given, Route::Given]);
        let bulk_lanes = match route {
            Route::Given => random.pick(&[0, 1, 2, 3]),
            _ => random.pick(&[1, 1, 2, 3]),
        };
        let habits = Habits {
            threads: random.pick(&[0, 1, 2, 2]),
            accesses: Some(random.magnitude(9)),
            writes: random.pick(&[0, 10, 40]),
            discards: random.pick(&[0, 0, 3]),
        };
        let recovers = random.percent(90);
        let mut deeds = [(); 4].map(|()| deeds(&mut random));
        let side = |random: &mut Random| random.pick(&[Side::Source, Side::Destination]);
        let how = |random: &mut Random| random.pick(&[Pausing::Resume, Pausing::Elsewhere]);
        let pauses = [(); 2].map(|()| (side(&mut random), how(&mut random)));
        // Without checksums damage is undetectable: no byte is damaged then.
        let mut path = Random::of(seed, 3);
        let checksum = path.percent(60);
        if checksum {
            deeds.iter_mut().for_each(|deeds| spoil(&mut path, deeds));
        }
        Plan {
            regions,
            route,
            bulk_lanes,
            postcopy: random.percent(88),
            recovers,
            checksum,
            state_bytes: random.pick(&[0, 100, 70_000]),
            habits,
            deeds,
            pauses,
        }
    }
}

/// Events from some moment on: mostly none before the switchover, because a migration that ends there is a short one.
fn deeds(random: &mut Random) -> Deeds {
    let count = random.pick(&[0, 0, 0, 1, 1, 2, 3]);
    let ends = |random: &mut Random| random.pick(&[Ends::Both, Ends::Source, Ends::Destination]);
    let deed = |random: &mut Random| match random.below(10) {
        0 => Deed::Tell(0),
        1 => Deed::Tell(1),
        2..=4 => Deed::CutOne(random.below(8) as usize, ends(random)),
        _ => Deed::Cut(ends(random)),
    };
    let bits = random.pick(&[6, 12, 20]);
    (0..count).map(|_| (random.magnitude(bits), deed(random))).collect()
}

/// Damages bytes between these actions, in either direction: also in the hellos after a break.
fn spoil(random: &mut Random, deeds: &mut Deeds) {
    let (count, bits) = random.pick(&[(0, 0), (1, 8), (1, 14), (2, 20), (4, 14), (24, 10)]);
    // If no connection carries a valid page, both sides pause until a resume.
    if random.percent(2) {
        deeds.push((random.magnitude(12), Deed::Ruin(64)));
        deeds.push((0, Deed::Cut(Ends::Both)));
    }
    for _ in 0..count {
        // Whole headers, or any bytes.
        let length = match random.percent(50) {
            true => HEADER_BYTES << random.below(4),
            false => usize::try_from(random.magnitude(13)).expect("64-bit"),
        };
        let what = match random.below(8) {
            0 | 1 => Spoil::Repeat(length),
            2 => Spoil::Drop(length),
            3 => Spoil::Swap(length),
            _ => Spoil::Flip(random.below(8) as u8),
        };
        // A single lane has few bytes left, or most of them.
        let whose = random.percent(40).then(|| random.below(16) as usize);
        let after = random.magnitude(if whose.is_some() { 7 } else { 12 }) - 1;
        let since = random.magnitude(bits) - 1;
        let place = usize::try_from(random.below(deeds.len() as u64 + 1)).expect("64-bit");
        deeds.insert(place, (since, Deed::Spoil(whose, after, what)));
    }
}

/// The totals of all seeds.
#[derive(Debug, Default)]
struct Tally {
    outcomes: BTreeMap<&'static str, u64>,
    /// With checksums: how often bytes were damaged, wrong checksums detected, connections ended by the wire alone, and
    /// sides paused.
    spoilt: u64,
    noticed: u64,
    stuck: u64,
    rests: u64,
}

impl Tally {
    fn add(&mut self, other: Tally) {
        for (outcome, count) in other.outcomes {
            *self.outcomes.entry(outcome).or_insert(0) += count;
        }
        self.spoilt += other.spoilt;
        self.noticed += other.noticed;
        self.stuck += other.stuck;
        self.rests += other.rests;
    }
}

/// Runs a seed: returns its result in a word, or the error.
fn run(seed: u64) -> Result<Tally, String> {
    let mut plan = Plan::of(seed);
    // Before the switchover a break ends the migration early.
    for (index, one_in) in [(0, 10), (1, 4)] {
        if !seed.is_multiple_of(one_in) {
            plan.deeds[index].clear();
        }
    }
    let mut random = Random::of(seed, 2);
    let pages: Vec<u64> = plan.regions.iter().map(|&(_, pages)| pages).collect();
    let model = std::sync::Arc::new(Model::new(seed, &pages));
    let make = |backing: Option<Backing>| {
        let region = |(index, &(own, pages)): (usize, &(Backing, u64))| {
            Region::new(&format!("ram{index}"), backing.unwrap_or(own), pages)
        };
        let regions = plan.regions.iter().enumerate().map(region).collect();
        Guest::new(regions, model.clone())
    };
    let leaving = make(Some(Backing::Shared));
    let arriving = make(None);
    leaving.fill(&mut random);
    let directory = tempfile::tempdir().expect("a directory");
    let Plan { recovers, checksum, .. } = plan;
    let mut moved = Move {
        seed,
        route: plan.route,
        bulk_lanes: plan.bulk_lanes,
        postcopy: plan.postcopy,
        recovers,
        checksum,
        state_bytes: plan.state_bytes,
        habits: plan.habits,
        deeds: plan.deeds,
        pauses: plan.pauses,
        directory: directory.path(),
    }
    .run(&leaving, &arriving, |guest| {
        // The guest has run until now.
        for _ in 0..random.below(20) {
            let (region, page) = guest.any(&mut random);
            guest.write(region, page);
        }
    });
    if let Some(running) = moved.running.take() {
        running.join();
    }
    let tally = tally(&moved, checksum)?;
    let outcome =
        judge(moved.source, moved.destination, moved.has_run, recovers, arriving.bytes())?;
    if outcome == "completed" {
        arriving.check_all();
    }
    // Reads of devices count for nothing if the guest never was to run.
    let whose = if moved.has_run { &arriving } else { &leaving };
    if !moved.has_run {
        leaving.check_all();
    }
    let bad = whose.take_bad();
    match bad.is_empty() {
        true => Ok(Tally { outcomes: [(outcome, 1)].into(), ..tally }),
        false => Err(format!("{} bad pages, {}: {outcome}", bad.len(), bad[0])),
    }
}

/// Checks the reports about damaged bytes.
fn tally(moved: &Moved, checksum: bool) -> Result<Tally, String> {
    let mut noticed = 0;
    for end in [&moved.source, &moved.destination] {
        let report = match end {
            End::Completed(report) => report,
            End::Failed(Failure { error: error @ Error::Damaged { .. }, .. }) => {
                return Err(error.to_string());
            }
            End::Failed(_) | End::Dropped => continue,
        };
        noticed += report.checksum_errors;
        // The peer's last frame may have been lost, but its figures are the same.
        let mut digests = report.digests.iter();
        let are_equal = digests.all(|one| one.peer.as_ref().is_none_or(|peer| *peer == one.digest));
        if report.checksum != checksum || report.digests.is_empty() == checksum || !are_equal {
            return Err(format!("wrong report of checksums: {report:?}"));
        }
    }
    let spoilt = moved.spoilt;
    Ok(Tally {
        outcomes: BTreeMap::new(),
        spoilt: spoilt.count,
        noticed,
        stuck: spoilt.stuck,
        rests: moved.rests.into(),
    })
}

/// Whether both sides may have ended like this.
fn judge(
    source: End,
    destination: End,
    has_run: bool,
    recovers: bool,
    bytes: u64,
) -> Result<&'static str, String> {
    match (&source, &destination) {
        (End::Completed(_), End::Completed(report)) => {
            let moved = report.data_bytes + report.zero_bytes + report.hole_bytes;
            match moved == bytes {
                true => Ok("completed"),
                false => Err(format!("{moved} of {bytes} bytes have arrived")),
            }
        }
        (End::Failed(failure), other) if failure.guest == Owner::AtSource => {
            let is_at_source = match other {
                End::Failed(other) => other.guest == Owner::AtSource,
                End::Dropped => true,
                End::Completed(_) => false,
            };
            match is_at_source && !has_run {
                true => Ok("stayed at the source"),
                false => Err(format!("the guest may run twice: {failure:?}; {other:?}")),
            }
        }
        // Lanes are not reopened there.
        (End::Failed(_), End::Failed(_) | End::Completed(_)) if !recovers => Ok("lost"),
        (End::Completed(_), End::Failed(_)) if !recovers => Ok("lost"),
        _ => Err(format!("source {source:?}, destination {destination:?}")),
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}

#[test]
fn disturbed_moves_end_with_right_memory_and_no_leftovers() {
    let seeds = match (number("UMEM_SEED"), number("UMEM_SIM_SEEDS")) {
        (Some(seed), _) => seed..seed + 1,
        (None, Some(count)) => {
            let first = number("UMEM_SIM_FIRST").unwrap_or(0);
            first..first + count
        }
        (None, None) => 0..u64::MAX,
    };
    let is_timed = seeds.end == u64::MAX;
    let began = Instant::now();
    // One-time allocations of the process by the first seed are not leftovers.
    run(1).unwrap_or_else(|error| panic!("UMEM_SEED=1: {error}"));
    let before = Left::now();
    let mut tally = Tally::default();
    let mut next = seeds.start;
    while next < seeds.end && !(is_timed && began.elapsed() > TIME) {
        let end = seeds.end.min(next + ROUND);
        tally.add(round(next, end));
        if let Err(left) = Left::returned_to(&before) {
            panic!("of the seeds {next} to {end} is left: {left:?}, before {before:?}");
        }
        next = end;
    }
    println!("{} seeds in {:.1?}: {tally:?}", next - seeds.start, began.elapsed());
    // Otherwise the test has tested nothing.
    let rounds = (next - seeds.start) / ROUND;
    assert!(rounds < 1 || (tally.spoilt > 0 && tally.noticed > 0), "{tally:?}");
    assert!(rounds < 8 || tally.rests > 0, "{tally:?}");
}

/// Runs these seeds, several at a time.
fn round(first: u64, end: u64) -> Tally {
    let next = AtomicU64::new(first);
    let tally = Mutex::new(Tally::default());
    std::thread::scope(|scope| {
        let work = || {
            loop {
                let seed = next.fetch_add(1, Relaxed);
                if seed >= end {
                    return;
                }
                let result = std::panic::catch_unwind(|| run(seed));
                let one = match result {
                    Ok(Ok(one)) => one,
                    Ok(Err(error)) => fail(seed, &error),
                    Err(_) => fail(seed, "a thread panicked (see above)"),
                };
                tally.lock().unwrap().add(one);
            }
        };
        for _ in 0..AT_A_TIME {
            scope.spawn(work);
        }
    });
    tally.into_inner().unwrap()
}

/// Threads of a failed seed may wait for pages forever, so joins would hang.
fn fail(seed: u64, error: &str) -> ! {
    eprintln!("UMEM_SEED={seed}: {error}");
    std::process::exit(1);
}
