//! The demo's guest: threads that read and write memory and check every word, behind a QMP socket.
//!
//! It stands where a QEMU would: at the source its RAM is a shared file, it answers the QMP commands
//! that umem sends (and `umem-verify`, for the demo), its device state is what its threads must know of
//! their memory. On the destination it gets its memory by the preload object, or hands anonymous memory
//! over itself ([`handover`]). It takes no other part in the transport, so what it finds in its memory
//! is evidence.

pub mod handover;
pub(crate) mod log;
mod monitor;
mod pattern;
mod ram;
mod threads;

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::host::command::RamPath;
use crate::runtime::print;
use crate::runtime::private_socket::bind_private;
use crate::statistics::Latency;

use pattern::Pattern;
use ram::GuestRam;
use threads::Machine;

/// How to run the demo's guest.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where its monitor listens.
    pub qmp: PathBuf,
    /// Its RAM; a file is created with `size_mib`, or as large already.
    pub memory: Memory,
    /// MiB of RAM.
    pub size_mib: u64,
    /// It waits for a guest to come rather than filling its memory.
    pub incoming: bool,
    /// A guest that has come discards pages, too, as one with a balloon does.
    pub discard: bool,
    /// Threads that access memory.
    pub threads: usize,
    /// Accesses that write, percent.
    pub write_percent: u32,
    /// Pages that are written with zeroes, percent.
    pub zero_percent: u32,
    /// Pages that are never written, percent.
    pub hole_percent: u32,
    /// What the contents of its memory are derived from.
    pub seed: u64,
}

/// What is behind the guest's RAM. A guest that does not wait for another one has a shared file,
/// because that is what the source's umem reads.
#[derive(Clone, Debug)]
pub enum Memory {
    /// A file, mapped MAP_SHARED.
    Shared(RamPath),
    /// A file, mapped MAP_PRIVATE: what the guest writes is its own.
    Private(RamPath),
    /// Anonymous memory that is handed over to umem here.
    Anonymous {
        /// The region's name, the same as at the source.
        name: String,
        /// Where umem waits for it.
        handoff: PathBuf,
        /// Parts that are handed over on their own.
        shards: usize,
        /// It has pages of 2 MiB, from the kernel's hugetlb pool.
        huge: bool,
    },
}

/// What the guest found in its memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Verdict {
    /// Pages whose every word is right.
    pub verified_pages: u64,
    /// Pages in which a word was wrong, at the end or at any access before.
    pub bad_pages: u64,
    /// Pages that the guest had written and that do not hold what it wrote last.
    pub guest_writes_lost: u64,
    /// Pages read and checked while memory was arriving.
    pub reads: u64,
    /// Pages written while memory was arriving.
    pub writes: u64,
    /// Times that it discarded a page (or several that only go together) while memory was arriving or
    /// after that; such a page must read as zeroes until it is written again.
    pub discards: u64,
    /// What an access took, as the guest saw it.
    pub access_latency_us: Latency,
    /// Bytes of its memory that the kernel maps with huge pages.
    pub huge_bytes: u64,
    /// A mapping of the guest is still registered with a userfaultfd.
    pub registered: bool,
}

/// Runs the guest until its monitor is told to quit.
///
/// # Errors
/// RAM that cannot be mapped or a socket that cannot be made.
pub fn run(options: &Options) -> Result<()> {
    let ram = GuestRam::map(&options.memory, options.size_mib << 20)?;
    let pattern = Pattern {
        seed: options.seed,
        zero_percent: options.zero_percent,
        hole_percent: options.hole_percent,
    };
    let machine = Arc::new(Machine::new(ram, pattern, options.write_percent, options.discard));
    if !options.incoming {
        machine.fill();
    }
    let _ = std::fs::remove_file(&options.qmp);
    let listener = bind_private(&options.qmp)
        .context(|| format!("the guest's monitor {}", options.qmp.display()))?;
    machine.start_threads(options.threads)?;
    if !options.incoming {
        machine.resume();
    }
    print::out_line("{\"event\":\"ready\"}");
    monitor::serve(&listener, &machine, options)
}

pub(crate) fn thread<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<std::thread::JoinHandle<T>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map_err(|source| Error::System { what: format!("starting thread {name}"), source })
}
