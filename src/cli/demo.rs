//! `umem demo`

use std::path::PathBuf;

use argh::{ArgsInfo, FromArgs};

use super::values::{Mebibytes, PostcopyFlags, Size, check_lanes, check_percent};
use crate::error::{Error, Result};
use crate::memory::kind::Kind;
use crate::programs::demo;

/// Move a built-in guest between two processes on this machine, and check every page.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "demo")]
pub(super) struct Demo {
    /// the guest's RAM, MiB or a size such as 2G (default 512)
    #[argh(option, default = "Mebibytes(512)")]
    size: Mebibytes,
    /// memory kind at the destination: shared (the default), private or anonymous
    #[argh(option, default = "Kind::Shared")]
    kind: Kind,
    /// pass this to umem incoming: 1 touches pages and releases their copies, 0 does neither
    #[argh(option)]
    postcopy_flags: Option<PostcopyFlags>,
    /// number of parts of anonymous memory, each with its own userfaultfd (default 1)
    #[argh(option, default = "1")]
    shards: usize,
    /// use 2 MiB pages from the kernel's hugetlb pool for anonymous memory
    #[argh(switch)]
    huge: bool,
    /// have the guest discard pages during the move, as a balloon does
    #[argh(switch)]
    discard: bool,
    /// share of the guest's accesses that write, percent (default 30)
    #[argh(option, default = "30")]
    write_percent: u32,
    /// share of pages of zeroes, percent (default 10)
    #[argh(option, default = "10")]
    zero_percent: u32,
    /// share of pages that were never written, percent (default 10)
    #[argh(option, default = "10")]
    hole_percent: u32,
    /// number of the guest's threads (default 2)
    #[argh(option, default = "2")]
    threads: usize,
    /// number of bulk lanes (default 1)
    #[argh(option, default = "1")]
    lanes: u16,
    /// send pages also while the guest runs at the source, as `umem migrate --precopy -p` does
    #[argh(switch)]
    precopy: bool,
    /// send all pages while the guest stands still, as `umem migrate --stop-first` does, for
    /// comparison
    #[argh(switch)]
    stop_first: bool,
    /// check every page and message for bits that change in transit, and compare all memory at the
    /// end
    #[argh(switch)]
    checksum: bool,
    /// use TLS: the directory has the certificates and keys of both sides, in files named as for
    /// QEMU; the destination's certificate must be for 127.0.0.1
    #[argh(option)]
    tls_creds: Option<PathBuf>,
    /// use the secret in this file on both sides, 16 bytes or more
    #[argh(option)]
    secret_file: Option<PathBuf>,
    /// limit the background after the switchover, bytes a second such as 100M
    #[argh(option)]
    max_postcopy_bandwidth: Option<Size>,
    /// seed of the guest's memory (default: random, printed)
    #[argh(option)]
    seed: Option<u64>,
    /// write a report of both sides with pictures to this file: a page for a browser, or the
    /// figures if the name ends in .json
    #[argh(option)]
    report: Option<PathBuf>,
    /// do not show progress
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
                "--postcopy-flags 1 touches pages, and only private memory needs that: add --kind \
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
                "--max-postcopy-bandwidth limits pages after the switchover, and --stop-first sends all \
                 of them before: leave out one"
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
