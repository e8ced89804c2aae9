//! Processes: a handle that stays on its process, and their entries in proc(5).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Child;

use crate::error::{Error, Result};

/// A handle on a process, which stays on that process when its pid is reused.
pub(crate) struct ProcessHandle(OwnedFd, u32);

impl ProcessHandle {
    /// For a child. A child without a handle is ended, as it could not be ended later.
    pub(crate) fn of_child(child: &mut Child) -> Result<ProcessHandle> {
        ProcessHandle::of_child_by(child, ProcessHandle::open)
    }

    fn of_child_by(
        child: &mut Child,
        open: impl FnOnce(u32) -> Result<ProcessHandle>,
    ) -> Result<ProcessHandle> {
        open(child.id()).inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })
    }

    /// For a process that is known to exist: a child, or a process that a child waits for.
    pub(crate) fn open(pid: u32) -> Result<ProcessHandle> {
        // SAFETY: pidfd_open(2) takes a pid and flags; no memory is involved.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0) };
        let fd = i32::try_from(fd).expect("descriptors are small");
        if fd < 0 {
            return Err(Error::last_os(format!("pidfd_open of process {pid}")));
        }
        // SAFETY: the descriptor is new and has no other owner.
        Ok(ProcessHandle(unsafe { OwnedFd::from_raw_fd(fd) }, pid))
    }

    /// The pid it was opened with.
    pub(crate) fn pid(&self) -> u32 {
        self.1
    }

    /// Becomes readable when the process ends.
    pub(crate) fn exited(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Kills the process; without effect if it has ended.
    pub(crate) fn kill(&self) {
        self.signal(libc::SIGKILL);
    }

    /// Sends a signal; without effect if the process has ended.
    pub(crate) fn signal(&self, number: i32) {
        let info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: pidfd_send_signal(2) with no siginfo; the descriptor is ours.
        let _ = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), number, info, 0)
        };
    }
}

/// A process's start time, in the kernel's ticks since boot (proc(5), field 22): with the pid it
/// identifies the process. None if there is no such process, or it is a zombie.
pub(crate) fn began(pid: u32) -> Option<u64> {
    let (state, rest) = stat(pid)?;
    let is_alive = !matches!(state, 'Z' | 'X' | 'x');
    rest.split_whitespace().nth(18).filter(|_| is_alive)?.parse().ok()
}

/// Why a runnable process does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standstill {
    /// Stopped by a signal; SIGCONT continues it.
    Stopped,
    /// Stopped by its tracer.
    Traced,
}

/// Whether the process is stopped, as far as its main thread shows.
pub(crate) fn standstill(pid: u32) -> Option<Standstill> {
    match stat(pid)?.0 {
        'T' => Some(Standstill::Stopped),
        't' => Some(Standstill::Traced),
        _ => None,
    }
}

/// A process's state (proc(5), field 3), and the fields after it.
fn stat(pid: u32) -> Option<(char, String)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it, in parentheses, may hold any character.
    let mut rest = stat.rsplit_once(')')?.1.trim_start().chars();
    Some((rest.next()?, rest.collect()))
}

/// A process that has the file mapped, with its name: none that this user may look into, or none at all, is None.
pub(crate) fn mapper(path: &Path) -> Option<(u32, String)> {
    let path = path.canonicalize().ok()?;
    let inode = std::fs::metadata(&path).ok()?.ino().to_string();
    // The path of a mapping stands behind its address, rights, offset, device and inode (proc(5)).
    let is_it = |line: &str| {
        let mut fields = line.split_whitespace();
        fields.nth(4) == Some(&inode) && line.ends_with(&*path.to_string_lossy())
    };
    std::fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let maps = std::fs::read(entry.path().join("maps")).ok()?;
        let has_it = String::from_utf8_lossy(&maps).lines().any(is_it);
        let name = || read(&format!("/proc/{pid}/comm")).unwrap_or_default();
        has_it.then(|| (pid, name()))
    })
}

/// The prefix of a command that needs root.
pub(crate) fn sudo() -> &'static str {
    if nix::unistd::geteuid().is_root() { "" } else { "sudo " }
}

/// A small file of the kernel's, without surrounding white space.
pub(crate) fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// A sandbox may have no pidfd_open(2).
    #[test]
    fn child_without_a_handle_is_ended() {
        let mut child = Command::new("sleep").arg("1000").spawn().expect("a sleep");
        let refused = |pid| Err(Error::Host(format!("no handle on {pid}")));
        assert!(ProcessHandle::of_child_by(&mut child, refused).is_err());
        assert!(stat(child.id()).is_none(), "the child has ended and was reaped");
        let mut child = Command::new("sleep").arg("1000").spawn().expect("a sleep");
        ProcessHandle::of_child(&mut child).expect("a handle").kill();
        child.wait().expect("a child of this process");
    }
}
