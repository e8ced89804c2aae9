//! `size`: the cost of moving a guest as the guest grows: time, processor time, and memory of
//! umem's own.

use std::path::PathBuf;

use argh::FromArgs;
use serde::Serialize;
use serde_json::json;

use crate::error::{Result, failure, usage};
use crate::floor::{Floor, Way, turn};
use crate::machine::{Machine, memory_available_mib};
use crate::memory::{List, PAGE_BYTES, Pages};
use crate::migration::{Landing, Route, SPARE_MIB, Subject};
use crate::process::find_umem;
use crate::report::{Measure, Output, Report, Table, cell, progress};
use crate::statistics::{Spread, finite};

/// The cost of moving a guest as it grows: time, processor time, memory of umem's own.
#[derive(FromArgs)]
#[argh(subcommand, name = "size")]
pub(crate) struct Options {
    /// sizes of the guest's RAM in MiB, separated by commas (default 1024,2048,4096,8192); a size
    /// that does not fit twice into this machine's memory is left out, without --release-ram
    #[argh(option, default = "List(vec![1024, 2048, 4096, 8192])")]
    sizes: List<usize>,
    /// turns of each size (default 3)
    #[argh(option, default = "3")]
    rounds: usize,
    /// kind of memory (default memfd): memfd, huge-tmpfs, anonymous, private
    #[argh(option, default = "Pages::Memfd")]
    into: Pages,
    /// free the source's memory as it arrives (`umem migrate --release-ram`), so that a guest of
    /// nearly all of this machine's memory fits
    #[argh(switch)]
    release_ram: bool,
    /// bulk lanes (default 1)
    #[argh(option, default = "1")]
    lanes: u16,
    /// the umem to measure (default: the one beside this program)
    #[argh(option)]
    umem: Option<PathBuf>,
    /// write a page with the tables and plots, for a browser, to this file
    #[argh(option)]
    report: Option<PathBuf>,
    /// print one JSON object
    #[argh(switch)]
    json: bool,
}

/// MiB of guest memory by which time and processor time are compared.
const GIB_MIB: f64 = 1024.0;

/// A guest of one size.
struct Grown {
    subject: Subject,
    landings: Vec<Landing>,
    /// The floor's seconds and processor seconds for each GiB, of as many rounds; none if memory
    /// does not suffice for both of its ends.
    floor: Vec<(f64, f64)>,
}

/// One figure for each GiB as the guest grows.
#[derive(Serialize)]
struct ForGib {
    umem: Spread,
    /// Ratio to the smallest guest's.
    over_smallest: f64,
    floor: Option<Spread>,
    floor_over_smallest: Option<f64>,
    /// Ratio to the floor's, round by round.
    over_floor: Option<Spread>,
}

/// The same figure for all sizes.
fn for_gib(
    grown: &[Grown],
    umem: fn(&Landing) -> f64,
    floor: fn(&Grown) -> Vec<f64>,
) -> Vec<ForGib> {
    let mut smallest = None;
    let each = |grown: &Grown| {
        let gib = grown.subject.size_mib as f64 / GIB_MIB;
        let umem = Spread::of(grown.landings.iter().map(|one| umem(one) / gib).collect());
        let floor = Spread::of(floor(grown));
        let least = *smallest.get_or_insert((umem.median, floor.median));
        ForGib {
            over_smallest: umem.median / least.0,
            floor_over_smallest: finite(floor.median / least.1),
            over_floor: (!floor.rounds.is_empty()).then(|| umem.over(&floor)),
            floor: (!floor.rounds.is_empty()).then_some(floor),
            umem,
        }
    };
    grown.iter().map(each).collect()
}

impl Measure for Options {
    fn measure(&self) -> Result<Report> {
        let options = self;
        if options.rounds == 0 || options.sizes.0.contains(&0) {
            return usage("--rounds and --sizes are at least 1");
        }
        if options.into.is_from_pool() {
            return usage(format!("--into {} is not measured by `size`", options.into.word()));
        }
        let umem = find_umem(options.umem.as_deref())?;
        let machine = Machine::describe();
        let available = memory_available_mib();
        let sides = if options.release_ram { 1 } else { 2 };
        let mut sizes = options.sizes.0.clone();
        sizes.sort_unstable();
        sizes.dedup();
        let (fit, left_out): (Vec<usize>, Vec<usize>) =
            sizes.into_iter().partition(|mib| sides * mib + SPARE_MIB <= available);
        if fit.is_empty() {
            return failure(format!(
                "{available} MiB are free, and the smallest guest does not fit with {SPARE_MIB} MiB to \
                 spare: choose smaller --sizes"
            ));
        }
        progress("the floor's best way");
        let way = Floor::best_way(options.into, fit[0] << 20)?;
        let mut subjects: Vec<Grown> = fit
            .into_iter()
            .map(|size_mib| Subject {
                pages: options.into,
                size_mib,
                zero_percent: 0,
                readers: 0,
                lanes: options.lanes,
                release_ram: options.release_ram,
                checksum: false,
            })
            .map(|subject| Grown { subject, landings: Vec::new(), floor: Vec::new() })
            .collect();
        let route = Route { umem: &umem, namespaces: None, tls_creds: None };
        for round in 1..=options.rounds {
            for Grown { subject, landings, floor } in &mut subjects {
                let size_mib = subject.size_mib;
                if 2 * size_mib + SPARE_MIB <= available {
                    progress(&format!(
                        "round {round} of {}: floor, {size_mib} MiB",
                        options.rounds
                    ));
                    floor.push(turn(way, size_mib << 20)?);
                }
                progress(&format!("round {round} of {}: umem, {size_mib} MiB", options.rounds));
                landings.push(subject.land(&route)?);
            }
        }
        Ok(report(options, machine, way, &subjects, &left_out))
    }

    fn output(&self) -> Output<'_> {
        let svg = None;
        Output { json: self.json, report: self.report.as_deref(), svg }
    }
}

fn report(
    options: &Options,
    machine: Machine,
    way: Way,
    grown: &[Grown],
    left_out: &[usize],
) -> Report {
    let mut table = Table::new(&[
        "MiB",
        "s/GiB",
        "× smallest",
        "floor s/GiB",
        "× smallest",
        "× floor",
        "CPU s/GiB",
        "× smallest",
        "floor CPU s/GiB",
        "× smallest",
        "× floor",
        "source's own MiB",
        "destination's own MiB",
        "page state MiB",
    ]);
    let time = for_gib(
        grown,
        |landing| landing.total_s,
        |grown| {
            let gib = grown.subject.size_mib as f64 / GIB_MIB;
            grown.floor.iter().map(|(seconds, _)| seconds / gib).collect()
        },
    );
    let cpu = for_gib(
        grown,
        |landing| landing.cpu_s,
        |grown| grown.floor.iter().map(|(_, cpu_s_per_gib)| *cpu_s_per_gib).collect(),
    );
    let (mut figures, mut highlights) = (Vec::new(), Vec::new());
    for ((Grown { subject, landings, .. }, time), cpu) in grown.iter().zip(time).zip(cpu) {
        let most = |get: fn(&Landing) -> f64| Spread::of(landings.iter().map(get).collect()).max;
        let (source_own_mib, destination_own_mib) =
            (most(|landing| landing.source_own_mib), most(|landing| landing.destination_own_mib));
        let page_state_mib = page_state_mib(subject.size_mib);
        let mut row = vec![subject.size_mib.to_string()];
        row.extend([&time, &cpu].into_iter().flat_map(ForGib::cells));
        row.extend([source_own_mib, destination_own_mib, page_state_mib].map(|mib| cell(mib, 1)));
        table.row(row);
        highlights.push(format!(
            "{} MiB: {}, and {} in processor time; {} and {} MiB of memory of umem's own",
            subject.size_mib,
            time.sentence("the time"),
            cpu.sentence("that"),
            cell(source_own_mib, 1),
            cell(destination_own_mib, 1)
        ));
        figures.push(json!({
            "size_mib": subject.size_mib,
            "time_per_gib": time,
            "cpu_per_gib": cpu,
            "source_own_mib": source_own_mib,
            "destination_own_mib": destination_own_mib,
            "page_state_mib": page_state_mib,
        }));
    }
    let mut method = format!(
        "`umem migrate -p` → loopback TCP, {} bulk lane(s) → `umem incoming` with an idle `umem guest` \
         ({}) without zero pages or holes. Every size takes its turn in each of {} rounds, after as \
         much memory has been written and freed, and the guest checks every word afterwards. \
         Time is from the source's stop to the last page; CPU is that of both umem processes. Just before \
         it the floor has its turn, with as much memory: {} (the best of `floor`'s ways with the \
         smallest guest). × floor is umem's over the floor's, the median of the rounds'. Own \
         memory is the largest anonymous memory of a process (RssAnon, sampled \
         every 5 ms; the guest's pages that it maps are not its own), the largest of the rounds; \
         page state is 3 bits a page. All other figures are medians.",
        options.lanes,
        options.into.name(),
        options.rounds,
        way.name()
    );
    if options.release_ram {
        method += " The source frees its memory as it arrives (--release-ram); where the guest's memory \
                   does not fit twice, as much as fits is written and freed.";
    }
    if !left_out.is_empty() {
        method += &format!(" Left out, because they do not fit here: {left_out:?} MiB.");
    }
    Report {
        what: "size",
        machine,
        method,
        highlights,
        tables: vec![table],
        plots: Vec::new(),
        value: json!({
            "pages": options.into,
            "rounds": options.rounds,
            "lanes": options.lanes,
            "floor": way,
            "release_ram": options.release_ram,
            "figures": figures,
            "left_out_mib": left_out,
        }),
    }
}

impl ForGib {
    fn cells(&self) -> Vec<String> {
        let median = |spread: Option<&Spread>| cell(spread.map_or(f64::NAN, |s| s.median), 2);
        vec![
            cell(self.umem.median, 2),
            cell(self.over_smallest, 2),
            median(self.floor.as_ref()),
            cell(self.floor_over_smallest.unwrap_or(f64::NAN), 2),
            median(self.over_floor.as_ref()),
        ]
    }

    /// The cost of a GiB of this guest in terms of `what`, against the smallest guest's and the
    /// floor's.
    fn sentence(&self, what: &str) -> String {
        let floor = self.floor_over_smallest.map_or_else(String::new, |floor| {
            let over = self.over_floor.as_ref().map_or(f64::NAN, |over| over.median);
            format!(" (the floor {}; umem's is {} × the floor's)", cell(floor, 2), cell(over, 2))
        });
        format!("{} × {what} of the smallest for each GiB{floor}", cell(self.over_smallest, 2))
    }
}

/// The destination's state of each page: 3 bits (ARCHITECTURE.md, invariant 6).
fn page_state_mib(size_mib: usize) -> f64 {
    const BITS_A_PAGE: f64 = 3.0;
    let pages = (size_mib << 20) / PAGE_BYTES;
    pages as f64 * BITS_A_PAGE / 8.0 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_state_of_a_gib_is_96_kib() {
        assert!((page_state_mib(1024) - 0.09375).abs() < 1e-9);
    }
}
