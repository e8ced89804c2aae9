//! `umem guest`, which `umem demo` starts

use std::path::PathBuf;

use argh::{ArgsInfo, FromArgs};

use super::values::Mebibytes;
use crate::error::{Error, Result};
use crate::host;
use crate::host::command::RamPath;
use crate::host::guest::Memory;
use crate::memory::kind::Kind;

/// Run the demo's guest: fill memory, read and write it, check every word. `umem demo` starts it.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "guest")]
pub(super) struct Guest {
    /// create this socket as the guest's QMP socket
    #[argh(option)]
    qmp: PathBuf,
    /// the guest's RAM, NAME=PATH; NAME alone for anonymous memory
    #[argh(option)]
    ram: String,
    /// size of the guest's RAM, MiB or a size such as 2G
    #[argh(option)]
    size: Mebibytes,
    /// wait for a guest to arrive
    #[argh(switch)]
    incoming: bool,
    /// memory kind, with --incoming: shared (the default), private or anonymous
    #[argh(option, default = "Kind::Shared")]
    kind: Kind,
    /// the socket on which umem incoming takes over anonymous memory
    #[argh(option)]
    handoff: Option<PathBuf>,
    /// number of parts of anonymous memory, each with its own userfaultfd (default 1)
    #[argh(option, default = "1")]
    shards: usize,
    /// use 2 MiB pages from the kernel's hugetlb pool for anonymous memory
    #[argh(switch)]
    huge: bool,
    /// discard pages after the arrival, as a balloon does
    #[argh(switch)]
    discard: bool,
    /// number of threads that access memory (default 2)
    #[argh(option, default = "2")]
    threads: usize,
    /// share of accesses that write, percent (default 30)
    #[argh(option, default = "30")]
    write_percent: u32,
    /// share of pages of zeroes, percent (default 10)
    #[argh(option, default = "10")]
    zero_percent: u32,
    /// share of pages that are never written, percent (default 10)
    #[argh(option, default = "10")]
    hole_percent: u32,
    /// seed of the guest's memory (default 1)
    #[argh(option, default = "1")]
    seed: u64,
}

impl Guest {
    pub(super) fn run(self) -> Result<i32> {
        let memory = self.memory()?;
        host::guest::run(&host::guest::Options {
            qmp: self.qmp,
            memory,
            size_mib: self.size.0,
            incoming: self.incoming,
            discard: self.discard,
            threads: self.threads,
            write_percent: self.write_percent,
            zero_percent: self.zero_percent,
            hole_percent: self.hole_percent,
            seed: self.seed,
        })?;
        Ok(0)
    }

    /// The guest's RAM; an error if the options contradict each other.
    fn memory(&self) -> Result<Memory> {
        let usage = |text: &str| Err(Error::Usage(text.into()));
        if !self.incoming && (self.kind != Kind::default() || self.discard) {
            return usage(
                "--kind and --discard apply to a guest that waits for a move: add --incoming",
            );
        }
        if self.kind.lands_in_file() {
            if self.handoff.is_some() || self.huge || self.shards != 1 {
                return usage(
                    "--handoff, --huge and --shards are for anonymous memory: add --kind anonymous",
                );
            }
            let file = self
                .ram
                .parse::<RamPath>()
                .map_err(|text| Error::Usage(format!("--ram: {text}")))?;
            return Ok(match self.kind {
                Kind::Private => Memory::Private(file),
                _ => Memory::Shared(file),
            });
        }
        let Some(handoff) = self.handoff.clone() else {
            return usage("anonymous memory must be handed over to umem: add --handoff SOCKET");
        };
        if self.ram.contains('=') {
            return usage("anonymous memory has no file: write --ram NAME");
        }
        let (name, shards, huge) = (self.ram.clone(), self.shards, self.huge);
        Ok(Memory::Anonymous { name, handoff, shards, huge })
    }
}
