//! The directory of session files: its permissions, the locks of sessions, and the removal of
//! leftovers.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::AccessFlags;

use crate::error::{Error, Result};
use crate::runtime::role::Role;

/// The directory of session files.
#[derive(Clone, Debug)]
pub(crate) struct Directory(pub(super) PathBuf);

impl Directory {
    /// The named directory; otherwise one of this user's that is cleared at reboot: `umem` in
    /// `$XDG_RUNTIME_DIR`, if that is this user's, or `/run/umem` for root. None if there is
    /// neither. A missing directory is made, and leftovers are removed.
    pub(crate) fn find(named: Option<&Path>) -> Result<Option<Directory>> {
        let Some(path) = named.map(Path::to_owned).or_else(usual) else { return Ok(None) };
        let failed = |source| Error::System {
            what: format!("the directory for session files {}", path.display()),
            source,
        };
        let made = DirBuilder::new().mode(0o700).create(&path);
        if let Err(error) = made
            && error.kind() != ErrorKind::AlreadyExists
        {
            return Err(failed(error));
        }
        let metadata = fs::symlink_metadata(&path).map_err(failed)?;
        let own = nix::unistd::geteuid().as_raw();
        if !metadata.is_dir() || metadata.uid() != own || metadata.permissions().mode() & 0o077 != 0
        {
            return Err(Error::Environment(format!(
                "{} must be a directory of this user's, with mode 0700, as session files give \
                 access to a guest: give another one with --session-dir",
                path.display()
            )));
        }
        // On a read-only file system there is nothing to lock or write.
        nix::unistd::access(&path, AccessFlags::W_OK).map_err(|errno| failed(errno.into()))?;
        let directory = Directory(path);
        directory.sweep();
        Ok(Some(directory))
    }

    /// The same for a side that can run without a directory: a fault of the default directory is
    /// only reported through `remark`.
    pub(crate) fn find_or_remark(
        named: Option<&Path>,
        remark: impl FnOnce(&str),
    ) -> Result<Option<Directory>> {
        match Directory::find(named) {
            Err(error) if named.is_none() => {
                remark(&format!("this process cannot be taken over from if it is killed: {error}"));
                Ok(None)
            }
            found => found,
        }
    }

    pub(super) fn path(&self, session: &str, what: &str) -> PathBuf {
        self.0.join(format!("{session}.{what}"))
    }

    /// The numbers of this side's sessions that have a record.
    pub(super) fn sessions(&self, role: Role) -> Vec<String> {
        let suffix = format!(".{}", role.name());
        self.names().filter_map(|name| Some(name.strip_suffix(&suffix)?.to_owned())).collect()
    }

    /// The session of this side whose number begins with `beginning`.
    pub(super) fn complete(&self, beginning: &str, role: Role) -> Result<String> {
        let all = self.sessions(role);
        let is_meant = |session: &&String| !beginning.is_empty() && session.starts_with(beginning);
        let meant: Vec<&String> = all.iter().filter(is_meant).collect();
        match meant[..] {
            [one] => Ok(one.clone()),
            [] => Err(Error::Usage(format!(
                "no session {beginning} of this side in {}{}",
                self.0.display(),
                listed(&all)
            ))),
            _ => Err(Error::Usage(format!(
                "several sessions begin with {beginning}: write more of the number"
            ))),
        }
    }
    /// Locks a session for this process, until the process ends.
    pub(super) fn lock(&self, session: &str, role: Role) -> Result<Flock<File>> {
        let path = self.lock_path(session, role);
        let failed = |source| Error::System {
            what: format!("the lock of a session {}", path.display()),
            source,
        };
        let mut attempts = 0..LOCK_ATTEMPTS_MAX;
        loop {
            let mut options = OpenOptions::new();
            let options = options.write(true).create(true).truncate(false).mode(0o600);
            match Flock::lock(options.open(&path).map_err(failed)?, NOW_OR_NEVER) {
                Ok(lock) if is_in_place(&lock) => return Ok(lock),
                // The lock was removed before this process had it; the next attempt makes another
                // one.
                Ok(_) => {}
                Err((_, Errno::EWOULDBLOCK)) if attempts.next().is_some() => {
                    std::thread::sleep(LOCK_INTERVAL);
                }
                Err((_, Errno::EWOULDBLOCK)) => {
                    return Err(Error::Environment(format!(
                        "another running umem serves session {session}: there is nothing to take over"
                    )));
                }
                Err((_, errno)) => return Err(failed(errno.into())),
            }
        }
    }

    /// Removes the files of one side of a session whose lock the caller holds. The lock goes last,
    /// as it keeps other processes from the files being removed.
    pub(super) fn remove(&self, session: &str, role: Role) {
        let prefix = format!("{session}.");
        let of_session =
            |name: &String| name.strip_prefix(&prefix).is_some_and(|what| belongs_to(role, what));
        for name in self.names().filter(of_session) {
            let _ = fs::remove_file(self.0.join(name));
        }
        let _ = fs::remove_file(self.lock_path(session, role));
    }

    /// Removes the files of processes that were killed before their first record, which no process
    /// can resume. A process that has just made a lock, and not locked it yet, finds it removed and
    /// makes another one.
    fn sweep(&self) {
        for name in self.names() {
            let side = |role: Role| Some((name.strip_suffix(&lock_suffix(role))?, role));
            let Some((session, role)) = side(Role::Source).or_else(|| side(Role::Destination))
            else {
                continue;
            };
            let Ok(file) = OpenOptions::new().write(true).open(self.0.join(&name)) else {
                continue;
            };
            let Ok(lock) = Flock::lock(file, NOW_OR_NEVER) else { continue };
            if is_in_place(&lock) && !self.path(session, role.name()).exists() {
                self.remove(session, role);
            }
        }
    }

    fn names(&self) -> impl Iterator<Item = String> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok())
    }

    fn lock_path(&self, session: &str, role: Role) -> PathBuf {
        self.0.join(format!("{session}{}", lock_suffix(role)))
    }
}

const NOW_OR_NEVER: FlockArg = FlockArg::LockExclusiveNonblock;

/// A process that sweeps holds a lock for as long as it takes to remove a few files; a running
/// session holds it for longer than these attempts take.
const LOCK_ATTEMPTS_MAX: u32 = 20;
const LOCK_INTERVAL: Duration = Duration::from_millis(5);

fn lock_suffix(role: Role) -> String {
    format!(".{}.lock", role.name())
}

/// Whether the file still has its name.
fn is_in_place(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.nlink() > 0)
}

/// Whether a file `SESSION.what`, the lock excepted, belongs to that side of the session.
pub(super) fn belongs_to(role: Role, what: &str) -> bool {
    let is_record = what.strip_prefix(role.name()).is_some_and(|rest| matches!(rest, "" | ".new"));
    is_record
        || match role {
            Role::Source => what.starts_with("freed."),
            Role::Destination => what == "guest",
        }
}

fn listed(sessions: &[String]) -> String {
    match sessions {
        [] => ", and no other one".into(),
        some => format!("; there are {}", some.join(", ")),
    }
}

/// The default directory.
pub(super) fn usual() -> Option<PathBuf> {
    let own = nix::unistd::geteuid();
    let of_user = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    // Another user's, if the environment came through sudo.
    let is_own = |path: &PathBuf| fs::metadata(path).is_ok_and(|m| m.uid() == own.as_raw());
    let base = of_user.filter(|path| path.is_absolute() && is_own(path));
    base.or_else(|| own.is_root().then(|| "/run".into())).map(|base| base.join("umem"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    const ROLES: [Role; 2] = [Role::Source, Role::Destination];

    fn directory() -> (tempfile::TempDir, Directory) {
        let scratch = tempfile::tempdir().unwrap();
        let directory = Directory::find(Some(&scratch.path().join("umem"))).unwrap().unwrap();
        (scratch, directory)
    }

    fn names(directory: &Directory) -> Vec<String> {
        let mut names: Vec<String> = directory.names().collect();
        names.sort();
        names
    }

    #[test]
    fn sweep_removes_leftovers_and_keeps_records_and_locked_sessions() {
        let (_scratch, directory) = directory();
        let write = |name: &str| fs::write(directory.0.join(name), "").unwrap();
        // Killed before their first record.
        let left = ["a.source.lock", "a.freed.0", "a.source.new", "b.destination.lock", "b.guest"];
        left.into_iter().for_each(write);
        // Killed afterwards, and an unrelated file.
        let kept = ["c.destination", "c.destination.lock", "c.guest", "notes.txt"];
        kept.into_iter().for_each(write);
        // Both sides of one session, one of them running.
        let lock = directory.lock("d", Role::Source).unwrap();
        ["d.freed.0", "d.destination.lock", "d.guest"].into_iter().for_each(write);
        assert!(Directory::find(Some(&directory.0)).unwrap().is_some());
        let mut expected = [&kept[..], &["d.freed.0", "d.source.lock"]].concat();
        expected.sort_unstable();
        assert_eq!(names(&directory), expected);
        drop(lock);
        directory.sweep();
        assert_eq!(names(&directory), kept);
    }

    /// However close together one process begins and another one sweeps.
    #[test]
    fn session_begun_during_a_sweep_keeps_its_lock_and_files() {
        let (_scratch, directory) = directory();
        let has_ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !has_ended.load(SeqCst) {
                        directory.sweep();
                    }
                });
            }
            let begun = std::panic::catch_unwind(|| {
                for number in 0..2000 {
                    let (session, role) = (number.to_string(), ROLES[number % 2]);
                    let lock = directory.lock(&session, role).unwrap();
                    assert!(directory.lock_path(&session, role).exists(), "{number}");
                    assert!(is_in_place(&lock), "{number}");
                    directory.remove(&session, role);
                }
            });
            has_ended.store(true, SeqCst);
            begun.unwrap();
        });
        assert_eq!(names(&directory), Vec::<String>::new());
    }
}
