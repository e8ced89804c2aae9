//! `link10`: umem over a link of 10 Gbit/s, beside iperf3 through the same link.

use std::path::PathBuf;

use argh::FromArgs;
use serde_json::json;

use crate::error::{Result, usage};
use crate::fault::{Touched, Touching};
use crate::link::{CONGESTION, Link};
use crate::machine::Machine;
use crate::memory::Pages;
use crate::migration::{Landing, Route, Subject};
use crate::process::find_umem;
use crate::report::{Measure, Output, Report, Table, cell, progress};
use crate::statistics::{Distribution, Spread};
use crate::svg::{Curve, Plot};

/// umem over a link of 10 Gbit/s between two network namespaces, beside iperf3; and the time of a
/// fault while the link is full. Needs root, ip, tc and iperf3.
#[derive(FromArgs)]
#[argh(subcommand, name = "link10")]
pub(crate) struct Options {
    /// the guest's RAM, MiB (default 1024)
    #[argh(option, default = "1024")]
    size: usize,
    /// turns of each subject (default 3)
    #[argh(option, default = "3")]
    rounds: usize,
    /// kind of memory (default memfd): memfd, huge-tmpfs, anonymous
    #[argh(option, default = "Pages::Memfd")]
    into: Pages,
    /// bulk lanes (default 1)
    #[argh(option, default = "1")]
    lanes: u16,
    /// pages that are touched while nothing else is sent, a turn (default 2000)
    #[argh(option, default = "2000")]
    count: usize,
    /// seconds that iperf3 sends, a turn (default 3)
    #[argh(option, default = "3")]
    seconds: u32,
    /// the link's rate, Gbit/s (default 10)
    #[argh(option, default = "10")]
    rate: u32,
    /// the umem to measure (default: the one beside this program)
    #[argh(option)]
    umem: Option<PathBuf>,
    /// write a plot of the fault latencies to this file
    #[argh(option)]
    svg: Option<PathBuf>,
    /// write a page with the tables and plots, for a browser, to this file
    #[argh(option)]
    report: Option<PathBuf>,
    /// print one JSON object
    #[argh(switch)]
    json: bool,
}

/// The results of the rounds.
#[derive(Default)]
struct Turns {
    iperf3_gbps: Vec<f64>,
    landings: Vec<Landing>,
    idle: Vec<Touched>,
    loaded: Vec<Touched>,
}

impl Measure for Options {
    fn measure(&self) -> Result<Report> {
        let options = self;
        if [options.size, options.rounds, options.count].contains(&0) {
            return usage("--size, --rounds and --count are at least 1");
        }
        if options.rate == 0 || options.seconds == 0 {
            return usage("--rate and --seconds are at least 1");
        }
        if options.into.is_from_pool() || options.into == Pages::Private {
            return usage(format!("--into {} is not measured by `link10`", options.into.word()));
        }
        let umem = find_umem(options.umem.as_deref())?;
        let machine = Machine::describe();
        let link = Link::new(options.rate)?;
        let route = Route { umem: &umem, namespaces: Some(link.namespaces()), tls_creds: None };
        let (pages, size_mib, lanes) = (options.into, options.size, options.lanes);
        let subject = Subject {
            pages,
            size_mib,
            zero_percent: 0,
            readers: 0,
            lanes,
            release_ram: false,
            checksum: false,
        };
        let touching = |count: Option<usize>| Touching {
            background: count.is_none(),
            count,
            ..Touching::new(pages, size_mib, lanes)
        };
        let mut turns = Turns::default();
        for round in 1..=options.rounds {
            let say =
                |what: &str| progress(&format!("round {round} of {}: {what}", options.rounds));
            say("iperf3");
            turns.iperf3_gbps.push(link.iperf3_gbps(options.seconds)?);
            say("umem, idle guest");
            turns.landings.push(subject.land(&route)?);
            say("faults, nothing else on the link");
            turns.idle.push(touching(Some(options.count)).once(&route)?);
            say("faults, the link full");
            turns.loaded.push(touching(None).once(&route)?);
        }
        Ok(report(options, machine, &turns))
    }

    fn output(&self) -> Output<'_> {
        let svg = self.svg.as_deref();
        Output { json: self.json, report: self.report.as_deref(), svg }
    }
}

fn report(options: &Options, machine: Machine, turns: &Turns) -> Report {
    let iperf3 = Spread::of(turns.iperf3_gbps.clone());
    let umem = Spread::of(turns.landings.iter().map(|landing| landing.gbps).collect());
    let touched = Spread::of(turns.loaded.iter().filter_map(|turn| turn.gbps).collect());
    let mut throughput = Table::new(&["through the link", "Gbit/s", "min", "max", "of iperf3's"]);
    for (name, gbps) in [
        ("iperf3", &iperf3),
        ("umem, idle guest", &umem),
        ("umem, guest that touches every page", &touched),
    ] {
        throughput.row(vec![
            name.into(),
            cell(gbps.median, 2),
            cell(gbps.min, 2),
            cell(gbps.max, 2),
            cell(gbps.median / iperf3.median, 3),
        ]);
    }
    let mut latency =
        Table::new(&["first access", "waited", "p50 µs", "p90", "p99", "p99.9", "max"]);
    let distribution = |turns: &[Touched]| {
        Distribution::of(turns.iter().flat_map(|turn| turn.waited_ns.iter().copied()).collect())
    };
    let (idle, loaded) = (distribution(&turns.idle), distribution(&turns.loaded));
    let mut curves = Vec::new();
    for (name, all) in [("nothing else on the link", &idle), ("the link full", &loaded)] {
        let mut row = vec![name.to_owned(), all.count.to_string()];
        row.extend(
            [all.p50_us, all.p90_us, all.p99_us, all.p999_us, all.max_us].map(|us| cell(us, 1)),
        );
        latency.row(row);
        curves.push(Curve { name: name.into(), points: all.curve() });
    }
    let plot = Plot::curves("First access to a page, over the link", "µs, logarithmic", curves);
    let method = format!(
        "Two network namespaces with a veth pair between them, shaped to {} Gbit/s in either direction \
         (tbf, burst 4 MB, latency 1 ms). iperf3: one connection ({CONGESTION}, zero-copy, 1 MiB \
         writes) for {} s after one that does not count. umem: `umem migrate -p`, {} bulk lane(s), \
         to `umem incoming`; a guest of {} MiB ({}) without zero pages, which is idle, or of which \
         each page is touched once, at random ({} pages with -n while nothing else is sent). Gbit/s \
         is iperf3's figure of bytes received, and umem's of page contents from the first page to \
         the last. Only accesses that slept count as first accesses; percentiles are over all rounds. \
         Every subject takes its turn in each of {} rounds, umem's after as much memory has been \
         written and freed. Medians.",
        options.rate,
        options.seconds,
        options.lanes,
        options.size,
        options.into.name(),
        options.count,
        options.rounds
    );
    Report {
        what: "link10",
        machine,
        method,
        highlights: vec![
            format!(
                "umem moves {} Gbit/s through the link, {} of iperf3's rate",
                cell(umem.median, 2),
                cell(umem.median / iperf3.median, 2)
            ),
            format!(
                "a first access takes {} µs (p99 {}), and {} µs (p99 {}) with the link full",
                cell(idle.p50_us, 0),
                cell(idle.p99_us, 0),
                cell(loaded.p50_us, 0),
                cell(loaded.p99_us, 0)
            ),
        ],
        tables: vec![throughput, latency],
        plots: vec![plot],
        value: json!({
            "size_mib": options.size,
            "rounds": options.rounds,
            "lanes": options.lanes,
            "pages": options.into,
            "rate_gbps": options.rate,
            "share_of_iperf3": umem.median / iperf3.median,
            "iperf3_gbps": iperf3,
            "umem_gbps": umem,
            "umem_touched_gbps": touched,
            "latency_idle": idle,
            "latency_full": loaded,
        }),
    }
}
