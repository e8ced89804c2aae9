//! How `--resume SESSION` begins, on either side.

use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;

use umem_wire::limits::LANES_MAX;

use super::{DestinationRecord, Directory, SessionFile, SourceRecord, VERSION};
use crate::error::{Error, Result};
use crate::observe;
use crate::runtime::idle::IdleCores;
use crate::runtime::role::Role;
use crate::transport::secure::Security;
use crate::transport::uri::Uri;

/// What a process is asked to do that takes over.
#[derive(Clone, Debug)]
pub struct Options {
    /// The session's number, or how it begins.
    pub session: String,
    /// Where session files are; none for the usual place.
    pub session_dir: Option<PathBuf>,
    /// Where the other side is to be found, or to come, if not where it was.
    pub uri: Option<Uri>,
    /// How lanes are secured, where that is not to be as it was.
    pub security: Option<Security>,
    /// Cores for the demand lane and the bulk lanes, in this order; empty to choose.
    pub cores: Vec<usize>,
    /// What idle cores do while faults come.
    pub idle_cores: IdleCores,
    /// JSON events on stdout.
    pub json: bool,
    /// What others may see.
    pub observe: observe::Options,
}

/// A side's record.
pub(crate) trait Record: Clone + Serialize + DeserializeOwned {
    const ROLE: Role;

    fn version(&self) -> u32;

    /// Of its session.
    fn bulk_lanes(&self) -> u16;

    /// How its lanes were secured.
    fn security(&self) -> Security;
}

impl Record for SourceRecord {
    const ROLE: Role = Role::Source;

    fn version(&self) -> u32 {
        self.version
    }

    fn bulk_lanes(&self) -> u16 {
        self.bulk_lanes
    }

    fn security(&self) -> Security {
        self.security.security()
    }
}

impl Record for DestinationRecord {
    const ROLE: Role = Role::Destination;

    fn version(&self) -> u32 {
        self.version
    }

    fn bulk_lanes(&self) -> u16 {
        self.bulk_lanes
    }

    fn security(&self) -> Security {
        self.security.security()
    }
}

impl Options {
    /// Makes the session this process's, and reads what is known of it.
    ///
    /// # Errors
    /// No such session, one that is served by a process which lives, or the record of another umem.
    pub(crate) fn take_over<R: Record>(&self) -> Result<(SessionFile<R>, R)> {
        let directory = Directory::find(self.session_dir.as_deref())?.ok_or_else(no_directory)?;
        let (keeper, record) = SessionFile::<R>::take_over(&directory, &self.session, R::ROLE)?;
        check(&record)?;
        Ok((keeper, record))
    }

    /// How lanes are to be secured.
    pub(crate) fn security(&self, record: &impl Record) -> Security {
        self.security.clone().unwrap_or_else(|| record.security())
    }
}

/// There is nowhere to look.
fn no_directory() -> Error {
    Error::Usage(
        "there is no usual place for session files, as $XDG_RUNTIME_DIR is not set: name their directory \
         with --session-dir"
            .into(),
    )
}

/// A record of another umem is not guessed at, nor is one that no umem writes.
pub(crate) fn check(record: &impl Record) -> Result<()> {
    let (version, lanes) = (record.version(), record.bulk_lanes());
    if version == VERSION && lanes > LANES_MAX {
        return Err(Error::Environment(format!(
            "the session file has {lanes} bulk lanes, and there are {LANES_MAX} at most: it is damaged"
        )));
    }
    if version == VERSION {
        return Ok(());
    }
    Err(Error::Environment(format!(
        "the session file has version {version}, and this umem knows {VERSION}: resume with the umem \
         that began the session"
    )))
}
