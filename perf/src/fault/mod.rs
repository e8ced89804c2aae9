//! `fault`: the time of a guest's first access to a page, from the access to its return, beside the
//! same round trip with plain system calls.

mod floor;
mod pattern;
mod toucher;

use std::path::PathBuf;

use argh::FromArgs;
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Context, Result, failure, usage};
use crate::machine::Machine;
use crate::memory::{List, Mapping, Pages, Pool};
use crate::migration::{PATIENCE, Route, ram, words};
use crate::process::find_umem;
use crate::report::{Measure, Output, Report, Table, cell, progress};
use crate::scratch::Scratch;
use crate::statistics::{Distribution, Spread};
use crate::svg::{Curve, Plot};

pub(crate) use pattern::Pattern;
pub(crate) use toucher::{Options as Toucher, run as touch};

/// The time of a guest's first access to a page: idle, under full background load, and the floor of
/// the same run.
#[derive(FromArgs)]
#[argh(subcommand, name = "fault")]
pub(crate) struct Options {
    /// the guest's RAM, MiB (default 1024)
    #[argh(option, default = "1024")]
    size: usize,
    /// turns of each subject (default 3)
    #[argh(option, default = "3")]
    rounds: usize,
    /// pages that are touched without background, and by each floor, a turn (default 4000)
    #[argh(option, default = "4000")]
    count: usize,
    /// kinds of memory, separated by commas (default memfd): memfd, huge-tmpfs, hugetlb, anonymous,
    /// anonymous-huge, private
    #[argh(option, default = "List(vec![Pages::Memfd])")]
    into: List<Pages>,
    /// bulk lanes (default 1)
    #[argh(option, default = "1")]
    lanes: u16,
    /// the umem to measure (default: the one beside this program)
    #[argh(option)]
    umem: Option<PathBuf>,
    /// write a plot of the distributions to this file
    #[argh(option)]
    svg: Option<PathBuf>,
    /// write a page with the tables and plots, for a browser, to this file
    #[argh(option)]
    report: Option<PathBuf>,
    /// print one JSON object
    #[argh(switch)]
    json: bool,
}

/// umem's stages of a fault, named as in its report.
const STAGES: [&str; 3] = ["read_to_asked", "asked_to_arrived", "arrived_to_continued"];

/// The program that answers the guest's faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Answers {
    /// Plain system calls, with guest, handler and source on one core.
    FloorOneCore,
    /// The same, with the handler on another core than the guest and the source.
    FloorTwoCores,
    /// umem without background pages.
    UmemIdle,
    /// umem while it sends all pages in the background.
    UmemLoaded,
}

impl Answers {
    const ALL: [Answers; 4] =
        [Answers::FloorOneCore, Answers::FloorTwoCores, Answers::UmemIdle, Answers::UmemLoaded];

    fn name(self) -> &'static str {
        match self {
            Answers::FloorOneCore => "floor, one core",
            Answers::FloorTwoCores => "floor, two cores",
            Answers::UmemIdle => "umem, idle",
            Answers::UmemLoaded => "umem, loaded",
        }
    }

    fn is_umem(self) -> bool {
        matches!(self, Answers::UmemIdle | Answers::UmemLoaded)
    }
}

/// One turn.
pub(crate) struct Touched {
    /// The time of each access that waited.
    pub(crate) waited_ns: Vec<u64>,
    /// The part of it in which the thread was ready to run without a core; empty if the kernel does
    /// not count it.
    queued_ns: Vec<u64>,
    /// Accesses to pages that had come already.
    pub(crate) already_there: u64,
    /// umem's own figures for the same faults, from reading one to waking the guest.
    umem_latency_us: Option<Value>,
    /// The same by stage.
    umem_stages_us: Option<Value>,
    /// Rate of page contents while they moved, for a run with background.
    pub(crate) gbps: Option<f64>,
}

/// The configuration of umem and of the guest that touches its memory.
#[derive(Clone, Copy)]
pub(crate) struct Touching {
    pub(crate) pages: Pages,
    pub(crate) size_mib: usize,
    pub(crate) lanes: u16,
    /// Accesses; none for as many as there are pages.
    pub(crate) count: Option<usize>,
    /// Whether all pages are sent in the background.
    pub(crate) background: bool,
    pub(crate) pattern: Pattern,
    /// Computing time of the guest after each access, µs.
    pub(crate) think_us: u64,
    pub(crate) order: Order,
}

/// The order of the background: `--order` of `umem migrate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Order {
    Adaptive,
    Plain,
}

impl Order {
    pub(crate) const ALL: [Order; 2] = [Order::Adaptive, Order::Plain];

    pub(crate) fn word(self) -> &'static str {
        match self {
            Order::Adaptive => "adaptive",
            Order::Plain => "plain",
        }
    }
}

/// A subject and its turns.
struct Subject {
    pages: Pages,
    answers: Answers,
    turns: Vec<Touched>,
}

impl Measure for Options {
    fn measure(&self) -> Result<Report> {
        let options = self;
        if options.size == 0 || options.rounds == 0 || options.count == 0 {
            return usage("--size, --rounds and --count are at least 1");
        }
        let umem = find_umem(options.umem.as_deref())?;
        let machine = Machine::describe();
        let bytes = options.size << 20;
        let is_from_pool = options.into.0.iter().any(|pages| pages.is_from_pool());
        let _pool = is_from_pool.then(|| Pool::reserve(bytes)).transpose()?;
        let mut subjects: Vec<Subject> = Vec::new();
        for &pages in &options.into.0 {
            subjects.extend(Answers::ALL.map(|answers| Subject {
                pages,
                answers,
                turns: Vec::new(),
            }));
        }
        let route = Route { umem: &umem, namespaces: None, tls_creds: None };
        for round in 1..=options.rounds {
            for subject in &mut subjects {
                let (pages, answers) = (subject.pages, subject.answers);
                progress(&format!(
                    "round {round} of {}: {}, {}",
                    options.rounds,
                    pages.name(),
                    answers.name()
                ));
                let touching = |count: Option<usize>| Touching {
                    background: count.is_none(),
                    count,
                    ..Touching::new(pages, options.size, options.lanes)
                };
                subject.turns.push(match answers {
                    Answers::UmemIdle => touching(Some(options.count)).once(&route)?,
                    Answers::UmemLoaded => touching(None).once(&route)?,
                    Answers::FloorOneCore => raw(pages, bytes, options.count, true)?,
                    Answers::FloorTwoCores => raw(pages, bytes, options.count, false)?,
                });
            }
        }
        Ok(report(options, machine, &subjects))
    }

    fn output(&self) -> Output<'_> {
        let svg = self.svg.as_deref();
        Output { json: self.json, report: self.report.as_deref(), svg }
    }
}

fn raw(pages: Pages, bytes: usize, count: usize, one_core: bool) -> Result<Touched> {
    pages.warm(bytes)?;
    let waited_ns = floor::round_trips(pages, bytes, count, one_core)?;
    Ok(Touched {
        waited_ns,
        queued_ns: Vec::new(),
        already_there: 0,
        umem_latency_us: None,
        umem_stages_us: None,
        gbps: None,
    })
}

impl Touching {
    /// Random accesses to all pages of an otherwise idle guest.
    pub(crate) fn new(pages: Pages, size_mib: usize, lanes: u16) -> Touching {
        Touching {
            pages,
            size_mib,
            lanes,
            count: None,
            background: true,
            pattern: Pattern::Random,
            think_us: 0,
            order: Order::Adaptive,
        }
    }

    /// Serves a filled file to a `toucher` once, and ends all processes that it started.
    pub(crate) fn once(self, route: &Route<'_>) -> Result<Touched> {
        let bytes = self.size_mib << 20;
        let scratch = Scratch::new()?;
        let from = self.pages.source().file(bytes)?;
        Mapping::of(&from, bytes)?.fill();
        self.pages.warm(bytes)?;

        let program = std::env::current_exe().context(|| "this program's path")?;
        let mut command = vec![program.into()];
        let (size, kind) = (self.size_mib.to_string(), self.pages.word());
        let (pattern, think) = (self.pattern.word(), self.think_us.to_string());
        command.extend(words(&["toucher", "--size", &size, "--kind", kind]));
        command.extend(words(&["--pattern", pattern, "--think-us", &think]));
        if let Some(count) = self.count {
            command.extend(words(&["--count", &count.to_string()]));
        }
        let to = (!self.pages.is_anonymous()).then(|| self.pages.file(bytes)).transpose()?;
        let mut options = Vec::new();
        if let Some(to) = &to {
            options.extend(["--ram".into(), ram(to).into()]);
            command.extend(["--ram".into(), ram(to).into()]);
            if self.pages == Pages::Private {
                options.extend(words(&["--kind", "private", "--postcopy-flags", "1"]));
            }
        } else {
            let handoff = scratch.file("handoff");
            options.extend(["--handoff".into(), handoff.clone().into()]);
            command.extend(["--handoff".into(), handoff.into()]);
        }
        let (mut incoming, uri) = route.incoming(&scratch, options, command)?;
        let mut options = vec!["--ram".into(), ram(&from).into()];
        options.extend(words(&["--order", self.order.word()]));
        if !self.background {
            options.push("-n".into());
        }
        let mut migrate = route.migrate(&scratch, self.lanes, options, &uri)?;
        // Both print to the same stream, in either order.
        let (mut touched, mut completed) = (None, None);
        while touched.is_none() || completed.is_none() {
            let (_, event) = incoming.any_event(&["touched", "completed"], PATIENCE)?;
            if event["event"] == "completed" {
                completed = Some(event);
                continue;
            }
            touched = Some(event);
            if !self.background {
                // Makes it send the rest.
                migrate.interrupt()?;
            }
        }
        migrate.event("completed", PATIENCE)?;
        let (touched, completed) = (touched.unwrap_or_default(), completed.unwrap_or_default());
        if touched["wrong"] != 0 {
            return failure(format!("the guest read {} wrong pages", touched["wrong"]));
        }
        let told = |name: &str| -> Result<Vec<u64>> {
            let values = touched[name].as_array().ok_or("the toucher reported no latencies")?;
            Ok(values.iter().filter_map(Value::as_u64).collect())
        };
        Ok(Touched {
            waited_ns: told("waited_ns")?,
            queued_ns: told("queued_ns")?,
            already_there: touched["already_there"].as_u64().unwrap_or(0),
            umem_latency_us: Some(completed["fault_latency_us"].clone()),
            umem_stages_us: Some(completed["fault_stages_us"].clone()),
            gbps: self.background.then(|| completed["gbps"].as_f64()).flatten(),
        })
    }
}

/// The accesses' waiting time for a core, and their time without it.
fn queued(turns: &[Touched]) -> [Distribution; 2] {
    let queued = turns.iter().flat_map(|turn| turn.queued_ns.iter().copied()).collect();
    let left = turns.iter().flat_map(|turn| {
        let pairs = turn.waited_ns.iter().zip(&turn.queued_ns);
        pairs.map(|(waited, queued)| waited - queued)
    });
    [Distribution::of(queued), Distribution::of(left.collect())]
}

/// All turns of a subject together.
fn distribution(turns: &[Touched]) -> Distribution {
    Distribution::of(turns.iter().flat_map(|turn| turn.waited_ns.iter().copied()).collect())
}

fn report(options: &Options, machine: Machine, subjects: &[Subject]) -> Report {
    let mut table = Table::new(&[
        "memory",
        "answered by",
        "waited",
        "p50 µs",
        "p90",
        "p99",
        "p99.9",
        "max",
        "in umem",
        "p50 × floor",
        "p99 × floor",
        "p50 × idle",
        "p99 × idle",
    ]);
    let mut by_stage = Table::new(&[
        "memory",
        "answered by",
        "read → asked p50 µs",
        "p99",
        "asked → arrived p50 µs",
        "p99",
        "arrived → continued p50 µs",
        "p99",
        "before and after p50 µs",
        "for a core p50 µs",
        "p99",
        "without it p50 µs",
        "× idle",
        "stream Gbit/s",
    ]);
    let (mut figures, mut curves, mut highlights) = (Vec::new(), Vec::new(), Vec::new());
    for subject in subjects {
        let all = distribution(&subject.turns);
        let of = |answers: Answers| {
            let same = |other: &&Subject| other.pages == subject.pages && other.answers == answers;
            subjects.iter().find(same).map(|other| distribution(&other.turns))
        };
        // The lower of the two floors, which is harder to reach.
        let floors = [Answers::FloorOneCore, Answers::FloorTwoCores].map(of);
        let floor = floors.into_iter().flatten().min_by(|a, b| a.p50_us.total_cmp(&b.p50_us));
        let idle = of(Answers::UmemIdle);
        let over = |other: Option<&Distribution>, get: fn(&Distribution) -> f64, is: bool| {
            other.filter(|_| is).map_or(f64::NAN, |other| get(&all) / get(other))
        };
        let [for_a_core, without] = queued(&subject.turns);
        let idle_without = subjects
            .iter()
            .find(|other| other.pages == subject.pages && other.answers == Answers::UmemIdle)
            .map(|other| queued(&other.turns)[1].p50_us);
        let ratio_without = match subject.answers {
            Answers::UmemLoaded => without.p50_us / idle_without.unwrap_or(f64::NAN),
            _ => f64::NAN,
        };
        let (p50, p99) = (|d: &Distribution| d.p50_us, |d: &Distribution| d.p99_us);
        let is_umem = subject.answers.is_umem();
        let is_loaded = subject.answers == Answers::UmemLoaded;
        let read_to_woken = subject.turns.iter().filter_map(|turn| {
            turn.umem_latency_us.as_ref().and_then(|latency| latency["p50"].as_f64())
        });
        let inside = Spread::of(read_to_woken.collect());
        let ratios = [
            over(floor.as_ref(), p50, is_umem),
            over(floor.as_ref(), p99, is_umem),
            over(idle.as_ref(), p50, is_loaded),
            over(idle.as_ref(), p99, is_loaded),
        ];
        let mut row =
            vec![subject.pages.name().into(), subject.answers.name().into(), all.count.to_string()];
        row.extend(
            [all.p50_us, all.p90_us, all.p99_us, all.p999_us, all.max_us].map(|us| cell(us, 1)),
        );
        row.push(cell(inside.median, 0));
        row.extend(ratios.map(|ratio| cell(ratio, 2)));
        table.row(row);
        if is_umem {
            let (over, ratio) =
                if is_loaded { ("the idle one", ratios[2]) } else { ("the floor", ratios[0]) };
            let without = if is_loaded {
                format!(
                    "; without waiting for a core p50 {} µs, {} × the idle one",
                    cell(without.p50_us, 0),
                    cell(ratio_without, 2)
                )
            } else {
                String::new()
            };
            highlights.push(format!(
                "{}, {}: p50 {} µs, {} × {over}; p99 {} µs{without}",
                subject.pages.name(),
                subject.answers.name(),
                cell(all.p50_us, 0),
                cell(ratio, 2),
                cell(all.p99_us, 0)
            ));
        }
        let each = |get: fn(&Distribution) -> f64| {
            let turns = subject.turns.iter().map(|turn| Distribution::of(turn.waited_ns.clone()));
            Spread::of(turns.map(|turn| get(&turn)).collect())
        };
        let already_there: u64 = subject.turns.iter().map(|turn| turn.already_there).sum();
        let gbps: Vec<f64> = subject.turns.iter().filter_map(|turn| turn.gbps).collect();
        let own: Vec<&Value> =
            subject.turns.iter().filter_map(|turn| turn.umem_latency_us.as_ref()).collect();
        let stages: Vec<&Value> =
            subject.turns.iter().filter_map(|turn| turn.umem_stages_us.as_ref()).collect();
        if is_umem {
            let mut row = vec![subject.pages.name().into(), subject.answers.name().into()];
            for stage in STAGES {
                let of = |what: &str| {
                    let each = stages.iter().filter_map(|turn| turn[stage][what].as_f64());
                    cell(Spread::of(each.collect()).median, 1)
                };
                row.extend([of("p50"), of("p99")]);
            }
            row.push(cell(all.p50_us - inside.median, 1));
            row.extend(
                [for_a_core.p50_us, for_a_core.p99_us, without.p50_us].map(|us| cell(us, 1)),
            );
            row.extend([cell(ratio_without, 2), cell(Spread::of(gbps.clone()).median, 1)]);
            by_stage.row(row);
        }
        figures.push(json!({
            "pages": subject.pages,
            "answered_by": subject.answers,
            "latency": all,
            "p50_us": each(p50),
            "p99_us": each(p99),
            "already_there": already_there,
            "background_gbps": (!gbps.is_empty()).then(|| Spread::of(gbps)),
            "umem_read_to_woken_us": (!own.is_empty()).then_some(own),
            "umem_stages_us": stages,
            "ratio_to_floor": { "p50": ratios[0], "p99": ratios[1] },
            "floor": floor.as_ref().map(|floor| json!({ "p50_us": floor.p50_us, "p99_us": floor.p99_us })),
            "ratio_to_idle": { "p50": ratios[2], "p99": ratios[3] },
            "waiting_for_a_core": is_umem.then_some(&for_a_core),
            "without_waiting_for_a_core": is_umem.then_some(&without),
        }));
        let name = format!("{}, {}", subject.pages.name(), subject.answers.name());
        curves.push(Curve { name, points: all.curve() });
    }
    let method = format!(
        "A thread reads the first word of {} random pages of {} MiB that it has not touched before \
         (loaded: of all pages), one after another, and times each read; only reads that the thread \
         slept in count. Floor: a thread reads the userfaultfd, requests the page over loopback TCP, receives it \
         from another thread and makes it visible (UFFDIO_CONTINUE; anonymous: UFFDIO_COPY), \
         with plain blocking system calls at ordinary priority. umem: `umem migrate -p` (idle: -n) → \
         loopback TCP, {} bulk lane(s) → `umem incoming`; loaded lasts until every page has come. \
         Every subject takes its turn in each of {} rounds, after as much memory has been written and \
         freed; percentiles are over all rounds, and every page read was checked. × floor is \
         over the floor with the lower median, × idle over umem idle. In umem is umem's own median \
         from having read the fault to waking the guest; the rest of p50 is the kernel's, and the \
         guest's way back onto its core. The second table has umem's part by stage, medians of the \
         turns: from reading a fault until its request has been handed to the kernel, until the page \
         has come, until it is visible and its waiter woken; and the part of the guest's p50 before \
         and after them. For a core is the time in which the guest's thread was ready to run, its page present, and \
         had no core (/proc/thread-self/schedstat, access by access), and without it is the rest of each \
         access: on a machine where guest, source and destination have a core each that is all of it. \
         Stream is the rate of the background at the same time.",
        options.count, options.size, options.lanes, options.rounds
    );
    let plot = Plot::curves("First access to a page", "µs, logarithmic", curves);
    Report {
        what: "fault",
        machine,
        method,
        highlights,
        tables: vec![table, by_stage],
        plots: vec![plot],
        value: json!({
            "size_mib": options.size,
            "rounds": options.rounds,
            "count": options.count,
            "lanes": options.lanes,
            "figures": figures,
        }),
    }
}
