//! `umem demo`: source, destination and a guest of ours, as separate processes on this machine.
//!
//! The processes are those of a real migration, over TCP on the loopback address: two guests
//! (`umem guest`), `umem migrate` and `umem incoming`. The guest reads and writes its memory on both
//! sides and checks every word; the verdict is its own.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::error::{Context, Error, Result};
use crate::host::command::ProcessHandle;
use crate::host::guest::Verdict;
use crate::host::qmp::Qmp;
use crate::inbox::{Inbox, Wake, unblock_signals};
use crate::memory::kind::Kind;
use crate::observe;
use crate::observe::recording::Recording;
use crate::report::{Completed, Output};

/// What the demo moves.
#[derive(Clone, Debug)]
pub struct Options {
    /// MiB of guest RAM.
    pub size_mib: u64,
    /// What the destination's memory is.
    pub kind: Kind,
    /// `--postcopy-flags` of `umem incoming`; none for its own default.
    pub postcopy_flags: Option<u8>,
    /// Parts of anonymous memory that have a userfaultfd each.
    pub shards: usize,
    /// Anonymous memory has pages of 2 MiB.
    pub huge: bool,
    /// The guest that arrives discards pages as well.
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
    /// Check what is sent.
    pub checksum: bool,
    /// Postcopy, or everything before the switchover.
    pub postcopy: bool,
    /// `--tls-creds` of both sides.
    pub tls_creds: Option<PathBuf>,
    /// `--secret-file` of both sides.
    pub secret_file: Option<PathBuf>,
    /// What the guest's memory is derived from; none for a new one.
    pub seed: Option<u64>,
    /// The most that is sent in the background after the switchover, bytes a second.
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

/// A child that says nothing for this long is stuck.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs the demo; the exit status is 0 when every page was right.
///
/// # Errors
/// Anything that kept the guest from moving.
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
    // A guest that has arrived is nobody's but ours to end.
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

/// Waits for the reports of both sides, and for neither when the other fails.
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

/// Which of these children has said something, if one has.
fn wait(
    inbox: &Inbox<()>,
    pipes: &[BorrowedFd<'_>],
    names: &str,
    deadline: Instant,
) -> Result<Option<usize>> {
    let left = deadline.saturating_duration_since(Instant::now());
    match inbox.wait(pipes, Some(left))? {
        Wake::Ready(index) => Ok(Some(index)),
        Wake::Message(()) => Ok(None),
        Wake::Signal => Err(Error::Interrupted("the demo's processes have been ended".into())),
        Wake::Timeout => Err(Error::Host(format!("{names} does not go on"))),
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
    fn start_guest(&mut self) -> Result<Process> {
        let mut arguments = self.guest_arguments("source.qmp");
        arguments.extend(options([("--ram", self.source_ram.option())]));
        let mut guest = Process::start("the source's guest", &arguments)?;
        guest.event(&self.inbox, "ready")?;
        Ok(guest)
    }

    /// What both guests are told.
    fn guest_arguments(&self, socket: &str) -> Vec<String> {
        let demo = self.options;
        let mut arguments = vec!["guest".to_owned()];
        arguments.extend(options([
            ("--qmp", self.directory.file(socket)),
            ("--size", demo.size_mib.to_string()),
            ("--threads", demo.threads.to_string()),
            ("--write-percent", demo.write_percent.to_string()),
            ("--zero-percent", demo.zero_percent.to_string()),
            ("--hole-percent", demo.hole_percent.to_string()),
            ("--seed", self.seed.to_string()),
        ]));
        arguments
    }

    fn start_incoming(&self) -> Result<Process> {
        let kind = self.options.kind;
        let mut arguments = vec!["incoming".to_owned(), "--json".to_owned()];
        arguments.extend(options([("--qmp", self.directory.file("destination.qmp"))]));
        arguments.extend(match &self.destination_ram {
            Some(ram) => options([("--kind", kind.name().to_owned()), ("--ram", ram.option())]),
            None => options([("--handoff", self.directory.file("handoff"))]),
        });
        if let Some(flags) = self.options.postcopy_flags {
            arguments.extend(options([("--postcopy-flags", flags.to_string())]));
        }
        arguments.extend(self.security());
        arguments.extend(self.shown("destination.json"));
        if self.options.quiet {
            arguments.push("--quiet".into());
        }
        arguments.push("tcp:127.0.0.1:0".into());
        arguments.push("--".into());
        arguments.push(this_program()?.display().to_string());
        arguments.extend(self.incoming_guest_arguments());
        Process::start("umem incoming", &arguments)
    }

    fn incoming_guest_arguments(&self) -> Vec<String> {
        let demo = self.options;
        let mut arguments = self.guest_arguments("destination.qmp");
        arguments.push("--incoming".into());
        for (is_on, switch) in [(demo.discard, "--discard"), (demo.huge, "--huge")] {
            if is_on {
                arguments.push(switch.into());
            }
        }
        arguments.extend(options([("--kind", demo.kind.name().to_owned())]));
        arguments.extend(match &self.destination_ram {
            Some(ram) => options([("--ram", ram.option())]),
            None => options([
                ("--ram", RAM_NAME.to_owned()),
                ("--handoff", self.directory.file("handoff")),
                ("--shards", demo.shards.to_string()),
            ]),
        });
        arguments
    }

    fn start_migrate(&self, uri: &str) -> Result<Process> {
        // The destination shows the progress of both.
        let mut arguments: Vec<String> =
            ["migrate", "--json", "--quiet", "--qmp"].map(str::to_owned).to_vec();
        arguments.push(self.directory.file("source.qmp"));
        arguments.push("--lanes".into());
        arguments.push(self.options.lanes.to_string());
        arguments.extend(self.options.checksum.then(|| "--checksum".to_owned()));
        if self.options.postcopy {
            arguments.push("-p".into());
        }
        arguments.extend(self.security());
        if let Some(limit) = self.options.max_postcopy_bandwidth {
            arguments.extend(options([("--max-postcopy-bandwidth", limit.to_string())]));
        }
        arguments.extend(self.shown("source.json"));
        arguments.push(uri.into());
        Process::start("umem migrate", &arguments)
    }

    /// What both sides are told of it.
    fn security(&self) -> Vec<String> {
        let Options { tls_creds, secret_file, .. } = self.options;
        [("--tls-creds", tls_creds), ("--secret-file", secret_file)]
            .into_iter()
            .filter_map(|(name, path)| {
                Some([name.to_owned(), path.as_ref()?.display().to_string()])
            })
            .flatten()
            .collect()
    }

    /// What either side is to show: figures for the report in a file of this name, a trace.
    fn shown(&self, recording: &str) -> Vec<String> {
        let mut arguments = Vec::new();
        if self.options.report.is_some() {
            arguments.extend(options([("--report", self.directory.file(recording))]));
        }
        if self.options.verbose {
            arguments.push("--verbose".into());
        }
        arguments
    }

    /// The report of both sides, from the figures that they have left.
    fn write_report(&self) -> Result<()> {
        let Some(path) = &self.options.report else { return Ok(()) };
        let read = |name: &str| -> Result<Recording> {
            let bytes = std::fs::read(self.directory.file(name)).context(|| name)?;
            serde_json::from_slice(&bytes).map_err(|error| Error::Host(error.to_string()))
        };
        observe::write(path, &[read("source.json")?, read("destination.json")?])
    }

    /// Lets the guest that arrived check all of its memory.
    fn verdict(&self) -> Result<Verdict> {
        let mut qmp = Qmp::connect(Path::new(&self.directory.file("destination.qmp")))?;
        let verdict = qmp.execute("umem-verify", json!({}))?;
        serde_json::from_value(verdict).map_err(|error| Error::Host(error.to_string()))
    }

    fn quit(&self, socket: &str) -> Result<()> {
        let mut qmp = Qmp::connect(Path::new(&self.directory.file(socket)))?;
        qmp.execute("quit", json!({})).map(drop)
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
        // Both run on one clock here, and the source measures the whole of the downtime.
        destination.downtime_ms = source.downtime_ms;
        destination.zero_copy.clone_from(&source.zero_copy);
        let file_bytes = self.destination_ram.as_ref().map(DemoRam::allocated_bytes).transpose()?;
        // Private memory ends as the guest's own, and nothing stays in its file. Only what the guest
        // discards is the file's again, where reading it makes pages of zeroes.
        let is_released =
            self.options.kind != Kind::Private || self.options.discard || file_bytes == Some(0);
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
            println!("{object}");
        } else {
            print!("{}", destination.summary());
            println!(
                "the guest read {}{} and wrote {} pages meanwhile; an access took {} µs in the \
                 middle, {} µs at p99\n{}",
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
            );
        }
        Ok(i32::from(!good))
    }
}

/// The region of either guest.
const RAM_NAME: &str = "ram0";

/// Options with their values as words of a command line.
fn options<const N: usize>(options: [(&str, String); N]) -> Vec<String> {
    options.into_iter().flat_map(|(option, value)| [option.to_owned(), value]).collect()
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

/// RAM for one guest: a file without a name, which goes when its last user does.
struct DemoRam {
    file: OwnedFd,
    what: &'static str,
}

impl DemoRam {
    /// Bytes that its pages take.
    fn allocated_bytes(&self) -> Result<u64> {
        let stat = nix::sys::stat::fstat(&self.file).context(|| "the RAM file")?;
        // fstat(2) counts in units of 512 bytes.
        Ok(u64::try_from(stat.st_blocks).expect("not negative") * 512)
    }

    /// How the children open it, as a value of `--ram`.
    fn option(&self) -> String {
        format!("{RAM_NAME}=/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }
}

/// A file in a tmpfs of our own with huge pages, where we may mount one; else a memfd.
fn shared_ram(size_mib: u64) -> Result<DemoRam> {
    match huge_tmpfs_file(size_mib) {
        Some(file) => Ok(DemoRam { file, what: "tmpfs with huge pages" }),
        None => memfd_ram(),
    }
}

fn memfd_ram() -> Result<DemoRam> {
    let file = memfd_create(c"umem-demo", MFdFlags::MFD_CLOEXEC).context(|| "making a memfd")?;
    Ok(DemoRam { file, what: "memfd" })
}

/// Makes a tmpfs that is mounted nowhere (fsopen(2)), so that nothing is left of it afterwards.
pub(crate) fn huge_tmpfs_file(size_mib: u64) -> Option<OwnedFd> {
    const FSOPEN_CLOEXEC: u32 = 1;
    const FSCONFIG_SET_STRING: u32 = 1;
    const FSCONFIG_CMD_CREATE: u32 = 6;
    const FSMOUNT_CLOEXEC: u32 = 1;
    let owned = |fd: libc::c_long| {
        let fd = i32::try_from(fd).ok().filter(|&fd| fd >= 0)?;
        // SAFETY: the kernel has just made this descriptor for us.
        Some(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    // SAFETY: a constant string and flags.
    let fs = owned(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC) })?;
    let size = std::ffi::CString::new(format!("{}M", size_mib + 2)).ok()?;
    for (key, value) in [(c"huge", c"always"), (c"size", size.as_c_str()), (c"mode", c"0700")] {
        let (fd, set) = (fs.as_raw_fd(), FSCONFIG_SET_STRING);
        // SAFETY: both strings end in zero and outlive the call.
        let result =
            unsafe { libc::syscall(libc::SYS_fsconfig, fd, set, key.as_ptr(), value.as_ptr(), 0) };
        if result != 0 {
            return None;
        }
    }
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: this command takes no strings.
    let created = unsafe {
        libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), FSCONFIG_CMD_CREATE, null, null, 0)
    };
    if created != 0 {
        return None;
    }
    // SAFETY: descriptors and flags only.
    let mount =
        owned(unsafe { libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), FSMOUNT_CLOEXEC, 0) })?;
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC;
    // SAFETY: a constant name, relative to a mount that nobody else can reach.
    let file = owned(libc::c_long::from(unsafe {
        libc::openat(mount.as_raw_fd(), c"ram".as_ptr(), flags, 0o600)
    }))?;
    // The open file keeps the mount alive.
    Some(file)
}

fn this_program() -> Result<PathBuf> {
    std::env::current_exe().context(|| "finding umem's own executable")
}

/// A child of the demo, which reads its JSON events. Dropping it ends it.
struct Process {
    name: &'static str,
    child: Child,
    events: BufReader<ChildStdout>,
    /// The guest that `umem incoming` has started.
    guest: Option<ProcessHandle>,
    /// Where its progress is passed on to.
    progress: Option<Output>,
    finished: bool,
}

impl Process {
    fn start(name: &'static str, arguments: &[String]) -> Result<Process> {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new(this_program()?);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
        // SAFETY: only prctl and sigprocmask run between fork and exec, both async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                // A demo that is killed takes its processes with it.
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                Ok(unblock_signals()?)
            });
        }
        let mut child = command.spawn().context(|| format!("starting {name}"))?;
        let stdout = child.stdout.take().expect("piped above");
        let events = BufReader::new(stdout);
        Ok(Process { name, child, events, guest: None, progress: None, finished: false })
    }

    /// Reads events until one of this name comes.
    fn event(&mut self, inbox: &Inbox<()>, name: &str) -> Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.wait_readable(inbox, deadline)?;
            let event = self.read()?;
            if event["event"] == name {
                return Ok(event);
            }
        }
    }

    /// The next event, which has begun to come. Progress is passed on.
    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.events.read_line(&mut line).context(|| self.name)? == 0 {
            let what = format!("{} ended early; its own message says why", self.name);
            return Err(Error::Host(what));
        }
        let event: Value = serde_json::from_str(&line).unwrap_or_default();
        if event["event"] == "failed" {
            return Err(Error::Host(format!("{} failed", self.name)));
        }
        if let Some(output) = self.progress.as_ref().filter(|_| event["event"] == "progress") {
            let text = event["text"].as_str().unwrap_or_default();
            output.event("progress", event.clone(), text);
        }
        Ok(event)
    }

    fn pipe(&self) -> BorrowedFd<'_> {
        self.events.get_ref().as_fd()
    }

    fn wait_readable(&self, inbox: &Inbox<()>, deadline: Instant) -> Result<()> {
        while self.events.buffer().is_empty() {
            if wait(inbox, &[self.pipe()], self.name, deadline)?.is_some() {
                break;
            }
        }
        Ok(())
    }

    /// Waits for its end, which must be a good one.
    fn finish(&mut self, inbox: &Inbox<()>) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut rest = [0; 4096];
        loop {
            self.wait_readable(inbox, deadline)?;
            if self.events.read(&mut rest).context(|| self.name)? == 0 {
                break;
            }
        }
        self.finished = true;
        let status = self.child.wait().context(|| self.name)?;
        if status.success() {
            return Ok(());
        }
        Err(Error::Host(format!("{} ended with {status}", self.name)))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.finished {
            if let Some(guest) = &self.guest {
                guest.kill();
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
