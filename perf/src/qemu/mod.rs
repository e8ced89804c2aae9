//! `qemu`: the same Linux guest, moved by QEMU's own postcopy and by umem in turns.
//!
//! Both ends run on this machine, over loopback TCP. The guest (tests/guest) reads its memory at
//! random all the time and reports the time of its accesses on its console.

mod beats;
mod guest;
mod subject;

use std::path::PathBuf;

use argh::FromArgs;
use serde_json::{Value, json};

use crate::error::{Result, usage};
use crate::machine::Machine;
use crate::process::find_umem;
use crate::report::{Measure, Output, Report, Table, cell, progress};
use crate::statistics::{Spread, finite};
use crate::svg::{Bar, Plot};

use guest::{Artefacts, Ram, Setup};
use subject::{Move, Subject};

/// The same Linux guest moved by QEMU's postcopy-preempt and by umem, in turns.
#[derive(FromArgs)]
#[argh(
    subcommand,
    name = "qemu",
    note = "Kernel, initramfs and QEMU are those of the tests: tests/lib/fetch and \
            `tests/lib/initramfs tests/cache/initramfs` make them. UMEM_TEST_KERNEL, \
            UMEM_TEST_INITRD and UMEM_TEST_QEMU_100 select others."
)]
pub(crate) struct Options {
    /// the directory that holds qemu-system-x86_64 (default: QEMU 10.0 in tests/cache)
    #[argh(option)]
    qemu: Option<PathBuf>,
    /// the guest's RAM, MiB (default 2048)
    #[argh(option, default = "2048")]
    size: u64,
    /// memory that the guest fills and reads, MiB (default 1024)
    #[argh(option, default = "1024")]
    fill: u64,
    /// turns of each subject (default 2)
    #[argh(option, default = "2")]
    rounds: usize,
    /// measure QEMU's plain postcopy too, with both kinds of RAM
    #[argh(switch)]
    plain: bool,
    /// let the guest fill its memory and then touch none of it: for processor time
    #[argh(switch)]
    idle: bool,
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

/// MiB for the guest's kernel and initramfs, beside the memory that the guest fills.
const KERNEL_MIB: u64 = 256;

impl Measure for Options {
    fn measure(&self) -> Result<Report> {
        let options = self;
        if options.rounds == 0 || options.fill == 0 {
            return usage("--rounds and --fill are at least 1");
        }
        if options.size < options.fill + KERNEL_MIB {
            return usage(format!(
                "--size {} is too small for --fill {}: the guest's kernel needs {KERNEL_MIB} MiB more",
                options.size, options.fill
            ));
        }
        let setup = Setup {
            artefacts: Artefacts::find(options.qemu.as_deref())?,
            umem: find_umem(options.umem.as_deref())?,
            size_mib: options.size,
            fill_mib: options.fill,
            idle: options.idle,
        };
        let machine = Machine::describe();
        let mut moves: Vec<(Subject, Vec<Move>)> =
            subjects(options).into_iter().map(|subject| (subject, Vec::new())).collect();
        for round in 1..=options.rounds {
            for (subject, moves) in &mut moves {
                progress(&format!("round {round} of {}: {}", options.rounds, subject.name()));
                let moved = subject.run(&setup)?;
                progress(&format!("moved in {:.2} s", moved.total_s));
                moves.push(moved);
            }
        }
        Ok(report(options, machine, &moves))
    }

    fn output(&self) -> Output<'_> {
        let svg = None;
        Output { json: self.json, report: self.report.as_deref(), svg }
    }
}

/// The RAM that umem can move: files.
const UMEM_RAM: [Ram; 2] = [Ram::File, Ram::HugeFile];

fn subjects(options: &Options) -> Vec<Subject> {
    let all = [Ram::File, Ram::Private, Ram::HugeFile];
    let mut subjects = all.map(Subject::Preempt).to_vec();
    if options.plain {
        subjects.extend(all.map(Subject::Plain));
    }
    subjects.extend(UMEM_RAM.map(Subject::Umem));
    subjects
}

/// A compared quantity: its name in JSON, its head in the table, its digits there, its source.
struct Quantity {
    name: &'static str,
    head: &'static str,
    digits: usize,
    get: fn(&Move) -> f64,
}

const QUANTITIES: [Quantity; 10] = [
    Quantity { name: "total_s", head: "total s", digits: 2, get: |m| m.total_s },
    Quantity { name: "stopped_to_complete_s", head: "stop→end s", digits: 2, get: |m| m.drain_s },
    Quantity { name: "downtime_ms", head: "downtime ms", digits: 1, get: |m| m.downtime_ms },
    Quantity { name: "latency_p50_us", head: "p50 µs", digits: 0, get: |m| m.latency.p50_us },
    Quantity { name: "latency_p99_us", head: "p99 µs", digits: 0, get: |m| m.latency.p99_us },
    Quantity {
        name: "latency_p99_worst_us",
        head: "worst p99",
        digits: 0,
        get: |m| m.latency.p99_worst_us,
    },
    Quantity { name: "latency_max_us", head: "max µs", digits: 0, get: |m| m.latency.max_us },
    Quantity {
        name: "work_lost_s",
        head: "work lost s",
        digits: 2,
        get: |m| m.latency.work_lost_s,
    },
    Quantity { name: "cpu_s", head: "CPU s", digits: 2, get: |m| m.cpu.all_s },
    Quantity {
        name: "cpu_without_vcpus_s",
        head: "without vCPUs",
        digits: 2,
        get: |m| m.cpu.without_vcpus_s(),
    },
];

impl Quantity {
    fn spread(&self, moves: &[Move]) -> Spread {
        Spread::of(moves.iter().map(self.get).collect())
    }
}

fn report(options: &Options, machine: Machine, moves: &[(Subject, Vec<Move>)]) -> Report {
    let version = moves.iter().flat_map(|(_, moves)| moves).next();
    let version = version.map_or("?", |moved| moved.qemu_version.as_str());
    Report {
        what: "qemu",
        machine,
        method: method(options, version),
        highlights: highlights(moves),
        tables: vec![figures_table(moves), ratios_table(moves)],
        plots: vec![plot(moves)],
        value: json!({
            "size_mib": options.size,
            "fill_mib": options.fill,
            "rounds": options.rounds,
            "idle": options.idle,
            "qemu_version": version,
            "figures": moves.iter().map(figure).collect::<Vec<Value>>(),
            "ratios": ratios(moves),
        }),
    }
}

/// The main figure: the time of a move.
fn plot(moves: &[(Subject, Vec<Move>)]) -> Plot {
    let bar = |(subject, moves): &(Subject, Vec<Move>)| {
        let total_s = Spread::of(moves.iter().map(|moved| moved.total_s).collect());
        Bar { name: subject.name(), value: finite(total_s.median), mark: None }
    };
    let title = "A Linux guest, from giving the command to both sides' end";
    Plot::bars(title, "s", moves.iter().map(bar).collect())
}

/// umem's advantage over each peer.
fn highlights(moves: &[(Subject, Vec<Move>)]) -> Vec<String> {
    let sentence = |(peer, umem, ratios): (Subject, Subject, Vec<f64>)| {
        let ratios = QUANTITIES
            .iter()
            .zip(ratios)
            .map(|(quantity, ratio)| format!("{} {} ×", quantity.head, cell(ratio, 2)));
        let ratios = ratios.collect::<Vec<_>>().join(", ");
        format!("{} over {}: {ratios}", peer.name(), umem.name())
    };
    peers(moves).into_iter().map(sentence).collect()
}

fn figures_table(moves: &[(Subject, Vec<Move>)]) -> Table {
    let mut head = vec!["medians"];
    head.extend(QUANTITIES.iter().map(|measure| measure.head));
    let mut table = Table::new(&head);
    for (subject, moves) in moves {
        let mut cells = vec![subject.name()];
        cells.extend(
            QUANTITIES.iter().map(|measure| cell(measure.spread(moves).median, measure.digits)),
        );
        table.row(cells);
    }
    table
}

fn ratios_table(moves: &[(Subject, Vec<Move>)]) -> Table {
    let mut head = vec!["a peer's over umem's"];
    head.extend(QUANTITIES.iter().map(|measure| measure.head));
    let mut table = Table::new(&head);
    for (peer, umem, ratios) in peers(moves) {
        let mut cells = vec![format!("{} / {}", peer.name(), umem.name())];
        cells.extend(ratios.iter().map(|&ratio| cell(ratio, 2)));
        table.row(cells);
    }
    table
}

/// Each peer's figures over umem's of the same round, with RAM of the same kind or with the peer's
/// default; the median of the rounds'. Above 1 umem is better.
fn peers(moves: &[(Subject, Vec<Move>)]) -> Vec<(Subject, Subject, Vec<f64>)> {
    let of = |ram: Ram| moves.iter().find(move |(subject, _)| *subject == Subject::Umem(ram));
    let pairs = UMEM_RAM.into_iter().filter_map(|ram| Some((ram, of(ram)?)));
    let against = |(ram, (umem, ours)): (Ram, &(Subject, Vec<Move>))| {
        let ratios = |theirs: &[Move]| {
            let ratio =
                |measure: &Quantity| measure.spread(theirs).over(&measure.spread(ours)).median;
            QUANTITIES.iter().map(ratio).collect::<Vec<_>>()
        };
        let peers = moves.iter().filter(|(subject, _)| subject.is_peer_of(ram));
        peers.map(|(peer, theirs)| (*peer, *umem, ratios(theirs))).collect::<Vec<_>>()
    };
    pairs.flat_map(against).collect()
}

fn ratios(moves: &[(Subject, Vec<Move>)]) -> Value {
    let object = |(peer, umem, ratios): (Subject, Subject, Vec<f64>)| {
        let ratios = QUANTITIES.iter().zip(ratios);
        let ratios = ratios.map(|(measure, ratio)| (measure.name.to_owned(), json!(ratio)));
        (format!("{}_over_{}", peer.key(), umem.key()), Value::Object(ratios.collect()))
    };
    Value::Object(peers(moves).into_iter().map(object).collect())
}

fn figure((subject, moves): &(Subject, Vec<Move>)) -> Value {
    let mut object = serde_json::Map::new();
    object.insert("subject".into(), json!(subject.key()));
    for measure in &QUANTITIES {
        object.insert(measure.name.into(), json!(measure.spread(moves)));
    }
    object.insert("moves".into(), json!(moves));
    Value::Object(object)
}

fn method(options: &Options, version: &str) -> String {
    let load = if options.idle {
        "then touches none of it"
    } else {
        "reads it at random with two threads as fast as it can, checking every word"
    };
    format!(
        "A Linux guest of {size} MiB with two vCPUs under TCG in QEMU {version} fills {fill} MiB and \
         {load}; it is moved from one QEMU to another on this machine over loopback TCP. The \
         subjects take turns in each of {rounds} rounds, each with new processes. Just before each \
         move, for each mover, a file of {warm} MiB is written in /dev/shm (huge file: in such a tmpfs) and \
         removed, so that the machine has as much warm memory as both ends can take. postcopy-preempt and plain postcopy are QEMU's own, \
         without a bandwidth limit, switched over at once, on the system's congestion control; `file` \
         is the memory-backend-file with share=on that umem needs, in /dev/shm, `huge file` the same in a \
         tmpfs with huge pages, aligned to them (align=2M), and `private` is QEMU's default RAM. \
         umem is `umem migrate -p` and `umem incoming` with their defaults. Total: from giving the \
         command (for umem: starting the process) until both sides report completion. Stop→end: \
         from the source's STOP event until then. Downtime: from the source's STOP to the \
         destination's RESUME, timestamps of QEMU's events for every subject. Latency: as the guest \
         measured of first touches of pages, in the beats (100 ms each) it printed at the destination \
         before the end: medians of the beats' p50 and p99 (which a mover's long tail without accesses to missing \
         pages lowers), the largest of their p99 and of their maxima; the first of them reaches \
         back before the switch. Work lost: seconds of the guest's work, at its rate of the last \
         second at the source, that it did not get done in those beats. CPU: user and system time of both QEMUs and both \
         umem processes from start to end, in steps of 10 ms. The guest's own computing cannot \
         be separated from it; `without vCPUs` leaves out QEMU's vCPU threads, and with them the time of \
         page faults there. Ratios are a peer's figure over umem's of the same round, the median of the rounds'.",
        size = options.size,
        warm = 2 * options.size,
        fill = options.fill,
        rounds = options.rounds,
    )
}
