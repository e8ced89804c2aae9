//! One move of the guest.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Result, failure};
use crate::link::{Carried, Traffic};
use crate::memory::Pages;
use crate::migration::words;
use crate::process::{Cpu, Process, free_port};
use crate::qmp::Qmp;
use crate::scratch::{Scratch, SharedFile, warm_shared_memory};

use super::beats::{Beat, Latency, Lost, beats_in};
use super::guest::{Console, End, Ram, Setup, Vm};
use super::mover::{Mover, Qemu, Subject, Umem};

/// A move that takes longer than this never ends.
const PATIENCE: Duration = Duration::from_secs(300);

/// Bytes a second that no machine reaches: "no limit" for QEMU's parameters where 0 is not.
const NO_LIMIT: u64 = 1 << 40;

/// How long a guest may stand still after passes: the default of umem's and of QEMU's.
pub(super) const DOWNTIME_LIMIT_MS: u32 = 300;

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
    pub(super) work_lost: Lost,
    /// Pages that the destination has asked for.
    pub(super) faults: u64,
    /// Bytes that the mover has sent, by its own report: umem's of page contents, QEMU's of its stream's RAM.
    pub(super) sent_bytes: f64,
    /// What the link carried, if there is one.
    pub(super) traffic: Option<Traffic>,
    pub(super) cpu: Cpu,
    /// The beats of [`Latency`].
    beats: Vec<Beat>,
    /// The mover's own report.
    report: Value,
}

impl Subject {
    /// Starts a guest and moves it. None if the mover's passes have not come to an end within the
    /// setup's limit. Ends all processes that it started.
    pub(super) fn run(self, setup: &Setup<'_>) -> Result<Option<Move>> {
        let scratch = Scratch::new()?;
        // Dropped after the processes that use them.
        let places =
            [Place::of(self.ram, setup, "source")?, Place::of(self.ram, setup, "destination")?];
        let [here, there] = [places[0].path(), places[1].path()];
        let paths = [here.as_path(), there.as_path()];
        match self.mover {
            Mover::Qemu(qemu) => by_qemu(setup, &scratch, self.ram, paths, qemu),
            Mover::Umem(umem) => by_umem(setup, &scratch, self.ram, paths, umem).map(Some),
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
    fn of(ram: Ram, setup: &Setup<'_>, name: &str) -> Result<Place> {
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
    setup: &Setup<'_>,
    scratch: &Scratch,
    ram: Ram,
    [here, there]: [&Path; 2],
    way: Qemu,
) -> Result<Option<Move>> {
    let mut source = Vm::source(setup, scratch, ram, here, &scratch.file("source.other"))?;
    source.settle()?;
    let mut destination = Vm::destination(setup, scratch, ram, there)?;
    source.qmp.set_capabilities(way.capabilities())?;
    destination.qmp.set_capabilities(way.capabilities())?;
    let unlimited = json!({
        "max-bandwidth": NO_LIMIT,
        "max-postcopy-bandwidth": 0,
        "downtime-limit": DOWNTIME_LIMIT_MS,
    });
    source.qmp.execute("migrate-set-parameters", &unlimited)?;
    let uri = json!({ "uri": format!("tcp:{}:{}", setup.address(), free_port()?) });
    destination.qmp.execute("migrate-incoming", &uri)?;
    warm_up(setup, ram)?;

    let watch = Watch::begin(setup, &source, vec![source.pid(), destination.pid()]);
    source.qmp.execute("migrate", &uri)?;
    match way {
        Qemu::Precopy | Qemu::Multifd => {}
        Qemu::Preempt | Qemu::Plain => start_postcopy(&mut source.qmp)?,
        Qemu::Hybrid => {
            // Its first pass is over when the second one begins.
            source.qmp.pass(2, PATIENCE)?;
            start_postcopy(&mut source.qmp)?;
        }
    }
    let limit = setup.limit.filter(|_| way.has_to_converge()).unwrap_or(PATIENCE);
    let Some(source_end) = source.qmp.migrated_within(limit)? else {
        if !way.has_to_converge() {
            return failure("QEMU's migration does not end");
        }
        source.qmp.execute("migrate_cancel", &json!({}))?;
        return Ok(None);
    };
    let ends = [source_end.at_s, destination.qmp.migrated(PATIENCE)?.at_s];
    let ended = watch.end(ends, &source, &destination.console)?;

    let of_source = source.qmp.execute("query-migrate", &json!({}))?;
    let count = |name: &str| of_source["ram"][name].as_u64().unwrap_or(0);
    let figures = Figures {
        faults: count("postcopy-requests"),
        sent_bytes: count("transferred") as f64,
        report: json!({
            "source": of_source,
            "destination": destination.qmp.execute("query-migrate", &json!({}))?,
        }),
    };
    destination.console.check_memory(setup)?;
    ended.into_move(&mut source.qmp, &mut destination.qmp, figures).map(Some)
}

fn start_postcopy(source: &mut Qmp) -> Result<()> {
    source.execute("migrate-start-postcopy", &json!({})).map(drop)
}

fn by_umem(
    setup: &Setup<'_>,
    scratch: &Scratch,
    ram: Ram,
    [here, there]: [&Path; 2],
    mode: Umem,
) -> Result<Move> {
    let for_umem = scratch.file("source.umem");
    let mut source = Vm::source(setup, scratch, ram, here, &for_umem)?;
    source.settle()?;
    let console = Console::of(End::Destination, scratch);
    let (mut incoming, uri, guest_pid, mut destination) =
        start_incoming(setup, scratch, (ram, there), &console)?;
    warm_up(setup, ram)?;

    let mut watch = Watch::begin(setup, &source, vec![source.pid(), guest_pid, incoming.pid()]);
    let mut arguments = words(&["migrate", "--json"]);
    arguments.extend(words(mode.options()));
    arguments.extend(["--qmp".into(), for_umem.into(), uri.into()]);
    let log = scratch.file("migrate.log");
    let mut migrate = setup.start(End::Source, "umem migrate", setup.umem, &arguments, log)?;
    watch.pids.push(migrate.pid());
    let (source_end, of_source) = migrate.event("completed", PATIENCE)?;
    let (destination_end, of_destination) = incoming.event("completed", PATIENCE)?;
    let ends = [since_1970(source_end), since_1970(destination_end)];
    let ended = watch.end(ends, &source, &console)?;

    let figures = Figures {
        // Also those of pages that were on their way, which are no demanded pages.
        faults: of_destination["fault_latency_us"]["count"].as_u64().unwrap_or(0),
        sent_bytes: umem_sent_bytes(&of_source),
        report: json!({ "source": of_source, "destination": of_destination }),
    };
    console.check_memory(setup)?;
    ended.into_move(&mut source.qmp, &mut destination, figures)
}

/// Page contents, counted each time they crossed: by the source's rate and its time.
fn umem_sent_bytes(report: &Value) -> f64 {
    let number = |name: &str| report[name].as_f64().unwrap_or(f64::NAN);
    if number("precopy_bytes") > 0.0 {
        number("gbps") / 8e-9 * (number("precopy_s") + number("total_s"))
    } else {
        number("data_bytes")
    }
}

/// Warms as much memory as any mover takes, of the guest's kind: QEMU fills the destination's RAM
/// whole, and reading the holes of the source's shared RAM fills those too. Huge pages are made of
/// other memory than the memory that small pages have left.
fn warm_up(setup: &Setup<'_>, ram: Ram) -> Result<()> {
    let bytes = (2 * setup.size_mib) << 20;
    match ram {
        Ram::File | Ram::Private => warm_shared_memory(bytes),
        Ram::HugeFile => Pages::HugeTmpfs.warm(usize::try_from(bytes)?),
    }
}

/// Starts `umem incoming` with a QEMU: returns it, its address, QEMU's pid and a second monitor.
fn start_incoming(
    setup: &Setup<'_>,
    scratch: &Scratch,
    (ram, path): (Ram, &Path),
    console: &Console,
) -> Result<(Process, String, u32, Qmp)> {
    let monitor: PathBuf = scratch.file("destination.qmp");
    let mut arguments = words(&["incoming", "--json"]);
    // No other host is on the link between two namespaces.
    arguments.extend(setup.link.map(|_| OsString::from("--insecure")));
    arguments.extend([format!("tcp:{}:0", setup.address()).into(), "--".into()]);
    arguments.push(setup.qemu().into());
    arguments.extend(setup.arguments(ram, path, console, &[&monitor]));
    let log = scratch.file("incoming.log");
    let name = "umem incoming";
    let mut incoming = setup.start(End::Destination, name, setup.umem, &arguments, log)?;
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
    /// Until now.
    beats_before: Vec<Beat>,
    carried: Option<Carried>,
    beats_min: usize,
}

/// A move at its end.
struct Ended {
    began_s: f64,
    ended_s: f64,
    cpu: Cpu,
    traffic: Option<Traffic>,
    work_lost: Lost,
    /// At the destination.
    beats: Vec<Beat>,
}

/// A mover's own figures.
struct Figures {
    faults: u64,
    sent_bytes: f64,
    report: Value,
}

impl Watch {
    fn begin(setup: &Setup<'_>, source: &Vm, pids: Vec<u32>) -> Watch {
        let beats_before = beats_in(&source.console.output);
        let carried = setup.link.map(|link| link.watch(source.pid()));
        let cpu = Cpu::of_all(&pids);
        let began_s = since_1970(SystemTime::now());
        Watch { pids, began_s, cpu, beats_before, carried, beats_min: setup.beats_min }
    }

    /// Both sides have completed. Watches the guest for as long as the setup says.
    fn end(self, ends_s: [f64; 2], source: &Vm, destination: &Console) -> Result<Ended> {
        let cpu = Cpu::of_all(&self.pids).since(self.cpu);
        let traffic = self.carried.map(Carried::end);
        let at_source = beats_in(&source.console.output);
        destination.wait_for_beats(self.beats_min)?;
        let beats = beats_in(&destination.output);
        Ok(Ended {
            began_s: self.began_s,
            ended_s: ends_s[0].max(ends_s[1]),
            cpu,
            traffic,
            work_lost: Lost::of(&self.beats_before, &at_source, &beats),
            beats,
        })
    }
}

impl Ended {
    fn into_move(self, source: &mut Qmp, destination: &mut Qmp, figures: Figures) -> Result<Move> {
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
            latency: Latency::of(&self.beats),
            work_lost: self.work_lost,
            faults: figures.faults,
            sent_bytes: figures.sent_bytes,
            traffic: self.traffic,
            cpu: self.cpu,
            beats: self.beats,
            report: figures.report,
        })
    }
}

#[cfg(test)]
impl Move {
    /// One with these figures, and no others.
    pub(super) fn example(total_s: f64, downtime_ms: f64, lost_s: f64, faults: u64) -> Move {
        Move {
            qemu_version: "10.0.0".into(),
            total_s,
            drain_s: 0.0,
            downtime_ms,
            latency: Latency::of(&[]),
            work_lost: Lost { since_stop_s: lost_s, in_all_s: lost_s },
            faults,
            sent_bytes: 0.0,
            traffic: None,
            cpu: Cpu::default(),
            beats: Vec::new(),
            report: Value::Null,
        }
    }
}

fn since_1970(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sent_bytes_count_each_pass_and_without_passes_each_page_once() {
        let report = json!({
            "precopy_bytes": 3e9, "precopy_s": 3.0, "total_s": 1.0, "gbps": 8.0, "data_bytes": 1e9,
        });
        assert!((umem_sent_bytes(&report) - 4e9).abs() < 1.0);
        let report = json!({ "precopy_bytes": 0, "total_s": 1.0, "gbps": 8.0, "data_bytes": 5e8 });
        assert!((umem_sent_bytes(&report) - 5e8).abs() < 1.0);
    }
}
