//! `umem guest`, which `umem demo` starts

use std::path::PathBuf;

use argh::{ArgsInfo, FromArgs};

use super::values::Mebibytes;
use crate::error::{Error, Result};
use crate::host;
use crate::host::command::RamPath;
use crate::host::guest::Memory;
use crate::memory::kind::Kind;

/// The demo's guest: fills memory, reads and writes it, checks every word. Started by `umem demo`.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "guest")]
pub(super) struct Guest {
    /// make this socket for its monitor
    #[argh(option)]
    qmp: PathBuf,
    /// its RAM, NAME=PATH; NAME alone for anonymous memory
    #[argh(option)]
    ram: String,
    /// size of its RAM, MiB or a size such as 2G
    #[argh(option)]
    size: Mebibytes,
    /// wait for a guest to arrive
    #[argh(switch)]
    incoming: bool,
    /// memory kind of a guest that waits: shared (the default), private or anonymous
    #[argh(option, default = "Kind::Shared")]
    kind: Kind,
    /// the socket on which umem incoming takes anonymous memory over
    #[argh(option)]
    handoff: Option<PathBuf>,
    /// parts of anonymous memory that have a userfaultfd each (default 1)
    #[argh(option, default = "1")]
    shards: usize,
    /// anonymous memory of 2 MiB pages, from the kernel's hugetlb pool
    #[argh(switch)]
    huge: bool,
    /// a guest that has arrived discards pages too, like one with a balloon
    #[argh(switch)]
    discard: bool,
    /// threads that access memory (default 2)
    #[argh(option, default = "2")]
    threads: usize,
    /// accesses that write, percent (default 30)
    #[argh(option, default = "30")]
    write_percent: u32,
    /// pages that hold zeroes, percent (default 10)
    #[argh(option, default = "10")]
    zero_percent: u32,
    /// pages that are never written, percent (default 10)
    #[argh(option, default = "10")]
    hole_percent: u32,
    /// seed of its memory (default 1)
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

    /// What its RAM is, if the options that say so agree.
    fn memory(&self) -> Result<Memory> {
        let usage = |text: &str| Err(Error::Usage(text.into()));
        if !self.incoming && (self.kind != Kind::default() || self.discard) {
            return usage("--kind and --discard are for a guest that waits: add --incoming");
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
            return usage("anonymous memory has to be handed over: add --handoff SOCKET");
        };
        if self.ram.contains('=') {
            return usage("anonymous memory has no file: write --ram NAME");
        }
        let (name, shards, huge) = (self.ram.clone(), self.shards, self.huge);
        Ok(Memory::Anonymous { name, handoff, shards, huge })
    }
}
