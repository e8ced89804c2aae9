//! `land`: umem end to end, into checked guest memory, beside the floor of the same run.
//!
//! The processes are those of a real migration: `umem guest`, `umem migrate -p`, and `umem incoming`
//! with a `umem guest` of its own, over loopback TCP.

use std::path::PathBuf;

use argh::FromArgs;
use serde_json::json;

use crate::error::{Result, usage};
use crate::floor::{Cipher, Figure, Floor, check_zero, chosen};
use crate::machine::Machine;
use crate::memory::{List, Pages};
use crate::migration::{Landing, Route, Subject};
use crate::process::find_umem;
use crate::report::{Measure, Output, Report, Table, cell, progress};
use crate::statistics::{Spread, finite};
use crate::svg::{Bar, Plot};

/// umem end to end into checked guest memory of every kind, as a share of the floor measured in the
/// same run.
#[derive(FromArgs)]
#[argh(subcommand, name = "land")]
pub(crate) struct Options {
    /// the guest's RAM, MiB (default 1024)
    #[argh(option, default = "1024")]
    size: usize,
    /// turns of each subject (default 3)
    #[argh(option, default = "3")]
    rounds: usize,
    /// kinds of memory, separated by commas (default: all): memfd, huge-tmpfs, hugetlb, anonymous,
    /// anonymous-huge, private
    #[argh(option)]
    into: Option<List<Pages>>,
    /// numbers of bulk lanes, separated by commas (default 1)
    #[argh(option, default = "List(vec![1])")]
    lanes: List<u16>,
    /// shares of zero pages in percent, separated by commas (default 0)
    #[argh(option, default = "List(vec![0])")]
    zero: List<u32>,
    /// numbers of threads that read the guest's memory during the move, separated by commas
    /// (default 0,1)
    #[argh(option, default = "List(vec![0, 1])")]
    readers: List<u32>,
    /// measure every subject also with --checksum, to show its cost
    #[argh(switch)]
    checksum: bool,
    /// use TLS between both sides: a directory with QEMU's files of certificates and keys, the
    /// destination's for 127.0.0.1
    #[argh(option)]
    tls_creds: Option<PathBuf>,
    /// the umem to measure (default: the one beside this program)
    #[argh(option)]
    umem: Option<PathBuf>,
    /// write a plot of the throughputs to this file
    #[argh(option)]
    svg: Option<PathBuf>,
    /// write a page with the tables and plots, for a browser, to this file
    #[argh(option)]
    report: Option<PathBuf>,
    /// print one JSON object
    #[argh(switch)]
    json: bool,
}

/// Rounds of all of the floor's ways, which choose the one to compare umem with.
const CHOOSING_ROUNDS: usize = 3;

impl Measure for Options {
    fn measure(&self) -> Result<Report> {
        let options = self;
        if options.size == 0 || options.rounds == 0 {
            return usage("--size and --rounds are at least 1");
        }
        check_zero(&options.zero)?;
        let umem = find_umem(options.umem.as_deref())?;
        let machine = Machine::describe();
        let kinds = chosen(options.into.as_ref());
        let mut floor = Floor::new(options.size << 20, &kinds, &options.zero.0)?;
        floor.choose(CHOOSING_ROUNDS)?;
        let mut subjects = subjects(options, &floor.kinds);
        let mut cipher = options.tls_creds.as_ref().map(|_| Cipher::default());
        let route =
            Route { umem: &umem, namespaces: None, tls_creds: options.tls_creds.as_deref() };
        for round in 1..=options.rounds {
            cipher.iter_mut().try_for_each(|cipher| cipher.round(options.size << 20))?;
            let turns = floor.kinds.clone().into_iter();
            let turns =
                turns.flat_map(|pages| options.zero.0.iter().map(move |&zero| (pages, zero)));
            for (pages, zero) in turns {
                let say = |what: String| {
                    progress(&format!("round {round} of {}: {what}", options.rounds));
                };
                // Right before umem's turns, as a virtual machine's speed also drifts within a
                // round.
                say(format!("floor, {}, {zero} % zeroes", pages.name()));
                floor.turns(pages, zero)?;
                for (subject, landings) in in_turn(&mut subjects, round, pages, zero) {
                    say(format!(
                        "umem, {}, {} lane(s), {zero} % zeroes, {} reader(s)",
                        name(subject),
                        subject.lanes,
                        subject.readers
                    ));
                    landings.push(subject.land_from(floor.source(pages, zero)?, &route)?);
                }
            }
        }
        Ok(report(options, machine, &floor, cipher.as_ref(), &subjects))
    }

    fn output(&self) -> Output<'_> {
        let svg = self.svg.as_deref();
        Output { json: self.json, report: self.report.as_deref(), svg }
    }
}

/// The subjects with memory of this kind and these zero pages, in reverse order in every second
/// round, so that none always follows the same one.
fn in_turn(
    subjects: &mut [(Subject, Vec<Landing>)],
    round: usize,
    pages: Pages,
    zero_percent: u32,
) -> Vec<&mut (Subject, Vec<Landing>)> {
    let is_meant =
        |subject: &Subject| subject.pages == pages && subject.zero_percent == zero_percent;
    let mut turns: Vec<_> = subjects.iter_mut().filter(|(subject, _)| is_meant(subject)).collect();
    if round.is_multiple_of(2) {
        turns.reverse();
    }
    turns
}

/// Every combination of the options.
fn subjects(options: &Options, kinds: &[Pages]) -> Vec<(Subject, Vec<Landing>)> {
    let mut subjects = Vec::new();
    for &pages in kinds {
        for &zero_percent in &options.zero.0 {
            for &lanes in &options.lanes.0 {
                for &readers in &options.readers.0 {
                    let size_mib = options.size;
                    let subject = Subject {
                        pages,
                        size_mib,
                        zero_percent,
                        readers,
                        lanes,
                        release_ram: false,
                        checksum: false,
                    };
                    subjects.push((subject, Vec::new()));
                    if options.checksum {
                        subjects.push((Subject { checksum: true, ..subject }, Vec::new()));
                    }
                }
            }
        }
    }
    subjects
}

/// The guest's memory, and whether it was checked.
fn name(subject: &Subject) -> String {
    format!("{}{}", subject.pages.name(), if subject.checksum { ", checked" } else { "" })
}

/// For a subject with checksums: the time of the same subject without.
fn unchecked(subjects: &[(Subject, Vec<Landing>)], subject: &Subject) -> Option<Spread> {
    let plain = Subject { checksum: false, ..*subject };
    let (_, landings) = subjects.iter().find(|(other, _)| subject.checksum && *other == plain)?;
    Some(moving_s(landings))
}

/// For a subject with several lanes: the time of the same subject with one.
fn one_lane(subjects: &[(Subject, Vec<Landing>)], subject: &Subject) -> Option<Spread> {
    let one = Subject { lanes: 1, ..*subject };
    let (_, landings) = subjects.iter().find(|(other, _)| subject.lanes > 1 && *other == one)?;
    Some(moving_s(landings))
}

/// Seconds from the first page to the last.
fn moving_s(landings: &[Landing]) -> Spread {
    Spread::of(landings.iter().map(|landing| landing.moving_s.unwrap_or(f64::NAN)).collect())
}

/// The rate of the guest's memory, zero pages included: comparable between shares of zero pages.
fn bars(floor: &Floor, subjects: &[(Subject, Vec<Landing>)]) -> Vec<Bar> {
    let bar = |(subject, landings): &(Subject, Vec<Landing>)| {
        let gbit = (subject.size_mib << 20) as f64 * 8e-9;
        let best = floor.best(subject.pages, subject.zero_percent);
        Bar {
            name: format!(
                "{}, {} lane(s), {} % zeroes, {}",
                name(subject),
                subject.lanes,
                subject.zero_percent,
                if subject.readers == 0 { "idle" } else { "reads" }
            ),
            value: finite(gbit / moving_s(landings).median),
            mark: best.map(|best: Figure| gbit / best.seconds.median),
        }
    };
    subjects.iter().map(bar).collect()
}

fn report(
    options: &Options,
    machine: Machine,
    floor: &Floor,
    cipher: Option<&Cipher>,
    subjects: &[(Subject, Vec<Landing>)],
) -> Report {
    let cipher = cipher.map(Cipher::figure);
    let mut head = vec![
        "into",
        "zeroes",
        "lanes",
        "guest",
        "Gbit/s",
        "min",
        "max",
        "floor",
        "ratio",
        "total s",
        "downtime ms",
        "on demand",
        "CPU s",
    ];
    head.extend(cipher.iter().map(|_| "of AES-GCM"));
    let compares_lanes = subjects.iter().any(|(subject, _)| one_lane(subjects, subject).is_some());
    head.extend(compares_lanes.then_some("of one lane"));
    let mut table = Table::new(&head);
    let (mut figures, mut highlights) = (Vec::new(), Vec::new());
    for (subject, landings) in subjects {
        let spread = |get: fn(&Landing) -> f64| Spread::of(landings.iter().map(get).collect());
        let (gbps, total_s) = (spread(|l| l.gbps), spread(|l| l.total_s));
        let (downtime_ms, cpu_s) = (spread(|l| l.downtime_ms), spread(|l| l.cpu_s));
        let pages_demand = spread(|l| l.pages_demand as f64);
        let best = floor.best(subject.pages, subject.zero_percent);
        let floor_gbps = best.as_ref().map_or(f64::NAN, |best| best.gbps.median);
        let moving_s = moving_s(landings);
        let ratio = best.as_ref().map_or(f64::NAN, |best| best.seconds.over(&moving_s).median);
        let share = cipher.as_ref().map(|cipher| gbps.median / cipher.lane_gbps());
        let mut row = vec![
            name(subject),
            format!("{} %", subject.zero_percent),
            subject.lanes.to_string(),
            if subject.readers == 0 { "idle".into() } else { "reads".into() },
            format!("{:.1}", gbps.median),
            format!("{:.1}", gbps.min),
            format!("{:.1}", gbps.max),
            cell(floor_gbps, 1),
            cell(ratio, 2),
            format!("{:.2}", total_s.median),
            format!("{:.1}", downtime_ms.median),
            format!("{:.0}", pages_demand.median),
            format!("{:.2}", cpu_s.median),
        ];
        row.extend(share.map(|share| cell(share, 2)));
        let over_one = one_lane(subjects, subject).map(|one| one.over(&moving_s).median);
        row.extend(
            compares_lanes.then(|| over_one.map_or_else(|| "–".into(), |over| cell(over, 2))),
        );
        table.row(row);
        highlights.push(format!(
            "{}, {} lane(s), {} % zeroes: {:.1} Gbit/s, {} of the floor",
            subject.pages.name(),
            subject.lanes,
            subject.zero_percent,
            gbps.median,
            cell(ratio, 2)
        ));
        figures.push(json!({
            "pages": subject.pages,
            "zero_percent": subject.zero_percent,
            "lanes": subject.lanes,
            "guest_readers": subject.readers,
            "gbps": gbps,
            "moving_s": moving_s,
            "total_s": total_s,
            "downtime_ms": downtime_ms,
            "pages_demand": pages_demand,
            "cpu_s": cpu_s,
            "floor": best,
            "ratio_to_floor": ratio,
            "ratio_to_cipher": share,
            "ratio_to_one_lane": over_one,
            "checksum": subject.checksum,
            "ratio_to_unchecked": unchecked(subjects, subject).map(|s| s.over(&moving_s).median),
        }));
    }
    let mut method = format!(
        "`umem migrate -p` → loopback TCP{} → `umem incoming` with a `umem guest` of {} MiB without \
         holes, which is idle or reads random pages. Private memory is moved with --postcopy-flags 1. \
         Every subject takes its turn in each of {} rounds, after as much memory of the guest's kind \
         has been written and freed. Gbit/s is umem's own figure, page contents (zero pages have \
         none) from the first page to the last; afterwards the guest has checked every word. The \
         floor is one of `floor`'s ways into memory of this kind with the same zero pages, the best in \
         {CHOOSING_ROUNDS} rounds of them all before, measured anew just before umem's turns in each \
         round, from the same file; the ratio is its time over umem's, the median of the rounds', and so is \
         that of one lane's time over several lanes'. With a core for each end, a \
         guest that reads takes part of what the floor has for \
         itself. CPU is that of both umem processes. Medians.",
        if options.tls_creds.is_some() { " with TLS" } else { "" },
        options.size,
        options.rounds
    );
    if let Some(cipher) = &cipher {
        method += &format!(
            " AES-GCM is {} over records of 16 KiB that stay in one core's cache, by the same library and              in the same rounds: {:.1} Gbit/s encrypted, {:.1} decrypted. The best rate of one lane is              the lower of them, with a core for each end's records.",
            cipher.cipher, cipher.seal_gbps.median, cipher.open_gbps.median
        );
    }
    for left_out in &floor.left_out {
        method += &format!(" Left out: {left_out}.");
    }
    let title = "Into checked guest memory (the marks are the floor)";
    let plot = Plot::bars(title, "Gbit/s of the guest's memory", bars(floor, subjects));
    Report {
        what: "land",
        machine,
        method,
        highlights,
        tables: vec![table],
        plots: vec![plot],
        value: json!({
            "size_mib": options.size,
            "rounds": options.rounds,
            "tls": options.tls_creds.is_some(),
            "cipher": cipher,
            "figures": figures,
            "floor": floor.figures(),
            "left_out": floor.left_out,
        }),
    }
}
