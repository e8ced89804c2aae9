//! `umem bench server` and `umem bench client`

use std::path::PathBuf;
use std::time::Duration;

use argh::{ArgsInfo, FromArgs};

use super::values::{CoreList, Seconds, Size};
use crate::error::{Error, Result};
use crate::uri::Uri;
use crate::{bench, observe};

/// Measure what a link gives for pages: a server here, a client there.
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
    note = "Whoever can reach the port can have this machine receive or send pages, in up to 3 GiB of \
            its memory: an address of the network takes --insecure, for networks where you trust every \
            host.",
    error_code(1, "With -1: the test failed; stderr says why. Else: interrupted in a test."),
    error_code(2, "The command line is wrong.")
)]
struct BenchServer {
    /// the port to listen on, 0 for any (default 5202)
    #[argh(option, short = 'p', default = "bench::PORT")]
    port: u16,
    /// give a test up in which nothing has moved for so many seconds, or whose lanes have not come by then
    /// (default 60): others may want to test
    #[argh(option)]
    idle_timeout: Option<Seconds>,
    /// end after one test
    #[argh(switch, short = '1')]
    one_off: bool,
    /// listen at an address of the network, where whoever reaches it can run tests
    #[argh(switch)]
    insecure: bool,
    /// cores of the lanes, such as 2 or 2,3 (default: chosen)
    #[argh(option, short = 'A', default = "CoreList::default()")]
    affinity: CoreList,
    /// print a JSON object for each test
    #[argh(switch, short = 'J')]
    json: bool,
    /// where to listen, tcp:HOST:PORT or unix:PATH (default: every IPv4 address,
    /// which takes --insecure)
    #[argh(positional)]
    uri: Option<Uri>,
}

/// Stream pages to a `umem bench server`, and say what the link gives and what limits it.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "client",
    note = "The pages land in fresh memory, by the code that migrations use. Sizes may end in K, M, G \
            or T (powers of 1024). Ctrl-C ends the test with its report so far.",
    example = "Every second for 10 seconds:\n  {command_name} DESTINATION",
    example = "The network alone, both figures for a script:\n  {command_name} --discard -J DESTINATION \
               | jq '.end.sum_received.bits_per_second'",
    example = "What a page fault takes while a stream fills the link:\n  {command_name} --fault-rate 1000 \
               DESTINATION",
    error_code(1, "The test failed or was interrupted; stderr says why."),
    error_code(2, "The command line is wrong.")
)]
struct BenchClient {
    /// the server's port where its address names none (default 5202)
    #[argh(option, short = 'p', default = "bench::PORT")]
    port: u16,
    /// seconds to run (default 10)
    #[argh(option, short = 't')]
    time: Option<f64>,
    /// bytes to move, in place of a time
    #[argh(option, short = 'n')]
    bytes: Option<Size>,
    /// seconds between reports, 0 for none (default 1)
    #[argh(option, short = 'i', default = "1.0")]
    interval: f64,
    /// seconds at the beginning that do not count (default 0)
    #[argh(option, short = 'O', default = "0.0")]
    omit: f64,
    /// lanes, a connection and a thread each (default 1)
    #[argh(option, short = 'P', default = "1")]
    parallel: u16,
    /// the server sends
    #[argh(switch, short = 'R')]
    reverse: bool,
    /// cores of the lanes, such as 2 or 2,3 (default: chosen; with --discard none)
    #[argh(option, short = 'A', default = "CoreList::default()")]
    affinity: CoreList,
    /// congestion control of the lanes (default cubic where it is allowed)
    #[argh(option, short = 'C')]
    congestion: Option<String>,
    /// a file for a report in pictures: a page for a browser, or what -J prints where its name ends in
    /// .json
    #[argh(option)]
    report: Option<PathBuf>,
    /// print one JSON object, with iperf3's names
    #[argh(switch, short = 'J')]
    json: bool,
    /// both sides send, each over lanes of its own
    #[argh(switch)]
    bidir: bool,
    /// what pages land in: shared (the default), a file that a guest would map, or anonymous, memory that
    /// they are copied into
    #[argh(option, default = "bench::MemoryKind::Shared")]
    kind: bench::MemoryKind,
    /// pages of 4K (the default) or 2M: of a tmpfs, which takes root on both sides; anonymous ones of the
    /// kernel's hugetlb pool (vm.nr_hugepages) and of such a tmpfs at the sender
    #[argh(option, default = "bench::PageKind::Small")]
    page_size: bench::PageKind,
    /// pages that hold zeroes, percent (default 0)
    #[argh(option, default = "0")]
    zero_percent: u32,
    /// faults a second meanwhile, each for a page that is fetched over a lane of its own: what a guest's
    /// vCPU would wait beside this stream (default 0)
    #[argh(option, default = "0")]
    fault_rate: u32,
    /// keep nothing of what comes
    #[argh(switch)]
    discard: bool,
    /// bytes of memory that are filled at a time, before others take their place (default 512M, or
    /// less by what is available)
    #[argh(option, default = "Size(bench::REGION_BYTES_MAX)")]
    pass_size: Size,
    /// compare every page that has landed with what was sent; costs time
    #[argh(switch)]
    verify: bool,
    /// HOST, tcp:HOST:PORT or unix:PATH
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

/// The longest that a test may leave out at its beginning: what has not settled by then will not.
const BENCH_OMIT_SECONDS_MAX: f64 = 600.0;

/// Reports more often than this would be what is measured.
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
            return usage("-t and -n both say when to end: leave one of them out".into());
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
                "--fault-rate needs -t: the memory that its faults take depends on the time".into(),
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

/// What a client was told: an address as umem writes them, or a host as iperf3 does.
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
            "{uri} is one connection, and a test has several: use tcp: or unix:"
        )));
    }
    Ok(())
}
