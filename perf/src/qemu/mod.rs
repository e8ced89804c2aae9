//! `qemu`: the same Linux guest, moved by QEMU's own postcopy and by umem in turns. `rounds`: the same for passes
//! while the guest runs.
//!
//! Both ends run on this machine. The guest (tests/guest) reads or writes its memory all the time and reports the time
//! of its accesses on its console.

mod beats;
mod guest;
mod mover;
mod moving;
mod quantity;
pub(crate) mod rounds;

use std::path::PathBuf;

use argh::FromArgs;
use serde_json::{Value, json};

use crate::error::{Result, usage};
use crate::machine::Machine;
use crate::process::find_umem;
use crate::report::{Measure, Output, Report, Table, cell, progress};
use crate::statistics::finite;
use crate::svg::{Bar, Plot};

use guest::{Artefacts, Load, Ram, Setup};
use mover::{Mover, Qemu, Subject, Umem};
use moving::Move;
use quantity::{
    CPU, CPU_WITHOUT_VCPUS, DOWNTIME, DRAIN, LOST, MAX, P50, P99, Quantity, TOTAL, WORST_P99,
    spreads, table,
};

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

/// Whether a guest of this size, MiB, can fill so much.
fn check_size(size: u64, fill: u64) -> Result<()> {
    if size >= fill + KERNEL_MIB {
        return Ok(());
    }
    usage(format!(
        "--size {size} is too small for --fill {fill}: the guest's kernel needs {KERNEL_MIB} MiB more"
    ))
}

impl Measure for Options {
    fn measure(&self) -> Result<Report> {
        let options = self;
        if options.rounds == 0 || options.fill == 0 {
            return usage("--rounds and --fill are at least 1");
        }
        check_size(options.size, options.fill)?;
        let artefacts = Artefacts::find(options.qemu.as_deref())?;
        let umem = find_umem(options.umem.as_deref())?;
        let setup = Setup {
            artefacts: &artefacts,
            umem: &umem,
            size_mib: options.size,
            fill_mib: options.fill,
            load: if options.idle { Load::Idle } else { Load::Read },
            link: None,
            beats_min: 0,
            limit: None,
        };
        let machine = Machine::describe();
        let mut moves: Vec<(Subject, Vec<Move>)> =
            subjects(options).into_iter().map(|subject| (subject, Vec::new())).collect();
        for round in 1..=options.rounds {
            for (subject, moves) in &mut moves {
                progress(&format!("round {round} of {}: {}", options.rounds, subject.name()));
                let moved = subject.run(&setup)?.ok_or("postcopy at once comes to an end")?;
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
    let mut subjects = all.map(|ram| Subject { mover: PREEMPT, ram }).to_vec();
    if options.plain {
        subjects.extend(all.map(|ram| Subject { mover: PLAIN, ram }));
    }
    subjects.extend(UMEM_RAM.map(|ram| Subject { mover: UMEM, ram }));
    subjects
}

const PREEMPT: Mover = Mover::Qemu(Qemu::Preempt);
const PLAIN: Mover = Mover::Qemu(Qemu::Plain);
const UMEM: Mover = Mover::Umem(Umem::Postcopy);

impl Subject {
    fn name(self) -> String {
        let mover = if self.mover == UMEM { "umem" } else { self.mover.name() };
        format!("{mover}, {}", self.ram.name())
    }

    /// Its name in JSON.
    fn key(self) -> String {
        let mover = if self.mover == UMEM { "umem" } else { self.mover.key() };
        format!("{mover}_{}", self.ram.name().replace(' ', "_"))
    }

    /// Whether a peer's user would otherwise choose umem's RAM: of the same kind, or QEMU's
    /// default.
    fn is_peer_of(self, umem: Ram) -> bool {
        self.mover != UMEM && (self.ram == umem || self.ram == Ram::Private)
    }
}

const QUANTITIES: [Quantity; 10] =
    [TOTAL, DRAIN, DOWNTIME, P50, P99, WORST_P99, MAX, LOST, CPU, CPU_WITHOUT_VCPUS];

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
    let bar = |(subject, moves): &(Subject, Vec<Move>)| Bar {
        name: subject.name(),
        value: finite(TOTAL.spread(moves).median),
        mark: None,
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
    let mut table = table("medians", &QUANTITIES);
    for (subject, moves) in moves {
        let mut cells = vec![subject.name()];
        cells.extend(QUANTITIES.iter().map(|quantity| quantity.cell(moves)));
        table.row(cells);
    }
    table
}

fn ratios_table(moves: &[(Subject, Vec<Move>)]) -> Table {
    let mut table = table("a peer's over umem's", &QUANTITIES);
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
    let of = |ram: Ram| moves.iter().find(move |(one, _)| *one == Subject { mover: UMEM, ram });
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
    let mut object = spreads(&QUANTITIES, moves);
    object.insert("subject".into(), json!(subject.key()));
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
         two seconds before the move, that it did not get done from its last beat at the source to the end of those \
         beats. After each move the guest has checked all of its memory. CPU: user and system time of both QEMUs and both \
         umem processes from start to end, in steps of 10 ms. The guest's own computing cannot \
         be separated from it; `without vCPUs` leaves out QEMU's vCPU threads, and with them the time of \
         page faults there. Ratios are a peer's figure over umem's of the same round, the median of the rounds'.",
        size = options.size,
        warm = 2 * options.size,
        fill = options.fill,
        rounds = options.rounds,
    )
}
