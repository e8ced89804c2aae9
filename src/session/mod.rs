//! The files that one side of a migration keeps so that another process can take over after a kill.
//!
//! A side writes a *session file* before the moment from which on no other process could end its
//! migration well: the source before it stops its guest, the destination before it reports that its
//! guest could run. `--resume SESSION` reads it ([at the source](crate::source::session::takeover),
//! [at the destination](crate::destination::session::takeover)). The file is removed when the
//! migration has ended.
//!
//! Up to three files a side, in a directory that is private to its user ([`Directory`]):
//!
//! | file | |
//! |---|---|
//! | `SESSION.source`, `SESSION.destination` | the record, JSON, replaced whole by rename |
//! | the same with `.lock` | locked (flock) by the process that serves the session, until it ends |
//! | `SESSION.freed.N` | source, `--release-ram`: which pages of region N may be gone, a bit each |
//! | `SESSION.guest` | destination: a socket on which the guest's side hands over again |
//!
//! A lock ends with its process: when another process has it, no thread of the dead process is
//! left, and so no operation of its rings. Files of a process that was killed before its first
//! record, which no process can resume, are removed when the next umem opens the directory.

mod clock;
mod directory;
mod record;
mod resume;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::Flock;
use serde::Serialize;
use serde::de::DeserializeOwned;
use umem_wire::SessionId;

use crate::error::{Context, Error, Result};
use crate::runtime::hex::{hex, unhex};
use crate::runtime::role::Role;

pub(crate) use clock::{since_boot, when};
pub(crate) use directory::Directory;
pub(crate) use record::{
    DestinationRecord, DestinationState, GuestRecord, RamRecord, RegionRecord, SecurityRecord,
    SourceRecord, SourceState, TotalsRecord, VERSION,
};
pub use resume::Options as ResumeOptions;
#[cfg(feature = "fuzz")]
pub(crate) use resume::check;

/// A session's number as text.
pub(crate) fn name(session: SessionId) -> String {
    hex(&session.0)
}

/// The sessions in the usual directory that this side has a record of. Changes nothing there; none if there is no
/// such directory.
pub(crate) fn resumable(role: Role) -> Vec<String> {
    directory::usual().map_or_else(Vec::new, |path| Directory(path).sessions(role))
}

/// The number that [`name`] wrote.
pub(crate) fn parse(name: &str) -> Option<SessionId> {
    unhex(name)?.try_into().ok().map(SessionId)
}

/// Most bytes of a record. The record of a guest with many regions has a few ten thousand.
const RECORD_BYTES_MAX: u64 = 4 << 20;

/// Reads a record. Never blocks, whatever kind of file is in its place.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let mut bytes = Vec::new();
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    file.take(RECORD_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > RECORD_BYTES_MAX {
        return Err(io::Error::other(format!("it has more than {RECORD_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

/// A record that is kept in a file while a session needs it. Clones share it.
pub(crate) struct SessionFile<R>(Arc<Mutex<Kept<R>>>);

impl<R> Clone for SessionFile<R> {
    fn clone(&self) -> SessionFile<R> {
        SessionFile(self.0.clone())
    }
}

struct Kept<R> {
    record: R,
    directory: Directory,
    session: String,
    role: Role,
    is_written: bool,
    /// The files have been removed; a file of that name may now belong to another session.
    is_removed: bool,
    /// Held as long as this exists.
    _lock: Flock<File>,
}

impl<R: Serialize + DeserializeOwned> SessionFile<R> {
    /// For a new session. Before the first [`edit`](SessionFile::edit) only the lock is written.
    pub(crate) fn new(
        directory: &Directory,
        session: SessionId,
        role: Role,
        record: R,
    ) -> Result<SessionFile<R>> {
        let session = name(session);
        let lock = directory.lock(&session, role)?;
        Ok(SessionFile::of(record, directory, session, role, false, lock))
    }

    /// Takes over a session whose process has ended.
    pub(crate) fn take_over(
        directory: &Directory,
        beginning: &str,
        role: Role,
    ) -> Result<(SessionFile<R>, R)>
    where
        R: Clone,
    {
        let session = directory.complete(beginning, role)?;
        let lock = directory.lock(&session, role)?;
        let path = directory.path(&session, role.name());
        let what = || format!("the session file {}", path.display());
        let text = read(&path).context(what)?;
        let record: R = serde_json::from_slice(&text).map_err(|error| {
            Error::Environment(format!(
                "{} was not written by this version of umem: {error}",
                what()
            ))
        })?;
        Ok((SessionFile::of(record.clone(), directory, session, role, true, lock), record))
    }

    fn of(
        record: R,
        directory: &Directory,
        session: String,
        role: Role,
        is_written: bool,
        lock: Flock<File>,
    ) -> SessionFile<R> {
        let directory = directory.clone();
        let kept =
            Kept { record, directory, session, role, is_written, is_removed: false, _lock: lock };
        SessionFile(Arc::new(Mutex::new(kept)))
    }

    /// The session's number, as `--resume` takes it.
    pub(crate) fn session(&self) -> String {
        self.kept().session.clone()
    }

    /// The option that a resuming command line needs beside the number: the directory, unless it is
    /// the default. Begins with a blank.
    pub(crate) fn directory_option(&self) -> String {
        let path = self.kept().directory.0.clone();
        match directory::usual().as_ref() == Some(&path) {
            true => String::new(),
            false => format!(" --session-dir {}", path.display()),
        }
    }

    /// The path of another file of the session, which is removed with the record.
    pub(crate) fn file(&self, what: &str) -> PathBuf {
        let kept = self.kept();
        assert!(directory::belongs_to(kept.role, what), "{what} would never be removed");
        kept.directory.path(&kept.session, what)
    }

    /// Changes the record; the file has the change when this returns.
    pub(crate) fn edit(&self, change: impl FnOnce(&mut R)) -> Result<()> {
        let mut kept = self.kept();
        change(&mut kept.record);
        // The record of an ended session is not written again.
        if kept.is_removed { Ok(()) } else { kept.write() }
    }

    /// Whether a file has the record, for a process that takes over.
    pub(crate) fn is_written(&self) -> bool {
        self.kept().is_written
    }

    /// The record as it was last written.
    pub(crate) fn record(&self) -> R
    where
        R: Clone,
    {
        self.kept().record.clone()
    }

    /// The migration has ended: no takeover is possible or needed any more.
    pub(crate) fn remove(&self) {
        let mut kept = self.kept();
        kept.directory.remove(&kept.session, kept.role);
        kept.is_removed = true;
    }

    fn kept(&self) -> MutexGuard<'_, Kept<R>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<R: Serialize> Kept<R> {
    /// Writes atomically: a reader finds this record or the one before it.
    fn write(&mut self) -> Result<()> {
        let path = self.directory.path(&self.session, self.role.name());
        let next = self.directory.path(&self.session, &format!("{}.new", self.role.name()));
        let what = || format!("writing the session file {}", path.display());
        let text = serde_json::to_vec_pretty(&self.record).expect("a record is plain data");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&next)
            .context(what)?;
        file.write_all(&text).context(what)?;
        fs::rename(&next, &path).context(what)?;
        self.is_written = true;
        Ok(())
    }
}

impl<R> Drop for Kept<R> {
    fn drop(&mut self) {
        // Nothing can be taken over.
        if !self.is_written && !self.is_removed {
            self.directory.remove(&self.session, self.role);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    use serde::Deserialize;

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    struct Record(u32);

    fn directory() -> (tempfile::TempDir, Directory) {
        let scratch = tempfile::tempdir().unwrap();
        let directory = Directory::find(Some(&scratch.path().join("umem"))).unwrap().unwrap();
        (scratch, directory)
    }

    fn files(directory: &Directory) -> usize {
        fs::read_dir(&directory.0).unwrap().count()
    }

    const ID: SessionId = SessionId([0xab; 16]);

    #[test]
    fn session_number_is_parsed_as_it_is_written() {
        let id = SessionId(std::array::from_fn(|at| at as u8 * 16 + 1));
        assert_eq!(parse(&name(id)), Some(id));
        for wrong in ["", "abc", &"g".repeat(32), &"1".repeat(33), &"ä".repeat(16)] {
            assert_eq!(parse(wrong), None);
        }
    }

    #[test]
    fn session_is_taken_over_only_after_its_process_has_ended() {
        let (_scratch, directory) = directory();
        let keeper = SessionFile::new(&directory, ID, Role::Source, Record(1)).unwrap();
        let take = |beginning: &str, role| {
            SessionFile::<Record>::take_over(&directory, beginning, role)
                .map(|(keeper, r)| (keeper, r.0))
        };
        let fails = |beginning: &str, role| take(beginning, role).err().unwrap().to_string();
        assert!(fails("abab", Role::Source).contains("no session abab"), "nothing is written yet");
        keeper.edit(|record| record.0 = 2).unwrap();
        assert!(fails("abab", Role::Source).contains("another running umem"));
        assert!(fails("abab", Role::Destination).contains("no session"));
        drop(keeper);
        assert!(fails("cd", Role::Source).contains(&format!("there are {}", name(ID))));
        assert!(fails("", Role::Source).contains("no session"));
        let (keeper, record) = take("ab", Role::Source).unwrap();
        assert_eq!(record, 2);
        assert!(fails(&name(ID), Role::Source).contains("another running umem"));
        fs::write(keeper.file("freed.0"), "").unwrap();
        keeper.remove();
        drop(keeper);
        assert_eq!(files(&directory), 0);
    }

    #[test]
    fn invalid_record_is_refused_without_blocking() {
        let (_scratch, directory) = directory();
        let path = directory.path(&name(ID), Role::Source.name());
        let refused = || {
            let taken = SessionFile::<Record>::take_over(&directory, "ab", Role::Source);
            let error = taken.err().unwrap().to_string();
            fs::remove_file(&path).unwrap();
            error
        };
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(refused().contains("not a regular file"));
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(refused().contains("not a regular file"));
        File::create(&path).unwrap().set_len(RECORD_BYTES_MAX + 1).unwrap();
        assert!(refused().contains("more than"));
        fs::write(&path, b"\xff").unwrap();
        assert!(refused().contains("was not written by this version of umem"));
    }

    #[test]
    fn session_without_a_record_leaves_no_files() {
        let (_scratch, directory) = directory();
        let keeper = SessionFile::new(&directory, ID, Role::Destination, Record(1)).unwrap();
        fs::write(keeper.file("guest"), "").unwrap();
        drop(keeper);
        assert_eq!(files(&directory), 0);
    }

    #[test]
    fn directory_readable_by_others_is_refused() {
        let (_scratch, directory) = directory();
        fs::set_permissions(&directory.0, fs::Permissions::from_mode(0o755)).unwrap();
        let error = Directory::find(Some(&directory.0)).unwrap_err().to_string();
        assert!(error.contains("mode 0700"), "{error}");
    }
}
