//! The use of a RAM file: two locks that end with their holders, and the checks that a file must
//! pass.
//!
//! | lock | held by | from | to |
//! |---|---|---|---|
//! | *move*: `flock`, exclusive | at a source, umem's own open file description; at a destination, the one that the guest's process maps | a migration's start | its end; at a destination, until every page has come |
//! | *guest*: an open file description lock (`F_OFD_SETLK`) on the whole file, for writing | the guest's process at a destination, through the same description | its mapping | its end |
//!
//! There are two locks because a guest that came here may be moved on, by a process that only has
//! the file open for reading, but not before all of it has arrived. The guest's process shares the
//! description with umem, so the locks outlive umem. Both are the kernel's, on the inode: another
//! name of the file does not evade them. QEMU itself locks no RAM file.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::statfs::{PROC_SUPER_MAGIC, statfs};

use crate::error::{Context, Error, Result};

/// How long the kernel may take to close the files of a killed process.
const DEAD_PATIENCE: Duration = Duration::from_secs(10);

const DEAD_INTERVAL: Duration = Duration::from_millis(20);

/// The user of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum User {
    /// A source, which reads existing contents.
    Source,
    /// A destination, whose guest has its memory there.
    Destination,
}

/// Checks the file at a path before it is opened. The file may not exist yet.
pub(crate) fn check_path(name: &str, path: &Path, user: User) -> Result<()> {
    let wrong = |what: String| Err(Error::Ram { name: name.into(), path: path.into(), what });
    if let (User::Destination, Some(directory)) = (user, path.parent())
        && let Ok(metadata) = std::fs::metadata(match directory.as_os_str().is_empty() {
            true => Path::new("."),
            false => directory,
        })
        && let Some(why) = unsafe_directory(&metadata)
    {
        return wrong(format!("lies in a directory {why}: name a file elsewhere, as in /dev/shm"));
    }
    let metadata = match is_of_process(path) {
        true => std::fs::metadata(path),
        false => std::fs::symlink_metadata(path),
    };
    let metadata = match metadata {
        Ok(metadata) => metadata,
        // The error shows when the file is opened.
        Err(_) => return Ok(()),
    };
    match unfit(&metadata, user) {
        None => Ok(()),
        Some(what) if metadata.is_symlink() => {
            let target = std::fs::read_link(path).unwrap_or_default();
            wrong(format!("{what}, to {}: name that file itself", target.display()))
        }
        Some(what) => wrong(what),
    }
}

/// Whether a path is a link to an open file of a process (`/proc/PID/fd/N`), which leads to no
/// other file.
fn is_of_process(path: &Path) -> bool {
    let parent = path.parent().and_then(|parent| statfs(parent).ok());
    parent.is_some_and(|found| found.filesystem_type() == PROC_SUPER_MAGIC)
}

/// Checks an open file under any name.
pub(crate) fn check_file(name: &str, path: &Path, file: &File, user: User) -> Result<()> {
    let metadata = file.metadata().context(|| format!("RAM {name}"))?;
    match unfit(&metadata, user) {
        None => Ok(()),
        Some(what) => Err(Error::Ram { name: name.into(), path: path.into(), what }),
    }
}

/// Why a file cannot be a guest's memory.
fn unfit(metadata: &Metadata, user: User) -> Option<String> {
    let kind = metadata.file_type();
    let is = match () {
        () if kind.is_file() => None,
        () if kind.is_symlink() => return Some("is a symbolic link".into()),
        () if kind.is_fifo() => Some("a FIFO"),
        () if kind.is_socket() => Some("a socket"),
        () if kind.is_dir() => Some("a directory"),
        () => Some("a device"),
    };
    if let Some(is) = is {
        return Some(format!(
            "is {is} and no file: name a regular file in /dev/shm or on hugetlbfs"
        ));
    }
    // A memfd has no name, and is used by the processes that got it.
    if metadata.nlink() == 0 {
        return None;
    }
    let (owner, ours) = (metadata.uid(), nix::unistd::geteuid().as_raw());
    let is_trusted = owner == ours || (user == User::Source && (owner == 0 || ours == 0));
    if !is_trusted {
        return Some(format!(
            "belongs to user {owner}, who can change its contents: {}",
            match user {
                User::Source => "run umem as that user, or copy the file",
                User::Destination => "name another file, or remove this one",
            }
        ));
    }
    let mode = metadata.mode() & 0o7777;
    (mode & 0o022 != 0).then(|| {
        format!(
            "can be written by users other than its owner (mode {mode:04o}): {}",
            match user {
                User::Source => "run `chmod go-w` on it",
                User::Destination =>
                    "name another file, or remove this one; umem then makes a private one",
            }
        )
    })
}

/// Why other users can replace a file in this directory.
fn unsafe_directory(metadata: &Metadata) -> Option<String> {
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    if ![0, nix::unistd::geteuid().as_raw()].contains(&owner) {
        return Some(format!("of user {owner}"));
    }
    let is_open = mode & 0o002 != 0 && mode & 0o1000 == 0;
    is_open.then(|| format!("in which every user can replace the file (mode {mode:04o})"))
}

/// Takes the file for a move, through this very description; false if another description has the
/// lock.
pub(crate) fn take_move(file: BorrowedFd<'_>) -> io::Result<bool> {
    // Network file systems need write access for the lock.
    let lock = |how| {
        // SAFETY: flock(2) takes a descriptor and flags.
        match unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) } {
            0 => Ok(true),
            _ => Err(io::Error::last_os_error()),
        }
    };
    let locked = match lock(libc::LOCK_EX) {
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => lock(libc::LOCK_SH),
        locked => locked,
    };
    match locked {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        locked => locked,
    }
}

/// Ends the move, for every holder of the description.
pub(crate) fn end_move(file: BorrowedFd<'_>) {
    // SAFETY: as above. Without effect if it was not locked.
    let _ = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) };
}

/// Takes the file for a guest, through this very description, which is open for writing; false if
/// another description has the lock.
fn take_guest(file: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: all zeroes is a lock of the whole file.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    // SAFETY: fcntl(2) reads the lock, which outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// Takes both locks of a destination's file.
pub(crate) fn take_for_guest(name: &str, file: BorrowedFd<'_>) -> Result<()> {
    let what = || format!("locking RAM {name}");
    if !take_guest(file).context(what)? {
        return Err(Error::Unsupported(format!(
            "RAM {name}: another guest has its memory in this file: name another file"
        )));
    }
    if !take_move(file).context(what)? {
        return Err(Error::Unsupported(format!(
            "RAM {name}: another umem moves the guest in this file: name another file"
        )));
    }
    Ok(())
}

/// Checks that [`take_for_guest`] would succeed, without changing the file, which may not exist
/// yet.
pub(crate) fn check_unused(name: &str, path: &Path) -> Result<()> {
    let mut options = File::options();
    let follow = if is_of_process(path) { 0 } else { libc::O_NOFOLLOW };
    options.read(true).write(true).custom_flags(follow | libc::O_NONBLOCK);
    // Other errors show when the file is opened.
    let Ok(file) = options.open(path) else { return Ok(()) };
    take_for_guest(name, file.as_fd())
}

/// Takes a source's file for the move. The kernel may still have to close the files of a killed
/// process.
pub(crate) fn take_for_source(name: &str, file: BorrowedFd<'_>, after_a_dead: bool) -> Result<()> {
    let patience = if after_a_dead { DEAD_PATIENCE } else { Duration::ZERO };
    let deadline = Instant::now() + patience;
    while !take_move(file).context(|| format!("locking RAM {name}"))? {
        if Instant::now() >= deadline {
            return Err(Error::Unsupported(format!(
                "RAM {name}: another umem moves the guest in this file, or the guest has not completely \
                 arrived in it: wait for the end of that move, or stop the move first"
            )));
        }
        std::thread::sleep(DEAD_INTERVAL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tempfile::NamedTempFile;

    use super::*;

    fn reopened(file: &NamedTempFile) -> File {
        File::open(file.path()).unwrap()
    }

    #[test]
    fn claim_excludes_a_second_move_and_allows_a_later_one() {
        let here = NamedTempFile::new_in("/dev/shm").unwrap();
        take_for_guest("ram0", here.as_file().as_fd()).unwrap();
        // Every holder of the description has the locks.
        take_for_guest("ram0", here.as_file().try_clone().unwrap().as_fd()).unwrap();
        let other = reopened(&here);
        assert!(!take_move(other.as_fd()).unwrap(), "pages are missing");
        end_move(here.as_file().as_fd());
        take_for_source("ram0", other.as_fd(), false).unwrap();
        let third = here.reopen().unwrap();
        let error = take_for_guest("ram0", third.as_fd()).unwrap_err().to_string();
        assert!(error.contains("another guest has its memory in this file"), "{error}");
        assert!(take_for_source("ram0", third.as_fd(), false).is_err());
        drop(other);
        take_for_source("ram0", third.as_fd(), false).unwrap();
    }

    #[test]
    fn source_claim_keeps_a_guest_away() {
        let file = NamedTempFile::new_in("/dev/shm").unwrap();
        let source = reopened(&file);
        take_for_source("ram0", source.as_fd(), false).unwrap();
        let error = check_unused("ram0", file.path()).unwrap_err().to_string();
        assert!(error.contains("another umem moves the guest"), "{error}");
        drop(source);
        check_unused("ram0", file.path()).unwrap();
        // No lock is left.
        check_unused("ram0", file.path()).unwrap();
    }
}
