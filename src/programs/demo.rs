//! `umem demo`: source, destination and a demo guest, as separate processes on this machine.
//!
//! The processes are those of a real migration, over TCP on the loopback address: two guests (`umem guest`), `umem
//! migrate` and `umem incoming`. The guest reads and writes its memory on both sides, checks every word and gives the
//! verdict.

mod commands;
mod process;
mod ram;

use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Value, json};

use crate::error::{Context, Error, Result};
use crate::host::guest::Verdict;
use crate::host::qmp::Qmp;
use crate::memory::kind::Kind;
use crate::observe;
use crate::observe::output::Output;
use crate::observe::recording::Recording;
use crate::runtime::inbox::Inbox;
use crate::runtime::print;
use crate::runtime::process::ProcessHandle;
use crate::statistics::Completed;

use process::{PATIENCE, Process, wait};
pub(crate) use ram::huge_tmpfs_file;
use ram::{DemoRam, memfd_ram, shared_ram};

/// The options of the demo.
#[derive(Clone, Debug)]
pub struct Options {
    /// MiB of guest RAM.
    pub size_mib: u64,
    /// The kind of the destination's memory.
    pub kind: Kind,
    /// `--postcopy-flags` of `umem incoming`; None for its default.
    pub postcopy_flags: Option<u8>,
    /// Parts of anonymous memory that have a userfaultfd each.
    pub shards: usize,
    /// Anonymous memory has pages of 2 MiB.
    pub huge: bool,
    /// The arriving guest also discards pages.
    pub discard: bool,
    /// Accesses of the guest that write, percent.
    pub write_percent: u32,
    /// Pages that hold zeroes, percent.
    pub zero_percent: u32,
    /// Pages that were never written, percent.
    pub hole_percent: u32,
    /// Threads of the guest.
    pub threads: usize,
    /// Bulk lanes.
    pub lanes: u16,
    /// Verify checksums.
    pub checksum: bool,
    /// Postcopy, or all pages before the switchover.
    pub postcopy: bool,
    /// Also send pages while the guest runs at the source.
    pub precopy: bool,
    /// `--tls-creds` of both sides.
    pub tls_creds: Option<PathBuf>,
    /// `--secret-file` of both sides.
    pub secret_file: Option<PathBuf>,
    /// The seed of the guest's memory; None for a new one.
    pub seed: Option<u64>,
    /// The bandwidth limit of the background after the switchover, bytes/s.
    pub max_postcopy_bandwidth: Option<u64>,
    /// A file for a report of both sides.
    pub report: Option<PathBuf>,
    /// No progress.
    pub quiet: bool,
    /// A trace of both sides on stderr.
    pub verbose: bool,
    /// JSON events on stdout.
    pub json: bool,
}

/// Runs the demo; the exit status is 0 if every page was right.
///
/// # Errors
/// Any reason that kept the guest from moving.
pub fn run(options: &Options) -> Result<i32> {
    let inbox = Inbox::new()?;
    let output = Output::new(options.json);
    if let Some(path) = &options.report {
        observe::check_writable(path)?;
    }
    let seed = options.seed.unwrap_or_else(|| u64::from(std::process::id()) ^ now_nanos());
    let directory = Directory::new()?;
    let source_ram = shared_ram(options.size_mib)?;
    let destination_ram = match options.kind {
        Kind::Shared => Some(shared_ram(options.size_mib)?),
        Kind::Private => Some(memfd_ram()?),
        Kind::Anonymous => None,
    };
    let (kind, what) = (options.kind.name(), source_ram.what);
    let size_mib = options.size_mib;
    output.event(
        "started",
        json!({ "seed": seed, "size_mib": size_mib, "kind": kind, "ram": what }),
        &format!("a guest of {size_mib} MiB ({what}, arriving in {kind} memory, seed {seed})"),
    );
    let progress = (!options.quiet).then(|| output.clone());
    let mut demo = Demo { inbox, options, seed, directory, source_ram, destination_ram };

    let mut guest = demo.start_guest()?;
    let mut incoming = demo.start_incoming()?;
    incoming.progress = progress;
    let listening = incoming.event(&demo.inbox, "listening")?;
    // An arrived guest outlives umem, so the demo ends it.
    let pid = listening["guest_pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    incoming.guest = pid.map(ProcessHandle::open).transpose()?;
    let uri = listening["uri"].as_str().unwrap_or_default().to_owned();
    let mut migrate = demo.start_migrate(&uri)?;
    let (source, destination) = completed(&demo.inbox, &mut migrate, &mut incoming)?;
    demo.write_report()?;
    let verdict = demo.verdict()?;
    migrate.finish(&demo.inbox)?;
    demo.quit("source.qmp")?;
    guest.finish(&demo.inbox)?;
    demo.quit("destination.qmp")?;
    incoming.finish(&demo.inbox)?;
    demo.report(output, source, destination, &verdict)
}

fn now_nanos() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| u64::from(now.subsec_nanos()) ^ now.as_secs())
}

/// Waits for the reports of both sides; stops at the first failure.
fn completed(
    inbox: &Inbox<()>,
    migrate: &mut Process,
    incoming: &mut Process,
) -> Result<(Value, Value)> {
    let mut reports: [Option<Value>; 2] = [None, None];
    loop {
        if let [Some(source), Some(destination)] = &mut reports {
            return Ok((source.take(), destination.take()));
        }
        let sides = [&mut *migrate, &mut *incoming];
        let left: Vec<usize> = (0..2).filter(|&side| reports[side].is_none()).collect();
        let buffered = left.iter().find(|&&side| !sides[side].events.buffer().is_empty());
        let ready = match buffered {
            Some(&side) => side,
            None => {
                let pipes: Vec<_> = left.iter().map(|&side| sides[side].pipe()).collect();
                let names = left.iter().map(|&side| sides[side].name).collect::<Vec<_>>();
                match wait(inbox, &pipes, &names.join(" and "), Instant::now() + PATIENCE)? {
                    Some(index) => left[index],
                    None => continue,
                }
            }
        };
        let event = sides[ready].read()?;
        if event["event"] == "completed" {
            reports[ready] = Some(event);
        }
    }
}

struct Demo<'a> {
    inbox: Inbox<()>,
    options: &'a Options,
    seed: u64,
    directory: Directory,
    source_ram: DemoRam,
    /// None for anonymous memory.
    destination_ram: Option<DemoRam>,
}

impl Demo<'_> {
    /// Writes the report of both sides from their figures.
    fn write_report(&self) -> Result<()> {
        let Some(path) = &self.options.report else { return Ok(()) };
        let read = |name: &str| -> Result<Recording> {
            let bytes = std::fs::read(self.directory.file(name)).context(|| name)?;
            serde_json::from_slice(&bytes).map_err(|error| Error::Host(error.to_string()))
        };
        observe::write(path, &[read("source.json")?, read("destination.json")?])
    }

    /// Has the arrived guest check all of its memory.
    fn verdict(&self) -> Result<Verdict> {
        let verdict = self.ask("destination.qmp", "umem-verify")?;
        serde_json::from_value(verdict).map_err(|error| Error::Host(error.to_string()))
    }

    fn quit(&self, socket: &str) -> Result<()> {
        self.ask(socket, "quit").map(drop)
    }

    /// Has a guest's monitor execute a command, which may take a while.
    fn ask(&self, socket: &str, command: &'static str) -> Result<Value> {
        let path = PathBuf::from(self.directory.file(socket));
        self.inbox.wait_for_work("the demo's processes have been ended", None, move || {
            Qmp::connect(&path)?.execute(command, json!({}))
        })
    }

    fn report(
        &self,
        output: Output,
        source: Value,
        destination: Value,
        verdict: &Verdict,
    ) -> Result<i32> {
        let read = |value: Value| -> Result<Completed> {
            serde_json::from_value(value).map_err(|error| Error::Host(error.to_string()))
        };
        let (source, mut destination) = (read(source)?, read(destination)?);
        destination.zero_copy.clone_from(&source.zero_copy);
        let file_bytes = self.destination_ram.as_ref().map(DemoRam::allocated_bytes).transpose()?;
        // Private memory becomes anonymous, and its file is left empty. Discarded pages go back to the file; reading
        // them there allocates zero pages.
        let is_released =
            !self.options.kind.needs_touch() || self.options.discard || file_bytes == Some(0);
        let good = verdict.bad_pages == 0
            && verdict.guest_writes_lost == 0
            && !verdict.registered
            && is_released
            && verdict.verified_pages == (self.options.size_mib << 20) / 4096;
        if matches!(output, Output::Json) {
            let mut object = serde_json::to_value(&destination).expect("plain fields");
            let checked = serde_json::to_value(verdict).expect("plain fields");
            if let (Value::Object(object), Value::Object(checked)) = (&mut object, checked) {
                object.extend(checked);
                object.insert("seed".into(), json!(self.seed));
                object.insert("ram_file_bytes".into(), json!(file_bytes));
                object.insert("source".into(), serde_json::to_value(&source).expect("plain"));
            }
            print::out_line(&object.to_string());
        } else {
            print::out(&destination.summary());
            print::out_line(&format!(
                "the guest read {}{} and wrote {} pages meanwhile; an access took {} µs (median) \
                 and {} µs (p99)\n{}",
                verdict.reads,
                match verdict.discards {
                    0 => String::new(),
                    discards => format!(", discarded {discards}"),
                },
                verdict.writes,
                verdict.access_latency_us.p50,
                verdict.access_latency_us.p99,
                if good {
                    format!("all {} pages are right, and no write was lost", verdict.verified_pages)
                } else if verdict.bad_pages == 0 {
                    format!(
                        "WRONG: the guest's memory is still umem's: {} bytes of its file are in use, \
                         registered: {} (seed {})",
                        file_bytes.unwrap_or_default(),
                        verdict.registered,
                        self.seed
                    )
                } else {
                    format!(
                        "WRONG: {} pages are bad, {} writes were lost (seed {})",
                        verdict.bad_pages, verdict.guest_writes_lost, self.seed
                    )
                }
            ));
        }
        Ok(i32::from(!good))
    }
}

/// A directory for the monitors' sockets, removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Result<Directory> {
        let template = std::env::temp_dir().join("umem-demo-XXXXXX");
        Ok(Directory(nix::unistd::mkdtemp(&template).context(|| "making a directory")?))
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
