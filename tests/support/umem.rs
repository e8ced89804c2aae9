//! A `umem` process, and other processes that print events.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::NamedTempFile;

use super::{DEADLINE, process::Process};

const UMEM: &str = env!("CARGO_BIN_EXE_umem");

/// [`Umem::limit_descriptors`] for any process.
pub(crate) fn limit_descriptors(pid: u32, below: u64) -> u64 {
    let pid = i32::try_from(pid).expect("pids are small");
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: reads only; `limit` outlives the call.
    let asked =
        unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit) };
    let before = std::mem::replace(&mut limit.rlim_cur, below);
    // SAFETY: `limit` was filled in above, and outlives the call.
    let set =
        unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!((asked, set), (0, 0), "{}", std::io::Error::last_os_error());
    before
}

/// A running `umem`, ended when it is dropped. Or another program whose stdout lines are events.
pub(crate) struct Umem {
    process: Process,
    events: Receiver<Value>,
    stderr: NamedTempFile,
}

impl Umem {
    /// `umem ARGUMENTS`; with `--json` among them there are events.
    pub(crate) fn start<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Umem {
        Umem::start_under(&[], arguments)
    }

    /// `WRAPPER umem ARGUMENTS`, with a wrapper that becomes umem by exec.
    pub(crate) fn start_under<S: AsRef<OsStr>>(
        wrapper: &[&str],
        arguments: impl IntoIterator<Item = S>,
    ) -> Umem {
        Umem::start_with(wrapper, None, arguments)
    }

    /// `umem ARGUMENTS` that inherits a descriptor under this number.
    pub(crate) fn start_inheriting<S: AsRef<OsStr>>(
        descriptor: &impl AsRawFd,
        number: i32,
        arguments: impl IntoIterator<Item = S>,
    ) -> Umem {
        Umem::start_with(&[], Some((descriptor.as_raw_fd(), number)), arguments)
    }

    fn start_with<S: AsRef<OsStr>>(
        wrapper: &[&str],
        inherited: Option<(i32, i32)>,
        arguments: impl IntoIterator<Item = S>,
    ) -> Umem {
        let command = match wrapper {
            [] => Command::new(UMEM),
            [program, rest @ ..] => {
                let mut command = Command::new(program);
                command.args(rest).arg(UMEM);
                command
            }
        };
        Umem::start_command(command, inherited, None, arguments)
    }

    /// `umem ARGUMENTS` in the foreground of a terminal, which is its standard input.
    pub(crate) fn start_at<S: AsRef<OsStr>>(
        terminal: &impl AsFd,
        arguments: impl IntoIterator<Item = S>,
    ) -> Umem {
        Umem::start_command(Command::new(UMEM), None, Some(terminal.as_fd()), arguments)
    }

    /// `umem ARGUMENTS` in a sandbox that answers these system calls with EPERM.
    pub(crate) fn start_without<S: AsRef<OsStr>>(
        calls: &[std::ffi::c_long],
        arguments: impl IntoIterator<Item = S>,
    ) -> Umem {
        let mut command = Command::new(UMEM);
        super::sandbox::forbid(&mut command, calls, libc::EPERM);
        Umem::start_command(command, None, None, arguments)
    }

    /// Another program.
    pub(crate) fn start_program<S: AsRef<OsStr>>(
        program: &Path,
        arguments: impl IntoIterator<Item = S>,
    ) -> Umem {
        Umem::start_command(Command::new(program), None, None, arguments)
    }

    fn start_command<S: AsRef<OsStr>>(
        mut command: Command,
        inherited: Option<(i32, i32)>,
        terminal: Option<BorrowedFd<'_>>,
        arguments: impl IntoIterator<Item = S>,
    ) -> Umem {
        // A file, because the guest's monitor has the same stderr and may outlive umem.
        let stderr = NamedTempFile::new().expect("a temporary file");
        let (writer, reader) = std::io::pipe().map(|(r, w)| (w, r)).expect("a pipe");
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(writer)
            .stderr(stderr.reopen().expect("the file of stderr exists"));
        if let Some((descriptor, number)) = inherited {
            // A descriptor that already has the number would be closed by exec.
            // SAFETY: no memory is involved; the child's descriptor of that number is to be replaced.
            let pass = move || unsafe {
                match descriptor == number {
                    true => libc::fcntl(number, libc::F_SETFD, 0),
                    false => libc::dup2(descriptor, number),
                }
            };
            // SAFETY: between fork and exec only fcntl or dup2 runs, which are async-signal-safe; the descriptor is
            // open until the process has been started.
            unsafe {
                command.pre_exec(move || match pass() {
                    0.. => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                });
            }
        }
        if let Some(terminal) = terminal {
            command.stdin(terminal.try_clone_to_owned().expect("the terminal is open"));
            let take_terminal = || {
                nix::unistd::setsid()?;
                // SAFETY: numbers only; the standard input is the terminal.
                match unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            };
            // SAFETY: between fork and exec only setsid and ioctl run, which are async-signal-safe.
            unsafe { command.pre_exec(take_terminal) };
        }
        // The default directory of session files, for tests that do not use them.
        let sessions = format!("{}/{}", env!("CARGO_TARGET_TMPDIR"), std::process::id());
        std::fs::create_dir_all(&sessions).expect("a directory");
        command.env("XDG_RUNTIME_DIR", sessions);
        let process = Process::start(&mut command);
        // The command holds the pipe's writing end, which must close with the process.
        drop(command);
        let (sender, events) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(reader).lines().map_while(Result::ok) {
                let event = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        Umem { process, events, stderr }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits for the event of this name, and drops those before it.
    ///
    /// # Panics
    /// If umem fails or ends first.
    pub(crate) fn event(&mut self, name: &str) -> Value {
        loop {
            let event = match self.events.recv_timeout(DEADLINE) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("no {name:?} event in {DEADLINE:?}; stderr:\n{}", self.stderr())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("umem ended without a {name:?} event; stderr:\n{}", self.stderr())
                }
            };
            if event["event"] == name {
                return event;
            }
            assert_ne!(event["event"], "failed", "before {name:?}: {event}");
        }
    }

    /// Waits for the next event of any name.
    pub(crate) fn next_event(&mut self) -> Value {
        self.events
            .recv_timeout(DEADLINE)
            .unwrap_or_else(|_| panic!("no event; stderr:\n{}", self.stderr()))
    }

    /// The event of this name, if it has come; drops those before it.
    pub(crate) fn said(&mut self, name: &str) -> Option<Value> {
        self.events.try_iter().find(|event| event["event"] == name)
    }

    /// Waits until umem prints something.
    pub(crate) fn line(&mut self) {
        self.events.recv_timeout(DEADLINE).expect("a line on stdout");
    }

    /// Waits for the event `connected`: false if umem ends first.
    pub(crate) fn connects(&mut self) -> bool {
        loop {
            match self.events.recv_timeout(DEADLINE) {
                Ok(event) if event["event"] == "connected" => return true,
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
                Err(RecvTimeoutError::Timeout) => panic!("neither an event nor the end"),
            }
        }
    }

    /// The stderr of umem and its children.
    pub(crate) fn stderr(&self) -> String {
        let bytes = std::fs::read(self.stderr.path()).expect("the file of stderr exists");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub(crate) fn signal(&mut self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Limits its descriptors to numbers below this one; returns the old limit.
    pub(crate) fn limit_descriptors(&self, below: u64) -> u64 {
        limit_descriptors(self.pid(), below)
    }

    /// Waits until a thread of this name has slept a few times more; a busy thread never sleeps.
    pub(crate) fn rests(&self, thread: &str) {
        let sleeps = || {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid()))
                .expect("the process exists");
            let read = |task: &std::fs::DirEntry, file: &str| {
                std::fs::read_to_string(task.path().join(file)).unwrap_or_default()
            };
            let mut tasks = tasks.flatten();
            let task = tasks.find(|task| read(task, "comm").trim() == thread);
            let task = task.unwrap_or_else(|| panic!("no {thread}: {}", self.stderr()));
            let status = read(&task, "status");
            let count =
                status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            count.expect("a line").trim().parse::<u64>().expect("a number")
        };
        let before = sleeps();
        super::wait_for(format!("{thread} to rest"), || (sleeps() > before + 3).then_some(()));
    }

    /// Kills it, without cleanup.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.process.status().is_none()
    }

    /// Waits for its exit.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.process.wait()
    }

    /// Waits for its exit with success.
    pub(crate) fn succeeds(mut self) {
        let status = self.wait();
        assert!(status.success(), "{status}; stderr:\n{}", self.stderr());
    }

    /// Waits for its exit with status 1 and one line of umem's own on stderr, and returns that line's text. With
    /// `--json` the last event has the same text.
    pub(crate) fn fails(self) -> String {
        self.fails_with(1)
    }

    /// Like [`Umem::fails`], with exit status 2.
    pub(crate) fn fails_as_misused(self) -> String {
        self.fails_with(2)
    }

    /// A line of umem's without a QEMU's text before it: QEMU writes its name, a space, and its message, and may be
    /// killed in between.
    pub(crate) fn without_half_a_line(line: &str) -> &str {
        let rest = line.strip_prefix("qemu-system-x86_64:").map(str::trim_start);
        rest.filter(|rest| rest.starts_with("umem: ")).unwrap_or(line)
    }

    fn fails_with(mut self, code: i32) -> String {
        let status = self.wait();
        let stderr = self.stderr();
        assert_eq!(status.code(), Some(code), "{status}; stderr:\n{stderr}");
        // Whether there is advice depends on the mount of /dev/shm on this machine.
        let is_advice = |text: &&str| text.contains("could use huge pages");
        let lines = || stderr.lines().map(Umem::without_half_a_line);
        let own = lines().filter_map(|line| line.strip_prefix("umem: "));
        let own: Vec<&str> = own.filter(|text| !is_advice(text)).collect();
        let [text] = own[..] else { panic!("stderr has other than one line of umem:\n{stderr}") };
        // Lines without a name would be continuations of umem's; a QEMU's lines begin with its name.
        let foreign = |line: &&str| !line.starts_with("umem: ") && !line.starts_with("qemu");
        let stray: Vec<&str> = lines().filter(foreign).collect();
        assert!(stray.is_empty(), "stderr has lines without an author:\n{stderr}");
        if let Some(failed) = self.events.try_iter().find(|event| event["event"] == "failed") {
            assert_eq!(failed["error"], text);
        }
        text.to_owned()
    }
}
