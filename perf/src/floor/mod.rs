//! `floor`: what this kernel gives a page stream at best, without any protocol or page states.
//!
//! One thread sends a filled memory file over loopback TCP, another receives it into memory of each
//! kind, with plain system calls and a core each.

mod receive;
mod send;

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use argh::FromArgs;
use nix::sys::socket::{setsockopt, sockopt};
use serde::Serialize;
use serde_json::json;

use crate::error::{Context, Result, failure, usage};
use crate::interrupt;
use crate::machine::{Machine, pin, two_cores};
use crate::memory::{HUGE_PAGE_BYTES, List, Mapping, PAGE_BYTES, Pages, Pool};
use crate::report::{Report, Table, progress};
use crate::statistics::Spread;

pub(crate) use receive::Receive;
use receive::Target;
pub(crate) use send::Send;

/// What the kernel gives without protocol: a memory file → loopback TCP → fresh memory of each kind.
#[derive(FromArgs)]
#[argh(subcommand, name = "floor")]
pub(crate) struct Options {
    /// what each run moves, MiB (default 1024)
    #[argh(option, default = "1024")]
    size: usize,
    /// how often each way has its turn (default 3)
    #[argh(option, default = "3")]
    rounds: usize,
    /// kinds of memory with commas between them (default: all): memfd, huge-tmpfs, hugetlb,
    /// anonymous, anonymous-huge, private
    #[argh(option)]
    into: Option<List<Pages>>,
    /// print one JSON object
    #[argh(switch)]
    json: bool,
}

/// The lanes' congestion control; the system's own may be slower on a short path.
const CONGESTION: &str = "cubic";

/// One way from a memory file into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Way {
    /// What is filled; see [`Pages::source`] for what is sent.
    pub(crate) pages: Pages,
    pub(crate) send: Send,
    pub(crate) receive: Receive,
}

/// What one run gave.
#[derive(Clone, Copy, Debug)]
struct Run {
    gbps: f64,
    /// Processor time of either end as a share of the run.
    sender_busy: f64,
    receiver_busy: f64,
    /// Processor seconds of both threads for each GiB: moves less than Gbit/s when others compute.
    cpu_s_per_gib: f64,
}

/// A way's figures over all rounds.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    #[serde(flatten)]
    pub(crate) way: Way,
    pub(crate) gbps: Spread,
    sender_busy: Spread,
    receiver_busy: Spread,
    cpu_s_per_gib: Spread,
}

/// The ways into memory of one page kind; [`Receive::Discard`] is into none.
pub(crate) fn ways(pages: Pages) -> Vec<Way> {
    let receives: &[Receive] = match pages {
        Pages::Memfd => &[Receive::Discard, Receive::Map, Receive::Write, Receive::Splice],
        Pages::HugeTmpfs => &[Receive::Discard, Receive::Map, Receive::Write],
        Pages::Hugetlb => &[Receive::Map],
        Pages::Anonymous | Pages::AnonymousHuge => &[Receive::Copy],
        Pages::Private => &[Receive::Own, Receive::OwnBeside],
    };
    let each = |&receive| [Send::Sendfile, Send::Mapping].map(|send| Way { pages, send, receive });
    receives.iter().flat_map(each).collect()
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if options.size == 0 || options.rounds == 0 {
        return usage("--size and --rounds are at least 1");
    }
    let machine = Machine::describe();
    let mut floor = Floor::new(options.size << 20, &chosen(options.into.as_ref()))?;
    for round in 1..=options.rounds {
        progress(&format!("round {round} of {}", options.rounds));
        floor.round()?;
    }
    report(options, machine, &floor).print(options.json);
    Ok(())
}

/// The kinds of memory that were asked for.
pub(crate) fn chosen(list: Option<&List<Pages>>) -> Vec<Pages> {
    list.map_or_else(|| Pages::ALL.to_vec(), |list| list.0.clone())
}

/// The files to send, and what has been measured.
pub(crate) struct Floor {
    bytes: usize,
    sources: Vec<(Pages, Source)>,
    runs: Vec<(Way, Vec<Run>)>,
    /// The kinds of memory that can be measured here.
    pub(crate) kinds: Vec<Pages>,
    /// What could not be measured here, and why.
    pub(crate) left_out: Vec<String>,
    /// Given back at the end.
    _pool: Option<Pool>,
}

/// A filled memory file and its mapping.
pub(crate) struct Source {
    file: File,
    mapping: Mapping,
}

impl Floor {
    /// For memory of these kinds, as far as they can be had here.
    pub(crate) fn new(bytes: usize, asked: &[Pages]) -> Result<Floor> {
        let (mut sources, mut left_out, mut kinds) = (Vec::new(), Vec::new(), Vec::new());
        let mut pool = None;
        for &pages in asked {
            if kinds.contains(&pages) {
                return usage(format!("--into names {} twice", pages.word()));
            }
            let possible = (|| {
                // Before the sources take the memory.
                if pages.is_from_pool() && pool.is_none() {
                    pool = Some(Pool::reserve(bytes.next_multiple_of(HUGE_PAGE_BYTES))?);
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
            if kinds.iter().any(|kind| kind.source() == pages) {
                let file = pages.file(bytes)?;
                let mapping = Mapping::of(&file, bytes)?;
                mapping.fill();
                sources.push((pages, Source { file, mapping }));
            }
        }
        let runs = kinds.iter().flat_map(|&pages| ways(pages)).map(|way| (way, Vec::new()));
        Ok(Floor { bytes, runs: runs.collect(), sources, kinds, left_out, _pool: pool })
    }

    /// Gives every way its turn.
    pub(crate) fn round(&mut self) -> Result<()> {
        let (sources, bytes) = (&self.sources, self.bytes);
        for (way, runs) in &mut self.runs {
            let source = sources.iter().find(|(pages, _)| *pages == way.pages.source());
            let (_, source) = source.ok_or("every way has its source")?;
            if way.receive != Receive::Discard {
                // Leaves the memory warm for the run that counts.
                once(*way, source, bytes)?;
            }
            runs.push(once(*way, source, bytes)?);
        }
        Ok(())
    }

    pub(crate) fn figures(&self) -> Vec<Figure> {
        let figure = |(way, runs): &(Way, Vec<Run>)| {
            let spread = |get: fn(&Run) -> f64| Spread::of(runs.iter().map(get).collect());
            Figure {
                way: *way,
                gbps: spread(|run| run.gbps),
                sender_busy: spread(|run| run.sender_busy),
                receiver_busy: spread(|run| run.receiver_busy),
                cpu_s_per_gib: spread(|run| run.cpu_s_per_gib),
            }
        };
        self.runs.iter().map(figure).collect()
    }

    /// The best way into memory of this kind.
    pub(crate) fn best(&self, pages: Pages) -> Option<Figure> {
        let figures = self.figures().into_iter();
        figures
            .filter(|figure| figure.way.pages == pages && figure.way.receive != Receive::Discard)
            .max_by(|a, b| a.gbps.median.total_cmp(&b.gbps.median))
    }
}

/// Moves the file once, and checks what arrived.
fn once(way: Way, source: &Source, bytes: usize) -> Result<Run> {
    interrupt::check()?;
    let [sender_core, receiver_core] = two_cores()?;
    let (outgoing, incoming) = connection()?;
    let target = Target::new(way.pages, bytes)?;
    let started = Instant::now();
    let (sender, receiver) = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            pin(sender_core)?;
            // The socket goes with the thread, so that the other one never waits for ever.
            way.send.all(&source.file, &source.mapping, outgoing, bytes)?;
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
        // One end's failure cuts off the other: both tell what they know.
        (Err(sender), Err(receiver)) => return failure(format!("{sender}; {receiver}")),
        (Err(error), Ok(_)) | (Ok(_), Err(error)) => return Err(error),
    };
    if way.receive != Receive::Discard
        && let Some(page) = target.mapping.first_wrong_page()
    {
        return failure(format!("page {page} arrived wrong ({way:?})"));
    }
    Ok(Run {
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
    setsockopt(&outgoing, sockopt::TcpCongestion, &CONGESTION.into())
        .context(|| format!("congestion control {CONGESTION}"))?;
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
         calls of up to 1 MiB (256 KiB through a hot buffer, 2 MiB for 2 MiB pages). Anonymous and \
         private memory is registered with a userfaultfd; private memory becomes the guest's own by \
         UFFDIO_CONTINUE, MADV_POPULATE_WRITE and the release of the file's copy. Every way takes its \
         turn in each of {} rounds, twice where memory is filled: the first run warms it, the second \
         counts. Gbit/s is the median of the rounds, from the start of both threads to the last byte \
         received (private: owned); what arrived is checked after the clock has stopped. Busy is a \
         thread's processor time over the run's; CPU is that of both threads.",
        options.size, options.rounds
    );
    let best: serde_json::Map<String, serde_json::Value> = floor
        .kinds
        .iter()
        .map(|&pages| (pages.word().replace('-', "_"), json!(floor.best(pages))))
        .collect();
    for left_out in &floor.left_out {
        method += &format!(" Left out: {left_out}.");
    }
    Report {
        what: "floor",
        machine,
        method,
        tables: vec![table],
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
