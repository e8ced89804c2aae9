//! The demo's guest: threads that read and write memory and check every word, behind a QMP socket.
//!
//! It takes the place of a QEMU. At the source its RAM is a shared file. It answers the QMP commands that umem sends
//! (and `umem-verify`, for the demo). Its device state holds what its threads must know of their memory. At the
//! destination it gets its memory through the preload object, or hands anonymous memory over itself ([`handover`]). It
//! has no other part in the transport: the contents that it finds in its memory are independent evidence.

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
    /// Its RAM; a file is created with `size_mib`, or has that size already.
    pub memory: Memory,
    /// MiB of RAM.
    pub size_mib: u64,
    /// It waits for a guest to arrive and does not fill its memory.
    pub incoming: bool,
    /// A guest that has arrived also discards pages, as a guest with a balloon does.
    pub discard: bool,
    /// Threads that access memory.
    pub threads: usize,
    /// Accesses that write, percent.
    pub write_percent: u32,
    /// Pages that are written with zeroes, percent.
    pub zero_percent: u32,
    /// Pages that are never written, percent.
    pub hole_percent: u32,
    /// The seed from which the contents of its memory are derived.
    pub seed: u64,
}

/// The memory behind the guest's RAM. A guest that does not wait for another one has a shared file, because the
/// source's umem reads that.
#[derive(Clone, Debug)]
pub enum Memory {
    /// A file, mapped MAP_SHARED.
    Shared(RamPath),
    /// A file, mapped MAP_PRIVATE: the guest's writes go to its own copies.
    Private(RamPath),
    /// Anonymous memory that is handed over to umem here.
    Anonymous {
        /// The region's name, the same as at the source.
        name: String,
        /// The socket at which umem waits for it.
        handoff: PathBuf,
        /// Number of parts that are handed over separately.
        shards: usize,
        /// It has pages of 2 MiB, from the kernel's hugetlb pool.
        huge: bool,
    },
}

/// The results of the guest's checks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Verdict {
    /// Pages whose every word is right.
    pub verified_pages: u64,
    /// Pages in which a word was wrong, at the end or at any earlier access.
    pub bad_pages: u64,
    /// Pages that the guest had written and that do not hold the last written contents.
    pub guest_writes_lost: u64,
    /// Pages read and checked while memory was arriving.
    pub reads: u64,
    /// Pages written while memory was arriving.
    pub writes: u64,
    /// Number of times that it discarded a page, or several pages that can only be discarded together, while memory was
    /// arriving or later. Such a page must read as zeroes until it is written again.
    pub discards: u64,
    /// Latency of an access, as the guest measured it.
    pub access_latency_us: Latency,
    /// Bytes of its memory that the kernel maps with huge pages.
    pub huge_bytes: u64,
    /// A mapping of the guest is still registered with a userfaultfd.
    pub registered: bool,
}

/// Runs the guest until its monitor receives `quit`.
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
