//! The programs that move the guest, and one move.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Result, failure};
use crate::memory::Pages;
use crate::process::{Cpu, Process, free_port};
use crate::qmp::Qmp;
use crate::scratch::{Scratch, SharedFile, warm_shared_memory};

use super::beats::{Beat, Latency, beats_in};
use super::guest::{Ram, Setup, Vm, check_arrived};

/// A move that takes longer than this never ends.
const PATIENCE: Duration = Duration::from_secs(300);

/// Bytes a second that no machine reaches: "no limit" for QEMU's parameters where 0 is not.
const NO_LIMIT: u64 = 1 << 40;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Subject {
    /// QEMU's postcopy with postcopy-preempt.
    Preempt(Ram),
    /// QEMU's postcopy without postcopy-preempt.
    Plain(Ram),
    /// umem, for RAM that is a file.
    Umem(Ram),
}

impl Ram {
    fn name(self) -> &'static str {
        match self {
            Ram::File => "file",
            Ram::HugeFile => "huge file",
            Ram::Private => "private",
        }
    }
}

/// The result of one move.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Move {
    pub(super) qemu_version: String,
    /// Command given → both sides have completed.
    pub(super) total_s: f64,
    /// Source stopped → both sides have completed.
    pub(super) drain_s: f64,
    /// Source stopped → destination running.
    pub(super) downtime_ms: f64,
    pub(super) latency: Latency,
    pub(super) cpu: Cpu,
    /// The beats of [`Latency`].
    beats: Vec<Beat>,
    /// The mover's own report.
    report: Value,
}

impl Subject {
    pub(super) fn name(self) -> String {
        match self {
            Subject::Preempt(ram) => format!("postcopy-preempt, {}", ram.name()),
            Subject::Plain(ram) => format!("plain postcopy, {}", ram.name()),
            Subject::Umem(ram) => format!("umem, {}", ram.name()),
        }
    }

    /// Its name in JSON.
    pub(super) fn key(self) -> String {
        let (mover, ram) = match self {
            Subject::Preempt(ram) => ("qemu_preempt", ram),
            Subject::Plain(ram) => ("qemu_plain", ram),
            Subject::Umem(ram) => ("umem", ram),
        };
        format!("{mover}_{}", ram.name().replace(' ', "_"))
    }

    /// Whether a peer's user would otherwise choose umem's RAM: of the same kind, or QEMU's
    /// default.
    pub(super) fn is_peer_of(self, umem: Ram) -> bool {
        match self {
            Subject::Preempt(ram) | Subject::Plain(ram) => ram == umem || ram == Ram::Private,
            Subject::Umem(_) => false,
        }
    }

    fn ram(self) -> Ram {
        match self {
            Subject::Preempt(ram) | Subject::Plain(ram) | Subject::Umem(ram) => ram,
        }
    }

    /// Starts a guest and moves it. Ends all processes that it started.
    pub(super) fn run(self, setup: &Setup) -> Result<Move> {
        let scratch = Scratch::new()?;
        // Dropped after the processes that use them.
        let places =
            [Place::of(self.ram(), setup, "source")?, Place::of(self.ram(), setup, "destination")?];
        let [here, there] = [places[0].path(), places[1].path()];
        let [here, there] = [here.as_path(), there.as_path()];
        match self {
            Subject::Preempt(ram) => by_qemu(setup, &scratch, ram, [here, there], true),
            Subject::Plain(ram) => by_qemu(setup, &scratch, ram, [here, there], false),
            Subject::Umem(ram) => by_umem(setup, &scratch, ram, [here, there]),
        }
    }
}

/// The place of a guest's RAM, if it is in a file, which dropping this removes.
enum Place {
    Shm(SharedFile),
    /// Only a descriptor of this process refers to it.
    Huge(File),
}

impl Place {
    fn of(ram: Ram, setup: &Setup, name: &str) -> Result<Place> {
        let bytes = usize::try_from(setup.size_mib << 20)?;
        Ok(match ram {
            Ram::HugeFile => Place::Huge(Pages::HugeTmpfs.file(bytes)?),
            Ram::File | Ram::Private => Place::Shm(SharedFile::named(name)),
        })
    }

    fn path(&self) -> PathBuf {
        match self {
            Place::Shm(file) => file.path().to_owned(),
            Place::Huge(file) => {
                format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
            }
        }
    }
}

fn by_qemu(
    setup: &Setup,
    scratch: &Scratch,
    ram: Ram,
    [here, there]: [&Path; 2],
    preempt: bool,
) -> Result<Move> {
    let mut source = Vm::source(setup, scratch, ram, here, &scratch.file("source.other"))?;
    source.settle()?;
    let mut destination = Vm::destination(setup, scratch, ram, there)?;
    let mut capabilities = vec!["postcopy-ram", "events"];
    capabilities.extend(preempt.then_some("postcopy-preempt"));
    source.qmp.set_capabilities(&capabilities)?;
    destination.qmp.set_capabilities(&capabilities)?;
    let unlimited = json!({ "max-bandwidth": NO_LIMIT, "max-postcopy-bandwidth": 0 });
    source.qmp.execute("migrate-set-parameters", &unlimited)?;
    let uri = json!({ "uri": format!("tcp:127.0.0.1:{}", free_port()?) });
    destination.qmp.execute("migrate-incoming", &uri)?;
    warm_up(setup, ram)?;

    let watch = Watch::begin(vec![source.pid(), destination.pid()]);
    source.qmp.execute("migrate", &uri)?;
    source.qmp.execute("migrate-start-postcopy", &json!({}))?;
    let ends = [source.qmp.migrated(PATIENCE)?.at_s, destination.qmp.migrated(PATIENCE)?.at_s];
    let ended = watch.end(ends, source.console(), destination.console());

    let report = json!({
        "source": source.qmp.execute("query-migrate", &json!({}))?,
        "destination": destination.qmp.execute("query-migrate", &json!({}))?,
    });
    check_arrived(destination.console(), ended.beats.len())?;
    ended.into_move(&mut source.qmp, &mut destination.qmp, report)
}

fn by_umem(setup: &Setup, scratch: &Scratch, ram: Ram, [here, there]: [&Path; 2]) -> Result<Move> {
    let for_umem = scratch.file("source.umem");
    let mut source = Vm::source(setup, scratch, ram, here, &for_umem)?;
    source.settle()?;
    let console = scratch.file("destination.console");
    let (mut incoming, uri, guest_pid, mut destination) =
        start_incoming(setup, scratch, (ram, there), &console)?;
    warm_up(setup, ram)?;

    let mut watch = Watch::begin(vec![source.pid(), guest_pid, incoming.pid()]);
    let mut arguments: Vec<OsString> = ["migrate", "-p", "--json", "--qmp"].map(Into::into).into();
    arguments.extend([for_umem.into(), uri.into()]);
    let log = scratch.file("migrate.log");
    let mut migrate = Process::start("umem migrate", &setup.umem, &arguments, log)?;
    watch.pids.push(migrate.pid());
    let (source_end, source_report) = migrate.event("completed", PATIENCE)?;
    let (destination_end, destination_report) = incoming.event("completed", PATIENCE)?;
    let ended = watch.end(
        [since_1970(source_end), since_1970(destination_end)],
        source.console(),
        &console,
    );

    let report = json!({ "source": source_report, "destination": destination_report });
    check_arrived(&console, ended.beats.len())?;
    ended.into_move(&mut source.qmp, &mut destination, report)
}

/// Warms as much memory as any mover takes, of the guest's kind: QEMU fills the destination's RAM
/// whole, and reading the holes of the source's shared RAM fills those too. Huge pages are made of
/// other memory than the memory that small pages have left.
fn warm_up(setup: &Setup, ram: Ram) -> Result<()> {
    let bytes = (2 * setup.size_mib) << 20;
    match ram {
        Ram::File | Ram::Private => warm_shared_memory(bytes),
        Ram::HugeFile => Pages::HugeTmpfs.warm(usize::try_from(bytes)?),
    }
}

/// Starts `umem incoming` with a QEMU: returns it, its address, QEMU's pid and a second monitor.
fn start_incoming(
    setup: &Setup,
    scratch: &Scratch,
    (ram, path): (Ram, &Path),
    console: &Path,
) -> Result<(Process, String, u32, Qmp)> {
    let monitor: PathBuf = scratch.file("destination.qmp");
    let mut arguments: Vec<OsString> =
        ["incoming", "--json", "tcp:127.0.0.1:0", "--"].map(Into::into).into();
    arguments.push(setup.qemu().into());
    arguments.extend(setup.arguments(ram, path, console, &[&monitor]));
    let log = scratch.file("incoming.log");
    let mut incoming = Process::start("umem incoming", &setup.umem, &arguments, log)?;
    let (_, listening) = incoming.event("listening", PATIENCE)?;
    let uri = listening["uri"].as_str().unwrap_or_default().to_owned();
    let guest_pid = listening["guest_pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    let guest_pid = guest_pid.ok_or("umem incoming does not report its QEMU's pid")?;
    Ok((incoming, uri, guest_pid, Qmp::connect(&monitor)?))
}

/// A move in progress.
struct Watch {
    /// The processes whose processor time counts. A process added later counts from its start.
    pids: Vec<u32>,
    began_s: f64,
    cpu: Cpu,
}

/// A move at its end.
struct Ended {
    began_s: f64,
    ended_s: f64,
    cpu: Cpu,
    /// At the source.
    beats_before: Vec<Beat>,
    /// At the destination.
    beats: Vec<Beat>,
}

impl Watch {
    fn begin(pids: Vec<u32>) -> Watch {
        let cpu = Cpu::of_all(&pids);
        Watch { pids, began_s: since_1970(SystemTime::now()), cpu }
    }

    fn end(self, ends_s: [f64; 2], source: &Path, destination: &Path) -> Ended {
        Ended {
            began_s: self.began_s,
            ended_s: ends_s[0].max(ends_s[1]),
            cpu: Cpu::of_all(&self.pids).since(self.cpu),
            beats: beats_in(destination),
            beats_before: beats_in(source),
        }
    }
}

impl Ended {
    fn into_move(self, source: &mut Qmp, destination: &mut Qmp, report: Value) -> Result<Move> {
        let stopped_s = source.event("STOP", PATIENCE)?.at_s;
        let running_s = destination.event("RESUME", PATIENCE)?.at_s;
        if stopped_s < self.began_s || running_s < stopped_s || self.ended_s < running_s {
            return failure("a QEMU's events are out of order: was the clock set during the move?");
        }
        Ok(Move {
            qemu_version: source.version.clone(),
            total_s: self.ended_s - self.began_s,
            drain_s: self.ended_s - stopped_s,
            downtime_ms: (running_s - stopped_s) * 1e3,
            latency: Latency::of(&self.beats_before, &self.beats),
            cpu: self.cpu,
            beats: self.beats,
            report,
        })
    }
}

fn since_1970(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
