//! The monitor that `umem incoming URI -- COMMAND` starts.
//!
//! COMMAND runs with the preload object. The object is part of this executable and reaches the child as an open memory
//! file: nothing has to be installed, and no file is left behind. In a QEMU, started by COMMAND directly or through a
//! wrapper, the object adds the options that QEMU needs: QEMU waits for an incoming migration and has a monitor on a
//! socket whose other end is sent to umem.
//!
//! COMMAND leads a session of its own, as after setsid(2). The terminal's signals (Ctrl-C, Ctrl-\, a hang-up) reach
//! umem and not COMMAND: umem decides about COMMAND's end. The terminal stays usable as COMMAND's standard input, for
//! `-nographic` or `-serial mon:stdio`: job control applies to a process's controlling terminal only, and COMMAND has
//! none. So reading from the terminal or setting its modes causes neither SIGTTIN nor SIGTTOU. A process group alone
//! would not suffice: when umem ends, the kernel sends SIGHUP to an orphaned process group that has stopped processes,
//! which would end the guest.

mod options;
mod terminal;

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::error::{Context, Error, Result};
use crate::memory::created::Created;
use crate::memory::kind::Kind;
use crate::runtime::inbox::unblock_signals;
use crate::runtime::os_text;
use crate::runtime::process::ProcessHandle;

use options::{is_qemu, qemu_arguments};
use terminal::Terminal;

/// The preload object, compiled by the build script.
static PRELOAD: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libumem_preload.so"));

/// A region's name and its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamPath {
    /// The region's name, the same on both sides.
    pub name: String,
    /// The file that backs it on this side.
    pub path: PathBuf,
}

impl std::str::FromStr for RamPath {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<RamPath, String> {
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                Ok(RamPath { name: name.into(), path: os_text::decode(path).into() })
            }
            _ => Err(format!("write NAME=PATH, such as ram0=/dev/shm/guest, not {text:?}")),
        }
    }
}

/// The guest's process: a monitor that umem has started, or a process that has connected to umem. Unless it is
/// [released](MonitorProcess::release), dropping this ends the process and removes the RAM files that it created.
pub(crate) struct MonitorProcess {
    pid: u32,
    /// None for a process that has connected to umem.
    child: Option<Child>,
    handle: ProcessHandle,
    /// The settings of umem's standard input before a child could change them.
    terminal: Option<Terminal>,
    /// The process that has the memory, if that is not the process itself but one that it has started.
    owner: Option<ProcessHandle>,
    created: Vec<Created>,
    released: bool,
    /// The process waits for a umem that takes over if this one panics: a panic is no decision to end the guest.
    survives_panics: bool,
}

/// The sockets between a started monitor and umem.
pub(crate) struct Sockets {
    /// The preload object's; none without it.
    pub(crate) handoff: Option<UnixStream>,
    /// For a QEMU that hands over its memory itself, unless the user gave a QMP socket of his own.
    pub(crate) qmp: Option<UnixStream>,
}

/// How to start the monitor.
pub(crate) struct Start<'a> {
    pub(crate) command: &'a [String],
    pub(crate) ram: &'a [RamPath],
    /// How the guest maps its RAM files.
    pub(crate) kind: Kind,
    /// The preload object to use in place of the built-in one.
    pub(crate) preload: Option<&'a Path>,
    /// Without the preload object: the guest hands its memory over by itself.
    pub(crate) hands_over: bool,
    /// Give a QEMU a monitor for umem, as there is no `--qmp`.
    pub(crate) add_qmp: bool,
}

pub(crate) fn start(start: &Start<'_>) -> Result<(MonitorProcess, Sockets)> {
    let [program, arguments @ ..] = start.command else {
        return Err(Error::Usage("no COMMAND after --".into()));
    };
    let mut command = Command::new(os_text::decode(program));
    command.args(arguments.iter().map(|word| os_text::decode(word)));
    let mut inherited = Vec::new();
    let mut handoff = None;
    if !start.hands_over {
        let (ours, theirs) = UnixStream::pair().context(|| "socketpair")?;
        let preload = Preload::open(start.preload)?;
        command
            .env("LD_PRELOAD", preload.for_child())
            .env("UMEM_PRELOAD_SOCKET", theirs.as_raw_fd().to_string())
            .env("UMEM_PRELOAD_QEMU", if start.add_qmp { "monitor" } else { "incoming" })
            .env("UMEM_PRELOAD_KIND", start.kind.name())
            .env_remove("UMEM_PRELOAD_RAM");
        if !start.ram.is_empty() {
            command.env("UMEM_PRELOAD_RAM", ram_list(start.ram));
        }
        inherited.push(OwnedFd::from(theirs));
        if let Preload::BuiltIn(file) = preload {
            inherited.push(file);
        }
        handoff = Some(ours);
    }
    let mut qmp = None;
    if start.add_qmp && start.hands_over && is_qemu(program) {
        let (ours, theirs) = UnixStream::pair().context(|| "socketpair")?;
        command.args(qemu_arguments(arguments, theirs.as_raw_fd()));
        inherited.push(theirs.into());
        qmp = Some(ours);
    }
    let raw: Vec<i32> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
    let terminal = Terminal::of_stdin();
    if terminal::is_in_background() {
        // The terminal is not its controlling one: without job control it would read input meant for other processes.
        command.stdin(Stdio::null());
    }
    // SAFETY: between fork and exec only setsid, fcntl, sigaction and sigprocmask run, all
    // async-signal-safe; the descriptors are open in the parent until spawn returns.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            unblock_signals()?;
            raw.iter().try_for_each(|&fd| inherit(fd))
        });
    }
    let created: Vec<Created> =
        start.ram.iter().filter_map(|ram| make_private(&ram.path)).collect();
    let mut child = command.spawn().map_err(|error| {
        remove(&created);
        let program = program.to_owned();
        Error::Host(match error.kind() {
            io::ErrorKind::NotFound => format!("cannot start {program}: no such program"),
            _ => format!("cannot start {program}: {error}"),
        })
    })?;
    let pid = child.id();
    let handle = ProcessHandle::of_child(&mut child).inspect_err(|_| remove(&created))?;
    let child = Some(child);
    let monitor = MonitorProcess {
        pid,
        child,
        handle,
        terminal,
        owner: None,
        created,
        released: false,
        survives_panics: false,
    };
    Ok((monitor, Sockets { handoff, qmp }))
}

/// Lets one descriptor through exec.
fn inherit(fd: i32) -> io::Result<()> {
    // SAFETY: fcntl on a descriptor number; no memory involved.
    let result = unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

enum Preload {
    BuiltIn(OwnedFd),
    File(PathBuf),
}

impl Preload {
    fn open(path: Option<&Path>) -> Result<Preload> {
        if let Some(path) = path {
            let path = path.canonicalize().map_err(|error| {
                Error::Preload(format!(
                    "the preload object {} cannot be used: {error}; leave out --preload to use \
                     the one built into umem",
                    path.display()
                ))
            })?;
            return Ok(Preload::File(path));
        }
        let file = memfd_create(c"umem-preload", MFdFlags::MFD_CLOEXEC)
            .context(|| "making a memory file for the preload object")?;
        let mut file = std::fs::File::from(file);
        io::Write::write_all(&mut file, PRELOAD).context(|| "writing the preload object")?;
        Ok(Preload::BuiltIn(file.into()))
    }

    fn for_child(&self) -> OsString {
        let mut value = match self {
            Preload::BuiltIn(fd) => OsString::from(format!("/proc/self/fd/{}", fd.as_raw_fd())),
            Preload::File(path) => path.clone().into_os_string(),
        };
        if let Some(others) = std::env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
            value.push(":");
            value.push(others);
        }
        value
    }
}

fn ram_list(ram: &[RamPath]) -> OsString {
    let mut list = OsString::new();
    for RamPath { name, path } in ram {
        list.push(format!("{name}="));
        list.push(path);
        list.push("\n");
    }
    list
}

impl MonitorProcess {
    /// A process that has connected to umem. It stays released until it hands over its memory.
    pub(crate) fn follow(pid: u32) -> Result<MonitorProcess> {
        let handle = ProcessHandle::open(pid)?;
        Ok(MonitorProcess {
            pid,
            child: None,
            handle,
            terminal: None,
            owner: None,
            created: Vec::new(),
            released: true,
            survives_panics: false,
        })
    }

    /// A process that an earlier umem has started, or that had connected to it. `owner` is the process that has the
    /// memory, if that is another one. The RAM files that umem has made are in `created`: they are removed if this ends
    /// the process.
    pub(crate) fn taken_over(
        pid: u32,
        owner: Option<u32>,
        created: Vec<Created>,
        released: bool,
    ) -> Result<MonitorProcess> {
        let handle = ProcessHandle::open(pid)?;
        let owner = owner.map(ProcessHandle::open).transpose()?;
        Ok(MonitorProcess {
            pid,
            child: None,
            handle,
            terminal: None,
            owner,
            created,
            released,
            survives_panics: released,
        })
    }

    /// Notes a RAM file that umem has created.
    pub(crate) fn note_created(&mut self, file: Created) {
        if !self.created.contains(&file) {
            self.created.push(file);
        }
    }

    /// RAM files that umem has created for it.
    pub(crate) fn created(&self) -> &[Created] {
        &self.created
    }

    /// The process that has the memory, if that is another one.
    pub(crate) fn owner(&self) -> Option<u32> {
        self.owner.as_ref().map(ProcessHandle::pid)
    }

    /// A process has handed over its memory: this one or one that it has started. Without umem its faults would not be
    /// answered any more.
    pub(crate) fn hold(&mut self, pid: u32) -> Result<()> {
        if pid != self.pid {
            self.owner = Some(ProcessHandle::open(pid)?);
        }
        self.released = false;
        Ok(())
    }

    /// Becomes readable when the process that has the memory ends. Its parent, such as a script, may continue.
    pub(crate) fn exited(&self) -> BorrowedFd<'_> {
        self.owner.as_ref().unwrap_or(&self.handle).exited()
    }

    /// Becomes readable when the process ends that umem has started, or that has connected to umem.
    pub(crate) fn command_exited(&self) -> BorrowedFd<'_> {
        self.handle.exited()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// umem has started it.
    pub(crate) fn is_child(&self) -> bool {
        self.child.is_some()
    }

    /// Its memory is complete without umem: its process stays when umem ends.
    pub(crate) fn release(&mut self) {
        self.released = true;
    }

    /// Asks the process, and its process group, to end.
    pub(crate) fn terminate(&mut self) {
        self.signal_all(libc::SIGTERM);
    }

    /// Ends the process, unless it was released.
    ///
    /// Its vCPUs have never run here, or would read zeroes from now on: a shutdown by the guest is impossible. A thread
    /// that waits in a page fault can be killed; the userfaultfd is closed with the process.
    pub(crate) fn end(&mut self) {
        if self.released {
            return;
        }
        self.signal_all(libc::SIGKILL);
        if let Some(owner) = &self.owner {
            owner.kill();
        }
    }

    /// Sends a signal to the process; if umem has started it, to its whole process group.
    ///
    /// The signal goes to the group first: the process may end by the signal at once, and once it has been waited for,
    /// the group's number may belong to another group.
    fn signal_all(&mut self, signal: i32) {
        let mut leads_the_group = false;
        if let (Some(child), Ok(group)) = (&mut self.child, i32::try_from(self.pid))
            && matches!(child.try_wait(), Ok(None))
        {
            // SAFETY: numbers only; the child has not been waited for, so the number is still its group's.
            leads_the_group = unsafe { libc::killpg(group, signal) } == 0
                // SAFETY: as above.
                && unsafe { libc::getpgid(group) } == group;
        }
        // Sent once only: many programs treat a second signal differently.
        if !leads_the_group {
            self.handle.signal(signal);
        }
    }

    pub(crate) fn is_released(&self) -> bool {
        self.released
    }

    /// The guest's process has been ordered to wait for a takeover, and a session record exists.
    pub(crate) fn survive_panics(&mut self) {
        self.survives_panics = true;
    }

    /// Waits until the process ends, and returns its exit status. The process must be a child.
    pub(crate) fn wait(&mut self) -> Result<Option<ExitStatus>> {
        let wait = |child: &mut Child| child.wait().context(|| "waiting for the guest's monitor");
        self.child.as_mut().map(wait).transpose()
    }

    /// Its exit status if it is a child and has ended by itself.
    pub(crate) fn status(&mut self) -> Result<Option<ExitStatus>> {
        let Some(child) = &mut self.child else { return Ok(None) };
        child.try_wait().context(|| "waiting for the guest's monitor")
    }
}

impl Drop for MonitorProcess {
    fn drop(&mut self) {
        if self.released || (self.survives_panics && std::thread::panicking()) {
            return;
        }
        self.end();
        if let Some(child) = &mut self.child {
            let _ = child.wait();
        }
        if let Some(terminal) = &self.terminal {
            terminal.restore();
        }
        remove(&self.created);
    }
}

/// Creates a RAM file with access for its owner alone, before COMMAND opens it: a QEMU would create one that every user
/// can read. None if the file exists; if it cannot be created, COMMAND reports why.
fn make_private(path: &Path) -> Option<Created> {
    let file = File::options().write(true).create_new(true).mode(0o600).open(path).ok()?;
    Some(Created::of(path, &file.metadata().ok()?))
}

fn remove(files: &[Created]) {
    files.iter().for_each(Created::remove);
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::time::Duration;

    use nix::poll::{PollFd, PollFlags, PollTimeout};

    use crate::runtime::polling::poll;

    use super::*;
    use crate::runtime::process::began;

    fn started(mut command: Command, survives_panics: bool) -> MonitorProcess {
        let child = command.spawn().unwrap();
        let pid = child.id();
        let handle = ProcessHandle::open(pid).unwrap();
        let created = Vec::new();
        let child = Some(child);
        let (terminal, owner, released) = (None, None, false);
        MonitorProcess { pid, child, handle, terminal, owner, created, released, survives_panics }
    }

    fn monitor(survives_panics: bool) -> MonitorProcess {
        let mut command = Command::new("sleep");
        command.arg("1000");
        started(command, survives_panics)
    }

    /// A panic is no decision to end a guest that another umem can take over.
    #[test]
    fn guest_that_waits_for_another_umem_survives_a_panic() {
        for survives in [true, false] {
            let mut monitor = monitor(false);
            if survives {
                monitor.survive_panics();
            }
            let (pid, handle) = (monitor.pid(), ProcessHandle::open(monitor.pid()).unwrap());
            let panicked = catch_unwind(AssertUnwindSafe(move || {
                let _monitor = monitor;
                panic!("on purpose");
            }));
            assert!(panicked.is_err());
            assert_eq!(began(pid).is_some(), survives, "{pid}");
            handle.kill();
        }
    }

    /// The whole group gets the signal, even if its leader ends by the signal at once.
    #[test]
    fn signal_reaches_the_whole_group_after_its_leader_ended() {
        for signal in [libc::SIGTERM, libc::SIGKILL] {
            for _ in 0..50 {
                let script = "sleep 1000 & echo $!; wait";
                let mut child = Command::new("sh");
                child.args(["-c", script]).process_group(0).stdout(Stdio::piped());
                let mut monitor = started(child, false);
                let mut line = String::new();
                let stdout = monitor.child.as_mut().and_then(|child| child.stdout.take()).unwrap();
                BufReader::new(stdout).read_line(&mut line).unwrap();
                let started = ProcessHandle::open(line.trim().parse().unwrap()).unwrap();
                monitor.signal_all(signal);
                let mut ended = [PollFd::new(started.exited(), PollFlags::POLLIN)];
                let patience = PollTimeout::try_from(Duration::from_secs(120)).unwrap();
                assert_eq!(poll(&mut ended, patience), Ok(1), "signal {signal}");
                drop(monitor);
            }
        }
    }

    /// A decision to give up ends the guest.
    #[test]
    fn unreleased_guest_ends_with_its_umem() {
        let monitor = monitor(true);
        let pid = monitor.pid();
        drop(monitor);
        assert_eq!(began(pid), None);
    }
}
