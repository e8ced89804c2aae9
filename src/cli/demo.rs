//! `umem demo`

use std::path::PathBuf;

use argh::{ArgsInfo, FromArgs};

use super::values::{Mebibytes, PostcopyFlags, Size, check_lanes, check_percent};
use crate::error::{Error, Result};
use crate::memory::kind::Kind;
use crate::programs::demo;

/// Move a guest of umem's own between processes on this machine, and check every page of it.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "demo")]
pub(super) struct Demo {
    /// the guest's RAM, MiB or a size such as 2G (default 512)
    #[argh(option, default = "Mebibytes(512)")]
    size: Mebibytes,
    /// memory kind at the destination: shared (the default), private or anonymous
    #[argh(option, default = "Kind::Shared")]
    kind: Kind,
    /// passed to umem incoming: 1 touches pages and releases their copies, 0 does not
    #[argh(option)]
    postcopy_flags: Option<PostcopyFlags>,
    /// parts of anonymous memory that have a userfaultfd each (default 1)
    #[argh(option, default = "1")]
    shards: usize,
    /// anonymous memory of 2 MiB pages, from the kernel's hugetlb pool
    #[argh(switch)]
    huge: bool,
    /// the guest discards pages during the move, like one with a balloon
    #[argh(switch)]
    discard: bool,
    /// accesses of the guest that write, percent (default 30)
    #[argh(option, default = "30")]
    write_percent: u32,
    /// pages that hold zeroes, percent (default 10)
    #[argh(option, default = "10")]
    zero_percent: u32,
    /// pages that were never written, percent (default 10)
    #[argh(option, default = "10")]
    hole_percent: u32,
    /// threads of the guest (default 2)
    #[argh(option, default = "2")]
    threads: usize,
    /// bulk lanes (default 1)
    #[argh(option, default = "1")]
    lanes: u16,
    /// send pages while the guest runs at the source, too, as `umem migrate --precopy -p` does
    #[argh(switch)]
    precopy: bool,
    /// send all pages while the guest stands still, as `umem migrate --stop-first` does, to compare
    #[argh(switch)]
    stop_first: bool,
    /// check every page and message for bits that change on their way, and compare all memory at the end
    #[argh(switch)]
    checksum: bool,
    /// TLS between both sides: a directory with the certificates and keys of both, in QEMU's files;
    /// the destination's certificate is for 127.0.0.1
    #[argh(option)]
    tls_creds: Option<PathBuf>,
    /// a file with a secret of 16 bytes or more, for both sides
    #[argh(option)]
    secret_file: Option<PathBuf>,
    /// limit of the background after the switchover, bytes a second such as 100M
    #[argh(option)]
    max_postcopy_bandwidth: Option<Size>,
    /// seed of the guest's memory (default: a new one each time, printed)
    #[argh(option)]
    seed: Option<u64>,
    /// write a report of both sides with pictures to this file: a page for a browser, or the
    /// figures if the name ends in .json
    #[argh(option)]
    report: Option<PathBuf>,
    /// show no progress
    #[argh(switch, short = 'q')]
    quiet: bool,
    /// trace phases and threads on stderr; RUST_LOG selects the detail
    #[argh(switch, short = 'v')]
    verbose: bool,
    /// print JSON objects; the last one is the report
    #[argh(switch)]
    json: bool,
}

impl Demo {
    pub(super) fn run(self) -> Result<i32> {
        if self.kind.lands_in_file() && (self.shards != 1 || self.huge) {
            return Err(Error::Usage(
                "--shards and --huge are for anonymous memory: add --kind anonymous".into(),
            ));
        }
        if !self.kind.needs_touch() && self.postcopy_flags.is_some_and(|flags| flags.0 != 0) {
            return Err(Error::Usage(
                "--postcopy-flags 1 asks for touches, which private memory alone needs: add --kind \
                 private"
                    .into(),
            ));
        }
        check_percent("write-percent", self.write_percent)?;
        check_percent("zero-percent", self.zero_percent)?;
        check_percent("hole-percent", self.hole_percent)?;
        check_percent("zero-percent and --hole-percent", self.zero_percent + self.hole_percent)?;
        check_lanes(self.lanes)?;
        if self.size.0 == 0 || self.threads == 0 {
            return Err(Error::Usage("--size and --threads are at least 1".into()));
        }
        let max_postcopy_bandwidth = self.max_postcopy_bandwidth.map(|limit| limit.0);
        if self.precopy && self.stop_first {
            return Err(Error::Usage("give --precopy or --stop-first, not both".into()));
        }
        if max_postcopy_bandwidth.is_some() && self.stop_first {
            return Err(Error::Usage(
                "--max-postcopy-bandwidth limits what is sent after the switchover: leave out \
                 --stop-first"
                    .into(),
            ));
        }
        demo::run(&demo::Options {
            size_mib: self.size.0,
            kind: self.kind,
            postcopy_flags: self.postcopy_flags.map(|flags| flags.0),
            shards: self.shards,
            huge: self.huge,
            discard: self.discard,
            write_percent: self.write_percent,
            zero_percent: self.zero_percent,
            hole_percent: self.hole_percent,
            threads: self.threads,
            lanes: self.lanes,
            checksum: self.checksum,
            postcopy: !self.stop_first,
            precopy: self.precopy,
            tls_creds: self.tls_creds,
            secret_file: self.secret_file,
            max_postcopy_bandwidth,
            report: self.report,
            quiet: self.quiet,
            verbose: self.verbose,
            seed: self.seed,
            json: self.json,
        })
    }
}
