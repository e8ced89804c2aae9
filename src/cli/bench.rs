//! `umem bench server` and `umem bench client`

use std::path::PathBuf;
use std::time::Duration;

use argh::{ArgsInfo, FromArgs};

use super::values::{CoreList, Seconds, Size};
use crate::error::{Error, Result};
use crate::observe;
use crate::programs::bench;
use crate::transport::uri::Uri;

/// Measure the throughput of a link for pages, between a server and a client.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "bench")]
pub(super) struct Bench {
    #[argh(subcommand)]
    command: BenchCommand,
}

#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand)]
enum BenchCommand {
    Server(BenchServer),
    Client(BenchClient),
}

/// Wait for `umem bench client`, and run one test at a time with it.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "server",
    note = "Every host that reaches the port can make this machine receive or send pages, in up to \
            3 GiB of its memory. So an address of the network needs --insecure: use it only on \
            networks where you trust every host.",
    error_code(1, "With -1: the test failed; stderr says why. Else: interrupted in a test."),
    error_code(2, "The command line is wrong.")
)]
struct BenchServer {
    /// the port to listen on, 0 for any (default 5202)
    #[argh(option, short = 'p', default = "bench::PORT")]
    port: u16,
    /// abort a test after this many seconds without progress or without all of its lanes (default 60)
    #[argh(option)]
    idle_timeout: Option<Seconds>,
    /// end after one test
    #[argh(switch, short = '1')]
    one_off: bool,
    /// allow an address of the network, where every host can run tests
    #[argh(switch)]
    insecure: bool,
    /// cores of the lanes, such as 2 or 2,3 (default: umem chooses)
    #[argh(option, short = 'A', default = "CoreList::default()")]
    affinity: CoreList,
    /// print a JSON object for each test
    #[argh(switch, short = 'J')]
    json: bool,
    /// the address to listen on, tcp:HOST:PORT or unix:PATH (default: every IPv4 address, which
    /// needs --insecure)
    #[argh(positional)]
    uri: Option<Uri>,
}

/// Stream pages to a `umem bench server`, and print the throughput and its limit.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "client",
    note = "The pages land in fresh memory, through the code that migrations use. Sizes may end in K, M, G \
            or T (powers of 1024). Ctrl-C ends the test with its report so far.",
    example = "Every second for 10 seconds:\n  {command_name} DESTINATION",
    example = "The network alone, with the figure for a script:\n  {command_name} --discard -J DESTINATION \
               | jq '.end.sum_received.bits_per_second'",
    example = "The time of a page fault while a stream fills the link:\n  {command_name} --fault-rate 1000 \
               DESTINATION",
    error_code(1, "The test failed or was interrupted; stderr says why."),
    error_code(2, "The command line is wrong.")
)]
struct BenchClient {
    /// the server's port, if the address has none (default 5202)
    #[argh(option, short = 'p', default = "bench::PORT")]
    port: u16,
    /// the duration of the test, seconds (default 10)
    #[argh(option, short = 't')]
    time: Option<f64>,
    /// the bytes to move, instead of a duration
    #[argh(option, short = 'n')]
    bytes: Option<Size>,
    /// the interval between reports, seconds; 0 for no reports (default 1)
    #[argh(option, short = 'i', default = "1.0")]
    interval: f64,
    /// leave out the first seconds of the test (default 0)
    #[argh(option, short = 'O', default = "0.0")]
    omit: f64,
    /// the number of lanes, each a connection and a thread (default 1)
    #[argh(option, short = 'P', default = "1")]
    parallel: u16,
    /// reverse the direction: the server sends
    #[argh(switch, short = 'R')]
    reverse: bool,
    /// cores of the lanes, such as 2 or 2,3 (default: umem chooses; none with --discard)
    #[argh(option, short = 'A', default = "CoreList::default()")]
    affinity: CoreList,
    /// congestion control of the lanes (default: cubic if allowed)
    #[argh(option, short = 'C')]
    congestion: Option<String>,
    /// write a report with pictures to this file: a page for a browser, or the output of -J if the
    /// file's name ends in .json
    #[argh(option)]
    report: Option<PathBuf>,
    /// print one JSON object, with the field names of iperf3
    #[argh(switch, short = 'J')]
    json: bool,
    /// send in both directions, over separate lanes
    #[argh(switch)]
    bidir: bool,
    /// memory in which pages land: shared (the default) is a file, as a guest maps one; into
    /// anonymous memory the pages are copied
    #[argh(option, default = "bench::MemoryKind::Shared")]
    kind: bench::MemoryKind,
    /// page size, 4K (the default) or 2M: pages of 2M come from a tmpfs, which needs root on both
    /// sides; with anonymous memory the receiver takes them from the kernel's hugetlb pool
    /// (vm.nr_hugepages)
    #[argh(option, default = "bench::PageKind::Small")]
    page_size: bench::PageKind,
    /// share of pages of zeroes, percent (default 0)
    #[argh(option, default = "0")]
    zero_percent: u32,
    /// page faults a second during the stream, over a separate lane: measures how long a guest's
    /// vCPU would wait beside this stream (default 0)
    #[argh(option, default = "0")]
    fault_rate: u32,
    /// discard the pages that arrive: measures the network alone
    #[argh(switch)]
    discard: bool,
    /// memory that a pass fills before the next pass, bytes (default 512M, or less if less is
    /// available)
    #[argh(option, default = "Size(bench::REGION_BYTES_MAX)")]
    pass_size: Size,
    /// compare every landed page with the sent one; costs time
    #[argh(switch)]
    verify: bool,
    /// the server's address: HOST, tcp:HOST:PORT or unix:PATH
    #[argh(positional)]
    server: String,
}

impl Bench {
    pub(super) fn run(self) -> Result<i32> {
        match self.command {
            BenchCommand::Server(server) => server.run(),
            BenchCommand::Client(client) => client.run(),
        }
    }
}

/// The longest test, a day.
const BENCH_SECONDS_MAX: f64 = 86_400.0;

/// The longest start of a test to leave out: a stream that is unsteady after that stays unsteady.
const BENCH_OMIT_SECONDS_MAX: f64 = 600.0;

/// Shorter intervals would measure the cost of the reports.
const BENCH_INTERVAL_SECONDS_MIN: f64 = 0.1;

impl BenchServer {
    fn run(self) -> Result<i32> {
        let uri = self.uri.unwrap_or(Uri::Tcp { host: String::new(), port: self.port });
        check_bench_uri(&uri)?;
        let Self { one_off, insecure, json, .. } = self;
        let cores = self.affinity.0;
        let idle_timeout = self.idle_timeout.map_or(bench::JOIN_TIMEOUT, |seconds| seconds.0);
        bench::run_server(&bench::Server { uri, idle_timeout, one_off, insecure, cores, json })?;
        Ok(0)
    }
}

impl BenchClient {
    fn run(self) -> Result<i32> {
        let usage = |text: String| Err(Error::Usage(text));
        if self.time.is_some() && self.bytes.is_some() {
            return usage("-t and -n both set the end of the test: leave one of them out".into());
        }
        let uri = bench_uri(&self.server, self.port)?;
        check_bench_uri(&uri)?;
        let seconds = self.time.unwrap_or(10.0);
        if !(BENCH_INTERVAL_SECONDS_MIN..=BENCH_SECONDS_MAX).contains(&seconds) {
            return usage(format!(
                "-t is {BENCH_INTERVAL_SECONDS_MIN} to {BENCH_SECONDS_MAX} seconds, not {seconds}"
            ));
        }
        if !(0.0..=BENCH_OMIT_SECONDS_MAX).contains(&self.omit) {
            return usage(format!(
                "-O is 0 to {BENCH_OMIT_SECONDS_MAX} seconds, not {}",
                self.omit
            ));
        }
        let is_often = (BENCH_INTERVAL_SECONDS_MIN..=BENCH_SECONDS_MAX).contains(&self.interval);
        if self.interval != 0.0 && !is_often {
            return usage(format!(
                "-i is 0 or {BENCH_INTERVAL_SECONDS_MIN} to {BENCH_SECONDS_MAX} seconds, not {}",
                self.interval
            ));
        }
        if self.fault_rate > 0 && self.bytes.is_some() {
            return usage(
                "--fault-rate needs -t: the memory for its faults depends on the duration".into(),
            );
        }
        let faults = match self.fault_rate {
            0 => 0,
            rate => bench::faults(rate, seconds + self.omit),
        };
        let test = bench::Test {
            lanes: self.parallel,
            bytes: self.bytes.map(|size| size.0),
            reverse: self.reverse,
            bidir: self.bidir,
            discard: self.discard,
            kind: self.kind,
            pages: self.page_size,
            fault_rate: self.fault_rate,
            faults,
            zero_percent: self.zero_percent,
            verify: self.verify,
            congestion: self.congestion,
            region_bytes: self.pass_size.0,
        };
        test.check().map_err(Error::Usage)?;
        let duration = self.bytes.is_none().then(|| Duration::from_secs_f64(seconds));
        if let Some(path) = &self.report {
            observe::check_writable(path)?;
        }
        bench::run_client(&bench::Client {
            uri,
            test,
            duration,
            omit: Duration::from_secs_f64(self.omit),
            interval: (self.interval != 0.0).then(|| Duration::from_secs_f64(self.interval)),
            cores: self.affinity.0,
            report: self.report,
            json: self.json,
        })
    }
}

/// The server's address: a URI of umem, or a host as iperf3 takes it.
fn bench_uri(text: &str, port: u16) -> Result<Uri> {
    if ["tcp:", "unix:", "fd:", "exec:"].iter().any(|form| text.starts_with(form)) {
        return text.parse().map_err(Error::Usage);
    }
    let host = text.trim_start_matches('[').trim_end_matches(']');
    Ok(Uri::Tcp { host: host.to_owned(), port })
}

fn check_bench_uri(uri: &Uri) -> Result<()> {
    if uri.is_one_connection() {
        return Err(Error::Usage(format!(
            "{uri} is one connection, but a test needs several: use tcp: or unix:"
        )));
    }
    Ok(())
}
