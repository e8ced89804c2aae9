//! `bench`: the throughput of `umem bench` over the loopback address, beside `land` with the same
//! settings: the link tester has to predict a migration's throughput.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use argh::FromArgs;
use serde_json::{Value, json};

use crate::error::{Result, failure, usage};
use crate::machine::Machine;
use crate::memory::{List, Pages, Pool};
use crate::migration::{Landing, PATIENCE, Route, Subject, words};
use crate::process::{Process, find_umem};
use crate::report::{Measure, Output, Report, Table, cell, progress};
use crate::scratch::Scratch;
use crate::statistics::{Spread, finite};
use crate::svg::{Bar, Plot};

/// `umem bench` over the loopback address, beside a migration with the same settings.
#[derive(FromArgs)]
#[argh(subcommand, name = "bench")]
pub(crate) struct Options {
    /// the RAM of the guest that is moved, MiB (default 1024)
    #[argh(option, default = "1024")]
    size: usize,
    /// seconds of each `umem bench` (default 5)
    #[argh(option, default = "5")]
    seconds: u32,
    /// turns of each subject (default 3)
    #[argh(option, default = "3")]
    rounds: usize,
    /// kinds of memory, separated by commas (default memfd,huge-tmpfs): memfd, huge-tmpfs,
    /// anonymous, anonymous-huge
    #[argh(option, default = "List(vec![Pages::Memfd, Pages::HugeTmpfs])")]
    into: List<Pages>,
    /// bulk lanes (default 1)
    #[argh(option, default = "1")]
    lanes: u16,
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

/// The most MiB of a pass of a bench (`REGION_BYTES_MAX` in src/programs/bench/pages.rs).
const PASS_MIB_MAX: usize = 512;

/// The memory of the most passes that a bench has at a time (`REGIONS_ALIVE_MAX` in
/// src/programs/bench/pages.rs).
const POOL_BYTES: usize = 6 * (PASS_MIB_MAX << 20);

/// The result of one `umem bench`.
#[derive(Clone, Copy)]
struct Bench {
    gbps: f64,
    cpu_s_per_gib: f64,
    sender_busy: f64,
    receiver_busy: f64,
}

/// A kind of memory, and its turns.
struct Turns {
    pages: Pages,
    landings: Vec<Landing>,
    benches: Vec<Bench>,
}

impl Measure for Options {
    fn measure(&self) -> Result<Report> {
        if self.size == 0 || self.rounds == 0 || self.seconds == 0 || !self.size.is_multiple_of(2) {
            return usage("--size, an even number, --rounds and --seconds are at least 1");
        }
        for pages in &self.into.0 {
            if matches!(pages, Pages::Hugetlb | Pages::Private) {
                return usage(format!(
                    "--into {}: `umem bench` does not support this memory",
                    pages.word()
                ));
            }
        }
        let umem = find_umem(self.umem.as_deref())?;
        let machine = Machine::describe();
        let is_from_pool = self.into.0.iter().any(|pages| pages.is_from_pool());
        let pool_bytes = POOL_BYTES.max(self.size << 20);
        let _pool = is_from_pool.then(|| Pool::reserve(pool_bytes)).transpose()?;
        let route = Route { umem: &umem, namespaces: None, tls_creds: None };
        let turns = |&pages| Turns { pages, landings: Vec::new(), benches: Vec::new() };
        let mut all: Vec<Turns> = self.into.0.iter().map(turns).collect();
        for round in 1..=self.rounds {
            for turns in &mut all {
                let name = turns.pages.name();
                let (pages, size_mib, lanes) = (turns.pages, self.size, self.lanes);
                progress(&format!("round {round} of {}: {name}, umem migrate", self.rounds));
                let subject = Subject {
                    pages,
                    size_mib,
                    zero_percent: 0,
                    readers: 0,
                    lanes,
                    release_ram: false,
                    checksum: false,
                };
                turns.landings.push(subject.land(&route)?);
                progress(&format!("round {round} of {}: {name}, umem bench", self.rounds));
                turns.benches.push(self.bench(pages, &route)?);
            }
        }
        Ok(report(self, machine, &all))
    }

    fn output(&self) -> Output<'_> {
        let svg = self.svg.as_deref();
        Output { json: self.json, report: self.report.as_deref(), svg }
    }
}

impl Options {
    /// Runs `umem bench` once.
    fn bench(&self, pages: Pages, route: &Route<'_>) -> Result<Bench> {
        let scratch = Scratch::new()?;
        let arguments = words(&["bench", "server", "--json", "--one-off", "tcp:127.0.0.1:0"]);
        let log = scratch.file("server.log");
        let mut server = Process::start("umem bench server", route.umem, &arguments, log)?;
        let (_, listening) = server.event("listening", PATIENCE)?;
        let uri = listening["uri"].as_str().unwrap_or_default();
        let (seconds, lanes) = (self.seconds.to_string(), self.lanes.to_string());
        let mut arguments = words(&["bench", "client", "--json", "-t", &seconds, "-P", &lanes]);
        arguments.extend(words(&["--pass-size", &format!("{}M", self.size.min(PASS_MIB_MAX))]));
        arguments.extend(place(pages));
        arguments.push(uri.into());
        let log = scratch.file("client.log");
        let mut client = Process::start("umem bench client", route.umem, &arguments, log)?;
        let patience = PATIENCE + Duration::from_secs(self.seconds.into());
        Bench::of(&client.object(patience)?)
    }
}

/// The options of `umem bench client` for memory of this kind.
fn place(pages: Pages) -> Vec<OsString> {
    words(match pages {
        Pages::Memfd => &[],
        Pages::HugeTmpfs => &["--page-size", "2M"],
        Pages::Anonymous => &["--kind", "anonymous"],
        Pages::AnonymousHuge => &["--kind", "anonymous", "--page-size", "2M"],
        Pages::Hugetlb | Pages::Private => unreachable!("refused before"),
    })
}

impl Bench {
    fn of(report: &Value) -> Result<Bench> {
        let number = |pointer: &str| match report.pointer(pointer).and_then(Value::as_f64) {
            Some(number) => Ok(number),
            None => failure(format!("umem bench: no {pointer} in {report}")),
        };
        Ok(Bench {
            gbps: number("/end/sum_received/bits_per_second")? / 1e9,
            cpu_s_per_gib: number("/end/umem/cpu_s_per_gb")? * f64::from(1 << 30) / 1e9,
            sender_busy: number("/end/umem/sender_busy")?,
            receiver_busy: number("/end/umem/receiver_busy")?,
        })
    }
}

fn report(options: &Options, machine: Machine, all: &[Turns]) -> Report {
    let mut table = Table::new(&[
        "into",
        "umem migrate Gbit/s",
        "min",
        "max",
        "umem bench Gbit/s",
        "min",
        "max",
        "ratio",
        "CPU s/GiB: migrate",
        "bench",
        "sender busy",
        "receiver busy",
    ]);
    let (mut figures, mut bars, mut highlights) = (Vec::new(), Vec::new(), Vec::new());
    let gib = options.size as f64 / 1024.0;
    for Turns { pages, landings, benches } in all {
        let landed = |get: fn(&Landing) -> f64| Spread::of(landings.iter().map(get).collect());
        let benched = |get: fn(&Bench) -> f64| Spread::of(benches.iter().map(get).collect());
        let (land_gbps, bench_gbps) = (landed(|l| l.gbps), benched(|b| b.gbps));
        let land_cpu_s = landed(|l| l.cpu_s).median / gib;
        let bench_cpu_s = benched(|b| b.cpu_s_per_gib);
        let busy = [benched(|b| b.sender_busy), benched(|b| b.receiver_busy)];
        let ratio = bench_gbps.median / land_gbps.median;
        let mut row = vec![pages.name().to_owned()];
        for gbps in [&land_gbps, &bench_gbps] {
            row.extend([gbps.median, gbps.min, gbps.max].map(|gbps| cell(gbps, 1)));
        }
        row.extend([ratio, land_cpu_s, bench_cpu_s.median].map(|value| cell(value, 2)));
        row.extend(busy.iter().map(|busy| format!("{:.0} %", busy.median * 100.0)));
        table.row(row);
        highlights.push(format!(
            "{}: umem bench reports {:.1} Gbit/s, {} of a migration's",
            pages.name(),
            bench_gbps.median,
            cell(ratio, 2)
        ));
        bars.push(Bar {
            name: format!("{}, {} lane(s)", pages.name(), options.lanes),
            value: finite(bench_gbps.median),
            mark: finite(land_gbps.median),
        });
        figures.push(json!({
            "pages": pages,
            "migrate_gbps": land_gbps,
            "bench_gbps": bench_gbps,
            "ratio_to_migrate": ratio,
            "migrate_cpu_s_per_gib": land_cpu_s,
            "bench_cpu_s_per_gib": bench_cpu_s,
            "bench_sender_busy": busy[0],
            "bench_receiver_busy": busy[1],
        }));
    }
    let method = format!(
        "In turns, {} rounds: `umem migrate -p` → loopback TCP → `umem incoming` with an idle guest of \
         {} MiB, as `land` moves it, and `umem bench client -t {}` to `umem bench server`, with the same \
         kind of memory and {} bulk lane(s). Each fills fresh memory, and has written and freed \
         as much before. Gbit/s is each program's own figure: of page contents from the first page to the \
         last, and of all that the receiver has landed in the whole time. A bench frees memory while \
         it runs, which a migration does not; its CPU includes the cost of that. Busy is the busiest \
         lane's thread. The ratio is the bench's over the migration's. Medians.",
        options.rounds, options.size, options.seconds, options.lanes
    );
    let title = "umem bench over the loopback address (the marks are migrations)";
    Report {
        what: "bench",
        machine,
        method,
        highlights,
        tables: vec![table],
        plots: vec![Plot::bars(title, "Gbit/s", bars)],
        value: json!({
            "size_mib": options.size,
            "seconds": options.seconds,
            "rounds": options.rounds,
            "lanes": options.lanes,
            "figures": figures,
        }),
    }
}
