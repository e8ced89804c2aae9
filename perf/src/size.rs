//! `size`: what moving a guest takes as the guest grows: time, processor time, and memory of umem's own.

use std::path::PathBuf;

use argh::FromArgs;
use serde_json::json;

use crate::error::{Result, failure, usage};
use crate::machine::{Machine, memory_available_mib};
use crate::memory::{List, PAGE_BYTES, Pages};
use crate::migration::{Landing, Route, SPARE_MIB, Subject};
use crate::process::find_umem;
use crate::report::{Measure, Output, Report, Table, cell, progress};
use crate::statistics::Spread;

/// What moving a guest takes as the guest grows: time, processor time, memory of umem's own.
#[derive(FromArgs)]
#[argh(subcommand, name = "size")]
pub(crate) struct Options {
    /// sizes of the guest's RAM in MiB with commas between them (default 1024,2048,4096,8192); one
    /// that twice does not fit into this machine's memory is left out, without --release-ram
    #[argh(option, default = "List(vec![1024, 2048, 4096, 8192])")]
    sizes: List<usize>,
    /// how often each size has its turn (default 3)
    #[argh(option, default = "3")]
    rounds: usize,
    /// kind of memory (default memfd): memfd, huge-tmpfs, anonymous, private
    #[argh(option, default = "Pages::Memfd")]
    into: Pages,
    /// free the source's memory as it arrives (`umem migrate --release-ram`), so that a guest of nearly all
    /// of this machine's memory fits
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

/// A guest's pages by which time and processor time are compared.
const GIB_MIB: f64 = 1024.0;

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
        let mut subjects: Vec<(Subject, Vec<Landing>)> = fit
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
            .map(|subject| (subject, Vec::new()))
            .collect();
        let route = Route { umem: &umem, namespaces: None, tls_creds: None };
        for round in 1..=options.rounds {
            for (subject, landings) in &mut subjects {
                progress(&format!("round {round} of {}: {} MiB", options.rounds, subject.size_mib));
                landings.push(subject.land(&route)?);
            }
        }
        Ok(report(options, machine, &subjects, &left_out))
    }

    fn output(&self) -> Output<'_> {
        let svg = None;
        Output { json: self.json, report: self.report.as_deref(), svg }
    }
}

fn report(
    options: &Options,
    machine: Machine,
    subjects: &[(Subject, Vec<Landing>)],
    left_out: &[usize],
) -> Report {
    let mut table = Table::new(&[
        "MiB",
        "total s",
        "s/GiB",
        "× smallest",
        "CPU s",
        "CPU s/GiB",
        "× smallest",
        "source's own MiB",
        "destination's own MiB",
        "page state MiB",
    ]);
    let spread = |landings: &[Landing], get: fn(&Landing) -> f64| {
        Spread::of(landings.iter().map(get).collect())
    };
    let (mut figures, mut highlights) = (Vec::new(), Vec::new());
    let mut smallest: Option<(f64, f64)> = None;
    for (subject, landings) in subjects {
        let gib = subject.size_mib as f64 / GIB_MIB;
        let (total_s, cpu_s) = (spread(landings, |l| l.total_s), spread(landings, |l| l.cpu_s));
        let (time, cpu) = (total_s.median / gib, cpu_s.median / gib);
        let (least_time, least_cpu) = *smallest.get_or_insert((time, cpu));
        let source_own_mib = spread(landings, |l| l.source_own_mib);
        let destination_own_mib = spread(landings, |l| l.destination_own_mib);
        let page_state_mib = page_state_mib(subject.size_mib);
        table.row(vec![
            subject.size_mib.to_string(),
            cell(total_s.median, 2),
            cell(time, 2),
            cell(time / least_time, 2),
            cell(cpu_s.median, 2),
            cell(cpu, 2),
            cell(cpu / least_cpu, 2),
            cell(source_own_mib.max, 1),
            cell(destination_own_mib.max, 1),
            cell(page_state_mib, 1),
        ]);
        highlights.push(format!(
            "{} MiB: {} times the time of the smallest for each GiB, {} times the processor time; {} and {} \
             MiB of memory of umem's own",
            subject.size_mib,
            cell(time / least_time, 2),
            cell(cpu / least_cpu, 2),
            cell(source_own_mib.max, 1),
            cell(destination_own_mib.max, 1)
        ));
        figures.push(json!({
            "size_mib": subject.size_mib,
            "total_s": total_s,
            "cpu_s": cpu_s,
            "time_per_gib_over_smallest": time / least_time,
            "cpu_per_gib_over_smallest": cpu / least_cpu,
            "source_own_mib": source_own_mib,
            "destination_own_mib": destination_own_mib,
            "page_state_mib": page_state_mib,
        }));
    }
    let mut method = format!(
        "`umem migrate -p` → loopback TCP, {} bulk lane(s) → `umem incoming` with an idle `umem guest` \
         ({}) without zero pages or holes. Every size takes its turn in each of {} rounds, after as \
         much memory has been written and given back, and the guest checks every word afterwards. \
         Total is from the source's stop to the last page; CPU is that of both umem processes. Own \
         memory is the most anonymous memory that a process was seen to have (RssAnon, looked at \
         every 5 ms; the guest's pages that it maps are not its own), the largest of the rounds; \
         page state is what 3 bits a page are. All other figures are medians.",
        options.lanes,
        options.into.name(),
        options.rounds
    );
    if options.release_ram {
        method += " The source frees its memory as it arrives (--release-ram); where the guest's memory \
                   does not fit twice, as much as does fit is written and given back.";
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
            "release_ram": options.release_ram,
            "figures": figures,
            "left_out_mib": left_out,
        }),
    }
}

/// What the destination keeps of each page: 3 bits (ARCHITECTURE.md, what must hold).
fn page_state_mib(size_mib: usize) -> f64 {
    const BITS_A_PAGE: f64 = 3.0;
    let pages = (size_mib << 20) / PAGE_BYTES;
    pages as f64 * BITS_A_PAGE / 8.0 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_state_of_a_gib() {
        assert!((page_state_mib(1024) - 0.09375).abs() < 1e-9);
    }
}
