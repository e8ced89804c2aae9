//! Both real sides in one process, over a wire that breaks, delays and cuts in half, with a guest that
//! checks every word that it reads.
//!
//! `wire/tests/simulate.rs` runs the protocol alone, with memory and time of its own, a million steps a
//! second. Here everything is real but the network: threads, userfaultfd, io_uring, sockets, memory. A
//! seed decides on the guest's regions and what they hold, what the guest does, how the two sides find each
//! other, and what happens on the way: where pieces end, which lane is held back while others pass, when
//! connections break and who sees it at once, when somebody pauses and how it goes on. What the threads
//! make of that is the machine's affair, so that a seed makes the same choices each time, and not always
//! the same migration.
//!
//! `UMEM_SEED=N` runs one seed, `UMEM_SIM_SEEDS=N` as many, from `UMEM_SIM_FIRST` on.

mod support;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use support::embedded::{
    Backing, Deed, Deeds, End, Ends, Guest, Habits, Left, Model, Move, Pausing, Random, Region,
    Route, Side,
};
use umem::embed::Guest as Owner;

/// Where nothing else is said: until then a new seed begins.
const TIME: Duration = Duration::from_secs(15);

/// Seeds after which nothing of them may be left.
const ROUND: u64 = 64;

/// Seeds at a time: most of the time a seed waits.
const AT_A_TIME: usize = 24;

/// Pages of one region; sizes are odd, and beyond a block of 2 MiB now and then.
const PAGES_MAX: u64 = 700;

/// What a seed decides.
struct Plan {
    regions: Vec<(Backing, u64)>,
    route: Route,
    bulk_lanes: u16,
    postcopy: bool,
    recovers: bool,
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
        let deeds = [(); 4].map(|()| deeds(&mut random));
        let side = |random: &mut Random| random.pick(&[Side::Source, Side::Destination]);
        let how = |random: &mut Random| random.pick(&[Pausing::Resume, Pausing::Elsewhere]);
        let pauses = [(); 2].map(|()| (side(&mut random), how(&mut random)));
        Plan {
            regions,
            route,
            bulk_lanes,
            postcopy: random.percent(88),
            recovers,
            state_bytes: random.pick(&[0, 100, 70_000]),
            habits,
            deeds,
            pauses,
        }
    }
}

/// What happens from some moment on: mostly nothing before the switchover, as a migration that ends there
/// is a short one.
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

/// Runs a seed: what became of it, in a word, or what was wrong.
fn run(seed: u64) -> Result<&'static str, String> {
    let mut plan = Plan::of(seed);
    // Before the switchover a break is the end, of a migration that was hardly one.
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
    let recovers = plan.recovers;
    let moved = Move {
        seed,
        route: plan.route,
        bulk_lanes: plan.bulk_lanes,
        postcopy: plan.postcopy,
        recovers,
        state_bytes: plan.state_bytes,
        habits: plan.habits,
        deeds: plan.deeds,
        pauses: plan.pauses,
        directory: directory.path(),
    }
    .run(&leaving, &arriving, |guest| {
        // It has run on until now.
        for _ in 0..random.below(20) {
            let (region, page) = guest.any(&mut random);
            guest.write(region, page);
        }
    });
    if let Some(running) = moved.running {
        running.join();
    }
    let outcome =
        judge(moved.source, moved.destination, moved.has_run, recovers, arriving.bytes())?;
    if outcome == "completed" {
        arriving.check_all();
    }
    // What devices have read of a guest that never was to run is nothing.
    let whose = if moved.has_run { &arriving } else { &leaving };
    if !moved.has_run {
        leaving.check_all();
    }
    let bad = whose.take_bad();
    match bad.is_empty() {
        true => Ok(outcome),
        false => Err(format!("{} bad pages, {}: {outcome}", bad.len(), bad[0])),
    }
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
                false => Err(format!("{moved} bytes have come of {bytes}")),
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
        // Nobody opens lanes again there.
        (End::Failed(_), End::Failed(_) | End::Completed(_)) if !recovers => Ok("lost"),
        (End::Completed(_), End::Failed(_)) if !recovers => Ok("lost"),
        _ => Err(format!("source {source:?}, destination {destination:?}")),
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}

#[test]
fn whatever_happens_on_the_way_every_word_is_right_and_nothing_is_left() {
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
    // What the first seed makes once for the whole process is not left over.
    run(1).unwrap_or_else(|error| panic!("UMEM_SEED=1: {error}"));
    let before = Left::now();
    let mut outcomes = BTreeMap::new();
    let mut next = seeds.start;
    while next < seeds.end && !(is_timed && began.elapsed() > TIME) {
        let end = seeds.end.min(next + ROUND);
        for (outcome, count) in round(next, end) {
            *outcomes.entry(outcome).or_insert(0) += count;
        }
        if let Err(left) = Left::returned_to(&before) {
            panic!("of the seeds {next} to {end} is left: {left:?}, before {before:?}");
        }
        next = end;
    }
    println!("{} seeds in {:.1?}: {outcomes:?}", next - seeds.start, began.elapsed());
}

/// Runs these seeds, several at a time.
fn round(first: u64, end: u64) -> BTreeMap<&'static str, u64> {
    let next = AtomicU64::new(first);
    let outcomes = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        let work = || {
            loop {
                let seed = next.fetch_add(1, Relaxed);
                if seed >= end {
                    return;
                }
                let result = std::panic::catch_unwind(|| run(seed));
                let outcome = match result {
                    Ok(Ok(outcome)) => outcome,
                    Ok(Err(error)) => fail(seed, &error),
                    Err(_) => fail(seed, "it panicked, as said above"),
                };
                *outcomes.lock().unwrap().entry(outcome).or_insert(0) += 1;
            }
        };
        for _ in 0..AT_A_TIME {
            scope.spawn(work);
        }
    });
    outcomes.into_inner().unwrap()
}

/// Threads of a seed that went wrong may wait for pages for ever, so that nothing can be joined.
fn fail(seed: u64, error: &str) -> ! {
    eprintln!("UMEM_SEED={seed}: {error}");
    std::process::exit(1);
}
