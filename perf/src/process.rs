//! Measured processes: started in a group of their own, ended with their children, and their
//! processor time.

use std::ffi::OsString;
use std::fs::{File, read_dir, read_to_string};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;
use serde_json::Value;

use crate::error::{Context, Result, failure};
use crate::interrupt;

/// How often a wait checks for an interrupt.
const GLANCE: Duration = Duration::from_millis(50);

/// A child. Dropping it ends it with its own children.
pub(crate) struct Process {
    name: &'static str,
    child: Child,
    events: Lines,
    errors: PathBuf,
}

impl Process {
    /// Starts a program. Its stdout is read as JSON objects; its stderr is appended to the file
    /// `errors`.
    pub(crate) fn start(
        name: &'static str,
        program: &Path,
        arguments: &[OsString],
        errors: PathBuf,
    ) -> Result<Process> {
        Process::start_in(None, name, program, arguments, errors)
    }

    /// The same in a network namespace, if one is given.
    pub(crate) fn start_in(
        namespace: Option<&str>,
        name: &'static str,
        program: &Path,
        arguments: &[OsString],
        errors: PathBuf,
    ) -> Result<Process> {
        let mut command = Command::new(namespace.map_or(program, |_| Path::new("ip")));
        if let Some(namespace) = namespace {
            // `ip` executes the program, which keeps the pid.
            command.args(["netns", "exec", namespace]).arg(program);
        }
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&errors).context(|| errors.display())?)
            // Only umem-perf gets Ctrl-C; the guards end the children.
            .process_group(0);
        let mut child =
            command.spawn().context(|| format!("cannot start {}", program.display()))?;
        let events = child.stdout.take().map(Lines::of);
        let events = events.ok_or("no piped stdout")?;
        Ok(Process { name, child, events, errors })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the JSON object with this `event`, and returns the time when it came.
    pub(crate) fn event(&mut self, event: &str, patience: Duration) -> Result<(SystemTime, Value)> {
        self.any_event(&[event], patience)
    }

    /// Waits for the first JSON object with one of these events.
    pub(crate) fn any_event(
        &mut self,
        events: &[&str],
        patience: Duration,
    ) -> Result<(SystemTime, Value)> {
        let deadline = Instant::now() + patience;
        loop {
            let line = match self.events.next(deadline)? {
                Next::Line(line) => line,
                Next::Late => {
                    return failure(format!(
                        "{} does not report {}",
                        self.name,
                        events.join(" or ")
                    ));
                }
                Next::Closed => return failure(self.last_words()),
            };
            // Its child may print other lines.
            let Ok(object) = serde_json::from_str::<Value>(&line.text) else {
                continue;
            };
            match object["event"].as_str() {
                Some(name) if events.contains(&name) => return Ok((line.at, object)),
                Some("failed") => {
                    let reason = object["error"].as_str().unwrap_or_default();
                    return failure(format!("{}: {reason}", self.name));
                }
                _ => {}
            }
        }
    }

    /// Waits for the JSON object at the start of its stdout.
    pub(crate) fn object(&mut self, patience: Duration) -> Result<Value> {
        match self.events.next(Instant::now() + patience)? {
            Next::Line(line) => serde_json::from_str(&line.text)
                .context(|| format!("{} printed {:?}", self.name, line.text)),
            Next::Late => failure(format!("{} printed nothing", self.name)),
            Next::Closed => failure(self.last_words()),
        }
    }

    /// Waits for a line of its stdout with this text.
    pub(crate) fn says(&mut self, text: &str, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            match self.events.next(deadline)? {
                Next::Line(line) if line.text.contains(text) => return Ok(()),
                Next::Line(_) => {}
                Next::Late => return failure(format!("{} does not print {text:?}", self.name)),
                Next::Closed => return failure(self.last_words()),
            }
        }
    }

    /// Sends SIGINT to it alone.
    pub(crate) fn interrupt(&self) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.pid())?);
        kill(pid, Signal::SIGINT).context(|| format!("interrupting {}", self.name))
    }

    /// Why it ended, from its last line on stderr.
    fn last_words(&mut self) -> String {
        let errors = read_to_string(&self.errors).unwrap_or_default();
        let words = errors.lines().rev().find(|line| !line.trim().is_empty());
        let status = self.child.try_wait().ok().flatten();
        let status = status.map_or_else(String::new, |status| format!(" ({status})"));
        format!("{} ended{status}: {}", self.name, words.unwrap_or("no message"))
    }

    /// Waits until `is_so`; an error if the process ends before.
    pub(crate) fn wait_until(
        &mut self,
        patience: Duration,
        what: &str,
        is_so: impl Fn() -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + patience;
        while !is_so() {
            interrupt::check()?;
            if !matches!(self.child.try_wait(), Ok(None)) {
                return failure(self.last_words());
            }
            if Instant::now() > deadline {
                return failure(format!("{} did not {what} in time", self.name));
            }
            std::thread::sleep(GLANCE);
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Its children first: without a parent they could not be found.
        let pid = self.child.id();
        for descendant in descendants(pid) {
            end(descendant);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Adopts processes whose parent, a child of this process, ends before them: a `umem incoming` that
/// fails after the switchover leaves its QEMU running.
pub(crate) fn adopt_orphans() -> Result<()> {
    // SAFETY: flags only; no memory involved.
    let result = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}

/// Ends remaining processes, after every [`Process`] has been dropped.
pub(crate) fn end_orphans() {
    descendants(std::process::id()).into_iter().for_each(end);
}

fn end(pid: u32) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// The running processes that `pid` started, and those that they started.
pub(crate) fn descendants(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for thread in threads(pid) {
        let children = read_to_string(thread.join("children")).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|child| child.parse().ok()) {
            found.push(child);
            found.extend(descendants(child));
        }
    }
    found
}

fn threads(pid: u32) -> Vec<PathBuf> {
    let tasks = read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    tasks.filter_map(|task| Some(task.ok()?.path())).collect()
}

/// Lines of a stream, with the time of each. A thread reads them, so that their times are exact and
/// waiting for one can be interrupted.
pub(crate) struct Lines(Receiver<Line>);

pub(crate) struct Line {
    pub(crate) at: SystemTime,
    pub(crate) text: String,
}

pub(crate) enum Next {
    Line(Line),
    /// The deadline has passed.
    Late,
    /// The stream has ended.
    Closed,
}

impl Lines {
    pub(crate) fn of(stream: impl Read + Send + 'static) -> Lines {
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            for text in BufReader::new(stream).lines() {
                let Ok(text) = text else { return };
                if sender.send(Line { at: SystemTime::now(), text }).is_err() {
                    return;
                }
            }
        });
        Lines(receiver)
    }

    pub(crate) fn next(&self, deadline: Instant) -> Result<Next> {
        loop {
            interrupt::check()?;
            let left = deadline.saturating_duration_since(Instant::now());
            match self.0.recv_timeout(left.min(GLANCE)) {
                Ok(line) => return Ok(Next::Line(line)),
                Err(RecvTimeoutError::Disconnected) => return Ok(Next::Closed),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => return Ok(Next::Late),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

/// Processor time, seconds, in steps of the kernel's clock tick (10 ms).
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Cpu {
    /// User and system time of the process.
    pub(crate) all_s: f64,
    /// User and system time of its vCPU threads (QEMU's `CPU n/…`), which includes the guest's own
    /// work.
    pub(crate) vcpus_s: f64,
}

impl Cpu {
    /// Of a process that runs, or has ended and was not waited for.
    pub(crate) fn of(pid: u32) -> Cpu {
        let vcpus = threads(pid).into_iter().filter(|thread| {
            read_to_string(thread.join("comm")).is_ok_and(|name| name.starts_with("CPU "))
        });
        Cpu {
            all_s: seconds(Path::new(&format!("/proc/{pid}"))),
            vcpus_s: vcpus.map(|thread| seconds(&thread)).sum(),
        }
    }

    /// Of several processes together.
    pub(crate) fn of_all(pids: &[u32]) -> Cpu {
        pids.iter().map(|&pid| Cpu::of(pid)).fold(Cpu::default(), |sum, cpu| Cpu {
            all_s: sum.all_s + cpu.all_s,
            vcpus_s: sum.vcpus_s + cpu.vcpus_s,
        })
    }

    pub(crate) fn since(self, before: Cpu) -> Cpu {
        Cpu { all_s: self.all_s - before.all_s, vcpus_s: self.vcpus_s - before.vcpus_s }
    }

    /// The time spent on moving the guest, as far as it can be separated.
    pub(crate) fn without_vcpus_s(self) -> f64 {
        self.all_s - self.vcpus_s
    }
}

/// The largest anonymous memory of each of some processes, sampled every [`LOOK`]. Mappings of a
/// guest's file do not count.
pub(crate) struct OwnMemory<const N: usize> {
    stop: Sender<()>,
    watcher: JoinHandle<[u64; N]>,
}

/// Time between two samples.
const LOOK: Duration = Duration::from_millis(5);

impl<const N: usize> OwnMemory<N> {
    pub(crate) fn watch(pids: [u32; N]) -> OwnMemory<N> {
        let (stop, stopped) = channel();
        let watcher = std::thread::spawn(move || {
            let mut most = [0; N];
            loop {
                for (most, pid) in most.iter_mut().zip(pids) {
                    *most = (*most).max(own_kib(pid));
                }
                if stopped.recv_timeout(LOOK) != Err(RecvTimeoutError::Timeout) {
                    return most;
                }
            }
        });
        OwnMemory { stop, watcher }
    }

    pub(crate) fn most_mib(self) -> [f64; N] {
        drop(self.stop);
        let kib = self.watcher.join().unwrap_or([0; N]);
        kib.map(|kib| kib as f64 / 1024.0)
    }
}

/// `RssAnon` of proc_pid_status(5); 0 for a process that has ended.
fn own_kib(pid: u32) -> u64 {
    let status = read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// utime + stime of `stat` in a directory of /proc.
fn seconds(directory: &Path) -> f64 {
    let stat = read_to_string(directory.join("stat")).unwrap_or_default();
    ticks(&stat).unwrap_or(0) as f64 / ticks_a_second()
}

/// proc_pid_stat(5): the name, field 2, is in parentheses and may hold any character.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(14 - 3);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

fn ticks_a_second() -> f64 {
    match nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK) {
        Ok(Some(ticks)) if ticks > 0 => ticks as f64,
        _ => 100.0,
    }
}

/// The given umem, or the one beside this program.
pub(crate) fn find_umem(named: Option<&Path>) -> Result<PathBuf> {
    let path = match named {
        Some(path) => path.to_owned(),
        None => std::env::current_exe().context(|| "this program's path")?.with_file_name("umem"),
    };
    if path.is_file() {
        return Ok(path);
    }
    failure(format!(
        "no umem at {}: build it with `cargo build --release -p umem`, or give one with --umem",
        path.display()
    ))
}

/// A TCP port of the loopback address that is free now.
pub(crate) fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").context(|| "looking for a port")?;
    Ok(listener.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_parsed_after_any_process_name() {
        let stat = "17 (a) b (c) S 1 17 17 0 -1 4194560 1 0 0 0 25 17 9 9 20 0 1 0 5 1 1";
        assert_eq!(ticks(stat), Some(42));
        assert_eq!(ticks("17 (cut) S 1"), None);
    }

    #[test]
    fn processor_time_of_this_process_grows() {
        // On a busy machine it may take long.
        let began = Instant::now();
        while Cpu::of(std::process::id()).all_s <= 0.0 {
            assert!(began.elapsed() < Duration::from_secs(30));
        }
    }

    #[test]
    fn own_memory_records_the_largest_sample() {
        let watch = OwnMemory::watch([std::process::id(), u32::MAX]);
        let before = own_kib(std::process::id());
        let used = std::hint::black_box(vec![1_u8; 64 << 20]);
        let after = own_kib(std::process::id());
        let [most, nobody] = watch.most_mib();
        assert!(after >= before + (32 << 10) && most > 0.0 && nobody == 0.0);
        drop(used);
    }

    #[test]
    fn dropped_process_ends_its_descendants() {
        let errors = std::env::temp_dir().join(format!("umem-perf-test-{}", std::process::id()));
        let script = "sleep 60 & echo '{\"event\":\"started\"}'; wait";
        let arguments = ["-c", script].map(OsString::from);
        let mut process =
            Process::start("sh", Path::new("/bin/sh"), &arguments, errors.clone()).unwrap();
        process.event("started", Duration::from_secs(10)).unwrap();
        let started = descendants(process.pid());
        assert_eq!(started.len(), 1);
        drop(process);
        let _ = std::fs::remove_file(errors);
        // A zombie that has not been reaped yet has no memory map.
        let deadline = Instant::now() + Duration::from_secs(10);
        let lives = || std::fs::read(format!("/proc/{}/maps", started[0]));
        while lives().is_ok_and(|maps| !maps.is_empty()) {
            assert!(Instant::now() < deadline, "process {} still runs", started[0]);
            std::thread::sleep(GLANCE);
        }
    }
}
