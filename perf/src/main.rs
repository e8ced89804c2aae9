//! `umem-perf WHAT`: measures umem against the kernel's limits and against its peers.
//!
//! Each subcommand is one module with its options and `run`. A result states the machine, the
//! method and the spread over its rounds. Subjects take turns (A B A B), with memory warmed in the
//! same way for all, so that their ratios hold where absolute figures vary from run to run.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program of the tests, or a measurement"
)]

mod all;
mod bench;
mod error;
mod fault;
mod floor;
mod interrupt;
mod land;
mod link;
mod link10;
mod machine;
mod memory;
mod migration;
mod page;
mod patterns;
mod process;
mod qemu;
mod qmp;
mod report;
mod scratch;
mod size;
mod statistics;
mod svg;
mod userfault;

use argh::FromArgs;

use crate::report::Measure;

/// Measures umem: against the kernel's floor, end to end, and beside QEMU's own migration.
#[derive(FromArgs)]
#[argh(
    note = "Ratios hold only on a machine that does nothing else; the load average is part of \
            every result.",
    example = "The best rate of this machine's kernel:\n  {command_name} floor",
    example = "The time of a guest's first access to a page, with a plot:\n  {command_name} fault --svg \
               fault.svg",
    example = "Everything, for about an hour, as a page of results:\n  {command_name} all \
               --out RESULTS.md",
    example = "A Linux guest moved by QEMU and by umem in turns:\n  {command_name} qemu --rounds 3",
    error_code(1, "The measurement failed; stderr states why."),
    error_code(2, "The command line is wrong.")
)]
struct Arguments {
    #[argh(subcommand)]
    what: What,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum What {
    Floor(floor::Options),
    Land(land::Options),
    Fault(fault::Options),
    Size(size::Options),
    Bench(bench::Options),
    Link10(link10::Options),
    Patterns(patterns::Options),
    Qemu(qemu::Options),
    Rounds(qemu::rounds::Options),
    All(all::Options),
    Page(page::Options),
    Toucher(fault::Toucher),
}

impl What {
    /// The subcommand's measurement, if it has one.
    fn measures(&self) -> Option<&dyn Measure> {
        match self {
            What::Floor(options) => Some(options),
            What::Land(options) => Some(options),
            What::Fault(options) => Some(options),
            What::Size(options) => Some(options),
            What::Bench(options) => Some(options),
            What::Link10(options) => Some(options),
            What::Patterns(options) => Some(options),
            What::Qemu(options) => Some(options),
            What::Rounds(options) => Some(options),
            What::All(_) | What::Page(_) | What::Toucher(_) => None,
        }
    }
}

fn main() {
    std::process::exit(run());
}

fn run() -> i32 {
    let words: Vec<String> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = words.iter().skip(1).map(String::as_str).collect();
    let arguments = match Arguments::from_args(&["umem-perf"], &words) {
        Ok(arguments) => arguments,
        Err(exit) if exit.status.is_ok() => {
            println!("{}", exit.output);
            return 0;
        }
        Err(exit) => {
            eprintln!("{}\n`umem-perf --help` and `umem-perf WHAT --help` explain", exit.output);
            return 2;
        }
    };
    let ready = interrupt::catch().and_then(|()| process::adopt_orphans());
    let command = format!("umem-perf {}", words.join(" "));
    let result = ready.and_then(|()| match &arguments.what {
        What::All(options) => all::run(options, &command),
        What::Page(options) => page::run(options),
        What::Toucher(options) => fault::touch(options),
        what => what.measures().expect("a measuring subcommand").run(&command),
    });
    process::end_orphans();
    match result {
        Ok(()) => 0,
        // Ctrl-C interrupts the subcommand, whose error is then expected.
        Err(_) if interrupt::check().is_err() => {
            eprintln!("umem-perf: interrupted");
            1
        }
        Err(error) => {
            eprintln!("umem-perf: {error}");
            if error.is::<error::Usage>() { 2 } else { 1 }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The command line accepts every command of perf/README.md.
    #[test]
    fn every_command_in_the_readme_parses() {
        let readme = include_str!("../README.md");
        let blocks = readme
            .lines()
            .filter_map(|line| line.strip_prefix("    cargo run --release -p umem-perf -- "));
        let spans = readme.split('`').skip(1).step_by(2);
        let spans = spans.filter_map(|span| span.strip_prefix("umem-perf "));
        let mut count = 0;
        for line in blocks.chain(spans) {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let Err(exit) = Arguments::from_args(&["umem-perf"], &words) {
                panic!("umem-perf {line}: {}", exit.output.trim());
            }
            count += 1;
        }
        assert!(count >= 12, "only {count} commands were found");
    }
}
