//! A process whose memory is a snapshot that is still elsewhere: it hands anonymous memory over as Firecracker does at
//! a restore, and then checks every byte of it.
//!
//! ```text
//! umem-test-snapshot-client --handoff SOCKET --mib N --expect SNAPSHOT [--regions 2] [--huge]
//! ```
//!
//! It does not know umem: it sends Firecracker's message and its userfaultfd, keeps the socket and the userfaultfd
//! open, and sends or reads nothing more. Two threads compare the memory with the snapshot, page by page in a random
//! order. With `--balloon` they discard some of it in the middle, both checked and unchecked pages, and these must read
//! as zeroes from then on. At the end everything is compared once more.
//!
//! Events are printed on stdout, one line each; the exit status is 0 only if no byte was wrong:
//!
//! ```text
//! {"event":"handed_over","seed":7}
//! {"event":"middle","pages":8192}
//! {"event":"seen"}
//! {"event":"checked","pages":16384,"wrong_pages":0,"discarded_seen":260,"discarded_unseen":252}
//! ```
//!
//! | module | |
//! |---|---|
//! | `memory` | the mappings, and their hand-over |
//! | `check` | the order of the pages, their expected contents, the threads |

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program of the tests, or a measurement"
)]

mod check;
mod memory;

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use argh::FromArgs;

use check::Checker;
use memory::Memory;

/// An error ends the process with one line, with the remedy if known.
type Result<T> = std::result::Result<T, String>;

/// Have anonymous memory filled as Firecracker does, and check every byte of it.
#[derive(FromArgs)]
struct Options {
    /// the unix socket of the program that fills the memory
    #[argh(option)]
    handoff: PathBuf,
    /// size of the memory, MiB
    #[argh(option)]
    mib: u64,
    /// the file with the expected contents
    #[argh(option)]
    expect: PathBuf,
    /// number of mappings of the memory, 1 or 2 (default 1)
    #[argh(option, default = "1")]
    regions: usize,
    /// pages of 2 MiB, from the kernel's hugetlb pool
    #[argh(switch)]
    huge: bool,
    /// pages that are checked before the middle (default: half of them)
    #[argh(option)]
    first: Option<usize>,
    /// discard some of the memory in the middle
    #[argh(switch)]
    balloon: bool,
    /// the seed of the order of pages (default: a new one each time, printed)
    #[argh(option)]
    seed: Option<u64>,
    /// a FIFO: in the middle, wait for a byte from there
    #[argh(option)]
    pause: Option<PathBuf>,
    /// a FIFO: when everything has been checked, wait for a byte from there before checking it again
    #[argh(option)]
    until: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&argh::from_env()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("umem-test-snapshot-client: {error}");
            // At once: a thread may wait in a fault that gets no answer any more.
            std::process::exit(1);
        }
    }
}

/// True if every byte was right.
fn run(options: &Options) -> Result<bool> {
    let seed = options.seed.unwrap_or_else(|| std::process::id().into());
    let memory = Memory::map(options.mib << 20, options.regions, options.huge)?;
    // Until the process ends: a closed userfaultfd would let missing pages read as zeroes.
    let _open = memory.hand_over(&options.handoff)?;
    say(&format!(r#"{{"event":"handed_over","seed":{seed}}}"#));

    let snapshot = File::open(&options.expect)
        .map_err(|error| format!("the snapshot {}: {error}", options.expect.display()))?;
    let mut checker = Checker::new(&memory, &snapshot, seed, options.first);
    let middle = checker.see_the_first();
    say(&format!(r#"{{"event":"middle","pages":{middle}}}"#));
    wait_for_byte(options.pause.as_deref())?;
    if options.balloon {
        checker.choose_what_goes()?;
    }
    checker.see_the_rest()?;
    say(r#"{"event":"seen"}"#);
    wait_for_byte(options.until.as_deref())?;
    checker.see_everything();

    let found = checker.found();
    say(&format!(
        r#"{{"event":"checked","pages":{},"wrong_pages":{},"discarded_seen":{},"discarded_unseen":{}}}"#,
        found.pages, found.wrong_pages, found.discarded_seen, found.discarded_unseen
    ));
    Ok(found.wrong_pages == 0)
}

/// One line, flushed.
fn say(line: &str) {
    let mut stdout = std::io::stdout().lock();
    // A closed stdout has no reader.
    let _ = writeln!(stdout, "{line}");
    let _ = stdout.flush();
}

fn wait_for_byte(fifo: Option<&Path>) -> Result<()> {
    let Some(fifo) = fifo else { return Ok(()) };
    File::open(fifo)
        .and_then(|mut file| file.read_exact(&mut [0]))
        .map_err(|error| format!("waiting for {}: {error}", fifo.display()))
}
