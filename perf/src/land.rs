//! `land`: umem end to end, into checked guest memory, beside the floor of the same run.
//!
//! The processes are those of a real migration: `umem guest`, `umem migrate -p`, and `umem incoming`
//! with a `umem guest` of its own, over loopback TCP with one bulk lane.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use argh::FromArgs;
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Context, Result, failure, usage};
use crate::floor::Floor;
use crate::machine::Machine;
use crate::memory::{PAGE_BYTES, Pages};
use crate::process::{Cpu, Process, find_umem};
use crate::qmp::Qmp;
use crate::report::{Report, Table, progress};
use crate::scratch::{Scratch, warm};
use crate::statistics::Spread;

/// umem end to end into checked guest memory, as a share of the floor measured in the same run.
#[derive(FromArgs)]
#[argh(subcommand, name = "land")]
pub(crate) struct Options {
    /// the guest's RAM, MiB, all of it data (default 1024)
    #[argh(option, default = "1024")]
    size: usize,
    /// how often each subject has its turn (default 3)
    #[argh(option, default = "3")]
    rounds: usize,
    /// bulk lanes (default 1)
    #[argh(option, default = "1")]
    lanes: u16,
    /// the umem to measure (default: the one beside this program)
    #[argh(option)]
    umem: Option<PathBuf>,
    /// print one JSON object
    #[argh(switch)]
    json: bool,
}

/// A child that says nothing for this long is stuck.
const PATIENCE: Duration = Duration::from_secs(120);

/// What is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Subject {
    pages: Pages,
    /// Threads of the guest that read pages at random meanwhile, as fast as they can.
    readers: u32,
}

/// What one move gave.
#[derive(Clone, Debug, Serialize)]
struct Landing {
    gbps: f64,
    /// Source's guest stopped → last page cached.
    total_s: f64,
    downtime_ms: f64,
    pages_demand: u64,
    /// Processor time of both umem processes.
    cpu_s: f64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if options.size == 0 || options.rounds == 0 {
        return usage("--size and --rounds are at least 1");
    }
    let umem = find_umem(options.umem.as_deref())?;
    let machine = Machine::describe();
    let mut floor = Floor::new(options.size << 20)?;
    let kinds: &[Pages] =
        if floor.left_out.is_empty() { &[Pages::Memfd, Pages::HugeTmpfs] } else { &[Pages::Memfd] };
    let each = |&pages| [0, 1].map(|readers| Subject { pages, readers });
    let mut subjects: Vec<(Subject, Vec<Landing>)> =
        kinds.iter().flat_map(each).map(|subject| (subject, Vec::new())).collect();
    for round in 1..=options.rounds {
        progress(&format!("round {round} of {}: floor", options.rounds));
        floor.round()?;
        for (subject, landings) in &mut subjects {
            let (pages, readers) = (subject.pages.name(), subject.readers);
            progress(&format!(
                "round {round} of {}: umem, {pages}, {readers} readers",
                options.rounds
            ));
            landings.push(land(&umem, options, *subject)?);
        }
    }
    report(options, machine, &floor, &subjects).print(options.json);
    Ok(())
}

/// Moves a guest once. Whatever it started ends here.
fn land(umem: &Path, options: &Options, subject: Subject) -> Result<Landing> {
    let bytes = options.size << 20;
    let scratch = Scratch::new()?;
    let (from, to) = (subject.pages.file(bytes)?, subject.pages.file(bytes)?);
    let (here, there) = (scratch.file("source.qmp"), scratch.file("destination.qmp"));

    let arguments = guest_arguments(options, subject, &here, &from);
    let mut guest = Process::start("the guest", umem, &arguments, scratch.file("guest.log"))?;
    guest.event("ready", PATIENCE)?;
    warm(&subject.pages.file(bytes)?, bytes as u64).context(|| "warming memory")?;

    let mut arguments = words(&["incoming", "--json", "--qmp"]);
    arguments.extend([there.clone().into(), "--ram".into(), ram(&to).into()]);
    arguments.extend(words(&["tcp:127.0.0.1:0", "--"]));
    arguments.push(umem.into());
    arguments.extend(guest_arguments(options, subject, &there, &to));
    arguments.push("--incoming".into());
    let log = scratch.file("incoming.log");
    let mut incoming = Process::start("umem incoming", umem, &arguments, log)?;
    let (_, listening) = incoming.event("listening", PATIENCE)?;
    let uri = listening["uri"].as_str().unwrap_or_default();

    let mut arguments = words(&["migrate", "-p", "--json", "--lanes"]);
    arguments.extend([options.lanes.to_string().into(), "--qmp".into(), here.into(), uri.into()]);
    let log = scratch.file("migrate.log");
    let mut migrate = Process::start("umem migrate", umem, &arguments, log)?;
    let (_, source) = migrate.event("completed", PATIENCE)?;
    let (_, destination) = incoming.event("completed", PATIENCE)?;
    let cpu = Cpu::of_all(&[migrate.pid(), incoming.pid()]);

    let verdict = Qmp::connect(&there)?.execute("umem-verify", &json!({}))?;
    let expected = (bytes / PAGE_BYTES) as u64;
    let count = |name: &str| verdict[name].as_u64();
    if count("verified_pages") != Some(expected) || count("bad_pages") != Some(0) {
        return failure(format!("the guest did not arrive whole: {verdict}"));
    }
    landing(&source, &destination, cpu)
}

fn landing(source: &Value, destination: &Value, cpu: Cpu) -> Result<Landing> {
    let number = |report: &Value, name: &str| {
        report[name].as_f64().ok_or_else(|| format!("umem's report has no {name}"))
    };
    Ok(Landing {
        gbps: number(destination, "gbps")?,
        total_s: number(source, "total_s")?,
        downtime_ms: number(source, "downtime_ms")?,
        pages_demand: destination["pages_demand"].as_u64().unwrap_or(0),
        cpu_s: cpu.all_s,
    })
}

fn guest_arguments(options: &Options, subject: Subject, qmp: &Path, file: &File) -> Vec<OsString> {
    let mut arguments = words(&["guest", "--write-percent", "0", "--zero-percent", "0"]);
    arguments.extend(words(&["--hole-percent", "0", "--threads", &subject.readers.to_string()]));
    arguments.extend(words(&["--size", &options.size.to_string(), "--ram", &ram(file)]));
    arguments.extend(["--qmp".into(), qmp.into()]);
    arguments
}

/// NAME=PATH of a file of ours that has no name of its own.
fn ram(file: &File) -> String {
    format!("ram0=/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(Into::into).collect()
}

fn report(
    options: &Options,
    machine: Machine,
    floor: &Floor,
    subjects: &[(Subject, Vec<Landing>)],
) -> Report {
    let mut table = Table::new(&[
        "into",
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
    ]);
    let mut figures = Vec::new();
    for (subject, landings) in subjects {
        let spread = |get: fn(&Landing) -> f64| Spread::of(landings.iter().map(get).collect());
        let (gbps, total_s) = (spread(|l| l.gbps), spread(|l| l.total_s));
        let (downtime_ms, cpu_s) = (spread(|l| l.downtime_ms), spread(|l| l.cpu_s));
        let pages_demand = spread(|l| l.pages_demand as f64);
        let best = floor.best(subject.pages);
        let floor_gbps = best.as_ref().map_or(f64::NAN, |best| best.gbps.median);
        let ratio = gbps.median / floor_gbps;
        table.row(vec![
            subject.pages.name().into(),
            if subject.readers == 0 { "idle".into() } else { "reads".into() },
            format!("{:.1}", gbps.median),
            format!("{:.1}", gbps.min),
            format!("{:.1}", gbps.max),
            format!("{floor_gbps:.1}"),
            format!("{ratio:.2}"),
            format!("{:.2}", total_s.median),
            format!("{:.1}", downtime_ms.median),
            format!("{:.0}", pages_demand.median),
            format!("{:.2}", cpu_s.median),
        ]);
        figures.push(json!({
            "pages": subject.pages,
            "guest_readers": subject.readers,
            "gbps": gbps,
            "total_s": total_s,
            "downtime_ms": downtime_ms,
            "pages_demand": pages_demand,
            "cpu_s": cpu_s,
            "floor": best,
            "ratio_to_floor": ratio,
        }));
    }
    let mut method = format!(
        "`umem migrate -p` → loopback TCP, {} bulk lane(s) → `umem incoming` with a `umem guest` of \
         {} MiB without zero pages or holes, which is idle or reads random pages with one thread. \
         Every subject takes its turn in each of {} rounds, after a memory file of the guest's size \
         and page kind has been written and dropped. Gbit/s is umem's own figure, page contents \
         from the first page to the last; afterwards the guest has checked every word. The floor is \
         the best of `floor`'s ways into memory of this kind, measured in the same rounds; with a \
         core for each end, a guest that reads takes part of what the floor has for itself. CPU is \
         that of both umem processes. Medians.",
        options.lanes, options.size, options.rounds
    );
    for left_out in &floor.left_out {
        method += &format!(" Left out: {left_out}.");
    }
    Report {
        what: "land",
        machine,
        method,
        tables: vec![table],
        value: json!({
            "size_mib": options.size,
            "rounds": options.rounds,
            "lanes": options.lanes,
            "figures": figures,
            "floor": floor.figures(),
            "left_out": floor.left_out,
        }),
    }
}
