//! The command line. Each subcommand's options become the options of the module that runs it.

use std::path::PathBuf;
use std::time::Duration;

use argh::{ArgsInfo, FromArgs};

use crate::error::{Error, Result};
use crate::host::command::RamPath;
use crate::host::guest::Memory;
use crate::memory::kind::Kind;
use crate::uri::Uri;
use crate::{bench, demo, destination, doctor, host, install, single, source};

/// Moves a running guest's memory after the guest: postcopy live migration over userfaultfd, shared
/// memory and io_uring.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    example = "See a guest move on this machine:\n  {command_name} demo",
    example = "Receive a QEMU guest, on the destination:\n  {command_name} incoming tcp::4444 -- \
               qemu-system-x86_64 -m 2G -machine memory-backend=ram0 \\\n    -object \
               memory-backend-file,id=ram0,size=2G,share=on,mem-path=/dev/shm/guest …",
    example = "Move it there, on the source:\n  {command_name} migrate -p --qmp /run/qmp.sock \
               tcp:DESTINATION:4444"
)]
struct Arguments {
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand)]
enum Command {
    Demo(Demo),
    Incoming(Incoming),
    Migrate(Migrate),
    Doctor(Doctor),
    Bench(Bench),
    Guest(Guest),
    Man(Man),
    Completions(Completions),
    Version(Version),
}

/// Move a guest of umem's own between processes on this machine, and check every page of it.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "demo")]
struct Demo {
    /// the guest's RAM, MiB (default 512)
    #[argh(option, default = "512")]
    size: u64,
    /// memory kind at the destination: shared (the default), private or anonymous
    #[argh(option, default = "Kind::Shared")]
    kind: Kind,
    /// passed on to umem incoming: 1 to have pages touched and their copies released, 0 not to
    #[argh(option)]
    postcopy_flags: Option<PostcopyFlags>,
    /// parts of anonymous memory that have a userfaultfd each (default 1)
    #[argh(option, default = "1")]
    shards: usize,
    /// anonymous memory of 2 MiB pages, from the kernel's hugetlb pool
    #[argh(switch)]
    huge: bool,
    /// the guest that arrives discards pages too, as one with a balloon does
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
    /// send everything before the guest is switched over, to compare with
    #[argh(switch)]
    precopy: bool,
    /// what the guest's memory is derived from (default: a new one each time, printed)
    #[argh(option)]
    seed: Option<u64>,
    /// print JSON objects, the last of them the report
    #[argh(switch)]
    json: bool,
}

/// Receive a guest: listen at URI, start COMMAND (its monitor), fill its memory.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "incoming",
    note = "URI is where to listen, tcp:HOST:PORT or unix:PATH, or one connection that is there \
            already: fd:N, an inherited stream socket, or exec:CMD, whose standard input and output \
            lead to the source (run by /bin/sh). A socket fd:N that listens, such as systemd's fd:3, \
            is listened at. COMMAND is a QEMU whose RAM is a \
            memory-backend-file with share=on (--kind private: share=off), or another monitor that \
            maps the files named with --ram. umem adds -incoming and a QMP socket to a QEMU's \
            options itself.",
    example = "Serve a Firecracker that restores a snapshot, whose memory file the source has:\n  \
               {command_name} --handoff /run/uffd.sock tcp::4444",
    example = "Receive a QEMU guest:\n  {command_name} tcp::4444 -- qemu-system-x86_64 -m 2G \
               -machine memory-backend=ram0 \\\n    -object \
               memory-backend-file,id=ram0,size=2G,share=on,mem-path=/dev/shm/guest",
    error_code(1, "The guest did not arrive, or not whole; stderr says why."),
    error_code(2, "The command line is wrong.")
)]
struct Incoming {
    /// how the guest maps its memory: shared (the default) or private; anonymous memory says so
    /// itself, see --handoff
    #[argh(option, default = "Kind::Shared")]
    kind: Kind,
    /// kind private: 1 has the guest side touch pages as they come, so that the file's copies can be
    /// released; 0 leaves that to the guest's own accesses until the end (default 0)
    #[argh(option, default = "PostcopyFlags(0)")]
    postcopy_flags: PostcopyFlags,
    /// a unix socket to make, where the guest's process hands over its memory itself, as Firecracker
    /// does; COMMAND may be left out then
    #[argh(option)]
    handoff: Option<PathBuf>,
    /// a RAM file of the guest, NAME=PATH; repeat for more (default: read from a QEMU's options)
    #[argh(option)]
    ram: Vec<RamPath>,
    /// the monitor's QMP socket (default: one that umem gives a QEMU)
    #[argh(option)]
    qmp: Option<PathBuf>,
    /// bulk lanes that a source may open at most (default 16; none with fd: and exec:)
    #[argh(option)]
    lanes: Option<u16>,
    /// cores for the demand lane and the bulk lanes, such as 0,2,3 (default: chosen)
    #[argh(option, default = "CoreList::default()")]
    cores: CoreList,
    /// a preload object to use in place of the built-in one
    #[argh(option)]
    preload: Option<PathBuf>,
    /// show no progress
    #[argh(switch, short = 'q')]
    quiet: bool,
    /// print JSON objects, the last of them the report
    #[argh(switch)]
    json: bool,
    /// tcp:HOST:PORT or unix:PATH to listen at, or fd:N or exec:CMD
    #[argh(positional)]
    uri: Uri,
    /// the guest's monitor and its arguments, after --
    #[argh(positional, greedy)]
    command: Vec<String>,
}

/// Move a guest away: stop it, switch over to the `umem incoming` at URI, send its memory.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "migrate",
    note = "URI is where `umem incoming` listens, tcp:HOST:PORT or unix:PATH, or one connection to \
            it, over which everything goes: fd:N, an inherited stream socket, or exec:CMD, whose \
            standard input and output lead there (run by /bin/sh). Until the switchover any failure, and Ctrl-C, leave \
            the guest running here; after it the guest never runs here again. With -n, Ctrl-C \
            sends the rest.",
    example = "{command_name} -p --qmp /run/qmp.sock tcp:DESTINATION:4444",
    error_code(1, "The guest did not move, or not whole; stderr says why."),
    error_code(2, "The command line is wrong.")
)]
struct Migrate {
    /// postcopy: switch over first and send pages after (default: send all before)
    #[argh(switch, short = 'p')]
    postcopy: bool,
    /// send no page that was not asked for, to measure (needs -p)
    #[argh(switch, short = 'n')]
    no_background: bool,
    /// a RAM file of the guest, NAME=PATH; repeat for more (default: asked of the monitor)
    #[argh(option)]
    ram: Vec<RamPath>,
    /// the monitor's QMP socket
    #[argh(option)]
    qmp: Option<PathBuf>,
    /// bulk lanes, connections that carry pages in the background (default 1; none with fd: and
    /// exec:)
    #[argh(option)]
    lanes: Option<u16>,
    /// free the guest's RAM here as it arrives there, from the switchover on; afterwards it is gone
    /// here, so that the guest's process here can only be ended
    #[argh(switch)]
    release_ram: bool,
    /// cores for the demand lane and the bulk lanes, such as 0,2,3 (default: chosen)
    #[argh(option, default = "CoreList::default()")]
    cores: CoreList,
    /// show no progress
    #[argh(switch, short = 'q')]
    quiet: bool,
    /// print JSON objects, the last of them the report
    #[argh(switch)]
    json: bool,
    /// tcp:HOST:PORT, unix:PATH, fd:N or exec:CMD
    #[argh(positional)]
    uri: Uri,
}

/// Say what this machine has of what umem needs, and what to do about the rest.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "doctor",
    note = "Each line says ok, warning (umem works, but slower or not for every guest) or missing, what \
            there is, and what it is for; below it is a command that mends it. It speaks of the user \
            who runs it: of both sides, so that a source may do without userfaultfd. What sysctl, \
            mount and setfacl set lasts until the next boot.",
    error_code(0, "umem can work here; there may be warnings."),
    error_code(1, "Something is missing that umem needs.")
)]
struct Doctor {
    /// print JSON objects, one for each thing and a last one with the verdict
    #[argh(switch)]
    json: bool,
}

/// Measure what a link gives for pages: a server here, a client there.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "bench")]
struct Bench {
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
            its memory: use it on networks where you trust every host.",
    error_code(1, "With -1: the test failed; stderr says why. Else: interrupted in a test."),
    error_code(2, "The command line is wrong.")
)]
struct BenchServer {
    /// the port to listen on, 0 for any (default 5202)
    #[argh(option, short = 'p', default = "bench::PORT")]
    port: u16,
    /// end after one test
    #[argh(switch, short = '1')]
    one_off: bool,
    /// cores of the lanes, such as 2 or 2,3 (default: chosen)
    #[argh(option, short = 'A', default = "CoreList::default()")]
    affinity: CoreList,
    /// print a JSON object for each test
    #[argh(switch, short = 'J')]
    json: bool,
    /// where to listen, tcp:HOST:PORT or unix:PATH (default: every IPv4 address)
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
    /// print one JSON object, with iperf3's names
    #[argh(switch, short = 'J')]
    json: bool,
    /// pages of 4K (the default) or 2M, which takes root on both sides
    #[argh(option, default = "bench::PageKind::Small")]
    page_size: bench::PageKind,
    /// pages that hold zeroes, percent (default 0)
    #[argh(option, default = "0")]
    zero_percent: u32,
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

/// The demo's guest: fills memory, reads and writes it, checks every word. Started by `umem demo`.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "guest")]
struct Guest {
    /// the socket to make for its monitor
    #[argh(option)]
    qmp: PathBuf,
    /// its RAM, NAME=PATH; NAME alone for anonymous memory
    #[argh(option)]
    ram: String,
    /// size of its RAM, MiB
    #[argh(option)]
    size: u64,
    /// wait for a guest to come
    #[argh(switch)]
    incoming: bool,
    /// memory kind of a guest that waits: shared (the default), private or anonymous
    #[argh(option, default = "Kind::Shared")]
    kind: Kind,
    /// where umem incoming takes anonymous memory over
    #[argh(option)]
    handoff: Option<PathBuf>,
    /// parts of anonymous memory that have a userfaultfd each (default 1)
    #[argh(option, default = "1")]
    shards: usize,
    /// anonymous memory of 2 MiB pages, from the kernel's hugetlb pool
    #[argh(switch)]
    huge: bool,
    /// a guest that has come discards pages too, as one with a balloon does
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
    /// what its memory is derived from (default 1)
    #[argh(option, default = "1")]
    seed: u64,
}

/// Print a page of the manual in roff.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "man",
    example = "Read about umem migrate:\n  {command_name} migrate | man -l -"
)]
struct Man {
    /// the command that the page is about (default: umem as a whole)
    #[argh(positional)]
    command: Option<String>,
}

/// Print what a shell needs to complete umem's commands and options.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "completions",
    example = "In a bash that runs:\n  source <({command_name} bash)"
)]
struct Completions {
    /// bash, zsh or fish
    #[argh(positional)]
    shell: install::Shell,
}

/// Print umem's version and the protocol's.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "version")]
struct Version {}

/// The RFC's `-postcopy-flags`.
#[derive(Clone, Copy)]
struct PostcopyFlags(u8);

impl std::str::FromStr for PostcopyFlags {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<PostcopyFlags, String> {
        match text {
            "0" => Ok(PostcopyFlags(0)),
            "1" => Ok(PostcopyFlags(1)),
            _ => Err(format!("0 or 1 (touch requests), not {text:?}")),
        }
    }
}

/// Bytes, as `1500`, `64K` or `10G`.
#[derive(Clone, Copy)]
struct Size(u64);

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Size, String> {
        let shifts = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];
        let unit = shifts.iter().find(|(unit, _)| text.to_ascii_uppercase().ends_with(*unit));
        let (digits, shift) =
            unit.map_or((text, 0), |(_, shift)| (&text[..text.len() - 1], *shift));
        let bytes = digits.parse::<u64>().ok().and_then(|count| count.checked_mul(1 << shift));
        bytes.map(Size).ok_or_else(|| format!("write a size such as 512M or 10G, not {text:?}"))
    }
}

/// `0,2,3`
#[derive(Default)]
struct CoreList(Vec<usize>);

impl std::str::FromStr for CoreList {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<CoreList, String> {
        let available: Vec<usize> =
            core_affinity::get_core_ids().unwrap_or_default().iter().map(|core| core.id).collect();
        let cores: std::result::Result<Vec<usize>, _> = text.split(',').map(str::parse).collect();
        let cores = cores.map_err(|_| format!("write core numbers such as 0,2,3, not {text:?}"))?;
        match cores.iter().find(|core| !available.contains(core)) {
            Some(core) => {
                Err(format!("core {core} is not one of those umem may use: {available:?}"))
            }
            None => Ok(CoreList(cores)),
        }
    }
}

/// Runs the command line; the value is the process's exit status.
pub fn main() -> i32 {
    let strings: Vec<String> =
        std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = strings.iter().map(String::as_str).collect();
    let json = words.contains(&"--json");
    let (name, rest) = words.split_first().map_or(("umem", &[][..]), |(_, rest)| ("umem", rest));
    let arguments = match Arguments::from_args(&[name], rest) {
        Ok(arguments) => arguments,
        Err(exit) => return early_exit(&exit),
    };
    let result = crate::inbox::block_signals().and_then(|()| run(arguments.command));
    match result {
        Ok(status) => status,
        Err(error) => {
            crate::report::Output::new(json).failed(&error);
            error.exit_status()
        }
    }
}

/// Help on stdout; a wrong command line is one line on stderr that says where help is.
fn early_exit(exit: &argh::EarlyExit) -> i32 {
    if exit.status.is_ok() {
        println!("{}", exit.output);
        return 0;
    }
    let lines: Vec<&str> =
        exit.output.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    eprintln!("umem: {} (`umem --help` and `umem COMMAND --help` explain)", lines.join(" "));
    2
}

fn run(command: Command) -> Result<i32> {
    match command {
        Command::Demo(demo) => demo.run(),
        Command::Incoming(incoming) => incoming.run(),
        Command::Migrate(migrate) => migrate.run(),
        Command::Doctor(doctor) => Ok(doctor::run(doctor.json)),
        Command::Guest(guest) => guest.run(),
        Command::Man(man) => man.run(),
        Command::Completions(completions) => {
            print!("{}", install::completions(completions.shell, &Arguments::get_args_info()));
            Ok(0)
        }
        Command::Bench(Bench { command: BenchCommand::Server(server) }) => server.run(),
        Command::Bench(Bench { command: BenchCommand::Client(client) }) => client.run(),
        Command::Version(_) => {
            let protocol = umem_wire::PROTOCOL;
            println!("umem {} (protocol {protocol})", env!("CARGO_PKG_VERSION"));
            Ok(0)
        }
    }
}

fn check_percent(name: &str, percent: u32) -> Result<()> {
    if percent <= 100 {
        return Ok(());
    }
    Err(Error::Usage(format!("--{name} is a share of 100, not {percent}")))
}

fn check_lanes(lanes: u16) -> Result<()> {
    if (1..=umem_wire::limits::LANES_MAX).contains(&lanes) {
        return Ok(());
    }
    Err(Error::Usage(format!("--lanes is 1 to {}, not {lanes}", umem_wire::limits::LANES_MAX)))
}

/// The number of bulk lanes: what was asked for, or the default; none on a single connection.
fn lanes_to(uri: &Uri, asked: Option<u16>, default: u16) -> Result<u16> {
    match asked {
        Some(_) if uri.is_one_connection() => Err(Error::Usage(format!(
            "--lanes: {uri} is one connection, which all pages share; leave it out, or use tcp: or \
             unix:"
        ))),
        None if uri.is_one_connection() => Ok(0),
        asked => several_lanes(asked, default),
    }
}

fn several_lanes(asked: Option<u16>, default: u16) -> Result<u16> {
    let lanes = asked.unwrap_or(default);
    check_lanes(lanes)?;
    Ok(lanes)
}

impl Demo {
    fn run(self) -> Result<i32> {
        if self.kind != Kind::Anonymous && (self.shards != 1 || self.huge) {
            return Err(Error::Usage(
                "--shards and --huge are for anonymous memory: add --kind anonymous".into(),
            ));
        }
        if self.kind != Kind::Private && self.postcopy_flags.is_some_and(|flags| flags.0 != 0) {
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
        if self.size == 0 || self.threads == 0 {
            return Err(Error::Usage("--size and --threads are at least 1".into()));
        }
        demo::run(&demo::Options {
            size_mib: self.size,
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
            postcopy: !self.precopy,
            seed: self.seed,
            json: self.json,
        })
    }
}

impl Incoming {
    fn run(self) -> Result<i32> {
        let lanes_max = match single::is_listening(&self.uri) {
            true => several_lanes(self.lanes, 16)?,
            false => lanes_to(&self.uri, self.lanes, 16)?,
        };
        if self.kind == Kind::Anonymous && self.handoff.is_none() {
            return Err(Error::Usage(
                "--kind anonymous needs --handoff SOCK: anonymous memory has no file, so that its \
                 owner has to hand it over itself"
                    .into(),
            ));
        }
        if self.kind == Kind::Private && self.handoff.is_some() {
            return Err(Error::Usage(
                "--kind private is for memory that COMMAND maps under umem's eyes: leave out \
                 --handoff"
                    .into(),
            ));
        }
        if self.postcopy_flags.0 != 0 && self.kind != Kind::Private {
            return Err(Error::Usage(
                "--postcopy-flags 1 asks for touches, which only --kind private has a use for"
                    .into(),
            ));
        }
        // argh keeps the -- that separates COMMAND.
        let mut command = self.command;
        if command.first().is_some_and(|word| word == "--") {
            command.remove(0);
        }
        destination::run(&destination::Options {
            uri: self.uri,
            ram: self.ram,
            kind: self.kind,
            touch: self.postcopy_flags.0 == 1,
            handoff: self.handoff,
            qmp: self.qmp,
            lanes_max,
            cores: self.cores.0,
            preload: self.preload,
            json: self.json,
            quiet: self.quiet,
            command,
        })
    }
}

impl Migrate {
    fn run(self) -> Result<i32> {
        let lanes = lanes_to(&self.uri, self.lanes, 1)?;
        doctor::limits::check(lanes)?;
        if self.no_background && !self.postcopy {
            return Err(Error::Usage("-n only makes sense with -p: write -p -n".into()));
        }
        source::run(&source::Options {
            uri: self.uri,
            postcopy: self.postcopy,
            background: !self.no_background,
            ram: self.ram,
            qmp: self.qmp,
            lanes,
            release_ram: self.release_ram,
            cores: self.cores.0,
            json: self.json,
            quiet: self.quiet,
        })?;
        Ok(0)
    }
}

impl Man {
    fn run(self) -> Result<i32> {
        let umem = Arguments::get_args_info();
        let Some(page) = install::manual::page(&umem, self.command.as_deref()) else {
            let names: Vec<&str> = umem.commands.iter().map(|sub| sub.name).collect();
            return Err(Error::Usage(format!("the commands are {}", names.join(", "))));
        };
        print!("{page}");
        Ok(0)
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
        let (one_off, cores, json) = (self.one_off, self.affinity.0, self.json);
        bench::run_server(&bench::Server { uri, one_off, cores, json })?;
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
        let test = bench::Test {
            lanes: self.parallel,
            bytes: self.bytes.map(|size| size.0),
            reverse: self.reverse,
            discard: self.discard,
            pages: self.page_size,
            zero_percent: self.zero_percent,
            verify: self.verify,
            congestion: self.congestion,
            region_bytes: self.pass_size.0,
        };
        test.check().map_err(Error::Usage)?;
        let duration = self.bytes.is_none().then(|| Duration::from_secs_f64(seconds));
        bench::run_client(&bench::Client {
            uri,
            test,
            duration,
            omit: Duration::from_secs_f64(self.omit),
            interval: (self.interval != 0.0).then(|| Duration::from_secs_f64(self.interval)),
            cores: self.affinity.0,
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

impl Guest {
    fn run(self) -> Result<i32> {
        let memory = self.memory()?;
        // The guest ends by its monitor's quit, or as any process does.
        crate::inbox::unblock_signals().map_err(|errno| Error::System {
            what: "unblocking signals".into(),
            source: errno.into(),
        })?;
        host::guest::run(&host::guest::Options {
            qmp: self.qmp,
            memory,
            size_mib: self.size,
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
        if !self.incoming && (self.kind != Kind::Shared || self.discard) {
            return usage("--kind and --discard are for a guest that waits: add --incoming");
        }
        if self.kind != Kind::Anonymous {
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
