//! `umem-perf WHAT`: measures umem against what the kernel can do and against its peers.
//!
//! Each subcommand is one module with its options and `run`. A result states the machine, the
//! method and the spread over its rounds; subjects take turns (A B A B), with memory warmed in the
//! same way for all, so that their ratios hold where absolute figures move from run to run.

mod error;
mod fault;
mod floor;
mod interrupt;
mod land;
mod link10;
mod machine;
mod memory;
mod migration;
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

/// Measures umem: against the kernel's floor, end to end, and beside QEMU's own migration.
#[derive(FromArgs)]
#[argh(
    note = "Ratios hold only on a machine that does nothing else; the load average is part of \
            every result.",
    example = "What this machine's kernel gives at best:\n  {command_name} floor",
    example = "What a guest's first access to a page takes, with a plot:\n  {command_name} fault --svg \
               fault.svg",
    example = "A Linux guest moved by QEMU and by umem in turns:\n  {command_name} qemu --rounds 3",
    error_code(1, "It could not be measured; stderr says why."),
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
    Link10(link10::Options),
    Patterns(patterns::Options),
    Qemu(qemu::Options),
    Toucher(fault::Toucher),
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
    let result = ready.and_then(|()| match &arguments.what {
        What::Floor(options) => floor::run(options),
        What::Land(options) => land::run(options),
        What::Fault(options) => fault::run(options),
        What::Size(options) => size::run(options),
        What::Link10(options) => link10::run(options),
        What::Patterns(options) => patterns::run(options),
        What::Qemu(options) => qemu::run(options),
        What::Toucher(options) => fault::touch(options),
    });
    process::end_orphans();
    match result {
        Ok(()) => 0,
        // Ctrl-C cuts off whatever was going on; that it did is no news.
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
