//! The command line. Each subcommand's options, in a file of its own, become the options of the module
//! that runs it.

mod bench;
mod control;
mod demo;
mod doctor;
mod guest;
mod incoming;
mod install;
mod migrate;
#[cfg(test)]
mod readme;
mod values;

use argh::{ArgsInfo, FromArgs};

use crate::error::Result;

/// Moves a running guest's memory after the guest: postcopy live migration over userfaultfd, shared
/// memory and io_uring.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    example = "See a guest move on this machine:\n  {command_name} demo",
    example = "Receive a QEMU guest, on the destination:\n  {command_name} incoming tcp::4444 -- \
               qemu-system-x86_64 -m 2G -machine memory-backend=ram0 \\\n    -object \
               memory-backend-file,id=ram0,size=2G,share=on,mem-path=/dev/shm/guest …",
    example = "Move it there, on the source:\n  {command_name} migrate -p --qmp /run/qmp.sock \
               tcp:DESTINATION:4444"
)]
struct Arguments {
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand)]
enum Command {
    Demo(demo::Demo),
    Incoming(incoming::Incoming),
    Migrate(migrate::Migrate),
    Control(control::Control),
    Doctor(doctor::Doctor),
    Bench(bench::Bench),
    Guest(guest::Guest),
    Man(install::Man),
    Completions(install::Completions),
    Version(Version),
}

/// Print umem's version and the protocol's.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "version")]
struct Version {}

/// Runs the command line; the value is the process's exit status.
pub fn main() -> i32 {
    let strings: Vec<String> =
        std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = strings.iter().map(String::as_str).collect();
    let json = words.contains(&"--json");
    let (name, rest) = words.split_first().map_or(("umem", &[][..]), |(_, rest)| ("umem", rest));
    // As other programs have it.
    let rest = if rest == ["--version"] { &["version"][..] } else { rest };
    let arguments = match Arguments::from_args(&[name], rest) {
        Ok(arguments) => arguments,
        Err(exit) => return early_exit(&exit),
    };
    let result = crate::inbox::block_signals().and_then(|()| run(arguments.command));
    match result {
        Ok(status) => status,
        Err(error) => {
            crate::report::Output::new(json).failed(&error);
            error.exit_status()
        }
    }
}

/// Help on stdout; a wrong command line is one line on stderr that says where help is.
fn early_exit(exit: &argh::EarlyExit) -> i32 {
    if exit.status.is_ok() {
        println!("{}", exit.output);
        return 0;
    }
    let lines: Vec<&str> =
        exit.output.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    eprintln!("umem: {} (`umem --help` and `umem COMMAND --help` explain)", lines.join(" "));
    2
}

fn run(command: Command) -> Result<i32> {
    match command {
        Command::Demo(demo) => demo.run(),
        Command::Incoming(incoming) => incoming.run(),
        Command::Migrate(migrate) => migrate.run(),
        Command::Control(control) => control.run(),
        Command::Doctor(doctor) => doctor.run(),
        Command::Bench(bench) => bench.run(),
        Command::Guest(guest) => guest.run(),
        Command::Man(man) => man.run(),
        Command::Completions(completions) => completions.run(),
        Command::Version(_) => {
            let protocol = umem_wire::PROTOCOL;
            println!("umem {} (protocol {protocol})", env!("CARGO_PKG_VERSION"));
            Ok(0)
        }
    }
}
