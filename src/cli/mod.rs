//! The command line. Each subcommand has a file: the file parses the subcommand's options and passes them to the
//! module that runs it.

mod bench;
mod control;
mod demo;
mod doctor;
#[cfg(test)]
mod documents;
mod guest;
mod incoming;
mod install;
mod migrate;
mod values;
mod words;

use std::ffi::OsString;

use argh::{ArgsInfo, FromArgs};

use crate::error::Result;
use crate::programs::install::completions;
use crate::runtime::inbox::{Inbox, Wake};
use crate::runtime::{os_text, print};
use crate::transport::tls;

/// Moves running guests: precopy and postcopy live migration over userfaultfd, shared
/// memory and io_uring.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    example = "See a guest move on this machine:\n  {command_name} demo",
    example = "Receive a QEMU guest, on the destination; both sides have the same secret:\n  \
               {command_name} incoming --secret-file /etc/umem/secret tcp::4444 -- \
               qemu-system-x86_64 -m 2G -machine memory-backend=ram0 \\\n    -object \
               memory-backend-file,id=ram0,size=2G,share=on,mem-path=/dev/shm/guest …",
    example = "Move it there, on the source:\n  {command_name} migrate -p --secret-file \
               /etc/umem/secret --qmp /run/qmp.sock tcp:DESTINATION:4444"
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

impl Command {
    /// Whether the command's purpose is a move, and its stdout only a report (without `--json`).
    fn moves_guest(&self) -> bool {
        matches!(self, Command::Demo(_) | Command::Incoming(_) | Command::Migrate(_))
    }

    /// Whether the command handles signals itself.
    fn reads_signals(&self) -> bool {
        matches!(
            self,
            Command::Demo(_) | Command::Incoming(_) | Command::Migrate(_) | Command::Bench(_)
        )
    }
}

/// Print umem's version and the protocol's.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "version")]
struct Version {}

/// Checks whether the process has a standard output. Must be called before the standard library starts: the library
/// opens /dev/null in place of a missing one, and a report would seem to be written.
pub fn before_main() {
    print::look_at_stdout();
}

/// Runs the command line; the value is the process's exit status.
pub fn main() -> i32 {
    print::print_panics();
    tls::protect_process();
    let given: Vec<OsString> = std::env::args_os().collect();
    if let Some(word) = not_utf8(&given) {
        let word = word.display();
        print::err_line(&format!(
            "umem: {word} is not UTF-8; only --ram and COMMAND may have other bytes: rename it"
        ));
        return finish(2, false, false);
    }
    let strings: Vec<String> = given.iter().map(|word| os_text::encode(word)).collect();
    let words: Vec<&str> = strings.iter().map(String::as_str).collect();
    let json = words.contains(&"--json");
    let (name, rest) = words.split_first().map_or(("umem", &[][..]), |(_, rest)| ("umem", rest));
    if let Some((&completions::ASK, words)) = rest.split_first() {
        print::out_line(&completions::answer(&Arguments::get_args_info(), words));
        return finish(0, true, false);
    }
    let adapted = match words::adapted(&Arguments::get_args_info(), rest) {
        Ok(adapted) => adapted,
        Err(wrong) => return finish(refused(&wrong.command, &wrong.text), true, false),
    };
    let words: Vec<&str> = adapted.words.iter().map(String::as_str).collect();
    let arguments = match Arguments::from_args(&[name], &words) {
        Ok(arguments) => arguments,
        Err(exit) => return finish(early_exit(&exit, &adapted.command), true, false),
    };
    let command = arguments.command;
    // The other commands keep the default action of every signal.
    let (moves_guest, reads_signals) = (command.moves_guest(), command.reads_signals());
    let blocked = if reads_signals { crate::runtime::inbox::block_signals() } else { Ok(()) };
    let result = blocked.and_then(|()| run(command));
    let status = match result {
        Ok(status) => status,
        Err(error) => {
            crate::observe::output::Output::new(json).failed(&error);
            error.exit_status()
        }
    };
    finish(status, json || !moves_guest, reads_signals)
}

/// Waits until everything is printed. If lost output was the command's purpose, the exit status is 1. A move of a guest
/// has been completed nevertheless.
fn finish(status: i32, is_for_stdout: bool, reads_signals: bool) -> i32 {
    let inbox = if reads_signals { Inbox::<()>::new().ok() } else { None };
    let lost = print::finish(|limit| match &inbox {
        Some(inbox) => matches!(inbox.wait(&[], Some(limit)), Ok(Wake::Signal) | Err(_)),
        None => {
            std::thread::sleep(limit);
            false
        }
    });
    let Some(why) = lost.filter(|_| is_for_stdout) else { return status };
    print::err_line(&format!("umem: the standard output is incomplete: {why}"));
    // With a limit: this stream may have no reader either.
    print::finish(|limit| {
        std::thread::sleep(limit);
        true
    });
    if status == 0 { 1 } else { status }
}

/// The first argument that is not UTF-8 and must be. Arguments for RAM files and commands are
/// [decoded](os_text::decode) later.
fn not_utf8(words: &[OsString]) -> Option<&OsString> {
    let command = words.iter().position(|word| word == "--").unwrap_or(words.len());
    let options = &words[..command];
    let takes = |at: usize| options[at - 1] == "--ram";
    let at = (1..command).find(|&at| options[at].to_str().is_none() && !takes(at))?;
    Some(&options[at])
}

/// Prints help on stdout. Prints the error of a wrong command line as one line on stderr, with the command for help.
fn early_exit(exit: &argh::EarlyExit, command: &str) -> i32 {
    if exit.status.is_ok() {
        print::out_line(&exit.output);
        return 0;
    }
    let lines: Vec<&str> =
        exit.output.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    refused(command, &in_plain_words(lines.join(" ")))
}

/// An error of argh with the reasons of Rust's parsers of numbers in plain words.
fn in_plain_words(text: String) -> String {
    const WORDS: [(&str, &str); 6] = [
        ("invalid digit found in string", "not a whole number"),
        ("cannot parse integer from empty string", "a whole number is missing"),
        ("number too large to fit in target type", "the number is too large"),
        ("number too small to fit in target type", "the number is too small"),
        ("invalid float literal", "not a number"),
        ("cannot parse float from empty string", "a number is missing"),
    ];
    WORDS.iter().fold(text, |text, (rust, plain)| text.replace(rust, plain))
}

/// A wrong command line is one line on stderr that says where help is.
fn refused(command: &str, text: &str) -> i32 {
    print::err_line(&format!("umem: {text} (`{command} --help` explains)"));
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
            let version = env!("CARGO_PKG_VERSION");
            print::out_line(&format!("umem {version} (protocol {protocol})"));
            Ok(0)
        }
    }
}
