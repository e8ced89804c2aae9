//! `patterns`: the share of a guest's accesses that wait, by its pattern of access, with the
//! background in adaptive and in plain order.

use std::path::PathBuf;

use argh::FromArgs;
use serde_json::json;

use crate::error::{Result, usage};
use crate::fault::{Order, Pattern, Touched, Touching};
use crate::machine::Machine;
use crate::memory::Pages;
use crate::migration::Route;
use crate::process::find_umem;
use crate::report::{Measure, Output, Report, Table, cell, progress};
use crate::statistics::Spread;

/// The share of a guest's accesses that wait for a page, by its pattern of access, against plain
/// order.
#[derive(FromArgs)]
#[argh(subcommand, name = "patterns")]
pub(crate) struct Options {
    /// the guest's RAM, MiB (default 1024)
    #[argh(option, default = "1024")]
    size: usize,
    /// turns of each subject (default 3)
    #[argh(option, default = "3")]
    rounds: usize,
    /// accesses of each turn (default: an eighth of the guest's pages)
    #[argh(option)]
    count: Option<usize>,
    /// computing time of the guest between two accesses, µs (default 10)
    #[argh(option, default = "10")]
    think_us: u64,
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

struct Subject {
    pattern: Pattern,
    order: Order,
    turns: Vec<Touched>,
}

impl Measure for Options {
    fn measure(&self) -> Result<Report> {
        let options = self;
        if options.size == 0 || options.rounds == 0 || options.count == Some(0) {
            return usage("--size, --rounds and --count are at least 1");
        }
        let umem = find_umem(options.umem.as_deref())?;
        let machine = Machine::describe();
        let count = options.count.unwrap_or(options.size * 256 / 8).min(options.size * 256 - 1);
        let mut subjects: Vec<Subject> = Pattern::ALL
            .iter()
            .flat_map(|&pattern| {
                Order::ALL.map(|order| Subject { pattern, order, turns: Vec::new() })
            })
            .collect();
        let route = Route { umem: &umem, namespaces: None, tls_creds: None };
        for round in 1..=options.rounds {
            for subject in &mut subjects {
                let (pattern, order) = (subject.pattern, subject.order);
                progress(&format!(
                    "round {round} of {}: {}, {} order",
                    options.rounds,
                    pattern.word(),
                    order.word()
                ));
                let touching = Touching {
                    pages: Pages::Memfd,
                    size_mib: options.size,
                    lanes: options.lanes,
                    count: Some(count),
                    background: true,
                    pattern,
                    think_us: options.think_us,
                    order,
                };
                subject.turns.push(touching.once(&route)?);
            }
        }
        Ok(report(options, machine, count, &subjects))
    }

    fn output(&self) -> Output<'_> {
        let svg = None;
        Output { json: self.json, report: self.report.as_deref(), svg }
    }
}

fn report(options: &Options, machine: Machine, count: usize, subjects: &[Subject]) -> Report {
    let mut table = Table::new(&[
        "accesses",
        "order",
        "waited %",
        "min",
        "max",
        "× plain",
        "waiting ms",
        "× plain",
    ]);
    let (mut figures, mut highlights) = (Vec::new(), Vec::new());
    let share = |subject: &Subject| {
        let shares = subject.turns.iter().map(|turn| {
            let accesses = turn.waited_ns.len() as u64 + turn.already_there;
            100.0 * turn.waited_ns.len() as f64 / accesses as f64
        });
        Spread::of(shares.collect())
    };
    let waiting_ms = |subject: &Subject| {
        let sums =
            subject.turns.iter().map(|turn| turn.waited_ns.iter().sum::<u64>() as f64 * 1e-6);
        Spread::of(sums.collect())
    };
    for subject in subjects {
        let (waited, waiting) = (share(subject), waiting_ms(subject));
        let is_plain =
            |other: &&Subject| other.pattern == subject.pattern && other.order == Order::Plain;
        let plain = subjects.iter().find(is_plain).filter(|_| subject.order != Order::Plain);
        let over = |own: f64, of: &dyn Fn(&Subject) -> Spread| {
            plain.map_or(f64::NAN, |plain| own / of(plain).median)
        };
        let ratios = [over(waited.median, &share), over(waiting.median, &waiting_ms)];
        table.row(vec![
            subject.pattern.word().into(),
            subject.order.word().into(),
            cell(waited.median, 2),
            cell(waited.min, 2),
            cell(waited.max, 2),
            cell(ratios[0], 2),
            cell(waiting.median, 1),
            cell(ratios[1], 2),
        ]);
        if plain.is_some() {
            highlights.push(format!(
                "{}: {:.1} % of the accesses wait, {} × plain order; for {} × the time",
                subject.pattern.word(),
                waited.median,
                cell(ratios[0], 2),
                cell(ratios[1], 2)
            ));
        }
        figures.push(json!({
            "pattern": subject.pattern,
            "order": subject.order,
            "waited_percent": waited,
            "waiting_ms": waiting,
            "ratio_to_plain": { "waited": ratios[0], "waiting": ratios[1] },
        }));
    }
    let method = format!(
        "A thread makes {count} accesses to {} MiB of memfd while everything is sent in the \
         background over loopback TCP, {} bulk lane(s), and computes for {} µs after each. Accesses \
         that the thread slept in waited; a page that is touched again counts again. Order is umem \
         migrate's --order. Every subject takes its turn in each of {} rounds, after as much memory \
         has been written and given back. Medians.",
        options.size, options.lanes, options.think_us, options.rounds
    );
    Report {
        what: "patterns",
        machine,
        method,
        highlights,
        tables: vec![table],
        plots: Vec::new(),
        value: json!({
            "size_mib": options.size,
            "rounds": options.rounds,
            "count": count,
            "think_us": options.think_us,
            "lanes": options.lanes,
            "figures": figures,
        }),
    }
}
