//! umem's variables in the environment: read, then removed.

use std::ffi::{CStr, OsStr, OsString};
use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Once, OnceLock};

use crate::sys;

const SOCKET: &str = "UMEM_PRELOAD_SOCKET";
const RAM: &str = "UMEM_PRELOAD_RAM";
const KIND: &str = "UMEM_PRELOAD_KIND";
const QEMU: &str = "UMEM_PRELOAD_QEMU";

/// The link in `/proc/PID/fd` of the file of a `memory-backend-memfd` (QEMU's backends/hostmem-memfd.c).
const BACKEND_MEMFD: &str = "/memfd:memory-backend-memfd (deleted)";

static CONFIG: OnceLock<Config> = OnceLock::new();

/// The options that a QEMU gets in addition to its own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Adds {
    /// Those to wait for a guest.
    Incoming,
    /// Those to wait for a guest, and a monitor for umem.
    Monitor,
}

/// One line of `UMEM_PRELOAD_RAM`, or a file that a QEMU maps as its RAM.
#[derive(Clone)]
pub(crate) struct RamFile {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

/// How RAM files must be mapped, and how their pages land.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// MAP_SHARED: the file stays the guest's memory.
    Shared,
    /// MAP_PRIVATE: the guest gets anonymous memory page by page, and the file is emptied.
    Private,
    /// MAP_PRIVATE | MAP_ANONYMOUS: no file. No variable asks for this kind; umem names such memory by its address.
    Anonymous,
}

impl Kind {
    /// The name in the hand-over message and in `UMEM_PRELOAD_KIND`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Kind::Shared => "shared",
            Kind::Private => "private",
            Kind::Anonymous => "anonymous",
        }
    }
}

pub(crate) struct Config {
    pub(crate) socket: i32,
    /// None for an unknown kind.
    pub(crate) kind: Option<Kind>,
    /// None if no program gets options.
    pub(crate) adds: Option<Adds>,
    ram: Vec<RamFile>,
}

/// Reads the variables, once; without them the object does nothing.
pub(crate) fn read_environment() {
    let Some(socket) = std::env::var(SOCKET).ok().and_then(|number| number.parse().ok()) else {
        return;
    };
    let ram = std::env::var_os(RAM).map(|list| parse_ram(&list)).unwrap_or_default();
    let kind = match std::env::var(KIND) {
        Err(_) => Some(Kind::Shared),
        Ok(name) => [Kind::Shared, Kind::Private].into_iter().find(|kind| kind.as_str() == name),
    };
    let adds = match std::env::var(QEMU).as_deref() {
        Ok("monitor") => Some(Adds::Monitor),
        Ok("incoming") => Some(Adds::Incoming),
        _ => None,
    };
    // An object may be loaded twice into one process, by two paths; the first one counts.
    let _ = CONFIG.set(Config { socket, kind, adds, ram });
}

/// None until the constructor has run: earlier mappings are not the guest's.
pub(crate) fn get() -> Option<&'static Config> {
    CONFIG.get()
}

impl Config {
    /// Whether RAM files are known by their paths. Otherwise they are recognised by the way in which a QEMU maps its
    /// RAM.
    pub(crate) fn has_names(&self) -> bool {
        !self.ram.is_empty()
    }

    /// The RAM file behind an open descriptor. The path is looked up each time, because QEMU makes
    /// the file itself, after this object was loaded.
    pub(crate) fn ram_file(&self, descriptor: i32) -> Option<RamFile> {
        if self.ram.is_empty() && !is_qemu() {
            return None;
        }
        // SAFETY: the descriptor is the caller's and stays so: ManuallyDrop never closes it.
        let file = ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(descriptor) });
        let opened = file.metadata().ok()?;
        if !opened.is_file() {
            return None;
        }
        let link = std::fs::read_link(format!("/proc/self/fd/{descriptor}")).ok();
        if self.ram.is_empty() {
            let is_memory = sys::is_memory(descriptor);
            // Other files without a name may be of other RAM blocks, such as the firmware's (aux-ram-share=on), which
            // QEMU fills before it answers at its monitor.
            let is_ram = |path: &PathBuf| opened.nlink() > 0 || path.as_os_str() == BACKEND_MEMFD;
            return link
                .filter(|path| is_memory && is_ram(path))
                .map(|path| RamFile { name: path.to_string_lossy().into_owned(), path });
        }
        let is_same = |path: &Path| match std::fs::metadata(path) {
            Ok(named) => named.dev() == opened.dev() && named.ino() == opened.ino(),
            Err(_) => link.as_deref() == Some(path),
        };
        self.ram.iter().find(|ram| is_same(&ram.path)).cloned()
    }

    /// Keeps socket and variables from programs that this program starts. The program that maps a RAM
    /// file is the intended one; wrappers before it had to pass them on.
    pub(crate) fn hide(&self) {
        static HIDDEN: Once = Once::new();
        HIDDEN.call_once(|| {
            sys::set_close_on_exec(self.socket);
            let preload =
                std::env::var_os("LD_PRELOAD").and_then(|value| without_this_object(&value));
            // SAFETY: QEMU makes its memory backends on the main thread while it starts up; it reads
            // its environment there, and the threads it has by then do not.
            unsafe {
                std::env::remove_var(SOCKET);
                std::env::remove_var(RAM);
                std::env::remove_var(KIND);
                std::env::remove_var(QEMU);
                match preload {
                    Some(others) => std::env::set_var("LD_PRELOAD", others),
                    None => std::env::remove_var("LD_PRELOAD"),
                }
            }
        });
    }
}

fn parse_ram(list: &OsStr) -> Vec<RamFile> {
    let parse_line = |line: &[u8]| {
        let equals = line.iter().position(|&byte| byte == b'=')?;
        let (name, path) = line.split_at_checked(equals)?;
        Some(RamFile {
            name: String::from_utf8_lossy(name).into_owned(),
            path: PathBuf::from(OsStr::from_bytes(path.strip_prefix(b"=")?)),
        })
    };
    list.as_bytes().split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

/// The value of LD_PRELOAD without this object: the user's other objects stay.
fn without_this_object(value: &OsStr) -> Option<OsString> {
    let own = sys::object_path(crate::mmap64 as *const ());
    let is_separator = |byte: &u8| *byte == b':' || *byte == b' ';
    let others: Vec<&[u8]> = value
        .as_bytes()
        .split(is_separator)
        .filter(|entry| !entry.is_empty() && Some(*entry) != own.map(CStr::to_bytes))
        .collect();
    (!others.is_empty()).then(|| OsStr::from_bytes(&others.join(&b':')).to_owned())
}

/// Notes that this program is a QEMU for which umem waits.
pub(crate) static IS_QEMU: AtomicBool = AtomicBool::new(false);

/// Whether this program is a QEMU for which umem waits.
pub(crate) fn is_qemu() -> bool {
    IS_QEMU.load(Ordering::Relaxed)
}
