//! The lines that this object sends to umem.

use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::config::{Kind, RamFile};
use crate::sys;

/// The reason why a RAM file was not handed over: the value of `error`.
#[derive(Clone, Copy)]
pub(crate) enum Code {
    /// This user may not use userfaultfd, or only for faults of user mode.
    Permission,
    /// The kernel has no userfaultfd, or refused it for another reason.
    Unavailable,
    /// The kernel's userfaultfd lacks a feature.
    Features,
    /// UFFDIO_REGISTER failed.
    Register,
    /// The file had contents before it was mapped.
    RamInUse,
    /// Another guest has the file, or another umem moves the guest in it.
    RamLocked,
    /// The file got contents when it was mapped.
    RamPopulated,
    /// The same file was mapped a second time.
    RamTwice,
    /// The file is mapped privately, but must become the guest's memory.
    ShareOff,
    /// The file is mapped shared, but the guest must end with anonymous memory.
    ShareOn,
    /// `UMEM_PRELOAD_KIND` names a kind that this object does not know.
    Kind,
    /// A QEMU was started with options that do not work with umem.
    Options,
    /// QEMU populates memory that was handed over; sent after the hand-over.
    Prealloc,
    /// QEMU locks memory that was handed over; sent after the hand-over.
    MemLock,
    /// The program moves or resizes memory that was handed over; sent after the hand-over.
    Remap,
    /// A `touch` failed; the answer, without other effects.
    Touch,
    /// Memory that umem named by its address cannot be filled page by page.
    Block,
    /// The socket failed; umem probably does not receive this code.
    Send,
}

impl Code {
    fn as_str(self) -> &'static str {
        match self {
            Code::Permission => "userfaultfd-permission",
            Code::Unavailable => "userfaultfd-unavailable",
            Code::Features => "userfaultfd-features",
            Code::Register => "register",
            Code::RamInUse => "ram-in-use",
            Code::RamLocked => "ram-locked",
            Code::RamPopulated => "ram-populated",
            Code::RamTwice => "ram-twice",
            Code::ShareOff => "share-off",
            Code::ShareOn => "share-on",
            Code::Kind => "kind",
            Code::Options => "options",
            Code::Prealloc => "prealloc",
            Code::MemLock => "mem-lock",
            Code::Remap => "mremap",
            Code::Touch => "touch",
            Code::Block => "block",
            Code::Send => "send",
        }
    }
}

pub(crate) struct Failure {
    code: Code,
    /// The errno of the failing `mmap`.
    pub(crate) errno: i32,
    text: String,
    /// The RAM file that it is about, if umem is to look at that file.
    path: Option<PathBuf>,
}

impl Failure {
    pub(crate) fn new(code: Code, errno: i32, text: &str) -> Self {
        Failure { code, errno, text: text.to_owned(), path: None }
    }

    /// The same, about this RAM file.
    pub(crate) fn of(self, path: &Path) -> Self {
        Failure { path: Some(path.to_owned()), ..self }
    }
}

/// The fields of the hand-over message; addresses and sizes in bytes.
#[derive(Clone)]
pub(crate) struct Handover {
    pub(crate) ram: RamFile,
    pub(crate) kind: Kind,
    pub(crate) address: usize,
    pub(crate) length: usize,
    /// The offset of its start in the file.
    pub(crate) file_offset: u64,
    pub(crate) page_size: usize,
    pub(crate) features: u64,
}

pub(crate) fn hello(socket: i32) {
    let program = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    let line = format!(
        "{{\"preload\":1,\"pid\":{},\"program\":{}}}\n",
        std::process::id(),
        json_string(program.as_os_str().as_bytes()),
    );
    // A wrapper may have closed the socket; that is reported when RAM is mapped, not by every program.
    let _ = send(socket, line.as_bytes(), &[]);
}

/// Reports a QEMU with these options.
pub(crate) fn qemu(socket: i32, monitor: Option<i32>) -> Result<(), i32> {
    let line = format!("{{\"qemu\":1,\"monitor\":{},\"registers\":true}}\n", monitor.is_some());
    send(socket, line.as_bytes(), monitor.as_slice())
}

/// Reports a file that this QEMU has made, and that is useless if the guest does not arrive.
pub(crate) fn made(socket: i32, path: &Path, identity: (u64, u64)) {
    let line = format!(
        "{{\"made\":{},\"device\":{},\"inode\":{}}}\n",
        json_string(path.as_os_str().as_bytes()),
        identity.0,
        identity.1,
    );
    let _ = send(socket, line.as_bytes(), &[]);
}

pub(crate) fn handover_line(handover: &Handover) -> String {
    format!(
        "[{{\"name\":{},\"path\":{},\"base_host_virt_addr\":{},\"size\":{},\"offset\":0,\
         \"file_offset\":{},\"page_size\":{},\"kind\":\"{}\",\"features\":{},\"pid\":{},\"umem\":2}}]\n",
        json_string(handover.ram.name.as_bytes()),
        json_string(handover.ram.path.as_os_str().as_bytes()),
        handover.address,
        handover.length,
        handover.file_offset,
        handover.page_size,
        handover.kind.as_str(),
        handover.features,
        std::process::id(),
    )
}

/// Reports to umem, or to QEMU's standard error if umem cannot be reached.
pub(crate) fn failure(socket: i32, name: &str, failure: &Failure) {
    if send(socket, failure_line(name, failure).as_bytes(), &[]).is_err() {
        complaint(name, failure);
    }
}

/// Reports to QEMU's standard error.
pub(crate) fn complaint(name: &str, failure: &Failure) {
    sys::write_stderr(format!("umem: {name}: {}\n", failure.text).as_bytes());
}

pub(crate) fn failure_line(name: &str, failure: &Failure) -> String {
    let path = failure
        .path
        .as_ref()
        .map(|path| format!(",\"path\":{}", json_string(path.as_os_str().as_bytes())));
    format!(
        "{{\"error\":\"{}\",\"name\":{},\"errno\":{},\"text\":{}{}}}\n",
        failure.code.as_str(),
        json_string(name.as_bytes()),
        failure.errno,
        json_string(failure.text.as_bytes()),
        path.unwrap_or_default(),
    )
}

/// Sends all bytes, the descriptors with the first byte. Fails with an errno.
pub(crate) fn send(socket: i32, line: &[u8], descriptors: &[i32]) -> Result<(), i32> {
    let mut rest = line;
    let mut descriptors = descriptors;
    while !rest.is_empty() {
        match sys::send_message(socket, rest, descriptors) {
            Ok(count) => {
                rest = rest.get(count..).unwrap_or_default();
                descriptors = &[];
            }
            Err(sys::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// A JSON string; bytes that are not UTF-8 become U+FFFD.
fn json_string(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for character in text.chars() {
        match character {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            control if control < ' ' => {
                // Writing to a String does not fail.
                let _ = write!(quoted, "\\u{:04x}", u32::from(control));
            }
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    quoted
}
