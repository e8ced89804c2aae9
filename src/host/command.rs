//! The monitor that `umem incoming URI -- COMMAND` starts.
//!
//! COMMAND runs with the preload object, which is part of this executable and reaches the child as
//! an open memory file, so that nothing has to be installed and nothing is left behind. A QEMU gets
//! three more options: it waits for an incoming migration and has a monitor on an inherited socket.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::qemu::HOW_TO_START;
use crate::error::{Context, Error, Result};
use crate::inbox::unblock_signals;
use crate::memory::kind::Kind;

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
                Ok(RamPath { name: name.into(), path: path.into() })
            }
            _ => Err(format!("write NAME=PATH, such as ram0=/dev/shm/guest, not {text:?}")),
        }
    }
}

/// The guest's process: a monitor that we have started, or one that has come to us. Unless it is
/// [released](Monitor::release), dropping this ends the process and removes the RAM files that it
/// created.
pub(crate) struct Monitor {
    pid: u32,
    /// None for a process that came to us.
    child: Option<Child>,
    handle: ProcessHandle,
    /// Whose memory it is, where that is not the process itself but one that it has started.
    owner: Option<ProcessHandle>,
    created: Vec<PathBuf>,
    released: bool,
}

/// The sockets that a started monitor talks to us on.
pub(crate) struct Sockets {
    /// The preload object's; none without it.
    pub(crate) handoff: Option<UnixStream>,
    /// For a QEMU, unless the user gave a QMP socket of his own.
    pub(crate) qmp: Option<UnixStream>,
}

/// How to start the monitor.
pub(crate) struct Start<'a> {
    pub(crate) command: &'a [String],
    pub(crate) ram: &'a [RamPath],
    /// How the guest is to map its RAM files.
    pub(crate) kind: Kind,
    /// The preload object to use in place of the built-in one.
    pub(crate) preload: Option<&'a Path>,
    /// Without the preload object: the guest hands its memory over itself.
    pub(crate) hands_over: bool,
    /// Add a QMP monitor on an inherited socket (a QEMU without `--qmp`).
    pub(crate) add_qmp: bool,
}

pub(crate) fn start(start: &Start<'_>) -> Result<(Monitor, Sockets)> {
    let [program, arguments @ ..] = start.command else {
        return Err(Error::Usage("no COMMAND after --".into()));
    };
    let mut command = Command::new(program);
    command.args(arguments);
    let mut inherited = Vec::new();
    let mut handoff = None;
    if !start.hands_over {
        let (ours, theirs) = UnixStream::pair().context(|| "socketpair")?;
        let preload = Preload::open(start.preload)?;
        command
            .env("LD_PRELOAD", preload.for_child())
            .env("UMEM_PRELOAD_SOCKET", theirs.as_raw_fd().to_string())
            .env("UMEM_PRELOAD_RAM", ram_list(start.ram))
            .env("UMEM_PRELOAD_KIND", start.kind.name());
        inherited.push(OwnedFd::from(theirs));
        if let Preload::BuiltIn(file) = preload {
            inherited.push(file);
        }
        handoff = Some(ours);
    }
    let mut qmp = None;
    if start.add_qmp {
        let (ours, theirs) = UnixStream::pair().context(|| "socketpair")?;
        command.args(qemu_arguments(arguments, theirs.as_raw_fd()));
        inherited.push(theirs.into());
        qmp = Some(ours);
    }
    let raw: Vec<i32> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
    // SAFETY: between fork and exec only fcntl and sigprocmask run, both async-signal-safe; the
    // descriptors are open in the parent until spawn returns.
    unsafe {
        command.pre_exec(move || {
            unblock_signals()?;
            raw.iter().try_for_each(|&fd| inherit(fd))
        });
    }
    let created: Vec<PathBuf> =
        start.ram.iter().filter(|ram| !ram.path.exists()).map(|ram| ram.path.clone()).collect();
    created.iter().for_each(|path| make_private(path));
    let child = command.spawn().map_err(|error| {
        remove(&created);
        let program = program.to_owned();
        Error::Host(match error.kind() {
            io::ErrorKind::NotFound => format!("cannot start {program}: no such program"),
            _ => format!("cannot start {program}: {error}"),
        })
    })?;
    let pid = child.id();
    let handle = ProcessHandle::open(pid)?;
    let monitor =
        Monitor { pid, child: Some(child), handle, owner: None, created, released: false };
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

/// What a QEMU needs beyond what its user wrote.
fn qemu_arguments(given: &[String], qmp_fd: i32) -> Vec<OsString> {
    let mut added: Vec<OsString> = vec![
        "-chardev".into(),
        format!("socket,id=umem-qmp,fd={qmp_fd}").into(),
        "-mon".into(),
        "chardev=umem-qmp,mode=control".into(),
    ];
    if !given.iter().any(|argument| argument == "-incoming" || argument == "--incoming") {
        added.extend(["-incoming".into(), "defer".into()]);
    }
    added
}

/// True for `qemu-system-x86_64`, `/usr/bin/qemu-kvm` and their like.
pub(crate) fn is_qemu(program: &str) -> bool {
    Path::new(program)
        .file_name()
        .and_then(OsStr::to_str)
        .is_some_and(|name| name.starts_with("qemu") || name == "kvm")
}

/// A handle on a process, which stays on that process when its pid is used again.
pub(crate) struct ProcessHandle(OwnedFd, u32);

impl ProcessHandle {
    /// Of a process that is known to be there: a child, or one that a child of ours waits for.
    pub(crate) fn open(pid: u32) -> Result<ProcessHandle> {
        // SAFETY: pidfd_open(2) takes a pid and flags; no memory is involved.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0) };
        let fd = i32::try_from(fd).expect("descriptors are small");
        if fd < 0 {
            return Err(Error::last_os(format!("pidfd_open of process {pid}")));
        }
        // SAFETY: the kernel has just made it for us.
        Ok(ProcessHandle(unsafe { OwnedFd::from_raw_fd(fd) }, pid))
    }

    /// Becomes readable when the process ends.
    pub(crate) fn exited(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Ends the process; one that has ended already stays so.
    pub(crate) fn kill(&self) {
        self.signal(libc::SIGKILL);
    }

    /// Sends a signal; a process that has ended already does not mind.
    pub(crate) fn signal(&self, number: i32) {
        let info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: pidfd_send_signal(2) with no siginfo; the descriptor is ours.
        let _ = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), number, info, 0)
        };
    }
}

impl Monitor {
    /// A process that has connected to us. It is released until it hands over its memory.
    pub(crate) fn follow(pid: u32) -> Result<Monitor> {
        let handle = ProcessHandle::open(pid)?;
        Ok(Monitor { pid, child: None, handle, owner: None, created: Vec::new(), released: true })
    }

    /// One that a umem before this has started, or that had come to it. `owner` is the process whose
    /// memory it is, where that is another one. With `created` the RAM files that umem has made go, too,
    /// if this ends the process.
    pub(crate) fn taken_over(
        pid: u32,
        owner: Option<u32>,
        created: Vec<PathBuf>,
        released: bool,
    ) -> Result<Monitor> {
        let handle = ProcessHandle::open(pid)?;
        let owner = owner.map(ProcessHandle::open).transpose()?;
        Ok(Monitor { pid, child: None, handle, owner, created, released })
    }

    /// RAM files that umem has made for it.
    pub(crate) fn created(&self) -> &[PathBuf] {
        &self.created
    }

    /// The process whose memory it is, where that is another one.
    pub(crate) fn owner(&self) -> Option<u32> {
        self.owner.as_ref().map(|owner| owner.1)
    }

    /// A process has handed over its memory, this one or one that it has started: without us its faults
    /// would not be answered any more.
    pub(crate) fn hold(&mut self, pid: u32) -> Result<()> {
        if pid != self.pid {
            self.owner = Some(ProcessHandle::open(pid)?);
        }
        self.released = false;
        Ok(())
    }

    /// Becomes readable when the process ends.
    pub(crate) fn exited(&self) -> BorrowedFd<'_> {
        self.handle.exited()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// We have started it.
    pub(crate) fn is_child(&self) -> bool {
        self.child.is_some()
    }

    /// Its memory is safe without us: whatever happens to umem, its process stays.
    pub(crate) fn release(&mut self) {
        self.released = true;
    }

    /// Waits until the process ends, which must be a child; its exit status.
    pub(crate) fn wait(&mut self) -> Result<Option<ExitStatus>> {
        let wait = |child: &mut Child| child.wait().context(|| "waiting for the guest's monitor");
        self.child.as_mut().map(wait).transpose()
    }

    /// Its exit status when it is a child and has ended by itself.
    pub(crate) fn status(&mut self) -> Result<Option<ExitStatus>> {
        let Some(child) = &mut self.child else { return Ok(None) };
        child.try_wait().context(|| "waiting for the guest's monitor")
    }
}

/// When a process began, in the kernel's ticks since boot (proc(5), field 22): with its pid that is the
/// process and no other. None if there is no such process, or it has ended and only waits to be noticed.
pub(crate) fn began(pid: u32) -> Option<u64> {
    let (state, rest) = stat(pid)?;
    let is_alive = !matches!(state, 'Z' | 'X' | 'x');
    rest.split_whitespace().nth(18).filter(|_| is_alive)?.parse().ok()
}

/// Why a process does not run, though it would.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standstill {
    /// By a signal: SIGCONT lets it go on.
    Stopped,
    /// By whoever traces it.
    Traced,
}

/// Whether somebody has stopped the process, as far as its main thread shows.
pub(crate) fn standstill(pid: u32) -> Option<Standstill> {
    match stat(pid)?.0 {
        'T' => Some(Standstill::Stopped),
        't' => Some(Standstill::Traced),
        _ => None,
    }
}

/// Of a process: its state (proc(5), field 3), and the fields after that.
fn stat(pid: u32) -> Option<(char, String)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it, in parentheses, may hold anything.
    let mut rest = stat.rsplit_once(')')?.1.trim_start().chars();
    Some((rest.next()?, rest.collect()))
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        // Its vCPUs have never run here, or would read zeroes from now on: there is nothing to shut
        // down gently. A thread that waits in a page fault can be killed; the userfaultfd dies with
        // the process.
        self.handle.kill();
        if let Some(owner) = &self.owner {
            owner.kill();
        }
        if let Some(child) = &mut self.child {
            let _ = child.wait();
        }
        remove(&self.created);
    }
}

/// Makes a RAM file that is its owner's alone, before COMMAND opens it: a QEMU would make one that
/// everybody may read. Where it cannot be made COMMAND says why.
fn make_private(path: &Path) {
    let _ = File::options().write(true).create_new(true).mode(0o600).open(path);
}

fn remove(files: &[PathBuf]) {
    for path in files {
        let _ = std::fs::remove_file(path);
    }
}

/// Reads the RAM files out of a QEMU command line, and refuses what cannot work before QEMU starts.
pub(crate) fn ram_of_qemu(arguments: &[String], kind: Kind) -> Result<Vec<RamPath>> {
    let mut ram = Vec::new();
    let mut options = arguments.iter().map(String::as_str);
    while let Some(option) = options.next() {
        match option.strip_prefix('-').map(|rest| rest.strip_prefix('-').unwrap_or(rest)) {
            Some("object") => ram.extend(ram_of_object(options.next().unwrap_or_default(), kind)?),
            Some("daemonize") => {
                return Err(Error::Unsupported(
                    "-daemonize hides QEMU from umem: leave it out; umem starts QEMU itself".into(),
                ));
            }
            Some("mem-prealloc") => return Err(prealloc("-mem-prealloc")),
            Some("incoming") => check_incoming(options.next().unwrap_or_default())?,
            Some("overcommit") => check_overcommit(options.next().unwrap_or_default())?,
            Some("device" | "netdev") => check_device(options.next().unwrap_or_default())?,
            _ => {}
        }
    }
    Ok(ram)
}

fn check_incoming(option: &str) -> Result<()> {
    if option == "defer" {
        return Ok(());
    }
    Err(Error::Unsupported(
        "QEMU's own -incoming would wait for another source: leave it out, umem adds `-incoming \
         defer`"
            .into(),
    ))
}

fn check_overcommit(option: &str) -> Result<()> {
    if !flag(option, "mem-lock") {
        return Ok(());
    }
    Err(Error::Unsupported(
        "mem-lock=on makes QEMU fetch every page before it starts: take it out of the destination's \
         -overcommit option"
            .into(),
    ))
}

fn check_device(option: &str) -> Result<()> {
    let kind = option.split(',').next().unwrap_or_default();
    if kind.starts_with("vhost-user") || kind.starts_with("vfio") {
        return Err(Error::Unsupported(format!(
            "{kind} reaches the guest's RAM past userfaultfd, so that pages cannot be fetched on \
             demand: take it out of the destination's command line"
        )));
    }
    Ok(())
}

fn ram_of_object(option: &str, wanted: Kind) -> Result<Option<RamPath>> {
    let properties = object_properties(option);
    let get = |key: &str| {
        properties.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    };
    let kind = get("qom-type").unwrap_or_default();
    let Some(backend) = kind.strip_prefix("memory-backend-") else {
        return Ok(None);
    };
    let name = get("id").unwrap_or_default().to_owned();
    let is_on = |key| get(key).is_some_and(|value| matches!(value, "on" | "yes" | "true" | "y"));
    if backend != "file" {
        return Err(Error::Unsupported(format!(
            "RAM backend {name} is a {kind}, which umem cannot fill from outside: {HOW_TO_START}"
        )));
    }
    if wanted == Kind::Private && is_on("share") {
        return Err(Error::Unsupported(format!(
            "RAM backend {name} has share=on, and --kind private is for memory that becomes the \
             guest's own: give it share=off, or leave out --kind"
        )));
    }
    if wanted == Kind::Shared && !is_on("share") {
        return Err(Error::Unsupported(format!(
            "RAM backend {name} has share=off, so that its file is not the guest's memory: add \
             share=on to its -object option"
        )));
    }
    if is_on("prealloc") {
        return Err(prealloc(&format!("prealloc=on of RAM backend {name}")));
    }
    match get("mem-path") {
        Some(path) if Path::new(path).is_dir() => Err(Error::Unsupported(format!(
            "RAM backend {name} has a directory as its mem-path: name a file in it, such as \
             {path}/{name}"
        ))),
        Some(path) => Ok(Some(RamPath { name, path: path.into() })),
        None => {
            Err(Error::Unsupported(format!("RAM backend {name} has no mem-path: {HOW_TO_START}")))
        }
    }
}

fn prealloc(what: &str) -> Error {
    Error::Unsupported(format!(
        "{what} makes QEMU touch every page before any has come: leave it out on the destination \
         (the source may have it)"
    ))
}

/// The properties of an `-object` option, in QEMU's key=value form or as JSON.
fn object_properties(option: &str) -> Vec<(String, String)> {
    if let Ok(serde_json::Value::Object(object)) = serde_json::from_str(option) {
        return object
            .into_iter()
            .map(|(key, value)| match value {
                serde_json::Value::String(text) => (key, text),
                other => (key, other.to_string()),
            })
            .collect();
    }
    // A comma inside a value is written twice (QEMU's own rule for keyval options).
    let protected = option.replace(",,", "\0");
    protected
        .split(',')
        .enumerate()
        .map(|(index, item)| {
            let (key, value) = match item.split_once('=') {
                Some((key, value)) => (key, value),
                None if index == 0 => ("qom-type", item),
                None => (item, "on"),
            };
            (key.to_owned(), value.replace('\0', ","))
        })
        .collect()
}

fn flag(option: &str, key: &str) -> bool {
    object_properties(option)
        .iter()
        .any(|(name, value)| name == key && matches!(value.as_str(), "on" | "yes" | "true"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn finds_the_ram_in_both_forms() {
        let line = words(
            "-m 2G -object memory-backend-file,id=ram0,size=2G,share=on,mem-path=/dev/shm/a,,b \
             --object {\"qom-type\":\"memory-backend-file\",\"id\":\"ram1\",\"share\":true,\
             \"mem-path\":\"/dev/shm/c\",\"size\":4096} -object rng-random,id=r",
        );
        let ram = ram_of_qemu(&line, Kind::Shared).unwrap();
        let expected = ["ram0=/dev/shm/a,b", "ram1=/dev/shm/c"].map(|t| t.parse().unwrap());
        assert_eq!(ram, expected);
    }

    #[test]
    fn refuses_what_cannot_work_and_says_why() {
        let file = "-object memory-backend-file,id=ram0,size=1G,mem-path=/dev/shm/x";
        for (line, hint) in [
            (file.to_owned(), "share=off"),
            (format!("{file},share=on,prealloc=on"), "prealloc=on of RAM backend ram0"),
            (format!("{file},share=on -mem-prealloc"), "-mem-prealloc"),
            (format!("{file},share=on -overcommit mem-lock=on"), "mem-lock"),
            (format!("{file},share=on -device vfio-pci,host=1"), "vfio-pci"),
            (format!("{file},share=on -netdev vhost-user,id=n"), "vhost-user"),
            (format!("{file},share=on -daemonize"), "-daemonize"),
            (format!("{file},share=on -incoming tcp::1"), "-incoming defer"),
            (
                "-object memory-backend-memfd,id=ram0,size=1G,share=on".into(),
                "memory-backend-memfd",
            ),
            ("-object memory-backend-file,id=r,share=on,mem-path=/dev/shm".into(), "a directory"),
        ] {
            let error = ram_of_qemu(&words(&line), Kind::Shared).unwrap_err().to_string();
            assert!(error.contains(hint), "{line}: {error}");
        }
    }

    #[test]
    fn qemu_is_known_by_its_name() {
        assert!(
            is_qemu("qemu-system-x86_64") && is_qemu("/usr/libexec/qemu-kvm") && is_qemu("kvm")
        );
        assert!(!is_qemu("/opt/qemu/bin/firecracker") && !is_qemu("umem"));
    }

    #[test]
    fn incoming_is_added_unless_it_is_there() {
        let added = qemu_arguments(&words("-m 1G"), 9);
        assert!(added.iter().any(|a| a == "defer"));
        assert!(!qemu_arguments(&words("-incoming defer"), 9).iter().any(|a| a == "-incoming"));
    }
}
