//! `floor`: the best rate of a page stream on this kernel, without any protocol or page states.
//!
//! One thread sends a filled memory file over loopback TCP, another receives it into memory of each
//! kind, with plain system calls and a core each.

mod cipher;
mod receive;
mod send;

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::Instant;

use argh::FromArgs;
use nix::sys::socket::{setsockopt, sockopt};
use serde::Serialize;
use serde_json::json;

use crate::error::{Context, Result, failure, usage};
use crate::interrupt;
use crate::machine::{Machine, pin, two_cores};
use crate::memory::{List, Mapping, PAGE_BYTES, Pages, Pool};
use crate::report::{Measure, Output, Report, Table, progress};
use crate::statistics::Spread;

pub(crate) use cipher::Cipher;
pub(crate) use receive::Receive;
use receive::Target;
pub(crate) use send::Send;

/// The kernel's rate without a protocol: a memory file → loopback TCP → fresh memory of each kind.
#[derive(FromArgs)]
#[argh(subcommand, name = "floor")]
pub(crate) struct Options {
    /// data moved by each run, MiB (default 1024)
    #[argh(option, default = "1024")]
    size: usize,
    /// turns of each way (default 3)
    #[argh(option, default = "3")]
    rounds: usize,
    /// kinds of memory, separated by commas (default: all): memfd, huge-tmpfs, hugetlb, anonymous,
    /// anonymous-huge, private
    #[argh(option)]
    into: Option<List<Pages>>,
    /// shares of zero pages in percent, separated by commas (default 0)
    #[argh(option, default = "List(vec![0])")]
    zero: List<u32>,
    /// write a page with the tables and plots, for a browser, to this file
    #[argh(option)]
    report: Option<PathBuf>,
    /// print one JSON object
    #[argh(switch)]
    json: bool,
}

/// The lanes' congestion control; the system's default may be slower on a short path.
const CONGESTION: &str = "cubic";

/// One way from a memory file into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Way {
    /// The memory that is filled; see [`Pages::source`] for the file that is sent.
    pub(crate) pages: Pages,
    /// Zero pages in it, which the sender detects and does not send, percent.
    pub(crate) zero_percent: u32,
    pub(crate) send: Send,
    pub(crate) receive: Receive,
}

/// The result of one run.
#[derive(Clone, Copy, Debug)]
struct Run {
    seconds: f64,
    /// Rate of the bytes sent.
    gbps: f64,
    /// Processor time of the sender as a share of the run.
    sender_busy: f64,
    receiver_busy: f64,
    /// Processor seconds of both threads for each GiB: varies less than Gbit/s when other programs
    /// compute.
    cpu_s_per_gib: f64,
}

/// A way's figures over all rounds.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    #[serde(flatten)]
    pub(crate) way: Way,
    pub(crate) seconds: Spread,
    pub(crate) gbps: Spread,
    sender_busy: Spread,
    receiver_busy: Spread,
    cpu_s_per_gib: Spread,
}

impl Way {
    pub(crate) fn name(self) -> String {
        format!("{}, sent by {}", self.receive.name(self.pages), self.send.name())
    }
}

/// The ways into memory of one page kind; [`Receive::Discard`] fills none.
pub(crate) fn ways(pages: Pages, zero_percent: u32) -> Vec<Way> {
    let receives: &[Receive] = match pages {
        Pages::Memfd => {
            &[Receive::Discard, Receive::Map, Receive::MapAhead, Receive::Write, Receive::Splice]
        }
        Pages::HugeTmpfs => &[Receive::Discard, Receive::Map, Receive::MapAhead, Receive::Write],
        Pages::Hugetlb => &[Receive::Map, Receive::MapAhead],
        Pages::Anonymous => &[Receive::Copy, Receive::CopySmall],
        Pages::AnonymousHuge => &[Receive::Copy],
        Pages::Private => &[Receive::Own, Receive::OwnBeside],
    };
    let each = |&receive| {
        [Send::Sendfile, Send::Mapping].map(|send| Way { pages, zero_percent, send, receive })
    };
    receives.iter().flat_map(each).collect()
}

impl Measure for Options {
    fn measure(&self) -> Result<Report> {
        let options = self;
        if options.size == 0 || options.rounds == 0 {
            return usage("--size and --rounds are at least 1");
        }
        check_zero(&options.zero)?;
        let machine = Machine::describe();
        let kinds = chosen(options.into.as_ref());
        let mut floor = Floor::new(options.size << 20, &kinds, &options.zero.0)?;
        for round in 1..=options.rounds {
            progress(&format!("round {round} of {}", options.rounds));
            floor.round()?;
        }
        Ok(report(options, machine, &floor))
    }

    fn output(&self) -> Output<'_> {
        let svg = None;
        Output { json: self.json, report: self.report.as_deref(), svg }
    }
}

/// The kinds of memory of the options.
pub(crate) fn chosen(list: Option<&List<Pages>>) -> Vec<Pages> {
    list.map_or_else(|| Pages::ALL.to_vec(), |list| list.0.clone())
}

/// An error for shares that leave nothing to send.
pub(crate) fn check_zero(percent: &List<u32>) -> Result<()> {
    match percent.0.iter().find(|&&percent| percent >= 100) {
        Some(percent) => {
            usage(format!("--zero must be below 100, not {percent}: nothing would be sent"))
        }
        None => Ok(()),
    }
}

/// The files to send, and the results.
pub(crate) struct Floor {
    sources: Vec<Source>,
    runs: Vec<(Way, Vec<Run>)>,
    /// The kinds of memory that this machine has.
    pub(crate) kinds: Vec<Pages>,
    zeroes: Vec<u32>,
    /// The kinds that it lacks, and why.
    pub(crate) left_out: Vec<String>,
    /// Released at the end.
    _pool: Option<Pool>,
}

/// A filled memory file and its mapping.
pub(crate) struct Source {
    pages: Pages,
    zero_percent: u32,
    file: File,
    mapping: Mapping,
    /// The pages that hold data, as offset and length in bytes.
    runs: Vec<(usize, usize)>,
    data_bytes: usize,
}

impl Source {
    fn new(pages: Pages, bytes: usize, zero_percent: u32) -> Result<Source> {
        let file = pages.file(bytes)?;
        let mapping = Mapping::of(&file, bytes)?;
        let runs = mapping.fill_data(zero_percent)?;
        let data_bytes = runs.iter().map(|(_, bytes)| bytes).sum();
        Ok(Source { pages, zero_percent, file, mapping, runs, data_bytes })
    }

    /// Restores its content.
    fn refill(&self) -> Result<()> {
        self.mapping.fill_data(self.zero_percent).map(drop)
    }
}

/// The file from which memory of this kind is filled.
fn source_of(sources: &[Source], pages: Pages, zero_percent: u32) -> Result<&Source> {
    let is_meant =
        |source: &&Source| source.pages == pages.source() && source.zero_percent == zero_percent;
    sources.iter().find(is_meant).ok_or_else(|| "no source for this way".into())
}

impl Floor {
    /// For memory of these kinds, as far as this machine has them, each with these shares of zero
    /// pages.
    pub(crate) fn new(bytes: usize, asked: &[Pages], zeroes: &[u32]) -> Result<Floor> {
        let (mut sources, mut left_out, mut kinds) = (Vec::new(), Vec::new(), Vec::new());
        let mut pool = None;
        for &pages in asked {
            if kinds.contains(&pages) {
                return usage(format!("--into names {} twice", pages.word()));
            }
            let possible = (|| {
                // Before the sources take the memory.
                if pages.is_from_pool() && pool.is_none() {
                    pool = Some(Pool::reserve(bytes)?);
                }
                pages.source().file(PAGE_BYTES).map(drop)
            })();
            match possible {
                Ok(()) => kinds.push(pages),
                Err(error) => left_out.push(format!("{}: {error}", pages.name())),
            }
        }
        if kinds.is_empty() {
            return failure(left_out.join("; "));
        }
        for pages in [Pages::Memfd, Pages::HugeTmpfs] {
            for &zero_percent in zeroes {
                if kinds.iter().any(|kind| kind.source() == pages) {
                    sources.push(Source::new(pages, bytes, zero_percent)?);
                }
            }
        }
        let ways = kinds
            .iter()
            .flat_map(|&pages| zeroes.iter().flat_map(move |&percent| ways(pages, percent)));
        let runs = ways.map(|way| (way, Vec::new())).collect();
        Ok(Floor { runs, sources, kinds, zeroes: zeroes.to_vec(), left_out, _pool: pool })
    }

    /// Runs every way once.
    pub(crate) fn round(&mut self) -> Result<()> {
        let (kinds, zeroes) = (self.kinds.clone(), self.zeroes.clone());
        kinds.into_iter().try_for_each(|pages| {
            zeroes.iter().try_for_each(|&zero_percent| self.turns(pages, zero_percent))
        })
    }

    /// Runs every way into memory of this kind, with this share of zero pages, once.
    pub(crate) fn turns(&mut self, pages: Pages, zero_percent: u32) -> Result<()> {
        let is_meant = |way: &Way| way.pages == pages && way.zero_percent == zero_percent;
        for (way, runs) in self.runs.iter_mut().filter(|(way, _)| is_meant(way)) {
            let source = source_of(&self.sources, pages, zero_percent)?;
            source.refill()?;
            runs.push(warmed(*way, source)?);
        }
        Ok(())
    }

    /// Keeps the best way into memory of each kind with each share of zero pages, by `rounds`
    /// turns, which are not counted: the best of several figures would be a lucky one.
    pub(crate) fn choose(&mut self, rounds: usize) -> Result<()> {
        for round in 1..=rounds {
            progress(&format!("choosing the floor's ways, round {round} of {rounds}"));
            self.round()?;
        }
        let best: Vec<Way> = self
            .runs
            .iter()
            .filter_map(|(way, _)| self.best(way.pages, way.zero_percent))
            .map(|figure| figure.way)
            .collect();
        self.runs.retain(|(way, _)| best.contains(way));
        self.runs.iter_mut().for_each(|(_, runs)| runs.clear());
        Ok(())
    }

    /// The file from which memory of this kind is filled, so that another sender can send the same
    /// memory. The next turn restores its content.
    pub(crate) fn source(&self, pages: Pages, zero_percent: u32) -> Result<&File> {
        source_of(&self.sources, pages, zero_percent).map(|source| &source.file)
    }

    pub(crate) fn figures(&self) -> Vec<Figure> {
        let figure = |(way, runs): &(Way, Vec<Run>)| {
            let spread = |get: fn(&Run) -> f64| Spread::of(runs.iter().map(get).collect());
            Figure {
                way: *way,
                seconds: spread(|run| run.seconds),
                gbps: spread(|run| run.gbps),
                sender_busy: spread(|run| run.sender_busy),
                receiver_busy: spread(|run| run.receiver_busy),
                cpu_s_per_gib: spread(|run| run.cpu_s_per_gib),
            }
        };
        self.runs.iter().map(figure).collect()
    }

    /// The best way into memory of this kind in one turn with a guest of `bytes`.
    pub(crate) fn best_way(pages: Pages, bytes: usize) -> Result<Way> {
        let mut floor = Floor::new(bytes, &[pages], &[0])?;
        floor.round()?;
        Ok(floor.best(pages, 0).ok_or("every kind has a way")?.way)
    }

    /// The best way into memory of this kind, with this share of zero pages.
    pub(crate) fn best(&self, pages: Pages, zero_percent: u32) -> Option<Figure> {
        let figures = self.figures().into_iter();
        figures
            .filter(|figure| {
                let Way { receive, .. } = figure.way;
                figure.way.pages == pages
                    && figure.way.zero_percent == zero_percent
                    && receive != Receive::Discard
            })
            .max_by(|a, b| a.gbps.median.total_cmp(&b.gbps.median))
    }
}

/// Runs one way once with a guest of its own of `bytes`, none of them zeroes: seconds, and
/// processor seconds for each GiB.
pub(crate) fn turn(way: Way, bytes: usize) -> Result<(f64, f64)> {
    let run = warmed(way, &Source::new(way.pages.source(), bytes, 0)?)?;
    Ok((run.seconds, run.cpu_s_per_gib))
}

/// Runs one way once, with memory as warm as umem finds it.
fn warmed(way: Way, source: &Source) -> Result<Run> {
    if way.receive != Receive::Discard {
        way.pages.warm(source.data_bytes)?;
    }
    once(way, source)
}

/// Moves the file once, and checks the received data.
fn once(way: Way, source: &Source) -> Result<Run> {
    interrupt::check()?;
    let bytes = source.data_bytes;
    let [sender_core, receiver_core] = two_cores()?;
    let (outgoing, incoming) = connection()?;
    let target = Target::new(way.pages, bytes)?;
    let started = Instant::now();
    let (sender, receiver) = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            pin(sender_core)?;
            // The thread owns the socket, so that the other thread never waits forever.
            let (file, mapping) = (&source.file, &source.mapping);
            way.send.all(file, mapping, outgoing, &source.runs, way.zero_percent > 0)?;
            thread_cpu_s()
        });
        let receiver = scope.spawn(|| {
            pin(receiver_core)?;
            let beside_cpu_s = way.receive.all(incoming, &target, way.pages, bytes)?;
            Ok((started.elapsed().as_secs_f64(), thread_cpu_s()? + beside_cpu_s))
        });
        (joined(sender.join()), joined(receiver.join()))
    });
    let (sender_cpu, (seconds, receiver_cpu)) = match (sender, receiver) {
        (Ok(sender), Ok(receiver)) => (sender, receiver),
        // One end's failure cuts off the other: both errors are reported.
        (Err(sender), Err(receiver)) => return failure(format!("{sender}; {receiver}")),
        (Err(error), Ok(_)) | (Ok(_), Err(error)) => return Err(error),
    };
    if way.receive != Receive::Discard
        && let Some(page) = target.mapping.first_wrong_page()
    {
        return failure(format!("page {page} arrived wrong ({way:?})"));
    }
    Ok(Run {
        seconds,
        gbps: bytes as f64 * 8.0 / 1e9 / seconds,
        sender_busy: sender_cpu / seconds,
        receiver_busy: receiver_cpu / seconds,
        cpu_s_per_gib: (sender_cpu + receiver_cpu) / (bytes as f64 / f64::from(1 << 30)),
    })
}

pub(crate) fn joined<T>(result: std::thread::Result<Result<T>>) -> Result<T> {
    result.unwrap_or_else(|_| failure("a thread of the measurement panicked"))
}

/// Both ends of a connection over the loopback address.
pub(crate) fn connection() -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0").context(|| "listening on 127.0.0.1")?;
    let outgoing = TcpStream::connect(listener.local_addr()?).context(|| "connecting")?;
    let (incoming, _) = listener.accept().context(|| "accepting")?;
    setsockopt(&outgoing, sockopt::TcpCongestion, &CONGESTION.into()).context(|| {
        format!(
            "choosing congestion control {CONGESTION} (needs root, or its name in `sysctl \
                 net.ipv4.tcp_allowed_congestion_control`)"
        )
    })?;
    Ok((outgoing, incoming))
}

fn thread_cpu_s() -> Result<f64> {
    use nix::sys::resource::{UsageWho, getrusage};
    let usage = getrusage(UsageWho::RUSAGE_THREAD).context(|| "getrusage")?;
    let seconds =
        |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

fn report(options: &Options, machine: Machine, floor: &Floor) -> Report {
    let figures = floor.figures();
    let mut table = Table::new(&[
        "receive into",
        "zeroes",
        "send by",
        "Gbit/s",
        "min",
        "max",
        "sender busy",
        "receiver busy",
        "CPU s/GiB",
    ]);
    for figure in &figures {
        table.row(vec![
            figure.way.receive.name(figure.way.pages),
            format!("{} %", figure.way.zero_percent),
            figure.way.send.name().into(),
            format!("{:.1}", figure.gbps.median),
            format!("{:.1}", figure.gbps.min),
            format!("{:.1}", figure.gbps.max),
            format!("{:.0} %", figure.sender_busy.median * 100.0),
            format!("{:.0} %", figure.receiver_busy.median * 100.0),
            format!("{:.2}", figure.cpu_s_per_gib.median),
        ]);
    }
    let mut method = format!(
        "{} MiB from a filled memory file over one loopback TCP connection ({CONGESTION}) into fresh \
         memory; the file has 4 KiB pages for memory of 4 KiB pages, huge tmpfs pages for all other. \
         Sender and receiver are one thread each on a core of its own, with plain blocking system \
         calls of up to 1 MiB (256 or 64 KiB through a hot buffer, 2 MiB for 2 MiB pages). Anonymous and \
         private memory is registered with a userfaultfd; private memory is copied for the guest by \
         UFFDIO_CONTINUE, MADV_POPULATE_WRITE and the release of the file's copy. Where there are \
         zero pages the sender checks every page and sends only the others. Every way takes its \
         turn in each of {} rounds, where memory is filled after as much has been written and freed. \
         Gbit/s is the median of the rounds, from the start of both threads to the last byte \
         received (private: owned); what arrived is checked after the clock has stopped. Busy is a \
         thread's processor time over the run's; CPU is that of both threads.",
        options.size, options.rounds
    );
    let best: Vec<Figure> = floor
        .kinds
        .iter()
        .flat_map(|&pages| options.zero.0.iter().filter_map(move |&zero| floor.best(pages, zero)))
        .collect();
    for left_out in &floor.left_out {
        method += &format!(" Left out: {left_out}.");
    }
    Report {
        what: "floor",
        machine,
        method,
        highlights: Vec::new(),
        tables: vec![table],
        plots: Vec::new(),
        value: json!({
            "size_mib": options.size,
            "rounds": options.rounds,
            "congestion": CONGESTION,
            "figures": figures,
            "best": best,
            "left_out": floor.left_out,
        }),
    }
}
