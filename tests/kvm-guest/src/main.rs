//! A minimal monitor and a KVM guest of a few instructions, for the tests.
//!
//! The guest checks every word of its memory, rewrites it, and checks its writes. The monitor never touches that
//! memory, so KVM takes every fault in it on the guest's behalf, in kernel context: as under a QEMU with `-accel kvm`,
//! without a Linux in the guest.
//!
//! ```text
//! umem-test-kvm-guest --ram PATH --mib N --fill       writes PATH as the guest expects to find it
//! umem-test-kvm-guest --ram PATH --mib N              runs the guest in PATH
//! umem-test-kvm-guest --handoff SOCKET --mib N        runs the guest in anonymous memory
//! umem-test-kvm-guest --ram PATH --moves-to PATH      runs the guest in PATH and moves it to another file meanwhile
//! ```
//!
//! Under `umem incoming … -- umem-test-kvm-guest …` the last two get their memory from umem. When the guest is done it
//! prints one line on stdout, and the exit status is 0 only if no word was wrong:
//!
//! ```text
//! {"event":"done","pages":16384,"wrong_first":0,"wrong_second":0,"exits":6}
//! ```
//!
//! `pages` have been checked, written and checked again; `wrong_first` words differed from the fill, `wrong_second`
//! from the guest's writes; `exits` is how often KVM returned to the monitor. With `--moves-to` there is also `written`:
//! the number of pages that the guest has written in each pass.
//!
//! | module | |
//! |---|---|
//! | `memory` | the guest's memory |
//! | `pattern` | its first contents, as the monitor writes them |
//! | `code` | the guest's instructions, and the data shared with the monitor |
//! | `machine` | KVM: a virtual machine with that memory, that code and some vCPUs |
//! | `moving` | from one such machine to another, in passes while the guest runs |

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program of the tests, or a measurement"
)]

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the guest is a program for x86");

mod code;
mod machine;
mod memory;
mod moving;
mod pattern;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use argh::FromArgs;

use machine::{Found, Interrupts, Machine};
use memory::{Backing, Memory};
use pattern::Pattern;

/// An error ends the process with one line, with the remedy if known.
type Result<T> = std::result::Result<T, String>;

/// Run a KVM guest that checks and writes every word of its memory.
#[derive(FromArgs)]
struct Options {
    /// the file that is the guest's memory, mapped shared; made if it is not there
    #[argh(option)]
    ram: Option<PathBuf>,
    /// the socket of a umem that takes the guest's memory over, which is anonymous then
    #[argh(option)]
    handoff: Option<PathBuf>,
    /// the file that the guest is moved to while it runs; --ram is filled before
    #[argh(option)]
    moves_to: Option<PathBuf>,
    /// size of the memory, MiB, where the file is empty (default 64)
    #[argh(option, default = "64")]
    mib: u64,
    /// the seed of the contents (default 1)
    #[argh(option, default = "1")]
    seed: u32,
    /// vCPUs, which share the pages (default 2)
    #[argh(option, default = "2")]
    vcpus: u32,
    /// write the first contents into the file, and run nothing
    #[argh(switch)]
    fill: bool,
    /// let KVM resolve faults in its workers while the vCPU is halted (asynchronous page faults)
    #[argh(switch)]
    async_faults: bool,
    /// a FIFO: when the guest is done, wait for a byte from there before the report and the end
    #[argh(option)]
    until: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&argh::from_env()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("umem-test-kvm-guest: {error}");
            // At once: a vCPU may wait in a fault that gets no answer any more.
            std::process::exit(1);
        }
    }
}

/// True if the guest found no wrong word.
fn run(options: &Options) -> Result<bool> {
    let pattern = Pattern::new(options.seed);
    if let (Some(from), Some(to)) = (&options.ram, &options.moves_to) {
        let moved = moving::run([from, to], options.mib, &pattern, options.vcpus)?;
        let written = format!(r#","written":{:?}"#, moved.written);
        print(&moved.found, &written);
        return Ok(moved.found.wrong_first == 0 && moved.found.wrong_second == 0);
    }
    let backing = match (&options.ram, &options.handoff) {
        (Some(file), None) if options.fill => {
            pattern.fill(file, options.mib << 20)?;
            return Ok(true);
        }
        (Some(file), None) => Backing::SharedFile(file.clone()),
        (None, Some(socket)) if !options.fill => Backing::Anonymous(socket.clone()),
        _ => {
            return Err(
                "one of --ram FILE and --handoff SOCKET is needed, with --fill a file".into()
            );
        }
    };
    let interrupts = if options.async_faults { Interrupts::Some } else { Interrupts::None };
    let machine = Machine::new(interrupts)?;
    let memory = Memory::map(&backing, options.mib << 20)?;
    let found = machine.run(&memory, &pattern, options.vcpus)?;
    if let Some(fifo) = &options.until {
        wait_for_byte(fifo)?;
    }
    print(&found, "");
    Ok(found.wrong_first == 0 && found.wrong_second == 0)
}

fn print(found: &Found, more: &str) {
    println!(
        r#"{{"event":"done","pages":{},"wrong_first":{},"wrong_second":{},"exits":{}{more}}}"#,
        found.pages, found.wrong_first, found.wrong_second, found.exits
    );
}

fn wait_for_byte(fifo: &Path) -> Result<()> {
    File::open(fifo)
        .and_then(|mut file| file.read_exact(&mut [0]))
        .map_err(|error| format!("waiting for {}: {error}", fifo.display()))
}
