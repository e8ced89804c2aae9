//! The demo's child processes: started, read from, and ended with the demo.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::error::{Context, Error, Result};
use crate::observe::output::Output;
use crate::runtime::inbox::{Inbox, Wake, unblock_signals};
use crate::runtime::process::ProcessHandle;

/// A child without an event for this long is stuck.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// A child process whose JSON events the demo reads. Dropping it ends the process.
pub(super) struct Process {
    pub(super) name: &'static str,
    child: Child,
    pub(super) events: BufReader<ChildStdout>,
    /// The pid of the guest that `umem incoming` started.
    pub(super) guest: Option<ProcessHandle>,
    /// The output for its progress.
    pub(super) progress: Option<Output>,
    finished: bool,
}

impl Process {
    pub(super) fn start(name: &'static str, arguments: &[String]) -> Result<Process> {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new(this_program()?);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
        // The terminal's signals go to the demo, which ends its processes in the right order.
        command.process_group(0);
        // SAFETY: only prctl, sigaction and sigprocmask run between fork and exec, all async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                // The kernel ends the child if the demo is killed.
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                Ok(unblock_signals()?)
            });
        }
        let mut child = command.spawn().context(|| format!("starting {name}"))?;
        let stdout = child.stdout.take().expect("piped above");
        let events = BufReader::new(stdout);
        Ok(Process { name, child, events, guest: None, progress: None, finished: false })
    }

    /// Reads events up to one of this name.
    pub(super) fn event(&mut self, inbox: &Inbox<()>, name: &str) -> Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.wait_readable(inbox, deadline)?;
            let event = self.read()?;
            if event["event"] == name {
                return Ok(event);
            }
        }
    }

    /// The next event, whose first bytes are here. Progress is forwarded.
    pub(super) fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.events.read_line(&mut line).context(|| self.name)? == 0 {
            let what = format!("{} ended early; its own message has the reason", self.name);
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

    pub(super) fn pipe(&self) -> BorrowedFd<'_> {
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

    /// Waits for its exit, which must be a success.
    pub(super) fn finish(&mut self, inbox: &Inbox<()>) -> Result<()> {
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

/// The index of a readable child.
pub(super) fn wait(
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
        Wake::Timeout => Err(Error::Host(format!("{names} makes no progress"))),
    }
}

pub(super) fn this_program() -> Result<PathBuf> {
    std::env::current_exe().context(|| "finding umem's own executable")
}
